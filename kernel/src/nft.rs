//! Masquerading through nf_tables, spoken over netlink: one `inet` table for all pods of the node.
//!
//! ```text
//! table inet kbp {
//!     set pods4  { type ipv4_addr; elements = { 10.88.0.2 comment "net/3f2a…/eth0" } }
//!     set pods6  { type ipv6_addr; }
//!     set local4 { type ipv4_addr; flags interval; elements = { 10.88.0.0/16 } }
//!     set local6 { type ipv6_addr; flags interval; }
//!     chain postrouting {
//!         type nat hook postrouting priority srcnat; policy accept;
//!         ip saddr @pods4 ip daddr != @local4 ip daddr != 224.0.0.0/4 masquerade
//!         ip6 saddr @pods6 ip6 daddr != @local6 ip6 daddr != ff00::/8 masquerade
//!     }
//! }
//! ```
//!
//! Every change is one transaction of the kernel, and each addition carries all it depends on, or is
//! made only if nothing has changed since all of that was seen, so any number of processes may add,
//! remove and clean up at once without a lock between them.

mod family;
mod message;
mod ranges;
mod read;

use std::net::IpAddr;

use ipnet::IpNet;

use self::family::Family;
use self::message::Messages;
use crate::netlink::{Protocol, Request, Socket};
use crate::netns::Netns;
use crate::{Error, Result};

/// How often a change is tried that others get in the way of, where the kernel finds that out half
/// way and takes milliseconds to undo it.
const ATTEMPTS: u32 = 8;

/// The same where it is found out before anything is done: each attempt costs less than 0.1 ms, and
/// every failed one is another's success.
const CHEAP_ATTEMPTS: u32 = 256;

/// The comment of an element, as nft(8) limits it, without its NUL.
const MAX_OWNER: usize = 127;

/// An address whose traffic to the world is masqueraded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Masqueraded {
    /// The pod's address.
    pub address: IpAddr,
    /// Whom it was added for, as given to [`MasqueradeTable::add`]; empty when somebody else
    /// added it without a comment.
    pub owner: String,
}

/// The table of one name in one network namespace. Nothing is created before
/// [`MasqueradeTable::add`].
///
/// Errors of its methods: [`Error::Netlink`] when the kernel refuses, [`Error::Syscall`] when it
/// does not answer.
#[derive(Debug)]
pub struct MasqueradeTable {
    socket: Socket,
    messages: Messages,
    /// The generation that opening has found, until the first use of it.
    seen: Option<u32>,
}

impl MasqueradeTable {
    /// Opens a netlink socket in `netns` for the table `inet <name>` (`kbp`; tests use their own).
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the kernel has no nf_tables.
    pub fn open(netns: &Netns, name: &str) -> Result<Self> {
        let unsupported = |error: Error| match error.errno() {
            Some(libc::EPROTONOSUPPORT | libc::EOPNOTSUPP | libc::EINVAL) => Error::Unsupported {
                feature: "masquerading through nf_tables",
                reason: format!("{error}; the kernel needs CONFIG_NF_TABLES and nft_masq"),
            },
            _ => error,
        };
        let socket = netns
            .run(|| Socket::open(Protocol::Netfilter))?
            .map_err(unsupported)?;
        let mut table = Self {
            socket,
            messages: Messages::new(name),
            seen: None,
        };
        table.seen = Some(table.generation().map_err(unsupported)?);
        Ok(table)
    }

