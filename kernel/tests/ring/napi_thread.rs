//! The instance's own polling thread, where the kernel has it; where it has not, that it says so and changes nothing.

use std::os::fd::AsFd;
use std::path::Path;

use kbp_kernel::napi::{Napi, NetdevSocket, Threaded};
use kbp_kernel::napi_thread::{self, NapiThread};
use kbp_kernel::process::{self, Scheduling};
use kbp_kernel::{CpuId, CpuSet, Error, cpu, probe, sockopt};

use crate::traffic::Road;
use crate::{eventually, some_cpu};

fn napi(road: &Road) -> Napi {
    let mut netdev = NetdevSocket::open_in(&road.pair.host).expect("netdev");
    let found = netdev.napis(road.pair.host_link.index).expect("list");
    found.into_iter().next().expect("an instance")
}

fn start(road: &Road) -> Result<NapiThread, Error> {
    let link = road.pair.host_link.index;
    NapiThread::start(
        &road.pair.host,
        link,
        road.host_napi(),
        some_cpu(),
        Scheduling::Other(0),
    )
}

/// CPU on which packets from the pod are handled, which is sent from another one.
fn handled_on(road: &Road) -> CpuId {
    road.pod.send(b"x").expect("send");
    road.host.recv(&mut [0; 8]).expect("receive");
    let cpu = sockopt::incoming_cpu(road.host.as_fd()).expect("ask");
    cpu.expect("a packet has come")
}

#[test]
fn it_polls_where_it_was_told_and_softirq_has_the_instance_back_afterwards() {
    let road = Road::new();
    if probe::threaded_busy_poll().is_err() {
        let error = start(&road).expect_err("the probe says there is none");
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert_ne!(napi(&road).threaded, Some(Threaded::BusyPoll));
        return;
    }
    let elsewhere: CpuSet = cpu::usable()
        .expect("CPUs")
        .iter()
        .filter(|c| *c != some_cpu())
        .collect();
    process::set_affinity(0, &elsewhere).expect("keep off the worker's CPU");
    assert_ne!(handled_on(&road), some_cpu(), "softirq, where it is sent");

    let thread = start(&road).expect("thread");
    let tid = thread.thread_id();
    let name = std::fs::read_to_string(format!("/proc/{tid}/comm")).expect("name");
    assert!(name.starts_with("napi/"), "{name}");
    assert_eq!(napi(&road).threaded, Some(Threaded::BusyPoll));
    let cpus = process::affinity(tid).expect("CPUs");
    assert_eq!(cpus, CpuSet::from_iter([some_cpu()]));
    for _ in 0..100 {
        assert_eq!(handled_on(&road), some_cpu());
    }
    let before = process::cpu_time(tid, tid).expect("CPU time");
    eventually("it spins", || {
        process::cpu_time(tid, tid).expect("CPU time") > before
    });

    drop(thread);
    assert_eq!(napi(&road).threaded, Some(Threaded::Disabled));
    eventually("the end of the thread", || {
        !Path::new(&format!("/proc/{tid}")).exists()
    });
    assert_ne!(handled_on(&road), some_cpu(), "softirq again");
}

/// What a killed owner leaves spinning can be found and ended.
#[test]
fn a_thread_that_nobody_owns_is_ended() {
    let road = Road::new();
    let link = road.pair.host_link.index;
    assert_eq!(
        napi_thread::stop(&road.pair.host, link, Threaded::BusyPoll).expect("none"),
        0
    );
    if probe::threaded_busy_poll().is_err() {
        return;
    }
    let thread = start(&road).expect("thread");
    // As if its owner had died.
    std::mem::forget(thread);
    assert_eq!(
        napi_thread::stop(&road.pair.host, link, Threaded::BusyPoll).expect("one"),
        1
    );
    assert_eq!(napi(&road).threaded, Some(Threaded::Disabled));
}
