//! Temporary faults of the server and of the connection.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use host_metrics::commands::demo::postgres::ThrowAwayPostgres;
use host_metrics::consume::batch::Batch;
use host_metrics::consume::batch::Flushed;
use host_metrics::consume::store::Store;
use host_metrics::postgres::Bounds;

use super::{P0, ok, positions, retry, row, start_at, wait_for};
use crate::database::{Database, WAITS_FOR_ADVISORY_LOCK, config, server};
use crate::faults::{Proxy, Thaw, signal};
use crate::scratch;

#[test]
fn a_frozen_backend_is_abandoned_within_the_bound_and_its_transaction_is_not_doubled() {
    let mut db = Database::new();
    db.execute("CREATE TABLE m (address text, is_valid boolean)");
    // Holds the flush after its rows are written and its position is moved, before the commit.
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

    // A frozen backend cannot be ended, and it locks the position. The wait is at most lock_timeout.
    let mut second = Store::with_bounds(&config, bounds).unwrap();
    second.open().unwrap();
    let text = retry(second.flush(&batch));
    assert!(text.contains("lock timeout"), "{text}");

    // The store that owned it asks for its end at the next open, so it rolls back when it wakes up.
    let mut store = reopened(store, &frozen);
    assert_eq!(positions(&mut store, &[P0]), [(P0, 0)]);
    assert_eq!(store.flush(&batch).unwrap(), Flushed::Durable);
    assert_eq!(db.count("m"), 1);
    drop(frozen);
}

#[test]
fn a_commit_whose_answer_is_lost_is_recognised_by_the_positions_and_not_repeated() {
    let mut db = Database::new();
    let proxy = Proxy::start(server().port());
    let mut config = db.config();
    config.database.port = proxy.port;
    let bounds = Bounds {
        step: Duration::from_secs(3),
        ..Bounds::default()
    };
    // The tables are made without a tight bound.
    db.store().open().unwrap();
    let mut store = Store::with_bounds(&config, bounds).unwrap();
    let layout = store.open().unwrap();
    start_at(&mut store, &[(P0, 0)]);
    // The trigger is deferred, so it runs in the second round trip and shows when that arrived.
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
        db.count(WAITS_FOR_ADVISORY_LOCK) == 1
    });
    // From here on the server gets our bytes, but we get none of its answers.
    proxy.is_deaf.store(true, Ordering::SeqCst);
    db.execute("SELECT pg_advisory_unlock(42)");
    wait_for("the COMMIT", || db.count("host_metrics") == 1);

    let (flushed, mut store) = flushing.join().unwrap();
    retry(flushed);
    proxy.is_deaf.store(false, Ordering::SeqCst);
    store.open().unwrap();
    assert_eq!(positions(&mut store, &[P0]), [(P0, 1)]);
    assert_eq!(store.flush(&batch).unwrap(), Flushed::Fenced);
    assert_eq!(db.count("host_metrics"), 1);
}

#[test]
fn a_connection_that_swallows_everything_is_given_up_within_the_bound() {
    let db = Database::new();
    let proxy = Proxy::start(server().port());
    let mut config = db.config();
    config.database.port = proxy.port;
    let bounds = Bounds {
        step: Duration::from_secs(3),
        connect: Duration::from_secs(1),
        ..Bounds::default()
    };
    db.store().open().unwrap();
    let mut store = Store::with_bounds(&config, bounds).unwrap();
    store.open().unwrap();
    start_at(&mut store, &[(P0, 0)]);
    proxy.is_mute.store(true, Ordering::SeqCst);
    proxy.is_deaf.store(true, Ordering::SeqCst);
    let began = scratch::now();
    let text = retry(store.positions(&[P0], &BTreeMap::new()));
    assert!(text.contains("no answer within 3 s"), "{text}");
    // A new connection gets no answer either.
    retry(store.open());
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
    // A lost connection is not used again.
    retry(store.flush(&batch));
    retry(store.positions(&[P0], &BTreeMap::new()));

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

    // 55P03: another transaction locks our position.
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

    // 57014: our statement was cancelled.
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
    let text = retry(Store::new(&few).unwrap().open());
    assert!(text.contains("53300"), "{text}");

    // After all of these the batch is written once.
    store.open().unwrap();
    assert_eq!(store.flush(&batch).unwrap(), Flushed::Durable);
    assert_eq!(db.count("host_metrics"), 1);
}

#[test]
fn a_store_survives_a_crash_of_the_server() {
    let own = ThrowAwayPostgres::start().unwrap();
    let mut store = Store::new(&config(&own, own.database(), "m")).unwrap();
    let layout = store.open().unwrap();
    start_at(&mut store, &[(P0, 0)]);
    let mut batch = Batch::default();
    row(&mut batch, &layout, P0, 0, 0, &ok("https://a.example/"));
    own.stop_immediately().unwrap();
    retry(store.flush(&batch));
    let text = retry(store.open());
    assert!(text.contains(&format!("127.0.0.1:{}", own.port())), "{text}");
    own.start_again().unwrap();
    wait_for("the server to take us again", || store.open().is_ok());
    assert_eq!(store.flush(&batch).unwrap(), Flushed::Durable);
}

/// Opens the store while its old backend is frozen, which asks for the end of that backend, and then lets the backend continue.
fn reopened(mut store: Store, frozen: &Thaw) -> Store {
    store.open().unwrap();
    signal(&frozen.0, "CONT");
    store
}
