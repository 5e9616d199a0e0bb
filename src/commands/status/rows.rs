//! The queries of `status`, and their results.
//!
//! There are three queries with the same result. Where `consume` keeps the state, it is read, at a cost that does not grow with
//! the rows. Otherwise the rows of seven days are counted, in one sort, because the table may have no index. A table without
//! `scheduled_at`, like that of the original program, only gives counts.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::Serialize;
use tokio_postgres::Row;
use tokio_postgres::types::FromSql;

use crate::commands::status::is_overdue;
use crate::consume::state::GROUP_SUFFIX;
use crate::postgres::{Fault, Session, bounded};
use crate::sample::Timestamp;
use crate::tables::destination::{self, ExistingObjects};
use crate::tables::names::Object;
use crate::tables::views::{CHECKED, NOT_CHECKED};
use crate::terminal::SPARKLINE_CHECKS;

/// Counting ten million rows takes a few seconds on a small machine.
const ANSWERS_WITHIN: Duration = Duration::from_secs(60);

/// JIT compilation of a query over many partitions takes longer than it saves. 50,000 hosts are sorted in memory with this
/// `work_mem`, and on disk with Postgres's default. The statement timeout ends a query after `status` was interrupted. All
/// queries see one snapshot and one `now()`.
pub(super) const SETTINGS: &str = "SET jit = off; SET work_mem = '64MB'; SET statement_timeout = '60s'; \
                        BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";

/// Rejected records are counted up to this number, because counting more takes time and tells little.
pub(super) const MAX_COUNTED: i64 = 100_000;

/// What is in the tables.
#[derive(Clone, Debug)]
pub(super) struct Rows {
    /// The database's clock.
    pub now: Timestamp,
    /// Sorted by address.
    pub hosts: Vec<Host>,
    /// The columns that `status` reads and the table lacks.
    pub missing_columns: Vec<&'static str>,
    /// Why the rows were counted; `None`: the state was read.
    pub counted_because: Option<String>,
    /// The state's positions by topic and partition.
    pub state_positions: BTreeMap<(String, i32), i64>,
    /// The positions by topic and partition; `None`: there is no table of positions, or this user may not read it.
    pub positions: Option<BTreeMap<(String, i32), i64>>,
    /// At most one more than [`MAX_COUNTED`]; `None`: as for `positions`.
    pub rejected: Option<i64>,
}

/// What is known of one host, as the JSON document has it. `None` also if the table lacks a column.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Host {
    pub address: String,
    /// As in the host file; only the state has them.
    pub name: Option<String>,
    pub group: Option<String>,
    pub state: State,
    /// The first check of those in a row that had the same result as the newest one.
    pub since: Option<Timestamp>,
    /// Whether that result is older than `since`: it is the same in all of the seven days that are read, and there are older
    /// rows.
    pub since_is_earlier: bool,
    /// The shares of the checks that were valid.
    pub uptime_1h: Option<f64>,
    pub uptime_24h: Option<f64>,
    pub uptime_7d: Option<f64>,
    /// Of all rows; only if the rows have no time.
    pub uptime_ever: Option<f64>,
    #[serde(skip)]
    pub checks_ever: Option<i64>,
    /// Ticks that were not checked, for any reason.
    pub missed_7d: Option<i64>,
    /// Median and 95th percentile of the last 24 hours, or of all rows if these have no time.
    pub latency_p50_seconds: Option<f64>,
    pub latency_p95_seconds: Option<f64>,
    pub certificate_days_left: Option<i32>,
    /// The interval of the newest row; if the row does not have it, the time between the newest two rows.
    pub interval_seconds: Option<f64>,
    /// The newest row, which may be a tick that was not checked.
    pub last_check: Option<Timestamp>,
    pub last_outcome: Option<String>,
    /// The newest failed check within seven days.
    pub last_error_at: Option<Timestamp>,
    pub last_error_outcome: Option<String>,
    pub last_error: Option<String>,
    /// Latencies for the sparkline in seconds, oldest first; `None`: no response came.
    pub latencies: Vec<Option<f64>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum State {
    /// By the newest check of the last seven days. Ticks that were not checked do not count.
    Up,
    Down,
    /// Its newest row is too old.
    Stale,
    /// There was no check for seven days, or the table lacks a column.
    Unknown,
}

