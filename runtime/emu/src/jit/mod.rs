//! The translator: blocks of 64-bit code as host code.
//!
//! Read "The translator" in `docs/emulation-engine.md` first; J1 and so on refer to its rules. `plan` says what is done
//! with an instruction, `spans` what its access has to do with its neighbours', `translate` does it by means of `asm` (with
//! `entry`, `operands`, `memory`, `stack`, `strings`, `vector`, `flow`, `far`, `returns` and `system`), `stubs` is what all
//! blocks share. `store` is what all vCPUs share: the `arena` that code lies in, with the `links` in it, the `cache` by which it
//! is found, and the `wear` of pages whose code is stored to. `run` is one vCPU that executes it, and `arrivals` what leads there.
//!
//! Not in scope: what instructions mean. What is not copied is done by the interpreter's handlers.

mod arena;
mod arrivals;
mod asm;
mod cache;
mod counters;
mod entry;
mod env;
mod far;
mod flow;
mod layout;
mod links;
mod memory;
mod operands;
mod place;
mod plan;
mod raw;
mod registers;
mod returns;
mod run;
mod spans;
mod stack;
mod store;
mod strings;
mod stubs;
mod system;
mod translate;
mod vector;
mod wear;

#[cfg(test)]
mod tests;

pub use counters::Counters;
pub use env::Calls;
pub(crate) use env::JitEnv;
pub use run::{Jit, Ran};
pub use store::Store;
pub(crate) use vector::Registers;
