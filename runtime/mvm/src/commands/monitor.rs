//! `mvm monitor`: the process that is one machine, started by `mvm run` and never by hand.

use std::process::ExitCode;

/// Hands over to the monitor, which finds its config on standard input.
pub fn main() -> ExitCode {
    mvm_vmm::monitor::main()
}
