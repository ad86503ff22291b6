//! The control queue (5.1.6.5).

use super::config::feature;
use crate::virtio::{Chain, QueueError, VirtQueue};
use mvm_memory::GuestMemory;

const OK: u8 = 0;
const ERR: u8 = 1;

/// VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET.
const MQ_PAIRS_SET: (u8, u8) = (4, 0);
/// VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET.
const OFFLOADS_SET: (u8, u8) = (5, 0);
/// No command that is understood is longer.
const MAX_COMMAND: usize = 10;

/// What the driver asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Use this many pairs.
    Pairs(u16),
    /// Use these offloads (feature bits) for received packets.
    Offloads(u64),
}

/// What is there while the driver is.
#[derive(Debug)]
pub struct Work {
    pub queue: VirtQueue,
    pub chain: Chain,
    pub features: u64,
}

/// Reads a command, has it done, and answers it. Returns the bytes written.
pub fn answer(
    chain: &Chain,
    memory: &GuestMemory,
    features: u64,
    execute: impl FnOnce(Command) -> bool,
) -> Result<u32, QueueError> {
    if chain.writable_len() == 0 {
        return Err(QueueError::Request("a control command has no room for its answer"));
    }
    let mut bytes = [0; MAX_COMMAND];
    let len = usize::try_from(chain.readable_len()).unwrap_or(usize::MAX).min(MAX_COMMAND);
    chain.read(memory, 0, &mut bytes[..len])?;
    let done = parse(&bytes[..len], features).is_some_and(execute);
    chain.write(memory, 0, &[if done { OK } else { ERR }])?;
    Ok(1)
}

fn parse(bytes: &[u8], features: u64) -> Option<Command> {
    let (&[class, command], data) = bytes.split_first_chunk()?;
    match (class, command) {
        MQ_PAIRS_SET if features & feature::MQ != 0 => {
            Some(Command::Pairs(u16::from_le_bytes(*data.first_chunk()?)))
        }
        OFFLOADS_SET if features & feature::CTRL_GUEST_OFFLOADS != 0 => {
            let wanted = u64::from_le_bytes(*data.first_chunk()?);
            // Only what was negotiated can be switched on.
            (wanted & !(features & feature::OFFLOADS) == 0).then_some(Command::Offloads(wanted))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_negotiated_is_a_command() {
        let all = feature::MQ | feature::CTRL_GUEST_OFFLOADS | feature::GUEST_CSUM;
        assert_eq!(parse(&[4, 0, 2, 0], all), Some(Command::Pairs(2)));
        assert_eq!(parse(&[4, 0, 2, 0], all & !feature::MQ), None);
        let offloads = |bits: u64| [&[5, 0], &bits.to_le_bytes()[..]].concat();
        assert_eq!(parse(&offloads(2), all), Some(Command::Offloads(2)));
        assert_eq!(parse(&offloads(2 | 1 << 7), all), None, "TSO was not negotiated");
        assert_eq!(parse(&offloads(0), feature::MQ), None);
        for bad in [&[][..], &[4], &[4, 0], &[4, 0, 1], &[4, 1, 1, 0], &[5, 0, 1], &[9, 9, 9, 9]] {
            assert_eq!(parse(bad, all), None, "{bad:?}");
        }
    }
}
