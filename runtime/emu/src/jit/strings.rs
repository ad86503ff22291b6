//! Accesses whose length or place is a matter of what is in a register: STOS, and bits of strings.

use super::asm::host::{RAX, RCX, RDI, RDX};
use super::asm::{Code, Ea, Rm};
use super::layout::{GUEST_AX, GUEST_CX, PAGE_SIZE, SYSTEM_FLAGS};
use super::plan::{Flags, Mem, Plan};
use super::spans::Address;
use super::translate::{At, Translator, Wanted};
use crate::flags::rflags;
use crate::mmu::TlbLayout;
use crate::op::Op;

impl Translator {
    /// STOS of elements of `size` bytes, upwards, and if it is `repeated` within one page; all else is the handler's.
    pub(super) fn fill(&mut self, op: &Op, plan: &Plan, repeated: bool, live: Flags) {
        let size = plan.size;
        self.keep_flags(live);
        self.asm.op(Code::one(0xf7), 0, Rm::Mem(Ea::cpu(SYSTEM_FLAGS))); // test
        self.asm.imm32(rflags::DF as i32);
        self.miss_if(5);
        if !repeated {
            let place = self.access(op, plan, live);
            let store = if size == 1 { Code::one(0x88) } else { Code::sized(0x89, size) };
            self.asm.op(Code { bytes: size == 1, ..store }, GUEST_AX, Rm::Mem(place));
            self.asm.lea(RDI, Ea::at(RDI, size.into()));
            return;
        }
        // None are none of ours, either.
        self.asm.lea(RAX, Ea::at(GUEST_CX, -1));
        self.asm.byte(0x48);
        self.asm.byte(0x3d); // cmp rax, elements of a page
        self.asm.imm32(PAGE_SIZE / i32::from(size));
        self.miss_if(3);
        let last =
            Ea { base: Some(RDI), index: Some((GUEST_CX, size.trailing_zeros() as u8)), disp: -1 };
        self.probe_to(Ea::at(RDI, 0), last, true);
        self.asm.load(RDX, Ea::at(RAX, TlbLayout::ENTRY_ADDEND));
        self.asm.mov(RCX, GUEST_CX);
        self.asm.mov(RAX, GUEST_AX);
        self.asm.op(Code::wide(0x01), RDX, Rm::Reg(RDI)); // add
        self.asm.bytes(match size {
            1 => &[0xf3, 0xaa],
            2 => &[0x66, 0xf3, 0xab],
            4 => &[0xf3, 0xab],
            _ => &[0xf3, 0x48, 0xab],
        });
        self.asm.op(Code::wide(0x29), RDX, Rm::Reg(RDI)); // sub
        self.asm.op(Code::one(0x31), GUEST_CX, Rm::Reg(GUEST_CX)); // xor
    }

    /// BT, BTS, BTR or BTC (`code`) of the bit in memory that `register` says, which may be far from the operand.
    pub(super) fn bit_string(
        &mut self,
        op: &Op,
        plan: &Plan,
        code: Code,
        register: u8,
        live: Flags,
    ) {
        let wide = plan.size == 8;
        self.keep_flags(live);
        self.linear_in_rcx(&Address::of_operand(op));
        let number = self.source(register, RDX);
        // Of signed numbers of elements: movsxd, or mov; sar.
        self.asm.op(Code::wide(if wide { 0x8b } else { 0x63 }), RDX, Rm::Reg(number));
        self.asm.op(Code::wide(0xc1), 7, Rm::Reg(RDX));
        self.asm.byte(if wide { 6 } else { 5 });
        let element = (RDX, plan.size.trailing_zeros() as u8);
        self.asm.lea(RCX, Ea { base: Some(RCX), index: Some(element), disp: 0 });
        let wanted = Wanted { bytes: plan.size.into(), write: plan.mem == Mem::Write };
        let place = self.probe_at(Ea::at(RCX, 0), wanted);
        let number = self.source(register, RDX);
        self.asm.mov32(RDX, number);
        self.asm.op(Code::one(0x83), 4, Rm::Reg(RDX)); // and
        self.asm.byte(if wide { 63 } else { 31 });
        self.need_flags(live);
        self.asm.op(code, RDX, Rm::Mem(place));
        self.at = Some(At::Native);
    }
}
