//! Transfers of control: links inside a page, the jump cache for everything else.

use super::asm::host::{RAX, RCX, RDX};
use super::asm::{Code, Ea, Rm};
use super::env::JUMPS as ENTRIES;
use super::layout::{self, GUEST_SP, JUMPS, PAGE, RIP, TARGET, TARGET_PAGE};
use super::plan::{ALL, Kind, Mem, Plan};
use super::translate::Translator;
use crate::op::Op;

const PAGE_SIZE: i64 = 4096;

impl Translator {
    pub(super) fn transfer(&mut self, op: &Op, plan: &Plan) {
        let target = op.imm as i64;
        match plan.kind {
            Kind::Jump => self.go_to(target),
            Kind::Branch { condition } => {
                self.need_flags(ALL);
                let jump = self.asm.jcc(condition);
                match in_page(target) {
                    Some(target) => self.link(jump, target),
                    None => self.far_later(jump, target),
                }
                self.go_to(op.end.into());
            }
            Kind::CallNear => {
                self.keep_flags(ALL);
                self.push_return(op);
                self.asm.lea(GUEST_SP, Ea::at(GUEST_SP, -8));
                self.go_to(target);
            }
            Kind::JumpIndirect { register } => {
                self.keep_flags(ALL);
                self.load_target(op, register);
                self.look_up();
                self.enter_page();
                self.asm.op(Code::one(0xff), 4, Rm::Mem(Ea::at(RAX, 16)));
            }
            Kind::CallIndirect { register } => {
                self.keep_flags(ALL);
                self.load_target(op, register);
                self.look_up();
                self.asm.load(RDX, Ea::at(RAX, 16));
                self.asm.store(Ea::cpu(TARGET), RDX);
                self.page_of_target();
                self.asm.store(Ea::cpu(TARGET_PAGE), RCX);
                self.push_return(op);
                self.asm.lea(GUEST_SP, Ea::at(GUEST_SP, -8));
                self.asm.load(RCX, Ea::cpu(TARGET_PAGE));
                self.asm.store(Ea::cpu(PAGE), RCX);
                self.asm.op(Code::one(0xff), 4, Rm::Mem(Ea::cpu(TARGET)));
            }
            Kind::Return => {
                self.keep_flags(ALL);
                self.asm.mov(RCX, GUEST_SP);
                self.probe_at(Mem::Read, 8);
                self.asm.load(RCX, Ea::at(RCX, 0));
                self.look_up();
                // 8 and 16 bits of immediate fit.
                self.asm.lea(GUEST_SP, Ea::at(GUEST_SP, 8 + op.imm as i32));
                self.enter_page();
                self.asm.op(Code::one(0xff), 4, Rm::Mem(Ea::at(RAX, 16)));
            }
            _ => {}
        }
    }

    /// The target of an indirect transfer, in rcx.
    fn load_target(&mut self, op: &Op, register: Option<u8>) {
        match register {
            Some(register) => {
                let host = self.source(register, RCX);
                if host != RCX {
                    self.asm.mov(RCX, host);
                }
            }
            None => {
                self.probe(op, Mem::Read, 8);
                self.asm.load(RCX, Ea::at(RCX, 0));
            }
        }
    }

    /// Stores the return address below the stack pointer, which stays.
    fn push_return(&mut self, op: &Op) {
        self.asm.lea(RCX, Ea::at(GUEST_SP, -8));
        self.probe_at(Mem::Write, 8);
        self.asm.load(RAX, Ea::cpu(PAGE));
        self.asm.lea(RAX, Ea::at(RAX, op.end.into()));
        self.asm.store(Ea::at(RCX, 0), RAX);
    }

    /// The entry of the jump cache for the address in rcx, in rax.
    fn jump_slot(&mut self) {
        self.asm.mov32(RAX, RCX);
        self.asm.bytes(&[0xc1, 0xe8, 11]); // shr eax, 11
        self.asm.op(Code::one(0x31), RCX, Rm::Reg(RAX)); // xor eax, ecx
        self.asm.code.push(0x25); // and eax, mask
        self.asm.imm32(ENTRIES as i32 - 1);
        self.asm.bytes(&[0xc1, 0xe0, 5]); // shl eax, 5
        self.asm.op(Code::wide(0x03), RAX, Rm::Mem(Ea::cpu(JUMPS)));
    }

    /// Finds the code for the address in rcx: the entry of the jump cache, in rax. Otherwise the op's handler
    /// does it all. Keeps rcx.
    fn look_up(&mut self) {
        self.jump_slot();
        self.asm.op(Code::wide(0x3b), RCX, Rm::Mem(Ea::at(RAX, 0)));
        self.miss_if(5);
        self.asm.load(RDX, Ea::cpu(layout::jump_tag(usize::from(self.upper))));
        self.asm.op(Code::wide(0x3b), RDX, Rm::Mem(Ea::at(RAX, 8)));
        self.miss_if(5);
        self.count(layout::COUNTED_JUMP_HITS);
    }

    fn page_of_target(&mut self) {
        self.asm.op(Code::wide(0x81), 4, Rm::Reg(RCX)); // and rcx, -4096
        self.asm.imm32(-4096);
    }

    /// The page of the address in rcx is the current one from now on.
    fn enter_page(&mut self) {
        self.page_of_target();
        self.asm.store(Ea::cpu(PAGE), RCX);
    }

    /// Goes on at `target`, relative to the page.
    pub(super) fn go_to(&mut self, target: i64) {
        match in_page(target) {
            Some(target) => {
                let jump = self.asm.jmp();
                self.link(jump, target);
            }
            None => {
                self.keep_flags(ALL);
                self.jump_far(target);
            }
        }
    }

    /// Goes on in another page. Flags are in memory.
    pub(super) fn jump_far(&mut self, target: i64) {
        self.address_of(target);
        self.jump_slot();
        self.asm.op(Code::wide(0x3b), RCX, Rm::Mem(Ea::at(RAX, 0)));
        let first = self.asm.jcc(5);
        self.asm.load(RDX, Ea::cpu(layout::jump_tag(usize::from(self.upper))));
        self.asm.op(Code::wide(0x3b), RDX, Rm::Mem(Ea::at(RAX, 8)));
        let second = self.asm.jcc(5);
        self.count(layout::COUNTED_JUMP_HITS);
        self.enter_page();
        self.asm.op(Code::one(0xff), 4, Rm::Mem(Ea::at(RAX, 16)));
        self.asm.land(first);
        self.asm.land(second);
        self.asm.far(0xe9, self.stubs.exit_to);
    }

    /// Leaves for the dispatcher, to go on at `target`.
    pub(super) fn leave_to(&mut self, target: i64) {
        self.keep_flags(ALL);
        self.address_of(target);
        self.asm.far(0xe9, self.stubs.exit_to);
    }

    /// The virtual address of `target`, in rcx.
    fn address_of(&mut self, target: i64) {
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

/// The offset in the page, if `target` lies in it.
fn in_page(target: i64) -> Option<u16> {
    if (0..PAGE_SIZE).contains(&target) { u16::try_from(target).ok() } else { None }
}

// `exit_to` takes the address from rcx.
const _: i32 = RIP;
