//! How the emulation engine works.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Error;

/// The emulation engine's part of a machine's configuration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmuConfig {
    /// How guest code is run.
    #[serde(default)]
    pub tier: EmuTier,
    /// Frequency of the host's time-stamp counter in kHz, where it is known already: finding it out
    /// may take 10 ms.
    #[serde(default)]
    pub tsc_khz: Option<u64>,
}

/// How the emulation engine runs guest code.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EmuTier {
    /// Interpreted.
    Interp,
    /// Translated, as far as it is 64-bit code, and else interpreted.
    #[default]
    Jit,
}

impl From<EmuTier> for mvm_emu::Tier {
    fn from(tier: EmuTier) -> Self {
        match tier {
            EmuTier::Interp => Self::Interpreter,
            EmuTier::Jit => Self::Translator,
        }
    }
}

impl fmt::Display for EmuTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EmuTier::Interp => "interp",
            EmuTier::Jit => "jit",
        })
    }
}

impl std::str::FromStr for EmuTier {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "interp" => Ok(EmuTier::Interp),
            "jit" => Ok(EmuTier::Jit),
            _ => Err(Error::Tier { name: text.to_owned() }),
        }
    }
}
