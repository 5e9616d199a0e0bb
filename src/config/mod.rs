//! Variables in, one checked configuration per command out.
//!
//! Owns every variable's name, default, meaning and error text, and the order in which they win: `-e NAME=VALUE`, the
//! environment, the `.env` file. The only module that reads the environment. All problems are collected and told at once.

pub(crate) mod pem;
mod problems;
mod variables;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use log::LevelFilter;

use crate::tables::names::{MAX_IDENTIFIER_BYTES, MAX_TABLE_BYTES, TableName};
use problems::{PemKind, Problems, Variable, is_line};
use variables::Raw;
pub use variables::{NAMES, Variables};

/// How a request names us where USER_AGENT does not.
pub const DEFAULT_USER_AGENT: &str = concat!(
    "host-metrics/",
    env!("CARGO_PKG_VERSION"),
    " (+",
    env!("CARGO_PKG_REPOSITORY"),
    ")"
);

const DEFAULT_TOPIC: &str = "host-metrics";
const DEFAULT_GROUP_ID: &str = "host-metrics";
const DEFAULT_TABLE: &str = "host_metrics";
const DEFAULT_CHECK_TIMEOUT: Duration = Duration::from_secs(10);
const DEFAULT_MAX_THREADS: usize = 1_024;

const SECOND: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A batch is held in memory, and so is a second one while it is written.
const BATCH_SIZES: RangeInclusive<usize> = 1..=100_000;
const BATCH_SECONDS: RangeInclusive<f64> = 0.01..=3_600.0;
/// Tables are partitioned by day; the upper bound only keeps the arithmetic in range.
const RETENTIONS: RangeInclusive<Duration> = DAY..=DAY.saturating_mul(36_500);
const CHECK_TIMEOUTS: RangeInclusive<Duration> = Duration::from_millis(1)..=DAY;
/// A thread each: Linux's default limits end not far above.
const THREADS: RangeInclusive<usize> = 1..=30_000;
/// A body is in memory once per check under way.
const BODY_BYTES: RangeInclusive<u64> = 1..=1 << 30;
/// The consumer numbers its topics with 16 bits; nobody reads that many.
const MAX_TOPICS: usize = 1_000;
/// Kafka's: org.apache.kafka.common.internals.Topic.
const MAX_TOPIC_BYTES: usize = 249;
/// For names and the like that nothing else bounds.
const MAX_LINE_BYTES: usize = 255;

/// The command line, a variable or the host file is wrong: everything that is wrong, ready to print. Exit status 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct WrongInput(pub String);

/// For `produce`.
///
/// # Errors
/// Any variable that it needs is wrong: all of them, a line each.
pub fn produce(variables: &Variables) -> Result<ProduceConfig, WrongInput> {
    let Variables { raw, mut problems } = variables.clone();
    let config = ProduceConfig {
        kafka: kafka(&raw, &mut problems),
        topic: topic(&raw, &mut problems),
        check: CheckConfig {
            max_threads: max_threads(&raw, &mut problems),
            ..a_check(&raw, &mut problems)
        },
        metrics_addr: metrics_addr(&raw, &mut problems),
    };
    check_log_level(&raw, &mut problems);
    problems.finish(config)
}

/// For `consume`.
///
/// # Errors
/// Any variable that it needs is wrong: all of them, a line each.
pub fn consume(variables: &Variables) -> Result<ConsumeConfig, WrongInput> {
    let Variables { raw, mut problems } = variables.clone();
    let group_instance_id = Variable::new("KAFKA_GROUP_INSTANCE_ID", &raw.kafka_group_instance_id);
    let batch_size = Variable::new("DB_BATCH_SIZE", &raw.db_batch_size);
    let retention = Variable::new("DB_RETENTION", &raw.db_retention);
    let config = ConsumeConfig {
        kafka: kafka(&raw, &mut problems),
        topics: topics(&raw, &mut problems),
        group_id: group_id(&raw, &mut problems),
        group_instance_id: problems.read(group_instance_id, TOPIC_NAME_RULE, legal_name),
        database: database(&raw, &mut problems),
        batch_size: problems.number(batch_size, BATCH_SIZES, 100),
        batch_wait: batch_wait(&raw, &mut problems),
        retention: problems.duration(retention, RETENTIONS, "90d"),
        metrics_addr: metrics_addr(&raw, &mut problems),
    };
    check_log_level(&raw, &mut problems);
    problems.finish(config)
}

