//! Containers: from the specification to the processes.

mod notices;
mod process;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mvm_agent_protocol::is_valid_id;
use mvm_agent_protocol::messages::container_state::Status;
use mvm_agent_protocol::messages::{CreateContainerRequest, ExecProcessRequest};
use oci_spec::runtime::{LinuxNamespaceType, LinuxResources};

use crate::cgroup::{Cgroup, Cgroups};
use crate::child::{Job, hooks, namespaces};
use crate::error::{Context, Error, Result};
use crate::given;
use crate::log::warning;
use crate::reaper::Reaper;
use crate::rootfs::Mounted;
use crate::spec::{Heritage, Process as ProcessSpec, Spec};
use crate::zygote::{Birth, Zygote};
use process::Newborn;
pub use process::Process;

/// Where containers' file systems are mounted.
const CONTAINERS_DIR: &str = "/run/mvm/containers";

/// What containers are made with.
#[derive(Debug)]
pub struct Workshop {
    /// Gives birth to processes.
    pub zygote: Zygote,
    /// Hears of their ends.
    pub reaper: Arc<Reaper>,
    /// Holds their groups.
    pub cgroups: Cgroups,
}

/// A specification, as text and as what that means.
#[derive(Clone, Copy)]
struct Parsed<'a> {
    json: &'a [u8],
    spec: &'a Spec,
    process: &'a ProcessSpec,
}

/// A container.
#[derive(Debug)]
pub struct Container {
    id: String,
    first: Arc<Process>,
    further: Mutex<BTreeMap<String, Arc<Process>>>,
    cgroup: Arc<Cgroup>,
    paused: Mutex<bool>,
    heritage: Heritage,
    /// `CLONE_NEW*` of the namespaces that exec'ed processes join.
    namespaces: i32,
    /// Kept last: unmounted when the container goes.
    _root: Mounted,
}

impl Workshop {
    /// Sets up a container. Returns it with the notices.
    pub fn create(&self, request: &CreateContainerRequest) -> Result<(Container, Vec<String>)> {
        if !is_valid_id(&request.id) {
            return Err(Error::Invalid(format!("container id {:?} is not valid", request.id)));
        }
        let spec_json = given::translate(&request.spec_json, &request.devices)?;
        let spec = Spec::parse(&spec_json)?;
        namespaces::check(&spec)?;
        let process = spec
            .process
            .as_ref()
            .ok_or_else(|| Error::Invalid("process: the specification has none".into()))?;
        process::check(process)?;
        let mut notices = notices::of(&spec, &request.id);

        let cgroup = Arc::new(self.cgroups.create(&request.id)?);
        let spec = Parsed { json: &spec_json, spec: &spec, process };
        let made = self.create_in(request, spec, &cgroup, &mut notices);
        if made.is_err() {
            cgroup.kill();
            if let Err(e) = cgroup.remove() {
                warning!("{e}");
            }
        }
        made.map(|container| (container, notices))
    }

