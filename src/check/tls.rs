//! TLS for one connection: rustls without session resumption, and a verifier that also reads certificates it rejects.
//!
//! ureq's own TLS resumes sessions. In a resumed session the server does not send its certificate, so a new bad
//! certificate would not be noticed.

use std::io;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, ProtocolVersion, RootCertStore, SignatureScheme,
    StreamOwned,
};

use super::chain_verifier::{self, Anchors, FURTHER_SCHEMES, expires_at, verify_signature};
use super::p521::Secp521r1;
use super::progress::SharedProgress;
use crate::config::pem;
use crate::socket::{Socket, is_cut};

/// The trust anchors and TLS settings of all checks. Cheap to clone.
#[derive(Clone)]
pub(super) struct Trust {
    anchors: Arc<Anchors>,
    /// Everything except the verifier; used alone, it would reject every certificate.
    base: Arc<ClientConfig>,
}

impl Trust {
    /// The system's trust anchors and those of CHECK_CA_FILE.
    ///
    /// # Errors
    /// CHECK_CA_FILE cannot be read, although it could when the configuration was read.
    pub(super) fn load(ca_file: Option<&Path>) -> anyhow::Result<Self> {
        let system = rustls_native_certs::load_native_certs();
        for error in &system.errors {
            log::warn!("cannot read one of this machine's trusted CA certificates: {error}");
        }
        let mut certificates = system.certs;
        if let Some(path) = ca_file {
            let further = read_file(path).with_context(|| format!("CHECK_CA_FILE {}", path.display()))?;
            certificates.extend(further);
        }
        let anchors = Anchors::new(certificates);
        if anchors.is_empty() {
            log::warn!(
                "this machine has no trusted CA certificates: every https check will fail as tls_cert_untrusted; \
                 install the system's ca-certificates or set CHECK_CA_FILE"
            );
        }
        let mut provider = rustls::crypto::ring::default_provider();
        provider.kx_groups.push(&Secp521r1);
        let mut base = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        base.resumption = Resumption::disabled();
        Ok(Self {
            anchors: Arc::new(anchors),
            base: Arc::new(base),
        })
    }

    /// The settings of one checker's connections. Its verifier writes what it reads to `progress`, which also has the client
    /// certificate of the current request.
    pub(super) fn client_config(&self, progress: SharedProgress) -> Arc<ClientConfig> {
        let mut config = ClientConfig::clone(&self.base);
        config.client_auth_cert_resolver = Arc::new(ClientCertificate(progress.clone()));
        config.dangerous().set_certificate_verifier(Arc::new(Verifier {
            trust: self.clone(),
            progress,
        }));
        Arc::new(config)
    }

    fn algorithms(&self) -> &WebPkiSupportedAlgorithms {
        &self.base.crypto_provider().signature_verification_algorithms
    }
}

/// Performs the handshake on a new connection, before the socket's deadline.
pub(super) fn handshake(
    config: &Arc<ClientConfig>,
    host: &str,
    mut socket: Socket,
) -> io::Result<StreamOwned<ClientConnection, Socket>> {
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    let mut tls = ClientConnection::new(Arc::clone(config), name).map_err(io::Error::other)?;
    if let Err(error) = tls.complete_io(&mut socket) {
        let alert = is_cut(&error)
            .then(|| received_alert(&mut tls, &mut socket))
            .flatten();
        return Err(alert.unwrap_or(error));
    }
    if tls.is_handshaking() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(StreamOwned::new(tls, socket))
}

/// Version and cipher suite, as in `TLS 1.3, TLS_AES_128_GCM_SHA256`.
pub(super) fn describe(tls: &ClientConnection) -> Option<String> {
    let version = match tls.protocol_version()? {
        ProtocolVersion::TLSv1_3 => "TLS 1.3",
        _ => "TLS 1.2",
    };
    let suite = tls.negotiated_cipher_suite()?.suite().as_str()?;
    // rustls calls those of TLS 1.3 TLS13_…
    Some(format!("{version}, {}", suite.replacen("TLS13_", "TLS_", 1)))
}

/// The alert that the server sent before it closed the connection, if there is one. It is still in the socket when writing
/// fails.
pub(super) fn received_alert(tls: &mut ClientConnection, socket: &mut Socket) -> Option<io::Error> {
    while matches!(tls.read_tls(socket), Ok(1..)) {
        if let Err(error) = tls.process_new_packets() {
            return Some(io::Error::new(io::ErrorKind::InvalidData, error));
        }
    }
    None
}

fn read_file(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let certificates = pem::certificates(&std::fs::read(path)?).map_err(anyhow::Error::msg)?;
    let ders = certificates
        .iter()
        .map(|certificate| Ok(certificate.to_der()?.into()));
    ders.collect()
}

/// Presents the client certificate of the current request, if it has one.
struct ClientCertificate(SharedProgress);

impl std::fmt::Debug for ClientCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClientCertificate")
    }
}

impl ResolvesClientCert for ClientCertificate {
    fn resolve(&self, _issuers: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.lock().client_certificate.clone()
    }

    fn has_certs(&self) -> bool {
        self.0.lock().client_certificate.is_some()
    }
}

struct Verifier {
    trust: Trust,
    progress: SharedProgress,
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Verifier")
    }
}

impl Verifier {
    fn is_insecure(&self) -> bool {
        self.progress.lock().tls_insecure
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        {
            let mut progress = self.progress.lock();
            let expires_at = expires_at(leaf);
            progress.cert_expires_at = expires_at;
            if let Some(details) = &mut progress.details {
                details.certificate = chain_verifier::describe(leaf, intermediates);
            }
            if let Some(at) = expires_at {
                let left =
                    at.unix_micros().div_euclid(1_000_000) - i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
                let is_sooner = progress.soonest_expiry.is_none_or(|(_, soonest)| left < soonest);
                if is_sooner {
                    progress.soonest_expiry = Some((at, left));
                }
            }
        }
        if !self.is_insecure() {
            let algorithms = self.trust.algorithms().all;
            self.trust
                .anchors
                .verify(leaf, intermediates, server_name, now, algorithms)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    // With tls=insecure the certificate may be one that webpki cannot read (X.509 v1, old keys), so its signatures cannot be
    // verified either.
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        if self.is_insecure() {
            return Ok(HandshakeSignatureValid::assertion());
        }
        let by_ring = rustls::crypto::verify_tls12_signature(message, cert, dss, self.trust.algorithms());
        by_ring.or_else(|_| {
            verify_signature(message, cert, dss, false)?;
            Ok(HandshakeSignatureValid::assertion())
        })
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        if self.is_insecure() {
            return Ok(HandshakeSignatureValid::assertion());
        }
        let by_ring = rustls::crypto::verify_tls13_signature(message, cert, dss, self.trust.algorithms());
        by_ring.or_else(|_| {
            verify_signature(message, cert, dss, true)?;
            Ok(HandshakeSignatureValid::assertion())
        })
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let mut schemes = self.trust.algorithms().supported_schemes();
        schemes.extend(FURTHER_SCHEMES);
        schemes
    }
}
