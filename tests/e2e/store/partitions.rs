//! Partitions by day, and retention.

use std::time::Duration;

use host_metrics::consume::batch::Batch;
use host_metrics::consume::batch::Flushed;
use host_metrics::consume::store::Store;
use host_metrics::tables::days;

use super::{P0, at_day, ok, row, start_at};
use crate::database::Database;
use crate::scratch;

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
    assert_eq!(store.flush(&batch).unwrap(), Flushed::Durable);
    assert_eq!(db.count("host_metrics_default"), 5);
    let partition = |days: i64| format!("host_metrics{}", today.plus(days).suffix());
    assert_eq!(db.count(&partition(7)), 1);

    // Two days later, two more days are created, and their rows in the default partition move there.
    store.maintain(later(2)).unwrap();
    assert_eq!((db.count(&partition(8)), db.count(&partition(9))), (2, 1));
    assert_eq!(db.count("host_metrics_default"), 2);
    assert_eq!(db.count("host_metrics"), 8);
    // The new days have the same indexes as the old ones.
    assert_eq!(
        db.count(&format!("pg_indexes WHERE tablename = '{}'", partition(8))),
        1
    );

    // A day cannot be created while another transaction uses the default partition. That is logged and not waited for, and rows go
    // to the default partition.
    for uses in ["SELECT * FROM", "LOCK TABLE"] {
        db.execute(&format!("BEGIN; {uses} host_metrics_default"));
        let began = scratch::now();
        store.maintain(later(3)).unwrap();
        assert!(began.elapsed() < Duration::from_secs(5), "{uses}");
        db.execute("COMMIT");
    }
    assert_eq!(
        db.count(&format!("pg_class WHERE relname = '{}'", partition(10))),
        0
    );
    let mut next = Batch::default();
    let mut sample = ok("https://a.example/");
    sample.scheduled_at = Some(later(10));
    row(&mut next, &layout, P0, 8, 8, &sample);
    assert_eq!(store.flush(&next).unwrap(), Flushed::Durable);
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
    // The table was created with a week before today, and open() immediately dropped the days that are too old.
    assert_eq!(
        (exists(&mut db, -4), exists(&mut db, -3), exists(&mut db, 0)),
        (0, 1, 1)
    );

    // During another writer's transaction, the drop gives up, and no other writer has to wait for it.
    db.execute("BEGIN; INSERT INTO host_metrics (address, is_valid, scheduled_at) VALUES ('x', true, now())");
    store.maintain(at_day(today, 1)).unwrap();
    let mut batch = Batch::default();
    row(&mut batch, &layout, P0, 0, 0, &ok("https://a.example/"));
    let began = scratch::now();
    assert_eq!(store.flush(&batch).unwrap(), Flushed::Durable);
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
    // More rows of days without a partition than one statement removes, and one row without a time.
    db.execute(
        "INSERT INTO host_metrics (address, is_valid, scheduled_at) \
         SELECT 'https://a.example/', true, date_trunc('day', now(), 'UTC') - interval '1 second' - n * interval '1 day' \
         FROM generate_series(20, 60) n, generate_series(1, 600); \
         INSERT INTO host_metrics (address, is_valid) VALUES ('https://a.example/', true)",
    );
    assert_eq!(db.count("host_metrics_default"), 41 * 600 + 1);

    // One transaction locks an old row and another one writes. Retention does not wait for them, and they do not wait for it.
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
    assert_eq!(store.flush(&batch).unwrap(), Flushed::Durable);
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    db.execute("COMMIT");
    // Retention drops whole days: the thirtieth day before today and all later days stay.
    let older = "host_metrics WHERE scheduled_at < date_trunc('day', now(), 'UTC') - interval '30 days'";
    assert_eq!(db.count(older), 1);
    store.maintain(at_day(days::today(), 0)).unwrap();
    assert_eq!(db.count(older), 0);
    assert_eq!(db.count("host_metrics_default"), 10 * 600 + 3);
}
