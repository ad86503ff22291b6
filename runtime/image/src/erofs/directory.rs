//! Directory data: blocks of fixed-size entries, each block followed by its own names.

use super::format::{BLOCK, DIRENT};

/// What a name refers to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    pub(super) nid: u64,
    pub(super) file_type: u8,
}

/// The entries of a directory with `.` and `..` in their places among them: a name may begin with a
/// byte below a full stop.
pub(super) fn sorted<'a, T>(
    children: impl Iterator<Item = (&'a [u8], T)>,
    own: T,
    parent: T,
) -> Vec<(&'a [u8], T)> {
    let dots: [(&'a [u8], T); 2] = [(b".", own), (b"..", parent)];
    let mut entries: Vec<_> = dots.into_iter().chain(children).collect();
    entries.sort_unstable_by_key(|(name, _)| *name);
    entries
}

/// Bytes of the directory with these name lengths, in the order in which they are written.
pub(super) fn size(lengths: impl Iterator<Item = usize>) -> u64 {
    let mut whole = 0;
    let mut used = 0;
    for length in lengths {
        if used + DIRENT + length > BLOCK {
            whole += BLOCK as u64;
            used = 0;
        }
        used += DIRENT + length;
    }
    whole + used as u64
}

/// The data of a directory with `entries` from [`sorted`] (the kernel searches by halving).
pub(super) fn encode(entries: &[(&[u8], Target)]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = entries;
    while !rest.is_empty() {
        let mut used = 0;
        let count = rest
            .iter()
            .take_while(|(name, _)| {
                used += DIRENT + name.len();
                used <= BLOCK
            })
            .count();
        let (block, more) = rest.split_at(count);
        // The bytes behind the last name of a block that another follows are padding, which the
        // reader recognises by its NUL.
        out.resize(out.len().next_multiple_of(BLOCK), 0);
        let mut name_offset = block.len() * DIRENT;
        for (name, target) in block {
            out.extend(target.nid.to_le_bytes());
            // Below BLOCK by construction.
            out.extend((name_offset as u16).to_le_bytes());
            out.extend([target.file_type, 0]);
            name_offset += name.len();
        }
        block.iter().for_each(|(name, _)| out.extend(*name));
        rest = more;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encoded_size_is_the_predicted_one() {
        for count in [1, 2, 14, 15, 16, 300, 5000] {
            let names: Vec<_> =
                (0..count).map(|i| format!("{i:08}{}", "x".repeat(i % 248))).collect();
            let entries: Vec<_> = names
                .iter()
                .map(|name| (name.as_bytes(), Target { nid: 9, file_type: 1 }))
                .collect();
            let predicted = size(names.iter().map(String::len));
            assert_eq!(encode(&entries).len() as u64, predicted, "{count} entries");
        }
    }

    #[test]
    fn first_name_offset_gives_the_number_of_entries() {
        let target = Target { nid: 2, file_type: 2 };
        let names = [b"+".as_slice(), b"a"].map(|name| (name, target));
        let bytes = encode(&sorted(names.into_iter(), target, target));
        assert_eq!(bytes[8..10], 48u16.to_le_bytes());
        assert_eq!(&bytes[48..], b"+...a");
    }
}
