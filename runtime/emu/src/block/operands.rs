//! Operands of an instruction, into an op.

use iced_x86::{Instruction, OpKind, Register};

use crate::cpu::{Mode, seg};
use crate::op::{Op, op_flags, reg};
use crate::regs::byte_reg;

/// Number of a register in the file of its kind; 8-bit registers as [`byte_reg`] says.
fn number(register: Register) -> u8 {
    match register {
        Register::AH | Register::CH | Register::DH | Register::BH => {
            byte_reg(register.number() as u8 - 4, true)
        }
        _ if register.is_gpr8() => byte_reg(gpr8_number(register), false),
        _ => register.number() as u8,
    }
}

/// The encoding's number: iced counts AH to BH among the 8-bit registers.
fn gpr8_number(register: Register) -> u8 {
    register.full_register().number() as u8
}

/// Fills in registers, immediate and memory operand of `insn`, which was decoded at address zero.
pub fn fill(insn: &Instruction, mode: Mode, op: &mut Op) {
    op.dst = 0;
    op.src = 0;
    op.imm = 0;
    op.disp = 0;
    op.base = reg::ZERO;
    op.index = reg::ZERO;
    op.scale = 0;
    op.seg = seg::FLAT as u8;
    op.aux = 0;
    op.extra = 0;
    op.flags = if mode == Mode::Code64 { 0 } else { op_flags::LEGACY };
    if insn.has_lock_prefix() {
        op.flags |= op_flags::LOCK;
    }
    let mut immediate = false;
    for i in 0..insn.op_count() {
        match insn.op_kind(i) {
            OpKind::Register => {
                let number = number(insn.op_register(i));
                match i {
                    0 => op.dst = number,
                    1 => op.src = number,
                    _ => {}
                }
            }
            OpKind::Memory => memory(insn, mode, op),
            OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
                if !immediate =>
            {
                op.imm = insn.immediate(i);
                immediate = true;
            }
            OpKind::MemorySegSI | OpKind::MemorySegDI => {
                op.flags |= op_flags::ADDR16;
                segment(insn, mode, op);
            }
            OpKind::MemorySegESI | OpKind::MemorySegEDI => {
                op.flags |= op_flags::ADDR32;
                segment(insn, mode, op);
            }
            OpKind::MemorySegRSI | OpKind::MemorySegRDI => segment(insn, mode, op),
            // ES cannot be overridden.
            OpKind::MemoryESDI => op.flags |= op_flags::ADDR16,
            OpKind::MemoryESEDI => op.flags |= op_flags::ADDR32,
            _ => {}
        }
    }
}

fn segment(insn: &Instruction, mode: Mode, op: &mut Op) {
    let index = (insn.memory_segment() as usize).wrapping_sub(Register::ES as usize).min(seg::GS);
    if mode == Mode::Code64 {
        if index >= seg::FS {
            op.seg = index as u8;
            op.flags |= op_flags::SEG;
        } else if matches!(
            insn.memory_base(),
            Register::RSP | Register::RBP | Register::ESP | Register::EBP
        ) {
            // Prefixes of the other segments are ignored (SDM vol. 1, 3.3.7.1).
            op.flags |= op_flags::STACK;
        }
    } else {
        op.seg = index as u8;
        if index == seg::SS {
            op.flags |= op_flags::STACK;
        }
    }
}

fn memory(insn: &Instruction, mode: Mode, op: &mut Op) {
    segment(insn, mode, op);
    let (base, index) = (insn.memory_base(), insn.memory_index());
    op.disp = insn.memory_displacement64() as i64;
    op.scale = insn.memory_index_scale().trailing_zeros() as u8;
    let mut width = |register: Register| match register.size() {
        4 => op.flags |= op_flags::ADDR32,
        2 => op.flags |= op_flags::ADDR16,
        _ => {}
    };
    match base {
        Register::None => {}
        Register::RIP | Register::EIP => {
            width(base);
            op.base = reg::BLOCK;
        }
        _ => {
            width(base);
            op.base = base.number() as u8;
        }
    }
    // The vector index of a gather is its handler's business, as is the AL of XLAT.
    if index.is_gpr() && index.size() > 1 {
        width(index);
        op.index = index.number() as u8;
    }
    if base == Register::None && index == Register::None {
        // A bare displacement tells the address size, which bit strings need.
        match insn.memory_displ_size() {
            2 => op.flags |= op_flags::ADDR16,
            4 => op.flags |= op_flags::ADDR32,
            _ => {}
        }
    }
}
