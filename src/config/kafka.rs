//! The KAFKA_* variables: how to connect to Kafka, and what to read or write there.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::form::{MAX_LINE_BYTES, host, host_and_port, host_of_url};
use super::reader::{PemKind, Reader};
use super::secret::Secret;

const DEFAULT_TOPIC: &str = "host-metrics";
const DEFAULT_GROUP_ID: &str = "host-metrics";
pub(super) const PRODUCE_GROUP: &str = "PRODUCE_GROUP";
/// The consumer numbers its topics with 16 bits. This limit is far above any real list.
const MAX_TOPICS: usize = 1_000;
/// Kafka's limit, in org.apache.kafka.common.internals.Topic.
const MAX_TOPIC_BYTES: usize = 249;

/// Kafka's rule for the name of a topic, for messages.
pub const TOPIC_NAME_RULE: &str = "at most 249 letters, digits, `.`, `_` and `-`";

const MECHANISMS: [&str; 3] = ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"];

/// The group of producers that share their hosts.
#[derive(Clone, Debug)]
pub struct GroupConfig {
    /// PRODUCE_GROUP.
    pub name: String,
    /// KAFKA_GROUP_INSTANCE_ID.
    pub instance_id: Option<String>,
}

/// How to connect to Kafka. The parts are consistent with each other.
#[derive(Clone)]
pub struct KafkaConfig {
    pub bootstrap_servers: String,
    pub security: KafkaSecurity,
}

#[derive(Clone, PartialEq, Eq)]
pub struct KafkaSecurity {
    pub tls: Option<KafkaTls>,
    pub sasl: Option<KafkaSasl>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KafkaTls {
    /// `None`: the authorities that the system trusts.
    pub ca_file: Option<PathBuf>,
    /// Set if and only if `key_file` is.
    pub cert_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
}

#[derive(Clone, PartialEq, Eq)]
pub struct KafkaSasl {
    /// PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512.
    pub mechanism: String,
    pub username: Secret,
    pub password: Secret,
}

/// Whether Kafka accepts it as the name of a topic.
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
                format!("write {host} and its port without the protocol, which KAFKA_SECURITY_PROTOCOL sets")
            }
            None => "write only host:port, without a protocol, user or password".to_owned(),
        });
    }
    if server.parse::<std::net::Ipv6Addr>().is_ok() {
        return Some(format!("put an IPv6 address in brackets: [{server}]:9092"));
    }
    host(server)?;
    Some(format!(
        "the port is missing; Kafka's default is 9092: {server}:9092"
    ))
}

/// The security protocols. Those that end with SSL have TLS.
const PROTOCOLS: [&str; 4] = ["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"];

const FILES: [(&str, PemKind); 3] = [
    ("KAFKA_SSL_CA_FILE", PemKind::Certificate),
    ("KAFKA_SSL_CERT_FILE", PemKind::Certificate),
    ("KAFKA_SSL_KEY_FILE", PemKind::PrivateKey),
];

