//! Everything that hangs on the pair: one batch a side.

use ipnet::IpNet;
use kbp_kernel::link::{Batch, Route};

use super::plan::Plan;
use crate::cni::error::Result;
use crate::cni::options::Options;
use crate::wire::{self, Pair, Side, kernel_route};

/// Gives both ends what the plan says. On an error the pair is left half configured: delete it.
pub(crate) fn configure(
    host: &mut Side,
    pod: &mut Side,
    pair: &Pair,
    options: &Options,
    plan: &Plan,
) -> Result<()> {
    wire::prepare(pod, pair, plan.has_v6())?;
    // The pod's first: with its end up the link has a carrier, and the host's routes and qdisc are alive at once.
    pod.route.execute(&pod_batch(pair, options, plan))?;
    host.route.execute(&host_batch(pair, options, plan))?;
    wire::finish(host, pod, pair, options.profile)
}

fn pod_batch(pair: &Pair, options: &Options, plan: &Plan) -> Batch {
    let device = pair.pod.index;
    let mut batch = Batch::new();
    batch.set_up(device);
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
    batch.set_pfifo(device, options.tx_queue_len);
    batch
}

fn host_batch(pair: &Pair, options: &Options, plan: &Plan) -> Batch {
    let device = pair.host.index;
    let mut batch = Batch::new();
    for gateway in plan.gateways() {
        batch.add_address(device, IpNet::from(gateway), true);
    }
    for ip in &plan.ips {
        batch.add_neighbour(device, ip.address.addr(), pair.pod.mac);
        batch.add_route(&Route::new(ip.host_route(), device));
    }
    batch.set_pfifo(device, options.tx_queue_len);
    batch
}
