//! The start of a container: the boot of its machine, or its way into that of its pod.

use std::os::fd::AsFd;
use std::sync::Arc;

use mvm_fs::NewShare;
use mvm_sandbox::guest::{Stdio, Streams, program};
use mvm_sandbox::machine::{MachinePlan, MonitorLauncher};
use mvm_sandbox::registry::check_name;
use mvm_sandbox::spec::Root as GuestRoot;
use mvm_sandbox::timings::Timings;
use mvm_sandbox::unikernel::UnikernelPlan;
use mvm_sandbox::{Description, Disk, Sandbox};
use mvm_vmm::config::OwnerGone;
use oci_spec::runtime::Spec;

use super::cgroup::Cgroups;
use super::container::{Container, Lent, Running};
use super::forward::Forward;
use super::machine::Machine;
use super::pod::{self, Role};
use super::rootfs;
use super::spec::{self, Inside};
use super::unikernel::{self, Unikernel};
use super::{
    FIRST, LABEL_BUNDLE, LABEL_ID, LABEL_NAMESPACE, Machines, blocks, lock, net, plugged, size,
};
use crate::error::{Error, Result};
use crate::host::{Hardware, Size};

/// The image's name, where CRI says it.
const IMAGE_NAME: &str = "io.kubernetes.cri.image-name";

const SIGTERM: i32 = 15;

impl Machines {
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
    pub(super) fn pod(&self) -> Result<(Arc<Container>, Arc<Machine>)> {
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

    pub(super) fn start_unikernel(
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
            Err(e) => Err(give_up(container, sandbox, e)),
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
            Err(e) => Err(give_up(container, sandbox, e)),
        }
    }

    pub(super) fn start_alone(
        &self,
        container: &Container,
        stdio: Stdio,
    ) -> Result<(Running, Streams)> {
        let spec = lock(&container.spec).clone();
        let mut inside = container.inside(&spec, FIRST)?;
        let mut disks = Vec::new();
        let mut shares = Vec::new();
        if let Some(disk) = &container.disk {
            let failed = Error::failed_to(format!("cannot use {}", disk.path.display()));
            let read_only = disk.system.read_only;
            disks.push(Disk { file: disk.open().map_err(failed)?, read_only });
            inside.container.root = GuestRoot::Disk { index: 0, system: disk.system.clone() };
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
            if let Some(rootfs::Disk { system, module: Some(module), .. }) = &container.disk {
                let added = sandbox.guest()?.add_file_system(&system.kind, module.0);
                added.map_err(|e| sandbox.explain(e))?;
            }
            let mut notices = Vec::new();
            let streams = sandbox.start(&inside.container, stdio, false, &mut notices)?;
            container.note(&notices);
            Ok(streams)
        })?;
        machine.limits().note(&container.id, size::limit(&spec));
        let guest = machine.guest().clone();
        Ok((Running { machine: Arc::new(machine), guest, lent: Lent::default() }, streams))
    }

    pub(super) fn start_sandbox(&self, container: &Container) -> Result<(Running, Streams)> {
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

    pub(super) fn start_member(
        &self,
        container: &Container,
        stdio: Stdio,
    ) -> Result<(Running, Streams)> {
        let (sandbox, machine) = self.pod()?;
        let mut spec = lock(&container.spec).clone();
        add_sysctls(&mut spec, &lock(&sandbox.spec));
        let name = machine.next_name();
        let mut inside = container.inside(&spec, &name)?;
        machine.fit(&container.id, size::limit(&spec))?;
        let mut lent = Lent::default();
        Self::lend(container, &mut inside, &machine, &mut lent, &name).inspect_err(|_| {
            lent.take_back(&machine);
            machine.shrink(&container.id, None);
        })?;
        let guest = machine.guest().of(&container.id);
        let started = (|| {
            container.note(&guest.create(&inside.container, stdio, false)?);
            let started = guest.attach("", stdio).and_then(|streams| {
                let guest = guest.patient(inside.container.hooks_limit());
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
                machine.shrink(&container.id, None);
                Err(why)
            }
        }
    }

    /// Gives a container of a pod what it has of the host: shares, block devices, a root.
    fn lend(
        container: &Container,
        inside: &mut Inside,
        machine: &Machine,
        lent: &mut Lent,
        name: &str,
    ) -> Result<()> {
        // Before the root: they cannot come in another way.
        lent.devices = machine.plug(&inside.blocks)?;
        inside.container.devices.clone_from(&lent.devices);
        let mut shares = Vec::new();
        inside.container.root = match container.plug_root(machine)? {
            Some((place, rootfs::Disk { system, .. })) => {
                lent.root = Some(place);
                GuestRoot::Plugged { place, system }
            }
            None => {
                let root = container.root_share(name)?;
                let name = root.name.clone();
                shares.push(root);
                GuestRoot::Share(name)
            }
        };
        for bind in &inside.binds {
            shares.push(bind.share().map_err(Error::failed)?);
        }
        let names = shares.iter().map(|share| share.name.clone()).collect();
        machine.share(shares)?;
        lent.shares = names;
        Ok(())
    }
}

/// What is recorded of a machine's size.
struct MachineSize {
    vcpus: u32,
    memory: u64,
    stop_timeout: u32,
}

/// Takes down the machine of a container that did not start. Why it did not is what matters.
fn give_up(container: &Container, sandbox: Sandbox, why: Error) -> Error {
    if let Err(left) = sandbox.abandon(&why.to_string()) {
        tracing::warn!(container = container.id, "cannot clean up: {left}");
    }
    why
}

fn machine_plan(
    hardware: Hardware,
    disks: Vec<Disk>,
    shares: Option<Vec<NewShare>>,
) -> MachinePlan {
    MachinePlan {
        vcpus: hardware.vcpus,
        memory: hardware.memory,
        memory_max: hardware.memory_max,
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
