//! Why a connection to Kafka fails, with the variable to check.
//!
//! Owns what is added to librdkafka's reasons. librdkafka reports every bad certificate with the same words, and a broker
//! that speaks another protocol only as "down". In these cases a handshake of our own finds the cause. It runs on its own
//! thread, because a slow broker can take seconds to answer.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Read};
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use openssl::asn1::Asn1Time;
use openssl::error::ErrorStack;
use openssl::nid::Nid;
use openssl::ssl::{HandshakeError, SslVerifyMode};
use openssl::x509::{X509, X509NameRef, X509Ref, X509StoreContextRef};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};

use super::connection::{connect, host_of, tls_session};
use crate::clock::instant_now;
use crate::config::{KafkaConfig, KafkaTls};
use crate::lock::lock;
use crate::socket::Socket;
use crate::terminal;
use crate::thread::start_thread;

/// The bound on connecting, and on the handshake. A thread of its own waits, and the explanation is of use only soon.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// After the handshake, how long to wait for an alert about our certificate. A broker that accepts it sends nothing.
const ALERT_WITHIN: Duration = Duration::from_millis(300);

/// The shortest time between two handshakes with one server, so that a broken broker gets no flood of them, and the same where
/// the last one found no cause.
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(30);
const LOOK_AGAIN_AFTER_NOTHING: Duration = Duration::from_secs(5);

/// The longest explanation: a few lines of a log.
const MAX_CHARS: usize = 400;

/// The explanation until a handshake has found the cause.
const NOT_ACCEPTED: &str = "the broker's certificate has a wrong authority, wrong dates or a wrong name";

const NO_TLS: &str = "the broker closes the connection when TLS begins, so it probably does not speak TLS there; check \
                      KAFKA_SECURITY_PROTOCOL and the port";

/// Explains the errors of one Kafka client. All clones share what the handshakes found.
#[derive(Clone)]
pub struct Explainer {
    kafka: Arc<KafkaConfig>,
    handshakes: Arc<Mutex<BTreeMap<String, Handshake>>>,
}

/// The last handshake with a broker.
#[derive(Default)]
struct Handshake {
    begun: Option<Instant>,
    is_under_way: bool,
    found: Option<String>,
}

impl Explainer {
    pub fn new(kafka: &KafkaConfig) -> Self {
        Self {
            kafka: Arc::new(kafka.clone()),
            handshakes: Arc::default(),
        }
    }

    /// The Kafka whose errors it explains.
    pub fn kafka(&self) -> &KafkaConfig {
        &self.kafka
    }

    /// Takes every error of the client. An error without a cause starts a handshake.
    pub fn hear(&self, error: &KafkaError, reason: &str) {
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown) || is_certificate(reason) {
            let server = server_of(reason).unwrap_or_else(|| self.first_server());
            self.shake_hands_with(server.to_owned());
        }
    }

    /// The reason in one line, with the variable to check where that is known.
    pub fn explain(&self, reason: &str) -> String {
        // The reason and the names in certificates come from other machines and may hold control characters.
        terminal::plain(&self.meaning(reason))
            .chars()
            .take(MAX_CHARS)
            .collect()
    }

    fn meaning(&self, reason: &str) -> String {
        let said = plain(reason);
        let server = server_of(reason).unwrap_or_else(|| self.first_server());
        if is_certificate(reason) {
            let found = self.found(server);
            let found = found.unwrap_or_else(|| format!("{NOT_ACCEPTED}; check KAFKA_SSL_CA_FILE"));
            return format!("{server}: {found}");
        }
        if is_about_our_certificate(reason) {
            return format!("{server}: {}", our_certificate(self.kafka.security.tls.as_ref()));
        }
        if reason.contains("Unsupported SASL mechanism") {
            return format!("{said}; check KAFKA_SASL_MECHANISM");
        }
        if reason.contains("SASL authentication error") || reason.contains("Authentication failed") {
            return format!("{said}; check KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD");
        }
        if reason.contains("PLAINTEXT broker listener") {
            return format!("{server}: {NO_TLS}");
        }
        if !names_a_cause(reason)
            && let Some(found) = self.found(server)
        {
            return format!("{server}: {found}");
        }
        said
    }

    fn first_server(&self) -> &str {
        let servers = &self.kafka.bootstrap_servers;
        servers.split(',').next().unwrap_or(servers)
    }

    /// What the last handshake found, unless that was long ago and may have had another cause.
    fn found(&self, server: &str) -> Option<String> {
        let handshakes = self.handshakes();
        let handshake = handshakes.get(server)?;
        let is_fresh = instant_now().duration_since(handshake.begun?) < 2 * LOOK_AGAIN_AFTER;
        handshake.found.clone().filter(|_| is_fresh)
    }

    fn shake_hands_with(&self, server: String) {
        let now = instant_now();
        let mut handshakes = self.handshakes();
        let handshake = handshakes.entry(server.clone()).or_default();
        let pause = match handshake.found {
            Some(_) => LOOK_AGAIN_AFTER,
            None => LOOK_AGAIN_AFTER_NOTHING,
        };
        if handshake.is_under_way
            || handshake
                .begun
                .is_some_and(|begun| now.duration_since(begun) < pause)
        {
            return;
        }
        // The last finding stays until this handshake has ended.
        handshake.begun = Some(now);
        let this = self.clone();
        let work = move || {
            let found = examine(&server, &this.kafka);
            if let Some(handshake) = this.handshakes().get_mut(&server) {
                handshake.is_under_way = false;
                handshake.found = found;
            }
        };
        match start_thread("kafka-look", work) {
            Ok(_) => handshake.is_under_way = true,
            Err(error) => log::debug!("cannot start a thread to look at Kafka: {error}"),
        }
    }

    /// A panic leaves no entry half written, so a poisoned lock is still usable.
    fn handshakes(&self) -> MutexGuard<'_, BTreeMap<String, Handshake>> {
        lock(&self.handshakes)
    }
}

