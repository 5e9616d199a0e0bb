//! Verifies a server's certificates, and says in words why they are not trusted.
//!
//! webpki accepts nearly all chains, in a third of the time that OpenSSL takes. A chain that it rejects is verified again by
//! OpenSSL with curl's settings. OpenSSL supports more algorithms and extensions, accepts a server certificate that is
//! itself a trusted one, and reports which certificate of the chain is wrong.

use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{Id, PKey, Public};
use openssl::rsa::Padding;
use openssl::sign::{RsaPssSaltlen, Verifier};
use openssl::stack::Stack;
use openssl::x509::store::{X509Store, X509StoreBuilder};
use openssl::x509::verify::{X509VerifyFlags, X509VerifyParam};
use openssl::x509::{X509, X509PurposeId, X509Ref, X509StoreContext, X509StoreContextRef};
use rustls::pki_types::{CertificateDer, ServerName, SignatureVerificationAlgorithm, TrustAnchor, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, OtherError, SignatureScheme};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::certificate::{Validity, X509CertificateParser};
use x509_parser::nom::Parser;

use crate::check::details::Certificate;
use crate::sample::Timestamp;
use crate::terminal;

/// OpenSSL's default security level: RSA keys of at least 2048 bits, and no SHA-1.
const OPENSSL_LEVEL: i32 = 2;

/// The same level for a single key, as the length of a symmetric key of equal strength.
const SECURITY_BITS: u32 = 112;

/// How many names of a certificate a message contains.
const MOST_NAMES: usize = 3;

/// How much of a name from a certificate a message contains.
const MAX_NAME_CHARS: usize = 60;

/// Why a server's certificates are rejected.
#[derive(Debug, thiserror::Error)]
pub(super) enum CertificateFault {
    #[error("the certificate is not trusted: this machine has no trusted CA certificates")]
    NoAnchors,
    /// A certificate of the chain has expired or is not valid yet.
    #[error("{0}")]
    Dates(String),
    /// The certificate is trusted, but is for other names.
    #[error("{0}")]
    Name(String),
    #[error("the certificate is not trusted: {0}")]
    Untrusted(String),
}

impl From<ErrorStack> for CertificateFault {
    fn from(error: ErrorStack) -> Self {
        Self::Untrusted(format!("OpenSSL cannot verify it ({})", reason(&error)))
    }
}

impl From<CertificateFault> for rustls::Error {
    fn from(fault: CertificateFault) -> Self {
        CertificateError::Other(OtherError(Arc::new(fault))).into()
    }
}

/// The trusted CA certificates.
#[derive(Default)]
pub(super) struct Anchors {
    certificates: Vec<X509>,
    /// The same certificates for webpki, and their validity, which webpki does not check.
    roots: Vec<TrustAnchor<'static>>,
    validities: Vec<Validity>,
    /// Built when it is first needed, because that takes about 10 ms.
    store: OnceLock<X509Store>,
}

impl Anchors {
    pub(super) fn new(certificates: impl IntoIterator<Item = CertificateDer<'static>>) -> Self {
        let mut anchors = Self::default();
        for der in certificates {
            // A machine's CA certificates often include some in obsolete formats. They are skipped.
            if let Ok(certificate) = X509::from_der(&der) {
                anchors.certificates.push(certificate);
            }
            if let (Ok(root), Some(validity)) = (webpki::anchor_from_trusted_cert(&der), validity(&der)) {
                anchors.roots.push(root.to_owned());
                anchors.validities.push(validity);
            }
        }
        anchors
    }

    pub(super) fn is_empty(&self) -> bool {
        self.certificates.is_empty()
    }

