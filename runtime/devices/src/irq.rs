//! What a device pulls and what the machine delivers.

use std::fmt::Debug;

use vmm_sys_util::eventfd::EventFd;

/// An interrupt wire from a device to its controller.
pub trait InterruptLine: Send + Sync + Debug {
    /// Sets the wire: `true` means asserted, whatever the polarity.
    fn set_level(&self, asserted: bool);

    /// One edge: asserts and releases the wire.
    fn trigger(&self) {
        self.set_level(true);
        self.set_level(false);
    }
}

/// A message-signalled interrupt as the bus sees it (Intel SDM volume 3, 11.11).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiMessage {
    /// `0xfee0_0000` with destination and addressing mode.
    pub address: u64,
    /// Vector, delivery mode, trigger mode.
    pub data: u32,
}

/// Takes interrupt messages to the local APICs; the machine implements it over its engine.
///
/// Called from vCPU and device threads with the controller's lock held, so an implementation must not
/// call back into the controller.
pub trait MsiSink: Send + Sync {
    /// Delivers one message now.
    fn signal_msi(&self, address: u64, data: u32);

    /// Says what pin `pin` of the I/O APIC would send from now on (`None`: masked), for engines
    /// that route an eventfd to a message by themselves.
    fn route_changed(&self, _pin: u8, _message: Option<MsiMessage>) {}

    /// INTR, the output of the old interrupt controllers, changes.
    fn set_intr(&self, _asserted: bool) {}
}

/// A wire that ends in an eventfd, for engines that inject from one by themselves (irqfd). Edges
/// only: a level that falls says nothing.
#[derive(Debug)]
pub struct EventFdLine(pub EventFd);

impl InterruptLine for EventFdLine {
    fn set_level(&self, asserted: bool) {
        if asserted {
            // A full counter means that the engine has not taken the last edge: nothing is lost.
            let _ = self.0.write(1);
        }
    }
}
