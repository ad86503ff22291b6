//! The software TLB: direct-mapped tables, one per way to look at memory, and some for users, one for each of several address
//! spaces.
//!
//! An entry's tag is the linear page address with a *context* number in its low bits. One compare of
//! `page of the access's last byte + context` covers a miss, a missing right, a page crossing and a stale entry at
//! once. Contexts are never reused before all tables have been wiped, so a flush is the choice of a new
//! number.
//!
//! * The lower half of the address space has a context per PCID, so a CR3 write with PCIDs loses nothing.
//! * The upper half has one context for all: pages there are nearly always global. If one that is not was
//!   entered, the next change of address space flushes the half.
//! * Fast writes have context numbers of their own, so that all of them can be dropped at once when a page
//!   becomes watched (invariant 6) without losing a translation for reading.
//! * With alignment checks on, a table is used whose entries serve fetches alone: each access to data takes the
//!   slow path, which checks.

use std::cell::UnsafeCell;
use std::mem::offset_of;

use super::phys::PageRef;
use super::raw::{HostAddr, Zero, zeros};

/// Entries of each table, at first and when these are too few.
pub const ENTRIES: usize = 4096;
const MOST_ENTRIES: usize = 8 * ENTRIES;
/// [`Tlb::slot_mask`] at first.
pub const FIRST_SLOT_MASK: u32 = ((ENTRIES - 1) * size_of::<Entry>()) as u32;
/// The same of large tables.
pub const LARGE_SLOT_MASK: u32 = ((MOST_ENTRIES - 1) * size_of::<Entry>()) as u32;
/// So many translations for each entry have taken the place of ones that counted before the tables become larger.
const LOSSES: usize = 16;
const PAGE: u64 = !0xfff;
/// Context numbers fit the low bits of a tag; 0 is never current.
const CONTEXTS: u64 = 0x1000;
/// A tag that no jump has: context 0 is never current.
pub const NO_JUMP: u32 = 0;
/// PCIDs remembered at a time (Linux uses seven).
const SPACES: usize = 12;
/// Tables for users, by number of the address space: programs are often at the same addresses.
const USER_TABLES: usize = 4;
/// All tables.
const TABLES: usize = USER_TABLES + 3;

/// A translation: tags per kind of access, and what turns the linear into the host address.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(32))]
pub struct Entry {
    read: u64,
    write: u64,
    exec: u64,
    addend: u64,
}

// SAFETY: integers.
unsafe impl Zero for Entry {}

/// Who accesses: selects the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// CPL 3.
    User,
    /// Supervisor, or an implicit supervisor access; with SMAP, user pages are out of reach.
    Supervisor,
    /// Supervisor with EFLAGS.AC set: user pages may be reached despite SMAP.
    SupervisorAc,
    /// CPL 3 with alignment checks on (CR0.AM, EFLAGS.AC).
    UserAligned,
}

/// Kind of access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Load.
    Read,
    /// Store, or load and store.
    Write,
    /// Instruction fetch.
    Exec,
}

/// The contexts of one address space.
#[derive(Debug, Clone, Copy, Default)]
struct Space {
    pcid: u16,
    /// 0: none yet.
    read: u64,
    write: u64,
}

/// How an entry of the jump cache is found, and whether it counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JumpKey {
    /// Changes with whatever makes jumps wrong.
    pub tag: u32,
    /// Of the address space: keeps those of several programs at the same addresses apart.
    pub salt: u32,
}

/// What a page walk found, for [`Tlb::insert`].
#[derive(Debug, Clone, Copy)]
pub struct Rights {
    /// Loads are allowed.
    pub read: bool,
    /// Fast stores are allowed.
    pub write: bool,
    /// Fetches are allowed.
    pub exec: bool,
    /// The page is global.
    pub global: bool,
    /// Shift of the page's size: 12, 21 or 30.
    pub shift: u8,
}

/// A page with watched code that may be written, by the slow path: programs that make code write to such pages again and
/// again, each time without an [`Entry`] that serves.
#[derive(Debug, Clone, Copy)]
struct SlowWrite {
    linear: u64,
    /// For reading, which says whether the translation is current.
    context: u64,
    /// Not where their table starts: that changes, and becomes another's.
    who: Who,
    host: HostAddr,
    page: PageRef,
}

/// Of them, by page.
const SLOW_WRITES: usize = 8;

/// The page that the stack is in: what an entry for writing says, for accesses off the stack pointer, which mostly stay in
/// one page. Translated code looks here first, and fills it.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct StackPage {
    linear: u64,
    addend: u64,
    /// Under which it was entered.
    context: u64,
}

