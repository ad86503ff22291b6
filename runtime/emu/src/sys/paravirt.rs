//! What the engine offers as a hypervisor, in KVM's interface (signature "KVMKVMKVM"): clocks,
//! steal time, lazy TLB flushes of sleeping vCPUs, and hypercalls.
//!
//! Layouts and numbers are those of Linux' `Documentation/virt/kvm/x86`.

use mvm_engine::msr;

use super::attention::reason;
use super::clock::host_tsc;
use crate::apic::{Delivery, Message, Target};
use crate::block::Block;
use crate::cpu::{Cpu, Mode};
use crate::fault::Fault;
use crate::int::Int;
use crate::op::{Flow, Op};

/// Hypercall numbers and results.
mod call {
    pub const KICK_CPU: u64 = 5;
    pub const SEND_IPI: u64 = 10;
    pub const EINVAL: u64 = (-22i64) as u64;
    pub const ENOSYS: u64 = (-1000i64) as u64;
    pub const EPERM: u64 = (-1i64) as u64;
}

/// Lowest bit of a clock or steal-time MSR: in use.
const ENABLED: u64 = 1;
/// Bits of a steal-time MSR that must be zero.
const STEAL_RESERVED: u64 = 0x3e;
/// `preempted` in the steal-time record: the vCPU does not run.
const PREEMPTED: u8 = 1;
/// `preempted`: flush the TLB before it runs again.
const FLUSH_TLB: u8 = 2;

/// What the guest registered.
#[derive(Debug, Clone, Copy, Default)]
pub struct Paravirt {
    /// MSR of the wall clock.
    pub wall_clock: u64,
    /// MSR of the system time.
    pub system_time: u64,
    /// MSR of the steal time.
    pub steal_time: u64,
    /// A kick that the next HLT consumes.
    pub unhalted: bool,
    /// Since when steal time is counted: real time and the thread's own, in ns.
    since: Option<(u64, u64)>,
}

/// RDMSR of a paravirtual MSR.
pub(crate) fn read_msr(cpu: &mut Cpu, index: u32) -> Result<u64, Fault> {
    match index {
        msr::WALL_CLOCK | msr::WALL_CLOCK_OLD => Ok(cpu.sys.pv.wall_clock),
        msr::SYSTEM_TIME | msr::SYSTEM_TIME_OLD => Ok(cpu.sys.pv.system_time),
        msr::STEAL_TIME => Ok(cpu.sys.pv.steal_time),
        _ => Err(Fault::GP0),
    }
}

/// WRMSR of a paravirtual MSR.
pub(crate) fn write_msr(cpu: &mut Cpu, index: u32, value: u64) -> Result<(), Fault> {
    match index {
        msr::WALL_CLOCK | msr::WALL_CLOCK_OLD => {
            cpu.sys.pv.wall_clock = value;
            cpu.write_wall_clock(value);
        }
        msr::SYSTEM_TIME | msr::SYSTEM_TIME_OLD => {
            cpu.sys.pv.system_time = value;
            cpu.write_system_time();
        }
        msr::STEAL_TIME if value & STEAL_RESERVED == 0 => {
            cpu.sys.pv.steal_time = value;
            cpu.sys.pv.since = None;
            cpu.update_steal_time();
        }
        _ => return Err(Fault::GP0),
    }
    Ok(())
}

impl Cpu {
    /// `struct pvclock_wall_clock`: version, seconds, nanoseconds of the machine's start.
    fn write_wall_clock(&mut self, gpa: u64) {
        if gpa == 0 {
            return;
        }
        let version = self.next_version(gpa);
        let (seconds, nanos) = self.sys.platform.clock.boot_wall_clock();
        // Written last: an even version makes the record valid.
        let written = self.phys_put(gpa, version)
            && self.phys_put(gpa.wrapping_add(4), seconds)
            && self.phys_put(gpa.wrapping_add(8), nanos)
            && self.phys_put(gpa, version.wrapping_add(1));
        if !written {
            self.log_odd("wall clock outside RAM");
        }
    }

