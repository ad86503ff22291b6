//! Transfers to guest memory, each told by a descriptor there: control (32 bits), length (32 bits),
//! address (64 bits), all big-endian.

use mvm_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _};

use super::State;

/// Bytes of a descriptor.
const DESCRIPTOR: usize = 16;

/// Bytes copied at a time.
const CHUNK: usize = 4096;

/// Bits of the control word. What is left of it in the end says how it went: nothing, or an error.
mod control {
    pub const ERROR: u32 = 1 << 0;
    pub const READ: u32 = 1 << 1;
    pub const SKIP: u32 = 1 << 2;
    pub const SELECT: u32 = 1 << 3;
    pub const WRITE: u32 = 1 << 4;
}

impl State {
    /// Does what the descriptor at `at` says. A descriptor that is not in guest memory says nothing,
    /// and there is no place to say so.
    pub(super) fn transfer(&mut self, ram: &GuestRam, at: u64) {
        let mut bytes = [0; DESCRIPTOR];
        if ram.memory().read_slice(&mut bytes, GuestAddress(at)).is_err() {
            return;
        }
        let control = be32(&bytes[..4]);
        let length = be32(&bytes[4..8]);
        let address = u64::from(be32(&bytes[8..12])) << 32 | u64::from(be32(&bytes[12..]));
        if control & control::SELECT != 0 {
            self.select((control >> 16) as u16);
        }
        let done = if control & control::READ != 0 {
            self.copy(ram, address, length)
        } else if control & control::WRITE != 0 {
            // No item takes anything.
            false
        } else {
            if control & control::SKIP != 0 {
                self.offset = self.offset.saturating_add(length.into());
            }
            true
        };
        let result = if done { 0 } else { control::ERROR };
        // It was read from there.
        let _ = ram.memory().write_slice(&result.to_be_bytes(), GuestAddress(at));
    }

    /// Copies the next `length` bytes of the selected item; all of them have a place, or none is
    /// copied.
    fn copy(&mut self, ram: &GuestRam, address: u64, length: u32) -> bool {
        if !ram.memory().check_range(GuestAddress(address), length as usize) {
            return false;
        }
        let mut buf = [0; CHUNK];
        let end = address + u64::from(length);
        let mut at = address;
        while at < end {
            let chunk = &mut buf[..(end - at).min(CHUNK as u64) as usize];
            self.read(chunk);
            if ram.memory().write_slice(chunk, GuestAddress(at)).is_err() {
                return false;
            }
            at += chunk.len() as u64;
        }
        true
    }
}

fn be32(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |word, byte| word << 8 | u32::from(*byte))
}
