use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::config::{HEADER, MAX_PACKET};
use super::*;
use crate::testing::{DriverQueue, Guest, PATIENCE, Rng, Segment, hostile, reg, wait_until};
use crate::virtio::GuestSlice;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// What the device asked of its backend.
#[derive(Debug, Default)]
struct Asked {
    offloads: Mutex<Vec<Offloads>>,
    active: Mutex<Vec<bool>>,
}

#[derive(Debug)]
struct Backend(PacketSocket, Arc<Asked>);

impl NetBackend for Backend {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd()
    }
    fn receive(&self, packet: &mut [u8]) -> io::Result<usize> {
        self.0.receive(packet)
    }
    fn send(&self, packet: &[GuestSlice<'_>]) -> io::Result<()> {
        self.0.send(packet)
    }
    fn send_bytes(&self, packet: &[u8]) -> io::Result<()> {
        self.0.send_bytes(packet)
    }
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.1.offloads.lock().unwrap().push(offloads);
        Ok(())
    }
    fn set_active(&self, active: bool) -> io::Result<()> {
        self.1.active.lock().unwrap().push(active);
        Ok(())
    }
}

struct Bench {
    device: Arc<Net>,
    guest: Guest,
    queues: Vec<DriverQueue>,
    networks: Vec<UnixDatagram>,
    asked: Vec<Arc<Asked>>,
}

fn device(pairs: usize) -> (Arc<Net>, Vec<UnixDatagram>, Vec<Arc<Asked>>) {
    let (mut networks, mut asked, mut backends) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..pairs {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        ours.set_write_timeout(Some(PATIENCE)).unwrap();
        let record = Arc::new(Asked::default());
        let backend = Backend(PacketSocket::new(theirs).unwrap(), record.clone());
        backends.push(Box::new(backend) as Box<dyn NetBackend>);
        networks.push(ours);
        asked.push(record);
    }
    let config = NetConfig { name: "vnet-test".into(), mac: MAC, mtu: 1400, backends };
    (Net::new(config).unwrap(), networks, asked)
}

impl Bench {
    fn new(pairs: usize, without: u64) -> Self {
        let (device, networks, asked) = device(pairs);
        let mut guest = Guest::new(8 << 20, device.clone());
        let queues = guest.start_without(without, u16::MAX);
        Self { device, guest, queues, networks, asked }
    }

    /// Offers `count` buffers of `len` bytes to queue `index` and returns where they are, by head.
    fn offer(&mut self, index: usize, count: usize, len: u32) -> Vec<(u16, u64)> {
        let queue = &mut self.queues[index];
        let mut all = Vec::new();
        for _ in 0..count {
            let at = self.guest.alloc(u64::from(len));
            all.push((queue.offer(&[Segment::writable(at, len)]), at));
        }
        if queue.wants_notification() {
            self.guest.notify(index as u32);
        }
        all
    }

    /// Takes one packet from the receive queue `index` as a driver does.
    fn receive(&mut self, index: usize, buffers: &[(u16, u64)]) -> Vec<u8> {
        let place = |head| buffers.iter().find(|(h, _)| *h == head).expect("an offered head").1;
        let (head, len) = self.guest.wait_used(&mut self.queues[index]).expect("a packet");
        let mut packet = self.guest.bytes(place(head), len as usize);
        let count = u16::from_le_bytes([packet[10], packet[11]]);
        for _ in 1..count {
            let (head, len) =
                self.queues[index].poll_used().expect("all buffers of a packet at once");
            packet.extend(self.guest.bytes(place(head), len as usize));
        }
        packet
    }

    /// Sends a packet and waits until the device is done with it.
    fn transmit(&mut self, packet: &[u8]) {
        let at = self.guest.place(packet);
        self.guest.transact(&mut self.queues[1], &[Segment::readable(at, packet.len() as u32)]);
    }

    fn control(&mut self, index: usize, command: &[u8]) -> u8 {
        let at = self.guest.place(command);
        let answer = self.guest.alloc(1);
        let chain = [Segment::readable(at, command.len() as u32), Segment::writable(answer, 1)];
        assert_eq!(self.guest.transact(&mut self.queues[index], &chain), 1);
        self.guest.bytes(answer, 1)[0]
    }
}

/// A header of zeros and `len` bytes that differ from each other.
fn packet(len: usize, seed: u64) -> Vec<u8> {
    [vec![0; HEADER], Rng::new(seed).bytes(len)].concat()
}

fn next_packet(network: &UnixDatagram) -> Vec<u8> {
    let mut bytes = vec![0; MAX_PACKET];
    let len = network.recv(&mut bytes).expect("a packet in time");
    bytes.truncate(len);
    bytes
}

