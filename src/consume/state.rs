//! The sink of the state. A flush reads the stored state of the batch's hosts, folds the batch into it and writes it back, in the
//! transaction that moves the positions.
//!
//! It takes three round trips: `BEGIN`, compare-and-set and the stored state; the new state; `COMMIT`. All consumers lock the rows
//! in the same order, by host and place.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::{join3, join4};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row, Statement};

use crate::clock::{instant_now, wall_micros};
use crate::config::{ConsumeConfig, StateConfig};
use crate::consume::batch::{Batch, Encoded, Flushed, Form, MAX_READ_BYTES, Record};
use crate::consume::counters::Counters;
use crate::consume::fold::host::{Certificate, Checks, Host, Incident, Series, Verdict};
use crate::consume::fold::rollup::{Histogram, Key, Rollup, WIDTHS, series_id};
use crate::consume::fold::{Fold, Hosts};
use crate::consume::positions::{Keys, Positions};
use crate::consume::sink::{Sink, judge};
use crate::postgres::{Fault, Kind, Session, bounded};
use crate::sample::Timestamp;
use crate::sample::epoch::Epochs;
use crate::tables::names::{Object, TableName};
use crate::tables::state::{
    INCIDENTS, ROLLUPS, SERIES, add_series, delete_old, delete_rollups, read_incidents, read_rollups,
    read_series,
};
use crate::tables::{days, destination, migrate};

/// The end of the group's name.
pub const GROUP_SUFFIX: &str = "-state";

/// The most records in a flush. The more there are, the less often each bucket is written.
const BATCH_SIZE: usize = 50_000;

/// The longest wait before a flush, and so the usual delay of the state.
const BATCH_WAIT: Duration = Duration::from_secs(3);

/// How long buckets of five minutes are kept.
const NARROW_KEPT: Duration = Duration::from_secs(2 * 86_400);

/// The most buckets that one statement removes, and the most statements at once. The rest is removed an hour later.
const DELETE_ROWS: i64 = 50_000;
const DELETE_TIMES: usize = 20;

/// While the rows have a larger backlog than this, the state pauses before each flush for this many times as long as the last one
/// took.
const ROWS_BEHIND: u64 = 10_000;
const REST_TIMES: u32 = 5;
const REST_AT_MOST: Duration = Duration::from_secs(2);

/// The configuration of the state's pipeline.
pub fn config_of(config: &ConsumeConfig) -> ConsumeConfig {
    ConsumeConfig {
        group_id: format!("{}{GROUP_SUFFIX}", config.group_id),
        batch_size: BATCH_SIZE,
        batch_wait: BATCH_WAIT,
        ..config.clone()
    }
}

/// The state of DB_TABLE.
pub struct StateSink {
    config: StateConfig,
    /// The counters of the rows' pipeline, which has priority.
    rows: Counters,
    last_flush_took: Duration,
}

impl StateSink {
    pub fn new(config: StateConfig, rows: Counters) -> Self {
        Self {
            config,
            rows,
            last_flush_took: Duration::ZERO,
        }
    }

    /// The oldest start of a bucket that is kept, in microseconds since 1970.
    fn oldest(&self, seconds: i32, now_micros: i64) -> i64 {
        let kept = match seconds {
            300 => Some(NARROW_KEPT),
            _ => self.config.rollup_retention,
        };
        let micros = |kept: Duration| i64::try_from(kept.as_micros()).unwrap_or(i64::MAX);
        kept.map_or(0, |kept| now_micros.saturating_sub(micros(kept)).max(0))
    }

    /// Removes what is too old.
    async fn prune(&self, session: &Session) -> Result<(), Fault> {
        let now = wall_micros();
        let time = |micros: i64| format!("to_timestamp({})", micros / 1_000_000);
        for seconds in WIDTHS {
            let oldest = self.oldest(seconds, now);
            let sql = delete_rollups(&session.table, seconds, &time(oldest), DELETE_ROWS);
            for _ in 0..DELETE_TIMES {
                let removed = session
                    .bounded("removing old buckets", session.client.execute(&sql, &[]))
                    .await?;
                if removed < DELETE_ROWS as u64 {
                    break;
                }
            }
        }
        if self.config.rollup_retention.is_some() {
            let sql = delete_old(&session.table, &time(self.oldest(WIDTHS[1], now)));
            session
                .bounded("removing old state", session.client.batch_execute(&sql))
                .await?;
        }
        Ok(())
    }

