//! The translated blocks of a machine, by the page of host memory that they are in.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use crate::block::{CodeStamp, KeyHasher};

pub type Map<V> = HashMap<u64, V, BuildHasherDefault<KeyHasher>>;

/// A block that can be entered.
#[derive(Debug, Clone, Copy)]
pub struct Block {
    /// Offsets of its entries in the arena.
    pub memory: u32,
    pub native: u32,
    /// Which life of its page it belongs to.
    pub life: u32,
    /// The other half of a block whose only instruction crosses into the next page (J15).
    pub bridge: Option<Bridge>,
}

/// Where a block goes on whose only instruction crosses into the next page.
#[derive(Debug, Clone, Copy)]
pub struct Bridge {
    /// Host address of the next page, and which life of it.
    pub next: u64,
    pub life: u32,
    /// Offset in the arena of the entry that does not ask whether that is the next page.
    pub checked: u32,
}

/// Added to the addresses of blocks without spans (J14), which host addresses of user space leave free.
pub const PLAIN: u64 = 1 << 63;

/// A block as it is kept: there are tens of thousands.
#[derive(Debug, Clone, Copy)]
struct Entry {
    /// Offset in the page, with [`Entry::PLAIN`].
    key: u16,
    bridge: bool,
    /// Entries, as in [`Block`].
    memory: u32,
    native: u32,
}

impl Entry {
    const PLAIN: u16 = 1 << 15;

    fn key(name: u64) -> u16 {
        (name & 0xfff) as u16 | if name & PLAIN == 0 { 0 } else { Self::PLAIN }
    }

    /// The name of the block in the page at `page`.
    fn name(&self, page: u64) -> u64 {
        let plain = if self.key & Self::PLAIN == 0 { 0 } else { PLAIN };
        page | u64::from(self.key & !Self::PLAIN) | plain
    }
}

/// A page with translated code. All of it is of the same bytes.
#[derive(Debug)]
struct Page {
    life: u32,
    stamp: CodeStamp,
    /// By key.
    blocks: Vec<Entry>,
    /// Pages that a bridge of its has ever gone to: links may still lead there.
    bridges_to: Vec<u64>,
}

/// Blocks and pages.
#[derive(Debug, Default)]
pub struct Cache {
    pages: Map<Page>,
    bridges: Map<Bridge>,
    /// By page: those that have had a bridge to it.
    bridged: Map<Vec<u64>>,
    lives: u32,
    blocks: usize,
}

/// Result of a look-up.
#[derive(Debug, Clone, Copy)]
pub enum Found {
    None,
    Block(Block),
    /// The code of this page was written to.
    Stale(u64),
}

/// A place whose code has died, for whoever has it tried anew.
pub type Dead<'a> = &'a mut dyn FnMut(u64);

impl Cache {
    /// The block at host address `host` (plus [`PLAIN`]); its page's life is over if its code was written to.
    pub fn find(&self, name: u64) -> Found {
        let Some(page) = self.pages.get(&page_of(name)) else { return Found::None };
        if !page.stamp.is_current() {
            return Found::Stale(page_of(name));
        }
        let key = Entry::key(name);
        let Ok(at) = page.blocks.binary_search_by_key(&key, |entry| entry.key) else {
            return Found::None;
        };
        let Entry { bridge, native, memory, .. } = page.blocks[at];
        let bridge = match self.bridges.get(&name) {
            _ if !bridge => None,
            None => return Found::None,
            Some(other) if !self.is_current(other.next) => return Found::Stale(other.next),
            Some(other) => Some(*other),
        };
        Found::Block(Block { memory, native, life: page.life, bridge })
    }

    fn is_current(&self, page: u64) -> bool {
        self.pages.get(&page).is_some_and(|page| page.stamp.is_current())
    }

    /// The life of the page at host address `page`, if it has one.
    pub fn life(&self, page: u64) -> Option<u32> {
        self.pages.get(&page).map(|page| page.life)
    }

