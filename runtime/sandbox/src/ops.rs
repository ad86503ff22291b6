//! What one front door does to a sandbox that another one owns.

use std::fs::File;
use std::io::ErrorKind;
use std::time::{Duration, Instant};

use mvm_vmm::MemorySize;
use mvm_vmm::monitor::{ControlClient, Request, client};
use nix::libc;

use crate::ending::{Ending, Waited, Waiter};
use crate::error::Error;
use crate::guest::Guest;
use crate::machine;
use crate::memory;
use crate::procid::ProcessId;
use crate::recover::{self, refresh};
use crate::registry::{Place, Registry};
use crate::state::{PAUSED_FILE, SPEC_FILE, State, Status};

/// SIGKILL, in the guest as on the host.
const SIGKILL: i32 = 9;

/// Signals that end a process which does nothing about them and that people send for that.
const FATAL: [i32; 7] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGABRT,
    SIGKILL,
    libc::SIGALRM,
    libc::SIGTERM,
];

/// How long a killed process may take to be gone before its machine is ended instead.
const KILLED: Duration = Duration::from_secs(10);

/// How long an owner may take to clean up after its machine.
const OWNER: Duration = Duration::from_secs(5);

/// How long the monitor may take to answer.
const CONTROL: Duration = Duration::from_secs(10);

/// A sandbox as found, with its state brought up to date.
#[derive(Debug)]
pub struct Found {
    /// Its places on disk.
    pub place: Place,
    /// Its state.
    pub state: State,
}

/// Finds a sandbox by name or id.
pub fn find(registry: &Registry, wanted: &str) -> Result<Found, Error> {
    let place = registry.find(wanted)?;
    let state = refresh(&place, State::load(&place.dir)?)?;
    Ok(Found { place, state })
}

/// Removes the sandbox that goes by `wanted`; one that runs only with `force`, and so one whose state cannot be read.
pub fn remove(registry: &Registry, wanted: &str, force: bool) -> Result<(), Error> {
    match find(registry, wanted) {
        Ok(found) => found.remove(registry, force),
        Err(Error::State(why)) if force => {
            tracing::debug!("{why}");
            let place = registry.find(wanted)?;
            end_unknown(&place)?;
            Ok(registry.remove(&place)?)
        }
        Err(e) => Err(e),
    }
}

/// Ends the machine of a sandbox of which nothing is known but its place, if there is one: its monitor is asked.
fn end_unknown(place: &Place) -> Result<(), Error> {
    let mut client = match machine::control(&place.dir, CONTROL) {
        Ok(client) => client,
        Err(Error::Io { source, .. } | Error::Control(client::Error::Io { source, .. }))
            if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) =>
        {
            return Ok(());
        }
        Err(e) => return Err(e),
    };
    let what = "cannot end the monitor process";
    let monitor = ProcessId::of(client.status()?.pid).map_err(Error::io(what))?;
    let owner = monitor.parent();
    client.stop()?;
    recover::end_process(monitor)?;
    // Its owner may be about to write the end down, or to remove all of it.
    if let Ok(owner) = owner
        && let Ok(mut waiter) = Waiter::new(&place.dir, owner)
    {
        waiter.wait(Some(Instant::now() + OWNER)).map_err(Error::io(what))?;
    }
    Ok(())
}

impl Found {
    /// The agent, if the process runs.
    pub fn guest(&self) -> Result<Guest, Error> {
        match self.state.status {
            _ if self.state.bare => {
                Err(self.no_agent("running a command or asking for one's state"))
            }
            Status::Running => Guest::connect(&self.place.dir, &self.state.id),
            Status::Paused => Err(self.wrong("`mvm unpause` lets it go on")),
            Status::Creating => Err(self.wrong("try again when it runs")),
            Status::Exited => Err(self.wrong("only a running container can do this")),
        }
    }

    fn no_agent(&self, what: &'static str) -> Error {
        Error::NoAgent { name: self.state.name.clone(), what }
    }

    /// Sends a signal to the container's process. A machine without agent knows none: what would
    /// end a process ends it.
    pub fn kill(&self, signal: i32) -> Result<(), Error> {
        if self.state.bare {
            return match (self.state.is_live(), FATAL.contains(&signal)) {
                (true, true) => Ok(self.control()?.request(&Request::Stop).map(drop)?),
                (true, false) => Err(self.no_agent("delivering a signal that ends nothing")),
                (false, _) => Err(self.wrong("only a running container can do this")),
            };
        }
        self.guest()?.signal("", signal)
    }

    /// The machine's control socket.
    pub fn control(&self) -> Result<ControlClient, Error> {
        machine::control(&self.place.dir, CONTROL)
    }

    /// Stops the vCPUs.
    pub fn pause(&mut self) -> Result<(), Error> {
        if self.state.status != Status::Running {
            return Err(self.wrong("only a running container can be paused"));
        }
        self.control()?.request(&Request::Pause)?;
        let marker = self.place.dir.join(PAUSED_FILE);
        File::create(&marker).map_err(Error::io(marker.display().to_string()))?;
        self.state.status = Status::Paused;
        Ok(())
    }

