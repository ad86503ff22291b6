//! The APIC timers of vCPUs that run without looking at the time.
//!
//! A thread per machine, made when the first timer is set, sleeps until the earliest deadline and raises the vCPU's
//! attention. Setting a timer wakes it only if it would oversleep.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use super::attention::reason;
use mvm_engine::tsc::mul_div;

use super::clock::host_tsc;
use super::platform::Platform;
use crate::apic::NEVER;

#[derive(Debug, Default)]
struct State {
    /// Host TSC by vCPU.
    deadlines: Vec<u64>,
    /// When the thread wakes by itself.
    wakes: u64,
    started: bool,
    over: bool,
}

#[derive(Debug, Default)]
struct Shared {
    /// Frequency of the TSC.
    khz: u64,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The alarm clock of one machine. Its thread ends when it is dropped.
#[derive(Debug)]
pub struct Alarm(Arc<Shared>);

impl Alarm {
    /// For `vcpus` vCPUs on a host whose TSC has `khz`.
    pub fn new(vcpus: u32, khz: u64) -> Self {
        let shared = Shared { khz, ..Shared::default() };
        shared.lock().deadlines = vec![NEVER; vcpus as usize];
        Self(Arc::new(shared))
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.0.lock().over = true;
        self.0.changed.notify_all();
    }
}

impl Platform {
    /// Raises the attention of vCPU `index` when the host's TSC reaches `deadline`.
    pub(crate) fn set_alarm(self: &Arc<Self>, index: u32, deadline: u64) {
        let mut state = self.alarm.0.lock();
        if let Some(mine) = state.deadlines.get_mut(index as usize) {
            *mine = deadline;
        }
        if deadline == NEVER {
            return;
        }
        if !state.started {
            state.started = true;
            state.wakes = 0;
            let (shared, platform) = (self.alarm.0.clone(), Arc::downgrade(self));
            let thread = std::thread::Builder::new()
                .name("alarm".into())
                .spawn(move || watch(&shared, &platform));
            if let Err(error) = thread {
                tracing::error!("no thread for timers: {error}");
                state.started = false;
            }
        } else if deadline < state.wakes {
            self.alarm.0.changed.notify_one();
        }
    }
}

fn watch(shared: &Shared, platform: &Weak<Platform>) {
    let mut state = shared.lock();
    while !state.over {
        let now = host_tsc();
        let mut due = Vec::new();
        for (index, deadline) in (0u32..).zip(&mut state.deadlines) {
            if *deadline <= now {
                *deadline = NEVER;
                due.push(index);
            }
        }
        if !due.is_empty() {
            drop(state);
            // Dropping the last reference to the platform takes this lock.
            let Some(platform) = platform.upgrade() else { return };
            for index in due {
                platform.apics.port(index).attention.raise(reason::SYNC);
            }
            drop(platform);
            state = shared.lock();
            continue;
        }
        let next = state.deadlines.iter().copied().min().unwrap_or(NEVER);
        state.wakes = next;
        state = if next == NEVER {
            shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
        } else {
            let time = Duration::from_nanos(mul_div(next - now, 1_000_000, shared.khz));
            shared.changed.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner).0
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_raises_attention_also_if_a_later_one_was_set_first() {
        let platform = Platform::for_tests(2);
        let now = host_tsc();
        platform.set_alarm(0, now + (1 << 50));
        platform.set_alarm(1, now + 1_000_000);
        let attention = &platform.apics.port(1).attention;
        while !attention.any() {
            std::thread::yield_now();
        }
        assert_eq!(attention.take(), reason::SYNC);
        assert!(!platform.apics.port(0).attention.any());
    }
}
