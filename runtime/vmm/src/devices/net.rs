//! Network devices from tap devices.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use mvm_devices::virtio::net::{Net, NetBackend, NetConfig, NetError, Tap};

/// A network device.
#[derive(Debug)]
pub struct NetCard {
    /// The queues of one tap device.
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
    let tap = |fd| match Tap::new(fd) {
        Ok(tap) => Ok(Box::new(tap) as Box<dyn NetBackend>),
        Err(source) => Err(NetError::Start { name: name.clone(), source }),
    };
    let backends = card.queues.into_iter().map(tap).collect::<Result<_, _>>()?;
    Net::new(NetConfig { name: name.clone(), mac: card.mac, mtu: card.mtu, backends })
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
