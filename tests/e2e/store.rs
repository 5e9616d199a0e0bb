//! The store, `init` and `drop` against a real Postgres: what is durable, what is refused, what is waited out.
//!
//! Most tests take a database of their own on one shared server; those that break the server start one for themselves.

use std::collections::BTreeMap;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use host_metrics::commands::demo::postgres::{Settings, ThrowAwayPostgres};
use host_metrics::commands::init;
use host_metrics::config::{ConsumeConfig, DatabaseConfig, DbSslMode, InitConfig, Secret, WrongInput};
use host_metrics::consume::batch::Flushed;
use host_metrics::consume::batch::{Batch, Form, NextOffset, Offset, Partition, Record};
use host_metrics::consume::store::{Store, StoreError};
use host_metrics::postgres::{self as bounded, Bounds, Link};
use host_metrics::sample::{Sample, Timestamp};
use host_metrics::tables::names::Object;
use host_metrics::tables::row::{Layout, Origin};
use host_metrics::tables::schema::{self, Day};
use host_metrics::tables::{days, migrate};
use postgres::{Client, NoTls};

use crate::database::{Database, config, server};
use crate::faults::{Proxy, Thaw, signal};
use crate::scratch;

// ------------------------------------------------------------------------------------------------ flushing

#[test]
fn a_flush_makes_rows_rejected_records_and_positions_durable_together() {
    let mut db = Database::new();
    let mut store = db.store();
    let layout = store.open().unwrap();
    assert_eq!(layout.not_stored(), Vec::<&str>::new());
    start_at(&mut store, &[(P0, 10), (P1, 0)]);

    let mut batch = Batch::default();
    let sample = full_sample();
    row(&mut batch, &layout, P0, 10, 12, &sample);
    reject(
        &mut batch,
        P0,
        10,
        15,
        None,
        Some(b"{\xff"),
        "not UTF-8 \0 at byte 1",
    );
    row(&mut batch, &layout, P1, 0, 0, &ok("https://b.example/"));
    reject(&mut batch, P1, 0, 1, Some(b"k"), None, "empty");
    assert_eq!(store.flush(&batch), Flushed::Durable);

    let row = db.one(
        "SELECT concat_ws('|', address, extract(epoch FROM scheduled_at), is_valid, outcome, status_code, latency, \
         error, extract(epoch FROM started_at), interval_seconds, regex_matched, dns_seconds, connect_seconds, \
         tls_seconds, ttfb_seconds, body_seconds, ip, redirects, body_bytes, extract(epoch FROM cert_expires_at), \
         agent, kafka_topic, kafka_partition, kafka_offset) FROM host_metrics WHERE kafka_partition = 0",
    );
    assert_eq!(
        row,
        "https://a.example/ä|1790000000.123456|f|bad_status|503|0.1234567890123|status 503|1790000000.234567|60|f|\
         0.01|0.02|0.03|0.04|0.05|2001:db8::1|2|4096|1799999999.000000|agent-1|t|0|12"
    );
    assert_eq!(
        db.many(
            "SELECT concat_ws('|', group_id, kafka_topic, kafka_partition, kafka_offset, coalesce(key::text, '-'), \
             coalesce(value::text, '-'), reason) FROM host_metrics_rejected ORDER BY kafka_partition"
        ),
        ["g|t|0|15|-|\\x7bff|not UTF-8 \\0 at byte 1", "g|t|1|1|\\x6b|-|empty"]
    );
    assert_eq!(positions(&mut store, &[P0, P1, P2]), [(P0, 16), (P1, 2)]);
}

#[test]
fn a_stale_position_of_one_partition_keeps_the_whole_batch_out() {
    let mut db = Database::new();
    let (mut mine, mut theirs) = (db.store(), db.store());
    let layout = mine.open().unwrap();
    theirs.open().unwrap();
    start_at(&mut mine, &[(P0, 0), (P1, 0)]);

    let mut first = Batch::default();
    row(&mut first, &layout, P1, 0, 0, &ok("https://a.example/"));
    assert_eq!(theirs.flush(&first), Flushed::Durable);
    let mut stale = Batch::default();
    row(&mut stale, &layout, P0, 0, 0, &ok("https://b.example/"));
    row(&mut stale, &layout, P1, 0, 0, &ok("https://a.example/"));
    reject(&mut stale, P1, 0, 1, None, None, "empty");
    assert_eq!(mine.flush(&stale), Flushed::Fenced);

    assert_eq!(db.count("host_metrics"), 1);
    assert_eq!(db.count("host_metrics_rejected"), 0);
    assert_eq!(positions(&mut mine, &[P0, P1]), [(P0, 0), (P1, 1)]);
    // The connection is still good.
    stale.forget(P1);
    assert_eq!(mine.flush(&stale), Flushed::Durable);
    assert_eq!(db.count("host_metrics"), 2);
}

#[test]
fn a_batch_without_rows_and_a_batch_with_holes_are_written_exactly() {
    let mut db = Database::new();
    let mut store = db.store();
    let layout = store.open().unwrap();
    start_at(&mut store, &[(P0, 0), (P1, 0)]);

    let mut only_rejected = Batch::default();
    reject(&mut only_rejected, P0, 0, 0, None, None, "empty");
    assert_eq!(store.flush(&only_rejected), Flushed::Durable);

    // Two partitions in turn, one of them revoked before the flush: every other row's bytes are left out. More bytes
    // than one chunk of the COPY holds.
    let mut holes = Batch::default();
    for offset in 0..2_000 {
        let sample = ok(&format!("https://{offset}.example/{}", "x".repeat(200)));
        row(&mut holes, &layout, P0, 1, offset + 1, &sample);
        row(&mut holes, &layout, P1, 0, offset, &sample);
    }
    holes.forget(P0);
    assert_eq!(store.flush(&holes), Flushed::Durable);
    assert_eq!(db.count("host_metrics"), 2_000);
    assert_eq!(
        db.one("SELECT concat(count(DISTINCT address), ' ', sum(kafka_offset)) FROM host_metrics WHERE kafka_partition = 1"),
        "2000 1999000"
    );

    // A position that moves over a gap at the partition's end, without any record.
    let mut moves = Batch::default();
    row(
        &mut moves,
        &layout,
        P1,
        2_000,
        2_004,
        &ok("https://gone.example/"),
    );
    moves.entries.clear();
    assert_eq!(store.flush(&moves), Flushed::Durable);
    assert_eq!(positions(&mut store, &[P0, P1]), [(P0, 1), (P1, 2_005)]);
    assert_eq!(db.count("host_metrics_rejected"), 1);
}

#[test]
fn a_position_is_added_where_there_is_none_and_never_put_back() {
    let mut db = Database::new();
    let (mut mine, mut theirs) = (db.store(), db.store());
    mine.open().unwrap();
    theirs.open().unwrap();
    assert_eq!(positions(&mut mine, &[P0, P1]), []);
    start_at(&mut mine, &[(P0, 5)]);
    start_at(&mut theirs, &[(P0, 3), (P1, 7)]);
    assert_eq!(positions(&mut mine, &[P0, P1]), [(P0, 5), (P1, 7)]);
    // Another topic and another group have positions of their own.
    assert_eq!(positions(&mut mine, &[Partition { topic: 1, number: 0 }]), []);
    let mut other = db.config();
    other.group_id = "h".into();
    let mut other = Store::new(&other).unwrap();
    other.open().unwrap();
    assert_eq!(positions(&mut other, &[P0, P1]), []);
    assert_eq!(db.count("host_metrics_offsets"), 2);
}

// ------------------------------------------------------------------------------------------------ poison

