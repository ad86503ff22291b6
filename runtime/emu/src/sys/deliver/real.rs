//! Delivery in real-address mode (SDM vol. 3, 21.1.4).

use super::Event;
use crate::cpu::{Cpu, seg};
use crate::fault::Fault;
use crate::flags::rflags;

impl Cpu {
    pub(super) fn enter_real(&mut self, event: Event) -> Result<(), Fault> {
        let offset = u32::from(event.vector) * 4;
        if offset + 3 > u32::from(self.sys.idtr.limit) {
            return Err(Fault::GP0);
        }
        let entry = self.read_sys::<u32>(self.sys.idtr.base.wrapping_add(offset.into()))?;
        let words =
            [event.rip as u16, self.seg[seg::CS].selector, (self.rflags() & !rflags::RF) as u16];
        let mut sp = self.gpr[4] as u16;
        for word in words.iter().rev() {
            sp = sp.wrapping_sub(2);
            let address = self.linear(seg::SS, sp.into(), 2, true)?;
            self.write_as::<u16>(0, address, *word)?;
        }
        self.gpr[4] = self.gpr[4] & !0xffff | u64::from(sp);
        self.set_real_cs((entry >> 16) as u16);
        self.rip = u64::from(entry & 0xffff);
        self.sysflags &= !(rflags::IF | rflags::TF | rflags::RF | rflags::AC);
        Ok(())
    }

    /// Loads CS as real mode does.
    pub(crate) fn set_real_cs(&mut self, selector: u16) {
        let cs = &mut self.seg[seg::CS];
        cs.selector = selector;
        cs.base = u64::from(selector) << 4;
    }
}
