//! Programs of the host that a specification wants run at points of a container's life (OCI runtime
//! specification, config.md, "POSIX-platform Hooks").
//!
//! All but `startContainer` hooks, which the agent runs in the container, are run on the host: `createContainer` hooks in
//! the container's network namespace, which is the one of its namespaces that is there, the others in that of the shim.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use mvm_net::Namespace;
use oci_spec::runtime::{Hook, Spec};
use serde_json::json;

/// How long a hook may take that does not say it itself.
const LIMIT: Duration = Duration::from_secs(300);

/// What is as good as no limit, and can be added to the time.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Most bytes of what a failed hook wrote that an error shows.
const MAX_SHOWN: u64 = 2048;

/// The file in a bundle that says that `poststop` hooks are to be run.
const POSTSTOP: &str = "mvm-poststop";

/// What hooks are told of the container, on standard input.
#[derive(Debug)]
pub struct Told<'a> {
    /// Its id.
    pub id: &'a str,
    /// Its status in the specification's words.
    pub status: &'a str,
    /// The process that stands for it; 0 when it is gone.
    pub pid: u32,
    /// Its bundle.
    pub bundle: &'a Path,
    /// Its specification.
    pub spec: &'a Spec,
}

/// A point of a container's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Deprecated, and still what many write.
    Prestart,
    /// The container's namespaces are there.
    CreateRuntime,
    /// The same, for those who want to be in them.
    CreateContainer,
    /// Before the container's program, and beside it in the guest: no program of the host.
    StartContainer,
    /// The program runs.
    Poststart,
    /// Nothing of the container is there any more.
    Poststop,
}

impl Kind {
    /// Its name in the specification.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prestart => "prestart",
            Self::CreateRuntime => "createRuntime",
            Self::CreateContainer => "createContainer",
            Self::StartContainer => "startContainer",
            Self::Poststart => "poststart",
            Self::Poststop => "poststop",
        }
    }

    /// The hooks of this kind.
    pub fn of(self, spec: &Spec) -> &[Hook] {
        let Some(hooks) = spec.hooks() else { return &[] };
        let list = match self {
            #[allow(deprecated)]
            Self::Prestart => hooks.prestart(),
            Self::CreateRuntime => hooks.create_runtime(),
            Self::CreateContainer => hooks.create_container(),
            Self::StartContainer => hooks.start_container(),
            Self::Poststart => hooks.poststart(),
            Self::Poststop => hooks.poststop(),
        };
        list.as_deref().unwrap_or_default()
    }
}

/// Runs the hooks of one kind one after the other until one fails.
///
/// # Errors
/// What the failed one is, and what it said.
pub fn run(kind: Kind, told: &Told<'_>) -> Result<(), String> {
    let hooks = kind.of(told.spec);
    if hooks.is_empty() {
        return Ok(());
    }
    if kind != Kind::CreateContainer {
        return run_all(kind.name(), hooks, told);
    }
    let path = format!("/proc/{}/ns/net", told.pid);
    let namespace = Namespace::open(Path::new(&path)).map_err(|e| e.to_string())?;
    // What a thread starts is in the thread's namespaces.
    let run = || Ok(run_all(kind.name(), hooks, told));
    namespace.enter(run).map_err(|e| e.to_string())?.unwrap_or_else(|e| Err(e.to_string()))
}

/// Writes down that `poststop` hooks are to be run, for whoever takes the container away.
///
/// # Errors
/// The bundle cannot be written.
pub fn expect_poststop(bundle: &Path, spec: &Spec) -> io::Result<()> {
    match Kind::Poststop.of(spec) {
        [] => Ok(()),
        _ => fs::write(bundle.join(POSTSTOP), ""),
    }
}

/// Runs the `poststop` hooks of the container in `bundle`, unless somebody has run them, or there is no
/// bundle.
///
/// # Errors
/// What the failed one is, and what it said.
pub fn run_poststop(id: &str, bundle: &Path) -> Result<(), String> {
    // Only one can remove it.
    if fs::remove_file(bundle.join(POSTSTOP)).is_err() {
        return Ok(());
    }
    let spec = Spec::load(bundle.join("config.json")).map_err(|e| e.to_string())?;
    run(Kind::Poststop, &Told { id, status: "stopped", pid: 0, bundle, spec: &spec })
}

impl Told<'_> {
    /// The same as the specification has it (runtime.md, "State").
    pub fn state(&self) -> serde_json::Value {
        let mut state = json!({
            "ociVersion": self.spec.version(),
            "id": self.id,
            "status": self.status,
            "bundle": self.bundle,
            "annotations": self.spec.annotations().clone().unwrap_or_default(),
        });
        if self.pid != 0 {
            state["pid"] = self.pid.into();
        }
        state
    }
}

fn run_all(kind: &str, hooks: &[Hook], told: &Told<'_>) -> Result<(), String> {
    let state = told.state().to_string();
    for hook in hooks {
        let path = hook.path();
        one(hook, &state).map_err(|e| format!("the {kind} hook {}: {e}", path.display()))?;
    }
    Ok(())
}

