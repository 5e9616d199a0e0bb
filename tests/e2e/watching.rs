//! What an operator sees, with real servers: health and readiness during an outage of each, and `status`.

use std::fs;
use std::time::Duration;

use host_metrics::commands::demo::postgres::ThrowAwayPostgres;
use serde_json::{Value, json};

use crate::agent::{Agent, Variables, run};
use crate::kafka::Kafka;
use crate::scratch::{self, wait_for};

const SOON: Duration = Duration::from_secs(60);

#[test]
fn health_and_status_report_an_outage_of_either_server_and_its_end() {
    let mut kafka = Kafka::start();
    kafka.create_topic("watched", 2);
    let postgres = ThrowAwayPostgres::start().unwrap();
    let host_file = scratch::directory("hosts").join("producer_config");
    fs::write(&host_file, "http://127.0.0.1:1/ 1s\n").unwrap();
    let servers = Variables::new()
        .kafka(&kafka.bootstrap_servers(), "watched")
        .database(&postgres)
        .with("DB_BATCH_SECONDS", "0.1");
    let serving = || servers.clone().with_metrics();
    let (of_produce, of_consume) = (serving(), serving());
    let producer = Agent::start(&["produce", "-c", host_file.to_str().unwrap()], &of_produce);
    let consumer = Agent::start(&["consume"], &of_consume);
    let becomes = |variables: &Variables, expected: i32, word: &str| {
        wait_for(
            SOON,
            &format!("health ends with {expected} and says {word:?}"),
            || {
                let (status, said) = run(&["health"], variables);
                (status == expected && said.contains(word)).then_some(())
            },
            || format!("{}\n{}", producer.stderr(), consumer.stderr()),
        );
    };
    becomes(&of_produce, 0, "ready");
    becomes(&of_consume, 0, "ready");

    // Both agents work. The table is behind by at most the records in flight.
    wait_for(
        SOON,
        "rows",
        || (status(&servers).0 == 0).then_some(()),
        || consumer.stderr(),
    );
    let (_, document) = status(&servers);
    assert_eq!(document["hosts"][0]["state"], "down");
    assert_eq!(document["hosts"][0]["last_error_outcome"], "connect_refused");
    assert_eq!(
        document["pipeline"]["partitions"].as_array().map(Vec::len),
        Some(2),
        "{document:#}"
    );
    let lag = document["pipeline"]["lag_records"].as_i64();
    assert!(lag.is_some_and(|lag| lag < 10), "{document:#}");

    postgres.stop().unwrap();
    becomes(&of_consume, 1, "waiting for Postgres");
    becomes(&of_produce, 0, "ready");
    postgres.start_again().unwrap();
    becomes(&of_consume, 0, "ready");

    kafka.kill();
    becomes(&of_produce, 1, "waiting for Kafka");
    becomes(&of_consume, 1, "waiting for Kafka");
    let (_, document) = status(&servers);
    assert_eq!(document["pipeline"]["lag_records"], Value::Null);
    let reason = document["pipeline"]["lag_unknown_because"].as_str().unwrap();
    assert!(reason.starts_with("Kafka at "), "{reason}");
    kafka.start_again();
    becomes(&of_produce, 0, "ready");
    becomes(&of_consume, 0, "ready");

    // Every record is stored, and there is no lag left after the outages.
    producer.stop();
    let none = || (status(&servers).1["pipeline"]["lag_records"] == json!(0)).then_some(());
    wait_for(SOON, "no lag", none, || consumer.stderr());
    consumer.stop();
}

fn status(variables: &Variables) -> (i32, Value) {
    let mut command = Agent::start(&["status", "--json"], variables);
    let status = command.wait(SOON);
    // There is no answer before the table exists.
    let document = serde_json::from_str(&command.stdout()).unwrap_or_default();
    (status.code().unwrap(), document)
}
