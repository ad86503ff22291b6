//! A synthetic guest with the device, and the server on a thread of this process, unconfined.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use fuse_backend_rs::abi::fuse_abi::Opcode;
use mvm_devices::EventLoop;
use mvm_devices::packets::Packets;
use mvm_devices::testing::{DriverQueue, Guest, PATIENCE, Segment};
use mvm_devices::virtio::fs::{Fs, FsConfig};
use vm_memory::{Bytes, GuestAddress};

use crate::protocol::ShareOptions;
use crate::server::FileService;
use crate::shares::Shares;
use crate::tree;

/// Bytes of guest RAM.
const RAM: u64 = 8 << 20;

/// Bytes of each of the buffers.
pub const BUFFER: u64 = 1 << 20;

/// The queues: for what is forgotten, and for everything else (virtio 1.2, 5.11.2).
const FORGETS: usize = 0;
const REQUESTS: usize = 1;

/// Number of the root directory.
pub const ROOT: u64 = 1;

/// The guest's side of the file system.
pub struct Rig {
    pub guest: Guest,
    pub queues: Vec<DriverQueue>,
    pub request: u64,
    pub reply: u64,
    note: u64,
    _events: EventLoop,
}

impl Rig {
    /// A driver that has started, with `dirs` shared under their names.
    pub fn new(dirs: &[(&str, &Path, ShareOptions)], listener: Option<OwnedFd>) -> Self {
        let shares = Arc::new(Shares::new(false));
        for (name, path, options) in dirs {
            let tree = tree::plain(path).expect("a directory");
            shares.add(name, tree, *options).expect("a share");
        }
        let (ours, theirs) = Packets::pair().expect("a socket");
        let service = FileService::new(shares.clone(), theirs, listener).expect("a service");
        std::thread::spawn(move || service.run().expect("it serves to the end"));
        Self::over(ours)
    }

    /// A driver of the device whose server is at the other end of `channel`.
    pub fn over(channel: Packets) -> Self {
        let events = EventLoop::start("rig").expect("a thread");
        let config = FsConfig {
            name: "fs".into(),
            tag: "mvm".into(),
            channel,
            on_gone: Arc::new(|why: &str| panic!("{why}")),
        };
        let device = Fs::new(config, &events).expect("a device");
        let mut guest = Guest::new(RAM, device);
        let queues = guest.start();
        let [request, reply, note] = [(); 3].map(|()| guest.alloc(BUFFER));
        Self { guest, queues, request, reply, note, _events: events }
    }

    /// Sends bytes as they are in the request queue, with `room` bytes for the answer, and waits until
    /// they are used. Returns what was written.
    pub fn send(&mut self, bytes: &[u8], room: u32) -> Vec<u8> {
        self.ask(bytes, room);
        self.answer(room)
    }

    /// Sends bytes as they are in the request queue, with `room` bytes for the answer.
    pub fn ask(&mut self, bytes: &[u8], room: u32) {
        let answer = (room > 0).then(|| Segment::writable(self.reply, room));
        self.offer(REQUESTS, self.request, bytes, answer);
    }

    /// Waits for the answer to what was [asked](Self::ask), and returns it.
    pub fn answer(&mut self, room: u32) -> Vec<u8> {
        let (_, len) = self.served(REQUESTS);
        let mut answer = vec![0; len.min(room) as usize];
        self.guest.memory().read_slice(&mut answer, GuestAddress(self.reply)).expect("in RAM");
        answer
    }

    /// Forgets a node that was looked up once, in the queue that is for that.
    pub fn forget(&mut self, node: u64) {
        let bytes = message(Opcode::Forget as u32, node, &1u64.to_le_bytes());
        self.offer(FORGETS, self.note, &bytes, None);
        self.served(FORGETS);
    }

    fn offer(&mut self, queue: usize, place: u64, bytes: &[u8], answer: Option<Segment>) {
        self.guest.memory().write_slice(bytes, GuestAddress(place)).expect("in RAM");
        let mut chain = vec![Segment::readable(place, bytes.len() as u32)];
        chain.extend(answer);
        self.queues[queue].offer(&chain);
        if self.queues[queue].wants_notification() {
            self.guest.write(mvm_devices::testing::reg::QUEUE_NOTIFY, queue as u32);
        }
    }

