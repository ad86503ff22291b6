//! Read-modify-write accesses, plain and locked.

use super::access::{Target, check_end, crosses, stack_fault};
use super::raw::HostAddr;
use super::tlb::Access;
use crate::cpu::Cpu;
use crate::fault::Fault;
use crate::flags::Cc;
use crate::int::Int;
use crate::op::{Flow, Op};

/// The slow way of a read-modify-write: the old value, and where the new one goes.
struct Pending {
    old: u64,
    linear: u64,
    target: Target,
}

impl Cpu {
    /// Replaces an op's memory operand by `f(old, flags)`; then sets the flags.
    #[inline(always)]
    pub fn modify<T: Int>(&mut self, op: &Op, f: impl FnOnce(T, Cc) -> (T, Cc)) -> Flow {
        let linear = match self.ea_checked(op, T::SIZE, true) {
            Ok(linear) => linear,
            Err(fault) => return self.raise(fault),
        };
        if let Some(host) = self.mmu.tlb.probe_write(linear, T::SIZE) {
            let (new, cc) = f(host.load(), self.cc);
            host.store(new);
            self.cc = cc;
            return Flow::Next;
        }
        match self.begin_modify(linear, T::SIZE) {
            Ok(pending) => {
                let (new, cc) = f(T::truncate(pending.old), self.cc);
                let flow = self.end_modify(&pending, T::SIZE, new.zext());
                if flow != Flow::Fault {
                    self.cc = cc;
                }
                flow
            }
            Err(fault) => self.raise(stack_fault(op, fault)),
        }
    }

    /// As [`Cpu::modify`], as one atomic operation.
    #[inline(always)]
    pub fn modify_locked<T: Int>(&mut self, op: &Op, f: impl Fn(T, Cc) -> (T, Cc)) -> Flow {
        self.exchange_locked(op, |old, cc| {
            let (new, cc) = f(old, cc);
            (new, cc, ())
        })
        .0
    }

    /// An atomic read-modify-write that also hands something back from the step that succeeded.
    #[inline(always)]
    pub fn exchange_locked<T: Int, R>(
        &mut self,
        op: &Op,
        f: impl Fn(T, Cc) -> (T, Cc, R),
    ) -> (Flow, Option<R>) {
        let linear = match self.ea_checked(op, T::SIZE, true) {
            Ok(linear) => linear,
            Err(fault) => return (self.raise(fault), None),
        };
        if let Some(host) = self.mmu.tlb.probe_write(linear, T::SIZE) {
            let (cc, result) = atomic(host, self.cc, f);
            self.cc = cc;
            return (Flow::Next, Some(result));
        }
        self.exchange_locked_slow(op, linear, f)
    }

    #[cold]
    #[inline(never)]
    fn exchange_locked_slow<T: Int, R>(
        &mut self,
        op: &Op,
        linear: u64,
        f: impl Fn(T, Cc) -> (T, Cc, R),
    ) -> (Flow, Option<R>) {
        if let Err(fault) = self.check_alignment(linear, T::SIZE) {
            return (self.raise(stack_fault(op, fault)), None);
        }
        if !crosses(linear, T::SIZE) {
            match self.translate(linear, T::SIZE, Access::Write) {
                Ok(Target::Ram { host, page, fast }) => {
                    let (cc, result) = atomic(host, self.cc, f);
                    self.cc = cc;
                    return (self.stored(host, page, fast, T::SIZE).into(), Some(result));
                }
                Ok(Target::Mmio(_)) => {}
                Err(fault) => return (self.raise(stack_fault(op, fault)), None),
            }
        }
        // Across pages, or on the bus: alone in the machine among operations of this kind.
        let phys = self.mmu.phys.clone();
        let _alone = phys.split_lock();
        match self.begin_modify(linear, T::SIZE) {
            Ok(pending) => {
                let (new, cc, result) = f(T::truncate(pending.old), self.cc);
                let flow = self.end_modify(&pending, T::SIZE, new.zext());
                if flow != Flow::Fault {
                    self.cc = cc;
                }
                (flow, Some(result))
            }
            Err(fault) => (self.raise(stack_fault(op, fault)), None),
        }
    }

