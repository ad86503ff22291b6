//! Which handler runs a system instruction.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::{
    control, debug, far, flag_ops, io, iret, misc, msr, paravirt, segment_ops, syscall, tables,
};
use crate::cpu::seg;
use crate::op::{Handler, Op};

/// Bit of [`Op::aux`]: the r/m operand is in memory. The low bits are the operand size in bytes.
pub(crate) const AUX_MEM: u8 = 0x80;
/// Bit of [`Op::aux`]: the port is an immediate.
pub(crate) const AUX_PORT_IMM: u8 = 0x40;
/// Bit of [`Op::aux`]: REP.
pub(crate) const AUX_REP: u8 = 0x20;
const AUX_SIZE: u8 = 0x0f;

/// Operand size in bytes.
#[inline]
pub(crate) fn operand_size(op: &Op) -> u8 {
    op.aux & AUX_SIZE
}

/// A system instruction, decoded: these fields go into the [`Op`]. The caller fills in the memory
/// operand (base, index, scale, displacement, segment), the address-size flags, start and end.
#[derive(Debug, Clone, Copy)]
pub struct SysOp {
    /// What runs it.
    pub handler: Handler,
    /// Must it be the last of its block?
    pub ends_block: bool,
    /// [`Op::dst`].
    pub dst: u8,
    /// [`Op::src`].
    pub src: u8,
    /// [`Op::aux`].
    pub aux: u8,
    /// [`Op::imm`].
    pub imm: u64,
}

impl SysOp {
    fn new(handler: Handler, ends_block: bool) -> Self {
        Self { handler, ends_block, dst: 0, src: 0, aux: 0, imm: 0 }
    }

    fn dst(self, register: Register) -> Self {
        Self { dst: register.number() as u8, ..self }
    }

    fn src(self, register: Register) -> Self {
        Self { src: register.number() as u8, ..self }
    }

    fn aux(self, bits: u8) -> Self {
        Self { aux: self.aux | bits, ..self }
    }

    fn imm(self, imm: u64) -> Self {
        Self { imm, ..self }
    }
}

