//! The life of one sandbox, as the front door that owns it leads it: created, booted, started,
//! finished. Whatever happens in between, dropping it leaves no machine behind.

mod bare;

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use mvm_agent_protocol::rpc::CallError;
use mvm_fs::ShareClient;
use mvm_vmm::monitor::ControlClient;

pub use bare::{BarePlan, Disk, SerialLine, Woken};

use crate::ending::{self, Ending};
use crate::engine::Selection;
use crate::error::{EXIT_FAILURE, Error};
use crate::guest::{Exit, Guest, Stdio, Streams, program};
use crate::machine::{self, LAST_WORDS, Launcher, Machine, MachinePlan};
use crate::metrics::{self, End};
use crate::network::{self, Names, Network, Wish};
use crate::procid::{PidFd, ProcessId, boot_id};
use crate::registry::{Place, Registry};
use crate::spec::{self, Container};
use crate::state::{EngineChoice, SPEC_FILE, STATE_VERSION, State, Status, now_ms};
use crate::timings::Timings;
use crate::unikernel::Addresses;
use crate::vsock;

/// The phases of a start, as [`Timings`] names them: what a front door does before is not among them.
const BOOT_PHASES: [&str; 4] = ["monitor", "kernel placed", "kernel up", "agent ready"];

/// What is recorded about a sandbox from the beginning.
#[derive(Debug, Clone, Default)]
pub struct Description {
    /// Its name, or `None` for a made-up one.
    pub name: Option<String>,
    /// The image as the user wrote it.
    pub image: String,
    /// Digest of the image's manifest.
    pub image_digest: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// vCPUs.
    pub vcpus: u32,
    /// Memory in bytes.
    pub memory: u64,
    /// Whether the process has a terminal.
    pub tty: bool,
    /// Whether it runs in the background.
    pub detached: bool,
    /// Whether it is removed at its end.
    pub auto_remove: bool,
    /// The signal that asks the process to end.
    pub stop_signal: i32,
    /// Seconds between that signal and SIGKILL.
    pub stop_timeout: u32,
}

/// A sandbox owned by this process.
#[derive(Debug)]
pub struct Sandbox {
    registry: Registry,
    place: Place,
    state: State,
    machine: Option<Box<dyn Machine>>,
    guest: Option<Guest>,
    network: Option<Network>,
    /// The machine ended by itself, and not as it should.
    failed: bool,
    finished: bool,
}

impl Sandbox {
    /// Makes a sandbox; no machine runs yet.
    pub fn create(registry: &Registry, about: Description) -> Result<Self, Error> {
        let owner = ProcessId::current().map_err(Error::io("cannot read /proc/self/stat"))?;
        let (place, state) = registry.create(about.name.as_deref(), |place, name| State {
            version: STATE_VERSION,
            id: place.id.clone(),
            name: name.to_owned(),
            image: about.image,
            image_digest: about.image_digest,
            command: Vec::new(),
            labels: about.labels,
            status: Status::Creating,
            exit_code: None,
            oom_killed: false,
            reason: None,
            created: now_ms(),
            started: None,
            finished: None,
            engine: EngineChoice::default(),
            vcpus: about.vcpus,
            memory: about.memory,
            bare: false,
            network: Vec::new(),
            tty: about.tty,
            detached: about.detached,
            auto_remove: about.auto_remove,
            stop_signal: about.stop_signal,
            stop_timeout: about.stop_timeout,
            boot_id: boot_id(),
            owner,
            monitor: None,
        })?;
        let sandbox = Self {
            registry: registry.clone(),
            place,
            state,
            machine: None,
            guest: None,
            network: None,
            failed: false,
            finished: false,
        };
        let path = sandbox.place.dir.display().to_string();
        ending::prepare(&sandbox.place.dir).map_err(Error::io(path))?;
        Ok(sandbox)
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.state.id
    }

    /// Its places on disk.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// What is known of it.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Makes the network that the machine will have, before it is started. Returns what the guest's
    /// files say of it.
    pub fn connect(&mut self, wish: &Wish) -> Result<Option<Names>, Error> {
        self.network = Network::set_up(&self.place, wish, self.state.vcpus)?;
        let Some(network) = &self.network else { return Ok(None) };
        self.state.network = network.summary();
        let names = network.names();
        self.save()?;
        Ok(Some(names))
    }

    /// What a guest without an agent is told of the network that [`Sandbox::connect`] made.
    pub fn addresses(&self) -> Option<Addresses> {
        self.network.as_ref().map(Network::addresses)
    }

    /// Starts the machine and waits until its agent is ready. `interrupt` ends the wait when it
    /// becomes readable.
    pub fn boot(
        &mut self,
        launcher: &dyn Launcher,
        plan: MachinePlan,
        timings: &mut Timings,
        interrupt: Option<BorrowedFd<'_>>,
    ) -> Result<(), Error> {
        let begun = Instant::now();
        let booted = self.try_boot(launcher, plan, timings, interrupt);
        self.count_boot(&booted, begun, timings);
        booted
    }

