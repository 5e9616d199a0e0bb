//! Outages: Postgres and Kafka are down, frozen, silent, full or read-only. Each is waited out and logged in one line, and
//! every record is stored exactly once.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::sync::atomic::Ordering;
use std::time::Duration;

use host_metrics::commands::demo::postgres::{Settings, ThrowAwayPostgres, free_port};
use host_metrics::sample::{self, Timestamp};
use host_metrics::shutdown::Shutdown;
use postgres::Client;

use crate::agent::{Agent, STOP_WITHIN, Variables};
use crate::case::{Case, InProcess, SOON, wait_for_count, write};
use crate::database::{Database, WAITS_FOR_ADVISORY_LOCK, config, server};
use crate::faults::{Proxy, Thaw, signal};
use crate::kafka::{Kafka, Listener};
use crate::scratch::{self, now, wait_for};
use crate::table;

/// How long a request to Postgres may take before it is given up, with some time to notice.
const GIVEN_UP_WITHIN: Duration = Duration::from_secs(25);

/// Temporary errors that Postgres reports.
const PASSING: [&str; 6] = ["53100", "53200", "40001", "40P01", "58030", "XX000"];

#[test]
fn temporary_errors_are_waited_out_logged_in_one_line_and_cost_no_record() {
    let mut case = Case::new("passing", 2);
    let user = format!("limited_{}", case.db.name);
    case.db.execute(&format!(
        "CREATE ROLE {user} LOGIN; GRANT ALL ON SCHEMA public TO {user}"
    ));
    let consumer = Agent::start(&["consume"], &case.variables().with("DB_USER", &user));
    case.write(0, 0..10);
    let mut rows = 10;
    case.wait_for_rows(rows, &[&consumer]);
    case.db.execute(&format!(
        "CREATE TABLE fault (code text); GRANT SELECT ON fault TO {user};
         CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
         DECLARE fault text := (SELECT code FROM fault);
         BEGIN
             IF fault IS NOT NULL THEN RAISE EXCEPTION 'injected' USING ERRCODE = fault; END IF;
             RETURN NULL;
         END $$;
         CREATE TRIGGER fail AFTER INSERT ON host_metrics FOR EACH STATEMENT EXECUTE FUNCTION fail()"
    ));
    let database = case.db.name.clone();
    let mut faults: Vec<(&str, String, String)> = PASSING
        .iter()
        .map(|&code| {
            (
                code,
                format!("INSERT INTO fault VALUES ('{code}')"),
                "DELETE FROM fault".to_owned(),
            )
        })
        .collect();
    faults.push((
        "25006",
        format!("ALTER DATABASE {database} SET default_transaction_read_only = on"),
        format!(
            "SET default_transaction_read_only = off; \
             ALTER DATABASE {database} RESET default_transaction_read_only"
        ),
    ));
    faults.push((
        "53300",
        format!("ALTER ROLE {user} CONNECTION LIMIT 0"),
        format!("ALTER ROLE {user} CONNECTION LIMIT -1"),
    ));
    for (code, begin, end) in &faults {
        case.db.execute(begin);
        if !PASSING.contains(code) {
            // Both apply to new connections only, so the old ones are ended (57P01).
            case.end_backends();
        }
        case.write(0, rows..rows + 5);
        case.write(1, rows + 5..rows + 10);
        consumer.wait_for_stderr(&format!("(SQLSTATE {code})"), SOON);
        case.db.execute(end);
        rows += 10;
        case.wait_for_rows(rows, &[&consumer]);
    }
    assert!(consumer.said("(SQLSTATE 57P01)") > 0, "{}", consumer.stderr());
    // None of them lasted. An outage that lasts is logged once, and so is its end.
    let waiting = "[WARN] waiting for Postgres: ";
    let before = consumer.said(waiting);
    case.db.execute("INSERT INTO fault VALUES ('53100')");
    case.write(0, rows..rows + 10);
    wait_for(
        SOON,
        "the wait is said",
        || (consumer.said(waiting) > before).then_some(()),
        || consumer.stderr(),
    );
    case.db.execute("DELETE FROM fault");
    rows += 10;
    case.wait_for_rows(rows, &[&consumer]);
    consumer.wait_for_stderr("Postgres is back after", SOON);
    assert_eq!(consumer.said(waiting), before + 1, "{}", consumer.stderr());
    assert_eq!(
        consumer.said("injected (SQLSTATE 53100) (for "),
        1,
        "{}",
        consumer.stderr()
    );
    consumer.stop();
    case.assert_exactly_once(&["passing"]);
    assert_eq!(case.db.count("host_metrics_rejected"), 0, "no row was at fault");
}

