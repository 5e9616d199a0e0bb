//! What went wrong, in one word of the closed set and one line for a person.
//!
//! Owns the whole classification: one match over type, code and phase, never over message text.

use std::io;

use rustls::{CertificateError, OtherError};

use super::outcome::Outcome;
use super::progress::{Phase, Progress};

/// Why a name has no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// There is no such name, or it has no address of the asked family.
    #[error("{0}")]
    NotFound(String),
    /// The name servers failed, refused or were not there.
    #[error("{0}")]
    Failed(String),
    /// This machine could not even ask.
    #[error("{0}")]
    Agent(String),
    /// The check's time was over, or that of the system's resolver.
    #[error("no answer from the name servers in time")]
    TimedOut,
}

/// What our own parts report, through ureq: errors of ureq's own stay apart from those of the socket this way.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error(transparent)]
    Name(NameError),
    /// Of the socket, or of TLS (then a [`rustls::Error`] is inside); `TimedOut` is the check's deadline.
    #[error(transparent)]
    Io(io::Error),
    /// The body is not what its Content-Encoding says.
    #[error(transparent)]
    Coding(io::Error),
}

impl From<Fault> for ureq::Error {
    fn from(fault: Fault) -> Self {
        Self::Other(Box::new(fault))
    }
}

/// This machine has no handle, memory or port left: no host's fault, whatever was being done.
pub(super) fn is_agents_own(error: &io::Error) -> bool {
    // The numbers that std has no kind for; the first two are the same on every Unix.
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    const ENOBUFS: i32 = if cfg!(target_os = "linux") { 105 } else { 55 };
    matches!(error.raw_os_error(), Some(ENFILE | EMFILE | ENOBUFS))
        || matches!(
            error.kind(),
            io::ErrorKind::OutOfMemory | io::ErrorKind::AddrNotAvailable
        )
}

/// The outcome of a failure, and its cause for a person.
pub(super) fn classify(error: &ureq::Error, seen: &Progress) -> (Outcome, String) {
    use io::ErrorKind as Kind;
    use ureq::Error as E;

    let (fault, own) = match error {
        E::Other(inner) => (inner.downcast_ref::<Fault>(), None),
        other => (None, Some(other)),
    };
    let io = match fault {
        Some(Fault::Io(io)) => Some(io),
        _ => None,
    };
    let tls = io
        .and_then(io::Error::get_ref)
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let peer = match seen.peer {
        Some(peer) => peer.to_string(),
        None => "the host".into(),
    };

    match (seen.phase, fault, tls, io.map(io::Error::kind), own) {
        (_, Some(Fault::Name(error)), ..) => {
            let outcome = match error {
                NameError::NotFound(_) => Outcome::DnsNotFound,
                NameError::Failed(_) => Outcome::DnsError,
                NameError::TimedOut => Outcome::DnsTimeout,
                NameError::Agent(_) => Outcome::AgentError,
            };
            (outcome, error.to_string())
        }
        (_, Some(Fault::Io(error)), None, ..) if is_agents_own(error) => (
            Outcome::AgentError,
            format!("this machine cannot make the connection: {error}"),
        ),

        (Phase::Dns, _, _, Some(Kind::TimedOut), _) => (Outcome::DnsTimeout, "no time left".into()),
        (Phase::Connect, _, _, Some(Kind::TimedOut), _) => (
            Outcome::ConnectTimeout,
            format!("{peer} did not accept the connection in time"),
        ),
        (Phase::Tls, _, _, Some(Kind::TimedOut), _) => (
            Outcome::TlsTimeout,
            format!("the TLS handshake with {peer} did not end in time"),
        ),
        (Phase::Response, _, _, Some(Kind::TimedOut), _) => (
            Outcome::ResponseTimeout,
            format!("no complete response from {peer} in time"),
        ),
        (Phase::Body, _, _, Some(Kind::TimedOut), _) => (
            Outcome::BodyTimeout,
            format!("the body from {peer} did not end in time"),
        ),

        (Phase::Connect, _, _, Some(Kind::ConnectionRefused), _) => {
            (Outcome::ConnectRefused, format!("connection refused by {peer}"))
        }
        (Phase::Connect, Some(Fault::Io(error)), _, Some(_), _) if is_unreachable(error) => (
            Outcome::ConnectUnreachable,
            format!("{peer} is unreachable: {error}"),
        ),
        (Phase::Connect, Some(Fault::Io(error)), ..) => (
            Outcome::ConnectError,
            format!("cannot connect to {peer}: {error}"),
        ),

        (_, _, Some(rustls::Error::InvalidCertificate(cause)), ..) => certificate(cause),
        (_, _, Some(error), ..) => (Outcome::TlsError, tls_text(error)),
        (Phase::Tls, _, _, Some(Kind::UnexpectedEof), _) => (
            Outcome::TlsError,
            format!("{peer} closed the connection during the TLS handshake"),
        ),
        (Phase::Tls, Some(Fault::Io(error)), ..) => {
            (Outcome::TlsError, format!("TLS handshake with {peer}: {error}"))
        }

        (_, Some(Fault::Coding(error)), ..) if error.kind() == Kind::UnexpectedEof && seen.closed_by_peer => {
            (
                Outcome::ConnectionClosed,
                format!("{peer} closed the connection before the end of the body"),
            )
        }
        (_, Some(Fault::Coding(error)), ..) if error.kind() == Kind::UnexpectedEof => (
            Outcome::ProtocolError,
            "the body cannot be decoded: it ends in the middle of its coding".into(),
        ),
        (_, Some(Fault::Coding(error)), ..) => (
            Outcome::ProtocolError,
            format!("the body cannot be decoded: {error}"),
        ),
        (_, _, _, _, Some(E::BodyStalled)) if !seen.closed_by_peer => {
            (Outcome::ProtocolError, "the body's chunks are broken".into())
        }
        (Phase::Body, Some(Fault::Io(_)), ..) | (Phase::Body, _, _, _, Some(E::Io(_) | E::BodyStalled)) => (
            Outcome::ConnectionClosed,
            format!("{peer} closed the connection before the end of the body"),
        ),
        (_, Some(Fault::Io(error)), ..) if error.kind() == Kind::ConnectionReset => {
            (Outcome::ConnectionClosed, format!("{peer} reset the connection"))
        }
        (_, Some(Fault::Io(error)), ..)
            if !matches!(error.kind(), Kind::UnexpectedEof | Kind::BrokenPipe) =>
        {
            (
                Outcome::ConnectionClosed,
                format!("the connection to {peer} was lost: {error}"),
            )
        }
        (_, Some(Fault::Io(_)), ..) | (_, _, _, _, Some(E::Io(_) | E::BodyStalled)) => (
            Outcome::ConnectionClosed,
            format!("{peer} closed the connection without a complete response"),
        ),

        (_, _, _, _, Some(E::LargeResponseHeader(_, limit))) => (
            Outcome::ProtocolError,
            format!("the response's headers are larger than {} KiB", limit / 1024),
        ),
        (_, _, _, _, Some(E::Protocol(error))) => {
            (Outcome::ProtocolError, format!("not a valid response: {error}"))
        }
        _ => (Outcome::ProtocolError, error.to_string()),
    }
}