#[test]
fn the_driver_sees_what_was_configured() {
    let bench = Bench::new(3, 0);
    assert_eq!(bench.guest.config(0, 12), [2, 0, 0, 0, 0, 1, 1, 0, 3, 0, 0x78, 5]);
    let interrupts = bench.guest.line.count();
    bench.device.set_link(false);
    assert_eq!(bench.guest.config(6, 2), [0, 0]);
    assert_eq!(bench.guest.line.count(), interrupts + 1);
    bench.device.set_link(false);
    assert_eq!(bench.guest.line.count(), interrupts + 1, "nothing has changed");
    assert_ne!(bench.guest.offered() & feature::MQ, 0);
    assert_eq!(Bench::new(1, 0).guest.offered() & feature::MQ, 0);
}

#[test]
fn impossible_devices_are_refused() {
    let make = |mac, mtu, count: usize| {
        let backend = || {
            let socket = UnixDatagram::unbound().unwrap();
            Box::new(PacketSocket::new(socket).unwrap()) as Box<dyn NetBackend>
        };
        let backends = (0..count).map(|_| backend()).collect();
        Net::new(NetConfig { name: "n".into(), mac, mtu, backends }).unwrap_err()
    };
    assert!(matches!(make(MAC, 1500, 0), NetError::Pairs { pairs: 0, .. }));
    assert!(matches!(make(MAC, 1500, 17), NetError::Pairs { pairs: 17, .. }));
    assert!(matches!(make([1, 0, 0, 0, 0, 0], 1500, 1), NetError::Mac { .. }));
    assert!(matches!(make(MAC, 67, 1), NetError::Mtu { mtu: 67, .. }));
    let null = std::fs::File::open("/dev/null").unwrap();
    assert!(Tap::new(null.into()).is_err());
}

#[test]
fn features_without_what_they_need_are_not_accepted() {
    let status = |without: u64| {
        let (device, ..) = device(1);
        let guest = Guest::new(1 << 20, device);
        guest.write(reg::STATUS, 1);
        guest.write(reg::STATUS, 3);
        guest.accept(guest.offered() & !without);
        guest.write(reg::STATUS, 0xb);
        guest.read(reg::STATUS)
    };
    let (host_tso, guest_tso) =
        (feature::HOST_TSO4 | feature::HOST_TSO6, feature::GUEST_TSO4 | feature::GUEST_TSO6);
    assert_eq!(status(0), 0xb);
    assert_eq!(status(feature::CSUM), 3, "segments cannot be split without checksums");
    assert_eq!(status(feature::CSUM | host_tso), 3, "there is ECN without segments");
    assert_eq!(status(feature::CSUM | host_tso | feature::HOST_ECN), 0xb);
    assert_eq!(status(guest_tso), 3);
    assert_eq!(status(feature::CTRL_VQ), 3);
    assert_eq!(status(feature::CTRL_VQ | feature::CTRL_GUEST_OFFLOADS), 0xb);
}

#[test]
fn packets_of_the_guest_arrive_as_they_are() {
    let mut bench = Bench::new(1, 0);
    let sent = packet(3000, 1);
    let at = bench.guest.place(&sent);
    let parts = [(0, 12), (12, 14), (26, 1000), (1026, 1986)];
    let chain = parts.map(|(offset, len)| Segment::readable(at + offset, len));
    assert_eq!(bench.guest.transact(&mut bench.queues[1], &chain), 0);
    assert_eq!(next_packet(&bench.networks[0]), sent);
    bench.transmit(&packet(MAX_PACKET - HEADER, 2));
    assert_eq!(next_packet(&bench.networks[0]).len(), MAX_PACKET);
    // What is too long is lost and hurts nobody.
    bench.transmit(&packet(MAX_PACKET - HEADER + 1, 3));
    bench.transmit(&packet(60, 4));
    assert_eq!(next_packet(&bench.networks[0]), packet(60, 4));
    let stats = bench.device.stats();
    let bytes = 3000 + (MAX_PACKET - HEADER) as u64 + 60;
    assert_eq!((stats.tx_packets, stats.tx_bytes, stats.tx_dropped), (3, bytes, 1));
}

