//! `host-metrics status`: the state of the hosts, and the lag of the pipeline, from the tables.
//!
//! Owns the rule for stale data, and the output: a table for people, JSON for programs. `rows` queries Postgres, `lag` asks
//! Kafka.

mod history;
mod lag;
mod rows;
mod watch;

use std::collections::HashMap;
use std::fmt::Write as _;

use anstyle::AnsiColor;
use serde::Serialize;

use crate::commands::status::lag::{Lag, lag};
use crate::commands::status::rows::{Host, MAX_COUNTED, Rows, State};
use crate::config::StatusConfig;
use crate::consume::state::GROUP_SUFFIX;
use crate::postgres;
use crate::sample::Timestamp;
use crate::tables::destination;
use crate::terminal::{
    self, NONE, columns, counted, fit, percent, plain, plain_json, plain_lines, roughly, seconds, sparkline,
};

pub use watch::watch;

/// Data is stale if the newest row is older than this many intervals of its host, plus a minute for the pipeline.
const STALE_AFTER_INTERVALS: f64 = 3.0;
const STALE_AFTER_SECONDS: f64 = 60.0;

/// The answer, as the JSON document `schema/status.v1.json` has it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    hosts: Vec<Host>,
    pipeline: Pipeline,
    /// Whether no new row came for too long.
    pub stale: bool,
}

#[derive(Clone, Debug, Serialize)]
struct Pipeline {
    /// The database's clock.
    now: Timestamp,
    newest_row: Option<Timestamp>,
    /// Negative if the clock of the writer is ahead.
    newest_row_age_seconds: Option<f64>,
    stale_after_seconds: Option<f64>,
    stale_because: Option<String>,
    missing_columns: Vec<&'static str>,
    /// At most one more than [`MAX_COUNTED`].
    rejected_records: Option<i64>,
    counted_rows_because: Option<String>,
    group_id: String,
    lag_records: Option<i64>,
    state_lag_records: Option<i64>,
    lag_unknown_because: Option<String>,
    partitions: Vec<Lag>,
    #[serde(skip)]
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
    Ok(Report::new(rows, lag, config))
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
    Ok(plain_lines(&joined(history::lines(&history, width), width)))
}

impl Report {
    /// `lag`: or why it is unknown.
    fn new(rows: Rows, lag: Result<Vec<Lag>, String>, config: &StatusConfig) -> Self {
        let newest = rows
            .hosts
            .iter()
            .filter_map(|host| host.last_check.zip(host.interval_seconds))
            .max_by_key(|(at, _)| *at);
        let stale_because = stale_because(&rows, newest);
        let lag_unknown_because = lag.as_ref().err().cloned();
        let state_lag_records = lag.as_ref().ok().and_then(|lag| state_lag(&rows, lag));
        Self {
            stale: stale_because.is_some(),
            pipeline: Pipeline {
                now: rows.now,
                newest_row: newest.map(|(at, _)| at),
                newest_row_age_seconds: newest.map(|(at, _)| age_seconds(at, rows.now)),
                stale_after_seconds: newest
                    .map(|(_, interval_seconds)| stale_after_seconds(interval_seconds)),
                stale_because,
                missing_columns: rows.missing_columns,
                rejected_records: rows.rejected,
                counted_rows_because: rows.counted_because,
                group_id: config.group_id.clone(),
                lag_records: lag
                    .as_ref()
                    .ok()
                    .map(|lag| lag.iter().map(|lag| lag.records).sum()),
                state_lag_records,
                lag_unknown_because,
                partitions: lag.unwrap_or_default(),
                topics: config.topics.clone(),
            },
            hosts: rows.hosts,
        }
    }

    /// Takes the trends of a report of counted rows, which have each check; in the state, five minutes are one value.
    pub(super) fn take_trends(&mut self, counted: Self) {
        let counted = counted.hosts.into_iter();
        let mut trends: HashMap<_, _> = counted.map(|host| (host.address, host.latencies)).collect();
        for host in &mut self.hosts {
            host.latencies = trends.remove(&host.address).unwrap_or_default();
        }
    }

