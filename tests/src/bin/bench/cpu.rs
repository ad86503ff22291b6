//! Processor time, which stands a busy host where the clock on the wall does not.

use std::collections::BTreeMap;
use std::fs;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nix::unistd::{Pid, SysconfVar, sysconf};

/// CPU seconds of all children waited for.
#[allow(clippy::cast_precision_loss)]
pub fn of_children() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("getrusage cannot fail");
    (usage.user_time().num_microseconds() + usage.system_time().num_microseconds()) as f64 / 1e6
}

/// CPU seconds of the process, its descendants, and those of them that ended and were waited for. To a clock tick each.
#[allow(clippy::cast_precision_loss)]
pub fn of_tree(root: Pid) -> f64 {
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    let mut ticks: BTreeMap<i32, u64> = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let Some((parent, own)) = stat_of(&stat) else { continue };
        children.entry(parent).or_default().push(pid);
        ticks.insert(pid, own);
    }
    let mut todo = vec![root.as_raw()];
    let mut sum = 0;
    while let Some(pid) = todo.pop() {
        sum += ticks.get(&pid).copied().unwrap_or(0);
        todo.extend(children.remove(&pid).unwrap_or_default());
    }
    let hz = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
    sum as f64 / hz as f64
}

/// Parent and ticks in a line of proc(5)'s `stat`: fields 4, and 14 to 17.
fn stat_of(stat: &str) -> Option<(i32, u64)> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let times = fields.get(11..15)?.iter().map(|field| field.parse::<u64>());
    Some((fields.get(1)?.parse().ok()?, times.sum::<Result<u64, _>>().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_stat() {
        let line = "77 (a ) b) S 5 77 77 0 -1 4194560 1 2 3 4 10 20 30 40 20 0 1 0 9";
        assert_eq!(stat_of(line), Some((5, 100)));
        assert_eq!(stat_of("77 (x) S 5"), None);
    }
}
