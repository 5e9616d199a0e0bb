//! Right and wrong values of every variable, without the environment.

mod database;
mod kafka;
mod page;
mod secrets;

use std::fs;

use super::*;
use crate::consume::fold::host::DownWhen;

const SERVERS: (&str, &str) = ("KAFKA_BOOTSTRAP_SERVERS", "kafka:9092");
const DATABASE: [(&str, &str); 4] = [
    SERVERS,
    ("DB_HOST", "db"),
    ("DB_NAME", "metrics"),
    ("DB_USER", "me"),
];

fn variables(required: &[(&'static str, &'static str)], others: &[(&str, &str)]) -> Variables {
    Variables::from_pairs(required.iter().copied().chain(others.iter().copied()))
}

fn produced(others: &[(&str, &str)]) -> ProduceConfig {
    produce(&variables(&[SERVERS], others)).unwrap_or_else(|wrong| panic!("{wrong}"))
}

fn consumed(others: &[(&str, &str)]) -> ConsumeConfig {
    consume(&variables(&DATABASE, others)).unwrap_or_else(|wrong| panic!("{wrong}"))
}

fn problems<T>(result: Result<T, WrongVariables>) -> Vec<Problem> {
    match result {
        Ok(_) => panic!("nothing is wrong"),
        Err(WrongVariables(problems)) => problems,
    }
}

/// The lines of the error.
fn wrong<T>(result: Result<T, WrongVariables>) -> Vec<String> {
    problems(result).iter().map(Problem::to_string).collect()
}

/// The names of the wrong variables.
fn wrong_names<T>(result: Result<T, WrongVariables>) -> Vec<&'static str> {
    problems(result).iter().filter_map(Problem::name).collect()
}

fn wrong_kafka(others: &[(&str, &str)]) -> Vec<String> {
    wrong(produce(&variables(&[SERVERS], others)))
}

struct Pems {
    directory: tempfile::TempDir,
}

impl Pems {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let own = rcgen::generate_simple_self_signed(["kafka".to_owned()]).unwrap();
        let (certificate, key) = (own.cert.pem(), own.signing_key.serialize_pem());
        let half = |pem: &str| pem[..pem.len() / 2].to_owned();
        for (name, contents) in [
            ("ca.pem", certificate.clone()),
            ("cert.pem", format!("# me\n{certificate}")),
            ("key.pem", key.clone()),
            ("locked.pem", key.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY")),
            ("marked.pem", format!("\u{feff}{certificate}")),
            ("old.pem", certificate.replace("CERTIFICATE", "X509 CERTIFICATE")),
            ("cut.pem", half(&certificate)),
            ("scratched.pem", certificate.replacen("\nMII", "\n!II", 1)),
            ("other.pem", certificate.replacen("\nMII", "\nAII", 1)),
            ("empty.pem", String::new()),
            ("half-a-key.pem", half(&key)),
            ("scratched-key.pem", key.replacen("\nMI", "\n!I", 1)),
        ] {
            fs::write(directory.path().join(name), contents).unwrap();
        }
        fs::write(directory.path().join("der"), own.cert.der()).unwrap();
        Self { directory }
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }
}

#[test]
fn variables_that_are_not_set_have_their_defaults() {
    let config = produced(&[]);
    assert_eq!(config.kafka.bootstrap_servers, "kafka:9092");
    assert!(
        config.kafka.security
            == KafkaSecurity {
                tls: None,
                sasl: None
            }
    );
    assert_eq!(config.topic, "host-metrics");
    assert_eq!(config.check.timeout, Duration::from_secs(10));
    assert_eq!(config.check.max_threads, 1_024);
    assert_eq!(config.check.max_body_bytes, 1_048_576);
    assert!(config.check.user_agent.starts_with("host-metrics/0."));
    assert_eq!(config.check.ca_file, None);
    assert!(!config.check.agent_name.is_empty());
    assert_eq!(config.metrics_addr, None);

    let config = consumed(&[]);
    assert_eq!(config.topics, ["host-metrics"]);
    assert_eq!(config.group_id, "host-metrics");
    assert_eq!(config.group_instance_id, None);
    assert_eq!(
        (config.batch_size, config.batch_wait),
        (100, Duration::from_secs(1))
    );
    assert_eq!((config.retention, config.metrics_addr), (None, None));
    assert_eq!(
        (config.database.host.as_str(), config.database.port),
        ("db", 5_432)
    );
    assert!(config.database.password.is_none());
    assert_eq!(config.database.table.quoted(""), "\"host_metrics\"");
    assert_eq!(config.database.ssl_mode, DbSslMode::Prefer);
}

