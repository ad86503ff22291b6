//! The host's control groups: what a machine takes is counted, and limited, where the container's or
//! pod's processes would be.
//!
//! The shim itself goes there before it starts the machine's processes, which so are there from their
//! first instruction on. Limits are those of the groups above (the kubelet's, for a pod); the
//! container's own hold in the guest.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use oci_spec::runtime::Spec;

/// What every process of a group is listed in, and is put there by being written to.
const PROCS: &str = "cgroup.procs";

/// Files of a group of processors and memory nodes (version 1) that have to be filled before a process can
/// be in it.
const CPUSET: [&str; 2] = ["cpuset.cpus", "cpuset.mems"];

/// How long the processes of an ended machine may take to leave.
const LEAVE: Duration = Duration::from_secs(2);

/// A path of the specification that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("linux.cgroupsPath: {0:?} is neither a plain path nor SLICE:PREFIX:NAME")]
pub struct PathError(String);

/// The groups of one container or pod, in all hierarchies. Dropping it leaves and removes them.
#[derive(Debug)]
pub struct Cgroups {
    joined: Vec<Joined>,
}

#[derive(Debug)]
struct Joined {
    group: PathBuf,
    /// Where this process was before.
    before: PathBuf,
}

impl Cgroups {
    /// Puts this process where the specification says. Where the host does not let it, it stays; what
    /// is not allowed is written to the log.
    ///
    /// # Errors
    /// The specification's path is none.
    pub fn join(spec: &Spec) -> Result<Self, PathError> {
        let mut this = Self { joined: Vec::new() };
        let Some(path) = path(spec)? else { return Ok(this) };
        for hierarchy in hierarchies() {
            match hierarchy.join(&path) {
                Ok(joined) => this.joined.push(joined),
                Err(e) => {
                    tracing::warn!("cannot be in {}: {e}", hierarchy.group(&path).display());
                }
            }
        }
        Ok(this)
    }

    /// Removes the groups of a specification, in which nothing may be any more.
    pub fn remove(spec: &Spec) {
        let Ok(Some(path)) = path(spec) else { return };
        let until = Instant::now() + LEAVE;
        for hierarchy in hierarchies() {
            remove(&hierarchy.group(&path), until);
        }
    }
}

/// Leaves the group of a specification, which nobody of a killed shim's needs any more, and removes it.
pub fn abandon(spec: &Spec) {
    let Ok(Some(path)) = path(spec) else { return };
    let until = Instant::now() + LEAVE;
    for hierarchy in hierarchies() {
        let group = hierarchy.group(&path);
        if hierarchy.own == group
            && let Err(e) = enter(&hierarchy.at)
        {
            tracing::warn!("cannot leave {}: {e}", group.display());
            continue;
        }
        remove(&group, until);
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        let until = Instant::now() + LEAVE;
        for Joined { group, before } in self.joined.drain(..) {
            if let Err(e) = enter(&before) {
                tracing::warn!("cannot go back to {}: {e}", before.display());
                continue;
            }
            remove(&group, until);
        }
    }
}

/// Removes a group once it is empty, which has to be by `until`.
fn remove(group: &Path, until: Instant) {
    loop {
        match fs::remove_dir(group) {
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("cannot remove {}: {e}", group.display());
                return;
            }
            _ => return,
        }
    }
}

/// Puts this process into a group.
fn enter(group: &Path) -> io::Result<()> {
    fs::write(group.join(PROCS), "0")
}

/// A specification's path below the roots of the hierarchies.
fn path(spec: &Spec) -> Result<Option<PathBuf>, PathError> {
    let linux = spec.linux().as_ref();
    let Some(given) = linux.and_then(|linux| linux.cgroups_path().as_ref()) else {
        return Ok(None);
    };
    let text = given.to_str().unwrap_or_default();
    let error = || PathError(given.display().to_string());
    let path = match text.split(':').collect::<Vec<_>>()[..] {
        [""] => return Ok(None),
        [path] => PathBuf::from(path.trim_start_matches('/')),
        [slice, prefix, name] => of_systemd(slice, prefix, name).ok_or_else(error)?,
        _ => return Err(error()),
    };
    let plain = path.components().all(|c| matches!(c, Component::Normal(_)));
    let some = path.components().next().is_some();
    if plain && some { Ok(Some(path)) } else { Err(error()) }
}

/// Where systemd has the scope `prefix-name` of a slice: `a-b.slice` is in `a.slice`.
fn of_systemd(slice: &str, prefix: &str, name: &str) -> Option<PathBuf> {
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let stem = slice.strip_suffix(".slice")?;
    let mut path = PathBuf::new();
    // "-.slice" is the root.
    if stem != "-" {
        if stem.split('-').any(str::is_empty) || slice.contains('/') {
            return None;
        }
        for (at, _) in stem.match_indices('-') {
            path.push(format!("{}.slice", &stem[..at]));
        }
        path.push(slice);
    }
    let good = !name.is_empty() && !prefix.contains('/') && !name.contains('/');
    let scope = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}-{name}") };
    good.then(|| path.join(format!("{scope}.scope")))
}

/// A mounted hierarchy of control groups.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    at: PathBuf,
    /// This process's group.
    own: PathBuf,
    cpuset: bool,
}

impl Hierarchy {
    fn group(&self, path: &Path) -> PathBuf {
        self.at.join(path)
    }

