//! Memory operands: a host pointer for stubs, bytes for the rest.

use crate::cpu::Cpu;
use crate::fault::Fault;
use crate::mmu::{Access, Span};
use crate::op::{Flow, Op, op_flags};

/// Linear address of the memory operand, checked for an access of `size` bytes, and for alignment
/// by the mask `align`.
#[inline(always)]
pub fn address(cpu: &Cpu, op: &Op, size: usize, align: u8, access: Access) -> Result<u64, Fault> {
    let linear = cpu.ea_checked(op, size, access == Access::Write)?;
    if linear & u64::from(align) != 0 { Err(misaligned(cpu, linear, size)) } else { Ok(linear) }
}

/// #GP(0), but #AC(0) where that is on and checks less: state images.
#[cold]
fn misaligned(cpu: &Cpu, linear: u64, size: usize) -> Fault {
    cpu.check_alignment(linear, size).err().unwrap_or(Fault::GP0)
}

/// The memory operand of `op`, for reading or for writing (which includes reading). What is
/// written through it must end with [`commit`].
#[inline(always)]
pub fn span(cpu: &mut Cpu, op: &Op, size: usize, align: u8, access: Access) -> Result<Span, Fault> {
    let linear = address(cpu, op, size, align, access)?;
    cpu.host_span(linear, size, access).map_err(|fault| stack_fault(op, fault))
}

/// A non-canonical address is #SS(0) for operands in the stack segment.
#[cold]
pub fn stack_fault(op: &Op, fault: Fault) -> Fault {
    if fault == Fault::GP0 && op.flags & op_flags::STACK != 0 { Fault::SS0 } else { fault }
}

/// As [`span`], of an operand whose alignment is never checked.
pub fn span_any(cpu: &mut Cpu, op: &Op, size: usize, access: Access) -> Result<Span, Fault> {
    let linear = address(cpu, op, size, 0, access)?;
    cpu.host_span_any(linear, size, access).map_err(|fault| stack_fault(op, fault))
}

/// Ends an op that wrote through `span`.
#[inline(always)]
pub fn commit(cpu: &mut Cpu, span: Span) -> Flow {
    match cpu.span_written(span) {
        Ok(wrote) => wrote.into(),
        Err(fault) => cpu.raise(fault),
    }
}

/// Reads the memory operand.
pub fn read(cpu: &mut Cpu, op: &Op, align: u8, bytes: &mut [u8]) -> Result<(), Fault> {
    let linear = address(cpu, op, bytes.len(), align, Access::Read)?;
    cpu.check_alignment(linear, bytes.len())
        .and_then(|()| cpu.read_bytes(linear, bytes))
        .map_err(|fault| stack_fault(op, fault))
}

/// Writes the memory operand, as the last thing the op does.
pub fn write(cpu: &mut Cpu, op: &Op, bytes: &[u8]) -> Flow {
    let wrote = address(cpu, op, bytes.len(), 0, Access::Write).and_then(|linear| {
        cpu.check_alignment(linear, bytes.len())?;
        cpu.write_bytes(linear, bytes)
    });
    match wrote {
        Ok(wrote) => wrote.into(),
        Err(fault) => cpu.raise(stack_fault(op, fault)),
    }
}

/// Whether the memory operand may be written.
pub fn probe(cpu: &mut Cpu, op: &Op, size: usize, align: u8) -> Result<u64, Fault> {
    let linear = address(cpu, op, size, align, Access::Write)?;
    cpu.host_span(linear, size, Access::Write).map_err(|fault| stack_fault(op, fault))?;
    Ok(linear)
}
