//! The state of one virtual processor.

use crate::fault::Fault;
use crate::flags::{Cc, cc_to_rflags, rflags, rflags_to_cc};
use crate::host::VectorState;
use crate::jit::JitEnv;
use crate::mmu::Mmu;
use crate::op::{Flow, reg};
use crate::sys::SystemState;

/// Width of code and stack, from CR0.PE, EFER.LMA and the CS descriptor (SDM vol. 3, chapter 9).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Real-address mode: 16 bits, no protection. A processor starts here. Virtual-8086 mode looks the same to most
    /// instructions, and is told from it by [`Cpu::virtual_8086`].
    #[default]
    Real,
    /// Protected or compatibility mode with a 16-bit code segment.
    Code16,
    /// Protected or compatibility mode with a 32-bit code segment.
    Code32,
    /// 64-bit mode.
    Code64,
}

/// A segment register with its hidden part. `access` as in [`mvm_engine::Segment`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SegmentReg {
    /// Selector.
    pub selector: u16,
    /// Access rights in the descriptor's bit order.
    pub access: u32,
    /// Base.
    pub base: u64,
    /// Limit in bytes, granularity applied.
    pub limit: u32,
}

/// Index of a segment register in [`Cpu::seg`]: the order of their encoding.
#[allow(missing_docs)]
pub mod seg {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
    /// Not a segment: base 0, no limit. What 64-bit operands without FS or GS use.
    pub const FLAT: usize = 6;
    /// Number of slots.
    pub const COUNT: usize = 7;
}

/// One virtual processor, as the handlers see it.
///
/// What translated code uses most lies side by side. Everything here is the guest's architectural state or derived from it.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Cpu {
    /// Segment registers, then [`seg::FLAT`].
    pub seg: [SegmentReg; seg::COUNT],
    /// Instruction pointer. Inside a block it is stale (the running instruction is at
    /// `gpr[BLOCK] + op.start`); exact whenever the dispatcher has control.
    pub rip: u64,
    /// The exception behind [`Flow::Fault`].
    pub fault: Option<Fault>,
    /// Linear address of the last page fault raised, on its way to CR2.
    pub fault_address: u64,
    /// Privilege level: SS.DPL, cached.
    pub cpl: u8,
    /// Mode of the running code, cached.
    pub mode: Mode,
    /// Interrupts are held off for one instruction (STI, MOV SS).
    pub shadow: bool,
    /// RFLAGS without its arithmetic bits; bit 1 is set.
    pub sysflags: u64,
    /// What translated code needs, most of it last.
    pub(crate) jit: JitEnv,
    /// General registers, then [`reg::ZERO`] and [`reg::BLOCK`].
    pub gpr: [u64; reg::COUNT],
    /// Arithmetic flags.
    pub cc: Cc,
    /// Address translation and guest memory.
    pub mmu: Mmu,
    /// SIMD and x87 state.
    pub vec: VectorState,
    /// Control registers, tables, MSRs, APIC, clock, events.
    pub sys: SystemState,
}

impl Cpu {
    /// A processor with zeroed registers.
    pub fn new(mmu: Mmu, sys: SystemState) -> Self {
        Self {
            gpr: [0; reg::COUNT],
            rip: 0,
            fault: None,
            fault_address: 0,
            cc: rflags_to_cc(0),
            cpl: 0,
            mode: Mode::Real,
            shadow: false,
            sysflags: rflags::FIXED,
            seg: [SegmentReg::default(); seg::COUNT],
            jit: JitEnv::default(),
            mmu,
            vec: VectorState::default(),
            sys,
        }
    }

    /// RFLAGS as PUSHF would show them (with RF and VM as they are).
    #[inline]
    pub fn rflags(&self) -> u64 {
        self.sysflags | cc_to_rflags(self.cc)
    }

    /// Sets RFLAGS whole. No checks: which bits an instruction may change is its own business.
    #[inline]
    pub fn set_rflags(&mut self, flags: u64) {
        self.cc = rflags_to_cc(flags);
        self.sysflags = flags & !rflags::ARITH | rflags::FIXED;
    }

    /// In virtual-8086 mode? (SDM vol. 3, 21.2)
    #[inline]
    pub fn virtual_8086(&self) -> bool {
        self.sysflags & rflags::VM != 0
    }

    /// Ends an op with `fault`.
    #[cold]
    pub fn raise(&mut self, fault: Fault) -> Flow {
        self.fault = Some(fault);
        Flow::Fault
    }
}
