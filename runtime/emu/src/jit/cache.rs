//! The translated blocks of one vCPU, by the page of host memory that they are in.

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
}

/// Places that a page's blocks are jumped to at, by virtual address, and remembered one by one. Code that is mapped at more
/// (a library's, to which every process has a place of its own) seldom dies.
const PLACES: usize = 8;

/// A page with translated code. All of it is of the same bytes.
#[derive(Debug)]
pub struct Page {
    life: u32,
    stamp: CodeStamp,
    /// By key.
    blocks: Vec<Entry>,
    /// Pages with a bridge to this one, which die with it.
    bridges_from: Vec<u64>,
    /// Where it is in the jump cache: virtual addresses, and what moves them there.
    places: Vec<(u64, u32)>,
    /// Links from other pages. Some of them may be somewhere else since.
    incoming: Vec<u32>,
    /// When to look for such.
    crowded: usize,
}

impl Page {
    /// Offsets in the page of what may have been jumped to.
    pub fn offsets(&self) -> impl Iterator<Item = u16> {
        self.blocks.iter().map(|entry| entry.key & !Entry::PLAIN)
    }

    /// Virtual addresses of the page in the jump cache, and what moves them there. None: everywhere.
    pub fn places(&self) -> Option<&[(u64, u32)]> {
        (self.places.len() <= PLACES).then_some(&*self.places)
    }
}

/// Blocks, pages, links.
#[derive(Debug, Default)]
pub struct Cache {
    pages: Map<Page>,
    bridges: Map<Bridge>,
    pub links: Vec<Link>,
    pub far_links: Vec<FarLink>,
    lives: u32,
    blocks: usize,
}

impl Cache {
    /// The block at host address `host` (plus [`PLAIN`]); its page's life is over if its code was written to.
    pub fn find(&self, name: u64) -> Found {
        let Some(page) = self.pages.get(&page_of(name)) else { return Found::None };
        if !page.stamp.is_current() {
            return Found::Stale;
        }
        let key = Entry::key(name);
        let Ok(at) = page.blocks.binary_search_by_key(&key, |entry| entry.key) else {
            return Found::None;
        };
        let Entry { bridge, native, memory, .. } = page.blocks[at];
        let block = Block { memory, native, life: page.life, bridge };
        match self.bridges.get(&name) {
            None if bridge => Found::None,
            Some(other) if bridge && !self.is_current(other.next) => Found::Stale,
            _ => Found::Block(block),
        }
    }

    fn is_current(&self, page: u64) -> bool {
        self.pages.get(&page).is_some_and(|page| page.stamp.is_current())
    }

    /// The other half of bridge `name`.
    pub fn bridge(&self, name: u64) -> Option<Bridge> {
        self.bridges.get(&name).copied()
    }

    /// Makes block `name` a bridge to the page at host address `next`, which has been started, whose entry for those who know
    /// that is `checked`.
    pub fn make_bridge(&mut self, name: u64, next: u64, checked: u32) {
        let page = page_of(name);
        if let Some(next) = self.pages.get_mut(&next)
            && !next.bridges_from.contains(&page)
        {
            next.bridges_from.push(page);
        }
        self.bridges.insert(name, Bridge { next, checked });
    }

    /// Another page follows than the one that bridge `name` goes to: it is not found any more. Jumps that are linked
    /// to it find out by themselves.
    pub fn drop_bridge(&mut self, name: u64) {
        self.bridges.remove(&name);
    }

    /// Is there a page at `host` of other bytes than those of `stamp`?
    pub fn is_another(&self, host: u64, stamp: &CodeStamp) -> bool {
        self.pages.get(&page_of(host)).is_some_and(|page| page.stamp != *stamp)
    }

    /// Starts or continues the life of the page of `host`.
    pub fn life(&mut self, host: u64, stamp: CodeStamp) -> u32 {
        let lives = &mut self.lives;
        let page = self.pages.entry(page_of(host)).or_insert_with(|| {
            *lives += 1;
            Page {
                life: *lives,
                stamp,
                blocks: Vec::new(),
                bridges_from: Vec::new(),
                places: Vec::new(),
                incoming: Vec::new(),
                crowded: 16,
            }
        });
        page.life
    }

