//! One block into host code, in one pass over plans made beforehand.

use std::ops::Range;

use iced_x86::CpuidFeature;

use super::asm::host::{RAX, RCX, RDX};
use super::asm::{Asm, Code, Copies, Ea, Rm};
use super::entry::{Entries, OtherEntry};
use super::env::{CalledOp, JUMPS, MOST_JUMPS};
use super::far::{Elsewhere, Unlinked};
use super::layout::{self, CC, GUEST_AX, GUEST_BP, GUEST_DX, GUEST_SP, host_of};
use super::links::{FarLink, Goes, Link, RECORD};
use super::operands::Form;
use super::plan::{self, ALL, Field, Flags, Kind, Mem, Plan};
use super::returns::Room;
use super::spans::{SLOTS, Spans};
use super::stack::StackMiss;
use super::stubs::Stubs;
use super::vector::{GuardMiss, Known};
use crate::host::HostFeatures;
use crate::host::inline::Inline;
use crate::mmu::{FIRST_SLOT_MASK, LARGE_SLOT_MASK};
use crate::op::Op;

/// Where the guest's arithmetic flags are (J4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum At {
    Native,
    Memory,
    Both,
}

/// A jump out of the way of an op.
pub(super) enum Miss {
    /// The op's handler does it all. `hit` is where to go if the other half's context fits.
    Access { jump: usize, hit: Option<(usize, bool)> },
    /// The look at the stack's page.
    Stack(StackMiss),
    /// The probe for a span.
    Span { jump: usize, hit: Option<(usize, bool)>, span: SpanMiss },
    /// The look at what vector instructions may do.
    Guard { jump: usize, miss: GuardMiss },
}

/// A span whose probe has missed.
#[derive(Debug, Clone, Copy)]
pub(super) struct SpanMiss {
    pub slot: u8,
    /// Its linear address: a register of the guest's and a distance, or rcx.
    pub at: Ea,
    pub wanted: Wanted,
}

/// What a probe asks for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub bytes: u16,
    pub write: bool,
}

/// Where a missed access or an unlinked jump goes on, after the block.
pub(super) enum Cold {
    /// Calls op `op`; goes on at `resume`.
    Miss {
        miss: Miss,
        op: usize,
        resume: usize,
        restore: bool,
        /// What holds at `resume`.
        known: Known,
        copies: Copies,
    },
    Link {
        jump: usize,
        link: Link,
        save: bool,
    },
    /// A conditional jump to another page.
    Far {
        jump: usize,
        target: i64,
        save: bool,
    },
    /// The entry of the block that is used less.
    Entry(OtherEntry),
    /// A call for whose pair there is no room.
    Room(Room),
    /// A jump to another page that is not linked, or to a place that is not what it was.
    Unlinked(Unlinked),
    /// An indirect one that goes elsewhere than it did.
    Elsewhere(Elsewhere),
    /// To the dispatcher by `stub`, at the start of the block, which must not be entered. Flags are in memory.
    Leave {
        jump: usize,
        stub: u32,
    },
}

/// Sizes of the tables that code looks into.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tables {
    /// [`Tlb::slot_mask`](crate::mmu::Tlb::slot_mask).
    pub slot_mask: u32,
    /// Bits of the number of an entry of the jump cache.
    pub jump_bits: u32,
}

impl Tables {
    /// Those that a vCPU starts with, and what all of them have if these are too small for one.
    pub const FIRST: Self = Self { slot_mask: FIRST_SLOT_MASK, jump_bits: JUMPS.ilog2() };
    pub const LARGE: Self = Self { slot_mask: LARGE_SLOT_MASK, jump_bits: MOST_JUMPS.ilog2() };
}

/// What a block is made of.
pub struct Input<'a> {
    pub ops: &'a [Op],
    /// Which of them are valid instructions.
    pub valid: &'a [bool],
    /// Vector instructions.
    pub inlines: &'a [Option<Inline>],
    /// The bytes from the start of the first op on.
    pub bytes: &'a [u8],
    /// The last op ends blocks of the interpreter.
    pub ends: bool,
    /// Virtual address of the page.
    pub page: u64,
    /// It is (as far as is known) mostly reached with native flags.
    pub native: bool,
    /// It goes without spans (J14).
    pub plain: bool,
    /// Host address of the next page, if it is one instruction that crosses into it.
    pub next: Option<u64>,
    /// Host address of the code, if it is to be compared (J22).
    pub compared: Option<u64>,
    /// Which life of the page it belongs to.
    pub life: u32,
}