    async fn make_way(&self) {
        let behind: u64 = self.rows.lags().values().sum();
        if behind > ROWS_BEHIND {
            tokio::time::sleep((REST_TIMES * self.last_flush_took).min(REST_AT_MOST)).await;
        }
    }
}

impl Sink for StateSink {
    const IS_FIRST: bool = false;
    const KEEPS_RECORDS: bool = false;
    type Layout = ();
    type Prepared = Statements;

    /// Keeps the record, because the fold decodes it when the batch is written.
    fn encode(
        (): &(),
        _: &str,
        record: &Record<'_>,
        epochs: &mut Epochs,
        into: &mut Vec<u8>,
    ) -> Result<Encoded, String> {
        let value = record.value.unwrap_or_default();
        if value.len() > MAX_READ_BYTES {
            return Err("longer than the rows accept".to_owned());
        }
        if judge(value, epochs)?.is_none() {
            return Ok(Encoded::Claim);
        }
        into.extend_from_slice(value);
        Ok(Encoded::Row)
    }

    async fn prepare(&mut self, session: &Session) -> Result<((), Statements), Fault> {
        let made = migrate::make(session, days::today()).await;
        let not_made = match made {
            Ok(_) => None,
            Err(fault) if fault.kind == Kind::Operator => Some(fault),
            Err(fault) => return Err(fault),
        };
        let found = destination::find(session).await?;
        if let Some(object) = Object::STATE
            .into_iter()
            .find(|object| !found.is_current(*object))
        {
            let name = session.table.quoted(object.suffix());
            return Err(Fault::operator(match not_made {
                Some(fault) => format!("{name} is missing, and this user could not create it: {fault}"),
                None => format!(
                    "{name} was not created by this version of host-metrics; rename it, and run `host-metrics init`"
                ),
            }));
        }
        let statements = Statements::prepare(&session.client, &session.table);
        let statements = session.bounded("preparing", statements).await;
        let tables = Object::STATE
            .map(|object| session.table.quoted(object.suffix()))
            .join(", ");
        let grant = format!("GRANT SELECT, INSERT, UPDATE, DELETE ON {tables} to this user");
        let statements = statements.map_err(|fault| fault.with_grant(&grant))?;
        self.prune(session).await?;
        Ok(((), statements))
    }

    async fn flush(
        &mut self,
        session: &Session,
        keys: &Keys,
        positions: &Positions,
        prepared: &Statements,
        batch: &Batch,
    ) -> Result<Flushed, Fault> {
        self.make_way().await;
        let began_at = instant_now();
        let mut fold = Fold::default();
        for entry in &batch.entries {
            if let Form::Row(range) = &entry.form {
                let value = batch.encoded.get(range.clone()).unwrap_or_default();
                fold.record(value, entry.timestamp);
            }
        }
        let (hosts, mut rollups) = fold.finish();
        let now = wall_micros();
        let oldest = WIDTHS.map(|seconds| (seconds, self.oldest(seconds, now)));
        rollups.retain(|key, _| {
            oldest
                .iter()
                .all(|(seconds, oldest)| key.seconds != *seconds || *oldest <= key.starts_at)
        });

        let client = &session.client;
        let records = u32::try_from(batch.len()).unwrap_or(u32::MAX);
        let within = session.bounds.step + session.bounds.per_row.saturating_mul(records).saturating_mul(4);
        // They are sent in the order in which they are polled.
        let (began, moved, stored) = bounded("BEGIN to the stored state", within, async {
            Ok::<_, Fault>(
                join3(
                    client.batch_execute(BEGIN),
                    positions.advance(session, keys, batch),
                    read(client, prepared, &hosts, &rollups),
                )
                .await,
            )
        })
        .await?;
        began?;
        if !moved? {
            session
                .bounded("ROLLBACK", client.batch_execute("ROLLBACK"))
                .await?;
            return Ok(Flushed::Fenced);
        }
        let stored = stored?;
        let mut changed = stored.hosts.clone();
        hosts.apply(self.config.down_when, &mut changed);
        for (key, rollup) in &mut rollups {
            if let Some(stored) = stored.rollups.get(key) {
                rollup.merge(stored);
            }
        }
        let write = write(client, prepared, &stored.hosts, &changed, &rollups);
        bounded("writing the state", within, write)
            .await
            .map_err(|fault| match fault.kind {
                // Two consumers saw a host for the first time, or a user has added a constraint.
                Kind::Refused => Fault {
                    kind: Kind::Passing,
                    ..fault
                },
                _ => fault,
            })?;
        // Needs a round trip of its own, because it may follow only on success.
        bounded("COMMIT", within, client.batch_execute("COMMIT")).await?;
        self.last_flush_took = instant_now().saturating_duration_since(began_at);
        Ok(Flushed::Durable)
    }

