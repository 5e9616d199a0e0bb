//! Combinations of the KAFKA_* variables.

use super::*;

#[test]
fn a_certificate_file_alone_selects_ssl() {
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
fn librdkafka_accepts_the_four_protocols() {
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
        // librdkafka accepts every property.
        let mut client = rdkafka::ClientConfig::new();
        for (name, value) in &properties {
            client.set(*name, value);
        }
        client.create_native_config().unwrap();
    }
}

#[test]
fn certificates_that_the_protocol_does_not_use_are_an_error() {
    let pems = Pems::new();
    let ca = pems.path("ca.pem");
    assert_eq!(
        wrong_kafka(&[
            ("KAFKA_SECURITY_PROTOCOL", "plaintext"),
            ("KAFKA_SSL_CA_FILE", &ca)
        ]),
        [format!(
            "KAFKA_SSL_CA_FILE names a file that exists ({ca:?}), but KAFKA_SECURITY_PROTOCOL=PLAINTEXT does not use \
             it; set KAFKA_SECURITY_PROTOCOL=SSL or unset KAFKA_SSL_CA_FILE"
        )]
    );
    // Existing setups may name files that were never there.
    let config = produced(&[
        ("KAFKA_SECURITY_PROTOCOL", "PLAINTEXT"),
        ("KAFKA_SSL_CA_FILE", &pems.path("none.pem")),
    ]);
    assert_eq!(config.kafka.security.tls, None);
}

#[test]
fn sasl_needs_three_variables_and_a_protocol_that_uses_them() {
    let names = wrong_names(produce(&variables(
        &[SERVERS],
        &[
            ("KAFKA_SECURITY_PROTOCOL", "SASL_SSL"),
            ("KAFKA_SASL_MECHANISM", "GSSAPI"),
        ],
    )));
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
            line.contains("is set, but KAFKA_SECURITY_PROTOCOL=PLAINTEXT does not use it"),
            "{line}"
        );
        assert!(!line.contains("secret"), "{line}");
    }
}

#[test]
fn all_problems_are_reported_in_one_run_with_every_protocol() {
    let pems = Pems::new();
    let (cert, empty) = (pems.path("cert.pem"), pems.path("empty"));
    fs::write(&empty, "").unwrap();
    let all = [
        ("KAFKA_BOOTSTRAP_SERVERS", "kafka"),
        ("KAFKA_TOPIC", "a b"),
        ("KAFKA_SSL_CA_FILE", "/nowhere/ca.pem"),
        ("KAFKA_SSL_CERT_FILE", &cert),
        ("KAFKA_SASL_MECHANISM", "GSSAPI"),
        ("KAFKA_SASL_USERNAME_FILE", "/nowhere/user"),
        ("KAFKA_SASL_PASSWORD_FILE", &empty),
        ("KAFKA_GROUP_ID", "a\nb"),
    ];
    let names = |protocol: Option<&str>| {
        let protocol = protocol.map(|word| ("KAFKA_SECURITY_PROTOCOL", word));
        let pairs = DATABASE[1..].iter().copied().chain(all).chain(protocol);
        let mut names = wrong_names(consume(&Variables::from_pairs(pairs)));
        names.dedup();
        names
    };
    let servers = "KAFKA_BOOTSTRAP_SERVERS";
    let tls = ["KAFKA_SSL_KEY_FILE", "KAFKA_SSL_CA_FILE"];
    let sasl = [
        "KAFKA_SASL_MECHANISM",
        "KAFKA_SASL_USERNAME_FILE",
        "KAFKA_SASL_PASSWORD_FILE",
    ];
    let others = ["KAFKA_TOPIC", "KAFKA_GROUP_ID"];
    let wrong_word = names(Some("TLS"));
    let expected = [servers, "KAFKA_SECURITY_PROTOCOL"]
        .into_iter()
        .chain(tls)
        .chain(sasl)
        .chain(others);
    assert_eq!(wrong_word, expected.collect::<Vec<_>>());
    let expected: Vec<_> = [servers]
        .into_iter()
        .chain(tls)
        .chain(sasl)
        .chain(others)
        .collect();
    assert_eq!(names(Some("SASL_SSL")), expected);
    // A variable that the protocol does not use is reported for that, and for its value.
    for protocol in [None, Some("PLAINTEXT"), Some("SSL")] {
        let names = names(protocol);
        for name in sasl.iter().chain(&others).chain([&servers]) {
            assert!(names.contains(name), "{protocol:?}: {names:?}");
        }
    }
}

