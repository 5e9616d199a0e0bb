//! `init` and `drop` as an operator runs them, with a real Kafka and a real Postgres: twice, at the same time, too early.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use host_metrics::commands::demo::postgres::{ThrowAwayPostgres, free_port};
use host_metrics::tables::schema::SCHEMA_VERSION;

use crate::agent::{Agent, Variables};
use crate::kafka::Kafka;
use crate::table::{connect, count};

const SOON: Duration = Duration::from_secs(30);

/// Runs a command to its end. Returns the exit status and the output.
fn run(arguments: &[&str], variables: &Variables) -> (Option<i32>, String) {
    let mut agent = Agent::start(arguments, variables);
    let status = agent.wait(SOON);
    (status.code(), agent.stderr())
}

#[test]
fn init_makes_topics_and_tables_once_and_reports_what_differs() {
    let kafka = Kafka::shared();
    let server = ThrowAwayPostgres::start().unwrap();
    let variables = Variables::new()
        .kafka(&kafka.bootstrap_servers(), "init-a,init-b")
        .database(&server)
        .with("LOG_LEVEL", "INFO");

    // Two run at the same time, as with two replicas of a deployment.
    let mut both = [(); 2].map(|()| Agent::start(&["init", "--retention", "1d"], &variables));
    for agent in &mut both {
        assert_eq!(agent.wait(SOON).code(), Some(0), "{}", agent.stderr());
    }
    // One creates a topic and the other finds it. If Kafka's answer is lost, the first one tries again and finds it too. The
    // properties of the topics, verified below, show that one of the two created them.
    let said: String = both.iter().map(Agent::stderr).collect();
    for topic in ["init-a", "init-b"] {
        let made = said.matches(&format!("topic {topic} created")).count();
        let found = said
            .lines()
            .filter(|line| {
                line.contains(&format!("topic {topic} exists"))
                    || line.contains(&format!("topic {topic} not created: "))
            })
            .count();
        assert!(made <= 1 && made + found == 2, "{topic}: {said}");
    }
    let mut client = connect(&server);
    assert_eq!(count(&mut client, "SELECT count(*) FROM host_metrics_offsets"), 0);

    let (status, said) = run(&["init"], &variables);
    assert_eq!(status, Some(0), "{said}");
    for topic in ["init-a", "init-b"] {
        let found = format!("topic {topic} exists with 12 partitions and is not changed");
        assert!(said.contains(&found), "{said}");
    }
    assert!(said.contains("\"host_metrics_certificates\" exists"), "{said}");

    let asked = [
        "init",
        "--partitions",
        "3",
        "--replication",
        "2",
        "--retention",
        "7d",
    ];
    let (status, said) = run(&asked, &variables);
    assert_eq!(status, Some(0), "{said}");
    for difference in [
        "it has 12 partitions, not 3",
        "each of its partitions has 1 replica, not 2",
        "its retention.ms is 86400000, not 604800000",
    ] {
        assert_eq!(said.matches(difference).count(), 2, "for each topic: {said}");
    }
}

#[test]
fn a_topic_that_cannot_be_made_ends_init_with_the_reason() {
    let kafka = Kafka::shared();
    let server = ThrowAwayPostgres::start().unwrap();
    let variables = Variables::new()
        .kafka(&kafka.bootstrap_servers(), "init-never")
        .database(&server);
    let mut agent = Agent::start(&["init", "--replication", "5"], &variables);
    // A cluster whose brokers are still starting gives the same answer.
    agent.wait_for_stderr("waiting for Kafka", SOON);
    let status = agent.wait(2 * SOON).code();
    let said = agent.stderr();
    assert_eq!(status, Some(1), "{said}");
    assert!(
        said.contains("init-never not created") && said.contains("--replication"),
        "{said}"
    );
}

#[test]
fn init_waits_for_absent_servers_and_reports_that() {
    let kafka = Kafka::shared();
    let nobody = free_port().unwrap();
    let server = ThrowAwayPostgres::start().unwrap();
    let without_kafka = Variables::new()
        .kafka(&format!("127.0.0.1:{nobody}"), "init-early")
        .database(&server);
    let mut early = Agent::start(&["init"], &without_kafka);
    early.wait_for_stderr(&format!("waiting for Kafka at 127.0.0.1:{nobody}"), SOON);
    early.wait_for_stderr("Connection refused", SOON);

    server.stop().unwrap();
    let without_postgres = Variables::new()
        .kafka(&kafka.bootstrap_servers(), "init-early")
        .database(&server);
    let mut patient = Agent::start(&["init"], &without_postgres);
    patient.wait_for_stderr(
        &format!("waiting for Postgres at 127.0.0.1:{}", server.port()),
        SOON,
    );
    server.start_again().unwrap();
    assert_eq!(patient.wait(SOON).code(), Some(0), "{}", patient.stderr());
    assert_eq!(
        count(&mut connect(&server), "SELECT count(*) FROM host_metrics"),
        0
    );

    // SIGTERM ends an `init` that waits.
    early.signal("TERM");
    early.wait(SOON);
}

