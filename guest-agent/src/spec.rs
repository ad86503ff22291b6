//! The OCI runtime specification as the agent reads it.
//!
//! The inner types are those of the `oci-spec` crate. The outer ones are our own, for three
//! reasons: the crate's would bring a regular-expression engine and the sections of other
//! platforms into every guest (a third of the agent); capabilities that this agent does not know
//! are to be a notice and not an error (config.md, "Linux Process"); and what is not honoured has
//! to be seen, to be said. `docs/oci-spec.md` tells the fate of every field.

use std::collections::BTreeMap;
use std::path::PathBuf;

use oci_spec::runtime::{
    Box as ConsoleSize, Hook, Linux, LinuxIOPriority, Mount, PosixRlimit, Root, Scheduler, User,
};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The major version of the specification that the agent knows.
const MAJOR: &str = "1";

const MALFORMED: &str = "the OCI runtime specification is malformed";

/// A container.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    /// Version of the specification.
    pub oci_version: String,
    /// The root: only whether it is read-only is the specification's, the tree is the host's.
    pub root: Option<Root>,
    /// Mounts in order.
    pub mounts: Option<Vec<Mount>>,
    /// The first process.
    pub process: Option<Process>,
    /// Host name.
    pub hostname: Option<String>,
    /// NIS domain name.
    pub domainname: Option<String>,
    /// Hooks.
    pub hooks: Option<Hooks>,
    /// What is particular to Linux.
    pub linux: Option<Linux>,
    /// Sections of other platforms, and of runtimes that start machines of the user's own.
    pub vm: Option<IgnoredAny>,
    /// See `vm`.
    pub windows: Option<IgnoredAny>,
    /// See `vm`.
    pub solaris: Option<IgnoredAny>,
    /// See `vm`.
    pub zos: Option<IgnoredAny>,
}

/// Programs to be run at points of a container's life.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Hooks {
    /// Before its program, in the container.
    pub start_container: Option<Vec<Hook>>,
    /// The others by their names: not run, so what they are does not matter.
    #[serde(flatten)]
    pub others: BTreeMap<String, Option<Vec<IgnoredAny>>>,
}

/// A process.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Process {
    /// Whether it has a terminal.
    pub terminal: Option<bool>,
    /// That terminal's size.
    pub console_size: Option<ConsoleSize>,
    /// Who it runs as.
    pub user: User,
    /// Program and arguments.
    pub args: Option<Vec<String>>,
    /// Environment.
    pub env: Option<Vec<String>>,
    /// Working directory.
    pub cwd: PathBuf,
    /// Capabilities; none given means none.
    pub capabilities: Option<Capabilities>,
    /// Resource limits.
    pub rlimits: Option<Vec<PosixRlimit>>,
    /// Whether `execve` can give privileges.
    pub no_new_privileges: Option<bool>,
    /// AppArmor profile.
    pub apparmor_profile: Option<String>,
    /// How readily the kernel kills it for want of memory.
    pub oom_score_adj: Option<i32>,
    /// SELinux label.
    pub selinux_label: Option<String>,
    /// I/O priority.
    pub io_priority: Option<LinuxIOPriority>,
    /// Scheduling policy.
    pub scheduler: Option<Scheduler>,
    /// CPUs of an exec'ed process.
    #[serde(rename = "execCPUAffinity")]
    pub exec_cpu_affinity: Option<ExecCpuAffinity>,
}

/// The five sets of capabilities, by name.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    /// What the process and its descendants can ever have.
    pub bounding: Option<Vec<String>>,
    /// In force.
    pub effective: Option<Vec<String>>,
    /// Kept across `execve` of a program with the same in its file capabilities.
    pub inheritable: Option<Vec<String>>,
    /// Can be put in force.
    pub permitted: Option<Vec<String>>,
    /// Kept across `execve` of any program.
    pub ambient: Option<Vec<String>>,
}

impl Capabilities {
    /// All sets.
    pub fn sets(&self) -> [&[String]; 5] {
        [&self.bounding, &self.effective, &self.inheritable, &self.permitted, &self.ambient]
            .map(|set| set.as_deref().unwrap_or_default())
    }
}

/// CPUs before and after the process enters the container's control group, as lists (`0-3,7`).
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct ExecCpuAffinity {
    /// Before.
    pub initial: Option<String>,
    /// After.
    #[serde(rename = "final")]
    pub last: Option<String>,
}

impl Spec {
    /// Reads a specification.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the place at which it is malformed.
    pub fn parse(json: &[u8]) -> Result<Self> {
        let spec: Self = serde_json::from_slice(json)
            .map_err(|e| Error::Invalid(format!("{MALFORMED}: {e}")))?;
        if spec.oci_version.split('.').next() != Some(MAJOR) {
            return Err(Error::Invalid(format!(
                "ociVersion {:?}: this agent knows versions {MAJOR}.x",
                spec.oci_version
            )));
        }
        Ok(spec)
    }

