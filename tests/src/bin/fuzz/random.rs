//! Inputs from a seed: random bytes, or valid ones with some damage.

use mvm_devices::testing::Rng;

/// Up to `longest` random bytes.
pub fn bytes(rng: &mut Rng, longest: usize) -> Vec<u8> {
    let length = below(rng, longest + 1);
    rng.bytes(length)
}

/// An index below `bound`.
pub fn below(rng: &mut Rng, bound: usize) -> usize {
    usize::try_from(rng.below(bound as u64)).unwrap_or(0)
}

/// Changes a few places of `bytes`: bits, bytes, numbers at the edge, runs copied, cut or doubled.
pub fn damage(rng: &mut Rng, bytes: &mut Vec<u8>) {
    for _ in 0..1 + below(rng, 6) {
        let at = below(rng, bytes.len());
        let run = 1 + below(rng, 64.min(bytes.len() - at).max(1));
        match rng.below(7) {
            _ if bytes.is_empty() => return,
            0 => bytes[at] ^= 1 << rng.below(8),
            1 => bytes[at] = rng.next() as u8,
            2 => bytes[at..(at + run).min(at + 8)].fill(0xff),
            3 => bytes[at..at + run].fill(0),
            4 => bytes.truncate(at),
            5 => {
                let part = bytes[at..at + run].to_vec();
                let to = below(rng, bytes.len());
                bytes.splice(to..to, part);
            }
            _ => {
                bytes.drain(at..at + run);
            }
        }
    }
}
