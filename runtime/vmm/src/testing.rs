//! Kernels for tests, made by hand: ELF files of both classes, with notes.

use std::fs::File;
use std::io::{self, Write};

use crate::Section;

const HEADER_SIZE: [u64; 2] = [52, 64];
const PROGRAM_HEADER_SIZE: [u64; 2] = [32, 56];
const EXECUTABLE: u16 = 2;
const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u64 = 1;
const PT_NOTE: u64 = 4;
const MULTIBOOT: u32 = 0x1bad_b002;
const READ_WRITE_EXECUTE: u64 = 7;

/// Bytes of the gates of an [`interrupt_table`]; behind them is what LIDT reads.
pub const INTERRUPT_TABLE: u64 = 4096;

/// A table of interrupt gates for 64-bit mode that lies at `at`, with the vectors and handlers of `gates`, and what LIDT reads
/// (SDM, volume 3, 7.14.1): the code segment is the one that kernels for Linux are entered with.
pub fn interrupt_table(at: u64, gates: impl IntoIterator<Item = (u64, u64)>) -> Vec<u8> {
    const CODE_SEGMENT: u64 = 0x10;
    const PRESENT_INTERRUPT_GATE: u64 = 0x8e00;
    let mut table = vec![0; INTERRUPT_TABLE as usize];
    for (vector, handler) in gates {
        let slot = &mut table[vector as usize * 16..][..16];
        let low = handler & 0xffff | CODE_SEGMENT << 16 | PRESENT_INTERRUPT_GATE << 32;
        slot[..8].copy_from_slice(&(low | (handler >> 16 & 0xffff) << 48).to_le_bytes());
        slot[8..].copy_from_slice(&(handler >> 32).to_le_bytes());
    }
    table.extend((INTERRUPT_TABLE as u16 - 1).to_le_bytes());
    table.extend(at.to_le_bytes());
    table
}

/// An ELF file in the making.
#[derive(Debug, Clone, Default)]
pub struct ElfBuilder {
    is_64: bool,
    entry: u64,
    segments: Vec<SegmentPlan>,
    notes: Vec<Vec<u8>>,
}

#[derive(Debug, Clone)]
struct SegmentPlan {
    start: u64,
    linear: u64,
    content: Vec<u8>,
    size: u64,
    flags: u64,
}

impl ElfBuilder {
    /// A 32-bit file for the 386.
    pub fn elf32(entry: u64) -> Self {
        Self { entry, ..Self::default() }
    }

    /// A 64-bit file for x86-64.
    pub fn elf64(entry: u64) -> Self {
        Self { is_64: true, entry, ..Self::default() }
    }

    /// Loads `content` at physical address `start`.
    pub fn load(self, start: u64, content: &[u8]) -> Self {
        self.segment(start, start, content, content.len() as u64)
    }

    /// Loads `content` at `start`, linked for `linear` and followed by zeros up to `size` bytes.
    pub fn segment(mut self, start: u64, linear: u64, content: &[u8], size: u64) -> Self {
        let content = content.to_vec();
        self.segments.push(SegmentPlan { start, linear, content, size, flags: READ_WRITE_EXECUTE });
        self
    }

    /// The flags of the last segment: 1 execute, 2 write, 4 read; all of them unless set.
    pub fn flags(mut self, flags: u64) -> Self {
        if let Some(last) = self.segments.last_mut() {
            last.flags = flags;
        }
        self
    }

