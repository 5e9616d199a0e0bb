//! Bodies: decoded, bounded, and as text.
//!
//! Owns content codings and charsets. The bound counts decoded bytes, so that a small body cannot become a large one.

use std::borrow::Cow;
use std::io::{self, BufRead, BufReader, Read};

use encoding_rs::{Encoding, UTF_8};
use flate2::bufread::MultiGzDecoder;
use ureq::Body;
use ureq::http::header::{CONTENT_ENCODING, CONTENT_TYPE, TRANSFER_ENCODING};
use ureq::http::{HeaderMap, HeaderName, Response};

use crate::check::fault::Fault;

/// What is asked for where a body is wanted: the codings that [`read`] knows.
pub(super) const ACCEPTED_CODINGS: &str = "gzip, br";

/// As much as a brotli decoder is fed at once.
const BROTLI_INPUT_BYTES: usize = 4 * 1024;

/// The end of a body that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Complete,
    /// There is more than may be read.
    Beyond,
}

/// Appends the decoded body to `into`, `max_bytes` of it at most; what came before a fault is there too.
///
/// # Errors
/// The body was cut, stalled, or is not coded as its headers say.
pub(super) fn read(
    response: &mut Response<Body>,
    max_bytes: u64,
    into: &mut Vec<u8>,
) -> Result<End, ureq::Error> {
    let coding = Coding::of(response.headers())?;
    let mut wire = Wire {
        reader: response.body_mut().as_reader(),
        failure: None,
    };
    let result = read_decoded(coding, &mut wire, max_bytes, into);
    match (result, wire.failure) {
        (_, Some(failure)) => Err(failure),
        (Err(error), None) => Err(Fault::Coding(error).into()),
        (Ok(end), None) => Ok(end),
    }
}

/// The body as text, which never fails: by the header's charset (where a byte-order mark wins over it, as in browsers),
/// else as UTF-8.
pub(super) fn text<'a>(headers: &HeaderMap, bytes: &'a [u8]) -> Cow<'a, str> {
    match charset(headers) {
        Some(charset) => charset.decode(bytes).0,
        None => UTF_8.decode_with_bom_removal(bytes).0,
    }
}

fn read_decoded(coding: Coding, wire: &mut Wire<'_>, max_bytes: u64, into: &mut Vec<u8>) -> io::Result<End> {
    let mut wire = BufReader::with_capacity(BROTLI_INPUT_BYTES, wire);
    // An empty body is empty in every coding; servers do not bother to code it.
    if coding == Coding::Identity || wire.fill_buf()?.is_empty() {
        return read_bounded(&mut wire, max_bytes, into);
    }
    let end = match coding {
        Coding::Gzip => read_bounded(&mut MultiGzDecoder::new(&mut wire), max_bytes, into)?,
        _ => {
            let mut decoder = brotli_decompressor::Decompressor::new(&mut wire, BROTLI_INPUT_BYTES);
            read_bounded(&mut decoder, max_bytes, into)?
        }
    };
    // The coding's own end is not the body's: that may have been cut right behind it.
    if end == End::Complete && !wire.fill_buf()?.is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "bytes after its end"));
    }
    Ok(end)
}

fn read_bounded(reader: &mut dyn Read, max_bytes: u64, into: &mut Vec<u8>) -> io::Result<End> {
    // One byte more tells whether there is more.
    reader.take(max_bytes.saturating_add(1)).read_to_end(into)?;
    match usize::try_from(max_bytes) {
        Ok(max) if into.len() > max => {
            into.truncate(max);
            Ok(End::Beyond)
        }
        _ => Ok(End::Complete),
    }
}

/// The body as it comes, its failure kept whole: decoders pass errors on in forms of their own.
struct Wire<'a> {
    reader: ureq::BodyReader<'a>,
    failure: Option<ureq::Error>,
}

impl Read for Wire<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.reader.read(into).map_err(|error| {
            let failure = ureq::Error::from(error);
            let told = io::Error::other(failure.to_string());
            self.failure = Some(failure);
            told
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Coding {
    Identity,
    Gzip,
    Brotli,
}

impl Coding {
    /// Names are case-insensitive, and x-gzip is gzip (RFC 9110, section 8.4.1).
    fn of(headers: &HeaderMap) -> Result<Self, Fault> {
        let unknown = |name: &HeaderName, value: &str| {
            let text = format!("unknown {name} {value}");
            Err(Fault::Coding(io::Error::new(io::ErrorKind::InvalidData, text)))
        };
        let transfer = joined(headers, TRANSFER_ENCODING);
        if !matches!(transfer.as_str(), "" | "identity" | "chunked") {
            return unknown(&TRANSFER_ENCODING, &transfer);
        }
        let content = joined(headers, CONTENT_ENCODING);
        match content.as_str() {
            "" | "identity" => Ok(Self::Identity),
            "gzip" | "x-gzip" => Ok(Self::Gzip),
            "br" => Ok(Self::Brotli),
            _ => unknown(&CONTENT_ENCODING, &content),
        }
    }
}

/// All values of a header as one list, in lower case.
fn joined(headers: &HeaderMap, name: HeaderName) -> String {
    let values: Vec<_> = headers
        .get_all(name)
        .iter()
        .map(|value| {
            String::from_utf8_lossy(value.as_bytes())
                .trim()
                .to_ascii_lowercase()
        })
        .filter(|value| !value.is_empty())
        .collect();
    values.join(", ")
}

/// `charset=` of the Content-Type, if it names one that is known.
fn charset(headers: &HeaderMap) -> Option<&'static Encoding> {
    let content_type = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    let label = content_type.split(';').skip(1).find_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        name.trim()
            .eq_ignore_ascii_case("charset")
            .then(|| value.trim().trim_matches(['"', '\'']))
    })?;
    // Not the labels that browsers refuse to decode (ISO-2022-KR and the like): all text would be one U+FFFD.
    Encoding::for_label_no_replacement(label.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ureq::http::HeaderValue;

    fn content_type(value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(value))])
    }

    #[test]
    fn text_is_read_by_the_headers_charset_else_as_utf_8_and_never_fails() {
        let table: [(&str, &[u8], &str); 13] = [
            ("text/html", "gr\u{fc}n".as_bytes(), "gr\u{fc}n"),
            ("text/html", b"gr\xfcn", "gr\u{fffd}n"),
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
            assert_eq!(text(&content_type(header), bytes), expected, "{header}");
        }
        assert_eq!(text(&HeaderMap::new(), b"hi"), "hi");
    }

    #[test]
    fn codings_have_any_case_and_an_unknown_one_is_an_error() {
        let coding = |name: HeaderName, values: &[&'static str]| {
            let headers = values
                .iter()
                .map(|value| (name.clone(), HeaderValue::from_static(value)));
            Coding::of(&headers.collect()).ok()
        };
        let table: [(&[&str], Option<Coding>); 9] = [
            (&[], Some(Coding::Identity)),
            (&[""], Some(Coding::Identity)),
            (&["identity"], Some(Coding::Identity)),
            (&["GZip "], Some(Coding::Gzip)),
            (&["x-gzip"], Some(Coding::Gzip)),
            (&["br"], Some(Coding::Brotli)),
            (&["deflate"], None),
            (&["gzip, br"], None),
            (&["gzip", "br"], None),
        ];
        for (values, expected) in table {
            assert_eq!(coding(CONTENT_ENCODING, values), expected, "{values:?}");
        }
        assert_eq!(coding(TRANSFER_ENCODING, &["Chunked"]), Some(Coding::Identity));
        assert_eq!(coding(TRANSFER_ENCODING, &["gzip, chunked"]), None);
    }
}
