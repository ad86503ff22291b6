//! What a call of containerd is refused with.
//!
//! The kinds are those that runc's shim answers with, since clients tell them apart.

use containerd_shim_protos::ttrpc;

/// Why a call was refused. The text says what, where and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is no such container or process.
    #[error("{0}")]
    NotFound(String),
    /// The id is taken.
    #[error("{0}")]
    AlreadyExists(String),
    /// It is not in a state in which this can be done.
    #[error("{0}")]
    FailedPrecondition(String),
    /// The request does not make sense.
    #[error("{0}")]
    InvalidArgument(String),
    /// This is not done.
    #[error("{0}")]
    Unimplemented(String),
    /// It was tried and failed. `code` is what the process would have exited with: 125 to 127.
    #[error("{message}")]
    Failed {
        /// What happened.
        message: String,
        /// The exit status of a process that was not started for this.
        code: u32,
    },
}

/// The result of a call.
pub type Result<T> = std::result::Result<T, Error>;

/// Exit status of a process that mvm could not start.
const EXIT_FAILURE: u32 = 125;

impl Error {
    /// A failure of mvm or of the host.
    pub fn failed(message: impl std::fmt::Display) -> Self {
        Self::Failed { message: message.to_string(), code: EXIT_FAILURE }
    }

    /// A failure of mvm or of the host while doing `what`.
    pub fn failed_to<E: std::fmt::Display>(what: impl std::fmt::Display) -> impl FnOnce(E) -> Self {
        move |e| Self::failed(format!("{what}: {e}"))
    }

    /// The exit status of a process that could not be started for this reason.
    pub fn exit_status(&self) -> u32 {
        match self {
            Self::Failed { code, .. } => *code,
            _ => EXIT_FAILURE,
        }
    }

    fn code(&self) -> ttrpc::Code {
        match self {
            Self::NotFound(_) => ttrpc::Code::NOT_FOUND,
            Self::AlreadyExists(_) => ttrpc::Code::ALREADY_EXISTS,
            Self::FailedPrecondition(_) => ttrpc::Code::FAILED_PRECONDITION,
            Self::InvalidArgument(_) => ttrpc::Code::INVALID_ARGUMENT,
            Self::Unimplemented(_) => ttrpc::Code::UNIMPLEMENTED,
            Self::Failed { .. } => ttrpc::Code::UNKNOWN,
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), error))
    }
}

impl From<mvm_sandbox::Error> for Error {
    fn from(error: mvm_sandbox::Error) -> Self {
        use mvm_agent_protocol::rpc::Code;
        if let mvm_sandbox::Error::Agent(call) = &error {
            let text = call.to_string();
            match call.code() {
                Some(Code::NOT_FOUND) => return Self::NotFound(text),
                Some(Code::ALREADY_EXISTS) => return Self::AlreadyExists(text),
                Some(Code::FAILED_PRECONDITION) => return Self::FailedPrecondition(text),
                Some(Code::INVALID_ARGUMENT) => return Self::InvalidArgument(text),
                _ => {}
            }
        }
        let code = u32::try_from(error.exit_code()).unwrap_or(EXIT_FAILURE);
        Self::Failed { message: error.to_string(), code }
    }
}
