//! What is done with each instruction, and what it does to the flags.

use super::asm::Code;
use super::raw::Raw;
use super::system::System;
use super::vector;
use crate::host::inline::Inline;
use crate::op::{Op, op_flags, reg};

/// A set of arithmetic flags.
pub type Flags = u8;
pub const CF: Flags = 1;
pub const PF: Flags = 2;
pub const ZF: Flags = 8; // AF, 4, is never told apart
pub const SF: Flags = 16;
pub const OF: Flags = 32;
pub const ALL: Flags = 63;

/// How memory is accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mem {
    None,
    Read,
    Write,
}

/// A register operand in the ModRM's register field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    /// An opcode extension.
    Digit(u8),
    /// Guest register: read, written.
    Reg(u8, bool, bool),
    /// AH, CH, DH or BH, by the number of the register it is part of; written.
    High(u8, bool),
}

/// The r/m operand of a copied instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operand {
    /// Guest register: read, written.
    Reg(u8, bool, bool),
    /// AH, CH, DH or BH, by the number of the register it is part of; written.
    High(u8, bool),
    Mem,
}

impl Field {
    /// The register, and whether it is written.
    pub fn register(self) -> Option<(u8, bool)> {
        match self {
            Self::Digit(_) => None,
            Self::Reg(register, _, written) | Self::High(register, written) => {
                Some((register, written))
            }
        }
    }
}

impl Operand {
    /// The register, and whether it is written.
    pub fn register(self) -> Option<(u8, bool)> {
        match self {
            Self::Mem => None,
            Self::Reg(register, _, written) | Self::High(register, written) => {
                Some((register, written))
            }
        }
    }
}

/// Kinds of translation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// By the interpreter's handler.
    Call,
    Nop,
    /// The instruction with other registers; so many bytes of immediate are copied.
    Copy {
        code: Code,
        field: Field,
        operand: Operand,
        imm: u8,
    },
    /// The same, with a count in CL.
    ByCl {
        code: Code,
        field: Field,
        operand: Operand,
    },
    /// An instruction of one byte that works on flags alone.
    Flag(u8),
    /// SAHF, and LAHF.
    FlagsOfAh,
    AhOfFlags,
    MovImm {
        register: u8,
    },
    Lea {
        register: u8,
        size: u8,
    },
    /// CDQE and CWDE; CQO and CDQ.
    Extend {
        wide: bool,
    },
    Sign {
        wide: bool,
    },
    Push {
        register: Option<u8>,
    },
    /// The access of the plan is the one of the operand.
    PushMemory,
    Pop {
        register: u8,
    },
    Leave,
    /// CMPXCHG with memory.
    CompareExchange {
        code: Code,
        register: u8,
    },
    /// MUL, IMUL (`signed`) to two registers, of 4 or 8 bytes.
    Multiply {
        operand: Operand,
        size: u8,
        signed: bool,
    },
    Divide {
        operand: Operand,
        size: u8,
        signed: bool,
    },
    /// CMPXCHG16B.
    CompareExchange16 {
        code: Code,
    },
    System(System),
    /// STOS, with a prefix or without.
    Fill {
        repeated: bool,
    },
    /// BT and its like with memory and a number in a register.
    BitString {
        code: Code,
        register: u8,
    },
    /// A vector instruction in place.
    Vector,
    /// Transfers.
    Jump,
    Branch {
        condition: u8,
    },
    CallNear,
    JumpIndirect {
        register: Option<u8>,
    },
    CallIndirect {
        register: Option<u8>,
    },
    Return,
}

/// What is done with an instruction.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub kind: Kind,
    pub mem: Mem,
    /// Bytes of the memory operand.
    pub size: u8,
    /// Bits of its address that must be zero: otherwise the instruction faults.
    pub align: u8,
    pub reads: Flags,
    /// Written whatever the operands are.
    pub kills: Flags,
    /// EFLAGS are those of the guest afterwards, not only left alone or destroyed.
    pub sets: bool,
    pub opcode: u32,
}

impl Plan {
    /// Flags that must be right while the instruction runs, if `after` must be afterwards.
    pub fn live(&self, after: Flags) -> Flags {
        self.reads | after & !self.kills
    }

