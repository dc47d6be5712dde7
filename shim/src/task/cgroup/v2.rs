//! Statistics of cgroup version 2.

use std::io;
use std::path::Path;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats,
    PidsStat, RdmaEntry, RdmaStat,
};
use containerd_shim_protos::protobuf::MessageField;

use super::files::{huge_page_sizes, number, rdma, table, text, value};

pub(super) fn metrics(directory: &Path) -> io::Result<Metrics> {
    let rdma_entries = |name| -> io::Result<Vec<RdmaEntry>> {
        let entry = |(device, hca_handles, hca_objects)| RdmaEntry {
            device,
            hca_handles,
            hca_objects,
            ..Default::default()
        };
        Ok(rdma(directory, name)?.into_iter().map(entry).collect())
    };
    Ok(Metrics {
        pids: MessageField::some(PidsStat {
            current: value(directory, "pids.current")?,
            limit: value(directory, "pids.max")?,
            ..Default::default()
        }),
        cpu: MessageField::some(cpu(directory)?),
        memory: MessageField::some(memory(directory)?),
        memory_events: memory_events(directory)?.into(),
        rdma: MessageField::some(RdmaStat {
            current: rdma_entries("rdma.current")?,
            limit: rdma_entries("rdma.max")?,
            ..Default::default()
        }),
        io: MessageField::some(IOStat {
            usage: io_usage(&text(&directory.join("io.stat"))?.unwrap_or_default()),
            psi: pressure(directory, "io.pressure")?,
            ..Default::default()
        }),
        hugetlb: hugetlb(directory)?,
        ..Default::default()
    })
}

fn cpu(directory: &Path) -> io::Result<CPUStat> {
    let stat = table(directory, "cpu.stat")?.unwrap_or_default();
    Ok(CPUStat {
        usage_usec: stat.get("usage_usec"),
        user_usec: stat.get("user_usec"),
        system_usec: stat.get("system_usec"),
        nr_periods: stat.get("nr_periods"),
        nr_throttled: stat.get("nr_throttled"),
        throttled_usec: stat.get("throttled_usec"),
        nr_bursts: stat.get("nr_bursts"),
        burst_usec: stat.get("burst_usec"),
        psi: pressure(directory, "cpu.pressure")?,
        ..Default::default()
    })
}

fn memory(directory: &Path) -> io::Result<MemoryStat> {
    let Some(stat) = table(directory, "memory.stat")? else {
        return Ok(MemoryStat::new());
    };
    Ok(MemoryStat {
        anon: stat.get("anon"),
        file: stat.get("file"),
        kernel_stack: stat.get("kernel_stack"),
        slab: stat.get("slab"),
        sock: stat.get("sock"),
        shmem: stat.get("shmem"),
        file_mapped: stat.get("file_mapped"),
        file_dirty: stat.get("file_dirty"),
        file_writeback: stat.get("file_writeback"),
        anon_thp: stat.get("anon_thp"),
        inactive_anon: stat.get("inactive_anon"),
        active_anon: stat.get("active_anon"),
        inactive_file: stat.get("inactive_file"),
        active_file: stat.get("active_file"),
        unevictable: stat.get("unevictable"),
        slab_reclaimable: stat.get("slab_reclaimable"),
        slab_unreclaimable: stat.get("slab_unreclaimable"),
        pgfault: stat.get("pgfault"),
        pgmajfault: stat.get("pgmajfault"),
        // Split in two by 5.9.
        workingset_refault: stat.get("workingset_refault")
            + stat.get("workingset_refault_anon")
            + stat.get("workingset_refault_file"),
        workingset_activate: stat.get("workingset_activate")
            + stat.get("workingset_activate_anon")
            + stat.get("workingset_activate_file"),
        workingset_nodereclaim: stat.get("workingset_nodereclaim"),
        pgrefill: stat.get("pgrefill"),
        pgscan: stat.get("pgscan"),
        pgsteal: stat.get("pgsteal"),
        pgactivate: stat.get("pgactivate"),
        pgdeactivate: stat.get("pgdeactivate"),
        pglazyfree: stat.get("pglazyfree"),
        pglazyfreed: stat.get("pglazyfreed"),
        thp_fault_alloc: stat.get("thp_fault_alloc"),
        thp_collapse_alloc: stat.get("thp_collapse_alloc"),
        usage: value(directory, "memory.current")?,
        usage_limit: value(directory, "memory.max")?,
        max_usage: value(directory, "memory.peak")?,
        swap_usage: value(directory, "memory.swap.current")?,
        swap_limit: value(directory, "memory.swap.max")?,
        swap_max_usage: value(directory, "memory.swap.peak")?,
        psi: pressure(directory, "memory.pressure")?,
        ..Default::default()
    })
}

