use super::*;
use crate::testing::hostile::{self, Choices};
use crate::testing::{DriverQueue, Guest, Rng, Segment};
use std::io::{Read, Seek, SeekFrom, Write};
use vm_memory::{Bytes, GuestAddress};

const DISK: u64 = 1 << 20;

fn disk_file(size: u64) -> File {
    let mut file = tempfile::tempfile().unwrap();
    let pattern: Vec<u8> = (0..size).map(|i| (i / SECTOR) as u8 ^ i as u8).collect();
    file.write_all(&pattern).unwrap();
    file
}

fn config(file: Option<File>) -> BlockConfig {
    BlockConfig {
        name: "vblk-test".into(),
        serial: "serial-of-20-bytes-and-more".into(),
        read_only: false,
        cache: Cache::WriteBack,
        file,
    }
}

struct Bench {
    guest: Guest,
    queue: DriverQueue,
    block: Arc<Block>,
    file: File,
    header: u64,
    data: u64,
    status: u64,
}

impl Bench {
    fn new(change: impl FnOnce(&mut BlockConfig), without: u64) -> Self {
        let file = disk_file(DISK);
        let mut config = config(Some(file.try_clone().unwrap()));
        change(&mut config);
        let block = Block::new(config).unwrap();
        let mut guest = Guest::new(4 << 20, block.clone());
        let queue = guest.start_without(without, 64).remove(0);
        let header = guest.alloc(16);
        let status = guest.alloc(1);
        let data = guest.alloc(1 << 20);
        Self { guest, queue, block, file, header, data, status }
    }

    /// One request; returns its status and the bytes the device says it wrote.
    fn request(&mut self, kind: u32, sector: u64, parts: &[Segment]) -> (u8, u32) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let memory = self.guest.memory();
        memory.write_slice(&header, GuestAddress(self.header)).unwrap();
        memory.write_obj(0xeeu8, GuestAddress(self.status)).unwrap();
        let mut chain = vec![Segment::readable(self.header, 16)];
        chain.extend_from_slice(parts);
        chain.push(Segment::writable(self.status, 1));
        let len = self.guest.transact(&mut self.queue, &chain);
        (self.guest.bytes(self.status, 1)[0], len)
    }

    fn on_disk(&mut self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.file.seek(SeekFrom::Start(offset)).unwrap();
        self.file.read_exact(&mut data).unwrap();
        data
    }
}

#[test]
fn reads_are_scattered_and_reach_the_page_tracker() {
    let mut b = Bench::new(|_| {}, 0);
    let tracker = b.guest.ram.regions()[0].tracker.clone();
    let page = (b.data >> 12) as usize;
    let generation = tracker.code_page(page).unwrap().watch(0, 4096);
    let parts = [Segment::writable(b.data + 100, 412), Segment::writable(b.data + 4096, 612)];
    assert_eq!(b.request(0, 3, &parts), (OK, 1025));
    let mut got = b.guest.bytes(b.data + 100, 412);
    got.extend(b.guest.bytes(b.data + 4096, 612));
    assert_eq!(got, b.on_disk(3 * 512, 1024));
    assert_ne!(tracker.code_page(page).unwrap().generation(), generation, "cached code is stale");
    assert_eq!(b.block.stats().read_bytes, 1024);
}

#[test]
fn writes_flushes_and_discards_reach_the_file() {
    let mut b = Bench::new(|_| {}, 0);
    let data = Rng::new(1).bytes(8192);
    b.guest.memory().write_slice(&data, GuestAddress(b.data)).unwrap();
    let part = [Segment::readable(b.data, 8192)];
    assert_eq!(b.request(1, 8, &part), (OK, 1));
    assert_eq!(b.request(4, 0, &[]), (OK, 1));
    assert_eq!(b.on_disk(4096, 8192), data);
    let segment = |sector: u64, count: u32, flags: u32| {
        let mut s = sector.to_le_bytes().to_vec();
        s.extend(count.to_le_bytes());
        s.extend(flags.to_le_bytes());
        s
    };
    for (kind, flags) in [(11, 0), (13, 0), (13, 1)] {
        b.request(1, 8, &part);
        let two = [segment(8, 4, flags), segment(20, 4, flags)].concat();
        let at = b.data + 0x10000;
        b.guest.memory().write_slice(&two, GuestAddress(at)).unwrap();
        assert_eq!(b.request(kind, 0, &[Segment::readable(at, 32)]), (OK, 1));
        let mut want = data.clone();
        want[..2048].fill(0);
        want[12 * 512..].fill(0);
        assert_eq!(b.on_disk(4096, 8192), want, "kind {kind} flags {flags}");
    }
    let bad = segment(8, 1, 2);
    b.guest.memory().write_slice(&bad, GuestAddress(b.data)).unwrap();
    assert_eq!(b.request(13, 0, &[Segment::readable(b.data, 16)]).0, 2);
    assert_eq!(b.request(11, 0, &[Segment::readable(b.data, 15)]).0, 1);
}

const OK: u8 = 0;

