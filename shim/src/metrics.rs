//! The guest's figures in the words of containerd: those of control groups version 1 where the host
//! has version 1, since what reads them there knows no other, and those of version 2 elsewhere.

use std::collections::HashMap;
use std::path::Path;

use containerd_shim_protos::cgroups::metrics as v1;
use containerd_shim_protos::cgroups_v2::metrics as v2;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Error, MessageField};
use mvm_agent_protocol::messages::StatsResponse;

use crate::events::any;

/// Which words are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// `io.containerd.cgroups.v1.Metrics`
    V1,
    /// `io.containerd.cgroups.v2.Metrics`
    V2,
}

impl Version {
    /// What this host's containerd expects.
    pub fn of_host() -> Self {
        match nix::sys::statfs::statfs(Path::new("/sys/fs/cgroup")) {
            Ok(fs) if fs.filesystem_type() == nix::sys::statfs::CGROUP2_SUPER_MAGIC => Self::V2,
            _ => Self::V1,
        }
    }

    /// The figures in these words.
    ///
    /// # Errors
    /// They cannot be encoded.
    pub fn word(self, stats: &StatsResponse) -> Result<Any, Error> {
        match self {
            Self::V1 => any(&of_v1(stats)),
            Self::V2 => any(&of_v2(stats)),
        }
    }
}

/// A key of a table, 0 if the guest's kernel does not have it.
fn get(table: &HashMap<String, u64>, key: &str) -> u64 {
    table.get(key).copied().unwrap_or(0)
}

/// What the two versions call no limit: version 1 shows the largest number of whole pages.
const NO_LIMIT_V1: u64 = 0x7fff_ffff_ffff_f000;

