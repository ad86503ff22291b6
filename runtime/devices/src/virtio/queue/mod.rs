//! Split virtqueues (2.7) as devices use them.
//!
//! `virtio-queue` keeps the positions in the rings; here is what a device model needs on top: the
//! chain is checked whole before any of it is used, and every fault of the driver is an error, where
//! the crate would end the chain early.

mod chain;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use mvm_memory::GuestMemory;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use chain::{Buffer, Chain, GuestSlice};

/// Greatest number of descriptors in a chain with an indirect table; a direct chain is bounded by
/// the queue's size (2.7.5.3.1).
pub(crate) const MAX_INDIRECT: u32 = 1024;

/// A chain as `virtio-queue` walks it.
pub type RawChain = DescriptorChain<Arc<GuestMemory>>;

/// A fault in the rings or in a chain; always the driver's.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Zero, no power of two, or more than the device offers.
    #[error("queue size {size} is not a power of two up to {max}")]
    Size {
        /// What the driver wrote.
        size: u16,
        /// What the device offers.
        max: u16,
    },
    /// Part of the queue is misaligned or outside RAM.
    #[error("{part} at {addr:#x} (+{len:#x}) is misaligned or not in RAM")]
    Ring {
        /// Which part.
        part: &'static str,
        /// Where the driver put it.
        addr: u64,
        /// Bytes.
        len: u64,
    },
    /// The available index moved by more than the queue's size.
    #[error("available index is out of step: {0}")]
    AvailIndex(virtio_queue::Error),
    /// A descriptor index is not in its table.
    #[error("descriptor index {index} is not below {size}")]
    DescriptorIndex {
        /// The index.
        index: u16,
        /// Length of the table.
        size: u32,
    },
    /// The chain has more descriptors than allowed, or loops.
    #[error("descriptor chain from {head} does not end within {limit} descriptors")]
    ChainTooLong {
        /// First descriptor.
        head: u16,
        /// What is allowed.
        limit: u32,
    },
    /// A device-readable descriptor follows a device-writable one (2.7.4.2).
    #[error("descriptor chain from {0} has a readable part after a writable one")]
    Order(u16),
    /// An indirect table where none is allowed, or of a bad size.
    #[error("indirect table of {len} bytes in chain {head}: {what}")]
    Indirect {
        /// First descriptor.
        head: u16,
        /// Bytes.
        len: u32,
        /// The rule that was broken.
        what: &'static str,
    },
    /// A buffer is not in RAM.
    #[error("buffer {addr:#x}+{len:#x} is not in RAM")]
    Buffer {
        /// First address.
        addr: u64,
        /// Bytes.
        len: u32,
    },
    /// The chain is longer than 2^32 bytes (2.7.5.2).
    #[error("descriptor chain from {0} is longer than 4 GiB")]
    TooManyBytes(u16),
    /// The chain has fewer bytes than the request needs.
    #[error("chain has {has} bytes where {needs} are needed")]
    Short {
        /// Bytes there.
        has: u64,
        /// Bytes needed.
        needs: u64,
    },
    /// A device-specific request that makes no sense.
    #[error("{0}")]
    Request(&'static str),
    /// Guest memory could not be accessed.
    #[error("guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// The ring could not be accessed.
    #[error("ring: {0}")]
    Access(virtio_queue::Error),
}

/// One queue of a device: its greatest size, and the eventfd that the driver's notification writes.
#[derive(Debug)]
pub struct QueueSlot {
    /// Greatest number of descriptors, a power of two.
    pub max_size: u16,
    /// Readable when the driver has notified.
    pub doorbell: EventFd,
}

impl QueueSlot {
    /// A slot with a fresh, non-blocking doorbell.
    ///
    /// # Errors
    /// The host has no more descriptors.
    pub fn new(max_size: u16) -> io::Result<Self> {
        Ok(Self { max_size, doorbell: EventFd::new(EFD_NONBLOCK)? })
    }

    /// Slots for `sizes`.
    ///
    /// # Errors
    /// The host has no more descriptors.
    pub fn several(sizes: &[u16]) -> io::Result<Vec<Self>> {
        sizes.iter().map(|&size| Self::new(size)).collect()
    }

