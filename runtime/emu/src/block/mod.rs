//! Blocks of decoded instructions: decoding, the cache, the dispatcher.

mod cache;
mod decode;
mod dispatch;
mod operands;
mod stamp;

pub(crate) use cache::KeyHasher;
pub(crate) use decode::{BlockDecoder, GoesOn};
pub use dispatch::{Dispatcher, Stop};
pub(crate) use stamp::CodeStamp;

use crate::op::Handler;

/// A handler chosen for an instruction.
pub(crate) struct Selected {
    /// What to run.
    pub handler: Handler,
    /// The block ends after it.
    pub ends: bool,
}

/// A run of decoded instructions that starts at one byte of guest RAM, in one mode. Its ops are where it is kept.
#[derive(Debug, Clone, Copy)]
pub struct Block {
    /// Identity: see [`cache::key`].
    key: u64,
    /// Generation of the page it was decoded from.
    first: CodeStamp,
    /// If an instruction crosses into another page: host address and generation of that page.
    second: Option<(u64, CodeStamp)>,
    /// Bytes of code.
    len: u16,
    /// Instructions.
    count: u16,
}

impl Block {
    /// A block without ops.
    pub(crate) fn nothing() -> Self {
        Self { key: 0, first: CodeStamp::never(), second: None, len: 0, count: 0 }
    }

    /// Is the code still what was decoded?
    #[inline(always)]
    fn is_fresh(&self) -> bool {
        self.first.is_current()
    }
}