    /// A transfer of control, which ends the block, or a round of it.
    pub fn transfers(&self) -> bool {
        matches!(
            self.kind,
            Kind::Jump
                | Kind::Branch { .. }
                | Kind::CallNear
                | Kind::JumpIndirect { .. }
                | Kind::CallIndirect { .. }
                | Kind::Return
        )
    }
}

const CALL: Plan = Plan {
    kind: Kind::Call,
    mem: Mem::None,
    size: 0,
    align: 0,
    reads: ALL,
    kills: 0,
    sets: false,
    opcode: OTHER,
};
/// Where instructions without a legacy encoding are counted.
const OTHER: u32 = 0x3ff;

/// Memory operands that the translator does not address by itself.
const ODD: u8 = op_flags::ADDR32 | op_flags::ADDR16 | op_flags::LEGACY;

/// The plan for the instruction `bytes`, decoded as `op`, if it is a valid one. `inline`: it is a vector instruction.
pub fn plan(bytes: &[u8], op: &Op, valid: bool, inline: Option<&Inline>) -> Plan {
    let raw = Raw::parse(bytes);
    if let Some(inline) = inline {
        let plan = vector::plan(inline, raw.map_or(OTHER, |raw| raw.number()));
        let reachable = plan.mem == Mem::None || op.flags & ODD == 0 && fits(op);
        return if reachable { plan } else { Plan { opcode: plan.opcode, ..CALL } };
    }
    let Some(raw) = raw else { return CALL };
    let call = Plan { opcode: raw.number(), ..CALL };
    let plan = match raw.map {
        _ if !valid => None,
        0 => one_byte(&raw),
        _ => two_bytes(&raw),
    };
    let Some(mut plan) = plan else { return call };
    refine(&mut plan, bytes, raw.size_by_bit());
    let addresses =
        plan.mem != Mem::None && !implicit(&plan.kind) || matches!(plan.kind, Kind::Lea { .. });
    if addresses && (op.flags & ODD != 0 || !fits(op)) || raw.lock && !may_lock(&plan) {
        return call;
    }
    Plan { opcode: raw.number(), ..plan }
}

/// Operands of the stack, at most.
fn implicit(kind: &Kind) -> bool {
    matches!(
        kind,
        Kind::Push { .. }
            | Kind::Pop { .. }
            | Kind::System(_)
            | Kind::Leave
            | Kind::CallNear
            | Kind::Return
            | Kind::CallIndirect { register: Some(_) }
    )
}

fn may_lock(plan: &Plan) -> bool {
    plan.mem == Mem::Write
        && matches!(
            plan.kind,
            Kind::Copy { .. }
                | Kind::CompareExchange { .. }
                | Kind::CompareExchange16 { .. }
                | Kind::BitString { .. }
        )
}

/// The displacement, relative to the page for RIP-relative operands, fits an instruction.
fn fits(op: &Op) -> bool {
    i32::try_from(op.disp).is_ok() && op.base <= reg::BLOCK
}

fn native(kind: Kind) -> Plan {
    Plan { kind, mem: Mem::None, size: 0, align: 0, reads: 0, kills: 0, sets: false, opcode: 0 }
}

/// What an instruction does with its r/m operand.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    Read,
    Write,
    Both,
}

impl Raw {
    fn code(&self, size: u8) -> Code {
        Code {
            lock: self.lock,
            p66: size == 2,
            rep: 0,
            wide: size == 8,
            map: self.map,
            op: self.op,
            bytes: size == 1,
        }
    }

    /// A register of 8 bits that has no place in host registers of 8 bits.
    fn high(&self, size: u8, register: u8) -> bool {
        size == 1 && self.is_high(register)
    }

    /// A copied instruction of operand size `size` whose r/m operand has `rm_size` bytes.
    fn copy(&self, field: Field, rm: Use, size: u8, rm_size: u8, imm: u8) -> Option<Plan> {
        let field = match field {
            Field::Reg(register, _, written) if self.high(size, register) => {
                Field::High(register - 4, written)
            }
            field => field,
        };
        let code = Code { bytes: size == 1 || rm_size == 1, ..self.code(size) };
        let (operand, mem) = match self.rm() {
            Some(register) if self.high(rm_size, register) => {
                (Operand::High(register - 4, rm != Use::Read), Mem::None)
            }
            _ => self.operand(rm, rm_size)?,
        };
        // Two parts of one register that are both written would undo each other.
        if let (Some((a, true)), Some((b, true))) = (field.register(), operand.register())
            && a == b
            && (matches!(field, Field::High(..)) || matches!(operand, Operand::High(..)))
        {
            return None;
        }
        let kind = Kind::Copy { code, field, operand, imm };
        Some(Plan { mem, size: rm_size, ..native(kind) })
    }