#[test]
fn packets_wait_while_the_network_takes_none() {
    let mut bench = Bench::new(1, 0);
    // More than a socket's buffer takes, in chains of one buffer that all share.
    let at = bench.guest.place(&packet(60_000, 1));
    let count = 200;
    for n in 0..count {
        bench.guest.memory().write_obj(n as u8, GuestAddress(at + 12)).unwrap();
        bench.queues[1].offer(&[Segment::readable(at, 60_012)]);
    }
    bench.guest.notify(1);
    for _ in 0..count {
        assert_eq!(next_packet(&bench.networks[0]).len(), 60_012);
    }
    for _ in 0..count {
        bench.guest.wait_used(&mut bench.queues[1]).expect("every packet is returned");
    }
    assert_eq!(bench.device.stats().tx_packets, count);
}

#[test]
fn a_packet_is_spread_over_buffers_that_appear_at_once() {
    let mut bench = Bench::new(1, 0);
    let buffers = bench.offer(0, 100, 1526);
    let tracker = bench.guest.ram.regions()[0].tracker.clone();
    let page = (buffers[1].1 >> 12) as usize;
    let generation = tracker.code_page(page).unwrap().watch(0, 4096);
    for (len, seed) in [(1, 1), (1514, 2), (1515, 3), (65_000, 4), (60, 5)] {
        let sent = packet(len, seed);
        bench.networks[0].send(&sent).unwrap();
        let got = bench.receive(0, &buffers);
        assert_eq!(got[HEADER..], sent[HEADER..], "{len}");
        let spread = (len + HEADER).div_ceil(1526) as u16;
        assert_eq!(got[10..12], spread.to_le_bytes(), "{len}");
    }
    assert_ne!(tracker.code_page(page).unwrap().watch(0, 4096), generation, "writes are noticed");
    let stats = bench.device.stats();
    assert_eq!((stats.rx_packets, stats.rx_bytes, stats.rx_dropped), (5, 68_090, 0));
}

#[test]
fn a_driver_without_mergeable_buffers_gets_packets_that_fit() {
    let mut bench = Bench::new(1, feature::MRG_RXBUF);
    let small = bench.offer(0, 1, 1526);
    bench.networks[0].send(&packet(2000, 1)).unwrap();
    bench.networks[0].send(&packet(1000, 2)).unwrap();
    let got = bench.receive(0, &small);
    assert_eq!(got[HEADER..], packet(1000, 2)[HEADER..], "the first one did not fit");
    assert_eq!(got[10..12], [1, 0]);
    assert_eq!(bench.device.stats().rx_dropped, 1);
}

#[test]
fn packets_wait_for_buffers_in_order() {
    for without in [0, crate::virtio::feature::EVENT_IDX] {
        let mut bench = Bench::new(1, without);
        for seed in 0..4 {
            bench.networks[0].send(&packet(3000, seed)).unwrap();
        }
        for seed in 0..4 {
            // The first buffer is not enough: nothing may appear.
            let mut buffers = bench.offer(0, 1, 2000);
            assert!(bench.queues[0].poll_used().is_none());
            buffers.extend(bench.offer(0, 1, 2000));
            assert_eq!(bench.receive(0, &buffers)[HEADER..], packet(3000, seed)[HEADER..]);
        }
    }
}

#[test]
fn a_packet_for_which_there_can_never_be_room_is_dropped() {
    let (device, networks, _) = device(1);
    let mut guest = Guest::new(1 << 20, device.clone());
    let queues = guest.start_without(0, 4);
    let mut bench = Bench { device, guest, queues, networks, asked: Vec::new() };
    let buffers = bench.offer(0, 4, 100);
    bench.networks[0].send(&packet(500, 1)).unwrap();
    bench.networks[0].send(&packet(300, 2)).unwrap();
    assert_eq!(bench.receive(0, &buffers)[HEADER..], packet(300, 2)[HEADER..]);
    assert_eq!(bench.device.stats().rx_dropped, 1);
}

#[test]
fn offloads_follow_the_features_and_the_control_queue() {
    let mut bench = Bench::new(1, feature::GUEST_TSO6);
    let last = |bench: &Bench| *bench.asked[0].offloads.lock().unwrap().last().unwrap();
    let all = Offloads { checksum: true, tso4: true, tso6: false, ecn: true };
    assert_eq!(last(&bench), all);
    let set = |bits: u64| [&[5, 0], &bits.to_le_bytes()[..]].concat();
    assert_eq!(bench.control(2, &set(feature::GUEST_CSUM)), 0);
    assert_eq!(last(&bench), Offloads { checksum: true, ..Offloads::default() });
    assert_eq!(bench.control(2, &set(feature::GUEST_TSO6)), 1, "it was not negotiated");
    assert_eq!(bench.control(2, &[0, 0, 1]), 1, "there are no receive modes");
    assert_eq!(bench.control(2, &[4, 0, 1, 0]), 1, "there is one pair");
    let state = bench.device.save();
    assert_eq!(state, DeviceState::Network { pairs: 1, offloads: feature::GUEST_CSUM });
    assert!(bench.asked[0].active.lock().unwrap().is_empty(), "one pair cannot be switched");
}

