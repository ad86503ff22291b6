//! Calls, returns and jumps between pages, where they go otherwise than they usually do (J17, J18).

use super::*;
use crate::jit::returns::DEPTH;
use crate::testing::guest::{CODE as KERNEL, DATA as KERNEL_DATA, End, Guest, USER};

const TWICE: i32 = 2 * DEPTH as i32;

#[test]
fn more_calls_than_the_stack_of_the_host_takes() {
    // Calls that do not return leave their pairs: the guest's stack stays where it is. Then a recursion.
    let code = asm!(64 at CODE, [again, f, recur, leaf];
        mov(ecx, TWICE); set_label(&mut again); call(f); nop(); set_label(&mut f); add(rsp, 8i32);
        dec(ecx); jnz(again); mov(ecx, 500i32); xor(eax, eax); call(recur); ud2();
        set_label(&mut recur); dec(ecx); jz(leaf); call(recur); inc(eax); ret(); set_label(&mut leaf); mov(edx, 7i32); ret();
    );
    let (_, state, _) = both(&[(CODE, &code)]);
    assert_eq!((state.gpr[0], state.gpr[2]), (499, 7));
    // The same between pages.
    let code = asm!(64 at CODE, [again];
        mov(ecx, TWICE); mov(r15, CODE2); set_label(&mut again); call(CODE2 + 0x100); ud2(); nop(); dec(ecx); jnz(again);
        mov(ecx, 500i32); call(r15); ud2();
    );
    let skip = asm!(64 at CODE2 + 0x100; add(qword_ptr(rsp), 2i32); ret(););
    let recur = asm!(64 at CODE2, [leaf]; dec(ecx); jz(leaf); call(r15); inc(eax); set_label(&mut leaf); ret(););
    both(&[(CODE, &code), (CODE2, &recur), (CODE2 + 0x100, &skip)]);
}

#[test]
fn returns_to_other_places_than_where_the_call_came_from() {
    // The address on the stack changed, and another one pushed; a stack switched, and frames left out by a jump; and
    // the return to where a call came from, from where it did not go.
    let code = asm!(64 at CODE, [again, f, g, there, h, unwind, over, twice, once];
        mov(ecx, 50i32); xor(eax, eax); set_label(&mut again);
        call(f); ud2(); nop(); inc(eax);
        lea(rdx, ptr(there)); push(rdx); ret(); ud2(); set_label(&mut there); inc(eax);
        mov(rbp, rsp); call(h); ud2(); set_label(&mut over); inc(eax);
        mov(rbp, rsp); lea(rsp, ptr(rdi + 0x800)); call(g); mov(rsp, rbp); inc(eax);
        call(twice); inc(eax);
        dec(ecx); jnz(again); ud2();
        set_label(&mut f); add(qword_ptr(rsp), 3i32); ret();
        set_label(&mut g); add(eax, 2i32); ret_1(8i32);
        set_label(&mut h); call(unwind); ud2();
        set_label(&mut unwind); mov(rsp, rbp); jmp(over);
        set_label(&mut twice); push(qword_ptr(rsp)); call(once); ret();
        set_label(&mut once); inc(eax); ret();
    );
    let (_, state, _) = both(&[(CODE, &code)]);
    assert_eq!(state.gpr[1], 0);
}

#[test]
fn a_call_to_know_where_one_is_and_one_at_the_end_of_a_page() {
    let code = asm!(64 at CODE, [again];
        mov(ecx, 50i32); mov(r15, CODE2 - 7); set_label(&mut again);
        db(&[0xe8, 0, 0, 0, 0]); pop(rdx); add(rax, rdx); call(r15); dec(ecx); jnz(again); ud2();
    );
    let f = asm!(64 at CODE + 0x800; add(rbx, qword_ptr(rsp)); ret(););
    // NOP, NOP, CALL: what comes behind is in the next page.
    let mut end = vec![0x90, 0x90, 0xe8];
    end.extend((CODE as i32 + 0x800 - CODE2 as i32).to_le_bytes());
    let behind = asm!(64 at CODE2; add(rsi, rbx); ret(););
    both(&[(CODE, &code), (CODE + 0x800, &f), (CODE2 - 7, &end), (CODE2, &behind)]);
}

#[test]
fn indirect_calls_off_the_stack_pointer_and_through_memory() {
    let code = asm!(64 at CODE, [again, f];
        mov(ecx, 50i32); lea(rbx, ptr(f)); mov(qword_ptr(rdi + 16), rbx); set_label(&mut again);
        push(rbx); call(qword_ptr(rsp)); pop(rdx); call(rbx); call(qword_ptr(rdi + 16)); mov(r10, rbx); call(r10);
        dec(ecx); jnz(again); ud2();
        set_label(&mut f); inc(rax); add(rsi, qword_ptr(rsp)); ret();
    );
    both(&[(CODE, &code)]);
}

