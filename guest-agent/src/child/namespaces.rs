//! The namespaces of a container's first process.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::sethostname;
use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespace, LinuxNamespaceType};

use crate::error::{Context, Error, Result};
use crate::spec::Spec;
use crate::sys;

/// The clone flag of a namespace type.
pub fn flag(kind: LinuxNamespaceType) -> CloneFlags {
    match kind {
        LinuxNamespaceType::Mount => CloneFlags::CLONE_NEWNS,
        LinuxNamespaceType::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
        LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
        LinuxNamespaceType::User => CloneFlags::CLONE_NEWUSER,
        LinuxNamespaceType::Pid => CloneFlags::CLONE_NEWPID,
        LinuxNamespaceType::Network => CloneFlags::CLONE_NEWNET,
        LinuxNamespaceType::Time => CloneFlags::from_bits_retain(libc::CLONE_NEWTIME),
    }
}

/// The specification's namespaces.
pub fn of(spec: &Spec) -> &[LinuxNamespace] {
    spec.linux.as_ref().and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default()
}

/// The one of a type, if the container has (or joins) its own.
pub fn find(spec: &Spec, kind: LinuxNamespaceType) -> Option<&LinuxNamespace> {
    of(spec).iter().find(|namespace| namespace.typ() == kind)
}

/// Opens a namespace by its path. What is there may be anything, a pipe too: nothing to wait for.
pub fn open(path: &Path) -> std::io::Result<File> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    File::options().read(true).custom_flags(flags).open(path)
}

/// Refuses what cannot be set up, before any process exists.
pub fn check(spec: &Spec) -> Result<()> {
    let all = of(spec);
    for (at, namespace) in all.iter().enumerate() {
        let kind = namespace.typ();
        if all[..at].iter().any(|earlier| earlier.typ() == kind) {
            return Err(Error::Invalid(format!("linux.namespaces: {kind} is there twice")));
        }
        if kind == LinuxNamespaceType::Mount && namespace.path().is_some() {
            return Err(Error::Unsupported(
                "linux.namespaces: joining a mount namespace by path is not supported".into(),
            ));
        }
    }
    if find(spec, LinuxNamespaceType::Mount).is_none() {
        return Err(Error::Invalid("linux.namespaces: a container needs a mount namespace".into()));
    }
    let needs = |given: bool, kind, field: &str| {
        if given && find(spec, kind).is_none() {
            return Err(Error::Invalid(format!("{field} needs a {kind} namespace")));
        }
        Ok(())
    };
    needs(is_given(spec.hostname.as_ref()), LinuxNamespaceType::Uts, "hostname")?;
    needs(is_given(spec.domainname.as_ref()), LinuxNamespaceType::Uts, "domainname")?;
    let linux = spec.linux.as_ref();
    let offsets = linux.and_then(|linux| linux.time_offsets().as_ref());
    needs(offsets.is_some_and(|o| !o.is_empty()), LinuxNamespaceType::Time, "linux.timeOffsets")?;
    let maps = |get: fn(&Linux) -> &Option<Vec<LinuxIdMapping>>| {
        linux.and_then(|linux| get(linux).as_ref()).is_some_and(|maps| !maps.is_empty())
    };
    let new_user = find(spec, LinuxNamespaceType::User).is_some_and(|ns| ns.path().is_none());
    let uid_maps = (maps(Linux::uid_mappings), "linux.uidMappings");
    for (given, field) in [uid_maps, (maps(Linux::gid_mappings), "linux.gidMappings")] {
        needs(given, LinuxNamespaceType::User, field)?;
        if new_user && !given {
            return Err(Error::Invalid(format!("{field}: a new user namespace needs some")));
        }
    }
    Ok(())
}

fn is_given(name: Option<&String>) -> bool {
    name.is_some_and(|name| !name.is_empty())
}

/// Joins and creates the namespaces that were not made with the process itself (those are the
/// process-id and user namespaces), and gives them their names, loopback and clock offsets.
pub fn enter(spec: &Spec) -> Result<()> {
    let mut new = CloneFlags::empty();
    for namespace in of(spec) {
        let kind = namespace.typ();
        match namespace.path() {
            _ if kind == LinuxNamespaceType::Pid => {}
            None if kind == LinuxNamespaceType::User => {}
            None => new |= flag(kind),
            Some(path) => {
                let what = || format!("join the {kind} namespace {}", path.display());
                let file = open(path).context(what)?;
                setns(file.as_fd(), flag(kind)).context(what)?;
            }
        }
    }
    unshare(new).context(|| "create namespaces".into())?;
    if new.contains(CloneFlags::CLONE_NEWNET) {
        sys::loopback_up().context(|| "bring the loopback interface up".into())?;
    }
    if let Some(name) = spec.hostname.as_ref().filter(|name| !name.is_empty()) {
        sethostname(name).context(|| format!("hostname {name:?}"))?;
    }
    if let Some(name) = spec.domainname.as_ref().filter(|name| !name.is_empty()) {
        sys::set_domain_name(name).context(|| format!("domainname {name:?}"))?;
    }
    set_time_offsets(spec)
}

fn set_time_offsets(spec: &Spec) -> Result<()> {
    let Some(offsets) = spec.linux.as_ref().and_then(|linux| linux.time_offsets().as_ref()) else {
        return Ok(());
    };
    let lines: String = offsets
        .iter()
        .map(|(clock, offset)| {
            let (secs, nanos) = (offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
            format!("{clock} {secs} {nanos}\n")
        })
        .collect();
    if lines.is_empty() {
        return Ok(());
    }
    std::fs::write("/proc/self/timens_offsets", &lines)
        .context(|| format!("linux.timeOffsets {:?}", lines.trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: &str) -> Spec {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn check_names_the_missing_namespace() {
        let error = check(&spec(
            r#"{"ociVersion":"1.1.0","hostname":"x","linux":{"namespaces":[{"type":"mount"}]}}"#,
        ));
        assert!(
            matches!(error, Err(Error::Invalid(m)) if m.contains("hostname") && m.contains("uts"))
        );
        let error = check(&spec(r#"{"ociVersion":"1.1.0","linux":{"namespaces":[]}}"#));
        assert!(matches!(error, Err(Error::Invalid(m)) if m.contains("mount namespace")));
    }

    #[test]
    fn check_refuses_doubles_and_joined_mount_namespaces() {
        let double = r#"{"ociVersion":"1.1.0","linux":{"namespaces":[{"type":"mount"},{"type":"pid"},{"type":"pid"}]}}"#;
        assert!(matches!(check(&spec(double)), Err(Error::Invalid(m)) if m.contains("twice")));
        let joined = r#"{"ociVersion":"1.1.0","linux":{"namespaces":[{"type":"mount","path":"/proc/1/ns/mnt"}]}}"#;
        assert!(matches!(check(&spec(joined)), Err(Error::Unsupported(_))));
    }
}