    /// Masquerades `addresses`, except towards `local` ranges (the node's own pod ranges). Creates
    /// table, sets, chain and rules when they are missing.
    ///
    /// Adding again is fine; an address that is there changes its owner. `owner` is 1 to 127 bytes
    /// without NUL. A range inside one that is there adds nothing, one around others replaces them.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an owner that is not as said, and for a range that cannot be a pod
    /// range.
    pub fn add(&mut self, owner: &str, addresses: &[IpAddr], local: &[IpNet]) -> Result<()> {
        if owner.is_empty() || owner.len() > MAX_OWNER || owner.contains('\0') {
            return Err(Error::Invalid {
                name: "owner of a masqueraded address",
                value: owner.to_owned(),
                expected: format!("1 to {MAX_OWNER} bytes without NUL"),
            });
        }
        if let Some(range) = local
            .iter()
            .find(|range| ranges::next(range.broadcast()).is_none())
        {
            // Nor does the kernel notice what overlaps an interval without an end.
            return Err(Error::Invalid {
                name: "local range",
                value: range.to_string(),
                expected: "a range of pod addresses, none of which is the last of all".to_owned(),
            });
        }
        let local = ranges::outermost(local);
        let added = retry(&[ERESTART, libc::ENOENT], CHEAP_ATTEMPTS, || {
            self.add_to_complete(owner, addresses, &local)
        });
        match added {
            Ok(true) => return Ok(()),
            Err(error)
                if !matches!(error.errno(), Some(ERESTART | libc::ENOENT | libc::EEXIST)) =>
            {
                return Err(error);
            }
            // Not all of it is there, or an address is, or others change the tables without a pause.
            _ => {}
        }
        retry(&[libc::EEXIST, libc::ENOENT], ATTEMPTS, || {
            let mut requests = self.messages.structure();
            for address in addresses {
                requests.extend(self.messages.replace_pod(*address, owner));
            }
            let present = self.local()?;
            for range in &local {
                // The outer one is written again: its table may be about to go.
                let outer = present
                    .iter()
                    .find(|other| other.contains(range))
                    .unwrap_or(range);
                let inside = present
                    .iter()
                    .filter(|other| outer.contains(*other) && *other != outer);
                requests.extend(inside.map(|other| self.messages.delete_range(*other)));
                requests.push(self.messages.add_range(*outer));
            }
            self.transact(None, requests)
        })
    }

    /// Adds `addresses` to a table that has everything else; whether it did. One that is there already is
    /// EEXIST, which spares reading those of all other pods. A
    /// transaction that also deletes, as the general one does, makes the kernel wait for an RCU grace
    /// period, about 10 ms, when this socket is closed (nft_rcv_nl_event in nf_tables_api.c).
    fn add_to_complete(
        &mut self,
        owner: &str,
        addresses: &[IpAddr],
        local: &[IpNet],
    ) -> Result<bool> {
        let generation = self.generation()?;
        let mut present = Vec::new();
        for family in Family::ALL {
            let is_of = |range: &IpNet| Family::of(range.addr()).local == family.local;
            if local.iter().any(is_of) {
                present.extend(ranges::from_elements(&self.elements(family.local)?));
            }
        }
        let covered = |range: &IpNet| present.iter().any(|other| other.contains(range));
        let complete = self.is_active()? && local.iter().all(covered);
        if complete && !addresses.is_empty() {
            let requests = addresses
                .iter()
                .map(|address| self.messages.add_pod(*address, owner));
            let requests = requests.collect();
            self.transact(Some(generation), requests)?;
        }
        Ok(complete)
    }

    /// Removes addresses, whoever owns them; fine when they, or the table, are not there.
    pub fn remove(&mut self, addresses: &[IpAddr]) -> Result<()> {
        self.remove_where(|entry| addresses.contains(&entry.address))
            .map(|_| ())
    }

    /// Removes every address whose owner `is_gone`, and returns how many there were. One that
    /// somebody else adds for another owner meanwhile stays.
    pub fn remove_owned(&mut self, is_gone: impl Fn(&str) -> bool) -> Result<usize> {
        self.remove_where(|entry| is_gone(&entry.owner))
    }

    fn remove_where(&mut self, unwanted: impl Fn(&Masqueraded) -> bool) -> Result<usize> {
        // The kernel counts a new generation a moment before its changes are to be seen (nf_tables_commit in
        // nf_tables_api.c): what is listed in between may have been removed in the generation that was asked for.
        retry(&[ERESTART, libc::ENOENT], CHEAP_ATTEMPTS, || {
            let generation = self.generation()?;
            let unwanted = self.list()?.into_iter().filter(&unwanted);
            let requests: Vec<_> = unwanted
                .map(|entry| self.messages.delete_pod(entry.address))
                .collect();
            let count = requests.len();
            if count > 0 {
                self.transact(Some(generation), requests)?;
            }
            Ok(count)
        })
    }

    /// Every masqueraded address with its owner; empty when there is no table.
    pub fn list(&mut self) -> Result<Vec<Masqueraded>> {
        let mut found = Vec::new();
        for family in Family::ALL {
            let elements = self.elements(family.pods)?.into_iter();
            found.extend(elements.map(|e| Masqueraded {
                address: e.address,
                owner: e.comment,
            }));
        }
        Ok(found)
    }

