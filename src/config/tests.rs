//! Every variable, right and wrong, from pairs: no environment.

use std::fs;

use super::*;

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

/// The lines about what is wrong.
fn wrong<T>(result: Result<T, WrongInput>) -> Vec<String> {
    match result {
        Ok(_) => panic!("nothing is wrong"),
        Err(WrongInput(text)) => text.lines().map(str::to_owned).collect(),
    }
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
            (
                "trusted.pem",
                certificate.replace("CERTIFICATE", "TRUSTED CERTIFICATE"),
            ),
            ("cut.pem", format!("# one\n\n{}", half(&certificate))),
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
fn without_more_than_the_required_variables_the_rest_has_its_defaults() {
    let config = produced(&[]);
    assert_eq!(config.kafka.bootstrap_servers, "kafka:9092");
    assert_eq!(
        config.kafka.security,
        KafkaSecurity {
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
    assert_eq!(config.database.password, None);
    assert_eq!(config.database.table.quoted(""), "\"host_metrics\"");
    assert_eq!(config.database.ssl_mode, DbSslMode::Prefer);
}

#[test]
fn an_empty_variable_takes_its_default() {
    let config = consumed(&[
        ("DB_PORT", ""),
        ("DB_PASSWORD", ""),
        ("KAFKA_SSL_CA_FILE", ""),
        ("DB_RETENTION", ""),
    ]);
    assert_eq!(config.database.port, 5_432);
    assert_eq!(config.database.password, None);
    assert_eq!(config.kafka.security.tls, None);
}

#[test]
fn every_variable_arrives() {
    let config = consumed(&[
        ("KAFKA_TOPIC", "a, b"),
        ("KAFKA_GROUP_ID", "copy"),
        ("KAFKA_GROUP_INSTANCE_ID", "one"),
        ("DB_PORT", "6432"),
        ("DB_PASSWORD", "secret"),
        ("DB_TABLE", "Metrics.\"Hosts\""),
        ("DB_SSLMODE", "Verify-Full"),
        ("DB_BATCH_SIZE", "100000"),
        ("DB_BATCH_SECONDS", "0.25"),
        ("DB_RETENTION", "90d"),
        ("METRICS_ADDR", "[::]:9464"),
    ]);
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
    assert!(!format!("{config:?}").contains("secret"));

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
fn a_wrong_value_is_told_by_name_with_the_value_and_what_was_expected() {
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
fn every_problem_is_told_at_once_in_the_order_of_the_help() {
    let lines = wrong(consume(&Variables::from_pairs([
        ("DB_PORT", "x"),
        ("DB_BATCH_SIZE", "0"),
        ("LOG_LEVEL", "x"),
        ("KAFKA_TOPIC", "/"),
        // Not looked at by `consume`.
        ("CHECK_TIMEOUT", "x"),
        ("MAX_THREADS", "x"),
    ])));
    let names: Vec<_> = lines
        .iter()
        .filter_map(|line| line.split([' ', '=']).next())
        .collect();
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
fn a_command_looks_only_at_the_variables_that_it_needs() {
    let all_wrong = || NAMES.iter().map(|name| (*name, "\u{1}"));
    let names_told = |lines: Vec<String>| -> Vec<String> {
        lines
            .iter()
            .filter_map(|line| line.split([' ', '=']).next().map(str::to_owned))
            .collect()
    };
    let wrong_but = |result| names_told(wrong(result));
    let variables = Variables::from_pairs(all_wrong());
    assert_eq!(
        wrong_but(validate(&variables).map(drop)),
        ["CHECK_TIMEOUT", "MAX_THREADS", "MAX_BODY_BYTES", "LOG_LEVEL"]
    );
    assert_eq!(
        wrong_but(check(&variables).map(drop)),
        [
            "CHECK_TIMEOUT",
            "MAX_BODY_BYTES",
            "USER_AGENT",
            "CHECK_CA_FILE",
            "AGENT_NAME",
            "LOG_LEVEL"
        ]
    );
    let neither = Servers {
        kafka: false,
        database: false,
    };
    assert_eq!(
        wrong_but(init(&variables, neither).map(drop)),
        ["KAFKA_TOPIC", "DB_TABLE", "LOG_LEVEL"]
    );
    let database = Servers {
        kafka: false,
        database: true,
    };
    let told = wrong_but(init(&variables, database).map(drop));
    assert!(
        told.iter()
            .all(|name| !name.starts_with("KAFKA_") || name == "KAFKA_TOPIC"),
        "{told:?}"
    );
    assert!(told.contains(&"DB_HOST".to_owned()));
    assert!(init(&Variables::from_pairs([]), neither).is_ok());
}

#[test]
fn the_files_alone_make_it_ssl() {
    let pems = Pems::new();
    let config = produced(&[
        ("KAFKA_SSL_CA_FILE", &pems.path("ca.pem")),
        ("KAFKA_SSL_CERT_FILE", &pems.path("cert.pem")),
        ("KAFKA_SSL_KEY_FILE", &pems.path("key.pem")),
    ]);
    assert_eq!(
        config.kafka.client_properties(),
        [
            ("bootstrap.servers", "kafka:9092".to_owned()),
            ("client.id", "host-metrics".to_owned()),
            ("security.protocol", "ssl".to_owned()),
            ("socket.keepalive.enable", "true".to_owned()),
            ("client.dns.lookup", "use_all_dns_ips".to_owned()),
            ("enable.ssl.certificate.verification", "true".to_owned()),
            ("ssl.endpoint.identification.algorithm", "https".to_owned()),
            ("ssl.ca.location", pems.path("ca.pem")),
            ("ssl.certificate.location", pems.path("cert.pem")),
            ("ssl.key.location", pems.path("key.pem")),
        ]
    );
}

#[test]
fn the_four_protocols_are_librdkafkas() {
    let sasl = [
        ("KAFKA_SASL_MECHANISM", "scram-sha-512"),
        ("KAFKA_SASL_USERNAME", "me"),
        ("KAFKA_SASL_PASSWORD", "secret"),
    ];
    for protocol in ["PLAINTEXT", "ssl", "Sasl_Plaintext", "SASL_SSL"] {
        let is_sasl = protocol.to_uppercase().starts_with("SASL");
        let pair = [("KAFKA_SECURITY_PROTOCOL", protocol)];
        let config = produced(&[&pair[..], if is_sasl { &sasl[..] } else { &sasl[..0] }].concat());
        let properties = config.kafka.client_properties();
        let property = |name| {
            properties
                .iter()
                .find(|(known, _)| *known == name)
                .map(|(_, value)| value.as_str())
        };
        assert_eq!(
            property("security.protocol"),
            Some(protocol.to_lowercase().as_str())
        );
        assert_eq!(property("sasl.mechanism"), is_sasl.then_some("SCRAM-SHA-512"));
        assert_eq!(property("sasl.username"), is_sasl.then_some("me"));
        assert_eq!(property("sasl.password"), is_sasl.then_some("secret"));
        // librdkafka knows each of them.
        let mut client = rdkafka::ClientConfig::new();
        for (name, value) in &properties {
            client.set(*name, value);
        }
        client.create_native_config().unwrap();
    }
}

#[test]
fn certificates_that_would_not_be_used_are_an_error() {
    let pems = Pems::new();
    let ca = pems.path("ca.pem");
    assert_eq!(
        wrong_kafka(&[
            ("KAFKA_SECURITY_PROTOCOL", "plaintext"),
            ("KAFKA_SSL_CA_FILE", &ca)
        ]),
        [format!(
            "KAFKA_SSL_CA_FILE={ca:?}: the file is there, but with KAFKA_SECURITY_PROTOCOL=PLAINTEXT it would not \
             be used; set KAFKA_SECURITY_PROTOCOL=SSL or unset KAFKA_SSL_CA_FILE"
        )]
    );
    // The original required the variables even where nobody had certificates.
    let config = produced(&[
        ("KAFKA_SECURITY_PROTOCOL", "PLAINTEXT"),
        ("KAFKA_SSL_CA_FILE", &pems.path("none.pem")),
    ]);
    assert_eq!(config.kafka.security.tls, None);
}

#[test]
fn a_pem_file_that_cannot_be_one_is_an_error_naming_it() {
    let pems = Pems::new();
    let directory = pems.directory.path().display().to_string();
    let cases = [
        (
            pems.path("none.pem"),
            "cannot read the file: No such file or directory",
        ),
        (directory, "cannot read the file: it is no regular file"),
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
            "the PEM block at line 3 is cut off: it has no END line",
        ),
        (
            pems.path("scratched.pem"),
            "the PEM block at line 1 is not valid base64",
        ),
        (
            pems.path("other.pem"),
            "the PEM block at line 1 does not hold an X.509 certificate",
        ),
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
    for name in ["ca.pem", "marked.pem", "old.pem", "trusted.pem"] {
        let path = pems.path(name);
        produced(&[("KAFKA_SSL_CA_FILE", &path), ("CHECK_CA_FILE", &path)]);
        consumed(&[("DB_SSLROOTCERT", &path)]);
    }
    let cert = pems.path("cert.pem");
    let lines = wrong_kafka(&[("KAFKA_SSL_CERT_FILE", &cert)]);
    assert_eq!(
        lines,
        [
            "KAFKA_SSL_KEY_FILE is not set, but KAFKA_SSL_CERT_FILE is: a certificate and its key go together; \
          set both or neither"
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
            "the private key cannot be read: it is damaged or of an unknown kind",
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
fn sasl_needs_all_three_and_a_protocol_that_uses_them() {
    let lines = wrong_kafka(&[
        ("KAFKA_SECURITY_PROTOCOL", "SASL_SSL"),
        ("KAFKA_SASL_MECHANISM", "GSSAPI"),
    ]);
    let names: Vec<_> = lines
        .iter()
        .filter_map(|line| line.split([' ', '=']).next())
        .collect();
    assert_eq!(
        names,
        [
            "KAFKA_SASL_MECHANISM",
            "KAFKA_SASL_USERNAME",
            "KAFKA_SASL_PASSWORD"
        ]
    );
    let lines = wrong_kafka(&[
        ("KAFKA_SASL_PASSWORD", "secret"),
        ("KAFKA_SASL_USERNAME", "secret"),
    ]);
    assert_eq!(lines.len(), 2);
    for line in lines {
        assert!(
            line.contains("with KAFKA_SECURITY_PROTOCOL=PLAINTEXT it would not be used"),
            "{line}"
        );
        assert!(!line.contains("secret"), "{line}");
    }
}

#[test]
fn a_secret_may_stand_in_a_file_of_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("password");
    let name = path.to_str().unwrap();
    for (contents, secret) in [
        ("secret", "secret"),
        (" se cret\n", " se cret"),
        ("secret\r\n", "secret"),
    ] {
        fs::write(&path, contents).unwrap();
        let config = consumed(&[("DB_PASSWORD_FILE", name)]);
        assert_eq!(config.database.password.unwrap().reveal(), secret);
    }
    let both = [("DB_PASSWORD_FILE", name), ("DB_PASSWORD", "other")];
    assert_eq!(
        wrong(consume(&variables(&DATABASE, &both))),
        ["DB_PASSWORD and DB_PASSWORD_FILE are both set: unset one of them"]
    );
    for (contents, expected) in [
        (b"".as_slice(), "the file is empty"),
        (b"\xffsecret", "the file is not UTF-8"),
    ] {
        fs::write(&path, contents).unwrap();
        let lines = wrong(consume(&variables(&DATABASE, &[("DB_PASSWORD_FILE", name)])));
        assert!(
            lines[0].starts_with(&format!("DB_PASSWORD_FILE={path:?}: {expected}")),
            "{lines:?}"
        );
        assert!(!lines[0].contains("secret"));
    }
    fs::write(&path, "me").unwrap();
    let config = produced(&[
        ("KAFKA_SECURITY_PROTOCOL", "SASL_PLAINTEXT"),
        ("KAFKA_SASL_MECHANISM", "PLAIN"),
        ("KAFKA_SASL_USERNAME_FILE", name),
        ("KAFKA_SASL_PASSWORD_FILE", name),
    ]);
    assert_eq!(config.kafka.security.sasl.unwrap().username.reveal(), "me");
}

#[test]
fn a_secret_that_every_user_can_read_is_warned_of_by_its_variable() {
    use std::os::unix::fs::PermissionsExt;

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("secret");
    fs::write(&path, "never shown").unwrap();
    let name = path.to_str().unwrap();
    let kafka = [
        "KAFKA_SSL_KEY_FILE",
        "KAFKA_SASL_USERNAME_FILE",
        "KAFKA_SASL_PASSWORD_FILE",
    ];
    let all = Variables::from_pairs(
        [&kafka[..], &["DB_PASSWORD_FILE"]]
            .concat()
            .into_iter()
            .map(|variable| (variable, name)),
    );
    for (mode, is_exposed) in [
        (0o600, false),
        (0o440, false),
        (0o666, true),
        (0o444, true),
        (0o604, true),
    ] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        for (servers, variables) in [
            ((true, false), &kafka[..]),
            ((false, true), &["DB_PASSWORD_FILE"]),
        ] {
            let (kafka, database) = servers;
            let lines = exposed_secrets(&all, Servers { kafka, database });
            let expected: Vec<String> = variables
                .iter()
                .filter(|_| is_exposed)
                .map(|variable| {
                    format!(
                        "{variable}={path:?}: every user of this machine can read the file (mode {mode:04o}); `chmod \
                         o-r` ends that"
                    )
                })
                .collect();
            assert_eq!(lines, expected, "{mode:o}");
        }
    }
    let none = [("KAFKA_SSL_KEY_FILE", "/nowhere/key.pem")];
    assert_eq!(
        exposed_secrets(&Variables::from_pairs(none), Servers::BOTH),
        [""; 0]
    );
    assert_eq!(
        exposed_secrets(&Variables::from_pairs([]), Servers::BOTH),
        [""; 0]
    );
}