/// Postgres's name for the fault, how the table is made to have it, and which of the offsets 0..100 it refuses.
const REFUSALS: [(&str, &str, &[i64]); 12] = [
    ("23514", "ALTER TABLE m ADD CHECK (kafka_offset <> 41)", &[41]),
    (
        "23514",
        "ALTER TABLE m ADD CHECK (kafka_offset NOT IN (0, 1, 57, 99))",
        &[0, 1, 57, 99],
    ),
    ("23502", "ALTER TABLE m ALTER latency SET NOT NULL", &[7]),
    (
        "23505",
        "CREATE UNIQUE INDEX ON m ((kafka_offset % 97))",
        &[97, 98, 99],
    ),
    (
        "23505",
        "INSERT INTO m (address, is_valid, kafka_offset) VALUES ('https://seen.example/', true, 30); \
         CREATE UNIQUE INDEX ON m (kafka_offset)",
        &[30],
    ),
    (
        "P0001",
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS \
         'BEGIN IF NEW.kafka_offset IN (3, 4) THEN RAISE ''no''; END IF; RETURN NEW; END'; \
         CREATE TRIGGER t BEFORE INSERT ON m FOR EACH ROW EXECUTE FUNCTION f()",
        &[3, 4],
    ),
    (
        "HM001",
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS \
         'BEGIN IF NEW.kafka_offset = 64 THEN RAISE ''no'' USING ERRCODE = ''HM001''; END IF; RETURN NULL; END'; \
         CREATE TRIGGER t AFTER INSERT ON m FOR EACH ROW EXECUTE FUNCTION f()",
        &[64],
    ),
    (
        "23503",
        "CREATE TABLE k (n bigint PRIMARY KEY); INSERT INTO k SELECT generate_series(0, 99) EXCEPT SELECT 12; \
         ALTER TABLE m ADD FOREIGN KEY (kafka_offset) REFERENCES k",
        &[12],
    ),
    (
        "23503",
        "CREATE TABLE k (n bigint PRIMARY KEY); INSERT INTO k SELECT generate_series(0, 99) EXCEPT \
         SELECT unnest(ARRAY[0, 50, 51, 99]); \
         ALTER TABLE m ADD FOREIGN KEY (kafka_offset) REFERENCES k DEFERRABLE INITIALLY DEFERRED",
        &[0, 50, 51, 99],
    ),
    (
        "23505",
        "ALTER TABLE m ADD UNIQUE (status_code, kafka_offset) DEFERRABLE INITIALLY DEFERRED; \
         INSERT INTO m (address, is_valid, status_code, kafka_offset) VALUES ('https://seen.example/', true, 200, 77)",
        &[77],
    ),
    (
        "23514",
        "CREATE DOMAIN short AS text CHECK (length(value) < 21); ALTER TABLE m ALTER address TYPE short",
        &[10, 11, 12, 13, 14, 15, 16, 17, 18, 19],
    ),
    (
        "22001",
        "ALTER TABLE m ALTER address TYPE varchar(20)",
        &[10, 11, 12, 13, 14, 15, 16, 17, 18, 19],
    ),
];

#[test]
fn exactly_the_refused_rows_are_named_and_the_others_stored() {
    for (code, sql, refused) in REFUSALS {
        let mut db = Database::new();
        db.execute(
            "CREATE TABLE m (address text, is_valid boolean, status_code smallint, latency double precision, \
             kafka_offset bigint)",
        );
        db.execute(sql);
        let before = db.count("m");
        let mut store = db.store_of("m");
        let layout = store.open().unwrap();
        start_at(&mut store, &[(P0, 0)]);
        let mut batch = Batch::default();
        for offset in 0..100 {
            // Addresses of 20 bytes, but for ten of 21; one row without latency.
            let address = match offset {
                10..20 => format!("https://1{offset:04}.example"),
                _ => format!("https://{offset:04}.example"),
            };
            let mut sample = ok(&address);
            sample.latency = (offset != 7).then_some(0.1);
            row(&mut batch, &layout, P0, 0, offset, &sample);
        }
        let found = poisoned(store.flush(&batch));
        let offsets: Vec<i64> = found
            .iter()
            .map(|(entry, _)| batch.entries[*entry].offset.0)
            .collect();
        assert_eq!(offsets, refused, "{sql}");
        for (_, reason) in &found {
            assert!(reason.contains(&format!("SQLSTATE {code}")), "{sql}: {reason}");
        }
        assert_eq!(db.count("m"), before, "{sql}: nothing is written yet");
        assert_eq!(positions(&mut store, &[P0]), [(P0, 0)]);

        for (entry, reason) in found {
            assert!(batch.reject(entry, reason));
        }
        assert_eq!(store.flush(&batch), Flushed::Durable, "{sql}");
        assert_eq!(db.count("m"), before + 100 - refused.len() as i64, "{sql}");
        let rejected: Vec<i64> = db
            .many("SELECT kafka_offset::text FROM m_rejected ORDER BY kafka_offset")
            .iter()
            .map(|text| text.parse().unwrap())
            .collect();
        assert_eq!(rejected, refused, "{sql}");
        assert_eq!(positions(&mut store, &[P0]), [(P0, 100)]);
    }
}

