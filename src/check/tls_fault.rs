//! Classifies TLS errors: the outcome, and the cause in words. Why a certificate is not trusted is in `chain_verifier`.
//!
//! rustls has an enum variant for every rule of TLS that a server can break. Those that an operator can act on have a
//! sentence of their own here; the others keep rustls's text.

use rustls::{
    AlertDescription, CertificateError, InvalidMessage, OtherError, PeerIncompatible, PeerMisbehaved,
};

use super::chain_verifier::CertificateFault;
use crate::sample::Outcome;

const OLD_TLS: &str = "the server only supports TLS 1.1 or older; TLS 1.2 or newer is required";

const CLIENT_CERTIFICATE: &str = "requires a client certificate, and a check has none";

/// The usual reasons of servers that do not give one.
const LIMITS: &str = "may require a client certificate, or TLS 1.2 without ECDHE or AES-GCM/ChaCha20, which this program does not support";

const RENEGOTIATION: &str = "renegotiation, which this program does not support";

/// The outcome of a TLS error and its cause in words. `is_established`: the handshake was already complete.
pub(super) fn tls_fault(error: &rustls::Error, is_established: bool) -> (Outcome, String) {
    use rustls::Error as E;

    let text = match error {
        E::InvalidCertificate(error) => return certificate_fault(error),
        E::AlertReceived(alert) => alert_text(*alert, is_established),
        E::PeerIncompatible(error) => incompatible_text(error),
        E::PeerMisbehaved(PeerMisbehaved::TooManyRenegotiationRequests) => {
            format!("the server repeatedly requested {RENEGOTIATION}")
        }
        E::PeerMisbehaved(PeerMisbehaved::SignedKxWithWrongAlgorithm) => {
            "this program does not support the server's kind of key in TLS 1.2, only in TLS 1.3".into()
        }
        E::InvalidMessage(InvalidMessage::InvalidContentType) => "the server did not answer with TLS".into(),
        E::InvalidMessage(
            InvalidMessage::CertificatePayloadTooLarge | InvalidMessage::HandshakePayloadTooLarge,
        ) => "the server's certificates are larger than 64 KiB, the limit of this program".into(),
        E::NoCertificatesPresented => "the server sent no certificate".into(),
        other => format!("TLS: {other}"),
    };
    (Outcome::TlsError, text)
}

fn certificate_fault(error: &CertificateError) -> (Outcome, String) {
    use CertificateError as E;

    if let E::Other(OtherError(error)) = error
        && let Some(fault) = error.downcast_ref::<CertificateFault>()
    {
        let outcome = match fault {
            CertificateFault::Dates(_) => Outcome::TlsCertExpired,
            CertificateFault::Name(_) => Outcome::TlsCertName,
            CertificateFault::NoAnchors | CertificateFault::Untrusted(_) => Outcome::TlsCertUntrusted,
        };
        return (outcome, fault.to_string());
    }
    // The chain has already been accepted: these are errors of the server's own signature of the handshake.
    let text = match error {
        E::BadSignature => "the server does not have the certificate's key: its signature of the handshake is wrong".into(),
        E::UnsupportedSignatureAlgorithmContext { .. }
        | E::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
            "the server's signature of the handshake does not match its certificate's key, or is of a kind that this \
             program does not support"
                .into()
        }
        other => format!("the certificate is not accepted: {other}"),
    };
    (Outcome::TlsCertUntrusted, text)
}

fn alert_text(alert: AlertDescription, is_established: bool) -> String {
    use AlertDescription as A;

    let hint = match alert {
        A::ProtocolVersion => "it may only support TLS 1.1 or older; TLS 1.2 or newer is required".into(),
        A::HandshakeFailure | A::NoRenegotiation if is_established => {
            format!("it may require {RENEGOTIATION}")
        }
        A::HandshakeFailure | A::InsufficientSecurity => format!("it {LIMITS}"),
        A::CertificateRequired | A::NoCertificate | A::BadCertificate => format!("it {CLIENT_CERTIFICATE}"),
        A::UnrecognisedName => "it has no site with the requested name".into(),
        A::InternalError => "the server has an internal problem".into(),
        _ => String::new(),
    };
    let colon = if hint.is_empty() { "" } else { ": " };
    format!("the server ended TLS with the alert {alert:?}{colon}{hint}")
}

fn incompatible_text(error: &PeerIncompatible) -> String {
    use PeerIncompatible as E;

    match error {
        E::ServerDoesNotSupportTls12Or13
        | E::ServerTlsVersionIsDisabledByOurConfig
        | E::Tls12NotOffered
        | E::Tls12NotOfferedOrEnabled => OLD_TLS.into(),
        E::NoCertificateRequestSignatureSchemesInCommon => format!("the server {CLIENT_CERTIFICATE}"),
        other => format!("the server and this program support no common kind of TLS: {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alert_is_explained() {
        let says = |alert, is_established| tls_fault(&rustls::Error::AlertReceived(alert), is_established).1;
        assert_eq!(
            says(AlertDescription::HandshakeFailure, false),
            "the server ended TLS with the alert HandshakeFailure: it may require a client certificate, or TLS 1.2 \
             without ECDHE or AES-GCM/ChaCha20, which this program does not support"
        );
        assert_eq!(
            says(AlertDescription::HandshakeFailure, true),
            "the server ended TLS with the alert HandshakeFailure: it may require renegotiation, which this program \
             does not support"
        );
        assert_eq!(
            says(AlertDescription::Unknown(200), false),
            "the server ended TLS with the alert AlertDescription(0xc8)"
        );
    }
}