    fn operand(&self, rm: Use, size: u8) -> Option<(Operand, Mem)> {
        match self.rm() {
            Some(register) if self.high(size, register) => None,
            // Parts of a register are merged with the rest of it.
            Some(register) => Some((
                Operand::Reg(register, rm != Use::Write || size < 4, rm != Use::Read),
                Mem::None,
            )),
            None if rm == Use::Read => Some((Operand::Mem, Mem::Read)),
            None => Some((Operand::Mem, Mem::Write)),
        }
    }

    fn reg_read(&self) -> Field {
        Field::Reg(self.reg(), true, false)
    }
    fn reg_written(&self, size: u8) -> Field {
        Field::Reg(self.reg(), size < 4, true)
    }
    fn reg_both(&self) -> Field {
        Field::Reg(self.reg(), true, true)
    }
    fn size_by_bit(&self) -> u8 {
        if self.op & 1 == 0 { 1 } else { self.size() }
    }
}

fn imm_size(size: u8) -> u8 {
    size.min(4)
}

/// Flags of the operation with this number in the first opcodes and in group 1.
fn alu_flags(plan: Plan, digit: u8) -> Plan {
    let reads = if digit == 2 || digit == 3 { CF } else { 0 };
    Plan { reads, kills: ALL, sets: true, ..plan }
}

fn alu_use(digit: u8) -> Use {
    if digit == 7 { Use::Read } else { Use::Both }
}

/// Flags of a shift by `count`. What is undefined counts as kept, since the host decides.
fn shift_flags(plan: Plan, digit: u8, count: Option<u8>) -> Plan {
    let reads = if digit == 2 || digit == 3 { CF } else { 0 };
    let overflow = if count == Some(1) { OF } else { 0 };
    let kills = match (count, digit) {
        (None | Some(0), _) => 0,
        (_, 0..=3) => CF | overflow,
        _ => CF | PF | ZF | SF | overflow,
    };
    Plan { reads, kills, sets: true, ..plan }
}

