//! Interrupt wires and doorbells of virtio devices: through the I/O APIC and the bus, or by eventfds that the
//! engine takes and gives without a vCPU leaving the guest.

use std::fmt;
use std::sync::{Arc, OnceLock};

use mvm_devices::virtio::MmioTransport;
use mvm_devices::{EventFdLine, InterruptLine, IoApicPin, PicPin};
use mvm_engine::Vm;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::layout;

/// The wire of one device. It leads to a pin of the I/O APIC until it is attached to an engine, and to one of the old
/// controllers as well if there are some.
#[derive(Debug)]
pub(crate) struct Wire {
    gsi: u32,
    pin: IoApicPin,
    old: Option<PicPin>,
    direct: OnceLock<EventFdLine>,
}

impl Wire {
    pub fn new(gsi: u32, pin: IoApicPin, old: Option<PicPin>) -> Arc<Self> {
        Arc::new(Self { gsi, pin, old, direct: OnceLock::new() })
    }

    /// Has `vm` interrupt by itself, if it can. Before the guest runs.
    fn attach(&self, vm: &dyn Vm) -> Result<(), Error> {
        let fd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::EventFd)?;
        if vm.attach_interrupt(self.gsi, &fd)? {
            // It was not attached before: each machine attaches once.
            let _ = self.direct.set(EventFdLine(fd));
        }
        Ok(())
    }
}

impl InterruptLine for Wire {
    fn set_level(&self, asserted: bool) {
        if let Some(old) = &self.old {
            old.set_level(asserted);
        }
        match self.direct.get() {
            Some(line) => line.set_level(asserted),
            None => self.pin.set_level(asserted),
        }
    }
}

/// Why a device could not be attached to the engine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host has no more descriptors.
    #[error("eventfd: {0}")]
    EventFd(std::io::Error),
    /// The engine refuses.
    #[error(transparent)]
    Engine(#[from] mvm_engine::Error),
}

/// Virtio devices with their wires, by index.
#[derive(Default)]
pub(crate) struct Wired(Vec<(Arc<MmioTransport>, Arc<Wire>)>);

impl Wired {
    pub fn push(&mut self, transport: Arc<MmioTransport>, wire: Arc<Wire>) {
        self.0.push((transport, wire));
    }

    /// The devices.
    pub fn transports(&self) -> impl Iterator<Item = &Arc<MmioTransport>> {
        self.0.iter().map(|(transport, _)| transport)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Has `vm` serve interrupts and doorbells of all devices by itself, as far as it can.
    pub fn attach(&self, vm: &dyn Vm) -> Result<(), Error> {
        for (index, (transport, wire)) in (0..).zip(&self.0) {
            wire.attach(vm)?;
            let gpa = layout::virtio_mmio(index) + MmioTransport::NOTIFY_OFFSET;
            for queue in 0..transport.device().queues().len() {
                let Some(doorbell) = transport.doorbell(queue) else { continue };
                if !vm.attach_doorbell(gpa, queue as u32, doorbell)? {
                    break;
                }
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Wired {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.0).finish()
    }
}
