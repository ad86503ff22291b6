//! What the driver asks for, and what it is answered (5.15).

use std::ops::Range;

use mvm_memory::GuestMemory;

use super::BLOCK;
use crate::virtio::{Chain, QueueError};

/// Bytes of a request, whatever it asks for.
const REQUEST: u64 = 24;
/// Bytes of an answer.
const ANSWER: usize = 10;

/// What the driver asks for. Ranges are the guest's physical addresses, and not checked yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    Plug(Blocks),
    Unplug(Blocks),
    UnplugAll,
    State(Blocks),
    /// No such request.
    Unknown,
}

/// A range of blocks as the driver names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Blocks {
    pub address: u64,
    pub count: u16,
}

impl Blocks {
    /// Their numbers in a region that begins at `start` and of which the first `usable` bytes can be used; `None` if
    /// they are not all there, not on a block's border, or none.
    pub fn numbers(self, start: u64, usable: u64) -> Option<Range<usize>> {
        let offset = self.address.checked_sub(start)?;
        let end = offset.checked_add(u64::from(self.count) * BLOCK)?;
        if self.count == 0 || !offset.is_multiple_of(BLOCK) || end > usable {
            return None;
        }
        Some(usize::try_from(offset / BLOCK).ok()?..usize::try_from(end / BLOCK).ok()?)
    }
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// Done.
    Ack,
    /// Not now: more would be plugged than was asked for.
    Nack,
    /// The host could not do it; it can be tried again.
    Busy,
    /// The request makes no sense.
    Error,
    /// What was asked.
    State(State),
}

/// What a range of blocks is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub(super) enum State {
    Plugged = 0,
    Unplugged = 1,
    Mixed = 2,
}

impl Request {
    /// Reads the request that is in `chain`.
    ///
    /// # Errors
    /// There is none, or no room for the answer.
    pub fn read(chain: &Chain, memory: &GuestMemory) -> Result<Self, QueueError> {
        if chain.readable_len() < REQUEST || chain.writable_len() < ANSWER as u64 {
            return Err(QueueError::Request(
                "memory request without all of it, or room for an answer",
            ));
        }
        let mut raw = [0; REQUEST as usize];
        chain.read(memory, 0, &mut raw)?;
        let raw = raw.as_chunks::<8>().0;
        let [kind, address, count] = [0, 1, 2].map(|word| u64::from_le_bytes(raw[word]));
        let blocks = Blocks { address, count: count as u16 };
        Ok(match kind as u16 {
            0 => Self::Plug(blocks),
            1 => Self::Unplug(blocks),
            2 => Self::UnplugAll,
            3 => Self::State(blocks),
            _ => Self::Unknown,
        })
    }
}

impl Answer {
    /// Writes it to `chain`. Returns the bytes written.
    ///
    /// # Errors
    /// [`QueueError::Memory`].
    pub fn write(self, chain: &Chain, memory: &GuestMemory) -> Result<u32, QueueError> {
        let (kind, state): (u8, u8) = match self {
            Self::Ack => (0, 0),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
            Self::State(state) => (0, state as u8),
        };
        let mut raw = [0; ANSWER];
        (raw[0], raw[8]) = (kind, state);
        chain.write(memory, 0, &raw)?;
        Ok(ANSWER as u32)
    }
}
