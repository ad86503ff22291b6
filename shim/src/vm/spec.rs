//! From the bundle's specification to the guest's: what the host takes care of is taken out, what
//! names things of the host is replaced.
//!
//! The network namespace, hooks, and the CPUs and memory nodes to run on are the host's affair. Other
//! namespaces that containers of the host would share by path are the guest's own: it has this one
//! container.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use mvm_sandbox::spec::{Container, PROVIDED_DIR, ProvidedFile};
use oci_spec::runtime::{
    Linux, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, Mount, Spec,
};

use super::holder::Network;
use crate::host::Size;

/// Largest file of the host that is handed to the guest as it is.
const MAX_FILE: u64 = 1 << 20;

/// What kernel and agent of the guest need beside a container's own limit, in bytes.
const OVERHEAD: u64 = 96 << 20;

/// Files that a container engine writes for a container, and mounts writable as a habit.
const ENGINE_FILES: [&str; 3] = ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"];

/// Annotations of containerd's CRI: what a whole pod asks for.
const POD_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const POD_CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const POD_CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

/// A specification that cannot be carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A directory of the host is to be seen in the guest.
    #[error(
        "the mount {destination} of the host's directory {origin} is not supported yet: mvm shares no \
         directories with a guest"
    )]
    Directory {
        /// Where it would be.
        destination: String,
        /// What it is of.
        origin: String,
    },
    /// A file of the host is to be written in the guest.
    #[error(
        "the writable mount {destination} of the host's file {origin} is not supported yet: mvm shares \
         no files with a guest; mount it read-only"
    )]
    Writable {
        /// Where it would be.
        destination: String,
        /// What it is of.
        origin: String,
    },
    /// A file of the host cannot be handed over.
    #[error("the mount {destination}: {origin}: {reason}")]
    Source {
        /// Where it would be.
        destination: String,
        /// What it is of.
        origin: String,
        /// Why.
        reason: String,
    },
    /// A namespace of the host's.
    #[error("linux.namespaces: a {0} namespace of the host cannot be joined by a machine")]
    Namespace(&'static str),
}

/// Which network namespace the specification asks for.
pub fn network(spec: &Spec) -> Network {
    let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_deref());
    let found = namespaces.unwrap_or_default().iter();
    match found.clone().find(|n| n.typ() == LinuxNamespaceType::Network) {
        None => Network::Host,
        Some(namespace) => match namespace.path() {
            Some(path) if !path.as_os_str().is_empty() => Network::Join(path.clone()),
            _ => Network::New,
        },
    }
}

/// How large the machine has to be, as far as the specification says.
pub fn size(spec: &Spec) -> Size {
    let annotations = spec.annotations().clone().unwrap_or_default();
    let resources = spec.linux().as_ref().and_then(|l| l.resources().as_ref());
    let number = |key: &str| annotations.get(key).and_then(|v| v.parse::<i64>().ok());
    let pod_memory = number(POD_MEMORY).filter(|m| *m > 0);
    let limit = resources.and_then(|r| r.memory().as_ref()).and_then(|m| m.limit());
    let memory = pod_memory.or(limit.filter(|l| *l > 0)).and_then(|m| u64::try_from(m).ok());
    let cpu = resources.and_then(|r| r.cpu().as_ref());
    let own = cpu.map(|c| (c.quota().unwrap_or(0), c.period().unwrap_or(0)));
    let pod = number(POD_CPU_QUOTA).map(|quota| {
        (quota, number(POD_CPU_PERIOD).and_then(|p| u64::try_from(p).ok()).unwrap_or(0))
    });
    let share = pod.filter(|(quota, _)| *quota > 0).or(own);
    let vcpus = share.and_then(|(quota, period)| {
        let (quota, period) =
            (u64::try_from(quota).ok()?, if period == 0 { 100_000 } else { period });
        (quota > 0).then(|| u32::try_from(quota.div_ceil(period)).unwrap_or(u32::MAX))
    });
    Size { vcpus, memory: memory.map(|m| m.saturating_add(OVERHEAD)) }
}

/// The specification as the guest gets it.
///
/// # Errors
/// See [`Error`].
pub fn for_guest(spec: &Spec) -> Result<Container, Error> {
    let mut spec = spec.clone();
    let mut files = Vec::new();
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for (index, mount) in mounts.iter_mut().enumerate() {
        if let Some(file) = provide(index, mount)? {
            files.push(file);
        }
    }
    spec.set_mounts(Some(mounts));
    spec.set_hooks(None);
    if let Some(root) = spec.root_mut().as_mut() {
        root.set_path("rootfs".into());
    }
    let named = spec.hostname().as_ref().is_some_and(|h| !h.is_empty())
        || spec.domainname().as_ref().is_some_and(|d| !d.is_empty());
    let mut linux = linux(&spec);
    namespaces(&mut linux, named)?;
    linux.set_cgroups_path(None);
    if let Some(resources) = linux.resources_mut().as_mut()
        && let Some(mut cpu) = resources.cpu().clone()
    {
        cpu.set_cpus(None);
        cpu.set_mems(None);
        resources.set_cpu(Some(cpu));
    }
    spec.set_linux(Some(linux));
    Ok(Container { spec, files, volumes: Vec::new() })
}

