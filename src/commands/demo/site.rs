//! The sample site: a web server on loopback that fails in the ways that real sites do.
//!
//! Owns the listeners, the certificates and their authority, and the behaviour of each path. Supports just enough HTTP for the
//! checks of this program.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use socket2::{Domain, Socket, Type};
use time::OffsetDateTime;

use crate::clock::instant_now;
use crate::shutdown::{Shutdown, Wake};
use crate::thread::start_thread;

/// The most connections at the same time, far more than the demo's checks need. Further ones are closed.
const MAX_CONNECTIONS: usize = 64;

/// The most bytes of a request. A check sends about a tenth of that.
const MAX_REQUEST_BYTES: usize = 8 * 1024;

/// How long to wait for a silent client, and how long the hanging page keeps a client.
const LONGEST_SILENCE: Duration = Duration::from_secs(30);

/// The flapping page is up for the first part of every period and down for the rest.
const FLAPPING_PERIOD: Duration = Duration::from_secs(12);
const FLAPPING_UP: Duration = Duration::from_secs(8);

/// The slow page takes SLOW plus a random time below the spread.
const SLOW: Duration = Duration::from_millis(150);
const SLOW_SPREAD_MILLIS: u64 = 350;

/// The remaining days of the valid certificates.
const VALID_DAYS: i64 = 21;

/// The running site. Dropping it stops the listeners.
pub struct SampleSite {
    host_file: String,
    shutdown: Shutdown,
    listeners: Vec<(SocketAddr, JoinHandle<()>)>,
    // Bound but not listening, so that connections to its port are refused and no other program can use it.
    _refusing: Socket,
}

impl SampleSite {
    /// Starts the site and writes the certificate of its authority to `ca_file`.
    pub fn start(ca_file: &Path) -> anyhow::Result<Self> {
        let certificates = Certificates::new()?;
        fs::write(ca_file, &certificates.authority_pem)
            .with_context(|| format!("cannot write {}", ca_file.display()))?;
        let refusing = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        refusing.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
        let refused = refusing.local_addr()?.as_socket().context("an IPv4 address")?;
        let mut site = Self {
            host_file: String::new(),
            shutdown: Shutdown::new(),
            listeners: Vec::new(),
            _refusing: refusing,
        };
        let http = site.listen(None)?;
        let https = site.listen(Some(certificates.valid))?;
        let expired = site.listen(Some(certificates.expired))?;
        site.host_file = host_file(http, https, expired, refused);
        Ok(site)
    }

    /// A host file with the pages of the site.
    pub fn host_file(&self) -> &str {
        &self.host_file
    }

    fn listen(&mut self, tls: Option<Arc<ServerConfig>>) -> anyhow::Result<SocketAddr> {
        let listener =
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("found no free port on 127.0.0.1")?;
        let address = listener.local_addr()?;
        let shutdown = self.shutdown.clone();
        let thread = start_thread("sample-site", move || accept(&listener, tls.as_ref(), &shutdown))?;
        self.listeners.push((address, thread));
        Ok(address)
    }
}

impl Drop for SampleSite {
    fn drop(&mut self) {
        self.shutdown.request();
        for (address, thread) in self.listeners.drain(..) {
            // A connection ends the wait in `accept`.
            TcpStream::connect(address).ok();
            thread.join().ok();
        }
    }
}

fn host_file(http: SocketAddr, https: SocketAddr, expired: SocketAddr, refused: SocketAddr) -> String {
    format!(
        "\
# The sample site of `host-metrics demo`: ADDRESS FREQUENCY [option=value ...] [REGEX]
http://{http}/up                1s   group=Healthy name=Plain
https://{https}/up               1s   group=Healthy name=Encrypted (all systems: (go|ready))
http://{http}/moved             2s   group=Healthy name=Moved
http://{http}/slow              1s   group=Healthy name=Slow slow=300ms
http://{http}/flapping          1s   group=Faulty  name=Flapping
http://{http}/failing           1s   group=Faulty  name=\"Wrong status\"
http://{http}/wrong-body        2s   group=Faulty  name=\"Wrong text\" all systems: go
http://{http}/hanging           2s   group=Faulty  name=Hanging timeout=1s
http://{http}/cut               2s   group=Faulty  name=\"Cut off\" (all systems)
https://{expired}/expired          2s   group=Faulty  name=\"Expired certificate\"
http://{refused}/refused           2s   group=Faulty  name=Refused
"
    )
}

fn accept(listener: &TcpListener, tls: Option<&Arc<ServerConfig>>, shutdown: &Shutdown) {
    let start = instant_now();
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let accepted = listener.accept();
        if shutdown.requested() {
            return;
        }
        let stream = match accepted {
            Ok((stream, _)) if open.load(Ordering::Relaxed) < MAX_CONNECTIONS => stream,
            Ok(_) => continue,
            Err(error) => {
                log::warn!("the sample site cannot accept a connection: {error}");
                // Probably there are no free file handles, so an immediate retry would fail too.
                if shutdown.wait_until(instant_now() + Duration::from_millis(100)) == Wake::Stop {
                    return;
                }
                continue;
            }
        };
        let (tls, shutdown, open) = (tls.cloned(), shutdown.clone(), Arc::clone(&open));
        open.fetch_add(1, Ordering::Relaxed);
        let counted = Arc::clone(&open);
        let spawned = start_thread("sample-site", move || {
            // Checks close connections early by design.
            if let Err(error) = serve(stream, tls, start, &shutdown) {
                log::trace!("the sample site: {error}");
            }
            open.fetch_sub(1, Ordering::Relaxed);
        });
        if let Err(error) = spawned {
            counted.fetch_sub(1, Ordering::Relaxed);
            log::warn!("the sample site cannot start a thread: {error}");
        }
    }
}

