//! What all blocks share: the way in, the ways out, the call of a handler.

use std::mem::offset_of;

use iced_x86::CpuidFeature;

use super::asm::host::{RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP};
use super::asm::{Asm, Code, Ea, Rm};
use super::env::CalledOp;
use super::layout::{AWAY, BIAS, CALLED, CC, CPU, PINNED, RIP, STACK, gpr, host_of};
use super::registers;
use super::returns;
use crate::block::Block;
use crate::cpu::{Cpu, Mode};
use crate::host::HostFeatures;
use crate::op::{Flow, reg};

/// Offsets in the arena.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stubs {
    pub enter: u32,
    /// rdx: the [`CalledOp`].
    pub call_op: u32,
    /// eax: the number of the link.
    pub exit_link: u32,
    /// ecx: the offset in the page of the block that was not entered. Flags are in memory, or native.
    pub exit_event: u32,
    pub exit_event_native: u32,
    /// eax: the offset in the page of a bridge to another page than the one that follows.
    pub exit_bridge: u32,
    /// eax: the offset in the page of a block whose code has changed. Flags are in memory.
    pub exit_changed: u32,
    /// rcx: where to go on.
    pub exit_to: u32,
    /// Called with the vector registers in memory, which are in the host's then. Destroys rax and EFLAGS.
    pub load_vectors: u32,
    /// The same, by the far link whose number is in eax.
    pub exit_far: u32,
}

/// How translated code was left: rax and rdx.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Exit {
    pub value: u64,
    pub kind: u64,
}

/// [`Exit::kind`].
pub mod exit {
    /// `value`: the link that was followed and is none yet.
    pub const LINK: u64 = 0;
    /// `value`: offset in the page of the block that was to be entered.
    pub const EVENT: u64 = 1;
    /// `Cpu::rip` is set.
    pub const TO: u64 = 2;
    /// The same; `value`: the far link that goes elsewhere, or nowhere.
    pub const FAR: u64 = 5;
    /// `value`: offset in the page of a bridge that goes to another page than the one that follows, as far as the
    /// TLB knows.
    pub const BRIDGE: u64 = 4;
    /// `value`: offset in the page of a block that is not of the code that is there now.
    pub const CHANGED: u64 = 6;
    /// `value`: the [`Flow`](crate::op::Flow) of the op in `JitEnv::called`.
    pub const FLOW: u64 = 3;
}

/// The way into translated code.
pub type Enter = unsafe extern "sysv64" fn(*mut Cpu, u64) -> Exit;

/// Calls the handler of an op. The result is its [`Flow`], or the address of the entry M to go on at. rdi, rsi, rdx as the stub has them.
///
/// # Safety
/// `cpu` is the vCPU that runs, to which no reference is in use; `op` lies in the arena; `block` is a block.
unsafe extern "sysv64" fn call_handler(
    cpu: *mut Cpu,
    op: *const CalledOp,
    block: *const Block,
) -> u64 {
    // SAFETY: the caller's promise.
    let (cpu, called, block) = unsafe { (&mut *cpu, &*op, &*block) };
    cpu.jit.calls.count(called.opcode);
    let flow = (called.op.handler)(cpu, &called.op, block);
    // While it talked to a device others did not wait for this vCPU: what spans know of stores is void (J14).
    if flow == Flow::Next && cpu.mmu.dropped_writes {
        return Flow::Break as u64;
    }
    // A transfer to where the dispatcher would find translated code and nothing to do.
    if flow == Flow::Jump
        && cpu.mode == Mode::Code64
        && !cpu.shadow
        && !cpu.stepping()
        && let Some(code) = cpu.jit.find(cpu.rip, cpu.mmu.tlb.jump_key(cpu.rip))
    {
        cpu.gpr[usize::from(reg::BLOCK)] = cpu.rip & !0xfff;
        cpu.jit.linking = 0;
        return code;
    }
    flow as u64
}

const SAVED: [u8; 6] = [RBX, RBP, 12, 13, 14, 15];

