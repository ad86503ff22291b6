use super::*;
use crate::testing::{self, Guest, Segment, hostile};

fn set_up() -> (EventLoop, Arc<Rng>, Guest) {
    let events = EventLoop::start("rng-test").unwrap();
    let device = Rng::new("rng", &events).unwrap();
    let guest = Guest::new(1 << 20, device.clone());
    (events, device, guest)
}

#[test]
fn buffers_are_filled_and_differ() {
    let (_events, device, mut guest) = set_up();
    let mut queue = guest.start().remove(0);
    let at = guest.alloc(0x2000);
    let parts = [Segment::writable(at, 100), Segment::writable(at + 0x1000, 3000)];
    assert_eq!(guest.transact(&mut queue, &parts), 3100);
    let first = guest.bytes(at + 0x1000, 3000);
    assert_eq!(guest.transact(&mut queue, &parts), 3100);
    let second = guest.bytes(at + 0x1000, 3000);
    assert_ne!(first, second);
    assert!(second.iter().filter(|&&b| b == 0).count() < 100);
    assert_eq!(guest.bytes(at + 100, 50), [0; 50], "nothing beyond the buffer");
    assert_eq!(device.given(), 6200);
    // A greedy request gets less than it asks for.
    let big = [Segment::writable(0x20000, 0xd0000)];
    assert_eq!(guest.transact(&mut queue, &big), MAX_BYTES as u32);
}

#[test]
fn a_request_without_room_stops_the_device() {
    let (_events, _, mut guest) = set_up();
    let mut queue = guest.start().remove(0);
    queue.offer(&[Segment::readable(0x1000, 16)]);
    guest.notify(0);
    assert!(guest.wait_needs_reset());
}

#[test]
fn a_hostile_driver_gets_nowhere() {
    let (_events, _, mut guest) = set_up();
    let mut queue = guest.start().remove(0);
    let mut rng = testing::Rng::new(5);
    for round in 0..5000 {
        let header = |draw: &mut dyn FnMut() -> Option<u64>| Some(draw()?.to_le_bytes().to_vec());
        hostile::mischief(&guest, &mut queue, header, &mut rng).unwrap();
        hostile::poke(&guest, &mut rng);
        if round % 8 == 0 || guest.mmio.link().needs_reset() {
            queue = hostile::recovers(&mut guest).remove(0);
        }
    }
    queue = hostile::recovers(&mut guest).remove(0);
    assert_eq!(guest.transact(&mut queue, &[Segment::writable(0x8_0000, 64)]), 64);
}
