//! Messages to the kernel log, so that the console tail the host shows has them in order with the
//! kernel's own; to standard error where there is no kernel log to write.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::OnceLock;

static KMSG: OnceLock<File> = OnceLock::new();

/// Opens the kernel log; before that, messages go to standard error.
pub fn use_kernel_log() {
    if let Ok(file) = OpenOptions::new().write(true).open("/dev/kmsg") {
        let _ = KMSG.set(file);
    }
}

/// Writes one line at a kernel log level (3 error, 4 warning, 6 information).
pub fn write(level: u8, message: fmt::Arguments<'_>) {
    let line = match KMSG.get() {
        Some(_) => format!("<{level}>mvm-agent: {message}\n"),
        None => format!("mvm-agent: {message}\n"),
    };
    // The kernel log takes one record by one write. A log that cannot be written is no reason to stop.
    let _ = match KMSG.get() {
        Some(mut file) => file.write_all(line.as_bytes()),
        None => std::io::stderr().write_all(line.as_bytes()),
    };
}

macro_rules! error {
    ($($arg:tt)*) => { $crate::log::write(3, format_args!($($arg)*)) };
}
macro_rules! warning {
    ($($arg:tt)*) => { $crate::log::write(4, format_args!($($arg)*)) };
}
macro_rules! info {
    ($($arg:tt)*) => { $crate::log::write(6, format_args!($($arg)*)) };
}
pub(crate) use {error, info, warning};
