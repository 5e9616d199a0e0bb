//! Reads the chunked transfer coding as curl does.
//!
//! ureq's own reader rejects bare line feeds, long extensions and chunks in HTTP/1.0. The headers of such a body are
//! therefore hidden from ureq, which then passes on the body as it was sent, up to the end of the connection.

use std::io::{self, BufRead, Read};

use ureq::http::HeaderMap;

/// `Transfer-Encoding` and `Content-Length` with another first letter. The length is the same, so a head can be changed in
/// place.
pub(super) const HIDDEN_TRANSFER_ENCODING: &str = "_ransfer-encoding";
pub(super) const HIDDEN_CONTENT_LENGTH: &str = "_ontent-length";

/// The same limit as in curl: more digits are an error, also if they are zeros.
const MAX_SIZE_DIGITS: u32 = 16;

/// Hides the two headers if the head's Transfer-Encoding contains `chunked`. Bytes after the head are not changed.
pub(super) fn hide(input: &mut [u8]) {
    let (mut chunked, mut lines) = (false, Vec::new());
    let mut start = 0;
    for line in input.split_inclusive(|byte| *byte == b'\n') {
        if matches!(line, b"\r\n" | b"\n") && start > 0 || !line.ends_with(b"\n") {
            break;
        }
        let mut parts = line.splitn(2, |byte| *byte == b':');
        let name = parts.next().unwrap_or_default().trim_ascii_end();
        let value = parts.next().unwrap_or_default();
        let is =
            |known: &str| name.len() == known.len() && name[1..].eq_ignore_ascii_case(&known.as_bytes()[1..]);
        if is(HIDDEN_TRANSFER_ENCODING) {
            let mut codings = value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
            chunked |= codings.any(|coding| coding.eq_ignore_ascii_case(b"chunked"));
            lines.push(start);
        } else if is(HIDDEN_CONTENT_LENGTH) {
            lines.push(start);
        }
        start += line.len();
    }
    if chunked {
        lines.into_iter().for_each(|start| input[start] = b'_');
    }
}

/// The values of Transfer-Encoding, hidden or not.
pub(super) fn transfer_encoding(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    let names = ["transfer-encoding", HIDDEN_TRANSFER_ENCODING];
    let values = names.into_iter().flat_map(|name| headers.get_all(name));
    values.map(|value| value.as_bytes())
}

/// Reads the data in the chunks. The end is the last chunk's size: trailers after it are not waited for.
pub(super) struct Chunks<R> {
    wire: R,
    state: ChunkState,
}

enum ChunkState {
    Size,
    /// The number of bytes of the chunk that are still to come.
    Data(u64),
    /// The line end after a chunk's data.
    DataEnd,
    Ended,
}

impl<R: BufRead> Chunks<R> {
    pub(super) fn new(wire: R) -> Self {
        let state = ChunkState::Size;
        Self { wire, state }
    }

    /// Reads hexadecimal digits and the rest of the line. A letter or digit after them is an error: it may have been meant as
    /// part of the number (`0x5`).
    fn size(&mut self) -> io::Result<u64> {
        let (mut size, mut digits) = (0, 0);
        let mut byte = self.byte()?;
        while matches!(byte, b' ' | b'\t') && digits == 0 {
            byte = self.byte()?;
        }
        while let Some(digit) = char::from(byte).to_digit(16) {
            digits += 1;
            if digits > MAX_SIZE_DIGITS {
                return Err(broken("a chunk's size has too many digits"));
            }
            size = size << 4 | u64::from(digit);
            byte = self.byte()?;
        }
        if digits == 0 || byte.is_ascii_alphanumeric() {
            return Err(broken("a chunk's size is not a hexadecimal number"));
        }
        while byte != b'\n' {
            byte = self.byte()?;
        }
        Ok(size)
    }

    fn byte(&mut self) -> io::Result<u8> {
        let byte = *self
            .wire
            .fill_buf()?
            .first()
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        self.wire.consume(1);
        Ok(byte)
    }
}

