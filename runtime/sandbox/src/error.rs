//! What can go wrong with a sandbox, and which exit code the user sees for it.

use std::io;

use mvm_agent_protocol::rpc::CallError;
use mvm_agent_protocol::{hello, stream};
use mvm_vmm::EndReason;
use mvm_vmm::monitor::spawn;

use crate::{engine, registry, spec, state};

/// Exit code for mvm's own failures.
pub const EXIT_FAILURE: i32 = 125;
/// Exit code for a program that exists and cannot be executed.
pub const EXIT_NOT_EXECUTABLE: i32 = 126;
/// Exit code for a program that does not exist.
pub const EXIT_NOT_FOUND: i32 = 127;

/// Most lines of the console that an error shows.
const TAIL_LINES: usize = 40;

/// Why a sandbox did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It was not found or could not be made.
    #[error(transparent)]
    Registry(#[from] registry::Error),
    /// Its state cannot be used.
    #[error(transparent)]
    State(#[from] state::Error),
    /// The runtime specification cannot be made.
    #[error(transparent)]
    Spec(#[from] spec::Error),
    /// No engine runs this guest here.
    #[error(transparent)]
    Engine(#[from] engine::Error),
    /// There is no network for it.
    #[error(transparent)]
    Network(#[from] crate::network::Error),
    /// The socket to the guest cannot be made.
    #[error("--vsock {}: {reason}", path.display())]
    Vsock {
        /// Where it was to be.
        path: std::path::PathBuf,
        /// What is wrong with that.
        reason: io::Error,
    },
    /// The monitor process could not be started.
    #[error(transparent)]
    Launch(#[from] spawn::Error),
    /// What is to be shared with the guest cannot be.
    #[error(transparent)]
    Files(#[from] mvm_fs::SpawnError),
    /// The file server of a machine does not do what it should.
    #[error(transparent)]
    Shares(#[from] mvm_fs::ClientError),
    /// The machine could not be started.
    #[error("the machine could not be started: {message}{}", console.as_deref().map_or(String::new(), tail))]
    Boot {
        /// What happened.
        message: String,
        /// The last of the guest's console; `None` if nothing of the guest has run.
        console: Option<String>,
    },
    /// The machine ended while a process of the image should have run.
    #[error("the machine ended: {reason}{}", tail(console))]
    MachineEnded {
        /// Why.
        reason: EndReason,
        /// The last of the guest's console.
        console: String,
    },
    /// The first message of the guest was wrong.
    #[error(transparent)]
    Hello(#[from] hello::Error),
    /// A standard stream could not be joined.
    #[error(transparent)]
    Stream(#[from] stream::Error),
    /// The agent refused or did not answer.
    #[error(transparent)]
    Agent(#[from] CallError),
    /// The monitor refused or did not answer.
    #[error(transparent)]
    Control(#[from] mvm_vmm::monitor::client::Error),
    /// The program does not exist in the image.
    #[error("cannot run {program:?}: {message}")]
    NotFound {
        /// The program.
        program: String,
        /// What the guest said.
        message: String,
    },
    /// The program exists and cannot be executed.
    #[error("cannot run {program:?}: {message}")]
    NotExecutable {
        /// The program.
        program: String,
        /// What the guest said.
        message: String,
    },
    /// The process could not be set up.
    #[error("cannot set up the container: {0}")]
    Setup(String),
    /// The image is a unikernel that cannot be run, or a file of it cannot be used.
    #[error(transparent)]
    Unikernel(#[from] crate::unikernel::Error),
    /// The sandbox is not in a state in which this can be done.
    #[error("container {name} is {status}; {advice}")]
    WrongStatus {
        /// Its name.
        name: String,
        /// What it is.
        status: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// The guest did not take the memory that it was offered.
    #[error(
        "the guest has {} MiB of memory and does not take more, of {} MiB that it could have: its kernel cannot plug memory \
         (a virtio-mem driver does), or has no room left for the tables that more memory needs",
        now >> 20, wanted >> 20
    )]
    NotGrown {
        /// Bytes that it has.
        now: u64,
        /// Bytes that it was to have.
        wanted: u64,
    },
    /// There is no agent in the guest that could do this.
    #[error(
        "container {name} is a machine without mvm's agent (a unikernel or a system of its own): \
         {what} cannot be done in it"
    )]
    NoAgent {
        /// Its name.
        name: String,
        /// What was asked for.
        what: &'static str,
    },
    /// A signal came before the process could take it.
    #[error("interrupted while the machine was starting")]
    Interrupted,
    /// The host refused.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Error {
    /// An I/O error with what was being done.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// The exit code that the user sees.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::NotFound { .. } => EXIT_NOT_FOUND,
            Self::NotExecutable { .. } => EXIT_NOT_EXECUTABLE,
            _ => EXIT_FAILURE,
        }
    }
}

/// The end of the guest's console as the end of an error message. Control characters other than
/// line breaks and tabs are left out: the guest does not get to write to the user's terminal.
fn tail(console: &str) -> String {
    let clean: String =
        console.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect();
    let lines: Vec<&str> = clean.lines().filter(|l| !l.trim().is_empty()).collect();
    if lines.is_empty() {
        return "\n  (the guest wrote nothing to its console)".into();
    }
    let shown = &lines[lines.len().saturating_sub(TAIL_LINES)..];
    let mut text = String::from("\n  the last of the guest's console:");
    for line in shown {
        text.push_str("\n  | ");
        text.push_str(line);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn console_tail_is_short_and_harmless() {
        let console: String = (0..100).map(|n| format!("line {n}\x1b[2J\r\n")).collect();
        let text = tail(&console);
        assert!(!text.contains('\x1b') && !text.contains('\r'));
        assert_eq!(text.lines().filter(|l| l.starts_with("  | ")).count(), TAIL_LINES);
        assert!(text.ends_with("line 99[2J"));
        assert!(tail("").contains("nothing"));
        let never_ran = Error::Boot { message: "no kernel".into(), console: None };
        assert_eq!(never_ran.to_string().lines().count(), 1);
    }

    #[test]
    fn missing_programs_have_dockers_codes() {
        let program = || "x".to_owned();
        let missing = Error::NotFound { program: program(), message: String::new() };
        assert_eq!(missing.exit_code(), 127);
        let bad = Error::NotExecutable { program: program(), message: String::new() };
        assert_eq!(bad.exit_code(), 126);
        assert_eq!(Error::Interrupted.exit_code(), 125);
    }
}
