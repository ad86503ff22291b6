//! What carries containers: the seam below the task service.
//!
//! The service knows states, events and streams; a backend knows machines. The real one is
//! [`crate::vm`], tests put a [`mock`] in its place.

#[cfg(test)]
pub mod mock;

use std::path::PathBuf;
use std::time::SystemTime;

use mvm_agent_protocol::messages::{ProcessInfo, StatsResponse};
use mvm_sandbox::guest::{Stdio, Streams};

use crate::error::Result;

/// A file system that containerd wants mounted as the root, as it comes with the request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RootMount {
    /// `overlay`, `bind`, `ext4`...
    pub kind: String,
    /// A device or directory.
    pub source: String,
    /// Below the root's mount point; usually empty.
    pub target: String,
    /// As mount(8) has them.
    pub options: Vec<String>,
}

/// A container to be prepared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewContainer {
    /// Its id.
    pub id: String,
    /// Its bundle: a directory with `config.json`.
    pub bundle: PathBuf,
    /// What its root is made of; empty if it is there already.
    pub rootfs: Vec<RootMount>,
    /// It has a terminal.
    pub terminal: bool,
}

/// A further process.
#[derive(Debug, Clone, PartialEq)]
pub struct NewExec<'a> {
    /// Its container.
    pub container: &'a str,
    /// Its own id.
    pub exec: &'a str,
    /// What is run.
    pub process: &'a oci_spec::runtime::Process,
}

/// A process: the container's first, or an exec'ed one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target<'a> {
    /// The container.
    pub container: &'a str,
    /// The exec'ed process; empty for the first one.
    pub exec: &'a str,
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, 128 + n after signal n.
    pub status: u32,
    /// When.
    pub at: SystemTime,
    /// A memory limit ended it.
    pub oom_killed: bool,
}

impl Exit {
    /// An end of now.
    pub fn now(status: u32) -> Self {
        Self { status, at: SystemTime::now(), oom_killed: false }
    }
}

/// Carries containers. Calls for one container may come from several threads at once.
pub trait Backend: Send + Sync {
    /// Prepares a container: root, network namespace, hooks of the host. Returns the id of a living
    /// process of the host that is in the container's network namespace.
    fn create(&self, new: &NewContainer) -> Result<u32>;

    /// Starts the first process of a prepared container.
    fn start(&self, container: &str, stdio: Stdio) -> Result<Streams>;

    /// Starts a further process.
    fn exec(&self, new: &NewExec<'_>, stdio: Stdio) -> Result<Streams>;

    /// Waits for the end of a started process. The end of the machine is one too.
    fn wait(&self, process: Target<'_>) -> Exit;

    /// Sends a signal to a started process.
    fn signal(&self, process: Target<'_>, signal: i32) -> Result<()>;

    /// Sends a signal to all processes of a container.
    fn signal_all(&self, container: &str, signal: i32) -> Result<()>;

    /// Makes a start that is under way fail soon.
    fn interrupt_start(&self, container: &str);

    /// Sets the size of a process's terminal.
    fn resize(&self, process: Target<'_>, columns: u16, rows: u16) -> Result<()>;

    /// Freezes all processes of a container.
    fn pause(&self, container: &str) -> Result<()>;

    /// Lets them go on.
    fn resume(&self, container: &str) -> Result<()>;

    /// Changes limits; `resources` is the runtime specification's `linux.resources` in JSON.
    fn update(&self, container: &str, resources: &[u8]) -> Result<()>;

    /// Figures of a container; `None` before its start.
    fn stats(&self, container: &str) -> Result<Option<StatsResponse>>;

    /// The processes in a started container, the first one at the beginning.
    fn processes(&self, container: &str) -> Result<Vec<ProcessInfo>>;

    /// Forgets an exec'ed process that has ended.
    fn delete_exec(&self, process: Target<'_>) -> Result<()>;

    /// Forgets a container that has ended or was never started. Nothing of it is left.
    fn delete(&self, container: &str) -> Result<()>;

    /// Ends whatever is left.
    fn shut_down(&self);
}
