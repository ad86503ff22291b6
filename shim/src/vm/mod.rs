//! Containers in machines: the real backend.
//!
//! A container is prepared on the host (root, network namespace, hooks) when it is created, and its
//! machine boots when it is started, so that networks are complete by then. Its root and its bind
//! mounts are shared with the guest as they are at that moment; a root that is a whole file system, and block
//! devices, are disks. The machine lives until the container is deleted. Containers of a [`pod`] are in the machine
//! of its sandbox.

mod binds;
mod blocks;
pub mod cgroup;
mod forward;
pub mod holder;
pub mod hooks;
mod machine;
mod net;
mod plugged;
pub mod pod;
pub mod rootfs;
pub mod spec;
mod unikernel;

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mvm_agent_protocol::messages::{ProcessInfo, StatsResponse};
use mvm_fs::{NewShare, tree};
use mvm_sandbox::engine::Selection;
use mvm_sandbox::guest::{Guest, Stdio, Streams, program};
use mvm_sandbox::machine::{MachinePlan, MonitorLauncher};
use mvm_sandbox::pump::Flag;
use mvm_sandbox::registry::{Registry, check_name};
use mvm_sandbox::spec::{GivenDevice, Root as GuestRoot};
use mvm_sandbox::timings::Timings;
use mvm_sandbox::unikernel::UnikernelPlan;
use mvm_sandbox::{Description, Disk, Sandbox};
use mvm_vmm::config::OwnerGone;
use oci_spec::runtime::{LinuxResources, Spec};

use crate::backend::{Backend, Exit, NewContainer, NewExec, Target};
use crate::error::{Error, Result};
use crate::host::{Hardware, Host, Size};
use cgroup::Cgroups;
use forward::Forward;
use holder::{Heritage, Holder};
use hooks::{Kind, Told};
use machine::{Awaited, Machine, root_share};
use pod::{Role, Standing};
use rootfs::Root;
use spec::Inside;
use unikernel::Unikernel;

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

/// Exit status of a process whose machine was ended, and it with it.
const EXIT_KILLED: u32 = 128 + 9;

/// What the names of the first container's shares begin with.
const FIRST: &str = "c0";

const SIGTERM: i32 = 15;

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

#[derive(Debug)]
struct Container {
    id: String,
    bundle: PathBuf,
    role: Role,
    /// Changed by updates before the start.
    spec: Mutex<Spec>,
    terminal: bool,
    root: Mutex<Option<Root>>,
    root_path: PathBuf,
    /// In place of the mounted root.
    disk: Option<rootfs::Disk>,
    holder: Holder,
    running: Mutex<Option<Running>>,
    /// How it is booted, if it is a unikernel.
    plan: Option<UnikernelPlan>,
    /// Its machine, if it is a unikernel that was started.
    unikernel: Mutex<Option<Arc<Unikernel>>>,
    /// What stands for a sandbox's process.
    standing: Standing,
    /// What is dialled on the loopback of a pod's namespace reaches the guest.
    forward: Mutex<Option<Forward>>,
    /// Raised to make a start fail.
    interrupt: Flag,
}

/// A container in a machine.
#[derive(Debug, Clone)]
struct Running {
    machine: Arc<Machine>,
    /// The agent, for this container.
    guest: Guest,
    /// What ends with a container that does not end its machine.
    lent: Lent,
}

/// What a container has of the host in a machine that goes on without it.
#[derive(Debug, Clone, Default)]
struct Lent {
    /// Names of shares.
    shares: Vec<String>,
    /// Block devices.
    devices: Vec<GivenDevice>,
}

impl Lent {
    fn take_back(&self, machine: &Machine) {
        machine.unshare(&self.shares);
        machine.unplug(&self.devices);
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

    fn describe(&self, container: &Container, spec: &Spec, size: &MachineSize) -> Description {
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
            vcpus: size.vcpus,
            memory: size.memory,
            tty: container.terminal,
            detached: true,
            auto_remove: true,
            stop_signal: SIGTERM,
            stop_timeout: size.stop_timeout,
        }
    }

