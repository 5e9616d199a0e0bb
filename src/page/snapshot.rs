//! The data of the page: the state of every host, its sums by hour and day, and the incidents.
//!
//! Pure. `reader` fills it from the tables; everything else in `page` is made from it. Times are microseconds since 1970.

use crate::tables::buckets::Histogram;
use crate::words::words;

pub const SECOND: i64 = 1_000_000;
pub const HOUR: i64 = 3_600 * SECOND;
pub const DAY: i64 = 24 * HOUR;

/// How much of the past the charts show.
pub const HOURS_SHOWN: i64 = 48;
pub const DAYS_SHOWN: i64 = 90;

/// The windows of the uptime, as the views name them.
pub const WINDOWS: [(&str, &str); 4] = [
    ("24h", "24 hours"),
    ("7d", "168 hours"),
    ("30d", "720 hours"),
    ("90d", "2160 hours"),
];

/// The phases of a check, in their order.
pub const PHASES: [&str; 5] = ["Name lookup", "Connection", "TLS", "First byte", "Body"];

/// All of it, as one transaction saw it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    pub taken_at: i64,
    /// By address.
    pub hosts: Vec<Host>,
    /// The newest first.
    pub incidents: Vec<Incident>,
    /// Whether there are earlier incidents.
    pub has_more_incidents: bool,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Host {
    pub address: String,
    pub name: Option<String>,
    pub group: Option<String>,
    /// The verdict over the places; `None` before the first check.
    pub is_down: Option<bool>,
    pub since: Option<i64>,
    /// By agent name.
    pub places: Vec<Place>,
    /// In the order of [`WINDOWS`].
    pub windows: [Counts; WINDOWS.len()],
    /// The share of each window's time in which the host was not down by verdict.
    pub verdict_uptimes: [Option<f64>; WINDOWS.len()],
    /// Those that have records, by time.
    pub hours: Vec<Bucket>,
    pub days: Vec<Bucket>,
}

/// A host as one place sees it: its last check.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Place {
    /// Empty if the records name none.
    pub agent: String,
    /// `None` before the first check.
    pub is_valid: Option<bool>,
    pub since: Option<i64>,
    pub last_check_at: Option<i64>,
    pub interval_seconds: Option<f64>,
    pub outcome: Option<String>,
    pub error: Option<String>,
    /// When the certificate expires, and when it was seen.
    pub certificate: Option<(i64, i64)>,
}

/// What became of the ticks of a period.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub valid: i64,
    pub failed: i64,
    /// Missed, or the place itself could not check.
    pub not_made: i64,
    /// Valid, but slower than the host's `slow=`.
    pub slow: i64,
}

impl Counts {
    pub fn checks(self) -> i64 {
        self.valid + self.failed
    }
}

/// The sums of a host over all places, of an hour or a day.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Bucket {
    pub starts_at: i64,
    pub counts: Counts,
    /// Percentiles of the latency in seconds; `None` if no check had one.
    pub p50: Option<f64>,
    pub p95: Option<f64>,
    /// The mean seconds of each of [`PHASES`] over the checks with a latency.
    pub phases: [f64; PHASES.len()],
}

impl Bucket {
    /// `phase_sums` are in units of 10 µs, as they are stored.
    pub fn new(
        starts_at: i64,
        counts: Counts,
        latencies: &Histogram,
        phase_sums: [i64; PHASES.len()],
    ) -> Self {
        let count = latencies.count();
        Self {
            starts_at,
            counts,
            p50: latencies.percentile(0.5),
            p95: latencies.percentile(0.95),
            phases: phase_sums.map(|sum| {
                if count == 0 {
                    0.0
                } else {
                    sum as f64 / 1e5 / count as f64
                }
            }),
        }
    }
}

