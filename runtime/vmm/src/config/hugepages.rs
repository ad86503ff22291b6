//! Huge pages for guest memory.

use std::fmt;
use std::str::FromStr;

use mvm_memory::Backing;
use serde::{Deserialize, Serialize};

/// The host's pages that guest memory is made of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// Small ones.
    #[default]
    #[serde(rename = "none")]
    None,
    /// Transparent huge pages, where the host's kernel finds some.
    #[serde(rename = "thp")]
    Transparent,
    /// Pages of 2 MiB from the host's pool.
    #[serde(rename = "2m")]
    Pool,
}

impl From<HugePages> for Backing {
    fn from(pages: HugePages) -> Self {
        match pages {
            HugePages::None => Self::Small,
            HugePages::Transparent => Self::Transparent,
            HugePages::Pool => Self::Huge,
        }
    }
}

impl fmt::Display for HugePages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Transparent => "thp",
            Self::Pool => "2m",
        })
    }
}

/// No such pages.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there are no huge pages {0:?}: choose none, thp or 2m")]
pub struct UnknownHugePages(pub String);

impl FromStr for HugePages {
    type Err = UnknownHugePages;

    fn from_str(text: &str) -> Result<Self, UnknownHugePages> {
        match text {
            "none" => Ok(Self::None),
            "thp" => Ok(Self::Transparent),
            // As others write it.
            "2m" | "2M" => Ok(Self::Pool),
            _ => Err(UnknownHugePages(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_same_everywhere() {
        for name in ["none", "thp", "2m"] {
            let pages: HugePages = name.parse().unwrap();
            assert_eq!(pages.to_string(), name);
            assert_eq!(serde_json::to_value(pages).unwrap(), name);
        }
        assert_eq!("2M".parse(), Ok(HugePages::Pool));
        assert!("1g".parse::<HugePages>().unwrap_err().to_string().contains("none, thp or 2m"));
    }
}
