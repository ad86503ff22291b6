//! State of a vCPU: out of one machine, into another.

use iced_x86::code_asm::*;
use mvm_engine::{MpState, Vcpu, VmExit};

use super::has;
use crate::fault::vector;
use crate::sys::attention::reason;
use crate::testing::asm::asm;
use crate::testing::guest::{CODE, DATA, End, Guest, KICK_PORT, USER, USER_GPA, lock, sel};

/// Copies RAM of `from` to `to`.
pub(super) fn copy_ram(from: &Guest, to: &Guest) {
    for page in (0..16u64 << 20).step_by(4096) {
        let bytes = from.get::<4096>(page);
        if bytes != [0; 4096] {
            to.put(page, &bytes);
        }
    }
}

#[test]
fn a_computation_goes_on_in_another_machine() {
    // Registers, x87, SSE, FS, memory: all of them in a loop whose result is known.
    // Every thousandth iteration asks for the run to end.
    let code = asm!(64 at USER, [again, on];
        set_label(&mut again);
        add(rax, rcx);
        movq(xmm1, rax);
        paddq(xmm0, xmm1);
        fld1();
        faddp(st1, st0);
        add(qword_ptr(0x10).fs(), rax);
        test(ecx, 0x3ffi32);
        jnz(on);
        out(i32::from(KICK_PORT), al);
        set_label(&mut on);
        dec(rcx);
        jnz(again);
        movq(rbx, xmm0);
        fistp(qword_ptr(0x20).fs());
        mov(rdx, qword_ptr(0x20).fs());
        mov(rsi, qword_ptr(0x10).fs());
        ud2();
    );
    let start = |guest: &mut Guest| {
        guest.put(USER_GPA, &code);
        guest.user(sel::USER64);
        guest.cpu().set_rflags(0x3002);
        guest.cpu().gpr[1] = 20_000;
        guest.cpu().seg[crate::cpu::seg::FS].base = USER + 0x8000;
    };
    let mut whole = Guest::new();
    start(&mut whole);
    assert_eq!(whole.go().frame().vector, vector::UD);
    let expected = (whole.reg(0), whole.reg(3), whole.reg(2), whole.reg(6));

    let mut guest = Guest::new();
    start(&mut guest);
    let mut moves = 0;
    loop {
        *lock(&guest.bus.kick) = Some(guest.vcpu.kicker());
        match guest.go() {
            End::Exit(VmExit::Kicked) => {
                let mut other = Guest::new();
                let state = guest.vcpu.state().expect("a state");
                copy_ram(&guest, &other);
                other.vcpu.set_state(&state).expect("it is taken");
                // The state is what it was, clocks aside.
                let mut again = other.vcpu.state().expect("a state");
                again.clock = state.clock;
                assert_eq!(again.regs, state.regs);
                assert_eq!(again.sregs, state.sregs);
                assert_eq!((&again.xsave, &again.msrs), (&state.xsave, &state.msrs));
                assert_eq!(
                    (&again.lapic, again.events, &again.debug),
                    (&state.lapic, state.events, &state.debug)
                );
                guest = other;
                moves += 1;
            }
            end => {
                assert_eq!(end.frame().vector, vector::UD);
                break;
            }
        }
    }
    assert_eq!((guest.reg(0), guest.reg(3), guest.reg(2), guest.reg(6)), expected);
    assert_eq!(moves, 20_000 / 0x400);
}

