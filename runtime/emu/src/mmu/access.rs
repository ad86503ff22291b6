//! Loads and stores of the guest, by linear address.

use super::phys::PageRef;
use super::raw::HostAddr;
use super::tlb::{Access, Rights, Who};
use super::walk::walk;
use crate::cpu::{Cpu, Mode, SegmentReg, seg};
use crate::fault::{Fault, vector};
use crate::int::Int;
use crate::op::{Flow, Op, op_flags};

/// What a store hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrote {
    /// Data.
    Data,
    /// Bytes that were decoded: the op must end its block.
    Code,
}

impl From<Wrote> for Flow {
    #[inline(always)]
    fn from(wrote: Wrote) -> Flow {
        match wrote {
            Wrote::Data => Flow::Next,
            Wrote::Code => Flow::Break,
        }
    }
}

/// Where an access goes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Target {
    /// To RAM. `fast`: the tracker knows of this and all further stores.
    Ram { host: HostAddr, page: PageRef, fast: bool },
    /// To the bus.
    Mmio(u64),
}

/// A memory operand that needs more than base, index and displacement.
const INDIRECT: u8 = op_flags::ADDR32 | op_flags::ADDR16 | op_flags::LEGACY | op_flags::SEG;

impl Cpu {
    /// The linear address of an op's memory operand, unchecked.
    #[inline(always)]
    pub fn ea(&self, op: &Op) -> u64 {
        if op.flags & INDIRECT == 0 { self.flat_offset(op) } else { self.ea_slow(op) }
    }

    /// The linear address of an op's memory operand of `size` bytes.
    ///
    /// Outside 64-bit mode the segment's limit and type are checked here; a non-canonical address
    /// is found by the access itself.
    ///
    /// # Errors
    /// #GP(0) or #SS(0).
    #[inline(always)]
    pub fn ea_checked(&self, op: &Op, size: usize, write: bool) -> Result<u64, Fault> {
        if op.flags & INDIRECT == 0 {
            Ok(self.flat_offset(op))
        } else {
            self.ea_checked_slow(op, size, write)
        }
    }

    #[inline(always)]
    fn flat_offset(&self, op: &Op) -> u64 {
        self.reg(op.base)
            .wrapping_add(self.reg(op.index).wrapping_shl(op.scale.into()))
            .wrapping_add(op.disp as u64)
    }

    /// The offset of an op's memory operand in its segment (what LEA gives).
    #[inline(always)]
    pub fn offset(&self, op: &Op) -> u64 {
        let offset = self.flat_offset(op);
        if op.flags & (op_flags::ADDR32 | op_flags::ADDR16) == 0 {
            offset
        } else if op.flags & op_flags::ADDR32 != 0 {
            offset & 0xffff_ffff
        } else {
            offset & 0xffff
        }
    }

    #[inline(never)]
    fn ea_slow(&self, op: &Op) -> u64 {
        let base = self.seg[usize::from(op.seg)].base;
        let linear = base.wrapping_add(self.offset(op));
        if op.flags & op_flags::LEGACY != 0 { linear & 0xffff_ffff } else { linear }
    }

    #[inline(never)]
    fn ea_checked_slow(&self, op: &Op, size: usize, write: bool) -> Result<u64, Fault> {
        if op.flags & op_flags::LEGACY == 0 {
            return Ok(self.ea_slow(op));
        }
        self.linear(usize::from(op.seg), self.offset(op), size, write)
    }

