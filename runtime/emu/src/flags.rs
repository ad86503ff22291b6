//! RFLAGS in two parts: the six arithmetic flags as the host's `lahf; seto al` leaves them in AX,
//! and the rest as they stand in the register.
//!
//! Instructions that set arithmetic flags run the host's own instruction and keep AX, so every
//! flag is right by construction, AF and PF included, and nothing is computed lazily.

/// Arithmetic flags in AX form: AH as LAHF leaves it (SF ZF - AF - PF 1 CF), AL = OF.
pub type Cc = u16;

/// Bits of [`Cc`].
#[allow(missing_docs)]
pub mod cc {
    pub const OF: u16 = 1;
    pub const CF: u16 = 1 << 8;
    pub const PF: u16 = 1 << 10;
    pub const AF: u16 = 1 << 12;
    pub const ZF: u16 = 1 << 14;
    pub const SF: u16 = 1 << 15;
}

/// Bits of RFLAGS (SDM vol. 1, 3.4.3).
#[allow(missing_docs)]
pub mod rflags {
    pub const CF: u64 = 1 << 0;
    pub const FIXED: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The arithmetic flags.
    pub const ARITH: u64 = CF | PF | AF | ZF | SF | OF;
}

/// The arithmetic bits of RFLAGS for `cc`.
#[inline]
pub const fn cc_to_rflags(cc: Cc) -> u64 {
    (cc >> 8) as u64 & (rflags::ARITH & 0xff) | ((cc & 1) as u64) << 11
}

/// [`Cc`] for the arithmetic bits of `flags`.
#[inline]
pub const fn rflags_to_cc(flags: u64) -> Cc {
    ((flags & (rflags::ARITH & 0xff)) as u16) << 8 | 0x200 | (flags >> 11 & 1) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversion_round_trips() {
        for bits in 0..64u64 {
            let flags = [rflags::CF, rflags::PF, rflags::AF, rflags::ZF, rflags::SF, rflags::OF]
                .iter()
                .enumerate()
                .map(|(i, f)| if bits >> i & 1 != 0 { *f } else { 0 })
                .sum::<u64>();
            assert_eq!(cc_to_rflags(rflags_to_cc(flags)), flags);
        }
    }
}