    /// The pod's machine, for a container that is in it.
    fn pod(&self) -> Result<(Arc<Container>, Arc<Machine>)> {
        let sandbox =
            lock(&self.containers).values().find(|c| c.role == Role::Sandbox).map(Arc::clone);
        let absent = || Error::FailedPrecondition("the pod's sandbox does not run".into());
        let sandbox = sandbox.ok_or_else(absent)?;
        if sandbox.standing.is_parked() && sandbox.standing.status().is_none() {
            return Err(Error::FailedPrecondition(
                "the pod's machine has made way for that of a unikernel, which takes no containers; a \
                 pod with one has no others beside it"
                    .into(),
            ));
        }
        let running = lock(&sandbox.running).clone().ok_or_else(absent)?;
        if sandbox.standing.status().is_some() {
            return Err(absent());
        }
        Ok((sandbox, running.machine))
    }

    /// Makes room for the machine of a unikernel that is a container of a pod: at the pod's
    /// interfaces there is one machine at a time.
    fn make_way(&self, container: &Container) -> Result<Arc<Container>> {
        let all: Vec<_> = lock(&self.containers).values().map(Arc::clone).collect();
        let mut sandbox = None;
        for other in all {
            if other.role == Role::Sandbox {
                sandbox = Some(other);
            } else if other.id != container.id && other.is_in_a_machine() {
                return Err(Error::FailedPrecondition(format!(
                    "{} is a unikernel, whose machine takes the pod's network: it cannot run while {} \
                     does",
                    container.id, other.id
                )));
            }
        }
        let sandbox = sandbox.filter(|sandbox| sandbox.standing.status().is_none());
        let sandbox = sandbox
            .ok_or_else(|| Error::FailedPrecondition("the pod's sandbox does not run".into()))?;
        sandbox.standing.park();
        drop(lock(&sandbox.forward).take());
        let running = lock(&sandbox.running).take();
        if let Some(running) = running {
            tracing::info!(container = container.id, "the pod's machine makes way for its own");
            running.machine.end(false)?;
        }
        Ok(sandbox)
    }

    fn start_unikernel(
        &self,
        container: &Container,
        plan: &UnikernelPlan,
        stdio: Stdio,
    ) -> Result<Streams> {
        let spec = lock(&container.spec).clone();
        // Whose network and control group it has.
        let pod =
            if container.role == Role::Member { Some(self.make_way(container)?) } else { None };
        let (outer, holder) = match &pod {
            Some(sandbox) => (lock(&sandbox.spec).clone(), sandbox.holder.pid()),
            None => (spec.clone(), container.holder.pid()),
        };
        let (own, whole) = (spec::limits(&spec), spec::limits(&outer));
        let size = Size { vcpus: own.vcpus.or(whole.vcpus), memory: own.memory.or(whole.memory) };
        let hardware = self.host.bare(size, plan.kind());
        let hardware = hardware.map_err(|e| Error::failed(format!("{e:#}")))?;
        container.note_engine(&hardware.engine);
        let size = MachineSize {
            vcpus: hardware.vcpus,
            memory: hardware.memory,
            stop_timeout: hardware.stop_timeout,
        };
        let groups = Cgroups::join(&outer).map_err(|e| Error::InvalidArgument(e.to_string()))?;
        let about = self.describe(container, &spec, &size);
        let mut sandbox = Sandbox::create(&self.registry, about)?;
        let wish = net::wish(&spec::network(&outer), holder);
        let booted = sandbox.connect(&wish).map_err(Error::from).and_then(|_| {
            let (root, interrupt) = (&container.root_path, &container.interrupt);
            unikernel::boot(&mut sandbox, plan, root, hardware, stdio, interrupt)
        });
        match booted {
            Ok(streams) => {
                let unikernel = Unikernel::new(&self.registry, sandbox, groups)?;
                *lock(&container.unikernel) = Some(unikernel);
                Ok(streams)
            }
            Err(e) => {
                // Why it did not start is what matters.
                if let Err(left) = sandbox.abandon(&e.to_string()) {
                    tracing::warn!(container = container.id, "cannot clean up: {left}");
                }
                Err(e)
            }
        }
    }