/// One outage of a host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Incident {
    pub address: String,
    /// Identifies the incident among those of its host. It never changes.
    pub number: i64,
    pub started_at: i64,
    /// `None` while it lasts.
    pub ended_at: Option<i64>,
    /// Failed checks.
    pub checks: i64,
    /// The most frequent one.
    pub outcome: String,
    pub places: Vec<String>,
    pub last_error: Option<String>,
}

words! {
    /// The state of a host, of a place, or of a day.
    State,
    /// As `status.json` has it and its schema lists it.
    word:
    Up "up",
    Slow "slow",
    Partly "partly",
    Down "down",
    NotChecked "not_checked",
}

impl State {
    /// The state in a period with these counts.
    pub fn of(counts: Counts) -> Self {
        let checks = counts.checks();
        if checks == 0 {
            Self::NotChecked
        } else if counts.failed * 2 >= checks {
            Self::Down
        } else if counts.failed > 0 {
            Self::Partly
        } else if counts.slow * 10 >= checks {
            Self::Slow
        } else {
            Self::Up
        }
    }
}

impl Place {
    /// The state is unknown if the last check is older than three intervals and a minute. `status` has the same rule.
    pub fn state(&self, now: i64) -> State {
        const WITHOUT_INTERVAL_SECONDS: f64 = 60.0;
        let interval = self.interval_seconds.unwrap_or(WITHOUT_INTERVAL_SECONDS);
        let lasts = ((3.0 * interval + 60.0) * 1e6) as i64;
        match (self.is_valid, self.last_check_at) {
            (Some(is_valid), Some(at)) if now.saturating_sub(at) <= lasts => match is_valid {
                true => State::Up,
                false => State::Down,
            },
            _ => State::NotChecked,
        }
    }
}

impl Host {
    pub fn state(&self, now: i64) -> State {
        let states: Vec<State> = self.places.iter().map(|place| place.state(now)).collect();
        if states.iter().all(|state| *state == State::NotChecked) {
            State::NotChecked
        } else if self.is_down == Some(true) {
            State::Down
        } else if states.contains(&State::Down) {
            State::Partly
        } else if self.is_slow(now) {
            State::Slow
        } else {
            State::Up
        }
    }

    /// Whether at least half of the checks were slow in the last hour that had any.
    fn is_slow(&self, now: i64) -> bool {
        let newest = self.hours.last().filter(|hour| hour.starts_at > now - 2 * HOUR);
        newest.is_some_and(|hour| hour.counts.slow > 0 && hour.counts.slow * 2 >= hour.counts.checks())
    }

    /// The end of the certificate that was seen last.
    pub fn certificate_expires_at(&self) -> Option<i64> {
        let certificates = self.places.iter().filter_map(|place| place.certificate);
        certificates
            .max_by_key(|(_, seen_at)| *seen_at)
            .map(|(expires_at, _)| expires_at)
    }

    /// The median response time of the newest hour with an answer, if that is this hour or the one before.
    pub fn lately(&self, now: i64) -> Option<f64> {
        let hours = self.hours.iter().rev();
        let mut recent = hours.take_while(|hour| hour.starts_at > now - 2 * HOUR);
        recent.find_map(|hour| hour.p50)
    }

    pub fn last_check_at(&self) -> Option<i64> {
        self.places.iter().filter_map(|place| place.last_check_at).max()
    }

    /// The newest check that agrees with the host's state: a failed one if the host is down.
    pub fn last_check(&self) -> Option<&Place> {
        let fits = |place: &&Place| place.is_valid == self.is_down.map(|is_down| !is_down);
        let newest = |places: &mut dyn Iterator<Item = &'_ Place>| -> Option<i64> {
            places.filter_map(|place| place.last_check_at).max()
        };
        let at = newest(&mut self.places.iter().filter(fits)).or_else(|| newest(&mut self.places.iter()))?;
        let mut places = self.places.iter().filter(|place| place.last_check_at == Some(at));
        places.clone().find(fits).or_else(|| places.next())
    }
}

