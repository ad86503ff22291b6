//! The bytes of an instruction, as far as copying it with other registers needs them.

/// An instruction of 64-bit code in the legacy encoding.
#[derive(Debug, Clone, Copy)]
pub struct Raw {
    pub lock: bool,
    pub p66: bool,
    /// The last of 0xf2 and 0xf3, or 0.
    pub rep: u8,
    pub rex: u8,
    pub map: u8,
    pub op: u8,
    /// The byte after the opcode, if there is one.
    pub modrm: u8,
}

impl Raw {
    /// None: VEX, EVEX, or prefixes in an odd order.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut raw = Self { lock: false, p66: false, rep: 0, rex: 0, map: 0, op: 0, modrm: 0 };
        let mut rest = bytes.iter().copied();
        let mut op = loop {
            match rest.next()? {
                0xf0 => raw.lock = true,
                0x66 => raw.p66 = true,
                rep @ (0xf2 | 0xf3) => raw.rep = rep,
                0x67 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65 => {}
                other => break other,
            }
        };
        if op & 0xf0 == 0x40 {
            raw.rex = op;
            op = rest.next()?;
        }
        if op == 0x0f {
            raw.map = 1;
            op = rest.next()?;
            if op == 0x38 || op == 0x3a {
                raw.map = if op == 0x38 { 2 } else { 3 };
                op = rest.next()?;
            }
        } else if matches!(
            op,
            // A REX that is none, for another prefix follows it; VEX, EVEX.
            0xf0 | 0x66 | 0x67 | 0xf2 | 0xf3 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65 | 0x40
                ..=0x4f | 0xc4 | 0xc5 | 0x62
        ) {
            return None;
        }
        raw.op = op;
        raw.modrm = rest.next().unwrap_or(0);
        Some(raw)
    }

    /// Operand size of an instruction that is not one of bytes.
    pub fn size(&self) -> u8 {
        match (self.rex & 8 != 0, self.p66) {
            (true, _) => 8,
            (_, true) => 2,
            _ => 4,
        }
    }

    /// The register field of ModRM.
    pub fn reg(&self) -> u8 {
        self.modrm >> 3 & 7 | (self.rex & 4) << 1
    }
    /// The opcode extension in ModRM.
    pub fn digit(&self) -> u8 {
        self.modrm >> 3 & 7
    }
    /// The register of the r/m field; `None`: memory.
    pub fn rm(&self) -> Option<u8> {
        (self.modrm >= 0xc0).then_some(self.modrm & 7 | (self.rex & 1) << 3)
    }
    /// The register in the opcode.
    pub fn low(&self) -> u8 {
        self.op & 7 | (self.rex & 1) << 3
    }
    /// Is `register` of 8 bits one of AH to BH?
    pub fn is_high(&self, register: u8) -> bool {
        self.rex == 0 && (4..8).contains(&register)
    }
    /// For counting: `map << 8 | opcode`.
    pub fn number(&self) -> u32 {
        u32::from(self.map) << 8 | u32::from(self.op)
    }
}
