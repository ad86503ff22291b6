//! `mvm-agent`: PID 1 of an mvm Linux guest. It runs containers for the host, nothing else.
//!
//! As PID 1 it takes no arguments. `mvm-agent --unix DIR`, as root on any Linux host, serves the
//! same calls on unix sockets in `DIR` (`control.sock`, `stream.sock`), for tests without a virtual
//! machine.
//!
//! Roles: the main thread accepts control connections, `streams` accepts stream connections,
//! `reaper` collects children; each connection and each call has a thread. New processes come from
//! the single-threaded [`zygote`]. Nothing here may panic: the end of PID 1 is the end of the
//! guest.

mod blockdev;
mod boot;
mod cgroup;
mod channel;
mod child;
mod container;
mod disks;
mod error;
mod filesystems;
mod forward;
mod given;
mod icache;
mod info;
mod log;
mod mountapi;
mod network;
mod power;
mod reaper;
mod rootfs;
mod seccomp;
mod service;
mod shares;
mod spec;
mod streams;
mod sys;
mod transport;
mod zygote;

use std::process::ExitCode;

fn main() -> ExitCode {
    let start_ns = sys::clock_ns(libc::CLOCK_BOOTTIME);
    let args: Vec<String> = std::env::args().skip(1).collect();
    match &args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--version"] => log::write(6, format_args!("{}", env!("CARGO_PKG_VERSION"))),
        ["--unix", dir] => match boot::host(dir.into(), start_ns) {
            Ok(never) => match never {},
            Err(e) => {
                log::error!("{e}");
                return ExitCode::FAILURE;
            }
        },
        // What the kernel does not understand of its command line it passes to PID 1.
        _ if std::process::id() == 1 => boot::guest(start_ns),
        _ => {
            log::error!("this is PID 1 of a virtual machine; to try it out: mvm-agent --unix DIR");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}
