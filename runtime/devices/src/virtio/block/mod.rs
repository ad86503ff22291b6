//! Block device (5.2) over an open file: a raw image, or a block device of the host.
//!
//! I/O runs on a thread of the device's own, so that a slow disk holds up nothing else. A slot may
//! start empty (capacity 0) and get its backend later: virtio-mmio has no hotplug.

mod backend;
mod config;
mod request;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{
    ActivateError, Activation, Chain, Core, DeviceType, DriverLink, QueueError, QueueSlot,
    QueueState, VirtQueue, VirtioDevice, common_device_methods,
};
use crate::event_loop::{EventLoop, Interest, Source, Subscriber};
use crate::limit::RateLimit;
pub(crate) use backend::Backend;
use config::{Config, feature};

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
    /// The driver sees a read-only disk. Attached files may be read-only in a writable slot too; then
    /// writes fail.
    pub read_only: bool,
    /// What a flush does.
    pub cache: Cache,
    /// The disk, or an empty slot.
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
    read_only: bool,
    cache: Cache,
    backend: RwLock<Option<Backend>>,
    counters: Counters,
    log: RateLimit,
}

/// The device, with its thread.
#[derive(Debug)]
pub struct Block {
    disk: Arc<Disk>,
    _thread: EventLoop,
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
        let backend = config.file.map(Backend::new).transpose().map_err(file)?;
        let mut serial = [0; 20];
        let len = config.serial.len().min(serial.len());
        serial[..len].copy_from_slice(&config.serial.as_bytes()[..len]);
        let disk = Arc::new(Disk {
            core: Core::new(name, &[QUEUE_SIZE]).map_err(start)?,
            serial,
            read_only: config.read_only,
            cache: config.cache,
            backend: RwLock::new(backend),
            counters: Counters::default(),
            log: RateLimit::new(5, Duration::from_secs(10)),
        });
        let thread = EventLoop::start(name)?;
        let registrar = thread.subscribe(disk.clone());
        registrar.add(&disk.core.slots()[0].doorbell, 0, Interest::READ)?;
        Ok(Arc::new(Self { disk, _thread: thread }))
    }

    /// Puts `file` into the empty slot; the driver is told of the new capacity (5.2.5).
    ///
    /// # Errors
    /// [`BlockError::Occupied`], [`BlockError::File`].
    pub fn attach(&self, file: File) -> Result<(), BlockError> {
        let name = self.disk.core.name();
        let backend =
            Backend::new(file).map_err(|source| BlockError::File { name: name.into(), source })?;
        let mut slot = self.disk.backend.write().unwrap_or_else(PoisonError::into_inner);
        if slot.is_some() {
            return Err(BlockError::Occupied(name.into()));
        }
        *slot = Some(backend);
        drop(slot);
        self.disk.core.config_changed();
        Ok(())
    }

    /// Empties the slot, once no request uses the file, and returns the file if there was one.
    /// Requests still to come fail.
    pub fn detach(&self) -> Option<File> {
        let backend = self.disk.backend.write().unwrap_or_else(PoisonError::into_inner).take();
        self.disk.core.config_changed();
        backend.map(Backend::into_file)
    }

    /// Looks at the size of the file again, after it has grown or shrunk. Returns bytes.
    ///
    /// # Errors
    /// [`BlockError::File`].
    pub fn resize(&self) -> Result<u64, BlockError> {
        let mut slot = self.disk.backend.write().unwrap_or_else(PoisonError::into_inner);
        let Some(backend) = slot.as_mut() else { return Ok(0) };
        let refused = |source| BlockError::File { name: self.disk.core.name().into(), source };
        let sectors = backend.refresh().map_err(refused)?;
        drop(slot);
        self.disk.core.config_changed();
        Ok(sectors * SECTOR)
    }

    /// True if there is no disk in the slot.
    pub fn is_empty(&self) -> bool {
        self.disk.backend.read().unwrap_or_else(PoisonError::into_inner).is_none()
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
    fn capacity(&self) -> u64 {
        let backend = self.backend.read().unwrap_or_else(PoisonError::into_inner);
        backend.as_ref().map_or(0, Backend::sectors)
    }

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

    fn features(&self) -> u64 {
        let writable = feature::FLUSH | feature::DISCARD | feature::WRITE_ZEROES;
        let always = feature::SEG_MAX | feature::BLK_SIZE;
        always | if self.disk.read_only { feature::RO } else { writable }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = Config { capacity: self.disk.capacity(), seg_max: u32::from(QUEUE_SIZE) - 2 };
        super::read_config_bytes(&config.to_bytes(), offset, data);
    }

    fn activate(&self, mut activation: Activation) -> Result<(), ActivateError> {
        let queue = activation.take(0)?;
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