/// Removes librdkafka's times and repetitions and OpenSSL's source lines.
fn plain(reason: &str) -> String {
    let cause = reason.split(" (after ").next().unwrap_or(reason);
    let is_code = |word: &&str| word.contains(".c:") && word.starts_with("../");
    let words: Vec<&str> = cause.split_whitespace().filter(|word| !is_code(word)).collect();
    words.join(" ")
}

/// `host:port` of `ssl://host:port/1: reason`.
fn server_of(reason: &str) -> Option<&str> {
    let (broker, _) = reason.split_once(": ")?;
    let (_, server) = broker.split_once("://").unwrap_or(("", broker));
    let (server, _) = server.split_once('/')?;
    server.contains(':').then_some(server)
}

fn is_certificate(reason: &str) -> bool {
    reason.contains("certificate verify failed")
}

/// RFC 8446, 6.2: bad, unsupported, revoked, expired, unknown certificate, unknown authority, no certificate.
fn is_about_our_certificate(reason: &str) -> bool {
    let Some((_, number)) = reason.split_once("SSL alert number ") else {
        return false;
    };
    let end = number.find(|c: char| !c.is_ascii_digit()).unwrap_or(number.len());
    ["42", "43", "44", "45", "46", "48", "116"].contains(&&number[..end])
}

/// Whether a reason, explained or not, names a cause: more than that Kafka does not answer or cannot be trusted.
pub fn names_a_cause(reason: &str) -> bool {
    let silence = [
        "brokers are down",
        "Disconnected",
        "Connection reset",
        "Broken pipe",
        "Broker transport failure",
        "Timed out",
        NOT_ACCEPTED,
    ];
    !silence.iter().any(|words| reason.contains(words))
}

/// Why a broker refuses our client certificate, or the lack of one.
fn our_certificate(tls: Option<&KafkaTls>) -> String {
    let Some(path) = tls.and_then(|tls| tls.cert_file.as_deref()) else {
        return "the broker requires a client certificate; set KAFKA_SSL_CERT_FILE and KAFKA_SSL_KEY_FILE"
            .to_owned();
    };
    let variable = format!("KAFKA_SSL_CERT_FILE={}", path.display());
    match read_certificate(path) {
        Ok(certificate) if is_expired(&certificate) => format!(
            "the broker refuses our client certificate, which expired on {}; renew {variable}",
            certificate.not_after()
        ),
        Ok(certificate) => format!(
            "the broker refuses our client certificate, issued by {}; check that the broker trusts that authority, and \
             {variable}",
            name(certificate.issuer_name())
        ),
        Err(error) => format!("the broker refuses our client certificate {variable}: {error}"),
    }
}

fn read_certificate(path: &Path) -> anyhow::Result<X509> {
    Ok(X509::from_pem(&fs::read(path)?)?)
}

fn is_expired(certificate: &X509Ref) -> bool {
    Asn1Time::days_from_now(0).is_ok_and(|now| certificate.not_after() < now)
}

/// The common name, or else the organisation.
fn name(name: &X509NameRef) -> String {
    let entry = |nid| name.entries_by_nid(nid).next()?.data().to_string().ok();
    match entry(Nid::COMMONNAME).or_else(|| entry(Nid::ORGANIZATIONNAME)) {
        Some(text) => format!("{text:?}"),
        None => "an authority without a name".to_owned(),
    }
}

