//! Breakpoints, watchpoints, single steps (SDM vol. 3, chapter 18).

use iced_x86::code_asm::*;
use mvm_engine::cpuid::Vendor;

use crate::fault::vector;
use crate::testing::asm::asm;
use crate::testing::guest::{
    CODE, DATA, End, Guest, HANDLERS, STACK, USER, USER_DATA, USER_GPA, sel,
};

const DB: u8 = vector::DB;
const TF: u64 = 1 << 8;
const RF: u64 = 1 << 16;

/// Notes RIP of each #DB at DATA + 0x800 + n * 8 (n is counted in R15) and DR6 beside it, and goes on.
fn tracing(guest: &mut Guest, set_rf: bool) {
    let at = Guest::handler_at(DB);
    let code = if set_rf {
        asm!(64 at at;
            push(rax); push(rbx); mov(rax, qword_ptr(rsp + 16)); mov(rbx, DATA + 0x800);
            mov(qword_ptr(rbx + r15 * 8), rax); mov(rax, dr6); mov(qword_ptr(rbx + r15 * 8 + 0x400), rax);
            xor(eax, eax); mov(dr6, rax); inc(r15); or(dword_ptr(rsp + 32), 1i32 << 16); pop(rbx); pop(rax); iretq();)
    } else {
        asm!(64 at at;
            push(rax); push(rbx); mov(rax, qword_ptr(rsp + 16)); mov(rbx, DATA + 0x800);
            mov(qword_ptr(rbx + r15 * 8), rax); mov(rax, dr6); mov(qword_ptr(rbx + r15 * 8 + 0x400), rax);
            xor(eax, eax); mov(dr6, rax); inc(r15); pop(rbx); pop(rax); iretq();)
    };
    guest.handler(DB, &code);
    guest.cpu().gpr[15] = 0;
}

/// What [`tracing`] saw: (RIP, DR6).
fn traced(guest: &mut Guest) -> Vec<(u64, u64)> {
    (0..guest.reg(15))
        .map(|n| (guest.get64(DATA + 0x800 + n * 8), guest.get64(DATA + 0xc00 + n * 8)))
        .collect()
}

const BS: u64 = 0xffff_0ff0 | 1 << 14;

