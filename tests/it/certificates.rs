//! Certificates and TLS settings made with OpenSSL. Those that curl trusts are trusted, and each refusal has its reason.

use std::fs;
use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use host_metrics::check::http::{Checker, Checks};
use host_metrics::check::observation::Observation;
use host_metrics::config::CheckConfig;
use host_metrics::sample::Outcome;
use openssl::asn1::{Asn1Integer, Asn1Object, Asn1OctetString, Asn1Time};
use openssl::bn::{BigNum, MsbOption};
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::rsa::Rsa;
use openssl::ssl::{SslAcceptor, SslAcceptorBuilder, SslMethod, SslVersion};
use openssl::x509::{X509, X509Extension, X509NameBuilder};

use crate::check::{self, LONG, now};
use crate::site::{self, Site};

const DAY: i64 = 24 * 60 * 60;

/// An extension in the syntax of OpenSSL's configuration files.
type Extension<'a> = (Nid, &'a str);

const CA: Extension<'_> = (Nid::BASIC_CONSTRAINTS, "critical,CA:TRUE");
const SITE: Extension<'_> = (Nid::SUBJECT_ALT_NAME, "DNS:site.test");
/// `127.0.0.1`
const ADDRESS: Extension<'_> = (Nid::SUBJECT_ALT_NAME, "IP:127.0.0.1");

#[derive(Clone)]
struct Certificate {
    x509: X509,
    key: PKey<Private>,
}

/// How a certificate differs from the usual one.
#[derive(Clone, Copy)]
struct Kind<'a> {
    extensions: &'a [Extension<'a>],
    /// Its validity, in days from now.
    days: (i64, i64),
    digest: fn() -> MessageDigest,
    /// The number 2 means version 3.
    version: i32,
    /// An extension in DER: its object identifier and contents.
    raw: Option<(&'a str, &'a [u8])>,
}

const USUAL: Kind<'static> = Kind {
    extensions: &[SITE],
    days: (-30, 300),
    digest: MessageDigest::sha256,
    version: 2,
    raw: None,
};

const AUTHORITY: Kind<'static> = Kind {
    extensions: &[CA],
    ..USUAL
};

#[expect(clippy::disallowed_methods, reason = "certificates have dates")]
fn day(days: i64) -> Asn1Time {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
    Asn1Time::from_unix(now + days * DAY).unwrap()
}

/// Issued by `issuer`, or self-signed.
fn certificate(name: &str, key: PKey<Private>, issuer: Option<&Certificate>, kind: Kind<'_>) -> Certificate {
    let mut subject = X509NameBuilder::new().unwrap();
    subject.append_entry_by_nid(Nid::COMMONNAME, name).unwrap();
    let subject = subject.build();
    let mut serial = BigNum::new().unwrap();
    serial.rand(64, MsbOption::MAYBE_ZERO, false).unwrap();
    let mut builder = X509::builder().unwrap();
    builder.set_version(kind.version).unwrap();
    builder
        .set_serial_number(&Asn1Integer::from_bn(&serial).unwrap())
        .unwrap();
    builder.set_subject_name(&subject).unwrap();
    let issuer_name = issuer.map_or(&*subject, |issuer| issuer.x509.subject_name());
    builder.set_issuer_name(issuer_name).unwrap();
    builder.set_pubkey(&key).unwrap();
    builder.set_not_before(&day(kind.days.0)).unwrap();
    builder.set_not_after(&day(kind.days.1)).unwrap();
    for (nid, value) in kind.extensions {
        let context = builder.x509v3_context(None, None);
        #[expect(deprecated, reason = "the typed builders cannot make what is wrong")]
        let extension = X509Extension::new_nid(None, Some(&context), *nid, value).unwrap();
        builder.append_extension(extension).unwrap();
    }
    if let Some((oid, contents)) = kind.raw {
        let oid = Asn1Object::from_str(oid).unwrap();
        let contents = Asn1OctetString::new_from_bytes(contents).unwrap();
        let extension = X509Extension::new_from_der(&oid, true, &contents).unwrap();
        builder.append_extension(extension).unwrap();
    }
    let signer = issuer.map_or(&key, |issuer| &issuer.key);
    builder.sign(signer, (kind.digest)()).unwrap();
    Certificate {
        x509: builder.build(),
        key,
    }
}

