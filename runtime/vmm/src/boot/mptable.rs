//! The Intel MultiProcessor table (specification 1.4): how a guest without ACPI finds its
//! processors, its IOAPIC and which interrupt is on which pin.
//!
//! All 24 pins are described as ISA interrupts of the same number: edge-triggered, active high,
//! which is what the serial port and the virtio devices do. The timer of old PCs, if there is one, is IRQ 0 at pin 2.

use mvm_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::Error;
use crate::layout;

/// Specification revision 1.4.
const SPEC_REVISION: u8 = 4;
/// Version of the local APICs: integrated, xAPIC or x2APIC.
const LOCAL_APIC_VERSION: u8 = 0x14;
/// Version of the IOAPIC.
const IOAPIC_VERSION: u8 = 0x20;
/// Processor signature (family 6) and features (FPU, APIC); kernels ask CPUID instead.
const CPU_SIGNATURE: u32 = 0x600;
const CPU_FEATURES: u32 = 0x201;

/// Entry types (4.3).
mod entry {
    pub const PROCESSOR: u8 = 0;
    pub const BUS: u8 = 1;
    pub const IOAPIC: u8 = 2;
    pub const IO_INTERRUPT: u8 = 3;
    pub const LOCAL_INTERRUPT: u8 = 4;
}

/// Interrupt types (4.3.4).
mod interrupt {
    pub const INT: u8 = 0;
    pub const NMI: u8 = 1;
    pub const EXT_INT: u8 = 3;
}

const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;
const ALL_LOCAL_APICS: u8 = 0xff;
const ISA_BUS: u8 = 0;

/// Writes floating pointer and configuration table for `vcpus` processors. `pic` says whether there are the interrupt
/// controllers and the timer of old PCs.
///
/// # Errors
/// The table does not fit its place or guest memory.
pub fn write(memory: &GuestMemory, vcpus: u32, pic: bool) -> Result<(), Error> {
    let bytes = build(vcpus, pic);
    if bytes.len() as u64 > layout::MP_TABLE_MAX {
        return Err(Error::Structure { what: "MP table", at: layout::MP_TABLE });
    }
    memory
        .write_slice(&bytes, GuestAddress(layout::MP_TABLE))
        .map_err(|_| Error::Structure { what: "MP table", at: layout::MP_TABLE })
}

