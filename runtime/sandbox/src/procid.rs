//! Processes named so that a recycled pid is never mistaken for the one that was meant.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// A process by its pid and the moment it started, in clock ticks after the host's boot
/// (field 22 of `/proc/PID/stat`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// The pid in the pid namespace of the one who wrote it down.
    pub pid: u32,
    /// Clock ticks between the host's boot and the start of the process.
    pub start: u64,
}

impl ProcessId {
    /// The calling process.
    pub fn current() -> io::Result<Self> {
        Self::of(std::process::id())
    }

    /// The live process `pid`; a zombie counts as gone.
    pub fn of(pid: u32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        match parse_stat(&stat) {
            Some(stat) if !stat.is_gone() => Ok(Self { pid, start: stat.start }),
            Some(_) => Err(io::Error::new(io::ErrorKind::NotFound, "the process has ended")),
            None => Err(io::Error::new(io::ErrorKind::InvalidData, "unreadable /proc/PID/stat")),
        }
    }

    /// The process that started it, or that it was left to.
    ///
    /// # Errors
    /// It, or that one, has ended.
    pub fn parent(&self) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid))?;
        match parse_stat(&stat) {
            Some(stat) if stat.start == self.start => Self::of(stat.parent),
            _ => Err(io::Error::new(io::ErrorKind::NotFound, "the process has ended")),
        }
    }

    /// Whether this very process still runs.
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid).is_ok_and(|now| now == *self)
    }

    /// A handle to this very process, or `None` when it is gone.
    pub fn open(&self) -> io::Result<Option<PidFd>> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        match pidfd_open(pid, PidfdFlags::empty()) {
            // Checked after opening: from here on the handle cannot change its meaning.
            Ok(fd) if self.is_alive() => Ok(Some(PidFd(fd))),
            Ok(_) | Err(rustix::io::Errno::SRCH) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

/// What a `/proc/PID/stat` line says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stat {
    /// The first thread's state letter (field 3).
    state: char,
    /// The pid of its parent (field 4).
    parent: u32,
    /// Threads that have not been collected, the first one among them (field 20).
    threads: u32,
    /// Clock ticks between the host's boot and the start (field 22).
    start: u64,
}

impl Stat {
    /// Whether the whole process has ended. A killed process whose first thread is a zombie already may
    /// have others that still hold what it has open, such as tap devices.
    fn is_gone(&self) -> bool {
        matches!(self.state, 'Z' | 'X') && self.threads <= 1
    }
}

/// The command name is in parentheses and may itself hold spaces and parentheses, so fields count from
/// the last one.
fn parse_stat(stat: &str) -> Option<Stat> {
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let parent = fields.next()?.parse().ok()?;
    let threads = fields.nth(15)?.parse().ok()?;
    let start = fields.nth(1)?.parse().ok()?;
    Some(Stat { state, parent, threads, start })
}

/// An open handle to one process, readable when it has ended.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Sends `signal`; a process that has already ended is no error.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let signal = rustix::process::Signal::from_named_raw(signal as i32)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        match pidfd_send_signal(&self.0, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Waits until the process has ended; `false` when `limit` passed first.
    pub fn wait_ended(&self, limit: Duration) -> io::Result<bool> {
        wait_readable(self.as_fd(), limit)
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until `fd` is readable (or has hung up); `false` when `limit` passed first.
pub fn wait_readable(fd: BorrowedFd<'_>, limit: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, so that the last round does not spin at zero.
        let millis = left.as_millis().saturating_add(1).min(i32::MAX as u128) as i32;
        let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
            Ok(0) if Instant::now() >= deadline => return Ok(false),
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(e) => return Err(e.into()),
        }
    }
}

/// The host's boot, as an id: what was recorded under another one ran before a restart.
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_with_parentheses_in_the_name_is_read() {
        let tail = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 3 18 4711 20";
        let want = Some(Stat { state: 'S', parent: 1, threads: 3, start: 4711 });
        assert_eq!(parse_stat(&format!("12 (a) b) c) {tail}")), want);
        assert_eq!(parse_stat("12 (short) S 1 2"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn a_process_is_its_parents_child() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap();
        assert_eq!(id.parent().unwrap(), ProcessId::current().unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(id.parent().is_err());
    }

    #[test]
    fn another_start_time_is_another_process() {
        let me = ProcessId::current().unwrap();
        assert!(me.is_alive());
        assert!(me.open().unwrap().is_some());
        let stranger = ProcessId { start: me.start + 1, ..me };
        assert!(!stranger.is_alive());
        assert!(stranger.open().unwrap().is_none());
    }

    #[test]
    fn zombie_counts_as_gone_and_its_handle_reports_the_end() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let id = ProcessId::of(child.id());
        if let Ok(id) = id
            && let Some(fd) = id.open().unwrap()
        {
            assert!(fd.wait_ended(Duration::from_secs(10)).unwrap());
            assert!(!id.is_alive());
            fd.signal(Signal::SIGTERM).unwrap();
        }
        child.wait().unwrap();
    }

    #[test]
    fn process_whose_first_thread_alone_has_ended_is_alive() {
        let is_gone = |state, threads| Stat { state, parent: 1, threads, start: 1 }.is_gone();
        assert!(is_gone('Z', 1) && is_gone('Z', 0) && is_gone('X', 1));
        assert!(!is_gone('Z', 2) && !is_gone('S', 1) && !is_gone('R', 2));
    }

    #[test]
    fn waiting_ends_at_its_limit() {
        let me = ProcessId::current().unwrap().open().unwrap().unwrap();
        assert!(!me.wait_ended(Duration::from_millis(20)).unwrap());
    }
}
