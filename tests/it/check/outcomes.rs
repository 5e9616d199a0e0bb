//! Each outcome, provoked by a site, a name server or a network that fails in that way.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use host_metrics::check::outcome::Outcome;
use host_metrics::check::target::Target;
use rustls::server::WebPkiClientVerifier;

use super::{LONG, SHORT, assert_consistent, gzip, headers_of, now, target, trusting, with_regex};
use crate::site::{self, Authority, Closed, Deaf, Site};

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
