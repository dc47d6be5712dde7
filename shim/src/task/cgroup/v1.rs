//! Statistics of cgroup version 1.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use containerd_shim_protos::cgroups::metrics::{
    BlkIOEntry, BlkIOStat, CPUStat, CPUUsage, HugetlbStat, MemoryEntry, MemoryOomControl,
    MemoryStat, Metrics, PidsStat, RdmaEntry, RdmaStat, Throttle,
};
use containerd_shim_protos::protobuf::MessageField;
use nix::unistd::{SysconfVar, sysconf};

use super::files::{huge_page_sizes, number, rdma, table, text, value};

pub(super) fn metrics(directories: &HashMap<String, PathBuf>) -> io::Result<Metrics> {
    let directory = |controller: &str| directories.get(controller).map(PathBuf::as_path);
    let mut metrics = Metrics::new();
    metrics.cpu = MessageField::some(CPUStat {
        usage: directory("cpuacct").map(cpu_usage).transpose()?.into(),
        throttling: directory("cpu").map(throttling).transpose()?.into(),
        ..Default::default()
    });
    if let Some(directory) = directory("pids") {
        metrics.pids = MessageField::some(PidsStat {
            current: value(directory, "pids.current")?,
            limit: value(directory, "pids.max")?,
            ..Default::default()
        });
    }
    if let Some(directory) = directory("memory") {
        metrics.memory = memory(directory)?.into();
        metrics.memory_oom_control = table(directory, "memory.oom_control")?
            .map(|control| MemoryOomControl {
                oom_kill_disable: control.get("oom_kill_disable"),
                under_oom: control.get("under_oom"),
                oom_kill: control.get("oom_kill"),
                ..Default::default()
            })
            .into();
    }
    if let Some(directory) = directory("blkio") {
        metrics.blkio = MessageField::some(blkio(directory)?);
    }
    if let Some(directory) = directory("hugetlb") {
        metrics.hugetlb = hugetlb(directory)?;
    }
    if let Some(directory) = directory("rdma") {
        let entries = |name| -> io::Result<Vec<RdmaEntry>> {
            let entry = |(device, hca_handles, hca_objects)| RdmaEntry {
                device,
                hca_handles,
                hca_objects,
                ..Default::default()
            };
            Ok(rdma(directory, name)?.into_iter().map(entry).collect())
        };
        metrics.rdma = MessageField::some(RdmaStat {
            current: entries("rdma.current")?,
            limit: entries("rdma.max")?,
            ..Default::default()
        });
    }
    Ok(metrics)
}

fn cpu_usage(directory: &Path) -> io::Result<CPUUsage> {
    // User and kernel time are told in clock ticks, the message has nanoseconds.
    let ticks = sysconf(SysconfVar::CLK_TCK)?
        .and_then(|ticks| u64::try_from(ticks).ok())
        .unwrap_or(100)
        .max(1);
    let nanoseconds = |ticks_used: u64| ticks_used.saturating_mul(1_000_000_000) / ticks;
    let stat = table(directory, "cpuacct.stat")?.unwrap_or_default();
    let per_cpu = text(&directory.join("cpuacct.usage_percpu"))?.unwrap_or_default();
    Ok(CPUUsage {
        total: value(directory, "cpuacct.usage")?,
        user: nanoseconds(stat.get("user")),
        kernel: nanoseconds(stat.get("system")),
        per_cpu: per_cpu.split_whitespace().map(number).collect(),
        ..Default::default()
    })
}

fn throttling(directory: &Path) -> io::Result<Throttle> {
    let stat = table(directory, "cpu.stat")?.unwrap_or_default();
    Ok(Throttle {
        periods: stat.get("nr_periods"),
        throttled_periods: stat.get("nr_throttled"),
        throttled_time: stat.get("throttled_time"),
        ..Default::default()
    })
}

