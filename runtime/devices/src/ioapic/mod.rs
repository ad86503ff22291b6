//! The I/O APIC (Intel 82093AA, with the version 0x20 EOI register): 24 pins in, messages out.
//!
//! Wires are logical: a pin is asserted or not, so the polarity bit of an entry is kept for the
//! guest to read and changes nothing.

mod entry;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::BusDevice;
use crate::irq::{InterruptLine, MsiMessage, MsiSink};
use entry::Entry;

const PINS: usize = 24;
const VERSION: u32 = 0x20;

/// Window registers (offset from the base).
mod window {
    pub const SELECT: u64 = 0x00;
    pub const DATA: u64 = 0x10;
    pub const EOI: u64 = 0x40;
}

/// Indirect registers (written to [`window::SELECT`]).
mod register {
    pub const ID: u8 = 0;
    pub const VERSION: u8 = 1;
    pub const ARBITRATION: u8 = 2;
    pub const TABLE: u8 = 0x10;
}

/// All that the guest can see of the controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    /// Selected register.
    pub select: u8,
    /// Identification register, bits 27:24.
    pub id: u8,
    /// Redirection table.
    pub entries: [u64; PINS],
    /// Bit per pin: the wire is asserted.
    pub asserted: u32,
}

impl Default for IoApicState {
    fn default() -> Self {
        Self { select: 0, id: 0, entries: [Entry::RESET.0; PINS], asserted: 0 }
    }
}

/// The controller. Placed on the memory bus ([`IoApic::BASE`], [`IoApic::LEN`]).
pub struct IoApic {
    state: Mutex<IoApicState>,
    sink: Arc<dyn MsiSink>,
}

impl IoApic {
    /// Where every PC has it.
    pub const BASE: u64 = 0xfec0_0000;
    /// Bytes of address space.
    pub const LEN: u64 = 0x1000;
    /// Number of pins (global system interrupts 0 to 23).
    pub const PINS: u8 = PINS as u8;

    /// A controller after reset, all pins masked.
    pub fn new(sink: Arc<dyn MsiSink>) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), sink })
    }

    /// The wire to pin `pin`, if there is such a pin.
    pub fn pin(self: &Arc<Self>, pin: u8) -> Option<IoApicPin> {
        (pin < Self::PINS).then(|| IoApicPin { ioapic: self.clone(), pin })
    }

    /// Sets the wire of `pin`. A pin that does not exist is ignored.
    pub fn set_level(&self, pin: u8, asserted: bool) {
        if pin >= Self::PINS {
            return;
        }
        let mut state = self.lock();
        let was = state.asserted >> pin & 1 != 0;
        if !asserted {
            state.asserted &= !(1 << pin);
            return;
        }
        state.asserted |= 1 << pin;
        let entry = Entry(state.entries[usize::from(pin)]);
        // An edge on a masked pin is lost (82093AA data sheet, 3.2.4, interrupt mask).
        if entry.level() || !was {
            self.deliver(&mut state, pin);
        }
    }

    /// A local APIC has ended an interrupt of `vector`: level-triggered entries with this vector are
    /// armed again, and sent again if their wire is still asserted.
    pub fn eoi_broadcast(&self, vector: u8) {
        let mut state = self.lock();
        for pin in 0..Self::PINS {
            let entry = Entry(state.entries[usize::from(pin)]);
            if entry.level() && entry.vector() == vector && entry.remote_irr() {
                state.entries[usize::from(pin)] = entry.with_remote_irr(false).0;
                if state.asserted >> pin & 1 != 0 {
                    self.deliver(&mut state, pin);
                }
            }
        }
    }

    /// True if an end of interrupt of `vector` has to be told to [`IoApic::eoi_broadcast`].
    pub fn wants_eoi(&self, vector: u8) -> bool {
        self.lock().entries.iter().any(|&e| Entry(e).level() && Entry(e).vector() == vector)
    }

    /// What pin `pin` sends now, `None` if masked or absent.
    pub fn route(&self, pin: u8) -> Option<MsiMessage> {
        let entry = Entry(*self.lock().entries.get(usize::from(pin))?);
        (!entry.masked()).then(|| entry.message())
    }

    /// The state, for a snapshot.
    pub fn state(&self) -> IoApicState {
        self.lock().clone()
    }

    /// Takes over `state` and tells the sink all routes. Nothing is sent: interrupts in flight are
    /// in the local APICs' state.
    pub fn restore(&self, state: &IoApicState) {
        let mut current = self.lock();
        *current = state.clone();
        for pin in 0..Self::PINS {
            self.announce(&current, pin);
        }
    }

    fn lock(&self) -> MutexGuard<'_, IoApicState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn deliver(&self, state: &mut IoApicState, pin: u8) {
        let slot = &mut state.entries[usize::from(pin)];
        let entry = Entry(*slot);
        if entry.masked() || entry.level() && entry.remote_irr() {
            return;
        }
        if entry.level() {
            *slot = entry.with_remote_irr(true).0;
        }
        let message = entry.message();
        self.sink.signal_msi(message.address, message.data);
    }

    fn announce(&self, state: &IoApicState, pin: u8) {
        let entry = Entry(state.entries[usize::from(pin)]);
        self.sink.route_changed(pin, (!entry.masked()).then(|| entry.message()));
    }

    fn read_register(state: &IoApicState) -> u32 {
        match state.select {
            register::ID | register::ARBITRATION => u32::from(state.id) << 24,
            register::VERSION => VERSION | (u32::from(Self::PINS) - 1) << 16,
            index => match table_slot(index) {
                Some((pin, high)) => (state.entries[pin] >> if high { 32 } else { 0 }) as u32,
                None => 0,
            },
        }
    }

    fn write_register(&self, state: &mut IoApicState, value: u32) {
        if state.select == register::ID {
            state.id = (value >> 24) as u8 & 0xf;
            return;
        }
        let Some((pin, high)) = table_slot(state.select) else { return };
        let entry = Entry(state.entries[pin]).with_half(high, value);
        state.entries[pin] = entry.0;
        self.announce(state, pin as u8);
        if entry.level() && state.asserted >> pin & 1 != 0 {
            self.deliver(state, pin as u8);
        }
    }
}

/// Which entry, and which half of it, an indirect register names.
fn table_slot(index: u8) -> Option<(usize, bool)> {
    let slot = index.checked_sub(register::TABLE)?;
    let pin = usize::from(slot / 2);
    (pin < PINS).then_some((pin, slot % 2 == 1))
}

impl BusDevice for IoApic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        let value = match offset {
            window::SELECT => u32::from(state.select),
            window::DATA => Self::read_register(&state),
            _ => 0,
        };
        data.fill(0);
        let len = data.len().min(4);
        data[..len].copy_from_slice(&value.to_le_bytes()[..len]);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        let len = data.len().min(4);
        bytes[..len].copy_from_slice(&data[..len]);
        let value = u32::from_le_bytes(bytes);
        match offset {
            window::SELECT => self.lock().select = value as u8,
            window::DATA => self.write_register(&mut self.lock(), value),
            window::EOI => self.eoi_broadcast(value as u8),
            _ => {}
        }
    }
}

impl fmt::Debug for IoApic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoApic").field("state", &*self.lock()).finish_non_exhaustive()
    }
}

/// One input of the controller.
#[derive(Debug, Clone)]
pub struct IoApicPin {
    ioapic: Arc<IoApic>,
    pin: u8,
}

impl InterruptLine for IoApicPin {
    fn set_level(&self, asserted: bool) {
        self.ioapic.set_level(self.pin, asserted);
    }
}

#[cfg(test)]
mod tests;
