//! What of one vCPU's leads to translated code, by the page that it leads to: places in its jump cache (J7), and slots of its
//! links (J18).

use super::cache::Map;

/// Places that a page's blocks are jumped to at, by virtual address, and remembered one by one. Code that is mapped at more
/// (a library's, to which every process has a place of its own) seldom dies.
const PLACES: usize = 8;

/// What leads to one page.
#[derive(Debug, Default)]
pub struct Arrived {
    /// Which life of the page.
    pub life: u32,
    /// Offsets of blocks that are in the jump cache.
    offsets: Vec<u16>,
    /// Where they are there: virtual addresses of the page, and what moves them.
    places: Vec<(u64, u32)>,
    /// Slots of links. Some of them may lead elsewhere since.
    pub slots: Vec<u32>,
    /// When to look for such.
    crowded: usize,
}

impl Arrived {
    /// Places in the jump cache: addresses, and what moves them. None: anywhere.
    pub fn places(&self) -> Option<impl Iterator<Item = (u64, u32)> + '_> {
        let at = |(page, salt): &(u64, u32)| {
            let (page, salt) = (*page, *salt);
            self.offsets.iter().map(move |offset| (page | u64::from(*offset), salt))
        };
        (self.places.len() <= PLACES).then(move || self.places.iter().flat_map(at))
    }
}

/// By the host address of the page.
#[derive(Debug, Default)]
pub struct Arrivals(Map<Arrived>);

impl Arrivals {
    /// Which life of the page at host address `page` anything leads to.
    pub fn life(&self, page: u64) -> Option<u32> {
        self.0.get(&page).map(|arrived| arrived.life)
    }

    /// All pages that anything leads to.
    pub fn pages(&self) -> Vec<u64> {
        self.0.keys().copied().collect()
    }

    /// Life `life` of the page at `page` is led to from now on; no other one is.
    fn of(&mut self, page: u64, life: u32) -> &mut Arrived {
        let new = || Arrived { life, crowded: 16, ..Arrived::default() };
        self.0.entry(page).or_insert_with(new)
    }

    /// The jump cache has the block at `host`, in that life of its page, at virtual address `at`, which `salt` moves.
    pub fn jumped_to(&mut self, host: u64, life: u32, at: u64, salt: u32) {
        let arrived = self.of(host & !0xfff, life);
        let offset = (host & 0xfff) as u16;
        if let Err(place) = arrived.offsets.binary_search(&offset) {
            arrived.offsets.insert(place, offset);
        }
        let place = (at & !0xfff, salt);
        if arrived.places.len() <= PLACES && !arrived.places.contains(&place) {
            arrived.places.push(place);
        }
    }

    /// The link with `slot` leads to the block at `host` from now on. `leads` tells which life of its page a slot leads to.
    pub fn linked_to(&mut self, host: u64, life: u32, slot: u32, leads: impl Fn(u32) -> u32) {
        let arrived = self.of(host & !0xfff, life);
        if arrived.slots.len() >= arrived.crowded {
            // A link that goes to and fro is here more than once.
            arrived.slots.sort_unstable();
            arrived.slots.dedup();
            arrived.slots.retain(|slot| leads(*slot) == life);
            arrived.crowded = 2 * arrived.slots.len().max(8);
        }
        arrived.slots.push(slot);
    }

    /// Forgets what leads to the page at host address `page`.
    pub fn take(&mut self, page: u64) -> Option<Arrived> {
        self.0.remove(&page)
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Bytes of memory, about.
    pub fn memory(&self) -> usize {
        // Most pages have a few of each.
        self.0.capacity() * (size_of::<(u64, Arrived)>() + 1) + self.0.len() * 64
    }
}
