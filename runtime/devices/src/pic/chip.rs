//! One 8259A.
//!
//! In buffered mode and in that of 8080 processors it answers as in the plain mode of 8086 ones: no PC has the wires
//! in which they differ.

use serde::{Deserialize, Serialize};

/// What is written next.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Expects {
    /// Operation command words.
    #[default]
    Commands,
    /// Initialization command word 2.
    Icw2,
    /// Number 3.
    Icw3,
    /// Number 4.
    Icw4,
}

/// Initialization command words 1 and 4.
mod icw {
    /// Number 1: it is one, a fourth follows, there is one chip alone, inputs are levels.
    pub const FIRST: u8 = 0x10;
    pub const FOURTH_FOLLOWS: u8 = 1;
    pub const SINGLE: u8 = 2;
    pub const LEVEL: u8 = 8;
    /// Number 4.
    pub const AUTO_EOI: u8 = 2;
    pub const SPECIAL_FULLY_NESTED: u8 = 0x10;
}

/// Operation command word 3.
mod ocw3 {
    /// It is one.
    pub const THIRD: u8 = 8;
    pub const POLL: u8 = 4;
    /// In the lower bit there is a choice of the register that is read.
    pub const READ: u8 = 2;
    pub const IN_SERVICE: u8 = 1;
    /// In the lower bit the special mask mode is set or reset.
    pub const SPECIAL_MASK: u8 = 0x40;
    pub const SPECIAL_MASK_ON: u8 = 0x20;
}

/// The input at which a second chip may be.
pub(super) const CASCADE: u8 = 2;

/// What a chip answers with if nothing is requested.
const SPURIOUS: u8 = 7;

/// All that can be noticed of a chip.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Chip {
    /// Bit per input: its wire is asserted.
    lines: u8,
    /// Edges that have come and not been acknowledged.
    edges: u8,
    in_service: u8,
    masked: u8,
    /// The input of lowest priority; the next one has the highest.
    lowest: u8,
    /// The vector of input 0.
    base: u8,
    expects: Expects,
    fourth_follows: bool,
    single: bool,
    /// All inputs are levels, or those of the edge/level control register.
    level: bool,
    elcr: u8,
    auto_eoi: bool,
    rotate_at_auto_eoi: bool,
    special_fully_nested: bool,
    special_mask: bool,
    /// The in-service register is read, in place of the request register.
    reads_in_service: bool,
    /// The next read acknowledges.
    polled: bool,
}

impl Chip {
    /// As firmware leaves it: input 0 has vector `base`, all are masked.
    pub fn after_firmware(base: u8) -> Self {
        Self {
            lines: 0,
            edges: 0,
            in_service: 0,
            masked: 0xff,
            lowest: 7,
            base,
            expects: Expects::Commands,
            fourth_follows: true,
            single: false,
            level: false,
            elcr: 0,
            auto_eoi: false,
            rotate_at_auto_eoi: false,
            special_fully_nested: false,
            special_mask: false,
            reads_in_service: false,
            polled: false,
        }
    }

    /// The same with everything in its range, whoever has made it.
    #[must_use]
    pub fn sound(mut self, elcr_mask: u8) -> Self {
        self.lowest &= 7;
        self.base &= 0xf8;
        self.elcr &= elcr_mask;
        self
    }

    /// Whether there is only this chip, by what it was told.
    pub fn is_single(&self) -> bool {
        self.single
    }

    /// Sets the wire of an input, 0 to 7.
    pub fn set_line(&mut self, input: u8, asserted: bool) {
        let bit = 1 << (input & 7);
        if !asserted {
            self.lines &= !bit;
        } else if self.lines & bit == 0 {
            self.lines |= bit;
            self.edges |= bit;
        }
    }

    /// Lets the wire of an input fall, and forgets that it rose.
    pub fn withdraw(&mut self, input: u8) {
        let bit = 1 << (input & 7);
        self.lines &= !bit;
        self.edges &= !bit;
    }

    /// The interrupt request register.
    fn requests(&self) -> u8 {
        let levels = if self.level { 0xff } else { self.elcr };
        self.edges & !levels | self.lines & levels
    }

    /// Inputs from the highest priority to the lowest.
    fn by_priority(&self) -> impl Iterator<Item = u8> + use<> {
        let first = self.lowest.wrapping_add(1);
        (0..8).map(move |i| first.wrapping_add(i) & 7)
    }

    /// The request that is served next, if there is one that nothing in service holds back.
    pub fn request(&self) -> Option<u8> {
        let requests = self.requests() & !self.masked;
        // What is in service and masked holds nobody back in special mask mode.
        let holding =
            if self.special_mask { self.in_service & !self.masked } else { self.in_service };
        for input in self.by_priority() {
            let bit = 1 << input;
            // A second chip may have something of higher priority than what it has in service.
            let nested = self.special_fully_nested && input == CASCADE;
            if requests & bit != 0 && (holding & bit == 0 || nested) {
                return Some(input);
            }
            if holding & bit != 0 {
                return None;
            }
        }
        None
    }