#[test]
fn further_pairs_work_once_the_driver_wants_them() {
    let mut bench = Bench::new(2, 0);
    assert_eq!(*bench.asked[1].active.lock().unwrap(), [false]);
    let buffers = bench.offer(2, 4, 2000);
    bench.networks[1].send(&packet(100, 1)).unwrap();
    let at = bench.guest.place(&packet(70, 9));
    bench.guest.transact(&mut bench.queues[3], &[Segment::readable(at, 82)]);
    assert_eq!(next_packet(&bench.networks[1]), packet(70, 9));
    // By now its thread has looked at both directions.
    assert!(bench.queues[2].poll_used().is_none(), "the pair is not in use yet");
    assert_eq!(bench.control(4, &[4, 0, 3, 0]), 1, "there are two");
    assert_eq!(bench.control(4, &[4, 0, 0, 0]), 1, "one is the least");
    assert_eq!(bench.control(4, &[4, 0, 2, 0]), 0);
    assert_eq!(*bench.asked[1].active.lock().unwrap(), [false, true]);
    assert_eq!(bench.receive(2, &buffers)[HEADER..], packet(100, 1)[HEADER..]);
    assert!(matches!(bench.device.save(), DeviceState::Network { pairs: 2, .. }));
}

#[test]
fn without_multiqueue_the_control_queue_is_the_third() {
    let mut bench = Bench::new(3, feature::MQ);
    assert_eq!(bench.control(2, &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 0);
    assert_eq!(bench.control(2, &[4, 0, 2, 0]), 1);
    let buffers = bench.offer(0, 4, 2000);
    bench.networks[0].send(&packet(100, 1)).unwrap();
    assert_eq!(bench.receive(0, &buffers)[HEADER..], packet(100, 1)[HEADER..]);
    let states = bench.device.queue_states();
    let present: Vec<_> = states.iter().map(Option::is_some).collect();
    assert_eq!(present, [true, true, true, false, false, false, false]);
}

#[test]
fn pairs_without_a_driver_get_no_packets() {
    let control = feature::CTRL_VQ | feature::CTRL_GUEST_OFFLOADS;
    let mut bench = Bench::new(3, feature::MQ | control);
    let active = |bench: &Bench, pair: usize| bench.asked[pair].active.lock().unwrap().clone();
    assert_eq!([0, 1, 2].map(|pair| active(&bench, pair)), [vec![true], vec![false], vec![false]]);
    let buffers = bench.offer(0, 4, 2048);
    bench.networks[0].send(&packet(60, 1)).unwrap();
    bench.receive(0, &buffers);
}

#[test]
fn broken_rules_stop_the_device() {
    let wrong: [(usize, &[Segment]); 4] = [
        (1, &[Segment::readable(0x9_0000, 11)]),
        (1, &[Segment::readable(0x9_0000, 20), Segment::writable(0x9_1000, 20)]),
        (0, &[Segment::writable(0x9_0000, 11)]),
        (2, &[Segment::readable(0x9_0000, 4)]),
    ];
    for (index, chain) in wrong {
        let mut bench = Bench::new(1, 0);
        bench.networks[0].send(&packet(50, 1)).unwrap();
        bench.queues[index].offer(chain);
        bench.guest.notify(index as u32);
        assert!(bench.guest.wait_needs_reset(), "queue {index}");
        bench.queues = hostile::recovers(&mut bench.guest);
        bench.transmit(&packet(99, 7));
        assert_eq!(next_packet(&bench.networks[0]), packet(99, 7));
    }
}

#[test]
fn nothing_moves_while_paused_and_nothing_is_lost() {
    let mut bench = Bench::new(1, 0);
    let buffers = bench.offer(0, 8, 2000);
    bench.transmit(&packet(61, 1));
    bench.device.pause();
    next_packet(&bench.networks[0]);
    bench.networks[0].send(&packet(62, 2)).unwrap();
    let at = bench.guest.place(&packet(63, 3));
    bench.queues[1].offer(&[Segment::readable(at, 75)]);
    bench.guest.notify(1);
    bench.networks[0].set_read_timeout(Some(Duration::from_millis(30))).unwrap();
    assert!(bench.networks[0].recv(&mut [0; 100]).is_err());
    assert!(bench.queues[0].poll_used().is_none() && bench.queues[1].poll_used().is_none());
    bench.networks[0].set_read_timeout(Some(PATIENCE)).unwrap();
    bench.device.resume();
    assert_eq!(next_packet(&bench.networks[0]), packet(63, 3));
    assert_eq!(bench.receive(0, &buffers)[HEADER..], packet(62, 2)[HEADER..]);
}

#[test]
fn a_saved_device_goes_on_elsewhere() {
    let mut bench = Bench::new(2, 0);
    let buffers = bench.offer(2, 8, 2000);
    assert_eq!(bench.control(4, &[4, 0, 2, 0]), 0);
    let offloads = [&[5, 0], &feature::GUEST_CSUM.to_le_bytes()[..]].concat();
    assert_eq!(bench.control(4, &offloads), 0);
    bench.device.pause();
    let state = bench.guest.mmio.save();
    // The same RAM, another device.
    let (fresh, networks, asked) = device(2);
    let mmio = crate::virtio::MmioTransport::new(
        fresh.clone(),
        bench.guest.ram.clone(),
        bench.guest.line.clone(),
    );
    mmio.restore(&state).unwrap();
    bench.guest.mmio = mmio;
    networks[1].send(&packet(100, 1)).unwrap();
    assert_eq!(bench.receive(2, &buffers)[HEADER..], packet(100, 1)[HEADER..]);
    let only_checksums = Offloads { checksum: true, ..Offloads::default() };
    assert_eq!(asked[0].offloads.lock().unwrap().last(), Some(&only_checksums));
    let (narrow, ..) = device(1);
    let bad = narrow.restore(&DeviceState::Network { pairs: 2, offloads: 0 });
    assert!(matches!(bad, Err(ActivateError::WrongState)));
    assert!(narrow.restore(&DeviceState::Stateless).is_err());
}

#[test]
fn a_network_that_goes_away_unplugs_the_cable() {
    #[derive(Debug)]
    struct Gone(PacketSocket);
    impl NetBackend for Gone {
        fn fd(&self) -> BorrowedFd<'_> {
            self.0.fd()
        }
        fn receive(&self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::from_raw_os_error(libc::EBADFD))
        }
        fn send(&self, _: &[GuestSlice<'_>]) -> io::Result<()> {
            Err(io::Error::from_raw_os_error(libc::EBADFD))
        }
        fn send_bytes(&self, _: &[u8]) -> io::Result<()> {
            Err(io::Error::from_raw_os_error(libc::EBADFD))
        }
    }
    let backend = Box::new(Gone(PacketSocket::new(UnixDatagram::unbound().unwrap()).unwrap()));
    let config =
        NetConfig { name: "gone".into(), mac: MAC, mtu: 1500, backends: vec![backend as Box<_>] };
    let device = Net::new(config).unwrap();
    let mut guest = Guest::new(1 << 20, device.clone());
    let mut queues = guest.start();
    assert!(wait_until(|| guest.config(6, 1) == [0]), "the link is down");
    let at = guest.place(&packet(60, 1));
    guest.transact(&mut queues[1], &[Segment::readable(at, 72)]);
    assert_eq!(device.stats().tx_dropped, 1);
}

