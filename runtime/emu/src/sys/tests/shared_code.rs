//! Translated code that all vCPUs execute, and any of them makes, links, ends and empties.

use iced_x86::code_asm::*;
use mvm_engine::VmExit;

use super::smp::{AP_CODE, Machine, start_others};
use crate::testing::asm::asm;
use crate::testing::guest::{CODE, DATA, PML4};

/// Functions that return a number which is in their code, one in a page: every other one goes on in the next page. Where each of
/// them is stands in a table, and so does the number.
const FUNCTIONS: u64 = 12;
const FUNCTION: u64 = 0x60_0000;
const ADDRESSES: u64 = DATA + 0x1000;
const NUMBERS: u64 = DATA + 0x2000;
const LOCKS: u64 = DATA + 0x3000;
/// What they call, in another page.
const HELPER: u64 = 0x68_0000;
/// Much code, for the room that it takes.
const FILLER: u64 = 0x70_0000;

fn put_functions(machine: &Machine) {
    machine.guest.put(HELPER, &asm!(64 at HELPER; xor(eax, 0x55i32); ret();));
    for i in 0..FUNCTIONS {
        let at = FUNCTION + i * 0x1000 + if i % 2 == 0 { 0x100 } else { 0xffd };
        machine.guest.put(at, &asm!(64 at at; mov(eax, 0i32); call(HELPER); ret();));
        machine.guest.put64(ADDRESSES + i * 8, at);
    }
    // A jump to the next instruction ends each of many blocks.
    let mut filler = [0x01, 0xd8, 0xeb, 0x00].repeat(300);
    filler.push(0xc3);
    machine.guest.put(FILLER, &filler);
}

/// In each round one of the functions: perhaps with another number from now on, or with another highest byte (which may be in another
/// page), it has to return what it should. Whoever changes
/// it and whoever calls it does so under its lock, with a serializing instruction before (SDM vol. 3, 9.1.3).
fn body(at: u64, rounds: i32, vcpus: i32) -> Vec<u8> {
    asm!(64 at at, [again, take, one_byte, call_, right, done, free];
        mov(rbp, DATA); mov(r13d, edi); imul_3(r13d, r13d, 0x1234567i32); add(r13d, 77i32); mov(r14d, rounds);
        set_label(&mut again);
        imul_3(r13d, r13d, 1664525i32); add(r13d, 1013904223i32); mov(eax, r13d); shr(eax, 8i32); xor(edx, edx); mov(ecx, FUNCTIONS as i32);
        div(ecx); mov(r12d, edx);
        set_label(&mut take); mov(eax, 1i32); mov(rsi, LOCKS); xchg(dword_ptr(rsi + r12 * 4), eax); test(eax, eax); jz(free); pause(); jmp(take);
        set_label(&mut free);
        xor(eax, eax); cpuid(); mov(rsi, ADDRESSES); mov(rsi, qword_ptr(rsi + r12 * 8)); mov(rdi, NUMBERS);
        test(r13d, 0x3000_0000i32); jnz(call_);
        test(r13d, 0x800_0000i32); jnz(one_byte);
        mov(dword_ptr(rsi + 1), r13d); mov(dword_ptr(rdi + r12 * 4), r13d); jmp(call_);
        set_label(&mut one_byte); mov(byte_ptr(rsi + 4), r13b); mov(byte_ptr(rdi + r12 * 4 + 3), r13b);
        set_label(&mut call_); call(rsi); xor(eax, 0x55i32); cmp(eax, dword_ptr(rdi + r12 * 4)); je(right); lock().inc(dword_ptr(rbp + 8));
        set_label(&mut right); mov(rsi, LOCKS); mov(dword_ptr(rsi + r12 * 4), 0i32);
        xor(eax, eax); mov(ebx, 1i32); call(FILLER); cmp(eax, 300i32); setne(al); movzx(eax, al); lock().add(dword_ptr(rbp + 12), eax);
        dec(r14d); jnz(again);
        lock().inc(dword_ptr(rbp)); set_label(&mut done); pause(); cmp(dword_ptr(rbp), vcpus); jne(done); cli(); hlt();
    )
}

/// A machine of so many vCPUs, `workers` of which are to do that for so many rounds, with so much room for code that runs often.
fn prepare(vcpus: u32, workers: i32, rounds: i32, room: Option<usize>, trials: u8) -> Machine {
    let machine = Machine::new(vcpus);
    if let Some(store) = machine.vm.store() {
        store.set_trials(trials);
        if let Some(room) = room {
            store.set_room(room);
        }
    }
    put_functions(&machine);
    machine.guest.put(AP_CODE, &body(AP_CODE, rounds, workers));
    let mut code = start_others();
    code.extend([0x31, 0xff]); // xor edi, edi
    let at = CODE + code.len() as u64;
    code.extend(body(at, rounds, workers));
    machine.guest.put(CODE, &code);
    machine
}

/// Runs it. Returns how often everything was emptied.
fn finish(machine: Machine, workers: u32) -> u64 {
    let vm = machine.vm.clone();
    let (guest, exits) = machine.run();
    assert!(exits.contains(&VmExit::HaltedForever), "{exits:?}");
    assert_eq!(guest.get32(DATA), workers, "all have come to their end");
    assert_eq!(guest.get64(DATA + 8), 0, "wrong numbers, and wrong sums");
    vm.store().map_or(0, |store| store.emptied())
}

#[test]
fn functions_that_any_of_three_changes_under_all_of_them() {
    finish(prepare(3, 3, 5000, None, 0), 3);
    finish(prepare(3, 3, 5000, None, 3), 3);
}

