//! Instructions with the host's registers, or the places of the guest's in memory, in the place of the guest's registers.

use super::asm::host::{RAX, RCX, RDX};
use super::asm::{Code, Ea, Rm};
use super::layout::{self, GUEST_AX, GUEST_CX, GUEST_DX, host_of};
use super::plan::{Field, Flags, Mem, Operand, Plan};
use super::translate::Translator;
use crate::op::Op;

/// An instruction with its operands.
#[derive(Clone, Copy)]
pub(super) struct Form {
    pub code: Code,
    pub field: Field,
    pub operand: Operand,
}

impl Translator {
    /// The host register that holds guest register `guest` for reading: its own, or `scratch`.
    pub(super) fn source(&mut self, guest: u8, scratch: u8) -> u8 {
        host_of(guest).unwrap_or_else(|| {
            self.asm.load(scratch, Ea::cpu(layout::gpr(guest)));
            scratch
        })
    }

    /// Stores `host` if `guest` is not in a register of its own.
    pub(super) fn put(&mut self, guest: u8, host: u8) {
        if host_of(guest).is_none() {
            self.asm.store(Ea::cpu(layout::gpr(guest)), host);
        }
    }

    fn field(&mut self, field: Field, scratch: u8) -> u8 {
        match field {
            Field::Digit(digit) => digit,
            Field::Reg(guest, true, _) => self.source(guest, scratch),
            Field::Reg(guest, false, _) => host_of(guest).unwrap_or(scratch),
            Field::High(guest, _) => {
                let part = self.high(guest);
                self.asm.op(Code { map: 1, ..Code::one(0xb6) }, scratch, Rm::Mem(part));
                scratch
            }
        }
    }

    /// Where the second byte of a register of the guest's is, in its place in memory, which is brought up to date.
    pub(super) fn high(&mut self, guest: u8) -> Ea {
        let home = layout::gpr(guest);
        if let Some(host) = host_of(guest) {
            self.asm.store(Ea::cpu(home), host);
        }
        Ea::cpu(home + 1)
    }

    /// Takes a register back from its place in memory.
    pub(super) fn take_back(&mut self, guest: u8) {
        if let Some(host) = host_of(guest) {
            self.asm.load(host, Ea::cpu(layout::gpr(guest)));
        }
    }

    fn operand(&mut self, operand: Operand, scratch: u8, place: Ea) -> Rm {
        match operand {
            Operand::Reg(guest, true, _) => Rm::Reg(self.source(guest, scratch)),
            Operand::Reg(guest, false, _) => Rm::Reg(host_of(guest).unwrap_or(scratch)),
            Operand::High(guest, _) => Rm::Mem(self.high(guest)),
            Operand::Mem => Rm::Mem(place),
        }
    }

    /// Where the memory operand is, if there is one.
    pub(super) fn place(&mut self, op: &Op, plan: &Plan, live: Flags) -> Ea {
        if plan.mem == Mem::None { Ea::at(RCX, 0) } else { self.access(op, plan, live) }
    }

    fn put_back(&mut self, field: Field, reg: u8, operand: Operand, rm: Rm) {
        match field {
            Field::Reg(guest, _, true) => self.put(guest, reg),
            Field::High(guest, true) => {
                let part = self.high(guest);
                self.asm.op(Code { bytes: true, ..Code::one(0x88) }, reg, Rm::Mem(part));
                self.take_back(guest);
            }
            _ => {}
        }
        match (operand, rm) {
            (Operand::Reg(guest, _, true), Rm::Reg(host)) => self.put(guest, host),
            (Operand::High(guest, true), _) => self.take_back(guest),
            _ => {}
        }
    }

    pub(super) fn copy(&mut self, plan: &Plan, form: Form, place: Ea, imm: &[u8]) {
        let Form { code, field, operand } = form;
        if let Some((code, reg, rm)) = self.at_home(plan, form) {
            self.emit(code, field, reg, rm);
            self.asm.bytes(imm);
            return self.put_back(field, reg, operand, rm);
        }
        // One register of the guest in two scratch registers would come apart if it is written.
        let same = match (field, operand) {
            (Field::Reg(a, ..), Operand::Reg(b, ..)) => a == b && host_of(a).is_none(),
            _ => false,
        };
        let rm = self.operand(operand, RAX, place);
        let reg = match rm {
            Rm::Reg(rm) if same => {
                if let (Operand::Reg(guest, false, _), Field::Reg(_, true, _)) = (operand, field) {
                    self.asm.load(rm, Ea::cpu(layout::gpr(guest)));
                }
                rm
            }
            _ => self.field(field, RDX),
        };
        self.emit(code, field, reg, rm);
        self.asm.bytes(imm);
        self.put_back(field, reg, operand, rm);
    }