    /// Adds a note in a segment of its own; `owner` without the final NUL.
    pub fn note(mut self, owner: &str, kind: u32, content: &[u8]) -> Self {
        let mut note = Vec::new();
        for word in [owner.len() as u32 + 1, content.len() as u32, kind] {
            note.extend(word.to_le_bytes());
        }
        for part in [format!("{owner}\0").as_bytes(), content] {
            note.extend(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        self.notes.push(note);
        self
    }

    /// The file.
    pub fn build(&self) -> Vec<u8> {
        let class = usize::from(self.is_64);
        let width = if self.is_64 { 8 } else { 4 };
        let count = (self.segments.len() + self.notes.len()) as u64;
        let mut file = b"\x7fELF".to_vec();
        file.extend([1 + class as u8, 1, 1]);
        file.resize(16, 0);
        let machine = if self.is_64 { MACHINE_X86_64 } else { MACHINE_386 };
        file.extend([EXECUTABLE, machine, 1, 0].iter().flat_map(|half| half.to_le_bytes()));
        for word in [self.entry, HEADER_SIZE[class], 0] {
            file.extend(&word.to_le_bytes()[..width]);
        }
        file.extend([0; 4]);
        for half in [HEADER_SIZE[class], PROGRAM_HEADER_SIZE[class], count, 0, 0, 0] {
            file.extend((half as u16).to_le_bytes());
        }
        let mut offset = HEADER_SIZE[class] + count * PROGRAM_HEADER_SIZE[class];
        let mut bodies = Vec::new();
        let mut header = |kind: u64, linear, start, content: &[u8], size: u64, flags: u64| {
            let len = content.len() as u64;
            if self.is_64 {
                file.extend((kind | flags << 32).to_le_bytes());
                for word in [offset, linear, start, len, size, 4] {
                    file.extend(word.to_le_bytes());
                }
            } else {
                for word in [kind, offset, linear, start, len, size, flags, 4] {
                    file.extend((word as u32).to_le_bytes());
                }
            }
            offset += len;
            bodies.extend_from_slice(content);
        };
        for s in &self.segments {
            header(PT_LOAD, s.linear, s.start, &s.content, s.size, s.flags);
        }
        for note in &self.notes {
            header(PT_NOTE, 0, 0, note, note.len() as u64, READ_WRITE_EXECUTE);
        }
        file.extend(bodies);
        file
    }
}

/// The content of a Solo5 manifest note with these names and kinds.
pub fn manifest_note(entries: &[(&str, u32)]) -> Vec<u8> {
    const NAME_SIZE: usize = 68;
    const ENTRY_SIZE: usize = 104;
    let mut note = vec![0; 4];
    note.extend([1, entries.len() as u32].iter().flat_map(|word| word.to_le_bytes()));
    for (name, kind) in entries {
        let mut entry = name.as_bytes().to_vec();
        entry.resize(NAME_SIZE, 0);
        entry.extend(kind.to_le_bytes());
        entry.resize(ENTRY_SIZE, 0);
        note.extend(entry);
    }
    note
}

impl ElfBuilder {
    /// Adds the notes of a Solo5 kernel for `target` (1 is hvt) and ABI version 2, which demands
    /// devices of these names and kinds (1 is block, 2 network).
    pub fn solo5(self, target: u32, devices: &[(&str, u32)]) -> Self {
        const RESERVED_FIRST: (&str, u32) = ("", 1 << 30);
        let abi = [target, 2, 0, 0].map(u32::to_le_bytes).concat();
        let entries: Vec<_> = [RESERVED_FIRST].iter().chain(devices).copied().collect();
        self.note("Solo5", 0x3154_464d, &manifest_note(&entries)).note("Solo5", 0x3149_4241, &abi)
    }
}

/// A small kernel of every form that there is, for tests that damage them.
pub fn kernels() -> Vec<Vec<u8>> {
    const AT: u64 = 0x10_0000;
    /// `cli; hlt; jmp .-1`
    const HALT: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];
    let multiboot = |flags: u32| {
        let checksum = 0u32.wrapping_sub(MULTIBOOT).wrapping_sub(flags);
        let at = AT as u32;
        let words = [MULTIBOOT, flags, checksum, at, at, 0, at + 0x1000, at + 0x20];
        [&words.map(u32::to_le_bytes).concat()[..], &HALT].concat()
    };
    let elf64 = || ElfBuilder::elf64(AT).segment(AT, AT, &HALT, 0x1000);
    let pvh = |elf: ElfBuilder| elf.note("Xen", 18, &(AT as u32).to_le_bytes()).build();
    vec![
        elf64().build(),
        elf64().note("Linux", 0x100, b"salt").load(AT + 0x20_0000, &HALT).build(),
        pvh(elf64()),
        pvh(ElfBuilder::elf32(AT).load(AT, &HALT)),
        ElfBuilder::elf32(AT + 0x20).load(AT, &multiboot(3)).build(),
        ElfBuilder::elf64(AT + 0x20).load(AT, &multiboot(0)).build(),
        multiboot(1 << 16),
        bzimage(0x020f, 1),
        elf64().solo5(1, &[("storage", 1)]).build(),
    ]
}

/// A bzImage of boot protocol `version` with these `xloadflags` and 64 bytes of kernel proper.
pub fn bzimage(version: u16, xloadflags: u16) -> Vec<u8> {
    let mut file = vec![0; 1024 + 64];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &version.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &0x10_0000u32.to_le_bytes());
    put(0x236, &xloadflags.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x20_0000u32.to_le_bytes());
    put(1024, &[0xcc; 64]);
    file
}

/// `content` as a file that a machine can be made from.
///
/// # Errors
/// There is no room for a temporary file.
pub fn section(content: &[u8]) -> io::Result<Section> {
    Section::new(file(content)?, 0, None)
}

/// `content` as a file in memory.
///
/// # Errors
/// There is no room for it.
pub fn file(content: &[u8]) -> io::Result<File> {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let mut file = File::from(memfd_create("mvm-testing", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(content)?;
    Ok(file)
}
