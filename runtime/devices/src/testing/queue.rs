//! The driver's side of a split virtqueue.

use std::sync::atomic::{Ordering, fence};

use mvm_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

/// A buffer that the driver offers.
#[derive(Debug, Clone, Copy)]
pub struct Segment {
    /// Guest physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// The device may write it.
    pub write: bool,
}

impl Segment {
    /// A buffer for the device to read.
    pub fn readable(addr: u64, len: u32) -> Self {
        Self { addr, len, write: false }
    }

    /// A buffer for the device to write.
    pub fn writable(addr: u64, len: u32) -> Self {
        Self { addr, len, write: true }
    }
}

/// One queue as a driver keeps it.
#[derive(Debug)]
pub struct DriverQueue {
    ram: GuestRam,
    index: u32,
    size: u16,
    base: u64,
    event_idx: bool,
    free: Vec<u16>,
    chains: Vec<Vec<u16>>,
    next_available: u16,
    next_used: u16,
    notified: u16,
}

impl DriverQueue {
    /// Bytes that a queue of `size` takes.
    pub fn bytes(size: u16) -> u64 {
        Self::used_offset(size) + 6 + 8 * u64::from(size)
    }

    fn used_offset(size: u16) -> u64 {
        (16 * u64::from(size) + 6 + 2 * u64::from(size)).next_multiple_of(4)
    }

    pub(super) fn new(ram: GuestRam, index: u32, size: u16, base: u64, event_idx: bool) -> Self {
        let free = (0..size).rev().collect();
        let chains = vec![Vec::new(); usize::from(size)];
        Self {
            ram,
            index,
            size,
            base,
            event_idx,
            free,
            chains,
            next_available: 0,
            next_used: 0,
            notified: 0,
        }
    }

    /// Its number.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Descriptors not in use.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Address of the descriptor table.
    pub fn descriptors(&self) -> u64 {
        self.base
    }

    /// Address of the available ring.
    pub fn available(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    /// Address of the used ring.
    pub fn used(&self) -> u64 {
        self.base + Self::used_offset(self.size)
    }

    /// Makes a chain available; the device is not notified. Returns its head.
    pub fn offer(&mut self, chain: &[Segment]) -> u16 {
        assert!(!chain.is_empty() && chain.len() <= self.free.len(), "no room for the chain");
        let ids: Vec<u16> = chain.iter().filter_map(|_| self.free.pop()).collect();
        for (i, (segment, &id)) in chain.iter().zip(&ids).enumerate() {
            let next = ids.get(i + 1);
            let flags = u16::from(next.is_some()) | u16::from(segment.write) << 1;
            self.write_descriptor(id, segment.addr, segment.len, flags, next.copied().unwrap_or(0));
        }
        let head = ids[0];
        self.chains[usize::from(head)] = ids;
        self.publish(head);
        head
    }

    /// Makes a chain in an indirect table at `table` available.
    pub fn offer_indirect(&mut self, table: u64, chain: &[Segment]) -> u16 {
        for (i, segment) in chain.iter().enumerate() {
            let last = i + 1 == chain.len();
            let flags = u16::from(!last) | u16::from(segment.write) << 1;
            let raw = raw_descriptor(segment.addr, segment.len, flags, i as u16 + 1);
            self.put(table + 16 * i as u64, &raw);
        }
        let head = self.free.pop().expect("room for a descriptor");
        self.write_descriptor(head, table, 16 * chain.len() as u32, 4, 0);
        self.chains[usize::from(head)] = vec![head];
        self.publish(head);
        head
    }

    /// Writes descriptor `id` as it is.
    pub fn write_descriptor(&self, id: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.put(self.descriptors() + 16 * u64::from(id), &raw_descriptor(addr, len, flags, next));
    }

    /// Puts `head` in the available ring and moves the index.
    pub fn publish(&mut self, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        self.put(self.available() + 4 + 2 * slot, &head.to_le_bytes());
        self.next_available = self.next_available.wrapping_add(1);
        self.set_available_index(self.next_available);
    }

    /// Writes the available index as it is.
    pub fn set_available_index(&self, index: u16) {
        let at = GuestAddress(self.available() + 2);
        self.ram.memory().store(index.to_le(), at, Ordering::Release).expect("ring in RAM");
    }

    /// Whether the device asked to be notified of what was offered since the last call (2.7.10).
    pub fn wants_notification(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.notified, self.next_available);
        if self.event_idx {
            let event = self.get_u16(self.used() + 4 + 8 * u64::from(self.size));
            let new = self.next_available;
            return new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old);
        }
        self.get_u16(self.used()) & 1 == 0
    }

    /// Takes the next used chain: head and bytes written.
    pub fn poll_used(&mut self) -> Option<(u16, u32)> {
        let at = GuestAddress(self.used() + 2);
        let index: u16 = self.ram.memory().load(at, Ordering::Acquire).expect("ring in RAM");
        if u16::from_le(index) == self.next_used {
            return None;
        }
        let slot = u64::from(self.next_used % self.size);
        let mut raw = [0; 8];
        let at = GuestAddress(self.used() + 4 + 8 * slot);
        self.ram.memory().read_slice(&mut raw, at).expect("ring in RAM");
        self.next_used = self.next_used.wrapping_add(1);
        let element = u64::from_le_bytes(raw);
        let (id, len) = (element as u32, (element >> 32) as u32);
        assert!(id < u32::from(self.size), "used id {id}");
        self.free.append(&mut self.chains[id as usize]);
        Some((id as u16, len))
    }

    /// Asks for an interrupt with the next used chain.
    pub fn ask_for_interrupt(&self) {
        let at = self.available() + 4 + 2 * u64::from(self.size);
        self.put(at, &self.next_used.to_le_bytes());
        fence(Ordering::SeqCst);
    }

    fn get_u16(&self, at: u64) -> u16 {
        let value: u16 =
            self.ram.memory().load(GuestAddress(at), Ordering::Acquire).expect("ring in RAM");
        u16::from_le(value)
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.ram.memory().write_slice(bytes, GuestAddress(at)).expect("in RAM");
    }
}

fn raw_descriptor(addr: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let value = u128::from(addr)
        | u128::from(len) << 64
        | u128::from(flags) << 96
        | u128::from(next) << 112;
    value.to_le_bytes()
}
