//! The HTTP check against scripted sites on loopback: every word of the closed set provoked for real, phases, redirects,
//! bodies, TLS, names.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::time::{Duration, Instant};

use flate2::Compression;
use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};
use host_metrics::check::fault::NameError;
use host_metrics::check::http::{Checker, Checks};
use host_metrics::check::outcome::{Observation, Outcome};
use host_metrics::check::pattern::Pattern;
use host_metrics::check::resolver::Names;
use host_metrics::check::target::{IpFamily, Method, StatusSet, Target};
use host_metrics::config::CheckConfig;
use host_metrics::sample::Timestamp;
use rustls::server::WebPkiClientVerifier;
use socket2::SockRef;
use url::Url;

use crate::child;
use crate::site::{self, Authority, Closed, Deaf, Site, Wire};

/// More than any check here needs on a busy machine.
pub const LONG: Duration = Duration::from_secs(20);
/// For checks that are meant to hit it.
const SHORT: Duration = Duration::from_millis(400);

pub fn config() -> CheckConfig {
    CheckConfig {
        timeout: LONG,
        max_threads: 8,
        max_body_bytes: 64 * 1024,
        user_agent: "host-metrics/test".into(),
        ca_file: None,
        agent_name: "test".into(),
    }
}

pub fn target(url: &str) -> Target {
    Target {
        address: url.into(),
        url: Url::parse(url).unwrap(),
        interval: Duration::from_secs(60),
        timeout: None,
        status: None,
        method: Method::Get,
        follow: 10,
        topic: None,
        ip_family: None,
        tls_insecure: false,
        tls_required: false,
        regex: None,
    }
}

fn with_regex(url: &str, regex: &str) -> Target {
    Target {
        regex: Some(Pattern::new(regex).unwrap().into()),
        ..target(url)
    }
}

fn good(codes: std::ops::RangeInclusive<u16>) -> Option<StatusSet> {
    Some(StatusSet(vec![codes]))
}

#[expect(clippy::disallowed_methods, reason = "checks have deadlines")]
pub fn now() -> Instant {
    Instant::now()
}

fn checker() -> Checker {
    Checks::new(&config()).unwrap().checker()
}

fn trusting(authority: &Authority) -> Checker {
    let config = CheckConfig {
        ca_file: Some(authority.file.path().to_owned()),
        ..config()
    };
    Checks::with_lookup(&config, Box::new(names)).unwrap().checker()
}

/// Names that exist for these tests only.
pub fn names(name: &str, _family: Option<IpFamily>) -> Result<Vec<IpAddr>, NameError> {
    match name {
        "site.test" | "other.test" => Ok(vec![Ipv4Addr::LOCALHOST.into()]),
        "both.test" => Ok(vec![Ipv6Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.into()]),
        "six.test" => Ok(vec![Ipv6Addr::LOCALHOST.into()]),
        "dead-first.test" => Ok(vec![
            Ipv4Addr::new(127, 0, 0, 2).into(),
            Ipv4Addr::LOCALHOST.into(),
        ]),
        "broken.test" => Err(NameError::Failed("the name servers failed".into())),
        "powerless.test" => Err(NameError::Agent("no memory".into())),
        "silent.test" => loop {
            std::thread::park();
        },
        _ => Err(NameError::NotFound(format!("there is no address for {name}"))),
    }
}

fn checker_with_names() -> Checker {
    Checks::with_lookup(&config(), Box::new(names)).unwrap().checker()
}

fn check(target: &Target) -> Observation {
    checker_with_names().check(target, now() + LONG)
}

/// Checks against a site that answers every request with `response`.
fn check_answer(response: impl Into<Vec<u8>>, regex: &str) -> Observation {
    let site = Site::answering(response);
    check(&with_regex(&site.url("/"), regex))
}

/// What must hold of any observation.
fn assert_consistent(observation: &Observation) {
    assert_eq!(
        observation.outcome == Outcome::Ok,
        observation.error.is_none(),
        "{observation:?}"
    );
    assert_eq!(
        observation.latency.is_some(),
        observation.status_code.is_some(),
        "{observation:?}"
    );
    assert!(
        observation.error.as_ref().is_none_or(|text| !text.is_empty()),
        "{observation:?}"
    );
    if observation.status_code.is_some() {
        assert!(
            observation.redirects.is_some() && observation.ip.is_some(),
            "{observation:?}"
        );
        assert!(
            observation.phases.connect.is_some() && observation.phases.ttfb.is_some(),
            "{observation:?}"
        );
    }
}

struct Case {
    what: &'static str,
    target: Target,
    within: Duration,
    outcome: Outcome,
    /// A part of the error for a person.
    says: &'static str,
    /// What the case needs as long as it lasts.
    _site: Box<dyn std::any::Any>,
}

fn case(
    what: &'static str,
    target: Target,
    within: Duration,
    outcome: Outcome,
    says: &'static str,
    site: impl std::any::Any,
) -> Case {
    Case {
        what,
        target,
        within,
        outcome,
        says,
        _site: Box::new(site),
    }
}

