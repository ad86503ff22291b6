//! The block cache of one vCPU.
//!
//! A direct-mapped table in front of a map by identity. When the arena is full everything goes: what is hot
//! comes back soon, and no bookkeeping is spent on the rest.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use super::Block;
use crate::cpu::Mode;
use crate::mmu::{HostAddr, PhysMemory};
use crate::op::Op;

/// Slots of the table in front.
const JUMPS: usize = 8192;
/// Memory for ops, in bytes, before the cache is emptied, where all code is interpreted.
pub const CAPACITY: usize = 24 << 20;
/// The same where what runs more than a few times is translated.
pub const CAPACITY_BESIDE_TRANSLATOR: usize = 2 << 20;
/// What a block costs beyond its ops, about.
const OVERHEAD: usize = 160;

/// Identity of a block: where its first byte is in the host's mapping of guest RAM, and how it is decoded.
#[inline(always)]
pub fn key(host: HostAddr, mode: Mode, single: bool) -> u64 {
    host.addr() << 3 | (mode as u64) << 1 | u64::from(single)
}

#[derive(Default)]
pub struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 29;
    }
}

#[derive(Debug, Clone, Copy)]
struct Jump {
    key: u64,
    id: u32,
}

/// Decoded code of one vCPU.
#[derive(Debug)]
pub struct BlockCache {
    jumps: Box<[Jump]>,
    map: HashMap<u64, u32, BuildHasherDefault<KeyHasher>>,
    blocks: Vec<Block>,
    used: usize,
    capacity: usize,
    /// Keeps the pages alive that the blocks' stamps point to.
    _phys: Arc<PhysMemory>,
    /// Blocks decoded, for the metrics.
    pub decoded: u64,
    /// Times the cache was emptied.
    pub emptied: u64,
}

impl BlockCache {
    /// An empty cache that takes `capacity` bytes at most.
    pub fn new(phys: Arc<PhysMemory>, capacity: usize) -> Self {
        Self {
            jumps: vec![Jump { key: u64::MAX, id: 0 }; JUMPS].into_boxed_slice(),
            map: HashMap::default(),
            blocks: Vec::new(),
            used: 0,
            capacity,
            _phys: phys,
            decoded: 0,
            emptied: 0,
        }
    }

    #[inline(always)]
    fn slot(key: u64) -> usize {
        // Code addresses differ in their low bits first; the mode bits matter least.
        ((key >> 3) ^ (key >> 15)) as usize & (JUMPS - 1)
    }

    /// The number of block `key` if it is in front and fresh.
    #[inline(always)]
    pub fn front(&self, key: u64) -> Option<u32> {
        let jump = &self.jumps[Self::slot(key)];
        if jump.key == key && self.blocks[jump.id as usize].is_fresh() {
            Some(jump.id)
        } else {
            None
        }
    }

    /// The number of block `key` if it is in the cache and fresh; brings it to the front.
    pub fn find(&mut self, key: u64) -> Option<u32> {
        let id = *self.map.get(&key)?;
        let block = self.blocks.get(id as usize)?;
        if !block.is_fresh() {
            return None;
        }
        self.jumps[Self::slot(key)] = Jump { key, id };
        Some(id)
    }

    /// Block number `id`, which this cache has given out since it was last emptied.
    #[inline(always)]
    pub fn at(&self, id: u32) -> &Block {
        &self.blocks[id as usize]
    }

    /// Enters a block, in place of one with the same key.
    pub fn insert(&mut self, block: Block) -> u32 {
        self.decoded += 1;
        let cost = block.ops.len() * size_of::<Op>() + OVERHEAD;
        if self.used + cost > self.capacity {
            self.clear();
            self.emptied += 1;
        }
        let key = block.key;
        let id = match self.map.get(&key) {
            Some(&id) => {
                if let Some(old) = self.blocks.get_mut(id as usize) {
                    self.used -= old.ops.len() * size_of::<Op>() + OVERHEAD;
                    *old = block;
                }
                id
            }
            None => {
                let id = self.blocks.len() as u32;
                self.blocks.push(block);
                self.map.insert(key, id);
                id
            }
        };
        self.used += cost;
        self.jumps[Self::slot(key)] = Jump { key, id };
        id
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.jumps.fill(Jump { key: u64::MAX, id: 0 });
        self.map.clear();
        self.blocks.clear();
        self.used = 0;
    }

    /// Bytes of decoded code.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Blocks in the cache.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }
}