    /// The linear address of `offset` in segment `index`, with the checks of the current mode
    /// (SDM vol. 3, 6.3 to 6.5).
    ///
    /// # Errors
    /// #SS(0) for the stack segment, else #GP(0).
    pub fn linear(
        &self,
        index: usize,
        offset: u64,
        size: usize,
        write: bool,
    ) -> Result<u64, Fault> {
        let segment = &self.seg[index];
        if self.mode == Mode::Code64 {
            return Ok(if index >= seg::FS { segment.base.wrapping_add(offset) } else { offset });
        }
        let fault = if index == seg::SS { Fault::SS0 } else { Fault::GP0 };
        let protected = self.mode != Mode::Real;
        if !segment_holds(segment, offset, size, write, protected) {
            return Err(fault);
        }
        Ok(segment.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// Loads from `linear`.
    ///
    /// # Errors
    /// #PF, or #GP(0) for a non-canonical address.
    #[inline(always)]
    pub fn read<T: Int>(&mut self, linear: u64) -> Result<T, Fault> {
        match self.mmu.tlb.probe_read(linear, T::SIZE) {
            Some(host) => Ok(host.load()),
            None => self.read_slow(linear, T::SIZE).map(T::truncate),
        }
    }

    /// Stores to `linear`.
    ///
    /// # Errors
    /// #PF, or #GP(0) for a non-canonical address.
    #[inline(always)]
    pub fn write<T: Int>(&mut self, linear: u64, value: T) -> Result<Wrote, Fault> {
        match self.mmu.tlb.probe_write(linear, T::SIZE) {
            Some(host) => {
                host.store(value);
                Ok(Wrote::Data)
            }
            None => self.write_slow(linear, T::SIZE, value.zext()),
        }
    }

    /// Loads an op's memory operand.
    ///
    /// # Errors
    /// What the access raises: #PF, #GP(0), #SS(0).
    #[inline(always)]
    pub fn load<T: Int>(&mut self, op: &Op) -> Result<T, Fault> {
        let linear = self.ea_checked(op, T::SIZE, false)?;
        match self.mmu.tlb.probe_read(linear, T::SIZE) {
            Some(host) => Ok(host.load()),
            None => match self.read_slow(linear, T::SIZE) {
                Ok(value) => Ok(T::truncate(value)),
                Err(fault) => Err(stack_fault(op, fault)),
            },
        }
    }

    /// Stores to an op's memory operand, as the last thing the op does.
    #[inline(always)]
    pub fn store<T: Int>(&mut self, op: &Op, value: T) -> Flow {
        let linear = match self.ea_checked(op, T::SIZE, true) {
            Ok(linear) => linear,
            Err(fault) => return self.raise(fault),
        };
        match self.mmu.tlb.probe_write(linear, T::SIZE) {
            Some(host) => {
                host.store(value);
                Flow::Next
            }
            None => self.store_slow(op, linear, T::SIZE, value.zext()),
        }
    }

    #[cold]
    #[inline(never)]
    fn store_slow(&mut self, op: &Op, linear: u64, size: usize, value: u64) -> Flow {
        match self.write_slow(linear, size, value) {
            Ok(wrote) => wrote.into(),
            Err(fault) => self.raise(stack_fault(op, fault)),
        }
    }

    #[cold]
    #[inline(never)]
    fn read_slow(&mut self, linear: u64, size: usize) -> Result<u64, Fault> {
        self.check_alignment(linear, size)?;
        let mut bytes = [0; 8];
        if crosses(linear, size) {
            self.read_bytes(linear, &mut bytes[..size])?;
            return Ok(u64::from_le_bytes(bytes));
        }
        match self.translate(linear, size, Access::Read)? {
            Target::Ram { host, .. } => Ok(match size {
                1 => host.load::<u8>().zext(),
                2 => host.load::<u16>().zext(),
                4 => host.load::<u32>().zext(),
                _ => host.load::<u64>(),
            }),
            Target::Mmio(gpa) => {
                self.bus_read(gpa, &mut bytes[..size]);
                Ok(u64::from_le_bytes(bytes))
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn write_slow(&mut self, linear: u64, size: usize, value: u64) -> Result<Wrote, Fault> {
        self.check_alignment(linear, size)?;
        if crosses(linear, size) {
            return self.write_bytes(linear, &value.to_le_bytes()[..size]);
        }
        let target = self.translate(linear, size, Access::Write)?;
        Ok(self.store_at(target, size, value))
    }

    /// Stores up to 8 bytes in one page.
    pub(super) fn store_at(&mut self, target: Target, size: usize, value: u64) -> Wrote {
        match target {
            Target::Ram { host, page, fast } => {
                match size {
                    1 => host.store(value as u8),
                    2 => host.store(value as u16),
                    4 => host.store(value as u32),
                    _ => host.store(value),
                }
                self.stored(host, page, fast, size)
            }
            Target::Mmio(gpa) => {
                self.bus_write(gpa, &value.to_le_bytes()[..size]);
                self.after_bus_write()
            }
        }
    }

    /// Tells the tracker of a store that was made.
    #[inline]
    pub(super) fn stored(
        &mut self,
        host: HostAddr,
        page: PageRef,
        fast: bool,
        size: usize,
    ) -> Wrote {
        if !fast && self.mmu.phys.stored(page, (host.addr() & 0xfff) as usize, size) {
            Wrote::Code
        } else {
            Wrote::Data
        }
    }

    /// Is an operand of `size` bytes at `linear` aligned as it must be? All slow paths ask, for fast ones do not
    /// exist while alignment is checked ([`Who::UserAligned`]). Page faults come later.
    ///
    /// # Errors
    /// #AC(0), or #GP(0) for a non-canonical address.
    #[inline(always)]
    pub(crate) fn check_alignment(&self, linear: u64, size: usize) -> Result<(), Fault> {
        if self.mmu.tlb.checks_alignment() && linear & alignment(size) != 0 {
            check_canonical(linear)?;
            return Err(Fault::AC0);
        }
        Ok(())
    }

    /// Loads `to.len()` bytes, at most 4096. Alignment is the caller's business.
    ///
    /// # Errors
    /// #PF, or #GP(0) for a non-canonical address.
    pub fn read_bytes(&mut self, linear: u64, to: &mut [u8]) -> Result<(), Fault> {
        check_end(linear, to.len())?;
        let mut done = 0;
        while done < to.len() {
            let at = linear.wrapping_add(done as u64);
            let count = (4096 - (at & 0xfff) as usize).min(to.len() - done);
            let part = &mut to[done..done + count];
            if let Some(host) = self.mmu.tlb.probe_read(at, count) {
                host.copy_out(part);
            } else {
                match self.translate(at, count, Access::Read)? {
                    Target::Ram { host, .. } => host.copy_out(part),
                    Target::Mmio(gpa) => self.bus_read_any(gpa, part),
                }
            }
            done += count;
        }
        Ok(())
    }

    /// Stores `from`, at most 4096 bytes: all of it or, if it faults, nothing. Alignment is the caller's business.
    ///
    /// # Errors
    /// #PF, or #GP(0) for a non-canonical address.
    pub fn write_bytes(&mut self, linear: u64, from: &[u8]) -> Result<Wrote, Fault> {
        if from.is_empty() {
            return Ok(Wrote::Data);
        }
        check_end(linear, from.len())?;
        let head = (4096 - (linear & 0xfff) as usize).min(from.len());
        let (head, tail) = from.split_at(head);
        let first = self.translate(linear, head.len(), Access::Write)?;
        let mut wrote = Wrote::Data;
        if !tail.is_empty() {
            let at = linear.wrapping_add(head.len() as u64);
            let second = self.translate(at, tail.len(), Access::Write)?;
            wrote = self.copy_to_target(second, tail);
        }
        if self.copy_to_target(first, head) == Wrote::Code {
            wrote = Wrote::Code;
        }
        Ok(wrote)
    }

    fn copy_to_target(&mut self, target: Target, from: &[u8]) -> Wrote {
        match target {
            Target::Ram { host, page, fast } => {
                host.copy_in(from);
                self.stored(host, page, fast, from.len())
            }
            Target::Mmio(gpa) => {
                for (part, at) in bus_parts(gpa, from.len()) {
                    self.bus_write(gpa + at as u64, &from[at..at + part]);
                }
                self.after_bus_write()
            }
        }
    }

    /// A store to the bus may have posted an interrupt (to the local APIC it is how IPIs are sent): the block
    /// ends, so that it comes here and not some instructions later, behind a CLI perhaps.
    fn after_bus_write(&self) -> Wrote {
        if self.sys.attention().any() { Wrote::Code } else { Wrote::Data }
    }

    /// Translates for one access of `len` bytes in one page, and enters the page into the TLB.
    pub(super) fn translate(
        &mut self,
        linear: u64,
        len: usize,
        access: Access,
    ) -> Result<Target, Fault> {
        let stepping = self.stepping();
        if access == Access::Write
            && !stepping
            && let Some((page, host)) = self.mmu.tlb.slow_write(linear)
            && self.mmu.phys.is_watched(page)
        {
            return Ok(Target::Ram { host, page, fast: false });
        }
        if let Some(host) = self.mmu.tlb.adopt(linear, access)
            && let Some(page) = self.mmu.phys.page_of_host(host)
        {
            return Ok(Target::Ram { host, page, fast: true });
        }
        check_canonical(linear)?;
        self.mmu.walks += 1;
        let who = self.mmu.tlb.selected();
        let page = match walk(&self.mmu.phys, &self.mmu.paging, linear, access, who) {
            Ok(page) => page,
            Err(code) => {
                self.fault_address = linear;
                return Err(Fault::with_code(vector::PF, code));
            }
        };
        let Some((ram, host)) = self.mmu.phys.find(page.gpa) else {
            return Ok(Target::Mmio(page.gpa));
        };
        let watched = stepping && self.page_is_watched(linear);
        if watched && access != Access::Exec {
            self.note_access(linear, len as u64, access == Access::Write);
        }
        let fast = access == Access::Write
            && !watched
            && self.mmu.phys.allow_fast_write(ram, self.mmu.index);
        let rights = Rights {
            read: page.read && !watched,
            write: fast,
            exec: page.exec,
            global: page.global,
            shift: page.shift,
        };
        self.mmu.tlb.insert(linear, host, rights);
        if access == Access::Write && !fast && !stepping {
            self.mmu.tlb.insert_slow_write(linear, ram, host);
        }
        Ok(Target::Ram { host, page: ram, fast })
    }

    /// The host address of the code byte at `linear`.
    ///
    /// # Errors
    /// #PF of a fetch, #GP(0) for a non-canonical address or code outside RAM.
    pub(crate) fn fetch(&mut self, linear: u64) -> Result<HostAddr, Fault> {
        if let Some(host) = self.mmu.tlb.probe_exec(linear) {
            return Ok(host);
        }
        match self.translate(linear, 1, Access::Exec)? {
            Target::Ram { host, .. } => Ok(host),
            Target::Mmio(gpa) => {
                if self.sys.may_log() {
                    tracing::warn!(
                        vcpu = self.mmu.index,
                        "code at guest physical {gpa:#x} (linear {linear:#x}), which is not RAM: #GP"
                    );
                }
                Err(Fault::GP0)
            }
        }
    }

    /// Runs `access` as an implicit supervisor access (descriptor tables, TSS).
    fn as_supervisor<R>(&mut self, access: impl FnOnce(&mut Self) -> R) -> R {
        self.as_who(Who::Supervisor, access)
    }

    fn as_who<R>(&mut self, who: Who, access: impl FnOnce(&mut Self) -> R) -> R {
        let before = self.mmu.tlb.selected();
        self.mmu.tlb.select(who);
        let result = access(self);
        self.mmu.tlb.select(before);
        result
    }

    /// Loads with supervisor rights, whatever the CPL: descriptor tables, TSS.
    ///
    /// # Errors
    /// #PF, or #GP(0) for a non-canonical address.
    pub fn read_sys<T: Int>(&mut self, linear: u64) -> Result<T, Fault> {
        self.as_supervisor(|cpu| cpu.read(linear))
    }

    /// Stores with supervisor rights, whatever the CPL.
    ///
    /// # Errors
    /// #PF, or #GP(0) for a non-canonical address.
    pub fn write_sys<T: Int>(&mut self, linear: u64, value: T) -> Result<Wrote, Fault> {
        self.as_supervisor(|cpu| cpu.write(linear, value))
    }

    /// Stores with the rights of `cpl`: the current stack, or that of the level that control goes to.
    ///
    /// # Errors
    /// #PF, or #GP(0) for a non-canonical address.
    pub fn write_as<T: Int>(&mut self, cpl: u8, linear: u64, value: T) -> Result<Wrote, Fault> {
        let who = match cpl {
            3 if self.mmu.tlb.checks_alignment() => Who::UserAligned,
            3 => Who::User,
            _ => Who::Supervisor,
        };
        self.as_who(who, |cpu| cpu.write(linear, value))
    }

    /// A load from the bus of 1, 2, 4 or 8 bytes.
    pub(super) fn bus_read(&mut self, gpa: u64, to: &mut [u8]) {
        if self.apic_mmio_read(gpa, to) {
            return;
        }
        self.mmu.leave();
        self.mmu.phys.io().mmio_read(gpa, to);
        self.mmu.enter();
    }

    /// A store to the bus of 1, 2, 4 or 8 bytes.
    pub(super) fn bus_write(&mut self, gpa: u64, from: &[u8]) {
        if self.apic_mmio_write(gpa, from) {
            return;
        }
        self.mmu.leave();
        self.mmu.phys.io().mmio_write(gpa, from);
        self.mmu.enter();
    }

    pub(super) fn bus_read_any(&mut self, gpa: u64, to: &mut [u8]) {
        for (part, at) in bus_parts(gpa, to.len()) {
            self.bus_read(gpa + at as u64, &mut to[at..at + part]);
        }
    }
}

/// Splits a range of the bus into naturally aligned parts of 1, 2, 4 or 8 bytes: (size, offset).
fn bus_parts(gpa: u64, len: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let left = len - at;
        if left == 0 {
            return None;
        }
        let aligned = 1usize << (gpa.wrapping_add(at as u64).trailing_zeros().min(3));
        let part = aligned.min(1 << left.ilog2().min(3));
        at += part;
        Some((part, at - part))
    })
}

/// The fault of an access through a stack-segment operand.
#[cold]
pub(super) fn stack_fault(op: &Op, fault: Fault) -> Fault {
    if fault == Fault::GP0 && op.flags & op_flags::STACK != 0 { Fault::SS0 } else { fault }
}

/// The low bits that must be zero in the address of an operand of `size` bytes while alignment is checked (SDM
/// vol. 3, 7.15, table 7-7). Vectors are not checked, those that must be aligned in any case aside: it is up to
/// the processor.
fn alignment(size: usize) -> u64 {
    match size {
        // Words; x87 environments and states of 16-bit code.
        2 | 14 | 94 => 1,
        // Doublewords; those of 32-bit code; FXSAVE and XSAVE areas.
        4 | 28 | 108 | 512.. => 3,
        8 | 10 => 7,
        _ => 0,
    }
}

/// An access that ends beyond the canonical addresses is #GP(0), whether its first page is mapped or not.
#[inline(always)]
pub(super) fn check_end(linear: u64, size: usize) -> Result<(), Fault> {
    const END: u64 = 1 << 47;
    if linear < END && linear + size as u64 > END { Err(Fault::GP0) } else { Ok(()) }
}

#[inline(always)]
fn check_canonical(linear: u64) -> Result<(), Fault> {
    if (linear << 16) as i64 >> 16 == linear as i64 { Ok(()) } else { Err(Fault::GP0) }
}

#[inline(always)]
pub(super) fn crosses(linear: u64, size: usize) -> bool {
    (linear & 0xfff) as usize + size > 4096
}

/// May `size` bytes at `offset` of a segment be read or written? `protected`: its type counts.
pub(crate) fn segment_holds(
    segment: &SegmentReg,
    offset: u64,
    size: usize,
    write: bool,
    protected: bool,
) -> bool {
    limit_holds(segment, offset, size) && (!protected || type_holds(segment, write))
}

/// Does `[offset, offset + size)` lie within the segment?
fn limit_holds(segment: &SegmentReg, offset: u64, size: usize) -> bool {
    let last = offset + size as u64 - 1;
    let expand_down = segment.access & 0x1c == 0x14;
    if expand_down {
        let top = if segment.access & 1 << 14 != 0 { 0xffff_ffff } else { 0xffff };
        offset > u64::from(segment.limit) && last <= top
    } else {
        last <= u64::from(segment.limit)
    }
}

/// May a protected-mode segment be read or written?
fn type_holds(segment: &SegmentReg, write: bool) -> bool {
    if segment.access & 1 << 16 != 0 {
        return false;
    }
    let code = segment.access & 8 != 0;
    let right = segment.access & 2 != 0;
    if write { !code && right } else { !code || right }
}