#[test]
fn indirect_calls_and_jumps_that_go_elsewhere_now_and_then() {
    // By a register, by memory, through a pointer at a fixed place, and by a function that jumps through it, which all change.
    let code = asm!(64 at CODE, [again, f, same, kept];
        mov(ecx, 300i32); xor(r8d, r8d); xor(r9d, r9d); lea(rbx, ptr(f)); mov(r15, CODE2); mov(qword_ptr(rdi + 0x100), rbx); mov(qword_ptr(rdi + 0x108), r15); set_label(&mut again);
        call(rbx); call(qword_ptr(rdi + 0x108)); call(CODE + 0x800); call(CODE + 0x900);
        test(cl, 7i32); jnz(same); xchg(rbx, r15); set_label(&mut same);
        test(cl, 31i32); jnz(kept); mov(rax, qword_ptr(rdi + 0x100)); xchg(qword_ptr(rdi + 0x108), rax); mov(qword_ptr(rdi + 0x100), rax); set_label(&mut kept);
        dec(ecx); jnz(again); ud2();
        set_label(&mut f); inc(r8); add(rsi, qword_ptr(rsp)); ret();
    );
    let mut stub = vec![0xff, 0x25];
    stub.extend(((DATA + 0x100) as i32 - (CODE as i32 + 0x806)).to_le_bytes());
    let mut other_stub = vec![0xff, 0x15];
    other_stub.extend(((DATA + 0x108) as i32 - (CODE as i32 + 0x906)).to_le_bytes());
    other_stub.push(0xc3);
    let other = asm!(64 at CODE2; inc(r9); add(rsi, rsi); ret(););
    let (_, state, counters) =
        both(&[(CODE, &code), (CODE + 0x800, &stub), (CODE + 0x900, &other_stub), (CODE2, &other)]);
    assert_eq!(state.gpr[8] + state.gpr[9], 300 * 4);
    assert!(counters.entered < 150, "{counters:?}");
}

#[test]
fn the_caller_changes_during_the_call() {
    // What comes behind the call, in the callee's page and in another one; and the callee itself.
    let code = asm!(64 at CODE, [again, patch];
        mov(ecx, 60i32); xor(edx, edx); mov(r15, CODE2); lea(rbx, ptr(patch)); set_label(&mut again);
        call(r15); set_label(&mut patch); mov(eax, 5i32); add(edx, eax); call(CODE2); dec(ecx); jnz(again); ud2();
    );
    let function =
        asm!(64 at CODE2; inc(byte_ptr(rbx + 1)); add(byte_ptr(r15 + 0x40), 1i32); ret(););
    let (_, state, counters) = both(&[(CODE, &code), (CODE2, &function)]);
    assert_eq!(state.gpr[2], (0..60).map(|n| 6 + 2 * n).sum::<u64>());
    assert!(counters.killed_pages > 50, "{counters:?}");
}

#[test]
fn an_exception_between_call_and_return() {
    let code = asm!(64 at CODE, [f, g];
        mov(ecx, 9i32); call(f); ud2();
        set_label(&mut f); call(g); inc(eax); ret();
        set_label(&mut g); dec(ecx); mov(rbx, qword_ptr(rsp + 0x7000)); ret();
    );
    let (exception, _, _) = both(&[(CODE, &code)]);
    assert_eq!(exception.vector, vector::PF);
}

#[test]
fn the_mapping_of_the_caller_changes_during_the_call() {
    // The function goes on in another page at the same address, by INVLPG and by CR3, with pairs on the host's stack and
    // with links between the pages.
    let page = 0x5000_0000u64;
    let mut guest = Guest::with_tier(Tier::Translator);
    guest.map(page, 0x60_0000, 3);
    for (gpa, value) in [(0x60_0000, 1i32), (0x60_1000, 100i32)] {
        guest.put(gpa, &asm!(64 at page; call(KERNEL + 0x200); add(esi, value); ret();));
    }
    let entry = guest.entry(page, 1);
    let code = asm!(64 at KERNEL, [again];
        mov(rbx, page); mov(rdi, entry); mov(ecx, 200i32); xor(esi, esi); mov(r12, KERNEL_DATA);
        set_label(&mut again); call(rbx); call(page); dec(ecx); jnz(again); hlt();
    );
    // Each third time the page becomes the other one.
    let change = asm!(64 at KERNEL + 0x200, [no, reload, done];
        inc(dword_ptr(r12)); mov(eax, dword_ptr(r12)); xor(edx, edx); mov(r8d, 3i32); div(r8d); test(edx, edx); jnz(no);
        xor(qword_ptr(rdi), 0x1000i32); test(eax, 1i32); jnz(reload); invlpg(ptr(rbx)); jmp(done);
        set_label(&mut reload); mov(rax, cr3); mov(cr3, rax); set_label(&mut done); nop();
        set_label(&mut no); ret();
    );
    guest.put(KERNEL + 0x200, &change);
    guest.put64(KERNEL_DATA, 0);
    assert_eq!(guest.run(&code), End::Halt);
    let (mut other, mut sum) = (false, 0);
    for call in 1..=400 {
        other ^= call % 3 == 0;
        sum += if other { 100 } else { 1 };
    }
    assert_eq!(guest.reg(6), sum);
}

