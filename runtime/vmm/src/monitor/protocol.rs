//! What is said over the monitor's two sockets.
//!
//! * The **owner channel** is the socket pair between the monitor and the process that started it:
//!   one config with its descriptors goes down ([`super::fds`]), [`Event`]s come up, each as one
//!   length-prefixed JSON message. Its end of file is how either side learns that the other is
//!   gone.
//! * The **control socket** takes a [`Request`] a line and answers with a [`Response`] a line. Who asks may be of
//!   another version than the monitor, which goes on when mvm is replaced: what is added to an answer has a default,
//!   what has changed its form is read in both, and a request that a monitor does not know it refuses by name.
//!   [`Status::version`] says what to expect.

use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize};

use crate::MemorySize;
use crate::config::BootProtocol;
use crate::outcome::Outcome;

/// The version of what is said over the control socket. Monitors from before there were versions are 0: they may tell their
/// memory as a number, and cannot be resized then.
pub const CONTROL_VERSION: u32 = 1;

/// What the monitor tells its owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "event")]
pub enum Event {
    /// Which engine runs the guest.
    Engine {
        /// Its name.
        name: String,
        /// Why it is not hardware virtualization, if nothing else was asked for.
        reason: Option<String>,
    },
    /// How the guest's kernel is entered, once that is known.
    Boot {
        /// Never [`BootProtocol::Auto`].
        protocol: BootProtocol,
    },
    /// Something was reached.
    Phase(PhaseMark),
    /// The machine could not be started. Nothing of the guest has run.
    Failed {
        /// What happened, where, what to do.
        message: String,
    },
    /// The machine ended. The last event.
    Ended(Outcome),
}

/// A phase of a machine's life that was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseMark {
    /// Which.
    pub phase: Phase,
    /// When, in nanoseconds of the host's CLOCK_MONOTONIC: comparable between processes.
    pub at_ns: u64,
    /// CPU time that the monitor had used by then, all its threads together, in nanoseconds.
    pub cpu_ns: u64,
}

/// Phases that the monitor sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The monitor has read its config and descriptors.
    Monitor,
    /// Kernel and initramfs are in guest memory, the vCPUs start.
    KernelPlaced,
    /// The guest kernel looks for devices: the first access to a virtio device, or the first
    /// character on the serial port if that comes before.
    KernelUp,
    /// The guest made its first connection to the host.
    GuestHello,
    /// The machine ended.
    Ended,
}

/// What can be asked of a running machine. One line of JSON each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "request")]
pub enum Request {
    /// Where it is.
    Status,
    /// Stops the vCPUs between two instructions.
    Pause,
    /// Lets them go on.
    Resume,
    /// What it costs.
    Stats,
    /// The last of the serial console.
    ConsoleTail,
    /// Puts a disk into a place kept for one: the file or block device that comes along as a descriptor (`SCM_RIGHTS`,
    /// with any byte of the line).
    Plug {
        /// The guest may not write.
        read_only: bool,
    },
    /// Takes a disk out, of which the guest has let go.
    Unplug {
        /// Where it is.
        place: u32,
    },
    /// Asks the guest to make the machine's memory this many bytes in all ([`Machine::resize`](crate::Machine::resize)).
    /// The answer does not wait for it.
    Resize {
        /// Bytes.
        memory: u64,
    },
    /// Ends the machine at once, without asking the guest.
    Stop,
}

/// The answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "response")]
pub enum Response {
    /// Done.
    Ok,
    /// To [`Request::Status`].
    Status(Status),
    /// To [`Request::Stats`].
    Stats(Stats),
    /// To [`Request::ConsoleTail`].
    ConsoleTail {
        /// The text, bytes that are no UTF-8 replaced.
        text: String,
    },
    /// To [`Request::Plug`].
    Plugged {
        /// The number of the disk's register window.
        place: u32,
    },
    /// The request was not understood or could not be carried out.
    Error {
        /// Why.
        message: String,
    },
}

