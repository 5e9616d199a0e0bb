//! The stored state: the statements of a flush, and how rows become hosts and buckets, and these become rows.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::SinkExt;
use futures_util::future::{join, join3, join4};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row, Statement};

use crate::consume::fold::Fold;
use crate::consume::fold::host::{Certificate, Checks, Host, Incident, Series, Verdict};
use crate::consume::fold::rollup::{Key, Rollup};
use crate::duration;
use crate::tables::buckets::series_id;
use crate::tables::names::TableName;
use crate::tables::row::{HEADER, TRAILER};
use crate::tables::state::{
    INCIDENTS, SERIES, add_series, copy_rollups, read_incidents, read_series, take_rollups,
};

/// The bytes that are sent at once, as for the rows.
const CHUNK_BYTES: usize = 128 * 1024;

/// The statements of a flush.
pub struct Statements {
    add_series: Statement,
    read_series: Statement,
    read_incidents: Statement,
    take_rollups: Statement,
    put_series: Statement,
    put_incidents: Statement,
    copy_rollups: Statement,
}

impl Statements {
    pub(super) async fn prepare(client: &Client, table: &TableName) -> Result<Self, tokio_postgres::Error> {
        Ok(Self {
            add_series: client.prepare(&add_series(table)).await?,
            read_series: client.prepare(&read_series(table)).await?,
            read_incidents: client.prepare(&read_incidents(table)).await?,
            take_rollups: client.prepare(&take_rollups(table)).await?,
            put_series: client.prepare(&SERIES.put(table)).await?,
            put_incidents: client.prepare(&INCIDENTS.put(table)).await?,
            copy_rollups: client.prepare(&copy_rollups(table)).await?,
        })
    }
}

/// Reads the stored state of the batch's hosts, and locks their rows. Adds the stored buckets to `rollups`.
pub(super) async fn read(
    client: &Client,
    statements: &Statements,
    fold: &Fold<'_>,
    rollups: &mut [(Key, Rollup)],
) -> Result<BTreeMap<String, Host>, tokio_postgres::Error> {
    let (mut ids, mut of_hosts, mut agents) = (vec![], vec![], vec![]);
    for (id, address, agent) in fold.series() {
        ids.push(id);
        of_hosts.push(address);
        agents.push(agent);
    }
    let mut addresses = of_hosts.clone();
    addresses.dedup();
    let keys = || rollups.iter().map(|(key, _)| key);
    let widths: Vec<i32> = keys().map(|key| key.seconds).collect();
    let starts: Vec<SystemTime> = keys().map(|key| time(key.starts_at)).collect();
    let of_series: Vec<i64> = keys().map(|key| key.series_id).collect();

    // They are sent in the order in which they are polled, without waits between them.
    let series_params: [&(dyn ToSql + Sync); 3] = [&ids, &of_hosts, &agents];
    let host_params: [&(dyn ToSql + Sync); 1] = [&addresses];
    let rollup_params: [&(dyn ToSql + Sync); 3] = [&widths, &starts, &of_series];
    let (added, series, incidents, taken) = join4(
        client.execute(&statements.add_series, &series_params),
        client.query(&statements.read_series, &host_params),
        client.query(&statements.read_incidents, &host_params),
        client.query(&statements.take_rollups, &rollup_params),
    )
    .await;
    added?;
    let mut hosts: BTreeMap<String, Host> = BTreeMap::new();
    for row in series? {
        let host = hosts.entry(row.try_get("address")?).or_default();
        host.series.insert(row.try_get("agent")?, series_of(&row)?);
    }
    for row in incidents? {
        let host = hosts.entry(row.try_get("address")?).or_default();
        host.incidents.push(incident_of(&row)?);
    }
    for row in taken? {
        let key = Key {
            seconds: row.try_get("seconds")?,
            starts_at: micros(row.try_get("starts_at")?),
            series_id: row.try_get("series_id")?,
        };
        if let Ok(index) = rollups.binary_search_by_key(&key, |(key, _)| *key) {
            rollups[index].1.merge(&rollup_of(&row)?);
        }
    }
    Ok(hosts)
}

