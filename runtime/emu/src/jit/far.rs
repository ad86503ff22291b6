//! Direct jumps and calls to other pages (J18), and indirect ones that seldom go elsewhere than they did (J20).
//!
//! Where such a jump goes is a matter of the mapping. It is linked all the same, and looks first whether it is where it was
//! linked, and whether the tag is the one of then. Otherwise it goes by the jump cache, and once in a while is linked anew.

use super::asm::host::{RAX, RCX};
use super::asm::{Code, Ea, Rm};
use super::layout::{self, PAGE, PATIENCE};
use super::translate::{Cold, Goes, Translator};
use crate::op::Op;

/// A jump that goes elsewhere than it is linked to.
pub(super) struct Unlinked {
    /// The jumps to be taken then.
    jumps: [usize; 2],
    /// Relative to the page.
    target: i64,
    number: u32,
    /// It is a call, which goes on here.
    resume: Option<usize>,
}

/// An indirect jump or call between its look and its hit.
pub(super) struct AsBefore {
    jumps: [usize; 2],
    /// Places in the arena.
    address: u32,
    tag: usize,
}

/// An indirect jump or call that goes elsewhere than it did, to the address in rcx.
pub(super) struct Elsewhere {
    jumps: [usize; 2],
    number: u32,
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
        let (tag, changed) = self.compare_linked_tag();
        self.page_and(next, Code::wide(0xc7), 0, 0x89); // mov
        let site = self.linked(opcode);
        let number = self.add_far_link(site, tag, Goes::To(page.wrapping_add(target as u64)));
        Unlinked { jumps: [moved, changed], target, number, resume: None }
    }

    /// Looks whether the op goes to the address in rcx as it did before, and the link counts. Otherwise it is out of the way
    /// until [`Translator::go_as_before`].
    pub(super) fn goes_as_before(&mut self) -> AsBefore {
        self.asm.mov_imm64(RAX, 0);
        let address = self.asm.place(self.asm.here() - 8) as u32;
        self.asm.op(Code::wide(0x39), RAX, Rm::Reg(RCX)); // cmp
        let elsewhere = self.asm.jcc(5);
        let (tag, changed) = self.compare_linked_tag();
        AsBefore { jumps: [elsewhere, changed], address, tag }
    }

    /// The jump or call (by its opcode) to where it went before.
    pub(super) fn go_as_before(&mut self, before: AsBefore, opcode: u8) {
        let site = self.linked(opcode);
        let number =
            self.add_far_link(site, before.tag, Goes::Anywhere { address: before.address });
        let resume = (opcode == CALL).then(|| self.asm.here());
        self.cold.push(Cold::Elsewhere(Elsewhere {
            jumps: before.jumps,
            number,
            op: self.current,
            resume,
        }));
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
        self.asm.imm32(elsewhere.number as i32 + 1);
        self.call_op(elsewhere.op);
        // It never says "next".
        self.asm.bytes(&[0x0f, 0x0b]);
    }

    /// Compares the tag of now with the one of a link: where that is, and the jump to be taken if it is another one.
    fn compare_linked_tag(&mut self) -> (usize, usize) {
        let current = Ea::cpu(layout::jump_tag(usize::from(self.upper)));
        self.asm.op(Code::one(0x81), 7, Rm::Mem(current)); // cmp
        let tag = self.asm.here();
        self.asm.imm32(crate::mmu::NO_JUMP as i32);
        let changed = self.asm.jcc(5);
        self.count(layout::COUNTED_JUMP_HITS);
        (tag, changed)
    }

    /// The linked jump or call itself. While no tag fits, nobody comes there.
    fn linked(&mut self, opcode: u8) -> usize {
        self.asm.bytes(&[opcode]);
        self.asm.imm32(0);
        self.asm.here() - 4
    }

    /// An instruction with the current page and `page`, for which there is an opcode for immediates of 32 bits, and one for
    /// registers.
    fn page_and(&mut self, page: u64, immediate: Code, digit: u8, by_register: u8) {
        let current = Rm::Mem(Ea::cpu(PAGE));
        match i32::try_from(page as i64) {
            Ok(page) => {
                self.asm.op(immediate, digit, current);
                self.asm.imm32(page);
            }
            Err(_) => {
                self.asm.mov_imm64(RAX, page);
                self.asm.op(Code::wide(by_register), RAX, current);
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
        self.asm.mov_eax(unlinked.number);
        self.asm.far(0xe9, self.stubs.exit_far);
    }
}