#[test]
fn every_fault_has_its_word() {
    use Outcome as O;
    let authority = Authority::new("test authority");
    let mut cases = Vec::new();
    let mut answer = |what, response: Vec<u8>, regex: &str, outcome, says| {
        let site = Site::answering(response);
        let target = match regex {
            "" => target(&site.url("/")),
            _ => with_regex(&site.url("/"), regex),
        };
        cases.push(case(what, target, LONG, outcome, says, site));
    };

    answer("a good page", site::ok("hello"), "", O::Ok, "");
    answer(
        "a good page with its text",
        site::ok("say hello\nworld"),
        "hello.?world|hello\nw",
        O::Ok,
        "",
    );
    answer(
        "404",
        site::response("404 Not Found", "", "hello"),
        "",
        O::BadStatus,
        "status 404",
    );
    answer(
        "500 with the text",
        site::response("500 Oops", "", "hello"),
        "hello",
        O::BadStatus,
        "status 500",
    );
    answer(
        "another text",
        site::ok("good bye"),
        "hello",
        O::RegexMismatch,
        "not in the body",
    );
    answer(
        "an empty page",
        site::ok(""),
        "hello",
        O::RegexMismatch,
        "not in the body",
    );
    answer(
        "204",
        b"HTTP/1.1 204 No Content\r\n\r\n".to_vec(),
        "hello",
        O::RegexMismatch,
        "no body",
    );
    answer(
        "304",
        b"HTTP/1.1 304 Not Modified\r\n\r\n".to_vec(),
        "hello",
        O::RegexMismatch,
        "no body",
    );
    answer(
        "a long page",
        site::ok(vec![b'x'; 65 * 1024]),
        "hello",
        O::BodyTooLarge,
        "first 65536 bytes",
    );
    answer(
        "an empty answer",
        Vec::new(),
        "",
        O::ConnectionClosed,
        "without a complete response",
    );
    answer(
        "a cut header",
        b"HTTP/1.1 200 OK\r\nContent-Le".to_vec(),
        "",
        O::ConnectionClosed,
        "without a complete",
    );
    answer(
        "a cut body, the text in it",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello".to_vec(),
        "hello",
        O::ConnectionClosed,
        "before the end of the body",
    );
    answer(
        "a cut chunk, the text in it",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nhello".to_vec(),
        "hello",
        O::ConnectionClosed,
        "before the end of the body",
    );
    answer(
        "chunks without their end",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n".to_vec(),
        "hello",
        O::ConnectionClosed,
        "before the end of the body",
    );
    answer(
        "a cut chunk size",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n1".to_vec(),
        "hello",
        O::ConnectionClosed,
        "before the end of the body",
    );
    answer(
        "broken chunks",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\nfoo".to_vec(),
        "hello",
        O::ProtocolError,
        "chunk",
    );
    answer(
        "a chunk size without end",
        [
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec(),
            vec![b'1'; 200_000],
        ]
        .concat(),
        "hello",
        O::ProtocolError,
        "chunk",
    );
    answer(
        "not HTTP",
        b"SSH-2.0-OpenSSH_9.2\r\n".to_vec(),
        "",
        O::ProtocolError,
        "not a valid response",
    );
    answer(
        "HTTP/2 frames: settings, and good bye",
        b"\0\0\x06\x04\0\0\0\0\0\0\x03\0\0\0\x64\0\0\x08\x07\0\0\0\0\0\0\0\0\0\0\0\0\x01".to_vec(),
        "",
        O::ProtocolError,
        "HTTP/2 frames",
    );
    answer(
        "a header line without a colon",
        site::response("200 OK", "Some words\r\n", "hello"),
        "",
        O::ProtocolError,
        "a header line without a colon",
    );
    answer(
        "a NUL in a header",
        site::response("200 OK", "X: a\0b\r\n", "hello"),
        "",
        O::ProtocolError,
        "a NUL byte in its headers",
    );
    answer(
        "a Location with a control character",
        site::redirect(302, "/a\x01b"),
        "",
        O::ProtocolError,
        "a control character in its Location",
    );
    answer(
        "a redirect to a name that no certificate can be for",
        site::redirect(302, "https://foo-.test/"),
        "",
        O::ProtocolError,
        "redirect (status 302) to https://foo-.test/: no certificate can be for this name",
    );
    answer(
        "a status below 100",
        b"HTTP/1.1 099 Hm\r\n\r\n".to_vec(),
        "",
        O::ProtocolError,
        "not a valid response",
    );
    answer(
        "an unknown coding",
        site::response("200 OK", "Content-Encoding: zstd\r\n", "hello"),
        "hello",
        O::ProtocolError,
        "unknown content-encoding zstd",
    );
    answer(
        "no gzip where it is said",
        site::response("200 OK", "Content-Encoding: gzip\r\n", "hello, hello, hello"),
        "hello",
        O::ProtocolError,
        "cannot be decoded",
    );
    answer(
        "bytes behind the end of a gzip stream",
        site::response(
            "200 OK",
            "Content-Encoding: gzip\r\n",
            [gzip(b"hello"), vec![b'x'; 3]].concat(),
        ),
        "hello",
        O::ProtocolError,
        "cannot be decoded: bytes after its end",
    );
    answer(
        "a brotli window of 1 GiB",
        site::response(
            "200 OK",
            "Content-Encoding: br\r\n",
            [&b"\x11\x1e"[..], &[0; 800]].concat(),
        ),
        "hello",
        O::ProtocolError,
        "cannot be decoded: it is not brotli",
    );
    let whole_gzip = gzip(b"hello hello hello");
    let half_gzip = &whole_gzip[..15];
    answer(
        "gzip cut, all bytes there",
        site::response("200 OK", "Content-Encoding: gzip\r\n", half_gzip),
        "hello",
        O::ProtocolError,
        "cannot be decoded",
    );
    answer(
        "gzip cut by the connection's end",
        [b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n", half_gzip].concat(),
        "hello",
        O::ConnectionClosed,
        "before the end of the body",
    );
    answer(
        "70 KB of headers",
        headers_of(70_000, 1_000),
        "",
        O::ProtocolError,
        "larger than 64 KiB",
    );
    answer(
        "a redirect to nowhere",
        b"HTTP/1.1 302 Found\r\n\r\n".to_vec(),
        "",
        O::ProtocolError,
        "without a Location",
    );
    answer(
        "a redirect to another scheme",
        site::redirect(301, "ftp://files.test/"),
        "",
        O::ProtocolError,
        "scheme ftp",
    );
    answer(
        "a redirect to a bad URL",
        site::redirect(301, "http://[::1/"),
        "",
        O::ProtocolError,
        "bad URL",
    );
    answer(
        "a redirect loop",
        site::redirect(302, "/"),
        "",
        O::TooManyRedirects,
        "more than 10 redirects",
    );
    answer(
        "303 in a loop",
        site::redirect(303, "?"),
        "",
        O::TooManyRedirects,
        "more than 10 redirects",
    );

    let mut hung = |what, site: Site, tls: bool, outcome, says| {
        let url = if tls {
            site.https("site.test")
        } else {
            site.url("/")
        };
        cases.push(case(what, with_regex(&url, "hello"), SHORT, outcome, says, site));
    };
    let silent = || Site::start(|mut stream, _| site::hold(&mut stream));
    hung(
        "silence after accept",
        silent(),
        false,
        O::ResponseTimeout,
        "no complete response",
    );
    hung(
        "silence in the handshake",
        silent(),
        true,
        O::TlsTimeout,
        "handshake",
    );
    let header = || {
        b"HTTP/1.1 200 OK\r\nX-Slow: "
            .iter()
            .copied()
            .chain(std::iter::repeat(b'x'))
    };
    hung(
        "headers that trickle",
        Site::plain(move |stream| site::trickle(stream, header())),
        false,
        O::ResponseTimeout,
        "no complete response",
    );
    hung(
        "a handshake that trickles",
        Site::start(|mut stream, _| {
            let record = b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc".iter().copied();
            site::trickle(&mut stream, record.chain(std::iter::repeat(0)));
        }),
        true,
        O::TlsTimeout,
        "handshake",
    );
    hung(
        "only an interim answer",
        Site::plain(|stream| {
            stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").unwrap();
            site::hold(stream);
        }),
        false,
        O::ResponseTimeout,
        "no complete response",
    );
    hung(
        "a body that stalls, the text in it",
        Site::plain(|stream| {
            stream
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
                .unwrap();
            site::hold(stream);
        }),
        false,
        O::BodyTimeout,
        "did not end in time",
    );
    hung(
        "a body that trickles",
        Site::plain(|stream| {
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\nhello").unwrap();
            site::trickle(stream, std::iter::repeat(b'x'));
        }),
        false,
        O::BodyTimeout,
        "did not end in time",
    );
    let deaf = Deaf::at((Ipv4Addr::LOCALHOST, 0).into());
    let url = format!("http://{}/", deaf.address);
    cases.push(case(
        "a full backlog",
        target(&url),
        SHORT,
        O::ConnectTimeout,
        "did not accept",
        deaf,
    ));
    cases.push(case(
        "a name server that is silent",
        target("http://silent.test/"),
        SHORT,
        O::DnsTimeout,
        "no answer from the name servers",
        (),
    ));

    let mut broken = |what, site: Site, tls: bool, outcome, says| {
        let url = if tls {
            site.https("site.test")
        } else {
            site.url("/")
        };
        cases.push(case(what, with_regex(&url, "hello"), LONG, outcome, says, site));
    };
    broken(
        "a reset at once",
        Site::start(|stream, _| site::reset(&stream)),
        false,
        O::ConnectionClosed,
        "",
    );
    broken(
        "a reset after the request",
        Site::plain(|stream| site::reset(stream)),
        false,
        O::ConnectionClosed,
        "reset",
    );
    let cut_by_reset = |head: &'static [u8]| {
        Site::plain(move |stream| {
            stream.write_all(head).unwrap();
            // The client has read it by now, else a reset could overtake it.
            site::slowly(Duration::from_millis(50));
            site::reset(stream);
        })
    };
    broken(
        "a reset in the headers",
        cut_by_reset(b"HTTP/1.1 200 OK\r\n"),
        false,
        O::ConnectionClosed,
        "reset the connection",
    );
    broken(
        "a reset in a body without length",
        cut_by_reset(b"HTTP/1.1 200 OK\r\n\r\nhello"),
        false,
        O::ConnectionClosed,
        "before the end of the body",
    );
    broken(
        "a reset in the handshake",
        Site::start(|mut stream, _| {
            let mut hello = [0; 16];
            stream.read_exact(&mut hello).unwrap();
            site::reset(&stream);
        }),
        true,
        O::TlsError,
        "handshake",
    );
    broken(
        "an end in the handshake",
        Site::start(|mut s, _| drop(s.read(&mut [0; 9999]))),
        true,
        O::TlsError,
        "closed",
    );
    broken(
        "plain HTTP on a TLS port",
        Site::start(|mut stream, _| {
            let _ = stream.read(&mut [0; 9999]);
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        }),
        true,
        O::TlsError,
        "does not speak TLS",
    );
    broken(
        "an alert: TLS 1.0 only",
        Site::start(|mut stream, _| {
            let _ = stream.read(&mut [0; 9999]);
            stream.write_all(b"\x15\x03\x01\x00\x02\x02\x46").unwrap();
        }),
        true,
        O::TlsError,
        "protocol version",
    );
    broken(
        "TLS 1.0 spoken",
        Site::start(|mut stream, _| tls_1_0_hello(&mut stream)),
        true,
        O::TlsError,
        "TLS",
    );
    let mut demanding = authority.server(&["site.test"], |_| {});
    let mut roots = rustls::RootCertStore::empty();
    roots.add(authority.certificate()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider)
        .build()
        .unwrap();
    let (leaf, key) = authority.leaf(&["site.test"], |_| {});
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        demanding = rustls::ServerConfig::builder_with_provider(Arc::clone(demanding.crypto_provider()))
            .with_protocol_versions(&[version])
            .unwrap()
            .with_client_cert_verifier(Arc::clone(&verifier) as _)
            .with_single_cert(vec![leaf.clone()], key.clone_key())
            .unwrap();
        broken(
            "a client certificate demanded",
            Site::tls(demanding.clone(), |_| {}),
            true,
            O::TlsError,
            "alert",
        );
    }
    for (what, response, outcome, says) in [
        (
            "HTTP/1.1 over TLS without length and without a clean end",
            b"HTTP/1.1 200 OK\r\n\r\nhello".to_vec(),
            O::ConnectionClosed,
            "before the end of the body",
        ),
        (
            "HTTP/1.0 over TLS without length and without a clean end",
            b"HTTP/1.0 200 OK\r\n\r\nhello".to_vec(),
            O::Ok,
            "",
        ),
        (
            "the same with gzip",
            [
                &b"HTTP/1.0 200 OK\r\nContent-Encoding: gzip\r\n\r\n"[..],
                &gzip(b"hello"),
            ]
            .concat(),
            O::Ok,
            "",
        ),
        (
            "the same with half of a gzip",
            [b"HTTP/1.0 200 OK\r\nContent-Encoding: gzip\r\n\r\n", half_gzip].concat(),
            O::ConnectionClosed,
            "before the end of the body",
        ),
        (
            "HTTP/1.0 over TLS, shorter than its length",
            b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\nhello".to_vec(),
            O::ConnectionClosed,
            "before the end of the body",
        ),
        (
            "HTTP/1.0 over TLS, a cut head",
            b"HTTP/1.0 200 OK\r\n".to_vec(),
            O::ConnectionClosed,
            "without a complete response",
        ),
    ] {
        let config = Arc::new(authority.server(&["site.test"], |_| {}));
        let site = Site::start(move |mut stream, _| {
            let mut server = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut tls = rustls::Stream::new(&mut server, &mut stream);
            site::read_head(&mut tls);
            tls.write_all(&response).unwrap();
        });
        broken(what, site, true, outcome, says);
    }

    let mut certificate = |what, config, outcome, says| {
        let site = Site::tls(config, |stream| stream.write_all(&site::ok("hello")).unwrap());
        cases.push(case(
            what,
            with_regex(&site.https("site.test"), "hello"),
            LONG,
            outcome,
            says,
            site,
        ));
    };
    certificate(
        "a good certificate",
        authority.server(&["site.test"], |_| {}),
        O::Ok,
        "",
    );
    let (below, leaf, key) = authority.intermediate(&["site.test"]);
    let with_chain = site::server_config(vec![leaf.clone(), below], key.clone_key());
    certificate("an intermediate", with_chain, O::Ok, "");
    let without_chain = site::server_config(vec![leaf], key);
    certificate(
        "its intermediate missing",
        without_chain,
        O::TlsCertUntrusted,
        "without its intermediates",
    );
    let expired = authority.server(&["site.test"], |params| {
        params.not_after = rcgen::date_time_ymd(2021, 1, 1)
    });
    certificate(
        "an expired certificate",
        expired,
        O::TlsCertExpired,
        "has expired",
    );
    let early = authority.server(&["site.test"], |params| {
        params.not_before = rcgen::date_time_ymd(2080, 1, 1)
    });
    certificate(
        "a certificate not valid yet",
        early,
        O::TlsCertExpired,
        "not valid yet",
    );
    let for_others = authority.server(&["a.test", "b.test"], |_| {});
    certificate(
        "another's certificate",
        for_others,
        O::TlsCertName,
        "not for site.test, only for a.test, b.test",
    );
    certificate(
        "a nameless certificate",
        authority.server(&[], |_| {}),
        O::TlsCertName,
        "holds no names",
    );
    let stranger = Authority::new("stranger").server(&["site.test"], |_| {});
    certificate("an unknown issuer", stranger, O::TlsCertUntrusted, "not trusted");
    let own = site::self_signed(&["site.test"], |_| {});
    certificate(
        "a self-signed certificate",
        own,
        O::TlsCertUntrusted,
        "self-signed",
    );
    let ca = authority.server(&["site.test"], |params| {
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    });
    certificate("a CA's certificate as the server's", ca, O::Ok, "");

    let mut unreached = |what, url: &str, outcome, says| {
        cases.push(case(what, target(url), LONG, outcome, says, ()));
    };
    unreached(
        "no such name",
        "http://nowhere.test/",
        O::DnsNotFound,
        "no address for nowhere.test",
    );
    unreached(
        "name servers that fail",
        "http://broken.test/",
        O::DnsError,
        "name servers failed",
    );
    unreached(
        "no memory for the lookup",
        "http://powerless.test/",
        O::AgentError,
        "no memory",
    );
    // The kernel's routing table knows loopback's broadcast address, and TCP has no way there.
    unreached(
        "no route",
        "http://127.255.255.255/",
        O::ConnectUnreachable,
        "127.255.255.255:80 is unreachable",
    );
    // A link-local address says nothing without its interface.
    unreached(
        "no such connection",
        "http://[fe80::1]/",
        O::ConnectError,
        "cannot connect to [fe80::1]:80",
    );
    let closed = Closed::new();
    unreached(
        "nobody listens",
        &format!("http://{}/", closed.address),
        O::ConnectRefused,
        "connection refused by 127.0.0.1:",
    );

    let mut checker = trusting(&authority);
    let mut words = HashSet::new();
    for Case {
        what,
        target,
        within,
        outcome,
        says,
        _site,
    } in cases
    {
        let began_at = now();
        let seen = checker.check(&target, began_at + within);
        assert_eq!(seen.outcome, outcome, "{what}: {seen:?}");
        assert_consistent(&seen);
        let text = seen.error.unwrap_or_default();
        assert!(text.contains(says), "{what}: {text:?} says nothing of {says:?}");
        assert!(
            !text.contains(target.address.as_str()),
            "{what}: the address is known to the reader: {text}"
        );
        if within == SHORT {
            assert!(now() - began_at >= SHORT, "{what}: ended before its deadline");
            assert!(
                now() - began_at < LONG / 4,
                "{what}: ended long after its deadline"
            );
        }
        words.insert(seen.outcome);
    }
    let missing: Vec<_> = Outcome::ALL
        .into_iter()
        .filter(|word| *word != Outcome::Missed && !words.contains(word))
        .collect();
    assert!(missing.is_empty(), "never provoked: {missing:?}");
}

