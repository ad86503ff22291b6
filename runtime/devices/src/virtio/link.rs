//! From a device back to its driver.

use std::fmt::{self, Display};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::irq::InterruptLine;
use crate::limit::RateLimit;

/// Device status bits (2.1).
pub(crate) mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
    pub const ALL: u32 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | NEEDS_RESET | FAILED;
}

/// Bits of InterruptStatus (4.2.2).
mod cause {
    pub const USED: u32 = 1;
    pub const CONFIG: u32 = 2;
}

/// How a device reaches its driver: interrupts, configuration changes, and the last resort.
///
/// It also holds the registers that both sides change, so that no device ever needs the transport's
/// lock.
pub struct DriverLink {
    name: String,
    line: Arc<dyn InterruptLine>,
    status: AtomicU32,
    causes: AtomicU32,
    generation: AtomicU32,
    interrupts: AtomicU64,
    failures: AtomicU64,
    limit: RateLimit,
    gate: Mutex<()>,
}

impl DriverLink {
    /// A link over `line` for the device called `name`.
    pub fn new(name: &str, line: Arc<dyn InterruptLine>) -> Arc<Self> {
        Arc::new(Self {
            name: name.into(),
            line,
            status: AtomicU32::new(0),
            causes: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            interrupts: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            limit: RateLimit::new(1, Duration::from_secs(10)),
            gate: Mutex::new(()),
        })
    }

    /// Buffers were used: interrupts the driver. Whether it wants that is for
    /// [`VirtQueue::needs_interrupt`](super::VirtQueue::needs_interrupt) to say.
    pub fn used(&self) {
        self.raise(cause::USED);
    }

    /// The configuration space has changed (2.5): tells the driver if it is there already.
    pub fn config_changed(&self) {
        // Not while a reset is under way: the next driver must not find this one's interrupt.
        let _gate = self.gate();
        self.generation.fetch_add(1, Ordering::AcqRel);
        if self.status() & status::DRIVER_OK != 0 {
            self.raise(cause::CONFIG);
        }
    }

    /// The driver has broken a rule: the device stops until it is reset (2.1.2). The first failure
    /// after a reset is logged, within a rate limit.
    pub fn fail(&self, what: &dyn Display) {
        let before = self.status.fetch_or(status::NEEDS_RESET, Ordering::AcqRel);
        self.failures.fetch_add(1, Ordering::Relaxed);
        if before & status::NEEDS_RESET != 0 {
            return;
        }
        if let Some(held_back) = self.limit.admit() {
            tracing::warn!(device = %self.name, held_back, "stopped until the guest resets it: {what}");
        }
        if before & status::DRIVER_OK != 0 {
            self.raise(cause::CONFIG);
        }
    }

    /// True once [`DriverLink::fail`] was called, until the reset.
    pub fn needs_reset(&self) -> bool {
        self.status() & status::NEEDS_RESET != 0
    }

    /// Interrupts raised so far.
    pub fn interrupts(&self) -> u64 {
        self.interrupts.load(Ordering::Relaxed)
    }

    /// Times the driver broke a rule.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    fn raise(&self, cause: u32) {
        self.causes.fetch_or(cause, Ordering::AcqRel);
        self.interrupts.fetch_add(1, Ordering::Relaxed);
        self.line.trigger();
    }

    pub(super) fn raise_config(&self) {
        self.raise(cause::CONFIG);
    }

    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    pub(super) fn add_status(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::AcqRel);
    }

    pub(super) fn causes(&self) -> u32 {
        self.causes.load(Ordering::Acquire)
    }

    pub(super) fn acknowledge(&self, causes: u32) {
        self.causes.fetch_and(!causes, Ordering::AcqRel);
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    fn gate(&self) -> MutexGuard<'_, ()> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn reset(&self) {
        let _gate = self.gate();
        self.status.store(0, Ordering::Release);
        self.causes.store(0, Ordering::Release);
    }

    pub(super) fn restore(&self, status: u32, causes: u32, generation: u32) {
        self.status.store(status & status::ALL, Ordering::Release);
        self.causes.store(causes & (cause::USED | cause::CONFIG), Ordering::Release);
        self.generation.store(generation, Ordering::Release);
    }
}

impl fmt::Debug for DriverLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DriverLink")
            .field("name", &self.name)
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}