#[test]
fn requests_that_make_no_sense_get_a_status_and_no_reset() {
    let mut b = Bench::new(|_| {}, 0);
    let last = DISK / SECTOR - 1;
    let sector = |b: &Bench| [Segment::writable(b.data, 512)];
    let part = sector(&b);
    assert_eq!(b.request(0, last, &part), (OK, 513));
    assert_eq!(b.request(0, last + 1, &part), (1, 1));
    assert_eq!(b.request(0, u64::MAX, &part), (1, 1));
    let odd = [Segment::writable(b.data, 513)];
    assert_eq!(b.request(0, 0, &odd), (1, 1));
    assert_eq!(b.request(77, 0, &part), (2, 1));
    let id = [Segment::writable(b.data, 20)];
    assert_eq!(b.request(8, 0, &id), (OK, 21));
    assert_eq!(b.guest.bytes(b.data, 20), b"serial-of-20-bytes-a");
    assert_eq!(b.block.stats().errors, 4);
    assert!(!b.guest.mmio.link().needs_reset());
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let mut b = Bench::new(|c| c.read_only = true, 0);
    assert_eq!(b.guest.offered() & (1 << 5 | 1 << 9 | 1 << 13), 1 << 5);
    let part = [Segment::readable(b.data, 512)];
    for kind in [1, 11, 13] {
        assert_eq!(b.request(kind, 0, &part), (1, 1));
    }
}

#[test]
fn it_works_without_event_index_and_with_indirect_tables() {
    let mut b = Bench::new(|_| {}, 1 << 29);
    let part = [Segment::writable(b.data, 512)];
    for sector in 0..200 {
        assert_eq!(b.request(0, sector, &part), (OK, 513));
    }
    let mut b = Bench::new(|_| {}, 0);
    b.guest.memory().write_slice(&[0; 16], GuestAddress(b.header)).unwrap();
    // More descriptors than the queue has: allowed in an indirect table only.
    let mut chain = vec![Segment::readable(b.header, 16)];
    chain.extend((0..128).map(|i| Segment::writable(b.data + i * 1024, 512)));
    chain.push(Segment::writable(b.status, 1));
    let table = b.guest.alloc(16 * chain.len() as u64);
    let head = b.queue.offer_indirect(table, &chain);
    b.guest.notify(0);
    assert_eq!(b.guest.wait_used(&mut b.queue), Some((head, 128 * 512 + 1)));
    assert_eq!(b.guest.bytes(b.data + 127 * 1024, 512), b.on_disk(127 * 512, 512));
}

#[test]
fn a_slot_is_no_device_until_there_is_a_disk_in_it() {
    let block = Block::new(config(None)).unwrap();
    let mut guest = Guest::new(4 << 20, block.clone());
    let magic_and_id = |guest: &Guest| (guest.read(0), guest.read(8));
    assert_eq!(magic_and_id(&guest), (0x7472_6976, 0));
    block.attach(disk_file(DISK), true).unwrap();
    assert_eq!(magic_and_id(&guest).1, 2);
    assert_eq!(guest.config(0, 8), (DISK / SECTOR).to_le_bytes());
    assert_ne!(guest.offered() & feature::RO, 0);
    assert!(matches!(block.attach(disk_file(512), false), Err(BlockError::Occupied(_))));
    assert!(!guest.mmio.is_driven());
    guest.start();
    assert!(guest.mmio.is_driven());
    guest.reset();
    assert!(!guest.mmio.is_driven());
    assert!(block.detach() && block.is_empty() && !block.detach());
    assert_eq!(magic_and_id(&guest).1, 0);
    // Another one, of another size and kind.
    block.attach(disk_file(2 * DISK), false).unwrap();
    assert_eq!(guest.offered() & feature::RO, 0);
    assert_eq!(guest.config(0, 8), (2 * DISK / SECTOR).to_le_bytes());
    // A change that the driver may have missed while it started is told at its end.
    guest.write(0x70, 1);
    block.detach();
    guest.start();
    assert_eq!(guest.read(0x60), 2, "a configuration change");
}

#[test]
fn who_uses_an_empty_slot_gets_errors() {
    let mut b = Bench::new(|c| c.file = None, 0);
    let all = |b: &mut Bench| {
        let (read, written) = ([Segment::writable(b.data, 512)], [Segment::readable(b.data, 16)]);
        let mut answers = vec![b.request(0, 0, &read).0];
        answers.extend([1, 11, 13].map(|kind| b.request(kind, 0, &written).0));
        answers.push(b.request(4, 0, &[]).0);
        answers
    };
    assert_eq!(all(&mut b), [1; 5], "a driver that takes what is not there");
    let file = b.file.try_clone().unwrap();
    let before = (b.guest.line.count(), b.guest.read(0xfc));
    b.block.attach(file, false).unwrap();
    assert!(b.guest.line.count() > before.0 && b.guest.read(0xfc) != before.1);
    let part = [Segment::writable(b.data, 512)];
    assert_eq!(b.request(0, 3, &part), (OK, 513));
    assert_eq!(b.request(4, 0, &[]), (OK, 1));
    assert!(b.block.detach());
    assert_eq!(all(&mut b), [1; 5], "a driver that has not let go");
    assert!(!b.guest.mmio.link().needs_reset());
}

