//! Reminds a guest of memory that it was to give back. Linux tries again only after most of a minute what it does not
//! manage at once, though what is in the way (pages on their way to the host, or between processors) is gone in a moment;
//! a change of the configuration makes it look at once, even if there is none.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::errno;
use vmm_sys_util::timerfd::TimerFd;

use crate::event_loop::{EventLoopError, Interest, Registrar};

/// Between two reminders.
const INTERVAL: Duration = Duration::from_millis(if cfg!(test) { 5 } else { 1000 });

/// How many there are for one request: what a guest has kept for so long it cannot do without.
const TIMES: u32 = 20;

/// The timer, and how many reminders are left.
pub(super) struct Reminder(Mutex<Inner>);

struct Inner {
    timer: TimerFd,
    left: u32,
}

impl Reminder {
    /// One that is silent.
    pub fn new() -> Result<Self, errno::Error> {
        Ok(Self(Mutex::new(Inner { timer: TimerFd::new()?, left: 0 })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the event loop tell of `token` when it is time.
    pub fn watch(&self, registrar: &Registrar, token: u64) -> Result<(), EventLoopError> {
        registrar.add(&self.lock().timer, token, Interest::READ)
    }

    /// There is a new request: it is reminded of from now on if it is one to give back.
    pub fn begin(&self, gives_back: bool) {
        let mut inner = self.lock();
        inner.left = if gives_back { TIMES } else { 0 };
        inner.set();
    }

    /// It is time. Whether the guest is to be reminded, which it is not once it has nothing to give back.
    pub fn is_due(&self, gives_back: bool) -> bool {
        let mut inner = self.lock();
        let due = gives_back && inner.left > 0;
        inner.left = if due { inner.left - 1 } else { 0 };
        inner.set();
        due
    }
}

impl Inner {
    fn set(&mut self) {
        let set = match self.left {
            0 => self.timer.clear(),
            _ => self.timer.reset(INTERVAL, None),
        };
        if let Err(e) = set {
            tracing::debug!("no timer for reminders: {e}");
        }
    }
}

impl std::fmt::Debug for Reminder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reminder").field("left", &self.lock().left).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_reminded_so_often_and_of_something() {
        let reminder = Reminder::new().unwrap();
        let due = |gives_back| (0..100).filter(|_| reminder.is_due(gives_back)).count();
        assert_eq!(due(true), 0);
        reminder.begin(true);
        assert_eq!(due(true), TIMES as usize);
        reminder.begin(true);
        assert!(reminder.is_due(true) && !reminder.is_due(false) && !reminder.is_due(true));
        assert!(!reminder.lock().timer.is_armed().unwrap());
        reminder.begin(true);
        reminder.begin(false);
        assert_eq!(due(true), 0);
    }
}
