//! Virtio over MMIO, version 2 (4.2).
//!
//! A driver's notification only writes the queue's doorbell eventfd, so an engine may do that by
//! itself (ioeventfd on [`MmioTransport::NOTIFY_OFFSET`], data match = queue index). Queue reset is not
//! offered.

mod registers;
mod snapshot;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mvm_memory::GuestRam;
use vmm_sys_util::eventfd::EventFd;

use super::link::status;
use super::{Activation, DriverLink, QueueState, VirtQueue, VirtioDevice, feature};
use crate::BusDevice;
use crate::irq::InterruptLine;
use registers as reg;
pub use snapshot::MmioState;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"mvm\0");

/// The registers of one device, in front of it on the memory bus.
pub struct MmioTransport {
    device: Arc<dyn VirtioDevice>,
    link: Arc<DriverLink>,
    ram: GuestRam,
    regs: Mutex<Registers>,
}

/// What the driver has written and not yet made use of.
#[derive(Debug, Default)]
struct Registers {
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    shm_sel: u32,
    queues: Vec<QueueState>,
    active: bool,
    /// Configuration generation that the driver started from.
    seen_generation: u32,
}

impl MmioTransport {
    /// Bytes of address space.
    pub const LEN: u64 = 0x1000;
    /// Offset of the QueueNotify register.
    pub const NOTIFY_OFFSET: u64 = reg::QUEUE_NOTIFY;

    /// Puts the transport in front of `device`, with interrupts by edges on `line`.
    pub fn new(
        device: Arc<dyn VirtioDevice>,
        ram: GuestRam,
        line: Arc<dyn InterruptLine>,
    ) -> Arc<Self> {
        let link = DriverLink::new(device.name(), line);
        device.connect(link.clone());
        let transport = Self { device, link, ram, regs: Mutex::default() };
        transport.clear(&mut transport.lock());
        Arc::new(transport)
    }

    /// The device behind.
    pub fn device(&self) -> &Arc<dyn VirtioDevice> {
        &self.device
    }

    /// Interrupt and failure counters.
    pub fn link(&self) -> &Arc<DriverLink> {
        &self.link
    }

    /// Whether a driver has taken the device and not given it back by a reset.
    pub fn is_driven(&self) -> bool {
        self.link.status() & status::DRIVER != 0
    }

