//! The serial console: COM1, a 16550A.

use core::fmt;

use super::port::{in8, out8};

const DATA: u16 = 0x3f8;
const FIFO_CONTROL: u16 = DATA + 2;
const LINE_STATUS: u16 = DATA + 5;

const RECEIVED: u8 = 1 << 0;
const ROOM: u8 = 1 << 5;

/// Bytes that fit into the transmitter when it says that there is room.
const FIFO: usize = 16;

/// Standard output.
pub struct Console;

impl Console {
    /// Turns the FIFOs on, without clearing what has been typed already.
    pub fn init() {
        out8(FIFO_CONTROL, 0x01);
    }

    /// Writes a byte.
    pub fn write(byte: u8) {
        Self::wait_for_room();
        out8(DATA, byte);
    }

    fn wait_for_room() {
        while in8(LINE_STATUS) & ROOM == 0 {
            core::hint::spin_loop();
        }
    }

    /// A byte of standard input, if one has come.
    pub fn read() -> Option<u8> {
        (in8(LINE_STATUS) & RECEIVED != 0).then(|| in8(DATA))
    }
}

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for piece in text.as_bytes().chunks(FIFO) {
            Self::wait_for_room();
            piece.iter().for_each(|&byte| out8(DATA, byte));
        }
        Ok(())
    }
}

/// Prints a line.
#[macro_export]
macro_rules! println {
    ($($format:tt)*) => {{
        use core::fmt::Write as _;
        // The console never fails.
        let _ = writeln!($crate::rt::Console, $($format)*);
    }};
}