/// Writes what has changed, and commits.
pub(super) async fn write(
    client: &Client,
    statements: &Statements,
    stored: &BTreeMap<String, Host>,
    hosts: &BTreeMap<String, Host>,
    rollups: &[(Key, Rollup)],
) -> Result<(), tokio_postgres::Error> {
    let mut changed_series = Vec::new();
    let mut changed_incidents = Vec::new();
    for (address, host) in hosts {
        let before = stored.get(address);
        let verdict = host.verdict();
        let is_same_verdict = before.is_some_and(|before| before.verdict() == verdict);
        for (agent, series) in &host.series {
            let is_same = before.is_some_and(|before| before.series.get(agent) == Some(series));
            // The row of a new place has no verdict yet.
            let is_new = series.last_seen_at.is_none();
            if !is_same || !is_same_verdict || is_new {
                changed_series.push((address, agent, series, verdict));
            }
        }
        for incident in &host.incidents {
            if before.is_none_or(|before| before.incidents.last() != Some(incident)) {
                changed_incidents.push((address, incident));
            }
        }
    }
    let series = series_columns(&changed_series);
    let incidents = incident_columns(&changed_incidents);
    let (series, incidents, copy) = join3(
        client.execute_raw(&statements.put_series, series.0.iter().map(|column| &**column)),
        client.execute_raw(
            &statements.put_incidents,
            incidents.0.iter().map(|column| &**column),
        ),
        client.copy_in(&statements.copy_rollups),
    )
    .await;
    series?;
    incidents?;
    let mut copy = std::pin::pin!(copy?);
    let mut bytes = rollup_rows(rollups);
    while !bytes.is_empty() {
        copy.send(bytes.split_to(bytes.len().min(CHUNK_BYTES))).await?;
    }
    let (copied, committed) = join(copy.as_mut().finish(), client.batch_execute("COMMIT")).await;
    copied?;
    committed
}

/// One array for each column of a table.
#[derive(Default)]
struct Columns<'a>(Vec<Box<dyn ToSql + Sync + 'a>>);

impl<'a> Columns<'a> {
    fn add<T: ToSql + Sync + 'a>(&mut self, values: impl Iterator<Item = T>) {
        self.0.push(Box::new(values.collect::<Vec<T>>()));
    }
}

type ChangedSeries<'a> = (&'a String, &'a String, &'a Series, Option<(Verdict, i64)>);

fn series_columns<'a>(rows: &[ChangedSeries<'a>]) -> Columns<'a> {
    let checks = || rows.iter().map(|(_, _, series, _)| series.checks.as_ref());
    let certificates = || rows.iter().map(|(_, _, series, _)| series.certificate);
    let verdicts = || rows.iter().map(|(.., verdict)| *verdict);
    let seconds = |micros: i64| micros as f64 / 1e6;
    let mut columns = Columns::default();
    columns.add(rows.iter().map(|(address, agent, ..)| series_id(address, agent)));
    columns.add(rows.iter().map(|(address, ..)| address.as_str()));
    columns.add(rows.iter().map(|(_, agent, ..)| agent.as_str()));
    columns.add(rows.iter().map(|(_, _, series, _)| series.last_seen_at.map(time)));
    columns.add(
        rows.iter()
            .map(|(_, _, series, _)| series.interval_micros.map(seconds)),
    );
    columns.add(rows.iter().map(|(_, _, series, _)| series.name.as_deref()));
    columns.add(rows.iter().map(|(_, _, series, _)| series.group.as_deref()));
    columns.add(checks().map(|checks| checks.map(|checks| checks.is_valid)));
    columns.add(checks().map(|checks| checks.map(|checks| time(checks.since))));
    columns.add(checks().map(|checks| checks.map(|checks| time(checks.first_at))));
    columns.add(checks().map(|checks| checks.map(|checks| time(checks.last_at))));
    columns.add(checks().map(|checks| checks.map(|checks| checks.outcome.as_str())));
    columns.add(checks().map(|checks| checks.and_then(|checks| checks.error.as_deref())));
    columns.add(checks().map(|checks| checks.map(|checks| checks.failures_in_a_row)));
    columns.add(checks().map(|checks| checks.and_then(|checks| checks.last_failed_at.map(time))));
    columns.add(checks().map(|checks| checks.and_then(|checks| checks.last_failed_outcome.as_deref())));
    columns.add(checks().map(|checks| checks.and_then(|checks| checks.last_error.as_deref())));
    columns
        .add(certificates().map(|certificate| certificate.map(|certificate| time(certificate.expires_at))));
    columns.add(certificates().map(|certificate| certificate.map(|certificate| time(certificate.seen_at))));
    columns.add(verdicts().map(|verdict| verdict.map(|(verdict, _)| verdict.as_str())));
    columns.add(verdicts().map(|verdict| verdict.map(|(_, since)| time(since))));
    columns
}

