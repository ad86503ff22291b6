use super::*;
use mvm_memory::GuestRam;

const SIZE: u16 = 16;
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const RAM: u64 = 0x10_0000;

struct Rig {
    ram: GuestRam,
    queue: VirtQueue,
    chain: Chain,
    index: u16,
}

fn rig(features: u64) -> Rig {
    let ram = GuestRam::new(&[(0, RAM), (RAM, 0x10000)]).unwrap();
    let state = QueueState {
        size: SIZE,
        ready: true,
        descriptors: TABLE,
        available: AVAILABLE,
        used: USED,
        ..QueueState::default()
    };
    let queue = VirtQueue::new(&state, SIZE, ram.memory().clone(), features).unwrap();
    Rig { ram, queue, chain: Chain::default(), index: 0 }
}

const ALL: u64 = super::super::feature::INDIRECT_DESC | super::super::feature::EVENT_IDX;

impl Rig {
    fn descriptor_at(&self, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
        let m = self.ram.memory();
        m.write_obj(addr, GuestAddress(at)).unwrap();
        m.write_obj(len, GuestAddress(at + 8)).unwrap();
        m.write_obj(flags, GuestAddress(at + 12)).unwrap();
        m.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    fn descriptor(&self, id: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.descriptor_at(TABLE + 16 * u64::from(id), addr, len, flags, next);
    }

    fn publish(&mut self, head: u16) {
        let slot = AVAILABLE + 4 + 2 * u64::from(self.index % SIZE);
        self.index = self.index.wrapping_add(1);
        let m = self.ram.memory();
        m.write_obj(head, GuestAddress(slot)).unwrap();
        m.write_obj(self.index, GuestAddress(AVAILABLE + 2)).unwrap();
    }

    fn pop(&mut self) -> Result<bool, QueueError> {
        self.queue.pop(&mut self.chain)
    }
}

#[test]
fn chains_are_read_and_written_across_their_pieces() {
    let mut r = rig(ALL);
    r.ram.memory().write_slice(b"abcdefgh", GuestAddress(0x4000)).unwrap();
    r.descriptor(3, 0x4000, 3, 1, 5);
    r.descriptor(5, 0x4003, 0, 1, 6);
    r.descriptor(6, 0x4003, 5, 1, 7);
    // A buffer that crosses from one region of RAM to the next.
    r.descriptor(7, RAM - 2, 4, 3, 8);
    r.descriptor(8, 0x5000, 4, 2, 0);
    r.publish(3);
    assert!(r.pop().unwrap());
    let m = r.ram.memory();
    assert_eq!((r.chain.head(), r.chain.readable_len(), r.chain.writable_len()), (3, 8, 8));
    let mut got = [0; 5];
    r.chain.read(m, 2, &mut got).unwrap();
    assert_eq!(&got, b"cdefg");
    assert!(matches!(r.chain.read(m, 4, &mut got), Err(QueueError::Short { has: 8, needs: 9 })));
    assert!(r.chain.read(m, u64::MAX, &mut got).is_err());
    r.chain.write(m, 1, b"12345").unwrap();
    let mut at_edge = [0; 4];
    m.read_slice(&mut at_edge, GuestAddress(RAM - 2)).unwrap();
    assert_eq!(&at_edge, b"\x00123");
    let mut slices = Vec::new();
    r.chain.writable_slices(m, 0, 100, &mut slices).unwrap();
    assert_eq!(slices.iter().map(|s| s.len()).collect::<Vec<_>>(), [2, 2, 4]);
    assert!(!r.pop().unwrap());
}

#[test]
fn every_fault_of_a_chain_has_its_error() {
    type Set = fn(&Rig);
    let cases: &[(&str, Set)] = &[
        ("DescriptorIndex", |r| r.descriptor(0, 0x4000, 4, 1, SIZE)),
        ("ChainTooLong", |r| r.descriptor(0, 0x4000, 4, 1, 0)),
        ("Buffer", |r| r.descriptor(0, RAM + 0xffff, 2, 0, 0)),
        ("Buffer", |r| r.descriptor(0, u64::MAX, 2, 0, 0)),
        ("Buffer", |r| r.descriptor(0, 0, u32::MAX, 2, 0)),
        ("Order", |r| {
            r.descriptor(0, 0x4000, 4, 3, 1);
            r.descriptor(1, 0x4000, 4, 0, 0);
        }),
        ("Indirect", |r| r.descriptor(0, 0x4000, 15, 4, 0)),
        ("Indirect", |r| r.descriptor(0, 0x4000, 0, 4, 0)),
        ("Indirect", |r| r.descriptor(0, 0x4000, 16, 5, 1)),
        ("Indirect", |r| r.descriptor(0, RAM + 0xfff8, 16, 4, 0)),
        ("Indirect", |r| {
            r.descriptor(0, 0x4000, 16, 4, 0);
            r.descriptor_at(0x4000, 0x5000, 16, 4, 0);
        }),
        ("ChainTooLong", |r| {
            r.descriptor(0, 0x4000, 32, 4, 0);
            r.descriptor_at(0x4000, 0x5000, 1, 1, 1);
            r.descriptor_at(0x4010, 0x5000, 1, 1, 0);
        }),
        ("DescriptorIndex", |r| {
            r.descriptor(0, 0x4000, 16, 4, 0);
            r.descriptor_at(0x4000, 0x5000, 1, 1, 1);
        }),
    ];
    for (want, set) in cases {
        let mut r = rig(ALL);
        set(&r);
        r.publish(0);
        let error = format!("{:?}", r.pop().unwrap_err());
        assert!(error.starts_with(want), "{error} is not {want}");
    }
    let mut r = rig(0);
    r.descriptor(0, 0x4000, 16, 4, 0);
    r.publish(0);
    assert!(matches!(r.pop(), Err(QueueError::Indirect { .. })), "not negotiated");
    let mut r = rig(ALL);
    r.publish(SIZE);
    assert!(matches!(r.pop(), Err(QueueError::DescriptorIndex { .. })));
    let mut r = rig(ALL);
    r.ram.memory().write_obj(SIZE + 1, GuestAddress(AVAILABLE + 2)).unwrap();
    assert!(matches!(r.pop(), Err(QueueError::AvailIndex(_))));
}

#[test]
fn interrupts_are_asked_for_by_index_or_by_flag() {
    let mut r = rig(ALL);
    let event = |r: &Rig, at: u16| {
        r.ram.memory().write_obj(at, GuestAddress(AVAILABLE + 4 + 2 * u64::from(SIZE))).unwrap();
    };
    event(&r, 1);
    r.queue.push_used(0, 0).unwrap();
    assert!(!r.queue.needs_interrupt().unwrap());
    r.queue.push_used(0, 0).unwrap();
    assert!(r.queue.needs_interrupt().unwrap());
    r.queue.push_used(0, 0).unwrap();
    assert!(!r.queue.needs_interrupt().unwrap(), "once only");

    let mut r = rig(0);
    r.queue.push_used(0, 0).unwrap();
    assert!(r.queue.needs_interrupt().unwrap());
    r.ram.memory().write_obj(1u16, GuestAddress(AVAILABLE)).unwrap();
    assert!(!r.queue.needs_interrupt().unwrap());
}

#[test]
fn notifications_are_asked_for_by_index_or_by_flag() {
    let mut r = rig(ALL);
    r.descriptor(0, 0x4000, 4, 0, 0);
    r.publish(0);
    assert!(r.queue.enable_notifications().unwrap(), "one is there already");
    assert!(r.pop().unwrap() && !r.queue.enable_notifications().unwrap());
    let event: u16 = r.ram.memory().read_obj(GuestAddress(USED + 4 + 8 * u64::from(SIZE))).unwrap();
    assert_eq!(event, 1);
    let mut r = rig(0);
    r.queue.disable_notifications().unwrap();
    assert_eq!(r.ram.memory().read_obj::<u16>(GuestAddress(USED)).unwrap(), 1);
    r.queue.enable_notifications().unwrap();
    assert_eq!(r.ram.memory().read_obj::<u16>(GuestAddress(USED)).unwrap(), 0);
}

#[test]
fn a_round_is_bounded_by_the_queues_length() {
    let mut r = rig(ALL);
    r.descriptor(0, 0x4000, 4, 0, 0);
    for _ in 0..SIZE {
        r.publish(0);
    }
    let Rig { queue, chain, ram, .. } = &mut r;
    let mut index = SIZE;
    let drained = queue
        .drain(chain, |_, _| {
            // A driver that makes another available for each that is served.
            index += 1;
            ram.memory().write_obj(index, GuestAddress(AVAILABLE + 2)).unwrap();
            Ok(0)
        })
        .unwrap();
    assert_eq!((drained.served, drained.more), (u32::from(SIZE), true));
}

#[test]
fn positions_survive_in_the_state() {
    let mut r = rig(ALL);
    r.descriptor(0, 0x4000, 4, 0, 0);
    r.publish(0);
    r.publish(0);
    r.pop().unwrap();
    r.queue.push_used(0, 0).unwrap();
    let state = r.queue.state();
    assert_eq!((state.next_available, state.next_used), (1, 1));
    let mut again = VirtQueue::new(&state, SIZE, r.ram.memory().clone(), ALL).unwrap();
    assert!(again.pop(&mut r.chain).unwrap() && !again.pop(&mut r.chain).unwrap());
}
