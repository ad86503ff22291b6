//! Interrupts: the shadow of STI and MOV SS, NMIs, HLT, the local APIC's timer and messages.

use std::sync::Arc;

use iced_x86::code_asm::*;
use mvm_engine::{MpState, Vcpu, VmExit};

use crate::apic::{Delivery, Message, Target};
use crate::fault::vector;
use crate::testing::asm::asm;
use crate::testing::guest::{CODE, End, Guest, USER, USER_GPA, lock, sel};

/// x2APIC on and enabled, TPR 0.
fn guest() -> Guest {
    let mut guest = Guest::new();
    let lapic = &mut guest.cpu().sys.lapic;
    lapic.set_base(0xfee0_0d00).expect("x2APIC");
    lapic.write_msr(0x80f, 0x1ff).expect("the spurious vector");
    guest
}

/// An interrupt that waits.
fn post(guest: &Guest, vector: u8) {
    guest.platform.apics.port(0).post(vector, false);
}

#[test]
fn interrupts_wait_for_if_and_come_after_the_shadow() {
    let mut guest = guest();
    post(&guest, 0x41);
    let code = asm!(64 at CODE; nop(); nop(); sti(); inc(eax); inc(eax); cli(); hlt(););
    let frame = guest.run(&code).frame();
    assert_eq!((frame.vector, frame.rip, guest.reg(0)), (0x41, CODE + 5, 1));
    assert_ne!(frame.flags & 0x200, 0);
    // STI; CLI lets nothing in; STI with IF set has no shadow.
    let mut guest = self::guest();
    post(&guest, 0x41);
    assert_eq!(guest.run(&asm!(64 at CODE; sti(); cli(); nop(); hlt();)), End::Halt);
    // STI; HLT sleeps and wakes at once, with RIP after the HLT.
    guest.kernel(sel::CODE);
    let frame = guest.run(&asm!(64 at CODE; sti(); hlt(); ud2();)).frame();
    assert_eq!((frame.vector, frame.rip), (0x41, CODE + 2));
}