/// The last `count` periods until `now`: the beginning of each, and its bucket if there are records.
pub fn slots(buckets: &[Bucket], width: i64, count: i64, now: i64) -> Vec<(i64, Option<&Bucket>)> {
    let last = now.div_euclid(width) * width;
    (0..count)
        .rev()
        .map(|ago| {
            let starts_at = last - ago * width;
            let found = buckets.binary_search_by_key(&starts_at, |bucket| bucket.starts_at);
            (starts_at, found.ok().map(|index| &buckets[index]))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(valid: i64, failed: i64, slow: i64) -> Counts {
        Counts {
            valid,
            failed,
            slow,
            not_made: 7,
        }
    }

    #[test]
    fn a_time_is_down_from_half_of_its_checks_and_slow_from_a_tenth() {
        for (counts, state) in [
            (counts(0, 0, 0), State::NotChecked),
            (counts(10, 0, 0), State::Up),
            (counts(11, 0, 1), State::Up),
            (counts(10, 0, 1), State::Slow),
            (counts(9, 1, 9), State::Partly),
            (counts(6, 5, 0), State::Partly),
            (counts(5, 5, 0), State::Down),
            (counts(0, 1, 0), State::Down),
        ] {
            assert_eq!(State::of(counts), state, "{counts:?}");
        }
    }

    fn place(is_valid: bool, last_check_at: i64) -> Place {
        Place {
            is_valid: Some(is_valid),
            last_check_at: Some(last_check_at * SECOND),
            interval_seconds: Some(30.0),
            ..Place::default()
        }
    }

    #[test]
    fn a_check_says_nothing_about_now_after_three_intervals_and_a_minute() {
        let place = place(true, 1_000);
        assert_eq!(place.state(1_150 * SECOND), State::Up);
        assert_eq!(place.state(1_151 * SECOND), State::NotChecked);
        assert_eq!(Place::default().state(0), State::NotChecked);
    }

    #[test]
    fn places_that_differ_make_a_host_partly_down_until_the_verdict_is_down() {
        let mut host = Host {
            is_down: Some(false),
            places: vec![place(true, 1_000), place(false, 1_001), place(true, 100)],
            ..Host::default()
        };
        let now = 1_002 * SECOND;
        assert_eq!(host.state(now), State::Partly);
        assert_eq!(host.last_check().unwrap().is_valid, Some(true));
        host.is_down = Some(true);
        assert_eq!(host.state(now), State::Down);
        assert_eq!(host.last_check().unwrap().is_valid, Some(false));
        assert_eq!(host.state(10 * now), State::NotChecked);
        assert_eq!(Host::default().last_check(), None);
    }

    #[test]
    fn a_host_is_slow_while_half_of_its_newest_checks_are() {
        let hour = |slow| Bucket {
            starts_at: HOUR,
            counts: counts(10, 0, slow),
            ..Bucket::default()
        };
        let mut host = Host {
            is_down: Some(false),
            places: vec![place(true, 2 * 3_600)],
            hours: vec![hour(4)],
            ..Host::default()
        };
        let now = 2 * HOUR + SECOND;
        assert_eq!(host.state(now), State::Up);
        host.hours = vec![hour(5)];
        assert_eq!(host.state(now), State::Slow);
        host.hours[0].starts_at = 0;
        assert_eq!(host.state(now), State::Up);
    }

    #[test]
    fn every_slot_is_there_with_or_without_records() {
        let bucket = |starts_at| Bucket {
            starts_at,
            ..Bucket::default()
        };
        let buckets = [bucket(0), bucket(2 * HOUR)];
        let found: Vec<_> = slots(&buckets, HOUR, 3, 3 * HOUR + 5)
            .into_iter()
            .map(|(starts_at, bucket)| (starts_at / HOUR, bucket.is_some()))
            .collect();
        assert_eq!(found, [(1, false), (2, true), (3, false)]);
    }
}
