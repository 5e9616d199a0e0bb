//! The queries of `status`, and their results.
//!
//! There are three queries with the same result. Where `consume` keeps the state, it is read, at a cost that does not grow with
//! the rows. Otherwise the rows of seven days are counted, in one sort, because the table may have no index. A table without
//! `scheduled_at`, like that of the original program, only gives counts.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio_postgres::Row;

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
#[derive(Clone, Debug, Default)]
pub(super) struct Rows {
    /// The database's clock.
    pub now_micros: i64,
    /// Sorted by address.
    pub hosts: Vec<Host>,
    /// The newest row of all hosts; `None`: there is none, or the rows have no time.
    pub newest: Option<Newest>,
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

/// The newest row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Newest {
    pub at: Timestamp,
    /// The interval of its host; if the row does not have it, the time between the newest two rows.
    pub interval_seconds: f64,
}

/// What is known of one host. `None` also if the table lacks a column.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Host {
    pub address: String,
    /// As in the host file; only the state has them.
    pub name: Option<String>,
    pub group: Option<String>,
    /// Whether the newest check of the last seven days was valid. Ticks that were not checked do not count.
    pub is_valid: Option<bool>,
    /// The first check of those in a row that had the same result as the newest one.
    pub since: Option<Timestamp>,
    /// Whether that result is older than `since`: it is the same in all of the seven days that are read, and there are older
    /// rows.
    pub is_longer: bool,
    pub uptime_1h: Option<Share>,
    pub uptime_24h: Option<Share>,
    pub uptime_7d: Option<Share>,
    /// Of all rows; only if the rows have no time.
    pub uptime_ever: Option<Share>,
    /// Ticks that were not checked, for any reason.
    pub missed_7d: Option<i64>,
    /// Median and 95th percentile of the last 24 hours, or of all rows if these have no time.
    pub latency_p50_seconds: Option<f64>,
    pub latency_p95_seconds: Option<f64>,
    pub certificate_days_left: Option<i32>,
    /// The newest row, including ticks that were not checked.
    pub newest: Option<Newest>,
    pub last_outcome: Option<String>,
    /// The newest failed check within seven days.
    pub last_error: Option<LastError>,
    /// Latencies for the sparkline in seconds, oldest first; `None`: no response came.
    pub latencies: Vec<Option<f64>>,
}

