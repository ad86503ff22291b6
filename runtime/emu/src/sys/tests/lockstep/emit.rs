//! Code of a program: its bytes, and where each instruction's successor is.

use iced_x86::code_asm::CodeAssembler;

use super::machine::{END, PROGRAM_SIZE, USER_PART};

/// The code of a program, which its handlers know instruction by instruction.
pub struct Emitter {
    pub bytes: Vec<u8>,
    /// For the handlers: from the offset of an instruction to that of the next.
    pub next: Vec<u16>,
    /// Offset of the next instruction.
    pub at: usize,
    /// The same of code for privilege level 3.
    other: usize,
    pub user: bool,
}

impl Emitter {
    pub fn new(start: usize, user_start: usize) -> Self {
        Self {
            bytes: vec![0xcc; PROGRAM_SIZE],
            next: vec![END as u16; PROGRAM_SIZE],
            at: start,
            other: USER_PART + user_start,
            user: false,
        }
    }

    /// Whether there is room for another step.
    pub fn has_room(&self) -> bool {
        let user = if self.user { self.at } else { self.other };
        let kernel = if self.user { self.other } else { self.at };
        kernel + 0x300 < super::machine::FUNCTIONS && user + 0x300 < PROGRAM_SIZE
    }

    /// Goes on in the other part; returns where.
    pub fn switch(&mut self) -> usize {
        std::mem::swap(&mut self.at, &mut self.other);
        self.user = !self.user;
        self.at
    }

    pub fn raw(&mut self, bytes: &[u8]) {
        let end = self.at + bytes.len();
        self.bytes[self.at..end].copy_from_slice(bytes);
        self.next[self.at] = end as u16;
        self.at = end;
    }

    /// One instruction, or several that are assembled together but known one by one.
    pub fn asm(
        &mut self,
        make: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
    ) {
        let mut assembler = CodeAssembler::new(64).expect("64 bits");
        make(&mut assembler).expect("instructions");
        let bytes = assembler.assemble(self.at as u64).expect("code");
        let mut decoder = iced_x86::Decoder::with_ip(64, &bytes, 0, iced_x86::DecoderOptions::NONE);
        while decoder.can_decode() {
            let start = decoder.position();
            let length = decoder.decode().len();
            self.raw(&bytes[start..start + length]);
        }
    }

    /// JMP to `target`, with 32 bits of distance.
    pub fn jump(&mut self, target: usize) {
        let distance = target as i64 - (self.at as i64 + 5);
        let mut bytes = vec![0xe9];
        bytes.extend((distance as i32).to_le_bytes());
        self.raw(&bytes);
    }

    /// A jump of `opcode` (after 0F) with its distance open: the place to land.
    pub fn forward(&mut self, opcode: u8) -> usize {
        self.raw(&[0x0f, opcode, 0, 0, 0, 0]);
        self.at
    }

    pub fn land(&mut self, from: usize) {
        let distance = (self.at as i32 - from as i32).to_le_bytes();
        self.bytes[from - 4..from].copy_from_slice(&distance);
    }
}
