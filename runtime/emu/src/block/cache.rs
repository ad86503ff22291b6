//! The block cache of one vCPU.
//!
//! A direct-mapped table in front of a map by identity. When half of the room is taken, what was not looked for since the last time
//! goes, and no other bookkeeping is spent.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;
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

/// Blocks by identity, their ops side by side.
#[derive(Debug, Default)]
struct Generation {
    map: HashMap<u64, u32, BuildHasherDefault<KeyHasher>>,
    blocks: Vec<Place>,
    ops: Vec<Op>,
}

/// A block, and the first of its ops.
#[derive(Debug)]
struct Place {
    block: Block,
    start: u32,
}

impl Place {
    fn ops(&self) -> Range<usize> {
        let start = self.start as usize;
        start..start + usize::from(self.block.count)
    }
}

impl Generation {
    fn used(&self) -> usize {
        self.ops.len() * size_of::<Op>() + self.blocks.len() * OVERHEAD
    }

    fn clear(&mut self) {
        self.map.clear();
        self.blocks.clear();
        self.ops.clear();
    }
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
        let known = || self.young.blocks[jump.id as usize].block.is_fresh();
        if jump.key == key && known() { Some(jump.id) } else { None }
    }

    /// The number of block `key` if it is in the cache and fresh; brings it to the front.
    pub fn find(&mut self, key: u64) -> Option<u32> {
        let Some(&id) = self.young.map.get(&key) else {
            let id = self.old.map.remove(&key)?;
            let place = self.old.blocks.get(id as usize)?;
            let (block, ops) = (place.block, place.ops());
            if !block.is_fresh() {
                return None;
            }
            if self.make_room(ops.len()) {
                // It has just gone.
                return None;
            }
            let ops = self.old.ops.get(ops)?;
            return Some(enter(&mut self.young, &mut self.jumps, block, ops));
        };
        if !self.young.blocks.get(id as usize)?.block.is_fresh() {
            return None;
        }
        self.jumps[Self::slot(key)] = Jump { key, id };
        Some(id)
    }

    /// Block number `id`, the last that this cache has given out, and its ops.
    #[inline(always)]
    pub fn at(&self, id: u32) -> (&Block, &[Op]) {
        let place = &self.young.blocks[id as usize];
        (&place.block, &self.young.ops[place.ops()])
    }

    /// Enters a block that was just decoded, with its ops, in place of one with the same key.
    pub fn insert(&mut self, block: Block, ops: &[Op]) -> u32 {
        self.decoded += 1;
        self.make_room(ops.len());
        enter(&mut self.young, &mut self.jumps, block, ops)
    }

    /// Makes room for a block with so many ops. If there was none, what was old has gone, and what was young is old.
    fn make_room(&mut self, ops: usize) -> bool {
        let room = self.young.used() + ops * size_of::<Op>() + OVERHEAD <= self.capacity / 2;
        if !room {
            self.jumps.fill(Jump { key: u64::MAX, id: 0 });
            std::mem::swap(&mut self.old, &mut self.young);
            self.young.clear();
            self.emptied += 1;
        }
        !room
    }

    /// Bytes of decoded code.
    pub fn used(&self) -> usize {
        self.young.used() + self.old.used()
    }

    /// Blocks in the cache.
    pub fn len(&self) -> usize {
        self.young.blocks.len() + self.old.map.len()
    }
}

/// Enters a block into `young`, and brings it to the front.
fn enter(young: &mut Generation, jumps: &mut [Jump], block: Block, ops: &[Op]) -> u32 {
    let Generation { map, blocks, ops: all } = young;
    let key = block.key;
    let id = *map.entry(key).or_insert(blocks.len() as u32);
    // Code that is decoded each time that it runs (invariant 6a) takes the same place each time.
    let place = blocks.get(id as usize).map(Place::ops).filter(|place| place.len() >= ops.len());
    let start = match place {
        Some(place) => {
            all[place.start..][..ops.len()].copy_from_slice(ops);
            place.start
        }
        None => {
            all.extend_from_slice(ops);
            all.len() - ops.len()
        }
    };
    let new = Place { block, start: start as u32 };
    match blocks.get_mut(id as usize) {
        Some(place) => *place = new,
        None => blocks.push(new),
    }
    jumps[BlockCache::slot(key)] = Jump { key, id };
    id
}

