//! A computation that keeps all vector registers busy. It gives the same on every processor, so that
//! a test can run it outside of the guest and compare.

use core::arch::x86_64::*;

/// Steps in a round.
const STEPS: u32 = 1000;

/// State: 8 registers of integers, 5 of floating-point numbers, one general one.
#[derive(Clone, Copy)]
pub struct Checksum {
    integers: [__m128i; 8],
    fractions: [__m128d; 5],
    mixed: u64,
}

impl Checksum {
    /// A state that depends on `seed`.
    pub fn new(seed: u64) -> Self {
        let mut next = seed | 1;
        let mut random = || {
            next = next
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            next
        };
        // SAFETY: every x86-64 processor has SSE2.
        unsafe {
            let mut integers = [_mm_setzero_si128(); 8];
            for lane in &mut integers {
                *lane = _mm_set_epi64x(random() as i64, random() as i64);
            }
            let mut fractions = [_mm_setzero_pd(); 5];
            for lane in &mut fractions {
                let mut fraction = || 0.1 + 0.8 * (random() >> 12) as f64 / (1u64 << 52) as f64;
                *lane = _mm_set_pd(fraction(), fraction());
            }
            Self { integers, fractions, mixed: random() }
        }
    }

    /// Goes on for `rounds` and returns the checksum of the state.
    pub fn run(&mut self, rounds: u32) -> u64 {
        self.run_with(rounds, || {})
    }

    /// The same, with a `mark` after each round, while the registers are full.
    pub fn run_with(&mut self, rounds: u32, mark: impl Fn()) -> u64 {
        let Self { mut integers, mut fractions, mut mixed } = *self;
        // SAFETY: every x86-64 processor has SSE2.
        unsafe {
            let (one, rate) = (_mm_set1_pd(1.0), _mm_set1_pd(3.99));
            for _ in 0..rounds {
                for _ in 0..STEPS {
                    for at in 0..8 {
                        let mut x = integers[at];
                        x = _mm_xor_si128(x, _mm_slli_epi64::<13>(x));
                        x = _mm_xor_si128(x, _mm_srli_epi64::<7>(x));
                        integers[at] = _mm_add_epi64(x, integers[(at + 1) % 8]);
                    }
                    // The logistic map, chaotic: the smallest error would grow.
                    for x in &mut fractions {
                        *x = _mm_mul_pd(_mm_mul_pd(rate, *x), _mm_sub_pd(one, *x));
                    }
                    let low = _mm_cvtsi128_si64(integers[0]) as u64;
                    mixed = (mixed ^ low).rotate_left(5).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                }
                mark();
            }
        }
        *self = Self { integers, fractions, mixed };
        self.value()
    }

    /// All of the state in one number.
    fn value(&self) -> u64 {
        // SAFETY: every x86-64 processor has SSE2.
        let halves = |x: __m128i| unsafe {
            [_mm_cvtsi128_si64(x) as u64, _mm_cvtsi128_si64(_mm_unpackhi_epi64(x, x)) as u64]
        };
        // SAFETY: as above.
        let fractions = self.fractions.map(|x| unsafe { _mm_castpd_si128(x) });
        let lanes = self.integers.iter().chain(&fractions).flat_map(|x| halves(*x));
        lanes.fold(self.mixed, |sum, x| {
            (sum ^ x).rotate_left(23).wrapping_mul(0xff51_afd7_ed55_8ccd)
        })
    }
}
