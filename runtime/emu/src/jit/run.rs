//! Running translated code: the part of the dispatcher that belongs to it.

use std::io::Write as _;
use std::mem::transmute;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use mvm_memory::PageTracker;

use super::arena::{Arena, Piece};
use super::arrivals::Arrivals;
use super::cache::{Block, Bridge, Found, PLAIN};
use super::counters::Counters;
use super::entry::LOOK;
use super::env::{CalledOp, JitEnv};
use super::links::{FarLink, Goes, Link};
use super::store::{Kept, Side, Store};
use super::stubs::{Enter, Exit, exit};
use super::translate::{Input, MAX_BLOCK, MAX_SLOTS, Tables, Translator};
use crate::apic::NEVER;
use crate::block::{BlockDecoder, GoesOn, Stop};
use crate::cpu::Cpu;
use crate::mmu::HostAddr;
use crate::op::{Flow, reg};

/// How many of its trials what follows a conditional jump may have missed to be in one block with it. With 4 a large program
/// (gcc) is no faster.
const MISSED: u8 = 1;
/// How many jumps between pages go by the jump cache before one of them is linked anew.
const PATIENCE: i32 = 64;
/// How often code is entered between two looks at the time, if there is any that is compared for a while.
const LOOKS: u64 = 64;

/// The translator of one vCPU.
#[derive(Debug)]
pub struct Jit {
    store: Arc<Store>,
    /// The epoch that all of this is of, and whether its code may be executed.
    epoch: u64,
    joined: bool,
    /// Where its code goes, by [`Side`], and what slots its links have.
    pieces: [Piece; 2],
    slots: Range<u32>,
    arrivals: Arrivals,
    translator: Translator,
    /// Where the record of the link is through which the last block was left.
    pending: Option<u32>,
    /// The same for links to other pages.
    pending_far: Option<u32>,
    /// The block at [`Cpu::rip`] is a bridge that did not know what follows: its own entry would say so again.
    at_bridge: bool,
    /// What the alarm was set to.
    armed: u64,
    /// Where other processes give notice of code that they wrote to, and how much of that is known here.
    notices: PageTracker,
    known_notices: u64,
    perf_map: Option<std::fs::File>,
    /// [`Tlb::jump_tags_era`](crate::mmu::Tlb::jump_tags_era) of the jump cache.
    era: u64,
    /// For the metrics.
    pub counters: Counters,
}

/// How a block is to be made.
#[derive(Debug, Clone, Copy)]
struct How {
    /// Without spans (J14).
    plain: bool,
    /// For jumps with native flags above all.
    native: bool,
}

/// What came of a look at [`Cpu::rip`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ran {
    /// Code was run; on at `rip`, or a stop.
    Code(Option<Stop>),
    /// The instruction there is none for the translator.
    Interpret,
}

/// Before the first one.
const NO_EPOCH: u64 = u64::MAX;
const BLOCK: usize = reg::BLOCK as usize;
const PAGE: u64 = !0xfff;

impl Jit {
    /// A translator with nothing of its own in `store`, for `cpu`.
    pub fn new(cpu: &mut Cpu, store: Arc<Store>) -> Self {
        cpu.jit = JitEnv::with_jumps(store.arena().entry(0), store.slots());
        let notices = cpu.mmu.phys().notices();
        cpu.sys.attention().keep_run_word(notices.clone(), cpu.mmu.index);
        let counting = std::env::var_os("MVM_COUNT").is_some();
        Self {
            epoch: NO_EPOCH,
            joined: false,
            pieces: [Piece::default(), Piece::default()],
            slots: 0..0,
            arrivals: Arrivals::default(),
            translator: Translator::new(store.stubs(), tables(cpu), counting),
            store,
            pending: None,
            pending_far: None,
            at_bridge: false,
            armed: NEVER,
            notices,
            known_notices: 0,
            perf_map: perf_map(),
            era: 0,
            counters: Counters::default(),
        }
    }

