//! A processor that halts until a device interrupts.

use std::cell::RefCell;
use std::io::{self, Write};
use std::time::Instant;

use iced_x86::code_asm::*;
use mvm_engine::MpState;
use mvm_vmm::testing::{ElfBuilder, section};
use mvm_vmm::{EndReason, Machine, Parts, layout};

use crate::guest::{PATIENCE, assemble};
use crate::journey::{Console, end, routes, take};

const CODE: u64 = 0x10_0000;
const HANDLER: u64 = 0x10_1000;
const IDT: u64 = 0x20_0000;
const VECTOR: u64 = 0x41;

/// Halts until something is typed, and sends it back.
fn kernel() -> Vec<u8> {
    const LOCAL_APIC: u32 = layout::LOCAL_APIC as u32;
    let port = layout::SERIAL_PORT as u32;
    let handler = assemble(HANDLER, |a| {
        a.mov(edx, port)?;
        a.in_(al, dx)?;
        a.out(dx, al)?;
        a.mov(dword_ptr(rbx + 0xb0), 0)?;
        a.mov(eax, 0)?;
        a.out(0xf4, eax)?;
        a.iretq()
    });
    let code = assemble(CODE, |a| {
        let mut again = a.create_label();
        a.lidt(qword_ptr(IDT + 4096))?;
        a.mov(ebx, LOCAL_APIC)?;
        a.mov(dword_ptr(rbx + 0xf0), 0x1ff)?;
        a.mov(esi, layout::IOAPIC as u32)?;
        let entry = 0x10 + layout::SERIAL_GSI * 2;
        for (register, value) in [(entry + 1, 0), (entry, VECTOR as u32)] {
            a.mov(dword_ptr(rsi), register)?;
            a.mov(dword_ptr(rsi + 0x10), value)?;
        }
        // Interrupts for what is received; OUT2 connects them.
        for (register, value) in [(1, 1), (4, 0xb)] {
            a.mov(edx, port + register)?;
            a.mov(al, value)?;
            a.out(dx, al)?;
        }
        a.sti()?;
        a.set_label(&mut again)?;
        a.hlt()?;
        a.jmp(again)
    });
    let gate = HANDLER & 0xffff | 0x10 << 16 | 0x8e00 << 32 | HANDLER >> 16 << 48;
    let mut idt = vec![0; 4096];
    let at = VECTOR as usize * 16;
    idt[at..at + 8].copy_from_slice(&gate.to_le_bytes());
    let idtr = [&0xfffu16.to_le_bytes()[..], &IDT.to_le_bytes()].concat();
    ElfBuilder::elf64(CODE)
        .load(CODE, &code)
        .load(HANDLER, &handler)
        .load(IDT, &[idt, idtr].concat())
        .build()
}

/// Lets `machine` run until it halts, which it does not leave by itself.
fn until_halted(machine: &Machine) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        machine.resume();
        std::thread::yield_now();
        machine.pause().unwrap();
        if machine.save().unwrap().vcpus[0].mp_state == MpState::Halted {
            return;
        }
        assert!(Instant::now() < deadline, "it does not halt");
    }
}

#[test]
fn a_halted_processor_is_woken_in_another_machine() {
    let kernel = kernel();
    for route in routes() {
        let (console, keyboard) = (Console::default(), RefCell::new(None));
        let parts = || {
            let (input, writer) = io::pipe().unwrap();
            let parts = Parts {
                console: Box::new(console.clone()),
                console_input: Some(input.into()),
                ..Parts::new(16 << 20, section(&kernel).unwrap())
            };
            *keyboard.borrow_mut() = Some(writer);
            parts
        };
        let (mut machine, mut events) = route.begin(parts);
        for engine in route.next_legs() {
            until_halted(&machine);
            let (state, ram) = take(machine);
            (machine, events) = route.go_on(engine, parts(), ram, &state);
        }
        until_halted(&machine);
        keyboard.take().unwrap().write_all(b"k").unwrap();
        machine.resume();
        let reason = end(machine, &events, &console);
        assert_eq!(console.text(), "k", "{route}: {reason}");
        assert_eq!(reason, EndReason::DebugExit { status: 1 });
    }
}