    async fn maintain(&mut self, session: &Session, _: &Statements, _: Timestamp) -> Result<(), Fault> {
        self.prune(session).await
    }
}

/// Few rows of many are read, so indexes are used even if the statistics of a new table suggest otherwise.
const BEGIN: &str =
    "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL enable_seqscan = off; SET LOCAL jit = off";

/// The statements of a flush.
pub struct Statements {
    add_series: Statement,
    read_series: Statement,
    read_incidents: Statement,
    read_rollups: Statement,
    put_series: Statement,
    put_incidents: Statement,
    put_rollups: Statement,
}

impl Statements {
    async fn prepare(client: &Client, table: &TableName) -> Result<Self, tokio_postgres::Error> {
        Ok(Self {
            add_series: client.prepare(&add_series(table)).await?,
            read_series: client.prepare(&read_series(table)).await?,
            read_incidents: client.prepare(&read_incidents(table)).await?,
            read_rollups: client.prepare(&read_rollups(table)).await?,
            put_series: client.prepare(&SERIES.put(table)).await?,
            put_incidents: client.prepare(&INCIDENTS.put(table)).await?,
            put_rollups: client.prepare(&ROLLUPS.put(table)).await?,
        })
    }
}

/// The stored state of the hosts and buckets of a batch.
#[derive(Debug, Default)]
struct Stored {
    hosts: BTreeMap<String, Host>,
    rollups: BTreeMap<Key, Rollup>,
}

/// Reads the stored state, and locks the hosts' rows.
async fn read(
    client: &Client,
    statements: &Statements,
    hosts: &Hosts<'_>,
    rollups: &BTreeMap<Key, Rollup>,
) -> Result<Stored, tokio_postgres::Error> {
    let addresses: Vec<&str> = hosts.addresses().collect();
    let (mut ids, mut of_hosts, mut agents) = (vec![], vec![], vec![]);
    for (id, address, agent) in hosts.series() {
        ids.push(id);
        of_hosts.push(address);
        agents.push(agent);
    }
    let widths: Vec<i32> = rollups.keys().map(|key| key.seconds).collect();
    let starts: Vec<SystemTime> = rollups.keys().map(|key| time(key.starts_at)).collect();
    let of_series: Vec<i64> = rollups.keys().map(|key| key.series_id).collect();

    // They are sent in the order in which they are polled, without waits between them.
    let series_params: [&(dyn ToSql + Sync); 3] = [&ids, &of_hosts, &agents];
    let host_params: [&(dyn ToSql + Sync); 1] = [&addresses];
    let rollup_params: [&(dyn ToSql + Sync); 3] = [&widths, &starts, &of_series];
    let (added, series, incidents, rollups) = join4(
        client.execute(&statements.add_series, &series_params),
        client.query(&statements.read_series, &host_params),
        client.query(&statements.read_incidents, &host_params),
        client.query(&statements.read_rollups, &rollup_params),
    )
    .await;
    added?;
    let mut stored = Stored::default();
    for row in series? {
        let host = stored.hosts.entry(row.try_get("address")?).or_default();
        host.series.insert(row.try_get("agent")?, series_of(&row)?);
    }
    for row in incidents? {
        let host = stored.hosts.entry(row.try_get("address")?).or_default();
        host.incidents.push(incident_of(&row)?);
    }
    for row in rollups? {
        let key = Key {
            seconds: row.try_get("seconds")?,
            starts_at: micros(row.try_get("starts_at")?),
            series_id: row.try_get("series_id")?,
        };
        stored.rollups.insert(key, rollup_of(&row)?);
    }
    Ok(stored)
}

