//! Reads gzip, zlib and raw deflate as curl does: the first bytes decide which it is, and the trailer may be missing.
//!
//! gzip and zlib consist of a header, deflate data and a trailer with a checksum. flate2's own readers require the whole
//! trailer.

use std::io::{self, BufRead, Read};

use flate2::{Crc, Decompress, FlushDecompress, Status};

const UNKNOWN_FORMAT: &str = "it begins with neither a gzip nor a zlib header";

const FIXED_GZIP_HEADER_BYTES: usize = 10;

/// Decodes a stream, or several gzip streams in a row. Bytes after them are an error.
pub(super) struct Inflate<R> {
    wire: R,
    /// Whether data without a header is read as raw deflate.
    or_raw: bool,
    state: InflateState,
}

enum InflateState {
    Begin,
    Data(Decompress, Checksum),
    Trailer(Checksum),
    Ended,
}

/// The checksum in the trailer.
enum Checksum {
    None,
    Gzip(Crc),
    Zlib(adler2::Adler32),
}

impl<R: BufRead> Inflate<R> {
    /// For `Content-Encoding: gzip`. A zlib stream is accepted too.
    pub(super) fn gzip(wire: R) -> Self {
        let (or_raw, state) = (false, InflateState::Begin);
        Self { wire, or_raw, state }
    }

    /// For `Content-Encoding: deflate`, which is zlib in the standard and raw deflate from some servers.
    pub(super) fn deflate(wire: R) -> Self {
        Self {
            or_raw: true,
            ..Self::gzip(wire)
        }
    }

    fn header(&mut self) -> io::Result<Checksum> {
        // Only the first byte can be inspected without consuming it: the second one may not have come yet.
        let first = self.wire.fill_buf()?.first().copied().unwrap_or_default();
        if first == 0x1f {
            self.gzip_header()?;
            return Ok(Checksum::Gzip(Crc::new()));
        }
        // zlib with the method deflate (8). Raw deflate practically never begins like this: it would be a stored block whose
        // padding is not zero.
        if first & 0x0f == 8 {
            let mut header = [0; 2];
            self.wire.read_exact(&mut header)?;
            return match u16::from_be_bytes(header) % 31 {
                0 => Ok(Checksum::Zlib(adler2::Adler32::new())),
                _ => Err(invalid(UNKNOWN_FORMAT)),
            };
        }
        match self.or_raw {
            true => Ok(Checksum::None),
            false => Err(invalid(UNKNOWN_FORMAT)),
        }
    }

    fn gzip_header(&mut self) -> io::Result<()> {
        const HAS_SUM: u8 = 1 << 1;
        const HAS_EXTRA: u8 = 1 << 2;
        const HAS_NAME: u8 = 1 << 3;
        const HAS_COMMENT: u8 = 1 << 4;
        let mut fixed = [0; FIXED_GZIP_HEADER_BYTES];
        self.wire.read_exact(&mut fixed)?;
        let [0x1f, 0x8b, 8, flags, ..] = fixed else {
            return Err(invalid(UNKNOWN_FORMAT));
        };
        if flags & HAS_EXTRA != 0 {
            let mut length = [0; 2];
            self.wire.read_exact(&mut length)?;
            self.skip(u16::from_le_bytes(length).into())?;
        }
        for text in [HAS_NAME, HAS_COMMENT] {
            if flags & text != 0 {
                self.wire.skip_until(0)?;
            }
        }
        if flags & HAS_SUM != 0 {
            self.skip(2)?;
        }
        Ok(())
    }

    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        io::copy(&mut self.wire.by_ref().take(bytes), &mut io::sink()).map(drop)
    }

    /// Compares the checksum. The trailer may be missing or cut off.
    fn trailer(&mut self, sum: &Checksum) -> io::Result<()> {
        let expected = match sum {
            Checksum::None => Vec::new(),
            Checksum::Gzip(crc) => [crc.sum().to_le_bytes(), crc.amount().to_le_bytes()].concat(),
            Checksum::Zlib(sum) => sum.checksum().to_be_bytes().to_vec(),
        };
        let mut found = Vec::new();
        self.wire
            .by_ref()
            .take(expected.len() as u64)
            .read_to_end(&mut found)?;
        match expected.starts_with(&found) {
            true => Ok(()),
            false => Err(invalid("its checksum is wrong")),
        }
    }
}

