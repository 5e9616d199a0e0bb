//! Reads gzip, zlib and raw deflate as curl does: the first byte decides which it is.

use std::io::{self, BufRead, Read};

use flate2::bufread::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};

const UNKNOWN_FORMAT: &str = "it begins with neither a gzip nor a zlib header";

/// Decodes a stream, or several gzip streams in a row. Bytes after them are an error. `or_raw` is whether data without a
/// header is read as raw deflate: `Content-Encoding: deflate` is zlib in the standard and raw deflate from some servers.
pub(super) fn inflate<'a>(mut wire: impl BufRead + 'a, or_raw: bool) -> io::Result<Box<dyn Read + 'a>> {
    // Only the first byte can be inspected without consuming it: the second one may not have come yet.
    let first = wire.fill_buf()?.first().copied().unwrap_or_default();
    Ok(match first {
        0x1f => Box::new(MultiGzDecoder::new(wire)),
        // zlib with the method deflate (8). Raw deflate practically never begins like this: it would be a stored block whose
        // padding is not zero.
        _ if first & 0x0f == 8 => Box::new(OneStream {
            decoder: ZlibDecoder::new(wire),
            wire: ZlibDecoder::get_mut,
        }),
        _ if or_raw => Box::new(OneStream {
            decoder: DeflateDecoder::new(wire),
            wire: DeflateDecoder::get_mut,
        }),
        _ => return Err(invalid(UNKNOWN_FORMAT)),
    })
}

/// Reads one stream to the end of the body, not only to its own end: what follows may be cut off.
struct OneStream<D, R> {
    decoder: D,
    wire: fn(&mut D) -> &mut R,
}

impl<D: Read, R: BufRead> Read for OneStream<D, R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.decoder.read(into)?;
        if count == 0 && !(self.wire)(&mut self.decoder).fill_buf()?.is_empty() {
            return Err(invalid("there are bytes after its end"));
        }
        Ok(count)
    }
}

pub(super) fn invalid(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};

    use super::*;

    fn encoded<W: Write>(mut encoder: W, finish: impl FnOnce(W) -> io::Result<Vec<u8>>) -> Vec<u8> {
        encoder.write_all(b"hello").unwrap();
        finish(encoder).unwrap()
    }

    fn decoded(wire: &[u8], or_raw: bool) -> Result<String, String> {
        let mut text = String::new();
        let read = inflate(wire, or_raw).and_then(|mut body| body.read_to_string(&mut text));
        read.map(|_| text).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => "cut".to_owned(),
            _ => error.to_string(),
        })
    }

    #[test]
    fn every_format_is_read() {
        let level = Compression::default();
        let gzip = encoded(GzEncoder::new(Vec::new(), level), GzEncoder::finish);
        let zlib = encoded(ZlibEncoder::new(Vec::new(), level), ZlibEncoder::finish);
        let bare = encoded(DeflateEncoder::new(Vec::new(), level), DeflateEncoder::finish);
        let named = {
            let builder = flate2::GzBuilder::new()
                .filename("page")
                .comment("a page")
                .extra("more");
            encoded(builder.write(Vec::new(), level), GzEncoder::finish)
        };
        let twice = [gzip.clone(), gzip.clone()].concat();
        for (wire, or_raw, expected) in [
            (&gzip, false, "hello"),
            (&named, false, "hello"),
            (&twice, false, "hellohello"),
            (&zlib, false, "hello"),
            (&zlib, true, "hello"),
            (&bare, true, "hello"),
            (&gzip, true, "hello"),
        ] {
            assert_eq!(decoded(wire, or_raw).as_deref(), Ok(expected), "{wire:?}");
        }
    }

    #[test]
    fn truncated_and_invalid_data_are_errors() {
        let level = Compression::default();
        let gzip = encoded(GzEncoder::new(Vec::new(), level), GzEncoder::finish);
        let zlib = encoded(ZlibEncoder::new(Vec::new(), level), ZlibEncoder::finish);
        let bare = encoded(DeflateEncoder::new(Vec::new(), level), DeflateEncoder::finish);
        let with = |wire: &[u8], at_end: &[u8]| [&wire[..wire.len() - 4], at_end].concat();
        let (cut, no_gzip, behind) = ("cut", UNKNOWN_FORMAT, "there are bytes after its end");
        for (wire, or_raw, expected) in [
            (gzip[..12].to_vec(), false, cut),
            (gzip[..5].to_vec(), false, cut),
            (gzip[..gzip.len() - 8].to_vec(), false, cut),
            (gzip[..gzip.len() - 1].to_vec(), false, cut),
            (zlib[..zlib.len() - 1].to_vec(), true, cut),
            (bare[..3].to_vec(), true, cut),
            (b"hello hello".to_vec(), false, "corrupt deflate stream"),
            (bare.clone(), false, no_gzip),
            (
                with(&gzip, b"abcd"),
                false,
                "corrupt gzip stream does not have a matching checksum",
            ),
            (with(&zlib, b"abcd"), true, "corrupt deflate stream"),
            (
                [&gzip[..], b"a tail of bytes"].concat(),
                false,
                "invalid gzip header",
            ),
            ([&gzip[..], &[0; 16]].concat(), false, "invalid gzip header"),
            ([&zlib[..], b"tail"].concat(), true, behind),
            ([&bare[..], b"tail"].concat(), true, behind),
        ] {
            assert_eq!(decoded(&wire, or_raw), Err(expected.to_owned()), "{wire:?}");
        }
        assert!(decoded(b"hello hello", true).is_err());
    }
}