/// No way there: said by this machine's routing table or by a router's ICMP.
pub(super) fn is_unreachable(error: &io::Error) -> bool {
    /// The way is forbidden, the same number on every Unix. std's kind for it is that of EPERM too, which is what a
    /// filter on this machine says.
    const EACCES: i32 = 13;
    /// A machine without IPv6 at all.
    const EAFNOSUPPORT: i32 = if cfg!(target_os = "linux") { 97 } else { 47 };
    matches!(error.raw_os_error(), Some(EACCES | EAFNOSUPPORT))
        || matches!(
            error.kind(),
            io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkDown
        )
}

fn certificate(cause: &CertificateError) -> (Outcome, String) {
    match cause {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            (Outcome::TlsCertExpired, "the certificate has expired".into())
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            (Outcome::TlsCertExpired, "the certificate is not valid yet".into())
        }
        CertificateError::NotValidForName => {
            (Outcome::TlsCertName, "the certificate is for another name".into())
        }
        CertificateError::NotValidForNameContext { expected, presented } if presented.is_empty() => (
            Outcome::TlsCertName,
            format!("the certificate is not for {}: it holds no names", expected.to_str()),
        ),
        CertificateError::NotValidForNameContext { expected, presented } => (
            Outcome::TlsCertName,
            format!("the certificate is not for {}, only for {}", expected.to_str(), names(presented)),
        ),
        CertificateError::UnknownIssuer => (
            Outcome::TlsCertUntrusted,
            "the certificate is not trusted: self-signed, from an unknown issuer, or without its intermediates".into(),
        ),
        CertificateError::Other(OtherError(cause)) => (
            Outcome::TlsCertUntrusted,
            match cause.downcast_ref() {
                Some(webpki::Error::CaUsedAsEndEntity) => {
                    "the certificate is not trusted: a certificate authority's instead of a server's, as self-signed ones often are".into()
                }
                _ => format!("the certificate is not trusted: {cause}"),
            },
        ),
        other => (Outcome::TlsCertUntrusted, format!("the certificate is not trusted: {other}")),
    }
}

/// `DnsName("a.example")`, as rustls has them, as `a.example`.
fn names(presented: &[String]) -> String {
    let bare = |name: &String| {
        let inner = name.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')'));
        inner.unwrap_or(name).trim_matches('"').to_owned()
    };
    presented.iter().map(bare).collect::<Vec<_>>().join(", ")
}

fn tls_text(error: &rustls::Error) -> String {
    match error {
        rustls::Error::AlertReceived(alert) => format!("the server ended TLS with the alert {alert:?}"),
        rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType) => {
            "the server does not speak TLS".into()
        }
        other => format!("TLS: {other}"),
    }
}
