//! Reads the snapshot from Postgres: one read-only transaction over the tables of the state.
//!
//! This file has the SQL of the page, except that of the windows (`tables::windows`). The user needs only SELECT on these tables,
//! which `init --reader` grants. The sums of past days hardly change, so they are read only now and then, and the newest sums every
//! time.

use std::collections::{BTreeMap, HashMap};

use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use crate::config::DatabaseConfig;
use crate::page::snapshot::{
    Bucket, Counts, DAY, DAYS_SHOWN, HOUR, HOURS_SHOWN, Host, Incident, Place, SECOND, Snapshot, WINDOWS,
};
use crate::postgres::{Bounds, Fault, Session};
use crate::tables::buckets::Histogram;
use crate::tables::names::{Object, TableName};
use crate::tables::windows;

/// After this many rounds everything is read again, because records may have come late.
const WHOLE_EVERY: u32 = 60;

/// The most incidents in memory, a few megabytes; older ones are not shown.
const MAX_INCIDENTS: usize = 10_000;

/// The connection, and what was read before.
pub struct Reader {
    config: DatabaseConfig,
    session: Option<Session>,
    round: u32,
    /// By address; hours and days by their beginning.
    hours: HashMap<String, BTreeMap<i64, Bucket>>,
    days: HashMap<String, BTreeMap<i64, Bucket>>,
    incidents: BTreeMap<(String, i64), Incident>,
}

impl Reader {
    pub fn new(config: DatabaseConfig) -> Self {
        Self {
            config,
            session: None,
            round: 0,
            hours: HashMap::new(),
            days: HashMap::new(),
            incidents: BTreeMap::new(),
        }
    }

    /// Reads the state as it is now, on the connection of the round before if that still works.
    pub async fn read(&mut self) -> Result<Snapshot, Fault> {
        let session = match self.session.take() {
            Some(session) => session,
            None => Session::open(&self.config, Bounds::default()).await?,
        };
        match self.read_from(&session).await {
            Ok(snapshot) => {
                self.session = Some(session);
                self.round = (self.round + 1) % WHOLE_EVERY;
                Ok(snapshot)
            }
            Err(fault) => {
                session.close().await;
                self.round = 0;
                Err(fault.with_grant(&format!(
                    "run `host-metrics init --reader {}` as the tables' owner",
                    self.config.user
                )))
            }
        }
    }

    async fn read_from(&mut self, session: &Session) -> Result<Snapshot, Fault> {
        const BEGIN: &str = "BEGIN TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY";
        let query = async |sql: &str, parameters: &[&(dyn ToSql + Sync)]| {
            session.query("reading the state", sql, parameters).await
        };
        session.batch("BEGIN", BEGIN).await?;
        let series = query(&series(&session.table, ""), &[]).await?;
        let windows = query(
            &windows::counts(&session.table, &WINDOWS.map(|(name, _)| name)),
            &[],
        )
        .await?;
        let now = session.now_micros().await?;
        let is_whole = self.round == 0;
        if is_whole {
            self.hours.clear();
            self.days.clear();
            self.incidents.clear();
        }
        for (kept, width, shown, again) in [
            (&mut self.hours, HOUR, HOURS_SHOWN, 2),
            (&mut self.days, DAY, DAYS_SHOWN, 2),
        ] {
            let this = now.div_euclid(width) * width;
            let first = this - (shown - 1) * width;
            let from = if is_whole {
                first
            } else {
                this - (again - 1) * width
            };
            let seconds = i32::try_from(width / SECOND).unwrap_or_default();
            let since = format!(
                "seconds = {seconds} AND starts_at >= to_timestamp($1::bigint) AND starts_at <= now()"
            );
            for row in query(&buckets(&session.table, &since), &[&(from / SECOND)]).await? {
                let bucket = bucket(&row)?;
                kept.entry(row.try_get("address")?)
                    .or_default()
                    .insert(bucket.starts_at, bucket);
            }
            for buckets in kept.values_mut() {
                *buckets = buckets.split_off(&first);
            }
        }
        // Only incidents that are open or ended since the last round can have changed. The margin is for late records.
        const AGAIN: i64 = 15 * 60;
        let since = if is_whole { 0 } else { now / SECOND - AGAIN };
        let limit = i64::try_from(MAX_INCIDENTS).unwrap_or(i64::MAX) + 1;
        let changed = "ended_at IS NULL OR ended_at >= to_timestamp($1::bigint)";
        for row in query(&incidents(&session.table, changed), &[&since, &limit]).await? {
            let incident = incident(&row)?;
            self.incidents
                .insert((incident.address.clone(), incident.number), incident);
        }
        session.batch("COMMIT", "COMMIT").await?;
        self.snapshot(now, &series, &windows)
    }

    fn snapshot(&self, now: i64, series: &[Row], windows: &[Row]) -> Result<Snapshot, Fault> {
        let mut hosts: BTreeMap<String, Host> = BTreeMap::new();
        for row in series {
            let address: String = row.try_get("address")?;
            let host = hosts.entry(address.clone()).or_default();
            host.address = address;
            place(row, host)?;
        }
        for row in windows {
            let address: String = row.try_get("address")?;
            let period: String = row.try_get("period")?;
            let index = WINDOWS.iter().position(|(name, _)| *name == period);
            if let (Some(host), Some(index)) = (hosts.get_mut(&address), index) {
                host.windows[index] = counts(row)?;
                host.verdict_uptimes[index] = row.try_get("verdict_uptime")?;
            }
        }
        let all = |kept: &HashMap<String, BTreeMap<i64, Bucket>>, address: &str| -> Vec<Bucket> {
            kept.get(address)
                .map(|buckets| buckets.values().cloned().collect())
                .unwrap_or_default()
        };
        for (address, host) in &mut hosts {
            host.places.sort_by(|a, b| a.agent.cmp(&b.agent));
            host.hours = all(&self.hours, address);
            host.days = all(&self.days, address);
        }
        let mut incidents: Vec<Incident> = self.incidents.values().cloned().collect();
        incidents.sort_by_key(|incident| std::cmp::Reverse(incident.started_at));
        let has_more_incidents = incidents.len() > MAX_INCIDENTS;
        incidents.truncate(MAX_INCIDENTS);
        Ok(Snapshot {
            taken_at: now,
            hosts: hosts.into_values().collect(),
            incidents,
            has_more_incidents,
        })
    }
}