    /// Every range towards which nothing is masqueraded; empty when there is no table.
    pub fn local(&mut self) -> Result<Vec<IpNet>> {
        let mut found = Vec::new();
        for family in Family::ALL {
            found.extend(ranges::from_elements(&self.elements(family.local)?));
        }
        Ok(found)
    }

    /// Whether chain and rules are in force.
    pub fn is_active(&mut self) -> Result<bool> {
        let found = self
            .socket
            .dump(self.messages.list_rules(), |_, _| Ok(Some(())));
        Ok(missing_is_empty(found)?.len() == Family::ALL.len())
    }

    /// Deletes the table when no address is left, atomically; whether it did. Leaves it where
    /// others change the tables without a pause.
    pub fn delete_if_unused(&mut self) -> Result<bool> {
        let deleted = retry(&[ERESTART, libc::ENOENT], CHEAP_ATTEMPTS, || {
            let generation = self.generation()?;
            if !self.exists()? || !self.list()?.is_empty() {
                return Ok(false);
            }
            // This waits for a transaction that is about to end in this very generation (see remove_where): what
            // it adds is in the next list, and must not go with the table.
            self.transact(Some(generation), vec![self.messages.create_table()])?;
            if !self.list()?.is_empty() {
                return Ok(false);
            }
            self.transact(Some(generation), vec![self.messages.delete_table()])
                .map(|()| true)
        });
        match deleted {
            Err(error) if error.errno() == Some(ERESTART) => {
                tracing::debug!("{} stays for now: {error}", self.messages.table());
                Ok(false)
            }
            deleted => deleted,
        }
    }

    /// Deletes the table with everything in it; fine when it is not there.
    pub fn delete(&mut self) -> Result<()> {
        retry(&[libc::ENOENT], ATTEMPTS, || match self.exists()? {
            true => self.transact(None, vec![self.messages.delete_table()]),
            false => Ok(()),
        })
    }

    fn exists(&mut self) -> Result<bool> {
        let found = self
            .socket
            .query(self.messages.get_table(), |_, _| Ok(Some(())));
        Ok(!missing_is_empty(found)?.is_empty())
    }

    fn elements(&mut self, set: &str) -> Result<Vec<read::Element>> {
        let request = self.messages.list_elements(set);
        let found = self
            .socket
            .dump(request, |_, payload| Ok(Some(read::elements(payload))));
        Ok(missing_is_empty(found)?.into_iter().flatten().collect())
    }

    /// Number of the ruleset that is in force; each transaction makes a new one.
    fn generation(&mut self) -> Result<u32> {
        // An old one does no harm: what is based on it is refused, and tried again with the next.
        if let Some(seen) = self.seen.take() {
            return Ok(seen);
        }
        let request = self.messages.get_generation();
        let what = request.what().to_owned();
        let found = self
            .socket
            .query(request, |_, payload| Ok(read::generation(payload)))?;
        found.first().copied().ok_or_else(|| Error::Protocol {
            what,
            detail: "the answer has no number".to_owned(),
        })
    }

    /// Applies `requests` together; only on top of `generation`, where one is given.
    fn transact(&mut self, generation: Option<u32>, requests: Vec<Request>) -> Result<()> {
        let begin = self.messages.begin(generation);
        let end = self.messages.end();
        let whole: Vec<_> = [begin].into_iter().chain(requests).chain([end]).collect();
        self.socket.transact(&whole)
    }
}

/// "Interrupted system call should be restarted": the kernel's answer to a generation that is
/// not in force any more.
const ERESTART: i32 = 85;

/// Runs `work`, which reads and then writes what follows from it, again when it fails with one of
/// `conflicts`: somebody else wrote in between. Not for ever, for these have other causes too.
fn retry<T>(conflicts: &[i32], attempts: u32, mut work: impl FnMut() -> Result<T>) -> Result<T> {
    let mut attempts = 1..attempts;
    loop {
        match work() {
            Err(error)
                if error
                    .errno()
                    .is_some_and(|errno| conflicts.contains(&errno))
                    && attempts.next().is_some() => {}
            result => return result,
        }
    }
}

fn missing_is_empty<T>(result: Result<Vec<T>>) -> Result<Vec<T>> {
    match result {
        Err(error) if error.errno() == Some(libc::ENOENT) => Ok(vec![]),
        result => result,
    }
}
