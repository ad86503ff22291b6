//! Running translated code: the part of the dispatcher that belongs to it.

use std::io;
use std::io::Write as _;
use std::mem::transmute;

use mvm_memory::PageTracker;

use super::arena::Arena;
use super::asm::Asm;
use super::cache::{Block, Cache, Found, Link, PLAIN};
use super::counters::Counters;
use super::entry::LOOK;
use super::env::{CalledOp, JitEnv};
use super::stubs::{Enter, Exit, Stubs, exit};
use super::translate::{Goes, Input, MAX_BLOCK, Tables, Translator};
use crate::apic::NEVER;
use crate::block::{BlockDecoder, GoesOn, Stop};
use crate::cpu::Cpu;
use crate::mmu::{HostAddr, NO_JUMP};
use crate::op::{Flow, reg};

/// How often code is interpreted before it is translated. Measured with a Linux boot: 4, 8 and 12 times take the same time, and
/// make 13, 10.7 and 9.3 MB of code. A block takes as long to translate as to interpret some eight times.
pub(super) const TRIALS: u8 = 8;
/// The same for code that has taken the place of other code that was translated: it will perhaps be replaced as well. So many
/// runs take about as long as a translation.
const TRIALS_ANEW: u8 = 24;
/// How many of these runs what follows a conditional jump may have missed to be in one block with it. With 4 a large program
/// (gcc) is no faster.
const MISSED: u8 = 1;
/// How many jumps between pages go by the jump cache before one of them is linked anew.
const PATIENCE: i32 = 64;
/// Bytes of address space for the code of one vCPU, at least and at most.
const LEAST_CODE: u64 = 64 << 20;
const MOST_CODE: u64 = 256 << 20;
/// Counters of code that is not translated yet, by address; what shares one is translated sooner.
const SEEN: usize = 1 << 17;

/// The translator of one vCPU.
#[derive(Debug)]
pub struct Jit {
    arena: Arena,
    stubs: Stubs,
    /// Where the blocks start, behind the stubs.
    floor: usize,
    used: usize,
    /// The same for the part that seldom runs.
    used_cold: usize,
    /// Where the first part has to end.
    limit: usize,
    cache: Cache,
    translator: Translator,
    trials: u8,
    trials_left: Box<[u8]>,
    /// The link through which the last block was left.
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
    /// What handlers get for the block they are in; none of them looks at it.
    _block: Box<crate::block::Block>,
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

const BLOCK: usize = reg::BLOCK as usize;
const PAGE: u64 = !0xfff;

impl Jit {
    /// A translator with an empty cache.
    ///
    /// # Errors
    /// The host refuses executable memory.
    pub fn new(cpu: &mut Cpu) -> io::Result<Self> {
        let mut arena = Arena::new(code_size(cpu))?;
        let block = Box::new(crate::block::Block::nothing());
        let mut asm = Asm::default();
        let stubs = Stubs::make(&mut asm, &raw const *block);
        arena.write(0, asm.code());
        let floor = asm.here().next_multiple_of(64);
        cpu.jit = JitEnv::with_jumps(arena.entry(0));
        let notices = cpu.mmu.phys().notices();
        cpu.sys.attention().keep_run_word(notices.clone(), cpu.mmu.index);
        Ok(Self {
            stubs,
            floor,
            used: floor,
            used_cold: arena.cold(),
            limit: arena.cold(),
            arena,
            cache: Cache::default(),
            translator: Translator::new(
                stubs,
                tables(cpu),
                std::env::var_os("MVM_COUNT").is_some(),
            ),
            trials: TRIALS,
            trials_left: vec![TRIALS; SEEN].into_boxed_slice(),
            pending: None,
            pending_far: None,
            at_bridge: false,
            armed: NEVER,
            notices,
            known_notices: 0,
            _block: block,
            perf_map: perf_map(),
            era: 0,
            counters: Counters::default(),
        })
    }