    /// Runs the block at [`Cpu::rip`], in 64-bit mode, and what follows it.
    pub fn run(&mut self, cpu: &mut Cpu, decoder: &mut BlockDecoder) -> Ran {
        if (!self.joined || self.is_over()) && !self.join(cpu) {
            self.counters.interpreted_blocks += 1;
            return Ran::Interpret;
        }
        if cpu.mmu.phys().has_changed_code(cpu.mmu.index) {
            self.kill_changed(cpu);
        }
        let notices = self.notices.notices().count();
        if notices != self.known_notices {
            self.kill_stale(cpu);
            self.known_notices = notices;
        }
        if self.store.compares() && self.counters.entered.is_multiple_of(LOOKS) {
            self.store.watch_again(Instant::now());
        }
        self.set_alarm(cpu);
        if cpu.mmu.tlb.is_tight() || cpu.jit.is_tight() {
            self.store.end(self.epoch, true);
            return Ran::Interpret;
        }
        if cpu.mmu.tlb.jump_tags_era() != self.era {
            // The tags are used again.
            self.era = cpu.mmu.tlb.jump_tags_era();
            self.forget_all(cpu);
        }
        let host = match cpu.code_host(cpu.rip) {
            Ok(host) => host,
            Err(fault) => {
                cpu.fault = Some(fault);
                return Ran::Code(Some(Stop::Fault));
            }
        };
        let (pending, far) = (self.pending.take(), self.pending_far.take());
        if self.store.on_trial(host.addr()) {
            self.counters.interpreted_blocks += 1;
            return Ran::Interpret;
        }
        let look = std::mem::take(&mut self.at_bridge) || pending.is_some();
        let key = cpu.mmu.tlb.jump_key(cpu.rip);
        let known = if look {
            None
        } else {
            let jumps = &mut cpu.jit;
            jumps.find(cpu.rip, key).or_else(|| {
                let code = jumps.find_again(cpu.rip, key, host.addr())?;
                let life = self.arrivals.life(host.addr() & PAGE)?;
                self.arrivals.jumped_to(host.addr(), life, cpu.rip, key.salt);
                Some(code)
            })
        };
        if let (Some(code), Some(link)) = (known, far)
            && let Some(life) = self.arrivals.life(host.addr() & PAGE)
        {
            let code = (code - self.store.arena().entry(0)) as u32;
            self.link_far(cpu, link, host, life, code);
        }
        let Some(code) = known.or_else(|| self.look_up(cpu, decoder, host, pending, far)) else {
            self.counters.interpreted_blocks += 1;
            return Ran::Interpret;
        };
        cpu.gpr[BLOCK] = cpu.rip & PAGE;
        let Some(run) = cpu.sys.attention().clear_to_run(notices) else {
            return Ran::Code(Some(Stop::Attention));
        };
        cpu.jit.run = run as u64;
        cpu.mmu.dropped_writes = false;
        self.counters.entered += 1;
        // SAFETY: the arena starts with this function; translated code accesses the `Cpu`, guest RAM through TLB
        // entries, and the tables that `cpu.jit` owns. The `Cpu` is borrowed for the whole call.
        let exit = unsafe {
            let enter: Enter = transmute(self.store.arena().entry(self.store.stubs().enter));
            enter(cpu, code)
        };
        Ran::Code(self.left(cpu, exit))
    }

    /// The code for [`Cpu::rip`], at `host`, which is made if there is none, and linked to where link `pending` came
    /// from. None: that is for the interpreter.
    fn look_up(
        &mut self,
        cpu: &mut Cpu,
        decoder: &mut BlockDecoder,
        host: HostAddr,
        pending: Option<u32>,
        far: Option<u32>,
    ) -> Option<u64> {
        let link = pending.map(|record| Link::of_bytes(self.store.arena().read(record)));
        // What came in between may have taken us elsewhere.
        let link = link.filter(|link| u64::from(link.target) == cpu.rip & !PAGE);
        let plain = link.is_some_and(|link| link.plain);
        let native = link.is_some_and(|link| link.native);
        let block = self.find(cpu, decoder, host, How { plain, native })?;
        let entry = self.way_in(cpu, name(host, plain), &block)?;
        if let Some(link) = link {
            self.counters.links += u64::from(set_link(self.store.arena(), &link, &block));
        }
        if !plain {
            let key = cpu.mmu.tlb.jump_key(cpu.rip);
            self.arrive(cpu, host.addr() & PAGE, block.life);
            cpu.jit.insert(cpu.rip, key, host.addr(), block.memory);
            self.arrivals.jumped_to(host.addr(), block.life, cpu.rip, key.salt);
            if let Some(link) = far {
                self.link_far(cpu, link, host, block.life, block.memory);
            }
        }
        Some(self.store.arena().entry(entry))
    }

