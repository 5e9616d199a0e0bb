//! `host-metrics status`: the state of the hosts, and the lag of the pipeline, from the tables.
//!
//! Owns the rule for stale data, and the output: a table for people, JSON for programs. `rows` queries Postgres, `lag` asks
//! Kafka.

mod history;
mod lag;
mod rows;
mod watch;

use std::fmt::Write as _;

use serde::Serialize;

use crate::commands::status::lag::{Lag, lag};
use crate::commands::status::rows::{Host, MAX_COUNTED, Newest, Rows, Share};
use crate::config::StatusConfig;
use crate::consume::state::GROUP_SUFFIX;
use crate::postgres;
use crate::sample::Timestamp;
use crate::tables::destination;
use crate::terminal::{
    self, NONE, columns, counted, fit, percent, plain, plain_json, roughly, seconds, sparkline,
};

pub use watch::watch;

/// Data is stale if the newest row is older than this many intervals of its host, plus a minute for the pipeline.
const STALE_AFTER_INTERVALS: f64 = 3.0;
const STALE_AFTER_SECONDS: f64 = 60.0;

#[derive(Clone, Debug)]
pub struct Report {
    rows: Rows,
    /// Or why it is unknown.
    lag: Result<Vec<Lag>, String>,
    group_id: String,
    topics: Vec<String>,
}

/// Reads the tables, and asks Kafka for the lag. If Kafka does not answer, the report says so.
pub fn run(config: &StatusConfig) -> anyhow::Result<Report> {
    let rows = postgres::once(&config.database, async |session| {
        let found = destination::find(session).await?;
        Ok(rows::read(session, &found, &config.group_id, config.is_state_on).await?)
    })?;
    let lag = match (&config.kafka, &rows.positions) {
        (None, _) => Err("KAFKA_BOOTSTRAP_SERVERS is not set".to_owned()),
        (_, None) => Err(format!(
            "table {} does not exist, or this user may not SELECT from it",
            config.database.table.quoted("_offsets")
        )),
        (Some(kafka), Some(positions)) => lag(kafka, &config.topics, positions),
    };
    Ok(Report {
        rows,
        lag,
        group_id: config.group_id.clone(),
        topics: config.topics.clone(),
    })
}

/// What `--host` and `--incidents` show, for people. `host` is an address or a `name=`.
pub fn history(
    config: &StatusConfig,
    host: Option<&str>,
    only_incidents: bool,
    width: Option<usize>,
) -> anyhow::Result<String> {
    let history = postgres::once(&config.database, async |session| {
        let found = destination::find(session).await?;
        Ok(history::read(session, &found, host, only_incidents, config.is_state_on).await?)
    })?;
    Ok(joined(history::lines(&history, width), width))
}

impl Report {
    /// Whether no new row came for too long.
    pub fn is_stale(&self) -> bool {
        self.stale_because().is_some()
    }

    /// Why the data is stale; `None`: it is not.
    fn stale_because(&self) -> Option<String> {
        let Rows {
            newest,
            missing_columns,
            hosts,
            ..
        } = &self.rows;
        match newest {
            Some(newest) if !self.is_overdue(*newest) => None,
            Some(newest) => Some(format!(
                "the newest row is {} old, and its host is checked every {}",
                roughly(self.age_seconds(newest.at) as i64),
                roughly(newest.interval_seconds as i64)
            )),
            None if !hosts.is_empty() && missing_columns.contains(&"scheduled_at") => Some(
                "the age of the rows is unknown, because the table has no column scheduled_at".to_owned(),
            ),
            None => Some("the table has no row".to_owned()),
        }
    }

    /// The lag of the state in records; `None`: unknown, or there is no state.
    fn state_lag(&self) -> Option<i64> {
        let Rows {
            state_positions,
            counted_because: None,
            ..
        } = &self.rows
        else {
            return None;
        };
        let behind = |lag: &Lag| {
            let position = state_positions.get(&(lag.topic.clone(), lag.partition));
            // Without a position of its own, the state starts at the first position of the rows.
            position
                .map_or(lag.end_offset, |position| lag.end_offset - position)
                .max(0)
        };
        Some(self.lag.as_ref().ok()?.iter().map(behind).sum())
    }

    fn is_overdue(&self, newest: Newest) -> bool {
        self.age_seconds(newest.at) > stale_after_seconds(newest)
    }

    /// Negative if the clock of the writer is ahead.
    fn age_seconds(&self, at: Timestamp) -> f64 {
        self.rows.now_micros.saturating_sub(at.unix_micros()) as f64 / 1e6
    }

