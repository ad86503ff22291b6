//! The output of counter 0, which is IRQ 0.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

use super::{CounterState, HZ, NANOS, Pit};
use crate::event_loop::{EventLoop, EventLoopError, Interest, Source, Subscriber};
use crate::irq::InterruptLine;

/// Least time between two ticks in nanoseconds: a guest may ask for more than a host should do for it.
const SHORTEST: u64 = 100_000;

/// Why the timer cannot interrupt.
#[derive(Debug, thiserror::Error)]
pub enum PitError {
    /// The host has no timer for it.
    #[error("cannot make a timer for the interval timer's interrupts: {0}")]
    Timer(#[source] std::io::Error),
    /// It cannot be waited for.
    #[error(transparent)]
    EventLoop(#[from] EventLoopError),
}

/// Where ticks go, and when the next one is.
pub(super) struct Ticks {
    line: Arc<dyn InterruptLine>,
    timer: TimerFd,
    /// In nanoseconds of the device.
    next: Option<u64>,
    /// The machine stands still.
    paused: bool,
}

impl CounterState {
    /// When the output rises next after `now`.
    fn next_rise(&self, now: u64) -> Option<u64> {
        let begun = self.begun.filter(|_| self.stopped.is_none())?;
        let (period, elapsed) = (self.period(), self.elapsed(now));
        let counts = match self.mode {
            0 if elapsed < period => period,
            2 | 3 => (elapsed / period + 1) * period,
            // Low for one count.
            4 if elapsed <= period => period + 1,
            _ => return None,
        };
        let nanos = (counts * NANOS).div_ceil(HZ);
        u64::try_from(nanos).ok().map(|nanos| begun.saturating_add(nanos))
    }
}

impl Ticks {
    /// Gives the tick whose time has come. What was missed is not made up for: controllers hold one.
    pub fn give(&mut self, counter: &CounterState, now: u64) {
        let Some(next) = self.next.filter(|next| *next <= now) else { return };
        self.line.set_level(false);
        self.line.set_level(true);
        let least = next.saturating_add(SHORTEST);
        self.next = counter.next_rise(now).map(|rise| rise.max(least));
    }

    /// Counter 0 was set.
    pub fn set(&mut self, counter: &CounterState, now: u64) {
        self.line.set_level(false);
        self.next = counter.next_rise(now);
    }

    /// Waits for the next tick, or for none.
    pub fn wait(&mut self, now: u64) {
        let left = match self.next {
            // A time of 0 would be none.
            Some(next) if !self.paused => Duration::from_nanos(next.saturating_sub(now).max(1)),
            _ => Duration::ZERO,
        };
        // Setting it also takes back that it has run down, so that nobody needs to read it.
        if let Err(e) = self.timer.reset(left, None) {
            tracing::error!("the interval timer stands still: {e}");
        }
    }

    pub fn pause(&mut self, paused: bool) {
        self.paused = paused;
    }

    pub fn next(&self) -> Option<u64> {
        self.next
    }

    pub fn restore(&mut self, next: Option<u64>) {
        self.next = next;
    }
}

impl fmt::Debug for Ticks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticks").field("next", &self.next).finish_non_exhaustive()
    }
}

/// What the event loop calls.
struct OnTime(Pit);

impl Subscriber for OnTime {
    fn ready(&self, _source: Source) {
        self.0.tick();
    }
}

impl Pit {
    /// Has counter 0 pull `line` from now on, on the thread of `events` and on that of who sets it.
    ///
    /// # Errors
    /// [`PitError`].
    pub fn connect(
        &self,
        line: Arc<dyn InterruptLine>,
        events: &EventLoop,
    ) -> Result<(), PitError> {
        let timer = TimerFd::new().map_err(|e| PitError::Timer(e.into()))?;
        events.subscribe(Arc::new(OnTime(self.clone()))).add(&timer, 0, Interest::READ)?;
        self.lock().ticks = Some(Ticks { line, timer, next: None, paused: false });
        Ok(())
    }

    /// Gives no ticks until [`Pit::resume`].
    pub fn pause(&self) {
        self.set_paused(true);
    }

    /// Goes on, with one tick for all that were missed.
    pub fn resume(&self) {
        self.set_paused(false);
    }

    fn set_paused(&self, paused: bool) {
        let mut inner = self.lock();
        let now = inner.now();
        if let Some(ticks) = &mut inner.ticks {
            ticks.pause(paused);
            ticks.wait(now);
        }
    }

