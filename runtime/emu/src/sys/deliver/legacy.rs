//! Delivery in protected mode without IA-32e (SDM vol. 3, 6.12).

use super::{Cause, Event};
use crate::cpu::{Cpu, SegmentReg, seg};
use crate::fault::{Fault, vector};
use crate::mmu::segment_holds;
use crate::sys::descriptor::{Gate, access, system};
use crate::sys::segments::{gp, is_null, np, ss_fault, ts};
use crate::sys::task::{Resume, Way};

impl Cpu {
    pub(super) fn enter_legacy(&mut self, event: Event) -> Result<(), Fault> {
        let offset = u32::from(event.vector) * 8;
        if offset + 7 > u32::from(self.sys.idtr.limit) {
            return Err(Fault::gp(event.gate_code()));
        }
        let gate = Gate(self.read_sys::<u64>(self.sys.idtr.base.wrapping_add(offset.into()))?);
        let descriptor = gate.descriptor();
        let (size, interrupt) = match descriptor.kind() {
            system::INT16 => (2, true),
            system::TRAP16 => (2, false),
            system::INT => (4, true),
            system::TRAP => (4, false),
            system::TASK_GATE => (0, false),
            _ => return Err(Fault::gp(event.gate_code())),
        };
        if !descriptor.is_system() || event.cause == Cause::Software && descriptor.dpl() < self.cpl
        {
            return Err(Fault::gp(event.gate_code()));
        }
        if !descriptor.present() {
            return Err(Fault::with_code(vector::NP, event.gate_code()));
        }
        let selector = gate.selector();
        if size == 0 {
            let resume = Resume { rip: event.rip, flags: event.pushed_flags(self) };
            return self.switch_task(selector, Way::Nest, resume, event.code);
        }
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
        let rip = if size == 2 { gate.offset() & 0xffff } else { gate.offset() };
        if rip > code.limit().into() {
            return Err(Fault::GP0);
        }
        let cpl = if code.conforming() { self.cpl } else { code.dpl() };
        let from_8086 = self.virtual_8086();
        if from_8086 && cpl != 0 {
            return Err(gp(selector));
        }
        let (ss, sp, beyond) = if cpl == self.cpl {
            (self.seg[seg::SS], self.gpr[4] as u32, Fault::SS0)
        } else {
            let (sp, ss) = self.tss_stack(cpl)?;
            // Faults about the new stack segment are #TS.
            let segment = self.stack_segment(ss, cpl).map_err(|fault| match fault.vector() {
                vector::GP => ts(ss),
                _ => fault,
            })?;
            (segment, sp, ss_fault(ss))
        };
        let mut words = Vec::with_capacity(10);
        if from_8086 {
            words.extend(
                [seg::GS, seg::FS, seg::DS, seg::ES].map(|s| u32::from(self.seg[s].selector)),
            );
        }
        if cpl != self.cpl {
            words.push(u32::from(self.seg[seg::SS].selector));
            words.push(self.gpr[4] as u32);
        }
        words.push(event.pushed_flags(self) as u32);
        words.push(self.seg[seg::CS].selector.into());
        words.push(event.rip as u32);
        words.extend(event.code);
        let mask = if ss.access & access::DB != 0 { u32::MAX } else { 0xffff };
        let mut top = sp;
        for word in words {
            top = top.wrapping_sub(size) & mask | top & !mask;
            let offset = u64::from(top & mask);
            if !segment_holds(&ss, offset, size as usize, true, true) {
                return Err(beyond);
            }
            let address = ss.base.wrapping_add(offset) & 0xffff_ffff;
            if size == 2 {
                self.write_as::<u16>(cpl, address, word as u16)?;
            } else {
                self.write_as::<u32>(cpl, address, word)?;
            }
        }
        let cs = self.mark_accessed(selector, code)?.load(selector);
        self.seg[seg::SS] = ss;
        self.gpr[4] = self.gpr[4] & !u64::from(mask) & 0xffff_ffff | u64::from(top & mask);
        if from_8086 {
            for register in [seg::ES, seg::DS, seg::FS, seg::GS] {
                self.seg[register] =
                    SegmentReg { access: access::UNUSABLE, ..SegmentReg::default() };
            }
        }
        self.rip = rip;
        self.set_code_segment(cs, cpl);
        self.leave_gate_flags(interrupt);
        Ok(())
    }
}
