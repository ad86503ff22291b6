//! What translated code reaches through the `Cpu` besides its state.

use std::collections::HashSet;
use std::hash::BuildHasherDefault;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::links::FarLink;
use super::spans::SLOTS;
use crate::block::KeyHasher;
use crate::mmu::{JumpKey, NO_JUMP, zeros};
use crate::op::Op;

/// Entries of the jump cache, at first: a Linux kernel that does anything at all jumps to some thousands of places. And when these
/// are too few.
pub const JUMPS: usize = 8192;
pub const MOST_JUMPS: usize = 8 * JUMPS;
/// So many places for each entry have taken that of another one that counted before the cache becomes larger.
const LOSSES: usize = 8;

/// An entry of the jump cache (J7).
#[derive(Debug, Clone, Copy)]
#[repr(C, align(16))]
pub struct Jump {
    /// Virtual address.
    pub address: u64,
    /// `Tlb`'s tag for jumps; one that it never has stands for an empty entry.
    pub tag: u32,
    /// Offset of the code's entry M in the arena.
    pub code: u32,
}

/// Pages that are known by number. A guest may map its code at ever new ones; with more, every page counts as jumped to.
const MOST_PAGES: usize = 1 << 15;

/// Where the code of an entry comes from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Origin {
    /// Host address.
    host: u64,
    /// [`JitEnv::life`] of then.
    life: u64,
}

const NONE: Jump = Jump { address: 0, tag: NO_JUMP, code: 0 };

/// An op as translated code refers to it.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct CalledOp {
    pub op: Op,
    /// Opcode map and opcode: `map << 8 | opcode`.
    pub opcode: u32,
}

/// Opcodes that calls are counted by.
pub const OPCODES: usize = 1024;

/// Handlers called by translated code, by `map << 8 | opcode` (map 1 is 0F). Written by the vCPU's thread alone.
#[derive(Debug, Clone, Default)]
pub struct Calls(Arc<[AtomicU64]>);

impl Calls {
    fn new() -> Self {
        Self((0..OPCODES).map(|_| AtomicU64::new(0)).collect())
    }

    pub(super) fn count(&self, opcode: u32) {
        if let Some(calls) = self.0.get(opcode as usize) {
            calls.store(calls.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
    }

    /// The opcodes called most often, with how often.
    pub fn most(&self, count: usize) -> Vec<(u32, u64)> {
        let mut calls: Vec<_> = (0..)
            .zip(self.0.iter().map(|n| n.load(Ordering::Relaxed)))
            .filter(|(_, n)| *n != 0)
            .collect();
        calls.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
        calls.truncate(count);
        calls
    }

    /// All calls.
    pub fn total(&self) -> u64 {
        self.0.iter().map(|n| n.load(Ordering::Relaxed)).sum()
    }
}

/// What translated code counts where it is asked to, which costs it some of its speed.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Counted {
    /// Blocks entered.
    pub blocks: u64,
    /// Accesses of translated code that hit the TLB.
    pub tlb_hits: u64,
    /// Transfers whose target was in the jump cache.
    pub jump_hits: u64,
    /// Returns to where the last call came from.
    pub returns: u64,
}

/// The translator's part of a `Cpu`. Empty if there is no translator. What code uses most comes last.
#[derive(Debug, Default)]
#[repr(C)]
pub struct JitEnv {
    jumps: Box<[Jump]>,
    /// Of the same entries.
    origins: Box<[Origin]>,
    /// Changes when translated code dies of which nobody knows where it was jumped to.
    life: u64,
    /// Of links that ask whether they count (J18): the tag, and for those that go anywhere where the code is in the arena, and the
    /// address that they are linked for. Zeros where there is none.
    links: Box<[u32]>,
    /// Which life of its page a link leads to.
    lives: Box<[u32]>,
    /// Entries whose code lives, and that were lost to others.
    losses: usize,
    /// The pages that code jumps to from others, by number.
    pages: HashSet<u64, BuildHasherDefault<KeyHasher>>,
    /// Handlers called, by opcode.
    pub(super) calls: Calls,
    pub(super) counted: Counted,
    /// Address of the [`CalledOp`] whose handler did not say "next".
    pub(super) called: u64,
    /// How many jumps between pages that are linked to another place may still go by the jump cache before
    /// one of them is linked anew.
    pub(super) patience: i32,
    /// The record of the far link that is to go where the handler being called goes, or 0.
    pub(super) linking: u32,
    /// Between the two accesses of an indirect call, or of a push.
    pub(super) target: u64,
    /// Where an indirect call pushes to, as an address of the host.
    pub(super) pushed: u64,
    /// The host's stack: where it starts for translated code, and from where on there is no more room (J17).
    pub(super) stack: u64,
    pub(super) stack_floor: u64,
    /// Address of `links`.
    pub(super) links_at: u64,
    /// Address of `jumps`.
    pub(super) table: u64,
    /// Address of the arena's code.
    pub(super) code: u64,
    /// Of the spans of the running block (J14): what they add to addresses of the guest. The first slot comes last.
    pub(super) spans: [u64; SLOTS],
    /// Address of the attention's run word.
    pub(super) run: u64,
}

impl JitEnv {
    /// For an arena whose code is at `code`, and whose links have so many words of slots.
    pub(super) fn with_jumps(code: u64, links: usize) -> Self {
        let mut env = Self { life: 1, code, calls: Calls::new(), ..Self::default() };
        env.make(JUMPS);
        (env.links, env.lives) = (zeros(links), zeros(links));
        env.links_at = env.links.as_ptr() as u64;
        env
    }