    fn tick(&self) {
        let inner = &mut *self.lock();
        let now = inner.now();
        if let Some(ticks) = &mut inner.ticks {
            if !ticks.paused {
                ticks.give(&inner.counters[0], now);
            }
            ticks.wait(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Instant;

    use super::*;
    use crate::BusDevice;

    /// Nanoseconds at the end of so many counts.
    fn after(counts: u128) -> u64 {
        (counts * NANOS).div_ceil(HZ) as u64
    }

    fn counter(mode: u8, reload: u16) -> CounterState {
        CounterState { mode, reload, begun: Some(0), ..CounterState::default() }
    }

    #[test]
    fn outputs_rise_when_the_data_sheet_says() {
        assert_eq!(counter(0, 100).next_rise(0), Some(after(100)));
        assert_eq!(counter(0, 100).next_rise(after(100)), None, "once");
        assert_eq!(counter(4, 100).next_rise(after(100)), Some(after(101)));
        assert_eq!(counter(4, 100).next_rise(after(101)), None);
        for mode in [2, 3] {
            assert_eq!(counter(mode, 100).next_rise(0), Some(after(100)));
            assert_eq!(counter(mode, 100).next_rise(after(100)), Some(after(200)));
            assert_eq!(counter(mode, 0).next_rise(after(250)), Some(after(65536)));
        }
        // These wait for an edge of a gate that is always high.
        for mode in [1, 5] {
            assert_eq!(CounterState { begun: None, ..counter(mode, 100) }.next_rise(0), None);
        }
    }

    struct Line(Mutex<Sender<bool>>);

    impl fmt::Debug for Line {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Line")
        }
    }

    impl InterruptLine for Line {
        fn set_level(&self, asserted: bool) {
            // Nobody listens at the end of a test.
            let _ = self.0.lock().unwrap().send(asserted);
        }
    }

    fn connected(events: &EventLoop) -> (Pit, Receiver<bool>) {
        let (sender, receiver) = channel();
        let pit = Pit::new();
        pit.connect(Arc::new(Line(Mutex::new(sender))), events).unwrap();
        (pit, receiver)
    }

    /// Waits for a rise.
    fn rise(levels: &Receiver<bool>) {
        while !levels.recv_timeout(Duration::from_secs(60)).expect("a tick in time") {}
    }

    fn set(pit: &Pit, control: u8, count: u16) {
        pit.write(3, &[control]);
        count.to_le_bytes().iter().for_each(|byte| pit.write(0, &[*byte]));
    }

    #[test]
    fn ticks_come_in_their_time() {
        let events = EventLoop::start("test").unwrap();
        let (pit, levels) = connected(&events);
        // 10 ms each.
        let start = Instant::now();
        set(&pit, 0x34, 11932);
        (0..5).for_each(|_| rise(&levels));
        assert!(start.elapsed() >= Duration::from_millis(50));
        // Once, and none while it is paused.
        pit.pause();
        set(&pit, 0x30, 100);
        while levels.try_recv().is_ok() {}
        assert!(levels.recv_timeout(Duration::from_millis(20)).is_err());
        pit.resume();
        rise(&levels);
        assert_eq!(pit.state().tick, None);
        assert!(levels.recv_timeout(Duration::from_millis(20)).is_err());
    }

    #[test]
    fn a_tick_that_was_due_is_given_elsewhere() {
        let events = EventLoop::start("test").unwrap();
        let (pit, levels) = connected(&events);
        pit.pause();
        set(&pit, 0x30, 100);
        let state = pit.state();
        assert!(state.tick.is_some());
        drop(levels);
        let (other, levels) = connected(&events);
        other.restore(&super::super::PitState { now: u64::MAX / 2, ..state });
        rise(&levels);
        assert_eq!(other.state().tick, None);
    }

    #[test]
    fn the_fastest_guest_ticks_ten_thousand_times_a_second() {
        let events = EventLoop::start("test").unwrap();
        let (pit, _levels) = connected(&events);
        let mut inner = pit.lock();
        inner.counters[0] = counter(2, 2);
        let inner = &mut *inner;
        let ticks = inner.ticks.as_mut().unwrap();
        ticks.set(&inner.counters[0], 0);
        let first = ticks.next.unwrap();
        ticks.give(&inner.counters[0], first);
        assert!(ticks.next.unwrap() >= first + SHORTEST);
    }
}
