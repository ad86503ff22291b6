//! A machine in this process: RAM, devices, vCPUs, from its parts to its end.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use mvm_devices::{DeviceStats, Gate};
use mvm_engine::cpuid::{self, CpuModel};
use mvm_engine::{Engine, EngineMetrics, Vcpu, Vm, VmConfig};
use mvm_memory::GuestRam;
use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemory as _, GuestMemoryRegion as _};

use crate::boot::{self, CmdlineParts, Facts, Kernel};
use crate::bus::MachineBus;
use crate::config::{BootProtocol, CmdlineStyle, HugePages, mib};
use crate::devices::{self, Devices, HvtGuest, Platform};
use crate::events::{self, Events, Notifier};
use crate::layout;
use crate::monitor::protocol::Phase;
use crate::outcome::{EndReason, Outcome};
use crate::vcpu_thread::{Control, VcpuThreads};
use crate::wires;

mod state;

pub use crate::boot::{Module, Section};
pub use crate::devices::{Disk, NetCard, SharedFiles, SlotError, Sockets, VirtioConsole};
pub use state::{MachineState, Pauser};

/// How long the vCPUs have for coming to a stop: far more than one instruction or one host write
/// takes, even on a crowded host.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// Why a machine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No guest RAM.
    #[error(transparent)]
    Memory(#[from] mvm_memory::Error),
    /// Kernel, initramfs or command line cannot be used.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// A device cannot be made.
    #[error(transparent)]
    Devices(#[from] devices::Error),
    /// The engine refuses.
    #[error(transparent)]
    Engine(#[from] mvm_engine::Error),
    /// A device cannot be attached to the engine.
    #[error(transparent)]
    Wires(#[from] wires::Error),
    /// The host refuses a thread or a descriptor.
    #[error("{what}: {source}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// The processor asked for is more than what there is.
    #[error(
        "--cpu {model}: engine {engine} cannot show {} on this host; leave --cpu out to get what there is",
        lacking.join(", ")
    )]
    Cpu {
        /// The model asked for.
        model: CpuModel,
        /// Name of the engine.
        engine: &'static str,
        /// Features that are not there, by Linux' names.
        lacking: Vec<&'static str>,
    },
    /// A state cannot be taken from a machine that runs or has ended.
    #[error("the machine does not stand still: pause it first")]
    NotPaused,
    /// A state does not belong to a machine of these parts.
    #[error("cannot go on from this state: {0}")]
    State(String),
    /// It was made to stay as it is.
    #[error(
        "the machine was made with all the memory that it can have: its size cannot be changed while it runs (memory-max \
         says how far one can grow)"
    )]
    CannotGrow,
    /// More than it was made for.
    #[error(
        "{} of memory are more than the {} that the machine can grow to (memory-max, when it was started)",
        mib(*asked), mib(*max)
    )]
    TooLarge {
        /// Bytes asked for.
        asked: u64,
        /// Bytes there can be.
        max: u64,
    },
    /// The vCPUs did not come to a stop.
    #[error("the vCPUs did not stop within {} seconds", STOP_DEADLINE.as_secs())]
    DoesNotStop,
}

/// What a machine is made from, with everything open.
pub struct Parts {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// The processor that the guest sees; `None` for the most that engine and host have in common.
    pub cpu: Option<CpuModel>,
    /// Guest RAM in bytes.
    pub memory: u64,
    /// Guest RAM that it can grow to, in bytes; not more than `memory` where it cannot.
    pub memory_max: u64,
    /// The host's pages that it is made of.
    pub hugepages: HugePages,
    /// The kernel's file.
    pub kernel: Section,
    /// How it is entered.
    pub boot: BootProtocol,
    /// The initramfs, or the first module of a kernel that has modules.
    pub initramfs: Option<Section>,
    /// Further modules.
    pub modules: Vec<Module>,
    /// The user's part of the kernel command line.
    pub cmdline: String,
    /// What the command line holds besides it.
    pub cmdline_style: CmdlineStyle,
    /// What the kernel writes to port 0x501 is its status; otherwise it only switches itself off there.
    pub exit_status: bool,
    /// Let the kernel tell of its progress.
    pub verbose: bool,
    /// Block devices in the order of their names in the guest (`/dev/vda`, ...).
    pub disks: Vec<Disk>,
    /// Network devices in the order of their names in the guest.
    pub nets: Vec<NetCard>,
    /// Sockets between host and guest.
    pub vsock: Option<Sockets>,
    /// Where the serial console's output goes. Must not block for long: the guest waits.
    pub console: Box<dyn Write + Send>,
    /// Bytes of console output kept for the [`Outcome`].
    pub console_ring: usize,
    /// What is typed at the serial console; the open file is made non-blocking.
    pub console_input: Option<OwnedFd>,
    /// A second console, the guest's `/dev/hvc0`.
    pub virtio_console: Option<VirtioConsole>,
    /// The file system that the host shares.
    pub fs: Option<SharedFiles>,
}

