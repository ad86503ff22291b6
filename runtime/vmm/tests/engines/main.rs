//! Both engines behind the same machine: the same guests, with the same results.

mod code_by_block;
mod doorbells;
mod guest;
