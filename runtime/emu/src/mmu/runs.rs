//! Runs of bytes inside pages, for repeated string instructions.

use super::access::{Target, Wrote};
use super::raw::HostAddr;
use super::tlb::Access;
use crate::cpu::Cpu;
use crate::fault::Fault;
use crate::int::Int;

impl Cpu {
    /// Copies `len` bytes (inside one page on either side) as `rep movs` of elements of `element` bytes does.
    /// Returns the bytes done: 0 where it must go element by element.
    ///
    /// # Errors
    /// Those of the first element; nothing has been copied then.
    pub(crate) fn copy_run(
        &mut self,
        from: u64,
        to: u64,
        len: u64,
        element: usize,
    ) -> Result<(u64, Wrote), Fault> {
        let len = len as usize;
        let source = match self.mmu.tlb.probe_read(from, len) {
            Some(host) => host,
            None => {
                self.check_alignment(from, element)?;
                match self.translate(from, len, Access::Read)? {
                    Target::Ram { host, .. } => host,
                    Target::Mmio(_) => return Ok((0, Wrote::Data)),
                }
            }
        };
        let (target, tell) = match self.writable(to, len, element)? {
            Some(found) => found,
            None => return Ok((0, Wrote::Data)),
        };
        // Bytewise copying shows if the target starts inside the first element.
        let ahead = target.addr().wrapping_sub(source.addr());
        if ahead != 0 && ahead < element as u64 {
            return Ok((0, Wrote::Data));
        }
        source.copy_to(target, len);
        Ok((len as u64, self.told(tell, len)))
    }

    /// Stores `count` elements (inside one page). Returns the elements done: 0 where it must go one by one.
    ///
    /// # Errors
    /// Those of the first element; nothing has been stored then.
    pub(crate) fn fill_run<T: Int>(
        &mut self,
        to: u64,
        value: T,
        count: u64,
    ) -> Result<(u64, Wrote), Fault> {
        let len = count as usize * T::SIZE;
        let Some((target, tell)) = self.writable(to, len, T::SIZE)? else {
            return Ok((0, Wrote::Data));
        };
        target.fill(value, count as usize);
        Ok((count, self.told(tell, len)))
    }

    /// Where to write, and the slow target if the tracker must be told. `None`: not RAM.
    #[inline]
    fn writable(
        &mut self,
        to: u64,
        len: usize,
        element: usize,
    ) -> Result<Option<(HostAddr, Option<Target>)>, Fault> {
        if let Some(host) = self.mmu.tlb.probe_write(to, len) {
            return Ok(Some((host, None)));
        }
        self.check_alignment(to, element)?;
        let target = self.translate(to, len, Access::Write)?;
        Ok(match target {
            Target::Ram { host, .. } => Some((host, Some(target))),
            Target::Mmio(_) => None,
        })
    }

    #[inline]
    fn told(&mut self, target: Option<Target>, len: usize) -> Wrote {
        match target {
            Some(Target::Ram { host, page, fast }) => self.stored(host, page, fast, len),
            _ => Wrote::Data,
        }
    }
}