impl Parts {
    /// One vCPU, nothing but kernel and RAM, console output kept but shown nowhere.
    pub fn new(memory: u64, kernel: Section) -> Self {
        Self {
            vcpus: 1,
            cpu: None,
            memory,
            memory_max: 0,
            hugepages: HugePages::default(),
            kernel,
            boot: BootProtocol::Auto,
            initramfs: None,
            modules: Vec::new(),
            cmdline: String::new(),
            cmdline_style: CmdlineStyle::Auto,
            exit_status: false,
            verbose: false,
            disks: Vec::new(),
            nets: Vec::new(),
            vsock: None,
            console: Box::new(io::sink()),
            console_ring: 16 * 1024,
            console_input: None,
            virtio_console: None,
            fs: None,
        }
    }
}

/// A machine. Dropping it ends it.
pub struct Machine {
    vm: Arc<dyn Vm>,
    ram: GuestRam,
    devices: Devices,
    bus: Arc<MachineBus>,
    control: Arc<Control>,
    threads: VcpuThreads,
    notifier: Arc<Notifier>,
    boot: BootProtocol,
}

impl Machine {
    /// Makes a machine that is ready to run, and the channel on which it tells what happens.
    ///
    /// # Errors
    /// [`Error`]; nothing is left behind.
    pub fn new(engine: &dyn Engine, parts: Parts) -> Result<(Self, Events), Error> {
        let cpu = parts.cpu;
        let (frame, cargo) = Frame::build(engine, parts, cpu.unwrap_or_default(), None)?;
        if let Some(model) = cpu {
            check_model(engine, model, &*frame.vm)?;
        }
        let boot = cargo.kernel.protocol();
        let entry = frame.place(cargo)?;
        let mut vcpus = frame.create_vcpus()?;
        if let Some(first) = vcpus.first_mut() {
            let mut state = first.state()?;
            entry.apply(&mut state);
            if frame.devices.old_pc.is_some() {
                boot::connect_pic(&mut state.lapic);
            }
            first.set_state(&state)?;
        }
        frame.finish(vcpus, boot)
    }

    /// Lets the vCPUs run, for the first time or after [`Machine::pause`].
    pub fn start(&self) {
        self.notifier.phase(Phase::KernelPlaced);
        self.control.resume();
    }

    /// Stops the vCPUs between two instructions, and the devices.
    ///
    /// # Errors
    /// [`Error::DoesNotStop`].
    pub fn pause(&self) -> Result<(), Error> {
        if !self.control.pause(Instant::now() + STOP_DEADLINE) {
            return Err(Error::DoesNotStop);
        }
        self.devices.pause();
        Ok(())
    }

    /// Lets vCPUs and devices go on.
    pub fn resume(&self) {
        self.devices.resume();
        self.control.resume();
    }

    /// Ends the machine; [`EndReason`] is what the events tell unless it has ended already.
    pub fn end(&self, reason: EndReason) {
        self.control.end(reason);
    }

    /// Whether the vCPUs are meant to run.
    pub fn is_running(&self) -> bool {
        self.control.is_running()
    }

    /// Whether the machine has ended.
    pub fn has_ended(&self) -> bool {
        self.control.has_ended()
    }