impl<R: BufRead> Read for Inflate<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match &mut self.state {
                InflateState::Begin => {
                    let sum = self.header()?;
                    self.state = InflateState::Data(Decompress::new(false), sum);
                }
                InflateState::Data(data, sum) => {
                    let input = self.wire.fill_buf()?;
                    let is_end = input.is_empty();
                    let (taken, given) = (data.total_in(), data.total_out());
                    let status = data
                        .decompress(input, into, FlushDecompress::None)
                        .map_err(|error| invalid(error.to_string()))?;
                    // Both are bounded by the buffers' lengths.
                    let taken = (data.total_in() - taken) as usize;
                    let given = (data.total_out() - given) as usize;
                    self.wire.consume(taken);
                    match sum {
                        Checksum::None => {}
                        Checksum::Gzip(crc) => crc.update(&into[..given]),
                        Checksum::Zlib(sum) => sum.write_slice(&into[..given]),
                    }
                    if status == Status::StreamEnd {
                        self.state = InflateState::Trailer(std::mem::replace(sum, Checksum::None));
                    } else if is_end && given == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    if given > 0 {
                        return Ok(given);
                    }
                }
                InflateState::Trailer(sum) => {
                    let sum = std::mem::replace(sum, Checksum::None);
                    self.trailer(&sum)?;
                    self.state = match (sum, self.wire.fill_buf()?.first()) {
                        (_, None) => InflateState::Ended,
                        (Checksum::Gzip(_), Some(0x1f)) => InflateState::Begin,
                        _ => return Err(invalid("there are bytes after its end")),
                    };
                }
                InflateState::Ended => return Ok(0),
            }
        }
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
        let mut inflate = match or_raw {
            true => Inflate::deflate(wire),
            false => Inflate::gzip(wire),
        };
        let mut text = String::new();
        let read = inflate.read_to_string(&mut text);
        read.map(|_| text).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => "cut".to_owned(),
            _ => error.to_string(),
        })
    }

    #[test]
    fn every_format_is_read_with_and_without_its_trailer() {
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
        let with_header_sum = {
            let mut wire = gzip.clone();
            wire[3] |= 1 << 1;
            wire.splice(10..10, [0, 0]);
            wire
        };
        for (wire, or_raw, expected) in [
            (&gzip, false, "hello"),
            (&named, false, "hello"),
            (&with_header_sum, false, "hello"),
            (&twice, false, "hellohello"),
            (&zlib, false, "hello"),
            (&zlib, true, "hello"),
            (&bare, true, "hello"),
            (&gzip, true, "hello"),
        ] {
            assert_eq!(decoded(wire, or_raw).as_deref(), Ok(expected), "{wire:?}");
        }
        for missing in 1..=8 {
            assert_eq!(
                decoded(&gzip[..gzip.len() - missing], false).as_deref(),
                Ok("hello")
            );
        }
        for missing in 1..=4 {
            assert_eq!(
                decoded(&zlib[..zlib.len() - missing], true).as_deref(),
                Ok("hello")
            );
        }
    }

    #[test]
    fn truncated_and_invalid_data_are_errors() {
        let level = Compression::default();
        let gzip = encoded(GzEncoder::new(Vec::new(), level), GzEncoder::finish);
        let zlib = encoded(ZlibEncoder::new(Vec::new(), level), ZlibEncoder::finish);
        let bare = encoded(DeflateEncoder::new(Vec::new(), level), DeflateEncoder::finish);
        let with = |wire: &[u8], at_end: &[u8]| [&wire[..wire.len() - 4], at_end].concat();
        let (no_gzip, other, behind) = (
            Err(UNKNOWN_FORMAT.to_owned()),
            Err("its checksum is wrong".to_owned()),
            Err("there are bytes after its end".to_owned()),
        );
        for (wire, or_raw, expected) in [
            (gzip[..12].to_vec(), false, Err("cut".to_owned())),
            (gzip[..5].to_vec(), false, Err("cut".to_owned())),
            (bare[..3].to_vec(), true, Err("cut".to_owned())),
            (b"hello hello".to_vec(), false, no_gzip.clone()),
            (bare.clone(), false, no_gzip),
            (with(&gzip, b"abcd"), false, other.clone()),
            (with(&zlib, b"abcd"), true, other),
            ([&gzip[..], b"tail"].concat(), false, behind.clone()),
            ([&gzip[..], &[0; 16]].concat(), false, behind.clone()),
            ([&bare[..], b"tail"].concat(), true, behind),
        ] {
            assert_eq!(decoded(&wire, or_raw), expected, "{wire:?}");
        }
        assert!(decoded(b"hello hello", true).is_err());
    }
}
