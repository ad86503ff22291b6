//! The XSAVE area, in the standard format on both sides.

use crate::XSAVE_AREA_SIZE;

/// Bytes left to software in the legacy region, where KVM notes things for itself.
const SOFTWARE: std::ops::Range<usize> = 464..512;
/// XSTATE_BV.
const XSTATE_BV: std::ops::Range<usize> = 512..520;
/// MXCSR_MASK: what the processor can do, not state.
const MXCSR_MASK: std::ops::Range<usize> = 28..32;
/// Bits of MXCSR that every processor since AMD64 has.
const ALL_OF_MXCSR: u32 = 0xffff;

/// x87, SSE, AVX.
const PORTABLE: u64 = 7;

/// The area as a state has it: legacy region, header and AVX, and the rest only if it is in use.
pub(super) fn area_from(mut area: Vec<u8>) -> Vec<u8> {
    area[SOFTWARE].fill(0);
    area[MXCSR_MASK].copy_from_slice(&ALL_OF_MXCSR.to_le_bytes());
    if components(&area) & !PORTABLE == 0 {
        area.truncate(XSAVE_AREA_SIZE);
    }
    area
}

/// The components that an area has.
pub(super) fn components(area: &[u8]) -> u64 {
    let mut bits = [0; 8];
    if let Some(bytes) = area.get(XSTATE_BV) {
        bits.copy_from_slice(bytes);
    }
    u64::from_le_bytes(bits)
}

/// Why KVM would not take an area of this size and content, on a machine whose areas have `room` bytes.
pub(super) fn check(area: &[u8], room: usize) -> Result<(), String> {
    /// MXCSR.
    const MXCSR: std::ops::Range<usize> = 24..28;
    if area.len() < XSTATE_BV.end + 56 || area.len() > room {
        return Err(format!("an XSAVE area of {} bytes", area.len()));
    }
    let mut mxcsr = [0; 4];
    mxcsr.copy_from_slice(&area[MXCSR]);
    let mxcsr = u32::from_le_bytes(mxcsr);
    if mxcsr & !ALL_OF_MXCSR != 0 {
        return Err(format!("MXCSR {mxcsr:#x}"));
    }
    if components(area) & !PORTABLE != 0 && area.len() <= XSAVE_AREA_SIZE {
        return Err("an XSAVE area without some of its components".into());
    }
    Ok(())
}
