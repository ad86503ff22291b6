//! The block cache of one vCPU.
//!
//! A direct-mapped table in front of a map by identity. When half of the room is taken, what was not looked for since the last time
//! goes, and no other bookkeeping is spent.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use super::Block;
use crate::cpu::Mode;
use crate::mmu::{HostAddr, PhysMemory};
use crate::op::Op;

/// Slots of the table in front.
const JUMPS: usize = 8192;
/// Memory for ops, in bytes, at most, where all code is interpreted.
pub const CAPACITY: usize = 24 << 20;
/// The same where what runs more than a few times is translated.
pub const CAPACITY_BESIDE_TRANSLATOR: usize = 4 << 20;
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

/// Blocks by identity.
#[derive(Debug, Default)]
struct Generation {
    map: HashMap<u64, u32, BuildHasherDefault<KeyHasher>>,
    blocks: Vec<Block>,
    used: usize,
}

/// Decoded code of one vCPU.
#[derive(Debug)]
pub struct BlockCache {
    jumps: Box<[Jump]>,
    young: Generation,
    /// What was young before.
    old: Generation,
    capacity: usize,
    /// Keeps the pages alive that the blocks' stamps point to.
    _phys: Arc<PhysMemory>,
    /// Blocks decoded, for the metrics.
    pub decoded: u64,
    /// Times that the old half went.
    pub emptied: u64,
}

impl BlockCache {
    /// An empty cache that takes `capacity` bytes at most.
    pub fn new(phys: Arc<PhysMemory>, capacity: usize) -> Self {
        Self {
            jumps: vec![Jump { key: u64::MAX, id: 0 }; JUMPS].into_boxed_slice(),
            young: Generation::default(),
            old: Generation::default(),
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
        if jump.key == key && self.at(jump.id).is_fresh() { Some(jump.id) } else { None }
    }

    /// The number of block `key` if it is in the cache and fresh; brings it to the front.
    pub fn find(&mut self, key: u64) -> Option<u32> {
        let Some(&id) = self.young.map.get(&key) else {
            let id = self.old.map.remove(&key)?;
            let block = std::mem::replace(self.old.blocks.get_mut(id as usize)?, Block::nothing());
            return block.is_fresh().then(|| self.enter(block));
        };
        if !self.young.blocks.get(id as usize)?.is_fresh() {
            return None;
        }
        self.jumps[Self::slot(key)] = Jump { key, id };
        Some(id)
    }

    /// Block number `id`, the last that this cache has given out.
    #[inline(always)]
    pub fn at(&self, id: u32) -> &Block {
        &self.young.blocks[id as usize]
    }

    /// Enters a block that was just decoded, in place of one with the same key.
    pub fn insert(&mut self, block: Block) -> u32 {
        self.decoded += 1;
        self.enter(block)
    }

    fn enter(&mut self, block: Block) -> u32 {
        let cost = |block: &Block| block.ops.len() * size_of::<Op>() + OVERHEAD;
        if self.young.used + cost(&block) > self.capacity / 2 {
            self.jumps.fill(Jump { key: u64::MAX, id: 0 });
            self.old = std::mem::take(&mut self.young);
            self.emptied += 1;
        }
        let key = block.key;
        let Generation { map, blocks, used } = &mut self.young;
        *used += cost(&block);
        let id = match map.get(&key) {
            Some(&id) => {
                if let Some(old) = blocks.get_mut(id as usize) {
                    *used -= cost(old);
                    *old = block;
                }
                id
            }
            None => {
                let id = blocks.len() as u32;
                blocks.push(block);
                map.insert(key, id);
                id
            }
        };
        self.jumps[Self::slot(key)] = Jump { key, id };
        id
    }

    /// Bytes of decoded code.
    pub fn used(&self) -> usize {
        self.young.used + self.old.used
    }

    /// Blocks in the cache.
    pub fn len(&self) -> usize {
        self.young.blocks.len() + self.old.map.len()
    }
}