#[test]
fn kernel_instructions_in_place_and_where_they_may_not_be() {
    // In user code each is an exception, or goes on (PUSHF); nothing but the exception shows.
    for (code, called) in [
        (asm!(64 at CODE; add(eax, ecx); cli(); nop(); ud2();), vector::GP),
        (asm!(64 at CODE; add(eax, ecx); sti(); nop(); ud2();), vector::GP),
        (asm!(64 at CODE; add(eax, ecx); swapgs(); nop(); ud2();), vector::GP),
        (
            asm!(64 at CODE; add(eax, ecx); pushfq(); pop(rdx); sbb(ebx, esi); pushfq(); ud2();),
            vector::UD,
        ),
    ] {
        assert_eq!(both(&[(CODE, &code)]).0.vector, called);
    }
    // In the kernel.
    let code = asm!(64 at KERNEL, [again];
        mov(ecx, 100i32); mov(rdi, KERNEL_DATA); xor(esi, esi); set_label(&mut again);
        swapgs(); rdgsbase(rax); mov(edx, dword_ptr(0).gs()); swapgs(); rdgsbase(rbx); add(edx, dword_ptr(0).gs());
        cmp(rax, rbx); sti(); adc(esi, edx); pushfq(); pop(r8); cli(); rcl(esi, 1i32); pushfq(); pop(r9); dec(ecx); jnz(again); hlt();
    );
    let run = |tier| {
        let mut guest = Guest::with_tier(tier);
        guest.cpu().sys.cr4 |= 1 << 16;
        guest.cpu().seg[crate::cpu::seg::GS].base = KERNEL_DATA;
        guest.cpu().sys.msrs.kernel_gs_base = KERNEL_DATA + 8;
        guest.put64(KERNEL_DATA, 0x1234_5678);
        guest.put64(KERNEL_DATA + 8, 0x9abc_def0);
        assert_eq!(guest.run(&code), End::Halt);
        guest.cpu().gpr
    };
    let (interpreted, translated) = (run(Tier::Interpreter), run(Tier::Translator));
    assert_eq!(interpreted[..16], translated[..16]);
    assert_eq!((translated[8] >> 9 & 1, translated[9] >> 9 & 1), (1, 0), "IF");
}

#[test]
fn compare_and_exchange_of_16_bytes() {
    for (locked, place) in [(true, 0i64), (false, 16), (true, 8), (true, 0xff8), (false, 0x1000)] {
        let head = asm!(64 at CODE;
            lea(rdi, ptr(rdi + place as i32)); mov(rax, 0u64); xor(edx, edx); mov(ebx, 77i32); mov(ecx, 99i32); stc(););
        let exchange = if locked {
            asm!(64 at CODE; lock().cmpxchg16b(ptr(rdi)); setz(r10b); adc(rsi, 0i32);)
        } else {
            asm!(64 at CODE; cmpxchg16b(ptr(rdi)); setz(r11b); adc(rsi, 0i32);)
        };
        let tail = asm!(64 at CODE; mov(r12, qword_ptr(rdi)); mov(r13, qword_ptr(rdi + 8)); cmp(r12, r13); ud2(););
        // It fails the second time.
        let code = [&head[..], &exchange, &exchange, &tail].concat();
        both(&[(CODE, &code)]);
    }
}

#[test]
fn pushes_of_the_kernel_to_a_page_of_the_user() {
    // With SMAP, and EFLAGS.AC set or not.
    for tier in [Tier::Interpreter, Tier::Translator] {
        for allowed in [true, false] {
            for push in [
                asm!(64 at KERNEL; pushfq();),
                asm!(64 at KERNEL; push(fs);),
                asm!(64 at KERNEL; push(rax);),
            ] {
                let mut guest = Guest::with_tier(tier);
                guest.cpu().sys.cr4 |= 1 << 21;
                guest.cpu().tlb_set_context();
                let ac =
                    if allowed { asm!(64 at KERNEL; stac();) } else { asm!(64 at KERNEL; clac();) };
                let stack = asm!(64 at KERNEL; mov(rbx, rsp); mov(rsp, USER + 0x9000););
                let back = asm!(64 at KERNEL; mov(rsp, rbx); hlt(););
                let end = guest.run(&[&ac[..], &stack, &push, &back].concat());
                if allowed {
                    assert_eq!(end, End::Halt);
                } else {
                    // The frame would go there as well.
                    assert_ne!(end, End::Halt);
                }
            }
        }
    }
}
