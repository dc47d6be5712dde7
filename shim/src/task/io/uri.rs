//! The URIs that name where a standard stream goes.

use crate::task::error::{Error, Result};

/// `scheme://path?query`, decoded; a bare path has the scheme `fifo`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Uri {
    pub(super) scheme: String,
    pub(super) path: String,
    /// Keys with their values, in the order of the text.
    pub(super) query: Vec<(String, String)>,
}

impl Uri {
    pub(super) fn parse(text: &str) -> Result<Self> {
        let Some((scheme, rest)) = text.split_once("://") else {
            return Ok(Self {
                scheme: "fifo".to_owned(),
                path: text.to_owned(),
                query: Vec::new(),
            });
        };
        let decode = |part: &str, plus| {
            percent_decode(part, plus).ok_or_else(|| {
                Error::InvalidArgument(format!("{text}: malformed percent-encoding"))
            })
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = decode(path, false)?;
        // What follows the slashes would be a host, and a relative path is nobody's.
        if !path.starts_with('/') {
            return Err(Error::InvalidArgument(format!(
                "{text}: the path is not absolute; write {scheme}:///directory/name"
            )));
        }
        let query = query
            .split('&')
            .filter(|pair| !pair.is_empty())
            .map(|pair| {
                let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                Ok((decode(key, true)?, decode(value, true)?))
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            scheme: scheme.to_ascii_lowercase(),
            path,
            query,
        })
    }
}

fn percent_decode(text: &str, plus_is_blank: bool) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || rest.next().and_then(|byte| char::from(byte).to_digit(16));
                (digit()? * 16 + digit()?) as u8
            }
            b'+' if plus_is_blank => b' ',
            other => other,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_uris() {
        let uri = Uri::parse("/run/a b").expect("a path");
        assert_eq!(
            (uri.scheme.as_str(), uri.path.as_str()),
            ("fifo", "/run/a b")
        );
        let uri = Uri::parse("file:///var/log/a%20b.log").expect("a file");
        assert_eq!(
            (uri.scheme.as_str(), uri.path.as_str()),
            ("file", "/var/log/a b.log")
        );
        let uri = Uri::parse("binary:///usr/bin/log?--to=a+b%26c&-v").expect("a binary");
        assert_eq!(uri.path, "/usr/bin/log");
        assert_eq!(
            uri.query,
            [
                ("--to".to_owned(), "a b&c".to_owned()),
                ("-v".to_owned(), String::new())
            ]
        );
        for relative in ["file://log", "file://", "binary://host/log"] {
            let error = Uri::parse(relative).expect_err("refused").to_string();
            assert!(
                error.contains(relative) && error.contains("absolute"),
                "{error}"
            );
        }
        assert!(Uri::parse("file:///a%2").is_err());
        assert!(Uri::parse("file:///a%ff").is_err());
    }
}
