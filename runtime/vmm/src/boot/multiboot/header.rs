//! The header by which a multiboot kernel is known (specification 0.6.96, 3.1).

use super::super::Error;
use super::super::elf::u32_at;

/// The header lies within this many bytes of the file's beginning.
pub const SEARCHED: usize = 8192;

const MAGIC: u32 = 0x1bad_b002;
const ALIGNMENT: usize = 4;

/// Magic, flags, checksum.
const SIZE: usize = 12;
/// With the address fields.
const SIZE_WITH_ADDRESSES: usize = 32;

/// Features that a loader must know (3.1.2): bits 0 to 15.
const REQUIRED: u32 = 0xffff;
/// Those that this one knows: modules at page boundaries, memory information, and video modes, of
/// which it may truthfully say that there are none.
const KNOWN: u32 = 0b111;
/// The header has address fields, which count more than an ELF header.
const HAS_ADDRESSES: u32 = 1 << 16;

/// A multiboot header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Where it is in the file.
    pub at: u64,
    /// Its address fields.
    pub addresses: Option<Addresses>,
}

/// Where a kernel that is no ELF file goes (3.1.3). Physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// Where the header itself is to be.
    pub header: u32,
    /// First byte to be loaded.
    pub load: u32,
    /// First byte after those in the file; 0 for all that there are.
    pub load_end: u32,
    /// First byte after those to be zeroed; 0 for none.
    pub bss_end: u32,
    /// Entry point.
    pub entry: u32,
}

/// Looks for a header in the first [`SEARCHED`] bytes of a file.
///
/// # Errors
/// It requires something that this loader does not know, or is cut short.
pub fn find(head: &[u8]) -> Result<Option<Header>, Error> {
    let head = &head[..head.len().min(SEARCHED)];
    let valid = |at: &usize| {
        let word = |index: usize| u32_at(head, at + index * 4);
        word(0) == MAGIC && word(0).wrapping_add(word(1)).wrapping_add(word(2)) == 0
    };
    let last = head.len().saturating_sub(SIZE - 1);
    let Some(at) = (0..last).step_by(ALIGNMENT).find(valid) else { return Ok(None) };
    let failed = |reason| Error::Multiboot { at: at as u64, reason };

    let flags = u32_at(head, at + 4);
    let unknown = flags & REQUIRED & !KNOWN;
    if unknown != 0 {
        let bits: Vec<String> =
            (0..16).filter(|b| unknown >> b & 1 != 0).map(|b| b.to_string()).collect();
        return Err(failed(format!(
            "it requires what this loader does not know: flag {}",
            bits.join(", ")
        )));
    }
    let mut addresses = None;
    if flags & HAS_ADDRESSES != 0 {
        if head.len() - at < SIZE_WITH_ADDRESSES {
            return Err(failed("the file or its first 8 KiB end within the address fields".into()));
        }
        let word = |index: usize| u32_at(head, at + SIZE + index * 4);
        let (header, load, load_end) = (word(0), word(1), word(2));
        let (bss_end, entry) = (word(3), word(4));
        addresses = Some(Addresses { header, load, load_end, bss_end, entry });
    }
    Ok(Some(Header { at: at as u64, addresses }))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A header with these flags and address fields.
    pub fn header(flags: u32, addresses: [u32; 5]) -> Vec<u8> {
        let checksum = 0u32.wrapping_sub(MAGIC).wrapping_sub(flags);
        let words = [MAGIC, flags, checksum].into_iter().chain(addresses);
        words.flat_map(u32::to_le_bytes).collect()
    }

    fn at(offset: usize, header: &[u8]) -> Vec<u8> {
        [&vec![0xcc; offset], header].concat()
    }

    #[test]
    fn a_header_is_found_where_the_specification_allows_it() {
        let short = &header(3, [0; 5])[..SIZE];
        for offset in [0, 4, 4096, SEARCHED - SIZE] {
            let found = find(&at(offset, short)).unwrap().unwrap();
            assert_eq!(found, Header { at: offset as u64, addresses: None });
        }
        for offset in [2, SEARCHED - SIZE + 4, SEARCHED] {
            assert_eq!(find(&at(offset, short)).unwrap(), None, "{offset}");
        }
        let mut wrong = short.to_vec();
        wrong[8] ^= 1;
        assert_eq!(find(&wrong).unwrap(), None);
        assert_eq!(find(&short[..11]).unwrap(), None);
        assert_eq!(find(&[]).unwrap(), None);
    }

    #[test]
    fn address_fields_are_read_if_there_are_any() {
        let bytes = header(HAS_ADDRESSES | 2, [1, 2, 3, 4, 5]);
        let addresses = find(&at(64, &bytes)).unwrap().unwrap().addresses.unwrap();
        let want = Addresses { header: 1, load: 2, load_end: 3, bss_end: 4, entry: 5 };
        assert_eq!(addresses, want);
        assert!(matches!(find(&bytes[..31]), Err(Error::Multiboot { at: 0, .. })));
        let beyond = at(SEARCHED - SIZE, &bytes);
        assert!(matches!(find(&beyond), Err(Error::Multiboot { .. })));
    }

    #[test]
    fn requirements_that_nobody_knows_are_named() {
        assert!(find(&header(0xfffe_0007, [0; 5])).unwrap().is_some(), "the others are optional");
        let error = find(&header(0x8009, [0; 5])).unwrap_err().to_string();
        assert!(error.ends_with("does not know: flag 3, 15"), "{error}");
    }
}
