//! The 8254 programmable interval timer, as far as kernels use it to measure time.
//!
//! Its three counters count down at 1.193182 MHz of the host's monotonic clock and can be latched and read in all modes.
//! Kernels for PCs measure their time-stamp counter by the timer before they do anything else, and some wait for a change
//! of its count for ever. The output of counter 0 is IRQ 0, that of counter 1 is connected nowhere. Counter 2 has its gate
//! and its output in system control port B.
//!
//! Source: Intel 8254 data sheet (order number 231164).

mod ticks;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::BusDevice;
pub use ticks::PitError;
use ticks::Ticks;

/// Counts in a second.
const HZ: u128 = 1_193_182;
const NANOS: u128 = 1_000_000_000;

/// How a counter's 16 bits are read and written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Access {
    /// The low byte alone.
    Low,
    /// The high byte alone.
    High,
    /// The low byte, then the high byte.
    #[default]
    Both,
}

/// What a guest can notice of one counter.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CounterState {
    access: Access,
    /// 0 to 5.
    mode: u8,
    /// It counts in binary-coded decimal.
    bcd: bool,
    /// What it counts down from; 0 stands for one more than 16 bits (or four digits) can say.
    reload: u16,
    /// The low byte of the next value, between two writes.
    low: Option<u8>,
    /// The second byte is read next.
    high_next: bool,
    /// A count that was latched, until it has been read.
    latched: Option<u16>,
    /// A status that was latched, until it has been read.
    status: Option<u8>,
    /// Nanoseconds of the device when it began to count.
    begun: Option<u64>,
    /// Its gate is low. Since when it stands still for that, if it does.
    gate_low: bool,
    stopped: Option<u64>,
}

/// What a guest can notice of the timer, as a snapshot has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitState {
    counters: [CounterState; 3],
    /// Nanoseconds that the device has counted.
    now: u64,
    /// The two bits of system control port B that are kept.
    control: u8,
    /// When the next interrupt is, which may be past.
    #[serde(default)]
    tick: Option<u64>,
}

