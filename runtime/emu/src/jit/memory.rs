//! Memory operands: addresses, and the TLB probe before an access or a span of them.

use super::asm::host::{RAX, RCX, RDX};
use super::asm::{Code, Ea, Rm};
use super::layout::{self, TABLE, host_of};
use super::plan::{Flags, Mem, Plan};
use super::spans::{Address, Role};
use super::translate::{Miss, SpanMiss, Translator};
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

    /// The access of an op whose plan says `plan`: returns where it is in the host, by rcx and perhaps by a register of
    /// the guest's. Flags that are `live` are kept in memory if they must be; destroys rax, rdx and, if there is
    /// a probe, EFLAGS.
    pub(super) fn access(&mut self, op: &Op, plan: &Plan, live: Flags) -> Ea {
        let address = Address::of(op, plan);
        match self.spans.role(self.current) {
            Role::Member { slot, .. } => self.by_span(&address, slot),
            Role::Head { slot, low, bytes, write } => {
                self.aligned[usize::from(slot)] = None;
                self.keep_flags(live);
                let disp = address.disp.wrapping_add(low.into());
                self.linear(&Address { disp, ..address });
                let span = SpanMiss { slot, bytes, write };
                self.probe_span(span);
                Ea::at(RCX, -i32::from(low))
            }
            Role::Alone => {
                self.keep_flags(live);
                self.probe(&address, plan.mem, plan.size)
            }
        }
    }

    /// An access that is on its own. Destroys flags, rax and rdx.
    pub(super) fn probe(&mut self, address: &Address, mem: Mem, size: u8) -> Ea {
        self.linear(address);
        let write = mem == Mem::Write;
        let hit = self.compare_tags(write, size.into());
        self.misses.push(Miss::Access { jump: hit.0, hit: hit.1 });
        self.count(layout::COUNTED_TLB_HITS);
        self.asm.op(Code::wide(0x03), RCX, Rm::Mem(Ea::at(RAX, TlbLayout::ENTRY_ADDEND)));
        Ea::at(RCX, 0)
    }

    /// The linear address of `address`, in rcx. Destroys flags and rdx.
    fn linear(&mut self, address: &Address) {
        match self.offset(address) {
            Ea { base: Some(base), index: None, disp: 0 } => {
                if base != RCX {
                    self.asm.mov(RCX, base);
                }
            }
            ea => self.asm.lea(RCX, ea),
        }
        if let Some(seg) = address.seg {
            let base = layout::segment_base(seg);
            self.asm.op(Code::wide(0x03), RCX, Rm::Mem(Ea::cpu(base)));
        }
    }

    /// Compares the tag of the entry for `bytes` bytes at rcx, whose address is in rax then, with the current
    /// context: returns the jump to be taken if it differs, and where to go on if the other half's context
    /// fits after all.
    fn compare_tags(&mut self, write: bool, bytes: i32) -> (usize, Option<(usize, bool)>) {
        let tag = if write { TlbLayout::ENTRY_WRITE } else { TlbLayout::ENTRY_READ };
        self.asm.tlb_slot(self.tables.slot_mask, TABLE);
        self.asm.last_page(bytes);
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
        self.asm.tlb_slot(self.tables.slot_mask, TABLE);
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

    /// The probe for a span that starts at rcx. Its host address is in rcx then.
    fn probe_span(&mut self, span: SpanMiss) {
        let (jump, hit) = self.compare_tags(span.write, span.bytes.into());
        self.misses.push(Miss::Span { jump, hit, span });
        self.count(layout::COUNTED_TLB_HITS);
        self.asm.load(RDX, Ea::at(RAX, TlbLayout::ENTRY_ADDEND));
        self.asm.store(Ea::cpu(layout::span(span.slot)), RDX);
        self.asm.op(Code::wide(0x01), RDX, Rm::Reg(RCX));
        self.asm.is_copy(RDX, layout::span(span.slot));
    }

    /// An access that goes by the probe in `slot`. Keeps EFLAGS and rax.
    fn by_span(&mut self, address: &Address, slot: u8) -> Ea {
        let slot = layout::span(slot);
        if let (Some(base), reg::ZERO, None) = (pinned(address.base), address.index, address.seg) {
            self.asm.copy_to(RCX, slot);
            return Ea { base: Some(base), index: Some((RCX, 0)), disp: address.disp };
        }
        let ea = self.offset(address);
        self.asm.lea(RCX, ea);
        if let Some(seg) = address.seg {
            self.asm.load(RDX, Ea::cpu(layout::segment_base(seg)));
            self.asm.lea(RCX, Ea { base: Some(RCX), index: Some((RDX, 0)), disp: 0 });
        }
        self.asm.copy_to(RDX, slot);
        self.asm.lea(RCX, Ea { base: Some(RCX), index: Some((RDX, 0)), disp: 0 });
        Ea::at(RCX, 0)
    }

    /// What happens if the probe of a span misses, behind the block: rcx is the span's first byte, and rax and
    /// rdx are what `compare_tags` leaves.
    ///
    /// Either the span does not lie in one page: then the block goes on without spans, from this op on. Or the
    /// translation is not there: the op's handler makes it, and this goes on. If it still does not do for the whole
    /// span (a store to come faults, or is watched), the block goes on without spans after the op.
    pub(super) fn span_miss(&mut self, op: usize, places: (u16, u16), span: SpanMiss) {
        let (start, end) = places;
        let slot = Ea::cpu(layout::span(span.slot));
        // The page's number changes between the first byte and the last one.
        self.asm.lea(RAX, Ea::at(RCX, i32::from(span.bytes) - 1));
        self.asm.op(Code::one(0x31), RCX, Rm::Reg(RAX));
        self.asm.code.push(0xa9); // test eax, -4096
        self.asm.imm32(-4096);
        let crosses = self.asm.jcc(5);
        self.asm.store(slot, RCX);
        self.call_op(op);
        self.asm.load(RCX, slot);
        let (mut jump, other) = self.compare_tags(span.write, span.bytes.into());
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

/// The host register of a register of the guest's that has one.
fn pinned(register: u8) -> Option<u8> {
    if register < 16 { host_of(register) } else { None }
}
