//! What kernels made on PC emulators look for unasked: the firmware configuration device, the test
//! device.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use mvm_vmm::testing::{ElfBuilder, section};
use mvm_vmm::{EndReason, Module, Parts};

use crate::guest::*;

const SELECTOR: u32 = 0x510;
const DATA: u32 = 0x511;
const NB_CPUS: u32 = 5;
const FREE: u32 = 0x5000;

/// A multiboot kernel in an ELF32 file that does what `write` says.
fn kernel(write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let header = [0x1bad_b002u32, 0, 0x1bad_b002u32.wrapping_neg()].map(u32::to_le_bytes).concat();
    let code = assemble(32, AT + 12, write);
    ElfBuilder::elf32(AT + 12).load(AT, &[header, code].concat()).build()
}

/// Selects an item and prints its first `len` bytes, changing EAX, ECX and EDX.
fn print_item(a: &mut CodeAssembler, item: u32, len: u32) -> Result<(), IcedError> {
    a.mov(eax, item)?;
    a.mov(edx, SELECTOR)?;
    a.out(dx, ax)?;
    a.mov(edx, DATA)?;
    a.mov(edi, FREE)?;
    a.mov(ecx, len)?;
    a.cld()?;
    a.rep().insb()?;
    print_memory(a, FREE, len)
}

#[test]
fn a_test_kernel_learns_how_many_processors_there_are() {
    let kernel = kernel(|a| {
        a.mov(eax, NB_CPUS)?;
        a.mov(edx, SELECTOR)?;
        a.out(dx, ax)?;
        a.inc(edx)?;
        a.xor(eax, eax)?;
        a.in_(al, dx)?;
        a.mov(ebx, eax)?;
        a.in_(al, dx)?;
        a.shl(eax, 8)?;
        a.or(eax, ebx)?;
        a.out(0xf4, eax)?;
        halt(a)
    });
    for vcpus in [1, 3] {
        let run = run(Parts { vcpus, ..parts(&kernel) });
        assert_eq!(run.reason, EndReason::DebugExit { status: vcpus << 1 | 1 });
    }
}

#[test]
fn memory_command_line_and_initrd_are_told() {
    const MODULE: &[u8] = b"NR_CPUS=1\n";
    const MAP: u32 = 0x20;
    let kernel = kernel(|a| {
        print_item(a, 0, 4)?;
        print_item(a, 3, 8)?;
        print_item(a, 0x14, 4)?;
        print_item(a, 0x15, 6)?;
        print_item(a, 0xb, 4)?;
        print_item(a, 0x12, MODULE.len() as u32)?;
        // The initrd where it is said to be.
        print_item(a, 0xa, 4)?;
        a.mov(esi, dword_ptr(FREE))?;
        a.mov(ecx, MODULE.len() as u32)?;
        a.rep().outsb()?;
        print_item(a, MAP, 20)?;
        exit(a, 0)
    });
    let modules = vec![Module { content: section(MODULE).unwrap(), text: "env".into() }];
    let run = run(Parts { modules, cmdline: "a b=c".into(), ..parts(&kernel) });
    assert_eq!(run.reason, EndReason::DebugExit { status: 1 });
    let mut rest = &run.console[..];
    let mut take = |len: usize| {
        let (taken, left) = rest.split_at(len);
        rest = left;
        taken
    };
    assert_eq!(take(4), b"QEMU");
    assert_eq!(take(8), MEMORY.to_le_bytes());
    assert_eq!(take(4), 6u32.to_le_bytes());
    assert_eq!(take(6), b"a b=c\0");
    assert_eq!(take(4), (MODULE.len() as u32).to_le_bytes());
    assert_eq!(take(MODULE.len()), MODULE);
    take(4);
    assert_eq!(take(MODULE.len()), MODULE);
    // The first range of the memory map: address, size, RAM.
    assert_eq!(take(8), [0; 8]);
    assert_eq!(take(8), 0xa_0000u64.to_le_bytes());
    assert_eq!(take(4), 1u32.to_le_bytes());
    assert!(rest.is_empty());
}

