//! What is known of a sandbox, as kept in its `state.json`.
//!
//! One process owns the file: the front door that made the sandbox. Others read it, and take over
//! (see [`crate::recover`]) only when that process is gone.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::procid::ProcessId;

/// Version of the file's form; another one is refused by name.
pub const STATE_VERSION: u32 = 1;

/// Where a sandbox is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// The machine is being started; no process of the image runs yet.
    Creating,
    /// The image's process runs.
    Running,
    /// The machine's vCPUs are stopped.
    Paused,
    /// The image's process has ended, or the machine is gone.
    Exited,
}

impl Status {
    /// The word that users see.
    pub fn word(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Exited => "exited",
        }
    }
}

/// The engine that runs the vCPUs, and why this one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct EngineChoice {
    /// `emu` or `kvm`.
    pub name: String,
    /// Why, if the user left it open: one sentence.
    pub reason: String,
    /// It stands in for hardware virtualization.
    #[serde(default)]
    pub fallback: bool,
}

/// A sandbox. Times are milliseconds since 1970, sizes bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// [`STATE_VERSION`].
    pub version: u32,
    /// Twelve hexadecimal digits, unique.
    pub id: String,
    /// The name given by the user or made up, unique.
    pub name: String,
    /// The image as the user wrote it.
    pub image: String,
    /// Digest of the image's manifest.
    pub image_digest: String,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Labels given by the user and the image.
    pub labels: BTreeMap<String, String>,
    /// Where in its life it is.
    pub status: Status,
    /// The exit code of the image's process, or of mvm if that never ran.
    pub exit_code: Option<i32>,
    /// A memory limit ended it.
    pub oom_killed: bool,
    /// Why it ended, if not by itself.
    pub reason: Option<String>,
    /// When it was made.
    pub created: u64,
    /// When the process started.
    pub started: Option<u64>,
    /// When it ended.
    pub finished: Option<u64>,
    /// The engine.
    pub engine: EngineChoice,
    /// vCPUs of the machine.
    pub vcpus: u32,
    /// The machine's memory.
    pub memory: u64,
    /// The machine is all there is: no agent in it, no process that could be told from it.
    #[serde(default)]
    pub bare: bool,
    /// The machine's interfaces besides loopback.
    #[serde(default)]
    pub network: Vec<crate::network::Summary>,
    /// Whether the process has a terminal.
    pub tty: bool,
    /// Whether it was started in the background.
    pub detached: bool,
    /// Whether it is to be removed at its end.
    pub auto_remove: bool,
    /// The signal that asks the process to end, by number.
    pub stop_signal: i32,
    /// Seconds between that signal and SIGKILL.
    pub stop_timeout: u32,
    /// The host's boot during which it was made.
    pub boot_id: String,
    /// The front door that owns it.
    pub owner: ProcessId,
    /// The process that is the machine.
    pub monitor: Option<ProcessId>,
}

/// Why a state file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is no state file.
    #[error("{} is damaged: {source}; remove the sandbox by `mvm rm -f`", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where it stops making sense.
        source: serde_json::Error,
    },
    /// Another version of mvm wrote it.
    #[error("{} has version {found}, this mvm reads version {STATE_VERSION}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
}

