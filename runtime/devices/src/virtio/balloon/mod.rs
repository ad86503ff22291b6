//! Memory balloon (5.5): the guest gives pages back to the host, because it was asked to (inflation) or
//! because it has no use for them (free page reporting).
//!
//! A page given back is dropped from guest RAM; it is there again, zeroed, when the guest touches it.

mod pages;
mod stats;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use mvm_memory::{GuestRam, PAGE_SIZE};
use serde::Serialize;

use super::{
    ActivateError, Activation, Chain, Core, DeviceState, DeviceType, Drained, QueueError,
    QueueState, VirtQueue, VirtioDevice, common_device_methods,
};
use crate::event_loop::{EventLoop, EventLoopError, Interest, Source, Subscriber};
pub use stats::GuestMemoryStats;
use stats::StatsQueue;

mod feature {
    pub const STATS_VQ: u64 = 1 << 1;
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub const REPORTING: u64 = 1 << 5;
}

const QUEUE_SIZE: u16 = 128;
const QUEUES: usize = 5;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const FIRST_OPTIONAL: usize = 2;
/// Where the specification has the reporting queue, whatever else was negotiated (5.5.2); Linux counts
/// only the queues that exist.
const REPORTING_FIXED: usize = 4;

/// How the device is set up.
#[derive(Debug, Clone)]
pub struct BalloonConfig {
    /// Name for logs.
    pub name: String,
    /// The guest may take pages back by itself before it kills a process for want of memory.
    pub deflate_on_oom: bool,
    /// The guest reports free pages as it goes.
    pub reporting: bool,
}

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum BalloonError {
    /// The host has no more descriptors.
    #[error("cannot make the balloon: {0}")]
    Start(io::Error),
    /// The event loop refused a descriptor.
    #[error(transparent)]
    Watch(#[from] EventLoopError),
}

/// Counters, and the balloon's size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BalloonStats {
    /// Bytes the host asks for.
    pub target: u64,
    /// Bytes the guest says it gave.
    pub actual: u64,
    /// Bytes dropped by inflation so far.
    pub inflated: u64,
    /// Bytes dropped by reports so far.
    pub reported: u64,
    /// What the guest last said of its memory.
    pub guest: GuestMemoryStats,
}

#[derive(Debug)]
struct Work {
    ram: GuestRam,
    inflate: VirtQueue,
    deflate: VirtQueue,
    stats: Option<(usize, StatsQueue)>,
    reporting: Option<(usize, VirtQueue)>,
    chain: Chain,
    frames: Vec<u32>,
}

/// The device.
#[derive(Debug)]
pub struct Balloon {
    core: Core<Work>,
    config: BalloonConfig,
    /// In pages.
    target: AtomicU32,
    actual: AtomicU32,
    inflated: AtomicU64,
    reported: AtomicU64,
    guest: std::sync::Mutex<GuestMemoryStats>,
}

impl Balloon {
    /// A device that works on `events`.
    ///
    /// # Errors
    /// [`BalloonError`].
    pub fn new(config: BalloonConfig, events: &EventLoop) -> Result<Arc<Self>, BalloonError> {
        let core = Core::new(&config.name, &[QUEUE_SIZE; QUEUES]).map_err(BalloonError::Start)?;
        let device = Arc::new(Self {
            core,
            config,
            target: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            inflated: AtomicU64::new(0),
            reported: AtomicU64::new(0),
            guest: std::sync::Mutex::default(),
        });
        let registrar = events.subscribe(device.clone());
        for (token, slot) in device.core.slots().iter().enumerate() {
            registrar.add(&slot.doorbell, token as u64, Interest::READ)?;
        }
        Ok(device)
    }