    /// Enters a block of a page that lives by the name that it is found by.
    pub fn insert(&mut self, name: u64, memory: u32, native: u32, bridge: bool) -> Option<Block> {
        let page = self.pages.get_mut(&page_of(name))?;
        let entry = Entry { key: Entry::key(name), bridge, memory, native };
        match page.blocks.binary_search_by_key(&entry.key, |entry| entry.key) {
            Ok(at) => page.blocks[at] = entry,
            Err(at) => {
                page.blocks.insert(at, entry);
                self.blocks += 1;
            }
        }
        Some(Block { memory, native, life: page.life, bridge })
    }

    /// The jump cache has a place of the page at `host`, at virtual address `at`, which `salt` moves.
    pub fn jumped_to(&mut self, host: u64, at: u64, salt: u32) {
        let Some(page) = self.pages.get_mut(&page_of(host)) else { return };
        let place = (at & !0xfff, salt);
        if page.places.len() <= PLACES && !page.places.contains(&place) {
            page.places.push(place);
        }
    }

    /// Link `number` goes to the page at `host` from now on.
    pub fn linked_to(&mut self, number: u32, host: u64) {
        let Some(page) = self.pages.get_mut(&page_of(host)) else { return };
        let Some(link) = self.far_links.get_mut(number as usize) else { return };
        if link.life == page.life {
            return;
        }
        link.life = page.life;
        if page.incoming.len() >= page.crowded {
            // A link that goes to and fro is here more than once.
            page.incoming.sort_unstable();
            page.incoming.dedup();
            let links = &self.far_links;
            let stays = |link: &u32| links.get(*link as usize).is_some_and(|l| l.life == page.life);
            page.incoming.retain(stays);
            page.crowded = 2 * page.incoming.len().max(8);
        }
        page.incoming.push(number);
    }

    /// Ends the life of the page at host address `page`, and of those that have a bridge to it: they are put to `dead`.
    pub fn kill(&mut self, page: u64, dead: &mut Vec<(u64, Page)>) {
        let Some(gone) = self.pages.remove(&page) else { return };
        self.blocks -= gone.blocks.len();
        for entry in gone.blocks.iter().filter(|entry| entry.bridge) {
            let plain = if entry.key & Entry::PLAIN == 0 { 0 } else { PLAIN };
            self.bridges.remove(&(page | u64::from(entry.key & !Entry::PLAIN) | plain));
        }
        let from = gone.bridges_from.clone();
        dead.push((page, gone));
        for page in from {
            self.kill(page, dead);
        }
    }

    /// The links to a page that has died, from other pages.
    pub fn links_to<'a>(&'a self, dead: &'a Page) -> impl Iterator<Item = &'a FarLink> {
        let links = dead.incoming.iter().filter_map(|link| self.far_links.get(*link as usize));
        links.filter(|link| link.life == dead.life)
    }

    /// The pages whose code was written to.
    pub fn stale_pages(&self) -> Vec<u64> {
        let stale = self.pages.iter().filter(|(_, page)| !page.stamp.is_current());
        stale.map(|(host, _)| *host).collect()
    }

    pub fn clear(&mut self) {
        self.blocks = 0;
        self.bridges.clear();
        self.pages.clear();
        self.links.clear();
        self.far_links.clear();
    }

    /// Bytes of memory for all of it, about. Nothing is counted one by one, for it is asked often.
    pub fn memory(&self) -> usize {
        self.pages.capacity() * (size_of::<(u64, Page)>() + 1)
            + self.bridges.capacity() * (size_of::<(u64, Bridge)>() + 1)
            // Vectors that grow are three quarters full.
            + self.blocks * size_of::<Entry>() / 3 * 4
            + self.links.capacity() * size_of::<Link>()
            + self.far_links.capacity() * (size_of::<FarLink>() + size_of::<u32>())
    }

    pub fn len(&self) -> usize {
        self.blocks
    }
}

/// The page of a block, by its name.
fn page_of(name: u64) -> u64 {
    name & !PLAIN & !0xfff
}

/// Result of a look-up.
#[derive(Debug, Clone, Copy)]
pub enum Found {
    None,
    Block(Block),
    /// The page's code was written to.
    Stale,
}
