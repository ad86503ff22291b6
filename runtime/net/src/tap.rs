//! Making tap devices (Documentation/networking/tuntap.rst of the kernel).

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use crate::{Error, Namespace};

const DEVICE: &str = "/dev/net/tun";

/// Makes a tap device in `namespace` whose name begins with `prefix`, with headers for offloads, and
/// returns its queues. It is gone when the last of them is closed, by whatever way.
pub(crate) fn create(namespace: &Namespace, prefix: &str, queues: usize) -> Result<Made, Error> {
    let failed = |source| Error::Tap { path: namespace.path().to_owned(), source };
    let made = namespace.enter(|| {
        let mut name = format!("{prefix}%d");
        let mut fds = Vec::new();
        for _ in 0..queues.max(1) {
            // Which namespace the device will be in is decided by who opens this.
            let file = File::options().read(true).write(true).open(DEVICE)?;
            name = sys::attach(&file, &name, queues > 1)?;
            fds.push(OwnedFd::from(file));
        }
        Ok(Made { name, queues: fds })
    })?;
    made.map_err(failed)
}

/// A tap device.
#[derive(Debug)]
pub(crate) struct Made {
    pub name: String,
    pub queues: Vec<OwnedFd>,
}

/// What to do about an error.
pub(crate) fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "; there is no /dev/net/tun: load the module tun",
        io::ErrorKind::PermissionDenied => "; this needs root (CAP_NET_ADMIN)",
        _ => "",
    }
}

mod sys {
    use std::fs::File;
    use std::io;
    use std::os::fd::AsRawFd;

    /// `TUNSETIFF`: makes the device called `name`, or adds a queue to it. Returns its name.
    pub fn attach(file: &File, name: &str, several: bool) -> io::Result<String> {
        // SAFETY: zeros are a valid request: an empty name and no flags.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if name.len() >= request.ifr_name.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        let queues = if several { libc::IFF_MULTI_QUEUE } else { 0 };
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | queues;
        request.ifr_ifru.ifru_flags = flags as i16;
        // SAFETY: the kernel reads the structure and stores the name into it.
        if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let name = request.ifr_name.iter().take_while(|&&c| c != 0);
        let name = name.flat_map(|c| c.to_ne_bytes()).collect();
        String::from_utf8(name).map_err(|_| io::ErrorKind::InvalidData.into())
    }
}
