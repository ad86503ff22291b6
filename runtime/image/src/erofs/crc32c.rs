//! CRC-32C as the kernel's `crc32c()` counts: seeded by the caller, not inverted at the end.

/// The Castagnoli polynomial, reflected.
const POLYNOMIAL: u32 = 0x82F6_3B78;

/// Continues `crc` over `bytes`. One block per image: no table is worth its cache lines.
pub(super) fn crc32c(crc: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(crc, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 { crc >> 1 ^ POLYNOMIAL } else { crc >> 1 }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_check_value_is_the_published_one() {
        assert_eq!(!crc32c(!0, b"123456789"), 0xE306_9283);
    }
}