impl<R: BufRead> Read for Chunks<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            self.state = match self.state {
                ChunkState::Size => match self.size()? {
                    0 => ChunkState::Ended,
                    size => ChunkState::Data(size),
                },
                ChunkState::Data(left) => {
                    let most = usize::try_from(left).unwrap_or(usize::MAX).min(into.len());
                    let count = self.wire.read(&mut into[..most])?;
                    if count == 0 && most > 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    self.state = match left - count as u64 {
                        0 => ChunkState::DataEnd,
                        left => ChunkState::Data(left),
                    };
                    return Ok(count);
                }
                ChunkState::DataEnd => match self.byte()? {
                    b'\r' => ChunkState::DataEnd,
                    b'\n' => ChunkState::Size,
                    _ => return Err(broken("a chunk is longer than its size")),
                },
                ChunkState::Ended => return Ok(0),
            }
        }
    }
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hidden(head: &str) -> String {
        let mut head = head.as_bytes().to_vec();
        hide(&mut head);
        String::from_utf8(head).unwrap()
    }

    #[test]
    fn only_the_headers_of_chunks_are_hidden_in_any_order() {
        let chunked = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX: y\r\nTRANSFER-Encoding : gzip, Chunked\r\n";
        let expected =
            "HTTP/1.1 200 OK\r\n_ontent-Length: 5\r\nX: y\r\n_RANSFER-Encoding : gzip, Chunked\r\n";
        assert_eq!(hidden(chunked), expected);
        let in_body = "\r\nContent-Length: 7\r\n";
        assert_eq!(
            hidden(&format!("{chunked}{in_body}")),
            format!("{expected}{in_body}")
        );
        for other in [
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\nContent-Length: 5\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked",
            "HTTP/1.1 200 OK\r\n\r\nTransfer-Encoding: chunked\r\n",
            "",
            "\n\n",
        ] {
            assert_eq!(hidden(other), other);
        }
        // The length comes after the Transfer-Encoding was hidden.
        let later = hidden(&format!("{}Content-Length: 5\r\n", hidden(chunked)));
        assert_eq!(later, format!("{expected}_ontent-Length: 5\r\n"));
    }

    #[test]
    fn chunks_are_read_as_curl_reads_them() {
        let extension = format!("5;{}\r\nhello\r\n0\r\n\r\n", "a".repeat(500));
        let table: [(&str, Result<&str, io::ErrorKind>); 19] = [
            ("5\r\nhello\r\n0\r\n\r\n", Ok("hello")),
            ("2\r\nhe\r\n3\r\nllo\r\n00\r\nX: y\r\n\r\n", Ok("hello")),
            ("5\nhello\n0\n\n", Ok("hello")),
            ("5\r\nhello\n0\r\n\r\n", Ok("hello")),
            ("5\r\r\nhello\r\n0\r\n\r\n", Ok("hello")),
            ("5 junk\r\nhello\r\n0\r\n\r\n", Ok("hello")),
            (" 0000000000005  \r\nhello\r\n0\r\n\r\n", Ok("hello")),
            (&extension, Ok("hello")),
            ("5\r\nhello\r\n0\r\n", Ok("hello")),
            ("5\r\nhello\r\n", Err(io::ErrorKind::UnexpectedEof)),
            ("5\r\nhel", Err(io::ErrorKind::UnexpectedEof)),
            ("5", Err(io::ErrorKind::UnexpectedEof)),
            ("", Err(io::ErrorKind::UnexpectedEof)),
            ("hello", Err(io::ErrorKind::InvalidData)),
            ("-5\r\nhello", Err(io::ErrorKind::InvalidData)),
            ("0x5\r\nhello\r\n0\r\n\r\n", Err(io::ErrorKind::InvalidData)),
            ("5\r\nhelloo\r\n0\r\n\r\n", Err(io::ErrorKind::InvalidData)),
            ("5\r\nhello\r\n\r\n0\r\n\r\n", Err(io::ErrorKind::InvalidData)),
            (
                "00000000000000005\r\nhello\r\n0\r\n\r\n",
                Err(io::ErrorKind::InvalidData),
            ),
        ];
        for (wire, expected) in table {
            let mut data = String::new();
            let read = Chunks::new(wire.as_bytes()).read_to_string(&mut data);
            let seen = read.map(|_| data.as_str()).map_err(|error| error.kind());
            assert_eq!(seen, expected, "{wire:?}");
        }
    }
}
