//! Virtual-8086 mode (SDM vol. 3, chapter 21).

use iced_x86::code_asm::*;
use mvm_engine::{Table, Vcpu as _};

use crate::cpu::{Mode, seg};
use crate::fault::vector;
use crate::testing::asm::asm;
use crate::testing::guest::{CODE, DATA, End, GDT, Guest, IDT, STACK0, sel};

/// Segment of the code.
const CS: u16 = 0x500;
const AT: u64 = (CS as u64) << 4;
const SS: u16 = 0x600;
const DS: u16 = 0x440;
const VM: u64 = 1 << 17;

/// Goes to `code` in virtual-8086 mode with the privilege `iopl`, by IRET.
fn run(guest: &mut Guest, iopl: i32, code: &[u8]) -> End {
    guest.put(AT, code);
    guest.kernel(sel::CODE32);
    guest.run(&asm!(32 at CODE;
        push(0x66i32); push(0x55i32); push(i32::from(DS)); push(0x33i32); push(i32::from(SS)); push(0x100i32);
        push(0x2_0002 | iopl << 12); push(i32::from(CS)); push(0i32); iretd();
    ))
}

/// (vector, error code, offset) of what ended the run in virtual-8086 mode.
#[track_caller]
fn fault(end: End) -> (u8, Option<u64>, u64) {
    let frame = end.frame();
    assert_eq!((frame.cs, frame.ss, frame.flags & VM), (CS, SS, VM));
    (frame.vector, frame.code, frame.rip)
}

#[test]
fn it_is_entered_by_iret_and_left_by_exceptions() {
    let mut guest = Guest::new_32();
    guest.put(u64::from(DS) << 4, &0x1234u16.to_le_bytes());
    guest.cpu().gpr[3] = 0;
    let end = run(
        &mut guest,
        0,
        &asm!(16 at 0; mov(ax, word_ptr(bx)); push(ax); mov(cx, ss); mov(dx, es); ud2();),
    );
    let frame = end.frame();
    assert_eq!((frame.vector, frame.rip, frame.cs), (vector::UD, 7, CS));
    assert_eq!((frame.ss, frame.rsp, frame.flags & (VM | 0x200)), (SS, 0xfe, VM));
    assert_eq!(frame.at, STACK0 - 36, "on the stack of level 0");
    let others = [20, 24, 28, 32].map(|at| guest.get32(frame.at + at));
    assert_eq!(others, [0x33, DS.into(), 0x55, 0x66], "ES, DS, FS, GS");
    assert_eq!((guest.reg(0), guest.reg(1), guest.reg(2)), (0x1234, SS.into(), 0x33));
    assert_eq!(guest.get::<2>((u64::from(SS) << 4) + 0xfe), [0x34, 0x12]);
    // The handler has null segments, and is none of it.
    let cpu = guest.cpu();
    assert_eq!((cpu.mode, cpu.cpl, cpu.sysflags & VM), (Mode::Code32, 0, 0));
    assert_eq!([seg::DS, seg::ES, seg::FS, seg::GS].map(|s| cpu.seg[s].selector), [0; 4]);
}

#[test]
fn it_goes_on_in_another_machine() {
    let mut guest = Guest::new_32();
    let cpu = guest.cpu();
    cpu.load_8086_segments([0x33, CS, SS, DS, 0x55, 0x66]);
    (cpu.rip, cpu.gpr[4]) = (0, 0x100);
    cpu.set_rflags(VM | 2);
    cpu.update_mode();
    let state = guest.vcpu.state().expect("a state");
    let mut other = Guest::new_32();
    other.vcpu.set_state(&state).expect("it is taken");
    other.put(AT, &asm!(16 at 0; mov(cx, ss); mov(dx, es); push(ds); ud2();));
    assert_eq!(fault(other.go()), (vector::UD, None, 5));
    assert_eq!((other.reg(1), other.reg(2)), (SS.into(), 0x33));
    assert_eq!(other.get::<2>((u64::from(SS) << 4) + 0xfe), DS.to_le_bytes());
}