    /// Asks the guest to give up `bytes` in all (rounded down to pages); less than now gives back.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE_SIZE as u64).unwrap_or(u32::MAX);
        if self.target.swap(pages, Ordering::AcqRel) != pages {
            self.core.config_changed();
        }
    }

    /// Asks the guest for news of its memory; they are in [`Balloon::stats`] a little later.
    pub fn request_guest_stats(&self) {
        self.core.serve(|work, link| {
            if let Some((_, stats)) = work.stats.as_mut()
                && stats.request()?
            {
                link.used();
            }
            Ok(())
        });
    }

    /// Counters.
    pub fn stats(&self) -> BalloonStats {
        let pages = |counter: &AtomicU32| u64::from(counter.load(Ordering::Acquire));
        BalloonStats {
            target: pages(&self.target) * PAGE_SIZE as u64,
            actual: pages(&self.actual) * PAGE_SIZE as u64,
            inflated: self.inflated.load(Ordering::Relaxed),
            reported: self.reported.load(Ordering::Relaxed),
            guest: self.guest.lock().unwrap_or_else(|e| e.into_inner()).clone(),
        }
    }

    fn serve_queue(&self, index: usize, work: &mut Work) -> Result<Option<Drained>, QueueError> {
        let Work { ram, inflate, deflate, stats, reporting, chain, frames } = work;
        match index {
            INFLATE => inflate
                .drain(chain, |chain, memory| {
                    let released = pages::drop_frames(ram, chain, memory, frames)?;
                    self.inflated.fetch_add(released, Ordering::Relaxed);
                    Ok(0)
                })
                .map(Some),
            // The pages come back by being touched.
            DEFLATE => deflate.drain(chain, |_, _| Ok(0)).map(Some),
            _ => {
                if let Some((at, stats)) = stats
                    && *at == index
                {
                    if let Some(news) = stats.take(chain)? {
                        *self.guest.lock().unwrap_or_else(|e| e.into_inner()) = news;
                    }
                } else if let Some((at, queue)) = reporting
                    && *at == index
                {
                    let served = queue.drain(chain, |chain, _| {
                        let released = pages::drop_ranges(ram, chain);
                        self.reported.fetch_add(released, Ordering::Relaxed);
                        Ok(0)
                    });
                    return served.map(Some);
                }
                Ok(None)
            }
        }
    }
}

impl Subscriber for Balloon {
    fn ready(&self, source: Source) {
        let index = source.token as usize;
        let Some(slot) = self.core.slots().get(index) else { return };
        slot.clear();
        self.core.serve_queue(index, |work| self.serve_queue(index, work));
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn features(&self) -> u64 {
        let oom = if self.config.deflate_on_oom { feature::DEFLATE_ON_OOM } else { 0 };
        let reporting = if self.config.reporting { feature::REPORTING } else { 0 };
        feature::STATS_VQ | oom | reporting
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let words = [&self.target, &self.actual].map(|word| word.load(Ordering::Acquire));
        let mut config = [0; 16];
        config[..4].copy_from_slice(&words[0].to_le_bytes());
        config[4..8].copy_from_slice(&words[1].to_le_bytes());
        super::read_config_bytes(&config, offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        // Only `actual` is the driver's to write (5.5.6).
        if offset == 4
            && let Ok(word) = data.try_into()
        {
            self.actual.store(u32::from_le_bytes(word), Ordering::Release);
        }
    }

    fn activate(&self, mut activation: Activation) -> Result<(), ActivateError> {
        let (inflate, deflate) = (activation.take(INFLATE)?, activation.take(DEFLATE)?);
        let mut next = FIRST_OPTIONAL;
        let mut stats = None;
        if activation.features & feature::STATS_VQ != 0 {
            stats = Some((next, StatsQueue::new(activation.take(next)?)));
            next += 1;
        }
        let mut reporting = None;
        if activation.features & feature::REPORTING != 0 {
            let at =
                if activation.queues[REPORTING_FIXED].is_some() { REPORTING_FIXED } else { next };
            reporting = Some((at, activation.take(at)?));
        }
        self.core.start(Work {
            ram: activation.ram,
            inflate,
            deflate,
            stats,
            reporting,
            chain: Chain::default(),
            frames: Vec::new(),
        });
        Ok(())
    }

    fn reset(&self) {
        self.core.stop();
        self.actual.store(0, Ordering::Release);
    }

    fn queue_states(&self) -> Vec<Option<QueueState>> {
        let mut states = vec![None; QUEUES];
        self.core.inspect(|work| {
            states[INFLATE] = Some(work.inflate.state());
            states[DEFLATE] = Some(work.deflate.state());
            if let Some((at, stats)) = &work.stats {
                states[*at] = Some(stats.state());
            }
            if let Some((at, queue)) = &work.reporting {
                states[*at] = Some(queue.state());
            }
        });
        states
    }

    fn save(&self) -> DeviceState {
        let load = |word: &AtomicU32| word.load(Ordering::Acquire);
        DeviceState::Balloon { target: load(&self.target), actual: load(&self.actual) }
    }

    fn restore(&self, state: &DeviceState) -> Result<(), ActivateError> {
        let DeviceState::Balloon { target, actual } = state else {
            return Err(ActivateError::WrongState);
        };
        self.target.store(*target, Ordering::Release);
        self.actual.store(*actual, Ordering::Release);
        Ok(())
    }

    common_device_methods!();
}
