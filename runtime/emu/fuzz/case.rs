//! One test case: code, registers, memory. And what comes out of running it.

/// Where the code pages are, natively and in the guest.
pub const CODE: u64 = 0x1000_0000;
/// Bytes of code pages, readable, writable and executable.
pub const CODE_SIZE: usize = 0x2000;
/// Where the data window starts: below 2 GiB, so that absolute addresses reach it.
pub const DATA: u64 = 0x1001_0000;
/// Bytes of the window that can be written.
pub const DATA_SIZE: usize = 0x2000;
/// A page behind it that can only be read; then there is a hole.
pub const READ_ONLY: u64 = DATA + DATA_SIZE as u64;
/// Where the hole starts.
pub const HOLE: u64 = READ_ONLY + 0x1000;
/// Base of GS in 64-bit code.
pub const GS_BASE: u64 = 0x7_1230;
/// Most bytes of code in a case.
pub const MAX_CODE: usize = 240;
/// Bytes of an XSAVE area with AVX.
pub const XSAVE: usize = 832;

/// Registers before and after.
#[derive(Clone, Copy, PartialEq)]
#[repr(C, align(64))]
pub struct State {
    /// rax rcx rdx rbx rsp rbp rsi rdi r8..r15.
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub pad: [u64; 6],
    /// Standard format.
    pub xsave: [u8; XSAVE],
}

/// What to run.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Case {
    pub state: State,
    pub code: [u8; MAX_CODE],
    pub len: u32,
    /// 32-bit compatibility mode.
    pub compat: u32,
    /// Seed of the window's contents ([`fill`]).
    pub data_seed: u64,
}

/// How it ended.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Outcome {
    pub state: State,
    /// Exception vector.
    pub vector: u64,
    /// Its error code.
    pub error: u64,
    /// Address of a page fault.
    pub address: u64,
    pub pad: [u64; 5],
    pub data: [u8; DATA_SIZE],
}

impl Outcome {
    /// Equal in everything.
    pub fn same(&self, other: &Self) -> bool {
        self.state == other.state
            && (self.vector, self.error) == (other.vector, other.error)
            && (self.vector != 14 || self.address == other.address)
            && self.data == other.data
    }
}

/// Fills the data window: small integers at the start (indices for gathers), then values of all sorts.
pub fn fill(seed: u64, data: &mut [u8]) {
    let mut rng = Rng(seed | 1);
    for (i, chunk) in data.chunks_exact_mut(8).enumerate() {
        let value = match i {
            0..8 => (i as u64 * 12) << 32 | (i as u64 * 8 + 4),
            8..16 => i as u64 * 16,
            _ => rng.next(),
        };
        chunk.copy_from_slice(&value.to_le_bytes());
    }
}

/// Xorshift, after Marsaglia.
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        let mut rng = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678_9abc_def1 | 1);
        rng.next();
        rng.next();
        rng
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    /// True once in `n`.
    pub fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// An integer with a taste for corners.
    pub fn value(&mut self) -> u64 {
        match self.below(8) {
            0 => self.pick(&[
                0,
                1,
                2,
                0x7f,
                0x80,
                0xff,
                0x7fff,
                0x8000,
                0xffff,
                0x7fff_ffff,
                0x8000_0000,
                0xffff_ffff,
                0x7fff_ffff_ffff_ffff,
                0x8000_0000_0000_0000,
                u64::MAX,
                u64::MAX - 1,
            ]),
            1 => self.below(64),
            2 => self.below(64).wrapping_neg(),
            3 => self.next() & 0xffff_ffff,
            4 => 1 << self.below(64),
            5 => self.next() & self.next() & self.next(),
            _ => self.next(),
        }
    }

    /// The bits of a double, or of two floats, with a taste for corners.
    pub fn float(&mut self) -> u64 {
        match self.below(8) {
            0 => self.pick(&[
                0,
                1 << 63,
                0x3ff0_0000_0000_0000,
                0xbff0_0000_0000_0000,
                0x7ff0_0000_0000_0000,
                0xfff0_0000_0000_0000,
                0x7ff8_0000_0000_0000,
                0x7ff0_0000_0000_0001,
                0x000f_ffff_ffff_ffff,
                1,
                0x0010_0000_0000_0000,
                0x7fef_ffff_ffff_ffff,
                0x41e0_0000_0000_0000,
                0xc3e0_0000_0000_0000,
            ]),
            1..4 => (f64::from(self.next() as i32) / f64::from(1 + (self.next() & 0xff) as u16))
                .to_bits(),
            4..6 => {
                let pair = [self.single(), self.single()];
                u64::from(pair[0]) << 32 | u64::from(pair[1])
            }
            6 => self.value(),
            _ => self.next(),
        }
    }

    fn single(&mut self) -> u32 {
        match self.below(4) {
            0 => self.pick(&[
                0,
                0x8000_0000,
                0x3f80_0000,
                0x7f80_0000,
                0xff80_0000,
                0x7fc0_0000,
                0x7f80_0001,
                1,
                0x007f_ffff,
                0x0080_0000,
                0x7f7f_ffff,
                0x4f00_0000,
                0xcf00_0000,
            ]),
            1 => self.next() as u32,
            _ => (self.next() as i16 as f32 / (1 + (self.next() & 0xff)) as f32).to_bits(),
        }
    }

    /// An 80-bit extended number.
    pub fn extended(&mut self) -> [u8; 10] {
        let (head, mantissa): (u16, u64) = match self.below(8) {
            0 => self.pick(&[
                (0, 0),
                (0x8000, 0),
                (0x3fff, 1 << 63),
                (0xbfff, 1 << 63),
                (0x7fff, 1 << 63),
                (0xffff, 1 << 63),
                (0x7fff, 3 << 62),
                (0x7fff, 1 << 63 | 1),
                (0, 1),
                (0, 1 << 63),
                (0x3fff, 0),
                (0x7ffe, u64::MAX),
                (0x403e, 1 << 63),
            ]),
            1 => (self.next() as u16, self.next()),
            2 => (self.next() as u16, self.next() | 1 << 63),
            _ => (
                (0x3fff - 40 + self.below(80) as u16) | (self.next() as u16 & 0x8000),
                self.next() | 1 << 63,
            ),
        };
        let mut bytes = [0; 10];
        bytes[..8].copy_from_slice(&mantissa.to_le_bytes());
        bytes[8..].copy_from_slice(&head.to_le_bytes());
        bytes
    }
}
