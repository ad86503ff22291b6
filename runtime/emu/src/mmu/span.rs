//! Memory operands for host instructions: a pointer into guest RAM where the operand lies in one page of it,
//! else a buffer that is filled before and written back after.

use super::access::{Target, Wrote, check_end, crosses};
use super::phys::PageRef;
use super::raw::HostAddr;
use super::tlb::Access;
use crate::cpu::Cpu;
use crate::fault::Fault;

/// Longest operand that may need the buffer.
const BOUNCE: usize = 4096;

/// The buffer for operands that are not one piece of RAM.
#[derive(Clone)]
#[repr(C, align(64))]
pub(super) struct Bounce([u8; BOUNCE]);

impl Default for Bounce {
    fn default() -> Self {
        Self([0; BOUNCE])
    }
}

impl std::fmt::Debug for Bounce {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Bounce")
    }
}

/// A memory operand at hand. After writing through it, [`Cpu::span_written`] must be called.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    pointer: *mut u8,
    linear: u64,
    len: usize,
    after: After,
}

#[derive(Debug, Clone, Copy)]
enum After {
    /// In RAM, and the tracker knows.
    Nothing,
    /// In RAM; the tracker must be told.
    Tell(HostAddr, PageRef),
    /// In the buffer.
    WriteBack,
}

impl Span {
    /// Points to the operand's bytes. Valid until the op ends or another span is asked for.
    #[inline(always)]
    pub fn ptr(&self) -> *mut u8 {
        self.pointer
    }

    /// Bytes.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Is it empty?
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Cpu {
    /// The operand of `len` bytes (1 to 4096) at `linear`, for reading or for writing (which includes
    /// reading). Alignment is checked as the architecture's alignment checks demand, if they are on.
    ///
    /// # Errors
    /// #PF, #AC(0), or #GP(0) for a non-canonical address.
    #[inline(always)]
    pub fn host_span(&mut self, linear: u64, len: usize, access: Access) -> Result<Span, Fault> {
        let probe = match access {
            Access::Write => self.mmu.tlb.probe_write(linear, len),
            _ => self.mmu.tlb.probe_read(linear, len),
        };
        match probe {
            Some(host) => Ok(Span { pointer: host.ptr(), linear, len, after: After::Nothing }),
            None => self.host_span_checked(linear, len, access),
        }
    }

    /// As [`Cpu::host_span`], of an operand whose alignment is never checked.
    ///
    /// # Errors
    /// #PF, or #GP(0) for a non-canonical address.
    pub fn host_span_any(
        &mut self,
        linear: u64,
        len: usize,
        access: Access,
    ) -> Result<Span, Fault> {
        if self.mmu.tlb.checks_alignment() {
            self.host_span_slow(linear, len, access)
        } else {
            self.host_span(linear, len, access)
        }
    }

    #[cold]
    #[inline(never)]
    fn host_span_checked(
        &mut self,
        linear: u64,
        len: usize,
        access: Access,
    ) -> Result<Span, Fault> {
        self.check_alignment(linear, len)?;
        self.host_span_slow(linear, len, access)
    }

    fn host_span_slow(&mut self, linear: u64, len: usize, access: Access) -> Result<Span, Fault> {
        debug_assert!((1..=BOUNCE).contains(&len));
        check_end(linear, len)?;
        let head = len.min(4096 - (linear & 0xfff) as usize);
        let target = self.translate(linear, head, access)?;
        if !crosses(linear, len) {
            if let Target::Ram { host, page, fast } = target {
                let after = match access {
                    Access::Write if !fast => After::Tell(host, page),
                    _ => After::Nothing,
                };
                return Ok(Span { pointer: host.ptr(), linear, len, after });
            }
        } else {
            self.translate((linear | 0xfff).wrapping_add(1), len - head, access)?;
        }
        let mut bytes = std::mem::take(&mut self.mmu.bounce);
        let filled = match bytes.0.get_mut(..len) {
            // What is only written is read as well: page-crossing stores are rare. On the bus reading may
            // have effects, and a store of vectors to a device overwrites all of it.
            Some(part) if access != Access::Write || matches!(target, Target::Ram { .. }) => {
                self.read_bytes(linear, part)
            }
            _ => Ok(()),
        };
        self.mmu.bounce = bytes;
        filled?;
        let pointer = self.mmu.bounce.0.as_mut_ptr();
        Ok(Span { pointer, linear, len, after: After::WriteBack })
    }

    /// Completes a write through `span`.
    ///
    /// # Errors
    /// None that [`Cpu::host_span`] has not raised already, unless another vCPU changed the page tables in between.
    #[inline(always)]
    pub fn span_written(&mut self, span: Span) -> Result<Wrote, Fault> {
        match span.after {
            After::Nothing => Ok(Wrote::Data),
            _ => self.span_written_slow(span),
        }
    }

    #[cold]
    #[inline(never)]
    fn span_written_slow(&mut self, span: Span) -> Result<Wrote, Fault> {
        match span.after {
            After::Nothing => Ok(Wrote::Data),
            After::Tell(host, page) => Ok(self.stored(host, page, false, span.len)),
            After::WriteBack => {
                let bytes = std::mem::take(&mut self.mmu.bounce);
                let from = bytes.0.get(..span.len).unwrap_or_default();
                let wrote = self.write_bytes(span.linear, from);
                self.mmu.bounce = bytes;
                wrote
            }
        }
    }
}