/// The Linux part; an empty one if there is none, which is not the library's default.
pub fn linux(spec: &Spec) -> Linux {
    let empty = || serde_json::from_str("{}").unwrap_or_default();
    spec.linux().clone().unwrap_or_else(empty)
}

fn namespaces(linux: &mut Linux, named: bool) -> Result<(), Error> {
    use LinuxNamespaceType::{Mount, Network, Pid, User, Uts};
    let mut kept: Vec<LinuxNamespace> = Vec::new();
    for namespace in linux.namespaces().iter().flatten() {
        let path = namespace.path().as_ref().filter(|p| !p.as_os_str().is_empty());
        match (namespace.typ(), path) {
            // The guest's whole network is the container's.
            (Network, _) => {}
            (User, Some(_)) => return Err(Error::Namespace("user")),
            (Mount, Some(_)) => return Err(Error::Namespace("mount")),
            // Sharing the process ids of others: those of the whole guest.
            (Pid, Some(_)) => {}
            (_, Some(_)) => {
                let mut own = namespace.clone();
                own.set_path(None);
                kept.push(own);
            }
            (_, None) => kept.push(namespace.clone()),
        }
    }
    let mut need = |kind: LinuxNamespaceType| {
        if !kept.iter().any(|n| n.typ() == kind)
            && let Ok(namespace) = LinuxNamespaceBuilder::default().typ(kind).build()
        {
            kept.push(namespace);
        }
    };
    need(Mount);
    if named {
        need(Uts);
    }
    linux.set_namespaces(Some(kept));
    Ok(())
}

/// A mount of something of the host: a file is handed to the guest.
fn provide(index: usize, mount: &mut Mount) -> Result<Option<ProvidedFile>, Error> {
    let words = mount.options().clone().unwrap_or_default();
    let is_bind = matches!(mount.typ().as_deref(), Some("bind" | "rbind"))
        || words.iter().any(|w| w == "bind" || w == "rbind");
    let Some(origin) = mount.source().clone().filter(|_| is_bind) else { return Ok(None) };
    let destination = mount.destination().display().to_string();
    let named = origin.display().to_string();
    let failed = |reason: String| Error::Source {
        destination: destination.clone(),
        origin: named.clone(),
        reason,
    };
    let metadata = std::fs::metadata(&origin).map_err(|e| failed(e.to_string()))?;
    if metadata.is_dir() {
        return Err(Error::Directory { destination, origin: named });
    }
    if !metadata.is_file() {
        return Err(failed("only files can be handed to a guest".into()));
    }
    let writable = !words.iter().any(|w| w == "ro");
    if writable && !ENGINE_FILES.contains(&destination.as_str()) {
        return Err(Error::Writable { destination, origin: named });
    }
    let data = read(&origin, metadata.len()).map_err(failed)?;
    let name = format!("file{index}");
    mount.set_source(Some(Path::new(PROVIDED_DIR).join(&name)));
    Ok(Some(ProvidedFile { name: name.into(), data, mode: metadata.mode() & 0o7777 }))
}

fn read(path: &Path, len: u64) -> Result<Vec<u8>, String> {
    use std::io::Read;
    let too_long = || format!("the file is longer than {MAX_FILE} bytes");
    if len > MAX_FILE {
        return Err(too_long());
    }
    let file = std::fs::File::open(path).map_err(|e| e.to_string())?;
    let mut data = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut data).map_err(|e| e.to_string())?;
    if data.len() as u64 > MAX_FILE { Err(too_long()) } else { Ok(data) }
}

