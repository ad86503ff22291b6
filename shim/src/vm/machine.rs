//! A machine that containers are in: one container's own, or a pod's.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mvm_fs::{NewShare, ShareClient, Source, Tree};
use mvm_sandbox::Sandbox;
use mvm_sandbox::ending::Ending;
use mvm_sandbox::guest::Guest;
use mvm_sandbox::spec::GivenDevice;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::blocks::Wanted;
use super::cgroup::Cgroups;
use super::plugged::{self, Plugged};
use super::rootfs;
use super::size::{self, Fit};
use crate::error::{Error, Result};

/// How long a guest may take to write out its disks.
const POWER_OFF: Duration = Duration::from_secs(20);

/// A machine whose agent is ready.
#[derive(Debug)]
pub struct Machine {
    /// `None` once it has been ended.
    sandbox: Mutex<Option<Sandbox>>,
    guest: Guest,
    /// Where its processes are counted. Left when they have ended.
    groups: Mutex<Option<Cgroups>>,
    /// The block devices that have come into it.
    plugged: Plugged,
    /// The limits of the containers in it, which it is large enough for.
    fit: Fit,
    /// How many containers have been given a name for their shares.
    named: AtomicU32,
}

/// Which of two came first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Awaited {
    /// The machine ended.
    Ended,
    /// It is to end.
    Asked,
}

impl Machine {
    /// The machine of a booted sandbox, whose processes are in `groups`.
    ///
    /// # Errors
    /// It is not booted.
    pub fn new(sandbox: Sandbox, groups: Cgroups) -> Result<Self> {
        Ok(Self {
            guest: sandbox.guest()?.clone(),
            sandbox: Mutex::new(Some(sandbox)),
            groups: Mutex::new(Some(groups)),
            plugged: Plugged::default(),
            fit: Fit::default(),
            named: AtomicU32::new(1),
        })
    }

    fn sandbox(&self) -> MutexGuard<'_, Option<Sandbox>> {
        self.sandbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its agent, and the container that has the sandbox's id.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// What the names of the next container's shares begin with.
    pub fn next_name(&self) -> String {
        format!("c{}", self.named.fetch_add(1, Ordering::Relaxed))
    }

    /// Puts the reason in the place of an error that only says that the connection broke.
    pub fn explain(&self, error: mvm_sandbox::Error) -> Error {
        match &mut *self.sandbox() {
            Some(sandbox) => sandbox.explain(error).into(),
            None => error.into(),
        }
    }

    fn shares(&self) -> Result<ShareClient> {
        match &*self.sandbox() {
            Some(sandbox) => Ok(sandbox.shares()?),
            None => Err(ended()),
        }
    }

    /// Shares more of the host's files with the guest. All of them or none.
    ///
    /// # Errors
    /// The file server refuses.
    pub fn share(&self, shares: Vec<NewShare>) -> Result<()> {
        let mut client = self.shares()?;
        let mut made: Vec<String> = Vec::new();
        for NewShare { name, source, options } in shares {
            let added = match source {
                Source::Tree(tree) => client.add(&name, tree, options).map_err(Error::failed),
                Source::Path(path) => {
                    Err(Error::failed(format!("{} is shared without a tree of it", path.display())))
                }
            };
            if let Err(e) = added {
                self.unshare(&made);
                return Err(e);
            }
            made.push(name);
        }
        Ok(())
    }

    /// Ends shares. A machine that is gone shares nothing.
    pub fn unshare(&self, names: &[String]) {
        if names.is_empty() {
            return;
        }
        let mut client = match self.shares() {
            Ok(client) => client,
            Err(e) => {
                tracing::debug!("{} shares need no end: {e}", names.len());
                return;
            }
        };
        for name in names {
            if let Err(e) = client.remove(name) {
                tracing::warn!("cannot end the share {name}: {e}");
            }
        }
    }

    /// Gives a container block devices of the host. All of them or none.
    ///
    /// # Errors
    /// See [`plugged::Error`].
    pub fn plug(&self, wanted: &[Wanted]) -> Result<Vec<GivenDevice>> {
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        self.plugged.plug(wanted, &mut self.socket()?).map_err(Error::failed)
    }

