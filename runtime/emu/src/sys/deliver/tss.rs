//! What is read from the task-state segment: stacks (SDM vol. 3, 7.2 and 7.7).

use crate::cpu::Cpu;
use crate::fault::Fault;
use crate::sys::bits::canonical;
use crate::sys::descriptor::{access, system};
use crate::sys::segments::ts;

impl Cpu {
    /// A stack pointer of the 64-bit TSS: of privilege level `cpl`, or of IST entry `ist` (1 to 7).
    ///
    /// # Errors
    /// #TS(TR) if the TSS is too short, #SS(0) if the pointer is not canonical.
    pub(crate) fn tss64_stack(&mut self, cpl: u8, ist: u8) -> Result<u64, Fault> {
        let offset: u32 = if ist == 0 { 4 + u32::from(cpl) * 8 } else { 28 + u32::from(ist) * 8 };
        let tr = self.sys.tr;
        if offset + 7 > tr.limit || tr.access & access::UNUSABLE != 0 {
            return Err(ts(tr.selector));
        }
        let pointer = self.read_sys::<u64>(tr.base.wrapping_add(offset.into()))?;
        if canonical(pointer) { Ok(pointer) } else { Err(Fault::SS0) }
    }

    /// Stack pointer and segment of privilege level `cpl` from a 16- or 32-bit TSS.
    ///
    /// # Errors
    /// #TS(TR) if the TSS is too short.
    pub(crate) fn tss_stack(&mut self, cpl: u8) -> Result<(u32, u16), Fault> {
        let tr = self.sys.tr;
        let level = u32::from(cpl);
        if tr.access & 0xf & !2 == system::TSS {
            let offset = 4 + level * 8;
            if offset + 5 > tr.limit {
                return Err(ts(tr.selector));
            }
            let base = tr.base.wrapping_add(offset.into());
            Ok((self.read_sys::<u32>(base)?, self.read_sys::<u16>(base.wrapping_add(4))?))
        } else {
            let offset = 2 + level * 4;
            if offset + 3 > tr.limit {
                return Err(ts(tr.selector));
            }
            let base = tr.base.wrapping_add(offset.into());
            Ok((self.read_sys::<u16>(base)?.into(), self.read_sys::<u16>(base.wrapping_add(2))?))
        }
    }

    /// Whether the I/O permission bitmap lets the current task access `size` bytes from `port`
    /// (SDM vol. 1, 19.5.2).
    ///
    /// # Errors
    /// What reading the TSS raises.
    pub(crate) fn io_bitmap_allows(&mut self, port: u16, size: u32) -> Result<bool, Fault> {
        let tr = self.sys.tr;
        let usable = tr.access & access::UNUSABLE == 0 && tr.access & 0xf & !2 == system::TSS;
        if !usable || tr.limit < 0x67 {
            return Ok(false);
        }
        let map = u32::from(self.read_sys::<u16>(tr.base.wrapping_add(0x66))?);
        let offset = map + u32::from(port >> 3);
        // Two bytes are read always: an access may touch two.
        if offset + 1 > tr.limit {
            return Ok(false);
        }
        let bits = self.read_sys::<u16>(tr.base.wrapping_add(offset.into()))?;
        let mask = ((1u32 << size) - 1) << (port & 7);
        Ok(u32::from(bits) & mask == 0)
    }
}
