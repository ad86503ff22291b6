//! Exceptions: what they push and what they leave alone, double and triple faults, IST.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use iced_x86::code_asm::*;
use mvm_engine::{Vcpu as _, VmExit};

use crate::fault::vector;
use crate::testing::asm::asm;
use crate::testing::guest::{
    CODE, DATA, End, GDT, Guest, HANDLERS, IDT, IST, STACK, STACK0, TSS, USER, USER_DATA, USER_GPA,
    USER_STACK, sel,
};

/// An address that nothing is mapped at.
const NOWHERE: u64 = 0x7000_0000;

#[test]
fn registers_are_unchanged_at_a_fault() {
    // Instructions that would change registers before or after the access that faults.
    let codes = [
        asm!(64 at CODE; add(rax, qword_ptr(rbx));),
        asm!(64 at CODE; add(qword_ptr(rbx), rax);),
        asm!(64 at CODE; xchg(qword_ptr(rbx), rax);),
        asm!(64 at CODE; lock().xadd(qword_ptr(rbx), rax);),
        asm!(64 at CODE; lock().cmpxchg(qword_ptr(rbx), rcx);),
        asm!(64 at CODE; pop(qword_ptr(rbx));),
        asm!(64 at CODE; push(qword_ptr(rbx));),
        asm!(64 at CODE; call(qword_ptr(rbx));),
        asm!(64 at CODE; movsq();),
        asm!(64 at CODE; lodsq();),
        asm!(64 at CODE; scasq();),
        asm!(64 at CODE; cmpsq();),
        asm!(64 at CODE; div(qword_ptr(rbx));),
        asm!(64 at CODE; mul(qword_ptr(rbx));),
        asm!(64 at CODE; rcl(qword_ptr(rbx), 1i32);),
        asm!(64 at CODE; shld(qword_ptr(rbx), rax, cl);),
        asm!(64 at CODE; leave();),
        asm!(64 at CODE; lss(rax, fword_ptr(rbx));),
        asm!(64 at CODE; movups(xmm0, xmmword_ptr(rbx));),
        asm!(64 at CODE; addps(xmm0, xmmword_ptr(rbx));),
        asm!(64 at CODE; fld(qword_ptr(rbx));),
        asm!(64 at CODE; fstp(qword_ptr(rbx));),
        asm!(64 at CODE; cmovne(rax, qword_ptr(rbx));),
        asm!(64 at CODE; bts(qword_ptr(rbx), rcx);),
        asm!(64 at CODE; xlatb();),
        asm!(64 at CODE; insb();),
        asm!(64 at CODE; outsb();),
    ];
    for code in codes {
        let mut guest = Guest::new();
        let mut gpr = guest.cpu().gpr;
        for (i, register) in gpr[..16].iter_mut().enumerate().filter(|(i, _)| *i != 4) {
            *register = 0x0101_0101_0101_0101 * i as u64;
        }
        (gpr[3], gpr[5], gpr[6], gpr[7], gpr[1]) = (NOWHERE, NOWHERE, NOWHERE, NOWHERE, 3);
        guest.cpu().gpr = gpr;
        guest.cpu().vec.ymm[0].0 = [1, 2, 3, 4];
        guest.cpu().set_rflags(0x8d7);
        let frame = guest.run(&code).frame();
        assert_eq!((frame.vector, frame.rip, frame.rsp), (vector::PF, CODE, STACK), "{code:02x?}");
        assert_eq!(frame.flags & 0xffff, 0x8d7, "{code:02x?}");
        assert_eq!(guest.cpu().sys.cr2 & !0xff, NOWHERE, "{code:02x?}");
        let after = guest.cpu().gpr;
        for i in (0..16).filter(|i| *i != 4) {
            assert_eq!(after[i], gpr[i], "register {i} after {code:02x?}");
        }
        assert_eq!(guest.cpu().vec.ymm[0].0, [1, 2, 3, 4]);
    }
}

