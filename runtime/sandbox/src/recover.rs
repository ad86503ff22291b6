//! Making sense of sandboxes whose owner is gone: killed, crashed, or gone with the host's last
//! boot. Whoever looks at such a sandbox next brings its state up to date.

use std::fs;
use std::time::Duration;

use mvm_vmm::Outcome;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;

use crate::ending::{self, Ending};
use crate::error::{EXIT_FAILURE, Error};
use crate::guest::Guest;
use crate::layout;
use crate::machine::OUTCOME_FILE;
use crate::procid::{ProcessId, boot_id};
use crate::registry::Place;
use crate::state::{State, Status};

/// Exit code of a process of which nobody saw the end.
pub const EXIT_UNKNOWN: i32 = 255;

/// How long an unattended guest may take to say whether its process still runs.
const ASK: Duration = Duration::from_secs(3);

/// How long a killed monitor may take to be gone.
const END: Duration = Duration::from_secs(10);

/// The sandbox's state as it really is now.
pub fn refresh(place: &Place, state: State) -> Result<State, Error> {
    if state.status == Status::Exited || (state.boot_id == boot_id() && state.owner.is_alive()) {
        return Ok(state);
    }
    // One recovers at a time; the second finds the work done.
    let path = place.dir.join("recover.lock");
    let what = || path.display().to_string();
    let file = layout::open_lock(&path).map_err(Error::io(what()))?;
    let _lock =
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| Error::io(what())(e.into()))?;
    let state = State::load(&place.dir)?;
    match judge(place, &state) {
        Verdict::Ended(ending) => record(place, state, &ending),
        Verdict::Unattended => Ok(State {
            reason: Some(format!(
                "unattended, its mvm process {} was killed; `mvm rm -f {}` ends it",
                state.owner.pid, state.name
            )),
            ..state
        }),
    }
}

enum Verdict {
    Ended(Ending),
    Unattended,
}

fn ended(exit_code: i32, reason: String) -> Verdict {
    Verdict::Ended(Ending { exit_code, oom_killed: false, reason: Some(reason) })
}

fn judge(place: &Place, state: &State) -> Verdict {
    if state.boot_id != boot_id() {
        return ended(EXIT_UNKNOWN, "the host was restarted while it ran".into());
    }
    // Its owner has told that, and could not write the rest down.
    if let Some(ending) = ending::look(&place.dir) {
        return Verdict::Ended(ending);
    }
    let owner = state.owner.pid;
    let Some(monitor) = state.monitor.filter(ProcessId::is_alive) else {
        return machine_gone(place, state);
    };
    if state.status == Status::Creating {
        return ended(
            EXIT_FAILURE,
            format!("its mvm process {owner} was killed while the machine was starting"),
        );
    }
    if state.bare {
        return Verdict::Unattended;
    }
    let exit = Guest::connect_within(&place.dir, &state.id, ASK)
        .ok()
        .and_then(|guest| guest.poll_exit("", 0).ok().flatten());
    match exit {
        Some(exit) => Verdict::Ended(Ending {
            exit_code: exit.code,
            oom_killed: exit.oom_killed,
            reason: Some(format!("ended after its mvm process {owner} was killed")),
        }),
        None => {
            tracing::debug!("machine {} runs unattended", monitor.pid);
            Verdict::Unattended
        }
    }
}

fn machine_gone(place: &Place, state: &State) -> Verdict {
    let outcome: Option<Outcome> = fs::read(place.dir.join(OUTCOME_FILE))
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let code = match &outcome {
        // The machine's end is that of the run.
        Some(outcome) if state.bare => outcome.reason.exit_code().into(),
        _ => EXIT_UNKNOWN,
    };
    let reason = match (outcome, state.monitor) {
        (Some(outcome), _) => outcome.reason.to_string(),
        (None, Some(monitor)) => format!(
            "its monitor process {} and its mvm process {} were killed",
            monitor.pid, state.owner.pid
        ),
        (None, None) => {
            format!("its mvm process {} was killed before the machine started", state.owner.pid)
        }
    };
    ended(code, reason)
}

fn record(place: &Place, mut state: State, ending: &Ending) -> Result<State, Error> {
    end_monitor(&state)?;
    if let Err(e) = crate::network::tear_down(&place.dir) {
        tracing::warn!("the network of sandbox {}: {e}", state.id);
    }
    if let Err(e) = crate::vsock::tear_down(&place.dir) {
        tracing::warn!("the socket to the guest of sandbox {}: {e}", state.id);
    }
    state.finish(ending);
    let saved = state.save(&place.dir).map_err(Error::from);
    let announced = ending::announce(&place.dir, ending);
    let what = || place.dir.display().to_string();
    if let Err(e) = saved.and_then(|()| announced.map_err(Error::io(what()))) {
        // On a full disk for instance, where it has to be possible to remove it. Whoever looks next finds out the same.
        tracing::warn!("the end of sandbox {} cannot be written down: {e}", state.id);
    }
    Ok(state)
}

