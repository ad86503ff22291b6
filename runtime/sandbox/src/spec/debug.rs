//! The debug console: a shell that sees the guest itself, beside the containers in it.
//!
//! It is a container of its own in the guest, which has no namespace but one for mounts, every capability and no
//! limit. The guest has no programs but the agent: the shell is that of one of the containers, whose root it
//! gets with memory above, or a file of the host's.

use oci_spec::runtime::{Process, Spec};
use serde_json::json;

use super::{Container, DEFAULT_PATH, Error, PROVIDED_DIR, ProvidedFile, Root, change_user};

/// Where the agent mounts the roots of containers.
const CONTAINERS: &str = "/run/mvm/containers";

/// A directory that every guest has, and in which there is nothing.
const NOTHING: &str = "/tmp";

/// Where the console finds the guest's own root.
const GUEST: &str = "/guest";

/// Where it finds a shell of the host's. The last part is what programs that are many go by.
const SHELL: &str = "/.mvm/sh";

/// A console, as it is wanted.
#[derive(Debug, Clone, Default)]
pub struct Console<'a> {
    /// The container whose programs it has.
    pub programs_of: Option<&'a str>,
    /// A program of the host's in place of the container's shell.
    pub shell: Option<Vec<u8>>,
    /// What to run; a shell if empty.
    pub command: &'a [String],
    /// It has a terminal.
    pub terminal: bool,
}

/// Makes the specification of a debug console.
///
/// # Errors
/// There is neither a container nor a shell to be had programs from.
pub fn console(wanted: Console<'_>) -> Result<Container, Error> {
    let root = match wanted.programs_of {
        Some(id) => format!("{CONTAINERS}/{id}/rootfs"),
        None if wanted.shell.is_some() => NOTHING.to_owned(),
        None => return Err(Error::NoShell),
    };
    let bind = |source: &str, target: &str| json!({ "type": "bind", "source": source, "destination": target, "options": ["rbind"] });
    let mut mounts =
        vec![bind("/proc", "/proc"), bind("/sys", "/sys"), bind("/dev", "/dev"), bind("/", GUEST)];
    let shell = if wanted.shell.is_some() { SHELL } else { "/bin/sh" };
    let files =
        wanted.shell.map(|data| ProvidedFile { name: "debug-shell".into(), data, mode: 0o755 });
    if files.is_some() {
        mounts.push(bind(&format!("{PROVIDED_DIR}/debug-shell"), SHELL));
    }
    let args = match wanted.command {
        [] => vec![shell.to_owned()],
        [program, rest @ ..] if program == "sh" => {
            std::iter::once(shell.to_owned()).chain(rest.iter().cloned()).collect()
        }
        command => command.to_vec(),
    };
    let spec = json!({
        "ociVersion": "1.0.2",
        "root": { "path": "rootfs" },
        "process": {
            "terminal": wanted.terminal,
            "user": { "uid": 0, "gid": 0 },
            "cwd": "/",
            "args": args,
            "env": [DEFAULT_PATH, "TERM=xterm", "HOME=/root", "PS1=debug# "],
        },
        "mounts": mounts,
        "linux": { "namespaces": [{ "type": "mount" }] },
    });
    let mut spec: Spec = serde_json::from_value(spec).map_err(oci_spec::OciSpecError::SerDe)?;
    let mut process: Process = spec.process().clone().unwrap_or_default();
    change_user(&mut process, None, true)?;
    spec.set_process(Some(process));
    Ok(Container {
        spec,
        root: Root::Directory(root),
        files: files.into_iter().collect(),
        volumes: Vec::new(),
        memory: Vec::new(),
        devices: Vec::new(),
        hook_state: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(container: &Container) -> Vec<String> {
        container.spec.process().as_ref().unwrap().args().clone().unwrap()
    }

    #[test]
    fn a_console_has_the_programs_of_a_container_or_a_shell_of_the_hosts() {
        let of = Console { programs_of: Some("c1"), ..Console::default() };
        let made = console(of.clone()).unwrap();
        assert_eq!(made.root, Root::Directory("/run/mvm/containers/c1/rootfs".into()));
        assert_eq!(args(&made), ["/bin/sh"]);
        let namespaces = made.spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
        assert_eq!(namespaces.len(), 1, "the guest's own but for mounts");
        let capabilities = made.spec.process().as_ref().unwrap().capabilities().clone().unwrap();
        assert_eq!(capabilities.effective().as_ref().unwrap().len(), 41);

        let command = ["sh", "-c", "id"].map(String::from);
        let with =
            Console { shell: Some(b"ELF".to_vec()), command: &command, ..Console::default() };
        let made = console(with).unwrap();
        assert_eq!(made.root, Root::Directory(NOTHING.into()));
        assert_eq!(args(&made), [SHELL, "-c", "id"]);
        assert_eq!(made.files.len(), 1);
        assert!(matches!(console(Console::default()), Err(Error::NoShell)));
    }
}
