//! A tap device of the host (Linux, `tun(4)`, Documentation/networking/tuntap.rst).

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::backend::{NetBackend, Offloads};
use super::config::HEADER;
use crate::virtio::GuestSlice;
use crate::virtio::iov::{self, Io};

/// One queue of a tap device that was opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
#[derive(Debug)]
pub struct Tap {
    file: File,
    attached: Mutex<bool>,
}

impl Tap {
    /// Checks that `fd` is one and sets its header's length.
    ///
    /// # Errors
    /// It is no tap device or lacks a flag, or the host refuses.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = sys::flags(fd.as_fd())?;
        for (flag, name) in [
            (libc::IFF_TAP, "IFF_TAP"),
            (libc::IFF_NO_PI, "IFF_NO_PI"),
            (libc::IFF_VNET_HDR, "IFF_VNET_HDR"),
        ] {
            if i32::from(flags) & flag == 0 {
                let what = format!("the network descriptor is no tap device with {name}");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
            }
        }
        let mode = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(mode | OFlag::O_NONBLOCK))?;
        sys::set_header_len(fd.as_fd(), HEADER as i32)?;
        sys::set_offloads(fd.as_fd(), 0)?;
        let attached = Mutex::new(i32::from(flags) & libc::IFF_DETACH_QUEUE == 0);
        Ok(Self { file: File::from(fd), attached })
    }
}

impl NetBackend for Tap {
    fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn receive(&self, packet: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(packet)
    }

    fn send(&self, packet: &[GuestSlice<'_>]) -> io::Result<()> {
        iov::write(self.file.as_fd(), packet, Io::Stream).map(drop)
    }

    fn send_bytes(&self, packet: &[u8]) -> io::Result<()> {
        (&self.file).write(packet).map(drop)
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let Offloads { checksum, tso4, tso6, ecn } = offloads;
        let bits = [
            (checksum, libc::TUN_F_CSUM),
            (tso4, libc::TUN_F_TSO4),
            (tso6, libc::TUN_F_TSO6),
            (ecn && (tso4 || tso6), libc::TUN_F_TSO_ECN),
        ];
        let all = bits.iter().filter(|(on, _)| *on).fold(0, |all, (_, bit)| all | bit);
        sys::set_offloads(self.file.as_fd(), all)
    }

    fn set_active(&self, active: bool) -> io::Result<()> {
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        if *attached != active {
            sys::set_attached(self.file.as_fd(), active)?;
            *attached = active;
        }
        Ok(())
    }
}

/// The ioctls of `linux/if_tun.h`.
mod sys {
    use std::io;
    use std::os::fd::{AsRawFd, BorrowedFd};

    fn request() -> libc::ifreq {
        // SAFETY: zeros are a valid request: an empty name and no flags.
        unsafe { std::mem::zeroed() }
    }

    fn done(result: libc::c_int) -> io::Result<()> {
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// The flags with which the device was opened.
    pub fn flags(fd: BorrowedFd<'_>) -> io::Result<i16> {
        let mut request = request();
        // SAFETY: the kernel stores a name and flags into the structure that it is given.
        done(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &mut request) })?;
        // SAFETY: every bit pattern of the union is a valid number.
        Ok(unsafe { request.ifr_ifru.ifru_flags })
    }

    /// Sets the length of the header before each packet.
    pub fn set_header_len(fd: BorrowedFd<'_>, len: libc::c_int) -> io::Result<()> {
        // SAFETY: the kernel reads a number at the address.
        done(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &len) })
    }

    /// Sets what packets that are read may lack (`TUN_F_*`).
    pub fn set_offloads(fd: BorrowedFd<'_>, bits: libc::c_uint) -> io::Result<()> {
        let bits = libc::c_ulong::from(bits);
        // SAFETY: the argument is a number; nothing is read or stored by address.
        done(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, bits) })
    }

    /// Takes the queue out of the device's use, or puts it back.
    pub fn set_attached(fd: BorrowedFd<'_>, attached: bool) -> io::Result<()> {
        let mut request = request();
        let flag = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        request.ifr_ifru.ifru_flags = flag as i16;
        // SAFETY: the kernel reads the structure.
        done(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETQUEUE, &request) })
    }
}
