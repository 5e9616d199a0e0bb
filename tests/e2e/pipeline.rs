//! The two agents together, and each of them with its server.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use host_metrics::commands::demo::postgres::{ThrowAwayPostgres, free_port};
use serde_json::{Value, json};

use crate::agent::{Agent, STOP_WITHIN, Variables};
use crate::kafka::{Kafka, Record};
use crate::scratch::{self, wait_for};
use crate::site::{PAGES, Page, Site};
use crate::table::{assert_equals_topic, assert_positions, connect, count, wait_for_stored};

const SOON: Duration = Duration::from_secs(30);

fn write_host_file(text: &str) -> PathBuf {
    let path = scratch::directory("hosts").join("producer_config");
    fs::write(&path, text).unwrap();
    path
}

fn produce(host_file: &Path, more: &[&str], variables: &Variables) -> Agent {
    let mut arguments = vec!["produce", "-c", host_file.to_str().unwrap()];
    arguments.extend(more);
    Agent::start(&arguments, variables)
}

fn value(record: &Record) -> Value {
    serde_json::from_slice(record.value.as_deref().expect("a value")).expect("JSON")
}

/// Verifies that the record has what its page did.
fn assert_says(record: &Value, page: &Page) {
    let context = || format!("{}: {record}", page.path);
    assert_eq!(record["outcome"], page.outcome, "{}", context());
    assert_eq!(record["is_valid"], json!(page.outcome == "ok"), "{}", context());
    assert_eq!(record["error"].is_null(), page.outcome == "ok", "{}", context());
    assert_eq!(record["status_code"], json!(page.status_code), "{}", context());
    assert_eq!(
        record["regex_matched"],
        json!(page.regex_matched),
        "{}",
        context()
    );
    assert_eq!(record["redirects"], json!(page.redirects), "{}", context());
    assert_eq!(record["ip"], "127.0.0.1", "{}", context());
    assert_eq!(record["agent"], "e2e", "{}", context());
    assert_eq!(
        record["latency"].is_null(),
        page.status_code.is_none(),
        "{}",
        context()
    );
    if let Some(latency) = record["latency"].as_f64() {
        assert!(latency >= page.at_least_seconds && latency < 2.0, "{}", context());
    }
    assert!(
        record["dns_seconds"].is_null() && record["tls_seconds"].is_null(),
        "{}",
        context()
    );
    assert!(record["connect_seconds"].is_number(), "{}", context());
}

#[test]
fn every_tick_of_every_host_becomes_one_record_and_one_row() {
    let kafka = Kafka::shared();
    kafka.create_topic("ticks", 4);
    let server = ThrowAwayPostgres::start().unwrap();
    let site = Site::start();
    let host_file = write_host_file(&site.host_file("2s"));
    let variables = Variables::new().kafka(&kafka.bootstrap_servers(), "ticks");
    let consumer = Agent::start(
        &["consume"],
        &variables
            .clone()
            .database(&server)
            .with("KAFKA_GROUP_ID", "ticks")
            .with("DB_BATCH_SECONDS", "0.2"),
    );
    let producer = produce(&host_file, &[], &variables.with("AGENT_NAME", "e2e"));
    let mut client = connect(&server);
    let enough = 4 * PAGES.len() as i64;
    wait_for(
        SOON,
        "four rounds of checks are in the table",
        || (crate::table::stored(&mut client) >= enough).then_some(()),
        || format!("{}\n{}", producer.stderr(), consumer.stderr()),
    );
    assert_eq!(producer.stdout(), "", "standard output is for results");
    producer.stop();

    let records = kafka.records("ticks");
    wait_for_stored(&mut client, records.len(), SOON, &consumer);
    assert_eq!(consumer.stdout(), "");
    consumer.stop();

    assert_equals_topic(&mut client, &records, "ticks");
    assert_positions(&mut client, kafka, "ticks", "ticks", &records);
    assert_eq!(
        count(&mut client, "SELECT count(*) FROM host_metrics_rejected"),
        0
    );
    let values: Vec<Value> = records.iter().map(value).collect();
    let mut checks: BTreeMap<&str, u64> = BTreeMap::new();
    for page in &PAGES {
        let address = site.address_of(page);
        let of_page: Vec<&Value> = values
            .iter()
            .filter(|record| record["address"] == address.as_str())
            .collect();
        assert!(of_page.len() >= 3, "{address}: {}", of_page.len());
        for record in &of_page {
            // A check that the stop interrupted may be the last record, as `missed`.
            if record["outcome"] != "missed" {
                assert_says(record, page);
            }
        }
        let started = of_page
            .iter()
            .filter(|record| !record["started_at"].is_null())
            .count() as u64;
        checks.insert(page.path, started);
    }
    // Each check sent each request once. Only /moved leads to /ok a second time.
    for page in &PAGES {
        let expected = checks[page.path] + if page.path == "/ok" { checks["/moved"] } else { 0 };
        assert_eq!(site.requests(page.path), expected, "{}", page.path);
    }
    let uneven = "SELECT count(*) FROM (
            SELECT scheduled_at - lag(scheduled_at) OVER (PARTITION BY address ORDER BY scheduled_at) AS step,
                   make_interval(secs => interval_seconds) AS due,
                   kafka_offset - lag(kafka_offset) OVER (PARTITION BY address ORDER BY scheduled_at) AS later
            FROM host_metrics
        ) steps WHERE step <> due OR later <= 0";
    assert_eq!(
        count(&mut client, uneven),
        0,
        "ticks follow each other by the interval, in order of their records"
    );
}