#[test]
fn an_empty_variable_has_its_default() {
    let config = consumed(&[
        ("DB_PORT", ""),
        ("DB_PASSWORD", ""),
        ("KAFKA_SSL_CA_FILE", ""),
        ("DB_RETENTION", ""),
    ]);
    assert_eq!(config.database.port, 5_432);
    assert!(config.database.password.is_none());
    assert_eq!(config.kafka.security.tls, None);
}

#[test]
fn every_variable_is_read() {
    let config = consumed(&[
        ("KAFKA_TOPIC", "a, b"),
        ("KAFKA_GROUP_ID", "copy"),
        ("KAFKA_GROUP_INSTANCE_ID", "one"),
        ("DB_PORT", "6432"),
        ("DB_PASSWORD", "secret"),
        ("DB_TABLE", "Metrics.Hosts"),
        ("DB_SSLMODE", "Verify-Full"),
        ("DB_SSLROOTCERT", "system"),
        ("DB_BATCH_SIZE", "100000"),
        ("DB_BATCH_SECONDS", "0.25"),
        ("DB_RETENTION", "90d"),
        ("DB_ROLLUP_RETENTION", "400d"),
        ("DOWN_WHEN", "2"),
        ("METRICS_ADDR", "[::]:9464"),
    ]);
    let state = config.state.clone().expect("it is on");
    assert_eq!(state.down_when, DownWhen::Places(2));
    assert_eq!(state.rollup_retention, Some(Duration::from_secs(400 * 86_400)));
    assert_eq!(config.topics, ["a", "b"]);
    assert_eq!(config.group_id, "copy");
    assert_eq!(config.group_instance_id.as_deref(), Some("one"));
    assert_eq!(config.database.port, 6_432);
    assert_eq!(
        config.database.password.as_ref().map(Secret::reveal),
        Some("secret")
    );
    assert_eq!(config.database.table.quoted("_x"), "\"Metrics\".\"Hosts_x\"");
    assert_eq!(config.database.ssl_mode, DbSslMode::VerifyFull);
    assert_eq!(
        (config.batch_size, config.batch_wait),
        (100_000, Duration::from_millis(250))
    );
    assert_eq!(config.retention, Some(Duration::from_secs(90 * 86_400)));
    assert_eq!(config.metrics_addr, Some("[::]:9464".parse().unwrap()));

    let config = produced(&[
        ("KAFKA_TOPIC", "a.b_c-D9"),
        ("CHECK_TIMEOUT", "1500ms"),
        ("MAX_THREADS", "7"),
        ("MAX_BODY_BYTES", "1"),
        ("USER_AGENT", "me (you)"),
        ("AGENT_NAME", "süd"),
    ]);
    assert_eq!(config.topic, "a.b_c-D9");
    assert_eq!(config.check.timeout, Duration::from_millis(1_500));
    assert_eq!((config.check.max_threads, config.check.max_body_bytes), (7, 1));
    assert_eq!(
        (config.check.user_agent.as_str(), config.check.agent_name.as_str()),
        ("me (you)", "süd")
    );
    for (text, level) in [
        ("off", LevelFilter::Off),
        ("Debug", LevelFilter::Debug),
        ("WARN", LevelFilter::Warn),
    ] {
        let variables = variables(&[], &[("LOG_LEVEL", text)]);
        assert_eq!(log_level(&variables).unwrap(), level);
    }
}

