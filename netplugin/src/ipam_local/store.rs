//! Leases as files, in the layout of host-local: `<dataDir>/<network>/<address>` holds the container id and the
//! interface. A node can change between the two with pods running, whichever of them leased what.
//!
//! Beside them, `.owners/<container id>@<interface>` lists the addresses of an attachment, so that neither ADD nor
//! DEL reads every lease. It is written before the leases and removed after them: whatever a kill interrupts, it
//! lists at least what is leased. It is believed only as far as the leases say the same.
//!
//! Leases and lists appear whole, by rename, under a lock that the kernel drops with its holder.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::net::IpAddr;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::cni::error::{CniError, Code, Result};

const LOCK: &str = "lock";
const OWNERS: &str = ".owners";
/// What a kill may leave half-written. There is one writer at a time, so there is one such file.
const NEW: &str = ".new";
/// Before the number of the range set.
const LAST: &str = "last_reserved_ip.";

/// Whom a lease belongs to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Owner {
    /// Container id.
    pub(crate) container_id: String,
    /// Interface in the container; empty in leases of very old releases of host-local, which stand for all.
    pub(crate) ifname: String,
}

impl Owner {
    /// The owner of these names.
    pub(crate) fn new(container_id: &str, ifname: &str) -> Self {
        Self {
            container_id: container_id.to_owned(),
            ifname: ifname.to_owned(),
        }
    }

    /// Whether a lease of `other` is this owner's.
    pub(crate) fn covers(&self, other: &Self) -> bool {
        self.container_id == other.container_id
            && (other.ifname.is_empty() || self.ifname == other.ifname)
    }

    /// Reads a lease. A file without a container id is what a kill left of one that was being written in place.
    fn parse(text: &str) -> Option<Self> {
        let (container_id, ifname) = text.trim().split_once('\n').unwrap_or((text.trim(), ""));
        (!container_id.is_empty()).then(|| Self::new(container_id.trim(), ifname.trim()))
    }

    fn lease(&self) -> String {
        format!("{}\r\n{}", self.container_id, self.ifname)
    }

    fn file_name(&self) -> String {
        format!("{}@{}", self.container_id, self.ifname)
    }

    fn from_file_name(name: &str) -> Option<Self> {
        let (container_id, ifname) = name.split_once('@')?;
        Some(Self::new(container_id, ifname))
    }
}

/// The leases of one network.
#[derive(Debug)]
pub(crate) struct Store {
    dir: PathBuf,
}

impl Store {
    /// The store of a network below `data_dir`; nothing is made yet.
    pub(crate) fn new(data_dir: &Path, network: &str) -> Self {
        Self {
            dir: data_dir.join(network),
        }
    }

    /// Whether anything was ever leased here.
    pub(crate) fn exists(&self) -> bool {
        self.dir.is_dir()
    }

    /// Makes the directories where they are missing.
    pub(crate) fn create(&self) -> Result<()> {
        let owners = self.dir.join(OWNERS);
        fs::create_dir_all(&owners).map_err(|error| failed("create", &owners, &error))
    }

