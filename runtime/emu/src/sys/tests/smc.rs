//! Code that changes (invariants 5 to 8): by its own stores, through aliases, by devices.

use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use iced_x86::code_asm::*;
use mvm_memory::{GuestRam, Loan};
use vm_memory::{Bytes, GuestAddress};

use crate::Tier;
use crate::fault::vector;
use crate::mmu::PhysMemory;
use crate::testing::asm::asm;
use crate::testing::guest::{
    CODE, DATA, End, Guest, Hook, STACK, USER, USER_DATA, USER_GPA, USER_STACK, lock, pte, sel,
};

/// A function at `at` that returns `value` in EAX.
fn returns(at: u64, value: u32) -> Vec<u8> {
    asm!(64 at at; mov(eax, value); ret();)
}

#[test]
fn stores_into_the_own_block_ahead() {
    let mut guest = Guest::new();
    // Every width and kind of store that can hit the immediate of the MOV behind it.
    for (store, value) in [
        (asm!(64 at CODE; mov(byte_ptr(rbx), 0x5ai32);), 0x1122_335au64),
        (asm!(64 at CODE; mov(word_ptr(rbx), 0x5a5ai32);), 0x1122_5a5a),
        (asm!(64 at CODE; mov(dword_ptr(rbx), 0x5a5ai32);), 0x5a5a),
        (asm!(64 at CODE; inc(byte_ptr(rbx));), 0x1122_3345),
        (asm!(64 at CODE; lock().inc(byte_ptr(rbx));), 0x1122_3345),
        (asm!(64 at CODE; lock().xadd(byte_ptr(rbx), ch);), 0x1122_3349),
        (asm!(64 at CODE; xchg(byte_ptr(rbx), ch);), 0x1122_3305),
        (asm!(64 at CODE; stosb();), 0x1122_3377),
        (asm!(64 at CODE; rep().stosb();), 0x1122_3377),
        (asm!(64 at CODE; rep().movsb();), 0x1122_339a),
        (asm!(64 at CODE; movsb();), 0x1122_339a),
        (asm!(64 at CODE; movd(dword_ptr(rbx), xmm0);), 0x3f80_0000),
        (asm!(64 at CODE; bts(dword_ptr(rbx), 0i32);), 0x1122_3345),
        (asm!(64 at CODE; setz(byte_ptr(rbx));), 0x1122_3300),
        (asm!(64 at CODE; mov(word_ptr(rbx), ss);), 0x1122_0010),
        (asm!(64 at CODE; cmpxchg(byte_ptr(rbx), ch);), 0x1122_3344),
        (asm!(64 at CODE; pop(word_ptr(rbx));), 0x1122_beef),
        (asm!(64 at CODE; fst(dword_ptr(rbx));), 0x3f80_0000),
        (asm!(64 at CODE; insb();), 0x1122_3380),
        (asm!(64 at CODE; stmxcsr(dword_ptr(rbx));), 0x1f80),
    ] {
        let mut code = asm!(64 at CODE; fninit(); fld1(); test(rsp, rsp););
        code.extend(store);
        let immediate = CODE + code.len() as u64 + 1;
        code.extend([0xb8, 0x44, 0x33, 0x22, 0x11]);
        code.push(0xf4);
        for _ in 0..3 {
            guest.kernel(sel::CODE);
            guest.put(DATA, &[0x9a]);
            guest.put64(STACK - 16, 0xbeef);
            let cpu = guest.cpu();
            cpu.gpr[4] -= 16;
            (cpu.gpr[3], cpu.gpr[7], cpu.gpr[6]) = (immediate, immediate, DATA);
            (cpu.gpr[0], cpu.gpr[1], cpu.gpr[2]) = (0x77, 1, 0x80);
            if code.windows(2).any(|w| w == [0x0f, 0xc0] || w == [0x86, 0x2b]) {
                cpu.gpr[1] = 0x501;
            }
            cpu.vec.ymm[0].0[0] = 0x3f80_0000;
            assert_eq!(guest.run(&code), End::Halt);
            assert_eq!(guest.reg(0), value, "{code:02x?}");
        }
    }
}