fn memory_events(directory: &Path) -> io::Result<Option<MemoryEvents>> {
    Ok(
        table(directory, "memory.events")?.map(|events| MemoryEvents {
            low: events.get("low"),
            high: events.get("high"),
            max: events.get("max"),
            oom: events.get("oom"),
            oom_kill: events.get("oom_kill"),
            oom_group_kill: events.get("oom_group_kill"),
            ..Default::default()
        }),
    )
}

fn hugetlb(directory: &Path) -> io::Result<Vec<HugeTlbStat>> {
    let stat = |pagesize: String| {
        let events = table(directory, &format!("hugetlb.{pagesize}.events"))?.unwrap_or_default();
        Ok(HugeTlbStat {
            current: value(directory, &format!("hugetlb.{pagesize}.current"))?,
            max: value(directory, &format!("hugetlb.{pagesize}.max"))?,
            failcnt: events.get("max"),
            pagesize,
            ..Default::default()
        })
    };
    huge_page_sizes(directory, "current")?
        .into_iter()
        .map(stat)
        .collect()
}

/// Lines `major:minor rbytes=number wbytes=number …`.
fn io_usage(text: &str) -> Vec<IOEntry> {
    let entry = |line: &str| {
        let mut words = line.split_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let mut entry = IOEntry {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            ..Default::default()
        };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            match key {
                "rbytes" => entry.rbytes = number(value),
                "wbytes" => entry.wbytes = number(value),
                "rios" => entry.rios = number(value),
                "wios" => entry.wios = number(value),
                _ => {}
            }
        }
        Some(entry)
    };
    text.lines().filter_map(entry).collect()
}

/// Lines `some avg10=0.00 avg60=0.00 avg300=0.00 total=0` and `full …` (Documentation/accounting/psi.rst).
fn pressure(directory: &Path, name: &str) -> io::Result<MessageField<PSIStats>> {
    let Some(text) = text(&directory.join(name))? else {
        return Ok(MessageField::none());
    };
    let mut stats = PSIStats::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let kind = words.next().unwrap_or_default();
        let mut data = PSIData::new();
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            match key {
                "avg10" => data.avg10 = value.parse().unwrap_or(0.0),
                "avg60" => data.avg60 = value.parse().unwrap_or(0.0),
                "avg300" => data.avg300 = value.parse().unwrap_or(0.0),
                "total" => data.total = number(value),
                _ => {}
            }
        }
        match kind {
            "some" => stats.some = MessageField::some(data),
            "full" => stats.full = MessageField::some(data),
            _ => {}
        }
    }
    Ok(MessageField::some(stats))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn numbers_come_from_their_files() {
        let root = tempfile::tempdir().expect("a directory");
        let write =
            |name: &str, text: &str| fs::write(root.path().join(name), text).expect("write");
        write("pids.current", "3\n");
        write("pids.max", "max\n");
        write(
            "cpu.stat",
            "usage_usec 10\nuser_usec 6\nsystem_usec 4\nnr_throttled 2\n",
        );
        write(
            "cpu.pressure",
            "some avg10=1.50 avg60=0.20 avg300=0.00 total=42\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n",
        );
        write(
            "memory.stat",
            "anon 11\nfile 12\nworkingset_refault_anon 1\nworkingset_refault_file 2\n",
        );
        write("memory.current", "100\n");
        write("memory.max", "max\n");
        write("memory.events", "low 0\nhigh 0\nmax 5\noom 1\noom_kill 1\n");
        write(
            "io.stat",
            "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\nnonsense\n",
        );
        write("hugetlb.1GB.current", "9\n");
        write("hugetlb.1GB.events", "max 3\n");
        let metrics = metrics(root.path()).expect("metrics");
        assert_eq!((metrics.pids.current, metrics.pids.limit), (3, u64::MAX));
        assert_eq!((metrics.cpu.usage_usec, metrics.cpu.nr_throttled), (10, 2));
        assert_eq!(
            (metrics.cpu.psi.some.avg10, metrics.cpu.psi.full.total),
            (1.5, 7)
        );
        assert_eq!(
            (metrics.memory.anon, metrics.memory.workingset_refault),
            (11, 3)
        );
        assert_eq!(
            (metrics.memory.usage, metrics.memory.usage_limit),
            (100, u64::MAX)
        );
        assert_eq!(
            (metrics.memory_events.max, metrics.memory_events.oom_kill),
            (5, 1)
        );
        assert_eq!(metrics.io.usage.len(), 1);
        assert_eq!(
            (metrics.io.usage[0].major, metrics.io.usage[0].wios),
            (8, 4)
        );
        assert!(metrics.io.psi.is_none());
        assert_eq!(
            (
                metrics.hugetlb[0].pagesize.as_str(),
                metrics.hugetlb[0].failcnt
            ),
            ("1GB", 3)
        );
    }
}
