//! The guest-physical address map: every address that the machine decides, in one place.
//!
//! ```text
//! 0                  low RAM: boot structures in the first 640 KiB, then kernel, ..., initramfs
//! 0xc000_0000        end of low RAM (3 GiB)
//! 0xd000_0000        virtio-mmio register windows
//! 0xfec0_0000        IOAPIC
//! 0xfee0_0000        local APICs
//! 0x1_0000_0000      RAM that did not fit below 3 GiB
//! after all RAM,     memory by which the machine can grow, of which nothing is there at first and no kernel is told:
//! above 4 GiB,       a device of its own tells the guest where it is (virtio-mem)
//! in whole 2 GiB
//! ```

use std::ops::Range;

/// Most vCPUs: what the guest kernel is built for.
pub const MAX_VCPUS: u32 = 32;

/// Least guest RAM in bytes: the boot structures and a kernel at 1 MiB need more than this in any
/// case; the loader says how much exactly.
pub const MIN_MEMORY: u64 = 4 << 20;

/// Most guest RAM in bytes: what an address width of 40 bits leaves.
pub const MAX_MEMORY: u64 = 512 << 30;

/// What the region by which a machine can grow begins at a multiple of: no Linux takes memory in larger pieces.
pub const GROWTH_ALIGN: u64 = 2 << 30;

/// Global descriptor table for the entry into the kernel (Linux x86 boot protocol, "64-bit boot
/// protocol": `__BOOT_CS` 0x10, `__BOOT_DS` 0x18).
pub const GDT: u64 = 0x500;

/// What a PVH or multiboot kernel is told.
pub const BOOT_INFO: u64 = 0x6000;

/// Room for it in bytes.
pub const BOOT_INFO_MAX: usize = 0x1000;

/// Linux `struct boot_params`, the "zero page".
pub const ZERO_PAGE: u64 = 0x7000;

/// Top of the stack given to the kernel's entry code.
pub const BOOT_STACK: u64 = 0x8ff0;

/// Page-map level 4 of the identity map; the tables below follow it page by page.
pub const PAGE_TABLES: u64 = 0x9000;

/// GiB covered by the identity map.
pub const IDENTITY_MAP_GIB: u64 = 4;

/// First address that is mapped in a Solo5 guest; from here to [`HIGH_RAM_START`] it can only read.
pub const SOLO5_VISIBLE: u64 = 0x1_0000;

/// The page table of a Solo5 guest's first 2 MiB, after those of [`PAGE_TABLES`].
pub const SOLO5_FIRST_TABLE: u64 = PAGE_TABLES + (2 + IDENTITY_MAP_GIB) * 0x1000;

/// Room for further ones. Nothing else of such a guest lies there.
pub const SOLO5_TABLES: Range<u64> = 0x1000..PAGE_TABLES;

/// What a Solo5 guest is told, its manifest included.
pub const SOLO5_BOOT_INFO: u64 = SOLO5_VISIBLE;

/// Room for it in bytes.
pub const SOLO5_BOOT_INFO_MAX: usize = 0x4000;

/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;

/// Room for the command line with its final NUL in bytes (Solo5 takes 8192).
pub const CMDLINE_MAX: usize = 8192;

/// Longest command line for Linux with its final NUL in bytes (`COMMAND_LINE_SIZE` on x86).
pub const LINUX_CMDLINE_MAX: usize = 2048;

/// End of conventional memory.
pub const LOW_RAM_END: u64 = 0xa_0000;

/// ACPI tables: RSDP first, then those it leads to. Within 0xe_0000-0xf_ffff, where kernels that are
/// not told look for the RSDP.
pub const ACPI_TABLES: u64 = 0xe_0000;

/// Room kept for the ACPI tables in bytes.
pub const ACPI_TABLES_MAX: u64 = 0x4000;

/// Intel MP floating pointer and configuration table. Linux looks for it in 0xf_0000-0xf_ffff.
pub const MP_TABLE: u64 = 0xf_0000;

/// Room kept for the MP table in bytes.
pub const MP_TABLE_MAX: u64 = 0x2000;

/// Entry point of a PC's BIOS, F000:FFF0 in real mode.
pub const BIOS_ENTRY: u64 = 0xf_fff0;

/// Where a multiboot kernel may lie below 1 MiB: between the descriptor table, the command line, and what follows.
pub const LOW_KERNEL: [Range<u64>; 2] =
    [0x1000..CMDLINE, CMDLINE + CMDLINE_MAX as u64..LOW_KERNEL_STACK - 0x1000];

/// Top of the stack of such a kernel's entry code.
pub const LOW_KERNEL_STACK: u64 = LOW_KERNEL_BOOT_INFO;

/// What such a kernel is told, [`BOOT_INFO_MAX`] bytes.
pub const LOW_KERNEL_BOOT_INFO: u64 = 0x9_0000;

/// Where extended memory begins: nothing else of a kernel lies below.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// End of RAM below the device hole (3 GiB); the rest follows at [`HIGH_MEMORY`].
pub const LOW_MEMORY_END: u64 = 0xc000_0000;

/// First address of RAM above the device hole (4 GiB).
pub const HIGH_MEMORY: u64 = 0x1_0000_0000;

/// Register window of the first virtio-mmio device.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;

/// Size of one register window and distance to the next.
pub const VIRTIO_MMIO_SIZE: u64 = mvm_devices::virtio::MmioTransport::LEN;

/// IOAPIC registers (`0xfec0_0000`).
pub const IOAPIC: u64 = mvm_devices::IoApic::BASE;