/// Where no stack is, and what is there all the same: so a look at a [`StackPage`] need not ask whether there is one. Nobody
/// but the guest ever looks into it.
#[derive(Debug)]
#[repr(C, align(4096))]
struct Nowhere(UnsafeCell<[u8; 4096]>);

impl Nowhere {
    /// It is at its own address with the highest bit set, which is not canonical, and which no guest knows. One that guesses it
    /// has a page of its own there instead of an exception.
    fn page(&self) -> StackPage {
        const HIGHEST: u64 = 1 << 63;
        let address = self.0.get() as u64;
        StackPage { linear: address | HIGHEST, addend: HIGHEST, context: 0 }
    }
}

/// The software TLB of one vCPU. What translated code uses comes first.
#[derive(Debug)]
#[repr(C)]
pub struct Tlb {
    /// Address of the current table, for translated code.
    table: u64,
    /// Current contexts for reading and fetching: lower half, upper half.
    read: [u64; 2],
    /// Current contexts for writing.
    write: [u64; 2],
    /// What entries of the jump cache must be tagged with to count, lower and upper half: context and privilege.
    jump_tags: [u32; 2],
    /// [`JumpKey::salt`] of the lower half. The upper one has none.
    jump_salt: u32,
    /// The stack's page for who looks.
    stack: StackPage,
    /// Whose table is the current one, and where it starts.
    who: Who,
    active: usize,
    entries: Box<[Entry]>,
    /// Entries of each table, less one.
    mask: usize,
    slow_writes: [Option<SlowWrite>; SLOW_WRITES],
    /// Of those who do not look, by table.
    stacks: [StackPage; TABLES],
    nowhere: Box<Nowhere>,
    next_context: u64,
    spaces: [Space; SPACES],
    current: usize,
    victim: usize,
    /// A page of the upper half that is not global has been entered.
    upper_private: bool,
    /// Hashed set of the 2 MiB regions that have fragments of large pages.
    large: Box<[u64; 64]>,
    /// The same for the 1 GiB regions of 1 GiB pages.
    huge: u64,
    /// Times everything was wiped, for the metrics.
    pub wipes: u64,
    /// Goes up whenever all jumps are to be found anew.
    jump_generation: u64,
    /// Entries that counted, whoever's they were, and were lost to others.
    losses: usize,
}

impl Default for Tlb {
    fn default() -> Self {
        let nowhere = Box::new(Nowhere(UnsafeCell::new([0; 4096])));
        let none = nowhere.page();
        let mut tlb = Self {
            stack: none,
            stacks: [none; TABLES],
            nowhere,
            entries: zeros(TABLES * ENTRIES),
            mask: ENTRIES - 1,
            slow_writes: [None; SLOW_WRITES],
            who: Who::Supervisor,
            active: 0,
            table: 0,
            jump_tags: [0; 2],
            jump_salt: 0,
            read: [0; 2],
            write: [0; 2],
            next_context: 1,
            spaces: [Space::default(); SPACES],
            current: 0,
            victim: 0,
            upper_private: false,
            large: Box::new([0; 64]),
            huge: 0,
            wipes: 0,
            jump_generation: 0,
            losses: 0,
        };
        tlb.flush_all();
        tlb.select(Who::Supervisor);
        tlb
    }
}

/// Where translated code finds things in a [`Tlb`].
#[derive(Debug)]
pub struct TlbLayout;

#[allow(missing_docs)]
impl TlbLayout {
    /// Address of the current table.
    pub const TABLE: usize = offset_of!(Tlb, table);
    /// The stack's page.
    pub const STACK_LINEAR: usize = offset_of!(Tlb, stack) + offset_of!(StackPage, linear);
    pub const STACK_ADDEND: usize = offset_of!(Tlb, stack) + offset_of!(StackPage, addend);
    pub const STACK_CONTEXT: usize = offset_of!(Tlb, stack) + offset_of!(StackPage, context);
    /// Contexts for loads, for stores, tags for jumps: two each.
    pub const READ: usize = offset_of!(Tlb, read);
    pub const WRITE: usize = offset_of!(Tlb, write);
    pub const JUMP_TAGS: usize = offset_of!(Tlb, jump_tags);
    pub const JUMP_SALT: usize = offset_of!(Tlb, jump_salt);
    /// Fields of an entry.
    pub const ENTRY_READ: i32 = offset_of!(Entry, read) as i32;
    pub const ENTRY_WRITE: i32 = offset_of!(Entry, write) as i32;
    pub const ENTRY_EXEC: i32 = offset_of!(Entry, exec) as i32;
    pub const ENTRY_ADDEND: i32 = offset_of!(Entry, addend) as i32;
}

