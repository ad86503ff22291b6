//! Debug registers, breakpoints, single step (SDM vol. 3, chapter 18).

use mvm_engine::cpuid::Vendor;

use super::bits::{cr4, dr};
use super::misc::serialize;
use crate::block::Block;
use crate::cpu::{Cpu, Mode, seg};
use crate::fault::{Fault, vector};
use crate::flags::rflags;
use crate::op::{Flow, Op};

const DB: Fault = Fault::new(vector::DB);

/// What a breakpoint register watches (DR7.R/W).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Watch {
    Execute,
    Write,
    Io,
    Access,
}

/// A data access that hits a watchpoint is checked against one of these.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Breakpoint {
    pub index: usize,
    pub watch: Watch,
    pub address: u64,
    pub len: u64,
}

/// Number a debug register goes by: DR4 and DR5 are DR6 and DR7, unless CR4.DE is set.
fn register(cpu: &Cpu, number: u8) -> Result<u8, Fault> {
    match number {
        4 | 5 if cpu.sys.cr4 & cr4::DE != 0 => Err(Fault::UD),
        4 | 5 => Ok(number + 2),
        0..=7 => Ok(number),
        _ => Err(Fault::UD),
    }
}

/// The checks of every access to a debug register.
fn access(cpu: &mut Cpu, number: u8) -> Result<u8, Fault> {
    let number = register(cpu, number)?;
    if cpu.cpl != 0 {
        return Err(Fault::GP0);
    }
    if cpu.sys.dr7 & dr::DR7_GD != 0 {
        cpu.sys.dr6 |= dr::DR6_BD;
        return Err(DB);
    }
    Ok(number)
}

/// MOV from debug register `op.src`.
pub(crate) fn read(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let number = match access(cpu, op.src) {
        Ok(number) => number,
        Err(fault) => return cpu.raise(fault),
    };
    let value = match number {
        6 => cpu.sys.dr6,
        7 => cpu.sys.dr7,
        n => cpu.sys.dr[usize::from(n & 3)],
    };
    let mask = if cpu.mode == Mode::Code64 { u64::MAX } else { 0xffff_ffff };
    cpu.gpr[usize::from(op.dst)] = value & mask;
    Flow::Next
}

/// MOV to debug register `op.dst`.
pub(crate) fn write(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let number = match access(cpu, op.dst) {
        Ok(number) => number,
        Err(fault) => return cpu.raise(fault),
    };
    let mask = if cpu.mode == Mode::Code64 { u64::MAX } else { 0xffff_ffff };
    let value = cpu.gpr[usize::from(op.src)] & mask;
    serialize();
    match number {
        6 | 7 if value >> 32 != 0 => return cpu.raise(Fault::GP0),
        6 => cpu.sys.dr6 = value & 0xe00f | dr::DR6_FIXED,
        7 => cpu.sys.dr7 = value & dr::DR7_DEFINED | dr::DR7_FIXED,
        n => cpu.sys.dr[usize::from(n & 3)] = value,
    }
    if number != 6 {
        // Pages with a watchpoint lose their fast path, others may get it back.
        cpu.tlb_flush_all();
    }
    Flow::Break
}

/// INT1. A debug exception that was held off until after it becomes one with its own.
pub(crate) fn int1(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let next = cpu.next_rip(op);
    let held = std::mem::take(&mut cpu.sys.hits);
    if held != 0 {
        cpu.sys.dr6 = cpu.sys.dr6 & !dr::DR6_B | held;
    }
    // Handlers of debug exceptions may use the debug registers (SDM vol. 3, 18.2.4).
    cpu.sys.dr7 &= !dr::DR7_GD;
    cpu.software_interrupt(vector::DB, next, super::deliver::Cause::Trap)
}

