//! The specification's limits in the files of control groups version 2 (runtime-spec,
//! config-linux.md, "Control groups"; conversions as other runtimes make them).

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};

use crate::error::{Error, Result};

/// One write to one file of the group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// The specification's field, for messages.
    pub field: &'static str,
    /// File name in the group.
    pub file: String,
    /// What to write.
    pub value: String,
    /// A kernel without the file is no error.
    pub optional: bool,
}

/// What to do for a set of resources.
#[derive(Debug, Default)]
pub struct Settings {
    /// In this order.
    pub writes: Vec<Write>,
    /// Fields that have no meaning with version 2.
    pub notices: Vec<String>,
}

impl Settings {
    fn write(&mut self, field: &'static str, file: &str, value: impl ToString) {
        let (file, value) = (file.into(), value.to_string());
        self.writes.push(Write { field, file, value, optional: false });
    }

    fn write_optional(&mut self, field: &'static str, file: &str, value: impl ToString) {
        let (file, value) = (file.into(), value.to_string());
        self.writes.push(Write { field, file, value, optional: true });
    }

    fn no_meaning(&mut self, is_given: bool, field: &str) {
        if is_given {
            self.notices.push(format!("{field}: has no meaning with control groups version 2"));
        }
    }
}

/// Converts all limits.
///
/// # Errors
/// For contradictions and for `unified` keys that are no file names.
pub fn settings(resources: &LinuxResources) -> Result<Settings> {
    let mut s = Settings::default();
    if let Some(memory) = resources.memory() {
        convert_memory(&mut s, memory)?;
    }
    if let Some(cpu) = resources.cpu() {
        convert_cpu(&mut s, cpu);
    }
    if let Some(pids) = resources.pids() {
        match pids.limit() {
            0 => {}
            limit => s.write("linux.resources.pids.limit", "pids.max", or_max(limit)),
        }
    }
    if let Some(io) = resources.block_io() {
        convert_io(&mut s, io);
    }
    for huge in resources.hugepage_limits().iter().flatten() {
        let size = huge.page_size();
        if size.is_empty() || !size.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(Error::Invalid(format!(
                "linux.resources.hugepageLimits: page size {size:?}"
            )));
        }
        let file = format!("hugetlb.{size}.max");
        s.write_optional("linux.resources.hugepageLimits", &file, or_max(huge.limit()));
    }
    s.no_meaning(resources.network().is_some(), "linux.resources.network");
    let rdma = resources.rdma().as_ref().is_some_and(|rdma| !rdma.is_empty());
    s.no_meaning(rdma, "linux.resources.rdma");
    for (key, value) in resources.unified().iter().flatten() {
        if key.is_empty() || key.contains('/') || key.contains('\0') || !key.contains('.') {
            return Err(Error::Invalid(format!(
                "linux.resources.unified: {key:?} is no file name"
            )));
        }
        s.write("linux.resources.unified", key, value);
    }
    Ok(s)
}

fn or_max(limit: i64) -> String {
    if limit < 0 { "max".into() } else { limit.to_string() }
}

#[allow(deprecated)] // The obsolete fields are read to say that they are.
fn convert_memory(s: &mut Settings, memory: &LinuxMemory) -> Result<()> {
    if let Some(limit) = memory.limit().filter(|limit| *limit != 0) {
        s.write("linux.resources.memory.limit", "memory.max", or_max(limit));
    }
    if let Some(swap) = memory.swap().filter(|swap| *swap != 0) {
        let value = swap_max(swap, memory.limit().unwrap_or(0))?;
        s.write_optional("linux.resources.memory.swap", "memory.swap.max", value);
    }
    if let Some(low) = memory.reservation().filter(|low| *low != 0) {
        s.write("linux.resources.memory.reservation", "memory.low", or_max(low));
    }
    s.no_meaning(memory.kernel().is_some(), "linux.resources.memory.kernel");
    s.no_meaning(memory.kernel_tcp().is_some(), "linux.resources.memory.kernelTCP");
    s.no_meaning(memory.swappiness().is_some(), "linux.resources.memory.swappiness");
    let disabled = memory.disable_oom_killer() == Some(true);
    s.no_meaning(disabled, "linux.resources.memory.disableOOMKiller");
    Ok(())
}

