//! The vCPU seam: what a machine needs from the thing that runs guest instructions.
//!
//! Two engines stand behind these traits: hardware virtualization through KVM, and the emulator in
//! `mvm-emu`. Everything above sees one device model, one state type and one way to run:
//!
//! * [`Engine`] makes a [`Vm`] over guest RAM and an [`IoBus`];
//! * [`Vm`] makes [`Vcpu`]s and takes interrupt messages;
//! * [`Vcpu::run`] runs guest code until something ends it. Port and MMIO accesses never surface
//!   here: the engine dispatches them to the [`IoBus`] itself, on the vCPU's thread.
//!
//! Not in scope: device models, boot protocols, what the guest is.

pub mod cpuid;
mod error;
mod exit;
mod io;
mod kept;
pub mod kvm;
pub mod mock;
pub mod msr;
pub mod probe;
mod state;
mod traits;
pub mod tsc;

pub use error::{Error, Result};
pub use exit::{GuestFault, VmExit};
pub use io::IoBus;
pub use state::{
    ClockState, CpuidEntry, DebugRegisters, GeneralRegisters, LapicState, MpState, PendingEvents,
    Segment, SystemRegisters, Table, VcpuState, XSAVE_AREA_SIZE,
};
pub use traits::{Engine, EngineMetrics, Kick, MsiMessage, Vcpu, Vm, VmConfig};