/// Makes blocks. Keeps its buffers.
#[derive(Default)]
pub struct Translator {
    pub(super) asm: Asm,
    pub(super) at: Option<At>,
    pub(super) upper: bool,
    /// The block goes without spans.
    pub(super) plain: bool,
    /// Of the vector unit, here.
    pub(super) known: Known,
    /// By slot of a span: where in it an operand is that is aligned, and to what.
    pub(super) aligned: [Option<(i16, u8)>; SLOTS],
    /// The op being translated leaves rdx alone until its access is done.
    pub(super) spares_rdx: bool,
    /// The next op notes itself as an x87 instruction, and nobody can look before.
    pub(super) noted_next: bool,
    pub(super) page: u64,
    pub(super) stubs: Stubs,
    pub(super) tables: Tables,
    /// Code counts what it does ([`Counted`](super::env::Counted)).
    counting: bool,
    /// Which life of its page the block belongs to.
    life: u32,
    /// Where the next slot of a link starts.
    pub(super) next_slot: u32,
    /// Links of the block.
    pub links: Vec<Link>,
    pub(super) entries: Entries,
    pub(super) plans: Vec<Plan>,
    after: Vec<Flags>,
    pub(super) cold: Vec<Cold>,
    /// Places that refer to ops: position of the distance, index.
    references: Vec<(usize, usize)>,
    /// Where the block starts, from the start of its page.
    pub(super) start: u16,
    /// The op being translated, and where the one starts that is translated next.
    pub(super) current: usize,
    pub(super) follows: Option<u16>,
    pub(super) misses: Vec<Miss>,
    pub(super) spans: Spans,
}

impl std::fmt::Debug for Translator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Translator").finish_non_exhaustive()
    }
}

/// Bytes of code that a block takes at most, on either side.
pub const MAX_BLOCK: usize = 48 << 10;
/// Words of slots that its links take at most: one link for each instruction, and where it goes on.
pub const MAX_SLOTS: u32 = 4 * 65;

impl Translator {
    pub fn new(stubs: Stubs, tables: Tables, counting: bool) -> Self {
        let mut asm = Asm::default();
        asm.bmi2 = HostFeatures::detect().has(CpuidFeature::BMI2);
        Self { asm, stubs, tables, counting, ..Self::default() }
    }

    /// The tables that code is made for.
    pub fn tables(&self) -> Tables {
        self.tables
    }

    /// The tables have other sizes from now on. All code from before must have gone.
    pub fn set_tables(&mut self, tables: Tables) {
        self.tables = tables;
    }

    /// Does code count what it does?
    pub fn counts(&self) -> bool {
        self.counting
    }

    /// Counts, where flags are dead.
    pub(super) fn count(&mut self, counter: i32) {
        if self.counting {
            self.asm.op(Code::wide(0xff), 0, Rm::Mem(Ea::cpu(counter)));
        }
    }

    /// Translates `input` for the places `bases` of the arena, for what runs often and what does not. Links to other pages have
    /// slots from `slots` on, which then starts behind them. The code is then in [`Translator::code`].
    pub fn block(
        &mut self,
        input: &Input<'_>,
        bases: [usize; 2],
        slots: &mut Range<u32>,
    ) -> Entries {
        self.asm.restart(bases[0]);
        self.links.clear();
        self.cold.clear();
        self.references.clear();
        self.misses.clear();
        (self.life, self.next_slot) = (input.life, slots.start);
        self.upper = input.page >> 63 != 0;
        self.page = input.page;
        self.plain = input.plain;
        self.known = Known::default();
        self.aligned = [None; SLOTS];
        let start = input.ops.first().map_or(0, |op| op.start);
        self.start = start;
        let live = self.make_plans(input, start);
        self.find_spans(input, start);
        match input.next {
            Some(next) => self.bridge_entry(start, next),
            None => self.entry(start, live, input),
        }
        for (i, op) in input.ops.iter().enumerate() {
            self.current = i;
            self.follows = input.ops.get(i + 1).map(|op| op.start);
            let (plan, after) = (self.plans[i], self.after[i]);
            let from = usize::from(op.start - start);
            let bytes = &input.bytes[from..usize::from(op.end - start)];
            self.noted_next = self.is_x87(input, i + 1);
            self.spares_rdx = spares_rdx(&plan, input.inlines[i].as_ref());
            match (plan.kind, &input.inlines[i]) {
                (Kind::Vector, Some(inline)) => self.vector(op, &plan, inline, plan.live(after)),
                _ => self.op(op, &plan, after, bytes),
            }
            let resume = self.asm.here();
            let restore = self.at() != At::Memory;
            let (known, copies) = (self.known, self.asm.copies);
            self.cold.extend(self.misses.drain(..).map(|miss| Cold::Miss {
                miss,
                op: i,
                resume,
                restore,
                known,
                copies,
            }));
        }
        self.finish(input, bases[1]);
        slots.start = self.next_slot;
        self.entries
    }