impl CounterState {
    /// Whether only an edge of the gate starts it.
    fn is_triggered(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    fn period(&self) -> u128 {
        match (self.reload, self.bcd) {
            (0, true) => 10_000,
            (0, false) => 0x1_0000,
            (reload, true) => u128::from(from_bcd(reload)),
            (reload, false) => reload.into(),
        }
    }

    /// Counts since it began.
    fn elapsed(&self, now: u64) -> u128 {
        let now = self.stopped.unwrap_or(now);
        self.begun.map_or(0, |at| u128::from(now.saturating_sub(at)) * HZ / NANOS)
    }

    fn count(&self, now: u64) -> u16 {
        let (period, elapsed) = (self.period(), self.elapsed(now));
        let left = match self.mode {
            // It begins again by itself, in steps of two in mode 3.
            2 => period - elapsed % period,
            3 => period - ((elapsed * 2 % period) & !1),
            // It goes on through 0.
            _ if self.bcd => (period + 10_000 - elapsed % 10_000) % 10_000,
            _ => period.wrapping_sub(elapsed),
        };
        if self.bcd { to_bcd((left % 10_000) as u16) } else { left as u16 }
    }

    /// The level of its output.
    fn output(&self, now: u64) -> bool {
        let (period, elapsed) = (self.period(), self.elapsed(now));
        match self.mode {
            0 => self.begun.is_some() && elapsed >= period,
            1 => self.begun.is_none() || elapsed >= period,
            2 => elapsed % period != period - 1,
            3 => elapsed % period < period.div_ceil(2),
            _ => elapsed != period,
        }
    }

    fn status_now(&self, now: u64) -> u8 {
        let access = match self.access {
            Access::Low => 1,
            Access::High => 2,
            Access::Both => 3,
        };
        let (output, null) = (u8::from(self.output(now)), u8::from(self.begun.is_none()));
        output << 7 | null << 6 | access << 4 | self.mode << 1 | u8::from(self.bcd)
    }

    fn program(&mut self, command: u8) {
        let access = match command >> 4 & 3 {
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        };
        // Modes 6 and 7 are 2 and 3.
        let mode = match command >> 1 & 7 {
            mode @ 6.. => mode - 4,
            mode => mode,
        };
        let gate_low = self.gate_low;
        *self = Self { access, mode, bcd: command & 1 != 0, gate_low, ..Self::default() };
    }

    fn latch_count(&mut self, now: u64) {
        if self.latched.is_none() {
            self.latched = Some(self.count(now));
            self.high_next = false;
        }
    }

    fn latch_status(&mut self, now: u64) {
        if self.status.is_none() {
            self.status = Some(self.status_now(now));
        }
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        let [low, high] = self.latched.unwrap_or_else(|| self.count(now)).to_le_bytes();
        let (byte, last) = match self.access {
            Access::Low => (low, true),
            Access::High => (high, true),
            Access::Both if self.high_next => (high, true),
            Access::Both => (low, false),
        };
        self.high_next = !last;
        if last {
            self.latched = None;
        }
        byte
    }

    fn write(&mut self, byte: u8, now: u64) {
        self.reload = match (self.access, self.low.take()) {
            (Access::Low, _) => byte.into(),
            (Access::High, _) => u16::from(byte) << 8,
            (Access::Both, Some(low)) => u16::from_le_bytes([low, byte]),
            (Access::Both, None) => {
                self.low = Some(byte);
                return;
            }
        };
        if !self.is_triggered() {
            self.begun = Some(now);
            self.stopped = self.gate_low.then_some(now);
        }
    }

    /// Its gate changes.
    fn set_gate(&mut self, high: bool, now: u64) {
        let was_low = std::mem::replace(&mut self.gate_low, !high);
        match (was_low, high) {
            // An edge up begins anew, or lets it go on.
            (true, true) if matches!(self.mode, 1 | 2 | 3 | 5) => {
                self.begun = Some(now);
                self.stopped = None;
            }
            (true, true) => {
                if let (Some(begun), Some(stopped)) = (&mut self.begun, self.stopped.take()) {
                    *begun = begun.saturating_add(now.saturating_sub(stopped));
                }
            }
            (false, false) if !self.is_triggered() => self.stopped = Some(now),
            _ => {}
        }
    }
}

/// A digit above 9 counts for as much as it says.
fn from_bcd(value: u16) -> u16 {
    (0..4u32).fold(0, |sum, digit| sum + ((value >> (4 * digit)) & 0xf) * 10u16.pow(digit))
}

fn to_bcd(value: u16) -> u16 {
    (0..4u32).fold(0, |sum, digit| sum | (value / 10u16.pow(digit) % 10) << (4 * digit))
}

#[derive(Debug)]
struct Inner {
    /// The moment at which `before` nanoseconds had been counted.
    since: Instant,
    before: u64,
    counters: [CounterState; 3],
    control: u8,
    ticks: Option<Ticks>,
}

impl Inner {
    fn now(&self) -> u64 {
        // 584 years.
        self.before.saturating_add(self.since.elapsed().as_nanos() as u64)
    }

    /// A write, and what it means for counter 0's output.
    fn write_and_tick(&mut self, offset: u64, byte: u8, now: u64) {
        let set = |counter: &CounterState| (counter.mode, counter.begun, counter.reload);
        let before = set(&self.counters[0]);
        if let Some(ticks) = &mut self.ticks {
            ticks.give(&self.counters[0], now);
        }
        self.write(offset, byte, now);
        if let Some(ticks) = &mut self.ticks {
            if set(&self.counters[0]) != before {
                ticks.set(&self.counters[0], now);
            }
            ticks.wait(now);
        }
    }

    fn write(&mut self, offset: u64, byte: u8, now: u64) {
        const READ_BACK: usize = 3;
        if let Some(counter) = self.counters.get_mut(offset as usize) {
            counter.write(byte, now);
            return;
        }
        let selected = usize::from(byte >> 6);
        if selected == READ_BACK {
            let chosen = self.counters.iter_mut().enumerate();
            for (_, counter) in chosen.filter(|(index, _)| byte >> (index + 1) & 1 != 0) {
                // The two bits are low for what is wanted.
                if byte & 0x20 == 0 {
                    counter.latch_count(now);
                }
                if byte & 0x10 == 0 {
                    counter.latch_status(now);
                }
            }
        } else if byte & 0x30 == 0 {
            self.counters[selected].latch_count(now);
        } else {
            self.counters[selected].program(byte);
        }
    }
}

/// The timer, for ports 0x40 to 0x43.
#[derive(Clone)]
pub struct Pit(Arc<Mutex<Inner>>);

impl Pit {
    /// Its first port.
    pub const PORT: u64 = 0x40;
    /// Counters 0 to 2, and the control word.
    pub const LEN: u64 = 4;

