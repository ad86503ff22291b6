//! Memory operands: addresses, and the TLB probe before an access or a span of them.

use super::asm::host::{RAX, RCX, RDX};
use super::asm::{Code, Ea, Rm};
use super::layout::{self, TABLE, host_of};
use super::plan::{Flags, Mem, Plan};
use super::spans::{Address, Role};
use super::stack::is_stack;
use super::translate::{Miss, SpanMiss, Translator, Wanted};
use crate::mmu::TlbLayout;
use crate::op::{Op, reg};

impl Translator {
    /// The offset of an address as an address of the host. Destroys rcx and rdx, no flags.
    fn offset(&mut self, address: &Address) -> Ea {
        let base = match address.base {
            reg::ZERO => None,
            reg::BLOCK => {
                self.asm.load(RCX, Ea::cpu(layout::PAGE));
                Some(RCX)
            }
            guest => Some(self.source(guest, RCX)),
        };
        let index = match address.index {
            reg::ZERO => None,
            guest => Some((self.source(guest, RDX), address.scale)),
        };
        Ea { base, index, disp: address.disp }
    }

    /// The offset of an op's memory operand. Destroys rcx and rdx, no flags.
    pub(super) fn address(&mut self, op: &Op) -> Ea {
        self.offset(&Address::of_operand(op))
    }

    /// The access of an op whose plan says `plan`: returns where it is in the host, by rcx (or rdx, if the op has no use for
    /// that) and at most one register of the guest's. Flags that are `live` are kept in memory if they must be; destroys rax, rdx and, if there is
    /// a look at something, EFLAGS.
    pub(super) fn access(&mut self, op: &Op, plan: &Plan, live: Flags) -> Ea {
        let address = Address::of(op, plan);
        match self.spans.role(self.current) {
            Role::Member { slot, .. } => {
                let place = self.by_span(&address, layout::span(slot));
                self.look_at_alignment(&address, plan, place, live)
            }
            Role::Head { slot, low, bytes, write } => {
                self.aligned[usize::from(slot)] = None;
                self.keep_flags(live);
                let first = Address { disp: address.disp.wrapping_add(low.into()), ..address };
                let at = self.linear(&first, bytes);
                let span = SpanMiss { slot, at, wanted: Wanted { bytes, write } };
                let place = self.probe_span(span);
                let place = Ea { disp: place.disp.wrapping_sub(low.into()), ..place };
                self.look_at_alignment(&address, plan, place, live)
            }
            Role::Alone => {
                self.keep_flags(live);
                let wanted = Wanted { bytes: plan.size.into(), write: plan.mem == Mem::Write };
                let place = self.probe(&address, wanted);
                self.look_at_alignment(&address, plan, place, live)
            }
        }
    }

    /// Makes sure that the access at `place` in the host is aligned as its instruction demands: otherwise it is the handler's,
    /// which raises the fault. Returns where it is.
    fn look_at_alignment(&mut self, address: &Address, plan: &Plan, place: Ea, live: Flags) -> Ea {
        if plan.align == 0 || self.is_aligned(plan.align) {
            return place;
        }
        self.keep_flags(live);
        let (register, place) = match (pinned(address.base), address.index, address.seg) {
            // Pages are aligned, so that it is all one whether it is the guest's address or the host's.
            (Some(base), reg::ZERO, None) if address.disp & i32::from(plan.align) == 0 => {
                (base, place)
            }
            _ => {
                if place != Ea::at(RCX, 0) {
                    self.asm.lea(RCX, place);
                }
                (RCX, Ea::at(RCX, 0))
            }
        };
        self.asm.op(Code { bytes: true, ..Code::one(0xf6) }, 0, Rm::Reg(register)); // test, 8 bits
        self.asm.bytes(&[plan.align]);
        self.miss_if(5);
        place
    }

    /// Is the current op's operand known to be aligned to `mask`, or will be when it is done?
    fn is_aligned(&mut self, mask: u8) -> bool {
        let (slot, at) = match self.spans.role(self.current) {
            Role::Alone => return false,
            Role::Head { slot, .. } => (slot, 0),
            Role::Member { slot, at } => (slot, at),
        };
        let Some(known) = self.aligned.get_mut(usize::from(slot)) else { return false };
        if let Some((aligned, known_mask)) = *known
            && known_mask >= mask
            && (at - aligned) & i16::from(mask) == 0
        {
            return true;
        }
        *known = Some((at, mask));
        false
    }

    /// An access that is on its own: where it is. Destroys flags, rax and rdx.
    pub(super) fn probe(&mut self, address: &Address, wanted: Wanted) -> Ea {
        let at = self.linear(address, wanted.bytes);
        if is_stack(at) {
            return self.probe_stack(at, wanted, None);
        }
        self.probe_at(at, wanted)
    }

