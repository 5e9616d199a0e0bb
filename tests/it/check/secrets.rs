//! What identifies the user: where it is sent, and where not.

use std::fs;
use std::io::Write;
use std::sync::Arc;

use host_metrics::check::http::Checks;
use host_metrics::check::json::JsonRule;
use host_metrics::check::secret::{CertificateFiles, SecretFile};
use host_metrics::check::target::{Header, HeaderValue, Method, Target};
use host_metrics::sample::Outcome;
use rustls::ServerConfig;
use rustls::server::WebPkiClientVerifier;

use super::{LONG, check, config, now, target, trusting};
use crate::site::{self, Authority, Site};

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("shop"), "me:hunter2\n").unwrap();
    fs::write(folder.path().join("key"), "hunter3\n").unwrap();
    folder
}

fn header(name: &str, value: HeaderValue) -> Header {
    Header {
        name: name.to_owned(),
        value,
    }
}

/// A host with everything that identifies a user.
fn identified(url: &str, folder: &tempfile::TempDir) -> Target {
    let key = SecretFile::header(folder.path(), "key").unwrap();
    Target {
        plain_auth: true,
        auth: Some(Arc::new(SecretFile::auth(folder.path(), "shop").unwrap())),
        headers: vec![
            header("X-Key", HeaderValue::Secret("Token ".into(), Arc::new(key))),
            header("Cookie", HeaderValue::Plain("session=1".into())),
            header("X-Plain", HeaderValue::Plain("plain".into())),
        ],
        ..target(url)
    }
}

#[test]
fn secrets_are_sent_and_a_changed_one_is_sent_from_then_on() {
    let folder = folder();
    let site = Site::answering(site::ok(""));
    let target = identified(&site.url("/"), &folder);
    assert_eq!(check(&target).outcome, Outcome::Ok);
    fs::write(folder.path().join("shop"), "Bearer hunter44").unwrap();
    assert_eq!(check(&target).outcome, Outcome::Ok);
    fs::remove_file(folder.path().join("shop")).unwrap();
    assert_eq!(check(&target).outcome, Outcome::Ok);
    let requests = site.requests();
    for (request, auth) in
        requests
            .iter()
            .zip(["Basic bWU6aHVudGVyMg==", "Bearer hunter44", "Bearer hunter44"])
    {
        assert!(
            request.contains(&format!("\r\nAuthorization: {auth}\r\n")),
            "{request}"
        );
        assert!(request.contains("\r\nX-Key: Token hunter3\r\n"), "{request}");
    }
}

#[test]
fn a_redirect_to_another_origin_takes_no_secret_along_and_nothing_is_sent_twice() {
    let folder = folder();
    let other = Site::answering(site::ok(""));
    let location = other.url("/there");
    let site = Site::plain(move |stream| stream.write_all(&site::redirect(307, &location)).unwrap());
    let target = Target {
        method: Method::Post,
        body: Some(host_metrics::check::target::RequestBody {
            file: None,
            bytes: b"order"[..].into(),
        }),
        ..identified(&site.url("/here"), &folder)
    };
    let seen = check(&target);
    assert_eq!((seen.outcome, seen.redirects), (Outcome::Ok, Some(1)), "{seen:?}");
    let (first, second) = (site.requests(), other.requests());
    assert_eq!((first.len(), second.len()), (1, 1));
    assert!(
        first[0].starts_with("POST /here ") && first[0].contains("hunter3"),
        "{first:?}"
    );
    assert!(
        first[0].ends_with("\r\nContent-Length: 5\r\n\r\norder"),
        "{first:?}"
    );
    assert!(
        second[0].starts_with("POST /there ") && second[0].ends_with("\r\n\r\norder"),
        "{second:?}"
    );
    assert!(second[0].contains("X-Plain: plain"), "{second:?}");
    for secret in ["hunter", "Authorization", "Cookie", "X-Key"] {
        assert!(!second[0].contains(secret), "{second:?}");
    }
}

