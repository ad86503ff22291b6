//! From the bundle's specification to the guest's: what the host takes care of is taken out, what
//! names things of the host is replaced.
//!
//! The network namespace, hooks, and the CPUs and memory nodes to run on are the host's affair. Other
//! namespaces that containers of the host would share by path are the guest's own: only containers of
//! one pod share any, and a guest has one container or one pod.

use std::collections::HashMap;
use std::path::Path;

use mvm_sandbox::spec::{Container, Root};
use oci_spec::runtime::{
    Hooks, Linux, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, Spec,
};

use super::binds::{self, Bind};
use super::blocks::{self, Wanted};
use super::holder::Network;
use super::pod::Role;
use crate::host::Size;

/// What kernel and agent of the guest need beside a container's own limit, in bytes.
pub const OVERHEAD: u64 = 96 << 20;

/// Annotations of containerd's CRI: what a whole pod asks for.
const POD_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const POD_CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const POD_CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

/// A specification that cannot be carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Something of the host that cannot be seen in the guest.
    #[error(transparent)]
    Bind(#[from] binds::Error),
    /// A namespace of the host's.
    #[error("linux.namespaces: a {0} namespace of the host cannot be joined by a machine")]
    Namespace(&'static str),
}

/// A container as the guest gets it, and what it needs of the host.
#[derive(Debug, Clone)]
pub struct Inside {
    /// What the guest gets. Its root is still to be said.
    pub container: Container,
    /// What the host shares for it.
    pub binds: Vec<Bind>,
    /// Block devices that it is to have. Their disks are still to be made.
    pub blocks: Vec<Wanted>,
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
    let limits = limits(spec);
    Size { memory: limits.memory.map(|m| m.saturating_add(OVERHEAD)), ..limits }
}

/// The limits of the container, or of its whole pod.
pub fn limits(spec: &Spec) -> Size {
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
    Size { vcpus, memory }
}

/// The specification as the guest gets it. `bundle` is where relative paths begin, `name` what the
/// names of shares begin with.
///
/// # Errors
/// See [`Error`].
pub fn for_guest(spec: &Spec, bundle: &Path, role: Role, name: &str) -> Result<Inside, Error> {
    let mut spec = spec.clone();
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    let provided = binds::provide(&mut mounts, bundle, role, name)?;
    spec.set_mounts(Some(mounts));
    // Those that are run in the container are the guest's.
    let mut hooks = Hooks::default();
    hooks.set_start_container(spec.hooks().as_ref().and_then(|h| h.start_container().clone()));
    spec.set_hooks(hooks.start_container().is_some().then_some(hooks));
    if let Some(root) = spec.root_mut().as_mut() {
        root.set_path("rootfs".into());
    }
    let mut linux = linux(&spec);
    let shares_uts = namespaces(&mut linux, role)?;
    if shares_uts {
        // The pod's names are those of the machine.
        spec.set_hostname(None);
        spec.set_domainname(None);
    }
    let named = spec.hostname().as_ref().is_some_and(|h| !h.is_empty())
        || spec.domainname().as_ref().is_some_and(|d| !d.is_empty());
    need(&mut linux, LinuxNamespaceType::Mount);
    if named {
        need(&mut linux, LinuxNamespaceType::Uts);
    }
    linux.set_cgroups_path(None);
    if let Some(resources) = linux.resources_mut().as_mut()
        && let Some(mut cpu) = resources.cpu().clone()
    {
        cpu.set_cpus(None);
        cpu.set_mems(None);
        resources.set_cpu(Some(cpu));
    }
    spec.set_linux(Some(linux));
    let blocks = blocks::wanted(&spec);
    blocks::keep_given(&mut spec, &blocks);
    let binds::Provided { binds, memory } = provided;
    let volumes = binds.iter().map(Bind::volume).collect();
    let (root, files, devices) = (Root::Image, Vec::new(), Vec::new());
    let hook_state = Vec::new();
    let container = Container { spec, root, files, volumes, memory, devices, hook_state };
    Ok(Inside { container, binds, blocks })
}

/// The Linux part; an empty one if there is none, which is not the library's default.
pub fn linux(spec: &Spec) -> Linux {
    let empty = || serde_json::from_str("{}").unwrap_or_default();
    spec.linux().clone().unwrap_or_else(empty)
}

/// Leaves the namespaces that the guest is to make. Says whether the host name is the pod's.
fn namespaces(linux: &mut Linux, role: Role) -> Result<bool, Error> {
    use LinuxNamespaceType::{Ipc, Mount, Network, Pid, User, Uts};
    let member = role == Role::Member;
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
            // The pod's are those of the machine.
            (Ipc | Uts, Some(_)) if member => {}
            (_, Some(_)) => {
                let mut own = namespace.clone();
                own.set_path(None);
                kept.push(own);
            }
            (_, None) => kept.push(namespace.clone()),
        }
    }
    let shares_uts = member && !kept.iter().any(|n| n.typ() == Uts);
    linux.set_namespaces(Some(kept));
    Ok(shares_uts)
}

fn need(linux: &mut Linux, kind: LinuxNamespaceType) {
    let mut all = linux.namespaces().clone().unwrap_or_default();
    if !all.iter().any(|n| n.typ() == kind)
        && let Ok(namespace) = LinuxNamespaceBuilder::default().typ(kind).build()
    {
        all.push(namespace);
    }
    linux.set_namespaces(Some(all));
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

    fn inside(spec: &Spec, role: Role) -> Result<Inside, Error> {
        for_guest(spec, Path::new("/b"), role, "c0")
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
        let guest = inside(&spec, Role::Alone).unwrap().container.spec;
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
            let error = inside(&parse(linux, json!([])), Role::Alone).unwrap_err();
            assert_eq!(error, Error::Namespace(kind));
        }
        let linux = json!({ "namespaces": [{ "type": "pid", "path": "/proc/1/ns/pid" }] });
        let guest = inside(&parse(linux, json!([])), Role::Alone).unwrap();
        assert_eq!(kinds(&guest.container.spec), ["mnt", "uts"]);
    }

    #[test]
    fn containers_of_a_pod_share_the_machines_names_and_queues() {
        let linux = json!({ "namespaces": [
            { "type": "pid" }, { "type": "ipc", "path": "/proc/1/ns/ipc" },
            { "type": "uts", "path": "/proc/1/ns/uts" }, { "type": "mount" },
        ] });
        let spec = parse(linux, json!([]));
        let member = inside(&spec, Role::Member).unwrap().container.spec;
        assert_eq!(kinds(&member), ["pid", "mnt"]);
        assert_eq!(member.hostname(), &None);
        let alone = inside(&spec, Role::Alone).unwrap().container.spec;
        assert_eq!(kinds(&alone), ["pid", "ipc", "uts", "mnt"]);
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
