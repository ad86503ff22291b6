//! Interrupts of devices, by the I/O APIC (data sheet 82093AA). Ring 0 counts them all as one.

use core::ptr;

const IOAPIC: usize = 0xfec0_0000;
const SELECT: usize = IOAPIC;
const WINDOW: usize = IOAPIC + 0x10;
/// The first redirection entry; each has two registers.
const REDIRECTION: u32 = 0x10;

/// As in ring0.s.
const DEVICE_VECTOR: u32 = 0x21;

/// Sends the interrupts of `pin` to the first processor, or to nobody: edges, active high.
pub fn enable(pin: u32, on: bool) {
    const MASKED: u32 = 1 << 16;
    let entry = REDIRECTION + pin * 2;
    write(entry + 1, 0);
    write(entry, if on { DEVICE_VECTOR } else { DEVICE_VECTOR | MASKED });
}

fn write(register: u32, value: u32) {
    // SAFETY: the registers are where every PC has them, and devices are mapped.
    unsafe {
        ptr::write_volatile(SELECT as *mut u32, register);
        ptr::write_volatile(WINDOW as *mut u32, value);
    }
}
