//! Checks through a proxy that works. How proxies fail is in `outcomes`.

use std::io::{Read, Write};
use std::net::TcpStream;

use host_metrics::check::target::{Proxy, Target};
use host_metrics::sample::Outcome;

use super::{LONG, check, now, target, trusting, with_regex};
use crate::site::{self, Authority, Site};

fn through(proxy: &Site, target: Target) -> Target {
    Target {
        proxy: Some(Proxy {
            host: "site.test".into(),
            port: proxy.address.port(),
        }),
        ..target
    }
}

#[test]
fn http_is_asked_of_the_proxy_with_the_whole_url() {
    let proxy = Site::answering(site::ok("hello"));
    // Only the proxy looks up the name of the host.
    let seen = check(&through(
        &proxy,
        with_regex("http://nowhere.test:81/a?b=c", "hello"),
    ));
    assert_eq!(
        (seen.outcome, seen.ip),
        (Outcome::Ok, Some(proxy.address.ip())),
        "{seen:?}"
    );
    let requests = proxy.requests();
    assert!(
        requests[0].starts_with("GET http://nowhere.test:81/a?b=c HTTP/1.1\r\nHost: nowhere.test:81\r\n"),
        "{requests:?}"
    );
}

#[test]
fn https_goes_through_a_tunnel_in_which_the_host_is_verified() {
    let authority = Authority::new("test authority");
    let host = Site::tls(authority.server(&["nowhere.test"], |_| {}), |stream| {
        stream.write_all(&site::ok("hello")).unwrap();
    });
    let address = host.address;
    let proxy = Site::start(move |mut client, requests| {
        requests.lock().unwrap().push(site::read_head(&mut client));
        let answer = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 200 Connection established\r\nX: y\r\n\r\n";
        client.write_all(answer).unwrap();
        let server = TcpStream::connect(address).unwrap();
        let (up, down) = (client.try_clone().unwrap(), server.try_clone().unwrap());
        let back = std::thread::spawn(move || pump(down, client));
        pump(up, server);
        back.join().unwrap();
    });
    let url = host.https("nowhere.test");
    let seen = trusting(&authority).check(&through(&proxy, with_regex(&url, "hello")), now() + LONG);
    assert_eq!(seen.outcome, Outcome::Ok, "{seen:?}");
    assert!(
        seen.cert_expires_at.is_some() && seen.phases.tls.is_some(),
        "{seen:?}"
    );
    let authority_form = format!("nowhere.test:{}", address.port());
    assert_eq!(
        proxy.requests(),
        [format!(
            "CONNECT {authority_form} HTTP/1.1\r\nHost: {authority_form}\r\nUser-Agent: host-metrics/test\r\n\r\n"
        )]
    );
    let requests = host.requests();
    assert!(
        requests[0].starts_with(&format!("GET / HTTP/1.1\r\nHost: {authority_form}\r\n")),
        "{requests:?}"
    );

    let seen = check(&through(&proxy, target(&url)));
    assert_eq!(seen.outcome, Outcome::TlsCertUntrusted, "{seen:?}");
}

/// Copies until one side ends.
fn pump(mut from: TcpStream, mut to: TcpStream) {
    let mut piece = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut piece) {
        if to.write_all(&piece[..count]).is_err() {
            break;
        }
    }
    // The peer may have gone already.
    let _ = to.shutdown(std::net::Shutdown::Write);
}