/// Runs all queries.
pub(super) async fn read(
    session: &Session,
    found: &ExistingObjects,
    group_id: &str,
    is_state_on: bool,
) -> Result<Rows, Fault> {
    let main = found.table.quoted("");
    let columns = columns_of(session, &main).await?;
    let missing_columns: Vec<&'static str> = COLUMNS
        .iter()
        .map(|(name, _)| *name)
        .filter(|name| !columns.contains(*name))
        .collect();
    session.batch("session settings", SETTINGS).await?;
    let now = Timestamp::from_unix_micros(session.now_micros().await?)
        .ok_or_else(|| Fault::operator("the database's clock is not in the years 1970 to 9999"))?;
    let has_time = columns.contains("scheduled_at");
    let counted_because = no_state(session, found, is_state_on).await?;
    let sql = match (&counted_because, has_time) {
        (None, _) => of_the_state(found),
        (Some(_), true) => of_a_foreign_table(&source(&main, &columns), now),
        (Some(_), false) => of_a_table_without_time(&source(&main, &columns)),
    };
    let grant = |fault: Fault| fault.with_grant(&format!("GRANT SELECT ON {main} TO this user"));
    let rows = bounded(
        "reading the table",
        ANSWERS_WITHIN,
        session.client.query(&sql, &[]),
    )
    .await
    .map_err(grant)?;
    Ok(Rows {
        now,
        hosts: rows.iter().map(|row| host(row, now)).collect::<Result<_, _>>()?,
        missing_columns,
        positions: positions(session, found, group_id).await?,
        state_positions: match counted_because {
            None => positions(session, found, &format!("{group_id}{GROUP_SUFFIX}"))
                .await?
                .unwrap_or_default(),
            Some(_) => BTreeMap::new(),
        },
        counted_because,
        rejected: rejected(session, found).await?,
    })
}

async fn columns_of(session: &Session, main: &str) -> Result<BTreeSet<String>, Fault> {
    let columns = destination::column_names(session, main).await?;
    if columns.is_empty() {
        return Err(Fault::operator(format!(
            "table {main} does not exist: run `host-metrics init`, or check DB_TABLE"
        )));
    }
    if !columns.contains("address") {
        return Err(Fault::operator(format!(
            "table {main} has no column address, so `status` cannot tell hosts apart"
        )));
    }
    Ok(columns)
}

/// Why the state cannot be read.
pub(super) async fn no_state(
    session: &Session,
    found: &ExistingObjects,
    is_on: bool,
) -> Result<Option<String>, Fault> {
    if !is_on {
        return Ok(Some("STATE=off".to_owned()));
    }
    let needed = Object::STATE.into_iter().chain([Object::Certificates]);
    for object in needed {
        let name = found.table.quoted(object.suffix());
        if !found.is_current(object) {
            return Ok(Some(format!("{name} of this version does not exist")));
        }
        if !found.may_read(object) {
            return Ok(Some(format!("this user may not SELECT from {name}")));
        }
    }
    let series = found.table.quoted(Object::Series.suffix());
    let sql = format!("SELECT FROM {series} LIMIT 1");
    let rows = session.query("reading the state", &sql, &[]).await?;
    Ok(rows.is_empty().then(|| format!("{series} is empty")))
}

impl State {
    /// `newest`: the time and the interval of the host's newest row.
    pub(super) fn of(is_valid: Option<bool>, newest: Option<(Timestamp, f64)>, now: Timestamp) -> Self {
        match is_valid {
            _ if newest.is_some_and(|newest| is_overdue(newest, now)) => Self::Stale,
            Some(true) => Self::Up,
            Some(false) => Self::Down,
            None => Self::Unknown,
        }
    }
}

