//! Guest-physical memory as all vCPUs of a machine share it: RAM, the bus beyond it, and the agreement
//! between those who store and those who decode (invariants 5 to 8).

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mvm_engine::IoBus;
use mvm_memory::{CodePage, GuestRam, PAGE_SHIFT, PageTracker};

use super::raw::HostAddr;
use super::writers::Writers;

/// A page of RAM: which region, and which page of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRef {
    /// Index into [`PhysMemory`]'s regions.
    pub region: u32,
    /// Page of the region.
    pub page: u32,
}

/// A vCPU as the others see it when they watch a page.
#[derive(Default)]
pub struct Guard {
    /// Executing guest code. While false, the vCPU cannot store.
    running: AtomicBool,
    /// Times that fast writes had to be dropped.
    asked: AtomicU64,
    /// The value of `asked` that was last obeyed.
    obeyed: AtomicU64,
    /// Called after `asked` moved: makes a running vCPU look at it soon.
    nudge: Mutex<Option<Box<dyn Fn() + Send + Sync>>>,
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard").field("running", &self.running).finish_non_exhaustive()
    }
}

impl Guard {
    /// Says how to make the vCPU come to a block boundary.
    pub fn on_request(&self, nudge: impl Fn() + Send + Sync + 'static) {
        *lock(&self.nudge) = Some(Box::new(nudge));
    }

    /// The vCPU stops executing: it sleeps, waits for a lock, or is in a device.
    #[inline]
    pub fn park(&self) {
        self.running.store(false, Ordering::SeqCst);
    }

    /// The vCPU executes again. Returns true if fast writes must be dropped first.
    #[inline]
    #[must_use]
    pub fn unpark(&self) -> bool {
        self.running.store(true, Ordering::SeqCst);
        self.asked()
    }

    /// Is there a request that was not obeyed yet?
    #[inline]
    pub fn asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst) != self.obeyed.load(Ordering::Relaxed)
    }

    /// The number to confirm once fast writes have been dropped.
    pub fn requested(&self) -> u64 {
        self.asked.load(Ordering::SeqCst)
    }

    /// Confirms that fast writes were dropped after `request` was read.
    pub fn confirm(&self, request: u64) {
        self.obeyed.store(request, Ordering::SeqCst);
    }
}

/// Pages whose watched code was written to, for one vCPU that translates.
#[derive(Debug, Default)]
struct Changed {
    wanted: AtomicBool,
    waiting: AtomicBool,
    pages: Mutex<Vec<u64>>,
}

impl Changed {
    fn add(&self, page: u64) {
        let mut pages = lock(&self.pages);
        if pages.len() == pages.capacity() {
            // A vCPU that sleeps for long is told of the same pages again and again.
            pages.sort_unstable();
            pages.dedup();
        }
        pages.push(page);
    }
}

/// Tells vCPUs of stores to watched code, whoever made them.
#[derive(Debug)]
struct Changes {
    guards: Vec<Arc<Guard>>,
    lists: Vec<Changed>,
}

impl Changes {
    /// `page` is the page's host address.
    fn tell(&self, page: u64) {
        for (guard, list) in self.guards.iter().zip(&self.lists) {
            if !list.wanted.load(Ordering::SeqCst) {
                continue;
            }
            list.add(page);
            list.waiting.store(true, Ordering::SeqCst);
            if let Some(nudge) = &*lock(&guard.nudge) {
                nudge();
            }
        }
    }
}

/// Memory of one machine, shared by its vCPUs.
pub struct PhysMemory {
    ram: GuestRam,
    io: Arc<dyn IoBus>,
    /// Per region and page: bit `vcpu % 32` is set before the vCPU enters a fast write.
    writers: Vec<Writers>,
    guards: Vec<Arc<Guard>>,
    changes: Arc<Changes>,
    watching: Mutex<()>,
    split: Mutex<()>,
}

