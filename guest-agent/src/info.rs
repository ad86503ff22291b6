//! What the host may ask about the guest.

use std::fs;

use mvm_agent_protocol::messages::{GuestInfoResponse, ProcessInfo};
use nix::unistd::{SysconfVar, sysconf};

use crate::sys;

/// The most of the kernel log that is returned, bytes.
const MAX_LOG: u32 = 64 << 10;

/// The kernel's release.
pub fn kernel_release() -> String {
    nix::sys::utsname::uname()
        .map(|names| names.release().to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// Everything about the guest as a whole.
pub fn guest(log_bytes: u32) -> GuestInfoResponse {
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    GuestInfoResponse {
        kernel_release: kernel_release(),
        agent_version: env!("CARGO_PKG_VERSION").into(),
        uptime_ns: sys::clock_ns(libc::CLOCK_BOOTTIME),
        memory_total_bytes: meminfo(&memory, "MemTotal"),
        memory_available_bytes: meminfo(&memory, "MemAvailable"),
        memory_free_bytes: meminfo(&memory, "MemFree"),
        cpus_online: sysconf(SysconfVar::_NPROCESSORS_ONLN)
            .ok()
            .flatten()
            .and_then(|n| u32::try_from(n).ok())
            .unwrap_or(0),
        processes: u32::try_from(all_pids().count()).unwrap_or(u32::MAX),
        dmesg_tail: kernel_log(log_bytes.min(MAX_LOG)),
        ..Default::default()
    }
}

fn meminfo(text: &str, key: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| *name == key)
        .and_then(|(_, value)| value.trim().trim_end_matches(" kB").parse::<u64>().ok())
        .unwrap_or(0)
        .saturating_mul(1024)
}

fn kernel_log(bytes: u32) -> String {
    let mut buffer = vec![0; usize::try_from(bytes).unwrap_or(0)];
    if buffer.is_empty() {
        return String::new();
    }
    let n = sys::kernel_log(&mut buffer).unwrap_or(0);
    String::from_utf8_lossy(buffer.get(..n).unwrap_or_default()).into_owned()
}

/// The processes of this process-id namespace.
pub fn all_pids() -> impl Iterator<Item = i32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// One process, `None` if it is gone.
pub fn process(pid: i32) -> Option<ProcessInfo> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let status = fs::read(format!("/proc/{pid}/status")).ok()?;
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    parse_process(&stat, &String::from_utf8_lossy(&status), &command)
}

/// A process names itself as it likes; the fields after its name are looked for behind the last
/// parenthesis.
fn parse_process(stat: &[u8], status: &str, command: &[u8]) -> Option<ProcessInfo> {
    const TICKS_PER_SECOND: u64 = 100;
    let stat = String::from_utf8_lossy(stat);
    let (head, tail) = stat.rsplit_once(')')?;
    let (pid, name) = head.split_once(" (")?;
    let fields: Vec<&str> = tail.split_ascii_whitespace().collect();
    let number = |at: usize| fields.get(at).and_then(|f| f.parse::<u64>().ok()).unwrap_or(0);
    let uid = status
        .lines()
        .find_map(|line| line.strip_prefix("Uid:"))
        .and_then(|ids| ids.split_ascii_whitespace().nth(1))
        .and_then(|id| id.parse().ok())
        .unwrap_or(0);
    let rss_kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|value| value.trim().trim_end_matches(" kB").parse::<u64>().ok())
        .unwrap_or(0);
    let command: Vec<_> = command
        .split(|b| *b == 0)
        .filter(|word| !word.is_empty())
        .map(String::from_utf8_lossy)
        .collect();
    Some(ProcessInfo {
        pid: pid.parse().ok()?,
        ppid: u32::try_from(number(1)).unwrap_or(0),
        uid,
        state: fields.first().copied().unwrap_or_default().into(),
        command: if command.is_empty() { format!("[{name}]") } else { command.join(" ") },
        cpu_ms: (number(11) + number(12)).saturating_mul(1000 / TICKS_PER_SECOND),
        rss_bytes: rss_kib.saturating_mul(1024),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_process_names_do_not_shift_fields() {
        let stat = b"42 (a) S 1 (b) R 7 1 1 0 -1 0 0 0 0 0 150 50 0 0 20 0 1 0 0 0 0";
        let status = "Name:\tx\nUid:\t1\t1000\t1\t1\nVmRSS:\t  12 kB\n";
        let info = parse_process(stat, status, b"sh\0-c\0x\0").unwrap();
        assert_eq!((info.pid, info.ppid, info.uid, &*info.state), (42, 7, 1000, "R"));
        assert_eq!((info.cpu_ms, info.rss_bytes, &*info.command), (2000, 12 << 10, "sh -c x"));
        assert_eq!(parse_process(stat, "", b"").unwrap().command, "[a) S 1 (b]");
        assert!(parse_process(b"garbage", "", b"").is_none());
    }

    #[test]
    fn memory_figures_are_bytes() {
        assert_eq!(meminfo("MemTotal:  100 kB\nMemFree: 7 kB\n", "MemFree"), 7 << 10);
        assert_eq!(meminfo("", "MemFree"), 0);
    }

    #[test]
    fn this_guest_can_be_described() {
        let info = guest(0);
        assert!(info.memory_total_bytes > 0 && info.processes > 0 && info.uptime_ns > 0);
        let me = i32::try_from(std::process::id()).unwrap();
        assert!(process(me).unwrap().rss_bytes > 0);
    }
}
