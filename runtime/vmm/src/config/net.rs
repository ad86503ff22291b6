//! Network devices.

use mvm_devices::virtio::net::{MAX_PAIRS, MTU_RANGE};
use serde::{Deserialize, Serialize};

use super::{Error, FdIndex};

/// A network device: a tap device of the host, by its queues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Queues of one tap device, opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR` (and
    /// `IFF_MULTI_QUEUE` if there are several). Each is a pair of queues for the guest.
    pub queues: Vec<FdIndex>,
    /// The guest's address on it.
    pub mac: [u8; 6],
    /// Longest packet in bytes without the Ethernet header.
    pub mtu: u16,
}

impl NetConfig {
    /// Checks what can be checked without opening a descriptor.
    ///
    /// # Errors
    /// [`Error::Net`].
    pub(super) fn validate(&self) -> Result<(), Error> {
        let wrong = |what: String| Err(Error::Net { what });
        if self.queues.is_empty() || self.queues.len() > MAX_PAIRS {
            return wrong(format!("{} queues; there can be 1 to {MAX_PAIRS}", self.queues.len()));
        }
        if self.mac[0] & 1 != 0 {
            return wrong(format!("{:02x?} is a group's address, not a device's", self.mac));
        }
        if !MTU_RANGE.contains(&self.mtu) {
            return wrong(format!("an MTU of {} bytes; the least is 68", self.mtu));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{BootProtocol, ImageSource, MachineConfig};
    use super::*;

    #[test]
    fn impossible_network_devices_are_named() {
        let good = NetConfig { queues: vec![FdIndex(1)], mac: [2, 0, 0, 0, 0, 1], mtu: 1500 };
        let validate = |nets: Vec<NetConfig>| {
            let kernel = ImageSource::file(FdIndex(0));
            MachineConfig { nets, ..MachineConfig::new("vm", 256 << 20, kernel) }.validate()
        };
        validate(vec![good.clone(); 3]).unwrap();
        for bad in [
            NetConfig { queues: vec![], ..good.clone() },
            NetConfig { queues: vec![FdIndex(1); 17], ..good.clone() },
            NetConfig { mac: [0xff; 6], ..good.clone() },
            NetConfig { mtu: 67, ..good.clone() },
        ] {
            assert!(matches!(validate(vec![good.clone(), bad]), Err(Error::Net { .. })));
        }
        assert!(matches!(validate(vec![good.clone(); 18]), Err(Error::TooManyDisks { .. })));
        // Solo5's guests have no virtio devices.
        let validate = |count| {
            let (nets, kernel) = (vec![good.clone(); count], ImageSource::file(FdIndex(0)));
            let machine = MachineConfig::new("vm", 256 << 20, kernel);
            MachineConfig { nets, boot: BootProtocol::Hvt, ..machine }.validate()
        };
        validate(63).unwrap();
        assert!(matches!(validate(64), Err(Error::TooManyDisks { max: 0, .. })));
    }
}
