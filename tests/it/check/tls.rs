//! Handshakes and certificates.

use std::io::Write;
use std::sync::{Arc, Mutex};

use host_metrics::check::http::Checks;
use host_metrics::check::target::Target;
use host_metrics::config::CheckConfig;
use host_metrics::sample::Outcome;
use host_metrics::sample::Timestamp;

use super::{LONG, config, now, target, trusting, with_regex};
use crate::site::{self, Authority, Site};

#[test]
fn the_leaf_is_recorded_even_if_it_is_not_trusted_and_insecure_accepts_any() {
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
        // And only for the host with this option.
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
fn a_person_is_shown_the_handshake_and_the_certificates_even_if_they_are_refused() {
    let authority = Authority::new("test authority");
    let (intermediate, leaf, key) = authority.intermediate(&["site.test", "127.0.0.1"]);
    let config = site::server_config(vec![leaf, intermediate], key);
    let site = Site::tls(config, |stream| stream.write_all(&site::ok("hello")).unwrap());
    let target = target(&site.https("site.test"));
    let (seen, details) = trusting(&authority).check_in_detail(&target, now() + LONG);
    assert_eq!(seen.outcome, Outcome::Ok, "{seen:?}");
    let certificate = details.certificate.unwrap();
    assert_eq!(details.tls.as_deref(), Some("TLS 1.3, TLS_AES_256_GCM_SHA384"));
    assert_eq!(certificate.names, ["site.test", "127.0.0.1"]);
    assert!(certificate.issuer.ends_with("CN=intermediate"), "{certificate:?}");
    assert_eq!(certificate.chain.len(), 2, "{certificate:?}");
    assert_eq!(details.exchanges.len(), 1);
    // The body is only for a person: the record is that of a check that does not read it.
    assert_eq!(
        (details.protocol, details.body.as_str()),
        (Some("HTTP/1.1"), "hello")
    );
    assert_eq!((seen.body_bytes, seen.phases.body), (None, None));

    let other = Authority::new("other authority");
    let (seen, details) = trusting(&other).check_in_detail(&target, now() + LONG);
    assert_eq!(seen.outcome, Outcome::TlsCertUntrusted, "{seen:?}");
    assert_eq!(details.certificate, Some(certificate));
    assert_eq!((details.tls, details.exchanges.len()), (None, 0));
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
