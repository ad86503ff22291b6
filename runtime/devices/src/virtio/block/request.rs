//! One request (5.2.6).

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use mvm_memory::GuestMemory;

use super::backend::Backend;
use super::config::{MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS};
use super::slot::Medium;
use super::{Cache, Disk, SECTOR};
use crate::virtio::{Chain, QueueError};

const HEADER: u64 = 16;
const SEGMENT: u64 = 16;

mod kind {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// Status byte.
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// Why a well-formed request could not be done; the driver gets a status, not a reset.
enum Refusal {
    /// The device does not know such requests.
    Unsupported,
    /// Beyond the disk, to a read-only disk, of a bad length.
    Invalid(&'static str),
    /// The host failed.
    Host(io::Error),
}

/// There is nothing to do it with.
const EMPTY: Refusal = Refusal::Invalid("the slot is empty");

impl From<io::Error> for Refusal {
    fn from(e: io::Error) -> Self {
        Self::Host(e)
    }
}

impl From<Refusal> for Outcome {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<QueueError> for Outcome {
    fn from(fault: QueueError) -> Self {
        Self::Fault(fault)
    }
}

impl From<io::Error> for Outcome {
    fn from(e: io::Error) -> Self {
        Self::Refused(Refusal::Host(e))
    }
}

/// What ends a request early.
enum Outcome {
    Refused(Refusal),
    Fault(QueueError),
}

struct Header {
    kind: u32,
    sector: u64,
}

impl Disk {
    /// Does the request in `chain` and returns the bytes written to it, status included.
    pub(super) fn request(
        &self,
        chain: &Chain,
        memory: &GuestMemory,
        write_through: bool,
    ) -> Result<u32, QueueError> {
        let mut raw = [0; HEADER as usize];
        chain.read(memory, 0, &mut raw)?;
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = raw;
        let header = Header {
            kind: u32::from_le_bytes([k0, k1, k2, k3]),
            sector: u64::from_le_bytes(sector),
        };
        let Some(room) = chain.writable_len().checked_sub(1) else {
            return Err(QueueError::Request("block request without room for its status"));
        };
        let (written, status) = match self.execute(&header, chain, memory, room, write_through) {
            Ok(written) => (written, OK),
            Err(Outcome::Refused(why)) => (0, self.refuse(&header, &why)),
            Err(Outcome::Fault(fault)) => return Err(fault),
        };
        chain.write(memory, room, &[status])?;
        Ok(u32::try_from(written + 1).unwrap_or(u32::MAX))
    }

    fn execute(
        &self,
        header: &Header,
        chain: &Chain,
        memory: &GuestMemory,
        room: u64,
        write_through: bool,
    ) -> Result<u64, Outcome> {
        let medium = self.medium();
        let medium = medium.as_deref();
        let disk = medium.map(|medium| &medium.backend);
        let payload = chain.readable_len() - HEADER;
        let count = &self.counters;
        match header.kind {
            kind::IN => {
                bump(&count.reads, 1);
                let disk = covering(disk, header.sector, room)?;
                let mut slices = Vec::with_capacity(chain.writable().len());
                chain.writable_slices(memory, 0, room, &mut slices)?;
                disk.read(slices, header.sector * SECTOR)?;
                bump(&count.read_bytes, room);
                Ok(room)
            }
            kind::OUT => {
                bump(&count.writes, 1);
                writable(medium)?;
                let disk = covering(disk, header.sector, payload)?;
                let mut slices = Vec::with_capacity(chain.readable().len());
                chain.readable_slices(memory, HEADER, payload, &mut slices)?;
                disk.write(slices, header.sector * SECTOR)?;
                bump(&count.written_bytes, payload);
                if write_through {
                    self.flush(disk)?;
                }
                Ok(0)
            }
            kind::FLUSH => {
                bump(&count.flushes, 1);
                self.flush(disk.ok_or(EMPTY)?)?;
                Ok(0)
            }
            kind::GET_ID => {
                let len = room.min(self.serial.len() as u64);
                chain.write(memory, 0, &self.serial[..len as usize])?;
                Ok(len)
            }
            kind::DISCARD | kind::WRITE_ZEROES => {
                bump(&count.discards, 1);
                writable(medium)?;
                let disk = disk.ok_or(EMPTY)?;
                if payload == 0
                    || !payload.is_multiple_of(SEGMENT)
                    || payload / SEGMENT > u64::from(MAX_DISCARD_SEGMENTS)
                {
                    return Err(Refusal::Invalid("bad number of segments").into());
                }
                for at in (HEADER..HEADER + payload).step_by(SEGMENT as usize) {
                    let mut segment = [0; SEGMENT as usize];
                    chain.read(memory, at, &mut segment)?;
                    clear(disk, header.kind, segment)?;
                }
                Ok(0)
            }
            _ => Err(Refusal::Unsupported.into()),
        }
    }

    fn flush(&self, disk: &Backend) -> io::Result<()> {
        match self.cache {
            Cache::WriteBack => disk.flush(),
            Cache::Unsafe => Ok(()),
        }
    }

    fn refuse(&self, header: &Header, why: &Refusal) -> u8 {
        bump(&self.counters.errors, 1);
        let (status, why) = match why {
            Refusal::Unsupported => return UNSUPPORTED,
            Refusal::Invalid(why) => (IO_ERROR, (*why).to_owned()),
            Refusal::Host(e) => (IO_ERROR, e.to_string()),
        };
        if let Some(held_back) = self.log.admit() {
            let Header { kind, sector } = *header;
            tracing::warn!(
                device = self.core.name(),
                kind,
                sector,
                held_back,
                "block request fails: {why}"
            );
        }
        status
    }
}

fn writable(medium: Option<&Medium>) -> Result<(), Refusal> {
    match medium {
        Some(medium) if medium.read_only => Err(Refusal::Invalid("the disk is read-only")),
        _ => Ok(()),
    }
}

/// The disk, if it has `len` bytes at `sector`.
fn covering(disk: Option<&Backend>, sector: u64, len: u64) -> Result<&Backend, Refusal> {
    let disk = disk.ok_or(EMPTY)?;
    if !len.is_multiple_of(SECTOR) {
        return Err(Refusal::Invalid("length is not a whole number of sectors"));
    }
    if !disk.covers(sector, len / SECTOR) {
        return Err(Refusal::Invalid("beyond the end of the disk"));
    }
    Ok(disk)
}

/// One segment of a discard or write-zeroes request (5.2.6, `virtio_blk_discard_write_zeroes`).
fn clear(disk: &Backend, kind: u32, segment: [u8; 16]) -> Result<(), Refusal> {
    const UNMAP: u32 = 1;
    let value = u128::from_le_bytes(segment);
    let (sector, sectors, flags) = (value as u64, (value >> 64) as u32, (value >> 96) as u32);
    let allowed = if kind == kind::WRITE_ZEROES { UNMAP } else { 0 };
    if flags & !allowed != 0 {
        return Err(Refusal::Unsupported);
    }
    if sectors > MAX_DISCARD_SECTORS || !disk.covers(sector, u64::from(sectors)) {
        return Err(Refusal::Invalid("beyond the end of the disk"));
    }
    let (offset, len) = (sector * SECTOR, u64::from(sectors) * SECTOR);
    if kind == kind::DISCARD {
        disk.discard(offset, len)?;
    } else {
        disk.write_zeroes(offset, len, flags & UNMAP != 0)?;
    }
    Ok(())
}

fn bump(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}
