use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::testing::{Guest, NEEDS_RESET, Segment, reg};
use crate::virtio::{ActivateError, Chain, Core, DeviceType, QueueSlot, common_device_methods};

/// A device that answers nothing by itself.
struct Dummy {
    core: Core<Activation>,
    resets: AtomicUsize,
    picky: bool,
}

impl Dummy {
    fn new(picky: bool) -> Arc<Self> {
        let core = Core::new("dummy", &[64, 16]).unwrap();
        Arc::new(Self { core, resets: AtomicUsize::new(0), picky })
    }

    fn active(&self) -> bool {
        self.core.inspect(|_| ()).is_some()
    }
}

impl VirtioDevice for Dummy {
    fn device_type(&self) -> DeviceType {
        DeviceType::Network
    }
    fn features(&self) -> u64 {
        // Bit 40 is not a device's to offer.
        0b11 | 1 << 40
    }
    fn accepts(&self, features: u64) -> bool {
        !self.picky || features & 1 != 0
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::super::read_config_bytes(b"config", offset, data);
    }
    fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        if activation.queues[0].is_none() {
            return Err(ActivateError::MissingQueue(0));
        }
        self.core.start(activation);
        Ok(())
    }
    fn reset(&self) {
        self.resets.fetch_add(1, Ordering::Relaxed);
        self.core.stop();
    }
    fn queue_states(&self) -> Vec<Option<QueueState>> {
        vec![None, None]
    }
    common_device_methods!();
}

fn set_up() -> (Guest, Arc<Dummy>) {
    let device = Dummy::new(false);
    (Guest::new(1 << 20, device.clone()), device)
}

fn failed(guest: &Guest) -> bool {
    guest.read(reg::STATUS) & NEEDS_RESET != 0
}

#[test]
fn identity_and_features() {
    let (guest, _) = set_up();
    assert_eq!(guest.read(0), u32::from_le_bytes(*b"virt"));
    assert_eq!((guest.read(4), guest.read(8)), (2, 1));
    assert_eq!(guest.offered(), 0b11 | 1 << 28 | 1 << 29 | 1 << 32);
    guest.write(reg::DEVICE_FEATURES_SEL, 2);
    assert_eq!(guest.read(reg::DEVICE_FEATURES), 0);
    guest.write(reg::QUEUE_SEL, 1);
    assert_eq!(guest.read(reg::QUEUE_NUM_MAX), 16);
    guest.write(reg::QUEUE_SEL, 2);
    assert_eq!(guest.read(reg::QUEUE_NUM_MAX), 0);
    assert_eq!(guest.read(0xb0), u32::MAX, "no shared memory");
    assert_eq!(guest.config(2, 6), b"nfig\0\0");
    assert_eq!(guest.config(1 << 11, 4), [0; 4]);
}

#[test]
fn features_that_do_not_agree_leave_features_ok_unset() {
    for (features, picky, ok) in [
        (1 << 32, false, true),
        (1 << 32 | 0b10, true, false),
        (1 << 32 | 0b01, true, true),
        (0b11, false, false),
        (1 << 32 | 1 << 2, false, false),
        (1 << 32 | 1 << 40, false, false),
    ] {
        let guest = Guest::new(1 << 20, Dummy::new(picky));
        guest.write(reg::STATUS, 1);
        guest.write(reg::STATUS, 3);
        guest.accept(features);
        guest.write(reg::STATUS, 0xb);
        assert_eq!(guest.read(reg::STATUS) == 0xb, ok, "{features:#x}");
        if ok {
            // Features are settled now.
            guest.accept(u64::MAX);
            guest.write(reg::STATUS, 0xb);
            assert!(!failed(&guest));
        } else {
            guest.write(reg::STATUS, 0xf);
            assert!(failed(&guest), "DRIVER_OK without FEATURES_OK");
        }
    }
}

#[test]
fn status_out_of_order_needs_a_reset() {
    for sequence in [&[2][..], &[1, 9], &[1, 3, 7], &[1, 3, 1], &[4], &[8], &[1, 5]] {
        let (mut guest, device) = set_up();
        for &status in sequence {
            guest.write(reg::STATUS, status);
        }
        assert!(failed(&guest), "{sequence:?}");
        assert!(!device.active());
        guest.reset();
        guest.start();
        assert!(device.active());
    }
    let (guest, _) = set_up();
    guest.write(reg::STATUS, 0x83);
    assert_eq!(guest.read(reg::STATUS), 0x83, "the driver may give up at any time");
}