fn memory(directory: &Path) -> io::Result<Option<MemoryStat>> {
    let Some(stat) = table(directory, "memory.stat")? else {
        return Ok(None);
    };
    let entry = |prefix: &str| -> io::Result<MessageField<MemoryEntry>> {
        Ok(MessageField::some(MemoryEntry {
            limit: value(directory, &format!("{prefix}.limit_in_bytes"))?,
            usage: value(directory, &format!("{prefix}.usage_in_bytes"))?,
            max: value(directory, &format!("{prefix}.max_usage_in_bytes"))?,
            failcnt: value(directory, &format!("{prefix}.failcnt"))?,
            ..Default::default()
        }))
    };
    Ok(Some(MemoryStat {
        cache: stat.get("cache"),
        rss: stat.get("rss"),
        rss_huge: stat.get("rss_huge"),
        mapped_file: stat.get("mapped_file"),
        dirty: stat.get("dirty"),
        writeback: stat.get("writeback"),
        pg_pg_in: stat.get("pgpgin"),
        pg_pg_out: stat.get("pgpgout"),
        pg_fault: stat.get("pgfault"),
        pg_maj_fault: stat.get("pgmajfault"),
        inactive_anon: stat.get("inactive_anon"),
        active_anon: stat.get("active_anon"),
        inactive_file: stat.get("inactive_file"),
        active_file: stat.get("active_file"),
        unevictable: stat.get("unevictable"),
        hierarchical_memory_limit: stat.get("hierarchical_memory_limit"),
        hierarchical_swap_limit: stat.get("hierarchical_memsw_limit"),
        total_cache: stat.get("total_cache"),
        total_rss: stat.get("total_rss"),
        total_rss_huge: stat.get("total_rss_huge"),
        total_mapped_file: stat.get("total_mapped_file"),
        total_dirty: stat.get("total_dirty"),
        total_writeback: stat.get("total_writeback"),
        total_pg_pg_in: stat.get("total_pgpgin"),
        total_pg_pg_out: stat.get("total_pgpgout"),
        total_pg_fault: stat.get("total_pgfault"),
        total_pg_maj_fault: stat.get("total_pgmajfault"),
        total_inactive_anon: stat.get("total_inactive_anon"),
        total_active_anon: stat.get("total_active_anon"),
        total_inactive_file: stat.get("total_inactive_file"),
        total_active_file: stat.get("total_active_file"),
        total_unevictable: stat.get("total_unevictable"),
        usage: entry("memory")?,
        swap: entry("memory.memsw")?,
        kernel: entry("memory.kmem")?,
        kernel_tcp: entry("memory.kmem.tcp")?,
        ..Default::default()
    }))
}

fn hugetlb(directory: &Path) -> io::Result<Vec<HugetlbStat>> {
    let stat = |pagesize: String| {
        Ok(HugetlbStat {
            usage: value(directory, &format!("hugetlb.{pagesize}.usage_in_bytes"))?,
            max: value(directory, &format!("hugetlb.{pagesize}.max_usage_in_bytes"))?,
            failcnt: value(directory, &format!("hugetlb.{pagesize}.failcnt"))?,
            pagesize,
            ..Default::default()
        })
    };
    huge_page_sizes(directory, "usage_in_bytes")?
        .into_iter()
        .map(stat)
        .collect()
}

fn blkio(directory: &Path) -> io::Result<BlkIOStat> {
    let names = device_names();
    let entries = |name: &str| -> io::Result<Vec<BlkIOEntry>> {
        let text = text(&directory.join(format!("blkio.{name}")))?.unwrap_or_default();
        Ok(text
            .lines()
            .filter_map(|line| blkio_entry(line, &names))
            .collect())
    };
    // The schedulers that counted for themselves are gone since 5.0; what every kernel has is the throttling layer's count.
    let mut stat = BlkIOStat {
        io_service_bytes_recursive: entries("io_service_bytes_recursive")?,
        io_serviced_recursive: entries("io_serviced_recursive")?,
        io_queued_recursive: entries("io_queued_recursive")?,
        io_service_time_recursive: entries("io_service_time_recursive")?,
        io_wait_time_recursive: entries("io_wait_time_recursive")?,
        io_merged_recursive: entries("io_merged_recursive")?,
        io_time_recursive: entries("time_recursive")?,
        sectors_recursive: entries("sectors_recursive")?,
        ..Default::default()
    };
    if stat.io_serviced_recursive.is_empty() && stat.io_service_bytes_recursive.is_empty() {
        stat.io_serviced_recursive = entries("throttle.io_serviced")?;
        stat.io_service_bytes_recursive = entries("throttle.io_service_bytes")?;
    }
    Ok(stat)
}

