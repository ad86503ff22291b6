//! Kernels with a multiboot header.

use iced_x86::code_asm::*;
use mvm_vmm::config::BootProtocol;
use mvm_vmm::testing::{ElfBuilder, section};
use mvm_vmm::{EndReason, Module, Parts};

use crate::guest::*;

const MAGIC: u32 = 0x1bad_b002;
const MAGIC_OF_LOADER: i32 = 0x2bad_b002;
const HAS_ADDRESSES: u32 = 1 << 16;

/// Code comes after the header.
const CODE: u64 = AT + 0x40;

fn header(flags: u32, addresses: [u32; 5]) -> Vec<u8> {
    let checksum = 0u32.wrapping_sub(MAGIC).wrapping_sub(flags);
    let words = [MAGIC, flags, checksum].into_iter().chain(addresses);
    let mut bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
    bytes.resize(0x40, 0);
    bytes
}

/// Header and 32-bit code, as they lie from [`AT`] on.
fn image(flags: u32, code: &[u8]) -> Vec<u8> {
    [&header(flags, [0; 5]), code].concat()
}

fn elf32(code: &[u8]) -> Vec<u8> {
    ElfBuilder::elf32(CODE).load(AT, &image(3, code)).build()
}

/// Shows what it finds and exits.
fn dumper() -> Vec<u8> {
    assemble(32, CODE, |a| {
        save_registers_32(a)?;
        dump(a)?;
        exit(a, 0)
    })
}

/// What every multiboot kernel finds, whatever its form; its information structure.
fn check(dump: &Dump) -> u32 {
    let (magic, info) = dump.entered();
    assert_eq!(magic, 0x2bad_b002);
    let flags = dump.dword(info);
    assert_eq!(flags & 0b10_0100_0101, 0b10_0100_0101);
    assert_eq!(dump.dword(info + 4), 640);
    assert_eq!(dump.text(dump.dword(info + 64)), "mvm");
    info
}

/// The memory map: start, size, type.
fn map(dump: &Dump, info: u32) -> Vec<(u64, u64, u32)> {
    let (len, mut at) = (dump.dword(info + 44), dump.dword(info + 48));
    let end = at + len;
    let mut map = Vec::new();
    while at < end {
        map.push((dump.qword(at + 4), dump.qword(at + 12), dump.dword(at + 20)));
        at += dump.dword(at) + 4;
    }
    assert_eq!(at, end);
    map
}

#[test]
fn a_kernel_of_each_form_finds_what_the_specification_promises() {
    let code = dumper();
    let at = AT as u32;
    let plain = [&header(HAS_ADDRESSES, [at, at, 0, at + 0x8000, CODE as u32])[..], &code].concat();
    // Linked for a high address and entered by it, as some 64-bit kernels are.
    let high = 0xffff_ffff_8000_0000;
    let elf64 = ElfBuilder::elf64(high + CODE).segment(AT, high + AT, &image(3, &code), 0x9000);
    for kernel in [elf32(&code), plain, elf64.build()] {
        let cmdline = "prog a=1  -- b".to_owned();
        let dump = run_dump(Parts { cmdline: cmdline.clone(), ..parts(&kernel) });
        let info = check(&dump);
        assert_eq!(dump.text(dump.dword(info + 16)), cmdline, "not a word more");
        assert_eq!(dump.dword(info + 8), (MEMORY >> 10) as u32 - 1024);
        assert_eq!(dump.dword(info) & 1 << 3, 0, "no modules");
        let map = map(&dump, info);
        assert_eq!(map[0], (0, 0xa_0000, 1));
        assert_eq!(map.last(), Some(&(0x10_0000, MEMORY - 0x10_0000, 1)));
    }
}

