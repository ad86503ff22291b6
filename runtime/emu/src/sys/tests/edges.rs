//! Code at the edges: of pages with different rights, of RAM, of instructions, of the translator's memory.

use iced_x86::code_asm::*;

use crate::fault::vector;
use crate::sys::bits::{cr0, cr4};
use crate::testing::asm::asm;
use crate::testing::guest::{CODE, DATA, End, Guest, SCRATCH, USER, pte, sel};

const PAGE: u64 = 0x5000_0000;
const FRAME: u64 = 0x60_0000;
const HOLE: u64 = 0x3000_0000;

/// A page of code and the one behind it, which is mapped with `bits` to `frame`.
fn two_pages(frame: u64, bits: u64) -> Guest {
    let mut guest = Guest::new();
    guest.cpu().sys.cr4 |= cr4::SMEP | cr4::SMAP;
    guest.map(PAGE, FRAME, 3);
    guest.map(PAGE + 0x1000, frame, bits);
    guest
}

#[test]
fn instructions_across_pages_need_both_to_be_executable() {
    // The page behind is not there, not executable, the user's, nothing, a device; or as it should be.
    for (frame, bits, expected) in [
        (FRAME + 0x3000, 0, Some((vector::PF, 0x10))),
        (FRAME + 0x3000, 3 | pte::NX, Some((vector::PF, 0x11))),
        (FRAME + 0x3000, 7, Some((vector::PF, 0x11))),
        (HOLE, 3, Some((vector::GP, 0))),
        (SCRATCH, 3, Some((vector::GP, 0))),
        (FRAME + 0x3000, 1, None),
    ] {
        let mut guest = two_pages(frame, bits);
        // inc eax; mov ecx, imm32 across the end, in any way; hlt
        for first in 1..5u64 {
            let start = 0x1000 - first - 2;
            guest
                .put(FRAME + start, &[0xff, 0xc0, 0xb9, 1, 2, 3, 4][..(first as usize + 2).min(7)]);
            let rest = [0xb9, 1, 2, 3, 4, 0xf4];
            guest.put(FRAME + 0x3000, &rest[first as usize..]);
            for _ in 0..3 {
                guest.kernel(sel::CODE);
                guest.cpu().gpr[0] = 5;
                guest.cpu().rip = PAGE + start;
                let end = guest.go();
                assert_eq!(guest.reg(0), 6);
                match expected {
                    Some((vector, code)) => {
                        let at = PAGE + start + 2;
                        assert_eq!(end.fault(), (vector, Some(code), at), "{frame:#x} {bits:#x}");
                        if vector == vector::PF {
                            assert_eq!(guest.cpu().sys.cr2, PAGE + 0x1000);
                        }
                    }
                    None => assert_eq!((end, guest.reg(1)), (End::Halt, 0x0403_0201)),
                }
            }
        }
    }
}

#[test]
fn falling_into_the_next_page_needs_its_rights() {
    for (frame, bits, expected) in [
        (FRAME + 0x3000, 0, Some((vector::PF, 0x10))),
        (FRAME + 0x3000, 3 | pte::NX, Some((vector::PF, 0x11))),
        (FRAME + 0x3000, 7, Some((vector::PF, 0x11))),
        (SCRATCH, 3, Some((vector::GP, 0))),
        (FRAME + 0x3000, 1, None),
    ] {
        let mut guest = two_pages(frame, bits);
        let end_of_page = |bytes: &[u8]| 0x1000 - bytes.len() as u64;
        // By a plain instruction, a branch not taken, a jump, a call and a return to behind it.
        for code in [
            &[0xff, 0xc0][..],
            &[0x39, 0xc0, 0x75, 0xf0],
            &[0xeb, 0x00],
            &[0xe9, 0, 0, 0, 0],
            &[0xe8, 0, 0, 0, 0],
        ] {
            let start = end_of_page(code);
            guest.put(FRAME + start, code);
            guest.put(FRAME + 0x3000, &[0xf4]);
            for _ in 0..3 {
                guest.kernel(sel::CODE);
                guest.cpu().rip = PAGE + start;
                let end = guest.go();
                match expected {
                    Some((vector, code)) => {
                        assert_eq!(end.fault(), (vector, Some(code), PAGE + 0x1000));
                    }
                    None => assert_eq!(end, End::Halt),
                }
            }
        }
    }
}

#[test]
fn rights_that_are_taken_away_from_code_that_ran_count() {
    // The user's function returns; then its page may not be executed, is the supervisor's, is not there, is back.
    let mut guest = Guest::new();
    guest.map(PAGE, FRAME, 7);
    guest.put(FRAME, &asm!(64 at PAGE; inc(eax); ret();));
    let entry = guest.entry(PAGE, 1);
    let code = asm!(64 at USER, [again]; mov(rbx, PAGE); set_label(&mut again); call(rbx); call(rbx); int(0x80i32); jmp(again););
    guest.handler(0x80, &asm!(64 at Guest::handler_at(0x80); hlt();));
    for (bits, error) in
        [(7, None), (7 | pte::NX, Some(0x15)), (3, Some(0x15)), (0, Some(0x14)), (5, None)]
    {
        guest.put64(entry, FRAME | bits);
        let end = guest.run_user(&code);
        match error {
            Some(error) => assert_eq!(end.fault(), (vector::PF, Some(error), PAGE), "{bits:#x}"),
            None => assert_eq!(end, End::Halt, "{bits:#x}"),
        }
    }
}