#[test]
fn a_group_does_not_evict_a_consumer_whose_database_is_away_for_longer_than_a_poll_may_take() {
    const MAX_POLL_INTERVAL: Duration = Duration::from_secs(6);
    let kafka = Kafka::shared();
    kafka.create_topic("evicted", 2);
    let server = ThrowAwayPostgres::start().unwrap();
    let mut settings = config(&server, server.database(), "host_metrics");
    settings.kafka.bootstrap_servers = kafka.bootstrap_servers();
    settings.topics = vec!["evicted".into()];
    settings.group_id = "evicted".into();
    settings.batch_size = 10;
    settings.batch_wait = Duration::from_millis(100);
    let milliseconds = MAX_POLL_INTERVAL.as_millis().to_string();
    let consumer = InProcess::start(
        settings,
        &[
            ("max.poll.interval.ms", &milliseconds),
            ("session.timeout.ms", "6000"),
            ("heartbeat.interval.ms", "500"),
        ],
    );
    let counters = &consumer.counters;
    let wait_for_rows = |rows: u64| {
        wait_for(
            SOON,
            "rows are stored",
            || (counters.rows.get() >= rows).then_some(()),
            || format!("{counters:?}"),
        );
    };
    write(kafka, "evicted", 0, 0..20);
    wait_for_rows(20);
    let members = kafka.members("evicted");
    assert_eq!(members.len(), 1);
    server.stop().unwrap();
    // Far more records than the two batches hold.
    write(kafka, "evicted", 1, 20..1_000);
    let outage_ends = now() + 2 * MAX_POLL_INTERVAL;
    let pause = Shutdown::new();
    while now() < outage_ends {
        assert_eq!(kafka.members("evicted"), members, "evicted");
        pause.wait_until(now() + Duration::from_millis(500));
    }
    assert!(counters.failures.get() > 0);
    server.start_again().unwrap();
    wait_for_rows(1_000);
    assert_eq!(kafka.members("evicted"), members);
    assert_eq!(
        (
            counters.rows.get(),
            counters.rejected.get(),
            counters.fences.get()
        ),
        (1_000, 0, 0)
    );
    consumer.stop();
    let mut client = table::connect(&server);
    let records = kafka.records("evicted");
    assert_eq!(table::stored(&mut client), 1_000);
    table::assert_positions(&mut client, kafka, "evicted", "evicted", &records);
}

