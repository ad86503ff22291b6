//! System calls, bases, tables, clocks: instructions of operating systems.

use iced_x86::code_asm::*;
use mvm_engine::cpuid::{CpuModel, CpuidTable, Vendor};

use super::has;
use crate::cpu::{Mode, seg};
use crate::fault::vector;
use crate::sys::control::cr4_bits;
use crate::testing::asm::asm;
use crate::testing::guest::{
    CODE, DATA, End, Guest, HANDLERS, STACK, USER, USER_DATA, USER_GPA, USER_STACK, sel,
};

#[test]
fn fsgsbase_instructions() {
    let mut guest = Guest::new();
    let code = asm!(64 at CODE; rdfsbase(rax););
    assert_eq!(guest.run(&code).fault(), (vector::UD, None, CODE), "CR4.FSGSBASE is clear");
    guest.cpu().sys.cr4 |= 1 << 16;
    guest.put64(USER_GPA + 0x8010, 0x1234);
    let code = asm!(64 at USER;
        mov(rax, USER_DATA); wrfsbase(rax); mov(rcx, qword_ptr(0x10).fs()); mov(edx, 0x4000_8010u32);
        wrgsbase(edx); rdgsbase(rbx); mov(rsi, qword_ptr(0).gs()); mov(rax, 0x8000_0000_0000_0000u64);
        wrgsbase(rax);
    );
    let (vector, error, _) = guest.run_user(&code).fault();
    assert_eq!((vector, error), (vector::GP, Some(0)), "not canonical");
    let gpr = guest.cpu().gpr;
    assert_eq!((gpr[1], gpr[3], gpr[6]), (0x1234, 0x4000_8010, 0x1234));
}

#[test]
fn swapgs_changes_the_base() {
    let mut guest = Guest::new();
    guest.cpu().seg[seg::GS].base = 0x1111;
    guest.cpu().sys.msrs.kernel_gs_base = 0xffff_8000_0000_2222;
    assert_eq!(guest.run(&asm!(64 at CODE; swapgs(); hlt();)), End::Halt);
    assert_eq!(guest.cpu().seg[seg::GS].base, 0xffff_8000_0000_2222);
    assert_eq!(guest.run_user(&asm!(64 at USER; swapgs();)).fault(), (vector::GP, Some(0), USER));
}

/// Points the system-call MSRs at DATA + 0x1000 (64 bits) and DATA + 0x2000 (compatibility mode).
fn system_calls(guest: &mut Guest) {
    let msrs = &mut guest.cpu().sys.msrs;
    msrs.star = 0x1b << 48 | 0x08 << 32;
    (msrs.lstar, msrs.cstar, msrs.fmask) = (DATA + 0x1000, DATA + 0x2000, 0x4_0700);
    (msrs.sysenter_cs, msrs.sysenter_esp, msrs.sysenter_eip) = (0x08, STACK, DATA + 0x3000);
}

#[test]
fn syscall_and_sysret() {
    let mut guest = Guest::new();
    system_calls(&mut guest);
    let handler = asm!(64 at DATA + 0x1000; mov(rbx, rcx); mov(rdx, r11); mov(esi, cs); mov(edi, ss); sysretq(););
    guest.put(DATA + 0x1000, &handler);
    let code = asm!(64 at USER; std(); syscall(); mov(eax, cs); mov(ecx, ss); ud2(););
    let frame = guest.run_user(&code).frame();
    let gpr = guest.cpu().gpr;
    assert_eq!((frame.vector, frame.cs, frame.ss), (vector::UD, sel::USER64, sel::USER_DATA));
    assert_eq!((gpr[3], gpr[2] & 0x402, gpr[6], gpr[7]), (USER + 3, 0x402, 0x08, 0x10));
    assert_eq!((gpr[0], gpr[1]), (u64::from(sel::USER64), u64::from(sel::USER_DATA)));
    assert_ne!(frame.flags & 0x400, 0, "flags come back out of R11");
    // Without EFER.SCE there is none.
    guest.cpu().sys.efer &= !1;
    assert_eq!(guest.run_user(&asm!(64 at USER; syscall();)).fault(), (vector::UD, None, USER));
}

