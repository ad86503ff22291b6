//! Whether this host has a KVM that is worth using, found out by trying.
//!
//! A `/dev/kvm` that opens is not yet usable: on a host that is the guest of a pagetable-based
//! hypervisor the device is there without VT-x or AMD-V, user code of a guest runs at full speed, but
//! its kernel is interpreted by the host's, a thousand times slower and with instructions missing. So
//! besides flags, permissions and extensions the probe runs a loop in ring 0 for some milliseconds
//! and takes its time.
//!
//! * [`facts`] is what is found, [`judge()`] what it means: a [`Finding`] in words with its remedy.
//! * [`examine`] does both. The trial machine's figures are kept in a [`Cache`] for the boot of the
//!   host; everything else costs microseconds and is looked at each time.
//!
//! Not in scope: which engine is chosen. That depends on what the user wants and what the guest is.

mod cache;
pub mod facts;
mod gather;
mod guest;
mod judge;
mod measure;
pub mod needs;

use std::fs::File;
use std::os::fd::OwnedFd;

use serde::Serialize;

pub use cache::Cache;
pub use gather::Sources;
pub use judge::{judge, speed};

use facts::{Facts, Trial};

/// Speed in ring 0 from which on a KVM is one of hardware: millions of instructions a second.
/// Hardware does more than 500 of the loop that is measured, an interpreting kernel about 1.
pub const USABLE_MIPS: f64 = 50.0;

/// What the probe found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Probe {
    /// What it is good for.
    pub verdict: Verdict,
    /// Why.
    pub finding: Finding,
    /// Millions of instructions a second in ring 0, if that could be measured.
    pub mips: Option<f64>,
    /// What it was judged from.
    pub facts: Facts,
}

/// What the host's KVM is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Every guest.
    Usable,
    /// Guests that do their work in ring 3: ring 0 is interpreted.
    Interpreted,
    /// None.
    Unusable,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Which case this is.
    pub kind: Kind,
    /// One sentence without a full stop.
    pub text: String,
    /// More of it; may be empty.
    pub detail: String,
    /// What to do; empty if nothing is to be done.
    pub remedy: String,
}

/// The cases that are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// All is well.
    Works,
    /// No device, and no sign of hardware virtualization.
    NoHardware,
    /// The processor has it, the firmware has switched it off.
    FirmwareDisabled,
    /// The host is a virtual machine whose hypervisor does not pass it on.
    NestedOff,
    /// KVM's module is not loaded.
    ModuleMissing,
    /// The kernel has the device, this container does not.
    DeviceHidden,
    /// The module is loaded, but nobody made the device.
    NoDevice,
    /// Something else is at the device's place.
    NotADevice,
    /// The file's permissions are in the way.
    NoPermission,
    /// A container's rules are in the way.
    Denied,
    /// It does not open for another reason.
    OpenFailed,
    /// Another version of the interface.
    WrongApi,
    /// Extensions are missing.
    MissingExtensions,
    /// Another hypervisor holds the hardware.
    Busy,
    /// No machine for another reason.
    VmRefused,
    /// The trial machine failed.
    TrialFailed,
    /// The trial machine took too long.
    Overdue,
    /// Ring 0 is interpreted.
    Interpreted,
}

/// Looks at the host, and tries its KVM unless `cache` knows the outcome. Takes some milliseconds
/// then, and less than a second whatever the host does.
///
/// Returns the open device with what was found, for whoever makes a machine.
pub fn examine(sources: &Sources, cache: Option<&Cache>) -> (Probe, Option<OwnedFd>) {
    let (device, file) = sources.device();
    let user = sources.user(device.file.as_ref().map(|f| f.gid));
    let kvm = file.as_ref().map(|file| behind(file, cache));
    let probe = judge(Facts { host: sources.host(), user, device, kvm });
    (probe, file.map(OwnedFd::from))
}

fn behind(file: &File, cache: Option<&Cache>) -> facts::Kvm {
    let known = cache.and_then(|cache| cache.read(file));
    let found = match measure::measure(file, known) {
        Ok(found) => found,
        Err(e) => {
            let errno = e.raw_os_error().unwrap_or(libc::EIO);
            let trial = Trial::Failed { step: "its thread".into(), errno };
            facts::Kvm { api_version: needs::API_VERSION, missing: Vec::new(), trial }
        }
    };
    if let Some(cache) = cache {
        cache.keep(file, &found.trial);
    }
    found
}

#[cfg(test)]
mod tests;
