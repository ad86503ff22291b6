//! IRET (SDM vol. 2, "IRET/IRETD/IRETQ").

use super::bits::canonical;
use super::descriptor::{Descriptor, access};
use super::misc::serialize;
use super::segments::{gp, is_null, np, null_stack, ss_fault};
use super::stack::Stack;
use super::task::{Resume, Way};
use crate::block::Block;
use crate::cpu::{Cpu, Mode, SegmentReg, seg};
use crate::fault::Fault;
use crate::flags::rflags;
use crate::op::{Flow, Op};

/// IRET with an operand size of `op.aux` bytes.
pub(crate) fn iret(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    serialize();
    let next = cpu.next_rip(op);
    match interrupt_return(cpu, op.aux, next) {
        Ok(()) => {
            cpu.unmask_nmi();
            Flow::Jump
        }
        Err(fault) => cpu.raise(fault),
    }
}

fn interrupt_return(cpu: &mut Cpu, size: u8, next: u64) -> Result<(), Fault> {
    if cpu.mode == Mode::Real {
        if cpu.virtual_8086() && !cpu.io_privileged() {
            return Err(Fault::GP0);
        }
        return real(cpu, size);
    }
    if cpu.sysflags & rflags::NT != 0 {
        if cpu.sys.long_mode() {
            return Err(Fault::GP0);
        }
        let link = cpu.read_sys::<u16>(cpu.sys.tr.base)?;
        let resume = Resume { rip: next, flags: cpu.rflags() };
        return cpu.switch_task(link, Way::Return, resume, None);
    }
    let mut stack = Stack::of(cpu);
    let rip = stack.pop(cpu, size)?;
    let cs = stack.pop(cpu, size)? as u16;
    let flags = stack.pop(cpu, size)?;
    if size > 2 && flags & rflags::VM != 0 && !cpu.sys.long_mode() && cpu.cpl == 0 {
        return to_8086(cpu, stack, (rip, cs, flags));
    }
    let (code, cpl) = return_target(cpu, cs, rip)?;
    let to_64 = cpu.sys.long_mode() && code.access() & access::L != 0;
    let outer = if cpu.mode == Mode::Code64 || cpl != cpu.cpl {
        let rsp = stack.pop(cpu, size)?;
        let ss = stack.pop(cpu, size)? as u16;
        Some((rsp, return_stack(cpu, ss, cpl, to_64)?))
    } else {
        None
    };
    let code = cpu.mark_accessed(cs, code)?.load(cs);
    // Nothing can fault any more.
    let changed = flags_for_iret(cpu.cpl, cpu.sysflags, size);
    let was = cpu.rflags();
    let privileged = cpl != cpu.cpl;
    cpu.rip = if to_64 { rip } else { rip & 0xffff_ffff };
    cpu.set_code_segment(code, cpl);
    match outer {
        Some((rsp, ss)) => {
            let small = !to_64 && ss.access & access::DB == 0;
            cpu.gpr[4] = if small { cpu.gpr[4] & !0xffff | rsp & 0xffff } else { rsp };
            cpu.seg[seg::SS] = ss;
        }
        None => stack.commit(cpu),
    }
    if privileged {
        cpu.drop_privileged_segments();
    }
    cpu.replace_flags(was & !changed | flags & changed);
    Ok(())
}

/// Goes on in virtual-8086 mode: the stack pointer and all segments are on the stack too.
fn to_8086(
    cpu: &mut Cpu,
    mut stack: Stack,
    (rip, cs, flags): (u64, u16, u64),
) -> Result<(), Fault> {
    if rip > 0xffff {
        return Err(Fault::GP0);
    }
    let mut words = [0; 6];
    for word in &mut words {
        *word = stack.pop(cpu, 4)?;
    }
    let [rsp, ss, es, ds, fs, gs] = words;
    cpu.load_8086_segments([es as u16, cs, ss as u16, ds as u16, fs as u16, gs as u16]);
    (cpu.rip, cpu.gpr[4]) = (rip, rsp);
    let mask = flags_for_iret(0, cpu.sysflags, 4) | rflags::VM | rflags::VIF | rflags::VIP;
    cpu.replace_flags(flags & mask);
    cpu.update_mode();
    Ok(())
}

fn real(cpu: &mut Cpu, size: u8) -> Result<(), Fault> {
    let mut stack = Stack::of(cpu);
    let rip = stack.pop(cpu, size)?;
    let cs = stack.pop(cpu, size)? as u16;
    let flags = stack.pop(cpu, size)?;
    if rip > cpu.seg[seg::CS].limit.into() {
        return Err(Fault::GP0);
    }
    stack.commit(cpu);
    cpu.rip = rip;
    cpu.set_real_cs(cs);
    let changed = flags_for_iret(cpu.cpl, cpu.sysflags, size);
    cpu.replace_flags(cpu.rflags() & !changed | flags & changed);
    Ok(())
}

/// The flags that IRET at privilege level `cpl` changes.
fn flags_for_iret(cpl: u8, flags: u64, size: u8) -> u64 {
    let mut mask = rflags::ARITH | rflags::TF | rflags::DF | rflags::NT;
    if size > 2 {
        mask |= rflags::RF | rflags::AC | rflags::ID;
    }
    if cpl == 0 {
        mask |= rflags::IOPL;
    }
    if u64::from(cpl) <= (flags & rflags::IOPL) >> 12 {
        mask |= rflags::IF;
    }
    mask
}

/// Checks the code segment of a far return (SDM vol. 3, 5.8.6) and the new RIP.
pub(super) fn return_target(
    cpu: &mut Cpu,
    selector: u16,
    rip: u64,
) -> Result<(Descriptor, u8), Fault> {
    if is_null(selector) {
        return Err(Fault::GP0);
    }
    let code = cpu.descriptor(selector)?;
    let rpl = selector as u8 & 3;
    let privilege_fits = if code.conforming() { code.dpl() <= rpl } else { code.dpl() == rpl };
    if !code.is_code() || rpl < cpu.cpl || !privilege_fits {
        return Err(gp(selector));
    }
    let wide = access::L | access::DB;
    if cpu.sys.long_mode() && code.access() & wide == wide {
        return Err(gp(selector));
    }
    if !code.present() {
        return Err(np(selector));
    }
    if cpu.sys.long_mode() && code.access() & access::L != 0 {
        if !canonical(rip) {
            return Err(Fault::GP0);
        }
    } else if rip & 0xffff_ffff > code.limit().into() {
        return Err(Fault::GP0);
    }
    Ok((code, rpl))
}

/// Checks the stack segment of a far return to level `cpl`.
pub(super) fn return_stack(
    cpu: &mut Cpu,
    selector: u16,
    cpl: u8,
    to_64: bool,
) -> Result<SegmentReg, Fault> {
    let rpl = selector as u8 & 3;
    if is_null(selector) {
        return if to_64 && cpl != 3 && rpl == cpl { Ok(null_stack(cpl)) } else { Err(Fault::GP0) };
    }
    let descriptor = cpu.descriptor(selector)?;
    if rpl != cpl || !descriptor.is_writable_data() || descriptor.dpl() != cpl {
        return Err(gp(selector));
    }
    if !descriptor.present() {
        return Err(ss_fault(selector));
    }
    Ok(cpu.mark_accessed(selector, descriptor)?.load(selector))
}