#[test]
fn some_pages_are_compared_and_others_watched() {
    for nth in 1..=3 {
        let mut machine = prepare(3, 3, 3000, None, nth as u8 - 1);
        machine.guest.cpu().mmu.phys().compare_code(nth);
        finish(machine, 3);
    }
}

#[test]
fn code_is_emptied_under_those_who_execute_it() {
    // How often is a matter of who runs when.
    let emptied = finish(prepare(3, 3, 3000, Some(16 << 10), 0), 3);
    assert!(emptied > 2 || crate::testing::tier() == crate::Tier::Interpreter, "{emptied}");
}

#[test]
fn one_that_executes_no_translated_code_holds_nobody_up() {
    // Three more have executed some, and have a breakpoint armed from then on, so that they go step by step.
    let machine = prepare(6, 3, 2000, Some(16 << 10), 0);
    let mut code = asm!(64 at AP_CODE, [others, again, spin];
        cmp(edi, 3i32); jb(others); mov(r14d, 50i32); mov(ebx, 1i32); set_label(&mut again); call(FILLER); dec(r14d); jnz(again);
        mov(eax, 0x1234i32); mov(dr0, rax); mov(eax, 0x402i32); mov(dr7, rax); mov(rbp, DATA);
        set_label(&mut spin); pause(); cmp(dword_ptr(rbp), 3i32); jne(spin); cli(); hlt(); set_label(&mut others); nop();
    );
    code.extend(body(AP_CODE + code.len() as u64, 2000, 3));
    machine.guest.put(AP_CODE, &code);
    // Who steps at the end holds up the second one at the latest.
    let emptied = finish(machine, 3);
    assert!(emptied > 4 || crate::testing::tier() == crate::Tier::Interpreter, "{emptied}");
}

#[test]
fn what_one_has_made_another_one_finds() {
    // The first runs it all before it starts the second.
    let machine = Machine::new(2);
    put_functions(&machine);
    let calls = |at: u64| {
        asm!(64 at at, [again];
            mov(ecx, 100i32); set_label(&mut again); xor(eax, eax); mov(ebx, 1i32); call(FILLER); dec(ecx); jnz(again);
            mov(rbp, DATA); lock().add(dword_ptr(rbp), eax);
        )
    };
    let mut second = calls(AP_CODE);
    second.extend(asm!(64 at AP_CODE + second.len() as u64; cli(); hlt();));
    machine.guest.put(AP_CODE, &second);
    let mut code = calls(CODE);
    code.extend(start_others());
    let at = CODE + code.len() as u64;
    code.extend(asm!(64 at at, [wait_]; set_label(&mut wait_); pause(); cmp(dword_ptr(rbp), 600i32); jne(wait_); cli(); hlt();));
    machine.guest.put(CODE, &code);
    let vm = machine.vm.clone();
    let (guest, exits) = machine.run();
    assert!(exits.contains(&VmExit::HaltedForever), "{exits:?}");
    assert_eq!(guest.get32(DATA), 600);
    let blocks = |vcpu: u32| vm.figure(&format!("vcpu{vcpu}.jit-blocks"));
    if let (Some(first), Some(second)) = (blocks(0), blocks(1)) {
        assert!(first > 300 && second < 20, "{first} {second}");
    }
}

#[test]
fn one_jump_to_what_two_have_at_an_address() {
    // The page with the call is the same in both address spaces, and the one that it goes to is not.
    const CALLER: u64 = 0x80_0000_0000;
    const CALLED: u64 = CALLER + 0x1000;
    let mut machine = Machine::new(2);
    if let Some(store) = machine.vm.store() {
        store.set_trials(0);
    }
    let guest = &mut machine.guest;
    let other = guest.new_table();
    guest.put64(other, guest.get64(PML4));
    for (top, called) in [(PML4, 0x60_1000), (other, 0x60_2000)] {
        guest.map_in(top, CALLER, 0x60_0000, 3);
        guest.map_in(top, CALLED, called, 3);
    }
    guest.put(0x60_0000, &asm!(64 at CALLER; call(CALLED); ret();));
    guest.put(0x60_1000, &asm!(64 at CALLED; mov(eax, 1i32); ret();));
    guest.put(0x60_2000, &asm!(64 at CALLED; mov(eax, 2i32); ret();));
    let calls = |at: u64, right: i32| {
        asm!(64 at at, [both, again, counted, wait_];
            mov(rbp, DATA); mov(rbx, CALLER); mov(r14d, 200_000i32); call(rbx); lock().inc(dword_ptr(rbp + 64));
            set_label(&mut both); pause(); cmp(dword_ptr(rbp + 64), 2i32); jne(both); set_label(&mut again); call(rbx); cmp(eax, right); je(counted);
            lock().inc(dword_ptr(rbp + 8)); set_label(&mut counted); dec(r14d); jnz(again);
            lock().inc(dword_ptr(rbp)); set_label(&mut wait_); pause(); cmp(dword_ptr(rbp), 2i32); jne(wait_); cli(); hlt();
        )
    };
    let mut code = asm!(64 at AP_CODE; mov(rax, other); mov(cr3, rax););
    code.extend(calls(AP_CODE + code.len() as u64, 2));
    machine.guest.put(AP_CODE, &code);
    let mut code = start_others();
    code.extend(calls(CODE + code.len() as u64, 1));
    machine.guest.put(CODE, &code);
    finish(machine, 2);
}
