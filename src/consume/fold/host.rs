//! A host's series, its verdict, and its incidents, and how each record changes them.
//!
//! Pure, and without a clock: the time is that of the records. So the same records in the same order give the same state, however
//! they are divided into batches and whenever they are read.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use crate::consume::fold::observed::{Finding, Observed};
use crate::consume::fold::rollup::count_outcome;
use crate::words::words;

/// DOWN_WHEN: how many of the voting places must see a host down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DownWhen {
    Any,
    /// At least half: a tie is down.
    #[default]
    Majority,
    All,
    /// This many, however many vote.
    Places(u32),
}

impl DownWhen {
    fn is_down(self, down: usize, votes: usize) -> bool {
        let needed = match self {
            Self::Any => 1,
            Self::Majority => votes.div_ceil(2),
            Self::All => votes,
            Self::Places(places) => usize::try_from(places).unwrap_or(usize::MAX),
        };
        down >= needed.max(1)
    }
}

impl FromStr for DownWhen {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "any" => Ok(Self::Any),
            "majority" => Ok(Self::Majority),
            "all" => Ok(Self::All),
            _ => match text.parse() {
                Ok(0) | Err(_) => Err(()),
                Ok(places) => Ok(Self::Places(places)),
            },
        }
    }
}

words! {
    /// The verdict of the voting places on a host.
    Verdict, as_str:
    Up "up",
    Down "down",
}

/// A host as one place sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Series {
    /// The newest record of any kind.
    pub last_seen_at: Option<i64>,
    pub interval_micros: Option<i64>,
    /// Of the newest record.
    pub name: Option<String>,
    pub group: Option<String>,
    pub checks: Option<Checks>,
    pub certificate: Option<Certificate>,
}

/// The checks of a series. Missed ticks are not checks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checks {
    pub first_at: i64,
    pub last_at: i64,
    pub is_valid: bool,
    /// Since when `is_valid` has its value.
    pub since: i64,
    pub outcome: String,
    pub error: Option<String>,
    pub failures_in_a_row: i64,
    pub last_failed_at: Option<i64>,
    pub last_failed_outcome: Option<String>,
    pub last_error: Option<String>,
}

/// The certificate of the newest record that has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Certificate {
    pub expires_at: i64,
    pub seen_at: i64,
}

impl Series {
    /// The vote: whether the last check is valid. `None` if it is too old to count at the time `at` of the host's newest check.
    fn votes(&self, at: i64) -> Option<bool> {
        let checks = self.checks.as_ref()?;
        let lasts = self.interval_micros.unwrap_or(0).saturating_mul(2);
        (at.saturating_sub(checks.last_at) <= lasts).then_some(checks.is_valid)
    }

    /// Takes the next record. True if it has a check that is newer than all before; an older one does not change the vote.
    fn take(&mut self, record: &Observed<'_>) -> bool {
        let previous = self.checks.as_ref().map(|checks| checks.last_at);
        if self
            .last_seen_at
            .is_none_or(|last_seen_at| last_seen_at <= record.at)
        {
            self.last_seen_at = Some(record.at);
            // The original's records have no interval, so the time between two checks is used.
            let gap = previous
                .filter(|_| record.finding.is_check())
                .map(|previous| record.at - previous);
            self.interval_micros = record.interval_micros.or(gap).or(self.interval_micros);
            self.name = record.name.map(str::to_owned);
            self.group = record.group.map(str::to_owned);
        }
        if let Some(expires_at) = record.cert_expires_at
            && self
                .certificate
                .is_none_or(|certificate| certificate.seen_at <= record.at)
        {
            self.certificate = Some(Certificate {
                expires_at,
                seen_at: record.at,
            });
        }
        if !record.finding.is_check() || previous.is_some_and(|previous| record.at <= previous) {
            return false;
        }
        let is_valid = record.finding == Finding::Valid;
        let checks = self.checks.get_or_insert_with(|| Checks {
            first_at: record.at,
            last_at: record.at,
            is_valid,
            since: record.at,
            outcome: String::new(),
            error: None,
            failures_in_a_row: 0,
            last_failed_at: None,
            last_failed_outcome: None,
            last_error: None,
        });
        if checks.is_valid != is_valid {
            checks.is_valid = is_valid;
            checks.since = record.at;
        }
        checks.last_at = record.at;
        replace(&mut checks.outcome, record.outcome);
        checks.error = record.error.map(str::to_owned);
        if is_valid {
            checks.failures_in_a_row = 0;
        } else {
            checks.failures_in_a_row += 1;
            checks.last_failed_at = Some(record.at);
            checks.last_failed_outcome = Some(record.outcome.to_owned());
            checks.last_error.clone_from(&checks.error);
        }
        true
    }
}

