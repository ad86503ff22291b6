//! What translated code reaches through the `Cpu` besides its state.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::op::Op;

/// Entries of the jump cache.
pub const JUMPS: usize = 2048;

/// Entries in use that are still dropped one by one.
const FEW: usize = 128;

/// An entry of the jump cache (J7).
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
pub struct Jump {
    /// Virtual address.
    pub address: u64,
    /// `Tlb`'s tag for jumps; one that it never has stands for an empty entry.
    pub tag: u64,
    /// Address of the code's entry M.
    pub code: u64,
}

const NONE: Jump = Jump { address: 0, tag: u64::MAX, code: 0 };

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
    /// Address of the attention's run word.
    pub(super) run: u64,
    /// Between the two halves of an indirect call.
    pub(super) target: u64,
    pub(super) target_page: u64,
    /// Address of the [`CalledOp`] whose handler did not say "next".
    pub(super) called: u64,
    /// Handlers called, by opcode.
    pub(super) calls: Calls,
    pub(super) counted: Counted,
    /// Bit per page (hashed) that entries of the jump cache lie in.
    pages: u64,
    /// Slots in use, or [`FEW`] if there are more.
    used: Vec<u16>,
}

impl JitEnv {
    pub(super) fn with_jumps() -> Self {
        let jumps = vec![NONE; JUMPS].into_boxed_slice();
        let table = jumps.as_ptr() as u64;
        Self { jumps, table, calls: Calls::new(), ..Self::default() }
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
        (low ^ low >> 11) as usize & (JUMPS - 1)
    }

    pub(super) fn insert(&mut self, address: u64, tag: u64, code: u64) {
        if let Some(jump) = self.jumps.get_mut(Self::slot(address)) {
            if jump.tag == NONE.tag && self.used.len() < FEW {
                self.used.push(Self::slot(address) as u16);
            }
            *jump = Jump { address, tag, code };
            self.pages |= 1 << (address >> 12 & 63);
        }
    }

    /// The code for `address` if it is there with `tag`.
    pub(super) fn find(&self, address: u64, tag: u64) -> Option<u64> {
        let jump = self.jumps.get(Self::slot(address))?;
        (jump.address == address && jump.tag == tag).then_some(jump.code)
    }

    /// Drops everything.
    pub(super) fn clear(&mut self) {
        if std::mem::take(&mut self.pages) == 0 {
            return;
        }
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
        if self.pages & 1 << (address >> 12 & 63) == 0 {
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
            let mut env = JitEnv::with_jumps();
            let page = |n: u64| 0x7000_0000 + (n % 3) * 0x4_0000;
            for n in 0..count {
                env.insert(page(n) + n * 5, 7, n + 1);
            }
            let there = |env: &JitEnv| -> Vec<u64> {
                (0..count).filter(|n| env.find(page(*n) + n * 5, 7).is_some()).collect()
            };
            let before = there(&env);
            assert!(before.contains(&(count - 1)));
            // 64 pages away: the same bit.
            env.forget_page(page(1));
            let after = there(&env);
            assert!(after.iter().all(|n| n % 3 != 1 && before.contains(n)), "{count}");
            if count < FEW as u64 {
                assert!(before.iter().all(|n| n % 3 == 1 || after.contains(n)), "{count}");
            }
            // And it is filled again.
            for n in 0..count {
                env.insert(page(n) + n * 5, 7, n + 1);
            }
            assert_eq!(there(&env), before);
            env.clear();
            assert!(there(&env).is_empty());
        }
    }
}
