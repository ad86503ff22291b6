//! General register access by the numbers in ops.
//!
//! Register operands of 8 bits are numbered `register * 8 + high`: the byte's offset in the file, so
//! that AH to BH are no case of their own. All other widths use the plain register number.

use crate::cpu::Cpu;
use crate::int::Int;
use crate::op::reg;

/// The number of an 8-bit register operand.
pub const fn byte_reg(register: u8, high: bool) -> u8 {
    register * 8 + high as u8
}

impl Cpu {
    /// Register `index` in full.
    #[inline(always)]
    pub fn reg(&self, index: u8) -> u64 {
        debug_assert!((index as usize) < reg::COUNT);
        // SAFETY: ops are made by the decoders of this crate alone, with register numbers from
        // iced-x86's sixteen and the two constants beyond them: below COUNT.
        unsafe { *self.gpr.get_unchecked(index as usize) }
    }

    /// Sets register `index` in full.
    #[inline(always)]
    pub fn set_reg(&mut self, index: u8, value: u64) {
        debug_assert!((index as usize) < reg::COUNT);
        // SAFETY: as in `reg`.
        unsafe { *self.gpr.get_unchecked_mut(index as usize) = value }
    }

    /// The operand of width `T` with number `index`.
    #[inline(always)]
    pub fn get<T: Int>(&self, index: u8) -> T {
        if T::SIZE == 1 {
            T::truncate(self.reg(index >> 3) >> ((index & 7) * 8))
        } else {
            T::truncate(self.reg(index))
        }
    }

    /// Writes the operand of width `T` with number `index`: 32 bits clear the upper half, 8 and 16
    /// leave the rest (SDM vol. 1, 3.4.1.1).
    #[inline(always)]
    pub fn set<T: Int>(&mut self, index: u8, value: T) {
        match T::SIZE {
            1 => {
                let shift = (index & 7) * 8;
                let old = self.reg(index >> 3);
                self.set_reg(index >> 3, old & !(0xff << shift) | value.zext() << shift);
            }
            2 => self.set_reg(index, self.reg(index) & !0xffff | value.zext()),
            _ => self.set_reg(index, value.zext()),
        }
    }
}
