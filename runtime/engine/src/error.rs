//! Errors of an engine.

use crate::cpuid::CpuModel;

/// Why an engine refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The engine cannot run on this host.
    #[error("engine {engine} cannot run here: {reason}")]
    Unusable {
        /// Name of the engine.
        engine: &'static str,
        /// What is missing, and the remedy if there is one.
        reason: String,
    },
    /// The host refused a resource.
    #[error("{what}: {source}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
    /// More vCPUs than the engine offers.
    #[error("{wanted} vCPUs asked for, the engine offers {max}")]
    TooManyVcpus {
        /// vCPUs asked for.
        wanted: u32,
        /// vCPUs that there can be.
        max: u32,
    },
    /// A processor model that the engine does not have.
    #[error("engine {engine} has no processor model {model}: {reason}")]
    Model {
        /// Name of the engine.
        engine: &'static str,
        /// The model asked for.
        model: CpuModel,
        /// Why, and what to do.
        reason: String,
    },
    /// A state that no processor of this model can be in.
    #[error("vCPU {vcpu}: cannot take this state: {reason}")]
    BadState {
        /// Index of the vCPU.
        vcpu: u32,
        /// Which part, and why.
        reason: String,
    },
}

/// Result of an engine call.
pub type Result<T> = std::result::Result<T, Error>;