    /// Runs the block at [`Cpu::rip`], in 64-bit mode, and what follows it.
    pub fn run(&mut self, cpu: &mut Cpu, decoder: &mut BlockDecoder) -> Ran {
        if cpu.mmu.phys().has_changed_code(cpu.mmu.index) {
            self.kill_changed(cpu);
        }
        let notices = self.notices.notices().count();
        if notices != self.known_notices {
            self.kill_stale(cpu);
            self.known_notices = notices;
        }
        self.set_alarm(cpu);
        if cpu.mmu.tlb.is_tight() || cpu.jit.is_tight() {
            self.grow(cpu);
        }
        if cpu.mmu.tlb.jump_tags_era() != self.era {
            // The tags are used again.
            self.era = cpu.mmu.tlb.jump_tags_era();
            self.clear(cpu);
        }
        let host = match cpu.code_host(cpu.rip) {
            Ok(host) => host,
            Err(fault) => {
                cpu.fault = Some(fault);
                return Ran::Code(Some(Stop::Fault));
            }
        };
        let (pending, far) = (self.pending.take(), self.pending_far.take());
        if self.on_trial(host) {
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
                self.cache.jumped_to(host.addr(), cpu.rip, key.salt);
                Some(code)
            })
        };
        if let (Some(code), Some(link)) = (known, far) {
            self.link_far(link, cpu.rip, host, key.tag, (code - self.arena.entry(0)) as u32);
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
            let enter: Enter = transmute(self.arena.entry(self.stubs.enter));
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
        let plain = pending.is_some_and(|link| self.goes_plain(link, cpu.rip));
        let link = pending.and_then(|number| self.cache.links.get(number as usize));
        let native = link.is_some_and(|link| link.native);
        let block = self.find(cpu, decoder, host, How { plain, native })?;
        let entry = self.way_in(cpu, name(host, plain), &block)?;
        if let Some(link) = pending {
            self.link(link, cpu.rip, &block);
        }
        if !plain {
            let key = cpu.mmu.tlb.jump_key(cpu.rip);
            cpu.jit.insert(cpu.rip, key, host.addr(), block.memory);
            self.cache.jumped_to(host.addr(), cpu.rip, key.salt);
            if let Some(link) = far {
                self.link_far(link, cpu.rip, host, key.tag, block.memory);
            }
        }
        Some(self.arena.entry(entry))
    }

