//! Control groups, version 2: one group for each container below `mvm/`.
//!
//! On a kernel without the unified hierarchy (the agent tried out on some host) containers run
//! without groups, and a notice says so.

mod devices;
mod limits;
mod stats;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use oci_spec::runtime::LinuxResources;

use crate::error::{Context, Error, Result};
use crate::log::warning;
use crate::sys;

/// The controllers that containers get, as far as the kernel has them.
const CONTROLLERS: &[&str] = &["cpu", "cpuset", "io", "memory", "pids", "hugetlb", "misc"];

/// How long frozen or killed processes may take, which depends on what they do in the kernel.
const SETTLE: Duration = Duration::from_secs(10);

/// The hierarchy.
#[derive(Debug)]
pub struct Cgroups {
    root: Option<PathBuf>,
}

/// One container's group.
#[derive(Debug)]
pub struct Cgroup {
    path: Option<PathBuf>,
    /// The attached device program, to be replaced by the next.
    device_program: Mutex<Option<OwnedFd>>,
}

impl Cgroups {
    /// Takes over the hierarchy mounted at `root`, if one is.
    pub fn open(root: &Path) -> Self {
        if !root.join("cgroup.subtree_control").exists() {
            return Self { root: None };
        }
        enable_controllers(root);
        let ours = root.join("mvm");
        match fs::create_dir(&ours) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                warning!("no control groups: cannot create {}: {e}", ours.display());
                Self { root: None }
            }
            _ => {
                enable_controllers(&ours);
                Self { root: Some(ours) }
            }
        }
    }

    /// Makes the group of a container.
    pub fn create(&self, id: &str) -> Result<Cgroup> {
        let path = self.root.as_ref().map(|root| root.join(id));
        if let Some(path) = &path {
            fs::create_dir(path).context(|| format!("create control group {}", path.display()))?;
        }
        Ok(Cgroup { path, device_program: Mutex::new(None) })
    }
}

