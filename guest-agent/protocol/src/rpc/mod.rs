//! ttrpc, spoken by threads that sleep until something happens.
//!
//! The wire format and the message types are those of the `ttrpc` crate, so any ttrpc client or
//! server can talk to this one. Its connection handling is not used: its client wakes up a
//! hundred times a second, and its server accepts any peer and has so few threads that blocking
//! waits can starve all other calls. Here the server is given connections that the caller has
//! accepted and checked, and each call has a thread of its own ([`server`]).

pub mod client;
pub mod server;
mod service;
mod wire;

pub use client::{CallError, Client};
pub use server::{Status, serve};
pub use service::Agent;
pub use ttrpc::Code;