/// Whom a command will talk to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Servers {
    pub kafka: bool,
    pub database: bool,
}

impl Servers {
    pub const BOTH: Self = Self {
        kafka: true,
        database: true,
    };
}

/// For `init` and `drop`. How to reach a server that is not among `servers` is not looked at and left empty.
///
/// # Errors
/// Any variable that the command needs is wrong: all of them, a line each.
pub fn init(variables: &Variables, servers: Servers) -> Result<InitConfig, WrongInput> {
    let Variables { raw, mut problems } = variables.clone();
    let nowhere = KafkaConfig {
        bootstrap_servers: String::new(),
        security: KafkaSecurity {
            tls: None,
            sasl: None,
        },
    };
    let config = InitConfig {
        kafka: if servers.kafka {
            kafka(&raw, &mut problems)
        } else {
            nowhere
        },
        topics: topics(&raw, &mut problems),
        database: if servers.database {
            database(&raw, &mut problems)
        } else {
            let mut untold = Problems::default();
            DatabaseConfig {
                table: table(&raw, &mut problems),
                ..database(&raw, &mut untold)
            }
        },
    };
    check_log_level(&raw, &mut problems);
    problems.finish(config)
}

/// For `status`. Without KAFKA_BOOTSTRAP_SERVERS it shows what the tables alone can tell.
///
/// # Errors
/// Any variable that it needs is wrong: all of them, a line each.
pub fn status(variables: &Variables) -> Result<StatusConfig, WrongInput> {
    let Variables { raw, mut problems } = variables.clone();
    let config = StatusConfig {
        kafka: raw
            .kafka_bootstrap_servers
            .is_some()
            .then(|| kafka(&raw, &mut problems)),
        topics: topics(&raw, &mut problems),
        group_id: group_id(&raw, &mut problems),
        database: database(&raw, &mut problems),
    };
    check_log_level(&raw, &mut problems);
    problems.finish(config)
}

/// For `health`: where the agent serves its readiness.
///
/// # Errors
/// METRICS_ADDR is not set, so that nobody can be asked, or wrong.
pub fn health(variables: &Variables) -> Result<SocketAddr, WrongInput> {
    let Variables { raw, mut problems } = variables.clone();
    let address = metrics_addr(&raw, &mut problems);
    if raw.metrics_addr.is_none() {
        problems.push(
            "METRICS_ADDR is not set: `health` asks the agent that listens there, so set it for the agent and for \
             `health` alike, e.g. METRICS_ADDR=127.0.0.1:9464"
                .to_owned(),
        );
    }
    check_log_level(&raw, &mut problems);
    let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
    problems.finish(address.unwrap_or(nowhere))
}

/// For `check`.
///
/// # Errors
/// Any variable that it needs is wrong: all of them, a line each.
pub fn check(variables: &Variables) -> Result<CheckConfig, WrongInput> {
    let Variables { raw, mut problems } = variables.clone();
    let config = a_check(&raw, &mut problems);
    check_log_level(&raw, &mut problems);
    problems.finish(config)
}

/// For `demo`: how it checks; its servers are its own.
///
/// # Errors
/// Any variable that it needs is wrong: all of them, a line each.
pub fn demo(variables: &Variables) -> Result<CheckConfig, WrongInput> {
    let Variables { raw, mut problems } = variables.clone();
    let config = CheckConfig {
        max_threads: max_threads(&raw, &mut problems),
        ..a_check(&raw, &mut problems)
    };
    check_log_level(&raw, &mut problems);
    problems.finish(config)
}