#[test]
fn a_wrong_value_is_reported_with_its_name_and_what_was_expected() {
    let long = "x".repeat(300);
    let consumers = [
        ("KAFKA_BOOTSTRAP_SERVERS", "kafka"),
        ("KAFKA_BOOTSTRAP_SERVERS", "kafka:0"),
        ("KAFKA_BOOTSTRAP_SERVERS", "kafka:9092,"),
        ("KAFKA_BOOTSTRAP_SERVERS", "http://kafka:9092"),
        ("KAFKA_BOOTSTRAP_SERVERS", "[::g]:9092"),
        ("KAFKA_BOOTSTRAP_SERVERS", "kafka:99999"),
        ("KAFKA_TOPIC", "a b"),
        ("KAFKA_TOPIC", "a,,b"),
        ("KAFKA_TOPIC", "a,a"),
        ("KAFKA_TOPIC", "."),
        ("KAFKA_TOPIC", &long),
        ("KAFKA_SECURITY_PROTOCOL", "TLS"),
        ("KAFKA_GROUP_ID", "a\nb"),
        ("KAFKA_GROUP_INSTANCE_ID", "a b"),
        ("DB_HOST", "a b"),
        ("DB_PORT", "0"),
        ("DB_PORT", "65536"),
        ("DB_PORT", "+1"),
        ("DB_NAME", "a\tb"),
        ("DB_USER", &long),
        ("DB_TABLE", "a.b.c"),
        ("DB_SSLMODE", "allow"),
        ("DB_BATCH_SIZE", "0"),
        ("DB_BATCH_SIZE", "100001"),
        ("DB_BATCH_SIZE", "ten"),
        ("DB_BATCH_SIZE", "-1"),
        ("DB_BATCH_SIZE", "99999999999999999999"),
        ("DB_BATCH_SECONDS", "0"),
        ("DB_BATCH_SECONDS", "0.009"),
        ("DB_BATCH_SECONDS", "3601"),
        ("DB_BATCH_SECONDS", "NaN"),
        ("DB_BATCH_SECONDS", "1s"),
        ("DB_RETENTION", "90"),
        ("DB_ROLLUP_RETENTION", "1"),
        ("STATE", "yes"),
        ("DB_SYNCHRONOUS_COMMIT", "false"),
        ("DOWN_WHEN", "0"),
        ("DOWN_WHEN", "most"),
        ("DB_RETENTION", "1h"),
        ("METRICS_ADDR", "9464"),
        ("METRICS_ADDR", "localhost:9464"),
        ("LOG_LEVEL", "LOUD"),
    ];
    let producers = [
        ("KAFKA_TOPIC", "a,b"),
        ("CHECK_TIMEOUT", "10"),
        ("CHECK_TIMEOUT", "0s"),
        ("CHECK_TIMEOUT", "2d"),
        ("MAX_THREADS", "0"),
        ("MAX_BODY_BYTES", "0"),
        ("MAX_BODY_BYTES", "1MB"),
        ("USER_AGENT", "a\r\nHost: b"),
        ("USER_AGENT", "ä"),
        ("AGENT_NAME", "a\u{0}b"),
        ("METRICS_ADDR", ":9464"),
        ("LOG_LEVEL", "0"),
    ];
    let all = (consumers
        .iter()
        .map(|pair| (pair, wrong(consume(&variables(&DATABASE, &[*pair]))))))
    .chain(producers.iter().map(|pair| (pair, wrong_kafka(&[*pair]))));
    for ((name, value), lines) in all {
        let start: String = format!("{value:?}").chars().take(100).collect();
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(lines[0].starts_with(&format!("{name}={start}")), "{lines:?}");
        assert!(lines[0].contains(": expected "), "{lines:?}");
    }
}

