//! The local APIC (SDM vol. 3, chapter 11).
//!
//! What other threads touch is in [`port::Port`]; the rest belongs to the vCPU and needs no locks.
//! Behind LINT0 are the old interrupt controllers of machines that have them (ExtINT). Thermal, performance and CMCI
//! sources do not exist, their LVT entries only remember what is written.

mod bus;
mod lapic;
mod port;
mod registers;
mod timer;

pub use bus::{ApicBus, Delivery, Message, Target};
pub use lapic::Lapic;
pub(crate) use port::NMIS_MAX;
pub use port::{ApicMode, Port, VectorSet};
pub use timer::{NEVER, Timer, TimerMode};

/// Guest physical address of the register page after reset.
pub const DEFAULT_BASE: u64 = 0xfee0_0000;
