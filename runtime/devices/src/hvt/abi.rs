//! Numbers and argument blocks of Solo5's hypercalls (its `hvt_abi.h`, ABI version 2).
//!
//! The guest writes the 32-bit physical address of an argument block to the call's port. Fields are
//! little-endian; `len` and pointers have 64 bits, results 32.

/// Which call, by its port's distance from the first.
pub mod call {
    pub const WALLTIME: u16 = 1;
    pub const PUTS: u16 = 2;
    pub const POLL: u16 = 3;
    pub const BLOCK_WRITE: u16 = 4;
    pub const BLOCK_READ: u16 = 5;
    pub const NET_WRITE: u16 = 6;
    pub const NET_READ: u16 = 7;
    pub const HALT: u16 = 8;
}

/// Results (`solo5_result_t`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Answer {
    Ok = 0,
    /// Not now: there is nothing yet.
    Again = 1,
    /// What is asked for makes no sense.
    Invalid = 2,
    /// It failed on the host.
    Failed = 3,
}

/// Bytes that must be readable where a halting guest says that it left something.
pub const COOKIE_SIZE: u64 = 512;

/// An argument block as it was read.
#[derive(Debug, Clone, Copy)]
pub struct Arguments<const SIZE: usize>(pub [u8; SIZE]);

impl<const SIZE: usize> Arguments<SIZE> {
    /// The 64-bit field at `at`.
    pub fn long(&self, at: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.0[at..at + 8]);
        u64::from_le_bytes(bytes)
    }

    /// The 32-bit field at `at`.
    pub fn int(&self, at: usize) -> i32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.0[at..at + 4]);
        i32::from_le_bytes(bytes)
    }
}

/// `struct hvt_hc_walltime`.
pub mod walltime {
    pub const SIZE: usize = 8;
    pub const NSECS: u64 = 0;
}

/// `struct hvt_hc_puts`.
pub mod puts {
    pub const SIZE: usize = 16;
    pub const DATA: usize = 0;
    pub const LEN: usize = 8;
}

/// `struct hvt_hc_poll`.
pub mod poll {
    pub const SIZE: usize = 24;
    pub const TIMEOUT: usize = 0;
    pub const READY_SET: u64 = 8;
    pub const RESULT: u64 = 16;
}

/// `struct hvt_hc_block_write` and `struct hvt_hc_block_read`.
pub mod block {
    pub const SIZE: usize = 40;
    pub const HANDLE: usize = 0;
    pub const OFFSET: usize = 8;
    pub const DATA: usize = 16;
    pub const LEN: usize = 24;
    pub const RESULT: u64 = 32;
}

/// `struct hvt_hc_net_write` and `struct hvt_hc_net_read`.
pub mod net {
    pub const SIZE: usize = 32;
    pub const HANDLE: usize = 0;
    pub const DATA: usize = 8;
    pub const LEN: usize = 16;
    pub const RESULT: u64 = 24;
}

/// `struct hvt_hc_halt`.
pub mod halt {
    pub const SIZE: usize = 16;
    pub const COOKIE: usize = 0;
    pub const STATUS: usize = 8;
}
