//! Stubs: the guest's very instruction, on renamed registers.
//!
//! A stub is made once per *form*: code, immediate, register or memory operand. It gets a pointer
//! per register operand, loads them into fixed host registers, runs the instruction, and stores what
//! it wrote. So the result, the flags and all the odd corners are the processor's own.
//!
//! | host register | use |
//! |---|---|
//! | rdi rsi rdx rcx | pointers to register operands 0 to 3 |
//! | r8 | pointer to the memory operand |
//! | r9 | the [`Cpu`] |
//! | r10 r11 rax | general operands |
//! | xmm1-xmm4 | vector operands 0 to 3; xmm0 when implied |
//!
//! MMX and x87 registers are the host's own, by number.

use std::collections::HashMap;
use std::mem::offset_of;
use std::sync::{LazyLock, Mutex, PoisonError};

use iced_x86::{
    Code, Encoder, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    OpCodeOperandKind, OpKind, Register,
};

use super::arena;
use crate::cpu::Cpu;
use crate::flags::rflags;

/// A stub. Arguments as in the table above.
pub type StubFn = unsafe extern "sysv64" fn(*mut u8, *mut u8, *mut u8, *mut u8, *mut u8, *mut Cpu);

/// Most operands a form may have besides immediates.
const MAX_OPERANDS: usize = 4;

/// What a stub is for, besides its code: two instructions with equal keys share one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    code: Code,
    memory: bool,
    immediate: u64,
    /// MMX and x87 register numbers, which are not renamed.
    fixed: u32,
}

#[derive(Debug, Default)]
struct Table {
    stubs: HashMap<Key, Option<u32>>,
    used: usize,
}

static TABLE: LazyLock<Mutex<Table>> = LazyLock::new(Mutex::default);

/// How many stubs there are, and their bytes.
pub fn usage() -> (usize, usize) {
    let table = TABLE.lock().unwrap_or_else(PoisonError::into_inner);
    (table.stubs.len(), table.used)
}

/// An instruction prepared for a stub.
#[derive(Debug, Clone, Copy)]
pub struct Stub {
    /// Offset of the stub in the arena.
    pub offset: u32,
    /// Byte offsets of register operands 0 to 3 from the start of [`Cpu`], 16 bits each.
    pub slots: u64,
}

/// Finds or makes the stub of `insn`. None if its operands are of a kind that stubs do not do.
pub fn get(insn: &Instruction) -> Option<Stub> {
    let mut key = Key { code: insn.code(), memory: false, immediate: 0, fixed: 0 };
    let mut slots = 0u64;
    for i in 0..insn.op_count() {
        match insn.op_kind(i) {
            OpKind::Register => {
                let register = insn.op_register(i);
                if register.is_mm() || register.is_st() {
                    key.fixed = key.fixed << 4 | register.number() as u32 | 8;
                } else {
                    if i as usize >= MAX_OPERANDS {
                        return None;
                    }
                    slots |= u64::from(slot(register)?) << (16 * i);
                }
            }
            OpKind::Memory => key.memory = true,
            OpKind::Immediate8 | OpKind::Immediate8_2nd => {
                key.immediate = key.immediate << 8 | insn.immediate(i) & 0xff;
            }
            OpKind::Immediate32 | OpKind::Immediate8to32 | OpKind::Immediate32to64 => {
                key.immediate = insn.immediate(i);
            }
            _ => return None,
        }
    }
    let mut table = TABLE.lock().unwrap_or_else(PoisonError::into_inner);
    let offset = match table.stubs.get(&key) {
        Some(known) => (*known)?,
        None => {
            let made = generate(insn).and_then(|code| table.place(&code));
            table.stubs.insert(key, made);
            made?
        }
    };
    Some(Stub { offset, slots })
}

impl Table {
    fn place(&mut self, code: &[u8]) -> Option<u32> {
        let arena = arena::init().ok()?;
        let offset = self.used.next_multiple_of(16);
        if !arena.write(offset, code) {
            tracing::error!(used = self.used, "the memory for host stubs is full");
            return None;
        }
        self.used = offset + code.len();
        u32::try_from(offset).ok()
    }
}