    /// Makes a disk of a container's root. Returns its place.
    ///
    /// # Errors
    /// See [`plugged::NoDisk`].
    pub fn plug_root(&self, root: &rootfs::Disk) -> Result<u32> {
        self.plugged.plug_root(root, &mut self.socket()?).map_err(Error::failed)
    }

    /// Takes it back.
    pub fn unplug_root(&self, place: u32) {
        match self.socket() {
            Ok(mut socket) => self.plugged.unplug_root(place, &mut socket),
            Err(e) => tracing::debug!(place, "a root need not be taken back: {e}"),
        }
    }

    /// Takes them back. A machine that is gone has none.
    pub fn unplug(&self, given: &[GivenDevice]) {
        if given.is_empty() {
            return;
        }
        match self.socket() {
            Ok(mut socket) => self.plugged.unplug(given, &mut socket),
            Err(e) => tracing::debug!("{} block devices need not be taken back: {e}", given.len()),
        }
    }

    fn socket(&self) -> Result<plugged::Running<'_>> {
        match &*self.sandbox() {
            Some(sandbox) => {
                let monitor = sandbox.monitor_client(plugged::PATIENCE)?;
                Ok(plugged::Running { monitor, guest: &self.guest })
            }
            None => Err(ended()),
        }
    }

    /// The limits of the containers in it.
    pub fn limits(&self) -> &Fit {
        &self.fit
    }

    /// Makes it as large as it has to be for `container` to have this limit of memory; `None` for one that has none, or is
    /// gone.
    ///
    /// # Errors
    /// The guest does not take the memory.
    pub fn fit(&self, container: &str, limit: Option<u64>) -> Result<()> {
        self.fit.set(container, limit, || match &*self.sandbox() {
            Some(sandbox) => {
                let monitor = sandbox.monitor_client(plugged::PATIENCE)?;
                Ok(size::Running { monitor, guest: &self.guest })
            }
            None => Err(ended()),
        })
    }

    /// The same for one that has a lower limit or is gone: a machine that stays too large is no failure of that.
    pub fn shrink(&self, container: &str, limit: Option<u64>) {
        if let Err(e) = self.fit(container, limit) {
            tracing::debug!(container, "the machine's memory stays as it is: {e}");
        }
    }

    /// Waits until the machine has ended, or `stop` becomes readable.
    ///
    /// # Errors
    /// The host cannot say.
    pub fn wait(&self, stop: impl AsFd) -> Result<Awaited> {
        let process = match &*self.sandbox() {
            Some(sandbox) => sandbox.monitor()?,
            None => None,
        };
        let Some(process) = process else { return Ok(Awaited::Ended) };
        let fds = [process.as_fd(), stop.as_fd()];
        let mut polled = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        loop {
            match poll(&mut polled, PollTimeout::NONE) {
                Err(Errno::EINTR) => {}
                Err(e) => return Err(Error::failed(format!("cannot wait for the machine: {e}"))),
                Ok(_) => break,
            }
        }
        let asked = polled[1].any().unwrap_or(false);
        Ok(if asked { Awaited::Asked } else { Awaited::Ended })
    }

    /// Ends it, if it has not been ended yet. With `write_out` the guest gets to write out its disks.
    ///
    /// # Errors
    /// Something of it is left.
    pub fn end(&self, write_out: bool) -> Result<()> {
        let Some(mut sandbox) = self.sandbox().take() else { return Ok(()) };
        let write_out = write_out || self.plugged.has_written_roots();
        if write_out && let Err(e) = sandbox.power_off(POWER_OFF) {
            tracing::warn!("the guest has not written out its disks: {e}");
        }
        let ending = Ending { exit_code: 0, oom_killed: false, reason: None };
        let ended = sandbox.finish(&ending);
        drop(self.groups.lock().unwrap_or_else(PoisonError::into_inner).take());
        Ok(ended?)
    }
}

fn ended() -> Error {
    Error::FailedPrecondition("the machine has ended".into())
}

/// A share of a container's root: nobody but the guest is to change it.
pub fn root_share(name: &str, tree: Tree) -> NewShare {
    let options = mvm_fs::ShareOptions { read_only: false, cache: mvm_fs::Cache::Exclusive };
    NewShare { name: format!("{name}-root"), source: Source::Tree(tree), options }
}
