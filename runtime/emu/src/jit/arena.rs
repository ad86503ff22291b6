//! Memory for translated code: one sealed memfd, mapped twice (J11).

use std::arch::asm;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::host::arena::map_twice;

/// The code memory of a machine. Whoever has a [`Piece`] of it writes there, and nobody else does, but for
/// [`Arena::patch`].
#[derive(Debug)]
pub struct Arena {
    write: *mut u8,
    exec: *mut u8,
    /// Bytes of address space. Pages are touched as code is made.
    size: usize,
    /// By part: how many of its bytes were ever written.
    touched: Box<[AtomicU32]>,
}

/// A part of an arena that one vCPU puts code to, from the start to the end. Parts are handed out once in each epoch
/// ([`Store`](super::store::Store)), and not used beyond.
#[derive(Debug, Default)]
pub struct Piece {
    at: usize,
    end: usize,
}

/// Bytes of a part: of the largest piece, and of the writable mapping that is let go at a time.
pub const PART: usize = 1 << 20;

/// Bytes of a line of the host's caches. What a jump is patched by lies in one, so that whoever executes it meanwhile finds
/// it either as it was or as it will be.
pub const LINE: usize = 64;

// SAFETY: the mappings belong to this value, and stay until it is dropped.
unsafe impl Send for Arena {}
// SAFETY: as above; writers have pieces of their own, and patches are single stores.
unsafe impl Sync for Arena {}

impl Piece {
    pub fn new(range: Range<usize>) -> Self {
        Self { at: range.start, end: range.end }
    }

    /// Where the next code goes.
    pub fn at(&self) -> usize {
        self.at
    }

    /// Bytes left.
    pub fn room(&self) -> usize {
        self.end - self.at
    }
}

impl Arena {
    /// Maps a new arena of `size` bytes, a multiple of [`PART`].
    ///
    /// # Errors
    /// The host refuses a memfd or an executable mapping of it.
    pub fn new(size: usize) -> io::Result<Self> {
        let (write, exec) = map_twice(c"mvm-emu-code", size)?;
        let touched = (0..size / PART).map(|_| AtomicU32::new(0)).collect();
        Ok(Self { write, exec, size, touched })
    }

    /// Bytes of it.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Address of the byte at `offset` where it is executed.
    pub fn entry(&self, offset: u32) -> u64 {
        self.exec as u64 + u64::from(offset)
    }

    /// Puts `code` to where `piece` goes on.
    ///
    /// # Panics
    /// If it does not fit: the callers look before they make code.
    pub fn put(&self, piece: &mut Piece, code: &[u8]) {
        assert!(code.len() <= piece.room() && piece.end <= self.size, "the piece's size");
        // SAFETY: the range lies in the writable mapping (checked above). The piece's owner alone writes there, and nobody
        // executes what he has not put there yet.
        unsafe {
            let to = self.write.add(piece.at);
            std::ptr::copy_nonoverlapping(code.as_ptr(), to, code.len());
        }
        piece.at += code.len();
        let (part, within) = ((piece.at - 1) / PART, (piece.at - 1) % PART);
        if let Some(touched) = self.touched.get(part) {
            touched.fetch_max(within as u32 + 1, Ordering::Relaxed);
        }
    }

    /// Makes the distance of a jump at `site` lead to `target`, both offsets, while others may execute it.
    ///
    /// # Panics
    /// If the distance does not lie in one [`LINE`].
    pub fn patch(&self, site: u32, target: u32) {
        let distance = i64::from(target) - (i64::from(site) + 4);
        let site = site as usize;
        assert!(site + 4 <= self.size && site % LINE + 4 <= LINE, "a jump that can be patched");
        // SAFETY: four bytes of the writable mapping (checked above). Stores in one line are done as a whole, aligned or
        // not (SDM vol. 3, 9.1.1), and fetches see lines.
        unsafe {
            let to = self.write.add(site);
            asm!("mov [{}], {:e}", in(reg) to, in(reg) distance as i32,
                options(nostack, preserves_flags));
        }
    }

    /// The `N` bytes at `offset`, which have been put there.
    ///
    /// # Panics
    /// If that is outside.
    pub fn read<const N: usize>(&self, offset: u32) -> [u8; N] {
        assert!(offset as usize + N <= self.size, "the arena's size");
        // SAFETY: the range lies in the executable mapping, which can be read. Nobody writes there any more.
        unsafe { self.exec.add(offset as usize).cast::<[u8; N]>().read() }
    }

    /// Bytes of memory that it takes.
    pub fn touched(&self) -> usize {
        self.touched.iter().map(|part| part.load(Ordering::Relaxed) as usize).sum()
    }

    /// What `piece` is in is seldom written to from now on. Pages that are mapped a second time for that count twice wherever a
    /// process's memory is looked at.
    pub fn let_go(&self, piece: &Piece) {
        if piece.end == 0 {
            return;
        }
        let start = (piece.end - 1) / PART * PART;
        // SAFETY: the part lies in the writable mapping, which is of a file and shared: its content stays, and whoever writes
        // there has the page again.
        unsafe { libc::madvise(self.write.add(start).cast(), PART, libc::MADV_DONTNEED) };
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: both mappings are ours, and nothing executes: the vCPUs have gone.
        unsafe {
            libc::munmap(self.write.cast(), self.size);
            libc::munmap(self.exec.cast(), self.size);
        }
    }
}