    /// Waits for the lock; past `limit` it is code 11. It is held until the result is dropped or the process dies.
    pub(crate) fn lock(&self, limit: Duration) -> Result<Locked<'_>> {
        let path = self.dir.join(LOCK);
        let deadline = Instant::now() + limit;
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(|error| failed("open", &path, &error))?;
        let mut pause = Duration::from_micros(50);
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => {
                    return Ok(Locked {
                        store: self,
                        _lock: lock,
                    });
                }
                Err((unlocked, Errno::EWOULDBLOCK | Errno::EINTR)) => file = unlocked,
                Err((_, errno)) => return Err(failed("lock", &path, &errno.into())),
            }
            if Instant::now() >= deadline {
                let msg = format!(
                    "{} is locked by another process for more than {} s; try again, or raise ipamTimeout",
                    path.display(),
                    limit.as_secs()
                );
                return Err(CniError::new(Code::TRY_AGAIN, msg));
            }
            // Leasing takes a fraction of a millisecond; a holder that takes longer is not hurried by asking more often.
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(2));
        }
    }

    /// Whether an address is leased, to whomever. One that cannot be asked for is.
    pub(crate) fn has_lease(&self, address: IpAddr) -> bool {
        let path = self.dir.join(address.to_string());
        !matches!(path.symlink_metadata(), Err(error) if error.kind() == ErrorKind::NotFound)
    }

    /// The addresses that are leased, to whomever.
    pub(crate) fn addresses(&self) -> Result<BTreeSet<IpAddr>> {
        Ok(self
            .names(&self.dir)?
            .iter()
            .filter_map(|name| name.parse().ok())
            .collect())
    }

    /// Whom an address is leased to. None: to nobody, also when the file is there and says nothing.
    pub(crate) fn owner(&self, address: IpAddr) -> Result<Option<Owner>> {
        Ok(self
            .read(&self.dir.join(address.to_string()))?
            .as_deref()
            .and_then(Owner::parse))
    }

    /// The addresses that are leased to `owner`.
    pub(crate) fn leases_of(&self, owner: &Owner) -> Result<Vec<IpAddr>> {
        let candidates: Vec<_> = match self.noted(owner)? {
            Some(noted) => noted,
            // Leased by host-local, or not at all.
            None => self.addresses()?.into_iter().collect(),
        };
        self.owned_of(owner, candidates)
    }

    /// Those of the addresses noted for `owner` that are really leased to it.
    pub(crate) fn noted_leases_of(&self, owner: &Owner) -> Result<Vec<IpAddr>> {
        self.owned_of(owner, self.noted(owner)?.unwrap_or_default())
    }

    fn owned_of(&self, owner: &Owner, candidates: Vec<IpAddr>) -> Result<Vec<IpAddr>> {
        let mut owned = Vec::new();
        for address in candidates {
            if self
                .owner(address)?
                .is_some_and(|found| owner.covers(&found))
            {
                owned.push(address);
            }
        }
        Ok(owned)
    }

    /// The address that was leased last of a range set.
    pub(crate) fn last(&self, set: usize) -> Result<Option<IpAddr>> {
        let text = self.read(&self.dir.join(format!("{LAST}{set}")))?;
        Ok(text.and_then(|text| text.trim().parse().ok()))
    }

    /// What is noted for `owner`. A note without an address is one that a power failure has emptied.
    fn noted(&self, owner: &Owner) -> Result<Option<Vec<IpAddr>>> {
        let text = self.read(&self.dir.join(OWNERS).join(owner.file_name()))?;
        let addresses =
            text.map(|text| text.lines().filter_map(|line| line.parse().ok()).collect());
        Ok(addresses.filter(|addresses: &Vec<_>| !addresses.is_empty()))
    }

    fn names(&self, dir: &Path) -> Result<Vec<String>> {
        let read = || -> io::Result<Vec<String>> {
            fs::read_dir(dir)?
                .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                .collect()
        };
        match read() {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            other => other.map_err(|error| failed("read", dir, &error)),
        }
    }

    fn read(&self, path: &Path) -> Result<Option<String>> {
        match fs::read(path) {
            Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read", path, &error)),
        }
    }
}

/// A store that nobody else changes.
#[derive(Debug)]
pub(crate) struct Locked<'a> {
    store: &'a Store,
    _lock: Flock<File>,
}

impl std::ops::Deref for Locked<'_> {
    type Target = Store;

    fn deref(&self) -> &Store {
        self.store
    }
}

