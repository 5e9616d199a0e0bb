//! The views against what the rows say, with and without sums of finished days; and that those sums are right whoever writes.

use std::thread;
use std::time::Duration;

use host_metrics::commands::init;
use host_metrics::consume::batch::Batch;
use host_metrics::consume::store::Flushed;
use host_metrics::tables::days;
use host_metrics::tables::schema::{self, Day};
use host_metrics::tables::sums::{self, Pass, Sums, Within};

use crate::database::Database;
use crate::scratch;
use crate::store::{P0, at_day, ok, row as row_of, start_at};

#[test]
fn the_views_say_what_the_rows_say() {
    let mut db = Database::new();
    db.store().open().unwrap();
    // Two hosts, a tick a minute, the newest a minute ago: a is down for ticks 6..=8 and misses tick 7; it was down at
    // tick 29 and 30, the oldest, and was not seen at ticks 12 and 13. b is plain http and always up.
    db.execute(
        "INSERT INTO host_metrics (address, scheduled_at, is_valid, outcome, interval_seconds, cert_expires_at) \
         SELECT 'https://a.example/', now() - n * interval '1 minute', n NOT IN (6, 7, 8, 12, 13, 29, 30), \
                CASE WHEN n = 7 THEN 'missed' WHEN n = 12 THEN 'agent_error' WHEN n = 13 THEN 'agent_offline' WHEN n IN (6, 30) THEN 'tls_timeout' WHEN n IN (8, 29) THEN 'dns_error' \
                     ELSE 'ok' END, 60, \
                CASE WHEN n NOT IN (6, 7, 8) THEN now() + interval '10 days 1 hour' END \
         FROM generate_series(1, 30) n; \
         INSERT INTO host_metrics (address, scheduled_at, is_valid, outcome, interval_seconds) \
         SELECT 'http://b.example/', now() - n * interval '1 minute', true, 'ok', 60 FROM generate_series(1, 90) n",
    );
    assert_eq!(
        db.many(
            "SELECT concat_ws('|', address, is_valid, round(extract(epoch FROM now() - scheduled_at) / 60)) \
             FROM host_metrics_latest ORDER BY address"
        ),
        ["http://b.example/|t|1", "https://a.example/|t|1"]
    );
    assert_eq!(
        db.many(
            "SELECT concat_ws('|', address, due_1h, valid_1h, missed_1h, round(uptime_1h::numeric, 4), due_24h, \
             round(uptime_7d::numeric, 4)) FROM host_metrics_uptime ORDER BY address"
        ),
        ["http://b.example/|59|59|0|1.0000|90|1.0000", "https://a.example/|30|23|3|0.8519|30|0.8519"]
    );
    assert_eq!(
        db.many(
            "SELECT concat_ws('|', address, round(extract(epoch FROM now() - started_at) / 60), \
             round(extract(epoch FROM now() - ended_at) / 60), round(extract(epoch FROM duration) / 60), checks, \
             first_outcome, most_frequent_outcome) FROM host_metrics_incidents ORDER BY started_at"
        ),
        [
            "https://a.example/|30|28|2|2|tls_timeout|dns_error",
            "https://a.example/|8|5|3|2|dns_error|dns_error"
        ]
    );
    assert_eq!(
        db.many("SELECT concat_ws('|', address, days_left) FROM host_metrics_certificates"),
        ["https://a.example/|10"]
    );
    // Down now: the outage has no end, and the certificate is the one last seen.
    db.execute(
        "INSERT INTO host_metrics (address, scheduled_at, is_valid, outcome, interval_seconds) \
         VALUES ('https://a.example/', now(), false, 'connect_refused', 60)",
    );
    assert_eq!(
        db.one("SELECT concat_ws('|', first_outcome, coalesce(ended_at::text, 'open')) FROM host_metrics_incidents \
                ORDER BY started_at DESC LIMIT 1"),
        "connect_refused|open"
    );
    assert_eq!(
        db.many("SELECT concat_ws('|', address, days_left) FROM host_metrics_certificates"),
        ["https://a.example/|10"]
    );
}

