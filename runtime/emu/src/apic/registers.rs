//! The local APIC's registers, by memory page and by MSR (SDM vol. 3, tables 11-1 and 11-6).

use super::bus::{Delivery, Message, Target};
use super::lapic::{LVT_MASKED, Lapic, SVR_ENABLE, esr};
use super::port::ApicMode;
use super::timer::TimerMode;
use crate::fault::Fault;
use crate::sys::attention::reason;
use crate::sys::clock::host_tsc;
use mvm_engine::LapicState;

/// Entries of the local vector table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Lvt {
    Timer = 0,
    Thermal = 1,
    Performance = 2,
    Lint0 = 3,
    Lint1 = 4,
    Error = 5,
}

impl Lvt {
    /// Number of entries.
    pub const COUNT: usize = 6;

    /// Bits that can be written.
    const fn writable(self) -> u32 {
        match self {
            Self::Timer => 0x7_00ff | LVT_MASKED,
            Self::Error => 0xff | LVT_MASKED,
            Self::Thermal | Self::Performance => 0x7ff | LVT_MASKED,
            Self::Lint0 | Self::Lint1 => 0xa7ff | LVT_MASKED,
        }
    }

    /// By register number, 0x32 to 0x37.
    const fn from_register(register: u32) -> Option<Self> {
        Some(match register {
            0x32 => Self::Timer,
            0x33 => Self::Thermal,
            0x34 => Self::Performance,
            0x35 => Self::Lint0,
            0x36 => Self::Lint1,
            0x37 => Self::Error,
            _ => return None,
        })
    }
}

/// Register numbers: offset in the page / 16, and MSR - 0x800.
mod reg {
    pub const ID: u32 = 0x02;
    pub const VERSION: u32 = 0x03;
    pub const TPR: u32 = 0x08;
    pub const APR: u32 = 0x09;
    pub const PPR: u32 = 0x0a;
    pub const EOI: u32 = 0x0b;
    pub const RRD: u32 = 0x0c;
    pub const LDR: u32 = 0x0d;
    pub const DFR: u32 = 0x0e;
    pub const SVR: u32 = 0x0f;
    pub const ISR: u32 = 0x10;
    pub const TMR: u32 = 0x18;
    pub const IRR: u32 = 0x20;
    pub const ESR: u32 = 0x28;
    pub const ICR: u32 = 0x30;
    pub const ICR_HIGH: u32 = 0x31;
    pub const INITIAL: u32 = 0x38;
    pub const CURRENT: u32 = 0x39;
    pub const DIVIDE: u32 = 0x3e;
    pub const SELF_IPI: u32 = 0x3f;
}

/// Version 0x14 (integrated APIC), six LVT entries.
const VERSION: u32 = 0x14 | (Lvt::COUNT as u32 - 1) << 16;

/// First MSR of the x2APIC.
pub const X2APIC_FIRST: u32 = 0x800;

impl Lapic {
    /// Reads register `register`. `None` if there is none.
    fn read_register(&self, register: u32) -> Option<u32> {
        let extended = self.mode() == ApicMode::X2Apic;
        Some(match register {
            reg::ID if extended => self.index,
            reg::ID => self.index << 24,
            reg::VERSION => VERSION,
            reg::TPR => self.tpr,
            reg::APR | reg::RRD if !extended => 0,
            reg::PPR => self.ppr(),
            reg::LDR => self.ldr,
            reg::DFR if !extended => self.dfr,
            reg::SVR => self.svr,
            reg::ISR..=0x17 => self.isr[(register - reg::ISR) as usize],
            reg::TMR..=0x1f => self.port().tmr.word((register - reg::TMR) as usize),
            reg::IRR..=0x27 => self.port().irr.word((register - reg::IRR) as usize),
            reg::ESR => self.esr,
            reg::ICR => self.icr as u32,
            reg::ICR_HIGH if !extended => (self.icr >> 32) as u32,
            reg::INITIAL => self.timer.initial,
            reg::CURRENT => self.timer.current(host_tsc(), &self.platform.clock),
            reg::DIVIDE => self.timer.divide,
            _ => self.lvt[Lvt::from_register(register)? as usize],
        })
    }

