//! The processor that a guest sees: CPUID, the same on every engine.
//!
//! The vendor is the host's, because user code picks code paths by it; family and model are
//! neutral ones with which Linux applies no workaround for a particular processor (the host's own
//! might cost a division at every return to user space, as a Zen 1 identity does):
//!
//! * AMD: family 19h, model 30h;
//! * Intel: family 6, model FFh;
//!
//! models that nobody knows, so that feature bits alone decide what a program uses.
//!
//! Feature bits are the table in [`features`]: what every engine can do, cut down to the host, to the
//! level that the user chose ([`CpuModel`]), and to what an engine says of itself.

pub mod features;
pub mod host;
mod lookup;
mod paravirt;
mod table;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use features::Level;
pub use lookup::{Answer, answer, incompatible, lacking, lookup, missing};
pub use table::{CpuidTable, PHYSICAL_BITS, Vendor};

/// How much of the host's processor a guest sees.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum CpuModel {
    /// Nothing beyond the level x86-64-v2 of the System V ABI but cryptography and randomness.
    V2,
    /// Also what belongs to x86-64-v3 (AVX2, BMI, FMA), as far as the host has it.
    #[default]
    V3,
    /// Everything that the host and its KVM have. States cannot go on anywhere else.
    Host,
}

impl CpuModel {
    /// Whether a state of this model may go on with another engine or on another host.
    pub fn is_portable(self) -> bool {
        self != Self::Host
    }

    /// Whether features of `level` may be shown.
    fn includes(self, level: Level) -> bool {
        self != Self::V2 || level == Level::V2
    }
}

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V2 => "v2",
            Self::V3 => "v3",
            Self::Host => "host",
        })
    }
}

/// No such model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no processor model {0:?}: choose v2, v3 or host")]
pub struct UnknownModel(pub String);

impl FromStr for CpuModel {
    type Err = UnknownModel;

    fn from_str(text: &str) -> Result<Self, UnknownModel> {
        match text {
            "v2" => Ok(Self::V2),
            "v3" => Ok(Self::V3),
            "host" => Ok(Self::Host),
            _ => Err(UnknownModel(text.to_owned())),
        }
    }
}