/// For `validate`: what a forecast depends on.
///
/// # Errors
/// Any variable that it needs is wrong: all of them, a line each.
pub fn validate(variables: &Variables) -> Result<ValidateConfig, WrongInput> {
    let Variables { raw, mut problems } = variables.clone();
    let config = ValidateConfig {
        timeout: check_timeout(&raw, &mut problems),
        max_threads: max_threads(&raw, &mut problems),
        max_body_bytes: max_body_bytes(&raw, &mut problems),
    };
    check_log_level(&raw, &mut problems);
    problems.finish(config)
}

/// LOG_LEVEL alone; the other functions here look at it too, so that it is told with the rest.
///
/// # Errors
/// It is no level, or a source of the variables was wrong.
pub fn log_level(variables: &Variables) -> Result<LevelFilter, WrongInput> {
    let Variables { raw, mut problems } = variables.clone();
    let level = check_log_level(&raw, &mut problems);
    problems.finish(level)
}

/// A line for each file with a secret, among those that reach these servers, that every user of the machine can read.
///
/// To be warned of and no more: containers mount secrets so. A group's right to read is not spoken of, for it is how a key
/// is shared on purpose.
pub fn exposed_secrets(variables: &Variables, servers: Servers) -> Vec<String> {
    let raw = &variables.raw;
    let kafka = [
        Variable::new("KAFKA_SSL_KEY_FILE", &raw.kafka_ssl_key_file),
        Variable::new("KAFKA_SASL_USERNAME_FILE", &raw.kafka_sasl_username_file),
        Variable::new("KAFKA_SASL_PASSWORD_FILE", &raw.kafka_sasl_password_file),
    ];
    let database = [Variable::new("DB_PASSWORD_FILE", &raw.db_password_file)];
    let kafka = kafka.iter().filter(|_| servers.kafka);
    let files = kafka.chain(database.iter().filter(|_| servers.database));
    files.filter_map(exposed).collect()
}

fn exposed(file: &Variable<'_>) -> Option<String> {
    let path = file.value?;
    let mode = std::fs::metadata(path).ok()?.permissions().mode() & 0o7777;
    (mode & 0o004 != 0).then(|| {
        format!(
            "{}={path:?}: every user of this machine can read the file (mode {mode:04o}); `chmod o-r` ends that",
            file.name
        )
    })
}

/// A value that no log line, error or `Debug` output shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(value: String) -> Self {
        Self(value)
    }

    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

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
            // A path that is silently dropped between us and the broker is noticed in the kernel's time.
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

/// What every check needs, whoever asks for it (`produce`, `check`).
#[derive(Clone, Debug)]
pub struct CheckConfig {
    /// One check in all; a host's `timeout=` wins, and neither exceeds 95 % of the interval.
    pub timeout: Duration,
    pub max_threads: usize,
    pub max_body_bytes: u64,
    /// One line of printable ASCII.
    pub user_agent: String,
    pub ca_file: Option<PathBuf>,
    pub agent_name: String,
}

#[derive(Clone, Debug)]
pub struct ValidateConfig {
    pub timeout: Duration,
    pub max_threads: usize,
    pub max_body_bytes: u64,
}

#[derive(Clone, Debug)]
pub struct ProduceConfig {
    pub kafka: KafkaConfig,
    /// Where records of hosts without `topic=` go.
    pub topic: String,
    pub check: CheckConfig,
    pub metrics_addr: Option<SocketAddr>,
}