    fn create_in(
        &self,
        request: &CreateContainerRequest,
        parsed: Parsed<'_>,
        cgroup: &Arc<Cgroup>,
        notices: &mut Vec<String>,
    ) -> Result<Container> {
        let Parsed { json, spec, process } = parsed;
        let heritage = Heritage::of(json)?;
        let linux = spec.linux.clone().unwrap_or_default();
        if let Some(resources) = linux.resources() {
            notices.extend(cgroup.apply(resources)?);
        }
        let joined_pid = open_namespace(spec, LinuxNamespaceType::Pid)?;
        let new = |kind| namespaces::find(spec, kind).is_some_and(|ns| ns.path().is_none());
        let birth = Birth {
            new_pid_namespace: new(LinuxNamespaceType::Pid),
            new_user_namespace: new(LinuxNamespaceType::User),
            pid_namespace: joined_pid.as_ref().map(AsFd::as_fd),
        };
        let newborn = Newborn::new(&self.zygote, &self.reaper, &birth, cgroup, None, None)?;
        let (pidfd, exit) = newborn.handle()?;
        let finish = || -> Result<(Process, Vec<String>, Mounted)> {
            newborn.set_oom_score(process.oom_score_adj.unwrap_or(0))?;
            let user_namespace: Option<OwnedFd> = if birth.new_user_namespace {
                let uids = linux.uid_mappings().clone().unwrap_or_default();
                let gids = linux.gid_mappings().clone().unwrap_or_default();
                Some(newborn.map_ids(&uids, &gids)?)
            } else {
                None
            };
            let rootfs = request
                .rootfs
                .as_ref()
                .ok_or_else(|| Error::Invalid("rootfs: the request has none".into()))?;
            let dir = Path::new(CONTAINERS_DIR).join(&request.id);
            let map = user_namespace.as_ref().map(AsFd::as_fd);
            let root = Mounted::new(&dir, rootfs, &request.volumes, map)?;
            let job = Job::First {
                rootfs: root.root(),
                readonly: root.readonly || spec.root_is_readonly(),
                in_user_namespace: birth.new_user_namespace,
                init: request.init,
                state: request.state_json.clone(),
            };
            let stdio = request.stdio.clone().unwrap_or_default();
            let hooks = spec.start_hooks().iter().map(hooks::limit).sum();
            let (first, more) = newborn.set_up(job, json, process, &stdio, None)?;
            let first = first.with_hooks(hooks);
            Ok((first, more, root))
        };
        let (first, more, root) =
            finish().inspect_err(|_| Newborn::abandon(pidfd.as_fd(), &exit))?;
        notices.extend(more);
        let joinable = namespaces::of(spec)
            .iter()
            .map(|ns| namespaces::flag(ns.typ()).bits())
            .fold(0, |all, flag| all | flag);
        Ok(Container {
            id: request.id.clone(),
            first: Arc::new(first),
            further: Mutex::default(),
            cgroup: Arc::clone(cgroup),
            paused: Mutex::new(false),
            heritage,
            namespaces: joinable,
            _root: root,
        })
    }

    /// Sets up a further process. Returns its id in the guest and the notices.
    pub fn exec(
        &self,
        container: &Container,
        request: &ExecProcessRequest,
    ) -> Result<(i32, Vec<String>)> {
        let id = &request.process_id;
        if !is_valid_id(id) {
            return Err(Error::Invalid(format!("process id {id:?} is not valid")));
        }
        let json = container.heritage.bequeath(&request.process_json)?;
        let spec = Spec::parse(&json)?.process.unwrap_or_default();
        process::check(&spec)?;
        container.check_running()?;
        if lock(&container.further).contains_key(id) {
            return Err(Error::Exists(format!("process {id:?} exists already")));
        }
        let notices = notices::of_process(&spec);
        let has_pid = container.namespaces & libc::CLONE_NEWPID != 0;
        let birth =
            Birth { pid_namespace: has_pid.then(|| container.first.pidfd()), ..Birth::default() };
        let (beside, affinity) = (Some(container.first.pid), spec.exec_cpu_affinity.as_ref());
        let newborn =
            Newborn::new(&self.zygote, &self.reaper, &birth, &container.cgroup, beside, affinity)?;
        let (pidfd, exit) = newborn.handle()?;
        let finish = || {
            newborn.set_oom_score(spec.oom_score_adj.unwrap_or(0))?;
            // The process-id namespace came with birth.
            let job = Job::Further { namespaces: container.namespaces & !libc::CLONE_NEWPID };
            let stdio = request.stdio.clone().unwrap_or_default();
            newborn.set_up(job, &json, &spec, &stdio, Some(container.first.pidfd()))
        };
        let (process, more) = finish().inspect_err(|_| Newborn::abandon(pidfd.as_fd(), &exit))?;
        let pid = process.pid;
        let process = Arc::new(process);
        let taken = {
            let mut further = lock(&container.further);
            let taken = further.contains_key(id);
            if !taken {
                further.insert(id.clone(), Arc::clone(&process));
            }
            taken
        };
        if taken {
            process.kill();
            return Err(Error::Exists(format!("process {id:?} exists already")));
        }
        Ok((pid, notices.into_iter().chain(more).collect()))
    }
}

