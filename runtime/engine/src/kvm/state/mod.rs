//! The architectural state of a vCPU, to and from KVM.
//!
//! KVM's structures depend on one another: what is set must be set in the order of [`Access::set`]. Only
//! when KVM_RUN has returned for the last time is a state whole, with nothing left half done.

mod clock;
mod cpuid;
mod events;
mod lapic;
mod msrs;
mod regs;
mod xsave;

use std::io;

use kvm_bindings::{kvm_lapic_state, kvm_mp_state, kvm_xcrs};
use kvm_ioctls::{VcpuFd, VmFd};

use clock::Clocks;
pub(super) use cpuid::{supported, to_kvm};
pub(super) use msrs::KnownMsrs;

use super::kick::Reach;
use super::sys::{self, XsaveSize};
use crate::cpuid::CpuModel;
use crate::{CpuidEntry, Error, LapicState, Result, VcpuState};

/// By how much the frequencies of two time-stamp counters may differ and be taken for the same: 250 parts in a
/// million, which is what KVM itself tolerates.
const TSC_TOLERANCE_PPM: u64 = 250;

/// What reading and writing a vCPU's state needs.
#[derive(Debug)]
pub(super) struct Access<'a> {
    pub vm: &'a VmFd,
    pub vcpu: &'a mut VcpuFd,
    pub reach: &'a Reach,
    pub index: u32,
    pub model: CpuModel,
    pub tsc_khz: u64,
    pub xsave: XsaveSize,
    pub known: &'a KnownMsrs,
    /// What the guest sees.
    pub cpuid: &'a mut Vec<CpuidEntry>,
}

/// An error of KVM while `what` was done.
fn failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |e| Error::Host { what, source: e.into() }
}

fn no_memory() -> Error {
    Error::Host { what: "room for a list", source: io::ErrorKind::OutOfMemory.into() }
}

