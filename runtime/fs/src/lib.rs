//! The file server of a sandbox: it serves shared directories of the host to the guest over virtio-fs,
//! in a process of its own.
//!
//! One device for each sandbox, one tree: every share is a directory below the root of that tree. Shares
//! come and go while the machine runs ([`ShareClient`]). What a share shows is a *detached* copy of a
//! mount tree ([`tree`]): there is nothing above it that a path could climb to.
//!
//! * [`spawn()`] starts the process, [`main`] is what it runs.
//! * `shares` is the tree as the guest sees it, over `fuse-backend-rs`' passthrough file systems.
//! * `queue` serves the virtqueues in the monitor's place (`mvm_devices::virtio::fs`).
//! * [`follow`] makes trees that stay like the host's, by one more process each.
//! * `room` is what becomes of requests for which there is no descriptor.
//! * `confine` takes from the process what it does not need, before it hears of the guest.
//!
//! Not in scope: what is shared, and where the guest mounts it.

mod client;
mod confine;
pub mod follow;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
pub mod mounts;
mod process;
mod protocol;
mod queue;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
#[allow(missing_docs, missing_debug_implementations, clippy::missing_panics_doc)]
pub mod rig;
mod room;
mod seccomp;
mod server;
mod shares;
mod spawn;
mod sys;
#[cfg(test)]
mod tests;
pub mod tree;

pub use client::{ClientError, ShareClient};
pub use confine::Layer;
pub use process::{main, max_files};
pub use protocol::{Cache, NewShare, ShareOptions, Source, check_name};
pub use spawn::{FileServer, Launch, PROCESS_NAME, SUBCOMMAND, SpawnError, spawn};
pub use tree::Tree;

/// What the guest mounts the device by.
pub const TAG: &str = "mvm";

/// Name of the one file in the share of a file.
pub const FILE: &str = "file";