    fn count_boot<T>(&self, booted: &Result<T, Error>, begun: Instant, timings: &Timings) {
        let (engine, took) = (&self.state.engine.name, begun.elapsed());
        let phases = || timings.spans().into_iter().filter(|s| BOOT_PHASES.contains(&s.phase));
        metrics::count(self.registry.layout(), |counters| match booted {
            Ok(_) => counters.booted(engine, took, &phases().collect::<Vec<_>>()),
            // Nobody waited for it any more.
            Err(Error::Interrupted) => {}
            Err(_) => counters.failed(engine),
        });
    }

    fn try_boot(
        &mut self,
        launcher: &dyn Launcher,
        plan: MachinePlan,
        timings: &mut Timings,
        interrupt: Option<BorrowedFd<'_>>,
    ) -> Result<(), Error> {
        self.note_engine(&plan.engine);
        let cards = self.network.as_mut().map(Network::take_cards).unwrap_or_default();
        let starting = machine::launch(launcher, &self.place, plan, cards)?;
        self.state.monitor = ProcessId::of(starting.pid()).ok();
        self.save()?;
        let machine = starting.wait_ready(timings, interrupt)?;
        self.machine = Some(machine);
        let guest = Guest::connect(&self.place.dir, &self.state.id)?;
        if let Some(network) = &self.network {
            guest.configure_network(network.messages())?;
        }
        self.guest = Some(guest);
        Ok(())
    }

    fn note_engine(&mut self, chosen: &Selection) {
        self.state.engine = EngineChoice {
            name: chosen.engine.name().to_owned(),
            reason: chosen.reason.clone(),
            fallback: chosen.fallback,
        };
    }

    /// The agent of a booted sandbox.
    pub fn guest(&self) -> Result<&Guest, Error> {
        self.guest.as_ref().ok_or_else(|| Error::WrongStatus {
            name: self.state.name.clone(),
            status: self.state.status.word(),
            advice: "its machine has not been started",
        })
    }

    /// Sets up the container in the booted machine, joins its streams and starts its process.
    /// `notices` takes what the guest will not honour.
    pub fn start(
        &mut self,
        container: &Container,
        stdio: Stdio,
        init: bool,
        notices: &mut Vec<String>,
    ) -> Result<Streams, Error> {
        let started = self.try_start(container, stdio, init, notices);
        started.map_err(|e| self.explain(e))
    }

    fn try_start(
        &mut self,
        container: &Container,
        stdio: Stdio,
        init: bool,
        notices: &mut Vec<String>,
    ) -> Result<Streams, Error> {
        let guest = self.guest()?.clone();
        // For those who run further processes in it.
        let path = self.place.dir.join(SPEC_FILE);
        container.spec.save(&path).map_err(spec::Error::from)?;
        notices.extend(guest.create(container, stdio, init)?);
        let streams = guest.attach("", stdio)?;
        guest.patient(container.hooks_limit()).start("", &program(&container.spec))?;
        let process = container.spec.process().as_ref();
        self.state.command = process.and_then(|p| p.args().clone()).unwrap_or_default();
        self.state.status = Status::Running;
        self.state.started = Some(now_ms());
        self.save()?;
        Ok(streams)
    }

    /// Records that the machine is there for containers to come.
    pub fn stand_by(&mut self) -> Result<(), Error> {
        self.state.status = Status::Running;
        self.state.started = Some(now_ms());
        self.save()
    }

    /// A connection to the file server of the booted machine.
    pub fn shares(&self) -> Result<ShareClient, Error> {
        let path = self.place.dir.join(machine::SHARES_SOCKET);
        let connected = crate::socket::with_short(&path, |p| Ok(ShareClient::connect(p)));
        Ok(connected.map_err(Error::io(path.display().to_string()))??)
    }

    /// Has the guest write everything out and end by itself, which may take it up to `limit`. For disks
    /// that somebody reads afterwards.
    pub fn power_off(&mut self, limit: Duration) -> Result<(), Error> {
        let started = Instant::now();
        self.guest()?.within(limit).shut_down()?;
        if let Some(process) = self.monitor()? {
            let left = limit.saturating_sub(started.elapsed());
            process.wait_ended(left).map_err(Error::io("wait for the monitor process"))?;
        }
        Ok(())
    }

    /// The process that is the machine, while it runs.
    pub fn monitor(&self) -> Result<Option<PidFd>, Error> {
        let Some(monitor) = self.state.monitor else { return Ok(None) };
        monitor.open().map_err(Error::io("look for the monitor process"))
    }

