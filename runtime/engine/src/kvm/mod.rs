//! The kvm engine: guest instructions on the host's processor, by way of KVM.
//!
//! In the kernel are the processors with their local APICs (split irqchip), and the eventfds by
//! which devices are notified and interrupt. The I/O APIC and all devices are mvm's own, the same as on
//! the emulation engine; there is no PIC and no PIT.
//!
//! * `engine`, `vm`, `vcpu`: the traits of this crate over KVM's descriptors;
//! * `kick`, `halt`: ending a run from outside, and noticing a guest that is dead;
//! * `state`: the architectural state to and from KVM's structures;
//! * `memory`, `irq`: memory slots with their dirty log, interrupt routes and eventfds;
//! * `sys`: everything unsafe.
//!
//! `docs/kvm-engine.md` tells what is where, and what KVM cannot do.

mod counters;
mod engine;
mod fault;
mod halt;
mod irq;
mod kick;
mod memory;
mod state;
pub(crate) mod sys;
#[cfg(test)]
mod tests;
mod vcpu;
mod vm;

pub use engine::{KvmEngine, MAX_VCPUS};
