//! The state on a real Postgres, compared with plain definitions over the rows, for any batches and any number of writers.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use host_metrics::config::StateConfig;
use host_metrics::consume::Counters;
use host_metrics::consume::batch::{Batch, Flushed, NextOffset, Offset, Partition, Record};
use host_metrics::consume::sink::Sink;
use host_metrics::consume::state::StateSink;
use host_metrics::consume::store::Store;
use host_metrics::sample::epoch::Epochs;
use host_metrics::sample::{Sample, Timestamp, encode};

use crate::agent::{Agent, run};
use crate::case::{Case, SOON};
use crate::database::Database;
use crate::scratch::wait_for;
use crate::store::{P0, P1, row};

/// A store of the state next to that of the rows.
pub fn state_store(db: &Database, table: &str, config: StateConfig) -> Store<StateSink> {
    let mut settings = db.config_of(table);
    settings.group_id = "g-state".into();
    Store::of(
        StateSink::new(config, Counters::default()),
        &settings,
        Default::default(),
    )
    .unwrap()
}

fn locate(store: &mut Store<StateSink>, partition: Partition, next: i64) -> i64 {
    let found = store.positions(&[partition], &BTreeMap::from([(partition, NextOffset(next))]));
    found.unwrap()[&partition].next.0
}

pub fn batch(partition: Partition, base: i64, samples: &[Sample<'_>]) -> Batch {
    let mut batch = Batch::default();
    for (offset, sample) in (base..).zip(samples) {
        let mut value = Vec::new();
        encode(sample, &mut value);
        let record = Record {
            partition,
            offset: Offset(offset),
            timestamp: None,
            key: None,
            value: Some(&value),
        };
        batch.push(NextOffset(base), record, |into| {
            StateSink::encode(&(), &record, &mut Epochs::default(), into)
        });
    }
    batch
}

/// Folds all records, in batches of random size.
fn fold(store: &mut Store<StateSink>, samples: &[Sample<'_>], most: usize) {
    store.open().unwrap();
    let mut at = usize::try_from(locate(store, P0, 0)).unwrap();
    while at < samples.len() {
        let end = samples.len().min(at + fastrand::usize(1..=most));
        let part = batch(P0, at as i64, &samples[at..end]);
        assert_eq!(store.flush(&part).unwrap(), Flushed::Durable);
        at = end;
    }
}

/// Brings all windows up to date; those of a new store are due.
fn refresh(db: &Database, config: StateConfig) {
    let mut store = state_store(db, "host_metrics", config);
    store.open().unwrap();
    store
        .maintain(Timestamp::from_unix_micros(now_micros()).unwrap())
        .unwrap();
}

fn rows(db: &Database, samples: &[Sample<'_>]) {
    let mut store = Store::new(&db.config()).unwrap();
    let layout = store.open().unwrap();
    crate::store::start_at(&mut store, &[(P0, 0)]);
    let mut rows = Batch::default();
    for (offset, sample) in (0..).zip(samples) {
        row(&mut rows, &layout, P0, 0, offset, sample);
    }
    assert_eq!(store.flush(&rows).unwrap(), Flushed::Durable);
}

fn now_micros() -> i64 {
    #[expect(clippy::disallowed_methods, reason = "the views are asked about now")]
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    i64::try_from(now.as_micros()).unwrap()
}

/// Records of hosts with one to three places and several intervals, over nine days until now, with outages, missed ticks and late
/// records, in the order of arrival.
fn history(seed: u64) -> Vec<Sample<'static>> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let now = now_micros();
    let mut arrivals = Vec::new();
    for host in 0..24 {
        let interval = [60, 300, 3_600, 20_000][host % 4];
        for place in 0..=host % 3 {
            let ticks = (9 * 86_400 / interval).min(400);
            let mut is_down = false;
            for tick in 0..ticks {
                let at = now - (tick * interval + 5 * place as i64) * 1_000_000 - rng.i64(0..1_000_000);
                is_down = if rng.u8(..) < 40 { rng.bool() } else { is_down };
                let outcome = match rng.u8(..) {
                    0..10 => "missed",
                    10..16 => "agent_offline",
                    16..20 => "agent_error",
                    _ if is_down => ["dns_error", "connect_timeout", "bad_status"][rng.usize(..3)],
                    _ => "ok",
                };
                let seconds =
                    |most: f64, rng: &mut fastrand::Rng| Some((rng.f64() * most * 1e3).round() / 1e3);
                let latency = ["ok", "bad_status"]
                    .contains(&outcome)
                    .then(|| 0.000_05 * 2_f64.powf(rng.f64() * 16.0));
                let sample = Sample {
                    address: format!("https://host-{host}.example/").into(),
                    agent: (place > 0).then(|| format!("place-{place}").into()),
                    is_valid: outcome == "ok",
                    outcome: Some(outcome.into()),
                    error: (outcome != "ok").then(|| "it's \"down\", \\really".into()),
                    scheduled_at: Timestamp::from_unix_micros(at),
                    interval_seconds: Some(interval as f64),
                    latency: latency.map(|latency: f64| (latency * 1e6).round() / 1e6),
                    dns_seconds: seconds(0.1, &mut rng),
                    ttfb_seconds: seconds(2.0, &mut rng),
                    cert_expires_at: Timestamp::from_unix_micros(at + 86_400_000_000 * rng.i64(1..90)),
                    ..Sample::default()
                };
                let late = if rng.u8(..) < 8 {
                    rng.i64(0..86_400_000_000)
                } else {
                    0
                };
                arrivals.push((at + late, sample));
            }
        }
    }
    arrivals.sort_by_key(|(arrives_at, _)| *arrives_at);
    arrivals.into_iter().map(|(_, sample)| sample).collect()
}

const NOT_CHECKED: &str = "outcome IN ('missed', 'agent_error', 'agent_offline')";

/// The whole state as text. It includes the numbers of the series, which are the same in every table.
fn whole_state(db: &mut Database, table: &str) -> Vec<String> {
    ["series", "rollups", "incidents"]
        .into_iter()
        .flat_map(|name| db.many(&format!("SELECT t::text FROM {table}_{name} t ORDER BY 1")))
        .collect()
}

impl Database {
    /// Verifies that both queries have the same rows.
    fn assert_same(&mut self, said: &str, plain: &str) {
        let different = format!(
            "WITH said AS (SELECT v::text FROM ({said}) v), plain AS (SELECT p::text FROM ({plain}) p) \
             SELECT 'too much: ' || v FROM (TABLE said EXCEPT ALL TABLE plain) x (v) \
             UNION ALL SELECT 'lacking: ' || v FROM (TABLE plain EXCEPT ALL TABLE said) x (v) ORDER BY 1 LIMIT 10"
        );
        assert!(self.count(&format!("({said}) x")) > 0, "{said}");
        assert_eq!(self.many(&different), Vec::<String>::new(), "{said}");
    }
}

#[test]
fn the_state_equals_its_definition_over_the_rows_and_a_replay_gives_the_same() {
    for seed in 1..=1 {
        let mut db = Database::new();
        let samples = history(seed);
        rows(&db, &samples);
        let mut store = state_store(&db, "host_metrics", StateConfig::default());
        fold(&mut store, &samples, 700);
        fold(
            &mut state_store(&db, "replayed", StateConfig::default()),
            &samples,
            30,
        );
        assert!(
            whole_state(&mut db, "host_metrics") == whole_state(&mut db, "replayed"),
            "seed {seed}"
        );

        check_definitions(&mut db);
        check_views(&mut db);
    }
}

/// Compares buckets, incidents and last checks with plain definitions over the rows. A host's rows come from one partition.
pub fn check_definitions(db: &mut Database) {
    // Buckets of all widths, except narrow ones that are too old to be kept.
    db.assert_same(
        "SELECT address, agent, seconds, starts_at, due, coalesce(valid, 0) AS valid, coalesce(failed, 0) AS failed, \
             coalesce(missed, 0) AS missed, coalesce(offline, 0) AS offline, latency_us, latency_max_us, dns_10us, ttfb_10us, \
             coalesce(outcomes->>'dns_error', '0') AS dns_errors \
         FROM host_metrics_rollups JOIN host_metrics_series USING (series_id) \
         WHERE seconds > 300 OR starts_at > now() - interval '47 hours'",
        &format!(
            "SELECT address, coalesce(agent, '') AS agent, seconds, \
                 date_bin(seconds * interval '1 second', scheduled_at, '1970-01-01 00:00:00+00') AS starts_at, count(*)::integer, \
                 count(*) FILTER (WHERE is_valid)::integer, \
                 count(*) FILTER (WHERE NOT is_valid AND NOT {NOT_CHECKED})::integer, \
                 count(*) FILTER (WHERE outcome = 'missed')::integer, \
                 count(*) FILTER (WHERE outcome IN ('agent_error', 'agent_offline'))::integer, \
                 sum((latency * 1e6)::bigint)::bigint, max((latency * 1e6)::bigint)::integer, \
                 nullif(sum(round(dns_seconds::numeric * 1e5)::integer) FILTER (WHERE latency IS NOT NULL), 0)::integer, \
                 nullif(sum(round(ttfb_seconds::numeric * 1e5)::integer) FILTER (WHERE latency IS NOT NULL), 0)::integer, \
                 (count(*) FILTER (WHERE outcome = 'dns_error'))::text \
             FROM host_metrics CROSS JOIN (VALUES (300), (3600), (86400)) width (seconds) \
             GROUP BY 1, 2, 3, 4 \
             HAVING seconds > 300 OR date_bin('5 minutes', min(scheduled_at), '1970-01-01 00:00:00+00') > now() - interval '47 hours'"
        ),
    );
    // Incidents of the hosts with one place, from their checks in the order of arrival without late ones.
    let in_order = format!(
        "(SELECT *, max(scheduled_at) OVER (PARTITION BY address ORDER BY kafka_offset \
             ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS newest \
          FROM host_metrics t WHERE NOT {NOT_CHECKED} AND address NOT IN ( \
             SELECT address FROM host_metrics WHERE agent IS NOT NULL)) t"
    );
    let checks = format!("(SELECT * FROM {in_order} WHERE newest IS NULL OR newest < scheduled_at) c");
    db.assert_same(
        "SELECT address, started_at, ended_at, duration, checks, first_outcome, last_error FROM host_metrics_incidents \
         WHERE address IN (SELECT address FROM host_metrics_series GROUP BY address HAVING count(*) = 1)",
        &format!(
            "WITH checks AS MATERIALIZED (SELECT * FROM {checks}) \
             SELECT address, min(scheduled_at), ended_at, ended_at - min(scheduled_at), count(*), \
                 (array_agg(outcome ORDER BY scheduled_at))[1], max(error) \
             FROM (SELECT *, (SELECT min(scheduled_at) FROM checks later WHERE later.address = failed.address \
                       AND later.is_valid AND later.scheduled_at > failed.scheduled_at) AS ended_at \
                   FROM checks failed WHERE NOT is_valid) f \
             GROUP BY address, ended_at"
        ),
    );
    // The last check of each place.
    db.assert_same(
        "SELECT address, agent, max(scheduled_at), max(newest) FROM ( \
             SELECT address, agent, last_check_at AS scheduled_at, last_seen_at AS newest FROM host_metrics_series) s GROUP BY 1, 2",
        &format!(
            "SELECT address, coalesce(agent, ''), max(scheduled_at) FILTER (WHERE NOT {NOT_CHECKED}), max(scheduled_at) \
             FROM host_metrics GROUP BY 1, 2"
        ),
    );
}

/// Waits until no bucket begins within the next minute, so that several questions see the same windows.
fn wait_for_new_bucket(db: &mut Database) {
    let is_early = "(SELECT 1 WHERE floor(date_part('epoch', now()))::bigint % 300 < 240) x";
    let begun = || (db.count(is_early) == 1).then_some(());
    wait_for(
        Duration::from_secs(90),
        "the next five minutes",
        begun,
        String::new,
    );
}

/// A window begins with the bucket that contains its beginning.
fn check_views(db: &mut Database) {
    wait_for_new_bucket(db);
    refresh(db, StateConfig::default());
    let windows = [
        ("1h", "5 minutes", 1),
        ("24h", "1 hour", 24),
        ("7d", "1 hour", 168),
        ("30d", "1 hour", 720),
        ("90d", "1 hour", 2_160),
        ("365d", "1 hour", 8_760),
    ];
    let within = |width: &str, hours: i32| {
        format!(
            "scheduled_at >= date_bin('{width}', now() - interval '{hours} hours', '2000-01-01 00:00:00+00')"
        )
    };
    for (name, width, hours) in windows {
        let within = within(width, hours);
        db.assert_same(
            &format!(
                "SELECT address, agent, due_{name}, valid_{name}, missed_{name}, uptime_{name} FROM host_metrics_uptime \
                 WHERE due_{name} > 0"
            ),
            &format!(
                "SELECT address, agent, count(*), count(*) FILTER (WHERE is_valid), count(*) FILTER (WHERE {NOT_CHECKED}), \
                     avg(is_valid::integer) FILTER (WHERE NOT {NOT_CHECKED})::double precision \
                 FROM (SELECT address, NULL AS agent, is_valid, outcome, scheduled_at FROM host_metrics \
                     UNION ALL SELECT address, coalesce(agent, ''), is_valid, outcome, scheduled_at FROM host_metrics) t \
                 WHERE {within} GROUP BY address, agent"
            ),
        );
        if hours <= 720 {
            let wrong = format!(
                "SELECT concat_ws(' ', said.*, plain.*) FROM (SELECT address, count(*) AS latencies, max(latency) AS max_seconds, \
                     percentile_disc(ARRAY[0.5, 0.95, 0.99]) WITHIN GROUP (ORDER BY latency) AS p \
                     FROM host_metrics WHERE latency IS NOT NULL AND {within} GROUP BY address) plain \
                 FULL JOIN (SELECT * FROM host_metrics_latency WHERE period = '{name}') said USING (address) \
                 WHERE (said.latencies, said.max_seconds) IS DISTINCT FROM (plain.latencies, plain.max_seconds) \
                     OR NOT greatest(abs(ln(p50_seconds / greatest(p[1], 0.00009))), abs(ln(p95_seconds / p[2])), \
                         abs(ln(p99_seconds / p[3]))) < ln(1.12)"
            );
            assert_eq!(db.many(&wrong), Vec::<String>::new());
        }
    }
    db.assert_same(
        "SELECT address, cert_expires_at, seen_at FROM host_metrics_certificates",
        "SELECT DISTINCT ON (address) address, cert_expires_at, scheduled_at FROM host_metrics ORDER BY address, scheduled_at DESC",
    );
    db.assert_same(
        "SELECT * FROM host_metrics_latest",
        "SELECT DISTINCT ON (address, agent) * FROM host_metrics ORDER BY address, agent, scheduled_at DESC",
    );
    check_verdict_uptimes(db, &windows);
    db.assert_same(
        "SELECT address, bucket, round(mean::numeric, 5) AS mean FROM host_metrics_windows \
         CROSS JOIN unnest(recent_latencies) WITH ORDINALITY dots (mean, bucket) WHERE is_host",
        &format!(
            "SELECT address, row_number() OVER (PARTITION BY address ORDER BY bucket), round(mean::numeric, 5) AS mean FROM ( \
                 SELECT address, date_bin('5 minutes', scheduled_at, '2000-01-01 00:00:00+00') AS bucket, \
                     avg((latency * 1e6)::bigint) / 1e6 AS mean \
                 FROM host_metrics WHERE {} GROUP BY 1, 2) means",
            within("5 minutes", 1)
        ),
    );
}

/// Compares the shares of time without an incident. An outage that is not over grows between the refresh and the question.
fn check_verdict_uptimes(db: &mut Database, windows: &[(&str, &str, i32)]) {
    for (name, width, hours) in windows {
        let wrong = format!(
            "WITH watched AS ( \
                 SELECT address, greatest(min(first_at), date_bin('{width}', now() - interval '{hours} hours', '2000-01-01 00:00:00+00')) \
                         AS starts_at, least(max(last_at), now()) AS ends_at \
                 FROM (SELECT address, agent, min(scheduled_at) AS first_at, \
                         max(scheduled_at) + 2 * make_interval(secs => max(interval_seconds)) AS last_at FROM host_metrics \
                     WHERE NOT {NOT_CHECKED} GROUP BY address, agent) places \
                 GROUP BY address \
             ), plain AS ( \
                 SELECT address, extract(epoch FROM ends_at - starts_at) AS seconds, (SELECT coalesce(sum(extract(epoch FROM \
                         least(coalesce(ended_at, now()), ends_at) - greatest(started_at, starts_at))), 0) \
                     FROM host_metrics_incidents i WHERE i.address = w.address AND started_at < ends_at \
                         AND coalesce(ended_at, now()) > starts_at) AS down \
                 FROM watched w \
             ) \
             SELECT concat_ws(' ', address, verdict_uptime_{name}, seconds, down) FROM host_metrics_uptime JOIN plain USING (address) \
             WHERE agent IS NULL AND CASE WHEN seconds > 0 THEN (abs(verdict_uptime_{name} - (1 - down / seconds)) < 0.02) IS NOT TRUE \
                 ELSE verdict_uptime_{name} IS NOT NULL END"
        );
        assert_eq!(db.many(&wrong), Vec::<String>::new(), "{name}");
    }
}

#[test]
fn the_places_of_a_host_vote_on_its_verdict_and_a_silent_place_has_no_vote() {
    let mut db = Database::new();
    let mut store = state_store(&db, "host_metrics", StateConfig::default());
    let now = now_micros();
    let check = |agent: &'static str, minutes_ago: i64, is_valid: bool| Sample {
        address: "https://a.example/".into(),
        agent: Some(agent.into()),
        is_valid,
        outcome: Some(if is_valid { "ok" } else { "dns_error" }.into()),
        scheduled_at: Timestamp::from_unix_micros(now - minutes_ago * 60_000_000),
        interval_seconds: Some(60.0),
        ..Sample::default()
    };
    let mut samples = vec![check("a", 60, true), check("b", 60, true), check("c", 60, true)];
    samples.extend([check("a", 50, false), check("b", 50, false), check("c", 50, true)]);
    samples.extend([check("a", 49, false), check("b", 49, true), check("c", 49, true)]);
    fold(&mut store, &samples, 2);
    let incidents = "SELECT concat_ws('|', number, round(extract(epoch FROM duration) / 60), checks, first_outcome, outcomes, places) \
                     FROM host_metrics_incidents ORDER BY number";
    // Down when the second place fails at minute 50, up when it recovers at minute 49.
    assert_eq!(
        db.many(incidents),
        ["1|1|3|dns_error|{\"dns_error\": 3}|[\"a\", \"b\"]"]
    );
    assert_eq!(
        db.many("SELECT concat_ws('|', agent, is_valid, failures_in_a_row, verdict) FROM host_metrics_series ORDER BY agent"),
        ["a|f|2|up", "b|t|0|up", "c|t|0|up"]
    );
    refresh(&db, StateConfig::default());
    // A long time without checks counts neither as up nor as down.
    let share =
        "SELECT round(verdict_uptime_1h::numeric, 2)::text FROM host_metrics_uptime WHERE agent IS NULL";
    assert_eq!(db.one(share), "0.92");
}

#[test]
fn texts_of_any_length_do_not_stop_the_state() {
    let mut db = Database::new();
    let mut store = state_store(&db, "host_metrics", StateConfig::default());
    // A random text does not compress, so an index cannot hold 3,000 bytes of it.
    let long: String = std::iter::repeat_with(fastrand::alphanumeric)
        .take(3_000)
        .collect();
    let sample = Sample {
        address: format!("https://{}.example/", &long[..2_000]).into(),
        agent: Some(long.as_str().into()),
        outcome: Some(long.as_str().into()),
        error: Some(long.as_str().into()),
        name: Some(long.as_str().into()),
        scheduled_at: Timestamp::from_unix_micros(now_micros()),
        ..Sample::default()
    };
    fold(&mut store, &[sample], 1);
    assert_eq!(
        db.one("SELECT length(agent)::text FROM host_metrics_series"),
        "255"
    );
}

#[test]
fn a_hundred_thousand_hosts_have_their_state() {
    const HOSTS: i64 = 100_000;
    const CHECKS: i64 = 2;
    const RECORDS_OF_A_BATCH: usize = 20_000;
    let mut db = Database::new();
    let mut store = state_store(&db, "host_metrics", StateConfig::default());
    store.open().unwrap();
    locate(&mut store, P0, 0);
    let now = now_micros();
    for base in (0..HOSTS * CHECKS).step_by(RECORDS_OF_A_BATCH) {
        let samples: Vec<_> = (base..base + RECORDS_OF_A_BATCH as i64)
            .map(|number| Sample {
                address: format!("https://host-{}.example/", number % HOSTS).into(),
                agent: Some("eu".into()),
                is_valid: number % 10 != 0,
                outcome: Some(if number % 10 != 0 { "ok" } else { "bad_status" }.into()),
                latency: Some(0.02),
                interval_seconds: Some(60.0),
                scheduled_at: Timestamp::from_unix_micros(now - 60_000_000 * (CHECKS - number / HOSTS)),
                ..Sample::default()
            })
            .collect();
        assert_eq!(store.flush(&batch(P0, base, &samples)).unwrap(), Flushed::Durable);
    }
    drop(store);
    refresh(&db, StateConfig::default());
    let down = HOSTS / 10;
    assert_eq!(db.count("host_metrics_series"), HOSTS);
    assert_eq!(db.count("host_metrics_incidents"), down);
    assert_eq!(
        db.one(
            "SELECT concat_ws(' ', count(*), sum(due_24h), sum(due_24h - valid_24h)) FROM host_metrics_uptime \
             WHERE agent = 'eu'"
        ),
        format!("{HOSTS} {} {}", HOSTS * CHECKS, down * CHECKS)
    );
}

#[test]
fn an_interval_of_any_length_and_a_place_ahead_of_time_change_nothing_for_others() {
    let mut db = Database::new();
    let mut store = state_store(&db, "host_metrics", StateConfig::default());
    let now = now_micros();
    let check = |address: &'static str, agent: &'static str, interval: f64, at: i64| Sample {
        address: address.into(),
        agent: Some(agent.into()),
        is_valid: false,
        outcome: Some("dns_error".into()),
        scheduled_at: Timestamp::from_unix_micros(at),
        interval_seconds: Some(interval),
        ..Sample::default()
    };
    let minute = 60_000_000;
    fold(
        &mut store,
        &[
            check("https://a.example/", "a", 1e13, now - minute),
            check("https://b.example/", "a", 60.0, now - minute),
        ],
        2,
    );
    // Kafka stamped the record on arrival, two hours before its own time.
    let mut ahead = Batch::default();
    let mut value = Vec::new();
    encode(
        &check("https://b.example/", "z", 60.0, now + 120 * minute),
        &mut value,
    );
    let record = Record {
        partition: P0,
        offset: Offset(2),
        timestamp: Timestamp::from_unix_micros(now),
        key: None,
        value: Some(&value),
    };
    ahead.push(NextOffset(2), record, |into| {
        StateSink::encode(&(), &record, &mut Epochs::default(), into)
    });
    assert_eq!(store.flush(&ahead).unwrap(), Flushed::Durable);
    refresh(&db, StateConfig::default());
    assert_eq!(
        db.many("SELECT concat_ws('|', address, agent, verdict) FROM host_metrics_series ORDER BY 1"),
        [
            "https://a.example/|a|down",
            "https://b.example/|a|down",
            "https://b.example/|z|down"
        ]
    );
    assert_eq!(
        db.many("SELECT concat_ws('|', address, valid_1h, verdict_uptime_1h) FROM host_metrics_uptime WHERE agent IS NULL ORDER BY 1"),
        ["https://a.example/|0|0", "https://b.example/|0|0"]
    );
}

#[test]
fn state_tables_that_are_dropped_are_made_again_while_rows_go_on() {
    let mut case = Case::new("state-dropped", 2);
    let consumer = Agent::start(&["consume"], &case.variables().with("STATE", "on"));
    case.write(0, 0..10);
    case.write(1, 10..20);
    case.wait_for_rows(20, &[&consumer]);
    wait_for_due(&mut case.db, 20, &consumer);
    // One statement for all four could deadlock with a refresh of the windows.
    for name in ["series", "rollups", "incidents", "windows"] {
        case.db
            .execute(&format!("DROP TABLE IF EXISTS host_metrics_{name} CASCADE"));
    }
    case.write(0, 20..30);
    case.wait_for_rows(30, &[&consumer]);
    for name in [
        "series",
        "rollups",
        "incidents",
        "windows",
        "latest",
        "uptime",
        "latency",
        "certificates",
    ] {
        let is_there = format!("(SELECT 1 WHERE to_regclass('host_metrics_{name}') IS NOT NULL) x");
        wait_for(
            SOON,
            name,
            || (case.db.count(&is_there) == 1).then_some(()),
            || consumer.stderr(),
        );
    }
    // The earlier state is gone, and later records count once.
    case.write(1, 30..40);
    wait_for_due(&mut case.db, 20, &consumer);
    consumer.stop();
}

/// Waits until the state has counted that many ticks.
pub fn wait_for_due(db: &mut Database, due: i64, consumer: &Agent) {
    let is_there = "(SELECT 1 WHERE to_regclass('host_metrics_rollups') IS NOT NULL) x";
    let counted = "SELECT coalesce(sum(due), 0)::text FROM host_metrics_rollups WHERE seconds = 86400";
    let in_view = "SELECT coalesce(sum(due_24h), 0)::text FROM host_metrics_uptime WHERE agent IS NULL";
    let is_due = || {
        let is_due = db.count(is_there) == 1 && db.one(counted) == due.to_string();
        (is_due && db.one(in_view) == due.to_string()).then_some(())
    };
    wait_for(SOON, "the state has caught up", is_due, || consumer.stderr());
}

#[test]
fn a_record_that_the_users_constraint_keeps_out_of_the_table_is_counted_in_the_state() {
    let mut case = Case::new("state-poison", 1);
    let variables = case.variables().with("STATE", "on");
    assert_eq!(run(&["init"], &variables).0, 0);
    case.db
        .execute("ALTER TABLE host_metrics ADD CONSTRAINT mine CHECK (address NOT LIKE '%3')");
    let consumer = Agent::start(&["consume"], &variables);
    case.write(0, 0..10);
    case.wait_for_rows(9, &[&consumer]);
    wait_for_due(&mut case.db, 10, &consumer);
    consumer.stop();
    assert_eq!(case.db.count("host_metrics_rejected"), 1);
    assert_eq!(case.db.count("host_metrics_series"), 10);
}

/// When a topic gets more partitions, the later records of a host come from another one, which another consumer may have.
#[test]
fn a_host_whose_records_move_to_an_added_partition_keeps_its_state() {
    let mut db = Database::new();
    let samples = history(4);
    let in_one_partition = || state_store(&db, "host_metrics", StateConfig::default());
    fold(&mut in_one_partition(), &samples, 700);
    let (before, after) = samples.split_at(samples.len() / 2);
    let mut first = state_store(&db, "moved", StateConfig::default());
    fold(&mut first, before, 700);
    let mut second = state_store(&db, "moved", StateConfig::default());
    second.open().unwrap();
    locate(&mut second, P1, 0);
    for (number, part) in (0..).zip(after.chunks(500)) {
        assert_eq!(
            second.flush(&batch(P1, 500 * number, part)).unwrap(),
            Flushed::Durable
        );
    }
    assert!(whole_state(&mut db, "host_metrics") == whole_state(&mut db, "moved"));
}

#[test]
fn windows_move_on_without_new_records() {
    let mut db = Database::new();
    let mut store = state_store(&db, "host_metrics", StateConfig::default());
    fold(&mut store, &history(2), 5_000);
    refresh(&db, StateConfig::default());
    let due = "SELECT sum(due_1h)::text FROM host_metrics_uptime";
    assert_ne!(db.one(due), "0");
    db.execute(
        "UPDATE host_metrics_rollups SET starts_at = starts_at - interval '10 days' WHERE seconds = 300",
    );
    refresh(&db, StateConfig::default());
    assert_eq!(db.one(due), "0");
}

#[test]
fn rows_and_totals_are_kept_for_different_times_and_removed_in_any_order() {
    let samples = history(3);
    let config = StateConfig {
        rollup_retention: Some(Duration::from_secs(3 * 86_400)),
        ..StateConfig::default()
    };
    let views = "SELECT concat_ws('|', address, agent, due_24h, valid_24h, uptime_24h, p95_seconds, days_left) \
                 FROM host_metrics_uptime LEFT JOIN (SELECT * FROM host_metrics_latency WHERE period = '24h') l USING (address) \
                 LEFT JOIN host_metrics_certificates USING (address) ORDER BY address, agent";
    wait_for_new_bucket(&mut Database::new());
    let left = [false, true].map(|rows_first| {
        let mut db = Database::new();
        rows(&db, &samples);
        let mut store = state_store(&db, "host_metrics", StateConfig::default());
        fold(&mut store, &samples, 5_000);
        refresh(&db, StateConfig::default());
        let before = db.many(views);
        let newest = "SELECT concat_ws('|', address, max(number), max(started_at)) FROM host_metrics_incidents GROUP BY address ORDER BY 1";
        let incidents = db.many(newest);
        let mut store = state_store(&db, "host_metrics", config.clone());
        let drop_rows = "DELETE FROM host_metrics WHERE scheduled_at < now() - interval '1 day'";
        if rows_first {
            db.execute(drop_rows);
        }
        // Opening removes what is too old.
        store.open().unwrap();
        if !rows_first {
            db.execute(drop_rows);
        }
        refresh(&db, config.clone());
        // A bucket is kept as long as a part of it, and the newest incident of a host as long as the host.
        for old in [
            "host_metrics_rollups WHERE starts_at + seconds * interval '1 second' < now() - interval '3 days'",
            "host_metrics_incidents i WHERE ended_at < now() - interval '3 days' AND number < (SELECT max(number) \
                 FROM host_metrics_incidents WHERE address = i.address)",
        ] {
            assert_eq!(db.count(old), 0, "{old}");
        }
        assert_eq!(db.many(newest), incidents);
        assert!(db.count("host_metrics_rollups WHERE starts_at < now() - interval '1 day'") > 0);
        assert_eq!(db.many(views), before);
        whole_state(&mut db, "host_metrics").len()
    });
    assert_eq!(left[0], left[1]);
}

#[test]
fn a_state_that_cannot_be_written_keeps_no_row_back_and_status_counts_rows() {
    let mut case = Case::new("state-refused", 1);
    case.db.execute("CREATE TABLE host_metrics_series (mine integer)");
    let consumer = Agent::start(&["consume"], &case.variables().with("STATE", "on"));
    case.write(0, 0..10);
    case.wait_for_rows(10, &[&consumer]);
    consumer.wait_for_stderr("the state is not being updated", SOON);
    consumer.wait_for_stderr("host_metrics_series\" was not created by this version", SOON);
    let (_, said) = run(&["status"], &case.variables().with("STATE", "on"));
    assert!(
        said.contains("Counted from the rows, because") && said.contains("of this version does not exist"),
        "{said}"
    );
    consumer.stop();
    assert_eq!(case.db.count("host_metrics_series"), 0);
}
