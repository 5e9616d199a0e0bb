//! Reads bodies in pieces: removes the codings, decodes the charset and stops at the limit.
//!
//! The limit counts decoded bytes, so that a small compressed body cannot expand to a large one.

use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

use brotli_decompressor::{BrotliDecompressStream, BrotliResult, BrotliState, StandardAlloc};
use encoding_rs::{CoderResult, Encoding, UTF_8};
use ureq::Body;
use ureq::http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use ureq::http::{HeaderMap, Response};

use super::chunks::{self, Chunks};
use super::inflate::{inflate, invalid};
use crate::check::fault::CheckFault;
use crate::check::pattern::DeadlinePassed;
use crate::clock::instant_now;
use crate::lock::lock;

/// The `Accept-Encoding` of a request whose body is read.
pub(super) const ACCEPTED_CODINGS: &str = "gzip, br";

/// How much of a body each stage of the decoding holds at once: little, because every check under way has several.
const PIECE_BYTES: usize = 8 * 1024;

/// The same limit as in curl. Each coding multiplies what a received byte can expand to.
const MAX_CODINGS: usize = 5;

/// How many brotli decoders the process may use at once, since each takes 16 MiB for its window and up to 4 MiB for its
/// tables. A decoder is only used once a body has come whole, so a slow server cannot occupy it.
pub const MAX_BROTLI_DECODERS: usize = 4;
pub const BROTLI_DECODER_BYTES: u64 = 20 << 20;

/// The memory that reading a body takes: a piece in every stage, and inflate's window of 32 KiB and tables. A brotli body is
/// also kept whole, which comes on top, and so do the three texts of up to 64 KiB that the header of a gzip stream may have.
pub const READING_BYTES: u64 = 160 << 10;

/// How much longer than its decoded content a brotli body can be, because of its own headers.
const BROTLI_OVERHEAD_BYTES: u64 = 64 << 10;

/// Where the reading of a body ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BodyEnd {
    Complete,
    /// At the limit: the body is longer.
    Beyond,
}

/// Why a body was not read to its end.
#[derive(Debug)]
pub(super) enum BodyFault {
    /// It was cut off, stalled, or its coding is not what its headers say.
    Transfer(ureq::Error),
    /// No brotli decoder was free before the deadline.
    NoDecoder,
    /// The deadline passed while a piece was searched.
    DeadlinePassed(DeadlinePassed),
}

impl From<DeadlinePassed> for BodyFault {
    fn from(late: DeadlinePassed) -> Self {
        Self::DeadlinePassed(late)
    }
}

impl From<io::Error> for BodyFault {
    fn from(error: io::Error) -> Self {
        Self::Transfer(CheckFault::Coding(error).into())
    }
}

/// The limits for reading a body.
pub(super) struct BodyLimits<'a> {
    pub max_bytes: u64,
    pub deadline: Instant,
    pub brotli: &'a BrotliDecoders,
}

/// Passes the decoded body to `each` as text, in pieces, up to `max_bytes`. Counts the decoded bytes in `bytes`, also if the
/// body then fails.
///
/// The text is decoded with the charset of the headers, or as UTF-8 without one. As in browsers, a byte-order mark takes
/// precedence over the header. Bytes that cannot be decoded become U+FFFD.
pub(super) fn read(
    response: &mut Response<Body>,
    limits: &BodyLimits<'_>,
    bytes: &mut u64,
    mut each: impl FnMut(&str) -> Result<(), BodyFault>,
) -> Result<BodyEnd, BodyFault> {
    let codings = Codings::of(response.headers())?;
    let charset = charset(response.headers());
    let mut wire = Wire {
        reader: response.body_mut().as_reader(),
        failure: None,
    };
    let result = codings
        .decoder(&mut wire, limits)
        .and_then(|mut body| read_text(&mut body, charset, limits.max_bytes, bytes, &mut each));
    match (result, wire.failure) {
        (Err(BodyFault::Transfer(_)) | Ok(_), Some(failure)) => Err(BodyFault::Transfer(failure)),
        (result, _) => result,
    }
}

