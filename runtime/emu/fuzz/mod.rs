//! The differential fuzzer: the same instructions on the host's processor and in the engine.
//!
//! * [`case`]: what is run, and what comes out.
//! * [`forms`]: the instruction forms that take part. [`generate`] makes cases of them.
//! * [`native`] runs cases on the host, in a child process; [`engine`] in the engine.
//! * [`compare`] knows what may differ. [`campaign`] runs many cases and reports.

pub mod campaign;
pub mod case;
pub mod compare;
pub mod engine;
pub mod forms;
pub mod generate;
pub mod native;