    #[cold]
    #[inline(never)]
    fn begin_modify(&mut self, linear: u64, size: usize) -> Result<Pending, Fault> {
        // Rights to write are checked before anything is read: the fault is a write's.
        self.check_alignment(linear, size)?;
        check_end(linear, size)?;
        let head = size.min(4096 - (linear & 0xfff) as usize);
        let target = self.translate(linear, head, Access::Write)?;
        let mut bytes = [0; 8];
        if crosses(linear, size) {
            self.translate((linear | 0xfff).wrapping_add(1), size - head, Access::Write)?;
            self.read_bytes(linear, &mut bytes[..size])?;
        } else {
            match target {
                Target::Ram { host, .. } => host.copy_out(&mut bytes[..size]),
                Target::Mmio(gpa) => self.bus_read(gpa, &mut bytes[..size]),
            }
        }
        Ok(Pending { old: u64::from_le_bytes(bytes), linear, target })
    }

    #[cold]
    #[inline(never)]
    fn end_modify(&mut self, pending: &Pending, size: usize, value: u64) -> Flow {
        if crosses(pending.linear, size) {
            return match self.write_bytes(pending.linear, &value.to_le_bytes()[..size]) {
                Ok(wrote) => wrote.into(),
                Err(fault) => self.raise(fault),
            };
        }
        self.store_at(pending.target, size, value).into()
    }

    /// The host address of `size` aligned bytes for a 16-byte locked operation, with what to do
    /// after the store.
    ///
    /// # Errors
    /// #PF, #GP(0).
    #[allow(clippy::type_complexity)]
    pub(crate) fn locked_block(
        &mut self,
        linear: u64,
    ) -> Result<Option<(HostAddr, impl FnOnce(&mut Self) -> Flow + use<>)>, Fault> {
        match self.translate(linear, 16, Access::Write)? {
            Target::Ram { host, page, fast } => {
                Ok(Some((host, move |cpu: &mut Self| cpu.stored(host, page, fast, 16).into())))
            }
            Target::Mmio(_) => Ok(None),
        }
    }
}

impl Cpu {
    /// CMPXCHG16B of memory that is not RAM, in halves: alone in the machine among operations of this kind. Returns what
    /// was there.
    ///
    /// # Errors
    /// #PF, #GP(0).
    #[cold]
    pub(crate) fn compare_exchange_16_on_bus(
        &mut self,
        linear: u64,
        expected: u128,
        new: u128,
    ) -> Result<(u128, Flow), Fault> {
        let phys = self.mmu.phys.clone();
        let _alone = phys.split_lock();
        let mut bytes = [0; 16];
        for half in [0, 8] {
            let word = self.read::<u64>(linear.wrapping_add(half))?;
            bytes[half as usize..][..8].copy_from_slice(&word.to_le_bytes());
        }
        let old = u128::from_le_bytes(bytes);
        // The processor stores in any case.
        let stored = if old == expected { new } else { old };
        for half in [0, 8] {
            self.write::<u64>(linear.wrapping_add(half), (stored >> (half * 8)) as u64)?;
        }
        Ok((old, Flow::Next))
    }
}

/// Replaces the value at `host` by `f` of it in one locked step.
#[inline(always)]
fn atomic<T: Int, R>(host: HostAddr, cc: Cc, f: impl Fn(T, Cc) -> (T, Cc, R)) -> (Cc, R) {
    let mut old = host.load::<T>();
    loop {
        let (new, cc, result) = f(old, cc);
        let seen = host.compare_exchange(old, new);
        if seen == old {
            return (cc, result);
        }
        old = seen;
    }
}
