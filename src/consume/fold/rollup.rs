//! Buckets of a series: the number of records by kind, their latencies, and a histogram of these (`tables::buckets`).
//!
//! Pure. All values are whole numbers, and they are merged by addition or maximum. So the result does not depend on the order of
//! the records, or on how they are divided into batches.

use std::collections::BTreeMap;

use crate::consume::fold::observed::{Finding, Observed, UNKNOWN_OUTCOME};
use crate::sample::Outcome;
use crate::tables::buckets::{Histogram, bin_of};

/// Identifies a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// One of [`WIDTHS`](crate::tables::buckets::WIDTHS).
    pub seconds: i32,
    /// Microseconds since 1970, a multiple of the width.
    pub starts_at: i64,
    pub series_id: i64,
}

impl Key {
    /// The bucket of that width that contains `at` (microseconds since 1970).
    pub fn of(series_id: i64, seconds: i32, at: i64) -> Self {
        let width = i64::from(seconds) * 1_000_000;
        Self {
            seconds,
            starts_at: at.div_euclid(width) * width,
            series_id,
        }
    }
}

/// Outcomes that we do not know are counted as this one, because a record may have any, and a row must not grow without bound.
const OTHER_OUTCOMES: &str = "other";

/// Adds a failed check to the count of its outcome.
pub(super) fn count_outcome(outcomes: &mut BTreeMap<String, i32>, outcome: &str) {
    let is_known = outcome == UNKNOWN_OUTCOME || Outcome::ALL.iter().any(|known| known.as_str() == outcome);
    add(outcomes, if is_known { outcome } else { OTHER_OUTCOMES }, 1);
}

fn add(outcomes: &mut BTreeMap<String, i32>, outcome: &str, count: i32) {
    match outcomes.get_mut(outcome) {
        Some(sum) => *sum = sum.saturating_add(count),
        None => drop(outcomes.insert(outcome.to_owned(), count)),
    }
}

/// The sums of one bucket. Counts and sums stop at their type's maximum.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rollup {
    pub valid: i32,
    pub failed: i32,
    pub missed: i32,
    pub offline: i32,
    /// Checks that took longer than their host's `slow=`.
    pub slow: i32,
    /// Failed checks by outcome.
    pub outcomes: BTreeMap<String, i32>,
    pub latency_us: i64,
    pub latency_max_us: i32,
    /// DNS, connect, TLS, first byte and body of the checks with a latency, in units of 10 µs, so that the sums fit into four bytes.
    pub phases: [i32; 5],
    pub histogram: Histogram,
}

impl Rollup {
    /// The number of records.
    pub fn due(&self) -> i32 {
        [self.failed, self.missed, self.offline]
            .into_iter()
            .fold(self.valid, i32::saturating_add)
    }

    /// Counts one record.
    pub fn add(&mut self, record: &Observed<'_>) {
        let count = match record.finding {
            Finding::Valid => &mut self.valid,
            Finding::Failed => &mut self.failed,
            Finding::Missed => &mut self.missed,
            Finding::Offline => &mut self.offline,
        };
        *count = count.saturating_add(1);
        self.slow = self.slow.saturating_add(i32::from(record.is_slow));
        if record.finding == Finding::Failed {
            count_outcome(&mut self.outcomes, record.outcome);
        }
        if let Some(micros) = record.latency_us {
            self.latency_us = self.latency_us.saturating_add(micros);
            self.latency_max_us = self.latency_max_us.max(i32::try_from(micros).unwrap_or(i32::MAX));
            self.histogram.add(bin_of(micros), 1);
            for (sum, phase) in self.phases.iter_mut().zip(record.phases) {
                *sum = sum.saturating_add(phase);
            }
        }
    }

    /// Adds the sums of another batch, or of a narrower bucket.
    pub fn merge(&mut self, other: &Self) {
        let counts = [
            (&mut self.valid, other.valid),
            (&mut self.failed, other.failed),
            (&mut self.missed, other.missed),
            (&mut self.offline, other.offline),
            (&mut self.slow, other.slow),
        ];
        for (sum, count) in counts.into_iter().chain(self.phases.iter_mut().zip(other.phases)) {
            *sum = sum.saturating_add(count);
        }
        for (outcome, count) in &other.outcomes {
            add(&mut self.outcomes, outcome, *count);
        }
        self.latency_us = self.latency_us.saturating_add(other.latency_us);
        self.latency_max_us = self.latency_max_us.max(other.latency_max_us);
        self.histogram.merge(&other.histogram);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::{Sample, Timestamp};

    #[test]
    fn a_bucket_begins_at_a_multiple_of_its_width_even_before_1970() {
        assert_eq!(Key::of(1, 300, 299_999_999).starts_at, 0);
        assert_eq!(Key::of(1, 300, 300_000_000).starts_at, 300_000_000);
        assert_eq!(Key::of(1, 3_600, -1).starts_at, -3_600_000_000);
    }

    #[test]
    fn sums_stop_at_their_maximum() {
        let sample = Sample {
            latency: Some(1e300),
            dns_seconds: Some(1e300),
            scheduled_at: Timestamp::from_unix_micros(0),
            ..Sample::default()
        };
        let mut rollup = Rollup::default();
        for _ in 0..3 {
            rollup.add(&Observed::of(&sample, None).unwrap());
        }
        assert_eq!((rollup.failed, rollup.latency_us), (3, i64::MAX));
        assert_eq!(rollup.phases[0], i32::MAX);
        assert_eq!(rollup.outcomes["unknown"], 3);
        let mut sum = rollup.clone();
        sum.merge(&rollup);
        assert_eq!((sum.due(), sum.latency_us), (6, i64::MAX));
    }

    #[test]
    fn made_up_outcomes_do_not_make_a_bucket_grow() {
        let mut outcomes = BTreeMap::new();
        for number in 0..1_000 {
            count_outcome(&mut outcomes, &format!("made up {number:04}"));
        }
        for outcome in ["unknown", "dns_error", "dns_error"] {
            count_outcome(&mut outcomes, outcome);
        }
        let counts: Vec<_> = outcomes
            .iter()
            .map(|(outcome, count)| (outcome.as_str(), *count))
            .collect();
        assert_eq!(counts, [("dns_error", 2), ("other", 1_000), ("unknown", 1)]);
    }
}
