//! All local APICs of a machine: who gets a message (SDM vol. 3, 11.6).

use std::sync::atomic::{AtomicUsize, Ordering};

use mvm_engine::MsiMessage;

use super::port::Port;
use crate::sys::attention::reason;

/// What a message does to those it reaches (SDM vol. 3, figure 11-12).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// An interrupt at each destination.
    Fixed,
    /// An interrupt at one of the destinations.
    LowestPriority,
    /// A non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up IPI.
    StartUp,
    /// Anything else (SMI, ExtINT, reserved): there is nobody to take it.
    Ignored,
}

impl Delivery {
    /// From the three bits of an ICR, LVT or MSI.
    pub fn from_bits(bits: u32) -> Self {
        match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            _ => Self::Ignored,
        }
    }
}

/// Who a message is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// One physical id.
    Physical(u32),
    /// A logical destination.
    Logical(u32),
    /// Everybody, or everybody but this index.
    All {
        /// Index to leave out.
        but: Option<usize>,
    },
    /// This index only.
    Index(usize),
}

/// An interrupt message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Who gets it.
    pub target: Target,
    /// What it does.
    pub delivery: Delivery,
    /// Its vector.
    pub vector: u8,
    /// Level-triggered?
    pub level: bool,
}

impl Message {
    /// The message that a device writes to `0xfeex_xxxx` (SDM vol. 3, 11.11).
    pub fn from_msi(msi: MsiMessage) -> Self {
        let destination = (msi.address >> 12) as u32 & 0xff;
        let logical = msi.address & 4 != 0;
        let target = match (destination, logical) {
            (0xff, _) => Target::All { but: None },
            (id, true) => Target::Logical(id),
            (id, false) => Target::Physical(id),
        };
        Self {
            target,
            delivery: Delivery::from_bits(msi.data >> 8),
            vector: msi.data as u8,
            level: msi.data & 1 << 15 != 0,
        }
    }
}

/// The local APICs of one machine.
#[derive(Debug)]
pub struct ApicBus {
    ports: Vec<Port>,
    arbiter: AtomicUsize,
}

impl ApicBus {
    /// A bus with `count` APICs, whose ids are their indices.
    pub fn new(count: u32) -> Self {
        Self { ports: (0..count).map(Port::new).collect(), arbiter: AtomicUsize::new(0) }
    }

    /// The port of vCPU `index`.
    ///
    /// # Panics
    /// If there is no such vCPU; indices are checked when vCPUs are made.
    #[inline]
    pub fn port(&self, index: u32) -> &Port {
        &self.ports[index as usize]
    }

    /// The port of the vCPU whose APIC id is `id`.
    pub fn by_id(&self, id: u32) -> Option<&Port> {
        self.ports.get(id as usize)
    }

    /// Number of APICs.
    pub fn count(&self) -> usize {
        self.ports.len()
    }

    /// Sends an MSI. Any thread.
    pub fn signal_msi(&self, msi: MsiMessage) {
        self.send(Message::from_msi(msi));
    }

    /// Sends `message` to whom it concerns. Returns the number of addressees.
    pub fn send(&self, message: Message) -> usize {
        if message.delivery == Delivery::LowestPriority {
            return usize::from(self.send_to_one(message));
        }
        let mut reached = 0;
        for port in self.addressees(message.target) {
            reached += 1;
            match message.delivery {
                Delivery::Fixed => port.post(message.vector, message.level),
                Delivery::Nmi => port.nmi(),
                Delivery::Init => port.attention.raise(reason::INIT),
                Delivery::StartUp => port.start_up(message.vector),
                Delivery::LowestPriority | Delivery::Ignored => {}
            }
        }
        reached
    }

    /// Arbitration: an addressee that has this very request pending absorbs it, else they take
    /// turns.
    fn send_to_one(&self, message: Message) -> bool {
        let candidates: Vec<&Port> =
            self.addressees(message.target).filter(|p| p.accepts_fixed()).collect();
        let Some(turn) = self.arbiter.fetch_add(1, Ordering::Relaxed).checked_rem(candidates.len())
        else {
            return false;
        };
        candidates[turn].post(message.vector, message.level);
        true
    }

    fn addressees(&self, target: Target) -> impl Iterator<Item = &Port> {
        self.ports.iter().enumerate().filter_map(move |(index, port)| {
            let hit = match target {
                Target::Physical(id) => port.matches(id, false),
                Target::Logical(id) => port.matches(id, true),
                Target::All { but } => but != Some(index),
                Target::Index(only) => only == index,
            };
            hit.then_some(port)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bus(count: u32) -> ApicBus {
        let bus = ApicBus::new(count);
        for index in 0..count {
            bus.port(index).set_software_enabled(true);
        }
        bus
    }

    #[test]
    fn msi_reaches_its_physical_destination_only() {
        let bus = bus(3);
        bus.signal_msi(MsiMessage { address: 0xfee0_2000, data: 0x41 });
        assert_eq!(bus.port(2).irr.highest(), Some(0x41));
        assert!(!bus.port(0).attention.any() && !bus.port(1).attention.any());
        bus.signal_msi(MsiMessage { address: 0xfee0_9000, data: 0x41 });
        bus.signal_msi(MsiMessage { address: 0xfee0_0000, data: 0x8050 });
        assert!(bus.port(0).tmr.contains(0x50));
    }

    #[test]
    fn broadcasts_leave_out_the_sender() {
        let bus = bus(3);
        let message = Message {
            target: Target::All { but: Some(1) },
            delivery: Delivery::Nmi,
            vector: 0,
            level: false,
        };
        assert_eq!(bus.send(message), 2);
        assert!(bus.port(0).attention.any() && !bus.port(1).attention.any());
    }

    #[test]
    fn lowest_priority_picks_one() {
        let bus = bus(4);
        for index in 0..4 {
            bus.port(index).set_logical(1 << (24 + index), true);
        }
        bus.signal_msi(MsiMessage { address: 0xfee0_6004, data: 0x160 });
        let hit: Vec<u32> = (0..4).filter(|&i| bus.port(i).irr.contains(0x60)).collect();
        assert_eq!(hit.len(), 1);
        assert!([1, 2].contains(&hit[0]));
        let nobody = Message {
            target: Target::Physical(77),
            delivery: Delivery::LowestPriority,
            vector: 0x70,
            level: false,
        };
        assert_eq!(bus.send(nobody), 0);
    }
}
