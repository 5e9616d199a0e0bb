//! A connection to a broker without librdkafka: TCP with a deadline for all reads and writes together, and TLS as
//! KAFKA_SSL_* describe it.

use std::io::{self, Read, Write};
use std::net::{IpAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use openssl::error::ErrorStack;
use openssl::ssl::{Ssl, SslContext, SslFiletype, SslMethod};

use crate::clock::instant_now;
use crate::config::KafkaTls;

/// A TCP connection. A read or write after the deadline fails.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    deadline: Instant,
}

impl Connection {
    /// Connects to the first address of `server` (`host:port`) that accepts.
    pub(super) fn open(server: &str, deadline: Instant) -> io::Result<Self> {
        let mut last = io::Error::other("the name has no address");
        for address in server.to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, left(deadline)?) {
                Ok(stream) => return Ok(Self { stream, deadline }),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    pub(super) fn set_deadline(&mut self, deadline: Instant) {
        self.deadline = deadline;
    }
}

impl Read for Connection {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(left(self.deadline)?))?;
        self.stream.read(into).map_err(worded)
    }
}

impl Write for Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(left(self.deadline)?))?;
        self.stream.write(bytes).map_err(worded)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(instant_now());
    match left.is_zero() {
        true => Err(too_late()),
        false => Ok(left),
    }
}

/// The kernel reports a timeout as "resource temporarily unavailable".
fn worded(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => too_late(),
        _ => error,
    }
}

/// `WouldBlock`, because OpenSSL reports any other kind as a failed handshake.
fn too_late() -> io::Error {
    io::Error::new(io::ErrorKind::WouldBlock, "it did not answer in time")
}

/// A TLS session that is ready to connect and knows the server's name. The caller decides what is verified.
pub(super) fn tls_session(server: &str, tls: Option<&KafkaTls>) -> Result<Ssl, ErrorStack> {
    let mut context = SslContext::builder(SslMethod::tls_client())?;
    match tls.and_then(|tls| tls.ca_file.as_ref()) {
        Some(file) => context.set_ca_file(file)?,
        None => context.set_default_verify_paths()?,
    }
    if let Some(KafkaTls {
        cert_file: Some(certificate),
        key_file: Some(key),
        ..
    }) = tls
    {
        context.set_certificate_chain_file(certificate)?;
        context.set_private_key_file(key, SslFiletype::PEM)?;
    }
    let mut ssl = Ssl::new(&context.build())?;
    let host = host_of(server);
    match host.parse::<IpAddr>() {
        Ok(ip) => ssl.param_mut().set_ip(ip)?,
        Err(_) => {
            ssl.param_mut().set_host(host)?;
            ssl.set_hostname(host)?;
        }
    }
    Ok(ssl)
}

/// The host of `host:port`, without the brackets of an IPv6 address.
pub(super) fn host_of(server: &str) -> &str {
    let (host, _) = server.rsplit_once(':').unwrap_or((server, ""));
    host.trim_start_matches('[').trim_end_matches(']')
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_silent_server_is_given_up_at_the_deadline() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = listener.local_addr().unwrap().to_string();
        let mut connection = Connection::open(&server, instant_now() + Duration::from_secs(30)).unwrap();
        connection.set_deadline(instant_now() + Duration::from_millis(20));
        let late = "it did not answer in time";
        assert_eq!(connection.read(&mut [0]).unwrap_err().to_string(), late);
        assert_eq!(connection.write(b"x").unwrap_err().to_string(), late);
        assert!(Connection::open(&server, instant_now()).is_err());
    }
}
