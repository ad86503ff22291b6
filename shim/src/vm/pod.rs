//! Pods: several containers in one machine, as CRI asks for them.
//!
//! The first container of a pod is its sandbox. Elsewhere a program that does nothing runs in it and
//! keeps the pod's namespaces; here the machine is what keeps them, and nothing runs. It lives until
//! the sandbox is told to end, whatever containers come and go.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use mvm_sandbox::pump::Flag;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use oci_spec::runtime::Spec;

use super::spec::annotations;

/// Annotations that say what a container is in its pod: `sandbox` or `container`.
const KINDS: [&str; 2] = ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"];

/// Longest host name (sethostname(2)).
const MAX_HOSTNAME: usize = 64;

const SIGINT: i32 = 2;
const SIGKILL: i32 = 9;
const SIGTERM: i32 = 15;

/// What a container is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It has a machine of its own.
    Alone,
    /// It is a pod's machine.
    Sandbox,
    /// It is in a pod's machine.
    Member,
}

impl Role {
    /// What a specification says.
    pub fn of(spec: &Spec) -> Self {
        let annotations = annotations(spec);
        match KINDS.iter().find_map(|key| annotations.get(*key)).map(String::as_str) {
            Some("sandbox") => Self::Sandbox,
            Some("container") => Self::Member,
            _ => Self::Alone,
        }
    }
}

/// The words of the kernel's command line that give a pod's machine its name. A name that could mean
/// anything else there is left out.
pub fn hostname(spec: &Spec) -> Option<String> {
    let name = spec.hostname().as_deref()?;
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-.".contains(&b);
    let good = (1..=MAX_HOSTNAME).contains(&name.len()) && name.bytes().all(plain);
    good.then(|| format!("hostname={name}"))
}

/// What is there in place of a sandbox's process.
#[derive(Debug)]
pub struct Standing {
    stop: Flag,
    /// The machine has made way for a unikernel's.
    parked: AtomicBool,
    exit: Mutex<Option<u32>>,
}

impl Standing {
    /// It runs.
    ///
    /// # Errors
    /// Descriptors are short.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { stop: Flag::new()?, parked: AtomicBool::new(false), exit: Mutex::new(None) })
    }

    fn exit(&self) -> MutexGuard<'_, Option<u32>> {
        self.exit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a signal as the program would whose place this takes: it ends at the customary ones, and
    /// is the first of its process-id namespace, which no other reaches.
    pub fn signal(&self, signal: i32) {
        let status = match signal {
            SIGINT | SIGTERM => 0,
            SIGKILL => 128 + SIGKILL.unsigned_abs(),
            _ => return,
        };
        self.exit().get_or_insert(status);
        self.stop.raise();
    }

    /// The machine is about to make way for another one: its end is not the sandbox's from now on.
    pub fn park(&self) {
        self.parked.store(true, Ordering::SeqCst);
    }

    /// Whether the machine has made way for another one.
    pub fn is_parked(&self) -> bool {
        self.parked.load(Ordering::SeqCst)
    }

    /// Waits until it is to end.
    ///
    /// # Errors
    /// The host cannot say.
    pub fn wait(&self) -> std::io::Result<()> {
        loop {
            match poll(&mut [PollFd::new(self.stop.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE)
            {
                Err(Errno::EINTR) => {}
                other => return Ok(other.map(drop)?),
            }
        }
    }

    /// Readable once it is to end.
    pub fn stop(&self) -> &Flag {
        &self.stop
    }

    /// Its exit status, once it is to end.
    pub fn status(&self) -> Option<u32> {
        *self.exit()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn spec(annotations: &[(&str, &str)], hostname: &str) -> Spec {
        let mut spec = Spec::default();
        let annotations = annotations.iter().map(|(k, v)| (k.to_string(), v.to_string()));
        spec.set_annotations(Some(annotations.collect::<HashMap<_, _>>()));
        spec.set_hostname(Some(hostname.into()));
        spec
    }

    #[test]
    fn roles_are_told_by_annotations() {
        for (annotations, role) in [
            (&[][..], Role::Alone),
            (&[("io.kubernetes.cri.container-type", "sandbox")], Role::Sandbox),
            (&[("io.kubernetes.cri.container-type", "container")], Role::Member),
            (&[("io.kubernetes.cri-o.ContainerType", "container")], Role::Member),
            (&[("io.kubernetes.cri.container-type", "other")], Role::Alone),
        ] {
            assert_eq!(Role::of(&spec(annotations, "")), role, "{annotations:?}");
        }
    }

    #[test]
    fn hostile_host_names_stay_off_the_command_line() {
        assert_eq!(hostname(&spec(&[], "web-1.x")), Some("hostname=web-1.x".into()));
        for bad in ["", "a init=/bin/sh", "a\"b", "ü", &"x".repeat(MAX_HOSTNAME + 1)] {
            assert_eq!(hostname(&spec(&[], bad)), None, "{bad}");
        }
    }

    #[test]
    fn a_sandbox_ends_as_its_program_would() {
        let standing = Standing::new().unwrap();
        standing.signal(1);
        assert_eq!(standing.status(), None);
        standing.signal(SIGTERM);
        standing.signal(SIGKILL);
        assert_eq!(standing.status(), Some(0));
        let killed = Standing::new().unwrap();
        killed.signal(SIGKILL);
        assert_eq!(killed.status(), Some(137));
    }
}