    /// Boots a machine of `container`'s own, and starts in it what `start` does.
    fn boot<T>(
        &self,
        container: &Container,
        spec: &Spec,
        plan: impl FnOnce(Hardware) -> Result<MachinePlan>,
        start: impl FnOnce(&mut Sandbox) -> Result<T>,
    ) -> Result<(Machine, T)> {
        let hardware = self.host.hardware(spec::size(spec));
        let hardware = hardware.map_err(|e| Error::failed(format!("{e:#}")))?;
        container.note_engine(&hardware.engine);
        let size = MachineSize {
            vcpus: hardware.vcpus,
            memory: hardware.memory,
            stop_timeout: hardware.stop_timeout,
        };
        let about = self.describe(container, spec, &size);
        // What is started from now on is there too.
        let groups = Cgroups::join(spec).map_err(|e| Error::InvalidArgument(e.to_string()))?;
        let mut sandbox = Sandbox::create(&self.registry, about)?;
        let booted = plan(hardware).and_then(|plan| {
            sandbox.connect(&net::wish(&spec::network(spec), container.holder.pid()))?;
            let interrupt = Some(container.interrupt.as_fd());
            sandbox.boot(&MonitorLauncher, plan, &mut Timings::start(), interrupt)?;
            start(&mut sandbox)
        });
        match booted {
            Ok(started) => {
                tracing::info!(
                    container = container.id,
                    machine = sandbox.id(),
                    "the machine is up"
                );
                Ok((Machine::new(sandbox, groups)?, started))
            }
            Err(e) => {
                // Why it did not start is what matters.
                if let Err(left) = sandbox.abandon(&e.to_string()) {
                    tracing::warn!(container = container.id, "cannot clean up: {left}");
                }
                Err(e)
            }
        }
    }

    fn start_alone(&self, container: &Container, stdio: Stdio) -> Result<(Running, Streams)> {
        let spec = lock(&container.spec).clone();
        let mut inside = container.inside(&spec, FIRST)?;
        let mut disks = Vec::new();
        let mut shares = Vec::new();
        if let Some(disk) = &container.disk {
            let failed = Error::failed_to(format!("cannot use {}", disk.path.display()));
            disks.push(Disk { file: disk.open().map_err(failed)?, read_only: disk.read_only });
            let (kind, read_only) = (disk.kind.clone(), disk.read_only);
            inside.container.root = GuestRoot::Disk { index: 0, kind, read_only };
        } else {
            let root = container.root_share(FIRST)?;
            inside.container.root = GuestRoot::Share(root.name.clone());
            shares.push(root);
        }
        for bind in &inside.binds {
            shares.push(bind.share().map_err(Error::failed)?);
        }
        let (more, devices) = blocks::open(&inside.blocks, disks.len()).map_err(Error::failed)?;
        disks.extend(more);
        inside.container.devices = devices;
        // Without anything to share the guest has no such device, and needs no server.
        let shares = (!shares.is_empty()).then_some(shares);
        let plan = |hardware| Ok(machine_plan(hardware, disks, shares));
        let (machine, streams) = self.boot(container, &spec, plan, |sandbox| {
            let mut notices = Vec::new();
            let streams = sandbox.start(&inside.container, stdio, false, &mut notices)?;
            container.note(&notices);
            Ok(streams)
        })?;
        let guest = machine.guest().clone();
        Ok((Running { machine: Arc::new(machine), guest, lent: Lent::default() }, streams))
    }

    fn start_sandbox(&self, container: &Container) -> Result<(Running, Streams)> {
        let spec = lock(&container.spec).clone();
        let plan = |hardware| {
            let mut plan = machine_plan(hardware, Vec::new(), Some(Vec::new()));
            plan.disk_slots = plugged::PLACES;
            if let Some(word) = pod::hostname(&spec) {
                plan.cmdline = format!("{} {word}", plan.cmdline).trim().to_owned();
            }
            Ok(plan)
        };
        let (machine, ()) = self.boot(container, &spec, plan, |sandbox| Ok(sandbox.stand_by()?))?;
        let guest = machine.guest().clone();
        match Forward::start(container.holder.pid(), &guest) {
            Ok(forward) => *lock(&container.forward) = Some(forward),
            Err(e) => tracing::warn!(container = container.id, "port-forward reaches nobody: {e}"),
        }
        let running = Running { machine: Arc::new(machine), guest, lent: Lent::default() };
        Ok((running, Streams { input: None, output: None, error: None }))
    }

