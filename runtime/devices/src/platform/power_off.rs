//! Ports by which guests without tables to tell them so switch their machine off.

use std::fmt;

use crate::BusDevice;
use crate::events::{EventSink, VmEvent};

/// One of the ports where unikernels and small kernels look for a way out because the PC emulators
/// that they were made on have one there.
pub struct PowerOff {
    events: EventSink,
    /// The bits of which one at least must be set, 0 for none.
    needed: u32,
    /// What is written is the guest's status.
    tells: bool,
}

impl PowerOff {
    /// Any value: the default place of the debug exit port in emulators, which those guests use that
    /// have nothing to say about their end (Solo5's virtio target).
    pub const EXIT: u64 = 0x501;
    /// Bytes of port space at [`PowerOff::EXIT`].
    pub const EXIT_LEN: u64 = 4;
    /// PM1 control register of the common emulated chipsets: SLP_EN counts, whatever the sleep type.
    pub const PM1_CONTROL: u64 = 0x604;
    /// Bytes of port space at [`PowerOff::PM1_CONTROL`].
    pub const PM1_LEN: u64 = 4;

    /// `SLP_EN` (ACPI 6.5, 4.8.3.2.1).
    const SLEEP_ENABLE: u32 = 1 << 13;

    /// The port at [`PowerOff::EXIT`].
    pub fn exit(events: EventSink) -> Self {
        Self { events, needed: 0, tells: false }
    }

    /// The same, for guests that write their status there (Nanos): 0 is a good end.
    pub fn exit_with_status(events: EventSink) -> Self {
        Self { events, needed: 0, tells: true }
    }

    /// The port at [`PowerOff::PM1_CONTROL`].
    pub fn pm1_control(events: EventSink) -> Self {
        Self { events, needed: Self::SLEEP_ENABLE, tells: false }
    }
}

impl BusDevice for PowerOff {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // The register's second byte alone has the bit too.
        let value = (offset..)
            .zip(data)
            .take_while(|(at, _)| *at < 4)
            .fold(0, |value, (at, &byte)| value | u32::from(byte) << (at * 8));
        if value & self.needed == self.needed {
            (self.events)(match self.tells {
                true => VmEvent::Halt { status: value.cast_signed(), cookie: 0 },
                false => VmEvent::PowerOff,
            });
        }
    }
}

impl fmt::Debug for PowerOff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PowerOff").field("needed", &self.needed).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    fn ends(make: fn(EventSink) -> PowerOff, offset: u64, data: &[u8]) -> bool {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        make(Arc::new(move |event| log.lock().unwrap().push(event))).write(offset, data);
        let seen = seen.lock().unwrap();
        assert!(seen.iter().all(|e| *e == VmEvent::PowerOff));
        !seen.is_empty()
    }

    #[test]
    fn sleeping_takes_the_enable_bit_and_exiting_anything() {
        assert!(ends(PowerOff::pm1_control, 0, &0x2000u16.to_le_bytes()));
        assert!(ends(PowerOff::pm1_control, 0, &0x3c00u32.to_le_bytes()));
        assert!(ends(PowerOff::pm1_control, 1, &[0x20]));
        for data in [&[0x20][..], &0x1fffu16.to_le_bytes(), &0xffff_0000u32.to_le_bytes(), &[]] {
            assert!(!ends(PowerOff::pm1_control, 0, data), "{data:x?}");
        }
        assert!(!ends(PowerOff::pm1_control, 2, &[0xff, 0xff]));
        assert!(ends(PowerOff::exit, 0, &[0]));
        assert!(ends(PowerOff::exit, 0, &41u16.to_le_bytes()));
    }

    #[test]
    fn a_status_is_told_as_it_is_written() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        let port =
            PowerOff::exit_with_status(Arc::new(move |event| log.lock().unwrap().push(event)));
        port.write(0, &[0]);
        port.write(0, &[41]);
        let want = [0, 41].map(|status| VmEvent::Halt { status, cookie: 0 });
        assert_eq!(*seen.lock().unwrap(), want);
    }
}
