//! Where port and MMIO accesses of the guest go.

use std::fmt;

/// The device side of a machine, as the engines see it.
///
/// Called on vCPU threads, concurrently. Sizes are 1, 2, 4 or 8 bytes (8 for MMIO only); an
/// address nobody claims reads as all ones and swallows writes.
pub trait IoBus: Send + Sync + fmt::Debug {
    /// `in` from `port`.
    fn pio_read(&self, port: u16, data: &mut [u8]);
    /// `out` to `port`.
    fn pio_write(&self, port: u16, data: &[u8]);
    /// A load from guest physical address `gpa`, which is not RAM.
    fn mmio_read(&self, gpa: u64, data: &mut [u8]);
    /// A store to guest physical address `gpa`, which is not RAM.
    fn mmio_write(&self, gpa: u64, data: &[u8]);
    /// A local APIC ended the level-triggered interrupt `vector` (the EOI broadcast of SDM vol. 3,
    /// 11.8.5): the IOAPIC may raise it again.
    fn eoi(&self, vector: u8);
    /// The processor takes the interrupt that INTR asks for ([`Vm::set_intr`](crate::Vm::set_intr)): the vector with which the
    /// old interrupt controllers answer (SDM vol. 3, 7.3.1). None if there are none.
    fn acknowledge(&self) -> Option<u8> {
        None
    }
}