    fn left(&mut self, cpu: &mut Cpu, exit: Exit) -> Option<Stop> {
        let page = cpu.gpr[BLOCK];
        let linking = std::mem::take(&mut cpu.jit.linking);
        match exit.kind {
            exit::LINK => {
                self.counters.left_unlinked += 1;
                let record = exit.value as u32;
                let target = Link::of_bytes(self.store.arena().read(record)).target;
                cpu.rip = page | u64::from(target);
                self.pending = Some(record);
                None
            }
            exit::EVENT => {
                self.counters.left_event += 1;
                self.note_event();
                cpu.rip = page | exit.value;
                None
            }
            exit::BRIDGE => {
                self.counters.left_to += 1;
                self.at_bridge = true;
                cpu.rip = page | exit.value;
                None
            }
            exit::TO => {
                self.counters.left_to += 1;
                None
            }
            exit::CHANGED => {
                self.counters.left_changed += 1;
                cpu.rip = page | exit.value;
                // As if somebody had said so who stored to it. If it cannot be fetched by now, nobody comes there.
                if let Ok(host) = cpu.code_host(cpu.rip) {
                    cpu.mmu.phys().end_code(host.addr());
                }
                None
            }
            exit::FAR => {
                self.counters.left_to += 1;
                self.pending_far = Some(exit.value as u32);
                cpu.jit.patience = PATIENCE;
                None
            }
            _ => {
                // SAFETY: set by the stub that called the handler: a `CalledOp` of a block that was just running,
                // of the epoch that this vCPU has joined.
                let called = unsafe { &*(cpu.jit.called as *const CalledOp) };
                let (start, end) = (u64::from(called.op.start), u64::from(called.op.end));
                let flow = exit.value as u8;
                if let Some(count) = self.counters.left_flow.get_mut(usize::from(flow)) {
                    *count += 1;
                }
                if flow == Flow::Jump as u8 {
                    self.pending_far = (linking != 0).then_some(linking);
                    None
                } else if flow == Flow::Break as u8 {
                    cpu.rip = page.wrapping_add(end);
                    Some(Stop::Look)
                } else if flow == Flow::Halt as u8 {
                    cpu.rip = page.wrapping_add(end);
                    Some(Stop::Halt)
                } else {
                    cpu.rip = page.wrapping_add(start);
                    (flow != Flow::Again as u8).then_some(Stop::Fault)
                }
            }
        }
    }

    /// The block at `host`, which is made if there is none.
    fn find(
        &mut self,
        cpu: &mut Cpu,
        decoder: &mut BlockDecoder,
        host: HostAddr,
        how: How,
    ) -> Option<Block> {
        let found = self.store.lock().cache.find(name(host, how.plain));
        match found {
            Found::Block(block) => return Some(block),
            Found::Stale(page) => {
                self.kill(cpu, [page]);
                if self.store.on_trial(host.addr()) {
                    return None;
                }
            }
            Found::None => {}
        }
        self.make(cpu, decoder, host, how)
    }

    /// The entry of a block for the dispatcher. None: it is a bridge to a page that does not follow (any more).
    fn way_in(&mut self, cpu: &mut Cpu, name: u64, block: &Block) -> Option<u32> {
        let Some(bridge) = block.bridge else { return Some(block.memory) };
        match cpu.fetch((cpu.rip | !PAGE).wrapping_add(1)) {
            Ok(next) if next.addr() == bridge.next => Some(bridge.checked),
            Ok(_) => {
                self.store.lock().cache.drop_bridge(name);
                None
            }
            // The interpreter raises it.
            Err(_) => None,
        }
    }

    /// From now on code is translated after `trials` runs by the interpreter.
    #[cfg(test)]
    pub(crate) fn set_trials(&mut self, trials: u8) {
        self.store.set_trials(trials);
    }

    /// Is there room for the largest block?
    fn has_room(&self) -> bool {
        self.pieces.iter().all(|piece| piece.room() >= MAX_BLOCK)
            && self.slots.len() >= MAX_SLOTS as usize
    }

