//! The start of a connection to the STREAM port: a standard stream of a process, or a TCP connection to
//! the guest's loopback ([`Dial`]).
//!
//! For a standard stream the host sends a header, the agent answers one byte ([`Answer`]), then:
//!
//! * **stdin**: host to guest raw bytes; the host's half-close is the process's end of file.
//! * **stdout**, **stderr**: guest to host raw bytes; the agent closes after the last byte.
//! * **terminal**: both ways; the host's half-close only stops the input (a terminal has no end
//!   of file of its own), the agent closes once the last process has left the terminal.
//!
//! The bytes follow the header at once, the host need not wait for the answer to write. A stream
//! may be attached any time after CreateContainer or ExecProcess. One that nobody attaches makes
//! the process block when its pipe is full, as a pipe does. After a broken connection the same
//! stream may be attached again; bytes the agent had taken out of the pipe are lost.
//!
//! Header: 4 bytes magic `MVMS`, 1 byte kind, 1 byte length of the container id, 1 byte length of
//! the process id, 1 byte zero, then the two ids.
//!
//! For a connection to the guest's loopback: the magic, 1 byte 4, 2 bytes port (big endian), 1 byte zero. The
//! agent dials 127.0.0.1, then ::1, and answers [`Answer::NotFound`] if nobody listens there. After
//! [`Answer::Attached`] the bytes are the connection's, both ways; a half-close is passed on.

use std::io::{self, Read, Write};

use crate::is_valid_id;

const MAGIC: &[u8; 4] = b"MVMS";

/// Which stream of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Standard input.
    Stdin = 0,
    /// Standard output.
    Stdout = 1,
    /// Standard error.
    Stderr = 2,
    /// The terminal: all three in one.
    Terminal = 3,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Stdin, Self::Stdout, Self::Stderr, Self::Terminal]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// The byte in the place of a kind that asks for a connection to the guest's loopback.
const DIAL: u8 = 4;

/// What a connection to the STREAM port asks for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Request {
    /// A standard stream.
    Stream(Header),
    /// A connection to the guest's loopback.
    Dial(Dial),
}

/// Asks for a TCP connection to a port of the guest's loopback.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Dial {
    /// The port.
    pub port: u16,
}

/// Names one stream.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Header {
    /// The container.
    pub container_id: String,
    /// The process; empty for the container's first one.
    pub process_id: String,
    /// The stream.
    pub kind: Kind,
}

/// The agent's answer to a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Answer {
    /// The stream is attached.
    Attached = 0,
    /// There is no such container, process or stream.
    NotFound = 1,
    /// Another connection holds the stream.
    Busy = 2,
    /// The header is malformed.
    Malformed = 3,
}

/// Why a stream connection did not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection broke.
    #[error("stream: {0}")]
    Io(#[from] io::Error),
    /// The header is not one, or names invalid ids.
    #[error("stream: malformed header")]
    Malformed,
    /// The agent refused.
    #[error(
        "stream: the agent refused {kind:?} of container {container_id:?}, process {process_id:?}: {answer:?}"
    )]
    Refused {
        /// Its answer.
        answer: Answer,
        /// As asked for.
        kind: Kind,
        /// As asked for.
        container_id: String,
        /// As asked for.
        process_id: String,
    },
    /// Nobody in the guest accepts the connection.
    #[error("stream: nobody in the guest accepts connections to port {port} ({answer:?})")]
    NotDialled {
        /// The agent's answer.
        answer: Answer,
        /// As asked for.
        port: u16,
    },
}

impl Answer {
    /// Reads the agent's answer.
    fn read(stream: &mut impl Read) -> io::Result<Self> {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        Ok(match byte[0] {
            0 => Self::Attached,
            1 => Self::NotFound,
            2 => Self::Busy,
            _ => Self::Malformed,
        })
    }
}

impl Dial {
    /// Host side: asks for it. The answer is read by [`Dial::confirm`].
    ///
    /// # Errors
    /// The connection breaks.
    pub fn write(self, stream: &mut impl Write) -> Result<(), Error> {
        let [high, low] = self.port.to_be_bytes();
        let [m0, m1, m2, m3] = *MAGIC;
        Ok(stream.write_all(&[m0, m1, m2, m3, DIAL, high, low, 0])?)
    }

    /// Host side: reads the agent's answer.
    ///
    /// # Errors
    /// [`Error::NotDialled`] if it is not [`Answer::Attached`].
    pub fn confirm(self, stream: &mut impl Read) -> Result<(), Error> {
        match Answer::read(stream)? {
            Answer::Attached => Ok(()),
            answer => Err(Error::NotDialled { answer, port: self.port }),
        }
    }
}