#[test]
fn the_supervisor_does_not_run_the_users_code_under_smep() {
    let mut guest = Guest::new();
    guest.map(PAGE, FRAME, 7);
    guest.put(FRAME, &asm!(64 at PAGE; inc(eax); ret();));
    // Twice without SMEP, then with it, from code that is linked and known to the jump cache by then.
    let code = asm!(64 at CODE;
        xor(eax, eax); mov(rbx, PAGE); call(rbx); call(rbx); mov(rcx, cr4); bts(rcx, 20i32); mov(cr4, rcx); call(rbx); hlt();
    );
    assert_eq!(guest.run(&code).fault(), (vector::PF, Some(0x11), PAGE));
    assert_eq!(guest.reg(0), 2);
}

#[test]
fn both_readings_of_overlapping_instructions() {
    let mut guest = Guest::new();
    // mov rax, imm64, whose immediate is: inc edx; jmp behind it. Both ways, over and over.
    let code = asm!(64 at CODE, [again, inner, join];
        xor(edx, edx); xor(esi, esi); mov(ecx, 100i32);
        set_label(&mut again); test(cl, 1i32); jnz(inner); nop();
        db(&[0x48, 0xb8]); set_label(&mut inner); db(&[0xff, 0xc2, 0xeb, 0x04, 0x90, 0x90, 0x90, 0x90]);
        set_label(&mut join); inc(esi); dec(ecx); jnz(again); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!((guest.reg(2), guest.reg(6)), (50, 100));
    assert_eq!(guest.reg(0), 0x9090_9090_04eb_c2ff);
}

#[test]
fn jumps_to_nowhere_are_faults_of_the_target_or_of_the_jump() {
    let mut guest = Guest::new();
    // Not mapped: at the target. Not canonical: at the jump.
    for (target, at_target) in
        [(0x7000_0000u64, true), (1 << 47, false), (0xffff_7fff_ffff_ffff, false)]
    {
        for code in [
            asm!(64 at CODE; mov(rax, target); jmp(rax);),
            asm!(64 at CODE; mov(rax, target); call(rax);),
            asm!(64 at CODE; mov(rax, target); push(rax); ret();),
        ] {
            let jump = CODE + code.len() as u64 - if code.ends_with(&[0xc3]) { 1 } else { 2 };
            for _ in 0..3 {
                let end = guest.run_kernel(&code).fault();
                let expected = if at_target {
                    (vector::PF, Some(0x10), target)
                } else {
                    (vector::GP, Some(0), jump)
                };
                assert_eq!(end, expected, "{code:02x?}");
            }
        }
    }
}

#[test]
fn code_at_the_end_of_ram_and_of_the_address_space() {
    let mut guest = Guest::new();
    // The last page of RAM, with another one behind it.
    guest.map(PAGE, crate::testing::guest::RAM - 0x1000, 3);
    guest.map(PAGE + 0x1000, FRAME, 3);
    guest.put(crate::testing::guest::RAM - 3, &[0xff, 0xc0, 0xb9]);
    guest.put(FRAME, &[1, 2, 3, 4, 0xf4]);
    guest.cpu().rip = PAGE + 0xffd;
    assert_eq!(guest.go(), End::Halt);
    assert_eq!(guest.reg(1), 0x0403_0201);
    // Behind the last byte of the address space comes the first one.
    guest.map(0xffff_ffff_ffff_f000, FRAME + 0x1000, 3);
    guest.put(FRAME + 0x1ffe, &[0xff, 0xc2]);
    guest.put(0, &[0xff, 0xc2, 0xf4]);
    guest.kernel(sel::CODE);
    (guest.cpu().rip, guest.cpu().gpr[2]) = (0xffff_ffff_ffff_fffe, 0);
    assert_eq!(guest.go(), End::Halt);
    assert_eq!((guest.reg(2), guest.cpu().rip), (2, 3));
}

#[test]
fn endless_new_code_takes_no_endless_memory() {
    // Writes a function of its own for each of many rounds, at ever other places, and runs it.
    let mut guest = Guest::new();
    if let Some(jit) = guest.vcpu.dispatcher_mut().jit() {
        jit.store().set_room(64 << 10);
    }
    let code = asm!(64 at CODE, [again, inside];
        mov(ecx, 20_000i32); mov(rbx, 0x60_0000u64); xor(esi, esi);
        set_label(&mut again); mov(byte_ptr(rbx), 0xb8u32); mov(dword_ptr(rbx + 1), ecx); mov(byte_ptr(rbx + 5), 0xc3u32);
        call(rbx); add(rsi, rax); add(rbx, 0x1041i32); cmp(rbx, 0xf0_0000i32); jb(inside); sub(rbx, 0x8f_0000i32);
        set_label(&mut inside); dec(ecx); jnz(again); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(guest.reg(6), (1..=20_000).sum::<u64>());
    let (dispatcher, cpu) = guest.vcpu.parts();
    if let Some(jit) = dispatcher.jit() {
        let (store, counters) = (jit.store(), jit.figures(cpu));
        let memory = counters.memory + store.code_memory();
        assert!(store.emptied() > 10 && memory < 1 << 20, "{memory} {counters:?}");
    }
    assert!(dispatcher.cache().used() < 25 << 20);
}

#[test]
fn watched_pages_are_data_again() {
    // Pages that had code and are written to ever after as data.
    let mut guest = Guest::new();
    guest.put(DATA, &[0xc3]);
    guest.cpu().sys.cr0 |= cr0::WP;
    let code = asm!(64 at CODE, [again];
        mov(rbx, DATA); call(rbx); mov(ecx, 100_000i32); set_label(&mut again); mov(qword_ptr(rbx + rcx * 8), rcx); and(ecx, 0x1ffi32);
        add(rsi, qword_ptr(rbx + rcx * 8)); dec(rcx); jnz(again); hlt();
    );
    // The first store is far beyond: RCX is masked behind it.
    guest.put64(DATA + 100_000 * 8, 0);
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(guest.get64(DATA + 8), 1);
}
