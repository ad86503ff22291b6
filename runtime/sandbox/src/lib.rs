//! A sandbox: a running microVM plus the agent in it.
//!
//! Every front door stands on this crate: it makes sandboxes, runs processes in them, joins their
//! streams, waits, and leaves nothing behind.
//!
//! * [`Sandbox`] is the life of one sandbox as its owner leads it; [`ops`] is what others do to it.
//! * [`spec`] turns image configuration and flags into a runtime specification.
//! * [`registry`], [`state`] and [`layout`] are what is on disk; [`recover`] repairs it.
//! * [`engine`] chooses what runs the machine, [`network`] what it is connected to.
//! * [`unikernel`] recognises images that are kernels of their own.
//! * [`memory`] makes a machine that runs larger and smaller.
//! * [`machine`] starts the monitor process, [`guest`] talks to the agent, [`pump`] moves streams.
//!
//! Not in scope: flags and messages for people (the front doors), how a machine is built
//! (`mvm-vmm`), what is in an image (`mvm-image`).

pub mod ending;
pub mod engine;
mod error;
pub mod guest;
pub mod layout;
pub mod logfile;
pub mod machine;
pub mod memory;
pub mod metrics;
mod names;
pub mod network;
pub mod ops;
pub mod procid;
pub mod pump;
pub mod recover;
pub mod registry;
mod sandbox;
pub mod socket;
pub mod spec;
pub mod state;
pub mod timings;
pub mod unikernel;
mod vsock;

pub use error::{EXIT_FAILURE, EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, Error};
pub use names::random_id;
pub use sandbox::{BarePlan, Description, Disk, Sandbox, SerialLine, Woken};
