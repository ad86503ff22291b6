use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::*;
use crate::Bus;

/// The processor's pin.
#[derive(Debug, Default)]
struct Intr {
    asserted: AtomicBool,
    changes: AtomicU32,
}

impl MsiSink for Intr {
    fn signal_msi(&self, _: u64, _: u32) {}

    fn set_intr(&self, asserted: bool) {
        let before = self.asserted.swap(asserted, Ordering::SeqCst);
        assert_ne!(before, asserted, "only changes are told");
        self.changes.fetch_add(1, Ordering::SeqCst);
    }
}

struct Pc {
    bus: Bus,
    pic: Arc<Pic>,
    intr: Arc<Intr>,
}

impl Pc {
    /// As a firmware leaves it.
    fn new() -> Self {
        let (mut bus, intr) = (Bus::new(), Arc::new(Intr::default()));
        let pic = Pic::new(intr.clone());
        pic.place(&mut bus).unwrap();
        Self { bus, pic, intr }
    }

    /// With vectors 0x20 and 0x28, nothing masked, and the fourth initialization word of the first controller.
    fn initialized(fourth: u8) -> Self {
        let pc = Self::new();
        for (port, base, third) in [(0x20, 0x20, 4), (0xa0, 0x28, 2)] {
            let fourth = if port == 0x20 { fourth } else { fourth & !0x10 };
            pc.write(port, 0x11);
            pc.writes(port + 1, &[base, third, fourth, 0]);
        }
        pc
    }

    fn write(&self, port: u64, value: u8) {
        self.bus.ports.write(port, &[value]);
    }

    fn writes(&self, port: u64, values: &[u8]) {
        values.iter().for_each(|&value| self.write(port, value));
    }

    fn ends(&self, ports: &[u64]) {
        ports.iter().for_each(|&port| self.write(port, EOI));
    }

    fn read(&self, port: u64) -> u8 {
        let mut data = [0xee];
        self.bus.ports.read(port, &mut data);
        data[0]
    }

    fn pulse(&self, irq: u8) {
        self.pic.pin(irq).unwrap().trigger();
    }

    fn pulses(&self, irqs: &[u8]) {
        irqs.iter().for_each(|&irq| self.pulse(irq));
    }

    /// The vector, as long as one is asked for.
    fn take(&self) -> Option<u8> {
        assert_eq!(self.pic.intr(), self.intr.asserted.load(Ordering::SeqCst));
        self.pic.intr().then(|| self.pic.acknowledge())
    }

    /// Requests and what is in service of the controller at `port`.
    fn registers(&self, port: u64) -> (u8, u8) {
        self.write(port, 0x0a);
        let requests = self.read(port);
        self.write(port, 0x0b);
        (requests, self.read(port))
    }
}

const EOI: u8 = 0x20;

#[test]
fn firmware_leaves_everything_masked() {
    let pc = Pc::new();
    assert_eq!([0x21, 0xa1, 0x4d0, 0x4d1].map(|port| pc.read(port)), [0xff, 0xff, 0, 0]);
    pc.pulse(0);
    pc.pulse(12);
    assert_eq!(pc.take(), None);
    // An edge waits behind the mask, and has the firmware's vector.
    pc.write(0x21, 0xfa);
    pc.write(0xa1, 0xef);
    assert_eq!([pc.take(), pc.take()], [Some(8), None]);
    pc.write(0x20, EOI);
    assert_eq!(pc.take(), Some(0x74));
}

#[test]
fn initialization_takes_as_many_words_as_it_says() {
    let pc = Pc::new();
    // Four, then a mask.
    pc.write(0x20, 0x11);
    pc.writes(0x21, &[0x47, 4, 1, 0xfe]);
    assert_eq!(pc.read(0x21), 0xfe);
    pc.pulse(0);
    assert_eq!(pc.take(), Some(0x40), "the low bits of a vector are the input");
    // Alone and without a fourth: two.
    pc.write(0x20, 0x12);
    assert_eq!(pc.read(0x21), 0, "initialization unmasks");
    assert_eq!(pc.registers(0x20), (0, 0));
    pc.writes(0x21, &[0x50, 0xf7]);
    assert_eq!(pc.read(0x21), 0xf7);
    pc.pulse(3);
    assert_eq!(pc.take(), Some(0x53));
    // Three.
    pc.write(0x20, 0x10);
    pc.writes(0x21, &[0x60, 4, 0xfb]);
    assert_eq!(pc.read(0x21), 0xfb);
    // As one access of two bytes.
    pc.bus.ports.write(0x20, &[0x12, 0x68]);
    pc.pulse(1);
    assert_eq!(pc.take(), Some(0x69));
}