fn serve(
    stream: TcpStream,
    tls: Option<Arc<ServerConfig>>,
    start: Instant,
    shutdown: &Shutdown,
) -> io::Result<()> {
    stream.set_read_timeout(Some(LONGEST_SILENCE))?;
    stream.set_write_timeout(Some(LONGEST_SILENCE))?;
    match tls {
        None => answer(stream, start, shutdown),
        Some(config) => {
            let connection = ServerConnection::new(config).map_err(io::Error::other)?;
            let mut stream = StreamOwned::new(connection, stream);
            answer(&mut stream, start, shutdown)?;
            stream.conn.send_close_notify();
            stream.flush()
        }
    }
}

fn answer(mut stream: impl Read + Write, start: Instant, shutdown: &Shutdown) -> io::Result<()> {
    let path = read_path(&mut stream)?;
    let mut respond = |status: &str, more: &str, body: &str| {
        write!(
            stream,
            "HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\n{more}Connection: close\r\n\r\n{body}",
            body.len()
        )?;
        stream.flush()
    };
    match path.as_str() {
        "/up" => respond("200 OK", "", "all systems: go\n"),
        "/moved" => respond("302 Found", "Location: /up\r\n", ""),
        "/slow" => {
            let delay = SLOW + Duration::from_millis(fastrand::u64(..SLOW_SPREAD_MILLIS));
            shutdown.wait_until(instant_now() + delay);
            respond("200 OK", "", "all systems: go, but slowly\n")
        }
        "/flapping" if is_up(start.elapsed()) => respond("200 OK", "", "up again\n"),
        "/flapping" => respond(
            "503 Service Unavailable",
            "Retry-After: 4\r\n",
            "back in a moment\n",
        ),
        "/failing" => respond("500 Internal Server Error", "", "something broke\n"),
        "/wrong-body" => respond("200 OK", "", "this domain is for sale\n"),
        "/cut" => {
            write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Length: 10000\r\nConnection: close\r\n\r\nall sys"
            )?;
            stream.flush()
        }
        "/hanging" => stream.read(&mut [0]).map(drop),
        _ => respond("404 Not Found", "", "no such page\n"),
    }
}

fn is_up(since_start: Duration) -> bool {
    since_start.as_millis() % FLAPPING_PERIOD.as_millis() < FLAPPING_UP.as_millis()
}

/// The path of the request, read to the end of its headers.
fn read_path(stream: &mut impl Read) -> io::Result<String> {
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    while !request.windows(4).any(|window| window == b"\r\n\r\n") {
        let count = stream.read(&mut buffer)?;
        if count == 0 || request.len() > MAX_REQUEST_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the request is incomplete or too long",
            ));
        }
        request.extend_from_slice(&buffer[..count]);
    }
    let text = String::from_utf8_lossy(&request);
    Ok(text.split(' ').nth(1).unwrap_or_default().to_owned())
}

struct Certificates {
    authority_pem: String,
    valid: Arc<ServerConfig>,
    expired: Arc<ServerConfig>,
}

impl Certificates {
    fn new() -> anyhow::Result<Self> {
        let today = OffsetDateTime::now_utc();
        let days = time::Duration::days;
        let mut params = CertificateParams::new(Vec::new())?;
        params
            .distinguished_name
            .push(DnType::CommonName, "host-metrics demo authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        (params.not_before, params.not_after) = (today - days(400), today + days(400));
        let key = KeyPair::generate()?;
        let authority_pem = params.self_signed(&key)?.pem();
        let authority = Issuer::new(params, key);
        Ok(Self {
            authority_pem,
            valid: server_config(&authority, today - days(1), today + days(VALID_DAYS))?,
            expired: server_config(&authority, today - days(90), today - days(1))?,
        })
    }
}

fn server_config(
    authority: &Issuer<'_, KeyPair>,
    not_before: OffsetDateTime,
    not_after: OffsetDateTime,
) -> anyhow::Result<Arc<ServerConfig>> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new([Ipv4Addr::LOCALHOST.to_string()])?;
    (params.not_before, params.not_after) = (not_before, not_after);
    let certificate = params.signed_by(&key, authority)?;
    let private_key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], private_key)?;
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flapping_page_is_up_then_down_then_up_again() {
        let up = [0, 7, 12, 19].map(|seconds| is_up(Duration::from_secs(seconds)));
        let down = [8, 11, 20].map(|seconds| is_up(Duration::from_secs(seconds)));
        assert_eq!((up, down), ([true; 4], [false; 3]));
    }

    #[test]
    fn a_request_is_read_to_the_end_of_its_headers_within_a_bound() {
        assert_eq!(
            read_path(&mut &b"GET /up HTTP/1.1\r\nHost: x\r\n\r\n"[..]).unwrap(),
            "/up"
        );
        assert!(read_path(&mut &b"GET /up HTTP/1.1\r\nHost"[..]).is_err());
        assert!(read_path(&mut io::repeat(b'x')).is_err());
    }
}
