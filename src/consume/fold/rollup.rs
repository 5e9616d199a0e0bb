//! Buckets of a series: the number of records by kind, their latencies, and a histogram of these.
//!
//! Pure. All values are whole numbers, and they are merged by addition or maximum. So the result does not depend on the order of
//! the records, or on how they are divided into batches.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::sample::{Sample, Timestamp};

/// Bucket widths in seconds: five minutes for the last hour, hours for days, and days for months and years.
pub const WIDTHS: [i32; 3] = [300, 3_600, 86_400];

/// The ratio of a bin's upper bound to that of the bin before. The geometric middle of a bin differs from each latency in it by
/// at most 11.8 % (√1.25).
pub const BIN_RATIO: f64 = 1.25;

/// The upper bound of bin 0, in microseconds.
pub const FIRST_BIN_MICROS: f64 = 100.0;

/// Bins 0 to 62 extend from 0.1 ms to 102 s. The last one is for all longer latencies.
pub const BINS: usize = 64;

/// Decimal digits of each bin's count in the stored histogram. A year of one check a second fits.
pub const BIN_DIGITS: usize = 8;
const MAX_COUNT: u32 = 99_999_999;

/// The number of a series: the FNV-1a hash of both names.
///
/// The database does not assign it, so a replay gives the same numbers, and no round trip is needed. The probability that two of a
/// million series have the same number is 3 in 100 million.
pub fn series_id(address: &str, agent: &str) -> i64 {
    let bytes = address.bytes().chain([0]).chain(agent.bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    hash.cast_signed()
}

/// Identifies a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// One of [`WIDTHS`].
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

/// What a record says about its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    Valid,
    Failed,
    /// The tick was not checked.
    Missed,
    /// The place could not check, because its own network, memory or threads failed.
    Offline,
}

impl Finding {
    pub fn of(sample: &Sample<'_>) -> Self {
        match sample.outcome.as_deref() {
            _ if sample.is_valid => Self::Valid,
            Some("missed") => Self::Missed,
            Some("agent_error" | "agent_offline") => Self::Offline,
            _ => Self::Failed,
        }
    }

    /// Whether it says anything about the host.
    pub fn is_check(self) -> bool {
        matches!(self, Self::Valid | Self::Failed)
    }
}

/// The outcome of a failed check whose record has none, as in the original's records.
pub const UNKNOWN_OUTCOME: &str = "unknown";

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
    /// DNS, connect, TLS, first byte and body, in units of 10 µs, so that the sums fit into four bytes.
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
    pub fn add(&mut self, sample: &Sample<'_>, finding: Finding) {
        let count = match finding {
            Finding::Valid => &mut self.valid,
            Finding::Failed => &mut self.failed,
            Finding::Missed => &mut self.missed,
            Finding::Offline => &mut self.offline,
        };
        *count = count.saturating_add(1);
        if finding.is_check() && sample.slow == Some(true) {
            self.slow = self.slow.saturating_add(1);
        }
        if finding == Finding::Failed {
            let outcome = sample.outcome.as_deref().unwrap_or(UNKNOWN_OUTCOME);
            match self.outcomes.get_mut(outcome) {
                Some(count) => *count = count.saturating_add(1),
                None => {
                    self.outcomes.insert(outcome.to_owned(), 1);
                }
            }
        }
        if let Some(seconds) = sample.latency {
            let micros = (seconds * 1e6).round() as i64;
            self.latency_us = self.latency_us.saturating_add(micros);
            self.latency_max_us = self.latency_max_us.max(i32::try_from(micros).unwrap_or(i32::MAX));
            self.histogram.add(bin_of(micros), 1);
        }
        let phases = [
            sample.dns_seconds,
            sample.connect_seconds,
            sample.tls_seconds,
            sample.ttfb_seconds,
            sample.body_seconds,
        ];
        for (sum, seconds) in self.phases.iter_mut().zip(phases) {
            if let Some(seconds) = seconds {
                *sum = sum.saturating_add((seconds * 1e5).round() as i32);
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
            let sum = self.outcomes.entry(outcome.clone()).or_default();
            *sum = sum.saturating_add(*count);
        }
        self.latency_us = self.latency_us.saturating_add(other.latency_us);
        self.latency_max_us = self.latency_max_us.max(other.latency_max_us);
        for &(bin, count) in &other.histogram.0 {
            self.histogram.add(bin, count);
        }
    }
}

