//! What a check sends.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use host_metrics::check::http::Checks;
use host_metrics::check::target::{Header, HeaderValue, Method, RequestBody, Target};
use host_metrics::config::CheckConfig;
use host_metrics::sample::Outcome;

use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::{LONG, check, config, now, target, trusting, with_regex};
use crate::site::{self, Authority, Site, Wire};

#[test]
fn one_check_sends_one_request_with_the_expected_headers_only() {
    let site = Site::answering(site::ok("hello"));
    assert_eq!(check(&target(&site.url("/a/b?c=d%20e"))).outcome, Outcome::Ok);
    let with_body = with_regex(&format!("http://site.test:{}/", site.address.port()), "hello");
    assert_eq!(check(&with_body).outcome, Outcome::Ok);
    let head = Target {
        method: Method::Head,
        ..target(&site.url("/"))
    };
    assert_eq!(check(&head).outcome, Outcome::Ok);

    // Header names as other clients write them, because some servers do not recognise `host:`.
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
fn a_url_of_the_greatest_length_is_requested_whole() {
    let site = Site::answering(site::ok("hello"));
    // 2,000 characters of three bytes each, percent-encoded.
    let target = target(&site.url(&format!("/{}", "\u{20ac}".repeat(660))));
    assert_eq!(check(&target).outcome, Outcome::Ok);
    let requests = site.requests();
    assert!(requests[0].starts_with("GET /%E2%82%AC%E2%82%AC"), "{requests:?}");
    assert!(requests[0].len() > 660 * 9, "{}", requests[0].len());
}

#[test]
fn a_user_agent_with_a_line_break_is_refused() {
    let config = CheckConfig {
        user_agent: "host-metrics\r\nX-Evil: yes".into(),
        ..config()
    };
    assert!(Checks::new(&config).is_err());
}

#[test]
fn method_headers_and_body_are_sent_as_the_line_says() {
    let header = |name: &str, value: &str| Header {
        name: name.to_owned(),
        value: HeaderValue::Plain(value.to_owned()),
    };
    let site = Site::answering(site::ok("hello"));
    for method in Method::ALL {
        let sends_body = !matches!(method, Method::Get | Method::Head);
        let asked = Target {
            method,
            headers: vec![
                header("User-agent", "other"),
                header("host", "b.test"),
                header("X", "y"),
            ],
            body: sends_body.then(|| RequestBody {
                file: None,
                bytes: b"{\"a\":\"b\"}"[..].into(),
            }),
            ..target(&site.url("/a#b"))
        };
        assert_eq!(check(&asked).outcome, Outcome::Ok, "{method:?}");
        let end = if sends_body {
            "Content-Length: 9\r\n\r\n{\"a\":\"b\"}"
        } else {
            "\r\n"
        };
        assert_eq!(
            *site.requests().last().unwrap(),
            format!(
                "{} /a HTTP/1.1\r\nAccept: */*\r\nAccept-Encoding: identity\r\nConnection: close\r\nUser-agent: other\r\n\
                 host: b.test\r\nX: y\r\n{end}",
                method.as_str()
            )
        );
    }
    assert_eq!(site.requests().len(), Method::ALL.len());
}

#[test]
fn a_body_of_1_mib_arrives_whole() {
    let body: Vec<u8> = (0..1 << 20).map(|at| b'a' + (at % 23) as u8).collect();
    let site = Site::answering(site::ok(""));
    let posting = Target {
        method: Method::Post,
        body: Some(RequestBody {
            file: None,
            bytes: body.as_slice().into(),
        }),
        ..target(&site.url("/"))
    };
    assert_eq!(check(&posting).outcome, Outcome::Ok);
    assert!(site.requests()[0].as_bytes().ends_with(&body));
}

/// A site that takes little of a request before it has read it: its window and the client's segments are small.
fn narrow(respond: impl Fn(&mut dyn Wire) + Send + Sync + 'static, tls: Option<ServerConfig>) -> Site {
    let listener = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    listener.set_recv_buffer_size(4_096).unwrap();
    listener.set_tcp_mss(600).unwrap();
    listener
        .bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())
        .unwrap();
    listener.listen(9).unwrap();
    let tls = tls.map(Arc::new);
    let open = Mutex::new(Vec::new());
    Site::start_on(listener.into(), move |stream, _| {
        let mut wire: Box<dyn Wire + Send> = match &tls {
            None => Box::new(stream),
            Some(tls) => Box::new(StreamOwned::new(
                ServerConnection::new(Arc::clone(tls)).unwrap(),
                stream,
            )),
        };
        site::read_head(&mut wire);
        respond(&mut wire);
        open.lock().unwrap().push(wire);
    })
}

#[test]
fn an_answer_that_comes_before_the_request_was_read_is_the_answer() {
    const BODY: usize = 1 << 20;
    let authority = Authority::new("early");
    let tls = || authority.server(&["site.test"], |_| {});
    let large = |url: &str| Target {
        method: Method::Post,
        body: Some(RequestBody {
            file: None,
            bytes: vec![b'x'; BODY].into(),
        }),
        ..target(url)
    };
    let refuses = |wire: &mut dyn Wire| {
        wire.write_all(&site::response("413 Too Large", "", "")).unwrap();
    };
    let interim = b"HTTP/1.1 100 Continue\r\n\r\n";
    let reads = |wire: &mut dyn Wire| {
        wire.write_all(interim).unwrap();
        let body = &mut Read::take(&mut *wire, BODY as u64);
        assert_eq!(std::io::copy(body, &mut std::io::sink()).unwrap(), BODY as u64);
        wire.write_all(&site::ok("thanks")).unwrap();
    };
    let sites = [
        (narrow(refuses, None), false, 413),
        (narrow(refuses, Some(tls())), true, 413),
        (narrow(reads, None), false, 200),
        (narrow(reads, Some(tls())), true, 200),
    ];
    for (site, is_tls, status) in &sites {
        let url = if *is_tls {
            site.https("site.test")
        } else {
            site.url("/")
        };
        let seen = trusting(&authority).check(&large(&url), now() + LONG);
        assert_eq!(seen.status_code, Some(*status), "{url}: {seen:?}");
    }
}
