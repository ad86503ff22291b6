//! Loading segment registers (SDM vol. 3, chapter 5), privilege level and mode.

use super::bits::efer;
use super::descriptor::{Descriptor, access, system};
use crate::cpu::{Cpu, Mode, SegmentReg, seg};
use crate::fault::{Fault, vector};

/// What a selector picks, without its privilege bits: the error code of faults about it.
#[inline]
pub(crate) const fn code_of(selector: u16) -> u32 {
    (selector & 0xfffc) as u32
}

/// A null selector?
#[inline]
pub(crate) const fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

pub(crate) const fn gp(selector: u16) -> Fault {
    Fault::gp(code_of(selector))
}

pub(crate) const fn np(selector: u16) -> Fault {
    Fault::with_code(vector::NP, code_of(selector))
}

pub(crate) const fn ss_fault(selector: u16) -> Fault {
    Fault::with_code(vector::SS, code_of(selector))
}

pub(crate) const fn ts(selector: u16) -> Fault {
    Fault::with_code(vector::TS, code_of(selector))
}

impl Cpu {
    /// Recomputes what depends on CR0, EFER, CS and SS: mode, privilege level, and what memory and
    /// vector accesses check.
    pub(crate) fn update_mode(&mut self) {
        let cs = self.seg[seg::CS].access;
        self.mode = if !self.sys.protected() || self.virtual_8086() {
            Mode::Real
        } else if self.sys.long_mode() && cs & access::L != 0 {
            Mode::Code64
        } else if cs & access::DB != 0 {
            Mode::Code32
        } else {
            Mode::Code16
        };
        if self.mode == Mode::Real {
            self.cpl = if self.virtual_8086() { 3 } else { 0 };
        }
        self.tlb_set_context();
        self.vec.update_access(self.sys.cr0, self.sys.cr4, self.sys.xcr0);
    }

    /// Sets CS and the privilege level together, as every control transfer between segments does.
    pub(crate) fn set_code_segment(&mut self, cs: SegmentReg, cpl: u8) {
        self.seg[seg::CS] = SegmentReg { selector: cs.selector & !3 | u16::from(cpl), ..cs };
        self.cpl = cpl;
        let mode = if self.sys.long_mode() && cs.access & access::L != 0 {
            Mode::Code64
        } else if cs.access & access::DB != 0 {
            Mode::Code32
        } else {
            Mode::Code16
        };
        self.mode = mode;
        self.tlb_set_context();
    }

    /// Linear address of the descriptor that `selector` picks, if its table reaches that far.
    pub(crate) fn descriptor_address(&self, selector: u16) -> Option<u64> {
        let (base, limit) = if selector & 4 == 0 {
            (self.sys.gdtr.base, u32::from(self.sys.gdtr.limit))
        } else {
            let ldtr = &self.sys.ldtr;
            if ldtr.access & access::UNUSABLE != 0 || is_null(ldtr.selector) {
                return None;
            }
            (ldtr.base, ldtr.limit)
        };
        let offset = u32::from(selector & !7);
        (offset + 7 <= limit).then(|| base.wrapping_add(offset.into()))
    }

    /// The descriptor that `selector` picks.
    ///
    /// # Errors
    /// #GP(selector) beyond the table; what reading the table raises.
    pub(crate) fn descriptor(&mut self, selector: u16) -> Result<Descriptor, Fault> {
        let address = self.descriptor_address(selector).ok_or(gp(selector))?;
        Ok(Descriptor(self.read_sys::<u64>(address)?))
    }

    /// The upper half of a 16-byte system descriptor.
    ///
    /// # Errors
    /// As [`Cpu::descriptor`].
    pub(crate) fn descriptor_high(&mut self, selector: u16) -> Result<u64, Fault> {
        let address = self.descriptor_address(selector.wrapping_add(8)).ok_or(gp(selector))?;
        self.read_sys::<u64>(address)
    }

    /// Sets the accessed bit of a code or data descriptor in its table.
    pub(crate) fn mark_accessed(
        &mut self,
        selector: u16,
        descriptor: Descriptor,
    ) -> Result<Descriptor, Fault> {
        const ACCESSED: u64 = 1 << 40;
        if descriptor.0 & ACCESSED != 0 {
            return Ok(descriptor);
        }
        if let Some(address) = self.descriptor_address(selector) {
            // One byte: the access rights, as the processor's locked update would.
            self.write_sys::<u8>(address.wrapping_add(5), ((descriptor.0 | ACCESSED) >> 40) as u8)?;
        }
        Ok(Descriptor(descriptor.0 | ACCESSED))
    }

    /// MOV, POP or LxS to a segment register other than CS.
    ///
    /// # Errors
    /// #GP, #SS or #NP as the descriptor asks; what reading the table raises.
    pub(crate) fn load_segment(&mut self, register: usize, selector: u16) -> Result<(), Fault> {
        if self.mode == Mode::Real {
            let segment = &mut self.seg[register];
            segment.selector = selector;
            segment.base = u64::from(selector) << 4;
            // Limit and rights stay ("unreal" mode), but a null segment becomes usable again.
            if segment.access & access::UNUSABLE != 0 {
                segment.access = access::REAL_DATA;
                segment.limit = 0xffff;
            }
            return Ok(());
        }
        self.seg[register] = match (register, is_null(selector)) {
            (seg::SS, _) => self.stack_segment(selector, self.cpl)?,
            (_, true) => SegmentReg { selector, access: access::UNUSABLE, base: 0, limit: 0 },
            (_, false) => self.data_segment(selector)?,
        };
        Ok(())
    }

