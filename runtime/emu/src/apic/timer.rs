//! The APIC timer (SDM vol. 3, 11.5.4).
//!
//! It counts host TSC ticks: nothing runs while it is armed. A running vCPU compares now and then
//! (`Cpu::poll_timer`), a halted one sleeps until the deadline.

use crate::sys::clock::Clock;

/// Frequency of the timer's input clock: 1 GHz, so that a count is a nanosecond.
pub const BUS_NANOS_PER_TICK: u64 = 1;

/// A deadline that never comes.
pub const NEVER: u64 = u64::MAX;

/// What the timer does when it expires (LVT timer register, bits 17 and 18).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimerMode {
    /// Once.
    OneShot,
    /// Again and again.
    Periodic,
    /// When the TSC reaches IA32_TSC_DEADLINE.
    TscDeadline,
}

impl TimerMode {
    /// From the LVT register.
    pub fn from_lvt(lvt: u32) -> Self {
        match lvt >> 17 & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            _ => Self::TscDeadline,
        }
    }
}

/// The timer's registers and its next deadline.
#[derive(Debug, Clone)]
pub struct Timer {
    /// Initial count.
    pub initial: u32,
    /// Divide configuration register.
    pub divide: u32,
    /// IA32_TSC_DEADLINE in guest TSC, 0 if not armed.
    pub tsc_deadline: u64,
    /// Host TSC at which it expires, or [`NEVER`].
    pub deadline: u64,
}

impl Default for Timer {
    fn default() -> Self {
        Self { initial: 0, divide: 0, tsc_deadline: 0, deadline: NEVER }
    }
}

impl Timer {
    /// Input clocks per count: 1 to 128.
    fn divisor(&self) -> u64 {
        let code = self.divide & 3 | self.divide >> 1 & 4;
        if code == 7 { 1 } else { 2 << code }
    }

    fn period(&self, clock: &Clock) -> u64 {
        clock.ticks(u64::from(self.initial) * self.divisor() * BUS_NANOS_PER_TICK).max(1)
    }

    /// Starts counting down from `count` (0 stops).
    pub fn start(&mut self, count: u32, now: u64, clock: &Clock) {
        self.initial = count;
        self.deadline = if count == 0 { NEVER } else { now.saturating_add(self.period(clock)) };
    }

    /// Counts left.
    pub fn current(&self, now: u64, clock: &Clock) -> u32 {
        if self.deadline == NEVER || self.initial == 0 {
            return 0;
        }
        let left = clock.duration(self.deadline.saturating_sub(now)).as_nanos() as u64;
        let count = left / (self.divisor() * BUS_NANOS_PER_TICK);
        u32::try_from(count).unwrap_or(u32::MAX).min(self.initial)
    }

    /// Arms the deadline at guest TSC `value` (0 disarms); `offset` is guest minus host TSC, `now` the host's.
    pub fn set_tsc_deadline(&mut self, value: u64, offset: u64, now: u64) {
        self.tsc_deadline = value;
        // Both counters may wrap, so the distance counts: the highest values are far ahead, not past.
        let guest_now = now.wrapping_add(offset);
        self.deadline = match value {
            0 => NEVER,
            _ if value <= guest_now => 0,
            _ => now.saturating_add(value - guest_now).min(NEVER - 1),
        };
    }

    /// Has it expired at `now`? If so, it is armed anew or stopped, as the mode asks.
    pub fn expire(&mut self, mode: TimerMode, now: u64, clock: &Clock) -> bool {
        if now < self.deadline {
            return false;
        }
        self.deadline = match mode {
            TimerMode::Periodic => {
                // Missed periods are not made up for: one request is all the IRR can hold.
                let period = self.period(clock);
                let missed = (now - self.deadline) / period;
                self.deadline.saturating_add((missed + 1).saturating_mul(period))
            }
            TimerMode::OneShot | TimerMode::TscDeadline => NEVER,
        };
        self.tsc_deadline = 0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divide_configuration() {
        let divisors: Vec<u64> = [0b0000, 0b0001, 0b0010, 0b0011, 0b1000, 0b1001, 0b1010, 0b1011]
            .map(|divide| Timer { divide, ..Timer::default() }.divisor())
            .into();
        assert_eq!(divisors, [2, 4, 8, 16, 32, 64, 128, 1]);
    }

    #[test]
    fn one_shot_counts_down_and_stops() {
        let clock = Clock::new(2_000_000);
        let mut timer = Timer { divide: 0b1011, ..Timer::default() };
        timer.start(1000, 5000, &clock);
        assert_eq!(timer.deadline, 7000);
        assert_eq!(timer.current(6000, &clock), 500);
        assert!(!timer.expire(TimerMode::OneShot, 6999, &clock));
        assert!(timer.expire(TimerMode::OneShot, 7000, &clock));
        assert_eq!((timer.deadline, timer.current(7000, &clock)), (NEVER, 0));
    }

    #[test]
    fn periodic_skips_what_was_missed() {
        let clock = Clock::new(1_000_000);
        let mut timer = Timer { divide: 0b1011, ..Timer::default() };
        timer.start(100, 0, &clock);
        assert!(timer.expire(TimerMode::Periodic, 350, &clock));
        assert_eq!(timer.deadline, 400);
    }

    #[test]
    fn tsc_deadline_in_guest_time() {
        let clock = Clock::new(1_000_000);
        let mut timer = Timer::default();
        let offset = 0u64.wrapping_sub(1000);
        timer.set_tsc_deadline(500, offset, 1000);
        assert_eq!(timer.deadline, 1500);
        assert!(timer.expire(TimerMode::TscDeadline, 1500, &clock));
        assert_eq!(timer.tsc_deadline, 0);
        timer.set_tsc_deadline(5, 1000, 1000);
        assert_eq!(timer.deadline, 0, "in the past");
        // What systems write for "never", with a guest TSC behind and ahead of the host's.
        for offset in [offset, 1000, 1 << 63] {
            timer.set_tsc_deadline(u64::MAX, offset, 5000);
            assert!(timer.deadline > 1 << 62 && timer.deadline != NEVER, "{:#x}", timer.deadline);
        }
    }
}
