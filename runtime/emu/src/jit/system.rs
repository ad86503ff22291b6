//! Instructions of kernels, at level 0 and in their common case; everything else is the handlers'.

use super::asm::host::{RAX, RCX, RDX};
use super::asm::{Code, Ea, Rm};
use super::layout::{self, CC, GUEST_AX, GUEST_DX, GUEST_SP, SYSTEM_FLAGS};
use super::plan::{ALL, Flags, Plan};
use super::translate::{At, Translator};
use crate::cpu::seg;
use crate::flags::rflags;
use crate::op::Op;
use crate::sys::STI_LAST;

/// Which one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum System {
    ClearInterrupts,
    SetInterrupts,
    SwapGs,
    /// PUSHFQ.
    PushFlags,
}

impl Translator {
    pub(super) fn system(&mut self, op: &Op, plan: &Plan, system: System, live: Flags) {
        match system {
            System::ClearInterrupts => {
                self.keep_flags(live);
                self.at_level_0();
                self.change_flags(4, !(rflags::IF as i32));
            }
            // The look at interrupts comes after the next instruction, which is in another block.
            System::SetInterrupts if op.aux == STI_LAST => self.call(live),
            System::SetInterrupts => {
                self.keep_flags(live);
                self.at_level_0();
                self.compare_byte(layout::INTERRUPTS_HELD);
                self.miss_if(5);
                self.change_flags(1, rflags::IF as i32);
            }
            System::SwapGs => {
                self.keep_flags(live);
                self.at_level_0();
                let base = Ea::cpu(layout::segment_base(seg::GS as u8));
                let other = Ea::cpu(layout::KERNEL_GS_BASE);
                self.asm.load(RAX, base);
                self.asm.load(RDX, other);
                self.asm.store(base, RDX);
                self.asm.store(other, RAX);
            }
            System::PushFlags => {
                self.keep_flags(ALL);
                let place = self.access(op, plan, ALL);
                self.flags_image();
                self.asm.store(place, RDX);
                self.asm.lea(GUEST_SP, Ea::at(GUEST_SP, -8));
            }
        }
    }

    /// CMPXCHG16B, `code` with its prefixes.
    pub(super) fn compare_exchange_16(&mut self, op: &Op, plan: &Plan, code: Code, live: Flags) {
        self.keep_flags(live);
        let place = self.access(op, plan, live);
        self.asm.lea(RCX, place);
        self.need_flags(live);
        self.asm.mov(RAX, GUEST_AX);
        self.asm.mov(RDX, GUEST_DX);
        // It wants the guest's rcx in rcx.
        let swap = |this: &mut Self| {
            this.asm.op(Code::wide(0x87), RCX, Rm::Reg(layout::GUEST_CX));
        };
        swap(self);
        self.asm.op(code, 1, Rm::Mem(Ea::at(layout::GUEST_CX, 0)));
        swap(self);
        self.asm.mov(GUEST_AX, RAX);
        self.asm.mov(GUEST_DX, RDX);
        self.at = Some(At::Native);
    }

    /// RFLAGS as PUSHF shows them, in rdx. They are in memory. Destroys rax.
    fn flags_image(&mut self) {
        self.asm.op(Code { map: 1, ..Code::one(0xb7) }, RAX, Rm::Mem(Ea::cpu(CC))); // movzx eax, word
        self.asm.op(Code { map: 1, ..Code::one(0xb6) }, RDX, Rm::Reg(4)); // movzx edx, ah
        self.asm.bytes(&[0x81, 0xe2]); // and edx, arithmetic flags
        self.asm.imm32((rflags::ARITH & 0xff) as i32);
        self.asm.bytes(&[0x83, 0xe0, 1]); // and eax, 1
        self.asm.bytes(&[0xc1, 0xe0, rflags::OF.ilog2() as u8]); // shl eax, place of OF
        self.asm.op(Code::one(0x09), RAX, Rm::Reg(RDX)); // or edx, eax
        self.asm.op(Code::one(0x8b), RAX, Rm::Mem(Ea::cpu(SYSTEM_FLAGS)));
        self.asm.byte(0x25); // and eax, all but RF and VM
        self.asm.imm32(!((rflags::RF | rflags::VM) as i32));
        self.asm.op(Code::one(0x09), RAX, Rm::Reg(RDX));
    }

    /// Elsewhere than at level 0 the handler looks what may be done.
    fn at_level_0(&mut self) {
        self.compare_byte(layout::LEVEL);
        self.miss_if(5);
    }

    /// `cmp byte [field], 0`
    fn compare_byte(&mut self, field: i32) {
        self.asm.op(Code::one(0x80), 7, Rm::Mem(Ea::cpu(field)));
        self.asm.bytes(&[0]);
    }

    /// AND (4) or OR (1) of the flags that are not arithmetic.
    fn change_flags(&mut self, digit: u8, value: i32) {
        self.asm.op(Code::one(0x81), digit, Rm::Mem(Ea::cpu(SYSTEM_FLAGS)));
        self.asm.imm32(value);
    }
}
