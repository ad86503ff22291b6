//! A piece of guest memory that structures are put into one after the other.

use mvm_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use super::Error;

/// Structures that refer to each other by guest physical address.
#[derive(Debug)]
pub struct Area {
    start: u64,
    room: usize,
    bytes: Vec<u8>,
}

impl Area {
    /// An area of `room` bytes at `start`, in which the first `reserved` bytes are filled in last, by
    /// [`Area::write`].
    pub fn new(start: u64, room: usize, reserved: usize) -> Self {
        Self { start, room, bytes: vec![0; reserved] }
    }

    /// Appends `bytes` at a multiple of 8 and returns their address.
    pub fn put(&mut self, bytes: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        let at = self.start + self.bytes.len() as u64;
        self.bytes.extend_from_slice(bytes);
        at
    }

    /// Puts `head` into the reserved place and everything into guest memory.
    ///
    /// # Errors
    /// There is more than room, or guest memory does not reach there.
    pub fn write(mut self, what: &'static str, head: &[u8], ram: &GuestRam) -> Result<(), Error> {
        let failed = Error::Structure { what, at: self.start };
        let fits = self.bytes.len() <= self.room;
        match self.bytes.get_mut(..head.len()) {
            Some(place) if fits => place.copy_from_slice(head),
            _ => return Err(failed),
        }
        ram.memory().write_slice(&self.bytes, GuestAddress(self.start)).map_err(|_| failed)
    }
}