/// The number of valid checks, and of all checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    pub valid: i64,
    pub checks: i64,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct LastError {
    pub at: Timestamp,
    pub outcome: Option<String>,
    pub error: Option<String>,
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
    session
        .bounded("session settings", session.client.batch_execute(SETTINGS))
        .await?;
    let now_micros = session.now_micros().await?;
    let times = Times::before(now_micros);
    let has_time = columns.contains("scheduled_at");
    let counted_because = no_state(session, found, is_state_on).await?;
    let sql = match (&counted_because, has_time) {
        (None, _) => of_the_state(found),
        (Some(_), true) => of_a_foreign_table(&source(&main, &columns), &times),
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
    let mut hosts = Vec::with_capacity(rows.len());
    for row in &rows {
        hosts.push(host(row)?);
    }
    if counted_because.is_some() && missing_columns.contains(&"is_valid") {
        hosts.iter_mut().for_each(Host::forget_validity);
    }
    let newest_of_hosts = hosts
        .iter()
        .filter_map(|host| host.newest)
        .max_by_key(|newest| newest.at);
    let newest = match newest_of_hosts {
        None if has_time => newest_ever(session, &source(&main, &columns)).await?,
        newest => newest,
    };
    Ok(Rows {
        now_micros,
        hosts,
        newest,
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
    let sql = format!("SELECT EXISTS (SELECT FROM {series})");
    let row = session
        .bounded("reading the state", session.client.query_one(&sql, &[]))
        .await?;
    let has_any: bool = row.try_get(0)?;
    Ok((!has_any).then(|| format!("{series} is empty")))
}

impl Host {
    fn forget_validity(&mut self) {
        self.is_valid = None;
        self.since = None;
        self.is_longer = false;
        self.last_error = None;
        for share in [
            &mut self.uptime_1h,
            &mut self.uptime_24h,
            &mut self.uptime_7d,
            &mut self.uptime_ever,
        ] {
            *share = None;
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

/// Times as literals, because Postgres would compute `now() - interval '7 days'` again for each row.
struct Times {
    now: String,
    hour_ago: String,
    day_ago: String,
    week_ago: String,
}

impl Times {
    fn before(now_micros: i64) -> Self {
        const HOUR_MICROS: i64 = 3_600_000_000;
        let ago = |hours: i64| {
            let at = Timestamp::from_unix_micros(now_micros - hours * HOUR_MICROS);
            // Rows are from the years 1970 to 9999, so a clock outside of them has no rows.
            at.map_or_else(
                || "timestamptz '-infinity'".to_owned(),
                |at| format!("timestamptz '{at}'"),
            )
        };
        Self {
            now: ago(0),
            hour_ago: ago(1),
            day_ago: ago(24),
            week_ago: ago(7 * 24),
        }
    }

    /// Rows since then, without those from the future, which come from a clock that is ahead.
    fn since(&self, then: &str) -> String {
        format!("scheduled_at > {then} AND scheduled_at <= {}", self.now)
    }
}

const LATENCIES: &str = "percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY latency)";

/// Counts over the rows of seven days.
fn counts(times: &Times) -> String {
    let windows = [
        ("1h", Some(&times.hour_ago)),
        ("24h", Some(&times.day_ago)),
        ("7d", None),
    ];
    let counts = windows.map(|(name, since)| {
        let within = since.map_or_else(|| "true".to_owned(), |since| format!("scheduled_at > {since}"));
        format!(
            "count(*) FILTER (WHERE {CHECKED} AND {within}) AS checks_{name}, \
             count(*) FILTER (WHERE is_valid AND {within}) AS valid_{name}"
        )
    });
    format!(
        "{}, count(*) FILTER (WHERE NOT is_valid AND {NOT_CHECKED}) AS missed_7d, \
         min(scheduled_at) FILTER (WHERE {CHECKED}) AS first_check",
        counts.join(", ")
    )
}

/// The newest valid and the newest invalid check. The earlier one is the last check before the present state.
fn last(over: &str) -> String {
    format!(
        "max(scheduled_at) FILTER (WHERE is_valid) {over} AS last_valid, \
         max(scheduled_at) FILTER (WHERE NOT is_valid AND {CHECKED}) {over} AS last_invalid"
    )
}

const TURNED_AT: &str = "CASE WHEN last_valid IS NOT NULL AND last_invalid IS NOT NULL \
                         THEN least(last_valid, last_invalid) END AS turned_at";

/// The state. A dot of the sparkline is the mean of five minutes.
fn of_the_state(found: &ExistingObjects) -> String {
    let name = |object: Object| found.table.quoted(object.suffix());
    let counts = ["1h", "24h", "7d"].map(|period| {
        format!(
            "coalesce(due_{period} - missed_{period}, 0) AS checks_{period}, coalesce(valid_{period}, 0) AS valid_{period}"
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
         SELECT address, name, \"group\", {newest_at} AS newest_at, outcome AS newest_outcome, interval_seconds,
             NULL::double precision AS gap_seconds, verdict = 'up' AS is_valid, {since} AS since, false AS is_longer,
             {counts}, coalesce(missed_7d, 0) AS missed_7d, ARRAY[p50_seconds_24h, p95_seconds_24h] AS latency,
             {failed_at} AS failed_at, last_failed_outcome AS failed_outcome, last_error AS failed_error, days_left,
             recent_latencies AS latencies
         FROM newest LEFT JOIN failed USING (address) LEFT JOIN {certificates} certificates USING (address)
         LEFT JOIN (SELECT * FROM {windows} WHERE is_host) windows USING (address)
         ORDER BY address",
        series = name(Object::Series),
        windows = name(Object::Windows),
        certificates = name(Object::Certificates),
        counts = counts.join(", "),
        newest_at = micros("last_seen_at"),
        since = micros("verdict_since"),
        failed_at = micros("last_failed_at"),
    )
}

const IS_VALID: &str =
    "CASE WHEN first_check IS NOT NULL THEN coalesce(last_valid >= last_invalid, last_valid IS NOT NULL) END";

fn of_a_foreign_table(source: &str, times: &Times) -> String {
    format!(
        "WITH numbered AS (
             SELECT *, row_number() OVER (PARTITION BY address ORDER BY scheduled_at DESC) AS nth,
                 {last}
             FROM {source} WHERE {in_week}
         ), week AS (
             SELECT *, {TURNED_AT} FROM numbered
         ), hosts AS (
             SELECT address, {counts}, max(last_valid) AS last_valid, max(last_invalid) AS last_invalid,
                 max(turned_at) AS turned_at, max(scheduled_at) AS newest_at,
                 max(outcome) FILTER (WHERE nth = 1) AS newest_outcome,
                 max(interval_seconds) FILTER (WHERE nth = 1) AS interval_seconds,
                 extract(epoch FROM max(scheduled_at) - max(scheduled_at) FILTER (WHERE nth = 2))::double precision
                     AS gap_seconds,
                 min(scheduled_at) FILTER (WHERE {CHECKED} AND (turned_at IS NULL OR scheduled_at > turned_at)) AS since,
                 {LATENCIES} FILTER (WHERE scheduled_at > {day_ago}) AS latency,
                 max(outcome) FILTER (WHERE scheduled_at = last_invalid AND NOT is_valid) AS failed_outcome,
                 max(error) FILTER (WHERE scheduled_at = last_invalid AND NOT is_valid) AS failed_error,
                 (array_agg(cert_expires_at ORDER BY nth) FILTER (WHERE cert_expires_at IS NOT NULL))[1] AS expires_at,
                 array_agg(latency ORDER BY scheduled_at) FILTER (WHERE nth <= {SPARKLINE_CHECKS}) AS latencies
             FROM week GROUP BY address
         )
         SELECT address, {newest_at} AS newest_at, newest_outcome, interval_seconds, gap_seconds,
             {is_valid} AS is_valid, {since} AS since,
             turned_at IS NULL AND first_check IS NOT NULL AND address IN (
                 SELECT address FROM {source} WHERE scheduled_at <= {week_ago}
             ) AS is_longer,
             checks_1h, valid_1h, checks_24h, valid_24h, checks_7d, valid_7d, missed_7d, latency,
             {failed_at} AS failed_at, failed_outcome, failed_error,
             floor(extract(epoch FROM expires_at - {now}) / 86400)::integer AS days_left, latencies
         FROM hosts ORDER BY address",
        last = last("OVER (PARTITION BY address)"),
        in_week = times.since(&times.week_ago),
        day_ago = times.day_ago,
        week_ago = times.week_ago,
        now = times.now,
        counts = counts(times),
        newest_at = micros("newest_at"),
        is_valid = IS_VALID,
        since = micros("since"),
        failed_at = micros("last_invalid"),
    )
}

fn of_a_table_without_time(source: &str) -> String {
    format!(
        "SELECT address, count(*) FILTER (WHERE {CHECKED}) AS checks_ever, count(*) FILTER (WHERE is_valid) AS valid_ever, {LATENCIES} AS latency
         FROM {source} WHERE address IS NOT NULL GROUP BY address ORDER BY address"
    )
}

/// Microseconds since 1970; null for `infinity`, which host-metrics never writes.
pub(super) fn micros(time: &str) -> String {
    format!("(CASE WHEN isfinite({time}) THEN date_part('epoch', {time}) * 1e6 END)::bigint")
}

/// Reads a row of any of the three queries, which have different columns.
fn host(row: &Row) -> Result<Host, Fault> {
    let has = |name: &str| row.columns().iter().any(|column| column.name() == name);
    let share = |checks: &str, valid: &str| -> Result<Option<Share>, Fault> {
        if !has(checks) {
            return Ok(None);
        }
        let (checks, valid) = (row.try_get(checks)?, row.try_get(valid)?);
        Ok((checks > 0).then_some(Share { valid, checks }))
    };
    let latency: Option<Vec<Option<f64>>> = row.try_get("latency")?;
    let latency = |at: usize| latency.as_ref().and_then(|both| *both.get(at)?);
    let mut host = Host {
        address: row.try_get("address")?,
        uptime_1h: share("checks_1h", "valid_1h")?,
        uptime_24h: share("checks_24h", "valid_24h")?,
        uptime_7d: share("checks_7d", "valid_7d")?,
        uptime_ever: share("checks_ever", "valid_ever")?,
        latency_p50_seconds: latency(0),
        latency_p95_seconds: latency(1),
        ..Host::default()
    };
    if !has("newest_at") {
        return Ok(host);
    }
    if has("name") {
        host.name = row.try_get("name")?;
        host.group = row.try_get("group")?;
    }
    host.is_valid = row.try_get("is_valid")?;
    host.since = time(row, "since")?;
    host.is_longer = row.try_get("is_longer")?;
    host.missed_7d = Some(row.try_get("missed_7d")?);
    host.certificate_days_left = row.try_get("days_left")?;
    host.last_outcome = row.try_get("newest_outcome")?;
    host.latencies = row.try_get::<_, Option<_>>("latencies")?.unwrap_or_default();
    let interval: Option<f64> = row.try_get("interval_seconds")?;
    let gap: Option<f64> = row.try_get("gap_seconds")?;
    host.newest = time(row, "newest_at")?.map(|at| Newest {
        at,
        interval_seconds: interval.or(gap).unwrap_or_default(),
    });
    if let Some(at) = time(row, "failed_at")? {
        host.last_error = Some(LastError {
            at,
            outcome: row.try_get("failed_outcome")?,
            error: row.try_get("failed_error")?,
        });
    }
    Ok(host)
}

pub(super) fn time(row: &Row, name: &str) -> Result<Option<Timestamp>, Fault> {
    let micros: Option<i64> = row.try_get(name)?;
    Ok(micros.and_then(Timestamp::from_unix_micros))
}

/// The newest row, for a table without rows of the last seven days.
async fn newest_ever(session: &Session, source: &str) -> Result<Option<Newest>, Fault> {
    let sql = format!(
        "SELECT {} AS newest_at, interval_seconds FROM {source} \
         WHERE scheduled_at IS NOT NULL ORDER BY scheduled_at DESC LIMIT 1",
        micros("scheduled_at")
    );
    let row = bounded(
        "reading the table",
        ANSWERS_WITHIN,
        session.client.query_opt(&sql, &[]),
    )
    .await?;
    let Some(row) = row else {
        return Ok(None);
    };
    let interval: Option<f64> = row.try_get("interval_seconds")?;
    Ok(time(&row, "newest_at")?.map(|at| Newest {
        at,
        interval_seconds: interval.unwrap_or_default(),
    }))
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
    let rows = session
        .bounded("reading the positions", session.client.query(&sql, &[&group_id]))
        .await?;
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
        .bounded(
            "counting the rejected records",
            session.client.query_one(&sql, &[]),
        )
        .await?;
    Ok(Some(row.try_get(0)?))
}
