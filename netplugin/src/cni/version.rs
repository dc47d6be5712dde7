//! Versions of the CNI specification.

use super::error::{CniError, Code, Result};

/// A version of the specification in which kbp can read a config and write a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Version {
    /// The first one, which no cniVersion stands for: results with `ip4` and `ip6`.
    V0_1_0,
    /// The same but for errors and arguments.
    V0_2_0,
    /// Chains of plugins; results with `interfaces` and `ips`.
    V0_3_0,
    /// The same without an ambiguity of its text: `ips` name their family.
    V0_3_1,
    /// CHECK, prevResult in DEL.
    V0_4_0,
    /// `ips` without their family.
    V1_0_0,
    /// GC, STATUS; MTU of interfaces, metrics of routes.
    V1_1_0,
}

impl Version {
    /// Every version, oldest first.
    pub(crate) const ALL: [Self; 7] = [
        Self::V0_1_0,
        Self::V0_2_0,
        Self::V0_3_0,
        Self::V0_3_1,
        Self::V0_4_0,
        Self::V1_0_0,
        Self::V1_1_0,
    ];
    /// The newest one.
    pub(crate) const NEWEST: Self = Self::V1_1_0;

    /// As it is written in a config.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::V0_1_0 => "0.1.0",
            Self::V0_2_0 => "0.2.0",
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// The version of that name, None when kbp does not speak it.
    pub(crate) fn find(text: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|version| version.as_str() == text)
    }

    /// The version that a config names; a config without `cniVersion` is 0.1.0 by the specification.
    pub(crate) fn of_config(text: Option<&str>) -> Result<Self> {
        let Some(text) = text else {
            return Ok(Self::V0_1_0);
        };
        Self::find(text).ok_or_else(|| {
            let all = Self::ALL.map(Self::as_str).join(", ");
            CniError::new(
                Code::VERSION,
                format!("cniVersion {text:?} is not supported; allowed: {all}"),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_and_found_by_name() {
        assert!(Version::ALL.is_sorted());
        for version in Version::ALL {
            assert_eq!(Version::find(version.as_str()), Some(version));
        }
        assert_eq!(Version::find("1.0"), None);
        assert_eq!(Version::ALL.last(), Some(&Version::NEWEST));
    }

    #[test]
    fn a_refused_version_is_named() {
        for (text, part) in [("0.5.0", "\"0.5.0\""), ("2", "\"2\"")] {
            let error = Version::of_config(Some(text)).expect_err("not supported");
            assert_eq!(error.code, Code::VERSION);
            assert!(
                error.msg.contains(part) && error.msg.contains("1.1.0"),
                "{error}"
            );
        }
        assert_eq!(Version::of_config(None).expect("0.1.0"), Version::V0_1_0);
    }
}