#[test]
fn a_batch_of_nothing_but_refused_rows_is_drained_in_few_calls() {
    let mut db = Database::new();
    db.execute(
        "CREATE TABLE m (address text, is_valid boolean, kafka_offset bigint CHECK (kafka_offset < 0))",
    );
    let mut store = db.store_of("m");
    let layout = store.open().unwrap();
    start_at(&mut store, &[(P0, 0)]);
    let mut batch = Batch::default();
    for offset in 0..300 {
        row(&mut batch, &layout, P0, 0, offset, &ok("https://a.example/"));
    }
    let mut calls = 0;
    loop {
        calls += 1;
        match store.flush(&batch) {
            Flushed::Durable => break,
            Flushed::Poison(found) => {
                assert!(!found.is_empty());
                for (entry, reason) in found {
                    assert!(batch.reject(entry, reason));
                }
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(calls <= 4, "{calls}");
    assert_eq!((db.count("m"), db.count("m_rejected")), (0, 300));
}

#[test]
fn a_table_that_refuses_every_copy_is_the_operators_not_the_rows() {
    let mut db = Database::new();
    db.execute(
        "CREATE TABLE m (address text, is_valid boolean); \
         CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''closed for the night''; END'; \
         CREATE TRIGGER t BEFORE INSERT ON m FOR EACH STATEMENT EXECUTE FUNCTION f()",
    );
    let mut store = db.store_of("m");
    let layout = store.open().unwrap();
    start_at(&mut store, &[(P0, 0)]);
    let mut batch = Batch::default();
    row(&mut batch, &layout, P0, 0, 0, &ok("https://a.example/"));
    let text = fatal(store.flush(&batch));
    assert!(
        text.contains("\"m\" refuses every COPY: closed for the night"),
        "{text}"
    );
    assert_eq!((db.count("m"), db.count("m_rejected")), (0, 0));
}

#[test]
fn a_refusal_that_does_not_repeat_row_by_row_names_nobody() {
    let mut db = Database::new();
    // Refuses every second COPY, by a sequence, which no rollback takes back.
    db.execute(
        "CREATE TABLE m (address text, is_valid boolean); CREATE SEQUENCE s; \
         CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS \
         'BEGIN IF nextval(''s'') = 1 THEN RAISE ''not now''; END IF; RETURN NULL; END'; \
         CREATE TRIGGER t AFTER INSERT ON m FOR EACH STATEMENT EXECUTE FUNCTION f()",
    );
    let mut store = db.store_of("m");
    let layout = store.open().unwrap();
    start_at(&mut store, &[(P0, 0)]);
    let mut batch = Batch::default();
    row(&mut batch, &layout, P0, 0, 0, &ok("https://a.example/"));
    let text = retry(store.flush(&batch));
    assert!(
        text.contains("not now") && text.contains("did not happen again"),
        "{text}"
    );
    store.open().unwrap();
    assert_eq!(store.flush(&batch), Flushed::Durable);
    assert_eq!((db.count("m"), db.count("m_rejected")), (1, 0));
}

// ------------------------------------------------------------------------------------------------ faults that pass

#[test]
fn a_frozen_backend_is_abandoned_within_the_bound_and_its_transaction_is_not_doubled() {
    let mut db = Database::new();
    db.execute("CREATE TABLE m (address text, is_valid boolean)");
    // Holds the flush where its rows are written and its position is moved, but nothing is committed.
    db.execute(
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS \
         'BEGIN PERFORM pg_advisory_xact_lock(42); RETURN NULL; END'; \
         CREATE TRIGGER t AFTER INSERT ON m FOR EACH STATEMENT EXECUTE FUNCTION f()",
    );
    let bounds = Bounds {
        step: Duration::from_secs(2),
        lock: Duration::from_secs(1),
        ..Bounds::default()
    };
    let config = db.config_of("m");
    let mut store = Store::with_bounds(
        &config,
        Bounds {
            lock: Duration::from_secs(60),
            ..bounds
        },
    )
    .unwrap();
    let layout = store.open().unwrap();
    start_at(&mut store, &[(P0, 0)]);
    let mut batch = Batch::default();
    row(&mut batch, &layout, P0, 0, 0, &ok("https://a.example/"));

    db.execute("SELECT pg_advisory_lock(42)");
    let flushing = thread::spawn({
        let batch = batch.clone();
        move || {
            let began = scratch::now();
            let flushed = store.flush(&batch);
            (store, flushed, began.elapsed())
        }
    });
    let waiting = "SELECT pid::text FROM pg_stat_activity WHERE datname = current_database() \
                   AND application_name = 'host-metrics' AND wait_event_type = 'Lock'";
    wait_for("the flush to wait for the lock", || !db.many(waiting).is_empty());
    let pid = db.one(waiting);
    signal(&pid, "STOP");
    let frozen = Thaw(pid.clone());
    db.execute("SELECT pg_advisory_unlock(42)");

    let (store, flushed, took) = flushing.join().unwrap();
    retry(flushed);
    assert!(took < Duration::from_secs(10), "{took:?}");

    // While it is frozen nothing can end it, and it holds the position: waited for no longer than lock_timeout.
    let mut second = Store::with_bounds(&config, bounds).unwrap();
    second.open().unwrap();
    let text = retry(second.flush(&batch));
    assert!(text.contains("lock timeout"), "{text}");

    // The store that owned it asks for its end on the next open, so when it wakes up it rolls back.
    let mut store = reopened(store, &frozen);
    assert_eq!(positions(&mut store, &[P0]), [(P0, 0)]);
    assert_eq!(store.flush(&batch), Flushed::Durable);
    assert_eq!(db.count("m"), 1);
    drop(frozen);
}

#[test]
fn a_commit_whose_answer_is_lost_is_found_in_the_positions_and_not_repeated() {
    let mut db = Database::new();
    let proxy = Proxy::start(server().port());
    let mut config = db.config();
    config.database.port = proxy.port;
    let bounds = Bounds {
        step: Duration::from_secs(1),
        ..Bounds::default()
    };
    let mut store = Store::with_bounds(&config, bounds).unwrap();
    let layout = store.open().unwrap();
    start_at(&mut store, &[(P0, 0)]);
    // Deferred, so it runs in the second round trip, and tells when that arrived.
    db.execute(
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS \
         'BEGIN PERFORM pg_advisory_xact_lock(42); RETURN NULL; END'; \
         CREATE TRIGGER t AFTER INSERT ON host_metrics FOR EACH STATEMENT EXECUTE FUNCTION f(); \
         SELECT pg_advisory_lock(42)",
    );
    let mut batch = Batch::default();
    row(&mut batch, &layout, P0, 0, 0, &ok("https://a.example/"));
    let flushing = thread::spawn({
        let batch = batch.clone();
        move || (store.flush(&batch), store)
    });
    wait_for("the flush to reach the server", || {
        db.count("pg_locks WHERE locktype = 'advisory' AND NOT granted") == 1
    });
    // From here on the server hears us, and we do not hear the server.
    proxy.is_deaf.store(true, Ordering::SeqCst);
    db.execute("SELECT pg_advisory_unlock(42)");
    wait_for("the COMMIT", || db.count("host_metrics") == 1);

    let (flushed, mut store) = flushing.join().unwrap();
    retry(flushed);
    proxy.is_deaf.store(false, Ordering::SeqCst);
    store.open().unwrap();
    assert_eq!(positions(&mut store, &[P0]), [(P0, 1)]);
    assert_eq!(store.flush(&batch), Flushed::Fenced);
    assert_eq!(db.count("host_metrics"), 1);
}

#[test]
fn a_connection_that_swallows_everything_is_given_up_within_the_bound() {
    let db = Database::new();
    let proxy = Proxy::start(server().port());
    let mut config = db.config();
    config.database.port = proxy.port;
    let bounds = Bounds {
        step: Duration::from_secs(1),
        connect: Duration::from_secs(1),
        ..Bounds::default()
    };
    let mut store = Store::with_bounds(&config, bounds).unwrap();
    store.open().unwrap();
    start_at(&mut store, &[(P0, 0)]);
    proxy.is_mute.store(true, Ordering::SeqCst);
    proxy.is_deaf.store(true, Ordering::SeqCst);
    let began = scratch::now();
    let text = retry_of(store.positions(&[P0], &BTreeMap::new()));
    assert!(text.contains("no answer within 1 s"), "{text}");
    // A new connection gets no answer either.
    retry_of(store.open());
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
}

#[test]
fn faults_of_the_server_pass_and_are_named() {
    let mut db = Database::new();
    let mut store = db.store();
    let layout = store.open().unwrap();
    start_at(&mut store, &[(P0, 0)]);
    let mut batch = Batch::default();
    row(&mut batch, &layout, P0, 0, 0, &ok("https://a.example/"));
    let name = db.name.clone();

    // 57P01: an administrator's shutdown.
    db.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
         WHERE datname = current_database() AND application_name = 'host-metrics'",
    );
    retry(store.flush(&batch));
    // Nothing is tried on a connection that is gone.
    retry(store.flush(&batch));
    retry_of(store.positions(&[P0], &BTreeMap::new()));

    // 25006: a failover made this server a replica.
    db.execute(&format!(
        "ALTER DATABASE {name} SET default_transaction_read_only = on"
    ));
    store.open().unwrap();
    let text = retry(store.flush(&batch));
    assert!(text.contains("25006"), "{text}");
    db.execute(&format!(
        "SET default_transaction_read_only = off; ALTER DATABASE {name} RESET default_transaction_read_only"
    ));

    // 55P03: somebody holds our position.
    let bounds = Bounds {
        lock: Duration::from_millis(200),
        ..Bounds::default()
    };
    let mut quick = Store::with_bounds(&db.config(), bounds).unwrap();
    quick.open().unwrap();
    db.execute("BEGIN; SELECT * FROM host_metrics_offsets FOR UPDATE");
    let text = retry(quick.flush(&batch));
    assert!(text.contains("55P03"), "{text}");
    db.execute("ROLLBACK");

    // 57014: somebody cancelled our statement.
    quick.open().unwrap();
    db.execute("BEGIN; SELECT * FROM host_metrics_offsets FOR UPDATE");
    let mut patient = db.store();
    patient.open().unwrap();
    let flushing = thread::spawn({
        let batch = batch.clone();
        move || patient.flush(&batch)
    });
    let waiting = "pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    wait_for("the flush to wait", || db.count(waiting) == 1);
    db.execute(&format!("SELECT pg_cancel_backend(pid) FROM {waiting}"));
    let text = retry(flushing.join().unwrap());
    assert!(text.contains("57014"), "{text}");
    db.execute("ROLLBACK");

    // 53300: too many connections.
    db.execute(&format!("CREATE ROLE few_{name} LOGIN CONNECTION LIMIT 0"));
    let mut few = db.config();
    few.database.user = format!("few_{name}");
    let text = retry_of(Store::new(&few).unwrap().open());
    assert!(text.contains("53300"), "{text}");

    // And after all of that the batch is written, once.
    store.open().unwrap();
    assert_eq!(store.flush(&batch), Flushed::Durable);
    assert_eq!(db.count("host_metrics"), 1);
}

#[test]
fn a_crash_of_the_server_is_outlived_by_the_same_store() {
    let own = ThrowAwayPostgres::start().unwrap();
    let mut store = Store::new(&config(&own, own.database(), "m")).unwrap();
    let layout = store.open().unwrap();
    start_at(&mut store, &[(P0, 0)]);
    let mut batch = Batch::default();
    row(&mut batch, &layout, P0, 0, 0, &ok("https://a.example/"));
    own.stop_immediately().unwrap();
    retry(store.flush(&batch));
    let text = retry_of(store.open());
    assert!(text.contains(&format!("127.0.0.1:{}", own.port())), "{text}");
    own.start_again().unwrap();
    wait_for("the server to take us again", || store.open().is_ok());
    assert_eq!(store.flush(&batch), Flushed::Durable);
}

// ------------------------------------------------------------------------------------------------ existing tables

#[test]
fn an_existing_table_is_written_as_it_is() {
    // SQL, DB_TABLE, the columns asked for at the end and what they hold.
    let cases = [
        (
            "CREATE TABLE m (address text, latency numeric, status_code int, is_valid boolean)",
            (None, "m"),
            "SELECT concat_ws('|', address, latency, status_code, is_valid) FROM m",
            "https://a.example/|0.25|200|t",
        ),
        (
            "CREATE TABLE m (address text, latency real, status_code smallint, is_valid boolean)",
            (None, "m"),
            "SELECT concat_ws('|', address, latency, status_code, is_valid) FROM m",
            "https://a.example/|0.25|200|t",
        ),
        (
            "CREATE TABLE m (is_valid boolean NOT NULL, address varchar(2048) NOT NULL, latency double precision, \
             status_code bigint)",
            (None, "m"),
            "SELECT concat_ws('|', address, latency, status_code, is_valid) FROM m",
            "https://a.example/|0.25|200|t",
        ),
        (
            "CREATE TABLE m (id bigserial PRIMARY KEY, stored_at timestamptz NOT NULL DEFAULT now(), \
             address text, slow boolean GENERATED ALWAYS AS (latency > 1) STORED, latency real, \
             is_valid boolean, outcome varchar)",
            (None, "m"),
            "SELECT concat_ws('|', id, address, slow, latency, is_valid, outcome) FROM m",
            "1|https://a.example/|f|0.25|t|ok",
        ),
        (
            "CREATE TABLE m (address text)",
            (None, "m"),
            "SELECT address FROM m",
            "https://a.example/",
        ),
        (
            "CREATE DOMAIN seconds AS numeric(10,1) CHECK (value >= 0); CREATE DOMAIN latency AS seconds NOT NULL; \
             CREATE TABLE m (address text, latency latency)",
            (None, "m"),
            "SELECT concat_ws('|', address, latency) FROM m",
            "https://a.example/|0.3",
        ),
        (
            "CREATE TABLE t (host text, ok boolean); \
             CREATE VIEW m AS SELECT host AS address, ok AS is_valid FROM t; \
             CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS \
             'BEGIN INSERT INTO t VALUES (NEW.address, NEW.is_valid); RETURN NEW; END'; \
             CREATE TRIGGER i INSTEAD OF INSERT ON m FOR EACH ROW EXECUTE FUNCTION f()",
            (None, "m"),
            "SELECT concat_ws('|', host, ok) FROM t",
            "https://a.example/|t",
        ),
        (
            "CREATE SCHEMA \"My Schema\"; CREATE TABLE \"My Schema\".\"Host\"\"Metrics\" (address text, is_valid boolean)",
            (Some("My Schema"), "Host\"Metrics"),
            "SELECT concat_ws('|', address, is_valid, (SELECT next_offset FROM \"My Schema\".\"Host\"\"Metrics_offsets\")) \
             FROM \"My Schema\".\"Host\"\"Metrics\"",
            "https://a.example/|t|1",
        ),
        (
            // Found along the search path, not where a new table would go; what belongs to it goes beside it.
            "CREATE SCHEMA s; CREATE TABLE s.m (address text, is_valid boolean); \
             DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET search_path = public, s', current_database()); END $$",
            (None, "m"),
            "SELECT concat_ws('|', address, (SELECT next_offset FROM s.m_offsets)) FROM s.m",
            "https://a.example/|1",
        ),
    ];
    for (sql, (schema, name), question, answer) in cases {
        let mut db = Database::new();
        db.execute(sql);
        let mut config = db.config_of(name);
        config.database.table.schema = schema.map(str::to_owned);
        let mut store = Store::new(&config).unwrap();
        let layout = store.open().unwrap_or_else(|error| panic!("{sql}: {error}"));
        assert!(!layout.not_stored().is_empty());
        start_at(&mut store, &[(P0, 0)]);
        let mut batch = Batch::default();
        row(&mut batch, &layout, P0, 0, 0, &ok("https://a.example/"));
        assert_eq!(store.flush(&batch), Flushed::Durable, "{sql}");
        assert_eq!(db.one(question), answer, "{sql}");
    }
}

#[test]
fn a_trigger_of_the_users_table_finds_what_the_users_search_path_names() {
    let mut db = Database::new();
    db.execute(
        "CREATE SCHEMA theirs; CREATE TABLE theirs.log (address text); \
         CREATE TABLE theirs.checks (address text, is_valid boolean); \
         CREATE FUNCTION theirs.shout(text) RETURNS text LANGUAGE sql RETURN upper($1); \
         CREATE FUNCTION theirs.note() RETURNS trigger LANGUAGE plpgsql AS \
             'BEGIN INSERT INTO log VALUES (shout(NEW.address)); RETURN NEW; END'; \
         CREATE CONSTRAINT TRIGGER note AFTER INSERT ON theirs.checks DEFERRABLE INITIALLY DEFERRED \
             FOR EACH ROW EXECUTE FUNCTION theirs.note()",
    );
    db.execute(&format!(
        "ALTER DATABASE {} SET search_path = theirs, public",
        db.name
    ));
    // The table is found along that path as well.
    let mut store = db.store_of("checks");
    let layout = store.open().unwrap();
    start_at(&mut store, &[(P0, 0)]);
    for offset in 0..3 {
        let mut batch = Batch::default();
        row(&mut batch, &layout, P0, offset, offset, &ok("https://a.example/"));
        assert_eq!(store.flush(&batch), Flushed::Durable);
    }
    assert_eq!(
        db.many("SELECT address FROM theirs.log"),
        ["HTTPS://A.EXAMPLE/"; 3]
    );
}

#[test]
fn a_table_that_cannot_take_the_records_is_refused_at_once_with_all_reasons() {
    for (sql, expected) in [
        (
            "CREATE TABLE m (address text, is_valid boolean, customer int NOT NULL, region text NOT NULL)",
            &[
                "column customer of",
                "column region of",
                "NOT NULL without a default",
            ][..],
        ),
        (
            "CREATE TABLE m (address int, is_valid text)",
            &["\"address\"", "\"is_valid\""],
        ),
        ("CREATE TABLE m (host text)", &["none of the columns"]),
        (
            "CREATE TABLE t (address text); CREATE VIEW m AS SELECT * FROM t",
            &["INSTEAD OF INSERT"],
        ),
    ] {
        let mut db = Database::new();
        db.execute(sql);
        let text = fatal_of(db.store_of("m").open());
        for words in expected {
            assert!(text.contains(words), "{sql}: {text}");
        }
    }
}

#[test]
fn a_table_that_changes_under_way_stops_with_what_to_do() {
    let mut db = Database::new();
    db.execute("CREATE TABLE m (address text, is_valid boolean)");
    let mut store = db.store_of("m");
    let layout = store.open().unwrap();
    start_at(&mut store, &[(P0, 0)]);
    let mut batch = Batch::default();
    row(&mut batch, &layout, P0, 0, 0, &ok("https://a.example/"));
    db.execute("ALTER TABLE m RENAME TO elsewhere");
    let text = fatal(store.flush(&batch));
    assert!(
        text.contains("42P01") && text.contains("host-metrics init"),
        "{text}"
    );
    db.execute("ALTER TABLE elsewhere RENAME TO m; DROP TABLE m_rejected");
    let text = fatal_of(db.store_without_create("m").open());
    assert!(
        text.contains("\"m_rejected\" does not exist: run `host-metrics init`"),
        "{text}"
    );
}

// ------------------------------------------------------------------------------------------------ rights and logins

#[test]
fn the_rights_that_the_contract_names_are_enough_and_each_missing_one_is_named() {
    let mut db = Database::new();
    let mut poor = db.store_without_create("host_metrics");
    let text = fatal_of(poor.open());
    assert!(text.contains("does not exist: run `host-metrics init`"), "{text}");
    assert!(
        text.contains("could not make what is missing: permission denied for schema public"),
        "{text}"
    );

    init::make_tables(&db.config().database).unwrap();
    let text = fatal_of(poor.open());
    for grant in [
        "GRANT INSERT ON \"public\".\"host_metrics\" TO",
        "GRANT SELECT, INSERT, UPDATE ON \"public\".\"host_metrics_offsets\" TO",
        "GRANT INSERT ON \"public\".\"host_metrics_rejected\" TO",
    ] {
        assert!(text.contains(grant), "{text}");
    }
    // What it says is what helps.
    for grant in text
        .split("; ")
        .filter_map(|problem| problem.split("denied: ").nth(1))
    {
        db.execute(grant);
    }
    let layout = poor.open().unwrap();
    start_at(&mut poor, &[(P0, 0)]);
    let mut batch = Batch::default();
    row(&mut batch, &layout, P0, 0, 0, &ok("https://a.example/"));
    reject(&mut batch, P0, 0, 1, None, None, "empty");
    assert_eq!(poor.flush(&batch), Flushed::Durable);
    assert_eq!(db.count("host_metrics"), 1);

    // Taken away under way: stop, and say what to give back.
    let user = format!("poor_{}", db.name);
    let mut next = Batch::default();
    row(&mut next, &layout, P0, 2, 2, &ok("https://a.example/"));
    reject(&mut next, P0, 2, 3, None, None, "empty");
    for (right, table) in [
        ("INSERT", "host_metrics"),
        ("UPDATE", "host_metrics_offsets"),
        ("INSERT", "host_metrics_rejected"),
    ] {
        poor.open().unwrap();
        db.execute(&format!("REVOKE {right} ON {table} FROM {user}"));
        let text = fatal(poor.flush(&next));
        assert!(
            text.contains("42501") && text.contains(&format!("{table}\" to this user")),
            "{text}"
        );
        db.execute(&format!("GRANT {right} ON {table} TO {user}"));
    }
    poor.open().unwrap();
    assert_eq!(poor.flush(&next), Flushed::Durable);
}

#[test]
fn a_login_that_cannot_succeed_is_the_operators_and_shows_no_password() {
    let own = tls_server();
    let mut wrong = config(own.server(), "postgres", "m");
    wrong.database.user = "scram".into();
    wrong.database.password = Some(Secret::new("not-the-password".into()));
    let text = fatal_of(Store::new(&wrong).unwrap().open());
    assert!(text.contains("28P01") && text.contains("DB_PASSWORD"), "{text}");
    assert!(!text.contains("not-the-password"), "{text}");

    wrong.database.password = None;
    let text = fatal_of(Store::new(&wrong).unwrap().open());
    assert!(text.contains("password missing"), "{text}");

    let mut nowhere = config(server(), "no_such_database", "m");
    let text = fatal_of(Store::new(&nowhere).unwrap().open());
    assert!(text.contains("3D000") && text.contains("DB_NAME"), "{text}");

    nowhere.database.name = "postgres".into();
    nowhere.database.table.schema = Some("no_such_schema".into());
    let text = fatal_of(Store::new(&nowhere).unwrap().open());
    assert!(text.contains("\"no_such_schema\".\"m\" does not exist"), "{text}");

    // Not there (yet): waited for.
    nowhere.database.port = host_metrics::commands::demo::postgres::free_port().unwrap();
    retry_of(Store::new(&nowhere).unwrap().open());
    nowhere.database.host = "no-such-host.invalid".into();
    retry_of(Store::new(&nowhere).unwrap().open());
}

#[test]
fn the_five_words_of_sslmode_mean_what_libpq_means() {
    let own = tls_server();
    use DbSslMode::{Disable, Prefer, Require, VerifyCa, VerifyFull};
    let (ca, other_ca) = (Some(own.file("ca.pem")), Some(own.file("other-ca.pem")));
    // The server's certificate names localhost only. `Ok`: whether the connection is encrypted.
    type Case<'a> = (DbSslMode, &'a Option<PathBuf>, &'a str, Result<bool, &'a str>);
    let cases: [Case<'_>; 16] = [
        (Disable, &None, "127.0.0.1", Ok(false)),
        (Disable, &other_ca, "127.0.0.1", Ok(false)),
        (Prefer, &None, "127.0.0.1", Ok(true)),
        // A CA that does not vouch for it: prefer goes on without TLS.
        (Prefer, &other_ca, "127.0.0.1", Ok(false)),
        (Prefer, &ca, "127.0.0.1", Ok(true)),
        (Require, &None, "127.0.0.1", Ok(true)),
        // As verify-ca where a CA is given.
        (Require, &ca, "127.0.0.1", Ok(true)),
        (Require, &other_ca, "127.0.0.1", Err("certificate verify failed")),
        (VerifyCa, &None, "127.0.0.1", Err("DB_SSLROOTCERT is not set")),
        (VerifyCa, &ca, "127.0.0.1", Ok(true)),
        (VerifyCa, &other_ca, "127.0.0.1", Err("certificate verify failed")),
        (VerifyFull, &None, "localhost", Err("DB_SSLROOTCERT is not set")),
        (VerifyFull, &ca, "localhost", Ok(true)),
        (VerifyFull, &ca, "127.0.0.1", Err("IP address mismatch")),
        (
            VerifyFull,
            &other_ca,
            "localhost",
            Err("certificate verify failed"),
        ),
        (
            VerifyCa,
            &Some(own.file("no-such.pem")),
            "localhost",
            Err("no-such.pem"),
        ),
    ];
    for (mode, root, host, expected) in cases {
        let mut config = config(own.server(), "postgres", "m").database;
        config.host = host.into();
        config.ssl_mode = mode;
        config.ssl_root_cert = root.clone();
        let case = format!("{mode:?} {root:?} {host}");
        let runtime = bounded::runtime().unwrap();
        let encrypted = runtime.block_on(async {
            let link = Link::open(&config, &Bounds::default()).await?;
            let row = link
                .client
                .query_one("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()", &[])
                .await?;
            let encrypted: bool = row.get(0);
            link.close().await;
            Ok::<_, bounded::Fault>(encrypted)
        });
        match (encrypted, expected) {
            (Ok(is), Ok(expected)) => assert_eq!(is, expected, "{case}"),
            (Err(fault), Err(words)) => {
                assert!(fault.text.contains(words), "{case}: {fault}");
                assert_eq!(fault.kind, bounded::Kind::Operator, "{case}: {fault}");
            }
            (result, _) => panic!("{case}: {result:?}"),
        }
    }
    // A server without TLS.
    for (mode, is_fine) in [(Disable, true), (Prefer, true), (Require, false)] {
        let mut plain = config(server(), "postgres", "m").database;
        plain.ssl_mode = mode;
        let runtime = bounded::runtime().unwrap();
        let opened = runtime.block_on(Link::open(&plain, &Bounds::default()));
        match opened {
            Ok(_) => assert!(is_fine, "{mode:?}"),
            Err(fault) => {
                assert!(
                    !is_fine && fault.text.contains("server does not support TLS"),
                    "{mode:?}: {fault}"
                );
                assert_eq!(fault.kind, bounded::Kind::Operator);
            }
        }
    }
    // A server that takes this user without TLS only.
    let mut only_plain = config(own.server(), "postgres", "m").database;
    only_plain.user = "plain".into();
    let runtime = bounded::runtime().unwrap();
    runtime
        .block_on(Link::open(&only_plain, &Bounds::default()))
        .unwrap();
    only_plain.ssl_mode = Require;
    let fault = runtime
        .block_on(Link::open(&only_plain, &Bounds::default()))
        .err()
        .unwrap();
    assert!(fault.text.contains("pg_hba.conf"), "{fault}");
}

// ------------------------------------------------------------------------------------------------ tables, days, views

#[test]
fn tables_are_made_once_by_many_at_the_same_time() {
    let mut db = Database::new();
    // Every maker has connected when the first begins.
    let makers_ready = std::sync::Arc::new(std::sync::Barrier::new(6));
    let makers: Vec<_> = (0..6)
        .map(|_| {
            let (config, ready) = (db.config().database, std::sync::Arc::clone(&makers_ready));
            thread::spawn(move || {
                let bounds = Bounds::default();
                bounded::runtime().unwrap().block_on(async {
                    let link = Link::open(&config, &bounds).await?;
                    ready.wait();
                    migrate::make(&link, &bounds, days::today()).await
                })
            })
        })
        .collect();
    let made: Vec<usize> = makers
        .into_iter()
        .map(|maker| maker.join().unwrap().unwrap().len())
        .collect();
    assert_eq!(made.iter().sum::<usize>(), Object::ALL.len(), "{made:?}");
    // And a consumer has nothing to add.
    db.store().open().unwrap();
    for object in Object::ALL {
        assert_eq!(
            db.count(&format!(
                "pg_class WHERE relname = 'host_metrics{}'",
                object.suffix()
            )),
            1
        );
    }
    // Today, a week behind, a week ahead, and the default partition.
    assert_eq!(
        db.count("pg_inherits WHERE inhparent = 'host_metrics'::regclass"),
        16
    );
}

#[test]
fn the_printed_sql_makes_the_same_tables_and_can_be_repeated() {
    let mut by_init = Database::new();
    by_init.store().open().unwrap();
    let mut by_print = Database::new();
    let sql = schema::script(&by_print.config().database.table, days::today());
    by_print.execute(&sql);
    by_print.execute(&sql);
    let describe = "SELECT concat_ws(' ', c.relname, c.relkind, a.attname, a.atttypid::regtype, a.attnotnull, \
                    pg_get_expr(c.relpartbound, c.oid), obj_description(c.oid)) FROM pg_class c \
                    LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 \
                    WHERE c.relnamespace = 'public'::regnamespace ORDER BY 1";
    let made = by_init.many(describe);
    assert!(made.len() > 100, "{made:?}");
    assert_eq!(by_print.many(describe), made);
    // And consume takes them as its own.
    by_print.store().open().unwrap();
}

/// A made-up second version: a column more, with a value in every row; and a third one that fails in its middle.
const MADE_UP_STEPS: [schema::Step; 2] = [
    |object, table| {
        let add = format!(
            "ALTER TABLE {} ADD COLUMN place text NOT NULL DEFAULT 'here'",
            table.quoted("")
        );
        (object == Object::Main).then_some(add)
    },
    |object, table| match object {
        Object::Main => Some(format!("ALTER TABLE {} DROP COLUMN place", table.quoted(""))),
        Object::Offsets => Some("SELECT 1 / 0".to_owned()),
        _ => None,
    },
];

/// Takes the steps.
fn migrate_made_up(config: &DatabaseConfig, steps: &[schema::Step]) -> Result<(), bounded::Fault> {
    let bounds = Bounds::default();
    bounded::runtime().unwrap().block_on(async {
        let link = Link::open(config, &bounds).await?;
        migrate::migrate(&link, &bounds, steps).await
    })
}

#[test]
fn a_step_from_one_version_to_the_next_is_taken_once_by_many_and_keeps_the_rows() {
    let mut db = Database::new();
    db.store().open().unwrap();
    db.execute(
        "INSERT INTO host_metrics (address, scheduled_at, is_valid) \
         SELECT 'https://a.example/', now() - n * interval '1 hour', true FROM generate_series(1, 1000) n; \
         INSERT INTO host_metrics_offsets VALUES ('g', 't', 0, 42)",
    );
    assert_eq!(db.one(VERSIONS), "1");
    let [add_a_column, fail] = MADE_UP_STEPS;
    // The second of two makers that meet finds the step taken: taken twice, it would fail.
    let config = db.config().database;
    thread::scope(|scope| {
        let makers = [(); 4].map(|()| scope.spawn(|| migrate_made_up(&config, &[add_a_column])));
        for maker in makers {
            maker.join().unwrap().unwrap();
        }
    });
    assert_eq!(db.one(VERSIONS), "2");
    assert_eq!(db.count("host_metrics WHERE place = 'here'"), 1000);
    assert_eq!(db.one("SELECT next_offset::text FROM host_metrics_offsets"), "42");

    // A step that fails leaves the version before it, whole.
    let fault = migrate_made_up(&config, &[add_a_column, fail]).unwrap_err();
    assert!(fault.text.contains("division by zero"), "{fault}");
    assert_eq!(db.one(VERSIONS), "2");
    assert_eq!(db.count("host_metrics WHERE place = 'here'"), 1000);
}

#[test]
fn a_user_who_does_not_own_the_tables_takes_no_step_and_writes_to_the_older_ones() {
    let mut db = Database::new();
    db.store().open().unwrap();
    let mut store = db.store_without_create("host_metrics");
    let user = format!("poor_{}", db.name);
    db.execute(&format!(
        "GRANT INSERT ON host_metrics, host_metrics_rejected TO {user}; \
         GRANT SELECT, INSERT, UPDATE ON host_metrics_offsets TO {user}"
    ));
    let mut config = db.config().database;
    config.user = user;
    migrate_made_up(&config, &MADE_UP_STEPS).unwrap();
    let layout = store.open().unwrap();
    start_at(&mut store, &[(P0, 0)]);
    let mut batch = Batch::default();
    row(&mut batch, &layout, P0, 0, 0, &ok("https://a.example/"));
    assert_eq!(store.flush(&batch), Flushed::Durable);
    assert_eq!((db.one(VERSIONS).as_str(), db.count("host_metrics")), ("1", 1));
}

#[test]
fn what_a_newer_version_made_is_left_alone() {
    let mut db = Database::new();
    db.store().open().unwrap();
    db.execute(&format!(
        "COMMENT ON TABLE host_metrics IS 'host-metrics schema {}: rows'; DROP VIEW host_metrics_certificates; \
         ALTER TABLE host_metrics ADD COLUMN of_the_future text",
        schema::SCHEMA_VERSION + 1
    ));
    let catalogue = "SELECT string_agg(concat_ws(' ', oid, xmin, relname), ',' ORDER BY oid) FROM pg_class \
                     WHERE relnamespace = 'public'::regnamespace";
    let before = db.one(catalogue);
    init::make_tables(&db.config().database).unwrap();
    let mut store = db.store();
    let layout = store.open().unwrap();
    assert_eq!(db.one(catalogue), before);
    // And it takes rows.
    start_at(&mut store, &[(P0, 0)]);
    let mut batch = Batch::default();
    row(&mut batch, &layout, P0, 0, 0, &ok("https://a.example/"));
    assert_eq!(store.flush(&batch), Flushed::Durable);
    assert_eq!(db.count("host_metrics"), 1);
}

#[test]
fn drop_removes_what_is_ours_and_nothing_else() {
    let mut db = Database::new();
    db.store().open().unwrap();
    db.execute(
        "CREATE TABLE host_metrics_other (x int); DROP VIEW host_metrics_uptime; \
         CREATE VIEW host_metrics_uptime AS SELECT 1 AS mine",
    );
    let config = db.init_config();
    let refused = init::drop(&config, false, false).unwrap_err();
    assert!(
        refused.is::<WrongInput>() && refused.to_string().contains("--yes"),
        "{refused}"
    );
    assert_eq!(db.count("host_metrics"), 0, "still there");

    // What somebody built upon ours stands in the way, and nothing is dropped.
    db.execute("CREATE VIEW upon AS SELECT * FROM host_metrics_latest");
    let refused = init::drop(&config, false, true).unwrap_err();
    assert!(refused.to_string().contains("upon"), "{refused}");
    assert_eq!(
        db.count("pg_views WHERE viewname = 'host_metrics_certificates'"),
        1
    );
    db.execute("DROP VIEW upon");

    init::drop(&config, false, true).unwrap();
    assert_eq!(
        db.many("SELECT relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1"),
        ["host_metrics_other", "host_metrics_uptime"]
    );
    init::drop(&config, false, true).unwrap();
}

#[test]
fn rows_of_any_day_are_stored_and_move_when_their_day_is_made() {
    let mut db = Database::new();
    let mut store = db.store();
    let layout = store.open().unwrap();
    start_at(&mut store, &[(P0, 0)]);
    let today = days::today();
    let later = |days: i64| at_day(today, days);
    let mut batch = Batch::default();
    for (offset, days) in [-400, -1, 0, 7, 8, 8, 9, 400].into_iter().enumerate() {
        let mut sample = ok("https://a.example/");
        sample.scheduled_at = Some(later(days));
        row(&mut batch, &layout, P0, 0, offset as i64, &sample);
    }
    assert_eq!(store.flush(&batch), Flushed::Durable);
    assert_eq!(db.count("host_metrics_default"), 5);
    let partition = |days: i64| format!("host_metrics{}", today.plus(days).suffix());
    assert_eq!(db.count(&partition(7)), 1);

    // Two days later two days are made, and what the default partition holds of them moves.
    store.maintain(later(2)).unwrap();
    assert_eq!((db.count(&partition(8)), db.count(&partition(9))), (2, 1));
    assert_eq!(db.count("host_metrics_default"), 2);
    assert_eq!(db.count("host_metrics"), 8);
    // The new days are indexed as the old ones are.
    assert_eq!(
        db.count(&format!("pg_indexes WHERE tablename = '{}'", partition(8))),
        1
    );

    // The day cannot be made while somebody uses the default partition: said, not waited for, and rows go there.
    db.execute("BEGIN; SELECT * FROM host_metrics_default");
    let began = scratch::now();
    store.maintain(later(3)).unwrap();
    assert!(began.elapsed() < Duration::from_secs(5));
    db.execute("COMMIT");
    assert_eq!(
        db.count(&format!("pg_class WHERE relname = '{}'", partition(10))),
        0
    );
    let mut next = Batch::default();
    let mut sample = ok("https://a.example/");
    sample.scheduled_at = Some(later(10));
    row(&mut next, &layout, P0, 8, 8, &sample);
    assert_eq!(store.flush(&next), Flushed::Durable);
    store.maintain(later(3)).unwrap();
    assert_eq!(db.count(&partition(10)), 1);
}

#[test]
fn retention_drops_whole_days_without_making_writers_wait() {
    let mut db = Database::new();
    let mut config = db.config();
    config.retention = Some(Duration::from_secs(3 * 86_400));
    let mut store = Store::new(&config).unwrap();
    let layout = store.open().unwrap();
    start_at(&mut store, &[(P0, 0)]);
    let today = days::today();
    let partition = |days: i64| format!("host_metrics{}", today.plus(days).suffix());
    let exists =
        |db: &mut Database, days: i64| db.count(&format!("pg_class WHERE relname = '{}'", partition(days)));
    // Made with a week behind, of which open() dropped what is too old at once.
    assert_eq!(
        (exists(&mut db, -4), exists(&mut db, -3), exists(&mut db, 0)),
        (0, 1, 1)
    );

    // A writer in the middle of its transaction: the drop gives up, and another writer is not held up behind it.
    db.execute("BEGIN; INSERT INTO host_metrics (address, is_valid, scheduled_at) VALUES ('x', true, now())");
    store.maintain(at_day(today, 1)).unwrap();
    let mut batch = Batch::default();
    row(&mut batch, &layout, P0, 0, 0, &ok("https://a.example/"));
    let began = scratch::now();
    assert_eq!(store.flush(&batch), Flushed::Durable);
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert_eq!(exists(&mut db, -3), 1);
    db.execute("COMMIT");
    store.maintain(at_day(today, 1)).unwrap();
    assert_eq!((exists(&mut db, -3), exists(&mut db, -2)), (0, 1));
    assert_eq!(db.count("host_metrics"), 2);
}

#[test]
fn retention_removes_old_rows_of_days_without_partition_too() {
    let mut db = Database::new();
    let mut config = db.config();
    config.retention = Some(Duration::from_secs(30 * 86_400));
    let mut store = Store::new(&config).unwrap();
    let layout = store.open().unwrap();
    start_at(&mut store, &[(P0, 0)]);
    // More than one statement removes, of days that have no partition; and one row without a time.
    db.execute(
        "INSERT INTO host_metrics (address, is_valid, scheduled_at) \
         SELECT 'https://a.example/', true, date_trunc('day', now(), 'UTC') - interval '1 second' - n * interval '1 day' \
         FROM generate_series(20, 60) n, generate_series(1, 600); \
         INSERT INTO host_metrics (address, is_valid) VALUES ('https://a.example/', true)",
    );
    assert_eq!(db.count("host_metrics_default"), 41 * 600 + 1);

    // Somebody has one of the old rows, and somebody writes: neither is waited for, nor made to wait.
    db.execute(
        "BEGIN; INSERT INTO host_metrics_default (address, is_valid) VALUES ('https://b.example/', true); \
         UPDATE host_metrics SET outcome = 'ok' WHERE ctid = (SELECT min(ctid) FROM host_metrics_default \
         WHERE scheduled_at < now() - interval '50 days') AND tableoid = 'host_metrics_default'::regclass",
    );
    let began = scratch::now();
    store.maintain(at_day(days::today(), 0)).unwrap();
    let mut batch = Batch::default();
    let mut sample = ok("https://a.example/");
    sample.scheduled_at = Some(at_day(days::today(), -25));
    row(&mut batch, &layout, P0, 0, 0, &sample);
    assert_eq!(store.flush(&batch), Flushed::Durable);
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    db.execute("COMMIT");
    // Whole days: those from the thirtieth day before today on stay.
    let older = "host_metrics WHERE scheduled_at < date_trunc('day', now(), 'UTC') - interval '30 days'";
    assert_eq!(db.count(older), 1);
    store.maintain(at_day(days::today(), 0)).unwrap();
    assert_eq!(db.count(older), 0);
    assert_eq!(db.count("host_metrics_default"), 10 * 600 + 3);
}

// ------------------------------------------------------------------------------------------------ what the tests use

/// The versions in the comments of all objects.
const VERSIONS: &str = "SELECT string_agg(DISTINCT substring(obj_description(oid, 'pg_class') FROM 'schema (\\d+):'), ',') \
                        FROM pg_class WHERE relnamespace = 'public'::regnamespace";

pub const P0: Partition = Partition { topic: 0, number: 0 };
const P1: Partition = Partition { topic: 0, number: 1 };
const P2: Partition = Partition { topic: 0, number: 2 };

impl Database {
    pub fn config(&self) -> ConsumeConfig {
        self.config_of("host_metrics")
    }

    pub fn config_of(&self, table: &str) -> ConsumeConfig {
        config(server(), &self.name, table)
    }

    pub fn init_config(&self) -> InitConfig {
        let ConsumeConfig {
            kafka,
            topics,
            database,
            ..
        } = self.config();
        InitConfig {
            kafka,
            topics,
            database,
        }
    }

    pub fn store(&self) -> Store {
        self.store_of("host_metrics")
    }

    fn store_of(&self, table: &str) -> Store {
        Store::new(&self.config_of(table)).unwrap()
    }

    /// As a user who may log in and nothing else.
    pub fn store_without_create(&mut self, table: &str) -> Store {
        let user = format!("poor_{}", self.name);
        // Before Postgres 15 everybody may create in the schema public.
        self.execute(&format!(
            "CREATE ROLE {user} LOGIN; REVOKE CREATE ON SCHEMA public FROM PUBLIC"
        ));
        let mut config = self.config_of(table);
        config.database.user = user;
        Store::new(&config).unwrap()
    }
}

pub fn start_at(store: &mut Store, at: &[(Partition, i64)]) {
    let partitions: Vec<Partition> = at.iter().map(|(partition, _)| *partition).collect();
    let missing = at
        .iter()
        .map(|(partition, next)| (*partition, NextOffset(*next)))
        .collect();
    store.positions(&partitions, &missing).unwrap();
}

fn positions(store: &mut Store, partitions: &[Partition]) -> Vec<(Partition, i64)> {
    let found = store.positions(partitions, &BTreeMap::new()).unwrap();
    found
        .into_iter()
        .map(|(partition, next)| (partition, next.0))
        .collect()
}

pub fn row(
    batch: &mut Batch,
    layout: &Layout,
    partition: Partition,
    base: i64,
    offset: i64,
    sample: &Sample<'_>,
) {
    let offset = Offset(offset);
    let record = Record {
        partition,
        offset,
        timestamp: None,
        key: Some(sample.address.as_bytes()),
        value: Some(b"{}"),
    };
    let origin = Origin {
        topic: "t",
        partition: partition.number,
        offset,
    };
    batch.push(NextOffset(base), record, |into| {
        layout.encode_row(sample, origin, into)
    });
    assert!(matches!(batch.entries.last().unwrap().form, Form::Row(_)));
}

pub fn reject(
    batch: &mut Batch,
    partition: Partition,
    base: i64,
    offset: i64,
    key: Option<&[u8]>,
    value: Option<&[u8]>,
    reason: &str,
) {
    let record = Record {
        partition,
        offset: Offset(offset),
        timestamp: None,
        key,
        value,
    };
    batch.push(NextOffset(base), record, |_| Err(reason.to_owned()));
}

pub fn ok(address: &str) -> Sample<'static> {
    Sample {
        address: address.to_owned().into(),
        is_valid: true,
        outcome: Some("ok".into()),
        status_code: Some(200),
        latency: Some(0.25),
        scheduled_at: Some(at_day(days::today(), 0)),
        ..Sample::default()
    }
}

