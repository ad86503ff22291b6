//! Descriptor-table registers and the instructions that look at descriptors.

use super::bits::canonical;
use super::control::umip_forbids;
use super::decode::operand_size;
use super::descriptor::{Descriptor, system};
use super::misc::serialize;
use super::segments::is_null;
use crate::block::Block;
use crate::cpu::{Cpu, Mode};
use crate::fault::Fault;
use crate::flags::cc;
use crate::mmu::Wrote;
use crate::op::{Flow, Op};
use mvm_engine::Table;

fn flow(cpu: &mut Cpu, result: Result<(), Fault>) -> Flow {
    match result {
        Ok(()) => Flow::Next,
        Err(fault) => cpu.raise(fault),
    }
}

fn load(cpu: &mut Cpu, op: &Op) -> Result<Table, Fault> {
    if cpu.cpl != 0 {
        return Err(Fault::GP0);
    }
    let wide = cpu.mode == Mode::Code64;
    let address = cpu.ea_checked(op, if wide { 10 } else { 6 }, false)?;
    let limit = cpu.read::<u16>(address)?;
    let at = address.wrapping_add(2);
    let base = match operand_size(op) {
        _ if wide => cpu.read::<u64>(at)?,
        2 => u64::from(cpu.read::<u32>(at)? & 0xff_ffff),
        _ => cpu.read::<u32>(at)?.into(),
    };
    if canonical(base) { Ok(Table { base, limit }) } else { Err(Fault::GP0) }
}

/// LGDT.
pub(crate) fn lgdt(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    serialize();
    let result = load(cpu, op).map(|table| cpu.sys.gdtr = table);
    flow(cpu, result)
}

/// LIDT.
pub(crate) fn lidt(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    serialize();
    let result = load(cpu, op).map(|table| cpu.sys.idtr = table);
    flow(cpu, result)
}

fn store(cpu: &mut Cpu, op: &Op, table: Table) -> Flow {
    if umip_forbids(cpu) {
        return cpu.raise(Fault::GP0);
    }
    let size = if cpu.mode == Mode::Code64 { 10 } else { 6 };
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let written = cpu.ea_checked(op, size, true).and_then(|address| {
        cpu.check_alignment(address, 2)?;
        cpu.check_alignment(address.wrapping_add(2), size - 2)?;
        cpu.write_bytes(address, &bytes[..size])
    });
    match written {
        Ok(wrote) => wrote.into(),
        Err(fault) => cpu.raise(fault),
    }
}

/// SGDT.
pub(crate) fn sgdt(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let table = cpu.sys.gdtr;
    store(cpu, op, table)
}

/// SIDT.
pub(crate) fn sidt(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let table = cpu.sys.idtr;
    store(cpu, op, table)
}

/// The checks that LLDT and LTR share, and their operand.
fn privileged_selector(cpu: &mut Cpu, op: &Op) -> Result<u16, Fault> {
    if !cpu.has_descriptors() {
        return Err(Fault::UD);
    }
    if cpu.cpl != 0 {
        return Err(Fault::GP0);
    }
    cpu.operand16(op)
}

/// LLDT.
pub(crate) fn lldt(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    serialize();
    let result = privileged_selector(cpu, op).and_then(|selector| cpu.load_ldtr(selector));
    flow(cpu, result)
}

/// LTR.
pub(crate) fn ltr(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    serialize();
    let result = privileged_selector(cpu, op).and_then(|selector| cpu.load_tr(selector));
    flow(cpu, result)
}

/// SLDT.
pub(crate) fn sldt(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    if !cpu.has_descriptors() {
        return cpu.raise(Fault::UD);
    }
    let selector = cpu.sys.ldtr.selector;
    cpu.store_system(op, selector.into())
}

/// STR.
pub(crate) fn str(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    if !cpu.has_descriptors() {
        return cpu.raise(Fault::UD);
    }
    let selector = cpu.sys.tr.selector;
    cpu.store_system(op, selector.into())
}

/// The descriptor of `selector` if LAR, LSL, VERR and VERW may look at it.
fn visible(cpu: &mut Cpu, selector: u16) -> Result<Option<Descriptor>, Fault> {
    if is_null(selector) {
        return Ok(None);
    }
    let Some(address) = cpu.descriptor_address(selector) else { return Ok(None) };
    let descriptor = Descriptor(cpu.read_sys::<u64>(address)?);
    let privilege = cpu.cpl.max(selector as u8 & 3);
    let reachable = descriptor.conforming() || descriptor.dpl() >= privilege;
    Ok(reachable.then_some(descriptor))
}

