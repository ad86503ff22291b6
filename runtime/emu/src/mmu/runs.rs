//! Runs of bytes inside pages, for repeated string instructions.

use super::access::{Target, Wrote};
use super::raw::{Compared, HostAddr};
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
        let Some(source) = self.readable(from, len, element)? else { return Ok((0, Wrote::Data)) };
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

    /// Compares up to `count` elements (inside one page on either side) as `rep cmps` does. None: it must go one by one.
    ///
    /// # Errors
    /// Those of the first element.
    pub(crate) fn compare_run<T: Int>(
        &mut self,
        from: u64,
        to: u64,
        count: u64,
        until_equal: bool,
    ) -> Result<Option<Compared>, Fault> {
        let len = count as usize * T::SIZE;
        let Some(first) = self.readable(from, len, T::SIZE)? else { return Ok(None) };
        let Some(second) = self.readable(to, len, T::SIZE)? else { return Ok(None) };
        Ok(Some(first.compare::<T>(second, count as usize, until_equal)))
    }

    /// The same for `value` and elements, as `rep scas` does.
    ///
    /// # Errors
    /// Those of the first element.
    pub(crate) fn scan_run<T: Int>(
        &mut self,
        at: u64,
        value: T,
        count: u64,
        until_equal: bool,
    ) -> Result<Option<Compared>, Fault> {
        let found = self.readable(at, count as usize * T::SIZE, T::SIZE)?;
        Ok(found.map(|host| host.scan(value, count as usize, until_equal)))
    }

    /// Where to read. `None`: not RAM.
    #[inline]
    fn readable(&mut self, at: u64, len: usize, element: usize) -> Result<Option<HostAddr>, Fault> {
        if let Some(host) = self.mmu.tlb.probe_read(at, len) {
            return Ok(Some(host));
        }
        self.check_alignment(at, element)?;
        Ok(match self.translate(at, len, Access::Read)? {
            Target::Ram { host, .. } => Some(host),
            Target::Mmio(_) => None,
        })
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