#[test]
fn repeats_stop_where_they_fault() {
    let mut guest = Guest::new();
    // To the end of RAM, beyond which nothing is mapped.
    let cpu = guest.cpu();
    (cpu.gpr[1], cpu.gpr[6], cpu.gpr[7]) = (100, DATA, (16 << 20) - 40);
    let frame = guest.run(&asm!(64 at CODE; rep().movsb();)).frame();
    assert_eq!((frame.vector, frame.code, frame.rip), (vector::PF, Some(2), CODE));
    assert_eq!((guest.reg(1), guest.reg(6), guest.reg(7)), (60, DATA + 40, 16 << 20));
    assert_eq!(guest.cpu().sys.cr2, 16 << 20);
}

#[test]
fn faults_in_the_middle_of_a_block_have_their_own_rip() {
    let mut guest = Guest::new();
    guest.cpu().gpr[3] = NOWHERE + 8;
    let code = asm!(64 at CODE; mov(eax, 1i32); inc(eax); mov(rcx, qword_ptr(rbx)); inc(eax););
    assert_eq!(guest.run(&code).fault(), (vector::PF, Some(0), CODE + 7));
    assert_eq!((guest.reg(0), guest.cpu().sys.cr2), (2, NOWHERE + 8));
    // Fetch: of a jump's target, and of the second page of an instruction.
    let code = asm!(64 at CODE; mov(rax, NOWHERE); jmp(rax););
    assert_eq!(guest.run_kernel(&code).fault(), (vector::PF, Some(0x10), NOWHERE));
    let last = USER_STACK - 2;
    guest.put(USER_GPA + 0x1_fffe, &[0x48, 0xb8]);
    guest.user(sel::USER64);
    guest.cpu().rip = last;
    assert_eq!(guest.go().fault(), (vector::PF, Some(0x14), last));
    assert_eq!(guest.cpu().sys.cr2, USER_STACK);
    // A jump to what is not canonical: #GP at the jump or at its target.
    let code = asm!(64 at CODE; mov(rax, 1u64 << 47); jmp(rax););
    assert_eq!(guest.run_kernel(&code).frame().vector, vector::GP);
}

#[test]
fn exceptions_of_user_code_change_the_stack() {
    let mut guest = Guest::new();
    let frame = guest.run_user(&asm!(64 at USER; xor(ecx, ecx); div(ecx);)).frame();
    assert_eq!((frame.vector, frame.code, frame.rip), (vector::DE, None, USER + 2));
    assert_eq!((frame.cs, frame.ss, frame.rsp), (sel::USER64, sel::USER_DATA, USER_STACK));
    assert_eq!(frame.at, STACK0 - 40);
    assert_eq!(guest.cpu().seg[crate::cpu::seg::SS].selector, 0, "SS is null");
    // An error code makes the frame six words; the stack is aligned to 16 before.
    guest.put64(TSS + 4, STACK0 - 3);
    let frame = guest.run_user(&asm!(64 at USER; cli();)).frame();
    assert_eq!((frame.vector, frame.code, frame.at), (vector::GP, Some(0), STACK0 - 16 - 40));
}

#[test]
fn ist_entries_have_their_stacks() {
    let mut guest = Guest::new();
    for ist in 1..8u64 {
        guest.gate(vector::UD, HANDLERS + 6 * 16, 0, ist);
        let frame = guest.run_kernel(&asm!(64 at CODE; ud2();)).frame();
        assert_eq!(
            (frame.vector, frame.at, frame.rsp),
            (vector::UD, IST + ist * 0x1000 - 40, STACK)
        );
        assert_eq!(
            guest.cpu().seg[crate::cpu::seg::SS].selector,
            sel::DATA,
            "same level: SS stays"
        );
        let frame = guest.run_user(&asm!(64 at USER; ud2();)).frame();
        assert_eq!((frame.at, frame.rsp), (IST + ist * 0x1000 - 40, USER_STACK));
    }
    // A TSS that is too short: #TS with its selector.
    guest.cpu().sys.tr.limit = 0x23;
    assert_eq!(guest.run_kernel(&asm!(64 at CODE; ud2();)).fault(), (vector::TS, Some(0x41), CODE));
}

