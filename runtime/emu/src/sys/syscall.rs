//! Fast system calls, SWAPGS and the FS/GS base instructions.

use mvm_engine::cpuid::Vendor;

use super::bits::{canonical, cr4, dr, efer};
use super::decode::operand_size;
use super::descriptor::access;
use crate::block::Block;
use crate::cpu::{Cpu, Mode, SegmentReg, seg};
use crate::fault::Fault;
use crate::flags::rflags;
use crate::op::{Flow, Op};

/// Flags that SYSRET takes from R11.
const SYSRET_FLAGS: u64 = 0x3c_7fd7;

const fn flat(selector: u16, access: u32) -> SegmentReg {
    SegmentReg { selector, access, base: 0, limit: u32::MAX }
}

const DPL3: u32 = 3 << access::DPL_SHIFT;

/// SYSCALL.
pub(crate) fn syscall(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let sys = &cpu.sys;
    let long = sys.long_mode();
    // Intel's processors know it in 64-bit mode only.
    let known = cpu.mode == Mode::Code64 || sys.vendor == Vendor::Amd;
    if sys.efer & efer::SCE == 0 || !sys.protected() || !known {
        return cpu.raise(Fault::UD);
    }
    let next = cpu.next_rip(op);
    let flags = cpu.rflags();
    let star = cpu.sys.msrs.star;
    let selector = (star >> 32) as u16 & 0xfffc;
    if long {
        cpu.gpr[1] = next;
        cpu.gpr[11] = flags & !rflags::RF;
        cpu.rip = match cpu.mode {
            Mode::Code64 => cpu.sys.msrs.lstar,
            _ => cpu.sys.msrs.cstar,
        };
        cpu.set_rflags(flags & !(cpu.sys.msrs.fmask | rflags::RF));
        cpu.set_code_segment(flat(selector, access::CODE64), 0);
    } else {
        cpu.gpr[1] = next & 0xffff_ffff;
        cpu.rip = star & 0xffff_ffff;
        cpu.set_rflags(flags & !(rflags::VM | rflags::IF | rflags::RF));
        cpu.set_code_segment(flat(selector, access::CODE32), 0);
    }
    cpu.seg[seg::SS] = flat(selector.wrapping_add(8), access::DATA);
    cpu.sys.step_inhibited = cpu.sysflags & rflags::TF == 0;
    Flow::Jump
}

/// SYSRET; the operand size tells 64-bit from compatibility mode.
pub(crate) fn sysret(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    let long = cpu.sys.long_mode();
    let known = cpu.mode == Mode::Code64 || cpu.sys.vendor == Vendor::Amd;
    if cpu.sys.efer & efer::SCE == 0 || !known {
        return cpu.raise(Fault::UD);
    }
    if cpu.cpl != 0 || !cpu.sys.protected() {
        return cpu.raise(Fault::GP0);
    }
    let base = (cpu.sys.msrs.star >> 48) as u16;
    let to_64 = operand_size(op) == 8;
    if to_64 && !canonical(cpu.gpr[1]) && cpu.sys.vendor == Vendor::Intel {
        // AMD's processors load it, and fault on the fetch at level 3.
        return cpu.raise(Fault::GP0);
    }
    let (selector, code) =
        if to_64 { (base.wrapping_add(16), access::CODE64) } else { (base, access::CODE32) };
    cpu.rip = if to_64 { cpu.gpr[1] } else { cpu.gpr[1] & 0xffff_ffff };
    let flags =
        if long { cpu.gpr[11] & SYSRET_FLAGS | rflags::FIXED } else { cpu.rflags() | rflags::IF };
    cpu.seg[seg::SS] = flat(base.wrapping_add(8) | 3, access::DATA | DPL3);
    cpu.set_code_segment(flat(selector | 3, code | DPL3), 3);
    cpu.replace_flags(flags);
    if flags & rflags::TF != 0 {
        // Unlike IRET it traps before the first instruction that it returns to.
        cpu.sys.hits |= dr::DR6_BS;
    }
    Flow::Jump
}

