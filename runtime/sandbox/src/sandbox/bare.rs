//! Machines without our agent: unikernels, and whole systems with a kernel and an init of their own.
//!
//! The start is the load, the serial console is the output, and the end of the machine is the end of
//! the run: nothing in the guest is asked, and nothing is waited for.

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use mvm_vmm::Outcome;
use mvm_vmm::config::{BootProtocol, CmdlineStyle, CpuModel, HugePages};
use mvm_vmm::monitor::Event;
use mvm_vmm::monitor::protocol::Phase;
use nix::unistd::Pid;

use super::Sandbox;
use crate::engine::Selection;
use crate::error::Error;
use crate::machine::{
    Draft, Hardware, LAST_WORDS, Launcher, Machine, Payload, boot_error, died, readable,
};
use crate::network::Network;
use crate::procid::ProcessId;
use crate::state::{Status, now_ms};
use crate::timings::Timings;
use crate::vsock;

/// How long loading a kernel may take: reading a large one from a slow disk, not running it.
const LOAD: Duration = Duration::from_secs(60);

/// A disk of a bare machine.
#[derive(Debug)]
pub struct Disk {
    /// Raw image or block device.
    pub file: File,
    /// The guest may not write.
    pub read_only: bool,
}

/// A bare machine to be started. Everything in it is open already.
#[derive(Debug)]
pub struct BarePlan {
    /// vCPUs.
    pub vcpus: u32,
    /// Guest memory in bytes.
    pub memory: u64,
    /// The host's pages that it is made of.
    pub hugepages: HugePages,
    /// What runs it.
    pub engine: Selection,
    /// The processor that the guest sees, if it matters.
    pub cpu: Option<CpuModel>,
    /// The kernel.
    pub kernel: Payload,
    /// Its initrd or first module.
    pub initrd: Option<Payload>,
    /// Further modules, with what the kernel is told of each.
    pub modules: Vec<(Payload, String)>,
    /// Its command line.
    pub cmdline: String,
    /// What is told on the command line besides.
    pub style: CmdlineStyle,
    /// How it is entered.
    pub boot: BootProtocol,
    /// Whether it writes its status to port 0x501.
    pub exit_status: bool,
    /// Its disks, in the order of their names in the guest.
    pub disks: Vec<Disk>,
    /// Whether something is to be typed at its serial port.
    pub input: bool,
    /// Where host processes find the guest's sockets; without it the machine has no such device.
    pub vsock: Option<PathBuf>,
}

/// Our ends of a bare machine's serial port.
#[derive(Debug)]
pub struct SerialLine {
    /// What the guest writes comes out of it.
    pub output: UnixStream,
    /// What is written to it is typed at the guest's port, if that was asked for. Its end means
    /// nothing to the guest.
    pub input: Option<UnixStream>,
}

/// Why [`Sandbox::wait_machine`] returned.
#[derive(Debug)]
pub enum Woken {
    /// The machine ended.
    Ended(Outcome),
    /// The descriptor of this index became readable.
    Other(usize),
}

impl Sandbox {
    /// Loads the kernel and starts the machine. `interrupt` ends the load when it becomes readable.
    pub fn start_bare(
        &mut self,
        launcher: &dyn Launcher,
        plan: BarePlan,
        command: Vec<String>,
        timings: &mut Timings,
        interrupt: BorrowedFd<'_>,
    ) -> Result<SerialLine, Error> {
        let begun = Instant::now();
        let started = self.try_start_bare(launcher, plan, command, timings, interrupt);
        self.count_boot(&started, begun, timings);
        started
    }

    fn try_start_bare(
        &mut self,
        launcher: &dyn Launcher,
        plan: BarePlan,
        command: Vec<String>,
        timings: &mut Timings,
        interrupt: BorrowedFd<'_>,
    ) -> Result<SerialLine, Error> {
        self.note_engine(&plan.engine);
        self.state.bare = true;
        self.state.command = command;
        let pair = || UnixStream::pair().map_err(Error::io("socketpair"));
        let (output, console) = pair()?;
        let (input, typed) = if plan.input { Some(pair()?).unzip() } else { (None, None) };
        let port = (console.into(), typed.map(OwnedFd::from));
        let mut draft = plan.draft(&self.place, port)?;
        let cards = self.network.as_mut().map(Network::take_cards).unwrap_or_default();
        cards.into_iter().for_each(|card| draft.net(card));
        let machine = draft.launch(launcher, &self.place)?;
        self.state.monitor = ProcessId::of(machine.pid()).ok();
        self.save()?;
        timings.watch(Pid::from_raw(machine.pid().cast_signed()));
        let machine = self.machine.insert(machine);
        if let Err(e) = wait_loaded(machine.as_mut(), timings, interrupt) {
            // Why it did not start is what matters, not whether it was still there.
            let _ = machine.end();
            return Err(e);
        }
        self.state.status = Status::Running;
        self.state.started = Some(now_ms());
        self.save()?;
        Ok(SerialLine { output, input })
    }

