//! One descriptor chain, checked (2.7.4, 2.7.5).

use mvm_memory::GuestMemory;
use vm_memory::bitmap::MS;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, VolatileSlice};

use super::{MAX_INDIRECT, QueueError};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const DESCRIPTOR_SIZE: u32 = 16;

/// A piece of guest memory whose writes reach the page tracker.
pub type GuestSlice<'a> = VolatileSlice<'a, MS<'a, GuestMemory>>;

/// A buffer of a chain; lies in RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// First address.
    pub addr: GuestAddress,
    /// Bytes.
    pub len: u32,
}

/// A checked chain: it ends, its buffers are in RAM, readable ones first. Meant to be used again,
/// so that a busy queue allocates nothing.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    readable: Vec<Buffer>,
    writable: Vec<Buffer>,
    readable_len: u64,
    writable_len: u64,
}

struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn read(memory: &GuestMemory, table: GuestAddress, index: u16) -> Result<Self, QueueError> {
        let offset = u64::from(index) * u64::from(DESCRIPTOR_SIZE);
        let addr = table.0.saturating_add(offset);
        let raw = u128::from_le_bytes(memory.read_obj(GuestAddress(addr))?);
        Ok(Self {
            addr: raw as u64,
            len: (raw >> 64) as u32,
            flags: (raw >> 96) as u16,
            next: (raw >> 112) as u16,
        })
    }
}

impl Chain {
    /// Index of the first descriptor, which names the chain.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Buffers that the device reads.
    pub fn readable(&self) -> &[Buffer] {
        &self.readable
    }

    /// Buffers that the device writes.
    pub fn writable(&self) -> &[Buffer] {
        &self.writable
    }

    /// Bytes that the device reads.
    pub fn readable_len(&self) -> u64 {
        self.readable_len
    }

    /// Bytes that the device writes.
    pub fn writable_len(&self) -> u64 {
        self.writable_len
    }