fn full_sample() -> Sample<'static> {
    let at = |micros| Timestamp::from_unix_micros(micros);
    Sample {
        address: "https://a.example/ä".into(),
        latency: Some(0.123_456_789_012_3),
        status_code: Some(503),
        is_valid: false,
        outcome: Some("bad_status".into()),
        error: Some("status 503".into()),
        scheduled_at: at(1_790_000_000_123_456),
        started_at: at(1_790_000_000_234_567),
        interval_seconds: Some(60.0),
        regex_matched: Some(false),
        dns_seconds: Some(0.01),
        connect_seconds: Some(0.02),
        tls_seconds: Some(0.03),
        ttfb_seconds: Some(0.04),
        body_seconds: Some(0.05),
        ip: Some("2001:db8::1".parse().unwrap()),
        redirects: Some(2),
        body_bytes: Some(4_096),
        cert_expires_at: at(1_799_999_999_000_000),
        agent: Some("agent-1".into()),
    }
}

/// The first moment of a day.
pub fn at_day(today: Day, days: i64) -> Timestamp {
    let bounds = today.plus(days).bounds();
    let text = bounds.start.trim_matches('\'').to_owned();
    let (year, rest) = text.split_at(4);
    let date = time::Date::from_calendar_date(
        year.parse().unwrap(),
        time::Month::try_from(rest[1..3].parse::<u8>().unwrap()).unwrap(),
        rest[4..6].parse().unwrap(),
    )
    .unwrap();
    Timestamp::from_unix_micros(date.midnight().assume_utc().unix_timestamp() * 1_000_000).unwrap()
}

