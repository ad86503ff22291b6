//! What can go wrong while a container or process is set up, and how the host learns of it.

use std::fmt;

use mvm_agent_protocol::messages::launch_failure::Kind;
use mvm_agent_protocol::rpc::{Code, Status};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

/// The result of most set-up steps.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure, serializable because set-up runs in another process than the service.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum Error {
    /// The specification or the request asks for something that cannot be.
    #[error("{0}")]
    Invalid(String),
    /// The specification asks for something that this agent does not do.
    #[error("{0}")]
    Unsupported(String),
    /// There is no such container, process or device.
    #[error("{0}")]
    NotFound(String),
    /// The id is taken.
    #[error("{0}")]
    Exists(String),
    /// The container or process is not in a state for this.
    #[error("{0}")]
    State(String),
    /// The kernel refused a step.
    #[error("{what}: {}", Errno::from_raw(*errno).desc())]
    System {
        /// The step, with its object.
        what: String,
        /// The kernel's error number.
        errno: i32,
    },
    /// The program does not exist (exit code 127).
    #[error("{0}")]
    ProgramNotFound(String),
    /// The program cannot be executed (exit code 126).
    #[error("{0}")]
    NotExecutable(String),
}

impl Error {
    /// A refused step.
    pub fn system(what: impl Into<String>, errno: impl Into<SystemErrno>) -> Self {
        Self::System { what: what.into(), errno: errno.into().0 }
    }

    /// The same failure, said to be in `field` of the specification.
    pub fn within(self, field: impl fmt::Display) -> Self {
        match self {
            Self::System { what, errno } => {
                Self::System { what: format!("{field}: {what}"), errno }
            }
            Self::Invalid(m) => Self::Invalid(format!("{field}: {m}")),
            Self::Unsupported(m) => Self::Unsupported(format!("{field}: {m}")),
            other => other,
        }
    }

    /// The same failure of the kernel's, with what else is known of it.
    pub fn explained(self, more: &str) -> Self {
        match self {
            Self::System { what, errno } if !more.is_empty() => {
                Self::System { what: format!("{what}: {more}"), errno }
            }
            other => other,
        }
    }

    /// The kind if this failure decides the exit code that the user sees.
    pub fn launch_kind(&self) -> Option<Kind> {
        match self {
            Self::ProgramNotFound(_) => Some(Kind::NOT_FOUND),
            Self::NotExecutable(_) => Some(Kind::NOT_EXECUTABLE),
            _ => None,
        }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::Invalid(_) => Code::INVALID_ARGUMENT,
            Error::Unsupported(_) => Code::UNIMPLEMENTED,
            Error::NotFound(_) => Code::NOT_FOUND,
            Error::Exists(_) => Code::ALREADY_EXISTS,
            Error::State(_) | Error::ProgramNotFound(_) | Error::NotExecutable(_) => {
                Code::FAILED_PRECONDITION
            }
            Error::System { errno, .. } if matches!(*errno, libc::ENOMEM | libc::ENOSPC) => {
                Code::RESOURCE_EXHAUSTED
            }
            Error::System { .. } => Code::INTERNAL,
        };
        Self::new(code, error.to_string())
    }
}

/// An error number out of any of the libraries' error types.
#[derive(Debug, Clone, Copy)]
pub struct SystemErrno(i32);

impl From<Errno> for SystemErrno {
    fn from(errno: Errno) -> Self {
        Self(errno as i32)
    }
}

impl From<rustix::io::Errno> for SystemErrno {
    fn from(errno: rustix::io::Errno) -> Self {
        Self(errno.raw_os_error())
    }
}

impl From<std::io::Error> for SystemErrno {
    fn from(error: std::io::Error) -> Self {
        Self(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

/// Says what was being done when a system call failed.
pub trait Context<T> {
    /// Turns the error into [`Error::System`].
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<SystemErrno>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| Error::system(what(), e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_errors_say_what_and_why() {
        let failed: Result<(), Errno> = Err(Errno::ENOENT);
        let error = failed.context(|| "mount /proc".into()).unwrap_err();
        assert_eq!(error.to_string(), "mount /proc: No such file or directory");
        assert_eq!(error.launch_kind(), None);
        let told = error.clone().explained("not today");
        assert_eq!(told.to_string(), "mount /proc: not today: No such file or directory");
        assert_eq!(error.clone().explained(""), error);
    }

    #[test]
    fn only_program_errors_decide_exit_codes() {
        assert_eq!(Error::ProgramNotFound("x".into()).launch_kind(), Some(Kind::NOT_FOUND));
        assert_eq!(Error::NotExecutable("x".into()).launch_kind(), Some(Kind::NOT_EXECUTABLE));
        assert_eq!(Status::from(Error::Exists("x".into())).code, Code::ALREADY_EXISTS);
    }
}
