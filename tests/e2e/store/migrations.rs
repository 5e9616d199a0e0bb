//! Creating, migrating and dropping tables.

use std::thread;

use host_metrics::commands::init;
use host_metrics::config::{DatabaseConfig, WrongInput};
use host_metrics::consume::batch::Batch;
use host_metrics::consume::batch::Flushed;
use host_metrics::postgres::{self as bounded, Bounds, Session};
use host_metrics::tables::names::Object;
use host_metrics::tables::schema;
use host_metrics::tables::{days, migrate};

use super::{P0, ok, row, start_at};
use crate::database::Database;

#[test]
fn tables_are_made_once_by_many_at_the_same_time() {
    let mut db = Database::new();
    // All have connected before the first one begins.
    let makers_ready = std::sync::Arc::new(std::sync::Barrier::new(6));
    let makers: Vec<_> = (0..6)
        .map(|_| {
            let (config, ready) = (db.config().database, std::sync::Arc::clone(&makers_ready));
            thread::spawn(move || {
                bounded::runtime().unwrap().block_on(async {
                    let session = Session::open(&config, Bounds::default()).await?;
                    ready.wait();
                    migrate::make(&session, days::today()).await
                })
            })
        })
        .collect();
    let made: Vec<usize> = makers
        .into_iter()
        .map(|maker| maker.join().unwrap().unwrap().made.len())
        .collect();
    assert_eq!(made.iter().sum::<usize>(), Object::ALL.len(), "{made:?}");
    // A consumer then has nothing to create.
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
    // Today, a week before and a week after, and the default partition.
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
    // `consume` uses them like those of `init`.
    by_print.store().open().unwrap();
}

/// An invented second version, with one more column that has a value in every row, and a third version that fails halfway.
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
    bounded::runtime().unwrap().block_on(async {
        let session = Session::open(config, Bounds::default()).await?;
        migrate::migrate(&session, steps).await
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
    // The second of two simultaneous runs finds that the step was taken. Taking it twice would fail.
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

    // After a step that fails, the previous version is unchanged.
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
    assert_eq!(store.flush(&batch).unwrap(), Flushed::Durable);
    assert_eq!((db.one(VERSIONS).as_str(), db.count("host_metrics")), ("1", 1));
}

#[test]
fn objects_of_a_newer_version_are_left_alone() {
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
    // Rows can be written to it.
    start_at(&mut store, &[(P0, 0)]);
    let mut batch = Batch::default();
    row(&mut batch, &layout, P0, 0, 0, &ok("https://a.example/"));
    assert_eq!(store.flush(&batch).unwrap(), Flushed::Durable);
    assert_eq!(db.count("host_metrics"), 1);
}

#[test]
fn drop_removes_only_what_init_made() {
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

    // A view of another user depends on our table, so nothing is dropped.
    db.execute("CREATE VIEW upon AS SELECT * FROM host_metrics_latest");
    let refused = init::drop(&config, false, true).unwrap_err();
    assert!(format!("{refused:#}").contains("upon"), "{refused:#}");
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

/// The versions in the comments of all objects.
const VERSIONS: &str = "SELECT string_agg(DISTINCT substring(obj_description(oid, 'pg_class') FROM 'schema (\\d+):'), ',') \
                        FROM pg_class WHERE relnamespace = 'public'::regnamespace";
