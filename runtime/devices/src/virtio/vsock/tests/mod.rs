mod bulk;
mod guest;
mod rules;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use super::packet::{op, shutdown};
use super::*;
use crate::testing::{Rng, hostile, wait_until};
use guest::{CID, End, VsockGuest};

const SOON: Duration = Duration::from_secs(10);

struct Bench {
    device: Arc<Vsock>,
    guest: VsockGuest,
    _events: EventLoop,
}

fn bench() -> Bench {
    bench_with(None)
}

fn bench_with(listener: Option<UnixListener>) -> Bench {
    let events = EventLoop::start("vsock-test").unwrap();
    let config = VsockConfig { name: "vsock".into(), guest_cid: CID, listener };
    let device = Vsock::new(config, &events).unwrap();
    let guest = VsockGuest::new(device.clone());
    Bench { device, guest, _events: events }
}

impl Bench {
    /// A connection that the host makes to guest port 1000.
    fn connect(&mut self) -> (UnixStream, End) {
        let device = self.device.clone();
        let caller = std::thread::spawn(move || device.connect(1000, SOON));
        let (header, _) = self.guest.receive();
        assert_eq!((header.op, header.dst_port), (op::REQUEST, 1000));
        assert!(header.buf_alloc > 0);
        let mut end = End::new(header.src_port, 1000);
        end.note(&header);
        end.send(&mut self.guest, op::RESPONSE, &[]);
        (caller.join().unwrap().unwrap(), end)
    }

    /// A connection that the guest makes to host port 5000 from `guest_port`.
    fn accept(&mut self, streams: &Receiver<UnixStream>, guest_port: u32) -> (UnixStream, End) {
        let mut end = End::new(5000, guest_port);
        end.send(&mut self.guest, op::REQUEST, &[]);
        end.expect(&mut self.guest, op::RESPONSE);
        (streams.recv_timeout(SOON).unwrap(), end)
    }

    fn listen(&self) -> Receiver<UnixStream> {
        let (sender, streams) = channel();
        let sender = Mutex::new(sender);
        let acceptor = move |stream| drop(sender.lock().unwrap().send(stream));
        self.device.listen(5000, Arc::new(acceptor)).unwrap();
        streams
    }

    fn empty(&self) -> bool {
        wait_until(|| self.device.stats().connections == 0)
    }
}

#[test]
fn the_host_connects_talks_and_closes() {
    let mut b = bench();
    let (mut stream, mut end) = b.connect();
    stream.write_all(b"hello").unwrap();
    assert_eq!(end.expect(&mut b.guest, op::RW).1, b"hello");
    end.send(&mut b.guest, op::RW, b"hi there");
    let mut got = [0; 8];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hi there");
    stream.write_all(b"last words").unwrap();
    drop(stream);
    assert_eq!(end.expect(&mut b.guest, op::RW).1, b"last words");
    let mut flags = 0;
    while flags != shutdown::BOTH {
        flags = end.expect(&mut b.guest, op::SHUTDOWN).0.flags;
    }
    end.send(&mut b.guest, op::RST, &[]);
    assert!(b.empty());
}

#[test]
fn the_guest_connects_to_listeners_only() {
    let mut b = bench();
    let mut end = End::new(5000, 77);
    end.send(&mut b.guest, op::REQUEST, &[]);
    end.expect(&mut b.guest, op::RST);
    let streams = b.listen();
    let taken = b.device.listen(5000, Arc::new(|_| ()));
    assert!(matches!(taken, Err(VsockError::PortTaken(5000))));
    let (mut stream, mut end) = b.accept(&streams, 77);
    end.send(&mut b.guest, op::RW, b"from the guest");
    let mut got = [0; 14];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"from the guest");
    assert!(b.device.unlisten(5000) && !b.device.unlisten(5000));
    let mut other = End::new(5000, 78);
    other.send(&mut b.guest, op::REQUEST, &[]);
    other.expect(&mut b.guest, op::RST);
    stream.write_all(b"still there").unwrap();
    assert_eq!(end.expect(&mut b.guest, op::RW).1, b"still there");
}

