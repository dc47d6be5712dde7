//! The things that are compared.

use std::path::PathBuf;
use std::str::FromStr;

/// How the two programs of a pair are connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Link {
    /// Containers in the network that `--stock-cni` names.
    Stock,
    /// Containers in the network that `--kbp-cni` names.
    Kbp,
    /// Containers in the network of a file.
    File(PathBuf),
    /// Processes of the node over the loopback of a network namespace of their own.
    Loopback,
}

/// One arm: a runtime, a network, and what else is different.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Arm {
    /// As in tables and files.
    pub(crate) name: String,
    /// For a person.
    pub(crate) what: String,
    /// Who starts its containers.
    pub(crate) runtime: Runtime,
    pub(crate) link: Link,
    /// Annotations of the pods.
    pub(crate) annotations: Vec<(String, String)>,
    /// A spinner in the idle class on each CPU of the pair.
    pub(crate) spinners: bool,
    /// Client and server spin on sockets that do not block.
    pub(crate) spin: bool,
}

/// The runtime of an arm.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Runtime {
    /// The one that `--stock-runtime` names.
    Stock,
    /// The one that `--kbp-runtime` names.
    Kbp,
    /// Another one.
    Named(String),
}

/// The arms that have a name, in the order of the help.
pub(crate) const NAMES: [&str; 11] = [
    "stock",
    "veth",
    "kbp",
    "kbp-none",
    "kbp-idle",
    "kbp-shared",
    "kbp-dedicated",
    "kbp-no-window",
    "spinner",
    "spin-floor",
    "loopback",
];

impl FromStr for Arm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let stock = Self {
            name: text.to_owned(),
            what: "stock runtime and network".to_owned(),
            runtime: Runtime::Stock,
            link: Link::Stock,
            annotations: Vec::new(),
            spinners: false,
            spin: false,
        };
        let kbp = |what: &str, annotations: &[(&str, &str)]| Self {
            what: what.to_owned(),
            runtime: Runtime::Kbp,
            link: Link::Kbp,
            annotations: annotations
                .iter()
                .map(|(k, v)| (format!("kbp.io/{k}"), (*v).to_owned()))
                .collect(),
            ..stock.clone()
        };
        Ok(match text {
            "stock" => stock,
            "veth" => Self {
                what: "kbp's network (GRO on, TSO off), stock runtime: nobody polls".to_owned(),
                link: Link::Kbp,
                ..stock
            },
            "kbp" => kbp("kbp runtime and network, the node's policy", &[]),
            "kbp-none" => kbp("kbp, only the sockets poll", &[("worker", "none")]),
            "kbp-idle" => kbp("kbp, worker in the idle class", &[("worker", "idle")]),
            "kbp-shared" => kbp("kbp, worker on the CPU pool", &[("worker", "shared")]),
            "kbp-dedicated" => kbp(
                "kbp, worker with a CPU of its own",
                &[("worker", "dedicated")],
            ),
            "kbp-no-window" => kbp("kbp, sockets do not poll", &[("busy-poll", "off")]),
            "spinner" => Self {
                what: "control: stock, and an idle-class spinner on each CPU, so that none halts"
                    .to_owned(),
                spinners: true,
                ..stock
            },
            "spin-floor" => Self {
                what: "floor: stock network, both programs rewritten to spin".to_owned(),
                spin: true,
                ..stock
            },
            "loopback" => Self {
                what: "floor: no containers, the loopback of the node".to_owned(),
                link: Link::Loopback,
                ..stock
            },
            custom => {
                let (name, rest) = custom.split_once('=').ok_or_else(|| {
                    format!(
                        "no arm {custom:?}; there are {}, and NAME=RUNTIME[@CONFLIST]",
                        NAMES.join(", ")
                    )
                })?;
                let (runtime, link) = match rest.split_once('@') {
                    Some((runtime, file)) => (runtime, Link::File(PathBuf::from(file))),
                    None => (rest, Link::Stock),
                };
                let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
                if name.is_empty() || !name.chars().all(plain) || runtime.is_empty() {
                    return Err(format!("{custom:?} is not NAME=RUNTIME[@CONFLIST]"));
                }
                Self {
                    name: name.to_owned(),
                    what: format!("runtime {runtime}"),
                    runtime: Runtime::Named(runtime.to_owned()),
                    link,
                    ..stock
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_an_arm_and_others_can_be_made() {
        for name in NAMES {
            assert_eq!(name.parse::<Arm>().expect(name).name, name);
        }
        let custom: Arm = "g=io.containerd.runsc.v1@/etc/cni/net.d/x.conflist"
            .parse()
            .expect("custom");
        assert_eq!(
            custom.runtime,
            Runtime::Named("io.containerd.runsc.v1".to_owned())
        );
        assert_eq!(custom.link, Link::File("/etc/cni/net.d/x.conflist".into()));
        for wrong in ["kpb", "=x", "a b=x", "a="] {
            assert!(wrong.parse::<Arm>().is_err(), "{wrong}");
        }
    }
}