/// `major:minor operation number`, or without the operation; not the total.
fn blkio_entry(line: &str, names: &HashMap<(u64, u64), String>) -> Option<BlkIOEntry> {
    let (device, rest) = line.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let (major, minor) = (major.parse().ok()?, minor.parse().ok()?);
    let (op, count) = rest.rsplit_once(' ').unwrap_or(("", rest));
    Some(BlkIOEntry {
        op: op.to_owned(),
        device: names.get(&(major, minor)).cloned().unwrap_or_default(),
        major,
        minor,
        value: number(count),
        ..Default::default()
    })
}

/// Names of the block devices, from /proc/partitions.
fn device_names() -> HashMap<(u64, u64), String> {
    let text = fs::read_to_string("/proc/partitions").unwrap_or_default();
    let device = |line: &str| {
        let mut words = line.split_whitespace();
        let (major, minor) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some(((major, minor), format!("/dev/{}", words.nth(1)?)))
    };
    text.lines().filter_map(device).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_blkio() {
        let names = HashMap::from([((8, 0), "/dev/sda".to_owned())]);
        let entry = blkio_entry("8:0 Read 4096", &names).expect("an entry");
        assert_eq!(
            (entry.op.as_str(), entry.device.as_str(), entry.value),
            ("Read", "/dev/sda", 4096)
        );
        let entry = blkio_entry("9:1 7", &names).expect("an entry");
        assert_eq!(
            (
                entry.op.as_str(),
                entry.device.as_str(),
                entry.minor,
                entry.value
            ),
            ("", "", 1, 7)
        );
        assert_eq!(blkio_entry("Total 4096", &names), None);
    }

    #[test]
    fn numbers_come_from_their_files() {
        let root = tempfile::tempdir().expect("a directory");
        let write =
            |name: &str, text: &str| fs::write(root.path().join(name), text).expect("write");
        write("pids.current", "3\n");
        write("pids.max", "max\n");
        write(
            "memory.stat",
            "cache 11\nrss 12\ntotal_rss 13\nhierarchical_memory_limit 14\n",
        );
        write(
            "memory.oom_control",
            "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        );
        write("memory.usage_in_bytes", "100\n");
        write("memory.limit_in_bytes", "200\n");
        write("cpuacct.usage", "5000\n");
        write("cpuacct.stat", "user 2\nsystem 1\n");
        write("cpuacct.usage_percpu", "2000 3000 \n");
        write(
            "cpu.stat",
            "nr_periods 4\nnr_throttled 1\nthrottled_time 99\n",
        );
        write("hugetlb.2MB.usage_in_bytes", "7\n");
        write("hugetlb.2MB.rsvd.usage_in_bytes", "8\n");
        let controllers = ["pids", "memory", "cpuacct", "cpu", "hugetlb"];
        let directories = controllers
            .iter()
            .map(|name| ((*name).to_owned(), root.path().to_owned()))
            .collect::<HashMap<_, _>>();
        let metrics = metrics(&directories).expect("metrics");
        assert_eq!((metrics.pids.current, metrics.pids.limit), (3, u64::MAX));
        assert_eq!(
            (
                metrics.memory.cache,
                metrics.memory.rss,
                metrics.memory.total_rss
            ),
            (11, 12, 13)
        );
        assert_eq!(
            (metrics.memory.usage.usage, metrics.memory.usage.limit),
            (100, 200)
        );
        assert_eq!(metrics.memory.swap.usage, 0, "no swap accounting");
        assert_eq!(metrics.memory_oom_control.oom_kill, 2);
        assert_eq!(metrics.cpu.usage.per_cpu, [2000, 3000]);
        assert_eq!(metrics.cpu.usage.user, 2 * metrics.cpu.usage.kernel);
        assert_eq!(metrics.cpu.throttling.throttled_time, 99);
        assert_eq!(metrics.hugetlb.len(), 1);
        assert_eq!(
            (
                metrics.hugetlb[0].pagesize.as_str(),
                metrics.hugetlb[0].usage
            ),
            ("2MB", 7)
        );
    }
}
