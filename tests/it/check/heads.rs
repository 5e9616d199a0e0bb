//! The status line and the headers of a response.

use std::io::Write;
use std::time::Duration;

use host_metrics::sample::Outcome;

use super::{check, check_answer, headers_of, with_regex};
use crate::site::{self, Site};

#[test]
fn headers_up_to_64_kib_are_read_in_lines_of_any_length() {
    for (total, line) in [
        (15_000, 1_000),
        (30_000, 1_000),
        (30_000, 50),
        (65_000, 1_000),
        (65_000, 40),
        (30_000, 10_000),
    ] {
        let site = Site::answering(headers_of(total, line));
        let seen = check(&with_regex(&site.url("/"), "^hello$"));
        assert_eq!(
            seen.outcome,
            Outcome::Ok,
            "{total} bytes in lines of {line}: {seen:?}"
        );
        assert_eq!(site.requests().len(), 1, "asked once, however large the answer");
    }
    for line in [39_000, 1_000, 40] {
        let seen = check_answer(headers_of(80_000, line), "hello");
        assert_eq!(seen.outcome, Outcome::ProtocolError, "lines of {line}: {seen:?}");
        assert!(seen.error.is_some_and(|text| text.contains("64 KiB")));
    }
    let mut cut = headers_of(30_000, 50);
    cut.truncate(20_000);
    assert_eq!(check_answer(cut, "hello").outcome, Outcome::ConnectionClosed);
}

#[test]
fn response_heads_are_read_as_curl_reads_them() {
    let lines = |lines: &str| format!("HTTP/1.1 200 OK\r\n{lines}\r\nhello").into_bytes();
    for response in [
        // A folded header.
        lines("Content-Length: 5\r\nX: a\r\n b\r\n\tc\r\n"),
        lines("Content-Length:\r\n 5\r\n"),
        lines(" X: a\r\nContent-Length: 5\r\n"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding:\r\n\tchunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n".to_vec(),
        // A space before the colon.
        lines("Content-Length : 5\r\nX\t: a\r\n"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding : chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n".to_vec(),
        // Lines that are ignored.
        lines("Content-Length: 5\r\nX Y: a\r\nX(Y): a\r\n\u{fc}: a\r\n: a\r\n"),
        lines("Content-Length: 5\r\nX: \u{1}\u{1b}[31m\u{7f}\r\nY: a\rb\r\n"),
        lines("Content-Length: 5\r\nContent-Type: text/html\u{1}\r\n"),
        // Status lines and line ends.
        b"HTTP/1.1 200 \xfc\x01\r\nContent-Length: 5\r\n\r\nhello".to_vec(),
        b"HTTP/1.1  200\nContent-Length: 5\n\nhello".to_vec(),
        b"http/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello".to_vec(),
        b"HTTP/2 200\r\nContent-Length: 5\r\n\r\nhello".to_vec(),
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n".to_vec(),
        // Interim responses with headers.
        [
            b"HTTP/1.1 100 Continue\r\nServer: x\r\n\r\nHTTP/1.1 103 Hints\r\nX Y: a\r\n b\r\n\r\n".to_vec(),
            site::ok("hello"),
        ]
        .concat(),
    ] {
        for pieces in [1, 7, 1_000] {
            let answer = response.clone();
            let site = Site::plain(move |stream| {
                stream.set_nodelay(true).unwrap();
                for piece in answer.chunks(answer.len().div_ceil(pieces)) {
                    stream.write_all(piece).unwrap();
                }
                // Reading the body to its end would never end.
                site::hold(stream);
            });
            let seen = check(&with_regex(&site.url("/"), "^hello$"));
            assert_eq!(seen.outcome, Outcome::Ok, "{}: {seen:?}", response.escape_ascii());
            assert_eq!(site.requests().len(), 1);
        }
    }
}

#[test]
fn interim_answers_are_passed_over_and_do_not_count_as_the_first_byte() {
    const LATER: Duration = Duration::from_millis(60);
    let site = Site::plain(|stream| {
        stream
            .write_all(b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n")
            .unwrap();
        site::slowly(LATER * 2);
        let mut rest = b"HTTP/1.1 100 Continue\r\n\r\n".to_vec();
        rest.extend(site::ok("hello"));
        stream.write_all(&rest).unwrap();
    });
    let seen = check(&with_regex(&site.url("/"), "hello"));
    assert_eq!(seen.outcome, Outcome::Ok, "{seen:?}");
    assert_eq!(seen.status_code, Some(200));
    assert!(seen.phases.ttfb.unwrap() >= LATER, "{seen:?}");
}
