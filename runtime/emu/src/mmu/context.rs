//! Control of the TLB: what CR writes, INVLPG and mode changes do to it.

use super::tlb::{Access, Who};
use super::walk::{Paging, walk};
use crate::cpu::Cpu;
use crate::flags::rflags;

/// Bits of the control registers that matter here.
mod bit {
    pub const CR0_WP: u64 = 1 << 16;
    pub const CR0_AM: u64 = 1 << 18;
    pub const CR0_PG: u64 = 1 << 31;
    pub const CR4_PSE: u64 = 1 << 4;
    pub const CR4_PAE: u64 = 1 << 5;
    pub const CR4_PGE: u64 = 1 << 7;
    pub const CR4_PCIDE: u64 = 1 << 17;
    pub const CR4_SMEP: u64 = 1 << 20;
    pub const CR4_SMAP: u64 = 1 << 21;
    pub const EFER_LMA: u64 = 1 << 10;
    pub const EFER_NXE: u64 = 1 << 11;
}

impl Cpu {
    /// Drops all translations, global ones included.
    pub fn tlb_flush_all(&mut self) {
        self.mmu.tlb.flush_all();
        self.mmu.code_page = (1, 0);
    }

    /// Drops all translations but global ones, in every address space.
    pub fn tlb_flush_non_global(&mut self) {
        self.mmu.tlb.flush_non_global();
        self.mmu.code_page = (1, 0);
    }

    /// Drops the translations of the page of `linear`.
    pub fn tlb_invlpg(&mut self, linear: u64) {
        self.mmu.tlb.flush_page(linear);
        self.mmu.code_page = (1, 0);
        if self.jit.jumps_to_page(linear) {
            self.forget_jumps();
        }
    }

    /// All jumps between pages of translated code are to be found anew.
    pub(crate) fn forget_jumps(&mut self) {
        self.mmu.tlb.forget_jumps();
        self.jit.forget_pages();
    }

    /// Drops the translations of one PCID but global ones.
    pub fn tlb_flush_pcid(&mut self, pcid: u16) {
        self.mmu.tlb.flush_pcid(pcid);
        self.mmu.code_page = (1, 0);
    }

    /// To be called after any change of CR0, CR3, CR4, EFER, CPL or EFLAGS.AC: from now on, memory
    /// is seen as these say. Drops translations if a change of CR0, CR4 or EFER makes them wrong; what
    /// a CR3 write drops is the caller's business.
    pub fn tlb_set_context(&mut self) {
        let (cr0, cr3, cr4, efer) = (self.sys.cr0, self.sys.cr3, self.sys.cr4, self.sys.efer);
        let control = [cr0, cr3, cr4, efer];
        if self.mmu.control == control {
            self.tlb_set_privilege();
            return;
        }
        self.mmu.control = control;
        let paging = Paging {
            enabled: cr0 & bit::CR0_PG != 0,
            pae: cr4 & bit::CR4_PAE != 0,
            long: efer & bit::EFER_LMA != 0,
            pse: cr4 & bit::CR4_PSE != 0,
            wp: cr0 & bit::CR0_WP != 0,
            nxe: efer & bit::EFER_NXE != 0,
            smep: cr4 & bit::CR4_SMEP != 0,
            smap: cr4 & bit::CR4_SMAP != 0,
            pge: cr4 & bit::CR4_PGE != 0,
            cr3,
        };
        let before = Paging { cr3, ..self.mmu.paging };
        self.mmu.paging = paging;
        if before != paging {
            self.mmu.tlb.flush_all();
        }
        let pcid = if cr4 & bit::CR4_PCIDE != 0 { (cr3 & 0xfff) as u16 } else { 0 };
        self.mmu.tlb.set_space(pcid);
        self.tlb_set_privilege();
    }

    /// The part of [`Cpu::tlb_set_context`] that a change of CPL or EFLAGS.AC alone needs.
    #[inline]
    pub fn tlb_set_privilege(&mut self) {
        let ac = self.sysflags & rflags::AC != 0;
        let who = match self.cpl {
            3 if ac && self.sys.cr0 & bit::CR0_AM != 0 => Who::UserAligned,
            3 => Who::User,
            _ if ac && self.mmu.paging.smap => Who::SupervisorAc,
            _ => Who::Supervisor,
        };
        self.mmu.tlb.select(who);
        self.mmu.code_page = (1, 0);
    }

    /// The guest physical address of `linear` as a debugger would find it: any right will do.
    pub fn translate_debug(&self, linear: u64) -> Option<u64> {
        let paging = Paging { smap: false, smep: false, ..self.mmu.paging };
        walk(&self.mmu.phys, &paging, linear, Access::Read, Who::SupervisorAc).ok().map(|p| p.gpa)
    }

    /// Copies out of guest RAM by physical address. False if part of the range is not RAM.
    pub fn phys_read(&self, gpa: u64, to: &mut [u8]) -> bool {
        self.mmu.phys.read(gpa, to)
    }

    /// Copies into guest RAM by physical address. False if part of the range is not RAM.
    pub fn phys_write(&self, gpa: u64, from: &[u8]) -> bool {
        self.mmu.phys.write(gpa, from)
    }
}
