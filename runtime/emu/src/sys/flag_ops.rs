//! PUSHF, POPF, CLI, STI, CLAC, STAC.

use super::attention::reason;
use super::bits::dr;
use super::decode::operand_size;
use super::stack::Stack;
use crate::block::Block;
use crate::cpu::{Cpu, Mode};
use crate::fault::Fault;
use crate::flags::rflags;
use crate::op::{Flow, Op};

impl Cpu {
    /// Sets RFLAGS whole and does what changed bits ask for.
    pub(crate) fn replace_flags(&mut self, flags: u64) {
        let before = self.sysflags;
        self.set_rflags(flags);
        if self.sys.dr7 & dr::DR7_ENABLES == 0 {
            // Resumption suppresses breakpoints; without any it would only linger.
            self.sysflags &= !rflags::RF;
        }
        if (before ^ self.sysflags) & rflags::AC != 0 {
            self.tlb_set_context();
        }
        self.interrupts_may_be_on();
    }

    /// To be called when RFLAGS.IF may have become set: a held interrupt is looked at again.
    #[inline]
    pub(crate) fn interrupts_may_be_on(&mut self) {
        if self.sysflags & rflags::IF != 0 && self.sys.lapic.held {
            self.sys.attention().raise_self(reason::INTERRUPT);
        }
    }

    fn iopl(&self) -> u8 {
        ((self.sysflags & rflags::IOPL) >> 12) as u8
    }

    /// May the running code touch IF and ports?
    pub(crate) fn io_privileged(&self) -> bool {
        self.cpl <= self.iopl()
    }
}

/// PUSHF.
pub(crate) fn pushf(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    if cpu.virtual_8086() && !cpu.io_privileged() {
        return cpu.raise(Fault::GP0);
    }
    let image = cpu.rflags() & !(rflags::RF | rflags::VM);
    match cpu.push_sized(image, operand_size(op).into()) {
        Ok(wrote) => wrote.into(),
        Err(fault) => cpu.raise(fault),
    }
}

/// POPF.
pub(crate) fn popf(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    if cpu.virtual_8086() && !cpu.io_privileged() {
        return cpu.raise(Fault::GP0);
    }
    let size = operand_size(op);
    let mut stack = Stack::of(cpu);
    let image = match stack.pop(cpu, size) {
        Ok(image) => image,
        Err(fault) => return cpu.raise(fault),
    };
    stack.commit(cpu);
    let mut mask = rflags::ARITH | rflags::TF | rflags::DF | rflags::NT;
    if size > 2 {
        mask |= rflags::AC | rflags::ID;
    }
    if cpu.cpl == 0 {
        mask |= rflags::IOPL;
    }
    if cpu.io_privileged() {
        mask |= rflags::IF;
    }
    let old = cpu.rflags();
    let new = old & !mask & !rflags::RF | image & mask;
    let held = new & rflags::IF != 0 && cpu.sys.lapic.held;
    if (old ^ new) & !rflags::ARITH & !rflags::DF & !rflags::IF == 0 && !held {
        // Nothing that the block loop looks at: the common case of save and restore.
        cpu.set_rflags(new);
        return Flow::Next;
    }
    cpu.replace_flags(new);
    Flow::Break
}

/// CLI.
pub(crate) fn cli(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    if !cpu.io_privileged() {
        return cpu.raise(Fault::GP0);
    }
    cpu.sysflags &= !rflags::IF;
    Flow::Next
}

/// [`Op::aux`] of an STI that ends its block.
pub(crate) const LAST: u8 = 1;

/// STI: interrupts come after the next instruction.
pub(crate) fn sti(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    if !cpu.io_privileged() {
        return cpu.raise(Fault::GP0);
    }
    if cpu.sysflags & rflags::IF != 0 {
        return Flow::Next;
    }
    cpu.sysflags |= rflags::IF;
    if op.aux != LAST && !cpu.sys.lapic.held {
        // What comes from now on is looked at between blocks, and the next instruction belongs to this one.
        return Flow::Next;
    }
    cpu.shadow = true;
    cpu.sys.ss_loaded = false;
    cpu.interrupts_may_be_on();
    Flow::Break
}

/// CLAC (`op.aux` 0) and STAC (1).
pub(crate) fn set_ac(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    if cpu.cpl != 0 || cpu.mode == Mode::Real || !cpu.sys.platform.instructions.smap {
        return cpu.raise(Fault::UD);
    }
    if op.aux == 0 {
        cpu.sysflags &= !rflags::AC;
    } else {
        cpu.sysflags |= rflags::AC;
    }
    cpu.tlb_set_privilege();
    Flow::Next
}
