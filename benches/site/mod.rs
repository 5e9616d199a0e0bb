//! A site to check, and a minimal client: a blocking socket with httparse, and rustls over it.
//!
//! The benchmarks share them. The site answers one request per connection, on a few threads, with and without TLS.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;

use rcgen::{CertifiedIssuer, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection, StreamOwned};

const SERVER_THREADS: usize = 4;

/// A typical response: twelve header lines and a page of 1,000 bytes.
pub fn page() -> Arc<[u8]> {
    let mut response = "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n".to_owned();
    for number in 0..9 {
        response += &format!("X-Header-{number}: some value of usual length\r\n");
    }
    response += &format!(
        "Connection: close\r\nContent-Length: 1000\r\n\r\n{}",
        "x".repeat(1000)
    );
    response.into_bytes().into()
}

/// Serves on loopback until the process ends. Passes each connection to `answer`, over TLS if `tls` is given.
pub fn serve(
    tls: Option<Arc<ServerConfig>>,
    answer: impl Fn(Box<dyn Stream>) + Clone + Send + 'static,
) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback");
    let address = listener.local_addr().expect("bound");
    for _ in 0..SERVER_THREADS {
        let listener = listener.try_clone().expect("a handle");
        let (tls, answer) = (tls.clone(), answer.clone());
        let server = std::thread::Builder::new().name("server".into());
        let _ = server.spawn(move || {
            // A connection may be reset before it is accepted.
            for stream in listener.incoming().flatten() {
                match &tls {
                    None => answer(Box::new(stream)),
                    Some(config) => {
                        let connection = ServerConnection::new(Arc::clone(config)).expect("good settings");
                        answer(Box::new(StreamOwned::new(connection, stream)));
                    }
                }
            }
        });
    }
    address
}

pub trait Stream: Read + Write + Send {}
impl<S: Read + Write + Send> Stream for S {}

/// Whether at least the beginning of a request came.
pub fn has_asked(stream: &mut dyn Stream) -> bool {
    matches!(stream.read(&mut [0; 1024]), Ok(1..))
}

/// The client may have closed the connection already.
pub fn answer(stream: &mut dyn Stream, page: &[u8]) {
    if has_asked(stream) {
        let _ = stream.write_all(page).and_then(|()| stream.flush());
    }
}

/// The site's TLS settings for 127.0.0.1. Its CA is written to `ca_file`, as PEM.
pub fn tls_settings(ca_file: &Path) -> Arc<ServerConfig> {
    let key = || KeyPair::generate().expect("a key");
    let mut params = rcgen::CertificateParams::new(Vec::new()).expect("no names");
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, key()).expect("a certificate");
    let leaf_key = key();
    let leaf = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()])
        .and_then(|params| params.signed_by(&leaf_key, &issuer))
        .expect("a certificate");
    fs::write(ca_file, issuer.pem()).expect("room for it");
    let key = PrivateKeyDer::try_from(leaf_key.serialize_der()).expect("a key");
    let settings = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| {
            builder
                .with_no_client_auth()
                .with_single_cert(vec![leaf.der().clone()], key)
        })
        .expect("good settings");
    Arc::new(settings)
}

/// A minimal client.
pub struct Raw {
    address: SocketAddr,
    tls: Option<Arc<ClientConfig>>,
}

impl Raw {
    pub fn http(address: SocketAddr) -> Self {
        Self { address, tls: None }
    }

    pub fn https(address: SocketAddr, ca_file: &Path) -> Self {
        let mut roots = rustls::RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(ca_file).expect("the site wrote it") {
            roots
                .add(certificate.expect("a certificate"))
                .expect("a good one");
        }
        let mut config =
            ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()
                .expect("ring has both")
                .with_root_certificates(roots)
                .with_no_client_auth();
        config.resumption = rustls::client::Resumption::disabled();
        Self {
            address,
            tls: Some(Arc::new(config)),
        }
    }

    /// Sends one request over a new connection and reads the response's headers.
    pub fn exchange(&self) {
        let mut stream = TcpStream::connect(self.address).expect("the server listens");
        stream.set_nodelay(true).expect("a socket option");
        match &self.tls {
            None => exchange(&mut stream),
            Some(config) => {
                let name = ServerName::from(self.address.ip());
                let tls = ClientConnection::new(Arc::clone(config), name).expect("a good name");
                exchange(&mut StreamOwned::new(tls, stream));
            }
        }
    }
}

const REQUEST: &[u8] =
    b"GET / HTTP/1.1\r\nHost: bench.test\r\nUser-Agent: raw\r\nAccept: */*\r\nConnection: close\r\n\r\n";

fn exchange(stream: &mut (impl Read + Write)) {
    stream.write_all(REQUEST).expect("the server reads");
    let mut buffer = [0; 4096];
    let mut filled = 0;
    loop {
        let count = stream.read(&mut buffer[filled..]).expect("the server answers");
        assert!(count > 0, "the server answers completely");
        filled += count;
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut response = httparse::Response::new(&mut headers);
        if response
            .parse(&buffer[..filled])
            .expect("the server speaks HTTP")
            .is_complete()
        {
            assert_eq!(response.code, Some(200));
            return;
        }
    }
}

/// The CPU time of a thread in nanoseconds. `of` is `/proc/thread-self` or `/proc/PID/task/TID`.
///
/// # Errors
/// The thread has ended.
pub fn cpu_nanoseconds(thread: &Path) -> io::Result<u64> {
    let stat = fs::read_to_string(thread.join("schedstat"))?;
    let first = stat.split(' ').next().unwrap_or_default();
    first.parse().map_err(io::Error::other)
}
