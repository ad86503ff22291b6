//! Interrupts that are requested, held back by priority, and in service.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use mvm_vmm::testing::{ElfBuilder, INTERRUPT_TABLE, interrupt_table, section};
use mvm_vmm::{EndReason, Parts, layout};

use crate::guest::assemble;
use crate::journey::{journey, routes};

const CODE: u64 = 0x10_0000;
const IDT: u64 = 0x20_0000;
/// Handlers, one every 256 bytes, by vector / 16.
const HANDLERS: u64 = 0x10_1000;
/// Interrupts that have been handled.
const COUNT: u64 = 0x21_0000;
const VECTORS: [u64; 3] = [0x31, 0x41, 0x51];

/// Registers of the local APIC.
mod apic {
    pub const EOI: i32 = 0xb0;
    pub const SPURIOUS: i32 = 0xf0;
    pub const COMMAND: i32 = 0x300;
    /// To itself, fixed.
    pub const SELF: u32 = 0x4_4000;
}

fn handler(vector: u64) -> u64 {
    HANDLERS + (vector >> 4) * 0x100
}

fn print(a: &mut CodeAssembler, byte: u8) -> Result<(), IcedError> {
    a.mov(al, u32::from(byte))?;
    a.out(dx, al)
}

fn set_priority(a: &mut CodeAssembler, class: u32) -> Result<(), IcedError> {
    a.mov(eax, class)?;
    a.mov(cr8, rax)
}

/// Waits until so many interrupts have been handled: hosts that interpret ring 0 let them in now and then.
fn wait(a: &mut CodeAssembler, count: u32) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.cmp(dword_ptr(COUNT), count)?;
    a.jb(again)
}

fn request(a: &mut CodeAssembler, vector: u64) -> Result<(), IcedError> {
    a.mov(dword_ptr(rbx + apic::COMMAND), apic::SELF | vector as u32)
}

/// Each handler prints a letter at its beginning and at its end; the one in the middle asks for both others and lets
/// interrupts in. Between those letters there is nothing but interrupts, so that every byte printed is a different
/// set of requests and interrupts in service.
fn kernel() -> Vec<u8> {
    let mut elf = ElfBuilder::elf64(CODE);
    for (vector, letter) in VECTORS.into_iter().zip(b'a'..) {
        let at = handler(vector);
        let code = assemble(at, |a| {
            print(a, letter)?;
            if vector == 0x41 {
                request(a, 0x31)?;
                print(a, b'-')?;
                request(a, 0x51)?;
                print(a, b'+')?;
                // The one in service holds back what is below it, and so does the task priority: hosts that interpret
                // ring 0 now and then forget the former, moved or not.
                set_priority(a, 3)?;
                a.sti()?;
                wait(a, 2)?;
                a.cli()?;
                set_priority(a, 0)?;
            }
            print(a, letter.to_ascii_uppercase())?;
            a.inc(dword_ptr(COUNT))?;
            a.mov(dword_ptr(rbx + apic::EOI), 0)?;
            a.iretq()
        });
        elf = elf.load(at, &code);
    }
    let code = assemble(CODE, |a| {
        a.lidt(qword_ptr(IDT + INTERRUPT_TABLE))?;
        a.mov(ebx, layout::LOCAL_APIC as u32)?;
        a.mov(edx, layout::SERIAL_PORT as u32)?;
        a.mov(dword_ptr(rbx + apic::SPURIOUS), 0x1ff)?;
        for vector in VECTORS {
            request(a, vector)?;
            print(a, b'.')?;
        }
        // The task priority holds back all but the highest.
        set_priority(a, 4)?;
        print(a, b'1')?;
        a.sti()?;
        wait(a, 1)?;
        print(a, b'2')?;
        set_priority(a, 0)?;
        wait(a, 4)?;
        print(a, b'3')?;
        a.cli()?;
        a.mov(eax, 0)?;
        a.out(0xf4, eax)?;
        a.hlt()
    });
    let gates = VECTORS.map(|vector| (vector, handler(vector)));
    elf.load(CODE, &code).load(IDT, &interrupt_table(IDT, gates)).build()
}

#[test]
fn requests_and_what_is_in_service_go_along() {
    const EXPECTED: &str = "...1cC2b-+cCBaA3";
    let kernel = kernel();
    let parts = || Parts::new(16 << 20, section(&kernel).unwrap());
    for route in routes() {
        for stop in 1..=EXPECTED.len() {
            let stops = [stop, stop + 1];
            let stops = &stops[..if stop < EXPECTED.len() { 2 } else { 1 }];
            let (reason, text) = journey(&route, stops, parts);
            assert_eq!(text, EXPECTED, "{route}, {stops:?}: {reason}");
            assert_eq!(reason, EndReason::DebugExit { status: 1 });
        }
    }
}