    /// The link goes to the code at `code` in the arena, of life `life` of its page, where it is to go to `address` while the tag
    /// is `tag`.
    pub(super) fn link(&mut self, link: FarLink, address: u64, code: u32, tag: u32, life: u32) {
        let (start, words) = (link.slot as usize, link.goes.words() as usize);
        let (low, high) = (address as u32, (address >> 32) as u32);
        if let (Some(slot), Some(lives)) =
            (self.links.get_mut(start..start + words), self.lives.get_mut(start))
        {
            slot.copy_from_slice(&[tag, code, low, high][..words]);
            *lives = life;
        }
    }

    /// Which life of its page the link with `slot` leads to; 0: none.
    pub(super) fn leads_to(&self, slot: u32) -> u32 {
        self.lives.get(slot as usize).copied().unwrap_or_default()
    }

    /// The link with `slot` leads nowhere.
    pub(super) fn unlink(&mut self, slot: u32) {
        if let (Some(tag), Some(life)) =
            (self.links.get_mut(slot as usize), self.lives.get_mut(slot as usize))
        {
            (*tag, *life) = (NO_JUMP, 0);
        }
    }

    /// Bytes of memory for the jump cache.
    pub(super) fn memory(&self) -> usize {
        size_of_val(&*self.jumps) + size_of_val(&*self.origins)
    }

    /// The counters of called handlers.
    pub(crate) fn calls(&self) -> Calls {
        self.calls.clone()
    }

    /// Bits of the number of a slot.
    pub(super) fn slot_bits(&self) -> u32 {
        self.jumps.len().ilog2()
    }

    /// The slot of `address`: what [`Translator::jump_slot`](super::translate::Translator::jump_slot) computes.
    fn slot(&self, address: u64, salt: u32) -> usize {
        let low = address as u32;
        (low ^ low >> self.slot_bits() ^ salt) as usize & (self.jumps.len() - 1)
    }

    /// Has it lost so many places for want of room that a larger one is worth it?
    pub(super) fn is_tight(&self) -> bool {
        self.losses > self.jumps.len() * LOSSES && self.jumps.len() < MOST_JUMPS
    }

    /// Takes so many entries, all empty. Translated code from before does not know them.
    pub(super) fn set_slot_bits(&mut self, bits: u32) {
        self.make(1 << bits);
    }

    fn make(&mut self, entries: usize) {
        self.jumps = vec![NONE; entries].into_boxed_slice();
        self.origins = vec![Origin::default(); entries].into_boxed_slice();
        self.table = self.jumps.as_ptr() as u64;
    }

    /// Enters a place, whose code is at `host`. What had its slot may still be found by [`JitEnv::find`].
    pub(super) fn insert(&mut self, address: u64, key: JumpKey, host: u64, code: u32) {
        if self.pages.len() < MOST_PAGES {
            self.pages.insert(address >> 12);
        }
        if self.jumps.is_empty() {
            return;
        }
        let slot = self.slot(address, key.salt);
        let before = self.jumps[slot];
        if before.tag != NO_JUMP && (before.address, before.tag) != (address, key.tag) {
            // Whatever its tag is: it may be found again.
            let lost =
                self.jumps[slot ^ 1].tag != NO_JUMP && self.origins[slot ^ 1].life == self.life;
            self.losses += usize::from(lost);
            self.jumps[slot ^ 1] = before;
            self.origins[slot ^ 1] = self.origins[slot];
        }
        self.jumps[slot] = Jump { address, tag: key.tag, code };
        self.origins[slot] = Origin { host, life: self.life };
    }

    /// The address of the code for `address` if it is there with that tag; translated code finds it then, too.
    pub(super) fn find(&mut self, address: u64, key: JumpKey) -> Option<u64> {
        if self.jumps.is_empty() {
            return None;
        }
        let slot = self.slot(address, key.salt);
        let fits = |jump: &Jump| jump.address == address && jump.tag == key.tag;
        if !fits(&self.jumps[slot]) {
            if !fits(&self.jumps[slot ^ 1]) {
                return None;
            }
            // Of two that share their slot the one that was looked for last has it.
            self.jumps.swap(slot, slot ^ 1);
            self.origins.swap(slot, slot ^ 1);
        }
        Some(self.code + u64::from(self.jumps[slot].code))
    }

