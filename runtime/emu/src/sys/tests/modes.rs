//! Real mode, protected mode, 64-bit mode, and the ways between them.

use iced_x86::code_asm::*;

use crate::cpu::{Mode, seg};
use crate::fault::vector;
use crate::testing::asm::asm;
use crate::testing::guest::{
    CODE, DATA, End, GDT, Guest, LDT, PML4, STACK, STACK0, USER, USER_GPA, USER_STACK, sel,
};

#[test]
fn from_real_mode_to_64_bits_and_back_to_real() {
    let guest = Guest::new();
    let tables = guest.get::<0x80>(GDT);
    let mut real = Guest::real();
    real.put(GDT, &tables);
    real.put64(PML4, 0x2_1007);
    real.put64(0x2_1000, 0x2_2007);
    for i in 0..8 {
        real.put64(0x2_2000 + i * 8, i << 21 | 0x83);
    }
    // GDTR image, then far pointers.
    real.put(0x6000, &0x7fu16.to_le_bytes());
    real.put(0x6002, &(GDT as u32).to_le_bytes());
    let code16 = asm!(16 at CODE;
        cli(); xor(ax, ax); mov(ds, ax); lgdt(ptr(0x6000)); mov(eax, cr0); or(eax, 1i32); mov(cr0, eax);
    );
    let jump32 = [0x66, 0xea, 0x00, 0x11, 0, 0, sel::CODE32 as u8, 0];
    real.put(CODE + code16.len() as u64, &jump32);
    real.put(
        0x1100,
        &asm!(32 at 0x1100;
            mov(ax, i32::from(sel::DATA)); mov(ds, ax); mov(ss, ax); mov(esp, STACK as u32);
            mov(eax, cr4); or(eax, 0x20i32); mov(cr4, eax); mov(eax, PML4 as u32); mov(cr3, eax);
            mov(ecx, 0xc000_0080u32); rdmsr(); or(eax, 0x100i32); wrmsr();
            mov(eax, cr0); or(eax, 0x8000_0000u32); mov(cr0, eax); push(8i32); push(0x1200i32); retf();
        ),
    );
    // Compatibility mode through and through, and back down.
    real.put(
        0x1200,
        &asm!(64 at 0x1200;
            mov(r15, 0x1234_5678_9abc_def0u64); mov(ecx, 0xc000_0080u32); rdmsr(); mov(r14, rax);
            push(i32::from(sel::CODE32)); push(0x1300i32); db(&[0x48, 0xcb]);
        ),
    );
    real.put(
        0x1300,
        &asm!(32 at 0x1300;
            mov(eax, cr0); and(eax, 0x7fff_ffffu32); mov(cr0, eax); mov(ecx, 0xc000_0080u32); rdmsr(); mov(esi, eax);
            push(i32::from(sel::CODE16)); push(0x1400i32); retf();
        ),
    );
    let mut code = asm!(16 at 0x1400;
        mov(ax, i32::from(sel::DATA16)); mov(ss, ax); mov(ds, ax); mov(eax, cr0); and(eax, -2i32); mov(cr0, eax);
    );
    code.extend([0xea, 0x00, 0x15, 0x00, 0x00]);
    real.put(0x1400, &code);
    real.put(
        0x1500,
        &asm!(16 at 0x1500; xor(ax, ax); mov(ss, ax); mov(di, cs); mov(bx, 0x77i32); hlt();),
    );
    assert_eq!(real.run(&code16.iter().copied().chain(jump32).collect::<Vec<u8>>()), End::Halt);
    let cpu = real.cpu();
    assert_eq!((cpu.mode, cpu.rip), (Mode::Real, 0x1500 + code_len()));
    assert_eq!((cpu.gpr[15], cpu.gpr[14]), (0x1234_5678_9abc_def0, 0x500));
    assert_eq!(
        (cpu.gpr[6], cpu.gpr[7] & 0xffff, cpu.gpr[3] & 0xffff),
        (0x100, 0, 0x77),
        "LMA is off again"
    );
}

