//! A small emitter: one instruction per call, no labels but positions to patch.

use super::arena::LINE;
use super::layout::{BIAS, CPU};

/// Host registers by number.
#[allow(missing_docs)]
pub mod host {
    pub const RAX: u8 = 0;
    pub const RCX: u8 = 1;
    pub const RDX: u8 = 2;
    pub const RBX: u8 = 3;
    pub const RSP: u8 = 4;
    pub const RBP: u8 = 5;
    pub const RSI: u8 = 6;
    pub const RDI: u8 = 7;
    pub const R8: u8 = 8;
    pub const R9: u8 = 9;
    pub const R10: u8 = 10;
    pub const R11: u8 = 11;
    pub const R12: u8 = 12;
    pub const R13: u8 = 13;
    pub const R14: u8 = 14;
    pub const R15: u8 = 15;
}
use host::{RAX, RCX, RDX};

/// A memory operand of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ea {
    pub base: Option<u8>,
    /// Register and shift.
    pub index: Option<(u8, u8)>,
    pub disp: i32,
}

impl Ea {
    pub const fn at(base: u8, disp: i32) -> Self {
        Self { base: Some(base), index: None, disp }
    }
    /// A field of the [`Cpu`](crate::cpu::Cpu).
    pub const fn cpu(offset: i32) -> Self {
        Self::at(CPU, offset - BIAS)
    }
}

/// The r/m operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rm {
    Reg(u8),
    Mem(Ea),
}

/// An opcode with its prefixes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Code {
    pub lock: bool,
    pub p66: bool,
    /// 0xf2, 0xf3, or none.
    pub rep: u8,
    pub wide: bool,
    /// 0: one byte; 1: 0F; 2: 0F 38; 3: 0F 3A.
    pub map: u8,
    pub op: u8,
    /// There are register operands of 8 bits, which need a REX from SPL on.
    pub bytes: bool,
}

impl Code {
    pub const fn one(op: u8) -> Self {
        Self { lock: false, p66: false, rep: 0, wide: false, map: 0, op, bytes: false }
    }
    pub const fn wide(op: u8) -> Self {
        Self { wide: true, ..Self::one(op) }
    }
    pub const fn sized(op: u8, size: u8) -> Self {
        Self { wide: size == 8, p66: size == 2, ..Self::one(op) }
    }

    /// Does it do the same with its operand in memory as with one in a register? XCHG is a locked access there; BT and its like
    /// go beyond the operand; BSWAP has none.
    pub const fn may_access_memory(self) -> bool {
        match self.map {
            0 => !matches!(self.op, 0x86 | 0x87 | 0x0f),
            1 => !matches!(self.op, 0xa3 | 0xab | 0xb3 | 0xbb),
            _ => false,
        }
    }

    /// The opcode for the other order of operands, for an instruction of more than 8 bits that leaves its register operand as
    /// it is.
    pub const fn with_operands_swapped(self) -> Option<Self> {
        match (self.map, self.op) {
            (0, 0x01 | 0x09 | 0x11 | 0x19 | 0x21 | 0x29 | 0x31 | 0x39 | 0x89) => {
                Some(Self { op: self.op + 2, ..self })
            }
            (0, 0x85) => Some(self),
            _ => None,
        }
    }
}

/// What rcx and rdx are copies of, by offset of a field of the [`Cpu`](crate::cpu::Cpu).
pub type Copies = [Option<i32>; 2];

/// Where it is in [`Copies`].
fn copy_in(register: u8) -> Option<usize> {
    [RCX, RDX].into_iter().position(|known| known == register)
}

/// The bytes of one instruction.
#[derive(Default)]
struct Bytes {
    bytes: [u8; 16],
    len: usize,
}

impl Bytes {
    #[inline(always)]
    fn push(&mut self, byte: u8) {
        self.bytes[self.len & 15] = byte;
        self.len += 1;
    }
    #[inline(always)]
    fn imm32(&mut self, value: i32) {
        let at = self.len & 15;
        if let Some(place) = self.bytes.get_mut(at..at + 4) {
            place.copy_from_slice(&value.to_le_bytes());
        }
        self.len += 4;
    }

