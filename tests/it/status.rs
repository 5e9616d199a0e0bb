//! `status` with a temporary Postgres that has prepared rows, and an in-process Kafka.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use host_metrics::commands::demo::postgres::ThrowAwayPostgres;
use host_metrics::commands::{init, status};
use host_metrics::config::{self, StatusConfig, Variables};
use postgres::{Client, NoTls};
use rdkafka::ClientConfig;
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use serde_json::{Value, json};

/// A database with the tables that `init` creates.
struct Database {
    server: ThrowAwayPostgres,
    client: Client,
}

impl Database {
    fn new() -> Self {
        let server = ThrowAwayPostgres::start().unwrap();
        let client = postgres::Config::new()
            .host(server.host())
            .port(server.port())
            .user(server.superuser())
            .dbname(server.database())
            .connect(NoTls)
            .unwrap();
        Self { server, client }
    }

    fn with_tables() -> Self {
        let database = Self::new();
        init::make_tables(&database.config(&[]).database).unwrap();
        database
    }

    fn config(&self, more: &[(&str, &str)]) -> StatusConfig {
        let port = self.server.port().to_string();
        let mut pairs = vec![
            ("DB_HOST", self.server.host()),
            ("DB_PORT", &port),
            ("DB_NAME", self.server.database()),
            ("DB_USER", self.server.superuser()),
        ];
        pairs.extend(more);
        config::status(&Variables::from_pairs(pairs)).unwrap()
    }