    /// The eventfd that notifies queue `index`, for engines that write it by themselves.
    pub fn doorbell(&self, index: usize) -> Option<&EventFd> {
        self.device.queues().get(index).map(|slot| &slot.doorbell)
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.regs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers as after reset (4.2.2.1).
    fn clear(&self, regs: &mut Registers) {
        let sizes = self.device.queues().iter().map(|slot| slot.max_size);
        *regs = Registers {
            queues: sizes.map(|size| QueueState { size, ..QueueState::default() }).collect(),
            seen_generation: self.link.generation(),
            ..Registers::default()
        };
    }

    fn reset(&self, regs: &mut Registers) {
        self.device.reset();
        self.link.reset();
        self.clear(regs);
    }

    fn offered(&self) -> u64 {
        let transport = feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC;
        self.device.features() & feature::DEVICE | transport
    }

    /// The status register is written (2.1.1, 3.1.1).
    fn write_status(&self, regs: &mut Registers, value: u32) {
        if value == 0 {
            self.reset(regs);
            return;
        }
        let now = self.link.status();
        let set_by_driver = status::ALL & !status::NEEDS_RESET;
        let wanted = value & set_by_driver;
        let held = now & set_by_driver;
        if held & !wanted != 0 {
            self.link.fail(&format_args!("status bits {held:#x} taken back by writing {value:#x}"));
            return;
        }
        let added = wanted & !held;
        let needs = |bit: u32, before: u32| added & bit == 0 || wanted & before == before;
        if !needs(status::DRIVER, status::ACKNOWLEDGE)
            || !needs(status::FEATURES_OK, status::ACKNOWLEDGE | status::DRIVER)
            || !(added & status::DRIVER_OK == 0 || held & status::FEATURES_OK != 0)
        {
            self.link.fail(&format_args!("status {value:#x} written out of order after {held:#x}"));
            return;
        }
        self.link.add_status(added & (status::ACKNOWLEDGE | status::DRIVER | status::FAILED));
        if added & status::FAILED != 0 {
            tracing::info!(device = self.device.name(), "the guest's driver has given up");
            return;
        }
        if added & status::FEATURES_OK != 0 && self.features_agree(regs.driver_features) {
            self.link.add_status(status::FEATURES_OK);
        }
        if added & status::DRIVER_OK != 0 && !self.link.needs_reset() {
            self.activate(regs);
        }
    }

    /// Whether FEATURES_OK may stand (2.2.2): only what is offered, and not a legacy driver.
    fn features_agree(&self, features: u64) -> bool {
        features & !self.offered() == 0
            && features & feature::VERSION_1 != 0
            && self.device.accepts(features)
    }

    fn activate(&self, regs: &mut Registers) {
        // Before the device runs: its first interrupt may come at once.
        self.link.add_status(status::DRIVER_OK);
        match self
            .open_queues(regs)
            .and_then(|activation| self.device.activate(activation).map_err(|e| e.to_string()))
        {
            Ok(()) => regs.active = true,
            Err(why) => return self.link.fail(&why),
        }
        // What changed while the driver was reading it would never be told otherwise.
        if self.link.generation() != regs.seen_generation {
            self.link.raise_config();
        }
    }

    fn open_queues(&self, regs: &Registers) -> Result<Activation, String> {
        let features = regs.driver_features;
        let mut queues = Vec::with_capacity(regs.queues.len());
        for (index, state) in regs.queues.iter().enumerate() {
            let queue = state.ready.then(|| self.open_queue(index, state, features)).transpose()?;
            queues.push(queue);
        }
        Ok(Activation { ram: self.ram.clone(), queues, features })
    }

    fn open_queue(
        &self,
        index: usize,
        state: &QueueState,
        features: u64,
    ) -> Result<VirtQueue, String> {
        let max = self.device.queues()[index].max_size;
        VirtQueue::new(state, max, self.ram.memory().clone(), features)
            .map_err(|e| format!("queue {index}: {e}"))
    }

    /// QueueReady is written (4.2.2.2).
    fn write_queue_ready(&self, regs: &mut Registers, value: u32) {
        let index = regs.queue_sel as usize;
        let Some(state) = regs.queues.get(index).copied() else { return };
        if value & 1 == 0 {
            if regs.active && state.ready {
                // Without queue reset there is no way to stop one queue and go on with the others.
                self.device.reset();
                regs.active = false;
            }
        } else if regs.active {
            return self.link.fail(&format_args!("queue {index} enabled after DRIVER_OK"));
        } else if let Err(why) = self.open_queue(index, &state, regs.driver_features) {
            return self.link.fail(&why);
        }
        regs.queues[index].ready = value & 1 != 0;
    }

    fn notify(&self, regs: &Registers, queue: u32) {
        let Some(slot) = self.device.queues().get(queue as usize) else {
            return self
                .link
                .fail(&format_args!("notification of queue {queue}, which is not there"));
        };
        if regs.active {
            slot.ring();
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let regs = self.lock();
        let queue = regs.queues.get(regs.queue_sel as usize);
        match offset {
            reg::MAGIC => MAGIC,
            reg::VERSION => VERSION,
            // 0 is a place without a device, which drivers pass over (4.2.2).
            reg::DEVICE_ID if !self.device.is_present() => 0,
            reg::DEVICE_ID => self.device.device_type() as u32,
            reg::VENDOR_ID => VENDOR,
            reg::DEVICE_FEATURES => half(self.offered(), regs.device_features_sel),
            reg::QUEUE_NUM_MAX => self
                .device
                .queues()
                .get(regs.queue_sel as usize)
                .map_or(0, |slot| u32::from(slot.max_size)),
            reg::QUEUE_READY => queue.map_or(0, |q| u32::from(q.ready)),
            reg::INTERRUPT_STATUS => self.link.causes(),
            reg::STATUS => self.link.status(),
            // No shared memory regions: length and base are all-ones.
            reg::SHM_LEN_LOW..=reg::SHM_BASE_HIGH => u32::MAX,
            reg::CONFIG_GENERATION => self.link.generation(),
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        let mut regs = self.lock();
        let regs = &mut *regs;
        match offset {
            reg::DEVICE_FEATURES_SEL => regs.device_features_sel = value,
            reg::DRIVER_FEATURES_SEL => regs.driver_features_sel = value,
            reg::DRIVER_FEATURES => {
                // Settled once FEATURES_OK stands.
                if self.link.status() & status::FEATURES_OK == 0 {
                    set_half(&mut regs.driver_features, regs.driver_features_sel, value);
                }
            }
            reg::QUEUE_SEL => regs.queue_sel = value,
            reg::SHM_SEL => regs.shm_sel = value,
            reg::QUEUE_READY => self.write_queue_ready(regs, value),
            reg::QUEUE_NOTIFY => self.notify(regs, value & 0xffff),
            reg::INTERRUPT_ACK => self.link.acknowledge(value),
            reg::STATUS => self.write_status(regs, value),
            _ => {
                let Some(queue) = regs.queues.get_mut(regs.queue_sel as usize) else { return };
                // The driver must not change a queue that is ready (4.2.2.2).
                if queue.ready {
                    return;
                }
                match offset {
                    reg::QUEUE_NUM => queue.size = u16::try_from(value).unwrap_or(0),
                    reg::QUEUE_DESC_LOW => set_half(&mut queue.descriptors, 0, value),
                    reg::QUEUE_DESC_HIGH => set_half(&mut queue.descriptors, 1, value),
                    reg::QUEUE_DRIVER_LOW => set_half(&mut queue.available, 0, value),
                    reg::QUEUE_DRIVER_HIGH => set_half(&mut queue.available, 1, value),
                    reg::QUEUE_DEVICE_LOW => set_half(&mut queue.used, 0, value),
                    reg::QUEUE_DEVICE_HIGH => set_half(&mut queue.used, 1, value),
                    _ => {}
                }
            }
        }
    }
}

/// The 32-bit half of `value` that a selector names; there are only two.
fn half(value: u64, sel: u32) -> u32 {
    match sel {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(value: &mut u64, sel: u32, half: u32) {
    match sel {
        0 => *value = *value & !0xffff_ffff | u64::from(half),
        1 => *value = *value & 0xffff_ffff | u64::from(half) << 32,
        _ => {}
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(reg::CONFIG) {
            self.device.read_config(offset, data);
            return;
        }
        data.fill(0);
        // Registers are read whole (4.2.2.2); anything else shows nothing.
        if let Ok(word) = <&mut [u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            *word = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(reg::CONFIG) {
            if self.link.status() & status::DRIVER != 0 {
                self.device.write_config(offset, data);
            }
            return;
        }
        match <[u8; 4]>::try_from(data) {
            Ok(word) if offset.is_multiple_of(4) => {
                self.write_register(offset, u32::from_le_bytes(word))
            }
            _ => {
                let len = data.len();
                self.link.fail(&format_args!("register {offset:#x} written with {len} bytes"));
            }
        }
    }
}

impl fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MmioTransport")
            .field("device", &self.device.name())
            .field("link", &self.link)
            .finish_non_exhaustive()
    }
}