    /// The same for an entry that has another tag, or had one before a flush, if its code is what is at `host`, where
    /// `address` is mapped to now. It has that tag then.
    pub(super) fn find_again(&mut self, address: u64, key: JumpKey, host: u64) -> Option<u64> {
        let slot = self.slot(address, key.salt);
        let origin = Origin { host, life: self.life };
        let fits = |slot: &usize| {
            self.jumps.get(*slot).is_some_and(|jump| jump.address == address)
                && self.origins.get(*slot) == Some(&origin)
        };
        let found = [slot, slot ^ 1].into_iter().find(fits)?;
        let code = self.jumps[found].code;
        self.insert(address, key, host, code);
        Some(self.code + u64::from(code))
    }

    /// Drops the place at `address`, which `salt` moves, if its code is in the page at host address `page`.
    pub(super) fn forget(&mut self, address: u64, salt: u32, page: u64) {
        let slot = self.slot(address, salt);
        for slot in [slot, slot ^ 1] {
            if let (Some(jump), Some(origin)) =
                (self.jumps.get_mut(slot), self.origins.get_mut(slot))
                && origin.host & !0xfff == page
            {
                (*jump, *origin) = (NONE, Origin::default());
            }
        }
    }

    /// Drops everything.
    pub(super) fn clear(&mut self) {
        self.jumps.fill(NONE);
        // Of new memory: much of it was never touched.
        const { assert!(NO_JUMP == 0) };
        (self.links, self.lives) = (zeros(self.links.len()), zeros(self.links.len()));
        self.links_at = self.links.as_ptr() as u64;
        self.forget_pages();
        self.forget_code();
    }

    /// Some of the code is not to be entered any more.
    pub(super) fn forget_code(&mut self) {
        self.life += 1;
    }

    /// Does anything jump to the page of `address`?
    pub(crate) fn jumps_to_page(&self, address: u64) -> bool {
        self.pages.len() >= MOST_PAGES || self.pages.contains(&(address >> 12))
    }

    /// The tags have changed: nothing that is here counts any more.
    pub(crate) fn forget_pages(&mut self) {
        self.pages.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn key(tag: u32) -> JumpKey {
        JumpKey { tag, salt: 77 }
    }

    #[test]
    fn there_is_no_end_of_pages_but_of_what_is_kept_of_them() {
        let mut env = JitEnv::with_jumps(0x1000, 8);
        (0..2 * MOST_PAGES as u64).for_each(|page| env.insert(page << 12, key(5), 0, 0));
        assert_eq!(env.pages.len(), MOST_PAGES);
        assert!(env.jumps_to_page((MOST_PAGES as u64 + 1) << 12), "it is not known any more");
        env.forget_pages();
        assert!(!env.jumps_to_page(0));
    }

    #[test]
    fn more_room_for_those_that_take_each_others() {
        let mut env = JitEnv::with_jumps(0x1000, 8);
        // Four addresses with the same slot, but for the larger cache.
        let at = |n: u64| 0x7000_0000 + (n << (2 * JUMPS.ilog2())) + 2 * JUMPS as u64;
        let mut rounds = 0;
        while !env.is_tight() {
            (0..4).for_each(|n| env.insert(at(n), key(7), 0, n as u32));
            rounds += 1;
        }
        assert!(
            rounds > JUMPS && (0..4).filter(|n| env.find(at(*n), key(7)).is_some()).count() == 2
        );
        env.set_slot_bits(MOST_JUMPS.ilog2());
        assert!(!env.is_tight() && (0..4).all(|n| env.find(at(n), key(7)).is_none()));
        (0..100_000).for_each(|n| env.insert(at(n % 4), key(7), 0, 1));
        assert!(!env.is_tight(), "they have got room");
        assert_eq!(env.jumps.len(), MOST_JUMPS);
    }

    #[test]
    fn jumps_are_found_until_their_tags_change_and_their_pages_are_known() {
        let mut env = JitEnv::with_jumps(0x1000, 8);
        let at = |n: u64| 0x7000_0000 + (n % 3) * 0x100_1000 + n * 5;
        for n in 0..500 {
            env.insert(at(n), key(7), 0x5000 + n, n as u32 + 1);
            assert_eq!(env.find(at(n), key(7)), Some(0x1000 + n + 1));
            assert_eq!(env.find(at(n), key(8)), None);
        }
        assert!((0..500).all(|n| env.jumps_to_page(at(n))));
        assert!(!env.jumps_to_page(0x7001_0000));
        env.forget_pages();
        assert!(!env.jumps_to_page(at(1)));
        env.insert(at(1), key(8), 0x5001, 9);
        assert!(env.jumps_to_page(at(1)) && env.find(at(1), key(8)) == Some(0x1009));
        // In another address space, where it is mapped to the same place, or is not, or after the code has died.
        assert!(
            env.find(at(1), key(9)).is_none() && env.find_again(at(1), key(9), 0x5002).is_none()
        );
        assert_eq!(env.find_again(at(1), key(9), 0x5001), Some(0x1009));
        assert_eq!(env.find(at(1), key(9)), Some(0x1009));
        env.forget_code();
        assert!(env.find_again(at(1), key(8), 0x5001).is_none());
        env.insert(at(1), key(8), 0x5001, 9);
        env.clear();
        assert!(env.find(at(1), key(8)).is_none() && !env.jumps_to_page(at(1)));
        assert!(env.find_again(at(1), key(8), 0x5001).is_none());
    }
}
