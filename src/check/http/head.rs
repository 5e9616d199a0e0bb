//! Reads response heads as leniently as curl and browsers do, and writes them in the strict form that ureq's parser accepts.
//!
//! Lenient means: folded lines, blanks before the colon, unusual bytes in headers that are not used, any number of lines.
//! ureq only gets the status and the headers that it or the check uses. Pure.

use super::chunks;

/// The headers that ureq or the check uses.
const USED: [&str; 5] = [
    "content-encoding",
    "content-length",
    "content-type",
    LOCATION,
    "transfer-encoding",
];
const LOCATION: &str = "location";

const PROTOCOL: &[u8] = b"HTTP/";

/// Some servers write HTTP/2 in a response that has the form of HTTP/1.1.
const VERSIONS: [&[u8]; 4] = [b"1.1", b"1.0", b"2", b"2.0"];

/// What a response begins with.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// The head is not complete yet, or too short to tell what it is.
    Unfinished,
    /// A head of this many bytes, including its blank line.
    Head(usize),
    Unknown,
}

/// Looks at the bytes received so far. `looked_at`: how many of them were there when the result was last `Unfinished`.
pub(super) fn look(input: &[u8], looked_at: usize) -> Start {
    let blank_lines = input
        .iter()
        .take_while(|byte| matches!(byte, b'\r' | b'\n'))
        .count();
    let answer = &input[blank_lines..];
    let protocol = &answer[..answer.len().min(PROTOCOL.len())];
    if !protocol.eq_ignore_ascii_case(&PROTOCOL[..protocol.len()]) {
        return Start::Unknown;
    }
    // The line end before the blank line may be among the bytes of the last call.
    let mut from = looked_at.saturating_sub(2).max(blank_lines);
    while let Some(at) = input[from..].iter().position(|byte| *byte == b'\n') {
        from += at + 1;
        match input[from..] {
            [b'\n', ..] => return Start::Head(from + 1),
            [b'\r', b'\n', ..] => return Start::Head(from + 2),
            _ => {}
        }
    }
    Start::Unfinished
}

/// A complete head.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub status: u16,
    pub is_http_1_0: bool,
    /// The head in the form that ureq gets, with the headers of chunks hidden.
    pub strict: Vec<u8>,
}

impl Head {
    /// Whether another response follows (100, 103). 101 is final: the server switches to a protocol that was not requested.
    pub(super) fn is_interim(&self) -> bool {
        matches!(self.status, 100 | 102..=199)
    }
}

/// Reads a whole head.
///
/// # Errors
/// Says what is wrong with a head that curl rejects too.
pub(super) fn read(head: &[u8]) -> Result<Head, &'static str> {
    if head.contains(&0) {
        return Err("a NUL byte in its headers");
    }
    let mut lines = head
        .split(|byte| *byte == b'\n')
        .map(|line| line.strip_suffix(b"\r").unwrap_or(line))
        .skip_while(|line| line.is_empty());
    let (version, code) = lines
        .next()
        .and_then(read_status_line)
        .ok_or("its status line is not valid")?;
    let mut strict = [b"HTTP/1.1 ", code, b"\n"].concat();

    // The header that a folded line would continue, if it is a used one.
    let mut kept: Option<&str> = None;
    for line in lines.take_while(|line| !line.is_empty()) {
        let piece = if is_blank(line[0]) {
            // A fold becomes a blank (RFC 9112, section 5.2). After the status line there is nothing to continue.
            if kept.is_some() {
                strict.pop();
                strict.push(b' ');
            }
            line.trim_ascii_start()
        } else {
            let colon = line.iter().position(|byte| *byte == b':');
            let (name, value) = line.split_at(colon.ok_or("a header line without a colon")?);
            let name = name.trim_ascii_end();
            kept = USED
                .into_iter()
                .find(|read| name.eq_ignore_ascii_case(read.as_bytes()))
                // A Location only has a meaning in redirects.
                .filter(|read| *read != LOCATION || code[0] == b'3');
            if kept.is_some() {
                strict.extend_from_slice(name);
                strict.push(b':');
            }
            &value[1..]
        };
        let Some(name) = kept else { continue };
        let has_controls = piece.iter().any(|byte| byte.is_ascii_control() && *byte != b'\t');
        if has_controls && name == LOCATION {
            return Err("a control character in its Location");
        }
        // Control characters become blanks (RFC 9110, section 5.5).
        strict.extend(
            piece
                .iter()
                .map(|byte| if byte.is_ascii_control() { b' ' } else { *byte }),
        );
        strict.push(b'\n');
    }
    strict.push(b'\n');
    chunks::hide(&mut strict);
    Ok(Head {
        status: code
            .iter()
            .fold(0, |status, digit| status * 10 + u16::from(digit - b'0')),
        is_http_1_0: version == b"1.0",
        strict,
    })
}

