//! The host's time-stamp counter and its frequency.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::cpuid::host;

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
    *KHZ.get_or_init(|| {
        tsc_khz_from_cpuid().unwrap_or_else(|| measure_tsc_khz(Duration::from_millis(10)))
    })
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

/// Whether the host's TSC runs at a constant rate in all states (CPUID 8000_0007 EDX bit 8).
pub fn host_tsc_is_invariant() -> bool {
    host::query(0x8000_0000, 0).eax >= 0x8000_0007 && host::query(0x8000_0007, 0).edx >> 8 & 1 != 0
}
