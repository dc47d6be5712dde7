//! Mode `tune`: another plugin earlier in the chain has made the interface; a veth is made pollable.
//!
//! The host end is looked for in the kernel, from both sides: what prevResult lists is often incomplete or wrong.
//! What was there before is recorded in the host end's alias, which lives exactly as long as the link, and DEL puts it
//! back. An interface that cannot be polled is left as it is and named on stderr.

mod record;

use kbp_kernel::IfIndex;
use kbp_kernel::ethtool;
use kbp_kernel::link::{Batch, Link};
use kbp_kernel::netns::Netns;
use kbp_poller::endpoint::{self, Found};
use serde_json::{Map, Value, json};

use self::record::{Before, Record};
use crate::attachment::Attachment;
use crate::cni::config::Config;
use crate::cni::env::Call;
use crate::cni::error::{CniError, Code, Result};
use crate::cni::options::Options;
use crate::verbs::open_pod;
use crate::verify::feature_differences;
use crate::wire::{Side, Which, features};

/// What a veth has that nobody gave a qdisc.
const NO_QDISC: &str = "noqueue";

/// Makes the container's interface pollable; prevResult as it came.
pub(crate) fn add(call: &Call, config: &Config, options: &Options) -> Result<Value> {
    let previous = config.prev_result()?.ok_or_else(|| {
        let msg = "prevResult is missing; mode \"tune\" comes after the plugin that makes the interface, in a list of cniVersion 0.3.0 or later";
        CniError::new(Code::CONFIG, msg)
    })?;
    let mut host = Side::host()?;
    let (mut pod, _) = open_pod(call, &host)?;
    match find(&mut host, &pod, &call.ifname)? {
        Ok(ends) => tune(&mut host, &mut pod, &ends, options)?,
        Err(reason) if options.required => {
            let msg = format!("{reason}; the network config has \"required\": true");
            return Err(CniError::new(Code::NOT_POLLABLE, msg));
        }
        Err(reason) => eprintln!(
            "kbp: container {} is left as it is: {reason}",
            call.container_id
        ),
    }
    let mut result = Map::new();
    result.insert("cniVersion".to_owned(), json!(config.version.as_str()));
    let others = previous.iter().filter(|(key, _)| *key != "cniVersion");
    result.extend(others.map(|(key, value)| (key.clone(), value.clone())));
    Ok(Value::Object(result))
}

/// Takes an ADD back that nobody could be told of.
pub(crate) fn undo(call: &Call, error: CniError) -> CniError {
    match Side::host().and_then(|mut host| restore(call, &mut host)) {
        Ok(()) => error,
        Err(more) => error.with_details(&format!("and it could not be undone: {more}")),
    }
}

/// Puts back what ADD changed, as far as it is there.
pub(crate) fn restore(call: &Call, host: &mut Side) -> Result<()> {
    // Without the namespace the veth is gone, too.
    let Some(netns) = call
        .netns
        .as_deref()
        .and_then(|path| Netns::open(path).ok())
    else {
        return Ok(());
    };
    if netns.is_same(&host.netns)? {
        return Ok(());
    }
    let mut pod = Side::pod(netns)?;
    let Ok(ends) = find(host, &pod, &call.ifname)? else {
        return Ok(());
    };
    match ends.host.alias.as_deref().and_then(Record::parse) {
        Some(record) => put_back(host, &mut pod, &ends, &record),
        None => Ok(()),
    }
}

/// What is not as ADD left it, in words.
pub(crate) fn differences(
    host: &mut Side,
    pod: &Side,
    attachment: &Attachment,
    options: &Options,
) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let ends = match find(host, pod, &attachment.ifname)? {
        Ok(ends) => ends,
        // As ADD would have found it.
        Err(reason) if options.required => return Ok(vec![reason]),
        Err(_) => return Ok(found),
    };
    feature_differences(
        (host, &ends.host),
        (pod, &ends.pod),
        options.profile,
        &mut found,
    )?;
    for end in [&ends.host, &ends.pod] {
        if !end.up {
            found.push(format!("{} is down", end.name));
        }
    }
    if ends.host.qdisc.as_deref() == Some(NO_QDISC) {
        found.push(format!("{} has no qdisc", ends.host.name));
    }
    Ok(found)
}

/// Both ends of a veth.
struct Ends {
    host: Link,
    pod: Link,
}