    pub(super) fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        now: UnixTime,
        algorithms: &[&dyn SignatureVerificationAlgorithm],
    ) -> Result<(), CertificateFault> {
        if self.is_empty() {
            return Err(CertificateFault::NoAnchors);
        }
        match self.verify_by_webpki(leaf, others, name, now, algorithms) {
            Ok(()) => Ok(()),
            Err(_) => self.verify_by_openssl(leaf, others, name, now),
        }
    }

    fn verify_by_webpki(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        now: UnixTime,
        algorithms: &[&dyn SignatureVerificationAlgorithm],
    ) -> Result<(), webpki::Error> {
        let leaf = EndEntityCert::try_from(leaf)?;
        let is_current = |path: &webpki::VerifiedPath<'_>| {
            let mut roots = self.roots.iter().zip(&self.validities);
            let found = roots.find(|(root, _)| std::ptr::eq(*root, path.anchor()));
            match found {
                Some((_, validity)) if is_within(validity, now) => Ok(()),
                // OpenSSL will give the exact reason.
                _ => Err(webpki::Error::UnknownIssuer),
            }
        };
        leaf.verify_for_usage(
            algorithms,
            &self.roots,
            others,
            now,
            KeyUsage::server_auth(),
            None,
            Some(&is_current),
        )?;
        leaf.verify_is_valid_for_subject_name(name)
    }

    fn verify_by_openssl(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), CertificateFault> {
        let unreadable = |_| CertificateFault::Untrusted("it cannot be read".into());
        let leaf_validity = validity(leaf);
        let leaf = X509::from_der(leaf).map_err(unreadable)?;
        // Checked first, because the certificate has to be renewed in any case.
        if leaf_validity.is_some_and(|validity| !is_within(&validity, now)) {
            return Err(CertificateFault::Dates(dates_text("the certificate", &leaf, now)));
        }
        let mut chain = Stack::new()?;
        for other in others {
            if let Ok(other) = X509::from_der(other) {
                chain.push(other)?;
            }
        }
        let verdict = X509StoreContext::new()?.init(self.store()?, &leaf, &chain, |context| {
            let is_good = context.verify_cert()?;
            Ok((!is_good).then(|| self.fault(context, &leaf, now)))
        })?;
        match verdict {
            Some(fault) => Err(fault),
            None => verify_name(&leaf, name),
        }
    }

    fn store(&self) -> Result<&X509Store, ErrorStack> {
        if let Some(store) = self.store.get() {
            return Ok(store);
        }
        let mut builder = X509StoreBuilder::new()?;
        for certificate in &self.certificates {
            builder.add_cert(certificate.clone())?;
        }
        let mut settings = X509VerifyParam::new()?;
        settings.set_purpose(X509PurposeId::SSL_SERVER)?;
        settings.set_auth_level(OPENSSL_LEVEL);
        settings.set_flags(X509VerifyFlags::TRUSTED_FIRST | X509VerifyFlags::PARTIAL_CHAIN)?;
        builder.set_param(&settings)?;
        Ok(self.store.get_or_init(|| builder.build()))
    }

    /// The first error that OpenSSL found.
    fn fault(&self, context: &X509StoreContextRef, leaf: &X509Ref, now: UnixTime) -> CertificateFault {
        use CertificateFault as F;
        let at_fault = context.current_cert().unwrap_or(leaf);
        let is_leaf = context.error_depth() == 0;
        let subject = common_name(at_fault.subject_name());
        let issuer = common_name(at_fault.issuer_name());
        let whose = match self.is_anchor(at_fault) {
            _ if is_leaf => "the certificate".to_owned(),
            true => format!("the trusted CA certificate {subject}"),
            false => format!("the intermediate certificate {subject}"),
        };
        // The codes of OpenSSL's x509_vfy.h.
        F::Untrusted(match context.error().as_raw() {
            9 | 10 | 13 | 14 => {
                return F::Dates(dates_text(&whose, at_fault, now));
            }
            18 => "it is self-signed and not among the trusted certificates".into(),
            19 => format!("its chain ends with {subject}, which is not among the trusted certificates"),
            2 | 20 | 21 | 27 => format!(
                "it was issued by {issuer}, which is not known here; or the server does not send the intermediate certificates"
            ),
            _ if is_leaf => context.error().error_string().to_owned(),
            _ => format!("{whose}: {}", context.error().error_string()),
        })
    }

    fn is_anchor(&self, certificate: &X509Ref) -> bool {
        let Ok(der) = certificate.to_der() else {
            return false;
        };
        self.certificates
            .iter()
            .any(|anchor| anchor.to_der().is_ok_and(|anchor| anchor == der))
    }
}

/// The algorithms of [`verify_signature`] that rustls with ring does not support.
pub(super) const FURTHER_SCHEMES: [SignatureScheme; 5] = [
    SignatureScheme::ECDSA_NISTP521_SHA512,
    SignatureScheme::ED448,
    PSS_KEY_SHA256,
    PSS_KEY_SHA384,
    PSS_KEY_SHA512,
];

/// `rsa_pss_pss_…`: for keys that may only be used with RSASSA-PSS.
const PSS_KEY_SHA256: SignatureScheme = SignatureScheme::Unknown(0x0809);
const PSS_KEY_SHA384: SignatureScheme = SignatureScheme::Unknown(0x080a);
const PSS_KEY_SHA512: SignatureScheme = SignatureScheme::Unknown(0x080b);

/// Verifies with OpenSSL that the server has the key of its certificate, for keys and signatures that ring does not support.
///
/// `binds_curve`: each ECDSA algorithm may only be used with the curve in its name, as in TLS 1.3.
pub(super) fn verify_signature(
    message: &[u8],
    certificate: &CertificateDer<'_>,
    signed: &DigitallySignedStruct,
    binds_curve: bool,
) -> Result<(), CertificateFault> {
    let certificate = X509::from_der(certificate)?;
    let key = certificate.public_key()?;
    if key.security_bits() < SECURITY_BITS {
        return Err(CertificateFault::Untrusted("its key is too short".into()));
    }
    match has_signed(&key, message, signed, binds_curve) {
        Ok(true) => Ok(()),
        Ok(false) | Err(_) => Err(CertificateFault::Untrusted(
            "the server's signature of the handshake does not match its key".into(),
        )),
    }
}

