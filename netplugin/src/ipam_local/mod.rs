//! IPAM inside the plugin, for `"ipam": {"type": "kbp-local"}`: host-local's keys and files without a process of
//! its own for every call.
//!
//! The lock of a network is held for choosing and noting addresses, a fraction of a millisecond, and not for
//! whatever the attachment then takes. A process that is killed at any point leaves leases that its container's
//! next ADD takes over, its DEL gives back, or GC collects.

mod config;
mod range;
mod resolv;
mod store;

use std::cell::{Cell, OnceCell};
use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use serde_json::{Map, Value};

use self::config::Settings;
use self::range::RangeSet;
use self::store::{Locked, Owner, Store};
use crate::cni::config::Config;
use crate::cni::env::Call;
use crate::cni::error::{CniError, Code, Result};
use crate::cni::ipam::{self, Lease, LeasedIp};

/// The `ipam.type` that means this module.
pub(crate) const TYPE: &str = "kbp-local";

/// Refuses a config that is not valid; nothing is looked at beside it.
pub(crate) fn validate(config: &Config, call: &Call) -> Result<()> {
    config::data_dir(config)?;
    Settings::read(config, call).map(drop)
}

/// The built-in IPAM for one call.
#[derive(Debug)]
pub(crate) struct LocalIpam<'a> {
    config: &'a Config,
    call: &'a Call,
    store: Store,
    timeout: Duration,
}

impl<'a> LocalIpam<'a> {
    /// Opens the store of the config's network; nothing is made yet.
    pub(crate) fn new(config: &'a Config, call: &'a Call) -> Result<Self> {
        Ok(Self {
            config,
            call,
            store: Store::new(&config::data_dir(config)?, &config.name),
            timeout: config.ipam_timeout()?,
        })
    }

    /// Leases one address of each range set. What the same attachment has already, from an ADD that was
    /// interrupted, it keeps. On failure it has none.
    pub(crate) fn add(&self) -> Result<Lease> {
        let settings = Settings::read(self.config, self.call)?;
        let dns = dns(&settings)?;
        let owner = self.owner();
        self.store.create()?;
        let locked = self.store.lock(self.timeout)?;
        let addresses = lease(&locked, &owner, &settings).map_err(|error| {
            match locked.release_all(&owner) {
                Ok(()) => error,
                Err(more) => error.with_details(&format!("and it could not be undone: {more}")),
            }
        })?;
        drop(locked);

        let ips = settings
            .sets
            .iter()
            .zip(addresses)
            .filter_map(|(set, address)| {
                let range = set.range_of(address)?;
                Some(LeasedIp {
                    address: IpNet::new(address, range.subnet.prefix_len()).ok()?,
                    gateway: Some(range.gateway),
                })
            });
        Ok(Lease {
            ips: ips.collect(),
            routes: settings.routes,
            dns,
        })
    }

    /// Gives back what this call's attachment has.
    pub(crate) fn del(&self) -> Result<()> {
        if !self.store.exists() {
            return Ok(());
        }
        self.store.lock(self.timeout)?.release_all(&self.owner())
    }

    /// Compares the leases with prevResult.
    pub(crate) fn check(&self) -> Result<()> {
        let settings = Settings::read(self.config, self.call)?;
        let leased = self.store.leases_of(&self.owner())?;
        let changed = |msg: String| Err(CniError::new(Code::CHANGED, msg));
        if leased.is_empty() {
            let Owner {
                container_id,
                ifname,
            } = self.owner();
            return changed(format!(
                "interface {ifname} of container {container_id} has no address leased in network {}",
                self.config.name
            ));
        }
        let Some(previous) = self.config.prev_result()? else {
            return Ok(());
        };
        for entry in ipam::list(previous, "ips")? {
            let address = ipam::leased_ip(entry)?.address.addr();
            let ours = settings
                .sets
                .iter()
                .any(|set| set.range_of(address).is_some());
            if ours && !leased.contains(&address) {
                let owner = self.store.owner(address)?;
                let to = owner.map_or("nobody".to_owned(), |o| {
                    format!("container {}", o.container_id)
                });
                return changed(format!("{address} of prevResult is leased to {to}"));
            }
        }
        Ok(())
    }

    /// Gives back what belongs to no attachment in `cni.dev/valid-attachments`.
    pub(crate) fn gc(&self) -> Result<()> {
        let Some(valid) = self.config.valid_attachments()? else {
            return Ok(());
        };
        if !self.store.exists() {
            return Ok(());
        }
        let valid: Vec<_> = valid
            .iter()
            .map(|(id, ifname)| Owner::new(id, ifname))
            .collect();
        self.store
            .lock(self.timeout)?
            .collect(|owner| valid.iter().any(|valid| valid.covers(owner)))
    }

    /// Fails when an ADD would: a config that is not valid, a store that cannot be written, no address free.
    pub(crate) fn status(&self) -> Result<()> {
        let settings = Settings::read(self.config, self.call)?;
        let unavailable = |error: CniError| CniError {
            code: Code::NOT_AVAILABLE,
            ..error
        };
        dns(&settings).map_err(unavailable)?;
        self.store.create().map_err(unavailable)?;
        let locked = self.store.lock(self.timeout).map_err(unavailable)?;
        let without_wishes = Settings {
            requested: Vec::new(),
            ..settings
        };
        choose(&locked, &without_wishes, &[])
            .map(drop)
            .map_err(unavailable)
    }