    /// The hooks that are run in the container.
    pub fn start_hooks(&self) -> &[Hook] {
        self.hooks.as_ref().and_then(|h| h.start_container.as_deref()).unwrap_or_default()
    }

    /// Whether the root is to be read-only.
    pub fn root_is_readonly(&self) -> bool {
        self.root.as_ref().and_then(Root::readonly).unwrap_or(false)
    }
}

/// What exec'ed processes inherit: the container's specification cut down to its process, its
/// seccomp filter and its execution domain. A specification itself, so that both kinds of process
/// are told what to become in one form.
#[derive(Debug, Clone, Default)]
pub struct Heritage(Map<String, Value>);

impl Heritage {
    /// That of a container.
    ///
    /// # Errors
    /// [`Error::Invalid`] if even a part that nobody looks at is malformed.
    pub fn of(json: &[u8]) -> Result<Self> {
        let mut all: Map<String, Value> = serde_json::from_slice(json)
            .map_err(|e| Error::Invalid(format!("{MALFORMED}: {e}")))?;
        all.retain(|key, _| matches!(key.as_str(), "ociVersion" | "process" | "linux"));
        if let Some(Value::Object(linux)) = all.get_mut("linux") {
            linux.retain(|key, _| matches!(key.as_str(), "seccomp" | "personality"));
        }
        Ok(Self(all))
    }

    /// The specification of a process to exec: its own fields over those of the first one.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `process` is no JSON object.
    pub fn bequeath(&self, process: &[u8]) -> Result<Vec<u8>> {
        let malformed = |e| Error::Invalid(format!("the OCI process is malformed: {e}"));
        let own: Map<String, Value> = serde_json::from_slice(process).map_err(malformed)?;
        let mut all = self.0.clone();
        let mut merged = match all.remove("process") {
            Some(Value::Object(inherited)) => inherited,
            _ => Map::new(),
        };
        for key in ["args", "terminal", "consoleSize", "commandLine", "execCPUAffinity"] {
            merged.remove(key);
        }
        merged.extend(own);
        all.insert("process".into(), Value::Object(merged));
        serde_json::to_vec(&all).map_err(malformed)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const CONTAINER: &str = r#"{"ociVersion":"1.2.0","mounts":[],"process":{
        "terminal":true,"consoleSize":{"height":1,"width":2},"user":{"uid":5,"gid":6},
        "cwd":"/data","args":["first"],"env":["A=1"],"noNewPrivileges":true},
        "linux":{"seccomp":{"defaultAction":"SCMP_ACT_ALLOW"},"maskedPaths":["/proc/kcore"]}}"#;

    fn inherit(process: &str) -> Spec {
        let json =
            Heritage::of(CONTAINER.as_bytes()).unwrap().bequeath(process.as_bytes()).unwrap();
        Spec::parse(&json).unwrap()
    }

    #[test]
    fn exec_inherits_what_it_does_not_say() {
        let spec = inherit(r#"{"args":["second"],"env":["B=2"]}"#);
        let process = spec.process.unwrap();
        assert_eq!(process.args, Some(vec!["second".to_owned()]));
        assert_eq!(process.env, Some(vec!["B=2".to_owned()]));
        assert_eq!((process.user.uid(), process.cwd.as_path()), (5, Path::new("/data")));
        assert_eq!((process.terminal, process.no_new_privileges), (None, Some(true)));
        let linux = spec.linux.unwrap();
        assert!(linux.seccomp().is_some() && linux.masked_paths().is_none());
        assert_eq!(inherit("{}").process.unwrap().args, None, "no second run of the first");
    }

    #[test]
    fn malformed_json_is_invalid() {
        let heritage = Heritage::of(CONTAINER.as_bytes()).unwrap();
        for json in ["[]", "{", "", "null"] {
            assert!(matches!(heritage.bequeath(json.as_bytes()), Err(Error::Invalid(_))), "{json}");
            assert!(matches!(Spec::parse(json.as_bytes()), Err(Error::Invalid(_))), "{json}");
        }
    }

    #[test]
    fn versions_that_are_not_known_are_refused_by_number() {
        let parse =
            |version: &str| Spec::parse(format!(r#"{{"ociVersion":"{version}"}}"#).as_bytes());
        assert!(parse("1.0.0").is_ok() && parse("1.3.0-rc.1").is_ok());
        for version in ["2.0.0", "", "0.9", "10.0"] {
            assert!(matches!(parse(version), Err(Error::Invalid(m)) if m.contains("1.x")));
        }
    }
}
