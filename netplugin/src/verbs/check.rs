//! CHECK: is the attachment still as ADD left it?

use kbp_kernel::MacAddr;
use serde_json::{Map, Value};

use super::open_pod;
use crate::attachment::Attachment;
use crate::cni::config::Config;
use crate::cni::delegate::Ipam;
use crate::cni::env::Call;
use crate::cni::error::{CniError, Code, Result};
use crate::cni::ipam;
use crate::cni::options::{Mode, Options};
use crate::verify::{self, Expected};
use crate::wire::{DEVICE_MTU, Side};
use crate::{masquerade, tune};

/// Compares the attachment with prevResult, and has IPAM check the lease.
pub(crate) fn check(call: &Call, config: &Config) -> Result<()> {
    let options = Options::read(&config.json, call)?;
    let previous = config.prev_result()?.ok_or_else(|| {
        CniError::new(
            Code::CONFIG,
            "prevResult is missing; CHECK needs the result of ADD in the network config",
        )
    })?;
    let attachment = Attachment::new(&config.name, &call.container_id, &call.ifname);
    let mut host = Side::host()?;
    let (mut pod, _) = open_pod(call, &host)?;
    let polled = options.poller.as_ref().filter(|poller| poller.required);
    let unpolled = polled.and_then(|poller| poller.difference(&attachment));
    if options.mode == Mode::Tune {
        let mut found = tune::differences(&mut host, &pod, &attachment, &options)?;
        found.extend(unpolled);
        return judge(&attachment, found);
    }
    let ipam = Ipam::find(config, call)?;
    let expected = expected(previous, &attachment, &options.mode)?;

    let mut found = verify::differences(&mut host, &mut pod, &attachment, &options, &expected)?;
    for sysctl in &options.sysctls {
        found.extend(pod.netns.run(|| sysctl.difference())??);
    }
    if options.ip_masq {
        let addresses: Vec<_> = expected.ips.iter().map(|ip| ip.address.addr()).collect();
        for address in masquerade::missing(&host.netns, &attachment, &addresses)? {
            found.push(format!("{address} is not masqueraded"));
        }
    }
    found.extend(unpolled);
    judge(&attachment, found)?;
    ipam.check()
}

fn judge(attachment: &Attachment, found: Vec<String>) -> Result<()> {
    if found.is_empty() {
        return Ok(());
    }
    let msg = format!("{attachment} is not as ADD left it: {}", found.join("; "));
    Err(CniError::new(Code::CHANGED, msg))
}

/// What a result says about our interface; other plugins of the chain may have added theirs.
pub(crate) fn expected(
    previous: &Map<String, Value>,
    attachment: &Attachment,
    mode: &Mode,
) -> Result<Expected> {
    let interfaces = ipam::list(previous, "interfaces")?;
    let text = |interface: &Value, key: &str| {
        interface
            .get(key)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let find = |name: &str, in_pod: bool| {
        interfaces.iter().position(|interface| {
            text(interface, "name") == name && text(interface, "sandbox").is_empty() != in_pod
        })
    };
    let describe = |index: Option<usize>| -> Result<(Option<MacAddr>, Option<u32>)> {
        let Some(interface) = index.and_then(|index| interfaces.get(index)) else {
            return Ok((None, None));
        };
        let mac = text(interface, "mac");
        let mac = (!mac.is_empty())
            .then(|| mac.to_ascii_lowercase().parse())
            .transpose()
            .map_err(|error| {
                CniError::new(Code::DECODE, format!("prevResult.interfaces: {error}"))
            })?;
        let mtu = interface
            .get("mtu")
            .and_then(Value::as_u64)
            .and_then(|mtu| u32::try_from(mtu).ok());
        Ok((mac, mtu.filter(|mtu| *mtu > 0)))
    };
    let host_end = attachment.host_end();
    let pod = find(&attachment.ifname, true);
    if pod.is_none() {
        let msg = format!(
            "prevResult.interfaces has no {:?} inside a sandbox",
            attachment.ifname
        );
        return Err(CniError::new(Code::CONFIG, msg));
    }
    let ips = ipam::list(previous, "ips")?
        .iter()
        .filter(|ip| match ip.get("interface").and_then(Value::as_u64) {
            Some(index) => usize::try_from(index).ok() == pod,
            None => true,
        })
        .map(ipam::leased_ip)
        .collect::<Result<Vec<_>>>()?;
    // Results before 1.1.0 have no MTU. The host end is nobody's but ours, so it is known all the same; what the pod
    // end should have is not, for a later plugin may have changed it.
    let (host_mac, host_mtu) = describe(find(&host_end, false))?;
    Ok(Expected {
        host: (
            host_mac,
            host_mtu.or((*mode == Mode::Routed).then_some(DEVICE_MTU.0)),
        ),
        pod: describe(pod)?,
        ips,
        routes: ipam::routes(previous)?,
    })
}
