//! A kernel made for PC emulators that is moved while it reads the firmware configuration device.

use mvm_vmm::testing::{ElfBuilder, section};
use mvm_vmm::{EndReason, Parts};

use crate::journey::{journey, routes};

const AT: u64 = 0x10_0000;

/// Prints its command line as that device has it, a byte at a time; it is entered by PVH.
const PRINTS: &[u8] = &[
    0x66, 0xba, 0x10, 0x05, // mov dx, 0x510
    0x66, 0xb8, 0x15, 0x00, // mov ax, 0x15
    0x66, 0xef, // out dx, ax
    0x66, 0xba, 0x11, 0x05, // mov dx, 0x511
    0xec, 0x84, 0xc0, 0x74, 0x07, // in al, dx; test al, al; jz +7
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xee, 0xeb, 0xf0, // out dx, al; jmp -16
    0xe6, 0xf4, 0xfa, 0xf4, // out 0xf4, al; cli; hlt
];

#[test]
fn what_is_read_goes_on_where_it_was() {
    const TEXT: &str = "the words of its command line";
    let entry = (AT as u32).to_le_bytes();
    let kernel = ElfBuilder::elf32(AT).load(AT, PRINTS).note("Xen", 18, &entry).build();
    for route in routes() {
        let parts =
            || Parts { cmdline: TEXT.into(), ..Parts::new(16 << 20, section(&kernel).unwrap()) };
        let (reason, text) = journey(&route, &[3, 17], parts);
        assert_eq!(text, TEXT, "{route}: {reason}");
        assert_eq!(reason, EndReason::DebugExit { status: 1 });
    }
}
