//! If other users can create objects in a schema of the search path, neither our objects nor our queries use any of them.

use std::time::Duration;

use host_metrics::commands::{init, status};
use host_metrics::config::{StateConfig, StatusConfig};
use host_metrics::consume::batch::Flushed;
use host_metrics::consume::batch::{Batch, NextOffset};
use host_metrics::consume::store::Store;
use host_metrics::sample::Sample;
use host_metrics::tables::names::TableName;
use host_metrics::tables::{days, schema};

use crate::database::Database;
use crate::state::{batch as batch_of_samples, state_store};
use crate::store::{P0, at_day, ok, reject, row, start_at};

/// Fills the schema `planted`, the first one in every search path, with look-alikes of everything in `pg_catalog`. Any use of
/// one fails. There are functions (also for aggregates and window functions) and operators, with the same arguments and with
/// arguments that fit better than polymorphic ones or literals, and types and tables.
const PLANT: &str = r#"
CREATE SCHEMA planted;
SET search_path = pg_catalog;
DO $$
DECLARE
    one record;
    body text := 'BEGIN RAISE EXCEPTION ''a planted function was called''; END';
    common text[] := ARRAY['oid', 'regclass', 'name', 'text', '"char"', 'integer', 'bigint', 'boolean', 'smallint',
                           'double precision', 'numeric', 'timestamptz', 'interval'];
BEGIN
    FOR one IN
        WITH functions AS (
            SELECT proname, prorettype, proretset,
                ARRAY(SELECT format_type(t, NULL) FROM unnest(proargtypes::oid[]) WITH ORDINALITY a (t, n) ORDER BY n) AS arguments
            FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace AND pronargs <= 6
        )
        SELECT DISTINCT proname, which, CASE which
                WHEN 'text' THEN array_to_string(array_fill('text'::text, ARRAY[cardinality(arguments)]), ', ')
                WHEN 'same' THEN replace(array_to_string(arguments, ', '), '"any"', 'anyelement')
                ELSE regexp_replace(regexp_replace(array_to_string(arguments, ', '), 'any[a-z]*array', which || '[]', 'g'),
                    'any(element|nonarray|compatible|compatiblenonarray)\M|"any"', which, 'g')
            END AS arguments,
            CASE WHEN which = 'same' THEN
                CASE WHEN proretset THEN 'SETOF ' ELSE '' END || format_type(prorettype, NULL) ELSE 'text' END AS result
        FROM functions, unnest(ARRAY['same', 'text', 'bigint', 'timestamptz', 'double precision']) which
        WHERE which IN ('same', 'text') OR array_to_string(arguments, ', ') ~ '\many|"any"'
        ORDER BY which
    LOOP
        BEGIN
            EXECUTE format('CREATE FUNCTION planted.%I(%s) RETURNS %s LANGUAGE plpgsql AS %L',
                one.proname, one.arguments, one.result, body);
        EXCEPTION WHEN OTHERS THEN -- of internal types, or there already
        END;
    END LOOP;
    FOR one IN
        SELECT oprname, format_type(oprleft, NULL) AS l, format_type(oprright, NULL) AS r, format_type(oprresult, NULL) AS result
        FROM pg_operator WHERE oprleft <> 0
        UNION
        SELECT o, l, r, 'boolean' FROM unnest(ARRAY['=', '<>', '<', '<=', '>', '>=', '+', '-', '*', '/', '%', '||', '&', '~']) o,
            unnest(common) l, unnest(common) r
        ORDER BY 4 DESC
    LOOP
        BEGIN
            EXECUTE format('CREATE OR REPLACE FUNCTION planted.%I(%s, %s) RETURNS %s LANGUAGE plpgsql AS %L',
                'operator_' || one.result, one.l, one.r, one.result, body);
            EXECUTE format('CREATE OPERATOR planted.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = planted.%I)',
                one.oprname, one.l, one.r, 'operator_' || one.result);
        EXCEPTION WHEN OTHERS THEN
        END;
    END LOOP;
    FOR one IN SELECT relname FROM pg_class WHERE relnamespace = 'pg_catalog'::regnamespace AND relkind IN ('r', 'v') LOOP
        EXECUTE format('CREATE TABLE planted.%I (planted integer)', one.relname);
    END LOOP;
    FOR one IN SELECT typname FROM pg_type WHERE typnamespace = 'pg_catalog'::regnamespace AND typtype = 'b' AND typelem = 0 LOOP
        EXECUTE format('CREATE DOMAIN planted.%I AS pg_catalog.%I CHECK (false)', one.typname, one.typname);
    END LOOP;
END
$$;
"#;

/// Our objects that use a planted one.
const BOUND: &str = "SELECT pg_describe_object(classid, objid, objsubid) || ' uses ' || \
        pg_describe_object(refclassid, refobjid, refobjsubid) \
    FROM pg_depend d CROSS JOIN LATERAL pg_identify_object(refclassid, refobjid, refobjsubid) used \
    LEFT JOIN pg_constraint c ON classid = 'pg_constraint'::regclass AND c.oid = objid \
    WHERE used.schema = 'planted' AND refclassid <> 'pg_namespace'::regclass \
        AND classid NOT IN ('pg_proc'::regclass, 'pg_operator'::regclass, 'pg_type'::regclass) \
        AND coalesce(c.contypid, 0) = 0 AND deptype = 'n'";

