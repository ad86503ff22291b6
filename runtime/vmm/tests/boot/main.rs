//! Every boot protocol, seen by guests: small kernels written in assembly, in files made here, run by
//! every engine that this host has.

mod clocks;
mod emulators;
mod guest;
mod hvt;
mod linux;
mod multiboot;
mod pic;
mod pvh;
