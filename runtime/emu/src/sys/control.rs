//! Control registers and the TLB instructions (SDM vol. 3, 2.5 and 4.10).

use mvm_engine::cpuid::CpuidTable;

use super::bits::{canonical, cr0, cr4, efer, xcr0};
use super::decode::AUX_MEM;
use super::descriptor::access;
use super::misc::serialize;
use crate::block::Block;
use crate::cpu::{Cpu, Mode, seg};
use crate::fault::Fault;
use crate::op::{Flow, Op};

/// Bit 63 of a value for CR3: keep the TLB.
const NO_FLUSH: u64 = 1 << 63;
/// The PCID in CR3.
pub(crate) const PCID: u64 = 0xfff;

/// The bits that a processor of `model` lets a guest set in CR4.
pub(crate) fn cr4_bits(model: &CpuidTable) -> u64 {
    const ALWAYS: u64 = cr4::TSD
        | cr4::DE
        | cr4::PSE
        | cr4::PAE
        | cr4::PGE
        | cr4::PCE
        | cr4::OSFXSR
        | cr4::OSXMMEXCPT;
    const BY_FEATURE: [(&str, u64); 6] = [
        ("umip", cr4::UMIP),
        ("fsgsbase", cr4::FSGSBASE),
        ("pcid", cr4::PCIDE),
        ("xsave", cr4::OSXSAVE),
        ("smep", cr4::SMEP),
        ("smap", cr4::SMAP),
    ];
    BY_FEATURE.iter().filter(|(name, _)| model.has(name)).fold(ALWAYS, |all, (_, bit)| all | bit)
}

/// MOV from control register `op.src`.
pub(crate) fn read(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    if cpu.cpl != 0 {
        return cpu.raise(Fault::GP0);
    }
    let value = match op.src {
        0 => cpu.sys.cr0,
        2 => cpu.sys.cr2,
        3 => cpu.sys.cr3,
        4 => cpu.sys.cr4,
        8 => cpu.sys.lapic.cr8(),
        _ => return cpu.raise(Fault::UD),
    };
    let mask = if cpu.mode == Mode::Code64 { u64::MAX } else { 0xffff_ffff };
    cpu.gpr[usize::from(op.dst)] = value & mask;
    Flow::Next
}

/// MOV to control register `op.dst`.
pub(crate) fn write(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    if cpu.cpl != 0 {
        return cpu.raise(Fault::GP0);
    }
    let mask = if cpu.mode == Mode::Code64 { u64::MAX } else { 0xffff_ffff };
    let value = cpu.gpr[usize::from(op.src)] & mask;
    if op.dst != 8 {
        serialize();
    }
    let result = match op.dst {
        0 => cpu.write_cr0(value),
        2 => {
            cpu.sys.cr2 = value;
            return Flow::Next;
        }
        3 => cpu.write_cr3(value),
        4 => cpu.write_cr4(value),
        8 if value > 0xf => Err(Fault::GP0),
        8 => {
            cpu.sys.lapic.set_cr8(value);
            Ok(())
        }
        _ => Err(Fault::UD),
    };
    finish(cpu, result)
}

fn finish(cpu: &mut Cpu, result: Result<(), Fault>) -> Flow {
    match result {
        Ok(()) => Flow::Break,
        Err(fault) => cpu.raise(fault),
    }
}

impl Cpu {
    /// Writes CR0, and EFER.LMA with it.
    ///
    /// # Errors
    /// #GP(0): a combination that SDM vol. 3, 2.5 forbids.
    pub(crate) fn write_cr0(&mut self, value: u64) -> Result<(), Fault> {
        if value >> 32 != 0
            || value & (cr0::PG | cr0::PE) == cr0::PG
            || value & (cr0::NW | cr0::CD) == cr0::NW
        {
            return Err(Fault::GP0);
        }
        let value = value & cr0::DEFINED | cr0::ET;
        let old = self.sys.cr0;
        let code_64 = self.seg[seg::CS].access & access::L != 0;
        if value & !old & cr0::PG != 0 {
            if self.sys.efer & efer::LME != 0 {
                if self.sys.cr4 & cr4::PAE == 0 || code_64 {
                    return Err(Fault::GP0);
                }
                self.sys.efer |= efer::LMA;
            }
        } else if old & !value & cr0::PG != 0 {
            if self.mode == Mode::Code64 || self.sys.cr4 & cr4::PCIDE != 0 {
                return Err(Fault::GP0);
            }
            self.sys.efer &= !efer::LMA;
        }
        self.sys.cr0 = value;
        if (old ^ value) & (cr0::PG | cr0::PE | cr0::WP) != 0 {
            self.tlb_flush_all();
        }
        if (old ^ value) & cr0::PE != 0 && value & cr0::PE != 0 {
            // The real-mode segment stays loaded; its privilege level counts from here on.
            self.cpl = 0;
        }
        self.update_mode();
        Ok(())
    }

