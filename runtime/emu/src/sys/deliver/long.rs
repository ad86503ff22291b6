//! Delivery in IA-32e mode (SDM vol. 3, 6.14).

use super::{Cause, Event};
use crate::cpu::{Cpu, SegmentReg, seg};
use crate::fault::{Fault, vector};
use crate::flags::rflags;
use crate::sys::bits::canonical;
use crate::sys::descriptor::{Gate, access, system};
use crate::sys::segments::{gp, is_null, np, null_stack};

impl Cpu {
    pub(super) fn enter_long(&mut self, event: Event) -> Result<(), Fault> {
        let offset = u32::from(event.vector) * 16;
        if offset + 15 > u32::from(self.sys.idtr.limit) {
            return Err(Fault::gp(event.gate_code()));
        }
        let address = self.sys.idtr.base.wrapping_add(offset.into());
        let gate = Gate(self.read_sys::<u64>(address)?);
        let high = self.read_sys::<u64>(address.wrapping_add(8))?;
        let descriptor = gate.descriptor();
        if !descriptor.is_system() || !matches!(descriptor.kind(), system::INT | system::TRAP) {
            return Err(Fault::gp(event.gate_code()));
        }
        if event.cause == Cause::Software && descriptor.dpl() < self.cpl {
            return Err(Fault::gp(event.gate_code()));
        }
        if !descriptor.present() {
            return Err(Fault::with_code(vector::NP, event.gate_code()));
        }
        let (cs, cpl) = self.gate_target64(gate.selector())?;
        let rip = gate.offset() | high << 32;
        if !canonical(rip) {
            return Err(Fault::GP0);
        }
        let rsp = if cpl != self.cpl || gate.ist() != 0 {
            self.tss64_stack(cpl, gate.ist())?
        } else {
            self.gpr[4]
        };
        let frame = [
            event.rip,
            self.seg[seg::CS].selector.into(),
            event.pushed_flags(self),
            self.gpr[4],
            self.seg[seg::SS].selector.into(),
        ];
        let mut top = rsp & !0xf;
        for word in frame.iter().rev() {
            top = top.wrapping_sub(8);
            self.write_stack(cpl, top, *word)?;
        }
        if let Some(code) = event.code {
            top = top.wrapping_sub(8);
            self.write_stack(cpl, top, code.into())?;
        }
        if cpl != self.cpl {
            self.seg[seg::SS] = null_stack(cpl);
        }
        self.gpr[4] = top;
        self.rip = rip;
        self.set_code_segment(cs, cpl);
        self.leave_gate_flags(descriptor.kind() == system::INT);
        Ok(())
    }

    /// The 64-bit code segment behind a gate and the privilege level it runs at.
    pub(crate) fn gate_target64(&mut self, selector: u16) -> Result<(SegmentReg, u8), Fault> {
        if is_null(selector) {
            return Err(Fault::GP0);
        }
        let code = self.descriptor(selector)?;
        if !code.is_code() || code.dpl() > self.cpl {
            return Err(gp(selector));
        }
        if !code.present() {
            return Err(np(selector));
        }
        if code.access() & (access::L | access::DB) != access::L {
            return Err(gp(selector));
        }
        let cpl = if code.conforming() { self.cpl } else { code.dpl() };
        Ok((self.mark_accessed(selector, code)?.load(selector), cpl))
    }

    /// Pushes a word of a frame: an address beyond the canonical ones is a stack fault.
    fn write_stack(&mut self, cpl: u8, address: u64, word: u64) -> Result<(), Fault> {
        if !canonical(address) {
            return Err(Fault::SS0);
        }
        self.write_as::<u64>(cpl, address, word).map(drop)
    }

    /// Flags inside a handler.
    pub(super) fn leave_gate_flags(&mut self, interrupt_gate: bool) {
        let mut clear = rflags::TF | rflags::NT | rflags::RF | rflags::VM;
        if interrupt_gate {
            clear |= rflags::IF;
        }
        self.sysflags &= !clear;
    }
}
