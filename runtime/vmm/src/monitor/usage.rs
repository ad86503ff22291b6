//! What this process costs the host.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use nix::time::ClockId;

/// Memory of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Memory {
    /// Resident, guest RAM included, in bytes.
    pub resident: u64,
    /// Resident and neither shared memory (guest RAM) nor of a file: what engine and devices
    /// allocate for themselves, in bytes.
    pub private: u64,
}

/// A way to the figures that needs no path later.
#[derive(Debug)]
pub(super) struct Usage {
    statm: File,
    page: u64,
}

impl Usage {
    /// Opens the kernel's figures about this process.
    pub fn open() -> io::Result<Self> {
        let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?;
        let page = page.and_then(|p| u64::try_from(p).ok()).unwrap_or(4096);
        Ok(Self { statm: File::open("/proc/self/statm")?, page })
    }

    /// Memory now.
    pub fn memory(&self) -> io::Result<Memory> {
        let mut text = [0; 256];
        let len = self.statm.read_at(&mut text, 0)?;
        // proc_pid_statm(5): size, resident, shared, ... in pages.
        let text = String::from_utf8_lossy(&text[..len]);
        let mut fields = text.split_ascii_whitespace().skip(1).map(str::parse::<u64>);
        let mut next = || fields.next().and_then(Result::ok).ok_or(io::ErrorKind::InvalidData);
        let (resident, shared) = (next()?, next()?);
        Ok(Memory {
            resident: resident * self.page,
            private: resident.saturating_sub(shared) * self.page,
        })
    }

    /// Processor time used so far.
    pub fn cpu_time(&self) -> Duration {
        ClockId::CLOCK_PROCESS_CPUTIME_ID.now().map_or(Duration::ZERO, Duration::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_plausible_and_follow_allocations() {
        let usage = Usage::open().unwrap();
        let before = usage.memory().unwrap();
        assert!(before.private > 0 && before.private <= before.resident);
        // Black box: an allocation that nobody reads need not be made.
        let block = std::hint::black_box(vec![1u8; 32 << 20]);
        let after = usage.memory().unwrap();
        assert!(after.private >= before.private + (16 << 20), "{before:?} {after:?}");
        drop(block);
        assert!(usage.cpu_time() > Duration::ZERO);
    }
}
