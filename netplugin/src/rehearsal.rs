//! A call as far as it can be told without the node: everything that reads what comes from outside.

use std::ffi::OsString;
use std::path::Path;

use ipnet::IpNet;
use kbp_kernel::Mtu;
use serde_json::Value;

use crate::attachment::Attachment;
use crate::bridge::{self, plan::Role};
use crate::cni::config::Config;
use crate::cni::env::{Call, Verb};
use crate::cni::error::{CniError, Result};
use crate::cni::ipam::{Lease, LeasedIp, RouteConfig};
use crate::cni::options::{Mode, Options};
use crate::cni::result::{self, Attached, Interface};
use crate::cni::version::Version;
use crate::ipam_local;
use crate::routed;
use crate::uplink::UplinkMtu;
use crate::verbs::check;
use crate::wire::DEVICE_MTU;

/// What kbp would answer to a call with these variables and this input, before it has looked at the node: the result
/// of an ADD whose addresses are those of `prevResult`, null for another verb.
/// It changes nothing and reads no file.
///
/// # Errors
/// The error object.
pub fn rehearse(
    variable: impl Fn(&str) -> Option<OsString>,
    input: &[u8],
) -> std::result::Result<Value, Value> {
    let mut version = Version::NEWEST;
    read(variable, input, &mut version).map_err(|error| error.to_json(version))
}

fn read(
    variable: impl Fn(&str) -> Option<OsString>,
    input: &[u8],
    version: &mut Version,
) -> Result<Value> {
    let command = variable("CNI_COMMAND").unwrap_or_default();
    let verb = Verb::parse(&command.to_string_lossy())?;
    let call = Call::read(verb, variable)?;
    let config = Config::parse(input.to_vec(), version)?;
    config.require_verb(verb)?;
    config.valid_attachments()?;
    let options = Options::read(&config.json, &call)?;
    if config.wants_ipam() {
        config.ipam_timeout()?;
        if config.ipam_type()? == ipam_local::TYPE {
            ipam_local::validate(&config, &call)?;
        }
    }
    match verb {
        Verb::Add if options.mode != Mode::Tune => add(&call, &config, &options),
        Verb::Check => {
            let attachment = Attachment::new(&config.name, &call.container_id, &call.ifname);
            if let Some(previous) = config.prev_result()? {
                check::expected(previous, &attachment, &options.mode)?;
            }
            Ok(Value::Null)
        }
        _ => Ok(Value::Null),
    }
}

fn add(call: &Call, config: &Config, options: &Options) -> Result<Value> {
    const UPLINK: UplinkMtu = UplinkMtu {
        v4: Mtu(1500),
        v6: Mtu(1500),
    };
    let lease = match config.prev_result()? {
        Some(previous) => Lease::from_json(previous)?,
        None => Lease::default(),
    };
    let attachment = Attachment::new(&config.name, &call.container_id, &call.ifname);
    let ranges = config.ipam_ranges();
    let (ips, routes) = match &options.mode {
        Mode::Bridge(bridge) => bridge_plan(&lease, &ranges, bridge.is_gateway, options, UPLINK)?,
        Mode::Routed | Mode::Tune => {
            let default = options.is_default_gateway;
            let plan = routed::plan::plan(&lease, &ranges, default, options.mtu, UPLINK)?;
            (plan.leased(), plan.routes)
        }
    };
    let host_end = attachment.host_end();
    let attached = Attached {
        host: vec![Interface {
            name: &host_end,
            mac: attachment.host_mac(),
            mtu: DEVICE_MTU,
        }],
        pod: Interface {
            name: &call.ifname,
            mac: options.mac.unwrap_or_else(|| attachment.pod_mac()),
            mtu: DEVICE_MTU,
        },
        sandbox: call.netns.as_deref().unwrap_or(Path::new("")),
        ips: &ips,
        routes: &routes,
        dns: config.dns()?.unwrap_or_default(),
    };
    result::build(config.version, config.prev_result()?, attached)
}

fn bridge_plan(
    lease: &Lease,
    ranges: &[IpNet],
    gateway: bool,
    options: &Options,
    uplink: UplinkMtu,
) -> Result<(Vec<LeasedIp>, Vec<RouteConfig>), CniError> {
    let role = Role {
        gateway,
        default_gateway: options.is_default_gateway,
    };
    let mtu = options.mtu.unwrap_or(DEVICE_MTU);
    let plan = bridge::plan::plan(lease, ranges, role, mtu, uplink)?;
    Ok((plan.ips, plan.routes))
}
