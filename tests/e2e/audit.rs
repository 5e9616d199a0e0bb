//! `audit`: a sound table passes, and each violation that is planted is found and named.

use host_metrics::sample::epoch::Claim;
use host_metrics::sample::{Sample, Timestamp, encode};

use crate::agent::{Variables, run};
use crate::case::{Case, SOON};
use crate::database::{Database, server};
use crate::scratch::wait_for;

const START: i64 = 1_795_000_000;
const TICKS: i64 = 100;
const HOSTS: [&str; 2] = ["https://a.example/", "https://b.example/"];

fn record(address: &str, agent: &str, tick: i64) -> Vec<u8> {
    let sample = Sample {
        address: address.into(),
        agent: Some(agent.into()),
        is_valid: true,
        outcome: Some("ok".into()),
        scheduled_at: Timestamp::from_unix_micros((START + 30 * tick) * 1_000_000 + 123_456),
        interval_seconds: Some(30.0),
        ..Sample::default()
    };
    let mut value = Vec::new();
    encode(&sample, &mut value);
    value
}

/// Two hosts, checked from two places; with a bad record and a claim among their records.
fn stored(name: &'static str) -> Case {
    let mut case = Case::new(name, 2);
    for (partition, address) in (0..).zip(HOSTS) {
        let ticks = (0..TICKS).flat_map(|tick| [record(address, "eu", tick), record(address, "us", tick)]);
        let mut values: Vec<Vec<u8>> = ticks.collect();
        values.insert(20, b"no record".to_vec());
        values.insert(70, Claim::new("eu", "eu", 1).encode());
        case.kafka.write(
            name,
            values.into_iter().map(|value| (partition, None, Some(value))),
        );
    }
    let consumer = case.consume();
    let all = (2 * (2 * TICKS + 2)).to_string();
    let next = "SELECT coalesce(sum(next_offset), 0)::text FROM host_metrics_offsets";
    consumer.wait_for_stderr("flush", SOON);
    wait_for(
        SOON,
        "everything is stored",
        || (case.db.one(next) == all).then_some(()),
        || consumer.stderr(),
    );
    consumer.stop();
    case.db
        .execute("CREATE TABLE saved AS SELECT * FROM host_metrics");
    case
}

/// Runs `audit` after this change, which is undone afterwards.
fn audit(case: &mut Case, variables: &Variables, change: &str) -> (i32, String) {
    case.db.execute(change);
    let said = run(&["audit"], variables);
    case.db
        .execute("TRUNCATE host_metrics; INSERT INTO host_metrics SELECT * FROM saved");
    said
}

fn assert_says(said: &(i32, String), status: i32, texts: &[&str]) {
    for text in texts {
        assert!(said.1.contains(text), "{text:?} is not in:\n{}", said.1);
    }
    assert_eq!(said.0, status, "{}", said.1);
}

