//! Guest RAM: one mapping, seen by every writer through one page tracker.
//!
//! Two parties cache what is in guest memory: the emulation engine keeps decoded code, a snapshot
//! keeps clean pages. Both must hear of *every* write, whoever makes it (a vCPU, a virtqueue, a
//! loader, a balloon). So guest RAM has exactly one type here, [`GuestRam`], whose `vm-memory`
//! bitmap is [`PageTracker`]; writes through `vm-memory` accessors mark it by construction.
//!
//! Not in scope: who is *allowed* to write, and what a page is used for.

mod huge;
mod notices;
mod ram;
mod region;
mod shared;
mod tracker;

pub use huge::{HUGE_PAGE, Pool as HugePagePool};
pub use notices::{Notices, RUN_WORDS};
pub use ram::{Backing, Error, GuestRam, Loan, RamRegion};
pub use region::Region;
pub use tracker::{CodePage, LINE_SIZE, PageTracker};

/// Bytes in a guest page, the granule of tracking and mapping.
pub const PAGE_SIZE: usize = 4096;

/// Shift that turns a guest physical address into a page frame number.
pub const PAGE_SHIFT: u32 = 12;

/// The `vm-memory` view that devices and loaders use.
pub type GuestMemory = vm_memory::GuestRegionCollection<Region>;