    /// The ModRM byte for `ea` and what follows it; `reg` is the field in its place.
    #[inline(always)]
    fn ea(&mut self, reg: u8, ea: Ea) {
        let Some(base) = ea.base else {
            // SIB without base; index 4 is none.
            let (index, scale) = ea.index.map_or((4, 0), |(i, s)| (i & 7, s));
            self.push(reg | 4);
            self.push(scale << 6 | index << 3 | 5);
            return self.imm32(ea.disp);
        };
        let small = i8::try_from(ea.disp);
        let mode = match small {
            Ok(0) if base & 7 != 5 => 0x00,
            Ok(_) => 0x40,
            Err(_) => 0x80,
        };
        match ea.index {
            None if base & 7 != 4 => self.push(mode | reg | base & 7),
            index => {
                let (index, scale) = index.map_or((4, 0), |(i, s)| (i & 7, s));
                self.push(mode | reg | 4);
                self.push(scale << 6 | index << 3 | base & 7);
            }
        }
        match mode {
            0x00 => {}
            0x40 => self.push(small.unwrap_or(0) as u8),
            _ => self.imm32(ea.disp),
        }
    }
}

/// Code that will be in the arena, in one piece or in two.
#[derive(Debug, Default)]
pub struct Asm {
    /// Those that are made, and room for more.
    room: Vec<u8>,
    len: usize,
    base: usize,
    /// The second piece: where it starts in `code`, and where it will be.
    second: Option<(usize, usize)>,
    /// Of those fields that do not change behind its back, here.
    pub copies: Copies,
    /// The host has BMI2.
    pub bmi2: bool,
}

impl Asm {
    /// Starts anew, with code that will be at `base`.
    pub fn restart(&mut self, base: usize) {
        self.len = 0;
        self.base = base;
        self.second = None;
        self.copies = Copies::default();
    }
    /// What follows is the second piece, which will be at `base`.
    pub fn go_on_at(&mut self, base: usize) {
        self.second = Some((self.here(), base));
    }
    /// Both pieces.
    pub fn pieces(&self) -> (&[u8], &[u8]) {
        self.code().split_at(self.second.map_or(self.here(), |(start, _)| start))
    }
    /// Where in the arena the byte at `position` will be.
    pub fn place(&self, position: usize) -> usize {
        match self.second {
            Some((start, base)) if position >= start => base + (position - start),
            _ => self.base + position,
        }
    }
    /// Position of the next byte.
    #[inline(always)]
    pub fn here(&self) -> usize {
        self.len
    }
    /// All of it.
    pub fn code(&self) -> &[u8] {
        &self.room[..self.len]
    }
    #[inline(always)]
    pub fn byte(&mut self, byte: u8) {
        self.bytes(&[byte]);
    }
    /// Most often of a length that the compiler knows.
    #[inline(always)]
    pub fn bytes(&mut self, bytes: &[u8]) {
        let end = self.len + bytes.len();
        if end > self.room.len() {
            self.more_room(end);
        }
        self.room[self.len..end].copy_from_slice(bytes);
        self.len = end;
    }
    #[inline(always)]
    fn put(&mut self, instruction: &Bytes) {
        let end = self.len + instruction.bytes.len();
        if end > self.room.len() {
            self.more_room(end);
        }
        self.room[self.len..end].copy_from_slice(&instruction.bytes);
        self.len += instruction.len;
    }
    #[cold]
    fn more_room(&mut self, end: usize) {
        self.room.resize((2 * end).max(4096), 0);
    }
    #[inline(always)]
    pub fn imm32(&mut self, value: i32) {
        self.bytes(&value.to_le_bytes());
    }

    /// Host register `register` is not what it was, perhaps.
    fn written(&mut self, register: u8) {
        if let Some(copy) = copy_in(register).and_then(|at| self.copies.get_mut(at)) {
            *copy = None;
        }
    }
    /// Which register, rcx or rdx, has the value of the field at `offset`.
    pub fn copy_of(&self, offset: i32) -> Option<u8> {
        [RCX, RDX]
            .into_iter()
            .zip(self.copies)
            .find_map(|(r, copy)| (copy == Some(offset)).then_some(r))
    }
    /// Brings the value of the field at `offset` to `register`, rcx or rdx.
    pub fn copy_to(&mut self, register: u8, offset: i32) {
        let has = |register| copy_in(register).and_then(|at| self.copies[at]) == Some(offset);
        let other = if register == RCX { RDX } else { RCX };
        if has(register) {
            return;
        }
        if has(other) {
            self.mov(register, other);
            self.is_copy(other, offset);
        } else {
            self.load(register, Ea::cpu(offset));
        }
        self.is_copy(register, offset);
    }
    /// `register`, rcx or rdx, has the value of the field at `offset`.
    pub fn is_copy(&mut self, register: u8, offset: i32) {
        if let Some(copy) = copy_in(register).and_then(|at| self.copies.get_mut(at)) {
            *copy = Some(offset);
        }
    }
    /// Loads the registers that are to be `copies`.
    pub fn load_copies(&mut self, copies: Copies) {
        for (register, offset) in [RCX, RDX].into_iter().zip(copies) {
            if let Some(offset) = offset {
                self.load(register, Ea::cpu(offset));
            }
        }
    }

