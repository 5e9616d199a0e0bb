//! A table that the user created.

use host_metrics::consume::batch::Batch;
use host_metrics::consume::batch::Flushed;
use host_metrics::consume::store::Store;

use super::{P0, fatal, ok, row, start_at, with_one_row};
use crate::database::Database;

#[test]
fn an_existing_table_is_written_as_it_is() {
    // The SQL, DB_TABLE, the columns that are read at the end, and their values.
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
            // The table is found in the search path, not in the schema of new tables. The other tables are created next to it.
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
        assert_eq!(store.flush(&batch).unwrap(), Flushed::Durable, "{sql}");
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
    // The table is found in that path too.
    let mut store = db.store_of("checks");
    let layout = store.open().unwrap();
    start_at(&mut store, &[(P0, 0)]);
    for offset in 0..3 {
        let mut batch = Batch::default();
        row(&mut batch, &layout, P0, offset, offset, &ok("https://a.example/"));
        assert_eq!(store.flush(&batch).unwrap(), Flushed::Durable);
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
    ] {
        let mut db = Database::new();
        db.execute(sql);
        let text = fatal(db.store_of("m").open());
        for words in expected {
            assert!(text.contains(words), "{sql}: {text}");
        }
    }
}

#[test]
fn a_view_without_a_trigger_stops_at_the_first_row_with_what_to_do() {
    let mut db = Database::new();
    db.execute("CREATE TABLE t (address text); CREATE VIEW m AS SELECT * FROM t");
    let (mut store, batch) = with_one_row(&db, "m");
    let text = fatal(store.flush(&batch));
    assert!(text.contains("INSTEAD OF INSERT"), "{text}");
}

#[test]
fn a_table_that_changes_during_a_run_stops_with_what_to_do() {
    let mut db = Database::new();
    db.execute("CREATE TABLE m (address text, is_valid boolean)");
    let (mut store, batch) = with_one_row(&db, "m");
    db.execute("ALTER TABLE m RENAME TO elsewhere");
    let text = fatal(store.flush(&batch));
    assert!(
        text.contains("42P01") && text.contains("host-metrics init"),
        "{text}"
    );
    db.execute("ALTER TABLE elsewhere RENAME TO m; DROP TABLE m_rejected");
    let text = fatal(db.store_without_create("m").open());
    assert!(
        text.contains("\"m_rejected\" does not exist: run `host-metrics init`"),
        "{text}"
    );
}