fn ec(curve: Nid) -> PKey<Private> {
    let group = EcGroup::from_curve_name(curve).unwrap();
    PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap()
}

fn p256() -> PKey<Private> {
    ec(Nid::X9_62_PRIME256V1)
}

fn rsa(bits: u32) -> PKey<Private> {
    PKey::from_rsa(Rsa::generate(bits).unwrap()).unwrap()
}

/// An RSA key that may sign only with RSASSA-PSS: the same numbers after another algorithm without parameters.
fn rsa_pss() -> PKey<Private> {
    let der = rsa(2_048).private_key_to_pkcs8().unwrap();
    let (algorithm, numbers) = der.split_at(22);
    assert_eq!(&algorithm[17..], b"\x01\x01\x01\x05\x00", "rsaEncryption, NULL");
    let bytes = (der.len() - 4 - 2) as u16;
    let head = [&b"\x30\x82"[..], &bytes.to_be_bytes(), b"\x02\x01\x00\x30\x0b"].concat();
    let der = [&head, &algorithm[9..19], b"\x0a", numbers].concat();
    PKey::private_key_from_pkcs8(&der).unwrap()
}

fn root() -> Certificate {
    certificate("root", p256(), None, AUTHORITY)
}

/// A site with OpenSSL that presents the first of `chain` as its certificate.
fn site(chain: &[&Certificate], change: impl FnOnce(&mut SslAcceptorBuilder)) -> Site {
    let mut builder = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls_server()).unwrap();
    builder.set_security_level(0);
    builder.set_private_key(&chain[0].key).unwrap();
    builder.set_certificate(&chain[0].x509).unwrap();
    for other in &chain[1..] {
        builder.add_extra_chain_cert(other.x509.clone()).unwrap();
    }
    change(&mut builder);
    let acceptor = builder.build();
    Site::start(move |stream, _| {
        // The handshake fails if the client refuses the certificate.
        if let Ok(mut tls) = acceptor.accept(stream) {
            if !site::read_head(&mut tls).is_empty() {
                let _ = tls.write_all(&site::ok("hello"));
            }
            let _ = tls.shutdown();
        }
    })
}

/// A checker that trusts these in addition to the machine's authorities.
fn trusting(anchors: &[&Certificate]) -> Checker {
    let file = tempfile::NamedTempFile::new().unwrap();
    let pems: Vec<u8> = anchors
        .iter()
        .flat_map(|anchor| anchor.x509.to_pem().unwrap())
        .collect();
    fs::write(file.path(), pems).unwrap();
    trusting_file(&file)
}

fn trusting_file(file: &tempfile::NamedTempFile) -> Checker {
    let config = CheckConfig {
        ca_file: Some(file.path().to_owned()),
        ..check::config()
    };
    Checks::with_lookup(&config, Box::new(check::names))
        .unwrap()
        .checker()
}

fn seen_at(site: &Site, host: &str, mut checker: Checker) -> Observation {
    checker.check(&check::target(&site.https(host)), now() + LONG)
}

/// Checks `https://site.test`.
#[track_caller]
fn assert_seen(site: &Site, anchors: &[&Certificate], outcome: Outcome, says: &str) {
    assert_seen_at(site, "site.test", anchors, outcome, says);
}

#[track_caller]
fn assert_seen_at(site: &Site, host: &str, anchors: &[&Certificate], outcome: Outcome, says: &str) {
    let seen = seen_at(site, host, trusting(anchors));
    assert_eq!(seen.outcome, outcome, "{seen:?}");
    let text = seen.error.unwrap_or_default();
    assert!(text.contains(says), "{text:?} does not say {says:?}");
    assert!(text.chars().count() <= 200, "too long: {text}");
}