    /// Writes CR3.
    ///
    /// # Errors
    /// #GP(0): reserved bits.
    pub(crate) fn write_cr3(&mut self, value: u64) -> Result<(), Fault> {
        let pcids = self.sys.cr4 & cr4::PCIDE != 0;
        let keep = pcids && value & NO_FLUSH != 0;
        let value = if pcids { value & !NO_FLUSH } else { value };
        if self.sys.long_mode() && value >> self.sys.platform.physical_bits != 0 {
            return Err(Fault::GP0);
        }
        self.sys.cr3 = value;
        if !pcids {
            self.tlb_flush_non_global();
        } else if !keep {
            self.tlb_flush_pcid((value & PCID) as u16);
        }
        self.tlb_set_context();
        Ok(())
    }

    /// The components that this model has.
    pub(crate) fn xcr0_allowed(&self) -> u64 {
        let avx = if self.sys.platform.model.has("avx") { xcr0::AVX } else { 0 };
        xcr0::X87 | xcr0::SSE | avx
    }

    /// Writes CR4.
    ///
    /// # Errors
    /// #GP(0): bits this model does not have, or a transition that SDM vol. 3, 2.5 forbids.
    pub(crate) fn write_cr4(&mut self, value: u64) -> Result<(), Fault> {
        if value & !self.sys.platform.cr4 != 0 {
            return Err(Fault::GP0);
        }
        let old = self.sys.cr4;
        if self.sys.long_mode() && value & cr4::PAE == 0 {
            return Err(Fault::GP0);
        }
        let pcids_on = value & !old & cr4::PCIDE != 0;
        if pcids_on && (!self.sys.long_mode() || self.sys.cr3 & PCID != 0) {
            return Err(Fault::GP0);
        }
        self.sys.cr4 = value;
        let paging = cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCIDE | cr4::SMEP | cr4::SMAP;
        if (old ^ value) & paging != 0 {
            self.tlb_flush_all();
        }
        self.update_mode();
        Ok(())
    }
}

/// CLTS.
pub(crate) fn clts(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    if cpu.cpl != 0 {
        return cpu.raise(Fault::GP0);
    }
    cpu.sys.cr0 &= !cr0::TS;
    cpu.update_mode();
    Flow::Break
}

/// LMSW: the low four bits of CR0, except that PE cannot be cleared.
pub(crate) fn lmsw(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    if cpu.cpl != 0 {
        return cpu.raise(Fault::GP0);
    }
    let value = match cpu.operand16(op) {
        Ok(value) => u64::from(value),
        Err(fault) => return cpu.raise(fault),
    };
    let low = cr0::PE | cr0::MP | cr0::EM | cr0::TS;
    let value = cpu.sys.cr0 & !(low & !cr0::PE) | value & low;
    let result = cpu.write_cr0(value);
    finish(cpu, result)
}

/// SMSW.
pub(crate) fn smsw(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let value = cpu.sys.cr0;
    cpu.store_system(op, value)
}

/// INVLPG.
pub(crate) fn invlpg(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    if cpu.cpl != 0 {
        return cpu.raise(Fault::GP0);
    }
    serialize();
    let address = cpu.ea(op);
    if canonical(address) {
        cpu.tlb_invlpg(address);
    }
    Flow::Break
}

/// INVPCID: `op.dst` is the type's register, the memory operand the descriptor.
pub(crate) fn invpcid(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    if !cpu.sys.platform.instructions.invpcid {
        return cpu.raise(Fault::UD);
    }
    if cpu.cpl != 0 {
        return cpu.raise(Fault::GP0);
    }
    serialize();
    let result = invalidate(cpu, op);
    finish(cpu, result)
}

