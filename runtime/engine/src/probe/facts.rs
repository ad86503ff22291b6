//! What is found on the host, before anybody judges it.
//!
//! Gathering ([`super::gather`], [`super::measure`]) and judging ([`super::judge()`]) are apart, so
//! that every answer can be tested without the host that it is about.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Everything that the judgement is made from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Facts {
    /// Processor and kernel.
    pub host: Host,
    /// Who asks.
    pub user: User,
    /// The device file.
    pub device: Device,
    /// What stands behind it; `None` if it does not open.
    pub kvm: Option<Kvm>,
}

/// Processor and kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// What the kernel says that the processor has.
    pub virtualization: Option<Virtualization>,
    /// What the processor says itself (CPUID). Firmware that switches virtualization off does not
    /// change it; Linux then takes its own flag away.
    pub cpuid: Option<Virtualization>,
    /// The host is a virtual machine itself (CPUID 1, ECX bit 31).
    pub hypervisor: bool,
    /// Modules of KVM in the kernel, as in `/sys/module`: kvm, kvm_intel, kvm_amd, kvm_pvm.
    pub modules: Vec<String>,
    /// Modules of other hypervisors in the kernel.
    pub rivals: Vec<String>,
    /// The kernel has the device, whether or not it is shown below `/dev`.
    pub device_in_kernel: bool,
}

/// Hardware virtualization of a vendor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Virtualization {
    /// Intel's VT-x.
    Vmx,
    /// AMD's AMD-V.
    Svm,
}

impl Virtualization {
    /// The flag in `/proc/cpuinfo`.
    pub fn flag(self) -> &'static str {
        match self {
            Self::Vmx => "vmx",
            Self::Svm => "svm",
        }
    }

    /// The name in the vendor's papers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vmx => "VT-x",
            Self::Svm => "AMD-V",
        }
    }

    /// The module of KVM.
    pub fn module(self) -> &'static str {
        match self {
            Self::Vmx => "kvm_intel",
            Self::Svm => "kvm_amd",
        }
    }
}

/// Who asks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// Effective user id.
    pub uid: u32,
    /// The name in the user database.
    pub name: Option<String>,
    /// The device's group lists this user, whether or not this process has it.
    pub listed_in_group: bool,
}

/// The device file, usually `/dev/kvm`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Where it was looked for.
    pub path: String,
    /// The file; `None` if there is none.
    pub file: Option<DeviceFile>,
    /// Error number of opening it (or of looking for it); `None` if it opens.
    pub errno: Option<i32>,
}

/// What `stat` says of the device file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceFile {
    /// It is the character device of KVM.
    pub is_kvm: bool,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// The group's name.
    pub group: Option<String>,
}

/// What stands behind the device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kvm {
    /// KVM_GET_API_VERSION.
    pub api_version: i32,
    /// Names of needed extensions that are not there ([`super::needs`]).
    pub missing: Vec<String>,
    /// A tiny machine, as far as there could be one.
    pub trial: Trial,
}

/// What became of the tiny machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trial {
    /// It was not tried, since the interface is not the one that we know.
    Skipped,
    /// KVM_CREATE_VM failed.
    NoVm {
        /// Error number.
        errno: i32,
    },
    /// A later step failed.
    Failed {
        /// Which.
        step: String,
        /// Error number, 0 if the host did not say.
        errno: i32,
    },
    /// Not even being made ended in time.
    Stuck,
    /// It ran.
    Ran(Measured),
}

/// What a machine in ring 0 did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// A loop of integer instructions.
    pub integer: Loop,
    /// Single instructions that a kernel uses and an interpreter may lack.
    pub instructions: Vec<Instruction>,
}

/// A loop and its time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Loop {
    /// How it ended.
    pub end: RunEnd,
    /// Guest instructions.
    pub instructions: u64,
    /// Processor time of the thread in nanoseconds: what else the host does is not in it.
    pub cpu_ns: u64,
}

impl Loop {
    /// Millions of instructions a second; `None` if nothing was measured.
    // Numbers below 2^53, and three digits of the result are of interest.
    #[allow(clippy::cast_precision_loss)]
    pub fn mips(&self) -> Option<f64> {
        let seconds = Duration::from_nanos(self.cpu_ns).as_secs_f64();
        (self.end == RunEnd::Done && self.instructions > 0 && seconds > 0.0)
            .then(|| self.instructions as f64 / seconds / 1e6)
    }
}

/// One instruction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Instruction {
    /// Its mnemonic.
    pub name: String,
    /// How it went.
    pub end: RunEnd,
}

/// How a guest of ours stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunEnd {
    /// It reached its HLT, with the right result.
    Done,
    /// It reached its HLT with a wrong result.
    Wrong,
    /// KVM_EXIT_INTERNAL_ERROR: the host's kernel could not interpret an instruction.
    InternalError {
        /// KVM_INTERNAL_ERROR_*.
        suberror: u32,
    },
    /// KVM_EXIT_FAIL_ENTRY: the hardware refused to enter the guest.
    FailEntry {
        /// The hardware's reason.
        reason: u64,
    },
    /// KVM_EXIT_SHUTDOWN: a triple fault.
    Shutdown,
    /// It ran into the deadline.
    Overdue,
    /// KVM_RUN failed.
    Refused {
        /// Error number.
        errno: i32,
    },
    /// Another exit, which our guests do not cause.
    Unexpected {
        /// Its name.
        exit: String,
    },
}
