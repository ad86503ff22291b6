//! Containers in machines: the real backend.
//!
//! A container is prepared on the host (root, network namespace, hooks) when it is created, and its
//! machine boots when it is started, so that networks are complete by then. Its root, as it is at
//! that moment, is packed into a read-only image with guest memory above. The machine lives until the
//! container is deleted.

pub mod holder;
mod hooks;
pub mod rootfs;
pub mod spec;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mvm_agent_protocol::messages::{ProcessInfo, StatsResponse};
use mvm_agent_protocol::rpc::CallError;
use mvm_sandbox::ending::Ending;
use mvm_sandbox::guest::{Guest, Stdio, Streams};
use mvm_sandbox::machine::{MachinePlan, MonitorLauncher};
use mvm_sandbox::pump::Flag;
use mvm_sandbox::registry::{Registry, check_name};
use mvm_sandbox::timings::Timings;
use mvm_sandbox::{Description, Sandbox};
use oci_spec::runtime::{LinuxResources, Spec};

use crate::backend::{Backend, Exit, NewContainer, NewExec, Target};
use crate::error::{Error, Result};
use crate::host::Host;
use holder::Holder;
use hooks::Told;
use rootfs::Root;

/// Label of a sandbox: the container's id.
pub const LABEL_ID: &str = "io.containerd.id";
/// Label of a sandbox: containerd's namespace.
pub const LABEL_NAMESPACE: &str = "io.containerd.namespace";
/// Label of a sandbox: the container's bundle, which no other has at the same time.
pub const LABEL_BUNDLE: &str = "io.containerd.bundle";

/// The image's name, where CRI says it.
const IMAGE_NAME: &str = "io.kubernetes.cri.image-name";

/// Exit status of a process whose machine ended.
const EXIT_MACHINE_ENDED: u32 = 255;

const SIGTERM: i32 = 15;

/// The backend.
pub struct Machines {
    host: Arc<dyn Host>,
    registry: Registry,
    namespace: String,
    containers: Mutex<BTreeMap<String, Arc<Container>>>,
}

impl std::fmt::Debug for Machines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machines").field("namespace", &self.namespace).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Container {
    id: String,
    bundle: PathBuf,
    /// Changed by updates before the start.
    spec: Mutex<Spec>,
    terminal: bool,
    root: Mutex<Option<Root>>,
    root_path: PathBuf,
    holder: Holder,
    machine: Mutex<Option<Booted>>,
    /// Raised to make a start fail.
    interrupt: Flag,
}