/// Enough of a ServerHello to say that it is TLS 1.0.
fn tls_1_0_hello(stream: &mut std::net::TcpStream) {
    let _ = stream.read(&mut [0; 9999]);
    let mut hello = b"\x16\x03\x01\x00\x2a\x02\x00\x00\x26\x03\x01".to_vec();
    hello.extend([7; 32]);
    hello.extend(b"\x00\xc0\x13\x00");
    stream.write_all(&hello).unwrap();
    site::hold(stream);
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

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

/// What `brotli` makes of it, in its least form: a stored block.
fn brotli(bytes: &[u8]) -> Vec<u8> {
    let length = u8::try_from(bytes.len()).unwrap() - 1;
    // A window of 22 bits, one block that is not the last, of 4 nibbles of length, stored; then the empty last block.
    let header = 0b1011 | u32::from(length) << 7 | 1 << 23;
    [&header.to_le_bytes()[..3], bytes, &[3]].concat()
}

/// A response of one chunk; `head` with its last line's end.
fn chunked(head: &str, body: &[u8]) -> Vec<u8> {
    let size = format!("{:x}\r\n", body.len());
    [head.as_bytes(), b"\r\n", size.as_bytes(), body, b"\r\n0\r\n\r\n"].concat()
}

/// A response whose headers are `total` bytes, in lines of `line` bytes.
fn headers_of(total: usize, line: usize) -> Vec<u8> {
    let mut head = b"HTTP/1.1 200 OK\r\n".to_vec();
    for number in 0..total / line {
        let name = format!("X-Filler-{number}: ");
        head.extend(name.as_bytes());
        head.extend(vec![b'x'; line - name.len() - 2]);
        head.extend(b"\r\n");
    }
    head.extend(b"Content-Length: 5\r\n\r\nhello");
    head
}

#[test]
fn one_check_sends_one_request_and_nothing_that_was_not_asked_for() {
    let site = Site::answering(site::ok("hello"));
    assert_eq!(check(&target(&site.url("/a/b?c=d%20e"))).outcome, Outcome::Ok);
    let with_body = with_regex(&format!("http://site.test:{}/", site.address.port()), "hello");
    assert_eq!(check(&with_body).outcome, Outcome::Ok);
    let head = Target {
        method: Method::Head,
        ..target(&site.url("/"))
    };
    assert_eq!(check(&head).outcome, Outcome::Ok);

    // Names as every other client writes them: some servers know no `host:`.
    let expected = |first: &str, host: &str, codings: &str| {
        format!(
            "{first} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: host-metrics/test\r\nAccept: */*\r\n\
             Accept-Encoding: {codings}\r\nConnection: close\r\n\r\n"
        )
    };
    let host = site.address.to_string();
    let named = format!("site.test:{}", site.address.port());
    let requests = site.requests();
    assert_eq!(requests.len(), 3, "{requests:?}");
    assert_eq!(requests[0], expected("GET /a/b?c=d%20e", &host, "identity"));
    assert_eq!(requests[1], expected("GET /", &named, "gzip, br"));
    assert_eq!(requests[2], expected("HEAD /", &host, "identity"));
}

#[test]
fn a_host_header_has_a_port_and_brackets_where_they_belong() {
    let site = Site::start_at((Ipv6Addr::LOCALHOST, 0).into(), |mut stream, requests| {
        let request = site::read_head(&mut stream);
        requests.lock().unwrap().push(request);
        stream.write_all(&site::ok("hello")).unwrap();
    });
    assert_eq!(check(&target(&site.url("/"))).outcome, Outcome::Ok);
    let host = format!("\r\nHost: [::1]:{}\r\n", site.address.port());
    assert!(site.requests()[0].contains(&host), "{:?}", site.requests());
}

#[test]
fn a_url_of_any_length_that_a_host_file_allows_is_requested_whole() {
    let site = Site::answering(site::ok("hello"));
    // 2,000 characters of three bytes each, percent-encoded.
    let target = target(&site.url(&format!("/{}", "\u{20ac}".repeat(660))));
    assert_eq!(check(&target).outcome, Outcome::Ok);
    let requests = site.requests();
    assert!(requests[0].starts_with("GET /%E2%82%AC%E2%82%AC"), "{requests:?}");
    assert!(requests[0].len() > 660 * 9, "{}", requests[0].len());
}

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
        // Folded.
        lines("Content-Length: 5\r\nX: a\r\n b\r\n\tc\r\n"),
        lines("Content-Length:\r\n 5\r\n"),
        lines(" X: a\r\nContent-Length: 5\r\n"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding:\r\n\tchunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n".to_vec(),
        // A blank before the colon.
        lines("Content-Length : 5\r\nX\t: a\r\n"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding : chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n".to_vec(),
        // Lines that nobody reads.
        lines("Content-Length: 5\r\nX Y: a\r\nX(Y): a\r\n\u{fc}: a\r\n: a\r\n"),
        lines("Content-Length: 5\r\nX: \u{1}\u{1b}[31m\u{7f}\r\nY: a\rb\r\n"),
        lines("Content-Length: 5\r\nContent-Type: text/html\u{1}\r\n"),
        // Status lines, line ends.
        b"HTTP/1.1 200 \xfc\x01\r\nContent-Length: 5\r\n\r\nhello".to_vec(),
        b"HTTP/1.1  200\nContent-Length: 5\n\nhello".to_vec(),
        b"http/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello".to_vec(),
        b"HTTP/2 200\r\nContent-Length: 5\r\n\r\nhello".to_vec(),
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n".to_vec(),
        // Interim answers with headers.
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
                // A body that waits for its end would wait for ever.
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

#[test]
fn each_phase_is_timed_and_latency_ends_with_the_headers() {
    // The site takes its time twice over: on a busy machine the checker's clock may start after the site's.
    const EACH: Duration = Duration::from_millis(40);
    let authority = Authority::new("test authority");
    let server = Arc::new(authority.server(&["slow.test"], |_| {}));
    let site = Site::start(move |stream, _| {
        // The handshake waits for this.
        site::slowly(EACH * 2);
        let mut tls = rustls::StreamOwned::new(
            rustls::ServerConnection::new(Arc::clone(&server)).unwrap(),
            stream,
        );
        site::read_head(&mut tls);
        site::slowly(EACH * 2);
        tls.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
            .unwrap();
        site::slowly(EACH * 2);
        tls.write_all(b"hello").unwrap();
        site::hold(&mut tls);
    });
    let config = CheckConfig {
        ca_file: Some(authority.file.path().to_owned()),
        ..config()
    };
    let slow_name = |_: &str, _: Option<IpFamily>| {
        site::slowly(EACH * 2);
        Ok(vec![IpAddr::from(Ipv4Addr::LOCALHOST)])
    };
    let checks = Checks::with_lookup(&config, Box::new(slow_name)).unwrap();
    let began_at = now();
    let seen = checks
        .checker()
        .check(&with_regex(&site.https("slow.test"), "hello"), now() + LONG);
    let took = now() - began_at;

    assert_eq!(seen.outcome, Outcome::Ok, "{seen:?}");
    let phases = seen.phases;
    for (phase, least) in [
        (phases.dns, EACH),
        (phases.connect, Duration::ZERO),
        (phases.tls, EACH),
        (phases.ttfb, EACH),
        (phases.body, EACH),
    ] {
        assert!(
            phase.is_some_and(|spent| spent >= least && spent <= took),
            "{seen:?}"
        );
    }
    let before_body = [phases.dns, phases.connect, phases.tls, phases.ttfb]
        .into_iter()
        .flatten()
        .sum::<Duration>();
    let latency = seen.latency.unwrap();
    assert!(
        latency >= before_body && latency + phases.body.unwrap() <= took,
        "{seen:?} of {took:?}"
    );
    assert_eq!(seen.ip, Some(Ipv4Addr::LOCALHOST.into()));
    assert_eq!(seen.body_bytes, Some(5));
}

#[test]
fn phases_that_are_not_there_are_absent_and_a_failed_one_keeps_its_time() {
    let site = Site::answering(site::ok("hello"));
    let seen = check(&target(&site.url("/")));
    assert_eq!(
        (seen.phases.dns, seen.phases.tls, seen.phases.body),
        (None, None, None)
    );
    assert_eq!((seen.body_bytes, seen.regex_matched), (None, None));
    assert_eq!((seen.redirects, seen.cert_expires_at), (Some(0), None));
    assert_eq!(
        (seen.status_code, seen.ip),
        (Some(200), Some(Ipv4Addr::LOCALHOST.into()))
    );

    let seen = check(&target("http://nowhere.test/"));
    assert!(
        seen.phases.dns.is_some() && seen.phases.connect.is_none(),
        "{seen:?}"
    );
    assert_eq!(
        (seen.latency, seen.status_code, seen.redirects, seen.ip),
        (None, None, None, None)
    );

    let deaf = Deaf::at((Ipv4Addr::LOCALHOST, 0).into());
    let seen = checker().check(&target(&format!("http://{}/", deaf.address)), now() + SHORT);
    assert!(
        seen.phases.connect.is_some_and(|spent| spent >= SHORT / 2),
        "{seen:?}"
    );
    assert_eq!((seen.phases.ttfb, seen.ip), (None, None));

    let silent = Site::plain(|stream| site::hold(stream));
    let seen = checker().check(&target(&silent.url("/")), now() + SHORT);
    assert_eq!(seen.outcome, Outcome::ResponseTimeout);
    assert!(
        seen.phases.connect.is_some() && seen.phases.ttfb.is_none() && seen.ip.is_some(),
        "{seen:?}"
    );
}

#[test]
fn redirects_are_followed_counted_and_summed() {
    let last = Site::answering(site::ok("arrived"));
    let port = last.address.port();
    let first = Site::plain(move |stream| {
        site::slowly(Duration::from_millis(30));
        // Each request has a connection, and so a thread, of its own: the path says where it is.
        let _ = stream.write_all(&site::redirect(
            307,
            &format!("http://user:secret@other.test:{port}/end#top"),
        ));
    });
    let middle_port = first.address.port();
    let start = Site::plain(move |stream| {
        site::slowly(Duration::from_millis(30));
        let _ = stream.write_all(&site::redirect(
            301,
            &format!("//site.test:{middle_port}/middle?x"),
        ));
    });
    let url = start.url("/");
    let seen = check(&with_regex(&url, "arrived"));
    assert_eq!(seen.outcome, Outcome::Ok, "{seen:?}");
    assert_eq!((seen.redirects, seen.status_code), (Some(2), Some(200)));
    assert!(seen.phases.ttfb.unwrap() >= Duration::from_millis(40), "{seen:?}");
    assert!(seen.latency.unwrap() >= Duration::from_millis(60), "{seen:?}");
    assert!(
        first.requests()[0].starts_with("GET /middle?x HTTP/1.1\r\n"),
        "{:?}",
        first.requests()
    );
    let asked = &last.requests()[0].to_lowercase();
    assert!(asked.starts_with("get /end http/1.1\r\n"), "{asked}");
    assert!(asked.contains(&format!("host: other.test:{port}\r\n")), "{asked}");
    assert!(
        !asked.contains("authorization") && !asked.contains("secret"),
        "{asked}"
    );

    for (follow, status, outcome, code, redirects) in [
        (2, None, Outcome::Ok, 200, 2),
        (1, None, Outcome::TooManyRedirects, 307, 1),
        (0, None, Outcome::Ok, 301, 0),
        (0, good(200..=299), Outcome::BadStatus, 301, 0),
        (10, good(200..=200), Outcome::Ok, 200, 2),
        (10, good(301..=301), Outcome::Ok, 301, 0),
        (10, good(307..=307), Outcome::Ok, 307, 1),
        (1, good(307..=307), Outcome::Ok, 307, 1),
        (10, good(404..=404), Outcome::BadStatus, 200, 2),
    ] {
        let written = format!("{status:?}");
        let seen = check(&Target {
            follow,
            status,
            ..target(&url)
        });
        assert_eq!(
            seen.outcome, outcome,
            "follow={follow} status={written}: {seen:?}"
        );
        assert_eq!(
            (seen.status_code, seen.redirects),
            (Some(code), Some(redirects)),
            "follow={follow} status={written}"
        );
        assert_consistent(&seen);
    }

    let head = Target {
        method: Method::Head,
        ..target(&url)
    };
    assert_eq!(check(&head).outcome, Outcome::Ok);
    assert!(last.requests().last().unwrap().starts_with("HEAD /end "));
}

#[test]
fn a_location_goes_back_as_it_came_and_an_empty_one_is_no_redirect() {
    let follow = |location: &[u8]| {
        let redirect = [
            b"HTTP/1.1 302 Found\r\nContent-Length: 5\r\nLocation:",
            location,
            b"\r\n\r\nmoved",
        ]
        .concat();
        let first = AtomicUsize::new(0);
        let site = Site::plain(move |stream| {
            let answer = match first.fetch_add(1, Ordering::SeqCst) {
                0 => redirect.clone(),
                _ => site::ok("arrived"),
            };
            let _ = stream.write_all(&answer);
        });
        let seen = check(&with_regex(&site.url("/"), "^(moved|arrived)$"));
        assert_eq!(seen.outcome, Outcome::Ok, "{}: {seen:?}", location.escape_ascii());
        let asked = site
            .requests()
            .last()
            .unwrap()
            .split(' ')
            .nth(1)
            .unwrap()
            .to_owned();
        (seen.status_code, seen.redirects, asked)
    };
    for (location, asked) in [
        (&b" /gr\xfcn"[..], "/gr%FCn"),
        (b" /gr\xc3\xbcn", "/gr%C3%BCn"),
        (b" /\xff?\x80=\xe2\x82\xac", "/%FF?%80=%E2%82%AC"),
        (b"\r\n /folded", "/folded"),
        (b" \r\nLocation: /second", "/second"),
    ] {
        let expected = (Some(200), Some(1), asked.to_owned());
        assert_eq!(follow(location), expected, "{}", location.escape_ascii());
    }
    for location in [&b""[..], b" ", b"\t \t", b"\r\n "] {
        let expected = (Some(302), Some(0), "/".to_owned());
        assert_eq!(follow(location), expected, "{}", location.escape_ascii());
    }
}

#[test]
fn redirects_that_took_all_of_the_time_are_an_answer_that_did_not_come() {
    let chain = |delay: Duration| {
        let site = Site::plain(move |stream| {
            site::slowly(delay);
            let _ = stream.write_all(&site::redirect(302, "/on"));
        });
        let target = Target {
            follow: 100,
            ..target(&site.url("/"))
        };
        checker().check(&target, now() + SHORT)
    };
    // Some of them end between two hops, some while a hop waits for its answer.
    for micros in (0..10).map(|number| 19_700 + number * 37) {
        let seen = chain(Duration::from_micros(micros));
        assert_eq!(seen.outcome, Outcome::ResponseTimeout, "{seen:?}");
        let followed = seen.redirects.unwrap();
        let text = seen.error.unwrap();
        assert!(text.ends_with(&format!(", after {followed} redirects")), "{text}");
        assert!(text.contains("in time"), "{text}");
    }

    let deaf = Deaf::at((Ipv4Addr::LOCALHOST, 0).into());
    let site = Site::answering(site::redirect(302, &format!("http://{}/", deaf.address)));
    let seen = checker().check(&target(&site.url("/")), now() + SHORT);
    assert_eq!(
        seen.outcome,
        Outcome::ConnectTimeout,
        "the address had its time: {seen:?}"
    );
    assert!(
        seen.error
            .unwrap()
            .ends_with("did not accept the connection in time, after 1 redirect")
    );
}

#[test]
fn an_insecure_address_trusts_no_other_host_that_it_redirects_to() {
    let arrived = Site::tls(site::self_signed(&["unknown.test"], |_| {}), |stream| {
        stream.write_all(&site::ok("arrived")).unwrap();
    });
    let redirecting = |to: &str| {
        let answer = site::redirect(302, to);
        Site::tls(site::self_signed(&["unknown.test"], |_| {}), move |stream| {
            stream.write_all(&answer).unwrap();
        })
    };
    let insecure = |site: &Site| {
        let target = Target {
            tls_insecure: true,
            ..target(&site.https("site.test"))
        };
        checker_with_names().check(&target, now() + LONG)
    };
    let same_host = redirecting(&arrived.https("site.test"));
    let seen = insecure(&same_host);
    assert_eq!((seen.outcome, seen.redirects), (Outcome::Ok, Some(1)), "{seen:?}");

    let other_host = redirecting(&arrived.https("other.test"));
    let seen = insecure(&other_host);
    assert_eq!(
        (seen.outcome, seen.redirects),
        (Outcome::TlsCertUntrusted, Some(1)),
        "{seen:?}"
    );
    assert!(seen.error.unwrap().ends_with(", after 1 redirect"));

    let plain = Site::answering(site::redirect(302, &same_host.https("site.test")));
    let back = redirecting(&format!("http://other.test:{}/", plain.address.port()));
    let seen = insecure(&back);
    assert_eq!(
        (seen.outcome, seen.redirects),
        (Outcome::Ok, Some(3)),
        "back at its own host: {seen:?}"
    );
}

#[test]
fn a_redirect_to_http_is_refused_where_tls_is_required() {
    let authority = Authority::new("test authority");
    let plain = Site::answering(site::ok("hello"));
    let to_plain = format!("http://site.test:{}/?token=x", plain.address.port());
    let secure = Site::tls(authority.server(&["site.test"], |_| {}), move |stream| {
        stream.write_all(&site::redirect(301, &to_plain)).unwrap();
    });
    let to_secure = Site::tls(authority.server(&["site.test"], |_| {}), {
        let to_secure = secure.https("site.test");
        move |stream| stream.write_all(&site::redirect(302, &to_secure)).unwrap()
    });
    let mut checker = trusting(&authority);
    let free = target(&to_secure.https("site.test"));
    let seen = checker.check(&free, now() + LONG);
    assert_eq!((seen.outcome, seen.redirects), (Outcome::Ok, Some(2)), "{seen:?}");

    let bound = Target {
        tls_required: true,
        ..free
    };
    let seen = checker.check(&bound, now() + LONG);
    assert_eq!(
        (seen.outcome, seen.status_code, seen.redirects),
        (Outcome::ProtocolError, Some(301), Some(1)),
        "{seen:?}"
    );
    assert_consistent(&seen);
    let origin = format!("http://site.test:{}/", plain.address.port());
    assert_eq!(
        seen.error.unwrap(),
        format!("redirect (status 301) to {origin}, and tls=required does not follow it")
    );
    assert_eq!(plain.requests().len(), 1, "asked by the first check only");
}

#[test]
fn a_redirect_to_a_fault_has_that_faults_word_and_what_was_followed() {
    let closed = Closed::new();
    let site = Site::answering(site::redirect(302, &format!("http://{}/", closed.address)));
    let seen = check(&target(&site.url("/")));
    assert_eq!(seen.outcome, Outcome::ConnectRefused, "{seen:?}");
    assert_eq!(
        (seen.redirects, seen.status_code, seen.latency),
        (Some(1), None, None)
    );

    let seen = check_answer(site::response("305 Use Proxy", "", ""), "x");
    assert_eq!(
        (seen.outcome, seen.status_code),
        (Outcome::RegexMismatch, Some(305))
    );
    let seen = check_answer(site::response("308 Gone there", "", ""), "x");
    assert_eq!(
        (seen.outcome, seen.status_code),
        (Outcome::ProtocolError, Some(308))
    );
    assert!(seen.latency.is_some() && seen.redirects == Some(0), "{seen:?}");
}

#[test]
fn a_redirect_to_https_is_verified_and_its_certificate_seen() {
    let authority = Authority::new("test authority");
    let secure = Site::tls(authority.server(&["site.test"], |_| {}), |stream| {
        stream.write_all(&site::ok("hello")).unwrap();
    });
    let site = Site::answering(site::redirect(301, &secure.https("site.test")));
    let seen = trusting(&authority).check(&target(&site.url("/")), now() + LONG);
    assert_eq!((seen.outcome, seen.redirects), (Outcome::Ok, Some(1)), "{seen:?}");
    assert!(seen.cert_expires_at.is_some() && seen.phases.tls.is_some() && seen.phases.dns.is_some());
    let seen = checker_with_names().check(&target(&site.url("/")), now() + LONG);
    assert_eq!(seen.outcome, Outcome::TlsCertUntrusted, "{seen:?}");
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
            Outcome::Ok,
            Some(true),
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
    // Seconds each, when nothing interrupts them.
    for regex in [
        r"(?-u)a[ab]{10000}c",
        r"(?:\b|b)a[ab]{10000}c",
        r"(?:a[ab]{900}\w{90}){2}ä",
    ] {
        let target = with_regex(&site.url("/"), regex);
        let seen = checker.check(&target, now() + SHORT);
        assert_eq!(
            (seen.outcome, seen.regex_matched, seen.error.as_deref()),
            (
                Outcome::BodyTimeout,
                None,
                Some("the search for the regex in the body did not end in time")
            ),
            "{regex}: {seen:?}"
        );
    }
    // Nothing of it is left for the next check.
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
    // Without a regex it is not read at all.
    assert_eq!(check(&target(&site.url("/"))).outcome, Outcome::Ok);
}

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
fn a_checker_forgets_the_last_check() {
    let authority = Authority::new("test authority");
    let secure = Site::tls(authority.server(&["site.test"], |_| {}), |stream| {
        stream.write_all(&site::ok("hello")).unwrap();
    });
    let mut checker = trusting(&authority);
    let first = checker.check(&with_regex(&secure.https("site.test"), "hello"), now() + LONG);
    assert_eq!(first.outcome, Outcome::Ok, "{first:?}");
    assert!(first.cert_expires_at.is_some());
    let second = checker.check(&target("http://nowhere.test/"), now() + LONG);
    assert_eq!(
        (second.ip, second.cert_expires_at, second.phases.tls),
        (None, None, None)
    );
}

#[test]
fn a_dead_address_does_not_make_a_site_down() {
    let site = Site::answering(site::ok("hello"));
    let dead = SocketAddr::from((Ipv4Addr::new(127, 0, 0, 2), site.address.port()));
    let url = format!("http://dead-first.test:{}/", site.address.port());

    // Nobody listens on the first address.
    let seen = check(&target(&url));
    assert_eq!(
        (seen.outcome, seen.ip),
        (Outcome::Ok, Some(Ipv4Addr::LOCALHOST.into())),
        "{seen:?}"
    );

    // It does not answer: half of the time is spent on it.
    let _deaf = Deaf::at(dead);
    let seen = checker_with_names().check(&target(&url), now() + SHORT * 2);
    assert_eq!(
        (seen.outcome, seen.ip),
        (Outcome::Ok, Some(Ipv4Addr::LOCALHOST.into())),
        "{seen:?}"
    );
    assert!(
        seen.phases.connect.is_some_and(|spent| spent >= SHORT / 2),
        "{seen:?}"
    );
}

#[test]
fn the_last_answer_of_several_addresses_is_told_and_no_route_least_of_all() {
    let refused = Closed::new();
    let lookup = |_: &str, _: Option<IpFamily>| {
        let unreachable = Ipv4Addr::new(127, 255, 255, 255);
        Ok(vec![
            unreachable.into(),
            Ipv4Addr::LOCALHOST.into(),
            unreachable.into(),
        ])
    };
    let mut checker = Checks::with_lookup(&config(), Box::new(lookup))
        .unwrap()
        .checker();
    let seen = checker.check(
        &target(&format!("http://any.test:{}/", refused.address.port())),
        now() + LONG,
    );
    assert_eq!(seen.outcome, Outcome::ConnectRefused, "{seen:?}");
    assert!(seen.error.is_some_and(|text| text.contains("127.0.0.1")));
}

#[test]
fn the_family_asked_for_is_the_only_one_used() {
    let site = Site::answering(site::ok("hello"));
    let port = site.address.port();
    let table = [
        ("both.test", Some(IpFamily::V4), Outcome::Ok),
        ("both.test", Some(IpFamily::V6), Outcome::ConnectRefused),
        ("site.test", Some(IpFamily::V6), Outcome::DnsNotFound),
        ("six.test", Some(IpFamily::V4), Outcome::DnsNotFound),
        ("127.0.0.1", Some(IpFamily::V4), Outcome::Ok),
        ("127.0.0.1", Some(IpFamily::V6), Outcome::DnsNotFound),
        ("[::1]", Some(IpFamily::V4), Outcome::DnsNotFound),
        ("both.test", None, Outcome::Ok),
    ];
    for (host, ip_family, outcome) in table {
        let seen = check(&Target {
            ip_family,
            ..target(&format!("http://{host}:{port}/"))
        });
        // A machine without IPv6 has no way to ::1 instead of nobody there.
        let without_ipv6 = outcome == Outcome::ConnectRefused && seen.outcome == Outcome::ConnectUnreachable;
        assert!(
            seen.outcome == outcome || without_ipv6,
            "{host} {ip_family:?}: {seen:?}"
        );
    }
}

#[test]
fn the_leaf_is_seen_whatever_verification_says_and_insecure_takes_anything() {
    let expiry = |year| {
        let at = rcgen::date_time_ymd(year, 1, 1).unix_timestamp();
        Timestamp::from_unix_micros(at * 1_000_000)
    };
    let authority = Authority::new("test authority");
    let expired = authority.server(&["else.test"], |params| {
        params.not_after = rcgen::date_time_ymd(2021, 1, 1)
    });
    let own = site::self_signed(&["site.test"], |params| {
        params.not_after = rcgen::date_time_ymd(2077, 1, 1)
    });
    for (config, outcome, expires_at) in [
        (expired, Outcome::TlsCertExpired, expiry(2021)),
        (own, Outcome::TlsCertUntrusted, expiry(2077)),
    ] {
        let site = Site::tls(config, |stream| stream.write_all(&site::ok("hello")).unwrap());
        let target = target(&site.https("site.test"));
        let mut checker = trusting(&authority);
        let seen = checker.check(&target, now() + LONG);
        assert_eq!(
            (seen.outcome, seen.cert_expires_at),
            (outcome, expires_at),
            "{seen:?}"
        );
        assert_eq!((seen.status_code, seen.latency), (None, None));
        assert!(seen.phases.tls.is_some() && seen.ip.is_some(), "{seen:?}");

        let insecure = Target {
            tls_insecure: true,
            ..target
        };
        let seen = checker.check(&insecure, now() + LONG);
        assert_eq!(
            (seen.outcome, seen.cert_expires_at),
            (Outcome::Ok, expires_at),
            "{seen:?}"
        );
        // And only for the host that says so.
        let seen = checker.check(
            &Target {
                tls_insecure: false,
                ..insecure
            },
            now() + LONG,
        );
        assert_eq!(seen.outcome, outcome);
    }
}

#[test]
fn every_handshake_is_full_and_names_the_host() {
    let authority = Authority::new("test authority");
    let mut config = authority.server(&["site.test", "127.0.0.1"], |_| {});
    config.session_storage = rustls::server::ServerSessionMemoryCache::new(64);
    let config = Arc::new(config);
    let shaken = Arc::new(Mutex::new(Vec::new()));
    let site = Site::start({
        let shaken = Arc::clone(&shaken);
        move |stream, _| {
            let mut tls = rustls::StreamOwned::new(
                rustls::ServerConnection::new(Arc::clone(&config)).unwrap(),
                stream,
            );
            site::read_head(&mut tls);
            let name = tls.conn.server_name().map(str::to_owned);
            shaken.lock().unwrap().push((tls.conn.handshake_kind(), name));
            tls.write_all(&site::ok("hello")).unwrap();
            site::hold(&mut tls);
        }
    });
    let mut checker = trusting(&authority);
    let named = with_regex(&site.https("site.test"), "hello");
    let by_ip = with_regex(&site.https("127.0.0.1"), "hello");
    for target in [&named, &named, &named, &by_ip] {
        let seen = checker.check(target, now() + LONG);
        assert_eq!(seen.outcome, Outcome::Ok, "{seen:?}");
    }
    let full = Some(rustls::HandshakeKind::Full);
    let name = Some("site.test".to_owned());
    assert_eq!(
        *shaken.lock().unwrap(),
        [
            (full, name.clone()),
            (full, name.clone()),
            (full, name),
            (full, None)
        ]
    );
}

#[test]
fn a_ca_file_that_cannot_be_used_is_an_error_naming_it() {
    let empty = tempfile::NamedTempFile::new().unwrap();
    let mut broken = tempfile::NamedTempFile::new().unwrap();
    broken
        .write_all(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        .unwrap();
    for path in [empty.path(), broken.path(), std::path::Path::new("/no/such/file")] {
        let config = CheckConfig {
            ca_file: Some(path.to_owned()),
            ..config()
        };
        let error = Checks::new(&config)
            .err()
            .map(|error| format!("{error:#}"))
            .unwrap_or_default();
        assert!(
            error.contains("CHECK_CA_FILE") && error.contains(path.to_str().unwrap()),
            "{error}"
        );
    }
}

#[test]
fn a_user_agent_that_would_smuggle_a_header_is_refused() {
    let config = CheckConfig {
        user_agent: "host-metrics\r\nX-Evil: yes".into(),
        ..config()
    };
    assert!(Checks::new(&config).is_err());
}

#[test]
fn the_same_name_asked_at_the_same_time_is_looked_up_once_and_anew_later() {
    let asked = Arc::new(AtomicUsize::new(0));
    let (release, released) = mpsc::channel::<()>();
    let released = Mutex::new(released);
    let names = Names::new(
        Box::new({
            let asked = Arc::clone(&asked);
            move |_, _| {
                asked.fetch_add(1, Ordering::SeqCst);
                released.lock().unwrap().recv_timeout(LONG).unwrap();
                Ok(vec![Ipv4Addr::LOCALHOST.into()])
            }
        }),
        4,
    );
    let together = 8;
    let ready = Barrier::new(together + 1);
    std::thread::scope(|scope| {
        let waiting: Vec<_> = (0..together)
            .map(|_| {
                scope.spawn(|| {
                    ready.wait();
                    names.resolve("site.test", None, now() + LONG)
                })
            })
            .collect();
        ready.wait();
        // All of them wait by now or soon; should one come late, it asks anew and gets the second release.
        site::slowly(Duration::from_millis(100));
        release.send(()).unwrap();
        release.send(()).unwrap();
        for answer in waiting {
            assert_eq!(answer.join().unwrap(), Ok(vec![Ipv4Addr::LOCALHOST.into()]));
        }
    });
    let shared = asked.load(Ordering::SeqCst);
    assert!(shared <= 2, "{together} checks at once asked {shared} times");
    release.send(()).unwrap();
    names.resolve("site.test", None, now() + LONG).unwrap();
    assert!(asked.load(Ordering::SeqCst) > shared.min(1), "an answer was kept");
}

#[test]
fn lookups_that_hang_hold_up_their_own_names_only_and_give_up_their_places() {
    let names = Names::new(
        Box::new(|name, _| {
            while name.starts_with("silent") {
                std::thread::park();
            }
            Ok(vec![Ipv4Addr::LOCALHOST.into()])
        }),
        4,
    );
    for number in 0..3 {
        let silent = format!("silent-{number}.test");
        assert_eq!(
            names.resolve(&silent, None, now() + SHORT / 8),
            Err(NameError::TimedOut)
        );
    }
    // One thread is left, and serves everybody else.
    for number in 0..50 {
        let answer = names.resolve(&format!("site-{number}.test"), None, now() + LONG);
        assert_eq!(answer, Ok(vec![Ipv4Addr::LOCALHOST.into()]));
    }
    // Asking for a hanging name again joins its lookup instead of taking that thread.
    assert_eq!(
        names.resolve("silent-0.test", None, now() + SHORT / 8),
        Err(NameError::TimedOut)
    );
    assert!(names.resolve("site.test", None, now() + LONG).is_ok());
    // With all threads hanging, a name waits no longer than its check.
    assert_eq!(
        names.resolve("silent-4.test", None, now() + SHORT / 8),
        Err(NameError::TimedOut)
    );
    assert_eq!(
        names.resolve("site.test", None, now() + SHORT / 8),
        Err(NameError::TimedOut)
    );
}

#[test]
fn without_file_handles_the_fault_is_ours_and_not_the_hosts() {
    const SELF: &str = "check::without_file_handles_the_fault_is_ours_and_not_the_hosts";
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
#[cfg(target_os = "linux")]
fn without_a_thread_for_the_lookup_the_fault_is_ours_and_the_next_one_is_not_harmed() {
    const SELF: &str =
        "check::without_a_thread_for_the_lookup_the_fault_is_ours_and_the_next_one_is_not_harmed";
    if !child::is_it(SELF) {
        return child::run(SELF, &mut child::limitable());
    }
    let mut checker = checker();
    let site = Site::answering(site::ok("hello"));
    let target = target(&format!("http://localhost:{}/", site.address.port()));
    let no_threads = child::NoThreads::begin();
    let seen = checker.check(&target, now() + LONG);
    assert_eq!(seen.outcome, Outcome::AgentError, "{seen:?}");
    assert_consistent(&seen);
    assert!(
        seen.error
            .as_ref()
            .is_some_and(|text| text.contains("no thread for the name lookup")),
        "{seen:?}"
    );
    drop(no_threads);
    assert_eq!(checker.check(&target, now() + LONG).outcome, Outcome::Ok);
}

#[test]
fn a_proxy_in_the_environment_is_not_used() {
    const SELF: &str = "check::a_proxy_in_the_environment_is_not_used";
    let closed = Closed::new();
    if !child::is_it(SELF) {
        let proxy = format!("http://{}", closed.address);
        let variables = [
            "http_proxy",
            "HTTP_PROXY",
            "all_proxy",
            "ALL_PROXY",
            "https_proxy",
            "HTTPS_PROXY",
        ];
        let environment = variables.map(|name| (name, proxy.as_str()));
        return child::run(SELF, child::shell("").envs(environment));
    }
    let site = Site::answering(site::ok("hello"));
    assert_eq!(
        check(&target(&format!("http://site.test:{}/", site.address.port()))).outcome,
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
fn a_connection_that_the_server_has_closed_is_closed_in_order_and_any_other_is_reset() {
    let authority = Authority::new("test authority");
    let server = Arc::new(authority.server(&["site.test"], |_| {}));
    // What the server reads once it has sent this and, or not, closed its side.
    let ending = |is_tls: bool, answer: Vec<u8>, closes: bool, regex: &str| {
        let (tell, told) = mpsc::channel();
        let server = Arc::clone(&server);
        let site = Site::start(move |stream, _| {
            let socket = stream.try_clone().unwrap();
            let socket = SockRef::from(&socket);
            let mut wire: Box<dyn Wire> = match is_tls {
                false => Box::new(stream),
                true => {
                    let tls = rustls::ServerConnection::new(Arc::clone(&server)).unwrap();
                    Box::new(rustls::StreamOwned::new(tls, stream))
                }
            };
            site::read_head(&mut *wire);
            // The answer and the end leave together, so that the client cannot see one without the other.
            socket.set_tcp_cork(closes).unwrap();
            let mut sent = wire.write_all(&answer).and_then(|()| wire.flush());
            if closes {
                sent = sent.and_then(|()| socket.shutdown(Shutdown::Write));
            }
            let end = sent.and_then(|()| wire.read(&mut [0; 16]));
            let _ = tell.send(end.map_err(|error| error.kind()));
        });
        let url = if is_tls {
            site.https("site.test")
        } else {
            site.url("/")
        };
        let target = match regex {
            "" => target(&url),
            _ => with_regex(&url, regex),
        };
        let seen = trusting(&authority).check(&target, now() + LONG);
        assert_eq!(seen.outcome, Outcome::Ok, "{seen:?}");
        told.recv_timeout(LONG).unwrap()
    };
    let reset = Err(std::io::ErrorKind::ConnectionReset);
    let page = site::ok("hello".repeat(1_000));
    for is_tls in [false, true] {
        assert_eq!(ending(is_tls, page.clone(), true, ""), Ok(0), "TLS: {is_tls}");
        assert_eq!(
            ending(is_tls, page.clone(), true, "hello"),
            Ok(0),
            "TLS: {is_tls}"
        );
        // The checker ends it, and keeps no port waiting for late packets.
        assert_eq!(ending(is_tls, page.clone(), false, ""), reset, "TLS: {is_tls}");
        assert_eq!(
            ending(is_tls, page.clone(), false, "hello"),
            reset,
            "TLS: {is_tls}"
        );
    }
    let large_page = site::ok(vec![b'x'; 60_000]);
    // Not wanted, and not read: whichever step of the server is the first to notice.
    assert!(ending(false, large_page, true, "").is_err());
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
