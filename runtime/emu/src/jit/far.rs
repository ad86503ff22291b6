//! Direct jumps and calls to other pages (J18), and indirect ones that seldom go elsewhere than they did (J20).
//!
//! Where such a jump goes is a matter of the mapping. It is linked all the same, and looks first whether it is where it was
//! linked, and whether the tag is the one of then. Otherwise it goes by the jump cache, and once in a while is linked anew.
//! The tag is each vCPU's own, in a slot, and so is where an indirect one goes. Where a direct one goes is the same for all of them.

use super::asm::host::{RAX, RCX, RDX};
use super::asm::{Code, Ea, Rm};
use super::layout::{self, LINKS, PAGE, PATIENCE, link_address, link_code, link_tag};
use super::links::{FarLink, Goes};
use super::translate::{Cold, Translator};
use crate::op::Op;

/// A jump that goes elsewhere than it is linked to.
pub(super) struct Unlinked {
    /// The jumps to be taken then.
    jumps: [usize; 2],
    /// Relative to the page.
    target: i64,
    link: FarLink,
    /// It is a call, which goes on here.
    resume: Option<usize>,
}

/// An indirect jump or call between its look and its hit.
pub(super) struct AsBefore {
    jumps: [usize; 2],
    link: FarLink,
}

/// An indirect jump or call that goes elsewhere than it did, to the address in rcx.
pub(super) struct Elsewhere {
    jumps: [usize; 2],
    link: FarLink,
    pub(super) op: usize,
    /// It is a call, which goes on here.
    resume: Option<usize>,
}

/// Opcodes.
pub(super) const JUMP: u8 = 0xe9;
pub(super) const CALL: u8 = 0xe8;

impl Translator {
    /// Goes on in another page, at `target` relative to this one. Flags are in memory.
    pub(super) fn jump_far(&mut self, target: i64) {
        let unlinked = self.far_link(target, JUMP);
        self.cold.push(Cold::Unlinked(unlinked));
    }

    /// The same as a call of the host, which returns to what is made next.
    pub(super) fn call_far(&mut self, target: i64) {
        let unlinked = self.far_link(target, CALL);
        let resume = Some(self.asm.here());
        self.cold.push(Cold::Unlinked(Unlinked { resume, ..unlinked }));
    }

    fn far_link(&mut self, target: i64, opcode: u8) -> Unlinked {
        let page = self.page;
        let next = page.wrapping_add(target as u64) & !0xfff;
        self.page_and(page, Code::wide(0x81), 7, 0x39); // cmp
        let moved = self.asm.jcc(5);
        let slot = self.next_slot;
        self.asm.load(RAX, Ea::cpu(LINKS));
        let changed = self.compare_linked_tag(slot);
        self.page_and(next, Code::wide(0xc7), 0, 0x89); // mov
        self.asm.keep_in_line(1);
        self.asm.byte(opcode);
        self.asm.imm32(0);
        let site = self.asm.place(self.asm.here() - 4) as u32;
        let link = self.far_link_to(Goes::To { target: page.wrapping_add(target as u64), site });
        Unlinked { jumps: [moved, changed], target, link, resume: None }
    }

    /// Looks whether the op goes to the address in rcx as it did before, and the link counts. Otherwise it is out of the way
    /// until [`Translator::go_as_before`].
    pub(super) fn goes_as_before(&mut self) -> AsBefore {
        let link = self.far_link_to(Goes::Anywhere);
        self.asm.load(RAX, Ea::cpu(LINKS));
        self.asm.op(Code::wide(0x3b), RCX, Rm::Mem(Ea::at(RAX, link_address(link.slot)))); // cmp
        let elsewhere = self.asm.jcc(5);
        let changed = self.compare_linked_tag(link.slot);
        AsBefore { jumps: [elsewhere, changed], link }
    }