#[test]
fn once_checks_each_host_once_and_ends_when_kafka_has_it() {
    let kafka = Kafka::shared();
    kafka.create_topic("once", 2);
    let site = Site::start();
    let host_file = write_host_file(&site.host_file("5"));
    let variables = Variables::new()
        .kafka(&kafka.bootstrap_servers(), "once")
        .with("AGENT_NAME", "e2e");
    let mut producer = produce(&host_file, &["--once"], &variables);
    let status = producer.wait(SOON);
    assert_eq!(status.code(), Some(0), "{}", producer.stderr());
    let values: Vec<Value> = kafka.records("once").iter().map(value).collect();
    assert_eq!(values.len(), PAGES.len());
    for page in &PAGES {
        let address = site.address_of(page);
        let record = values
            .iter()
            .find(|record| record["address"] == address.as_str())
            .expect("a record");
        assert_says(record, page);
        assert_eq!(record["interval_seconds"].as_f64(), Some(300.0));
    }
}

#[test]
fn a_hangup_makes_produce_read_its_host_file_again_and_a_bad_file_changes_nothing() {
    let kafka = Kafka::shared();
    kafka.create_topic("reload", 1);
    let site = Site::start();
    let [first, second] = ["/ok", "/created"].map(|path| {
        let page = PAGES.iter().find(|page| page.path == path).unwrap();
        (path, format!("{} 1s {}\n", site.address_of(page), page.options))
    });
    let host_file = write_host_file(&first.1);
    let producer = produce(
        &host_file,
        &[],
        &Variables::new().kafka(&kafka.bootstrap_servers(), "reload"),
    );
    let wait_for_requests = |path: &str, count: u64| {
        let what = format!("{count} requests for {path}");
        wait_for(
            SOON,
            &what,
            || (site.requests(path) >= count).then_some(()),
            || producer.stderr(),
        );
    };
    wait_for_requests(first.0, 1);
    fs::write(&host_file, format!("{}{}", first.1, second.1)).unwrap();
    producer.signal("HUP");
    wait_for_requests(second.0, 1);
    fs::write(&host_file, "http://127.0.0.1/ 5x\n").unwrap();
    producer.signal("HUP");
    producer.wait_for_stderr(&format!("{}:1:", host_file.display()), SOON);
    for (path, _) in [&first, &second] {
        wait_for_requests(path, site.requests(path) + 2);
    }
    fs::write(&host_file, &second.1).unwrap();
    producer.signal("HUP");
    wait_for_requests(second.0, site.requests(second.0) + 2);
    producer.stop();
    let records: Vec<Value> = kafka.records("reload").iter().map(value).collect();
    let of = |path: &str| {
        records
            .iter()
            .filter(|record| record["address"].as_str().unwrap().ends_with(path))
            // On a busy machine a check may begin too late, and its tick is missed.
            .filter(|record| !record["started_at"].is_null())
            .count()
    };
    assert_eq!(
        (of(first.0) as u64, of(second.0) as u64),
        (site.requests(first.0), site.requests(second.0))
    );
}

