//! The four operand widths of the integer instruction set.

use std::fmt;

/// An unsigned integer as wide as an operand.
pub trait Int: Copy + PartialEq + Default + fmt::Debug + fmt::LowerHex + Send + 'static {
    /// Bytes.
    const SIZE: usize;
    /// Bits.
    const BITS: u32;
    /// All bits of the width set.
    const MASK: u64;
    /// The low bits of `value`.
    fn truncate(value: u64) -> Self;
    /// Zero-extended.
    fn zext(self) -> u64;
    /// Sign-extended.
    fn sext(self) -> u64;
    /// From the first bytes of `bytes`, little endian; missing ones are zero.
    fn from_bytes(bytes: &[u8]) -> Self {
        let mut all = [0; 8];
        for (to, from) in all.iter_mut().zip(bytes.iter().take(Self::SIZE)) {
            *to = *from;
        }
        Self::truncate(u64::from_le_bytes(all))
    }
}

macro_rules! int {
    ($t:ty, $signed:ty) => {
        impl Int for $t {
            const SIZE: usize = size_of::<$t>();
            const BITS: u32 = <$t>::BITS;
            const MASK: u64 = <$t>::MAX as u64;
            #[inline(always)]
            fn truncate(value: u64) -> Self {
                value as $t
            }
            #[inline(always)]
            fn zext(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn sext(self) -> u64 {
                self as $signed as i64 as u64
            }
        }
    };
}

int!(u8, i8);
int!(u16, i16);
int!(u32, i32);
int!(u64, i64);