    /// Makes room for the largest block. False: the epoch has no more.
    fn make_room(&mut self) -> bool {
        let mut kept = self.store.lock();
        for side in [Side::Hot, Side::Cold] {
            let piece = &mut self.pieces[side as usize];
            while piece.room() < MAX_BLOCK {
                self.store.arena().let_go(piece);
                let Some(next) = kept.take(side) else { return false };
                *piece = next;
            }
        }
        if self.slots.len() < MAX_SLOTS as usize {
            let Some(slots) = kept.take_slots() else { return false };
            self.slots = slots;
        }
        true
    }

    fn make(
        &mut self,
        cpu: &mut Cpu,
        decoder: &mut BlockDecoder,
        host: HostAddr,
        how: How,
    ) -> Option<Block> {
        let plain = how.plain;
        if !self.has_room() && !self.make_room() {
            self.store.end(self.epoch, false);
            return None;
        }
        // What has been run about as often as code that is translated now most often follows it.
        let store = self.store.clone();
        let goes_on =
            |offset: u16| store.trials_left(host.addr() & PAGE | u64::from(offset)) <= MISSED;
        let goes_on: Option<GoesOn<'_>> = if plain { None } else { Some(&goes_on) };
        let run = decoder.decode_run(cpu, cpu.rip, host, goes_on)?;
        let second = run.second.map(|(next, stamp)| (next.addr(), stamp));
        let mut kept = store.lock();
        let life = kept.cache.live(host.addr(), run.stamp, &mut store.try_anew())?;
        let second = match second {
            Some((next, stamp)) => {
                Some((next, kept.cache.live(next, stamp, &mut store.try_anew())?))
            }
            None => None,
        };
        drop(kept);
        let input = Input {
            ops: run.ops,
            valid: run.valid,
            inlines: run.inlines,
            bytes: run.bytes,
            ends: run.ends,
            page: cpu.rip & PAGE,
            native: how.native,
            plain,
            next: second.map(|(next, _)| next),
            compared: run.compared.then_some(host.addr()),
            life,
        };
        let bases = self.pieces.each_ref().map(Piece::at);
        let entries = self.translator.block(&input, bases, &mut self.slots);
        let checked = entries.checked;
        let bridge = second.map(|(next, life)| Bridge { next, life, checked });
        let block = Block { memory: entries.memory, native: entries.native, life, bridge };
        let name = name(host, plain);
        let mut kept = store.lock();
        if let Found::Block(block) = kept.cache.find(name) {
            // Another vCPU was faster.
            return Some(block);
        }
        let (code, cold) = self.translator.code();
        let arena = store.arena();
        arena.put(&mut self.pieces[Side::Hot as usize], code);
        arena.put(&mut self.pieces[Side::Cold as usize], cold);
        if !kept.cache.insert(name, block) {
            return None;
        }
        let links = link_to_known(arena, &kept, &self.translator.links, host);
        drop(kept);
        self.counters.links += links;
        self.note_block(bases, run.ops.len(), run.bytes.len(), cpu.rip);
        Some(block)
    }

    /// For the metrics, and for `perf`: the block made last, of so many instructions and bytes, is at `bases` of the arena.
    fn note_block(&mut self, bases: [usize; 2], instructions: usize, bytes: usize, rip: u64) {
        let (code, cold) = self.translator.code();
        let (accesses, spared) = self.translator.accesses();
        let c = &mut self.counters;
        c.blocks += 1;
        c.instructions += instructions as u64;
        c.called_instructions += self.translator.called() as u64;
        c.accesses += accesses as u64;
        c.spared_probes += spared as u64;
        c.guest_bytes += bytes as u64;
        c.code_bytes += (code.len() + cold.len()) as u64;
        if let Some(map) = &mut self.perf_map {
            let [at, cold_at] = bases.map(|at| self.store.arena().entry(at as u32));
            // A map that is not complete is of use all the same.
            let _ = writeln!(map, "{at:x} {:x} guest_{rip:x}", code.len());
            let _ = writeln!(map, "{cold_at:x} {:x} guest_{rip:x}.cold", cold.len());
        }
    }