/// Byte offset of a register in [`Cpu`].
fn slot(register: Register) -> Option<u16> {
    let gpr = offset_of!(Cpu, gpr);
    let vector = offset_of!(Cpu, vec) + offset_of!(super::VectorState, ymm);
    let offset = if register.is_xmm() || register.is_ymm() {
        vector + register.number() * 32
    } else if matches!(register, Register::AH | Register::CH | Register::DH | Register::BH) {
        gpr + (register.number() - 4) * 8 + 1
    } else if register.is_gpr() {
        gpr + register.full_register().number() * 8
    } else {
        return None;
    };
    u16::try_from(offset).ok()
}

const _: () = assert!(offset_of!(Cpu, vec) + size_of::<super::VectorState>() < 1 << 16);

/// Host pointer registers of operands 0 to 3, as ModRM.rm.
const POINTER: [u8; MAX_OPERANDS] = [7, 6, 2, 1];
/// Host registers of general operands.
const GENERAL: [u8; 3] = [10, 11, 0];

/// How an operand is held while the instruction runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    Xmm,
    Ymm,
    Gpr(usize),
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Operand {
    held: Held,
    host: u8,
    from: From,
    load: bool,
    store: bool,
}

impl Operand {
    /// A general register: its number, and whether it is read and written.
    pub(super) fn general(&self) -> Option<(u8, bool, bool)> {
        matches!(self.held, Held::Gpr(_)).then_some((self.host, self.load, self.store))
    }
}

/// Where an operand's memory copy is.
#[derive(Debug, Clone, Copy)]
enum From {
    /// In the place that pointer register `ModRM.rm` names.
    Pointer(u8),
    /// At this offset from the [`Cpu`].
    Cpu(u16),
}

fn generate(insn: &Instruction) -> Option<Vec<u8>> {
    let code = insn.code();
    let vex = code.encoding() == EncodingKind::VEX;
    let mut renamed = *insn;
    renamed.set_segment_prefix(Register::None);
    renamed.set_has_lock_prefix(false);
    let op_code = code.op_code();
    let mut operands: Vec<Operand> = implied(insn);
    let free: Vec<u8> = GENERAL
        .into_iter()
        .filter(|r| operands.iter().all(|o| o.host != *r || !matches!(o.held, Held::Gpr(_))))
        .collect();
    let mut general = free.into_iter();
    let mut places = [None; MAX_OPERANDS];
    for i in 0..insn.op_count() {
        match insn.op_kind(i) {
            OpKind::Register => {
                let register = insn.op_register(i);
                if register.is_mm() || register.is_st() {
                    continue;
                }
                let pointer = From::Pointer(*POINTER.get(i as usize)?);
                let place = if register.is_xmm() || register.is_ymm() {
                    let host = i as u8 + 1;
                    let (held, base) = if register.is_xmm() {
                        (Held::Xmm, Register::XMM0)
                    } else {
                        (Held::Ymm, Register::YMM0)
                    };
                    renamed.set_op_register(i, base + u32::from(host));
                    (held, host, pointer)
                } else if register.is_gpr() {
                    let held = Held::Gpr(register.size());
                    if is_fixed(op_code.op_kind(i)) {
                        let from = From::Cpu(slot(register)?);
                        (held, register.full_register().number() as u8, from)
                    } else {
                        let host = general.next()?;
                        renamed.set_op_register(i, host_register(host, register.size()));
                        (held, host, pointer)
                    }
                } else {
                    return None;
                };
                *places.get_mut(i as usize)? = Some(place);
            }
            OpKind::Memory => {
                renamed.set_memory_base(Register::R8);
                renamed.set_memory_index(Register::None);
                renamed.set_memory_index_scale(1);
                renamed.set_memory_displacement64(0);
                renamed.set_memory_displ_size(0);
            }
            _ => {}
        }
    }
    // Asked of the renamed instruction: the guest's own may be an idiom (`vpxor xmm0, xmm0, xmm0`
    // reads nothing), and the stub is for every choice of registers.
    let mut info = InstructionInfoFactory::new();
    let info = info.info(&renamed);
    for (i, place) in places.into_iter().enumerate() {
        let Some((held, host, from)) = place else { continue };
        let (load, store) = access(info.op_access(i as u32));
        // A legacy instruction may leave part of its destination.
        let load = load || !vex && !matches!(held, Held::Gpr(_));
        operands.push(Operand { held, host, from, load, store });
    }
    let modified = renamed.rflags_modified() & ARITH;
    let flags_written = modified != 0;
    let flags_needed = renamed.rflags_read() & ARITH != 0 || flags_written && modified != ARITH;

    let mut emit = Emit { code: Vec::with_capacity(96), vex };
    if flags_needed {
        emit.load_flags();
    }
    // Fixed registers last: rdx and rcx hold pointers until then.
    for operand in operands.iter().filter(|o| matches!(o.from, From::Pointer(_)) && o.load) {
        emit.load(operand);
    }
    for operand in operands.iter().filter(|o| matches!(o.from, From::Cpu(_)) && o.load) {
        emit.load(operand);
    }
    let mut encoder = Encoder::try_new(64).ok()?;
    encoder.encode(&renamed, 0).ok()?;
    emit.code.extend(encoder.take_buffer());
    // Backwards, so that of two equal destinations the first operand wins (MULX).
    for operand in operands.iter().rev().filter(|o| o.store) {
        if let From::Pointer(2 | 1) = operand.from
            && operands.iter().any(|o| matches!(o.held, Held::Gpr(_)) && matches!(o.host, 1 | 2))
        {
            return None;
        }
        emit.store(operand);
    }
    if flags_written {
        emit.store_flags();
    }
    if vex && operands.iter().any(|o| o.held == Held::Ymm) {
        emit.bytes(&[0xc5, 0xf8, 0x77]); // vzeroupper
    }
    emit.bytes(&[0xc3]);
    Some(emit.code)
}