#[test]
fn a_disk_that_has_shrunk_or_gone_is_an_error_of_the_request() {
    let mut b = Bench::new(|_| {}, 0);
    let part = [Segment::writable(b.data, 512)];
    assert_eq!(b.request(0, 5, &part), (OK, 513));
    b.file.set_len(0).unwrap();
    assert_eq!(b.request(0, 5, &part), (1, 1));
    assert!(!b.guest.mmio.link().needs_reset());
}

#[test]
fn requests_without_header_or_status_stop_the_device() {
    for parts in [
        vec![Segment::readable(0x1000, 15), Segment::writable(0x2000, 1)],
        vec![Segment::readable(0x1000, 16)],
        vec![Segment::writable(0x1000, 16)],
    ] {
        let mut b = Bench::new(|_| {}, 0);
        b.queue.offer(&parts);
        b.guest.notify(0);
        assert!(b.guest.wait_needs_reset());
        b.queue = hostile::recovers(&mut b.guest).remove(0);
        (b.header, b.status, b.data) = (0x10_0000, 0x11_0000, 0x12_0000);
        let part = [Segment::writable(b.data, 512)];
        assert_eq!(b.request(0, 0, &part), (OK, 513));
    }
}

#[test]
fn a_reset_waits_for_what_is_running() {
    let mut b = Bench::new(|_| {}, 0);
    let part = [Segment::readable(b.header, 16), Segment::writable(b.status, 1)];
    for _ in 0..50 {
        while b.queue.room() >= 2 {
            b.queue.offer(&part);
        }
        b.guest.notify(0);
        b.guest.reset();
        let zeros = vec![0xa5; 0x8000];
        b.guest.memory().write_slice(&zeros, GuestAddress(0x1000)).unwrap();
        std::thread::yield_now();
        assert_eq!(b.guest.bytes(0x1000, 0x8000), zeros, "nothing is written after a reset");
        b.queue = b.guest.start_without(0, 64).remove(0);
        (b.header, b.status) = (0x10_0000, 0x11_0000);
    }
}

#[test]
fn a_paused_device_is_saved_and_goes_on_elsewhere() {
    let mut b = Bench::new(|_| {}, 0);
    let part = [Segment::writable(b.data, 512)];
    assert_eq!(b.request(0, 1, &part), (OK, 513));
    b.guest.mmio.device().pause();
    b.guest.memory().write_slice(&[0; 16], GuestAddress(b.header)).unwrap();
    b.queue.offer(&[
        Segment::readable(b.header, 16),
        Segment::writable(b.data, 512),
        Segment::writable(b.status, 1),
    ]);
    b.guest.notify(0);
    let state = b.guest.mmio.save();
    assert_eq!(state.queues[0].next_used, 1);
    let other = Block::new(config(Some(b.file.try_clone().unwrap()))).unwrap();
    b.guest.mmio =
        crate::virtio::MmioTransport::new(other, b.guest.ram.clone(), b.guest.line.clone());
    b.guest.mmio.restore(&state).unwrap();
    assert_eq!(b.guest.read(0x70), 0xf);
    assert!(b.guest.wait_used(&mut b.queue).is_some(), "what was pending is done after restore");
}

#[test]
fn a_hostile_driver_gets_nowhere() {
    let mut b = Bench::new(|c| c.cache = Cache::Unsafe, 0);
    let mut rng = Rng::new(7);
    let header = |draw: &mut dyn FnMut() -> Option<u64>| {
        let kinds = [0u32, 0, 1, 1, 4, 8, 11, 13, 99];
        let kind = kinds[(draw()? % 9) as usize];
        let mut h = kind.to_le_bytes().to_vec();
        h.extend([0; 4]);
        h.extend((draw()? % 4096).to_le_bytes());
        Some(h)
    };
    for round in 0.. {
        // The device's thread may be behind: a reset takes mischief away before it is noticed.
        if round >= 5000 && b.guest.mmio.link().failures() > 100 {
            break;
        }
        assert!(round < 1_000_000, "mischief is not noticed");
        hostile::mischief(&b.guest, &mut b.queue, header, &mut rng).unwrap();
        if rng.below(50) == 0 {
            hostile::poke(&b.guest, &mut rng);
        }
        if round % 8 == 0 || b.guest.mmio.link().needs_reset() {
            std::thread::yield_now();
            b.queue = hostile::recovers(&mut b.guest).remove(0);
        }
    }
    let _ = rng.draw();
    b.queue = hostile::recovers(&mut b.guest).remove(0);
    (b.header, b.status, b.data) = (0x10_0000, 0x11_0000, 0x12_0000);
    let part = [Segment::writable(b.data, 512)];
    assert_eq!(b.request(0, 0, &part), (OK, 513));
}
