//! Virtio devices (OASIS VIRTIO 1.2; section numbers in these pages are its own).
//!
//! A [`VirtioDevice`] knows its queues, features and configuration space, and neither how the driver
//! reaches its registers nor which engine runs it. [`MmioTransport`] is the transport in front of it.
//!
//! A driver that breaks the rules of the rings gets DEVICE_NEEDS_RESET (2.1.2) and one log line;
//! what it cannot get is a panic, a hang, or memory that grows without bound.

pub mod balloon;
pub mod block;
pub mod console;
mod core;
pub mod fs;
mod iov;
mod link;
pub mod mem;
mod mmio;
pub mod net;
mod queue;
pub mod rng;
pub mod vsock;

use std::sync::Arc;

use mvm_memory::GuestRam;
use serde::{Deserialize, Serialize};

pub(crate) use self::core::common_device_methods;
pub use self::core::{Core, OneQueue};
pub use link::DriverLink;
pub use mmio::{MmioState, MmioTransport};
pub use queue::{
    Buffer, Chain, Drained, GuestSlice, QueueError, QueueSlot, QueueState, RawChain, VirtQueue,
};

/// Feature bits that belong to the transport and the rings (6).
pub mod feature {
    /// Indirect descriptor tables (2.7.5.3).
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Event indices in place of the notification flags (2.7.7).
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Not a legacy device; must be accepted.
    pub const VERSION_1: u64 = 1 << 32;
    /// Bits that devices use for their own purposes.
    pub const DEVICE: u64 = 0x00ff_ffff | 0x3fff << 50;
}

/// What kind of device it is (5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs)]
pub enum DeviceType {
    Network = 1,
    Block = 2,
    Console = 3,
    Entropy = 4,
    Balloon = 5,
    Socket = 19,
    Memory = 24,
    FileSystem = 26,
}

/// Why a device could not start.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver left out a queue without which the device cannot work.
    #[error("queue {0} was not set up by the driver")]
    MissingQueue(usize),
    /// The rings as set up cannot be used.
    #[error("queue {index}: {source}")]
    Queue {
        /// Which queue.
        index: usize,
        /// Why.
        source: QueueError,
    },
    /// Whoever does the device's work cannot.
    #[error("{0}")]
    Backend(String),
    /// A saved state does not belong to this device.
    #[error("the saved state is of another kind of device")]
    WrongState,
}

/// All that a device gets when its driver says DRIVER_OK.
#[derive(Debug)]
pub struct Activation {
    /// Guest RAM, for devices that discard pages. Queues carry their own view.
    pub ram: GuestRam,
    /// By index; `None` where the driver set up nothing.
    pub queues: Vec<Option<VirtQueue>>,
    /// Negotiated features.
    pub features: u64,
}

impl Activation {
    /// Takes queue `index`, which the device cannot do without.
    ///
    /// # Errors
    /// [`ActivateError::MissingQueue`].
    pub fn take(&mut self, index: usize) -> Result<VirtQueue, ActivateError> {
        let slot = self.queues.get_mut(index).and_then(Option::take);
        slot.ok_or(ActivateError::MissingQueue(index))
    }
}

/// What a device keeps beyond its queues, for a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// Nothing that its configuration does not say.
    Stateless,
    /// The balloon's size.
    Balloon {
        /// Pages (of 4 KiB) the host asks for.
        target: u32,
        /// Pages the driver says it gave.
        actual: u32,
    },
    /// What of its region a memory device has given, in bytes.
    Memory {
        /// What the host asks the guest to have plugged.
        requested: u64,
        /// What may be used.
        usable: u64,
        /// What is plugged: a bit for each block.
        plugged: Vec<u64>,
    },
    /// What the driver told a network device by its control queue.
    Network {
        /// Queue pairs in use.
        pairs: u16,
        /// Offloads of received packets in use (feature bits).
        offloads: u64,
    },
}

/// One virtio device behind some transport.
///
/// Methods are called from vCPU threads with the transport's lock held; a device never calls the
/// transport, it talks to its driver through the [`DriverLink`].
pub trait VirtioDevice: Send + Sync {
    /// What it is.
    fn device_type(&self) -> DeviceType;

    /// Whether it is there for drivers that look for devices: a transport may have places that are filled later.
    fn is_present(&self) -> bool {
        true
    }

    /// What log lines and statistics call it.
    fn name(&self) -> &str;

    /// Its queues: greatest size and doorbell, which lives as long as the device.
    fn queues(&self) -> &[QueueSlot];

    /// Device features it offers (bits of [`feature::DEVICE`]).
    fn features(&self) -> u64;

    /// Whether it can work with this subset of what was offered (3.1.1, step 5).
    fn accepts(&self, _features: u64) -> bool {
        true
    }

    /// Hands over the way to the driver, once, before anything else.
    fn connect(&self, link: Arc<DriverLink>);

    /// Fills `data` from the configuration space; zeros beyond its end.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Takes a write to the configuration space. Most have nothing writable.
    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    /// Starts work on the queues (3.1.1, step 8).
    ///
    /// # Errors
    /// [`ActivateError`]: the device then needs a reset.
    fn activate(&self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops work and forgets the driver. When it returns, no thread of the device touches guest
    /// memory any more (2.4.1).
    fn reset(&self);

    /// Stops work and keeps everything, until [`VirtioDevice::resume`].
    fn pause(&self);

    /// Goes on after [`VirtioDevice::pause`].
    fn resume(&self);

    /// Positions in the queues, by index; `None` where there is no queue at work.
    fn queue_states(&self) -> Vec<Option<QueueState>>;

    /// The rest of its state. Called while paused.
    fn save(&self) -> DeviceState {
        DeviceState::Stateless
    }

    /// Takes over a saved state, before activation.
    ///
    /// # Errors
    /// [`ActivateError::WrongState`].
    fn restore(&self, _state: &DeviceState) -> Result<(), ActivateError> {
        Ok(())
    }
}

/// Copies the part of `config` at `offset` that exists to `data`, zeros elsewhere.
pub(crate) fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Some(rest) = usize::try_from(offset).ok().and_then(|at| config.get(at..)) else { return };
    let len = rest.len().min(data.len());
    data[..len].copy_from_slice(&rest[..len]);
}