/// The specification's `swap` is memory and swap together, the kernel's swap alone.
fn swap_max(swap: i64, limit: i64) -> Result<String> {
    match (swap, limit) {
        (..0, _) => Ok("max".into()),
        (_, ..0) => Ok(swap.to_string()),
        (_, 0) => Err(Error::Invalid(
            "linux.resources.memory.swap: needs a memory limit, it includes it".into(),
        )),
        (swap, limit) if swap < limit => Err(Error::Invalid(format!(
            "linux.resources.memory.swap: {swap} is less than the memory limit {limit} it includes"
        ))),
        (swap, limit) => Ok((swap - limit).to_string()),
    }
}

fn convert_cpu(s: &mut Settings, cpu: &LinuxCpu) {
    const DEFAULT_PERIOD_US: u64 = 100_000;
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        s.write("linux.resources.cpu.shares", "cpu.weight", weight_of_shares(shares));
    }
    if let Some(idle) = cpu.idle() {
        s.write("linux.resources.cpu.idle", "cpu.idle", idle);
    }
    let burst = cpu.burst();
    // A burst may not exceed the quota at any time: down before the quota changes, up after.
    if burst.is_some() {
        s.write_optional("linux.resources.cpu.burst", "cpu.max.burst", 0);
    }
    if cpu.quota().is_some() || cpu.period().is_some() {
        let quota = cpu.quota().filter(|quota| *quota > 0).map_or("max".into(), |q| q.to_string());
        let period = cpu.period().filter(|period| *period != 0).unwrap_or(DEFAULT_PERIOD_US);
        s.write("linux.resources.cpu.quota", "cpu.max", format!("{quota} {period}"));
    }
    if let Some(burst) = burst.filter(|burst| *burst != 0) {
        s.write("linux.resources.cpu.burst", "cpu.max.burst", burst);
    }
    if let Some(cpus) = cpu.cpus().as_ref().filter(|cpus| !cpus.is_empty()) {
        s.write("linux.resources.cpu.cpus", "cpuset.cpus", cpus);
    }
    if let Some(mems) = cpu.mems().as_ref().filter(|mems| !mems.is_empty()) {
        s.write("linux.resources.cpu.mems", "cpuset.mems", mems);
    }
    let realtime = cpu.realtime_runtime().is_some_and(|n| n != 0)
        || cpu.realtime_period().is_some_and(|n| n != 0);
    s.no_meaning(realtime, "linux.resources.cpu.realtimeRuntime and realtimePeriod");
}

/// Shares of 2 to 262144 onto weights of 1 to 10000.
fn weight_of_shares(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142
}

fn convert_io(s: &mut Settings, io: &LinuxBlockIo) {
    if let Some(weight) = io.weight().filter(|weight| *weight != 0) {
        let value = format!("default {}", io_weight(weight));
        s.write_optional("linux.resources.blockIO.weight", "io.weight", value);
    }
    for device in io.weight_device().iter().flatten() {
        if let Some(weight) = device.weight().filter(|weight| *weight != 0) {
            let value = format!("{}:{} {}", device.major(), device.minor(), io_weight(weight));
            s.write_optional("linux.resources.blockIO.weightDevice", "io.weight", value);
        }
    }
    s.no_meaning(io.leaf_weight().is_some_and(|w| w != 0), "linux.resources.blockIO.leafWeight");
    let throttles = [
        ("rbps", io.throttle_read_bps_device()),
        ("wbps", io.throttle_write_bps_device()),
        ("riops", io.throttle_read_iops_device()),
        ("wiops", io.throttle_write_iops_device()),
    ];
    for (key, devices) in throttles {
        for device in devices.iter().flatten() {
            s.write("linux.resources.blockIO.throttle*", "io.max", io_max(key, device));
        }
    }
}

/// Weights of 10 to 1000 onto 1 to 10000.
fn io_weight(weight: u16) -> u64 {
    1 + (u64::from(weight).clamp(10, 1000) - 10) * 9_999 / 990
}