#[test]
fn a_secret_that_a_server_sends_back_is_not_in_the_error() {
    let folder = folder();
    for echo in [
        "hunter3",
        "Token hunter3",
        "Basic bWU6aHVudGVyMg==",
        "me:hunter2",
        "hunter2",
    ] {
        let site = Site::answering(site::ok(format!(r#"{{"echo":"{}{echo}"}}"#, "x".repeat(150))));
        let target = Target {
            json: vec![JsonRule::parse("/echo:ok").unwrap()],
            ..identified(&site.url("/"), &folder)
        };
        let seen = check(&target);
        assert_eq!(seen.outcome, Outcome::JsonMismatch);
        let error = seen.error.unwrap();
        assert!(
            error.contains("***") && !error.contains("hunter") && !error.contains("aHVudGVyMg"),
            "{error}"
        );
        let checks = Checks::new(&config()).unwrap();
        let (_, details) = checks.checker().check_in_detail(&target, now() + LONG);
        assert!(details.body.ends_with(r#"***"}"#), "{details:?}");
    }
    let site = Site::answering(site::response("200 OK", "Content-Encoding: lz4\r\n", "x"));
    fs::write(folder.path().join("key"), "lz4").unwrap();
    let target = Target {
        json: vec![JsonRule::parse("/echo:ok").unwrap()],
        ..identified(&site.url("/"), &folder)
    };
    let error = check(&target).error.unwrap();
    assert!(error.contains("unsupported content-encoding ***"), "{error}");
}

#[test]
fn a_client_certificate_is_shown_to_the_host_of_the_line_only() {
    let authority = Authority::new("test authority");
    let folder = tempfile::tempdir().unwrap();
    let (certificate, key) = authority.leaf_pem(&["me"]);
    fs::write(folder.path().join("me.crt"), certificate).unwrap();
    fs::write(folder.path().join("me.key"), key).unwrap();

    let other = Site::tls(accepting(&authority), |stream| {
        stream.write_all(&site::ok("")).unwrap()
    });
    let location = other.https("other.test");
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let location = location.clone();
        let site = Site::tls(demanding(&authority, version), move |stream| {
            stream.write_all(&site::redirect(302, &location)).unwrap();
        });
        let target = Target {
            cert: Some(Arc::new(
                CertificateFiles::certificate(folder.path(), "me").unwrap(),
            )),
            ..target(&site.https("site.test"))
        };
        let seen = trusting(&authority).check(&target, now() + LONG);
        assert_eq!(seen.outcome, Outcome::Ok, "{seen:?}");
        let stranger = Target { cert: None, ..target };
        let seen = trusting(&authority).check(&stranger, now() + LONG);
        assert_eq!(seen.outcome, Outcome::TlsError, "{seen:?}");
    }
    assert_eq!(other.requests().len(), 2);
}

fn demanding(authority: &Authority, version: &'static rustls::SupportedProtocolVersion) -> ServerConfig {
    server(authority, version, false)
}

/// Takes a client without a certificate, and none with one: the verifier trusts another authority.
fn accepting(authority: &Authority) -> ServerConfig {
    server(authority, &rustls::version::TLS13, true)
}

fn server(
    authority: &Authority,
    version: &'static rustls::SupportedProtocolVersion,
    anonymous_only: bool,
) -> ServerConfig {
    let stranger = Authority::new("stranger");
    let mut roots = rustls::RootCertStore::empty();
    let issuer = if anonymous_only { &stranger } else { authority };
    roots.add(issuer.certificate()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), Arc::clone(&provider));
    let verifier = match anonymous_only {
        true => verifier.allow_unauthenticated(),
        false => verifier,
    };
    let (leaf, key) = authority.leaf(&["site.test", "other.test"], |_| {});
    ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(vec![leaf], key)
        .unwrap()
}