    /// `struct pvclock_vcpu_time_info`. With a TSC of constant rate it is written once, and again
    /// when a state was restored.
    pub(crate) fn write_system_time(&mut self) {
        let value = self.sys.pv.system_time;
        if value & ENABLED == 0 {
            return;
        }
        let gpa = value & !ENABLED;
        let clock = &self.sys.platform.clock;
        let (origin, scale) = (clock.origin(), clock.scale());
        // Before the origin nothing is defined; a guest TSC that was set back is shown as is.
        let timestamp = origin.tsc.wrapping_add(self.sys.tsc_offset);
        let stable = u8::from(clock.invariant());
        let version = self.next_version(gpa);
        let tail = u32::from_le_bytes([scale.shift.to_le_bytes()[0], stable, 0, 0]);
        let written = self.phys_put(gpa, version)
            && self.phys_put(gpa.wrapping_add(4), 0u32)
            && self.phys_put(gpa.wrapping_add(8), timestamp)
            && self.phys_put(gpa.wrapping_add(16), origin.nanos)
            && self.phys_put(gpa.wrapping_add(24), scale.mul)
            && self.phys_put(gpa.wrapping_add(28), tail)
            && self.phys_put(gpa, version.wrapping_add(1));
        if !written {
            self.log_odd("system time record outside RAM");
        }
    }

    /// Address of the steal-time record, if one is registered.
    fn steal_record(&self) -> Option<u64> {
        let value = self.sys.pv.steal_time;
        (value & ENABLED != 0).then_some(value & !0x3f)
    }

    /// `struct kvm_steal_time`: steal u64, version u32, flags u32, preempted u8. Adds what the
    /// host gave to others since the last time, while this vCPU wanted to run.
    pub(crate) fn update_steal_time(&mut self) {
        let Some(gpa) = self.steal_record() else { return };
        let (real, own) = (thread_time::real(), thread_time::own());
        // Added to what the record says, which may come from another engine.
        let mut bytes = [0; 8];
        let known = self.phys_read(gpa, &mut bytes);
        let mut stolen = if known { u64::from_le_bytes(bytes) } else { 0 };
        if let Some((real_then, own_then)) = self.sys.pv.since.replace((real, own)) {
            let wanted = real.saturating_sub(real_then);
            let more = wanted.saturating_sub(own.saturating_sub(own_then));
            stolen = stolen.wrapping_add(more);
        }
        let version = self.next_version(gpa.wrapping_add(8));
        let written = self.phys_put(gpa.wrapping_add(8), version)
            && self.phys_put(gpa, stolen)
            && self.phys_put(gpa.wrapping_add(8), version.wrapping_add(1));
        if !written {
            self.log_odd("steal time record outside RAM");
        }
    }

    /// The vCPU's thread is about to sleep: other vCPUs may leave it their TLB flushes.
    pub(crate) fn mark_preempted(&mut self) {
        let Some(gpa) = self.steal_record() else { return };
        self.update_steal_time();
        self.swap_preempted(gpa, PREEMPTED);
    }

    /// The thread is back: does what was left for it.
    pub(crate) fn clear_preempted(&mut self) {
        let Some(gpa) = self.steal_record() else { return };
        if self.swap_preempted(gpa, 0) & FLUSH_TLB != 0 {
            self.tlb_flush_non_global();
        }
        self.sys.pv.since = Some((thread_time::real(), thread_time::own()));
    }
}

impl Cpu {
    /// The version under which the record whose version is at `gpa` may be changed: odd, and none that a guest may
    /// have read before, whichever engine wrote that.
    fn next_version(&self, gpa: u64) -> u32 {
        self.phys_get(gpa).unwrap_or(0).wrapping_add(1) | 1
    }

    fn phys_get(&self, gpa: u64) -> Option<u32> {
        let mut bytes = [0; 4];
        self.phys_read(gpa, &mut bytes).then(|| u32::from_le_bytes(bytes))
    }