fn has_signed(
    key: &PKey<Public>,
    message: &[u8],
    signed: &DigitallySignedStruct,
    binds_curve: bool,
) -> Result<bool, ErrorStack> {
    use SignatureScheme as S;
    let (id, digest, curve, is_pss) = match signed.scheme {
        S::ECDSA_NISTP256_SHA256 => (
            Id::EC,
            MessageDigest::sha256(),
            Some(Nid::X9_62_PRIME256V1),
            false,
        ),
        S::ECDSA_NISTP384_SHA384 => (Id::EC, MessageDigest::sha384(), Some(Nid::SECP384R1), false),
        S::ECDSA_NISTP521_SHA512 => (Id::EC, MessageDigest::sha512(), Some(Nid::SECP521R1), false),
        S::RSA_PKCS1_SHA256 => (Id::RSA, MessageDigest::sha256(), None, false),
        S::RSA_PKCS1_SHA384 => (Id::RSA, MessageDigest::sha384(), None, false),
        S::RSA_PKCS1_SHA512 => (Id::RSA, MessageDigest::sha512(), None, false),
        PSS_KEY_SHA256 => (Id::RSA_PSS, MessageDigest::sha256(), None, true),
        PSS_KEY_SHA384 => (Id::RSA_PSS, MessageDigest::sha384(), None, true),
        PSS_KEY_SHA512 => (Id::RSA_PSS, MessageDigest::sha512(), None, true),
        S::RSA_PSS_SHA256 => (Id::RSA, MessageDigest::sha256(), None, true),
        S::RSA_PSS_SHA384 => (Id::RSA, MessageDigest::sha384(), None, true),
        S::RSA_PSS_SHA512 => (Id::RSA, MessageDigest::sha512(), None, true),
        S::ED25519 | S::ED448 => {
            let id = if signed.scheme == S::ED448 {
                Id::ED448
            } else {
                Id::ED25519
            };
            let mut verifier = Verifier::new_without_digest(key)?;
            return Ok(key.id() == id && verifier.verify_oneshot(signed.signature(), message)?);
        }
        _ => return Ok(false),
    };
    let fits = |curve| {
        key.ec_key()
            .is_ok_and(|key| key.group().curve_name() == Some(curve))
    };
    if key.id() != id || binds_curve && !curve.is_none_or(fits) {
        return Ok(false);
    }
    let mut verifier = Verifier::new(digest, key)?;
    if is_pss {
        verifier.set_rsa_padding(Padding::PKCS1_PSS)?;
        verifier.set_rsa_pss_saltlen(RsaPssSaltlen::DIGEST_LENGTH)?;
    }
    verifier.verify_oneshot(signed.signature(), message)
}

/// When a certificate expires (`notAfter`); `None` if that cannot be read or is outside the years 1970 to 9999.
pub(super) fn expires_at(certificate: &CertificateDer<'_>) -> Option<Timestamp> {
    timestamp(validity(certificate)?.not_after.timestamp())
}

/// A server's certificates for a person; `None` if the first one cannot be read.
pub(super) fn describe(leaf: &CertificateDer<'_>, others: &[CertificateDer<'_>]) -> Option<Certificate> {
    let subject_of = |certificate| {
        let certificate = X509::from_der(certificate).ok();
        certificate.map_or_else(
            || "one that cannot be read".to_owned(),
            |read| common_name(read.subject_name()),
        )
    };
    let chain = [leaf]
        .into_iter()
        .chain(others)
        .map(|der| subject_of(der))
        .collect();
    let name = |name| match name {
        Presented::Dns(name) => name,
        Presented::Ip(ip) => ip.to_string(),
    };
    let leaf = X509::from_der(leaf).ok()?;
    Some(Certificate {
        subject: whole_name(leaf.subject_name()),
        issuer: whole_name(leaf.issuer_name()),
        names: Presented::all_of(&leaf).into_iter().map(name).collect(),
        chain,
    })
}

/// As in `O=Example, CN=example.com`.
fn whole_name(name: &openssl::x509::X509NameRef) -> String {
    let parts = name.entries().map(|entry| {
        let kind = entry.object().nid().short_name().unwrap_or("?");
        let value = entry.data().to_string();
        format!("{kind}={}", value.unwrap_or_default())
    });
    parts.collect::<Vec<_>>().join(", ")
}

fn validity(certificate: &[u8]) -> Option<Validity> {
    let (_, parsed) = X509CertificateParser::new()
        .with_deep_parse_extensions(false)
        .parse(certificate)
        .ok()?;
    Some(parsed.validity().clone())
}

