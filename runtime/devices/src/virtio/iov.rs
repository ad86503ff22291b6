//! File and socket I/O straight to and from guest memory.
//!
//! Guest memory changes under our hands, so no Rust reference to it may exist; the system calls get
//! addresses, and what they stored is marked in the page tracker before anyone else hears of it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::bitmap::Bitmap;

use super::GuestSlice;

/// Most pieces the kernel takes in one call (IOV_MAX).
const MAX_PIECES: usize = 1024;

/// What is done with the bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Io {
    /// `pread`/`pwrite` at this offset.
    At(u64),
    /// `readv`/`writev`, for pipes and terminals.
    Stream,
    /// `recvmsg`/`sendmsg`, never blocking, never SIGPIPE.
    Socket,
}

/// Reads from `fd` to `slices` once, as `read(2)` does: may give less, 0 is the end.
pub(crate) fn read(fd: BorrowedFd<'_>, slices: &[GuestSlice<'_>], how: Io) -> io::Result<usize> {
    let slices = &slices[..slices.len().min(MAX_PIECES)];
    let guards: Vec<_> = slices.iter().map(|s| s.ptr_guard_mut()).collect();
    let mut pieces: Vec<libc::iovec> = guards
        .iter()
        .map(|g| libc::iovec { iov_base: g.as_ptr().cast(), iov_len: g.len() })
        .collect();
    let (fd, count) = (fd.as_raw_fd(), pieces.len() as libc::c_int);
    // SAFETY: each piece is guest memory that stays mapped while `slices` is borrowed and to which
    // no Rust reference exists; the kernel stores within the given lengths only.
    let n = unsafe {
        match how {
            Io::At(offset) => libc::preadv(fd, pieces.as_ptr(), count, file_offset(offset)?),
            Io::Stream => libc::readv(fd, pieces.as_ptr(), count),
            Io::Socket => libc::recvmsg(fd, &mut message(&mut pieces), libc::MSG_DONTWAIT),
        }
    };
    let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
    drop(guards);
    let mut left = n;
    for slice in slices {
        let len = slice.len().min(left);
        slice.bitmap().mark_dirty(0, len);
        left -= len;
    }
    Ok(n)
}

/// Writes `slices` to `fd` once, as `write(2)` does: may take less.
pub(crate) fn write(fd: BorrowedFd<'_>, slices: &[GuestSlice<'_>], how: Io) -> io::Result<usize> {
    let slices = &slices[..slices.len().min(MAX_PIECES)];
    let guards: Vec<_> = slices.iter().map(|s| s.ptr_guard()).collect();
    let mut pieces: Vec<libc::iovec> = guards
        .iter()
        .map(|g| libc::iovec { iov_base: g.as_ptr().cast_mut().cast(), iov_len: g.len() })
        .collect();
    let (fd, count) = (fd.as_raw_fd(), pieces.len() as libc::c_int);
    // SAFETY: each piece is guest memory that stays mapped while `slices` is borrowed; the kernel
    // only reads it.
    let n = unsafe {
        match how {
            Io::At(offset) => libc::pwritev(fd, pieces.as_ptr(), count, file_offset(offset)?),
            Io::Stream => libc::writev(fd, pieces.as_ptr(), count),
            Io::Socket => {
                let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
                libc::sendmsg(fd, &message(&mut pieces), flags)
            }
        }
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Drops the first `n` bytes of `slices`.
pub(crate) fn advance(slices: &mut Vec<GuestSlice<'_>>, mut n: usize) {
    let mut gone = 0;
    for slice in slices.iter_mut() {
        if n < slice.len() {
            if let Ok(rest) = slice.offset(n) {
                *slice = rest;
            }
            break;
        }
        n -= slice.len();
        gone += 1;
    }
    slices.drain(..gone);
}

fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn message(pieces: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: a message header of zeros is a valid one: no address, no control data, no pieces.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = pieces.as_mut_ptr();
    header.msg_iovlen = pieces.len();
    header
}
