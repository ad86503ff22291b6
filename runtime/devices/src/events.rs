//! What a device tells the machine as a whole.

use std::sync::Arc;

/// Something the guest did that concerns the whole machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmEvent {
    /// The guest asked for a reset (keyboard controller, port 0x92 or ACPI), which ends a microVM.
    Reset,
    /// The guest asked for its machine to be switched off.
    PowerOff,
    /// The guest made the hypercall that ends it.
    Halt {
        /// Its exit status.
        status: i32,
        /// Guest physical address of what it has to say about its end, 0 for nothing.
        cookie: u64,
    },
    /// The guest made a hypercall that no guest can make.
    BadHypercall {
        /// Which.
        number: u16,
        /// Guest physical address of its arguments.
        address: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The guest wrote this value to the debug-exit port.
    DebugExit(u32),
}

/// Receives [`VmEvent`]s, on a vCPU's thread: it notes the event and returns.
pub type EventSink = Arc<dyn Fn(VmEvent) + Send + Sync>;