impl fmt::Debug for PhysMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PhysMemory").field("ram", &self.ram).finish_non_exhaustive()
    }
}

impl PhysMemory {
    /// Memory for `vcpus` vCPUs.
    pub fn new(ram: GuestRam, io: Arc<dyn IoBus>, vcpus: u32) -> Self {
        let writers = ram.regions().iter().map(|r| Writers::new(r.size >> PAGE_SHIFT)).collect();
        let guards: Vec<Arc<Guard>> = (0..vcpus).map(|_| Arc::default()).collect();
        let lists = (0..vcpus).map(|_| Changed::default()).collect();
        let changes = Arc::new(Changes { guards: guards.clone(), lists });
        for region in ram.regions() {
            // The tracker belongs to the RAM, which devices keep, and who is nudged may keep the devices.
            let (changes, base) = (Arc::downgrade(&changes), region.host as u64);
            region.tracker.on_stale_code(move |page| {
                if let Some(changes) = changes.upgrade() {
                    changes.tell(base + ((page as u64) << PAGE_SHIFT));
                }
            });
        }
        let (watching, split) = (Mutex::default(), Mutex::default());
        Self { ram, io, writers, guards, changes, watching, split }
    }

    /// From now on [`PhysMemory::take_changed_code`] has something for `vcpu`, which is nudged.
    pub fn want_changed_code(&self, vcpu: u32) {
        if let Some(list) = self.changes.lists.get(vcpu as usize) {
            list.wanted.store(true, Ordering::SeqCst);
        }
    }

    /// Has watched code been written to since `vcpu` last asked for it?
    #[inline]
    pub fn has_changed_code(&self, vcpu: u32) -> bool {
        self.changes.lists.get(vcpu as usize).is_some_and(|l| l.waiting.load(Ordering::Relaxed))
    }

    /// Host addresses of the pages whose watched code was written to.
    pub fn take_changed_code(&self, vcpu: u32) -> Vec<u64> {
        let Some(list) = self.changes.lists.get(vcpu as usize) else { return Vec::new() };
        list.waiting.store(false, Ordering::SeqCst);
        std::mem::take(&mut lock(&list.pages))
    }

    /// Where other processes give notice of code that they wrote to.
    pub fn notices(&self) -> PageTracker {
        let first = self.ram.regions().first().map(|r| r.tracker.clone());
        first.unwrap_or_default()
    }

    /// The bus beyond RAM.
    pub fn io(&self) -> &dyn IoBus {
        &*self.io
    }

    /// RAM, for those who go through `vm-memory`.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The guard of vCPU `index`, if there is such a vCPU.
    pub fn guard(&self, index: u32) -> Option<Arc<Guard>> {
        self.guards.get(index as usize).cloned()
    }

    /// The RAM page of `gpa` and the host address of that byte, if it is RAM.
    #[inline]
    pub fn find(&self, gpa: u64) -> Option<(PageRef, HostAddr)> {
        for (index, region) in self.ram.regions().iter().enumerate() {
            let offset = gpa.wrapping_sub(region.start);
            if offset < region.size {
                if region.growing && offset >= region.usable() {
                    return None;
                }
                let page = PageRef { region: index as u32, page: (offset >> PAGE_SHIFT) as u32 };
                // SAFETY: inside the region's mapping, which `self.ram` keeps alive; regions are
                // whole pages.
                return Some((page, unsafe { HostAddr::new(region.host as u64 + offset) }));
            }
        }
        None
    }

    /// The page of a host address made by [`PhysMemory::find`] or the TLB.
    #[inline]
    pub fn page_of_host(&self, host: HostAddr) -> Option<PageRef> {
        self.page_at(host.addr())
    }

    #[inline]
    fn page_at(&self, host: u64) -> Option<PageRef> {
        for (index, region) in self.ram.regions().iter().enumerate() {
            let offset = host.wrapping_sub(region.host as u64);
            if offset < region.size {
                return Some(PageRef { region: index as u32, page: (offset >> PAGE_SHIFT) as u32 });
            }
        }
        None
    }

