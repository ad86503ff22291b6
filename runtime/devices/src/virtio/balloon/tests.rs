use super::*;
use crate::testing::{self, DriverQueue, Guest, Segment, hostile, wait_until};
use vm_memory::{Bytes, GuestAddress};

const REPORTING: usize = 4;

fn set_up() -> (EventLoop, Arc<Balloon>, Guest, Vec<DriverQueue>) {
    let events = EventLoop::start("balloon-test").unwrap();
    let config = BalloonConfig { name: "balloon".into(), deflate_on_oom: true, reporting: true };
    let device = Balloon::new(config, &events).unwrap();
    let mut guest = Guest::new(8 << 20, device.clone());
    let queues = guest.start_without(0, 32);
    (events, device, guest, queues)
}

fn frames(list: &[u32]) -> Vec<u8> {
    list.iter().flat_map(|f| f.to_le_bytes()).collect()
}

#[test]
fn inflated_pages_are_dropped_in_one_piece() {
    let (_events, device, mut guest, mut queues) = set_up();
    guest.memory().write_slice(&[0xaa; 0x8000], GuestAddress(0x40_0000)).unwrap();
    let list = frames(&[0x403, 0x402, 0x401, 0x401, 0x406, 0xffff_ffff]);
    let at = guest.place(&list);
    let len = list.len() as u32;
    guest.transact(&mut queues[0], &[Segment::readable(at, len)]);
    assert_eq!(device.stats().inflated, 4 * 4096);
    assert_eq!(guest.bytes(0x40_1000, 0x3000), [0; 0x3000]);
    assert_eq!(guest.bytes(0x40_0fff, 1), [0xaa]);
    assert_eq!(guest.bytes(0x40_4000, 1), [0xaa]);
    assert_eq!(guest.bytes(0x40_6000, 1), [0]);
    guest.transact(&mut queues[1], &[Segment::readable(at, len)]);
}

#[test]
fn reported_pages_are_dropped() {
    let (_events, device, guest, mut queues) = set_up();
    guest.memory().write_slice(&[0xaa; 0x8000], GuestAddress(0x40_0000)).unwrap();
    let parts = [Segment::writable(0x40_0000, 0x2000), Segment::writable(0x40_4000, 0x1000)];
    guest.transact(&mut queues[REPORTING], &parts);
    assert_eq!(device.stats().reported, 0x3000);
    assert_eq!(guest.bytes(0x40_4000, 1), [0]);
    assert_eq!(guest.bytes(0x40_2000, 1), [0xaa]);
}

#[test]
fn a_driver_that_numbers_queues_without_gaps_is_understood() {
    let (_events, device, mut guest, _) = set_up();
    guest.reset();
    guest.write(0x70, 1);
    guest.write(0x70, 3);
    let features = guest.offered();
    guest.accept(features);
    guest.write(0x70, 0xb);
    let mut queues: Vec<_> = (0..4).map(|i| guest.set_up_queue(i, 32, features)).collect();
    guest.write(0x70, 0xf);
    assert_eq!(guest.read(0x70), 0xf);
    guest.memory().write_slice(&[0xaa; 0x1000], GuestAddress(0x40_0000)).unwrap();
    guest.transact(&mut queues[3], &[Segment::writable(0x40_0000, 0x1000)]);
    assert_eq!(device.stats().reported, 0x1000);
}

#[test]
fn the_target_is_told_by_a_config_change() {
    let (_events, device, guest, _queues) = set_up();
    let before = guest.line.count();
    device.set_target(10 * 4096 + 17);
    assert!(guest.line.count() > before);
    assert_eq!(guest.config(0, 8), [10, 0, 0, 0, 0, 0, 0, 0]);
    guest.write(0x104, 7);
    assert_eq!(device.stats().actual, 7 * 4096);
    assert_eq!(device.save(), DeviceState::Balloon { target: 10, actual: 7 });
}

#[test]
fn statistics_come_when_asked_for() {
    let (_events, device, mut guest, mut queues) = set_up();
    let entry = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    let at = guest.place(&[entry(4, 111), entry(5, 222), entry(999, 1)].concat());
    queues[2].offer(&[Segment::readable(at, 30)]);
    guest.notify(2);
    assert!(wait_until(|| device.stats().guest.total == Some(222)));
    assert_eq!(device.stats().guest.free, Some(111));
    assert!(queues[2].poll_used().is_none(), "the buffer is kept");
    assert_eq!(device.queue_states()[2].map(|q| q.next_available), Some(0));
    device.request_guest_stats();
    assert!(guest.wait_used(&mut queues[2]).is_some());
    guest.memory().write_slice(&entry(4, 333), GuestAddress(at)).unwrap();
    queues[2].offer(&[Segment::readable(at, 10)]);
    guest.notify(2);
    assert!(wait_until(|| device.stats().guest.free == Some(333)));
}

#[test]
fn a_hostile_driver_gets_nowhere() {
    let (_events, _, mut guest, mut queues) = set_up();
    let mut rng = testing::Rng::new(6);
    for round in 0..5000 {
        let header = |draw: &mut dyn FnMut() -> Option<u64>| Some(draw()?.to_le_bytes().to_vec());
        let queue = &mut queues[rng.below(5) as usize];
        hostile::mischief(&guest, queue, header, &mut rng).unwrap();
        if round % 8 == 0 || guest.mmio.link().needs_reset() {
            queues = hostile::recovers(&mut guest);
        }
    }
    queues = hostile::recovers(&mut guest);
    guest.transact(&mut queues[REPORTING], &[Segment::writable(0x40_0000, 0x1000)]);
}