    /// Instructions of the block made last that are called.
    pub fn called(&self) -> usize {
        self.plans.iter().filter(|plan| matches!(plan.kind, Kind::Call)).count()
    }

    /// Accesses of the block made last that are not called, and those that go by a neighbour's probe.
    pub fn accesses(&self) -> (usize, usize) {
        let all = self.plans.iter().filter(|plan| plan.mem != Mem::None).count();
        (all, self.spans.members())
    }

    /// The code made last, in its two pieces.
    pub fn code(&self) -> (&[u8], &[u8]) {
        self.asm.pieces()
    }

    /// Plans, and backwards what flags are live after each. Returns what is live at the start.
    fn make_plans(&mut self, input: &Input<'_>, start: u16) -> Flags {
        self.plans.clear();
        for ((op, valid), inline) in input.ops.iter().zip(input.valid).zip(input.inlines) {
            let bytes = &input.bytes[usize::from(op.start - start)..usize::from(op.end - start)];
            self.plans.push(plan::plan(bytes, op, *valid, inline.as_ref()));
        }
        self.after.clear();
        self.after.resize(self.plans.len(), 0);
        let mut live = ALL;
        for (after, plan) in self.after.iter_mut().zip(&self.plans).rev() {
            *after = live;
            live = plan.live(live);
        }
        live
    }

    /// Is op `index` an x87 instruction in place that accesses no memory?
    fn is_x87(&self, input: &Input<'_>, index: usize) -> bool {
        let vector = self.plans.get(index).is_some_and(|plan| matches!(plan.kind, Kind::Vector));
        let inline = input.inlines.get(index).and_then(Option::as_ref);
        vector && inline.is_some_and(|inline| inline.note.is_some() && inline.memory.is_none())
    }

    fn find_spans(&mut self, input: &Input<'_>, start: u16) {
        if input.plain {
            return self.spans.none();
        }
        let immediate = |i: usize| {
            let Some(op) = input.ops.get(i) else { return 0 };
            immediate(&input.bytes[..usize::from(op.end - start)], &self.plans[i])
        };
        self.spans.find(input.ops, &self.plans, input.inlines, immediate);
    }

    pub(super) fn flags_are_native(&mut self) {
        self.at = Some(At::Native);
    }

    pub(super) fn at(&self) -> At {
        self.at.unwrap_or(At::Native)
    }

    /// Before EFLAGS are destroyed, with `live` flags in use.
    pub(super) fn keep_flags(&mut self, live: Flags) {
        if live != 0 && self.at() == At::Native {
            self.asm.save_flags(CC);
        }
        self.at = Some(At::Memory);
    }

    /// Before EFLAGS are used.
    pub(super) fn need_flags(&mut self, live: Flags) {
        if live != 0 && self.at() == At::Memory {
            self.asm.restore_flags(CC);
            self.at = Some(At::Both);
        }
    }