#[test]
fn a_kernel_below_1_mib_goes_on_in_real_mode() {
    // At 32 KiB, entry included: protected mode of 16 bits, then none, as small kernels do it that call a BIOS. An interrupt
    // by the table at 0 works there, and what the kernel was told is still where it is said to be.
    const LOW: u64 = 0x8000;
    const ENTRY: u64 = LOW + 0x40;
    const MODE_16: u64 = LOW + 0x80;
    const HANDLER: u32 = 0x1000;
    let flat_16: [u64; 3] = [0, 0x9b00_0000_ffff, 0x9300_0000_ffff];
    let enter = assemble(32, ENTRY, |a| {
        a.push(eax)?;
        a.pop(esi)?;
        a.mov(ecx, dword_ptr(ebx + 16))?;
        a.lgdt(fword_ptr(LOW as u32 + 0x20))?;
        // JMP 8:MODE_16.
        a.db(&[0xea])?;
        a.dd(&[MODE_16 as u32])?;
        a.dw(&[8])
    });
    let mode_16 = assemble(16, MODE_16, |a| {
        a.mov(ax, 16)?;
        a.mov(ds, ax)?;
        a.mov(ss, ax)?;
        a.mov(eax, cr0)?;
        a.and(eax, -2)?;
        a.mov(cr0, eax)?;
        // JMP 0:the next instruction.
        a.db(&[0xea])?;
        a.dw(&[MODE_16 as u16 + 24, 0])?;
        a.xor(ax, ax)?;
        a.mov(ds, ax)?;
        a.mov(ss, ax)?;
        a.mov(sp, 0x7f00)?;
        a.mov(dword_ptr(0x11 * 4), HANDLER as i32)?;
        // Its handler: IRET.
        a.mov(byte_ptr(HANDLER), 0xcf)?;
        a.int(0x11)?;
        // The command line's first byte, if the magic number was right.
        a.mov(al, 1)?;
        a.cmp(esi, MAGIC_OF_LOADER)?;
        let mut bad = a.create_label();
        a.jne(bad)?;
        a.shr(ecx, 4)?;
        a.mov(es, cx)?;
        a.mov(al, byte_ptr(0).es())?;
        a.set_label(&mut bad)?;
        a.out(0xf4, al)?;
        a.hlt()
    });
    assert_eq!(&mode_16[19..24], &[0xea, 0x98, 0x80, 0, 0], "the far jump goes to what follows it");
    let mut image = header(0, [0; 5]);
    image[0x20..0x22].copy_from_slice(&23u16.to_le_bytes());
    image[0x22..0x26].copy_from_slice(&(LOW as u32 + 0x28).to_le_bytes());
    image[0x28..0x40].copy_from_slice(&flat_16.map(u64::to_le_bytes).concat());
    image.extend(enter);
    image.resize(0x80, 0x90);
    image.extend(mode_16);
    let kernel = ElfBuilder::elf32(ENTRY).load(LOW, &image).build();
    let module = Module { content: section(b"NR_CPUS=1").unwrap(), text: "env".into() };
    let run = run(Parts { cmdline: "7".into(), modules: vec![module], ..parts(&kernel) });
    assert_eq!(run.reason, EndReason::DebugExit { status: u32::from(b'7') << 1 | 1 });
    // Not where the loader's own structures are.
    let kernel = ElfBuilder::elf32(0x2_0040).load(0x2_0000, &image).build();
    let refused = refusal(parts(&kernel)).to_string();
    assert!(refused.contains("0x20000"), "{refused}");
}

#[test]
fn memory_above_the_device_hole_is_in_the_map() {
    let parts = Parts { memory: 4 << 30, ..parts(&elf32(&dumper())) };
    let dump = run_dump(parts);
    let info = check(&dump);
    assert_eq!(dump.dword(info + 8), (3 << 20) - 1024);
    assert_eq!(map(&dump, info).last(), Some(&(4 << 30, 1 << 30, 1)));
}

#[test]
fn the_initramfs_is_the_first_module() {
    let code = assemble(32, CODE, |a| {
        save_registers_32(a)?;
        dump(a)?;
        // The module itself.
        a.mov(eax, dword_ptr(ebx + 24))?;
        a.mov(esi, dword_ptr(eax))?;
        a.mov(ecx, dword_ptr(eax + 4))?;
        a.sub(ecx, esi)?;
        a.rep().outsb()?;
        exit(a, 0)
    });
    let module = b"FEATURE=1\nNAME=value\n";
    let initramfs = Some(section(module).unwrap());
    let run = run(Parts { initramfs, ..parts(&elf32(&code)) });
    assert_eq!(run.reason, EndReason::DebugExit { status: 1 });
    let (dumped, content) = run.console.split_at(DUMPED + CMDLINE_DUMPED);
    assert_eq!(content, module);
    let dump = Dump::new(dumped);
    let info = check(&dump);
    assert_eq!((dump.dword(info) & 1 << 3, dump.dword(info + 20)), (1 << 3, 1));
    let entry = dump.dword(info + 24);
    let (start, end) = (dump.dword(entry), dump.dword(entry + 4));
    let kernel_end = AT as u32 + 0x40 + code.len() as u32;
    assert_eq!(start, kernel_end.next_multiple_of(0x1000), "on the page after the kernel");
    assert_eq!(end - start, module.len() as u32);
    assert_eq!(dump.text(dump.dword(entry + 8)), "initrd");
}

