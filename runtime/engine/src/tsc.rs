//! The host's time-stamp counter and its frequency.

use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::cpuid::host;
use crate::kept;

/// How long the frequency is measured where CPUID does not tell it.
const SPAN: Duration = Duration::from_millis(10);

/// Reads the host's time-stamp counter.
#[inline(always)]
pub fn host_tsc() -> u64 {
    // SAFETY: RDTSC has no preconditions; the process has not disabled it (PR_SET_TSC).
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// `a * b / c` without overflow in between; saturates.
pub fn mul_div(a: u64, b: u64, c: u64) -> u64 {
    u64::try_from(u128::from(a) * u128::from(b) / u128::from(c.max(1))).unwrap_or(u64::MAX)
}

/// How long `ticks` of a counter of `khz` take, in ns.
pub fn ticks_to_nanos(ticks: u64, khz: u64) -> u64 {
    mul_div(ticks, 1_000_000, khz)
}

/// Frequency of the host's time-stamp counter in kHz: from CPUID, else measured once.
pub fn host_tsc_khz() -> u64 {
    static KHZ: OnceLock<u64> = OnceLock::new();
    *KHZ.get_or_init(|| tsc_khz_from_cpuid().unwrap_or_else(|| measure_tsc_khz(SPAN)))
}

/// The frequency that CPUID tells, by leaf 0x4000_0010 of a hypervisor or leaf 0x15.
pub fn tsc_khz_from_cpuid() -> Option<u64> {
    if host::query(1, 0).ecx >> 31 != 0 && host::query(0x4000_0000, 0).eax >= 0x4000_0010 {
        let khz = host::query(0x4000_0010, 0).eax;
        if khz > 100_000 {
            return Some(khz.into());
        }
    }
    if host::query(0, 0).eax >= 0x15 {
        let leaf = host::query(0x15, 0);
        if leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0 {
            let hz = u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax);
            return Some(hz / 1000);
        }
    }
    None
}

/// Measures the frequency against the host's monotonic clock for `span`. A caller that runs many
/// machines keeps the result for the host's boot.
pub fn measure_tsc_khz(span: Duration) -> u64 {
    // A sample counts only if reading the clock was not interrupted: the narrowest of several.
    let sample = || {
        (0..8)
            .map(|_| {
                let before = host_tsc();
                let at = Instant::now();
                (host_tsc().wrapping_sub(before), before, at)
            })
            .min_by_key(|s| s.0)
            .map_or((host_tsc(), Instant::now()), |(width, before, at)| (before + width / 2, at))
    };
    let (tsc0, t0) = sample();
    std::thread::sleep(span);
    let (tsc1, t1) = sample();
    let nanos = t1.duration_since(t0).as_nanos().max(1);
    let khz = u128::from(tsc1.wrapping_sub(tsc0)) * 1_000_000 / nanos;
    u64::try_from(khz).unwrap_or(1).max(1)
}

/// A measured frequency, kept for the boot of the host. When it was measured is kept along, which
/// makes every later reading a long measurement that the frequency must agree with: a host that was
/// moved to another machine with its memory has the same boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    boot_id: String,
    khz: u64,
    tsc: u64,
    /// `CLOCK_BOOTTIME`, in ns.
    at: u64,
}

/// Frequency of the host's time-stamp counter in kHz: from CPUID, from the file `path` if that was
/// written during this boot, else measured, which takes 10 ms, and written there. A file that cannot
/// be written is no reason to fail.
pub fn kept_tsc_khz(path: &Path) -> u64 {
    if let Some(khz) = tsc_khz_from_cpuid() {
        return khz;
    }
    let (Some(boot_id), Some(at)) = (kept::boot_id(), boot_nanos()) else {
        return host_tsc_khz();
    };
    let now = Kept { boot_id, khz: 0, tsc: host_tsc(), at };
    if let Some(khz) = kept::read::<Kept>(path).and_then(|kept| kept.holds(&now)) {
        return khz;
    }
    let khz = host_tsc_khz();
    if let Err(e) = kept::replace(path, &Kept { khz, ..now }) {
        tracing::debug!("{}: {e}", path.display());
    }
    khz
}

impl Kept {
    /// The frequency, if what the counter has done until `now` agrees with it to a thousandth.
    fn holds(&self, now: &Self) -> Option<u64> {
        let nanos = now.at.checked_sub(self.at)?;
        let ticks = now.tsc.checked_sub(self.tsc)?;
        let expected = mul_div(nanos, self.khz, 1_000_000);
        // Between reading the counter and the clock a process can be held up for some time.
        let slack = (expected / 1000).max(self.khz);
        (self.boot_id == now.boot_id && ticks.abs_diff(expected) <= slack).then_some(self.khz)
    }
}

/// Nanoseconds since the boot, time in suspension included.
fn boot_nanos() -> Option<u64> {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).ok()?;
    u64::try_from(Duration::from(now).as_nanos()).ok()
}

/// Whether the host's TSC runs at a constant rate in all states (CPUID 8000_0007 EDX bit 8).
pub fn host_tsc_is_invariant() -> bool {
    host::query(0x8000_0000, 0).eax >= 0x8000_0007 && host::query(0x8000_0007, 0).edx >> 8 & 1 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(khz: u64, tsc: u64, at: u64) -> Kept {
        Kept { boot_id: "one".into(), khz, tsc, at }
    }

    #[test]
    fn a_kept_frequency_holds_while_the_counter_agrees() {
        let kept = sample(2_000_000, 1000, 5_000_000);
        let second = 1_000_000_000;
        let later = |ticks| sample(0, 1000 + ticks, 5_000_000 + second);
        assert_eq!(kept.holds(&later(2 * second)), Some(2_000_000));
        assert_eq!(kept.holds(&later(2 * second + second / 1000)), Some(2_000_000));
        assert_eq!(kept.holds(&later(2 * second + second / 100)), None, "another frequency");
        assert_eq!(kept.holds(&sample(0, 0, 5_000_000 + second)), None, "set back");
        assert_eq!(kept.holds(&sample(0, 5000, 4_000_000)), None, "from the future");
        let other_boot = Kept { boot_id: "two".into(), ..later(2 * second) };
        assert_eq!(kept.holds(&other_boot), None);
        let absurd = sample(u64::MAX, 0, 0);
        assert_eq!(absurd.holds(&sample(0, u64::MAX - 1, u64::MAX)), Some(u64::MAX), "no overflow");
    }

    #[test]
    fn the_frequency_is_measured_once_a_boot() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tsc.json");
        let khz = kept_tsc_khz(&path);
        assert_eq!(kept_tsc_khz(&path), khz);
        if tsc_khz_from_cpuid().is_some() {
            assert!(!path.exists(), "CPUID tells it");
            return;
        }
        let kept: Kept = kept::read(&path).unwrap();
        assert_eq!(kept.khz, khz);
        std::fs::write(&path, "{").unwrap();
        assert_eq!(kept_tsc_khz(&path), khz, "a damaged file is replaced");
        assert_eq!(kept::read::<Kept>(&path).unwrap().khz, khz);
        assert_eq!(kept_tsc_khz(&dir.path().join("no/such/directory")), khz);
    }
}
