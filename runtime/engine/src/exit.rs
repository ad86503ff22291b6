//! Why a vCPU stopped running.

use std::fmt;

/// Why [`Vcpu::run`](crate::Vcpu::run) returned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmExit {
    /// Somebody called [`Kick::kick`](crate::Kick::kick): look at what they want, then run again.
    Kicked,
    /// The vCPU halted with interrupts off and no NMI can come: this vCPU will never run again
    /// on its own.
    HaltedForever,
    /// A fault while delivering a double fault (SDM vol. 3, 6.15 "Interrupt 8"): the processor
    /// shuts down. On a PC that resets the machine.
    TripleFault(Box<GuestFault>),
    /// The engine met something it cannot go on from.
    InternalError(Box<GuestFault>),
}

/// What is told about the place where a guest died.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GuestFault {
    /// Index of the vCPU.
    pub vcpu: u32,
    /// What happened, in words.
    pub reason: String,
    /// Instruction pointer.
    pub rip: u64,
    /// The bytes there, as far as they could be read.
    pub bytes: Vec<u8>,
    /// `name=value` pairs of the registers.
    pub registers: String,
}

impl fmt::Display for GuestFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vCPU {}: {} at rip {:#x}", self.vcpu, self.reason, self.rip)?;
        if !self.bytes.is_empty() {
            write!(f, " (bytes")?;
            for byte in &self.bytes {
                write!(f, " {byte:02x}")?;
            }
            write!(f, ")")?;
        }
        if !self.registers.is_empty() {
            write!(f, "\n{}", self.registers)?;
        }
        Ok(())
    }
}
