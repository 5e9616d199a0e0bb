//! A connection to a broker without librdkafka: TCP, and TLS as KAFKA_SSL_* describe it.

use std::io;
use std::net::{IpAddr, ToSocketAddrs};
use std::time::Instant;

use openssl::error::ErrorStack;
use openssl::ssl::{Ssl, SslContext, SslFiletype, SslMethod};

use crate::clock::instant_now;
use crate::config::KafkaTls;
use crate::socket::{Socket, connect_one};

/// Connects to the first address of `server` (`host:port`) that accepts.
pub(super) fn connect(server: &str, deadline: Instant) -> io::Result<Socket> {
    let mut last = io::Error::other("the name has no address");
    for address in server.to_socket_addrs()? {
        match connect_one(address, deadline.saturating_duration_since(instant_now())) {
            Ok(stream) => return Ok(Socket::new(stream, deadline)),
            Err(error) => last = error,
        }
    }
    Err(last)
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
