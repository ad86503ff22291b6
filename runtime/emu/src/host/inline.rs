//! Vector instructions for translated code: the instruction on renamed registers, as a stub has it, without the stub.

use iced_x86::{Encoder, EncodingKind, Instruction, InstructionInfoFactory, OpKind, Register};

use super::exec::{classify, demanded_alignment, memory_access};
use super::state::guard;
use super::stub::{access, implied};
use super::{HostFeatures, bit_scan_of_old, gather, is_vector, masked, misc, x87, xsave};
use crate::cpu::Mode;
use crate::mmu::Access;

/// Most register operands.
pub const MAX_MOVES: usize = 4;

/// Where a register operand comes from and goes to.
#[derive(Debug, Clone, Copy)]
pub struct Move {
    /// General register of 4 or 8 bytes; else a vector register.
    pub general: bool,
    /// 256 bits.
    pub wide: bool,
    /// The guest's number.
    pub guest: u8,
    /// Host register.
    pub host: u8,
    pub load: bool,
    pub store: bool,
}

/// The memory operand.
#[derive(Debug, Clone, Copy)]
pub struct Operand {
    pub access: Access,
    pub size: u8,
    /// Low bits of its address that must be zero.
    pub align: u8,
}

/// A vector instruction, its memory operand at rcx.
#[derive(Debug, Clone, Copy)]
pub struct Inline {
    /// [`guard`](super::state::guard) bits that keep it from simply running.
    pub class: u8,
    pub memory: Option<Operand>,
    pub moves: [Option<Move>; MAX_MOVES],
    pub vex: bool,
    /// Arithmetic flags as iced counts them.
    pub flags_read: u32,
    pub flags_written: u32,
    pub flags_modified: u32,
    code: [u8; 15],
    len: u8,
}

impl Inline {
    /// The instruction.
    pub fn code(&self) -> &[u8] {
        &self.code[..usize::from(self.len)]
    }
}

/// How general registers of the guest are named in the host.
pub trait Names {
    /// The host register that always holds `guest`.
    fn general(&self, guest: u8) -> Option<u8>;
    /// Registers for the others.
    const FREE: [u8; 2];
}

/// `insn` for translated code. None: it is not one of these, or has operands of another kind.
pub fn make<N: Names>(insn: &Instruction, features: &HostFeatures, names: &N) -> Option<Inline> {
    let insn = &bit_scan_of_old(insn, features);
    let vex = match insn.code().encoding() {
        EncodingKind::Legacy => false,
        EncodingKind::VEX => true,
        _ => return None,
    };
    let known = insn.cpuid_features().iter().all(|f| features.has(*f));
    let name = insn.mnemonic();
    let halves = matches!(name, iced_x86::Mnemonic::Vcvtps2ph | iced_x86::Mnemonic::Vcvtph2ps);
    if !known || !is_vector(insn) || halves || !implied(insn).is_empty() {
        return None;
    }
    let elsewhere = x87::decode(insn, Mode::Code64)
        .or_else(|| xsave::decode(insn, Mode::Code64))
        .or_else(|| masked::decode(insn))
        .or_else(|| gather::decode(insn))
        .or_else(|| misc::decode(insn, features));
    if elsewhere.is_some() {
        return None;
    }
    let mut renamed = *insn;
    renamed.set_segment_prefix(Register::None);
    let mut free = N::FREE.into_iter();
    let mut places = [None; MAX_MOVES];
    for i in 0..insn.op_count() {
        match insn.op_kind(i) {
            OpKind::Register => {
                let register = insn.op_register(i);
                let place = if register.is_xmm() || register.is_ymm() {
                    let wide = register.is_ymm();
                    let base = if wide { Register::YMM0 } else { Register::XMM0 };
                    renamed.set_op_register(i, base + i);
                    let guest = register.number() as u8;
                    Move { general: false, wide, guest, host: i as u8, load: false, store: false }
                } else if register.is_gpr32() || register.is_gpr64() {
                    let guest = register.number() as u8;
                    let own = names.general(guest);
                    let host = match own {
                        Some(host) => host,
                        None => free.next()?,
                    };
                    let base = if register.is_gpr32() { Register::EAX } else { Register::RAX };
                    renamed.set_op_register(i, base + u32::from(host));
                    Move {
                        general: true,
                        wide: own.is_some(),
                        guest,
                        host,
                        load: false,
                        store: false,
                    }
                } else {
                    return None;
                };
                *places.get_mut(i as usize)? = Some(place);
            }
            OpKind::Memory => {
                renamed.set_memory_base(Register::RCX);
                renamed.set_memory_index(Register::None);
                renamed.set_memory_index_scale(1);
                renamed.set_memory_displacement64(0);
                renamed.set_memory_displ_size(0);
            }
            OpKind::Immediate8 => {}
            _ => return None,
        }
    }
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(&renamed);
    for (i, place) in (0..).zip(&mut places) {
        let Some(place) = place else { continue };
        let (load, store) = access(info.op_access(i));
        // A legacy instruction may leave part of its destination.
        place.load = load || !vex && !place.general;
        place.store = store;
        if place.general && place.wide {
            // In its own register.
            (place.load, place.store) = (false, false);
        }
    }
    let memory = match memory_access(insn) {
        None => None,
        Some(access) => {
            let size = insn.memory_size().size();
            if size == 0 || size > 32 {
                return None;
            }
            let access = match access {
                iced_x86::OpAccess::Read => Access::Read,
                _ => Access::Write,
            };
            Some(Operand { access, size: size as u8, align: demanded_alignment(insn, size) })
        }
    };
    let mut encoder = Encoder::try_new(64).ok()?;
    encoder.encode(&renamed, 0).ok()?;
    let bytes = encoder.take_buffer();
    let mut code = [0; 15];
    code.get_mut(..bytes.len())?.copy_from_slice(&bytes);
    let class = classify(insn);
    if class & guard::MMX != 0 {
        return None;
    }
    Some(Inline {
        class,
        memory,
        moves: places,
        vex,
        flags_read: renamed.rflags_read(),
        flags_written: renamed.rflags_written() | renamed.rflags_cleared() | renamed.rflags_set(),
        flags_modified: renamed.rflags_modified(),
        code,
        len: bytes.len() as u8,
    })
}
