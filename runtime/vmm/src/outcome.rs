//! How a machine ended.

use std::fmt;

use mvm_engine::GuestFault;
use serde::{Deserialize, Serialize};

/// How a machine ended, and what is worth knowing about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Why.
    pub reason: EndReason,
    /// The last of the serial console, as far as it was kept.
    pub console_tail: String,
}

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum EndReason {
    /// The guest asked for a reset: the way a guest without power management switches off.
    Reset,
    /// The guest switched its machine off.
    PowerOff,
    /// The guest made the hypercall that ends it.
    GuestHalt {
        /// Its exit status: 0 is success, 255 an abort.
        status: i32,
        /// Address in its memory of what it has to say about its end, 0 for nothing.
        cookie: u64,
    },
    /// The guest wrote to the debug exit port.
    DebugExit {
        /// `value << 1 | 1`, as the port's inventor has it.
        status: u32,
    },
    /// Somebody on the host ended it.
    Stopped,
    /// The process that started the monitor went away, and the machine was to go with it.
    OwnerGone,
    /// Every vCPU halted with interrupts off: nothing can happen any more.
    HaltedForever,
    /// A processor shut down (triple fault).
    TripleFault {
        /// Where.
        fault: String,
    },
    /// The guest made a hypercall that no guest can make.
    BadHypercall {
        /// Which, and what is wrong with it.
        fault: String,
    },
    /// The engine could not go on.
    EngineFailed {
        /// Where and why.
        fault: String,
    },
    /// The process behind a device is gone.
    DeviceLost {
        /// Which, and what is known.
        fault: String,
    },
    /// The monitor process ended without a word, for instance killed.
    MonitorDied {
        /// What is known about its end.
        status: String,
    },
}

impl EndReason {
    /// The guest died of a triple fault.
    pub(crate) fn triple_fault(fault: &GuestFault) -> Self {
        EndReason::TripleFault { fault: fault.to_string() }
    }

    /// The engine met something it cannot go on from.
    pub(crate) fn engine_failed(fault: &dyn fmt::Display) -> Self {
        EndReason::EngineFailed { fault: fault.to_string() }
    }

    /// Whether guest or host wanted this end.
    pub fn is_orderly(&self) -> bool {
        matches!(
            self,
            EndReason::Reset
                | EndReason::PowerOff
                | EndReason::GuestHalt { .. }
                | EndReason::DebugExit { .. }
                | EndReason::Stopped
        )
    }

    /// The exit code of a run that ended so, where the guest is all there is to the run.
    ///
    /// A guest that says nothing of success or failure has succeeded if it ended on purpose. Signals
    /// stand for what would have ended a process in a like way: SIGABRT for a guest that stopped
    /// without saying so, SIGSEGV for a crash, SIGTERM and SIGKILL for an end from outside.
    pub fn exit_code(&self) -> u8 {
        const SIGNALLED: u8 = 128;
        match self {
            EndReason::Reset | EndReason::PowerOff => 0,
            // As of a process: the low eight bits are what is seen.
            EndReason::GuestHalt { status, .. } => *status as u8,
            EndReason::DebugExit { status } => *status as u8,
            EndReason::EngineFailed { .. } | EndReason::DeviceLost { .. } => 125,
            EndReason::HaltedForever => SIGNALLED + 6,
            EndReason::MonitorDied { .. } => SIGNALLED + 9,
            EndReason::TripleFault { .. } | EndReason::BadHypercall { .. } => SIGNALLED + 11,
            EndReason::Stopped | EndReason::OwnerGone => SIGNALLED + 15,
        }
    }
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EndReason::Reset => f.write_str("the guest switched itself off"),
            EndReason::PowerOff => f.write_str("the guest switched its machine off"),
            EndReason::GuestHalt { status, cookie: 0 } => {
                write!(f, "the guest halted with status {status}")
            }
            EndReason::GuestHalt { status, cookie } => {
                write!(f, "the guest halted with status {status} (details at {cookie:#x})")
            }
            EndReason::DebugExit { status } => write!(f, "the guest exited with status {status}"),
            EndReason::Stopped => f.write_str("the machine was stopped"),
            EndReason::OwnerGone => {
                f.write_str("the process that started the machine is gone, and the machine with it")
            }
            EndReason::HaltedForever => {
                f.write_str("the guest halted all its processors for ever (interrupts are off)")
            }
            EndReason::BadHypercall { fault } => {
                write!(f, "the guest made an impossible hypercall: {fault}")
            }
            EndReason::TripleFault { fault } => write!(f, "the guest crashed: {fault}"),
            EndReason::EngineFailed { fault } => write!(f, "the engine cannot go on: {fault}"),
            EndReason::DeviceLost { fault } => f.write_str(fault),
            EndReason::MonitorDied { status } => write!(f, "the monitor process died: {status}"),
        }
    }
}
