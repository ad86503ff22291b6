//! Unix sockets at paths of any length.
//!
//! A socket address holds 107 bytes of path. Home directories and test directories are sometimes
//! longer; then the directory is opened and the socket is addressed through `/proc/self/fd`.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, listen, socket};

/// Longest path that fits `sockaddr_un` with its terminating zero.
const MAX_PATH: usize = 107;

/// Binds a listener at `path`.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    with_short(path, |p| UnixListener::bind(p))
}

/// Binds a listener for packets (`SOCK_SEQPACKET`) at `path`.
pub fn bind_packets(path: &Path) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    with_short(path, |p| Ok(nix::sys::socket::bind(fd.as_raw_fd(), &UnixAddr::new(p)?)?))?;
    listen(&fd, Backlog::new(16)?)?;
    Ok(fd)
}

/// Connects to the listener at `path`.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    with_short(path, |p| UnixStream::connect(p))
}

/// Calls `act` with a path to the same socket that is short enough.
pub fn with_short<T>(path: &Path, act: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    if path.as_os_str().len() <= MAX_PATH {
        return act(path);
    }
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    let dir = File::open(dir)?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name);
    act(&short)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn long_paths_work() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&deep).unwrap();
        let path = deep.join("sock");
        let listener = bind(&path).unwrap();
        assert!(path.exists());
        let mut client = connect(&path).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        client.write_all(b"x").unwrap();
        let mut byte = [0];
        server.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }
}
