//! Disks that come and go while the guest runs.
//!
//! Their places are there from the start: a register window and an interrupt for each, in which a driver finds no device
//! until there is a disk ([`mvm_devices::virtio::block`]). The guest has to look there again, and to let go of the disk
//! before it is taken out; somebody in the guest does that ([`Machine::plug`](crate::Machine::plug)).

use std::fs::File;

use mvm_devices::virtio::block::BlockError;

use super::Devices;

/// Why a disk does not come or go.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// All places are taken, or have none but guests that do not let go.
    #[error(
        "the machine has no place left for a disk: it has {places}, {lost} of which the guest has not given back"
    )]
    Full {
        /// How many there are for disks.
        places: usize,
        /// Places without a disk whose driver in the guest is still there.
        lost: usize,
    },
    /// There is nothing to take out.
    #[error("there is no disk at place {place}")]
    NoDisk {
        /// Where it was looked for.
        place: u32,
    },
    /// The disk cannot be used.
    #[error(transparent)]
    Block(#[from] BlockError),
}

impl Devices {
    /// Puts a disk into the first place that is free. Returns the place: the index of its register window.
    ///
    /// # Errors
    /// [`SlotError`].
    pub fn plug(&self, file: File, read_only: bool) -> Result<u32, SlotError> {
        let mut lost = 0;
        // Block devices come first among the virtio devices.
        for ((place, block), transport) in (0..).zip(&self.blocks).zip(self.virtio.transports()) {
            if !block.is_empty() {
                continue;
            }
            if transport.is_driven() {
                lost += 1;
                continue;
            }
            block.attach(file, read_only)?;
            return Ok(place);
        }
        Err(SlotError::Full { places: self.blocks.len(), lost })
    }

    /// Takes out the disk at `place`. The guest should have let go of it: if it has not, it gets errors from now on,
    /// and the place is not used again until it has.
    ///
    /// # Errors
    /// [`SlotError::NoDisk`].
    pub fn unplug(&self, place: u32) -> Result<(), SlotError> {
        let block = usize::try_from(place).ok().and_then(|place| self.blocks.get(place));
        match block {
            Some(block) if block.detach() => Ok(()),
            _ => Err(SlotError::NoDisk { place }),
        }
    }
}