    /// Lets them go on, with the right time in the guest.
    pub fn resume(&mut self) -> Result<(), Error> {
        if self.state.status != Status::Paused {
            return Err(self.wrong("only a paused container can go on"));
        }
        self.control()?.request(&Request::Resume)?;
        let marker = self.place.dir.join(PAUSED_FILE);
        std::fs::remove_file(&marker).map_err(Error::io(marker.display().to_string()))?;
        self.state.status = Status::Running;
        // The clock of a machine without agent is kvmclock, which went on.
        if self.state.bare { Ok(()) } else { self.guest()?.set_clock() }
    }

    /// Makes the machine's memory `bytes` in all, as [`memory::resize`] does, and waits for what the guest gives back.
    pub fn resize(&self, bytes: u64) -> Result<MemorySize, Error> {
        if self.state.bare {
            return Err(self.no_agent("changing the size of its memory"));
        }
        let control = &mut self.control()?;
        memory::resize(control, &self.guest()?, bytes)?;
        memory::settle(control)
    }

    /// The specification it was started with.
    pub fn spec(&self) -> Result<oci_spec::runtime::Spec, Error> {
        let path = self.place.dir.join(SPEC_FILE);
        if self.state.status == Status::Running && !self.state.bare && !path.exists() {
            return Err(self.wrong(
                "it is a pod's machine, with no process of its own; `crictl exec` runs one in a container of it",
            ));
        }
        Ok(oci_spec::runtime::Spec::load(path).map_err(crate::spec::Error::from)?)
    }

    fn wrong(&self, advice: &'static str) -> Error {
        Error::WrongStatus {
            name: self.state.name.clone(),
            status: self.state.status.word(),
            advice,
        }
    }

    /// Asks the process to end, and after `limit` makes it.
    pub fn stop(&mut self, limit: Duration) -> Result<(), Error> {
        if self.state.status == Status::Paused {
            self.resume()?;
        }
        if self.state.status == Status::Exited {
            return Ok(());
        }
        // There is nobody to ask in a machine without agent: it is ended, and its owner told.
        let (signal, limit) = match self.state.bare {
            true => (SIGKILL, KILLED),
            false => (self.state.stop_signal, limit),
        };
        if self.state.status == Status::Running
            && self.kill(signal).is_ok()
            && self.wait_until(Some(Instant::now() + limit))?.is_some()
        {
            return Ok(());
        }
        self.end_by_force()
    }

    /// Ends the process at once; if that does not work, the machine.
    pub fn end_by_force(&mut self) -> Result<(), Error> {
        if self.state.status == Status::Paused && self.resume().is_err() {
            tracing::debug!("container {} cannot be resumed before its end", self.state.name);
        }
        if self.state.status == Status::Exited {
            return Ok(());
        }
        if self.state.status == Status::Running
            && !self.state.bare
            && let Ok(guest) = Guest::connect_within(&self.place.dir, &self.state.id, KILLED)
            && guest.signal("", SIGKILL).is_ok()
            && self.wait_until(Some(Instant::now() + KILLED))?.is_some()
        {
            return Ok(());
        }
        recover::end_monitor(&self.state)?;
        self.wait_until(Some(Instant::now() + OWNER)).map(drop)
    }

    /// Waits for the end until `deadline`, or for ever; `None` when the time is over.
    pub fn wait_until(&mut self, deadline: Option<Instant>) -> Result<Option<Ending>, Error> {
        if let Some(ending) = self.ending() {
            return Ok(Some(ending));
        }
        let what = "cannot wait for the container";
        let mut waiter = match Waiter::new(&self.place.dir, self.state.owner) {
            Ok(waiter) => waiter,
            // Removed at its end, a moment before we could watch.
            Err(e) if e.kind() == ErrorKind::NotFound => {
                self.state.status = Status::Exited;
                self.state.reason = Some("it was removed".into());
                return Ok(self.ending());
            }
            Err(e) => return Err(Error::io(what)(e)),
        };
        loop {
            match waiter.wait(deadline).map_err(Error::io(what))? {
                Waited::Ended(ending) => {
                    self.state.finish(&ending);
                    return Ok(Some(ending));
                }
                Waited::Timeout | Waited::Other => return Ok(None),
                Waited::OwnerGone => {
                    self.state = refresh(&self.place, self.state.clone())?;
                    if let Some(ending) = self.ending() {
                        return Ok(Some(ending));
                    }
                    if !self.wait_unattended(deadline) {
                        return Ok(None);
                    }
                }
            }
        }
    }

