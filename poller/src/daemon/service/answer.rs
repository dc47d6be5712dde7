//! What comes of a request.

use prost::Message;

use crate::Error;
use crate::api::{Code, Response, Status, WatchEvent};

/// What came of a request.
#[derive(Debug)]
pub(in crate::daemon) enum Answer {
    Done(Vec<u8>),
    Refused(Code, String),
    /// The stream stays open; these are its first messages.
    Watch(Vec<WatchEvent>),
}

impl Answer {
    pub(in crate::daemon) fn refused(code: Code, reason: impl Into<String>) -> Self {
        Self::Refused(code, reason.into())
    }

    /// The message that ends the stream.
    pub(in crate::daemon) fn encode(self) -> Vec<u8> {
        let response = match self {
            Self::Done(payload) => Response {
                status: None,
                payload,
            },
            Self::Refused(code, message) => Response {
                status: Some(Status {
                    code: code as i32,
                    message,
                }),
                payload: Vec::new(),
            },
            Self::Watch(_) => Response::default(),
        };
        response.encode_to_vec()
    }
}

pub(super) type Result<T, E = Refusal> = std::result::Result<T, E>;

/// Why a request is not done.
#[derive(Debug)]
pub(super) struct Refusal(pub(super) Code, pub(super) String);

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let code = match error {
            Error::InvalidValue { .. } | Error::UnknownKey { .. } | Error::Config { .. } => {
                Code::InvalidArgument
            }
            Error::Required { .. } => Code::FailedPrecondition,
            Error::AlreadyAttached { .. } => Code::AlreadyExists,
            _ => Code::Internal,
        };
        Self(code, error.to_string())
    }
}

pub(super) fn invalid(reason: impl Into<String>) -> Refusal {
    Refusal(Code::InvalidArgument, reason.into())
}