fn read_text(
    body: &mut dyn Read,
    charset: Option<&'static Encoding>,
    max_bytes: u64,
    bytes: &mut u64,
    each: &mut dyn FnMut(&str) -> Result<(), BodyFault>,
) -> Result<BodyEnd, BodyFault> {
    let mut decoder = match charset {
        Some(charset) => charset.new_decoder(),
        None => UTF_8.new_decoder_with_bom_removal(),
    };
    let mut piece = [0; PIECE_BYTES];
    let mut text = String::with_capacity(PIECE_BYTES);
    loop {
        // One byte above the limit is read to find out whether the body is longer.
        let left = max_bytes - *bytes;
        let most = usize::try_from(left).map_or(PIECE_BYTES, |left| PIECE_BYTES.min(left.saturating_add(1)));
        let count = body.read(&mut piece[..most])?;
        let end = match (count, count as u64 > left) {
            (0, _) => Some(BodyEnd::Complete),
            (_, true) => Some(BodyEnd::Beyond),
            (_, false) => None,
        };
        let count = (count as u64).min(left) as usize;
        *bytes += count as u64;
        let mut rest = &piece[..count];
        loop {
            text.clear();
            let (result, taken, _) = decoder.decode_to_string(rest, &mut text, end.is_some());
            rest = &rest[taken..];
            each(&text)?;
            if result == CoderResult::InputEmpty {
                break;
            }
        }
        if let Some(end) = end {
            return Ok(end);
        }
    }
}

/// The body as it was sent. Keeps ureq's error, because decoders turn it into errors of their own.
struct Wire<'a> {
    reader: ureq::BodyReader<'a>,
    failure: Option<ureq::Error>,
}

impl Read for Wire<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.reader.read(into).map_err(|error| {
            let failure = ureq::Error::from(error);
            let error = io::Error::other(failure.to_string());
            self.failure = Some(failure);
            error
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Coding {
    Gzip,
    Deflate,
    Brotli,
}

/// The codings of a body, in the order in which they were applied.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Codings {
    codings: Vec<Coding>,
    chunked: bool,
}

impl Codings {
    /// A coding that exists but is not supported is an error. Any other word (`none`, `utf-8`, `binary`) is ignored, as in
    /// browsers.
    fn of(headers: &HeaderMap) -> io::Result<Self> {
        let content = headers.get_all(CONTENT_ENCODING).iter();
        let content = content.map(|value| ("content-encoding", value.as_bytes()));
        let transfer = chunks::transfer_encoding(headers).map(|value| ("transfer-encoding", value));
        let (mut codings, mut chunked) = (Vec::new(), false);
        for (header, values) in content.chain(transfer) {
            for word in String::from_utf8_lossy(values).split(',') {
                let word = word.trim().to_ascii_lowercase();
                match word.as_str() {
                    // Names are case-insensitive, and x-gzip is gzip (RFC 9110, section 8.4.1).
                    "gzip" | "x-gzip" => codings.push(Coding::Gzip),
                    "deflate" | "x-deflate" => codings.push(Coding::Deflate),
                    "br" => codings.push(Coding::Brotli),
                    "chunked" => chunked |= header == "transfer-encoding",
                    _ if is_compression(&word) => {
                        return Err(invalid(format!("unsupported {header} {word}")));
                    }
                    _ => {}
                }
            }
        }
        if codings.len() > MAX_CODINGS {
            let what = format!("it has {} codings; the limit is {MAX_CODINGS}", codings.len());
            return Err(invalid(what));
        }
        Ok(Self { codings, chunked })
    }

    fn decoder<'a>(
        &self,
        wire: &'a mut Wire<'_>,
        limits: &BodyLimits<'_>,
    ) -> Result<Box<dyn Read + 'a>, BodyFault> {
        let mut body: Box<dyn BufRead + 'a> = Box::new(buffered(wire));
        if self.chunked {
            body = Box::new(buffered(Chunks::new(body)));
        }
        // An empty body is accepted with every coding, because servers do not encode it.
        if body.fill_buf()?.is_empty() {
            return Ok(Box::new(body));
        }
        for coding in self.codings.iter().rev() {
            body = match coding {
                Coding::Gzip => Box::new(buffered(inflate(body, false)?)),
                Coding::Deflate => Box::new(buffered(inflate(body, true)?)),
                Coding::Brotli => {
                    let (decoded, failure) = limits.brotli.decode(body, limits)?;
                    Box::new(buffered(Cursor::new(decoded).chain(Failing(failure))))
                }
            };
        }
        Ok(Box::new(body))
    }
}

/// The codings registered at IANA and the names of compression programs that are not supported.
const UNSUPPORTED: &str = "zstd compress dcb dcz exi pack200-gzip aes128gcm sdch brotli bzip bzip2 bz2 lzma lzip lzo lz4 xz \
                           zip zlib snappy";

fn is_compression(word: &str) -> bool {
    let name = word.strip_prefix("x-").unwrap_or(word);
    UNSUPPORTED.split(' ').any(|unsupported| unsupported == name)
}

fn buffered<R: Read>(reader: R) -> BufReader<R> {
    BufReader::with_capacity(PIECE_BYTES, reader)
}

/// A reader that is empty, or fails once if there is an error.
struct Failing(Option<io::Error>);

impl Read for Failing {
    fn read(&mut self, _into: &mut [u8]) -> io::Result<usize> {
        self.0.take().map_or(Ok(0), Err)
    }
}