#[test]
fn mov_ss_holds_interrupts_off() {
    let mut guest = guest();
    guest.handler(0x41, &asm!(64 at 0; mov(rbx, qword_ptr(rsp)); mov(ecx, 0x80bi32); xor(eax, eax); xor(edx, edx); wrmsr(); iretq();));
    // The self-IPI is pending from the WRMSR on, with IF off; POPF sets IF right before MOV SS.
    let code = asm!(64 at CODE;
        pushfq(); or(dword_ptr(rsp), 0x200i32); mov(esi, 0x10i32); mov(ecx, 0x83fi32); mov(eax, 0x41i32); xor(edx, edx);
        wrmsr(); nop(); popfq(); mov(ss, si); nop(); cli(); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(guest.reg(3), CODE + code.len() as u64 - 6, "right after POPF");
    let code = asm!(64 at CODE;
        mov(esi, 0x10i32); pushfq(); or(dword_ptr(rsp), 0x200i32); mov(ecx, 0x83fi32); mov(eax, 0x41i32); xor(edx, edx);
        mov(ss, si); popfq(); nop(); wrmsr(); mov(ss, si); nop(); nop(); cli(); hlt();
    );
    guest.kernel(sel::CODE);
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(guest.reg(3), CODE + code.len() as u64 - 7, "right after WRMSR");
}

#[test]
fn nmis_are_blocked_until_iret() {
    let mut guest = guest();
    // The handler counts, sends itself another NMI the first time, and notes the count before its IRET.
    let handler = asm!(64 at Guest::handler_at(2), [out];
        inc(r15); cmp(r15, 1i32); jne(out); mov(ecx, 0x830i32); mov(eax, 0x4_0400i32); xor(edx, edx); wrmsr();
        nop(); nop(); mov(r14, r15); set_label(&mut out); iretq();
    );
    guest.handler(vector::NMI, &handler);
    let code = asm!(64 at CODE; mov(ecx, 0x830i32); mov(eax, 0x4_0400i32); xor(edx, edx); wrmsr(); nop(); nop(); hlt(););
    guest.cpu().gpr[15] = 0;
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!((guest.reg(15), guest.reg(14)), (2, 1));
    // A fault inside of the handler: its IRET lets NMIs in already (as on the processor).
    assert!(!guest.cpu().sys.nmi_masked);
    // An NMI ends HLT with interrupts off.
    guest.kernel(sel::CODE);
    assert_eq!(guest.run(&asm!(64 at CODE; mov(eax, 7i32); hlt(); hlt();)), End::Halt);
    guest.platform.apics.send(Message {
        target: Target::Index(0),
        delivery: Delivery::Nmi,
        vector: 0,
        level: false,
    });
    guest.cpu().gpr[15] = 5;
    assert_eq!(guest.go(), End::Halt);
    assert_eq!(guest.reg(15), 6);
}

#[test]
fn an_nmi_before_the_start_up_is_ignored() {
    let mut guest = Guest::real();
    guest.put(0x8000, &asm!(16 at 0; mov(ax, 5i32); cli(); hlt();));
    guest.cpu().sys.activity = MpState::WaitForSipi;
    guest.platform.apics.port(0).nmi();
    assert_eq!(guest.run_vcpu(), VmExit::HaltedForever);
    assert_eq!(guest.cpu().sys.activity, MpState::WaitForSipi);
    guest.platform.apics.port(0).start_up(8);
    assert_eq!(guest.run_vcpu(), VmExit::HaltedForever);
    assert_eq!((guest.reg(0) as u16, guest.cpu().rip), (5, 5));
    assert_eq!(guest.cpu().sys.nmis_pending, 0);
}

#[test]
fn a_halted_processor_wakes_for_an_nmi() {
    let mut guest = guest();
    guest.handler(vector::NMI, &asm!(64 at 0; mov(eax, 9i32); iretq();));
    // HLT with IF on: asleep until somebody sends something.
    let platform = guest.platform.clone();
    let sender = std::thread::spawn(move || {
        while !platform.apics.port(0).attention.sleeping() {
            std::thread::yield_now();
        }
        platform.apics.port(0).nmi();
    });
    assert_eq!(guest.run(&asm!(64 at CODE; sti(); hlt(); cli(); hlt();)), End::Halt);
    assert_eq!(guest.reg(0), 9);
    sender.join().expect("the sender");
}

#[test]
fn x2apic_self_ipi_interrupts() {
    let mut guest = Guest::new();
    guest.handler(
        0x51,
        &asm!(64 at Guest::handler_at(0x51);
            mov(ecx, 0x812i32); rdmsr(); mov(ebx, eax); mov(ecx, 0x80ai32); rdmsr(); mov(esi, eax); mov(ecx, 0x80bi32);
            xor(eax, eax); xor(edx, edx); wrmsr(); mov(ecx, 0x812i32); rdmsr(); mov(edi, eax); inc(r15); iretq();),
    );
    let code = asm!(64 at CODE;
        mov(ecx, 0x1bi32); rdmsr(); or(eax, 0xc00i32); wrmsr(); mov(ecx, 0x80fi32); mov(eax, 0x1ffi32); xor(edx, edx);
        wrmsr(); sti(); mov(ecx, 0x83fi32); mov(eax, 0x51i32); wrmsr(); nop(); mov(ecx, 0x802i32); rdmsr(); cli(); hlt();
    );
    guest.cpu().gpr[15] = 0;
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(
        (guest.reg(15), guest.reg(3), guest.reg(7)),
        (1, 1 << 0x11, 0),
        "in service, then ended"
    );
    assert_eq!((guest.reg(6), guest.reg(0)), (0x50, 0), "PPR; the id");
}

#[test]
fn task_priority_by_cr8() {
    let mut guest = guest();
    post(&guest, 0x41);
    let code = asm!(64 at CODE; mov(eax, 4i32); mov(cr8, rax); sti(); nop(); nop(); mov(rbx, cr8); xor(eax, eax); mov(cr8, rax); nop(););
    let frame = guest.run(&code).frame();
    assert_eq!((frame.vector, frame.rip, guest.reg(3)), (0x41, CODE + code.len() as u64 - 1, 4));
}

#[test]
fn priorities_nest() {
    let mut guest = guest();
    // 0x41 enables interrupts in its handler; 0x45 of its class must wait, 0x61 comes.
    guest.handler(0x41, &asm!(64 at 0; mov(ecx, 0x83fi32); xor(edx, edx); mov(eax, 0x45i32); wrmsr(); mov(eax, 0x61i32); wrmsr(); sti(); nop(); nop();));
    post(&guest, 0x41);
    let frame = guest.run(&asm!(64 at CODE; sti(); nop(); nop();)).frame();
    assert_eq!((frame.vector, frame.rip), (0x61, Guest::handler_at(0x41) + 21 + 2));
    assert_eq!(guest.cpu().sys.lapic.ppr(), 0x60);
}

#[test]
fn tsc_deadline_interrupts() {
    let mut guest = guest();
    // A deadline a little ahead; the processor spins until it comes.
    guest.handler(0xec, &asm!(64 at 0; cli(); mov(ecx, 0x6e0i32); rdmsr(); hlt();));
    let code = asm!(64 at CODE, [spin];
        mov(ecx, 0x832i32); mov(eax, 0x4_00eci32); xor(edx, edx); wrmsr(); rdtsc(); add(eax, 200_000i32); adc(edx, 0i32);
        mov(ecx, 0x6e0i32); wrmsr(); rdmsr(); mov(r8, rax); sti(); set_label(&mut spin); inc(rbx); jmp(spin);
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!((guest.reg(0), guest.reg(2)), (0, 0), "it disarms itself");
    assert_eq!(guest.cpu().sys.lapic.port().irr.highest(), None);
}

#[test]
fn timer_wakes_a_halted_processor() {
    for (lvt, initial) in [(0xecu64, 100_000u64), (0x2_00ec, 50_000)] {
        let mut guest = guest();
        guest.handler(
            0xec,
            &asm!(64 at Guest::handler_at(0xec); inc(r15); mov(ecx, 0x80bi32); xor(eax, eax); xor(edx, edx); wrmsr(); iretq();),
        );
        guest.cpu().gpr[15] = 0;
        // One-shot once; periodic three times.
        let wanted = if lvt > 0xff { 3i32 } else { 1 };
        let code = asm!(64 at CODE, [again];
            xor(edx, edx); mov(ecx, 0x83ei32); mov(eax, 0xbi32); wrmsr(); mov(ecx, 0x832i32); mov(eax, lvt as i32); wrmsr();
            mov(ecx, 0x838i32); mov(eax, initial as i32); wrmsr();
            set_label(&mut again); sti(); hlt(); cli(); cmp(r15d, wanted); jl(again);
            mov(ecx, 0x839i32); rdmsr(); mov(ebx, eax); mov(ecx, 0x838i32); xor(eax, eax); wrmsr(); hlt();
        );
        assert_eq!(guest.run(&code), End::Halt);
        // The periodic one may come once more before interrupts are off again.
        let came = guest.reg(15);
        assert!(came == wanted as u64 || lvt > 0xff && came > wanted as u64, "{came}");
        assert!(guest.reg(3) <= initial);
        assert_eq!(guest.cpu().sys.lapic.deadline(), u64::MAX, "stopped");
    }
}

#[test]
fn the_xapic_page_by_a_guest() {
    let mut guest = Guest::new();
    let page = 0x5000_0000u64;
    guest.map(page, 0xfee0_0000, 3);
    guest.handler(
        0x51,
        &asm!(64 at Guest::handler_at(0x51); mov(eax, dword_ptr(rbx + 0x120)); mov(dword_ptr(rbx + 0xb0), 0i32); inc(r15); iretq();),
    );
    guest.cpu().gpr[15] = 0;
    guest.cpu().gpr[3] = page;
    // Logical id 2 in the flat model, an IPI to it, a self-IPI by shorthand, ID and version.
    let code = asm!(64 at CODE;
        mov(dword_ptr(rbx + 0xf0), 0x1ffi32); mov(dword_ptr(rbx + 0xd0), 0x0200_0000i32); sti();
        mov(dword_ptr(rbx + 0x310), 0x0300_0000i32); mov(dword_ptr(rbx + 0x300), 0x4851i32); nop();
        mov(dword_ptr(rbx + 0x310), 0x0400_0000i32); mov(dword_ptr(rbx + 0x300), 0x4851i32); nop();
        mov(dword_ptr(rbx + 0x300), 0x4_4051i32); nop(); cli(); mov(esi, dword_ptr(rbx + 0x30));
        mov(edi, dword_ptr(rbx + 0x20)); mov(dword_ptr(rbx + 0x80), 0x20i32); mov(r8d, dword_ptr(rbx + 0xa0)); hlt();
    );
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!(guest.reg(15), 2, "one was for nobody");
    assert_eq!((guest.reg(6), guest.reg(7), guest.reg(8)), (0x5_0014, 0, 0x20));
    assert_eq!(guest.reg(0), 1 << 0x11);
    // x2APIC has no page: the bus is behind it.
    guest.cpu().sys.lapic.set_base(0xfee0_0d00).expect("x2APIC");
    let code = asm!(64 at CODE; mov(eax, dword_ptr(rbx + 0x30)); hlt(););
    assert_eq!(guest.run_kernel(&code), End::Halt);
    assert_eq!(guest.reg(0), 0xabab_abab);
}

#[test]
fn level_triggered_interrupts_are_ended_on_the_bus() {
    let mut guest = guest();
    guest.platform.apics.port(0).post(0x41, true);
    guest.handler(
        0x41,
        &asm!(64 at 0; mov(ecx, 0x80bi32); xor(eax, eax); xor(edx, edx); wrmsr(); hlt();),
    );
    assert_eq!(guest.run(&asm!(64 at CODE; sti(); nop(); nop();)), End::Halt);
    assert_eq!(*lock(&guest.bus.eois), [0x41]);
}

#[test]
fn user_code_is_interrupted_and_goes_on() {
    let mut guest = guest();
    guest.handler(0x41, &asm!(64 at 0; push(rax); push(rcx); push(rdx); mov(ecx, 0x80bi32); xor(eax, eax); xor(edx, edx); wrmsr(); pop(rdx); pop(rcx); pop(rax); iretq();));
    guest.put(USER_GPA, &asm!(64 at USER, [again]; mov(ecx, 100_000i32); set_label(&mut again); add(eax, 3i32); dec(ecx); jnz(again); ud2();));
    guest.user(sel::USER64);
    guest.cpu().set_rflags(0x202);
    guest.cpu().gpr[0] = 0;
    let platform = guest.platform.clone();
    let over = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stop = over.clone();
    let sender = std::thread::spawn(move || {
        while !stop.load(std::sync::atomic::Ordering::SeqCst) {
            platform.apics.port(0).post(0x41, false);
            std::thread::yield_now();
        }
    });
    let frame = guest.go().frame();
    over.store(true, std::sync::atomic::Ordering::SeqCst);
    sender.join().expect("the sender");
    assert_eq!((frame.vector, guest.reg(0)), (vector::UD, 300_000));
}

#[test]
fn kicks_end_a_run_and_lose_nothing() {
    let mut guest = guest();
    post(&guest, 0x41);
    guest.vcpu.kicker().kick();
    guest.put(CODE, &asm!(64 at CODE; sti(); nop(); nop();));
    assert_eq!(guest.go(), End::Exit(VmExit::Kicked));
    assert_eq!(guest.cpu().rip, CODE);
    assert_eq!(guest.go().frame().vector, 0x41);
    // A guest that spins, and one that sleeps.
    for code in [
        asm!(64 at CODE, [spin]; set_label(&mut spin); jmp(spin);),
        asm!(64 at CODE; sti(); hlt(); hlt();),
    ] {
        guest.kernel(sel::CODE);
        guest.put(CODE, &code);
        let kick = guest.vcpu.kicker();
        let kicker = std::thread::spawn(move || kick.kick());
        assert_eq!(guest.go(), End::Exit(VmExit::Kicked));
        kicker.join().expect("the kicker");
    }
}

#[test]
fn endless_repeats_can_be_interrupted() {
    // The longest that a guest can ask for, of every kind, port and memory alike.
    for code in [
        asm!(64 at CODE; rep().outsb();),
        asm!(64 at CODE; rep().lodsb();),
        asm!(64 at CODE; repe().cmpsb();),
        asm!(64 at CODE; repne().scasb();),
        asm!(64 at CODE; rep().stosb();),
        asm!(64 at CODE; rep().movsb();),
    ] {
        let mut guest = guest();
        // Virtual pages without end: one frame at every address of 512 GiB, read-only would fault.
        let pd = guest.new_table();
        let pdpt = guest.new_table();
        for i in 0..512 {
            guest.put64(pd + i * 8, 0x60_0083);
            guest.put64(pdpt + i * 8, pd | 3);
        }
        guest.put64(crate::testing::guest::PML4 + 8, pdpt | 3);
        let cpu = guest.cpu();
        (cpu.gpr[0], cpu.gpr[1], cpu.gpr[2]) = (1, 1 << 38, 0x80);
        (cpu.gpr[6], cpu.gpr[7]) = (1 << 39, (1 << 39) + 8);
        guest.put(CODE, &code);
        let kick = guest.vcpu.kicker();
        let kicker = std::thread::spawn(move || kick.kick());
        assert_eq!(guest.go(), End::Exit(VmExit::Kicked), "{code:02x?}");
        kicker.join().expect("the kicker");
        assert_eq!(guest.cpu().rip, CODE);
        let (count, source) = (guest.reg(1), guest.reg(6));
        assert!(count > 0, "{code:02x?}");
        if code != asm!(64 at CODE; repne().scasb();) && code != asm!(64 at CODE; rep().stosb();) {
            assert_eq!(source - (1 << 39), (1 << 38) - count, "{code:02x?}");
        }
    }
}

#[test]
fn halted_is_a_state() {
    let mut guest = guest();
    guest.put(CODE, &asm!(64 at CODE; sti(); hlt(); cli(); hlt();));
    guest.vcpu.kicker().kick();
    assert_eq!(guest.go(), End::Exit(VmExit::Kicked));
    let kick = guest.vcpu.kicker();
    let platform = guest.platform.clone();
    let kicker = std::thread::spawn(move || {
        while !platform.apics.port(0).attention.sleeping() {
            std::thread::yield_now();
        }
        kick.kick();
    });
    assert_eq!(guest.go(), End::Exit(VmExit::Kicked));
    kicker.join().expect("the kicker");
    let state = guest.vcpu.state().expect("a state");
    assert_eq!((state.mp_state, state.regs.rip), (MpState::Halted, CODE + 2));
    // It goes on where it was, in another machine.
    let mut other = self::guest();
    other.put(CODE, &asm!(64 at CODE; sti(); hlt(); cli(); hlt();));
    other.vcpu.set_state(&state).expect("its own state");
    other.handler(0x41, &asm!(64 at 0; mov(ebx, 0x77i32); iretq();));
    post(&other, 0x41);
    assert_eq!(other.run_vcpu(), VmExit::HaltedForever);
    assert_eq!((other.reg(3), other.cpu().rip), (0x77, CODE + 4));
}

#[test]
fn two_nmis_at_once_are_two() {
    // One is taken at once and one waits behind it; while one is being handled, one can wait (as on the processor: two from
    // different senders may come before the next instruction).
    for (before, within, handled) in
        [(1, 0, 1), (2, 0, 2), (5, 0, 2), (1, 1, 2), (1, 9, 2), (2, 9, 2)]
    {
        let mut guest = guest();
        let handler = asm!(64 at Guest::handler_at(2), [again, out];
            inc(r15); cmp(r15, 1i32); jne(out); mov(ecx, 0x830i32); mov(eax, 0x4_0400i32); xor(edx, edx);
            set_label(&mut again); dec(r14); js(out); wrmsr(); jmp(again); set_label(&mut out); iretq();
        );
        guest.handler(vector::NMI, &handler);
        (guest.cpu().gpr[14], guest.cpu().gpr[15]) = (within, 0);
        for _ in 0..before {
            guest.platform.apics.port(0).nmi();
        }
        assert_eq!(guest.run(&asm!(64 at CODE; nop(); nop(); hlt();)), End::Halt);
        assert_eq!(guest.reg(15), handled, "{before} before, {within} within");
        assert_eq!(guest.cpu().sys.nmis_pending, 0);
    }
}

#[test]
fn a_single_step_ends_a_halt() {
    // HLT is done when it traps (SDM vol. 2, "HLT"): the handler runs at once, nobody has to wake the processor.
    let mut guest = guest();
    guest.handler(vector::DB, &asm!(64 at 0; inc(r15); mov(r14, qword_ptr(rsp)); hlt();));
    guest.cpu().gpr[15] = 0;
    let code = asm!(64 at CODE; pushfq(); or(dword_ptr(rsp), 0x100i32); popfq(); hlt(););
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!((guest.reg(15), guest.reg(14)), (1, CODE + code.len() as u64));
}

#[test]
fn interrupts_by_hypercall() {
    let mut guest = guest();
    // KVM_HC_SEND_IPI: (RBX, RCX) a bitmap from APIC id RDX on, RSI an interrupt command.
    let call = |guest: &mut Guest, low: u64, first: u64, icr: u64| {
        let cpu = guest.cpu();
        (cpu.gpr[0], cpu.gpr[3], cpu.gpr[1]) = (10, low, 0);
        (cpu.gpr[2], cpu.gpr[6]) = (first, icr);
        assert_eq!(guest.run_kernel(&asm!(64 at CODE; vmcall(); hlt();)), End::Halt);
        guest.reg(0) as i64
    };
    assert_eq!(call(&mut guest, 1, 0, 0x41), 1);
    assert_eq!(guest.cpu().sys.lapic.deliverable(), Some(0x41));
    assert_eq!(call(&mut guest, 0xffff_ffff, 0xffff_ffff, 0), 0, "beyond all processors");
    assert_eq!(call(&mut guest, u64::MAX, u64::MAX, 0x42), 0);
    assert_eq!(call(&mut guest, !1, 0, 0x42), 0, "not this one");
    assert_eq!(call(&mut guest, 1, 0, 0x842), -22, "a logical destination");
    assert_eq!(call(&mut guest, 1, 0, 0x4_0042), -22, "a shorthand");
    assert_eq!(guest.cpu().sys.lapic.port().irr.highest(), Some(0x41));
}