#[test]
fn initialization_forgets_edges_and_modes() {
    let pc = Pc::initialized(3);
    // A rotation, the special mask mode, reads of what is in service.
    pc.writes(0x20, &[0xc3, 0x68, 0x0b]);
    pc.pic.set_irq(5, true);
    pc.write(0x21, 0xff);
    pc.write(0x20, 0x11);
    pc.writes(0x21, &[0x20, 4, 1]);
    assert_eq!(pc.take(), None, "the input must rise again");
    assert_eq!(pc.read(0x20), 0, "requests are read");
    pc.pic.set_irq(5, false);
    pc.pic.set_irq(5, true);
    pc.pulse(4);
    assert_eq!([pc.take(), pc.take()], [Some(0x24), None], "4 comes before 5 again");
    assert_eq!(pc.registers(0x20), (1 << 5, 1 << 4));
}

#[test]
fn what_is_in_service_holds_back_what_is_not_higher() {
    let pc = Pc::initialized(1);
    pc.pulses(&[4, 1, 6]);
    assert_eq!([pc.take(), pc.take()], [Some(0x21), None]);
    pc.pulse(0);
    assert_eq!([pc.take(), pc.take()], [Some(0x20), None], "nested");
    assert_eq!(pc.registers(0x20), (1 << 4 | 1 << 6, 0b11));
    pc.write(0x20, EOI);
    pc.pulse(1);
    assert_eq!(pc.take(), None, "again, while it is served");
    pc.write(0x20, EOI);
    assert_eq!([pc.take(), pc.take()], [Some(0x21), None]);
    // A specific end of another one changes nothing for this one.
    pc.write(0x20, 0x63);
    assert_eq!(pc.take(), None);
    pc.write(0x20, 0x61);
    assert_eq!(pc.take(), Some(0x24));
    pc.write(0x20, 0x64);
    assert_eq!(pc.take(), Some(0x26));
}

#[test]
fn edges_are_counted_once_and_levels_as_long_as_they_last() {
    let pc = Pc::initialized(1);
    pc.pulse(5);
    pc.pulse(5);
    assert_eq!(pc.take(), Some(0x25));
    pc.write(0x20, EOI);
    assert_eq!(pc.take(), None);
    // Input 5 becomes a level. 0 to 2 cannot, nor 8 and 13.
    pc.write(0x4d0, 0x27);
    pc.write(0x4d1, 0xff);
    assert_eq!((pc.read(0x4d0), pc.read(0x4d1)), (0x20, 0xde));
    pc.pic.set_irq(5, true);
    assert_eq!(pc.take(), Some(0x25));
    assert_eq!(pc.registers(0x20), (1 << 5, 1 << 5), "it is still requested");
    pc.write(0x20, EOI);
    assert_eq!(pc.take(), Some(0x25));
    pc.pic.set_irq(5, false);
    pc.write(0x20, EOI);
    assert_eq!(pc.take(), None);
    // The register outlives an initialization; what the initialization itself can say does not.
    pc.write(0x20, 0x19);
    pc.writes(0x21, &[0x20, 4, 1]);
    pc.pic.set_irq(1, true);
    assert_eq!(pc.take(), Some(0x21));
    pc.write(0x20, EOI);
    assert_eq!(pc.take(), Some(0x21));
    pc.write(0x20, 0x11);
    pc.writes(0x21, &[0x20, 4, 1]);
    assert_eq!(pc.take(), None);
    pc.pic.set_irq(5, true);
    assert_eq!(pc.take(), Some(0x25));
}