    /// Puts a disk into one of the places that are kept for such ([`Disk::file`]). Returns which: the number of its
    /// register window, by which a guest finds it after looking there again. (Linux: `virtio-mmio.NUMBER`, to be bound
    /// to the driver.)
    ///
    /// # Errors
    /// [`SlotError`].
    pub fn plug(&self, file: File, read_only: bool) -> Result<u32, SlotError> {
        self.devices.plug(file, read_only)
    }

    /// Takes a disk out, of which the guest has let go.
    ///
    /// # Errors
    /// [`SlotError::NoDisk`].
    pub fn unplug(&self, place: u32) -> Result<(), SlotError> {
        self.devices.unplug(place)
    }

    /// Its size now, what it is asked to have, and what it can have.
    pub fn memory(&self) -> MemorySize {
        let boot = self.ram.size();
        match self.devices.memory_growth() {
            Some(growth) => MemorySize {
                started: boot,
                now: boot + growth.plugged,
                wanted: boot + growth.requested,
                max: boot + growth.region,
            },
            None => MemorySize { started: boot, now: boot, wanted: boot, max: boot },
        }
    }

    /// Asks the guest to make the machine's memory `bytes` in all, rounded up to whole blocks of 2 MiB, as far as it is
    /// not less than what it was started with. What it does about it [`Machine::memory`] tells: a guest that is to
    /// give memory back keeps what it cannot do without.
    ///
    /// # Errors
    /// [`Error::CannotGrow`], [`Error::TooLarge`], or the host fails.
    pub fn resize(&self, bytes: u64) -> Result<(), Error> {
        let MemorySize { now, max, .. } = self.memory();
        let Some(device) = &self.devices.mem else {
            // The same again is no change.
            return if bytes <= now { Ok(()) } else { Err(Error::CannotGrow) };
        };
        let more = bytes.saturating_sub(self.ram.size());
        let too_large = |_| Error::TooLarge { asked: bytes, max };
        device.make_usable(more).map_err(too_large)?;
        // The engine first: the guest uses what it is told of at once.
        self.vm.ram_grew()?;
        device.request(more).map_err(too_large)
    }

    /// How its kernel was entered; never [`BootProtocol::Auto`].
    pub fn boot_protocol(&self) -> BootProtocol {
        self.boot
    }

    /// The end of what the guest has printed.
    pub fn console_tail(&self) -> String {
        self.devices.console_tail()
    }

    /// What the engine counts.
    pub fn engine_metrics(&self) -> EngineMetrics {
        self.vm.metrics()
    }

    /// Bytes of memory for code that the engine made.
    pub fn code_memory(&self) -> u64 {
        self.vm.code_memory()
    }

    /// Accesses that each device has answered: ports, then memory.
    pub fn device_stats(&self) -> Vec<DeviceStats> {
        let bus = self.bus.devices();
        bus.ports.stats().into_iter().chain(bus.memory.stats()).collect()
    }

    /// What the devices count: name and value.
    pub fn device_counters(&self) -> Vec<(String, u64)> {
        self.devices.counters()
    }

    /// Processor time that each vCPU has used.
    pub fn vcpu_times(&self) -> Vec<Duration> {
        self.control.cpu_times()
    }

    /// Bytes of guest RAM that the host has pages for.
    pub fn resident_ram(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let blocks = |file: &File| file.metadata().map_or(0, |m| m.blocks());
        let files = self.ram.memory().iter().filter_map(|r| r.file_offset());
        files.map(|f| blocks(f.file()) * 512).sum()
    }

    /// Ends the machine if it has not ended, waits for its threads, and says how it went.
    ///
    /// `reason` is what [`MachineEvent::Ended`](crate::MachineEvent::Ended) told.
    ///
    /// # Errors
    /// [`Error::DoesNotStop`].
    pub fn finish(mut self, reason: EndReason) -> Result<Outcome, Error> {
        if !self.threads.stop(Instant::now() + STOP_DEADLINE) {
            return Err(Error::DoesNotStop);
        }
        Ok(Outcome { reason, console_tail: self.console_tail() })
    }
}