#[test]
fn a_hostile_driver_gets_nowhere() {
    let mut bench = Bench::new(2, 0);
    let mut rng = Rng::new(11);
    let drain = |network: &UnixDatagram| {
        network.set_nonblocking(true).unwrap();
        while network.recv(&mut [0; 16]).is_ok() {}
    };
    for round in 0..5000 {
        let header = |draw: &mut dyn FnMut() -> Option<u64>| {
            let word = draw()?;
            // Half of them are commands that the control queue knows.
            let class = if word & 1 == 0 { 4 + (word >> 1 & 1) as u8 } else { word as u8 };
            Some([&[class, 0], &draw()?.to_le_bytes()[..], &[0; 2]].concat())
        };
        let index = rng.below(5) as usize;
        hostile::mischief(&bench.guest, &mut bench.queues[index], header, &mut rng).unwrap();
        hostile::poke(&bench.guest, &mut rng);
        let _ = bench.networks[rng.below(2) as usize].send(&packet(rng.below(3000) as usize, 1));
        bench.networks.iter().for_each(drain);
        if round % 8 == 0 || bench.guest.mmio.link().needs_reset() {
            bench.queues = hostile::recovers(&mut bench.guest);
        }
    }
    bench.queues = hostile::recovers(&mut bench.guest);
    bench.networks.iter().for_each(drain);
    bench.networks[0].set_nonblocking(false).unwrap();
    bench.transmit(&packet(99, 7));
    assert_eq!(next_packet(&bench.networks[0]), packet(99, 7));
}