    fn state(&self, host: &Host) -> State {
        if host.newest.is_some_and(|newest| self.is_overdue(newest)) {
            return State::Stale;
        }
        match host.is_valid {
            Some(true) => State::Up,
            Some(false) => State::Down,
            None => State::Unknown,
        }
    }
}

fn stale_after_seconds(newest: Newest) -> f64 {
    STALE_AFTER_INTERVALS * newest.interval_seconds + STALE_AFTER_SECONDS
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Up,
    Down,
    /// Its newest row is too old.
    Stale,
    /// There was no check for seven days, or the table lacks a column.
    Unknown,
}

/// One JSON object, described by `schema/status.v1.json`, and a line end.
pub fn json(report: &Report) -> String {
    let hosts = report
        .rows
        .hosts
        .iter()
        .map(|host| HostDocument::of(report, host));
    let document = Document {
        hosts: hosts.collect(),
        pipeline: PipelineDocument::of(report),
        stale: report.is_stale(),
    };
    let text = serde_json::to_string(&document).expect("numbers, texts and lists have a JSON form");
    let mut text = plain_json(&text);
    text.push('\n');
    text
}

#[derive(Serialize)]
struct Document<'a> {
    hosts: Vec<HostDocument<'a>>,
    pipeline: PipelineDocument<'a>,
    stale: bool,
}

#[derive(Serialize)]
struct HostDocument<'a> {
    address: &'a str,
    name: Option<&'a str>,
    group: Option<&'a str>,
    state: State,
    since: Option<String>,
    since_is_earlier: bool,
    uptime_1h: Option<f64>,
    uptime_24h: Option<f64>,
    uptime_7d: Option<f64>,
    uptime_ever: Option<f64>,
    missed_7d: Option<i64>,
    latency_p50_seconds: Option<f64>,
    latency_p95_seconds: Option<f64>,
    certificate_days_left: Option<i32>,
    interval_seconds: Option<f64>,
    last_check: Option<String>,
    last_outcome: Option<&'a str>,
    last_error_at: Option<String>,
    last_error_outcome: Option<&'a str>,
    last_error: Option<&'a str>,
    latencies: &'a [Option<f64>],
}

impl<'a> HostDocument<'a> {
    fn of(report: &Report, host: &'a Host) -> Self {
        let share = |share: Option<Share>| share.map(|Share { valid, checks }| valid as f64 / checks as f64);
        let failed = host.last_error.as_ref();
        Self {
            address: &host.address,
            name: host.name.as_deref(),
            group: host.group.as_deref(),
            state: report.state(host),
            since: host.since.map(|at| at.to_string()),
            since_is_earlier: host.is_longer,
            uptime_1h: share(host.uptime_1h),
            uptime_24h: share(host.uptime_24h),
            uptime_7d: share(host.uptime_7d),
            uptime_ever: share(host.uptime_ever),
            missed_7d: host.missed_7d,
            latency_p50_seconds: host.latency_p50_seconds,
            latency_p95_seconds: host.latency_p95_seconds,
            certificate_days_left: host.certificate_days_left,
            interval_seconds: host.newest.map(|newest| newest.interval_seconds),
            last_check: host.newest.map(|newest| newest.at.to_string()),
            last_outcome: host.last_outcome.as_deref(),
            last_error_at: failed.map(|failed| failed.at.to_string()),
            last_error_outcome: failed.and_then(|failed| failed.outcome.as_deref()),
            last_error: failed.and_then(|failed| failed.error.as_deref()),
            latencies: &host.latencies,
        }
    }
}

#[derive(Serialize)]
struct PipelineDocument<'a> {
    now: Option<String>,
    newest_row: Option<String>,
    newest_row_age_seconds: Option<f64>,
    stale_after_seconds: Option<f64>,
    stale_because: Option<String>,
    missing_columns: &'a [&'static str],
    rejected_records: Option<i64>,
    counted_rows_because: Option<&'a str>,
    group_id: &'a str,
    lag_records: Option<i64>,
    state_lag_records: Option<i64>,
    lag_unknown_because: Option<&'a str>,
    partitions: &'a [Lag],
}

