//! Classifies TLS errors: the outcome, and the cause in words. Why a certificate is not trusted is in `chain_verifier`.
//!
//! rustls has an enum variant for every rule of TLS that a server can break. Those that an operator can act on have a
//! sentence of their own here; for the others the variant's name is turned into words.

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
        E::PeerMisbehaved(error) => misbehaved_text(error),
        E::InvalidMessage(error) => message_text(error),
        E::InappropriateMessage { .. } | E::InappropriateHandshakeMessage { .. } => {
            "the server sent a TLS message out of order".into()
        }
        E::NoCertificatesPresented => "the server sent no certificate".into(),
        E::DecryptError => "the server sent data that cannot be decrypted".into(),
        E::PeerSentOversizedRecord => "the server sent a TLS record that is too large".into(),
        E::General(text) => format!("TLS: {text}"),
        E::Other(OtherError(error)) => format!("TLS: {error}"),
        other => format!("TLS: {}", in_words(other)),
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
        E::BadEncoding => "the certificate cannot be read".into(),
        E::UnsupportedSignatureAlgorithmContext { .. }
        | E::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
            "the server's signature of the handshake does not match its certificate's key, or is of a kind that this \
             program does not support"
                .into()
        }
        E::Other(OtherError(error)) => match error.downcast_ref::<webpki::Error>() {
            Some(error) => format!("the certificate is not accepted: {}", in_words(error)),
            None => format!("the certificate is not accepted: {error}"),
        },
        other => format!("the certificate is not accepted: {}", in_words(other)),
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
    let alert = match alert {
        A::Unknown(number) => format!("number {number}"),
        known => format!("\"{}\"", in_words(&known)),
    };
    let colon = if hint.is_empty() { "" } else { ": " };
    format!("the server ended TLS with the alert {alert}{colon}{hint}")
}

fn incompatible_text(error: &PeerIncompatible) -> String {
    use PeerIncompatible as E;

    match error {
        E::ServerDoesNotSupportTls12Or13
        | E::ServerTlsVersionIsDisabledByOurConfig
        | E::Tls12NotOffered
        | E::Tls12NotOfferedOrEnabled => OLD_TLS.into(),
        E::NoCertificateRequestSignatureSchemesInCommon => format!("the server {CLIENT_CERTIFICATE}"),
        other => format!(
            "the server and this program support no common kind of TLS: {}",
            in_words(other)
        ),
    }
}

fn misbehaved_text(error: &PeerMisbehaved) -> String {
    match error {
        PeerMisbehaved::TooManyRenegotiationRequests => {
            format!("the server repeatedly requested {RENEGOTIATION}")
        }
        PeerMisbehaved::SignedKxWithWrongAlgorithm => {
            "this program does not support the server's kind of key in TLS 1.2, only in TLS 1.3".into()
        }
        other => format!("the server violates the TLS protocol: {}", in_words(other)),
    }
}

fn message_text(error: &InvalidMessage) -> String {
    match error {
        InvalidMessage::InvalidContentType => "the server did not answer with TLS".into(),
        InvalidMessage::CertificatePayloadTooLarge | InvalidMessage::HandshakePayloadTooLarge => {
            "the server's certificates are larger than 64 KiB, the limit of this program".into()
        }
        other => format!("the server sent an invalid TLS message: {}", in_words(other)),
    }
}