    /// Makes the far link whose record is at `record` go to `code`, which is that for [`Cpu::rip`] at `host`, as long as the tag
    /// counts that does now.
    fn link_far(&mut self, cpu: &mut Cpu, record: u32, host: HostAddr, life: u32, code: u32) {
        let link = FarLink::of_bytes(self.store.arena().read(record));
        // It is elsewhere than when it was made, or what came in between has taken us elsewhere.
        if let Goes::To { target, site } = link.goes {
            let mut kept = self.store.lock();
            // Another vCPU may have made code anew here, and have led the jump to that.
            let lives = kept.cache.life(host.addr() & PAGE) == Some(life);
            if target != cpu.rip || !lives || !kept.lead_to(link.slot, host.addr()) {
                return;
            }
            self.store.arena().patch(site, code);
        }
        let tag = cpu.mmu.tlb.jump_key(cpu.rip).tag;
        if cpu.jit.leads_to(link.slot) != life {
            let jumps = &cpu.jit;
            self.arrivals.linked_to(host.addr(), life, link.slot, |slot| jumps.leads_to(slot));
        }
        cpu.jit.link(link, cpu.rip, code, tag, life);
        self.counters.links += 1;
    }

    /// Ends the blocks of all pages whose code was written to (J8).
    fn kill_changed(&mut self, cpu: &mut Cpu) {
        let pages = cpu.mmu.phys().clone().take_changed_code(cpu.mmu.index);
        self.kill(cpu, pages);
    }

    /// The same for what other processes wrote, who do not say where.
    fn kill_stale(&mut self, cpu: &mut Cpu) {
        let stale = self.store.lock().cache.stale_pages();
        self.kill(cpu, stale);
        // Others may have done that already.
        let kept = self.store.lock();
        let all = self.arrivals.pages().into_iter();
        let gone: Vec<u64> = all.filter(|page| self.is_gone(&kept, *page)).collect();
        drop(kept);
        gone.into_iter().for_each(|page| self.depart(cpu, page));
    }

    /// Ends the lives of pages whose code was written to, if nobody has done that yet, and sees to it that this vCPU comes to
    /// none of them any more: not by the jump cache, nor by a link (J6).
    fn kill(&mut self, cpu: &mut Cpu, pages: impl IntoIterator<Item = u64>) {
        let store = self.store.clone();
        let mut kept = store.lock();
        let mut gone = Vec::new();
        for page in pages {
            let ended = store.end_stale(&mut kept, page);
            self.counters.killed_pages += u64::from(ended);
            let with_it = kept.cache.with_it(page);
            gone.extend(with_it.into_iter().filter(|page| self.is_gone(&kept, *page)));
        }
        drop(kept);
        gone.into_iter().for_each(|page| self.depart(cpu, page));
    }

    /// Does anything lead to an earlier life of the page at host address `page`?
    fn is_gone(&self, kept: &Kept, page: u64) -> bool {
        self.arrivals.life(page).is_some_and(|life| kept.cache.life(page) != Some(life))
    }

    /// Life `life` of the page at host address `page` is come to from now on, and no other one.
    fn arrive(&mut self, cpu: &mut Cpu, page: u64, life: u32) {
        if self.arrivals.life(page).is_some_and(|before| before != life) {
            self.depart(cpu, page);
        }
    }

    /// The page at host address `page` is not come to any more.
    fn depart(&mut self, cpu: &mut Cpu, page: u64) {
        let Some(arrived) = self.arrivals.take(page) else { return };
        for slot in &arrived.slots {
            if cpu.jit.leads_to(*slot) == arrived.life {
                cpu.jit.unlink(*slot);
            }
        }
        match arrived.places() {
            Some(places) => places.for_each(|(at, salt)| cpu.jit.forget(at, salt, page)),
            None => {
                cpu.forget_jumps();
                cpu.jit.forget_code();
            }
        }
    }

    /// Joins the epoch there is now, once the one before has been left by all.
    #[cold]
    fn join(&mut self, cpu: &mut Cpu) -> bool {
        self.rest();
        let Some((epoch, tables)) = self.store.join() else { return false };
        self.joined = true;
        if epoch != self.epoch {
            self.epoch = epoch;
            self.start_anew(cpu, tables);
        }
        true
    }

    /// Is the epoch to be left?
    #[inline]
    pub fn is_over(&self) -> bool {
        self.store.is_over(self.epoch)
    }