impl Locked<'_> {
    /// Notes which addresses `owner` is going to have. To be called before they are leased.
    pub(crate) fn note(&self, owner: &Owner, addresses: &[IpAddr]) -> Result<()> {
        let text: String = addresses.iter().map(|a| format!("{a}\n")).collect();
        self.write(&self.dir.join(OWNERS).join(owner.file_name()), &text)
    }

    /// Leases an address, which nobody may have.
    pub(crate) fn lease(&self, address: IpAddr, owner: &Owner) -> Result<()> {
        self.write(&self.dir.join(address.to_string()), &owner.lease())
    }

    /// Takes an address back.
    pub(crate) fn release(&self, address: IpAddr) -> Result<()> {
        remove(&self.dir.join(address.to_string()))
    }

    /// Takes back all that `owner` has, and then the note about it.
    pub(crate) fn release_all(&self, owner: &Owner) -> Result<()> {
        for address in self.leases_of(owner)? {
            self.release(address)?;
        }
        remove(&self.dir.join(OWNERS).join(owner.file_name()))
    }

    /// Takes back what belongs to no owner that `is_valid`. A failed part does not keep the others from it.
    pub(crate) fn collect(&self, is_valid: impl Fn(&Owner) -> bool) -> Result<()> {
        let mut failed = Vec::new();
        for address in self.addresses()? {
            match self.owner(address) {
                Ok(Some(owner)) if is_valid(&owner) => {}
                Ok(_) => failed.extend(self.release(address).err()),
                Err(error) => failed.push(error),
            }
        }
        let owners = self.dir.join(OWNERS);
        for name in self.names(&owners)? {
            if !Owner::from_file_name(&name).is_some_and(|owner| is_valid(&owner)) {
                failed.extend(remove(&owners.join(name)).err());
            }
        }
        failed.extend(remove(&self.dir.join(NEW)).err());
        CniError::join(failed).map_or(Ok(()), Err)
    }

    /// Remembers which address of a range set was leased last. This file is changed in place: replacing a file makes
    /// ext4 write it to the disk at once, which takes milliseconds, and it is only a hint. Whatever a kill leaves of
    /// it, the next search starts somewhere.
    pub(crate) fn set_last(&self, set: usize, address: IpAddr) -> Result<()> {
        let path = self.dir.join(format!("{LAST}{set}"));
        let text = address.to_string();
        let length = text.len() as u64;
        let write = || -> io::Result<()> {
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .mode(0o600)
                .open(&path)?;
            file.write_all_at(text.as_bytes(), 0)?;
            if file.metadata()?.len() > length {
                file.set_len(length)?;
            }
            Ok(())
        };
        write().map_err(|error| failed("write", &path, &error))
    }

    /// Writes a file that others see whole or not at all.
    fn write(&self, path: &Path, text: &str) -> Result<()> {
        let new = self.dir.join(NEW);
        let written = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&new)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .and_then(|()| fs::rename(&new, path));
        written.map_err(|error| failed("write", path, &error))
    }
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(failed("remove", path, &error)),
        _ => Ok(()),
    }
}

