//! Errors as the CNI specification wants them: a code, a message, details.

use serde_json::{Value, json};

use super::version::Version;

/// Result of a part of a call.
pub(crate) type Result<T, E = CniError> = std::result::Result<T, E>;

/// Number of an error: below 100 from the specification, from 100 on kbp's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Code(pub(crate) u32);

impl Code {
    /// The version of the config is not supported.
    pub(crate) const VERSION: Self = Self(1);
    /// A field has a value that is well-formed but not supported.
    pub(crate) const UNSUPPORTED: Self = Self(2);
    /// The container does not exist; the runtime need not clean up.
    pub(crate) const UNKNOWN_CONTAINER: Self = Self(3);
    /// An environment variable is missing or wrong.
    pub(crate) const ENVIRONMENT: Self = Self(4);
    /// Input or output failed.
    pub(crate) const IO: Self = Self(5);
    /// Something is not JSON, or not of the expected shape.
    pub(crate) const DECODE: Self = Self(6);
    /// The network config is not valid.
    pub(crate) const CONFIG: Self = Self(7);
    /// It did not work now; the runtime may try again.
    pub(crate) const TRY_AGAIN: Self = Self(11);
    /// STATUS: an ADD would fail.
    pub(crate) const NOT_AVAILABLE: Self = Self(50);
    /// The kernel refused an operation.
    pub(crate) const KERNEL: Self = Self(100);
    /// The IPAM plugin is missing, broke, or gave a result that cannot be used.
    pub(crate) const IPAM: Self = Self(101);
    /// The interface exists already.
    pub(crate) const EXISTS: Self = Self(102);
    /// CHECK found something else than ADD had made.
    pub(crate) const CHANGED: Self = Self(103);
    /// The interface cannot be polled, and the config says that it has to be.
    pub(crate) const NOT_POLLABLE: Self = Self(104);
    /// kbp-poller does not poll the interface, and the config says that it has to.
    pub(crate) const NOT_POLLED: Self = Self(105);
    /// The built-in IPAM has no free address, or the one that is asked for is leased.
    pub(crate) const EXHAUSTED: Self = Self(110);
}

/// A failed call.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{msg}{}", if details.is_empty() { String::new() } else { format!(" ({details})") })]
pub(crate) struct CniError {
    /// What kind of failure it is.
    pub(crate) code: Code,
    /// What was tried on what, the value, the remedy.
    pub(crate) msg: String,
    /// More about it; may be empty.
    pub(crate) details: String,
}

impl CniError {
    /// An error without details.
    pub(crate) fn new(code: Code, msg: impl Into<String>) -> Self {
        Self {
            code,
            msg: msg.into(),
            details: String::new(),
        }
    }

    /// Adds to the details.
    pub(crate) fn with_details(mut self, more: &str) -> Self {
        if !more.is_empty() {
            if !self.details.is_empty() {
                self.details.push_str("; ");
            }
            self.details.push_str(more);
        }
        self
    }

    /// A config value that is malformed: names the key, the value and what is allowed.
    pub(crate) fn config(key: &str, value: &Value, allowed: &str) -> Self {
        Self::new(
            Code::CONFIG,
            format!("{key}: {value} is not valid; allowed: {allowed}"),
        )
    }

    /// Several failures as one, None when there is none. The first decides the code.
    pub(crate) fn join(errors: Vec<Self>) -> Option<Self> {
        let mut errors = errors.into_iter();
        let first = errors.next()?;
        Some(errors.fold(first, |first, next| first.with_details(&next.to_string())))
    }

    /// The error as it is written to stdout.
    pub(crate) fn to_json(&self, version: Version) -> Value {
        let mut error =
            json!({ "cniVersion": version.as_str(), "code": self.code.0, "msg": self.msg });
        if !self.details.is_empty() {
            error["details"] = json!(self.details);
        }
        error
    }
}

impl From<kbp_kernel::Error> for CniError {
    fn from(error: kbp_kernel::Error) -> Self {
        Self::new(Code::KERNEL, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joined_errors_keep_the_first_code_and_every_message() {
        let joined = CniError::join(vec![
            CniError::new(Code::IO, "first"),
            CniError::new(Code::KERNEL, "second"),
            CniError::new(Code::IPAM, "third"),
        ])
        .expect("three errors");
        assert_eq!(
            joined.to_json(Version::V1_0_0),
            json!({ "cniVersion": "1.0.0", "code": 5, "msg": "first", "details": "second; third" }),
        );
        assert!(CniError::join(Vec::new()).is_none());
    }

    #[test]
    fn empty_details_are_left_out() {
        let json = CniError::new(Code::CONFIG, "x").to_json(Version::V0_3_1);
        assert_eq!(
            json,
            json!({ "cniVersion": "0.3.1", "code": 7, "msg": "x" })
        );
    }
}