#[test]
fn memory_is_bounded_while_postgres_is_away_and_a_stop_reports_unwritten_records() {
    const BACKLOG: i64 = 120_000;
    const ALLOWANCE_BYTES: u64 = 24 << 20;
    let kafka = Kafka::shared();
    let case = Case::new("memory", 2);
    let server = ThrowAwayPostgres::start().unwrap();
    let variables = case.variables().database(&server).with("LOG_LEVEL", "INFO");
    let consumer = Agent::start(&["consume"], &variables);
    case.write(0, 0..10);
    let mut client = table::connect(&server);
    table::wait_for_stored(&mut client, 10, SOON, &consumer);
    server.stop().unwrap();
    let before = consumer.resident_bytes();
    // More than 30 MB, of which 8 MB may be prefetched, and 200 records may be in the batches.
    let padding = "x".repeat(200);
    for partition in [0, 1] {
        let record = |number: i64| {
            let value = format!(r#"{{"address":"http://h/{number}","is_valid":true,"padding":"{padding}"}}"#);
            (partition, None, Some(value.into_bytes()))
        };
        kafka.write(case.name, (0..BACKLOG / 2).map(record));
    }
    consumer.wait_for_stderr("200 records not written yet", SOON);
    let pause = Shutdown::new();
    let watched_until = now() + Duration::from_secs(5);
    while now() < watched_until {
        let resident = consumer.resident_bytes();
        assert!(
            resident < before + ALLOWANCE_BYTES,
            "{resident} bytes, {before} before the outage"
        );
        pause.wait_until(now() + Duration::from_millis(100));
    }
    consumer.signal("TERM");
    let mut consumer = consumer;
    let status = consumer.wait(STOP_WITHIN);
    assert_eq!(status.code(), Some(0), "{}", consumer.stderr());
    assert_eq!(
        consumer.said("200 records read but not written"),
        1,
        "{}",
        consumer.stderr()
    );
    server.start_again().unwrap();
    let again = Agent::start(&["consume"], &variables.with("DB_BATCH_SIZE", 10_000));
    let mut client = table::connect(&server);
    table::wait_for_stored(&mut client, 10 + BACKLOG as usize, SOON, &again);
    again.stop();
}

/// Our backends and the postmaster, frozen until dropped.
fn freeze(server: &ThrowAwayPostgres, client: &mut Client) -> Vec<Thaw> {
    let postmaster = fs::read_to_string(server.data_dir().join("postmaster.pid")).unwrap();
    let mut pids = vec![postmaster.lines().next().unwrap().trim().to_owned()];
    let ours = "SELECT pid::text FROM pg_stat_activity WHERE application_name = 'host-metrics'";
    pids.extend(
        client
            .query(ours, &[])
            .unwrap()
            .iter()
            .map(|row| row.get::<_, String>(0)),
    );
    let freeze = |pid: String| {
        signal(&pid, "STOP");
        Thaw(pid)
    };
    pids.into_iter().map(freeze).collect()
}

#[test]
fn a_frozen_postgres_is_given_up_and_neither_holds_up_a_stop_nor_doubles_a_row() {
    let case = Case::new("frozen", 2);
    let server = ThrowAwayPostgres::start().unwrap();
    let variables = case.variables().database(&server);
    let second = variables
        .clone()
        .with("KAFKA_GROUP_ID", "frozen-2")
        .with("DB_TABLE", "second");
    let consumer = Agent::start(&["consume"], &variables);
    let mut leaving = Agent::start(&["consume"], &second);
    case.write(0, 0..10);
    let mut client = table::connect(&server);
    for name in ["host_metrics", "second"] {
        wait_for(
            SOON,
            "the first rows",
            || {
                let there = format!("SELECT count(*) FROM pg_class WHERE relname = '{name}'");
                (table::count(&mut client, &there) == 1).then_some(())?;
                (table::count(&mut client, &format!("SELECT count(*) FROM {name}")) == 10).then_some(())
            },
            || consumer.stderr() + &leaving.stderr(),
        );
    }
    let frozen = freeze(&server, &mut client);
    case.write(1, 10..20);
    for agent in [&consumer, &leaving] {
        agent.wait_for_stderr("no answer within 15", GIVEN_UP_WITHIN);
    }
    // Now it tries to connect, which fails too.
    leaving.signal("TERM");
    let status = leaving.wait(STOP_WITHIN);
    assert_eq!(status.code(), Some(0), "{}", leaving.stderr());
    assert_eq!(
        leaving.said("10 records read but not written"),
        1,
        "{}",
        leaving.stderr()
    );
    consumer.wait_for_stderr("[WARN] waiting for Postgres: ", SOON);
    drop(frozen);
    let again = Agent::start(&["consume"], &second);
    for (name, agent) in [("host_metrics", &consumer), ("second", &again)] {
        let rows = format!("SELECT count(*) FROM {name}");
        wait_for(
            SOON,
            "all rows",
            || (table::count(&mut client, &rows) >= 20).then_some(()),
            || agent.stderr(),
        );
        assert_eq!(table::count(&mut client, &rows), 20, "{name}");
    }
    consumer.stop();
    again.stop();
}

#[test]
fn a_commit_that_was_applied_but_never_answered_is_not_repeated() {
    let mut case = Case::new("unanswered", 1);
    let proxy = Proxy::start(server().port());
    let consumer = Agent::start(&["consume"], &case.variables().with("DB_PORT", proxy.port));
    case.write(0, 0..10);
    case.wait_for_rows(10, &[&consumer]);
    // Only the last answer is lost: the beginning of the flush is answered, and then the flush waits for a lock.
    case.db.execute(
        "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS \
         'BEGIN PERFORM pg_advisory_xact_lock(42); RETURN NULL; END'; \
         CREATE TRIGGER hold AFTER INSERT ON host_metrics FOR EACH STATEMENT EXECUTE FUNCTION hold(); \
         SELECT pg_advisory_lock(42)",
    );
    case.write(0, 10..20);
    let db = &mut case.db;
    wait_for(
        SOON,
        "the flush waits",
        || (db.count(WAITS_FOR_ADVISORY_LOCK) == 1).then_some(()),
        || consumer.stderr(),
    );
    proxy.is_deaf.store(true, Ordering::SeqCst);
    case.db.execute("SELECT pg_advisory_unlock(42)");
    case.wait_for_rows(20, &[&consumer]);
    consumer.wait_for_stderr("no answer within 15", GIVEN_UP_WITHIN);
    proxy.is_deaf.store(false, Ordering::SeqCst);
    case.write(0, 20..30);
    case.wait_for_rows(30, &[&consumer]);
    consumer.stop();
    case.assert_exactly_once(&["unanswered"]);
}

/// Not with librdkafka's in-process broker, which ignores sequence numbers, so that a retry would store records twice.
#[test]
fn lost_acknowledgements_neither_double_nor_reorder_records() {
    let mut deaf = DeafProducer::start();
    for _ in 0..3 {
        deaf.lose_acknowledgements(|_| ());
    }
    deaf.assert_each_tick_is_there_once();
}

/// A restarted broker knows at most the last request of a producer, and refuses earlier ones.
#[test]
fn records_that_kafka_stored_before_a_restart_are_found_and_not_sent_again() {
    /// Not every time does a partition have more than one unanswered request.
    const MAX_ROUNDS: usize = 10;
    let mut deaf = DeafProducer::start();
    let is_refused = (0..MAX_ROUNDS).any(|_| {
        deaf.lose_acknowledgements(Kafka::restart_cleanly);
        deaf.producer.said("the producer failed and is replaced") > 0
    });
    assert!(is_refused, "{}", deaf.producer.stderr());
    assert_eq!(deaf.producer.said(" 0 were stored already"), 0);
    deaf.assert_each_tick_is_there_once();
}

/// `produce` with a Kafka behind a proxy.
struct DeafProducer {
    kafka: Kafka,
    proxy: Proxy,
    producer: Agent,
}

impl DeafProducer {
    const TOPIC: &str = "ticks";
    const HOSTS: usize = 200;
    /// Long enough for the largest number of unanswered requests.
    const DEAF_FOR: Duration = Duration::from_secs(2);

    fn start() -> Self {
        let port = free_port().unwrap();
        let proxy = Proxy::start(port);
        let proxied = Listener {
            name: "PROXIED",
            protocol: "PLAINTEXT",
            port,
            advertised_port: proxy.port,
            settings: Vec::new(),
        };
        let kafka = Kafka::start_with(&[proxied], &[]);
        kafka.create_topic(Self::TOPIC, 3);
        let host_file = scratch::directory("hosts").join("producer_config");
        // No server listens there, so each check ends immediately.
        let hosts: String = (0..Self::HOSTS)
            .map(|host| format!("http://127.0.0.1:1/{host} 1s\n"))
            .collect();
        fs::write(&host_file, hosts).unwrap();
        let variables = Variables::new()
            .kafka(&format!("127.0.0.1:{}", proxy.port), Self::TOPIC)
            .with("LOG_LEVEL", "INFO");
        let producer = Agent::start(&["produce", "-c", host_file.to_str().unwrap()], &variables);
        let mut deaf = Self {
            kafka,
            proxy,
            producer,
        };
        deaf.wait_for_more_records();
        deaf
    }

    /// Kafka stores what it gets, but its answers are lost. Then all connections end, and `happens` is called.
    fn lose_acknowledgements(&mut self, happens: impl FnOnce(&mut Kafka)) {
        self.proxy.is_deaf.store(true, Ordering::SeqCst);
        let since = now();
        wait_for(
            SOON,
            "Kafka stores what it cannot acknowledge",
            || (since.elapsed() >= Self::DEAF_FOR).then_some(()),
            || self.producer.stderr(),
        );
        self.proxy.cut();
        happens(&mut self.kafka);
        self.proxy.is_deaf.store(false, Ordering::SeqCst);
        self.wait_for_more_records();
    }

    fn wait_for_more_records(&mut self) {
        let (kafka, producer) = (&self.kafka, &self.producer);
        let enough = kafka.records(Self::TOPIC).len() + 2 * Self::HOSTS;
        wait_for(
            SOON,
            &format!("{enough} records"),
            || (kafka.records(Self::TOPIC).len() >= enough).then_some(()),
            || producer.stderr(),
        );
    }

    fn assert_each_tick_is_there_once(self) {
        let said = self.producer.stderr();
        self.producer.stop();
        let mut last: BTreeMap<String, Timestamp> = BTreeMap::new();
        for record in self.kafka.records(Self::TOPIC) {
            let value = record.value.unwrap();
            let sample = sample::decode(&value).unwrap();
            let tick = sample.scheduled_at.unwrap();
            if let Some(before) = last.insert(sample.address.clone().into_owned(), tick) {
                let step = tick.unix_micros() - before.unix_micros();
                assert_eq!(step, 1_000_000, "{} after {before}\n{said}", sample.address);
            }
        }
        assert_eq!(last.len(), Self::HOSTS);
    }
}

#[test]
fn a_frozen_or_killed_kafka_is_waited_out_and_a_stop_meanwhile_is_clean() {
    let mut kafka = Kafka::start();
    kafka.create_topic("broker", 2);
    let mut db = Database::new();
    let variables = Variables::new()
        .kafka(&kafka.bootstrap_servers(), "broker")
        .with("KAFKA_GROUP_ID", "broker")
        .database(server())
        .with("DB_NAME", &db.name)
        .with("DB_BATCH_SECONDS", "0.1");
    let consumer = Agent::start(&["consume"], &variables);
    write(&kafka, "broker", 0, 0..10);
    wait_for_count(&mut db, "host_metrics", 10, &[&consumer]);

    kafka.signal("STOP");
    let silent = format!(
        "[WARN] waiting for Kafka: {} does not answer",
        kafka.bootstrap_servers()
    );
    // The session takes 15 s, a request 20 s, a new connection 10 s.
    consumer.wait_for_stderr(&silent, Duration::from_secs(60));
    consumer.stop();
    kafka.kill();
    let consumer = Agent::start(&["consume"], &variables);
    consumer.wait_for_stderr("[WARN] waiting for Kafka: ", SOON);
    kafka.start_again();
    write(&kafka, "broker", 1, 10..20);
    wait_for_count(&mut db, "host_metrics", 20, &[&consumer]);
    consumer.wait_for_stderr("Kafka is back after", SOON);
    assert!(consumer.said("[WARN]") < 4, "a flood:\n{}", consumer.stderr());
    consumer.stop();
    let stored = db.many(
        "SELECT concat(kafka_partition, '/', kafka_offset) FROM host_metrics ORDER BY kafka_partition, kafka_offset",
    );
    let sent: Vec<String> = kafka
        .records("broker")
        .iter()
        .map(|record| format!("{}/{}", record.partition, record.offset))
        .collect();
    assert_eq!(stored, sent);
}

#[test]
fn what_a_crash_of_postgres_undoes_is_read_again_without_a_new_record() {
    let settings = Settings {
        // Without a commit that waits, the server writes to its disk only after 30 s.
        configuration: vec![("wal_writer_delay".into(), "10s".into())],
        ..Settings::default()
    };
    let server = ThrowAwayPostgres::start_with(&settings).unwrap();
    let kafka = Kafka::shared();
    kafka.create_topic("undone", 2);
    let variables = Variables::new()
        .kafka(&kafka.bootstrap_servers(), "undone")
        .with("KAFKA_GROUP_ID", "undone")
        .database(&server)
        .with("DB_BATCH_SECONDS", "0.1")
        .with("DB_SYNCHRONOUS_COMMIT", "off");
    let consumer = Agent::start(&["consume"], &variables);
    let mut written = 0;
    for crash in [Crash::OfTheServer, Crash::OfTheMachine] {
        let mut undone = 0;
        // A commit that waits can come between the rows and the crash.
        while undone == 0 {
            assert!(written < 800, "no crash has undone a commit");
            write(kafka, "undone", written as i32 / 20 % 2, written..written + 20);
            written += 20;
            table::wait_for_stored(&mut table::connect(&server), written as usize, SOON, &consumer);
            crash.happen(&server, &consumer);
            let mut client = table::connect(&server);
            undone = written - table::stored(&mut client);
            consumer.signal("CONT");
            table::wait_for_stored(&mut client, written as usize, SOON, &consumer);
        }
    }
    consumer.stop();
    let records = kafka.records("undone");
    let mut client = table::connect(&server);
    let different = "SELECT count(DISTINCT (kafka_partition, kafka_offset)) FROM host_metrics";
    assert_eq!(table::count(&mut client, different), written);
    table::assert_positions(&mut client, kafka, "undone", "undone", &records);
}

#[derive(Clone, Copy)]
enum Crash {
    /// Loses what the server has not passed on to the operating system.
    OfTheServer,
    /// Also loses the log that the operating system has not written to the disk.
    OfTheMachine,
}

impl Crash {
    /// Afterwards the server runs again, and the consumer is frozen, so it has not yet reacted.
    fn happen(self, server: &ThrowAwayPostgres, consumer: &Agent) {
        consumer.signal("STOP");
        let on_disk =
            "SELECT f.file_name, f.file_offset FROM pg_walfile_name_offset(pg_current_wal_flush_lsn()) f";
        let row = table::connect(server).query_one(on_disk, &[]).unwrap();
        let (segment, offset): (String, i32) = (row.get(0), row.get(1));
        server.stop_immediately().unwrap();
        if matches!(self, Self::OfTheMachine) {
            for entry in fs::read_dir(server.data_dir().join("pg_wal")).unwrap() {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_str().unwrap();
                if name.len() != segment.len() || *name < *segment {
                    continue;
                }
                let file = File::options().write(true).open(&path).unwrap();
                let size = file.metadata().unwrap().len();
                let from = if name == segment { offset as u64 } else { 0 };
                file.set_len(from).unwrap();
                // The rest reads as zeros.
                file.set_len(size).unwrap();
            }
        }
        server.start_again().unwrap();
    }
}
