//! Mount options in the words of fstab, as the OCI specification has them (config.md, "Mounts").

use crate::error::{Error, Result};

/// `MOUNT_ATTR_*` of `mount_setattr(2)`.
pub mod attr {
    /// Read-only.
    pub const RDONLY: u64 = 0x1;
    /// Set-user-id bits are ignored.
    pub const NOSUID: u64 = 0x2;
    /// Device files cannot be opened.
    pub const NODEV: u64 = 0x4;
    /// Nothing can be executed.
    pub const NOEXEC: u64 = 0x8;
    /// The field of access-time modes.
    pub const ATIME_MASK: u64 = 0x70;
    /// Access times are never written.
    pub const NOATIME: u64 = 0x10;
    /// Access times are always written.
    pub const STRICTATIME: u64 = 0x20;
    /// Access times of directories are not written.
    pub const NODIRATIME: u64 = 0x80;
    /// Symbolic links are not followed.
    pub const NOSYMFOLLOW: u64 = 0x20_0000;
}

/// Parsed options.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Options {
    /// A bind mount: the mount only, or with the mounts on it.
    pub bind: Option<Recursive>,
    /// Attributes to set and to clear on the mount.
    pub set: u64,
    /// See `set`.
    pub clear: u64,
    /// The same for the whole tree of mounts ("rro" and its like).
    pub set_recursive: u64,
    /// See `set_recursive`.
    pub clear_recursive: u64,
    /// Propagation changes in order: `MS_*` type, recursive or not.
    pub propagation: Vec<(u64, bool)>,
    /// Change a mount that is there.
    pub remount: bool,
    /// Fill a new tmpfs with what was below it.
    pub copy_up: bool,
    /// What the file system itself is to interpret.
    pub data: Vec<String>,
}

/// Whether a bind mount includes the mounts below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recursive {
    /// Only the one mount.
    No,
    /// All of them.
    Yes,
}

/// Attribute options: name, bits to set, bits to clear. With an "r" before, they are recursive.
const ATTRIBUTES: &[(&str, u64, u64)] = &[
    ("ro", attr::RDONLY, 0),
    ("rw", 0, attr::RDONLY),
    ("nosuid", attr::NOSUID, 0),
    ("suid", 0, attr::NOSUID),
    ("nodev", attr::NODEV, 0),
    ("dev", 0, attr::NODEV),
    ("noexec", attr::NOEXEC, 0),
    ("exec", 0, attr::NOEXEC),
    ("noatime", attr::NOATIME, attr::ATIME_MASK),
    ("atime", 0, attr::ATIME_MASK),
    ("relatime", 0, attr::ATIME_MASK),
    ("norelatime", 0, attr::ATIME_MASK),
    ("strictatime", attr::STRICTATIME, attr::ATIME_MASK),
    ("nostrictatime", 0, attr::ATIME_MASK),
    ("nodiratime", attr::NODIRATIME, 0),
    ("diratime", 0, attr::NODIRATIME),
    ("nosymfollow", attr::NOSYMFOLLOW, 0),
    ("symfollow", 0, attr::NOSYMFOLLOW),
];

const PROPAGATION: &[(&str, u64)] = &[
    ("private", libc::MS_PRIVATE),
    ("shared", libc::MS_SHARED),
    ("slave", libc::MS_SLAVE),
    ("unbindable", libc::MS_UNBINDABLE),
];

/// The propagation type of a word such as "rslave", and whether it is recursive.
pub fn propagation(word: &str) -> Option<(u64, bool)> {
    let find = |word: &str| PROPAGATION.iter().find(|(name, _)| *name == word).map(|(_, t)| *t);
    find(word)
        .map(|t| (t, false))
        .or_else(|| word.strip_prefix('r').and_then(find).map(|t| (t, true)))
}

fn attribute(word: &str) -> Option<(u64, u64)> {
    ATTRIBUTES.iter().find(|(name, ..)| *name == word).map(|(_, set, clear)| (*set, *clear))
}

fn apply(set: &mut u64, clear: &mut u64, (add, remove): (u64, u64)) {
    *set = (*set & !remove) | add;
    *clear = (*clear & !add) | remove;
}

/// Parses the option list of one mount.
///
/// # Errors
/// For options that would change who may do what and are not implemented.
pub fn parse<'a>(options: impl IntoIterator<Item = &'a str>) -> Result<Options> {
    let mut parsed = Options::default();
    for option in options {
        if let Some(bits) = attribute(option) {
            apply(&mut parsed.set, &mut parsed.clear, bits);
        } else if let Some(bits) = option.strip_prefix('r').and_then(attribute) {
            apply(&mut parsed.set_recursive, &mut parsed.clear_recursive, bits);
        } else if let Some(change) = propagation(option) {
            parsed.propagation.push(change);
        } else {
            match option {
                "bind" => parsed.bind = Some(parsed.bind.unwrap_or(Recursive::No)),
                "rbind" => parsed.bind = Some(Recursive::Yes),
                "tmpcopyup" => parsed.copy_up = true,
                // The defaults, and words that only mean something to mount(8).
                "" | "defaults" | "async" | "loud" | "silent" | "nomand" | "nolazytime"
                | "noiversion" | "_netdev" => {}
                "idmap" | "ridmap" => {
                    return Err(Error::Unsupported(
                        "id-mapped mounts (option \"idmap\") are not supported".into(),
                    ));
                }
                "remount" => parsed.remount = true,
                data => parsed.data.push(data.into()),
            }
        }
    }
    Ok(parsed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_later_words_win() {
        let options = parse(["ro", "nosuid", "noexec", "exec", "rw"]).unwrap();
        assert_eq!((options.set, options.clear), (attr::NOSUID, attr::RDONLY | attr::NOEXEC));
        let options = parse(["strictatime", "noatime"]).unwrap();
        assert_eq!(options.set, attr::NOATIME);
        assert_ne!(options.clear & attr::ATIME_MASK, 0);
    }

    #[test]
    fn recursive_words_are_kept_apart() {
        let options = parse(["rbind", "rro", "rslave", "ro"]).unwrap();
        assert_eq!(options.bind, Some(Recursive::Yes));
        assert_eq!((options.set, options.set_recursive), (attr::RDONLY, attr::RDONLY));
        assert_eq!(options.propagation, [(libc::MS_SLAVE, true)]);
        assert_eq!(parse(["relatime"]).unwrap().set_recursive, 0, "not recursive \"elatime\"");
    }

    #[test]
    fn rbind_stays_recursive_beside_bind() {
        assert_eq!(parse(["rbind", "bind"]).unwrap().bind, Some(Recursive::Yes));
        assert_eq!(parse(["bind"]).unwrap().bind, Some(Recursive::No));
    }

    #[test]
    fn unknown_words_are_the_file_systems() {
        let options = parse(["size=64m", "mode=1777", "defaults", "nr_inodes=5"]).unwrap();
        assert_eq!(options.data, ["size=64m", "mode=1777", "nr_inodes=5"]);
    }

    #[test]
    fn id_mapped_mounts_are_refused_by_name() {
        assert!(matches!(parse(["idmap"]), Err(Error::Unsupported(m)) if m.contains("idmap")));
    }

    #[test]
    fn propagation_words() {
        assert_eq!(propagation("rshared"), Some((libc::MS_SHARED, true)));
        assert_eq!(propagation("private"), Some((libc::MS_PRIVATE, false)));
        assert_eq!(propagation("bogus"), None);
    }
}