#[test]
fn bad_queues_are_refused_when_enabled() {
    let ram = 1 << 20;
    for (size, desc, driver, device) in [
        (0, 0x1000, 0x2000, 0x3000),
        (3, 0x1000, 0x2000, 0x3000),
        (128, 0x1000, 0x2000, 0x3000),
        (1 << 16 | 16, 0x1000, 0x2000, 0x3000),
        (16, 0x1008, 0x2000, 0x3000),
        (16, 0x1000, 0x2001, 0x3000),
        (16, 0x1000, 0x2000, 0x3002),
        (16, ram - 240, 0x2000, 0x3000),
        (16, 0x1000, ram - 36, 0x3000),
        (16, 0x1000, 0x2000, ram - 128),
        (16, u64::MAX - 15, 0x2000, 0x3000),
    ] {
        let (guest, _) = set_up();
        guest.write(reg::STATUS, 1);
        guest.write(reg::STATUS, 3);
        guest.write(reg::QUEUE_SEL, 0);
        guest.write(reg::QUEUE_NUM, size);
        let rings =
            [(reg::QUEUE_DESC, desc), (reg::QUEUE_DRIVER, driver), (reg::QUEUE_DEVICE, device)];
        for (register, addr) in rings {
            guest.write(register, addr as u32);
            guest.write(register + 4, (addr >> 32) as u32);
        }
        guest.write(reg::QUEUE_READY, 1);
        assert_eq!(guest.read(reg::QUEUE_READY), 0);
        assert!(failed(&guest), "{size} {desc:#x} {driver:#x} {device:#x}");
    }
    // Rings that end with RAM are good.
    let (guest, _) = set_up();
    guest.write(reg::QUEUE_NUM, 16);
    let rings = [(reg::QUEUE_DESC, ram - 256), (reg::QUEUE_DRIVER, ram - 0x1000 - 38)];
    for (register, addr) in rings {
        guest.write(register, addr as u32);
    }
    guest.write(reg::QUEUE_DEVICE, (ram - 0x2000 - 136) as u32);
    guest.write(reg::QUEUE_READY, 1);
    assert_eq!(guest.read(reg::QUEUE_READY), 1);
    guest.write(reg::QUEUE_NUM, 8);
    assert!(!failed(&guest), "a ready queue is not changed");
}

#[test]
fn a_missing_queue_stops_the_device() {
    let (guest, device) = set_up();
    for status in [1, 3] {
        guest.write(reg::STATUS, status);
    }
    guest.accept(1 << 32);
    guest.write(reg::STATUS, 0xb);
    guest.write(reg::STATUS, 0xf);
    assert!(failed(&guest) && !device.active());
}

#[test]
fn notifications_ring_the_right_bell_of_an_active_device() {
    let (mut guest, device) = set_up();
    let drain = |slot: &QueueSlot| slot.doorbell.read().unwrap_or(0);
    guest.notify(0);
    assert_eq!(drain(&device.core.slots()[0]), 0, "not active yet");
    guest.start();
    device.core.slots().iter().for_each(QueueSlot::clear);
    guest.notify(1);
    assert_eq!((drain(&device.core.slots()[0]), drain(&device.core.slots()[1])), (0, 1));
    assert!(!failed(&guest));
    guest.notify(2);
    assert!(failed(&guest));
}

#[test]
fn interrupts_are_shown_and_acknowledged() {
    let (mut guest, device) = set_up();
    let link = device.core.link().unwrap().clone();
    let generation = guest.read(0xfc);
    link.config_changed();
    assert_eq!(guest.read(reg::INTERRUPT_STATUS), 0, "nobody to tell");
    guest.start();
    assert_eq!(guest.read(reg::INTERRUPT_STATUS), 2, "it changed while the driver started");
    assert_ne!(guest.read(0xfc), generation);
    link.used();
    assert_eq!(guest.read(reg::INTERRUPT_STATUS), 3);
    guest.write(reg::INTERRUPT_ACK, 2);
    assert_eq!(guest.read(reg::INTERRUPT_STATUS), 1);
    assert_eq!(guest.line.count(), 2);
    link.fail(&"a test");
    assert_eq!(guest.read(reg::INTERRUPT_STATUS), 3, "needs-reset is told as a config change");
    guest.reset();
    assert_eq!(guest.read(reg::INTERRUPT_STATUS), 0);
}

#[test]
fn a_queue_taken_back_stops_the_device() {
    let (mut guest, device) = set_up();
    guest.start();
    guest.write(reg::QUEUE_SEL, 0);
    guest.write(reg::QUEUE_READY, 0);
    assert_eq!(guest.read(reg::QUEUE_READY), 0);
    assert!(!device.active());
    guest.write(reg::QUEUE_READY, 1);
    guest.notify(0);
    assert!(!device.active());
}

#[test]
fn odd_accesses_do_nothing_bad() {
    for len in [0, 1, 2, 3, 5, 8, 9] {
        let (guest, _) = set_up();
        let mut data = vec![0xff; len];
        guest.mmio.read(reg::MAGIC, &mut data);
        assert!(data.iter().all(|&b| b == 0));
        assert!(!failed(&guest));
        guest.mmio.write(reg::STATUS, &vec![1; len]);
        assert!(failed(&guest), "a write of {len} bytes");
    }
    let (guest, _) = set_up();
    guest.mmio.write(reg::STATUS + 2, &[1; 4]);
    assert!(failed(&guest));
    guest.mmio.write(0xfff, &[0]);
}

#[test]
fn state_of_an_idle_device_survives_and_foreign_state_is_refused() {
    let (mut guest, device) = set_up();
    guest.start();
    let state = guest.mmio.save();
    let (other, other_device) = set_up();
    other.mmio.restore(&state).unwrap();
    assert_eq!(other.mmio.save(), state);
    assert!(other_device.active() && device.active());
    let mut foreign = state.clone();
    foreign.queues.pop();
    assert!(other.mmio.restore(&foreign).is_err());
    let mut foreign = state;
    foreign.driver_features |= 1 << 45;
    assert!(other.mmio.restore(&foreign).is_err());
}

#[test]
fn queues_open_with_the_negotiated_features() {
    let (mut guest, device) = set_up();
    let mut queue = guest.start_without(1 << 28, 16).remove(0);
    queue.offer_indirect(0x8_0000, &[Segment::readable(0x9_0000, 4)]);
    let popped =
        device.core.serve(|work, _| work.queues[0].as_mut().unwrap().pop(&mut Chain::default()));
    assert_eq!(popped, None);
    assert!(failed(&guest), "indirect tables were not negotiated");
}
