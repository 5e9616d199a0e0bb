//! Bodies: their codings, their limit, and the search for the regex.

use std::io::Write;

use flate2::Compression;
use flate2::write::{DeflateEncoder, ZlibEncoder};
use host_metrics::sample::Outcome;

use super::{LONG, SHORT, assert_consistent, check, check_answer, checker, gzip, now, target, with_regex};
use crate::site::{self, Site};

fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn bare_deflate(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// The text in brotli's simplest form, a stored block.
fn brotli(bytes: &[u8]) -> Vec<u8> {
    let length = u8::try_from(bytes.len()).unwrap() - 1;
    // A window of 22 bits; one stored block with a length of 4 nibbles, not the last one; then the empty last block.
    let header = 0b1011 | u32::from(length) << 7 | 1 << 23;
    [&header.to_le_bytes()[..3], bytes, &[3]].concat()
}

/// A response with one chunk. `head` includes the end of its last line.
fn chunked(head: &str, body: &[u8]) -> Vec<u8> {
    let size = format!("{:x}\r\n", body.len());
    [head.as_bytes(), b"\r\n", size.as_bytes(), body, b"\r\n0\r\n\r\n"].concat()
}

#[test]
fn bodies_are_decoded_counted_and_searched() {
    let coded = |coding: &str, body: &[u8]| {
        site::response("200 OK", &format!("Content-Encoding: {coding}\r\n"), body)
    };
    let brotli_hello = brotli(b"hello");
    let bytes = |count: usize| vec![b'x'; count];
    let table = [
        ("plain", site::ok("hello"), Outcome::Ok, Some(true), 5),
        ("empty", site::ok(""), Outcome::RegexMismatch, Some(false), 0),
        ("gzip", coded("gzip", &gzip(b"hello")), Outcome::Ok, Some(true), 5),
        ("GZIP", coded("GZIP", &gzip(b"hello")), Outcome::Ok, Some(true), 5),
        ("gzip of nothing", coded("gzip", b""), Outcome::RegexMismatch, Some(false), 0),
        (
            "gzip in two members",
            coded("gzip", &[gzip(b"hel"), gzip(b"lo")].concat()),
            Outcome::Ok,
            Some(true),
            5,
        ),
        ("brotli", coded("br", &brotli_hello), Outcome::Ok, Some(true), 5),
        ("no coding", coded("none", b"hello"), Outcome::Ok, Some(true), 5),
        ("a charset for a coding", coded("utf-8", b"hello"), Outcome::Ok, Some(true), 5),
        ("identity and gzip", coded("identity, gzip", &gzip(b"hello")), Outcome::Ok, Some(true), 5),
        ("gzip twice", coded("gzip, gzip", &gzip(&gzip(b"hello"))), Outcome::Ok, Some(true), 5),
        ("gzip, then brotli", coded("gzip, br", &brotli(&gzip(b"hello"))), Outcome::Ok, Some(true), 5),
        (
            "gzip without its trailer",
            coded("gzip", gzip(b"hello").strip_suffix(b"\x86\xa6\x10\x36\x05\0\0\0").unwrap()),
            Outcome::ProtocolError,
            None,
            5,
        ),
        ("deflate", coded("deflate", &zlib(b"hello")), Outcome::Ok, Some(true), 5),
        ("bare deflate", coded("deflate", &bare_deflate(b"hello")), Outcome::Ok, Some(true), 5),
        (
            "gzip in chunks in HTTP/1.0",
            chunked("HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Encoding: gzip\r\n", &gzip(b"hello")),
            Outcome::Ok,
            Some(true),
            5,
        ),
        (
            "gzip as a transfer coding",
            chunked("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n", &gzip(b"hello")),
            Outcome::Ok,
            Some(true),
            5,
        ),
        (
            "chunks beside a length",
            chunked("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n", b"hello"),
            Outcome::Ok,
            Some(true),
            5,
        ),
        (
            "chunk lines that end in a line feed",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\nhello\n0\n\n".to_vec(),
            Outcome::Ok,
            Some(true),
            5,
        ),
        (
            "brotli with a tail",
            coded("br", &[&brotli_hello[..], &bytes(9_000)].concat()),
            Outcome::ProtocolError,
            None,
            5,
        ),
        (
            "brotli in a chunk, then cut",
            [
                b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n".to_vec(),
                brotli_hello.clone(),
                b"\r\n".to_vec(),
            ]
            .concat(),
            Outcome::ConnectionClosed,
            None,
            5,
        ),
        (
            "chunks with extensions and trailers",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b\r\nhe\r\n3\r\nllo\r\n0\r\nX-Sum: 1\r\n\r\n".to_vec(),
            Outcome::Ok,
            Some(true),
            5,
        ),
        (
            "HTTP/1.0 until the end",
            b"HTTP/1.0 200 OK\r\n\r\nhello".to_vec(),
            Outcome::Ok,
            Some(true),
            5,
        ),
        (
            "Latin-1",
            site::response("200 OK", "Content-Type: text/html; charset=iso-8859-1\r\n", b"hell\xf6, hello"),
            Outcome::Ok,
            Some(true),
            12,
        ),
        (
            "UTF-16",
            site::response("200 OK", "Content-Type: text/html; charset=utf-16le\r\n", b"h\0e\0l\0l\0o\0"),
            Outcome::Ok,
            Some(true),
            10,
        ),
        ("no UTF-8", site::ok(b"\xff\xfe\xffhello"), Outcome::Ok, Some(true), 8),
        ("the limit", site::ok(bytes(65_536)), Outcome::RegexMismatch, Some(false), 65_536),
        ("one more", site::ok(bytes(65_537)), Outcome::BodyTooLarge, Some(false), 65_536),
        (
            "a match, then more than the limit",
            site::ok([b"hello".to_vec(), bytes(100_000)].concat()),
            Outcome::Ok,
            Some(true),
            65_536,
        ),
        (
            "a match behind the limit",
            site::ok([bytes(65_536), b"hello".to_vec()].concat()),
            Outcome::BodyTooLarge,
            Some(false),
            65_536,
        ),
        (
            "a gzip bomb",
            coded("gzip", &gzip(&vec![0; 50_000_000])),
            Outcome::BodyTooLarge,
            Some(false),
            65_536,
        ),
        (
            "a match in a cut body",
            b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello".to_vec(),
            Outcome::ConnectionClosed,
            None,
            5,
        ),
        (
            "a match in a cut body of bad status",
            b"HTTP/1.1 500 Oops\r\nContent-Length: 10\r\n\r\nhello".to_vec(),
            Outcome::BadStatus,
            None,
            5,
        ),
        (
            "a match with a bad status",
            site::response("404 Not Found", "", "hello"),
            Outcome::BadStatus,
            Some(true),
            5,
        ),
    ];
    for (what, response, outcome, matched, body_bytes) in table {
        let seen = check_answer(response, "hello");
        assert_eq!(
            (seen.outcome, seen.regex_matched, seen.body_bytes),
            (outcome, matched, Some(body_bytes)),
            "{what}: {seen:?}"
        );
        assert!(seen.phases.body.is_some(), "{what}: {seen:?}");
        assert_consistent(&seen);
    }

    let seen = check_answer(b"HTTP/1.1 204 No Content\r\n\r\n".to_vec(), "hello");
    assert_eq!(
        (seen.regex_matched, seen.body_bytes, seen.phases.body),
        (None, None, None)
    );
}

#[test]
fn a_search_ends_at_the_deadline_whatever_the_regex() {
    let mut random = fastrand::Rng::with_seed(1);
    let body: Vec<u8> = (0..60_000).map(|_| random.choice(*b"ab").unwrap()).collect();
    let site = Site::answering(site::ok(body));
    let mut checker = checker();
    // Without the deadline, each would take seconds.
    for regex in [
        r"(?-u)a[ab]{10000}c",
        r"(?:\b|b)a[ab]{10000}c",
        r"(?:a[ab]{900}\w{90}){2}ä",
    ] {
        let target = with_regex(&site.url("/"), regex);
        let seen = checker.check(&target, now() + SHORT / 4);
        assert_eq!(
            (seen.outcome, seen.regex_matched, seen.error.as_deref()),
            (
                Outcome::BodyTimeout,
                None,
                Some("the search for the regex did not finish in time")
            ),
            "{regex}: {seen:?}"
        );
    }
    // The next check is not affected.
    let seen = checker.check(&with_regex(&site.url("/"), "^[ab]+$"), now() + LONG);
    assert_eq!(seen.outcome, Outcome::Ok, "{seen:?}");
}

#[test]
fn an_endless_body_is_read_to_the_limit_and_left() {
    let site = Site::plain(|stream| {
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
        while stream.write_all(&[b'x'; 4_096]).is_ok() {}
    });
    let seen = check(&with_regex(&site.url("/"), "hello"));
    assert_eq!(
        (seen.outcome, seen.body_bytes),
        (Outcome::BodyTooLarge, Some(65_536)),
        "{seen:?}"
    );
    // Without a regex the body is not read.
    assert_eq!(check(&target(&site.url("/"))).outcome, Outcome::Ok);
}

#[test]
fn a_person_sees_how_a_body_begins_that_the_check_does_not_read_and_that_does_not_end() {
    let site = Site::plain(|stream| {
        let begun = "HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\nonly this";
        stream.write_all(begun.as_bytes()).unwrap();
        site::hold(stream);
    });
    let began_at = now();
    let (seen, details) = checker().check_in_detail(&target(&site.url("/")), began_at + LONG);
    assert_eq!((seen.outcome, seen.body_bytes), (Outcome::Ok, None));
    assert_eq!(details.body, "only this");
    assert!(
        now() < began_at + LONG,
        "it does not take all the time of the check"
    );
}
