//! Exceptions on their way to the guest.

use std::fmt;

/// Exception vectors (SDM vol. 3, table 6-1).
#[allow(missing_docs)]
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const XM: u8 = 19;
}

/// An exception to deliver: vector and error code in one word, so that `Result<u64, Fault>`
/// travels in two registers.
///
/// The linear address of a page fault is in [`Cpu::fault_address`](crate::cpu::Cpu), and reaches
/// CR2 when the fault is delivered.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fault(u64);

const HAS_CODE: u64 = 1 << 8;

impl Fault {
    /// An exception without error code.
    pub const fn new(vector: u8) -> Self {
        Self(vector as u64)
    }

    /// An exception with error code.
    pub const fn with_code(vector: u8, code: u32) -> Self {
        Self(vector as u64 | HAS_CODE | (code as u64) << 32)
    }

    /// #UD.
    pub const UD: Self = Self::new(vector::UD);
    /// #NM.
    pub const NM: Self = Self::new(vector::NM);
    /// #DE.
    pub const DE: Self = Self::new(vector::DE);
    /// #GP(0).
    pub const GP0: Self = Self::with_code(vector::GP, 0);
    /// #AC(0).
    pub const AC0: Self = Self::with_code(vector::AC, 0);
    /// #SS(0).
    pub const SS0: Self = Self::with_code(vector::SS, 0);

    /// #GP(`code`): a selector, or a vector * 8 + 2.
    pub const fn gp(code: u32) -> Self {
        Self::with_code(vector::GP, code)
    }

    /// Its vector.
    pub const fn vector(self) -> u8 {
        self.0 as u8
    }

    /// Its error code, if it has one.
    pub const fn code(self) -> Option<u32> {
        if self.0 & HAS_CODE != 0 { Some((self.0 >> 32) as u32) } else { None }
    }
}

impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code() {
            Some(code) => write!(f, "Fault({}, code {code:#x})", self.vector()),
            None => write!(f, "Fault({})", self.vector()),
        }
    }
}
