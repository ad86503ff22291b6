//! What is on the other side of a network device.

use std::fmt::Debug;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;

use super::config::feature;
use crate::virtio::GuestSlice;
use crate::virtio::iov::{self, Io};

/// What may be left undone in packets for the guest, which does it itself or does not need it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    /// The checksum.
    pub checksum: bool,
    /// Splitting into segments, TCP over IPv4.
    pub tso4: bool,
    /// The same over IPv6.
    pub tso6: bool,
    /// Segments may carry ECN marks.
    pub ecn: bool,
}

impl Offloads {
    pub(super) fn from_features(features: u64) -> Self {
        let has = |bit| features & bit != 0;
        let checksum = has(feature::GUEST_CSUM);
        Self {
            checksum,
            tso4: checksum && has(feature::GUEST_TSO4),
            tso6: checksum && has(feature::GUEST_TSO6),
            ecn: checksum && has(feature::GUEST_ECN),
        }
    }
}

/// One pair of queues' way to the network. Nothing here may block.
///
/// Packets are Ethernet frames behind the 12 bytes of `struct virtio_net_hdr_v1` (5.1.6), in which
/// the number of buffers means nothing.
pub trait NetBackend: Send + Sync + Debug {
    /// Readable when there is a packet, writable when one can be sent.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Takes the next packet with its header into `packet` and returns its length; what does not fit
    /// is lost.
    ///
    /// # Errors
    /// `WouldBlock`: there is none. `Interrupted`. Others are final: the network is gone.
    fn receive(&self, packet: &mut [u8]) -> io::Result<usize>;

    /// Sends a packet with its header.
    ///
    /// # Errors
    /// `WouldBlock`: not now. With any other error the packet is dropped.
    fn send(&self, packet: &[GuestSlice<'_>]) -> io::Result<()>;

    /// Sends a packet with its header from the host's memory.
    ///
    /// # Errors
    /// As [`NetBackend::send`].
    fn send_bytes(&self, packet: &[u8]) -> io::Result<()>;

    /// Says what received packets may lack from now on, for all pairs of the device.
    ///
    /// # Errors
    /// The host refuses.
    fn set_offloads(&self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }

    /// Puts this pair to use, or takes it out of use: no packet is for it then.
    ///
    /// # Errors
    /// The host refuses.
    fn set_active(&self, _active: bool) -> io::Result<()> {
        Ok(())
    }
}

/// A connected datagram socket whose messages are packets with their headers: for networks that are
/// programs, and for tests.
#[derive(Debug)]
pub struct PacketSocket(UnixDatagram);

impl PacketSocket {
    /// A network behind `socket`.
    ///
    /// # Errors
    /// It cannot be made non-blocking.
    pub fn new(socket: UnixDatagram) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self(socket))
    }
}

impl NetBackend for PacketSocket {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn receive(&self, packet: &mut [u8]) -> io::Result<usize> {
        self.0.recv(packet)
    }

    fn send(&self, packet: &[GuestSlice<'_>]) -> io::Result<()> {
        iov::write(self.0.as_fd(), packet, Io::Socket).map(drop)
    }

    fn send_bytes(&self, packet: &[u8]) -> io::Result<()> {
        self.0.send(packet).map(drop)
    }
}
