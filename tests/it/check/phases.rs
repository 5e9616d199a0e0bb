//! The time of each phase, and observations without some phases.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use host_metrics::check::http::Checks;
use host_metrics::check::target::IpFamily;
use host_metrics::config::CheckConfig;
use host_metrics::sample::Outcome;

use super::{LONG, SHORT, check, checker, config, now, target, trusting, with_regex};
use crate::site::{self, Authority, Deaf, Site};

#[test]
fn each_phase_is_timed_and_latency_ends_with_the_headers() {
    // The site waits twice as long as required, because on a busy machine the checker's clock may start after the site's.
    const EACH: Duration = Duration::from_millis(40);
    let authority = Authority::new("test authority");
    let server = Arc::new(authority.server(&["slow.test"], |_| {}));
    let site = Site::start(move |stream, _| {
        // The handshake waits until then.
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
fn phases_that_did_not_happen_are_null_and_a_failed_one_keeps_its_time() {
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
