//! Noticing that a guest is dead.
//!
//! With local APICs in the kernel KVM reports no HLT: a vCPU in `cli; hlt` sleeps in KVM_RUN and nothing ever
//! comes out of it. So a timer interrupts a run from time to time, and the vCPU is looked at: soon after an exit, then
//! less and less often while nothing happens, so that an idle guest costs one look a second.
//!
//! A vCPU that halts with interrupts off can be woken by others (NMI, INIT, start-up IPI, KVM's own kick), so a
//! machine is dead only if all are stopped at one time. That can be seen only while none of them is in KVM_RUN:
//! they meet in a [`Rendezvous`].

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::kick::{KICK, LOOK, Reach};

/// Time between the last exit and the first look.
const FIRST: Duration = Duration::from_millis(5);
/// Longest time between two looks: what a guest that dies after long idleness may take to be noticed.
const LAST: Duration = Duration::from_secs(1);
/// How long vCPUs wait for one another. One that does not come is not in its run, or makes no exit: the next
/// look tries again.
const PATIENCE: Duration = Duration::from_millis(100);

/// When to look next.
#[derive(Debug)]
pub(super) struct Pace {
    interval: Duration,
    eager: bool,
}

impl Pace {
    pub fn new() -> Self {
        Self { interval: FIRST, eager: true }
    }

    /// The vCPU made an exit. True if the timer is to be set anew to [`Pace::interval`], since it is set to a
    /// time far away.
    #[inline]
    pub fn on_exit(&mut self) -> bool {
        let slow = self.interval != FIRST;
        self.interval = FIRST;
        self.eager = true;
        slow
    }

    /// The vCPU was looked at, and is alive. The timer is to be set to [`Pace::interval`].
    pub fn on_look(&mut self) {
        if !std::mem::take(&mut self.eager) {
            self.interval = (self.interval * 2).min(LAST);
        }
    }

    pub fn interval(&self) -> Duration {
        self.interval
    }
}

#[derive(Debug)]
struct State {
    /// Which vCPUs were stopped when they were looked at last.
    stopped: Vec<bool>,
    /// Which of them are here, while they meet.
    present: Vec<bool>,
    /// They met, and all were stopped.
    dead: bool,
}

/// Where the vCPUs of a machine find out whether all of them are stopped.
#[derive(Debug)]
pub(super) struct Rendezvous {
    state: Mutex<State>,
    changed: Condvar,
}

impl Rendezvous {
    pub fn new(vcpus: u32) -> Self {
        let none = vec![false; vcpus as usize];
        let state = State { stopped: none.clone(), present: none, dead: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// vCPU `index`, outside KVM_RUN, is stopped. True if all are, for good.
    ///
    /// The others are asked to come here ([`LOOK`]) once all of them were seen stopped; `own` is this vCPU's
    /// [`Reach`], and a kick ends the wait.
    pub fn all_stopped(&self, index: usize, own: &Reach, others: &[Arc<Reach>]) -> bool {
        let mut state = self.lock();
        state.stopped[index] = true;
        if state.dead {
            return true;
        }
        if !state.stopped.iter().all(|&s| s) {
            return false;
        }
        let first = !state.present.contains(&true);
        state.present[index] = true;
        if state.present.iter().all(|&p| p) {
            state.dead = true;
            self.changed.notify_all();
            return true;
        }
        if first {
            drop(state);
            others.iter().enumerate().filter(|(i, _)| *i != index).for_each(|(_, r)| r.ask(LOOK));
            state = self.lock();
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            if state.dead {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !state.present[index] || own.asked(KICK) || left.is_zero() {
                // Somebody is alive, or wants something, or does not come.
                self.part(&mut state);
                return false;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// vCPU `index` makes exits, or leaves its run: it is not known to be stopped.
    pub fn leave(&self, index: usize) {
        let mut state = self.lock();
        state.stopped[index] = false;
        self.part(&mut state);
    }

    /// vCPU `index` has another state now: the machine may be alive again.
    pub fn revive(&self, index: usize) {
        self.leave(index);
        self.lock().dead = false;
    }

    /// Has those who wait look at what is wanted of them.
    pub fn wake(&self) {
        // Under the lock: nobody is between looking and waiting.
        let _state = self.lock();
        self.changed.notify_all();
    }

    fn part(&self, state: &mut State) {
        state.present.fill(false);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