#[test]
fn further_modules_follow_the_first_with_their_texts() {
    let module = |content: &[u8], text: &str| {
        let content = section(content).unwrap();
        Module { content, text: text.into() }
    };
    let initramfs = Some(section(&[7; 0x1001]).unwrap());
    let modules = vec![module(&[8; 5], "/boot/b x=1 y"), module(&[9; 4096], "c")];
    let dump = run_dump(Parts { initramfs, modules, ..parts(&elf32(&dumper())) });
    let info = check(&dump);
    assert_eq!(dump.dword(info + 20), 3);
    let list = dump.dword(info + 24);
    let told: Vec<_> = (0..3)
        .map(|index| list + index * 16)
        .map(|at| {
            let (start, end) = (dump.dword(at), dump.dword(at + 4));
            (start, end - start, dump.text(dump.dword(at + 8)))
        })
        .collect();
    let first = told[0].0;
    assert_eq!(first % 0x1000, 0);
    let want = [(0, 0x1001, "initrd"), (0x2000, 5, "/boot/b x=1 y"), (0x3000, 4096, "c")];
    assert_eq!(told, want.map(|(at, len, text)| (first + at, len, text.to_owned())));
}

/// Ends by writing `value` of `bytes` bytes to `port`.
fn writes(port: u16, value: u32, bytes: usize) -> Vec<u8> {
    assemble(32, CODE, |a| {
        a.mov(edx, u32::from(port))?;
        a.mov(eax, value)?;
        match bytes {
            1 => a.out(dx, al)?,
            2 => a.out(dx, ax)?,
            _ => a.out(dx, eax)?,
        }
        halt(a)
    })
}

#[test]
fn every_way_out_has_its_reason_and_exit_code() {
    let end = |code: &[u8]| run(parts(&elf32(code))).reason;
    let exited = |value: u32| EndReason::DebugExit { status: value << 1 | 1 };
    for (code, reason, exit_code) in [
        (writes(0xf4, 0, 1), exited(0), 1),
        (writes(0xf4, 0x21, 4), exited(0x21), 0x43),
        (writes(0x64, 0xfe, 1), EndReason::Reset, 0),
        (writes(0x501, 41, 2), EndReason::PowerOff, 0),
        (writes(0x604, 0x2000, 2), EndReason::PowerOff, 0),
        // Sleep is not asked for: it halts.
        (writes(0x604, 0x1c00, 2), EndReason::HaltedForever, 134),
    ] {
        let seen = end(&code);
        assert_eq!((seen.exit_code(), seen), (exit_code, reason));
    }
    // Without a descriptor table for interrupts.
    let crash = end(&assemble(32, CODE, |a| a.ud2()));
    assert!(matches!(crash, EndReason::TripleFault { .. }), "{crash}");
    assert_eq!(crash.exit_code(), 139);
}

#[test]
fn further_processors_start_by_their_apic_ids() {
    const TRAMPOLINE: u32 = 0x8000;
    const FLAG: u32 = 0x5ff0;
    const APIC: u32 = 0xfee0_0000;
    let trampoline = assemble(16, 0, |a| {
        a.xor(ax, ax)?;
        a.mov(ds, ax)?;
        a.mov(byte_ptr(FLAG), 1)?;
        halt(a)
    });
    let code = assemble(32, CODE, |a| {
        for (at, byte) in (TRAMPOLINE..).zip(&trampoline) {
            a.mov(byte_ptr(at), i32::from(*byte))?;
        }
        for (register, value) in
            [(0xf0, 0x1ff), (0x310, 1 << 24), (0x300, 0x4500), (0x300, 0x4600 | TRAMPOLINE >> 12)]
        {
            a.mov(eax, value)?;
            a.mov(dword_ptr(APIC + register), eax)?;
        }
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.cmp(byte_ptr(FLAG), 1)?;
        a.jne(again)?;
        exit(a, 5)
    });
    let run = run(Parts { vcpus: 2, ..parts(&elf32(&code)) });
    assert_eq!(run.reason, EndReason::DebugExit { status: 11 });
}

#[test]
fn a_kernel_is_refused_if_it_cannot_be_had_as_asked_for() {
    let forced = |kernel: &[u8]| Parts { boot: BootProtocol::Multiboot, ..parts(kernel) };
    let no_header = ElfBuilder::elf32(AT).load(AT, &[0xf4]).build();
    let message = refusal(forced(&no_header)).to_string();
    assert!(message.contains("multiboot") && message.contains("no multiboot header"), "{message}");
    let greedy = ElfBuilder::elf32(CODE).load(AT, &image(1 << 5, &[0xf4])).build();
    let message = refusal(parts(&greedy)).to_string();
    assert!(message.contains("flag 5"), "{message}");
    let message = refusal(parts(&no_header)).to_string();
    assert!(message.contains("neither a multiboot header"), "{message}");
    let large = ElfBuilder::elf32(CODE).segment(AT, AT, &image(0, &[0xf4]), MEMORY);
    let message = refusal(parts(&large.build())).to_string();
    assert_eq!(
        message,
        "16 MiB of guest memory are not enough for this kernel and initramfs; give at least 17 MiB"
    );
}
