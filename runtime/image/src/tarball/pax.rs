//! PAX extended headers: records of `LENGTH KEY=VALUE\n`.

use super::TarError;
use super::sparse::{self, Segment};
use crate::tree::Time;

/// Prefix of the records that carry extended attributes.
const XATTR: &[u8] = b"SCHILY.xattr.";

/// The records that matter, of one header.
#[derive(Debug, Default)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<Time>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Name of a sparse file; its `path` is a placeholder.
    pub(super) sparse_name: Option<Vec<u8>>,
    /// Size of a sparse file with its holes.
    pub(super) sparse_size: Option<u64>,
    /// Sparse format 1.0: the map stands before the contents.
    pub(super) sparse_in_data: bool,
    /// Sparse format 0.1: `OFFSET,SIZE,OFFSET,SIZE...`.
    sparse_list: Option<Vec<u8>>,
    /// Sparse format 0.0: a pair of records for each part.
    sparse_pairs: Vec<u64>,
}

impl Pax {
    pub(super) fn parse(mut bytes: &[u8]) -> Result<Self, TarError> {
        let mut pax = Self::default();
        while !bytes.is_empty() {
            // Some writers pad the records.
            if bytes.iter().all(|byte| *byte == 0) {
                break;
            }
            let space = bytes.iter().position(|byte| *byte == b' ').ok_or(TarError::Pax)?;
            let length = decimal(&bytes[..space]).ok_or(TarError::Pax)?;
            let length = usize::try_from(length).map_err(|_| TarError::Pax)?;
            let record = bytes.get(space + 1..length).ok_or(TarError::Pax)?;
            let record = record.strip_suffix(b"\n").ok_or(TarError::Pax)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or(TarError::Pax)?;
            pax.take(&record[..equals], &record[equals + 1..])?;
            bytes = &bytes[length..];
        }
        Ok(pax)
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        let number = |field| decimal(value).ok_or(TarError::Number { field });
        match key {
            // An empty value takes a record of a global header back.
            b"path" | b"linkpath" | b"size" | b"uid" | b"gid" | b"mtime" if value.is_empty() => {}
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(number("size")?),
            b"uid" => self.uid = Some(number("uid")?),
            b"gid" => self.gid = Some(number("gid")?),
            b"mtime" => self.mtime = Some(time(value).ok_or(TarError::Number { field: "mtime" })?),
            b"GNU.sparse.name" => self.sparse_name = Some(value.to_vec()),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
                self.sparse_size = Some(number("size of a sparse file")?);
            }
            b"GNU.sparse.major" => self.sparse_in_data = value == b"1",
            b"GNU.sparse.map" => self.sparse_list = Some(value.to_vec()),
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                let is_offset = key == b"GNU.sparse.offset";
                if is_offset != self.sparse_pairs.len().is_multiple_of(2) {
                    return Err(TarError::Sparse("offsets and sizes do not alternate"));
                }
                self.sparse_pairs.push(number("sparse map")?);
            }
            _ => {
                if let Some(name) = key.strip_prefix(XATTR) {
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        Ok(())
    }

    /// The map of sparse formats 0.0 and 0.1.
    pub(super) fn sparse_map(&self) -> Result<Option<Vec<Segment>>, TarError> {
        let numbers = match &self.sparse_list {
            Some(list) if list.is_empty() => Vec::new(),
            Some(list) => list
                .split(|byte| *byte == b',')
                .map(|part| decimal(part).ok_or(TarError::Sparse("no number")))
                .collect::<Result<_, _>>()?,
            None if self.sparse_pairs.is_empty() => return Ok(None),
            None => self.sparse_pairs.clone(),
        };
        sparse::pairs(&numbers).map(Some)
    }
}

/// Decimal digits and nothing else.
pub(super) fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u64, |value, digit| match digit {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

/// Seconds with a sign and a fraction of any length.
fn time(text: &[u8]) -> Option<Time> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (whole, fraction) = match text.iter().position(|byte| *byte == b'.') {
        Some(dot) => (&text[..dot], &text[dot + 1..]),
        None => (text, &b""[..]),
    };
    let seconds = i64::try_from(decimal(whole)?).ok()?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digit = |i: usize| u32::from(fraction.get(i).map_or(0, |digit| digit - b'0'));
    let nanos = (0..9).fold(0, |nanos, i| nanos * 10 + digit(i));
    Some(match (negative, nanos) {
        (false, _) => Time { seconds, nanos },
        (true, 0) => Time { seconds: -seconds, nanos },
        // -1.25 s is 0.75 s after second -2.
        (true, _) => Time { seconds: -seconds - 1, nanos: 1_000_000_000 - nanos },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_keeps_binary_values() {
        let pax = Pax::parse(b"22 SCHILY.xattr.a=x\n\0\n12 path=p=q\n").unwrap();
        assert_eq!(pax.xattrs, [(b"a".to_vec(), b"x\n\0".to_vec())]);
        assert_eq!(pax.path.unwrap(), b"p=q");
    }

    #[test]
    fn parse_malformed_record_is_an_error() {
        for bytes in [
            &b"5 a=b\n"[..],
            b"7 a=b\n",
            b"x a=b\n",
            b"6 ab\n",
            b"99999999999999999999 a=b\n",
            b"1 ",
        ] {
            assert!(Pax::parse(bytes).is_err(), "{}", bytes.escape_ascii());
        }
        assert!(Pax::parse(b"6 a=b\n\0\0\0").is_ok());
    }

    #[test]
    fn time_reads_fractions_and_signs() {
        let time = |text: &str| time(text.as_bytes()).map(|t| (t.seconds, t.nanos));
        assert_eq!(time("12"), Some((12, 0)));
        assert_eq!(time("12.5"), Some((12, 500_000_000)));
        assert_eq!(time("0.1234567891"), Some((0, 123_456_789)));
        assert_eq!(time("-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time("-3"), Some((-3, 0)));
        assert_eq!(time("1.x"), None);
        assert_eq!(time(""), None);
    }
}
