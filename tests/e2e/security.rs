//! Kafka with TLS and SASL: each protocol that the broker offers works, and each refusal is logged in one line with the reason and
//! the variable to check.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use host_metrics::commands::demo::postgres::free_port;
use host_metrics::kafka::names_a_cause;
use rcgen::{CertificateParams, CertifiedIssuer, DnType, KeyPair};

use crate::agent::{Agent, STOP_WITHIN, Variables, run, tail};
use crate::case::SOON;
use crate::database::{Database, server};
use crate::kafka::{Kafka, Listener};
use crate::scratch::{self, wait_for};

const USER: &str = "metrics-agent";
const PASSWORD: &str = "hunter2-never-shown";
const WRONG_PASSWORD: &str = "hunter3-never-shown";
const TOPIC: &str = "secured";

/// A refusal is logged after three seconds, and its cause may be found later. Here about forty processes start at once.
const SAID_WITHIN: Duration = SOON;

/// The broker of these tests, with a listener for each protocol, and the certificates.
struct Secured {
    kafka: Kafka,
    directory: PathBuf,
    listeners: Vec<Listener>,
}

type Issuer = CertifiedIssuer<'static, KeyPair>;

fn secured() -> &'static Secured {
    static SECURED: OnceLock<Secured> = OnceLock::new();
    SECURED.get_or_init(Secured::start)
}

impl Secured {
    fn start() -> Self {
        let directory = scratch::directory("certificates");
        let (ca, other_ca) = (authority("host-metrics test CA"), authority("another CA"));
        fs::write(directory.join("ca.pem"), ca.pem()).unwrap();
        fs::write(directory.join("other-ca.pem"), other_ca.pem()).unwrap();
        let store = |name: &str, params: CertificateParams, by: &Issuer| {
            let key = KeyPair::generate().unwrap();
            let certificate = params.signed_by(&key, by).unwrap().pem();
            fs::write(directory.join(format!("{name}.cert")), &certificate).unwrap();
            let key_file = directory.join(format!("{name}.key"));
            fs::write(&key_file, key.serialize_pem()).unwrap();
            fs::set_permissions(&key_file, fs::Permissions::from_mode(0o600)).unwrap();
            let both = directory.join(format!("{name}.pem"));
            fs::write(&both, key.serialize_pem() + &certificate).unwrap();
            both.display().to_string()
        };
        let good = store("server", params("127.0.0.1"), &ca);
        let expired = store("expired-server", expired("127.0.0.1"), &ca);
        let elsewhere = store("elsewhere", params("kafka.elsewhere.example"), &ca);
        store("client", params("client.example"), &ca);
        store("expired-client", self::expired("client.example"), &ca);
        store("stranger", params("client.example"), &other_ca);

        let trusted = directory.join("ca.pem").display().to_string();
        let ssl = |store: &str, client_auth: &str| {
            vec![
                ("ssl.keystore.type", "PEM".to_owned()),
                ("ssl.keystore.location", store.to_owned()),
                ("ssl.truststore.type", "PEM".to_owned()),
                ("ssl.truststore.location", trusted.clone()),
                ("ssl.client.auth", client_auth.to_owned()),
            ]
        };
        let scram = "org.apache.kafka.common.security.scram.ScramLoginModule required;".to_owned();
        let plain = format!(
            "org.apache.kafka.common.security.plain.PlainLoginModule required user_{USER}=\"{PASSWORD}\";"
        );
        let mut open = ssl(&good, "none");
        open.extend([
            (
                "sasl.enabled.mechanisms",
                "SCRAM-SHA-256,SCRAM-SHA-512,PLAIN".to_owned(),
            ),
            ("scram-sha-256.sasl.jaas.config", scram.clone()),
            ("scram-sha-512.sasl.jaas.config", scram.clone()),
            ("plain.sasl.jaas.config", plain),
        ]);
        let mut strict = ssl(&good, "none");
        strict.extend([
            ("sasl.enabled.mechanisms", "SCRAM-SHA-256".to_owned()),
            ("scram-sha-256.sasl.jaas.config", scram),
        ]);
        let listener = |name, protocol, settings| {
            let port = free_port().unwrap();
            Listener {
                name,
                protocol,
                port,
                advertised_port: port,
                settings,
            }
        };
        let listeners = vec![
            listener("MUTUAL", "SSL", ssl(&good, "required")),
            listener("EXPIRED", "SSL", ssl(&expired, "required")),
            listener("ELSEWHERE", "SSL", ssl(&elsewhere, "required")),
            listener("OPEN", "SASL_SSL", open),
            listener("STRICT", "SASL_SSL", strict),
        ];
        let users = ["SCRAM-SHA-256", "SCRAM-SHA-512"]
            .map(|mechanism| format!("{mechanism}=[name={USER},password={PASSWORD}]"));
        let kafka = Kafka::start_with(&listeners, &users.each_ref().map(String::as_str));
        kafka.create_topic(TOPIC, 1);
        Self {
            kafka,
            directory,
            listeners,
        }
    }
}