    /// The same for the linear address that `at` says.
    pub(super) fn probe_at(&mut self, at: Ea, wanted: Wanted) -> Ea {
        self.probe_to(at, last_byte(at, wanted.bytes), wanted.write);
        self.count(layout::COUNTED_TLB_HITS);
        let addend = Ea::at(RAX, TlbLayout::ENTRY_ADDEND);
        if at.base == Some(RCX) && self.spares_rdx {
            // An addition less before the address is there.
            self.asm.load(RDX, addend);
            return Ea { index: Some((RDX, 0)), ..at };
        }
        if at.base == Some(RCX) {
            self.asm.op(Code::wide(0x03), RCX, Rm::Mem(addend));
            return at;
        }
        self.asm.load(RCX, addend);
        Ea { index: Some((RCX, 0)), ..at }
    }

    /// Makes sure that the bytes from linear address `first` to `last`, less than two pages, lie in one that may be accessed. The
    /// address of its entry is in rax then.
    pub(super) fn probe_to(&mut self, first: Ea, last: Ea, write: bool) {
        let (jump, hit) = self.compare_tags(first, last, write);
        self.misses.push(Miss::Access { jump, hit });
    }

    /// The probe for 8 bytes that are pushed besides an op's own access.
    pub(super) fn probe_pushed(&mut self) -> Ea {
        self.probe(&Address::PUSHED, Wanted { bytes: 8, write: true })
    }

    /// The linear address of `address`, of which `bytes` bytes are of interest: a register of the guest's and a distance,
    /// or rcx. Destroys flags and rdx.
    fn linear(&mut self, address: &Address, bytes: u16) -> Ea {
        if let (Some(base), reg::ZERO, None) = (pinned(address.base), address.index, address.seg)
            && address.disp.checked_add(bytes.into()).is_some()
        {
            return Ea::at(base, address.disp);
        }
        self.linear_in_rcx(address)
    }

    /// The linear address of `address`, in rcx. Destroys flags and rdx.
    pub(super) fn linear_in_rcx(&mut self, address: &Address) -> Ea {
        let ea = self.offset(address);
        if ea != Ea::at(RCX, 0) {
            self.asm.lea(RCX, ea);
        }
        if let Some(seg) = address.seg {
            let base = layout::segment_base(seg);
            self.asm.op(Code::wide(0x03), RCX, Rm::Mem(Ea::cpu(base)));
        }
        Ea::at(RCX, 0)
    }

    /// Compares the tag of the entry for the page of `first`, whose address is in rax then, with the current
    /// context and the page of `last`: returns the jump to be taken if it differs, and where to go on if the other half's context
    /// fits after all. Keeps rcx.
    pub(super) fn compare_tags(
        &mut self,
        first: Ea,
        last: Ea,
        write: bool,
    ) -> (usize, Option<(usize, bool)>) {
        let tag = if write { TlbLayout::ENTRY_WRITE } else { TlbLayout::ENTRY_READ };
        self.asm.tlb_slot(first, self.tables.slot_mask, TABLE);
        self.asm.page_of(last);
        self.asm.op(Code::wide(0x33), RDX, Rm::Mem(Ea::at(RAX, tag)));
        let context = layout::context(write, usize::from(self.upper));
        self.asm.op(Code::wide(0x3b), RDX, Rm::Mem(Ea::cpu(context)));
        let jump = self.asm.jcc(5);
        (jump, self.upper.then_some((self.asm.here(), write)))
    }

    /// Compares the host page that code of the next page is fetched from with `next`: returns the jumps to be taken
    /// if it is another one, or none that the TLB knows.
    pub(super) fn compare_next_page(&mut self, next: u64) -> [usize; 2] {
        self.asm.load(RCX, Ea::cpu(layout::PAGE));
        self.asm.lea(RCX, Ea::at(RCX, 4096));
        self.asm.tlb_slot(Ea::at(RCX, 0), self.tables.slot_mask, TABLE);
        self.asm.mov(RDX, RCX);
        self.asm.op(Code::wide(0x33), RDX, Rm::Mem(Ea::at(RAX, TlbLayout::ENTRY_EXEC)));
        let context = layout::context(false, usize::from(self.upper));
        self.asm.op(Code::wide(0x3b), RDX, Rm::Mem(Ea::cpu(context)));
        let unknown = self.asm.jcc(5);
        self.asm.op(Code::wide(0x03), RCX, Rm::Mem(Ea::at(RAX, TlbLayout::ENTRY_ADDEND)));
        self.asm.mov_imm64(RDX, next);
        self.asm.op(Code::wide(0x39), RDX, Rm::Reg(RCX));
        [unknown, self.asm.jcc(5)]
    }

