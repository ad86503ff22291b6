//! Calls and returns of the guest as calls and returns of the host, whose processor foresees where they go (J17).
//!
//! A call leaves a pair on the host's stack: the return address of the guest, and below it, by the host's own call, the
//! place in the caller's block where that goes on. A return that finds the guest's address in the topmost pair is
//! the host's own. One that does not has no use for any of the pairs, and goes by the jump cache.

use super::asm::host::{RAX, RCX, RDX, RSP};
use super::asm::{Asm, Code, Ea, Rm};
use super::far::CALL;
use super::flow::{at_fixed_place, in_page};
use super::layout::{self, GUEST_SP, PAGE, PUSHED, STACK, STACK_FLOOR, TARGET};
use super::plan::{ALL, Plan};
use super::translate::{At, Cold, Translator};
use crate::op::Op;

/// Bytes of a pair. The stack stays aligned to 16.
pub const PAIR: u8 = 16;
/// Calls on the stack at a time. Those that do not fit take all others along.
pub const DEPTH: usize = 1024;

/// The pair at the bottom, which no return may go beyond: whoever returns to address 0 finds it, and goes where
/// the jump that is returned is made to go, with that address in rcx. Destroys rax.
pub fn make_bottom(asm: &mut Asm) -> usize {
    asm.bytes(&[0x6a, 0]); // push 0
    asm.bytes(&[0x48, 0x8d, 0x05]); // lea rax, [rip + ...]
    asm.imm32(0);
    let place = asm.here() - 4;
    asm.bytes(&[0x50]); // push rax
    asm.store(Ea::cpu(STACK), RSP);
    asm.lea(RAX, Ea::at(RSP, -((DEPTH * usize::from(PAIR)) as i32)));
    asm.store(Ea::cpu(STACK_FLOOR), RAX);
    place
}

/// The jump to be taken if there is no room for a pair, and where to go on when there is.
pub(super) struct Room {
    full: usize,
    resume: usize,
}

impl Translator {
    /// Calls `target`, relative to the page. The return address goes to `place`; flags are in memory.
    pub(super) fn call_near(&mut self, op: &Op, target: i64, place: Ea) {
        self.asm.load(RAX, Ea::cpu(PAGE));
        self.asm.lea(RAX, Ea::at(RAX, op.end.into()));
        self.asm.store(place, RAX);
        self.asm.lea(GUEST_SP, Ea::at(GUEST_SP, -8));
        if target == i64::from(op.end) {
            // Whoever wants to know where it is. It will not return.
            return self.go_to(target);
        }
        if in_page(op.end.into()).is_none() {
            return self.go_to(target);
        }
        let room = self.note_return(RAX);
        match in_page(target) {
            Some(target) => {
                self.asm.keep_in_line(1);
                let call = self.asm.call();
                self.link_call(call, target);
            }
            None => {
                self.call_far(target);
            }
        }
        self.return_here(op, room);
    }

    /// Calls what `register` or the operand says. Flags are in memory.
    pub(super) fn call_indirect(&mut self, op: &Op, plan: &Plan, register: Option<u8>) {
        match register {
            Some(_) => {
                let place = self.access(op, plan, ALL);
                self.asm.lea(RDX, place);
                self.asm.store(Ea::cpu(PUSHED), RDX);
                self.load_target(op, plan, register);
            }
            None => {
                self.load_target(op, plan, register);
                self.asm.store(Ea::cpu(TARGET), RCX);
                let place = self.probe_pushed();
                self.asm.lea(RCX, place);
                self.asm.store(Ea::cpu(PUSHED), RCX);
                self.asm.load(RCX, Ea::cpu(TARGET));
            }
        }
        if in_page(op.end.into()).is_none() {
            self.look_up();
            self.push(op);
            return self.jump_rax();
        }
        if !at_fixed_place(op, register) {
            self.look_up();
            let room = self.push_return(op);
            self.call_rax();
            return self.return_here(op, room);
        }
        let before = self.goes_as_before();
        let room = self.push_return(op);
        self.go_as_before(before, CALL);
        self.return_here(op, room);
    }

    /// Pushes the return address of `op`, which goes to the address in rcx; it is in rdx then. Keeps rax.
    fn push(&mut self, op: &Op) {
        self.asm.load(RDX, Ea::cpu(PAGE));
        self.asm.lea(RDX, Ea::at(RDX, op.end.into()));
        self.enter_page();
        self.asm.load(RCX, Ea::cpu(PUSHED));
        self.asm.store(Ea::at(RCX, 0), RDX);
        self.asm.lea(GUEST_SP, Ea::at(GUEST_SP, -8));
    }

    /// The same, for a call that leaves a pair.
    pub(super) fn push_return(&mut self, op: &Op) -> Room {
        self.push(op);
        self.note_return(RDX)
    }

    /// Returns to the address at `place`. Flags are in memory.
    pub(super) fn go_back(&mut self, op: &Op, place: Ea) {
        // 8 and 16 bits of immediate fit.
        let above = Ea::at(GUEST_SP, 8 + op.imm as i32);
        self.asm.load(RCX, place);
        self.asm.op(Code::wide(0x3b), RCX, Rm::Mem(Ea::at(RSP, 8)));
        let elsewhere = self.asm.jcc(5);
        self.count(layout::COUNTED_RETURNS);
        self.asm.lea(GUEST_SP, above);
        self.asm.bytes(&[0xc3]);
        self.asm.land(elsewhere);
        self.asm.load(RSP, Ea::cpu(STACK));
        self.look_up();
        self.asm.lea(GUEST_SP, above);
        self.enter_page();
        self.jump_rax();
    }

    /// Half of the pair: the guest's return address, in `address`. If that is in another page there is to be no pair.
    fn note_return(&mut self, address: u8) -> Room {
        self.asm.op(Code::wide(0x3b), RSP, Rm::Mem(Ea::cpu(STACK_FLOOR)));
        let full = self.asm.jcc(6);
        let resume = self.asm.here();
        self.asm.bytes(&[0x50 | address]);
        Room { full, resume }
    }

    /// Drops all pairs, out of the way, if there is no room for one more.
    pub(super) fn make_room(&mut self, room: Room) {
        self.asm.land(room.full);
        self.asm.load(RSP, Ea::cpu(STACK));
        self.asm.jmp_to(room.resume);
    }

    pub(super) fn call_rax(&mut self) {
        self.asm.op(Code::one(0xff), 2, Rm::Reg(RAX));
    }

    /// Where the host returns to from a call for whose pair there is `room`, or none.
    fn return_here(&mut self, op: &Op, room: Room) {
        self.cold.push(Cold::Room(room));
        self.asm.bytes(&[0x59]); // pop rcx: the guest's address
        self.asm.lea(RCX, Ea::at(RCX, -i32::from(op.end)));
        self.asm.store(Ea::cpu(PAGE), RCX);
        self.at = Some(At::Memory);
        self.go_to(op.end.into());
    }
}