#[test]
fn each_violation_is_found_and_a_sound_table_passes() {
    let mut case = stored("audit");
    let variables = case.variables().with("LOG_LEVEL", "WARN");
    let whole = audit(&mut case, &variables, "");
    let summary = "2 partitions, 400 rows, 2 rejected, 2 claims of producers";
    let holds = "Passed: every record is stored once, and every tick has one row.";
    let pairs = "4 pairs of host and place, 400 ticks";
    assert_says(&whole, 0, &[summary, pairs, holds]);

    let row =
        "address = 'https://a.example/' AND agent = 'eu' AND scheduled_at = '2026-11-18 11:21:40.123456+00'";
    assert_eq!(
        case.db
            .one(&format!("SELECT count(*)::text FROM host_metrics WHERE {row}")),
        "1"
    );
    let lost = audit(
        &mut case,
        &variables,
        &format!("DELETE FROM host_metrics WHERE {row}"),
    );
    let no_row = "https://a.example/ at eu has no row for the tick 2026-11-18T11:21:40.123456Z";
    let offset = "audit/0: offset 61 is in Kafka, but neither in the table nor rejected";
    assert_says(
        &lost,
        1,
        &[
            "FAILED",
            "records not stored: 1\n",
            offset,
            "ticks without a row: 1\n",
            no_row,
        ],
    );

    let twice = format!("INSERT INTO host_metrics SELECT * FROM saved WHERE {row}");
    let doubled = audit(&mut case, &variables, &twice);
    let twice = "https://a.example/ at eu has 2 rows for the tick 2026-11-18T11:21:40.123456Z";
    assert_says(
        &doubled,
        1,
        &[
            "audit/0: offset 61 is stored 2 times\n",
            "rows that repeat a tick: 1\n",
            twice,
        ],
    );

    // A record that is stored under the offset of another one.
    let moved = audit(
        &mut case,
        &variables,
        &format!("UPDATE host_metrics SET kafka_offset = kafka_offset + 2 WHERE {row}"),
    );
    assert_says(
        &moved,
        1,
        &[
            offset,
            "audit/0: offset 63 is stored 2 times, with different records",
        ],
    );

    // The first and the last record of a partition, which no neighbour points to.
    let ends = "DELETE FROM host_metrics WHERE kafka_partition = 1 AND kafka_offset IN (0, 201)";
    let ends = audit(&mut case, &variables, ends);
    assert_says(
        &ends,
        1,
        &[
            "records not stored: 2\n",
            "audit/1: offset 0 is",
            "audit/1: offset 201 is",
        ],
    );

    let silence = "DELETE FROM host_metrics WHERE agent = 'us' AND scheduled_at BETWEEN \
                   '2026-11-18 11:30:00+00' AND '2026-11-18 11:35:00+00'";
    let silence = audit(&mut case, &variables, silence);
    assert_says(
        &silence,
        1,
        &[
            "ticks without a row: 20\n",
            "us: no host has a row between",
            "20 ticks of 2 hosts",
        ],
    );

    let end = "DELETE FROM host_metrics WHERE address = 'https://a.example/' AND agent = 'us' AND kafka_offset >= 150";
    let ended = audit(&mut case, &variables, end);
    assert_says(
        &ended,
        1,
        &[
            "ten intervals and a minute (no violation): 1. Either they left",
            "has not stored their rows yet.\n  https://a.example/ at us, last row at 2026-11-18T",
        ],
    );

    case.db
        .execute("UPDATE host_metrics_offsets SET next_offset = next_offset - 1 WHERE \"partition\" = 1");
    let beyond = audit(&mut case, &variables, "");
    assert_says(
        &beyond,
        1,
        &["audit/1: offset 201 is stored, but the position is before it"],
    );
    case.db
        .execute("UPDATE host_metrics_offsets SET next_offset = next_offset + 1 WHERE \"partition\" = 1");

    case.db
        .execute("DELETE FROM host_metrics_rejected WHERE kafka_partition = 1");
    let not_rejected = audit(&mut case, &variables, "");
    assert_says(
        &not_rejected,
        1,
        &["1 rejected", "audit/1: offset 20 is in Kafka"],
    );

    // What `skip` has passed over is accounted for.
    case.db.execute(
        "INSERT INTO host_metrics_rejected (group_id, kafka_topic, kafka_partition, kafka_offset, reason) VALUES \
         ('audit', 'audit', 1, 20, 'offsets 20 to 22 were not read, because `host-metrics skip` skipped the batch')",
    );
    let skipped = "DELETE FROM host_metrics WHERE kafka_partition = 1 AND kafka_offset IN (21, 22)";
    let skipped = audit(&mut case, &variables, skipped);
    assert_says(&skipped, 1, &["2 skipped", "FAILED:\nticks without a row: 2\n"]);

    let other = audit(&mut case, &variables.clone().with("KAFKA_GROUP_ID", "other"), "");
    assert_says(
        &other,
        1,
        &["no position of group other: it has those of audit; set KAFKA_GROUP_ID"],
    );
}

#[test]
fn offsets_of_which_kafka_tells_nothing_are_reported_and_are_no_violation() {
    let mut case = stored("audit-alone");
    let variables = case.variables().with("LOG_LEVEL", "OFF");
    for (servers, reason) in [
        ("", "KAFKA_BOOTSTRAP_SERVERS is not set"),
        ("127.0.0.1:1", "topic audit-alone: "),
    ] {
        let alone = variables.clone().with("KAFKA_BOOTSTRAP_SERVERS", servers);
        // The two claims.
        let said = audit(&mut case, &alone, "");
        let unknown = "It is not known whether 2 offsets without a row had a record: ";
        assert_says(
            &said,
            0,
            &["2 not known", unknown, reason, "Passed, as far as is known: "],
        );
    }
    case.kafka.delete_records(case.name, 0, 100);
    let said = audit(
        &mut case,
        &variables,
        "DELETE FROM host_metrics WHERE kafka_offset = 80",
    );
    let older = "It is not known whether 2 offsets without a row had a record: older than what Kafka keeps.";
    assert_says(
        &said,
        1,
        &[
            "1 claim of producers",
            older,
            "offset 80 is in Kafka",
            "ticks without a row: 2\n",
        ],
    );

    // Of rows that DB_RETENTION removed Kafka may still have the records. They are days old here.
    let retention = variables.clone().with("DB_RETENTION", "1d");
    let said = audit(
        &mut case,
        &retention,
        "DELETE FROM host_metrics WHERE kafka_offset < 150 OR kafka_partition = 0",
    );
    let expired = said.1.contains("removed by DB_RETENTION");
    assert!(expired, "{}", said.1);
    assert_says(&said, 0, &["Passed, as far as is known"]);
}

