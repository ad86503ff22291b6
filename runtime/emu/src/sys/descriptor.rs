//! Segment descriptors (SDM vol. 3, 3.4.5 and 3.5).

use crate::cpu::SegmentReg;

/// Bits of [`SegmentReg::access`].
#[allow(missing_docs)]
pub mod access {
    pub const TYPE: u32 = 0xf;
    /// Accessed (code and data).
    pub const A: u32 = 1;
    /// Writable data, or readable code.
    pub const RW: u32 = 1 << 1;
    /// Expand-down data, or conforming code.
    pub const DC: u32 = 1 << 2;
    /// Code.
    pub const CODE: u32 = 1 << 3;
    /// Code or data, not system.
    pub const S: u32 = 1 << 4;
    pub const DPL_SHIFT: u32 = 5;
    pub const P: u32 = 1 << 7;
    pub const L: u32 = 1 << 13;
    pub const DB: u32 = 1 << 14;
    pub const G: u32 = 1 << 15;
    /// Not loaded: a null selector.
    pub const UNUSABLE: u32 = 1 << 16;

    /// A flat 64-bit code segment of privilege level 0.
    pub const CODE64: u32 = P | S | CODE | RW | A | L | G;
    /// A flat 32-bit code segment of privilege level 0.
    pub const CODE32: u32 = P | S | CODE | RW | A | DB | G;
    /// A flat data segment of privilege level 0.
    pub const DATA: u32 = P | S | RW | A | DB | G;
    /// A real-mode segment.
    pub const REAL_DATA: u32 = P | S | RW | A;
    /// A segment of virtual-8086 mode.
    pub const DATA_8086: u32 = REAL_DATA | 3 << DPL_SHIFT;
    /// A real-mode code segment.
    pub const REAL_CODE: u32 = REAL_DATA | CODE;
}

/// Types of system descriptors (SDM vol. 3, table 3-2). In IA-32e mode the 32-bit ones are 64-bit.
#[allow(missing_docs)]
pub mod system {
    pub const TSS16: u32 = 1;
    pub const LDT: u32 = 2;
    pub const CALL16: u32 = 4;
    pub const TASK_GATE: u32 = 5;
    pub const INT16: u32 = 6;
    pub const TRAP16: u32 = 7;
    pub const TSS: u32 = 9;
    pub const TSS_BUSY: u32 = 0xb;
    pub const CALL: u32 = 0xc;
    pub const INT: u32 = 0xe;
    pub const TRAP: u32 = 0xf;
    /// The bit that tells a busy TSS.
    pub const BUSY: u64 = 1 << 41;
}

/// The eight bytes of a descriptor, as they stand in a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor(pub u64);

impl Descriptor {
    /// Access rights in the form of [`SegmentReg::access`].
    pub const fn access(self) -> u32 {
        (self.0 >> 40) as u32 & 0xf0ff
    }

    /// Type field.
    pub const fn kind(self) -> u32 {
        self.access() & access::TYPE
    }

    /// Privilege level.
    pub const fn dpl(self) -> u8 {
        (self.0 >> 45) as u8 & 3
    }

    /// Is it present?
    pub const fn present(self) -> bool {
        self.access() & access::P != 0
    }

    /// Is it a code segment?
    pub const fn is_code(self) -> bool {
        self.access() & (access::S | access::CODE) == access::S | access::CODE
    }

    /// Is it a conforming code segment?
    pub const fn conforming(self) -> bool {
        self.is_code() && self.access() & access::DC != 0
    }

    /// Is it a data segment that can be written?
    pub const fn is_writable_data(self) -> bool {
        self.access() & (access::S | access::CODE | access::RW) == access::S | access::RW
    }

    /// Can it be read through DS and the like?
    pub const fn is_readable(self) -> bool {
        let access = self.access();
        access & access::S != 0 && access & (access::CODE | access::RW) != access::CODE
    }

    /// Is it a system descriptor (segment or gate)?
    pub const fn is_system(self) -> bool {
        self.access() & access::S == 0
    }

    /// Low 32 bits of the base.
    pub const fn base(self) -> u64 {
        (self.0 >> 16) & 0xff_ffff | (self.0 >> 32) & 0xff00_0000
    }

    /// Limit in bytes, granularity applied.
    pub const fn limit(self) -> u32 {
        let limit = (self.0 & 0xffff | (self.0 >> 32) & 0xf_0000) as u32;
        if self.access() & access::G != 0 { limit << 12 | 0xfff } else { limit }
    }

    /// The register that results from loading it under `selector`.
    pub const fn load(self, selector: u16) -> SegmentReg {
        SegmentReg { selector, access: self.access(), base: self.base(), limit: self.limit() }
    }
}

/// A gate: the low eight bytes of a call, interrupt or trap gate.
#[derive(Debug, Clone, Copy)]
pub struct Gate(pub u64);

impl Gate {
    /// Code segment selector.
    pub const fn selector(self) -> u16 {
        (self.0 >> 16) as u16
    }

    /// Low 32 bits of the offset (a 16-bit gate uses the low 16).
    pub const fn offset(self) -> u64 {
        self.0 & 0xffff | (self.0 >> 32) & 0xffff_0000
    }

    /// Interrupt stack table index (64-bit gates).
    pub const fn ist(self) -> u8 {
        (self.0 >> 32) as u8 & 7
    }

    /// Number of parameters to copy (call gates).
    pub const fn parameters(self) -> u8 {
        (self.0 >> 32) as u8 & 31
    }

    /// As a descriptor, for type, privilege and presence.
    pub const fn descriptor(self) -> Descriptor {
        Descriptor(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linux_kernel_code_descriptor() {
        let code = Descriptor(0x00af_9b00_0000_ffff);
        assert_eq!(code.access(), access::CODE64);
        assert_eq!((code.base(), code.limit(), code.dpl()), (0, u32::MAX, 0));
        assert!(code.is_code() && code.present() && !code.conforming() && code.is_readable());
        let user_data = Descriptor(0x00cf_f300_0000_ffff);
        assert!(user_data.is_writable_data() && user_data.dpl() == 3);
    }

    #[test]
    fn base_and_limit_are_put_together_from_their_parts() {
        let descriptor = Descriptor(0x1240_9334_5678_abcd);
        assert_eq!(descriptor.base(), 0x1234_5678);
        assert_eq!(descriptor.limit(), 0x0_abcd);
    }
}