#[test]
fn gates_are_checked() {
    let entry = IDT + 0x80 * 16;
    let good = Guest::new().get64(entry);
    for (gate, upper, expected) in [
        // Absent, of another type, of level 0, with code segments that are none.
        (good & !(1 << 47), 0, (vector::NP, 0x402u64)),
        (good & !(0xf << 40) | 5 << 40, 0, (vector::GP, 0x402)),
        (good & !(0xf << 40) | 6 << 40, 0, (vector::GP, 0x402)),
        (good & !(3 << 45), 0, (vector::GP, 0x402)),
        (good & !(0xffff << 16), 0, (vector::GP, 0)),
        (good & !(0xffff << 16) | 0x10 << 16, 0, (vector::GP, 0x10)),
        (good & !(0xffff << 16) | 0x30 << 16, 0, (vector::GP, 0x30)),
        (good & !(0xffff << 16) | 0x88 << 16, 0, (vector::GP, 0x88)),
        (good, 0x8000, (vector::GP, 0)),
    ] {
        let mut guest = Guest::new();
        guest.put64(entry, gate);
        guest.put64(entry + 8, upper);
        let fault = guest.run_user(&asm!(64 at USER; int(0x80i32);)).fault();
        assert_eq!(fault, (expected.0, Some(expected.1), USER), "{gate:#x} {upper:#x}");
    }
    // Beyond the table's limit.
    let mut guest = Guest::new();
    guest.cpu().sys.idtr.limit = 0x80 * 16 - 1;
    assert_eq!(
        guest.run_user(&asm!(64 at USER; int(0x80i32);)).fault(),
        (vector::GP, Some(0x402), USER)
    );
    // A trap gate leaves IF on.
    let mut guest = Guest::new();
    guest.put64(entry, good | 1 << 40);
    guest.put(HANDLERS + 0x800, &asm!(64 at 0; cli(); hlt();));
    guest.handler(0x80, &asm!(64 at 0; pushfq(); pop(rax); cli(); hlt();));
    let at = guest.get64(entry);
    guest.put64(entry, at | 1 << 40);
    guest.cpu().set_rflags(0x202);
    assert_eq!(guest.run(&asm!(64 at CODE; int(0x80i32);)), End::Halt);
    assert_ne!(guest.reg(0) & 0x200, 0);
}

#[test]
fn double_faults() {
    // #PF while #PF is delivered: no handler for it that can be reached.
    let mut guest = Guest::new();
    guest.gate(vector::DF, HANDLERS + 8 * 16, 0, 1);
    let code = asm!(64 at CODE; mov(rsp, NOWHERE); mov(eax, dword_ptr(rsp + 8)););
    let frame = guest.run(&code).frame();
    assert_eq!(
        (frame.vector, frame.code, frame.rip, frame.rsp),
        (vector::DF, Some(0), CODE + 10, NOWHERE)
    );
    assert_eq!(guest.cpu().sys.cr2, NOWHERE - 8, "of the second fault");
    // #GP while #GP is delivered; #PF while #GP is: #PF alone... which then is delivered on its own stack.
    let mut guest = Guest::new();
    guest.gate(vector::DF, HANDLERS + 8 * 16, 0, 1);
    guest.put64(IDT + 13 * 16, 0);
    assert_eq!(guest.run(&asm!(64 at CODE; mov(cr8, rsp);)).fault(), (vector::DF, Some(0), CODE));
    let mut guest = Guest::new();
    guest.gate(vector::PF, HANDLERS + 14 * 16, 0, 2);
    guest.gate(vector::DF, HANDLERS + 8 * 16, 0, 1);
    let fault = guest.run(&asm!(64 at CODE; mov(rsp, NOWHERE); mov(cr8, rsp);)).fault();
    assert_eq!(fault, (vector::PF, Some(2), CODE + 10), "contributory, then page fault: in series");
    // #UD, then #NP about its gate: in series as well, with EXT.
    let mut guest = Guest::new();
    guest.put64(IDT + 6 * 16, guest.get64(IDT + 6 * 16) & !(1 << 47));
    assert_eq!(guest.run(&asm!(64 at CODE; ud2();)).fault(), (vector::NP, Some(6 << 3 | 3), CODE));
}

