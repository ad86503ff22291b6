//! Hypercalls by a guest that is a test.

use std::io::Write;
use std::os::unix::net::UnixDatagram;
use std::sync::Mutex;
use std::thread;

use super::*;
use crate::testing::{PATIENCE, Rng};
use crate::virtio::net::{HEADER, PacketSocket};
use crate::{InterruptLine, SerialConfig};

const RAM: u64 = 4 << 20;
/// An argument block, and data.
const ARGS: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;

struct Nowhere;

impl InterruptLine for Nowhere {
    fn trigger(&self) {}
    fn set_level(&self, _: bool) {}
}

impl std::fmt::Debug for Nowhere {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Nowhere")
    }
}

struct Guest {
    calls: Arc<Hypercalls>,
    ram: GuestRam,
    console: Arc<Serial>,
    gate: Arc<Gate>,
    events: Arc<Mutex<Vec<VmEvent>>>,
    /// The other side of its network.
    network: UnixDatagram,
}

const MTU: u16 = 1400;
const NET: u64 = 5;

fn disk(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// A guest with disks 1 (1000 sectors and a bit) and 2 (2 sectors, read-only), network 5, and a gate that
/// is open.
fn guest() -> Guest {
    let ram = GuestRam::new(&[(0, RAM)]).unwrap();
    let console = Serial::new(Arc::new(Nowhere), SerialConfig::default());
    let (gate, events) = (Arc::new(Gate::new()), Arc::new(Mutex::new(Vec::new())));
    gate.set(Passage::Open);
    let large: Vec<u8> = (0..512_100u32).map(|i| (i / 512) as u8).collect();
    let disks = vec![
        HypercallDisk { handle: 1, file: disk(&large), read_only: false },
        HypercallDisk { handle: 2, file: disk(&[7; 1024]), read_only: true },
    ];
    let (theirs, network) = UnixDatagram::pair().unwrap();
    network.set_read_timeout(Some(PATIENCE)).unwrap();
    let nets = vec![HypercallNet {
        handle: NET,
        mac: [2, 0, 0, 0, 0, 1],
        mtu: MTU,
        backend: Box::new(PacketSocket::new(theirs).unwrap()),
    }];
    let log = events.clone();
    let config = HypercallConfig {
        ram: ram.clone(),
        console: console.clone(),
        disks,
        nets,
        gate: gate.clone(),
        events: Arc::new(move |event| log.lock().unwrap().push(event)),
    };
    let calls = Arc::new(Hypercalls::new(config).unwrap());
    Guest { calls, ram, console, gate, events, network }
}

impl Guest {
    /// Makes a call with these argument words.
    fn call(&self, number: u16, words: &[u64]) {
        for (at, word) in (ARGS..).step_by(8).zip(words) {
            self.ram.memory().write_obj(*word, GuestAddress(at)).unwrap();
        }
        self.calls.write(number.into(), &(ARGS as u32).to_le_bytes());
    }

    fn word(&self, offset: u64) -> u64 {
        self.ram.memory().read_obj(GuestAddress(ARGS + offset)).unwrap()
    }

    /// The result of a block call with these arguments.
    fn block(&self, number: u16, handle: u64, offset: u64, data: u64, len: u64) -> u32 {
        self.call(number, &[handle, offset, data, len, u64::MAX]);
        self.word(32) as u32
    }

    /// The result of a network call with these arguments, and the length that it leaves.
    fn net(&self, number: u16, handle: u64, data: u64, len: u64) -> (u32, u64) {
        self.call(number, &[handle, data, len, u64::MAX]);
        (self.word(24) as u32, self.word(16))
    }

    /// A frame comes in.
    fn arrives(&self, frame: &[u8]) {
        self.network.send(&[&[0; HEADER], frame].concat()).unwrap();
    }

    fn data(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.memory().read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
        bytes
    }

    /// Takes the events so far.
    fn events(&self) -> Vec<VmEvent> {
        std::mem::take(&mut *self.events.lock().unwrap())
    }
}

#[test]
fn the_time_is_the_hosts() {
    let guest = guest();
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let before = now();
    guest.call(call::WALLTIME, &[0]);
    assert!((before..=now()).contains(&guest.word(0)));
}

#[test]
fn what_is_put_is_printed_up_to_a_limit() {
    let guest = guest();
    guest.ram.memory().write_slice(b"hello\n", GuestAddress(DATA)).unwrap();
    guest.call(call::PUTS, &[DATA, 6]);
    guest.call(call::PUTS, &[DATA, 0]);
    assert_eq!(guest.console.tail(), b"hello\n");
    guest.call(call::PUTS, &[DATA, RAM - DATA]);
    assert_eq!(guest.console.written(), 6 + PUTS_MAX);
    assert!(guest.events().is_empty());
}

#[test]
fn polling_waits_its_time_and_finds_nothing() {
    let guest = guest();
    for timeout in [0, 1, 3_000_000] {
        let before = std::time::Instant::now();
        guest.call(call::POLL, &[timeout, u64::MAX, u64::MAX]);
        assert!(before.elapsed() >= Duration::from_nanos(timeout));
        assert_eq!((guest.word(8), guest.word(16) as u32), (0, 0));
    }
}

#[test]
fn whoever_polls_for_ever_comes_back_when_the_machine_stands_still() {
    let guest = guest();
    for stop in [Passage::Shut, Passage::Ended] {
        guest.gate.set(Passage::Open);
        thread::scope(|scope| {
            let polling = scope.spawn(|| guest.call(call::POLL, &[u64::MAX, 1, 1]));
            guest.gate.set(stop);
            polling.join().unwrap();
        });
        assert_eq!((guest.word(8), guest.word(16) as u32), (0, 0));
    }
    guest.call(call::PUTS, &[DATA, 100]);
    assert_eq!(guest.console.written(), 0, "nobody needs that any more");
}

#[test]
fn disks_are_read_and_written_by_their_handles() {
    let guest = guest();
    assert_eq!(guest.calls.capacities().collect::<Vec<_>>(), [(1, 512_000), (2, 1024)]);
    assert_eq!(guest.block(call::BLOCK_READ, 1, 512 * 3, DATA, 1024), 0);
    assert_eq!(guest.data(1024), [[3; 512], [4; 512]].concat());
    assert_eq!(guest.block(call::BLOCK_READ, 2, 512, DATA, 512), 0);
    assert_eq!(guest.data(513), [&[7; 512][..], &[4]].concat());

    guest.ram.memory().write_slice(&[0xee; 512], GuestAddress(DATA)).unwrap();
    assert_eq!(guest.block(call::BLOCK_WRITE, 1, 512_000 - 512, DATA, 512), 0);
    guest.ram.memory().write_slice(&[0; 512], GuestAddress(DATA)).unwrap();
    assert_eq!(guest.block(call::BLOCK_READ, 1, 512_000 - 512, DATA, 512), 0);
    assert_eq!(guest.data(512), [0xee; 512]);
    assert!(guest.events().is_empty());
    let counters = guest.calls.counters();
    let count = |name| counters.iter().find(|(n, _)| *n == name).map(|(_, count)| *count);
    assert_eq!(
        (count("block_read"), count("block_write"), count("puts")),
        (Some(3), Some(1), Some(0))
    );
}

#[test]
fn what_is_not_on_a_disk_is_an_error_and_changes_nothing() {
    let guest = guest();
    let (read, write) = (call::BLOCK_READ, call::BLOCK_WRITE);
    for (number, handle, offset, len) in [
        (read, 0, 0, 512),
        (read, 3, 0, 512),
        (read, (1 << 32) + 1, 0, 512),
        (read, 1, 512_000, 512),
        (read, 1, 512_000 - 512, 1024),
        (read, 1, u64::MAX - 511, 512),
        (read, 1, u64::MAX - 511, 1024),
        (read, 1, 1, 512),
        (read, 1, 0, 511),
        (write, 1, 512_000, 512),
        (write, 2, 0, 512),
    ] {
        let answer = guest.block(number, handle, offset, DATA, len);
        assert_eq!(answer, Answer::Invalid as u32, "{number} {handle} {offset} {len}");
    }
    assert_eq!(guest.data(512), [0; 512]);
    assert!(guest.events().is_empty());
}

#[test]
fn frames_go_both_ways() {
    let guest = guest();
    assert_eq!(guest.calls.networks().collect::<Vec<_>>(), [(NET, [2, 0, 0, 0, 0, 1], MTU)]);
    let longest = u64::from(MTU) + 18;
    for len in [14, 60, longest] {
        let frame: Vec<u8> = (0..len).map(|i| i as u8 ^ 0x55).collect();
        guest.ram.memory().write_slice(&frame, GuestAddress(DATA)).unwrap();
        assert_eq!(guest.net(call::NET_WRITE, NET, DATA, len), (0, len));
        let mut seen = vec![0; 4096];
        let received = guest.network.recv(&mut seen).unwrap();
        assert_eq!(seen[..received], [&[0; HEADER], &frame[..]].concat());
        guest.ram.memory().write_slice(&[0; 4096], GuestAddress(DATA)).unwrap();
        guest.arrives(&frame);
        assert_eq!(guest.net(call::NET_READ, NET, DATA, 2048), (0, len));
        assert_eq!(guest.data(len as usize + 1), [&frame[..], &[0]].concat());
    }
    assert_eq!(guest.net(call::NET_READ, NET, DATA, 2048), (Answer::Again as u32, 2048));
    assert!(guest.events().is_empty());
    let counters = guest.calls.counters();
    let frames: Vec<_> = counters.iter().rev().take(3).map(|(_, count)| *count).collect();
    assert_eq!(frames, [0, 3, 3], "dropped, received, sent");
}

#[test]
fn frames_that_cannot_be_are_an_error_or_lost() {
    let guest = guest();
    let longest = u64::from(MTU) + 18;
    for (handle, len) in [(NET, 0), (NET, 13), (NET, longest + 1), (1, 60), (0, 60), (NET + 64, 60)]
    {
        let invalid = Answer::Invalid as u32;
        assert_eq!(guest.net(call::NET_WRITE, handle, DATA, len).0, invalid, "{handle} {len}");
    }
    guest.network.set_nonblocking(true).unwrap();
    assert!(guest.network.recv(&mut [0; 64]).is_err(), "nothing was sent");
    let again = Answer::Again as u32;
    // Longer than the guest's buffer, longer than a frame can be, and no frame at all.
    guest.arrives(&[7; 101]);
    assert_eq!(guest.net(call::NET_READ, NET, DATA, 100).0, again);
    guest.arrives(&vec![7; longest as usize + 1]);
    assert_eq!(guest.net(call::NET_READ, NET, DATA, 4096).0, again);
    guest.network.send(&[7; HEADER]).unwrap();
    assert_eq!(guest.net(call::NET_READ, NET, DATA, 4096).0, again);
    assert_eq!(guest.data(4096), [0; 4096]);
    for handle in [1, NET + 64] {
        assert_eq!(guest.net(call::NET_READ, handle, DATA, 4096).0, Answer::Invalid as u32);
    }
    // A network that takes no more: frames are lost, and the guest does not wait.
    let lost = |guest: &Guest| guest.calls.counters().last().map(|(_, count)| *count);
    assert_eq!(lost(&guest), Some(3));
    while lost(&guest) == Some(3) {
        assert_eq!(guest.net(call::NET_WRITE, NET, DATA, 1000).0, 0);
    }
    assert!(guest.events().is_empty());
}

#[test]
fn polling_ends_when_a_frame_is_there() {
    let guest = guest();
    let poll = |timeout: u64| {
        guest.call(call::POLL, &[timeout, u64::MAX, u64::MAX]);
        (guest.word(8), guest.word(16) as u32)
    };
    assert_eq!(poll(0), (0, 0));
    thread::scope(|scope| {
        let polling = scope.spawn(|| poll(u64::MAX));
        guest.arrives(&[1; 60]);
        assert_eq!(polling.join().unwrap(), (1 << NET, 1));
    });
    assert_eq!(poll(u64::MAX), (1 << NET, 1), "it is still there");
    assert_eq!(guest.net(call::NET_READ, NET, DATA, 100), (0, 60));
    assert_eq!(poll(1_000_000), (0, 0));
}

#[test]
fn a_halt_has_a_status_and_perhaps_a_cookie() {
    let guest = guest();
    guest.call(call::HALT, &[0, 0xffff_fffe]);
    guest.call(call::HALT, &[DATA, 255]);
    let want = [(-2, 0), (255, DATA)].map(|(status, cookie)| VmEvent::Halt { status, cookie });
    assert_eq!(guest.events(), want);
}

#[test]
fn calls_that_no_guest_can_make_end_it() {
    let guest = guest();
    let ended = |number: u16, gpa: u32| {
        guest.calls.write(number.into(), &gpa.to_le_bytes());
        let events = guest.events();
        let [VmEvent::BadHypercall { number: told, address, .. }] = events[..] else {
            panic!("{number}: {events:?}");
        };
        assert_eq!((told, address), (number, u64::from(gpa)));
    };
    for number in [0, 9, 15] {
        ended(number, ARGS as u32);
    }
    for number in call::WALLTIME..=call::HALT {
        for gpa in [0, 0xf_fff8, RAM as u32 - 7, RAM as u32, u32::MAX] {
            ended(number, gpa);
        }
    }
    // Good arguments that name bad memory.
    for (at, len) in
        [(0, 1), (0xf_ffff, 2), (RAM - 1, 2), (RAM, 1), (u64::MAX, 1), (DATA, u64::MAX)]
    {
        for (number, words) in [
            (call::PUTS, vec![at, len]),
            (call::BLOCK_READ, vec![1, 0, at, len]),
            (call::BLOCK_WRITE, vec![1, 0, at, len]),
            (call::NET_READ, vec![NET, at, len]),
            (call::NET_WRITE, vec![NET, at, len]),
        ] {
            guest.call(number, &words);
            let events = guest.events();
            assert!(
                matches!(events[..], [VmEvent::BadHypercall { .. }]),
                "{number} {at:#x} {len:#x}"
            );
        }
    }
    guest.call(call::HALT, &[RAM - COOKIE_SIZE + 1, 0]);
    assert!(matches!(guest.events()[..], [VmEvent::BadHypercall { .. }]));
    for wrong in [&[][..], &[0], &[0; 2], &[0; 8]] {
        guest.calls.write(call::PUTS.into(), wrong);
        assert!(matches!(guest.events()[..], [VmEvent::BadHypercall { .. }]), "{wrong:?}");
    }
    let mut bytes = [0; 4];
    guest.calls.read(2, &mut bytes);
    assert_eq!(bytes, [0xff; 4]);
}

#[test]
fn arbitrary_arguments_do_no_harm() {
    let guest = guest();
    let mut rng = Rng::new(1);
    for _ in 0..20_000 {
        let words: Vec<u64> = (0..5)
            .map(|_| match rng.below(6) {
                0 => rng.next(),
                1 => rng.below(4),
                2 => u64::MAX - rng.below(1024),
                3 => rng.below(1100) * 512,
                _ => RAM.wrapping_sub(2048).wrapping_add(rng.below(4096)),
            })
            .collect();
        // Polling would be for ever.
        let number = match rng.below(10) as u16 {
            call::POLL => 9,
            other => other,
        };
        guest.call(number, &words);
    }
}
