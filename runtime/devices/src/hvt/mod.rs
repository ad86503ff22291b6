//! The hypercalls of Solo5's hvt: all that its guests have in place of devices.
//!
//! A call is a 32-bit `out`; whoever does it any other way, or names memory that is not its own, is
//! ended, as by Solo5's own tender.

mod abi;
mod block;
mod net;
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
use crate::virtio::net::NetBackend;
use crate::{BusDevice, EventSink, Serial, VmEvent};
use abi::{Answer, Arguments, COOKIE_SIZE, call};
use block::Disk;
use net::Port;

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
    /// Networks by their handles.
    pub nets: Vec<HypercallNet>,
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

/// A network device of a Solo5 guest.
#[derive(Debug)]
pub struct HypercallNet {
    /// What the guest calls it: its place in the manifest, below 64.
    pub handle: u64,
    /// The guest's address on it.
    pub mac: [u8; 6],
    /// Longest packet in bytes without the Ethernet header.
    pub mtu: u16,
    /// The way to the network.
    pub backend: Box<dyn NetBackend>,
}

/// The hypercall ports.
pub struct Hypercalls {
    ram: GuestRam,
    console: Arc<Serial>,
    disks: Vec<Disk>,
    nets: Vec<Port>,
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
    /// The size of a disk cannot be found out, or waiting for a network cannot be prepared.
    pub fn new(config: HypercallConfig) -> io::Result<Self> {
        let disks = config.disks.into_iter().map(Disk::new).collect::<Result<_, _>>()?;
        if !config.nets.is_empty() {
            config.gate.arm()?;
        }
        Ok(Self {
            ram: config.ram,
            console: config.console,
            disks,
            nets: config.nets.into_iter().map(Port::new).collect(),
            gate: config.gate,
            events: config.events,
            calls: Default::default(),
        })
    }

    /// Handle and capacity in bytes of each disk.
    pub fn capacities(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.disks.iter().map(|disk| (disk.handle(), disk.capacity()))
    }

    /// Handle, address and MTU of each network.
    pub fn networks(&self) -> impl Iterator<Item = (u64, [u8; 6], u16)> + '_ {
        self.nets.iter().map(|net| (net.handle(), net.mac(), net.mtu()))
    }

    /// How often each call was made, and what became of frames.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let named = NAMES.iter().zip(&self.calls).skip(1);
        let calls = named.map(|(name, count)| (*name, count.load(Ordering::Relaxed)));
        let mut all = [0; 3];
        for counts in self.nets.iter().map(Port::counts) {
            all.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
        }
        calls
            .chain(["frames_sent", "frames_received", "frames_dropped"].into_iter().zip(all))
            .collect()
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
            call::NET_WRITE => self.net_write(gpa),
            call::NET_READ => self.net_read(gpa),
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

    /// Waits for a frame on any network. The guest may be sent on before its time, when the machine
    /// is paused: it looks at its clock again, as it must after any wait.
    fn poll(&self, gpa: u64) -> Result<(), Refused> {
        let arguments = self.arguments::<{ abi::poll::SIZE }>(gpa)?;
        let time = Duration::from_nanos(arguments.long(abi::poll::TIMEOUT));
        let fds: Vec<_> = self.nets.iter().map(Port::fd).collect();
        let ready = self.gate.wait_readable(&fds, time);
        let ready = self.nets.iter().zip(ready).filter(|(_, ready)| *ready);
        let set = ready.fold(0, |set, (net, _)| set | 1u64 << (net.handle() & 63));
        self.answer(gpa + abi::poll::READY_SET, set)?;
        self.answer(gpa + abi::poll::RESULT, set.count_ones())
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

    fn net_write(&self, gpa: u64) -> Result<(), Refused> {
        let (net, data, len) = self.net_arguments(gpa)?;
        let answer = match net {
            Some(net) => net.write(&self.ram, data, len)?,
            None => Answer::Invalid,
        };
        self.answer(gpa + abi::net::RESULT, answer as u32)
    }

    fn net_read(&self, gpa: u64) -> Result<(), Refused> {
        let (net, data, len) = self.net_arguments(gpa)?;
        let answer = match net.map(|net| net.read(&self.ram, data, len)).transpose()? {
            Some(Ok(received)) => {
                self.answer(gpa + abi::net::LEN as u64, received)?;
                Answer::Ok
            }
            Some(Err(answer)) => answer,
            None => Answer::Invalid,
        };
        self.answer(gpa + abi::net::RESULT, answer as u32)
    }

    /// The network that a call is about, and the guest's memory: address and length.
    fn net_arguments(&self, gpa: u64) -> Result<(Option<&Port>, u64, u64), Refused> {
        let arguments = self.arguments::<{ abi::net::SIZE }>(gpa)?;
        let (data, len) = (arguments.long(abi::net::DATA), arguments.long(abi::net::LEN));
        self.own(data, len)?;
        let handle = arguments.long(abi::net::HANDLE);
        Ok((self.nets.iter().find(|net| net.handle() == handle), data, len))
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
        f.debug_struct("HypercallConfig")
            .field("disks", &self.disks)
            .field("nets", &self.nets)
            .finish_non_exhaustive()
    }
}
