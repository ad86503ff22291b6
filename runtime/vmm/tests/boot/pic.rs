//! Kernels that know the interrupt controllers of old PCs and no others.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use mvm_vmm::config::BootProtocol;
use mvm_vmm::testing::{ElfBuilder, INTERRUPT_TABLE, interrupt_table};
use mvm_vmm::{EndReason, Parts, layout};

use crate::guest::*;

const HANDLERS: u64 = AT + 0x1000;
/// Bytes of code for each.
const HANDLER: u64 = 0x40;
const IDT: u64 = 0x20_0000;
const IDTR: u64 = IDT + INTERRUPT_TABLE;
/// How often each of the 16 came.
const COUNTS: u64 = 0x21_0000;
/// Where IRQ 0 leads to.
const BASE: u64 = 0x20;

fn count(irq: u64) -> u64 {
    COUNTS + irq * 8
}

/// Writes a byte to a port below 256.
fn out(a: &mut CodeAssembler, port: u32, value: u32) -> Result<(), IcedError> {
    a.mov(al, value)?;
    a.out(port, al)
}

fn out_far(a: &mut CodeAssembler, port: u32, value: u32) -> Result<(), IcedError> {
    a.mov(edx, port)?;
    a.mov(al, value)?;
    a.out(dx, al)
}

/// Counts the interrupt and ends it.
fn handler(irq: u64) -> Vec<u8> {
    assemble(64, HANDLERS + irq * HANDLER, |a| {
        a.push(rax)?;
        a.push(rdx)?;
        a.inc(qword_ptr(count(irq)))?;
        // What a serial port tells of is over when it has been asked.
        out_far(a, layout::SERIAL_PORT as u32 + 2, 0)?;
        a.in_(al, dx)?;
        if irq >= 8 {
            out(a, 0xa0, 0x20)?;
        }
        out(a, 0x20, 0x20)?;
        a.pop(rdx)?;
        a.pop(rax)?;
        a.iretq()
    })
}

