//! What has to be known about each guest page by those who cache its content.

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::memfd::MFdFlags;
use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

use crate::notices::Notices;
use crate::shared::{self, Mapping};
use crate::{PAGE_SHIFT, PAGE_SIZE};

/// Bytes covered by one bit of [`CodePage::lines`]: a cache line.
pub const LINE_SIZE: usize = PAGE_SIZE / 64;

/// The code-cache record of one guest page.
///
/// Protocol (the reader is a vCPU that decodes, the writer anyone who stores):
///
/// 1. A reader publishes the lines it is about to decode ([`CodePage::watch`], which answers with
///    the generation), makes sure that no vCPU writes the page behind the tracker's back (the
///    engine's business), and only then reads the bytes.
/// 2. A writer stores first and then calls [`CodePage::written`]. If watched lines were hit, the
///    generation moves on and everything decoded under the old one is stale.
///
/// So bytes that were read before the store always carry a generation that the store ends.
///
/// Where stores to code are the rule, code may be *compared* with what it was decoded from each time before it runs, in
/// place of being watched: stores then end nothing. Readers decide that for each page ([`CodePage::compare`]), and each
/// piece of cached code is kept right by the one or the other, whatever the page says by then.
///
/// The record may lie in memory that another process shares (a file server which fills pages of the
/// guest): the protocol needs atomics alone.
#[derive(Debug, Default)]
#[repr(C)]
pub struct CodePage {
    lines: AtomicU64,
    generation: AtomicU32,
    compared: AtomicU32,
}

impl CodePage {
    /// Marks bytes `[offset, offset + len)` of the page as cached code, and returns the generation
    /// under which they may be decoded.
    pub fn watch(&self, offset: usize, len: usize) -> u32 {
        let mask = line_mask(offset, len);
        loop {
            if self.lines.load(Ordering::SeqCst) & mask != mask {
                self.lines.fetch_or(mask, Ordering::SeqCst);
            }
            let generation = self.generation.load(Ordering::SeqCst);
            // A writer in between may have wiped the lines and moved the generation on already.
            if self.lines.load(Ordering::SeqCst) & mask == mask {
                return generation;
            }
        }
    }

    /// Bit per [`LINE_SIZE`] bytes that hold cached code.
    pub fn lines(&self) -> u64 {
        self.lines.load(Ordering::SeqCst)
    }

    /// Number of times cached code of this page went stale.
    #[inline]
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// Tells the record that `[offset, offset + len)` was stored to. Returns true if cached code
    /// went stale.
    #[inline]
    pub fn written(&self, offset: usize, len: usize) -> bool {
        // The store must be visible before the record is looked at, so that a reader who marks lines in
        // between gets the new bytes. On x86 a load may overtake an older store.
        fence(Ordering::SeqCst);
        let hit = self.lines.load(Ordering::SeqCst) & line_mask(offset, len);
        if hit == 0 {
            return false;
        }
        self.end();
        true
    }

    /// Ends all cached code of the page: nothing of it is cached under the new generation.
    pub fn end(&self) {
        self.lines.store(0, Ordering::SeqCst);
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// Is code that is decoded from now on to be compared, and not to be watched?
    #[inline]
    pub fn is_compared(&self) -> bool {
        self.compared.load(Ordering::Relaxed) != 0
    }

    /// From now on code of the page is compared, or watched (again).
    pub fn compare(&self, compared: bool) {
        self.compared.store(u32::from(compared), Ordering::Relaxed);
    }
}

/// Bits of the lines touched by `[offset, offset + len)`, clipped to the page.
fn line_mask(offset: usize, len: usize) -> u64 {
    if len == 0 || offset >= PAGE_SIZE {
        return 0;
    }
    let first = offset / LINE_SIZE;
    let last = (offset + len - 1).min(PAGE_SIZE - 1) / LINE_SIZE;
    (u64::MAX << first) & (u64::MAX >> (63 - last))
}

/// Hears of pages whose cached code went stale.
type Listener = Arc<dyn Fn(usize) + Send + Sync>;

/// The records of all pages, in one mapping: those about code, then the dirty log, then the notices, then how many
/// bytes at the region's end are withheld.
struct Pages {
    mapping: Mapping,
    count: usize,
    /// Of this process: what another process writes to memory that it shares, it does not hear of.
    listener: Mutex<Option<Listener>>,
}

impl Pages {
    fn of(mapping: Mapping, count: usize) -> Self {
        Self { mapping, count, listener: Mutex::new(None) }
    }