    fn op(&mut self, op: &Op, plan: &Plan, after: Flags, bytes: &[u8]) {
        let live = plan.live(after);
        match plan.kind {
            Kind::Call => self.call(live),
            Kind::Nop => {}
            Kind::Copy { code, field, operand, imm } => {
                let place = self.place(op, plan, live);
                if plan.sets || plan.reads != 0 {
                    self.need_flags(live);
                }
                let imm = &bytes[bytes.len() - usize::from(imm)..];
                self.copy(plan, Form { code, field, operand }, place, imm);
                if plan.sets {
                    self.at = Some(At::Native);
                }
            }
            Kind::ByCl { code, field, operand } => {
                let place = self.place(op, plan, live);
                self.need_flags(live);
                self.by_cl(code, field, operand, place);
                self.at = Some(At::Native);
            }
            Kind::Flag(opcode) => {
                self.need_flags(live);
                self.asm.bytes(&[opcode]);
                self.at = Some(At::Native);
            }
            Kind::FlagsOfAh => {
                self.need_flags(live);
                self.asm.mov32(RAX, GUEST_AX);
                self.asm.bytes(&[0x9e]);
                self.at = Some(At::Native);
            }
            Kind::AhOfFlags => {
                self.need_flags(live);
                let part = self.high(0);
                self.asm.bytes(&[0x9f, 0x0f, 0xb6, 0xc4]); // lahf; movzx eax, ah
                self.asm.op(Code { bytes: true, ..Code::one(0x88) }, RAX, Rm::Mem(part));
                self.take_back(0);
            }
            Kind::MovImm { register } => self.mov_imm(register, op.imm),
            Kind::Lea { register, size } => self.lea(op, register, size),
            Kind::Extend { wide: true } => {
                self.asm.op(Code::wide(0x63), GUEST_AX, Rm::Reg(GUEST_AX));
            }
            Kind::Extend { wide: false } => {
                let movsx = Code { map: 1, ..Code::one(0xbf) };
                self.asm.op(movsx, GUEST_AX, Rm::Reg(GUEST_AX));
            }
            Kind::Sign { wide } => {
                self.asm.mov(RAX, GUEST_AX);
                self.asm.bytes(if wide { &[0x48, 0x99] } else { &[0x99] });
                self.asm.mov(GUEST_DX, RDX);
            }
            Kind::Push { register } => {
                let place = self.access(op, plan, live);
                match register {
                    Some(register) => {
                        let value = self.source(register, RDX);
                        self.asm.store(place, value);
                    }
                    None => {
                        self.asm.op(Code::wide(0xc7), 0, Rm::Mem(place));
                        self.asm.imm32(op.imm as i32);
                    }
                }
                self.asm.lea(GUEST_SP, Ea::at(GUEST_SP, -8));
            }
            Kind::PushMemory => {
                let place = self.access(op, plan, live);
                self.asm.load(RDX, place);
                self.asm.store(Ea::cpu(layout::TARGET), RDX);
                let place = self.probe_pushed();
                self.asm.load(RDX, Ea::cpu(layout::TARGET));
                self.asm.store(place, RDX);
                self.asm.lea(GUEST_SP, Ea::at(GUEST_SP, -8));
            }
            Kind::Pop { register } => {
                let place = self.access(op, plan, live);
                let target = host_of(register).unwrap_or(RDX);
                self.asm.load(target, place);
                // What is popped to RSP is what RSP is then.
                if target != GUEST_SP {
                    self.asm.lea(GUEST_SP, Ea::at(GUEST_SP, 8));
                }
                self.put(register, target);
            }
            Kind::Leave => {
                let place = self.access(op, plan, live);
                self.asm.lea(GUEST_SP, Ea::at(GUEST_BP, 8));
                self.asm.load(GUEST_BP, place);
            }
            Kind::CompareExchange { code, register } => {
                let place = self.access(op, plan, live);
                let new = self.source(register, RDX);
                self.asm.mov(RAX, GUEST_AX);
                self.asm.op(code, new, Rm::Mem(place));
                self.asm.mov(GUEST_AX, RAX);
                self.at = Some(At::Native);
            }
            Kind::CompareExchange16 { code } => self.compare_exchange_16(op, plan, code, live),
            Kind::System(system) => self.system(op, plan, system, live),
            Kind::Fill { repeated } => self.fill(op, plan, repeated, live),
            Kind::BitString { code, register } => self.bit_string(op, plan, code, register, live),
            Kind::Multiply { operand, size, signed } => {
                let rm = self.wide_operand(op, plan, live, operand);
                self.need_flags(live);
                self.asm.mov(RAX, GUEST_AX);
                self.asm.op(Code::sized(0xf7, size), if signed { 5 } else { 4 }, rm);
                self.asm.mov(GUEST_AX, RAX);
                self.asm.mov(GUEST_DX, RDX);
                self.at = Some(At::Native);
            }
            Kind::Divide { operand, size, signed } => {
                self.keep_flags(live);
                match self.wide_operand(op, plan, live, operand) {
                    Rm::Reg(RCX) => {}
                    rm => self.asm.op(Code::sized(0x8b, size), RCX, rm),
                }
                self.divide(size, signed);
            }
            _ => self.transfer(op, plan),
        }
    }

