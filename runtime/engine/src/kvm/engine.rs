//! The engine as the machine above sees it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvm_ioctls::Kvm;

use super::sys;
use super::vm::KvmVm;
use crate::probe::needs::{API_VERSION, unmet};
use crate::{Engine, Error, Result, Vm, VmConfig};

/// vCPUs of one machine, at most: what the emulation engine has, since states go both ways.
pub const MAX_VCPUS: u32 = 32;

const NAME: &str = "kvm";

/// Hardware virtualization through KVM.
#[derive(Debug)]
pub struct KvmEngine {
    kvm: Kvm,
}

impl KvmEngine {
    /// The engine over `/dev/kvm`.
    ///
    /// Whether that KVM is fast enough to be of use is the [probe](crate::probe)'s business.
    ///
    /// # Errors
    /// [`Error::Unusable`]: no device, no permission, another version of the interface, or extensions
    /// missing.
    pub fn new() -> Result<Self> {
        Self::over(Kvm::new().map_err(|e| unusable(not_opened(&e.into())))?)
    }

    /// The engine over an open `/dev/kvm`, for a process that may open nothing.
    ///
    /// # Errors
    /// As for [`KvmEngine::new`].
    pub fn from_device(device: OwnedFd) -> Result<Self> {
        Self::over(sys::kvm_from(device))
    }

    fn over(kvm: Kvm) -> Result<Self> {
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(unusable(format!(
                "its interface has version {version}, {API_VERSION} is needed"
            )));
        }
        let missing: Vec<&str> = unmet(&kvm).iter().map(|need| need.name).collect();
        if !missing.is_empty() {
            return Err(unusable(format!(
                "this host's KVM lacks {}; Linux 5.10 or later has them all",
                missing.join(", ")
            )));
        }
        sys::install_kick_handler()
            .map_err(|source| Error::Host { what: "install a signal handler", source })?;
        Ok(Self { kvm })
    }
}

impl Engine for KvmEngine {
    fn name(&self) -> &'static str {
        NAME
    }

    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn Vm>> {
        if config.vcpus == 0 || config.vcpus > MAX_VCPUS {
            return Err(Error::TooManyVcpus { wanted: config.vcpus, max: MAX_VCPUS });
        }
        Ok(Arc::new(KvmVm::new(&self.kvm, config)?))
    }
}

fn unusable(reason: String) -> Error {
    Error::Unusable { engine: NAME, reason }
}

fn not_opened(error: &io::Error) -> String {
    let remedy = match error.kind() {
        io::ErrorKind::NotFound => "there is none: `mvm doctor` tells why",
        io::ErrorKind::PermissionDenied => {
            "become a member of the group that owns it, or let `mvm doctor` tell more"
        }
        _ => "`mvm doctor` tells more",
    };
    format!("/dev/kvm does not open: {error}; {remedy}")
}