    fn bytes_of_code(count: usize) -> usize {
        count * size_of::<CodePage>()
    }

    fn dirty_words(count: usize) -> usize {
        count.div_ceil(64)
    }

    /// Bytes of the mapping for `count` pages.
    fn bytes(count: usize) -> usize {
        Self::start_of_withheld(count) + size_of::<AtomicU64>()
    }

    fn start_of_withheld(count: usize) -> usize {
        Self::start_of_notices(count) + size_of::<Notices>()
    }

    fn start_of_notices(count: usize) -> usize {
        let dirty = Self::dirty_words(count) * size_of::<AtomicU64>();
        (Self::bytes_of_code(count) + dirty).next_multiple_of(align_of::<Notices>())
    }

    #[inline]
    fn code(&self) -> &[CodePage] {
        // SAFETY: the mapping is page-aligned, starts with `count` records, is zeros or what atomics
        // have stored, for which both types have no invalid values, and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.mapping.start().as_ptr().cast(), self.count) }
    }

    #[inline]
    fn dirty(&self) -> &[AtomicU64] {
        let words = Self::dirty_words(self.count);
        // SAFETY: as above; a record's size is a multiple of the alignment of the words after it.
        unsafe {
            let start = self.mapping.start().as_ptr().add(Self::bytes_of_code(self.count));
            std::slice::from_raw_parts(start.cast(), words)
        }
    }

    #[inline]
    fn notices(&self) -> &Notices {
        // SAFETY: as above; the offset is a multiple of the alignment, and the mapping ends behind them.
        unsafe {
            let start = self.mapping.start().as_ptr().add(Self::start_of_notices(self.count));
            &*start.cast()
        }
    }

    #[inline]
    fn withheld(&self) -> &AtomicU64 {
        // SAFETY: as above; the notices before it are aligned to more than it is.
        unsafe {
            let start = self.mapping.start().as_ptr().add(Self::start_of_withheld(self.count));
            &*start.cast()
        }
    }
}

const _: () = assert!(size_of::<CodePage>() == 16, "there is one for each page of the guest");
const _: () = assert!(size_of::<Notices>().is_multiple_of(align_of::<AtomicU64>()));

/// The page tracker of one RAM region: the `vm-memory` bitmap of everything written.
///
/// Cheap to clone; clones share the same records. Offsets are bytes from the region's start.
#[derive(Clone)]
pub struct PageTracker(Arc<Pages>);

impl PageTracker {
    /// A tracker for `len` bytes whose records other processes can share, see
    /// [`PageTracker::file`].
    ///
    /// # Errors
    /// The host refuses the memory.
    pub fn shared(len: usize) -> io::Result<Self> {
        let count = len.div_ceil(PAGE_SIZE);
        let bytes = Pages::bytes(count);
        let file = shared::memory_file("mvm-pages", bytes as u64, MFdFlags::empty())?;
        Ok(Self(Arc::new(Pages::of(Mapping::of(file, bytes)?, count))))
    }

    /// The tracker whose records are in `file`, which came from [`PageTracker::file`] of another
    /// process and is for `len` bytes of RAM.
    ///
    /// # Errors
    /// The file is another one, or the host refuses.
    pub fn attach(file: File, len: usize) -> io::Result<Self> {
        let count = len.div_ceil(PAGE_SIZE);
        let bytes = Pages::bytes(count);
        shared::check_sealed(&file, bytes as u64)?;
        Ok(Self(Arc::new(Pages::of(Mapping::of(file, bytes)?, count))))
    }

    /// The memory file with the records, if other processes can share them.
    pub fn file(&self) -> Option<&File> {
        self.0.mapping.file()
    }
}

impl PageTracker {
    /// The code record of page `index` of the region, if there is such a page.
    #[inline]
    pub fn code_page(&self, index: usize) -> Option<&CodePage> {
        self.0.code().get(index)
    }

    /// Number of pages tracked.
    pub fn pages(&self) -> usize {
        self.0.count
    }