    /// The op's handler does it. Flags are in memory before and after.
    pub(super) fn call(&mut self, live: Flags) {
        self.keep_flags(live);
        self.call_op(self.current);
        self.known = Known::default();
        self.asm.copies = Copies::default();
    }

    pub(super) fn call_op(&mut self, op: usize) {
        // lea rdx, [rip + distance of the op]
        self.asm.bytes(&[0x48, 0x8d, 0x15]);
        self.asm.imm32(0);
        self.references.push((self.asm.here() - 4, op));
        self.asm.far(0xe8, self.stubs.call_op);
    }

    /// On `condition`, the op's handler does it all.
    pub(super) fn miss_if(&mut self, condition: u8) {
        let jump = self.asm.jcc(condition);
        self.misses.push(Miss::Access { jump, hit: None });
    }

    /// A direct jump (position of its distance: `jump`) inside the page.
    pub(super) fn link(&mut self, jump: usize, target: u16) {
        self.link_flags(jump, target, target > self.start);
    }

    /// The same for a call. What it calls always looks at the run word: by calls that go forward alone a guest could be busy
    /// for ever.
    pub(super) fn link_call(&mut self, jump: usize, target: u16) {
        self.link_flags(jump, target, false);
    }

    fn link_flags(&mut self, jump: usize, target: u16, ahead: bool) {
        let at = self.at();
        let link = self.add_link(Link {
            site: self.asm.place(jump) as u32,
            life: self.life,
            target,
            native: at != At::Memory,
            plain: false,
            ahead,
        });
        self.cold.push(Cold::Link { jump, link, save: at == At::Native });
    }

    fn add_link(&mut self, link: Link) -> Link {
        self.links.push(link);
        link
    }

    /// Goes on at `target` in the page without spans. Flags are in memory.
    pub(super) fn leave_spans(&mut self, target: u16) {
        self.asm.keep_in_line(1);
        let jump = self.asm.jmp();
        let link = self.add_link(Link {
            site: self.asm.place(jump) as u32,
            life: self.life,
            target,
            native: false,
            plain: true,
            ahead: target > self.start,
        });
        self.asm.land(jump);
        self.leave_by(link.to_bytes(), self.stubs.exit_link);
    }

    /// Leaves for the dispatcher by the way out `stub`, with where `record` is in eax.
    pub(super) fn leave_by(&mut self, record: [u8; RECORD], stub: u32) {
        self.asm.mov_eax(0);
        let place = self.asm.here() - 4;
        self.asm.far(0xe9, stub);
        let record = self.record(record);
        self.asm.set_imm32(place, record as i32);
    }

    /// Puts a record here, where no code comes. Returns where that is in the arena.
    pub(super) fn record(&mut self, record: [u8; RECORD]) -> u32 {
        let place = self.asm.place(self.asm.here());
        self.asm.bytes(&record);
        place as u32
    }

    /// A conditional jump to another page.
    pub(super) fn far_later(&mut self, jump: usize, target: i64) {
        self.cold.push(Cold::Far { jump, target, save: self.at() == At::Native });
    }

    /// A link with a slot of its own.
    pub(super) fn far_link_to(&mut self, goes: Goes) -> FarLink {
        let slot = self.next_slot;
        self.next_slot += goes.words();
        FarLink { slot, goes }
    }

    fn finish(&mut self, input: &Input<'_>, cold: usize) {
        let last = self.plans.last().copied();
        let end = input.ops.last().map_or(0, |op| op.end);
        if !last.is_some_and(|plan| plan.transfers()) {
            if input.ends && last.is_some_and(|plan| matches!(plan.kind, Kind::Call)) {
                self.leave_to(i64::from(end));
            } else {
                self.go_to(i64::from(end));
            }
        }
        self.pad();
        self.asm.go_on_at(cold);
        let mut cold = std::mem::take(&mut self.cold);
        while !cold.is_empty() {
            cold.drain(..).for_each(|cold| self.cold(cold, input));
            std::mem::swap(&mut cold, &mut self.cold);
        }
        self.cold = cold;
        self.place_ops(input.ops);
        self.pad();
    }

    fn pad(&mut self) {
        while !self.asm.place(self.asm.here()).is_multiple_of(16) {
            self.asm.bytes(&[0xcc]);
        }
    }