/// Each view against its definition in the plainest SQL, which looks every row up for every other one: with all days raw, with
/// all finished ones summed up, with rows that came, went and changed after that, and with the live day summed up too.
#[test]
fn the_views_are_their_plain_definitions_on_random_rows() {
    let mut db = Database::new();
    db.store().open().unwrap();
    let today = days::today();
    for seed in 1..=3 {
        db.execute(&random_rows(seed));
        db.check_views(&format!("seed {seed}, no sums"));

        let pass = db.sum_up(today);
        assert!(pass.counted >= 7 && pass.left == 0, "{pass:?}");
        db.check_views(&format!("seed {seed}, summed up"));

        // Three of the finished days change, one of them by rows that go.
        db.execute(
            "INSERT INTO host_metrics (address, agent, scheduled_at, is_valid, outcome) \
             SELECT address, 'late', scheduled_at + interval '7 seconds', n % 3 = 0, \
                    CASE WHEN n % 3 = 0 THEN 'ok' WHEN n % 6 = 1 THEN 'missed' WHEN n % 6 = 4 THEN 'agent_error' ELSE 'dns_timeout' END \
             FROM (SELECT *, row_number() OVER () AS n FROM host_metrics \
                   WHERE scheduled_at::date = (now() - interval '2 days')::date ORDER BY scheduled_at, address LIMIT 200) t; \
             DELETE FROM host_metrics WHERE scheduled_at::date = (now() - interval '4 days')::date AND is_valid \
                 AND hashtext(address) % 2 = 0; \
             UPDATE host_metrics SET is_valid = NOT is_valid WHERE scheduled_at::date = (now() - interval '5 days')::date \
                 AND coalesce(outcome, '') NOT IN ('missed', 'agent_error', 'agent_offline')",
        );
        let changed =
            "host_metrics_days WHERE \"partition\" IN (SELECT \"partition\" FROM host_metrics_changes)";
        assert!(db.count(changed) >= 2, "seed {seed}");
        db.check_views(&format!("seed {seed}, changed"));

        // The consumer's clock is ahead of the database's: sums of a day that is not over there.
        db.sum_up(today.plus(2));
        assert_eq!(db.count(changed), 0);
        db.check_views(&format!("seed {seed}, summed up with the live day"));

        // A hole in the middle, and one at the end.
        let hole = |which: &str| {
            format!(
                "INSERT INTO host_metrics_changes SELECT \"partition\", pg_current_xact_id() FROM host_metrics_days WHERE {which}"
            )
        };
        db.execute(&hole("starts_at::date = (now() - interval '3 days')::date"));
        db.check_views(&format!("seed {seed}, a hole"));
        db.execute(&hole("ends_at > now() - interval '1 day'"));
        db.check_views(&format!("seed {seed}, old days only"));
    }
}