#[test]
fn all_problems_are_reported_together_in_the_order_of_the_help() {
    let names = wrong_names(consume(&Variables::from_pairs([
        ("DB_PORT", "x"),
        ("DB_BATCH_SIZE", "0"),
        ("LOG_LEVEL", "x"),
        ("KAFKA_TOPIC", "/"),
        // Not read by `consume`.
        ("CHECK_TIMEOUT", "x"),
        ("MAX_THREADS", "x"),
    ])));
    assert_eq!(
        names,
        [
            "KAFKA_BOOTSTRAP_SERVERS",
            "KAFKA_TOPIC",
            "DB_HOST",
            "DB_PORT",
            "DB_NAME",
            "DB_USER",
            "DB_BATCH_SIZE",
            "LOG_LEVEL"
        ]
    );
}

#[test]
fn a_command_reads_only_the_variables_that_it_needs() {
    let all_wrong = || NAMES.iter().map(|name| (*name, "\u{1}"));
    let variables = Variables::from_pairs(all_wrong());
    assert_eq!(
        wrong_names(checks(&variables).map(drop)),
        [
            "CHECK_TIMEOUT",
            "MAX_THREADS",
            "MAX_BODY_BYTES",
            "USER_AGENT",
            "CHECK_CA_FILE",
            "SECRETS_DIR",
            "AGENT_NAME",
            "LOG_LEVEL"
        ]
    );
    assert_eq!(
        wrong_names(check(&variables).map(drop)),
        [
            "CHECK_TIMEOUT",
            "MAX_BODY_BYTES",
            "USER_AGENT",
            "CHECK_CA_FILE",
            "SECRETS_DIR",
            "AGENT_NAME",
            "LOG_LEVEL"
        ]
    );
    let neither = Servers {
        kafka: false,
        database: false,
    };
    assert_eq!(
        wrong_names(init(&variables, neither).map(drop)),
        ["KAFKA_TOPIC", "KAFKA_TOPIC_FAILURES", "DB_TABLE", "LOG_LEVEL"]
    );
    let database = Servers {
        kafka: false,
        database: true,
    };
    let names = wrong_names(init(&variables, database).map(drop));
    assert!(
        names
            .iter()
            .all(|name| !name.starts_with("KAFKA_") || name.starts_with("KAFKA_TOPIC")),
        "{names:?}"
    );
    assert!(names.contains(&"DB_HOST"));
    assert!(init(&Variables::from_pairs([]), neither).is_ok());
}

