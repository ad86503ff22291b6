//! Feature bits (5.2.3) and configuration layout (5.2.4).

pub mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Most sectors of one discard or write-zeroes segment (2 GiB).
pub const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// Most segments of one discard or write-zeroes request.
pub const MAX_DISCARD_SEGMENTS: u32 = 64;

/// Sectors per page: discards of less free nothing.
const DISCARD_ALIGNMENT: u32 = 8;

#[derive(Debug)]
pub struct Config {
    /// In sectors.
    pub capacity: u64,
    /// Most data buffers of one request.
    pub seg_max: u32,
}

impl Config {
    pub fn to_bytes(&self) -> [u8; 60] {
        let mut bytes = [0; 60];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &self.capacity.to_le_bytes());
        put(12, &self.seg_max.to_le_bytes());
        put(20, &(super::SECTOR as u32).to_le_bytes());
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &MAX_DISCARD_SEGMENTS.to_le_bytes());
        put(44, &DISCARD_ALIGNMENT.to_le_bytes());
        put(48, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(52, &MAX_DISCARD_SEGMENTS.to_le_bytes());
        // Writing zeroes may deallocate.
        put(56, &[1]);
        bytes
    }
}
