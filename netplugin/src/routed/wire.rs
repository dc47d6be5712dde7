//! What hangs on the pair: addresses, routes and neighbours, one batch a side.

use ipnet::IpNet;
use kbp_kernel::link::{Batch, Route};

use super::plan::Plan;
use crate::cni::error::Result;
use crate::sysctl;
use crate::wire::{self, Pair, Side, kernel_route};

/// Gives both ends what the plan says. On an error the pair is left half configured: delete it.
pub(crate) fn configure(host: &mut Side, pod: &mut Side, pair: &Pair, plan: &Plan) -> Result<()> {
    if plan.has_v6() {
        sysctl::enable_v6(&pair.host.name)?;
        wire::enable_v6(pod, pair)?;
    }
    pod.route.execute(&pod_batch(pair, plan))?;
    Ok(host.route.execute(&host_batch(pair, plan))?)
}

fn pod_batch(pair: &Pair, plan: &Plan) -> Batch {
    let device = pair.pod.index;
    let mut batch = Batch::new();
    for next_hop in &plan.next_hops {
        batch.add_neighbour(device, *next_hop, pair.host.mac);
    }
    for ip in &plan.ips {
        // Without the prefix route: the range is reached through the host, not by asking the link for it.
        batch.add_address(device, ip.address, true);
    }
    for route in &plan.routes {
        batch.add_route(&kernel_route(route, device));
    }
    batch
}

fn host_batch(pair: &Pair, plan: &Plan) -> Batch {
    let device = pair.host.index;
    let mut batch = Batch::new();
    for gateway in plan.gateways() {
        batch.add_address(device, IpNet::from(gateway), true);
    }
    for ip in &plan.ips {
        batch.add_neighbour(device, ip.address.addr(), pair.pod.mac);
        batch.add_route(&Route::new(ip.host_route(), device));
    }
    batch
}
