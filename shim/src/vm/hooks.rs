//! Programs of the host that a specification wants run at points of a container's life (OCI runtime
//! specification, config.md, "POSIX-platform Hooks").

use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use oci_spec::runtime::{Hook, Spec};
use serde_json::json;

/// How long a hook may take that does not say it itself.
const LIMIT: Duration = Duration::from_secs(300);

/// Most bytes of what a failed hook wrote that an error shows.
const MAX_SHOWN: usize = 2048;

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

/// Runs hooks one after the other until one fails.
///
/// # Errors
/// What the failed one is, and what it said.
pub fn run(kind: &str, hooks: &[Hook], told: &Told<'_>) -> Result<(), String> {
    if hooks.is_empty() {
        return Ok(());
    }
    let mut state = json!({
        "ociVersion": told.spec.version(),
        "id": told.id,
        "status": told.status,
        "bundle": told.bundle,
        "annotations": told.spec.annotations().clone().unwrap_or_default(),
    });
    if told.pid != 0 {
        state["pid"] = told.pid.into();
    }
    let state = state.to_string();
    for hook in hooks {
        let path = hook.path();
        one(hook, &state).map_err(|e| format!("the {kind} hook {}: {e}", path.display()))?;
    }
    Ok(())
}

fn one(hook: &Hook, state: &str) -> Result<(), String> {
    let text = |e: std::io::Error| e.to_string();
    // A file: a hook that writes much to a pipe that is read at the end would wait for ever.
    let mut said = tempfile::tempfile().map_err(text)?;
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
    command.stdin(Stdio::piped()).stdout(Stdio::null());
    command.stderr(said.try_clone().map_err(text)?);
    let mut child = command.spawn().map_err(text)?;
    if let Some(mut stdin) = child.stdin.take() {
        // The state fits a pipe, and a hook may well end without reading it.
        let _ = stdin.write_all(state.as_bytes());
    }
    let seconds = hook.timeout().and_then(|t| u64::try_from(t).ok()).filter(|t| *t > 0);
    let until = Instant::now() + seconds.map_or(LIMIT, Duration::from_secs);
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
    said.seek(SeekFrom::Start(0)).and_then(|_| said.read_to_end(&mut output)).map_err(text)?;
    let start = output.len().saturating_sub(MAX_SHOWN);
    let output = String::from_utf8_lossy(&output[start..]);
    Err(format!("{status}: {}", output.trim()))
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
        run("x", &[hook], &Told { id: "c1", status: "creating", pid: 42, bundle, spec: &spec })
    }

    #[test]
    fn hooks_are_told_the_state_and_have_their_environment_alone() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        run_one(hook(&format!("cat >{0}; echo \"$A $HOME\" >>{0}", out.display()), 60)).unwrap();
        let text = std::fs::read_to_string(out).unwrap();
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
    fn what_fails_or_does_not_end_is_told() {
        let error = run_one(hook("echo oops >&2; exit 3", 60)).unwrap_err();
        assert!(error.contains("x hook /bin/sh") && error.contains("oops"), "{error}");
        let error = run_one(hook("sleep 1000", 1)).unwrap_err();
        assert!(error.contains("in time"), "{error}");
    }
}
