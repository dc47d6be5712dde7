//! PostgreSQL's protocol, version 3, over sockets that block, as drivers talk it that do without libpq, which waits in `poll`.
//!
//! Only what a simple query to a server that trusts everybody needs: https://www.postgresql.org/docs/current/protocol-message-formats.html

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use hdrhistogram::Histogram;

use crate::{LOST_AFTER, Span, tell};

const QUERY: &str = "SELECT 6 * 7;";
const ANSWER: &[u8] = b"42";
/// A server that says more than this for one row of two bytes is none.
const LONGEST: usize = 1 << 16;

/// A connection that is logged in.
struct Client {
    stream: TcpStream,
    received: Vec<u8>,
}

/// What messages up to the next ReadyForQuery say.
#[derive(Debug, PartialEq)]
enum Said {
    /// Not all of it has come.
    Part,
    /// The first column of each row.
    Ready(Vec<Vec<u8>>),
}

impl Client {
    fn open(address: &str) -> Result<Self> {
        let stream = TcpStream::connect(address).with_context(|| format!("connect {address}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LOST_AFTER))?;
        let mut client = Self {
            stream,
            received: Vec::with_capacity(4096),
        };
        let mut hello = 196_608u32.to_be_bytes().to_vec();
        hello.extend(b"user\0postgres\0database\0postgres\0\0");
        let rows = client.ask(&framed(None, &hello)).context("log in")?;
        ensure!(rows.is_empty(), "rows before any query");
        Ok(client)
    }

    fn query(&mut self, query: &[u8]) -> Result<()> {
        let rows = self.ask(query)?;
        ensure!(rows == [ANSWER], "wrong rows: {rows:?}");
        Ok(())
    }

    fn ask(&mut self, request: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.received.clear();
        self.stream.write_all(request).context("send")?;
        let mut piece = [0; 4096];
        loop {
            // Waits here, in the kernel.
            let count = self.stream.read(&mut piece).context("receive")?;
            ensure!(count > 0, "the server closed a connection");
            self.received.extend_from_slice(&piece[..count]);
            if let Said::Ready(rows) = said(&self.received)? {
                return Ok(rows);
            }
        }
    }
}

/// A message: its kind, which the first one of a connection has not, its length and the rest.
fn framed(kind: Option<u8>, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap_or(u32::MAX);
    let mut message: Vec<u8> = kind.into_iter().collect();
    message.extend(length.to_be_bytes());
    message.extend(body);
    message
}

/// Reads messages.
fn said(mut bytes: &[u8]) -> Result<Said> {
    let mut rows = Vec::new();
    while let [kind, a, b, c, d, rest @ ..] = bytes {
        let length = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
        ensure!(
            (4..LONGEST).contains(&length),
            "a message of {length} bytes"
        );
        let Some((body, after)) = rest.split_at_checked(length - 4) else {
            return Ok(Said::Part);
        };
        match kind {
            b'D' => rows.push(first_column(body).context("a broken row")?.to_vec()),
            b'R' => ensure!(body == [0; 4], "it wants a password"),
            b'E' => bail!("error: {}", String::from_utf8_lossy(body)),
            b'Z' => {
                ensure!(after.is_empty(), "more after the end of an answer");
                return Ok(Said::Ready(rows));
            }
            // What the row looks like, that the command is complete, and the server's settings.
            b'T' | b'C' | b'S' | b'K' | b'N' => {}
            other => bail!("an unexpected message {:?}", char::from(*other)),
        }
        bytes = after;
    }
    Ok(Said::Part)
}

fn first_column(row: &[u8]) -> Option<&[u8]> {
    let [_, _, a, b, c, d, rest @ ..] = row else {
        return None;
    };
    let length = usize::try_from(i32::from_be_bytes([*a, *b, *c, *d])).ok()?;
    rest.get(..length)
}

/// `clients` threads that ask one thing after the other, each on a connection of its own.
pub(crate) fn load(address: &str, clients: usize, span: Span) -> Result<()> {
    ensure!((1..=1000).contains(&clients), "{clients} clients");
    let connections: Vec<Client> = (0..clients)
        .map(|_| Client::open(address))
        .collect::<Result<_>>()?;
    let mut query = QUERY.as_bytes().to_vec();
    query.push(0);
    let query = framed(Some(b'Q'), &query);
    let begin = Instant::now();
    let work = |mut client: Client| -> Result<Histogram<u64>> {
        let mut latency = Histogram::new(3)?;
        loop {
            let sent = Instant::now();
            if !span.goes_on(begin, sent) {
                return Ok(latency);
            }
            client.query(&query)?;
            let now = Instant::now();
            if span.counts(begin, now) {
                latency.record(u64::try_from((now - sent).as_nanos())?)?;
            }
        }
    };
    let each: Vec<Histogram<u64>> = std::thread::scope(|scope| {
        let threads: Vec<_> = connections
            .into_iter()
            .map(|c| scope.spawn(|| work(c)))
            .collect();
        let ends = threads.into_iter().map(|t| t.join());
        ends.map(|end| end.map_err(|_| anyhow!("a thread panicked"))?)
            .collect::<Result<_>>()
    })?;
    let elapsed = span.counted(begin);
    let mut all = Histogram::new(3)?;
    for latency in &each {
        all.add(latency)?;
    }
    let fewest = each.iter().map(Histogram::len).min().unwrap_or(0);
    tell(
        &all,
        elapsed,
        fewest as f64 * clients as f64 / all.len() as f64,
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer() -> Vec<u8> {
        let row = [&[0, 1, 0, 0, 0, 2][..], b"42"].concat();
        let messages: [(u8, &[u8]); 4] = [
            (b'T', b"\0\x01"),
            (b'D', &row),
            (b'C', b"SELECT 1\0"),
            (b'Z', b"I"),
        ];
        let framed = messages.map(|(kind, body)| framed(Some(kind), body));
        framed.concat()
    }

    #[test]
    fn an_answer_is_whole_with_its_last_message() {
        let answer = answer();
        for length in 0..answer.len() {
            assert_eq!(
                said(&answer[..length]).expect("right"),
                Said::Part,
                "{length}"
            );
        }
        assert_eq!(
            said(&answer).expect("right"),
            Said::Ready(vec![b"42".to_vec()])
        );
    }

    #[test]
    fn errors_passwords_and_nonsense_are_told() {
        for (kind, body) in [(b'E', &b"SERROR\0"[..]), (b'R', &[0, 0, 0, 3]), (b'x', b"")] {
            assert!(said(&framed(Some(kind), body)).is_err(), "{kind}");
        }
        assert!(said(b"HTTP/1.1 400").is_err());
        assert!(said(&framed(Some(b'D'), &[0, 1, 0, 0, 0, 9])).is_err());
        let twice = [answer(), answer()].concat();
        assert!(said(&twice).is_err());
    }

    #[test]
    fn the_first_message_has_no_kind() {
        assert_eq!(framed(None, b"ab"), b"\0\0\0\x06ab");
        assert_eq!(framed(Some(b'Q'), b""), b"Q\0\0\0\x04");
    }
}
