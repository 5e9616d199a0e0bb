//! Classifies a failed check: its outcome, and the cause in words.
//!
//! The classification uses the error's type, then the phase and the error code, never a message's text. `tls_fault` does
//! the same for TLS.

use std::io;

use super::progress::{Phase, Progress};
use super::tls_fault::tls_fault;
use crate::sample::Outcome;

/// Why the lookup of a name failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The name does not exist, or has no address of the requested family.
    #[error("{0}")]
    NotFound(String),
    /// The name servers failed, refused to answer or could not be reached.
    #[error("{0}")]
    Failed(String),
    /// This machine could not send the query.
    #[error("{0}")]
    Agent(String),
    /// The check's deadline passed, or the system's resolver gave up waiting.
    #[error("the name servers did not answer in time")]
    TimedOut,
}

/// An error of the resolver, the connector or the transport. It passes through ureq unchanged, so that it can be told from
/// ureq's own errors.
#[derive(Debug, thiserror::Error)]
pub(super) enum CheckFault {
    #[error(transparent)]
    Name(NameError),
    /// From the socket or, with a [`rustls::Error`] inside, from TLS. `TimedOut` means that the check's deadline passed.
    #[error(transparent)]
    Io(io::Error),
    /// The response is not valid HTTP/1.
    #[error("not a valid response: {0}")]
    Protocol(&'static str),
    /// The proxy refused to connect to the host.
    #[error("it answered CONNECT with status {0}")]
    ProxyStatus(u16),
    /// The body is not what its Content-Encoding says.
    #[error(transparent)]
    Coding(io::Error),
}

impl From<CheckFault> for ureq::Error {
    fn from(fault: CheckFault) -> Self {
        Self::Other(Box::new(fault))
    }
}

/// Whether this machine is out of file handles, memory or ports. That is never the host's fault.
pub(super) fn is_agents_own(error: &io::Error) -> bool {
    // std has no `ErrorKind` for these. The first two are the same on every Unix.
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    const ENOBUFS: i32 = if cfg!(target_os = "linux") { 105 } else { 55 };
    matches!(error.raw_os_error(), Some(ENFILE | EMFILE | ENOBUFS))
        || matches!(
            error.kind(),
            io::ErrorKind::OutOfMemory | io::ErrorKind::AddrNotAvailable
        )
}

/// The outcome of a failed exchange, and its cause in words.
pub(super) fn classify(error: &ureq::Error, seen: &Progress) -> (Outcome, String) {
    match classify_peer(error, seen) {
        (Outcome::AgentError, text) => (Outcome::AgentError, text),
        (_, text) if seen.at_proxy => (Outcome::ProxyError, format!("the proxy failed: {text}")),
        fault => fault,
    }
}

/// The same, whether the peer is the host or the proxy.
fn classify_peer(error: &ureq::Error, seen: &Progress) -> (Outcome, String) {
    let peer = match seen.peer {
        Some(peer) => peer.to_string(),
        None => "the host".into(),
    };
    let fault = match error {
        ureq::Error::Other(inner) => inner.downcast_ref::<CheckFault>(),
        _ => None,
    };
    match fault {
        Some(CheckFault::Name(error)) => name_fault(error),
        Some(CheckFault::Io(error)) => match error.get_ref().and_then(|inner| inner.downcast_ref()) {
            Some(error) => tls_fault(error, seen.phase != Phase::Tls),
            None => io_fault(error, seen.phase, &peer),
        },
        Some(fault @ CheckFault::Protocol(_)) => (Outcome::ProtocolError, fault.to_string()),
        Some(fault @ CheckFault::ProxyStatus(_)) => (Outcome::ProxyError, fault.to_string()),
        Some(CheckFault::Coding(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
            match seen.closed_by_peer {
                true => cut_body(&peer),
                false => (
                    Outcome::ProtocolError,
                    "the body cannot be decoded: it ends too early".into(),
                ),
            }
        }
        Some(CheckFault::Coding(error)) => (
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

/// Classifies an error of the socket.
fn io_fault(error: &io::Error, phase: Phase, peer: &str) -> (Outcome, String) {
    use io::ErrorKind as Kind;

    if is_agents_own(error) {
        let text = format!("this machine cannot connect: {error}");
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
                _ => format!("the TLS handshake with {peer} failed: {error}"),
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
        Phase::Dns => (
            Outcome::DnsTimeout,
            "the time of the check was over before the name lookup".into(),
        ),
        Phase::Connect => (
            Outcome::ConnectTimeout,
            format!("{peer} did not accept the connection in time"),
        ),
        Phase::Tls => (
            Outcome::TlsTimeout,
            format!("the TLS handshake with {peer} did not finish in time"),
        ),
        Phase::Response => (
            Outcome::ResponseTimeout,
            format!("{peer} did not send a complete response in time"),
        ),
        Phase::Body => (
            Outcome::BodyTimeout,
            format!("{peer} did not send the whole body in time"),
        ),
    }
}

/// Classifies what ureq itself found wrong with the response.
fn http_fault(error: &ureq::Error, seen: &Progress, peer: &str) -> (Outcome, String) {
    use ureq::Error as E;

    match error {
        E::BodyStalled if !seen.closed_by_peer => {
            (Outcome::ProtocolError, "the body's chunks are not valid".into())
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

/// Whether there is no route to the address, according to this machine's routing table or a router's ICMP message.
pub(super) fn is_unreachable(error: &io::Error) -> bool {
    /// A router forbids the connection. The number is the same on every Unix. std's kind for it does not tell it from EPERM,
    /// which comes from a filter on this machine.
    const EACCES: i32 = 13;
    /// This machine has no IPv6.
    const EAFNOSUPPORT: i32 = if cfg!(target_os = "linux") { 97 } else { 47 };
    matches!(error.raw_os_error(), Some(EACCES | EAFNOSUPPORT))
        || matches!(
            error.kind(),
            io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkDown
        )
}
