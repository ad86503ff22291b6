//! Far jumps, calls and returns (SDM vol. 3, 5.8).

use super::bits::canonical;
use super::decode::{AUX_MEM, operand_size};
use super::descriptor::{Descriptor, Gate, access, system};
use super::iret::{return_stack, return_target};
use super::segments::{gp, is_null, np, null_stack, ss_fault, ts};
use super::stack::Stack;
use super::task::{Resume, Way};
use crate::block::Block;
use crate::cpu::{Cpu, Mode, SegmentReg, seg};
use crate::fault::{Fault, vector};
use crate::op::{Flow, Op};

/// The target of a far jump or call: immediate (`op.imm` offset, `op.extra` selector) or in memory.
fn target(cpu: &mut Cpu, op: &Op) -> Result<(u16, u64), Fault> {
    let size = operand_size(op);
    if op.aux & AUX_MEM == 0 {
        return Ok(((op.imm >> 32) as u16, op.imm & 0xffff_ffff));
    }
    let address = cpu.ea_checked(op, usize::from(size) + 2, false)?;
    let offset = match size {
        2 => cpu.read::<u16>(address)?.into(),
        4 => cpu.read::<u32>(address)?.into(),
        _ => cpu.read::<u64>(address)?,
    };
    Ok((cpu.read::<u16>(address.wrapping_add(size.into()))?, offset))
}

fn done(cpu: &mut Cpu, result: Result<(), Fault>) -> Flow {
    match result {
        Ok(()) => Flow::Jump,
        Err(fault) => cpu.raise(fault),
    }
}

/// JMP far.
pub(crate) fn jump(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let next = cpu.next_rip(op);
    let result =
        target(cpu, op).and_then(|(selector, offset)| far_jump(cpu, selector, offset, next));
    done(cpu, result)
}

fn far_jump(cpu: &mut Cpu, selector: u16, offset: u64, next: u64) -> Result<(), Fault> {
    if cpu.mode == Mode::Real {
        return real_transfer(cpu, selector, offset);
    }
    if is_null(selector) {
        return Err(Fault::GP0);
    }
    let descriptor = cpu.descriptor(selector)?;
    if descriptor.is_system() {
        if let Some(tss) = task(cpu, selector, descriptor)? {
            let resume = Resume { rip: next, flags: cpu.rflags() };
            return cpu.switch_task(tss, Way::Jump, resume, None);
        }
        let (code_selector, offset) = call_gate(cpu, selector, descriptor)?;
        let code = gate_code(cpu, code_selector)?;
        // A jump never changes the privilege level.
        if !code.conforming() && code.dpl() != cpu.cpl {
            return Err(gp(code_selector));
        }
        return go(cpu, code_selector, code, offset, cpu.cpl);
    }
    direct_checks(cpu, selector, descriptor)?;
    go(cpu, selector, descriptor, offset, cpu.cpl)
}

fn real_transfer(cpu: &mut Cpu, selector: u16, offset: u64) -> Result<(), Fault> {
    if offset > cpu.seg[seg::CS].limit.into() {
        return Err(Fault::GP0);
    }
    cpu.set_real_cs(selector);
    cpu.rip = offset;
    Ok(())
}

/// A code segment named directly by a jump or call.
fn direct_checks(cpu: &Cpu, selector: u16, code: Descriptor) -> Result<(), Fault> {
    let allowed = if code.conforming() {
        code.dpl() <= cpu.cpl
    } else {
        selector as u8 & 3 <= cpu.cpl && code.dpl() == cpu.cpl
    };
    if !code.is_code() || !allowed {
        return Err(gp(selector));
    }
    if !code.present() {
        return Err(np(selector));
    }
    Ok(())
}

/// Loads CS and RIP, the last step of every transfer in protected mode.
fn go(cpu: &mut Cpu, selector: u16, code: Descriptor, offset: u64, cpl: u8) -> Result<(), Fault> {
    check_offset(cpu, selector, code, offset)?;
    let cs = cpu.mark_accessed(selector, code)?.load(selector);
    cpu.rip = offset;
    cpu.set_code_segment(cs, cpl);
    Ok(())
}