    /// A timer whose counters have not been set.
    pub fn new() -> Self {
        let mut counters: [CounterState; 3] = Default::default();
        counters[2].gate_low = true;
        let since = Instant::now();
        Self(Arc::new(Mutex::new(Inner { since, before: 0, counters, control: 0, ticks: None })))
    }

    /// System control port B (0x61), in which the gate and the output of counter 2 are.
    pub fn system_b(&self) -> SystemB {
        SystemB { pit: self.clone(), refresh: AtomicBool::new(false) }
    }

    /// Where it stands.
    pub fn state(&self) -> PitState {
        let inner = self.lock();
        let counters = inner.counters.clone();
        // As long as none has begun, there is nothing that time could change.
        let counts = counters.iter().any(|counter| counter.begun.is_some());
        let now = if counts { inner.now() } else { 0 };
        let tick = inner.ticks.as_ref().and_then(Ticks::next);
        PitState { counters, now, control: inner.control, tick }
    }

    /// Goes on from `state`, for which no time has passed.
    pub fn restore(&self, state: &PitState) {
        let mut inner = self.lock();
        inner.since = Instant::now();
        inner.before = state.now;
        inner.counters.clone_from(&state.counters);
        inner.control = state.control;
        // What is no mode of a counter comes from no guest.
        inner.counters.iter_mut().for_each(|counter| counter.mode = counter.mode.min(5));
        if let Some(ticks) = &mut inner.ticks {
            ticks.restore(state.tick);
            ticks.wait(state.now);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Pit {
    fn default() -> Self {
        Self::new()
    }
}

impl BusDevice for Pit {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let mut inner = self.lock();
        let now = inner.now();
        // The control word cannot be read.
        if let (Some(counter), Some(byte)) =
            (inner.counters.get_mut(offset as usize), data.first_mut())
        {
            *byte = counter.read(now);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(&byte) = data.first() {
            let mut inner = self.lock();
            let now = inner.now();
            inner.write_and_tick(offset, byte, now);
        }
    }
}

impl fmt::Debug for Pit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pit").finish_non_exhaustive()
    }
}

/// System control port B, with a timer behind it.
#[derive(Debug)]
pub struct SystemB {
    pit: Pit,
    refresh: AtomicBool,
}

impl BusDevice for SystemB {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        let inner = self.pit.lock();
        let output = u8::from(inner.counters[2].output(inner.now()));
        // Bit 4 follows the refresh clock: loops that wait for it to change must end.
        let refresh = u8::from(self.refresh.fetch_xor(true, Ordering::Relaxed));
        data.fill(inner.control | refresh << 4 | output << 5);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let Some(&byte) = data.first() else { return };
        let mut inner = self.pit.lock();
        let now = inner.now();
        inner.control = byte & 0x0f;
        inner.counters[2].set_gate(byte & 1 != 0, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nanoseconds after which so many counts have passed.
    fn after(counts: u64) -> u64 {
        (u128::from(counts) * NANOS).div_ceil(HZ) as u64
    }

    fn timer() -> Inner {
        Inner {
            since: Instant::now(),
            before: 0,
            counters: Default::default(),
            control: 0,
            ticks: None,
        }
    }

    fn set(timer: &mut Inner, control: u8, value: u16) {
        timer.write(3, control, 0);
        let counter = u64::from(control >> 6);
        value.to_le_bytes().into_iter().for_each(|byte| timer.write(counter, byte, 0));
    }

    fn latched(timer: &mut Inner, counter: usize, now: u64) -> u16 {
        timer.write(3, (counter as u8) << 6, now);
        // The count stands still while it is read.
        let [low, high] = [now, now + after(500)].map(|at| timer.counters[counter].read(at));
        u16::from_le_bytes([low, high])
    }

    #[test]
    fn counts_go_down_in_their_modes() {
        for (mode, counts, want) in [
            (0, 999, 1),
            (0, 1002, 0xfffe),
            (2, 0, 1000),
            (2, 999, 1),
            (2, 1000, 1000),
            (2, 2001, 999),
            (3, 1, 998),
            (3, 499, 2),
            (3, 500, 1000),
            (4, 1001, 0xffff),
        ] {
            let mut timer = timer();
            set(&mut timer, 0x30 | mode << 1, 1000);
            assert_eq!(latched(&mut timer, 0, after(counts)), want, "mode {mode}, {counts}");
        }
        let mut most = timer();
        set(&mut most, 0x34, 0);
        assert_eq!(latched(&mut most, 0, after(1)), 0xffff);
        let mut decimal = timer();
        set(&mut decimal, 0x35, 0x1000);
        assert_eq!(latched(&mut decimal, 0, after(1)), 0x0999);
        let mut through = timer();
        set(&mut through, 0x31, 0x0005);
        assert_eq!(latched(&mut through, 0, after(6)), 0x9999);
        // A digit that there is not.
        set(&mut through, 0x35, 0xffff);
        latched(&mut through, 0, after(123_456_789));
    }

    #[test]
    fn bytes_are_read_as_they_were_asked_for() {
        let mut timer = timer();
        timer.write(3, 0x54, 0);
        timer.write(1, 0x80, 0);
        assert_eq!(timer.counters[1].read(0), 0x80, "the low byte, again and again");
        assert_eq!(timer.counters[1].read(after(1)), 0x7f);
        timer.write(3, 0xa4, 0);
        timer.write(2, 0x12, 0);
        assert_eq!(timer.counters[2].read(after(1)), 0x11, "the high byte");
        set(&mut timer, 0x34, 0x1234);
        assert_eq!([timer.counters[0].read(0), timer.counters[0].read(0)], [0x34, 0x12]);
        // Count and status of two counters by one command; the status comes first.
        timer.write(3, 0xc6, after(4));
        let counter = &mut timer.counters[0];
        assert_eq!([0; 3].map(|_| counter.read(after(9))), [0x80 | 0x34, 0x30, 0x12]);
        assert_eq!(timer.counters[1].read(after(9)), 0x80 | 0x14);
        timer.write(3, 0x30, 0);
        timer.write(3, 0xe2, 0);
        assert_eq!(timer.counters[0].read(0), 0x40 | 0x30, "no value yet");
    }

    #[test]
    fn the_second_counter_has_a_gate_and_an_output() {
        let pit = Pit::new();
        let port = pit.system_b();
        let read = || {
            let mut byte = [0];
            port.read(0, &mut byte);
            byte[0] & !0x10
        };
        port.write(0, &[0]);
        pit.write(3, &[0xb0]);
        [0xff, 0xff].iter().for_each(|byte| pit.write(2, &[*byte]));
        let stopped = pit.state();
        assert_eq!(stopped.counters[2].count(u64::MAX), 0xffff, "its gate is low");
        assert_eq!(read(), 0);
        port.write(0, &[1]);
        assert_eq!(read() & 1, 1);
        let running = pit.state();
        let begun = running.counters[2].begun.unwrap();
        assert!(!running.counters[2].output(begun + after(0xfffe)));
        assert!(running.counters[2].output(begun + after(0xffff)));
        // In another machine, it stands where it stood.
        let other = Pit::new();
        other.restore(&PitState { now: begun + after(0x1_0000), ..running });
        let port = other.system_b();
        let mut byte = [0];
        port.read(0, &mut byte);
        assert_eq!(byte[0] & 0x2f, 0x21);
    }

    #[test]
    fn one_shots_wait_for_their_gate() {
        let mut timer = timer();
        timer.counters[2].gate_low = true;
        set(&mut timer, 0xb2, 100);
        let counter = &mut timer.counters[2];
        assert!(counter.output(after(500)));
        counter.set_gate(true, after(1000));
        assert!(!counter.output(after(1001)) && counter.output(after(1100) + 1000));
        counter.set_gate(false, after(1001));
        assert!(counter.output(after(1102)), "it cannot be stopped");
    }
}
