//! The translated blocks of one vCPU, by host address of their first byte, and by page.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use crate::block::{CodeStamp, KeyHasher};

type Map<V> = HashMap<u64, V, BuildHasherDefault<KeyHasher>>;

/// A block that can be entered.
#[derive(Debug, Clone, Copy)]
pub struct Block {
    /// Offsets of its entries in the arena.
    pub memory: u32,
    pub native: u32,
    stamp: CodeStamp,
    /// Which life of its page it belongs to.
    pub life: u32,
}

/// A direct jump inside a page (J6).
#[derive(Debug, Clone, Copy)]
pub struct Link {
    pub site: u32,
    /// Offset in the page.
    pub target: u16,
    pub native: bool,
    /// Which life of the page it belongs to.
    pub life: u32,
}

#[derive(Debug, Default)]
struct Page {
    life: u32,
    /// Offsets of the blocks.
    blocks: Vec<u16>,
}

/// Blocks, pages, links.
#[derive(Debug, Default)]
pub struct Cache {
    blocks: Map<Block>,
    pages: Map<Page>,
    pub links: Vec<Link>,
    lives: u32,
}

impl Cache {
    /// The block at host address `host`; its page's life is over if its code was written to.
    pub fn find(&self, host: u64) -> Found {
        match self.blocks.get(&host) {
            None => Found::None,
            Some(block) if block.stamp.is_current() => Found::Block(*block),
            Some(_) => Found::Stale,
        }
    }

    /// Starts or continues the life of the page of `host`.
    pub fn life(&mut self, host: u64) -> u32 {
        let lives = &mut self.lives;
        let page = self.pages.entry(host & !0xfff).or_insert_with(|| {
            *lives += 1;
            Page { life: *lives, blocks: Vec::new() }
        });
        page.life
    }

    pub fn insert(&mut self, host: u64, memory: u32, native: u32, stamp: CodeStamp) -> Block {
        let life = self.life(host);
        if let Some(page) = self.pages.get_mut(&(host & !0xfff)) {
            page.blocks.push((host & 0xfff) as u16);
        }
        let block = Block { memory, native, stamp, life };
        self.blocks.insert(host, block);
        block
    }

    /// Ends the life of the page at host address `page`. False: nothing of it was there.
    pub fn kill(&mut self, page: u64) -> bool {
        let Some(dead) = self.pages.remove(&page) else { return false };
        for offset in dead.blocks {
            self.blocks.remove(&(page | u64::from(offset)));
        }
        true
    }

    /// The pages whose code was written to.
    pub fn stale_pages(&self) -> Vec<u64> {
        let stale = self.blocks.iter().filter(|(_, block)| !block.stamp.is_current());
        stale.map(|(host, _)| host & !0xfff).collect()
    }

    pub fn clear(&mut self) {
        self.blocks.clear();
        self.pages.clear();
        self.links.clear();
    }

    /// Bytes of memory for all of it, about.
    pub fn memory(&self) -> usize {
        self.blocks.capacity() * (size_of::<(u64, Block)>() + 1)
            + self.pages.capacity() * (size_of::<(u64, Page)>() + 1)
            + self.blocks.len() * size_of::<u16>()
            + self.links.capacity() * size_of::<Link>()
    }

    pub fn len(&self) -> usize {
        self.blocks.len()
    }
}

/// Result of a look-up.
#[derive(Debug, Clone, Copy)]
pub enum Found {
    None,
    Block(Block),
    /// The page's code was written to.
    Stale,
}