fn set_zero_flag(cpu: &mut Cpu, on: bool) {
    cpu.cc = if on { cpu.cc | cc::ZF } else { cpu.cc & !cc::ZF };
}

fn examine(
    cpu: &mut Cpu,
    op: &Op,
    look: impl FnOnce(&mut Cpu, u16, Descriptor) -> Option<u32>,
) -> Flow {
    if !cpu.has_descriptors() {
        return cpu.raise(Fault::UD);
    }
    let found = cpu.operand16(op).and_then(|s| Ok((s, visible(cpu, s)?)));
    let (selector, descriptor) = match found {
        Ok(found) => found,
        Err(fault) => return cpu.raise(fault),
    };
    let answer = descriptor.and_then(|descriptor| look(cpu, selector, descriptor));
    set_zero_flag(cpu, answer.is_some());
    if let Some(value) = answer {
        let register = &mut cpu.gpr[usize::from(op.dst)];
        *register = match operand_size(op) {
            2 => *register & !0xffff | u64::from(value & 0xffff),
            _ => value.into(),
        };
    }
    Flow::Next
}

/// LAR.
pub(crate) fn lar(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    examine(cpu, op, |cpu, _, descriptor| {
        let long = cpu.sys.long_mode();
        let known = !descriptor.is_system()
            || match descriptor.kind() {
                system::LDT | system::TSS | system::TSS_BUSY | system::CALL => true,
                system::TSS16 | 3 | system::CALL16 | system::TASK_GATE => !long,
                _ => false,
            };
        known.then_some((descriptor.0 >> 32) as u32 & 0x00ff_ff00)
    })
}

/// LSL.
pub(crate) fn lsl(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    examine(cpu, op, |cpu, _, descriptor| {
        let long = cpu.sys.long_mode();
        let known = !descriptor.is_system()
            || match descriptor.kind() {
                system::LDT | system::TSS | system::TSS_BUSY => true,
                system::TSS16 | 3 => !long,
                _ => false,
            };
        known.then_some(descriptor.limit())
    })
}

fn verify(cpu: &mut Cpu, op: &Op, fits: impl FnOnce(Descriptor) -> bool) -> Flow {
    if !cpu.has_descriptors() {
        return cpu.raise(Fault::UD);
    }
    match cpu.operand16(op).and_then(|selector| visible(cpu, selector)) {
        Ok(descriptor) => {
            set_zero_flag(cpu, descriptor.is_some_and(fits));
            Flow::Next
        }
        Err(fault) => cpu.raise(fault),
    }
}

/// VERR.
pub(crate) fn verr(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    verify(cpu, op, Descriptor::is_readable)
}

/// VERW.
pub(crate) fn verw(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    verify(cpu, op, Descriptor::is_writable_data)
}

/// ARPL (not in 64-bit mode): `op.src` is the register operand, the other is `op.dst` or memory.
pub(crate) fn arpl(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    if !cpu.has_descriptors() {
        return cpu.raise(Fault::UD);
    }
    let wanted = cpu.gpr[usize::from(op.src)] as u16 & 3;
    if op.aux & super::decode::AUX_MEM == 0 {
        let register = &mut cpu.gpr[usize::from(op.dst)];
        let raise = (*register as u16 & 3) < wanted;
        if raise {
            *register = *register & !3 | u64::from(wanted);
        }
        set_zero_flag(cpu, raise);
        return Flow::Next;
    }
    let result = cpu.ea_checked(op, 2, false).and_then(|address| {
        let value = cpu.read::<u16>(address)?;
        if value & 3 >= wanted {
            // Nothing is written: memory that can only be read will do.
            return Ok((false, Wrote::Data));
        }
        let address = cpu.ea_checked(op, 2, true)?;
        Ok((true, cpu.write::<u16>(address, value & !3 | wanted)?))
    });
    match result {
        Ok((raised, wrote)) => {
            set_zero_flag(cpu, raised);
            wrote.into()
        }
        Err(fault) => cpu.raise(fault),
    }
}