/// A machine's memory, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemorySize {
    /// What it was started with, and does not give back.
    pub started: u64,
    /// What it has.
    pub now: u64,
    /// What it was asked to have.
    pub wanted: u64,
    /// The most that it can have.
    pub max: u64,
}

/// What of a machine's parts goes into guest memory.
struct Cargo {
    kernel: Kernel,
    modules: Vec<Module>,
    cmdline: String,
    cmdline_style: CmdlineStyle,
    verbose: bool,
}

/// A machine without vCPUs.
struct Frame {
    vm: Arc<dyn Vm>,
    ram: GuestRam,
    vcpus: u32,
    exit_status: bool,
    devices: Devices,
    bus: Arc<MachineBus>,
    gate: Arc<Gate>,
    notifier: Arc<Notifier>,
    events: Events,
    /// What devices end, when there is something.
    ending: Arc<OnceLock<Weak<Control>>>,
}

impl Frame {
    /// Makes devices and the engine's machine, over `ram` if it is given.
    fn build(
        engine: &dyn Engine,
        parts: Parts,
        cpu: CpuModel,
        ram: Option<GuestRam>,
    ) -> Result<(Self, Cargo), Error> {
        let (notifier, events) =
            events::channel().map_err(|source| Error::Host { what: "eventfd", source })?;
        let notifier = Arc::new(notifier);
        let kernel = Kernel::open(parts.kernel, parts.boot)?;
        let ram = match ram {
            Some(ram) => ram,
            None => {
                let growth = layout::growth(parts.memory, parts.memory_max);
                let ranges = layout::ram_ranges(parts.memory);
                GuestRam::growing(&ranges, growth, parts.hugepages.into())?
            }
        };

        // Devices come before the vCPUs that they end. They do not keep them: the vCPUs' kickers may
        // keep the bus and so the devices.
        let ending = Arc::new(OnceLock::<Weak<Control>>::new());
        let on_lost = {
            let ending = ending.clone();
            Arc::new(move |fault: &str| {
                if let Some(control) = ending.get().and_then(Weak::upgrade) {
                    control.end(EndReason::DeviceLost { fault: fault.to_owned() });
                }
            })
        };
        let on_event = {
            let ending = ending.clone();
            Arc::new(move |event| {
                if let Some(control) = ending.get().and_then(Weak::upgrade) {
                    control.end(devices::end_reason(event));
                }
            })
        };
        let device_parts = devices::Parts {
            console: parts.console,
            console_ring: parts.console_ring,
            console_input: parts.console_input,
            virtio_console: parts.virtio_console,
            disks: parts.disks,
            nets: parts.nets,
            vsock: parts.vsock,
            exit_status: parts.exit_status,
            old_pc: !kernel.cmdline_style(parts.cmdline_style).is_linux(),
            fs: parts.fs,
            on_lost,
            on_hello: Arc::new({
                let notifier = notifier.clone();
                move || notifier.phase(Phase::GuestHello)
            }),
            on_event,
        };
        let gate = Arc::new(Gate::new());
        let platform = match (kernel.manifest(), kernel.protocol()) {
            (Some(manifest), _) => Platform::Hypercalls(HvtGuest { manifest, gate: &gate }),
            (None, BootProtocol::Multiboot | BootProtocol::Pvh) => Platform::EmulatedPc,
            (None, _) => Platform::Pc,
        };
        let (devices, bus) = Devices::build(device_parts, &platform, &ram)?;
        let pic = devices.old_pc.as_ref().map(|old| old.pic.clone());
        let bus = Arc::new(MachineBus::new(bus, devices.ioapic.clone(), pic, notifier.clone()));
        let vcpus = parts.vcpus;
        let config = VmConfig { vcpus, cpu, ram: ram.clone(), io: bus.clone() };
        let vm = engine.create_vm(config)?;
        devices.sink.connect(&vm);
        devices.virtio.attach(&*vm)?;
        let cargo = Cargo {
            kernel,
            modules: parts.initramfs.map(Module::from).into_iter().chain(parts.modules).collect(),
            cmdline: parts.cmdline,
            cmdline_style: parts.cmdline_style,
            verbose: parts.verbose,
        };
        let exit_status = parts.exit_status;
        Ok((
            Self { vm, ram, vcpus, exit_status, devices, bus, gate, notifier, events, ending },
            cargo,
        ))
    }

