//! Redirects: which are followed, to where, and what is counted.

use std::io::Write;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use host_metrics::check::target::{Method, Target};
use host_metrics::sample::Outcome;

use super::{
    LONG, SHORT, assert_consistent, check, check_answer, checker, checker_with_names, good, now, target,
    trusting, with_regex,
};
use crate::site::{self, Authority, Closed, Deaf, Site};

#[test]
fn redirects_are_followed_counted_and_summed() {
    let last = Site::answering(site::ok("arrived"));
    let port = last.address.port();
    let first = Site::plain(move |stream| {
        site::slowly(Duration::from_millis(30));
        // Each request has its own connection and thread, so the path tells the state.
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
fn a_location_is_requested_byte_by_byte_and_an_empty_one_is_not_followed() {
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
fn redirects_that_take_all_of_the_time_are_a_response_timeout() {
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
    // Some checks end between two redirects, some while they wait for a response.
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
        format!("redirect (status 301) to {origin}, which tls=required does not allow")
    );
    assert_eq!(plain.requests().len(), 1, "asked by the first check only");
}

#[test]
fn a_redirect_to_a_failure_has_its_outcome_and_the_count_of_redirects() {
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