/// Kills the sandbox's monitor, and with it the machine, and waits until it is gone.
pub fn end_monitor(state: &State) -> Result<(), Error> {
    match state.monitor {
        Some(monitor) if state.boot_id == boot_id() => end_process(monitor),
        _ => Ok(()),
    }
}

/// The same of the monitor itself.
pub(crate) fn end_process(monitor: ProcessId) -> Result<(), Error> {
    let what = "cannot end the monitor process";
    let Some(process) = monitor.open().map_err(Error::io(what))? else { return Ok(()) };
    process.signal(Signal::SIGKILL).map_err(Error::io(what))?;
    if process.wait_ended(END).map_err(Error::io(what))? {
        return Ok(());
    }
    Err(Error::io(format!("{what} {}", monitor.pid))(std::io::ErrorKind::TimedOut.into()))
}

impl State {
    /// Records the end.
    pub fn finish(&mut self, ending: &Ending) {
        self.status = Status::Exited;
        self.exit_code = Some(ending.exit_code);
        self.oom_killed = ending.oom_killed;
        self.reason.clone_from(&ending.reason);
        self.finished = Some(crate::state::now_ms());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;
    use crate::registry::Registry;
    use crate::state::sample;

    fn stale(change: impl FnOnce(&mut State)) -> State {
        stale_and(change, |_| {})
    }

    fn stale_and(change: impl FnOnce(&mut State), more: impl FnOnce(&Place)) -> State {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(Layout::at(dir.path())).unwrap();
        let (place, mut state) =
            registry.create(None, |place, name| sample(&place.id, name)).unwrap();
        ending::prepare(&place.dir).unwrap();
        let me = ProcessId::current().unwrap();
        // Nobody: this process's id with another start.
        state.owner = ProcessId { start: me.start + 1, ..me };
        change(&mut state);
        state.save(&place.dir).unwrap();
        more(&place);
        let state = refresh(&place, state).unwrap();
        let saved = State::load(&place.dir).unwrap();
        if state.status == Status::Exited {
            assert_eq!(saved, state);
        }
        state
    }

    #[test]
    fn living_owner_is_left_alone() {
        let state = stale(|s| s.owner = ProcessId::current().unwrap());
        assert_eq!(state.status, Status::Running);
        assert_eq!(state.reason, None);
    }

    #[test]
    fn killed_owner_and_monitor_are_told() {
        let state = stale(|s| s.monitor = Some(s.owner));
        assert_eq!((state.status, state.exit_code), (Status::Exited, Some(EXIT_UNKNOWN)));
        assert!(state.reason.unwrap().contains("were killed"));
    }

    #[test]
    fn owner_killed_before_the_machine_started_is_told() {
        let state = stale(|s| s.status = Status::Creating);
        assert!(state.reason.unwrap().contains("before the machine started"));
    }

    #[test]
    fn an_end_that_was_told_and_not_recorded_is_known() {
        let ending = Ending { exit_code: 7, oom_killed: false, reason: None };
        let told = |place: &Place| ending::announce(&place.dir, &ending).unwrap();
        let state = stale_and(|s| s.monitor = Some(s.owner), told);
        assert_eq!((state.status, state.exit_code), (Status::Exited, Some(7)));
    }

    #[test]
    fn restart_of_the_host_is_told() {
        let state = stale(|s| {
            s.owner = ProcessId::current().unwrap();
            s.boot_id = "another".into();
        });
        assert!(state.reason.unwrap().contains("restarted"));
    }

    #[test]
    fn machine_left_by_a_killed_start_is_ended() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let monitor = ProcessId::of(child.id()).unwrap();
        let reaper = std::thread::spawn(move || child.wait().unwrap());
        let state = stale(|s| {
            s.status = Status::Creating;
            s.monitor = Some(monitor);
        });
        assert!(state.reason.unwrap().contains("was starting"));
        assert!(!monitor.is_alive());
        reaper.join().unwrap();
    }

    #[test]
    fn machine_without_owner_goes_on_unattended() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let monitor = ProcessId::of(child.id()).unwrap();
        let state = stale(|s| s.monitor = Some(monitor));
        assert_eq!(state.status, Status::Running);
        assert!(state.reason.unwrap().contains("unattended"));
        assert!(monitor.is_alive());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
