//! Address decoding: from a port or a guest physical address to a device and an offset.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// A device that answers accesses at offsets from where it was placed.
///
/// The guest chooses size and alignment freely: an implementation tolerates any `data.len()`,
/// answers what makes no sense with zeros or all-ones, and ignores writes it does not understand.
/// Called from any vCPU's thread, several at once.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with what the device shows at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes `data`, written by the guest at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a device could not be placed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The range is empty or runs past the end of the space.
    #[error("device {name}: range {base:#x}+{len:#x} does not fit its address space")]
    Range {
        /// Who asked.
        name: String,
        /// First address.
        base: u64,
        /// Bytes.
        len: u64,
    },
    /// Another device has part of the range.
    #[error("device {name}: range {base:#x}+{len:#x} overlaps device {other}")]
    Overlap {
        /// Who asked.
        name: String,
        /// First address.
        base: u64,
        /// Bytes.
        len: u64,
        /// Who is there already.
        other: String,
    },
}

struct Entry {
    base: u64,
    len: u64,
    name: String,
    device: Arc<dyn BusDevice>,
    reads: AtomicU64,
    writes: AtomicU64,
}

/// Accesses that one device has answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeviceStats {
    /// The name it was placed under.
    pub name: String,
    /// First address.
    pub base: u64,
    /// Reads so far.
    pub reads: u64,
    /// Writes so far.
    pub writes: u64,
}

/// One space of addresses: sorted, non-overlapping ranges, fixed once the machine runs.
///
/// An access that no range covers whole is unclaimed: reads give all-ones, writes go nowhere, as on
/// a PC.
pub struct AddressSpace {
    limit: u64,
    entries: Vec<Entry>,
    unclaimed: AtomicU64,
}

impl AddressSpace {
    fn new(limit: u64) -> Self {
        Self { limit, entries: Vec::new(), unclaimed: AtomicU64::new(0) }
    }

    /// Places `device` at `[base, base + len)`.
    ///
    /// # Errors
    /// [`BusError`]: the range does not fit or is taken.
    pub fn insert(
        &mut self,
        name: &str,
        base: u64,
        len: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), BusError> {
        let last = len.checked_sub(1).and_then(|n| base.checked_add(n));
        let Some(last) = last.filter(|&last| last <= self.limit) else {
            return Err(BusError::Range { name: name.into(), base, len });
        };
        if let Some(other) = self.entries.iter().find(|e| e.base <= last && base <= e.last()) {
            let other = other.name.clone();
            return Err(BusError::Overlap { name: name.into(), base, len, other });
        }
        let at = self.entries.partition_point(|e| e.base < base);
        let (reads, writes) = (AtomicU64::new(0), AtomicU64::new(0));
        self.entries.insert(at, Entry { base, len, name: name.into(), device, reads, writes });
        Ok(())
    }

    /// Reads at `addr`. Returns whether a device answered.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        let Some((entry, offset)) = self.find(addr, data.len()) else {
            data.fill(0xff);
            return false;
        };
        entry.reads.fetch_add(1, Ordering::Relaxed);
        entry.device.read(offset, data);
        true
    }

    /// Writes at `addr`. Returns whether a device took it.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        let Some((entry, offset)) = self.find(addr, data.len()) else { return false };
        entry.writes.fetch_add(1, Ordering::Relaxed);
        entry.device.write(offset, data);
        true
    }

    /// Counters of every device, in address order.
    pub fn stats(&self) -> Vec<DeviceStats> {
        self.entries
            .iter()
            .map(|e| DeviceStats {
                name: e.name.clone(),
                base: e.base,
                reads: e.reads.load(Ordering::Relaxed),
                writes: e.writes.load(Ordering::Relaxed),
            })
            .collect()
    }

    /// Accesses that no device claimed.
    pub fn unclaimed(&self) -> u64 {
        self.unclaimed.load(Ordering::Relaxed)
    }

    fn find(&self, addr: u64, len: usize) -> Option<(&Entry, u64)> {
        let after = self.entries.partition_point(|e| e.base <= addr);
        let hit = after.checked_sub(1).map(|i| &self.entries[i]).and_then(|e| {
            let offset = addr - e.base;
            let end = offset.checked_add(len as u64)?;
            (end <= e.len).then_some((e, offset))
        });
        if hit.is_none() {
            self.unclaimed.fetch_add(1, Ordering::Relaxed);
        }
        hit
    }
}

impl Entry {
    fn last(&self) -> u64 {
        self.base + (self.len - 1)
    }
}

impl fmt::Debug for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.entries.iter().map(|e| (e.base, &e.name))).finish()
    }
}

/// The two address spaces of a PC, shared by all vCPUs.
///
/// ```
/// use std::sync::Arc;
/// use mvm_devices::{Bus, BusDevice};
///
/// struct Constant(u8);
/// impl BusDevice for Constant {
///     fn read(&self, _offset: u64, data: &mut [u8]) { data.fill(self.0) }
///     fn write(&self, _offset: u64, _data: &[u8]) {}
/// }
///
/// let mut bus = Bus::new();
/// bus.ports.insert("constant", 0x60, 1, Arc::new(Constant(7)))?;
/// let mut byte = [0];
/// assert!(bus.ports.read(0x60, &mut byte));
/// assert_eq!(byte, [7]);
/// # Ok::<(), mvm_devices::BusError>(())
/// ```
#[derive(Debug)]
pub struct Bus {
    /// Port I/O, 0 to 0xffff.
    pub ports: AddressSpace,
    /// Guest physical memory that is not RAM.
    pub memory: AddressSpace,
}

impl Bus {
    /// Two empty spaces.
    pub fn new() -> Self {
        Self { ports: AddressSpace::new(0xffff), memory: AddressSpace::new(u64::MAX) }
    }
}

impl Default for Bus {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;
    impl BusDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, _: u64, _: &[u8]) {}
    }

    #[test]
    fn accesses_reach_the_device_that_covers_them_whole() {
        let mut bus = Bus::new();
        bus.memory.insert("b", 0x2000, 0x100, Arc::new(Echo)).unwrap();
        bus.memory.insert("a", 0x1000, 0x1000, Arc::new(Echo)).unwrap();
        let mut data = [0; 4];
        assert!(bus.memory.read(0x2010, &mut data));
        assert_eq!(data, [0x10; 4]);
        assert!(!bus.memory.read(0x20fe, &mut data), "straddles the end");
        assert_eq!(data, [0xff; 4]);
        assert!(!bus.memory.read(u64::MAX, &mut data));
        assert!(!bus.memory.write(0xfff, &[0]));
        assert_eq!(bus.memory.unclaimed(), 3);
        assert_eq!(bus.memory.stats()[1].reads, 1);
    }

    #[test]
    fn overlaps_and_overflows_are_refused() {
        let mut bus = Bus::new();
        bus.memory.insert("a", 0x1000, 0x1000, Arc::new(Echo)).unwrap();
        for (base, len) in [(0xfff, 2), (0x1fff, 1), (0, u64::MAX)] {
            let refused = bus.memory.insert("b", base, len, Arc::new(Echo));
            assert!(matches!(refused, Err(BusError::Overlap { .. })), "{base:#x}+{len:#x}");
        }
        for (base, len) in [(5, 0), (u64::MAX, 2)] {
            let refused = bus.memory.insert("b", base, len, Arc::new(Echo));
            assert!(matches!(refused, Err(BusError::Range { .. })));
        }
        assert!(bus.ports.insert("c", 0xffff, 2, Arc::new(Echo)).is_err());
        assert!(bus.ports.insert("c", 0xffff, 1, Arc::new(Echo)).is_ok());
    }
}
