//! The start of a standard-stream connection to the STREAM port.
//!
//! The host sends a header, the agent answers one byte ([`Answer`]), then:
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
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        let answer = match byte[0] {
            0 => return Ok(()),
            1 => Answer::NotFound,
            2 => Answer::Busy,
            _ => Answer::Malformed,
        };
        Err(Error::Refused {
            answer,
            kind: self.kind,
            container_id: self.container_id.clone(),
            process_id: self.process_id.clone(),
        })
    }

    /// Guest side: reads a header.
    ///
    /// # Errors
    /// [`Error::Malformed`] (to be answered) or [`Error::Io`].
    pub fn read(stream: &mut impl Read) -> Result<Self, Error> {
        let mut fixed = [0; 8];
        stream.read_exact(&mut fixed)?;
        let [m0, m1, m2, m3, kind, container_len, process_len, zero] = fixed;
        let kind = Kind::from_byte(kind).ok_or(Error::Malformed)?;
        if [m0, m1, m2, m3] != *MAGIC || zero != 0 {
            return Err(Error::Malformed);
        }
        let mut id = |len: u8| -> Result<String, Error> {
            let mut bytes = vec![0; usize::from(len)];
            stream.read_exact(&mut bytes)?;
            String::from_utf8(bytes).map_err(|_| Error::Malformed)
        };
        let header = Self { container_id: id(container_len)?, process_id: id(process_len)?, kind };
        header.check()?;
        Ok(header)
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
            assert_eq!(Header::read(&mut rest).unwrap(), sent);
            assert_eq!(rest, b"payload", "reads not a byte too many");
        }
    }

    #[test]
    fn read_of_bad_headers_returns_malformed() {
        let mut good = Vec::new();
        header("c1", "p").write(&mut good).unwrap();
        for (at, byte) in [(0, b'X'), (4, 4), (7, 1), (8, b'/'), (10, 0xff)] {
            let mut bad = good.clone();
            bad[at] = byte;
            assert!(matches!(Header::read(&mut &bad[..]), Err(Error::Malformed)), "byte {at}");
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