fn enable_controllers(group: &Path) {
    for controller in CONTROLLERS {
        // One by one: a kernel without one of them must not lack the others. A missing one is
        // reported when a limit needs it.
        let _ = fs::write(group.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

impl Cgroup {
    /// A group that is none.
    #[cfg(test)]
    fn at(path: &Path) -> Self {
        Self { path: Some(path.into()), device_program: Mutex::new(None) }
    }

    /// Whether there is a group.
    pub fn exists(&self) -> bool {
        self.path.is_some()
    }

    /// Applies the specification's limits. Returns notices of what has no meaning here.
    pub fn apply(&self, resources: &LinuxResources) -> Result<Vec<String>> {
        let settings = limits::settings(resources)?;
        let rules = resources.devices().as_deref().filter(|rules| !rules.is_empty());
        // What is wrong with them is found before anything is changed.
        let rules = rules.map(devices::program).transpose()?;
        let Some(path) = &self.path else {
            return Ok(if settings.writes.is_empty() {
                settings.notices
            } else {
                vec![
                    "linux.resources: this kernel has no unified control groups, no limits hold"
                        .into(),
                ]
            });
        };
        let mut notices = settings.notices;
        self.check_memory(path, resources)?;
        for write in settings.writes {
            match set(&path.join(&write.file), &write.value) {
                Ok(()) => {}
                Err(e) if write.optional && e.kind() == io::ErrorKind::NotFound => {
                    notices.push(format!(
                        "{}: this kernel has no {}, not applied",
                        write.field, write.file
                    ));
                }
                Err(e) => {
                    let what =
                        format!("{}: write {:?} to {}", write.field, write.value, write.file);
                    return Err(Error::system(what, e));
                }
            }
        }
        if let Some(rules) = rules {
            self.restrict_devices(path, &rules)?;
        }
        Ok(notices)
    }

    /// `checkBeforeUpdate`: a limit below what is in use would make the kernel kill.
    fn check_memory(&self, path: &Path, resources: &LinuxResources) -> Result<()> {
        let Some(memory) = resources.memory() else { return Ok(()) };
        let limit = memory.limit().and_then(|limit| u64::try_from(limit).ok()).unwrap_or(0);
        if limit != 0 && memory.check_before_update() == Some(true) {
            let used = stats::number(&path.join("memory.current"));
            if used > limit {
                return Err(Error::Invalid(format!(
                    "linux.resources.memory.limit: {limit} is less than the {used} bytes in use \
                     (checkBeforeUpdate)"
                )));
            }
        }
        Ok(())
    }

    fn restrict_devices(&self, path: &Path, program: &[u64]) -> Result<()> {
        let group = File::open(path).context(|| format!("open {}", path.display()))?;
        let new = devices::load(program)?;
        devices::attach(group.as_fd(), new.as_fd())?;
        let mut attached = self.device_program.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = attached.replace(new) {
            devices::detach(group.as_fd(), old.as_fd())?;
        }
        Ok(())
    }

    /// Moves a process in; if the group has been divided and takes none any more, to where the
    /// process `beside` is.
    pub fn add(&self, pid: i32, beside: Option<i32>) -> Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let enter = |group: &Path| set(&group.join("cgroup.procs"), &pid.to_string());
        match (enter(path), beside.and_then(|other| group_of(path, other))) {
            (Err(e), Some(group)) if e.raw_os_error() == Some(libc::EBUSY) => enter(&group),
            (entered, _) => entered,
        }
        .context(|| format!("move process {pid} to {}", path.display()))
    }

    /// Freezes or thaws all processes in it; returns once they are.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        let path = self.path.as_ref().ok_or_else(|| {
            Error::Unsupported("pause: this kernel has no unified control groups".into())
        })?;
        fs::write(path.join("cgroup.freeze"), if frozen { "1" } else { "0" })
            .context(|| "freeze the control group".into())?;
        let wanted = u64::from(frozen);
        if self.wait_for(path, "frozen", wanted) {
            Ok(())
        } else {
            Err(Error::State(format!("pause: processes did not freeze within {SETTLE:?}")))
        }
    }

    /// Kills all processes in it and below and waits for them.
    pub fn kill(&self) {
        self.kill_at_once();
        if let Some(path) = &self.path {
            self.wait_for(path, "populated", 0);
        }
    }

    /// Kills all processes in it and below.
    pub fn kill_at_once(&self) {
        let Some(path) = &self.path else { return };
        if let Err(e) = fs::write(path.join("cgroup.kill"), "1") {
            warning!("cannot kill the processes of {}: {e}", path.display());
        }
    }

    /// Sends a signal to all processes in it and below.
    pub fn signal(&self, signal: i32) {
        for pid in self.processes() {
            // One that has ended meanwhile needs none.
            let _ = sys::send_signal(pid, signal);
        }
    }

    /// The processes in it and below, in the agent's numbers.
    pub fn processes(&self) -> Vec<i32> {
        let mut found = Vec::new();
        if let Some(path) = &self.path {
            for group in subtree(path) {
                let list = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
                // 0 is a process of another namespace.
                let pids = list.lines().filter_map(|line| line.parse::<i32>().ok());
                found.extend(pids.filter(|pid| *pid > 0));
            }
        }
        found
    }

    /// How many of its processes the kernel has killed for want of memory.
    pub fn oom_kills(&self) -> u64 {
        self.path.as_ref().map_or(0, |path| stats::key(&path.join("memory.events"), "oom_kill"))
    }

    /// Its figures.
    pub fn stats(&self) -> mvm_agent_protocol::messages::StatsResponse {
        self.path.as_deref().map(stats::read).unwrap_or_default()
    }

    /// Removes the group and those that the container has made in it.
    pub fn remove(&self) -> Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        for group in subtree(path).into_iter().rev() {
            match fs::remove_dir(&group) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::system(format!("remove {}", group.display()), e));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Waits until `key` of cgroup.events is `value`; the kernel announces changes.
    fn wait_for(&self, path: &Path, key: &str, value: u64) -> bool {
        let events = path.join("cgroup.events");
        let Ok(file) = File::open(&events) else { return false };
        let deadline = Instant::now() + SETTLE;
        while stats::key(&events, key) != value {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return false };
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
            match poll(&mut fds, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return false,
            }
            // Reading clears the announcement of this descriptor.
            let mut text = String::new();
            let _ = io::Seek::rewind(&mut (&file))
                .and_then(|()| io::Read::read_to_string(&mut (&file), &mut text));
        }
        true
    }
}