#[test]
fn producers_of_a_group_are_one_place_and_no_consumers() {
    let config = produced(&[("PRODUCE_GROUP", "eu"), ("KAFKA_GROUP_INSTANCE_ID", "one")]);
    let group = config.group.unwrap();
    assert_eq!(
        (group.name.as_str(), group.instance_id.as_deref()),
        ("eu", Some("one"))
    );
    assert_eq!(config.check.agent_name, "eu");
    let config = produced(&[("PRODUCE_GROUP", "eu"), ("AGENT_NAME", "Frankfurt")]);
    assert_eq!(config.check.agent_name, "Frankfurt");
    assert!(produced(&[]).group.is_none());

    for (name, group_of_consumers) in [("host-metrics", ""), ("copy", "copy")] {
        let pairs = [
            SERVERS,
            ("PRODUCE_GROUP", name),
            ("KAFKA_GROUP_ID", group_of_consumers),
        ];
        let pairs = pairs.into_iter().filter(|(_, value)| !value.is_empty());
        let lines = wrong(produce(&Variables::from_pairs(pairs)));
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(lines[0].contains("the group of the consumers"), "{lines:?}");
    }
}

#[test]
fn the_topic_for_failures_is_no_topic_of_the_same_table() {
    let both = [("KAFKA_TOPIC", "a"), ("KAFKA_TOPIC_FAILURES", "failures")];
    assert_eq!(produced(&both).failures_topic.as_deref(), Some("failures"));
    assert_eq!(produced(&[]).failures_topic, None);
    let same = [("KAFKA_TOPIC", "a"), ("KAFKA_TOPIC_FAILURES", "a")];
    let [line] = &wrong_kafka(&same)[..] else { panic!() };
    assert!(line.starts_with("KAFKA_TOPIC_FAILURES is \"a\""), "{line}");
    let among = [("KAFKA_TOPIC", "a, b"), ("KAFKA_TOPIC_FAILURES", "b")];
    let names = wrong_names(consume(&variables(&DATABASE, &among)));
    assert_eq!(names, ["KAFKA_TOPIC_FAILURES"]);
    assert_eq!(consumed(&both).topics, ["a"]);
    let made = init(&variables(&DATABASE, &both), Servers::BOTH).unwrap_or_else(|wrong| panic!("{wrong}"));
    assert_eq!(made.topics, ["a", "failures"]);
    assert_eq!(
        wrong_names(produce(&variables(
            &[SERVERS],
            &[("KAFKA_TOPIC_FAILURES", "a,b")]
        )))
        .len(),
        1
    );
}

#[test]
fn reference_hosts_are_host_and_port_or_none() {
    let of = |value| produced(&[("REFERENCE_HOSTS", value)]).references;
    let host = |name: &str, port| (name.to_owned(), port);
    assert_eq!(produced(&[]).references, References::Gateways);
    assert_eq!(of("none"), References::Off);
    let hosts = vec![host("a.example", 443), host("10.0.0.1", 53), host("::1", 80)];
    assert_eq!(
        of("a.example:443, 10.0.0.1:53,[::1]:80"),
        References::Hosts(hosts)
    );
    let many = vec!["a:1"; 17].join(",");
    for wrong in [
        "a.example",
        "a.example:0",
        "a:1,,b:1",
        "http://a:1",
        "a:1,none",
        &many,
    ] {
        let names = wrong_names(produce(&variables(&[SERVERS], &[("REFERENCE_HOSTS", wrong)])));
        assert_eq!(names, ["REFERENCE_HOSTS"], "{wrong}");
    }
}