    fn start_member(&self, container: &Container, stdio: Stdio) -> Result<(Running, Streams)> {
        let (sandbox, machine) = self.pod()?;
        let mut spec = lock(&container.spec).clone();
        add_sysctls(&mut spec, &lock(&sandbox.spec));
        let name = machine.next_name();
        let mut inside = container.inside(&spec, &name)?;
        let root = container.root_share(&name)?;
        inside.container.root = GuestRoot::Share(root.name.clone());
        let mut shares = vec![root];
        for bind in &inside.binds {
            shares.push(bind.share().map_err(Error::failed)?);
        }
        let mut lent = Lent::default();
        lent.shares.extend(shares.iter().map(|share| share.name.clone()));
        machine.share(shares)?;
        lent.devices = machine.plug(&inside.blocks).inspect_err(|_| lent.take_back(&machine))?;
        inside.container.devices.clone_from(&lent.devices);
        let guest = machine.guest().of(&container.id);
        let started = (|| {
            container.note(&guest.create(&inside.container, stdio, false)?);
            let started = guest.attach("", stdio).and_then(|streams| {
                guest.start("", &program(&inside.container.spec)).map(|()| streams)
            });
            if started.is_err()
                && let Err(e) = guest.remove()
            {
                tracing::debug!(container = container.id, "cannot forget it: {e}");
            }
            started
        })();
        match started {
            Ok(streams) => Ok((Running { machine, guest, lent }, streams)),
            Err(e) => {
                let why = machine.explain(e);
                lent.take_back(&machine);
                Err(why)
            }
        }
    }

    /// Waits for the end of a process of `container`.
    fn await_end(&self, container: &Container, process: Target<'_>) -> Exit {
        if let Some(unikernel) = container.unikernel() {
            return unikernel.wait().map(Exit::now).unwrap_or_else(|why| {
                tracing::error!(container = process.container, "{why}");
                Exit::now(EXIT_MACHINE_ENDED)
            });
        }
        let waited = match (container.role, container.running()) {
            (_, Err(e)) => Err(e),
            (Role::Sandbox, _) => container.wait_sandbox().map(Exit::now),
            (_, Ok(Running { machine, guest, .. })) => match guest.wait(process.exec) {
                Ok(exit) => {
                    let status = u32::try_from(exit.code).unwrap_or(EXIT_MACHINE_ENDED);
                    Ok(Exit { oom_killed: exit.oom_killed, ..Exit::now(status) })
                }
                // Its pod was ended.
                Err(_) if container.role == Role::Member && self.pod().is_err() => {
                    Ok(Exit::now(EXIT_KILLED))
                }
                Err(e) => Err(machine.explain(e.into())),
            },
        };
        waited.unwrap_or_else(|why| {
            tracing::error!(container = process.container, exec = process.exec, "{why}");
            Exit::now(EXIT_MACHINE_ENDED)
        })
    }
}

/// What is recorded of a machine's size.
struct MachineSize {
    vcpus: u32,
    memory: u64,
    stop_timeout: u32,
}

fn machine_plan(
    hardware: Hardware,
    disks: Vec<Disk>,
    shares: Option<Vec<NewShare>>,
) -> MachinePlan {
    MachinePlan {
        vcpus: hardware.vcpus,
        memory: hardware.memory,
        hugepages: hardware.hugepages,
        engine: hardware.engine,
        cpu: hardware.cpu,
        kernel: hardware.kernel,
        initramfs: Some(hardware.initramfs),
        disks,
        disk_slots: 0,
        shares,
        cmdline: hardware.cmdline,
        console: None,
        boot_limit: hardware.boot_limit,
        // Nobody could reach what runs in it any more.
        owner_gone: OwnerGone::End,
    }
}

/// Gives a container the kernel parameters of its pod: what is common to the pod's containers is the
/// machine's, and nothing runs in the sandbox itself that could set them.
fn add_sysctls(spec: &mut Spec, sandbox: &Spec) {
    let Some(pods) = sandbox.linux().as_ref().and_then(|l| l.sysctl().clone()) else { return };
    let mut linux = spec::linux(spec);
    let mut all = pods;
    all.extend(linux.sysctl().clone().unwrap_or_default());
    linux.set_sysctl(Some(all));
    spec.set_linux(Some(linux));
}