#[test]
fn triple_faults_end_the_run() {
    let mut guest = Guest::new();
    let code = asm!(64 at CODE; mov(rsp, NOWHERE); nop(); ud2(););
    let End::Exit(VmExit::TripleFault(fault)) = guest.run(&code) else { panic!("no triple fault") };
    assert_eq!((fault.vcpu, fault.rip), (0, CODE + 11));
    assert_eq!(fault.bytes[..2], [0x0f, 0x0b]);
    assert!(fault.registers.contains("rsp=0x70000000"), "{fault}");
    // With an empty IDT, as systems reset a machine.
    let mut guest = Guest::new();
    guest.cpu().sys.idtr.limit = 0;
    assert!(matches!(guest.run(&[0xcc]), End::Exit(VmExit::TripleFault(_))));
    // And with everything a guest can point to nowhere.
    for (gdt, idt, no_tables) in [
        (NOWHERE, IDT, false),
        (GDT, 1 << 63, false),
        (1 << 62, u64::MAX - 3, false),
        (GDT, IDT, true),
    ] {
        let mut guest = Guest::new();
        guest.cpu().sys.gdtr.base = gdt;
        guest.cpu().sys.idtr.base = idt;
        if no_tables {
            guest.cpu().sys.cr3 = 0x3fff_ffff_f000;
        }
        let end = guest.run_kernel(&asm!(64 at CODE; ud2();));
        assert!(matches!(end, End::Exit(VmExit::TripleFault(_))), "{end:?}");
    }
}

#[test]
fn stack_faults_of_addresses_that_are_not_canonical() {
    let mut guest = Guest::new();
    guest.gate(vector::SS, HANDLERS + 12 * 16, 0, 1);
    for code in [
        asm!(64 at CODE; mov(rsp, 1u64 << 62); push(rax);),
        asm!(64 at CODE; mov(rsp, 1u64 << 47); pop(rax);),
        asm!(64 at CODE; mov(rbp, 1u64 << 62); mov(eax, dword_ptr(rbp));),
        asm!(64 at CODE; mov(rsp, 1u64 << 47); iretq();),
        asm!(64 at CODE; mov(rsp, 1u64 << 62); pushfq();),
    ] {
        assert_eq!(
            guest.run_kernel(&code).fault(),
            (vector::SS, Some(0), CODE + 10),
            "{code:02x?}"
        );
    }
}

#[test]
fn alignment_is_not_checked_without_eflags_ac() {
    let mut guest = Guest::new();
    let code = asm!(64 at USER; mov(rbx, USER + 0x8001); mov(eax, dword_ptr(rbx)); ud2(););
    guest.cpu().sys.cr0 |= 1 << 18;
    assert_eq!(guest.run_user(&code).frame().vector, vector::UD, "EFLAGS.AC is clear");
    // Set, but not CR0.AM.
    let mut guest = Guest::new();
    assert_eq!(guest.run_user(&with_ac(&code)).frame().vector, vector::UD, "CR0.AM is clear");
    // Both, in the kernel.
    let code = asm!(64 at CODE; mov(rbx, DATA + 1); mov(eax, dword_ptr(rbx)); hlt(););
    guest.cpu().sys.cr0 |= 1 << 18;
    assert_eq!(guest.run_kernel(&with_ac(&code)), End::Halt);
}

