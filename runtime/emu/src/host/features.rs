//! What the host's processor can do for the guest.

use iced_x86::CpuidFeature as F;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::OnceLock;

/// Instruction sets of the host that the engine passes on to the guest.
///
/// A guest sees a CPUID bit only if the field here is set; instructions of a set that the host
/// lacks raise #UD. RDRAND and RDSEED are not listed: the engine has its own where the host has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct HostFeatures {
    pub sse3: bool,
    pub ssse3: bool,
    pub sse4_1: bool,
    pub sse4_2: bool,
    pub popcnt: bool,
    pub aes: bool,
    pub pclmulqdq: bool,
    pub sha: bool,
    pub avx: bool,
    pub avx2: bool,
    pub fma: bool,
    pub f16c: bool,
    pub bmi1: bool,
    pub bmi2: bool,
    pub lzcnt: bool,
    pub movbe: bool,
    pub adx: bool,
    pub clflushopt: bool,
    pub rdrand: bool,
    pub rdseed: bool,
}

impl HostFeatures {
    /// Asks the processor, once.
    pub fn detect() -> &'static Self {
        static FEATURES: OnceLock<HostFeatures> = OnceLock::new();
        FEATURES.get_or_init(|| {
            use std::is_x86_feature_detected as has;
            let avx = has!("avx");
            Self {
                sse3: has!("sse3"),
                ssse3: has!("ssse3"),
                sse4_1: has!("sse4.1"),
                sse4_2: has!("sse4.2"),
                popcnt: has!("popcnt"),
                aes: has!("aes"),
                pclmulqdq: has!("pclmulqdq"),
                sha: has!("sha"),
                avx,
                avx2: avx && has!("avx2"),
                fma: avx && has!("fma"),
                f16c: avx && has!("f16c"),
                bmi1: has!("bmi1"),
                bmi2: has!("bmi2"),
                lzcnt: has!("lzcnt"),
                movbe: has!("movbe"),
                adx: has!("adx"),
                clflushopt: has_clflushopt(),
                rdrand: has!("rdrand"),
                rdseed: has!("rdseed"),
            }
        })
    }

    /// Whether user-level instructions of `feature` may run as the host's own.
    pub fn has(&self, feature: F) -> bool {
        match feature {
            F::INTEL8086
            | F::INTEL186
            | F::INTEL286
            | F::INTEL386
            | F::INTEL486
            | F::X64
            | F::CMOV
            | F::FPU
            | F::FPU287
            | F::FPU387
            | F::MMX
            | F::FXSR
            | F::SSE
            | F::SSE2
            | F::MULTIBYTENOP
            | F::CLFSH
            | F::PREFETCHW
            | F::XSAVE
            | F::XSAVEOPT
            | F::XSAVEC
            | F::RDRAND
            | F::RDSEED => true,
            F::SSE3 => self.sse3,
            F::SSSE3 => self.ssse3,
            F::SSE4_1 => self.sse4_1,
            F::SSE4_2 => self.sse4_2,
            F::POPCNT => self.popcnt,
            F::AES => self.aes,
            F::PCLMULQDQ => self.pclmulqdq,
            F::SHA => self.sha,
            F::AVX => self.avx,
            F::AVX2 => self.avx2,
            F::FMA => self.fma,
            F::F16C => self.f16c,
            F::BMI1 => self.bmi1,
            F::BMI2 => self.bmi2,
            F::LZCNT => self.lzcnt,
            F::MOVBE => self.movbe,
            F::ADX => self.adx,
            F::CLFLUSHOPT => self.clflushopt,
            _ => false,
        }
    }
}

/// CPUID 7, EBX bit 23 (SDM vol. 2, "CPUID").
fn has_clflushopt() -> bool {
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).ebx >> 23 & 1 != 0
}