impl Request {
    /// Guest side: reads what a connection asks for.
    ///
    /// # Errors
    /// [`Error::Malformed`] (to be answered) or [`Error::Io`].
    pub fn read(stream: &mut impl Read) -> Result<Self, Error> {
        let mut fixed = [0; 8];
        stream.read_exact(&mut fixed)?;
        let [m0, m1, m2, m3, kind, second, third, zero] = fixed;
        if [m0, m1, m2, m3] != *MAGIC || zero != 0 {
            return Err(Error::Malformed);
        }
        if kind == DIAL {
            return Ok(Self::Dial(Dial { port: u16::from_be_bytes([second, third]) }));
        }
        let kind = Kind::from_byte(kind).ok_or(Error::Malformed)?;
        let mut id = |len: u8| -> Result<String, Error> {
            let mut bytes = vec![0; usize::from(len)];
            stream.read_exact(&mut bytes)?;
            String::from_utf8(bytes).map_err(|_| Error::Malformed)
        };
        let header = Header { container_id: id(second)?, process_id: id(third)?, kind };
        header.check()?;
        Ok(Self::Stream(header))
    }
}

impl Header {
    /// Host side: writes the header. The answer is read by [`Header::confirm`].
    ///
    /// # Errors
    /// [`Error::Malformed`] for ids that cannot be sent, [`Error::Io`] when the connection breaks.
    pub fn write(&self, stream: &mut impl Write) -> Result<(), Error> {
        self.check()?;
        let len = |id: &str| u8::try_from(id.len()).map_err(|_| Error::Malformed);
        let mut bytes = Vec::with_capacity(8 + self.container_id.len() + self.process_id.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&[
            self.kind as u8,
            len(&self.container_id)?,
            len(&self.process_id)?,
            0,
        ]);
        bytes.extend_from_slice(self.container_id.as_bytes());
        bytes.extend_from_slice(self.process_id.as_bytes());
        Ok(stream.write_all(&bytes)?)
    }

    /// Host side: reads the agent's answer.
    ///
    /// # Errors
    /// [`Error::Refused`] if it is not [`Answer::Attached`].
    pub fn confirm(&self, stream: &mut impl Read) -> Result<(), Error> {
        let answer = match Answer::read(stream)? {
            Answer::Attached => return Ok(()),
            answer => answer,
        };
        Err(Error::Refused {
            answer,
            kind: self.kind,
            container_id: self.container_id.clone(),
            process_id: self.process_id.clone(),
        })
    }

    fn check(&self) -> Result<(), Error> {
        let process_ok = self.process_id.is_empty() || is_valid_id(&self.process_id);
        if process_ok && is_valid_id(&self.container_id) { Ok(()) } else { Err(Error::Malformed) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(container_id: &str, process_id: &str) -> Header {
        Header {
            container_id: container_id.into(),
            process_id: process_id.into(),
            kind: Kind::Stderr,
        }
    }

    #[test]
    fn header_survives_the_wire() {
        for sent in [header("c1", ""), header(&"c".repeat(128), &"p".repeat(128))] {
            let mut bytes = Vec::new();
            sent.write(&mut bytes).unwrap();
            bytes.extend_from_slice(b"payload");
            let mut rest = &bytes[..];
            assert_eq!(Request::read(&mut rest).unwrap(), Request::Stream(sent));
            assert_eq!(rest, b"payload", "reads not a byte too many");
        }
    }

    #[test]
    fn dial_survives_the_wire_and_says_what_was_refused() {
        let dial = Dial { port: 8080 };
        let mut bytes = Vec::new();
        dial.write(&mut bytes).unwrap();
        bytes.extend_from_slice(b"payload");
        let mut rest = &bytes[..];
        assert_eq!(Request::read(&mut rest).unwrap(), Request::Dial(dial));
        assert_eq!(rest, b"payload");
        dial.confirm(&mut &[Answer::Attached as u8][..]).unwrap();
        let error = dial.confirm(&mut &[Answer::NotFound as u8][..]).unwrap_err();
        assert!(error.to_string().contains("8080"), "{error}");
    }

    #[test]
    fn read_of_bad_headers_returns_malformed() {
        let mut good = Vec::new();
        header("c1", "p").write(&mut good).unwrap();
        for (at, byte) in [(0, b'X'), (4, 5), (7, 1), (8, b'/'), (10, 0xff)] {
            let mut bad = good.clone();
            bad[at] = byte;
            assert!(matches!(Request::read(&mut &bad[..]), Err(Error::Malformed)), "byte {at}");
        }
    }

    #[test]
    fn write_of_path_like_ids_returns_malformed() {
        for bad in [header("../etc", ""), header("", ""), header("c", "a/b")] {
            assert!(matches!(bad.write(&mut Vec::new()), Err(Error::Malformed)));
        }
    }

    #[test]
    fn confirm_names_what_was_refused() {
        let error = header("c1", "p").confirm(&mut &[Answer::Busy as u8][..]).unwrap_err();
        assert!(error.to_string().contains("Busy") && error.to_string().contains("c1"), "{error}");
    }
}