impl State {
    /// Reads `dir/state.json`.
    pub fn load(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(STATE_FILE);
        let bytes = fs::read(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        let json: serde_json::Value = serde_json::from_slice(&bytes)
            .map_err(|source| Error::Damaged { path: path.clone(), source })?;
        let found = json.get("version").and_then(serde_json::Value::as_u64).unwrap_or(0);
        if found != u64::from(STATE_VERSION) {
            return Err(Error::Version { path, found });
        }
        let mut state: Self =
            serde_json::from_value(json).map_err(|source| Error::Damaged { path, source })?;
        if state.status == Status::Running && dir.join(PAUSED_FILE).exists() {
            state.status = Status::Paused;
        }
        Ok(state)
    }

    /// Replaces `dir/state.json` in one step, so that a reader sees the old or the new one.
    pub fn save(&self, dir: &Path) -> Result<(), Error> {
        let path = dir.join(STATE_FILE);
        let fail = |source| Error::Io { path: path.clone(), source };
        let next = dir.join(format!(".state.{}", std::process::id()));
        let json = serde_json::to_vec_pretty(self).map_err(|e| fail(e.into()))?;
        let saved = fs::write(&next, &json).and_then(|()| fs::rename(&next, &path));
        if saved.is_err() {
            // On a full disk it would take what little there is.
            let _ = fs::remove_file(&next);
        }
        saved.map_err(fail)
    }

    /// Whether a process of the image may be running.
    pub fn is_live(&self) -> bool {
        self.status != Status::Exited
    }

    /// What `mvm ps` shows as the status.
    pub fn describe(&self, now: u64) -> String {
        let since = |then: Option<u64>| human_duration(now.saturating_sub(then.unwrap_or(now)));
        let mut text = match self.status {
            Status::Creating => "Creating".to_owned(),
            Status::Running => format!("Up {}", since(self.started)),
            Status::Paused => format!("Up {} (Paused)", since(self.started)),
            Status::Exited => {
                format!("Exited ({}) {} ago", self.exit_code.unwrap_or(255), since(self.finished))
            }
        };
        if let Some(reason) = &self.reason {
            text.push_str(": ");
            text.push_str(reason);
        }
        text
    }
}

/// The file's name in the sandbox's directory.
pub const STATE_FILE: &str = "state.json";

/// A file whose presence says that the vCPUs are stopped. Not part of the state file: anybody may
/// pause, but only the owner writes that.
pub const PAUSED_FILE: &str = "paused";

/// The runtime specification's name in the sandbox's directory.
pub const SPEC_FILE: &str = "config.json";

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// "7 seconds", "3 hours": one unit, as docker shows it.
pub fn human_duration(millis: u64) -> String {
    let seconds = millis / 1000;
    let (count, unit) = match seconds {
        0 => return "less than a second".into(),
        1..60 => (seconds, "second"),
        60..3_600 => (seconds / 60, "minute"),
        3_600..172_800 => (seconds / 3_600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    format!("{count} {unit}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
pub(crate) fn sample(id: &str, name: &str) -> State {
    State {
        version: STATE_VERSION,
        id: id.into(),
        name: name.into(),
        image: "busybox".into(),
        image_digest: "sha256:00".into(),
        command: vec!["sh".into()],
        labels: BTreeMap::new(),
        status: Status::Running,
        exit_code: None,
        oom_killed: false,
        reason: None,
        created: 1_000,
        started: Some(2_000),
        finished: None,
        engine: EngineChoice::default(),
        vcpus: 1,
        memory: 512 << 20,
        bare: false,
        network: Vec::new(),
        tty: false,
        detached: false,
        auto_remove: false,
        stop_signal: 15,
        stop_timeout: 10,
        boot_id: crate::procid::boot_id(),
        owner: ProcessId::current().unwrap(),
        monitor: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saved_state_is_read_back_and_leaves_no_other_file() {
        let dir = tempfile::tempdir().unwrap();
        let state = sample("0123456789ab", "x");
        state.save(dir.path()).unwrap();
        assert_eq!(State::load(dir.path()).unwrap(), state);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_cannot_be_saved_leaves_no_other_file() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(STATE_FILE)).unwrap();
        assert!(sample("0123456789ab", "x").save(dir.path()).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn damaged_and_foreign_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(STATE_FILE);
        assert!(matches!(State::load(dir.path()), Err(Error::Io { .. })));
        for (text, damaged) in [("", true), ("{\"version\":1}", true), ("{\"version\":9}", false)] {
            fs::write(&path, text).unwrap();
            let e = State::load(dir.path()).unwrap_err();
            assert_eq!(matches!(e, Error::Damaged { .. }), damaged, "{e}");
            assert!(e.to_string().contains("state.json"));
        }
    }

    #[test]
    fn durations_read_like_dockers() {
        for (ms, text) in [
            (900, "less than a second"),
            (1_000, "1 second"),
            (59_999, "59 seconds"),
            (60_000, "1 minute"),
            (7_200_000, "2 hours"),
            (172_800_000, "2 days"),
        ] {
            assert_eq!(human_duration(ms), text);
        }
    }
}
