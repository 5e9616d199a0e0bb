//! A flush: rows, rejected records and positions are stored together or not at all.

use host_metrics::consume::batch::Flushed;
use host_metrics::consume::batch::{Batch, Partition};
use host_metrics::consume::store::Store;
use host_metrics::sample::{Sample, Timestamp};

use super::{P0, P1, P2, ok, positions, reject, row, start_at};
use crate::database::Database;

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
    assert_eq!(store.flush(&batch).unwrap(), Flushed::Durable);

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
fn a_server_that_may_lose_commits_does_not_lose_those_of_a_flush() {
    for (of_the_server, of_the_flush) in [
        ("off", "on"),
        ("local", "local"),
        ("remote_apply", "remote_apply"),
    ] {
        let mut db = Database::new();
        db.execute(&format!(
            "ALTER DATABASE {} SET synchronous_commit = {of_the_server}",
            db.name
        ));
        let mut store = db.store();
        let layout = store.open().unwrap();
        start_at(&mut store, &[(P0, 0)]);
        db.execute(
            "CREATE TABLE seen (setting text);
             CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 INSERT INTO public.seen SELECT pg_catalog.current_setting('synchronous_commit'); RETURN NEW;
             END $$;
             CREATE TRIGGER see BEFORE INSERT ON host_metrics FOR EACH ROW EXECUTE FUNCTION see()",
        );
        let mut batch = Batch::default();
        row(&mut batch, &layout, P0, 0, 0, &ok("https://a.example/"));
        assert_eq!(store.flush(&batch).unwrap(), Flushed::Durable);
        assert_eq!(db.one("SELECT setting FROM seen"), of_the_flush);
    }
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
    assert_eq!(theirs.flush(&first).unwrap(), Flushed::Durable);
    let mut stale = Batch::default();
    row(&mut stale, &layout, P0, 0, 0, &ok("https://b.example/"));
    row(&mut stale, &layout, P1, 0, 0, &ok("https://a.example/"));
    reject(&mut stale, P1, 0, 1, None, None, "empty");
    assert_eq!(mine.flush(&stale).unwrap(), Flushed::Fenced);

    assert_eq!(db.count("host_metrics"), 1);
    assert_eq!(db.count("host_metrics_rejected"), 0);
    assert_eq!(positions(&mut mine, &[P0, P1]), [(P0, 0), (P1, 1)]);
    // The connection still works.
    stale.forget(P1);
    assert_eq!(mine.flush(&stale).unwrap(), Flushed::Durable);
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
    assert_eq!(store.flush(&only_rejected).unwrap(), Flushed::Durable);

    // Two partitions alternate, and one of them is revoked before the flush, so the bytes of every other row are left out. The rows
    // do not fit into one chunk of the COPY.
    let mut holes = Batch::default();
    for offset in 0..2_000 {
        let sample = ok(&format!("https://{offset}.example/{}", "x".repeat(200)));
        row(&mut holes, &layout, P0, 1, offset + 1, &sample);
        row(&mut holes, &layout, P1, 0, offset, &sample);
    }
    holes.forget(P0);
    assert_eq!(store.flush(&holes).unwrap(), Flushed::Durable);
    assert_eq!(db.count("host_metrics"), 2_000);
    assert_eq!(
        db.one("SELECT concat(count(DISTINCT address), ' ', sum(kafka_offset)) FROM host_metrics WHERE kafka_partition = 1"),
        "2000 1999000"
    );

    // A position that moves over a gap at the end of the partition, without a record.
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
    assert_eq!(store.flush(&moves).unwrap(), Flushed::Durable);
    assert_eq!(positions(&mut store, &[P0, P1]), [(P0, 1), (P1, 2_005)]);
    assert_eq!(db.count("host_metrics_rejected"), 1);
}

#[test]
fn a_missing_position_is_added_and_an_existing_one_is_not_changed() {
    let mut db = Database::new();
    let (mut mine, mut theirs) = (db.store(), db.store());
    mine.open().unwrap();
    theirs.open().unwrap();
    assert_eq!(positions(&mut mine, &[P0, P1]), []);
    start_at(&mut mine, &[(P0, 5)]);
    start_at(&mut theirs, &[(P0, 3), (P1, 7)]);
    assert_eq!(positions(&mut mine, &[P0, P1]), [(P0, 5), (P1, 7)]);
    // Another topic and another group have their own positions.
    let elsewhere = Partition { topic: "u", ..P0 };
    assert_eq!(positions(&mut mine, &[elsewhere]), []);
    let mut other = db.config();
    other.group_id = "h".into();
    let mut other = Store::new(&other).unwrap();
    other.open().unwrap();
    assert_eq!(positions(&mut other, &[P0, P1]), []);
    assert_eq!(db.count("host_metrics_offsets"), 2);
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
        slow: Some(true),
        name: None,
        group: None,
        agent: Some("agent-1".into()),
        epoch: None,
    }
}
