//! Where things are: guest registers in host registers, fields in the `Cpu` (the table of
//! `docs/emulation-engine.md`).

use std::mem::offset_of;

use super::asm::host::{R8, R9, R10, R11, R12, R13, R14, R15, RBP, RBX, RDI, RSI};
use super::env::{Counted, JitEnv};
use super::spans::SLOTS;
use crate::apic::Lapic;
use crate::cpu::{Cpu, SegmentReg};
use crate::host::{VectorState, X87Pointers};
use crate::mmu::{Mmu, TlbLayout};
use crate::op::reg;
use crate::sys::{Msrs, SystemState};

/// The host register that points into the `Cpu`.
pub const CPU: u8 = R15;
/// Where to: what is used most is within 128 bytes, so that displacements are short.
pub const BIAS: i32 = offset_of!(Cpu, gpr) as i32 + 92;
const _: () = assert!(STACK_ADDEND - BIAS < 128 && RUN - BIAS >= -128 && span(2) - BIAS >= -128);

/// The host register of guest register `guest`; `None`: it stays in [`Cpu::gpr`].
pub const fn host_of(guest: u8) -> Option<u8> {
    match guest {
        0 => Some(R8),
        1 => Some(R9),
        2 => Some(R10),
        3 => Some(RBX),
        4 => Some(R11),
        5 => Some(RBP),
        6 => Some(RSI),
        7 => Some(RDI),
        12 => Some(R12),
        13 => Some(R13),
        14 => Some(R14),
        _ => None,
    }
}

/// Guest registers that are in host registers.
pub const PINNED: [u8; 11] = [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14];

/// Guest RSP, RBP, RAX, RCX, RDX in the host.
pub const GUEST_SP: u8 = R11;
pub const GUEST_BP: u8 = RBP;
pub const GUEST_AX: u8 = R8;
pub const GUEST_CX: u8 = R9;
pub const GUEST_DX: u8 = R10;

pub const fn gpr(guest: u8) -> i32 {
    (offset_of!(Cpu, gpr) + guest as usize * 8) as i32
}

pub const PAGE: i32 = gpr(reg::BLOCK);
/// Bytes of a page of the guest's.
pub const PAGE_SIZE: i32 = 4096;
pub const CC: i32 = offset_of!(Cpu, cc) as i32;
/// Flags besides the arithmetic ones, the privilege level, and whether interrupts are held back by IF.
pub const SYSTEM_FLAGS: i32 = offset_of!(Cpu, sysflags) as i32;
pub const LEVEL: i32 = offset_of!(Cpu, cpl) as i32;
pub const INTERRUPTS_HELD: i32 =
    (SYSTEM + offset_of!(SystemState, lapic) + offset_of!(Lapic, held)) as i32;
pub const KERNEL_GS_BASE: i32 =
    (SYSTEM + offset_of!(SystemState, msrs) + offset_of!(Msrs, kernel_gs_base)) as i32;
const SYSTEM: usize = offset_of!(Cpu, sys);
pub const RIP: i32 = offset_of!(Cpu, rip) as i32;

const TLB: usize = offset_of!(Cpu, mmu) + Mmu::TLB_OFFSET;
pub const TABLE: i32 = (TLB + TlbLayout::TABLE) as i32;

/// The stack's page.
pub const STACK_LINEAR: i32 = (TLB + TlbLayout::STACK_LINEAR) as i32;
pub const STACK_ADDEND: i32 = (TLB + TlbLayout::STACK_ADDEND) as i32;
pub const STACK_CONTEXT: i32 = (TLB + TlbLayout::STACK_CONTEXT) as i32;

/// The current context for loads or stores in a half of the address space.
pub const fn context(write: bool, half: usize) -> i32 {
    (TLB + if write { TlbLayout::WRITE } else { TlbLayout::READ } + half * 8) as i32
}
/// The tag of the jump cache for a half.
pub const fn jump_tag(half: usize) -> i32 {
    (TLB + TlbLayout::JUMP_TAGS + half * 4) as i32
}