fn check_offset(cpu: &Cpu, selector: u16, code: Descriptor, offset: u64) -> Result<(), Fault> {
    let wide = code.access() & (access::L | access::DB);
    if cpu.sys.long_mode() && code.access() & access::L != 0 {
        if wide == access::L | access::DB {
            return Err(gp(selector));
        }
        return if canonical(offset) { Ok(()) } else { Err(Fault::GP0) };
    }
    if offset > code.limit().into() { Err(Fault::GP0) } else { Ok(()) }
}

/// The TSS that a far jump or call to `selector` leads to, if it is one or a task gate.
fn task(cpu: &Cpu, selector: u16, descriptor: Descriptor) -> Result<Option<u16>, Fault> {
    let kind = descriptor.kind();
    let gate = kind == system::TASK_GATE;
    if cpu.sys.long_mode() || !gate && !matches!(kind & !2, system::TSS | system::TSS16) {
        return Ok(None);
    }
    if descriptor.dpl() < cpu.cpl.max(selector as u8 & 3) {
        return Err(gp(selector));
    }
    if gate && !descriptor.present() {
        return Err(np(selector));
    }
    Ok(Some(if gate { Gate(descriptor.0).selector() } else { selector }))
}

/// The target of the call gate `gate` found under `selector`.
fn call_gate(cpu: &mut Cpu, selector: u16, gate: Descriptor) -> Result<(u16, u64), Fault> {
    let long = cpu.sys.long_mode();
    let known = match gate.kind() {
        system::CALL => true,
        system::CALL16 => !long,
        _ => false,
    };
    if !known || gate.dpl() < cpu.cpl || gate.dpl() < selector as u8 & 3 {
        return Err(gp(selector));
    }
    let high = if long { cpu.descriptor_high(selector)? } else { 0 };
    if high >> 40 & 0x1f != 0 {
        return Err(gp(selector));
    }
    if !gate.present() {
        return Err(np(selector));
    }
    let view = Gate(gate.0);
    let offset = match gate.kind() {
        system::CALL16 => view.offset() & 0xffff,
        _ => view.offset() | (high & 0xffff_ffff) << 32,
    };
    Ok((view.selector(), offset))
}

/// The code segment behind a call gate.
fn gate_code(cpu: &mut Cpu, selector: u16) -> Result<Descriptor, Fault> {
    if is_null(selector) {
        return Err(Fault::GP0);
    }
    let code = cpu.descriptor(selector)?;
    let wide = code.access() & (access::L | access::DB);
    let long = cpu.sys.long_mode();
    if !code.is_code() || code.dpl() > cpu.cpl || long && wide != access::L {
        return Err(gp(selector));
    }
    if !code.present() {
        return Err(np(selector));
    }
    Ok(code)
}

/// CALL far.
pub(crate) fn call(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let next = cpu.next_rip(op);
    let size = operand_size(op);
    let result =
        target(cpu, op).and_then(|(selector, offset)| far_call(cpu, selector, offset, next, size));
    done(cpu, result)
}

fn far_call(cpu: &mut Cpu, selector: u16, offset: u64, next: u64, size: u8) -> Result<(), Fault> {
    let old_cs = u64::from(cpu.seg[seg::CS].selector);
    if cpu.mode == Mode::Real {
        let mut stack = Stack::of(cpu);
        stack.push(cpu, size, old_cs)?;
        stack.push(cpu, size, next)?;
        real_transfer(cpu, selector, offset)?;
        stack.commit(cpu);
        return Ok(());
    }
    if is_null(selector) {
        return Err(Fault::GP0);
    }
    let descriptor = cpu.descriptor(selector)?;
    if descriptor.is_system() {
        if let Some(tss) = task(cpu, selector, descriptor)? {
            let resume = Resume { rip: next, flags: cpu.rflags() };
            return cpu.switch_task(tss, Way::Nest, resume, None);
        }
        return call_through_gate(cpu, selector, descriptor, next);
    }
    direct_checks(cpu, selector, descriptor)?;
    check_offset(cpu, selector, descriptor, offset)?;
    let mut stack = Stack::of(cpu);
    stack.push(cpu, size, old_cs)?;
    stack.push(cpu, size, next)?;
    go(cpu, selector, descriptor, offset, cpu.cpl)?;
    stack.commit(cpu);
    Ok(())
}

