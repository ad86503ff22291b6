//! The clock chip of a PC (MC146818), as far as kernels read the time of day from it.
//!
//! It shows the host's time in UTC. It cannot be set, has no alarm and no interrupt, and its other bytes are zero.
//!
//! Source: Motorola MC146818A data sheet; the century's byte is where ACPI-free PCs have it.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::BusDevice;

/// Registers.
mod register {
    pub const SECONDS: u8 = 0x00;
    pub const MINUTES: u8 = 0x02;
    pub const HOURS: u8 = 0x04;
    pub const WEEKDAY: u8 = 0x06;
    pub const DAY: u8 = 0x07;
    pub const MONTH: u8 = 0x08;
    pub const YEAR: u8 = 0x09;
    pub const A: u8 = 0x0a;
    pub const B: u8 = 0x0b;
    pub const D: u8 = 0x0d;
    pub const CENTURY: u8 = 0x32;
}

/// Register A: a 32 kHz crystal, 1024 Hz; an update is under way.
const A_USUAL: u8 = 0x26;
const A_UPDATING: u8 = 0x80;
/// Register B: the bits that change how the time is shown.
const B_24_HOURS: u8 = 0x02;
const B_BINARY: u8 = 0x04;
/// Register D: the battery is good.
const D_VALID: u8 = 0x80;
const PM: u8 = 0x80;

/// An update takes 1984 us, and is announced 244 us before.
const UPDATE: u32 = 2_228_000;

/// What a guest can notice of the chip besides the time, as a snapshot has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    index: u8,
    b: u8,
}

/// The chip, for ports 0x70 and 0x71.
#[derive(Debug)]
pub struct Rtc {
    index: AtomicU8,
    b: AtomicU8,
}

impl Rtc {
    /// Its first port.
    pub const PORT: u64 = 0x70;
    /// Number of a register, and its content.
    pub const LEN: u64 = 2;

    /// A chip that shows 24 hours and decimal digits.
    pub fn new() -> Self {
        Self { index: AtomicU8::new(0), b: AtomicU8::new(B_24_HOURS) }
    }

    /// Its registers.
    pub fn state(&self) -> RtcState {
        RtcState { index: self.index.load(Ordering::Relaxed), b: self.b.load(Ordering::Relaxed) }
    }

    /// Goes on from `state`.
    pub fn restore(&self, state: &RtcState) {
        self.index.store(state.index & 0x7f, Ordering::Relaxed);
        self.b.store(state.b & (B_24_HOURS | B_BINARY), Ordering::Relaxed);
    }

    /// What is in the selected register `since` 1970.
    fn register(&self, since: Duration) -> u8 {
        let RtcState { index, b } = self.state();
        let seconds = since.as_secs();
        let (year, month, day) = date(seconds / 86_400);
        let digits = |value: u64| match b & B_BINARY {
            0 => ((value / 10) << 4 | (value % 10)) as u8,
            _ => value as u8,
        };
        match index {
            register::SECONDS => digits(seconds % 60),
            register::MINUTES => digits(seconds / 60 % 60),
            register::HOURS => match (seconds / 3600 % 24, b & B_24_HOURS) {
                (hours, 0) => digits((hours + 11) % 12 + 1) | if hours >= 12 { PM } else { 0 },
                (hours, _) => digits(hours),
            },
            // The first was a Thursday, and Sunday is 1.
            register::WEEKDAY => digits((seconds / 86_400 + 4) % 7 + 1),
            register::DAY => digits(day),
            register::MONTH => digits(month),
            register::YEAR => digits(year % 100),
            register::CENTURY => digits(year / 100),
            register::A if since.subsec_nanos() >= 1_000_000_000 - UPDATE => A_USUAL | A_UPDATING,
            register::A => A_USUAL,
            register::B => b,
            register::D => D_VALID,
            _ => 0,
        }
    }
}

impl Default for Rtc {
    fn default() -> Self {
        Self::new()
    }
}

/// Year, month and day, so many days after 1 January 1970.
fn date(days: u64) -> (u64, u64, u64) {
    let every = |year: u64, years| year.is_multiple_of(years);
    let is_leap = |year| every(year, 4) && (!every(year, 100) || every(year, 400));
    // 400 years always have the same number of days.
    let (mut year, mut day) = (1970 + days / 146_097 * 400, days % 146_097);
    loop {
        let len = 365 + u64::from(is_leap(year));
        if day < len {
            break;
        }
        day -= len;
        year += 1;
    }
    let february = 28 + u64::from(is_leap(year));
    let mut month = 1;
    for len in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if day < len {
            break;
        }
        day -= len;
        month += 1;
    }
    (year, month, day + 1)
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        // The number cannot be read.
        if let (1, Some(byte)) = (offset, data.first_mut()) {
            let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            *byte = self.register(since.unwrap_or_default());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&byte) = data.first() else { return };
        match offset {
            // Bit 7 switches non-maskable interrupts off, of which there are none.
            0 => self.index.store(byte & 0x7f, Ordering::Relaxed),
            _ if self.index.load(Ordering::Relaxed) == register::B => {
                self.b.store(byte & (B_24_HOURS | B_BINARY), Ordering::Relaxed);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(rtc: &Rtc, index: u8, seconds: u64) -> u8 {
        rtc.write(0, &[index | 0x80]);
        rtc.register(Duration::from_secs(seconds))
    }

    #[test]
    fn time_is_shown_as_it_is_asked_for() {
        // 29 February 2024, 23:59:58, a Thursday.
        let at = 1_709_251_198;
        let rtc = Rtc::new();
        let all = |rtc: &Rtc| [0, 2, 4, 6, 7, 8, 9, 0x32].map(|index| shown(rtc, index, at));
        assert_eq!(all(&rtc), [0x58, 0x59, 0x23, 5, 0x29, 2, 0x24, 0x20]);
        rtc.write(0, &[register::B]);
        rtc.write(1, &[!B_24_HOURS]);
        assert_eq!(all(&rtc), [58, 59, 11 | PM, 5, 29, 2, 24, 20]);
        assert_eq!(shown(&rtc, register::B, at), B_BINARY);
        assert_eq!(shown(&rtc, register::HOURS, 0), 12, "midnight");
        let other = Rtc::new();
        other.restore(&rtc.state());
        assert_eq!(all(&other), all(&rtc));
    }

    #[test]
    fn days_have_their_dates() {
        for (days, want) in [
            (0, (1970, 1, 1)),
            (58, (1970, 2, 28)),
            (59, (1970, 3, 1)),
            (11_016, (2000, 2, 29)),
            (47_540, (2100, 2, 28)),
            (47_541, (2100, 3, 1)),
            (146_097, (2370, 1, 1)),
        ] {
            assert_eq!(date(days), want);
        }
    }

    #[test]
    fn updates_are_announced() {
        let rtc = Rtc::new();
        rtc.write(0, &[register::A]);
        assert_eq!(rtc.register(Duration::new(5, 990_000_000)), A_USUAL);
        assert_eq!(rtc.register(Duration::new(5, 998_000_000)), A_USUAL | A_UPDATING);
        rtc.write(0, &[register::D]);
        let mut byte = [0];
        rtc.read(1, &mut byte);
        assert_eq!(byte[0], D_VALID);
        rtc.read(0, &mut byte);
        assert_eq!(byte[0], 0xff);
    }
}