    /// The doorbell, for a process that serves the queue in the device's place.
    pub fn doorbell_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as its owner, from which it is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.doorbell.as_raw_fd()) }
    }

    /// The same slot once more: notifications reach both, and are taken by whoever looks first.
    ///
    /// # Errors
    /// The host has no more descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { max_size: self.max_size, doorbell: self.doorbell.try_clone()? })
    }

    /// Notifies the device as the driver would.
    pub fn ring(&self) {
        // A full counter is a pending notification already.
        let _ = self.doorbell.write(1);
    }

    /// Takes pending notifications.
    pub fn clear(&self) {
        let _ = self.doorbell.read();
    }
}

/// Where a queue is and how far it has got. Plain data, for the registers and for snapshots.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Number of descriptors.
    pub size: u16,
    /// The driver has enabled it.
    pub ready: bool,
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
    /// Next available entry to take.
    pub next_available: u16,
    /// Next used entry to fill.
    pub next_used: u16,
}

/// A queue at work.
#[derive(Debug)]
pub struct VirtQueue {
    ring: Queue,
    memory: GuestMemory,
    indirect: bool,
    /// The used index when the driver's wish was last looked at.
    signalled: u16,
}

impl VirtQueue {
    /// Opens the queue that `state` describes.
    ///
    /// # Errors
    /// [`QueueError`]: size, alignment or place of a ring.
    pub fn new(
        state: &QueueState,
        max_size: u16,
        memory: GuestMemory,
        features: u64,
    ) -> Result<Self, QueueError> {
        let size = state.size;
        let bad_size = |_| QueueError::Size { size, max: max_size };
        let mut ring = Queue::new(max_size).map_err(bad_size)?;
        ring.try_set_size(size).map_err(bad_size)?;
        let n = u64::from(size);
        for (part, addr, len, align) in [
            ("descriptor table", state.descriptors, 16 * n, 16),
            ("available ring", state.available, 6 + 2 * n, 2),
            ("used ring", state.used, 6 + 8 * n, 4),
        ] {
            if addr % align != 0 || !memory.check_range(GuestAddress(addr), len as usize) {
                return Err(QueueError::Ring { part, addr, len });
            }
        }
        let access = QueueError::Access;
        ring.try_set_desc_table_address(GuestAddress(state.descriptors)).map_err(access)?;
        ring.try_set_avail_ring_address(GuestAddress(state.available)).map_err(access)?;
        ring.try_set_used_ring_address(GuestAddress(state.used)).map_err(access)?;
        ring.set_next_avail(state.next_available);
        ring.set_next_used(state.next_used);
        ring.set_event_idx(features & super::feature::EVENT_IDX != 0);
        ring.set_ready(true);
        let indirect = features & super::feature::INDIRECT_DESC != 0;
        Ok(Self { ring, memory, indirect, signalled: state.next_used })
    }

    /// Guest memory, where the buffers are.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Where it is and how far it has got.
    pub fn state(&self) -> QueueState {
        QueueState {
            size: self.ring.size(),
            ready: true,
            descriptors: self.ring.desc_table(),
            available: self.ring.avail_ring(),
            used: self.ring.used_ring(),
            next_available: self.ring.next_avail(),
            next_used: self.ring.next_used(),
        }
    }