fn one(hook: &Hook, state: &str) -> Result<(), String> {
    let text = |e: io::Error| e.to_string();
    // Files: a hook that writes much to a pipe that is read at the end would wait for ever, and so would we for one that does
    // not read a state that is larger than a pipe.
    let [mut input, mut said] =
        [tempfile::tempfile().map_err(text)?, tempfile::tempfile().map_err(text)?];
    input.write_all(state.as_bytes()).and_then(|()| input.rewind()).map_err(text)?;
    let mut command = Command::new(hook.path());
    if let Some((name, rest)) = hook.args().as_deref().and_then(<[String]>::split_first) {
        command.arg0(name).args(rest);
    }
    command.env_clear();
    for variable in hook.env().iter().flatten() {
        if let Some((name, value)) = variable.split_once('=') {
            command.env(name, value);
        }
    }
    command.stdin(input).stdout(Stdio::null());
    command.stderr(said.try_clone().map_err(text)?);
    let mut child = command.spawn().map_err(text)?;
    let until = Instant::now() + limit(hook);
    let status = loop {
        match child.try_wait().map_err(text)? {
            Some(status) => break Some(status),
            None if Instant::now() >= until => break None,
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let Some(status) = status else {
        child.kill().and_then(|()| child.wait()).map_err(text)?;
        return Err("it did not end in time and was killed".into());
    };
    if status.success() {
        return Ok(());
    }
    let mut output = Vec::new();
    let length = said.metadata().map_err(text)?.len();
    said.seek(SeekFrom::Start(length.saturating_sub(MAX_SHOWN))).map_err(text)?;
    said.take(MAX_SHOWN).read_to_end(&mut output).map_err(text)?;
    let output = String::from_utf8_lossy(&output);
    Err(format!("{status}: {}", output.trim()))
}

/// How long a hook may take.
fn limit(hook: &Hook) -> Duration {
    let seconds = hook.timeout().and_then(|t| u64::try_from(t).ok()).filter(|t| *t > 0);
    seconds.map_or(LIMIT, Duration::from_secs).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::HookBuilder;

    fn hook(script: &str, timeout: i64) -> Hook {
        let args = ["sh", "-c", script].map(String::from).to_vec();
        HookBuilder::default()
            .path("/bin/sh")
            .args(args)
            .env(vec!["PATH=/usr/bin:/bin".into(), "A=b=c".into()])
            .timeout(timeout)
            .build()
            .unwrap()
    }

    fn run_one(hook: Hook) -> Result<(), String> {
        let (spec, bundle) = (Spec::default(), Path::new("/b"));
        run_all("x", &[hook], &Told { id: "c1", status: "creating", pid: 42, bundle, spec: &spec })
    }

    #[test]
    fn hooks_are_told_the_state_and_have_their_environment_alone() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        run_one(hook(&format!("cat >{0}; echo \"$A $HOME\" >>{0}", out.display()), 60)).unwrap();
        let text = fs::read_to_string(out).unwrap();
        let (state, rest) = text.split_at(text.rfind('}').unwrap() + 1);
        let state: serde_json::Value = serde_json::from_str(state).unwrap();
        assert_eq!((state["id"].as_str(), state["pid"].as_u64()), (Some("c1"), Some(42)));
        assert_eq!(
            (state["bundle"].as_str(), state["status"].as_str()),
            (Some("/b"), Some("creating"))
        );
        assert_eq!(rest.trim(), "b=c");
    }

    #[test]
    fn poststop_hooks_are_run_once_by_whoever_comes_first() {
        let bundle = tempfile::tempdir().unwrap();
        let out = bundle.path().join("out");
        let script = format!("cat >>{}", out.display());
        let hooks = serde_json::json!({ "poststop": [
            { "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"] },
        ] });
        let spec = serde_json::json!({ "ociVersion": "1.0.2", "hooks": hooks });
        fs::write(bundle.path().join("config.json"), spec.to_string()).unwrap();
        run_poststop("c1", bundle.path()).unwrap();
        assert!(!out.exists(), "nobody expects them yet");
        let spec = Spec::load(bundle.path().join("config.json")).unwrap();
        expect_poststop(bundle.path(), &spec).unwrap();
        run_poststop("c1", bundle.path()).unwrap();
        run_poststop("c1", bundle.path()).unwrap();
        let state: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(out).unwrap()).unwrap();
        assert_eq!((state["status"].as_str(), state.get("pid")), (Some("stopped"), None));
    }

    #[test]
    fn what_fails_or_does_not_end_is_told() {
        let error = run_one(hook("echo oops >&2; exit 3", 60)).unwrap_err();
        assert!(error.contains("x hook /bin/sh") && error.contains("oops"), "{error}");
        let error = run_one(hook("sleep 1000", 1)).unwrap_err();
        assert!(error.contains("in time"), "{error}");
        run_one(hook("true", i64::MAX)).unwrap();
    }

    #[test]
    fn a_state_that_nobody_reads_holds_up_nothing_however_large() {
        let error = one(&hook("sleep 1000", 1), &"x".repeat(1 << 20)).unwrap_err();
        assert!(error.contains("in time"), "{error}");
        one(&hook("test $(wc -c) = 1048576", 60), &"x".repeat(1 << 20)).unwrap();
    }
}
