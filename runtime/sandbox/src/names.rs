//! Identifiers and made-up names.

use std::fs::File;
use std::io::{self, Read};

const QUALITIES: [&str; 32] = [
    "amber", "brave", "brisk", "calm", "clear", "cosy", "deft", "eager", "early", "fair", "fleet",
    "fond", "gentle", "glad", "grand", "happy", "keen", "kind", "light", "lively", "lucid",
    "mellow", "merry", "neat", "nimble", "proud", "quick", "quiet", "sharp", "sunny", "swift",
    "vivid",
];

const THINGS: [&str; 32] = [
    "acorn", "alder", "badger", "beacon", "birch", "brook", "cedar", "comet", "crane", "dune",
    "falcon", "fern", "finch", "harbor", "hazel", "heron", "island", "juniper", "lark", "linden",
    "maple", "marten", "meadow", "otter", "pebble", "pine", "raven", "reef", "sparrow", "spruce",
    "thistle", "willow",
];

/// Twelve random hexadecimal digits.
pub fn random_id() -> io::Result<String> {
    let mut bytes = [0; 6];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

/// A name that is easier to say than the id it is made from.
pub fn made_up(id: &str) -> String {
    let number = u64::from_str_radix(id, 16).unwrap_or_default();
    let pick = |list: &[&'static str; 32], shift: u32| list[(number >> shift) as usize % 32];
    format!("{}-{}", pick(&QUALITIES, 0), pick(&THINGS, 5))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_differ_and_make_valid_names() {
        let (a, b) = (random_id().unwrap(), random_id().unwrap());
        assert_ne!(a, b);
        assert_eq!(a.len(), 12);
        crate::registry::check_name(&made_up(&a)).unwrap();
    }
}
