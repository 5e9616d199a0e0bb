//! The fold: how a batch of records changes the state (series, incidents, sums by bucket).
//!
//! Pure, and without a clock. The state after a record depends only on that record and on the records of its host before it, so
//! reading a topic again gives the same state. Sums are additions; everything else follows the order of a host's records in
//! their partition.
//!
//! A batch is folded in two steps, because the state is kept only in the tables: [`Fold::record`] collects the records, which
//! shows the hosts and buckets that they change, and [`Fold::apply`] changes the stored state of these hosts. The sink reads,
//! applies and writes in the transaction that moves the positions. So memory and tables cannot differ, a batch that is tried
//! again starts from the stored state, and a partition that moves needs no hand-over.

pub mod host;
pub mod observed;
pub mod rollup;

use std::collections::{BTreeMap, HashMap};

use crate::consume::fold::host::{DownWhen, Host};
use crate::consume::fold::observed::Observed;
use crate::consume::fold::rollup::{Key, Rollup};
use crate::tables::buckets::{WIDTHS, series_id};

/// The records of a batch, by series, and their sums.
#[derive(Debug, Default)]
pub struct Fold<'a> {
    numbers: HashMap<(&'a str, &'a str), usize>,
    series: Vec<SeriesOfBatch<'a>>,
    /// In their order, with the indexes of their series.
    records: Vec<(usize, Observed<'a>)>,
}

#[derive(Debug)]
struct SeriesOfBatch<'a> {
    id: i64,
    address: &'a str,
    agent: &'a str,
    /// The sums of the narrowest buckets, by their start.
    buckets: BTreeMap<i64, Rollup>,
}

impl<'a> Fold<'a> {
    /// Takes the next record.
    pub fn record(&mut self, record: Observed<'a>) {
        let (address, agent) = (record.address, record.agent);
        let number = *self.numbers.entry((address, agent)).or_insert_with(|| {
            self.series.push(SeriesOfBatch {
                id: series_id(address, agent),
                address,
                agent,
                buckets: BTreeMap::new(),
            });
            self.series.len() - 1
        });
        let start = Key::of(0, WIDTHS[0], record.at).starts_at;
        self.series[number].buckets.entry(start).or_default().add(&record);
        self.records.push((number, record));
    }

    /// The buckets that the batch changes, in the order of their keys, with its sums. Records are counted in the narrowest
    /// buckets; the wider ones are added up here.
    pub fn take_rollups(&mut self) -> Vec<(Key, Rollup)> {
        let mut rollups: Vec<(Key, Rollup)> = Vec::new();
        for series in &mut self.series {
            for seconds in &WIDTHS[1..] {
                let first = rollups.len();
                for (starts_at, narrow) in &series.buckets {
                    let key = Key::of(series.id, *seconds, *starts_at);
                    match rollups[first..].last_mut() {
                        Some((last, sum)) if *last == key => sum.merge(narrow),
                        _ => rollups.push((key, narrow.clone())),
                    }
                }
            }
            let narrow = std::mem::take(&mut series.buckets).into_iter();
            rollups
                .extend(narrow.map(|(starts_at, rollup)| (Key::of(series.id, WIDTHS[0], starts_at), rollup)));
        }
        rollups.sort_unstable_by_key(|(key, _)| *key);
        rollups
    }

    /// The number, host and place of each series, in the order in which their rows are locked.
    pub fn series(&self) -> Vec<(i64, &'a str, &'a str)> {
        let series = self.series.iter();
        let mut series: Vec<_> = series
            .map(|series| (series.id, series.address, series.agent))
            .collect();
        series.sort_unstable_by_key(|(_, address, agent)| (*address, *agent));
        series
    }

    /// Changes the stored state of the hosts. A host that is not in `stored` is new.
    pub fn apply(&self, down_when: DownWhen, stored: &mut BTreeMap<String, Host>) {
        let mut hosts: HashMap<&str, usize> = HashMap::new();
        let mut states: Vec<Host> = Vec::new();
        let host_of: Vec<usize> = self
            .series
            .iter()
            .map(|series| {
                *hosts.entry(series.address).or_insert_with(|| {
                    states.push(stored.remove(series.address).unwrap_or_default());
                    states.len() - 1
                })
            })
            .collect();
        for (number, record) in self.records.iter().filter(|(_, record)| !record.is_ahead) {
            states[host_of[*number]].take(down_when, record);
        }
        for (address, number) in hosts {
            let host = std::mem::take(&mut states[number]);
            if host != Host::default() {
                stored.insert(address.to_owned(), host);
            }
        }
    }
}

#[cfg(test)]
mod tests;
