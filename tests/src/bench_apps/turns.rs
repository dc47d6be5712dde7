//! Three pairs of containers that take turns.

use std::time::{Duration, Instant};

use anyhow::Result;
use kbp_kernel::process;
use kbp_poller::state;
use kbp_tests::apps::{App, AppNode, AppPod, Guest};
use kbp_tests::bench::cpu::{self, Placement};
use kbp_tests::{Runtime, Sandbox};

use crate::row::{Cycle, Turn};
use crate::{Options, Workload};

/// Makes calls of which kbp's shim hears, for a moment.
const WAKING: [&str; 3] = ["/kbp/app-load", "calls", "1"];

/// A server, where the workload has one, and its client.
struct Pair<'n, 's> {
    server: Option<AppPod<'n, 's>>,
    client: AppPod<'n, 's>,
}

impl<'n, 's> Pair<'n, 's> {
    fn start(
        options: &Options,
        node: &'n AppNode<'s>,
        workload: Workload,
        place: Placement,
        (runtime, name): (Runtime, &str),
    ) -> Result<Self> {
        let on = |part: &str, cpu: kbp_kernel::CpuId| {
            let id = format!("{part}-{name}");
            move |mut guest: Guest| {
                guest.id = id;
                guest.cpus = Some(cpu.to_string());
                guest.annotations = options.annotation.clone();
                guest
            }
        };
        let serve = |app: App| app.serve(node, runtime, on("server", place.server));
        let server = workload.server().map(serve).transpose()?;
        let client = on("client", place.client)(Guest::idle("client"));
        let client = node.pod(runtime, &client, |_| Ok(()))?;
        Ok(Self { server, client })
    }

    fn cpu_time(&self) -> Duration {
        let pods = self.server.iter().chain([&self.client]);
        let pids = pods.flat_map(AppPod::processes);
        // One that has just ended has had none.
        pids.filter_map(|pid| process::cpu_time_of_all(pid).ok())
            .sum()
    }

    fn remove(self) -> Result<()> {
        self.client.remove()?;
        if let Some(server) = self.server {
            server.remove()?;
        }
        Ok(())
    }
}

/// Two pairs under the stock runtime, and one under kbp between them.
pub(crate) struct Trio<'n, 's> {
    workload: Workload,
    sandbox: &'n Sandbox,
    /// Stock, kbp, stock.
    pairs: [Pair<'n, 's>; 3],
}

impl<'n, 's> Trio<'n, 's> {
    pub(crate) fn start(
        options: &Options,
        node: &'n AppNode<'s>,
        sandbox: &'n Sandbox,
        workload: Workload,
        place: Placement,
    ) -> Result<Self> {
        let pair = |what| Pair::start(options, node, workload, place, what);
        let pairs = [
            pair((Runtime::Stock, "stock1"))?,
            pair((Runtime::Kbp, "kbp"))?,
            pair((Runtime::Stock, "stock2"))?,
        ];
        let trio = Self {
            workload,
            sandbox,
            pairs,
        };
        // What is measured must not be a start from cold.
        for n in 0..trio.pairs.len() {
            trio.turn(n, 1, [Duration::ZERO, Duration::from_millis(300)])?;
        }
        Ok(trio)
    }

    /// A turn each, the second stock pair first where `back`.
    pub(crate) fn cycle(&mut self, options: &Options, clients: u32, back: bool) -> Result<Cycle> {
        let lead = match clients {
            1 => options.lead_one,
            _ => options.lead,
        };
        let times = [lead, options.turn].map(Duration::from_millis);
        let turn = |n| {
            self.turn(n, clients, times).or_else(|error| {
                // Fifty backends may take longer to start than they are measured for, on a busy machine.
                eprintln!("{}: once more: {error:#}", self.workload.name());
                self.turn(n, clients, [times[0], 2 * times[1]])
            })
        };
        let first = turn(if back { 2 } else { 0 })?;
        let kbp = turn(1)?;
        let last = turn(if back { 0 } else { 2 })?;
        let stock = if back { [last, first] } else { [first, last] };
        Ok(Cycle { stock, kbp })
    }

    fn turn(&self, n: usize, clients: u32, [lead, length]: [Duration; 2]) -> Result<Turn> {
        let pair = &self.pairs[n];
        let address = pair.server.as_ref().map_or("", AppPod::address);
        let command = self.workload.load(address, clients, [lead, length])?;
        let waiting = || {
            let others = (0..self.pairs.len()).filter(|other| *other != n);
            others.map(|other| self.pairs[other].cpu_time()).sum()
        };
        let idle: Duration = waiting();
        let (begin, busy) = (Instant::now(), cpu::busy_seconds()?);
        let (printed, before) = std::thread::scope(|scope| {
            // A pod that has done nothing is looked at every few seconds only. Under a steady load it would not have been: a call that
            // is reported has the shim look at once. With one client there is nothing to see, and the start of a process would be in
            // the way of one that polls.
            let woken = scope.spawn(|| match &pair.server {
                Some(server) if clients > 1 => {
                    server.exec_and_read(&WAKING.map(str::to_owned)).map(drop)
                }
                _ => Ok(()),
            });
            let before = scope.spawn(|| {
                // Not to await anything: the part that counts begins a little later.
                std::thread::sleep(lead);
                self.on_the_short_way()
            });
            let printed = pair.client.exec_and_read(&command);
            let woken = woken.join().unwrap_or(Ok(()));
            (woken.and(printed), before.join().unwrap_or(0))
        });
        let cpu_seconds = cpu::busy_seconds()? - busy;
        let after = self.on_the_short_way();
        let others = waiting().saturating_sub(idle).as_secs_f64() / begin.elapsed().as_secs_f64();
        let app = self.workload.server().unwrap_or(App::StaticC);
        Ok(Turn {
            figures: app.figures(&printed?, pair.client.root(), lead)?,
            cpu_seconds,
            others,
            short_way: [before, after],
        })
    }

    /// How many of kbp's pods have packets take the short way.
    fn on_the_short_way(&self) -> u32 {
        let states = state::read_all(&self.sandbox.dir().join("run/kbp")).unwrap_or_default();
        let on = states.iter().filter(|s| s.short_way.is_some()).count();
        u32::try_from(on).unwrap_or(u32::MAX)
    }

    pub(crate) fn remove(self) -> Result<()> {
        self.pairs.into_iter().try_for_each(Pair::remove)
    }
}
