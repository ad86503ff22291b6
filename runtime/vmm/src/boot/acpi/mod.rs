//! ACPI tables (specification 6.5): how a kernel that was not told on its command line finds
//! processors, devices, and the registers by which it switches the machine off.
//!
//! The platform is *hardware-reduced* (4.1): no SCI, no PM timer, no fixed-function registers. Kernels other than Linux
//! have PIC, PIT and RTC all the same, of which the MADT tells as usual. Everything there is stands in three tables; small kernels
//! know the list of ACPI 1.0 only.
//!
//! ```text
//! RSDP -> XSDT -> FADT -> DSDT    flags, power registers -> COM1, virtio-mmio devices, \_S5
//!      -> RSDT -> MADT            local APICs, IOAPIC
//! ```
//!
//! Docs: `docs/acpi.md`.

mod dsdt;
mod tables;

use acpi_tables::Aml;
use mvm_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::Error;
use crate::layout;

/// Who made the tables.
const OEM_ID: [u8; 6] = *b"MVM   ";
const OEM_TABLE_ID: [u8; 8] = *b"MICROVM ";
const OEM_REVISION: u32 = 1;

/// Where tables begin: more than any of their fields needs.
const ALIGNMENT: usize = 16;

/// What the tables describe.
#[derive(Debug, Clone, Copy)]
pub struct Platform {
    /// Number of vCPUs; their local APICs are numbered from 0.
    pub vcpus: u32,
    /// Number of virtio devices, at the first places of the layout.
    pub virtio_devices: u32,
    /// Whether there are the interrupt controllers and the timer of old PCs.
    pub pic: bool,
    /// Whether they tell how the machine is switched off.
    pub soft_off: bool,
}

/// Writes all tables and returns the address of the RSDP.
///
/// # Errors
/// They do not fit their place or guest memory.
pub fn write(memory: &GuestMemory, platform: Platform) -> Result<u64, Error> {
    let bytes = build(platform);
    let failed = Error::Structure { what: "ACPI tables", at: layout::ACPI_TABLES };
    if bytes.len() as u64 > layout::ACPI_TABLES_MAX {
        return Err(failed);
    }
    memory.write_slice(&bytes, GuestAddress(layout::ACPI_TABLES)).map_err(|_| failed)?;
    Ok(layout::ACPI_TABLES)
}

/// All tables as they lie in memory, the RSDP first.
fn build(platform: Platform) -> Vec<u8> {
    let mut area = Area(vec![0; acpi_tables::rsdp::Rsdp::len()]);
    let dsdt = area.put(dsdt::table(platform).as_slice());
    let fadt = area.put(&bytes(&tables::fadt(dsdt)));
    let madt = area.put(tables::madt(platform).as_slice());
    let rsdt = area.put(tables::rsdt(&[fadt, madt]).as_slice());
    let xsdt = area.put(&bytes(&tables::xsdt(&[fadt, madt])));
    let rsdp = tables::rsdp(rsdt, xsdt);
    area.0[..rsdp.len()].copy_from_slice(&rsdp);
    area.0
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// The tables' place in guest memory, filled from its start.
struct Area(Vec<u8>);

impl Area {
    /// Appends a table and returns its guest address.
    fn put(&mut self, table: &[u8]) -> u64 {
        self.0.resize(self.0.len().next_multiple_of(ALIGNMENT), 0);
        let at = layout::ACPI_TABLES + self.0.len() as u64;
        self.0.extend_from_slice(table);
        at
    }
}

#[cfg(test)]
mod tests;