fn call_through_gate(
    cpu: &mut Cpu,
    selector: u16,
    gate: Descriptor,
    next: u64,
) -> Result<(), Fault> {
    let (code_selector, offset) = call_gate(cpu, selector, gate)?;
    let code = gate_code(cpu, code_selector)?;
    check_offset(cpu, code_selector, code, offset)?;
    let long = cpu.sys.long_mode();
    let size = match gate.kind() {
        _ if long => 8,
        system::CALL16 => 2,
        _ => 4,
    };
    let old_cs = u64::from(cpu.seg[seg::CS].selector);
    let inner = !code.conforming() && code.dpl() < cpu.cpl;
    if !inner {
        let mode = if long { Mode::Code64 } else { cpu.mode };
        let mut stack = Stack::at(mode, &cpu.seg[seg::SS], cpu.gpr[4], cpu.cpl);
        stack.push(cpu, size, old_cs)?;
        stack.push(cpu, size, next)?;
        go(cpu, code_selector, code, offset, cpu.cpl)?;
        stack.commit(cpu);
        return Ok(());
    }
    let cpl = code.dpl();
    let (ss, mut stack) = inner_stack(cpu, cpl, long)?;
    let (old_ss, old_sp) = (u64::from(cpu.seg[seg::SS].selector), cpu.gpr[4]);
    let parameters = if long { 0 } else { Gate(gate.0).parameters() };
    let mut source = Stack::of(cpu);
    stack.push(cpu, size, old_ss)?;
    stack.push(cpu, size, old_sp)?;
    let mut copied = Vec::with_capacity(parameters.into());
    for _ in 0..parameters {
        copied.push(source.pop(cpu, size)?);
    }
    for value in copied.into_iter().rev() {
        stack.push(cpu, size, value)?;
    }
    stack.push(cpu, size, old_cs)?;
    stack.push(cpu, size, next)?;
    go(cpu, code_selector, code, offset, cpl)?;
    cpu.seg[seg::SS] = ss;
    stack.commit(cpu);
    Ok(())
}

/// The stack of an inner privilege level, from the TSS.
fn inner_stack(cpu: &mut Cpu, cpl: u8, long: bool) -> Result<(SegmentReg, Stack), Fault> {
    if long {
        let ss = null_stack(cpl);
        let rsp = cpu.tss64_stack(cpl, 0)?;
        return Ok((ss, Stack::at(Mode::Code64, &ss, rsp, cpl)));
    }
    let (sp, selector) = cpu.tss_stack(cpl)?;
    let ss = cpu.stack_segment(selector, cpl).map_err(|fault| match fault.vector() {
        vector::GP => ts(selector),
        _ => fault,
    })?;
    Ok((ss, Stack::at(cpu.mode, &ss, sp.into(), cpl).or(ss_fault(selector))))
}

/// RET far, which drops `op.imm` bytes of parameters.
pub(crate) fn ret(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let result = far_return(cpu, operand_size(op), op.imm & 0xffff);
    done(cpu, result)
}

fn far_return(cpu: &mut Cpu, size: u8, drop: u64) -> Result<(), Fault> {
    let mut stack = Stack::of(cpu);
    let rip = stack.pop(cpu, size)?;
    let selector = stack.pop(cpu, size)? as u16;
    if cpu.mode == Mode::Real {
        real_transfer(cpu, selector, rip)?;
        stack.skip(drop);
        stack.commit(cpu);
        return Ok(());
    }
    let (code, cpl) = return_target(cpu, selector, rip)?;
    stack.skip(drop);
    let to_64 = cpu.sys.long_mode() && code.access() & access::L != 0;
    let outer = if cpl != cpu.cpl {
        let rsp = stack.pop(cpu, size)?;
        let ss = stack.pop(cpu, size)? as u16;
        Some((rsp, return_stack(cpu, ss, cpl, to_64)?))
    } else {
        None
    };
    let cs = cpu.mark_accessed(selector, code)?.load(selector);
    cpu.rip = if to_64 { rip } else { rip & 0xffff_ffff };
    cpu.set_code_segment(cs, cpl);
    let Some((rsp, ss)) = outer else {
        stack.commit(cpu);
        return Ok(());
    };
    let mut stack = Stack::at(cpu.mode, &ss, rsp, cpl);
    stack.skip(drop);
    stack.commit(cpu);
    cpu.seg[seg::SS] = ss;
    cpu.drop_privileged_segments();
    Ok(())
}