#[test]
fn a_row_of_a_finished_day_makes_its_sums_void_in_the_same_transaction_whoever_writes_it() {
    let mut db = Database::new();
    db.store().open().unwrap();
    let today = days::today();
    let day = |n: i64| format!("host_metrics{}", today.plus(-n).suffix());
    let at = |n: i64| format!("(timestamptz {} + interval '1 hour')", today.plus(-n).begin());
    let row = |n: i64| {
        let at = at(n);
        format!(
            "INSERT INTO public.host_metrics (address, scheduled_at, is_valid) VALUES ('https://a.example/', {at}, true)"
        )
    };
    (1..=7).for_each(|n| db.execute(&row(n)));
    let pass = |counted, left, is_hindered| Pass {
        counted,
        left,
        is_hindered,
    };
    assert_eq!(db.sum_up(today), pass(7, 0, false));
    assert_eq!(db.sum_up(today), pass(0, 0, false));
    assert_eq!(db.counted_days(today), [true; 7]);

    // A consumer with no rights but the contract's.
    let mut store = db.store_without_create("host_metrics");
    let user = format!("poor_{}", db.name);
    db.execute(&format!(
        "GRANT INSERT ON host_metrics, host_metrics_rejected TO {user}; \
         GRANT SELECT, INSERT, UPDATE ON host_metrics_offsets TO {user}"
    ));
    let layout = store.open().unwrap();
    start_at(&mut store, &[(P0, 0)]);
    let mut late = ok("https://a.example/");
    late.scheduled_at = Some(at_day(today, -1));
    let mut batch = Batch::default();
    row_of(&mut batch, &layout, P0, 0, 0, &late);
    assert_eq!(store.flush(&batch), Flushed::Durable);
    // It may not count, and not even look.
    let mut poor = db.config().database;
    poor.user = user;
    let looked = sums::count(&poor, today, Within::default()).unwrap();
    assert_eq!(looked, pass(0, 0, true));

    // Somebody's delete; a replication; a truncation; somebody without any search path, and with a table of the same name.
    db.execute(&format!(
        "DELETE FROM host_metrics WHERE scheduled_at = {}",
        at(2)
    ));
    db.execute(&format!(
        "SET session_replication_role = replica; {}; RESET session_replication_role",
        row(3)
    ));
    db.execute(&format!("TRUNCATE {}", day(4)));
    db.execute(&format!(
        "CREATE TEMP TABLE host_metrics_changes (\"partition\" regclass, xact xid8); SET search_path = ''; {}; \
         RESET search_path; DROP TABLE pg_temp.host_metrics_changes",
        row(5)
    ));
    // A rollback, of all or of a part, changes nothing.
    db.execute(&format!("BEGIN; {}; ROLLBACK", row(6)));
    db.execute(&format!("BEGIN; SAVEPOINT a; {}; ROLLBACK TO a; COMMIT", row(6)));
    assert_eq!(
        db.counted_days(today),
        [false, false, false, false, false, true, true]
    );
    // One whose snapshot is older than the count.
    let mut old = Database::again(&db.name);
    old.execute("BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT FROM host_metrics_offsets");
    assert_eq!(db.sum_up(today), pass(5, 0, false));
    assert_eq!(db.counted_days(today), [true; 7]);
    old.execute(&format!("{}; COMMIT", row(5)));
    assert_eq!(
        db.counted_days(today),
        [true, true, true, true, false, true, true]
    );

    // Whoever has changed a finished day and not ended yet keeps no other writer waiting, in whatever order.
    old.execute(&format!("BEGIN; {}; {}", row(1), row(2)));
    db.execute(&format!(
        "SET lock_timeout = '1s'; BEGIN; {}; {}; COMMIT",
        row(2),
        row(1)
    ));
    old.execute("COMMIT");

    // Triggers that are gone or switched off would leave no note.
    db.sum_up(today);
    db.execute(&format!(
        "ALTER TABLE {} DISABLE TRIGGER ALL; ALTER TABLE {} ENABLE TRIGGER ALL",
        day(1),
        day(2)
    ));
    db.execute(&format!("DROP TRIGGER host_metrics_truncated ON {}", day(3)));
    assert_eq!(
        db.counted_days(today),
        [false, false, false, true, true, true, true]
    );
    assert_eq!(db.sum_up(today), pass(3, 0, false));
    assert_eq!(db.counted_days(today), [true; 7]);

    // Gone days are in no view, and then forgotten; one in the place of another is counted.
    db.execute(&format!(
        "DROP TABLE {}; ALTER TABLE host_metrics DETACH PARTITION {}; \
         CREATE TABLE in_its_place PARTITION OF host_metrics FOR VALUES FROM ({}) TO ({})",
        day(6),
        day(7),
        today.plus(-7).begin(),
        today.plus(-6).begin()
    ));
    (0..3).for_each(|_| db.execute(&row(7)));
    let due = "SELECT due_7d::text FROM host_metrics_uptime";
    let rows = "SELECT count(*)::text FROM host_metrics WHERE scheduled_at > now() - interval '168 hours'";
    assert_eq!(db.one(due), db.one(rows));
    assert_eq!(db.sum_up(today), pass(1, 0, false));
    assert_eq!(db.one(due), db.one(rows));
    assert_eq!(
        db.one("SELECT sum(due)::text FROM host_metrics_hours"),
        db.one("SELECT count(*)::text FROM host_metrics")
    );
    // What is detached still calls the function, which goes all the same.
    init::drop(&db.init_config(), false, true).unwrap();
    assert_eq!(db.count(&format!("\"{}\"", day(7))), 1);
}