#[test]
fn the_dma_register_copies_into_memory() {
    const DESCRIPTOR: u32 = 0x5800;
    let kernel = kernel(|a| {
        // Select the signature and read; 4 bytes; to FREE.
        let words = [0x0000_000au32, 4, 0, FREE];
        for (at, word) in (DESCRIPTOR..).step_by(4).zip(words) {
            a.mov(dword_ptr(at), word.swap_bytes().cast_signed())?;
        }
        a.mov(eax, 0)?;
        a.mov(edx, 0x514)?;
        a.out(dx, eax)?;
        a.mov(eax, DESCRIPTOR.swap_bytes())?;
        a.mov(edx, 0x518)?;
        a.out(dx, eax)?;
        print_memory(a, FREE, 4)?;
        print_memory(a, DESCRIPTOR, 4)?;
        exit(a, 0)
    });
    let run = run(parts(&kernel));
    assert_eq!(run.reason, EndReason::DebugExit { status: 1 });
    assert_eq!(run.console, b"QEMU\0\0\0\0");
}

#[test]
fn the_test_device_keeps_bytes_and_pulls_interrupts() {
    const PIN: u32 = 14;
    const VECTOR: u32 = 0x51;
    const MEMORY_OF_IT: u32 = 0xff00_0000;
    let kernel = kernel(|a| {
        // Bytes behind ports and in memory.
        a.mov(eax, 0x1122_3344)?;
        a.out(0xe0, eax)?;
        a.xor(eax, eax)?;
        a.in_(al, 0xe9)?;
        a.mov(dword_ptr(MEMORY_OF_IT + 0x8000), eax)?;
        // An interrupt: the local APIC on, the pin's entry, its level, and what is requested then.
        a.mov(eax, 0x1ff)?;
        a.mov(dword_ptr(0xfee0_00f0u32), eax)?;
        for (register, value) in [(0x10 + 2 * PIN + 1, 0), (0x10 + 2 * PIN, VECTOR)] {
            a.mov(eax, register)?;
            a.mov(dword_ptr(0xfec0_0000u32), eax)?;
            a.mov(eax, value)?;
            a.mov(dword_ptr(0xfec0_0010u32), eax)?;
        }
        a.mov(eax, 1)?;
        a.mov(edx, 0x2000 + PIN)?;
        a.out(dx, al)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(eax, dword_ptr(0xfee0_0200 + VECTOR / 32 * 0x10))?;
        a.test(eax, 1 << (VECTOR % 32))?;
        a.jz(again)?;
        a.mov(eax, dword_ptr(MEMORY_OF_IT + 0x8000))?;
        a.out(0xf4, eax)?;
        halt(a)
    });
    assert_eq!(run(parts(&kernel)).reason, EndReason::DebugExit { status: 0x33 << 1 | 1 });
}

#[test]
fn processors_are_started_without_a_pause_from_page_0() {
    // As test kernels do it: INIT and the start-up IPI right after each other to all others, to code that was copied to 0.
    const COUNT: u32 = 0x7e00;
    let trampoline = assemble(16, 0, |a| {
        a.xor(ax, ax)?;
        a.mov(ds, ax)?;
        a.lock().inc(word_ptr(COUNT))?;
        a.cli()?;
        a.hlt()
    });
    let kernel = kernel(|a| {
        for (at, bytes) in (0u32..).step_by(4).zip(trampoline.chunks(4)) {
            let mut word = [0; 4];
            word[..bytes.len()].copy_from_slice(bytes);
            a.mov(dword_ptr(at), i32::from_le_bytes(word))?;
        }
        a.mov(dword_ptr(COUNT), 1)?;
        for (register, value) in
            [(0xfee0_00f0u32, 0x1ff), (0xfee0_0300, 0xc_4500), (0xfee0_0300, 0xc_4600)]
        {
            a.mov(eax, value)?;
            a.mov(dword_ptr(register), eax)?;
        }
        a.mov(eax, NB_CPUS)?;
        a.mov(edx, SELECTOR)?;
        a.out(dx, ax)?;
        a.inc(edx)?;
        a.xor(eax, eax)?;
        a.in_(al, dx)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.pause()?;
        a.cmp(word_ptr(COUNT), ax)?;
        a.jne(again)?;
        a.out(0xf4, eax)?;
        halt(a)
    });
    for vcpus in [1, 2, 4] {
        let run = run_on_emu(Parts { vcpus, ..parts(&kernel) });
        assert_eq!(run.reason, EndReason::DebugExit { status: vcpus << 1 | 1 });
    }
}

#[test]
fn a_kernel_that_is_entered_as_linux_finds_none_of_it() {
    let code = assemble(64, AT, |a| {
        a.mov(edx, DATA)?;
        a.in_(al, dx)?;
        a.out(0xf4, al)?;
        halt(a)
    });
    let kernel = ElfBuilder::elf64(AT).load(AT, &code).build();
    assert_eq!(run(parts(&kernel)).reason, EndReason::DebugExit { status: 0xff << 1 | 1 });
}