    /// Takes the request that is served next into service. Which input it is; without one the chip says
    /// [`SPURIOUS`], and nothing is in service.
    pub fn acknowledge(&mut self) -> u8 {
        let Some(input) = self.request() else { return SPURIOUS };
        let bit = 1 << input;
        self.edges &= !bit;
        if !self.auto_eoi {
            self.in_service |= bit;
        } else if self.rotate_at_auto_eoi {
            self.lowest = input;
        }
        input
    }

    /// The vector of an input.
    pub fn vector(&self, input: u8) -> u8 {
        self.base | input & 7
    }

    /// A read of the port with (`odd`) or without its address bit.
    pub fn read(&mut self, odd: bool) -> u8 {
        if std::mem::take(&mut self.polled) {
            return match self.request() {
                Some(_) => 0x80 | self.acknowledge(),
                None => 0,
            };
        }
        match (odd, self.reads_in_service) {
            (true, _) => self.masked,
            (false, true) => self.in_service,
            (false, false) => self.requests(),
        }
    }

    /// A write of the port with or without its address bit.
    pub fn write(&mut self, odd: bool, value: u8) {
        match odd {
            true => self.write_odd(value),
            false if value & icw::FIRST != 0 => self.initialize(value),
            false if value & ocw3::THIRD != 0 => self.control(value),
            false => self.end_of_interrupt(value),
        }
    }

    /// The edge/level control register.
    pub fn elcr(&self) -> u8 {
        self.elcr
    }

    /// Writes the edge/level control register. An edge that has come before means nothing to a level.
    pub fn set_elcr(&mut self, value: u8) {
        self.edges &= !(self.elcr ^ value);
        self.elcr = value;
    }

    fn initialize(&mut self, value: u8) {
        let fourth_follows = value & icw::FOURTH_FOLLOWS != 0;
        *self = Self {
            // An input must rise again to be seen.
            edges: 0,
            masked: 0,
            expects: Expects::Icw2,
            fourth_follows,
            single: value & icw::SINGLE != 0,
            level: value & icw::LEVEL != 0,
            lines: self.lines,
            elcr: self.elcr,
            ..Self::after_firmware(self.base)
        };
    }

    fn write_odd(&mut self, value: u8) {
        let after_third = if self.fourth_follows { Expects::Icw4 } else { Expects::Commands };
        match self.expects {
            Expects::Commands => self.masked = value,
            Expects::Icw2 => {
                self.base = value & 0xf8;
                self.expects = if self.single { after_third } else { Expects::Icw3 };
            }
            // Where the other chip is: there is only one way to wire a PC.
            Expects::Icw3 => self.expects = after_third,
            Expects::Icw4 => {
                self.auto_eoi = value & icw::AUTO_EOI != 0;
                self.special_fully_nested = value & icw::SPECIAL_FULLY_NESTED != 0;
                self.expects = Expects::Commands;
            }
        }
    }

    /// Operation command word 2: bit 7 rotates, bit 6 names an input, bit 5 ends an interrupt.
    fn end_of_interrupt(&mut self, value: u8) {
        let named = value & 7;
        match value >> 5 {
            0b000 => self.rotate_at_auto_eoi = false,
            0b100 => self.rotate_at_auto_eoi = true,
            0b001 => drop(self.end_highest()),
            0b101 => {
                if let Some(ended) = self.end_highest() {
                    self.lowest = ended;
                }
            }
            0b011 => self.in_service &= !(1 << named),
            0b111 => {
                self.in_service &= !(1 << named);
                self.lowest = named;
            }
            0b110 => self.lowest = named,
            // No operation.
            _ => {}
        }
    }

    /// Ends the interrupt of highest priority. In special mask mode one that is masked cannot be meant.
    fn end_highest(&mut self) -> Option<u8> {
        let candidates =
            if self.special_mask { self.in_service & !self.masked } else { self.in_service };
        let ended = self.by_priority().find(|input| candidates >> input & 1 != 0)?;
        self.in_service &= !(1 << ended);
        Some(ended)
    }

    fn control(&mut self, value: u8) {
        if value & ocw3::SPECIAL_MASK != 0 {
            self.special_mask = value & ocw3::SPECIAL_MASK_ON != 0;
        }
        if value & ocw3::POLL != 0 {
            self.polled = true;
        } else if value & ocw3::READ != 0 {
            self.reads_in_service = value & ocw3::IN_SERVICE != 0;
        }
    }
}