/// Where a machine is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// [`CONTROL_VERSION`] of the monitor.
    #[serde(default)]
    pub version: u32,
    /// Its name.
    pub id: String,
    /// Process id of the monitor.
    pub pid: u32,
    /// Running or paused.
    pub state: RunState,
    /// Engine that runs it.
    pub engine: String,
    /// Why it is not hardware virtualization, if nothing else was asked for.
    pub engine_reason: Option<String>,
    /// How its kernel was entered; never [`BootProtocol::Auto`].
    pub boot: BootProtocol,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest RAM.
    #[serde(deserialize_with = "memory_size")]
    pub memory: MemorySize,
    /// Phases reached so far, as far as they are known here.
    #[serde(deserialize_with = "known_phases")]
    pub phases: Vec<PhaseMark>,
}

/// A machine of version 0 has as many bytes as it says, and stays so.
fn memory_size<'de, D: Deserializer<'de>>(from: D) -> Result<MemorySize, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Told {
        Bytes(u64),
        Size(MemorySize),
    }
    Ok(match Told::deserialize(from)? {
        Told::Bytes(all) => MemorySize { started: all, now: all, wanted: all, max: all },
        Told::Size(size) => size,
    })
}

fn known_phases<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<PhaseMark>, D::Error> {
    let told = Vec::<serde_json::Value>::deserialize(from)?;
    Ok(told.into_iter().filter_map(|mark| serde_json::from_value(mark).ok()).collect())
}

/// Whether the vCPUs run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// They do.
    Running,
    /// They stand still.
    Paused,
    /// The machine has ended.
    Ended,
}

/// What a machine costs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// What the engine counts: name and value. `fallback` is 1 if it stands in for hardware
    /// virtualization.
    pub engine: Vec<(String, u64)>,
    /// What the devices count: name and value.
    pub devices: Vec<(String, u64)>,
    /// Guest RAM; all zero from a monitor of version 0.
    #[serde(default)]
    pub memory: MemorySize,
    /// Memory of the monitor that is resident on the host, guest RAM included, in bytes.
    pub resident: u64,
    /// Guest RAM that the host has pages for, in bytes.
    pub guest_resident: u64,
    /// What engine and devices need for themselves, in bytes: private memory of the process, and code that the engine made.
    pub overhead: u64,
    /// Processor time used by the monitor.
    pub cpu_time: Duration,
    /// Processor time used by each vCPU thread.
    pub vcpu_time: Vec<Duration>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(line: &str) -> Status {
        match serde_json::from_str(line).unwrap() {
            Response::Status(status) => status,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn monitors_of_other_versions_are_understood() {
        let old = status(
            r#"{"response":"status","id":"a","pid":7,"state":"paused","engine":"emu","engine_reason":null,"boot":"linux","vcpus":2,
                "memory":536870912,"phases":[{"phase":"monitor","at_ns":5,"cpu_ns":3}]}"#,
        );
        let all = 512 << 20;
        assert_eq!((old.version, old.pid, old.state), (0, 7, RunState::Paused));
        assert_eq!(old.memory, MemorySize { started: all, now: all, wanted: all, max: all });
        let new = status(
            r#"{"response":"status","version":9,"id":"a","pid":7,"state":"running","engine":"emu","engine_reason":null,"boot":"linux",
                "vcpus":2,"memory":{"started":1,"now":2,"wanted":3,"max":4,"lent":5},"weather":"fine",
                "phases":[{"phase":"monitor","at_ns":5,"cpu_ns":3},{"phase":"dawn","at_ns":6,"cpu_ns":4}]}"#,
        );
        assert_eq!((new.version, new.memory.max, new.phases.len()), (9, 4, 1));
        assert_eq!(new.phases, old.phases);
    }

    #[test]
    fn figures_of_an_old_monitor_lack_what_it_did_not_tell() {
        let line = r#"{"response":"stats","engine":[],"devices":[],"resident":1,"guest_resident":2,"overhead":3,
            "cpu_time":{"secs":1,"nanos":0},"vcpu_time":[]}"#;
        let Response::Stats(stats) = serde_json::from_str(line).unwrap() else {
            panic!("no figures")
        };
        assert_eq!((stats.memory, stats.overhead), (MemorySize::default(), 3));
    }
}
