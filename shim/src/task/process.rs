//! One process as containerd sees it: announced, started, ended.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::backend::Exit;
use crate::error::{Error, Result};
use crate::stdio::{Io, Paths};

/// Where a process is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// It was announced.
    Created,
    /// It is being started.
    Starting,
    /// It runs.
    Running,
    /// It has ended, or could not be started.
    Ended(Exit),
}

impl Phase {
    /// The word in messages.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Ended(_) => "stopped",
        }
    }
}

/// A process: a container's first one, or an exec'ed one.
#[derive(Debug)]
pub struct Process {
    /// Its id; empty for the first one.
    pub exec: String,
    /// What is run; `None` for the first one, of which the bundle tells.
    pub spec: Option<oci_spec::runtime::Process>,
    /// Where its streams go.
    pub paths: Paths,
    /// Its streams.
    pub io: Io,
    now: Mutex<Now>,
    changed: Condvar,
}

#[derive(Debug)]
struct Now {
    phase: Phase,
    /// The terminal's size, for a start to come.
    size: Option<(u16, u16)>,
}

impl Process {
    /// An announced one.
    pub fn new(exec: &str, spec: Option<oci_spec::runtime::Process>, paths: Paths, io: Io) -> Self {
        Self {
            exec: exec.to_owned(),
            spec,
            paths,
            io,
            now: Mutex::new(Now { phase: Phase::Created, size: None }),
            changed: Condvar::new(),
        }
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where it is.
    pub fn phase(&self) -> Phase {
        self.now().phase.clone()
    }

    /// Goes from created to starting.
    ///
    /// # Errors
    /// It is somewhere else.
    pub fn begin_start(&self) -> Result<()> {
        let mut now = self.now();
        match now.phase {
            Phase::Created => {
                now.phase = Phase::Starting;
                Ok(())
            }
            ref other => {
                let word = other.word();
                Err(Error::FailedPrecondition(format!("cannot start a {word} process")))
            }
        }
    }

    /// Goes on to running. Returns the size that its terminal should have.
    pub fn started(&self) -> Option<(u16, u16)> {
        let mut now = self.now();
        now.phase = Phase::Running;
        now.size
    }

    /// It has ended. The first end counts.
    pub fn ended(&self, exit: Exit) -> bool {
        let mut now = self.now();
        if matches!(now.phase, Phase::Ended(_)) {
            return false;
        }
        now.phase = Phase::Ended(exit);
        self.changed.notify_all();
        true
    }

    /// From created to ended, in one step.
    pub fn end_unstarted(&self, exit: Exit) -> bool {
        let mut now = self.now();
        if now.phase != Phase::Created {
            return false;
        }
        now.phase = Phase::Ended(exit);
        self.changed.notify_all();
        true
    }

    /// Waits for its end.
    pub fn wait(&self) -> Exit {
        let mut now = self.now();
        loop {
            if let Phase::Ended(exit) = &now.phase {
                return exit.clone();
            }
            now = self.changed.wait(now).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The same, for at most `limit`.
    pub fn wait_for(&self, limit: std::time::Duration) -> Option<Exit> {
        let now = self.now();
        let ended = |now: &mut Now| !matches!(now.phase, Phase::Ended(_));
        let waited = self.changed.wait_timeout_while(now, limit, ended);
        let (now, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match &now.phase {
            Phase::Ended(exit) => Some(exit.clone()),
            _ => None,
        }
    }

    /// Remembers the terminal's size. `true` if it can be set at once.
    pub fn resize(&self, size: (u16, u16)) -> bool {
        let mut now = self.now();
        now.size = Some(size);
        now.phase == Phase::Running
    }
}
