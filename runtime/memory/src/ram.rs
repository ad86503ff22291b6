//! The RAM of one machine: sealed memory files, mapped once.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::memfd::MFdFlags;
use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemory as _, GuestMemoryRegion, GuestRegionMmap};

use crate::huge::{self, HUGE_PAGE};
use crate::shared::{check_sealed, memory_file};
use crate::{GuestMemory, PAGE_SIZE, PageTracker, Region};

/// Why guest RAM could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A range is empty, not page-aligned, or runs past the end of the address space.
    #[error("RAM range {start:#x}+{size:#x} is not a whole number of pages")]
    Range {
        /// First guest physical address.
        start: u64,
        /// Bytes.
        size: u64,
    },
    /// The memory file could not be made or sized.
    #[error("cannot reserve {size} bytes of memory for the guest: {source}")]
    Reserve {
        /// Bytes.
        size: u64,
        /// What the host said.
        source: io::Error,
    },
    /// The memory file could not be mapped.
    #[error("cannot map {size} bytes of guest memory: {source}")]
    Map {
        /// Bytes.
        size: u64,
        /// What the host said.
        source: vm_memory::mmap::MmapRegionError,
    },
    /// Huge pages only come whole.
    #[error(
        "RAM range {start:#x}+{size:#x} is not a whole number of huge pages of 2 MiB: give the guest a multiple of \
         2 MiB of memory"
    )]
    HugeRange {
        /// First guest physical address.
        start: u64,
        /// Bytes.
        size: u64,
    },
    /// The host's pool of huge pages is too small.
    #[error("{}", huge::shortage(*needed, *pool))]
    NoHugePages {
        /// Huge pages that one range of the guest's memory takes.
        needed: u64,
        /// What the host has.
        pool: Option<huge::Pool>,
    },
    /// The host has no huge pages of this kind at all.
    #[error(
        "this host's kernel has no huge pages of 2 MiB: leave them out, or take transparent ones: {source}"
    )]
    HugeUnknown {
        /// What the host said.
        source: io::Error,
    },
    /// The host does not make shared memory of transparent huge pages.
    #[error("{}", huge::no_transparent(found))]
    NoTransparent {
        /// What `shmem_enabled` says, or what the host said.
        found: String,
    },
    /// Two ranges overlap, or there is none.
    #[error("the RAM ranges do not make a memory map: {0}")]
    Layout(vm_memory::GuestRegionCollectionError),
}

/// One contiguous range of guest RAM as the engines see it: host pointer and page tracker.
///
/// The pointer is for engines alone; everyone else goes through [`GuestRam::memory`].
#[derive(Debug, Clone)]
pub struct RamRegion {
    /// First guest physical address.
    pub start: u64,
    /// Length in bytes, a multiple of the page size.
    pub size: u64,
    /// Where the range is mapped in this process. Valid as long as the [`GuestRam`] lives.
    pub host: *mut u8,
    /// Who cached what of each page.
    pub tracker: PageTracker,
    /// Nothing of it is there at the start: it comes piece by piece while the guest runs ([`RamRegion::usable`]), and
    /// kernels are not told of it.
    pub growing: bool,
}

impl RamRegion {
    /// Bytes from its start that the guest may use. Only ever becomes more.
    #[inline]
    pub fn usable(&self) -> u64 {
        if self.growing { self.tracker.usable().min(self.size) } else { self.size }
    }
}

// SAFETY: the pointer is only a number here; every dereference is an engine's own unsafe block, and
// guest RAM is shared between threads by nature.
unsafe impl Send for RamRegion {}
// SAFETY: as above.
unsafe impl Sync for RamRegion {}

/// The pages of the host that guest RAM is made of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Backing {
    /// Small pages, each when it is touched.
    #[default]
    Small,
    /// Small pages, which the host's kernel is asked to make huge ones where it can.
    Transparent,
    /// Huge pages of 2 MiB from the host's pool, reserved when the machine is made, so that the guest never finds
    /// the pool empty.
    Huge,
}

