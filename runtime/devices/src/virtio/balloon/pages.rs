//! Pages that the guest gives up.

use mvm_memory::{GuestMemory, GuestRam, PAGE_SHIFT, PAGE_SIZE};

use crate::virtio::{Chain, QueueError};

/// Most page frame numbers in one chain; Linux sends 256.
const MAX_FRAMES: u64 = 64 << 10;

/// Drops the pages whose frame numbers `chain` holds (5.5.6.1). Neighbours go in one piece. Returns
/// bytes released.
pub fn drop_frames(
    ram: &GuestRam,
    chain: &Chain,
    memory: &GuestMemory,
    frames: &mut Vec<u32>,
) -> Result<u64, QueueError> {
    let count = chain.readable_len() / 4;
    if !chain.readable_len().is_multiple_of(4) || count > MAX_FRAMES {
        return Err(QueueError::Request("balloon request is not a list of page frames"));
    }
    frames.clear();
    let mut buffer = [0; 1024];
    let mut at = 0;
    while at < chain.readable_len() {
        let part = &mut buffer[..(chain.readable_len() - at).min(1024) as usize];
        chain.read(memory, at, part)?;
        frames.extend(part.chunks_exact(4).map(|f| u32::from_le_bytes([f[0], f[1], f[2], f[3]])));
        at += part.len() as u64;
    }
    // Linux hands pages out from the top, so a run is often listed backwards.
    frames.sort_unstable();
    frames.dedup();
    let runs = frames.chunk_by(|&a, &b| a.checked_add(1) == Some(b));
    Ok(runs.map(|run| drop_run(ram, run)).sum())
}

fn drop_run(ram: &GuestRam, run: &[u32]) -> u64 {
    let first = run.first().map_or(0, |&frame| u64::from(frame) << PAGE_SHIFT);
    ram.discard(first, run.len() as u64 * PAGE_SIZE as u64)
}

/// Drops the pages that the writable buffers of `chain` cover (5.5.6.8). Returns bytes released.
pub fn drop_ranges(ram: &GuestRam, chain: &Chain) -> u64 {
    chain.writable().iter().map(|b| ram.discard(b.addr.0, u64::from(b.len))).sum()
}
