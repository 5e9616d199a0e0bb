//! Scripted web sites on loopback: a closure for each site acts as a good or a broken server.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use rcgen::{CertificateParams, CertifiedIssuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use socket2::SockRef;

/// A listening site. Dropping it ends it.
pub struct Site {
    pub address: SocketAddr,
    requests: Arc<Mutex<Vec<Vec<u8>>>>,
    ended: Arc<AtomicBool>,
    acceptor: Option<JoinHandle<()>>,
}

/// A connection over TCP or TLS.
pub trait Wire: Read + Write {}

impl<T: Read + Write> Wire for T {}

impl Site {
    /// Calls `handle` for every connection, on a thread of its own, with a place to note the request.
    pub fn start(handle: impl Fn(TcpStream, &Mutex<Vec<Vec<u8>>>) + Send + Sync + 'static) -> Self {
        Self::start_at((Ipv4Addr::LOCALHOST, 0).into(), handle)
    }

    /// The same at another address of this machine.
    pub fn start_at(
        address: SocketAddr,
        handle: impl Fn(TcpStream, &Mutex<Vec<Vec<u8>>>) + Send + Sync + 'static,
    ) -> Self {
        Self::start_on(TcpListener::bind(address).unwrap(), handle)
    }

    /// The same on a listener with options of its own.
    pub fn start_on(
        listener: TcpListener,
        handle: impl Fn(TcpStream, &Mutex<Vec<Vec<u8>>>) + Send + Sync + 'static,
    ) -> Self {
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let ended = Arc::new(AtomicBool::new(false));
        let handle = Arc::new(handle);
        let acceptor = std::thread::spawn({
            let (requests, ended) = (Arc::clone(&requests), Arc::clone(&ended));
            move || {
                for stream in listener.incoming() {
                    if ended.load(Ordering::SeqCst) {
                        return;
                    }
                    let (handle, requests) = (Arc::clone(&handle), Arc::clone(&requests));
                    std::thread::spawn(move || handle(stream.unwrap(), &requests));
                }
            }
        });
        Self {
            address,
            requests,
            ended,
            acceptor: Some(acceptor),
        }
    }

    /// Reads each request, notes it, and calls `respond`.
    pub fn plain(respond: impl Fn(&mut TcpStream) + Send + Sync + 'static) -> Self {
        Self::start(move |mut stream, requests| {
            let request = read_request(&mut stream);
            requests.lock().unwrap().push(request);
            respond(&mut stream);
        })
    }

    /// Answers each request with these bytes and closes.
    pub fn answering(response: impl Into<Vec<u8>>) -> Self {
        let response = response.into();
        Self::plain(move |stream| {
            let _ = stream.write_all(&response);
        })
    }

    /// The same over TLS. `respond` gets the decrypted stream, and TLS is closed cleanly after it.
    pub fn tls(config: ServerConfig, respond: impl Fn(&mut dyn Wire) + Send + Sync + 'static) -> Self {
        let config = Arc::new(config);
        Self::start(move |stream, requests| {
            let mut tls = StreamOwned::new(ServerConnection::new(Arc::clone(&config)).unwrap(), stream);
            let request = read_request(&mut tls);
            // The client may refuse the certificate.
            if request.is_empty() {
                return;
            }
            requests.lock().unwrap().push(request);
            respond(&mut tls);
            tls.conn.send_close_notify();
            let _ = tls.flush();
        })
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub fn https(&self, host: &str) -> String {
        format!("https://{host}:{}/", self.address.port())
    }

    /// All requests so far, as text.
    pub fn requests(&self) -> Vec<String> {
        let requests = self.requests.lock().unwrap();
        requests
            .iter()
            .map(|request| String::from_utf8(request.clone()).unwrap())
            .collect()
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        // Wakes the thread that accepts connections.
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.join().unwrap();
        }
    }
}

/// Reads up to the blank line, or to the end if the client closes the connection.
pub fn read_head(stream: &mut dyn Read) -> Vec<u8> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte) {
            Ok(1) => head.push(byte[0]),
            _ => break,
        }
    }
    head
}

/// Reads a head and, if it has a length, the body.
pub fn read_request(stream: &mut dyn Read) -> Vec<u8> {
    let mut request = read_head(stream);
    let head = String::from_utf8_lossy(&request).to_lowercase();
    let length = head
        .split_once("content-length: ")
        .and_then(|(_, rest)| rest.lines().next());
    let length = length.map_or(0, |length| length.parse().unwrap());
    // A client that goes away has sent less.
    let _ = stream.take(length).read_to_end(&mut request);
    request
}

/// A response with a Content-Length.
pub fn ok(body: impl AsRef<[u8]>) -> Vec<u8> {
    response("200 OK", "", body)
}

