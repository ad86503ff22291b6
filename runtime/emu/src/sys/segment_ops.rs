//! MOV, PUSH, POP and the far-pointer loads of segment registers.

use super::decode::{AUX_MEM, operand_size};
use super::stack::Stack;
use crate::block::Block;
use crate::cpu::{Cpu, Mode, seg};
use crate::fault::Fault;
use crate::op::{Flow, Op};

/// After a segment register changed. Bases of 64-bit code other than FS and GS do not matter, so
/// its blocks may go on.
fn loaded(cpu: &mut Cpu, register: usize, result: Result<(), Fault>) -> Flow {
    match result {
        Err(fault) => cpu.raise(fault),
        Ok(()) if register == seg::SS => {
            cpu.shadow = true;
            cpu.sys.step_inhibited = true;
            cpu.sys.ss_loaded = true;
            Flow::Break
        }
        Ok(()) if cpu.mode == Mode::Code64 => Flow::Next,
        Ok(()) => Flow::Break,
    }
}

/// MOV to segment register `op.dst` from a register or memory.
pub(crate) fn load(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let register = usize::from(op.dst);
    let result = cpu.operand16(op).and_then(|selector| cpu.load_segment(register, selector));
    loaded(cpu, register, result)
}

/// MOV from segment register `op.src`.
pub(crate) fn store(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let selector = cpu.seg[usize::from(op.src)].selector;
    if op.aux & AUX_MEM != 0 {
        let written = cpu.ea_checked(op, 2, true).and_then(|a| cpu.write::<u16>(a, selector));
        return match written {
            Ok(wrote) => wrote.into(),
            Err(fault) => cpu.raise(fault),
        };
    }
    let register = &mut cpu.gpr[usize::from(op.dst)];
    *register = match operand_size(op) {
        2 => *register & !0xffff | u64::from(selector),
        _ => selector.into(),
    };
    Flow::Next
}

/// PUSH segment register `op.src`.
pub(crate) fn push(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let selector = cpu.seg[usize::from(op.src)].selector;
    match cpu.push_sized(selector.into(), operand_size(op).into()) {
        Ok(_) => Flow::Break,
        Err(fault) => cpu.raise(fault),
    }
}

/// POP segment register `op.dst`.
pub(crate) fn pop(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let register = usize::from(op.dst);
    let mut stack = Stack::of(cpu);
    let result = stack.pop(cpu, operand_size(op)).and_then(|value| {
        cpu.load_segment(register, value as u16)?;
        // The width of the stack pointer is that of the old SS.
        stack.commit(cpu);
        Ok(())
    });
    loaded(cpu, register, result)
}

/// LDS, LES, LFS, LGS, LSS: segment register `op.src` and register `op.dst` from memory.
pub(crate) fn load_far(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let register = usize::from(op.src);
    let size = operand_size(op);
    let result = cpu.ea_checked(op, usize::from(size) + 2, false).and_then(|address| {
        let offset = match size {
            2 => cpu.read::<u16>(address)?.into(),
            4 => cpu.read::<u32>(address)?.into(),
            _ => cpu.read::<u64>(address)?,
        };
        let selector = cpu.read::<u16>(address.wrapping_add(size.into()))?;
        cpu.load_segment(register, selector)?;
        let target = &mut cpu.gpr[usize::from(op.dst)];
        *target = if size == 2 { *target & !0xffff | offset } else { offset };
        Ok(())
    });
    match loaded(cpu, register, result) {
        // LSS holds nothing off: it loads both halves at once.
        Flow::Break if register == seg::SS => {
            cpu.shadow = false;
            cpu.sys.step_inhibited = false;
            cpu.sys.ss_loaded = false;
            Flow::Break
        }
        flow => flow,
    }
}
