//! Memory operands: addresses, and the TLB probe before each access.

use super::asm::host::{RAX, RCX, RDX};
use super::asm::{Code, Ea, Rm};
use super::layout::{self, TABLE};
use super::plan::Mem;
use super::translate::Translator;
use crate::mmu::TlbLayout;
use crate::op::{Op, op_flags, reg};

impl Translator {
    /// The offset of an op's memory operand as an address of the host. Destroys rcx and rdx, no flags.
    pub(super) fn address(&mut self, op: &Op) -> Ea {
        let base = match op.base {
            reg::ZERO => None,
            reg::BLOCK => {
                self.asm.load(RCX, Ea::cpu(layout::PAGE));
                Some(RCX)
            }
            guest => Some(self.source(guest, RCX)),
        };
        let index = match op.index {
            reg::ZERO => None,
            guest => Some((self.source(guest, RDX), op.scale)),
        };
        // Plans are made for operands whose displacement fits.
        Ea { base, index, disp: op.disp as i32 }
    }

    /// Checks the access to an op's memory operand: its host address is in rcx then. Destroys flags, rax and rdx.
    pub(super) fn probe(&mut self, op: &Op, mem: Mem, size: u8) {
        let ea = self.address(op);
        match ea {
            Ea { base: Some(base), index: None, disp: 0 } => {
                if base != RCX {
                    self.asm.mov(RCX, base);
                }
            }
            _ => self.asm.lea(RCX, ea),
        }
        if op.flags & op_flags::SEG != 0 {
            let base = layout::segment_base(op.seg);
            self.asm.op(Code::wide(0x03), RCX, Rm::Mem(Ea::cpu(base)));
        }
        self.probe_at(mem, size);
    }

    /// The same for the address in rcx.
    pub(super) fn probe_at(&mut self, mem: Mem, size: u8) {
        let write = mem == Mem::Write;
        let tag = if write { TlbLayout::ENTRY_WRITE } else { TlbLayout::ENTRY_READ };
        self.asm.tlb_slot(TlbLayout::SLOT_MASK, TABLE);
        self.asm.last_page(size);
        self.asm.op(Code::wide(0x33), RDX, Rm::Mem(Ea::at(RAX, tag)));
        let context = layout::context(write, usize::from(self.upper));
        self.asm.op(Code::wide(0x3b), RDX, Rm::Mem(Ea::cpu(context)));
        self.miss_unless_other(write);
        self.count(layout::COUNTED_TLB_HITS);
        self.asm.op(Code::wide(0x03), RCX, Rm::Mem(Ea::at(RAX, TlbLayout::ENTRY_ADDEND)));
    }
}