fn code_len() -> u64 {
    asm!(16 at 0x1500; xor(ax, ax); mov(ss, ax); mov(di, cs); mov(bx, 0x77i32); hlt();).len() as u64
}

#[test]
fn real_mode_interrupts_and_segments() {
    let mut guest = Guest::real();
    // INT 0x21 goes through the vector table; IRET comes back with the flags.
    guest.put64(0x21 * 4, 0x0200_0010);
    guest.put(0x2010, &asm!(16 at 0x10; mov(bx, cs); pushf(); pop(cx); iret();));
    let code = asm!(16 at CODE;
        std(); int(0x21i32); pushf(); pop(dx); mov(ax, 0x1234i32); mov(es, ax); mov(word_ptr(0x10).es(), ax);
        mov(si, 0xffffi32); mov(ax, word_ptr(si));
    );
    let frame = guest.run(&code).frame();
    // A word across the segment's end is #GP (SDM vol. 3, 21.1.3: interrupt 13).
    assert_eq!((frame.vector, frame.code, frame.cs), (vector::GP, None, 0));
    assert_eq!((guest.reg(3), guest.reg(1) & 0x400, guest.reg(2) & 0x400), (0x200, 0x400, 0x400));
    assert_eq!(guest.get::<2>(0x1_2350), [0x34, 0x12]);
    // #UD, #DE and privileged instructions in real mode.
    for (code, vector) in [
        (asm!(16 at CODE; ud2();), vector::UD),
        (asm!(16 at CODE; xor(cx, cx); div(cx);), vector::DE),
        (asm!(16 at CODE; ltr(ax);), vector::UD),
        (asm!(16 at CODE; lldt(ax);), vector::UD),
        (asm!(16 at CODE; arpl(ax, cx);), vector::UD),
        (asm!(16 at CODE; lar(ax, cx);), vector::UD),
    ] {
        let mut guest = Guest::real();
        assert_eq!(guest.run(&code).frame().vector, vector, "{code:02x?}");
    }
}

#[test]
fn far_calls_in_real_mode() {
    let mut guest = Guest::real();
    guest.put(0x3_0005, &asm!(16 at 5; mov(bx, cs); retf();));
    let mut code = vec![0x9a, 5, 0, 0, 0x30];
    code.extend(asm!(16 at CODE + 5; mov(dx, cs); hlt();));
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!((guest.reg(3), guest.reg(2), guest.reg(4)), (0x3000, 0, 0x7000));
}

#[test]
fn a_vector_table_that_is_too_short_is_a_triple_fault() {
    let mut guest = Guest::real();
    guest.cpu().sys.idtr.limit = 3;
    let end = guest.run(&asm!(16 at CODE; ud2();));
    assert!(matches!(end, End::Exit(mvm_engine::VmExit::TripleFault(_))), "{end:?}");
}

#[test]
fn unreal_mode_keeps_limits() {
    let mut guest = Guest::real();
    guest.cpu().seg[seg::DS].limit = u32::MAX;
    guest.put64(DATA, 0x55);
    let code = asm!(16 at CODE; mov(esi, DATA as u32); mov(eax, dword_ptr(esi)); xor(bx, bx); mov(ds, bx); mov(ecx, dword_ptr(esi)); hlt(););
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!((guest.reg(0), guest.reg(1)), (0x55, 0x55));
}