impl<'a> PipelineDocument<'a> {
    fn of(report: &'a Report) -> Self {
        let Report {
            rows, lag, group_id, ..
        } = report;
        Self {
            now: Timestamp::from_unix_micros(rows.now_micros).map(|now| now.to_string()),
            newest_row: rows.newest.map(|newest| newest.at.to_string()),
            newest_row_age_seconds: rows.newest.map(|newest| report.age_seconds(newest.at)),
            stale_after_seconds: rows.newest.map(stale_after_seconds),
            stale_because: report.stale_because(),
            missing_columns: &rows.missing_columns,
            rejected_records: rows.rejected,
            counted_rows_because: rows.counted_because.as_deref(),
            group_id,
            lag_records: lag.as_ref().ok().map(|lag| total(lag)),
            state_lag_records: report.state_lag(),
            lag_unknown_because: lag.as_ref().err().map(String::as_str),
            partitions: lag.as_deref().unwrap_or_default(),
        }
    }
}

fn total(lag: &[Lag]) -> i64 {
    lag.iter().map(|lag| lag.records).sum()
}

/// For people: a row per host, then the pipeline. Lines are cut to `width` characters.
pub fn text(report: &Report, width: Option<usize>) -> String {
    let rows = &report.rows;
    let mut lines = Vec::new();
    if rows.hosts.is_empty() {
        lines.push("The table has no row of any host.".to_owned());
    } else if rows.missing_columns.contains(&"scheduled_at") {
        lines.extend(columns(&counted_only(report)));
    } else {
        lines.extend(by_group(report, width));
    }
    lines.push(String::new());
    lines.extend(columns(&pipeline(report)));
    if let Some(reason) = &rows.counted_because {
        lines.push(format!("Counted from the rows, because {reason}."));
    }
    if !rows.missing_columns.is_empty() {
        lines.push(format!(
            "Not everything is shown, because the table has no column {}.",
            rows.missing_columns.join(", ")
        ));
    }
    if let Some(reason) = report.stale_because() {
        lines.push(format!("STALE: {reason}."));
    }
    joined(lines, width)
}

fn joined(lines: Vec<String>, width: Option<usize>) -> String {
    let mut text = String::new();
    for line in lines {
        let line = width.map_or_else(|| line.clone(), |width| fit(&line, width));
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{line}");
    }
    text
}

/// The table, with a heading for each group as on the status page: hosts without a group come last.
fn by_group(report: &Report, width: Option<usize>) -> Vec<String> {
    let mut hosts: Vec<&Host> = report.rows.hosts.iter().collect();
    hosts.sort_by_cached_key(|host| {
        (
            host.group.is_none(),
            host.group.clone(),
            title(host).to_lowercase(),
        )
    });
    let mut table = columns(&narrowed(table(report, &hosts), width)).into_iter();
    let mut lines: Vec<String> = table.next().into_iter().collect();
    for group in hosts.chunk_by(|a, b| a.group == b.group) {
        match &group[0].group {
            Some(name) => lines.extend([String::new(), plain(name)]),
            None if group.len() < hosts.len() => lines.extend([String::new(), "Other sites".to_owned()]),
            None => {}
        }
        lines.extend(table.by_ref().take(group.len()));
    }
    lines
}

/// The name, or the address of a host without one.
fn title(host: &Host) -> String {
    plain(host.name.as_ref().unwrap_or(&host.address))
}

/// The columns that a narrow terminal leaves out, the least important first.
const DISPENSABLE: [&str; 10] = [
    "LATENCY TREND",
    " 1 H",
    "ADDRESS",
    " P50",
    " LAST CHECK",
    " 24 H",
    " CERT",
    " P95",
    " SINCE",
    " 7 D",
];

/// Room for the beginning of the last error.
const ERROR_WIDTH: usize = 24;

/// The table without columns for which there is no room.
fn narrowed(mut table: Vec<Vec<String>>, width: Option<usize>) -> Vec<Vec<String>> {
    let Some(width) = width else { return table };
    let has_errors = table
        .iter()
        .skip(1)
        .any(|row| row.last().is_some_and(|error| !error.is_empty()));
    let room = width.saturating_sub(if has_errors { ERROR_WIDTH } else { 0 });
    for row in &mut table {
        row[0] = fit(&row[0], (width / 2).max(20));
        row[1] = fit(&row[1], (width / 2).max(20));
    }
    for heading in DISPENSABLE {
        let rest: Vec<_> = table.iter().map(|row| row[..row.len() - 1].to_vec()).collect();
        if columns(&rest).iter().all(|line| terminal::width(line) <= room) {
            break;
        }
        if let Some(at) = table[0].iter().position(|cell| cell == heading) {
            table.iter_mut().for_each(|row| drop(row.remove(at)));
        }
    }
    if !has_errors {
        table.iter_mut().for_each(|row| drop(row.pop()));
    }
    table
}