#[derive(Clone, Debug)]
pub struct ConsumeConfig {
    pub kafka: KafkaConfig,
    /// Not empty, each once.
    pub topics: Vec<String>,
    pub group_id: String,
    pub group_instance_id: Option<String>,
    pub database: DatabaseConfig,
    pub batch_size: usize,
    /// DB_BATCH_SECONDS: a smaller batch is written when its oldest record was read that long ago.
    pub batch_wait: Duration,
    pub retention: Option<Duration>,
    pub metrics_addr: Option<SocketAddr>,
}

/// What `init` and `drop` need; see [`init()`] for what is left empty.
#[derive(Clone, Debug)]
pub struct InitConfig {
    pub kafka: KafkaConfig,
    pub topics: Vec<String>,
    pub database: DatabaseConfig,
}

#[derive(Clone, Debug)]
pub struct StatusConfig {
    /// `None`: the lag is not to be told.
    pub kafka: Option<KafkaConfig>,
    pub topics: Vec<String>,
    pub group_id: String,
    pub database: DatabaseConfig,
}

#[derive(Clone, Debug)]
pub struct DatabaseConfig {
    pub host: String,
    pub port: u16,
    pub name: String,
    pub user: String,
    pub password: Option<Secret>,
    pub table: TableName,
    pub ssl_mode: DbSslMode,
    pub ssl_root_cert: Option<PathBuf>,
}

/// libpq's words with libpq's meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DbSslMode {
    Disable,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

impl DbSslMode {
    pub fn from_word(word: &str) -> Option<Self> {
        Some(match word {
            "disable" => Self::Disable,
            "prefer" => Self::Prefer,
            "require" => Self::Require,
            "verify-ca" => Self::VerifyCa,
            "verify-full" => Self::VerifyFull,
            _ => return None,
        })
    }
}

/// Whether Kafka takes it as a topic's name.
pub fn is_topic_name(name: &str) -> bool {
    (1..=MAX_TOPIC_BYTES).contains(&name.len())
        && name != "."
        && name != ".."
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

/// Kafka's rule for a topic's name, for messages.
pub const TOPIC_NAME_RULE: &str = "letters, digits, `.`, `_` and `-`, 249 at most";

fn legal_name(text: &str) -> Option<String> {
    is_topic_name(text).then(|| text.to_owned())
}

fn kafka(raw: &Raw, problems: &mut Problems) -> KafkaConfig {
    let servers = Variable::new("KAFKA_BOOTSTRAP_SERVERS", &raw.kafka_bootstrap_servers);
    let bootstrap_servers = problems.required(servers, "host:port, or several with commas between", |text| {
        text.split(',').all(|server| is_server(server.trim()))
    });
    KafkaConfig {
        bootstrap_servers: bootstrap_servers.replace(char::is_whitespace, ""),
        security: kafka_security(raw, problems),
    }
}

fn is_server(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else {
        return false;
    };
    let is_host = match host.strip_prefix('[') {
        Some(v6) => v6
            .strip_suffix(']')
            .is_some_and(|v6| v6.parse::<std::net::Ipv6Addr>().is_ok()),
        None => {
            !host.is_empty()
                && !host.contains(|c: char| c.is_whitespace() || c.is_control() || ":/@[]".contains(c))
        }
    };
    is_host && is_port(port)
}

fn is_port(text: &str) -> bool {
    port(text).is_some()
}

fn port(text: &str) -> Option<u16> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|port| digits && *port > 0)
}