fn invalidate(cpu: &mut Cpu, op: &Op) -> Result<(), Fault> {
    let mask = if cpu.mode == Mode::Code64 { u64::MAX } else { 0xffff_ffff };
    let kind = cpu.gpr[usize::from(op.dst)] & mask;
    let address = cpu.ea_checked(op, 16, false)?;
    let pcid = cpu.read::<u64>(address)?;
    let linear = cpu.read::<u64>(address.wrapping_add(8))?;
    let pcids = cpu.sys.cr4 & cr4::PCIDE != 0;
    if pcid > PCID || kind <= 1 && pcid != 0 && !pcids {
        return Err(Fault::GP0);
    }
    match kind {
        0 if !canonical(linear) => return Err(Fault::GP0),
        // For another PCID than the current one, dropping all of it is allowed too.
        0 if pcid == cpu.sys.cr3 & PCID => cpu.tlb_invlpg(linear),
        0 | 1 => cpu.tlb_flush_pcid(pcid as u16),
        2 => cpu.tlb_flush_all(),
        3 => cpu.tlb_flush_non_global(),
        _ => return Err(Fault::GP0),
    }
    Ok(())
}

/// INVD, WBINVD, WBNOINVD: caches are coherent here.
pub(crate) fn cache_control(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    if cpu.cpl != 0 {
        return cpu.raise(Fault::GP0);
    }
    serialize();
    Flow::Next
}

/// XGETBV.
pub(crate) fn xgetbv(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    if cpu.sys.cr4 & cr4::OSXSAVE == 0 {
        return cpu.raise(Fault::UD);
    }
    let value = match cpu.gpr[1] as u32 {
        0 => cpu.sys.xcr0,
        // XINUSE may say "in use" of what is in its initial state.
        1 if cpu.sys.platform.model.has("xgetbv1") => cpu.sys.xcr0,
        _ => return cpu.raise(Fault::GP0),
    };
    cpu.gpr[0] = value & 0xffff_ffff;
    cpu.gpr[2] = value >> 32;
    Flow::Next
}

/// XSETBV.
pub(crate) fn xsetbv(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    if cpu.sys.cr4 & cr4::OSXSAVE == 0 {
        return cpu.raise(Fault::UD);
    }
    let value = cpu.gpr[2] << 32 | cpu.gpr[0] & 0xffff_ffff;
    let allowed = cpu.xcr0_allowed();
    let avx_without_sse = value & (xcr0::AVX | xcr0::SSE) == xcr0::AVX;
    if cpu.cpl != 0
        || cpu.gpr[1] as u32 != 0
        || value & !allowed != 0
        || value & xcr0::X87 == 0
        || avx_without_sse
    {
        return cpu.raise(Fault::GP0);
    }
    cpu.sys.xcr0 = value;
    cpu.update_mode();
    Flow::Break
}

/// Whether UMIP forbids the store instructions at this privilege level.
pub(crate) fn umip_forbids(cpu: &Cpu) -> bool {
    cpu.cpl != 0 && cpu.sys.cr4 & cr4::UMIP != 0
}

impl Cpu {
    /// The 16-bit register or memory operand of `op`.
    pub(crate) fn operand16(&mut self, op: &Op) -> Result<u16, Fault> {
        if op.aux & AUX_MEM == 0 {
            return Ok(self.gpr[usize::from(op.src)] as u16);
        }
        let address = self.ea_checked(op, 2, false)?;
        self.read::<u16>(address)
    }

    /// Stores a system register the way SMSW, SLDT and STR do: 16 bits to memory, the operand size
    /// to a register.
    pub(crate) fn store_system(&mut self, op: &Op, value: u64) -> Flow {
        if umip_forbids(self) {
            return self.raise(Fault::GP0);
        }
        if op.aux & AUX_MEM != 0 {
            let written =
                self.ea_checked(op, 2, true).and_then(|a| self.write::<u16>(a, value as u16));
            return match written {
                Ok(wrote) => wrote.into(),
                Err(fault) => self.raise(fault),
            };
        }
        let register = &mut self.gpr[usize::from(op.dst)];
        *register = match super::decode::operand_size(op) {
            2 => *register & !0xffff | value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        };
        Flow::Next
    }
}
