//! Notes: how a kernel says what it is and how it wants to be entered (gABI, "Note Section").

use super::{Error, Section, u32_at};

/// Most bytes of notes in one segment that are looked at; Solo5's largest manifest has 7 KiB.
const MAX_BYTES: u64 = 64 << 10;

const HEADER: usize = 12;

/// Names and contents are aligned to this whatever the segment says: what linkers and kernels do.
const ALIGNMENT: usize = 4;

/// A note.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// Whose it is, without the final NUL.
    pub owner: Vec<u8>,
    /// Its type, in the owner's terms.
    pub kind: u32,
    /// What it says.
    pub content: Vec<u8>,
}

/// Reads the bytes of a note segment.
pub fn read(section: &Section, offset: u64, size: u64) -> Result<Vec<u8>, Error> {
    if size > MAX_BYTES {
        let what = format!("it has {size} bytes of notes; there can be {MAX_BYTES}");
        return Err(Error::Elf(what));
    }
    let mut bytes = vec![0; size as usize];
    if super::read(section, &mut bytes, offset)? < bytes.len() {
        return Err(Error::Elf("the file ends within its notes".into()));
    }
    Ok(bytes)
}

/// Splits a note segment, aligned as its program header says.
pub fn parse(bytes: &[u8], alignment: u64, notes: &mut Vec<Note>) -> Result<(), Error> {
    // In 8-aligned segments the notes begin at multiples of 8, but their parts do not.
    let between = if alignment == 8 { 8 } else { ALIGNMENT };
    let mut at = 0;
    // Less than a header at the end is padding.
    while bytes.len().saturating_sub(at) >= HEADER {
        let (owner_size, size) = (u32_at(bytes, at) as usize, u32_at(bytes, at + 4) as usize);
        let owner_at = at + HEADER;
        let Some((owner, content, next)) = (|| {
            let owner_end = owner_at.checked_add(owner_size)?;
            let content_at = owner_end.checked_next_multiple_of(ALIGNMENT)?;
            let content_end = content_at.checked_add(size)?;
            let owner = bytes.get(owner_at..owner_end)?;
            let content = bytes.get(content_at.min(bytes.len())..content_end)?;
            Some((owner, content, content_end.checked_next_multiple_of(between)?))
        })() else {
            return Err(Error::Elf(format!(
                "the note at {at:#x} of {:#x} bytes of notes is longer than the rest",
                bytes.len()
            )));
        };
        let owner = owner.strip_suffix(b"\0").unwrap_or(owner).to_vec();
        notes.push(Note { owner, kind: u32_at(bytes, at + 8), content: content.to_vec() });
        at = next;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(owner: &[u8], kind: u32, content: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [owner.len() as u32, content.len() as u32, kind] {
            bytes.extend(word.to_le_bytes());
        }
        for part in [owner, content] {
            bytes.extend(part);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    fn parsed(bytes: &[u8], alignment: u64) -> Result<Vec<Note>, Error> {
        let mut notes = Vec::new();
        parse(bytes, alignment, &mut notes).map(|()| notes)
    }

    #[test]
    fn notes_follow_each_other_with_padding() {
        let mut bytes = [note(b"Linux\0", 7, &[1, 2, 3]), note(b"Xen\0", 18, &[4; 8])].concat();
        bytes.extend([0; 8]);
        let notes = parsed(&bytes, 4).unwrap();
        let seen: Vec<_> = notes.iter().map(|n| (&*n.owner, n.kind, &*n.content)).collect();
        assert_eq!(seen, [(&b"Linux"[..], 7, &[1, 2, 3][..]), (b"Xen", 18, &[4; 8])]);

        let mut first = note(b"Solo5\0", 1, &[1; 16]);
        first.resize(first.len().next_multiple_of(8), 0);
        let notes = parsed(&[first, note(b"GNU\0", 3, &[])].concat(), 8).unwrap();
        assert_eq!((notes.len(), &*notes[1].owner), (2, &b"GNU"[..]));
        assert!(parsed(&[], 4).unwrap().is_empty());
    }

    #[test]
    fn lengths_that_lie_are_found_out() {
        let good = note(b"Xen\0", 18, &[4; 8]);
        for at in [0, 4] {
            for length in [0x20u32, 0x7fff_ffff, 0xffff_fffd, u32::MAX] {
                let mut bytes = good.clone();
                bytes[at..at + 4].copy_from_slice(&length.to_le_bytes());
                assert!(matches!(parsed(&bytes, 4), Err(Error::Elf(_))), "{at} {length:#x}");
            }
        }
        assert!(parsed(&good[..good.len() - 1], 4).is_err());
    }
}