/// The bin of a latency: the first one whose upper bound is at least that.
fn bin_of(micros: i64) -> u8 {
    // The bounds are whole microseconds, so that the result does not depend on a machine's logarithm.
    static BOUNDS: std::sync::LazyLock<[i64; BINS - 1]> = std::sync::LazyLock::new(|| {
        std::array::from_fn(|bin| (FIRST_BIN_MICROS * BIN_RATIO.powi(bin as i32)).round() as i64)
    });
    BOUNDS.partition_point(|bound| *bound < micros) as u8
}

/// The number of latencies in each bin that has any, in the order of the bins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram(Vec<(u8, u32)>);

impl Histogram {
    fn add(&mut self, bin: u8, count: u32) {
        match self.0.binary_search_by_key(&bin, |(bin, _)| *bin) {
            Ok(at) => self.0[at].1 = self.0[at].1.saturating_add(count),
            Err(at) => self.0.insert(at, (bin, count)),
        }
    }

    /// How many latencies there are.
    pub fn count(&self) -> u64 {
        self.0.iter().map(|(_, count)| u64::from(*count)).sum()
    }

    /// The latency in seconds that this share of all latencies does not exceed: the middle of its bin, as in the view
    /// `_latency`. `None`: there is no latency.
    pub fn percentile(&self, share: f64) -> Option<f64> {
        let rank = (share * self.count() as f64).ceil() as u64;
        let mut running = 0;
        let (bin, _) = self.0.iter().find(|(_, count)| {
            running += u64::from(*count);
            running >= rank
        })?;
        Some(FIRST_BIN_MICROS / 1e6 * BIN_RATIO.powf(f64::from(*bin) - 0.5))
    }

    /// The stored form: one number, with [`BIN_DIGITS`] digits for each bin, the last ones for bin 0. Postgres adds histograms by
    /// adding these numbers, and does not store the empty bins at either end. `None` if all bins are empty.
    pub fn to_number(&self) -> Option<String> {
        let mut number = String::new();
        let (highest, _) = self.0.last()?;
        let mut entries = self.0.iter().rev().peekable();
        for bin in (0..=*highest).rev() {
            let count = entries
                .next_if(|(next, _)| *next == bin)
                .map_or(0, |(_, count)| *count);
            // Writing to a string cannot fail.
            let _ = write!(number, "{:0BIN_DIGITS$}", count.min(MAX_COUNT));
        }
        Some(number)
    }

    /// Reads the stored form. Anything else in the column counts as empty.
    pub fn from_number(number: &str) -> Self {
        let mut histogram = Self::default();
        let groups = number.as_bytes().rchunks(BIN_DIGITS).take(BINS);
        for (bin, group) in (0..).zip(groups) {
            let count = std::str::from_utf8(group)
                .ok()
                .and_then(|digits| digits.parse().ok());
            if let Some(count @ 1..) = count {
                histogram.add(bin, count);
            }
        }
        histogram
    }
}

/// The sums of a batch.
///
/// Records are counted only in the narrowest buckets. The wider ones are added up once at the end.
#[derive(Debug, Default)]
pub struct Rollups(std::collections::HashMap<Key, Rollup>);

impl Rollups {
    pub fn add(&mut self, series_id: i64, at: Timestamp, sample: &Sample<'_>, finding: Finding) {
        let key = Key::of(series_id, WIDTHS[0], at.unix_micros());
        self.0.entry(key).or_default().add(sample, finding);
    }

