//! The decoded form of one guest instruction.

use std::fmt;

use crate::block::Block;
use crate::cpu::Cpu;

/// What a handler tells the block loop.
///
/// A handler that returns [`Flow::Fault`] has changed no guest-visible state (or only what the
/// architecture lets a fault leave behind, such as the progress of a `rep`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Flow {
    /// Go on with the next op of the block.
    Next,
    /// The op was a control transfer: [`Cpu::rip`] is set, the block ends.
    Jump,
    /// The op is done, and something changed that the rest of the block may depend on (a mode, a
    /// mapping, code, the interrupt flag): go on after it, but through the dispatcher.
    Break,
    /// [`Cpu::fault`] holds an exception of this op.
    Fault,
    /// The op is not finished (`rep` after a slice, a spurious retry): dispatch it again.
    Again,
    /// HLT: like `Break`, then sleep until an event.
    Halt,
}

/// The code of an op.
pub type Handler = fn(&mut Cpu, &Op, &Block) -> Flow;

/// One decoded instruction.
///
/// Holds no guest virtual address: a block is found by physical address and may be mapped at
/// several virtual ones. RIP-relative operands use [`reg::BLOCK`] as their base.
#[derive(Clone, Copy)]
pub struct Op {
    /// What to run.
    pub handler: Handler,
    /// Immediate, sign-extended as the instruction asks; branch displacement from the block start.
    pub imm: u64,
    /// Displacement of the memory operand. For RIP-relative operands, relative to the block start.
    pub disp: i64,
    /// Offset of the instruction from the block start, in bytes.
    pub start: u16,
    /// Offset of its end.
    pub end: u16,
    /// First (destination) register: number in the file of its kind. High-byte registers are
    /// handlers of their own.
    pub dst: u8,
    /// Second register.
    pub src: u8,
    /// Base register of the memory operand, [`reg::ZERO`] or [`reg::BLOCK`].
    pub base: u8,
    /// Index register of the memory operand, or [`reg::ZERO`].
    pub index: u8,
    /// Shift of the index, 0 to 3.
    pub scale: u8,
    /// Segment of the memory operand: index into [`Cpu::seg`], as far as its base matters.
    pub seg: u8,
    /// [`op_flags`].
    pub flags: u8,
    /// Free for the handler's family (a condition, a sub-operation).
    pub aux: u8,
    /// Free for the handler's family (an index into a table of host stubs, of full instructions).
    pub extra: u32,
}

/// Register numbers beyond the sixteen.
pub mod reg {
    /// Always zero: base or index of an operand that has none.
    pub const ZERO: u8 = 16;
    /// The virtual address of the running block's start.
    pub const BLOCK: u8 = 17;
    /// Number of slots in [`Cpu::gpr`](crate::cpu::Cpu).
    pub const COUNT: usize = 18;
}

/// Bits of [`Op::flags`].
pub mod op_flags {
    /// The address size is 32 bits: the offset is cut before the segment base is added.
    pub const ADDR32: u8 = 1;
    /// The address size is 16 bits.
    pub const ADDR16: u8 = 2;
    /// Not 64-bit mode: segment bases and limits count for every segment.
    pub const LEGACY: u8 = 4;
    /// A LOCK prefix.
    pub const LOCK: u8 = 8;
    /// 64-bit mode: the operand is in FS or GS, whose base counts.
    pub const SEG: u8 = 16;
    /// The operand is in the stack segment: a non-canonical address is #SS.
    pub const STACK: u8 = 32;
}

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Op")
            .field("start", &self.start)
            .field("end", &self.end)
            .field("dst", &self.dst)
            .field("src", &self.src)
            .finish_non_exhaustive()
    }
}