/// A kernel that has the controllers send vectors from [`BASE`] on, all of them masked, and does what `write` says.
fn kernel(write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let code = assemble(64, AT, |a| {
        a.lidt(qword_ptr(IDTR))?;
        for (port, base, cascade) in [(0x20, BASE as u32, 4), (0xa0, BASE as u32 + 8, 2)] {
            out(a, port, 0x11)?;
            [base, cascade, 1, 0xff].into_iter().try_for_each(|word| out(a, port + 1, word))?;
        }
        write(a)
    });
    let mut handlers = vec![0; (16 * HANDLER) as usize];
    for irq in 0..16 {
        let bytes = handler(irq);
        assert!(bytes.len() <= HANDLER as usize);
        let at = (irq * HANDLER) as usize;
        handlers[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    let gates = (0..16).map(|irq| (BASE + irq, HANDLERS + irq * HANDLER));
    ElfBuilder::elf64(AT)
        .load(AT, &code)
        .load(HANDLERS, &handlers)
        .load(IDT, &interrupt_table(IDT, gates))
        .build()
}

/// Sets counter 0 of the timer.
fn set_timer(a: &mut CodeAssembler, control: u32, reload: u32) -> Result<(), IcedError> {
    out(a, 0x43, control)?;
    out(a, 0x40, reload & 0xff)?;
    out(a, 0x40, reload >> 8)
}

/// Halts until interrupt `irq` has come `times` times.
fn wait_for(a: &mut CodeAssembler, irq: u64, times: u32) -> Result<(), IcedError> {
    let (mut again, mut done) = (a.create_label(), a.create_label());
    a.set_label(&mut again)?;
    a.cli()?;
    a.cmp(dword_ptr(count(irq)), times)?;
    a.jae(done)?;
    a.sti()?;
    a.hlt()?;
    a.jmp(again)?;
    a.set_label(&mut done)?;
    a.nop()
}

fn linux(kernel: &[u8]) -> Parts {
    Parts { boot: BootProtocol::Linux, ..parts(kernel) }
}

const DONE: EndReason = EndReason::DebugExit { status: 1 };

#[test]
fn the_timer_ticks_by_the_old_controllers() {
    let kernel = kernel(|a| {
        out(a, 0x21, 0xfe)?;
        // A thousand times a second.
        set_timer(a, 0x34, 1193)?;
        wait_for(a, 0, 20)?;
        // Now by the other mode, then once.
        set_timer(a, 0x36, 1193)?;
        a.mov(qword_ptr(count(0)), 0)?;
        wait_for(a, 0, 5)?;
        for _ in 0..3 {
            a.mov(qword_ptr(count(0)), 0)?;
            set_timer(a, 0x30, 2000)?;
            wait_for(a, 0, 1)?;
        }
        exit(a, 0)
    });
    for vcpus in [1, 2] {
        let run = run(Parts { vcpus, ..linux(&kernel) });
        assert_eq!(run.reason, DONE, "{vcpus} vCPUs");
    }
}

#[test]
fn the_timer_wakes_a_processor_without_a_local_apic() {
    let kernel = kernel(|a| {
        a.mov(ecx, 0x1b)?;
        a.rdmsr()?;
        a.and(eax, !(1 << 11))?;
        a.wrmsr()?;
        out(a, 0x21, 0xfe)?;
        set_timer(a, 0x34, 1193)?;
        wait_for(a, 0, 5)?;
        exit(a, 0)
    });
    assert_eq!(run(linux(&kernel)).reason, DONE);
}

#[test]
fn the_timer_is_at_pin_2_of_the_new_controller() {
    let kernel = kernel(|a| {
        a.mov(ebx, layout::IOAPIC as u32)?;
        for (register, value) in [(0x15, 0), (0x14, BASE as u32)] {
            a.mov(dword_ptr(rbx), register)?;
            a.mov(dword_ptr(rbx + 0x10), value)?;
        }
        set_timer(a, 0x34, 1193)?;
        wait_for(a, 0, 1)?;
        exit(a, 0)
    });
    assert_eq!(run(linux(&kernel)).reason, DONE);
}

/// Ends with 1 if a count is not as it should be.
fn expect(a: &mut CodeAssembler, irq: u64, times: u32) -> Result<(), IcedError> {
    let mut right = a.create_label();
    a.cmp(dword_ptr(count(irq) as u32), times)?;
    a.je(right)?;
    exit(a, 0x10 + irq as u32)?;
    a.set_label(&mut right)
}

/// A kernel in a file with a PVH note, for which there is the test device that pulls interrupts.
fn pulled(write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let header = [0x1bad_b002u32, 0, 0x1bad_b002u32.wrapping_neg()].map(u32::to_le_bytes).concat();
    let start = AT + header.len() as u64;
    let code = assemble(32, start, |a| {
        a.lidt(qword_ptr(IDTR as u32))?;
        for (port, base, cascade) in [(0x20, BASE as u32, 4), (0xa0, BASE as u32 + 8, 2)] {
            out(a, port, 0x11)?;
            [base, cascade, 1, 0].into_iter().try_for_each(|word| out(a, port + 1, word))?;
        }
        a.mov(esp, 0x9_0000)?;
        write(a)
    });
    let (mut handlers, mut idt) = (vec![0; (16 * HANDLER) as usize], vec![0; 0x1000]);
    for irq in 0..16u64 {
        let place = HANDLERS + irq * HANDLER;
        let bytes = assemble(32, place, |a| {
            a.push(eax)?;
            a.inc(dword_ptr(count(irq) as u32))?;
            if irq >= 8 {
                out(a, 0xa0, 0x20)?;
            }
            out(a, 0x20, 0x20)?;
            a.pop(eax)?;
            a.iretd()
        });
        let at = (irq * HANDLER) as usize;
        handlers[at..at + bytes.len()].copy_from_slice(&bytes);
        let gate = place & 0xffff | 0x08 << 16 | 0x8e00 << 32 | place >> 16 << 48;
        let at = ((BASE + irq) * 8) as usize;
        idt[at..at + 8].copy_from_slice(&gate.to_le_bytes());
    }
    let idtr = [&0xfffu16.to_le_bytes()[..], &(IDT as u32).to_le_bytes()].concat();
    ElfBuilder::elf32(start)
        .load(AT, &[header, code].concat())
        .load(HANDLERS, &handlers)
        .load(IDT, &[idt, idtr].concat())
        .build()
}

/// Pulls `irq` for a moment.
fn pull(a: &mut CodeAssembler, irq: u64) -> Result<(), IcedError> {
    out_far(a, 0x2000 + irq as u32, 1)?;
    out_far(a, 0x2000 + irq as u32, 0)
}

/// Writes register LINT0 of the local APIC.
fn set_lint0(a: &mut CodeAssembler, value: u32) -> Result<(), IcedError> {
    a.mov(dword_ptr(layout::LOCAL_APIC as u32 + 0x350), value)
}

/// Halts until interrupt `irq` has come `times` times and never more, then leaves interrupts on.
fn comes(a: &mut CodeAssembler, irq: u64, times: u32) -> Result<(), IcedError> {
    let (mut again, mut done) = (a.create_label(), a.create_label());
    a.set_label(&mut again)?;
    a.cli()?;
    a.cmp(dword_ptr(count(irq) as u32), times)?;
    a.jae(done)?;
    a.sti()?;
    a.hlt()?;
    a.jmp(again)?;
    a.set_label(&mut done)?;
    expect(a, irq, times)?;
    a.sti()
}

/// Gives an engine every occasion to interrupt, and sees that it has not.
fn does_not_come(a: &mut CodeAssembler, irq: u64, times: u32) -> Result<(), IcedError> {
    for _ in 0..3 {
        a.in_(al, 0x80)?;
        a.nop()?;
    }
    expect(a, irq, times)
}

#[test]
fn interrupts_come_when_nothing_holds_them_back() {
    let kernel = pulled(|a| {
        a.sti()?;
        for irq in [0, 1, 3, 7, 8, 10, 15] {
            pull(a, irq)?;
            comes(a, irq, 1)?;
        }
        // Held back by the flag, by a mask, by LINT0.
        a.cli()?;
        pull(a, 5)?;
        does_not_come(a, 5, 0)?;
        a.sti()?;
        comes(a, 5, 1)?;
        out(a, 0xa1, 4)?;
        pull(a, 10)?;
        does_not_come(a, 10, 1)?;
        out(a, 0xa1, 0)?;
        comes(a, 10, 2)?;
        for other in [0x1_0700, 0x400] {
            set_lint0(a, other)?;
            pull(a, 6)?;
            does_not_come(a, 6, 0)?;
        }
        set_lint0(a, 0x700)?;
        comes(a, 6, 1)?;
        // Task priorities mean nothing to them.
        a.mov(dword_ptr(layout::LOCAL_APIC as u32 + 0x80), 0xf0)?;
        pull(a, 4)?;
        comes(a, 4, 1)?;
        // Several at once.
        a.cli()?;
        [0, 3, 12].into_iter().try_for_each(|irq| pull(a, irq))?;
        a.sti()?;
        comes(a, 12, 1)?;
        comes(a, 3, 2)?;
        comes(a, 0, 2)?;
        exit(a, 0)
    });
    // Some KVMs cannot return from an interrupt in protected mode.
    assert_eq!(run_on_emu(parts(&kernel)).reason, DONE);
}

/// Has the serial port interrupt once, since it has sent everything.
fn fire(a: &mut CodeAssembler) -> Result<(), IcedError> {
    out_far(a, layout::SERIAL_PORT as u32 + 1, 0)?;
    out_far(a, layout::SERIAL_PORT as u32 + 1, 2)
}

/// Ends the machine with `code` unless IRQ 4 has come `times` times.
fn expect_4(a: &mut CodeAssembler, times: u32, code: u32) -> Result<(), IcedError> {
    let mut right = a.create_label();
    // Every occasion to interrupt.
    (0..3).try_for_each(|_| a.in_(al, 0x80))?;
    a.cmp(dword_ptr(count(4)), times)?;
    a.je(right)?;
    exit(a, code)?;
    a.set_label(&mut right)?;
    a.nop()
}

#[test]
fn the_flag_the_mask_and_lint0_hold_interrupts_back() {
    let kernel = kernel(|a| {
        a.mov(ebx, layout::LOCAL_APIC as u32)?;
        out(a, 0x21, 0xef)?;
        // The flag.
        fire(a)?;
        expect_4(a, 0, 1)?;
        wait_for(a, 4, 1)?;
        expect_4(a, 1, 2)?;
        // The mask.
        out(a, 0x21, 0xff)?;
        a.sti()?;
        fire(a)?;
        expect_4(a, 1, 3)?;
        out(a, 0x21, 0xef)?;
        wait_for(a, 4, 2)?;
        // LINT0: masked, and in another mode.
        for other in [0x1_0700, 0x400] {
            a.mov(dword_ptr(rbx + 0x350), other)?;
            a.sti()?;
            fire(a)?;
            expect_4(a, 2, 4)?;
        }
        a.mov(dword_ptr(rbx + 0x350), 0x700)?;
        wait_for(a, 4, 3)?;
        // A local APIC that is off by software masks it, and unmasks nothing when it is on again.
        a.mov(dword_ptr(rbx + 0xf0), 0xff)?;
        a.mov(dword_ptr(rbx + 0x350), 0x700)?;
        a.sti()?;
        fire(a)?;
        expect_4(a, 3, 5)?;
        a.mov(dword_ptr(rbx + 0xf0), 0x1ff)?;
        expect_4(a, 3, 6)?;
        a.mov(dword_ptr(rbx + 0x350), 0x700)?;
        wait_for(a, 4, 4)?;
        exit(a, 0)
    });
    assert_eq!(run(linux(&kernel)).reason, DONE);
}

#[test]
fn a_serial_port_interrupts_by_the_old_controllers() {
    let kernel = kernel(|a| {
        out(a, 0x21, 0xef)?;
        // OUT2 connects it; an interrupt when it has sent everything, which is at once.
        out_far(a, layout::SERIAL_PORT as u32 + 4, 8)?;
        out_far(a, layout::SERIAL_PORT as u32 + 1, 2)?;
        wait_for(a, 4, 1)?;
        out_far(a, layout::SERIAL_PORT as u32, b'x'.into())?;
        wait_for(a, 4, 2)?;
        exit(a, 0)
    });
    let run = run(linux(&kernel));
    assert_eq!(run.reason, DONE);
    assert_eq!(run.console, b"x");
}

#[test]
fn a_virtio_device_interrupts_by_the_old_controllers() {
    const DESCRIPTORS: u64 = 0x30_0000;
    const AVAILABLE: u64 = 0x30_1000;
    const USED: u64 = 0x30_2000;
    const BUFFER: u64 = 0x30_3000;
    let irq = u64::from(layout::virtio_gsi(0));
    let kernel = kernel(|a| {
        out(a, 0x21, 0xff & !(1 << irq))?;
        a.mov(edi, layout::virtio_mmio(0) as u32)?;
        // The entropy device: VERSION_1 alone, one queue of 8, one buffer of 16 bytes that it writes.
        let set_up: [(i32, u32); 11] = [
            (0x70, 1),
            (0x70, 3),
            (0x24, 1),
            (0x20, 1),
            (0x70, 0xb),
            (0x38, 8),
            (0x80, DESCRIPTORS as u32),
            (0x90, AVAILABLE as u32),
            (0xa0, USED as u32),
            (0x44, 1),
            (0x70, 0xf),
        ];
        for (register, value) in set_up {
            a.mov(dword_ptr(rdi + register), value)?;
        }
        a.mov(dword_ptr(DESCRIPTORS), BUFFER as u32)?;
        a.mov(dword_ptr(DESCRIPTORS + 8), 16)?;
        a.mov(dword_ptr(DESCRIPTORS + 12), 2)?;
        for request in 1..=3u32 {
            a.mov(word_ptr(AVAILABLE + 2), request)?;
            a.mov(dword_ptr(rdi + 0x50), 0)?;
            wait_for(a, irq, request)?;
            // Used buffers are the cause, until that is acknowledged.
            a.mov(eax, dword_ptr(rdi + 0x60))?;
            a.mov(dword_ptr(rdi + 0x64), eax)?;
        }
        a.movzx(eax, word_ptr(USED + 2))?;
        a.out(0xf4, eax)?;
        halt(a)
    });
    assert_eq!(run(linux(&kernel)).reason, EndReason::DebugExit { status: 3 << 1 | 1 });
}

#[test]
fn linux_has_no_old_controllers() {
    let code = assemble(64, AT, |a| {
        a.xor(eax, eax)?;
        a.in_(al, 0x21)?;
        a.out(0xf4, eax)?;
        halt(a)
    });
    let kernel = ElfBuilder::elf64(AT).load(AT, &code).build();
    let style = mvm_vmm::config::CmdlineStyle::Linux;
    let run = run(Parts { cmdline_style: style, ..linux(&kernel) });
    assert_eq!(run.reason, EndReason::DebugExit { status: 0xff << 1 | 1 });
}
