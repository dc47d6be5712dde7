//! What mode `tune` has changed, as text in the host end's alias.

/// One end before it was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Before {
    /// Generic receive offload.
    pub(super) gro: bool,
    /// TCP segmentation offload.
    pub(super) tso: bool,
    /// Whether it had no qdisc, and so was given one.
    pub(super) no_qdisc: bool,
}

/// Both ends before, and the alias.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    /// The host end.
    pub(super) host: Before,
    /// The pod end.
    pub(super) pod: Before,
    /// The host end's alias; empty when it had none.
    pub(super) alias: String,
}

const PREFIX: &str = "kbp-tuned: ";
/// IFALIASZ of linux/if.h, less the NUL.
const MAX_ALIAS: usize = 255;

impl Record {
    /// `kbp-tuned: host gro=off tso=on qdisc=none, pod gro=off tso=on qdisc=none; was ALIAS`; None when the alias that
    /// was there leaves no room for that.
    pub(super) fn text(&self) -> Option<String> {
        let (host, pod) = (self.host.text(), self.pod.text());
        let text = format!("{PREFIX}host {host}, pod {pod}; was {}", self.alias);
        (text.len() <= MAX_ALIAS).then_some(text)
    }

    /// Reads an alias; None when it is none of these.
    pub(super) fn parse(alias: &str) -> Option<Self> {
        let (ends, alias) = alias.strip_prefix(PREFIX)?.split_once("; was ")?;
        let (host, pod) = ends.split_once(", ")?;
        Some(Self {
            host: Before::parse(host.strip_prefix("host ")?)?,
            pod: Before::parse(pod.strip_prefix("pod ")?)?,
            alias: alias.to_owned(),
        })
    }
}

impl Before {
    fn text(self) -> String {
        let on_off = |on| if on { "on" } else { "off" };
        let qdisc = if self.no_qdisc { "none" } else { "kept" };
        let (gro, tso) = (on_off(self.gro), on_off(self.tso));
        format!("gro={gro} tso={tso} qdisc={qdisc}")
    }

    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let mut flag = |yes: &str, no: &str| match words.next()? {
            word if word == yes => Some(true),
            word if word == no => Some(false),
            _ => None,
        };
        Some(Self {
            gro: flag("gro=on", "gro=off")?,
            tso: flag("tso=on", "tso=off")?,
            no_qdisc: flag("qdisc=none", "qdisc=kept")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_survives_as_text() {
        for (gro, tso, no_qdisc) in [(false, true, true), (true, false, false)] {
            for alias in ["", "uplink; was it?"] {
                let end = Before { gro, tso, no_qdisc };
                let record = Record {
                    host: end,
                    pod: Before { gro: !gro, ..end },
                    alias: alias.to_owned(),
                };
                let text = record.text().expect("it fits");
                assert_eq!(Record::parse(&text), Some(record), "{text}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_or_is_none_is_told() {
        let end = Before {
            gro: false,
            tso: true,
            no_qdisc: true,
        };
        let record = |alias: String| Record {
            host: end,
            pod: end,
            alias,
        };
        assert!(record("a".repeat(100)).text().is_some());
        assert!(record("a".repeat(250)).text().is_none());
        for alias in ["", "kbp:net/c1/eth0", "kbp-tuned: host gro=on; was "] {
            assert_eq!(Record::parse(alias), None, "{alias}");
        }
    }
}
