//! Network devices from tap devices.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use mvm_devices::virtio::net::{Net, NetBackend, NetConfig, NetError, PacketSocket, Tap};
use nix::sys::socket::{SockType, getsockopt, sockopt};

/// A network device.
#[derive(Debug)]
pub struct NetCard {
    /// The queues of one tap device, or connected datagram sockets whose messages are packets with
    /// their headers.
    pub queues: Vec<OwnedFd>,
    /// The guest's address on it.
    pub mac: [u8; 6],
    /// Longest packet in bytes without the Ethernet header.
    pub mtu: u16,
}

/// Makes the device of `card`, the machine's `index`th.
///
/// # Errors
/// A descriptor is no queue of a tap device, or the device cannot be.
pub fn open(index: usize, card: NetCard) -> Result<Arc<Net>, NetError> {
    let name = format!("mvm-net-{index}");
    let failed = |source| NetError::Start { name: name.clone(), source };
    let backends =
        card.queues.into_iter().map(backend).collect::<Result<_, _>>().map_err(failed)?;
    Net::new(NetConfig { name: name.clone(), mac: card.mac, mtu: card.mtu, backends })
}

/// The way to the network behind `fd`.
///
/// # Errors
/// It is neither a queue of a tap device nor a datagram socket.
pub fn backend(fd: OwnedFd) -> io::Result<Box<dyn NetBackend>> {
    match getsockopt(&fd, sockopt::SockType) {
        Ok(SockType::Datagram) => Ok(Box::new(PacketSocket::new(UnixDatagram::from(fd))?)),
        _ => Ok(Box::new(Tap::new(fd)?)),
    }
}

/// What the devices count: name and value.
pub fn counters(nets: &[Arc<Net>]) -> Vec<(String, u64)> {
    let mut counters = Vec::new();
    for (index, net) in nets.iter().enumerate() {
        let stats = net.stats();
        let all = [
            ("rx_packets", stats.rx_packets),
            ("rx_bytes", stats.rx_bytes),
            ("rx_dropped", stats.rx_dropped),
            ("tx_packets", stats.tx_packets),
            ("tx_bytes", stats.tx_bytes),
            ("tx_dropped", stats.tx_dropped),
        ];
        counters.extend(all.map(|(key, n)| (format!("mvm-net-{index}.{key}"), n)));
    }
    counters
}
