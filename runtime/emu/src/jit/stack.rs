//! Accesses off the stack pointer: most of them are in the page that the last ones were in (J21).

use super::asm::host::{RAX, RCX, RDX};
use super::asm::{Code, Ea, Rm};
use super::layout::{self, GUEST_SP, PAGE_SIZE, STACK_ADDEND, STACK_CONTEXT, STACK_LINEAR};
use super::memory::last_byte;
use super::translate::{Miss, SpanMiss, Translator, Wanted};
use crate::mmu::TlbLayout;

/// A look at the stack's page that has failed.
#[derive(Debug, Clone, Copy)]
pub(super) struct StackMiss {
    jump: usize,
    at: Ea,
    wanted: Wanted,
    /// Of the span, if it is one.
    slot: Option<u8>,
    /// Where to go on with the addend in rcx.
    back: usize,
}

impl StackMiss {
    pub(super) fn span(&self) -> Option<SpanMiss> {
        Some(SpanMiss { slot: self.slot?, at: self.at, wanted: self.wanted })
    }
}

/// Is that off the stack pointer?
pub(super) fn is_stack(at: Ea) -> bool {
    at.base == Some(GUEST_SP) && at.index.is_none()
}

impl Translator {
    /// The probe for bytes off the stack pointer: where they are in the host. What is to be added is in rcx then, and in `slot`.
    pub(super) fn probe_stack(&mut self, at: Ea, wanted: Wanted, slot: Option<u8>) -> Ea {
        match at.disp {
            0 => self.asm.mov(RDX, GUEST_SP),
            _ => self.asm.lea(RDX, at),
        }
        self.asm.op(Code::wide(0x33), RDX, Rm::Mem(Ea::cpu(STACK_LINEAR))); // xor
        self.asm.op_digit(Code::wide(0x81), 7, Rm::Reg(RDX)); // cmp
        self.asm.imm32(PAGE_SIZE + 1 - i32::from(wanted.bytes));
        let jump = self.asm.jcc(3);
        self.count(layout::COUNTED_TLB_HITS);
        self.asm.load(RCX, Ea::cpu(STACK_ADDEND));
        let back = self.asm.here();
        self.misses.push(Miss::Stack(StackMiss { jump, at, wanted, slot, back }));
        if let Some(slot) = slot {
            self.asm.store(Ea::cpu(layout::span(slot)), RCX);
            self.asm.is_copy(RCX, layout::span(slot));
        }
        Ea { index: Some((RCX, 0)), ..at }
    }

    /// Looks into the TLB, behind the block. What may be written there is the stack's page from now on. Returns the jump to be
    /// taken if that misses as well, and where to go on if the other half's context fits.
    pub(super) fn stack_miss(&mut self, miss: StackMiss) -> (usize, Option<(usize, bool)>) {
        let StackMiss { jump, at, wanted, back, .. } = miss;
        self.asm.land(jump);
        let (jump, hit) = self.compare_tags(at, last_byte(at, wanted.bytes), wanted.write);
        if wanted.write {
            let context = Ea::cpu(layout::context(true, usize::from(self.upper)));
            self.asm.load(RCX, context);
            self.asm.store(Ea::cpu(STACK_CONTEXT), RCX);
            self.asm.op(Code::wide(0x33), RCX, Rm::Mem(Ea::at(RAX, TlbLayout::ENTRY_WRITE)));
            self.asm.store(Ea::cpu(STACK_LINEAR), RCX);
            self.asm.load(RCX, Ea::at(RAX, TlbLayout::ENTRY_ADDEND));
            self.asm.store(Ea::cpu(STACK_ADDEND), RCX);
            self.asm.jmp_to(back);
        }
        // Of the other half it is not the stack's page: its context is another one.
        let hit = hit.map(|_| (self.asm.here(), wanted.write));
        if hit.is_some() || !wanted.write {
            self.asm.load(RCX, Ea::at(RAX, TlbLayout::ENTRY_ADDEND));
            self.asm.jmp_to(back);
        }
        (jump, hit)
    }
}
