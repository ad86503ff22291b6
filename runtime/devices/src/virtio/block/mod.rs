//! Block device (5.2) over an open file: a raw image, or a block device of the host.
//!
//! I/O runs on a thread of the device's own, so that a slow disk holds up nothing else. A device may be a [`slot`]
//! that is empty for now.

mod backend;
mod config;
mod request;
mod slot;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{
    ActivateError, Activation, Chain, Core, DeviceType, DriverLink, QueueError, QueueSlot,
    QueueState, VirtQueue, VirtioDevice, common_device_methods,
};
use crate::event_loop::{EventLoop, Source, Subscriber};
use crate::limit::RateLimit;
pub(crate) use backend::Backend;
use config::{Config, feature};
use slot::Medium;

/// The unit of addressing, whatever the block size (5.2.4).
pub const SECTOR: u64 = 512;
const QUEUE_SIZE: u16 = 256;
/// Longest time a finished request waits for others to share its interrupt with.
const COALESCE: Duration = Duration::from_micros(100);

/// What a flush does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cache {
    /// Flushes reach the disk.
    #[default]
    WriteBack,
    /// Flushes do nothing: for scratch disks that nobody reads after the machine.
    Unsafe,
}

/// How a block device is set up.
#[derive(Debug)]
pub struct BlockConfig {
    /// Name for logs and of the thread (15 bytes of it).
    pub name: String,
    /// What GET_ID answers; the first 20 bytes count. Linux shows it as `serial` in sysfs.
    pub serial: String,
    /// `file` is not to be written, and the driver sees that.
    pub read_only: bool,
    /// What a flush does.
    pub cache: Cache,
    /// The disk, or an empty slot: a device that is not there until [`Block::attach`].
    pub file: Option<File>,
}

/// Why a disk could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The thread or a descriptor could not be made.
    #[error("block device {name}: {source}")]
    Start {
        /// The device.
        name: String,
        /// What the host said.
        source: io::Error,
    },
    /// The file's size could not be found out.
    #[error("block device {name}: cannot use the file: {source}")]
    File {
        /// The device.
        name: String,
        /// What the host said.
        source: io::Error,
    },
    /// There is a disk in the slot already.
    #[error("block device {0} has a disk already; detach it first")]
    Occupied(String),
    /// The device's thread could not be started.
    #[error(transparent)]
    Thread(#[from] crate::EventLoopError),
}

/// Counters of one device.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
pub struct BlockStats {
    /// Read requests.
    pub reads: u64,
    /// Write requests.
    pub writes: u64,
    /// Flush requests.
    pub flushes: u64,
    /// Discard and write-zeroes requests.
    pub discards: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Requests answered with an error.
    pub errors: u64,
}

#[derive(Debug, Default)]
struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    discards: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    errors: AtomicU64,
}

#[derive(Debug)]
struct Work {
    queue: VirtQueue,
    chain: Chain,
    /// Without FLUSH there is no other way to make writes durable (5.2.6.2).
    write_through: bool,
}

#[derive(Debug)]
struct Disk {
    core: Core<Work>,
    serial: [u8; 20],
    cache: Cache,
    medium: RwLock<Option<Arc<Medium>>>,
    counters: Counters,
    log: RateLimit,
}

/// The device, with its thread once it has something to do.
#[derive(Debug)]
pub struct Block {
    disk: Arc<Disk>,
    thread: Mutex<Option<EventLoop>>,
}

impl Block {
    /// A device as `config` says.
    ///
    /// # Errors
    /// [`BlockError`].
    pub fn new(config: BlockConfig) -> Result<Arc<Self>, BlockError> {
        let name = &config.name;
        let start = |source| BlockError::Start { name: name.clone(), source };
        let file = |source| BlockError::File { name: name.clone(), source };
        let medium = config.file.map(|file| Medium::new(file, config.read_only));
        let medium = medium.transpose().map_err(file)?;
        let mut serial = [0; 20];
        let len = config.serial.len().min(serial.len());
        serial[..len].copy_from_slice(&config.serial.as_bytes()[..len]);
        let disk = Arc::new(Disk {
            core: Core::new(name, &[QUEUE_SIZE]).map_err(start)?,
            serial,
            cache: config.cache,
            medium: RwLock::new(medium.map(Arc::new)),
            counters: Counters::default(),
            log: RateLimit::new(5, Duration::from_secs(10)),
        });
        let block = Arc::new(Self { disk, thread: Mutex::default() });
        if !block.is_empty() {
            block.start_thread()?;
        }
        Ok(block)
    }

    /// Counters.
    pub fn stats(&self) -> BlockStats {
        let c = &self.disk.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BlockStats {
            reads: get(&c.reads),
            writes: get(&c.writes),
            flushes: get(&c.flushes),
            discards: get(&c.discards),
            read_bytes: get(&c.read_bytes),
            written_bytes: get(&c.written_bytes),
            errors: get(&c.errors),
        }
    }
}

impl Disk {
    /// Serves at most one queue's length of requests. Interrupts go out while it works: the first
    /// request must not wait for the last.
    fn serve_queue(&self, work: &mut Work, link: &DriverLink) -> Result<bool, QueueError> {
        let Work { queue, chain, write_through } = work;
        let mut since_interrupt = Instant::now();
        let mut silent = false;
        let mut more = true;
        queue.disable_notifications()?;
        for _ in 0..queue.size() {
            if !queue.pop(chain)? {
                more = queue.enable_notifications()?;
                if more {
                    continue;
                }
                break;
            }
            let len = self.request(chain, queue.memory(), *write_through)?;
            queue.push_used(chain.head(), len)?;
            silent = true;
            if since_interrupt.elapsed() >= COALESCE {
                silent = false;
                since_interrupt = Instant::now();
                if queue.needs_interrupt()? {
                    link.used();
                }
            }
        }
        if silent && queue.needs_interrupt()? {
            link.used();
        }
        Ok(more)
    }
}

impl Subscriber for Disk {
    fn ready(&self, _source: Source) {
        let slot: &QueueSlot = &self.core.slots()[0];
        slot.clear();
        if self.core.serve(|work, link| self.serve_queue(work, link)) == Some(true) {
            slot.ring();
        }
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn is_present(&self) -> bool {
        !self.is_empty()
    }

    fn features(&self) -> u64 {
        let writable = feature::FLUSH | feature::DISCARD | feature::WRITE_ZEROES;
        let always = feature::SEG_MAX | feature::BLK_SIZE;
        always | if self.disk.is_read_only() { feature::RO } else { writable }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = Config { capacity: self.disk.capacity(), seg_max: u32::from(QUEUE_SIZE) - 2 };
        super::read_config_bytes(&config.to_bytes(), offset, data);
    }

    fn activate(&self, mut activation: Activation) -> Result<(), ActivateError> {
        let queue = activation.take(0)?;
        // Of an empty slot as well: who asks gets answers, if only errors.
        self.start_thread().map_err(|e| ActivateError::Backend(e.to_string()))?;
        let write_through = activation.features & feature::FLUSH == 0;
        self.disk.core.start(Work { queue, chain: Chain::default(), write_through });
        Ok(())
    }

    fn reset(&self) {
        self.disk.core.stop();
    }

    fn queue_states(&self) -> Vec<Option<QueueState>> {
        vec![self.disk.core.inspect(|work| work.queue.state())]
    }

    common_device_methods!(disk);
}
