//! Code that is compared with what it was made of instead of being watched (J22). `MVM_TEST_TIER=compared` runs all other tests so.

use std::time::{Duration, Instant};

use iced_x86::code_asm::*;

use crate::Tier;
use crate::testing::asm::asm;
use crate::testing::guest::{CODE, DATA, End, Guest, sel};

/// Calls of the function, each time.
const CALLS: u64 = 1000;
/// What it counts, in its own line.
const COUNTER: u64 = DATA + 32;

fn guest() -> Guest {
    let mut guest = Guest::with_tier(Tier::Translator);
    let jit = guest.vcpu.dispatcher_mut().jit_mut().unwrap();
    jit.set_trials(0);
    guest
}

/// Ends of translated code, and times that code was found to have changed.
fn ends(guest: &mut Guest) -> (u64, u64) {
    let counters = &guest.vcpu.dispatcher_mut().jit().unwrap().counters;
    (counters.killed_pages, counters.left_changed)
}

/// Calls a function that counts its calls beside itself. Returns how often its code has ended meanwhile.
fn count_calls(guest: &mut Guest) -> u64 {
    let before = (guest.get64(COUNTER), ends(guest).0);
    guest.kernel(sel::CODE);
    guest.cpu().rip = CODE;
    assert_eq!(guest.go(), End::Halt);
    assert_eq!(guest.get64(COUNTER), before.0 + CALLS);
    ends(guest).0 - before.1
}

fn put_calls(guest: &mut Guest) {
    let calls = asm!(64 at CODE, [again];
        mov(ecx, CALLS as i32); set_label(&mut again); call(DATA); dec(ecx); jnz(again); hlt();
    );
    guest.put(DATA, &asm!(64 at DATA; inc(qword_ptr(COUNTER as u32)); ret();));
    guest.put(CODE, &calls);
}

#[test]
fn a_page_that_is_stored_to_all_the_time_is_compared_for_a_while() {
    let mut guest = guest();
    put_calls(&mut guest);
    let store = guest.vcpu.dispatcher_mut().jit().unwrap().store().clone();
    assert!(count_calls(&mut guest) > 1, "each store ends it");
    // How many come to pass in a window is a matter of the host's; that it never is enough is not.
    assert!((0..10_000).any(|_| store.compares() || count_calls(&mut guest) == CALLS));
    count_calls(&mut guest);
    assert!(store.compares());
    assert_eq!(count_calls(&mut guest), 0, "nothing ends it");
    assert_eq!(ends(&mut guest).1, 0, "nothing has changed");

    store.watch_again(Instant::now() + Duration::from_secs(3600));
    assert!(!store.compares());
    assert!(count_calls(&mut guest) > 1, "each store ends it");
}

#[test]
fn code_that_changes_is_found_out_with_the_flags_that_it_needs_now() {
    let mut guest = guest();
    guest.cpu().mmu.phys().compare_code(1);
    // XOR EAX, EAX, whom no flags reach, becomes SBB EAX, EAX, and that XOR again: entered directly and by the jump cache.
    let (xor, sbb) = (0x31, 0x19);
    let code = asm!(64 at CODE, [again, function];
        xor(esi, esi); mov(ecx, 100i32); lea(rdx, qword_ptr(function));
        set_label(&mut again);
        mov(eax, xor); mov(ebx, sbb); test(ecx, 1i32); cmovnz(eax, ebx); mov(byte_ptr(rdx), al);
        stc(); call(function); add(esi, eax); stc(); call(rdx); add(esi, eax);
        dec(ecx); jnz(again); hlt();
        set_label(&mut function); xor(eax, eax); ret();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(guest.reg(6) as i32, -100, "two for each SBB");
    assert_eq!(ends(&mut guest).1, 99, "each time but the first it was another one");
}

#[test]
fn blocks_end_at_each_store_in_whatever_is_called() {
    let mut guest = guest();
    guest.cpu().mmu.phys().compare_code(1);
    // The immediate behind the store is what was stored, by handlers as well as in place.
    let code = asm!(64 at CODE, [again, a, b, c];
        xor(esi, esi); mov(ecx, 50i32); set_label(&mut again);
        lea(rdi, qword_ptr(a)); mov(byte_ptr(rdi + 1), cl); set_label(&mut a); mov(eax, 7i32); add(esi, eax);
        lea(rdi, qword_ptr(b)); add(rdi, 1i32); mov(eax, ecx); stosb(); set_label(&mut b); mov(eax, 7i32); add(esi, eax);
        lea(rdi, qword_ptr(c)); stmxcsr(dword_ptr(rdi + 1)); set_label(&mut c); mov(eax, 7i32); add(esi, eax);
        dec(ecx); jnz(again); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(guest.reg(6), 2 * (1..=50).sum::<u64>() + 50 * 0x1f80);
}
