//! A guest that stops at some instruction in one machine and goes on in another: of the same engine, and of the other.
//!
//! Where it stops is not a matter of time: it is after the instruction that prints a given byte, or in a state that it
//! does not leave by itself.

#[path = "../../../../images/hello-unikernel/src/compute.rs"]
mod compute;
#[path = "../common/elf.rs"]
mod elf;
#[path = "../engines/guest.rs"]
#[allow(dead_code)]
mod guest;

mod clocks;
mod firmware;
mod halted;
mod interrupts;
mod journey;
mod pic;
mod registers;
mod unikernel;
