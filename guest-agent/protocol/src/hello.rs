//! The framing of the one exchange on the hello port: a big-endian `u32` length, then that many
//! bytes of a protobuf message ([`Hello`] from the guest, [`HelloAck`] from the host).

use std::io::{self, Read, Write};

use protobuf::Message;

use crate::PROTOCOL_VERSION;
use crate::messages::{Hello, HelloAck};

/// A hello message longer than this is refused before it is read, bytes.
pub const MAX_LEN: usize = 4096;

/// Why the exchange failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection broke.
    #[error("hello: {0}")]
    Io(#[from] io::Error),
    /// The other side announced a message longer than [`MAX_LEN`].
    #[error("hello: message of {0} bytes announced, at most {MAX_LEN} are allowed")]
    TooLong(u32),
    /// The bytes are no such message.
    #[error("hello: malformed message: {0}")]
    Malformed(#[from] protobuf::Error),
    /// The sides speak different protocol versions.
    #[error(
        "hello: the guest agent speaks protocol version {guest}, this mvm speaks {PROTOCOL_VERSION}: \
         use the initramfs that belongs to this mvm"
    )]
    Version {
        /// The version that the guest announced.
        guest: u32,
    },
}

/// Guest side: sends `hello`. The guest has other things to do before it reads the answer.
///
/// # Errors
/// As [`Error`].
pub fn send(stream: &mut impl Write, hello: &Hello) -> Result<(), Error> {
    write_message(stream, hello)
}

/// Guest side: reads the host's answer.
///
/// # Errors
/// As [`Error`]; a refusal by the host is not an error but `accepted == false`.
pub fn read_answer(stream: &mut impl Read) -> Result<HelloAck, Error> {
    read_message(stream)
}

/// Host side: reads the guest's hello, without checking its version.
///
/// # Errors
/// As [`Error`].
pub fn receive(stream: &mut impl Read) -> Result<Hello, Error> {
    read_message(stream)
}

/// Host side: checks the version of a received hello and answers it, with a refusal if the
/// versions differ. `unix_time_ns` is the host's clock, which the guest takes over.
///
/// # Errors
/// [`Error::Version`] after the refusal was sent; else as [`Error`].
pub fn answer(stream: &mut impl Write, hello: &Hello, unix_time_ns: u64) -> Result<(), Error> {
    let mismatch = (hello.protocol_version != PROTOCOL_VERSION)
        .then_some(Error::Version { guest: hello.protocol_version });
    let ack = HelloAck {
        accepted: mismatch.is_none(),
        reason: mismatch.as_ref().map(ToString::to_string).unwrap_or_default(),
        unix_time_ns,
        ..Default::default()
    };
    write_message(stream, &ack)?;
    mismatch.map_or(Ok(()), Err)
}

fn write_message(stream: &mut impl Write, message: &impl Message) -> Result<(), Error> {
    let body = message.write_to_bytes()?;
    let len = u32::try_from(body.len()).map_err(|_| Error::TooLong(u32::MAX))?;
    let mut frame = Vec::with_capacity(4 + body.len());
    frame.extend_from_slice(&len.to_be_bytes());
    frame.extend_from_slice(&body);
    stream.write_all(&frame)?;
    Ok(stream.flush()?)
}

fn read_message<M: Message>(stream: &mut impl Read) -> Result<M, Error> {
    let mut len = [0; 4];
    stream.read_exact(&mut len)?;
    let announced = u32::from_be_bytes(len);
    let len = usize::try_from(announced).unwrap_or(usize::MAX);
    if len > MAX_LEN {
        return Err(Error::TooLong(announced));
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body)?;
    Ok(M::parse_from_bytes(&body)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn exchange(version: u32) -> (HelloAck, Result<(), Error>) {
        let (mut guest, mut host) = UnixStream::pair().unwrap();
        let hello = Hello { protocol_version: version, ready_ns: 7, ..Default::default() };
        send(&mut guest, &hello).unwrap();
        let received = receive(&mut host).unwrap();
        assert_eq!(received.ready_ns, 7);
        let answered = answer(&mut host, &received, 99);
        (read_answer(&mut guest).unwrap(), answered)
    }

    #[test]
    fn hello_of_this_version_is_accepted() {
        let (ack, answered) = exchange(PROTOCOL_VERSION);
        assert!(answered.is_ok() && ack.accepted && ack.unix_time_ns == 99);
    }

    #[test]
    fn hello_of_another_version_is_refused_with_the_reason() {
        let (ack, answered) = exchange(PROTOCOL_VERSION + 1);
        assert!(matches!(answered, Err(Error::Version { guest }) if guest == PROTOCOL_VERSION + 1));
        assert!(!ack.accepted && ack.reason.contains("protocol version"), "{}", ack.reason);
    }

    #[test]
    fn receive_too_long_announcement_returns_error_without_reading_on() {
        let bytes = u32::MAX.to_be_bytes();
        assert!(matches!(receive(&mut &bytes[..]), Err(Error::TooLong(u32::MAX))));
    }

    #[test]
    fn receive_truncated_returns_io_error() {
        assert!(matches!(receive(&mut &[0, 0, 0, 9, 1][..]), Err(Error::Io(_))));
    }
}