/// The columns that are read, and the types to which they are cast: a user's `latency` may be numeric.
const COLUMNS: [(&str, &str); 8] = [
    ("address", "text"),
    ("scheduled_at", "timestamptz"),
    ("is_valid", "boolean"),
    ("outcome", "text"),
    ("error", "text"),
    ("latency", "double precision"),
    ("interval_seconds", "double precision"),
    ("cert_expires_at", "timestamptz"),
];

/// A subquery that has all of [`COLUMNS`], with null for those that the table lacks.
fn source(main: &str, columns: &BTreeSet<String>) -> String {
    let expressions = COLUMNS.map(|(name, kind)| match columns.contains(name) {
        true => format!("{name}::{kind} AS {name}"),
        false => format!("NULL::{kind} AS {name}"),
    });
    format!("(SELECT {} FROM {main}) source", expressions.join(", "))
}

/// A time before now. It is a constant for Postgres, which would compute `now() - interval '7 days'` again for each row.
fn ago(now: Timestamp, hours: i64) -> String {
    const HOUR_MICROS: i64 = 3_600_000_000;
    let micros = now.unix_micros() - hours * HOUR_MICROS;
    format!("to_timestamp({})", micros as f64 / 1e6)
}

/// The share of checks that were valid; null if there is none, or the table has no column `is_valid`.
const UPTIME: &str = "avg(is_valid::integer::double precision)";

const LATENCIES: &str = "percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY latency)";

/// Counts over the rows of seven days.
fn counts(now: Timestamp) -> String {
    let uptime = |name: &str, hours: i64| {
        let since = ago(now, hours);
        format!("{UPTIME} FILTER (WHERE {CHECKED} AND scheduled_at > {since}) AS uptime_{name}")
    };
    format!(
        "{}, {}, {}, count(*) FILTER (WHERE NOT is_valid AND {NOT_CHECKED}) AS missed_7d",
        uptime("1h", 1),
        uptime("24h", 24),
        uptime("7d", 7 * 24)
    )
}

/// Of the newest valid and the newest invalid check, the earlier one is the last check before the present state.
const TURNED_AT: &str = "CASE WHEN last_valid IS NOT NULL AND last_invalid IS NOT NULL \
                         THEN least(last_valid, last_invalid) END AS turned_at";

/// The state. A dot of the sparkline is the mean of five minutes.
fn of_the_state(found: &ExistingObjects) -> String {
    let name = |object: Object| found.table.quoted(object.suffix());
    let uptimes = ["1h", "24h", "7d"].map(|period| {
        format!(
            "valid_{period}::double precision / nullif(due_{period} - missed_{period}, 0) AS uptime_{period}"
        )
    });
    format!(
        "WITH newest AS (
             SELECT DISTINCT ON (address) address, name, \"group\", last_seen_at, outcome, interval_seconds, verdict, verdict_since
             FROM {series} ORDER BY address, last_seen_at DESC NULLS LAST
         ), failed AS (
             SELECT DISTINCT ON (address) address, last_failed_at, last_failed_outcome, last_error
             FROM {series} WHERE last_failed_at > now() - interval '168 hours' ORDER BY address, last_failed_at DESC
         )
         SELECT address, name, \"group\", {newest_at} AS newest_at, outcome AS newest_outcome,
             coalesce(interval_seconds, 0) AS interval_seconds, verdict = 'up' AS is_valid, {since} AS since,
             {uptimes}, coalesce(missed_7d, 0) AS missed_7d, ARRAY[p50_seconds_24h, p95_seconds_24h] AS latency,
             {failed_at} AS failed_at, last_failed_outcome AS failed_outcome, last_error AS failed_error, days_left,
             recent_latencies AS latencies
         FROM newest LEFT JOIN failed USING (address) LEFT JOIN {certificates} certificates USING (address)
         LEFT JOIN (SELECT * FROM {windows} WHERE is_host) windows USING (address)
         ORDER BY address",
        series = name(Object::Series),
        windows = name(Object::Windows),
        certificates = name(Object::Certificates),
        uptimes = uptimes.join(", "),
        newest_at = micros("last_seen_at"),
        since = micros("verdict_since"),
        failed_at = micros("last_failed_at"),
    )
}

