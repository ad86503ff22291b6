//! The monitor process: one per machine, with nothing but what it was handed.
//!
//! The owner calls [`spawn()`], which runs this program again as `PROGRAM monitor`; that process
//! calls [`main`]. Config and descriptors go down the owner channel, [`Event`]s come up. Everybody
//! else talks to the control socket, by a [`ControlClient`].
//!
//! Killing the owner ends the machine only if the config says so; killing the monitor always does.

pub mod client;
mod control;
mod dial;
pub mod fds;
mod process;
pub mod protocol;
pub mod spawn;
mod sys;
mod usage;
mod wiring;

pub use client::ControlClient;
pub use fds::FdTable;
pub use process::main;
pub use protocol::{Event, Phase, PhaseMark, Request, Response, RunState, Stats, Status};
pub use spawn::{Launch, Monitor, PROCESS_NAME, SUBCOMMAND, spawn};