    /// Writes register `register`. `None` if there is none, or it is read-only.
    fn write_register(&mut self, register: u32, value: u32) -> Option<()> {
        let extended = self.mode() == ApicMode::X2Apic;
        match register {
            reg::TPR => self.set_tpr(value),
            reg::EOI => {
                if let Some(vector) = self.eoi() {
                    self.platform.io.eoi(vector);
                }
            }
            reg::LDR if !extended => {
                self.ldr = value & 0xff00_0000;
                self.publish();
            }
            reg::DFR if !extended => {
                self.dfr = value | 0x0fff_ffff;
                self.publish();
            }
            reg::SVR => self.set_svr(value),
            reg::ESR => {
                self.note_port_errors();
                self.esr = std::mem::take(&mut self.errors);
            }
            reg::ICR => {
                self.icr = self.icr & !0xffff_ffff | u64::from(value & 0x000c_cfff);
                self.send_ipi();
            }
            reg::ICR_HIGH if !extended => {
                self.icr = self.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32;
            }
            reg::INITIAL => {
                let one_shot_or_periodic =
                    TimerMode::from_lvt(self.lvt[Lvt::Timer as usize]) != TimerMode::TscDeadline;
                if one_shot_or_periodic {
                    let platform = self.platform.clone();
                    self.timer.start(value, host_tsc(), &platform.clock);
                    // Translated code looks at the timer when it is interrupted.
                    self.port().attention.raise_self(reason::SYNC);
                }
            }
            reg::DIVIDE => self.set_divide(value & 0xb),
            reg::SELF_IPI if extended => {
                if value as u8 >= 16 {
                    self.post_self(value as u8);
                } else {
                    // Sent and received (SDM vol. 3, 12.5.3).
                    self.error(esr::SEND_VECTOR | esr::RECEIVE_VECTOR);
                }
            }
            // Some systems clear the read-only ID in xAPIC mode; hardware ignores that too.
            reg::ID if !extended => {}
            _ => self.set_lvt(Lvt::from_register(register)?, value),
        }
        Some(())
    }

    fn set_svr(&mut self, value: u32) {
        self.svr = value & 0x1ff;
        if self.svr & SVR_ENABLE == 0 {
            for lvt in &mut self.lvt {
                *lvt |= LVT_MASKED;
            }
        }
        self.publish();
    }

    fn set_divide(&mut self, value: u32) {
        let platform = self.platform.clone();
        let now = host_tsc();
        let left = self.timer.current(now, &platform.clock);
        self.timer.divide = value;
        if left != 0 {
            // The count goes on from where it is, at the new pace.
            let initial = self.timer.initial;
            self.timer.start(left, now, &platform.clock);
            self.timer.initial = initial;
            self.port().attention.raise_self(reason::SYNC);
        }
    }

    fn set_lvt(&mut self, entry: Lvt, value: u32) {
        let mut value = value & entry.writable();
        if self.svr & SVR_ENABLE == 0 {
            value |= LVT_MASKED;
        }
        let before = std::mem::replace(&mut self.lvt[entry as usize], value);
        if entry == Lvt::Lint0 {
            self.recheck_external();
        }
        if entry == Lvt::Timer {
            let (old, new) = (TimerMode::from_lvt(before), TimerMode::from_lvt(value));
            // Going to or from deadline mode disarms the timer (SDM vol. 3, 11.5.4.1).
            if old != new && (old == TimerMode::TscDeadline || new == TimerMode::TscDeadline) {
                let divide = self.timer.divide;
                self.timer = super::Timer { divide, ..super::Timer::default() };
            }
        }
    }

    /// Sends what the interrupt command register says (SDM vol. 3, 11.6.1).
    fn send_ipi(&mut self) {
        let low = self.icr as u32;
        let vector = low as u8;
        let delivery = Delivery::from_bits(low >> 8);
        let level_triggered = low & 1 << 15 != 0;
        if delivery == Delivery::Init && level_triggered && low & 1 << 14 == 0 {
            return; // INIT level de-assert: nothing on processors since the Pentium 4.
        }
        if matches!(delivery, Delivery::Fixed | Delivery::LowestPriority) && vector < 16 {
            // It goes nowhere, but to itself an APIC sends and receives at once.
            let to_itself = low >> 18 & 3 == 1;
            self.error(esr::SEND_VECTOR | if to_itself { esr::RECEIVE_VECTOR } else { 0 });
            return;
        }
        let own = self.index as usize;
        let target = match low >> 18 & 3 {
            0 => self.icr_destination(low & 1 << 11 != 0),
            1 => Target::Index(own),
            2 => Target::All { but: None },
            _ => Target::All { but: Some(own) },
        };
        // IPIs are edge-triggered, whatever the trigger bit says.
        self.platform.apics.send(Message { target, delivery, vector, level: false });
    }

