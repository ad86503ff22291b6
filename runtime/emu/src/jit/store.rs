//! The translated code of a machine: what all of its vCPUs execute, and who may put what to it (J6, J12).
//!
//! Code is of an *epoch*. When there is no more room, or code for larger tables is wanted, the epoch is over: each vCPU leaves it in
//! its dispatcher, and goes on in the interpreter until the last one has left. Then nobody executes anything, all is
//! empty, and the next epoch begins. Nobody waits for anybody.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::arena::{Arena, PART, Piece};
use super::asm::Asm;
use super::cache::Cache;
use super::stubs::Stubs;
use super::translate::{MAX_SLOTS, Tables};
use super::wear::Wear;
use crate::block::Block;
use crate::mmu::PhysMemory;

/// How often code is interpreted before it is translated. Measured with a Linux boot: 4, 8 and 12 times take the same time, and
/// make 13, 10.7 and 9.3 MB of code. A block takes as long to translate as to interpret some eight times.
pub const TRIALS: u8 = 8;
/// The same for code that has taken the place of other code that was translated: it will perhaps be replaced as well. So many
/// runs take about as long as a translation.
const TRIALS_ANEW: u8 = 24;
/// Counters of code that is not translated yet, by address; what shares one is translated sooner.
const SEEN: usize = 1 << 17;
/// Bytes of address space for code, at least and at most.
const LEAST_CODE: u64 = 64 << 20;
const MOST_CODE: u64 = 256 << 20;
/// Parts of it for each vCPU, at least.
const PARTS_EACH: u64 = 8;
/// Bytes of code for each word of a link's slot, at least: even the smallest link has more, with what belongs to it.
const CODE_PER_SLOT: usize = 32;
/// Words of slots that a vCPU takes at a time.
const SLOTS_AT_A_TIME: u32 = 1024;
const _: () = assert!(SLOTS_AT_A_TIME > 2 * MAX_SLOTS);

/// What lies in which part of the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// What runs often, packed more closely without the rest.
    Hot,
    /// What seldom runs: three fifths of it all.
    Cold,
}

/// The translated code of a machine.
#[derive(Debug)]
pub struct Store {
    arena: Arena,
    stubs: Stubs,
    /// Where code starts, behind the stubs.
    floor: usize,
    /// The epoch that may be joined, now or soon.
    epoch: AtomicU64,
    trials: AtomicU8,
    trials_left: Box<[AtomicU8]>,
    /// Code of some page is compared (J22).
    compares: AtomicBool,
    kept: Mutex<Kept>,
    /// What handlers get for the block they are in; none of them looks at it.
    _block: Box<Block>,
    /// Keeps the pages alive that the cache's stamps point to.
    phys: Arc<PhysMemory>,
}

/// What is found and changed under the lock, by a vCPU that has joined the epoch.
#[derive(Debug)]
pub struct Kept {
    pub cache: Cache,
    epoch: u64,
    over: bool,
    /// vCPUs that may execute its code.
    users: u32,
    /// What its code is made for, and that of the next epoch.
    tables: Tables,
    next_tables: Tables,
    /// Where what runs often has to end.
    hot_end: usize,
    /// By [`Side`].
    free: [Range<usize>; 2],
    slots: Range<u32>,
    /// By slot: where the block is that the link with it leads to, for all vCPUs.
    targets: Vec<u64>,
    wear: Wear,
    /// There is one vCPU.
    alone: bool,
    emptied: u64,
}

impl Store {
    /// For the vCPUs of a machine, `vcpus` of them.
    ///
    /// # Errors
    /// The host refuses executable memory.
    pub fn new(phys: &Arc<PhysMemory>, vcpus: u32) -> io::Result<Self> {
        let arena = Arena::new(code_size(phys, vcpus))?;
        let block = Box::new(Block::nothing());
        let mut asm = Asm::default();
        let stubs = Stubs::make(&mut asm, &raw const *block);
        arena.put(&mut Piece::new(0..PART), asm.code());
        let tables = Tables::FIRST;
        let store = Self {
            stubs,
            floor: asm.here().next_multiple_of(64),
            epoch: AtomicU64::new(0),
            trials: AtomicU8::new(TRIALS),
            trials_left: (0..SEEN).map(|_| AtomicU8::new(TRIALS)).collect(),
            compares: AtomicBool::new(false),
            kept: Mutex::new(Kept {
                cache: Cache::default(),
                epoch: 0,
                over: false,
                users: 0,
                tables,
                next_tables: tables,
                hot_end: cold_start(arena.size()),
                free: [0..0, 0..0],
                slots: 0..0,
                targets: Vec::new(),
                wear: Wear::default(),
                alone: vcpus == 1,
                emptied: 0,
            }),
            arena,
            _block: block,
            phys: phys.clone(),
        };
        store.begin(&mut store.lock());
        Ok(store)
    }

