//! Block devices behind hypercalls, over the same files as virtio's.

use std::io;

use vm_memory::{GuestAddress, GuestMemory as _};

use super::abi::Answer;
use super::{HypercallDisk, Transfer};
use crate::gate::Passage;
use crate::virtio::GuestSlice;
use crate::virtio::block::{Backend, SECTOR};

/// Bytes moved at a time: a machine that ends waits for no more.
const CHUNK: u64 = 4 << 20;

/// A disk under its handle.
#[derive(Debug)]
pub struct Disk {
    handle: u64,
    read_only: bool,
    backend: Backend,
}

impl Disk {
    pub fn new(config: HypercallDisk) -> io::Result<Self> {
        let backend = Backend::new(config.file)?;
        Ok(Self { handle: config.handle, read_only: config.read_only, backend })
    }

    pub fn handle(&self) -> u64 {
        self.handle
    }

    /// In bytes, whole sectors.
    pub fn capacity(&self) -> u64 {
        self.backend.sectors() * SECTOR
    }

    /// From the disk to the guest. All of it or an error.
    pub fn read(&self, transfer: &Transfer<'_>) -> Answer {
        self.transfer(transfer, |slices, offset| self.backend.read(slices, offset))
    }

    /// From the guest to the disk. All of it or an error.
    pub fn write(&self, transfer: &Transfer<'_>) -> Answer {
        if self.read_only {
            return Answer::Invalid;
        }
        self.transfer(transfer, |slices, offset| self.backend.write(slices, offset))
    }

    fn transfer(
        &self,
        transfer: &Transfer<'_>,
        work: impl Fn(Vec<GuestSlice<'_>>, u64) -> io::Result<()>,
    ) -> Answer {
        let Transfer { ram, gate, offset, data, len } = *transfer;
        let whole = offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR);
        if !whole || !self.backend.covers(offset / SECTOR, len / SECTOR) {
            return Answer::Invalid;
        }
        let mut done = 0;
        while done < len {
            if gate.passage() == Passage::Ended {
                return Answer::Failed;
            }
            let now = (len - done).min(CHUNK);
            let slices = ram.memory().get_slices(GuestAddress(data + done), now as usize);
            let moved = slices
                .collect::<Result<Vec<_>, _>>()
                .map_err(io::Error::other)
                .and_then(|slices| work(slices, offset + done));
            if let Err(error) = moved {
                tracing::warn!("hypercall on disk {}: {error}", self.handle);
                return Answer::Failed;
            }
            done += now;
        }
        Answer::Ok
    }
}