#[test]
fn a_request_that_is_gone_is_spurious() {
    let pc = Pc::initialized(1);
    pc.write(0x4d0, 1 << 3);
    pc.pic.set_irq(3, true);
    assert!(pc.intr.asserted.load(Ordering::SeqCst));
    pc.pic.set_irq(3, false);
    assert!(!pc.intr.asserted.load(Ordering::SeqCst));
    // The processor was on its way.
    assert_eq!(pc.pic.acknowledge(), 0x27);
    assert_eq!(pc.registers(0x20), (0, 0), "nothing is in service");
    // The second controller's requests are as those of any other.
    pc.pulse(10);
    pc.write(0xa1, 1 << 2);
    assert_eq!(pc.pic.acknowledge(), 0x27);
    assert_eq!((pc.registers(0x20), pc.registers(0xa0)), ((0, 0), (1 << 2, 0)));
    pc.write(0xa1, 0);
    assert_eq!(pc.take(), Some(0x2a));
}

#[test]
fn the_second_controller_is_behind_input_2() {
    let pc = Pc::initialized(1);
    pc.pulses(&[14, 9, 3]);
    assert_eq!([pc.take(), pc.take()], [Some(0x29), None], "before 3");
    assert_eq!((pc.registers(0x20), pc.registers(0xa0)), ((1 << 3, 1 << 2), (1 << 6, 1 << 1)));
    // An end for the second one alone: its next request waits at the first one.
    pc.write(0xa0, EOI);
    assert_eq!(pc.take(), None);
    pc.write(0x20, EOI);
    assert_eq!([pc.take(), pc.take()], [Some(0x2e), None]);
    // In the other order.
    pc.write(0x20, EOI);
    assert_eq!(pc.take(), Some(0x23));
    pc.pulse(15);
    assert_eq!(pc.take(), None, "14 is in service");
    pc.write(0xa0, EOI);
    assert_eq!([pc.take(), pc.take()], [Some(0x2f), None], "2 is higher than 3");
    // Masking the whole of it.
    pc.ends(&[0xa0, 0x20, 0x20]);
    pc.write(0x21, 4);
    pc.pulse(8);
    assert_eq!(pc.take(), None);
    pc.write(0x21, 0);
    assert_eq!(pc.take(), Some(0x28));
    assert!(pc.pic.pin(2).is_none() && pc.pic.pin(16).is_none());
}

#[test]
fn the_special_fully_nested_mode_lets_the_second_controller_nest() {
    for (fourth, second) in [(1, None), (0x11, Some(0x29))] {
        let pc = Pc::initialized(fourth);
        pc.pulse(12);
        assert_eq!(pc.take(), Some(0x2c));
        pc.pulse(9);
        pc.pulse(5);
        assert_eq!([pc.take(), pc.take()], [second, None], "5 is lower in any case");
    }
}

#[test]
fn automatic_ends_need_no_other_and_may_rotate() {
    let pc = Pc::initialized(3);
    for _ in 0..2 {
        pc.pulses(&[3, 4]);
        assert_eq!([pc.take(), pc.take(), pc.take()], [Some(0x23), Some(0x24), None]);
        assert_eq!(pc.registers(0x20).1, 0);
    }
    pc.pulses(&[11, 12]);
    assert_eq!([pc.take(), pc.take(), pc.take()], [Some(0x2b), Some(0x2c), None]);
    // Rotating: what was served has the lowest priority then.
    pc.write(0x20, 0x80);
    pc.pulse(3);
    assert_eq!(pc.take(), Some(0x23));
    pc.pulses(&[3, 4, 1]);
    assert_eq!([pc.take(), pc.take(), pc.take()], [Some(0x24), Some(0x21), Some(0x23)]);
    pc.write(0x20, 0);
    pc.pulses(&[3, 4]);
    assert_eq!([pc.take(), pc.take()], [Some(0x24), Some(0x23)], "the order stays");
}

#[test]
fn ends_may_rotate_and_priorities_be_set() {
    let pc = Pc::initialized(1);
    // 4 becomes the lowest by the end of its interrupt, whichever is the highest in service.
    pc.pulse(4);
    assert_eq!(pc.take(), Some(0x24));
    pc.write(0x20, 0xa0);
    pc.pulses(&[4, 5]);
    assert_eq!(pc.take(), Some(0x25));
    // A specific one: 5 ends, and is the lowest.
    pc.write(0x20, 0xe5);
    pc.pulses(&[5, 6]);
    assert_eq!(pc.take(), Some(0x26));
    pc.write(0x20, EOI);
    assert_eq!(pc.take(), Some(0x24));
    pc.write(0x20, EOI);
    assert_eq!(pc.take(), Some(0x25));
    pc.write(0x20, EOI);
    // Set: 2 is the lowest, so that 3 is the highest.
    pc.write(0x20, 0xc2);
    pc.pulses(&[0, 3, 1]);
    for vector in [0x23, 0x20, 0x21] {
        assert_eq!([pc.take(), pc.take()], [Some(vector), None]);
        pc.write(0x20, EOI);
    }
    // Nothing in service: no rotation. And what is no command.
    pc.write(0x20, 0xa0);
    pc.write(0x20, 0x43);
    pc.pulses(&[1, 3]);
    assert_eq!(pc.take(), Some(0x23));
}

