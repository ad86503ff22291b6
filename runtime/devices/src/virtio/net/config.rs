//! Feature bits (5.1.3), configuration layout (5.1.4) and the header of every packet (5.1.6).

/// Feature bits.
pub mod feature {
    /// Packets to send may lack their checksum.
    pub const CSUM: u64 = 1 << 0;
    /// Received packets may lack their checksum.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// What is done to received packets can be changed by the control queue.
    pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    /// The device says how long a packet can be.
    pub const MTU: u64 = 1 << 3;
    /// The device has an address of its own.
    pub const MAC: u64 = 1 << 5;
    /// Received TCP segments over IPv4 may be joined.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// The same over IPv6.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// Joined segments may carry ECN marks.
    pub const GUEST_ECN: u64 = 1 << 9;
    /// TCP over IPv4 to send may be longer than a packet.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// The same over IPv6.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// It may carry ECN marks.
    pub const HOST_ECN: u64 = 1 << 13;
    /// A received packet may be spread over several buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// The link's state is shown.
    pub const STATUS: u64 = 1 << 16;
    /// There is a control queue.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// There are several pairs of queues.
    pub const MQ: u64 = 1 << 22;

    /// What [`super::Offloads`] is made from, and what the control queue can change.
    pub const OFFLOADS: u64 = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN;

    /// Pairs of a feature and one of those without which it makes no sense (5.1.3.1).
    pub const REQUIREMENTS: [(u64, u64); 9] = [
        (GUEST_TSO4, GUEST_CSUM),
        (GUEST_TSO6, GUEST_CSUM),
        (GUEST_ECN, GUEST_TSO4 | GUEST_TSO6),
        (HOST_TSO4, CSUM),
        (HOST_TSO6, CSUM),
        (HOST_ECN, HOST_TSO4 | HOST_TSO6),
        (CTRL_GUEST_OFFLOADS, CTRL_VQ),
        (MQ, CTRL_VQ),
        (CTRL_GUEST_OFFLOADS, GUEST_CSUM),
    ];
}

/// Bytes of the header before each packet, both ways: `struct virtio_net_hdr` of a device that is
/// not a legacy one.
pub const HEADER: usize = 12;

/// Where in it the number of buffers of a received packet is.
pub const NUM_BUFFERS: u64 = 10;

/// Longest frame: an IP packet of 64 KiB, which segments joined or not yet split may come to, behind
/// an Ethernet header with two VLAN tags.
pub const MAX_FRAME: usize = 65535 + 14 + 8;

/// Longest packet with its header.
pub const MAX_PACKET: usize = HEADER + MAX_FRAME;

/// What the driver sees of the device.
#[derive(Debug)]
pub struct Config {
    pub mac: [u8; 6],
    pub link_up: bool,
    pub pairs: u16,
    pub mtu: u16,
}

impl Config {
    pub fn to_bytes(&self) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[..6].copy_from_slice(&self.mac);
        bytes[6..8].copy_from_slice(&u16::from(self.link_up).to_le_bytes());
        bytes[8..10].copy_from_slice(&self.pairs.to_le_bytes());
        bytes[10..].copy_from_slice(&self.mtu.to_le_bytes());
        bytes
    }
}