/// A machine with its agent ready.
#[derive(Debug)]
struct Booted {
    sandbox: Sandbox,
    guest: Guest,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Machines {
    /// No machines yet. Their state is kept where `host` says.
    ///
    /// # Errors
    /// There is no place for it.
    pub fn new(host: Arc<dyn Host>, namespace: &str) -> anyhow::Result<Self> {
        let registry = Registry::open(host.layout()?)?;
        Ok(Self { host, registry, namespace: namespace.to_owned(), containers: Mutex::default() })
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        let found = lock(&self.containers).get(id).cloned();
        found.ok_or_else(|| Error::NotFound(format!("container {id} does not exist")))
    }

    fn describe(
        &self,
        container: &Container,
        spec: &Spec,
        hardware: &crate::host::Hardware,
    ) -> Description {
        let name = format!("{}.{}", self.namespace, container.id);
        let taken = check_name(&name).is_err() || self.registry.find(&name).is_ok();
        let labels = [
            (LABEL_ID, container.id.clone()),
            (LABEL_NAMESPACE, self.namespace.clone()),
            (LABEL_BUNDLE, container.bundle.display().to_string()),
        ];
        let image = spec::annotations(spec).remove(IMAGE_NAME);
        Description {
            name: (!taken).then_some(name),
            image: image.unwrap_or_else(|| "(containerd)".into()),
            image_digest: String::new(),
            labels: labels.map(|(key, value)| (key.to_owned(), value)).into(),
            vcpus: hardware.vcpus,
            memory: hardware.memory,
            tty: container.terminal,
            detached: true,
            auto_remove: true,
            stop_signal: SIGTERM,
            stop_timeout: hardware.stop_timeout,
        }
    }

    fn boot(&self, container: &Container, stdio: Stdio) -> Result<(Booted, Streams)> {
        let spec = lock(&container.spec).clone();
        let inside = spec::for_guest(&spec).map_err(|e| Error::InvalidArgument(e.to_string()))?;
        let hardware = self.host.hardware(spec::size(&spec));
        let hardware = hardware.map_err(|e| Error::failed(format!("{e:#}")))?;
        let about = self.describe(container, &spec, &hardware);
        let mut sandbox = Sandbox::create(&self.registry, about)?;
        let started = self.boot_in(&mut sandbox, container, hardware, &inside, stdio);
        match started {
            Ok((guest, streams)) => Ok((Booted { sandbox, guest }, streams)),
            Err(e) => {
                // Why it did not start is what matters.
                if let Err(left) = sandbox.abandon(&e.to_string()) {
                    tracing::warn!(container = container.id, "cannot clean up: {left}");
                }
                Err(e)
            }
        }
    }

    fn boot_in(
        &self,
        sandbox: &mut Sandbox,
        container: &Container,
        hardware: crate::host::Hardware,
        inside: &mvm_sandbox::spec::Container,
        stdio: Stdio,
    ) -> Result<(Guest, Streams)> {
        if hardware.engine.fallback {
            let (name, reason) = (hardware.engine.engine.name(), &hardware.engine.reason);
            tracing::warn!(container = container.id, "{reason}: running on {name} (slower)");
        }
        let image = sandbox.place().logs.join("rootfs.erofs");
        let plan = MachinePlan {
            vcpus: hardware.vcpus,
            memory: hardware.memory,
            hugepages: hardware.hugepages,
            engine: hardware.engine,
            cpu: hardware.cpu,
            kernel: hardware.kernel,
            initramfs: Some(hardware.initramfs),
            rootfs: pack(&container.root_path, &image)?,
            cmdline: hardware.cmdline,
            shares: None,
            console: None,
            boot_limit: hardware.boot_limit,
        };
        let mut timings = Timings::start();
        sandbox.boot(&MonitorLauncher, plan, &mut timings, Some(container.interrupt.as_fd()))?;
        let mut notices = Vec::new();
        let streams = sandbox.start(inside, stdio, false, &mut notices)?;
        for notice in &notices {
            tracing::info!(container = container.id, "note: {notice}");
        }
        Ok((sandbox.guest()?.clone(), streams))
    }
}

/// Packs the tree at `root` into an image at `path`, which has no name any more when it is returned.
fn pack(root: &Path, path: &Path) -> Result<File> {
    let what = || format!("cannot pack the root file system {}", root.display());
    mvm_image::from_directory(root, path, mvm_image::Owners::Keep)
        .map_err(Error::failed_to(what()))?;
    let file = File::open(path).map_err(Error::failed_to(what()))?;
    std::fs::remove_file(path).map_err(Error::failed_to(what()))?;
    Ok(file)
}

impl Container {
    fn new(new: &NewContainer) -> Result<Self> {
        let path = new.bundle.join("config.json");
        let failed = format!("cannot use {}", path.display());
        let mut spec = Spec::load(&path).map_err(Error::failed_to(failed))?;
        if let Some(process) = spec.process_mut().as_mut() {
            // The request has the last word on the terminal.
            process.set_terminal(Some(new.terminal));
        }
        // What cannot be carried out is said at once, not only when the machine boots.
        spec::for_guest(&spec).map_err(|e| Error::InvalidArgument(e.to_string()))?;
        let root = spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_default();
        let root_path = match new.rootfs.is_empty() {
            true => new.bundle.join(root),
            false => new.bundle.join("rootfs"),
        };
        if !new.rootfs.is_empty() {
            std::fs::create_dir_all(&root_path)
                .map_err(Error::failed_to(format!("cannot make {}", root_path.display())))?;
        }
        let root = Root::mount(&root_path, &new.rootfs).map_err(Error::failed)?;
        let holder = Holder::start(&new.id, &spec::network(&spec)).map_err(Error::failed)?;
        Ok(Self {
            id: new.id.clone(),
            bundle: new.bundle.clone(),
            spec: Mutex::new(spec),
            terminal: new.terminal,
            root: Mutex::new(Some(root)),
            root_path,
            holder,
            machine: Mutex::new(None),
            interrupt: Flag::new().map_err(Error::failed)?,
        })
    }

