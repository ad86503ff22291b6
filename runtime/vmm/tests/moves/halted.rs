//! A processor that halts until a device interrupts.

use std::cell::RefCell;
use std::io::{self, Write};
use std::time::Instant;

use iced_x86::code_asm::*;
use mvm_engine::MpState;
use mvm_vmm::testing::section;
use mvm_vmm::{EndReason, Machine, Parts, layout};

use crate::guest::{CODE, HANDLER, IDTR, PATIENCE, assemble, with_handler};
use crate::journey::{Console, end, routes, take};

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
        a.lidt(qword_ptr(IDTR))?;
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
    with_handler(&code, VECTOR, &handler).build()
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