#[test]
fn sysret_to_an_address_that_is_not_canonical() {
    for (vendor, level) in [(Vendor::Intel, 0), (Vendor::Amd, 3)] {
        let mut guest = Guest::new();
        system_calls(&mut guest);
        guest.cpu().sys.vendor = vendor;
        let code = asm!(64 at CODE; mov(rcx, 1u64 << 47); mov(r11, 2u64); sysretq(););
        let frame = guest.run(&code).frame();
        assert_eq!((frame.vector, frame.code, frame.cs & 3), (vector::GP, Some(0), level));
    }
}

#[test]
fn syscall_from_compatibility_mode() {
    let mut guest = Guest::new();
    system_calls(&mut guest);
    guest.put(DATA + 0x2000, &asm!(64 at DATA + 0x2000; mov(rbx, rcx); sysret();));
    // There is no name for it in 32-bit code of iced's assembler on all versions: the bytes.
    guest.put(USER_GPA, &[0x0f, 0x05, 0x0f, 0x0b]);
    guest.cpu().sys.vendor = Vendor::Amd;
    guest.user(sel::USER32);
    let frame = guest.go().frame();
    assert_eq!((frame.vector, frame.rip, frame.cs), (vector::UD, USER + 2, sel::USER32));
    assert_eq!(guest.cpu().gpr[3], USER + 2);
    guest.cpu().sys.vendor = Vendor::Intel;
    guest.user(sel::USER32);
    assert_eq!(guest.go().fault(), (vector::UD, None, USER), "64-bit mode only on Intel's");
}

#[test]
fn sysenter_and_sysexit() {
    let mut guest = Guest::new();
    system_calls(&mut guest);
    guest.cpu().sys.vendor = Vendor::Intel;
    guest.put(
        DATA + 0x3000,
        &asm!(64 at DATA + 0x3000;
            mov(edi, cs); mov(rsi, rsp); mov(rdx, USER + 0x100); mov(rcx, USER_STACK - 8); sysexitq();),
    );
    guest.put(USER_GPA + 0x100, &[0x0f, 0x0b]);
    let frame = guest.run_user(&asm!(64 at USER; sysenter();)).frame();
    assert_eq!((frame.vector, frame.rip, frame.rsp), (vector::UD, USER + 0x100, USER_STACK - 8));
    assert_eq!((frame.cs, frame.ss), (sel::USER64, 0x33));
    assert_eq!((guest.cpu().gpr[7], guest.cpu().gpr[6]), (0x08, STACK));
    // No segment: #GP. On AMD's processors there is no SYSENTER in IA-32e mode.
    guest.cpu().sys.msrs.sysenter_cs = 0;
    assert_eq!(guest.run_user(&asm!(64 at USER; sysenter();)).fault(), (vector::GP, Some(0), USER));
    guest.cpu().sys.vendor = Vendor::Amd;
    assert_eq!(guest.run_user(&asm!(64 at USER; sysenter();)).fault(), (vector::UD, None, USER));
    // In 32-bit protected mode both have it.
    let mut guest = Guest::new_32();
    guest.cpu().sys.vendor = Vendor::Amd;
    let msrs = &mut guest.cpu().sys.msrs;
    (msrs.sysenter_cs, msrs.sysenter_esp, msrs.sysenter_eip) = (0x30, STACK, DATA);
    guest.put(
        DATA,
        &asm!(32 at DATA; mov(eax, cs); mov(edx, 0x9000u32); mov(ecx, 0x8_8000u32); sysexit();),
    );
    guest.put(0x9000, &asm!(32 at 0x9000; mov(ebx, cs); cli();));
    let frame = guest.run(&asm!(32 at CODE; sysenter();)).frame();
    assert_eq!(
        (frame.vector, frame.code, frame.cs, frame.rsp),
        (vector::GP, Some(0), 0x43, 0x8_8000)
    );
    assert_eq!((guest.cpu().gpr[0], guest.cpu().gpr[3]), (0x30, 0x43));
}

