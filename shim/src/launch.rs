//! `start`: finds the shim that a container belongs to, or starts it, and says where it listens.

use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use mvm_sandbox::layout::{self, Layout};
use nix::fcntl::{Flock, FlockArg};
use oci_spec::runtime::Spec;
use sha2::{Digest, Sha256};

use crate::cli::{Flags, is_identifier};
use crate::host::Host;

/// The file in a bundle in which containerd looks for the shim after a restart.
const ADDRESS_FILE: &str = "address";

/// Annotations whose value says which containers belong together: CRI's pods, by containerd and CRI-O.
const GROUPS: [&str; 2] = ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"];

/// Longest path of a socket, without the terminating zero.
const MAX_PATH: usize = 107;

/// Which group a container is in; a container by itself is one of its own.
///
/// # Errors
/// The annotation is no identifier.
pub fn group(bundle: &Path, id: &str) -> anyhow::Result<String> {
    let path = bundle.join("config.json");
    let spec = Spec::load(&path).with_context(|| format!("cannot use {}", path.display()))?;
    let annotations = spec.annotations().clone().unwrap_or_default();
    let Some(group) = GROUPS.iter().find_map(|key| annotations.get(*key)) else {
        return Ok(id.to_owned());
    };
    if !is_identifier(group) {
        bail!("{}: the sandbox id {group:?} is no identifier", path.display());
    }
    Ok(group.clone())
}

/// Where the shim of a group listens: known to whoever knows containerd's address, the namespace
/// and the group.
pub fn socket(layout: &Layout, flags: &Flags, group: &str) -> anyhow::Result<PathBuf> {
    let mut hash = Sha256::new();
    for part in [&flags.address, &flags.namespace, group] {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    let digest: String = hash.finalize()[..16].iter().map(|b| format!("{b:02x}")).collect();
    let path = layout.shims().join(format!("{digest}.sock"));
    if path.as_os_str().len() > MAX_PATH {
        let dir = layout.shims();
        bail!(
            "{} is too long for a socket in it; give mvm a root with a shorter path",
            dir.display()
        );
    }
    Ok(path)
}

/// Carries out `start` in the bundle that is the working directory. Returns the address.
///
/// # Errors
/// The bundle is none, or the shim cannot be started.
pub fn start(host: &dyn Host, flags: &Flags) -> anyhow::Result<String> {
    let bundle = std::env::current_dir().context("cannot find the bundle")?;
    let group = group(&bundle, &flags.id)?;
    let layout = host.layout()?;
    layout.prepare()?;
    layout::make_private(&layout.shims())?;
    let socket = socket(&layout, flags, &group)?;
    let address = format!("unix://{}", socket.display());
    if UnixStream::connect(&socket).is_err() {
        if group != flags.id {
            bail!("the shim of sandbox {group}, which container {} belongs to, is gone", flags.id);
        }
        launch(&layout, &socket, flags)?;
    }
    let path = bundle.join(ADDRESS_FILE);
    write_file(&path, &address).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(address)
}

/// Removes a socket at which nobody listens any more.
///
/// # Errors
/// The directory of the sockets cannot be locked.
pub fn remove_dead(layout: &Layout, socket: &Path) -> anyhow::Result<()> {
    if !socket.exists() {
        return Ok(());
    }
    let _lock = lock(layout)?;
    if UnixStream::connect(socket).is_err() {
        // It may be gone already.
        let _ = fs::remove_file(socket);
    }
    Ok(())
}

/// Nobody else makes or removes sockets while this is held.
fn lock(layout: &Layout) -> anyhow::Result<Flock<fs::File>> {
    let path = layout.shims();
    let what = || format!("cannot lock {}", path.display());
    let directory = fs::File::open(&path).with_context(what)?;
    Flock::lock(directory, FlockArg::LockExclusive).map_err(|(_, e)| e).with_context(what)
}

fn launch(layout: &Layout, socket: &Path, flags: &Flags) -> anyhow::Result<()> {
    let what = || format!("cannot listen at {}", socket.display());
    let lock = lock(layout)?;
    // What nobody listens at any more.
    match fs::remove_file(socket) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e).with_context(what),
        _ => {}
    }
    let listener = UnixListener::bind(socket).with_context(what)?;
    // Who connects from now on is heard, and so takes nobody for dead. A program that is started would
    // take the lock along.
    drop(lock);
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0(crate::NAME)
        .args(["-namespace", &flags.namespace, "-id", &flags.id, "-address", &flags.address])
        .arg("-socket")
        .arg(socket);
    if flags.debug {
        command.arg("-debug");
    }
    // Whoever connects from now on is served as soon as the process is there.
    command
        .stdin(OwnedFd::from(listener))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0);
    let started = command.spawn();
    if started.is_err() {
        // Nobody will ever listen there.
        let _ = fs::remove_file(socket);
    }
    started.map(drop).context("cannot start the shim's process")
}

/// Replaces a file in one step.
fn write_file(path: &Path, text: &str) -> io::Result<()> {
    let next = path.with_extension("next");
    fs::File::create(&next)?.write_all(text.as_bytes())?;
    fs::rename(&next, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(annotations: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let text = format!("{{\"ociVersion\":\"1.0.2\",\"annotations\":{annotations}}}");
        fs::write(dir.path().join("config.json"), text).unwrap();
        dir
    }

    #[test]
    fn containers_of_a_pod_are_one_group() {
        assert_eq!(group(bundle("{}").path(), "c").unwrap(), "c");
        let pod = bundle("{\"io.kubernetes.cri.sandbox-id\":\"pod1\"}");
        assert_eq!(group(pod.path(), "c").unwrap(), "pod1");
        let bad = bundle("{\"io.kubernetes.cri.sandbox-id\":\"../x\"}");
        assert!(group(bad.path(), "c").unwrap_err().to_string().contains("no identifier"));
        assert!(group(Path::new("/no/such"), "c").is_err());
    }

    #[test]
    fn sockets_differ_by_containerd_namespace_and_group() {
        let layout = Layout::at(Path::new("/r"));
        let flags = |address: &str, namespace: &str| Flags {
            address: address.into(),
            namespace: namespace.into(),
            ..Flags::default()
        };
        let path = |a, n, g| socket(&layout, &flags(a, n), g).unwrap();
        let first = path("a", "n", "g");
        assert_eq!(first, path("a", "n", "g"));
        for other in
            [path("b", "n", "g"), path("a", "m", "g"), path("a", "n", "h"), path("an", "", "g")]
        {
            assert_ne!(first, other);
        }
        let deep = Layout::at(Path::new(&format!("/{}", "d".repeat(90))));
        assert!(socket(&deep, &flags("a", "n"), "g").is_err());
    }
}