    /// Starts or continues the life of the page of `host`, which is of the bytes of `stamp`. None: they have changed already.
    pub fn live(&mut self, host: u64, stamp: CodeStamp, dead: Dead<'_>) -> Option<u32> {
        if !stamp.is_current() {
            return None;
        }
        // What was translated of other bytes before would be taken for these.
        self.end_stale(page_of(host), dead);
        let lives = &mut self.lives;
        let page = self.pages.entry(page_of(host)).or_insert_with(|| {
            *lives += 1;
            Page { life: *lives, stamp, blocks: Vec::new(), bridges_to: Vec::new() }
        });
        Some(page.life)
    }

    /// Enters a block by the name that it is found by, if its page still has the same life, and so has the one that it goes on in.
    pub fn insert(&mut self, name: u64, block: Block) -> bool {
        let at = page_of(name);
        if block.bridge.is_some_and(|bridge| self.life(bridge.next) != Some(bridge.life)) {
            return false;
        }
        let Some(page) = self.pages.get_mut(&at).filter(|page| page.life == block.life) else {
            return false;
        };
        let Block { memory, native, bridge, .. } = block;
        let entry = Entry { key: Entry::key(name), bridge: bridge.is_some(), memory, native };
        match page.blocks.binary_search_by_key(&entry.key, |entry| entry.key) {
            Ok(at) => page.blocks[at] = entry,
            Err(at) => {
                page.blocks.insert(at, entry);
                self.blocks += 1;
            }
        }
        if let Some(bridge) = bridge {
            add(&mut page.bridges_to, bridge.next);
            add(self.bridged.entry(bridge.next).or_default(), at);
            self.bridges.insert(name, bridge);
        }
        true
    }

    /// Another page follows than the one that bridge `name` goes to: it is not found any more. Jumps that are linked
    /// to it find out by themselves.
    pub fn drop_bridge(&mut self, name: u64) {
        self.bridges.remove(&name);
    }

    /// Ends the life of the page at host address `page` if its code was written to, and of those that have a bridge to it.
    pub fn end_stale(&mut self, page: u64, dead: Dead<'_>) {
        if self.pages.get(&page).is_some_and(|page| !page.stamp.is_current()) {
            self.end(page, dead);
        }
    }

    fn end(&mut self, page: u64, dead: Dead<'_>) {
        let Some(gone) = self.pages.remove(&page) else { return };
        self.blocks -= gone.blocks.len();
        for entry in &gone.blocks {
            if entry.bridge {
                self.bridges.remove(&entry.name(page));
            }
            dead(entry.name(page) & !PLAIN);
        }
        for from in self.bridged.get(&page).cloned().unwrap_or_default() {
            if self.pages.get(&from).is_some_and(|from| from.bridges_to.contains(&page)) {
                self.end(from, dead);
            }
        }
    }

    /// The page at host address `page` and all that die with it.
    pub fn with_it(&self, page: u64) -> Vec<u64> {
        let mut pages = vec![page];
        let mut next = 0;
        while let Some(page) = pages.get(next) {
            let from = self.bridged.get(page).into_iter().flatten();
            let new: Vec<u64> = from.filter(|page| !pages.contains(page)).copied().collect();
            pages.extend(new);
            next += 1;
        }
        pages
    }

    /// The pages whose code was written to.
    pub fn stale_pages(&self) -> Vec<u64> {
        let stale = self.pages.iter().filter(|(_, page)| !page.stamp.is_current());
        stale.map(|(host, _)| *host).collect()
    }

    /// Bytes of memory for all of it, about. Nothing is counted one by one, for it is asked often.
    pub fn memory(&self) -> usize {
        self.pages.capacity() * (size_of::<(u64, Page)>() + 1)
            + self.bridges.capacity() * (size_of::<(u64, Bridge)>() + 1)
            + self.bridged.capacity() * (size_of::<(u64, Vec<u64>)>() + 1)
            // Vectors that grow are three quarters full.
            + self.blocks * size_of::<Entry>() / 3 * 4
    }

    pub fn len(&self) -> usize {
        self.blocks
    }
}

fn add(pages: &mut Vec<u64>, page: u64) {
    if !pages.contains(&page) {
        pages.push(page);
    }
}

/// The page of a block, by its name.
pub fn page_of(name: u64) -> u64 {
    name & !PLAIN & !0xfff
}