    /// Replaces an error that only says that the connection broke by the reason for it: the end of
    /// the machine.
    pub fn explain(&mut self, error: Error) -> Error {
        let broken = matches!(
            &error,
            Error::Agent(CallError::Closed { .. }) | Error::Stream(_) | Error::Io { .. }
        );
        match if broken { self.machine_ended() } else { None } {
            Some(outcome) => {
                self.failed = true;
                Error::MachineEnded { reason: outcome.reason, console: outcome.console_tail }
            }
            None => error,
        }
    }

    fn machine_ended(&mut self) -> Option<mvm_vmm::Outcome> {
        let machine = self.machine.as_deref_mut()?;
        let monitor = self.state.monitor?;
        // Connections break a moment before the process is gone.
        let gone = match monitor.open() {
            Ok(Some(process)) => process.wait_ended(LAST_WORDS).unwrap_or(false),
            Ok(None) => true,
            Err(_) => false,
        };
        gone.then(|| machine::last_words(machine, LAST_WORDS))
    }

    /// A connection to the monitor of the machine, which has to answer each request within `limit`.
    pub fn monitor_client(&self, limit: Duration) -> Result<ControlClient, Error> {
        machine::control(&self.place.dir, limit)
    }

    /// What the machine costs the host, while it is there.
    pub fn cost(&self) -> Option<mvm_vmm::monitor::Stats> {
        self.monitor_client(LAST_WORDS).ok()?.stats().ok()
    }

    /// How the sandbox ended, from what waiting for its process brought.
    pub fn conclude(&mut self, waited: Result<Exit, CallError>) -> Result<Ending, Error> {
        match waited {
            Ok(exit) => Ok(Ending {
                exit_code: exit.code,
                oom_killed: exit.oom_killed,
                reason: exit.oom_killed.then(|| "out of memory".to_owned()),
            }),
            Err(e) => Err(self.explain(e.into())),
        }
    }

    /// Ends the machine and records how the sandbox ended; with `--rm` nothing of it is left.
    pub fn finish(mut self, ending: &Ending) -> Result<(), Error> {
        self.close(ending, false)
    }

    /// Ends the machine and removes every trace: the process never ran, and the caller says why.
    pub fn abandon(mut self, reason: &str) -> Result<(), Error> {
        let ending =
            Ending { exit_code: EXIT_FAILURE, oom_killed: false, reason: Some(reason.to_owned()) };
        self.close(&ending, true)
    }

    fn close(&mut self, ending: &Ending, remove: bool) -> Result<(), Error> {
        self.finished = true;
        self.guest = None;
        let ended = match &mut self.machine {
            Some(machine) => {
                let how = match (ending.oom_killed, self.failed) {
                    (true, _) => End::OutOfMemory,
                    (false, true) => End::Failed,
                    (false, false) => End::Finished,
                };
                metrics::count(self.registry.layout(), |counters| counters.ended(how));
                machine.end()
            }
            None => Ok(()),
        };
        // Tap devices that no machine has taken go with it.
        self.network = None;
        if let Err(e) = network::tear_down(&self.place.dir) {
            tracing::warn!("the network of sandbox {}: {e}", self.state.id);
        }
        if let Err(e) = vsock::tear_down(&self.place.dir) {
            tracing::warn!("the socket to the guest of sandbox {}: {e}", self.state.id);
        }
        self.state.finish(ending);
        let recorded = self.record(ending, remove || self.state.auto_remove);
        ended.map_err(Error::io("cannot end the monitor process"))?;
        recorded
    }

    fn record(&self, ending: &Ending, remove: bool) -> Result<(), Error> {
        // Another front door may have removed the sandbox meanwhile (`mvm rm -f`).
        if !self.place.dir.exists() {
            return Ok(self.registry.remove(&self.place)?);
        }
        let saved = self.save();
        let announced = ending::announce(&self.place.dir, ending);
        if remove || !self.place.dir.exists() {
            return Ok(self.registry.remove(&self.place)?);
        }
        // Nobody can connect any more.
        let sockets = [machine::CONTROL_SOCKET, machine::SHARES_SOCKET, crate::guest::VSOCK_SOCKET];
        for socket in sockets {
            let _ = std::fs::remove_file(self.place.dir.join(socket));
        }
        saved?;
        announced.map_err(Error::io(self.place.dir.display().to_string()))
    }

    fn save(&self) -> Result<(), Error> {
        Ok(self.state.save(&self.place.dir)?)
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        let ending = Ending {
            exit_code: EXIT_FAILURE,
            oom_killed: false,
            reason: Some("its mvm process gave up".into()),
        };
        // Here only after an error or a panic, which the caller reports.
        if let Err(e) = self.close(&ending, self.state.started.is_none()) {
            tracing::warn!("cannot clean up sandbox {}: {e}", self.state.id);
        }
    }
}