    fn icr_destination(&self, logical: bool) -> Target {
        let field = (self.icr >> 32) as u32;
        let (destination, broadcast) = match self.mode() {
            ApicMode::X2Apic => (field, u32::MAX),
            _ => (field >> 24, 0xff),
        };
        match logical {
            _ if destination == broadcast => Target::All { but: None },
            true => Target::Logical(destination),
            false => Target::Physical(destination),
        }
    }

    /// RDMSR of x2APIC register `msr`.
    ///
    /// # Errors
    /// #GP(0): not in x2APIC mode, no such register, or write-only.
    pub fn read_msr(&self, msr: u32) -> Result<u64, Fault> {
        if self.mode() != ApicMode::X2Apic {
            return Err(Fault::GP0);
        }
        let register = msr.wrapping_sub(X2APIC_FIRST);
        if register == reg::ICR {
            return Ok(self.icr);
        }
        self.read_register(register).map(u64::from).ok_or(Fault::GP0)
    }

    /// WRMSR of x2APIC register `msr`.
    ///
    /// # Errors
    /// #GP(0): not in x2APIC mode, no such register, read-only, or reserved bits set.
    pub fn write_msr(&mut self, msr: u32, value: u64) -> Result<(), Fault> {
        if self.mode() != ApicMode::X2Apic {
            return Err(Fault::GP0);
        }
        let register = msr.wrapping_sub(X2APIC_FIRST);
        if register == reg::ICR {
            if value as u32 & !0x000c_cfff != 0 {
                return Err(Fault::GP0);
            }
            self.icr = value;
            self.send_ipi();
            return Ok(());
        }
        let allowed: u64 = match register {
            reg::EOI | reg::ESR => 0,
            reg::TPR | reg::SELF_IPI => 0xff,
            reg::SVR => 0x1ff,
            reg::DIVIDE => 0xb,
            _ => 0xffff_ffff,
        };
        if value & !allowed != 0 {
            return Err(Fault::GP0);
        }
        self.write_register(register, value as u32).ok_or(Fault::GP0)
    }

    /// A load from the register page, at `offset`. Only aligned accesses of four bytes are
    /// architectural; others see the bytes of the register they fall into.
    pub fn read_mmio(&mut self, offset: u64, data: &mut [u8]) {
        let register = (offset >> 4) as u32 & 0xff;
        let value = self.read_register(register).unwrap_or_else(|| {
            self.error(esr::ILLEGAL_REGISTER);
            0
        });
        let bytes = u128::from(value).to_le_bytes();
        let from = (offset & 0xf) as usize;
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(from + i).copied().unwrap_or(0);
        }
    }

    /// A store to the register page. Anything but four aligned bytes is dropped.
    pub fn write_mmio(&mut self, offset: u64, data: &[u8]) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else { return };
        if offset & 0xf != 0 {
            return;
        }
        let register = (offset >> 4) as u32 & 0xff;
        if self.write_register(register, u32::from_le_bytes(bytes)).is_none() {
            self.error(esr::ILLEGAL_REGISTER);
        }
    }
}

/// Number of registers in the page that can hold anything.
const PAGE_REGISTERS: u32 = 0x40;

impl Lapic {
    /// The register page, a dword for every 16 bytes.
    pub(crate) fn export_registers(&self) -> Vec<u32> {
        (0..PAGE_REGISTERS)
            .map(|register| match register {
                reg::ICR_HIGH => (self.icr >> 32) as u32,
                reg::DFR => self.dfr,
                _ => self.read_register(register).unwrap_or(0),
            })
            .collect()
    }

