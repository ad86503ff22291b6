//! One 512-byte header.

use super::sparse::{self, Segment};
use super::{BLOCK, EntryKind, TarError, text};
use crate::tree::Time;

/// What a type flag stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Entry(EntryKind),
    /// `S`: a file with the sparse map in the header.
    GnuSparse,
    /// `L`: the next entry's path.
    LongName,
    /// `K`: the next entry's link target.
    LongLink,
    /// `x`: records for the next entry.
    Pax,
    /// `g`: records for all entries.
    PaxGlobal,
    Other(u8),
}

/// Which fields lie behind the first 257 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    V7,
    Ustar,
    Star,
    Gnu,
}

/// A header whose checksum is right.
pub(super) struct RawHeader {
    block: [u8; BLOCK],
    format: Format,
}

impl RawHeader {
    pub(super) fn new(block: [u8; BLOCK], position: u64) -> Result<Self, TarError> {
        let wrong = || TarError::Checksum { position };
        let stated = number(&block[148..156]).ok_or_else(wrong)?;
        // The sum counts the checksum field as spaces. Some old writers summed signed bytes.
        let counted = |i: usize| if (148..156).contains(&i) { b' ' } else { block[i] };
        let unsigned: i64 = (0..BLOCK).map(|i| i64::from(counted(i))).sum();
        let signed: i64 = (0..BLOCK).map(|i| i64::from(counted(i) as i8)).sum();
        if stated != unsigned && stated != signed {
            return Err(wrong());
        }
        let format = match &block[257..265] {
            b"ustar  \0" => Format::Gnu,
            magic if magic.starts_with(b"ustar\0") && block[508..] == *b"tar\0" => Format::Star,
            magic if magic.starts_with(b"ustar\0") => Format::Ustar,
            _ => Format::V7,
        };
        Ok(Self { block, format })
    }

    pub(super) fn kind(&self) -> Kind {
        match self.block[156] {
            // Contiguous files (`7`) are files everywhere else.
            b'0' | 0 | b'7' => Kind::Entry(EntryKind::File),
            b'1' => Kind::Entry(EntryKind::HardLink),
            b'2' => Kind::Entry(EntryKind::Symlink),
            b'3' => Kind::Entry(EntryKind::Character),
            b'4' => Kind::Entry(EntryKind::Block),
            b'5' => Kind::Entry(EntryKind::Directory),
            b'6' => Kind::Entry(EntryKind::Fifo),
            b'S' if self.format == Format::Gnu => Kind::GnuSparse,
            b'L' => Kind::LongName,
            b'K' => Kind::LongLink,
            b'x' | b'X' => Kind::Pax,
            b'g' => Kind::PaxGlobal,
            other => Kind::Other(other),
        }
    }

    pub(super) fn path(&self) -> Vec<u8> {
        let name = text(self.block[..100].to_vec());
        let prefix = match self.format {
            Format::Ustar => text(self.block[345..500].to_vec()),
            Format::Star => text(self.block[345..476].to_vec()),
            Format::V7 | Format::Gnu => Vec::new(),
        };
        if prefix.is_empty() { name } else { [prefix, name].join(&b'/') }
    }

    pub(super) fn link(&self) -> Vec<u8> {
        text(self.block[157..257].to_vec())
    }

    pub(super) fn mode(&self) -> Result<u32, TarError> {
        let mode = number(&self.block[100..108]).ok_or(TarError::Number { field: "mode" })?;
        // Type bits, which some writers add, say nothing that the type flag does not.
        Ok((mode & 0o7777) as u32)
    }

    pub(super) fn uid(&self) -> Result<u64, TarError> {
        self.positive(108..116, "uid")
    }

    pub(super) fn gid(&self) -> Result<u64, TarError> {
        self.positive(116..124, "gid")
    }

    pub(super) fn size(&self) -> Result<u64, TarError> {
        self.positive(124..136, "size")
    }

    pub(super) fn mtime(&self) -> Result<Time, TarError> {
        let seconds = number(&self.block[136..148]).ok_or(TarError::Number { field: "mtime" })?;
        Ok(Time { seconds, nanos: 0 })
    }

    pub(super) fn device(&self) -> Result<(u64, u64), TarError> {
        match self.format {
            Format::V7 => Ok((0, 0)),
            _ => Ok((
                self.positive(329..337, "device major number")?,
                self.positive(337..345, "device minor number")?,
            )),
        }
    }

    /// The first four parts of a GNU sparse map.
    pub(super) fn sparse_map(&self) -> Result<Vec<Segment>, TarError> {
        let mut map = Vec::new();
        sparse::parse_gnu_entries(&self.block[386..482], &mut map)?;
        Ok(map)
    }

    /// True if blocks with more of the map follow.
    pub(super) fn sparse_continues(&self) -> bool {
        self.block[482] != 0
    }

    /// Size of a GNU sparse file with its holes.
    pub(super) fn real_size(&self) -> Result<u64, TarError> {
        self.positive(483..495, "size of a sparse file")
    }

    fn positive(&self, field: std::ops::Range<usize>, name: &'static str) -> Result<u64, TarError> {
        positive(&self.block[field], name)
    }
}

/// A field that cannot be negative.
pub(super) fn positive(field: &[u8], name: &'static str) -> Result<u64, TarError> {
    number(field).and_then(|n| u64::try_from(n).ok()).ok_or(TarError::Number { field: name })
}

/// A number field: octal digits between spaces and NULs, or, with the first bit set, binary in
/// two's complement (GNU).
fn number(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 != 0 {
        // The first bit is the mark, the second the sign.
        let start = if first & 0x40 != 0 { -1 } else { 0 };
        let first = i128::from(first & 0x7f) | if start < 0 { !0x7f } else { 0 };
        let value = field[1..].iter().try_fold(first, |value: i128, byte| {
            value.checked_mul(256)?.checked_add(i128::from(*byte))
        })?;
        return i64::try_from(value).ok();
    }
    let blank = |byte: &u8| matches!(byte, b' ' | 0);
    let digits = field.iter().skip_while(|byte| blank(byte)).take_while(|byte| !blank(byte));
    digits.into_iter().try_fold(0i64, |value, digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(digit - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_reads_octal_and_binary() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   644 \0"), Some(0o644));
        assert_eq!(number(b"77777777777"), Some(0o77777777777));
        assert_eq!(number(&[0; 8]), Some(0));
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0]), Some(8 << 30));
        assert_eq!(number(&[0xff; 12]), Some(-1));
        assert_eq!(number(b"12345678"), None);
        assert_eq!(number(b"-1     \0"), None);
        assert_eq!(number(&[0x80, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]), None);
    }
}