/// Why this broker refuses us, as far as a handshake shows it.
fn examine(server: &str, kafka: &KafkaConfig) -> Option<String> {
    let connection = connect(server, instant_now() + ANSWER_WITHIN).ok()?;
    let shown = match shake_hands(server, connection, kafka.security.tls.as_ref()) {
        Ok(shown) => shown,
        Err(error) => {
            log::debug!("cannot look at {server}: {error}");
            return None;
        }
    };
    if kafka.security.tls.is_none() {
        let word = if kafka.security.sasl.is_some() {
            "SASL_SSL"
        } else {
            "SSL (or SASL_SSL)"
        };
        return shown.speaks_tls.then(|| {
            format!("the broker speaks TLS, but the client does not; set KAFKA_SECURITY_PROTOCOL={word}")
        });
    }
    if shown.fault.is_some() || !shown.speaks_tls || kafka.security.sasl.is_some() {
        return shown.fault;
    }
    Some(
        "the broker accepts TLS and then closes the connection, so it probably requires SASL; check \
         KAFKA_SECURITY_PROTOCOL and the port"
            .to_owned(),
    )
}

/// What a broker showed in a handshake.
#[derive(Default)]
struct Shown {
    speaks_tls: bool,
    /// The first fault of its certificate, or else of ours.
    fault: Option<String>,
}

fn shake_hands(server: &str, mut connection: Socket, tls: Option<&KafkaTls>) -> Result<Shown, ErrorStack> {
    let ca_file = tls.and_then(|tls| tls.ca_file.clone());
    let mut ssl = tls_session(server, tls)?;
    let host = host_of(server).to_owned();
    let shown = Arc::new(Mutex::new(Shown::default()));
    let callback = {
        let shown = Arc::clone(&shown);
        move |is_good: bool, store: &mut X509StoreContextRef| {
            let mut shown = lock(&shown);
            shown.speaks_tls = true;
            if !is_good && shown.fault.is_none() {
                let fault = fault(
                    store.error().as_raw(),
                    store.current_cert(),
                    &host,
                    ca_file.as_deref(),
                );
                shown.fault = Some(fault.unwrap_or_else(|| store.error().error_string().to_owned()));
            }
            // Goes on in spite of a fault, because no data follows on this connection.
            true
        }
    };
    ssl.set_verify_callback(SslVerifyMode::PEER, callback);
    let mut is_closed = false;
    connection.set_deadline(instant_now() + ANSWER_WITHIN);
    // In TLS 1.3 the client's handshake is done before the broker has seen its certificate.
    let alert = match ssl.connect(connection) {
        Err(error) => {
            is_closed = matches!(&error, HandshakeError::Failure(failed)
                if failed.error().io_error().is_none_or(|error| error.kind() != ErrorKind::TimedOut));
            error.to_string()
        }
        Ok(mut stream) => {
            stream.get_mut().set_deadline(instant_now() + ALERT_WITHIN);
            let read = stream.read(&mut [0]);
            read.err().map(|error| error.to_string()).unwrap_or_default()
        }
    };
    let mut shown = std::mem::take(&mut *lock(&shown));
    if is_closed && !shown.speaks_tls && tls.is_some() {
        shown.fault = Some(NO_TLS.to_owned());
    }
    if shown.fault.is_none() && is_about_our_certificate(&alert) {
        shown.fault = Some(our_certificate(tls));
    }
    Ok(shown)
}

/// OpenSSL's x509_vfy.h.
const NOT_YET_VALID: i32 = 9;
const EXPIRED: i32 = 10;
const WRONG_NAME: i32 = 62;
const WRONG_ADDRESS: i32 = 64;

fn fault(code: i32, certificate: Option<&X509Ref>, host: &str, ca_file: Option<&Path>) -> Option<String> {
    let certificate = certificate?;
    let whose = name(certificate.subject_name());
    Some(match code {
        EXPIRED => format!(
            "the broker's certificate expired on {}; renew it on the broker, or correct this machine's clock",
            certificate.not_after()
        ),
        NOT_YET_VALID => format!(
            "the broker's certificate is valid only from {} on; check this machine's clock",
            certificate.not_before()
        ),
        WRONG_NAME | WRONG_ADDRESS => format!(
            "the broker's certificate is not for {host}, but for {}; check KAFKA_BOOTSTRAP_SERVERS and the broker's \
             advertised.listeners",
            names(certificate).unwrap_or(whose)
        ),
        _ => {
            let issuer = name(certificate.issuer_name());
            match ca_file {
                Some(file) => format!(
                    "the broker's certificate is issued by {issuer}, which cannot be verified with KAFKA_SSL_CA_FILE={}; \
                     set it to the file of that authority",
                    file.display()
                ),
                None => format!(
                    "the broker's certificate is issued by {issuer}, which this machine does not trust; set KAFKA_SSL_CA_FILE"
                ),
            }
        }
    })
}

