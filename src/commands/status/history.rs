//! What `--host` and `--incidents` show: one host's places, last day and outcomes, and the newest incidents. From the state only,
//! with the queries of the status page.

use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use crate::clock::timestamp;
use crate::commands::status::rows::{SETTINGS, no_state};
use crate::page::reader;
use crate::page::snapshot::{Host, Incident, SECOND};
use crate::postgres::{Fault, Session};
use crate::tables::destination::ExistingObjects;
use crate::tables::names::{Object, TableName};
use crate::terminal::{self, NONE, columns, plain, roughly, seconds, wrap};

/// How many incidents are shown below a host's other figures, and how many if only incidents are shown.
const INCIDENTS_OF_HOST: i64 = 5;
const INCIDENTS: i64 = 20;

/// The indent of what does not fit on the line of a terminal and is wrapped.
const INDENT: usize = 4;

/// The width of the latency plot, in characters.
const PLOT_WIDTH: f64 = 30.0;

#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct History {
    now: i64,
    /// `None`: only incidents were asked for.
    host: Option<Host>,
    /// Of seven days, the most frequent first.
    outcomes: Vec<(String, i64)>,
    /// The newest first, each with the name of its host, or its address if it has none.
    incidents: Vec<(String, Incident)>,
}

/// Reads the state. `host` is an address or a `name=`.
pub(super) async fn read(
    session: &Session,
    found: &ExistingObjects,
    host: Option<&str>,
    only_incidents: bool,
    is_state_on: bool,
) -> Result<History, Fault> {
    session.batch("session settings", SETTINGS).await?;
    if let Some(reason) = no_state(session, found, is_state_on).await? {
        return Err(Fault::operator(format!(
            "--host and --incidents read the state that `consume` keeps, but {reason}"
        )));
    }
    let series = found.table.quoted(Object::Series.suffix());
    let address = match host {
        None => None,
        Some(wanted) => Some(address_of(session, &series, wanted).await?),
    };
    let limit = if address.is_none() || only_incidents {
        INCIDENTS
    } else {
        INCIDENTS_OF_HOST
    };
    let sql = format!(
        "SELECT i.*, coalesce((SELECT name FROM {series} s WHERE s.address = i.address AND name IS NOT NULL \
                 ORDER BY last_seen_at DESC LIMIT 1), i.address) AS host \
         FROM ({}) i ORDER BY started_at DESC",
        reader::incidents(&found.table, "$1::text IS NULL OR address = $1")
    );
    let mut history = History {
        now: session.now_micros().await?,
        ..History::default()
    };
    for row in query(session, &sql, &[&address, &limit]).await? {
        history
            .incidents
            .push((row.try_get("host")?, reader::incident(&row)?));
    }
    if let Some(address) = address.filter(|_| !only_incidents) {
        read_host(session, &found.table, address, &mut history).await?;
    }
    Ok(history)
}