fn series_of(row: &Row) -> Result<Series, tokio_postgres::Error> {
    let checks = match row.try_get::<_, Option<bool>>("is_valid")? {
        None => None,
        Some(is_valid) => Some(Checks {
            first_at: micros(row.try_get("first_check_at")?),
            last_at: micros(row.try_get("last_check_at")?),
            is_valid,
            since: micros(row.try_get("since")?),
            outcome: row.try_get("outcome")?,
            error: row.try_get("error")?,
            failures_in_a_row: row.try_get("failures_in_a_row")?,
            last_failed_at: row.try_get::<_, Option<_>>("last_failed_at")?.map(micros),
            last_failed_outcome: row.try_get("last_failed_outcome")?,
            last_error: row.try_get("last_error")?,
        }),
    };
    let certificate = match row.try_get::<_, Option<_>>("cert_expires_at")? {
        None => None,
        Some(expires_at) => Some(Certificate {
            expires_at: micros(expires_at),
            seen_at: micros(row.try_get("cert_seen_at")?),
        }),
    };
    let interval: Option<f64> = row.try_get("interval_seconds")?;
    Ok(Series {
        last_seen_at: row.try_get::<_, Option<_>>("last_seen_at")?.map(micros),
        interval_micros: interval.map(|seconds| (seconds * 1e6).round() as i64),
        name: row.try_get("name")?,
        group: row.try_get("group")?,
        checks,
        certificate,
    })
}

fn incident_columns<'a>(rows: &[(&'a String, &'a Incident)]) -> Columns<'a> {
    let mut columns = Columns::default();
    columns.add(rows.iter().map(|(address, _)| address.as_str()));
    columns.add(rows.iter().map(|(_, incident)| incident.number));
    columns.add(rows.iter().map(|(_, incident)| time(incident.started_at)));
    columns.add(rows.iter().map(|(_, incident)| incident.ended_at.map(time)));
    columns.add(rows.iter().map(|(_, incident)| incident.checks()));
    columns.add(rows.iter().map(|(_, incident)| incident.first_outcome.as_str()));
    columns.add(rows.iter().map(|(_, incident)| incident.most_frequent_outcome()));
    columns.add(rows.iter().map(|(_, incident)| incident.last_outcome.as_str()));
    columns.add(rows.iter().map(|(_, incident)| json(&incident.outcomes)));
    columns.add(rows.iter().map(|(_, incident)| json(&incident.places)));
    columns.add(rows.iter().map(|(_, incident)| incident.last_error.as_deref()));
    columns
}