#[test]
fn what_is_written_while_a_day_is_counted_is_not_lost_to_its_sums() {
    let mut db = Database::new();
    db.store().open().unwrap();
    let today = days::today();
    let row = format!(
        "INSERT INTO host_metrics (address, scheduled_at, is_valid) \
         VALUES ('https://a.example/', timestamptz {}, true)",
        today.plus(-1).begin()
    );
    db.execute(&row);
    let state = "SELECT coalesce(min(state), 'none') FROM host_metrics_days";

    // A writer that has not committed yet: the day is left for the next time, and nobody is kept waiting.
    db.execute(&format!("BEGIN; {row}"));
    let began = scratch::now();
    let pass = db.sum_up(today);
    assert_eq!((pass.counted, pass.left, pass.is_hindered), (0, 1, false));
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    db.execute("COMMIT");
    assert_eq!(db.one(state), "none");

    // Held up between the beginning and the end of the counting, which cannot empty a table that is locked.
    for (ending, is_counted, rows) in [("COMMIT", false, "3"), ("ROLLBACK", true, "3")] {
        let mut other = Database::again(&db.name);
        other.execute("BEGIN; LOCK TABLE host_metrics_hours IN SHARE MODE");
        let database = db.config().database;
        let pass = thread::spawn(move || sums::count(&database, today, Within::default()).unwrap());
        let waiting = "pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
        scratch::wait_for(
            Duration::from_secs(10),
            "the day is being counted",
            || (db.one(state) != "none" && db.count(waiting) > 0).then_some(()),
            String::new,
        );
        // Written and not committed when the counting goes on, and ends.
        db.execute(&format!("BEGIN; {row}"));
        other.execute("COMMIT");
        assert_eq!(pass.join().unwrap().counted, 1);
        db.execute(ending);
        assert_eq!(db.one("SELECT count(*)::text FROM host_metrics"), rows);
        assert_eq!(
            db.one("SELECT due_7d::text FROM host_metrics_uptime"),
            rows,
            "{ending}"
        );
        let yesterday = db.counted_days(today).remove(0);
        assert_eq!(yesterday, is_counted, "{ending}");
    }
}

#[test]
fn what_an_owner_has_stays_the_owners_when_somebody_else_makes_the_rest() {
    let mut db = Database::new();
    let owner = format!("owner_{}", db.name);
    db.execute(&format!(
        "CREATE ROLE {owner} LOGIN; GRANT CREATE ON SCHEMA public TO {owner}; SET ROLE {owner}"
    ));
    let sql = schema::script(&db.config().database.table, days::today());
    db.execute(&sql);
    db.execute("RESET ROLE; DROP VIEW host_metrics_incidents; DROP TABLE host_metrics_failures");
    let superuser = db.config().database;
    init::make_tables(&superuser).unwrap();
    db.execute(&random_rows(6));
    init::make_tables(&superuser).unwrap();
    assert!(
        db.counted_days(days::today())
            .iter()
            .all(|is_counted| *is_counted)
    );
    assert_eq!(
        db.many("SELECT DISTINCT pg_get_userbyid(relowner)::text FROM pg_class WHERE relnamespace = 'public'::regnamespace"),
        [owner.as_str()]
    );
    // The owner counts too, and so does a user who may see no more than the views.
    db.execute(&format!("CREATE ROLE seer_{owner}; GRANT SELECT ON host_metrics_uptime, host_metrics_incidents TO seer_{owner}"));
    db.execute("DELETE FROM host_metrics WHERE scheduled_at < now() - interval '3 days'");
    let mut as_owner = superuser;
    as_owner.user = owner.clone();
    let pass = sums::count(&as_owner, days::today(), Within::default()).unwrap();
    assert!(
        pass.counted >= 3 && pass.left == 0 && !pass.is_hindered,
        "{pass:?}"
    );
    db.check_views("as the owner counted");
    db.execute(&format!("SET ROLE seer_{owner}"));
    assert!(db.count("host_metrics_uptime") > 0 && db.count("host_metrics_incidents") > 0);
}