const _: () = assert!(size_of::<Entry>() == 1 << (12 - 7));

fn slow_slot(linear: u64) -> usize {
    (linear >> 12) as usize % SLOW_WRITES
}

impl Tlb {
    #[inline(always)]
    fn slot(&self, linear: u64) -> usize {
        self.active + self.index(linear)
    }

    #[inline(always)]
    fn index(&self, linear: u64) -> usize {
        (linear >> 12) as usize & self.mask
    }

    /// What `linear >> 7` is masked with to get an entry's offset in its table. Changes by [`Tlb::set_slot_mask`] alone.
    pub fn slot_mask(&self) -> u32 {
        (self.mask * size_of::<Entry>()) as u32
    }

    /// Has it lost so many translations for want of room that larger tables are worth it?
    #[inline(always)]
    pub fn is_tight(&self) -> bool {
        self.losses > self.mask * LOSSES && self.mask + 1 < MOST_ENTRIES
    }

    /// Takes tables of another size, all empty. Translated code from before does not know them.
    pub fn set_slot_mask(&mut self, slot_mask: u32) {
        self.mask = slot_mask as usize / size_of::<Entry>();
        self.entries = zeros(TABLES * (self.mask + 1));
        self.active = self.start(self.who);
        self.select(self.who);
    }

    /// Where the table of `who` starts.
    fn start(&self, who: Who) -> usize {
        let table = match who {
            Who::User => self.current % USER_TABLES,
            Who::Supervisor => USER_TABLES,
            Who::SupervisorAc => USER_TABLES + 1,
            Who::UserAligned => USER_TABLES + 2,
        };
        table * (self.mask + 1)
    }

    #[inline(always)]
    fn entry(&self, linear: u64) -> &Entry {
        // SAFETY: `active` is one of the table starts (`select` alone sets it, `set_slot_mask` calls it), and the rest
        // is not above `mask`: the sum is below the box's length.
        unsafe { self.entries.get_unchecked(self.slot(linear)) }
    }

    /// The host address of `size` bytes at `linear` if they may be read and lie in one page.
    #[inline(always)]
    pub fn probe_read(&self, linear: u64, size: usize) -> Option<HostAddr> {
        let entry = self.entry(linear);
        let last = linear.wrapping_add(size as u64 - 1) & PAGE;
        if last ^ entry.read == self.read[(linear >> 63) as usize] {
            // SAFETY: the entry maps a page of guest RAM; the compare says that the access lies in it.
            Some(unsafe { HostAddr::new(entry.addend.wrapping_add(linear)) })
        } else {
            None
        }
    }

    /// The host address of `size` bytes at `linear` if they may be written without further ado.
    #[inline(always)]
    pub fn probe_write(&self, linear: u64, size: usize) -> Option<HostAddr> {
        let entry = self.entry(linear);
        let last = linear.wrapping_add(size as u64 - 1) & PAGE;
        if last ^ entry.write == self.write[(linear >> 63) as usize] {
            // SAFETY: as in `probe_read`.
            Some(unsafe { HostAddr::new(entry.addend.wrapping_add(linear)) })
        } else {
            None
        }
    }

    /// Where to store at `linear` by the slow path, if that was found since the last flush.
    pub fn slow_write(&self, linear: u64) -> Option<(PageRef, HostAddr)> {
        let known = self.slow_writes[slow_slot(linear)]?;
        let context = self.read[(linear >> 63) as usize];
        let current = (known.linear, known.context, known.who);
        if current != (linear & PAGE, context, self.who) {
            return None;
        }
        // SAFETY: the start of a page of guest RAM, as a walk found it, and an offset in it.
        Some((known.page, unsafe { HostAddr::new(known.host.addr() | linear & 0xfff) }))
    }

    /// Remembers that `linear`, which is at `host` in `page`, may be written by the slow path.
    pub fn insert_slow_write(&mut self, linear: u64, page: PageRef, host: HostAddr) {
        // SAFETY: the start of the page that the address is in.
        let host = unsafe { HostAddr::new(host.addr() & PAGE) };
        let (linear, context) = (linear & PAGE, self.read[(linear >> 63) as usize]);
        let known = SlowWrite { linear, context, who: self.who, host, page };
        self.slow_writes[slow_slot(linear)] = Some(known);
    }

