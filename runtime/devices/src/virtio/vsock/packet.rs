//! Packets (5.10.6).

use super::HOST_CID;

/// Bytes of a header.
pub const HEADER_LEN: usize = 44;
/// Stream sockets, the only type offered.
pub const TYPE_STREAM: u16 = 1;

/// Operations.
pub mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of SHUTDOWN: the sender of the packet will receive, or send, no more.
pub mod shutdown {
    pub const RECEIVE: u32 = 1;
    pub const SEND: u32 = 2;
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// What names a connection: the host's and the guest's port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    pub host_port: u32,
    pub guest_port: u32,
}

/// `struct virtio_vsock_hdr`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    /// A packet from the host to the guest.
    pub fn to_guest(guest_cid: u64, key: Key, op: u16) -> Self {
        Self {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            kind: TYPE_STREAM,
            op,
            ..Self::default()
        }
    }

    /// The connection that a packet from the guest belongs to.
    pub fn key(&self) -> Key {
        Key { host_port: self.dst_port, guest_port: self.src_port }
    }

    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &self.src_cid.to_le_bytes());
        put(8, &self.dst_cid.to_le_bytes());
        put(16, &self.src_port.to_le_bytes());
        put(20, &self.dst_port.to_le_bytes());
        put(24, &self.len.to_le_bytes());
        put(28, &self.kind.to_le_bytes());
        put(30, &self.op.to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buf_alloc.to_le_bytes());
        put(40, &self.fwd_cnt.to_le_bytes());
        bytes
    }

    pub fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Self {
        fn get<const N: usize>(bytes: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
            let mut field = [0; N];
            field.copy_from_slice(&bytes[at..at + N]);
            field
        }
        Self {
            src_cid: u64::from_le_bytes(get(bytes, 0)),
            dst_cid: u64::from_le_bytes(get(bytes, 8)),
            src_port: u32::from_le_bytes(get(bytes, 16)),
            dst_port: u32::from_le_bytes(get(bytes, 20)),
            len: u32::from_le_bytes(get(bytes, 24)),
            kind: u16::from_le_bytes(get(bytes, 28)),
            op: u16::from_le_bytes(get(bytes, 30)),
            flags: u32::from_le_bytes(get(bytes, 32)),
            buf_alloc: u32::from_le_bytes(get(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(get(bytes, 40)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_survive_the_wire() {
        let header = Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 4,
            dst_port: 5,
            len: 6,
            kind: 1,
            op: op::RW,
            flags: 7,
            buf_alloc: 8,
            fwd_cnt: 9,
        };
        let bytes = header.to_bytes();
        assert_eq!((bytes[0], bytes[30], bytes[40]), (3, 5, 9));
        assert_eq!(Header::from_bytes(&bytes), header);
    }
}