fn kafka_security(raw: &Raw, problems: &mut Problems) -> KafkaSecurity {
    let ca_file = Variable::new("KAFKA_SSL_CA_FILE", &raw.kafka_ssl_ca_file);
    let cert_file = Variable::new("KAFKA_SSL_CERT_FILE", &raw.kafka_ssl_cert_file);
    let key_file = Variable::new("KAFKA_SSL_KEY_FILE", &raw.kafka_ssl_key_file);
    let files = [ca_file, cert_file, key_file];

    let protocol = Variable::new("KAFKA_SECURITY_PROTOCOL", &raw.kafka_security_protocol);
    let from_files = if files.iter().any(|file| file.value.is_some()) {
        "SSL"
    } else {
        "PLAINTEXT"
    };
    let word = protocol.value.unwrap_or(from_files).to_ascii_uppercase();
    let (tls, sasl) = match word.as_str() {
        "PLAINTEXT" => (false, false),
        "SSL" => (true, false),
        "SASL_PLAINTEXT" => (false, true),
        "SASL_SSL" => (true, true),
        _ => {
            problems.wrong(protocol, "PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL");
            // Whatever else is wrong depends on which of them was meant.
            return KafkaSecurity {
                tls: None,
                sasl: None,
            };
        }
    };

    let tls = if tls {
        for (one, other) in [(cert_file, key_file), (key_file, cert_file)] {
            if one.value.is_some() && other.value.is_none() {
                problems.push(format!(
                    "{} is not set, but {} is: a certificate and its key go together; set both or neither",
                    other.name, one.name
                ));
            }
        }
        Some(KafkaTls {
            ca_file: problems.pem_file(ca_file, PemKind::Certificate),
            cert_file: problems.pem_file(cert_file, PemKind::Certificate),
            key_file: problems.pem_file(key_file, PemKind::PrivateKey),
        })
    } else {
        for file in files {
            if let Some(path) = file.value.filter(|path| Path::new(path).exists()) {
                problems.push(format!(
                    "{}={path:?}: the file is there, but with KAFKA_SECURITY_PROTOCOL={word} it would not be used; \
                     set {} or unset {}",
                    file.name,
                    if sasl { "KAFKA_SECURITY_PROTOCOL=SASL_SSL" } else { "KAFKA_SECURITY_PROTOCOL=SSL" },
                    file.name
                ));
            }
        }
        None
    };
    KafkaSecurity {
        tls,
        sasl: kafka_sasl(raw, &word, sasl, problems),
    }
}

fn kafka_sasl(raw: &Raw, protocol: &str, is_used: bool, problems: &mut Problems) -> Option<KafkaSasl> {
    let mechanism = Variable::new("KAFKA_SASL_MECHANISM", &raw.kafka_sasl_mechanism);
    let username = Variable::new("KAFKA_SASL_USERNAME", &raw.kafka_sasl_username);
    let username_file = Variable::new("KAFKA_SASL_USERNAME_FILE", &raw.kafka_sasl_username_file);
    let password = Variable::new("KAFKA_SASL_PASSWORD", &raw.kafka_sasl_password);
    let password_file = Variable::new("KAFKA_SASL_PASSWORD_FILE", &raw.kafka_sasl_password_file);

    if !is_used {
        let all = [mechanism, username, username_file, password, password_file];
        for variable in all.iter().filter(|variable| variable.value.is_some()) {
            problems.push(format!(
                "{} is set, but with KAFKA_SECURITY_PROTOCOL={protocol} it would not be used; \
                 set KAFKA_SECURITY_PROTOCOL=SASL_SSL (or SASL_PLAINTEXT) or unset {}",
                variable.name, variable.name
            ));
        }
        return None;
    }

    let known = ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"];
    let word = problems.required(mechanism, "PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512", |text| {
        known.iter().any(|known| known.eq_ignore_ascii_case(text))
    });
    let mut needed = |variable: Variable<'_>, file: Variable<'_>| {
        if variable.value.is_none() && file.value.is_none() {
            problems.push(format!(
                "{} is not set, but KAFKA_SECURITY_PROTOCOL={protocol} needs it; set it, or {} to a file that holds it",
                variable.name, file.name
            ));
        }
        problems.secret(variable, file)
    };
    // Both are read whatever the first one says.
    let (username, password) = (needed(username, username_file), needed(password, password_file));
    Some(KafkaSasl {
        mechanism: word.to_ascii_uppercase(),
        username: username?,
        password: password?,
    })
}