    fn owner(&self) -> Owner {
        Owner::new(&self.call.container_id, &self.call.ifname)
    }
}

/// Leases one address for each range set.
fn lease(locked: &Locked<'_>, owner: &Owner, settings: &Settings) -> Result<Vec<IpAddr>> {
    let has = locked.noted_leases_of(owner)?;
    let chosen = choose(locked, settings, &has)?;
    let mut noted = has.clone();
    noted.extend(chosen.iter().filter(|address| !has.contains(address)));
    locked.note(owner, &noted)?;
    for (n, address) in chosen.iter().enumerate() {
        if !has.contains(address) {
            locked.lease(*address, owner)?;
            // One that was asked for says nothing about where the others are.
            if !settings.requested.contains(address) {
                locked.set_last(n, *address)?;
            }
        }
    }
    // Left over from before the config was changed.
    for address in has.iter().filter(|address| !chosen.contains(address)) {
        locked.release(*address)?;
    }
    Ok(chosen)
}

/// One address for each range set: the one that is asked for, else the one that the attachment has, else the next
/// free one.
fn choose(locked: &Locked<'_>, settings: &Settings, has: &[IpAddr]) -> Result<Vec<IpAddr>> {
    let mut requested = settings.requested.clone();
    let taken = Taken::new(locked);
    let mut chosen = Vec::new();
    for (n, set) in settings.sets.iter().enumerate() {
        let wish = requested
            .iter()
            .position(|address| set.range_of(*address).is_some());
        let address = match wish.map(|wish| requested.remove(wish)) {
            Some(address) => {
                refuse_unless_free(locked, set, address, has)?;
                address
            }
            None => match has
                .iter()
                .find(|a| set.range_of(**a).is_some() && !set.is_gateway(**a))
            {
                Some(address) => *address,
                None => next(locked, n, set, &taken)?,
            },
        };
        chosen.push(address);
    }
    match requested.first() {
        None => Ok(chosen),
        Some(address) => Err(CniError::new(
            Code::CONFIG,
            format!(
                "the requested address {address} is in no range, or the second one in its list of ranges; ask for one address of each list of ipam.ranges"
            ),
        )),
    }
}

fn refuse_unless_free(
    locked: &Locked<'_>,
    set: &RangeSet,
    address: IpAddr,
    has: &[IpAddr],
) -> Result<()> {
    if set.is_gateway(address) {
        let msg =
            format!("the requested address {address} is the gateway of its range; ask for another");
        return Err(CniError::new(Code::CONFIG, msg));
    }
    match locked.owner(address)? {
        Some(owner) if !has.contains(&address) => Err(CniError::new(
            Code::EXHAUSTED,
            format!(
                "the requested address {address} is leased to interface {} of container {}; ask for another or remove that container",
                owner.ifname, owner.container_id
            ),
        )),
        _ => Ok(()),
    }
}

fn next(locked: &Locked<'_>, n: usize, set: &RangeSet, taken: &Taken<'_>) -> Result<IpAddr> {
    let last = locked.last(n)?;
    let found = set.next(last, |address| taken.contains(address));
    taken.check()?;
    if let Some(address) = found {
        return Ok(address);
    }
    // Leases that name nobody are what a killed host-local leaves. Looking for them takes reading every lease.
    // One that cannot be read may be somebody's.
    let owned = |address| !matches!(locked.owner(address), Ok(None));
    set.next(last, owned).ok_or_else(|| {
        let ranges: Vec<_> = set.0.iter().map(|r| format!("{} to {}", r.start, r.end)).collect();
        CniError::new(
            Code::EXHAUSTED,
            format!(
                "no address is free in {}; remove containers, have the runtime call GC, or add a range to ipam.ranges",
                ranges.join(", ")
            ),
        )
    })
}

/// Which addresses have leases. The first few are asked for one by one, for the one after the last is nearly always free;
/// where ranges are fuller than that all leases are listed, once.
struct Taken<'a> {
    store: &'a Store,
    asked: Cell<usize>,
    all: OnceCell<Result<BTreeSet<IpAddr>>>,
}

impl<'a> Taken<'a> {
    const ONE_BY_ONE: usize = 16;

    fn new(store: &'a Store) -> Self {
        Self {
            store,
            asked: Cell::new(0),
            all: OnceCell::new(),
        }
    }

    fn contains(&self, address: IpAddr) -> bool {
        self.asked.set(self.asked.get() + 1);
        if self.asked.get() <= Self::ONE_BY_ONE {
            return self.store.has_lease(address);
        }
        let all = self.all.get_or_init(|| self.store.addresses());
        // Where leases cannot be listed, every address may have one.
        all.as_ref().map_or(true, |all| all.contains(&address))
    }

    /// Fails when the leases could not be listed.
    fn check(&self) -> Result<()> {
        match self.all.get() {
            Some(Err(error)) => Err(error.clone()),
            _ => Ok(()),
        }
    }
}

fn dns(settings: &Settings) -> Result<Map<String, Value>> {
    let Some(path) = &settings.resolv_conf else {
        return Ok(Map::new());
    };
    let text = fs::read(path).map_err(|error| {
        CniError::new(
            Code::IO,
            format!("ipam.resolvConf: read {}: {error}", path.display()),
        )
    })?;
    Ok(resolv::dns(&String::from_utf8_lossy(&text)))
}
