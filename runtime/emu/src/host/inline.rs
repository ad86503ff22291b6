//! Vector and x87 instructions for translated code: the instruction itself, on the host's registers of the same numbers. Only
//! general registers are renamed.

use std::cell::RefCell;

use iced_x86::{Encoder, EncodingKind, Instruction, Mnemonic, OpKind, Register};
use smallvec::SmallVec;

use super::exec::{classify, demanded_alignment, memory_access, op_accesses};
use super::state::guard;
use super::stub::{self, access, implied};
use super::{HostFeatures, bit_scan_of_old, gather, is_vector, masked, misc, x87, xsave};
use crate::cpu::Mode;
use crate::mmu::Access;

/// Most general register operands.
pub const MAX_MOVES: usize = 4;

/// So many that none need be allocated: this is done for each vector instruction that is translated.
type Few<T> = SmallVec<[T; MAX_MOVES]>;

/// A general register operand, which is in its own host register (or in memory) before and after.
#[derive(Debug, Clone, Copy)]
pub struct Move {
    /// The guest's number.
    pub guest: u8,
    /// Host register that the instruction names.
    pub host: u8,
    /// It is copied there before.
    pub load: bool,
    /// It is copied back afterwards.
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

/// A vector or x87 instruction on the host's own registers, its memory operand at rcx.
#[derive(Debug, Clone, Copy)]
pub struct Inline {
    /// [`guard`](super::state::guard) bits that keep it from simply running.
    pub class: u8,
    /// It names XMM or YMM registers.
    pub vectors: bool,
    /// Upper halves of YMM registers may be other than zero afterwards.
    pub wide: bool,
    /// x87: the opcode that pointers tell afterwards ([`X87Pointers::fop`](super::X87Pointers::fop)).
    pub note: Option<u16>,
    /// It is FLDCW.
    pub loads_control_word: bool,
    pub memory: Option<Operand>,
    pub moves: [Option<Move>; MAX_MOVES],
    /// Arithmetic flags as iced counts them.
    pub flags_read: u32,
    pub flags_written: u32,
    pub flags_modified: u32,
    code: [u8; 15],
    len: u8,
    /// Bytes behind the ModRM byte.
    trailing: u8,
}

impl Inline {
    /// The instruction.
    pub fn code(&self) -> &[u8] {
        &self.code[..usize::from(self.len)]
    }

