//! Handlers of the integer instruction set, and their selection.
//!
//! Handlers are generic over operand width and kind, so that a handler has nothing left to decide
//! but what depends on data. Their operands are filled in by [`crate::block`] before selection.

pub mod alu;
mod arith;
mod atomic;
mod bcd;
mod flow;
mod moves;
mod select;
mod stack;
mod string;

#[cfg(test)]
mod found;
#[cfg(test)]
mod tests;

pub(crate) use select::select;

/// The value of a `Result<_, Fault>`, or ends the handler with the fault.
macro_rules! or_raise {
    ($cpu:ident, $result:expr) => {
        match $result {
            Ok(value) => value,
            Err(fault) => return $cpu.raise(fault),
        }
    };
}
pub(crate) use or_raise;