    fn execute(&mut self, sql: &str) {
        self.client
            .batch_execute(sql)
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    /// Stores `checks` checks of `address`, one every `interval_seconds` until now. `failed` has the failed ones, counted from the
    /// newest, which is 0.
    fn checks(&mut self, address: &str, interval_seconds: u32, checks: u32, failed: &[u32]) {
        let failed: Vec<String> = failed.iter().map(u32::to_string).collect();
        let failed = format!("n = ANY (ARRAY[{}]::integer[])", failed.join(","));
        self.execute(&format!(
            "INSERT INTO host_metrics (address, scheduled_at, interval_seconds, is_valid, outcome, latency, error)
             SELECT '{address}', now() - make_interval(secs => n * {interval_seconds}), {interval_seconds},
                 NOT ({failed}), CASE WHEN {failed} THEN 'bad_status' ELSE 'ok' END,
                 0.1 + n * 0.001, CASE WHEN {failed} THEN 'error ' || n END
             FROM generate_series(0, {checks} - 1) n"
        ));
    }

    /// The JSON answer, validated with its schema, and whether the data is stale.
    fn status(&self, more: &[(&str, &str)]) -> Value {
        let report = status::run(&self.config(more)).unwrap();
        let document: Value = serde_json::from_str(&status::json(&report)).unwrap();
        let schema = include_str!("../../schema/status.v1.json");
        let schema: Value = serde_json::from_str(schema).unwrap();
        let validator = jsonschema::validator_for(&schema).unwrap();
        let errors: Vec<String> = validator
            .iter_errors(&document)
            .map(|error| format!("{}: {error}", error.instance_path()))
            .collect();
        assert!(errors.is_empty(), "{errors:#?}\n{document:#}");
        assert_eq!(document["stale"], report.stale);
        document
    }
}

#[test]
fn fresh_rows_are_shown_host_by_host() {
    let mut database = Database::with_tables();
    database.checks("a-up", 60, 200, &[100, 101, 150]);
    database.checks("b-down", 60, 200, &[0, 1, 2, 90]);
    database.checks("c-always-up", 3_600, 24 * 10, &[]);
    database.execute(
        "UPDATE host_metrics SET cert_expires_at = now() + interval '62 days 1 hour' WHERE address = 'a-up'",
    );
    let document = database.status(&[]);
    assert_eq!(document["stale"], false);
    let [a, b, c] = document["hosts"].as_array().unwrap().as_slice() else {
        panic!("three hosts: {document:#}");
    };
    assert_eq!(a["state"], "up");
    assert_eq!(a["uptime_1h"], 1.0);
    assert_eq!(a["uptime_24h"], json!(197.0 / 200.0));
    assert_eq!(a["uptime_7d"], json!(197.0 / 200.0));
    assert_age(&document, &a["since"], 99 * 60);
    assert_age(&document, &a["last_check"], 0);
    assert_age(&document, &a["last_error_at"], 100 * 60);
    assert_eq!(a["last_error"], "error 100");
    assert_eq!(a["certificate_days_left"], 62);
    assert_eq!(a["interval_seconds"], 60.0);
    // The latencies are 0.1 to 0.299 in steps of 0.001: the median and the 95th percentile.
    assert!((a["latency_p50_seconds"].as_f64().unwrap() - 0.1995).abs() < 1e-9);
    assert!((a["latency_p95_seconds"].as_f64().unwrap() - 0.28905).abs() < 1e-9);
    let latencies: Vec<f64> = a["latencies"]
        .as_array()
        .unwrap()
        .iter()
        .map(|l| l.as_f64().unwrap())
        .collect();
    assert_eq!(latencies.len(), 20);
    assert_eq!((latencies[0], latencies[19]), (0.119, 0.1), "oldest first");

    assert_eq!(b["state"], "down");
    assert_age(&document, &b["since"], 2 * 60);
    assert_eq!(
        (&b["last_error"], &b["last_error_outcome"]),
        (&json!("error 0"), &json!("bad_status"))
    );
    assert_eq!(b["since_is_earlier"], false);

    assert_eq!(c["state"], "up");
    assert_eq!(
        (&c["since_is_earlier"], &c["last_error"]),
        (&json!(true), &Value::Null)
    );
    assert_eq!(c["uptime_7d"], 1.0);
}

#[test]
fn the_exit_status_tells_whether_the_data_is_current() {
    let mut database = Database::with_tables();
    let port = format!("DB_PORT={}", database.server.port());
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_host-metrics"))
            .arg("status")
            .args(arguments)
            .args([
                "-e",
                "DB_HOST=127.0.0.1",
                "-e",
                "DB_NAME=postgres",
                "-e",
                "DB_USER=postgres",
                "-e",
                &port,
            ])
            .env_clear()
            .current_dir(std::env::temp_dir())
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let (status, text) = run(&[]);
    assert_eq!(status, Some(1));
    assert!(
        text.contains("The table has no row of any host.")
            && text.contains("STALE: the table has no row of the last seven days."),
        "{text}"
    );
    database.checks("a", 60, 3, &[]);
    let (status, text) = run(&[]);
    assert_eq!(status, Some(0));
    assert!(
        text.lines()
            .nth(1)
            .is_some_and(|line| line.starts_with("a     up     ")),
        "{text}"
    );
    assert!(!text.contains("STALE"), "{text}");
    let (status, json) = run(&["--json"]);
    let document: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((status, &document["stale"]), (Some(0), &json!(false)));
}

#[test]
fn a_tick_that_was_not_checked_changes_nothing_about_the_host() {
    let mut database = Database::with_tables();
    database.checks("a", 60, 30, &[]);
    database.execute(
        "UPDATE host_metrics SET is_valid = false, latency = NULL, error = 'not checked',
             outcome = (ARRAY['missed', 'agent_error', 'agent_offline'])
                 [1 + round(extract(epoch FROM now() - scheduled_at) / 60)::integer]
         WHERE scheduled_at > now() - interval '2 minutes 30 seconds';
         CREATE TABLE theirs AS TABLE host_metrics;
         CREATE TABLE without_time AS SELECT address, latency, is_valid, outcome FROM host_metrics",
    );
    let document = database.status(&[]);
    let host = &document["hosts"][0];
    assert_eq!(host["state"], "up");
    assert_age(&document, &host["since"], 29 * 60);
    assert_eq!(host["uptime_1h"], 1.0);
    assert_eq!(
        (&host["missed_7d"], &host["last_outcome"]),
        (&json!(3), &json!("missed"))
    );
    assert_eq!(host["last_error"], Value::Null);
    assert_eq!(*host, database.status(&[("DB_TABLE", "theirs")])["hosts"][0]);
    let without_time = database.status(&[("DB_TABLE", "without_time")]);
    assert_eq!(without_time["hosts"][0]["uptime_ever"], 1.0);
}

#[test]
fn no_row_and_old_rows_are_stale() {
    let mut database = Database::with_tables();
    let document = database.status(&[]);
    assert_eq!(
        (&document["stale"], &document["pipeline"]["stale_because"]),
        (
            &json!(true),
            &json!("the table has no row of the last seven days")
        )
    );
    database.checks("a", 10, 5, &[]);
    assert_eq!(database.status(&[])["stale"], false);
    database.execute("UPDATE host_metrics SET scheduled_at = scheduled_at - interval '100 seconds'");
    let document = database.status(&[]);
    assert_eq!(document["stale"], true, "100 s old, every 10 s");
    assert_eq!(document["hosts"][0]["state"], "stale");
    database.execute("UPDATE host_metrics SET interval_seconds = 60");
    assert_eq!(database.status(&[])["stale"], false, "100 s old, every minute");
    database.execute("UPDATE host_metrics SET scheduled_at = scheduled_at - interval '30 days'");
    assert_eq!(
        database.status(&[])["stale"],
        true,
        "older than what is looked at"
    );
}

#[test]
fn another_table_with_the_same_rows_gives_the_same_answer() {
    let mut database = Database::with_tables();
    database.checks("a", 60, 200, &[100, 101, 150]);
    database.checks("b", 60, 200, &[0, 1, 2, 90]);
    database.checks("c", 3_600, 24 * 10, &[]);
    database.execute(
        "UPDATE host_metrics SET cert_expires_at = now() + interval '5 days 1 hour' WHERE address = 'a';
         UPDATE host_metrics SET outcome = 'missed', is_valid = false
         WHERE address = 'b' AND scheduled_at > now() - interval '30 seconds';
         CREATE TABLE theirs AS TABLE host_metrics;
         ALTER TABLE theirs ALTER latency TYPE numeric",
    );
    let ours = database.status(&[]);
    let theirs = database.status(&[("DB_TABLE", "theirs")]);
    assert_eq!(ours["hosts"], theirs["hosts"]);
    assert!(
        ours["pipeline"]["counted_rows_because"]
            .as_str()
            .unwrap()
            .contains("is empty")
    );
    assert_eq!(theirs["stale"], false);
    assert_eq!(
        theirs["pipeline"]["rejected_records"],
        Value::Null,
        "there is no such table"
    );
    database.execute("INSERT INTO theirs SELECT * FROM theirs LIMIT 1; UPDATE theirs SET scheduled_at = '-infinity' WHERE ctid = (SELECT max(ctid) FROM theirs)");
    assert_eq!(ours["hosts"], database.status(&[("DB_TABLE", "theirs")])["hosts"]);
    database.execute("UPDATE theirs SET scheduled_at = scheduled_at - interval '30 days'");
    let old = database.status(&[("DB_TABLE", "theirs")]);
    assert_eq!((&old["stale"], &old["hosts"]), (&json!(true), &json!([])));
}

#[test]
fn the_originals_table_shows_what_it_can() {
    let mut database = Database::new();
    database.execute(
        "CREATE TABLE host_metrics (address text, latency real, status_code smallint, is_valid boolean);
         INSERT INTO host_metrics VALUES ('a', 0.1, 200, true), ('a', 0.3, 200, true), ('a', NULL, NULL, false),
             ('b', 0.5, 404, false)",
    );
    let document = database.status(&[]);
    assert_eq!(document["stale"], true);
    let hosts = document["hosts"].as_array().unwrap();
    assert_eq!(hosts.len(), 2);
    assert_eq!(
        (&hosts[0]["address"], &hosts[0]["state"]),
        (&json!("a"), &json!("unknown"))
    );
    assert_eq!(hosts[0]["uptime_ever"], json!(2.0 / 3.0));
    assert!((hosts[0]["latency_p50_seconds"].as_f64().unwrap() - 0.2).abs() < 1e-6);
    assert_eq!(
        document["pipeline"]["missing_columns"],
        json!([
            "scheduled_at",
            "outcome",
            "error",
            "interval_seconds",
            "cert_expires_at"
        ])
    );
    let text = status::text(&status::run(&database.config(&[])).unwrap(), None);
    assert!(text.contains("HOST  CHECKS  UPTIME"), "{text}");
    assert!(
        text.contains("unknown, because the table has no column scheduled_at"),
        "{text}"
    );

    database.execute(
        "ALTER TABLE host_metrics ADD scheduled_at timestamptz; UPDATE host_metrics SET scheduled_at = now()",
    );
    let document = database.status(&[]);
    assert_eq!(
        (&document["stale"], &document["hosts"][1]["state"]),
        (&json!(false), &json!("down"))
    );

    database.execute("ALTER TABLE host_metrics DROP is_valid");
    let document = database.status(&[]);
    assert_eq!(document["hosts"][1]["state"], "unknown");
    assert_eq!(document["hosts"][1]["uptime_1h"], Value::Null);
}

#[test]
fn a_table_that_is_missing_or_may_not_be_read_is_reported() {
    let mut database = Database::new();
    let error = |database: &Database, more: &[(&str, &str)]| {
        format!("{:#}", status::run(&database.config(more)).unwrap_err())
    };
    let text = error(&database, &[]);
    assert!(
        text.contains("host_metrics\" does not exist: run `host-metrics init`"),
        "{text}"
    );
    database.execute("CREATE TABLE host_metrics (address text, is_valid boolean); CREATE ROLE nobody LOGIN");
    let text = error(&database, &[("DB_USER", "nobody")]);
    assert!(
        text.contains("GRANT SELECT ON") && text.contains("host_metrics"),
        "{text}"
    );
}

#[test]
fn the_lag_counts_records_in_kafka_that_are_not_in_the_table() {
    let kafka = MockCluster::new(1).unwrap();
    kafka.create_topic("host-metrics", 3, 1).unwrap();
    let servers = kafka.bootstrap_servers();
    let producer: BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", &servers)
        .create()
        .unwrap();
    for (partition, records) in [(0, 10), (1, 4)] {
        for _ in 0..records {
            let record = BaseRecord::<(), str>::to("host-metrics")
                .partition(partition)
                .payload("{}");
            producer.send(record).map_err(|(error, _)| error).unwrap();
        }
    }
    producer.flush(Duration::from_secs(30)).unwrap();
    let mut database = Database::with_tables();
    database.checks("a", 60, 3, &[]);
    database.execute("INSERT INTO host_metrics_offsets VALUES ('host-metrics', 'host-metrics', 0, 7), ('other', 'host-metrics', 1, 4)");
    database.execute("INSERT INTO host_metrics_rejected VALUES ('host-metrics', 'host-metrics', 0, 1, NULL, NULL, 'a tombstone')");
    let document = database.status(&[("KAFKA_BOOTSTRAP_SERVERS", &servers)]);
    let pipeline = &document["pipeline"];
    assert_eq!(pipeline["lag_unknown_because"], Value::Null);
    assert_eq!(
        (&pipeline["lag_records"], &pipeline["rejected_records"]),
        (&json!(7), &json!(1))
    );
    let partitions: Vec<_> = pipeline["partitions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| {
            (
                p["partition"].as_i64(),
                p["next_offset"].as_i64(),
                p["end_offset"].as_i64(),
                p["lag_records"].as_i64(),
            )
        })
        .collect();
    let of = |partition, next, end, lag| (Some(partition), next, Some(end), Some(lag));
    assert_eq!(
        partitions,
        [of(0, Some(7), 10, 3), of(1, None, 4, 4), of(2, None, 0, 0)]
    );
}