async fn query(session: &Session, sql: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, Fault> {
    session.query("reading the state", sql, parameters).await
}

async fn address_of(session: &Session, series: &str, wanted: &str) -> Result<String, Fault> {
    let sql = format!("SELECT DISTINCT address FROM {series} WHERE address = $1 OR name = $1 ORDER BY 1");
    let mut addresses = Vec::new();
    for row in query(session, &sql, &[&wanted]).await? {
        addresses.push(row.try_get::<_, String>(0)?);
    }
    one_of(wanted, addresses)
}

/// Reads the host as its places see it, the latencies of a day, and the outcomes of a week.
async fn read_host(
    session: &Session,
    table: &TableName,
    address: String,
    history: &mut History,
) -> Result<(), Fault> {
    let mut host = Host {
        address,
        ..Host::default()
    };
    for row in query(
        session,
        &reader::series(table, "WHERE address = $1"),
        &[&host.address],
    )
    .await?
    {
        reader::place(&row, &mut host)?;
    }
    host.places.sort_by(|a, b| a.agent.cmp(&b.agent));
    // Every bucket is looked up by its key, so the time does not grow with the other hosts.
    let series = table.quoted(Object::Series.suffix());
    let hours = |count: i32| {
        format!(
            "seconds = 3600 AND starts_at = ANY (ARRAY(SELECT date_bin('1 hour', now(), timestamptz \
             '2000-01-01 00:00:00+00') - interval '1 hour' * n FROM generate_series(0, {count} - 1) n)) \
             AND series_id = ANY (ARRAY(SELECT series_id FROM {series} WHERE address = $1))"
        )
    };
    for row in query(session, &reader::buckets(table, &hours(24)), &[&host.address]).await? {
        host.hours.push(reader::bucket(&row)?);
    }
    host.hours.sort_by_key(|hour| hour.starts_at);
    let sql = format!(
        "WITH week AS (SELECT valid, missed, offline, outcomes FROM {} WHERE {}) \
         SELECT outcome, sum(count)::bigint AS count FROM ( \
             SELECT 'ok' AS outcome, valid::bigint AS count FROM week UNION ALL \
             SELECT 'not checked', coalesce(missed, 0)::bigint + coalesce(offline, 0) FROM week UNION ALL \
             SELECT key, value::bigint FROM week, jsonb_each_text(outcomes) \
         ) counts GROUP BY outcome HAVING sum(count) > 0 ORDER BY 2 DESC, 1",
        table.quoted(Object::Rollups.suffix()),
        hours(7 * 24)
    );
    for row in query(session, &sql, &[&host.address]).await? {
        history.outcomes.push((row.try_get(0)?, row.try_get(1)?));
    }
    history.host = Some(host);
    Ok(())
}

/// The address of the one host that is meant.
fn one_of(wanted: &str, addresses: Vec<String>) -> Result<String, Fault> {
    match addresses.as_slice() {
        [address] => Ok(address.clone()),
        [] => Err(Fault::operator(format!(
            "no host has the address or the name {wanted:?}: `host-metrics status` lists the addresses"
        ))),
        several if several.iter().any(|address| address == wanted) => Ok(wanted.to_owned()),
        several => Err(Fault::operator(format!(
            "several hosts have the name {wanted:?}: name one by its address: {}",
            several.join(", ")
        ))),
    }
}

impl History {
    fn ago(&self, at: Option<i64>) -> String {
        at.map_or_else(|| NONE.to_owned(), |at| roughly((self.now - at) / SECOND))
    }
}

/// Lines for people. In the last columns are errors, which are wrapped to the width of the terminal.
pub(super) fn lines(history: &History, width: Option<usize>) -> Vec<String> {
    let wrapped = |table: Vec<String>| {
        let mut lines = Vec::new();
        for (number, line) in table.iter().enumerate() {
            match number {
                0 => lines.push(line.clone()),
                _ => lines.extend(wrap(line, INDENT, width).lines().map(str::to_owned)),
            }
        }
        lines
    };
    let incidents = wrapped(incidents(history));
    let Some(host) = &history.host else {
        return incidents;
    };
    let name = host.name.as_ref().map(|name| format!("  {}", plain(name)));
    let verdict = match host.is_down {
        Some(true) => format!("DOWN for {}", history.ago(host.since)),
        Some(false) => format!("up for {}", history.ago(host.since)),
        None => "not checked yet".to_owned(),
    };
    let mut lines = vec![plain(&host.address) + &name.unwrap_or_default(), verdict];
    lines.push(String::new());
    lines.extend(wrapped(places(history, host)));
    lines.push(String::new());
    lines.extend(plot(host));
    lines.push(String::new());
    let mut outcomes = terminal::table(["OUTCOMES OF 7 DAYS", " CHECKS"]);
    let counted = |(outcome, count): &(String, i64)| vec![plain(outcome), count.to_string()];
    outcomes.extend(history.outcomes.iter().map(counted));
    lines.extend(columns(&outcomes));
    lines.push(String::new());
    lines.extend(incidents);
    lines
}

fn places(history: &History, host: &Host) -> Vec<String> {
    let heading = ["PLACE", "STATE", " SINCE", " LAST CHECK", "OUTCOME", "ERROR"];
    let mut table = terminal::table(heading);
    for place in &host.places {
        let state = match place.is_valid {
            Some(true) => "up",
            Some(false) => "DOWN",
            None => "?",
        };
        let text = |text: &Option<String>| text.as_deref().map(plain).unwrap_or_default();
        table.push(vec![
            plain(&place.agent),
            state.to_owned(),
            history.ago(place.since),
            history.ago(place.last_check_at) + " ago",
            text(&place.outcome),
            text(&place.error),
        ]);
    }
    columns(&table)
}

/// The median as a full bar, and from there to the 95th percentile a light one.
fn plot(host: &Host) -> Vec<String> {
    let heading = ["HOUR (UTC)", " P50", " P95", " CHECKS", " FAILED", "P50 █ P95 ░"];
    let mut table = terminal::table(heading);
    let longest = host.hours.iter().filter_map(|hour| hour.p95).fold(0.0, f64::max);
    let width = |latency: Option<f64>| match latency {
        Some(latency) if longest > 0.0 => ((latency / longest * PLOT_WIDTH).round() as usize).max(1),
        _ => 0,
    };
    for hour in &host.hours {
        let (median, end) = (width(hour.p50), width(hour.p95));
        let latency = |latency: Option<f64>| latency.map_or_else(|| NONE.to_owned(), seconds);
        table.push(vec![
            minute(hour.starts_at)[5..].to_owned(),
            latency(hour.p50),
            latency(hour.p95),
            hour.counts.checks().to_string(),
            hour.counts.failed.to_string(),
            "█".repeat(median) + &"░".repeat(end.saturating_sub(median)),
        ]);
    }
    columns(&table)
}

fn incidents(history: &History) -> Vec<String> {
    if history.incidents.is_empty() {
        return vec!["No incidents.".to_owned()];
    }
    let heading = [
        "INCIDENT (UTC)",
        " LASTED",
        "HOST",
        "OUTCOME",
        " FAILED CHECKS",
        "PLACES",
        "LAST ERROR",
    ];
    let mut table = terminal::table(heading);
    for (host, incident) in &history.incidents {
        let lasted = roughly((incident.ended_at.unwrap_or(history.now) - incident.started_at) / SECOND);
        let goes_on = if incident.ended_at.is_none() {
            " so far"
        } else {
            ""
        };
        table.push(vec![
            minute(incident.started_at),
            lasted + goes_on,
            plain(host),
            plain(&incident.outcome),
            incident.checks.to_string(),
            plain(&incident.places.join(", ")),
            incident.last_error.as_deref().map(plain).unwrap_or_default(),
        ]);
    }
    columns(&table)
}

/// `2026-11-28 16:20`
fn minute(micros: i64) -> String {
    timestamp(micros).to_string()[..16].replace('T', " ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::snapshot::{Bucket, Counts, Place};

    const NOW: i64 = 1_790_000_000_000_000;

    fn ago(seconds: i64) -> i64 {
        NOW - seconds * SECOND
    }

    #[test]
    fn people_read_one_hosts_places_latency_by_hour_outcomes_and_incidents() {
        let place = |agent: &str, is_valid, error: Option<&str>| Place {
            agent: agent.into(),
            is_valid: Some(is_valid),
            since: Some(ago(600)),
            last_check_at: Some(ago(5)),
            outcome: Some(if is_valid { "ok" } else { "bad_status" }.into()),
            error: error.map(str::to_owned),
            ..Place::default()
        };
        let counts = Counts {
            valid: 58,
            failed: 2,
            ..Counts::default()
        };
        let hour = |hours: i64, p50, p95| Bucket {
            starts_at: ago(hours * 3_600),
            counts,
            p50,
            p95,
            ..Bucket::default()
        };
        let history = History {
            now: NOW,
            host: Some(Host {
                address: "https://a.example/".into(),
                name: Some("Shop\x1b".into()),
                is_down: Some(true),
                since: Some(ago(600)),
                places: vec![
                    place("fra-1", false, Some("status 503")),
                    place("nyc-1", true, None),
                ],
                hours: vec![
                    hour(2, Some(0.1), Some(0.3)),
                    hour(1, None, None),
                    hour(0, Some(0.001), Some(0.002)),
                ],
                ..Host::default()
            }),
            outcomes: vec![("ok".into(), 1_000), ("bad_status".into(), 7)],
            incidents: [
                Incident {
                    started_at: ago(600),
                    ended_at: None,
                    checks: 10,
                    outcome: "bad_status".into(),
                    places: vec!["fra-1".into(), "nyc-1".into()],
                    last_error: Some("status 503".into()),
                    ..Incident::default()
                },
                Incident {
                    started_at: ago(90_000),
                    ended_at: Some(ago(89_970)),
                    checks: 1,
                    outcome: "dns_error".into(),
                    ..Incident::default()
                },
            ]
            .map(|incident| ("https://a.example/".to_owned(), incident))
            .to_vec(),
        };
        let expected = "\
https://a.example/  Shop\u{20}
DOWN for 10 min

PLACE  STATE   SINCE  LAST CHECK  OUTCOME     ERROR
fra-1  DOWN   10 min     5 s ago  bad_status  status 503
nyc-1  up     10 min     5 s ago  ok

HOUR (UTC)      P50     P95  CHECKS  FAILED  P50 █ P95 ░
09-21 12:13  100 ms  300 ms      60       2  ██████████░░░░░░░░░░░░░░░░░░░░
09-21 13:13       -       -      60       2
09-21 14:13  1.0 ms  2.0 ms      60       2  █

OUTCOMES OF 7 DAYS  CHECKS
ok                    1000
bad_status               7

INCIDENT (UTC)           LASTED  HOST                OUTCOME     FAILED CHECKS  PLACES        LAST ERROR
2026-09-21 14:03  10 min so far  https://a.example/  bad_status             10  fra-1, nyc-1  status 503
2026-09-20 13:13           30 s  https://a.example/  dns_error               1";
        assert_eq!(lines(&history, None).join("\n"), expected);
        assert_eq!(lines(&History::default(), None), ["No incidents."]);
    }

    #[test]
    fn an_address_wins_over_a_name_and_a_name_must_be_of_one_host() {
        let one = |addresses: &[&str]| {
            one_of(
                "a",
                addresses.iter().map(|address| (*address).to_owned()).collect(),
            )
            .map_err(|fault| fault.to_string())
        };
        assert_eq!(one(&["b"]), Ok("b".to_owned()));
        assert_eq!(one(&["a", "b"]), Ok("a".to_owned()));
        assert!(one(&[]).unwrap_err().contains("no host has"));
        assert!(one(&["b", "c"]).unwrap_err().contains("by its address: b, c"));
    }
}