    fn left(&mut self, cpu: &mut Cpu, exit: Exit) -> Option<Stop> {
        let page = cpu.gpr[BLOCK];
        let linking = std::mem::take(&mut cpu.jit.linking);
        match exit.kind {
            exit::LINK => {
                self.counters.left_unlinked += 1;
                let number = exit.value as u32;
                let target = self.cache.links.get(number as usize).map_or(0, |link| link.target);
                cpu.rip = page | u64::from(target);
                self.pending = Some(number);
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
            exit::FAR => {
                self.counters.left_to += 1;
                self.pending_far = Some(exit.value as u32);
                cpu.jit.patience = PATIENCE;
                None
            }
            _ => {
                // SAFETY: set by the stub that called the handler: a `CalledOp` of a block that was just running,
                // whose code is overwritten in `make` at the earliest.
                let called = unsafe { &*(cpu.jit.called as *const CalledOp) };
                let (start, end) = (u64::from(called.op.start), u64::from(called.op.end));
                let flow = exit.value as u8;
                if let Some(count) = self.counters.left_flow.get_mut(usize::from(flow)) {
                    *count += 1;
                }
                if flow == Flow::Jump as u8 {
                    self.pending_far = linking.checked_sub(1);
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
        match self.cache.find(name(host, how.plain)) {
            Found::Block(block) => return Some(block),
            Found::Stale => {
                self.kill(cpu, host.addr() & PAGE);
                if self.on_trial(host) {
                    return None;
                }
            }
            Found::None => {}
        }
        self.make(cpu, decoder, host, how)
    }

    /// The entry of a block for the dispatcher. None: it is a bridge to a page that does not follow (any more).
    fn way_in(&mut self, cpu: &mut Cpu, name: u64, block: &Block) -> Option<u32> {
        if !block.bridge {
            return Some(block.memory);
        }
        let bridge = self.cache.bridge(name)?;
        match cpu.fetch((cpu.rip | !PAGE).wrapping_add(1)) {
            Ok(next) if next.addr() == bridge.next => Some(bridge.checked),
            Ok(_) => {
                self.cache.drop_bridge(name);
                None
            }
            // The interpreter raises it.
            Err(_) => None,
        }
    }

    /// Is the code at `host` to be interpreted still?
    fn on_trial(&mut self, host: HostAddr) -> bool {
        match self.trials_left.get_mut(trial(host.addr())) {
            Some(left) if *left > 0 => {
                *left -= 1;
                true
            }
            _ => false,
        }
    }

    /// From now on code is translated after `trials` runs by the interpreter.
    pub(crate) fn set_trials(&mut self, trials: u8) {
        self.trials = trials;
        self.trials_left.fill(trials);
    }

    fn make(
        &mut self,
        cpu: &mut Cpu,
        decoder: &mut BlockDecoder,
        host: HostAddr,
        how: How,
    ) -> Option<Block> {
        let plain = how.plain;
        if self.used + MAX_BLOCK > self.limit || self.used_cold + MAX_BLOCK > self.arena.size() {
            self.clear(cpu);
        }
        // What has been run about as often as code that is translated now most often follows it.
        let goes_on = |offset: u16| {
            let at = trial(host.addr() & PAGE | u64::from(offset));
            self.trials_left.get(at).is_some_and(|left| *left <= MISSED)
        };
        let goes_on: Option<GoesOn<'_>> = if plain { None } else { Some(&goes_on) };
        let run = decoder.decode_run(cpu, cpu.rip, host, goes_on)?;
        let second = run.second.map(|(next, stamp)| (next.addr(), stamp));
        // What was translated of these pages before, of other bytes, would be taken for theirs.
        for (host, stamp) in [(host.addr(), run.stamp)].into_iter().chain(second) {
            if self.cache.is_another(host, &stamp) {
                self.kill(cpu, host & PAGE);
            }
        }
        let life = self.cache.life(host.addr(), run.stamp);
        if let Some((next, stamp)) = second {
            self.cache.life(next, stamp);
        }
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
        };
        let first = [self.cache.links.len(), self.cache.far_links.len()];
        let entries = self.translator.block(&input, [self.used, self.used_cold], first);
        let (code, cold) = self.translator.code();
        self.arena.write(self.used, code);
        self.arena.write(self.used_cold, cold);
        self.cache.links.extend(self.translator.links.iter().map(|l| Link {
            site: l.site,
            target: l.target,
            native: l.native,
            plain: l.plain,
            ahead: l.ahead,
            life,
        }));
        self.cache.far_links.extend(&self.translator.far_links);
        let c = &mut self.counters;
        c.blocks += 1;
        c.instructions += run.ops.len() as u64;
        c.called_instructions += self.translator.called() as u64;
        let (accesses, spared) = self.translator.accesses();
        c.accesses += accesses as u64;
        c.spared_probes += spared as u64;
        c.guest_bytes += run.bytes.len() as u64;
        c.code_bytes += (code.len() + cold.len()) as u64;
        if let Some(map) = &mut self.perf_map {
            let [at, cold_at] = [self.used, self.used_cold].map(|at| self.arena.entry(at as u32));
            // A map that is not complete is of use all the same.
            let _ = writeln!(map, "{at:x} {:x} guest_{:x}", code.len(), cpu.rip);
            let _ = writeln!(map, "{cold_at:x} {:x} guest_{:x}.cold", cold.len(), cpu.rip);
        }
        self.used += code.len();
        self.used_cold += cold.len();
        self.arena.went_on_to(self.used);
        self.arena.went_on_to(self.used_cold);
        c.used = (self.used + self.used_cold - self.arena.cold()) as u64;
        let name = name(host, plain);
        if let Some((next, _)) = second {
            self.cache.make_bridge(name, next, entries.checked);
        }
        let block = self.cache.insert(name, entries.memory, entries.native, second.is_some())?;
        self.link_to_known(host, first[0]);
        Some(block)
    }

    /// Does link `number`, which was followed to `rip`, go on without spans?
    fn goes_plain(&self, number: u32, rip: u64) -> bool {
        let link = self.cache.links.get(number as usize);
        link.is_some_and(|link| link.plain && u64::from(link.target) == rip & !PAGE)
    }

    /// Links those from number `first` on to the blocks that there are, all in the page of `host`.
    fn link_to_known(&mut self, host: HostAddr, first: usize) {
        for number in first..self.cache.links.len() {
            let Link { target, plain, .. } = self.cache.links[number];
            let name = host.addr() & PAGE | u64::from(target) | if plain { PLAIN } else { 0 };
            if let Found::Block(block) = self.cache.find(name) {
                self.link(number as u32, target.into(), &block);
            }
        }
    }

    /// Makes link `number` go to `block`, which is at `rip`.
    fn link(&mut self, number: u32, rip: u64, block: &Block) {
        let Some(link) = self.cache.links.get(number as usize) else { return };
        // What came in between may have taken us elsewhere, or ended the page's life.
        if link.life != block.life || u64::from(link.target) != rip & !PAGE {
            return;
        }
        let entry = if link.native { block.native } else { block.memory };
        // A bridge looks behind other things.
        let target = entry + if link.ahead && !block.bridge { LOOK } else { 0 };
        let distance = i64::from(target) - (i64::from(link.site) + 4);
        self.arena.write(link.site as usize, &(distance as i32).to_le_bytes());
        self.counters.links += 1;
    }

    /// Makes far link `number` go to `code`, which is that for `rip` at `host`, as long as `tag` counts.
    fn link_far(&mut self, number: u32, rip: u64, host: HostAddr, tag: u32, code: u32) {
        let Some(link) = self.cache.far_links.get(number as usize) else { return };
        match link.goes {
            // It is elsewhere than when it was made, or what came in between has taken us elsewhere.
            Goes::To(target) if target != rip => return,
            Goes::To(_) => {}
            Goes::Anywhere { address } => self.arena.write(address as usize, &rip.to_le_bytes()),
        }
        let distance = i64::from(code) - (i64::from(link.site) + 4);
        self.arena.write(link.site as usize, &(distance as i32).to_le_bytes());
        self.arena.write(link.tag as usize, &tag.to_le_bytes());
        self.cache.linked_to(number, host.addr());
        self.counters.links += 1;
    }

    /// Ends the blocks of all pages whose code was written to (J8).
    fn kill_changed(&mut self, cpu: &mut Cpu) {
        for page in cpu.mmu.phys().clone().take_changed_code(cpu.mmu.index) {
            self.kill(cpu, page);
        }
    }

    /// The same for what other processes wrote, who do not say where.
    fn kill_stale(&mut self, cpu: &mut Cpu) {
        for page in self.cache.stale_pages() {
            self.kill(cpu, page);
        }
    }

    /// Ends the life of a page's code. Nobody comes there any more: not by the jump cache, nor by a link (J6).
    fn kill(&mut self, cpu: &mut Cpu, page: u64) {
        let mut dead = Vec::new();
        self.cache.kill(page, &mut dead);
        let anew = if self.trials == 0 { 0 } else { TRIALS_ANEW };
        self.counters.killed_pages += u64::from(!dead.is_empty());
        for (host, page) in dead {
            for offset in page.offsets() {
                if let Some(left) = self.trials_left.get_mut(trial(host | u64::from(offset))) {
                    *left = anew;
                }
            }
            for link in self.cache.links_to(&page) {
                self.arena.write(link.tag as usize, &NO_JUMP.to_le_bytes());
            }
            let Some(places) = page.places() else {
                cpu.forget_jumps();
                cpu.jit.forget_code();
                continue;
            };
            for (at, salt) in places {
                for offset in page.offsets() {
                    cpu.jit.forget(at | u64::from(offset), *salt, host);
                }
            }
        }
    }

    /// Empties the cache (J12).
    fn clear(&mut self, cpu: &mut Cpu) {
        self.cache.clear();
        (self.pending, self.pending_far) = (None, None);
        self.trials_left.fill(self.trials);
        (self.used, self.used_cold) = (self.floor, self.arena.cold());
        self.counters.emptied += 1;
        cpu.jit.clear();
    }

    /// Larger tables for what has been too small, for new code.
    fn grow(&mut self, cpu: &mut Cpu) {
        if cpu.mmu.tlb.is_tight() {
            cpu.mmu.tlb.grow();
        }
        if cpu.jit.is_tight() {
            cpu.jit.grow();
        }
        let tables = tables(cpu);
        if tables != self.translator.tables() {
            self.clear(cpu);
            self.translator.set_tables(tables);
        }
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
        let tables = SEEN + self.cache.memory() + cpu.jit.memory();
        Counters {
            counted,
            memory: (self.arena.touched() + tables) as u64,
            code_memory: self.arena.touched() as u64,
            ..self.counters.clone()
        }
    }

    /// Where its code is executed.
    #[cfg(test)]
    pub(crate) fn code_address(&self) -> u64 {
        self.arena.entry(0)
    }

    /// Makes code count what it does from now on.
    #[cfg(test)]
    pub(crate) fn set_counting(&mut self) {
        self.translator = Translator::new(self.stubs, self.translator.tables(), true);
    }

    /// Room for `bytes` of code (and the largest block there can be).
    #[cfg(test)]
    pub(crate) fn set_limit(&mut self, bytes: usize) {
        self.limit = self.floor + MAX_BLOCK + bytes;
    }

    /// Blocks in the cache.
    pub fn len(&self) -> usize {
        self.cache.len()
    }

    /// Is it empty?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The tables of `cpu`.
fn tables(cpu: &Cpu) -> Tables {
    Tables { slot_mask: cpu.mmu.tlb.slot_mask(), jump_bits: cpu.jit.slot_bits() }
}

/// Bytes of address space for the code of one vCPU: of all of them an eighth of the guest's memory at most.
fn code_size(cpu: &Cpu) -> usize {
    let ram = cpu.mmu.phys().ram();
    let all: u64 = ram.regions().iter().map(|region| region.size).sum();
    // What the guest may grow by is most of it, and seldom there.
    let ram = all - ram.growing_region().map_or(0, |region| region.size);
    let share = ram / 8 / u64::from(cpu.sys.platform.vcpus.max(1));
    share.next_power_of_two().clamp(LEAST_CODE, MOST_CODE) as usize
}

/// The counter for code at host address `host`. Those of a page lie side by side, one for four bytes.
fn trial(host: u64) -> usize {
    let page = (host >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - SEEN.ilog2());
    ((page as usize & !63) + (host & 0xfff) as usize / 4) & (SEEN - 1)
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
