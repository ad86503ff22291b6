//! Vector and x87 instructions in place, on the host's registers of the same names (J16).

use iced_x86::RflagsBits;

use super::asm::host::{RAX, RCX, RDX};
use super::asm::{Code, Ea, Rm};
use super::layout::{self, GUARD, host_of};
use super::place;
use super::plan::{CF, Flags, Kind, Mem, OF, PF, Plan, SF, ZF};
use super::translate::{Miss, Translator};
use crate::host::guard;
use crate::host::inline::{Inline, Names};
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
    let (mem, size, align) = match inline.memory {
        None => (Mem::None, 0, 0),
        Some(operand) if operand.access == Access::Read => (Mem::Read, operand.size, operand.align),
        Some(operand) => (Mem::Write, operand.size, operand.align),
    };
    Plan {
        kind: Kind::Vector,
        mem,
        size,
        align,
        reads: flags(inline.flags_read),
        kills: flags(inline.flags_written),
        sets: flags(inline.flags_modified) != 0,
        opcode,
    }
}

/// What is known of the vector unit at a place in a block.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Known {
    /// The guest's vector registers are in the host's.
    loaded: bool,
    /// [`layout::WIDE`] is set.
    wide: bool,
    /// Guard bits that are clear.
    clear: u8,
}

/// A look at the guard, and whether the registers are there, that failed.
#[derive(Debug, Clone, Copy)]
pub(super) struct GuardMiss {
    /// The guard bits that matter.
    class: u8,
    /// The registers are wanted.
    load: bool,
    /// Where to go on when they are there.
    back: usize,
}

impl Translator {
    pub(super) fn vector(&mut self, op: &Op, plan: &Plan, inline: &Inline, live: Flags) {
        // First of all: a handler that does what an access misses may do it in spite of the guard.
        self.look_at_guard(inline, live);
        let mut place = None;
        if inline.memory.is_some() {
            let at = self.access(op, plan, live);
            if inline.loads_control_word {
                self.load_control_word(at, live);
                return;
            }
            place = Some(at);
        }
        if inline.wide && !self.known.wide {
            self.set_wide();
            self.known.wide = true;
        }
        if plan.sets || plan.reads != 0 {
            self.need_flags(live);
        }
        for place in inline.moves.iter().flatten().filter(|place| place.load) {
            match host_of(place.guest) {
                Some(own) if own == place.host => {}
                Some(own) => self.asm.mov(place.host, own),
                None => self.asm.load(place.host, Ea::cpu(layout::gpr(place.guest))),
            }
        }
        match place {
            Some(at) => place::emit(&mut self.asm, inline.code(), inline.modrm(), at),
            None => self.asm.bytes(inline.code()),
        }
        // Backwards, so that of two equal destinations the first operand wins.
        for place in inline.moves.iter().rev().flatten().filter(|place| place.store) {
            match host_of(place.guest) {
                Some(own) if own == place.host => {}
                Some(own) => self.asm.mov(own, place.host),
                None => self.asm.store(Ea::cpu(layout::gpr(place.guest)), place.host),
            }
        }
        if plan.sets {
            self.flags_are_native();
        }
        if let Some(opcode) = inline.note {
            self.note_x87(op, inline, opcode);
        }
    }

    /// FLDCW, if the word at `place` masks all exceptions; others are the handler's, for which the guard changes. The word is
    /// copied, lest another vCPU changes it after the look.
    fn load_control_word(&mut self, place: Ea, live: Flags) {
        const MASKS: u8 = 0x3f;
        self.keep_flags(live);
        self.asm.op(Code { map: 1, ..Code::one(0xb7) }, RAX, Rm::Mem(place)); // movzx eax
        self.asm.store(Ea::cpu(layout::TARGET), RAX);
        self.asm.op(Code::one(0x83), 4, Rm::Reg(RAX)); // and eax, masks
        self.asm.bytes(&[MASKS]);
        self.asm.op(Code::one(0x83), 7, Rm::Reg(RAX)); // cmp eax, masks
        self.asm.bytes(&[MASKS]);
        self.miss_if(5);
        self.asm.op(Code::one(0xd9), 5, Rm::Mem(Ea::cpu(layout::TARGET))); // fldcw
        // Not so if the handler did it.
        self.known.clear &= !guard::PENDING;
    }

    /// Makes sure that the instruction may simply run and has its registers, unless that is known.
    fn look_at_guard(&mut self, inline: &Inline, live: Flags) {
        let load = inline.vectors && !self.known.loaded;
        let class = inline.class & !self.known.clear;
        if class == 0 && !load {
            return;
        }
        self.keep_flags(live);
        // test dword [guard], bits
        self.asm.op(Code::one(0xf7), 0, Rm::Mem(Ea::cpu(GUARD)));
        let bits = u32::from(class) | if load { layout::AWAY_BIT } else { 0 };
        self.asm.imm32(bits as i32);
        let jump = self.asm.jcc(5);
        let back = self.asm.here();
        self.misses.push(Miss::Guard { jump, miss: GuardMiss { class, load, back } });
        self.known.loaded |= load;
        // Without spans the block goes on where the handler did it all, with the guard as it was.
        if !self.plain {
            self.known.clear |= class;
        }
    }

    /// What happens if a look at the guard fails, behind the block: what denies the instruction is the handler's, or the
    /// block's without spans from this op, at offset `start`, on; registers are loaded. Returns whether the op has
    /// been called, which is the last thing then.
    pub(super) fn guard_miss(&mut self, op: usize, start: u16, miss: GuardMiss) -> bool {
        let GuardMiss { class, load, back } = miss;
        if load {
            let denied = (class != 0).then(|| {
                self.asm.op(Code::one(0xf6), 0, Rm::Mem(Ea::cpu(GUARD)));
                self.asm.bytes(&[class]);
                self.asm.jcc(5)
            });
            self.asm.far(0xe8, self.stubs.load_vectors);
            self.asm.jmp_to(back);
            let Some(denied) = denied else { return false };
            self.asm.land(denied);
        }
        if self.plain {
            self.call_op(op);
        } else {
            self.leave_spans(start);
        }
        self.plain
    }

    /// After a call out of the way of a block that goes on where `known` holds.
    pub(super) fn reload_vectors(&mut self, known: Known) {
        if known.loaded {
            self.asm.far(0xe8, self.stubs.load_vectors);
            if known.wide {
                self.set_wide();
            }
        }
    }

    fn set_wide(&mut self) {
        self.asm.op(Code::one(0xc6), 0, Rm::Mem(Ea::cpu(layout::WIDE)));
        self.asm.bytes(&[1]);
    }

    /// Notes where the x87 instruction is, which is done. Keeps the flags.
    fn note_x87(&mut self, op: &Op, inline: &Inline, opcode: u16) {
        if inline.memory.is_some() {
            let operand = self.address(op);
            self.asm.lea(RCX, operand);
            self.asm.store(Ea::cpu(layout::FDP), RCX);
        }
        if self.noted_next {
            return;
        }
        self.asm.load(RCX, Ea::cpu(layout::PAGE));
        self.asm.lea(RCX, Ea::at(RCX, op.start.into()));
        self.asm.store(Ea::cpu(layout::FIP), RCX);
        self.asm.op(Code { p66: true, ..Code::one(0xc7) }, 0, Rm::Mem(Ea::cpu(layout::FOP)));
        self.asm.bytes(&opcode.to_le_bytes());
    }
}
