//! Architectural state of a vCPU, in no engine's terms.

use serde::{Deserialize, Serialize};

use crate::cpuid::CpuModel;
use crate::tsc;

/// Bytes of the XSAVE area kept in a state: legacy region, header and AVX (SDM vol. 1, 13.4).
pub const XSAVE_AREA_SIZE: usize = 832;

/// Everything that makes a vCPU go on elsewhere as if nothing had happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    /// General registers, instruction pointer, flags.
    pub regs: GeneralRegisters,
    /// Segments, tables, control registers.
    pub sregs: SystemRegisters,
    /// DR0-DR3, DR6, DR7.
    pub debug: DebugRegisters,
    /// XSAVE area in the standard format, [`XSAVE_AREA_SIZE`] bytes; more if components beyond AVX are in
    /// use, which takes [`CpuModel::Host`].
    pub xsave: Vec<u8>,
    /// XCR0.
    pub xcr0: u64,
    /// MSRs as (index, value).
    pub msrs: Vec<(u32, u64)>,
    /// Local APIC.
    pub lapic: LapicState,
    /// What is pending at the next instruction boundary.
    pub events: PendingEvents,
    /// Running, halted, waiting.
    pub mp_state: MpState,
    /// Clock.
    pub clock: ClockState,
    /// How much of a processor `cpuid` shows, and whether it goes on elsewhere.
    pub model: CpuModel,
    /// The CPUID shown to the guest.
    pub cpuid: Vec<CpuidEntry>,
}

impl VcpuState {
    /// Why no processor can be in this state, whatever its engine.
    pub fn contradiction(&self) -> Option<&'static str> {
        const IF: u64 = 1 << 9;
        let events = &self.events;
        let held_off = events.shadow || self.regs.rflags & IF == 0;
        let other = events.exception.is_some() || self.mp_state != MpState::Running;
        (events.external.is_some() && (held_off || other))
            .then_some("an interrupt is being delivered to a processor that does not take any")
    }
}

/// General registers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GeneralRegisters {
    /// rax rcx rdx rbx rsp rbp rsi rdi r8..r15: the order of their encoding.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
}

/// A segment register with its hidden part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes, granularity applied.
    pub limit: u32,
    /// Access rights as bits 8-23 of the descriptor's second dword, shifted right by 8: type 0-3,
    /// S 4, DPL 5-6, P 7, AVL 12, L 13, D/B 14, G 15. Bit 16 marks an unusable segment.
    pub access: u32,
}

/// A descriptor table register.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Linear base.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// System registers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SystemRegisters {
    /// es cs ss ds fs gs: the order of their encoding.
    pub segments: [Segment; 6],
    /// Local descriptor table.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdtr: Table,
    /// Interrupt descriptor table.
    pub idtr: Table,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// CR8, the task priority.
    pub cr8: u64,
    /// EFER.
    pub efer: u64,
}

/// Debug registers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DebugRegisters {
    /// DR0-DR3.
    pub address: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
}

/// Local APIC: the register page of xAPIC mode, a dword every 16 bytes (SDM vol. 3, table 11-1).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LapicState {
    /// IA32_APIC_BASE.
    pub base: u64,
    /// Registers by offset / 16.
    pub regs: Vec<u32>,
    /// TSC deadline, 0 if not armed.
    pub tsc_deadline: u64,
}

/// Events pending at an instruction boundary.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingEvents {
    /// An exception to deliver: vector and error code.
    pub exception: Option<(u8, Option<u32>)>,
    /// Interrupts are held off for one instruction by STI or MOV SS.
    pub shadow: bool,
    /// NMIs that are pending: a processor can hold one on its way to the handler, and one behind it.
    pub nmis_pending: u8,
    /// NMIs are masked until IRET.
    pub nmi_masked: bool,
    /// A start-up IPI's vector, pending.
    pub sipi: Option<u8>,
    /// The vector of an interrupt that the old interrupt controllers have been acknowledged and that is not delivered.
    #[serde(default)]
    pub external: Option<u8>,
    /// A paravirtual kick that the next HLT consumes. KVM tells of one only by not halting.
    pub unhalted: bool,
}

/// What a vCPU is doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MpState {
    /// Executes instructions.
    #[default]
    Running,
    /// In HLT.
    Halted,
    /// After INIT, waits for a start-up IPI.
    WaitForSipi,
}

/// Clocks of a vCPU at one moment.
///
/// Whoever takes the state over lets them go on as if they had not stopped since that moment, so that vCPUs whose
/// states were taken one after the other agree to the tick. [`ClockState::restarted`] leaves the time between out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockState {
    /// The guest's time-stamp counter.
    pub tsc: u64,
    /// Its frequency in kHz.
    pub tsc_khz: u64,
    /// kvmclock's system time in ns.
    pub kvmclock_ns: u64,
    /// The host's time-stamp counter at that moment, which says nothing on another host or after its boot. 0: the
    /// moment is when the state is taken over.
    pub host_tsc: u64,
}

impl ClockState {
    /// The clocks as they show at `host_tsc`, later or earlier.
    #[must_use]
    pub fn at(self, host_tsc: u64) -> Self {
        // Counters may wrap, and a state may say anything: the distance counts, and its sign.
        let ticks = host_tsc.wrapping_sub(self.host_tsc);
        let nanos = |ticks| tsc::ticks_to_nanos(ticks, self.tsc_khz);
        let kvmclock_ns = match ticks.cast_signed() < 0 {
            true => self.kvmclock_ns.saturating_sub(nanos(ticks.wrapping_neg())),
            false => self.kvmclock_ns.saturating_add(nanos(ticks)),
        };
        Self { tsc: self.tsc.wrapping_add(ticks), kvmclock_ns, host_tsc, ..self }
    }

    /// The same clocks, going on at `host_tsc` after they have stood still.
    #[must_use]
    pub fn restarted(self, host_tsc: u64) -> Self {
        Self { host_tsc, ..self }
    }

    /// The clocks as they are to show now, when they are taken over.
    #[must_use]
    pub fn now(self) -> Self {
        let now = tsc::host_tsc();
        if self.host_tsc == 0 { self.restarted(now) } else { self.at(now) }
    }
}

/// One CPUID leaf.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidEntry {
    /// EAX of the query.
    pub leaf: u32,
    /// ECX of the query, where it matters.
    pub subleaf: Option<u32>,
    /// Answer.
    pub eax: u32,
    /// Answer.
    pub ebx: u32,
    /// Answer.
    pub ecx: u32,
    /// Answer.
    pub edx: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_go_on_or_stand_still() {
        let clock =
            ClockState { tsc: 500, tsc_khz: 2_000_000, kvmclock_ns: 1000, host_tsc: 10_000 };
        let later = clock.at(10_600);
        assert_eq!((later.tsc, later.kvmclock_ns, later.host_tsc), (1100, 1300, 10_600));
        assert_eq!(later.at(10_000), clock);
        assert_eq!(clock.at(9_000).tsc, 0u64.wrapping_sub(500), "counters wrap");
        assert_eq!(clock.at(10_000 - 4000).kvmclock_ns, 0, "time does not");
        let stood = clock.restarted(50_000);
        assert_eq!((stood.tsc, stood.kvmclock_ns, stood.host_tsc), (500, 1000, 50_000));
        let unknown = ClockState { host_tsc: 0, ..clock }.now();
        assert_eq!((unknown.tsc, unknown.kvmclock_ns), (500, 1000));
        let absurd = ClockState { kvmclock_ns: u64::MAX, tsc_khz: 0, ..clock };
        assert_eq!(absurd.at(1 << 62).kvmclock_ns, u64::MAX);
    }
}