/// The version and the three digits of the status. The reason after them can be anything.
fn read_status_line(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let rest = line.get(PROTOCOL.len()..)?;
    let blank = rest.iter().position(|byte| *byte == b' ')?;
    let (version, rest) = rest.split_at(blank);
    let (code, reason) = rest.trim_ascii_start().split_at_checked(3)?;
    let is_code = code[0] != b'0' && code.iter().all(u8::is_ascii_digit);
    let is_longer = reason.first().is_some_and(u8::is_ascii_digit);
    (VERSIONS.contains(&version) && is_code && !is_longer).then_some((version, code))
}

fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use ureq::http::HeaderMap;

    use super::*;

    /// What ureq reads from a head: the same parser with the same number of headers.
    fn parsed(head: &[u8]) -> Option<(u16, HeaderMap)> {
        let mut headers = [httparse::EMPTY_HEADER; 128];
        let mut response = httparse::Response::new(&mut headers);
        let complete = response.parse(head).ok()?;
        assert_eq!(complete, httparse::Status::Complete(head.len()));
        let kept = response.headers.iter().map(|header| {
            let name = header.name.parse::<ureq::http::HeaderName>().unwrap();
            (name, header.value.try_into().unwrap())
        });
        Some((response.code.unwrap(), kept.collect()))
    }

    fn strict(head: &[u8]) -> Result<Vec<u8>, &'static str> {
        assert_eq!(look(head, 0), Start::Head(head.len()), "{}", head.escape_ascii());
        let Head { status, strict, .. } = read(head)?;
        let (code, _) = parsed(&strict).unwrap_or_else(|| panic!("{}", strict.escape_ascii()));
        assert_eq!(code, status);
        Ok(strict)
    }

    /// The strict form of a head with these lines.
    fn lines(lines: &[u8]) -> Result<String, &'static str> {
        let head = [b"HTTP/1.1 200 OK\r\n", lines, b"\r\n"].concat();
        strict(&head).map(|strict| {
            let kept = strict.strip_prefix(b"HTTP/1.1 200\n").unwrap();
            kept.escape_ascii().to_string()
        })
    }

    #[test]
    fn header_lines_are_read_as_curl_and_browsers_read_them() {
        let table: [(&[u8], &str); 26] = [
            (b"", r"\n"),
            (b"Content-Type: text/html\r\n", r"Content-Type: text/html\n\n"),
            // Line ends.
            (b"Content-Length: 5\nX: y\n", r"Content-Length: 5\n\n"),
            (b"X: y\r\r\nContent-Length: 5\r\r\n", r"Content-Length: 5 \n\n"),
            (b"X: a\rb\r\n", r"\n"),
            // Folded.
            (b"X: a\r\n b\r\n\tc\r\n", r"\n"),
            (b"Content-Length:\r\n 5\r\n", r"Content-Length: 5\n\n"),
            (b"Content-Length:\r\n \t 5\r\nX: y\r\n", r"Content-Length: 5\n\n"),
            (
                b"Content-Length: 5\r\n \r\n\t\r\nX: y\r\n",
                r"Content-Length: 5  \n\n",
            ),
            (
                b"Content-Type: text/html;\n\tcharset=utf-8\n",
                r"Content-Type: text/html; charset=utf-8\n\n",
            ),
            (
                b"Content-Type: a\r\n Content-Length: 5\r\n",
                r"Content-Type: a Content-Length: 5\n\n",
            ),
            (
                b"X: a\r\n Content-Length: 5\r\nContent-Length: 6\r\n",
                r"Content-Length: 6\n\n",
            ),
            // A folded line after the status line continues nothing.
            (b" Content-Length: 5\r\n", r"\n"),
            // A blank before the colon.
            (b"Content-Length : 5\r\n", r"Content-Length: 5\n\n"),
            (b"Content-Length \t: 5\r\nX : y\r\n", r"Content-Length: 5\n\n"),
            // Names with other characters.
            (
                b"X Y: z\r\nX(Y)@[]: z\r\n\xfc: z\r\n\xc3\xbc: z\r\nX\x01: y\r\n: z\r\n:\r\n",
                r"\n",
            ),
            (b"Content-Length x: 5\r\n", r"\n"),
            // Values with control characters.
            (b"X: \x01\x02\x1b[31m\x7f\r\n", r"\n"),
            (
                b"Content-Type: text/html\x01\r\n",
                r"Content-Type: text/html \n\n",
            ),
            (b"Content-Length: 5\x7f\r\n", r"Content-Length: 5 \n\n"),
            (b"Content-Type: \xfc\tx\r\n", r"Content-Type: \xfc x\n\n"),
            // Every occurrence, in upper or lower case, in the same order.
            (
                b"TRANSFER-ENCODING: chunked\r\ncontent-encoding:gzip\r\nContent-Encoding: br\r\n",
                r"_RANSFER-ENCODING: chunked\ncontent-encoding:gzip\nContent-Encoding: br\n\n",
            ),
            (
                b"Content-Lengths: 7\r\nConnection: close\r\nSet-Cookie: a=b\r\n",
                r"\n",
            ),
            // A Location is only used in redirects.
            (b"Location: /\x01\r\n", r"\n"),
            (b"Location: /a:b\r\n", r"\n"),
            (b"Content-Length:\r\n", r"Content-Length:\n\n"),
        ];
        for (given, expected) in table {
            assert_eq!(lines(given).as_deref(), Ok(expected), "{}", given.escape_ascii());
        }
        for bad in [
            &b"no colon\r\n"[..],
            b"\x01\r\n",
            b"X: y\r\nno colon\r\nContent-Length: 5\r\n",
            b"X: a\0b\r\n",
            b"X\0: a\r\n",
        ] {
            assert!(lines(bad).is_err(), "{}", bad.escape_ascii());
        }
        let many = b"X: y\r\n".repeat(1_000);
        let many = [many.as_slice(), b"Content-Length: 5\r\n", &many].concat();
        assert_eq!(lines(&many).as_deref(), Ok(r"Content-Length: 5\n\n"));
    }

    #[test]
    fn the_bytes_of_a_location_are_kept() {
        let redirect = |lines: &[u8]| strict(&[b"HTTP/1.1 302 Found\r\n", lines, b"\r\n"].concat());
        for (given, expected) in [
            (
                &b"Location: /gr\xfcn\r\n"[..],
                &b"HTTP/1.1 302\nLocation: /gr\xfcn\n\n"[..],
            ),
            (b"Location :\r\n /x\r\n", b"HTTP/1.1 302\nLocation: /x\n\n"),
            (b"Location:\r\nX: y\r\n", b"HTTP/1.1 302\nLocation:\n\n"),
        ] {
            assert_eq!(redirect(given).as_deref(), Ok(expected));
        }
        for bad in [
            &b"Location: /a\x01b\r\n"[..],
            b"Location: /a\r\n \x7f\r\n",
            b"Location: /a\rb\r\n",
        ] {
            assert_eq!(redirect(bad), Err("a control character in its Location"));
        }
    }

    #[test]
    fn status_lines_are_read_as_curl_reads_them() {
        for (line, status, is_http_1_0) in [
            (&b"HTTP/1.1 200 OK"[..], 200, false),
            (b"HTTP/1.0 200 OK", 200, true),
            (b"HTTP/1.1 200", 200, false),
            (b"HTTP/1.1 200 ", 200, false),
            (b"HTTP/1.1  404  Not  Found", 404, false),
            (b"HTTP/1.1 999 \x01\x7f\xfc", 999, false),
            (b"HTTP/1.1 200OK", 200, false),
            (b"http/1.1 200 OK", 200, false),
            (b"HTTP/2 200", 200, false),
            (b"HTTP/2.0 200 OK", 200, false),
            (b"\r\n\nHTTP/1.1 200 OK", 200, false),
        ] {
            for end in [&b"\r\n\r\n"[..], b"\n\n", b"\n\r\n", b"\r\n\n"] {
                let head = [line, end].concat();
                assert_eq!(look(&head, 0), Start::Head(head.len()), "{}", head.escape_ascii());
                let read = read(&head).unwrap();
                assert_eq!((read.status, read.is_http_1_0), (status, is_http_1_0));
                assert!(parsed(&read.strict).is_some_and(|(code, _)| code == status));
            }
        }
        for line in [
            &b"HTTP/"[..],
            b"HTTP/1.1",
            b"HTTP/1.1 ",
            b"HTTP/1.1 20",
            b"HTTP/1.1 2000 OK",
            b"HTTP/1.1 099 OK",
            b"HTTP/1.1 2x0 OK",
            b"HTTP/1.1 +20 OK",
            b"HTTP/1.1\t200 OK",
            b"HTTP/1.2 200 OK",
            b"HTTP/1.10 200 OK",
            b"HTTP/0.9 200 OK",
            b"HTTP/3 200 OK",
            b"HTTP/ 200 OK",
        ] {
            assert!(
                read(&[line, b"\r\n\r\n"].concat()).is_err(),
                "{}",
                line.escape_ascii()
            );
        }
    }

    #[test]
    fn a_response_that_is_not_http_is_recognised_as_early_as_possible() {
        for (answer, expected) in [
            (&b""[..], Start::Unfinished),
            (b"\r\n", Start::Unfinished),
            (b"HT", Start::Unfinished),
            (b"HTTP/1.1 200 OK\r\n\r", Start::Unfinished),
            (b"HTTP/1.1 200 OK\r\nX: y\r\n", Start::Unfinished),
            (b"HTTP/1.1 200 OK\r\n\r\nbody\n\n", Start::Head(19)),
            (b"S", Start::Unknown),
            (b"SSH-2.0-OpenSSH_9.2\r\n", Start::Unknown),
            (b"HTTQ", Start::Unknown),
            (b" HTTP/1.1 200 OK", Start::Unknown),
            (b"\x15\x03\x01", Start::Unknown),
        ] {
            assert_eq!(look(answer, 0), expected, "{}", answer.escape_ascii());
        }
    }

    proptest! {
        #[test]
        fn a_head_that_ureq_accepts_keeps_its_meaning(
            code in 100_u16..=999,
            reason in "[ -~]{0,9}",
            headers in prop::collection::vec(
                ("Content-(Length|type|ENCODING)|transfer-Encoding|[Ll]ocation|X-[a-z]{1,3}", "[!-~]{0,3}[ -~]{0,3}"),
                0..6,
            ),
            end in prop::sample::select(vec!["\r\n", "\n"]),
        ) {
            let mut head = format!("HTTP/1.1 {code} {reason}{end}");
            for (name, value) in &headers {
                head += &format!("{name}: {value}{end}");
            }
            head += end;
            let (_, mut expected) = parsed(head.as_bytes()).unwrap();
            let (status, kept) = parsed(&strict(head.as_bytes()).unwrap()).unwrap();
            let names: Vec<_> = expected.keys().cloned().collect();
            for name in names {
                let is_read = USED.contains(&name.as_str()) && (name.as_str() != LOCATION || (300..400).contains(&code));
                if !is_read {
                    expected.remove(name);
                }
            }
            prop_assert_eq!((status, kept), (code, expected));
        }

        #[test]
        fn a_head_that_comes_in_pieces_is_read_like_a_whole_one(
            lines in prop::collection::vec("[A-C:\r \n]{0,5}", 0..6),
            piece in 1_usize..5,
        ) {
            let answer = format!("HTTP/1.1 200 OK\r\n{}\r\nbody", lines.join("\n")).into_bytes();
            let whole = look(&answer, 0);
            let mut looked_at = 0;
            let in_pieces = (1..=answer.len()).filter(|end| end % piece == 0 || *end == answer.len()).find_map(|end| {
                let start = look(&answer[..end], looked_at);
                looked_at = end;
                (start != Start::Unfinished).then_some(start)
            });
            prop_assert_eq!(in_pieces.unwrap_or(Start::Unfinished), whole);
        }

        #[test]
        fn ureq_accepts_every_head_that_was_read(head in "HTTP/1\\.1 [2-5]00( [ -~]{0,4})?\r\n([a-zA-Z-]{0,3}[\\x00-\\x7f\u{80}-\u{ff}]{0,9}\r?\n|Location:[\\x00-\\x7f]{0,4}\r\n){0,4}\r\n") {
            let head = head.as_bytes();
            if let Start::Head(bytes) = look(head, 0)
                && let Ok(read) = read(&head[..bytes])
            {
                let as_ureq = parsed(&read.strict);
                prop_assert!(as_ureq.is_some(), "{}", read.strict.escape_ascii());
            }
        }
    }
}