    fn emit(&mut self, code: Code, field: Field, reg: u8, rm: Rm) {
        match field {
            Field::Digit(digit) => self.asm.op_digit(code, digit, rm),
            _ => self.asm.op(code, reg, rm),
        }
    }

    /// An instruction between registers of the guest's one of which is in memory, as one that accesses it there, if there is
    /// such a form: its opcode and operands.
    fn at_home(&mut self, plan: &Plan, form: Form) -> Option<(Code, u8, Rm)> {
        let Form { code, field, operand } = form;
        let Operand::Reg(guest, _, written) = operand else { return None };
        let home = |guest| Rm::Mem(Ea::cpu(layout::gpr(guest)));
        match (host_of(guest), field) {
            // The low half of a register that is written clears the other one.
            (None, _) if written && plan.size == 4 || plan.size == 0 => None,
            (None, Field::Reg(other, ..)) if other == guest => None,
            (None, Field::High(..)) => None,
            (None, _) if code.may_access_memory() => {
                let reg = self.field(field, RDX);
                Some((code, reg, home(guest)))
            }
            (Some(host), Field::Reg(other, true, false)) if host_of(other).is_none() => {
                Some((code.with_operands_swapped()?, host, home(other)))
            }
            _ => None,
        }
    }

    pub(super) fn by_cl(&mut self, code: Code, field: Field, operand: Operand, place: Ea) {
        if operand == Operand::Mem {
            self.asm.lea(RDX, place);
        }
        self.asm.mov32(RCX, GUEST_CX);
        let rm = self.operand(operand, RAX, Ea::at(RDX, 0));
        // With a register in the field, the operand is none in memory.
        let same = match (field, operand) {
            (Field::Reg(a, ..), Operand::Reg(b, ..)) => a == b,
            _ => false,
        };
        let reg = match rm {
            Rm::Reg(rm) if same => rm,
            _ => self.field(field, RDX),
        };
        self.asm.op(code, reg, rm);
        self.put_back(field, reg, operand, rm);
    }

    pub(super) fn mov_imm(&mut self, register: u8, value: u64) {
        let target = host_of(register).unwrap_or(RDX);
        if let Ok(value) = u32::try_from(value) {
            if target >= 8 {
                self.asm.bytes(&[0x41]);
            }
            self.asm.bytes(&[0xb8 | target & 7]);
            self.asm.bytes(&value.to_le_bytes());
        } else {
            self.asm.mov_imm64(target, value);
        }
        self.put(register, target);
    }

    pub(super) fn lea(&mut self, op: &Op, register: u8, size: u8) {
        let target = host_of(register).unwrap_or(RDX);
        let ea = self.address(op);
        self.asm.op(Code::sized(0x8d, size), target, Rm::Mem(ea));
        self.put(register, target);
    }

    /// The operand of a multiplication or division: in memory, or in a register that is not rax or rdx.
    pub(super) fn wide_operand(
        &mut self,
        op: &Op,
        plan: &Plan,
        live: Flags,
        operand: Operand,
    ) -> Rm {
        match operand {
            Operand::Mem => Rm::Mem(self.access(op, plan, live)),
            Operand::Reg(guest, ..) => Rm::Reg(self.source(guest, RCX)),
            Operand::High(guest, _) => Rm::Mem(self.high(guest)),
        }
    }

    /// Divides by rcx, where that cannot fault; everything else is the handler's (J3). Flags are saved.
    pub(super) fn divide(&mut self, size: u8, signed: bool) {
        let code = |op| Code::sized(op, size);
        if signed {
            // The dividend is the accumulator sign-extended, the divisor neither 0 nor -1.
            self.asm.op(code(0x8b), RDX, Rm::Reg(GUEST_AX));
            self.asm.op(code(0xc1), 7, Rm::Reg(RDX));
            self.asm.bytes(&[if size == 8 { 63 } else { 31 }]);
            self.asm.op(code(0x39), GUEST_DX, Rm::Reg(RDX));
            self.miss_if(5);
            self.asm.op(code(0x8d), RAX, Rm::Mem(Ea::at(RCX, 1)));
            self.asm.op(code(0x83), 7, Rm::Reg(RAX));
            self.asm.bytes(&[1]);
            self.miss_if(6);
            self.asm.mov(RAX, GUEST_AX);
        } else {
            // The high half is below the divisor, which is not 0 then.
            self.asm.op(code(0x39), RCX, Rm::Reg(GUEST_DX));
            self.miss_if(3);
            self.asm.mov(RAX, GUEST_AX);
            self.asm.mov(RDX, GUEST_DX);
        }
        self.asm.op(code(0xf7), if signed { 7 } else { 6 }, Rm::Reg(RCX));
        self.asm.mov(GUEST_AX, RAX);
        self.asm.mov(GUEST_DX, RDX);
    }
}
