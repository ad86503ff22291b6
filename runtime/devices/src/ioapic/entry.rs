//! A redirection table entry (82093AA data sheet, 3.2.4).

use crate::irq::MsiMessage;

const MSI_BASE: u64 = 0xfee0_0000;

const DESTINATION_LOGICAL: u64 = 1 << 11;
const DELIVERY_STATUS: u64 = 1 << 12;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Entry(pub u64);

impl Entry {
    pub const RESET: Self = Self(MASKED);

    pub fn vector(self) -> u8 {
        self.0 as u8
    }

    pub fn masked(self) -> bool {
        self.0 & MASKED != 0
    }

    pub fn level(self) -> bool {
        self.0 & LEVEL != 0
    }

    pub fn remote_irr(self) -> bool {
        self.0 & REMOTE_IRR != 0
    }

    pub fn with_remote_irr(self, set: bool) -> Self {
        Self(if set { self.0 | REMOTE_IRR } else { self.0 & !REMOTE_IRR })
    }

    /// The entry after the guest wrote one half. Delivery status and remote IRR are read-only;
    /// remote IRR means nothing for edges, and a guest clears a stuck one by making the entry an edge
    /// for a moment.
    pub fn with_half(self, high: bool, value: u32) -> Self {
        if high {
            return Self(self.0 & 0xffff_ffff | u64::from(value) << 32);
        }
        let read_only = DELIVERY_STATUS | REMOTE_IRR;
        let low = u64::from(value) & 0x1_ffff & !read_only;
        let entry = Self(self.0 & (!0xffff_ffff | read_only) | low);
        if entry.level() { entry } else { entry.with_remote_irr(false) }
    }

    /// The message this entry sends. Bits 55:49 of the entry extend the destination beyond 255, in
    /// the place where KVM and Hyper-V guests put them.
    pub fn message(self) -> MsiMessage {
        let destination = self.0 >> 56 & 0xff;
        let extended = self.0 >> 49 & 0x7f;
        let logical = u64::from(self.0 & DESTINATION_LOGICAL != 0);
        // A logical or lowest-priority destination asks for redirection (SDM volume 3, 11.11.1).
        let lowest = u64::from(self.0 >> 8 & 7 == 1);
        let address = MSI_BASE | destination << 12 | extended << 5 | lowest << 3 | logical << 2;
        let mut data = (self.0 & 0x7ff) as u32;
        if self.level() {
            data |= 1 << 15 | 1 << 14;
        }
        MsiMessage { address, data }
    }
}
