//! Vector instructions in place. Their registers are in memory before and after each of them (invariant 12).

use iced_x86::RflagsBits;

use super::asm::host::{RAX, RCX, RDX};
use super::asm::{Code, Ea, Rm};
use super::layout::{self, GUARD, host_of, ymm};
use super::plan::{CF, Flags, Kind, Mem, OF, PF, Plan, SF, ZF};
use super::translate::Translator;
use crate::host::inline::{Inline, Move, Names};
use crate::mmu::Access;
use crate::op::Op;

/// Registers as translated code has them.
#[derive(Debug)]
pub struct Registers;

impl Names for Registers {
    fn general(&self, guest: u8) -> Option<u8> {
        host_of(guest)
    }
    const FREE: [u8; 2] = [RDX, RAX];
}

const AF: Flags = 4;

fn flags(bits: u32) -> Flags {
    [
        (RflagsBits::CF, CF),
        (RflagsBits::PF, PF),
        (RflagsBits::AF, AF),
        (RflagsBits::ZF, ZF),
        (RflagsBits::SF, SF),
        (RflagsBits::OF, OF),
    ]
    .into_iter()
    .filter(|(bit, _)| bits & bit != 0)
    .fold(0, |all, (_, flag)| all | flag)
}

/// The plan for `inline`, counted as `opcode`.
pub fn plan(inline: &Inline, opcode: u32) -> Plan {
    let (mem, size) = match inline.memory {
        None => (Mem::None, 0),
        Some(operand) if operand.access == Access::Read => (Mem::Read, operand.size),
        Some(operand) => (Mem::Write, operand.size),
    };
    Plan {
        kind: Kind::Vector,
        mem,
        size,
        reads: flags(inline.flags_read),
        kills: flags(inline.flags_written),
        sets: flags(inline.flags_modified) != 0,
        opcode,
    }
}

impl Translator {
    pub(super) fn vector(&mut self, op: &Op, plan: &Plan, inline: &Inline, live: Flags) {
        // First of all, so that a span can be relied on whatever comes of the rest.
        if inline.memory.is_some() {
            match self.access(op, plan, live) {
                Ea { base: Some(RCX), index: None, disp: 0 } => {}
                place => self.asm.lea(RCX, place),
            }
        }
        if inline.class != 0 {
            self.keep_flags(live);
            // test byte [guard], class
            self.asm.op(Code::one(0xf6), 0, Rm::Mem(Ea::cpu(GUARD)));
            self.asm.bytes(&[inline.class]);
            self.miss_if(5);
        }
        if let Some(operand) = inline.memory
            && operand.align != 0
        {
            self.keep_flags(live);
            self.asm.op(Code::one(0xf6), 0, Rm::Reg(RCX));
            self.asm.bytes(&[operand.align]);
            self.miss_if(5);
        }
        if plan.sets || plan.reads != 0 {
            self.need_flags(live);
        }
        for place in inline.moves.iter().flatten().filter(|place| place.load) {
            self.vector_move(place, inline.vex, 0x28);
        }
        self.asm.bytes(inline.code());
        // Backwards, so that of two equal destinations the first operand wins.
        for place in inline.moves.iter().rev().flatten().filter(|place| place.store) {
            self.vector_move(place, inline.vex, 0x29);
        }
        if inline.moves.iter().flatten().any(|place| !place.general && place.wide) {
            self.asm.bytes(&[0xc5, 0xf8, 0x77]); // vzeroupper
        }
        if plan.sets {
            self.flags_are_native();
        }
    }

    /// Loads (0x28) or stores (0x29) a register operand. Keeps the flags.
    fn vector_move(&mut self, place: &Move, vex: bool, opcode: u8) {
        if place.general {
            let ea = Ea::cpu(layout::gpr(place.guest));
            if opcode == 0x28 {
                self.asm.load(place.host, ea);
            } else {
                self.asm.store(ea, place.host);
            }
            return;
        }
        let offset = ymm(place.guest);
        if !vex {
            let code = Code { map: 1, ..Code::one(opcode) };
            self.asm.op(code, place.host, Rm::Mem(Ea::cpu(offset)));
            return;
        }
        // A VEX instruction has cleared the upper half, which is stored too.
        let wide = place.wide || opcode == 0x29;
        self.asm.bytes(&[0xc4, 0xc1, if wide { 0x7c } else { 0x78 }, opcode]);
        self.asm.bytes(&[0x80 | place.host << 3 | layout::CPU & 7]);
        self.asm.imm32(offset);
    }
}
