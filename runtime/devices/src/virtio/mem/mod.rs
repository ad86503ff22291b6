//! Memory device (5.15): a region of guest-physical addresses in which the guest plugs memory, block by block, up to
//! what the host asks for, and unplugs it when the host asks for less.
//!
//! The region is the RAM's growing one. What of it may be used at all is what the host has ever asked for, rounded up
//! to whole steps of the guest's: that holds for every access, whoever makes it, and never becomes less. What is
//! plugged is between driver and device: a guest that keeps what it was asked to give back keeps no more than it was
//! given. A block that is unplugged is dropped from guest RAM, and the host has it back.

mod blocks;
mod reminder;
mod request;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mvm_memory::{GuestRam, RamRegion};
use serde::Serialize;

use super::{
    ActivateError, Activation, Core, DeviceState, DeviceType, OneQueue, QueueState, VirtioDevice,
    common_device_methods,
};
use crate::event_loop::{EventLoop, EventLoopError, Interest, Source, Subscriber};
use blocks::Blocks;
use reminder::Reminder;
use request::{Answer, Request, State};

/// The driver does not look at what is not plugged.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Bytes of a block, the least that is plugged: Linux' page blocks on x86, and a huge page of the host.
pub const BLOCK: u64 = 2 << 20;

const QUEUE_SIZE: u16 = 64;
/// What the event loop calls the timer; the queue is 0.
const REMINDER: u64 = 1;
const CONFIG: usize = 56;

/// How the device is set up.
#[derive(Debug, Clone)]
pub struct MemConfig {
    /// Name for logs.
    pub name: String,
    /// The RAM whose growing region it is about.
    pub ram: GuestRam,
    /// Pieces in which the guest takes memory, in bytes: what may be used of the region is always a multiple. A multiple of
    /// [`BLOCK`].
    pub step: u64,
}

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum MemError {
    /// The RAM has no such region.
    #[error("the guest's RAM has no region that grows")]
    NoRegion,
    /// The region is no whole number of steps.
    #[error(
        "memory that grows is {size:#x} bytes at {start:#x}: neither is a multiple of {step:#x}"
    )]
    Region {
        /// Its first address.
        start: u64,
        /// Its bytes.
        size: u64,
        /// What it grows by.
        step: u64,
    },
    /// The host has no more descriptors.
    #[error("cannot make the memory device: {0}")]
    Start(io::Error),
    /// The event loop refused a descriptor.
    #[error(transparent)]
    Watch(#[from] EventLoopError),
}

/// More than the region has.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{asked} bytes of memory are more than the {region} by which the machine can grow")]
pub struct TooMuch {
    /// Bytes asked for.
    pub asked: u64,
    /// Bytes there can be.
    pub region: u64,
}

/// Sizes, in bytes, and counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MemStats {
    /// The region's size: the most that can be plugged.
    pub region: u64,
    /// What of it may be used.
    pub usable: u64,
    /// What the host asks the guest to have plugged.
    pub requested: u64,
    /// What the guest has plugged.
    pub plugged: u64,
    /// Requests that were refused.
    pub refused: u64,
}

/// The device.
#[derive(Debug)]
pub struct Mem {
    core: Core<OneQueue>,
    ram: GuestRam,
    region: RamRegion,
    step: u64,
    requested: AtomicU64,
    blocks: Mutex<Blocks>,
    refused: AtomicU64,
    reminder: Reminder,
}

impl Mem {
    /// A device that works on `events`. Nothing is plugged, or asked for.
    ///
    /// # Errors
    /// [`MemError`].
    pub fn new(config: MemConfig, events: &EventLoop) -> Result<Arc<Self>, MemError> {
        let MemConfig { name, ram, step } = config;
        let region = ram.growing_region().cloned().ok_or(MemError::NoRegion)?;
        let RamRegion { start, size, .. } = region;
        let whole = |n: u64| step != 0 && step.is_multiple_of(BLOCK) && n.is_multiple_of(step);
        if !whole(start) || !whole(size) {
            return Err(MemError::Region { start, size, step });
        }
        let core = Core::new(&name, &[QUEUE_SIZE]).map_err(MemError::Start)?;
        let device = Arc::new(Self {
            core,
            ram,
            step,
            requested: AtomicU64::new(0),
            blocks: Mutex::new(Blocks::new((size / BLOCK) as usize)),
            refused: AtomicU64::new(0),
            reminder: Reminder::new().map_err(|e| MemError::Start(e.into()))?,
            region,
        });
        let registrar = events.subscribe(device.clone());
        registrar.add(&device.core.slots()[0].doorbell, 0, Interest::READ)?;
        device.reminder.watch(&registrar, REMINDER)?;
        Ok(device)
    }

    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the guest use so much of the region that `bytes` of it can be plugged, for good. The engine has to hear of it
    /// before the guest does ([`Mem::request`]).
    ///
    /// # Errors
    /// [`TooMuch`].
    pub fn make_usable(&self, bytes: u64) -> Result<(), TooMuch> {
        self.check(bytes)?;
        // Does not overflow: the region is a whole number of steps.
        self.region.tracker.make_usable(bytes.next_multiple_of(self.step));
        Ok(())
    }

    /// Asks the guest to have `bytes` plugged in all, rounded up to whole blocks.
    ///
    /// # Errors
    /// [`TooMuch`]; nothing has changed.
    pub fn request(&self, bytes: u64) -> Result<(), TooMuch> {
        self.check(bytes)?;
        let bytes = bytes.next_multiple_of(BLOCK);
        // Not while the guest plugs something by the request before: nobody would remind it of that.
        let before = {
            let _blocks = self.blocks();
            self.requested.swap(bytes, Ordering::AcqRel)
        };
        if before != bytes {
            self.core.config_changed();
        }
        self.reminder.begin(self.keeps_too_much());
        Ok(())
    }

