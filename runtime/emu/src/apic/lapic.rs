//! The vCPU's own side of its local APIC: priorities, acceptance, EOI, timer, mode.

use std::sync::Arc;

use super::port::{ApicMode, Port};
use super::timer::{NEVER, Timer, TimerMode};
use super::{DEFAULT_BASE, registers::Lvt};
use crate::sys::attention::reason;
use crate::sys::clock::host_tsc;
use crate::sys::platform::Platform;

/// Bits of IA32_APIC_BASE.
pub(crate) mod base {
    pub const BSP: u64 = 1 << 8;
    pub const EXTD: u64 = 1 << 10;
    pub const ENABLE: u64 = 1 << 11;
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
}

/// Bits of the error status register.
pub(crate) mod esr {
    pub const SEND_VECTOR: u32 = 1 << 5;
    pub const RECEIVE_VECTOR: u32 = 1 << 6;
    pub const ILLEGAL_REGISTER: u32 = 1 << 7;
}

/// Software enable bit of the spurious vector register.
pub(crate) const SVR_ENABLE: u32 = 1 << 8;
/// Mask bit of an LVT entry.
pub(crate) const LVT_MASKED: u32 = 1 << 16;

/// A local APIC.
#[derive(Debug)]
pub struct Lapic {
    pub(crate) platform: Arc<Platform>,
    pub(crate) index: u32,
    /// IA32_APIC_BASE.
    pub(crate) base: u64,
    pub(crate) isr: [u32; 8],
    pub(crate) tpr: u32,
    pub(crate) svr: u32,
    pub(crate) esr: u32,
    /// Errors since the last write to ESR.
    pub(crate) errors: u32,
    pub(crate) icr: u64,
    pub(crate) ldr: u32,
    pub(crate) dfr: u32,
    pub(crate) lvt: [u32; Lvt::COUNT],
    pub(crate) timer: Timer,
    /// A request waits for RFLAGS.IF; whoever sets IF raises [`reason::INTERRUPT`].
    pub(crate) held: bool,
}

impl Lapic {
    /// The APIC of vCPU `index`, as after power-up.
    pub fn new(platform: Arc<Platform>, index: u32) -> Self {
        let bsp = if index == 0 { base::BSP } else { 0 };
        let mut lapic = Self {
            platform,
            index,
            base: DEFAULT_BASE | base::ENABLE | bsp,
            isr: [0; 8],
            tpr: 0,
            svr: 0xff,
            esr: 0,
            errors: 0,
            icr: 0,
            ldr: 0,
            dfr: u32::MAX,
            lvt: [LVT_MASKED; Lvt::COUNT],
            timer: Timer::default(),
            held: false,
        };
        lapic.reset_registers();
        lapic
    }

    /// The state after INIT: everything but the base register and the id.
    pub fn init(&mut self) {
        self.reset_registers();
    }

    fn reset_registers(&mut self) {
        self.isr = [0; 8];
        self.tpr = 0;
        self.svr = 0xff;
        self.esr = 0;
        self.errors = 0;
        self.icr = 0;
        self.dfr = u32::MAX;
        self.ldr = 0;
        self.lvt = [LVT_MASKED; Lvt::COUNT];
        self.timer = Timer::default();
        self.held = false;
        self.port().irr.clear();
        self.port().tmr.clear();
        self.port().take_bad_vector();
        self.publish();
    }

    /// The side that others see.
    #[inline]
    pub fn port(&self) -> &Port {
        self.platform.apics.port(self.index)
    }

    /// Its mode.
    pub fn mode(&self) -> ApicMode {
        match (self.base & base::ENABLE != 0, self.base & base::EXTD != 0) {
            (false, _) => ApicMode::Disabled,
            (true, false) => ApicMode::XApic,
            (true, true) => ApicMode::X2Apic,
        }
    }