#[test]
fn iretq_to_compatibility_mode_and_back() {
    let mut guest = Guest::new();
    // The frame's upper RSP bits do not reach 32-bit code, whose registers are 32 bits wide.
    guest.put(
        USER_GPA + 0x100,
        &asm!(32 at USER + 0x100;
            mov(eax, esp); push(0x1234i32); pop(ecx); inc(edx); mov(esi, cs); int(0x80i32);),
    );
    let code = asm!(64 at CODE;
        mov(rdx, 0xffff_ffffu64); push(i32::from(sel::USER_DATA)); mov(rax, USER_STACK); push(rax);
        push(2i32); push(i32::from(sel::USER32)); mov(rax, USER + 0x100); push(rax); iretq();
    );
    let frame = guest.run(&code).frame();
    assert_eq!((frame.vector, frame.cs, frame.ss), (0x80, sel::USER32, sel::USER_DATA));
    let cpu = guest.cpu();
    assert_eq!(cpu.mode, Mode::Code64);
    assert_eq!((cpu.gpr[0], cpu.gpr[1], cpu.gpr[2]), (USER_STACK, 0x1234, 0));
    assert_eq!(cpu.gpr[6], u64::from(sel::USER32));
}

#[test]
fn umip_hides_the_tables() {
    for (umip, fault) in [(false, false), (true, true)] {
        for code in [
            asm!(64 at USER; mov(rbx, USER_DATA); sgdt(ptr(rbx)); ud2();),
            asm!(64 at USER; mov(rbx, USER_DATA); sidt(ptr(rbx)); ud2();),
            asm!(64 at USER; sldt(eax); ud2();),
            asm!(64 at USER; str(eax); ud2();),
            asm!(64 at USER; smsw(eax); ud2();),
        ] {
            let mut guest = Guest::new();
            guest.cpu().sys.cr4 |= if umip { 1 << 11 } else { 0 };
            let expected = if fault { (vector::GP, Some(0)) } else { (vector::UD, None) };
            let (vector, error, _) = guest.run_user(&code).fault();
            assert_eq!((vector, error), expected, "{code:02x?}");
        }
    }
    let mut guest = Guest::new();
    guest.cpu().sys.cr4 |= 1 << 11;
    let code = asm!(64 at CODE; mov(rbx, DATA); sgdt(ptr(rbx)); smsw(rax); str(ecx); hlt(););
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(guest.get::<2>(DATA), [0x7f, 0]);
    assert_eq!(
        (guest.cpu().gpr[0], guest.cpu().gpr[1]),
        (guest.cpu().sys.cr0, u64::from(sel::TSS))
    );
}

