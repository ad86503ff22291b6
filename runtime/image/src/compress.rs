//! Compressed streams, recognised by their first bytes.

use std::io::{self, BufRead, BufReader, Read};

/// Buffer in front of a decoder.
const BUFFER: usize = 128 << 10;

/// How a stream is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// RFC 1952, one or more members.
    Gzip,
    /// RFC 8878, one or more frames.
    Zstd,
}

impl Compression {
    /// Recognises a compression by the magic number that a stream begins with.
    pub fn detect(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            // A zstd frame, or a skippable frame in front of one (pzstd, zstd:chunked).
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }
}

/// Decompresses `input` whatever its compression is.
///
/// Media types are not asked: `docker save` and several builders label layers wrongly, and the
/// layer's diff-id says in the end whether the result is what was meant.
pub(crate) fn decoder<'a, R: Read + 'a>(input: R) -> io::Result<Box<dyn Read + 'a>> {
    let mut input = BufReader::with_capacity(BUFFER, input);
    Ok(match Compression::detect(input.fill_buf()?) {
        Compression::None => Box::new(input),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        Compression::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(input)?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn decoded(bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        decoder(bytes).unwrap().read_to_end(&mut out).unwrap();
        out
    }

    #[test]
    fn decoder_reads_plain_gzip_and_zstd() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(b"text").unwrap();
        let gzip = gzip.finish().unwrap();
        assert_eq!(decoded(b"text"), b"text");
        assert_eq!(decoded(b""), b"");
        assert_eq!(decoded(&gzip), b"text");
        assert_eq!(decoded(&zstd::encode_all(&b"text"[..], 1).unwrap()), b"text");
        // pigz and registries that mirror estargz write several members.
        assert_eq!(decoded(&[gzip.clone(), gzip].concat()), b"texttext");
    }
}
