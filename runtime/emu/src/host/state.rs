//! SIMD and x87 registers, and who may use them.
//!
//! XMM/YMM live in memory whenever anything but translated code runs ([`VectorState::away`]). The x87 unit's registers live in the host's x87 unit between
//! [`VectorState::enter`] and [`VectorState::leave`], and in [`VectorState::x87`] otherwise.
//!
//! # MXCSR
//!
//! As long as the guest's MXCSR asks for what the host's has anyway (round to nearest, all
//! exceptions masked, no flushing), guest instructions run under the host's register, which collects
//! the sticky flags; [`VectorState::mxcsr`] merges them. Everything else is "special" (a bit in
//! [`VectorState::guard`]): then each floating-point instruction loads and reads the register
//! ([`super::fp`]). The vCPU's thread does no floating-point arithmetic of its own in between.

use std::arch::asm;

use crate::fault::Fault;

/// MXCSR after reset, and the host's own.
pub const MXCSR_RESET: u32 = 0x1f80;
/// Bits of MXCSR that exist (SDM vol. 1, 11.6.6); the rest raise #GP.
pub const MXCSR_MASK: u32 = 0xffff;
/// The six sticky exception flags of MXCSR.
pub const MXCSR_FLAGS: u32 = 0x3f;

/// Bits of [`VectorState::guard`]: why a class of instructions cannot simply run.
pub mod guard {
    /// x87: CR0.EM or CR0.TS.
    pub const X87: u8 = 1;
    /// FWAIT: CR0.MP and CR0.TS.
    pub const WAIT: u8 = 2;
    /// MMX: CR0.EM or CR0.TS.
    pub const MMX: u8 = 4;
    /// SSE: CR0.EM, CR0.TS, or CR4.OSFXSR clear.
    pub const SSE: u8 = 8;
    /// AVX: CR4.OSXSAVE clear, XCR0 without SSE and AVX, or CR0.TS.
    pub const AVX: u8 = 16;
    /// XSAVE family: CR4.OSXSAVE clear or CR0.TS.
    pub const XSAVE: u8 = 32;
    /// An x87 exception is unmasked, so one may be pending.
    pub const PENDING: u8 = 64;
    /// MXCSR differs from the host's.
    pub const MXCSR: u8 = 128;
    /// The bits that deny.
    pub const DENY: u8 = X87 | WAIT | MMX | SSE | AVX | XSAVE;
}

const CR0_MP: u64 = 1 << 1;
const CR0_EM: u64 = 1 << 2;
const CR0_TS: u64 = 1 << 3;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const CR4_OSXSAVE: u64 = 1 << 18;

/// A vector register: XMM in the lower half.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C, align(32))]
pub struct Ymm(pub [u64; 4]);

/// An FXSAVE image (SDM vol. 1, 10.5.1); only its x87 part is used here.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct FxImage(pub [u8; 512]);

impl std::fmt::Debug for FxImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0[..160].chunks(16)).finish()
    }
}

impl FxImage {
    /// x87 after FNINIT.
    pub const fn reset() -> Self {
        let mut image = [0; 512];
        image[0] = 0x7f;
        image[1] = 0x03;
        image[24] = MXCSR_RESET as u8;
        image[25] = (MXCSR_RESET >> 8) as u8;
        Self(image)
    }

    /// Control word.
    pub fn fcw(&self) -> u16 {
        u16::from_le_bytes([self.0[0], self.0[1]])
    }
}

/// Where the last x87 instruction was. Virtual: the host's own pointers would tell its addresses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct X87Pointers {
    /// Its RIP.
    pub fip: u64,
    /// Offset of its memory operand.
    pub fdp: u64,
    /// The low 11 bits of its opcode.
    pub fop: u16,
}

/// SIMD and x87 registers of one vCPU.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub struct VectorState {
    /// YMM0-15.
    pub ymm: [Ymm; 16],
    /// [`guard`] bits: zero when everything is allowed and plain.
    pub guard: u8,
    /// `ymm` is what counts: 1, but while translated code has the registers in the host's. Tested together with `guard`.
    pub away: u8,
    _rest_of_the_word: [u8; 2],
    /// While they are there: the upper half of one may be other than zero. Not in the word of `guard`, a load of which would wait
    /// for stores to this.
    pub wide: u8,
    resident: bool,
    mxcsr: u32,
    cr0: u64,
    cr4: u64,
    xcr0: u64,
    /// Last x87 instruction.
    pub pointers: X87Pointers,
    x87: FxImage,
}