/// `code`, which does not depend on where it is, after EFLAGS.AC was set.
fn with_ac(code: &[u8]) -> Vec<u8> {
    let mut all = asm!(64 at CODE; pushfq(); or(dword_ptr(rsp), 1 << 18); popfq(););
    all.extend(code);
    all
}

/// What user code ends with, from its data page plus `offset` in rbx, with alignment checks on.
fn aligned(guest: &mut Guest, offset: u64, code: &[u8]) -> u8 {
    let mut all = asm!(64 at USER; mov(rbx, USER_DATA + offset); mov(rsi, rbx); mov(rdi, rbx););
    all.extend(code);
    guest.cpu().sys.cr0 |= 1 << 18;
    let frame = guest.run_user(&with_ac(&all)).frame();
    if frame.vector == vector::AC {
        assert_eq!((frame.code, frame.flags >> 18 & 1), (Some(0), 1));
        assert_eq!(frame.cs, sel::USER64);
    }
    frame.vector
}

#[test]
fn alignment_checks() {
    let mut guest = Guest::new();
    // The code, and what its address must be a multiple of.
    let cases: &[(Vec<u8>, u64)] = &[
        (asm!(64 at 0; mov(al, byte_ptr(rbx)); ud2();), 1),
        (asm!(64 at 0; mov(ax, word_ptr(rbx)); ud2();), 2),
        (asm!(64 at 0; mov(eax, dword_ptr(rbx)); ud2();), 4),
        (asm!(64 at 0; mov(rax, qword_ptr(rbx)); ud2();), 8),
        (asm!(64 at 0; mov(qword_ptr(rbx), rax); ud2();), 8),
        (asm!(64 at 0; add(word_ptr(rbx), ax); ud2();), 2),
        (asm!(64 at 0; lock().add(dword_ptr(rbx), eax); ud2();), 4),
        (asm!(64 at 0; cmpxchg8b(qword_ptr(rbx)); ud2();), 8),
        (asm!(64 at 0; movsq(); ud2();), 8),
        (asm!(64 at 0; mov(ecx, 3); rep().stosd(); ud2();), 4),
        (asm!(64 at 0; mov(ecx, 3); rep().movsw(); ud2();), 2),
        (asm!(64 at 0; scasd(); ud2();), 4),
        (asm!(64 at 0; mov(rsp, rbx); push(rax); ud2();), 8),
        (asm!(64 at 0; mov(rsp, rbx); pushfq(); ud2();), 8),
        (asm!(64 at 0; mov(rsp, rbx); pop(rax); ud2();), 8),
        (asm!(64 at 0; fld(dword_ptr(rbx)); ud2();), 4),
        (asm!(64 at 0; fld(qword_ptr(rbx)); ud2();), 8),
        (asm!(64 at 0; fld(tbyte_ptr(rbx)); ud2();), 8),
        (asm!(64 at 0; fnstcw(word_ptr(rbx)); ud2();), 2),
        (asm!(64 at 0; fnstenv(ptr(rbx)); ud2();), 4),
        (asm!(64 at 0; movss(xmm0, dword_ptr(rbx)); ud2();), 4),
        (asm!(64 at 0; movsd_2(xmm0, qword_ptr(rbx)); ud2();), 8),
        (asm!(64 at 0; movups(xmm0, xmmword_ptr(rbx)); ud2();), 1),
        (asm!(64 at 0; movdqu(xmmword_ptr(rbx), xmm0); ud2();), 1),
        (asm!(64 at 0; maskmovdqu(xmm0, xmm1); ud2();), 8),
        (asm!(64 at 0; stmxcsr(dword_ptr(rbx)); ud2();), 4),
    ];
    for (i, (code, multiple)) in cases.iter().enumerate() {
        // Far from the page's end, and across it where that is not aligned.
        for offset in (0..16).chain(0xff8..0x1000) {
            let expected = if offset % multiple == 0 { vector::UD } else { vector::AC };
            assert_eq!(aligned(&mut guest, offset, code), expected, "case {i}, offset {offset}");
        }
    }
    // What demands its alignment in any case.
    let gp = [
        asm!(64 at 0; movaps(xmm0, xmmword_ptr(rbx)); ud2();),
        asm!(64 at 0; lock().cmpxchg16b(xmmword_ptr(rbx)); ud2();),
    ];
    for code in gp {
        assert_eq!(aligned(&mut guest, 1, &code), vector::GP);
        assert_eq!(aligned(&mut guest, 0, &code), vector::UD);
    }
    let fxsave = asm!(64 at 0; fxsave(ptr(rbx)); ud2(););
    for (offset, vector) in [(0, vector::UD), (1, vector::AC), (4, vector::GP), (16, vector::UD)] {
        assert_eq!(aligned(&mut guest, offset, &fxsave), vector);
    }
    // Before the page fault.
    let nowhere = asm!(64 at 0; mov(rbx, NOWHERE + 1); mov(eax, dword_ptr(rbx)); ud2(););
    assert_eq!(aligned(&mut guest, 0, &nowhere), vector::AC);
}

