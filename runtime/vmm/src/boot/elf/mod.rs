//! An ELF kernel's headers, segments and notes, read and checked before anything is loaded
//! (System V gABI, "Object Files" and "Program Loading").
//!
//! Both classes come out in the same form. Whatever is accepted here has segments whose bytes are in
//! the file and which do not overlap.

mod notes;

use std::io::{Seek, SeekFrom};

use mvm_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use super::Error;
use super::section::Section;
use crate::layout;

pub use notes::Note;

/// Start of every ELF file.
pub const MAGIC: [u8; 4] = *b"\x7fELF";

const CLASS_32: u8 = 1;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// Most program headers of a kernel that are looked at; a vmlinux has about five.
const MAX_PROGRAM_HEADERS: usize = 64;

/// What is to be loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First byte in the file.
    offset: u64,
    /// Linear address that the kernel was linked for.
    linear: u64,
    /// Physical address.
    pub start: u64,
    /// Bytes in the file.
    file_size: u64,
    /// Bytes in memory; those that are not in the file are zero.
    pub size: u64,
    /// What may be done with it: bit 0 execute, 1 write, 2 read.
    flags: u32,
}

/// An ELF kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ElfFile {
    /// 32 or 64.
    pub bits: u32,
    /// Entry point as the header has it.
    pub entry: u64,
    /// By ascending address; never empty.
    pub segments: Vec<Segment>,
    /// In the order of the file.
    pub notes: Vec<Note>,
}

/// Where the fields lie in a class.
struct Class {
    bits: u32,
    header: usize,
    program_header: usize,
}

const ELF32: Class = Class { bits: 32, header: 52, program_header: 32 };
const ELF64: Class = Class { bits: 64, header: 64, program_header: 56 };

/// A program header.
struct ProgramHeader {
    kind: u32,
    segment: Segment,
    alignment: u64,
}

impl ElfFile {
    /// Reads the headers and notes of an x86 ELF kernel.
    ///
    /// # Errors
    /// It is for another processor, malformed, or has a segment where none can be.
    pub fn open(section: &Section) -> Result<Self, Error> {
        let mut header = [0; ELF64.header];
        let got = read(section, &mut header, 0)?;
        let class = match header[4] {
            CLASS_32 => ELF32,
            CLASS_64 => ELF64,
            other => return Err(Error::Elf(format!("there is no class {other}"))),
        };
        if got < class.header {
            return Err(Error::Elf("the file ends within the ELF header".into()));
        }
        let machine = u16_at(&header, 18);
        let is_x86 = machine == MACHINE_X86_64 || (class.bits == 32 && machine == MACHINE_386);
        if !is_x86 || header[5] != LITTLE_ENDIAN {
            return Err(Error::WrongMachine { bits: class.bits, machine });
        }
        let (entry, table_at, sizes_at) = match class.bits {
            32 => (u32_at(&header, 24).into(), u32_at(&header, 28).into(), 42),
            _ => (u64_at(&header, 24), u64_at(&header, 32), 54),
        };
        let (size, count) = (u16_at(&header, sizes_at), u16_at(&header, sizes_at + 2));
        let count = usize::from(count);
        if count > MAX_PROGRAM_HEADERS || usize::from(size) != class.program_header {
            return Err(Error::Elf(format!("it has {count} program headers of {size} bytes")));
        }
        let mut table = vec![0; count * class.program_header];
        if read(section, &mut table, table_at)? < table.len() {
            return Err(Error::Elf("the file ends within the program headers".into()));
        }

        let mut file = Self { bits: class.bits, entry, segments: Vec::new(), notes: Vec::new() };
        for bytes in table.chunks_exact(class.program_header) {
            let header = program_header(bytes, class.bits);
            match header.kind {
                PT_LOAD if header.segment.size.max(header.segment.file_size) > 0 => {
                    file.segments.push(check(header.segment, section)?);
                }
                PT_NOTE => {
                    let Segment { offset, file_size, .. } = header.segment;
                    let bytes = notes::read(section, offset, file_size)?;
                    notes::parse(&bytes, header.alignment, &mut file.notes)?;
                }
                _ => {}
            }
        }
        file.segments.sort_by_key(|s| s.start);
        if file.segments.is_empty() {
            return Err(Error::Elf("there is nothing in it to be loaded".into()));
        }
        for pair in file.segments.windows(2) {
            if pair[0].end() > pair[1].start {
                let (a, b) = (pair[0].start, pair[1].start);
                return Err(Error::Elf(format!("its segments at {a:#x} and {b:#x} overlap")));
            }
        }
        Ok(file)
    }