/// SYSENTER.
pub(crate) fn sysenter(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    let long = cpu.sys.long_mode();
    if long && cpu.sys.vendor == Vendor::Amd {
        return cpu.raise(Fault::UD);
    }
    let selector = cpu.sys.msrs.sysenter_cs as u16 & 0xfffc;
    if !cpu.sys.protected() || selector == 0 {
        return cpu.raise(Fault::GP0);
    }
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.gpr[4] = cpu.sys.msrs.sysenter_esp & mask;
    cpu.rip = cpu.sys.msrs.sysenter_eip & mask;
    cpu.sysflags &= !(rflags::VM | rflags::IF | rflags::RF);
    cpu.seg[seg::SS] = flat(selector.wrapping_add(8), access::DATA);
    let code = if long { access::CODE64 } else { access::CODE32 };
    cpu.set_code_segment(flat(selector, code), 0);
    Flow::Jump
}

/// SYSEXIT; the operand size tells 64-bit from compatibility mode.
pub(crate) fn sysexit(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    if cpu.sys.long_mode() && cpu.sys.vendor == Vendor::Amd {
        return cpu.raise(Fault::UD);
    }
    let base = cpu.sys.msrs.sysenter_cs as u16 & 0xfffc;
    if !cpu.sys.protected() || base == 0 || cpu.cpl != 0 {
        return cpu.raise(Fault::GP0);
    }
    let to_64 = operand_size(op) == 8;
    let (rip, rsp) = (cpu.gpr[2], cpu.gpr[1]);
    if to_64 && !(canonical(rip) && canonical(rsp)) {
        return cpu.raise(Fault::GP0);
    }
    let mask = if to_64 { u64::MAX } else { 0xffff_ffff };
    cpu.rip = rip & mask;
    cpu.gpr[4] = rsp & mask;
    let (code, cs, ss) = if to_64 {
        (access::CODE64, base.wrapping_add(32), base.wrapping_add(40))
    } else {
        (access::CODE32, base.wrapping_add(16), base.wrapping_add(24))
    };
    cpu.seg[seg::SS] = flat(ss | 3, access::DATA | DPL3);
    cpu.set_code_segment(flat(cs | 3, code | DPL3), 3);
    Flow::Jump
}

/// SWAPGS.
pub(crate) fn swapgs(cpu: &mut Cpu, _: &Op, _: &Block) -> Flow {
    if cpu.mode != Mode::Code64 {
        return cpu.raise(Fault::UD);
    }
    if cpu.cpl != 0 {
        return cpu.raise(Fault::GP0);
    }
    std::mem::swap(&mut cpu.seg[seg::GS].base, &mut cpu.sys.msrs.kernel_gs_base);
    Flow::Next
}

fn base_allowed(cpu: &Cpu) -> bool {
    cpu.mode == Mode::Code64 && cpu.sys.cr4 & cr4::FSGSBASE != 0
}

/// RDFSBASE and RDGSBASE: `op.src` is the segment, `op.dst` the register.
pub(crate) fn read_base(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    if !base_allowed(cpu) {
        return cpu.raise(Fault::UD);
    }
    let base = cpu.seg[usize::from(op.src)].base;
    cpu.gpr[usize::from(op.dst)] = if operand_size(op) == 8 { base } else { base & 0xffff_ffff };
    Flow::Next
}

/// WRFSBASE and WRGSBASE: `op.dst` is the segment, `op.src` the register.
pub(crate) fn write_base(cpu: &mut Cpu, op: &Op, _: &Block) -> Flow {
    if !base_allowed(cpu) {
        return cpu.raise(Fault::UD);
    }
    let value = cpu.gpr[usize::from(op.src)];
    let value = if operand_size(op) == 8 { value } else { value & 0xffff_ffff };
    if !canonical(value) {
        return cpu.raise(Fault::GP0);
    }
    cpu.seg[usize::from(op.dst)].base = value;
    Flow::Next
}