/// Handlers at level 3 have no stack of their own: with one that is not aligned, each delivery of #AC is an #AC.
#[test]
fn a_guest_that_makes_exceptions_without_end_can_be_stopped() {
    let mut guest = Guest::new_32();
    let handler = HANDLERS + u64::from(vector::AC) * 16;
    let gate =
        handler & 0xffff | u64::from(sel::USER32) << 16 | 0x8e00 << 32 | (handler >> 16) << 48;
    guest.put64(IDT + u64::from(vector::AC) * 8, gate);
    guest.put(CODE, &asm!(32 at CODE; mov(eax, dword_ptr(DATA as u32 + 1)); ud2();));
    guest.user(sel::USER32);
    let cpu = guest.cpu();
    (cpu.rip, cpu.gpr[4]) = (CODE, STACK - 3);
    cpu.sys.cr0 |= 1 << 18;
    cpu.set_rflags(2 | 1 << 18);
    cpu.update_mode();
    let (kick, over) = (guest.vcpu.kicker(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                kick.kick();
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        while guest.cpu().sys.deferred.is_none() && guest.run_vcpu() == VmExit::Kicked {}
        over.store(true, Ordering::SeqCst);
    });
    assert!(guest.cpu().sys.deferred.is_some());
    assert_eq!(guest.cpu().rip, CODE, "nothing has run");
    // With a better stack it comes to its handler, whose HLT is not for level 3.
    guest.cpu().gpr[4] = STACK;
    while guest.cpu().cpl == 3 {
        guest.run_vcpu();
    }
    assert_eq!(guest.get32(STACK - 16), 0, "#AC has an error code");
    assert_eq!(u64::from(guest.get32(STACK - 12)), CODE);
    assert_eq!(u64::from(guest.get32(STACK0 - 20)), handler, "of #GP");
}

#[test]
fn alignment_checks_end_with_the_flag() {
    let mut guest = Guest::new();
    // Translations made before are of no use while it is set, and good again afterwards.
    let code = asm!(64 at 0;
        mov(eax, dword_ptr(rbx + 1));
        pushfq(); and(dword_ptr(rsp), !(1 << 18)); popfq();
        mov(eax, dword_ptr(rbx + 1)); mov(dword_ptr(rbx + 2), eax); pushfq();
        or(dword_ptr(rsp), 1 << 18); popfq();
        mov(dword_ptr(rbx + 4), eax); mov(dword_ptr(rbx + 2), eax););
    assert_eq!(aligned(&mut guest, 0, &code), vector::AC);
    assert_eq!(aligned(&mut guest, 0, &code[3..]), vector::AC);
    let at = guest.get64(STACK0 - 40);
    assert_eq!(guest.get::<3>(USER_GPA + at - USER), [0x89, 0x43, 0x02], "AC is set again");
}