    /// The buckets of all widths, in the order of their keys.
    pub fn finish(self) -> BTreeMap<Key, Rollup> {
        let mut all: std::collections::HashMap<Key, Rollup> = std::collections::HashMap::new();
        for (key, rollup) in &self.0 {
            for seconds in &WIDTHS[1..] {
                let wider = Key::of(key.series_id, *seconds, key.starts_at);
                all.entry(wider).or_default().merge(rollup);
            }
        }
        all.into_iter().chain(self.0).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_bin_is_never_wrong_by_more_than_twelve_percent() {
        for micros in (100..100_000_000).step_by(997) {
            let bin = bin_of(micros);
            let middle = FIRST_BIN_MICROS * BIN_RATIO.powf(f64::from(bin) - 0.5);
            let error = (middle / micros as f64 - 1.0).abs();
            assert!(
                error < 0.12,
                "{micros} µs in bin {bin} is taken for {middle}: {error}"
            );
        }
    }

    #[test]
    fn bins_cover_every_latency_in_order() {
        for (micros, bin) in [
            (0, 0),
            (100, 0),
            (101, 1),
            (125, 1),
            (126, 2),
            (101_948_000, 62),
            (102_000_000, 63),
            (i64::MAX, 63),
        ] {
            assert_eq!(bin_of(micros), bin, "{micros}");
        }
    }

    #[test]
    fn a_bucket_begins_at_a_multiple_of_its_width_even_before_1970() {
        assert_eq!(Key::of(1, 300, 299_999_999).starts_at, 0);
        assert_eq!(Key::of(1, 300, 300_000_000).starts_at, 300_000_000);
        assert_eq!(Key::of(1, 3_600, -1).starts_at, -3_600_000_000);
    }

    #[test]
    fn a_histogram_is_stored_as_one_number() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.to_number(), None);
        histogram.add(3, 2);
        histogram.add(1, 86_400);
        assert_eq!(
            histogram.to_number().as_deref(),
            Some("00000002000000000008640000000000")
        );
        // As Postgres writes it, without zeros in front.
        assert_eq!(Histogram::from_number("2000000000008640000000000"), histogram);
    }

    #[test]
    fn a_percentile_is_the_middle_of_the_bin_that_it_lies_in() {
        assert_eq!(Histogram::default().percentile(0.5), None);
        let mut histogram = Histogram::default();
        for micros in [1_000, 1_000, 1_000, 50_000] {
            histogram.add(bin_of(micros), 1);
        }
        assert_eq!(histogram.count(), 4);
        for (share, seconds) in [(0.5, 0.001), (0.75, 0.001), (0.76, 0.05), (1.0, 0.05)] {
            let percentile = histogram.percentile(share).unwrap();
            assert!((percentile / seconds - 1.0).abs() < 0.12, "{share}: {percentile}");
        }
    }

    #[test]
    fn only_a_failed_check_counts_as_failed() {
        let sample = |is_valid, outcome: Option<&'static str>| Sample {
            is_valid,
            outcome: outcome.map(Into::into),
            ..Sample::default()
        };
        for (is_valid, outcome, finding) in [
            (true, Some("ok"), Finding::Valid),
            (true, None, Finding::Valid),
            (false, Some("missed"), Finding::Missed),
            (false, Some("agent_error"), Finding::Offline),
            (false, Some("agent_offline"), Finding::Offline),
            (false, Some("dns_error"), Finding::Failed),
            (false, Some("a word of a later version"), Finding::Failed),
            (false, None, Finding::Failed),
        ] {
            assert_eq!(Finding::of(&sample(is_valid, outcome)), finding, "{outcome:?}");
        }
    }

    #[test]
    fn sums_stop_at_their_maximum() {
        let mut rollup = Rollup::default();
        let sample = Sample {
            latency: Some(1e300),
            dns_seconds: Some(1e300),
            ..Sample::default()
        };
        for _ in 0..3 {
            rollup.add(&sample, Finding::Failed);
        }
        assert_eq!((rollup.failed, rollup.latency_us), (3, i64::MAX));
        assert_eq!(rollup.phases[0], i32::MAX);
        assert_eq!(rollup.outcomes["unknown"], 3);
        let mut sum = rollup.clone();
        sum.merge(&rollup);
        assert_eq!((sum.due(), sum.latency_us), (6, i64::MAX));
    }

    proptest! {
        #[test]
        fn a_stored_histogram_reads_back(entries in prop::collection::vec((0..64_u8, 1..1_000_000_u32), 0..20)) {
            let mut histogram = Histogram::default();
            for (bin, count) in entries {
                histogram.add(bin, count);
            }
            let number = histogram.to_number().unwrap_or_default();
            prop_assert_eq!(&Histogram::from_number(&number), &histogram);
            prop_assert_eq!(&Histogram::from_number(number.trim_start_matches('0')), &histogram);
        }

        #[test]
        fn a_histogram_edited_by_hand_causes_no_panic(text in "[-0-9.eNa]{0,600}") {
            Histogram::from_number(&text);
        }
    }
}