/// Handler and operands of `insn`, if it is a system instruction.
pub fn decode(insn: &Instruction) -> Option<SysOp> {
    use Mnemonic as M;
    // An operation without operands that the block may go on after, or not.
    let go_on = |handler: Handler| Some(SysOp::new(handler, false));
    let end = |handler: Handler| Some(SysOp::new(handler, true));
    match insn.mnemonic() {
        M::Mov => move_special(insn),
        M::Push | M::Pop => push_pop_segment(insn),
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => Some(load_far(insn)),
        M::Jmp | M::Call => far_transfer(insn),
        M::Retf => {
            Some(SysOp::new(far::ret, true).aux(size_suffix(insn)).imm(insn.immediate16().into()))
        }
        M::Iret | M::Iretd | M::Iretq => Some(SysOp::new(iret::iret, true).aux(size_suffix(insn))),
        M::Int => Some(SysOp::new(misc::int, true).imm(insn.immediate8().into())),
        M::Int3 => Some(SysOp::new(misc::int3, true).imm(3)),
        M::Int1 => end(debug::int1),
        M::Into => end(misc::into),
        M::Bound => Some(rm(insn, misc::bound, false).dst(insn.op0_register())),
        M::Syscall => end(syscall::syscall),
        M::Sysret | M::Sysretq => {
            let size = if insn.mnemonic() == M::Sysretq { 8 } else { 4 };
            Some(SysOp::new(syscall::sysret, true).aux(size))
        }
        M::Sysenter => end(syscall::sysenter),
        M::Sysexit | M::Sysexitq => {
            let size = if insn.mnemonic() == M::Sysexitq { 8 } else { 4 };
            Some(SysOp::new(syscall::sysexit, true).aux(size))
        }
        M::Swapgs => go_on(syscall::swapgs),
        M::Rdfsbase | M::Rdgsbase => Some(read_base(insn)),
        M::Wrfsbase | M::Wrgsbase => Some(write_base(insn)),
        M::Lgdt => Some(rm(insn, tables::lgdt, false).aux(table_size(insn))),
        M::Lidt => Some(rm(insn, tables::lidt, false).aux(table_size(insn))),
        M::Sgdt => Some(rm(insn, tables::sgdt, false)),
        M::Sidt => Some(rm(insn, tables::sidt, false)),
        M::Lldt => Some(rm(insn, tables::lldt, false)),
        M::Ltr => Some(rm(insn, tables::ltr, false)),
        M::Sldt => Some(store_system(insn, tables::sldt)),
        M::Str => Some(store_system(insn, tables::str)),
        M::Smsw => Some(store_system(insn, control::smsw)),
        M::Lmsw => Some(SysOp { ends_block: true, ..rm(insn, control::lmsw, true) }),
        M::Lar => Some(look_at(insn, tables::lar)),
        M::Lsl => Some(look_at(insn, tables::lsl)),
        M::Verr => Some(rm(insn, tables::verr, false)),
        M::Verw => Some(rm(insn, tables::verw, false)),
        M::Arpl => {
            let op = rm(insn, tables::arpl, false);
            Some(SysOp { dst: op.src, ..op }.src(insn.op1_register()))
        }
        M::Clts => end(control::clts),
        M::Invlpg => Some(rm(insn, control::invlpg, true)),
        M::Invpcid => Some(rm(insn, control::invpcid, true).dst(insn.op0_register())),
        M::Invd | M::Wbinvd | M::Wbnoinvd => go_on(control::cache_control),
        M::Xgetbv => go_on(control::xgetbv),
        M::Xsetbv => end(control::xsetbv),
        M::Rdmsr => go_on(msr::rdmsr),
        M::Wrmsr => end(msr::wrmsr),
        M::Rdtsc => go_on(msr::rdtsc),
        M::Rdtscp => go_on(msr::rdtscp),
        M::Rdpid => Some(SysOp::new(msr::rdpid, false).dst(insn.op0_register())),
        M::Rdpmc => go_on(msr::rdpmc),
        M::Cpuid => go_on(misc::cpuid),
        M::Hlt => end(misc::hlt),
        M::Pause => end(misc::pause),
        M::Cli => go_on(flag_ops::cli),
        M::Sti => go_on(flag_ops::sti),
        M::Clac => go_on(flag_ops::set_ac),
        M::Stac => Some(SysOp::new(flag_ops::set_ac, false).aux(1)),
        M::Pushf | M::Pushfd | M::Pushfq => {
            Some(SysOp::new(flag_ops::pushf, false).aux(size_suffix(insn)))
        }
        M::Popf | M::Popfd | M::Popfq => {
            Some(SysOp::new(flag_ops::popf, false).aux(size_suffix(insn)))
        }
        M::In | M::Out => Some(port(insn)),
        M::Insb | M::Insw | M::Insd if insn.op1_kind() == OpKind::Register => {
            Some(port_string(insn, io::input_string))
        }
        M::Outsb | M::Outsw | M::Outsd => Some(port_string(insn, io::output_string)),
        M::Vmcall | M::Vmmcall => end(paravirt::hypercall),
        // Features that are not offered, and what is undefined by definition.
        M::Ud0 | M::Ud1 | M::Ud2 | M::Monitor | M::Mwait | M::Monitorx | M::Mwaitx | M::Rsm => {
            end(misc::undefined)
        }
        M::Vmlaunch
        | M::Vmresume
        | M::Vmxoff
        | M::Vmxon
        | M::Vmptrld
        | M::Vmptrst
        | M::Vmclear
        | M::Vmread
        | M::Vmwrite
        | M::Vmfunc
        | M::Vmrun
        | M::Vmload
        | M::Vmsave
        | M::Stgi
        | M::Clgi
        | M::Skinit
        | M::Invlpga
        | M::Invept
        | M::Invvpid => end(misc::undefined),
        M::Getsec
        | M::Encls
        | M::Enclu
        | M::Xabort
        | M::Xbegin
        | M::Xend
        | M::Rdpkru
        | M::Wrpkru
        | M::Clzero => end(misc::undefined),
        _ => None,
    }
}

/// Operand size by the instruction's mnemonic variant.
fn size_suffix(insn: &Instruction) -> u8 {
    match insn.code() {
        Code::Iretw | Code::Pushfw | Code::Popfw | Code::Retfw | Code::Retfw_imm16 => 2,
        Code::Iretd | Code::Pushfd | Code::Popfd | Code::Retfd | Code::Retfd_imm16 => 4,
        _ => 8,
    }
}