impl Access<'_> {
    /// The state.
    pub fn get(&mut self) -> Result<VcpuState> {
        let (lapic, base) = self.settled_lapic()?;
        let vcpu = &*self.vcpu;
        // First, since asking for it makes a pending INIT or start-up IPI take effect.
        let mp_state = vcpu.get_mp_state().map_err(failed("read a vCPU's activity"))?.mp_state;
        let events = vcpu.get_vcpu_events().map_err(failed("read pending events"))?;
        let (mut events, accepted) = events::events_from(&events, mp_state);
        let mut lapic = lapic::registers_from(&lapic, base);
        match accepted {
            Some(vector) if lapic::in_service(&lapic, vector) => {
                lapic::unaccept(&mut lapic, vector);
            }
            external => events.external = external,
        }
        let sregs = vcpu.get_sregs().map_err(failed("read system registers"))?;
        let area = self.xsave.get(vcpu).map_err(failed("read the vector registers"))?;
        Ok(VcpuState {
            regs: regs::general_from(&vcpu.get_regs().map_err(failed("read registers"))?),
            sregs: regs::system_from(&sregs),
            debug: regs::debug_from(
                &vcpu.get_debug_regs().map_err(failed("read debug registers"))?,
            ),
            xsave: xsave::area_from(area),
            xcr0: xcr0(&vcpu.get_xcrs().map_err(failed("read XCR0"))?),
            msrs: self.known.export(vcpu)?,
            lapic: LapicState { base, regs: lapic, tsc_deadline: msrs::tsc_deadline(vcpu)? },
            events,
            mp_state: events::mp_state_from(mp_state),
            clock: self.clocks().get()?,
            model: self.model,
            cpuid: self.cpuid.clone(),
        })
    }

    /// The local APIC's page with everything in it, and its base.
    fn settled_lapic(&mut self) -> Result<(kvm_lapic_state, u64)> {
        let read = |vcpu: &VcpuFd| vcpu.get_lapic().map_err(failed("read the local APIC"));
        let base = self.vcpu.get_sregs().map_err(failed("read system registers"))?.apic_base;
        let mut page = read(self.vcpu)?;
        // Once more if the timer ran down after the first time.
        for _ in 0..2 {
            if !lapic::counts(&lapic::registers_from(&page, base)) {
                break;
            }
            let settled = self.reach.held_back(|| sys::settle(self.vcpu));
            settled.map_err(|source| Error::Host { what: "settle a vCPU", source })?;
            page = read(self.vcpu)?;
            if !lapic::has_run_down(&lapic::registers_from(&page, base)) {
                break;
            }
        }
        Ok((page, base))
    }

    /// Takes over `state`.
    ///
    /// # Errors
    /// The vCPU has then a part of it: the caller puts the former state back.
    pub fn set(&mut self, state: &VcpuState) -> Result<()> {
        self.check(state)?;
        self.set_cpuid(&state.cpuid)?;
        let vcpu = &*self.vcpu;
        let index = self.index;
        // The base decides how the local APIC's page is read.
        let sregs = regs::system_to(&state.sregs, state.lapic.base);
        vcpu.set_sregs(&sregs).map_err(|e| self.refused("system registers", e))?;
        vcpu.set_regs(&regs::general_to(&state.regs)).map_err(|e| self.refused("registers", e))?;
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() };
        xcrs.xcrs[0].value = state.xcr0 | 1;
        vcpu.set_xcrs(&xcrs).map_err(|e| self.refused("XCR0", e))?;
        if !state.xsave.is_empty() {
            self.xsave.set(vcpu, &state.xsave).map_err(|e| self.refused("vector registers", e))?;
        }
        vcpu.set_debug_regs(&regs::debug_to(&state.debug))
            .map_err(|e| self.refused("debug registers", e))?;
        self.clocks().set(&state.clock)?;
        for (msr, value) in msrs::write(vcpu, &state.msrs)? {
            let msr = crate::msr::describe(msr);
            tracing::warn!(vcpu = index, "this host's KVM does not take {value:#x} for MSR {msr}");
        }
        if !state.lapic.regs.is_empty() {
            let page = lapic::registers_to(&state.lapic.regs, index);
            vcpu.set_lapic(&page).map_err(|e| self.refused("local APIC", e))?;
            // Now that the timer has its mode, and the counter its value.
            msrs::set_tsc_deadline(vcpu, state.lapic.tsc_deadline)?;
        }
        let mp_state = events::mp_state_to(state.mp_state, state.events.sipi);
        vcpu.set_mp_state(kvm_mp_state { mp_state }).map_err(|e| self.refused("activity", e))?;
        // Last: registers that are set take exceptions away.
        let events = events::events_to(&state.events, state.regs.rflags);
        vcpu.set_vcpu_events(&events).map_err(|e| self.refused("pending events", e))
    }

    fn refused(&self, part: &str, error: kvm_ioctls::Error) -> Error {
        self.bad(format!("KVM does not take the {part}: {error}"))
    }

    fn bad(&self, reason: String) -> Error {
        Error::BadState { vcpu: self.index, reason }
    }

    fn check(&self, state: &VcpuState) -> Result<()> {
        if !state.model.is_portable() && self.model.is_portable() {
            return Err(self.bad(
                "it was taken with --cpu host and can only go on in a machine with the same".into(),
            ));
        }
        if let Some(reason) = crate::cpuid::incompatible(self.cpuid, &state.cpuid) {
            return Err(self.bad(reason));
        }
        if let Some(reason) = state.contradiction() {
            return Err(self.bad(reason.into()));
        }
        if state.lapic.regs.len() > lapic::COUNT {
            return Err(self.bad(format!("{} local APIC registers", state.lapic.regs.len())));
        }
        let khz = state.clock.tsc_khz;
        if khz != 0 && khz.abs_diff(self.tsc_khz) > self.tsc_khz / 1_000_000 * TSC_TOLERANCE_PPM {
            // Guests know the frequency from then on, by CPUID and by measuring.
            return Err(self.bad(format!(
                "its time-stamp counter has {khz} kHz, this host's {}",
                self.tsc_khz
            )));
        }
        match xsave::check(&state.xsave, self.xsave.bytes()) {
            Err(reason) if !state.xsave.is_empty() => Err(self.bad(reason)),
            _ => Ok(()),
        }
    }

    fn set_cpuid(&mut self, entries: &[CpuidEntry]) -> Result<()> {
        if entries.is_empty() || entries == self.cpuid.as_slice() {
            return Ok(());
        }
        let list =
            to_kvm(entries).ok_or_else(|| self.bad(format!("{} CPUID leaves", entries.len())))?;
        // A vCPU that has run keeps the processor that it is.
        self.vcpu.set_cpuid2(&list).map_err(|e| self.refused("CPUID leaves", e))?;
        *self.cpuid = entries.to_vec();
        Ok(())
    }

    fn clocks(&self) -> Clocks<'_> {
        Clocks { vm: self.vm, vcpu: self.vcpu, index: self.index, tsc_khz: self.tsc_khz }
    }
}

fn xcr0(xcrs: &kvm_xcrs) -> u64 {
    let used = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize);
    used.filter(|x| x.xcr == 0).map(|x| x.value).next().unwrap_or(1)
}
