//! Sparse files: maps of the parts that are stored, and a reader that puts the holes back.

use std::io::{self, Read};

use super::header::positive;
use super::pax::decimal;
use super::{BLOCK, TarError};

/// A stored part of a sparse file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) offset: u64,
    pub(super) size: u64,
}

/// Offset and size, 12 bytes each, in the old GNU format.
const GNU_ENTRY: usize = 24;
/// Entries of a continuation block; the byte behind them says whether another follows.
const GNU_ENTRIES: usize = 21;

/// Adds the entries of an old GNU map up to the first empty one.
pub(super) fn parse_gnu_entries(bytes: &[u8], map: &mut Vec<Segment>) -> Result<(), TarError> {
    for entry in bytes.chunks_exact(GNU_ENTRY) {
        if entry[0] == 0 {
            break;
        }
        map.push(Segment {
            offset: positive(&entry[..12], "sparse map")?,
            size: positive(&entry[12..], "sparse map")?,
        });
    }
    Ok(())
}

/// Adds a continuation block; true if another one follows.
pub(super) fn extend_gnu_map(
    block: &[u8; BLOCK],
    map: &mut Vec<Segment>,
) -> Result<bool, TarError> {
    parse_gnu_entries(&block[..GNU_ENTRIES * GNU_ENTRY], map)?;
    Ok(block[GNU_ENTRIES * GNU_ENTRY] != 0)
}

/// A map from alternating offsets and sizes.
pub(super) fn pairs(numbers: &[u64]) -> Result<Vec<Segment>, TarError> {
    if !numbers.len().is_multiple_of(2) {
        return Err(TarError::Sparse("an offset without a size"));
    }
    Ok(numbers.chunks_exact(2).map(|pair| Segment { offset: pair[0], size: pair[1] }).collect())
}

/// Reads the map of format 1.0, which precedes the contents: decimal numbers, one a line, the
/// first one their count, padded to a block.
pub(super) fn read_map(input: &mut dyn Read, limit: u64) -> Result<Vec<Segment>, TarError> {
    let mut numbers: Vec<u64> = Vec::new();
    let mut digits = Vec::new();
    let mut wanted = 1;
    let mut left = limit;
    while numbers.len() < wanted {
        let mut block = [0; BLOCK];
        input.read_exact(&mut block).map_err(|e| super::cut(e, "a sparse map"))?;
        left = left.checked_sub(BLOCK as u64).ok_or(TarError::Sparse("too large"))?;
        for byte in block {
            if numbers.len() == wanted {
                break;
            }
            if byte != b'\n' {
                digits.push(byte);
                continue;
            }
            let number = decimal(&digits).ok_or(TarError::Sparse("no number"))?;
            digits.clear();
            if numbers.is_empty() {
                // Each number takes two bytes at least.
                if number > limit / 4 {
                    return Err(TarError::Sparse("too large"));
                }
                wanted = 1 + 2 * number as usize;
            }
            numbers.push(number);
        }
    }
    pairs(&numbers[1..])
}

/// Checks that the parts of `map` follow each other within `size` bytes and are what is stored.
/// Empty parts, which only mark the end of a file, go.
pub(super) fn check(map: &mut Vec<Segment>, size: u64, stored: u64) -> Result<(), TarError> {
    let mut end = 0;
    let mut sum: u64 = 0;
    for segment in map.iter() {
        if segment.offset < end {
            return Err(TarError::Sparse("parts out of order or overlapping"));
        }
        end = segment
            .offset
            .checked_add(segment.size)
            .filter(|end| *end <= size)
            .ok_or(TarError::Sparse("a part behind the end of the file"))?;
        sum += segment.size;
    }
    if sum != stored {
        return Err(TarError::Sparse("its parts are not as large as what is stored"));
    }
    map.retain(|segment| segment.size > 0);
    Ok(())
}

/// A file's contents with the holes put back.
pub(crate) struct Expand<'a, R> {
    stored: R,
    segments: Option<&'a [Segment]>,
    position: u64,
    size: u64,
}

impl<'a, R> Expand<'a, R> {
    pub(super) fn new(stored: R, segments: Option<&'a [Segment]>, size: u64) -> Self {
        Self { stored, segments, position: 0, size }
    }
}

impl<R: Read> Read for Expand<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let Some(segments) = &mut self.segments else { return self.stored.read(buf) };
        while let Some(first) = segments.first()
            && first.offset + first.size <= self.position
        {
            *segments = &segments[1..];
        }
        // Until where it goes on as here, and whether that is data.
        let (end, data) = match segments.first() {
            Some(next) if next.offset <= self.position => (next.offset + next.size, true),
            Some(next) => (next.offset, false),
            None => (self.size, false),
        };
        let wanted = (buf.len() as u64).min(end - self.position) as usize;
        let n = if data {
            self.stored.read(&mut buf[..wanted])?
        } else {
            buf[..wanted].fill(0);
            wanted
        };
        self.position += n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expand_puts_holes_back() {
        let map = [Segment { offset: 2, size: 3 }, Segment { offset: 6, size: 1 }];
        let mut out = Vec::new();
        Expand::new(&b"abcd"[..], Some(&map), 9).read_to_end(&mut out).unwrap();
        assert_eq!(out, b"\0\0abc\0d\0\0");
    }

    #[test]
    fn check_refuses_maps_that_contradict_themselves() {
        let map = |list: &[(u64, u64)]| -> Vec<_> {
            list.iter().map(|&(offset, size)| Segment { offset, size }).collect()
        };
        assert!(check(&mut map(&[(0, 2), (4, 2), (9, 0)]), 9, 4).is_ok());
        assert!(check(&mut map(&[(4, 2), (0, 2)]), 9, 4).is_err());
        assert!(check(&mut map(&[(0, 2), (1, 2)]), 9, 4).is_err());
        assert!(check(&mut map(&[(8, 2)]), 9, 2).is_err());
        assert!(check(&mut map(&[(u64::MAX, 2)]), 9, 2).is_err());
        assert!(check(&mut map(&[(0, 2)]), 9, 3).is_err());
    }

    #[test]
    fn read_map_reads_one_block_for_a_short_map() {
        let mut block = b"2\n0\n3\n10\n4\n".to_vec();
        block.resize(BLOCK, 0);
        block.push(b'x');
        let mut input = &block[..];
        let map = read_map(&mut input, 1 << 20).unwrap();
        assert_eq!(map, [Segment { offset: 0, size: 3 }, Segment { offset: 10, size: 4 }]);
        assert_eq!(input, b"x");
        let mut huge = b"99999999999\n".to_vec();
        huge.resize(BLOCK, 0);
        assert!(read_map(&mut &huge[..], 1 << 20).is_err());
    }
}
