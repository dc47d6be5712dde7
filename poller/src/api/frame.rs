//! ttrpc's framing: a header of ten bytes (length, stream, kind, flags; big endian) and the payload.

use super::{MAX_ANSWER, MAX_REQUEST};

/// Bytes of a header.
const HEADER: usize = 10;

/// Flag: the sender sends nothing more on this stream.
pub const REMOTE_CLOSED: u8 = 1;

/// Flag: the sender will send data on this stream.
pub const REMOTE_OPEN: u8 = 2;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A call.
    Request,
    /// Its answer, which ends the stream.
    Response,
    /// A message of a stream.
    Data,
}

impl Kind {
    fn number(self) -> u8 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Data => 3,
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        [Self::Request, Self::Response, Self::Data]
            .into_iter()
            .find(|k| k.number() == number)
    }

    /// Most bytes of a payload of this kind.
    fn limit(self) -> usize {
        match self {
            Self::Request => MAX_REQUEST,
            Self::Response | Self::Data => MAX_ANSWER,
        }
    }
}

/// One message with its header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Which call it belongs to; a client's are odd.
    pub stream: u32,
    /// What it is.
    pub kind: Kind,
    /// [`REMOTE_CLOSED`] and others.
    pub flags: u8,
    /// The message.
    pub payload: Vec<u8>,
}

/// Bytes that are no frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The header announces more than is allowed.
    #[error("a message of {length} bytes on stream {stream}; at most {limit} are taken")]
    TooLong {
        /// Which call it belongs to.
        stream: u32,
        /// Announced bytes.
        length: usize,
        /// Most that are taken.
        limit: usize,
    },
    /// The kind is none of ttrpc's.
    #[error("a message of unknown kind {kind} on stream {stream}; ttrpc has 1, 2 and 3")]
    UnknownKind {
        /// Which call it claims to belong to.
        stream: u32,
        /// The number.
        kind: u8,
    },
}

impl Frame {
    /// The frame as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let length = u32::try_from(self.payload.len()).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(HEADER + self.payload.len());
        bytes.extend(length.to_be_bytes());
        bytes.extend(self.stream.to_be_bytes());
        bytes.push(self.kind.number());
        bytes.push(self.flags);
        bytes.extend(&self.payload);
        bytes
    }
}

/// The first frame in `bytes` and how many bytes it takes; None: there is more to come.
///
/// # Errors
/// What no honest peer sends. Nothing after it can be understood.
pub fn next_frame(bytes: &[u8]) -> Result<Option<(Frame, usize)>, FrameError> {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() else {
        return Ok(None);
    };
    let [l0, l1, l2, l3, s0, s1, s2, s3, kind, flags] = *header;
    let stream = u32::from_be_bytes([s0, s1, s2, s3]);
    let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
    let Some(kind) = Kind::from_number(kind) else {
        return Err(FrameError::UnknownKind { stream, kind });
    };
    let limit = kind.limit();
    if length > limit {
        return Err(FrameError::TooLong {
            stream,
            length,
            limit,
        });
    }
    let frame = rest.get(..length).map(|payload| Frame {
        stream,
        kind,
        flags,
        payload: payload.to_vec(),
    });
    Ok(frame.map(|frame| (frame, HEADER + length)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: Kind, payload: &[u8]) -> Frame {
        Frame {
            stream: 7,
            kind,
            flags: REMOTE_CLOSED,
            payload: payload.to_vec(),
        }
    }

    #[test]
    fn a_frame_comes_back_only_when_all_of_it_is_there() {
        let sent = frame(Kind::Data, b"payload");
        let bytes = sent.encode();
        for cut in 0..bytes.len() {
            assert_eq!(next_frame(&bytes[..cut]), Ok(None), "{cut}");
        }
        let mut two = bytes.clone();
        two.extend(frame(Kind::Request, b"").encode());
        let (got, used) = next_frame(&two).expect("valid").expect("whole");
        assert_eq!((got, used), (sent, bytes.len()));
        let (got, _) = next_frame(&two[used..]).expect("valid").expect("whole");
        assert_eq!(got, frame(Kind::Request, b""));
    }

    #[test]
    fn too_long_is_refused_by_its_header_alone() {
        for (kind, limit) in [(1, MAX_REQUEST), (2, MAX_ANSWER), (3, MAX_ANSWER)] {
            let header = |length: usize| {
                let mut bytes = u32::try_from(length).expect("u32").to_be_bytes().to_vec();
                bytes.extend([0, 0, 0, 9, kind, 0]);
                bytes
            };
            assert_eq!(next_frame(&header(limit)), Ok(None));
            let refused = FrameError::TooLong {
                stream: 9,
                length: limit + 1,
                limit,
            };
            assert_eq!(next_frame(&header(limit + 1)), Err(refused));
        }
    }

    #[test]
    fn an_unknown_kind_is_refused() {
        for kind in [0, 4, 255] {
            let bytes = [0, 0, 0, 0, 0, 0, 0, 1, kind, 0];
            let refused = FrameError::UnknownKind { stream: 1, kind };
            assert_eq!(next_frame(&bytes), Err(refused));
        }
    }
}