    /// Tells senders what they have to know.
    pub(crate) fn publish(&mut self) {
        if self.mode() == ApicMode::X2Apic {
            // The logical id follows from the id and cannot be written (SDM vol. 3, 11.12.10.2).
            self.ldr = (self.index >> 4) << 16 | 1 << (self.index & 0xf);
        }
        let (mode, enabled) = (self.mode(), self.svr & SVR_ENABLE != 0);
        let flat = self.dfr >> 28 == 0xf;
        let port = self.port();
        port.set_mode(mode);
        port.set_software_enabled(enabled && mode != ApicMode::Disabled);
        port.set_logical(self.ldr, flat);
    }

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Writes IA32_APIC_BASE. `None` if the value or the transition is not allowed (SDM vol. 3,
    /// 11.12.5): a #GP.
    pub fn set_base(&mut self, value: u64) -> Option<()> {
        let defined = base::BSP | base::EXTD | base::ENABLE | base::ADDRESS;
        if value & !defined != 0 {
            return None;
        }
        let extended = value & base::EXTD != 0;
        let enabled = value & base::ENABLE != 0;
        match (self.mode(), enabled, extended) {
            (_, false, true)
            | (ApicMode::Disabled, true, true)
            | (ApicMode::X2Apic, true, false) => {
                return None;
            }
            _ => {}
        }
        let before = self.mode();
        self.base = value;
        if self.mode() == ApicMode::Disabled && before != ApicMode::Disabled {
            self.reset_registers();
        }
        if before != self.mode() {
            tracing::debug!(vcpu = self.index, mode = ?self.mode(), "local APIC mode");
        }
        self.publish();
        self.recheck_external();
        Some(())
    }

    /// Where its registers are in guest physical memory, if they are there at all.
    pub fn mmio_page(&self) -> Option<u64> {
        (self.mode() == ApicMode::XApic).then_some(self.base & base::ADDRESS)
    }

    /// CR8: the upper half of the task priority.
    pub fn cr8(&self) -> u64 {
        u64::from(self.tpr >> 4 & 0xf)
    }

    /// Writes CR8.
    pub fn set_cr8(&mut self, value: u64) {
        self.set_tpr((value as u32 & 0xf) << 4);
    }

    pub(crate) fn set_tpr(&mut self, value: u32) {
        self.tpr = value & 0xff;
        self.recheck();
    }

    fn highest_in_service(&self) -> Option<u8> {
        (0..8u8).rev().find_map(|i| {
            let word = self.isr[usize::from(i)];
            (word != 0).then(|| i * 32 + (31 - word.leading_zeros() as u8))
        })
    }

    /// Processor priority (SDM vol. 3, 11.8.3.1).
    pub(crate) fn ppr(&self) -> u32 {
        let in_service = u32::from(self.highest_in_service().unwrap_or(0)) & 0xf0;
        if self.tpr & 0xf0 >= in_service { self.tpr } else { in_service }
    }

    /// Asks for the pending requests to be looked at again, if there are any.
    fn recheck(&mut self) {
        if self.port().irr.highest().is_some() {
            self.port().attention.raise_self(reason::INTERRUPT);
        }
    }

    /// The interrupt that could be delivered now, RFLAGS.IF aside.
    pub fn deliverable(&self) -> Option<u8> {
        let vector = self.port().irr.highest()?;
        (u32::from(vector) & 0xf0 > self.ppr() & 0xf0).then_some(vector)
    }

    /// Whether the old interrupt controllers ask for an interrupt, and are heard: LINT0 is theirs (ExtINT), or there is no
    /// local APIC in the way (SDM vol. 3, 11.4.3). Task priorities mean nothing to them.
    pub fn external_requested(&self) -> bool {
        self.port().intr() && self.hears_external()
    }

    fn hears_external(&self) -> bool {
        const EXTINT: u32 = 7 << 8;
        let lint0 = self.lvt[Lvt::Lint0 as usize];
        self.mode() == ApicMode::Disabled || lint0 & (LVT_MASKED | 7 << 8) == EXTINT
    }

    /// Asks for INTR to be looked at again, if it is asserted: LINT0 may lead to it now.
    pub(crate) fn recheck_external(&mut self) {
        if self.external_requested() {
            self.port().attention.raise_self(reason::INTERRUPT);
        }
    }

    /// Takes interrupt `vector` into service.
    pub fn accept(&mut self, vector: u8) {
        self.port().irr.remove(vector);
        self.isr[usize::from(vector >> 5)] |= 1 << (vector & 31);
    }

    /// End of interrupt. Returns the vector, if it was level-triggered and devices must be told.
    pub fn eoi(&mut self) -> Option<u8> {
        let vector = self.highest_in_service()?;
        self.isr[usize::from(vector >> 5)] &= !(1 << (vector & 31));
        self.recheck();
        self.port().tmr.contains(vector).then_some(vector)
    }

    /// Posts the interrupt of LVT entry `entry`, if it is not masked.
    pub(crate) fn post_local(&mut self, entry: Lvt) {
        let lvt = self.lvt[entry as usize];
        if lvt & LVT_MASKED == 0 {
            self.post_self(lvt as u8);
        }
    }

    pub(crate) fn post_self(&mut self, vector: u8) {
        if vector < 16 {
            self.error(esr::RECEIVE_VECTOR);
        } else {
            self.port().post(vector, false);
        }
    }

    /// Records what the port has got to complain about.
    pub(crate) fn note_port_errors(&mut self) {
        if self.port().take_bad_vector() {
            self.error(esr::RECEIVE_VECTOR);
        }
    }

    /// Records errors, and tells the guest if it asked for that.
    pub(crate) fn error(&mut self, bits: u32) {
        self.errors |= bits;
        let lvt = self.lvt[Lvt::Error as usize];
        if lvt & LVT_MASKED == 0 && lvt as u8 >= 16 {
            self.port().post(lvt as u8, false);
        }
    }

    /// Host TSC at which the timer expires, or [`NEVER`].
    #[inline(always)]
    pub fn deadline(&self) -> u64 {
        self.timer.deadline
    }

    /// Lets the timer expire if its time has come.
    pub fn poll_timer(&mut self, now: u64) {
        if now < self.timer.deadline {
            return;
        }
        let mode = TimerMode::from_lvt(self.lvt[Lvt::Timer as usize]);
        if self.timer.expire(mode, now, &self.platform.clock) {
            self.post_local(Lvt::Timer);
        }
    }

    /// Reads IA32_TSC_DEADLINE: zero unless armed in that mode.
    pub fn tsc_deadline(&self) -> u64 {
        self.timer.tsc_deadline
    }

    /// Writes IA32_TSC_DEADLINE; ignored in other timer modes. `offset` is guest minus host TSC.
    pub fn set_tsc_deadline(&mut self, value: u64, offset: u64) {
        if TimerMode::from_lvt(self.lvt[Lvt::Timer as usize]) == TimerMode::TscDeadline {
            self.timer.set_tsc_deadline(value, offset, host_tsc());
            self.poll_timer(host_tsc());
        }
    }

    /// The guest's TSC was moved: the armed deadline moves with it.
    pub fn retime(&mut self, offset: u64) {
        if self.timer.tsc_deadline != 0 {
            self.timer.set_tsc_deadline(self.timer.tsc_deadline, offset, host_tsc());
        }
    }

    /// How long the vCPU may sleep: `None` if the timer is not armed.
    pub fn time_left(&self) -> Option<std::time::Duration> {
        if self.timer.deadline == NEVER {
            return None;
        }
        let ticks = self.timer.deadline.saturating_sub(host_tsc());
        Some(self.platform.clock.duration(ticks))
    }
}

impl crate::cpu::Cpu {
    /// A load from guest physical address `gpa`, if it is in the APIC's register page.
    pub(crate) fn apic_mmio_read(&mut self, gpa: u64, data: &mut [u8]) -> bool {
        let hit = self.sys.lapic.mmio_page() == Some(gpa & !0xfff);
        if hit {
            self.sys.lapic.read_mmio(gpa & 0xfff, data);
        }
        hit
    }

    /// A store to guest physical address `gpa`, if it is in the APIC's register page.
    pub(crate) fn apic_mmio_write(&mut self, gpa: u64, data: &[u8]) -> bool {
        let hit = self.sys.lapic.mmio_page() == Some(gpa & !0xfff);
        if hit {
            self.sys.lapic.write_mmio(gpa & 0xfff, data);
        }
        hit
    }
}