impl Cpu {
    /// The armed breakpoints.
    pub(crate) fn breakpoints(&self) -> impl Iterator<Item = Breakpoint> + '_ {
        let dr7 = self.sys.dr7;
        (0..4).filter(move |i| dr7 >> (i * 2) & 3 != 0).map(move |index| {
            let control = dr7 >> (16 + index * 4);
            let len = match control >> 2 & 3 {
                0 => 1,
                1 => 2,
                2 => 8,
                _ => 4,
            };
            let watch = match control & 3 {
                0 => Watch::Execute,
                1 => Watch::Write,
                2 => Watch::Io,
                _ => Watch::Access,
            };
            Breakpoint { index, watch, address: self.sys.dr[index] & !(len - 1), len }
        })
    }

    /// Must the block loop run one instruction at a time?
    #[inline(always)]
    pub fn stepping(&self) -> bool {
        self.sysflags & rflags::TF != 0 || self.sys.dr7 & dr::DR7_ENABLES != 0
    }

    /// Before an instruction while [`Cpu::stepping`]: is there a breakpoint on it? RF holds it off
    /// once, and so do Intel's processors after a load of SS (SDM vol. 3, 6.8.3).
    pub fn before_step(&mut self) -> Option<Fault> {
        self.sys.step_inhibited = false;
        let after_ss = std::mem::take(&mut self.sys.ss_loaded) && self.shadow;
        if self.sysflags & rflags::RF != 0 || self.sys.dr7 & dr::DR7_ENABLES == 0 {
            return None;
        }
        if after_ss && self.sys.vendor == Vendor::Intel {
            return None;
        }
        let rip = match self.mode {
            Mode::Code64 => self.rip,
            _ => self.seg[seg::CS].base.wrapping_add(self.rip) & 0xffff_ffff,
        };
        let hits: u64 = self
            .breakpoints()
            .filter(|b| b.watch == Watch::Execute && b.address == rip)
            .map(|b| 1 << b.index)
            .sum();
        if hits == 0 {
            return None;
        }
        self.sys.dr6 = self.sys.dr6 & !dr::DR6_B | hits;
        Some(DB)
    }

    /// After an instruction that ended without a fault, while stepping: the trap to deliver, if
    /// there is one. `flags` is [`Cpu::sysflags`] from before the instruction.
    pub fn after_step(&mut self, flags: u64, restored_flags: bool) -> Option<Fault> {
        if !restored_flags {
            self.sysflags &= !rflags::RF;
        }
        let inhibited = std::mem::take(&mut self.sys.step_inhibited);
        if flags & rflags::TF != 0 && !inhibited {
            self.sys.hits |= dr::DR6_BS;
        }
        // A watchpoint that a load of SS hits is told after the next instruction (SDM vol. 3, 6.8.3). If that one
        // interrupts by INT n, it is the first thing in the handler.
        if self.sys.ss_loaded { None } else { self.take_trap() }
    }

    /// The trap for what waits in [`SystemState::hits`](super::SystemState), if there is anything.
    pub fn take_trap(&mut self) -> Option<Fault> {
        let status = std::mem::take(&mut self.sys.hits);
        if status == 0 {
            return None;
        }
        self.sys.dr6 = self.sys.dr6 & !dr::DR6_B | status;
        Some(DB)
    }

    /// Does the page of `linear` hold a data watchpoint? Such pages have no fast path.
    #[cold]
    pub fn page_is_watched(&self, linear: u64) -> bool {
        self.breakpoints().any(|b| {
            matches!(b.watch, Watch::Write | Watch::Access)
                && (b.address >> 12 == linear >> 12
                    || b.address.wrapping_add(b.len - 1) >> 12 == linear >> 12)
        })
    }

    /// Notes the watchpoints that a data access hits; the trap comes after the instruction.
    #[cold]
    pub fn note_access(&mut self, linear: u64, len: u64, write: bool) {
        let end = linear.wrapping_add(len);
        let hits: u64 = self
            .breakpoints()
            .filter(|b| {
                let kind = b.watch == Watch::Access || write && b.watch == Watch::Write;
                kind && linear < b.address.wrapping_add(b.len) && b.address < end
            })
            .map(|b| 1 << b.index)
            .sum();
        self.sys.hits |= hits;
    }

    /// Notes the I/O breakpoints that an access to `port` hits (CR4.DE).
    pub(crate) fn note_port(&mut self, port: u16, len: u64) {
        if self.sys.dr7 & dr::DR7_ENABLES == 0 || self.sys.cr4 & cr4::DE == 0 {
            return;
        }
        let (port, end) = (u64::from(port), u64::from(port) + len);
        let hits: u64 = self
            .breakpoints()
            .filter(|b| {
                let above = b.address.saturating_add(b.len);
                b.watch == Watch::Io && port < above && b.address < end
            })
            .map(|b| 1 << b.index)
            .sum();
        self.sys.hits |= hits;
    }
}