/// Writes what has changed.
async fn write(
    client: &Client,
    statements: &Statements,
    stored: &BTreeMap<String, Host>,
    hosts: &BTreeMap<String, Host>,
    rollups: &BTreeMap<Key, Rollup>,
) -> Result<(), tokio_postgres::Error> {
    let mut changed_series = Vec::new();
    let mut changed_incidents = Vec::new();
    for (address, host) in hosts {
        let before = stored.get(address);
        let verdict = host.verdict();
        let is_same_verdict = before.is_some_and(|before| before.verdict() == verdict);
        for (agent, series) in &host.series {
            let is_same = before.is_some_and(|before| before.series.get(agent) == Some(series));
            if !is_same || !is_same_verdict {
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
    let rollups = rollup_columns(rollups);
    let (series, incidents, rollups) = join3(
        client.execute_raw(&statements.put_series, series.0.iter().map(|column| &**column)),
        client.execute_raw(
            &statements.put_incidents,
            incidents.0.iter().map(|column| &**column),
        ),
        client.execute_raw(&statements.put_rollups, rollups.0.iter().map(|column| &**column)),
    )
    .await;
    series?;
    incidents?;
    rollups?;
    Ok(())
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

fn rollup_columns(rows: &BTreeMap<Key, Rollup>) -> Columns<'_> {
    let not_zero = |count: i32| (count != 0).then_some(count);
    let mut columns = Columns::default();
    columns.add(rows.keys().map(|key| key.series_id));
    columns.add(rows.keys().map(|key| time(key.starts_at)));
    columns.add(
        rows.values()
            .map(|rollup| (rollup.latency_us != 0).then_some(rollup.latency_us)),
    );
    columns.add(rows.keys().map(|key| key.seconds));
    columns.add(rows.values().map(Rollup::due));
    columns.add(rows.values().map(|rollup| not_zero(rollup.valid)));
    columns.add(rows.values().map(|rollup| not_zero(rollup.failed)));
    columns.add(rows.values().map(|rollup| not_zero(rollup.missed)));
    columns.add(rows.values().map(|rollup| not_zero(rollup.offline)));
    columns.add(rows.values().map(|rollup| not_zero(rollup.slow)));
    columns.add(rows.values().map(|rollup| not_zero(rollup.latency_max_us)));
    for phase in 0..PHASES.len() {
        columns.add(rows.values().map(|rollup| not_zero(rollup.phases[phase])));
    }
    columns.add(
        rows.values()
            .map(|rollup| (rollup.failed != 0).then(|| json(&rollup.outcomes))),
    );
    columns.add(rows.values().map(|rollup| rollup.histogram.to_number()));
    columns
}

/// The columns of the phases, in the order of [`Rollup::phases`].
const PHASES: [&str; 5] = ["dns_10us", "connect_10us", "tls_10us", "ttfb_10us", "body_10us"];

fn rollup_of(row: &Row) -> Result<Rollup, tokio_postgres::Error> {
    let count =
        |column: &str| Ok::<_, tokio_postgres::Error>(row.try_get::<_, Option<i32>>(column)?.unwrap_or(0));
    let histogram: Option<&str> = row.try_get("histogram")?;
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
        histogram: histogram.map(Histogram::from_number).unwrap_or_default(),
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
    let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_epoch.as_micros()).unwrap_or(i64::MAX)
}