    fn data_segment(&mut self, selector: u16) -> Result<SegmentReg, Fault> {
        let descriptor = self.descriptor(selector)?;
        if !descriptor.is_readable() {
            return Err(gp(selector));
        }
        let dpl = descriptor.dpl();
        if !descriptor.conforming() && (selector as u8 & 3).max(self.cpl) > dpl {
            return Err(gp(selector));
        }
        if !descriptor.present() {
            return Err(np(selector));
        }
        Ok(self.mark_accessed(selector, descriptor)?.load(selector))
    }

    /// The stack segment `selector` for privilege level `cpl`.
    ///
    /// # Errors
    /// #GP(selector), #SS(selector); what reading the table raises.
    pub(crate) fn stack_segment(&mut self, selector: u16, cpl: u8) -> Result<SegmentReg, Fault> {
        let rpl = selector as u8 & 3;
        if is_null(selector) {
            if self.mode == Mode::Code64 && cpl < 3 && rpl == cpl {
                return Ok(null_stack(cpl));
            }
            return Err(Fault::GP0);
        }
        let descriptor = self.descriptor(selector)?;
        if rpl != cpl || !descriptor.is_writable_data() || descriptor.dpl() != cpl {
            return Err(gp(selector));
        }
        if !descriptor.present() {
            return Err(ss_fault(selector));
        }
        Ok(self.mark_accessed(selector, descriptor)?.load(selector))
    }

    /// Loads the segments of virtual-8086 mode, by their numbers (SDM vol. 3, 21.2.2 and 27.3.1.2 for their rights).
    pub(crate) fn load_8086_segments(&mut self, selectors: [u16; 6]) {
        for (segment, selector) in self.seg.iter_mut().zip(selectors) {
            let base = u64::from(selector) << 4;
            *segment = SegmentReg { selector, access: access::DATA_8086, base, limit: 0xffff };
        }
    }

    /// Is there the part of protected mode that virtual-8086 mode has not: descriptors?
    pub(crate) fn has_descriptors(&self) -> bool {
        self.sys.protected() && !self.virtual_8086()
    }

    /// After a return to an outer level: data segments of a higher privilege are dropped. Their bases stay, which
    /// 64-bit code sees in FS and GS.
    pub(crate) fn drop_privileged_segments(&mut self) {
        let cpl = self.cpl;
        for register in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let segment = &mut self.seg[register];
            let rights = segment.access;
            let dpl = (rights >> access::DPL_SHIFT & 3) as u8;
            let conforming_code = rights & (access::CODE | access::DC) == access::CODE | access::DC;
            if rights & access::UNUSABLE == 0 && dpl < cpl && !conforming_code {
                segment.selector = 0;
                segment.access = access::UNUSABLE;
            }
        }
    }

    /// LLDT.
    ///
    /// # Errors
    /// #GP(selector), #NP(selector); what reading the table raises.
    pub(crate) fn load_ldtr(&mut self, selector: u16) -> Result<(), Fault> {
        if is_null(selector) {
            self.sys.ldtr = SegmentReg { selector, access: access::UNUSABLE, base: 0, limit: 0 };
            return Ok(());
        }
        let (descriptor, high) = self.system_descriptor(selector)?;
        if !descriptor.is_system() || descriptor.kind() != system::LDT {
            return Err(gp(selector));
        }
        if !descriptor.present() {
            return Err(np(selector));
        }
        let mut ldtr = descriptor.load(selector);
        ldtr.base |= high << 32;
        self.sys.ldtr = ldtr;
        Ok(())
    }

    /// LTR: loads the task register and marks the TSS busy.
    ///
    /// # Errors
    /// #GP(selector), #NP(selector); what reading the table raises.
    pub(crate) fn load_tr(&mut self, selector: u16) -> Result<(), Fault> {
        if is_null(selector) {
            return Err(Fault::GP0);
        }
        let (descriptor, high) = self.system_descriptor(selector)?;
        let available = match descriptor.kind() {
            system::TSS => true,
            system::TSS16 => !self.sys.long_mode(),
            _ => false,
        };
        if !descriptor.is_system() || !available {
            return Err(gp(selector));
        }
        if !descriptor.present() {
            return Err(np(selector));
        }
        let busy = Descriptor(descriptor.0 | system::BUSY);
        if let Some(address) = self.descriptor_address(selector) {
            self.write_sys::<u8>(address.wrapping_add(5), (busy.0 >> 40) as u8)?;
        }
        let mut tr = busy.load(selector);
        tr.base |= high << 32;
        self.sys.tr = tr;
        Ok(())
    }

    /// A system descriptor of the GDT with the upper half of its base, which exists in IA-32e mode.
    fn system_descriptor(&mut self, selector: u16) -> Result<(Descriptor, u64), Fault> {
        if selector & 4 != 0 {
            return Err(gp(selector));
        }
        let descriptor = self.descriptor(selector)?;
        if self.sys.efer & efer::LMA == 0 {
            return Ok((descriptor, 0));
        }
        let high = self.descriptor_high(selector)?;
        let base = descriptor.base() | high << 32;
        if high >> 40 & 0x1f != 0 || !super::bits::canonical(base) {
            return Err(gp(selector));
        }
        Ok((descriptor, high & 0xffff_ffff))
    }
}

/// The stack segment of 64-bit code that has none.
pub(crate) const fn null_stack(cpl: u8) -> SegmentReg {
    SegmentReg {
        selector: cpl as u16,
        access: access::UNUSABLE | access::DB | (cpl as u32) << access::DPL_SHIFT,
        base: 0,
        limit: 0,
    }
}