/// Local APIC registers (the engine's own; the address goes into the MP table).
pub const LOCAL_APIC: u64 = 0xfee0_0000;

/// Inputs of the IOAPIC.
pub const IOAPIC_PINS: u32 = mvm_devices::IoApic::PINS as u32;

/// Interrupt of the first serial port.
pub const SERIAL_GSI: u32 = 4;

/// Interrupt of the first virtio device; each has one of its own.
pub const VIRTIO_GSI: u32 = 5;

/// Virtio devices that a machine can have: one per interrupt that is left.
pub const MAX_VIRTIO_DEVICES: u32 = IOAPIC_PINS - VIRTIO_GSI;

/// First port of the serial console (COM1).
pub const SERIAL_PORT: u64 = mvm_devices::Serial::PORT;

/// First of ACPI's sleep and reset registers.
pub const POWER_PORT: u64 = mvm_devices::PowerControl::PORT;

/// Register window of virtio device `index`.
pub const fn virtio_mmio(index: u32) -> u64 {
    VIRTIO_MMIO + index as u64 * VIRTIO_MMIO_SIZE
}

/// Interrupt of virtio device `index`.
pub const fn virtio_gsi(index: u32) -> u32 {
    VIRTIO_GSI + index
}

/// The ranges of RAM `(start, size)` for `memory` bytes, rounded up to whole pages.
pub fn ram_ranges(memory: u64) -> Vec<(u64, u64)> {
    let memory = memory.min(MAX_MEMORY).next_multiple_of(mvm_memory::PAGE_SIZE as u64);
    if memory <= LOW_MEMORY_END {
        vec![(0, memory)]
    } else {
        vec![(0, LOW_MEMORY_END), (HIGH_MEMORY, memory - LOW_MEMORY_END)]
    }
}

/// Pieces in which the guest of a machine of `memory` bytes takes more, in bytes: what Linux makes of memory that is
/// plugged (`memory_block_size_bytes` on x86), the larger one from 64 GiB on.
pub fn growth_step(memory: u64) -> u64 {
    if memory < 64 << 30 { 128 << 20 } else { GROWTH_ALIGN }
}

/// The region `(start, size)` by which a machine of `memory` bytes can grow to `max` bytes, rounded up to whole steps;
/// `None` if that is no more.
pub fn growth(memory: u64, max: u64) -> Option<(u64, u64)> {
    let more = max.min(MAX_MEMORY).saturating_sub(memory).next_multiple_of(growth_step(memory));
    let end = ram_ranges(memory).last().map_or(0, |&(start, size)| start + size);
    (more != 0).then(|| (end.max(HIGH_MEMORY).next_multiple_of(GROWTH_ALIGN), more))
}

// The last is the page table of the first 2 MiB, for Solo5 guests.
const _: () = assert!(SOLO5_FIRST_TABLE + 0x1000 <= SOLO5_VISIBLE);
const _: () = assert!(GDT + 0x100 <= SOLO5_TABLES.start);
const _: () = assert!(SOLO5_BOOT_INFO + SOLO5_BOOT_INFO_MAX as u64 <= CMDLINE);
const _: () = assert!(HIGH_RAM_START == mvm_devices::Hypercalls::GUEST_MEMORY);
const _: () = assert!(BOOT_INFO + BOOT_INFO_MAX as u64 <= ZERO_PAGE);
const _: () = assert!(CMDLINE + CMDLINE_MAX as u64 <= LOW_RAM_END);
const _: () = assert!(LOW_KERNEL_BOOT_INFO + BOOT_INFO_MAX as u64 <= LOW_RAM_END);
const _: () = assert!(LOW_RAM_END <= ACPI_TABLES && ACPI_TABLES + ACPI_TABLES_MAX <= MP_TABLE);
const _: () = assert!(MP_TABLE + MP_TABLE_MAX <= BIOS_ENTRY);
const _: () = assert!(virtio_mmio(MAX_VIRTIO_DEVICES) <= IOAPIC);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_device_hole_free() {
        assert_eq!(ram_ranges(256 << 20), [(0, 256 << 20)]);
        assert_eq!(ram_ranges(LOW_MEMORY_END), [(0, LOW_MEMORY_END)]);
        assert_eq!(ram_ranges(LOW_MEMORY_END + 5), [(0, LOW_MEMORY_END), (HIGH_MEMORY, 0x1000)]);
    }

    #[test]
    fn what_a_machine_grows_by_lies_behind_its_ram() {
        assert_eq!(growth(256 << 20, 0), None);
        assert_eq!(growth(256 << 20, 256 << 20), None);
        assert_eq!(growth(256 << 20, 1 << 30), Some((4 << 30, 768 << 20)));
        assert_eq!(growth(256 << 20, (256 << 20) + 1), Some((4 << 30, 128 << 20)));
        assert_eq!(growth(LOW_MEMORY_END, 8 << 30), Some((4 << 30, 5 << 30)));
        assert_eq!(growth(LOW_MEMORY_END + 4096, 4 << 30).unwrap().0, 6 << 30);
        assert_eq!(growth(64 << 30, (64 << 30) + 1), Some((66 << 30, 2 << 30)));
        // However much: it ends where 40 bits do.
        for memory in [MIN_MEMORY, 1 << 30, 64 << 30, MAX_MEMORY - 4096] {
            let (start, size) = growth(memory, u64::MAX).unwrap();
            assert!(start + size <= 1 << 40, "{memory:#x}");
        }
    }
}
