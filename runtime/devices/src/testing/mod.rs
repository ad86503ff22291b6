//! A synthetic guest: RAM, an interrupt counter and a driver of virtio-mmio devices.
//!
//! It plays by the rules; hostile drivers are in [`hostile`], which writes to the rings directly.

pub mod hostile;
mod queue;
mod rng;

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mvm_memory::{GuestMemory, GuestRam};
use vm_memory::{Bytes, GuestAddress};

use crate::virtio::{MmioTransport, VirtioDevice, feature};
use crate::{BusDevice, InterruptLine};

pub use queue::{DriverQueue, Segment};
pub use rng::Rng;

/// Longest time a test waits for a device.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Counts interrupts and lets a test wait for them.
#[derive(Debug, Default)]
pub struct TestLine {
    count: Mutex<u64>,
    change: Condvar,
}

impl TestLine {
    /// Edges so far.
    pub fn count(&self) -> u64 {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until more than `seen` edges were there. Returns how many, or `None` at the deadline.
    pub fn wait_beyond(&self, seen: u64, deadline: Instant) -> Option<u64> {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        while *count <= seen {
            let left = deadline.checked_duration_since(Instant::now())?;
            count = self.change.wait_timeout(count, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Some(*count)
    }
}

impl InterruptLine for TestLine {
    fn set_level(&self, asserted: bool) {
        if asserted {
            *self.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
            self.change.notify_all();
        }
    }
}

/// Register offsets that tests poke.
#[allow(missing_docs)]
pub mod reg {
    pub const MAGIC: u64 = 0;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC: u64 = 0x80;
    pub const QUEUE_DRIVER: u64 = 0x90;
    pub const QUEUE_DEVICE: u64 = 0xa0;
    pub const CONFIG: u64 = 0x100;
}

/// Bit of the status register: the device gave up on its driver.
pub const NEEDS_RESET: u32 = 64;

/// A guest with one device and a driver for it.
#[derive(Debug)]
pub struct Guest {
    /// Its RAM.
    pub ram: GuestRam,
    /// The device's registers.
    pub mmio: Arc<MmioTransport>,
    /// The device's interrupt.
    pub line: Arc<TestLine>,
    next_free: u64,
    /// Where allocation started, for a driver that starts over.
    floor: u64,
}

impl Guest {
    /// A guest with `size` bytes of RAM and `device`.
    pub fn new(size: u64, device: Arc<dyn VirtioDevice>) -> Self {
        Self::over(GuestRam::new(&[(0, size)]).expect("guest RAM"), device)
    }

    /// A guest with this RAM, which begins at 0, and `device`.
    pub fn over(ram: GuestRam, device: Arc<dyn VirtioDevice>) -> Self {
        let line = Arc::new(TestLine::default());
        let mmio = MmioTransport::new(device, ram.clone(), line.clone());
        Self { ram, mmio, line, next_free: 0x1000, floor: 0x1000 }
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMemory {
        self.ram.memory()
    }

    /// Reads a register.
    pub fn read(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.mmio.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    /// Writes a register.
    pub fn write(&self, offset: u64, value: u32) {
        self.mmio.write(offset, &value.to_le_bytes());
    }

    /// Takes `len` bytes of RAM for good, page-aligned.
    pub fn alloc(&mut self, len: u64) -> u64 {
        let at = self.next_free;
        self.next_free = (at + len).next_multiple_of(0x1000);
        assert!(self.next_free <= self.ram.size(), "the test guest is out of RAM");
        at
    }

    /// Puts `data` somewhere in RAM.
    pub fn place(&mut self, data: &[u8]) -> u64 {
        let at = self.alloc(data.len() as u64);
        self.memory().write_slice(data, GuestAddress(at)).expect("in RAM");
        at
    }

    /// Reads RAM.
    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory().read_slice(&mut data, GuestAddress(at)).expect("in RAM");
        data
    }

    /// Reads the configuration space.
    pub fn config(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.mmio.read(reg::CONFIG + offset, &mut data);
        data
    }

    /// Features on offer.
    pub fn offered(&self) -> u64 {
        (0..2u32).fold(0, |all, half| {
            self.write(reg::DEVICE_FEATURES_SEL, half);
            all | u64::from(self.read(reg::DEVICE_FEATURES)) << (32 * half)
        })
    }

    /// Resets the device; RAM given out before is free again.
    pub fn reset(&mut self) {
        self.write(reg::STATUS, 0);
        assert_eq!(self.read(reg::STATUS), 0);
        self.next_free = self.floor;
    }

    /// Initialises the device (3.1.1) with all features but `without`, and queues of `size` at most.
    pub fn start_without(&mut self, without: u64, size: u16) -> Vec<DriverQueue> {
        self.write(reg::STATUS, 1);
        self.write(reg::STATUS, 3);
        let features = self.offered() & !without;
        self.accept(features);
        self.write(reg::STATUS, 0xb);
        assert_eq!(self.read(reg::STATUS), 0xb, "FEATURES_OK stands");
        let count = self.mmio.device().queues().len();
        let queues =
            (0..count).map(|index| self.set_up_queue(index as u32, size, features)).collect();
        self.write(reg::STATUS, 0xf);
        assert_eq!(self.read(reg::STATUS), 0xf, "the device works");
        queues
    }

    /// Initialises the device with all features.
    pub fn start(&mut self) -> Vec<DriverQueue> {
        self.start_without(0, u16::MAX)
    }

    /// Writes the driver's features.
    pub fn accept(&self, features: u64) {
        for half in 0..2 {
            self.write(reg::DRIVER_FEATURES_SEL, half);
            self.write(reg::DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
    }

    /// Places the rings of queue `index` and enables it.
    pub fn set_up_queue(&mut self, index: u32, size: u16, features: u64) -> DriverQueue {
        self.write(reg::QUEUE_SEL, index);
        let size = size.min(self.read(reg::QUEUE_NUM_MAX) as u16);
        let event_idx = features & feature::EVENT_IDX != 0;
        let base = self.alloc(DriverQueue::bytes(size));
        let zeros = vec![0; DriverQueue::bytes(size) as usize];
        self.memory().write_slice(&zeros, GuestAddress(base)).expect("in RAM");
        let queue = DriverQueue::new(self.ram.clone(), index, size, base, event_idx);
        self.write(reg::QUEUE_NUM, u32::from(size));
        for (register, addr) in [
            (reg::QUEUE_DESC, queue.descriptors()),
            (reg::QUEUE_DRIVER, queue.available()),
            (reg::QUEUE_DEVICE, queue.used()),
        ] {
            self.write(register, addr as u32);
            self.write(register + 4, (addr >> 32) as u32);
        }
        self.write(reg::QUEUE_READY, 1);
        assert_eq!(self.read(reg::QUEUE_READY), 1);
        queue
    }

    /// Notifies the device of queue `index`.
    pub fn notify(&self, index: u32) {
        self.write(reg::QUEUE_NOTIFY, index);
    }

    /// Offers a chain, notifies, and waits until it is used. Returns the bytes the device wrote.
    pub fn transact(&self, queue: &mut DriverQueue, chain: &[Segment]) -> u32 {
        let head = queue.offer(chain);
        if queue.wants_notification() {
            self.notify(queue.index());
        }
        let (used, len) = self.wait_used(queue).expect("the device answers in time");
        assert_eq!(used, head);
        len
    }

    /// Waits for the next used chain, by interrupts.
    pub fn wait_used(&self, queue: &mut DriverQueue) -> Option<(u16, u32)> {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = self.line.count();
        loop {
            if let Some(used) = queue.poll_used() {
                return Some(used);
            }
            // The interrupt for it may have come before we asked for one.
            queue.ask_for_interrupt();
            if let Some(used) = queue.poll_used() {
                return Some(used);
            }
            if self.read(reg::STATUS) & NEEDS_RESET != 0 {
                return None;
            }
            seen = self.line.wait_beyond(seen, deadline)?;
        }
    }

    /// Waits until the device has given up on its driver.
    pub fn wait_needs_reset(&self) -> bool {
        wait_until(|| self.read(reg::STATUS) & NEEDS_RESET != 0)
    }
}

/// Polls `condition` until it holds; false at the deadline.
pub fn wait_until(mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    true
}