    /// Waits for the next used chain of a queue.
    fn served(&mut self, queue: usize) -> (u16, u32) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let seen = self.guest.line.count();
            self.queues[queue].ask_for_interrupt();
            if let Some(used) = self.queues[queue].poll_used() {
                return used;
            }
            self.guest.line.wait_beyond(seen, deadline).expect("an answer");
        }
    }

    /// One FUSE request as root; its answer without header, or the error number.
    pub fn fuse(&mut self, opcode: Opcode, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        self.begin(opcode, node, body);
        self.finish()
    }

    /// Sends a FUSE request as root.
    pub fn begin(&mut self, opcode: Opcode, node: u64, body: &[u8]) {
        self.ask(&message(opcode as u32, node, body), BUFFER as u32);
    }

    /// The answer to it without header, or the error number.
    pub fn finish(&mut self) -> Result<Vec<u8>, i32> {
        let answer = self.answer(BUFFER as u32);
        assert!(answer.len() >= 16, "an answer of {} bytes", answer.len());
        let word = |at: usize| i32::from_le_bytes(answer[at..at + 4].try_into().expect("four"));
        assert_eq!(word(0) as usize, answer.len(), "the length in the header");
        match word(4) {
            0 => Ok(answer[16..].to_vec()),
            error => Err(-error),
        }
    }

    /// The first message of a driver.
    pub fn init(&mut self) {
        let mut body = Vec::new();
        for word in [7u32, 38, 1 << 20, u32::MAX, 0] {
            body.extend(word.to_le_bytes());
        }
        body.resize(64, 0);
        self.fuse(Opcode::Init, 0, &body).expect("FUSE_INIT");
    }

    /// Looks a name up; the node's number.
    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        let answer = self.fuse(Opcode::Lookup, parent, &with_nul(&[name]))?;
        Ok(number(&answer, 0))
    }

    /// Opens a file; its handle.
    pub fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let mut body = flags.to_le_bytes().to_vec();
        body.resize(8, 0);
        Ok(number(&self.fuse(Opcode::Open, node, &body)?, 0))
    }

    /// Creates a file; its number and handle.
    pub fn create(&mut self, parent: u64, name: &str, flags: i32) -> Result<(u64, u64), i32> {
        let answer = self.fuse(Opcode::Create, parent, &create_body(name, flags))?;
        Ok((number(&answer, 0), number(&answer, ENTRY)))
    }

    /// Reads from a file.
    pub fn read(&mut self, node: u64, handle: u64, at: u64, size: u32) -> Result<Vec<u8>, i32> {
        self.fuse(Opcode::Read, node, &io_body(handle, at, size))
    }

    /// Writes to a file; the bytes written.
    pub fn write(&mut self, node: u64, handle: u64, at: u64, data: &[u8]) -> Result<u64, i32> {
        let mut body = io_body(handle, at, data.len() as u32);
        // The flags of the open file, which the kernel sends along.
        body[32..36].copy_from_slice(&libc::O_RDWR.to_le_bytes());
        body.extend(data);
        let answer = self.fuse(Opcode::Write, node, &body)?;
        Ok(number(&answer, 0) & 0xffff_ffff)
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // Waits for what is under way. The device goes with its loop, and the service after it.
        self.guest.reset();
    }
}

/// Bytes of `struct fuse_entry_out`.
const ENTRY: usize = 128;

/// `struct fuse_in_header` and what follows it.
pub fn message(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend((40 + body.len() as u32).to_le_bytes());
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(7u64.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    bytes.extend([0; 16]);
    bytes.extend(body);
    bytes
}

/// `struct fuse_create_in` and the name.
pub fn create_body(name: &str, flags: i32) -> Vec<u8> {
    let words = [flags.cast_unsigned(), 0o100644, 0o22, 0];
    let mut body: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    body.extend(with_nul(&[name]));
    body
}

/// `struct fuse_read_in` and `struct fuse_write_in` are the same so far.
pub fn io_body(handle: u64, at: u64, size: u32) -> Vec<u8> {
    let mut body = handle.to_le_bytes().to_vec();
    body.extend(at.to_le_bytes());
    body.extend(size.to_le_bytes());
    body.resize(40, 0);
    body
}

/// Names, each with its end.
pub fn with_nul(names: &[&str]) -> Vec<u8> {
    names.iter().flat_map(|name| name.bytes().chain([0])).collect()
}

/// What a list says (`struct fuse_direntplus`): the nodes' numbers, the offsets behind them, their names.
pub fn listed_plus(mut rest: &[u8]) -> Vec<(u64, u64, String)> {
    let mut found = Vec::new();
    while !rest.is_empty() {
        // Behind the entry: its number, offset, the name's length, type and name.
        let entry = &rest[ENTRY..];
        let len = number(entry, 16) as u32 as usize;
        let name = String::from_utf8(entry[24..24 + len].to_vec()).expect("a name");
        found.push((number(rest, 0), number(entry, 8), name));
        rest = &entry[(24 + len).next_multiple_of(8)..];
    }
    found
}

/// The 64-bit number at `at`.
pub fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
