//! The test device of PC emulators, by which test kernels see what accesses do and pull interrupts.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::{BusDevice, IoApic, Pic};

/// Bytes that keep what is written to them, for accesses of every width.
#[derive(Debug)]
pub struct Scratch {
    bytes: Mutex<Vec<u8>>,
}

impl Scratch {
    /// The first of its ports. Two groups of four show the same bytes.
    pub const PORTS: [u64; 2] = [0xe0, 0xe8];
    /// Bytes of port space of each.
    pub const PORTS_LEN: u64 = 4;
    /// Memory-mapped bytes of their own.
    pub const MEMORY: u64 = 0xff00_0000;
    /// How many.
    pub const MEMORY_LEN: u64 = 0x1_0000;

    /// The bytes behind the ports.
    pub fn ports() -> Self {
        Self::new(Self::PORTS_LEN)
    }

    /// The bytes in memory.
    pub fn memory() -> Self {
        Self::new(Self::MEMORY_LEN)
    }

    fn new(len: u64) -> Self {
        // Memory of the host's for them is only there when they are used.
        Self { bytes: Mutex::new(vec![0; len as usize]) }
    }

    /// Pairs of the bytes kept from `offset` on and those of an access.
    fn with<T>(&self, offset: u64, access: impl IntoIterator<Item = T>, each: fn(&mut u8, T)) {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = usize::try_from(offset).ok().and_then(|at| bytes.get_mut(at..));
        kept.unwrap_or_default().iter_mut().zip(access).for_each(|(kept, byte)| each(kept, byte));
    }
}

impl BusDevice for Scratch {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.with(offset, data, |kept, byte| *byte = *kept);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.with(offset, data, |kept, byte| *kept = *byte);
    }
}

/// A port for each of the I/O APIC's pins, which takes the level of the pin, and of the old controllers' input of the same
/// number.
pub struct TestInterrupts {
    ioapic: Arc<IoApic>,
    pic: Option<Arc<Pic>>,
}

impl TestInterrupts {
    /// The port of pin 0.
    pub const PORT: u64 = 0x2000;
    /// Ports, and so pins.
    pub const LEN: u64 = IoApic::PINS as u64;

    /// Ports for the pins of `ioapic`, and the inputs of `pic`.
    pub fn new(ioapic: Arc<IoApic>, pic: Option<Arc<Pic>>) -> Self {
        Self { ioapic, pic }
    }
}

impl BusDevice for TestInterrupts {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Ok(pin) = u8::try_from(offset) {
            let asserted = data.iter().any(|byte| *byte != 0);
            if let Some(pic) = &self.pic {
                pic.set_irq(pin, asserted);
            }
            self.ioapic.set_level(pin, asserted);
        }
    }
}

impl fmt::Debug for TestInterrupts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestInterrupts").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::{MsiMessage, MsiSink};

    fn read<const LEN: usize>(device: &impl BusDevice, offset: u64) -> [u8; LEN] {
        let mut data = [0xee; LEN];
        device.read(offset, &mut data);
        data
    }

    #[test]
    fn scratch_bytes_keep_what_is_written_in_any_width() {
        let ports = Scratch::ports();
        ports.write(0, &[1, 2, 3, 4]);
        ports.write(1, &[9]);
        ports.write(2, &[7, 8]);
        assert_eq!(read(&ports, 0), [1, 9, 7, 8]);
        assert_eq!(read(&ports, 3), [8, 0xff], "what is after them is not there");
        ports.write(3, &[5, 6]);
        ports.write(u64::MAX, &[5, 6]);
        assert_eq!(read(&ports, 0), [1, 9, 7, 5]);
        let memory = Scratch::memory();
        memory.write(Scratch::MEMORY_LEN - 8, &[5; 8]);
        assert_eq!(read(&memory, Scratch::MEMORY_LEN - 9), [0, 5, 5]);
    }

    #[derive(Default)]
    struct Sink(Mutex<Vec<MsiMessage>>);

    impl MsiSink for Sink {
        fn signal_msi(&self, address: u64, data: u32) {
            self.0.lock().unwrap().push(MsiMessage { address, data });
        }

        fn route_changed(&self, _: u8, _: Option<MsiMessage>) {}
    }

    #[test]
    fn each_port_pulls_its_pin() {
        let sink = Arc::new(Sink::default());
        let ioapic = IoApic::new(sink.clone());
        let register = |index: u32, value: u32| {
            ioapic.write(0, &index.to_le_bytes());
            ioapic.write(0x10, &value.to_le_bytes());
        };
        // Pin 14: vector 0x51, edge, not masked.
        register(0x10 + 2 * 14 + 1, 0);
        register(0x10 + 2 * 14, 0x51);
        let pic = Pic::new(sink.clone());
        let lines = TestInterrupts::new(ioapic, Some(pic.clone()));
        let count = || sink.0.lock().unwrap().len();
        lines.write(14, &[1]);
        lines.write(14, &[1]);
        assert_eq!(count(), 1, "an edge");
        lines.write(14, &[0]);
        lines.write(14, &0x0100u16.to_le_bytes());
        assert_eq!(count(), 2);
        lines.write(13, &[1]);
        lines.write(24, &[1]);
        lines.write(u64::MAX, &[]);
        assert_eq!(count(), 2, "masked, or not there");
        assert_eq!(sink.0.lock().unwrap()[0].data & 0xff, 0x51);
        let mut bus = crate::Bus::new();
        pic.place(&mut bus).unwrap();
        let mut requests = [0];
        bus.ports.read(0xa0, &mut requests);
        assert_eq!(requests, [1 << 6 | 1 << 5]);
    }
}