    /// The probe for a span: where it is in the host.
    fn probe_span(&mut self, span: SpanMiss) -> Ea {
        if is_stack(span.at) {
            return self.probe_stack(span.at, span.wanted, Some(span.slot));
        }
        let last = last_byte(span.at, span.wanted.bytes);
        let (jump, hit) = self.compare_tags(span.at, last, span.wanted.write);
        self.misses.push(Miss::Span { jump, hit, span });
        self.count(layout::COUNTED_TLB_HITS);
        let (addend, slot) = (Ea::at(RAX, TlbLayout::ENTRY_ADDEND), layout::span(span.slot));
        let in_rcx = span.at.base == Some(RCX);
        let copy = if in_rcx { RDX } else { RCX };
        self.asm.load(copy, addend);
        self.asm.store(Ea::cpu(slot), copy);
        if in_rcx {
            self.asm.op(Code::wide(0x01), RDX, Rm::Reg(RCX));
        }
        self.asm.is_copy(copy, slot);
        if in_rcx { span.at } else { Ea { index: Some((RCX, 0)), ..span.at } }
    }

    /// An access that goes by the probe in the field at `slot`. Keeps EFLAGS and rax.
    fn by_span(&mut self, address: &Address, slot: i32) -> Ea {
        let mut ea = self.offset(address);
        let own = |register: Option<u8>| register.is_none_or(|host| host != RCX && host != RDX);
        let index_is_own = own(ea.index.map(|(index, _)| index));
        if address.seg.is_none() && own(ea.base) && index_is_own {
            if ea.base.is_none() {
                return Ea { base: Some(self.addend(slot)), ..ea };
            }
            if ea.index.is_none() {
                return Ea { index: Some((self.addend(slot), 0)), ..ea };
            }
        }
        if !index_is_own {
            self.asm.lea(RCX, ea);
            ea = Ea::at(RCX, 0);
        }
        if let Some(seg) = address.seg {
            let segment = Ea::cpu(layout::segment_base(seg));
            if ea.base.is_none() {
                self.asm.load(RCX, segment);
            } else {
                self.asm.load(RDX, segment);
                self.asm.lea(RCX, Ea { base: ea.base, index: Some((RDX, 0)), disp: 0 });
            }
            ea.base = Some(RCX);
        }
        self.asm.copy_to(RDX, slot);
        self.asm.lea(RCX, Ea { base: ea.base, index: Some((RDX, 0)), disp: 0 });
        Ea { base: Some(RCX), ..ea }
    }

    /// What a span adds to addresses, from the field at `slot`, in rcx, or in rdx where the op does not need that.
    fn addend(&mut self, slot: i32) -> u8 {
        let register = match self.asm.copy_of(slot) {
            Some(RDX) if self.spares_rdx => RDX,
            // That of another span stays.
            None if self.spares_rdx && self.asm.copies[0].is_some() => RDX,
            _ => RCX,
        };
        self.asm.copy_to(register, slot);
        register
    }

    /// What happens if the probe of a span misses, behind the block: rax and rdx are what `compare_tags` leaves.
    ///
    /// Either the span does not lie in one page: then the block goes on without spans, from this op on. Or the
    /// translation is not there: the op's handler makes it, and this goes on. If it still does not do for the whole
    /// span (a store to come faults, or is watched), the block goes on without spans after the op.
    pub(super) fn span_miss(&mut self, op: usize, places: (u16, u16), span: SpanMiss) {
        let (start, end) = places;
        let slot = Ea::cpu(layout::span(span.slot));
        if span.at.base != Some(RCX) {
            self.asm.lea(RCX, span.at);
        }
        // The page's number changes between the first byte and the last one.
        self.asm.lea(RAX, last_byte(Ea::at(RCX, 0), span.wanted.bytes));
        self.asm.op(Code::one(0x31), RCX, Rm::Reg(RAX));
        self.asm.byte(0xa9); // test eax, -4096
        self.asm.imm32(-4096);
        let crosses = self.asm.jcc(5);
        self.asm.store(slot, RCX);
        self.call_op(op);
        self.asm.load(RCX, slot);
        let first = Ea::at(RCX, 0);
        let last = last_byte(first, span.wanted.bytes);
        let (mut jump, other) = self.compare_tags(first, last, span.wanted.write);
        if let Some((_, write)) = other {
            let over = self.asm.jmp();
            self.asm.land(jump);
            self.asm.op(Code::wide(0x3b), RDX, Rm::Mem(Ea::cpu(layout::context(write, 0))));
            jump = self.asm.jcc(5);
            self.asm.land(over);
        }
        self.asm.load(RDX, Ea::at(RAX, TlbLayout::ENTRY_ADDEND));
        self.asm.store(slot, RDX);
        let done = self.asm.jmp();
        self.asm.land(crosses);
        self.leave_spans(start);
        self.asm.land(jump);
        self.leave_spans(end);
        self.asm.land(done);
    }
}

/// The last of `bytes` bytes from `first` on.
pub(super) fn last_byte(first: Ea, bytes: u16) -> Ea {
    Ea { disp: first.disp.wrapping_add(i32::from(bytes) - 1), ..first }
}

/// The host register of a register of the guest's that has one.
fn pinned(register: u8) -> Option<u8> {
    if register < 16 { host_of(register) } else { None }
}