/// The most places that an incident names. There are rarely more than ten, but a record may name any place.
const MAX_PLACES: usize = 256;

/// An outage of a host, according to the verdict. Its host and `number` identify it permanently.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incident {
    /// Counts a host's incidents from 1.
    pub number: i64,
    /// The time of the failed check that made the verdict `down`.
    pub started_at: i64,
    /// The time of the valid check that made it `up` again.
    pub ended_at: Option<i64>,
    /// Failed checks, by outcome.
    pub outcomes: BTreeMap<String, i32>,
    pub first_outcome: String,
    pub last_outcome: String,
    pub last_error: Option<String>,
    /// The places whose checks failed during it.
    pub places: BTreeSet<String>,
}

impl Incident {
    pub fn checks(&self) -> i64 {
        self.outcomes.values().map(|count| i64::from(*count)).sum()
    }

    /// Of equally frequent ones, the first in byte order.
    pub fn most_frequent_outcome(&self) -> &str {
        let by_count = self.outcomes.iter().rev().max_by_key(|(_, count)| **count);
        by_count.map_or("", |(outcome, _)| outcome)
    }

    fn count(&mut self, record: &Observed<'_>) {
        count_outcome(&mut self.outcomes, record.outcome);
        replace(&mut self.last_outcome, record.outcome);
        self.last_error = record.error.map(str::to_owned);
        if self.places.len() < MAX_PLACES && !self.places.contains(record.agent) {
            self.places.insert(record.agent.to_owned());
        }
    }
}

/// The state of one host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// By place; `""` if the records have no agent.
    pub series: BTreeMap<String, Series>,
    /// The newest incident, if any, after those that this batch ended.
    pub incidents: Vec<Incident>,
}

impl Host {
    pub fn verdict(&self) -> Option<(Verdict, i64)> {
        let first_at = |series: &Series| series.checks.as_ref().map(|checks| checks.first_at);
        let first_at = self.series.values().filter_map(first_at).min()?;
        Some(match self.incidents.last() {
            Some(Incident {
                ended_at: None,
                started_at,
                ..
            }) => (Verdict::Down, *started_at),
            Some(Incident {
                ended_at: Some(ended_at),
                ..
            }) => (Verdict::Up, *ended_at),
            None => (Verdict::Up, first_at),
        })
    }

    /// Takes the next record of one of its series.
    pub fn take(&mut self, down_when: DownWhen, record: &Observed<'_>) {
        let series = match self.series.get_mut(record.agent) {
            Some(series) => series,
            None => self.series.entry(record.agent.to_owned()).or_default(),
        };
        if !series.take(record) {
            return;
        }
        let is_valid = record.finding == Finding::Valid;
        // The records of one place may be read before those of another, so the host's time is that of its newest check.
        let last_at = |series: &Series| series.checks.as_ref().map(|checks| checks.last_at);
        let at = self
            .series
            .values()
            .filter_map(last_at)
            .max()
            .unwrap_or(record.at);
        let votes = self.series.values().filter_map(|series| series.votes(at));
        let (all, down) = votes.fold((0, 0), |(all, down), is_valid| {
            (all + 1, down + usize::from(!is_valid))
        });
        let is_down = down_when.is_down(down, all);

        let turned_at = self
            .incidents
            .last()
            .map(|last| last.ended_at.unwrap_or(last.started_at));
        let turns_at = turned_at.map_or(record.at, |turned_at| turned_at.max(record.at));
        match self.incidents.last_mut().filter(|last| last.ended_at.is_none()) {
            Some(open) if is_valid => open.ended_at = (!is_down).then_some(turns_at),
            Some(open) => open.count(record),
            None if is_down && !is_valid => {
                let mut incident = Incident {
                    number: self.incidents.last().map_or(1, |last| last.number + 1),
                    started_at: turns_at,
                    ended_at: None,
                    outcomes: BTreeMap::new(),
                    first_outcome: record.outcome.to_owned(),
                    last_outcome: String::new(),
                    last_error: None,
                    places: BTreeSet::new(),
                };
                incident.count(record);
                self.incidents.push(incident);
            }
            None => {}
        }
    }
}

/// Avoids a copy where the text stays the same, as it usually does.
fn replace(into: &mut String, text: &str) {
    if into != text {
        text.clone_into(into);
    }
}