    /// How many hosts are up and how many are down.
    pub(super) fn up_and_down(&self) -> (usize, usize) {
        let count = |state| self.hosts.iter().filter(|host| host.state == state).count();
        (count(State::Up), count(State::Down))
    }
}

/// Why the data is stale; `None`: it is not. `newest`: the time and the interval of the newest row.
fn stale_because(rows: &Rows, newest: Option<(Timestamp, f64)>) -> Option<String> {
    match newest {
        Some(newest) if !is_overdue(newest, rows.now) => None,
        Some((at, interval_seconds)) => Some(format!(
            "the newest row is {} old, and its host is checked every {}",
            roughly(age_seconds(at, rows.now) as i64),
            roughly(interval_seconds as i64)
        )),
        None if !rows.hosts.is_empty() && rows.missing_columns.contains(&"scheduled_at") => {
            Some("the age of the rows is unknown, because the table has no column scheduled_at".to_owned())
        }
        None => Some("the table has no row of the last seven days".to_owned()),
    }
}

/// The lag of the state in records; `None`: there is no state.
fn state_lag(rows: &Rows, lag: &[Lag]) -> Option<i64> {
    let behind = |lag: &Lag| {
        let position = rows.state_positions.get(&(lag.topic.clone(), lag.partition));
        // Without a position of its own, the state starts at the first position of the rows.
        position
            .map_or(lag.end_offset, |position| lag.end_offset - position)
            .max(0)
    };
    let has_state = rows.counted_because.is_none();
    has_state.then(|| lag.iter().map(behind).sum())
}

fn is_overdue((at, interval_seconds): (Timestamp, f64), now: Timestamp) -> bool {
    age_seconds(at, now) > stale_after_seconds(interval_seconds)
}

/// Negative if the clock of the writer is ahead.
fn age_seconds(at: Timestamp, now: Timestamp) -> f64 {
    (now.unix_micros() - at.unix_micros()) as f64 / 1e6
}

fn stale_after_seconds(interval_seconds: f64) -> f64 {
    STALE_AFTER_INTERVALS * interval_seconds + STALE_AFTER_SECONDS
}

/// One JSON object, described by `schema/status.v1.json`, and a line end.
pub fn json(report: &Report) -> String {
    let text = serde_json::to_string(report).expect("numbers, texts and lists have a JSON form");
    plain_json(&text) + "\n"
}

/// For people, with colours: a row per host, then the pipeline. Lines are cut to `width` characters.
pub fn text(report: &Report, width: Option<usize>) -> String {
    let pipeline = &report.pipeline;
    let mut lines = hosts(report, width);
    lines.push(String::new());
    lines.extend(columns(&of_the_pipeline(pipeline)));
    if let Some(reason) = &pipeline.counted_rows_because {
        lines.push(format!("Counted from the rows, because {reason}."));
    }
    if !pipeline.missing_columns.is_empty() {
        lines.push(format!(
            "Not everything is shown, because the table has no column {}.",
            pipeline.missing_columns.join(", ")
        ));
    }
    if let Some(reason) = &pipeline.stale_because {
        lines.push(format!("STALE: {reason}."));
    }
    joined(lines, width)
}