/// The name of an enum variant in words: `SelectedInvalidPsk` becomes "selected invalid PSK".
fn in_words(variant: &impl std::fmt::Debug) -> String {
    let debug = format!("{variant:?}");
    let name = debug.split(|c: char| !c.is_ascii_alphanumeric()).next();
    let name = name.unwrap_or_default().trim_end_matches("Context").as_bytes();
    let begins_word = |at: &usize| {
        let is_small = |at: usize| name.get(at).is_some_and(|letter| !letter.is_ascii_uppercase());
        !is_small(*at) && (*at == 0 || is_small(at - 1) || is_small(at + 1))
    };
    let starts: Vec<usize> = (0..name.len()).filter(begins_word).chain([name.len()]).collect();
    let words = starts.windows(2).map(|word| {
        let word = String::from_utf8_lossy(&name[word[0]..word[1]]).to_ascii_lowercase();
        match word.as_str() {
            "tls12" => "TLS 1.2".to_owned(),
            "tls13" => "TLS 1.3".to_owned(),
            "cert" => "certificate".to_owned(),
            "kx" => "key exchange".to_owned(),
            "len" => "length".to_owned(),
            "sig" => "signature".to_owned(),
            "ca" | "ccs" | "crl" | "der" | "dh" | "dns" | "ec" | "ech" | "eku" | "ems" | "mac" | "ocsp"
            | "psk" | "quic" | "sct" | "tls" => word.to_ascii_uppercase(),
            _ => word,
        }
    });
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::crypto::KeyExchangeAlgorithm;
    use rustls::pki_types::{AlgorithmIdentifier, ServerName, UnixTime};
    use rustls::{
        CertRevocationListError, ContentType, EncryptedClientHelloError, ExtendedKeyPurpose, HandshakeType,
        InconsistentKeys,
    };

    use super::*;

    /// Every variant of rustls 0.23 and webpki 0.103, including those that cannot occur in a client.
    #[expect(deprecated, reason = "deprecated variants still exist")]
    fn all_errors() -> Vec<rustls::Error> {
        use rustls::Error as E;

        macro_rules! each {
            ($from:ty: $($variant:ident)*) => { vec![$(<$from>::$variant),*] };
        }
        let alerts = (0..=u8::MAX).map(|number| E::AlertReceived(number.into()));
        let messages = each!(InvalidMessage: CertificatePayloadTooLarge HandshakePayloadTooLarge InvalidCcs
            InvalidContentType InvalidCertificateStatusType InvalidCertRequest InvalidDhParams InvalidEmptyPayload
            InvalidKeyUpdate InvalidServerName MessageTooLarge MessageTooShort MissingKeyExchange NoSignatureSchemes
            UnknownProtocolVersion UnsupportedCompression UnsupportedCurveType EmptyTicketValue IllegalEmptyValue
            PreSharedKeyIsNotFinalExtension UnknownHelloRetryRequestExtension UnknownCertificateExtension)
        .into_iter()
        .chain([
            InvalidMessage::MissingData("Certificate"),
            InvalidMessage::TrailingData("Certificate"),
            InvalidMessage::UnexpectedMessage("Certificate"),
            InvalidMessage::UnsupportedKeyExchangeAlgorithm(KeyExchangeAlgorithm::DHE),
            InvalidMessage::IllegalEmptyList("Certificates"),
            InvalidMessage::DuplicateExtension(13),
        ]);
        let incompatible = each!(PeerIncompatible: EcPointsExtensionRequired ExtendedMasterSecretExtensionRequired
            IncorrectCertificateTypeExtension KeyShareExtensionRequired NamedGroupsExtensionRequired
            NoCertificateRequestSignatureSchemesInCommon NoCipherSuitesInCommon NoEcPointFormatsInCommon
            NoKxGroupsInCommon NoSignatureSchemesInCommon NullCompressionRequired ServerDoesNotSupportTls12Or13
            ServerSentHelloRetryRequestWithUnknownExtension ServerTlsVersionIsDisabledByOurConfig
            SignatureAlgorithmsExtensionRequired SupportedVersionsExtensionRequired Tls12NotOffered
            Tls12NotOfferedOrEnabled Tls13RequiredForQuic UncompressedEcPointsRequired
            UnsolicitedCertificateTypeExtension)
        .into_iter()
        .chain([PeerIncompatible::ServerRejectedEncryptedClientHello(None)]);
        let misbehaved = each!(PeerMisbehaved: AttemptedDowngradeToTls12WhenTls13IsSupported BadCertChainExtensions
            CipherSuiteDifferedOnRetry DisallowedEncryptedExtension DuplicateClientHelloExtensions
            DuplicateEncryptedExtensions DuplicateHelloRetryRequestExtensions DuplicateNewSessionTicketExtensions
            DuplicateServerHelloExtensions DuplicateServerNameTypes EarlyDataAttemptedInSecondClientHello
            EarlyDataExtensionWithoutResumption EarlyDataOfferedWithVariedCipherSuite EchAcceptanceVariedAfterRetry
            HandshakeHashVariedAfterRetry IllegalHelloRetryRequestWithEmptyCookie IllegalHelloRetryRequestWithNoChanges
            IllegalHelloRetryRequestWithOfferedGroup IllegalHelloRetryRequestWithUnofferedCipherSuite
            IllegalHelloRetryRequestWithUnofferedNamedGroup IllegalHelloRetryRequestWithUnsupportedVersion
            IllegalHelloRetryRequestWithWrongSessionId IllegalHelloRetryRequestWithInvalidEch
            IllegalMiddleboxChangeCipherSpec IllegalTlsInnerPlaintext IncorrectBinder InvalidCertCompression
            InvalidMaxEarlyDataSize InvalidKeyShare KeyEpochWithPendingFragment KeyUpdateReceivedInQuicConnection
            MessageInterleavedWithHandshakeMessage MissingBinderInPskExtension MissingKeyShare
            MissingPskExtensionInSecondClientHello MissingPskModesExtension MissingQuicTransportParameters
            OfferedDuplicateCertificateCompressions OfferedDuplicateKeyShares OfferedEarlyDataWithOldProtocolVersion
            OfferedEmptyApplicationProtocol OfferedIncorrectCompressions PskExtensionMustBeLast
            PskExtensionWithMismatchedIdsAndBinders RefusedToFollowHelloRetryRequest
            RejectedEarlyDataInterleavedWithHandshakeMessage ResumptionAttemptedWithVariedEms
            ResumptionOfferedWithVariedCipherSuite ResumptionOfferedWithVariedEms
            ResumptionOfferedWithIncompatibleCipherSuite SelectedDifferentCipherSuiteAfterRetry SelectedInvalidPsk
            SelectedTls12UsingTls13VersionExtension SelectedUnofferedApplicationProtocol
            SelectedUnofferedCertCompression SelectedUnofferedCipherSuite SelectedUnofferedCompression
            SelectedUnofferedKxGroup SelectedUnofferedPsk SelectedUnusableCipherSuiteForVersion
            ServerEchoedCompatibilitySessionId ServerHelloMustOfferUncompressedEcPoints ServerNameDifferedOnRetry
            ServerNameMustContainOneHostName SignedKxWithWrongAlgorithm SignedHandshakeWithUnadvertisedSigScheme
            TooManyEmptyFragments TooManyKeyUpdateRequests TooManyRenegotiationRequests TooManyWarningAlertsReceived
            TooMuchEarlyDataReceived UnexpectedCleartextExtension UnsolicitedCertExtension
            UnsolicitedEncryptedExtension UnsolicitedSctList UnsolicitedServerHelloExtension WrongGroupForKeyShare
            UnsolicitedEchExtension);
        let time = UnixTime::now();
        let id = || vec![6, 8, 42];
        let ids = || vec![AlgorithmIdentifier::from_slice(&[6, 8, 42])];
        let unsupported = || webpki::UnsupportedSignatureAlgorithmContext {
            signature_algorithm_id: id(),
            supported_algorithms: ids(),
        };
        let unfit = || webpki::UnsupportedSignatureAlgorithmForPublicKeyContext {
            signature_algorithm_id: id(),
            public_key_algorithm_id: id(),
        };
        let of_webpki = each!(webpki::Error: BadDer BadDerTime CaUsedAsEndEntity CertDistrusted CertRevoked
            EmptyEkuExtension EndEntityUsedAsCa ExtensionValueInvalid InvalidCertValidity InvalidCrlNumber
            InvalidNetworkMaskConstraint InvalidSerialNumber InvalidCrlSignatureForPublicKey
            InvalidSignatureForPublicKey IssuerNotCrlSigner MalformedDnsIdentifier MalformedExtensions
            MalformedNameConstraint MaximumNameConstraintComparisonsExceeded MaximumPathBuildCallsExceeded
            MaximumPathDepthExceeded MaximumSignatureChecksExceeded NameConstraintViolation PathLenConstraintViolated
            RequiredEkuNotFound SignatureAlgorithmMismatch UnknownIssuer UnknownRevocationStatus
            UnsupportedCertVersion UnsupportedCriticalExtension UnsupportedCrlIssuingDistributionPoint
            UnsupportedCrlVersion UnsupportedDeltaCrl UnsupportedIndirectCrl UnsupportedNameType
            UnsupportedRevocationReason UnsupportedRevocationReasonsPartitioning UnsupportedCrlSignatureAlgorithm
            UnsupportedSignatureAlgorithm UnsupportedCrlSignatureAlgorithmForPublicKey
            UnsupportedSignatureAlgorithmForPublicKey)
        .into_iter()
        .chain([
            webpki::Error::CertExpired { time, not_after: time },
            webpki::Error::CertNotValidYet { time, not_before: time },
            webpki::Error::CrlExpired { time, next_update: time },
            webpki::Error::CertNotValidForName(webpki::InvalidNameContext {
                expected: ServerName::try_from("site.test").unwrap(),
                presented: vec!["DnsName(\"a.test\")".into()],
            }),
            webpki::Error::TrailingData(webpki::DerTypeId::Certificate),
            webpki::Error::RequiredEkuNotFoundContext(webpki::RequiredEkuNotFoundContext {
                required: webpki::KeyUsage::server_auth(),
                present: vec![vec![1, 3, 6]],
            }),
            webpki::Error::UnsupportedCrlSignatureAlgorithmContext(unsupported()),
            webpki::Error::UnsupportedSignatureAlgorithmContext(unsupported()),
            webpki::Error::UnsupportedCrlSignatureAlgorithmForPublicKeyContext(unfit()),
            webpki::Error::UnsupportedSignatureAlgorithmForPublicKeyContext(unfit()),
        ])
        .map(|error| CertificateError::Other(OtherError(Arc::new(error))));
        let certificates = each!(CertificateError: BadEncoding Expired NotValidYet Revoked UnhandledCriticalExtension
            UnknownIssuer UnknownRevocationStatus ExpiredRevocationList BadSignature UnsupportedSignatureAlgorithm
            NotValidForName InvalidPurpose InvalidOcspResponse ApplicationVerificationFailure)
        .into_iter()
        .chain([
            CertificateError::ExpiredContext { time, not_after: time },
            CertificateError::NotValidYetContext { time, not_before: time },
            CertificateError::ExpiredRevocationListContext { time, next_update: time },
            CertificateError::UnsupportedSignatureAlgorithmContext {
                signature_algorithm_id: id(),
                supported_algorithms: ids(),
            },
            CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext {
                signature_algorithm_id: id(),
                public_key_algorithm_id: id(),
            },
            CertificateError::NotValidForNameContext {
                expected: ServerName::try_from("127.0.0.1").unwrap(),
                presented: vec!["IpAddress(0x01)".into()],
            },
            CertificateError::InvalidPurposeContext {
                required: ExtendedKeyPurpose::ServerAuth,
                presented: vec![ExtendedKeyPurpose::Other(vec![1, 3, 6])],
            },
        ])
        .chain(of_webpki);
        let others = [
            E::InappropriateMessage {
                expect_types: vec![ContentType::Alert],
                got_type: ContentType::Handshake,
            },
            E::InappropriateHandshakeMessage {
                expect_types: vec![HandshakeType::Finished],
                got_type: HandshakeType::Unknown(99),
            },
            E::InvalidEncryptedClientHello(EncryptedClientHelloError::SniRequired),
            E::NoCertificatesPresented,
            E::UnsupportedNameType,
            E::DecryptError,
            E::EncryptError,
            E::InvalidCertRevocationList(CertRevocationListError::BadSignature),
            E::General("something went wrong".into()),
            E::FailedToGetCurrentTime,
            E::FailedToGetRandomBytes,
            E::HandshakeNotComplete,
            E::PeerSentOversizedRecord,
            E::NoApplicationProtocol,
            E::BadMaxFragmentSize,
            E::InconsistentKeys(InconsistentKeys::KeyMismatch),
            E::Other(OtherError(Arc::new(std::fmt::Error))),
        ];
        alerts
            .chain(messages.map(E::InvalidMessage))
            .chain(incompatible.map(E::PeerIncompatible))
            .chain(misbehaved.into_iter().map(E::PeerMisbehaved))
            .chain(certificates.map(E::InvalidCertificate))
            .chain(others)
            .collect()
    }

    #[test]
    fn every_tls_error_has_a_sentence() {
        for error in all_errors() {
            for is_established in [false, true] {
                let (outcome, text) = tls_fault(&error, is_established);
                let expected = match error {
                    rustls::Error::InvalidCertificate(_) => Outcome::TlsCertUntrusted,
                    _ => Outcome::TlsError,
                };
                assert_eq!(outcome, expected, "{error:?}");
                assert!(text.chars().count() <= 200, "too long: {text}");
                assert!(
                    text.contains(' ') && !text.ends_with([' ', ':']),
                    "not a sentence: {text}"
                );
                // Words of the sentences with a capital letter inside.
                let plain = ["ChaCha20", "KiB"]
                    .iter()
                    .fold(text.clone(), |text, word| text.replace(word, ""));
                let is_debug = |pair: &[u8]| pair[0].is_ascii_lowercase() && pair[1].is_ascii_uppercase();
                assert!(!plain.as_bytes().windows(2).any(is_debug), "debug output: {text}");
                assert!(
                    !text.contains(['{', '[', '_']) && !text.contains("0x"),
                    "debug output: {text}"
                );
            }
        }
    }

    #[test]
    fn the_name_of_a_variant_becomes_words() {
        assert_eq!(in_words(&AlertDescription::UnknownCA), "unknown CA");
        assert_eq!(
            in_words(&AlertDescription::UnknownPSKIdentity),
            "unknown PSK identity"
        );
        assert_eq!(
            in_words(&PeerMisbehaved::AttemptedDowngradeToTls12WhenTls13IsSupported),
            "attempted downgrade to TLS 1.2 when TLS 1.3 is supported"
        );
        assert_eq!(
            in_words(&InvalidMessage::MissingData("Certificate")),
            "missing data"
        );
    }

    #[test]
    fn an_alert_is_explained() {
        let says = |alert, is_established| tls_fault(&rustls::Error::AlertReceived(alert), is_established).1;
        assert_eq!(
            says(AlertDescription::HandshakeFailure, false),
            "the server ended TLS with the alert \"handshake failure\": it may require a client certificate, or TLS 1.2 \
             without ECDHE or AES-GCM/ChaCha20, which this program does not support"
        );
        assert_eq!(
            says(AlertDescription::HandshakeFailure, true),
            "the server ended TLS with the alert \"handshake failure\": it may require renegotiation, which this program \
             does not support"
        );
        assert_eq!(
            says(AlertDescription::Unknown(200), false),
            "the server ended TLS with the alert number 200"
        );
    }
}