    /// The jump or call (by its opcode) to where it went before. The slots start at rax still.
    pub(super) fn go_as_before(&mut self, before: AsBefore, opcode: u8) {
        let AsBefore { jumps, link } = before;
        self.asm.op(Code::one(0x8b), RAX, Rm::Mem(Ea::at(RAX, link_code(link.slot))));
        self.asm.op(Code::wide(0x03), RAX, Rm::Mem(Ea::cpu(layout::CODE)));
        let resume = match opcode {
            CALL => {
                self.call_rax();
                Some(self.asm.here())
            }
            _ => {
                self.jump_rax();
                None
            }
        };
        self.cold.push(Cold::Elsewhere(Elsewhere { jumps, link, op: self.current, resume }));
    }

    /// Goes by the jump cache. What that does not have is the handler's, after which the jump is linked to it.
    pub(super) fn elsewhere(&mut self, elsewhere: Elsewhere, op: &Op) {
        for jump in elsewhere.jumps {
            self.asm.land(jump);
        }
        self.jump_slot();
        self.compare_address();
        let absent = self.asm.jcc(5);
        self.compare_tag();
        let stale = self.asm.jcc(5);
        self.count(layout::COUNTED_JUMP_HITS);
        self.load_code();
        match elsewhere.resume {
            Some(resume) => {
                let room = self.push_return(op);
                self.call_rax();
                self.asm.jmp_to(resume);
                self.make_room(room);
            }
            None => {
                self.enter_page();
                self.jump_rax();
            }
        }
        self.asm.land(absent);
        self.asm.land(stale);
        self.asm.op(Code::one(0xc7), 0, Rm::Mem(Ea::cpu(layout::LINKING))); // mov
        let record = self.asm.here();
        self.asm.imm32(0);
        self.call_op(elsewhere.op);
        // It never says "next".
        self.asm.bytes(&[0x0f, 0x0b]);
        let place = self.record(elsewhere.link.to_bytes());
        self.asm.set_imm32(record, place as i32);
    }

    /// Compares the tag of now with the one of a link, whose slots start at rax: the jump to be taken if it is another one.
    /// Destroys rdx.
    fn compare_linked_tag(&mut self, slot: u32) -> usize {
        let current = Ea::cpu(layout::jump_tag(usize::from(self.upper)));
        self.asm.op(Code::one(0x8b), RDX, Rm::Mem(current));
        self.asm.op(Code::one(0x3b), RDX, Rm::Mem(Ea::at(RAX, link_tag(slot)))); // cmp
        let changed = self.asm.jcc(5);
        self.count(layout::COUNTED_JUMP_HITS);
        changed
    }

    /// An instruction with the current page and `page`, for which there is an opcode for immediates of 32 bits, and one for
    /// registers. Destroys rdx.
    fn page_and(&mut self, page: u64, immediate: Code, digit: u8, by_register: u8) {
        let current = Rm::Mem(Ea::cpu(PAGE));
        match i32::try_from(page as i64) {
            Ok(page) => {
                self.asm.op(immediate, digit, current);
                self.asm.imm32(page);
            }
            Err(_) => {
                self.asm.mov_imm64(RDX, page);
                self.asm.op(Code::wide(by_register), RDX, current);
            }
        }
    }

    /// Goes by the jump cache, or the dispatcher.
    pub(super) fn unlinked(&mut self, unlinked: Unlinked) {
        for jump in unlinked.jumps {
            self.asm.land(jump);
        }
        self.address_of(unlinked.target);
        self.jump_slot();
        self.compare_address();
        let absent = self.asm.jcc(5);
        self.compare_tag();
        let stale = self.asm.jcc(5);
        self.asm.op(Code::one(0xff), 1, Rm::Mem(Ea::cpu(PATIENCE))); // dec
        let enough = self.asm.jcc(8);
        self.count(layout::COUNTED_JUMP_HITS);
        self.load_code();
        self.enter_page();
        match unlinked.resume {
            Some(resume) => {
                self.call_rax();
                self.asm.jmp_to(resume);
            }
            None => self.jump_rax(),
        }
        for jump in [absent, stale, enough] {
            self.asm.land(jump);
        }
        self.leave_by(unlinked.link.to_bytes(), self.stubs.exit_far);
    }
}
