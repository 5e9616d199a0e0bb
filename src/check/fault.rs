//! What went wrong, in one word of the closed set and one line for a person.
//!
//! Owns the classification: by type, then by phase and code, never by message text. `tls_fault` has the words for TLS.

use std::io;

use super::outcome::Outcome;
use super::progress::{Phase, Progress};
use super::tls_fault::tls_fault;

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
    /// The answer is none of HTTP/1.
    #[error("not a valid response: {0}")]
    Protocol(&'static str),
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
    let peer = match seen.peer {
        Some(peer) => peer.to_string(),
        None => "the host".into(),
    };
    let fault = match error {
        ureq::Error::Other(inner) => inner.downcast_ref::<Fault>(),
        _ => None,
    };
    match fault {
        Some(Fault::Name(error)) => name_fault(error),
        Some(Fault::Io(error)) => match error.get_ref().and_then(|inner| inner.downcast_ref()) {
            Some(error) => tls_fault(error, seen.phase != Phase::Tls),
            None => io_fault(error, seen.phase, &peer),
        },
        Some(fault @ Fault::Protocol(_)) => (Outcome::ProtocolError, fault.to_string()),
        Some(Fault::Coding(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
            match seen.closed_by_peer {
                true => cut_body(&peer),
                false => (
                    Outcome::ProtocolError,
                    "the body cannot be decoded: it ends in the middle of its coding".into(),
                ),
            }
        }
        Some(Fault::Coding(error)) => (
            Outcome::ProtocolError,
            format!("the body cannot be decoded: {error}"),
        ),
        None => http_fault(error, seen, &peer),
    }
}

fn name_fault(error: &NameError) -> (Outcome, String) {
    let outcome = match error {
        NameError::NotFound(_) => Outcome::DnsNotFound,
        NameError::Failed(_) => Outcome::DnsError,
        NameError::TimedOut => Outcome::DnsTimeout,
        NameError::Agent(_) => Outcome::AgentError,
    };
    (outcome, error.to_string())
}

/// Of the socket.
fn io_fault(error: &io::Error, phase: Phase, peer: &str) -> (Outcome, String) {
    use io::ErrorKind as Kind;

    if is_agents_own(error) {
        let text = format!("this machine cannot make the connection: {error}");
        return (Outcome::AgentError, text);
    }
    if error.kind() == Kind::TimedOut {
        return timeout(phase, peer);
    }
    match phase {
        Phase::Dns | Phase::Connect => match error.kind() {
            Kind::ConnectionRefused => (Outcome::ConnectRefused, format!("connection refused by {peer}")),
            _ if is_unreachable(error) => (
                Outcome::ConnectUnreachable,
                format!("{peer} is unreachable: {error}"),
            ),
            _ => (
                Outcome::ConnectError,
                format!("cannot connect to {peer}: {error}"),
            ),
        },
        Phase::Tls => (
            Outcome::TlsError,
            match error.kind() {
                Kind::UnexpectedEof => format!("{peer} closed the connection during the TLS handshake"),
                _ => format!("TLS handshake with {peer}: {error}"),
            },
        ),
        Phase::Response => match error.kind() {
            Kind::UnexpectedEof | Kind::BrokenPipe => no_response(peer),
            Kind::ConnectionReset => (Outcome::ConnectionClosed, format!("{peer} reset the connection")),
            _ => (
                Outcome::ConnectionClosed,
                format!("the connection to {peer} was lost: {error}"),
            ),
        },
        Phase::Body => cut_body(peer),
    }
}

fn timeout(phase: Phase, peer: &str) -> (Outcome, String) {
    match phase {
        Phase::Dns => (Outcome::DnsTimeout, "no time left".into()),
        Phase::Connect => (
            Outcome::ConnectTimeout,
            format!("{peer} did not accept the connection in time"),
        ),
        Phase::Tls => (
            Outcome::TlsTimeout,
            format!("the TLS handshake with {peer} did not end in time"),
        ),
        Phase::Response => (
            Outcome::ResponseTimeout,
            format!("no complete response from {peer} in time"),
        ),
        Phase::Body => (
            Outcome::BodyTimeout,
            format!("the body from {peer} did not end in time"),
        ),
    }
}

/// What ureq itself found wrong with the response.
fn http_fault(error: &ureq::Error, seen: &Progress, peer: &str) -> (Outcome, String) {
    use ureq::Error as E;

    match error {
        E::BodyStalled if !seen.closed_by_peer => {
            (Outcome::ProtocolError, "the body's chunks are broken".into())
        }
        E::Io(_) | E::BodyStalled if seen.phase == Phase::Body => cut_body(peer),
        E::Io(_) | E::BodyStalled => no_response(peer),
        E::LargeResponseHeader(_, limit) => (
            Outcome::ProtocolError,
            format!("the response's headers are larger than {} KiB", limit / 1024),
        ),
        E::Protocol(error) => (Outcome::ProtocolError, format!("not a valid response: {error}")),
        other => (Outcome::ProtocolError, other.to_string()),
    }
}

fn no_response(peer: &str) -> (Outcome, String) {
    (
        Outcome::ConnectionClosed,
        format!("{peer} closed the connection without a complete response"),
    )
}

fn cut_body(peer: &str) -> (Outcome, String) {
    (
        Outcome::ConnectionClosed,
        format!("{peer} closed the connection before the end of the body"),
    )
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
