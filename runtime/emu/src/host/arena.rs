//! Executable memory of the stubs.
//!
//! One sealed memfd, mapped twice: writable, and executable. No mapping is both, and no other
//! writable one can be made once the file is sealed. The code in it is generated here from forms, never
//! copied from the guest, and lives as long as the process.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Bytes of address space for stubs. Pages are touched as stubs are made; the number of forms
/// (code, immediate, memory or not) bounds them far below this.
pub const ARENA_SIZE: usize = 32 << 20;

/// Where the executable mapping starts; null before [`init`].
static EXEC: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());

static ARENA: OnceLock<Result<Arena, i32>> = OnceLock::new();

/// The two views of the stub memory.
#[derive(Debug)]
pub struct Arena {
    write: *mut u8,
}

// SAFETY: the pointer is to a shared mapping that is never unmapped; writers are serialised by
// the lock round `Arena::write`'s only caller (`stub::Table`).
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

/// Makes the arena if there is none yet. Call it before the process gives up the right to map
/// executable memory.
///
/// # Errors
/// The host refuses a memfd or an executable mapping of it.
pub fn init() -> io::Result<&'static Arena> {
    match ARENA.get_or_init(|| Arena::new().map_err(|e| e.raw_os_error().unwrap_or(libc::ENOMEM))) {
        Ok(arena) => Ok(arena),
        Err(code) => Err(io::Error::from_raw_os_error(*code)),
    }
}

/// Address of the stub at `offset`. Only meaningful for offsets that [`Arena::write`] has filled.
#[inline(always)]
pub fn entry(offset: u32) -> *const u8 {
    EXEC.load(Ordering::Relaxed).wrapping_add(offset as usize)
}

impl Arena {
    fn new() -> io::Result<Self> {
        let (write, exec) = map_twice(c"mvm-emu-stubs", ARENA_SIZE)?;
        EXEC.store(exec, Ordering::Release);
        Ok(Self { write })
    }

    /// Puts `code` at `offset`; the caller holds the lock that hands out offsets.
    ///
    /// Returns false when it does not fit.
    pub fn write(&self, offset: usize, code: &[u8]) -> bool {
        if offset.checked_add(code.len()).is_none_or(|end| end > ARENA_SIZE) {
            return false;
        }
        // SAFETY: the range lies in the writable mapping (checked above), which is never unmapped.
        // Nobody executes it yet: its offset has not been given to anyone.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.add(offset), code.len()) };
        true
    }
}

/// Maps a sealed memfd of `size` bytes twice: writable, and executable. No mapping is both, and neither the file nor
/// the executable mapping can be made writable any more.
///
/// # Errors
/// The host refuses a memfd or an executable mapping of it.
pub(crate) fn map_twice(name: &std::ffi::CStr, size: usize) -> io::Result<(*mut u8, *mut u8)> {
    let file = memfd(name)?;
    file.set_len(size as u64)?;
    let write = map(&file, size, libc::PROT_READ | libc::PROT_WRITE)?;
    let seals =
        libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SEAL;
    // SAFETY: fcntl on a descriptor we own, with integer arguments.
    let sealed = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } == 0;
    let sealed = if sealed { Ok(()) } else { Err(io::Error::last_os_error()) };
    // Behind the seal: a shared mapping from before could be made writable later.
    match sealed.and_then(|()| map(&file, size, libc::PROT_READ | libc::PROT_EXEC)) {
        Ok(exec) => Ok((write, exec)),
        Err(error) => {
            // SAFETY: mapped just above, used by nobody.
            unsafe { libc::munmap(write.cast(), size) };
            Err(error)
        }
    }
}

fn memfd(name: &std::ffi::CStr) -> io::Result<File> {
    // Kernels since 6.3 may forbid executable memfds unless asked for; older ones do not know
    // the flag.
    const MFD_EXEC: libc::c_uint = 0x10;
    let base = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    let mut error = io::Error::from_raw_os_error(libc::EINVAL);
    for flags in [base | MFD_EXEC, base] {
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
        if fd >= 0 {
            // SAFETY: a descriptor just made, owned by nobody else.
            return Ok(unsafe { File::from_raw_fd(fd) });
        }
        error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINVAL) {
            break;
        }
    }
    Err(error)
}

fn map(file: &File, size: usize, protection: libc::c_int) -> io::Result<*mut u8> {
    // SAFETY: a new mapping at an address of the kernel's choice.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size,
            protection,
            libc::MAP_SHARED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            0,
        )
    };
    if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(address.cast()) }
}