fn no_change(_: &mut SslAcceptorBuilder) {}

fn tls_1_2(builder: &mut SslAcceptorBuilder) {
    builder.set_max_proto_version(Some(SslVersion::TLS1_2)).unwrap();
}

#[test]
fn every_key_and_signature_that_curl_takes_is_taken() {
    let root = root();
    let with = |key, digest| certificate("site", key, Some(&root), Kind { digest, ..USUAL });
    let leaves = [
        ("P-256 signed with SHA-384", with(p256(), MessageDigest::sha384)),
        ("P-256 signed with SHA-512", with(p256(), MessageDigest::sha512)),
        (
            "P-384 signed with SHA-512",
            with(ec(Nid::SECP384R1), MessageDigest::sha512),
        ),
        ("P-521", with(ec(Nid::SECP521R1), MessageDigest::sha256)),
        (
            "P-521 signed with SHA-512",
            with(ec(Nid::SECP521R1), MessageDigest::sha512),
        ),
        ("RSA", with(rsa(2_048), MessageDigest::sha256)),
        (
            "Ed25519",
            with(PKey::generate_ed25519().unwrap(), MessageDigest::sha256),
        ),
        ("RSA-PSS, TLS 1.3 only", with(rsa_pss(), MessageDigest::sha256)),
        (
            "Ed448, TLS 1.3 only",
            with(PKey::generate_ed448().unwrap(), MessageDigest::sha256),
        ),
    ];
    for (what, leaf) in &leaves {
        let versions: [fn(&mut SslAcceptorBuilder); 2] = [no_change, tls_1_2];
        // The others need TLS 1.2: see `tls_that_we_do_not_support_is_reported_as_our_limit`.
        let is_for_1_3_only = what.ends_with("only");
        let count = if is_for_1_3_only { 1 } else { 2 };
        for (version, change) in versions.into_iter().take(count).enumerate() {
            let seen = seen_at(&site(&[leaf], change), "site.test", trusting(&[&root]));
            assert_eq!(seen.outcome, Outcome::Ok, "{what}, {version}: {seen:?}");
        }
    }
}

#[test]
fn an_authority_may_have_any_key_that_curl_takes() {
    for (key, digest) in [
        (ec(Nid::SECP521R1), MessageDigest::sha512 as fn() -> _),
        (ec(Nid::SECP521R1), MessageDigest::sha256),
        (ec(Nid::SECP384R1), MessageDigest::sha512),
        (PKey::generate_ed448().unwrap(), MessageDigest::null),
    ] {
        let root = certificate("root", key, None, Kind { digest, ..AUTHORITY });
        let middle = certificate("middle", p256(), Some(&root), Kind { digest, ..AUTHORITY });
        let leaf = certificate("site", p256(), Some(&middle), USUAL);
        assert_seen(&site(&[&leaf, &middle], no_change), &[&root], Outcome::Ok, "");
    }
}

#[test]
fn a_server_may_sign_the_handshake_with_sha_512_whatever_its_curve() {
    let root = root();
    let leaf = certificate("site", p256(), Some(&root), USUAL);
    let server = site(&[&leaf], |builder| {
        tls_1_2(builder);
        builder.set_sigalgs_list("ECDSA+SHA512").unwrap();
    });
    assert_seen(&server, &[&root], Outcome::Ok, "");
}

#[test]
fn every_common_group_is_offered_for_the_key_exchange() {
    let root = root();
    let leaf = certificate("site", p256(), Some(&root), USUAL);
    for group in ["X25519", "P-256", "P-384", "P-521"] {
        for change in [no_change as fn(&mut _), tls_1_2] {
            let server = site(&[&leaf], |builder| {
                change(builder);
                builder.set_groups_list(group).unwrap();
            });
            assert_seen(&server, &[&root], Outcome::Ok, "");
        }
    }
}

