//! The interrupt controllers and the timer of old PCs go on in another machine, with what they have requested, in service
//! and still to come.

use iced_x86::code_asm::*;
use mvm_engine::{PendingEvents, VcpuState};
use mvm_vmm::testing::section;
use mvm_vmm::{EndReason, Machine, MachineState, Parts, layout};

use crate::guest::{CODE, HANDLER, IDTR, assemble, with_handler};
use crate::journey::{Console, end, journey, leave, routes, take};

const TICKS: u64 = 0x21_0000;
const VECTOR: u64 = 0x30;

/// Prints a letter at each tick of the timer, in the handler of its interrupt before it is ended, and one between ticks
/// with interrupts off, when the next may be requested already. One-shots and periods take turns.
fn kernel() -> Vec<u8> {
    let port = layout::SERIAL_PORT as u32;
    let handler = assemble(HANDLER, |a| {
        a.push(rax)?;
        a.push(rdx)?;
        a.mov(edx, port)?;
        a.mov(eax, dword_ptr(TICKS))?;
        a.add(eax, u32::from(b'a'))?;
        a.out(dx, al)?;
        a.inc(dword_ptr(TICKS))?;
        a.mov(al, 0x20)?;
        a.out(0x20, al)?;
        a.pop(rdx)?;
        a.pop(rax)?;
        a.iretq()
    });
    let code = assemble(CODE, |a| {
        a.lidt(qword_ptr(IDTR))?;
        for (at, value) in [(0x20, 0x11), (0x21, VECTOR as u32), (0x21, 4), (0x21, 1), (0x21, 0xfe)]
        {
            a.mov(al, value)?;
            a.out(at, al)?;
        }
        for round in 1..=12u32 {
            let (mut wait, mut done) = (a.create_label(), a.create_label());
            let control = if round % 4 < 2 { 0x30 } else { 0x34 };
            for (at, value) in [(0x43, control), (0x40, 0x00), (0x40, 0x08)] {
                a.mov(al, value)?;
                a.out(at, al)?;
            }
            a.set_label(&mut wait)?;
            a.cli()?;
            a.cmp(dword_ptr(TICKS), round)?;
            a.jae(done)?;
            a.sti()?;
            a.hlt()?;
            a.jmp(wait)?;
            a.set_label(&mut done)?;
            // No tick of a period that nobody waits for.
            a.mov(al, 0x30)?;
            a.out(0x43, al)?;
            a.mov(dword_ptr(TICKS), round)?;
            a.mov(edx, port)?;
            a.mov(al, u32::from(b'.'))?;
            a.out(dx, al)?;
        }
        a.mov(eax, 0)?;
        a.out(0xf4, eax)?;
        a.hlt()
    });
    with_handler(&code, VECTOR, &handler).build()
}

/// A kernel that prints with interrupts on, and its handler, which prints something else and ends the machine.
fn interrupted_kernel() -> Vec<u8> {
    let port = layout::SERIAL_PORT as u32;
    let handler = assemble(HANDLER, |a| {
        a.mov(edx, port)?;
        a.mov(al, u32::from(b'h'))?;
        a.out(dx, al)?;
        a.mov(eax, 0)?;
        a.out(0xf4, eax)?;
        a.hlt()
    });
    let code = assemble(CODE, |a| {
        let mut again = a.create_label();
        a.lidt(qword_ptr(IDTR))?;
        a.sti()?;
        a.mov(edx, port)?;
        a.mov(al, u32::from(b'x'))?;
        a.set_label(&mut again)?;
        a.out(dx, al)?;
        a.jmp(again)
    });
    with_handler(&code, VECTOR, &handler).build()
}

#[test]
fn an_interrupt_that_was_acknowledged_is_delivered_by_the_next_machine() {
    let kernel = interrupted_kernel();
    for route in routes() {
        let console = Console::default();
        let parts = || Parts {
            console: Box::new(console.clone()),
            ..Parts::new(16 << 20, section(&kernel).unwrap())
        };
        let (mut machine, mut events) = route.begin(parts);
        console.stop_at(3, &machine);
        machine.start();
        let (mut state, mut ram) = leave(machine, &events, &console);
        state.vcpus[0].events.external = Some(VECTOR as u8);
        for engine in route.next_legs() {
            (machine, _) = route.go_on(engine, parts(), ram, &state);
            // It is still under way.
            machine.pause().unwrap();
            assert_eq!(machine.save().unwrap().vcpus[0].events, state.vcpus[0].events, "{route}");
            (state, ram) = take(machine);
        }
        let last = route.next_legs().last().unwrap();
        let refused = VcpuState {
            events: PendingEvents { shadow: true, ..state.vcpus[0].events },
            ..state.vcpus[0].clone()
        };
        let refused = MachineState { vcpus: vec![refused], ..state.clone() };
        assert!(Machine::restore(last, parts(), ram.clone(), &refused).is_err());
        (machine, events) = route.go_on(last, parts(), ram, &state);
        machine.start();
        let reason = end(machine, &events, &console);
        assert_eq!((console.text(), reason), ("xxxh".into(), EndReason::DebugExit { status: 1 }));
    }
}

#[test]
fn ticks_of_the_old_timer_go_on_in_another_machine() {
    let kernel = kernel();
    for route in routes() {
        // In a handler and between ticks, one-shot and periodic.
        for stops in [[3, 12], [4, 9], [6, 7], [1, 24]] {
            let (reason, text) =
                journey(&route, &stops, || Parts::new(16 << 20, section(&kernel).unwrap()));
            assert_eq!(reason, EndReason::DebugExit { status: 1 }, "{route}: {text}");
            // A period may have ticked once more before it was stopped: it is requested then, and comes in the next round.
            let dots = text.chars().filter(|c| *c == '.').count();
            assert_eq!(dots, 12, "{route}: {text}");
            assert!(text.starts_with('a') && text.ends_with('.'), "{route}: {text}");
        }
    }
}