/// The result of the newest check; null if there is none, or the table has no column `is_valid`.
const IS_VALID: &str = "CASE WHEN greatest(last_valid, last_invalid) IS NOT NULL \
                        THEN coalesce(last_valid >= last_invalid, last_valid IS NOT NULL) END";

fn of_a_foreign_table(source: &str, now: Timestamp) -> String {
    // Rows from the future do not count: a clock that is ahead has written them.
    format!(
        "WITH numbered AS (
             SELECT *, row_number() OVER (PARTITION BY address ORDER BY scheduled_at DESC) AS nth,
                 max(scheduled_at) FILTER (WHERE is_valid) OVER (PARTITION BY address) AS last_valid,
                 max(scheduled_at) FILTER (WHERE NOT is_valid AND {CHECKED}) OVER (PARTITION BY address) AS last_invalid
             FROM {source} WHERE scheduled_at > {week_ago} AND scheduled_at <= {now}
         ), week AS (
             SELECT *, {TURNED_AT} FROM numbered
         ), hosts AS (
             SELECT address, {counts}, max(last_valid) AS last_valid, max(last_invalid) AS last_invalid,
                 max(turned_at) AS turned_at, max(scheduled_at) AS newest_at,
                 max(outcome) FILTER (WHERE nth = 1) AS newest_outcome,
                 coalesce(max(interval_seconds) FILTER (WHERE nth = 1),
                     extract(epoch FROM max(scheduled_at) - max(scheduled_at) FILTER (WHERE nth = 2))::double precision,
                     0) AS interval_seconds,
                 min(scheduled_at) FILTER (WHERE {CHECKED} AND is_valid IS NOT NULL
                     AND (turned_at IS NULL OR scheduled_at > turned_at)) AS since,
                 {LATENCIES} FILTER (WHERE scheduled_at > {day_ago}) AS latency,
                 max(outcome) FILTER (WHERE scheduled_at = last_invalid AND NOT is_valid) AS failed_outcome,
                 max(error) FILTER (WHERE scheduled_at = last_invalid AND NOT is_valid) AS failed_error,
                 (array_agg(cert_expires_at ORDER BY nth) FILTER (WHERE cert_expires_at IS NOT NULL))[1] AS expires_at,
                 array_agg(latency ORDER BY scheduled_at) FILTER (WHERE nth <= {SPARKLINE_CHECKS}) AS latencies
             FROM week GROUP BY address
         )
         SELECT address, {newest_at} AS newest_at, newest_outcome, interval_seconds,
             {is_valid} AS is_valid, {since} AS since,
             turned_at IS NULL AND greatest(last_valid, last_invalid) IS NOT NULL AND address IN (
                 SELECT address FROM {source} WHERE scheduled_at <= {week_ago}
             ) AS since_is_earlier,
             uptime_1h, uptime_24h, uptime_7d, missed_7d, latency,
             {failed_at} AS failed_at, failed_outcome, failed_error,
             floor(extract(epoch FROM expires_at - {now}) / 86400)::integer AS days_left, latencies
         FROM hosts ORDER BY address",
        day_ago = ago(now, 24),
        week_ago = ago(now, 7 * 24),
        counts = counts(now),
        now = ago(now, 0),
        newest_at = micros("newest_at"),
        is_valid = IS_VALID,
        since = micros("since"),
        failed_at = micros("last_invalid"),
    )
}