    /// Takes the next chain into `chain`, checked. Returns false if there is none.
    ///
    /// # Errors
    /// [`QueueError`]: the ring or the chain breaks a rule.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        let mut heads = self.ring.iter(&self.memory).map_err(QueueError::AvailIndex)?;
        let Some(head) = heads.next().map(|c| c.head_index()) else { return Ok(false) };
        let table = GuestAddress(self.ring.desc_table());
        chain.load(&self.memory, table, self.ring.size(), head, self.indirect)?;
        Ok(true)
    }

    /// Takes the next chain, checked as by [`VirtQueue::pop`], both as `chain` and as the crate's own
    /// view of it. The latter reads the descriptors again as it goes, and checks them again.
    ///
    /// # Errors
    /// As [`VirtQueue::pop`].
    pub fn pop_raw(
        &mut self,
        memory: &Arc<GuestMemory>,
        chain: &mut Chain,
    ) -> Result<Option<RawChain>, QueueError> {
        let mut heads = self.ring.iter(memory.clone()).map_err(QueueError::AvailIndex)?;
        let Some(raw) = heads.next() else { return Ok(None) };
        let table = GuestAddress(self.ring.desc_table());
        chain.load(memory, table, self.ring.size(), raw.head_index(), self.indirect)?;
        Ok(Some(raw))
    }

    /// Gives the chain taken last back to the available ring.
    pub fn undo_pop(&mut self) {
        self.ring.go_to_previous_position();
    }

    /// Whether a chain is waiting.
    ///
    /// # Errors
    /// [`QueueError::Access`].
    pub fn has_available(&self) -> Result<bool, QueueError> {
        let index = self.ring.avail_idx(&self.memory, Ordering::Acquire);
        Ok(index.map_err(QueueError::Access)?.0 != self.ring.next_avail())
    }

    /// Returns chain `head` to the driver with `len` bytes written to it (2.7.8).
    ///
    /// # Errors
    /// [`QueueError::Access`].
    pub fn push_used(&mut self, head: u16, len: u32) -> Result<(), QueueError> {
        self.ring.add_used(&self.memory, head, len).map_err(QueueError::Access)
    }

    /// Returns several chains at once: the driver sees all of them or none, as it must where one
    /// message is spread over them.
    ///
    /// # Errors
    /// [`QueueError`]: the ring cannot be written.
    pub fn push_used_together(&mut self, used: &[(u16, u32)]) -> Result<(), QueueError> {
        let Some((&(head, len), others)) = used.split_last() else { return Ok(()) };
        let mut next = self.ring.next_used();
        for &(head, len) in others {
            let slot = u64::from(next % self.ring.size());
            let element = u64::from(head) | u64::from(len) << 32;
            // The ring was checked to be in RAM, so this does not wrap.
            let at = GuestAddress(self.ring.used_ring() + 4 + 8 * slot);
            self.memory.write_slice(&element.to_le_bytes(), at)?;
            next = next.wrapping_add(1);
        }
        self.ring.set_next_used(next);
        self.push_used(head, len)
    }

    /// Whether the driver wants an interrupt for what was used since the last call (2.7.7.2).
    ///
    /// # Errors
    /// [`QueueError`]: the ring cannot be read.
    pub fn needs_interrupt(&mut self) -> Result<bool, QueueError> {
        const NO_INTERRUPT: u16 = 1;
        // Orders the write of the used index before the read of what the driver wants.
        std::sync::atomic::fence(Ordering::SeqCst);
        let available = self.ring.avail_ring();
        if !self.ring.event_idx_enabled() {
            let flags: u16 = self.memory.load(GuestAddress(available), Ordering::Relaxed)?;
            return Ok(u16::from_le(flags) & NO_INTERRUPT == 0);
        }
        let at = GuestAddress(available + 4 + 2 * u64::from(self.ring.size()));
        let event = u16::from_le(self.memory.load(at, Ordering::Relaxed)?);
        let new = self.ring.next_used();
        let old = std::mem::replace(&mut self.signalled, new);
        Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
    }

    /// Asks the driver for a notification of the next chain. Returns true if one has come in
    /// meanwhile, which may not be notified.
    ///
    /// # Errors
    /// [`QueueError::Access`].
    pub fn enable_notifications(&mut self) -> Result<bool, QueueError> {
        self.ring.enable_notification(&self.memory).map_err(QueueError::Access)
    }

    /// Tells the driver that notifications are not needed for now.
    ///
    /// # Errors
    /// [`QueueError::Access`].
    pub fn disable_notifications(&mut self) -> Result<(), QueueError> {
        self.ring.disable_notification(&self.memory).map_err(QueueError::Access)
    }

    /// Serves what is available: `serve` gets each chain and answers with the bytes it wrote to it.
    ///
    /// At most one queue's length is served at a time, so that a driver that never stops cannot keep
    /// the thread; the caller rings its own doorbell if [`Drained::more`].
    ///
    /// # Errors
    /// The first [`QueueError`], of the ring or of `serve`.
    pub fn drain(
        &mut self,
        chain: &mut Chain,
        mut serve: impl FnMut(&Chain, &GuestMemory) -> Result<u32, QueueError>,
    ) -> Result<Drained, QueueError> {
        let mut budget = self.size();
        let mut served = 0u32;
        self.disable_notifications()?;
        let more = loop {
            if budget == 0 {
                break true;
            }
            if self.pop(chain)? {
                let len = serve(chain, &self.memory)?;
                self.push_used(chain.head(), len)?;
                budget -= 1;
                served += 1;
            } else if !self.enable_notifications()? {
                break false;
            }
        };
        let interrupt = served > 0 && self.needs_interrupt()?;
        Ok(Drained { served, more, interrupt })
    }
}

/// What [`VirtQueue::drain`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drained {
    /// Chains returned to the driver.
    pub served: u32,
    /// There may be more, and the driver will not say so.
    pub more: bool,
    /// The driver wants to know.
    pub interrupt: bool,
}
