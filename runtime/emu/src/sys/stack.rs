//! The stack, for instructions that move several words and may fault in between: nothing is
//! committed until [`Stack::commit`].

use super::bits::canonical;
use super::descriptor::access;
use crate::cpu::{Cpu, Mode, SegmentReg, seg};
use crate::fault::Fault;
use crate::mmu::{Wrote, segment_holds};

/// A working copy of a stack pointer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stack {
    segment: SegmentReg,
    pointer: u64,
    mask: u64,
    cpl: u8,
    real: bool,
    /// What a word beyond the segment's limit is.
    beyond: Fault,
}

impl Stack {
    /// The current stack.
    pub fn of(cpu: &Cpu) -> Self {
        Self::at(cpu.mode, &cpu.seg[seg::SS], cpu.gpr[4], cpu.cpl)
    }

    /// A stack in segment `ss` at `pointer`, used at privilege level `cpl` by code of `mode`.
    pub fn at(mode: Mode, ss: &SegmentReg, pointer: u64, cpl: u8) -> Self {
        let mask = match mode {
            Mode::Code64 => u64::MAX,
            _ if ss.access & access::DB != 0 && mode != Mode::Real => 0xffff_ffff,
            _ => 0xffff,
        };
        Self { segment: *ss, pointer, mask, cpl, real: mode == Mode::Real, beyond: Fault::SS0 }
    }

    /// The same stack, of an inner level whose segment an instruction is about to load: words beyond its limit are
    /// `fault`.
    pub fn or(self, fault: Fault) -> Self {
        Self { beyond: fault, ..self }
    }

    fn linear(&self, size: u8, write: bool) -> Result<u64, Fault> {
        let offset = self.pointer & self.mask;
        if self.mask == u64::MAX {
            return if canonical(offset) { Ok(offset) } else { Err(self.beyond) };
        }
        if !segment_holds(&self.segment, offset, size.into(), write, !self.real) {
            return Err(self.beyond);
        }
        Ok(self.segment.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// Moves the pointer by `bytes`.
    pub fn skip(&mut self, bytes: u64) {
        let moved = self.pointer.wrapping_add(bytes);
        self.pointer = moved & self.mask | self.pointer & !self.mask;
    }

    /// Pops `size` (2, 4 or 8) bytes.
    pub fn pop(&mut self, cpu: &mut Cpu, size: u8) -> Result<u64, Fault> {
        let address = self.linear(size, false)?;
        let value = match size {
            2 => cpu.read::<u16>(address)?.into(),
            4 => cpu.read::<u32>(address)?.into(),
            _ => cpu.read::<u64>(address)?,
        };
        self.skip(size.into());
        Ok(value)
    }

    /// Pushes the low `size` bytes of `value`.
    pub fn push(&mut self, cpu: &mut Cpu, size: u8, value: u64) -> Result<Wrote, Fault> {
        self.skip(0u64.wrapping_sub(size.into()));
        let address = self.linear(size, true)?;
        match size {
            2 => cpu.write_as::<u16>(self.cpl, address, value as u16),
            4 => cpu.write_as::<u32>(self.cpl, address, value as u32),
            _ => cpu.write_as::<u64>(self.cpl, address, value),
        }
    }

    /// Makes the pointer the processor's.
    pub fn commit(self, cpu: &mut Cpu) {
        cpu.gpr[4] = match self.mask {
            0xffff_ffff => self.pointer & 0xffff_ffff,
            _ => self.pointer,
        };
    }
}
