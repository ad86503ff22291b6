//! Hardware task switches (SDM vol. 3, chapter 8).

use iced_x86::code_asm::*;
use mvm_engine::Table;

use crate::cpu::{Mode, seg};
use crate::fault::vector;
use crate::testing::asm::asm;
use crate::testing::guest::{CODE, DATA, End, GDT, Guest, HANDLERS, IDT, LDT, STACK, TSS, sel};

/// The other task: its TSS at [`OTHER`], its code at [`TASK`].
const OTHER_SEL: u16 = 0x80;
const GATE_SEL: u16 = 0x88;
const OTHER: u64 = DATA + 0x1000;
const TASK: u64 = DATA + 0x2000;
const TASK_STACK: u64 = DATA + 0x4000;
const NT: u32 = 1 << 14;
const BUSY: u64 = 1 << 41;

/// Where the fields of a TSS of 32 bits are.
mod at {
    pub const CR3: u64 = 28;
    pub const EIP: u64 = 32;
    pub const EFLAGS: u64 = 36;
    pub const EAX: u64 = 40;
    pub const ESP: u64 = 56;
    pub const ES: u64 = 72;
    pub const CS: u64 = 76;
    pub const SS: u64 = 80;
    pub const DS: u64 = 84;
    pub const LDT: u64 = 96;
    pub const TRAP: u64 = 100;
}

fn put32(guest: &Guest, address: u64, value: u32) {
    guest.put(address, &value.to_le_bytes());
}

/// A machine in 32-bit protected mode with another task, and a task gate to it.
fn guest() -> Guest {
    let mut guest = Guest::new_32();
    guest.cpu().sys.gdtr = Table { base: GDT, limit: 0x8f };
    guest.put64(GDT + u64::from(sel::TSS), guest.get64(GDT + u64::from(sel::TSS)) | BUSY);
    guest.put64(GDT + u64::from(OTHER_SEL), 0x0000_8900_0000_0067 | OTHER << 16);
    guest.put64(GDT + u64::from(GATE_SEL), 0x8500_0000_0000 | u64::from(OTHER_SEL) << 16);
    put32(&guest, OTHER + at::EIP, TASK as u32);
    put32(&guest, OTHER + at::EFLAGS, 2);
    put32(&guest, OTHER + at::EAX, 0x1234_5678);
    put32(&guest, OTHER + at::ESP, TASK_STACK as u32);
    put32(&guest, OTHER + at::CS, sel::CODE32.into());
    for segment in [at::ES, at::SS, at::DS] {
        put32(&guest, OTHER + segment, sel::DATA.into());
    }
    guest
}

fn is_busy(guest: &Guest, selector: u16) -> bool {
    guest.get64(GDT + u64::from(selector)) & BUSY != 0
}

/// CALL or JMP far to `selector`, with an offset that nobody looks at.
fn far(opcode: u8, selector: u16) -> Vec<u8> {
    [&[opcode, 0xf4, 0xf4, 0xf4, 0xf4][..], &selector.to_le_bytes()].concat()
}

const CALL: u8 = 0x9a;
const JMP: u8 = 0xea;