#[test]
fn ticks_are_audited_for_each_grid_of_each_place() {
    let mut db = Database::new();
    let variables = Variables::new()
        .database(server())
        .with("DB_NAME", &db.name)
        .with("LOG_LEVEL", "OFF");
    let (_, script) = run(
        &["init", "--print-sql"],
        &Variables::new().with("LOG_LEVEL", "OFF"),
    );
    db.execute(&script);
    db.execute("INSERT INTO host_metrics_offsets VALUES ('host-metrics', 't', 0, 0)");
    // (address, place, seconds between ticks, first tick, ticks); all begin somewhere on their grid.
    let insert = |address: &str, agent: &str, seconds: &str, first: &str, count: i32| {
        format!(
            "INSERT INTO host_metrics (address, agent, is_valid, scheduled_at, interval_seconds) \
             SELECT '{address}', {agent}, true, timestamptz '2026-11-20 {first}+00' + n * interval '{seconds} s', {seconds} \
             FROM generate_series(0, {count} - 1) n;"
        )
    };
    // The interval of `a` changes, and changes back.
    db.execute(&insert("a", "'eu'", "60", "10:00:17.5", 30));
    db.execute(&insert("a", "'eu'", "1.5", "10:29:40.000001", 4_000));
    db.execute(&insert("a", "'eu'", "60", "12:09:51", 100));
    // Another place, on the same grid at other times.
    db.execute(&insert("a", "'us'", "60", "11:00:17.5", 300));
    // Without a place; a first check that is not on the grid.
    db.execute(&insert("b", "NULL", "300", "10:00:00", 100));
    db.execute(&insert("b", "NULL", "300", "09:58:03.25", 1));
    // The original's.
    db.execute(
        "INSERT INTO host_metrics (address, is_valid, scheduled_at) \
         SELECT 'c', true, timestamptz '2026-11-20 10:00:00+00' + random() * interval '1 hour' FROM generate_series(1, 7)",
    );
    let said = run(&["audit"], &variables);
    let texts = [
        "3 pairs of host and place, 4531 ticks, including 1 single check after a start",
        "not audited by tick: 7.\n",
        "Rows without a Kafka offset",
        "Passed",
    ];
    assert_says(&said, 0, &texts);

    db.execute("DELETE FROM host_metrics WHERE address = 'b' AND scheduled_at = '2026-11-20 10:15:00+00'");
    db.execute(
        "DELETE FROM host_metrics WHERE agent = 'eu' AND scheduled_at = '2026-11-20 11:59:59.500001+00'",
    );
    db.execute("DELETE FROM host_metrics WHERE agent = 'eu' AND scheduled_at BETWEEN '2026-11-20 12:09:00+00' AND '2026-11-20 12:11:00+00'");
    db.execute(&insert("a", "'us'", "60", "11:05:17.5", 2));
    let said = run(&["audit"], &variables);
    let texts = [
        "b has no row for the tick 2026-11-20T10:15:00.000000Z",
        "a at eu has no row for",
        "rows that repeat a tick: 2\n",
        "a at us has 2 rows for the tick 2026-11-20T11:05:17.500000Z",
    ];
    assert_says(&said, 1, &texts);
    assert!(!said.1.contains("not known"), "{}", said.1);
}

#[test]
fn a_table_without_offsets_and_ticks_cannot_be_audited_and_one_with_offsets_alone_can() {
    let mut db = Database::new();
    let variables = Variables::new()
        .database(server())
        .with("DB_NAME", &db.name)
        .with("LOG_LEVEL", "OFF");
    db.execute("CREATE TABLE host_metrics (address text, latency float8, status_code int, is_valid boolean)");
    let said = run(&["audit"], &variables);
    assert_says(
        &said,
        1,
        &[
            "nothing can be audited",
            "no column kafka_topic, kafka_partition, kafka_offset",
        ],
    );
    db.execute("ALTER TABLE host_metrics ADD kafka_topic text, ADD kafka_partition smallint, ADD kafka_offset numeric");
    let (_, script) = run(
        &["init", "--print-sql"],
        &Variables::new().with("LOG_LEVEL", "OFF"),
    );
    let rest = script.replace("PARTITION BY RANGE (scheduled_at)", "");
    let offsets = rest
        .split(";\n")
        .filter(|sql| sql.contains("_offsets\" (") || sql.contains("_rejected\" ("));
    db.execute(&offsets.collect::<Vec<_>>().join(";\n"));
    db.execute("INSERT INTO host_metrics_offsets VALUES ('host-metrics', 't', 3, 1000, '{}', 0)");
    db.execute(
        "INSERT INTO host_metrics SELECT 'x', 0.1, 200, true, 't', 3, n FROM generate_series(0, 999) n",
    );
    let said = run(&["audit"], &variables);
    assert_says(
        &said,
        0,
        &[
            "1 partition, 1000 rows",
            "not audited",
            "Passed: every record is stored once.",
        ],
    );
    let said = run(&["audit"], &variables.with("DB_TABLE", "nothing"));
    assert_says(&said, 1, &["does not exist: run `host-metrics init`"]);
}