impl Stubs {
    /// Makes them; `block` is what handlers get for theirs, which they do not look at.
    pub fn make(asm: &mut Asm, block: *const Block) -> Self {
        let mut stubs = Self { enter: asm.here() as u32, ..Self::default() };
        for register in SAVED {
            push(asm, register);
        }
        asm.op(Code::wide(0x83), 5, Rm::Reg(RSP)); // sub rsp, 8
        asm.bytes(&[8]);
        asm.lea(CPU, Ea::at(RDI, BIAS));
        let bottom = returns::make_bottom(asm);
        asm.mov(RAX, RSI);
        load_all(asm);
        asm.bytes(&[0xff, 0xe0]); // jmp rax

        // What the bottom of the stack returns to has the address in rcx as well.
        asm.land(bottom);
        stubs.exit_to = asm.here() as u32;
        asm.store(Ea::cpu(RIP), RCX);
        mov_edx(asm, exit::TO);
        let to = asm.jmp();
        stubs.exit_far = asm.here() as u32;
        asm.store(Ea::cpu(RIP), RCX);
        mov_edx(asm, exit::FAR);
        let far = asm.jmp();
        stubs.exit_event_native = asm.here() as u32;
        asm.save_flags(CC);
        stubs.exit_event = asm.here() as u32;
        asm.mov32(RAX, RCX);
        mov_edx(asm, exit::EVENT);
        let event = asm.jmp();
        stubs.exit_bridge = asm.here() as u32;
        mov_edx(asm, exit::BRIDGE);
        let bridge = asm.jmp();
        stubs.exit_changed = asm.here() as u32;
        mov_edx(asm, exit::CHANGED);
        let changed = asm.jmp();
        stubs.exit_link = asm.here() as u32;
        mov_edx(asm, exit::LINK);
        asm.land(to);
        asm.land(far);
        asm.land(event);
        asm.land(bridge);
        asm.land(changed);
        store_all(asm);
        let exit_vectors = save_if_loaded(asm);
        let leave = asm.here();
        asm.load(RSP, Ea::cpu(STACK));
        asm.op(Code::wide(0x83), 0, Rm::Reg(RSP)); // add rsp, 8 and the bottom
        asm.bytes(&[8 + returns::PAIR]);
        for register in SAVED.into_iter().rev() {
            pop(asm, register);
        }
        asm.bytes(&[0xc3]);

        stubs.call_op = asm.here() as u32;
        store_all(asm);
        let call_vectors = save_if_loaded(asm);
        asm.store(Ea::cpu(CALLED), RDX);
        asm.mov(RSI, RDX);
        asm.lea(RDI, Ea::at(CPU, -BIAS));
        asm.mov_imm64(RDX, block as u64);
        asm.mov_imm64(RAX, call_handler as *const () as u64);
        asm.op(Code::wide(0x83), 5, Rm::Reg(RSP)); // the return address: sub rsp, 8
        asm.bytes(&[8]);
        asm.bytes(&[0xff, 0xd0]); // call rax
        asm.op(Code::wide(0x83), 0, Rm::Reg(RSP));
        asm.bytes(&[8]);
        asm.bytes(&[0x48, 0x85, 0xc0]); // test rax, rax
        const { assert!(Flow::Next as u8 == 0) };
        let other = asm.jcc(5);
        load_all(asm);
        asm.bytes(&[0xc3]);
        asm.land(other);
        // Not back to where the call came from, nor to any other call of the guest's (J17). The registers are in the Cpu.
        asm.load(RSP, Ea::cpu(STACK));
        asm.bytes(&[0x48, 0x3d]); // cmp rax, 255
        asm.imm32(255);
        let flow = asm.jcc(6);
        load_all(asm);
        asm.bytes(&[0xff, 0xe0]); // jmp rax
        asm.land(flow);
        mov_edx(asm, exit::FLOW);
        asm.jmp_to(leave);

        let avx = HostFeatures::detect().has(CpuidFeature::AVX);
        stubs.load_vectors = asm.here() as u32;
        registers::load(asm, avx);
        asm.bytes(&[0xc3]);
        for (call, back) in [exit_vectors, call_vectors] {
            asm.land(call);
            registers::save(asm, avx);
            asm.jmp_to(back);
        }
        stubs
    }
}

/// Looks whether the vector registers are in the host's: the jump to be taken then, and where to come back to.
fn save_if_loaded(asm: &mut Asm) -> (usize, usize) {
    asm.op(Code::one(0x80), 7, Rm::Mem(Ea::cpu(AWAY))); // cmp byte [away], 0
    asm.bytes(&[0]);
    let jump = asm.jcc(4);
    (jump, asm.here())
}

fn push(asm: &mut Asm, register: u8) {
    if register >= 8 {
        asm.bytes(&[0x41]);
    }
    asm.bytes(&[0x50 | register & 7]);
}

fn pop(asm: &mut Asm, register: u8) {
    if register >= 8 {
        asm.bytes(&[0x41]);
    }
    asm.bytes(&[0x58 | register & 7]);
}

fn mov_edx(asm: &mut Asm, value: u64) {
    asm.bytes(&[0xba]);
    asm.imm32(value as i32);
}

fn load_all(asm: &mut Asm) {
    for guest in PINNED {
        if let Some(host) = host_of(guest) {
            asm.load(host, Ea::cpu(gpr(guest)));
        }
    }
}

fn store_all(asm: &mut Asm) {
    for guest in PINNED {
        if let Some(host) = host_of(guest) {
            asm.store(Ea::cpu(gpr(guest)), host);
        }
    }
}

impl CalledOp {
    /// As it lies in memory.
    pub fn as_bytes(&self) -> &[u8] {
        // SAFETY: the value's own bytes. What padding it has is read back by nobody, and a copy of a value
        // may have any bytes there.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(self).cast(), size_of::<Self>()) }
    }
}

const _: () = assert!(offset_of!(CalledOp, op) == 0);