fn failed(verb: &str, path: &Path, error: &io::Error) -> CniError {
    CniError::new(
        Code::IO,
        format!(
            "{verb} {}: {error}; ipam.dataDir has to be a writable directory on a local file system",
            path.display()
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let store = Store::new(dir.path(), "net");
        store.create().expect("create");
        (dir, store)
    }

    #[test]
    fn leases_are_files_as_host_local_writes_them() {
        let (dir, store) = store();
        let owner = Owner::new("c1", "eth0");
        let locked = store.lock(LIMIT).expect("lock");
        locked
            .note(&owner, &[ip("10.0.0.2"), ip("fd00::2")])
            .expect("note");
        locked.lease(ip("10.0.0.2"), &owner).expect("lease");
        locked.lease(ip("fd00::2"), &owner).expect("lease");
        for last in ["fd00::1:0:0:2", "fd00::2"] {
            locked.set_last(1, ip(last)).expect("remember");
            assert_eq!(store.last(1).expect("read"), Some(ip(last)));
        }
        let read = |name: &str| fs::read_to_string(dir.path().join("net").join(name)).expect(name);
        assert_eq!(read("10.0.0.2"), "c1\r\neth0");
        assert_eq!(read("fd00::2"), "c1\r\neth0");
        assert_eq!(read("last_reserved_ip.1"), "fd00::2");
        assert_eq!(store.last(0).expect("read"), None);
        locked.release_all(&owner).expect("release");
        locked.release_all(&owner).expect("release again");
        assert!(store.addresses().expect("read").is_empty());
        assert!(
            store
                .names(&store.dir.join(OWNERS))
                .expect("read")
                .is_empty()
        );
    }

    #[test]
    fn an_owner_is_found_without_a_note_and_a_note_is_not_believed() {
        let (dir, store) = store();
        let (a, b) = (Owner::new("a", "eth0"), Owner::new("b", "eth0"));
        let file = |name: &str, text: &str| {
            fs::write(dir.path().join("net").join(name), text).expect("write");
        };
        file("10.0.0.2", "a\r\neth0");
        file("10.0.0.3", "a\r\nnet1");
        file("10.0.0.4", "a\n");
        file("10.0.0.5", "b\r\neth0");
        file("10.0.0.6", "");
        assert_eq!(
            store.leases_of(&a).expect("read"),
            [ip("10.0.0.2"), ip("10.0.0.4")],
            "its own, and the old one that names no interface"
        );
        let locked = store.lock(LIMIT).expect("lock");
        locked
            .note(&a, &[ip("10.0.0.5"), ip("10.0.0.2")])
            .expect("note");
        assert_eq!(store.leases_of(&a).expect("read"), [ip("10.0.0.2")]);
        assert_eq!(store.owner(ip("10.0.0.6")).expect("read"), None);
        locked.note(&b, &[]).expect("note");
        assert_eq!(store.leases_of(&b).expect("read"), [ip("10.0.0.5")]);
    }

    #[test]
    fn what_is_not_valid_is_collected() {
        let (dir, store) = store();
        let (stays, goes) = (Owner::new("stays", "eth0"), Owner::new("goes", "eth0"));
        let locked = store.lock(LIMIT).expect("lock");
        for (owner, address) in [(&stays, "10.0.0.2"), (&goes, "10.0.0.3")] {
            locked.note(owner, &[ip(address)]).expect("note");
            locked.lease(ip(address), owner).expect("lease");
        }
        locked.set_last(0, ip("10.0.0.3")).expect("remember");
        for torn in ["10.0.0.4", NEW] {
            fs::write(dir.path().join("net").join(torn), "").expect("write");
        }
        locked
            .collect(|owner| stays.covers(owner))
            .expect("collect");
        let mut names = store.names(&store.dir).expect("read");
        names.sort();
        assert_eq!(names, [OWNERS, "10.0.0.2", "last_reserved_ip.0", LOCK]);
        assert_eq!(
            store.names(&store.dir.join(OWNERS)).expect("read"),
            ["stays@eth0"]
        );
    }

    #[test]
    fn a_lock_that_is_held_is_waited_for_and_then_reported() {
        let (_dir, store) = store();
        let held = store.lock(LIMIT).expect("lock");
        let error = store.lock(Duration::ZERO).expect_err("held");
        assert_eq!(error.code, Code::TRY_AGAIN, "{error}");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| store.lock(LIMIT).map(drop));
            drop(held);
            waiting.join().expect("no panic").expect("locked");
        });
    }

    #[test]
    fn a_data_directory_that_cannot_be_is_named() {
        let store = Store::new(Path::new("/proc/none"), "net");
        let error = store.create().expect_err("not writable");
        assert_eq!(error.code, Code::IO);
        assert!(
            error.msg.contains("/proc/none/net") && error.msg.contains("dataDir"),
            "{error}"
        );
        assert!(store.addresses().expect("nothing there").is_empty());
    }
}