#[test]
fn a_refused_login_ends_init_at_once() {
    let kafka = Kafka::shared();
    let server = ThrowAwayPostgres::start().unwrap();
    let variables = Variables::new()
        .kafka(&kafka.bootstrap_servers(), "init-login")
        .database(&server)
        .with("DB_USER", "nobody-of-this-name");
    let (status, said) = run(&["init"], &variables);
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("DB_USER"), "{said}");
}

#[test]
fn the_printed_sql_needs_no_server_and_psql_takes_it() {
    let variables = Variables::default().with("DB_TABLE", "s.checks");
    let mut agent = Agent::start(&["init", "--print-sql"], &variables);
    assert_eq!(agent.wait(SOON).code(), Some(0), "{}", agent.stderr());
    let server = ThrowAwayPostgres::start().unwrap();
    let mut client = connect(&server);
    client.batch_execute("CREATE SCHEMA s").unwrap();
    for _ in 0..2 {
        let mut psql = Command::new(server.program("psql"))
            .args([
                "-qX",
                "-v",
                "ON_ERROR_STOP=1",
                "-h",
                server.host(),
                "-U",
                server.superuser(),
            ])
            .args(["-p", &server.port().to_string(), server.database()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        psql.stdin
            .take()
            .unwrap()
            .write_all(agent.stdout().as_bytes())
            .unwrap();
        assert!(psql.wait().unwrap().success());
    }
    assert_eq!(count(&mut client, "SELECT count(*) FROM s.checks_latest"), 0);
}

#[test]
fn init_reports_tables_of_a_newer_version() {
    let kafka = Kafka::shared();
    let server = ThrowAwayPostgres::start().unwrap();
    let variables = Variables::new()
        .kafka(&kafka.bootstrap_servers(), "init-versions")
        .database(&server)
        .with("LOG_LEVEL", "INFO");
    let mut client = connect(&server);
    assert_eq!(run(&["init"], &variables).0, Some(0));
    let newer = SCHEMA_VERSION + 1;
    client
        .batch_execute(&format!(
            "COMMENT ON TABLE host_metrics IS 'host-metrics schema {newer}: rows'; \
             DROP VIEW host_metrics_latest CASCADE"
        ))
        .unwrap();
    let (status, said) = run(&["init"], &variables);
    assert_eq!(status, Some(0), "{said}");
    assert!(
        said.contains(&format!("newer version of host-metrics (schema {newer})")),
        "{said}"
    );
    assert!(said.contains("\"host_metrics_latest\" not created"), "{said}");
}

#[test]
fn drop_requires_yes_and_keeps_the_topic_by_default() {
    let kafka = Kafka::shared();
    let server = ThrowAwayPostgres::start().unwrap();
    let variables = Variables::new()
        .kafka(&kafka.bootstrap_servers(), "init-drop")
        .database(&server)
        .with("LOG_LEVEL", "INFO");
    assert_eq!(run(&["init"], &variables).0, Some(0));

    let (status, said) = run(&["drop"], &variables);
    assert_eq!(status, Some(2), "{said}");
    assert!(said.contains("--yes"), "{said}");
    let (status, said) = run(&["drop", "--yes"], &variables);
    assert_eq!(status, Some(0), "{said}");
    assert!(said.contains("\"host_metrics\" dropped"), "{said}");
    let (_, said) = run(&["init"], &variables);
    assert!(said.contains("topic init-drop exists"), "{said}");
    assert!(said.contains("\"host_metrics\" created"), "{said}");

    let (status, said) = run(&["drop", "--yes", "--topic"], &variables);
    assert_eq!(status, Some(0), "{said}");
    assert!(said.contains("topic init-drop dropped"), "{said}");
    let (status, said) = run(&["drop", "--yes", "--topic"], &variables);
    assert_eq!(status, Some(0), "{said}");
    assert!(said.contains("no table") && said.contains("init-drop"), "{said}");
}
