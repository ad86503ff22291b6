//! Slots: block devices whose disk comes and goes while the guest runs.
//!
//! virtio-mmio cannot add devices. What it has is places whose DeviceID is 0, which drivers leave alone (virtio 1.2,
//! 4.2.2): an empty slot is such a place. Once there is a disk in it, whoever looks there again finds a device with that
//! disk's size and properties. Before the disk is taken out the guest is to let go of the device; one that does not gets
//! errors.

use std::fs::File;
use std::io;
use std::sync::{Arc, PoisonError};

use super::{Backend, Block, BlockError, Disk};
use crate::event_loop::{EventLoop, Interest};

/// What is in a slot.
#[derive(Debug)]
pub(super) struct Medium {
    pub backend: Backend,
    pub read_only: bool,
}

impl Medium {
    pub fn new(file: File, read_only: bool) -> io::Result<Self> {
        Ok(Self { backend: Backend::new(file)?, read_only })
    }
}

impl Block {
    /// Puts `file` into the empty slot, for a driver that looks at the device from now on.
    ///
    /// # Errors
    /// [`BlockError`]: there is a disk in it already, or the file cannot be used.
    pub fn attach(&self, file: File, read_only: bool) -> Result<(), BlockError> {
        let name = self.disk.core.name();
        let medium = Medium::new(file, read_only)
            .map_err(|source| BlockError::File { name: name.into(), source })?;
        self.start_thread()?;
        let mut slot = self.disk.medium.write().unwrap_or_else(PoisonError::into_inner);
        if slot.is_some() {
            return Err(BlockError::Occupied(name.into()));
        }
        *slot = Some(Arc::new(medium));
        drop(slot);
        // For a driver that has never let go.
        self.disk.core.config_changed();
        Ok(())
    }

    /// Empties the slot: requests still to come fail. The file is closed when none uses it any more, which is not
    /// waited for. Returns false if there was none.
    pub fn detach(&self) -> bool {
        let medium = self.disk.medium.write().unwrap_or_else(PoisonError::into_inner).take();
        self.disk.core.config_changed();
        medium.is_some()
    }

    /// True if there is no disk in the slot.
    pub fn is_empty(&self) -> bool {
        self.disk.medium().is_none()
    }

    /// Starts the device's thread unless it runs: an empty slot needs none.
    pub(super) fn start_thread(&self) -> Result<(), BlockError> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_none() {
            let started = EventLoop::start(self.disk.core.name())?;
            let registrar = started.subscribe(self.disk.clone());
            registrar.add(&self.disk.core.slots()[0].doorbell, 0, Interest::READ)?;
            *thread = Some(started);
        }
        Ok(())
    }
}

impl Disk {
    /// What is in the slot.
    pub(super) fn medium(&self) -> Option<Arc<Medium>> {
        self.medium.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// In sectors.
    pub(super) fn capacity(&self) -> u64 {
        self.medium().map_or(0, |medium| medium.backend.sectors())
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.medium().is_some_and(|medium| medium.read_only)
    }
}
