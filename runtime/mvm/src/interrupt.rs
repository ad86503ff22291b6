//! Ctrl-C while an image is taken in: what was written goes again, and the code says which signal
//! it was.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use mvm_sandbox::procid::wait_readable;
use mvm_sandbox::pump::Flag;
use mvm_sandbox::spec::signal_name;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};

use crate::signals::{ENDING, Signals};

/// How long the work may take to stop by itself. It does not where it waits for somebody else's
/// lock; then the process ends where it stands, and the store sweeps up when it is opened next.
const GRACE: Duration = Duration::from_secs(2);

/// A signal ended what we were doing.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("interrupted by {}", signal_name(*.0))]
pub struct Interrupted(pub i32);

/// Watches for the signals that ask us to stop, until it is dropped.
#[derive(Debug)]
pub struct Watch {
    came: Arc<AtomicI32>,
    told: AtomicBool,
    before: SigSet,
    stop: Flag,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Begins to watch. The signals are blocked in this thread until the end, and in all that it
    /// starts meanwhile.
    pub fn begin() -> anyhow::Result<Self> {
        let before = SigSet::thread_get_mask().context("cannot read the signal mask")?;
        let signals = Signals::of(&ENDING)?;
        let stop = Flag::new().context("cannot make an event descriptor")?;
        let came = Arc::new(AtomicI32::new(0));
        let (tell, until) = (came.clone(), stop.clone());
        let thread = std::thread::Builder::new()
            .name("interrupt".into())
            .spawn(move || wait(&signals, &until, &tell))
            .context("cannot start a thread")?;
        Ok(Self { came, told: AtomicBool::new(false), before, stop, thread: Some(thread) })
    }

    /// The signal that came.
    pub fn signal(&self) -> Option<Interrupted> {
        Some(self.came.load(Ordering::Acquire)).filter(|s| *s != 0).map(Interrupted)
    }

    /// `result`, or the signal that came meanwhile.
    pub fn judge<T>(&self, result: anyhow::Result<T>) -> anyhow::Result<T> {
        match self.signal() {
            Some(interrupted) => {
                self.told.store(true, Ordering::Release);
                Err(interrupted.into())
            }
            None => result,
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.raise();
        if let Some(thread) = self.thread.take() {
            // It only waits for the flag.
            let _ = thread.join();
        }
        if let Err(e) = self.before.thread_set_mask() {
            tracing::warn!("signals stay blocked: {e}");
        }
        let came = self.came.load(Ordering::Acquire);
        if let (Ok(signal), false) = (Signal::try_from(came), self.told.load(Ordering::Acquire)) {
            // It came too late to be told, and means what it always means.
            let _ = nix::sys::signal::raise(signal);
        }
    }
}

fn wait(signals: &Signals, stop: &Flag, came: &AtomicI32) {
    let mut fds = [
        PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        PollFd::new(stop.as_fd(), PollFlags::POLLIN),
    ];
    while let Err(nix::errno::Errno::EINTR) = poll(&mut fds, PollTimeout::NONE) {}
    if fds[1].any().unwrap_or(true) {
        return;
    }
    let Ok(number) = signals.next() else { return };
    came.store(number, Ordering::Release);
    if !wait_readable(stop.as_fd(), GRACE).unwrap_or(true) {
        crate::output::complain(&Interrupted(number).to_string());
        std::process::exit(128 + number);
    }
}