#[test]
fn ports_at_which_nobody_waits_are_dialled() {
    let mut b = bench();
    let (sender, streams) = channel();
    b.device.dial_by(Arc::new(move |port| {
        let (ours, theirs) = UnixStream::pair()?;
        let wanted = port == 6000;
        sender.send((port, wanted.then_some(theirs))).unwrap();
        if wanted { Ok(ours) } else { Err(io::ErrorKind::ConnectionRefused.into()) }
    }));
    // Those who wait come first.
    let waiting = b.listen();
    let _waited = b.accept(&waiting, 77);
    assert!(streams.try_recv().is_err());
    let mut refused = End::new(u32::MAX, 78);
    refused.send(&mut b.guest, op::REQUEST, &[]);
    refused.expect(&mut b.guest, op::RST);
    assert_eq!(streams.recv_timeout(SOON).unwrap().0, u32::MAX);
    let mut end = End::new(6000, 79);
    end.send(&mut b.guest, op::REQUEST, &[]);
    end.expect(&mut b.guest, op::RESPONSE);
    let mut stream = streams.recv_timeout(SOON).unwrap().1.unwrap();
    end.send(&mut b.guest, op::RW, b"hello");
    let mut got = [0; 5];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello");
    drop(stream);
    let mut flags = 0;
    while flags != shutdown::BOTH {
        flags = end.expect(&mut b.guest, op::SHUTDOWN).0.flags;
    }
}

#[test]
fn one_connection_goes_on_in_a_stream_that_was_there() {
    let mut b = bench();
    let (mut stream, theirs) = UnixStream::pair().unwrap();
    let (joined, told) = channel();
    b.device.join(5000, theirs, Arc::new(move || joined.send(()).unwrap())).unwrap();
    stream.write_all(b"early").unwrap();
    let mut end = End::new(5000, 77);
    end.send(&mut b.guest, op::REQUEST, &[]);
    end.expect(&mut b.guest, op::RESPONSE);
    assert_eq!(end.expect(&mut b.guest, op::RW).1, b"early");
    told.recv_timeout(Duration::from_secs(5)).unwrap();
    let mut other = End::new(5000, 78);
    other.send(&mut b.guest, op::REQUEST, &[]);
    other.expect(&mut b.guest, op::RST);
    end.send(&mut b.guest, op::RW, b"hello");
    let mut got = [0; 5];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello");
}

#[test]
fn a_host_process_connects_by_the_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    let mut b = bench_with(Some(UnixListener::bind(&path).unwrap()));
    let mut stream = UnixStream::connect(&path).unwrap();
    // In two pieces, with bytes for the guest right behind.
    stream.write_all(b"CONNE").unwrap();
    std::thread::sleep(Duration::from_millis(5));
    stream.write_all(b"CT 1000\nearly").unwrap();
    let (header, _) = b.guest.receive();
    assert_eq!((header.op, header.dst_port), (op::REQUEST, 1000));
    let mut end = End::new(header.src_port, 1000);
    end.send(&mut b.guest, op::RESPONSE, &[]);
    assert_eq!(end.expect(&mut b.guest, op::RW).1, b"early");
    end.send(&mut b.guest, op::RW, b"answer");
    let want = format!("OK {}\nanswer", header.src_port);
    let mut got = vec![0; want.len()];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(got, want.as_bytes());

    for nonsense in ["HELLO\n", "CONNECT x\n", "CONNECT 4294967296\n", &"x".repeat(100)] {
        let mut stream = UnixStream::connect(&path).unwrap();
        let _ = stream.write_all(nonsense.as_bytes());
        stream.set_read_timeout(Some(SOON)).unwrap();
        assert!(matches!(stream.read(&mut [0; 8]), Ok(0) | Err(_)), "{nonsense:?} is dropped");
    }
    // Refused by the guest: the socket is closed.
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(b"CONNECT 9\n").unwrap();
    let (header, _) = b.guest.receive();
    End::new(header.src_port, 9).send(&mut b.guest, op::RST, &[]);
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
    // Those who dawdle do not keep others out.
    let _idle: Vec<_> = (0..100).map(|_| UnixStream::connect(&path).unwrap()).collect();
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(b"CONNECT 8\n").unwrap();
    assert_eq!(b.guest.receive().0.dst_port, 8);
}

#[test]
fn callers_hear_of_refusal_silence_and_absence() {
    let mut b = bench();
    let device = b.device.clone();
    let caller = std::thread::spawn(move || device.connect(7, SOON));
    let (header, _) = b.guest.receive();
    End::new(header.src_port, 7).send(&mut b.guest, op::RST, &[]);
    assert!(matches!(caller.join().unwrap(), Err(VsockError::Refused(7))));
    let silent = b.device.connect(8, Duration::from_millis(30));
    assert!(matches!(silent, Err(VsockError::Timeout(8))));
    assert_eq!(b.guest.receive().0.op, op::REQUEST);
    assert_eq!(b.guest.receive().0.op, op::RST, "the guest is told that nobody waits any more");
    assert!(b.empty());
    b.guest.guest.reset();
    assert!(matches!(b.device.connect(9, SOON), Err(VsockError::NotReady)));
}