#[test]
fn a_backlog_is_written_in_batches_of_exactly_the_size() {
    let kafka = Kafka::shared();
    kafka.create_topic("backlog", 3);
    let record = |number: i32| {
        let value = json!({"address": format!("http://h/{number}"), "latency": 0.25, "status_code": 200, "is_valid": true});
        (number % 3, None, Some(value.to_string().into_bytes()))
    };
    kafka.write("backlog", (0..1_050).map(record));
    let server = ThrowAwayPostgres::start().unwrap();
    let variables = Variables::new()
        .kafka(&kafka.bootstrap_servers(), "backlog")
        .database(&server)
        .with("KAFKA_GROUP_ID", "backlog")
        .with("DB_BATCH_SIZE", 100)
        // Long enough that slow reading on a busy machine makes no batch small.
        .with("DB_BATCH_SECONDS", 4);
    let consumer = Agent::start(&["consume"], &variables);
    let mut client = connect(&server);
    wait_for_stored(&mut client, 1_050, SOON, &consumer);
    consumer.stop();
    let rows = client
        .query(
            "SELECT count(*) FROM host_metrics GROUP BY xmin::text ORDER BY 1 DESC",
            &[],
        )
        .unwrap();
    let batches: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(batches, [100, 100, 100, 100, 100, 100, 100, 100, 100, 100, 50]);
    assert_positions(
        &mut client,
        kafka,
        "backlog",
        "backlog",
        &kafka.records("backlog"),
    );
}