    /// Takes over a register page. `offset` is guest minus host TSC.
    pub(crate) fn import(&mut self, state: &LapicState, offset: u64) {
        let get = |register: u32| state.regs.get(register as usize).copied().unwrap_or(0);
        self.init();
        self.base = state.base;
        if state.regs.is_empty() {
            self.publish();
            return;
        }
        self.svr = get(reg::SVR) & 0x1ff;
        self.tpr = get(reg::TPR) & 0xff;
        self.esr = get(reg::ESR);
        self.icr = u64::from(get(reg::ICR)) | u64::from(get(reg::ICR_HIGH)) << 32;
        self.ldr = get(reg::LDR);
        self.dfr = get(reg::DFR);
        for index in 0..8u32 {
            self.isr[index as usize] = get(reg::ISR + index);
            self.port().tmr.set_word(index as usize, get(reg::TMR + index));
            self.port().irr.set_word(index as usize, get(reg::IRR + index));
        }
        for register in 0x32..0x38 {
            if let Some(entry) = Lvt::from_register(register) {
                self.lvt[entry as usize] = get(register) & entry.writable();
            }
        }
        self.timer.divide = get(reg::DIVIDE) & 0xb;
        let platform = self.platform.clone();
        match TimerMode::from_lvt(self.lvt[Lvt::Timer as usize]) {
            TimerMode::TscDeadline => {
                self.timer.set_tsc_deadline(state.tsc_deadline, offset, host_tsc());
            }
            TimerMode::OneShot | TimerMode::Periodic => {
                let left = get(reg::CURRENT);
                self.timer.start(left, host_tsc(), &platform.clock);
                self.timer.initial = get(reg::INITIAL);
            }
        }
        self.publish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::attention::reason;
    use crate::sys::platform::Platform;

    const EXTENDED: u64 = 0xfee0_0d00;

    fn lapics(count: u32) -> Vec<Lapic> {
        let platform = Platform::for_tests(count);
        (0..count).map(|i| Lapic::new(platform.clone(), i)).collect()
    }

    fn x2apic() -> Lapic {
        let mut lapic = lapics(1).remove(0);
        lapic.set_base(EXTENDED).unwrap();
        lapic.write_msr(0x80f, 0x1ff).unwrap();
        lapic
    }

    #[test]
    fn self_ipi_goes_through_irr_isr_and_eoi() {
        let mut lapic = x2apic();
        lapic.write_msr(0x83f, 0x55).unwrap();
        lapic.write_msr(0x83f, 0x91).unwrap();
        assert_eq!(lapic.deliverable(), Some(0x91));
        lapic.accept(0x91);
        assert_eq!(lapic.deliverable(), None, "0x55 is below the one in service");
        assert_eq!(lapic.read_msr(0x80a).unwrap(), 0x90);
        assert_eq!(lapic.read_msr(0x814).unwrap(), 1 << 0x11);
        lapic.port().attention.take();
        lapic.write_msr(0x80b, 0).unwrap();
        assert_eq!(lapic.port().attention.take(), reason::INTERRUPT);
        assert_eq!(lapic.deliverable(), Some(0x55));
    }

    #[test]
    fn task_priority_holds_interrupts_back() {
        let mut lapic = x2apic();
        lapic.set_cr8(5);
        lapic.write_msr(0x83f, 0x55).unwrap();
        assert_eq!(lapic.deliverable(), None);
        lapic.set_cr8(4);
        assert_eq!(lapic.deliverable(), Some(0x55));
        assert_eq!(lapic.cr8(), 4);
    }

    #[test]
    fn x2apic_reserved_accesses_fault() {
        let mut lapic = x2apic();
        for (msr, value) in [
            (0x80b, 1),
            (0x802, 0),
            (0x80e, 0),
            (0x828, 1),
            (0x831, 0),
            (0x80f, 1 << 9),
            (0x8ff, 0),
        ] {
            assert_eq!(lapic.write_msr(msr, value), Err(Fault::GP0), "{msr:#x}");
        }
        for msr in [0x80b, 0x83f, 0x80e, 0x831, 0x8ff, 0x809] {
            assert_eq!(lapic.read_msr(msr), Err(Fault::GP0), "{msr:#x}");
        }
        let mut xapic = lapics(1).remove(0);
        assert_eq!(xapic.write_msr(0x80b, 0), Err(Fault::GP0));
    }

    #[test]
    fn mode_transitions() {
        let mut lapic = lapics(1).remove(0);
        assert!(lapic.set_base(0xfee0_0500).is_none(), "extended without enabled");
        assert!(lapic.set_base(EXTENDED).is_some());
        assert!(lapic.set_base(0xfee0_0900).is_none(), "x2APIC to xAPIC");
        assert!(lapic.set_base(0xfee0_0100).is_some());
        assert!(lapic.set_base(EXTENDED).is_none(), "disabled to x2APIC");
        assert!(lapic.set_base(0xfee0_0900).is_some());
        assert_eq!(lapic.mmio_page(), Some(0xfee0_0000));
        assert!(lapic.set_base(0xfee0_0901).is_none(), "reserved bit");
    }

    #[test]
    fn ipis_by_both_register_interfaces() {
        let mut lapics = lapics(3);
        for lapic in &mut lapics {
            lapic.write_mmio(0xf0, &0x1ffu32.to_le_bytes());
        }
        lapics[0].write_mmio(0x310, &(2u32 << 24).to_le_bytes());
        lapics[0].write_mmio(0x300, &0x4061u32.to_le_bytes());
        assert_eq!(lapics[2].deliverable(), Some(0x61));
        assert_eq!(lapics[1].deliverable(), None);
        lapics[1].set_base(EXTENDED & !0x100).unwrap();
        lapics[1].write_msr(0x830, 0x000c_4500).unwrap();
        assert!(lapics[0].port().attention.take() & reason::INIT != 0);
        assert!(lapics[1].port().attention.take() & reason::INIT == 0);
        lapics[1].write_msr(0x830, 2 << 32 | 0x4699).unwrap();
        assert!(lapics[2].port().attention.take() & reason::SIPI != 0);
        assert_eq!(lapics[2].port().sipi_vector(), 0x99);
    }

    #[test]
    fn bad_vectors_show_in_esr() {
        let mut lapic = x2apic();
        lapic.write_msr(0x837, 0x40).unwrap();
        lapic.write_msr(0x830, 0x4_4005).unwrap();
        assert_eq!(lapic.deliverable(), Some(0x40), "the error interrupt");
        assert_eq!(lapic.read_msr(0x828).unwrap(), 0);
        lapic.write_msr(0x828, 0).unwrap();
        assert_eq!(lapic.read_msr(0x828).unwrap(), 3 << 5, "sent to itself");
        let errors = |lapic: &mut Lapic| {
            lapic.write_msr(0x828, 0).unwrap();
            lapic.read_msr(0x828).unwrap()
        };
        assert_eq!(errors(&mut lapic), 0);
        lapic.write_msr(0x830, 0xc_4005).unwrap();
        assert_eq!(errors(&mut lapic), 1 << 5, "sent to the others");
        lapic.write_msr(0x83f, 5).unwrap();
        assert_eq!(errors(&mut lapic), 3 << 5, "by the self-IPI register");
        lapic.write_msr(0x832, 5).unwrap();
        lapic.post_local(Lvt::Timer);
        assert_eq!(errors(&mut lapic), 1 << 6, "out of the vector table");
        lapic.port().attention.take();
        lapic.accept(0x40);
        lapic.eoi();
        lapic.port().post(5, false);
        assert_eq!(lapic.port().attention.take(), reason::INTERRUPT, "the vCPU must look");
        lapic.note_port_errors();
        assert_eq!(lapic.deliverable(), Some(0x40), "the error interrupt");
        assert_eq!(errors(&mut lapic), 1 << 6, "out of a message");
        lapic.write_msr(0x80f, 0xff).unwrap();
        lapic.port().post(5, false);
        assert_eq!(errors(&mut lapic), 0, "switched off it receives nothing");
    }

    #[test]
    fn software_disable_masks_the_vector_table() {
        let mut lapic = x2apic();
        lapic.write_msr(0x832, 0x40).unwrap();
        assert_eq!(lapic.read_msr(0x832).unwrap(), 0x40);
        lapic.write_msr(0x80f, 0xff).unwrap();
        assert_eq!(lapic.read_msr(0x832).unwrap(), 0x1_0040);
        lapic.write_msr(0x83f, 0x55).unwrap();
        assert_eq!(lapic.deliverable(), None);
    }

    #[test]
    fn tsc_deadline_in_the_past_fires_at_once() {
        let mut lapic = x2apic();
        lapic.write_msr(0x832, 0x4_00ec).unwrap();
        lapic.set_tsc_deadline(1, 0);
        assert_eq!(lapic.deliverable(), Some(0xec));
        assert_eq!(lapic.tsc_deadline(), 0);
        lapic.write_msr(0x832, 0xec).unwrap();
        lapic.set_tsc_deadline(1 << 62, 0);
        assert_eq!(lapic.tsc_deadline(), 0, "ignored in one-shot mode");
    }

    #[test]
    fn level_interrupts_are_ended_on_the_bus() {
        let mut lapic = x2apic();
        lapic.port().post(0x41, true);
        lapic.accept(0x41);
        assert_eq!(lapic.eoi(), Some(0x41));
        lapic.port().post(0x41, false);
        lapic.accept(0x41);
        assert_eq!(lapic.eoi(), None);
    }

    #[test]
    fn xapic_registers_read_by_the_page() {
        let mut lapic = lapics(2).remove(1);
        let mut read = |offset| {
            let mut data = [0; 4];
            lapic.read_mmio(offset, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!(read(0x20), 1 << 24);
        assert_eq!(read(0x30), 0x0005_0014);
        assert_eq!(read(0xf0), 0xff);
        assert_eq!(read(0xe0), u32::MAX);
        assert_eq!(read(0x320), LVT_MASKED);
    }
}