#[test]
fn a_called_task_returns() {
    for selector in [OTHER_SEL, GATE_SEL] {
        let mut guest = guest();
        let task = asm!(32 at TASK;
            mov(ebx, eax); pushfd(); pop(ecx); str(dx); mov(esi, cr0); mov(dword_ptr(DATA as u32), ebx); mov(dword_ptr(DATA as u32 + 4), ecx);
            mov(dword_ptr(DATA as u32 + 8), edx); mov(dword_ptr(DATA as u32 + 12), esi); mov(dword_ptr(DATA as u32 + 16), esp); iretd();
        );
        guest.put(TASK, &task);
        guest.cpu().gpr[..8].copy_from_slice(&[1, 2, 3, 4, STACK, 6, 7, 8]);
        let code = [&far(CALL, selector)[..], &asm!(32 at 0; pushfd(); pop(ebp); hlt();)].concat();
        assert_eq!(guest.run(&code), End::Halt);
        assert_eq!(guest.get32(DATA), 0x1234_5678);
        assert_eq!(guest.get32(DATA + 4) & NT, NT, "nested");
        assert_eq!(guest.get32(DATA + 8) as u16, OTHER_SEL);
        assert_eq!(guest.get32(DATA + 12) & 8, 8, "CR0.TS");
        assert_eq!(u64::from(guest.get32(DATA + 16)), TASK_STACK);
        // Back, with everything as it was.
        let gpr = guest.cpu().gpr;
        assert_eq!(gpr[..5], [1, 2, 3, 4, STACK]);
        assert_eq!((gpr[5] as u32 & NT, gpr[6], gpr[7]), (0, 7, 8));
        assert_eq!((guest.cpu().sys.tr.selector, guest.cpu().mode), (sel::TSS, Mode::Code32));
        assert!(is_busy(&guest, sel::TSS) && !is_busy(&guest, OTHER_SEL));
        // The other one goes on after its IRET the next time.
        assert_eq!(u64::from(guest.get32(OTHER + at::EIP)), TASK + task.len() as u64);
        assert_eq!(guest.get32(OTHER + at::EFLAGS) & NT, 0);
        assert_eq!(guest.get::<2>(OTHER), sel::TSS.to_le_bytes(), "the link");
        assert_eq!(guest.get32(OTHER + at::EAX + 4 * 3), 0x1234_5678, "EBX");
    }
}

#[test]
fn a_jump_ends_the_old_task() {
    for selector in [OTHER_SEL, GATE_SEL] {
        let mut guest = guest();
        guest
            .put(TASK, &[&asm!(32 at TASK; pushfd(); pop(ecx);)[..], &far(JMP, sel::TSS)].concat());
        let code = [
            &far(JMP, selector)[..],
            &asm!(32 at 0; mov(eax, dword_ptr(OTHER as u32 + 44)); hlt();),
        ]
        .concat();
        guest.cpu().gpr[0] = 5;
        assert_eq!(guest.run(&code), End::Halt);
        assert_eq!(guest.reg(0) as u32 & NT, 0, "not nested");
        assert!(is_busy(&guest, sel::TSS) && !is_busy(&guest, OTHER_SEL));
        assert_eq!(u64::from(guest.get32(TSS + at::EIP)), CODE + 7);
    }
}

/// Makes the gate of `vector` a task gate.
fn task_gate(guest: &Guest, vector: u8, dpl: u64) {
    let gate = (0x85 | dpl << 5) << 40 | u64::from(OTHER_SEL) << 16;
    guest.put64(IDT + u64::from(vector) * 8, gate);
}

#[test]
fn interrupts_and_exceptions_through_task_gates() {
    // INT n: back after it.
    let mut guest = guest();
    task_gate(&guest, 0x80, 0);
    guest.put(TASK, &asm!(32 at TASK; inc(dword_ptr(DATA as u32)); iretd();));
    assert_eq!(guest.run(&asm!(32 at CODE; int(0x80i32); mov(eax, 9i32); hlt();)), End::Halt);
    assert_eq!((guest.get32(DATA), guest.reg(0)), (1, 9));
    // A fault: the error code is on the new task's stack, the old one's EIP at the instruction, to which it returns. The handler
    // puts a good selector where it was wanted.
    let mut guest = self::guest();
    task_gate(&guest, vector::GP, 0);
    let task = asm!(32 at TASK;
        pop(ebx); mov(dword_ptr(DATA as u32), ebx); mov(ecx, dword_ptr((TSS + at::EIP) as u32)); mov(dword_ptr(DATA as u32 + 4), ecx);
        mov(dword_ptr((TSS + at::EAX) as u32), i32::from(sel::DATA)); mov(dword_ptr(DATA as u32 + 8), esp); iretd();
    );
    guest.put(TASK, &task);
    assert_eq!(
        guest.run(&asm!(32 at CODE; mov(eax, 0x1f8i32); mov(ds, ax); mov(ebx, 7i32); hlt();)),
        End::Halt
    );
    assert_eq!(
        (guest.get32(DATA), u64::from(guest.get32(DATA + 4)), guest.reg(3)),
        (0x1f8, CODE + 5, 7)
    );
    assert_eq!(u64::from(guest.get32(DATA + 8)), TASK_STACK);
    assert_eq!(guest.cpu().seg[seg::DS].selector, sel::DATA);
    // An NMI: more of them wait for its IRET.
    let mut guest = self::guest();
    task_gate(&guest, vector::NMI, 0);
    guest.put(TASK, &asm!(32 at TASK, [start]; set_label(&mut start); inc(dword_ptr(DATA as u32)); iretd(); jmp(start);));
    guest.platform.apics.port(0).nmi();
    guest.platform.apics.port(0).nmi();
    assert_eq!(guest.run(&asm!(32 at CODE; nop(); hlt();)), End::Halt);
    assert_eq!((guest.get32(DATA), guest.cpu().sys.nmi_masked), (2, false));
    // The gate's privilege counts for INT n.
    let mut guest = self::guest();
    task_gate(&guest, 0x80, 0);
    guest.put(CODE, &asm!(32 at CODE; int(0x80i32);));
    guest.user(sel::USER32);
    guest.cpu().rip = CODE;
    assert_eq!(guest.go().fault(), (vector::GP, Some(0x80 << 3 | 2), CODE));
}