    /// Waits until the started machine has ended or one of `others` is readable.
    pub fn wait_machine(
        &mut self,
        timings: &mut Timings,
        others: &[BorrowedFd<'_>],
    ) -> Result<Woken, Error> {
        let Some(machine) = self.machine.as_deref_mut() else {
            return Ok(Woken::Ended(died("it was not started".into())));
        };
        loop {
            let mut fds = vec![machine.channel()];
            fds.extend(others);
            let ready = readable(&fds, None)?;
            if ready.first() == Some(&true) {
                match machine.next_event(Some(Instant::now() + LAST_WORDS)) {
                    Ok(Some(Event::Ended(outcome))) => {
                        self.failed = !outcome.reason.is_orderly();
                        return Ok(Woken::Ended(outcome));
                    }
                    Ok(Some(Event::Failed { message })) => {
                        self.failed = true;
                        return Ok(Woken::Ended(died(message)));
                    }
                    Ok(Some(Event::Phase(mark))) => timings.mark_monitor(mark),
                    Ok(Some(Event::Engine { .. } | Event::Boot { .. }) | None) => {}
                    Err(e) => {
                        self.failed = true;
                        return Ok(Woken::Ended(died(e.to_string())));
                    }
                }
            } else if let Some(index) = ready.iter().skip(1).position(|r| *r) {
                return Ok(Woken::Other(index));
            }
        }
    }
}

impl BarePlan {
    /// `port` is where the serial port's output goes, and where its input comes from.
    fn draft(
        self,
        place: &crate::registry::Place,
        port: (OwnedFd, Option<OwnedFd>),
    ) -> Result<Draft, Error> {
        let Self { vcpus, memory, hugepages, engine, cpu, kernel, initrd, .. } = self;
        let hardware =
            Hardware { vcpus, memory, hugepages, engine, cpu, kernel, initramfs: initrd };
        let mut draft = Draft::new(place, hardware)?;
        draft.config.cmdline = self.cmdline;
        draft.config.cmdline_style = self.style;
        draft.config.boot = self.boot;
        draft.config.exit_status = self.exit_status;
        for (index, disk) in self.disks.into_iter().enumerate() {
            draft.disk(disk.file, disk.read_only, format!("disk{index}"));
        }
        for (payload, text) in self.modules {
            draft.module(payload, text);
        }
        let (console, typed) = port;
        draft.console(console);
        if let Some(typed) = typed {
            draft.console_input(typed);
        }
        if let Some(path) = &self.vsock {
            draft.sockets(vsock::open(&place.dir, path)?);
        }
        Ok(draft)
    }
}

/// Waits until the kernel is in guest memory and its processors start.
fn wait_loaded(
    machine: &mut dyn Machine,
    timings: &mut Timings,
    interrupt: BorrowedFd<'_>,
) -> Result<(), Error> {
    let deadline = Instant::now() + LOAD;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let message = format!("the kernel was not loaded within {} s", LOAD.as_secs());
            return Err(Error::Boot { message, console: None });
        }
        let ready = readable(&[machine.channel(), interrupt], Some(left))?;
        if ready.get(1) == Some(&true) {
            return Err(Error::Interrupted);
        }
        if ready.first() != Some(&true) {
            continue;
        }
        match machine.next_event(Some(Instant::now() + LAST_WORDS))? {
            Some(Event::Phase(mark)) => {
                timings.mark_monitor(mark);
                if mark.phase == Phase::KernelPlaced {
                    return Ok(());
                }
            }
            Some(Event::Engine { .. } | Event::Boot { .. }) | None => {}
            Some(Event::Failed { message }) => return Err(Error::Boot { message, console: None }),
            Some(Event::Ended(outcome)) => return Err(boot_error(outcome)),
        }
    }
}
