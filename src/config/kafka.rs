//! How to reach Kafka and what to read or write there: the KAFKA_* variables.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::form::{host, host_and_port, host_of_url};
use super::problems::{PemKind, Reader};
use super::{MAX_LINE_BYTES, Secret};

const DEFAULT_TOPIC: &str = "host-metrics";
const DEFAULT_GROUP_ID: &str = "host-metrics";
/// The consumer numbers its topics with 16 bits; nobody reads that many.
const MAX_TOPICS: usize = 1_000;
/// Kafka's: org.apache.kafka.common.internals.Topic.
const MAX_TOPIC_BYTES: usize = 249;

/// Kafka's rule for a topic's name, for messages.
pub const TOPIC_NAME_RULE: &str = "letters, digits, `.`, `_` and `-`, 249 at most";

const MECHANISMS: [&str; 3] = ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"];

/// How to reach Kafka, checked to be consistent.
#[derive(Clone, Debug)]
pub struct KafkaConfig {
    pub bootstrap_servers: String,
    pub security: KafkaSecurity,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KafkaSecurity {
    pub tls: Option<KafkaTls>,
    pub sasl: Option<KafkaSasl>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KafkaTls {
    /// `None`: the system's authorities.
    pub ca_file: Option<PathBuf>,
    /// Set if and only if `key_file` is.
    pub cert_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KafkaSasl {
    /// PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512.
    pub mechanism: String,
    pub username: Secret,
    pub password: Secret,
}

impl KafkaConfig {
    /// The librdkafka properties that every client of ours shares: servers, security, client id.
    pub fn client_properties(&self) -> Vec<(&'static str, String)> {
        let KafkaSecurity { tls, sasl } = &self.security;
        let protocol = match (tls, sasl) {
            (None, None) => "plaintext",
            (Some(_), None) => "ssl",
            (None, Some(_)) => "sasl_plaintext",
            (Some(_), Some(_)) => "sasl_ssl",
        };
        let mut properties = vec![
            ("bootstrap.servers", self.bootstrap_servers.clone()),
            ("client.id", "host-metrics".to_owned()),
            ("security.protocol", protocol.to_owned()),
            // The kernel notices in its own time when a path between us and the broker silently drops packets.
            ("socket.keepalive.enable", "true".to_owned()),
            // Every address of a server's name is tried.
            ("client.dns.lookup", "use_all_dns_ips".to_owned()),
        ];
        if let Some(tls) = tls {
            properties.push(("enable.ssl.certificate.verification", "true".to_owned()));
            properties.push(("ssl.endpoint.identification.algorithm", "https".to_owned()));
            let files = [
                ("ssl.ca.location", &tls.ca_file),
                ("ssl.certificate.location", &tls.cert_file),
                ("ssl.key.location", &tls.key_file),
            ];
            for (property, file) in files {
                if let Some(file) = file {
                    properties.push((property, file.display().to_string()));
                }
            }
        }
        if let Some(sasl) = sasl {
            properties.push(("sasl.mechanism", sasl.mechanism.clone()));
            properties.push(("sasl.username", sasl.username.reveal().to_owned()));
            properties.push(("sasl.password", sasl.password.reveal().to_owned()));
        }
        properties
    }
}

/// Whether Kafka accepts it as a topic's name.
pub fn is_topic_name(name: &str) -> bool {
    (1..=MAX_TOPIC_BYTES).contains(&name.len())
        && name != "."
        && name != ".."
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

fn topic_name(text: &str) -> Option<String> {
    is_topic_name(text).then(|| text.to_owned())
}

pub(super) fn servers_and_security(reader: &mut Reader<'_>) -> KafkaConfig {
    KafkaConfig {
        bootstrap_servers: bootstrap_servers(reader),
        security: security(reader),
    }
}

fn bootstrap_servers(reader: &mut Reader<'_>) -> String {
    let name = "KAFKA_BOOTSTRAP_SERVERS";
    let value = reader.get(name);
    let servers: Vec<_> = value.unwrap_or_default().split(',').map(str::trim).collect();
    let wrong = servers.iter().find(|server| host_and_port(server).is_none());
    if let Some(wrong) = wrong {
        let remedy = value.and_then(|_| server_remedy(wrong));
        reader.wrong(name, "host:port, or several separated by commas", remedy);
    }
    servers.join(",")
}

fn server_remedy(server: &str) -> Option<String> {
    if server.contains("://") || server.contains('@') {
        return Some(match host_of_url(server) {
            Some(host) => {
                format!("write {host} and its port without the protocol, which KAFKA_SECURITY_PROTOCOL names")
            }
            None => "write host:port alone, without a protocol, a user and a password".to_owned(),
        });
    }
    if server.is_empty() {
        return Some("a comma separates two servers: remove the one that is too many".to_owned());
    }
    if server.parse::<std::net::Ipv6Addr>().is_ok() {
        return Some(format!("put an IPv6 address in brackets: [{server}]:9092"));
    }
    if host(server).is_some() {
        return Some(format!(
            "the port is missing, and Kafka's usual one is 9092: {server}:9092"
        ));
    }
    let is_list = |separator: char| {
        let parts = server.split(separator).map(str::trim);
        server.contains(separator)
            && parts
                .filter(|part| !part.is_empty())
                .all(|part| host_and_port(part).is_some())
    };
    [';', ' ', '|']
        .into_iter()
        .any(is_list)
        .then(|| "separate servers by commas".to_owned())
}

/// Which of the two security layers a protocol has.
#[derive(Clone, Copy)]
struct Protocol {
    word: &'static str,
    tls: bool,
    sasl: bool,
}

const PROTOCOLS: [Protocol; 4] = [
    Protocol {
        word: "PLAINTEXT",
        tls: false,
        sasl: false,
    },
    Protocol {
        word: "SSL",
        tls: true,
        sasl: false,
    },
    Protocol {
        word: "SASL_PLAINTEXT",
        tls: false,
        sasl: true,
    },
    Protocol {
        word: "SASL_SSL",
        tls: true,
        sasl: true,
    },
];

const FILES: [(&str, PemKind); 3] = [
    ("KAFKA_SSL_CA_FILE", PemKind::Certificate),
    ("KAFKA_SSL_CERT_FILE", PemKind::Certificate),
    ("KAFKA_SSL_KEY_FILE", PemKind::PrivateKey),
];

/// Every variable that is set is looked at, also where the protocol is wrong or does not use it: whatever is wrong with
/// it would otherwise be reported only after the first correction.
fn security(reader: &mut Reader<'_>) -> KafkaSecurity {
    let name = "KAFKA_SECURITY_PROTOCOL";
    let default = match FILES.iter().any(|(name, _)| reader.is_set(name)) {
        true => "SSL",
        false => "PLAINTEXT",
    };
    let find = |word: &str| {
        let same = |protocol: &Protocol| protocol.word.eq_ignore_ascii_case(word);
        PROTOCOLS.into_iter().find(same)
    };
    let protocol = match reader.is_set(name) {
        true => reader.read(name, "PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL", find),
        false => find(default),
    };
    KafkaSecurity {
        tls: tls(reader, protocol),
        sasl: sasl(reader, protocol),
    }
}

/// `protocol`: `None` where it is wrong, so that any may have been meant.
fn tls(reader: &mut Reader<'_>, protocol: Option<Protocol>) -> Option<KafkaTls> {
    if let Some(protocol) = protocol.filter(|protocol| !protocol.tls) {
        let with_tls = if protocol.sasl { "SASL_SSL" } else { "SSL" };
        for (name, kind) in FILES {
            // The original required these variables even where nobody had certificates.
            let Some(path) = reader.get(name).filter(|path| Path::new(path).exists()) else {
                continue;
            };
            reader.conflict(
                name,
                format!(
                    "names a file that exists ({path:?}), but KAFKA_SECURITY_PROTOCOL={} does not use it; set \
                     KAFKA_SECURITY_PROTOCOL={with_tls} or unset {name}",
                    protocol.word
                ),
            );
            reader.pem_file(name, kind);
        }
        return None;
    }
    for (one, other) in [(1, 2), (2, 1)] {
        let (one, other) = (FILES[one].0, FILES[other].0);
        if reader.is_set(one) && !reader.is_set(other) {
            reader.conflict(
                other,
                format!(
                    "is not set, but {one} is: a certificate and its key belong together; set both or neither"
                ),
            );
        }
    }
    let [ca_file, cert_file, key_file] = FILES.map(|(name, kind)| reader.pem_file(name, kind));
    Some(KafkaTls {
        ca_file,
        cert_file,
        key_file,
    })
}

fn sasl(reader: &mut Reader<'_>, protocol: Option<Protocol>) -> Option<KafkaSasl> {
    let mechanism_name = "KAFKA_SASL_MECHANISM";
    let username_names = ("KAFKA_SASL_USERNAME", "KAFKA_SASL_USERNAME_FILE");
    let password_names = ("KAFKA_SASL_PASSWORD", "KAFKA_SASL_PASSWORD_FILE");
    let mechanism = |text: &str| {
        let same = |known: &&str| known.eq_ignore_ascii_case(text);
        MECHANISMS.into_iter().find(same)
    };
    let is_needed = protocol.is_some_and(|protocol| protocol.sasl);
    let expected = "PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512";
    if is_needed && !reader.is_set(mechanism_name) {
        reader.wrong(mechanism_name, expected, None);
    }
    let mechanism = reader.read(mechanism_name, expected, mechanism);
    let [username, password] = [username_names, password_names].map(|(name, file)| {
        if let Some(protocol) = protocol.filter(|_| is_needed && !reader.is_set(name) && !reader.is_set(file)) {
            let what = format!(
                "is not set, but KAFKA_SECURITY_PROTOCOL={} needs it; set it, or set {file} to a file that holds it",
                protocol.word
            );
            reader.conflict(name, what);
        }
        reader.secret(name, file)
    });
    if let Some(protocol) = protocol.filter(|protocol| !protocol.sasl) {
        let names = [
            mechanism_name,
            username_names.0,
            username_names.1,
            password_names.0,
            password_names.1,
        ];
        for name in names {
            if reader.is_set(name) {
                let what = format!(
                    "is set, but KAFKA_SECURITY_PROTOCOL={} does not use it; set KAFKA_SECURITY_PROTOCOL=SASL_SSL (or \
                     SASL_PLAINTEXT) or unset {name}",
                    protocol.word
                );
                reader.conflict(name, what);
            }
        }
        return None;
    }
    Some(KafkaSasl {
        mechanism: mechanism?.to_owned(),
        username: username?,
        password: password?,
    })
}

pub(super) fn topic(reader: &mut Reader<'_>) -> String {
    let expected = format!("the name of one topic: {TOPIC_NAME_RULE}");
    reader
        .read("KAFKA_TOPIC", expected, topic_name)
        .unwrap_or_else(|| DEFAULT_TOPIC.to_owned())
}

pub(super) fn topics(reader: &mut Reader<'_>) -> Vec<String> {
    let expected = format!("different names of topics, separated by commas: {TOPIC_NAME_RULE}");
    let distinct = |topics: &Vec<String>| {
        topics.len() <= MAX_TOPICS && topics.iter().collect::<BTreeSet<_>>().len() == topics.len()
    };
    reader
        .read("KAFKA_TOPIC", expected, |text| {
            let topics: Option<Vec<_>> = text.split(',').map(|name| topic_name(name.trim())).collect();
            topics.filter(distinct)
        })
        .unwrap_or_else(|| vec![DEFAULT_TOPIC.to_owned()])
}

pub(super) fn group_id(reader: &mut Reader<'_>) -> String {
    reader
        .line("KAFKA_GROUP_ID", MAX_LINE_BYTES)
        .unwrap_or_else(|| DEFAULT_GROUP_ID.to_owned())
}

pub(super) fn group_instance_id(reader: &mut Reader<'_>) -> Option<String> {
    reader.read("KAFKA_GROUP_INSTANCE_ID", TOPIC_NAME_RULE, topic_name)
}
