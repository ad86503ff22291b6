//! The emulation engine: an x86-64 processor in software, for hosts without VT-x or AMD-V.
//!
//! Guest code is decoded once into blocks of [`op::Op`]s, each with a handler that does the work
//! on a [`cpu::Cpu`]. The host is of the guest's own architecture, which the engine uses: flags
//! come from the host's flags, SIMD and x87 instructions run on the host's units.
//!
//! `docs/emulation-engine.md` has the invariants that the modules rely on. Read it first.
//!
//! Not in scope: devices (they are behind [`mvm_engine::IoBus`]), boot protocols.

pub mod apic;
pub mod block;
pub mod cpu;
mod engine;
pub mod fault;
pub mod flags;
pub mod host;
pub mod int;
pub mod interp;
pub mod jit;
pub mod mmu;
pub mod op;
mod regs;
pub mod sys;
pub mod testing;
mod vcpu;
mod vm;

pub use engine::{EmuEngine, MAX_VCPUS, Tier};
