//! One container: what it has on the host, from its creation to its end.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use mvm_fs::{NewShare, tree};
use mvm_sandbox::engine::Selection;
use mvm_sandbox::guest::{Guest, Stdio, Streams};
use mvm_sandbox::pump::Flag;
use mvm_sandbox::spec::GivenDevice;
use mvm_sandbox::unikernel::UnikernelPlan;
use oci_spec::runtime::Spec;

use super::forward::Forward;
use super::holder::{Heritage, Holder};
use super::hooks::{self, Kind, Told};
use super::machine::{Awaited, Machine, root_share};
use super::pod::{Role, Standing};
use super::rootfs::{self, Root};
use super::spec::{self, Inside};
use super::unikernel::{self, Unikernel};
use super::{EXIT_KILLED, FIRST, blocks, lock, net, plugged};
use crate::backend::{NewContainer, NewExec, RootMount};
use crate::error::{Error, Result};
use crate::host::Host;

/// A container: what it has on the host, and the machine that it is in once it is started.
#[derive(Debug)]
pub(super) struct Container {
    pub id: String,
    pub bundle: PathBuf,
    pub role: Role,
    /// Changed by updates before the start.
    pub spec: Mutex<Spec>,
    pub terminal: bool,
    pub root: Mutex<Option<Root>>,
    pub root_path: PathBuf,
    /// In place of the mounted root.
    pub disk: Option<rootfs::Disk>,
    /// What amounts to the root.
    pub mounts: Vec<RootMount>,
    pub holder: Holder,
    pub running: Mutex<Option<Running>>,
    /// How it is booted, if it is a unikernel.
    pub plan: Option<UnikernelPlan>,
    /// Its machine, if it is a unikernel that was started.
    pub unikernel: Mutex<Option<Arc<Unikernel>>>,
    /// What stands for a sandbox's process.
    pub standing: Standing,
    /// What is dialled on the loopback of a pod's namespace reaches the guest.
    pub forward: Mutex<Option<Forward>>,
    /// Raised to make a start fail.
    pub interrupt: Flag,
}

/// A container in a machine.
#[derive(Debug, Clone)]
pub(super) struct Running {
    pub machine: Arc<Machine>,
    /// The agent, for this container.
    pub guest: Guest,
    /// What ends with a container that does not end its machine.
    pub lent: Lent,
}

/// What a container has of the host in a machine that goes on without it.
#[derive(Debug, Clone, Default)]
pub(super) struct Lent {
    /// Names of shares.
    pub shares: Vec<String>,
    /// Block devices.
    pub devices: Vec<GivenDevice>,
    /// The place of its root, if that is a disk.
    pub root: Option<u32>,
}

impl Lent {
    pub(super) fn take_back(&self, machine: &Machine) {
        machine.unshare(&self.shares);
        machine.unplug(&self.devices);
        if let Some(place) = self.root {
            machine.unplug_root(place);
        }
    }
}