fn incident_of(row: &Row) -> Result<Incident, tokio_postgres::Error> {
    Ok(Incident {
        number: row.try_get("number")?,
        started_at: micros(row.try_get("started_at")?),
        ended_at: row.try_get::<_, Option<_>>("ended_at")?.map(micros),
        outcomes: from_json(row.try_get("outcomes")?),
        first_outcome: row.try_get("first_outcome")?,
        last_outcome: row.try_get("last_outcome")?,
        last_error: row.try_get("last_error")?,
        places: from_json(row.try_get("places")?),
    })
}

/// The rows in COPY's binary format. Zeros are stored as null.
fn rollup_rows(rollups: &[(Key, Rollup)]) -> Bytes {
    const COLUMNS: i16 = 18;
    const YEAR_2000_MICROS: i64 = 946_684_800_000_000;
    fn put(rows: &mut BytesMut, value: Option<&[u8]>) {
        match value {
            None => rows.put_i32(-1),
            Some(bytes) => {
                rows.put_i32(i32::try_from(bytes.len()).expect("counts and outcomes are bounded"));
                rows.put_slice(bytes);
            }
        }
    }
    let mut rows = BytesMut::from(&HEADER[..]);
    for (key, rollup) in rollups {
        let latency = (rollup.latency_us != 0).then_some(rollup.latency_us.to_be_bytes());
        let counts = [
            rollup.valid,
            rollup.failed,
            rollup.missed,
            rollup.offline,
            rollup.slow,
            rollup.latency_max_us,
        ];
        rows.put_i16(COLUMNS);
        put(&mut rows, Some(&key.series_id.to_be_bytes()));
        put(&mut rows, Some(&(key.starts_at - YEAR_2000_MICROS).to_be_bytes()));
        put(&mut rows, latency.as_ref().map(|bytes| &bytes[..]));
        put(&mut rows, Some(&key.seconds.to_be_bytes()));
        put(&mut rows, Some(&rollup.due().to_be_bytes()));
        for count in counts.into_iter().chain(rollup.phases) {
            put(&mut rows, (count != 0).then_some(&count.to_be_bytes()));
        }
        // The first byte of a jsonb is its version.
        let outcomes = (rollup.failed != 0).then(|| format!("\u{1}{}", json(&rollup.outcomes)));
        put(&mut rows, outcomes.as_ref().map(String::as_bytes));
        put(&mut rows, rollup.histogram.to_numeric().as_deref());
    }
    rows.put_slice(&TRAILER);
    rows.freeze()
}

/// The columns of the phases, in the order of [`Rollup::phases`].
const PHASES: [&str; 5] = ["dns_10us", "connect_10us", "tls_10us", "ttfb_10us", "body_10us"];

fn rollup_of(row: &Row) -> Result<Rollup, tokio_postgres::Error> {
    let count =
        |column: &str| Ok::<_, tokio_postgres::Error>(row.try_get::<_, Option<i32>>(column)?.unwrap_or(0));
    let mut phases = [0; 5];
    for (phase, column) in phases.iter_mut().zip(PHASES) {
        *phase = count(column)?;
    }
    Ok(Rollup {
        valid: count("valid")?,
        failed: count("failed")?,
        missed: count("missed")?,
        offline: count("offline")?,
        slow: count("slow")?,
        outcomes: row
            .try_get::<_, Option<_>>("outcomes")?
            .map(from_json)
            .unwrap_or_default(),
        latency_us: row.try_get::<_, Option<i64>>("latency_us")?.unwrap_or(0),
        latency_max_us: count("latency_max_us")?,
        phases,
        histogram: row.try_get::<_, Option<_>>("histogram")?.unwrap_or_default(),
    })
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("names and counts have a JSON form")
}

/// Anything else in the column counts as empty.
fn from_json<T: serde::de::DeserializeOwned + Default>(text: &str) -> T {
    serde_json::from_str(text).unwrap_or_default()
}

fn time(micros: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}

fn micros(time: SystemTime) -> i64 {
    duration::micros(time.duration_since(UNIX_EPOCH).unwrap_or_default())
}
