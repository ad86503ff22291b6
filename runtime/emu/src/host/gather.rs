//! AVX2 gathers: as many memory operands as elements, each with its own fault.
//!
//! Elements are fetched in order; each that is done clears its mask element, so that a fault in the
//! middle leaves what the architecture allows (SDM vol. 2, VGATHERDPS).

use iced_x86::{Instruction, Mnemonic, Register};

use super::exec::guarded;
use super::state::guard;
use super::{HostOp, mem};
use crate::block::Block;
use crate::cpu::Cpu;
use crate::op::{Flow, Handler, Op, op_flags};

/// Compiles a gather. `dst`, `src`: destination and mask; `aux`: index; `imm`: elements and length.
pub fn decode(insn: &Instruction) -> Option<HostOp> {
    use Mnemonic as M;
    let (handler, index_size, element): (Handler, u32, u32) = match insn.mnemonic() {
        M::Vgatherdps | M::Vpgatherdd => (gather::<4, 4>, 4, 4),
        M::Vgatherqps | M::Vpgatherqd => (gather::<8, 4>, 8, 4),
        M::Vgatherdpd | M::Vpgatherdq => (gather::<4, 8>, 4, 8),
        M::Vgatherqpd | M::Vpgatherqq => (gather::<8, 8>, 8, 8),
        _ => return None,
    };
    let index = insn.memory_index();
    let (to, mask) = (insn.op0_register(), insn.op2_register());
    let distinct = to.number() != mask.number()
        && to.number() != index.number()
        && mask.number() != index.number();
    if !distinct || insn.memory_base() == Register::RIP {
        return None;
    }
    // As many elements as both the index and the destination have room for.
    let room = |register: Register, size| if register.is_ymm() { 32 / size } else { 16 / size };
    let elements = room(index, index_size).min(room(to, element));
    Some(HostOp {
        dst: to.number() as u8,
        src: mask.number() as u8,
        aux: index.number() as u8,
        imm: u64::from(elements),
        ..HostOp::new(handler)
    })
}

fn gather<const INDEX: usize, const SIZE: usize>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    guarded!(cpu, guard::AVX);
    let (to, mask, index) = (usize::from(op.dst), usize::from(op.src), usize::from(op.aux));
    let elements = op.imm as usize;
    // Mask elements are their sign bits from here on, so that a fault leaves whole elements.
    for i in 0..elements {
        let sign = lane::<SIZE>(&cpu.vec.ymm[mask].0, i) >> (SIZE * 8 - 1) & 1;
        set_lane::<SIZE>(&mut cpu.vec.ymm[mask].0, i, sign.wrapping_neg());
    }
    for i in 0..elements {
        if lane::<SIZE>(&cpu.vec.ymm[mask].0, i) == 0 {
            continue;
        }
        let offset = lane::<INDEX>(&cpu.vec.ymm[index].0, i);
        let offset = if INDEX == 4 { offset as i32 as i64 as u64 } else { offset };
        let linear = address(cpu, op, offset);
        let mut bytes = [0; 8];
        if let Err(fault) = cpu.read_bytes(linear, &mut bytes[..SIZE]) {
            return cpu.raise(mem::stack_fault(op, fault));
        }
        set_lane::<SIZE>(&mut cpu.vec.ymm[to].0, i, u64::from_le_bytes(bytes));
        set_lane::<SIZE>(&mut cpu.vec.ymm[mask].0, i, 0);
    }
    // What lies beyond the elements is cleared, in the mask wholly.
    for i in elements..32 / SIZE {
        set_lane::<SIZE>(&mut cpu.vec.ymm[to].0, i, 0);
    }
    cpu.vec.ymm[mask].0 = [0; 4];
    Flow::Next
}

fn address(cpu: &Cpu, op: &Op, index: u64) -> u64 {
    let offset =
        cpu.gpr[usize::from(op.base)].wrapping_add(index << op.scale).wrapping_add(op.disp as u64);
    let offset = if op.flags & op_flags::ADDR32 != 0 { offset & 0xffff_ffff } else { offset };
    cpu.seg[usize::from(op.seg)].base.wrapping_add(offset)
}

fn lane<const SIZE: usize>(ymm: &[u64; 4], i: usize) -> u64 {
    if SIZE == 8 { ymm[i] } else { ymm[i / 2] >> (i % 2 * 32) & 0xffff_ffff }
}

fn set_lane<const SIZE: usize>(ymm: &mut [u64; 4], i: usize, value: u64) {
    if SIZE == 8 {
        ymm[i] = value;
    } else {
        let shift = i % 2 * 32;
        ymm[i / 2] = ymm[i / 2] & !(0xffff_ffff << shift) | (value & 0xffff_ffff) << shift;
    }
}