fn one_byte(raw: &Raw) -> Option<Plan> {
    let op = raw.op;
    let size = raw.size();
    let by_bit = raw.size_by_bit();
    let string_prefix = raw.rep != 0;
    Some(match op {
        0x00..=0x3f if op & 7 < 4 => {
            let digit = op >> 3;
            let to_rm = op & 2 == 0;
            let plan = if to_rm {
                raw.copy(raw.reg_read(), alu_use(digit), by_bit, by_bit, 0)?
            } else {
                let field = if digit == 7 { raw.reg_read() } else { raw.reg_both() };
                raw.copy(field, Use::Read, by_bit, by_bit, 0)?
            };
            alu_flags(plan, digit)
        }
        // The accumulator and an immediate: as group 1.
        0x00..=0x3f if op & 7 < 6 => {
            let digit = op >> 3;
            let code = Code { op: if by_bit == 1 { 0x80 } else { 0x81 }, ..raw.code(by_bit) };
            let operand = Operand::Reg(0, true, digit != 7);
            let imm = imm_size(by_bit);
            alu_flags(native(Kind::Copy { code, field: Field::Digit(digit), operand, imm }), digit)
        }
        0x50..=0x57 if !raw.p66 => {
            Plan { mem: Mem::Write, size: 8, ..native(Kind::Push { register: Some(raw.low()) }) }
        }
        0x58..=0x5f if !raw.p66 => {
            Plan { mem: Mem::Read, size: 8, ..native(Kind::Pop { register: raw.low() }) }
        }
        0x63 if !raw.p66 => raw.copy(raw.reg_written(size), Use::Read, size, 4, 0)?,
        0x68 | 0x6a if !raw.p66 => {
            Plan { mem: Mem::Write, size: 8, ..native(Kind::Push { register: None }) }
        }
        0x69 | 0x6b => {
            let imm = if op == 0x6b { 1 } else { imm_size(size) };
            let plan = raw.copy(raw.reg_written(size), Use::Read, size, size, imm)?;
            Plan { kills: CF | OF, sets: true, ..plan }
        }
        0x70..=0x7f if !raw.p66 => {
            Plan { reads: ALL, ..native(Kind::Branch { condition: op & 15 }) }
        }
        0x80 | 0x81 | 0x83 => {
            let imm = if op == 0x81 { imm_size(size) } else { 1 };
            let field = Field::Digit(raw.digit());
            alu_flags(raw.copy(field, alu_use(raw.digit()), by_bit, by_bit, imm)?, raw.digit())
        }
        0x84 | 0x85 => alu_flags(raw.copy(raw.reg_read(), Use::Read, by_bit, by_bit, 0)?, 7),
        0x86 | 0x87 => raw.copy(raw.reg_both(), Use::Both, by_bit, by_bit, 0)?,
        0x88 | 0x89 => raw.copy(raw.reg_read(), Use::Write, by_bit, by_bit, 0)?,
        0x8a | 0x8b => raw.copy(raw.reg_written(by_bit), Use::Read, by_bit, by_bit, 0)?,
        0x8d if raw.rm().is_none() && size >= 4 => native(Kind::Lea { register: raw.reg(), size }),
        // PAUSE is for the engine to know.
        0x90 if raw.rex & 1 == 0 && !string_prefix => native(Kind::Nop),
        0x91..=0x97 if size >= 4 => {
            let code = Code { op: 0x87, ..raw.code(size) };
            let field = Field::Reg(0, true, true);
            native(Kind::Copy { code, field, operand: Operand::Reg(raw.low(), true, true), imm: 0 })
        }
        0x9c if !raw.p66 => {
            let kind = Kind::System(System::PushFlags);
            Plan { mem: Mem::Write, size: 8, reads: ALL, ..native(kind) }
        }
        0xfa => native(Kind::System(System::ClearInterrupts)),
        // An interrupt that waits comes after the next instruction, with flags that it may be about to overwrite.
        0xfb => Plan { reads: ALL, ..native(Kind::System(System::SetInterrupts)) },
        0x98 if !raw.p66 || size == 8 => native(Kind::Extend { wide: size == 8 }),
        0x99 if !raw.p66 || size == 8 => native(Kind::Sign { wide: size == 8 }),
        0x9e => Plan { kills: ALL & !OF, sets: true, ..native(Kind::FlagsOfAh) },
        0x9f => Plan { reads: ALL & !OF, ..native(Kind::AhOfFlags) },
        0xa8 | 0xa9 => {
            let code = Code { op: if by_bit == 1 { 0xf6 } else { 0xf7 }, ..raw.code(by_bit) };
            let operand = Operand::Reg(0, true, false);
            let kind = Kind::Copy { code, field: Field::Digit(0), operand, imm: imm_size(by_bit) };
            alu_flags(native(kind), 7)
        }
        0xaa | 0xab => {
            let kind = Kind::Fill { repeated: raw.rep != 0 };
            Plan { mem: Mem::Write, size: by_bit, ..native(kind) }
        }
        0xb0..=0xb7 => {
            let register = raw.low();
            let code = Code { op: 0xc6, ..raw.code(1) };
            let operand = match raw.high(1, register) {
                true => Operand::High(register - 4, true),
                false => Operand::Reg(register, true, true),
            };
            native(Kind::Copy { code, field: Field::Digit(0), operand, imm: 1 })
        }
        0xb8..=0xbf if size >= 4 => native(Kind::MovImm { register: raw.low() }),
        0xc0 | 0xc1 | 0xd0 | 0xd1 => {
            // The count is known when the immediate is looked at; the plan says so below.
            let imm = u8::from(op < 0xd0);
            let plan = raw.copy(Field::Digit(raw.digit()), Use::Both, by_bit, by_bit, imm)?;
            shift_flags(plan, raw.digit(), if imm == 0 { Some(1) } else { None })
        }
        0xd2 | 0xd3 => {
            let (operand, mem) = raw.operand(Use::Both, by_bit)?;
            let kind =
                Kind::ByCl { code: raw.code(by_bit), field: Field::Digit(raw.digit()), operand };
            shift_flags(Plan { mem, size: by_bit, ..native(kind) }, raw.digit(), None)
        }
        0xc2 | 0xc3 if !raw.p66 => {
            Plan { mem: Mem::Read, size: 8, reads: ALL, ..native(Kind::Return) }
        }
        0xc6 | 0xc7 if raw.digit() == 0 => {
            raw.copy(Field::Digit(0), Use::Write, by_bit, by_bit, imm_size(by_bit))?
        }
        0xc9 if !raw.p66 => Plan { mem: Mem::Read, size: 8, ..native(Kind::Leave) },
        // Compilers pad calls to `__tls_get_addr` with 66 and REX.W, which undoes it.
        0xe8 if size != 2 => {
            Plan { mem: Mem::Write, size: 8, reads: ALL, ..native(Kind::CallNear) }
        }
        0xe9 | 0xeb if !raw.p66 => Plan { reads: ALL, ..native(Kind::Jump) },
        0xf5 => Plan { reads: CF, kills: CF, sets: true, ..native(Kind::Flag(op)) },
        0xf8 | 0xf9 => Plan { kills: CF, sets: true, ..native(Kind::Flag(op)) },
        0xf6 | 0xf7 => match raw.digit() {
            0 | 1 => {
                let imm = imm_size(by_bit);
                let field = Field::Digit(raw.digit());
                alu_flags(raw.copy(field, Use::Read, by_bit, by_bit, imm)?, 7)
            }
            2 => raw.copy(Field::Digit(2), Use::Both, by_bit, by_bit, 0)?,
            3 => alu_flags(raw.copy(Field::Digit(3), Use::Both, by_bit, by_bit, 0)?, 0),
            digit if by_bit >= 4 => {
                let (operand, mem) = raw.operand(Use::Read, size)?;
                let signed = digit & 1 != 0;
                if digit < 6 {
                    let kind = Kind::Multiply { operand, size, signed };
                    Plan { mem, size, kills: CF | OF, sets: true, ..native(kind) }
                } else {
                    Plan { mem, size, ..native(Kind::Divide { operand, size, signed }) }
                }
            }
            _ => return None,
        },
        0xfe | 0xff => match raw.digit() {
            0 | 1 => {
                let plan = raw.copy(Field::Digit(raw.digit()), Use::Both, by_bit, by_bit, 0)?;
                Plan { kills: ALL & !CF, sets: true, ..plan }
            }
            2 if op == 0xff && !raw.p66 => {
                // Through memory, the access of the plan is the one of the operand; the other one is a push.
                let kind = Kind::CallIndirect { register: raw.rm() };
                let mem = if raw.rm().is_none() { Mem::Read } else { Mem::Write };
                Plan { mem, size: 8, reads: ALL, ..native(kind) }
            }
            4 if op == 0xff && !raw.p66 => {
                let kind = Kind::JumpIndirect { register: raw.rm() };
                let mem = if raw.rm().is_none() { Mem::Read } else { Mem::None };
                Plan { mem, size: 8, reads: ALL, ..native(kind) }
            }
            6 if op == 0xff && !raw.p66 => match raw.rm() {
                Some(register) => {
                    let kind = Kind::Push { register: Some(register) };
                    Plan { mem: Mem::Write, size: 8, ..native(kind) }
                }
                None => Plan { mem: Mem::Read, size: 8, ..native(Kind::PushMemory) },
            },
            _ => return None,
        },
        _ => return None,
    })
}