#[test]
fn streams_end_with_the_driver_and_a_new_one_can_start() {
    let mut b = bench();
    let streams = b.listen();
    let (mut one, _) = b.connect();
    let (mut two, _) = b.accept(&streams, 5);
    b.guest.restart();
    assert_eq!(one.read(&mut [0; 1]).unwrap(), 0);
    assert_eq!(two.read(&mut [0; 1]).unwrap(), 0);
    let (mut three, mut end) = b.accept(&streams, 5);
    end.send(&mut b.guest, op::RW, b"x");
    assert_eq!(three.read(&mut [0; 8]).unwrap(), 1);
}

#[test]
fn events_that_come_while_paused_are_not_lost() {
    let mut b = bench();
    let (mut stream, mut end) = b.connect();
    b.device.pause();
    stream.write_all(b"while paused").unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert!(b.guest.try_receive().is_none());
    b.device.resume();
    assert_eq!(end.expect(&mut b.guest, op::RW).1, b"while paused");
}

#[test]
fn a_restored_guest_is_told_that_its_streams_are_gone() {
    let mut b = bench();
    b.device.pause();
    let state = b.guest.guest.mmio.save();
    let events = EventLoop::start("vsock-test2").unwrap();
    let config = VsockConfig { name: "vsock".into(), guest_cid: CID, listener: None };
    let device = Vsock::new(config, &events).unwrap();
    let line = b.guest.guest.line.clone();
    let ram = b.guest.guest.ram.clone();
    b.guest.guest.mmio = crate::virtio::MmioTransport::new(device.clone(), ram, line);
    b.guest.guest.mmio.restore(&state).unwrap();
    let at = b.guest.guest.place(&[0xff; 4]);
    b.guest.queues[2].offer(&[crate::testing::Segment::writable(at, 4)]);
    b.guest.guest.notify(2);
    assert!(b.guest.guest.wait_used(&mut b.guest.queues[2]).is_some());
    assert_eq!(b.guest.guest.bytes(at, 4), [0; 4]);
    (b.device, b._events) = (device, events);
    b.connect();
}

#[test]
fn a_hostile_driver_gets_nowhere() {
    let mut b = bench();
    let streams = b.listen();
    let mut rng = Rng::new(11);
    let header = |draw: &mut dyn FnMut() -> Option<u64>| {
        let choice = draw()?;
        let mut end = End::new(5000, (choice & 7) as u32);
        end.buf_alloc = draw()? as u32;
        end.consumed = draw()? as u32;
        let len = if choice & 0x100 == 0 { (choice >> 16 & 0xff) as u32 } else { draw()? as u32 };
        let mut header = end.header((choice >> 4 & 15) as u16 % 9, len);
        header.flags = (choice >> 40) as u32 & 3;
        Some(header.to_bytes().to_vec())
    };
    for round in 0.. {
        // The device's thread may be behind: a reset takes mischief away before it is noticed.
        if round >= 5000 && b.guest.guest.mmio.link().failures() > 100 {
            break;
        }
        assert!(round < 1_000_000, "mischief is not noticed");
        let queue = rng.below(3) as usize;
        let VsockGuest { guest, queues, .. } = &mut b.guest;
        hostile::mischief(guest, &mut queues[queue], header, &mut rng).unwrap();
        while streams.try_recv().is_ok() {}
        if round % 8 == 0 || guest.mmio.link().needs_reset() {
            std::thread::yield_now();
            b.guest.restart();
        }
    }
    b.guest.restart();
    let (mut stream, mut end) = b.connect();
    end.send(&mut b.guest, op::RW, b"alive");
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 5);
}

#[test]
fn reserved_addresses_are_refused() {
    let events = EventLoop::start("vsock-test").unwrap();
    for guest_cid in [0, 2, u64::from(u32::MAX), u64::MAX] {
        let config = VsockConfig { name: "vsock".into(), guest_cid, listener: None };
        assert!(matches!(Vsock::new(config, &events), Err(VsockError::GuestCid(_))));
    }
    let _ = Instant::now();
}