#[test]
fn the_shadow_nmi_masks_and_pending_interrupts_survive() {
    let mut guest = Guest::new();
    guest.cpu().sys.lapic.set_base(0xfee0_0d00).expect("x2APIC");
    guest.cpu().sys.lapic.write_msr(0x80f, 0x1ff).expect("SVR");
    guest.cpu().sys.lapic.write_msr(0x832, 0x4_00ec).expect("LVT timer");
    guest.platform.apics.port(0).post(0x41, false);
    guest.platform.apics.port(0).post(0x61, true);
    let cpu = guest.cpu();
    cpu.sys.lapic.accept(0x61);
    cpu.sys.lapic.set_tsc_deadline(u64::MAX >> 1, cpu.sys.tsc_offset);
    (cpu.shadow, cpu.sys.nmi_masked, cpu.sys.nmis_pending) = (true, true, 1);
    (cpu.sys.dr, cpu.sys.dr7, cpu.sys.cr2) = ([1, 2, 3, 4], 0x4aa, 0x1234);
    cpu.sys.msrs.tsc_aux = 77;
    let state = guest.vcpu.state().expect("a state");
    let mut other = Guest::new();
    other.vcpu.set_state(&state).expect("it is taken");
    let cpu = other.cpu();
    assert!(cpu.shadow && cpu.sys.nmi_masked && cpu.sys.nmis_pending == 1);
    assert_eq!(
        (cpu.sys.dr, cpu.sys.dr7, cpu.sys.cr2, cpu.sys.msrs.tsc_aux),
        ([1, 2, 3, 4], 0x4aa, 0x1234, 77)
    );
    assert_eq!(cpu.sys.lapic.tsc_deadline(), u64::MAX >> 1);
    let port = cpu.sys.lapic.port();
    assert!(port.irr.contains(0x41) && port.tmr.contains(0x61));
    assert_eq!(cpu.sys.lapic.eoi(), Some(0x61));
    assert_eq!(cpu.sys.lapic.deliverable(), Some(0x41));
}

#[test]
fn a_pending_exception_is_delivered_first() {
    let mut guest = Guest::new();
    guest.put(CODE, &asm!(64 at CODE; hlt();));
    let mut state = guest.vcpu.state().expect("a state");
    state.events.exception = Some((vector::GP, Some(0x18)));
    guest.vcpu.set_state(&state).expect("it is taken");
    assert_eq!(guest.go().fault(), (vector::GP, Some(0x18), CODE));
}

#[test]
fn impossible_states_change_nothing() {
    let mut guest = Guest::new();
    let good = guest.vcpu.state().expect("a state");
    let change: [fn(&mut mvm_engine::VcpuState); 8] = [
        |s| s.xcr0 = 1 << 9 | 7,
        |s| s.sregs.cr0 = 1 << 31,
        |s| s.sregs.efer |= 1 << 12,
        |s| s.regs.rflags |= 1 << 17,
        |s| s.lapic.regs = vec![0; 65],
        |s| s.xsave.truncate(100),
        |s| s.xsave[24..28].copy_from_slice(&u32::MAX.to_le_bytes()),
        |s| {
            for entry in s.cpuid.iter_mut().filter(|e| e.leaf == 7) {
                entry.ebx |= 1 << 16;
                entry.ebx |= u32::MAX;
            }
        },
    ];
    for (i, change) in change.iter().enumerate() {
        let mut bad = good.clone();
        bad.regs.gpr[0] = 99;
        change(&mut bad);
        if i == 7 && ["bmi1", "avx2", "bmi2", "adx", "sha_ni"].iter().all(|f| has(f)) {
            continue;
        }
        assert!(guest.vcpu.set_state(&bad).is_err(), "number {i}");
        assert_eq!(guest.reg(0), 0, "number {i}");
        assert_eq!(guest.vcpu.state().expect("a state").xsave, good.xsave);
    }
}