fn table(report: &Report, hosts: &[&Host]) -> Vec<Vec<String>> {
    let headline = [
        "HOST",
        "ADDRESS",
        "STATE",
        " SINCE",
        " 1 H",
        " 24 H",
        " 7 D",
        " P50",
        " P95",
        " CERT",
        " LAST CHECK",
        "LATENCY TREND",
        "LAST ERROR",
    ];
    let mut table = terminal::table(headline);
    let none = || NONE.to_owned();
    let share = |share: Option<Share>| share.map_or_else(none, |share| percent(share.valid, share.checks));
    let ago = |at: Timestamp| roughly(report.age_seconds(at) as i64);
    for host in hosts {
        let since = host.since.map_or_else(none, |since| {
            let longer = if host.is_longer { "> " } else { "" };
            format!("{longer}{}", ago(since))
        });
        let last_error = host.last_error.as_ref().map_or_else(String::new, |failed| {
            let outcome = failed.outcome.as_deref().unwrap_or("not valid");
            let error = failed.error.as_deref().map(|error| format!(": {error}"));
            format!("{} ago, {outcome}{}", ago(failed.at), error.unwrap_or_default())
        });
        table.push(vec![
            title(host),
            host.name
                .as_ref()
                .map_or_else(String::new, |_| plain(&host.address)),
            word(report.state(host)).to_owned(),
            since,
            share(host.uptime_1h),
            share(host.uptime_24h),
            share(host.uptime_7d),
            host.latency_p50_seconds.map_or_else(none, seconds),
            host.latency_p95_seconds.map_or_else(none, seconds),
            host.certificate_days_left
                .map_or_else(none, |days| format!("{days} d")),
            host.newest
                .map_or_else(none, |newest| format!("{} ago", ago(newest.at))),
            sparkline(&host.latencies),
            plain(&last_error),
        ]);
    }
    if hosts.iter().all(|host| host.name.is_none()) {
        table.iter_mut().for_each(|row| drop(row.remove(1)));
    }
    table
}

fn word(state: State) -> &'static str {
    match state {
        State::Up => "up",
        State::Down => "DOWN",
        State::Stale => "stale",
        State::Unknown => "?",
    }
}

/// The rows for a table without times.
fn counted_only(report: &Report) -> Vec<Vec<String>> {
    let mut table = terminal::table(["HOST", " CHECKS", " UPTIME", " P50", " P95"]);
    let none = || NONE.to_owned();
    for host in &report.rows.hosts {
        let share = host.uptime_ever;
        table.push(vec![
            plain(&host.address),
            share.map_or_else(none, |share| share.checks.to_string()),
            share.map_or_else(none, |share| percent(share.valid, share.checks)),
            host.latency_p50_seconds.map_or_else(none, seconds),
            host.latency_p95_seconds.map_or_else(none, seconds),
        ]);
    }
    table
}

fn pipeline(report: &Report) -> Vec<Vec<String>> {
    let Report {
        rows,
        lag,
        group_id,
        topics,
    } = report;
    let newest = rows.newest.map_or_else(
        || NONE.to_owned(),
        |newest| {
            let age = roughly(report.age_seconds(newest.at) as i64);
            format!("{age} old")
        },
    );
    let lag = match lag {
        Ok(lag) => {
            let (records, partitions) = (counted(total(lag), "record"), counted(lag.len(), "partition"));
            format!(
                "{records} in {partitions} of {}, group {group_id}",
                topics.join(", ")
            )
        }
        Err(reason) => format!("unknown: {reason}"),
    };
    let state_lag = match report.state_lag() {
        Some(records) => format!("{}, group {group_id}{GROUP_SUFFIX}", counted(records, "record")),
        None => NONE.to_owned(),
    };
    let rejected = match rows.rejected {
        None => {
            "unknown: the table of rejected records does not exist, or this user may not read it".to_owned()
        }
        Some(count) if count > MAX_COUNTED => format!("more than {MAX_COUNTED} records"),
        Some(count) => counted(count, "record"),
    };
    [
        ("newest row", newest),
        ("lag", lag),
        ("state lag", state_lag),
        ("rejected", rejected),
    ]
    .map(|(name, value)| vec![name.to_owned(), plain(&value)])
    .to_vec()
}

#[cfg(test)]
mod tests;