    /// What is out of the way.
    fn cold(&mut self, cold: Cold, input: &Input<'_>) {
        match cold {
            Cold::Miss { miss, op, resume, restore, known, copies } => {
                let (jump, hit) = match miss {
                    Miss::Access { jump, hit } | Miss::Span { jump, hit, .. } => (jump, hit),
                    Miss::Stack(stack) => self.stack_miss(stack),
                    Miss::Guard { jump, .. } => (jump, None),
                };
                self.asm.land(jump);
                if let Some((hit, write)) = hit {
                    let other = layout::context(write, 0);
                    self.asm.op(Code::wide(0x3b), RDX, Rm::Mem(Ea::cpu(other)));
                    let back = self.asm.jcc(4);
                    self.asm.patch(back, hit);
                }
                let places = (input.ops[op].start, input.ops[op].end);
                match miss {
                    Miss::Access { .. } => self.call_op(op),
                    Miss::Span { span, .. } => self.span_miss(op, places, span),
                    Miss::Stack(stack) => match stack.span() {
                        Some(span) => self.span_miss(op, places, span),
                        None => self.call_op(op),
                    },
                    Miss::Guard { miss, .. } => {
                        if !self.guard_miss(op, places.0, miss) {
                            return;
                        }
                    }
                }
                if self.plans[op].transfers() {
                    // Its handler never says "next".
                    self.asm.bytes(&[0x0f, 0x0b]);
                    return;
                }
                self.reload_vectors(known);
                self.asm.load_copies(copies);
                if restore {
                    self.asm.restore_flags(CC);
                }
                self.asm.jmp_to(resume);
            }
            Cold::Link { jump, link, save } => {
                self.asm.land(jump);
                if save {
                    self.asm.save_flags(CC);
                }
                self.leave_by(link.to_bytes(), self.stubs.exit_link);
            }
            Cold::Far { jump, target, save } => {
                self.asm.land(jump);
                if save {
                    self.asm.save_flags(CC);
                }
                self.jump_far(target);
            }
            Cold::Leave { jump, stub } => {
                self.asm.land(jump);
                self.asm.mov_eax(self.start.into());
                self.asm.far(0xe9, stub);
            }
            Cold::Entry(other) => self.other_entry(other),
            Cold::Room(room) => self.make_room(room),
            Cold::Unlinked(unlinked) => self.unlinked(unlinked),
            Cold::Elsewhere(elsewhere) => {
                let op = &input.ops[elsewhere.op];
                self.elsewhere(elsewhere, op);
            }
        }
    }

    /// The ops that are called, behind the code.
    fn place_ops(&mut self, ops: &[Op]) {
        while !self.asm.place(self.asm.here()).is_multiple_of(align_of::<CalledOp>()) {
            self.asm.bytes(&[0xcc]);
        }
        // In the order of their ops, but for few.
        let mut references = std::mem::take(&mut self.references);
        references.sort_by_key(|(_, op)| *op);
        let mut last = None;
        for (position, op) in references.drain(..) {
            let place = match last {
                Some((known, place)) if known == op => place,
                _ => {
                    let place = self.asm.here();
                    let called = CalledOp { op: ops[op], opcode: self.plans[op].opcode };
                    self.asm.bytes(called.as_bytes());
                    place
                }
            };
            last = Some((op, place));
            self.asm.patch(position, place);
        }
        self.references = references;
    }
}

/// Does the op leave rdx alone until its access to memory is done?
fn spares_rdx(plan: &Plan, inline: Option<&Inline>) -> bool {
    let own = |guest| host_of(guest).is_some();
    match plan.kind {
        Kind::Vector => inline.is_some_and(|i| i.moves.iter().flatten().all(|m| m.host != RDX)),
        Kind::Copy { field: Field::Digit(_), .. } | Kind::Push { register: None } => true,
        Kind::Copy { field: Field::Reg(guest, ..), .. }
        | Kind::Push { register: Some(guest) }
        | Kind::Pop { register: guest } => own(guest),
        _ => false,
    }
}

/// The immediate operand of the instruction that ends `bytes`, if its plan copies one.
fn immediate(bytes: &[u8], plan: &Plan) -> i64 {
    let Kind::Copy { imm, .. } = plan.kind else { return 0 };
    let Some((_, imm)) = bytes.split_at_checked(bytes.len() - usize::from(imm)) else { return 0 };
    match *imm {
        [a] => i64::from(a as i8),
        [a, b] => i64::from(i16::from_le_bytes([a, b])),
        [a, b, c, d] => i64::from(i32::from_le_bytes([a, b, c, d])),
        _ => 0,
    }
}