    /// Bytes of the region, from its start, that the guest may use; all of them unless some are
    /// [withheld](PageTracker::make_usable).
    #[inline]
    pub fn usable(&self) -> u64 {
        let all = (self.0.count as u64) << PAGE_SHIFT;
        all.saturating_sub(self.0.withheld().load(Ordering::Acquire))
    }

    /// Withholds everything, before anybody uses the region.
    pub(crate) fn withhold(&self) {
        let all = (self.0.count as u64) << PAGE_SHIFT;
        self.0.withheld().store(all, Ordering::Release);
    }

    /// Lets the guest use the region's first `bytes` from now on, for good: it never becomes less. Who has the records
    /// in common hears of it; an engine may have to be told besides.
    pub fn make_usable(&self, bytes: u64) {
        let all = (self.0.count as u64) << PAGE_SHIFT;
        self.0.withheld().fetch_min(all.saturating_sub(bytes), Ordering::AcqRel);
    }

    /// Marks page `index` as written, for the dirty log alone (a vCPU's fast path has told the
    /// code record already, or knows that there is none).
    #[inline]
    pub fn set_dirty(&self, index: usize) {
        if let Some(word) = self.0.dirty().get(index / 64) {
            let bit = 1 << (index % 64);
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    /// Calls `listener` with the index of a page whenever a store through the bitmap ends cached code of it, on the
    /// storing thread and before that goes on. Replaces the one before.
    pub fn on_stale_code(&self, listener: impl Fn(usize) + Send + Sync + 'static) {
        *self.0.listener.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(listener));
    }

    /// Notices of other processes that share the records. All regions of a machine's RAM use those of the first.
    #[inline]
    pub fn notices(&self) -> &Notices {
        self.0.notices()
    }

    /// Gives notice at `board` of what is stored through this tracker, for vCPUs of another process.
    pub(crate) fn give_notice_at(&self, board: &Self) {
        // Not owned: a tracker that owned itself would never go.
        let board = Arc::downgrade(&board.0);
        self.on_stale_code(move |_| {
            if let Some(board) = board.upgrade() {
                board.notices().give();
            }
        });
    }

    fn tell(&self, index: usize) {
        let listener = self.0.listener.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(listener) = listener {
            listener(index);
        }
    }

    /// Takes the dirty log: a bit per page, cleared as it is read.
    pub fn take_dirty(&self) -> Vec<u64> {
        self.0.dirty().iter().map(|w| w.swap(0, Ordering::AcqRel)).collect()
    }
}

impl fmt::Debug for PageTracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageTracker").field("pages", &self.pages()).finish()
    }
}

impl Default for PageTracker {
    fn default() -> Self {
        Self::with_len(0)
    }
}

impl<'a> WithBitmapSlice<'a> for PageTracker {
    type S = RefSlice<'a, PageTracker>;
}

