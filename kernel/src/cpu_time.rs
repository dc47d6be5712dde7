//! What the machine's CPUs have done since boot: /proc/stat, which no container narrows. It counts in steps of 1/100 s.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::sys::read_text;
use crate::{CpuId, Error, Result};

const STAT: &str = "/proc/stat";

/// Time of a CPU, or of all of them, by what it did. Threads of SCHED_IDLE are in `user` and `system` like others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuTime {
    /// In programs, nice ones and guests of a hypervisor included.
    pub user: Duration,
    /// In the kernel.
    pub system: Duration,
    /// In hardware interrupts.
    pub irq: Duration,
    /// In softirqs.
    pub softirq: Duration,
    /// Idle, waiting for disks included.
    pub idle: Duration,
    /// Wanted, but given to somebody else by the hypervisor.
    pub stolen: Duration,
}

impl CpuTime {
    /// Time in which it worked: neither idle nor stolen.
    pub fn busy(&self) -> Duration {
        self.user + self.system + self.irq + self.softirq
    }
}

/// One reading.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuTimes {
    /// All CPUs together.
    pub all: CpuTime,
    /// Each CPU that is online.
    pub each: BTreeMap<CpuId, CpuTime>,
    /// Context switches on all CPUs.
    pub switches: u64,
}

impl CpuTimes {
    /// As they are now.
    ///
    /// # Errors
    /// When /proc is not mounted, or the file is not as proc(5) has it.
    pub fn read() -> Result<Self> {
        Self::parse(&read_text(STAT)?)
    }

    fn parse(text: &str) -> Result<Self> {
        let mut times = Self::default();
        let (mut total, mut switches) = (false, false);
        for line in text.lines() {
            let Some((name, rest)) = line.split_once(' ') else {
                continue;
            };
            match (name, name.strip_prefix("cpu")) {
                ("cpu", _) => {
                    times.all = time(line, rest)?;
                    total = true;
                }
                (_, Some(number)) => {
                    let cpu = CpuId(number.parse().map_err(|_| unreadable(line))?);
                    times.each.insert(cpu, time(line, rest)?);
                }
                ("ctxt", _) => {
                    times.switches = rest.trim().parse().map_err(|_| unreadable(line))?;
                    switches = true;
                }
                _ => {}
            }
        }
        match (total, switches) {
            (true, true) => Ok(times),
            (false, _) => Err(unreadable("no line for all CPUs")),
            (true, false) => Err(unreadable("no line ctxt")),
        }
    }
}

fn time(line: &str, columns: &str) -> Result<CpuTime> {
    let ticks: Vec<u64> = columns
        .split_whitespace()
        .map(|field| field.parse().map_err(|_| unreadable(line)))
        .collect::<Result<_>>()?;
    // What follows, the time of guests, is in user and nice already.
    let [user, nice, system, idle, iowait, irq, softirq, stolen, ..] = ticks[..] else {
        return Err(unreadable(line));
    };
    // USER_HZ, which every architecture of today fixes at 100.
    let time = |ticks: u64| Duration::from_millis(ticks * 10);
    Ok(CpuTime {
        user: time(user + nice),
        system: time(system),
        irq: time(irq),
        softirq: time(softirq),
        idle: time(idle + iowait),
        stolen: time(stolen),
    })
}

fn unreadable(detail: &str) -> Error {
    Error::Protocol {
        what: format!("read {STAT}"),
        detail: format!("{detail:?}"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::cpu::allowed;
    use crate::process;

    #[test]
    fn busy_is_everything_but_idle_iowait_and_steal() {
        let stat =
            "cpu  100 200 400 9 9 800 1600 300 1 2\ncpu3 1 0 0 0 0 0 0 0 0 0\nintr 5\nctxt 42\n";
        let times = CpuTimes::parse(stat).expect("a whole file");
        assert_eq!(times.all.busy(), Duration::from_secs(31));
        assert_eq!(times.all.stolen, Duration::from_secs(3));
        assert_eq!(times.each[&CpuId(3)].busy(), Duration::from_millis(10));
        assert_eq!((times.each.len(), times.switches), (1, 42));
    }

    #[test]
    fn what_is_no_stat_is_refused() {
        let line = "cpu  1 2 3 4 5 6 7 8\n";
        for text in [
            "",
            "ctxt 1\n",
            line,
            "cpu  1 2 3\nctxt 1\n",
            &format!("{line}cpux 1 2 3 4 5 6 7 8\nctxt 1\n"),
            &format!("{line}ctxt many\n"),
        ] {
            assert!(CpuTimes::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_time_of_a_busy_cpu_grows() {
        let cpu = allowed().expect("allowed").iter().next().expect("a CPU");
        std::thread::spawn(move || {
            process::set_affinity(0, &[cpu].into_iter().collect()).expect("pin");
            let busy = || CpuTimes::read().expect("times").each[&cpu].busy();
            let before = busy();
            let until = Instant::now() + Duration::from_secs(10);
            while busy() == before {
                assert!(Instant::now() < until, "no time passed on CPU {cpu}");
            }
        })
        .join()
        .expect("thread");
    }
}
