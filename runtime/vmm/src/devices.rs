//! The devices of a machine and where they are wired to.

mod emulators;
mod fs;
mod hvt;
mod memory;
mod net;
mod old_pc;
mod slots;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use mvm_devices::fw_cfg::FwCfg;
use mvm_devices::virtio::balloon::{Balloon, BalloonConfig, BalloonError};
use mvm_devices::virtio::block::{Block, BlockConfig, BlockError, BlockStats, Cache};
use mvm_devices::virtio::console::{Console, ConsoleConfig, ConsoleError};
use mvm_devices::virtio::fs::{Fs, FsError, Gone};
use mvm_devices::virtio::mem::{Mem, MemError};
use mvm_devices::virtio::net::{Net, NetError};
use mvm_devices::virtio::rng::{Rng, RngError};
use mvm_devices::virtio::vsock::{Dialer, Joined, Vsock, VsockConfig, VsockError};
use mvm_devices::virtio::{MmioTransport, VirtioDevice};
use mvm_devices::{
    Bus, BusDevice, BusError, DebugExit, EventLoop, EventLoopError, HypercallConfig, Hypercalls,
    InterruptLine, IoApic, IoApicPin, IsaLine, Pic, PicPin, PitError, PostCode, PowerControl,
    PowerOff, Serial, SerialConfig, SerialInputError, SystemControl, VmEvent,
};

pub use fs::SharedFiles;
pub(crate) use hvt::Guest as HvtGuest;
pub use net::NetCard;
pub(crate) use old_pc::OldPc;
pub use old_pc::OldPcState;
pub use slots::SlotError;

use crate::boot::Attached;
use crate::bus::VmSink;
use crate::layout;
use crate::wires::{Wire, Wired};
use mvm_memory::GuestRam;

