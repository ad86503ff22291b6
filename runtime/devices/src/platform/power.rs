//! Sleep control, sleep status and reset registers of a hardware-reduced ACPI platform.

use std::fmt;

use crate::BusDevice;
use crate::events::{EventSink, VmEvent};

/// The three registers, a byte each (ACPI 6.5, 4.8.3.7 and 4.8.3.6). The only sleeping state is
/// S5, "soft off", and nothing ever wakes up.
pub struct PowerControl(EventSink);

impl PowerControl {
    /// First port; the tables name them, so that any free place would do.
    pub const PORT: u64 = 0x600;
    /// Ports it takes.
    pub const LEN: u64 = 3;
    /// Offset of the sleep control register.
    pub const SLEEP_CONTROL: u64 = 0;
    /// Offset of the sleep status register.
    pub const SLEEP_STATUS: u64 = 1;
    /// Offset of the reset register.
    pub const RESET: u64 = 2;
    /// Value for the reset register.
    pub const RESET_VALUE: u8 = 1;
    /// `SLP_TYP` that means S5: what `\_S5` must say.
    pub const SLEEP_TYPE_S5: u8 = 5;

    /// `SLP_EN`: go to sleep now.
    const SLEEP_ENABLE: u8 = 1 << 5;

    /// Registers that report to `events`.
    pub fn new(events: EventSink) -> Self {
        Self(events)
    }
}

impl BusDevice for PowerControl {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // SLP_EN and SLP_TYP are write-only in effect, and WAK_STS is never set.
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (offset, &value) in (offset..).zip(data) {
            match offset {
                Self::SLEEP_CONTROL
                    if value & Self::SLEEP_ENABLE != 0 && value >> 2 & 7 == Self::SLEEP_TYPE_S5 =>
                {
                    (self.0)(VmEvent::PowerOff);
                }
                Self::RESET if value == Self::RESET_VALUE => (self.0)(VmEvent::Reset),
                _ => {}
            }
        }
    }
}

impl fmt::Debug for PowerControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PowerControl").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    /// What the registers report when `data` is written at `offset`.
    fn events_of(offset: u64, data: &[u8]) -> Vec<VmEvent> {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        let power = PowerControl::new(Arc::new(move |event| log.lock().unwrap().push(event)));
        power.write(offset, data);
        seen.lock().unwrap().clone()
    }

    #[test]
    fn only_s5_with_its_enable_bit_switches_off() {
        for value in 0..=u8::MAX {
            // Bits 0, 1, 6 and 7 are none of our business.
            let off = value & 0x3c == 0x34;
            let want: &[VmEvent] = if off { &[VmEvent::PowerOff] } else { &[] };
            assert_eq!(events_of(PowerControl::SLEEP_CONTROL, &[value]), want, "{value:#x}");
            assert!(events_of(PowerControl::SLEEP_STATUS, &[value]).is_empty());
        }
    }

    #[test]
    fn reset_takes_its_value_only() {
        for value in 0..=u8::MAX {
            let want: &[VmEvent] = if value == 1 { &[VmEvent::Reset] } else { &[] };
            assert_eq!(events_of(PowerControl::RESET, &[value]), want, "{value:#x}");
        }
    }

    #[test]
    fn wide_and_empty_accesses_are_taken_byte_by_byte() {
        assert_eq!(events_of(0, &[0, 0, 1]), [VmEvent::Reset]);
        assert_eq!(events_of(1, &[0, 1, 0x34, 1]), [VmEvent::Reset]);
        assert!(events_of(0, &[]).is_empty());
        let power = PowerControl::new(Arc::new(|_| {}));
        let mut bytes = [0xff; 3];
        power.read(0, &mut bytes);
        assert_eq!(bytes, [0; 3]);
    }
}
