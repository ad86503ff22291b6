//! CPUID, HLT, PAUSE, software interrupts, and what is always #UD.

use std::sync::atomic::{Ordering, fence};

use mvm_engine::{MpState, cpuid};

use super::decode::{AUX_MEM, operand_size};
use super::deliver::Cause;
use crate::block::Block;
use crate::cpu::{Cpu, Mode};
use crate::fault::{Fault, vector};
use crate::flags::cc;
use crate::op::{Flow, Op, reg};

/// What the serializing instructions do to accesses to memory: those of this vCPU that came before are done, for all
/// others to see, before any that come after (SDM vol. 3, 9.3).
#[inline]
pub(crate) fn serialize() {
    fence(Ordering::SeqCst);
}

impl Cpu {
    /// RIP of the instruction after `op`.
    pub(crate) fn next_rip(&self, op: &Op) -> u64 {
        let next = self.gpr[usize::from(reg::BLOCK)].wrapping_add(op.end.into());
        match self.mode {
            Mode::Code64 => next,
            Mode::Code32 => next & 0xffff_ffff,
            Mode::Real | Mode::Code16 => next & 0xffff,
        }
    }

    /// Bytes at `linear` for a message, as far as they are mapped RAM. Raises nothing.
    pub fn peek(&self, linear: u64, count: u64) -> Vec<u8> {
        (0..count)
            .map_while(|i| {
                let gpa = self.translate_debug(linear.wrapping_add(i))?;
                let mut byte = [0];
                self.phys_read(gpa, &mut byte).then_some(byte[0])
            })
            .collect()
    }

    /// Logs something odd that the guest did, not too often.
    pub(crate) fn log_odd(&mut self, what: &str) {
        if self.sys.may_log() {
            tracing::warn!(vcpu = self.sys.index, rip = self.rip, "{what}");
        }
    }
}

/// CPUID.
pub(crate) fn cpuid(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    serialize();
    let query = (cpu.gpr[0] as u32, cpu.gpr[1] as u32);
    let sys = &cpu.sys;
    let mut answer = cpuid::answer(&sys.cpuid, sys.vendor, query, sys.cr4, sys.xcr0);
    if query.0 == 1 && sys.lapic.mode() == crate::apic::ApicMode::Disabled {
        answer[3] &= !(1 << 9);
    }
    // EAX, EBX, ECX, EDX are registers 0, 3, 1, 2.
    for (register, value) in [0, 3, 1, 2].into_iter().zip(answer) {
        cpu.gpr[register] = value.into();
    }
    Flow::Next
}

/// HLT.
pub(crate) fn hlt(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    if cpu.cpl != 0 {
        return cpu.raise(Fault::GP0);
    }
    if std::mem::take(&mut cpu.sys.pv.unhalted) {
        return Flow::Break;
    }
    cpu.sys.activity = MpState::Halted;
    Flow::Halt
}

/// PAUSE: with several vCPUs the one waited for may not be running.
pub(crate) fn pause(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    if cpu.sys.platform.vcpus > 1 {
        cpu.sys.pauses = cpu.sys.pauses.wrapping_add(1);
        if cpu.sys.pauses.is_multiple_of(64) {
            std::thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
    }
    Flow::Break
}

/// INT n: `op.imm` is the vector. Virtual-8086 mode needs a privilege for it.
pub(crate) fn int(cpu: &mut Cpu, op: &Op, block: &Block) -> Flow {
    if cpu.virtual_8086() && !cpu.io_privileged() {
        return cpu.raise(Fault::GP0);
    }
    int3(cpu, op, block)
}

/// INT3, with 3 in `op.imm`.
pub(crate) fn int3(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let next = cpu.next_rip(op);
    cpu.software_interrupt(op.imm as u8, next, Cause::Software)
}

/// INTO.
pub(crate) fn into(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    if cpu.cc & cc::OF == 0 {
        return Flow::Next;
    }
    let next = cpu.next_rip(op);
    cpu.software_interrupt(vector::OF, next, Cause::Software)
}

/// BOUND (not in 64-bit mode): register `op.dst` against the pair in memory.
pub(crate) fn bound(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    debug_assert!(op.aux & AUX_MEM != 0);
    let size = operand_size(op);
    let index = cpu.gpr[usize::from(op.dst)];
    let result = cpu.ea_checked(op, usize::from(size) * 2, false).and_then(|address| {
        if size == 2 {
            let low = cpu.read::<u16>(address)? as i16;
            let high = cpu.read::<u16>(address.wrapping_add(2))? as i16;
            Ok((low..=high).contains(&(index as i16)))
        } else {
            let low = cpu.read::<u32>(address)? as i32;
            let high = cpu.read::<u32>(address.wrapping_add(4))? as i32;
            Ok((low..=high).contains(&(index as i32)))
        }
    });
    match result {
        Ok(true) => Flow::Next,
        Ok(false) => cpu.raise(Fault::new(vector::BR)),
        Err(fault) => cpu.raise(fault),
    }
}

/// UD0, UD1, UD2, and instructions of features that are not offered.
pub(crate) fn undefined(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    cpu.raise(Fault::UD)
}