/// Counts how many brotli decoders of the process are free.
#[derive(Debug)]
pub(super) struct BrotliDecoders {
    free: Mutex<usize>,
    changed: Condvar,
}

impl BrotliDecoders {
    pub(super) fn new() -> Self {
        Self {
            free: Mutex::new(MAX_BROTLI_DECODERS),
            changed: Condvar::new(),
        }
    }

    /// Decodes the whole body, up to one byte above the limit. Also returns the error that came after that part, if any.
    fn decode(
        &self,
        body: impl Read,
        limits: &BodyLimits<'_>,
    ) -> Result<(Vec<u8>, Option<io::Error>), BodyFault> {
        let mut coded = Vec::new();
        let most = limits.max_bytes.saturating_add(BROTLI_OVERHEAD_BYTES);
        let cut = body.take(most).read_to_end(&mut coded).err();

        let time_left = limits.deadline.saturating_duration_since(instant_now());
        let free = lock(&self.free);
        let (mut free, _) = self
            .changed
            .wait_timeout_while(free, time_left, |free| *free == 0)
            .unwrap_or_else(PoisonError::into_inner);
        *free = free.checked_sub(1).ok_or(BodyFault::NoDecoder)?;
        drop(free);
        let _guard = DecoderGuard(self);
        let (decoded, failure) = decode_brotli(&coded, limits.max_bytes);
        Ok((decoded, cut.or(failure)))
    }
}

/// Returns the decoder when it is dropped, also after a panic.
struct DecoderGuard<'a>(&'a BrotliDecoders);

impl Drop for DecoderGuard<'_> {
    fn drop(&mut self) {
        *lock(&self.0.free) += 1;
        self.0.changed.notify_one();
    }
}

/// Accepts windows of up to 16 MiB, as in RFC 7932. The larger ones of brotli's own extension are an error.
fn decode_brotli(coded: &[u8], max_bytes: u64) -> (Vec<u8>, Option<io::Error>) {
    let alloc = StandardAlloc::default;
    let mut state = BrotliState::new_strict(alloc(), alloc(), alloc());
    let mut decoded = Vec::new();
    let mut piece = [0; PIECE_BYTES];
    let (mut left, mut taken, mut total) = (coded.len(), 0, 0);
    let result = loop {
        let (mut space, mut given) = (piece.len(), 0);
        let result = BrotliDecompressStream(
            &mut left, &mut taken, coded, &mut space, &mut given, &mut piece, &mut total, &mut state,
        );
        decoded.extend_from_slice(&piece[..given]);
        if !matches!(result, BrotliResult::NeedsMoreOutput) || decoded.len() as u64 > max_bytes {
            break result;
        }
    };
    let failure = match result {
        _ if decoded.len() as u64 > max_bytes => None,
        BrotliResult::ResultSuccess if left > 0 => Some(invalid("there are bytes after its end")),
        BrotliResult::ResultSuccess | BrotliResult::NeedsMoreOutput => None,
        BrotliResult::NeedsMoreInput => Some(io::ErrorKind::UnexpectedEof.into()),
        BrotliResult::ResultFailure => Some(invalid("it is not valid brotli (RFC 7932)")),
    };
    (decoded, failure)
}