fn poisoned(flushed: Flushed) -> Vec<(usize, String)> {
    match flushed {
        Flushed::Poison(found) => found,
        other => panic!("{other:?}"),
    }
}

fn retry(flushed: Flushed) -> String {
    match flushed {
        Flushed::Retry(text) => text,
        other => panic!("{other:?}"),
    }
}

fn fatal(flushed: Flushed) -> String {
    match flushed {
        Flushed::Fatal(text) => text,
        other => panic!("{other:?}"),
    }
}

fn retry_of<T: std::fmt::Debug>(result: Result<T, StoreError>) -> String {
    match result {
        Err(StoreError::Retry(text)) => text,
        other => panic!("{other:?}"),
    }
}

fn fatal_of<T: std::fmt::Debug>(result: Result<T, StoreError>) -> String {
    match result {
        Err(StoreError::Fatal(text)) => text,
        other => panic!("{other:?}"),
    }
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    scratch::wait_for(
        Duration::from_secs(30),
        what,
        || is_so().then_some(()),
        String::new,
    );
}

/// Opens the store while its old backend is frozen, which asks for that backend's end, and lets the backend go on.
fn reopened(mut store: Store, frozen: &Thaw) -> Store {
    store.open().unwrap();
    signal(&frozen.0, "CONT");
    store
}

