//! The tables of fixed form: RSDP (5.2.5), RSDT (5.2.7), XSDT (5.2.8), FADT (5.2.9), MADT (5.2.12).

use acpi_tables::Aml;
use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use mvm_devices::PowerControl;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, Platform, bytes};
use crate::layout;

/// IA-PC boot architecture flags (5.2.9.3): there is neither VGA nor a CMOS clock to probe for. The
/// bits for other legacy devices and for a keyboard controller are clear for the same reason.
const VGA_NOT_PRESENT: u16 = 1 << 2;
const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;

/// A byte-wide I/O port.
fn port(offset: u64) -> GAS {
    let address = layout::POWER_PORT + offset;
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address)
}

/// Points to the DSDT and tells how the machine is switched off and reset.
pub fn fadt(dsdt: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        // These two say that there is no such button among the fixed hardware.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .preferred_pm_profile(PmProfile::Unspecified);
    fadt.iapc_boot_arch = (VGA_NOT_PRESENT | CMOS_RTC_NOT_PRESENT).into();
    fadt.reset_reg = port(PowerControl::RESET);
    fadt.reset_value = PowerControl::RESET_VALUE;
    fadt.sleep_control_reg = port(PowerControl::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(PowerControl::SLEEP_STATUS);
    fadt.finalize()
}

/// The interrupt controllers. An interrupt's number is its pin's, but for the timer's of old PCs. If there is none there
/// is no PIC either (flag `PCAT_COMPAT` is clear).
pub fn madt(platform: Platform) -> Sdt {
    const HEADER: u32 = 36;
    const REVISION: u8 = 1;
    let mut madt = Sdt::new(*b"APIC", HEADER, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.append(layout::LOCAL_APIC as u32);
    madt.append(u32::from(platform.pic));
    for id in 0..platform.vcpus as u8 {
        madt.append_slice(&bytes(&ProcessorLocalApic::new(id, id, EnabledStatus::Enabled)));
    }
    madt.append_slice(&bytes(&IoApic::new(platform.vcpus as u8, layout::IOAPIC as u32, 0)));
    if platform.pic {
        // Interrupt source override (5.2.12.5): IRQ 0 of the ISA bus is at pin 2, as the bus has it.
        madt.append_slice(&[2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
    }
    madt
}

/// The list of tables.
pub fn xsdt(tables: &[u64]) -> XSDT {
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    tables.iter().for_each(|&table| xsdt.add_entry(table));
    xsdt
}

/// The list of tables with addresses of 32 bits. All tables are below 1 MiB.
pub fn rsdt(tables: &[u64]) -> Sdt {
    const HEADER: u32 = 36;
    let mut rsdt = Sdt::new(*b"RSDT", HEADER, 1, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    tables.iter().for_each(|&table| rsdt.append(table as u32));
    rsdt
}

/// The root pointer, to both lists.
pub fn rsdp(rsdt: u64, xsdt: u64) -> Vec<u8> {
    // The places of its fields: the first checksum is of the bytes that ACPI 1.0 had, the second of all.
    const CHECKSUM: usize = 8;
    const RSDT: usize = 16;
    const ACPI_1: usize = 20;
    const CHECKSUM_OF_ALL: usize = 32;
    let mut bytes = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut bytes);
    bytes[RSDT..RSDT + 4].copy_from_slice(&(rsdt as u32).to_le_bytes());
    for (place, len) in [(CHECKSUM, ACPI_1), (CHECKSUM_OF_ALL, bytes.len())] {
        bytes[place] = 0;
        let sum = bytes[..len].iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        bytes[place] = sum.wrapping_neg();
    }
    bytes
}
