//! A region of guest RAM as `vm-memory` sees it: a mapping, of which the end may be withheld.

use vm_memory::bitmap::BS;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestRegionMmap, GuestUsize, MemoryRegionAddress, MmapRegion, VolatileSlice,
};

use crate::PageTracker;

/// A region of guest RAM. Accesses to what is withheld of it ([`PageTracker::usable`]) fail like those outside RAM.
#[derive(Debug)]
pub struct Region(GuestRegionMmap<PageTracker>);

impl Region {
    pub(crate) fn new(mapping: GuestRegionMmap<PageTracker>) -> Self {
        Self(mapping)
    }

    /// Whether the guest may use `[offset, offset + count)`.
    fn check(&self, offset: MemoryRegionAddress, count: usize) -> Result<(), GuestMemoryError> {
        let mapping: &MmapRegion<PageTracker> = &self.0;
        let end = offset.0.checked_add(count as u64);
        if end.is_some_and(|end| end <= mapping.bitmap().usable()) {
            return Ok(());
        }
        let address = self.start_addr().0.saturating_add(offset.0);
        Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(address)))
    }
}

impl GuestMemoryRegion for Region {
    type B = PageTracker;

    // All of it, whatever is withheld: a region does not change its place among others.
    fn len(&self) -> GuestUsize {
        self.0.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.0.start_addr()
    }

    fn bitmap(&self) -> BS<'_, PageTracker> {
        self.0.bitmap()
    }

    fn get_host_address(&self, address: MemoryRegionAddress) -> Result<*mut u8, GuestMemoryError> {
        self.check(address, 1)?;
        self.0.get_host_address(address)
    }

    fn file_offset(&self) -> Option<&FileOffset> {
        self.0.file_offset()
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, PageTracker>>, GuestMemoryError> {
        self.check(offset, count)?;
        self.0.get_slice(offset, count)
    }

    fn is_hugetlbfs(&self) -> Option<bool> {
        self.0.is_hugetlbfs()
    }
}

impl GuestMemoryRegionBytes for Region {}
