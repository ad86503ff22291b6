//! A driver that breaks every rule it can: the same mischief for deterministic tests and for
//! libFuzzer.

use vm_memory::{Bytes, GuestAddress};

use super::{DriverQueue, Guest, reg};
use crate::BusDevice;

/// Where the choices come from: a seeded sequence or a fuzzer's bytes.
pub trait Choices {
    /// The next number, `None` at the end.
    fn draw(&mut self) -> Option<u64>;

    /// A number below `bound`.
    fn below(&mut self, bound: u64) -> Option<u64> {
        Some(self.draw()? % bound.max(1))
    }
}

impl Choices for super::Rng {
    fn draw(&mut self) -> Option<u64> {
        Some(self.next())
    }
}

/// A fuzzer's input, eight bytes a choice (the last ones padded).
#[derive(Debug)]
pub struct Bytewise<'a>(pub &'a [u8]);

impl Choices for Bytewise<'_> {
    fn draw(&mut self) -> Option<u64> {
        if self.0.is_empty() {
            return None;
        }
        let (now, rest) = self.0.split_at(self.0.len().min(8));
        self.0 = rest;
        let mut raw = [0; 8];
        raw[..now.len()].copy_from_slice(now);
        Some(u64::from_le_bytes(raw))
    }
}

/// An address that is often plausible and sometimes at the edge of something.
fn address(c: &mut impl Choices, ram: u64) -> Option<u64> {
    Some(match c.below(12)? {
        0 => c.draw()?,
        1 => ram - c.below(64)?,
        2 => ram + c.below(64)?,
        3 => u64::MAX - c.below(64)?,
        _ => c.below(ram)?,
    })
}

fn length(c: &mut impl Choices) -> Option<u32> {
    Some(match c.below(8)? {
        0 => c.draw()? as u32,
        1 => 0,
        2 => u32::MAX,
        3 => c.below(64)? as u32,
        4 => 44 + c.below(3)? as u32,
        _ => c.below(0x3000)? as u32,
    })
}

/// One round of mischief on `queue`: some descriptors, perhaps a header that makes sense, some heads,
/// an index that may jump, a notification. `None` when the choices are used up.
pub fn mischief(
    guest: &Guest,
    queue: &mut DriverQueue,
    header: impl Fn(&mut dyn FnMut() -> Option<u64>) -> Option<Vec<u8>>,
    c: &mut impl Choices,
) -> Option<()> {
    let size = u64::from(queue.size());
    let ram = guest.ram.size();
    for _ in 0..1 + c.below(6)? {
        let id = c.below(size)? as u16;
        let flags = match c.below(16)? {
            0 => c.draw()? as u16,
            1 => 4,
            2 => 5,
            n => (n & 3) as u16,
        };
        let next = if c.below(10)? == 0 { c.draw()? } else { c.below(size)? } as u16;
        let (addr, len) = (address(c, ram)?, length(c)?);
        queue.write_descriptor(id, addr, len, flags, next);
        if c.below(2)? == 0 {
            let bytes = header(&mut || c.draw())?;
            let _ = guest.memory().write(&bytes, GuestAddress(addr));
        }
    }
    for _ in 0..c.below(4)? {
        let head = if c.below(20)? == 0 { c.draw()? } else { c.below(size)? } as u16;
        queue.publish(head);
    }
    if c.below(40)? == 0 {
        queue.set_available_index(c.draw()? as u16);
    }
    guest.notify(queue.index());
    Some(())
}

/// Writes and reads registers as if by accident.
pub fn poke(guest: &Guest, c: &mut impl Choices) -> Option<()> {
    let offset = if c.below(2)? == 0 { 4 * c.below(0x50)? } else { c.below(0x1000)? };
    let len = if c.below(4)? == 0 { c.below(10)? as usize } else { 4 };
    let value = c.draw()?.to_le_bytes();
    let mut data = [0; 16];
    data[..8].copy_from_slice(&value);
    guest.mmio.write(offset, &data[..len]);
    guest.mmio.read(offset, &mut data[..len]);
    Some(())
}

/// Whether the device still answers a driver that starts over and does it right.
pub fn recovers(guest: &mut Guest) -> Vec<DriverQueue> {
    guest.reset();
    assert_eq!(guest.read(reg::INTERRUPT_STATUS), 0);
    guest.start()
}
