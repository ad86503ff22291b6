//! The few PC devices that a guest expects without being told, and ACPI's power registers.

mod pit;
mod power;
mod power_off;
mod rtc;
mod test_device;

use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::BusDevice;
use crate::events::{EventSink, VmEvent};

pub use pit::{Pit, PitError, PitState, SystemB};
pub use power::PowerControl;
pub use power_off::PowerOff;
pub use rtc::{Rtc, RtcState};
pub use test_device::{Scratch, TestInterrupts};

/// Which of the system control ports this is; each is placed on its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Port {
    KeyboardData,
    SystemB,
    KeyboardCommand,
    SystemA,
}

/// Keyboard controller (0x60, 0x64), system control ports B (0x61) and A (0x92), as far as a
/// microVM has them: no keyboard, no speaker, but a guest can pull the reset line.
pub struct SystemControl {
    port: Port,
    value: AtomicU8,
    events: EventSink,
}

impl SystemControl {
    /// Output buffer of the keyboard controller: always empty.
    pub const KEYBOARD_DATA: u64 = 0x60;
    /// NMI status and control, timer 2 gate.
    pub const SYSTEM_B: u64 = 0x61;
    /// Status and commands of the keyboard controller.
    pub const KEYBOARD_COMMAND: u64 = 0x64;
    /// Fast A20 and reset.
    pub const SYSTEM_A: u64 = 0x92;

    /// All four ports with their addresses, one byte each.
    pub fn ports(events: EventSink) -> [(u64, Self); 4] {
        let make = |port| Self { port, value: AtomicU8::new(0), events: events.clone() };
        [
            (Self::KEYBOARD_DATA, make(Port::KeyboardData)),
            (Self::SYSTEM_B, make(Port::SystemB)),
            (Self::KEYBOARD_COMMAND, make(Port::KeyboardCommand)),
            (Self::SYSTEM_A, make(Port::SystemA)),
        ]
    }
}

impl BusDevice for SystemControl {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        let value = match self.port {
            // Neither buffer is full; nothing is ever typed.
            Port::KeyboardData | Port::KeyboardCommand => 0,
            // Bit 4 follows the refresh clock: loops that wait for it to change must end. Bit 5 is
            // timer 2's output, which is up as there is none to wait for.
            Port::SystemB => self.value.fetch_xor(0x10, Ordering::Relaxed) & 0x1f | 0x20,
            // The A20 line is always on.
            Port::SystemA => self.value.load(Ordering::Relaxed) | 2,
        };
        data.fill(value);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        match self.port {
            Port::KeyboardData => {}
            // Commands 0xf0 to 0xff pulse output lines, bit 0 (low) is the CPU's reset.
            Port::KeyboardCommand if value & 0xf1 == 0xf0 => (self.events)(VmEvent::Reset),
            Port::KeyboardCommand => {}
            Port::SystemB => self.value.store(value & 0x0f, Ordering::Relaxed),
            Port::SystemA if value & 1 != 0 => (self.events)(VmEvent::Reset),
            Port::SystemA => self.value.store(value & !1, Ordering::Relaxed),
        }
    }
}

impl fmt::Debug for SystemControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SystemControl").field("port", &self.port).finish_non_exhaustive()
    }
}

/// The port that firmware and kernels write progress codes to, and write to for a short delay.
#[derive(Debug, Default)]
pub struct PostCode(AtomicU8);

impl PostCode {
    /// Where it is.
    pub const PORT: u64 = 0x80;

    /// The last code written.
    pub fn last(&self) -> u8 {
        self.0.load(Ordering::Relaxed)
    }
}

impl BusDevice for PostCode {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(self.last());
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if let Some(&code) = data.first() {
            self.0.store(code, Ordering::Relaxed);
        }
    }
}

/// A port that ends the machine with a value, for unikernels and tests. Placed only if asked for.
pub struct DebugExit(EventSink);

impl DebugExit {
    /// Where QEMU has it.
    pub const PORT: u64 = 0xf4;
    /// Bytes of port space.
    pub const LEN: u64 = 4;

    /// A port that reports to `events`.
    pub fn new(events: EventSink) -> Self {
        Self(events)
    }
}

impl BusDevice for DebugExit {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let mut word = [0; 4];
        let len = data.len().min(4);
        word[..len].copy_from_slice(&data[..len]);
        (self.0)(VmEvent::DebugExit(u32::from_le_bytes(word)));
    }
}

impl fmt::Debug for DebugExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DebugExit").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    fn sink() -> (EventSink, Arc<Mutex<Vec<VmEvent>>>) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        (Arc::new(move |event| log.lock().unwrap().push(event)), seen)
    }

    #[test]
    fn reset_comes_from_both_ports_and_only_from_the_right_values() {
        let (events, seen) = sink();
        let [_, _, (_, keyboard), (_, system_a)] = SystemControl::ports(events);
        keyboard.write(0, &[0xd1]);
        keyboard.write(0, &[0xff]);
        system_a.write(0, &[2]);
        assert!(seen.lock().unwrap().is_empty());
        keyboard.write(0, &[0xfe]);
        system_a.write(0, &[3]);
        assert_eq!(*seen.lock().unwrap(), [VmEvent::Reset; 2]);
        let mut byte = [0xff];
        keyboard.read(0, &mut byte);
        assert_eq!(byte, [0], "Linux waits for an empty input buffer before it resets");
    }

    #[test]
    fn the_refresh_bit_toggles() {
        let [_, (_, system_b), ..] = SystemControl::ports(sink().0);
        let (mut a, mut b) = ([0], [0]);
        system_b.read(0, &mut a);
        system_b.read(0, &mut b);
        assert_eq!((a[0] ^ b[0]) & 0x10, 0x10);
    }

    #[test]
    fn debug_exit_takes_any_width() {
        let (events, seen) = sink();
        let port = DebugExit::new(events);
        port.write(0, &[0x10]);
        port.write(0, &0x1234_5678u32.to_le_bytes());
        port.write(0, &[]);
        let want = [0x10, 0x1234_5678, 0].map(VmEvent::DebugExit);
        assert_eq!(*seen.lock().unwrap(), want);
    }
}