#[test]
fn states_of_nonsense_do_not_end_the_engine() {
    // Whatever a state file says: an error, or a guest that faults.
    let mut guest = Guest::new();
    let good = guest.vcpu.state().expect("a state");
    let mut seed = 0x1234_5678_9abc_def1u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for _ in 0..2000 {
        let mut state = good.clone();
        for _ in 0..1 + random() % 4 {
            let value = match random() % 4 {
                0 => u64::MAX,
                1 => 1 << (random() % 64),
                2 => random() & random(),
                _ => random() & 0xffff,
            };
            match random() % 24 {
                0 => state.sregs.cr0 = value,
                1 => state.sregs.cr3 = value,
                2 => state.sregs.cr4 = value,
                3 => state.sregs.efer = value & 0xd01,
                4 => state.sregs.cr8 = value,
                5 => state.regs.rip = value,
                6 => state.regs.rflags = value & !(1 << 17),
                7 => state.sregs.gdtr.base = value,
                8 => state.sregs.idtr.base = value,
                9 => state.sregs.idtr.limit = value as u16,
                10 => state.sregs.tr.base = value,
                11 => state.sregs.tr.limit = value as u32,
                12 => state.sregs.segments[(random() % 6) as usize].access = value as u32,
                13 => state.sregs.segments[(random() % 6) as usize].base = value,
                14 => state.sregs.segments[(random() % 6) as usize].limit = value as u32,
                15 => state.debug.dr7 = value,
                16 => state.debug.address[(random() % 4) as usize] = value,
                17 => state.lapic.base = value,
                18 => state.lapic.regs[(random() % 64) as usize] = value as u32,
                19 => state.lapic.tsc_deadline = value,
                20 => state.xcr0 = value,
                21 => state.regs.gpr[(random() % 16) as usize] = value,
                22 => state.events.exception = Some((value as u8, Some(value as u32))),
                _ => state.clock.tsc = value,
            }
        }
        state.mp_state = MpState::Running;
        if guest.vcpu.set_state(&state).is_err() {
            continue;
        }
        guest.put(CODE, &asm!(64 at CODE; mov(rbx, DATA); mov(rax, qword_ptr(rbx)); push(rax); int(0x80i32); hlt();));
        guest.vcpu.kicker().kick();
        let _ = guest.vcpu.run().expect("the host does not fail");
        let kick = guest.vcpu.kicker();
        let kicker = std::thread::spawn(move || {
            std::thread::yield_now();
            kick.kick();
        });
        let _ = guest.vcpu.run().expect("the host does not fail");
        kicker.join().expect("the kicker");
        if std::mem::take(&mut guest.cpu().sys.counted_stopped) {
            guest.platform.resume_one();
        }
    }
}

#[test]
fn what_others_have_sent_is_part_of_the_state() {
    let mut guest = Guest::new();
    let port = guest.platform.apics.port(0);
    (0..3).for_each(|_| port.nmi());
    port.attention.raise(reason::UNHALT | reason::KICK);
    let state = guest.vcpu.state().expect("a state");
    assert!(state.events.nmis_pending == 2 && state.events.unhalted);
    let mut other = Guest::new();
    other.vcpu.set_state(&state).expect("it is taken");
    assert!(other.cpu().sys.nmis_pending == 2 && other.cpu().sys.pv.unhalted);
    // Whoever wanted the run to end still does.
    assert_eq!(guest.vcpu.run().expect("the host does not fail"), VmExit::Kicked);
    // INIT takes effect, as it would before the next instruction.
    guest.platform.apics.port(0).attention.raise(reason::INIT);
    let state = guest.vcpu.state().expect("a state");
    assert_eq!((state.regs.rip, state.sregs.cr0 & 1), (0xfff0, 0));
}

#[test]
fn an_expired_timer_is_a_request() {
    let mut guest = Guest::new();
    guest.cpu().sys.lapic.set_base(0xfee0_0d00).expect("x2APIC");
    for (msr, value) in [(0x80f, 0x1ff), (0x832, 0xec), (0x83e, 0xb), (0x838, 1)] {
        guest.cpu().sys.lapic.write_msr(msr, value).expect("a register");
    }
    while guest.cpu().sys.lapic.read_msr(0x839).expect("a register") != 0 {
        std::hint::spin_loop();
    }
    let state = guest.vcpu.state().expect("a state");
    assert_ne!(state.lapic.regs[0x20 + 0xec / 32] & 1 << (0xec % 32), 0);
}