/// `headers` are whole lines.
pub fn response(status: &str, headers: &str, body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let mut bytes = format!(
        "HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

pub fn redirect(status: u16, location: &str) -> Vec<u8> {
    response(
        &format!("{status} Moved"),
        &format!("Location: {location}\r\n"),
        "",
    )
}

/// Waits until the client has closed the connection.
pub fn hold(stream: &mut dyn Read) {
    let mut sink = [0; 1024];
    while matches!(stream.read(&mut sink), Ok(1..)) {}
}

/// Resets the connection.
pub fn reset(stream: &TcpStream) {
    SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
}

/// The delay of a slow server. Only for tests of slow servers.
pub fn slowly(delay: Duration) {
    let (_never, wait) = mpsc::channel::<()>();
    let _ = wait.recv_timeout(delay);
}

/// Writes single bytes until the client closes the connection.
pub fn trickle(stream: &mut dyn Write, bytes: impl IntoIterator<Item = u8>) {
    for byte in bytes {
        if stream.write_all(&[byte]).and_then(|()| stream.flush()).is_err() {
            return;
        }
        slowly(Duration::from_millis(5));
    }
}

/// An address at which no server listens, reserved so that no other program can listen there.
pub struct Closed {
    pub address: SocketAddr,
    _bound: socket2::Socket,
}

impl Closed {
    pub fn new() -> Self {
        let bound = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        bound
            .bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())
            .unwrap();
        let address = bound.local_addr().unwrap().as_socket().unwrap();
        Self {
            address,
            _bound: bound,
        }
    }
}

/// A listener that accepts no more connections, because its backlog is full.
pub struct Deaf {
    pub address: SocketAddr,
    _listener: socket2::Socket,
    _fillers: Vec<TcpStream>,
}

impl Deaf {
    pub fn at(address: SocketAddr) -> Self {
        let domain = socket2::Domain::for_address(address);
        let listener = socket2::Socket::new(domain, socket2::Type::STREAM, None).unwrap();
        listener.bind(&address.into()).unwrap();
        listener.listen(0).unwrap();
        let address = listener.local_addr().unwrap().as_socket().unwrap();
        let mut fillers = Vec::new();
        // The kernel holds one more than the given backlog.
        while let Ok(filler) = TcpStream::connect_timeout(&address, Duration::from_millis(100)) {
            fillers.push(filler);
            assert!(fillers.len() < 100, "the backlog of {address} does not fill");
        }
        Self {
            address,
            _listener: listener,
            _fillers: fillers,
        }
    }
}

/// A certificate authority of the test, with its certificate as a PEM file.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    pub file: tempfile::NamedTempFile,
}

impl Authority {
    pub fn new(name: &str) -> Self {
        let issuer =
            CertifiedIssuer::self_signed(authority_params(name), KeyPair::generate().unwrap()).unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(issuer.pem().as_bytes()).unwrap();
        Self { issuer, file }
    }

    /// A server with a certificate for `names`, changed by `change`.
    pub fn server(&self, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> ServerConfig {
        let (chain, key) = self.leaf(names, change);
        server_config(vec![chain], key)
    }

    pub fn leaf(
        &self,
        names: &[&str],
        change: impl FnOnce(&mut CertificateParams),
    ) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let leaf = leaf_params(names, change).signed_by(&key, &self.issuer).unwrap();
        (
            leaf.der().clone(),
            PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        )
    }

    /// A leaf and its key, in PEM.
    pub fn leaf_pem(&self, names: &[&str]) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let leaf = leaf_params(names, |_| {}).signed_by(&key, &self.issuer).unwrap();
        (leaf.pem(), key.serialize_pem())
    }

    /// An intermediate authority with its certificate, and a leaf that it signed.
    pub fn intermediate(
        &self,
        names: &[&str],
    ) -> (
        CertificateDer<'static>,
        CertificateDer<'static>,
        PrivateKeyDer<'static>,
    ) {
        let key = KeyPair::generate().unwrap();
        let below = CertifiedIssuer::signed_by(authority_params("intermediate"), key, &self.issuer).unwrap();
        let key = KeyPair::generate().unwrap();
        let leaf = leaf_params(names, |_| {}).signed_by(&key, &below).unwrap();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        (below.der().clone(), leaf.der().clone(), key)
    }

    pub fn certificate(&self) -> CertificateDer<'static> {
        self.issuer.der().clone()
    }
}

/// A server with a self-signed certificate.
pub fn self_signed(names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> ServerConfig {
    let key = KeyPair::generate().unwrap();
    let certificate = leaf_params(names, change).self_signed(&key).unwrap();
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    server_config(vec![certificate.der().clone()], key)
}

pub fn server_config(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> ServerConfig {
    ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap()
}

fn authority_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    params
}

fn leaf_params(names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2090, 1, 1);
    change(&mut params);
    params
}