impl Container {
    pub(super) fn new(new: &NewContainer, host: &dyn Host, socket: &Path) -> Result<Self> {
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
        let whole = role != Role::Sandbox && !annotated;
        let disk = if whole {
            let disk = rootfs::disk(&new.rootfs, |kind| host.file_system(kind));
            disk.map_err(|e| Error::failed(format!("{e:#}")))?
        } else {
            None
        };
        let mounts = if disk.is_some() || role == Role::Sandbox { &[][..] } else { &new.rootfs };
        let root = Root::mount(&root_path, mounts).map_err(Error::failed)?;
        let plan = match (role, &disk) {
            (Role::Sandbox, _) | (_, Some(_)) => None,
            _ => unikernel::recognise(&spec, &root_path)?,
        };
        if plan.is_some() && !Kind::StartContainer.of(&spec).is_empty() {
            return Err(Error::Unimplemented(
                "hooks.startContainer: such hooks are run inside the container, and in a unikernel there is nobody to \
                 run them"
                    .into(),
            ));
        }
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
            mounts: new.rootfs.clone(),
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
    pub(super) fn hooks(&self, kind: Kind, status: &str) -> std::result::Result<(), String> {
        let spec = lock(&self.spec).clone();
        let pid = self.holder.pid();
        hooks::run(kind, &Told { id: &self.id, status, pid, bundle: &self.bundle, spec: &spec })
    }

    pub(super) fn prepare(&self) -> Result<()> {
        let what = format!("cannot write to {}", self.bundle.display());
        hooks::expect_poststop(&self.bundle, &lock(&self.spec)).map_err(Error::failed_to(what))?;
        for kind in [Kind::Prestart, Kind::CreateRuntime, Kind::CreateContainer] {
            self.hooks(kind, "creating").map_err(Error::failed)?;
        }
        Ok(())
    }

    pub(super) fn unikernel(&self) -> Option<Arc<Unikernel>> {
        lock(&self.unikernel).clone()
    }

    /// Whether something of it runs in a machine.
    pub(super) fn is_in_a_machine(&self) -> bool {
        lock(&self.running).is_some() || self.unikernel().is_some_and(|u| !u.is_over())
    }

    pub(super) fn note_engine(&self, engine: &Selection) {
        if engine.fallback {
            let (name, reason) = (engine.engine.name(), &engine.reason);
            tracing::warn!(container = self.id, "{reason}: running on {name} (slower)");
        }
    }

    pub(super) fn running(&self) -> Result<Running> {
        lock(&self.running).clone().ok_or_else(|| {
            Error::FailedPrecondition(format!("container {} is not started", self.id))
        })
    }

    /// Does something in the guest.
    pub(super) fn ask<T>(
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

    pub(super) fn inside(&self, spec: &Spec, name: &str) -> Result<Inside> {
        let mut inside = inside(spec, &self.bundle, self.role, name)?;
        if !Kind::StartContainer.of(spec).is_empty() {
            let (id, bundle) = (&self.id, &self.bundle);
            // Status and process id are for the agent to say.
            let told = Told { id, status: "creating", pid: 0, bundle, spec };
            inside.container.hook_state = told.state().to_string().into_bytes();
        }
        Ok(inside)
    }

    pub(super) fn root_share(&self, name: &str) -> Result<NewShare> {
        let tree = tree::detach(&self.root_path, tree::Extent::whole(false));
        Ok(root_share(name, tree.map_err(Error::failed)?))
    }

    pub(super) fn note(&self, notices: &[String]) {
        for notice in notices {
            tracing::info!(container = self.id, "note: {notice}");
        }
    }

    /// Makes a disk of the pod's machine of the root, if it can be one and there is a place for it; otherwise it is mounted on
    /// the host, to be shared.
    pub(super) fn plug_root(&self, machine: &Machine) -> Result<Option<(u32, rootfs::Disk)>> {
        let Some(disk) = &self.disk else { return Ok(None) };
        match machine.plug_root(disk) {
            Ok(place) => Ok(Some((place, disk.clone()))),
            Err(e) => {
                tracing::info!(container = self.id, "the root is mounted on the host: {e}");
                let root = Root::mount(&self.root_path, &self.mounts).map_err(Error::failed)?;
                *lock(&self.root) = Some(root);
                Ok(None)
            }
        }
    }

    pub(super) fn exec(
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
    pub(super) fn dismantle(&self) -> Result<()> {
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
                running.machine.end(self.disk.as_ref().is_some_and(|disk| !disk.system.read_only))
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
    pub(super) fn leave(&self, running: &Running) {
        if let Err(e) = running.guest.remove() {
            // Nothing is left in a machine that is gone.
            tracing::debug!(container = self.id, "{}", running.machine.explain(e));
        }
        running.lent.take_back(&running.machine);
        running.machine.shrink(&self.id, None);
    }

    /// Waits for the end of a sandbox, which is the end of its machine.
    pub(super) fn wait_sandbox(&self) -> Result<u32> {
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
