//! Deadlines, file handles, the stack, and responses that no server should send.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use host_metrics::check::pattern::Pattern;
use host_metrics::check::target::{Method, Target};
use host_metrics::sample::Outcome;

use super::{
    LONG, assert_consistent, checker, checker_with_names, good, gzip, now, target, trusting, with_regex,
};
use crate::child;
use crate::site::{self, Authority, Site};

#[test]
fn a_check_that_starts_too_late_fails_at_once() {
    let site = Site::answering(site::ok("hello"));
    let seen = checker_with_names().check(&target(&site.url("/")), now());
    assert_eq!(seen.outcome, Outcome::ConnectTimeout, "{seen:?}");
    let seen = checker_with_names().check(&target("http://site.test/"), now());
    assert!(
        matches!(seen.outcome, Outcome::DnsTimeout | Outcome::ConnectTimeout),
        "{seen:?}"
    );
    assert_eq!(site.requests().len(), 0);
}

#[test]
fn without_file_handles_the_check_is_an_agent_error() {
    const SELF: &str = "check::limits::without_file_handles_the_check_is_an_agent_error";
    if !child::is_it(SELF) {
        return child::run(SELF, &mut child::shell("ulimit -n 64"));
    }
    let site = Site::answering(site::ok("hello"));
    let mut by_name = checker();
    let mut by_ip = checker();
    let mut handles = Vec::new();
    while let Ok(handle) = std::fs::File::open("/dev/null") {
        handles.push(handle);
    }
    let ip = by_ip.check(&target(&site.url("/")), now() + LONG);
    let name = by_name.check(&target("http://no-such-name.invalid/"), now() + LONG);
    drop(handles);
    assert_eq!(ip.outcome, Outcome::AgentError, "{ip:?}");
    assert!(
        ip.error
            .as_ref()
            .is_some_and(|text| text.contains("this machine")),
        "{ip:?}"
    );
    assert_eq!(name.outcome, Outcome::AgentError, "{name:?}");
    assert_eq!(
        by_ip.check(&target(&site.url("/")), now() + LONG).outcome,
        Outcome::Ok
    );
}

#[test]
fn nothing_that_a_server_sends_makes_the_check_panic() {
    const SEED: u64 = 0x5eed;
    let parts: [&[u8]; 24] = [
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.0 301 Moved\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n",
        b"HTTP/1.1 103 Early Hints\r\n\r\n",
        b"HTTP/2 200\r\n",
        b"Content-Length: 5\r\n",
        b"Content-Length: 99999999999999999999\r\n",
        b"Content-Length: -1\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Content-Encoding: gzip\r\n",
        b"Content-Encoding: br\r\n",
        b"Content-Type: text/html; charset=utf-16\r\n",
        b"Location: /\r\n",
        b"Location: \xff\xfe://\r\n",
        b"Connection: keep-alive\r\n",
        b": \r\n",
        b"\r\n",
        b"\n",
        b"5\r\nhello\r\n0\r\n\r\n",
        b"ffffffffffffffff\r\n",
        b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
        b"hello",
    ];
    let responses: Vec<Vec<u8>> = {
        let mut random = fastrand::Rng::with_seed(SEED);
        (0..1_500)
            .map(|number| {
                let mut bytes: Vec<u8> = if number % 10 == 0 {
                    (0..random.usize(..300)).map(|_| random.u8(..)).collect()
                } else {
                    let start = if random.bool() { parts[0] } else { b"" };
                    let rest = (0..random.usize(..12)).flat_map(|_| parts[random.usize(..parts.len())]);
                    start.iter().chain(rest).copied().collect()
                };
                for _ in 0..random.usize(..3) {
                    if !bytes.is_empty() {
                        let place = random.usize(..bytes.len());
                        bytes[place] = random.u8(..);
                    }
                }
                bytes
            })
            .collect()
    };
    let next = Arc::new(AtomicUsize::new(0));
    let answers = Arc::new(responses.clone());
    let site = Site::plain({
        let next = Arc::clone(&next);
        move |stream| {
            let answer = &answers[next.load(Ordering::SeqCst)];
            let _ = stream.write_all(answer);
        }
    });
    let mut checker = checker();
    let regex = Arc::new(Pattern::new("hello").unwrap());
    for (number, response) in responses.iter().enumerate() {
        next.store(number, Ordering::SeqCst);
        let target = Target {
            follow: 2,
            status: if number % 7 == 0 { good(100..=999) } else { None },
            method: if number % 5 == 0 {
                Method::Head
            } else {
                Method::Get
            },
            regex: (number % 5 != 0).then(|| Arc::clone(&regex)),
            ..target(&site.url("/"))
        };
        let seen = checker.check(&target, now() + LONG);
        assert_consistent(&seen);
        assert!(
            !matches!(
                seen.outcome,
                Outcome::AgentError | Outcome::ResponseTimeout | Outcome::BodyTimeout
            ),
            "seed {SEED}, response {number} ({}): {seen:?}",
            response.escape_ascii()
        );
    }
}

#[test]
fn a_check_fits_into_half_of_the_stack_that_its_thread_has() {
    let authority = Authority::new("test authority");
    let body = gzip(b"hello");
    let site = Site::tls(authority.server(&["site.test"], |_| {}), move |stream| {
        let response = site::response("200 OK", "Content-Encoding: gzip\r\n", &body);
        stream.write_all(&response).unwrap();
    });
    let mut checker = trusting(&authority);
    let target = with_regex(&site.https("site.test"), "(?i)h[a-z]+o");
    let small = std::thread::Builder::new().stack_size(256 * 1024);
    let seen = small
        .spawn(move || checker.check(&target, now() + LONG))
        .unwrap()
        .join()
        .unwrap();
    assert_eq!(seen.outcome, Outcome::Ok, "{seen:?}");
}
