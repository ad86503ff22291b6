//! Transfers of control: links inside a page, the jump cache for everything else.

use std::mem::offset_of;

use super::asm::host::{RAX, RCX, RDX};
use super::asm::{Code, Ea, Rm};
use super::env::Jump;
use super::far::JUMP;
use super::layout::{self, JUMPS, PAGE, PAGE_SIZE, RIP};
use super::plan::{ALL, Kind, Plan};
use super::translate::Translator;
use crate::op::{Op, reg};

/// Fields of an entry of the jump cache.
const ADDRESS: i32 = offset_of!(Jump, address) as i32;
const TAG: i32 = offset_of!(Jump, tag) as i32;
const CODE: i32 = offset_of!(Jump, code) as i32;

impl Translator {
    pub(super) fn transfer(&mut self, op: &Op, plan: &Plan) {
        let target = op.imm as i64;
        match plan.kind {
            Kind::Jump => self.go_to(target),
            Kind::Branch { condition } => {
                self.need_flags(ALL);
                match self.follows {
                    // Back to where the block starts, which follows here as well.
                    Some(next) if next != op.end => self.branch(condition ^ 1, op.end.into()),
                    Some(_) => self.branch(condition, target),
                    None => {
                        self.branch(condition, target);
                        self.go_to(op.end.into());
                    }
                }
            }
            Kind::CallNear => {
                self.keep_flags(ALL);
                let place = self.access(op, plan, ALL);
                self.call_near(op, target, place);
            }
            Kind::JumpIndirect { register } => {
                self.keep_flags(ALL);
                self.load_target(op, plan, register);
                if at_fixed_place(op, register) {
                    let before = self.goes_as_before();
                    self.enter_page();
                    return self.go_as_before(before, JUMP);
                }
                self.look_up();
                self.enter_page();
                self.jump_rax();
            }
            Kind::CallIndirect { register } => {
                self.keep_flags(ALL);
                self.call_indirect(op, plan, register);
            }
            Kind::Return => {
                self.keep_flags(ALL);
                let place = self.access(op, plan, ALL);
                self.go_back(op, place);
            }
            _ => {}
        }
    }

    /// Goes to `target`, relative to the page, on `condition`. Flags are native.
    fn branch(&mut self, condition: u8, target: i64) {
        if let Some(target) = in_page(target) {
            self.asm.keep_in_line(2);
            let jump = self.asm.jcc(condition);
            self.link(jump, target);
        } else {
            let jump = self.asm.jcc(condition);
            self.far_later(jump, target);
        }
    }

    /// The target of an indirect transfer, in rcx.
    pub(super) fn load_target(&mut self, op: &Op, plan: &Plan, register: Option<u8>) {
        match register {
            Some(register) => {
                let host = self.source(register, RCX);
                if host != RCX {
                    self.asm.mov(RCX, host);
                }
            }
            None => {
                let place = self.access(op, plan, ALL);
                self.asm.load(RCX, place);
            }
        }
    }

    /// The entry of the jump cache for the address in rcx, in rax.
    pub(super) fn jump_slot(&mut self) {
        self.asm.mov32(RAX, RCX);
        self.asm.bytes(&[0xc1, 0xe8, self.tables.jump_bits as u8]); // shr eax, bits of a number
        self.asm.op(Code::one(0x31), RCX, Rm::Reg(RAX)); // xor eax, ecx
        if !self.upper {
            self.asm.op(Code::one(0x33), RAX, Rm::Mem(Ea::cpu(layout::JUMP_SALT)));
        }
        self.asm.byte(0x25); // and eax, mask
        self.asm.imm32((1 << self.tables.jump_bits) - 1);
        const { assert!(size_of::<Jump>() == 1 << 4) };
        self.asm.bytes(&[0xc1, 0xe0, 4]); // shl eax, 4
        self.asm.op(Code::wide(0x03), RAX, Rm::Mem(Ea::cpu(JUMPS)));
    }

    /// Finds the code for the address in rcx by the jump cache: its address, in rax. Otherwise the op's handler
    /// does it all. Keeps rcx.
    pub(super) fn look_up(&mut self) {
        self.jump_slot();
        self.compare_address();
        self.miss_if(5);
        self.compare_tag();
        self.miss_if(5);
        self.count(layout::COUNTED_JUMP_HITS);
        self.load_code();
    }

    /// Compares the address of the entry of the jump cache at rax with rcx.
    pub(super) fn compare_address(&mut self) {
        self.asm.op(Code::wide(0x3b), RCX, Rm::Mem(Ea::at(RAX, ADDRESS)));
    }

    /// Compares its tag with the one that counts. Destroys rdx.
    pub(super) fn compare_tag(&mut self) {
        let tag = Ea::cpu(layout::jump_tag(usize::from(self.upper)));
        self.asm.op(Code::one(0x8b), RDX, Rm::Mem(tag));
        self.asm.op(Code::one(0x3b), RDX, Rm::Mem(Ea::at(RAX, TAG)));
    }

    /// The address of the code of the entry at rax, in rax.
    pub(super) fn load_code(&mut self) {
        self.asm.op(Code::one(0x8b), RAX, Rm::Mem(Ea::at(RAX, CODE)));
        self.asm.op(Code::wide(0x03), RAX, Rm::Mem(Ea::cpu(layout::CODE)));
    }

    pub(super) fn jump_rax(&mut self) {
        self.asm.op(Code::one(0xff), 4, Rm::Reg(RAX));
    }

    fn page_of_target(&mut self) {
        self.asm.op(Code::wide(0x81), 4, Rm::Reg(RCX)); // and rcx, -4096
        self.asm.imm32(-4096);
    }

    /// The page of the address in rcx is the current one from now on.
    pub(super) fn enter_page(&mut self) {
        self.page_of_target();
        self.asm.store(Ea::cpu(PAGE), RCX);
    }

    /// Goes on at `target`, relative to the page.
    pub(super) fn go_to(&mut self, target: i64) {
        match in_page(target) {
            Some(target) => {
                self.asm.keep_in_line(1);
                let jump = self.asm.jmp();
                self.link(jump, target);
            }
            None => {
                self.keep_flags(ALL);
                self.jump_far(target);
            }
        }
    }

    /// Leaves for the dispatcher, to go on at `target`.
    pub(super) fn leave_to(&mut self, target: i64) {
        self.keep_flags(ALL);
        self.address_of(target);
        self.asm.far(0xe9, self.stubs.exit_to);
    }

    /// The virtual address of `target`, in rcx.
    pub(super) fn address_of(&mut self, target: i64) {
        self.asm.load(RCX, Ea::cpu(PAGE));
        match i32::try_from(target) {
            Ok(distance) => self.asm.lea(RCX, Ea::at(RCX, distance)),
            Err(_) => {
                self.asm.mov_imm64(RAX, target as u64);
                self.asm.op(Code::wide(0x01), RAX, Rm::Reg(RCX));
            }
        }
    }
}

/// Does the op go where a pointer at a fixed place points to? Such are seldom changed: that is how functions of libraries are
/// called.
pub(super) fn at_fixed_place(op: &Op, register: Option<u8>) -> bool {
    register.is_none() && op.base == reg::BLOCK && op.index == reg::ZERO
}

/// The offset in the page, if `target` lies in it.
pub(super) fn in_page(target: i64) -> Option<u16> {
    if (0..PAGE_SIZE.into()).contains(&target) { u16::try_from(target).ok() } else { None }
}

// `exit_to` takes the address from rcx.
const _: i32 = RIP;