/// Floating pointer structure (4.1) and, right after it, the configuration table.
fn build(vcpus: u32, pic: bool) -> Vec<u8> {
    let mut pointer = Vec::with_capacity(16);
    pointer.extend_from_slice(b"_MP_");
    let table_at = layout::MP_TABLE as u32 + 16;
    pointer.extend_from_slice(&table_at.to_le_bytes());
    // Length in 16-byte units, revision, checksum, no default configuration, no IMCR.
    pointer.extend_from_slice(&[1, SPEC_REVISION, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    pointer.extend(table(vcpus, pic));
    pointer
}

/// The configuration table: header (4.2) and entries.
fn table(vcpus: u32, pic: bool) -> Vec<u8> {
    // Local and I/O APICs share one space of ids, in a byte each.
    let ioapic_id = vcpus as u8;
    let mut entries = Vec::new();
    let mut count = 0u16;
    let mut push = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..vcpus {
        let flags = ENABLED | if id == 0 { BOOT_PROCESSOR } else { 0 };
        let mut cpu = vec![entry::PROCESSOR, id as u8, LOCAL_APIC_VERSION, flags];
        cpu.extend_from_slice(&CPU_SIGNATURE.to_le_bytes());
        cpu.extend_from_slice(&CPU_FEATURES.to_le_bytes());
        cpu.extend_from_slice(&[0; 8]);
        push(&cpu);
    }
    let mut bus = vec![entry::BUS, ISA_BUS];
    bus.extend_from_slice(b"ISA   ");
    push(&bus);
    let mut ioapic = vec![entry::IOAPIC, ioapic_id, IOAPIC_VERSION, ENABLED];
    ioapic.extend_from_slice(&(layout::IOAPIC as u32).to_le_bytes());
    push(&ioapic);
    for pin in 0..layout::IOAPIC_PINS as u8 {
        // Nothing else is at pin 0, and IRQ 2 is the second controller's.
        let irq = match pin {
            0 if pic => continue,
            2 if pic => 0,
            pin => pin,
        };
        // Flags 0: polarity and trigger mode are those of the bus, high and edge for ISA.
        push(&[entry::IO_INTERRUPT, interrupt::INT, 0, 0, ISA_BUS, irq, ioapic_id, pin]);
    }
    push(&[entry::LOCAL_INTERRUPT, interrupt::EXT_INT, 0, 0, ISA_BUS, 0, 0, 0]);
    push(&[entry::LOCAL_INTERRUPT, interrupt::NMI, 0, 0, ISA_BUS, 0, ALL_LOCAL_APICS, 1]);

    const HEADER: u16 = 44;
    let mut table = Vec::with_capacity(usize::from(HEADER) + entries.len());
    table.extend_from_slice(b"PCMP");
    table.extend_from_slice(&(HEADER + entries.len() as u16).to_le_bytes());
    table.extend_from_slice(&[SPEC_REVISION, 0]);
    table.extend_from_slice(b"MVM     ");
    table.extend_from_slice(b"MICROVM     ");
    table.extend_from_slice(&[0; 6]); // no OEM table
    table.extend_from_slice(&count.to_le_bytes());
    table.extend_from_slice(&(layout::LOCAL_APIC as u32).to_le_bytes());
    table.extend_from_slice(&[0; 4]); // no extended table
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);
    table
}

/// What makes the bytes add up to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, b| sum.wrapping_sub(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks a table as a kernel does: entry types and sizes of 4.3.
    fn entries(table: &[u8]) -> Vec<&[u8]> {
        let mut rest = &table[44..];
        let mut found = Vec::new();
        while !rest.is_empty() {
            let (entry, tail) = rest.split_at(if rest[0] == 0 { 20 } else { 8 });
            found.push(entry);
            rest = tail;
        }
        found
    }

    #[test]
    fn a_kernel_finds_pointer_and_table() {
        let bytes = build(3, false);
        let (pointer, table) = bytes.split_at(16);
        assert_eq!(&pointer[..4], b"_MP_");
        assert_eq!(pointer.iter().fold(0u8, |a, b| a.wrapping_add(*b)), 0);
        let at = u32::from_le_bytes(pointer[4..8].try_into().unwrap());
        assert_eq!(u64::from(at), layout::MP_TABLE + 16);
        assert_eq!(&table[..4], b"PCMP");
        assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
        assert_eq!(table.iter().fold(0u8, |a, b| a.wrapping_add(*b)), 0);
        let count = usize::from(u16::from_le_bytes([table[34], table[35]]));
        assert_eq!(entries(table).len(), count);
        assert_eq!(u32::from_le_bytes(table[36..40].try_into().unwrap()), 0xfee0_0000);
    }

    #[test]
    fn processors_and_pins_are_all_there() {
        let old = table(1, true);
        let pins: Vec<_> = entries(&old)
            .into_iter()
            .filter(|e| e[0] == entry::IO_INTERRUPT)
            .map(|p| (p[5], p[7]))
            .collect();
        assert_eq!((pins.len(), pins[0], pins[1], pins[2]), (23, (1, 1), (0, 2), (3, 3)));
        let table = table(layout::MAX_VCPUS, false);
        let all = entries(&table);
        let cpus: Vec<_> = all.iter().filter(|e| e[0] == entry::PROCESSOR).collect();
        assert_eq!(cpus.len(), layout::MAX_VCPUS as usize);
        assert_eq!((cpus[0][3], cpus[1][3]), (ENABLED | BOOT_PROCESSOR, ENABLED));
        let pins: Vec<_> = all.iter().filter(|e| e[0] == entry::IO_INTERRUPT).collect();
        assert_eq!(pins.len(), 24);
        assert!(pins.iter().all(|p| p[5] == p[7] && p[6] == layout::MAX_VCPUS as u8));
        assert!(build(layout::MAX_VCPUS, false).len() as u64 <= layout::MP_TABLE_MAX);
    }
}
