//! Model-specific registers.
//!
//! An MSR that is not here raises #GP, with a log line: systems probe for MSRs that way.

use mvm_engine::cpuid::Vendor;
use mvm_engine::msr as index;

use super::bits::{canonical, cr4, efer};
use super::clock::host_tsc;
use super::misc::serialize;
use super::paravirt;
use crate::block::Block;
use crate::cpu::{Cpu, seg};
use crate::fault::Fault;
use crate::op::{Flow, Op};

/// LFENCE waits for what is before it: the bit of AMD's DE_CFG that says so.
const DE_CFG_LFENCE_SERIALIZES: u64 = 1 << 1;

/// The TSC counts at the frequency of P0: TscFreqSel in AMD's HWCR (PPR for family 19h). Linux takes
/// its absence for a mistake of the firmware's.
const HWCR_TSC_AT_P0: u64 = 1 << 24;

/// RDMSR.
pub(crate) fn rdmsr(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    if cpu.cpl != 0 {
        return cpu.raise(Fault::GP0);
    }
    let msr = cpu.gpr[1] as u32;
    match cpu.read_msr(msr) {
        Ok(value) => {
            cpu.gpr[0] = value & 0xffff_ffff;
            cpu.gpr[2] = value >> 32;
            Flow::Next
        }
        Err(fault) => {
            if cpu.sys.may_log() {
                let rip = cpu.gpr[usize::from(crate::op::reg::BLOCK)];
                let msr = index::describe(msr);
                tracing::info!(vcpu = cpu.sys.index, "guest reads MSR {msr} near {rip:#x}: #GP");
            }
            cpu.raise(fault)
        }
    }
}

/// WRMSR.
pub(crate) fn wrmsr(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    if cpu.cpl != 0 {
        return cpu.raise(Fault::GP0);
    }
    let msr = cpu.gpr[1] as u32;
    let value = cpu.gpr[2] << 32 | cpu.gpr[0] & 0xffff_ffff;
    // Those of the x2APIC are no fence (SDM vol. 3, 11.12.3).
    if !(0x800..0x900).contains(&msr) {
        serialize();
    }
    match cpu.write_msr(msr, value) {
        Ok(()) => Flow::Break,
        Err(fault) => {
            if cpu.sys.may_log() {
                let rip = cpu.gpr[usize::from(crate::op::reg::BLOCK)];
                let msr = index::describe(msr);
                tracing::info!(
                    vcpu = cpu.sys.index,
                    "guest writes {value:#x} to MSR {msr} near {rip:#x}: #GP"
                );
            }
            cpu.raise(fault)
        }
    }
}

impl Cpu {
    /// The value of MSR `msr`.
    ///
    /// # Errors
    /// #GP(0): there is none.
    pub fn read_msr(&mut self, msr: u32) -> Result<u64, Fault> {
        let sys = &self.sys;
        let msrs = &sys.msrs;
        Ok(match msr {
            index::TSC => sys.tsc(),
            index::APIC_BASE => sys.lapic.base(),
            index::TSC_ADJUST => msrs.tsc_adjust,
            index::BIOS_SIGN_ID => msrs.bios_sign,
            index::PLATFORM_ID | index::MTRR_CAP | index::MCG_CAP | index::MCG_STATUS => 0,
            index::DEBUG_CTL | index::AMD_SYSCFG | index::AMD_INT_PENDING => 0,
            // There is no northbridge. Kernels with support for one switch a bit of its on each processor.
            index::AMD_NB_CFG => 0,
            index::AMD_HWCR => HWCR_TSC_AT_P0,
            // All of AMD's processors have four counters. These count nothing.
            index::AMD_PERF_FIRST..=index::AMD_PERF_LAST if sys.vendor == Vendor::Amd => 0,
            index::AMD_DE_CFG => DE_CFG_LFENCE_SERIALIZES,
            index::SYSENTER_CS => msrs.sysenter_cs,
            index::SYSENTER_ESP => msrs.sysenter_esp,
            index::SYSENTER_EIP => msrs.sysenter_eip,
            index::MISC_ENABLE => msrs.misc_enable,
            index::PAT => msrs.pat,
            index::TSC_DEADLINE => sys.lapic.tsc_deadline(),
            index::X2APIC_FIRST..=index::X2APIC_LAST => return sys.lapic.read_msr(msr),
            index::EFER => sys.efer,
            index::STAR => msrs.star,
            index::LSTAR => msrs.lstar,
            index::CSTAR => msrs.cstar,
            index::FMASK => msrs.fmask,
            index::FS_BASE => self.seg[seg::FS].base,
            index::GS_BASE => self.seg[seg::GS].base,
            index::KERNEL_GS_BASE => msrs.kernel_gs_base,
            index::TSC_AUX => msrs.tsc_aux,
            _ => return paravirt::read_msr(self, msr),
        })
    }

