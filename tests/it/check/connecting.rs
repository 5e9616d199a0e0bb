//! How a connection is made to the addresses of a name, and how it ends.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr};
use std::sync::{Arc, mpsc};

use host_metrics::check::http::Checks;
use host_metrics::check::target::{IpFamily, Target};
use host_metrics::sample::Outcome;
use socket2::SockRef;

use super::{LONG, SHORT, check, checker_with_names, config, now, target, trusting, with_regex};
use crate::child;
use crate::site::{self, Authority, Closed, Deaf, Site, Wire};

#[test]
fn a_dead_address_does_not_make_a_site_down() {
    let site = Site::answering(site::ok("hello"));
    let dead = SocketAddr::from((Ipv4Addr::new(127, 0, 0, 2), site.address.port()));
    let url = format!("http://dead-first.test:{}/", site.address.port());

    // No server listens on the first address.
    let seen = check(&target(&url));
    assert_eq!(
        (seen.outcome, seen.ip),
        (Outcome::Ok, Some(Ipv4Addr::LOCALHOST.into())),
        "{seen:?}"
    );

    // The first address does not answer: half of the time is spent on it.
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
fn of_several_failed_addresses_the_last_error_is_reported_and_no_route_only_if_alone() {
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
        // Without IPv6, there is no route to ::1 instead of a refused connection.
        let without_ipv6 = outcome == Outcome::ConnectRefused && seen.outcome == Outcome::ConnectUnreachable;
        assert!(
            seen.outcome == outcome || without_ipv6,
            "{host} {ip_family:?}: {seen:?}"
        );
    }
}

#[test]
fn a_proxy_in_the_environment_is_not_used() {
    const SELF: &str = "check::connecting::a_proxy_in_the_environment_is_not_used";
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
fn a_connection_that_the_server_has_closed_is_closed_in_order_and_any_other_is_reset() {
    let authority = Authority::new("test authority");
    let server = Arc::new(authority.server(&["site.test"], |_| {}));
    // What the server reads after it has sent this, with or without closing its side.
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
            // The response and the end of the connection are sent together, so that the client sees both at once.
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
        // The checker resets the connection, so that no port stays in TIME_WAIT.
        assert_eq!(ending(is_tls, page.clone(), false, ""), reset, "TLS: {is_tls}");
        assert_eq!(
            ending(is_tls, page.clone(), false, "hello"),
            reset,
            "TLS: {is_tls}"
        );
    }
    let large_page = site::ok(vec![b'x'; 60_000]);
    // The body is not read. Any step of the server may be the first to notice that.
    assert!(ending(false, large_page, true, "").is_err());
}
