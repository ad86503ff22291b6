//! Reading a group's figures.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use mvm_agent_protocol::messages::{IoStats, StatsResponse};

/// All figures; what the kernel does not have is 0.
pub fn read(group: &Path) -> StatsResponse {
    let table = |file: &str| flat(&fs::read_to_string(group.join(file)).unwrap_or_default());
    let number = |file: &str| number(&group.join(file));
    StatsResponse {
        cpu: table("cpu.stat"),
        memory_current: number("memory.current"),
        memory_peak: number("memory.peak"),
        memory_max: number("memory.max"),
        swap_current: number("memory.swap.current"),
        memory: table("memory.stat"),
        memory_events: table("memory.events"),
        pids_current: number("pids.current"),
        pids_max: number("pids.max"),
        io: io(&fs::read_to_string(group.join("io.stat")).unwrap_or_default()),
        ..Default::default()
    }
}

/// One key of a table file, 0 if it is not there.
pub fn key(file: &Path, key: &str) -> u64 {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == key)
        .and_then(|(_, value)| value.parse().ok())
        .unwrap_or(0)
}

/// A file of one number; `u64::MAX` is "max", 0 a file that is not there.
pub fn number(file: &Path) -> u64 {
    single(&fs::read_to_string(file).unwrap_or_default())
}

fn flat(text: &str) -> HashMap<String, u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(key, value)| Some((key.into(), value.parse().ok()?)))
        .collect()
}

fn single(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        number => number.parse().unwrap_or(0),
    }
}

fn io(text: &str) -> Vec<IoStats> {
    let line = |line: &str| -> Option<IoStats> {
        let mut words = line.split(' ');
        let (major, minor) = words.next()?.split_once(':')?;
        let mut stats = IoStats {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            ..Default::default()
        };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let value = value.parse().unwrap_or(0);
            match key {
                "rbytes" => stats.read_bytes = value,
                "wbytes" => stats.write_bytes = value,
                "rios" => stats.reads = value,
                "wios" => stats.writes = value,
                _ => {}
            }
        }
        Some(stats)
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_formats_are_read() {
        assert_eq!(flat("usage_usec 12\nuser_usec 5\nbroken\n")["usage_usec"], 12);
        assert_eq!((single("max\n"), single("42\n"), single("")), (u64::MAX, 42, 0));
        let io = io("254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\nnonsense\n");
        assert_eq!((io.len(), io[0].major, io[0].write_bytes, io[0].reads), (1, 254, 2, 3));
    }

    #[test]
    fn figures_of_no_group_are_zero() {
        assert_eq!(read(Path::new("/nonexistent")), StatsResponse::default());
        assert_eq!(key(Path::new("/nonexistent"), "oom_kill"), 0);
    }
}