#[test]
fn a_certificate_that_is_itself_trusted_needs_no_issuer() {
    for extensions in [
        &[SITE][..],
        &[SITE, CA],
        &[SITE, (Nid::BASIC_CONSTRAINTS, "CA:FALSE")],
    ] {
        let own = certificate("own", p256(), None, Kind { extensions, ..USUAL });
        let server = site(&[&own], no_change);
        assert_seen(&server, &[&own], Outcome::Ok, "");
        assert_seen_at(
            &server,
            "other.test",
            &[&own],
            Outcome::TlsCertName,
            "not for other.test, but for site.test",
        );
        assert_seen(&server, &[&root()], Outcome::TlsCertUntrusted, "self-signed");

        let expired = Kind {
            extensions,
            days: (-30, -2),
            ..USUAL
        };
        let expired = certificate("own", p256(), None, expired);
        assert_seen(
            &site(&[&expired], no_change),
            &[&expired],
            Outcome::TlsCertExpired,
            "the certificate has expired",
        );
    }
    let issued = certificate("site", p256(), Some(&root()), USUAL);
    assert_seen(&site(&[&issued], no_change), &[&issued], Outcome::Ok, "");
}

#[test]
fn an_expired_certificate_anywhere_in_the_chain_is_named() {
    let expired = Kind {
        days: (-30, -2),
        ..AUTHORITY
    };
    let early = Kind {
        days: (2, 30),
        ..AUTHORITY
    };
    let good = root();
    for (kind, says) in [
        (expired, "has expired: it ended on 20"),
        (early, "is not valid yet: it begins on 20"),
    ] {
        let old_root = certificate("Old Root", p256(), None, kind);
        let leaf = certificate("site", p256(), Some(&old_root), USUAL);
        let says_root = format!("the trusted CA certificate \"Old Root\" {says}");
        for chain in [&[&leaf][..], &[&leaf, &old_root]] {
            assert_seen(
                &site(chain, no_change),
                &[&old_root],
                Outcome::TlsCertExpired,
                &says_root,
            );
        }

        let middle = certificate("Middle", p256(), Some(&good), kind);
        let leaf = certificate("site", p256(), Some(&middle), USUAL);
        let says_middle = format!("the intermediate certificate \"Middle\" {says}");
        assert_seen(
            &site(&[&leaf, &middle], no_change),
            &[&good],
            Outcome::TlsCertExpired,
            &says_middle,
        );

        let leaf = certificate(
            "site",
            p256(),
            Some(&good),
            Kind {
                extensions: &[SITE],
                ..kind
            },
        );
        assert_seen(
            &site(&[&leaf], no_change),
            &[&good],
            Outcome::TlsCertExpired,
            &format!("the certificate {says}"),
        );
    }
}

#[test]
fn an_authority_that_was_renewed_is_trusted_beside_its_expired_certificate() {
    let key = p256();
    let old = certificate(
        "root",
        key.clone(),
        None,
        Kind {
            days: (-30, -2),
            ..AUTHORITY
        },
    );
    let new = certificate("root", key, None, AUTHORITY);
    let leaf = certificate("site", p256(), Some(&old), USUAL);
    let server = site(&[&leaf, &old], no_change);
    assert_seen(&server, &[&old, &new], Outcome::Ok, "");
    assert_seen(&server, &[&new, &old], Outcome::Ok, "");
}

