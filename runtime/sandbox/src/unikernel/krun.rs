//! Ordinary images that say how large a machine they want, in krun's keys.

use mvm_vmm::layout;

use super::{Error, Packaging};

const CPUS: &str = "krun.cpus";
const RAM: &str = "krun.ram_mib";

/// A machine's size, as far as an image asks for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Size {
    /// Number of vCPUs.
    pub cpus: Option<u32>,
    /// Memory in bytes.
    pub memory: Option<u64>,
}

pub(super) fn size(packaging: &Packaging<'_>) -> Result<Size, Error> {
    let cpus = number(packaging, CPUS, 1, u64::from(layout::MAX_VCPUS))?;
    let mib = number(packaging, RAM, layout::MIN_MEMORY >> 20, layout::MAX_MEMORY >> 20)?;
    let cpus = cpus.and_then(|n| u32::try_from(n).ok());
    Ok(Size { cpus, memory: mib.map(|mib| mib << 20) })
}

fn number(
    packaging: &Packaging<'_>,
    key: &str,
    least: u64,
    most: u64,
) -> Result<Option<u64>, Error> {
    let places = [
        ("annotations (--annotation)", packaging.annotations),
        ("manifest's annotations", packaging.manifest),
        ("labels", packaging.labels),
    ];
    let found = places.into_iter().find_map(|(place, pairs)| Some((place, pairs.get(key)?)));
    let Some((place, value)) = found else { return Ok(None) };
    let digits = (1..=12).contains(&value.len()) && value.bytes().all(|b| b.is_ascii_digit());
    match value.parse::<u64>().ok().filter(|n| digits && (least..=most).contains(n)) {
        Some(number) => Ok(Some(number)),
        None => {
            let shown: String = value.chars().take(20).collect();
            let reason = format!("{shown:?} is no number from {least} to {most}");
            Err(Error::Value { key: key.into(), place, reason })
        }
    }
}