    /// Waits for the process of a machine without owner; `false` when the time is over.
    fn wait_unattended(&self, deadline: Option<Instant>) -> bool {
        let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return false;
        }
        let millis = left.map_or(60_000, |l| u32::try_from(l.as_millis()).unwrap_or(60_000));
        let asked = !self.state.bare
            && Guest::connect(&self.place.dir, &self.state.id)
                .map(|guest| guest.poll_exit("", millis.clamp(1, 60_000)))
                .is_ok();
        if !asked {
            // Neither owner nor agent: the end of the monitor is all that can still happen.
            let limit = left.unwrap_or(Duration::from_secs(60));
            if let Some(Ok(Some(monitor))) = self.state.monitor.map(|m| m.open()) {
                return monitor.wait_ended(limit).unwrap_or(true) || deadline.is_none();
            }
        }
        true
    }

    fn ending(&self) -> Option<Ending> {
        (self.state.status == Status::Exited).then(|| Ending {
            exit_code: self.state.exit_code.unwrap_or(recover::EXIT_UNKNOWN),
            oom_killed: self.state.oom_killed,
            reason: self.state.reason.clone(),
        })
    }

    /// Removes it; if it runs only with `force`.
    fn remove(mut self, registry: &Registry, force: bool) -> Result<(), Error> {
        if self.state.is_live() {
            if !force {
                return Err(self.wrong("stop it first by `mvm stop`, or remove it by `mvm rm -f`"));
            }
            self.end_by_force()?;
        }
        Ok(registry.remove(&self.place)?)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;
    use std::process::{Child, Command};
    use std::thread;

    use super::*;
    use crate::layout::Layout;
    use crate::state::{STATE_FILE, sample};

    fn sandbox(change: impl FnOnce(&mut State)) -> (tempfile::TempDir, Registry, Place) {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(Layout::at(dir.path())).unwrap();
        let fill = |place: &Place, name: &str| {
            let mut state = sample(&place.id, name);
            change(&mut state);
            state
        };
        let (place, _) = registry.create(Some("web"), fill).unwrap();
        (dir, registry, place)
    }

    /// Stands for a monitor: answers what it is asked, and ends the process when it is told to stop.
    fn serve(listener: &UnixListener, mut process: Child, memory: serde_json::Value) {
        let (stream, _) = listener.accept().unwrap();
        let mut lines = BufReader::new(&stream).lines();
        let mut answer = |request: &str, json: serde_json::Value| {
            assert!(lines.next().unwrap().unwrap().contains(request));
            writeln!(&stream, "{json}").unwrap();
        };
        let status = serde_json::json!({
            "response": "status", "id": "x", "pid": process.id(), "state": "running", "engine": "emu",
            "engine_reason": null, "boot": "linux", "vcpus": 1,
            "memory": memory, "phases": [],
        });
        answer("status", status);
        answer("stop", serde_json::json!({ "response": "ok" }));
        process.kill().unwrap();
        process.wait().unwrap();
    }

    #[test]
    fn a_machine_whose_state_is_damaged_is_ended_before_it_is_removed() {
        // As an older monitor tells it, and as it is told now.
        let now = serde_json::json!({ "started": 1, "now": 1, "wanted": 1, "max": 1 });
        [1.into(), now].into_iter().for_each(end_damaged);
    }

    fn end_damaged(memory: serde_json::Value) {
        let (_dir, registry, place) = sandbox(|_| {});
        fs::write(place.dir.join(STATE_FILE), "junk").unwrap();
        let listener = UnixListener::bind(place.dir.join(machine::CONTROL_SOCKET)).unwrap();
        let process = Command::new("sleep").arg("1000").spawn().unwrap();
        let monitor = ProcessId::of(process.id()).unwrap();
        thread::scope(|scope| {
            assert!(matches!(remove(&registry, "web", false), Err(Error::State(_))));
            let served = scope.spawn(|| serve(&listener, process, memory));
            remove(&registry, "web", true).unwrap();
            assert!(!monitor.is_alive() && !place.dir.exists());
            served.join().unwrap();
        });
        assert!(registry.list().unwrap().is_empty());
    }

    #[test]
    fn without_a_monitor_a_damaged_one_is_only_removed() {
        let (_dir, registry, place) = sandbox(|_| {});
        fs::write(place.dir.join(STATE_FILE), "junk").unwrap();
        // Left by one that was killed.
        drop(UnixListener::bind(place.dir.join(machine::CONTROL_SOCKET)).unwrap());
        remove(&registry, "web", true).unwrap();
        assert!(registry.list().unwrap().is_empty());
    }

    #[test]
    fn one_whose_end_cannot_be_written_down_can_be_removed() {
        let me = ProcessId::current().unwrap();
        // Nobody: this process's id with another start.
        let (_dir, registry, place) =
            sandbox(|state| state.owner = ProcessId { start: me.start + 1, ..me });
        // Stands for a full disk: where the new state is written there is a directory.
        fs::create_dir(place.dir.join(format!(".state.{}", std::process::id()))).unwrap();
        let found = find(&registry, "web").unwrap();
        assert_eq!(found.state.status, Status::Exited);
        assert_eq!(State::load(&place.dir).unwrap().status, Status::Running);
        remove(&registry, "web", false).unwrap();
        assert!(registry.list().unwrap().is_empty());
    }
}