impl Bitmap for PageTracker {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let end = offset.saturating_add(len);
        for index in offset >> PAGE_SHIFT..=(end - 1) >> PAGE_SHIFT {
            let Some(page) = self.code_page(index) else { return };
            let start = index << PAGE_SHIFT;
            let from = offset.max(start);
            if page.written(from - start, end - from) {
                self.tell(index);
            }
            self.set_dirty(index);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let index = offset >> PAGE_SHIFT;
        self.0
            .dirty()
            .get(index / 64)
            .is_some_and(|w| w.load(Ordering::Acquire) >> (index % 64) & 1 != 0)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, PageTracker> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for PageTracker {
    /// A tracker of this process alone.
    ///
    /// # Panics
    /// The host has no address space left.
    fn with_len(len: usize) -> Self {
        let count = len.div_ceil(PAGE_SIZE);
        let mapping = Mapping::private(Pages::bytes(count)).expect("address space for the tracker");
        Self(Arc::new(Pages::of(mapping, count)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_masks_cover_exactly_the_touched_lines() {
        assert_eq!(line_mask(0, 1), 1);
        assert_eq!(line_mask(63, 1), 1);
        assert_eq!(line_mask(63, 2), 3);
        assert_eq!(line_mask(4095, 1), 1 << 63);
        assert_eq!(line_mask(4095, 100), 1 << 63);
        assert_eq!(line_mask(0, 4096), u64::MAX);
        assert_eq!(line_mask(64, 0), 0);
    }

    #[test]
    fn writes_end_only_watched_code() {
        let tracker = PageTracker::with_len(3 * PAGE_SIZE);
        let page = tracker.code_page(1).unwrap();
        let before = page.watch(128, 20);
        assert_eq!(page.watch(128, 20), before);
        assert_eq!(page.lines(), 0b100);
        tracker.mark_dirty(PAGE_SIZE + 64, 64);
        assert_eq!(page.generation(), before);
        tracker.mark_dirty(100, PAGE_SIZE + 29);
        assert_ne!(page.generation(), before);
        assert_eq!(page.lines(), 0);
        assert!(
            tracker.dirty_at(0) && tracker.dirty_at(PAGE_SIZE) && !tracker.dirty_at(2 * PAGE_SIZE)
        );
    }

    #[test]
    fn stale_code_is_heard_of() {
        let tracker = PageTracker::with_len(3 * PAGE_SIZE);
        let heard = Arc::new(AtomicU64::new(0));
        let count = heard.clone();
        tracker.on_stale_code(move |index| {
            count.fetch_add(1 << (8 * index), Ordering::Relaxed);
        });
        tracker.code_page(2).unwrap().watch(0, 8);
        tracker.mark_dirty(2 * PAGE_SIZE + 64, 64);
        tracker.mark_dirty(0, 3 * PAGE_SIZE);
        assert_eq!(heard.load(Ordering::Relaxed), 1 << 16);
    }

    #[test]
    fn out_of_range_marks_are_ignored() {
        let tracker = PageTracker::with_len(PAGE_SIZE);
        tracker.mark_dirty(usize::MAX - 3, 10);
        tracker.mark_dirty(PAGE_SIZE, 1);
        assert!(!tracker.dirty_at(PAGE_SIZE));
    }

    #[test]
    fn what_another_mapping_marks_ends_code_here() {
        let here = PageTracker::shared(3 * PAGE_SIZE).unwrap();
        let file = here.file().unwrap().try_clone().unwrap();
        let there = PageTracker::attach(file, 3 * PAGE_SIZE).unwrap();
        let generation = here.code_page(2).unwrap().watch(0, 64);
        there.give_notice_at(&there);
        here.notices().run_word(3).unwrap().store(1, Ordering::SeqCst);
        there.mark_dirty(PAGE_SIZE + 10, 1);
        assert_eq!(here.notices().count(), 0, "there is no code");
        there.mark_dirty(2 * PAGE_SIZE + 10, 1);
        assert_ne!(here.code_page(2).unwrap().generation(), generation);
        assert_eq!(here.notices().count(), 1);
        assert_eq!(here.notices().run_word(3).unwrap().load(Ordering::SeqCst), 0);
        assert_eq!(here.take_dirty(), [0b110]);
        assert_eq!(there.take_dirty(), [0]);
    }

    #[test]
    fn what_is_withheld_only_becomes_less_and_all_hear_of_it() {
        let all = 4 * PAGE_SIZE as u64;
        let here = PageTracker::shared(4 * PAGE_SIZE).unwrap();
        let file = here.file().unwrap().try_clone().unwrap();
        let there = PageTracker::attach(file, 4 * PAGE_SIZE).unwrap();
        assert_eq!(there.usable(), all, "as a rule nothing is withheld");
        here.withhold();
        assert_eq!(there.usable(), 0);
        for (asked, usable) in [(0x2000, 0x2000), (0x1000, 0x2000), (u64::MAX, all)] {
            here.make_usable(asked);
            assert_eq!(there.usable(), usable);
        }
    }

    #[test]
    fn records_of_another_size_are_refused() {
        let tracker = PageTracker::shared(3 * PAGE_SIZE).unwrap();
        let file = || tracker.file().unwrap().try_clone().unwrap();
        assert!(PageTracker::attach(file(), 300 * PAGE_SIZE).is_err());
        assert!(file().set_len(0).is_err(), "the file is sealed");
        let loose = File::from(nix::sys::memfd::memfd_create("x", MFdFlags::empty()).unwrap());
        assert!(PageTracker::attach(loose, 0).is_err());
        assert!(PageTracker::with_len(PAGE_SIZE).file().is_none());
    }
}
