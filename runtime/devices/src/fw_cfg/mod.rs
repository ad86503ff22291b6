//! QEMU's firmware configuration device (its `docs/specs/fw_cfg`): items of bytes by number, which
//! kernels and firmware written for that emulator read without being told that there is one.
//!
//! The guest writes an item's number to the selector port, then reads the item byte by byte from the
//! data port, or lets it be copied to an address of its own by one access to the DMA register. All
//! items are read-only. Past an item's end, and in items that there are not, everything is zero.
//!
//! Not in scope: what the items say; whoever loads the kernel knows.

mod dma;
mod items;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::{Mutex, PoisonError};

use mvm_memory::GuestRam;
use serde::{Deserialize, Serialize};

use crate::BusDevice;
use items::Items;

pub use items::{Content, key};

/// What a number is or'ed with for items that are to be written: a relic, all are read-only.
const WRITE_CHANNEL: u16 = 1 << 14;

/// The device, for one range of ports.
pub struct FwCfg {
    ram: GuestRam,
    state: Mutex<State>,
}

/// Where the guest is, and what there is for it.
#[derive(Debug, Default)]
struct State {
    items: Items,
    selected: u16,
    /// Bytes of the selected item that have been read.
    offset: u64,
    /// The upper half of the next DMA descriptor's address.
    dma_high: u32,
}

/// What a guest can notice of the device besides its items, as a snapshot has it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FwCfgState {
    /// Number of the selected item.
    pub selected: u16,
    /// Bytes of it that have been read.
    pub offset: u64,
    /// The upper half of the next DMA descriptor's address.
    pub dma_high: u32,
}

impl FwCfg {
    /// First port, the selector (16 bits, write-only).
    pub const PORT: u64 = 0x510;
    /// Bytes of port space: selector, data, two unused, DMA register.
    pub const LEN: u64 = 12;
    /// Offset of the data port (8 bits, read-only).
    pub const DATA: u64 = 1;
    /// Offset of the DMA register (64 bits, big-endian; its second half starts the transfer).
    pub const DMA: u64 = 4;

    /// What the DMA register reads as.
    const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";

    /// A device for the guest whose memory `ram` is, without any item but its signature.
    pub fn new(ram: GuestRam) -> Self {
        Self { ram, state: Mutex::default() }
    }

    /// Adds an item, or puts it in the place of the one that has this number; `number` is one of
    /// [`key`].
    pub fn item(&self, number: u16, content: impl Into<Box<dyn Content>>) {
        self.lock().items.set(number, content.into());
    }

    /// Adds a file, which the guest finds in the directory by its name of at most 55 bytes. Returns
    /// whether there was room for it.
    pub fn file(&self, name: &str, content: impl Into<Box<dyn Content>>) -> bool {
        self.lock().items.add_file(name, content.into())
    }

    /// Where the guest is. What the items say is not part of it.
    pub fn state(&self) -> FwCfgState {
        let State { selected, offset, dma_high, .. } = *self.lock();
        FwCfgState { selected, offset, dma_high }
    }

    /// Goes on from `state`.
    pub fn restore(&self, state: &FwCfgState) {
        let mut now = self.lock();
        now.selected = state.selected;
        now.offset = state.offset;
        now.dma_high = state.dma_high;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // No state is ever halfway changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn select(&mut self, number: u16) {
        self.selected = number & !WRITE_CHANNEL;
        self.offset = 0;
    }

    /// Fills `data` with what comes next in the selected item.
    fn read(&mut self, data: &mut [u8]) {
        data.fill(0);
        self.items.read(self.selected, self.offset, data);
        self.offset = self.offset.saturating_add(data.len() as u64);
    }
}

impl BusDevice for FwCfg {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = match at.checked_sub(Self::DMA) {
                Some(index) => Self::DMA_SIGNATURE.get(index as usize).copied().unwrap_or_default(),
                None if at == Self::DATA => {
                    let mut next = [0];
                    self.lock().read(&mut next);
                    next[0]
                }
                None => 0,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        const LOW: u64 = FwCfg::DMA + 4;
        let mut state = self.lock();
        match (offset, data) {
            (0, &[low, high]) => state.select(u16::from_le_bytes([low, high])),
            (Self::DMA, &[a, b, c, d]) => state.dma_high = u32::from_be_bytes([a, b, c, d]),
            (LOW, &[a, b, c, d]) => {
                let high = std::mem::take(&mut state.dma_high);
                let low = u32::from_be_bytes([a, b, c, d]);
                state.transfer(&self.ram, u64::from(high) << 32 | u64::from(low));
            }
            // Nothing else is a register.
            _ => {}
        }
    }
}

impl fmt::Debug for FwCfg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FwCfg").finish_non_exhaustive()
    }
}