/// Why the devices could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Two devices at one place.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A disk cannot be used.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The sockets between host and guest cannot be made.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// A network device cannot be made.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The entropy device cannot be made.
    #[error(transparent)]
    Rng(#[from] RngError),
    /// The balloon cannot be made.
    #[error(transparent)]
    Balloon(#[from] BalloonError),
    /// The memory device cannot be made.
    #[error(transparent)]
    Mem(#[from] MemError),
    /// The serial port has no input.
    #[error(transparent)]
    SerialInput(#[from] SerialInputError),
    /// The virtio console cannot be made.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The file system device cannot be made.
    #[error(transparent)]
    Fs(#[from] FsError),
    /// The interval timer cannot be made.
    #[error(transparent)]
    Pit(#[from] PitError),
    /// The devices' thread cannot be made.
    #[error(transparent)]
    EventLoop(#[from] EventLoopError),
    /// More virtio devices than places.
    #[error("there are places for {} virtio devices", layout::MAX_VIRTIO_DEVICES)]
    TooMany,
    /// A Solo5 kernel demands a network device.
    #[error(
        "the kernel demands the network device {name:?}, and there is no network for it: give one"
    )]
    NoNetwork {
        /// What the kernel calls it.
        name: String,
    },
    /// A Solo5 kernel demands fewer network devices than there are.
    #[error(
        "there are {networks} network interfaces, and the kernel's manifest demands {demanded} network devices: \
         run it with as many"
    )]
    SpareNetwork {
        /// How many there are.
        networks: usize,
        /// How many are demanded.
        demanded: usize,
    },
    /// A Solo5 kernel demands a block device.
    #[error("the kernel demands the block device {name:?}, and there is no disk for it: give one")]
    NoDisk {
        /// What the kernel calls it.
        name: String,
    },
    /// A disk cannot be used.
    #[error("cannot use a disk of the guest: {0}")]
    HypercallDisk(#[source] io::Error),
    /// A Solo5 kernel was to be spoken to.
    #[error("Solo5's guests have a console for output alone: there is nothing to type at")]
    NoInput,
    /// A disk is too small.
    #[error("the disk for device {handle} of the kernel's manifest has less than 512 bytes")]
    EmptyDisk {
        /// The device's place in the manifest.
        handle: u64,
    },
    /// An interrupt that does not exist.
    #[error("there is no interrupt {0}")]
    NoInterrupt(u32),
}

/// A block device.
#[derive(Debug)]
pub struct Disk {
    /// Raw image or block device of the host; `None` for a place that is empty for now.
    pub file: Option<File>,
    /// The guest may not write.
    pub read_only: bool,
    /// Serial number shown to the guest.
    pub serial: String,
}

/// Sockets between host and guest.
pub struct Sockets {
    /// Context id of the guest.
    pub cid: u64,
    /// Where host processes ask for connections to the guest.
    pub listener: Option<UnixListener>,
    /// Ports that the guest may dial, once each, and the stream that it is joined to.
    pub guest_ports: Vec<(u32, UnixStream)>,
    /// Who is asked for every other port.
    pub dialer: Option<Dialer>,
}

impl std::fmt::Debug for Sockets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sockets").field("cid", &self.cid).finish_non_exhaustive()
    }
}

/// A console besides the serial port, the guest's `/dev/hvc0`.
#[derive(Debug, Default)]
pub struct VirtioConsole {
    /// Where output goes; made non-blocking. The guest waits while it takes nothing.
    pub output: Option<OwnedFd>,
    /// Where input comes from; made non-blocking.
    pub input: Option<OwnedFd>,
}

/// What the devices are made from.
pub(crate) struct Parts {
    /// Where the serial console's output goes.
    pub console: Box<dyn Write + Send>,
    /// Bytes of it that are kept.
    pub console_ring: usize,
    /// What is typed at it.
    pub console_input: Option<OwnedFd>,
    /// A second console.
    pub virtio_console: Option<VirtioConsole>,
    /// Block devices in the order of their names in the guest.
    pub disks: Vec<Disk>,
    /// Network devices in the order of their names in the guest.
    pub nets: Vec<NetCard>,
    /// Sockets between host and guest.
    pub vsock: Option<Sockets>,
    /// What is written to port 0x501 is the guest's status.
    pub exit_status: bool,
    /// A PC has what old ones have: its kernel may know nothing else. Linux does without.
    pub old_pc: bool,
    /// The file system that the host shares.
    pub fs: Option<SharedFiles>,
    /// Told when its server is gone.
    pub on_lost: Gone,
    /// Told when the guest has dialled one of its ports.
    pub on_hello: Joined,
    /// Told about resets.
    pub on_event: mvm_devices::EventSink,
}

/// What of them is for the devices behind a thread of events.
struct VirtioParts {
    console_ring: usize,
    console_input: Option<OwnedFd>,
    virtio_console: Option<VirtioConsole>,
    disks: Vec<Disk>,
    nets: Vec<NetCard>,
    vsock: Option<Sockets>,
    fs: Option<SharedFiles>,
    on_lost: Gone,
    on_hello: Joined,
}

/// What kind of machine a kernel expects.
#[derive(Debug)]
pub(crate) enum Platform<'a> {
    /// A PC.
    Pc,
    /// A PC with what its emulators have besides: the protocol is one by which they start kernels.
    EmulatedPc,
    /// Solo5's hypercalls.
    Hypercalls(hvt::Guest<'a>),
}

/// The devices of a machine.
#[derive(Debug)]
pub(crate) struct Devices {
    pub ioapic: Arc<IoApic>,
    pub sink: Arc<VmSink>,
    pub serial: Arc<Serial>,
    /// In the order of their register windows and interrupts.
    pub virtio: Wired,
    pub blocks: Vec<Arc<Block>>,
    pub nets: Vec<Arc<Net>>,
    pub vsock: Option<Arc<Vsock>>,
    pub rng: Option<Arc<Rng>>,
    pub balloon: Option<Arc<Balloon>>,
    /// The memory that comes and goes, in a machine that can grow.
    pub mem: Option<Arc<Mem>>,
    pub console: Option<Arc<Console>>,
    pub fs: Option<Arc<Fs>>,
    /// What a Solo5 guest has in place of all but the console.
    pub hypercalls: Option<Arc<Hypercalls>>,
    /// Tells kernels made for PC emulators of their machine.
    pub fw_cfg: Option<Arc<FwCfg>>,
    /// What old PCs have.
    pub old_pc: Option<OldPc>,
    /// The thread on which all but the block and network devices wait.
    events: Option<EventLoop>,
}

impl Devices {
    /// Makes all devices and places them on a bus.
    ///
    /// # Errors
    /// [`Error`].
    pub fn build(
        parts: Parts,
        platform: &Platform<'_>,
        ram: &GuestRam,
    ) -> Result<(Self, Bus), Error> {
        let mut bus = Bus::new();
        let sink = Arc::new(VmSink::default());
        let ioapic = IoApic::new(sink.clone());
        let is_pc = !matches!(platform, Platform::Hypercalls(_));
        let old_pc = match is_pc && parts.old_pc {
            true => Some(OldPc::place(sink.clone(), &mut bus)?),
            false => None,
        };
        let config = SerialConfig { output: parts.console, tail: parts.console_ring };
        let serial = Serial::new(line(&ioapic, old_pc.as_ref(), layout::SERIAL_GSI)?, config);
        bus.ports.insert("serial", layout::SERIAL_PORT, Serial::LEN, serial.clone())?;
        let mut devices = Self {
            ioapic,
            sink,
            serial,
            virtio: Wired::default(),
            blocks: Vec::new(),
            nets: Vec::new(),
            vsock: None,
            rng: None,
            balloon: None,
            mem: None,
            console: None,
            fs: None,
            hypercalls: None,
            fw_cfg: None,
            old_pc,
            events: None,
        };
        if let Platform::Hypercalls(guest) = platform {
            if parts.vsock.is_some() {
                tracing::warn!("a Solo5 guest cannot use sockets to the host");
            }
            if parts.console_input.is_some() {
                return Err(Error::NoInput);
            }
            let config = HypercallConfig {
                ram: ram.clone(),
                console: devices.serial.clone(),
                disks: hvt::assign(guest.manifest, parts.disks)?,
                nets: hvt::assign_nets(guest.manifest, parts.nets)?,
                gate: guest.gate.clone(),
                events: parts.on_event,
            };
            devices.hypercalls = Some(hvt::attach(config, &mut bus)?);
        } else {
            bus.memory.insert("ioapic", layout::IOAPIC, IoApic::LEN, devices.ioapic.clone())?;
            let old = devices.old_pc.as_ref();
            place_ports(parts.on_event, parts.exit_status, old, &mut bus)?;
            if matches!(platform, Platform::EmulatedPc) {
                let old = devices.old_pc.as_ref().map(|old| &old.pic);
                devices.fw_cfg = Some(emulators::place(ram, &devices.ioapic, old, &mut bus)?);
            }
            let virtio = VirtioParts {
                console_ring: parts.console_ring,
                console_input: parts.console_input,
                virtio_console: parts.virtio_console,
                disks: parts.disks,
                nets: parts.nets,
                vsock: parts.vsock,
                fs: parts.fs,
                on_lost: parts.on_lost,
                on_hello: parts.on_hello,
            };
            devices.add_virtio_devices(virtio, ram, &mut bus)?;
        }
        Ok((devices, bus))
    }

    /// Disks, networks, sockets, entropy, balloon, the second console.
    fn add_virtio_devices(
        &mut self,
        parts: VirtioParts,
        ram: &GuestRam,
        bus: &mut Bus,
    ) -> Result<(), Error> {
        let events = EventLoop::start("mvm-devices")?;
        if let Some(old) = &self.old_pc {
            old.connect(&self.ioapic, &events)?;
        }
        if let Some(input) = parts.console_input {
            self.serial.read_from(input, &events)?;
        }
        for (index, disk) in parts.disks.into_iter().enumerate() {
            let block = Block::new(BlockConfig {
                name: format!("mvm-block-{index}"),
                serial: disk.serial,
                read_only: disk.read_only,
                cache: Cache::WriteBack,
                file: disk.file,
            })?;
            self.blocks.push(block.clone());
            self.add_virtio(block, ram, bus)?;
        }
        for (index, card) in parts.nets.into_iter().enumerate() {
            let net = net::open(index, card)?;
            self.nets.push(net.clone());
            self.add_virtio(net, ram, bus)?;
        }
        if let Some(sockets) = parts.vsock {
            let vsock = open_vsock(sockets, &parts.on_hello, &events)?;
            self.vsock = Some(vsock.clone());
            self.add_virtio(vsock, ram, bus)?;
        }
        let rng = Rng::new("mvm-rng", &events)?;
        self.rng = Some(rng.clone());
        self.add_virtio(rng, ram, bus)?;
        let config =
            BalloonConfig { name: "mvm-balloon".into(), deflate_on_oom: true, reporting: true };
        let balloon = Balloon::new(config, &events)?;
        self.balloon = Some(balloon.clone());
        self.add_virtio(balloon, ram, bus)?;
        if ram.growing_region().is_some() {
            let mem = memory::open(ram, &events)?;
            self.mem = Some(mem.clone());
            self.add_virtio(mem, ram, bus)?;
        }
        if let Some(VirtioConsole { output, input }) = parts.virtio_console {
            let tail = parts.console_ring;
            let config = ConsoleConfig { name: "mvm-console".into(), output, input, tail };
            let console = Console::new(config, &events)?;
            self.console = Some(console.clone());
            self.add_virtio(console, ram, bus)?;
        }
        if let Some(files) = parts.fs {
            let device = fs::open(files, parts.on_lost, &events)?;
            self.fs = Some(device.clone());
            self.add_virtio(device, ram, bus)?;
        }
        self.events = Some(events);
        Ok(())
    }

    /// Gives `device` the next register window and interrupt.
    fn add_virtio(
        &mut self,
        device: Arc<dyn VirtioDevice>,
        ram: &GuestRam,
        bus: &mut Bus,
    ) -> Result<(), Error> {
        let index = self.virtio.len() as u32;
        if index >= layout::MAX_VIRTIO_DEVICES {
            return Err(Error::TooMany);
        }
        let gsi = layout::virtio_gsi(index);
        let old = self.old_pc.as_ref().and_then(|old| old_pin(&old.pic, gsi));
        let wire = Wire::new(gsi, pin(&self.ioapic, gsi)?, old);
        let name = device.name().to_owned();
        let transport = MmioTransport::new(device, ram.clone(), wire.clone());
        let at = layout::virtio_mmio(index);
        bus.memory.insert(&name, at, layout::VIRTIO_MMIO_SIZE, transport.clone())?;
        self.virtio.push(transport, wire);
        Ok(())
    }

    /// What a Solo5 guest's devices are.
    pub fn attached(&self) -> Vec<Attached> {
        let Some(hypercalls) = &self.hypercalls else { return Vec::new() };
        let block = |(handle, capacity)| Attached::Block { handle, capacity };
        let net = |(handle, mac, mtu)| Attached::Net { handle, mac, mtu };
        let blocks = hypercalls.capacities().map(block);
        blocks.chain(hypercalls.networks().map(net)).collect()
    }

    /// Stops the work on all queues, with the vCPUs stopped already.
    pub fn pause(&self) {
        self.virtio.transports().for_each(|v| v.device().pause());
        if let Some(old) = &self.old_pc {
            old.pit.pause();
        }
    }

    /// Lets it go on.
    pub fn resume(&self) {
        if let Some(old) = &self.old_pc {
            old.pit.resume();
        }
        self.virtio.transports().for_each(|v| v.device().resume());
    }

    /// What the devices count: name and value.
    pub fn counters(&self) -> Vec<(String, u64)> {
        let mut counters = vec![("serial.written".to_owned(), self.serial.written())];
        for transport in self.virtio.transports() {
            let name = transport.device().name();
            let link = transport.link();
            // Places that never had a disk.
            if !transport.device().is_present() && link.interrupts() == 0 {
                continue;
            }
            counters.push((format!("{name}.interrupts"), link.interrupts()));
            counters.push((format!("{name}.failures"), link.failures()));
        }
        for (index, block) in self.blocks.iter().enumerate() {
            let stats = block.stats();
            if block.is_empty() && stats == BlockStats::default() {
                continue;
            }
            let all = [
                ("reads", stats.reads),
                ("writes", stats.writes),
                ("flushes", stats.flushes),
                ("discards", stats.discards),
                ("read_bytes", stats.read_bytes),
                ("written_bytes", stats.written_bytes),
                ("errors", stats.errors),
            ];
            counters.extend(all.map(|(key, n)| (format!("mvm-block-{index}.{key}"), n)));
        }
        counters.extend(net::counters(&self.nets));
        if let Some(stats) = self.vsock.as_ref().map(|v| v.stats()) {
            let all = [
                ("connections", stats.connections),
                ("packets_from_guest", stats.packets_from_guest),
                ("packets_to_guest", stats.packets_to_guest),
                ("bytes_from_guest", stats.bytes_from_guest),
                ("bytes_to_guest", stats.bytes_to_guest),
                ("dropped", stats.dropped),
            ];
            counters.extend(all.map(|(key, n)| (format!("mvm-vsock.{key}"), n)));
        }
        if let Some(stats) = self.console.as_ref().map(|c| c.stats()) {
            let all =
                [("output", stats.output), ("dropped", stats.dropped), ("input", stats.input)];
            counters.extend(all.map(|(key, n)| (format!("mvm-console.{key}"), n)));
        }
        if let Some(rng) = &self.rng {
            counters.push(("mvm-rng.given".into(), rng.given()));
        }
        if let Some(balloon) = self.balloon.as_ref().map(|b| b.stats()) {
            counters.push(("mvm-balloon.target".into(), balloon.target));
            counters.push(("mvm-balloon.actual".into(), balloon.actual));
            counters.push(("mvm-balloon.inflated".into(), balloon.inflated));
            counters.push(("mvm-balloon.reported".into(), balloon.reported));
        }
        counters.extend(self.mem.iter().flat_map(|mem| memory::counters(mem)));
        if let Some(hypercalls) = &self.hypercalls {
            let all = hypercalls.counters();
            counters.extend(all.into_iter().map(|(name, n)| (format!("mvm-hvt.{name}"), n)));
        }
        counters
    }

    /// The end of what the guest has printed, as text.
    pub fn console_tail(&self) -> String {
        String::from_utf8_lossy(&self.serial.tail()).into_owned()
    }
}

/// The ports that a PC's kernel expects without being told, and those by which it ends its machine.
fn place_ports(
    events: mvm_devices::EventSink,
    exit_status: bool,
    old_pc: Option<&OldPc>,
    bus: &mut Bus,
) -> Result<(), BusError> {
    for (port, device) in SystemControl::ports(events.clone()) {
        let device: Arc<dyn BusDevice> = match old_pc {
            Some(old) if port == SystemControl::SYSTEM_B => Arc::new(old.pit.system_b()),
            _ => Arc::new(device),
        };
        bus.ports.insert("system-control", port, 1, device)?;
    }
    bus.ports.insert("post-code", PostCode::PORT, 1, Arc::new(PostCode::default()))?;
    let power = Arc::new(PowerControl::new(events.clone()));
    bus.ports.insert("power-control", layout::POWER_PORT, PowerControl::LEN, power)?;
    let exit = Arc::new(DebugExit::new(events.clone()));
    bus.ports.insert("debug-exit", DebugExit::PORT, DebugExit::LEN, exit)?;
    let off = Arc::new(match exit_status {
        true => PowerOff::exit_with_status(events.clone()),
        false => PowerOff::exit(events.clone()),
    });
    bus.ports.insert("power-off", PowerOff::EXIT, PowerOff::EXIT_LEN, off)?;
    let off = Arc::new(PowerOff::pm1_control(events));
    bus.ports.insert("power-off", PowerOff::PM1_CONTROL, PowerOff::PM1_LEN, off)
}

fn open_vsock(
    sockets: Sockets,
    on_hello: &Joined,
    events: &EventLoop,
) -> Result<Arc<Vsock>, VsockError> {
    let config = VsockConfig {
        name: "mvm-vsock".into(),
        guest_cid: sockets.cid,
        listener: sockets.listener,
    };
    let vsock = Vsock::new(config, events)?;
    for (port, stream) in sockets.guest_ports {
        vsock.join(port, stream, on_hello.clone())?;
    }
    if let Some(dialer) = sockets.dialer {
        vsock.dial_by(dialer);
    }
    Ok(vsock)
}

/// The pin of interrupt `gsi`.
fn pin(ioapic: &Arc<IoApic>, gsi: u32) -> Result<IoApicPin, Error> {
    let pin = u8::try_from(gsi).ok().and_then(|pin| ioapic.pin(pin));
    pin.ok_or(Error::NoInterrupt(gsi))
}

/// The input of the old controllers for interrupt `gsi`, if they have one.
fn old_pin(pic: &Arc<Pic>, gsi: u32) -> Option<PicPin> {
    u8::try_from(gsi).ok().and_then(|irq| pic.pin(irq))
}

/// The wire of interrupt `gsi`.
fn line(
    ioapic: &Arc<IoApic>,
    old_pc: Option<&OldPc>,
    gsi: u32,
) -> Result<Arc<dyn InterruptLine>, Error> {
    let ioapic = pin(ioapic, gsi)?;
    Ok(match old_pc.and_then(|old| old_pin(&old.pic, gsi)) {
        Some(pic) => Arc::new(IsaLine { pic, ioapic }),
        None => Arc::new(ioapic),
    })
}

/// What a machine does when a device reports an event: it ends.
pub(crate) fn end_reason(event: VmEvent) -> crate::EndReason {
    match event {
        VmEvent::Reset => crate::EndReason::Reset,
        VmEvent::PowerOff => crate::EndReason::PowerOff,
        VmEvent::Halt { status, cookie } => crate::EndReason::GuestHalt { status, cookie },
        VmEvent::BadHypercall { number, address, why } => crate::EndReason::BadHypercall {
            fault: format!("number {number} with its arguments at {address:#x}: {why}"),
        },
        VmEvent::DebugExit(value) => crate::EndReason::DebugExit { status: value << 1 | 1 },
    }
}

impl std::fmt::Debug for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parts").field("console_ring", &self.console_ring).finish_non_exhaustive()
    }
}