#[test]
fn stores_across_the_end_of_a_page_into_code() {
    let mut guest = Guest::new();
    // The store covers the last bytes of one page and the immediate at the start of the next.
    let at = 0x2ff0;
    let code = asm!(64 at at; mov(qword_ptr(rbx), rcx); nop(); nop(); nop(); nop(); nop(); nop(); nop(); nop(); nop(); nop(); nop(); nop(););
    assert_eq!(at + code.len() as u64, 0x2fff);
    guest.put(at, &code);
    guest.put(0x2fff, &[0xb8, 1, 0, 0, 0, 0xf4]);
    for value in [5u64, 9] {
        guest.kernel(sel::CODE);
        let cpu = guest.cpu();
        (cpu.gpr[3], cpu.gpr[1]) = (0x2ffc, 0x90_9090 | 0xb8 << 24 | value << 32);
        cpu.rip = at;
        assert_eq!(guest.go(), End::Halt);
        assert_eq!(guest.reg(0), value);
    }
}

#[test]
fn functions_in_other_pages_change_between_calls() {
    let mut guest = Guest::new();
    guest.put(DATA, &returns(DATA, 7));
    let code = asm!(64 at CODE, [again];
        mov(rbx, DATA); xor(esi, esi); mov(ecx, 200i32); set_label(&mut again); call(rbx); add(esi, eax);
        inc(dword_ptr(rbx + 1)); dec(ecx); jnz(again); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(guest.reg(6), (7..207).sum::<u64>());
}

/// As a file server does, which fills pages of the guest from a process of its own.
#[test]
fn another_mapping_of_ram_changes_code_before_it_tells() {
    const ROUNDS: u64 = 200;
    let (asked, told, limit) = (DATA + 0x800, DATA + 0x808, Duration::from_secs(120));
    let mut guest = Guest::new();
    guest.put(DATA, &returns(DATA, 0));
    guest.put64(asked, 0);
    guest.put64(told, 0);
    let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
    let loans = guest.ram.lend().into_iter().map(|l| Loan {
        start: l.start,
        size: l.size,
        ram: own(l.ram),
        tracker: own(l.tracker),
    });
    let other = GuestRam::attach(loans.collect()).unwrap();
    let server = std::thread::spawn(move || {
        let (memory, end) = (other.memory(), Instant::now() + limit);
        for round in 1..=ROUNDS {
            while memory.load::<u64>(GuestAddress(asked), Ordering::SeqCst).unwrap() != round {
                assert!(Instant::now() < end, "the guest does not get to round {round}");
                std::thread::yield_now();
            }
            memory.write_obj(round as u32, GuestAddress(DATA + 1)).unwrap();
            memory.store(round, GuestAddress(told), Ordering::SeqCst).unwrap();
        }
    });
    // All of the loop's jumps stay in its page. A failure is a halt with RDX short of the rounds.
    let code = asm!(64 at CODE, [again, wait, end];
        mov(rbx, DATA); xor(edx, edx); mov(r12, 1u64 << 34);
        set_label(&mut again); inc(rdx); mov(qword_ptr(rbx + 0x800), rdx);
        set_label(&mut wait); dec(r12); jz(end); pause(); cmp(qword_ptr(rbx + 0x808), rdx); jne(wait);
        call(rbx); cmp(rax, rdx); jne(end); cmp(edx, ROUNDS as i32); jb(again);
        set_label(&mut end); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!((guest.reg(0), guest.reg(2)), (ROUNDS, ROUNDS));
    server.join().unwrap();
}

#[test]
fn two_virtual_aliases_of_a_page() {
    let mut guest = Guest::new();
    let (write, run) = (0x5000_0000u64, 0x5800_0000u64);
    guest.map(write, 0x60_0000, 3);
    guest.map(run, 0x60_0000, 3);
    guest.put(0x60_0000, &returns(run, 1));
    let code = asm!(64 at CODE, [again];
        mov(rbx, write); mov(rdx, run); xor(esi, esi); mov(ecx, 100i32); mov(byte_ptr(rbx + 0x800), 1i32);
        set_label(&mut again); call(rdx); add(esi, eax); inc(dword_ptr(rbx + 1)); dec(ecx); jnz(again); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(guest.reg(6), (1..101).sum::<u64>());
}

#[test]
fn one_page_at_two_addresses_is_no_address_in_its_blocks() {
    let mut guest = Guest::new();
    let (first, second) = (0x5000_0000u64, 0xffff_9000_1234_5000u64);
    guest.map(first, 0x60_0000, 3);
    guest.map(second, 0x60_0000, 3);
    // LEA relative to RIP, the pushed return address, a fault's RIP.
    // lea rax,[rip]; call next; next: pop rbx; ud2
    guest.put(0x60_0000, &[0x48, 0x8d, 0x05, 0, 0, 0, 0, 0xe8, 0, 0, 0, 0, 0x5b, 0x0f, 0x0b]);
    for base in [first, second, first] {
        guest.kernel(sel::CODE);
        guest.cpu().rip = base;
        assert_eq!(guest.go().fault(), (vector::UD, None, base + 13));
        assert_eq!((guest.reg(0), guest.reg(3)), (base + 7, base + 12));
    }
}

#[test]
fn a_page_is_mapped_elsewhere() {
    let mut guest = Guest::new();
    let page = 0x5000_0000u64;
    guest.map(page, 0x60_0000, 3);
    guest.put(0x60_0000, &returns(page, 1));
    guest.put(0x60_1000, &returns(page, 2));
    let entry = guest.entry(page, 1);
    let code = asm!(64 at CODE;
        mov(rbx, page); mov(rdi, entry); call(rbx); mov(esi, eax); add(qword_ptr(rdi), 0x1000i32); invlpg(ptr(rbx));
        call(rbx); mov(ecx, eax); sub(qword_ptr(rdi), 0x1000i32); mov(rax, cr3); mov(cr3, rax); call(rbx); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!((guest.reg(6), guest.reg(1), guest.reg(0)), (1, 2, 1));
}

#[test]
fn an_instruction_across_pages_follows_both_and_the_mapping() {
    let mut guest = Guest::new();
    let page = 0x5000_0000u64;
    guest.map(page, 0x60_0000, 3);
    guest.map(page + 0x1000, 0x60_1000, 3);
    // MOV EAX, imm32 at the end of the first page: two bytes of the immediate there.
    guest.put(0x60_0ffd, &[0xb8, 0x11, 0x22]);
    guest.put(0x60_1000, &[0x33, 0x44, 0xc3]);
    guest.put(0x60_2000, &[0x55, 0x66, 0xc3]);
    let entry = guest.entry(page + 0x1000, 1);
    let code = asm!(64 at CODE;
        mov(rbx, page + 0xffd); mov(rdi, entry); call(rbx); mov(r8, rax); inc(byte_ptr(rbx + 1)); call(rbx); mov(r9, rax);
        inc(byte_ptr(rbx + 4)); call(rbx); mov(r10, rax); add(qword_ptr(rdi), 0x1000i32); invlpg(ptr(rbx + 3)); call(rbx);
        mov(r11, rax); mov(qword_ptr(rdi), 0i32); invlpg(ptr(rbx + 3)); call(rbx);
    );
    let (vector, error, rip) = guest.run(&code).fault();
    assert_eq!((vector, error, rip), (vector::PF, Some(0x10), page + 0xffd));
    assert_eq!(guest.cpu().sys.cr2, page + 0x1000);
    assert_eq!(guest.cpu().gpr[8..12], [0x4433_2211, 0x4433_2212, 0x4533_2212, 0x6655_2212]);
}

#[test]
fn devices_write_code() {
    let mut guest = Guest::new();
    guest.put(DATA, &returns(DATA, 1));
    let code = asm!(64 at CODE; mov(rbx, DATA); call(rbx); hlt(););
    for value in 2..20u32 {
        assert_eq!(guest.run_kernel(&code), End::Halt);
        assert_eq!(guest.reg(0), u64::from(value - 1));
        // Through vm-memory, as devices do; and through the engine's own path for clock pages.
        if value % 2 == 0 {
            guest.put(DATA + 1, &value.to_le_bytes());
        } else {
            assert!(guest.cpu().phys_write(DATA + 1, &value.to_le_bytes()));
        }
    }
}

#[test]
fn user_code_writes_code_and_returns_to_it() {
    let mut guest = Guest::new();
    // What JIT compilers do: write into a page, run it, over and over at changing places.
    let code = asm!(64 at USER, [again];
        mov(rdi, USER_DATA); xor(esi, esi); mov(ecx, 1000i32);
        set_label(&mut again);
        mov(byte_ptr(rdi), 0xb8u32); mov(dword_ptr(rdi + 1), ecx); mov(byte_ptr(rdi + 5), 0xc3u32); call(rdi);
        add(esi, eax); add(rdi, 6i32); dec(ecx); jnz(again); ud2();
    );
    assert_eq!(guest.run_user(&code).frame().vector, vector::UD);
    assert_eq!(guest.reg(6), 500_500);
    // Code on the stack.
    let code = asm!(64 at USER; mov(rax, 0x9090_90c3_5a5a_5ab8u64); push(rax); mov(byte_ptr(rsp + 4), 0i32); mov(byte_ptr(rsp + 5), 0xc3u32); call(rsp); ud2(););
    assert_eq!(guest.run_user(&code).frame().vector, vector::UD);
    assert_eq!(guest.reg(0), 0x005a_5a5a);
    assert_eq!(guest.get64(USER_GPA + (USER_STACK - USER) - 8) >> 40 & 0xff, 0xc3);
}

#[test]
fn page_walks_write_code_too() {
    let mut guest = Guest::new();
    let page = 0x5000_0000u64;
    // As code the entry is ADD EAX, ECX; RET. With its A bit set it is AND EAX, ECX; RET.
    guest.map(page, 0xc3_c000, pte::P | pte::W | pte::G);
    let entry = guest.entry(page, 1);
    assert_eq!(guest.get::<3>(entry), [0x03, 0xc1, 0xc3]);
    let code = asm!(64 at CODE;
        mov(rbx, entry); mov(ecx, 3i32); mov(eax, 6i32); call(rbx); mov(esi, eax); mov(rdi, page);
        mov(edx, dword_ptr(rdi)); mov(eax, 6i32); call(rbx); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!((guest.reg(6), guest.reg(0)), (9, 2));
}

#[test]
fn a_loop_over_an_instruction_across_pages_whose_second_half_changes() {
    let mut guest = Guest::new();
    // One page at two addresses, with another one behind it each time.
    let (first, second) = (0x5000_0000u64, 0x5800_0000u64);
    for (page, next) in [(first, 0x60_1000), (second, 0x60_2000)] {
        guest.map(page, 0x60_0000, 3);
        guest.map(page + 0x1000, next, 3);
    }
    // head: add esi, imm32 across the pages; dec ecx; jnz head; ret
    let tail = |high: u8| [high, 0, 0, 0xff, 0xc9, 0x0f, 0x85, 0xf2, 0xff, 0xff, 0xff, 0xc3];
    guest.put(0x60_0ffd, &[0x81, 0xc6, 0x01]);
    guest.put(0x60_1000, &tail(0x01));
    guest.put(0x60_2000, &tail(0x02));
    let head = |page: u64| page + 0xffd;
    // By turns, and the second half of the first one changes each time.
    let code = asm!(64 at CODE, [again];
        mov(r12, head(first)); mov(r13, head(second)); xor(esi, esi); mov(edx, 30i32); mov(rbx, 0x60_1000u64);
        set_label(&mut again); mov(ecx, 10i32); call(r12); mov(ecx, 10i32); call(r13);
        inc(byte_ptr(rbx)); dec(edx); jnz(again); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    let sum: u64 = (1..=30u64).map(|high| 10 * (high << 8 | 1) + 10 * 0x201).sum();
    assert_eq!(guest.reg(6), sum);
}

#[test]
fn a_page_becomes_code_while_a_block_talks_to_a_device() {
    let mut guest = Guest::with_tier(Tier::Translator);
    let device = 0x5000_0000u64;
    guest.map(device, 0xfd00_0000, 3);
    let phys = guest.cpu().mmu.phys().clone();
    let (page, _) = phys.find(DATA).unwrap();
    let generation = |phys: &PhysMemory| phys.code_page(page).unwrap().generation();
    // Another vCPU decodes code there meanwhile.
    let other = phys.clone();
    let watch = Hook(Box::new(move || {
        other.watch(page, 0x10, 4, 1);
    }));
    *lock(&guest.bus.on_mmio_write) = Some(watch);
    let code = asm!(64 at CODE;
        mov(rbx, DATA); mov(rdi, device); mov(dword_ptr(rbx), eax); mov(dword_ptr(rdi), eax); mov(dword_ptr(rbx + 0x10), eax); hlt();
    );
    // Once for the TLB, which the first access would miss.
    for _ in 0..2 {
        let before = generation(&phys);
        assert_eq!(guest.run_kernel(&code), End::Halt);
        assert_ne!(generation(&phys), before, "the store to what is code now was noticed");
    }
}