#[test]
fn the_originals_records_are_stored_and_invalid_ones_are_rejected_unchanged() {
    let kafka = Kafka::shared();
    kafka.create_topic("mixed", 1);
    let text = |text: &str| Some(text.as_bytes().to_vec());
    let original =
        r#"{"address": "https://example.com/ü", "latency": 1.25, "status_code": 503, "is_valid": false}"#;
    kafka.write(
        "mixed",
        [
            (0, text("k"), text(original)),
            (0, text("bad"), text("{no json")),
            (0, None, None),
            (0, None, Some(vec![0xff, 0x00])),
            (0, None, text(r#"{"address": "a", "is_valid": true, "v": 2}"#)),
            (0, None, text(r#"{"address": "http://last/", "is_valid": true}"#)),
        ],
    );
    let server = ThrowAwayPostgres::start().unwrap();
    let variables = Variables::new()
        .kafka(&kafka.bootstrap_servers(), "mixed")
        .database(&server)
        .with("KAFKA_GROUP_ID", "mixed");
    let consumer = Agent::start(&["consume"], &variables);
    let mut client = connect(&server);
    wait_for_stored(&mut client, 6, SOON, &consumer);
    consumer.stop();

    let row = client
        .query_one(
            "SELECT address, latency, status_code, is_valid, outcome, (extract(epoch FROM scheduled_at) * 1000)::bigint
             FROM host_metrics WHERE kafka_offset = 0",
            &[],
        )
        .unwrap();
    assert_eq!(row.get::<_, String>(0), "https://example.com/ü");
    assert_eq!(row.get::<_, f64>(1), 1.25);
    assert_eq!(row.get::<_, i16>(2), 503);
    assert!(!row.get::<_, bool>(3));
    assert_eq!(row.get::<_, Option<String>>(4), None);
    assert_eq!(row.get::<_, i64>(5), kafka.records("mixed")[0].timestamp_ms);

    let rows = client
        .query(
            "SELECT kafka_offset, key, value, reason, group_id FROM host_metrics_rejected ORDER BY 1",
            &[],
        )
        .unwrap();
    type Rejected = (i64, Option<Vec<u8>>, Option<Vec<u8>>);
    let rejected: Vec<Rejected> = rows
        .iter()
        .map(|row| (row.get(0), row.get(1), row.get(2)))
        .collect();
    assert_eq!(
        rejected,
        [
            (1, text("bad"), text("{no json")),
            (2, None, None),
            (3, None, Some(vec![0xff, 0x00])),
            (4, None, text(r#"{"address": "a", "is_valid": true, "v": 2}"#)),
        ]
    );
    for row in &rows {
        assert!(!row.get::<_, String>(3).is_empty());
        assert_eq!(row.get::<_, String>(4), "mixed");
    }
}

#[test]
fn a_second_group_is_a_second_independent_copy() {
    let kafka = Kafka::shared();
    kafka.create_topic("copies", 2);
    let record = |number: i32| {
        (
            number % 2,
            None,
            Some(br#"{"address":"a","is_valid":true}"#.to_vec()),
        )
    };
    kafka.write("copies", (0..20).map(record));
    let server = ThrowAwayPostgres::start().unwrap();
    let base = Variables::new()
        .kafka(&kafka.bootstrap_servers(), "copies")
        .database(&server);
    let consumers = ["one", "two"].map(|name| {
        Agent::start(
            &["consume"],
            &base
                .clone()
                .with("KAFKA_GROUP_ID", format!("copies-{name}"))
                .with("DB_TABLE", name),
        )
    });
    let mut client = connect(&server);
    for name in ["one", "two"] {
        wait_for(
            SOON,
            "each table has every record",
            || {
                let there = format!("SELECT count(*) FROM pg_class WHERE relname = '{name}'");
                (count(&mut client, &there) == 1).then_some(())?;
                (count(&mut client, &format!("SELECT count(*) FROM {name}")) == 20).then_some(())
            },
            || consumers.iter().map(Agent::stderr).collect(),
        );
    }
    consumers.into_iter().for_each(Agent::stop);
}

/// There are warnings that name what is waited for, but only a few.
fn assert_says_what_it_waits_for(agent: &Agent, address: &str) {
    let warnings = || {
        let text = agent.stderr();
        let is_warning = |line: &&str| line.contains("[WARN]") || line.contains("[ERROR]");
        text.lines()
            .filter(is_warning)
            .filter(|line| line.contains(address))
            .count()
    };
    wait_for(
        SOON,
        "a warning",
        || (warnings() > 0).then_some(()),
        || agent.stderr(),
    );
    assert!(warnings() < 5, "a flood:\n{}", agent.stderr());
}

#[test]
fn produce_reports_that_kafka_is_away_and_a_stop_reports_unacknowledged_records() {
    let nowhere = format!("127.0.0.1:{}", free_port().unwrap());
    let site = Site::start();
    let host_file = write_host_file(&site.host_file("1s"));
    let variables = Variables::new().kafka(&nowhere, "t").with("LOG_LEVEL", "INFO");
    let mut producer = produce(&host_file, &[], &variables);
    assert_says_what_it_waits_for(&producer, &nowhere);
    producer.signal("TERM");
    // It takes nearly all the time that it may take.
    let status = producer.wait(STOP_WITHIN + Duration::from_secs(5));
    assert_eq!(status.code(), Some(1), "{}", producer.stderr());
    assert!(
        producer.stderr().contains("acknowledged"),
        "{}",
        producer.stderr()
    );
}

#[test]
fn consume_reports_that_kafka_is_away_and_stops_cleanly() {
    let nowhere = format!("127.0.0.1:{}", free_port().unwrap());
    let server = ThrowAwayPostgres::start().unwrap();
    let variables = Variables::new()
        .kafka(&nowhere, "t")
        .database(&server)
        .with("LOG_LEVEL", "INFO");
    let consumer = Agent::start(&["consume"], &variables);
    assert_says_what_it_waits_for(&consumer, &nowhere);
    consumer.stop();
}

#[test]
fn consume_reports_that_postgres_is_away_and_continues_when_it_is_back() {
    let kafka = Kafka::shared();
    kafka.create_topic("away", 1);
    kafka.write(
        "away",
        [(0, None, Some(br#"{"address":"a","is_valid":true}"#.to_vec()))],
    );
    let server = ThrowAwayPostgres::start().unwrap();
    server.stop().unwrap();
    let variables = Variables::new()
        .kafka(&kafka.bootstrap_servers(), "away")
        .database(&server)
        .with("KAFKA_GROUP_ID", "away")
        .with("LOG_LEVEL", "INFO");
    let impatient = Agent::start(&["consume"], &variables);
    assert_says_what_it_waits_for(&impatient, &server.port().to_string());
    impatient.stop();
    let patient = Agent::start(&["consume"], &variables);
    assert_says_what_it_waits_for(&patient, &server.port().to_string());
    server.start_again().unwrap();
    wait_for_stored(&mut connect(&server), 1, SOON, &patient);
    patient.stop();
}

#[test]
fn a_missing_topic_is_waited_for_and_reported() {
    let kafka = Kafka::shared();
    let server = ThrowAwayPostgres::start().unwrap();
    let site = Site::start();
    let host_file = write_host_file(&site.host_file("1s"));
    let variables = Variables::new()
        .kafka(&kafka.bootstrap_servers(), "to-come")
        .with("KAFKA_GROUP_ID", "to-come");
    let consumer = Agent::start(&["consume"], &variables.clone().database(&server));
    let producer = produce(&host_file, &[], &variables);
    consumer.wait_for_stderr("to-come", SOON);
    producer.wait_for_stderr("to-come", SOON);
    kafka.create_topic("to-come", 2);
    let mut client = connect(&server);
    wait_for(
        // Both look for the topic again at least every thirty seconds.
        Duration::from_secs(60),
        "rows come",
        || (crate::table::stored(&mut client) > 0).then_some(()),
        || format!("{}\n{}", producer.stderr(), consumer.stderr()),
    );
    producer.stop();
    let records = kafka.records("to-come");
    wait_for_stored(&mut client, records.len(), SOON, &consumer);
    consumer.stop();
    assert_equals_topic(&mut client, &records, "to-come");
}