impl Default for VectorState {
    fn default() -> Self {
        let mut state = Self {
            ymm: [Ymm::default(); 16],
            guard: 0,
            away: 1,
            _rest_of_the_word: [0; 2],
            wide: 0,
            resident: false,
            mxcsr: MXCSR_RESET,
            cr0: 0,
            cr4: 0,
            xcr0: 1,
            pointers: X87Pointers::default(),
            x87: FxImage::reset(),
        };
        state.update_access(0, 0, 1);
        state
    }
}

impl VectorState {
    /// Takes the host's x87 unit: the vCPU is about to run on this thread.
    pub fn enter(&mut self) {
        if !self.resident {
            self.resident = true;
            // SAFETY: the image is 64-byte aligned and its MXCSR is the host's default.
            unsafe { fxrstor_x87(&self.x87) };
        }
        set_host_mxcsr(MXCSR_RESET);
    }

    /// Gives the host's x87 unit back, clean.
    pub fn leave(&mut self) {
        if self.resident {
            self.mxcsr();
            self.x87 = fxsave_x87();
            // SAFETY: FNINIT never faults; nobody but the guest had anything in the unit.
            unsafe { asm!("fninit", options(nomem, nostack)) };
            self.resident = false;
            set_host_mxcsr(MXCSR_RESET);
        }
    }

    /// The x87 registers as an FXSAVE image, with the guest's pointers.
    pub fn x87_image(&self) -> FxImage {
        let mut image = if self.resident { fxsave_x87() } else { self.x87 };
        let X87Pointers { fip, fdp, fop } = self.pointers;
        image.0[6..8].copy_from_slice(&fop.to_le_bytes());
        image.0[8..16].copy_from_slice(&fip.to_le_bytes());
        image.0[16..24].copy_from_slice(&fdp.to_le_bytes());
        image
    }

    /// Replaces the x87 registers and pointers from an FXSAVE image; its other parts are ignored.
    pub fn set_x87_image(&mut self, image: &FxImage) {
        let word = |at: usize| u64::from_le_bytes(image.0[at..at + 8].try_into().unwrap_or([0; 8]));
        self.pointers = X87Pointers {
            fip: word(8),
            fdp: word(16),
            fop: u16::from_le_bytes([image.0[6], image.0[7]]) & 0x7ff,
        };
        self.x87 = FxImage::reset();
        self.x87.0[..6].copy_from_slice(&image.0[..6]);
        self.x87.0[5] = 0;
        for st in 0..8 {
            let at = 32 + st * 16;
            self.x87.0[at..at + 10].copy_from_slice(&image.0[at..at + 10]);
        }
        if self.resident {
            self.mxcsr();
            // SAFETY: as in `enter`.
            unsafe { fxrstor_x87(&self.x87) };
        }
        self.control_word_changed();
    }

    /// Recomputes [`guard::PENDING`]; call it after anything that may have changed the x87 control word.
    pub fn control_word_changed(&mut self) {
        let fcw = if self.resident { fnstcw() } else { self.x87.fcw() };
        self.set_guard(guard::PENDING, fcw & 0x3f != 0x3f);
    }

    /// Whether an unmasked x87 exception waits for the next waiting instruction.
    pub fn x87_pending(&self) -> bool {
        self.guard & guard::PENDING != 0 && self.resident && fnstsw() & 0x80 != 0
    }

    /// MXCSR as the guest sees it.
    pub fn mxcsr(&mut self) -> u32 {
        if self.resident {
            self.mxcsr |= host_mxcsr() & MXCSR_FLAGS;
        }
        self.mxcsr
    }

    /// Sets MXCSR. Reserved bits are the caller's business ([`MXCSR_MASK`]).
    pub fn set_mxcsr(&mut self, value: u32) {
        self.mxcsr = value & MXCSR_MASK;
        self.set_guard(guard::MXCSR, self.mxcsr & !MXCSR_FLAGS != MXCSR_RESET);
        if self.resident {
            set_host_mxcsr(MXCSR_RESET);
        }
    }

    /// Adds to the sticky flags of MXCSR.
    pub fn raise_mxcsr_flags(&mut self, flags: u32) {
        self.mxcsr |= flags & MXCSR_FLAGS;
    }