fn authority(name: &str) -> Issuer {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn params(name: &str) -> CertificateParams {
    CertificateParams::new(vec![name.to_owned()]).unwrap()
}

fn expired(name: &str) -> CertificateParams {
    let mut params = params(name);
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    params
}

impl Secured {
    fn port(&self, listener: &str) -> u16 {
        let found = self.listeners.iter().find(|known| known.name == listener);
        found.expect("a listener of that name").port
    }

    fn file(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }

    /// Without a client certificate.
    fn tls(&self, listener: &str) -> Variables {
        Variables::new()
            .with("LOG_LEVEL", "TRACE")
            .kafka(&format!("127.0.0.1:{}", self.port(listener)), TOPIC)
            .with("KAFKA_SSL_CA_FILE", self.file("ca.pem"))
    }

    fn ssl(&self, listener: &str, client: &str) -> Variables {
        self.tls(listener)
            .with("KAFKA_SSL_CERT_FILE", self.file(&format!("{client}.cert")))
            .with("KAFKA_SSL_KEY_FILE", self.file(&format!("{client}.key")))
    }

    fn sasl(&self, listener: &str, mechanism: &str) -> Variables {
        self.tls(listener)
            .with("KAFKA_SECURITY_PROTOCOL", "SASL_SSL")
            .with("KAFKA_SASL_MECHANISM", mechanism)
            .with("KAFKA_SASL_USERNAME", USER)
            .with("KAFKA_SASL_PASSWORD", PASSWORD)
    }
}

fn produce(more: &[&str], variables: &Variables) -> Agent {
    let path = scratch::directory("hosts").join("producer_config");
    fs::write(&path, "http://127.0.0.1:1/ 1s\n").unwrap();
    let arguments = [&["produce", "-c", path.to_str().unwrap()], more].concat();
    Agent::start(&arguments, variables)
}

#[test]
fn a_key_that_every_user_can_read_is_used_and_causes_one_warning() {
    let secured = secured();
    let key = PathBuf::from(secured.file("shared.key"));
    fs::copy(secured.file("client.key"), &key).unwrap();
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    let variables = secured
        .ssl("MUTUAL", "client")
        .with("KAFKA_SSL_KEY_FILE", key.display());
    let mut producer = produce(&["--once"], &variables);
    assert_eq!(producer.wait(SOON).code(), Some(0), "{}", producer.stderr());
    let warning = format!("[WARN] KAFKA_SSL_KEY_FILE={key:?}: every user of this machine can read");
    assert_eq!(producer.said(&warning), 1, "{}", producer.stderr());
}

#[test]
fn records_pass_with_every_protocol_that_the_broker_offers() {
    let secured = secured();
    let ways = [
        ("ssl", secured.ssl("MUTUAL", "client")),
        ("scram-sha-256", secured.sasl("OPEN", "SCRAM-SHA-256")),
        ("scram-sha-512", secured.sasl("OPEN", "SCRAM-SHA-512")),
        ("plain", secured.sasl("OPEN", "PLAIN")),
    ];
    let started = ways.map(|(way, variables)| {
        let db = Database::new();
        secured.kafka.create_topic(way, 1);
        let variables = variables
            .with("KAFKA_TOPIC", way)
            .with("KAFKA_GROUP_ID", way)
            .database(server())
            .with("DB_NAME", &db.name)
            .with("DB_BATCH_SECONDS", "0.1");
        let agents = [produce(&[], &variables), Agent::start(&["consume"], &variables)];
        (way, variables, db, agents)
    });
    for (way, variables, mut db, [producer, consumer]) in started {
        let says = || format!("{}\n{}", tail(&producer.stderr()), tail(&consumer.stderr()));
        wait_for(
            SOON,
            "rows in the table",
            || {
                let made = db.exists("host_metrics");
                (made && db.count("host_metrics") > 0).then_some(())
            },
            says,
        );
        for agent in [producer, consumer] {
            assert!(!agent.stderr().contains(PASSWORD), "{}", agent.stderr());
            agent.stop();
        }
        // `skip` connects to the broker without librdkafka.
        db.execute("UPDATE host_metrics_offsets SET next_offset = 0");
        let (status, said) = run(
            &["skip", &format!("{way}/0")],
            &variables.with("LOG_LEVEL", "INFO"),
        );
        assert_eq!(status, 0, "{way}: {said}");
        assert!(said.contains("The batch there: offsets 0 to "), "{way}: {said}");
    }
}

/// The warnings and errors that an operator sees at the usual log level.
fn troubles(agent: &Agent) -> Vec<String> {
    let is_trouble =
        |line: &&str| line.contains("[WARN]") || line.contains("[ERROR]") || line.starts_with("error: ");
    agent
        .stderr()
        .lines()
        .filter(is_trouble)
        .map(str::to_owned)
        .collect()
}

#[test]
fn each_refusal_is_reported_in_one_line_with_the_variable_to_check() {
    let secured = secured();
    let wrong_password = |mechanism| {
        secured
            .sasl("OPEN", mechanism)
            .with("KAFKA_SASL_PASSWORD", WRONG_PASSWORD)
    };
    let plain = format!("127.0.0.1:{}", secured.port("MUTUAL"));
    let bars: Vec<(Variables, &[&str])> = vec![
        (
            secured.ssl("MUTUAL", "expired-client"),
            &[
                "refuses our client certificate",
                "expired on Jan  1 00:00:00 2021 GMT",
                "KAFKA_SSL_CERT_FILE=/",
            ],
        ),
        (
            secured.ssl("MUTUAL", "stranger"),
            &[
                "refuses our client certificate",
                "issued by \"another CA\"",
                "KAFKA_SSL_CERT_FILE=/",
            ],
        ),
        (
            secured.tls("MUTUAL"),
            &[
                "requires a client certificate",
                "KAFKA_SSL_CERT_FILE and KAFKA_SSL_KEY_FILE",
            ],
        ),
        (
            secured.ssl("EXPIRED", "client"),
            &[
                "the broker's certificate expired on Jan  1 00:00:00 2021 GMT",
                "renew it on the broker",
            ],
        ),
        (
            secured.ssl("ELSEWHERE", "client"),
            &[
                "not for 127.0.0.1, but for kafka.elsewhere.example",
                "KAFKA_BOOTSTRAP_SERVERS",
            ],
        ),
        (
            secured
                .ssl("MUTUAL", "client")
                .with("KAFKA_SSL_CA_FILE", secured.file("other-ca.pem")),
            &[
                "by \"host-metrics test CA\"",
                "which cannot be verified with KAFKA_SSL_CA_FILE=/",
                "other-ca.pem",
            ],
        ),
        (
            wrong_password("SCRAM-SHA-256"),
            &[
                "Authentication failed",
                "KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD",
            ],
        ),
        (
            wrong_password("SCRAM-SHA-512"),
            &[
                "Authentication failed",
                "KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD",
            ],
        ),
        (
            wrong_password("PLAIN"),
            &[
                "Invalid username or password",
                "KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD",
            ],
        ),
        (
            secured.sasl("STRICT", "PLAIN"),
            &[
                "Unsupported SASL mechanism",
                "SCRAM-SHA-256",
                "check KAFKA_SASL_MECHANISM",
            ],
        ),
        (
            secured.tls("OPEN"),
            &["probably requires SASL", "KAFKA_SECURITY_PROTOCOL"],
        ),
        (
            Variables::new().kafka(&plain, TOPIC),
            &[
                "speaks TLS, but the client does not",
                "KAFKA_SECURITY_PROTOCOL=SSL",
            ],
        ),
        (
            secured
                .ssl("MUTUAL", "client")
                .kafka(&secured.kafka.bootstrap_servers(), TOPIC),
            &["does not speak TLS", "KAFKA_SECURITY_PROTOCOL"],
        ),
    ];
    let db = Database::new();
    let started: Vec<(Agent, &[&str])> = bars
        .into_iter()
        .flat_map(|(variables, words)| {
            let variables = variables.database(server()).with("DB_NAME", &db.name);
            let producer = produce(&[], &variables);
            let consumer = Agent::start(&["consume"], &variables);
            [
                (producer, words),
                (consumer, words),
                (Agent::start(&["init"], &variables), words),
            ]
        })
        .collect();
    let (initialisers, agents): (Vec<_>, Vec<_>) =
        started.into_iter().partition(|(agent, _)| agent.name() == "init");
    // `produce` needs seconds to stop with an unacknowledged record, so all of them stop at the same time.
    for (agent, words) in &agents {
        says_once(agent, words);
        agent.signal("TERM");
    }
    for (agent, words) in &initialisers {
        says_once(agent, words);
    }
    for (mut agent, _) in agents {
        // They take nearly all the time that they may take, all at once.
        let status = agent.wait(2 * STOP_WITHIN).code();
        let said = agent.stderr();
        match agent.name() {
            "consume" => assert_eq!(status, Some(0), "{said}"),
            _ => {
                assert_eq!(status, Some(1), "{said}");
                assert!(said.contains("Kafka never acknowledged"), "{said}");
            }
        }
    }
}

/// Verifies that one line has all the words, that no other line names a cause, and that no line shows a secret.
fn says_once(agent: &Agent, words: &[&str]) {
    wait_for(
        SAID_WITHIN,
        &format!("{} says {words:?} in one line", agent.name()),
        || {
            let says_all = |line: &String| words.iter().all(|words| line.contains(words));
            troubles(agent).iter().any(says_all).then_some(())
        },
        || tail(&agent.stderr()),
    );
    // On a slow machine, a line without a cause may come before the broker has answered.
    let troubles = troubles(agent);
    // The line comes again after a minute, with another duration.
    let text = |line: &&String| {
        line.split_once('[')
            .and_then(|(_, text)| text.split(" (for ").next().map(str::to_owned))
    };
    let texts: BTreeSet<Option<String>> = troubles.iter().map(|line| text(&line)).collect();
    let causes: BTreeSet<Option<String>> = troubles
        .iter()
        .filter(|line| names_a_cause(line))
        .map(|line| text(&line))
        .collect();
    assert!(causes.len() == 1 && texts.len() <= 2, "{troubles:#?}");
    let said = agent.stderr();
    assert!(
        !said.contains(PASSWORD) && !said.contains(WRONG_PASSWORD),
        "{said}"
    );
}