    /// The host address of the code byte at `linear` if it may be fetched.
    #[inline(always)]
    pub fn probe_exec(&self, linear: u64) -> Option<HostAddr> {
        let entry = self.entry(linear);
        if linear & PAGE ^ entry.exec == self.read[(linear >> 63) as usize] {
            // SAFETY: as in `probe_read`.
            Some(unsafe { HostAddr::new(entry.addend.wrapping_add(linear)) })
        } else {
            None
        }
    }

    /// The host address of the byte at `linear`, whose page is at host address `page`, as
    /// [`Tlb::probe_exec`] or a walk found it since the last flush.
    #[inline(always)]
    pub fn code_byte(&self, page: u64, linear: u64) -> HostAddr {
        // SAFETY: `page` is the start of a mapped page of guest RAM: `Mmu::code_page` is only set from
        // the address of a fetch.
        unsafe { HostAddr::new(page | linear & 0xfff) }
    }

    /// The host address of `linear` for a load or store by a supervisor that may reach user pages, if another table has the
    /// translation: what a user, or a supervisor at other times, may do, it may do as well. Enters it.
    pub fn adopt(&mut self, linear: u64, access: Access) -> Option<HostAddr> {
        if self.selected() != Who::SupervisorAc {
            return None;
        }
        let (page, half) = (linear & PAGE, (linear >> 63) as usize);
        let index = self.index(linear);
        for who in [Who::User, Who::Supervisor] {
            let mut entry = self.entries[self.start(who) + index];
            let fits = match access {
                Access::Read => entry.read == page | self.read[half],
                Access::Write => entry.write == page | self.write[half],
                Access::Exec => false,
            };
            if fits {
                if who == Who::User {
                    // Fetches are another matter.
                    entry.exec = 0;
                }
                let slot = self.slot(linear);
                self.entries[slot] = entry;
                // SAFETY: the entry maps a page of guest RAM, the one of `linear`.
                return Some(unsafe { HostAddr::new(entry.addend.wrapping_add(linear)) });
            }
        }
        None
    }

    /// Enters the translation of the page of `linear` to the host page at `host`.
    pub fn insert(&mut self, linear: u64, host: HostAddr, rights: Rights) {
        let page = linear & PAGE;
        let half = (linear >> 63) as usize;
        let tag = |allowed: bool, context: u64| if allowed { page | context } else { 0 };
        let data = !self.checks_alignment();
        let entry = Entry {
            read: tag(data && rights.read, self.read[half]),
            write: tag(data && rights.write, self.write[half]),
            exec: tag(rights.exec, self.read[half]),
            addend: (host.addr() & PAGE).wrapping_sub(page),
        };
        let slot = self.slot(linear);
        let lost = self.entries[slot];
        self.losses += usize::from(lost.read & PAGE != page && self.counts(lost.read));
        self.entries[slot] = entry;
        if half == 1 && !rights.global {
            self.upper_private = true;
        }
        if rights.shift == 21 {
            let region = (linear >> 21) as usize & 4095;
            self.large[region / 64] |= 1 << (region % 64);
        } else if rights.shift == 30 {
            self.huge |= 1 << (linear >> 30 & 63);
        }
    }

    /// Does an entry with this tag for reading count, now or once its address space is the current one again?
    fn counts(&self, read: u64) -> bool {
        let context = read & !PAGE;
        match read >> 63 {
            0 => context != 0 && self.spaces.iter().any(|space| space.read == context),
            _ => context == self.read[1],
        }
    }

    /// Looks through the eyes of `who` from now on.
    pub fn select(&mut self, who: Who) {
        let entries = self.mask + 1;
        self.stacks[self.active / entries] = self.stack;
        self.who = who;
        self.active = self.start(who);
        self.stack = self.stacks[self.active / entries];
        self.table = self.entries.as_ptr().wrapping_add(self.active) as u64;
        self.tag_jumps();
    }

    /// To be called when a context, the privilege or the generation has changed. Contexts are used again after a wipe,
    /// which is a new generation.
    fn tag_jumps(&mut self) {
        if self.stack.context != self.write[(self.stack.linear >> 63) as usize] {
            self.stack = self.nowhere.page();
        }
        let user = matches!(self.selected(), Who::User | Who::UserAligned);
        let generation = self.jump_generation * CONTEXTS;
        let tag = |context: u64| ((generation + context) as u32) << 1 | u32::from(user);
        self.jump_tags = self.read.map(tag);
    }

    /// How a jump to `linear` is found now.
    pub fn jump_key(&self, linear: u64) -> JumpKey {
        let half = (linear >> 63) as usize;
        JumpKey { tag: self.jump_tags[half], salt: [self.jump_salt, 0][half] }
    }

    /// Changes whenever tags for jumps may be used again.
    pub fn jump_tags_era(&self) -> u64 {
        self.jump_generation / ((1 << 31) / CONTEXTS)
    }