    /// No code is executed for a while: nobody has to wait for this vCPU.
    pub fn rest(&mut self) {
        if std::mem::take(&mut self.joined) {
            self.store.leave();
        }
    }

    /// Nothing of an earlier epoch is there any more, and `tables` are those of this one.
    fn start_anew(&mut self, cpu: &mut Cpu, tables: Tables) {
        for piece in &mut self.pieces {
            self.store.arena().let_go(piece);
            *piece = Piece::default();
        }
        self.slots = 0..0;
        let before = self.translator.tables();
        if tables.slot_mask != before.slot_mask {
            cpu.mmu.tlb.set_slot_mask(tables.slot_mask);
        }
        if tables.jump_bits != before.jump_bits {
            cpu.jit.set_slot_bits(tables.jump_bits);
        }
        self.translator.set_tables(tables);
        self.forget_all(cpu);
    }

    /// This vCPU comes to no code any more that it does not look for.
    fn forget_all(&mut self, cpu: &mut Cpu) {
        (self.pending, self.pending_far) = (None, None);
        self.arrivals.clear();
        cpu.jit.clear();
    }

    /// An alarm may have gone off: it is set again if the timer has not expired yet.
    pub fn note_event(&mut self) {
        self.armed = 0;
    }

    /// The APIC timer must reach a vCPU that does not look at the time.
    fn set_alarm(&mut self, cpu: &Cpu) {
        let deadline = cpu.sys.lapic.deadline();
        if deadline != self.armed {
            self.armed = deadline;
            cpu.sys.platform.set_alarm(cpu.sys.index, deadline);
        }
    }

    /// What is counted, with what the code itself counts in `cpu`, and the memory that it all takes.
    pub fn figures(&self, cpu: &Cpu) -> Counters {
        let counted = self.translator.counts().then_some(cpu.jit.counted);
        let memory = (self.arrivals.memory() + cpu.jit.memory()) as u64;
        Counters { counted, memory, ..self.counters.clone() }
    }

    /// What it has in common with the other vCPUs.
    #[cfg(test)]
    pub(crate) fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Makes code count what it does from now on.
    #[cfg(test)]
    pub(crate) fn set_counting(&mut self) {
        self.translator = Translator::new(self.store.stubs(), self.translator.tables(), true);
    }
}

impl Drop for Jit {
    fn drop(&mut self) {
        self.rest();
    }
}

/// Links a new block to those that there are, all in the page of `host`. Returns how many that were.
fn link_to_known(arena: &Arena, kept: &Kept, links: &[Link], host: HostAddr) -> u64 {
    let mut linked = 0;
    for link in links {
        let place = host.addr() & PAGE | u64::from(link.target);
        let name = place | if link.plain { PLAIN } else { 0 };
        if let Found::Block(block) = kept.cache.find(name) {
            linked += u64::from(set_link(arena, link, &block));
        }
    }
    linked
}

/// Makes `link` go to `block`, which is at its target, if that is of the same life of their page.
fn set_link(arena: &Arena, link: &Link, block: &Block) -> bool {
    let entry = if link.native { block.native } else { block.memory };
    // A bridge looks behind other things.
    let look = if link.ahead && block.bridge.is_none() { LOOK } else { 0 };
    let same = link.life == block.life;
    if same {
        arena.patch(link.site, entry + look);
    }
    same
}

/// The tables of `cpu`.
fn tables(cpu: &Cpu) -> Tables {
    Tables { slot_mask: cpu.mmu.tlb.slot_mask(), jump_bits: cpu.jit.slot_bits() }
}

/// What a block at `host` is called in the cache.
fn name(host: HostAddr, plain: bool) -> u64 {
    host.addr() | if plain { PLAIN } else { 0 }
}

/// `/tmp/perf-PID.map`, which `perf report` reads, if the environment asks for it.
fn perf_map() -> Option<std::fs::File> {
    std::env::var_os("MVM_PERF_MAP")?;
    let path = std::env::temp_dir().join(format!("perf-{}.map", std::process::id()));
    match std::fs::File::options().create(true).append(true).open(&path) {
        Ok(file) => Some(file),
        Err(error) => {
            tracing::warn!("cannot write {}: {error}", path.display());
            None
        }
    }
}
