use super::*;
use crate::testing::{self, DriverQueue, Guest, Segment, hostile};
use mvm_memory::Backing;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _};

const RAM: u64 = 2 << 20;
const REGION: u64 = 1 << 32;
const STEP: u64 = 4 * BLOCK;
const SIZE: u64 = 4 * STEP;

const PLUG: u64 = 0;
const UNPLUG: u64 = 1;
const UNPLUG_ALL: u64 = 2;
const STATE: u64 = 3;

const ACK: u8 = 0;
const NACK: u8 = 1;
const ERROR: u8 = 3;

struct Bench {
    _events: EventLoop,
    device: Arc<Mem>,
    guest: Guest,
    queue: DriverQueue,
    request: u64,
    answer: u64,
}

fn ram() -> GuestRam {
    GuestRam::growing(&[(0, RAM)], Some((REGION, SIZE)), Backing::Small).unwrap()
}

fn device(ram: &GuestRam) -> (EventLoop, Arc<Mem>) {
    let events = EventLoop::start("mem-test").unwrap();
    let config = MemConfig { name: "mem".into(), ram: ram.clone(), step: STEP };
    let device = Mem::new(config, &events).unwrap();
    (events, device)
}

impl Bench {
    fn new() -> Self {
        let ram = ram();
        let (events, device) = device(&ram);
        let mut guest = Guest::over(ram, device.clone());
        let queue = guest.start().remove(0);
        let (request, answer) = (guest.alloc(24), guest.alloc(10));
        Self { _events: events, device, guest, queue, request, answer }
    }

    fn offer(&self, blocks: u64) {
        self.device.make_usable(blocks * BLOCK).unwrap();
        self.device.request(blocks * BLOCK).unwrap();
    }

    /// Asks by number of block. Returns the answer and the state in it.
    fn ask(&mut self, kind: u64, block: u64, count: u16) -> (u8, u8) {
        self.ask_at(kind, REGION.wrapping_add(block.wrapping_mul(BLOCK)), count)
    }

    fn ask_at(&mut self, kind: u64, address: u64, count: u16) -> (u8, u8) {
        let words = [kind, address, u64::from(count)].map(u64::to_le_bytes).concat();
        self.guest.memory().write_slice(&words, GuestAddress(self.request)).unwrap();
        let chain = [Segment::readable(self.request, 24), Segment::writable(self.answer, 10)];
        assert_eq!(self.guest.transact(&mut self.queue, &chain), 10);
        let answer = self.guest.bytes(self.answer, 10);
        assert!(answer.iter().enumerate().all(|(at, byte)| at == 0 || at == 8 || *byte == 0));
        (answer[0], answer[8])
    }

    fn word(&self, index: u64) -> u64 {
        u64::from_le_bytes(self.guest.config(8 * index, 8).try_into().unwrap())
    }

    fn plugged(&self) -> u64 {
        assert_eq!(self.word(5), self.device.stats().plugged);
        self.word(5) / BLOCK
    }
}

#[test]
fn the_driver_is_told_of_the_region_and_of_changes() {
    let bench = Bench::new();
    let words = |bench: &Bench| [0, 1, 2, 3, 4, 5, 6, 7].map(|index| bench.word(index));
    assert_eq!(words(&bench), [BLOCK, 0, REGION, SIZE, 0, 0, 0, 0]);
    let before = bench.guest.line.count();
    bench.device.make_usable(BLOCK + 1).unwrap();
    assert_eq!(bench.guest.line.count(), before, "the engine has to know first");
    bench.device.request(BLOCK + 1).unwrap();
    assert!(bench.guest.line.count() > before);
    assert_eq!(words(&bench), [BLOCK, 0, REGION, SIZE, STEP, 0, 2 * BLOCK, 0]);
    let told = bench.guest.line.count();
    bench.device.request(2 * BLOCK).unwrap();
    assert_eq!(bench.guest.line.count(), told, "nothing new");
    let too_much = TooMuch { asked: SIZE + 1, region: SIZE };
    assert_eq!(bench.device.make_usable(SIZE + 1), Err(too_much));
    assert!(bench.device.request(u64::MAX).is_err());
}