/// The ends of the interface, or why it cannot be polled.
fn find(host: &mut Side, pod: &Side, ifname: &str) -> Result<Result<Ends, String>> {
    let kernel = |error: kbp_poller::Error| CniError::new(Code::KERNEL, error.to_string());
    let missing = || format!("there is no interface {ifname} that is up");
    let (veths, not_pollable) = match endpoint::find(&host.netns, &pod.netns).map_err(kernel)? {
        Found::Endpoints {
            veths,
            not_pollable,
        } => (veths, not_pollable),
        Found::Empty | Found::HostNetwork => return Ok(Err(missing())),
    };
    let Some(veth) = veths.iter().find(|veth| veth.pod_name == ifname) else {
        let prefix = format!("{ifname} ");
        let reason = not_pollable.into_iter().find(|r| r.starts_with(&prefix));
        return Ok(Err(reason.unwrap_or_else(missing)));
    };
    let mut in_pod = kbp_kernel::link::RouteSocket::open_in(&pod.netns)?;
    let link = |link: Option<Link>| link.ok_or_else(missing);
    let (at_host, at_pod) = (
        link(host.route.link_by_index(veth.host_index)?),
        link(in_pod.link_by_index(veth.pod_index)?),
    );
    Ok(at_host.and_then(|host| Ok(Ends { host, pod: at_pod? })))
}

/// Records what is there, then changes it. On an error it is put back.
fn tune(host: &mut Side, pod: &mut Side, ends: &Ends, options: &Options) -> Result<()> {
    let alias = ends.host.alias.clone().unwrap_or_default();
    // A second ADD finds what the first one made, which is not what DEL has to put back.
    let record = match Record::parse(&alias) {
        Some(record) => record,
        None => Record {
            host: before(host, &ends.host)?,
            pod: before(pod, &ends.pod)?,
            alias,
        },
    };
    let text = record.text().ok_or_else(|| {
        let msg = format!(
            "the alias of {} is too long to record beside it what is changed: {:?}",
            ends.host.name, record.alias
        );
        CniError::new(Code::KERNEL, msg)
    })?;
    host.route
        .execute(Batch::new().set_alias(ends.host.index, &text))?;
    let tuned = change(host, &ends.host, Which::Host, options)
        .and_then(|()| change(pod, &ends.pod, Which::Pod, options));
    tuned.map_err(|error| match put_back(host, pod, ends, &record) {
        Ok(()) => error,
        Err(more) => error.with_details(&format!("and it could not be undone: {more}")),
    })
}

fn before(side: &Side, end: &Link) -> Result<Before> {
    let is = ethtool::features(&side.netns, &end.name)?;
    Ok(Before {
        gro: is.gro,
        tso: is.tso,
        no_qdisc: end.qdisc.as_deref() == Some(NO_QDISC),
    })
}

fn change(side: &mut Side, end: &Link, which: Which, options: &Options) -> Result<()> {
    // What a ring of the pod end has no room for waits at the host end. Any other qdisc pushes back, too, and somebody wanted it.
    if which == Which::Host && end.qdisc.as_deref() == Some(NO_QDISC) {
        side.route
            .execute(Batch::new().set_pfifo(end.index, options.tx_queue_len))?;
    }
    let is = ethtool::features(&side.netns, &end.name)?;
    let wanted = features(which, options.profile, is);
    ethtool::set_features(&side.netns, &end.name, wanted)?;
    Ok(())
}

fn put_back(host: &mut Side, pod: &mut Side, ends: &Ends, record: &Record) -> Result<()> {
    let mut failed = Vec::new();
    failed.extend(put_end_back(pod, &ends.pod, &record.pod).err());
    failed.extend(put_end_back(host, &ends.host, &record.host).err());
    if failed.is_empty() {
        let alias = host
            .route
            .execute(Batch::new().set_alias(ends.host.index, &record.alias));
        failed.extend(alias.err().map(CniError::from));
    }
    CniError::join(failed).map_or(Ok(()), Err)
}

fn put_end_back(side: &mut Side, end: &Link, before: &Before) -> Result<()> {
    if before.no_qdisc && has_pfifo(side, end.index)? {
        side.route.execute(Batch::new().delete_qdisc(end.index))?;
    }
    let was = ethtool::Features {
        gro: before.gro,
        tso: before.tso,
    };
    Ok(ethtool::set_features(&side.netns, &end.name, was)?)
}

/// Whether the qdisc is still the one that ADD has set.
fn has_pfifo(side: &mut Side, link: IfIndex) -> Result<bool> {
    let link = side.route.link_by_index(link)?;
    Ok(link.is_some_and(|link| link.qdisc.as_deref() == Some("pfifo")))
}
