//! The system side of the processor: everything that is not arithmetic on registers and memory.
//!
//! Not implemented, because no 64-bit system needs it: the extensions of virtual-8086 mode (CR4.VME), system management
//! mode, machine checks, performance counters.

pub mod attention;
pub mod bits;
pub mod clock;
pub mod descriptor;
pub mod events;
pub mod msr;
pub mod paravirt;
pub mod platform;

mod alarm;
mod control;
mod debug;
mod decode;
mod deliver;
mod far;
mod flag_ops;
mod io;
mod iret;
mod misc;
mod segment_ops;
mod segments;
mod snapshot;
mod stack;
mod state;
mod syscall;
mod tables;
mod task;
#[cfg(test)]
mod tests;

pub use decode::{SysOp, decode};
pub use deliver::Shutdown;
pub use events::Service;
pub(crate) use flag_ops::LAST as STI_LAST;
pub use platform::Platform;
pub use state::{Msrs, SystemState};