fn planted_database() -> Database {
    let mut db = Database::new();
    db.execute(PLANT);
    db.execute(&format!(
        "CREATE SCHEMA postgres; ALTER DATABASE {} SET search_path = \"$user\", planted, pg_catalog, public",
        db.name
    ));
    // The planted objects work: using them fails.
    let mut victim = Database::again(&db.name);
    for sql in [
        "SELECT array_agg(relname) FROM pg_catalog.pg_class",
        "SELECT count(*) FROM pg_catalog.pg_class",
        "SELECT 1 = 1",
        "SELECT 'x'::text",
        "SELECT date_bin('1 hour', current_timestamp, timestamp with time zone '2000-01-01')",
        "SELECT relname FROM pg_class",
    ] {
        assert!(victim.client.batch_execute(sql).is_err(), "{sql}");
    }
    db
}

#[test]
fn objects_that_others_planted_are_neither_used_nor_called() {
    let mut db = planted_database();
    db.execute("SET search_path = pg_catalog, postgres");
    let mut config = db.config();
    config.retention = Some(Duration::from_secs(5 * 86_400));
    init::make_tables(&config.database).unwrap();
    assert_eq!(
        db.count("pg_class WHERE oid = 'postgres.host_metrics_certificates'::regclass"),
        1
    );

    // Rows of several days, refused rows, a day that is created later, and positions that are read again on a new connection.
    let today = days::today();
    let mut store = Store::new(&config).unwrap();
    let layout = store.open().unwrap();
    start_at(&mut store, &[(P0, 0)]);
    let flush = |store: &mut Store, first: i64| {
        let mut batch = Batch::default();
        for (offset, day) in (first..).zip([-8, -2, -1, 0, 9]) {
            let mut sample = ok("https://a.example/");
            sample.scheduled_at = Some(at_day(today, day));
            row(&mut batch, &layout, P0, first, offset, &sample);
        }
        reject(&mut batch, P0, first, first + 5, None, Some(b"{"), "no JSON");
        assert_eq!(store.flush(&batch).unwrap(), Flushed::Durable);
    };
    flush(&mut store, 0);
    store.maintain(at_day(today, 2)).unwrap();
    db.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'host-metrics'",
    );
    assert!(store.positions(&[P0], &Default::default()).is_err());
    store.open().unwrap();
    start_at(&mut store, &[(P0, 6)]);
    flush(&mut store, 6);

    // The state is written twice.
    let mut state = state_store(&db, "host_metrics", StateConfig::default());
    state.open().unwrap();
    let tomorrow = |address: &str| Sample {
        scheduled_at: Some(at_day(today, 1)),
        ..ok(address)
    };
    let samples = [
        tomorrow("https://a.example/"),
        Sample {
            outcome: Some("dns_error".into()),
            is_valid: false,
            ..tomorrow("https://b.example/")
        },
    ];
    state.positions(&[P0], &[(P0, NextOffset(0))].into()).unwrap();
    for base in [0, 2] {
        assert_eq!(
            state.flush(&batch_of_samples(P0, base, &samples)).unwrap(),
            Flushed::Durable
        );
    }
    state.maintain(at_day(today, 2)).unwrap();
    flush(&mut store, 12);
    let report = status::run(&StatusConfig {
        database: config.database.clone(),
        kafka: None,
        topics: vec!["t".into()],
        group_id: "g".into(),
        is_state_on: true,
    });
    assert!(!report.unwrap().stale);
    for view in ["latest", "uptime", "latency", "incidents", "certificates"] {
        db.count(&format!("host_metrics_{view}"));
    }
    assert_eq!(db.many(BOUND), Vec::<String>::new());

    let found = "SELECT count(*)::text FROM pg_class WHERE relnamespace = 'postgres'::regnamespace";
    assert_ne!(db.one(found), "0");
    init::drop(&db.init_config(), false, true).unwrap();
    assert_eq!(db.one(found), "0");
}

#[test]
fn the_printed_sql_uses_no_planted_object_and_keeps_the_search_path() {
    let mut db = planted_database();
    let table = TableName {
        schema: Some("postgres".into()),
        name: "host_metrics".into(),
    };
    let mut dba = Database::again(&db.name);
    dba.execute(&schema::script(&table, days::today()));
    dba.execute(&schema::script(&table, days::today()));
    let path = dba.client.simple_query("SHOW search_path").unwrap();
    let path = path.iter().find_map(|message| match message {
        postgres::SimpleQueryMessage::Row(row) => row.get(0),
        _ => None,
    });
    assert_eq!(path, Some("\"$user\", planted, pg_catalog, public"));
    db.execute("SET search_path = pg_catalog");
    assert_eq!(db.many(BOUND), Vec::<String>::new());
}
