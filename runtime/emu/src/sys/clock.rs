//! Time: the clock derived from the host's time-stamp counter.

use std::sync::{PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub use mvm_engine::tsc::{host_tsc, host_tsc_is_invariant, host_tsc_khz};
use mvm_engine::tsc::{mul_div, ticks_to_nanos};

/// Nanoseconds per second.
pub const NANOS: u64 = 1_000_000_000;

/// The factors that turn TSC ticks into nanoseconds the way kvmclock does:
/// `((ticks << shift) * mul) >> 32`, a negative shift being one to the right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scale {
    /// 32.32 fixed point factor.
    pub mul: u32,
    /// Shift before the multiplication.
    pub shift: i8,
}

impl Scale {
    /// The scale for a counter of `khz`.
    pub fn for_khz(khz: u64) -> Self {
        let target = NANOS;
        let mut base = khz.max(1).saturating_mul(1000);
        let mut scaled = target;
        let mut shift = 0i8;
        while base > target * 2 || base >> 32 != 0 {
            base >>= 1;
            shift -= 1;
        }
        while base <= target {
            // The factor must stay below one, and its dividend in 32 bits of headroom.
            if scaled >> 32 != 0 {
                scaled >>= 1;
            } else {
                base <<= 1;
            }
            shift += 1;
        }
        let mul = (u128::from(scaled) << 32) / u128::from(base);
        Self { mul: u32::try_from(mul).unwrap_or(u32::MAX), shift }
    }

    /// Nanoseconds of `ticks`, exactly as the guest computes them.
    pub fn nanos(self, ticks: u64) -> u64 {
        let shifted = if self.shift < 0 {
            ticks >> u32::from(self.shift.unsigned_abs()).min(63)
        } else {
            ticks << u32::from(self.shift.unsigned_abs()).min(63)
        };
        ((u128::from(shifted) * u128::from(self.mul)) >> 32) as u64
    }
}

/// The clock of a machine: one line through (TSC, nanoseconds), the same for all its vCPUs.
#[derive(Debug)]
pub struct Clock {
    khz: u64,
    scale: Scale,
    invariant: bool,
    origin: RwLock<Origin>,
}

/// A point of the clock's line: at host TSC `tsc` the machine had run `nanos`.
#[derive(Debug, Clone, Copy)]
pub struct Origin {
    /// Host TSC.
    pub tsc: u64,
    /// System time in ns.
    pub nanos: u64,
}

impl Clock {
    /// A clock that starts now, for a TSC of `khz`.
    pub fn new(khz: u64) -> Self {
        Self {
            khz,
            scale: Scale::for_khz(khz),
            invariant: host_tsc_is_invariant(),
            origin: RwLock::new(Origin { tsc: host_tsc(), nanos: 0 }),
        }
    }

    /// Frequency of the TSC in kHz.
    pub fn khz(&self) -> u64 {
        self.khz
    }

    /// Factors for the guest.
    pub fn scale(&self) -> Scale {
        self.scale
    }

    /// Does the TSC never change its rate?
    pub fn invariant(&self) -> bool {
        self.invariant
    }

    /// The point that the line goes through.
    pub fn origin(&self) -> Origin {
        *self.origin.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// System time now in ns.
    pub fn nanos(&self) -> u64 {
        self.nanos_at(host_tsc())
    }

    /// System time at host TSC `tsc`, which is not before the origin, in ns.
    pub fn nanos_at(&self, tsc: u64) -> u64 {
        let origin = self.origin();
        origin.nanos.wrapping_add(self.scale.nanos(tsc.saturating_sub(origin.tsc)))
    }

    /// Makes the clock's line go through `origin` (a state is restored).
    pub fn set_origin(&self, origin: Origin) {
        *self.origin.write().unwrap_or_else(PoisonError::into_inner) = origin;
    }

    /// Wall clock at system time zero, in (seconds, ns) since 1970.
    pub fn boot_wall_clock(&self) -> (u32, u32) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let boot = now.saturating_sub(Duration::from_nanos(self.nanos()));
        // The ABI has 32 bits of seconds: they wrap in 2106.
        (boot.as_secs() as u32, boot.subsec_nanos())
    }

    /// Ticks of the TSC in `nanos`.
    pub fn ticks(&self, nanos: u64) -> u64 {
        mul_div(nanos, self.khz, 1_000_000)
    }

    /// How long `ticks` of the TSC take.
    pub fn duration(&self, ticks: u64) -> Duration {
        Duration::from_nanos(ticks_to_nanos(ticks, self.khz))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn the_scale_is_right_to_a_part_in_a_billion() {
        for khz in
            [800_000, 999_999, 1_000_000, 1_999_999, 2_000_000, 2_445_406, 3_700_000, 5_100_000]
        {
            let scale = Scale::for_khz(khz);
            let nanos = scale.nanos(khz * 1000);
            assert!(nanos.abs_diff(NANOS) <= 2, "{khz} kHz: {nanos} {scale:?}");
            // A year must not overflow.
            let year = 365 * 86_400;
            let nanos = scale.nanos(khz * 1000 * year);
            assert!(nanos.abs_diff(NANOS * year) <= 2 * year, "{khz} kHz: {nanos}");
        }
    }

    #[test]
    fn the_clock_runs_with_the_hosts() {
        let clock = Clock::new(host_tsc_khz());
        // Each look at ours lies between two at theirs, however long this thread loses its processor in between.
        let look = || (Instant::now(), clock.nanos(), Instant::now());
        let first = look();
        std::thread::sleep(Duration::from_millis(30));
        let second = look();
        let ours = second.1 - first.1;
        let least = second.0.duration_since(first.2).as_nanos() as u64;
        let most = second.2.duration_since(first.0).as_nanos() as u64;
        assert!(ours >= least - least / 10, "{ours} against {least}");
        assert!(ours <= most + most / 10, "{ours} against {most}");
    }

    #[test]
    fn restored_time_goes_on() {
        let clock = Clock::new(2_000_000);
        clock.set_origin(Origin { tsc: host_tsc(), nanos: 5 * NANOS });
        assert!(clock.nanos() >= 5 * NANOS && clock.nanos() < 600 * NANOS);
    }
}