fn is_memory(insn: &Instruction, operand: u32) -> bool {
    insn.op_kind(operand) == OpKind::Memory
}

/// The operand of an instruction with one r/m operand, which may be its first or its last.
fn rm(insn: &Instruction, handler: Handler, ends_block: bool) -> SysOp {
    let op = SysOp::new(handler, ends_block);
    let memory = (0..insn.op_count()).any(|i| is_memory(insn, i));
    if memory {
        op.aux(AUX_MEM | size_of_register(insn.op0_register()))
    } else {
        op.src(insn.op0_register()).dst(insn.op0_register())
    }
}

/// Size of a general register in bytes; zero for none.
fn size_of_register(register: Register) -> u8 {
    register.size() as u8 & AUX_SIZE
}

/// SLDT, STR, SMSW.
fn store_system(insn: &Instruction, handler: Handler) -> SysOp {
    let op = rm(insn, handler, false);
    if op.aux & AUX_MEM != 0 { op } else { op.aux(size_of_register(insn.op0_register())) }
}

/// LAR and LSL: the destination is a register, the source r/m.
fn look_at(insn: &Instruction, handler: Handler) -> SysOp {
    let op = SysOp::new(handler, false)
        .dst(insn.op0_register())
        .aux(size_of_register(insn.op0_register()));
    if is_memory(insn, 1) { op.aux(AUX_MEM) } else { op.src(insn.op1_register()) }
}

/// LGDT and LIDT cut the base at an operand size of 16 bits.
fn table_size(insn: &Instruction) -> u8 {
    match insn.code() {
        Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 => 2,
        Code::Lgdt_m1632 | Code::Lidt_m1632 => 4,
        _ => 8,
    }
}

/// MOV to and from segment, control and debug registers.
fn move_special(insn: &Instruction) -> Option<SysOp> {
    let (to, from) = (insn.op0_register(), insn.op1_register());
    let special = |r: Register| r.is_segment_register() || r.is_cr() || r.is_dr() || r.is_tr();
    if to.is_segment_register() {
        if to == Register::CS {
            return Some(SysOp::new(misc::undefined, true));
        }
        let op = SysOp::new(segment_ops::load, to == Register::SS).dst(to);
        return Some(if is_memory(insn, 1) { op.aux(AUX_MEM) } else { op.src(from) });
    }
    if from.is_segment_register() {
        let op = SysOp::new(segment_ops::store, false).src(from);
        return Some(if is_memory(insn, 0) {
            op.aux(AUX_MEM)
        } else {
            op.dst(to).aux(size_of_register(to))
        });
    }
    if !special(to) && !special(from) {
        return None;
    }
    Some(if to.is_cr() {
        SysOp::new(control::write, true).dst(to).src(from)
    } else if from.is_cr() {
        SysOp::new(control::read, false).dst(to).src(from)
    } else if to.is_dr() {
        SysOp::new(debug::write, true).dst(to).src(from)
    } else if from.is_dr() {
        SysOp::new(debug::read, false).dst(to).src(from)
    } else {
        SysOp::new(misc::undefined, true)
    })
}

fn push_pop_segment(insn: &Instruction) -> Option<SysOp> {
    let register = insn.op0_register();
    if !register.is_segment_register() {
        return None;
    }
    let size = match insn.code() {
        Code::Pushw_ES
        | Code::Pushw_CS
        | Code::Pushw_SS
        | Code::Pushw_DS
        | Code::Pushw_FS
        | Code::Pushw_GS
        | Code::Popw_ES
        | Code::Popw_SS
        | Code::Popw_DS
        | Code::Popw_FS
        | Code::Popw_GS
        | Code::Popw_CS => 2,
        Code::Pushq_FS | Code::Pushq_GS | Code::Popq_FS | Code::Popq_GS => 8,
        _ => 4,
    };
    if register == Register::CS && insn.mnemonic() == Mnemonic::Pop {
        return Some(SysOp::new(misc::undefined, true));
    }
    Some(if insn.mnemonic() == Mnemonic::Push {
        SysOp::new(segment_ops::push, false).src(register).aux(size)
    } else {
        SysOp::new(segment_ops::pop, register == Register::SS).dst(register).aux(size)
    })
}