/// Writes a file of a group. Not by creating it: a missing one would be "permission denied".
fn set(file: &Path, value: &str) -> io::Result<()> {
    File::options().write(true).open(file)?.write_all(value.as_bytes())
}

/// The group that a process is in, which is `path` or one below it.
fn group_of(path: &Path, pid: i32) -> Option<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    // `path` is ROOT/mvm/ID, the kernel says mvm/ID/...
    let group = path.parent()?.parent()?.join(line);
    (group.starts_with(path) && !line.split('/').any(|part| part == "..")).then_some(group)
}

/// The group and all below it, parents first. A container may nest them deeply, so no recursion.
fn subtree(path: &Path) -> Vec<PathBuf> {
    let mut groups = vec![path.to_path_buf()];
    let mut at = 0;
    while let Some(group) = groups.get(at) {
        let children: Vec<PathBuf> = fs::read_dir(group)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| entry.path())
            .collect();
        groups.extend(children);
        at += 1;
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_written_and_missing_optional_files_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let resources: LinuxResources = serde_json::from_str(
            r#"{"memory":{"limit":1048576},"pids":{"limit":7},"hugepageLimits":[{"pageSize":"2MB","limit":0}]}"#,
        )
        .unwrap();
        // Plain files take the place of the kernel's.
        for name in ["memory.max", "pids.max"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let notices = Cgroup::at(dir.path()).apply(&resources).unwrap();
        assert!(matches!(&notices[..], [one] if one.contains("hugetlb.2MB.max")), "{notices:?}");
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!((read("memory.max"), read("pids.max")), ("1048576".into(), "7".into()));
        fs::remove_file(dir.path().join("pids.max")).unwrap();
        let error = Cgroup::at(dir.path()).apply(&resources).unwrap_err().to_string();
        assert!(error.contains("pids.max") && error.contains("No such file"), "{error}");
    }

    #[test]
    fn a_memory_limit_below_what_is_used_is_refused_if_asked_to_check() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("memory.max"), "").unwrap();
        fs::write(dir.path().join("memory.current"), "4096\n").unwrap();
        let apply = |limit: u64, check: bool| {
            let json = format!(r#"{{"memory":{{"limit":{limit},"checkBeforeUpdate":{check}}}}}"#);
            Cgroup::at(dir.path()).apply(&serde_json::from_str(&json).unwrap())
        };
        assert!(matches!(apply(4095, true), Err(Error::Invalid(m)) if m.contains("4096 bytes")));
        assert!(apply(4095, false).is_ok() && apply(4096, true).is_ok());
    }

    #[test]
    fn without_a_hierarchy_limits_are_a_notice() {
        let group = Cgroups::open(Path::new("/nonexistent")).create("c").unwrap();
        let resources: LinuxResources = serde_json::from_str(r#"{"pids":{"limit":7}}"#).unwrap();
        assert!(group.apply(&resources).unwrap()[0].contains("no unified control groups"));
        assert!(matches!(group.freeze(true), Err(Error::Unsupported(_))));
    }

    #[test]
    fn subtree_lists_parents_first() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        let groups = subtree(dir.path());
        assert_eq!(groups.len(), 3);
        assert!(groups[2].ends_with("a/b"));
    }
}