    /// Fills guest memory.
    fn place(&self, cargo: Cargo) -> Result<boot::Entry, Error> {
        let Cargo { kernel, modules, cmdline, .. } = cargo;
        let cmdline = self.cmdline_parts(&kernel, cargo.cmdline_style, cargo.verbose, &cmdline);
        let attached = self.devices.attached();
        Ok(kernel.place(&self.facts(&attached), modules, &cmdline)?)
    }

    /// Tells of what [`Frame::place`] has filled it with in another machine. Returns how the kernel was entered.
    fn tell_again(&self, cargo: Cargo) -> Result<BootProtocol, Error> {
        let Cargo { kernel, modules, cmdline, .. } = cargo;
        let cmdline = self.cmdline_parts(&kernel, cargo.cmdline_style, cargo.verbose, &cmdline);
        kernel.tell_again(&self.facts(&[]), modules, &cmdline)?;
        Ok(kernel.protocol())
    }

    fn cmdline_parts<'a>(
        &self,
        kernel: &Kernel,
        style: CmdlineStyle,
        verbose: bool,
        extra: &'a str,
    ) -> CmdlineParts<'a> {
        CmdlineParts {
            style: kernel.cmdline_style(style),
            verbose,
            high_memory: self.ram.boot_regions().count() > 1,
            grows: self.devices.mem.is_some(),
            virtio_devices: self.devices.virtio.len() as u32,
            extra,
        }
    }

    fn facts<'a>(&'a self, attached: &'a [boot::Attached]) -> Facts<'a> {
        Facts {
            ram: &self.ram,
            vcpus: self.vcpus,
            tsc_khz: self.vm.tsc_khz(),
            attached,
            fw_cfg: self.devices.fw_cfg.as_deref(),
            pic: self.devices.old_pc.is_some(),
            exit_status: self.exit_status,
        }
    }

    fn create_vcpus(&self) -> Result<Vec<Box<dyn Vcpu>>, Error> {
        (0..self.vcpus).map(|index| Ok(self.vm.create_vcpu(index)?)).collect()
    }

    /// Gives the vCPUs their threads; they stand still.
    fn finish(
        self,
        vcpus: Vec<Box<dyn Vcpu>>,
        boot: BootProtocol,
    ) -> Result<(Machine, Events), Error> {
        let Self { vm, ram, devices, bus, gate, notifier, events, ending, .. } = self;
        let kicks = vcpus.iter().map(|v| v.kicker()).collect();
        let control = Control::new(kicks, gate, notifier.clone());
        ending.get_or_init(|| Arc::downgrade(&control));
        let threads = VcpuThreads::start(control.clone(), vcpus)
            .map_err(|source| Error::Host { what: "start a vCPU thread", source })?;
        Ok((Machine { vm, ram, devices, bus, control, threads, notifier, boot }, events))
    }
}

/// Refuses to call `model` what shows less.
fn check_model(engine: &dyn Engine, model: CpuModel, vm: &dyn Vm) -> Result<(), Error> {
    let lacking = cpuid::lacking(model, &vm.cpuid(0));
    if lacking.is_empty() {
        return Ok(());
    }
    Err(Error::Cpu { model, engine: engine.name(), lacking })
}

impl Drop for Machine {
    fn drop(&mut self) {
        if !self.threads.stop(Instant::now() + STOP_DEADLINE) {
            tracing::error!("a vCPU does not stop; its thread is left behind");
        }
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine").field("vm", &self.vm).finish_non_exhaustive()
    }
}

impl fmt::Debug for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parts")
            .field("vcpus", &self.vcpus)
            .field("memory", &self.memory)
            .field("kernel", &self.kernel)
            .field("initramfs", &self.initramfs)
            .field("cmdline", &self.cmdline)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