fn topic(raw: &Raw, problems: &mut Problems) -> String {
    let variable = Variable::new("KAFKA_TOPIC", &raw.kafka_topic);
    let expected = format!("one topic's name: {TOPIC_NAME_RULE}");
    problems
        .read(variable, expected, legal_name)
        .unwrap_or_else(|| DEFAULT_TOPIC.to_owned())
}

fn topics(raw: &Raw, problems: &mut Problems) -> Vec<String> {
    let variable = Variable::new("KAFKA_TOPIC", &raw.kafka_topic);
    let expected = format!("names of topics, each once, with commas between: {TOPIC_NAME_RULE}");
    let distinct = |topics: &Vec<String>| {
        topics.len() <= MAX_TOPICS && topics.iter().collect::<BTreeSet<_>>().len() == topics.len()
    };
    problems
        .read(variable, expected, |text| {
            let topics: Option<Vec<_>> = text.split(',').map(|name| legal_name(name.trim())).collect();
            topics.filter(distinct)
        })
        .unwrap_or_else(|| vec![DEFAULT_TOPIC.to_owned()])
}

fn group_id(raw: &Raw, problems: &mut Problems) -> String {
    let variable = Variable::new("KAFKA_GROUP_ID", &raw.kafka_group_id);
    problems
        .line(variable, MAX_LINE_BYTES)
        .unwrap_or_else(|| DEFAULT_GROUP_ID.to_owned())
}

fn database(raw: &Raw, problems: &mut Problems) -> DatabaseConfig {
    let is_name = |text: &str| is_line(text, MAX_LINE_BYTES);
    let host = Variable::new("DB_HOST", &raw.db_host);
    let host = problems.required(
        host,
        "a host's name, its address, or the directory of its socket",
        |text| is_name(text) && !text.contains(char::is_whitespace),
    );
    let port_variable = Variable::new("DB_PORT", &raw.db_port);
    let expected = "a port's number from 1 to 65535; correct it, or leave it unset for 5432";
    let port = problems.read(port_variable, expected, port).unwrap_or(5_432);
    let name = Variable::new("DB_NAME", &raw.db_name);
    let name = problems.required(name, "the database's name", is_name);
    let user = Variable::new("DB_USER", &raw.db_user);
    let user = problems.required(user, "the name of the database's user", is_name);
    let password = problems.secret(
        Variable::new("DB_PASSWORD", &raw.db_password),
        Variable::new("DB_PASSWORD_FILE", &raw.db_password_file),
    );
    let table = table(raw, problems);
    let ssl_mode = Variable::new("DB_SSLMODE", &raw.db_sslmode);
    let expected =
        "disable, prefer, require, verify-ca or verify-full; correct it, or leave it unset for prefer";
    let ssl_mode = problems
        .read(ssl_mode, expected, |text| {
            DbSslMode::from_word(&text.to_ascii_lowercase())
        })
        .unwrap_or(DbSslMode::Prefer);
    // Without TLS nobody reads it.
    let ssl_root_cert = match ssl_mode {
        DbSslMode::Disable => None,
        _ => {
            let file = Variable::new("DB_SSLROOTCERT", &raw.db_sslrootcert);
            problems.pem_file(file, PemKind::Certificate)
        }
    };
    DatabaseConfig {
        host,
        port,
        name,
        user,
        password,
        table,
        ssl_mode,
        ssl_root_cert,
    }
}

fn table(raw: &Raw, problems: &mut Problems) -> TableName {
    let variable = Variable::new("DB_TABLE", &raw.db_table);
    let expected = format!(
        "`table` or `schema.table`, {MAX_TABLE_BYTES} bytes at most for the table and {MAX_IDENTIFIER_BYTES} for the \
         schema; a name with a dot stands in double quotes; correct it, or leave it unset for {DEFAULT_TABLE}"
    );
    problems
        .read(variable, expected, TableName::parse)
        .unwrap_or_else(|| TableName {
            schema: None,
            name: DEFAULT_TABLE.to_owned(),
        })
}

