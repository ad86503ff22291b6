//! Which of the platforms of an image runs here.

use std::fmt;

use thiserror::Error;

/// Operating system names by which unikernel builders say which monitor a kernel was built for.
/// All of them run on the same virtual hardware here. Order is preference: the first ones have the
/// fewest expectations of a machine.
const UNIKERNEL_SYSTEMS: [&str; 4] = ["firecracker", "fc", "kraftcloud", "qemu"];

/// What an image is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// Operating system, `linux` for containers.
    pub os: String,
    /// Architecture in Go's terms: `amd64`, `arm64`.
    pub architecture: String,
    /// A level of the architecture: `v3`.
    pub variant: Option<String>,
}

impl Platform {
    /// A platform from the texts of a descriptor or configuration.
    pub fn new(os: &str, architecture: &str, variant: Option<&str>) -> Self {
        Self {
            os: os.to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.filter(|v| !v.is_empty()).map(str::to_owned),
        }
    }

    /// True for a kernel of its own instead of a Linux root file system.
    pub fn is_unikernel(&self) -> bool {
        UNIKERNEL_SYSTEMS.contains(&self.os.as_str())
    }

    /// How well the platform suits this host, lower is better; `None` if it does not run here.
    pub fn rank(&self) -> Option<u32> {
        if !matches!(self.architecture.as_str(), "amd64" | "x86_64") {
            return None;
        }
        // Plain before special; the guest's processor has everything up to v3.
        let variant = match self.variant.as_deref() {
            None | Some("v1") => 0,
            Some("v2") => 1,
            Some("v3") => 2,
            Some(_) => return None,
        };
        let system = match self.os.as_str() {
            "linux" => 0,
            os => 1 + UNIKERNEL_SYSTEMS.iter().position(|name| *name == os)? as u32,
        };
        Some(system * 4 + variant)
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

/// No platform of the image runs here.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "the image is for {}; this host runs linux/amd64 (fetch that one with \
     `skopeo --override-os linux --override-arch amd64 copy ...`, if the image has it)",
    list(.available)
)]
pub struct PlatformError {
    /// What the image is for.
    pub available: Vec<Platform>,
}

fn list(platforms: &[Platform]) -> String {
    let names: Vec<_> = platforms.iter().map(Platform::to_string).collect();
    match names.is_empty() {
        true => "no platform at all".to_owned(),
        false => names.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_linux_comes_before_levels_and_unikernels() {
        let rank = |os, arch, variant| Platform::new(os, arch, variant).rank();
        let plain = rank("linux", "amd64", None);
        assert_eq!(rank("linux", "amd64", Some("")), plain);
        assert!(plain < rank("linux", "amd64", Some("v3")));
        assert!(rank("linux", "amd64", Some("v3")) < rank("fc", "x86_64", None));
        assert!(rank("fc", "x86_64", None) < rank("qemu", "x86_64", None));
    }

    #[test]
    fn other_machines_are_refused_by_name() {
        for (os, arch, variant) in [
            ("linux", "arm64", Some("v8")),
            ("windows", "amd64", None),
            ("linux", "amd64", Some("v4")),
            ("unknown", "unknown", None),
        ] {
            assert_eq!(Platform::new(os, arch, variant).rank(), None);
        }
        let arm = Platform::new("linux", "arm64", Some("v8"));
        let error = PlatformError { available: vec![arm] }.to_string();
        assert!(error.starts_with("the image is for linux/arm64/v8; this host runs linux/amd64"));
    }
}