fn two_bytes(raw: &Raw) -> Option<Plan> {
    let op = raw.op;
    let size = raw.size();
    if raw.map != 1 {
        return None;
    }
    let copy = |field, rm, imm| raw.copy(field, rm, size, size, imm);
    Some(match op {
        0x01 if raw.modrm == 0xf8 && raw.rep == 0 && !raw.p66 => {
            native(Kind::System(System::SwapGs))
        }
        0xc7 if raw.digit() == 1 && raw.rm().is_none() && size == 8 => {
            let kind = Kind::CompareExchange16 { code: raw.code(8) };
            Plan { mem: Mem::Write, size: 16, align: 15, kills: ZF, sets: true, ..native(kind) }
        }
        // Prefetches, and what is reserved for hints.
        0x0d | 0x18 | 0x19 | 0x1c..=0x1f => native(Kind::Nop),
        0x40..=0x4f => {
            let plan = copy(raw.reg_both(), Use::Read, 0)?;
            Plan { reads: ALL, ..plan }
        }
        0x80..=0x8f if !raw.p66 => {
            Plan { reads: ALL, ..native(Kind::Branch { condition: op & 15 }) }
        }
        0x90..=0x9f => {
            let plan = raw.copy(Field::Digit(0), Use::Write, 1, 1, 0)?;
            Plan { reads: ALL, ..plan }
        }
        // Bit numbers in registers reach beyond memory operands.
        0xa3 | 0xab | 0xb3 | 0xbb if raw.rm().is_some() => {
            let rm = if op == 0xa3 { Use::Read } else { Use::Both };
            Plan { kills: CF, sets: true, ..copy(raw.reg_read(), rm, 0)? }
        }
        0xa3 | 0xab | 0xb3 | 0xbb if size >= 4 => {
            let mem = if op == 0xa3 { Mem::Read } else { Mem::Write };
            let kind = Kind::BitString { code: raw.code(size), register: raw.reg() };
            Plan { mem, size, kills: CF, sets: true, ..native(kind) }
        }
        0xba if raw.digit() >= 4 => {
            let rm = if raw.digit() == 4 { Use::Read } else { Use::Both };
            Plan { kills: CF, sets: true, ..copy(Field::Digit(raw.digit()), rm, 1)? }
        }
        0xa4 | 0xac if size >= 4 => {
            Plan { kills: 0, sets: true, ..copy(raw.reg_read(), Use::Both, 1)? }
        }
        0xa5 | 0xad if size >= 4 && raw.rm().is_some() => {
            let (operand, _) = raw.operand(Use::Both, size)?;
            let kind = Kind::ByCl { code: raw.code(size), field: raw.reg_read(), operand };
            Plan { sets: true, ..native(kind) }
        }
        0xaf => Plan { kills: CF | OF, sets: true, ..copy(raw.reg_both(), Use::Read, 0)? },
        0xb0 | 0xb1 if raw.rm().is_none() => {
            let size = raw.size_by_bit();
            if raw.high(size, raw.reg()) {
                return None;
            }
            let kind = Kind::CompareExchange { code: raw.code(size), register: raw.reg() };
            Plan { mem: Mem::Write, size, kills: ALL, sets: true, ..native(kind) }
        }
        0xc0 | 0xc1 => {
            let size = raw.size_by_bit();
            let plan = raw.copy(raw.reg_both(), Use::Both, size, size, 0)?;
            Plan { kills: ALL, sets: true, ..plan }
        }
        0xb6 | 0xbe => raw.copy(raw.reg_written(size), Use::Read, size, 1, 0)?,
        0xb7 | 0xbf => raw.copy(raw.reg_written(size), Use::Read, size, 2, 0)?,
        0xbc | 0xbd if raw.rep == 0 => {
            Plan { kills: ZF, sets: true, ..copy(raw.reg_both(), Use::Read, 0)? }
        }
        0xc8..=0xcf if size >= 4 => {
            let register = raw.low();
            // 0F C8+r, which is what opcode 0F with a ModRM byte of extension 1 looks like.
            let code = Code { map: 0, op: 0x0f, ..raw.code(size) };
            let operand = Operand::Reg(register, true, true);
            native(Kind::Copy { code, field: Field::Digit(1), operand, imm: 0 })
        }
        _ => return None,
    })
}

/// The plan of a shift, once its count is known: counts of zero change nothing.
fn refine(plan: &mut Plan, bytes: &[u8], op_size: u8) {
    let Kind::Copy { code, field: Field::Digit(digit), imm: 1, .. } = plan.kind else { return };
    if code.map == 0 && matches!(code.op, 0xc0 | 0xc1) {
        let mask = if op_size == 8 { 63 } else { 31 };
        let count = bytes.last().copied().unwrap_or(0) & mask;
        let flags = shift_flags(*plan, digit, Some(count));
        (plan.reads, plan.kills) = (flags.reads, flags.kills);
    }
}