#[test]
fn the_reason_why_a_certificate_is_not_trusted_is_a_sentence() {
    let root = root();
    let leaf = |key, kind| certificate("site", key, Some(&root), kind);
    let with = |extensions| leaf(p256(), Kind { extensions, ..USUAL });
    let sha1 = Kind {
        digest: MessageDigest::sha1,
        ..USUAL
    };
    let unknown = Kind {
        raw: Some(("1.2.3.4.5", b"\x05\x00")),
        ..USUAL
    };
    let policies = Kind {
        raw: Some(("2.5.29.32", b"\x30\x07\x30\x05\x06\x03\x2a\x03\x04")),
        ..USUAL
    };
    let no_address = Kind {
        extensions: &[],
        raw: Some(("2.5.29.17", b"\x30\x03\x87\x01\x01")),
        ..USUAL
    };
    const MANY: &str = "DNS:a.test,DNS:b.test,DNS:c.test,DNS:d.test,DNS:e.test";
    use Outcome as O;
    let cases = [
        (
            "a short key",
            leaf(rsa(1_024), USUAL),
            O::TlsCertUntrusted,
            "its key is too short",
        ),
        (
            "a weak signature",
            leaf(p256(), sha1),
            O::TlsCertUntrusted,
            "digest algorithm too weak",
        ),
        (
            "an unknown critical extension",
            leaf(p256(), unknown),
            O::TlsCertUntrusted,
            "unhandled critical extension",
        ),
        (
            "it is not for use by servers",
            with(&[SITE, (Nid::EXT_KEY_USAGE, "clientAuth")]),
            O::TlsCertUntrusted,
            "unsuitable certificate purpose",
        ),
        ("a known critical extension", leaf(p256(), policies), O::Ok, ""),
        (
            "no names",
            with(&[]),
            O::TlsCertName,
            "not for site.test: it has no subject alternative names",
        ),
        (
            "no names of hosts",
            with(&[(Nid::SUBJECT_ALT_NAME, "email:me@site.test")]),
            O::TlsCertName,
            "it has no subject alternative names",
        ),
        (
            "an address that is none",
            leaf(p256(), no_address),
            O::TlsCertName,
            "it has no subject alternative names",
        ),
        (
            "version 1",
            leaf(
                p256(),
                Kind {
                    extensions: &[],
                    version: 0,
                    ..USUAL
                },
            ),
            O::TlsCertName,
            "it has no subject alternative names",
        ),
        (
            "other names",
            with(&[(Nid::SUBJECT_ALT_NAME, MANY)]),
            O::TlsCertName,
            "not for site.test, but for a.test, b.test, c.test, 2 more",
        ),
        (
            "an address only",
            with(&[ADDRESS]),
            O::TlsCertName,
            "but for the IP address 127.0.0.1",
        ),
        (
            "a wildcard of a whole domain",
            with(&[(Nid::SUBJECT_ALT_NAME, "DNS:*.test")]),
            O::TlsCertName,
            "but for *.test",
        ),
    ];
    for (_, leaf, outcome, says) in cases {
        assert_seen(&site(&[&leaf], no_change), &[&root], outcome, says);
    }
    let named = with(&[(Nid::SUBJECT_ALT_NAME, "DNS:127.0.0.1,IP:127.0.0.2")]);
    assert_seen_at(
        &site(&[&named], no_change),
        "127.0.0.1",
        &[&root],
        O::TlsCertName,
        "not for the IP address 127.0.0.1, but for 127.0.0.1 as a DNS name, not as an IP address, the IP address 127.0.0.2",
    );
    for names in [
        "DNS:SITE.test",
        "DNS:site.test.",
        "DNS:a.test,DNS:site.test",
        "DNS:*.www.test,DNS:site.test",
    ] {
        let extensions = &[(Nid::SUBJECT_ALT_NAME, names)];
        let leaf = certificate("site", p256(), Some(&root), Kind { extensions, ..USUAL });
        assert_seen(&site(&[&leaf], no_change), &[&root], O::Ok, "");
    }
    let by_address = with(&[ADDRESS]);
    assert_seen_at(&site(&[&by_address], no_change), "127.0.0.1", &[&root], O::Ok, "");
}