#[test]
fn an_absent_kafka_is_reported_within_seconds_beside_the_state() {
    let mut database = Database::with_tables();
    database.checks("a", 60, 3, &[]);
    let document = database.status(&[]);
    assert_eq!(
        document["pipeline"]["lag_unknown_because"],
        "KAFKA_BOOTSTRAP_SERVERS is not set"
    );
    let began = now();
    let document = database.status(&[("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1")]);
    assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());
    let reason = document["pipeline"]["lag_unknown_because"].as_str().unwrap();
    assert!(
        reason.contains("Kafka at 127.0.0.1:1: ") && reason.contains("refused"),
        "{reason}"
    );
    assert_eq!(
        (&document["stale"], &document["hosts"][0]["state"]),
        (&json!(false), &json!("up"))
    );
}

#[test]
fn one_host_and_the_incidents_are_read_from_the_state() {
    let mut database = Database::with_tables();
    database.execute(
        "INSERT INTO host_metrics_series (series_id, address, agent, name, \"group\", is_valid, since, last_seen_at, last_check_at, outcome, error, verdict, verdict_since)
         SELECT n, CASE WHEN n < 3 THEN 'https://a.example/' ELSE 'https://b.example/' END, 'place-' || n, 'Shop ' || n / 3, 'Shops',
             n <> 2, now() - interval '10 minutes', now() - interval '5 minutes', now() - interval '5 minutes', CASE WHEN n = 2 THEN 'bad_status' ELSE 'ok' END,
             CASE WHEN n = 2 THEN 'status 503' END, 'up', now() - interval '3 hours'
         FROM generate_series(1, 3) n;
         INSERT INTO host_metrics_rollups (series_id, starts_at, seconds, due, valid, failed, missed, outcomes, histogram)
         SELECT n, date_bin('1 hour', now(), timestamptz '2000-01-01 00:00:00+00') - interval '1 hour' * h, 3600, 60, 57, 2, 1,
             '{\"bad_status\": 2}', 57e160
         FROM generate_series(1, 3) n, generate_series(0, 200) h;
         INSERT INTO host_metrics_incidents (address, number, started_at, ended_at, checks, first_outcome, most_frequent_outcome, last_outcome, outcomes, places, last_error)
         SELECT 'https://a.example/', n, now() - interval '1 day' * n, now() - interval '1 day' * n + interval '7 minutes', 7,
             'bad_status', 'bad_status', 'bad_status', '{}', '[\"place-1\", \"place-2\"]', 'status 503'
         FROM generate_series(1, 30) n",
    );
    let hosts = &database.status(&[])["hosts"];
    assert_eq!(
        (&hosts[1]["name"], &hosts[1]["group"]),
        (&json!("Shop 1"), &json!("Shops"))
    );
    let history = |host: Option<&str>, only_incidents| {
        status::history(&database.config(&[]), host, only_incidents, None)
            .map_err(|error| format!("{error:#}"))
    };
    let text = history(Some("https://a.example/"), false).unwrap();
    let has = |line: &str| assert!(text.lines().any(|shown| shown == line), "{line}:\n{text}");
    has("https://a.example/  Shop 0");
    has("up for 3 h");
    has("place-2  DOWN   10 min   5 min ago  bad_status  status 503");
    has("ok                   19152");
    has("bad_status             672");
    has("not checked            336");
    assert_eq!(
        text.matches("  7.8 ms  7.8 ms     118       4  ").count(),
        24,
        "{text}"
    );
    assert_eq!(text.matches("  7 min  Shop 0  bad_status  ").count(), 5, "{text}");
    assert!(text.contains("place-1, place-2  status 503"), "{text}");

    assert!(
        history(Some("Shop 1"), false)
            .unwrap()
            .contains("https://b.example/  Shop 1\n")
    );
    assert_eq!(history(Some("Shop 1"), true).unwrap(), "No incidents.\n");
    assert_eq!(history(None, true).unwrap().lines().count(), 21);
    assert!(
        history(Some("c"), false)
            .unwrap_err()
            .contains("no host has the address or the name")
    );
    let off = status::history(&database.config(&[("STATE", "off")]), None, true, None);
    assert!(off.unwrap_err().to_string().contains("but STATE=off"));
}

