//! Signals as events. They are blocked before any thread exists and read from a descriptor, so no
//! handler ever runs.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use anyhow::Context;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Signals that are passed on to the container's process, as docker does: all that can be caught
/// but those about our own children and pipes, faults, and job control.
const PASSED_ON: [Signal; 14] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGCONT,
    Signal::SIGWINCH,
    Signal::SIGIO,
    Signal::SIGPWR,
    Signal::SIGVTALRM,
    Signal::SIGXCPU,
    Signal::SIGSTKFLT,
];

/// Signals that end what we do before there is a process to pass them on to. The others wait for
/// it: a window that changes its size is no reason to stop.
pub const ENDING: [Signal; 4] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM];

/// The signals that came.
#[derive(Debug, Clone)]
pub struct Signals(Arc<SignalFd>);

impl Signals {
    /// Blocks the signals in this thread and all that it starts. What our parent had us ignore
    /// (`nohup`, a job in the background) stays ignored.
    pub fn catch() -> anyhow::Result<Self> {
        Self::of(&PASSED_ON)
    }

    /// The same for these signals alone.
    pub fn of(signals: &[Signal]) -> anyhow::Result<Self> {
        let ignored = ignored(&fs::read_to_string("/proc/self/status").unwrap_or_default());
        // Left out here because the kernel queues even an ignored signal while it is blocked.
        let set: SigSet =
            signals.iter().copied().filter(|s| ignored >> (*s as i32 - 1) & 1 == 0).collect();
        set.thread_block().context("cannot block signals")?;
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC)
            .context("cannot make a signal descriptor")?;
        Ok(Self(Arc::new(fd)))
    }

    /// The next signal's number; waits for it.
    pub fn next(&self) -> anyhow::Result<i32> {
        loop {
            match self.0.read_signal() {
                Ok(Some(info)) => return Ok(i32::try_from(info.ssi_signo).unwrap_or(0)),
                Ok(None) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(e).context("cannot read signals"),
            }
        }
    }
}

/// The set of ignored signals in a `/proc/PID/status`, bit n-1 for signal n.
fn ignored(status: &str) -> u64 {
    status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0)
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_read_from_the_status() {
        let hangup_and_pipe = ignored("Name:\tx\nSigIgn:\t0000000000001001\nSigCgt:\t1\n");
        assert_eq!(
            hangup_and_pipe,
            1 << (Signal::SIGHUP as i32 - 1) | 1 << (Signal::SIGPIPE as i32 - 1)
        );
        assert_eq!(ignored(""), 0);
    }
}
