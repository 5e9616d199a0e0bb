//! Each outcome, caused by a site, a name server or a network that fails in that way. Each case is a test.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use host_metrics::check::json::JsonRule;
use host_metrics::check::target::{Proxy, Target};
use host_metrics::sample::Outcome;
use rustls::ServerConfig;
use rustls::server::WebPkiClientVerifier;

use super::{
    LONG, SHORT, assert_consistent, checker_with_names, gzip, headers_of, now, target, trusting, with_regex,
};
use crate::site::{self, Authority, Closed, Deaf, Site, Wire};

/// The surroundings of one check.
struct Scene {
    target: Target,
    /// How long the check may take: `LONG`, or `SHORT` if the outcome is a timeout.
    within: Duration,
    authority: Option<Authority>,
    /// Kept alive during the check.
    _peer: Box<dyn std::any::Any>,
}

impl Scene {
    fn new(target: Target, peer: impl std::any::Any) -> Self {
        Self {
            target,
            within: LONG,
            authority: None,
            _peer: Box::new(peer),
        }
    }

    fn with_regex(mut self, regex: &str) -> Self {
        self.target.regex = with_regex("http://site.test/", regex).regex;
        self
    }

    fn without_regex(self, regex: &str) -> Self {
        let mut scene = self.with_regex(regex);
        scene.target.regex_absent = true;
        scene
    }

    fn with_json(mut self, rule: &str) -> Self {
        self.target.json.extend(JsonRule::parse(rule));
        self
    }

    fn with_cert_days(mut self, days: u32) -> Self {
        self.target.cert_days = Some(days);
        self
    }

    /// The check is expected to reach its deadline.
    fn at_the_deadline(mut self) -> Self {
        self.within = SHORT;
        self
    }

    /// Checks once. `error` is a part of the expected error text.
    fn gives(self, outcome: Outcome, error: &str) {
        let mut checker = match &self.authority {
            Some(authority) => trusting(authority),
            None => checker_with_names(),
        };
        let began_at = now();
        let seen = checker.check(&self.target, began_at + self.within);
        let took = now() - began_at;
        assert_eq!(seen.outcome, outcome, "{seen:?}");
        assert_consistent(&seen);
        let text = seen.error.unwrap_or_default();
        assert!(text.contains(error), "{text:?} does not contain {error:?}");
        assert!(
            !text.contains(self.target.address.as_str()),
            "the reader knows the address already: {text}"
        );
        if self.within == SHORT {
            assert!(took >= SHORT, "ended before its deadline");
            assert!(took < LONG / 4, "ended long after its deadline");
        }
    }
}