#[test]
fn tables_that_get_another_schema_or_owner_take_late_rows_after_the_next_init() {
    let mut db = Database::new();
    db.store().open().unwrap();
    let today = days::today();
    let row = |schema: &str| {
        format!(
            "INSERT INTO {schema}.host_metrics (address, scheduled_at, is_valid) VALUES ('a', {}, true)",
            today.plus(-1).begin()
        )
    };
    db.execute(&row("public"));
    assert_eq!(db.sum_up(today).counted, 1);

    db.execute("ALTER SCHEMA public RENAME TO elsewhere");
    let refused = db.client.batch_execute(&row("elsewhere")).unwrap_err();
    assert!(
        format!("{refused:?}").contains("host_metrics_changes"),
        "{refused:?}"
    );
    let mut database = db.config().database;
    database.table.schema = Some("elsewhere".into());
    init::make_tables(&database).unwrap();
    db.execute(&row("elsewhere"));

    // Tables alone, as a loop over pg_class does.
    let owner = format!("new_{}", db.name);
    db.execute(&format!(
        "CREATE ROLE {owner} LOGIN; GRANT ALL ON SCHEMA elsewhere TO {owner}; DO $$ DECLARE name regclass; BEGIN \
         FOR name IN SELECT oid FROM pg_class WHERE relnamespace = 'elsewhere'::regnamespace AND relkind IN ('r', 'p', 'v') \
         LOOP EXECUTE format('ALTER TABLE %s OWNER TO {owner}', name); END LOOP; END $$"
    ));
    init::make_tables(&database).unwrap();
    db.execute(&format!("SET ROLE {owner}; {}; RESET ROLE", row("elsewhere")));
    let function = "SELECT DISTINCT pg_get_userbyid(proowner)::text FROM pg_proc \
                    WHERE pronamespace = 'elsewhere'::regnamespace";
    assert_eq!(db.many(function), [owner]);
    assert_eq!(
        db.one("SELECT due_7d::text FROM elsewhere.host_metrics_uptime"),
        "3"
    );
    let pass = sums::count(&database, today, Within::default()).unwrap();
    assert_eq!((pass.counted, pass.left, pass.is_hindered), (1, 0, false));
}

#[test]
fn a_table_of_the_users_with_a_name_of_the_sums_is_said_and_left() {
    let mut db = Database::new();
    db.execute("CREATE TABLE host_metrics_hours (mine int)");
    let refused = init::make_tables(&db.config().database).unwrap_err().to_string();
    assert!(
        refused.contains("host_metrics_hours") && refused.contains("rename it"),
        "{refused}"
    );
    assert_eq!(db.count("pg_class WHERE relname = 'host_metrics_days'"), 0);
}