    /// Where the code lies.
    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    /// What all code shares.
    pub fn stubs(&self) -> Stubs {
        self.stubs
    }

    /// Words that there are for slots of links.
    pub fn slots(&self) -> usize {
        self.arena.size() / CODE_PER_SLOT
    }

    /// What is common to all vCPUs. Whoever has it waits for none of them.
    pub fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Is `epoch` over?
    #[inline]
    pub fn is_over(&self, epoch: u64) -> bool {
        self.epoch.load(Ordering::Acquire) != epoch
    }

    /// From now on the caller may execute what is made in the epoch, whose number this is, for these tables. None: the one
    /// before is not left by all yet.
    pub fn join(&self) -> Option<(u64, Tables)> {
        let mut kept = self.lock();
        if kept.over {
            return None;
        }
        kept.users += 1;
        Some((kept.epoch, kept.tables))
    }

    /// A vCPU that has joined executes nothing any more, until it joins again. What it knows of the epoch holds until then.
    pub fn leave(&self) {
        let mut kept = self.lock();
        kept.users -= 1;
        if kept.over && kept.users == 0 {
            kept.over = false;
            self.begin(&mut kept);
        }
    }

    /// Ends `epoch`, if that has not been done. The code of later ones is for large tables if anybody has ever asked for such.
    pub fn end(&self, epoch: u64, large: bool) {
        let mut kept = self.lock();
        if kept.epoch != epoch {
            return;
        }
        if large {
            kept.next_tables = Tables::LARGE;
        } else {
            // Of what there is no room for, much will not run again. Code for other tables is wanted as it was.
            self.restart_trials();
        }
        if !std::mem::replace(&mut kept.over, true) {
            self.epoch.store(epoch + 1, Ordering::Release);
            drop(kept);
            self.phys.nudge_all();
        }
    }

    /// Makes everything as at the start.
    fn begin(&self, kept: &mut Kept) {
        kept.epoch = self.epoch.load(Ordering::Acquire);
        kept.emptied += u64::from(kept.epoch != 0);
        kept.cache = Cache::default();
        kept.tables = kept.next_tables;
        let size = self.arena.size();
        kept.free = [self.floor..kept.hot_end, cold_start(size)..size];
        kept.slots = 0..self.slots() as u32;
        kept.targets = Vec::new();
    }

    /// Room for `bytes` of code that runs often, and the largest block there can be. Before anybody joins.
    #[cfg(test)]
    pub(crate) fn set_room(&self, bytes: usize) {
        let mut kept = self.lock();
        kept.hot_end = self.floor + super::translate::MAX_BLOCK + bytes;
        self.begin(&mut kept);
    }

    /// Times that everything was emptied.
    #[cfg(test)]
    pub(crate) fn emptied(&self) -> u64 {
        self.lock().emptied
    }

    /// Is the code at `host` to be interpreted still?
    #[inline]
    pub fn on_trial(&self, host: u64) -> bool {
        // What is lost when two do it at once is a trial.
        let counter = self.trials_of(host);
        let left = counter.load(Ordering::Relaxed);
        if left > 0 {
            counter.store(left - 1, Ordering::Relaxed);
        }
        left > 0
    }

    /// How many of its trials the code at `host` has left.
    pub fn trials_left(&self, host: u64) -> u8 {
        self.trials_of(host).load(Ordering::Relaxed)
    }

