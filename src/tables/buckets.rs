//! How the state's buckets are stored: their widths, the number of a series, and the histogram of the latencies. Pure.

use tokio_postgres::types::{FromSql, Type};

use crate::hash::fnv1a;

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

/// SQL for the number of latencies in a stored histogram. A bin is a digit of a number to the base 10^8, and the remainder by
/// 10^8 - 1 is the sum of the digits.
pub fn count_of(histogram: &str) -> String {
    format!("{histogram} % {MAX_COUNT}")
}

/// The number of a series: the FNV-1a hash of both names.
///
/// The database does not assign it, so a replay gives the same numbers, and no round trip is needed. The probability that two of a
/// million series have the same number is 3 in 100 million.
pub fn series_id(address: &str, agent: &str) -> i64 {
    fnv1a(address.bytes().chain([0]).chain(agent.bytes())).cast_signed()
}

/// The bin of a latency: the first one whose upper bound is at least that.
pub fn bin_of(micros: i64) -> u8 {
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
    pub fn add(&mut self, bin: u8, count: u32) {
        match self.0.binary_search_by_key(&bin, |(bin, _)| *bin) {
            Ok(at) => self.0[at].1 = self.0[at].1.saturating_add(count),
            Err(at) => self.0.insert(at, (bin, count)),
        }
    }

    pub fn merge(&mut self, other: &Self) {
        for &(bin, count) in &other.0 {
            self.add(bin, count);
        }
    }

    /// How many latencies there are.
    pub fn count(&self) -> u64 {
        self.0.iter().map(|(_, count)| u64::from(*count)).sum()
    }

    /// The latency in seconds that this share of all latencies does not exceed: the middle of its bin, as in the view
    /// `_latency`. `None` if there is no latency.
    pub fn percentile(&self, share: f64) -> Option<f64> {
        let rank = (share * self.count() as f64).ceil() as u64;
        let mut running = 0;
        let (bin, _) = self.0.iter().find(|(_, count)| {
            running += u64::from(*count);
            running >= rank
        })?;
        Some(FIRST_BIN_MICROS / 1e6 * BIN_RATIO.powf(f64::from(*bin) - 0.5))
    }

    /// The stored form: one number, with [`BIN_DIGITS`] decimal digits for each bin, the last ones for bin 0. Postgres adds
    /// histograms by adding these numbers, and does not store the empty bins at either end. `None` if all bins are empty.
    ///
    /// The bytes are those of a `numeric` (PostgreSQL's numeric.c, `numeric_send`): the number of digits to the base of 10,000, the
    /// weight of the first one, sign and scale, then the digits; two for each bin.
    pub fn to_numeric(&self) -> Option<Vec<u8>> {
        let (highest, _) = self.0.last()?;
        let digits = 2 * (i16::from(*highest) + 1);
        let mut numeric: Vec<u8> = [digits, digits - 1, 0, 0].map(i16::to_be_bytes).concat();
        let mut bins = self.0.iter().rev().peekable();
        for bin in (0..=*highest).rev() {
            let count = bins
                .next_if(|(next, _)| *next == bin)
                .map_or(0, |(_, count)| *count);
            let count = count.min(MAX_COUNT);
            for digit in [count / NUMERIC_BASE, count % NUMERIC_BASE] {
                numeric.extend((digit as i16).to_be_bytes());
            }
        }
        Some(numeric)
    }

    /// Reads the stored form. Anything else in the column counts as empty.
    pub fn from_numeric(numeric: &[u8]) -> Self {
        let (numbers, _) = numeric.as_chunks();
        let numbers: Vec<i16> = numbers.iter().map(|number| i16::from_be_bytes(*number)).collect();
        let mut histogram = Self::default();
        let [_, weight, 0, 0, digits @ ..] = &numbers[..] else {
            return histogram;
        };
        for (position, digit) in (0..=*weight).rev().zip(digits) {
            let bin = u8::try_from(position / 2).unwrap_or(u8::MAX);
            let count = u32::try_from(*digit).unwrap_or(0);
            let count = if position % 2 == 1 {
                count * NUMERIC_BASE
            } else {
                count
            };
            if count > 0 && usize::from(bin) < BINS {
                histogram.add(bin, count);
            }
        }
        histogram
    }
}

impl<'a> FromSql<'a> for Histogram {
    fn from_sql(_: &Type, numeric: &'a [u8]) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Self::from_numeric(numeric))
    }

    fn accepts(of: &Type) -> bool {
        *of == Type::NUMERIC
    }
}

/// The base of the digits of a `numeric`.
const NUMERIC_BASE: u32 = 10_000;

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
    fn a_histogram_is_stored_as_one_number() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.to_numeric(), None);
        histogram.add(3, 2);
        histogram.add(1, 86_400);
        // 2 00000000 00086400 00000000.
        let numeric = |numbers: &[i16]| {
            numbers
                .iter()
                .flat_map(|number| number.to_be_bytes())
                .collect::<Vec<_>>()
        };
        let stored = numeric(&[8, 7, 0, 0, 0, 2, 0, 0, 8, 6_400, 0, 0]);
        assert_eq!(histogram.to_numeric(), Some(stored));
        // Postgres returns it without zeros at either end.
        assert_eq!(
            Histogram::from_numeric(&numeric(&[5, 6, 0, 0, 2, 0, 0, 8, 6_400])),
            histogram
        );
        for other in [
            &[1, 0, 0x4000, 0, 7][..],
            &[1, -1, 0, 4, 7],
            &[0, 0, -16_384, 0],
            &[1, 0],
        ] {
            assert_eq!(
                Histogram::from_numeric(&numeric(other)),
                Histogram::default(),
                "{other:?}"
            );
        }
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

    proptest! {
        #[test]
        fn a_stored_histogram_reads_back(entries in prop::collection::vec((0..64_u8, 1..1_000_000_u32), 0..20)) {
            let mut histogram = Histogram::default();
            for (bin, count) in entries {
                histogram.add(bin, count);
            }
            let numeric = histogram.to_numeric().unwrap_or_default();
            prop_assert_eq!(Histogram::from_numeric(&numeric), histogram);
        }

        #[test]
        fn no_bytes_in_the_column_are_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            Histogram::from_numeric(&bytes);
        }
    }
}