    /// The same, if all of it lies above the first MiB.
    ///
    /// # Errors
    /// [`Error::Segment`].
    pub fn high(self) -> Result<Self, Error> {
        match self.segments.iter().find(|s| s.start < layout::HIGH_RAM_START) {
            Some(&Segment { start, size, .. }) => Err(Error::Segment { start, size }),
            None => Ok(self),
        }
    }

    /// First address after the last segment.
    pub fn end(&self) -> u64 {
        self.segments.last().map_or(0, Segment::end)
    }

    /// Checks that something is loaded at physical address `entry`.
    ///
    /// # Errors
    /// [`Error::Elf`].
    pub fn check_entry(&self, entry: u64) -> Result<u64, Error> {
        let there = |s: &Segment| (s.start..s.end()).contains(&entry);
        if self.segments.iter().any(there) {
            return Ok(entry);
        }
        Err(Error::Elf(format!("nothing is loaded at its entry point {entry:#x}")))
    }

    /// The entry point as a physical address: kernels that are linked for high addresses give a
    /// linear one.
    pub fn physical_entry(&self) -> u64 {
        let inside = |s: &&Segment| self.entry.checked_sub(s.linear).is_some_and(|o| o < s.size);
        self.segments.iter().find(inside).map_or(self.entry, |s| s.start + (self.entry - s.linear))
    }

    /// The note of this owner and type.
    pub fn note(&self, owner: &[u8], kind: u32) -> Option<&Note> {
        self.notes.iter().find(|n| n.owner == owner && n.kind == kind)
    }

    /// Copies the segments to guest memory, which is zero where they go.
    ///
    /// # Errors
    /// Guest memory does not reach there, or the file cannot be read.
    pub fn load(&self, section: &mut Section, ram: &GuestRam) -> Result<(), Error> {
        let failed = |source| Error::Read { what: "the kernel", source };
        for segment in &self.segments {
            section.seek(SeekFrom::Start(segment.offset)).map_err(failed)?;
            let len = usize::try_from(segment.file_size)
                .map_err(|_| Error::Segment { start: segment.start, size: segment.size })?;
            ram.memory()
                .read_exact_volatile_from(GuestAddress(segment.start), section, len)
                .map_err(|e| failed(std::io::Error::other(e)))?;
        }
        Ok(())
    }
}

impl Segment {
    /// First address after it.
    pub fn end(&self) -> u64 {
        self.start + self.size
    }

    /// Whether its header says that it may be written.
    pub fn is_writable(&self) -> bool {
        self.flags & 2 != 0
    }

    /// Whether its header says that it may be executed.
    pub fn is_executable(&self) -> bool {
        self.flags & 1 != 0
    }
}

fn program_header(bytes: &[u8], bits: u32) -> ProgramHeader {
    // Offset to size are fields 1 to 5 in both classes: the flags lie after the type in the one, and
    // between size and alignment in the other.
    let field = |index: usize| match bits {
        32 => u64::from(u32_at(bytes, index * 4)),
        _ => u64_at(bytes, index * 8),
    };
    let segment = Segment {
        offset: field(1),
        linear: field(2),
        start: field(3),
        file_size: field(4),
        size: field(5),
        flags: if bits == 32 { u32_at(bytes, 24) } else { u32_at(bytes, 4) },
    };
    let alignment = field(if bits == 32 { 7 } else { 6 });
    ProgramHeader { kind: u32_at(bytes, 0), segment, alignment }
}

fn check(segment: Segment, section: &Section) -> Result<Segment, Error> {
    let Segment { offset, start, file_size, size, .. } = segment;
    if file_size > size {
        let what = format!("the segment at {start:#x} has more bytes in the file than in memory");
        return Err(Error::Elf(what));
    }
    if start.checked_add(size).is_none() {
        return Err(Error::Segment { start, size });
    }
    if offset.checked_add(file_size).is_none_or(|end| end > section.size()) {
        return Err(Error::Elf(format!(
            "the file has {} bytes and ends within the segment at {start:#x}",
            section.size()
        )));
    }
    Ok(segment)
}

fn read(section: &Section, buf: &mut [u8], position: u64) -> Result<usize, Error> {
    section.read_at(buf, position).map_err(|source| Error::Read { what: "the kernel", source })
}

fn bytes<const N: usize>(from: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    if let Some(slice) = from.get(at..at + N) {
        out.copy_from_slice(slice);
    }
    out
}

/// The little-endian number at `at`; 0 if `from` does not reach there.
pub fn u16_at(from: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes(from, at))
}

/// See [`u16_at`].
pub fn u32_at(from: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes(from, at))
}

/// See [`u16_at`].
pub fn u64_at(from: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes(from, at))
}