/// A column with a time as microseconds since 1970.
fn micros(column: &str) -> String {
    format!("(extract(epoch FROM {column}) * 1000000)::bigint AS {column}")
}

/// The hosts as their places see them. Of each host, the place that was seen last comes last.
pub(crate) fn series(table: &TableName, condition: &str) -> String {
    let times = [
        "since",
        "last_check_at",
        "cert_expires_at",
        "cert_seen_at",
        "verdict_since",
    ]
    .map(micros);
    format!(
        "SELECT address, agent, name, \"group\", interval_seconds, is_valid, outcome, error, verdict, {} \
         FROM {} {condition} ORDER BY address, last_seen_at NULLS FIRST, agent",
        times.join(", "),
        table.quoted(Object::Series.suffix())
    )
}

const COUNTS: &str = "coalesce(sum(valid), 0)::bigint AS valid, coalesce(sum(failed), 0)::bigint AS failed, \
                      (coalesce(sum(missed), 0) + coalesce(sum(offline), 0))::bigint AS not_made, \
                      coalesce(sum(slow), 0)::bigint AS slow";

/// The buckets of each host, over all places.
pub(crate) fn buckets(table: &TableName, condition: &str) -> String {
    format!(
        "SELECT address, {}, {COUNTS}, sum(histogram) AS histogram, sum(dns_10us)::bigint AS dns, \
             sum(connect_10us)::bigint AS connect, sum(tls_10us)::bigint AS tls, sum(ttfb_10us)::bigint AS ttfb, \
             sum(body_10us)::bigint AS body \
         FROM {} JOIN {} USING (series_id) \
         WHERE {condition} GROUP BY address, starts_at",
        micros("starts_at").replace(" AS starts_at", " AS at"),
        table.quoted(Object::Rollups.suffix()),
        table.quoted(Object::Series.suffix())
    )
}

/// The newest incidents; at most $2.
pub(crate) fn incidents(table: &TableName, condition: &str) -> String {
    format!(
        "SELECT address, number, {}, {}, checks, most_frequent_outcome, places::text AS places, last_error \
         FROM {} i WHERE {condition} ORDER BY i.started_at DESC LIMIT $2",
        micros("started_at"),
        micros("ended_at"),
        table.quoted(Object::Incidents.suffix())
    )
}

/// Adds a row of `_series` to its host.
pub(crate) fn place(row: &Row, host: &mut Host) -> Result<(), Fault> {
    let verdict: Option<String> = row.try_get("verdict")?;
    host.is_down = verdict.map(|verdict| verdict == "down");
    host.since = row.try_get("verdict_since")?;
    // Places may use different versions of the host file; the newest record with a name wins.
    host.name = row.try_get::<_, Option<String>>("name")?.or(host.name.take());
    host.group = row.try_get::<_, Option<String>>("group")?.or(host.group.take());
    let expires_at: Option<i64> = row.try_get("cert_expires_at")?;
    let seen_at: Option<i64> = row.try_get("cert_seen_at")?;
    host.places.push(Place {
        agent: row.try_get("agent")?,
        is_valid: row.try_get("is_valid")?,
        since: row.try_get("since")?,
        last_check_at: row.try_get("last_check_at")?,
        interval_seconds: row.try_get("interval_seconds")?,
        outcome: row.try_get("outcome")?,
        error: row.try_get("error")?,
        certificate: expires_at.zip(seen_at),
    });
    Ok(())
}

fn counts(row: &Row) -> Result<Counts, Fault> {
    Ok(Counts {
        valid: row.try_get("valid")?,
        failed: row.try_get("failed")?,
        not_made: row.try_get("not_made")?,
        slow: row.try_get("slow")?,
    })
}

pub(crate) fn bucket(row: &Row) -> Result<Bucket, Fault> {
    let histogram: Option<Histogram> = row.try_get("histogram")?;
    let mut phases = [0; 5];
    for (sum, name) in phases.iter_mut().zip(["dns", "connect", "tls", "ttfb", "body"]) {
        *sum = row.try_get::<_, Option<i64>>(name)?.unwrap_or(0);
    }
    let histogram = histogram.unwrap_or_default();
    Ok(Bucket::new(row.try_get("at")?, counts(row)?, &histogram, phases))
}

pub(crate) fn incident(row: &Row) -> Result<Incident, Fault> {
    let places: String = row.try_get("places")?;
    Ok(Incident {
        address: row.try_get("address")?,
        number: row.try_get("number")?,
        started_at: row.try_get("started_at")?,
        ended_at: row.try_get("ended_at")?,
        checks: row.try_get("checks")?,
        outcome: row.try_get("most_frequent_outcome")?,
        // Only another program can have written an invalid value.
        places: serde_json::from_str(&places).unwrap_or_default(),
        last_error: row.try_get("last_error")?,
    })
}