#[test]
fn a_wrong_pem_file_is_named_in_the_error() {
    let pems = Pems::new();
    let directory = pems.directory.path().display().to_string();
    let cases = [
        (
            pems.path("none.pem"),
            "cannot read the file: No such file or directory",
        ),
        (directory, "cannot read the file: it is not a regular file"),
        (
            pems.path("der"),
            "the file holds a certificate in DER format; convert it: openssl x509",
        ),
        (
            pems.path("key.pem"),
            "the file holds no certificate; expected a PEM file with a certificate",
        ),
        (pems.path("empty.pem"), "the file holds no certificate"),
        (
            pems.path("cut.pem"),
            "a certificate of the file is damaged (bad end line)",
        ),
        (
            pems.path("scratched.pem"),
            "a certificate of the file is damaged (bad base64 decode)",
        ),
        (pems.path("other.pem"), "a certificate of the file is damaged"),
    ];
    for (path, expected) in cases {
        for name in ["KAFKA_SSL_CA_FILE", "CHECK_CA_FILE"] {
            let lines = wrong_kafka(&[(name, &path)]);
            assert_eq!(lines.len(), 1);
            assert!(
                lines[0].starts_with(&format!("{name}={path:?}: {expected}")),
                "{lines:?}"
            );
        }
        let lines = wrong(consume(&variables(&DATABASE, &[("DB_SSLROOTCERT", &path)])));
        assert!(
            lines[0].starts_with(&format!("DB_SSLROOTCERT={path:?}: {expected}")),
            "{lines:?}"
        );
        consumed(&[("DB_SSLROOTCERT", &path), ("DB_SSLMODE", "disable")]);
    }
    for name in ["ca.pem", "marked.pem", "old.pem"] {
        let path = pems.path(name);
        produced(&[("KAFKA_SSL_CA_FILE", &path), ("CHECK_CA_FILE", &path)]);
        consumed(&[("DB_SSLROOTCERT", &path)]);
    }
    let system = ("DB_SSLROOTCERT", "system");
    consumed(&[system, ("DB_SSLMODE", "verify-full")]);
    for (variables_of_tls, expected) in [
        (
            &[system][..],
            "DB_SSLROOTCERT=\"system\": expected a PEM file; `system` requires DB_SSLMODE=verify-full",
        ),
        (&[("DB_SSLMODE", "verify-ca")], "DB_SSLROOTCERT is not set"),
        (&[("DB_SSLMODE", "verify-full")], "DB_SSLROOTCERT is not set"),
    ] {
        let lines = wrong(consume(&variables(&DATABASE, variables_of_tls)));
        assert!(lines.len() == 1 && lines[0].starts_with(expected), "{lines:?}");
    }
    let cert = pems.path("cert.pem");
    let lines = wrong_kafka(&[("KAFKA_SSL_CERT_FILE", &cert)]);
    assert_eq!(
        lines,
        [
            "KAFKA_SSL_KEY_FILE is not set, but KAFKA_SSL_CERT_FILE is: a certificate needs its key; set both or neither"
        ]
    );
    for (name, expected) in [
        ("locked.pem", "the key is encrypted"),
        (
            "ca.pem",
            "the file holds no private key; expected a PEM file with a private key",
        ),
        (
            "half-a-key.pem",
            "the private key cannot be read: it is damaged or of an unknown type",
        ),
        ("scratched-key.pem", "the private key cannot be read"),
    ] {
        let path = pems.path(name);
        let lines = wrong_kafka(&[("KAFKA_SSL_CERT_FILE", &cert), ("KAFKA_SSL_KEY_FILE", &path)]);
        assert_eq!(lines.len(), 1);
        assert!(
            lines[0].starts_with(&format!("KAFKA_SSL_KEY_FILE={path:?}: {expected}")),
            "{lines:?}"
        );
    }
}

#[test]
fn every_name_can_be_set_alone() {
    for name in NAMES {
        let variables = Variables::from_pairs([(name, "value")]);
        for other in NAMES {
            assert_eq!(
                variables.get(other),
                (other == name).then_some("value"),
                "{other}"
            );
        }
    }
}

#[test]
fn a_mistake_around_a_value_is_named_as_the_cause() {
    let pems = Pems::new();
    let (ca, level) = (pems.path("ca.pem"), ("LOG_LEVEL", "INFO"));
    let right = [
        SERVERS,
        ("KAFKA_TOPIC", "topic"),
        ("KAFKA_SECURITY_PROTOCOL", "SSL"),
        ("KAFKA_SSL_CA_FILE", &ca),
        ("KAFKA_GROUP_ID", "group"),
        ("KAFKA_GROUP_INSTANCE_ID", "one"),
        ("DB_HOST", "db"),
        ("DB_PORT", "5432"),
        ("DB_NAME", "metrics"),
        ("DB_USER", "me"),
        ("DB_SSLMODE", "require"),
        ("DB_SSLROOTCERT", &ca),
        ("DB_BATCH_SIZE", "10"),
        ("DB_BATCH_SECONDS", "1"),
        ("DB_RETENTION", "90d"),
        ("METRICS_ADDR", "0.0.0.0:9464"),
        level,
    ];
    let right_of_produce = [
        SERVERS,
        ("CHECK_TIMEOUT", "10s"),
        ("MAX_THREADS", "10"),
        ("MAX_BODY_BYTES", "10"),
        ("USER_AGENT", "me"),
        ("CHECK_CA_FILE", &ca),
        ("AGENT_NAME", "berlin"),
    ];
    let slips: [(&str, &str, &str); 5] = [
        ("\"", "\"", "the quotes are part of the value"),
        ("'", "'", "the quotes are part of the value"),
        ("", "\r", "it ends with a line break"),
        (" ", "", "it begins or ends with a space"),
        ("", "\t", "it begins or ends with a space"),
    ];
    for (before, after, cause) in slips {
        // Spaces around the items of a list are accepted.
        let is_fine = |name: &str| {
            cause != "the quotes are part of the value"
                && ["KAFKA_BOOTSTRAP_SERVERS", "KAFKA_TOPIC"].contains(&name)
        };
        let check = |name: &str, lines: Vec<String>| {
            assert_eq!(lines.len(), 1, "{lines:?}");
            assert!(lines[0].starts_with(&format!("{name}=")), "{lines:?}");
            assert!(lines[0].contains(cause), "{lines:?}");
        };
        for (index, (name, value)) in right.iter().enumerate().filter(|(_, (name, _))| !is_fine(name)) {
            let wrapped = format!("{before}{value}{after}");
            let mut pairs = right;
            pairs[index].1 = &wrapped;
            check(name, wrong(consume(&Variables::from_pairs(pairs))));
        }
        for (index, (name, value)) in right_of_produce.iter().enumerate().skip(1) {
            let wrapped = format!("{before}{value}{after}");
            let mut pairs = right_of_produce;
            pairs[index].1 = &wrapped;
            check(name, wrong(produce(&Variables::from_pairs(pairs))));
        }
    }
    consumed(&right[1..]);
    produced(&right_of_produce[1..]);
}