/// A server with TLS by a CA of its own, and users that log in in different ways.
struct TlsServer {
    server: ThrowAwayPostgres,
    directory: tempfile::TempDir,
}

fn tls_server() -> &'static TlsServer {
    static SERVER: OnceLock<TlsServer> = OnceLock::new();
    SERVER.get_or_init(|| {
        let server = ThrowAwayPostgres::start_with(&Settings {
            configuration: vec![("password_encryption".into(), "scram-sha-256".into())],
            ..Settings::default()
        })
        .unwrap();
        let directory = tempfile::tempdir().unwrap();
        let (ca, ca_key) = authority("host-metrics test CA");
        let (other_ca, _) = authority("another CA");
        std::fs::write(directory.path().join("ca.pem"), ca.pem()).unwrap();
        std::fs::write(directory.path().join("other-ca.pem"), other_ca.pem()).unwrap();

        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec!["localhost".into()]).unwrap();
        let issuer = rcgen::Issuer::new(ca_params("host-metrics test CA"), ca_key);
        let certificate = params.signed_by(&key, &issuer).unwrap();
        let place = |name: &str, text: &str| {
            let path = server.data_dir().join(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            if let Some((user, group)) = server.account() {
                chown(&path, Some(user), Some(group)).unwrap();
            }
        };
        place("server.crt", &certificate.pem());
        place("server.key", &key.serialize_pem());
        let text = format!("host=127.0.0.1 port={} user=postgres", server.port());
        let mut client = Client::connect(&text, NoTls).unwrap();
        client
            .batch_execute("CREATE ROLE scram LOGIN PASSWORD 'right'; CREATE ROLE plain LOGIN")
            .unwrap();
        drop(client);
        place(
            "pg_hba.conf",
            "host all scram all scram-sha-256\nhostnossl all plain all trust\nhost all postgres all trust\n",
        );
        server.configure(&[("ssl".into(), "on".into())]).unwrap();
        server.stop().unwrap();
        server.start_again().unwrap();
        TlsServer { server, directory }
    })
}

impl TlsServer {
    fn server(&self) -> &ThrowAwayPostgres {
        &self.server
    }

    fn file(&self, name: &str) -> PathBuf {
        Path::new(self.directory.path()).join(name)
    }
}

fn ca_params(name: &str) -> rcgen::CertificateParams {
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params
}

fn authority(name: &str) -> (rcgen::Certificate, rcgen::KeyPair) {
    let key = rcgen::KeyPair::generate().unwrap();
    (ca_params(name).self_signed(&key).unwrap(), key)
}