#[test]
fn a_day_that_takes_too_long_is_left_to_the_views_until_it_changes() {
    let mut db = Database::new();
    db.store().open().unwrap();
    let today = days::today();
    let fill = |rows: u32| {
        format!(
            "INSERT INTO host_metrics (address, scheduled_at, is_valid) \
             SELECT 'https://a.example/' || n, timestamptz {} + n * interval '1 millisecond', n % 3 = 0 \
             FROM generate_series(1, {rows}) n",
            today.plus(-1).begin()
        )
    };
    db.execute(&fill(20_000));
    let hurried = Within {
        day: Duration::from_millis(1),
        ..Within::default()
    };
    let database = db.config().database;
    let count = |within| {
        let pass = sums::count(&database, today, within).unwrap();
        (pass.counted, pass.left)
    };
    assert_eq!(count(hurried), (0, 1));
    assert_eq!(db.one("SELECT state FROM host_metrics_days"), "too large");
    assert_eq!(
        db.one("SELECT sum(due_7d)::text FROM host_metrics_uptime"),
        "20000"
    );
    assert_eq!(count(Within::default()), (0, 0), "not tried again");
    db.execute(&fill(1));
    assert_eq!(count(Within::default()), (1, 0));
    assert_eq!(
        db.one("SELECT sum(due_7d)::text FROM host_metrics_uptime"),
        "20001"
    );
}

#[test]
fn only_days_that_are_plain_tables_are_summed_up() {
    let mut db = Database::new();
    db.store().open().unwrap();
    let today = days::today();
    let (name, next) = (today.plus(-2), today.plus(-1));
    db.execute(&format!(
        "DROP TABLE host_metrics{0}; \
         CREATE TABLE host_metrics{0} PARTITION OF host_metrics FOR VALUES FROM ({1}) TO ({2}) PARTITION BY RANGE (scheduled_at); \
         CREATE TABLE half PARTITION OF host_metrics{0} DEFAULT; \
         INSERT INTO host_metrics (address, scheduled_at, is_valid) SELECT 'a', {1}::timestamptz + n * interval '1 hour', true \
         FROM generate_series(0, 47) n; \
         CREATE TABLE for_ever PARTITION OF host_metrics FOR VALUES FROM ('3000-01-01') TO ('infinity')",
        name.suffix(),
        name.begin(),
        next.begin(),
    ));
    let pass = db.sum_up(today);
    assert_eq!((pass.counted, pass.left), (1, 0), "the other day");
    assert_eq!(db.one("SELECT due_7d::text FROM host_metrics_uptime"), "48");
    db.store().open().unwrap();
}

#[test]
fn the_consumers_thread_sums_up_what_is_finished_again_and_again_and_ends_with_the_consumer() {
    let mut db = Database::new();
    db.store().open().unwrap();
    let day = days::today().plus(-3);
    let row = format!(
        "INSERT INTO host_metrics (address, scheduled_at, is_valid) VALUES ('https://a.example/', {}, true)",
        day.begin()
    );
    let due = "SELECT sum(due)::text FROM host_metrics_hours";
    let connections = "pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()";
    let every = Duration::from_millis(20);
    let sums = Sums::start(db.config().database, every, every).unwrap();
    for rows in ["1", "2"] {
        db.execute(&row);
        scratch::wait_for(
            Duration::from_secs(20),
            "the day is summed up",
            || (db.count("host_metrics_hours") > 0 && db.one(due) == rows).then_some(()),
            String::new,
        );
    }
    drop(sums);
    scratch::wait_for(
        Duration::from_secs(20),
        "the thread's connection is closed",
        || (db.count(connections) == 0).then_some(()),
        String::new,
    );
}