    /// Stores one field of a record; false if it is not in RAM.
    fn phys_put<T: Int>(&self, gpa: u64, value: T) -> bool {
        self.phys_write(gpa, &value.zext().to_le_bytes()[..T::SIZE])
    }

    /// Exchanges the `preempted` byte of the steal-time record at `gpa`, against which other vCPUs
    /// compare and exchange. Zero if it is not in RAM, which was logged when it was registered.
    fn swap_preempted(&self, gpa: u64, value: u8) -> u8 {
        let gpa = gpa.wrapping_add(16);
        let phys = self.mmu.phys();
        let Some((page, host)) = phys.find(gpa) else { return 0 };
        let before = host.swap(value);
        phys.stored(page, (gpa & 0xfff) as usize, 1);
        before
    }
}

mod thread_time {
    //! Clocks of the host for the calling thread, in ns.

    fn read(clock: libc::clockid_t) -> u64 {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is a valid timespec to write to; on failure it stays zero.
        unsafe { libc::clock_gettime(clock, &mut time) };
        time.tv_sec.unsigned_abs() * super::super::clock::NANOS + time.tv_nsec.unsigned_abs()
    }

    /// Monotonic time.
    pub fn real() -> u64 {
        read(libc::CLOCK_MONOTONIC)
    }

    /// Processor time of the thread.
    pub fn own() -> u64 {
        read(libc::CLOCK_THREAD_CPUTIME_ID)
    }
}

/// VMCALL and VMMCALL: Linux uses the one that CPUID's vendor suggests.
pub(crate) fn hypercall(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    let mask = if cpu.mode == Mode::Code64 { u64::MAX } else { 0xffff_ffff };
    let number = cpu.gpr[0] & mask;
    let apic_id = cpu.gpr[1] & mask;
    let result = if cpu.cpl != 0 {
        call::EPERM
    } else {
        match number {
            call::KICK_CPU => {
                let target = u32::try_from(apic_id).ok();
                if let Some(port) = target.and_then(|id| cpu.sys.platform.apics.by_id(id)) {
                    port.attention.raise(reason::UNHALT);
                }
                0
            }
            call::SEND_IPI => send_ipis(cpu, mask),
            _ => call::ENOSYS,
        }
    };
    cpu.gpr[0] = result & mask;
    Flow::Next
}

/// Logical destination, or a shorthand: there are none in this call's interrupt command.
const ICR_DESTINATION: u64 = 1 << 11 | 3 << 18;

/// Sends an interrupt (RSI, as the low half of an ICR) to each processor in a bitmap (RBX, RCX) that begins with the APIC id in
/// RDX. Returns how many it reached.
fn send_ipis(cpu: &Cpu, mask: u64) -> u64 {
    let [low, high, first, icr] = [3, 1, 2, 6].map(|register| cpu.gpr[register] & mask);
    if icr & ICR_DESTINATION != 0 {
        return call::EINVAL;
    }
    let bitmap = u128::from(low) | u128::from(high) << mask.count_ones();
    let apics = &cpu.sys.platform.apics;
    let wanted = |id: &usize| {
        let place = (*id as u64).checked_sub(first);
        place.is_some_and(|bit| bit < 128 && bitmap >> bit & 1 != 0)
    };
    let sent = (0..apics.count()).filter(wanted).map(|id| {
        let (target, delivery) = (Target::Index(id), Delivery::from_bits(icr as u32 >> 8));
        apics.send(Message { target, delivery, vector: icr as u8, level: false })
    });
    sent.sum::<usize>() as u64
}

/// How far the guest's clock is, for `VcpuState`.
pub(crate) fn clock_state(cpu: &Cpu) -> mvm_engine::ClockState {
    let clock = &cpu.sys.platform.clock;
    let now = host_tsc();
    mvm_engine::ClockState {
        tsc: now.wrapping_add(cpu.sys.tsc_offset),
        tsc_khz: clock.khz(),
        kvmclock_ns: clock.nanos_at(now),
        host_tsc: now,
    }
}
