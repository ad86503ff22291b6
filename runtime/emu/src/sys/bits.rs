//! Bits of the control registers, by the names of the manual.

/// CR0 (SDM vol. 3, 2.5).
#[allow(missing_docs)]
pub mod cr0 {
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
    /// Bits that can be set; the other low ones are ignored, the high ones fault.
    pub const DEFINED: u64 = PE | MP | EM | TS | ET | NE | WP | AM | NW | CD | PG;
}

/// CR4 (SDM vol. 3, 2.5).
#[allow(missing_docs)]
pub mod cr4 {
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
}

/// IA32_EFER (SDM vol. 3, 2.2.1).
#[allow(missing_docs)]
pub mod efer {
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
    /// Bits that software may set.
    pub const WRITABLE: u64 = SCE | LME | NXE;
}

/// XCR0 (SDM vol. 1, 13.3).
#[allow(missing_docs)]
pub mod xcr0 {
    pub const X87: u64 = 1 << 0;
    pub const SSE: u64 = 1 << 1;
    pub const AVX: u64 = 1 << 2;
}

/// DR6 and DR7 (SDM vol. 3, 18.2).
#[allow(missing_docs)]
pub mod dr {
    /// DR6: a breakpoint condition was met; bit per register.
    pub const DR6_B: u64 = 0xf;
    pub const DR6_BD: u64 = 1 << 13;
    pub const DR6_BS: u64 = 1 << 14;
    pub const DR6_BT: u64 = 1 << 15;
    /// Bits of DR6 that always read as one.
    pub const DR6_FIXED: u64 = 0xffff_0ff0;
    pub const DR7_GD: u64 = 1 << 13;
    /// Bits of DR7 that always read as one.
    pub const DR7_FIXED: u64 = 0x400;
    /// Bits of DR7 that can be set.
    pub const DR7_DEFINED: u64 = 0xffff_23ff;
    /// The local and global enable bits of the four breakpoints.
    pub const DR7_ENABLES: u64 = 0xff;
}

/// Whether `address` is canonical with 48 bits of virtual address.
#[inline]
pub const fn canonical(address: u64) -> bool {
    ((address as i64) << 16 >> 16) as u64 == address
}
