//! Direct jumps and calls to other pages (J18).
//!
//! Where such a jump goes is a matter of the mapping. It is linked all the same, and looks first whether it is where it was
//! linked, and whether the tag is the one of then. Otherwise it goes by the jump cache, and once in a while is linked anew.

use super::asm::host::RAX;
use super::asm::{Code, Ea, Rm};
use super::layout::{self, PAGE, PATIENCE};
use super::translate::{Cold, Translator};

/// A jump to another page that goes elsewhere than it is linked to.
pub(super) struct Unlinked {
    /// The jumps to be taken then.
    jumps: [usize; 2],
    /// Relative to the page.
    target: i64,
    number: u32,
    /// It is a call, which goes on here.
    resume: Option<usize>,
}

impl Translator {
    /// Goes on in another page, at `target` relative to this one. Flags are in memory.
    pub(super) fn jump_far(&mut self, target: i64) {
        let unlinked = self.far_link(target, 0xe9);
        self.cold.push(Cold::Unlinked(unlinked));
    }

    /// The same as a call of the host, which returns to what is made next.
    pub(super) fn call_far(&mut self, target: i64) {
        let unlinked = self.far_link(target, 0xe8);
        let resume = Some(self.asm.here());
        self.cold.push(Cold::Unlinked(Unlinked { resume, ..unlinked }));
    }

    fn far_link(&mut self, target: i64, opcode: u8) -> Unlinked {
        let page = self.page;
        let next = page.wrapping_add(target as u64) & !0xfff;
        self.page_and(page, Code::wide(0x81), 7, 0x39); // cmp
        let moved = self.asm.jcc(5);
        let current = Ea::cpu(layout::jump_tag(usize::from(self.upper)));
        self.asm.op(Code::one(0x81), 7, Rm::Mem(current)); // cmp
        let tag = self.asm.here();
        self.asm.imm32(crate::mmu::NO_JUMP as i32);
        let changed = self.asm.jcc(5);
        self.count(layout::COUNTED_JUMP_HITS);
        self.page_and(next, Code::wide(0xc7), 0, 0x89); // mov
        // While no tag fits, nobody comes here.
        self.asm.bytes(&[opcode]);
        let site = self.asm.here();
        self.asm.imm32(0);
        let number = self.add_far_link(site, tag, target);
        Unlinked { jumps: [moved, changed], target, number, resume: None }
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
