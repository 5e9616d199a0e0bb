//! A host's series, its verdict over them, and its incidents: what one check after the other makes of them.
//!
//! Pure, and without a clock: time is what the records say. So the same records in the same order give the same state,
//! wherever a batch ends and whenever they are read.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

/// DOWN_WHEN: how many of the places that vote must see a host down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DownWhen {
    Any,
    /// At least half: a tie is down.
    #[default]
    Majority,
    All,
    /// So many, however many vote.
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

/// What the places that vote make of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Up,
    Down,
}

impl Verdict {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Down => "down",
        }
    }
}

/// One record of one series, as far as it may change more than sums. Times are microseconds since 1970.
#[derive(Clone, Debug, PartialEq)]
pub struct Event<'a> {
    pub agent: &'a str,
    pub at: i64,
    pub interval_micros: Option<i64>,
    pub cert_expires_at: Option<i64>,
    /// `None`: the tick was not checked, or the place could not check.
    pub check: Option<Check<'a>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Check<'a> {
    pub is_valid: bool,
    pub outcome: &'a str,
    pub error: Option<&'a str>,
}

/// A host as one place sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Series {
    /// The newest record of any kind.
    pub last_seen_at: Option<i64>,
    pub interval_micros: Option<i64>,
    pub checks: Option<Checks>,
    pub certificate: Option<Certificate>,
}

/// What a series' checks say. Missed ticks are none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checks {
    pub first_at: i64,
    pub last_at: i64,
    pub is_valid: bool,
    /// Since when `is_valid` is what it is.
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
    /// Whether its last check still counts when the host's newest one is of `at`.
    fn votes(&self, at: i64) -> Option<bool> {
        let checks = self.checks.as_ref()?;
        let lasts = self.interval_micros.unwrap_or(0).saturating_mul(2);
        (at.saturating_sub(checks.last_at) <= lasts).then_some(checks.is_valid)
    }

    /// Whether the check in it (if any) is newer than every one before: an older one changes no vote.
    fn take(&mut self, event: &Event<'_>) -> bool {
        let previous = self.checks.as_ref().map(|checks| checks.last_at);
        if self
            .last_seen_at
            .is_none_or(|last_seen_at| last_seen_at <= event.at)
        {
            self.last_seen_at = Some(event.at);
            // The original's records say no interval: then it is the time between checks.
            let gap = previous
                .filter(|_| event.check.is_some())
                .map(|previous| event.at - previous);
            self.interval_micros = event.interval_micros.or(gap).or(self.interval_micros);
        }
        if let Some(expires_at) = event.cert_expires_at
            && self
                .certificate
                .is_none_or(|certificate| certificate.seen_at <= event.at)
        {
            self.certificate = Some(Certificate {
                expires_at,
                seen_at: event.at,
            });
        }
        let Some(check) = event
            .check
            .filter(|_| previous.is_none_or(|previous| previous < event.at))
        else {
            return false;
        };
        let checks = self.checks.get_or_insert_with(|| Checks {
            first_at: event.at,
            last_at: event.at,
            is_valid: check.is_valid,
            since: event.at,
            outcome: String::new(),
            error: None,
            failures_in_a_row: 0,
            last_failed_at: None,
            last_failed_outcome: None,
            last_error: None,
        });
        if checks.is_valid != check.is_valid {
            checks.is_valid = check.is_valid;
            checks.since = event.at;
        }
        checks.last_at = event.at;
        replace(&mut checks.outcome, check.outcome);
        checks.error = check.error.map(str::to_owned);
        if check.is_valid {
            checks.failures_in_a_row = 0;
        } else {
            checks.failures_in_a_row += 1;
            checks.last_failed_at = Some(event.at);
            checks.last_failed_outcome = Some(check.outcome.to_owned());
            checks.last_error.clone_from(&checks.error);
        }
        true
    }
}

/// One outage of a host, by verdict. Its host and `number` identify it for ever.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incident {
    /// 1 for a host's first one.
    pub number: i64,
    /// The failed check that made the verdict down.
    pub started_at: i64,
    /// The valid check that made it up again.
    pub ended_at: Option<i64>,
    /// Failed checks, by outcome.
    pub outcomes: BTreeMap<String, i64>,
    pub first_outcome: String,
    pub last_outcome: String,
    pub last_error: Option<String>,
    /// The places that saw it.
    pub places: BTreeSet<String>,
}

impl Incident {
    pub fn checks(&self) -> i64 {
        self.outcomes.values().sum()
    }

    /// Of several that are as frequent, the first by name.
    pub fn most_frequent_outcome(&self) -> &str {
        let by_count = self.outcomes.iter().rev().max_by_key(|(_, count)| **count);
        by_count.map_or("", |(outcome, _)| outcome)
    }

    fn count(&mut self, agent: &str, check: &Check<'_>) {
        match self.outcomes.get_mut(check.outcome) {
            Some(count) => *count += 1,
            None => {
                self.outcomes.insert(check.outcome.to_owned(), 1);
            }
        }
        replace(&mut self.last_outcome, check.outcome);
        self.last_error = check.error.map(str::to_owned);
        if !self.places.contains(agent) {
            self.places.insert(agent.to_owned());
        }
    }
}

/// What the tables say of one host, and what a batch makes of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// By place; `""` where the records name none.
    pub series: BTreeMap<String, Series>,
    /// The newest incident, if there was any, and before it those that this batch ended.
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
    pub fn take(&mut self, down_when: DownWhen, event: &Event<'_>) {
        let series = match self.series.get_mut(event.agent) {
            Some(series) => series,
            None => self.series.entry(event.agent.to_owned()).or_default(),
        };
        if !series.take(event) {
            return;
        }
        let Some(check) = &event.check else { return };
        // Places are not read in step: the host's time is the newest check of all of them.
        let last_at = |series: &Series| series.checks.as_ref().map(|checks| checks.last_at);
        let at = self.series.values().filter_map(last_at).max().unwrap_or(event.at);
        let votes = self.series.values().filter_map(|series| series.votes(at));
        let (all, down) = votes.fold((0, 0), |(all, down), is_valid| {
            (all + 1, down + usize::from(!is_valid))
        });
        let is_down = down_when.is_down(down, all);

        let turned_at = self
            .incidents
            .last()
            .map(|last| last.ended_at.unwrap_or(last.started_at));
        let turns_at = turned_at.map_or(event.at, |turned_at| turned_at.max(event.at));
        match self.incidents.last_mut().filter(|last| last.ended_at.is_none()) {
            Some(open) if check.is_valid => open.ended_at = (!is_down).then_some(turns_at),
            Some(open) => open.count(event.agent, check),
            None if is_down && !check.is_valid => {
                let mut incident = Incident {
                    number: self.incidents.last().map_or(1, |last| last.number + 1),
                    started_at: turns_at,
                    ended_at: None,
                    outcomes: BTreeMap::new(),
                    first_outcome: check.outcome.to_owned(),
                    last_outcome: String::new(),
                    last_error: None,
                    places: BTreeSet::new(),
                };
                incident.count(event.agent, check);
                self.incidents.push(incident);
            }
            None => {}
        }
    }
}

/// Most words are the ones that are there already.
fn replace(into: &mut String, text: &str) {
    if into != text {
        text.clone_into(into);
    }
}
