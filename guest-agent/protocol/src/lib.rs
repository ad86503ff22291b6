//! The protocol between mvm on the host and `mvm-agent`, PID 1 of the Linux guest.
//!
//! Three kinds of vsock connection, each with its port in [`port`]:
//!
//! 1. **hello**: the guest dials the host once, when it is ready for work; one framed message each
//!    way ([`hello`]), then the connection ends. Nobody polls for readiness.
//! 2. **control**: the host dials the guest; ttrpc calls of the service [`SERVICE`] ([`rpc`]).
//! 3. **stream**: the host dials the guest once for each standard stream of a process, and for each
//!    connection to the guest's loopback; a small header ([`stream`]), one byte of answer, then raw
//!    bytes. Half-close is end of file.
//!
//! The agent accepts control and stream connections from the host (CID 2) only.
//!
//! Everything here works on any stream socket: a [`std::os::unix::net::UnixStream`] is used as the
//! owner of the descriptor for `AF_VSOCK` sockets too (it only reads, writes and shuts down).

pub mod hello;
pub mod relay;
pub mod rpc;
pub mod stream;

/// Message types generated from `proto/agent.proto`, which documents every field.
#[allow(missing_docs, missing_debug_implementations, unused_qualifications, clippy::all)]
pub mod messages {
    mod generated {
        include!(concat!(env!("OUT_DIR"), "/proto/mod.rs"));
    }
    pub use generated::agent::*;
}

/// Raised when either side could misunderstand the other; hello compares it.
pub const PROTOCOL_VERSION: u32 = 1;

/// The ttrpc service name.
pub const SERVICE: &str = "mvm.agent.v1.Agent";

/// vsock ports.
pub mod port {
    /// The host listens here until the guest has said hello.
    pub const HELLO: u32 = 1024;
    /// The agent listens here for ttrpc connections.
    pub const CONTROL: u32 = 1025;
    /// The agent listens here for standard streams and connections to its loopback.
    pub const STREAM: u32 = 1026;
}

/// Where the guest provides the volumes of a `CreateContainerRequest`: `VOLUMES_DIR/NAME`.
pub const VOLUMES_DIR: &str = "/run/mvm/volumes";

/// The longest time that one `WaitProcess` call blocks, milliseconds.
pub const WAIT_MAX_MS: u32 = 60_000;

/// True if `id` may name a container, an exec'ed process or a volume: one path component of
/// `[A-Za-z0-9_.-]`, at most 128 bytes, not starting with a dot.
#[must_use]
pub fn is_valid_id(id: &str) -> bool {
    !id.is_empty()
        && id.len() <= 128
        && !id.starts_with('.')
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::is_valid_id;

    #[test]
    fn ids_are_single_harmless_path_components() {
        for good in ["a", "web-1", "A_b.c", &"x".repeat(128)] {
            assert!(is_valid_id(good), "{good}");
        }
        for bad in ["", ".", "..", ".hidden", "a/b", "a b", "ä", "a\0", &"x".repeat(129)] {
            assert!(!is_valid_id(bad), "{bad:?}");
        }
    }
}