    /// Runs the hooks of one kind.
    fn hooks(&self, kind: &str, status: &str, pid: u32) -> std::result::Result<(), String> {
        let spec = lock(&self.spec).clone();
        let Some(hooks) = spec.hooks() else { return Ok(()) };
        let list = match kind {
            // Deprecated, and still what many write.
            #[allow(deprecated)]
            "prestart" => hooks.prestart(),
            "createRuntime" => hooks.create_runtime(),
            "createContainer" => hooks.create_container(),
            "startContainer" => hooks.start_container(),
            "poststart" => hooks.poststart(),
            _ => hooks.poststop(),
        };
        let told = Told { id: &self.id, status, pid, bundle: &self.bundle, spec: &spec };
        hooks::run(kind, list.as_deref().unwrap_or_default(), &told)
    }

    fn prepare(&self) -> Result<()> {
        for kind in ["prestart", "createRuntime"] {
            self.hooks(kind, "creating", self.holder.pid()).map_err(Error::failed)?;
        }
        let spec = lock(&self.spec);
        let hooks = spec.hooks().clone().unwrap_or_default();
        for (kind, list) in [
            ("createContainer", hooks.create_container()),
            ("startContainer", hooks.start_container()),
        ] {
            if list.as_ref().is_some_and(|list| !list.is_empty()) {
                tracing::warn!(
                    container = self.id,
                    "{kind} hooks are not run: the guest has them not"
                );
            }
        }
        Ok(())
    }

    fn guest(&self) -> Result<Guest> {
        match &*lock(&self.machine) {
            Some(booted) => Ok(booted.guest.clone()),
            None => Err(Error::FailedPrecondition(format!("container {} is not started", self.id))),
        }
    }

    /// Puts the reason in the place of an error that only says that the connection broke.
    fn explain(&self, error: mvm_sandbox::Error) -> Error {
        match &mut *lock(&self.machine) {
            Some(booted) => booted.sandbox.explain(error).into(),
            None => error.into(),
        }
    }

    /// Does something in the guest.
    fn ask<T>(
        &self,
        act: impl FnOnce(&Guest) -> std::result::Result<T, mvm_sandbox::Error>,
    ) -> Result<T> {
        act(&self.guest()?).map_err(|e| self.explain(e))
    }

    fn exec(
        &self,
        guest: &Guest,
        new: &NewExec<'_>,
        stdio: Stdio,
    ) -> std::result::Result<Streams, mvm_sandbox::Error> {
        for notice in guest.exec(new.exec, new.process, stdio)? {
            tracing::info!(container = self.id, exec = new.exec, "note: {notice}");
        }
        let args = new.process.args().clone().unwrap_or_default();
        let program = args.first().map_or("", String::as_str);
        let started = guest
            .attach(new.exec, stdio)
            .and_then(|streams| guest.start(new.exec, program).map(|()| streams));
        if started.is_err()
            && let Err(e) = guest.delete(new.exec)
        {
            tracing::debug!(container = self.id, exec = new.exec, "cannot forget it: {e}");
        }
        started
    }

    /// Takes everything down. The holder goes with the container.
    fn dismantle(&self) -> Result<()> {
        let booted = lock(&self.machine).take();
        let ended = match booted {
            Some(booted) => {
                let ending = Ending { exit_code: 0, oom_killed: false, reason: None };
                booted.sandbox.finish(&ending).map_err(Error::from)
            }
            None => Ok(()),
        };
        drop(lock(&self.root).take());
        if let Err(e) = self.hooks("poststop", "stopped", 0) {
            // As the specification has it: told, and that is all.
            tracing::warn!(container = self.id, "{e}");
        }
        ended
    }
}

impl Backend for Machines {
    fn create(&self, new: &NewContainer) -> Result<u32> {
        if let Some(other) = lock(&self.containers).keys().next() {
            return Err(Error::Unimplemented(format!(
                "a second container in one machine is not supported yet (the first is {other})"
            )));
        }
        let container = Container::new(new)?;
        if let Err(e) = container.prepare() {
            if let Err(left) = container.dismantle() {
                tracing::warn!(container = new.id, "cannot clean up: {left}");
            }
            return Err(e);
        }
        let pid = container.holder.pid();
        lock(&self.containers).insert(new.id.clone(), Arc::new(container));
        Ok(pid)
    }