/// iced's names for the arithmetic flags.
const ARITH: u32 = iced_x86::RflagsBits::CF
    | iced_x86::RflagsBits::PF
    | iced_x86::RflagsBits::AF
    | iced_x86::RflagsBits::ZF
    | iced_x86::RflagsBits::SF
    | iced_x86::RflagsBits::OF;

const _: () = assert!(rflags::ARITH == 0x8d5);

pub(super) fn access(access: OpAccess) -> (bool, bool) {
    match access {
        OpAccess::Read | OpAccess::CondRead => (true, false),
        OpAccess::Write => (false, true),
        OpAccess::None | OpAccess::NoMemAccess => (false, false),
        _ => (true, true),
    }
}

fn is_fixed(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    matches!(kind, K::al | K::cl | K::ax | K::dx | K::eax | K::rax)
}

fn host_register(number: u8, size: usize) -> Register {
    let base = match size {
        1 => {
            return [Register::AL, Register::R10L, Register::R11L][match number {
                10 => 1,
                11 => 2,
                _ => 0,
            }];
        }
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    base + u32::from(number)
}

/// Registers that an instruction uses without naming them.
pub(super) fn implied(insn: &Instruction) -> Vec<Operand> {
    use Mnemonic as M;
    let xmm0 = |load, store| Operand {
        held: Held::Xmm,
        host: 0,
        from: From::Cpu(slot(Register::XMM0).unwrap_or(0)),
        load,
        store,
    };
    let gpr = |register: Register, size, load, store| Operand {
        held: Held::Gpr(size),
        host: register.number() as u8,
        from: From::Cpu(slot(register).unwrap_or(0)),
        load,
        store,
    };
    let lengths = [gpr(Register::RAX, 8, true, false), gpr(Register::RDX, 8, true, false)];
    let index = gpr(Register::RCX, 4, false, true);
    match insn.mnemonic() {
        M::Blendvps | M::Blendvpd | M::Pblendvb | M::Sha256rnds2 => vec![xmm0(true, false)],
        M::Pcmpestri | M::Vpcmpestri | M::Pcmpestri64 | M::Vpcmpestri64 => {
            vec![lengths[0], lengths[1], index]
        }
        M::Pcmpestrm | M::Vpcmpestrm | M::Pcmpestrm64 | M::Vpcmpestrm64 => {
            vec![lengths[0], lengths[1], xmm0(false, true)]
        }
        M::Pcmpistri | M::Vpcmpistri => vec![index],
        M::Pcmpistrm | M::Vpcmpistrm => vec![xmm0(false, true)],
        M::Mulx => vec![gpr(Register::RDX, 8, true, false)],
        _ => Vec::new(),
    }
}

/// A small assembler for what surrounds the instruction.
struct Emit {
    code: Vec<u8>,
    vex: bool,
}

impl Emit {
    fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    /// ModRM (and displacement) for register `reg` and the operand's place.
    fn address(&mut self, reg: u8, from: From) {
        match from {
            From::Pointer(rm) => self.bytes(&[(reg & 7) << 3 | rm]),
            From::Cpu(offset) => {
                self.bytes(&[0x81 | (reg & 7) << 3]);
                self.bytes(&u32::from(offset).to_le_bytes());
            }
        }
    }

    /// REX for `reg` and the operand's place; nothing if it would be empty and is not `forced`.
    fn rex(&mut self, wide: bool, reg: u8, from: From, forced: bool) {
        let base = matches!(from, From::Cpu(_));
        let rex = 0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | u8::from(base);
        if rex != 0x40 || forced {
            self.bytes(&[rex]);
        }
    }

    fn vector(&mut self, opcode: u8, operand: &Operand, ymm: bool) {
        if self.vex {
            // C4 form: its B bit reaches r9.
            let base = matches!(operand.from, From::Cpu(_));
            self.bytes(&[0xc4, if base { 0xc1 } else { 0xe1 }, if ymm { 0x7c } else { 0x78 }]);
        } else {
            self.rex(false, operand.host, operand.from, false);
            self.bytes(&[0x0f]);
        }
        self.bytes(&[opcode]);
        self.address(operand.host, operand.from);
    }

    fn load(&mut self, operand: &Operand) {
        let Operand { held, host, from, .. } = *operand;
        match held {
            Held::Xmm => self.vector(0x10, operand, false),
            Held::Ymm => self.vector(0x10, operand, true),
            Held::Gpr(1) => {
                self.rex(false, host, from, false);
                self.bytes(&[0x0f, 0xb6]);
                self.address(host, from);
            }
            Held::Gpr(2) => {
                self.rex(false, host, from, false);
                self.bytes(&[0x0f, 0xb7]);
                self.address(host, from);
            }
            Held::Gpr(size) => {
                self.rex(size == 8, host, from, false);
                self.bytes(&[0x8b]);
                self.address(host, from);
            }
        }
    }

    /// Stores what the instruction wrote. Leaves the flags alone.
    fn store(&mut self, operand: &Operand) {
        let Operand { held, host, from, .. } = *operand;
        match held {
            // A VEX instruction has cleared the upper half, which is stored too.
            Held::Xmm => self.vector(0x11, operand, self.vex),
            Held::Ymm => self.vector(0x11, operand, true),
            Held::Gpr(1) => {
                self.rex(false, host, from, true);
                self.bytes(&[0x88]);
                self.address(host, from);
            }
            Held::Gpr(2) => {
                self.bytes(&[0x66]);
                self.rex(false, host, from, false);
                self.bytes(&[0x89]);
                self.address(host, from);
            }
            // A 32-bit result has cleared the upper half of its register.
            Held::Gpr(_) => {
                self.rex(true, host, from, false);
                self.bytes(&[0x89]);
                self.address(host, from);
            }
        }
    }

    /// `mov ax, [r9 + cc]; add al, 0x7f; sahf`: the addition overflows exactly if OF was set.
    fn load_flags(&mut self) {
        self.bytes(&[0x66, 0x41, 0x8b]);
        self.address(0, From::Cpu(CC));
        self.bytes(&[0x04, 0x7f, 0x9e]);
    }

    /// `lahf; seto al; mov [r9 + cc], ax`.
    fn store_flags(&mut self) {
        self.bytes(&[0x9f, 0x0f, 0x90, 0xc0, 0x66, 0x41, 0x89]);
        self.address(0, From::Cpu(CC));
    }
}

const CC: u16 = offset_of!(Cpu, cc) as u16;
