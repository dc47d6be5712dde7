//! A synchronous netlink socket: requests in batches, dumps that are retried when they were
//! interrupted, and the kernel's extended acknowledgements as error text. [`crate::link`]
//! builds the route family on it, [`crate::napi`] the netdev one, [`crate::nft`] nf_tables.
//!
//! Requests are written with the typed messages of the rust-netlink crates. Answers are read
//! attribute by attribute ([`attributes`]), only those that kbp needs: a newer kernel may add or
//! change any other, and a counter that is read every millisecond must not cost the parsing of
//! forty attributes.

mod answer;
pub(crate) mod attributes;
mod generic;
mod request;
mod subscription;

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP};
use netlink_sys::SocketAddr;
use netlink_sys::protocols::{NETLINK_GENERIC, NETLINK_NETFILTER, NETLINK_ROUTE};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::{Error, Result};
use answer::{Answer, Failure, answers};
pub(crate) use generic::{GENERIC_HEADER, GenericMessage, open_family};
pub(crate) use request::Request;
pub(crate) use subscription::Subscription;

/// The kernel carries a request out before `sendmsg` returns, and hands out dumps as they are
/// read, so an answer is there at once. Whoever waits longer waits for one that was lost.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// The kernel fills at most 32 KiB of a dump at a time (`netlink_dump`), and sizes single answers
/// by the object; what kbp asks for stays far below.
const RECEIVE_BUFFER: usize = 64 * 1024;

/// Room for the acknowledgements of a batch, each of which occupies about 1 KiB of kernel memory.
const SOCKET_BUFFER: usize = 1024 * 1024;

/// Requests that go into one message: their acknowledgements fit the default socket buffer, where
/// a larger one is refused.
const BATCH: usize = 64;

/// Changes while a dump runs interrupt it. A node that changes this fast for this many dumps in a
/// row does not stop by itself.
const DUMP_ATTEMPTS: u32 = 32;

/// What a socket speaks.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Protocol {
    /// rtnetlink.
    Route,
    /// Generic netlink.
    Generic,
    /// nfnetlink.
    Netfilter,
}

impl Protocol {
    fn number(self) -> isize {
        match self {
            Self::Route => NETLINK_ROUTE,
            Self::Generic => NETLINK_GENERIC,
            Self::Netfilter => NETLINK_NETFILTER,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Route => "route",
            Self::Generic => "generic",
            Self::Netfilter => "netfilter",
        }
    }
}