/// Makes a test of each case: `name: Outcome, "a part of its error" => the surroundings`.
macro_rules! cases {
    ($($(#[$attribute:meta])* $name:ident: $outcome:ident, $error:literal => $scene:expr;)*) => {
        $(
            #[test]
            $(#[$attribute])*
            fn $name() {
                $scene.gives(Outcome::$outcome, $error);
            }
        )*

        const PROVOKED: &[Outcome] = &[$(Outcome::$outcome),*];
    };
}

#[test]
fn every_outcome_of_a_check_has_a_case() {
    let missing: Vec<_> = Outcome::ALL
        .into_iter()
        // These are no outcomes of a single check: `tests/it/own_network.rs` has the one, `schedule` the other.
        .filter(|outcome| !matches!(outcome, Outcome::AgentOffline | Outcome::Missed))
        .filter(|outcome| !PROVOKED.contains(outcome))
        .collect();
    assert!(missing.is_empty(), "never provoked: {missing:?}");
}

cases! {
    // Complete responses.
    a_good_page: Ok, "" => answer(site::ok("hello"));
    a_good_page_with_its_text: Ok, "" =>
        answer(site::ok("say hello\nworld")).with_regex("hello.?world|hello\nw");
    status_404: BadStatus, "status 404" => answer(site::response("404 Not Found", "", "hello"));
    status_500_with_the_text: BadStatus, "status 500" =>
        answer(site::response("500 Oops", "", "hello")).with_regex("hello");
    another_text: RegexMismatch, "does not match the body" => answer(site::ok("good bye")).with_regex("hello");
    an_empty_page: RegexMismatch, "does not match the body" => answer(site::ok("")).with_regex("hello");
    status_204: RegexMismatch, "no body" => answer(b"HTTP/1.1 204 No Content\r\n\r\n").with_regex("hello");
    status_304: RegexMismatch, "no body" => answer(b"HTTP/1.1 304 Not Modified\r\n\r\n").with_regex("hello");
    a_long_page: BodyTooLarge, "first 65536 bytes" =>
        answer(site::ok(vec![b'x'; 65 * 1024])).with_regex("hello");

    a_page_that_is_no_json: JsonMismatch, "not valid JSON" => answer(site::ok("<html>")).with_json("/status:ok");
    another_value: JsonMismatch, "/status is \"down\"; expected ok" =>
        answer(site::ok(r#"{"status":"down"}"#)).with_json("/status:ok");
    a_value_that_is_not_there: JsonMismatch, "there is no /data/status in the body; expected ok" =>
        answer(site::ok("{}")).with_json("/data/status:ok");
    a_json_document_of_50_mb: BodyTooLarge, "more than 65536 bytes" => {
        let huge = format!("[{}1]", "1,".repeat(25_000_000));
        answer(site::ok(huge)).with_json("/0:1")
    };
    a_json_document_nested_10_000_deep: JsonMismatch, "is an array" =>
        answer(site::ok(format!("{}{}", "[".repeat(10_000), "]".repeat(10_000)))).with_json("/0:1");
    the_text_that_must_not_be_there: RegexMismatch, "the regex matches the body" =>
        answer(site::ok("an error")).without_regex("error");
    a_page_too_long_to_be_searched_for_what_must_not_be_there: BodyTooLarge, "first 65536 bytes" =>
        answer(site::ok(vec![b'x'; 65 * 1024])).without_regex("error");
    status_204_cannot_hold_what_must_not_be_there: Ok, "" =>
        answer(b"HTTP/1.1 204 No Content\r\n\r\n").without_regex("error");

    // Responses that end too early.
    an_empty_answer: ConnectionClosed, "without a complete response" => answer(b"");
    a_cut_header: ConnectionClosed, "without a complete" => answer(b"HTTP/1.1 200 OK\r\nContent-Le");
    a_cut_body_with_the_text_in_it: ConnectionClosed, "before the end of the body" =>
        answer(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello").with_regex("hello");
    a_cut_chunk_with_the_text_in_it: ConnectionClosed, "before the end of the body" =>
        answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nhello").with_regex("hello");
    chunks_without_their_end: ConnectionClosed, "before the end of the body" =>
        answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n").with_regex("hello");
    a_cut_chunk_size: ConnectionClosed, "before the end of the body" =>
        answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n1").with_regex("hello");
    gzip_cut_by_the_end_of_the_connection: ConnectionClosed, "before the end of the body" =>
        answer([b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n", &half_gzip()[..]].concat())
            .with_regex("hello");

    // Responses that are not HTTP, or that we cannot read.
    broken_chunks: ProtocolError, "chunk" =>
        answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\nfoo")
            .with_regex("hello");
    a_chunk_size_without_end: ProtocolError, "chunk" =>
        answer([&b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"[..], &[b'1'; 200_000]].concat())
            .with_regex("hello");
    not_http: ProtocolError, "not a valid response" => answer(b"SSH-2.0-OpenSSH_9.2\r\n");
    http_2_frames_settings_and_good_bye: ProtocolError, "it does not begin with HTTP" =>
        answer(b"\0\0\x06\x04\0\0\0\0\0\0\x03\0\0\0\x64\0\0\x08\x07\0\0\0\0\0\0\0\0\0\0\0\0\x01");
    a_header_line_without_a_colon: ProtocolError, "a header line without a colon" =>
        answer(site::response("200 OK", "Some words\r\n", "hello"));
    a_nul_in_a_header: ProtocolError, "a NUL byte in its headers" =>
        answer(site::response("200 OK", "X: a\0b\r\n", "hello"));
    a_status_below_100: ProtocolError, "not a valid response" => answer(b"HTTP/1.1 099 Hm\r\n\r\n");
    headers_of_70_kb: ProtocolError, "larger than 64 KiB" => answer(headers_of(70_000, 1_000));
    an_unknown_coding: ProtocolError, "unsupported content-encoding zstd" =>
        answer(site::response("200 OK", "Content-Encoding: zstd\r\n", "hello")).with_regex("hello");
    a_body_that_is_not_the_gzip_it_should_be: ProtocolError, "cannot be decoded" =>
        answer(site::response("200 OK", "Content-Encoding: gzip\r\n", "hello, hello, hello"))
            .with_regex("hello");
    bytes_behind_the_end_of_a_gzip_stream: ProtocolError, "cannot be decoded: invalid gzip header" =>
        answer(site::response(
            "200 OK",
            "Content-Encoding: gzip\r\n",
            [gzip(b"hello"), vec![b'x'; 10]].concat(),
        ))
        .with_regex("hello");
    a_brotli_window_of_1_gib: ProtocolError, "cannot be decoded: it is not valid brotli" =>
        answer(site::response(
            "200 OK",
            "Content-Encoding: br\r\n",
            [&b"\x11\x1e"[..], &[0; 800]].concat(),
        ))
        .with_regex("hello");
    gzip_cut_in_a_whole_body: ProtocolError, "cannot be decoded" =>
        answer(site::response("200 OK", "Content-Encoding: gzip\r\n", half_gzip())).with_regex("hello");

    // Redirects that cannot be followed.
    a_location_with_a_control_character: ProtocolError, "a control character in its Location" =>
        answer(site::redirect(302, "/a\x01b"));
    a_redirect_to_a_name_that_no_certificate_can_be_for: ProtocolError,
        "redirect (status 302) to https://foo-.test/: a certificate cannot contain this name" =>
        answer(site::redirect(302, "https://foo-.test/"));
    a_redirect_to_nowhere: ProtocolError, "without a Location" => answer(b"HTTP/1.1 302 Found\r\n\r\n");
    a_redirect_to_another_scheme: ProtocolError, "scheme ftp" =>
        answer(site::redirect(301, "ftp://files.test/"));
    a_redirect_to_a_bad_url: ProtocolError, "invalid URL" => answer(site::redirect(301, "http://[::1/"));
    a_redirect_loop: TooManyRedirects, "more than 10 redirects" => answer(site::redirect(302, "/"));
    status_303_in_a_loop: TooManyRedirects, "more than 10 redirects" => answer(site::redirect(303, "?"));

    // Servers that stop in the middle.
    silence_after_accept: ResponseTimeout, "did not send a complete response in time" => hung(silent());
    headers_that_trickle: ResponseTimeout, "did not send a complete response in time" => hung(Site::plain(|stream| {
        let start = b"HTTP/1.1 200 OK\r\nX-Slow: ".iter().copied();
        site::trickle(stream, start.chain(std::iter::repeat(b'x')));
    }));
    only_an_interim_answer: ResponseTimeout, "did not send a complete response in time" => hung(Site::plain(|stream| {
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").unwrap();
        site::hold(stream);
    }));
    a_body_that_stalls_with_the_text_in_it: BodyTimeout, "did not send the whole body in time" => hung(Site::plain(|stream| {
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
            .unwrap();
        site::hold(stream);
    }));
    a_body_that_trickles: BodyTimeout, "did not send the whole body in time" => hung(Site::plain(|stream| {
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\nhello").unwrap();
        site::trickle(stream, std::iter::repeat(b'x'));
    }));
    silence_in_the_handshake: TlsTimeout, "handshake" => tls(|_| silent()).at_the_deadline();
    a_handshake_that_trickles: TlsTimeout, "handshake" => tls(|_| Site::start(|mut stream, _| {
        let record = b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc".iter().copied();
        site::trickle(&mut stream, record.chain(std::iter::repeat(0)));
    }))
    .at_the_deadline();
    a_full_backlog: ConnectTimeout, "did not accept" => {
        let deaf = Deaf::at((Ipv4Addr::LOCALHOST, 0).into());
        Scene::new(target(&format!("http://{}/", deaf.address)), deaf).at_the_deadline()
    };
    a_name_server_that_is_silent: DnsTimeout, "the name servers did not answer" =>
        Scene::new(target("http://silent.test/"), ()).at_the_deadline();

    // Connections that break.
    a_reset_at_once: ConnectionClosed, "" => broken(Site::start(|stream, _| site::reset(&stream)));
    a_reset_after_the_request: ConnectionClosed, "reset" =>
        broken(Site::plain(|stream| site::reset(stream)));
    a_reset_in_the_headers: ConnectionClosed, "reset the connection" =>
        broken(reset_after(b"HTTP/1.1 200 OK\r\n"));
    a_reset_in_a_body_without_length: ConnectionClosed, "before the end of the body" =>
        broken(reset_after(b"HTTP/1.1 200 OK\r\n\r\nhello"));
    a_reset_in_the_handshake: TlsError, "handshake" => tls(|_| Site::start(|mut stream, _| {
        let mut hello = [0; 16];
        stream.read_exact(&mut hello).unwrap();
        site::reset(&stream);
    }));
    an_end_in_the_handshake: TlsError, "closed" =>
        tls(|_| Site::start(|mut stream, _| drop(stream.read(&mut [0; 9999]))));
    plain_http_on_a_tls_port: TlsError, "did not answer with TLS" => tls(|_| Site::start(|mut stream, _| {
        let _ = stream.read(&mut [0; 9999]);
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
    }));
    an_alert_of_a_server_that_wants_tls_1_0_only: TlsError, "ProtocolVersion" =>
        tls(|_| Site::start(|mut stream, _| {
            let _ = stream.read(&mut [0; 9999]);
            stream.write_all(b"\x15\x03\x01\x00\x02\x02\x46").unwrap();
        }));
    tls_1_0_spoken: TlsError, "TLS" => tls(|_| Site::start(|mut stream, _| tls_1_0_hello(&mut stream)));
    a_client_certificate_demanded_with_tls_1_2: TlsError, "alert" =>
        tls(|authority| demanding(authority, &rustls::version::TLS12));
    a_client_certificate_demanded_with_tls_1_3: TlsError, "alert" =>
        tls(|authority| demanding(authority, &rustls::version::TLS13));

    // Without a length and without TLS's close_notify, the end of a body is accepted only with HTTP/1.0.
    http_1_1_over_tls_without_length_and_without_a_clean_end: ConnectionClosed, "before the end of the body" =>
        without_clean_end(b"HTTP/1.1 200 OK\r\n\r\nhello");
    http_1_0_over_tls_without_length_and_without_a_clean_end: Ok, "" =>
        without_clean_end(b"HTTP/1.0 200 OK\r\n\r\nhello");
    http_1_0_over_tls_with_gzip_without_a_clean_end: Ok, "" => without_clean_end(
        &[&b"HTTP/1.0 200 OK\r\nContent-Encoding: gzip\r\n\r\n"[..], &gzip(b"hello")].concat(),
    );
    http_1_0_over_tls_with_half_of_a_gzip: ConnectionClosed, "before the end of the body" => without_clean_end(
        &[&b"HTTP/1.0 200 OK\r\nContent-Encoding: gzip\r\n\r\n"[..], &half_gzip()].concat(),
    );
    http_1_0_over_tls_shorter_than_its_length: ConnectionClosed, "before the end of the body" =>
        without_clean_end(b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\nhello");
    http_1_0_over_tls_with_a_cut_head: ConnectionClosed, "without a complete response" =>
        without_clean_end(b"HTTP/1.0 200 OK\r\n");

    // Certificates.
    a_good_certificate: Ok, "" => certificate(|authority| authority.server(&["site.test"], |_| {}));
    an_intermediate: Ok, "" => certificate(|authority| {
        let (below, leaf, key) = authority.intermediate(&["site.test"]);
        site::server_config(vec![leaf, below], key)
    });
    an_intermediate_that_is_not_sent: TlsCertUntrusted, "does not send the intermediate certificates" =>
        certificate(|authority| {
            let (_, leaf, key) = authority.intermediate(&["site.test"]);
            site::server_config(vec![leaf], key)
        });
    an_expired_certificate: TlsCertExpired, "has expired" => certificate(|authority| {
        authority.server(&["site.test"], |params| {
            params.not_after = rcgen::date_time_ymd(2021, 1, 1);
        })
    });
    a_certificate_not_valid_yet: TlsCertExpired, "not valid yet" => certificate(|authority| {
        authority.server(&["site.test"], |params| {
            params.not_before = rcgen::date_time_ymd(2080, 1, 1);
        })
    });
    the_certificate_of_other_hosts: TlsCertName, "not for site.test, but for a.test, b.test" =>
        certificate(|authority| authority.server(&["a.test", "b.test"], |_| {}));
    a_certificate_without_names: TlsCertName, "no subject alternative names" =>
        certificate(|authority| authority.server(&[], |_| {}));
    an_unknown_issuer: TlsCertUntrusted, "not trusted" =>
        certificate(|_| Authority::new("stranger").server(&["site.test"], |_| {}));
    a_self_signed_certificate: TlsCertUntrusted, "self-signed" =>
        certificate(|_| site::self_signed(&["site.test"], |_| {}));
    a_ca_certificate_as_that_of_the_server: Ok, "" => certificate(|authority| {
        authority.server(&["site.test"], |params| {
            params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        })
    });

    a_certificate_that_expires_soon: TlsCertExpiring, "; cert-days=36500" => certificate(|authority| {
        authority.server(&["site.test"], |params| {
            params.not_after = rcgen::date_time_ymd(2027, 6, 1);
        })
    })
    .with_cert_days(36_500);
    a_certificate_that_expires_later: Ok, "" =>
        certificate(|authority| authority.server(&["site.test"], |_| {})).with_cert_days(30);
    an_expired_certificate_that_is_not_verified: TlsCertExpiring, "a certificate expires already, at 2021-01-01" => {
        let mut scene = certificate(|authority| {
            authority.server(&["site.test"], |params| {
                params.not_after = rcgen::date_time_ymd(2021, 1, 1);
            })
        })
        .with_cert_days(1);
        scene.target.tls_insecure = true;
        scene
    };

    // Proxies.
    a_proxy_that_refuses: ProxyError, "the proxy failed: connection refused by 127.0.0.1:" => {
        let closed = Closed::new();
        through(closed.address, "http://site.test/", closed)
    };
    a_proxy_that_does_not_exist: ProxyError, "the proxy failed: there is no address for nowhere.test" => {
        let mut scene = unreached("http://site.test/");
        scene.target.proxy = Some(Proxy { host: "nowhere.test".into(), port: 80 });
        scene
    };
    a_proxy_that_hangs: ProxyError, "did not send a complete response in time" => proxied("http", silent()).at_the_deadline();
    a_proxy_that_hangs_before_it_connects: ProxyError, "did not send a complete response in time" =>
        proxied("https", silent()).at_the_deadline();
    a_proxy_that_wants_a_password: ProxyError, "status 407" =>
        proxied("http", Site::answering(site::response("407 Proxy Authentication Required", "", "")));
    a_proxy_that_wants_a_password_before_it_connects: ProxyError, "CONNECT with status 407" =>
        proxied("https", Site::answering(site::response("407 Proxy Authentication Required", "", "")));
    a_proxy_that_cannot_connect: ProxyError, "CONNECT with status 502" =>
        proxied("https", Site::answering(site::response("502 Bad Gateway", "", "")));
    a_proxy_that_closes: ProxyError, "closed the connection" => proxied("http", Site::answering(b""));
    a_proxy_that_closes_before_it_connects: ProxyError, "closed the connection" =>
        proxied("https", Site::answering(b"HTTP/1.1 20"));
    a_proxy_that_is_none: ProxyError, "does not begin with HTTP" =>
        proxied("https", Site::answering(b"SSH-2.0-OpenSSH_9.2\r\n"));
    a_host_behind_a_proxy_that_closes: TlsError, "the TLS handshake" =>
        proxied("https", Site::answering(b"HTTP/1.1 200 OK\r\n\r\n"));
    a_page_that_a_proxy_cuts: ConnectionClosed, "before the end of the body" =>
        proxied("http", Site::answering(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")).with_regex("hello");

    // Hosts that cannot be reached.
    no_such_name: DnsNotFound, "no address for nowhere.test" => unreached("http://nowhere.test/");
    name_servers_that_fail: DnsError, "name servers failed" => unreached("http://broken.test/");
    no_memory_for_the_lookup: AgentError, "no memory" => unreached("http://powerless.test/");
    // The routing table has loopback's broadcast address, to which TCP cannot connect.
    no_route: ConnectUnreachable, "127.255.255.255:80 is unreachable" =>
        unreached("http://127.255.255.255/");
    // A link-local address needs an interface.
    no_such_connection: ConnectError, "cannot connect to [fe80::1]:80" => unreached("http://[fe80::1]/");
    no_listener: ConnectRefused, "connection refused by 127.0.0.1:" => {
        let closed = Closed::new();
        Scene::new(target(&format!("http://{}/", closed.address)), closed)
    };
}

/// A site that answers every request with `response` and closes the connection.
fn answer(response: impl Into<Vec<u8>>) -> Scene {
    let site = Site::answering(response);
    Scene::new(target(&site.url("/")), site)
}

/// A host that is asked for through a proxy, which is all there is.
fn through(proxy: std::net::SocketAddr, url: &str, peer: impl std::any::Any) -> Scene {
    let mut scene = Scene::new(target(url), peer);
    scene.target.proxy = Some(Proxy {
        host: proxy.ip().to_string(),
        port: proxy.port(),
    });
    scene
}

fn proxied(scheme: &str, proxy: Site) -> Scene {
    through(proxy.address, &format!("{scheme}://site.test/"), proxy)
}

fn broken(site: Site) -> Scene {
    Scene::new(with_regex(&site.url("/"), "hello"), site)
}

fn hung(site: Site) -> Scene {
    broken(site).at_the_deadline()
}

fn unreached(url: &str) -> Scene {
    Scene::new(target(url), ())
}

/// An https address, with an authority that the checker trusts.
fn tls(site: impl FnOnce(&Authority) -> Site) -> Scene {
    let authority = Authority::new("test authority");
    let site = site(&authority);
    let target = with_regex(&site.https("site.test"), "hello");
    Scene {
        authority: Some(authority),
        ..Scene::new(target, site)
    }
}

/// A good page with this certificate.
fn certificate(config: impl FnOnce(&Authority) -> ServerConfig) -> Scene {
    tls(|authority| {
        Site::tls(config(authority), |stream| {
            stream.write_all(&site::ok("hello")).unwrap();
        })
    })
}

/// Sends `response` over TLS and closes the connection without TLS's `close_notify`.
fn without_clean_end(response: &[u8]) -> Scene {
    let response = response.to_vec();
    tls(|authority| {
        let config = Arc::new(authority.server(&["site.test"], |_| {}));
        Site::start(move |mut stream, _| {
            let mut server = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut tls = rustls::Stream::new(&mut server, &mut stream);
            site::read_head(&mut tls);
            tls.write_all(&response).unwrap();
        })
    })
}

/// A server that demands a client certificate.
fn demanding(authority: &Authority, version: &'static rustls::SupportedProtocolVersion) -> Site {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(authority.certificate()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), Arc::clone(&provider))
        .build()
        .unwrap();
    let (leaf, key) = authority.leaf(&["site.test"], |_| {});
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![leaf], key)
        .unwrap();
    Site::tls(config, |_: &mut dyn Wire| {})
}

fn silent() -> Site {
    Site::start(|mut stream, _| site::hold(&mut stream))
}

fn reset_after(head: &'static [u8]) -> Site {
    Site::plain(move |stream| {
        stream.write_all(head).unwrap();
        // The client must have read the response, because a reset could overtake it.
        site::slowly(Duration::from_millis(50));
        site::reset(stream);
    })
}

fn half_gzip() -> Vec<u8> {
    gzip(b"hello hello hello")[..15].to_vec()
}

/// The part of a ServerHello that selects TLS 1.0.
fn tls_1_0_hello(stream: &mut TcpStream) {
    let _ = stream.read(&mut [0; 9999]);
    let mut hello = b"\x16\x03\x01\x00\x2a\x02\x00\x00\x26\x03\x01".to_vec();
    hello.extend([7; 32]);
    hello.extend(b"\x00\xc0\x13\x00");
    stream.write_all(&hello).unwrap();
    site::hold(stream);
}
