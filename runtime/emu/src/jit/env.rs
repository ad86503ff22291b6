//! What translated code reaches through the `Cpu` besides its state.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::spans::SLOTS;
use crate::mmu::NO_JUMP;
use crate::op::Op;

/// Entries of the jump cache: a Linux kernel that does anything at all jumps to some thousands of places.
pub const JUMPS: usize = 8192;

/// Entries in use that are still dropped one by one.
const FEW: usize = 128;

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

const NONE: Jump = Jump { address: 0, tag: NO_JUMP, code: 0 };
/// Bits of the filter of pages.
const PAGES: usize = 4096;

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
}

/// The translator's part of a `Cpu`. Empty if there is no translator.
#[derive(Debug, Default)]
pub struct JitEnv {
    jumps: Box<[Jump]>,
    /// Address of `jumps`.
    pub(super) table: u64,
    /// Address of the arena's code.
    pub(super) code: u64,
    /// Address of the attention's run word.
    pub(super) run: u64,
    /// Between the two accesses of an indirect call, or of a push.
    pub(super) target: u64,
    pub(super) target_page: u64,
    /// Address of the [`CalledOp`] whose handler did not say "next".
    pub(super) called: u64,
    /// Of the spans of the running block (J14): what they add to addresses of the guest.
    pub(super) spans: [u64; SLOTS],
    /// Handlers called, by opcode.
    pub(super) calls: Calls,
    pub(super) counted: Counted,
    /// Bit per page (hashed) that entries of the jump cache lie in.
    pages: Box<[u64]>,
    /// Slots in use, or [`FEW`] if there are more.
    used: Vec<u16>,
}

impl JitEnv {
    /// For an arena whose code is at `code`.
    pub(super) fn with_jumps(code: u64) -> Self {
        let jumps = vec![NONE; JUMPS].into_boxed_slice();
        let table = jumps.as_ptr() as u64;
        let pages = vec![0; PAGES / 64].into_boxed_slice();
        Self { jumps, table, code, pages, calls: Calls::new(), ..Self::default() }
    }

    /// The jump cache.
    pub(super) fn jumps(&self) -> &[Jump] {
        &self.jumps
    }

    /// The counters of called handlers.
    pub(crate) fn calls(&self) -> Calls {
        self.calls.clone()
    }

    /// The slot of `address`: what `flow::lookup` computes.
    fn slot(address: u64) -> usize {
        let low = address as u32;
        (low ^ low >> JUMPS.ilog2()) as usize & (JUMPS - 1)
    }

    /// The word and the bit of the filter for the page of `address`.
    fn page(address: u64) -> (usize, u64) {
        let page = address >> 12;
        let bit = (page ^ page >> PAGES.ilog2()) as usize & (PAGES - 1);
        (bit / 64, 1 << (bit % 64))
    }

    /// Enters a place. What had its slot may still be found by [`JitEnv::find`].
    pub(super) fn insert(&mut self, address: u64, tag: u32, code: u32) {
        let (word, bit) = Self::page(address);
        if let Some(pages) = self.pages.get_mut(word) {
            *pages |= bit;
        }
        let slot = Self::slot(address);
        let Some(&before) = self.jumps.get(slot) else { return };
        if before.tag != NO_JUMP && (before.address, before.tag) != (address, tag) {
            self.put(slot ^ 1, before);
        }
        self.put(slot, Jump { address, tag, code });
    }

    fn put(&mut self, slot: usize, jump: Jump) {
        if self.jumps[slot].tag == NO_JUMP && self.used.len() < FEW {
            self.used.push(slot as u16);
        }
        self.jumps[slot] = jump;
    }

    /// The address of the code for `address` if it is there with `tag`; translated code finds it then, too.
    pub(super) fn find(&mut self, address: u64, tag: u32) -> Option<u64> {
        let slot = Self::slot(address);
        let fits = |jump: &Jump| jump.address == address && jump.tag == tag;
        if !fits(self.jumps.get(slot)?) {
            if !fits(self.jumps.get(slot ^ 1)?) {
                return None;
            }
            // Of two that share their slot the one that was looked for last has it.
            if self.jumps[slot].tag == NO_JUMP {
                self.put(slot, self.jumps[slot ^ 1]);
            } else {
                self.jumps.swap(slot, slot ^ 1);
            }
        }
        Some(self.code + u64::from(self.jumps[slot].code))
    }

    /// Drops everything.
    pub(super) fn clear(&mut self) {
        self.pages.fill(0);
        if self.used.len() < FEW {
            for slot in self.used.drain(..) {
                self.jumps[usize::from(slot)] = NONE;
            }
        } else {
            self.jumps.fill(NONE);
            self.used.clear();
        }
    }

    /// Drops (at least) the page of `address`: its mapping may have changed.
    pub(crate) fn forget_page(&mut self, address: u64) {
        let (word, bit) = Self::page(address);
        if self.pages.get(word).is_none_or(|pages| pages & bit == 0) {
            return;
        }
        if self.used.len() >= FEW {
            return self.clear();
        }
        // A small kernel that changes its page tables all the time pays for its own entries only.
        let jumps = &mut self.jumps;
        self.used.retain(|slot| {
            let jump = &mut jumps[usize::from(*slot)];
            let keep = jump.address >> 12 != address >> 12;
            if !keep {
                *jump = NONE;
            }
            keep
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_forgotten_with_few_and_with_many_entries() {
        for count in [1, 10, FEW as u64 - 1, FEW as u64, 500] {
            let mut env = JitEnv::with_jumps(0);
            let page = |n: u64| 0x7000_0000 + (n % 3) * 0x100_1000;
            for n in 0..count {
                env.insert(page(n) + n * 5, 7, n as u32 + 1);
            }
            let there = |env: &mut JitEnv| -> Vec<u64> {
                (0..count).filter(|n| env.find(page(*n) + n * 5, 7).is_some()).collect()
            };
            let before = there(&mut env);
            assert!(before.contains(&(count - 1)));
            // Has the bit of the others' pages as well.
            env.forget_page(page(1));
            let after = there(&mut env);
            assert!(after.iter().all(|n| n % 3 != 1 && before.contains(n)), "{count}");
            if count < FEW as u64 {
                assert!(before.iter().all(|n| n % 3 == 1 || after.contains(n)), "{count}");
            }
            // And it is filled again.
            for n in 0..count {
                env.insert(page(n) + n * 5, 7, n as u32 + 1);
            }
            assert_eq!(there(&mut env), before);
            env.clear();
            assert!(there(&mut env).is_empty());
        }
    }
}