    /// An instruction with a ModRM byte; immediates are the caller's.
    pub fn op(&mut self, code: Code, reg: u8, rm: Rm) {
        self.written(reg);
        if let Rm::Reg(register) = rm {
            self.written(register);
        }
        let mut out = Bytes::default();
        if code.lock {
            out.push(0xf0);
        }
        if code.p66 {
            out.push(0x66);
        }
        if code.rep != 0 {
            out.push(code.rep);
        }
        let (b, x) = match rm {
            Rm::Reg(r) => (r, 0),
            Rm::Mem(ea) => (ea.base.unwrap_or(0), ea.index.map_or(0, |i| i.0)),
        };
        let rex = 0x40 | u8::from(code.wide) << 3 | (reg >> 3) << 2 | (x >> 3) << 1 | b >> 3;
        let byte = code.bytes && (reg >= 4 || matches!(rm, Rm::Reg(r) if r >= 4));
        if rex != 0x40 || byte {
            out.push(rex);
        }
        if code.map != 0 {
            out.push(0x0f);
        }
        if code.map > 1 {
            out.push(if code.map == 2 { 0x38 } else { 0x3a });
        }
        out.push(code.op);
        let reg = (reg & 7) << 3;
        match rm {
            Rm::Reg(r) => out.push(0xc0 | reg | r & 7),
            Rm::Mem(ea) => out.ea(reg, ea),
        }
        self.put(&out);
    }

    /// The same with an opcode extension in the place of a register.
    pub fn op_digit(&mut self, code: Code, digit: u8, rm: Rm) {
        let copies = self.copies;
        self.op(code, digit, rm);
        self.copies = copies;
        if let Rm::Reg(register) = rm {
            self.written(register);
        }
    }

    /// The ModRM byte for `ea` and what follows it; `reg` is the field in its place.
    pub fn ea(&mut self, reg: u8, ea: Ea) {
        let mut out = Bytes::default();
        out.ea(reg, ea);
        self.put(&out);
    }

    /// `mov d, s`, 64 bits.
    pub fn mov(&mut self, d: u8, s: u8) {
        self.op(Code::wide(0x89), s, Rm::Reg(d));
    }
    /// `mov d, s`, 32 bits: clears the upper half.
    pub fn mov32(&mut self, d: u8, s: u8) {
        self.op(Code::one(0x89), s, Rm::Reg(d));
    }
    pub fn load(&mut self, d: u8, ea: Ea) {
        self.op(Code::wide(0x8b), d, Rm::Mem(ea));
    }
    pub fn store(&mut self, ea: Ea, s: u8) {
        self.op(Code::wide(0x89), s, Rm::Mem(ea));
    }
    pub fn lea(&mut self, d: u8, ea: Ea) {
        self.op(Code::wide(0x8d), d, Rm::Mem(ea));
    }
    /// `mov d, imm` with an immediate of 64 bits.
    pub fn mov_imm64(&mut self, d: u8, value: u64) {
        self.written(d);
        self.bytes(&[0x48 | d >> 3, 0xb8 | d & 7]);
        self.bytes(&value.to_le_bytes());
    }
    /// `mov ecx, imm`.
    pub fn mov_ecx(&mut self, value: u32) {
        self.byte(0xb9);
        self.bytes(&value.to_le_bytes());
    }
    /// `mov eax, imm`.
    pub fn mov_eax(&mut self, value: u32) {
        self.byte(0xb8);
        self.bytes(&value.to_le_bytes());
    }

