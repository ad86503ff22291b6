//! The first serial port (16550A): the console of last resort.
//!
//! What the guest prints goes to a writer and, whatever becomes of that, to a bounded tail that a
//! failure report can show.

mod input;
pub(crate) mod tail;

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial as Uart, SerialState as UartState};

use crate::BusDevice;
use crate::event_loop::EventLoop;
use crate::irq::InterruptLine;
use input::Input;
pub use input::SerialInputError;
use tail::Tail;

/// Most bytes of host input that wait for the guest to read them.
const INPUT_LIMIT: usize = 64 << 10;

/// How a port is set up.
pub struct SerialConfig {
    /// Where output goes; [`io::sink`] if nobody wants it. Errors are counted and ignored: a guest must
    /// not fail because its console's reader has gone.
    pub output: Box<dyn Write + Send>,
    /// Bytes of output kept for [`Serial::tail`].
    pub tail: usize,
}

impl Default for SerialConfig {
    fn default() -> Self {
        Self { output: Box::new(io::sink()), tail: 64 << 10 }
    }
}

impl fmt::Debug for SerialConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialConfig").field("tail", &self.tail).finish_non_exhaustive()
    }
}

/// The port's registers and unread input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Divisor latch (low, high), IER, IIR, LCR, LSR, MCR, MSR, SCR.
    pub registers: [u8; 9],
    /// Bytes in the receive FIFO, then those still waiting for room in it.
    pub input: Vec<u8>,
}

#[derive(Debug)]
struct Line(Arc<dyn InterruptLine>);

impl Trigger for Line {
    type E = std::convert::Infallible;
    fn trigger(&self) -> Result<(), Self::E> {
        self.0.trigger();
        Ok(())
    }
}

struct Output {
    to: Box<dyn Write + Send>,
    tail: Tail,
    lost: u64,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tail.push(bytes);
        if self.to.write_all(bytes).is_err() {
            self.lost += bytes.len() as u64;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let _ = self.to.flush();
        Ok(())
    }
}

struct Port {
    uart: Uart<Line, NoEvents, Output>,
    waiting: VecDeque<u8>,
    /// Somebody wants to know when there is room again.
    full: bool,
}

/// A 16550A at [`Serial::PORT`].
pub struct Serial {
    port: Mutex<Port>,
    line: Arc<dyn InterruptLine>,
    written: AtomicU64,
    input: OnceLock<Arc<Input>>,
}

impl Serial {
    /// COM1.
    pub const PORT: u64 = 0x3f8;
    /// Ports it takes.
    pub const LEN: u64 = 8;
    /// COM1's interrupt.
    pub const IRQ: u8 = 4;

    /// A port after reset.
    pub fn new(line: Arc<dyn InterruptLine>, config: SerialConfig) -> Arc<Self> {
        let output = Output { to: config.output, tail: Tail::new(config.tail), lost: 0 };
        let uart = Uart::new(Line(line.clone()), output);
        let port = Mutex::new(Port { uart, waiting: VecDeque::new(), full: false });
        Arc::new(Self { port, line, written: AtomicU64::new(0), input: OnceLock::new() })
    }

    /// Types what can be read from `fd` at the guest, on `events`. The open file is made
    /// non-blocking, so it should be the port's own. Only the first descriptor counts.
    ///
    /// # Errors
    /// [`SerialInputError`].
    pub fn read_from(
        self: &Arc<Self>,
        fd: OwnedFd,
        events: &EventLoop,
    ) -> Result<(), SerialInputError> {
        if self.input.get().is_none() {
            let input = Input::start(self, fd, events)?;
            // What was there before is no change that would be told.
            self.input.get_or_init(|| input).there_is_room();
        }
        Ok(())
    }

    /// Bytes that [`Serial::input`] would take. If there are none, `input` hears when there are.
    fn room(&self) -> usize {
        let mut port = self.lock();
        let room = INPUT_LIMIT.saturating_sub(port.waiting.len());
        port.full |= room == 0;
        room
    }

    /// Types `bytes` at the guest. Returns how many were taken: what the guest has not read is
    /// bounded.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let mut port = self.lock();
        let taken = bytes.len().min(INPUT_LIMIT - port.waiting.len().min(INPUT_LIMIT));
        port.waiting.extend(&bytes[..taken]);
        port.feed();
        taken
    }

    /// Prints what a guest hands over by other ways than the port's registers.
    pub fn print(&self, bytes: &[u8]) {
        let mut port = self.lock();
        // Output takes everything: what its reader does not want is counted there.
        let _ = port.uart.writer_mut().write_all(bytes);
        let _ = port.uart.writer_mut().flush();
        self.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    }

    /// The end of what the guest has printed.
    pub fn tail(&self) -> Vec<u8> {
        self.lock().uart.writer().tail.bytes()
    }

    /// Bytes the guest has printed.
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Bytes that the output refused.
    pub fn lost(&self) -> u64 {
        self.lock().uart.writer().lost
    }

    /// The state, for a snapshot.
    pub fn state(&self) -> SerialState {
        let port = self.lock();
        let s = port.uart.state();
        let registers = [
            s.baud_divisor_low,
            s.baud_divisor_high,
            s.interrupt_enable,
            s.interrupt_identification,
            s.line_control,
            s.line_status,
            s.modem_control,
            s.modem_status,
            s.scratch,
        ];
        let input = s.in_buffer.iter().chain(&port.waiting).copied().collect();
        SerialState { registers, input }
    }

    /// Takes over `state`; output and tail stay as they are.
    pub fn restore(&self, state: &SerialState) {
        let [low, high, enable, identification, control, status, modem, modem_status, scratch] =
            state.registers;
        // The receive FIFO is filled through the front door, so the state cannot overfill it.
        let registers = UartState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: control,
            line_status: status & !1,
            modem_control: modem,
            modem_status,
            scratch,
            in_buffer: Vec::new(),
        };
        let mut port = self.lock();
        let empty = || Output { to: Box::new(io::sink()), tail: Tail::new(0), lost: 0 };
        let output = std::mem::replace(port.uart.writer_mut(), empty());
        let line = Line(self.line.clone());
        if let Ok(uart) = Uart::from_state(&registers, line, NoEvents, output) {
            port.uart = uart;
        }
        port.waiting = state.input.iter().copied().take(INPUT_LIMIT).collect();
        port.feed();
    }

    fn lock(&self) -> MutexGuard<'_, Port> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Port {
    /// Moves waiting input to the FIFO as far as there is room.
    fn feed(&mut self) {
        while !self.waiting.is_empty() && self.uart.fifo_capacity() > 0 {
            let (front, _) = self.waiting.as_slices();
            let len = front.len().min(self.uart.fifo_capacity());
            match self.uart.enqueue_raw_bytes(&front[..len]) {
                // None are taken in loop-back mode.
                Ok(0) | Err(_) => return,
                Ok(taken) => drop(self.waiting.drain(..taken)),
            }
        }
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut port = self.lock();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = port.uart.read((offset as u8).wrapping_add(i as u8));
        }
        port.feed();
        if port.full
            && port.waiting.len() <= INPUT_LIMIT / 2
            && let Some(input) = self.input.get()
        {
            port.full = false;
            input.there_is_room();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut port = self.lock();
        for (i, &byte) in data.iter().enumerate() {
            let register = (offset as u8).wrapping_add(i as u8);
            let before = port.uart.writer().tail.total();
            // Neither the line nor the output fails.
            let _ = port.uart.write(register, byte);
            let printed = port.uart.writer().tail.total() - before;
            self.written.fetch_add(printed, Ordering::Relaxed);
        }
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial").field("written", &self.written()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
