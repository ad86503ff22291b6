//! The interrupt controllers of old PCs: two 8259A, of which the second has its output at input 2 of the first.
//!
//! Inputs are IRQ 0 to 15. An edge is kept until it is acknowledged, also when its wire has fallen again in between
//! (a real one would then say that the interrupt is spurious): devices here give short edges. The first one's output,
//! INTR, goes to the processor, which acknowledges and gets a vector. What the second one takes back is not requested
//! of the first one any more, so that a spurious interrupt is always IRQ 7.
//!
//! Source: Intel 8259A data sheet (order number 231468); Intel 82371 (PIIX) for the edge/level control registers.

mod chip;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::irq::{InterruptLine, MsiSink};
use crate::{BusDevice, BusError, IoApicPin};
use chip::{CASCADE, Chip};

/// Vectors of inputs 0 and 8, as a PC's firmware sets them.
const FIRMWARE_BASES: [u8; 2] = [0x08, 0x70];

/// Inputs that can be made levels: not timer, keyboard, cascade, clock and floating-point unit.
const ELCR_MASKS: [u8; 2] = [0xf8, 0xde];

/// What a guest can notice of both, as a snapshot has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicState {
    chips: [Chip; 2],
}

impl Default for PicState {
    fn default() -> Self {
        Self { chips: FIRMWARE_BASES.map(Chip::after_firmware) }
    }
}

impl PicState {
    fn set_irq(&mut self, irq: u8, asserted: bool) {
        match irq {
            0..8 => self.chips[0].set_line(irq, asserted),
            _ => self.chips[1].set_line(irq - 8, asserted),
        }
    }

    /// Input 2 of the first is the output of the second.
    fn cascade(&mut self) {
        let [first, second] = &mut self.chips;
        match second.request() {
            Some(_) => first.set_line(CASCADE, true),
            None => first.withdraw(CASCADE),
        }
    }

    fn intr(&self) -> bool {
        self.chips[0].request().is_some()
    }

    fn acknowledge(&mut self) -> u8 {
        let [first, second] = &mut self.chips;
        let input = first.acknowledge();
        if input != CASCADE || first.is_single() {
            return first.vector(input);
        }
        let input = second.acknowledge();
        let vector = second.vector(input);
        // Its output falls in any case: another request is another edge.
        first.withdraw(CASCADE);
        self.cascade();
        vector
    }
}

/// Both controllers.
pub struct Pic {
    state: Mutex<PicState>,
    sink: Arc<dyn MsiSink>,
}

impl Pic {
    /// First ports of the controllers, and of the edge/level control registers.
    pub const PORTS: [u64; 2] = [0x20, 0xa0];
    /// First of the edge/level control registers.
    pub const ELCR: u64 = 0x4d0;
    /// Ports at each of these places.
    pub const LEN: u64 = 2;
    /// Number of inputs.
    pub const INPUTS: u8 = 16;

    /// Controllers as firmware leaves them, all inputs masked. INTR goes to `sink`.
    pub fn new(sink: Arc<dyn MsiSink>) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), sink })
    }

    /// Places their ports on `bus`.
    ///
    /// # Errors
    /// The places are taken.
    pub fn place(self: &Arc<Self>, bus: &mut crate::Bus) -> Result<(), BusError> {
        let [first, second] = Self::PORTS;
        for (port, part) in [(first, Part::First), (second, Part::Second), (Self::ELCR, Part::Elcr)]
        {
            bus.ports.insert(
                "pic",
                port,
                Self::LEN,
                Arc::new(Ports { pic: self.clone(), part }),
            )?;
        }
        Ok(())
    }

    /// Sets the wire of input `irq`. One that does not exist, or that is the second controller's, is ignored.
    pub fn set_irq(&self, irq: u8, asserted: bool) {
        if irq < Self::INPUTS && irq != CASCADE {
            self.change(|state| state.set_irq(irq, asserted));
        }
    }

    /// The wire of input `irq`, if a device can have it.
    pub fn pin(self: &Arc<Self>, irq: u8) -> Option<PicPin> {
        (irq < Self::INPUTS && irq != CASCADE).then(|| PicPin { pic: self.clone(), irq })
    }

    /// Whether the processor is asked for an interrupt.
    pub fn intr(&self) -> bool {
        self.lock().intr()
    }

    /// The processor takes an interrupt: its vector. If nothing is requested any more, it is that of a spurious one.
    pub fn acknowledge(&self) -> u8 {
        self.change(PicState::acknowledge)
    }

    /// The state, for a snapshot.
    pub fn state(&self) -> PicState {
        self.lock().clone()
    }

    /// Takes over `state`, and tells the processor if that changes INTR.
    pub fn restore(&self, state: &PicState) {
        let mut current = self.lock();
        let before = current.intr();
        for ((chip, new), mask) in current.chips.iter_mut().zip(&state.chips).zip(ELCR_MASKS) {
            *chip = new.clone().sound(mask);
        }
        let after = current.intr();
        if after != before {
            self.sink.set_intr(after);
        }
    }

    /// Does something to the controllers, and tells the processor if that changes INTR.
    fn change<T>(&self, act: impl FnOnce(&mut PicState) -> T) -> T {
        let mut state = self.lock();
        let before = state.intr();
        let result = act(&mut state);
        state.cascade();
        let after = state.intr();
        if after != before {
            // With the lock held, so that two changes come in their order.
            self.sink.set_intr(after);
        }
        result
    }

    fn lock(&self) -> MutexGuard<'_, PicState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Pic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pic").field("state", &*self.lock()).finish_non_exhaustive()
    }
}

#[derive(Debug, Clone, Copy)]
enum Part {
    First,
    Second,
    Elcr,
}

/// Two ports of the controllers.
#[derive(Debug)]
struct Ports {
    pic: Arc<Pic>,
    part: Part,
}

impl BusDevice for Ports {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (place, byte) in (offset..).zip(data) {
            let odd = place & 1 != 0;
            // A read may acknowledge.
            *byte = self.pic.change(|state| match self.part {
                Part::First => state.chips[0].read(odd),
                Part::Second => state.chips[1].read(odd),
                Part::Elcr => state.chips[usize::from(odd)].elcr(),
            });
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (place, &value) in (offset..).zip(data) {
            let odd = place & 1 != 0;
            self.pic.change(|state| match self.part {
                Part::First => state.chips[0].write(odd, value),
                Part::Second => state.chips[1].write(odd, value),
                Part::Elcr => {
                    let which = usize::from(odd);
                    state.chips[which].set_elcr(value & ELCR_MASKS[which]);
                }
            });
        }
    }
}

/// One input of the controllers.
#[derive(Debug, Clone)]
pub struct PicPin {
    pic: Arc<Pic>,
    irq: u8,
}

impl InterruptLine for PicPin {
    fn set_level(&self, asserted: bool) {
        self.pic.set_irq(self.irq, asserted);
    }
}

/// A wire that ends at both kinds of controllers, as those of a PC's devices do.
#[derive(Debug)]
pub struct IsaLine {
    /// At the old ones.
    pub pic: PicPin,
    /// At the new one.
    pub ioapic: IoApicPin,
}

impl InterruptLine for IsaLine {
    fn set_level(&self, asserted: bool) {
        self.pic.set_level(asserted);
        self.ioapic.set_level(asserted);
    }
}

#[cfg(test)]
mod tests;