/// The RAM of one machine. Cheap to clone; the mapping goes with the last clone.
///
/// Pages are touched lazily: a fresh machine costs the host nothing but address space.
#[derive(Debug, Clone)]
pub struct GuestRam {
    memory: GuestMemory,
    regions: Vec<RamRegion>,
}

impl GuestRam {
    /// Reserves and maps RAM for the ranges `(start, size)` in bytes, each backed by its own
    /// memory file (`memfd_create(2)`).
    ///
    /// # Errors
    /// [`Error`]: bad or overlapping ranges, or the host refuses the memory.
    pub fn new(ranges: &[(u64, u64)]) -> Result<Self, Error> {
        Self::backed(ranges, Backing::Small)
    }

    /// The same, of pages of this kind.
    ///
    /// # Errors
    /// Also if the host has no such pages, or not enough of them.
    pub fn backed(ranges: &[(u64, u64)], backing: Backing) -> Result<Self, Error> {
        Self::growing(ranges, None, backing)
    }

    /// The same, and with `growth` a range after them all of which nothing may be used at first. Its pages are never
    /// those of the host's pool, which would have to be reserved at once.
    ///
    /// # Errors
    /// As [`GuestRam::backed`].
    pub fn growing(
        ranges: &[(u64, u64)],
        growth: Option<(u64, u64)>,
        backing: Backing,
    ) -> Result<Self, Error> {
        if backing == Backing::Transparent {
            huge::check_transparent().map_err(|found| Error::NoTransparent { found })?;
        }
        let make = |(start, size), backing| {
            let len = check_range(start, size)?;
            let file = reserve(start, size, backing)?;
            let tracker = PageTracker::shared(len);
            map(
                start,
                file,
                tracker.map_err(|source| Error::Reserve { size, source })?,
                len,
                backing,
            )
        };
        let mut regions = Vec::new();
        for &range in ranges {
            regions.push(make(range, backing)?);
        }
        if let Some(range) = growth {
            let backing = if backing == Backing::Huge { Backing::Small } else { backing };
            let region = make(range, backing)?;
            region.tracker.withhold();
            regions.push(Mapped { growing: true, ..region });
        }
        Self::from_mapped(regions)
    }

    /// Maps the RAM that another process has lent by [`GuestRam::lend`]. Writes of either are seen by
    /// both, and so are their marks in the page tracker.
    ///
    /// # Errors
    /// [`Error`]: the descriptors are not those of RAM, or the host refuses.
    pub fn attach(loans: Vec<Loan<OwnedFd>>) -> Result<Self, Error> {
        let regions = loans.into_iter().map(|loan| {
            let Loan { start, size, ram, tracker } = loan;
            let len = check_range(start, size)?;
            let reserve = |source| Error::Reserve { size, source };
            let ram = File::from(ram);
            check_sealed(&ram, size).map_err(reserve)?;
            let tracker = PageTracker::attach(File::from(tracker), len).map_err(reserve)?;
            map(start, ram, tracker, len, Backing::Small)
        });
        let ram = Self::from_mapped(regions.collect::<Result<_, _>>()?)?;
        if let Some(board) = ram.regions.first() {
            ram.regions.iter().for_each(|r| r.tracker.give_notice_at(&board.tracker));
        }
        Ok(ram)
    }

    fn from_mapped(all: Vec<Mapped>) -> Result<Self, Error> {
        let (mut regions, mut mapped) = (Vec::new(), Vec::new());
        for Mapped { region, host, tracker, growing } in all {
            let (start, size) = (region.start_addr().0, region.len());
            regions.push(RamRegion { start, size, host, tracker, growing });
            mapped.push(Region::new(region));
        }
        let memory = GuestMemory::from_regions(mapped).map_err(Error::Layout)?;
        Ok(Self { memory, regions })
    }

