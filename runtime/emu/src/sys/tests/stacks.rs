//! Stacks whose page changes under them: whatever is remembered of it must not outlive that (J21).

use iced_x86::code_asm::*;

use crate::fault::vector;
use crate::sys::bits::{cr0, cr4};
use crate::testing::asm::asm;
use crate::testing::guest::{CODE, End, Guest, HANDLERS, PML4, sel};

const PAGE: u64 = 0x5000_0000;
const FRAME: u64 = 0x60_0000;
const TOP: i32 = 0x800;
const ROUNDS: u64 = 200;

/// A machine with the stack at `PAGE`.
fn with_stack() -> Guest {
    let mut guest = Guest::new();
    guest.cpu().sys.cr0 |= cr0::WP;
    guest.map(PAGE, FRAME, 3);
    // For exceptions there is another one.
    for vector in [vector::PF, vector::SS] {
        guest.gate(vector, HANDLERS + u64::from(vector) * 16, 0, 1);
    }
    guest
}

#[test]
fn another_frame() {
    let mut guest = with_stack();
    let entry = guest.entry(PAGE, 1);
    // What is pushed in a round is found in the next one: there are two frames in turn.
    let code = asm!(64 at CODE, [again];
        mov(rdi, entry); mov(rsi, PAGE); mov(ecx, ROUNDS as i32); xor(r8, r8); set_label(&mut again);
        lea(rsp, ptr(rsi + TOP)); push(rcx); xor(qword_ptr(rdi), 0x1000i32); invlpg(ptr(rsi)); pop(rax); add(r8, rax); dec(ecx); jnz(again); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(guest.reg(8), (2..=ROUNDS).sum::<u64>());
}

#[test]
fn two_address_spaces() {
    const HIGH: u64 = 0x80_0000_0000;
    for (pcids, kept) in [(false, 0), (true, 0), (true, 1u64 << 63)] {
        let mut guest = with_stack();
        let other = guest.new_table();
        guest.put64(other, guest.get64(PML4));
        guest.map(HIGH, FRAME, 3);
        guest.map_in(other, HIGH, FRAME + 0x1000, 3);
        let mut spaces = [PML4, other];
        if pcids {
            guest.cpu().sys.cr4 |= cr4::PCIDE;
            spaces = [PML4 | 1 | kept, other | 2 | kept];
        }
        let [first, second] = spaces;
        let code = asm!(64 at CODE, [again];
            mov(rdi, first); mov(rbx, second); mov(rsi, HIGH + TOP as u64); mov(ecx, ROUNDS as i32); xor(r8, r8); set_label(&mut again);
            mov(rsp, rsi); push(rcx); mov(cr3, rbx); pop(rax); add(r8, rax); xchg(rdi, rbx); dec(ecx); jnz(again); hlt();
        );
        // The first round is in whichever space this starts in.
        let start = asm!(64 at CODE; mov(rax, first); mov(cr3, rax););
        assert_eq!(guest.run(&[start, asm!(64 at CODE; hlt();)].concat()), End::Halt);
        assert_eq!(guest.run_kernel(&code), End::Halt);
        assert_eq!(guest.reg(8), (2..=ROUNDS).sum::<u64>(), "pcids {pcids} kept {kept:#x}");
    }
}

#[test]
fn rights_that_go() {
    let mut guest = with_stack();
    let entry = guest.entry(PAGE, 1);
    let code = asm!(64 at CODE, [again];
        mov(rdi, entry); mov(rsi, PAGE); mov(ecx, ROUNDS as i32); mov(edx, 0x5555i32); lea(rsp, ptr(rsi + TOP)); set_label(&mut again);
        push(rcx); pop(rax); dec(ecx); jnz(again); push(rdx); xor(qword_ptr(rdi), 2i32); invlpg(ptr(rsi)); pop(r9); push(rax); hlt();
    );
    let at = CODE + code.len() as u64 - 2;
    assert_eq!(guest.run(&code).fault(), (vector::PF, Some(3), at));
    assert_eq!((guest.reg(9), guest.cpu().sys.cr2), (0x5555, PAGE + TOP as u64 - 8));
}

#[test]
fn addresses_that_are_not_canonical() {
    let mut guest = with_stack();
    for at in [1u64 << 63, 1 << 47, (1 << 63) | PAGE, 0x8000_7fff_ffff_f000] {
        let code = asm!(64 at CODE, [again];
            mov(rsi, PAGE); mov(rdi, at + TOP as u64); mov(ecx, 20i32); lea(rsp, ptr(rsi + TOP)); set_label(&mut again);
            push(rcx); pop(rax); dec(ecx); cmovz(rsp, rdi); jns(again); hlt();
        );
        let push = CODE + code.len() as u64 - 11;
        assert_eq!(guest.run_kernel(&code).fault(), (vector::SS, Some(0), push), "{at:#x}");
    }
}

#[test]
fn code_on_the_stack() {
    let mut guest = with_stack();
    // mov eax, ecx's value; ret
    let code = asm!(64 at CODE, [again];
        mov(rsi, PAGE); mov(ecx, ROUNDS as i32); xor(r8, r8); set_label(&mut again);
        lea(rsp, ptr(rsi + TOP)); mov(eax, ecx); shl(rax, 8i32); mov(rdx, 0xc300_0000_00b8u64); or(rax, rdx); push(rax); mov(rbx, rsp); call(rbx);
        add(r8, rax); push(rax); pop(rdx); sub(edx, ecx); or(r9, rdx); dec(ecx); jnz(again); hlt();
    );
    guest.kernel(sel::CODE);
    guest.cpu().gpr[9] = 0;
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!((guest.reg(8), guest.reg(9)), ((1..=ROUNDS).sum::<u64>(), 0));
}

#[test]
fn deep_calls_across_pages() {
    let mut guest = with_stack();
    (1..8).for_each(|page| guest.map(PAGE + page * 0x1000, FRAME + page * 0x1000, 3));
    // sum(n) = n + sum(n - 1), with frames of 0x68 bytes over six pages, some of which lie across two.
    let code = asm!(64 at CODE, [again, sum, last];
        mov(rsi, PAGE + 0x7000); mov(r12d, 50i32); xor(r8, r8); set_label(&mut again);
        mov(rsp, rsi); mov(edi, ROUNDS as i32); call(sum); add(r8, rax); dec(r12d); jnz(again); hlt();
        set_label(&mut sum); test(edi, edi); jz(last); sub(rsp, 0x60i32); mov(dword_ptr(rsp + 0x14), edi); movups(xmmword_ptr(rsp + 0x33), xmm0);
        dec(edi); call(sum); add(eax, dword_ptr(rsp + 0x14)); add(rsp, 0x60i32); ret();
        set_label(&mut last); xor(eax, eax); ret();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(guest.reg(8), 50 * (1..=ROUNDS).sum::<u64>());
}
