//! Inline extended attributes: a header, then entries of name index, name and value.

use std::collections::BTreeMap;

use thiserror::Error;

use super::format::{XATTR_ENTRY, XATTR_HEADER};

/// Why a file's extended attributes do not fit into an image.
#[derive(Debug, Error)]
pub enum XattrError {
    /// `e_value_size` has 16 bits.
    #[error("the value of extended attribute {name} has {size} bytes, the maximum is 65535")]
    Value {
        /// Name of the attribute.
        name: String,
        /// Bytes of its value.
        size: usize,
    },
    /// `e_name_len` has 8 bits.
    #[error("the name of an extended attribute has {size} bytes, the maximum is 255")]
    Name {
        /// Bytes of the name without the prefix that EROFS abbreviates.
        size: usize,
    },
    /// `i_xattr_icount` has 16 bits.
    #[error("the extended attributes of one file take {size} bytes, the maximum is 262148")]
    Total {
        /// Bytes they would take.
        size: usize,
    },
}

/// Prefixes that have an index (`EROFS_XATTR_INDEX_*`). The two ACL names are whole names: the
/// entry's own name is empty.
const PREFIXES: [(&[u8], u8, bool); 5] = [
    (b"user.", 1, false),
    (b"system.posix_acl_access", 2, true),
    (b"system.posix_acl_default", 3, true),
    (b"trusted.", 4, false),
    (b"security.", 6, false),
];

/// The index of the prefix and the rest of `name`.
fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES.iter().find_map(|(prefix, index, whole)| {
        let rest = name.strip_prefix(*prefix)?;
        (*whole == rest.is_empty()).then_some((*index, rest))
    })
}

/// The full name behind an index, `None` for an unknown index.
pub(super) fn full_name(index: u8, rest: &[u8]) -> Option<Vec<u8>> {
    let (prefix, ..) = PREFIXES.iter().find(|(_, i, _)| *i == index)?;
    Some([*prefix, rest].concat())
}

/// True if EROFS (and so Linux) has a namespace for the attribute `name`.
pub(crate) fn is_storable(name: &[u8]) -> bool {
    split(name).is_some()
}

/// Tells whether an inode can have these attributes.
pub(crate) fn check(xattrs: &BTreeMap<Box<[u8]>, Box<[u8]>>) -> Result<(), XattrError> {
    if xattrs.is_empty() { Ok(()) } else { encode(xattrs).map(drop) }
}

/// The bytes that follow an inode with these attributes; empty if there are none.
pub(super) fn encode(xattrs: &BTreeMap<Box<[u8]>, Box<[u8]>>) -> Result<Vec<u8>, XattrError> {
    let mut out = Vec::new();
    for (name, value) in xattrs {
        let Some((index, rest)) = split(name) else { continue };
        if out.is_empty() {
            out.resize(XATTR_HEADER, 0);
        }
        let name_size =
            u8::try_from(rest.len()).map_err(|_| XattrError::Name { size: rest.len() })?;
        let value_size = u16::try_from(value.len()).map_err(|_| XattrError::Value {
            name: String::from_utf8_lossy(name).into_owned(),
            size: value.len(),
        })?;
        out.extend([name_size, index]);
        out.extend(value_size.to_le_bytes());
        out.extend(rest);
        out.extend(value.iter());
        out.resize(out.len().next_multiple_of(XATTR_ENTRY), 0);
    }
    match count(out.len()) {
        Some(_) => Ok(out),
        None => Err(XattrError::Total { size: out.len() }),
    }
}

/// `i_xattr_icount` for `size` bytes from [`encode`].
pub(super) fn count(size: usize) -> Option<u16> {
    match size {
        0 => Some(0),
        _ => u16::try_from((size - XATTR_HEADER) / XATTR_ENTRY + 1).ok(),
    }
}

/// Bytes behind an inode that says `count`, the inverse of [`count`].
pub(super) fn size(count: u16) -> usize {
    match usize::from(count) {
        0 => 0,
        n => XATTR_HEADER + (n - 1) * XATTR_ENTRY,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(entries: &[(&str, usize)]) -> BTreeMap<Box<[u8]>, Box<[u8]>> {
        entries.iter().map(|(n, len)| (n.as_bytes().into(), vec![7; *len].into())).collect()
    }

    #[test]
    fn encode_nothing_is_empty() {
        assert!(encode(&map(&[])).unwrap().is_empty());
        // A namespace that Linux does not have.
        assert!(encode(&map(&[("com.apple.quarantine", 3)])).unwrap().is_empty());
    }

    #[test]
    fn encode_aligns_entries_and_counts() {
        let bytes = encode(&map(&[("user.a", 3), ("system.posix_acl_access", 4)])).unwrap();
        assert_eq!(bytes.len(), 12 + 8 + 8);
        assert_eq!(bytes[12..16], [0, 2, 4, 0]);
        assert_eq!(bytes[20..25], [1, 1, 3, 0, b'a']);
        assert_eq!(size(count(bytes.len()).unwrap()), bytes.len());
    }

    #[test]
    fn encode_too_large_is_an_error() {
        assert!(matches!(encode(&map(&[("user.a", 65536)])), Err(XattrError::Value { .. })));
        assert!(matches!(
            encode(&map(&[(&format!("user.{}", "n".repeat(256)), 1)])),
            Err(XattrError::Name { size: 256 })
        ));
        let five = ["user.a", "user.b", "user.c", "user.d", "user.e"].map(|n| (n, 65535));
        assert!(matches!(encode(&map(&five)), Err(XattrError::Total { .. })));
    }
}
