//! Guest RAM as memory slots, and KVM's log of what guests write there.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;
use mvm_memory::{GuestRam, PAGE_SIZE, RamRegion};

use super::sys;
use crate::{Error, Result};

/// The slots of a machine, by index: one for each region of its RAM, and one for each piece by which one has grown.
/// (A slot can only be made anew, during which its memory would not be there.)
#[derive(Debug)]
pub(super) struct Slots {
    ram: GuestRam,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    pieces: Vec<Piece>,
    logging: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Piece {
    /// Index of the region.
    region: usize,
    /// Bytes from its start.
    part: Range<u64>,
}

impl Slots {
    /// Gives `vm` its RAM.
    pub fn new(vm: &VmFd, ram: GuestRam) -> Result<Self> {
        let slots = Self { ram, state: Mutex::default() };
        slots.grow(vm)?;
        Ok(slots)
    }

    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives `vm` what of the RAM it has not got yet, and may use.
    pub fn grow(&self, vm: &VmFd) -> Result<()> {
        let mut state = self.state();
        for (region, at) in self.ram.regions().iter().zip(0..) {
            let Some(piece) = state.missing(at, region) else { continue };
            self.set(vm, state.pieces.len(), &piece, state.logging)?;
            state.pieces.push(piece);
        }
        Ok(())
    }

    fn set(&self, vm: &VmFd, slot: usize, piece: &Piece, log: bool) -> Result<()> {
        let failed = |source| Error::Host { what: "give KVM the guest's memory", source };
        let slot = u32::try_from(slot).map_err(|e| failed(std::io::Error::other(e)))?;
        let region = &self.ram.regions()[piece.region];
        sys::set_slot(vm, slot, region, piece.part.clone(), log).map_err(|e| failed(e.into()))
    }

    /// Starts or stops logging. When it stops, what was written until then is in the tracker.
    pub fn log(&self, vm: &VmFd, on: bool) -> Result<()> {
        let mut state = self.state();
        if state.logging == on {
            return Ok(());
        }
        if !on {
            self.fetch(vm, &state)?;
        }
        for (slot, piece) in state.pieces.iter().enumerate() {
            self.set(vm, slot, piece, on)?;
        }
        state.logging = on;
        Ok(())
    }

    /// Adds what vCPUs have written since the last time to the RAM's tracker.
    pub fn collect(&self, vm: &VmFd) -> Result<()> {
        let state = self.state();
        if state.logging { self.fetch(vm, &state) } else { Ok(()) }
    }

    fn fetch(&self, vm: &VmFd, state: &State) -> Result<()> {
        for (slot, piece) in (0..).zip(&state.pieces) {
            let tracker = &self.ram.regions()[piece.region].tracker;
            let (from, len) =
                (piece.part.start as usize, (piece.part.end - piece.part.start) as usize);
            let log = vm.get_dirty_log(slot, len).map_err(|e| Error::Host {
                what: "read KVM's log of written pages",
                source: e.into(),
            })?;
            for (index, word) in log.into_iter().enumerate() {
                let mut left = word;
                while left != 0 {
                    let page = index * 64 + left.trailing_zeros() as usize;
                    tracker.set_dirty(from / PAGE_SIZE + page);
                    left &= left - 1;
                }
            }
        }
        Ok(())
    }
}

impl State {
    /// What may be used of `region`, which has index `at`, beyond the pieces that there are.
    fn missing(&self, at: usize, region: &RamRegion) -> Option<Piece> {
        let pieces = self.pieces.iter().filter(|piece| piece.region == at);
        let have = pieces.map(|piece| piece.part.end).max().unwrap_or(0);
        let part = have..region.usable();
        (!part.is_empty()).then_some(Piece { region: at, part })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mvm_memory::Backing;

    #[test]
    fn a_region_that_grows_gets_a_slot_for_each_step() {
        let page = PAGE_SIZE as u64;
        let ram = GuestRam::growing(&[(0, 4 * page)], Some((16 * page, 8 * page)), Backing::Small);
        let ram = ram.unwrap();
        let mut state = State::default();
        let missing = |state: &mut State| {
            let all: Vec<_> = ram.regions().iter().zip(0..).collect();
            let new: Vec<_> = all.iter().filter_map(|(r, at)| state.missing(*at, r)).collect();
            state.pieces.extend(new.clone());
            new
        };
        assert_eq!(missing(&mut state), [Piece { region: 0, part: 0..4 * page }]);
        assert_eq!(missing(&mut state), []);
        for (from, to) in [(0, 2), (2, 3), (3, 8)] {
            ram.regions()[1].tracker.make_usable(to * page);
            let part = from * page..to * page;
            assert_eq!(missing(&mut state), [Piece { region: 1, part }]);
        }
        assert_eq!(missing(&mut state), []);
    }
}