impl Container {
    fn new(new: &NewContainer, socket: &Path) -> Result<Self> {
        let path = new.bundle.join("config.json");
        let failed = format!("cannot use {}", path.display());
        let mut spec = Spec::load(&path).map_err(Error::failed_to(failed))?;
        if let Some(process) = spec.process_mut().as_mut() {
            // The request has the last word on the terminal.
            process.set_terminal(Some(new.terminal));
        }
        let role = Role::of(&spec);
        let network = spec::network(&spec);
        if role != Role::Member {
            net::check(&network)?;
        }
        if !Kind::StartContainer.of(&spec).is_empty() {
            return Err(Error::Unimplemented(
                "hooks.startContainer: such hooks are run inside the container, which is in a guest; mvm \
                 runs hooks on the host alone"
                    .into(),
            ));
        }
        let annotated = role != Role::Sandbox && unikernel::is_annotated(&spec);
        if role != Role::Sandbox && !annotated {
            // What cannot be carried out is said at once, not only when the machine boots.
            let inside = inside(&spec, &new.bundle, role, FIRST)?;
            if role == Role::Member {
                blocks::check(&inside.blocks, plugged::PLACES)
                    .map_err(|e| Error::InvalidArgument(e.to_string()))?;
            }
        }
        let root = spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_default();
        let root_path = match new.rootfs.is_empty() {
            true => new.bundle.join(root),
            false => new.bundle.join("rootfs"),
        };
        if !new.rootfs.is_empty() {
            std::fs::create_dir_all(&root_path)
                .map_err(Error::failed_to(format!("cannot make {}", root_path.display())))?;
        }
        // Nothing of a sandbox's root is ever read.
        let whole = role == Role::Alone && !annotated;
        let disk = if whole { rootfs::disk(&new.rootfs) } else { None };
        let mounts = if disk.is_some() || role == Role::Sandbox { &[][..] } else { &new.rootfs };
        let root = Root::mount(&root_path, mounts).map_err(Error::failed)?;
        let plan = match (role, &disk) {
            (Role::Sandbox, _) | (_, Some(_)) => None,
            _ => unikernel::recognise(&spec, &root_path)?,
        };
        let heritage = Heritage { id: &new.id, bundle: &new.bundle, socket };
        let holder = Holder::start(heritage, &network).map_err(Error::failed)?;
        Ok(Self {
            id: new.id.clone(),
            bundle: new.bundle.clone(),
            role,
            spec: Mutex::new(spec),
            terminal: new.terminal,
            root: Mutex::new(Some(root)),
            root_path,
            disk,
            holder,
            running: Mutex::new(None),
            plan,
            unikernel: Mutex::new(None),
            standing: Standing::new().map_err(Error::failed)?,
            forward: Mutex::new(None),
            interrupt: Flag::new().map_err(Error::failed)?,
        })
    }

    /// Runs the hooks of one kind.
    fn hooks(&self, kind: Kind, status: &str) -> std::result::Result<(), String> {
        let spec = lock(&self.spec).clone();
        let pid = self.holder.pid();
        hooks::run(kind, &Told { id: &self.id, status, pid, bundle: &self.bundle, spec: &spec })
    }

    fn prepare(&self) -> Result<()> {
        let what = format!("cannot write to {}", self.bundle.display());
        hooks::expect_poststop(&self.bundle, &lock(&self.spec)).map_err(Error::failed_to(what))?;
        for kind in [Kind::Prestart, Kind::CreateRuntime, Kind::CreateContainer] {
            self.hooks(kind, "creating").map_err(Error::failed)?;
        }
        Ok(())
    }

    fn unikernel(&self) -> Option<Arc<Unikernel>> {
        lock(&self.unikernel).clone()
    }

    /// Whether something of it runs in a machine.
    fn is_in_a_machine(&self) -> bool {
        lock(&self.running).is_some() || self.unikernel().is_some_and(|u| !u.is_over())
    }

