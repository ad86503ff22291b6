use super::*;
use crate::testing::{self, DriverQueue, Guest, Segment, hostile, wait_until};
use std::fs::File;
use std::io::{Read, Seek, Write};

struct Bench {
    console: Arc<Console>,
    guest: Guest,
    queues: Vec<DriverQueue>,
    _events: EventLoop,
}

fn set_up(output: Option<OwnedFd>, input: Option<OwnedFd>) -> Bench {
    let events = EventLoop::start("console-test").unwrap();
    let config = ConsoleConfig { name: "console".into(), output, input, tail: 16 };
    let console = Console::new(config, &events).unwrap();
    let mut guest = Guest::new(2 << 20, console.clone());
    let queues = guest.start();
    Bench { console, guest, queues, _events: events }
}

#[test]
fn bytes_go_both_ways_over_pipes() {
    let (mut out_reader, out) = io::pipe().unwrap();
    let (input, mut typist) = io::pipe().unwrap();
    let mut b = set_up(Some(out.into()), Some(input.into()));
    let text = b.guest.place(b"printed by the guest");
    let parts = [Segment::readable(text, 11), Segment::readable(text + 11, 9)];
    b.guest.transact(&mut b.queues[1], &parts);
    let mut got = [0; 20];
    out_reader.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"printed by the guest");
    assert_eq!(b.console.tail(), b"ted by the guest");
    // Typed before and after there is a buffer.
    typist.write_all(b"abc").unwrap();
    let at = b.guest.alloc(16);
    assert_eq!(b.guest.transact(&mut b.queues[0], &[Segment::writable(at, 16)]), 3);
    assert_eq!(b.guest.bytes(at, 3), b"abc");
    b.queues[0].offer(&[Segment::writable(at, 16)]);
    b.guest.notify(0);
    typist.write_all(b"defg").unwrap();
    assert_eq!(b.guest.wait_used(&mut b.queues[0]).map(|u| u.1), Some(4));
    assert_eq!(b.console.stats(), ConsoleStats { output: 20, dropped: 0, input: 7 });
}

#[test]
fn a_full_pipe_holds_the_guest_back_and_loses_nothing() {
    let (mut reader, out) = io::pipe().unwrap();
    let mut b = set_up(Some(out.into()), None);
    let data = testing::Rng::new(8).bytes(200_000);
    let at = b.guest.place(&data);
    let head = b.queues[1].offer(&[Segment::readable(at, 200_000)]);
    b.guest.notify(1);
    assert!(wait_until(|| b.console.stats().output >= 60_000));
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(b.queues[1].poll_used().is_none(), "the pipe is full");
    let mut got = vec![0; data.len()];
    reader.read_exact(&mut got).unwrap();
    assert!(got == data);
    assert_eq!(b.guest.wait_used(&mut b.queues[1]), Some((head, 0)));
}

#[test]
fn output_goes_on_when_the_reader_is_gone() {
    let (reader, out) = io::pipe().unwrap();
    let mut b = set_up(Some(out.into()), None);
    drop(reader);
    let text = b.guest.place(b"nobody reads this");
    for _ in 0..3 {
        b.guest.transact(&mut b.queues[1], &[Segment::readable(text, 17)]);
    }
    assert_eq!(b.console.stats().dropped, 51);
    assert_eq!(b.console.tail(), b"obody reads this");
}

#[test]
fn plain_files_serve_as_both_ends() {
    let mut out = tempfile::tempfile().unwrap();
    let mut input = tempfile::tempfile().unwrap();
    input.write_all(b"from a file").unwrap();
    input.rewind().unwrap();
    let fds: (OwnedFd, OwnedFd) = (out.try_clone().unwrap().into(), File::into(input));
    let mut b = set_up(Some(fds.0), Some(fds.1));
    let at = b.guest.alloc(64);
    assert_eq!(b.guest.transact(&mut b.queues[0], &[Segment::writable(at, 64)]), 11);
    b.guest.transact(&mut b.queues[1], &[Segment::readable(at, 11)]);
    let mut got = String::new();
    out.rewind().unwrap();
    out.read_to_string(&mut got).unwrap();
    assert_eq!(got, "from a file");
}

#[test]
fn a_hostile_driver_gets_nowhere() {
    let (input, typist) = io::pipe().unwrap();
    let mut typist = typist;
    let mut b = set_up(None, Some(input.into()));
    let mut rng = testing::Rng::new(9);
    let header = |draw: &mut dyn FnMut() -> Option<u64>| Some(draw()?.to_le_bytes().to_vec());
    for round in 0..5000 {
        let queue = &mut b.queues[rng.below(2) as usize];
        hostile::mischief(&b.guest, queue, header, &mut rng).unwrap();
        if round % 100 == 0 {
            typist.write_all(b"x").unwrap();
        }
        if round % 8 == 0 || b.guest.mmio.link().needs_reset() {
            b.queues = hostile::recovers(&mut b.guest);
        }
    }
    b.queues = hostile::recovers(&mut b.guest);
    b.guest.transact(&mut b.queues[1], &[Segment::readable(0x1_0000, 4)]);
}