#[test]
fn user_code_is_left_and_found_again() {
    let mut guest = guest();
    task_gate(&guest, 0x80, 3);
    guest.put(TASK, &asm!(32 at TASK; inc(dword_ptr(DATA as u32)); iretd();));
    guest.put(CODE, &asm!(32 at CODE; int(0x80i32); mov(eax, cs); mov(ecx, ss); ud2();));
    guest.user(sel::USER32);
    guest.cpu().rip = CODE;
    let frame = guest.go().frame();
    assert_eq!((frame.vector, frame.rip, guest.get32(DATA)), (vector::UD, CODE + 6, 1));
    assert_eq!((guest.reg(0), guest.reg(1)), (sel::USER32.into(), sel::USER_DATA.into()));
}

#[test]
fn what_is_wrong_with_the_tss_is_a_fault_of_the_old_task() {
    let other = u64::from(OTHER_SEL);
    let descriptor = 0x0000_8900_0000_0067 | OTHER << 16;
    for (value, selector, fault, code) in [
        (descriptor | BUSY, OTHER_SEL, vector::GP, other),
        (descriptor & !(1 << 47), OTHER_SEL, vector::NP, other),
        (descriptor - 1, OTHER_SEL, vector::TS, other),
        (0x0000_8200_0000_0067, OTHER_SEL, vector::GP, other),
        (descriptor | BUSY, GATE_SEL, vector::GP, other),
        (descriptor, OTHER_SEL | 4, vector::GP, other | 4),
        (descriptor, OTHER_SEL | 3, vector::GP, other),
        (descriptor, 0x1ff8, vector::GP, 0x1ff8),
    ] {
        let mut guest = guest();
        guest.put64(GDT + other, value);
        let fault_of = (fault, Some(code), CODE);
        assert_eq!(guest.run(&far(CALL, selector)).fault(), fault_of, "{value:#x} {selector:#x}");
        assert_eq!(guest.cpu().sys.tr.selector, sel::TSS);
    }
    // IRET with NT: the link must be to a busy TSS.
    let mut guest = guest();
    guest.put(TSS, &OTHER_SEL.to_le_bytes());
    let code = asm!(32 at CODE; pushfd(); or(dword_ptr(esp), NT as i32); popfd(); iretd(););
    assert_eq!(guest.run(&code).fault(), (vector::TS, Some(other), CODE + code.len() as u64 - 1));
}

#[test]
fn what_is_wrong_with_its_segments_is_a_fault_of_the_new_task() {
    for (field, selector, fault) in [
        (at::DS, 0x1f8u16, vector::TS),
        (at::ES, sel::TSS, vector::TS),
        (at::DS, sel::FREE, vector::NP),
    ] {
        let mut guest = guest();
        guest.put64(GDT + u64::from(sel::FREE), 0x00cf_1300_0000_ffff);
        put32(&guest, OTHER + field, selector.into());
        let frame = guest.run(&far(CALL, OTHER_SEL)).frame();
        assert_eq!((frame.vector, frame.code, frame.rip), (fault, Some(selector.into()), TASK));
        assert_eq!(guest.cpu().sys.tr.selector, OTHER_SEL);
        assert_eq!(guest.get::<2>(OTHER), sel::TSS.to_le_bytes());
    }
    // The local table, in which its other selectors may be.
    let mut guest = guest();
    guest.put64(LDT, 0x00cf_9300_0000_ffff);
    put32(&guest, OTHER + at::LDT, sel::LDT.into());
    put32(&guest, OTHER + at::DS, 4);
    guest.put(TASK, &asm!(32 at TASK; hlt();));
    assert_eq!(guest.run(&far(CALL, OTHER_SEL)), End::Halt);
    assert_eq!(
        (guest.cpu().sys.ldtr.selector, guest.cpu().seg[seg::DS].access & 0x1_0000),
        (sel::LDT, 0)
    );
}