    fn start(&self, container: &str, stdio: Stdio) -> Result<Streams> {
        let container = self.container(container)?;
        let (booted, streams) = self.boot(&container, stdio)?;
        *lock(&container.machine) = Some(booted);
        if let Err(e) = container.hooks("poststart", "running", container.holder.pid()) {
            tracing::warn!(container = container.id, "{e}");
        }
        Ok(streams)
    }

    fn exec(&self, new: &NewExec<'_>, stdio: Stdio) -> Result<Streams> {
        let container = self.container(new.container)?;
        container.ask(|guest| container.exec(guest, new, stdio))
    }

    fn wait(&self, process: Target<'_>) -> Exit {
        let Ok(container) = self.container(process.container) else {
            return Exit::now(EXIT_MACHINE_ENDED);
        };
        let waited = match container.guest() {
            Ok(guest) => guest.wait(process.exec),
            Err(e) => Err(CallError::Closed { method: "WaitProcess", reason: e.to_string() }),
        };
        match waited {
            Ok(exit) => Exit {
                oom_killed: exit.oom_killed,
                ..Exit::now(u32::try_from(exit.code).unwrap_or(EXIT_MACHINE_ENDED))
            },
            Err(e) => {
                let why = container.explain(e.into());
                tracing::error!(container = process.container, exec = process.exec, "{why}");
                Exit::now(EXIT_MACHINE_ENDED)
            }
        }
    }

    fn signal(&self, process: Target<'_>, signal: i32) -> Result<()> {
        self.container(process.container)?.ask(|guest| guest.signal(process.exec, signal))
    }

    fn signal_all(&self, container: &str, signal: i32) -> Result<()> {
        self.container(container)?.ask(|guest| guest.signal_all(signal))
    }

    fn interrupt_start(&self, container: &str) {
        if let Ok(container) = self.container(container) {
            container.interrupt.raise();
        }
    }

    fn resize(&self, process: Target<'_>, columns: u16, rows: u16) -> Result<()> {
        self.container(process.container)?.ask(|guest| guest.resize(process.exec, columns, rows))
    }

    fn pause(&self, container: &str) -> Result<()> {
        self.container(container)?.ask(Guest::freeze)
    }

    fn resume(&self, container: &str) -> Result<()> {
        self.container(container)?.ask(Guest::thaw)
    }

    fn update(&self, container: &str, resources: &[u8]) -> Result<()> {
        let container = self.container(container)?;
        let parsed: LinuxResources = serde_json::from_slice(resources)
            .map_err(|e| Error::InvalidArgument(format!("the resources are malformed: {e}")))?;
        if lock(&container.machine).is_none() {
            let mut spec = lock(&container.spec);
            let mut linux = spec::linux(&spec);
            linux.set_resources(Some(parsed));
            spec.set_linux(Some(linux));
            return Ok(());
        }
        for notice in container.ask(|guest| guest.update(resources))? {
            tracing::info!(container = container.id, "note: {notice}");
        }
        Ok(())
    }

    fn stats(&self, container: &str) -> Result<Option<StatsResponse>> {
        let container = self.container(container)?;
        let booted = lock(&container.machine).is_some();
        if booted { container.ask(Guest::stats).map(Some) } else { Ok(None) }
    }

    fn processes(&self, container: &str) -> Result<Vec<ProcessInfo>> {
        self.container(container)?.ask(Guest::processes)
    }

    fn delete_exec(&self, process: Target<'_>) -> Result<()> {
        match self.container(process.container)?.ask(|guest| guest.delete(process.exec)) {
            // It never came that far, or went with its machine.
            Err(Error::NotFound(_) | Error::FailedPrecondition(_) | Error::Failed { .. }) => Ok(()),
            other => other,
        }
    }

    fn delete(&self, container: &str) -> Result<()> {
        let container = self.container(container)?;
        let result = container.dismantle();
        lock(&self.containers).remove(&container.id);
        result
    }

    fn shut_down(&self) {
        let left: Vec<_> = std::mem::take(&mut *lock(&self.containers)).into_values().collect();
        for container in left {
            if let Err(e) = container.dismantle() {
                tracing::warn!(container = container.id, "cannot clean up: {e}");
            }
        }
    }
}