    /// What another process needs to write this RAM: each region's memory file and that of its page
    /// tracker.
    pub fn lend(&self) -> Vec<Loan<BorrowedFd<'_>>> {
        let files = self.memory.iter().filter_map(|r| r.file_offset());
        let pairs = files.zip(&self.regions);
        pairs
            .filter_map(|(ram, region)| {
                let RamRegion { start, size, .. } = *region;
                let tracker = region.tracker.file()?.as_fd();
                Some(Loan { start, size, ram: ram.file().as_fd(), tracker })
            })
            .collect()
    }

    /// The view for devices and loaders; its writes reach the page tracker.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The ranges in ascending order, for engines.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// Bytes that are there from the start.
    pub fn size(&self) -> u64 {
        self.boot_regions().map(|r| r.size).sum()
    }

    /// The ranges that are there from the start, in ascending order.
    pub fn boot_regions(&self) -> impl Iterator<Item = &RamRegion> {
        self.regions.iter().filter(|r| !r.growing)
    }

    /// The range that grows, if there is one.
    pub fn growing_region(&self) -> Option<&RamRegion> {
        self.regions.iter().find(|r| r.growing)
    }

    /// Gives pages `[gpa, gpa + len)` back to the host; the guest reads zeros there afterwards.
    /// Parts outside RAM or not covering a whole page are left alone, and so are huge pages. Returns the bytes
    /// released.
    pub fn discard(&self, gpa: u64, len: u64) -> u64 {
        let page = PAGE_SIZE as u64;
        let mut released = 0;
        for region in &self.regions {
            let end = gpa.saturating_add(len).min(region.start + region.size) & !(page - 1);
            let from = gpa.max(region.start).next_multiple_of(page);
            if from >= end {
                continue;
            }
            let (offset, len) = ((from - region.start) as usize, (end - from) as usize);
            // SAFETY: the range lies inside the mapping, which outlives this call; the mapping is
            // shared and file-backed, so MADV_REMOVE only turns its content into zeros.
            let rc =
                unsafe { libc::madvise(region.host.add(offset).cast(), len, libc::MADV_REMOVE) };
            if rc == 0 {
                region.tracker.mark_dirty(offset, len);
                released += len as u64;
            }
        }
        released
    }
}

/// One region of RAM on its way to another process.
#[derive(Debug)]
pub struct Loan<F> {
    /// First guest physical address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// The memory file with the RAM.
    pub ram: F,
    /// The memory file with the tracker's records.
    pub tracker: F,
}

struct Mapped {
    region: GuestRegionMmap<PageTracker>,
    host: *mut u8,
    tracker: PageTracker,
    growing: bool,
}

/// The length of a range that can be RAM.
fn check_range(start: u64, size: u64) -> Result<usize, Error> {
    let range = Error::Range { start, size };
    let whole = |n: u64| n.is_multiple_of(PAGE_SIZE as u64);
    let Ok(len) = usize::try_from(size) else { return Err(range) };
    if size == 0 || !whole(start) || !whole(size) || start.checked_add(size).is_none() {
        return Err(range);
    }
    Ok(len)
}

/// Maps `len` bytes of a file of pages of this kind. Those of one that was lent are there already.
fn map(
    start: u64,
    file: File,
    tracker: PageTracker,
    len: usize,
    backing: Backing,
) -> Result<Mapped, Error> {
    let size = len as u64;
    // What comes from the pool is reserved with the mapping: a guest that met an empty one would end its monitor.
    let reserved = if backing == Backing::Huge { 0 } else { libc::MAP_NORESERVE };
    let mapping = MmapRegionBuilder::new_with_bitmap(len, tracker.clone())
        .with_file_offset(FileOffset::new(file, 0))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | reserved)
        .build()
        .map_err(|source| match backing {
            Backing::Huge => {
                Error::NoHugePages { needed: size / HUGE_PAGE, pool: huge::Pool::read() }
            }
            _ => Error::Map { size, source },
        })?;
    let host = mapping.as_ptr();
    if backing == Backing::Transparent {
        huge::advise(&mapping).map_err(|e| Error::NoTransparent { found: e.to_string() })?;
    }
    let region = GuestRegionMmap::new(mapping, GuestAddress(start));
    let region = region.ok_or(Error::Range { start, size })?;
    Ok(Mapped { region, host, tracker, growing: false })
}

