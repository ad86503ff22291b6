//! The hypercalls of Solo5's hvt: all that its guests have in place of devices.
//!
//! A call is a 32-bit `out`; whoever does it any other way, or names memory that is not its own, is
//! ended, as by Solo5's own tender. There is no network: a kernel that demands one is not started.

mod abi;
mod block;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mvm_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _};

use crate::gate::{Gate, Passage};
use crate::{BusDevice, EventSink, Serial, VmEvent};
use abi::{Answer, Arguments, COOKIE_SIZE, call};
use block::Disk;

/// Most bytes of one `puts` that are printed. Printing is best-effort by Solo5's own rules; its
/// guests print lines.
const PUTS_MAX: u64 = 1 << 20;

/// Bytes printed at a time.
const PUTS_CHUNK: usize = 4096;

/// Names of the calls, by number.
const NAMES: [&str; CALLS] = [
    "none",
    "walltime",
    "puts",
    "poll",
    "block_write",
    "block_read",
    "net_write",
    "net_read",
    "halt",
];
const CALLS: usize = call::HALT as usize + 1;

/// What the hypercalls work on.
pub struct HypercallConfig {
    /// The guest's memory.
    pub ram: GuestRam,
    /// The console.
    pub console: Arc<Serial>,
    /// Block devices by their handles.
    pub disks: Vec<HypercallDisk>,
    /// Ends the guest's waiting when the machine is to stand still.
    pub gate: Arc<Gate>,
    /// Told of the guest's end.
    pub events: EventSink,
}

/// A block device of a Solo5 guest.
#[derive(Debug)]
pub struct HypercallDisk {
    /// What the guest calls it: its place in the manifest.
    pub handle: u64,
    /// Raw image or block device of the host.
    pub file: File,
    /// Writes fail.
    pub read_only: bool,
}

/// The hypercall ports.
pub struct Hypercalls {
    ram: GuestRam,
    console: Arc<Serial>,
    disks: Vec<Disk>,
    gate: Arc<Gate>,
    events: EventSink,
    calls: [AtomicU64; CALLS],
}

/// Why a guest is ended; what is told about it.
type Refused = &'static str;

impl Hypercalls {
    /// First port (`HVT_HYPERCALL_PIO_BASE`).
    pub const PORT: u64 = 0x500;
    /// Ports: Solo5 uses 9, the rest of 16 is kept free.
    pub const LEN: u64 = 16;
    /// Lowest address of the guest's own memory (`HVT_GUEST_MIN_BASE`); below lie the structures that
    /// it was started with.
    pub const GUEST_MEMORY: u64 = 0x10_0000;

    /// Hypercalls for the guest that has all of `config`.
    ///
    /// # Errors
    /// The size of a disk cannot be found out.
    pub fn new(config: HypercallConfig) -> io::Result<Self> {
        let disks = config.disks.into_iter().map(Disk::new).collect::<Result<_, _>>()?;
        Ok(Self {
            ram: config.ram,
            console: config.console,
            disks,
            gate: config.gate,
            events: config.events,
            calls: Default::default(),
        })
    }

    /// Handle and capacity in bytes of each disk.
    pub fn capacities(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.disks.iter().map(|disk| (disk.handle(), disk.capacity()))
    }