    /// The guest physical address of the start of a page.
    pub fn gpa(&self, page: PageRef) -> u64 {
        self.ram.regions().get(page.region as usize).map_or(0, |r| r.start)
            + (u64::from(page.page) << PAGE_SHIFT)
    }

    /// The code record of a page.
    #[inline]
    pub fn code_page(&self, page: PageRef) -> Option<&CodePage> {
        self.ram.regions().get(page.region as usize)?.tracker.code_page(page.page as usize)
    }

    /// Tells the tracker of a store by a vCPU that did not take the fast path. True if cached code
    /// went stale.
    pub fn stored(&self, page: PageRef, offset: usize, len: usize) -> bool {
        let Some(region) = self.ram.regions().get(page.region as usize) else { return false };
        region.tracker.set_dirty(page.page as usize);
        let hit = self.code_page(page).is_some_and(|code| code.written(offset, len));
        if hit {
            self.changes.tell(region.host as u64 + (u64::from(page.page) << PAGE_SHIFT));
        }
        hit
    }

    /// The code record of the page at host address `host`.
    pub fn code_at(&self, host: u64) -> Option<&CodePage> {
        self.code_page(self.page_at(host)?)
    }

    /// Ends cached code of the page at host address `host`, as a store to it does.
    pub fn end_code(&self, host: u64) {
        if let Some(code) = self.code_at(host) {
            code.end();
            self.changes.tell(host & !0xfff);
        }
    }

    /// From now on code of every `nth` page is compared, of all of them with 1, and never watched again. For tests.
    pub(crate) fn compare_code(&self, nth: usize) {
        for region in self.ram.regions() {
            let tracker = &region.tracker;
            let pages = (0..tracker.pages()).step_by(nth).filter_map(|i| tracker.code_page(i));
            pages.for_each(|code| code.compare(true));
        }
    }

    /// Asks whether `vcpu` may enter a fast write for `page`; marks it dirty and the vCPU as a writer.
    pub fn allow_fast_write(&self, page: PageRef, vcpu: u32) -> bool {
        let Some(region) = self.ram.regions().get(page.region as usize) else { return false };
        let writers = self.writers.get(page.region as usize);
        let (Some(code), Some(writers)) =
            (region.tracker.code_page(page.page as usize), writers.and_then(|w| w.of(page.page)))
        else {
            return false;
        };
        region.tracker.set_dirty(page.page as usize);
        let bit = 1 << (vcpu % 32);
        if writers.load(Ordering::Relaxed) & bit == 0 {
            // The other half of the handshake is in `watch`: one of the two sees the other.
            writers.fetch_or(bit, Ordering::SeqCst);
        }
        std::sync::atomic::fence(Ordering::SeqCst);
        code.lines() == 0
    }

    /// Does `page` have watched code, which keeps fast writes off it?
    pub fn is_watched(&self, page: PageRef) -> bool {
        self.code_page(page).is_some_and(|code| code.lines() != 0)
    }

    /// Watches `[offset, offset + len)` of `page` for vCPU `me` and returns the generation to decode under.
    ///
    /// On return no vCPU has a fast write for the page. The second value is true if the
    /// caller must drop its own fast writes before it reads the code.
    pub fn watch(&self, page: PageRef, offset: usize, len: usize, me: u32) -> (u32, bool) {
        let Some(code) = self.code_page(page) else { return (0, false) };
        let writers = self.writers.get(page.region as usize).and_then(|w| w.of(page.page));
        let take = |writers: &AtomicU32| match writers.load(Ordering::SeqCst) {
            0 => 0,
            _ => writers.swap(0, Ordering::SeqCst),
        };
        if self.guards.len() == 1 && me == 0 {
            // Nobody else there is writes behind the tracker's back.
            let generation = code.watch(offset, len);
            return (generation, writers.map_or(0, take) != 0);
        }
        let my_guard = self.guards.get(me as usize);
        // Only one may wait for the others at a time, and who waits for its turn must not be waited for.
        if let Some(guard) = my_guard {
            guard.park();
        }
        let turn = lock(&self.watching);
        let mut drop_own = my_guard.is_some_and(|g| g.unpark());
        let generation = code.watch(offset, len);
        let writers = writers.map_or(0, take);
        if writers != 0 {
            drop_own |= writers & 1 << (me % 32) != 0;
            self.drop_fast_writes(writers, me);
        }
        drop(turn);
        (generation, drop_own)
    }