/// Checks every variable that is set, even if the protocol is wrong or does not use it, so that all errors are reported
/// together.
fn security(reader: &mut Reader<'_>) -> KafkaSecurity {
    let name = "KAFKA_SECURITY_PROTOCOL";
    let default = match FILES.iter().any(|(name, _)| reader.is_set(name)) {
        true => "SSL",
        false => "PLAINTEXT",
    };
    let find = |word: &str| {
        let same = |known: &&str| known.eq_ignore_ascii_case(word);
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

fn has_sasl(protocol: &str) -> bool {
    protocol.starts_with("SASL")
}

/// `protocol` is `None` if its variable is wrong.
fn tls(reader: &mut Reader<'_>, protocol: Option<&str>) -> Option<KafkaTls> {
    if let Some(protocol) = protocol.filter(|protocol| !protocol.ends_with("SSL")) {
        let with_tls = if has_sasl(protocol) { "SASL_SSL" } else { "SSL" };
        for (name, kind) in FILES {
            // Only files that exist, because existing setups may name files that were never there.
            let Some(path) = reader.get(name).filter(|path| Path::new(path).exists()) else {
                continue;
            };
            reader.conflict(
                name,
                format!(
                    "names a file that exists ({path:?}), but KAFKA_SECURITY_PROTOCOL={protocol} does not use it; set \
                     KAFKA_SECURITY_PROTOCOL={with_tls} or unset {name}"
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
                format!("is not set, but {one} is: a certificate needs its key; set both or neither"),
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

fn sasl(reader: &mut Reader<'_>, protocol: Option<&str>) -> Option<KafkaSasl> {
    let mechanism_name = "KAFKA_SASL_MECHANISM";
    let username_names = ("KAFKA_SASL_USERNAME", "KAFKA_SASL_USERNAME_FILE");
    let password_names = ("KAFKA_SASL_PASSWORD", "KAFKA_SASL_PASSWORD_FILE");
    let mechanism = |text: &str| {
        let same = |known: &&str| known.eq_ignore_ascii_case(text);
        MECHANISMS.into_iter().find(same)
    };
    let is_needed = protocol.is_some_and(has_sasl);
    let expected = "PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512";
    if is_needed && !reader.is_set(mechanism_name) {
        reader.wrong(mechanism_name, expected, None);
    }
    let mechanism = reader.read(mechanism_name, expected, mechanism);
    let [username, password] = [username_names, password_names].map(|(name, file)| {
        if let Some(protocol) = protocol.filter(|_| is_needed && !reader.is_set(name) && !reader.is_set(file)) {
            let what = format!(
                "is not set, but KAFKA_SECURITY_PROTOCOL={protocol} requires it; set it, or set {file} to a file with the value"
            );
            reader.conflict(name, what);
        }
        reader.secret(name, file)
    });
    if let Some(protocol) = protocol.filter(|protocol| !has_sasl(protocol)) {
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
                    "is set, but KAFKA_SECURITY_PROTOCOL={protocol} does not use it; set KAFKA_SECURITY_PROTOCOL=SASL_SSL (or \
                     SASL_PLAINTEXT) or unset {name}"
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
    let expected =
        format!("the names of topics, separated by commas, without duplicates; each has {TOPIC_NAME_RULE}");
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

/// The topics of KAFKA_TOPIC for one table. KAFKA_TOPIC_FAILURES must not be among them.
pub(super) fn topics_without_failures(reader: &mut Reader<'_>) -> Vec<String> {
    let topics = topics(reader);
    failures_topic(reader, &topics);
    topics
}

/// All topics that `init` creates: those of KAFKA_TOPIC and that of KAFKA_TOPIC_FAILURES.
pub(super) fn topics_with_failures(reader: &mut Reader<'_>) -> Vec<String> {
    let mut topics = topics(reader);
    topics.extend(failures_topic(reader, &topics));
    topics
}

/// KAFKA_TOPIC_FAILURES. `topics` are those of KAFKA_TOPIC.
pub(super) fn failures_topic(reader: &mut Reader<'_>, topics: &[String]) -> Option<String> {
    let name = "KAFKA_TOPIC_FAILURES";
    let expected = format!("the name of one topic: {TOPIC_NAME_RULE}");
    let topic = reader.read(name, expected, topic_name)?;
    if topics.contains(&topic) {
        let what = format!(
            "is {topic:?}, which KAFKA_TOPIC contains too: it has a second copy of every failed check, so one table would count \
             these checks twice; set another topic, or remove it from KAFKA_TOPIC"
        );
        reader.conflict(name, what);
    }
    Some(topic)
}

pub(super) fn group_id(reader: &mut Reader<'_>) -> String {
    reader
        .line("KAFKA_GROUP_ID", MAX_LINE_BYTES)
        .unwrap_or_else(|| DEFAULT_GROUP_ID.to_owned())
}

pub(super) fn group_instance_id(reader: &mut Reader<'_>) -> Option<String> {
    reader.read("KAFKA_GROUP_INSTANCE_ID", TOPIC_NAME_RULE, topic_name)
}

pub(super) fn produce_group(reader: &mut Reader<'_>) -> Option<GroupConfig> {
    let name = reader.line(PRODUCE_GROUP, MAX_LINE_BYTES)?;
    if name == reader.get("KAFKA_GROUP_ID").unwrap_or(DEFAULT_GROUP_ID) {
        let what = format!(
            "is {name:?}, the group of the consumers (KAFKA_GROUP_ID): producers need a group of their own, e.g. \
             PRODUCE_GROUP={name}-produce"
        );
        reader.conflict(PRODUCE_GROUP, what);
    }
    Some(GroupConfig {
        name,
        instance_id: group_instance_id(reader),
    })
}