    /// Which instructions CR0, CR4 and XCR0 allow; call it whenever one of them changes.
    pub fn update_access(&mut self, cr0: u64, cr4: u64, xcr0: u64) {
        (self.cr0, self.cr4, self.xcr0) = (cr0, cr4, xcr0);
        let em = cr0 & CR0_EM != 0;
        let ts = cr0 & CR0_TS != 0;
        self.set_guard(guard::X87 | guard::MMX, em || ts);
        self.set_guard(guard::WAIT, ts && cr0 & CR0_MP != 0);
        self.set_guard(guard::SSE, em || ts || cr4 & CR4_OSFXSR == 0);
        let no_xsave = cr4 & CR4_OSXSAVE == 0;
        self.set_guard(guard::XSAVE, no_xsave || ts);
        self.set_guard(guard::AVX, no_xsave || ts || xcr0 & 6 != 6);
    }

    /// XCR0 as last given to [`Self::update_access`].
    pub fn xcr0(&self) -> u64 {
        self.xcr0
    }

    /// CR4.OSFXSR.
    pub fn osfxsr(&self) -> bool {
        self.cr4 & CR4_OSFXSR != 0
    }

    /// The exception of an instruction that a bit of `class` ([`guard`]) denies.
    #[cold]
    pub fn denial(&self, class: u8) -> Fault {
        let em = self.cr0 & CR0_EM != 0;
        let undefined = match class & guard::DENY {
            class if class & guard::AVX != 0 => self.cr4 & CR4_OSXSAVE == 0 || self.xcr0 & 6 != 6,
            class if class & guard::XSAVE != 0 => self.cr4 & CR4_OSXSAVE == 0,
            class if class & guard::SSE != 0 => em || self.cr4 & CR4_OSFXSR == 0,
            class if class & guard::MMX != 0 => em,
            _ => false,
        };
        if undefined { Fault::UD } else { Fault::NM }
    }

    /// The exception for an unmasked SIMD floating-point exception.
    pub fn simd_fault(&self) -> Fault {
        if self.cr4 & CR4_OSXMMEXCPT != 0 {
            Fault::new(crate::fault::vector::XM)
        } else {
            Fault::UD
        }
    }

    fn set_guard(&mut self, bits: u8, on: bool) {
        if on { self.guard |= bits } else { self.guard &= !bits }
    }
}

/// The host's MXCSR.
pub fn host_mxcsr() -> u32 {
    let mut value = 0u32;
    // SAFETY: stores four bytes to a local.
    unsafe { asm!("stmxcsr [{}]", in(reg) &mut value, options(nostack, preserves_flags)) };
    value
}

/// Sets the host's MXCSR; `value` has no reserved bits.
pub fn set_host_mxcsr(value: u32) {
    debug_assert_eq!(value & !MXCSR_MASK, 0);
    // SAFETY: loads four bytes from a local; no reserved bit is set.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &value, options(nostack, readonly, preserves_flags)) };
}

/// The x87 control word.
pub fn fnstcw() -> u16 {
    let mut value = 0u16;
    // SAFETY: stores two bytes to a local, never faults.
    unsafe { asm!("fnstcw [{}]", in(reg) &mut value, options(nostack, preserves_flags)) };
    value
}

/// The x87 status word.
pub fn fnstsw() -> u16 {
    let value: u16;
    // SAFETY: never faults.
    unsafe { asm!("fnstsw ax", out("ax") value, options(nomem, nostack, preserves_flags)) };
    value
}

fn fxsave_x87() -> FxImage {
    let mut image = FxImage([0; 512]);
    // SAFETY: 512 bytes, 16-byte aligned.
    unsafe {
        asm!("fxsave64 [{}]", in(reg) image.0.as_mut_ptr(), options(nostack, preserves_flags));
    }
    image.0[24..28].copy_from_slice(&MXCSR_RESET.to_le_bytes());
    image.0[160..].fill(0);
    image
}

/// Loads the x87 unit.
///
/// # Safety
/// The MXCSR of `image` must have no reserved bit set. The host's MXCSR becomes that.
unsafe fn fxrstor_x87(image: &FxImage) {
    // SAFETY: 512 bytes, 16-byte aligned, by the type; MXCSR by the caller. FXRSTOR loads XMM too,
    // which is declared. The x87 registers are the guest's, the compiler uses none.
    unsafe {
        asm!(
            "fxrstor64 [{}]", in(reg) image.0.as_ptr(),
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            options(nostack, readonly, preserves_flags)
        );
    }
}
