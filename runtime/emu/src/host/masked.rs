//! Masked moves: only the selected elements are accessed, and only they can fault.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::HostOp;
use super::exec::{class, guarded};
use super::mem;
use super::state::guard;
use crate::block::Block;
use crate::cpu::Cpu;
use crate::fault::Fault;
use crate::mmu::{Access, Wrote};
use crate::op::{Flow, Handler, Op};

/// Compiles MASKMOV and VMASKMOV forms. `dst`, `src`, `imm`: register operands (data, mask).
pub fn decode(insn: &Instruction) -> Option<HostOp> {
    use Mnemonic as M;
    let (load, store, element): (Handler, Handler, u8) = match insn.mnemonic() {
        M::Vmaskmovps | M::Vpmaskmovd => (load::<4>, store::<4>, 4),
        M::Vmaskmovpd | M::Vpmaskmovq => (load::<8>, store::<8>, 8),
        M::Maskmovdqu => return bytes(insn, maskmov::<{ class::SSE }>),
        M::Vmaskmovdqu => return bytes(insn, maskmov::<{ class::AVX }>),
        M::Maskmovq => return bytes(insn, maskmovq),
        _ => return None,
    };
    let number = |i| insn.op_register(i).number() as u8;
    let width = insn.memory_size().size() as u8 / element;
    Some(if insn.op_kind(0) == OpKind::Memory {
        HostOp { dst: number(2), src: number(1), aux: width, ..HostOp::new(store) }
    } else {
        HostOp { dst: number(0), src: number(1), aux: width, ..HostOp::new(load) }
    })
}

/// MASKMOVDQU and MASKMOVQ store to DS:rDI; `extra` is the segment and the address size.
fn bytes(insn: &Instruction, handler: Handler) -> Option<HostOp> {
    let width = match insn.op0_kind() {
        OpKind::MemorySegDI => 16,
        OpKind::MemorySegEDI => 32,
        OpKind::MemorySegRDI => 64,
        _ => return None,
    };
    let segment = insn.memory_segment();
    let number = (segment as u32).checked_sub(Register::ES as u32).filter(|n| *n < 6)?;
    Some(HostOp {
        dst: insn.op1_register().number() as u8,
        src: insn.op2_register().number() as u8,
        aux: width,
        extra: number,
        ..HostOp::new(handler)
    })
}

/// Element `i` of a vector register, of `SIZE` bytes.
fn element<const SIZE: usize>(ymm: &[u64; 4], i: usize) -> u64 {
    if SIZE == 8 { ymm[i] } else { ymm[i / 2] >> (i % 2 * 32) & 0xffff_ffff }
}

/// Whether the mask's sign bit of element `i` is set.
fn selected<const SIZE: usize>(mask: &[u64; 4], i: usize) -> bool {
    element::<SIZE>(mask, i) >> (SIZE * 8 - 1) & 1 != 0
}

fn load<const SIZE: usize>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    guarded!(cpu, guard::AVX);
    let mask = cpu.vec.ymm[usize::from(op.src)].0;
    let mut result = [0u64; 4];
    for i in (0..usize::from(op.aux)).filter(|i| selected::<SIZE>(&mask, *i)) {
        let mut bytes = [0; 8];
        let read = at(cpu, op, i * SIZE, SIZE, Access::Read)
            .and_then(|linear| cpu.read_bytes(linear, &mut bytes[..SIZE]));
        if let Err(fault) = read {
            return cpu.raise(mem::stack_fault(op, fault));
        }
        let value = u64::from_le_bytes(bytes);
        if SIZE == 8 { result[i] = value } else { result[i / 2] |= value << (i % 2 * 32) }
    }
    cpu.vec.ymm[usize::from(op.dst)].0 = result;
    Flow::Next
}

fn store<const SIZE: usize>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    guarded!(cpu, guard::AVX);
    let mask = cpu.vec.ymm[usize::from(op.src)].0;
    let data = cpu.vec.ymm[usize::from(op.dst)].0;
    let chosen = || (0..usize::from(op.aux)).filter(|i| selected::<SIZE>(&mask, *i));
    for i in chosen() {
        let probe = at(cpu, op, i * SIZE, SIZE, Access::Write)
            .and_then(|linear| cpu.host_span_any(linear, SIZE, Access::Write).map(drop));
        if let Err(fault) = probe {
            return cpu.raise(mem::stack_fault(op, fault));
        }
    }
    let mut flow = Flow::Next;
    for i in chosen() {
        let bytes = element::<SIZE>(&data, i).to_le_bytes();
        let wrote = at(cpu, op, i * SIZE, SIZE, Access::Write)
            .and_then(|linear| cpu.write_bytes(linear, &bytes[..SIZE]));
        match wrote {
            Ok(Wrote::Code) => flow = Flow::Break,
            Ok(Wrote::Data) => {}
            Err(fault) => return cpu.raise(fault),
        }
    }
    flow
}

/// Linear address of an element.
fn at(cpu: &Cpu, op: &Op, offset: usize, size: usize, access: Access) -> Result<u64, Fault> {
    // The operand starts within the address size; its elements may lie beyond.
    let start = cpu.offset(op).wrapping_add(offset as u64);
    cpu.linear(op.seg.into(), start, size, access == Access::Write)
}

fn maskmov<const G: u8>(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    guarded!(cpu, G);
    let data = vector_bytes(&cpu.vec.ymm[usize::from(op.dst)].0);
    let mask = vector_bytes(&cpu.vec.ymm[usize::from(op.src)].0);
    store_bytes(cpu, op, &data, &mask)
}

fn maskmovq(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    guarded!(cpu, class::MMX);
    // To the guest it is an MMX instruction: the tags become valid and the top zero.
    let data = super::misc::mmx(op.dst).to_le_bytes();
    let mask = super::misc::mmx(op.src).to_le_bytes();
    store_bytes(cpu, op, &data, &mask)
}

fn vector_bytes(ymm: &[u64; 4]) -> [u8; 16] {
    (u128::from(ymm[0]) | u128::from(ymm[1]) << 64).to_le_bytes()
}

fn store_bytes(cpu: &mut Cpu, op: &Op, data: &[u8], mask: &[u8]) -> Flow {
    let mut chosen = Vec::with_capacity(data.len());
    // Whatever the mask is, the address is checked as that of a quadword.
    let start = if op.aux == 64 { cpu.gpr[7] } else { cpu.gpr[7] & ((1 << op.aux) - 1) };
    if let Ok(linear) = cpu.linear(op.extra as usize, start, 1, true)
        && let Err(fault) = cpu.check_alignment(linear, 8)
    {
        return cpu.raise(fault);
    }
    for i in (0..data.len()).filter(|i| mask[*i] & 0x80 != 0) {
        let offset = cpu.gpr[7].wrapping_add(i as u64);
        let offset = if op.aux == 64 { offset } else { offset & ((1 << op.aux) - 1) };
        let probe = cpu
            .linear(op.extra as usize, offset, 1, true)
            .and_then(|linear| cpu.host_span(linear, 1, Access::Write).map(|_| linear));
        match probe {
            Ok(linear) => chosen.push((linear, data[i])),
            Err(fault) => return cpu.raise(fault),
        }
    }
    let mut flow = Flow::Next;
    for (linear, byte) in chosen {
        match cpu.write_bytes(linear, &[byte]) {
            Ok(Wrote::Code) => flow = Flow::Break,
            Ok(Wrote::Data) => {}
            Err(fault) => return cpu.raise(fault),
        }
    }
    flow
}