    /// No jump that is tagged so far counts any more.
    pub fn forget_jumps(&mut self) {
        self.jump_generation += 1;
        self.tag_jumps();
    }

    /// Who looks.
    pub fn selected(&self) -> Who {
        self.who
    }

    /// Whether accesses to data must be aligned.
    #[inline(always)]
    pub fn checks_alignment(&self) -> bool {
        self.who == Who::UserAligned
    }

    /// Goes to the address space `pcid`.
    pub fn set_space(&mut self, pcid: u16) {
        if self.spaces[self.current].pcid == pcid && self.read[0] != 0 {
            return;
        }
        self.leave_space();
        if let Some(found) = self.spaces.iter().position(|s| s.pcid == pcid && s.read != 0) {
            self.current = found;
        } else {
            self.victim = (self.victim + 1) % SPACES;
            self.current = self.victim;
            self.spaces[self.current] = Space { pcid, read: 0, write: 0 };
        }
        self.jump_salt = (self.current as u32).wrapping_mul(0x9e37_79b9) >> 8;
        self.select(self.who);
        self.load_space();
    }

    /// Drops all of `pcid` but global pages.
    pub fn flush_pcid(&mut self, pcid: u16) {
        self.leave_space();
        for space in self.spaces.iter_mut().filter(|s| s.pcid == pcid) {
            (space.read, space.write) = (0, 0);
        }
        self.load_space();
    }

    /// Drops everything but global pages, in every address space.
    pub fn flush_non_global(&mut self) {
        self.leave_space();
        for space in &mut self.spaces {
            (space.read, space.write) = (0, 0);
        }
        self.load_space();
    }

    /// Drops everything.
    pub fn flush_all(&mut self) {
        for space in &mut self.spaces {
            (space.read, space.write) = (0, 0);
        }
        *self.large = [0; 64];
        self.huge = 0;
        self.flush_upper();
        self.load_space();
    }

    /// Drops the page of `linear` in every address space and every table.
    pub fn flush_page(&mut self, linear: u64) {
        let region = (linear >> 21) as usize & 4095;
        let large = self.large[region / 64] & 1 << (region % 64) != 0;
        if large || self.huge & 1 << (linear >> 30 & 63) != 0 {
            // A fragment of a large page may be anywhere in it.
            self.flush_all();
            return;
        }
        let index = self.index(linear);
        for table in 0..TABLES {
            self.entries[table * (self.mask + 1) + index] = Entry::default();
        }
        self.slow_writes[slow_slot(linear)] = None;
        for stack in self.stacks.iter_mut().chain([&mut self.stack]) {
            if stack.linear == linear & PAGE {
                *stack = self.nowhere.page();
            }
        }
    }

    /// Makes every store take the slow path once.
    pub fn flush_writes(&mut self) {
        for space in &mut self.spaces {
            space.write = 0;
        }
        self.write[1] = self.new_context();
        self.load_space();
    }

    fn leave_space(&mut self) {
        if self.upper_private {
            self.flush_upper();
        }
    }

    fn flush_upper(&mut self) {
        self.upper_private = false;
        self.read[1] = self.new_context();
        self.write[1] = self.new_context();
        self.tag_jumps();
    }

    fn load_space(&mut self) {
        if self.spaces[self.current].read == 0 {
            let context = self.new_context();
            self.spaces[self.current].read = context;
        }
        if self.spaces[self.current].write == 0 {
            let context = self.new_context();
            // The numbers may have run out in between and taken the other one along.
            if self.spaces[self.current].read == 0 {
                self.spaces[self.current].read = self.new_context();
            }
            self.spaces[self.current].write = context;
        }
        self.read[0] = self.spaces[self.current].read;
        self.write[0] = self.spaces[self.current].write;
        self.tag_jumps();
    }

    /// A number that no entry carries.
    fn new_context(&mut self) -> u64 {
        if self.next_context == CONTEXTS {
            // Of new memory, lest tables that nobody uses take some.
            self.entries = zeros(self.entries.len());
            self.stack = self.nowhere.page();
            self.stacks = [self.stack; TABLES];
            self.select(self.who);
            self.slow_writes = [None; SLOW_WRITES];
            self.wipes += 1;
            self.jump_generation += 1;
            for space in &mut self.spaces {
                (space.read, space.write) = (0, 0);
            }
            self.upper_private = false;
            self.read[1] = 1;
            self.write[1] = 2;
            self.next_context = 3;
        }
        self.next_context += 1;
        self.next_context - 1
    }
}