#[test]
fn what_needs_privilege() {
    let mut guest = Guest::new_32();
    let privileged = [
        asm!(16 at 0; cli();),
        asm!(16 at 0; sti();),
        asm!(16 at 0; pushf();),
        asm!(16 at 0; popf();),
        asm!(16 at 0; int(0x80i32);),
        asm!(16 at 0; iret();),
    ];
    for code in &privileged {
        assert_eq!(fault(run(&mut guest, 0, code)), (vector::GP, Some(0), 0), "{code:02x?}");
    }
    for code in &privileged[..4] {
        let code = [&code[..], &[0x0f, 0x0b]].concat();
        assert_eq!(fault(run(&mut guest, 3, &code)), (vector::UD, None, 1), "{code:02x?}");
    }
    // Software interrupts go to handlers of protected mode. INT3 needs no privilege but the gate's.
    assert_eq!(fault(run(&mut guest, 3, &privileged[4])), (0x80, None, 2));
    assert_eq!(
        fault(run(&mut guest, 3, &asm!(16 at 0; int(0x81i32);))),
        (vector::GP, Some(0x81 << 3 | 2), 0)
    );
    assert_eq!(fault(run(&mut guest, 0, &[0xcc])), (vector::BP, None, 1));
    // Ports are those of the bitmap, whatever IOPL is; there is none.
    for iopl in [0, 3] {
        assert_eq!(
            fault(run(&mut guest, iopl, &asm!(16 at 0; in_(al, 0x60i32);))),
            (vector::GP, Some(0), 0)
        );
    }
    // What is for level 0 is not for it, and there are no descriptors.
    for code in [
        asm!(16 at 0; hlt();),
        asm!(16 at 0; mov(eax, cr0);),
        asm!(16 at 0; lgdt(fword_ptr(bx));),
        asm!(16 at 0; clts();),
    ] {
        assert_eq!(fault(run(&mut guest, 3, &code)), (vector::GP, Some(0), 0), "{code:02x?}");
    }
    for code in [
        asm!(16 at 0; sldt(ax);),
        asm!(16 at 0; lldt(ax);),
        asm!(16 at 0; ltr(ax);),
        asm!(16 at 0; verr(ax);),
        asm!(16 at 0; lar(ax, ax);),
    ] {
        assert_eq!(fault(run(&mut guest, 3, &code)), (vector::UD, None, 0), "{code:02x?}");
    }
}

#[test]
fn interrupts_come_back_and_far_transfers_stay() {
    let mut guest = Guest::new_32();
    // The handler of #UD steps over it.
    let handler = asm!(32 at DATA; add(dword_ptr(esp), 2i32); iretd(););
    guest.put(DATA, &handler);
    let gate =
        DATA & 0xffff | u64::from(sel::CODE32) << 16 | 0x8e00 << 32 | (DATA & 0xffff_0000) << 32;
    guest.put64(IDT + u64::from(vector::UD) * 8, gate);
    // A call to another segment, which returns; IRET with the flags of the image; registers of segments as before.
    let there = asm!(16 at 0; mov(bx, cs); retf(););
    guest.put(0x5800, &there);
    let code = [
        &asm!(16 at 0; ud2(); mov(ax, ds);)[..],
        &[0x9a, 0, 0, 0x80, 0x05],
        &asm!(16 at 0; push(0x246i32); push(cs); push(0x40i32); iret();),
    ]
    .concat();
    guest.put(AT + 0x40, &asm!(16 at 0; pushf(); pop(cx); int3();));
    assert_eq!(fault(run(&mut guest, 3, &code)), (vector::BP, None, 0x43));
    assert_eq!((guest.reg(0) as u16, guest.reg(3) as u16), (DS, 0x580));
    assert_eq!(guest.reg(1) as u16, 0x3246, "IOPL is as it was");
}

#[test]
fn a_task_may_be_one() {
    const OTHER: u64 = DATA + 0x1000;
    let mut guest = Guest::new_32();
    guest.cpu().sys.gdtr = Table { base: GDT, limit: 0x8f };
    guest.put64(GDT + 0x80, 0x0000_8900_0000_0067 | OTHER << 16);
    for (at, value) in [
        (4, STACK0 as u32),
        (8, sel::DATA.into()),
        (32, 4u32),
        (36, VM as u32 | 2),
        (56, 0x100),
        (72, 0x33),
        (76, CS.into()),
        (80, SS.into()),
        (84, DS.into()),
    ] {
        guest.put(OTHER + at, &value.to_le_bytes());
    }
    guest.put(AT + 4, &asm!(16 at 4; mov(ax, ds); int3();));
    let end = guest.run(&[0xea, 0, 0, 0, 0, 0x80, 0]);
    assert_eq!(fault(end), (vector::BP, None, 7));
    assert_eq!(guest.reg(0) as u16, DS);
    // By a task gate back to where it came from, and in between its registers are in its TSS.
    guest.put64(IDT + u64::from(vector::UD) * 8, 0x8500_0000_0000 | u64::from(sel::TSS) << 16);
    guest.put64(GDT + 0x80, 0x0000_8900_0000_0067 | OTHER << 16);
    let tss = guest.get64(GDT + u64::from(sel::TSS));
    guest.put64(GDT + u64::from(sel::TSS), tss & !(1 << 41));
    guest.put(OTHER + 32, &4u32.to_le_bytes());
    guest.put(OTHER + 36, &(VM as u32 | 2).to_le_bytes());
    guest.put(AT + 4, &asm!(16 at 4; mov(cx, 0x77i32); ud2();));
    guest.kernel(sel::CODE32);
    let cpu = guest.cpu();
    (cpu.sys.tr.selector, cpu.sys.tr.base, cpu.sys.tr.limit) =
        (sel::TSS, crate::testing::guest::TSS, 0x67);
    let code = [&[0xea, 0, 0, 0, 0, 0x80, 0][..], &asm!(32 at 0; mov(edx, 5i32); hlt();)].concat();
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!((guest.reg(2), guest.cpu().mode), (5, Mode::Code32));
    assert_eq!((guest.get32(OTHER + 32), guest.get32(OTHER + 44)), (7, 0x77));
    assert_eq!(u64::from(guest.get32(OTHER + 36)) & VM, VM);
}