#[test]
fn segments_of_32_bit_code() {
    let mut guest = Guest::new_32();
    // A data segment with a base and a limit, and one that expands down.
    guest.put64(GDT + u64::from(sel::FREE), 0x0040_9310_0000_00ff);
    guest.put64(GDT + u64::from(sel::FREE) + 8, 0x0040_9710_0000_00ff);
    guest.put64(DATA + 0xfc, 0x1122_3344);
    let code = asm!(32 at CODE;
        mov(ax, i32::from(sel::FREE)); mov(es, ax); mov(ecx, dword_ptr(0xfc).es()); mov(edx, dword_ptr(0xfd).es());
    );
    let frame = guest.run(&code).frame();
    assert_eq!((frame.vector, frame.code, guest.reg(1)), (vector::GP, Some(0), 0x1122_3344));
    let code = asm!(32 at CODE;
        mov(ax, i32::from(sel::FREE) + 8); mov(es, ax); mov(dword_ptr(0x100).es(), eax); mov(ecx, dword_ptr(0xff).es());
    );
    guest.kernel(sel::CODE32);
    let frame = guest.run(&code).frame();
    assert_eq!((frame.vector, frame.rip), (vector::GP, CODE + code.len() as u64 - 7));
    assert_eq!(guest.get32(DATA + 0x100), u32::from(sel::FREE) + 8);
    // Writes to code, reads through a null selector, a segment that is absent, beyond the table.
    for (code, expected) in [
        (asm!(32 at CODE; mov(dword_ptr(0x100).cs(), eax);), (vector::GP, 0)),
        (
            asm!(32 at CODE; xor(eax, eax); mov(es, ax); mov(eax, dword_ptr(0x100).es());),
            (vector::GP, 0),
        ),
        (asm!(32 at CODE; mov(ax, 0x78i32); mov(es, ax);), (vector::GP, 0x78)),
        (asm!(32 at CODE; mov(ax, 0x80i32); mov(es, ax);), (vector::GP, 0x80)),
        (asm!(32 at CODE; xor(eax, eax); mov(ss, ax);), (vector::GP, 0)),
        (asm!(32 at CODE; mov(ax, 0x23i32); mov(ss, ax);), (vector::GP, 0x20)),
        (asm!(32 at CODE; mov(ax, 0x14i32); mov(es, ax);), (vector::GP, 0x14)),
    ] {
        let mut guest = Guest::new_32();
        let (vector, error, _) = guest.run(&code).fault();
        assert_eq!((vector, error), (expected.0, Some(expected.1)), "{code:02x?}");
    }
}

#[test]
fn protected_mode_stack_switch_and_return() {
    let mut guest = Guest::new_32();
    // IRET to ring 3, which does not get far: its stack is checked, its selectors are dropped.
    guest
        .put(0x9000, &asm!(32 at 0x9000; mov(ebx, cs); mov(ecx, ds); push(0x77i32); int(0x80i32);));
    let code = asm!(32 at CODE;
        push(i32::from(sel::USER_DATA)); push(0x8_0000i32); push(2i32); push(i32::from(sel::USER32)); push(0x9000i32); iretd();
    );
    let frame = guest.run(&code).frame();
    assert_eq!(
        (frame.vector, frame.cs, frame.ss, frame.rsp),
        (0x80, sel::USER32, sel::USER_DATA, 0x7_fffc)
    );
    assert_eq!(
        (guest.reg(3), guest.reg(1)),
        (u64::from(sel::USER32), 0),
        "DS of level 0 became null"
    );
    assert_eq!(frame.at, STACK0 - 20);
    assert_eq!(guest.get32(0x7_fffc), 0x77);
}

#[test]
fn local_descriptors() {
    let mut guest = Guest::new();
    guest.put64(LDT + 8, 0x00cf_f300_0000_ffff);
    guest.put64(LDT + 16, 0x0000_e800_0008_0000 | 0x1000);
    let code = asm!(64 at CODE; mov(eax, i32::from(sel::LDT)); lldt(ax); sldt(ecx); mov(eax, 0xfi32); mov(fs, ax); mov(edx, fs); hlt(););
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!((guest.reg(1), guest.reg(2)), (u64::from(sel::LDT), 0xf));
    assert_ne!(guest.get64(LDT + 8) & 1 << 40, 0, "accessed");
    // Beyond its limit; not an LDT; a null one takes all away.
    let code = asm!(64 at CODE; mov(eax, 0x1004i32); mov(fs, ax););
    assert_eq!(guest.run_kernel(&code).fault(), (vector::GP, Some(0x1004), CODE + 5));
    let code = asm!(64 at CODE; mov(eax, i32::from(sel::TSS)); lldt(ax););
    assert_eq!(guest.run_kernel(&code).fault(), (vector::GP, Some(sel::TSS.into()), CODE + 5));
    let code = asm!(64 at CODE; xor(eax, eax); lldt(ax); mov(eax, 0xci32); mov(fs, ax););
    assert_eq!(guest.run_kernel(&code).frame().code, Some(0xc));
}