    pub(super) fn load(
        &mut self,
        memory: &GuestMemory,
        table: GuestAddress,
        size: u16,
        head: u16,
        indirect_allowed: bool,
    ) -> Result<(), QueueError> {
        self.readable.clear();
        self.writable.clear();
        (self.readable_len, self.writable_len, self.head) = (0, 0, head);
        let (mut table, mut size, mut limit) = (table, u32::from(size), u32::from(size));
        let (mut index, mut seen, mut indirect) = (head, 0, false);
        loop {
            if u32::from(index) >= size {
                return Err(QueueError::DescriptorIndex { index, size });
            }
            if seen == limit {
                return Err(QueueError::ChainTooLong { head, limit });
            }
            seen += 1;
            let descriptor = Descriptor::read(memory, table, index)?;
            if descriptor.flags & INDIRECT != 0 {
                let bad = |what| QueueError::Indirect { head, len: descriptor.len, what };
                if !indirect_allowed {
                    return Err(bad("the feature was not negotiated"));
                }
                if indirect {
                    return Err(bad("it is inside another"));
                }
                if descriptor.flags & NEXT != 0 {
                    return Err(bad("its descriptor has a successor"));
                }
                if descriptor.len == 0 || descriptor.len % DESCRIPTOR_SIZE != 0 {
                    return Err(bad("it is not a whole number of descriptors"));
                }
                table = GuestAddress(descriptor.addr);
                size = descriptor.len / DESCRIPTOR_SIZE;
                if !memory.check_range(table, descriptor.len as usize) {
                    return Err(bad("it is not in RAM"));
                }
                (index, seen, indirect) = (0, 0, true);
                limit = size.min(MAX_INDIRECT);
                continue;
            }
            self.add(memory, &descriptor)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
    }

    fn add(&mut self, memory: &GuestMemory, descriptor: &Descriptor) -> Result<(), QueueError> {
        let Descriptor { addr, len, flags, .. } = *descriptor;
        let buffer = Buffer { addr: GuestAddress(addr), len };
        if len != 0 && !memory.check_range(buffer.addr, len as usize) {
            return Err(QueueError::Buffer { addr, len });
        }
        if flags & WRITE != 0 {
            self.writable_len += u64::from(len);
            self.writable.push(buffer);
        } else if self.writable.is_empty() {
            self.readable_len += u64::from(len);
            self.readable.push(buffer);
        } else {
            return Err(QueueError::Order(self.head));
        }
        if self.readable_len + self.writable_len > 1 << 32 {
            return Err(QueueError::TooManyBytes(self.head));
        }
        Ok(())
    }

    /// Fills `data` from the readable bytes at `at`.
    ///
    /// # Errors
    /// [`QueueError::Short`]: the chain ends before.
    pub fn read(&self, memory: &GuestMemory, at: u64, data: &mut [u8]) -> Result<(), QueueError> {
        let mut done = 0;
        for part in parts(&self.readable, at, data.len() as u64) {
            let len = part.len as usize;
            memory.read_slice(&mut data[done..done + len], part.addr)?;
            done += len;
        }
        whole(done, data.len(), at, self.readable_len)
    }

    /// Writes `data` to the writable bytes at `at`.
    ///
    /// # Errors
    /// [`QueueError::Short`]: the chain ends before.
    pub fn write(&self, memory: &GuestMemory, at: u64, data: &[u8]) -> Result<(), QueueError> {
        let mut done = 0;
        for part in parts(&self.writable, at, data.len() as u64) {
            let len = part.len as usize;
            memory.write_slice(&data[done..done + len], part.addr)?;
            done += len;
        }
        whole(done, data.len(), at, self.writable_len)
    }

    /// Appends the readable bytes `[at, at + len)` to `out`, as far as they exist.
    ///
    /// # Errors
    /// [`QueueError::Memory`].
    pub fn readable_slices<'m>(
        &self,
        memory: &'m GuestMemory,
        at: u64,
        len: u64,
        out: &mut Vec<GuestSlice<'m>>,
    ) -> Result<(), QueueError> {
        slices(memory, &self.readable, at, len, out)
    }

    /// Appends the writable bytes `[at, at + len)` to `out`, as far as they exist.
    ///
    /// # Errors
    /// [`QueueError::Memory`].
    pub fn writable_slices<'m>(
        &self,
        memory: &'m GuestMemory,
        at: u64,
        len: u64,
        out: &mut Vec<GuestSlice<'m>>,
    ) -> Result<(), QueueError> {
        slices(memory, &self.writable, at, len, out)
    }
}

fn whole(done: usize, wanted: usize, at: u64, has: u64) -> Result<(), QueueError> {
    if done == wanted {
        return Ok(());
    }
    Err(QueueError::Short { has, needs: at.saturating_add(wanted as u64) })
}

fn slices<'m>(
    memory: &'m GuestMemory,
    buffers: &[Buffer],
    at: u64,
    len: u64,
    out: &mut Vec<GuestSlice<'m>>,
) -> Result<(), QueueError> {
    for part in parts(buffers, at, len) {
        for slice in memory.get_slices(part.addr, part.len as usize) {
            out.push(slice?);
        }
    }
    Ok(())
}

/// The pieces of `buffers` that make up the bytes `[at, at + len)`.
fn parts(buffers: &[Buffer], at: u64, len: u64) -> impl Iterator<Item = Buffer> + '_ {
    let (mut skip, mut left) = (at, len);
    buffers.iter().filter_map(move |buffer| {
        let size = u64::from(buffer.len);
        if skip >= size {
            skip -= size;
            return None;
        }
        let from = std::mem::take(&mut skip);
        let take = (size - from).min(left);
        left -= take;
        // Both fit: the buffer lies in RAM, so its addresses do not wrap.
        (take != 0).then(|| Buffer { addr: GuestAddress(buffer.addr.0 + from), len: take as u32 })
    })
}