#[test]
fn a_task_may_ask_for_a_debug_exception() {
    let mut guest = guest();
    put32(&guest, OTHER + at::TRAP, 1);
    guest.cpu().sys.dr7 = 0x4ff;
    guest.cpu().sys.dr = [1; 4];
    let frame = guest.run(&far(CALL, OTHER_SEL)).frame();
    assert_eq!((frame.vector, frame.rip), (vector::DB, TASK));
    assert_eq!(guest.cpu().sys.dr6, 0xffff_0ff0 | 1 << 15);
    assert_eq!(guest.cpu().sys.dr7, 0x4aa, "local breakpoints are the task's");
    assert!(guest.cpu().rip > HANDLERS);
}

#[test]
fn tasks_have_address_spaces() {
    // Two page tables of 32 bits, which differ in where DATA + 0x40_0000 is.
    let mut guest = guest();
    let (first, second) = (0x3_0000u32, 0x3_1000);
    for (table, high) in [(first, 0x10_0000), (second, 0x20_0000)] {
        for page in 0..4u32 {
            put32(&guest, u64::from(table + page * 4), page << 22 | 0x83);
        }
        // 4 MiB from 0x80_0000 on: the same memory by pages of 4 KiB would do as well.
        let fine = table + 0x2000;
        put32(&guest, u64::from(table + 8), fine | 3);
        put32(&guest, u64::from(fine), high | 3);
    }
    put32(&guest, 0x10_0000, 11);
    put32(&guest, 0x20_0000, 22);
    put32(&guest, TSS + at::CR3, first);
    put32(&guest, OTHER + at::CR3, second);
    guest.cpu().sys.cr4 |= 0x10;
    guest.cpu().sys.cr3 = first.into();
    guest.cpu().sys.cr0 |= 1 << 31;
    guest.kernel(sel::CODE32);
    guest.put(TASK, &asm!(32 at TASK; mov(eax, dword_ptr(0x80_0000u32)); mov(dword_ptr(0x30_0000u32), eax); iretd();));
    let code = [
        &asm!(32 at CODE; mov(ebx, dword_ptr(0x80_0000u32));)[..],
        &far(CALL, OTHER_SEL),
        &asm!(32 at 0; mov(ecx, dword_ptr(0x80_0000u32)); mov(edx, cr3); hlt();),
    ]
    .concat();
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!((guest.reg(3), guest.get32(0x30_0000), guest.reg(1)), (11, 22, 11));
    assert_eq!(guest.reg(2), u64::from(first));
}

#[test]
fn tasks_of_16_bits() {
    let mut guest = guest();
    guest.put64(GDT + u64::from(OTHER_SEL), 0x0000_8100_0000_002b | OTHER << 16);
    let mut image = [0u16; 22];
    (image[7], image[8], image[9], image[13]) = (TASK as u16, 2, 0x77, 0x7000);
    (image[17], image[18], image[19], image[20]) = (sel::DATA, sel::CODE32, sel::DATA, sel::DATA);
    guest.put(OTHER, &image.map(u16::to_le_bytes).concat());
    // Its instruction pointer has 16 bits.
    guest.put(
        TASK & 0xffff,
        &asm!(32 at TASK & 0xffff; mov(dword_ptr(DATA as u32), eax); mov(eax, 0x99i32); iretd();),
    );
    guest.cpu().gpr[0] = 5;
    let code = [&far(CALL, OTHER_SEL)[..], &[0xf4]].concat();
    assert_eq!(guest.run(&code), End::Halt);
    assert_eq!((guest.get32(DATA), guest.reg(0)), (0x77, 5));
    assert_eq!(guest.get::<2>(OTHER + 18), [0x99, 0]);
}