#[test]
fn task_register() {
    let mut guest = Guest::new();
    let code = asm!(64 at CODE; mov(eax, i32::from(sel::TSS)); ltr(ax); str(ecx); hlt(););
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!((guest.reg(1), guest.get64(GDT + 0x40) >> 40 & 0xff), (0x40, 0x8b), "busy");
    assert_eq!(guest.run_kernel(&code).fault(), (vector::GP, Some(0x40), CODE + 5), "it is busy");
    let code = asm!(64 at CODE; xor(eax, eax); ltr(ax););
    assert_eq!(guest.run_kernel(&code).fault(), (vector::GP, Some(0), CODE + 2));
}

#[test]
fn the_io_bitmap_opens_ports() {
    let mut guest = Guest::new();
    guest.cpu().sys.tr.limit = 0x2068;
    guest.put(crate::testing::guest::TSS + 0x68, &[0xff; 0x2001]);
    // Ports 0x60 and 0x80 to 0x83.
    guest.put(crate::testing::guest::TSS + 0x68 + 0x60 / 8, &[0xfe]);
    guest.put(crate::testing::guest::TSS + 0x68 + 0x80 / 8, &[0xf0]);
    let code = asm!(64 at USER; in_(al, 0x60i32); mov(ebx, eax); in_(eax, 0x80i32); mov(dx, 0x81i32); in_(eax, dx););
    assert_eq!(guest.run_user(&code).fault(), (vector::GP, Some(0), USER + code.len() as u64 - 1));
    assert_eq!((guest.reg(3) & 0xff, guest.reg(0)), (0x60, 0x8080_8080));
    // IOPL opens all; so does nothing else.
    let code = asm!(64 at USER; mov(dx, 0x3f8i32); out(dx, al); ud2(););
    assert_eq!(guest.run_user(&code).frame().vector, vector::GP);
    guest.put(USER_GPA, &code);
    guest.user(sel::USER64);
    guest.cpu().set_rflags(0x3002);
    assert_eq!(guest.go().frame().vector, vector::UD);
    assert_eq!(crate::testing::guest::lock(&guest.bus.port_writes)[..], [(0x3f8, vec![0x80])]);
    // The last port, and a bitmap that ends before its byte.
    guest.put(crate::testing::guest::TSS + 0x68 + 0x1fff, &[0]);
    let code = asm!(64 at USER; mov(dx, 0xffffi32); in_(al, dx); ud2(););
    assert_eq!(guest.run_user(&code).frame().vector, vector::UD);
    guest.cpu().sys.tr.limit = 0x2067;
    assert_eq!(guest.run_user(&code).frame().vector, vector::GP);
}

#[test]
fn call_gates_change_the_level() {
    let mut guest = Guest::new();
    let gate = GDT + u64::from(sel::FREE);
    guest.put64(gate, 0x1000 | 0x08 << 16 | 0xec00 << 32 | 0x10 << 48);
    guest.put64(gate + 8, 0);
    guest.put(
        DATA + 0x1000,
        &asm!(64 at DATA + 0x1000; mov(ebx, cs); mov(esi, ss); mov(rdi, rsp); db(&[0x48, 0xcb]);),
    );
    guest.put64(USER_GPA + 0x8000, 0);
    guest.put(USER_GPA + 0x8008, &(sel::FREE | 3).to_le_bytes());
    let code = asm!(64 at USER; mov(rax, USER + 0x8000); db(&[0x48, 0xff, 0x18]); mov(ecx, cs); mov(rbp, rsp); ud2(););
    let frame = guest.run_user(&code).frame();
    assert_eq!((frame.vector, frame.cs), (vector::UD, sel::USER64));
    assert_eq!((guest.reg(3), guest.reg(6), guest.reg(7)), (0x08, 0, STACK0 - 32));
    assert_eq!((guest.reg(1), guest.reg(5)), (u64::from(sel::USER64), USER_STACK));
    // A gate of level 0 is out of reach.
    guest.put64(gate, 0x1000 | 0x08 << 16 | 0x8c00 << 32 | 0x10 << 48);
    assert_eq!(guest.run_user(&code).frame().code, Some(sel::FREE.into()));
}