/// The annotations, for whoever looks for one.
pub fn annotations(spec: &Spec) -> HashMap<String, String> {
    spec.annotations().clone().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn parse(linux: Value, mounts: Value) -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.0.2",
            "root": { "path": "/some/where", "readonly": true },
            "hostname": "h",
            "mounts": mounts,
            "linux": linux,
            "hooks": { "createRuntime": [{ "path": "/bin/true" }] },
        }))
        .unwrap()
    }

    fn kinds(spec: &Spec) -> Vec<String> {
        let namespaces = spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
        namespaces
            .iter()
            .map(|n| format!("{}{}", n.typ(), if n.path().is_some() { "!" } else { "" }))
            .collect()
    }

    #[test]
    fn what_is_the_hosts_is_taken_out() {
        let spec = parse(
            json!({
                "cgroupsPath": "/default/c",
                "namespaces": [
                    { "type": "pid" }, { "type": "network", "path": "/proc/1/ns/net" },
                    { "type": "ipc", "path": "/proc/1/ns/ipc" }, { "type": "mount" },
                ],
                "resources": { "cpu": { "cpus": "0-3", "mems": "0", "shares": 512 } },
            }),
            json!([{ "destination": "/proc", "type": "proc", "source": "proc" }]),
        );
        assert_eq!(network(&spec), Network::Join("/proc/1/ns/net".into()));
        let guest = for_guest(&spec).unwrap().spec;
        assert_eq!(kinds(&guest), ["pid", "ipc", "mnt", "uts"]);
        assert!(guest.hooks().is_none());
        let linux = guest.linux().as_ref().unwrap();
        assert!(linux.cgroups_path().is_none());
        let cpu = linux.resources().as_ref().unwrap().cpu().as_ref().unwrap();
        assert_eq!((cpu.cpus(), cpu.mems(), cpu.shares()), (&None, &None, Some(512)));
        assert_eq!(guest.root().as_ref().unwrap().readonly(), Some(true));
    }

    #[test]
    fn networks_are_told_apart() {
        let none = parse(json!({ "namespaces": [] }), json!([]));
        assert_eq!(network(&none), Network::Host);
        let new = parse(json!({ "namespaces": [{ "type": "network" }] }), json!([]));
        assert_eq!(network(&new), Network::New);
    }

    #[test]
    fn namespaces_of_the_host_are_refused_where_they_cannot_be() {
        for kind in ["user", "mount"] {
            let linux = json!({ "namespaces": [{ "type": kind, "path": "/proc/1/ns/x" }] });
            let error = for_guest(&parse(linux, json!([]))).unwrap_err();
            assert_eq!(error, Error::Namespace(kind));
        }
        let linux = json!({ "namespaces": [{ "type": "pid", "path": "/proc/1/ns/pid" }] });
        assert_eq!(kinds(&for_guest(&parse(linux, json!([]))).unwrap().spec), ["mnt", "uts"]);
    }

    #[test]
    fn files_are_handed_over_and_directories_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("resolv.conf");
        std::fs::write(&file, "nameserver 1.1.1.1\n").unwrap();
        let mount = |destination: &str, source: &Path, options: Value| json!([{ "destination": destination, "type": "bind", "source": source, "options": options }]);
        let linux = || json!({ "namespaces": [{ "type": "mount" }] });
        let spec = parse(linux(), mount("/etc/resolv.conf", &file, json!(["rbind", "rw"])));
        let guest = for_guest(&spec).unwrap();
        assert_eq!(guest.files[0].data, b"nameserver 1.1.1.1\n");
        let source = guest.spec.mounts().as_ref().unwrap()[0].source().clone().unwrap();
        assert_eq!(source, Path::new(PROVIDED_DIR).join("file0"));
        let spec = parse(linux(), mount("/x", &file, json!(["bind", "ro"])));
        assert_eq!(for_guest(&spec).unwrap().files.len(), 1);
        let refused = |source: &Path, options| {
            for_guest(&parse(linux(), mount("/x", source, options))).unwrap_err()
        };
        assert!(matches!(refused(&file, json!(["bind"])), Error::Writable { .. }));
        assert!(matches!(refused(dir.path(), json!(["rbind", "ro"])), Error::Directory { .. }));
        assert!(matches!(refused(Path::new("/no/such"), json!(["bind"])), Error::Source { .. }));
        assert!(matches!(refused(Path::new("/dev/null"), json!(["bind"])), Error::Source { .. }));
    }

    #[test]
    fn the_machine_is_as_large_as_the_limits_ask_for() {
        let spec = parse(
            json!({ "resources": {
                "memory": { "limit": 256 << 20 }, "cpu": { "quota": 150_000, "period": 100_000 },
            } }),
            json!([]),
        );
        let want = Size { vcpus: Some(2), memory: Some((256 << 20) + OVERHEAD) };
        assert_eq!(size(&spec), want);
        let mut pod = spec;
        let annotations =
            [(POD_MEMORY, "1048576"), (POD_CPU_QUOTA, "400000"), (POD_CPU_PERIOD, "0")];
        let annotations = annotations.map(|(k, v)| (k.to_owned(), v.to_owned()));
        pod.set_annotations(Some(HashMap::from(annotations)));
        assert_eq!(size(&pod), Size { vcpus: Some(4), memory: Some((1 << 20) + OVERHEAD) });
        let open = parse(json!({ "resources": { "memory": { "limit": -1 } } }), json!([]));
        assert_eq!(size(&open), Size::default());
    }
}
