//! The mount table that a process sees, `/proc/self/mountinfo` (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Its number, used again when it is gone.
    pub id: u64,
    /// The file system's device.
    pub device: String,
    /// What of the file system is mounted.
    pub root: PathBuf,
    /// Where.
    pub point: PathBuf,
    /// It is told of the mounts below its other copies: it is shared, or a slave.
    pub hears: bool,
}

/// All mounts of a table. Lines that are none are left out.
pub fn parse(table: &[u8]) -> Vec<Mount> {
    table.split(|b| *b == b'\n').filter_map(line).collect()
}

fn line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let _parent = fields.next()?;
    let device = String::from_utf8(fields.next()?.to_vec()).ok()?;
    let (root, point, _options) = (fields.next()?, fields.next()?, fields.next()?);
    let mut tags = fields.take_while(|field| *field != b"-");
    let hears = tags.any(|tag| tag.starts_with(b"shared:") || tag.starts_with(b"master:"));
    Some(Mount { id, device, root: unescape(root), point: unescape(point), hears })
}

/// The mount that a path is in, of a table in the kernel's order: of those at one place the last covers
/// the others. The path has no links in it.
pub fn of<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    let above = mounts.iter().filter(|mount| path.starts_with(&mount.point));
    above.max_by_key(|mount| mount.point.components().count())
}

/// A path in which some bytes are written as octal numbers.
fn unescape(text: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, more)) = rest.split_first() {
        let digits = more
            .get(..3)
            .filter(|d| *first == b'\\' && d.iter().all(|b| (b'0'..=b'7').contains(b)));
        let number = digits.map(|d| d.iter().fold(0u32, |n, b| n * 8 + u32::from(b - b'0')));
        match number.and_then(|n| u8::try_from(n).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &more[3..];
            }
            None => {
                bytes.push(*first);
                rest = more;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_numbers_are_read() {
        assert_eq!(unescape(b"/a\\040b\\134c\\9"), Path::new("/a b\\c\\9"));
    }

    #[test]
    fn what_covers_and_what_hears_is_told_apart() {
        let table = b"20 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n\
                      21 20 0:30 / /a rw - tmpfs tmpfs rw\n\
                      22 21 8:1 /sub\\040dir /a rw shared:1 - ext4 /dev/sda1 rw\n\
                      23 22 0:31 / /a/b rw propagate_from:7 master:2 - tmpfs shared:9 rw\n\
                      nonsense\n";
        let mounts = parse(table);
        assert_eq!(mounts.iter().map(|m| m.id).collect::<Vec<_>>(), [20, 21, 22, 23]);
        assert_eq!(mounts.iter().map(|m| m.hears).collect::<Vec<_>>(), [false, false, true, true]);
        assert_eq!(mounts[2].root, Path::new("/sub dir"));
        assert_eq!(mounts[3].device, "0:31");
        let found = |path: &str| of(&mounts, Path::new(path)).unwrap().id;
        assert_eq!([found("/ab"), found("/a"), found("/a/c"), found("/a/b/c")], [20, 22, 22, 23]);
    }
}