    /// Saves the arithmetic flags, which stay. Destroys rax.
    pub fn save_flags(&mut self, cc: i32) {
        self.bytes(&[0x9f, 0x0f, 0x90, 0xc0]);
        self.op(Code::sized(0x89, 2), RAX, Rm::Mem(Ea::cpu(cc)));
    }
    /// Loads the arithmetic flags. Destroys rax.
    pub fn restore_flags(&mut self, cc: i32) {
        self.op(Code { map: 1, ..Code::one(0xb7) }, RAX, Rm::Mem(Ea::cpu(cc)));
        self.bytes(&[0x04, 0x7f, 0x9e]);
    }

    /// Comes before a jump whose opcode has `opcode` bytes, and whose distance will be patched while others execute it.
    pub fn keep_in_line(&mut self, opcode: usize) {
        const NOPS: [&[u8]; 4] = [&[], &[0x90], &[0x66, 0x90], &[0x0f, 0x1f, 0x00]];
        let at = (self.place(self.here()) + opcode) % LINE;
        let missing = if at + 4 > LINE { LINE - at } else { 0 };
        self.bytes(NOPS[missing & 3]);
    }
    /// A jump whose distance is to be patched: returns its position.
    pub fn jmp(&mut self) -> usize {
        self.byte(0xe9);
        self.imm32(0);
        self.here() - 4
    }
    /// The same for a call.
    pub fn call(&mut self) -> usize {
        self.byte(0xe8);
        self.imm32(0);
        self.here() - 4
    }
    /// A conditional jump (condition as in the opcode) to be patched.
    pub fn jcc(&mut self, condition: u8) -> usize {
        self.bytes(&[0x0f, 0x80 | condition]);
        self.imm32(0);
        self.here() - 4
    }
    /// Makes the jump at `position` go to `target`, both from the start.
    pub fn patch(&mut self, position: usize, target: usize) {
        let distance = self.place(target) as i64 - (self.place(position) as i64 + 4);
        self.set_imm32(position, distance as i32);
    }
    /// Makes the immediate at `position` this one.
    pub fn set_imm32(&mut self, position: usize, value: i32) {
        self.room[position..position + 4].copy_from_slice(&value.to_le_bytes());
    }
    /// Makes the jump at `position` come here.
    pub fn land(&mut self, position: usize) {
        let here = self.here();
        self.patch(position, here);
    }
    /// A jump to `target`, from the start.
    pub fn jmp_to(&mut self, target: usize) {
        let position = self.jmp();
        self.patch(position, target);
    }
    /// A jump (0xe9) or call (0xe8) to `offset` of the arena.
    pub fn far(&mut self, opcode: u8, offset: u32) {
        self.byte(opcode);
        let from = (self.place(self.here()) + 4) as i64;
        self.imm32((i64::from(offset) - from) as i32);
    }

    /// The entry for the page of the address that `ea` says in the table that the field at `table` points to, in rax. Destroys flags.
    pub fn tlb_slot(&mut self, ea: Ea, mask: u32, table: i32) {
        match ea {
            Ea { base: Some(base), index: None, disp: 0 } if self.bmi2 => {
                // rorx eax, base, 7: the mask leaves out what comes in again.
                self.bytes(&[0xc4, 0xe3 & !(base >> 3 << 5), 0x7b, 0xf0, 0xc0 | base & 7, 7]);
            }
            Ea { base: Some(base), index: None, disp: 0 } => {
                self.mov32(RAX, base);
                self.bytes(&[0xc1, 0xe8, 7]); // shr eax, 7
            }
            ea => {
                self.op(Code::one(0x8d), RAX, Rm::Mem(ea));
                self.bytes(&[0xc1, 0xe8, 7]);
            }
        }
        self.byte(0x25); // and eax, mask
        self.bytes(&mask.to_le_bytes());
        self.op(Code::wide(0x03), RAX, Rm::Mem(Ea::cpu(table)));
    }
    /// The page of the byte that `ea` says, in rdx.
    pub fn page_of(&mut self, ea: Ea) {
        match ea {
            Ea { base: Some(base), index: None, disp: 0 } => self.mov(RDX, base),
            ea => self.lea(RDX, ea),
        }
        self.op(Code::wide(0x81), 4, Rm::Reg(RDX));
        self.imm32(-4096);
    }
}