fn is_within(validity: &Validity, now: UnixTime) -> bool {
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    (validity.not_before.timestamp()..=validity.not_after.timestamp()).contains(&now)
}

fn timestamp(seconds: i64) -> Option<Timestamp> {
    Timestamp::from_unix_micros(seconds.checked_mul(1_000_000)?)
}

fn dates_text(whose: &str, certificate: &X509Ref, now: UnixTime) -> String {
    let validity = certificate.to_der().ok().and_then(|der| validity(&der));
    let Some(validity) = validity else {
        return format!("{whose} has dates that cannot be read");
    };
    let day = |seconds| match timestamp(seconds) {
        Some(at) => at.to_string()[..10].to_owned(),
        None => "a day outside the years 1970 to 9999".into(),
    };
    let (begins, ends) = (validity.not_before.timestamp(), validity.not_after.timestamp());
    if begins > i64::try_from(now.as_secs()).unwrap_or(i64::MAX) {
        format!("{whose} is not valid yet: it begins on {}", day(begins))
    } else {
        format!("{whose} has expired: it ended on {}", day(ends))
    }
}

/// A name that a certificate is for.
enum Presented {
    Dns(String),
    Ip(IpAddr),
}

impl Presented {
    fn all_of(certificate: &X509Ref) -> Vec<Self> {
        let names = certificate.subject_alt_names();
        let read = |name: &openssl::x509::GeneralNameRef| {
            let octets = name.ipaddress();
            let v4 = octets.and_then(|octets| <[u8; 4]>::try_from(octets).ok());
            let v6 = octets.and_then(|octets| <[u8; 16]>::try_from(octets).ok());
            let ip = v4.map(IpAddr::from).or(v6.map(IpAddr::from));
            ip.map(Self::Ip)
                .or_else(|| Some(Self::Dns(name.dnsname()?.to_owned())))
        };
        names.iter().flatten().filter_map(read).collect()
    }

    /// As in RFC 6125: a `*` stands for the whole first label.
    fn is_for(&self, expected: &ServerName<'_>) -> bool {
        match (self, expected) {
            (Self::Ip(ip), ServerName::IpAddress(expected)) => *ip == IpAddr::from(*expected),
            (Self::Dns(name), ServerName::DnsName(expected)) => {
                let (name, expected) = (
                    name.trim_end_matches('.'),
                    expected.as_ref().trim_end_matches('.'),
                );
                let same_domain = name.strip_prefix("*.").zip(expected.split_once('.'));
                name.eq_ignore_ascii_case(expected)
                    || same_domain.is_some_and(|(domain, (_, expected))| {
                        domain.contains('.') && domain.eq_ignore_ascii_case(expected)
                    })
            }
            _ => false,
        }
    }
}

fn verify_name(certificate: &X509Ref, expected: &ServerName<'_>) -> Result<(), CertificateFault> {
    let names = Presented::all_of(certificate);
    if names.iter().any(|name| name.is_for(expected)) {
        return Ok(());
    }
    let host = expected.to_str();
    let mut shown: Vec<String> = names
        .iter()
        .take(MOST_NAMES)
        .map(|name| match name {
            Presented::Ip(ip) => format!("the IP address {ip}"),
            // A common mistake: a DNS name is never compared with an IP address.
            Presented::Dns(name) if name.parse::<IpAddr>().is_ok() => {
                format!("{name} as a DNS name, not as an IP address")
            }
            Presented::Dns(name) => shortened(name),
        })
        .collect();
    match names.len() {
        0 => shown.push("it has no subject alternative names".into()),
        count if count > MOST_NAMES => shown.push(format!("{} more", count - MOST_NAMES)),
        _ => {}
    }
    let what = if matches!(expected, ServerName::IpAddress(_)) {
        "the IP address "
    } else {
        ""
    };
    let only = if names.is_empty() { ": " } else { ", but for " };
    Err(CertificateFault::Name(format!(
        "the certificate is not for {what}{}{only}{}",
        shortened(&host),
        shown.join(", ")
    )))
}

fn shortened(name: &str) -> String {
    terminal::cut(name, MAX_NAME_CHARS)
}

/// The common name in quotes, or the organisation's name if there is none.
fn common_name(name: &openssl::x509::X509NameRef) -> String {
    let entry = |nid| name.entries_by_nid(nid).next()?.data().to_string().ok();
    match entry(Nid::COMMONNAME).or_else(|| entry(Nid::ORGANIZATIONNAME)) {
        Some(text) => format!("\"{}\"", shortened(&text)),
        None => "an unnamed certificate".to_owned(),
    }
}

fn reason(error: &ErrorStack) -> &'static str {
    error
        .errors()
        .last()
        .and_then(|error| error.reason())
        .unwrap_or("no reason")
}