fn of_a_table_without_time(source: &str) -> String {
    format!(
        "SELECT address, count(*) FILTER (WHERE {CHECKED}) AS checks_ever, {UPTIME} FILTER (WHERE {CHECKED}) AS uptime_ever,
             {LATENCIES} AS latency
         FROM {source} WHERE address IS NOT NULL GROUP BY address ORDER BY address"
    )
}

/// Microseconds since 1970; null for `infinity`, which host-metrics never writes.
fn micros(time: &str) -> String {
    format!("(CASE WHEN isfinite({time}) THEN date_part('epoch', {time}) * 1e6 END)::bigint")
}

/// Reads a row of any of the three queries, which have different columns.
fn host(row: &Row, now: Timestamp) -> Result<Host, Fault> {
    let latency: Vec<Option<f64>> = get(row, "latency")?.unwrap_or_default();
    let latency = |at: usize| latency.get(at).copied().flatten();
    let last_check = time(row, "newest_at")?;
    let interval_seconds = get(row, "interval_seconds")?;
    Ok(Host {
        address: row.try_get("address")?,
        name: get(row, "name")?,
        group: get(row, "group")?,
        state: State::of(get(row, "is_valid")?, last_check.zip(interval_seconds), now),
        since: time(row, "since")?,
        since_is_earlier: get(row, "since_is_earlier")?.unwrap_or(false),
        uptime_1h: get(row, "uptime_1h")?,
        uptime_24h: get(row, "uptime_24h")?,
        uptime_7d: get(row, "uptime_7d")?,
        uptime_ever: get(row, "uptime_ever")?,
        checks_ever: get(row, "checks_ever")?,
        missed_7d: get(row, "missed_7d")?,
        latency_p50_seconds: latency(0),
        latency_p95_seconds: latency(1),
        certificate_days_left: get(row, "days_left")?,
        interval_seconds,
        last_check,
        last_outcome: get(row, "newest_outcome")?,
        last_error_at: time(row, "failed_at")?,
        last_error_outcome: get(row, "failed_outcome")?,
        last_error: get(row, "failed_error")?,
        latencies: get(row, "latencies")?.unwrap_or_default(),
    })
}

/// `None`: the value is null, or this query has no such column.
fn get<'a, T: FromSql<'a>>(row: &'a Row, name: &str) -> Result<Option<T>, Fault> {
    match row.columns().iter().any(|column| column.name() == name) {
        true => Ok(row.try_get(name)?),
        false => Ok(None),
    }
}

fn time(row: &Row, name: &str) -> Result<Option<Timestamp>, Fault> {
    Ok(get(row, name)?.and_then(Timestamp::from_unix_micros))
}

async fn positions(
    session: &Session,
    found: &ExistingObjects,
    group_id: &str,
) -> Result<Option<BTreeMap<(String, i32), i64>>, Fault> {
    if !found.may_read(Object::Offsets) {
        return Ok(None);
    }
    let sql = format!(
        "SELECT topic, \"partition\", next_offset FROM {} WHERE group_id = $1",
        found.table.quoted(Object::Offsets.suffix())
    );
    let rows = session.query("reading the positions", &sql, &[&group_id]).await?;
    let mut positions = BTreeMap::new();
    for row in rows {
        positions.insert((row.try_get(0)?, row.try_get(1)?), row.try_get(2)?);
    }
    Ok(Some(positions))
}

async fn rejected(session: &Session, found: &ExistingObjects) -> Result<Option<i64>, Fault> {
    if !found.may_read(Object::Rejected) {
        return Ok(None);
    }
    let sql = format!(
        "SELECT count(*) FROM (SELECT FROM {} LIMIT {}) rejected",
        found.table.quoted(Object::Rejected.suffix()),
        MAX_COUNTED + 1
    );
    let row = session
        .query_one("counting the rejected records", &sql, &[])
        .await?;
    Ok(Some(row.try_get(0)?))
}