#[test]
fn a_fault_further_up_the_chain_is_a_sentence() {
    let root = root();
    let stranger = certificate("Stranger", p256(), None, AUTHORITY);
    let chain = |key, kind| {
        let middle = certificate("Middle", key, Some(&root), kind);
        (certificate("site", p256(), Some(&middle), USUAL), middle)
    };
    let with = |extensions| chain(p256(), Kind { extensions, ..USUAL });
    let not_for_it = (Nid::NAME_CONSTRAINTS, "critical,permitted;DNS:else.test");
    let cases = [
        (
            "no authority",
            with(&[(Nid::BASIC_CONSTRAINTS, "CA:FALSE")]),
            "the intermediate certificate \"Middle\": invalid CA certificate",
        ),
        (
            "a short key",
            chain(rsa(1_024), AUTHORITY),
            "the intermediate certificate \"Middle\": CA certificate key too weak",
        ),
        (
            "other names only",
            with(&[CA, not_for_it]),
            "permitted subtree violation",
        ),
    ];
    for (_, (leaf, middle), says) in &cases {
        assert_seen(
            &site(&[leaf, middle], no_change),
            &[&root],
            Outcome::TlsCertUntrusted,
            says,
        );
    }
    let (_, (leaf, middle), _) = &cases[0];
    assert_seen(
        &site(&[leaf], no_change),
        &[&root],
        Outcome::TlsCertUntrusted,
        "issued by \"Middle\", which is not known here; or the server does not send the intermediate certificates",
    );
    assert_seen(
        &site(&[leaf, middle, &root], no_change),
        &[&stranger],
        Outcome::TlsCertUntrusted,
        "its chain ends with \"root\", which is not among the trusted certificates",
    );
    let forged = Certificate {
        key: p256(),
        ..root.clone()
    };
    let leaf = certificate("site", p256(), Some(&forged), USUAL);
    assert_seen(
        &site(&[&leaf], no_change),
        &[&root],
        Outcome::TlsCertUntrusted,
        "certificate signature failure",
    );
}

#[test]
fn tls_that_we_do_not_support_is_reported_as_our_limit() {
    let root = root();
    let leaf = certificate("site", rsa(2_048), Some(&root), USUAL);
    let ciphers = |list: &'static str| {
        site(&[&leaf], move |builder| {
            tls_1_2(builder);
            builder.set_cipher_list(list).unwrap();
        })
    };
    for list in ["AES256-SHA", "AES128-GCM-SHA256", "ECDHE-RSA-AES128-SHA256"] {
        assert_seen(&ciphers(list), &[&root], Outcome::TlsError, "does not support");
    }
    for key in [PKey::generate_ed448().unwrap(), rsa_pss()] {
        let leaf = certificate("site", key, Some(&root), USUAL);
        assert_seen(
            &site(&[&leaf], tls_1_2),
            &[&root],
            Outcome::TlsError,
            "does not support",
        );
    }
    let old = site(&[&leaf], |builder| {
        builder.set_min_proto_version(None).unwrap();
        builder.set_max_proto_version(Some(SslVersion::TLS1_1)).unwrap();
    });
    assert_seen(&old, &[&root], Outcome::TlsError, "TLS 1.2 or newer is required");
}

#[test]
fn a_ca_file_is_read_as_openssl_reads_it() {
    let own = certificate("own", p256(), None, USUAL);
    let other = root();
    let server = site(&[&own], no_change);
    let pem = String::from_utf8(own.x509.to_pem().unwrap()).unwrap();
    let other_pem = String::from_utf8(other.x509.to_pem().unwrap()).unwrap();
    let key = String::from_utf8(own.key.private_key_to_pem_pkcs8().unwrap()).unwrap();
    let labelled = |label: &str| pem.replace("CERTIFICATE", label);
    for (what, text) in [
        ("one", pem.clone()),
        ("a byte-order mark", format!("\u{feff}{pem}")),
        ("a byte-order mark and two", format!("\u{feff}{other_pem}{pem}")),
        ("X509", labelled("X509 CERTIFICATE")),
        ("Windows' line ends", pem.replace('\n', "\r\n")),
        ("text around it", format!("subject: own\n\n{pem}\n# end")),
        ("beside its key", format!("{key}{pem}")),
        ("no line end at the end", pem.trim_end().to_owned()),
    ] {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        let seen = seen_at(&server, "site.test", trusting_file(&file));
        assert_eq!(seen.outcome, Outcome::Ok, "{what}: {seen:?}");
    }
}
