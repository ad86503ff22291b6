//! Containers in machines: the real backend.
//!
//! A container is prepared on the host (root, network namespace, hooks) when it is created, and its
//! machine boots when it is started, so that networks are complete by then. Its root and its bind
//! mounts are shared with the guest as they are at that moment; a root that is a whole file system, and block
//! devices, are disks. The machine lives until the container is deleted. Containers of a [`pod`] are in the machine
//! of its sandbox.

mod binds;
mod blocks;
mod calls;
pub mod cgroup;
mod container;
mod forward;
pub mod holder;
pub mod hooks;
mod machine;
mod net;
mod plugged;
pub mod pod;
pub mod rootfs;
mod size;
pub mod spec;
mod start;
mod unikernel;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mvm_sandbox::registry::Registry;

use crate::error::{Error, Result};
use crate::host::Host;
use container::Container;

/// Label of a sandbox: the container's id.
pub const LABEL_ID: &str = "io.containerd.id";
/// Label of a sandbox: containerd's namespace.
pub const LABEL_NAMESPACE: &str = "io.containerd.namespace";
/// Label of a sandbox: the container's bundle, which no other has at the same time.
pub const LABEL_BUNDLE: &str = "io.containerd.bundle";

/// Exit status of a process whose machine was ended, and it with it.
const EXIT_KILLED: u32 = 128 + 9;

/// What the names of the first container's shares begin with.
const FIRST: &str = "c0";

/// The backend.
pub struct Machines {
    host: Arc<dyn Host>,
    registry: Registry,
    namespace: String,
    /// Where this shim listens.
    socket: PathBuf,
    containers: Mutex<BTreeMap<String, Arc<Container>>>,
    /// Held while a container of a pod starts: which machine the pod has then does not change.
    pod_turn: Mutex<()>,
}

impl std::fmt::Debug for Machines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machines").field("namespace", &self.namespace).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Machines {
    /// No machines yet. Their state is kept where `host` says; `socket` is where this shim listens.
    ///
    /// # Errors
    /// There is no place for it.
    pub fn new(
        host: Arc<dyn Host>,
        namespace: &str,
        socket: Option<PathBuf>,
    ) -> anyhow::Result<Self> {
        let registry = Registry::open(host.layout()?)?;
        let (namespace, socket) = (namespace.to_owned(), socket.unwrap_or_default());
        Ok(Self {
            host,
            registry,
            namespace,
            socket,
            containers: Mutex::default(),
            pod_turn: Mutex::default(),
        })
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        let found = lock(&self.containers).get(id).cloned();
        found.ok_or_else(|| Error::NotFound(format!("container {id} does not exist")))
    }
}
