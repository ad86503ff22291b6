//! A wait on a vCPU's thread that the machine can end.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

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
    passage: Mutex<Passage>,
    changed: Condvar,
}

impl Gate {
    /// The gate of a machine that does not run yet.
    pub fn new() -> Self {
        Self { passage: Mutex::new(Passage::Shut), changed: Condvar::new() }
    }

    /// Says how things are, and ends all waiting if it is not [`Passage::Open`]. The end is final.
    pub fn set(&self, passage: Passage) {
        let mut now = self.lock();
        if *now != Passage::Ended {
            *now = passage;
        }
        drop(now);
        self.changed.notify_all();
    }

    /// How things are.
    pub fn passage(&self) -> Passage {
        *self.lock()
    }

    /// Waits for `time` while the gate is open; whether all of it passed.
    pub fn wait(&self, time: Duration) -> bool {
        // A time that the clock cannot express is for ever.
        let end = Instant::now().checked_add(time);
        let mut now = self.lock();
        while *now == Passage::Open {
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

    fn lock(&self) -> MutexGuard<'_, Passage> {
        self.passage.lock().unwrap_or_else(PoisonError::into_inner)
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