#[test]
fn many_who_sum_up_at_once_count_every_row_once() {
    let mut db = Database::new();
    db.store().open().unwrap();
    let today = days::today();
    db.execute(&random_rows(4));
    let passes: Vec<_> = (0..4)
        .map(|_| {
            let database = db.config().database;
            thread::spawn(move || sums::count(&database, today, Within::default()).unwrap())
        })
        .collect();
    for pass in passes {
        pass.join().unwrap();
    }
    db.check_views("after four at once");
    // Who lost a day to another left it to the next pass.
    assert_eq!(db.sum_up(today).left, 0);
    db.check_views("after one more");
    assert_eq!(
        db.one("SELECT sum(due)::text FROM host_metrics_hours"),
        db.one(&format!(
            "SELECT count(*)::text FROM host_metrics WHERE scheduled_at >= {} AND scheduled_at < {}",
            today.plus(-7).begin(),
            today.begin()
        ))
    );
}

#[test]
fn init_sums_up_what_is_finished_and_drop_leaves_nothing_of_it() {
    let mut db = Database::new();
    let database = db.config().database;
    init::make_tables(&database).unwrap();
    assert_eq!(
        db.count("host_metrics_days"),
        0,
        "of a new table nothing: its backlog is still to come"
    );
    db.execute(&random_rows(5));
    init::make_tables(&database).unwrap();
    assert!(db.count("host_metrics_days") >= 7);
    db.check_views("after init");

    init::drop(&db.init_config(), false, true).unwrap();
    assert_eq!(
        db.many("SELECT relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace"),
        Vec::<String>::new()
    );
    assert_eq!(db.count("pg_proc WHERE pronamespace = 'public'::regnamespace"), 0);
}

// ------------------------------------------------------------------------------------------------ what the tests use

/// Hosts of intervals from 20 seconds to two days, up to three agents with ticks of their own or the same, runs of failures,
/// missed ticks, gaps of hours and days, days without partition, rows of the future and without time.
fn random_rows(seed: u32) -> String {
    format!(
        "TRUNCATE host_metrics; SELECT setseed(0.{seed}); \
             WITH hosts AS ( \
                 SELECT 'host ' || h AS address, (ARRAY[20, 60, 300, 3600, 5400, 86400, 172800])[1 + h % 7] AS seconds, \
                        1 + h % 3 AS agents, (ARRAY[0.02, 0.3, 0.9, 1])[1 + (h / 7) % 4] AS badness \
                 FROM generate_series(0, 27) h \
             ), ticks AS MATERIALIZED ( \
                 SELECT address, 'agent ' || a AS agent, badness, n, random() AS luck, random() AS kind, \
                        sin(n / (3.0 + a)) + sin(n / 61.0) AS mood, \
                        now() + interval '2 hours' - (n + (a / 2) * 0.5) * make_interval(secs => seconds) AS at \
                 FROM hosts, generate_series(1, agents) a, \
                      generate_series(0, least(250, 20 * 86400 / seconds)) n \
             ) \
             INSERT INTO host_metrics (address, agent, scheduled_at, is_valid, outcome) \
             SELECT address, agent, CASE WHEN luck < 0.995 THEN at END, kind >= bad AND kind < 0.93, \
                    CASE WHEN kind >= 0.93 THEN (ARRAY['missed', 'agent_error', 'agent_offline'])[1 + n % 3] WHEN kind >= bad THEN 'ok' WHEN kind < bad / 2 THEN 'dns_error' \
                         WHEN luck > 0.1 THEN 'bad_status' END \
             FROM ticks CROSS JOIN LATERAL (SELECT least(badness * greatest(mood, 0.1), 0.93) AS bad) b \
             WHERE NOT n % 100 BETWEEN 50 AND 50 + 30 * badness"
    )
}

/// Of a row: whether its host was looked at, in the plainest words.
const WAS_CHECKED: &str = "coalesce(outcome, '') NOT IN ('missed', 'agent_error', 'agent_offline')";

impl Database {
    fn sum_up(&self, finished_before: Day) -> Pass {
        let database = self.config().database;
        sums::count(&database, finished_before, Within::default()).unwrap()
    }

