//! Running one plugin.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::Error;
use super::config::find_plugin;

/// How long a plugin may take: it may wait for others who change the same firewall.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked whether it has ended.
const INTERVAL: Duration = Duration::from_millis(1);
/// How long its last words may take to be read once it has ended.
const GRACE: Duration = Duration::from_secs(2);
/// Most bytes of an answer.
const MAX_ANSWER: usize = 1 << 20;

/// What a plugin is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    Add,
    Delete,
    Check,
}

impl Command {
    fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Delete => "DEL",
            Self::Check => "CHECK",
        }
    }
}

/// One call of one plugin.
#[derive(Debug)]
pub struct Call<'a> {
    pub command: Command,
    pub container: &'a str,
    pub namespace: &'a Path,
    pub interface: &'a str,
    pub directories: &'a [PathBuf],
    pub plugin: &'a str,
    pub config: Value,
}

impl Call<'_> {
    /// Runs it and returns its result, which only ADD has.
    pub fn run(&self) -> Result<Value, Error> {
        let path = find_plugin(self.directories, self.plugin)?;
        let failed = |source| Error::Run { path: path.clone(), source };
        let child = std::process::Command::new(&path)
            .env("CNI_COMMAND", self.command.name())
            .env("CNI_CONTAINERID", self.container)
            .env("CNI_NETNS", self.namespace)
            .env("CNI_IFNAME", self.interface)
            .env("CNI_PATH", std::env::join_paths(self.directories).unwrap_or_default())
            .env("PATH", search_path())
            .env_remove("CNI_ARGS")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let answered = talk(child, self.config.to_string(), PATIENCE).map_err(failed)?;
        let Answer { success, output, errors } = answered;
        if !success {
            let message = message(&output, &errors);
            let (plugin, command) = (self.plugin.to_owned(), self.command.name());
            return Err(Error::Failed { plugin, command, message });
        }
        if self.command != Command::Add {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&output)
            .map_err(|e| Error::Answer { plugin: self.plugin.into(), what: e.to_string() })
    }
}

/// Plugins call iptables and the like, which a user's search path may leave out.
fn search_path() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    if !path.is_empty() {
        path.push(":");
    }
    path.push("/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin");
    path
}

struct Answer {
    success: bool,
    output: Vec<u8>,
    errors: Vec<u8>,
}

/// Gives a plugin its input and takes what it says until it ends, which it does in time or not at all.
fn talk(mut child: Child, input: String, patience: Duration) -> io::Result<Answer> {
    let stdin = child.stdin.take();
    let output = Collected::from(child.stdout.take());
    let errors = Collected::from(child.stderr.take());
    thread::spawn(move || {
        // A plugin may end without reading.
        let _ = stdin.map(|mut pipe| pipe.write_all(input.as_bytes()));
    });
    let end = Instant::now() + patience;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= end {
            child.kill()?;
            child.wait()?;
            let what = format!("it did not end within {} seconds", patience.as_secs());
            return Err(io::Error::new(io::ErrorKind::TimedOut, what));
        }
        thread::sleep(INTERVAL);
    };
    Ok(Answer { success: status.success(), output: output.take(), errors: errors.take() })
}

/// What comes out of a pipe, read on a thread of its own. What the plugin has started and left behind may keep
/// the pipe open for good.
struct Collected {
    bytes: Arc<Mutex<Vec<u8>>>,
    closed: mpsc::Receiver<()>,
}

impl Collected {
    fn from(pipe: Option<impl Read + Send + 'static>) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let (close, closed) = mpsc::channel();
        let into = bytes.clone();
        thread::spawn(move || {
            let mut left = MAX_ANSWER;
            let mut buffer = [0; 4096];
            let Some(mut pipe) = pipe else { return };
            while left > 0 {
                // As much as there is before it ends: half an answer is told as such.
                let Ok(count @ 1..) = pipe.read(&mut buffer) else { break };
                left = left.saturating_sub(count);
                let part = buffer.get(..count).unwrap_or_default();
                into.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(part);
            }
            drop(close);
        });
        Self { bytes, closed }
    }

    /// What there is, once the plugin has ended.
    fn take(self) -> Vec<u8> {
        // What it has written is in the pipe: reading it takes no longer.
        let _ = self.closed.recv_timeout(GRACE);
        std::mem::take(&mut self.bytes.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A plugin's own words: the error object of the specification, or else whatever it printed.
fn message(output: &[u8], errors: &[u8]) -> String {
    if let Ok(error) = serde_json::from_slice::<Value>(output)
        && let Some(message) = error.get("msg").and_then(Value::as_str)
    {
        let details = error.get("details").and_then(Value::as_str).unwrap_or_default();
        let separator = if details.is_empty() { "" } else { ": " };
        return clean(&format!("{message}{separator}{details}"));
    }
    let text = if errors.is_empty() { output } else { errors };
    let text = clean(&String::from_utf8_lossy(text));
    if text.is_empty() { "it said nothing".into() } else { text }
}

fn clean(text: &str) -> String {
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    text.trim().chars().map(printable).take(2000).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use serde_json::json;

    use super::*;

    fn call(script: &str, command: Command) -> Result<Value, Error> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("plug");
        fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        let call = Call {
            command,
            container: "c1",
            namespace: Path::new("/run/netns/x"),
            interface: "eth0",
            directories: &[dir.path().to_owned()],
            plugin: "plug",
            config: json!({ "name": "n" }),
        };
        loop {
            match call.run() {
                // Another test's child has inherited the file, still open for writing, for a moment.
                Err(Error::Run { source, .. })
                    if source.kind() == io::ErrorKind::ExecutableFileBusy => {}
                done => return done,
            }
        }
    }

    #[test]
    fn a_plugin_hears_what_it_must_and_its_result_is_taken() {
        let script = r#"read -r input || true
            printf '{"got":%s,"env":"%s %s %s %s"}' "$input" \
            $CNI_COMMAND $CNI_CONTAINERID $CNI_NETNS $CNI_IFNAME"#;
        let answer = call(script, Command::Add).unwrap();
        assert_eq!(answer["got"]["name"], "n");
        assert_eq!(answer["env"], "ADD c1 /run/netns/x eth0");
        assert_eq!(call("true", Command::Delete).unwrap(), Value::Null);
    }

    #[test]
    fn failures_are_told_in_the_plugins_words() {
        let told = |script: &str| call(script, Command::Add).unwrap_err().to_string();
        let script =
            r#"echo '{"code":11,"msg":"no more addresses","details":"10.0.0.0/30"}'; exit 1"#;
        assert!(told(script).contains("plug failed (ADD): no more addresses: 10.0.0.0/30"));
        assert!(told("echo oops >&2; exit 3").contains("oops"));
        assert!(told("exit 3").contains("said nothing"));
        assert!(matches!(call("echo hm", Command::Add), Err(Error::Answer { .. })));
    }
    #[test]
    fn whoever_is_left_behind_with_its_pipes_is_not_waited_for() {
        let start = Instant::now();
        let script = r#"sleep 300 & echo '{"pid":'$!'}'"#;
        let answer = call(script, Command::Add).unwrap();
        let pid = i32::try_from(answer["pid"].as_i64().unwrap()).unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL).unwrap();
        assert!(start.elapsed() < Duration::from_secs(290));
    }

    #[test]
    fn one_that_does_not_end_is_ended() {
        let child = std::process::Command::new("/bin/sh")
            .args(["-c", "exec sleep 300 >/dev/null 2>&1"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let error = talk(child, "{}".into(), Duration::from_millis(100)).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