#[cfg(test)]
mod tests {
    use mvm_engine::IoBus;
    use mvm_engine::mock::NoBus;
    use mvm_memory::GuestRam;

    use super::*;
    use crate::block::CodeStamp;
    use crate::block::decode::undefined_op;
    use crate::op::Flow;

    /// A block that is found by `key`, whose ops say so.
    fn block(key: u64, count: u16, stamp: CodeStamp) -> (Block, Vec<Op>) {
        let block = Block { key, first: stamp, second: None, len: count, count };
        let op = undefined_op(|_, _, _| Flow::Next);
        (block, (0..count).map(|i| Op { imm: key, start: i, ..op }).collect())
    }

    fn check(cache: &BlockCache, id: u32, key: u64, count: u16) {
        let (block, ops) = cache.at(id);
        assert_eq!((block.key, block.count, ops.len()), (key, count, usize::from(count)));
        assert!((0u16..).zip(ops).all(|(i, op)| op.imm == key && op.start == i), "{key}");
    }

    fn cache(capacity: usize) -> (BlockCache, Arc<PhysMemory>) {
        let io: Arc<dyn IoBus> = Arc::new(NoBus);
        let phys = Arc::new(PhysMemory::new(GuestRam::new(&[(0, 1 << 20)]).unwrap(), io, 1));
        (BlockCache::new(phys.clone(), capacity), phys)
    }

    fn stamp(phys: &PhysMemory) -> CodeStamp {
        let (page, _) = phys.find(0x1000).unwrap();
        let (generation, _) = phys.watch(page, 0, 64, 0);
        // SAFETY: `phys` is there as long as the test.
        unsafe { CodeStamp::new(phys.code_page(page).unwrap(), generation) }
    }

    #[test]
    fn what_is_looked_for_stays_with_its_ops() {
        let (mut cache, phys) = cache(64 << 10);
        let stamp = stamp(&phys);
        let count = |key: u64| 1 + (key * 7 % 13) as u16;
        let mut lost = 0;
        for key in 0..4000 {
            let (new, ops) = block(key, count(key), stamp);
            let id = cache.insert(new, &ops);
            check(&cache, id, key, count(key));
            // One that is always wanted, and some from before.
            for wanted in [7, key - key % 50, key / 2] {
                match cache.front(wanted).or_else(|| cache.find(wanted)) {
                    Some(id) => check(&cache, id, wanted, count(wanted)),
                    None => lost += u64::from(wanted == 7 && key > 7),
                }
            }
            assert!(cache.used() <= 64 << 10);
        }
        assert!(cache.emptied > 20, "{}", cache.emptied);
        assert!(lost <= cache.emptied, "{lost}");
    }

    #[test]
    fn what_is_decoded_each_time_takes_one_place() {
        let (mut cache, phys) = cache(64 << 10);
        let (good, ops) = block(1, 3, stamp(&phys));
        cache.insert(good, &ops);
        let mut used = 0;
        for count in [5, 5, 2, 2, 1].repeat(1000) {
            let (new, ops) = block(2, count, CodeStamp::never());
            let id = cache.insert(new, &ops);
            check(&cache, id, 2, count);
            assert!(cache.front(2).is_none() && cache.find(2).is_none(), "good for once");
            used = used.max(cache.used());
        }
        assert!(used <= 64 << 10);
        let (good, ops) = block(3, 3, stamp(&phys));
        for _ in 0..1000 {
            let id = cache.insert(good, &ops);
            check(&cache, id, 3, 3);
        }
        assert!(cache.find(3).is_some());
    }
}
