//! A wait on a vCPU's thread that the machine can end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;

/// What a machine wants of the devices that wait for their guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passage {
    /// vCPUs run: wait as long as the guest asks.
    Open,
    /// vCPUs are to stand still: come back at once.
    Shut,
    /// The machine has ended: nothing needs to be finished.
    Ended,
}

/// Tells those who wait for a guest that the machine is to stand still.
///
/// A device access runs on the vCPU's thread, and the vCPU cannot stop before it returns. It says
/// how things *are*, not that something has happened, so that it does not matter who comes first, the
/// one who wants to wait or the one who wants to stop.
#[derive(Debug)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    passage: Passage,
    /// Readable while the gate is not open, for those who wait for descriptors besides.
    bell: Option<Arc<EventFd>>,
}

impl State {
    fn ring(&self) {
        let Some(bell) = &self.bell else { return };
        // Neither blocks; to silence a bell that does not ring is no error.
        let _ = match self.passage {
            Passage::Open => bell.read().map(drop),
            Passage::Shut | Passage::Ended => bell.write(1).map(drop),
        };
    }
}

impl Gate {
    /// The gate of a machine that does not run yet.
    pub fn new() -> Self {
        let state = State { passage: Passage::Shut, bell: None };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Says how things are, and ends all waiting if it is not [`Passage::Open`]. The end is final.
    pub fn set(&self, passage: Passage) {
        let mut now = self.lock();
        if now.passage != Passage::Ended {
            now.passage = passage;
        }
        now.ring();
        drop(now);
        self.changed.notify_all();
    }

    /// How things are.
    pub fn passage(&self) -> Passage {
        self.lock().passage
    }

    /// Waits for `time` while the gate is open; whether all of it passed.
    pub fn wait(&self, time: Duration) -> bool {
        // A time that the clock cannot express is for ever.
        let end = Instant::now().checked_add(time);
        let mut now = self.lock();
        while now.passage == Passage::Open {
            let Some(left) = end.map(|e| e.saturating_duration_since(Instant::now())) else {
                now = self.changed.wait(now).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            if left.is_zero() {
                return true;
            }
            now = self.changed.wait_timeout(now, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        false
    }

    /// Prepares for [`Gate::wait_readable`] with descriptors.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn arm(&self) -> io::Result<()> {
        let mut now = self.lock();
        if now.bell.is_none() {
            let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
            now.bell = Some(Arc::new(EventFd::from_flags(flags)?));
            now.ring();
        }
        Ok(())
    }

    /// Waits for `time` while the gate is open, or until one of `fds` is readable; which of them are.
    /// None is if the gate is not open, or was never armed.
    pub fn wait_readable(&self, fds: &[BorrowedFd<'_>], time: Duration) -> Vec<bool> {
        let none = || vec![false; fds.len()];
        let bell = self.lock().bell.clone();
        let (Some(bell), false) = (bell, fds.is_empty()) else {
            self.wait(time);
            return none();
        };
        let end = Instant::now().checked_add(time);
        let all = [bell.as_fd()].into_iter().chain(fds.iter().copied());
        let mut polled: Vec<_> = all.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        loop {
            let left = end.map(|e| e.saturating_duration_since(Instant::now()));
            match ppoll(&mut polled, left.map(TimeSpec::from_duration), None) {
                Err(Errno::EINTR) => continue,
                Err(e) => {
                    tracing::error!("cannot wait for the guest's networks: {e}");
                    return none();
                }
                Ok(_) => {}
            }
            let mut ready = polled.iter().map(|fd| fd.any().unwrap_or(false));
            return match ready.next() {
                Some(false) => ready.collect(),
                _ => none(),
            };
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Gate {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    #[test]
    fn a_shut_gate_lets_nobody_wait() {
        let gate = Gate::new();
        assert!(!gate.wait(Duration::MAX));
        gate.set(Passage::Open);
        assert!(gate.wait(Duration::ZERO));
        assert!(gate.wait(Duration::from_millis(2)));
        gate.set(Passage::Ended);
        gate.set(Passage::Open);
        assert_eq!(gate.passage(), Passage::Ended, "the end is final");
        assert!(!gate.wait(Duration::MAX));
    }

    #[test]
    fn who_waits_for_a_descriptor_hears_of_it_and_of_the_gate() {
        use std::os::unix::net::UnixDatagram;
        let gate = Arc::new(Gate::new());
        gate.arm().unwrap();
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        let wait = |time| gate.wait_readable(&[ours.as_fd()], time);
        assert_eq!(wait(Duration::MAX), [false], "it is shut");
        gate.set(Passage::Open);
        assert_eq!(wait(Duration::ZERO), [false]);
        assert_eq!(wait(Duration::from_millis(2)), [false]);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| wait(Duration::MAX));
            theirs.send(b"x").unwrap();
            assert_eq!(waiting.join().unwrap(), [true]);
        });
        ours.recv(&mut [0]).unwrap();
        for passage in [Passage::Shut, Passage::Ended] {
            gate.set(Passage::Open);
            thread::scope(|scope| {
                let waiting = scope.spawn(|| wait(Duration::from_secs(1 << 40)));
                gate.set(passage);
                assert_eq!(waiting.join().unwrap(), [false]);
            });
        }
        theirs.send(b"x").unwrap();
        assert_eq!(wait(Duration::MAX), [false], "nobody needs it any more");
        assert!(gate.wait_readable(&[], Duration::MAX).is_empty());
    }

    #[test]
    fn who_waits_is_woken_when_the_gate_shuts() {
        for time in [Duration::MAX, Duration::from_secs(1 << 40)] {
            let gate = Arc::new(Gate::new());
            gate.set(Passage::Open);
            let waiting = thread::spawn({
                let gate = gate.clone();
                move || gate.wait(time)
            });
            gate.set(Passage::Shut);
            assert!(!waiting.join().unwrap());
        }
    }
}