fn io_max(key: &str, device: &LinuxThrottleDevice) -> String {
    let rate = if device.rate() == 0 { "max".into() } else { device.rate().to_string() };
    format!("{}:{} {key}={rate}", device.major(), device.minor())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writes(json: &str) -> Vec<(String, String)> {
        let resources = serde_json::from_str(json).unwrap();
        settings(&resources).unwrap().writes.into_iter().map(|w| (w.file, w.value)).collect()
    }

    fn write(file: &str, value: &str) -> (String, String) {
        (file.into(), value.into())
    }

    #[test]
    fn memory() {
        assert_eq!(
            writes(r#"{"memory":{"limit":100,"swap":150,"reservation":50}}"#),
            [write("memory.max", "100"), write("memory.swap.max", "50"), write("memory.low", "50")]
        );
        assert_eq!(
            writes(r#"{"memory":{"limit":-1,"swap":-1}}"#),
            [write("memory.max", "max"), write("memory.swap.max", "max")]
        );
        assert_eq!(writes(r#"{"memory":{"limit":100,"swap":100}}"#)[1].1, "0");
        assert!(writes(r#"{"memory":{"limit":0}}"#).is_empty(), "0 means not given");
    }

    #[test]
    fn swap_that_contradicts_the_limit_is_refused() {
        for json in [r#"{"memory":{"limit":100,"swap":50}}"#, r#"{"memory":{"swap":50}}"#] {
            let error = settings(&serde_json::from_str(json).unwrap()).unwrap_err();
            assert!(error.to_string().contains("memory.swap"), "{error}");
        }
    }

    #[test]
    fn cpu() {
        assert_eq!(writes(r#"{"cpu":{"quota":150000}}"#), [write("cpu.max", "150000 100000")]);
        assert_eq!(writes(r#"{"cpu":{"quota":-1,"period":5000}}"#), [write("cpu.max", "max 5000")]);
        assert_eq!(
            writes(r#"{"cpu":{"quota":1000,"burst":500}}"#),
            [
                write("cpu.max.burst", "0"),
                write("cpu.max", "1000 100000"),
                write("cpu.max.burst", "500")
            ]
        );
        assert_eq!(
            writes(r#"{"cpu":{"cpus":"0-1","mems":"0"}}"#),
            [write("cpuset.cpus", "0-1"), write("cpuset.mems", "0")]
        );
    }

    #[test]
    fn weights_span_the_kernels_range() {
        assert_eq!([2, 1024, 262_144].map(weight_of_shares), [1, 39, 10_000]);
        assert_eq!([0, u64::MAX].map(weight_of_shares), [1, 10_000]);
        assert_eq!([10, 500, 1000].map(io_weight), [1, 4950, 10_000]);
    }

    #[test]
    fn pids_and_io() {
        assert_eq!(writes(r#"{"pids":{"limit":-1}}"#), [write("pids.max", "max")]);
        assert_eq!(writes(r#"{"pids":{"limit":5}}"#), [write("pids.max", "5")]);
        assert_eq!(
            writes(
                r#"{"blockIO":{"throttleReadBpsDevice":[{"major":254,"minor":0,"rate":1000}],
                       "throttleWriteIOPSDevice":[{"major":254,"minor":0,"rate":0}]}}"#
            ),
            [write("io.max", "254:0 rbps=1000"), write("io.max", "254:0 wiops=max")]
        );
    }

    #[test]
    fn unified_keys_are_file_names_and_nothing_else() {
        assert_eq!(writes(r#"{"unified":{"memory.high":"5"}}"#), [write("memory.high", "5")]);
        for key in ["../cgroup.procs", "a/b.c", "", "nodot"] {
            let json = format!(r#"{{"unified":{{"{key}":"1"}}}}"#);
            assert!(settings(&serde_json::from_str(&json).unwrap()).is_err(), "{key}");
        }
    }

    #[test]
    fn fields_without_meaning_are_noticed() {
        let json =
            r#"{"memory":{"swappiness":60},"network":{"classID":1},"cpu":{"realtimeRuntime":5}}"#;
        let notices = settings(&serde_json::from_str(json).unwrap()).unwrap().notices;
        assert_eq!(notices.len(), 3, "{notices:?}");
    }
}