#[test]
fn watch_answers_again_until_a_signal_without_a_terminal_too() {
    let mut database = Database::with_tables();
    database.checks("a", 60, 3, &[]);
    let mut child = Command::new(env!("CARGO_BIN_EXE_host-metrics"))
        .args(["status", "--watch"])
        .env_clear()
        .env("DB_HOST", database.server.host())
        .env("DB_PORT", database.server.port().to_string())
        .env("DB_NAME", database.server.database())
        .env("DB_USER", database.server.superuser())
        .current_dir(std::env::temp_dir())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for _ in 0..2 {
        let heading = lines.find(|line| line.as_ref().unwrap().starts_with("HOST  STATE"));
        assert!(heading.is_some());
    }
    let id = child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &id])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(lines.all(|line| !line.unwrap().contains('\x1b')));
}

/// Verifies that a time is that many seconds before the answer, or a few more on a busy machine.
#[track_caller]
fn assert_age(document: &Value, time: &Value, seconds: i64) {
    let micros = |time: &Value| {
        let time: host_metrics::sample::Timestamp = time.as_str().unwrap().parse().unwrap();
        time.unix_micros()
    };
    let age = (micros(&document["pipeline"]["now"]) - micros(time)) / 1_000_000;
    assert!((seconds..seconds + 30).contains(&age), "{age} s, not {seconds} s");
}

#[expect(clippy::disallowed_methods, reason = "a test of how long an answer takes")]
fn now() -> Instant {
    Instant::now()
}