#[test]
fn tf_traps_after_every_instruction() {
    let mut guest = Guest::new();
    tracing(&mut guest, false);
    let code = asm!(64 at CODE, [over];
        pushfq(); or(dword_ptr(rsp), 0x100i32); popfq(); nop(); jmp(over); nop(); set_label(&mut over); mov(ecx, 2i32);
        pushfq(); and(dword_ptr(rsp), !0x100i32); popfq(); nop(); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    let at: Vec<u64> = traced(&mut guest).iter().map(|t| t.0 - CODE).collect();
    // POPF that sets TF does not trap itself; the one that clears it does.
    assert_eq!(at, [10, 13, 18, 19, 26, 27]);
    assert!(traced(&mut guest).iter().all(|t| t.1 == BS));
}

#[test]
fn single_steps_of_a_repeat_trap_per_iteration() {
    let mut guest = Guest::new();
    tracing(&mut guest, false);
    let code = asm!(64 at CODE; rep().movsb(); nop(); ud2(););
    let cpu = guest.cpu();
    (cpu.gpr[1], cpu.gpr[6], cpu.gpr[7]) = (3, DATA, DATA + 0x100);
    cpu.set_rflags(TF | 2);
    assert_eq!(guest.run(&code).frame().vector, vector::UD);
    let at: Vec<u64> = traced(&mut guest).iter().map(|t| t.0 - CODE).collect();
    assert_eq!(at, [0, 0, 2, 3]);
}

#[test]
fn faults_and_software_interrupts_under_tf() {
    // The handler of an exception runs without TF; the frame has it.
    let mut guest = Guest::new();
    guest.cpu().set_rflags(TF | 2);
    let frame = guest.run(&asm!(64 at CODE; ud2();)).frame();
    assert_eq!((frame.vector, frame.rip), (vector::UD, CODE));
    assert_eq!(frame.flags & (TF | RF), TF | RF, "RF is pushed by faults");
    let mut guest = Guest::new();
    guest.cpu().set_rflags(TF | 2);
    let frame = guest.run(&asm!(64 at CODE; int(0x80i32);)).frame();
    assert_eq!((frame.vector, frame.rip), (0x80, CODE + 2));
    assert_eq!(frame.flags & (TF | RF), TF);
    assert_eq!(guest.cpu().sysflags & TF, 0);
}

#[test]
fn mov_ss_holds_off_the_single_step() {
    let mut guest = Guest::new();
    tracing(&mut guest, false);
    guest.cpu().set_rflags(TF | 2);
    let code = asm!(64 at CODE; mov(eax, 0x10i32); mov(ss, ax); nop(); nop(); ud2(););
    assert_eq!(guest.run(&code).frame().vector, vector::UD);
    let at: Vec<u64> = traced(&mut guest).iter().map(|t| t.0 - CODE).collect();
    assert_eq!(at, [5, 9, 10]);
}

#[test]
fn execution_breakpoints_fault_before_the_instruction() {
    let mut guest = Guest::new();
    tracing(&mut guest, true);
    let code = asm!(64 at CODE, [again];
        mov(rax, CODE + 0x20); mov(dr1, rax); mov(eax, 0x8i32); mov(dr7, rax); mov(ecx, 3i32);
        nop(); nop(); nop(); nop(); nop(); nop();
        set_label(&mut again); inc(edx); dec(ecx); jnz(again); hlt();
    );
    assert_eq!(code[0x20..0x22], [0xff, 0xc2], "the loop is at 0x20");
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(traced(&mut guest), [(CODE + 0x20, 0xffff_0ff2); 3]);
    assert_eq!(guest.reg(2), 3);
    // RF is pushed as it was for these (SDM vol. 3, 18.3.1.1): the handler sets it.
    let mut guest = Guest::new();
    guest.cpu().sys.dr = [CODE + 1, 0, 0, 0];
    guest.cpu().sys.dr7 = 0x401;
    let frame = guest.run(&asm!(64 at CODE; nop(); inc(eax); hlt();)).frame();
    assert_eq!((frame.vector, frame.rip, guest.reg(0)), (DB, CODE + 1, 0));
    assert_eq!(frame.flags & RF, 0);
}

#[test]
fn data_breakpoints_trap_after_the_access() {
    for (code, traps) in [
        (
            asm!(64 at CODE; mov(eax, dword_ptr(rbx)); nop(); mov(dword_ptr(rbx), eax); nop(); hlt();),
            vec![2u64, 5],
        ),
        (
            asm!(64 at CODE; mov(al, byte_ptr(rbx + 3)); nop(); mov(al, byte_ptr(rbx + 4)); nop(); hlt();),
            vec![3],
        ),
        (
            asm!(64 at CODE; mov(rax, qword_ptr(rbx - 7)); mov(rax, qword_ptr(rbx - 8)); nop(); hlt();),
            vec![4],
        ),
        (asm!(64 at CODE; lock().inc(dword_ptr(rbx)); nop(); hlt();), vec![3]),
        (
            asm!(64 at CODE; movups(xmm0, xmmword_ptr(rbx - 12)); movups(xmmword_ptr(rbx), xmm0); nop(); hlt();),
            vec![4, 7],
        ),
    ] {
        let mut guest = Guest::new();
        tracing(&mut guest, false);
        guest.cpu().gpr[3] = DATA + 8;
        // DR2: accesses of four bytes.
        guest.cpu().sys.dr = [0, 0, DATA + 8, 0];
        guest.cpu().sys.dr7 = 0x400 | 2 << 4 | 0b1111 << 24;
        assert_eq!(guest.run(&code), End::Halt);
        let got: Vec<u64> = traced(&mut guest).iter().map(|t| t.0 - CODE).collect();
        assert_eq!(got, traps, "{code:02x?}");
        assert!(traced(&mut guest).iter().all(|t| t.1 == 0xffff_0ff4));
    }
}

#[test]
fn write_watchpoints_in_user_code() {
    let mut guest = Guest::new();
    tracing(&mut guest, false);
    guest.cpu().sys.dr = [USER_DATA, 0, 0, 0];
    guest.cpu().sys.dr7 = 0x401 | 0b1001 << 16;
    let code = asm!(64 at USER;
        mov(rbx, USER_DATA); mov(rax, qword_ptr(rbx)); mov(rdi, rbx); sub(rdi, 4i32); mov(ecx, 3i32); rep().stosd();
        push(rax); mov(byte_ptr(rbx + 7), 1i32); mov(byte_ptr(rbx + 8), 1i32); ud2();
    );
    assert_eq!(guest.run_user(&code).frame().vector, vector::UD);
    let traps = traced(&mut guest);
    // A run of STOS traps once, at its end (SDM vol. 3, 18.2.5 allows for that); then the byte inside the eight.
    let end = USER + code.len() as u64;
    assert_eq!(traps, [(end - 11, 0xffff_0ff1), (end - 6, 0xffff_0ff1)]);
}

#[test]
fn io_breakpoint_traps() {
    let mut guest = Guest::new();
    tracing(&mut guest, false);
    let code = asm!(64 at CODE;
        mov(rax, cr4); or(eax, 8i32); mov(cr4, rax); mov(eax, 0x61i32); mov(dr3, rax);
        mov(eax, 0x2000_0080i32); mov(dr7, rax); mov(rcx, dr7); in_(al, 0x60i32); nop(); in_(al, 0x61i32); nop();
        out(0x60i32, ax); nop(); hlt();
    );
    // RW 10, length 00.
    assert_eq!(guest.run(&code), End::Halt);
    let end = CODE + code.len() as u64;
    assert_eq!(traced(&mut guest), [(end - 6, 0xffff_0ff8), (end - 2, 0xffff_0ff8)]);
    assert_eq!(guest.reg(1), 0x2000_0480);
}

#[test]
fn general_detect_and_the_aliases() {
    let mut guest = Guest::new();
    // DR4 and DR5 are DR6 and DR7 unless CR4.DE says otherwise.
    let code = asm!(64 at CODE; mov(rax, dr5); mov(rcx, dr4); hlt(););
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!((guest.reg(0), guest.reg(1)), (0x400, 0xffff_0ff0));
    guest.cpu().sys.cr4 |= 8;
    assert_eq!(guest.run_kernel(&code).fault(), (vector::UD, None, CODE));
    let code = asm!(64 at CODE; mov(eax, 0x2000i32); mov(dr7, rax); mov(rax, dr0););
    let frame = guest.run_kernel(&code).frame();
    assert_eq!((frame.vector, frame.rip), (DB, CODE + 8));
    assert_eq!(guest.cpu().sys.dr6 & 0x2000, 0x2000, "BD");
    assert_eq!(guest.cpu().sys.dr7 & 0x2000, 0, "GD is cleared for the handler");
    let code = asm!(64 at CODE; mov(rax, 1u64 << 32); mov(dr7, rax););
    assert_eq!(guest.run_kernel(&code).fault(), (vector::GP, Some(0), CODE + 10));
    let code = asm!(64 at USER; mov(rax, dr0););
    assert_eq!(guest.run_user(&code).fault(), (vector::GP, Some(0), USER));
}

#[test]
fn int1_and_int3() {
    let mut guest = Guest::new();
    assert_eq!(
        guest.run_user(&[0xf1]).fault(),
        (DB, None, USER + 1),
        "INT1 needs no privilege of the gate"
    );
    assert_eq!(guest.run_user(&[0xcc]).fault(), (vector::BP, None, USER + 1));
    assert_eq!(guest.run_user(&[0xcd, 1]).fault(), (vector::GP, Some(1 << 3 | 2), USER));
    assert!(guest.cpu().rip > HANDLERS);
}

#[test]
fn odd_breakpoint_registers_break_nothing() {
    // Guest-controlled values at the ends of the address space.
    for address in [u64::MAX, u64::MAX - 7, 0, 1 << 63, 0xffff_8000_0000_0000] {
        for control in 0..16u64 {
            let mut guest = Guest::new();
            tracing(&mut guest, true);
            guest.cpu().sys.dr = [address; 4];
            guest.cpu().sys.dr7 = 0x4ff | control << 16 | control << 28;
            guest.cpu().sys.cr4 |= 8;
            guest.cpu().gpr[3] = DATA;
            let code = asm!(64 at CODE;
                mov(rax, qword_ptr(rbx)); mov(qword_ptr(rbx), rax); mov(dx, 0xffffi32); out(dx, eax); in_(eax, dx); hlt();
            );
            assert_eq!(guest.run(&code), End::Halt, "{address:#x} {control}");
        }
    }
}

#[test]
fn watchpoints_on_a_load_of_ss_are_told_after_the_next_instruction() {
    // SDM vol. 3, 6.8.3. At DATA is a selector for SS, watched by DR0.
    let watched = || {
        let mut guest = Guest::new();
        tracing(&mut guest, false);
        guest.put64(DATA, 0x10);
        guest.cpu().sys.dr = [DATA, 0, 0, 0];
        guest.cpu().sys.dr7 = 0x401 | 0b1111 << 16;
        guest.cpu().gpr[3] = DATA;
        guest
    };
    const B0: u64 = 0xffff_0ff1;
    let mut guest = watched();
    let code = asm!(64 at CODE; mov(ss, word_ptr(rbx)); nop(); nop(); ud2(););
    assert_eq!(guest.run(&code).frame().vector, vector::UD);
    assert_eq!(traced(&mut guest), [(CODE + 3, B0)]);
    // A single step that is held off is dropped; a watchpoint is not.
    let mut guest = watched();
    guest.cpu().set_rflags(TF | 2);
    assert_eq!(guest.run(&code).frame().vector, vector::UD);
    assert_eq!(traced(&mut guest)[0], (CODE + 3, B0 | BS));
    // INT1 makes one exception of both.
    let mut guest = watched();
    let code = [&asm!(64 at CODE; mov(ss, word_ptr(rbx));)[..], &[0xf1, 0x90, 0xf4]].concat();
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(traced(&mut guest), [(CODE + 3, B0)]);
    // INT n goes to its handler, and there it is told first.
    for interrupt in [asm!(64 at 0; int(0x80i32);), vec![0xcc]] {
        let vector = if interrupt[0] == 0xcc { vector::BP } else { 0x80 };
        let mut guest = watched();
        guest.handler(vector, &asm!(64 at 0; mov(rsi, qword_ptr(rsp)); iretq();));
        let mov = asm!(64 at CODE; mov(ss, word_ptr(rbx)););
        let code = [&mov[..], &interrupt, &[0x90, 0xf4]].concat();
        assert_eq!(guest.run(&code), End::Halt);
        assert_eq!(traced(&mut guest), [(Guest::handler_at(vector), B0)], "{interrupt:x?}");
        assert_eq!(guest.reg(6), CODE + 2 + interrupt.len() as u64);
    }
    // LSS is not among those that hold anything off.
    let mut guest = watched();
    guest.put64(DATA - 4, 0x10 << 32 | STACK);
    guest.cpu().set_rflags(TF | 2);
    let code = asm!(64 at CODE; lss(esp, fword_ptr(rbx - 4)); nop(); ud2(););
    assert_eq!(guest.run(&code).frame().vector, vector::UD);
    assert_eq!(traced(&mut guest)[0], (CODE + 4, B0 | BS));
}

#[test]
fn breakpoints_after_a_load_of_ss() {
    // Intel's processors hold them off as well (SDM vol. 3, 6.8.3), AMD's do not; STI holds off none.
    let code = asm!(64 at CODE; mov(eax, 0x10i32); mov(ss, ax); nop(); sti(); nop(); cli(); hlt(););
    for (vendor, at, hits) in
        [(Vendor::Intel, 8, 0), (Vendor::Amd, 8, 1), (Vendor::Intel, 10, 1), (Vendor::Amd, 10, 1)]
    {
        let mut guest = Guest::new();
        tracing(&mut guest, true);
        guest.cpu().sys.vendor = vendor;
        guest.cpu().sys.dr = [CODE + at, 0, 0, 0];
        guest.cpu().sys.dr7 = 0x401;
        assert_eq!(guest.run(&code), End::Halt);
        assert_eq!(traced(&mut guest), vec![(CODE + at, 0xffff_0ff1); hits], "{vendor:?} {at}");
    }
}

#[test]
fn general_detect_is_not_held_off_by_a_load_of_ss() {
    let mut guest = Guest::new();
    tracing(&mut guest, false);
    guest.cpu().sys.dr7 |= 0x2000;
    let code = asm!(64 at CODE;
        mov(ebx, 0x10i32); pushfq(); or(dword_ptr(rsp), 0x100i32); popfq(); mov(ss, bx); mov(rcx, dr0); nop(); ud2();
    );
    assert_eq!(guest.run(&code).frame().vector, vector::UD);
    let end = CODE + code.len() as u64;
    let detected = 0xffff_0ff0 | 1 << 13;
    assert_eq!(traced(&mut guest), [(end - 6, detected), (end - 3, BS), (end - 2, BS)]);
    // Any debug exception clears the bit for its handler.
    let mut guest = Guest::new();
    tracing(&mut guest, false);
    guest.cpu().sys.dr7 |= 0x2000;
    guest.cpu().set_rflags(TF | 2);
    assert_eq!(
        guest.run(&asm!(64 at CODE; nop(); mov(rcx, dr0); ud2();)).frame().vector,
        vector::UD
    );
    assert_eq!(traced(&mut guest), [(CODE + 1, BS), (CODE + 4, BS)]);
    assert_eq!(guest.cpu().sys.dr7 & 0x2000, 0);
}

#[test]
fn sysret_that_sets_tf_traps_before_anything_runs() {
    // Unlike IRET and POPF (which is why Linux never returns that way with TF). No instruction of the user's is run.
    let mut guest = Guest::new();
    guest.cpu().sys.msrs.star = 0x1b << 48 | 0x08 << 32;
    guest.put(USER_GPA, &asm!(64 at USER; inc(ebx); inc(ebx); ud2();));
    let code = asm!(64 at CODE; mov(rcx, USER); mov(r11, 0x102u64); xor(ebx, ebx); sysretq(););
    let frame = guest.run(&code).frame();
    assert_eq!((frame.vector, frame.rip, frame.cs, guest.reg(3)), (DB, USER, sel::USER64, 0));
    assert_eq!((guest.cpu().sys.dr6, frame.flags & (TF | RF)), (BS, TF));
    // And one that is stepped itself.
    let mut guest = Guest::new();
    guest.cpu().sys.msrs.star = 0x1b << 48 | 0x08 << 32;
    guest.put(USER_GPA, &asm!(64 at USER; inc(ebx); inc(ebx); ud2();));
    guest.cpu().set_rflags(TF | 2);
    tracing(&mut guest, false);
    assert_eq!(guest.run(&code).frame().vector, vector::UD);
    let at: Vec<u64> = traced(&mut guest).iter().map(|t| t.0).collect();
    assert_eq!(at[3..], [USER, USER + 2, USER + 4]);
}

#[test]
fn a_watched_stack_of_the_handler_makes_no_endless_exceptions() {
    let mut guest = Guest::new();
    tracing(&mut guest, false);
    // Four of the words that a frame is pushed to; the program writes to one of them.
    guest.cpu().sys.dr = [STACK - 8, STACK - 16, STACK - 24, STACK - 40];
    guest.cpu().sys.dr7 = 0x4ff | 0x9999 << 16;
    guest.cpu().gpr[3] = STACK - 40;
    let code = asm!(64 at CODE; mov(dword_ptr(rbx), eax); nop(); ud2(););
    assert_eq!(guest.run(&code).frame().vector, vector::UD);
    assert_eq!(traced(&mut guest), [(CODE + 2, 0xffff_0ff8)]);
}