    /// Whether the guest has something to give back.
    fn keeps_too_much(&self) -> bool {
        self.plugged() > self.requested.load(Ordering::Acquire)
    }

    fn remind(&self) {
        if self.reminder.is_due(self.keeps_too_much()) {
            // Not while it stands still.
            self.core.serve(|_, link| {
                link.config_changed();
                Ok(())
            });
        }
    }

    fn check(&self, asked: u64) -> Result<(), TooMuch> {
        let region = self.region.size;
        if asked > region { Err(TooMuch { asked, region }) } else { Ok(()) }
    }

    /// Sizes and counts.
    pub fn stats(&self) -> MemStats {
        MemStats {
            region: self.region.size,
            usable: self.region.usable(),
            requested: self.requested.load(Ordering::Acquire),
            plugged: self.plugged(),
            refused: self.refused.load(Ordering::Relaxed),
        }
    }

    fn plugged(&self) -> u64 {
        self.blocks().plugged() as u64 * BLOCK
    }

    fn answer(&self, request: Request) -> Answer {
        let mut blocks = self.blocks();
        let numbers =
            |named: request::Blocks| named.numbers(self.region.start, self.region.usable());
        let answer = match request {
            Request::Plug(named) => numbers(named).map(|range| self.plug(&mut blocks, range)),
            Request::Unplug(named) => numbers(named).map(|range| self.unplug(&mut blocks, range)),
            Request::UnplugAll => Some(self.unplug_all(&mut blocks)),
            Request::State(named) => numbers(named).map(|range| state(&blocks, range)),
            Request::Unknown => None,
        };
        let answer = answer.unwrap_or(Answer::Error);
        if !matches!(answer, Answer::Ack | Answer::State(_)) {
            self.refused.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(device = self.core.name(), "{request:?} is answered by {answer:?}");
        }
        answer
    }

    fn plug(&self, blocks: &mut Blocks, range: Range<usize>) -> Answer {
        if blocks.plugged_in(range.clone()) != 0 {
            return Answer::Error;
        }
        let after = (blocks.plugged() + range.len()) as u64 * BLOCK;
        if after > self.requested.load(Ordering::Acquire) {
            return Answer::Nack;
        }
        blocks.set(range, true);
        Answer::Ack
    }

    fn unplug(&self, blocks: &mut Blocks, range: Range<usize>) -> Answer {
        if blocks.plugged_in(range.clone()) != range.len() {
            return Answer::Error;
        }
        if !self.discard(&range) {
            return Answer::Busy;
        }
        blocks.set(range, false);
        Answer::Ack
    }

    fn unplug_all(&self, blocks: &mut Blocks) -> Answer {
        for run in blocks.runs() {
            if !self.discard(&run) {
                return Answer::Busy;
            }
            blocks.set(run, false);
        }
        Answer::Ack
    }

    /// Gives the blocks' memory back to the host.
    fn discard(&self, range: &Range<usize>) -> bool {
        let (at, len) = (range.start as u64 * BLOCK, range.len() as u64 * BLOCK);
        self.ram.discard(self.region.start + at, len) == len
    }
}

fn state(blocks: &Blocks, range: Range<usize>) -> Answer {
    let plugged = blocks.plugged_in(range.clone());
    Answer::State(match plugged {
        0 => State::Unplugged,
        all if all == range.len() => State::Plugged,
        _ => State::Mixed,
    })
}

impl Subscriber for Mem {
    fn ready(&self, source: Source) {
        if source.token == REMINDER {
            self.remind();
            return;
        }
        self.core.serve_one(|chain, memory| {
            self.answer(Request::read(chain, memory)?).write(chain, memory)
        });
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> DeviceType {
        DeviceType::Memory
    }

    fn features(&self) -> u64 {
        UNPLUGGED_INACCESSIBLE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; CONFIG];
        let MemStats { region, usable, requested, plugged, .. } = self.stats();
        // The second word is the NUMA node, without VIRTIO_MEM_F_ACPI_PXM nobody's.
        let words = [BLOCK, 0, self.region.start, region, usable, plugged, requested];
        for (place, word) in config.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *place = word.to_le_bytes();
        }
        super::read_config_bytes(&config, offset, data);
    }

    fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        self.core.start_one(activation)
    }

    // The blocks are not touched by it (5.15).
    fn reset(&self) {
        self.core.stop();
    }

    fn queue_states(&self) -> Vec<Option<QueueState>> {
        self.core.states_of_one()
    }

    fn save(&self) -> DeviceState {
        DeviceState::Memory {
            requested: self.requested.load(Ordering::Acquire),
            usable: self.region.usable(),
            plugged: self.blocks().words().to_vec(),
        }
    }

    fn restore(&self, state: &DeviceState) -> Result<(), ActivateError> {
        let DeviceState::Memory { requested, usable, plugged } = state else {
            return Err(ActivateError::WrongState);
        };
        let count = (self.region.size / BLOCK) as usize;
        let blocks = Blocks::from_words(plugged, count).ok_or(ActivateError::WrongState)?;
        let within = blocks.runs().last().is_none_or(|run| run.end as u64 * BLOCK <= *usable);
        let whole = requested.is_multiple_of(BLOCK) && usable.is_multiple_of(self.step);
        if !whole || !within || requested > usable || *usable > self.region.size {
            return Err(ActivateError::WrongState);
        }
        self.region.tracker.make_usable(*usable);
        self.requested.store(*requested, Ordering::Release);
        *self.blocks() = blocks;
        Ok(())
    }

    common_device_methods!();
}