fn of_v2(stats: &StatsResponse) -> v2::Metrics {
    let (cpu, memory, events) = (&stats.cpu, &stats.memory, &stats.memory_events);
    let m = |key| get(memory, key);
    v2::Metrics {
        pids: MessageField::some(v2::PidsStat {
            current: stats.pids_current,
            limit: if stats.pids_max == u64::MAX { 0 } else { stats.pids_max },
            ..Default::default()
        }),
        cpu: MessageField::some(v2::CPUStat {
            usage_usec: get(cpu, "usage_usec"),
            user_usec: get(cpu, "user_usec"),
            system_usec: get(cpu, "system_usec"),
            nr_periods: get(cpu, "nr_periods"),
            nr_throttled: get(cpu, "nr_throttled"),
            throttled_usec: get(cpu, "throttled_usec"),
            ..Default::default()
        }),
        memory: MessageField::some(v2::MemoryStat {
            anon: m("anon"),
            file: m("file"),
            kernel_stack: m("kernel_stack"),
            slab: m("slab"),
            sock: m("sock"),
            shmem: m("shmem"),
            file_mapped: m("file_mapped"),
            file_dirty: m("file_dirty"),
            file_writeback: m("file_writeback"),
            anon_thp: m("anon_thp"),
            inactive_anon: m("inactive_anon"),
            active_anon: m("active_anon"),
            inactive_file: m("inactive_file"),
            active_file: m("active_file"),
            unevictable: m("unevictable"),
            slab_reclaimable: m("slab_reclaimable"),
            slab_unreclaimable: m("slab_unreclaimable"),
            pgfault: m("pgfault"),
            pgmajfault: m("pgmajfault"),
            pgrefill: m("pgrefill"),
            pgscan: m("pgscan"),
            pgsteal: m("pgsteal"),
            pgactivate: m("pgactivate"),
            pgdeactivate: m("pgdeactivate"),
            pglazyfree: m("pglazyfree"),
            pglazyfreed: m("pglazyfreed"),
            thp_fault_alloc: m("thp_fault_alloc"),
            thp_collapse_alloc: m("thp_collapse_alloc"),
            usage: stats.memory_current,
            usage_limit: stats.memory_max,
            swap_usage: stats.swap_current,
            ..Default::default()
        }),
        io: MessageField::some(v2::IOStat {
            usage: stats
                .io
                .iter()
                .map(|io| v2::IOEntry {
                    major: io.major.into(),
                    minor: io.minor.into(),
                    rbytes: io.read_bytes,
                    wbytes: io.write_bytes,
                    rios: io.reads,
                    wios: io.writes,
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        }),
        memory_events: MessageField::some(v2::MemoryEvents {
            low: get(events, "low"),
            high: get(events, "high"),
            max: get(events, "max"),
            oom: get(events, "oom"),
            oom_kill: get(events, "oom_kill"),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn of_v1(stats: &StatsResponse) -> v1::Metrics {
    let (cpu, memory) = (&stats.cpu, &stats.memory);
    let m = |key| get(memory, key);
    let nanos = |key| get(cpu, key).saturating_mul(1000);
    let limit = stats.memory_max.min(NO_LIMIT_V1);
    let (anon, file) = (m("anon"), m("file"));
    v1::Metrics {
        pids: MessageField::some(v1::PidsStat {
            current: stats.pids_current,
            limit: if stats.pids_max == u64::MAX { 0 } else { stats.pids_max },
            ..Default::default()
        }),
        cpu: MessageField::some(v1::CPUStat {
            usage: MessageField::some(v1::CPUUsage {
                total: nanos("usage_usec"),
                user: nanos("user_usec"),
                kernel: nanos("system_usec"),
                ..Default::default()
            }),
            throttling: MessageField::some(v1::Throttle {
                periods: get(cpu, "nr_periods"),
                throttled_periods: get(cpu, "nr_throttled"),
                throttled_time: nanos("throttled_usec"),
                ..Default::default()
            }),
            ..Default::default()
        }),
        memory: MessageField::some(v1::MemoryStat {
            cache: file,
            rss: anon,
            mapped_file: m("file_mapped"),
            dirty: m("file_dirty"),
            writeback: m("file_writeback"),
            pg_fault: m("pgfault"),
            pg_maj_fault: m("pgmajfault"),
            inactive_anon: m("inactive_anon"),
            active_anon: m("active_anon"),
            inactive_file: m("inactive_file"),
            active_file: m("active_file"),
            unevictable: m("unevictable"),
            hierarchical_memory_limit: limit,
            total_cache: file,
            total_rss: anon,
            total_mapped_file: m("file_mapped"),
            total_dirty: m("file_dirty"),
            total_writeback: m("file_writeback"),
            total_pg_fault: m("pgfault"),
            total_pg_maj_fault: m("pgmajfault"),
            total_inactive_anon: m("inactive_anon"),
            total_active_anon: m("active_anon"),
            total_inactive_file: m("inactive_file"),
            total_active_file: m("active_file"),
            total_unevictable: m("unevictable"),
            usage: MessageField::some(v1::MemoryEntry {
                limit,
                usage: stats.memory_current,
                max: stats.memory_peak,
                failcnt: get(&stats.memory_events, "max"),
                ..Default::default()
            }),
            swap: MessageField::some(v1::MemoryEntry {
                limit: NO_LIMIT_V1,
                usage: stats.memory_current.saturating_add(stats.swap_current),
                ..Default::default()
            }),
            ..Default::default()
        }),
        blkio: MessageField::some(v1::BlkIOStat {
            io_service_bytes_recursive: blkio(stats, |io| (io.read_bytes, io.write_bytes)),
            io_serviced_recursive: blkio(stats, |io| (io.reads, io.writes)),
            ..Default::default()
        }),
        memory_oom_control: MessageField::some(v1::MemoryOomControl {
            oom_kill: get(&stats.memory_events, "oom_kill"),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn blkio(
    stats: &StatsResponse,
    figures: impl Fn(&mvm_agent_protocol::messages::IoStats) -> (u64, u64),
) -> Vec<v1::BlkIOEntry> {
    let mut entries = Vec::new();
    for io in &stats.io {
        let (read, write) = figures(io);
        for (op, value) in [("Read", read), ("Write", write), ("Total", read.saturating_add(write))]
        {
            entries.push(v1::BlkIOEntry {
                op: op.into(),
                major: io.major.into(),
                minor: io.minor.into(),
                value,
                ..Default::default()
            });
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::protobuf::Message;

    fn stats() -> StatsResponse {
        StatsResponse {
            cpu: HashMap::from([("usage_usec".into(), 5), ("user_usec".into(), 3)]),
            memory: HashMap::from([("anon".into(), 4096), ("file".into(), 8192)]),
            memory_current: 12_288,
            memory_max: u64::MAX,
            pids_current: 2,
            pids_max: u64::MAX,
            ..Default::default()
        }
    }

    #[test]
    fn version_1_counts_nanoseconds_and_has_its_own_no_limit() {
        let any = Version::V1.word(&stats()).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v1.Metrics");
        let metrics = v1::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(metrics.cpu.usage.total, 5000);
        assert_eq!(metrics.memory.usage.usage, 12_288);
        assert_eq!(metrics.memory.usage.limit, NO_LIMIT_V1);
        assert_eq!((metrics.memory.rss, metrics.memory.cache), (4096, 8192));
        assert_eq!((metrics.pids.current, metrics.pids.limit), (2, 0));
    }

    #[test]
    fn version_2_is_as_the_kernel_has_it() {
        let any = Version::V2.word(&stats()).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = v2::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((metrics.cpu.usage_usec, metrics.cpu.user_usec), (5, 3));
        assert_eq!((metrics.memory.anon, metrics.memory.usage), (4096, 12_288));
        assert_eq!(metrics.memory.usage_limit, u64::MAX);
    }
}