    fn note_engine(&self, engine: &Selection) {
        if engine.fallback {
            let (name, reason) = (engine.engine.name(), &engine.reason);
            tracing::warn!(container = self.id, "{reason}: running on {name} (slower)");
        }
    }

    fn running(&self) -> Result<Running> {
        lock(&self.running).clone().ok_or_else(|| {
            Error::FailedPrecondition(format!("container {} is not started", self.id))
        })
    }

    /// Does something in the guest.
    fn ask<T>(
        &self,
        act: impl FnOnce(&Guest) -> std::result::Result<T, mvm_sandbox::Error>,
    ) -> Result<T> {
        if self.plan.is_some() {
            return Err(unikernel::refused("running processes, or asking for their state,"));
        }
        let running = self.running()?;
        if self.role == Role::Sandbox {
            return Err(Error::Unimplemented(format!(
                "{} is a pod's sandbox: the machine itself, in which no process of it runs",
                self.id
            )));
        }
        act(&running.guest).map_err(|e| running.machine.explain(e))
    }

    fn inside(&self, spec: &Spec, name: &str) -> Result<Inside> {
        inside(spec, &self.bundle, self.role, name)
    }

    fn root_share(&self, name: &str) -> Result<NewShare> {
        let tree = tree::detach(&self.root_path, tree::Extent::whole(false));
        Ok(root_share(name, tree.map_err(Error::failed)?.into()))
    }

    fn note(&self, notices: &[String]) {
        for notice in notices {
            tracing::info!(container = self.id, "note: {notice}");
        }
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
        drop(lock(&self.forward).take());
        let unikernel = lock(&self.unikernel).take();
        if let Some(unikernel) = unikernel {
            unikernel.end();
        }
        let running = lock(&self.running).take();
        let ended = match running {
            Some(running) if self.role == Role::Member => {
                self.leave(&running);
                Ok(())
            }
            Some(running) => {
                running.machine.end(self.disk.as_ref().is_some_and(|disk| !disk.read_only))
            }
            None => Ok(()),
        };
        drop(lock(&self.root).take());
        if let Err(e) = hooks::run_poststop(&self.id, &self.bundle) {
            // As the specification has it: told, and that is all.
            tracing::warn!(container = self.id, "{e}");
        }
        ended
    }

    /// Takes a container out of a machine that goes on.
    fn leave(&self, running: &Running) {
        if let Err(e) = running.guest.remove() {
            // Nothing is left in a machine that is gone.
            tracing::debug!(container = self.id, "{}", running.machine.explain(e));
        }
        running.lent.take_back(&running.machine);
    }

    /// Waits for the end of a sandbox, which is the end of its machine.
    fn wait_sandbox(&self) -> Result<u32> {
        let machine = self.running()?.machine;
        match machine.wait(self.standing.stop())? {
            Awaited::Asked => {
                machine.end(false)?;
                Ok(self.standing.status().unwrap_or(EXIT_KILLED))
            }
            Awaited::Ended if self.standing.is_parked() => {
                self.standing.wait().map_err(Error::failed)?;
                Ok(self.standing.status().unwrap_or(EXIT_KILLED))
            }
            Awaited::Ended => {
                // Whatever is asked of it now is answered with the reason.
                let why = machine.guest().info().map_err(|e| machine.explain(e));
                Err(why.map_or_else(|e| e, |_| Error::failed("its machine ended")))
            }
        }
    }
}

fn inside(spec: &Spec, bundle: &Path, role: Role, name: &str) -> Result<Inside> {
    spec::for_guest(spec, bundle, role, name).map_err(|e| Error::InvalidArgument(e.to_string()))
}

