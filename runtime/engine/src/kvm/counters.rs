//! What is counted of each vCPU. Written by its thread alone, read by anybody.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter with one writer.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    /// Counts one more. Only the vCPU's own thread may.
    #[inline]
    pub fn add(&self) {
        // With one writer no locked instruction is needed.
        self.0.store(self.0.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $field:ident: $name:literal,)*) => {
        /// Why a vCPU left the guest, by kind. Each return of KVM_RUN but those for [`INTR`](super::kick::INTR) is in one of them.
        #[derive(Debug, Default)]
        pub(super) struct Exits {
            $($(#[doc = $doc])+ pub $field: Counter,)*
        }

        impl Exits {
            /// Name and value of each.
            pub fn rows(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$(($name, self.$field.get()),)*].into_iter()
            }
        }
    };
}

counters! {
    /// `in`, `ins`.
    io_in: "io-in-exits",
    /// `out`, `outs`.
    io_out: "io-out-exits",
    /// Loads from what is not RAM.
    mmio_read: "mmio-read-exits",
    /// Stores to what is not RAM.
    mmio_write: "mmio-write-exits",
    /// Ends of level-triggered interrupts, for the I/O APIC.
    eoi: "eoi-exits",
    /// HLT, which local APICs in the kernel normally deal with.
    hlt: "hlt-exits",
    /// The guest takes interrupts again.
    irq_window: "irq-window-exits",
    /// Interrupts of the old controllers; no exits.
    external: "external-interrupts",
    /// Triple faults.
    shutdown: "shutdown-exits",
    /// What KVM could not go on from, and what should never come.
    failed: "failed-exits",
    /// Asked to leave by another thread.
    kicks: "kicks",
    /// Interrupted to see whether the guest is dead, or by a signal that had nothing to say.
    looks: "looks",
}

impl Exits {
    /// What the guest itself did to leave.
    pub fn by_guest(&self) -> u64 {
        let own = [
            &self.io_in,
            &self.io_out,
            &self.mmio_read,
            &self.mmio_write,
            &self.eoi,
            &self.hlt,
            &self.irq_window,
            &self.shutdown,
            &self.failed,
        ];
        own.iter().map(|counter| counter.get()).sum()
    }
}