fn open_namespace(spec: &Spec, kind: LinuxNamespaceType) -> Result<Option<OwnedFd>> {
    let path = namespaces::find(spec, kind).and_then(|ns| ns.path().as_deref());
    path.map(|path| {
        namespaces::open(path)
            .map(OwnedFd::from)
            .context(|| format!("open the {kind} namespace {}", path.display()))
    })
    .transpose()
}

impl Container {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its process of that name; the first one for an empty name.
    pub fn process(&self, id: &str) -> Result<Arc<Process>> {
        if id.is_empty() {
            return Ok(Arc::clone(&self.first));
        }
        lock(&self.further).get(id).cloned().ok_or_else(|| {
            Error::NotFound(format!("container {:?} has no process {id:?}", self.id))
        })
    }

    /// Its state and the names of its exec'ed processes.
    pub fn status(&self) -> (Status, Vec<(String, i32)>) {
        let further = lock(&self.further).iter().map(|(id, p)| (id.clone(), p.pid)).collect();
        let status = if self.first.exit.get().is_some() {
            Status::STOPPED
        } else if *lock(&self.paused) {
            Status::PAUSED
        } else if self.first.is_started() {
            Status::RUNNING
        } else {
            Status::CREATED
        };
        (status, further)
    }

    /// Its control group.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Changes its limits.
    pub fn update(&self, json: &[u8]) -> Result<Vec<String>> {
        let resources: LinuxResources = serde_json::from_slice(json)
            .map_err(|e| Error::Invalid(format!("the OCI resources are malformed: {e}")))?;
        self.cgroup.apply(&resources)
    }

    /// Freezes or thaws it.
    pub fn pause(&self, paused: bool) -> Result<()> {
        self.check_exists()?;
        let mut now = lock(&self.paused);
        self.cgroup.freeze(paused)?;
        *now = paused;
        Ok(())
    }

    /// Sends a signal to all of its processes.
    pub fn signal_all(&self, signal: i32) -> Result<()> {
        if self.cgroup.exists() {
            if signal == libc::SIGKILL {
                self.cgroup.kill();
            } else {
                self.cgroup.signal(signal);
            }
            return Ok(());
        }
        let further: Vec<_> = lock(&self.further).values().cloned().collect();
        for process in further.iter().filter(|p| p.exit.get().is_none()) {
            process.signal(signal)?;
        }
        self.first.signal(signal)
    }

    /// Forgets an exec'ed process that has ended.
    pub fn delete_process(&self, id: &str) -> Result<()> {
        let process = self.process(id)?;
        if id.is_empty() {
            return Err(Error::Invalid("the first process goes with its container".into()));
        }
        if process.exit.get().is_none() {
            if process.is_started() {
                return Err(Error::State(format!("process {id:?} is still running")));
            }
            process.kill();
        }
        process.streams.close();
        lock(&self.further).remove(id);
        Ok(())
    }

    /// Ends all of its processes.
    pub fn kill(&self) {
        let further: Vec<_> = lock(&self.further).values().cloned().collect();
        self.first.kill();
        for process in further.iter().filter(|p| p.exit.get().is_none()) {
            process.kill();
        }
        // Those that nobody knows, if it has no process-id namespace of its own.
        self.cgroup.kill();
    }

    /// Whether it can be deleted without force.
    pub fn check_stopped(&self) -> Result<()> {
        if self.first.exit.get().is_none() && self.first.is_started() {
            return Err(Error::State(format!("container {:?} is still running", self.id)));
        }
        Ok(())
    }

    fn check_exists(&self) -> Result<()> {
        if self.first.exit.get().is_some() {
            return Err(Error::State(format!("container {:?} has stopped", self.id)));
        }
        Ok(())
    }

    fn check_running(&self) -> Result<()> {
        self.check_exists()?;
        if *lock(&self.paused) {
            return Err(Error::State(format!("container {:?} is paused", self.id)));
        }
        Ok(())
    }

    /// Ends its streams and removes its group. The file systems go when the last user does.
    pub fn dismantle(&self) -> Result<()> {
        self.first.streams.close();
        for process in lock(&self.further).values() {
            process.streams.close();
        }
        self.cgroup.remove()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
