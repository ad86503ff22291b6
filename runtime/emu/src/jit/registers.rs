//! Vector registers between the `Cpu` and the host (J16).
//!
//! Upper halves of YMM registers are seldom in use, so they are moved only if one of them is not zero: half the work, and on
//! processors that keep track, legacy SSE instructions stay free of a dependency on them.

use super::asm::{Asm, Code, Ea, Rm};
use super::layout::{AWAY, BIAS, CPU, WIDE, ymm};

const REGISTERS: u8 = 16;
/// MOVAPS to a register, and to memory; with VEX, VMOVAPS.
const TO_REGISTER: u8 = 0x28;
const TO_MEMORY: u8 = 0x29;

/// Takes them from memory. Destroys rax and EFLAGS.
pub fn load(asm: &mut Asm, avx: bool) {
    let wide = avx.then(|| any_upper(asm));
    if avx {
        vzeroupper(asm);
    }
    for register in 0..REGISTERS {
        lower(asm, TO_REGISTER, register);
    }
    set(asm, WIDE, 0);
    if let Some(wide) = wide {
        let over = asm.jmp();
        asm.land(wide);
        for register in 0..REGISTERS {
            whole(asm, TO_REGISTER, register);
        }
        set(asm, WIDE, 1);
        asm.land(over);
    }
    set(asm, AWAY, 0);
}

/// Puts them to memory. Destroys EFLAGS.
pub fn save(asm: &mut Asm, avx: bool) {
    let wide = avx.then(|| {
        asm.op(Code::one(0x80), 7, Rm::Mem(Ea::cpu(WIDE))); // cmp byte [wide], 0
        asm.bytes(&[0]);
        asm.jcc(5)
    });
    for register in 0..REGISTERS {
        lower(asm, TO_MEMORY, register);
    }
    if let Some(wide) = wide {
        let over = asm.jmp();
        asm.land(wide);
        for register in 0..REGISTERS {
            whole(asm, TO_MEMORY, register);
        }
        vzeroupper(asm);
        asm.land(over);
    }
    set(asm, AWAY, 1);
}

/// Whether a bit of any upper half in memory is set: the jump to be taken then. Destroys vector registers.
fn any_upper(asm: &mut Asm) -> usize {
    const CHAINS: u8 = 4;
    let sse = |asm: &mut Asm, op, register, rm| {
        asm.op(Code { p66: true, map: 1, ..Code::one(op) }, register, rm);
    };
    for register in 0..REGISTERS {
        let upper = Rm::Mem(Ea::cpu(ymm(register) + 16));
        // MOVDQA, then POR.
        let op = if register < CHAINS { 0x6f } else { 0xeb };
        sse(asm, op, register % CHAINS, upper);
    }
    for chain in 1..CHAINS {
        sse(asm, 0xeb, 0, Rm::Reg(chain));
    }
    sse(asm, 0xef, 1, Rm::Reg(1)); // pxor
    sse(asm, 0x74, 0, Rm::Reg(1)); // pcmpeqb
    sse(asm, 0xd7, 0, Rm::Reg(0)); // pmovmskb eax, xmm0
    asm.bytes(&[0x3d]); // cmp eax, all of them
    asm.imm32(0xffff);
    asm.jcc(5)
}

fn lower(asm: &mut Asm, opcode: u8, register: u8) {
    asm.op(Code { map: 1, ..Code::one(opcode) }, register, Rm::Mem(Ea::cpu(ymm(register))));
}

fn whole(asm: &mut Asm, opcode: u8, register: u8) {
    const { assert!(CPU >= 8 && CPU & 7 != 4) };
    // Three bytes of VEX: 256 bits, map 1.
    let inverted = if register < 8 { 0x80 } else { 0 };
    asm.bytes(&[0xc4, inverted | 0x41, 0x7c, opcode]);
    asm.bytes(&[0x80 | (register & 7) << 3 | CPU & 7]);
    asm.imm32(ymm(register) - BIAS);
}

fn vzeroupper(asm: &mut Asm) {
    asm.bytes(&[0xc5, 0xf8, 0x77]);
}

fn set(asm: &mut Asm, field: i32, value: u8) {
    asm.op(Code::one(0xc6), 0, Rm::Mem(Ea::cpu(field)));
    asm.bytes(&[value]);
}