/// The first names that the certificate is for.
fn names(certificate: &X509Ref) -> Option<String> {
    const MOST: usize = 3;
    let alternatives = certificate.subject_alt_names()?;
    let names = alternatives.iter().filter_map(|name| {
        let octets = name.ipaddress();
        let v4 = octets.and_then(|octets| <[u8; 4]>::try_from(octets).ok());
        let v6 = octets.and_then(|octets| <[u8; 16]>::try_from(octets).ok());
        let ip = v4.map(IpAddr::from).or(v6.map(IpAddr::from));
        name.dnsname().map(str::to_owned).or(ip.map(|ip| ip.to_string()))
    });
    let names: Vec<String> = names.take(MOST).collect();
    (!names.is_empty()).then(|| names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::KafkaSecurity;

    fn explained(reason: &str) -> String {
        let kafka = KafkaConfig {
            bootstrap_servers: "one.example:9093,two.example:9093".to_owned(),
            security: KafkaSecurity {
                tls: None,
                sasl: None,
            },
        };
        Explainer::new(&kafka).explain(reason)
    }

    #[test]
    fn a_reason_is_one_line_without_times_and_source_lines() {
        assert_eq!(
            explained(
                "ssl://one.example:9093/bootstrap: Receive failed: ../ssl/record/rec_layer_s3.c:1601:ssl3_read_bytes \
                 error:0A000438:SSL routines::tlsv1 alert\ninternal error: SSL alert number 80 (after 1ms in state UP)"
            ),
            "ssl://one.example:9093/bootstrap: Receive failed: error:0A000438:SSL routines::tlsv1 alert internal error: \
             SSL alert number 80"
        );
        assert_eq!(explained(&"x".repeat(1_000)).len(), MAX_CHARS);
    }

    #[test]
    fn a_reason_names_the_variables_to_check() {
        for (reason, expected) in [
            (
                "sasl_ssl://two.example:9093/2: SASL PLAIN mechanism handshake failed: Broker: Unsupported SASL \
                 mechanism: broker's supported mechanisms: SCRAM-SHA-256 (after 3ms in state AUTH_HANDSHAKE)",
                "SCRAM-SHA-256; check KAFKA_SASL_MECHANISM",
            ),
            (
                "sasl_ssl://two.example:9093/2: SASL authentication error: Authentication failed: Invalid username or \
                 password (after 3ms in state AUTH_REQ)",
                "Invalid username or password; check KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD",
            ),
            (
                "ssl://two.example:9093/2: Receive failed: SSL alert number 116",
                "two.example:9093: the broker requires a client certificate; set KAFKA_SSL_CERT_FILE and KAFKA_SSL_KEY_FILE",
            ),
            (
                "ssl://two.example:9093/2: SSL handshake failed: certificate verify failed: broker certificate",
                "two.example:9093: the broker's certificate has a wrong authority, wrong dates or a wrong name; check KAFKA_SSL_CA_FILE",
            ),
            (
                "ssl://two.example:9093/2: SSL handshake failed: connecting to a PLAINTEXT broker listener?",
                "two.example:9093: the broker closes the connection when TLS begins, so it probably does not speak TLS \
                 there; check KAFKA_SECURITY_PROTOCOL and the port",
            ),
            (
                "two.example:9093/2: Connect to ipv4#10.0.0.2:9093 failed: Connection refused",
                "Connection refused",
            ),
            ("2/2 brokers are down", "2/2 brokers are down"),
        ] {
            assert!(explained(reason).contains(expected), "{}", explained(reason));
        }
    }

    #[test]
    fn a_connection_that_ends_is_no_cause_of_its_own() {
        for end in [
            "Disconnected: SSL connection closed by peer",
            "Send failed: SSL transport error: Broken pipe",
        ] {
            assert!(
                !names_a_cause(&format!("ssl://a:1/bootstrap: {end} (after 0ms in state UP)")),
                "{end}"
            );
        }
        assert!(names_a_cause(
            "sasl_ssl://a:1/bootstrap: SASL authentication error: Authentication failed"
        ));
    }

    #[test]
    fn a_reason_begins_with_its_server() {
        for (reason, server) in [
            ("ssl://[::1]:9093/bootstrap: x", Some("[::1]:9093")),
            ("one.example:9092/1: x", Some("one.example:9092")),
            ("GroupCoordinator: one.example:9092: x", None),
            ("1/1 brokers are down", None),
            ("", None),
        ] {
            assert_eq!(server_of(reason), server, "{reason}");
        }
    }
}