/// A heading and a row per host, with the columns that fit in `width`. A line with an error may be longer.
pub(super) fn hosts(report: &Report, width: Option<usize>) -> Vec<String> {
    if report.hosts.is_empty() {
        vec!["The table has no row of any host.".to_owned()]
    } else if report.pipeline.missing_columns.contains(&"scheduled_at") {
        columns(&counted_only(&report.hosts))
    } else {
        by_group(report, width)
    }
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
    let mut hosts: Vec<&Host> = report.hosts.iter().collect();
    hosts.sort_by_cached_key(|host| {
        (
            host.group.is_none(),
            host.group.clone(),
            title(host).to_lowercase(),
        )
    });
    let mut table = columns(&narrowed(table(&hosts, report.pipeline.now), width)).into_iter();
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
    " 1 H",
    "ADDRESS",
    " P50",
    " LAST CHECK",
    "LATENCY TREND",
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

fn table(hosts: &[&Host], now: Timestamp) -> Vec<Vec<String>> {
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
    let ago = |at: Timestamp| roughly(age_seconds(at, now) as i64);
    for host in hosts {
        let since = host.since.map_or_else(none, |since| {
            let longer = if host.since_is_earlier { "> " } else { "" };
            format!("{longer}{}", ago(since))
        });
        let last_error = host.last_error_at.map_or_else(String::new, |at| {
            let outcome = host.last_error_outcome.as_deref().unwrap_or("not valid");
            let error = host.last_error.as_ref().map(|error| format!(": {error}"));
            format!("{} ago, {outcome}{}", ago(at), error.unwrap_or_default())
        });
        table.push(vec![
            title(host),
            host.name
                .as_ref()
                .map_or_else(String::new, |_| plain(&host.address)),
            word(host.state),
            since,
            host.uptime_1h.map_or_else(none, percent),
            host.uptime_24h.map_or_else(none, percent),
            host.uptime_7d.map_or_else(none, percent),
            host.latency_p50_seconds.map_or_else(none, seconds),
            host.latency_p95_seconds.map_or_else(none, seconds),
            host.certificate_days_left
                .map_or_else(none, |days| format!("{days} d")),
            host.last_check.map_or_else(none, |at| format!("{} ago", ago(at))),
            sparkline(&host.latencies),
            plain(&last_error),
        ]);
    }
    if hosts.iter().all(|host| host.name.is_none()) {
        table.iter_mut().for_each(|row| drop(row.remove(1)));
    }
    table
}

fn word(state: State) -> String {
    let (colour, word) = match state {
        State::Up => (AnsiColor::Green, "up"),
        State::Down => (AnsiColor::Red, "DOWN"),
        State::Stale => (AnsiColor::Yellow, "stale"),
        State::Unknown => (AnsiColor::Yellow, "?"),
    };
    let style = colour.on_default();
    format!("{style}{word}{style:#}")
}

/// The rows for a table without times.
fn counted_only(hosts: &[Host]) -> Vec<Vec<String>> {
    let mut table = terminal::table(["HOST", " CHECKS", " UPTIME", " P50", " P95"]);
    let none = || NONE.to_owned();
    for host in hosts {
        table.push(vec![
            plain(&host.address),
            host.checks_ever.map_or_else(none, |checks| checks.to_string()),
            host.uptime_ever.map_or_else(none, percent),
            host.latency_p50_seconds.map_or_else(none, seconds),
            host.latency_p95_seconds.map_or_else(none, seconds),
        ]);
    }
    table
}

fn of_the_pipeline(pipeline: &Pipeline) -> Vec<Vec<String>> {
    let none = || NONE.to_owned();
    let group_id = &pipeline.group_id;
    let newest = pipeline
        .newest_row_age_seconds
        .map_or_else(none, |age| format!("{} old", roughly(age as i64)));
    let lag = match (&pipeline.lag_unknown_because, pipeline.lag_records) {
        (Some(reason), _) => format!("unknown: {reason}"),
        (None, records) => format!(
            "{} in {} of {}, group {group_id}",
            counted(records.unwrap_or_default(), "record"),
            counted(pipeline.partitions.len(), "partition"),
            pipeline.topics.join(", ")
        ),
    };
    let state_lag = pipeline.state_lag_records.map_or_else(none, |records| {
        format!("{}, group {group_id}{GROUP_SUFFIX}", counted(records, "record"))
    });
    let rejected = match pipeline.rejected_records {
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