    fn join(&self, path: &Path) -> io::Result<Joined> {
        let mut group = self.at.clone();
        for part in path.components() {
            let above = group.clone();
            group.push(part);
            match fs::create_dir(&group) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
                _ => {}
            }
            if self.cpuset {
                inherit_cpuset(&above, &group)?;
            }
        }
        match enter(&group) {
            Ok(()) => Ok(Joined { group, before: self.own.clone() }),
            Err(e) => {
                // Its ancestors may be somebody else's.
                let _ = fs::remove_dir(&group);
                Err(e)
            }
        }
    }
}

fn inherit_cpuset(above: &Path, group: &Path) -> io::Result<()> {
    for file in CPUSET {
        if fs::read_to_string(group.join(file))?.trim().is_empty() {
            fs::write(group.join(file), fs::read_to_string(above.join(file))?)?;
        }
    }
    Ok(())
}

fn hierarchies() -> Vec<Hierarchy> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    parse(&mounts, &own)
}

/// The hierarchies of a mountinfo table (proc(5)) in which a process is according to its `cgroup` file
/// (cgroups(7)).
fn parse(mounts: &str, own: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mounts.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let (left, right): (Vec<_>, Vec<_>) =
            (left.split(' ').collect(), right.split(' ').collect());
        let ([_, _, _, root, at, ..], [kind, _, options, ..]) = (&left[..], &right[..]) else {
            continue;
        };
        let words: Vec<&str> = options.split(',').collect();
        let group = own.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (number, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            let same = match *kind {
                "cgroup2" => number == "0" && controllers.is_empty(),
                "cgroup" => {
                    !controllers.is_empty() && controllers.split(',').all(|c| words.contains(&c))
                }
                _ => false,
            };
            same.then_some(path)
        });
        let Some(group) = group else { continue };
        // What is mounted may be a part of the hierarchy.
        let Ok(below) = Path::new(group).strip_prefix(root) else { continue };
        let at = PathBuf::from(at);
        if found.iter().any(|known| known.at == at) {
            continue;
        }
        let cpuset = *kind == "cgroup" && words.contains(&"cpuset");
        found.push(Hierarchy { own: at.join(below), at, cpuset });
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(path: &str) -> Spec {
        let json = serde_json::json!({ "ociVersion": "1.0.2", "linux": { "cgroupsPath": path } });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn both_forms_of_paths_are_understood() {
        for (given, want) in [
            ("/k8s.io/abc", "k8s.io/abc"),
            ("kubepods/pod1/abc", "kubepods/pod1/abc"),
            (
                "kubepods-burstable-pod1.slice:cri-containerd:abc",
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-abc.scope",
            ),
            ("test.slice:cri-containerd:abc", "test.slice/cri-containerd-abc.scope"),
            (":x:abc", "system.slice/x-abc.scope"),
            ("-.slice::abc", "abc.scope"),
        ] {
            assert_eq!(path(&spec(given)), Ok(Some(want.into())), "{given}");
        }
        assert_eq!(path(&spec("")), Ok(None));
        for bad in [
            "/",
            "/a/../b",
            "..",
            "a:b",
            "a:b:c",
            "a.slice:b:",
            "a.slice:../b:c",
            "a--b.slice:x:y",
            "../a.slice:x:y",
        ] {
            assert!(path(&spec(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn hierarchies_of_both_versions_are_found() {
        let mounts = "\
            25 1 0:22 / /proc rw - proc proc rw\n\
            30 1 0:26 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct\n\
            31 1 0:27 /docker/x /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n\
            32 1 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
            33 1 0:29 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n";
        let own = "4:cpu,cpuacct:/a\n3:cpuset:/docker/x/b\n2:pids:/p\n0::/u\n";
        let found = parse(mounts, own);
        let owns: Vec<_> = found.iter().map(|h| h.own.display().to_string()).collect();
        assert_eq!(
            owns,
            [
                "/sys/fs/cgroup/cpu,cpuacct/a",
                "/sys/fs/cgroup/cpuset/b",
                "/sys/fs/cgroup/unified/u",
                "/sys/fs/cgroup/pids/p"
            ]
        );
        assert_eq!(found.iter().filter(|h| h.cpuset).count(), 1);
        // A part of the hierarchy in which this process is not.
        assert_eq!(parse(mounts, "3:cpuset:/elsewhere\n"), []);
        let unified = "30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(parse(unified, "0::/x\n")[0].own, Path::new("/sys/fs/cgroup/x"));
    }

    #[test]
    fn a_group_of_processors_is_filled_before_it_is_entered() {
        // An ordinary directory does not care.
        let dir = tempfile::tempdir().unwrap();
        let hierarchy =
            Hierarchy { at: dir.path().into(), own: dir.path().join("own"), cpuset: false };
        let joined = hierarchy.join(Path::new("a/b")).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("a/b").join(PROCS)).unwrap(), "0");
        assert_eq!(joined.before, dir.path().join("own"));
        for (group, cpus) in [("up", "0-3\n"), ("empty", "\n"), ("full", "1\n")] {
            fs::create_dir(dir.path().join(group)).unwrap();
            for file in CPUSET {
                fs::write(dir.path().join(group).join(file), cpus).unwrap();
            }
        }
        for (group, want) in [("empty", "0-3\n"), ("full", "1\n")] {
            inherit_cpuset(&dir.path().join("up"), &dir.path().join(group)).unwrap();
            assert_eq!(fs::read_to_string(dir.path().join(group).join(CPUSET[0])).unwrap(), want);
        }
    }
}