/// What moves addresses of the lower half in the jump cache.
pub const JUMP_SALT: i32 = (TLB + TlbLayout::JUMP_SALT) as i32;

const VEC: usize = offset_of!(Cpu, vec);
/// The bits that keep vector instructions from simply running.
pub const GUARD: i32 = (VEC + offset_of!(VectorState, guard)) as i32;
/// Whether their registers are in memory.
pub const AWAY: i32 = (VEC + offset_of!(VectorState, away)) as i32;
pub const WIDE: i32 = (VEC + offset_of!(VectorState, wide)) as i32;
/// [`AWAY`] in the four bytes at [`GUARD`].
pub const AWAY_BIT: u32 = 1 << 8;
const _: () = assert!(AWAY == GUARD + 1 && GUARD % 4 == 0 && WIDE >= GUARD + 4);

/// A vector register.
pub const fn ymm(guest: u8) -> i32 {
    (VEC + offset_of!(VectorState, ymm) + guest as usize * 32) as i32
}

const POINTERS: usize = VEC + offset_of!(VectorState, pointers);
/// The pointers to the last x87 instruction.
pub const FIP: i32 = (POINTERS + offset_of!(X87Pointers, fip)) as i32;
pub const FDP: i32 = (POINTERS + offset_of!(X87Pointers, fdp)) as i32;
pub const FOP: i32 = (POINTERS + offset_of!(X87Pointers, fop)) as i32;

const ENV: usize = offset_of!(Cpu, jit);
/// Where the slots of links are, and what lies in one, by bytes.
pub const LINKS: i32 = (ENV + offset_of!(JitEnv, links_at)) as i32;
pub const fn link_tag(slot: u32) -> i32 {
    (slot * 4) as i32
}
pub const fn link_code(slot: u32) -> i32 {
    link_tag(slot) + 4
}
pub const fn link_address(slot: u32) -> i32 {
    link_tag(slot) + 8
}
pub const JUMPS: i32 = (ENV + offset_of!(JitEnv, table)) as i32;
pub const CODE: i32 = (ENV + offset_of!(JitEnv, code)) as i32;
pub const RUN: i32 = (ENV + offset_of!(JitEnv, run)) as i32;
pub const TARGET: i32 = (ENV + offset_of!(JitEnv, target)) as i32;
pub const PUSHED: i32 = (ENV + offset_of!(JitEnv, pushed)) as i32;
/// How often jumps between pages may still be slow.
pub const PATIENCE: i32 = (ENV + offset_of!(JitEnv, patience)) as i32;
/// The record of the far link that is to be linked to where a handler goes, or 0.
pub const LINKING: i32 = (ENV + offset_of!(JitEnv, linking)) as i32;
pub const STACK: i32 = (ENV + offset_of!(JitEnv, stack)) as i32;
pub const STACK_FLOOR: i32 = (ENV + offset_of!(JitEnv, stack_floor)) as i32;
/// What the span in `slot` adds to addresses of the guest.
pub const fn span(slot: u8) -> i32 {
    (ENV + offset_of!(JitEnv, spans) + (SLOTS - 1 - slot as usize) * 8) as i32
}
const COUNTED: usize = ENV + offset_of!(JitEnv, counted);
pub const COUNTED_BLOCKS: i32 = (COUNTED + offset_of!(Counted, blocks)) as i32;
pub const COUNTED_TLB_HITS: i32 = (COUNTED + offset_of!(Counted, tlb_hits)) as i32;
pub const COUNTED_JUMP_HITS: i32 = (COUNTED + offset_of!(Counted, jump_hits)) as i32;
pub const COUNTED_RETURNS: i32 = (COUNTED + offset_of!(Counted, returns)) as i32;
pub const CALLED: i32 = (ENV + offset_of!(JitEnv, called)) as i32;

pub const fn segment_base(index: u8) -> i32 {
    (offset_of!(Cpu, seg) + index as usize * size_of::<SegmentReg>() + offset_of!(SegmentReg, base))
        as i32
}
