//! ttrpc frames: a 10-byte header (length, stream id, type, flags; big-endian), then the payload.

use std::io::{self, Read, Write};

use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MESSAGE_LENGTH_MAX, MessageHeader};

/// Reads one frame; `None` at a clean end of the connection.
pub(super) fn read_frame(stream: &mut impl Read) -> io::Result<Option<(MessageHeader, Vec<u8>)>> {
    let mut bytes = [0; MESSAGE_HEADER_LENGTH];
    let mut filled = 0;
    while filled < bytes.len() {
        match stream.read(&mut bytes[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    let header = MessageHeader::from(&bytes);
    let len = usize::try_from(header.length).unwrap_or(usize::MAX);
    if len > MESSAGE_LENGTH_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("ttrpc frame of {len} bytes, at most {MESSAGE_LENGTH_MAX} are allowed"),
        ));
    }
    let mut payload = vec![0; len];
    stream.read_exact(&mut payload)?;
    Ok(Some((header, payload)))
}

/// Writes one frame by one write, so that it is one packet on vsock.
pub(super) fn write_frame(
    stream: &mut impl Write,
    kind: u8,
    stream_id: u32,
    payload: &[u8],
) -> io::Result<()> {
    if payload.len() > MESSAGE_LENGTH_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("message of {} bytes, at most {MESSAGE_LENGTH_MAX} are allowed", payload.len()),
        ));
    }
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let header = Vec::<u8>::from(MessageHeader { length, stream_id, type_: kind, flags: 0 });
    stream.write_all(&[&header, payload].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frame_survives_the_wire_and_end_is_clean() {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, 1, 77, b"abc").unwrap();
        let mut rest = &bytes[..];
        let (header, payload) = read_frame(&mut rest).unwrap().unwrap();
        assert_eq!((header.stream_id, header.type_, &payload[..]), (77, 1, &b"abc"[..]));
        assert!(read_frame(&mut rest).unwrap().is_none());
    }

    #[test]
    fn oversized_or_truncated_frames_are_errors() {
        let huge = [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 1, 0];
        assert_eq!(read_frame(&mut &huge[..]).unwrap_err().kind(), io::ErrorKind::InvalidData);
        let short = [0, 0, 0, 4, 0, 0];
        assert_eq!(read_frame(&mut &short[..]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert!(write_frame(&mut Vec::new(), 1, 1, &vec![0; MESSAGE_LENGTH_MAX + 1]).is_err());
    }
}
