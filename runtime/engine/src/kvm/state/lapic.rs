//! The local APIC's registers.
//!
//! Ours are a dword for every 16 bytes of the register page, KVM's the bytes of the page. The id is the one thing in
//! which they differ: in x2APIC mode KVM keeps showing it in bits 31:24 (as long as KVM_CAP_X2APIC_API is not
//! asked for otherwise).

use kvm_bindings::kvm_lapic_state;

/// Registers by offset / 16 (SDM vol. 3, table 11-1).
mod reg {
    pub const ID: usize = 0x02;
    pub const PPR: usize = 0x0a;
    pub const ISR: usize = 0x10;
    pub const IRR: usize = 0x20;
    pub const LVT_TIMER: usize = 0x32;
    pub const INITIAL: usize = 0x38;
    pub const CURRENT: usize = 0x39;
}

/// Registers of a page.
pub(super) const COUNT: usize = 64;

/// APIC_BASE: enabled, in x2APIC mode.
const X2APIC: u64 = 3 << 10;

/// LVT timer: the mode, which is one-shot if zero.
const TIMER_MODE: u32 = 3 << 17;
const TSC_DEADLINE: u32 = 2 << 17;

fn in_x2apic(base: u64) -> bool {
    base & X2APIC == X2APIC
}

pub(super) fn registers_from(state: &kvm_lapic_state, base: u64) -> Vec<u32> {
    let mut regs: Vec<u32> = state
        .regs
        .chunks_exact(16)
        .map(|chunk| u32::from_le_bytes([0, 1, 2, 3].map(|i| chunk[i] as u8)))
        .collect();
    if in_x2apic(base) {
        regs[reg::ID] >>= 24;
    }
    regs[reg::PPR] = priority(&regs);
    regs
}

/// The processor's priority (SDM vol. 3, 11.8.3.1), which KVM's page has from some time before.
fn priority(regs: &[u32]) -> u32 {
    const TPR: usize = 0x08;
    let tpr = regs[TPR] & 0xff;
    let in_service = highest(&regs[reg::ISR..reg::ISR + 8]).unwrap_or(0) & 0xf0;
    if tpr & 0xf0 >= in_service { tpr } else { in_service }
}

fn highest(words: &[u32]) -> Option<u32> {
    let index = words.iter().rposition(|&word| word != 0)?;
    Some(index as u32 * 32 + 31 - words[index].leading_zeros())
}

/// The page for KVM of vCPU `index`.
pub(super) fn registers_to(regs: &[u32], index: u32) -> kvm_lapic_state {
    let mut words = [0u32; COUNT];
    words.iter_mut().zip(regs).for_each(|(slot, word)| *slot = *word);
    words[reg::ID] = index << 24;
    // A count that has run down and is not repeated would expire once more, since KVM starts the timer with
    // what is left of it.
    if words[reg::LVT_TIMER] & TIMER_MODE == 0 && words[reg::CURRENT] == 0 {
        words[reg::INITIAL] = 0;
    }
    let mut state = kvm_lapic_state::default();
    for (chunk, word) in state.regs.chunks_exact_mut(16).zip(words) {
        for (byte, value) in chunk.iter_mut().zip(word.to_le_bytes()) {
            *byte = value as std::ffi::c_char;
        }
    }
    state
}

/// Whether interrupt `vector` is in service: one that was accepted and is not comes from elsewhere.
pub(super) fn in_service(regs: &[u32], vector: u8) -> bool {
    let word = regs.get(reg::ISR + usize::from(vector >> 5));
    word.is_some_and(|word| word >> (vector & 31) & 1 != 0)
}

/// Takes interrupt `vector` out of service and makes it a request again: it was accepted, but is not delivered.
pub(super) fn unaccept(regs: &mut [u32], vector: u8) {
    let (word, bit) = (usize::from(vector >> 5), 1 << (vector & 31));
    if regs.len() > reg::IRR + word {
        regs[reg::ISR + word] &= !bit;
        regs[reg::IRR + word] |= bit;
        regs[reg::PPR] = priority(regs);
    }
}

/// Whether the timer counts down by itself, so that KVM may hold an expiry that its page does not show.
pub(super) fn counts(regs: &[u32]) -> bool {
    regs[reg::LVT_TIMER] & TSC_DEADLINE == 0 && regs[reg::INITIAL] != 0
}

/// Whether it counts once, and has run down.
pub(super) fn has_run_down(regs: &[u32]) -> bool {
    counts(regs) && regs[reg::LVT_TIMER] & TIMER_MODE == 0 && regs[reg::CURRENT] == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(changes: &[(usize, u32)]) -> Vec<u32> {
        let mut regs = vec![0; COUNT];
        changes.iter().for_each(|&(at, value)| regs[at] = value);
        regs
    }

    #[test]
    fn registers_survive_both_ways_in_both_modes() {
        for (base, id) in [(0xfee0_0900, 3 << 24), (0xfee0_0d00, 3)] {
            let regs =
                page(&[(reg::ID, id), (0x0f, 0x1ff), (0x30, 0x4_0041), (0x38, 9), (0x39, 5)]);
            assert_eq!(registers_from(&registers_to(&regs, 3), base), regs);
        }
    }

    #[test]
    fn an_accepted_interrupt_becomes_a_request_again() {
        let mut regs = page(&[(reg::ISR + 1, 1 << 5 | 1), (reg::IRR + 2, 1)]);
        regs[reg::PPR] = priority(&regs);
        assert_eq!(regs[reg::PPR], 0x20);
        unaccept(&mut regs, 0x25);
        assert_eq!((regs[reg::ISR + 1], regs[reg::IRR + 1], regs[reg::IRR + 2]), (1, 1 << 5, 1));
        assert_eq!(regs[reg::PPR], 0x20, "0x20 is still in service");
        unaccept(&mut [], 0x25);
        assert!(in_service(&regs, 0x20) && !in_service(&regs, 0x25) && !in_service(&[], 0x25));
    }

    #[test]
    fn a_count_that_has_run_down_is_not_started_again() {
        let initial = |regs: &[u32]| registers_from(&registers_to(regs, 0), 0)[reg::INITIAL];
        assert_eq!(initial(&page(&[(reg::INITIAL, 5)])), 0);
        assert_eq!(initial(&page(&[(reg::INITIAL, 5), (reg::CURRENT, 1)])), 5);
        assert_eq!(initial(&page(&[(reg::INITIAL, 5), (reg::LVT_TIMER, 1 << 17)])), 5);
    }
}