#[test]
fn a_nearly_right_value_is_answered_with_the_right_form() {
    let cases = [
        (
            "KAFKA_BOOTSTRAP_SERVERS",
            "kafka",
            "Kafka's default is 9092: kafka:9092",
        ),
        (
            "KAFKA_BOOTSTRAP_SERVERS",
            "PLAINTEXT://kafka:9092",
            "write kafka and its port without the protocol",
        ),
        (
            "KAFKA_BOOTSTRAP_SERVERS",
            "::1",
            "put an IPv6 address in brackets: [::1]:9092",
        ),
        (
            "KAFKA_BOOTSTRAP_SERVERS",
            "${KAFKA}:9092",
            "variables are not expanded here",
        ),
        ("METRICS_ADDR", "9464", "write 0.0.0.0:9464"),
        ("METRICS_ADDR", ":9464", "write 0.0.0.0:9464"),
        ("METRICS_ADDR", "*:9464", "write 0.0.0.0:9464"),
        ("METRICS_ADDR", "localhost:9464", "write 127.0.0.1:9464"),
        ("LOG_LEVEL", "INFO # or DEBUG", "the comment is part of the value"),
        ("CHECK_CA_FILE", "~/ca.pem", "`~` is not expanded here"),
        (
            "CHECK_CA_FILE",
            "-----BEGIN CERTIFICATE-----\nhunter2",
            "write the contents to a file",
        ),
    ];
    for (name, value, remedy) in cases {
        let pairs = [("KAFKA_BOOTSTRAP_SERVERS", "kafka:9092"), (name, value)];
        let lines = wrong(produce(&Variables::from_pairs(pairs)));
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(
            lines[0].starts_with(&format!("{name}=")) && lines[0].contains(remedy),
            "{lines:?}"
        );
        assert!(!lines[0].contains("hunter2"), "{lines:?}");
    }
}

#[test]
fn the_hosts_of_the_database_need_its_variables_and_may_have_a_cache() {
    let (_, hosts) = produce_from_table(&variables(&DATABASE, &[])).unwrap();
    assert_eq!((hosts.database.user.as_str(), hosts.cache_file), ("me", None));
    let cache = ("HOSTS_CACHE_FILE", "/var/cache/hosts");
    let hosts = super::hosts(&variables(&DATABASE, &[cache])).unwrap();
    assert_eq!(hosts.cache_file, Some(PathBuf::from(cache.1)));
    let Err(wrong) = produce_from_table(&variables(&[SERVERS], &[])) else {
        panic!("the database is needed")
    };
    assert!(wrong.to_string().contains("DB_HOST"), "{wrong}");
}
