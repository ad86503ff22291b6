//! Interrupts and notifications that KVM passes on by itself, without a vCPU leaving the guest.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::vm::{failed, lock};
use crate::{Error, MsiMessage, Result};

/// Global system interrupts that can be routed: the pins of the I/O APIC.
pub(super) const PINS: u32 = 24;

/// Where interrupts of an eventfd go. KVM also takes from here which vectors are level-triggered, so that
/// it tells when they end.
#[derive(Debug, Default)]
pub(super) struct Routes {
    messages: Mutex<[Option<MsiMessage>; PINS as usize]>,
    changes: AtomicU64,
    attached: AtomicU64,
}

impl Routes {
    /// `gsi` sends `message` from now on, or nothing.
    pub fn set(&self, vm: &VmFd, gsi: u32, message: Option<MsiMessage>) -> Result<()> {
        let mut messages = lock(&self.messages);
        let Some(slot) = messages.get_mut(gsi as usize) else { return Err(no_such(gsi)) };
        // The guest writes an entry half by half, most of the time to no effect.
        if *slot == message {
            return Ok(());
        }
        *slot = message;
        let entries: Vec<kvm_irq_routing_entry> = (0..PINS)
            .zip(messages.iter())
            .filter_map(|(gsi, message)| message.map(|m| entry(gsi, m)))
            .collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| no_such(gsi))?;
        self.changes.fetch_add(1, Ordering::Relaxed);
        vm.set_gsi_routing(&table).map_err(failed("route an interrupt"))
    }

    /// Each write to `fd` is an edge of `gsi` from now on.
    pub fn attach(&self, vm: &VmFd, gsi: u32, fd: &EventFd) -> Result<()> {
        if gsi >= PINS {
            return Err(no_such(gsi));
        }
        vm.register_irqfd(fd, gsi).map_err(failed("attach an eventfd to an interrupt"))?;
        self.attached.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Times that the table was changed.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    /// Eventfds attached.
    pub fn attached(&self) -> u64 {
        self.attached.load(Ordering::Relaxed)
    }
}

fn no_such(gsi: u32) -> Error {
    let source = std::io::Error::other(format!("there is no interrupt {gsi}"));
    Error::Host { what: "route an interrupt", source }
}

fn entry(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..Default::default()
    }
}

/// Registers whose writes go to an eventfd.
#[derive(Debug, Default)]
pub(super) struct Doorbells {
    attached: AtomicU64,
}

impl Doorbells {
    /// A 4-byte store of `value` to `gpa` writes `fd` from now on.
    pub fn attach(&self, vm: &VmFd, gpa: u64, value: u32, fd: &EventFd) -> Result<()> {
        vm.register_ioevent(fd, &IoEventAddress::Mmio(gpa), value)
            .map_err(failed("attach an eventfd to a doorbell"))?;
        self.attached.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Eventfds attached.
    pub fn attached(&self) -> u64 {
        self.attached.load(Ordering::Relaxed)
    }
}
