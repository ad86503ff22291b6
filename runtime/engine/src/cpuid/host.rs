//! CPUID of the host.

use core::arch::x86_64::{__cpuid_count, CpuidResult};
use std::sync::{Mutex, PoisonError};

/// Answers so far: in a virtual machine the instruction costs a trap each time.
static ANSWERS: Mutex<Vec<((u32, u32), CpuidResult)>> = Mutex::new(Vec::new());

/// Leaf `leaf`, subleaf `subleaf` of the host.
pub fn query(leaf: u32, subleaf: u32) -> CpuidResult {
    let mut answers = ANSWERS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, answer)) = answers.iter().find(|(key, _)| *key == (leaf, subleaf)) {
        return *answer;
    }
    let answer = __cpuid_count(leaf, subleaf);
    answers.push(((leaf, subleaf), answer));
    answer
}

/// Whether the host's kernel saves AVX state, so that AVX instructions can run.
pub fn avx_usable() -> bool {
    std::arch::is_x86_feature_detected!("avx")
}
