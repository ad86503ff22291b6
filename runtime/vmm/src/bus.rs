//! The machine's bus as the engines see it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use mvm_devices::{Bus, Hypercalls, IoApic, MsiMessage as DeviceMessage, MsiSink, Pic};
use mvm_engine::{IoBus, MsiMessage, Vm};

use crate::events::Notifier;
use crate::layout;
use crate::monitor::protocol::Phase;

/// Routes the guest's accesses to the devices, and notices when its kernel first looks for them.
#[derive(Debug)]
pub(crate) struct MachineBus {
    bus: Bus,
    ioapic: Arc<IoApic>,
    pic: Option<Arc<Pic>>,
    kernel_up: AtomicBool,
    notifier: Arc<Notifier>,
}

impl MachineBus {
    pub fn new(
        bus: Bus,
        ioapic: Arc<IoApic>,
        pic: Option<Arc<Pic>>,
        notifier: Arc<Notifier>,
    ) -> Self {
        Self { bus, ioapic, pic, kernel_up: AtomicBool::new(false), notifier }
    }

    pub fn devices(&self) -> &Bus {
        &self.bus
    }

    /// See [`Phase::KernelUp`].
    #[inline]
    fn notice(&self, is_sign: bool) {
        if is_sign
            && !self.kernel_up.load(Ordering::Relaxed)
            && !self.kernel_up.swap(true, Ordering::Relaxed)
        {
            self.notifier.phase(Phase::KernelUp);
        }
    }
}

/// Whether a write to `port` shows that a kernel is up: the serial port, or a Solo5 guest's hypercall.
fn is_sign_of_life(port: u64) -> bool {
    const HYPERCALLS: std::ops::Range<u64> = Hypercalls::PORT..Hypercalls::PORT + Hypercalls::LEN;
    port == layout::SERIAL_PORT || HYPERCALLS.contains(&port)
}

fn is_virtio(gpa: u64) -> bool {
    const END: u64 = layout::virtio_mmio(layout::MAX_VIRTIO_DEVICES);
    (layout::VIRTIO_MMIO..END).contains(&gpa)
}

impl IoBus for MachineBus {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.bus.ports.read(u64::from(port), data);
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        self.notice(is_sign_of_life(port.into()));
        self.bus.ports.write(u64::from(port), data);
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.notice(is_virtio(gpa));
        self.bus.memory.read(gpa, data);
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.notice(is_virtio(gpa));
        self.bus.memory.write(gpa, data);
    }

    fn eoi(&self, vector: u8) {
        self.ioapic.eoi_broadcast(vector);
    }

    fn acknowledge(&self) -> Option<u8> {
        self.pic.as_ref().map(|pic| pic.acknowledge())
    }
}

/// Takes what the interrupt controllers have to say to an engine's machine, which is made after them.
#[derive(Debug, Default)]
pub(crate) struct VmSink(OnceLock<Weak<dyn Vm>>);

impl VmSink {
    /// From now on messages go to `vm`.
    pub fn connect(&self, vm: &Arc<dyn Vm>) {
        // A second machine for the same controllers cannot be.
        let _ = self.0.set(Arc::downgrade(vm));
    }
}

impl MsiSink for VmSink {
    fn set_intr(&self, asserted: bool) {
        if let Some(vm) = self.0.get().and_then(Weak::upgrade) {
            vm.set_intr(asserted);
        }
    }

    fn signal_msi(&self, address: u64, data: u32) {
        if let Some(vm) = self.0.get().and_then(Weak::upgrade) {
            vm.signal_msi(MsiMessage { address, data });
        }
    }

    fn route_changed(&self, pin: u8, message: Option<DeviceMessage>) {
        let Some(vm) = self.0.get().and_then(Weak::upgrade) else { return };
        let message = message.map(|m| MsiMessage { address: m.address, data: m.data });
        if let Err(e) = vm.route(pin.into(), message) {
            // The guest goes without this interrupt, as if its wire were cut.
            tracing::warn!(pin, "the engine does not take the route of an interrupt: {e}");
        }
    }
}