fn batch_wait(raw: &Raw, problems: &mut Problems) -> Duration {
    let variable = Variable::new("DB_BATCH_SECONDS", &raw.db_batch_seconds);
    let expected = format!(
        "a number of seconds from {} to {}, e.g. 0.5; correct it, or leave it unset for 1",
        BATCH_SECONDS.start(),
        BATCH_SECONDS.end()
    );
    problems
        .read(variable, expected, |text| {
            let seconds = text
                .parse()
                .ok()
                .filter(|seconds| BATCH_SECONDS.contains(seconds))?;
            Duration::try_from_secs_f64(seconds).ok()
        })
        .unwrap_or(SECOND)
}

fn max_body_bytes(raw: &Raw, problems: &mut Problems) -> u64 {
    let variable = Variable::new("MAX_BODY_BYTES", &raw.max_body_bytes);
    problems.number(variable, BODY_BYTES, 1 << 20)
}

fn a_check(raw: &Raw, problems: &mut Problems) -> CheckConfig {
    let user_agent = Variable::new("USER_AGENT", &raw.user_agent);
    let ca_file = Variable::new("CHECK_CA_FILE", &raw.check_ca_file);
    CheckConfig {
        timeout: check_timeout(raw, problems),
        max_threads: 1,
        max_body_bytes: max_body_bytes(raw, problems),
        user_agent: problems
            .read(
                user_agent,
                "one line of printable ASCII, 255 bytes at most",
                |text| {
                    let is_printable = text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic());
                    (is_printable && text.len() <= MAX_LINE_BYTES).then(|| text.to_owned())
                },
            )
            .unwrap_or_else(|| DEFAULT_USER_AGENT.to_owned()),
        ca_file: problems.pem_file(ca_file, PemKind::Certificate),
        agent_name: agent_name(raw, problems),
    }
}

fn check_timeout(raw: &Raw, problems: &mut Problems) -> Duration {
    let variable = Variable::new("CHECK_TIMEOUT", &raw.check_timeout);
    problems
        .duration(variable, CHECK_TIMEOUTS, "10s")
        .unwrap_or(DEFAULT_CHECK_TIMEOUT)
}

fn max_threads(raw: &Raw, problems: &mut Problems) -> usize {
    let variable = Variable::new("MAX_THREADS", &raw.max_threads);
    problems.number(variable, THREADS, DEFAULT_MAX_THREADS)
}

fn agent_name(raw: &Raw, problems: &mut Problems) -> String {
    let variable = Variable::new("AGENT_NAME", &raw.agent_name);
    let name = problems.line(variable, MAX_LINE_BYTES);
    if name.is_some() || variable.value.is_some() {
        return name.unwrap_or_default();
    }
    match whoami::hostname() {
        Ok(name) if !name.is_empty() && is_line(&name, MAX_LINE_BYTES) => name,
        _ => {
            problems.wrong(
                variable,
                "who checks, for this machine has no host name that could be used",
            );
            String::new()
        }
    }
}

fn metrics_addr(raw: &Raw, problems: &mut Problems) -> Option<SocketAddr> {
    let variable = Variable::new("METRICS_ADDR", &raw.metrics_addr);
    problems.read(
        variable,
        "an IP address and a port, e.g. 0.0.0.0:9464 or [::]:9464",
        |text| text.parse().ok(),
    )
}

fn check_log_level(raw: &Raw, problems: &mut Problems) -> LevelFilter {
    let variable = Variable::new("LOG_LEVEL", &raw.log_level);
    problems
        .read(variable, "OFF, ERROR, WARN, INFO, DEBUG or TRACE", |text| {
            text.parse().ok()
        })
        .unwrap_or(LevelFilter::Info)
}

#[cfg(test)]
mod tests;