#[test]
fn lar_lsl_verr_verw() {
    let mut guest = Guest::new();
    let code = asm!(64 at USER;
        mov(eax, 0x23i32); lar(ebx, eax); setz(cl); lsl(edx, eax); mov(eax, 8i32); lar(esi, eax); setz(ch);
        mov(eax, 0x2bi32); verr(ax); setz(dil); verw(ax); setz(bpl); mov(eax, 0xfff8i32); verr(ax); setz(r8b);
        mov(eax, 0x43i32); verr(ax); setz(r9b); ud2();
    );
    guest.cpu().gpr[1] = 0;
    assert_eq!(guest.run_user(&code).frame().vector, vector::UD);
    assert_eq!((guest.reg(3), guest.reg(2)), (0xcf_f300, 0xffff_ffff));
    assert_eq!(guest.reg(1) & 0xffff, 1, "level 0 is out of sight");
    let gpr = guest.cpu().gpr;
    assert_eq!((gpr[7] & 1, gpr[5] & 1, gpr[8] & 1, gpr[9] & 1), (1, 0, 0, 0));
}

#[test]
fn iret_faults_leave_everything() {
    // (CS, SS, RIP) of the frame, what is raised.
    for (cs_, ss_, rip_, expected) in [
        (0u64, 0x10u64, 0x1000u64, (vector::GP, 0u64)),
        (0x10, 0x10, 0x1000, (vector::GP, 0x10)),
        (0x78, 0x10, 0x1000, (vector::GP, 0x78)),
        (0x08, 0x10, 1 << 47, (vector::GP, 0)),
        (0x2b, 0x10, 0x1000, (vector::GP, 0x10)),
        (0x2b, 0, 0x1000, (vector::GP, 0)),
        (0x09, 0x10, 0x1000, (vector::GP, 0x08)),
    ] {
        let mut guest = Guest::new();
        let code = asm!(64 at CODE;
            push(i32::from(ss_ as i16)); mov(rax, 0x9000u64); push(rax); push(2i32); push(cs_ as i32); mov(rax, rip_);
            push(rax); iretq();
        );
        let frame = guest.run(&code).frame();
        let at = CODE + code.len() as u64 - 2;
        assert_eq!((frame.vector, frame.code, frame.rip), (expected.0, Some(expected.1), at));
        assert_eq!((frame.rsp, frame.cs, frame.ss), (STACK - 40, sel::CODE, sel::DATA));
    }
    // NT in 64-bit mode.
    let code = asm!(64 at CODE; pushfq(); or(dword_ptr(rsp), 0x4000i32); popfq(); iretq(););
    assert_eq!(Guest::new().run(&code).frame().vector, vector::GP);
}

#[test]
fn iret_within_a_level_loads_the_stack_in_64_bit_mode() {
    let mut guest = Guest::new();
    // With a null SS, as after an interrupt from outside.
    let code = asm!(64 at CODE;
        xor(eax, eax); push(rax); mov(rax, STACK - 0x100); push(rax); push(2i32); push(8i32); mov(rax, CODE + 0x40); push(rax); iretq();
    );
    guest.put(CODE + 0x40, &asm!(64 at CODE + 0x40; mov(ebx, ss); mov(rcx, rsp); hlt();));
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!((guest.reg(3), guest.reg(1)), (0, STACK - 0x100));
}
