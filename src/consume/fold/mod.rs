//! The fold: how a batch of records changes the state (series, incidents, sums by bucket).
//!
//! Pure, and without a clock. The state after a record depends only on that record and on the records of its host before it, so
//! reading a topic again gives the same state. Sums are additions; everything else follows the order of a host's records in
//! their partition.
//!
//! A batch is folded in two steps, because the state is kept only in the tables: [`Fold::record`] collects the records, which
//! shows the hosts and buckets that they change, and [`Hosts::apply`] changes the stored state of these hosts. The sink reads,
//! applies and writes in the transaction that moves the positions. So memory and tables cannot differ, a batch that is tried
//! again starts from the stored state, and a partition that moves needs no hand-over.

pub mod host;
pub mod rollup;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use crate::consume::fold::host::{Check, DownWhen, Host, SeriesRecord};
use crate::consume::fold::rollup::{Finding, Key, Rollup, Rollups, UNKNOWN_OUTCOME, series_id};
use crate::sample::{self, Timestamp};

/// A record whose `scheduled_at` is further than this ahead of Kafka's timestamp is only counted in its bucket. Otherwise, after
/// one record of a clock that is ahead, all others would be late. Kafka has the same limit (`message.timestamp.after.max.ms`).
const AHEAD_MICROS: i64 = 3_600_000_000;

/// The records of one batch, by host, and their sums.
#[derive(Debug, Default)]
pub struct Fold<'a> {
    hosts: HashMap<Cow<'a, str>, Records<'a>>,
    rollups: Rollups,
}

/// The records of one host, in their order.
#[derive(Debug, Default)]
struct Records<'a> {
    /// The places in this batch, with the numbers of their series.
    places: Vec<(Cow<'a, str>, i64)>,
    pending: Vec<Pending<'a>>,
}

/// An [`SeriesRecord`] that may own its texts: a text with an escape in it cannot be borrowed from the record.
#[derive(Debug)]
struct Pending<'a> {
    place: usize,
    at: i64,
    interval_micros: Option<i64>,
    cert_expires_at: Option<i64>,
    name: Option<Cow<'a, str>>,
    group: Option<Cow<'a, str>>,
    check: Option<PendingCheck<'a>>,
}

#[derive(Debug)]
struct PendingCheck<'a> {
    is_valid: bool,
    outcome: Option<Cow<'a, str>>,
    error: Option<Cow<'a, str>>,
}

impl<'a> Fold<'a> {
    /// Takes the next record. False if it is not a valid record.
    pub fn record(&mut self, value: &'a [u8], timestamp: Option<Timestamp>) -> bool {
        let Ok(sample) = sample::decode(value) else {
            return false;
        };
        let Some(at) = sample.scheduled_at.or(timestamp) else {
            return false;
        };
        let finding = Finding::of(&sample);
        let agent = sample.agent.as_deref().unwrap_or_default();
        let records = match self.hosts.get_mut(&*sample.address) {
            Some(records) => records,
            None => self.hosts.entry(sample.address.clone()).or_default(),
        };
        let place = match records.places.iter().position(|(known, _)| known == agent) {
            Some(place) => place,
            None => {
                let series_id = series_id(&sample.address, agent);
                records
                    .places
                    .push((sample.agent.clone().unwrap_or_default(), series_id));
                records.places.len() - 1
            }
        };
        self.rollups.add(records.places[place].1, at, &sample, finding);
        let micros = Timestamp::unix_micros;
        if timestamp.is_none_or(|timestamp| micros(at) <= micros(timestamp).saturating_add(AHEAD_MICROS)) {
            let check = PendingCheck {
                is_valid: sample.is_valid,
                outcome: sample.outcome,
                error: sample.error,
            };
            records.pending.push(Pending {
                place,
                at: micros(at),
                interval_micros: sample
                    .interval_seconds
                    .map(|seconds| (seconds * 1e6).round() as i64),
                cert_expires_at: sample.cert_expires_at.map(micros),
                name: sample.name,
                group: sample.group,
                check: finding.is_check().then_some(check),
            });
        }
        true
    }

    pub fn is_empty(&self) -> bool {
        self.hosts.is_empty()
    }

    /// The hosts in byte order, which is the order in which their rows are locked, and the sums.
    pub fn finish(self) -> (Hosts<'a>, BTreeMap<Key, Rollup>) {
        (Hosts(self.hosts.into_iter().collect()), self.rollups.finish())
    }
}

/// The hosts of a batch and their records.
#[derive(Debug)]
pub struct Hosts<'a>(BTreeMap<Cow<'a, str>, Records<'a>>);

impl Hosts<'_> {
    /// Of every series in the batch: the number, the host, the place.
    pub fn series(&self) -> impl Iterator<Item = (i64, &str, &str)> {
        self.0.iter().flat_map(|(address, records)| {
            let places = records.places.iter();
            places.map(move |(agent, series_id)| (*series_id, &**address, &**agent))
        })
    }

    pub fn addresses(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(|address| &**address)
    }

    /// Changes the stored state of these hosts. A host that is not in `stored` is new.
    pub fn apply(&self, down_when: DownWhen, stored: &mut BTreeMap<String, Host>) {
        for (address, records) in self.0.iter().filter(|(_, records)| !records.pending.is_empty()) {
            let host = match stored.get_mut(&**address) {
                Some(host) => host,
                None => stored.entry(address.clone().into_owned()).or_default(),
            };
            for pending in &records.pending {
                let check = pending.check.as_ref().map(|check| Check {
                    is_valid: check.is_valid,
                    outcome: match &check.outcome {
                        Some(outcome) => outcome,
                        None if check.is_valid => "ok",
                        None => UNKNOWN_OUTCOME,
                    },
                    error: check.error.as_deref(),
                });
                host.take(
                    down_when,
                    &SeriesRecord {
                        agent: &records.places[pending.place].0,
                        at: pending.at,
                        interval_micros: pending.interval_micros,
                        cert_expires_at: pending.cert_expires_at,
                        name: pending.name.as_deref(),
                        group: pending.group.as_deref(),
                        check,
                    },
                );
            }
        }
    }
}

#[cfg(test)]
mod tests;
