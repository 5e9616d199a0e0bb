//! gzip, zlib and bare deflate, read as curl reads them: told apart by their first bytes, and with or without what stands
//! behind the data.
//!
//! Every form is a header, deflate data and a trailer with their checksum. flate2's readers want the trailer whole.

use std::io::{self, BufRead, Read};

use flate2::{Crc, Decompress, FlushDecompress, Status};

const NO_FORM: &str = "it begins neither as gzip nor as zlib does";

const FIXED_GZIP_HEADER_BYTES: usize = 10;

/// The decoded bytes of a stream, or of several gzip ones in a row. What stands behind them is an error.
pub(super) struct Inflate<R> {
    wire: R,
    /// Whether data without any header is taken for bare deflate.
    or_bare: bool,
    state: State,
}

enum State {
    Begin,
    Data(Decompress, Sum),
    Trailer(Sum),
    Ended,
}

/// What the trailer says of the data.
enum Sum {
    None,
    Gzip(Crc),
    Zlib(adler2::Adler32),
}

impl<R: BufRead> Inflate<R> {
    /// `Content-Encoding: gzip`; a zlib stream is read, too.
    pub fn gzip(wire: R) -> Self {
        let (or_bare, state) = (false, State::Begin);
        Self { wire, or_bare, state }
    }

    /// `Content-Encoding: deflate`, which is zlib by the standard, and bare deflate from some servers.
    pub fn deflate(wire: R) -> Self {
        Self {
            or_bare: true,
            ..Self::gzip(wire)
        }
    }

    fn header(&mut self) -> io::Result<Sum> {
        // Only the first byte can be looked at without taking it: the next one may not be there yet.
        let first = self.wire.fill_buf()?.first().copied().unwrap_or_default();
        if first == 0x1f {
            self.gzip_header()?;
            return Ok(Sum::Gzip(Crc::new()));
        }
        // zlib, with deflate (8) in it. A bare stream hardly begins like this: stored data whose padding is not zero.
        if first & 0x0f == 8 {
            let mut header = [0; 2];
            self.wire.read_exact(&mut header)?;
            return match u16::from_be_bytes(header) % 31 {
                0 => Ok(Sum::Zlib(adler2::Adler32::new())),
                _ => Err(invalid(NO_FORM)),
            };
        }
        match self.or_bare {
            true => Ok(Sum::None),
            false => Err(invalid(NO_FORM)),
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
            return Err(invalid(NO_FORM));
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

    /// Data whose trailer is missing, or a part of it, is whole all the same.
    fn trailer(&mut self, sum: &Sum) -> io::Result<()> {
        let expected = match sum {
            Sum::None => Vec::new(),
            Sum::Gzip(crc) => [crc.sum().to_le_bytes(), crc.amount().to_le_bytes()].concat(),
            Sum::Zlib(sum) => sum.checksum().to_be_bytes().to_vec(),
        };
        let mut found = Vec::new();
        self.wire
            .by_ref()
            .take(expected.len() as u64)
            .read_to_end(&mut found)?;
        match expected.starts_with(&found) {
            true => Ok(()),
            false => Err(invalid("its checksum is of other data")),
        }
    }
}

impl<R: BufRead> Read for Inflate<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match &mut self.state {
                State::Begin => {
                    let sum = self.header()?;
                    self.state = State::Data(Decompress::new(false), sum);
                }
                State::Data(data, sum) => {
                    let input = self.wire.fill_buf()?;
                    let is_end = input.is_empty();
                    let (taken, given) = (data.total_in(), data.total_out());
                    let status = data
                        .decompress(input, into, FlushDecompress::None)
                        .map_err(|error| invalid(&error.to_string()))?;
                    // Both are bounded by the buffers' lengths.
                    let taken = (data.total_in() - taken) as usize;
                    let given = (data.total_out() - given) as usize;
                    self.wire.consume(taken);
                    match sum {
                        Sum::None => {}
                        Sum::Gzip(crc) => crc.update(&into[..given]),
                        Sum::Zlib(sum) => sum.write_slice(&into[..given]),
                    }
                    if status == Status::StreamEnd {
                        self.state = State::Trailer(std::mem::replace(sum, Sum::None));
                    } else if is_end && given == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    if given > 0 {
                        return Ok(given);
                    }
                }
                State::Trailer(sum) => {
                    let sum = std::mem::replace(sum, Sum::None);
                    self.trailer(&sum)?;
                    self.state = match (sum, self.wire.fill_buf()?.first()) {
                        (_, None) => State::Ended,
                        (Sum::Gzip(_), Some(0x1f)) => State::Begin,
                        _ => return Err(invalid("bytes after its end")),
                    };
                }
                State::Ended => return Ok(0),
            }
        }
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
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

    fn decoded(wire: &[u8], or_bare: bool) -> Result<String, String> {
        let mut inflate = match or_bare {
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
    fn every_form_is_read_with_and_without_its_trailer() {
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
        for (wire, or_bare, expected) in [
            (&gzip, false, "hello"),
            (&named, false, "hello"),
            (&with_header_sum, false, "hello"),
            (&twice, false, "hellohello"),
            (&zlib, false, "hello"),
            (&zlib, true, "hello"),
            (&bare, true, "hello"),
            (&gzip, true, "hello"),
        ] {
            assert_eq!(decoded(wire, or_bare).as_deref(), Ok(expected), "{wire:?}");
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
    fn what_is_cut_or_wrong_says_so() {
        let level = Compression::default();
        let gzip = encoded(GzEncoder::new(Vec::new(), level), GzEncoder::finish);
        let zlib = encoded(ZlibEncoder::new(Vec::new(), level), ZlibEncoder::finish);
        let bare = encoded(DeflateEncoder::new(Vec::new(), level), DeflateEncoder::finish);
        let with = |wire: &[u8], at_end: &[u8]| [&wire[..wire.len() - 4], at_end].concat();
        let (no_gzip, other, behind) = (
            Err(NO_FORM.to_owned()),
            Err("its checksum is of other data".to_owned()),
            Err("bytes after its end".to_owned()),
        );
        for (wire, or_bare, expected) in [
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
            assert_eq!(decoded(&wire, or_bare), expected, "{wire:?}");
        }
        assert!(decoded(b"hello hello", true).is_err());
    }
}