/// A netlink socket of one protocol; it belongs to the network namespace that the thread was in
/// when it was opened.
#[derive(Debug)]
pub(crate) struct Socket {
    socket: netlink_sys::Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens a socket in the calling thread's namespace.
    pub(crate) fn open(protocol: Protocol) -> Result<Self> {
        let failed = |source| Error::Syscall {
            what: format!("open a {} netlink socket", protocol.name()),
            source,
        };
        let mut socket = netlink_sys::Socket::new(protocol.number()).map_err(failed)?;
        socket.bind_auto().map_err(failed)?;
        // All three came with 4.12 and 4.20. Without them errors are only less clear and dumps longer.
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        let _ = socket.set_netlink_get_strict_chk(true);
        let timeout =
            TimeVal::microseconds(ANSWER_TIMEOUT.as_micros().try_into().unwrap_or(i64::MAX));
        setsockopt(&socket, sockopt::ReceiveTimeout, &timeout)
            .map_err(|errno| failed(errno.into()))?;
        // The privileged form is not limited by net.core.rmem_max.
        if setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER).is_err() {
            let _ = setsockopt(&socket, sockopt::RcvBuf, &SOCKET_BUFFER);
        }
        Ok(Self {
            socket,
            sequence: 0,
            buffer: Vec::with_capacity(RECEIVE_BUFFER),
        })
    }

    /// Carries out every request, also those after a failed one, and returns what became of each,
    /// in their order. The error is one of the transport.
    pub(crate) fn execute(&mut self, requests: &[Request]) -> Result<Vec<Result<()>>> {
        let mut results = Vec::with_capacity(requests.len());
        for batch in requests.chunks(BATCH) {
            results.extend(self.exchange(batch, |_, _| Ok(()))?.results);
        }
        Ok(results)
    }

    /// Sends all requests in one message, as one transaction of nfnetlink: they take effect
    /// together or not at all. Returns the first failure.
    pub(crate) fn transact(&mut self, requests: &[Request]) -> Result<()> {
        self.exchange(requests, |_, _| Ok(()))?
            .results
            .into_iter()
            .collect()
    }

    /// Carries out one request and collects what `read` makes of the answers to it.
    pub(crate) fn query<T>(
        &mut self,
        request: Request,
        mut read: impl FnMut(u16, &[u8]) -> Result<Option<T>>,
    ) -> Result<Vec<T>> {
        let mut found = Vec::new();
        let exchange = self.exchange(&[request.with_flags(NLM_F_ACK)], |kind, payload| {
            found.extend(read(kind, payload)?);
            Ok(())
        })?;
        exchange.results.into_iter().collect::<Result<()>>()?;
        Ok(found)
    }

    /// As [`Socket::query`] for a dump. One that the kernel marks as interrupted by a change is
    /// read anew from the start, a bounded number of times.
    pub(crate) fn dump<T>(
        &mut self,
        request: Request,
        mut read: impl FnMut(u16, &[u8]) -> Result<Option<T>>,
    ) -> Result<Vec<T>> {
        let request = request.with_flags(NLM_F_DUMP);
        for _ in 0..DUMP_ATTEMPTS {
            let mut found = Vec::new();
            let exchange = self.exchange(std::slice::from_ref(&request), |kind, payload| {
                found.extend(read(kind, payload)?);
                Ok(())
            })?;
            exchange.results.into_iter().collect::<Result<()>>()?;
            if !exchange.interrupted {
                return Ok(found);
            }
            tracing::debug!("{}: interrupted by a change, reading anew", request.what());
        }
        Err(Error::Protocol {
            what: request.what().to_owned(),
            detail: format!("interrupted by changes {DUMP_ATTEMPTS} times in a row"),
        })
    }

    /// Sends `requests` in one message and reads until each is answered. `read` gets what is
    /// neither acknowledgement nor end of a dump.
    fn exchange(
        &mut self,
        requests: &[Request],
        mut read: impl FnMut(u16, &[u8]) -> Result<()>,
    ) -> Result<Exchange> {
        let first = self.sequence.wrapping_add(1);
        self.send(requests)?;
        let mut outcomes: Vec<Option<Result<()>>> = requests
            .iter()
            .map(|r| if r.is_answered() { None } else { Some(Ok(())) })
            .collect();
        let mut interrupted = false;
        let mut unreadable = None;
        while let Some(open) = outcomes.iter().position(Option::is_none) {
            self.receive(&requests[open])?;
            for answer in answers(&self.buffer) {
                let answer = answer.map_err(|detail| Error::Protocol {
                    what: requests[open].what().to_owned(),
                    detail,
                })?;
                // Anything else answers an earlier exchange that was given up.
                let Some((request, outcome)) = usize::try_from(answer.sequence.wrapping_sub(first))
                    .ok()
                    .and_then(|index| requests.get(index).zip(outcomes.get_mut(index)))
                else {
                    continue;
                };
                interrupted |= answer.interrupted;
                match answer.body {
                    Answer::Done(failure) => {
                        let result = failure.map_or(Ok(()), |f| Err(refused(request, f)));
                        let is_frame = outcome.is_some() && result.is_err();
                        *outcome = Some(result);
                        if is_frame {
                            // The frame of a transaction was refused, so nothing in it took
                            // effect, whatever the other acknowledgements say.
                            for late in outcomes.iter_mut().filter(|o| o.is_none()) {
                                *late = Some(Ok(()));
                            }
                        }
                    }
                    Answer::Message { kind, payload } => {
                        // Read on to the end, or the rest would be taken for an answer to the
                        // next request.
                        if let Err(error) = read(kind, payload) {
                            unreadable.get_or_insert(error);
                        }
                    }
                }
            }
        }
        match unreadable {
            Some(error) => Err(error),
            None => Ok(Exchange {
                results: outcomes.into_iter().flatten().collect(),
                interrupted,
            }),
        }
    }

    fn send(&mut self, requests: &[Request]) -> Result<()> {
        let mut message = Vec::with_capacity(requests.iter().map(Request::len).sum());
        for request in requests {
            self.sequence = self.sequence.wrapping_add(1);
            request.write(self.sequence, &mut message);
        }
        let kernel = SocketAddr::new(0, 0);
        let sent = retry_interrupted(|| self.socket.send_to(&message, &kernel, 0));
        sent.map(|_| ()).map_err(|source| Error::Syscall {
            what: describe(requests),
            source,
        })
    }

    /// Fills the buffer with the next answer of the kernel.
    fn receive(&mut self, request: &Request) -> Result<()> {
        loop {
            self.buffer.clear();
            let received =
                retry_interrupted(|| self.socket.recv_from(&mut self.buffer, libc::MSG_TRUNC));
            let (length, sender) = received.map_err(|source| Error::Syscall {
                what: request.what().to_owned(),
                source: match source.kind() {
                    io::ErrorKind::WouldBlock => io::Error::new(
                        io::ErrorKind::TimedOut,
                        format!(
                            "no answer from the kernel within {} s",
                            ANSWER_TIMEOUT.as_secs()
                        ),
                    ),
                    _ => source,
                },
            })?;
            // Any process may send to this socket; the kernel is port 0.
            if sender.port_number() != 0 {
                continue;
            }
            if length > self.buffer.len() {
                return Err(Error::Protocol {
                    what: request.what().to_owned(),
                    detail: format!("{length} bytes do not fit {RECEIVE_BUFFER}"),
                });
            }
            return Ok(());
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What became of one message full of requests.
struct Exchange {
    results: Vec<Result<()>>,
    interrupted: bool,
}

fn refused(request: &Request, failure: Failure) -> Error {
    Error::Netlink {
        what: request.what().to_owned(),
        errno: failure.errno,
        extack: failure.text,
    }
}

fn describe(requests: &[Request]) -> String {
    match requests {
        [] => "send nothing".to_owned(),
        [one] => one.what().to_owned(),
        [first, rest @ ..] => format!("{} and {} more requests", first.what(), rest.len()),
    }
}

fn retry_interrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
