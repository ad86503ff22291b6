//! Instructions that run as the host's own: SIMD, x87, XSAVE, and the user-level integer
//! instructions that are not worth a handler in [`crate::interp`].
//!
//! * [`stub`] makes a piece of host code per form of instruction, in the memory of [`arena`];
//!   [`exec`] has the handlers that run it.
//! * [`fp`] runs floating point under an unusual MXCSR.
//! * [`x87`], [`xsave`], [`masked`], [`gather`], [`misc`] are what needs more than the instruction
//!   itself: state images, several memory operands, randomness.
//! * [`state`] holds the registers and says who may use them.

pub(crate) mod arena;
mod exec;
mod features;
mod fp;
mod gather;
pub(crate) mod inline;
mod masked;
mod mem;
mod misc;
mod state;
mod stub;
mod x87;
mod xsave;

pub use arena::init;
pub use features::HostFeatures;
pub(crate) use state::guard;
pub use state::{FxImage, MXCSR_MASK, MXCSR_RESET, VectorState, X87Pointers, Ymm};
pub use stub::usage as stub_usage;

use iced_x86::{Code, CpuidFeature as F, EncodingKind, Instruction, Mnemonic};

use crate::block::Block;
use crate::cpu::{Cpu, Mode};
use crate::op::{Flow, Handler, Op};

/// What [`decode`] puts into an [`Op`]; the caller fills in the addresses and the memory operand.
#[derive(Debug, Clone, Copy)]
pub struct HostOp {
    /// [`Op::handler`].
    pub handler: Handler,
    /// [`Op::imm`].
    pub imm: u64,
    /// [`Op::extra`].
    pub extra: u32,
    /// [`Op::dst`].
    pub dst: u8,
    /// [`Op::src`].
    pub src: u8,
    /// [`Op::aux`].
    pub aux: u8,
}

impl HostOp {
    const EMPTY: Self = Self { handler: undefined, imm: 0, extra: 0, dst: 0, src: 0, aux: 0 };

    fn new(handler: Handler) -> Self {
        Self { handler, ..Self::EMPTY }
    }
}

fn undefined(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    cpu.raise(crate::fault::Fault::UD)
}

/// Compiles a user-level instruction that has no handler of its own elsewhere. None: the guest's
/// processor does not have it.
///
/// The memory operand of the op must be filled in as for any other; the index of a VSIB operand is a
/// vector register, which belongs into [`HostOp::dst`] (done here) and not into [`Op::index`].
pub fn decode(insn: &Instruction, mode: Mode, features: &HostFeatures) -> Option<HostOp> {
    let insn = &bit_scan_of_old(insn, features);
    let code = insn.code();
    let vex = match code.encoding() {
        EncodingKind::Legacy => false,
        EncodingKind::VEX => true,
        _ => return None,
    };
    if vex && mode == Mode::Real || !insn.cpuid_features().iter().all(|f| features.has(*f)) {
        return None;
    }
    if let Some(op) = x87::decode(insn, mode)
        .or_else(|| xsave::decode(insn, mode))
        .or_else(|| masked::decode(insn))
        .or_else(|| gather::decode(insn))
        .or_else(|| misc::decode(insn, features))
    {
        return Some(op);
    }
    if !is_vector(insn) && !is_general(insn.mnemonic()) {
        return None;
    }
    exec::compile(insn, stub::get(insn)?)
}

/// TZCNT and LZCNT are BSF and BSR to processors without them, which compilers rely on.
fn bit_scan_of_old(insn: &Instruction, features: &HostFeatures) -> Instruction {
    let mut insn = *insn;
    let code = match insn.code() {
        Code::Tzcnt_r16_rm16 if !features.bmi1 => Code::Bsf_r16_rm16,
        Code::Tzcnt_r32_rm32 if !features.bmi1 => Code::Bsf_r32_rm32,
        Code::Tzcnt_r64_rm64 if !features.bmi1 => Code::Bsf_r64_rm64,
        Code::Lzcnt_r16_rm16 if !features.lzcnt => Code::Bsr_r16_rm16,
        Code::Lzcnt_r32_rm32 if !features.lzcnt => Code::Bsr_r32_rm32,
        Code::Lzcnt_r64_rm64 if !features.lzcnt => Code::Bsr_r64_rm64,
        code => code,
    };
    if code != insn.code() {
        insn.set_code(code);
        insn.set_has_rep_prefix(false);
    }
    insn
}

/// Whether the instruction belongs to MMX, SSE, AVX and their relatives.
fn is_vector(insn: &Instruction) -> bool {
    insn.cpuid_features().iter().any(|f| {
        matches!(
            f,
            F::MMX
                | F::SSE
                | F::SSE2
                | F::SSE3
                | F::SSSE3
                | F::SSE4_1
                | F::SSE4_2
                | F::AES
                | F::PCLMULQDQ
                | F::SHA
                | F::AVX
                | F::AVX2
                | F::FMA
                | F::F16C
                | F::BMI1
                | F::BMI2
                | F::LZCNT
                | F::POPCNT
                | F::MOVBE
                | F::ADX
        )
    })
}

/// Integer instructions of the base set that run well as stubs.
fn is_general(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(mnemonic, M::Shld | M::Shrd | M::Bsf | M::Bsr | M::Bswap | M::Tzcnt | M::Lzcnt)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tzcnt_is_bsf_on_old_processors() {
        let mut decoder = iced_x86::Decoder::new(64, &[0xf3, 0x0f, 0xbc, 0xc1], 0);
        let insn = decoder.decode();
        let new = *HostFeatures::detect();
        let old = HostFeatures { bmi1: false, ..new };
        assert_eq!(bit_scan_of_old(&insn, &old).code(), Code::Bsf_r32_rm32);
        assert!(decode(&insn, Mode::Code64, &old).is_some());
    }
}