fn load_far(insn: &Instruction) -> SysOp {
    let segment = match insn.mnemonic() {
        Mnemonic::Lds => seg::DS,
        Mnemonic::Les => seg::ES,
        Mnemonic::Lfs => seg::FS,
        Mnemonic::Lgs => seg::GS,
        _ => seg::SS,
    };
    let target = insn.op0_register();
    let op = SysOp::new(segment_ops::load_far, segment == seg::SS);
    SysOp { src: segment as u8, ..op }.dst(target).aux(AUX_MEM | size_of_register(target))
}

/// JMP and CALL far; near ones are not system instructions.
fn far_transfer(insn: &Instruction) -> Option<SysOp> {
    let (handler, size): (Handler, u8) = match insn.code() {
        Code::Jmp_ptr1616 | Code::Jmp_m1616 => (far::jump, 2),
        Code::Jmp_ptr1632 | Code::Jmp_m1632 => (far::jump, 4),
        Code::Jmp_m1664 => (far::jump, 8),
        Code::Call_ptr1616 | Code::Call_m1616 => (far::call, 2),
        Code::Call_ptr1632 | Code::Call_m1632 => (far::call, 4),
        Code::Call_m1664 => (far::call, 8),
        _ => return None,
    };
    let op = SysOp::new(handler, true).aux(size);
    Some(match insn.op0_kind() {
        OpKind::Memory => op.aux(AUX_MEM),
        kind => {
            let offset = match kind {
                OpKind::FarBranch16 => insn.far_branch16().into(),
                _ => insn.far_branch32(),
            };
            op.imm(u64::from(insn.far_branch_selector()) << 32 | u64::from(offset))
        }
    })
}

fn base_segment(insn: &Instruction) -> u8 {
    match insn.mnemonic() {
        Mnemonic::Rdfsbase | Mnemonic::Wrfsbase => seg::FS as u8,
        _ => seg::GS as u8,
    }
}

fn read_base(insn: &Instruction) -> SysOp {
    let register = insn.op0_register();
    let op = SysOp::new(syscall::read_base, false).dst(register).aux(size_of_register(register));
    SysOp { src: base_segment(insn), ..op }
}

fn write_base(insn: &Instruction) -> SysOp {
    let register = insn.op0_register();
    let op = SysOp::new(syscall::write_base, false).src(register).aux(size_of_register(register));
    SysOp { dst: base_segment(insn), ..op }
}

fn port(insn: &Instruction) -> SysOp {
    let input = insn.mnemonic() == Mnemonic::In;
    let (data, port) = if input { (0, 1) } else { (1, 0) };
    let handler: Handler = if input { io::input } else { io::output };
    let op = SysOp::new(handler, true).aux(size_of_register(insn.op_register(data)));
    if insn.op_kind(port) == OpKind::Immediate8 {
        op.aux(AUX_PORT_IMM).imm(insn.immediate8().into())
    } else {
        op
    }
}

fn port_string(insn: &Instruction, handler: Handler) -> SysOp {
    let size = match insn.mnemonic() {
        Mnemonic::Insb | Mnemonic::Outsb => 1,
        Mnemonic::Insw | Mnemonic::Outsw => 2,
        _ => 4,
    };
    let (memory, address_size) = match (insn.op0_kind(), insn.op1_kind()) {
        (OpKind::MemoryESDI, _) => (seg::ES as u8, 2),
        (OpKind::MemoryESEDI, _) => (seg::ES as u8, 4),
        (OpKind::MemoryESRDI, _) => (seg::ES as u8, 8),
        (_, OpKind::MemorySegSI) => (insn.memory_segment().number() as u8, 2),
        (_, OpKind::MemorySegESI) => (insn.memory_segment().number() as u8, 4),
        _ => (insn.memory_segment().number() as u8, 8),
    };
    let rep = if insn.has_rep_prefix() || insn.has_repne_prefix() { AUX_REP } else { 0 };
    let op = SysOp::new(handler, true).aux(size | rep);
    SysOp { dst: memory, src: address_size, ..op }
}