    /// Where its ModRM byte is, if it has a memory operand.
    pub fn modrm(&self) -> usize {
        usize::from(self.len - 1 - self.trailing)
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
    let known = insn.cpuid_features().iter().all(|f| features.has(*f));
    let encoding = insn.code().encoding();
    if !known || !matches!(encoding, EncodingKind::Legacy | EncodingKind::VEX) {
        return None;
    }
    let (class, note) = match x87::in_place(insn) {
        Some(known) => known,
        None if in_place(insn, features) => (classify(insn), None),
        None => return None,
    };
    let mut renamed = *insn;
    renamed.set_segment_prefix(Register::None);
    let mut general = General::implied(insn);
    let mut free: Few<u8> = N::FREE.into_iter().filter(|host| general.lacks(*host)).collect();
    let (mut vectors, mut wide) = (uses_vectors(insn), false);
    for i in 0..insn.op_count() {
        match insn.op_kind(i) {
            OpKind::Register => {
                let register = insn.op_register(i);
                let guest = register.number() as u8;
                if register.is_xmm() || register.is_ymm() {
                    vectors = true;
                    wide |= register.is_ymm();
                } else if register == Register::AX && note.is_none() && class & guard::X87 != 0 {
                    general.add(i, guest, guest);
                } else if register.is_gpr32() || register.is_gpr64() {
                    let known = general.host_of(guest).or_else(|| names.general(guest));
                    let host = known.or_else(|| free.pop())?;
                    let base = if register.is_gpr32() { Register::EAX } else { Register::RAX };
                    renamed.set_op_register(i, base + u32::from(host));
                    general.add(i, guest, host);
                } else if !register.is_mm() && !register.is_st() {
                    return None;
                }
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
    let accesses = op_accesses(&renamed);
    for (i, place) in &mut general.explicit {
        (place.load, place.store) = access(accesses[*i as usize]);
        // A part of it stays.
        place.load |= insn.op_register(*i) == Register::AX;
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
            let align = if class & guard::X87 != 0 { 0 } else { demanded_alignment(insn, size) };
            Some(Operand { access, size: size as u8, align })
        }
    };
    let (code, len) = encode(&renamed)?;
    Some(Inline {
        class,
        vectors,
        wide,
        note,
        loads_control_word: insn.mnemonic() == Mnemonic::Fldcw,
        memory,
        moves: general.moves()?,
        flags_read: renamed.rflags_read(),
        flags_written: renamed.rflags_written() | renamed.rflags_cleared() | renamed.rflags_set(),
        flags_modified: renamed.rflags_modified(),
        code,
        len,
        trailing: u8::from(has_last_byte(insn)),
    })
}

/// Does a byte follow the ModRM byte: an immediate, or a fourth register?
fn has_last_byte(insn: &Instruction) -> bool {
    let immediate = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Immediate8);
    immediate || insn.op_count() == 4
}

/// Is this an instruction on vectors, or a general one that goes with them, that does nothing but compute?
fn in_place(insn: &Instruction, features: &HostFeatures) -> bool {
    use Mnemonic as M;
    if uses_vectors(insn) {
        return true;
    }
    // Their alignment is a matter of its own.
    let halves = matches!(insn.mnemonic(), M::Vcvtps2ph | M::Vcvtph2ps);
    let elsewhere = xsave::decode(insn, Mode::Code64)
        .or_else(|| masked::decode(insn))
        .or_else(|| gather::decode(insn))
        .or_else(|| misc::decode(insn, features));
    is_vector(insn) && !halves && elsewhere.is_none()
}

/// Does it use XMM or YMM registers that it does not name?
fn uses_vectors(insn: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(insn.mnemonic(), M::Vzeroupper | M::Vzeroall)
}

fn encode(insn: &Instruction) -> Option<([u8; 15], u8)> {
    // What has no operation of its own.
    if insn.mnemonic() == Mnemonic::Wait {
        return Some(([0; 15], 0));
    }
    thread_local! {
        static ENCODER: RefCell<Encoder> = RefCell::new(Encoder::new(64));
    }
    ENCODER.with_borrow_mut(|encoder| {
        let encoded = encoder.encode(insn, 0);
        let mut bytes = encoder.take_buffer();
        let mut code = [0; 15];
        let found = encoded.ok().and_then(|_| {
            code.get_mut(..bytes.len())?.copy_from_slice(&bytes);
            Some((code, bytes.len() as u8))
        });
        // For the next one.
        bytes.clear();
        encoder.set_buffer(bytes);
        found
    })
}

/// The general register operands of an instruction.
struct General {
    /// By the number of the operand.
    explicit: Few<(u32, Move)>,
    implied: Few<Move>,
}

impl General {
    /// Those that the instruction does not name.
    fn implied(insn: &Instruction) -> Self {
        let place = |(number, load, store)| Move { guest: number, host: number, load, store };
        let general = implied(insn).iter().filter_map(stub::Operand::general).map(place).collect();
        Self { explicit: Few::new(), implied: general }
    }

    /// The host register of an operand that is named before.
    fn host_of(&self, guest: u8) -> Option<u8> {
        self.explicit.iter().find(|(_, place)| place.guest == guest).map(|(_, place)| place.host)
    }

    fn lacks(&self, host: u8) -> bool {
        self.implied.iter().all(|place| place.host != host)
    }

    fn add(&mut self, operand: u32, guest: u8, host: u8) {
        self.explicit.push((operand, Move { guest, host, load: false, store: false }));
    }

    fn moves(self) -> Option<[Option<Move>; MAX_MOVES]> {
        let mut moves = [None; MAX_MOVES];
        let all = self.explicit.into_iter().map(|(_, place)| place).chain(self.implied);
        for (i, place) in all.enumerate() {
            *moves.get_mut(i)? = Some(place);
        }
        Some(moves)
    }
}