#[test]
fn msrs_read_back() {
    let mut guest = Guest::new();
    for (msr, value) in [
        (0x277u32, 0x0105_0406_0007_0406u64),
        (0xc000_0081, 0x0023_0010_0000_0000),
        (0xc000_0082, 0xffff_8000_1234_5678),
        (0xc000_0083, 0x1234),
        (0xc000_0084, 0x4_7700),
        (0xc000_0100, 0x7fff_ffff_0000),
        (0xc000_0101, 0xffff_ffff_0000_0000),
        (0xc000_0102, 1),
        (0xc000_0103, 0x8765_4321),
        (0x174, 0x10),
        (0x175, 0xffff_8000_0000_0000),
        (0x176, 0xffff_8000_0000_1000),
    ] {
        let code = asm!(64 at CODE;
            mov(ecx, msr); mov(eax, value as u32); mov(edx, (value >> 32) as u32); wrmsr();
            mov(rax, -1i64); mov(rdx, -1i64); rdmsr(); hlt();
        );
        assert_eq!(guest.run_kernel(&code), End::Halt, "{msr:#x}");
        assert_eq!(guest.cpu().gpr[2] << 32 | guest.cpu().gpr[0], value, "{msr:#x}");
    }
    // AMD's processors have four counters of events each; these count nothing.
    for vendor in [Vendor::Amd, Vendor::Intel] {
        guest.cpu().sys.vendor = vendor;
        for msr in 0xc001_0000u32..0xc001_0008 {
            let code =
                asm!(64 at CODE; mov(ecx, msr); mov(eax, 7i32); cdq(); wrmsr(); rdmsr(); hlt(););
            let end = guest.run_kernel(&code);
            match vendor {
                Vendor::Amd => assert_eq!((end, guest.reg(0), guest.reg(2)), (End::Halt, 0, 0)),
                _ => assert_eq!(end.fault(), (vector::GP, Some(0), CODE + 11)),
            }
        }
    }
    // What kernels for AMD's processors ask for on each of them, and a bit that they set.
    for (msr, value) in [(0xc001_0015u32, 1u64 << 24), (0xc001_001f, 0), (0xc001_1029, 2)] {
        let code = asm!(64 at CODE;
            mov(ecx, msr); mov(eax, -1); mov(edx, 1 << 14); wrmsr(); rdmsr(); hlt();
        );
        assert_eq!(guest.run_kernel(&code), End::Halt, "{msr:#x}");
        assert_eq!(guest.cpu().gpr[2] << 32 | guest.cpu().gpr[0], value, "{msr:#x}");
    }
    // What there is not, and what is not a value of it.
    for msr in [0x1234_5678u32, 0xc001_1fff, 0x4b56_4d7f, 0x7ff] {
        let code = asm!(64 at CODE; mov(ecx, msr); rdmsr(););
        assert_eq!(guest.run_kernel(&code).fault(), (vector::GP, Some(0), CODE + 5), "{msr:#x}");
        let code = asm!(64 at CODE; mov(ecx, msr); wrmsr(););
        assert_eq!(guest.run_kernel(&code).fault(), (vector::GP, Some(0), CODE + 5), "{msr:#x}");
    }
    for (msr, value) in [
        (0x277u32, 0x02u64),
        (0xc000_0082, 1 << 63),
        (0xc000_0100, 1 << 47),
        (0xc000_0103, 1 << 32),
        (0x175, 1 << 48),
        (0xc000_0080, 1 << 12),
        (0xc000_0080, 0),
        (0x1b, 1 << 62),
        (0x1b, 0xfee0_0400),
    ] {
        let code = asm!(64 at CODE;
            mov(ecx, msr); mov(eax, value as u32); mov(edx, (value >> 32) as u32); wrmsr();
        );
        assert_eq!(guest.run_kernel(&code).fault(), (vector::GP, Some(0), CODE + 15), "{msr:#x}");
    }
    let user = asm!(64 at USER; mov(ecx, 0x10i32); rdmsr(););
    assert_eq!(guest.run_user(&user).fault(), (vector::GP, Some(0), USER + 5));
}