impl Backend for Machines {
    fn create(&self, new: &NewContainer) -> Result<u32> {
        let container = Container::new(new, &self.socket)?;
        match container.role {
            // A unikernel is in the pod's network, not in its machine.
            Role::Member if container.plan.is_some() => {}
            Role::Member => drop(self.pod()?),
            Role::Alone | Role::Sandbox => {
                if let Some(other) = lock(&self.containers).keys().next() {
                    return Err(Error::InvalidArgument(format!(
                        "{} cannot be in the machine of {other}: it is no container of a pod",
                        new.id
                    )));
                }
            }
        }
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
        let _turn = (container.role == Role::Member).then(|| lock(&self.pod_turn));
        let streams = if let Some(plan) = &container.plan {
            self.start_unikernel(&container, plan, stdio)?
        } else {
            let (running, streams) = match container.role {
                Role::Alone => self.start_alone(&container, stdio)?,
                Role::Sandbox => self.start_sandbox(&container)?,
                Role::Member => self.start_member(&container, stdio)?,
            };
            *lock(&container.running) = Some(running);
            streams
        };
        if let Err(e) = container.hooks(Kind::Poststart, "running") {
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
        let exit = self.await_end(&container, process);
        if process.exec.is_empty() {
            container.holder.retire();
        }
        exit
    }

    fn signal(&self, process: Target<'_>, signal: i32) -> Result<()> {
        let container = self.container(process.container)?;
        if container.role == Role::Sandbox {
            container.standing.signal(signal);
            return Ok(());
        }
        if let Some(unikernel) = container.unikernel() {
            return unikernel.signal(signal);
        }
        container.ask(|guest| guest.signal(process.exec, signal))
    }

    fn signal_all(&self, container: &str, signal: i32) -> Result<()> {
        let container = self.container(container)?;
        if container.role == Role::Sandbox {
            container.standing.signal(signal);
            return Ok(());
        }
        if let Some(unikernel) = container.unikernel() {
            return unikernel.signal(signal);
        }
        container.ask(|guest| guest.signal_all(signal))
    }

    fn interrupt_start(&self, container: &str) {
        if let Ok(container) = self.container(container) {
            container.interrupt.raise();
        }
    }

    fn resize(&self, process: Target<'_>, columns: u16, rows: u16) -> Result<()> {
        let container = self.container(process.container)?;
        match container.unikernel() {
            // A serial line has no size.
            Some(_) => Ok(()),
            None => container.ask(|guest| guest.resize(process.exec, columns, rows)),
        }
    }

    fn pause(&self, container: &str) -> Result<()> {
        let container = self.container(container)?;
        match container.unikernel() {
            Some(unikernel) => unikernel.pause(),
            None => container.ask(Guest::freeze),
        }
    }

    fn resume(&self, container: &str) -> Result<()> {
        let container = self.container(container)?;
        match container.unikernel() {
            Some(unikernel) => unikernel.resume(),
            None => container.ask(Guest::thaw),
        }
    }

    fn update(&self, container: &str, resources: &[u8]) -> Result<()> {
        let container = self.container(container)?;
        let parsed: LinuxResources = serde_json::from_slice(resources)
            .map_err(|e| Error::InvalidArgument(format!("the resources are malformed: {e}")))?;
        if container.unikernel().is_some() {
            return Err(unikernel::refused("changing limits while it runs"));
        }
        if container.role == Role::Sandbox || lock(&container.running).is_none() {
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
        if let Some(unikernel) = container.unikernel() {
            return unikernel.stats().map(Some);
        }
        // No process of a sandbox takes anything: what the machine takes is its containers'.
        let running = container.role != Role::Sandbox && lock(&container.running).is_some();
        if running { container.ask(Guest::stats).map(Some) } else { Ok(None) }
    }

    fn processes(&self, container: &str) -> Result<Vec<ProcessInfo>> {
        let container = self.container(container)?;
        if container.role == Role::Sandbox || container.unikernel().is_some() {
            return Ok(vec![ProcessInfo::default()]);
        }
        container.ask(Guest::processes)
    }

    fn delete_exec(&self, process: Target<'_>) -> Result<()> {
        match self.container(process.container)?.ask(|guest| guest.delete(process.exec)) {
            // It never came that far, or went with its machine.
            Err(
                Error::NotFound(_)
                | Error::FailedPrecondition(_)
                | Error::Unimplemented(_)
                | Error::Failed { .. },
            ) => Ok(()),
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
        let mut left: Vec<_> = std::mem::take(&mut *lock(&self.containers)).into_values().collect();
        left.sort_by_key(|container| container.role == Role::Sandbox);
        for container in left {
            if let Err(e) = container.dismantle() {
                tracing::warn!(container = container.id, "cannot clean up: {e}");
            }
        }
    }
}
