//! Connections that the guest makes to unix sockets of the host.
//!
//! Which sockets there are, the guest cannot say: they are the files of one directory whose names are a given
//! one, `_` and a port in decimal. They may come and go while the machine runs, so that the directory is kept
//! and not the sockets. It is named by its descriptor, and lies where it lay even if it is moved.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use mvm_devices::virtio::vsock::Dialer;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

/// Connects to the sockets `NAME_PORT` in `directory`.
pub(super) fn dialer(directory: OwnedFd, name: String) -> Dialer {
    Arc::new(move |port| {
        let path = format!("/proc/self/fd/{}/{name}_{port}", directory.as_raw_fd());
        // With a blocking one a listener that accepts nobody would hold up all devices.
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let stream = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        connect(stream.as_raw_fd(), &UnixAddr::new(path.as_str())?).map_err(io::Error::from)?;
        Ok(UnixStream::from(stream))
    })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::config::MAX_DIAL_NAME;

    #[test]
    fn ports_are_sockets_of_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(100));
        std::fs::create_dir(&deep).unwrap();
        let name = "n".repeat(MAX_DIAL_NAME);
        let dial = dialer(File::open(&deep).unwrap().into(), name.clone());
        assert_eq!(dial(u32::MAX).unwrap_err().kind(), io::ErrorKind::NotFound);
        // The directory goes elsewhere, where its path is short enough to bind a socket there.
        let moved = dir.path().join("m");
        std::fs::rename(&deep, &moved).unwrap();
        let listener = UnixListener::bind(moved.join(format!("{name}_{}", u32::MAX))).unwrap();
        let mut ours = dial(u32::MAX).unwrap();
        let (mut theirs, _) = listener.accept().unwrap();
        theirs.write_all(b"x").unwrap();
        let mut byte = [0];
        ours.set_nonblocking(false).unwrap();
        ours.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
        std::fs::write(moved.join(format!("{name}_7")), "no socket").unwrap();
        assert_eq!(dial(7).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn who_accepts_nobody_holds_up_nobody() {
        use nix::sys::socket::{Backlog, bind, listen};
        let dir = tempfile::tempdir().unwrap();
        let flags = SockFlag::SOCK_CLOEXEC;
        let listener = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
        let address = UnixAddr::new(&dir.path().join("s_1")).unwrap();
        bind(listener.as_raw_fd(), &address).unwrap();
        listen(&listener, Backlog::new(1).unwrap()).unwrap();
        let dial = dialer(File::open(dir.path()).unwrap().into(), "s".into());
        let all: Vec<_> = (0..8).map(|_| dial(1)).collect();
        assert!(all[0].is_ok());
        assert_eq!(all[7].as_ref().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