#[test]
fn blocks_are_plugged_as_far_as_the_host_asks() {
    let mut bench = Bench::new();
    assert_eq!(bench.ask(PLUG, 0, 1), (ERROR, 0), "nothing may be used yet");
    bench.offer(3);
    assert_eq!(bench.ask(PLUG, 0, 4), (NACK, 0), "one more than was asked for");
    assert_eq!(bench.ask(PLUG, 1, 2), (ACK, 0));
    assert_eq!(bench.plugged(), 2);
    assert_eq!(bench.ask(PLUG, 2, 1), (ERROR, 0), "it is plugged");
    assert_eq!(bench.ask(PLUG, 0, 1), (ACK, 0));
    assert_eq!(bench.ask(PLUG, 3, 1), (NACK, 0));
    assert_eq!(bench.ask(PLUG, 4, 1), (ERROR, 0), "beyond what may be used");
    assert_eq!((bench.plugged(), bench.device.stats().refused), (3, 5));
    bench.guest.memory().write_obj(7u64, GuestAddress(REGION + STEP - 8)).unwrap();
    assert!(bench.guest.memory().write_obj(7u64, GuestAddress(REGION + STEP)).is_err());
}

#[test]
fn what_is_unplugged_goes_back_to_the_host_and_is_zero_when_it_comes_again() {
    let mut bench = Bench::new();
    bench.offer(4);
    assert_eq!(bench.ask(PLUG, 0, 4), (ACK, 0));
    for block in 0..4 {
        bench.guest.memory().write_obj(!0u64, GuestAddress(REGION + block * BLOCK + 4096)).unwrap();
    }
    bench.device.request(BLOCK).unwrap();
    assert_eq!(bench.plugged(), 4, "it is for the guest to give them back");
    assert_eq!(bench.ask(UNPLUG, 1, 2), (ACK, 0));
    assert_eq!(bench.ask(UNPLUG, 1, 1), (ERROR, 0), "twice");
    assert_eq!(bench.ask(UNPLUG, 2, 2), (ERROR, 0), "not all of them are plugged");
    assert_eq!(bench.plugged(), 2);
    let word = |block: u64| {
        let at = GuestAddress(REGION + block * BLOCK + 4096);
        bench.guest.memory().read_obj::<u64>(at).unwrap()
    };
    assert_eq!([0, 1, 2, 3].map(word), [!0, 0, 0, !0]);
    assert_eq!(bench.ask(PLUG, 1, 1), (NACK, 0), "the host asks for one block");
    assert_eq!(bench.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!(bench.plugged(), 0);
    let word = |block: u64| {
        let at = GuestAddress(REGION + block * BLOCK + 4096);
        bench.guest.memory().read_obj::<u64>(at).unwrap()
    };
    assert_eq!([0, 1, 2, 3].map(word), [0; 4]);
    // As long as the machine lives it may use what it once was given.
    assert_eq!(bench.word(4), STEP);
}

#[test]
fn a_guest_that_keeps_what_it_was_to_give_back_is_reminded() {
    let mut bench = Bench::new();
    bench.offer(2);
    bench.ask(PLUG, 0, 2);
    bench.device.request(BLOCK).unwrap();
    let told = bench.guest.line.count();
    let deadline = std::time::Instant::now() + testing::PATIENCE;
    let again = bench.guest.line.wait_beyond(told, deadline).expect("a reminder");
    bench.guest.line.wait_beyond(again, deadline).expect("a second one");
    assert_eq!(bench.ask(UNPLUG, 0, 1), (ACK, 0));
    assert_eq!(bench.plugged(), 1);
}

#[test]
fn the_state_of_blocks_is_told() {
    let mut bench = Bench::new();
    bench.offer(4);
    bench.ask(PLUG, 1, 2);
    assert_eq!(bench.ask(STATE, 1, 2), (ACK, 0));
    assert_eq!(bench.ask(STATE, 0, 1), (ACK, 1));
    assert_eq!(bench.ask(STATE, 0, 4), (ACK, 2));
    assert_eq!(bench.ask(STATE, 3, 2), (ERROR, 0));
}

#[test]
fn ranges_that_make_no_sense_are_errors() {
    let mut bench = Bench::new();
    bench.offer(SIZE / BLOCK);
    let end = REGION + SIZE;
    let odd = [
        (REGION, 0),
        (REGION + 4096, 1),
        (REGION - BLOCK, 1),
        (REGION - BLOCK, 2),
        (0, u16::MAX),
        (end, 1),
        (end - BLOCK, 2),
        (REGION, u16::MAX),
        (u64::MAX, 1),
        (u64::MAX - BLOCK + 1, 1),
        (u64::MAX - BLOCK + 1, u16::MAX),
    ];
    for kind in [PLUG, UNPLUG, STATE, 4, 0xffff] {
        for (address, count) in odd {
            assert_eq!(
                bench.ask_at(kind, address, count),
                (ERROR, 0),
                "{kind} {address:#x} {count}"
            );
        }
    }
    assert_eq!(bench.plugged(), 0);
    assert_eq!(bench.ask(PLUG, 0, (SIZE / BLOCK) as u16), (ACK, 0));
}

#[test]
fn a_request_that_is_cut_off_stops_the_device_and_a_reset_keeps_what_is_plugged() {
    let mut bench = Bench::new();
    bench.offer(2);
    bench.ask(PLUG, 0, 2);
    bench.queue.offer(&[Segment::readable(bench.request, 23), Segment::writable(bench.answer, 10)]);
    bench.guest.notify(0);
    assert!(bench.guest.wait_needs_reset());
    bench.queue = hostile::recovers(&mut bench.guest).remove(0);
    (bench.request, bench.answer) = (bench.guest.alloc(24), bench.guest.alloc(10));
    assert_eq!(bench.ask(STATE, 0, 2), (ACK, 0));
    assert_eq!(bench.plugged(), 2);
}

#[test]
fn a_saved_device_goes_on_where_it_was() {
    let mut bench = Bench::new();
    bench.offer(3);
    bench.ask(PLUG, 0, 1);
    let state = bench.device.save();
    let ram = ram();
    let (_events, other) = device(&ram);
    other.restore(&state).unwrap();
    assert_eq!(other.save(), state);
    assert_eq!(other.stats(), MemStats { refused: 0, ..bench.device.stats() });
    assert!(ram.memory().check_range(GuestAddress(REGION), STEP as usize));
    let DeviceState::Memory { requested, usable, plugged } = state else { panic!("{state:?}") };
    let odd = [
        (requested + 1, usable, plugged.clone()),
        (requested, usable + BLOCK, plugged.clone()),
        (requested, SIZE + STEP, plugged.clone()),
        (SIZE, usable, plugged.clone()),
        (requested, usable, vec![1 << 4]),
        (requested, usable, vec![]),
    ];
    for (requested, usable, plugged) in odd {
        let state = DeviceState::Memory { requested, usable, plugged };
        let (_events, other) = device(&self::ram());
        assert!(other.restore(&state).is_err(), "{state:?}");
        assert_eq!(other.stats().usable, 0);
    }
    assert!(other.restore(&DeviceState::Stateless).is_err());
}

#[test]
fn regions_that_no_guest_could_take_are_refused() {
    let events = EventLoop::start("mem-test").unwrap();
    let new = |growth, step| {
        let ram = GuestRam::growing(&[(0, RAM)], growth, Backing::Small).unwrap();
        Mem::new(MemConfig { name: "mem".into(), ram, step }, &events).unwrap_err()
    };
    assert!(matches!(new(None, STEP), MemError::NoRegion));
    for (growth, step) in [
        ((REGION + BLOCK, SIZE), STEP),
        ((REGION, SIZE + BLOCK), STEP),
        ((REGION, SIZE), 0),
        ((REGION, SIZE), BLOCK / 2),
    ] {
        assert!(matches!(new(Some(growth), step), MemError::Region { .. }));
    }
}

#[test]
fn a_hostile_driver_gets_nowhere() {
    let mut bench = Bench::new();
    bench.offer(5);
    let mut rng = testing::Rng::new(24);
    for round in 0..5000 {
        let header = |draw: &mut dyn FnMut() -> Option<u64>| {
            let (kind, block, count) = (draw()? % 5, draw()? % 17, draw()? % 7);
            Some([kind, REGION + block * BLOCK, count].map(u64::to_le_bytes).concat())
        };
        hostile::mischief(&bench.guest, &mut bench.queue, header, &mut rng).unwrap();
        if round % 8 == 0 || bench.guest.mmio.link().needs_reset() {
            bench.queue = hostile::recovers(&mut bench.guest).remove(0);
            assert!(bench.plugged() <= 5);
        }
    }
    bench.queue = hostile::recovers(&mut bench.guest).remove(0);
    (bench.request, bench.answer) = (bench.guest.alloc(24), bench.guest.alloc(10));
    assert_eq!(bench.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!(bench.ask(PLUG, 0, 5), (ACK, 0));
}