    /// For each block that dies: what takes its place is tried for longer.
    pub fn try_anew(&self) -> impl FnMut(u64) + '_ {
        let none = self.trials.load(Ordering::Relaxed) == 0;
        let anew = if none { 0 } else { TRIALS_ANEW };
        move |host| self.trials_of(host).store(anew, Ordering::Relaxed)
    }

    /// From now on code is translated after `trials` runs by the interpreter.
    pub fn set_trials(&self, trials: u8) {
        self.trials.store(trials, Ordering::Relaxed);
        self.restart_trials();
    }

    fn restart_trials(&self) {
        let trials = self.trials.load(Ordering::Relaxed);
        self.trials_left.iter().for_each(|left| left.store(trials, Ordering::Relaxed));
    }

    /// The counter for code at host address `host`. Those of a page lie side by side, one for four bytes.
    fn trials_of(&self, host: u64) -> &AtomicU8 {
        let page = (host >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - SEEN.ilog2());
        let at = ((page as usize & !63) + (host & 0xfff) as usize / 4) & (SEEN - 1);
        &self.trials_left[at]
    }

    /// Ends the life of the page at host address `page` if its code was written to; how often that happens says whether its code
    /// is compared from now on (J22).
    pub fn end_stale(&self, kept: &mut Kept, page: u64) -> bool {
        let before = kept.cache.len();
        kept.cache.end_stale(page, &mut self.try_anew());
        let ended = kept.cache.len() != before;
        if let Some(code) = self.phys.code_at(page)
            && kept.wear.ended(page, code.generation(), ended, Instant::now())
        {
            code.compare(true);
            self.compares.store(true, Ordering::Relaxed);
        }
        ended
    }

    /// Is code of any page compared?
    #[inline]
    pub fn compares(&self) -> bool {
        self.compares.load(Ordering::Relaxed)
    }

    /// Code that has been compared for long enough is watched again, all that there is of it made anew.
    #[cold]
    pub fn watch_again(&self, now: Instant) {
        let mut kept = self.lock();
        if kept.wear.next().is_some_and(|next| next > now) {
            return;
        }
        let over = kept.wear.over(now);
        self.compares.store(kept.wear.next().is_some(), Ordering::Relaxed);
        drop(kept);
        for page in over {
            if let Some(code) = self.phys.code_at(page) {
                code.compare(false);
            }
            self.phys.end_code(page);
        }
    }

    /// Bytes of memory that the code takes.
    pub fn code_memory(&self) -> u64 {
        self.arena.touched() as u64
    }

    /// What is counted of it.
    pub fn rows(&self) -> [(&'static str, u64); 5] {
        let kept = self.lock();
        let targets = kept.targets.capacity() * size_of::<u64>();
        let tables = SEEN + kept.cache.memory() + kept.wear.memory() + targets;
        let free: usize = kept.free.iter().map(Range::len).sum();
        let all = kept.hot_end - self.floor + self.arena.size() - cold_start(self.arena.size());
        [
            ("jit-cached-blocks", kept.cache.len() as u64),
            ("jit-cache-bytes", (all - free) as u64),
            ("jit-cache-emptied", kept.emptied),
            ("jit-compared-pages", kept.wear.begun),
            ("jit-code-memory", (self.arena.touched() + tables) as u64),
        ]
    }
}

impl Kept {
    /// A piece of the arena, which is the caller's until the end of the epoch. None: there is no room.
    pub fn take(&mut self, side: Side) -> Option<Piece> {
        let free = &mut self.free[side as usize];
        let end = (free.start / PART + 1).saturating_mul(PART).min(free.end);
        let piece = free.start..end;
        free.start = end;
        (!piece.is_empty()).then(|| Piece::new(piece))
    }

    /// The same for slots of links.
    pub fn take_slots(&mut self) -> Option<Range<u32>> {
        let end = self.slots.start + SLOTS_AT_A_TIME;
        let slots = self.slots.start..end;
        self.slots.start = end;
        (end <= self.slots.end).then_some(slots)
    }

    /// The jump of the link with `slot` is to lead to the block at `host`. False: it leads elsewhere, and others may be about to
    /// execute it (J18).
    pub fn lead_to(&mut self, slot: u32, host: u64) -> bool {
        if self.alone {
            return true;
        }
        let slot = slot as usize;
        if self.targets.len() <= slot {
            self.targets.resize(slot + 1, 0);
        }
        let target = &mut self.targets[slot];
        if *target == 0 {
            *target = host;
        }
        *target == host
    }
}

/// Where the part starts for code that seldom runs.
fn cold_start(size: usize) -> usize {
    size / 64 * 26
}

/// Bytes of address space for code: an eighth of the guest's memory, within bounds.
fn code_size(phys: &PhysMemory, vcpus: u32) -> usize {
    let ram = phys.ram();
    let all: u64 = ram.regions().iter().map(|region| region.size).sum();
    // What the guest may grow by is most of it, and seldom there.
    let ram = all - ram.growing_region().map_or(0, |region| region.size);
    let least = (u64::from(vcpus) * PARTS_EACH * PART as u64).max(LEAST_CODE);
    (ram / 8).next_power_of_two().clamp(least, MOST_CODE.max(least)).next_power_of_two() as usize
}
