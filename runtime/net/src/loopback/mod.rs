//! What is dialled on a namespace's loopback, at whatever port, arrives at one socket of ours.
//!
//! A machine has the interfaces of its namespace, but the namespace's loopback stays on the host, and
//! nothing listens there: the programs are in the guest. `kubectl port-forward` makes containerd dial
//! just there. So a BPF program of type `BPF_PROG_TYPE_SK_LOOKUP` (Linux 5.9; Documentation/bpf/
//! prog_sk_lookup.rst of the kernel) hands every TCP connection to 127.0.0.0/8 or ::1 to our socket, which
//! learns from its own address which port was meant. No packet filter, no connection tracking, and no
//! program of the host's is needed; the attachment goes with its descriptor, however the process ends.

mod program;
mod sys;

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::{Error, Namespace};

/// Everything that is dialled on a namespace's loopback. Ends with its drop.
#[derive(Debug)]
pub struct Loopback {
    listener: TcpListener,
    /// The attachment of the program, which holds the program, which holds the map.
    _link: OwnedFd,
}

impl Loopback {
    /// Takes over the loopback of `namespace`. What programs in it have established already goes on; what
    /// listens there is not reached any more.
    ///
    /// # Errors
    /// [`Error::Enter`], or [`Error::Io`]: the kernel has no such programs, or the privilege for them is
    /// missing (`CAP_BPF` and `CAP_NET_ADMIN`, or `CAP_SYS_ADMIN`).
    pub fn take(namespace: &Namespace) -> Result<Self, Error> {
        let failed = |what: &str| {
            let what = format!("loopback of {}: {what}", namespace.path().display());
            move |source| Error::Io { what, source }
        };
        let listener = namespace.enter(listen)?.map_err(failed("cannot listen"))?;
        let map = sys::socket_map().map_err(failed("this kernel has no map of sockets for BPF"))?;
        sys::put(map.as_fd(), listener.as_fd()).map_err(failed("cannot hand the socket to BPF"))?;
        let program = program::redirect(&map);
        let program = sys::load(&program).map_err(failed(
            "this kernel (5.9 at least) has no BPF programs of type sk_lookup, or refuses ours",
        ))?;
        let link = sys::attach(program.as_fd(), namespace.as_fd());
        let link = link.map_err(failed("cannot attach a BPF program"))?;
        Ok(Self { listener, _link: link })
    }

    /// The next connection, and the port that it is for. Waits for one.
    ///
    /// # Errors
    /// What `accept(2)` says.
    pub fn accept(&self) -> io::Result<(TcpStream, u16)> {
        loop {
            let (stream, _) = self.listener.accept()?;
            let own = stream.local_addr()?;
            // Our socket has a port of its own, at which it could be reached on other addresses.
            if is_loopback(own) {
                return Ok((stream, own.port()));
            }
        }
    }
}

impl AsFd for Loopback {
    /// Readable when there is a connection.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// One socket for both families, or for IPv4 where there is no IPv6.
fn listen() -> io::Result<TcpListener> {
    match sys::listen_at_both() {
        Err(_) => TcpListener::bind((Ipv4Addr::LOCALHOST, 0)),
        both => both,
    }
}

fn is_loopback(address: SocketAddr) -> bool {
    match address.ip() {
        std::net::IpAddr::V4(ip) => ip.is_loopback(),
        std::net::IpAddr::V6(ip) => {
            ip == Ipv6Addr::LOCALHOST || ip.to_ipv4_mapped().is_some_and(|ip| ip.is_loopback())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn loopback_addresses_are_told_from_others() {
        for (text, want) in [
            ("127.0.0.1:1", true),
            ("127.9.9.9:1", true),
            ("10.0.0.1:1", false),
            ("[::1]:1", true),
            ("[::ffff:127.0.0.1]:1", true),
            ("[::ffff:10.0.0.1]:1", false),
            ("[fe80::1]:1", false),
        ] {
            assert_eq!(is_loopback(text.parse().unwrap()), want, "{text}");
        }
    }

    #[test]
    fn every_port_of_loopback_is_one_socket() {
        let name = format!("mvm-lo-{}", std::process::id());
        let namespace = match Namespace::create(&name) {
            Ok(namespace) => namespace,
            Err(e) => {
                eprintln!("\n*** SKIPPED: {e} ***\n");
                return;
            }
        };
        let tried = namespace.enter(|| {
            let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status()?;
            assert!(up.success());
            // Somebody who listens there already.
            TcpListener::bind("127.0.0.1:81")
        });
        // Nothing of it stays, whatever comes.
        let removed = Namespace::remove(&name);
        let _other = tried.unwrap().unwrap();
        removed.unwrap();
        let loopback = match Loopback::take(&namespace) {
            Ok(loopback) => loopback,
            Err(e) => {
                eprintln!("\n*** SKIPPED: {e} ***\n");
                return;
            }
        };
        for address in ["127.0.0.1:80", "127.1.2.3:65535", "[::1]:80", "127.0.0.1:81"] {
            let address: SocketAddr = address.parse().unwrap();
            let dialled = namespace.enter(|| TcpStream::connect(address)).unwrap();
            let mut dialled = match dialled {
                // Some hosts have no IPv6.
                Err(e) if address.is_ipv6() => {
                    eprintln!("\n*** SKIPPED: {address}: {e} ***\n");
                    continue;
                }
                other => other.unwrap(),
            };
            let (mut taken, port) = loopback.accept().unwrap();
            assert_eq!(port, address.port());
            dialled.write_all(b"x").unwrap();
            let mut byte = [0];
            taken.read_exact(&mut byte).unwrap();
            assert_eq!(&byte, b"x");
        }
        drop(loopback);
        let refused = namespace.enter(|| TcpStream::connect("127.0.0.1:80")).unwrap();
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        // It is back.
        namespace.enter(|| TcpStream::connect("127.0.0.1:81")).unwrap().unwrap();
    }
}