#[test]
fn stacks_end_where_their_segments_end() {
    // The limit comes before the alignment and before the page.
    for (code, top) in [
        (asm!(32 at USER; pushfd();), 2),
        (asm!(32 at USER; pushf();), 1),
        (asm!(32 at USER; push(fs);), 3),
        (asm!(32 at USER; push(eax);), 2),
        (asm!(32 at USER; popfd();), 0xffff_fffe),
        (asm!(32 at USER; pop(es);), 0xffff_fffd),
        (asm!(32 at USER; iretd();), 0xffff_fffd),
        (asm!(32 at USER; retf();), 0xffff_fffe),
        (vec![0x9a, 0, 0, 0, 0x40, 0x1b, 0], 2),
    ] {
        for flags in [2, 1 << 18 | 2] {
            let mut guest = Guest::new();
            guest.cpu().sys.cr0 |= 1 << 18;
            // The last page there is, and the first.
            guest.map(0xffff_f000, 0x60_0000, 7);
            guest.put(USER_GPA, &code);
            guest.user(sel::USER32);
            guest.cpu().gpr[4] = top;
            guest.cpu().set_rflags(flags);
            guest.cpu().tlb_set_context();
            let frame = guest.go().frame();
            assert_eq!((frame.vector, frame.code), (vector::SS, Some(0)), "{code:02x?}");
            assert_eq!((frame.rip, frame.rsp), (USER, top), "{code:02x?}");
        }
    }
    // A handler's stack that ends: the new segment is named (SDM vol. 2, INT n).
    let mut guest = Guest::new_32();
    guest.put64(GDT + u64::from(sel::FREE), 0x0040_9300_0000_0007);
    guest.put64(TSS + 4, 0x8 | u64::from(sel::FREE) << 32);
    guest.put(0x9000, &[0xcd, 0x80]);
    guest.put64(GDT + 0x18, 0x00cf_fb00_0000_ffff);
    let code = asm!(32 at CODE;
        push(i32::from(sel::USER_DATA)); push(0x8_0000i32); push(2i32); push(i32::from(sel::USER32)); push(0x9000i32); iretd();
    );
    // Its own #SS finds no room either, nor does the double fault.
    let End::Exit(VmExit::TripleFault(fault)) = guest.run(&code) else { panic!("no triple fault") };
    assert!(fault.reason.contains("Fault(12, code 0x68)"), "{}", fault.reason);
}

#[test]
fn implicit_accesses_are_not_checked() {
    let mut guest = Guest::new();
    // A TSS and an IDT at odd addresses; the exception's stack is aligned by the processor.
    let tss = guest.get::<0x68>(TSS);
    guest.put(TSS + 0x801, &tss);
    guest.cpu().sys.tr.base = TSS + 0x801;
    let idt = guest.get::<0x1000>(IDT);
    guest.put(0x20_0001, &idt);
    guest.cpu().sys.idtr.base = 0x20_0001;
    let gdt = guest.get::<0x80>(GDT);
    guest.put(GDT + 0x801, &gdt);
    guest.cpu().sys.gdtr.base = GDT + 0x801;
    let code = asm!(64 at 0; mov(eax, i32::from(sel::USER_DATA)); mov(ds, eax); ud2(););
    assert_eq!(aligned(&mut guest, 0, &code), vector::UD);
    assert_eq!(aligned(&mut guest, 0, &asm!(64 at 0; mov(eax, dword_ptr(rbx + 1));)), vector::AC);
}

#[test]
fn code_outside_ram_is_a_fault_and_few_lines_of_log() {
    let mut guest = Guest::new();
    let page = 0x5000_0000u64;
    guest.map(page, 0xe000_0000, 7);
    for _ in 0..300 {
        guest.user(sel::USER64);
        guest.cpu().rip = page;
        assert_eq!(guest.go().fault(), (vector::GP, Some(0), page));
    }
    assert!(!guest.cpu().sys.may_log(), "the log is limited");
}