    /// Writes MSR `msr`.
    ///
    /// # Errors
    /// #GP(0): there is none, or it does not take this value.
    pub fn write_msr(&mut self, msr: u32, value: u64) -> Result<(), Fault> {
        let low = value & 0xffff_ffff;
        let address = || if canonical(value) { Ok(value) } else { Err(Fault::GP0) };
        let sys = &mut self.sys;
        match msr {
            index::TSC => self.write_tsc(value),
            index::APIC_BASE if value >> sys.platform.physical_bits != 0 => return Err(Fault::GP0),
            index::APIC_BASE => sys.lapic.set_base(value).ok_or(Fault::GP0)?,
            index::TSC_ADJUST => self.write_tsc_adjust(value),
            index::BIOS_SIGN_ID => sys.msrs.bios_sign = value,
            index::SYSENTER_CS => sys.msrs.sysenter_cs = low,
            index::SYSENTER_ESP => sys.msrs.sysenter_esp = address()?,
            index::SYSENTER_EIP => sys.msrs.sysenter_eip = address()?,
            // Nothing there is implemented: remembered, for software that reads back.
            index::MISC_ENABLE => sys.msrs.misc_enable = value,
            // Last-branch records and branch traps do not exist; asking for none is fine.
            index::DEBUG_CTL if value == 0 => {}
            index::MCG_STATUS | index::AMD_HWCR | index::AMD_SYSCFG => {}
            index::AMD_INT_PENDING | index::AMD_DE_CFG | index::AMD_NB_CFG => {}
            index::AMD_PERF_FIRST..=index::AMD_PERF_LAST if sys.vendor == Vendor::Amd => {}
            index::PAT => {
                sys.msrs.pat = valid_pat(value).then_some(value).ok_or(Fault::GP0)?;
            }
            index::TSC_DEADLINE => sys.lapic.set_tsc_deadline(value, sys.tsc_offset),
            index::X2APIC_FIRST..=index::X2APIC_LAST => return sys.lapic.write_msr(msr, value),
            index::EFER => return self.write_efer(value),
            index::STAR => sys.msrs.star = value,
            index::LSTAR => sys.msrs.lstar = address()?,
            index::CSTAR => sys.msrs.cstar = address()?,
            index::FMASK => sys.msrs.fmask = low,
            index::FS_BASE => self.seg[seg::FS].base = address()?,
            index::GS_BASE => self.seg[seg::GS].base = address()?,
            index::KERNEL_GS_BASE => sys.msrs.kernel_gs_base = address()?,
            index::TSC_AUX if value >> 32 == 0 => sys.msrs.tsc_aux = value,
            _ => return paravirt::write_msr(self, msr, value),
        }
        Ok(())
    }

    /// A write to the TSC moves TSC_ADJUST with it (SDM vol. 3, 18.17.3).
    fn write_tsc(&mut self, value: u64) {
        let before = self.sys.tsc_offset;
        let offset = value.wrapping_sub(host_tsc());
        self.sys.msrs.tsc_adjust =
            self.sys.msrs.tsc_adjust.wrapping_add(offset.wrapping_sub(before));
        self.sys.move_tsc(offset);
    }

    fn write_tsc_adjust(&mut self, value: u64) {
        let delta = value.wrapping_sub(self.sys.msrs.tsc_adjust);
        self.sys.msrs.tsc_adjust = value;
        self.sys.move_tsc(self.sys.tsc_offset.wrapping_add(delta));
    }

    fn write_efer(&mut self, value: u64) -> Result<(), Fault> {
        let old = self.sys.efer;
        // LMA is read-only, and ignored as such.
        if value & !(efer::WRITABLE | efer::LMA) != 0 {
            return Err(Fault::GP0);
        }
        if self.sys.paging() && (old ^ value) & efer::LME != 0 {
            return Err(Fault::GP0);
        }
        self.sys.efer = value & efer::WRITABLE | old & efer::LMA;
        if (old ^ value) & efer::NXE != 0 {
            self.tlb_flush_all();
        }
        self.update_mode();
        Ok(())
    }
}

/// Eight memory types, each of 0, 1, 4, 5, 6 or 7 (SDM vol. 3, 12.12.2).
fn valid_pat(value: u64) -> bool {
    value.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7))
}

/// RDTSC.
pub(crate) fn rdtsc(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    if cpu.sys.cr4 & cr4::TSD != 0 && cpu.cpl != 0 {
        return cpu.raise(Fault::GP0);
    }
    let tsc = cpu.sys.tsc();
    cpu.gpr[0] = tsc & 0xffff_ffff;
    cpu.gpr[2] = tsc >> 32;
    Flow::Next
}

/// RDTSCP.
pub(crate) fn rdtscp(cpu: &mut Cpu, op: &Op, block: &Block) -> Flow {
    let flow = rdtsc(cpu, op, block);
    if flow == Flow::Next {
        cpu.gpr[1] = cpu.sys.msrs.tsc_aux & 0xffff_ffff;
    }
    flow
}

/// RDPID.
pub(crate) fn rdpid(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    if !cpu.sys.platform.instructions.rdpid {
        return cpu.raise(Fault::UD);
    }
    cpu.gpr[usize::from(op.dst)] = cpu.sys.msrs.tsc_aux;
    Flow::Next
}

/// RDPMC: there are no counters.
pub(crate) fn rdpmc(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    cpu.raise(Fault::GP0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_types_of_the_pat() {
        assert!(valid_pat(0x0007_0406_0007_0406));
        assert!(!valid_pat(0x0000_0000_0000_0002));
        assert!(!valid_pat(0x0800_0000_0000_0000));
    }
}