#[test]
fn the_special_mask_mode_lets_lower_ones_through() {
    let pc = Pc::initialized(1);
    pc.pulse(1);
    assert_eq!(pc.take(), Some(0x21));
    pc.write(0x21, 1 << 1);
    pc.pulse(6);
    assert_eq!(pc.take(), None);
    pc.write(0x20, 0x68);
    assert_eq!(pc.take(), Some(0x26));
    // An end that names nobody is that of 6, since 1 is masked.
    pc.write(0x20, EOI);
    assert_eq!(pc.registers(0x20).1, 1 << 1);
    pc.write(0x20, 0x08);
    pc.pulse(6);
    assert_eq!(pc.take(), Some(0x26), "a word without the bit leaves the mode as it is");
    pc.write(0x20, EOI);
    pc.write(0x20, 0x48);
    pc.pulse(6);
    assert_eq!(pc.take(), None);
}

#[test]
fn polling_takes_interrupts_too() {
    let pc = Pc::initialized(1);
    let poll = |port, at| {
        pc.write(port, 0x0c);
        pc.read(at)
    };
    assert_eq!(poll(0x20, 0x20), 0);
    pc.pulse(3);
    pc.pulse(13);
    assert_eq!(poll(0x20, 0x20), 0x82);
    assert_eq!(poll(0xa0, 0xa1), 0x85, "by whichever port");
    assert_eq!(pc.take(), None, "taken");
    assert_eq!(pc.read(0xa1), 0, "once");
    assert_eq!((pc.registers(0x20), pc.registers(0xa0)), ((1 << 3, 1 << 2), (0, 1 << 5)));
    pc.ends(&[0xa0, 0x20]);
    assert_eq!(pc.take(), Some(0x23));
}

#[test]
fn a_machine_goes_on_where_another_stood() {
    let pc = Pc::initialized(1);
    pc.writes(0x20, &[0xc3, 0x68]);
    pc.pulses(&[5, 9, 4]);
    pc.write(0x4d1, 0x10);
    assert_eq!(pc.take(), Some(0x24));
    // In the middle of an initialization.
    pc.write(0xa0, 0x11);
    let state = pc.pic.state();
    let other = Pc::new();
    other.pic.restore(&state);
    assert_eq!(other.pic.state(), state);
    let json = serde_json::to_string(&state).unwrap();
    assert_eq!(serde_json::from_str::<PicState>(&json).unwrap(), state);
    for pc in [&pc, &other] {
        pc.writes(0xa1, &[0x70, 2, 1, 0]);
        pc.pulse(9);
        pc.write(0x20, EOI);
        assert_eq!(pc.take(), Some(0x25));
        pc.write(0x20, EOI);
        assert_eq!(pc.take(), Some(0x71));
    }
    // INTR is told again; what no controller can be is made into something that one can.
    let pc = Pc::initialized(1);
    pc.pulse(5);
    let other = Pc::new();
    other.pic.restore(&pc.pic.state());
    assert_eq!(other.take(), Some(0x25));
    let absurd =
        json.replace("\"lowest\":3", "\"lowest\":200").replace("\"elcr\":0", "\"elcr\":255");
    assert_ne!(absurd, json);
    other.pic.restore(&serde_json::from_str(&absurd).unwrap());
    assert_eq!(other.read(0x4d0), 0xf8);
}

#[test]
fn nothing_that_comes_in_makes_a_controller_contradict_itself() {
    let mut rng = crate::testing::Rng::new(0x8259);
    for _ in 0..200 {
        crate::fuzz::fuzz_pic(&rng.bytes(2048));
    }
}
