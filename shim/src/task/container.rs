//! One container as containerd sees it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::process::{Phase, Process};
use crate::backend::Target;
use crate::error::{Error, Result};

/// A container.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// The host's process that stands for it.
    pub pid: u32,
    /// Its first process.
    pub init: Arc<Process>,
    execs: Mutex<BTreeMap<String, Arc<Process>>>,
    paused: Mutex<bool>,
    /// Held by whatever changes the state: one step after the other.
    turn: Mutex<()>,
    /// Held from a process's end until that is told, so that nothing which follows is told before it.
    telling: Mutex<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Container {
    /// A prepared one.
    pub fn new(id: &str, bundle: PathBuf, pid: u32, init: Process) -> Self {
        Self {
            id: id.to_owned(),
            bundle,
            pid,
            init: Arc::new(init),
            execs: Mutex::default(),
            paused: Mutex::new(false),
            turn: Mutex::new(()),
            telling: Mutex::new(()),
        }
    }

    /// Taken for a step from one state to another.
    pub fn turn(&self) -> MutexGuard<'_, ()> {
        lock(&self.turn)
    }

    /// Held by whoever tells of the end of one of its processes.
    pub fn telling(&self) -> MutexGuard<'_, ()> {
        lock(&self.telling)
    }

    /// Its process of that id; the first one for an empty id.
    ///
    /// # Errors
    /// There is none.
    pub fn process(&self, exec: &str) -> Result<Arc<Process>> {
        if exec.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        lock(&self.execs).get(exec).cloned().ok_or_else(|| {
            Error::NotFound(format!("process {exec} in container {} does not exist", self.id))
        })
    }

    /// How the backend knows one of its processes.
    pub fn target<'a>(&'a self, process: &'a Process) -> Target<'a> {
        Target { container: &self.id, exec: &process.exec }
    }

    /// Takes a further process in.
    ///
    /// # Errors
    /// Its id is taken.
    pub fn add(&self, process: Process) -> Result<()> {
        let mut execs = lock(&self.execs);
        if execs.contains_key(&process.exec) {
            let exec = &process.exec;
            return Err(Error::AlreadyExists(format!("id {exec} in container {}", self.id)));
        }
        execs.insert(process.exec.clone(), Arc::new(process));
        Ok(())
    }

    /// Whether a further process of this id is there.
    pub fn has(&self, exec: &str) -> bool {
        lock(&self.execs).contains_key(exec)
    }

    /// Forgets a further process.
    pub fn forget(&self, exec: &str) {
        lock(&self.execs).remove(exec);
    }

    /// All further processes.
    pub fn execs(&self) -> Vec<Arc<Process>> {
        lock(&self.execs).values().cloned().collect()
    }

    /// Whether it is frozen.
    pub fn is_paused(&self) -> bool {
        *lock(&self.paused)
    }

    /// It was frozen, or goes on.
    pub fn set_paused(&self, paused: bool) {
        *lock(&self.paused) = paused;
    }

    /// What it is, in one word.
    pub fn word(&self) -> &'static str {
        match self.init.phase() {
            Phase::Running if self.is_paused() => "paused",
            phase => phase.word(),
        }
    }

    /// Refuses `what` unless its process runs and is not frozen.
    ///
    /// # Errors
    /// Its process does not run, or is frozen.
    pub fn require_running(&self, what: &str) -> Result<()> {
        match self.word() {
            "running" => Ok(()),
            word => Err(Error::FailedPrecondition(format!("cannot {what} a {word} container"))),
        }
    }
}
