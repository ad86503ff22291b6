//! A machine, and the monitor process that runs it.
//!
//! * [`config`] says what a machine is made of; [`layout`] where everything lies in guest memory.
//! * [`Machine`] is a machine in this process: RAM, devices, vCPU threads, boot protocol.
//! * [`monitor`] is the process around one machine: it is handed a config and descriptors, opens
//!   nothing by path, reports phases and the [`Outcome`], and answers on a control socket.
//!
//! Not in scope: what runs inside the guest, images, networks of the host.

mod boot;
mod bus;
pub mod config;
mod devices;
pub mod engines;
mod events;
pub mod layout;
pub mod logfmt;
mod machine;
pub mod monitor;
mod outcome;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod vcpu_thread;
mod wires;

pub use boot::Error as BootError;
pub use devices::Error as DevicesError;
pub use events::{Events, MachineEvent};
pub use machine::{
    Disk, Error, Machine, MachineState, MemorySize, Module, NetCard, Parts, Pauser, Section,
    SharedFiles, Sockets, VirtioConsole,
};
pub use outcome::{EndReason, Outcome};
pub use wires::Error as WiresError;
