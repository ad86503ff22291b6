//! The translated blocks of one vCPU, by host address of their first byte, and by page.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use super::translate::FarLink;
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
    /// It is a bridge: the rest of it is in [`Cache::bridge`].
    pub bridge: bool,
}

/// The other half of a block whose only instruction crosses into the next page (J15).
#[derive(Debug, Clone, Copy)]
pub struct Bridge {
    /// Host address of the next page.
    pub next: u64,
    /// Offset in the arena of the entry that does not ask whether that is the next page.
    pub checked: u32,
    stamp: CodeStamp,
}

/// A direct jump inside a page (J6).
#[derive(Debug, Clone, Copy)]
pub struct Link {
    pub site: u32,
    /// Offset in the page.
    pub target: u16,
    pub native: bool,
    /// The target goes without spans.
    pub plain: bool,
    /// It goes forward.
    pub ahead: bool,
    /// Which life of the page it belongs to.
    pub life: u32,
}

/// Added to the addresses of blocks without spans (J14), which host addresses of user space leave free.
pub const PLAIN: u64 = 1 << 63;

#[derive(Debug, Default)]
struct Page {
    life: u32,
    /// The blocks' names.
    blocks: Vec<u64>,
    /// Pages with a bridge to this one, which die with it.
    bridges_from: Vec<u64>,
}

/// Blocks, pages, links.
#[derive(Debug, Default)]
pub struct Cache {
    blocks: Map<Block>,
    bridges: Map<Bridge>,
    pages: Map<Page>,
    pub links: Vec<Link>,
    pub far_links: Vec<FarLink>,
    lives: u32,
}

impl Cache {
    /// The block at host address `host` (plus [`PLAIN`]); its page's life is over if its code was written to.
    pub fn find(&self, name: u64) -> Found {
        match self.blocks.get(&name) {
            None => Found::None,
            Some(block) if self.is_current(name, block) => Found::Block(*block),
            Some(_) => Found::Stale,
        }
    }

    fn is_current(&self, name: u64, block: &Block) -> bool {
        let other_half = || self.bridges.get(&name).is_some_and(|bridge| bridge.stamp.is_current());
        block.stamp.is_current() && (!block.bridge || other_half())
    }

    /// The other half of bridge `name`.
    pub fn bridge(&self, name: u64) -> Option<Bridge> {
        self.bridges.get(&name).copied()
    }

    /// Makes block `name` a bridge to the page at host address `next`, whose entry for those who know that is `checked`.
    pub fn make_bridge(&mut self, name: u64, next: u64, checked: u32, stamp: CodeStamp) {
        let page = name & !PLAIN & !0xfff;
        self.life(next);
        if let Some(next) = self.pages.get_mut(&next)
            && !next.bridges_from.contains(&page)
        {
            next.bridges_from.push(page);
        }
        if let Some(block) = self.blocks.get_mut(&name) {
            block.bridge = true;
        }
        self.bridges.insert(name, Bridge { next, checked, stamp });
    }

    /// Another page follows than the one that bridge `name` goes to: it is not found any more. Jumps that are linked
    /// to it find out by themselves.
    pub fn drop_bridge(&mut self, name: u64) {
        self.blocks.remove(&name);
        self.bridges.remove(&name);
    }

    /// Starts or continues the life of the page of `host`.
    pub fn life(&mut self, host: u64) -> u32 {
        let lives = &mut self.lives;
        let page = self.pages.entry(host & !0xfff).or_insert_with(|| {
            *lives += 1;
            Page { life: *lives, ..Page::default() }
        });
        page.life
    }

    /// Enters a block by the name that it is found by.
    pub fn insert(&mut self, name: u64, memory: u32, native: u32, stamp: CodeStamp) -> Block {
        let host = name & !PLAIN;
        let life = self.life(host);
        if let Some(page) = self.pages.get_mut(&(host & !0xfff)) {
            page.blocks.push(name);
        }
        let block = Block { memory, native, stamp, life, bridge: false };
        self.blocks.insert(name, block);
        block
    }

    /// Ends the life of the page at host address `page`, and puts its blocks' names to `names`. False: nothing of it was
    /// there.
    pub fn kill(&mut self, page: u64, names: &mut Vec<u64>) -> bool {
        let Some(dead) = self.pages.remove(&page) else { return false };
        for name in &dead.blocks {
            self.blocks.remove(name);
            self.bridges.remove(name);
        }
        names.extend(dead.blocks);
        for page in dead.bridges_from {
            self.kill(page, names);
        }
        true
    }

    /// The pages whose code was written to.
    pub fn stale_pages(&self) -> Vec<u64> {
        let stale = self.blocks.iter().filter(|(name, block)| !self.is_current(**name, block));
        stale.map(|(name, _)| name & !PLAIN & !0xfff).collect()
    }

    pub fn clear(&mut self) {
        self.blocks.clear();
        self.bridges.clear();
        self.pages.clear();
        self.links.clear();
        self.far_links.clear();
    }

    /// Bytes of memory for all of it, about.
    pub fn memory(&self) -> usize {
        self.blocks.capacity() * (size_of::<(u64, Block)>() + 1)
            + self.pages.capacity() * (size_of::<(u64, Page)>() + 1)
            + self.blocks.len() * size_of::<u16>()
            + self.links.capacity() * size_of::<Link>()
            + self.far_links.capacity() * size_of::<FarLink>()
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
