//! The vCPU's state in engine-neutral form, both ways.

use mvm_engine::{
    ClockState, DebugRegisters, Error, GeneralRegisters, LapicState, PendingEvents, Result,
    Segment, SystemRegisters, VcpuState, msr,
};

use super::attention::reason;
use super::bits::{cr0, dr};
use super::clock::Origin;
use super::paravirt;
use crate::apic::NMIS_MAX;
use crate::cpu::{Cpu, SegmentReg};
use crate::flags::rflags;

impl From<SegmentReg> for Segment {
    fn from(s: SegmentReg) -> Self {
        Self { selector: s.selector, base: s.base, limit: s.limit, access: s.access }
    }
}

impl From<Segment> for SegmentReg {
    fn from(s: Segment) -> Self {
        Self { selector: s.selector, base: s.base, limit: s.limit, access: s.access }
    }
}

impl Cpu {
    /// The architectural state, between two instructions. `xsave` is the XSAVE area.
    pub fn export_state(&mut self, xsave: Vec<u8>) -> VcpuState {
        self.settle();
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&self.gpr[..16]);
        let sys = &self.sys;
        let sregs = SystemRegisters {
            segments: std::array::from_fn(|i| self.seg[i].into()),
            ldtr: sys.ldtr.into(),
            tr: sys.tr.into(),
            gdtr: sys.gdtr,
            idtr: sys.idtr,
            cr0: sys.cr0,
            cr2: sys.cr2,
            cr3: sys.cr3,
            cr4: sys.cr4,
            cr8: sys.lapic.cr8(),
            efer: sys.efer,
        };
        let debug = DebugRegisters { address: sys.dr, dr6: sys.dr6, dr7: sys.dr7 };
        let events = PendingEvents {
            exception: self.fault.or(sys.deferred).map(|f| (f.vector(), f.code())),
            shadow: self.shadow,
            nmis_pending: sys.nmis_pending,
            nmi_masked: sys.nmi_masked,
            sipi: None,
            external: sys.external,
            unhalted: sys.pv.unhalted,
        };
        VcpuState {
            regs: GeneralRegisters { gpr, rip: self.rip, rflags: self.rflags() },
            sregs,
            debug,
            xsave,
            xcr0: sys.xcr0,
            lapic: sys.lapic.export(),
            events,
            mp_state: sys.activity,
            clock: paravirt::clock_state(self),
            model: sys.platform.cpu,
            cpuid: sys.cpuid.to_vec(),
            msrs: self.export_msrs(),
        }
    }

    fn export_msrs(&mut self) -> Vec<(u32, u64)> {
        msr::STATE.iter().filter_map(|&m| Some((m, self.read_msr(m).ok()?))).collect()
    }

    /// Takes over `state`, its XSAVE area excepted.
    ///
    /// # Errors
    /// [`Error::BadState`], with the vCPU unchanged: the state belongs to a processor that this
    /// engine does not model, or contradicts itself.
    pub fn import_state(&mut self, state: &VcpuState) -> Result<()> {
        self.check_state(state)?;
        self.leave_stop();
        let regs = &state.regs;
        self.gpr[..16].copy_from_slice(&regs.gpr);
        self.rip = regs.rip;
        self.set_rflags(regs.rflags);
        self.shadow = state.events.shadow;
        self.sys.deferred = None;
        // Where a page fault that waits tells its address from.
        self.fault_address = state.sregs.cr2;
        self.fault = state.events.exception.map(|(vector, code)| match code {
            Some(code) => crate::fault::Fault::with_code(vector, code),
            None => crate::fault::Fault::new(vector),
        });
        for (segment, new) in self.seg.iter_mut().zip(&state.sregs.segments) {
            *segment = (*new).into();
        }
        let sregs = &state.sregs;
        let sys = &mut self.sys;
        sys.ldtr = sregs.ldtr.into();
        sys.tr = sregs.tr.into();
        sys.gdtr = sregs.gdtr;
        sys.idtr = sregs.idtr;
        sys.cr0 = sregs.cr0 | cr0::ET;
        sys.cr2 = sregs.cr2;
        sys.cr3 = sregs.cr3;
        sys.cr4 = sregs.cr4;
        sys.efer = sregs.efer;
        sys.xcr0 = state.xcr0 | 1;
        sys.dr = state.debug.address;
        sys.dr6 = state.debug.dr6 & 0xe00f | dr::DR6_FIXED;
        sys.dr7 = state.debug.dr7 & dr::DR7_DEFINED | dr::DR7_FIXED;
        if !state.cpuid.is_empty() {
            sys.cpuid = state.cpuid.as_slice().into();
        }
        sys.nmis_pending = state.events.nmis_pending.min(NMIS_MAX);
        sys.nmi_masked = state.events.nmi_masked;
        sys.external = state.events.external;
        sys.pv.unhalted = state.events.unhalted;
        sys.activity = state.mp_state;
        let clock = state.clock.now();
        if sys.index == 0 && clock.kvmclock_ns != 0 {
            // One clock for all: the first vCPU brings it.
            let origin = Origin { tsc: clock.host_tsc, nanos: clock.kvmclock_ns };
            sys.platform.clock.set_origin(origin);
        }
        self.cpl = match sregs.cr0 & cr0::PE {
            0 => 0,
            _ => (sregs.segments[crate::cpu::seg::SS].access >> 5 & 3) as u8,
        };
        self.import_msrs(&state.msrs, &clock);
        self.sys.lapic.import(&state.lapic, self.sys.tsc_offset);
        self.sys.lapic.set_cr8(sregs.cr8);
        if let Some(vector) = state.events.sipi {
            self.sys.lapic.port().start_up(vector);
        }
        self.tlb_flush_all();
        self.update_mode();
        // Whatever is pending is looked at before the first block.
        self.sys.attention().raise_self(reason::INTERRUPT);
        Ok(())
    }

    fn import_msrs(&mut self, msrs: &[(u32, u64)], clock: &ClockState) {
        if clock.tsc != 0 {
            // Before the records that tell of it.
            self.sys.move_tsc(clock.tsc.wrapping_sub(clock.host_tsc));
        }
        for &(index, value) in msrs {
            let taken = match index {
                // Writing it would move the counter.
                msr::TSC_ADJUST => {
                    self.sys.msrs.tsc_adjust = value;
                    Ok(())
                }
                // The record is in RAM already, and what it tells has not changed.
                msr::WALL_CLOCK => {
                    self.sys.pv.wall_clock = value;
                    Ok(())
                }
                _ => self.write_msr(index, value),
            };
            if taken.is_err() && self.sys.may_log() {
                let msr = msr::describe(index);
                tracing::warn!(vcpu = self.sys.index, "MSR {msr} cannot become {value:#x} here");
            }
        }
    }

    fn check_state(&self, state: &VcpuState) -> Result<()> {
        let bad = |reason: String| Err(Error::BadState { vcpu: self.sys.index, reason });
        let sregs = &state.sregs;
        if sregs.cr0 & (cr0::PG | cr0::PE) == cr0::PG {
            return bad(format!("CR0 {:#x}: paging without protection", sregs.cr0));
        }
        if sregs.efer & !(super::bits::efer::WRITABLE | super::bits::efer::LMA) != 0 {
            return bad(format!("EFER {:#x}: bits that this model does not have", sregs.efer));
        }
        let protected = sregs.cr0 & cr0::PE != 0 && sregs.efer & super::bits::efer::LMA == 0;
        if state.regs.rflags & rflags::VM != 0 && !protected {
            return bad("virtual-8086 mode, which is a mode of protected mode alone".into());
        }
        if state.xcr0 & !self.xcr0_allowed() != 0 {
            return bad(format!(
                "XCR0 {:#x}: components that this model does not have",
                state.xcr0
            ));
        }
        if let Some(reason) = state.contradiction() {
            return bad(reason.into());
        }
        if state.lapic.regs.len() > 64 {
            return bad(format!("{} local APIC registers", state.lapic.regs.len()));
        }
        if !state.model.is_portable() {
            return bad(
                "it was taken with --cpu host and can only go on with the kvm engine".into()
            );
        }
        match mvm_engine::cpuid::incompatible(&self.sys.cpuid, &state.cpuid) {
            Some(reason) => bad(reason),
            None => Ok(()),
        }
    }
}

impl crate::apic::Lapic {
    /// The state in engine-neutral form.
    pub fn export(&self) -> LapicState {
        LapicState {
            base: self.base(),
            regs: self.export_registers(),
            tsc_deadline: self.tsc_deadline(),
        }
    }
}