    /// How often each call was made.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let named = NAMES.iter().zip(&self.calls).skip(1);
        named.map(|(name, count)| (*name, count.load(Ordering::Relaxed))).collect()
    }

    fn call(&self, number: u16, gpa: u64) -> Result<(), Refused> {
        if let Some(counter) = self.calls.get(usize::from(number)) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        match number {
            call::WALLTIME => self.walltime(gpa),
            call::PUTS => self.puts(gpa),
            call::POLL => self.poll(gpa),
            call::BLOCK_WRITE => self.block(gpa, Disk::write),
            call::BLOCK_READ => self.block(gpa, Disk::read),
            call::NET_WRITE | call::NET_READ => self.net(gpa),
            call::HALT => self.halt(gpa),
            _ => Err("there is no such call"),
        }
    }

    fn walltime(&self, gpa: u64) -> Result<(), Refused> {
        self.arguments::<{ abi::walltime::SIZE }>(gpa)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let nsecs = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        self.answer(gpa + abi::walltime::NSECS, nsecs)
    }

    fn puts(&self, gpa: u64) -> Result<(), Refused> {
        let arguments = self.arguments::<{ abi::puts::SIZE }>(gpa)?;
        let (mut at, len) = (arguments.long(abi::puts::DATA), arguments.long(abi::puts::LEN));
        self.own(at, len)?;
        let mut left = len.min(PUTS_MAX);
        let mut chunk = [0; PUTS_CHUNK];
        while left > 0 && self.gate.passage() != Passage::Ended {
            let len = left.min(PUTS_CHUNK as u64);
            let chunk = &mut chunk[..len as usize];
            self.ram.memory().read_slice(chunk, GuestAddress(at)).map_err(|_| NOT_OWN)?;
            self.console.print(chunk);
            at += len;
            left -= len;
        }
        Ok(())
    }

    /// Nothing ever becomes ready. The guest may be sent on before its time, when the machine is
    /// paused: it looks at its clock again, as it must after any wait.
    fn poll(&self, gpa: u64) -> Result<(), Refused> {
        let arguments = self.arguments::<{ abi::poll::SIZE }>(gpa)?;
        self.gate.wait(Duration::from_nanos(arguments.long(abi::poll::TIMEOUT)));
        self.answer(gpa + abi::poll::READY_SET, 0u64)?;
        self.answer(gpa + abi::poll::RESULT, 0u32)
    }

    fn block(&self, gpa: u64, transfer: fn(&Disk, &Transfer<'_>) -> Answer) -> Result<(), Refused> {
        let arguments = self.arguments::<{ abi::block::SIZE }>(gpa)?;
        let handle = arguments.long(abi::block::HANDLE);
        let data = arguments.long(abi::block::DATA);
        let len = arguments.long(abi::block::LEN);
        self.own(data, len)?;
        let answer = match self.disks.iter().find(|disk| disk.handle() == handle) {
            Some(disk) => {
                let offset = arguments.long(abi::block::OFFSET);
                transfer(disk, &Transfer { ram: &self.ram, gate: &self.gate, offset, data, len })
            }
            None => Answer::Invalid,
        };
        self.answer(gpa + abi::block::RESULT, answer as u32)
    }

    /// No handle is a network device's.
    fn net(&self, gpa: u64) -> Result<(), Refused> {
        self.arguments::<{ abi::net::SIZE }>(gpa)?;
        self.answer(gpa + abi::net::RESULT, Answer::Invalid as u32)
    }

    fn halt(&self, gpa: u64) -> Result<(), Refused> {
        let arguments = self.arguments::<{ abi::halt::SIZE }>(gpa)?;
        let (status, cookie) =
            (arguments.int(abi::halt::STATUS), arguments.long(abi::halt::COOKIE));
        if cookie != 0 {
            self.own(cookie, COOKIE_SIZE)?;
        }
        (self.events)(VmEvent::Halt { status, cookie });
        Ok(())
    }

    fn arguments<const SIZE: usize>(&self, gpa: u64) -> Result<Arguments<SIZE>, Refused> {
        self.own(gpa, SIZE as u64)?;
        let mut bytes = [0; SIZE];
        self.ram.memory().read_slice(&mut bytes, GuestAddress(gpa)).map_err(|_| NOT_OWN)?;
        Ok(Arguments(bytes))
    }

    /// Writes into an argument block, which was read before.
    fn answer<T: vm_memory::ByteValued>(&self, gpa: u64, value: T) -> Result<(), Refused> {
        self.ram.memory().write_obj(value, GuestAddress(gpa)).map_err(|_| NOT_OWN)
    }

    /// Checks that `[at, at + len)` is the guest's memory.
    fn own(&self, at: u64, len: u64) -> Result<(), Refused> {
        let len = usize::try_from(len).map_err(|_| NOT_OWN)?;
        let fits = at >= Self::GUEST_MEMORY && self.ram.memory().check_range(GuestAddress(at), len);
        if fits { Ok(()) } else { Err(NOT_OWN) }
    }
}

const NOT_OWN: Refused = "it names memory that is not the guest's";

/// A transfer between a disk and the guest's memory, which is the guest's own.
struct Transfer<'a> {
    ram: &'a GuestRam,
    gate: &'a Gate,
    /// Place on the disk in bytes.
    offset: u64,
    /// Guest physical address.
    data: u64,
    /// Bytes.
    len: u64,
}

impl BusDevice for Hypercalls {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let number = offset as u16;
        let (address, done) = match <[u8; 4]>::try_from(data) {
            Ok(bytes) => {
                let gpa = u64::from(u32::from_le_bytes(bytes));
                (gpa, self.call(number, gpa))
            }
            Err(_) => (0, Err("a call is a write of 32 bits")),
        };
        if let Err(why) = done {
            (self.events)(VmEvent::BadHypercall { number, address, why });
        }
    }
}

impl std::fmt::Debug for Hypercalls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hypercalls").field("disks", &self.disks).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for HypercallConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HypercallConfig").field("disks", &self.disks).finish_non_exhaustive()
    }
}
