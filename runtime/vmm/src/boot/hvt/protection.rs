//! Protection of a guest's image, as its program headers want it: what is no data cannot be written, what is no code cannot
//! be executed. Solo5's tender has its host refuse such accesses, which ends the guest; here the guest's page tables do, so
//! that it is told of its own mistake by an exception.
//!
//! Memory that belongs to no segment can be written and executed, as with that tender on Linux.

use mvm_memory::{GuestRam, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress};

use crate::boot::Error;
use crate::boot::elf::Segment;
use crate::layout;

const PAGE: u64 = PAGE_SIZE as u64;
const LARGE_PAGE: u64 = 2 << 20;
const PER_TABLE: u64 = LARGE_PAGE / PAGE;

/// Bits of an entry of a page table or directory.
mod bit {
    pub const PRESENT: u64 = 1;
    pub const WRITE: u64 = 1 << 1;
    pub const LARGE: u64 = 1 << 7;
    pub const NO_EXECUTE: u64 = 1 << 63;
}

/// What may be done with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Access {
    write: bool,
    execute: bool,
}

impl Access {
    const ALL: Self = Self { write: true, execute: true };
    const NONE: Self = Self { write: false, execute: false };

    fn or(self, other: Self) -> Self {
        Self { write: self.write | other.write, execute: self.execute | other.execute }
    }

    fn bits(self) -> u64 {
        let write = if self.write { bit::WRITE } else { 0 };
        let execute = if self.execute { 0 } else { bit::NO_EXECUTE };
        bit::PRESENT | write | execute
    }
}

/// What may be done with the page at `page`: all that one of the segments in it may.
fn access(segments: &[Segment], page: u64) -> Access {
    let inside = segments.iter().filter(|s| s.start < page + PAGE && page < s.end());
    inside
        .map(|s| Access { write: s.is_writable(), execute: s.is_executable() })
        .reduce(Access::or)
        .unwrap_or(Access::ALL)
}

/// Changes the page tables of `cpu::write_solo5_map` so that `segments` are protected. There are tables for as many large
/// pages with different small ones in them as a sane image has; the rest allows what any of its small ones does.
///
/// # Errors
/// Guest memory does not reach there.
pub fn apply(ram: &GuestRam, segments: &[Segment]) -> Result<(), Error> {
    let end = segments.last().map_or(0, Segment::end);
    let mut spare = layout::SOLO5_TABLES.step_by(PAGE_SIZE);
    for large in (0..end).step_by(LARGE_PAGE as usize) {
        let from = large.max(layout::HIGH_RAM_START);
        let pages = (from..large + LARGE_PAGE).step_by(PAGE_SIZE);
        let small: Vec<_> = pages.map(|page| (page, access(segments, page))).collect();
        let all = small.iter().fold(Access::NONE, |all, (_, access)| all.or(*access));
        let is_first = large == 0;
        if !is_first && small.iter().all(|(_, access)| *access == all) {
            write(ram, directory_entry(large), &[large | all.bits() | bit::LARGE])?;
            continue;
        }
        let table = if is_first { Some(layout::SOLO5_FIRST_TABLE) } else { spare.next() };
        let Some(table) = table else {
            tracing::warn!("the image is in too many pieces: {large:#x} is protected as a whole");
            write(ram, directory_entry(large), &[large | all.bits() | bit::LARGE])?;
            continue;
        };
        let entries: Vec<u64> = small.iter().map(|(page, access)| page | access.bits()).collect();
        write(ram, table + (from / PAGE % PER_TABLE) * 8, &entries)?;
        write(ram, directory_entry(large), &[table | Access::ALL.bits()])?;
    }
    Ok(())
}

/// The directory's entry for the large page at `large`. Directories of all GiB lie one after the other.
fn directory_entry(large: u64) -> u64 {
    layout::PAGE_TABLES + 2 * PAGE + large / LARGE_PAGE * 8
}

fn write(ram: &GuestRam, at: u64, words: &[u64]) -> Result<(), Error> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let failed = Error::Structure { what: "page tables", at };
    ram.memory().write_slice(&bytes, GuestAddress(at)).map_err(|_| failed)
}