#[test]
fn rdtsc_counts_from_the_offset() {
    let mut guest = Guest::new();
    guest.cpu().sys.set_tsc(0x7000_0000_0000);
    let code = asm!(64 at CODE;
        rdtsc(); mov(ebx, eax); shl(rdx, 32u32); or(rbx, rdx); rdtsc(); shl(rdx, 32u32); or(rax, rdx); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    let (first, second) = (guest.cpu().gpr[3], guest.cpu().gpr[0]);
    assert!(first >= 0x7000_0000_0000 && second >= first, "{first:#x} {second:#x}");
    // CR4.TSD.
    guest.cpu().sys.cr4 |= 4;
    assert_eq!(guest.run_user(&asm!(64 at USER; rdtsc();)).fault(), (vector::GP, Some(0), USER));
}

#[test]
fn rdtscp_and_rdpid() {
    let mut guest = Guest::new();
    guest.cpu().sys.msrs.tsc_aux = 0x0101;
    let code = asm!(64 at USER; mov(rcx, -1i64); rdtscp(); rdpid(rbx); ud2(););
    assert_eq!(guest.run_user(&code).frame().vector, vector::UD);
    assert_eq!((guest.cpu().gpr[1], guest.cpu().gpr[3]), (0x0101, 0x0101));
}

#[test]
fn tsc_adjust_moves_the_counter() {
    let mut guest = Guest::new();
    let code = asm!(64 at CODE;
        // Far ahead by TSC_ADJUST, then back by a write to the counter, which moves TSC_ADJUST too.
        mov(ecx, 0x3bi32); xor(eax, eax); mov(edx, 0x10_0000i32); wrmsr(); rdtsc(); mov(ebx, edx);
        mov(ecx, 0x10i32); xor(eax, eax); xor(edx, edx); wrmsr(); mov(ecx, 0x3bi32); rdmsr();
        mov(esi, edx); rdtsc(); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    let gpr = guest.cpu().gpr;
    assert!(gpr[3] >= 0x10_0000 && gpr[2] < 0x1000, "{gpr:x?}");
    assert!((gpr[6] as u32 as i32) < 0x1000, "{:#x}", gpr[6]);
}

#[test]
fn null_selectors_clear_the_base() {
    let mut guest = Guest::new();
    guest.cpu().seg[seg::FS].base = 0x1234;
    let code =
        asm!(64 at CODE; xor(eax, eax); mov(fs, ax); mov(ecx, 0xc000_0100u32); rdmsr(); hlt(););
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!((guest.cpu().gpr[0], guest.cpu().gpr[2]), (0, 0));
}

#[test]
fn a_return_to_user_code_drops_segments_but_not_their_bases() {
    let mut guest = Guest::new();
    guest.cpu().seg[seg::GS].base = 0x1234;
    guest.put(USER_GPA, &asm!(64 at USER; mov(eax, gs); mov(ecx, ds); mov(rdx, qword_ptr(USER_DATA - 0x1234).gs()); ud2();));
    guest.put64(USER_GPA + 0x8000, 77);
    let code = asm!(64 at CODE;
        mov(edi, i32::from(sel::USER_DATA)); mov(ds, di); push(i32::from(sel::USER_DATA)); mov(rax, USER_STACK); push(rax); push(2i32);
        push(i32::from(sel::USER64)); mov(rax, USER); push(rax); iretq();
    );
    assert_eq!(guest.run(&code).frame().vector, vector::UD);
    assert_eq!((guest.reg(0), guest.reg(1), guest.reg(2)), (0, sel::USER_DATA.into(), 77));
}

#[test]
fn control_registers_have_no_bits_of_features_that_are_not_shown() {
    let features =
        [(11, "umip"), (16, "fsgsbase"), (17, "pcid"), (18, "xsave"), (20, "smep"), (21, "smap")];
    let bits = cr4_bits(&CpuidTable::new(CpuModel::V3, 1, 1_000_000, None));
    for (bit, feature) in features {
        assert_eq!(bits >> bit & 1 != 0, has(feature), "{feature}");
    }
    // Machine checks, 57 bits of addresses, keys for pages, shadow stacks, what nobody knows.
    for bit in [6, 12, 22, 23, 31, 63] {
        let mut guest = Guest::new();
        let code = asm!(64 at CODE; mov(rax, cr4); bts(rax, bit); mov(cr4, rax););
        assert_eq!(guest.run(&code).fault(), (vector::GP, Some(0), CODE + 8), "bit {bit}");
    }
    // Addresses wider than those of CPUID 8000_0008H.
    let mut guest = Guest::new();
    let bits = guest.platform.physical_bits;
    let code = asm!(64 at CODE; mov(rax, cr3); bts(rax, bits as i32); mov(cr3, rax););
    assert_eq!(guest.run(&code).fault(), (vector::GP, Some(0), CODE + 8));
    for bit in [0, 1, 9, bits, 63] {
        let code = asm!(64 at CODE;
            mov(ecx, 0x1bi32); rdmsr(); shl(rdx, 32i32); or(rax, rdx); btc(rax, bit as i32); mov(rdx, rax); shr(rdx, 32i32); wrmsr(); hlt();
        );
        assert_eq!(guest.run_kernel(&code).fault().0, vector::GP, "bit {bit} of IA32_APIC_BASE");
    }
}

#[test]
fn instructions_that_are_not_shown_are_undefined() {
    let codes = [
        asm!(64 at CODE; mov(eax, 2i32); invpcid(rax, xmmword_ptr(rsp - 16)); hlt();),
        asm!(64 at CODE; stac(); clac(); hlt();),
        asm!(64 at CODE; rdpid(rax); hlt();),
    ];
    for (code, at) in codes.iter().zip([5, 0, 0]) {
        let mut guest = Guest::new();
        assert_eq!(guest.run(code), End::Halt, "{code:02x?}");
        let mut guest = Guest::without_features();
        assert_eq!(guest.run(code).fault(), (vector::UD, None, CODE + at), "{code:02x?}");
    }
}

#[test]
fn the_end_of_the_canonical_addresses() {
    // The last instruction is run; the next one is not canonical.
    const LAST: u64 = (1 << 47) - 0x1000;
    for code in
        [asm!(64 at 0; vmcall();), asm!(64 at 0; vmmcall();), asm!(64 at 0; nop(); nop(); nop();)]
    {
        let mut guest = Guest::new();
        guest.map(LAST, 0x60_0000, 3);
        guest.put(0x60_0ffd, &code);
        let frame = guest
            .run(&asm!(64 at CODE; mov(eax, -1i32); mov(rcx, LAST + 0xffd); jmp(rcx);))
            .frame();
        assert_eq!((frame.vector, frame.code, frame.rip), (vector::GP, Some(0), 1 << 47));
    }
}

#[test]
fn cpuid_shows_the_control_registers() {
    let mut guest = Guest::new();
    let code = asm!(64 at CODE; mov(eax, 1i32); cpuid(); hlt(););
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(guest.cpu().gpr[1] >> 27 & 1 != 0, has("xsave"), "OSXSAVE");
    assert_ne!(guest.cpu().gpr[2] & 1 << 9, 0, "APIC");
    guest.cpu().sys.lapic.set_base(0xfee0_0000).unwrap();
    assert_eq!(guest.run_kernel(&code), End::Halt);
    assert_eq!(guest.cpu().gpr[2] & 1 << 9, 0, "a disabled APIC hides");
}

#[test]
fn what_is_not_known_is_undefined_and_no_end() {
    // 3DNow!, XOP, AVX-512, VMX, an encoding of nothing, MONITOR, RDPKRU.
    let codes: [&[u8]; 8] = [
        &[0x0f, 0x0f, 0xc1, 0x9e],
        &[0x8f, 0xe9, 0x78, 0x81, 0xc1],
        &[0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc1],
        &[0x0f, 0x01, 0xc2],
        &[0x0f, 0xff, 0xc0],
        &[0x0f, 0x01, 0xc8],
        &[0x0f, 0x01, 0xee],
        &[0x06],
    ];
    let mut guest = Guest::new();
    for code in codes {
        assert_eq!(guest.run_user(code).fault(), (vector::UD, None, USER), "{code:02x?}");
    }
    // LOCK where it cannot be, and an instruction of more than 15 bytes.
    assert_eq!(guest.run_user(&[0xf0, 0x90]).fault(), (vector::UD, None, USER));
    assert_eq!(guest.run_user(&[0x66; 20]).fault(), (vector::GP, Some(0), USER));
    // The engine lives, the log lines are limited.
    for _ in 0..300 {
        assert_eq!(guest.run_user(&[0x0f, 0xff, 0xc0]).frame().vector, vector::UD);
    }
    assert_eq!(guest.run_kernel(&[0xf4]), End::Halt);
    assert!(guest.cpu().rip < HANDLERS);
}