    /// Whether the views read sums, of each of the seven days before today, the newest first.
    fn counted_days(&mut self, today: Day) -> Vec<bool> {
        let counted = |n: i64| {
            let day = today.plus(-n).begin();
            self.one(&format!(
                "SELECT EXISTS (SELECT FROM host_metrics_days d JOIN pg_inherits ON inhrelid = \"partition\" \
                 WHERE starts_at = {day} AND state = 'counted' AND \"partition\" NOT IN (SELECT \"partition\" FROM host_metrics_changes) \
                 AND (SELECT count(*) FROM pg_trigger WHERE tgrelid = inhrelid AND tgenabled = 'A') = 2)::text"
            )) == "true"
        };
        (1..=7).map(counted).collect()
    }

    fn check_views(&mut self, when: &str) {
        // Asked in one statement: one now().
        let window = |name: &str, hours: u32| {
            let within = format!(
                "FROM host_metrics t WHERE t.address = hosts.address AND t.scheduled_at > now() - interval '{hours} hours' \
                 AND t.scheduled_at <= now()"
            );
            format!(
                "(SELECT count(*) {within}) AS due_{name}, (SELECT count(*) {within} AND is_valid) AS valid_{name}, \
                 (SELECT count(*) {within} AND NOT is_valid AND NOT {WAS_CHECKED}) AS missed_{name}, \
                 (SELECT avg(is_valid::integer)::double precision {within} AND {WAS_CHECKED}) AS uptime_{name}"
            )
        };
        let extreme = |which: &str, name: &str, of: &str| {
            format!(
                "(SELECT {which}(scheduled_at) FROM host_metrics t WHERE t.address = hosts.address AND {of} \
                 AND t.scheduled_at > now() - interval '168 hours' AND t.scheduled_at <= now()) AS {name}"
            )
        };
        let plain_uptime = format!(
            "SELECT address, {}, {}, {}, {}, {}, {} FROM (SELECT DISTINCT address FROM host_metrics WHERE scheduled_at <= now() \
             AND scheduled_at > now() - interval '168 hours') hosts",
            window("1h", 1),
            window("24h", 24),
            window("7d", 168),
            extreme("min", "first_check_at", WAS_CHECKED),
            extreme("max", "last_valid_at", "is_valid"),
            extreme(
                "max",
                "last_failed_at",
                &format!("NOT is_valid AND {WAS_CHECKED}")
            ),
        );
        let plain_incidents = format!(
            "SELECT address, min(scheduled_at) AS started_at, ended_at, \
                coalesce(ended_at, now()) - min(scheduled_at) AS duration, count(*) AS checks, \
                (array_agg(outcome ORDER BY scheduled_at, outcome))[1] AS first_outcome, \
                mode() WITHIN GROUP (ORDER BY outcome) AS most_frequent_outcome \
             FROM (SELECT address, scheduled_at, coalesce(outcome, 'unknown') AS outcome, \
                       (SELECT min(later.scheduled_at) FROM host_metrics later WHERE later.address = failed.address \
                        AND later.is_valid AND later.scheduled_at >= failed.scheduled_at) AS ended_at \
                   FROM host_metrics failed \
                   WHERE NOT is_valid AND {WAS_CHECKED} AND scheduled_at IS NOT NULL) f \
             GROUP BY address, ended_at"
        );
        for (view, plain) in [
            ("host_metrics_uptime", plain_uptime.as_str()),
            ("host_metrics_incidents", plain_incidents.as_str()),
        ] {
            assert!(self.count(view) > 20, "{view}: {when}");
            let different = format!(
                "WITH said AS (SELECT v::text FROM {view} v), plain AS (SELECT p::text FROM ({plain}) p) \
                 SELECT 'too much: ' || v FROM (TABLE said EXCEPT ALL TABLE plain) x (v) \
                 UNION ALL SELECT 'lacking: ' || v FROM (TABLE plain EXCEPT ALL TABLE said) x (v) ORDER BY 1 LIMIT 10"
            );
            assert_eq!(self.many(&different), Vec::<String>::new(), "{view}: {when}");
        }
    }
}
