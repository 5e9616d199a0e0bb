//! Rows that Postgres refuses: exactly these are found.

use host_metrics::consume::batch::Batch;
use host_metrics::consume::batch::Flushed;

use super::{P0, fatal, ok, positions, retry, row, start_at, with_one_row};
use crate::database::Database;

/// Postgres's name of the fault, the SQL that causes it, and which of the offsets 0 to 99 it refuses.
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
            // Addresses of 20 bytes, except ten of 21, and one row without a latency.
            let address = match offset {
                10..20 => format!("https://1{offset:04}.example"),
                _ => format!("https://{offset:04}.example"),
            };
            let mut sample = ok(&address);
            sample.latency = (offset != 7).then_some(0.1);
            row(&mut batch, &layout, P0, 0, offset, &sample);
        }
        let found = poisoned(store.flush(&batch).unwrap());
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
        assert_eq!(store.flush(&batch).unwrap(), Flushed::Durable, "{sql}");
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
fn a_batch_with_only_refused_rows_is_drained_in_few_calls() {
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
        match store.flush(&batch).unwrap() {
            Flushed::Durable => break,
            Flushed::Refused(found) => {
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
fn a_table_that_refuses_every_copy_stops_with_what_to_do_and_rejects_no_row() {
    let mut db = Database::new();
    db.execute(
        "CREATE TABLE m (address text, is_valid boolean); \
         CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''closed for the night''; END'; \
         CREATE TRIGGER t BEFORE INSERT ON m FOR EACH STATEMENT EXECUTE FUNCTION f()",
    );
    let (mut store, batch) = with_one_row(&db, "m");
    let text = fatal(store.flush(&batch));
    assert!(
        text.contains("\"m\" refuses every COPY: closed for the night"),
        "{text}"
    );
    assert_eq!((db.count("m"), db.count("m_rejected")), (0, 0));
}

#[test]
fn a_refusal_that_does_not_repeat_row_by_row_names_no_row() {
    let mut db = Database::new();
    // Refuses every second COPY, by a sequence, which a rollback does not reset.
    db.execute(
        "CREATE TABLE m (address text, is_valid boolean); CREATE SEQUENCE s; \
         CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS \
         'BEGIN IF nextval(''s'') = 1 THEN RAISE ''not now''; END IF; RETURN NULL; END'; \
         CREATE TRIGGER t AFTER INSERT ON m FOR EACH STATEMENT EXECUTE FUNCTION f()",
    );
    let (mut store, batch) = with_one_row(&db, "m");
    let text = retry(store.flush(&batch));
    assert!(
        text.contains("not now") && text.contains("did not happen again"),
        "{text}"
    );
    store.open().unwrap();
    assert_eq!(store.flush(&batch).unwrap(), Flushed::Durable);
    assert_eq!((db.count("m"), db.count("m_rejected")), (1, 0));
}

fn poisoned(flushed: Flushed) -> Vec<(usize, String)> {
    match flushed {
        Flushed::Refused(found) => found,
        other => panic!("{other:?}"),
    }
}
