//! The devices of a machine, and the buses on which the guest finds them.
//!
//! * [`Bus`] routes port and memory-mapped accesses to [`BusDevice`]s.
//! * [`InterruptLine`] is what a device pulls, [`MsiSink`] what the machine implements over its
//!   engine; [`IoApic`] stands between the two.
//! * [`Pic`] is what stood there before it, for kernels that know nothing else.
//! * [`Serial`], [`SystemControl`] and [`DebugExit`] are the few platform devices a guest expects
//!   without discovery, [`PowerControl`] the one that ACPI needs.
//! * [`Pit`] and [`Rtc`] are how kernels for PCs measure time that were told of no other way.
//! * [`fw_cfg`], [`Scratch`] and [`TestInterrupts`] are what kernels made for PC emulators look for.
//! * [`virtio`] has the transport (virtio-mmio version 2) and the devices behind it.
//! * [`Hypercalls`] is what Solo5's guests have in place of all that.
//! * [`packets`] carries messages and descriptors to the process that serves files.
//! * [`EventLoop`] is the one thread on which devices wait.
//!
//! Not in scope: which engine runs the vCPUs, where a device sits in the memory map, and who opens
//! files and sockets. Every descriptor comes in from outside.

mod bus;
mod event_loop;
mod events;
pub mod fw_cfg;
mod gate;
mod hvt;
mod ioapic;
mod irq;
mod limit;
pub mod packets;
mod pic;
mod platform;
pub mod rights;
mod serial;
pub mod virtio;

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
#[cfg(any(test, feature = "testing", feature = "fuzzing"))]
pub mod testing;

pub use bus::{AddressSpace, Bus, BusDevice, BusError, DeviceStats};
pub use event_loop::{EventLoop, EventLoopError, Interest, Registrar, Source, Subscriber};
pub use events::{EventSink, VmEvent};
pub use gate::{Gate, Passage};
pub use hvt::{HypercallConfig, HypercallDisk, HypercallNet, Hypercalls};
pub use ioapic::{IoApic, IoApicPin, IoApicState};
pub use irq::{EventFdLine, InterruptLine, MsiMessage, MsiSink};
pub use pic::{IsaLine, Pic, PicPin, PicState};
pub use platform::{
    DebugExit, Pit, PitError, PitState, PostCode, PowerControl, PowerOff, Rtc, RtcState, Scratch,
    SystemB, SystemControl, TestInterrupts,
};
pub use serial::{Serial, SerialConfig, SerialInputError, SerialState};
