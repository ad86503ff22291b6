//! Address translation and guest memory accesses.
//!
//! [`Tlb`] answers the fast path; [`walk`](mod@walk) is the truth behind it; [`PhysMemory`] is what all vCPUs
//! share. The accesses that handlers use are methods of [`Cpu`](crate::cpu::Cpu), in `access`, `stack` and `span`.

mod access;
mod context;
mod modify;
mod phys;
mod raw;
mod runs;
mod span;
mod tlb;
mod walk;
mod writers;

#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use access::Wrote;
pub(crate) use access::segment_holds;
pub use phys::{Guard, PageRef, PhysMemory};
pub use raw::HostAddr;
pub(crate) use raw::zeros;
pub use span::Span;
pub use tlb::{Access, FIRST_SLOT_MASK, JumpKey, LARGE_SLOT_MASK, NO_JUMP, TlbLayout, Who};
pub use walk::{PHYSICAL_BITS, Paging, code};

use tlb::Tlb;

/// Address translation of one vCPU.
#[derive(Debug)]
#[repr(C)]
pub struct Mmu {
    pub(crate) tlb: Tlb,
    pub(crate) phys: Arc<PhysMemory>,
    pub(crate) guard: Arc<Guard>,
    /// Index of the vCPU.
    pub(crate) index: u32,
    paging: Paging,
    /// CR0, CR3, CR4 and EFER that `paging` was made from.
    control: [u64; 4],
    /// Linear and host address of the page that the last block came from, so that jumps inside it
    /// need no translation. An odd linear address: none.
    pub(crate) code_page: (u64, u64),
    bounce: Box<span::Bounce>,
    /// Fast writes were dropped since this was last cleared, perhaps in the middle of a block.
    pub(crate) dropped_writes: bool,
    /// Pages walked.
    pub(crate) walks: u64,
}

impl Mmu {
    /// Where the TLB is, for translated code.
    pub const TLB_OFFSET: usize = std::mem::offset_of!(Mmu, tlb);

    /// The MMU of vCPU `index`; paging is off.
    pub fn new(phys: Arc<PhysMemory>, index: u32) -> Self {
        let guard = phys.guard(index).unwrap_or_default();
        Self {
            tlb: Tlb::default(),
            phys,
            guard,
            index,
            paging: Paging::default(),
            control: [0; 4],
            code_page: (1, 0),
            bounce: Box::default(),
            dropped_writes: false,
            walks: 0,
        }
    }

    /// Memory of the machine.
    pub fn phys(&self) -> &Arc<PhysMemory> {
        &self.phys
    }

    /// The guard by which other vCPUs wait for this one.
    pub fn guard(&self) -> &Arc<Guard> {
        &self.guard
    }

    /// Obeys the other vCPUs' requests to drop fast writes. At a block boundary, or in an access to a device.
    pub fn obey_requests(&mut self) {
        let request = self.guard.requested();
        self.tlb.flush_writes();
        self.dropped_writes = true;
        self.guard.confirm(request);
    }

    /// Obeys requests, if there are any.
    #[inline]
    pub fn obey_if_asked(&mut self) {
        if self.guard.asked() {
            self.obey_requests();
        }
    }

    /// The vCPU starts to execute (or goes on after [`Mmu::leave`]).
    pub fn enter(&mut self) {
        if self.guard.unpark() {
            self.obey_requests();
        }
    }

    /// The vCPU stops executing for a while: nobody waits for it.
    pub fn leave(&mut self) {
        self.guard.park();
    }
}