    /// Makes every vCPU come to a block boundary soon.
    pub fn nudge_all(&self) {
        for guard in &self.guards {
            if let Some(nudge) = &*lock(&guard.nudge) {
                nudge();
            }
        }
    }

    fn drop_fast_writes(&self, writers: u32, me: u32) {
        let others = || {
            let wanted = |i: u32| i != me && writers & 1 << (i % 32) != 0;
            (0u32..).zip(&self.guards).filter(move |(i, _)| wanted(*i)).map(|(_, g)| g)
        };
        let mut waiting = Vec::new();
        for guard in others() {
            let number = guard.asked.fetch_add(1, Ordering::SeqCst) + 1;
            if guard.running.load(Ordering::SeqCst) {
                if let Some(nudge) = &*lock(&guard.nudge) {
                    nudge();
                }
                waiting.push((guard, number));
            }
        }
        let mut spins = 0u32;
        while waiting.iter().any(|(g, number)| {
            g.running.load(Ordering::SeqCst) && g.obeyed.load(Ordering::SeqCst) < *number
        }) {
            // A block takes microseconds, unless the other thread has lost its processor.
            spins += 1;
            if spins < 200 {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }

    /// The lock under which locked operations that cross a page run.
    pub fn split_lock(&self) -> MutexGuard<'_, ()> {
        lock(&self.split)
    }

    /// The aligned 64-bit word of RAM at `gpa`.
    #[inline]
    pub fn read_u64(&self, gpa: u64) -> Option<u64> {
        self.find(gpa & !7).map(|(_, host)| host.load::<u64>())
    }

    /// The aligned 32-bit word of RAM at `gpa`.
    #[inline]
    pub fn read_u32(&self, gpa: u64) -> Option<u32> {
        self.find(gpa & !3).map(|(_, host)| host.load::<u32>())
    }

    /// Sets bits in the aligned 64-bit word of RAM at `gpa`, atomically.
    pub fn or_u64(&self, gpa: u64, bits: u64) {
        if let Some((page, host)) = self.find(gpa & !7) {
            host.or_u64(bits);
            self.stored(page, (gpa & 0xff8) as usize, 8);
        }
    }

    /// Copies out of RAM. False if part of the range is not RAM.
    pub fn read(&self, gpa: u64, to: &mut [u8]) -> bool {
        let mut done = 0;
        while done < to.len() {
            let Some((_, host)) = gpa.checked_add(done as u64).and_then(|a| self.find(a)) else {
                return false;
            };
            let count = host.to_page_end().min(to.len() - done);
            host.copy_out(&mut to[done..done + count]);
            done += count;
        }
        true
    }

    /// Copies into RAM and tells the tracker. False if part of the range is not RAM.
    pub fn write(&self, gpa: u64, from: &[u8]) -> bool {
        let mut done = 0;
        while done < from.len() {
            let Some((page, host)) = gpa.checked_add(done as u64).and_then(|a| self.find(a)) else {
                return false;
            };
            let count = host.to_page_end().min(from.len() - done);
            host.copy_in(&from[done..done + count]);
            self.stored(page, (host.addr() & 0xfff) as usize, count);
            done += count;
        }
        true
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