/// The `charset=` of the Content-Type, if it is a known one.
fn charset(headers: &HeaderMap) -> Option<&'static Encoding> {
    let content_type = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    let label = content_type.split(';').skip(1).find_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        name.trim()
            .eq_ignore_ascii_case("charset")
            .then(|| value.trim().trim_matches(['"', '\'']))
    })?;
    // Without the charsets that browsers replace as a whole by one U+FFFD (ISO-2022-KR and others).
    Encoding::for_label_no_replacement(label.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ureq::http::{HeaderName, HeaderValue};

    fn headers(name: HeaderName, values: &[&'static str]) -> HeaderMap {
        let values = values
            .iter()
            .map(|value| (name.clone(), HeaderValue::from_static(value)));
        values.collect()
    }

    /// The text of a body that is received byte by byte.
    fn text(content_type: &'static str, bytes: &[u8]) -> String {
        struct Slow<'a>(&'a [u8]);
        impl Read for Slow<'_> {
            fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
                self.0.read(&mut into[..1])
            }
        }
        let charset = charset(&headers(CONTENT_TYPE, &[content_type]));
        let (mut text, mut count) = (String::new(), 0);
        let end = read_text(&mut Slow(bytes), charset, 1_000, &mut count, &mut |piece| {
            text += piece;
            Ok(())
        });
        assert!(
            matches!(end, Ok(BodyEnd::Complete)) && count == bytes.len() as u64,
            "{end:?}"
        );
        text
    }

    #[test]
    fn text_is_decoded_with_the_headers_charset_or_as_utf_8_and_never_fails() {
        let table: [(&str, &[u8], &str); 14] = [
            ("text/html", "gr\u{fc}n".as_bytes(), "gr\u{fc}n"),
            ("text/html", b"gr\xfcn", "gr\u{fffd}n"),
            ("text/html", b"gr\xc3", "gr\u{fffd}"),
            ("text/html; charset=ISO-8859-1", b"gr\xfcn", "gr\u{fc}n"),
            ("application/json; charset=latin1", b"gr\xfcn", "gr\u{fc}n"),
            ("text/html; x=y; Charset=\"Windows-1252\"", b"\x80", "\u{20ac}"),
            ("text/plain;charset=utf-16le", b"h\0i\0", "hi"),
            ("text/plain; charset=utf-16be", b"\0h\0i", "hi"),
            ("text/plain; charset=no-such", b"hi", "hi"),
            ("text/plain; charset=iso-2022-kr", b"hi", "hi"),
            ("text/plain; charset=latin1", b"\xef\xbb\xbfhi", "hi"),
            ("text/plain; charset=utf-16", b"\xfe\xff\0h\0i", "hi"),
            ("", b"\xff\xfehi", "\u{fffd}\u{fffd}hi"),
            ("", b"\xef\xbb\xbfhi", "hi"),
        ];
        for (header, bytes, expected) in table {
            assert_eq!(text(header, bytes), expected, "{header}");
        }
    }

    #[test]
    fn codings_are_read_as_browsers_read_them_and_an_unsupported_one_is_an_error() {
        use Coding::{Brotli, Deflate, Gzip};
        let table: [(&[&str], Option<&[Coding]>); 22] = [
            (&[], Some(&[])),
            (&[""], Some(&[])),
            (&["identity"], Some(&[])),
            (&["none"], Some(&[])),
            (&["UTF-8"], Some(&[])),
            (&["binary"], Some(&[])),
            (&["8bit"], Some(&[])),
            (&["text/html"], Some(&[])),
            (&["chunked"], Some(&[])),
            (&["aws-chunked", "gzip"], Some(&[Gzip])),
            (&["GZip "], Some(&[Gzip])),
            (&["x-gzip"], Some(&[Gzip])),
            (&["br"], Some(&[Brotli])),
            (&["deflate"], Some(&[Deflate])),
            (&["identity, gzip"], Some(&[Gzip])),
            (&[", gzip,,"], Some(&[Gzip])),
            (&["gzip, br"], Some(&[Gzip, Brotli])),
            (&["gzip", "br"], Some(&[Gzip, Brotli])),
            (&["gzip,gzip,gzip,gzip,gzip"], Some(&[Gzip; 5])),
            (&["gzip,gzip,gzip,gzip,gzip,gzip"], None),
            (&["zstd"], None),
            (&["gzip, X-Compress"], None),
        ];
        for (values, expected) in table {
            let read = Codings::of(&headers(CONTENT_ENCODING, values)).ok();
            let read = read.map(|read| (read.codings, read.chunked));
            assert_eq!(
                read,
                expected.map(|codings| (codings.to_vec(), false)),
                "{values:?}"
            );
        }
        let hidden = HeaderName::from_static(chunks::HIDDEN_TRANSFER_ENCODING);
        let both = Codings::of(&headers(hidden, &["gzip, Chunked"])).unwrap();
        assert_eq!((both.codings, both.chunked), (vec![Gzip], true));
    }

    #[test]
    fn a_missing_brotli_decoder_is_not_an_error_of_the_body() {
        let decoders = BrotliDecoders::new();
        let limits = BodyLimits {
            max_bytes: 100,
            deadline: instant_now(),
            brotli: &decoders,
        };
        let hello = &b"\x0b\x02\x80hello\x03"[..];
        let (decoded, failure) = decoders.decode(hello, &limits).unwrap();
        assert_eq!((&decoded[..], failure.is_none()), (&b"hello"[..], true));
        assert_eq!(*decoders.free.lock().unwrap(), MAX_BROTLI_DECODERS);

        *decoders.free.lock().unwrap() = 0;
        assert!(matches!(
            decoders.decode(hello, &limits),
            Err(BodyFault::NoDecoder)
        ));
        assert_eq!(*decoders.free.lock().unwrap(), 0);
    }

    #[test]
    fn a_brotli_window_larger_than_the_standard_allows_is_an_error_before_it_takes_memory() {
        // The first byte announces a large window, the second one its 30 bits.
        let (decoded, failure) = decode_brotli(&[0x11, 0x1e, 0, 0, 0, 0, 0, 0], 1 << 20);
        assert_eq!(
            (decoded.len(), failure.unwrap().kind()),
            (0, io::ErrorKind::InvalidData)
        );
    }
}