/// The memory file of a range.
fn reserve(start: u64, size: u64, backing: Backing) -> Result<File, Error> {
    if backing != Backing::Huge {
        return memory_file("mvm-ram", size, MFdFlags::empty())
            .map_err(|source| Error::Reserve { size, source });
    }
    if !start.is_multiple_of(HUGE_PAGE) || !size.is_multiple_of(HUGE_PAGE) {
        return Err(Error::HugeRange { start, size });
    }
    let flags = MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    memory_file("mvm-ram", size, flags).map_err(|source| Error::HugeUnknown { source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    /// The same RAM, as another process has it.
    fn borrower(ram: &GuestRam) -> GuestRam {
        let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
        let loans = ram.lend().into_iter().map(|l| Loan {
            start: l.start,
            size: l.size,
            ram: own(l.ram),
            tracker: own(l.tracker),
        });
        GuestRam::attach(loans.collect()).unwrap()
    }

    #[test]
    fn writes_through_the_memory_view_reach_the_tracker() {
        let ram = GuestRam::new(&[(0, 0x4000), (0x1_0000, 0x2000)]).unwrap();
        let high = &ram.regions()[1];
        let generation = high.tracker.code_page(1).unwrap().watch(0, 16);
        ram.memory().write_obj(0x1122_3344_u32, GuestAddress(0x1_1008)).unwrap();
        assert_ne!(high.tracker.code_page(1).unwrap().generation(), generation);
        assert!(high.tracker.dirty_at(0x1008));
        assert!(!ram.regions()[0].tracker.dirty_at(0));
    }

    #[test]
    fn discarded_pages_read_as_zero_and_count_as_written() {
        let ram = GuestRam::new(&[(0, 0x4000)]).unwrap();
        ram.memory().write_slice(&[0xaa; 0x4000], GuestAddress(0)).unwrap();
        ram.regions()[0].tracker.take_dirty();
        assert_eq!(ram.discard(0x800, 0x2000), 0x1000);
        let mut page = [1u8; 0x1000];
        ram.memory().read_slice(&mut page, GuestAddress(0x1000)).unwrap();
        assert_eq!(page, [0; 0x1000]);
        assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(0x2000)).unwrap(), 0xaa);
        assert_eq!(ram.regions()[0].tracker.take_dirty(), [0b10]);
    }

    #[test]
    fn of_a_growing_range_nobody_uses_what_is_withheld() {
        let ram = GuestRam::growing(&[(0, 0x4000)], Some((0x1_0000, 0x4000)), Backing::Small);
        let ram = ram.unwrap();
        let memory = ram.memory();
        let readable = |at, len| memory.check_range(GuestAddress(at), len);
        assert_eq!((ram.size(), ram.boot_regions().count(), ram.regions().len()), (0x4000, 1, 2));
        let growing = ram.growing_region().unwrap();
        assert_eq!(growing.usable(), 0);
        for at in [0x1_0000, 0x1_0001, 0x1_3fff] {
            assert!(!readable(at, 1));
            assert!(memory.write_obj(7u8, GuestAddress(at)).is_err());
            assert!(memory.read_obj::<u8>(GuestAddress(at)).is_err());
            assert!(memory.get_host_address(GuestAddress(at)).is_err());
        }
        growing.tracker.make_usable(0x2000);
        assert_eq!(growing.usable(), 0x2000);
        assert!(
            readable(0x1_0000, 0x2000) && !readable(0x1_0000, 0x2001) && !readable(0x1_2000, 1)
        );
        memory.write_obj(7u8, GuestAddress(0x1_1fff)).unwrap();
        assert!(memory.write_obj(7u16, GuestAddress(0x1_1fff)).is_err());
        // Those who borrow it are bound by the same limit.
        let borrower = borrower(&ram);
        assert!(borrower.memory().write_obj(1u8, GuestAddress(0x1_2000)).is_err());
        growing.tracker.make_usable(0x4000);
        borrower.memory().write_obj(1u8, GuestAddress(0x1_2000)).unwrap();
        assert_eq!(ram.discard(0x1_0000, 0x4000), 0x4000);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x1_2000)).unwrap(), 0);
    }

    #[test]
    fn odd_ranges_are_refused() {
        assert!(matches!(GuestRam::new(&[(0, 100)]), Err(Error::Range { size: 100, .. })));
        assert!(matches!(GuestRam::new(&[(0, 0x2000), (0x1000, 0x1000)]), Err(Error::Layout(_))));
    }

    #[test]
    fn huge_pages_are_there_whole_or_missed_by_number() {
        let two = [(0, 2 * HUGE_PAGE)];
        match GuestRam::backed(&two, Backing::Huge) {
            Ok(ram) => {
                ram.memory().write_obj(7u8, GuestAddress(HUGE_PAGE + 5)).unwrap();
                assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(HUGE_PAGE + 5)).unwrap(), 7);
                assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(HUGE_PAGE + 6)).unwrap(), 0);
                assert!(ram.regions()[0].tracker.dirty_at(HUGE_PAGE as usize + 5));
                // A small part of one cannot be given back, and stays.
                assert_eq!(ram.discard(HUGE_PAGE, PAGE_SIZE as u64), 0);
                assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(HUGE_PAGE + 5)).unwrap(), 7);
            }
            Err(Error::NoHugePages { needed: 2, .. } | Error::HugeUnknown { .. }) => {}
            Err(e) => panic!("{e}"),
        }
        // More than hosts have as a rule.
        match GuestRam::backed(&[(0, 8 << 30)], Backing::Huge) {
            Err(e @ Error::NoHugePages { .. }) => {
                let text = e.to_string();
                assert!(
                    text.contains("4096 huge pages") && text.contains("nr_hugepages"),
                    "{text}"
                );
            }
            Ok(_) | Err(Error::HugeUnknown { .. }) => {}
            Err(e) => panic!("{e}"),
        }
        let odd = GuestRam::backed(&[(0, HUGE_PAGE + PAGE_SIZE as u64)], Backing::Huge);
        assert!(odd.unwrap_err().to_string().contains("multiple of 2 MiB"));
    }

    #[test]
    fn transparent_pages_are_asked_for_where_the_host_has_them() {
        match GuestRam::backed(&[(0, 2 * HUGE_PAGE)], Backing::Transparent) {
            Ok(ram) => {
                ram.memory().write_obj(7u8, GuestAddress(5)).unwrap();
                // Asked for or not, a page can be given back.
                assert_eq!(ram.discard(0, PAGE_SIZE as u64), PAGE_SIZE as u64);
            }
            Err(e @ Error::NoTransparent { .. }) => {
                assert!(e.to_string().contains("shmem_enabled"), "{e}");
            }
            Err(e) => panic!("{e}"),
        }
    }

    #[test]
    fn a_borrower_writes_the_same_ram_and_the_lender_hears_of_it() {
        let ram = GuestRam::new(&[(0, 0x4000), (0x1_0000, 0x2000)]).unwrap();
        let borrower = borrower(&ram);
        let generation = ram.regions()[1].tracker.code_page(1).unwrap().watch(0, 16);
        assert_eq!(ram.regions()[0].tracker.notices().count(), 0);
        borrower.memory().write_obj(0x55_u8, GuestAddress(0x1_1008)).unwrap();
        assert_eq!(ram.regions()[0].tracker.notices().count(), 1, "at the first region's place");
        assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(0x1_1008)).unwrap(), 0x55);
        assert_ne!(ram.regions()[1].tracker.code_page(1).unwrap().generation(), generation);
        assert_eq!(ram.regions()[1].tracker.take_dirty(), [0b10]);
    }
}
