//! Which ticks of each series (a host at a place) have a row: once, twice or not at all.
//!
//! Pure. Postgres groups the rows of a series by grid and into blocks of [`BLOCK`] ticks. A *grid* is an interval and a phase
//! (the remainder of its ticks' times); it is taken from the rows, so the records of every producer can be audited. From the
//! blocks follow *runs*, ticks without a gap on one grid, and from the runs what is missing between them.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::commands::audit::offsets::BLOCK;

/// A host was not in the host list if it has no tick for this time and this many intervals, while its place checks other hosts.
const AWAY_MICROS: i64 = 3_600_000_000;
const AWAY_TICKS: i64 = 10;

/// A host that has had no tick for more than [`AWAY_TICKS`] intervals and more than this time, although its place has later ones, is
/// reported. It may have left the host list, nobody may check it, or its rows are not stored yet. Taking a host over from another
/// producer takes less.
const ENDED_MICROS: i64 = 60_000_000;

/// More gaps than this are counted, but not examined one by one, to bound the memory. Ten are shown.
const MAX_GAPS: usize = 100_000;

/// Rows of [`BLOCK`] successive ticks of a grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Block {
    pub interval: i64,
    pub phase: i64,
    /// The first tick's time divided by [`BLOCK`] intervals.
    pub number: i64,
    /// A bit for each tick that has a row.
    pub ticks: u64,
    /// More than there are bits if a tick has two rows.
    pub rows: i64,
}

impl Block {
    fn at(&self, bit: i64) -> i64 {
        (self.number.saturating_mul(BLOCK) + bit).saturating_mul(self.interval) + self.phase
    }
}

/// Times are in microseconds since the Unix epoch, here and below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Series {
    pub address: String,
    pub place: String,
}

/// Ticks without a row between two that have one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Gap {
    pub series: usize,
    /// The ticks around the gap.
    pub from: i64,
    pub to: i64,
    /// The number of missing ticks, or the least possible one if the interval was changed meanwhile.
    pub ticks: i64,
}

impl Gap {
    /// The time between the missing ticks.
    fn step(&self) -> i64 {
        ((self.to - self.from) / (self.ticks + 1)).max(1)
    }

    /// How many of the missing ticks lie within the time, its ends excluded.
    fn ticks_within(&self, time: &Range<i64>) -> i64 {
        let step = self.step();
        let first = (time.start - self.from).div_euclid(step) + 1;
        let end = (time.end - self.from - 1).div_euclid(step);
        (end.min(self.ticks) - first.max(1) + 1).max(0)
    }

    pub(super) fn first_tick(&self) -> i64 {
        self.from + self.step()
    }
}

/// A time in which no host of a place has a tick.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Silence {
    pub place: String,
    pub time: Range<i64>,
    pub hosts: i64,
    pub ticks: i64,
    /// One of the gaps in it.
    pub example: Gap,
}

/// Rows of one series that repeat a tick.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Doubled {
    pub series: usize,
    /// The block's first and last tick.
    pub within: (i64, i64),
    pub rows: i64,
}

/// What was found, in the order of the series.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Findings {
    pub ticks: i64,
    /// Ticks that belong to no grid of their series: first checks after a start, and `--once`.
    pub off_grid: i64,
    pub silences: Vec<Silence>,
    pub gaps: Vec<Gap>,
    /// Gaps of hosts that were not in the host list.
    pub away: Vec<Gap>,
    pub more_gaps: usize,
    /// Series that end earlier than their place, and their last ticks.
    pub ended: Vec<(usize, i64)>,
    pub doubled: Vec<Doubled>,
    /// Series that are checked on two grids at once, and when.
    pub two_grids: Vec<(usize, i64)>,
}

/// Ticks of one grid, an interval apart.
#[derive(Clone, Copy, Debug)]
struct Run {
    interval: i64,
    phase: i64,
    first: i64,
    last: i64,
}

/// The rows of all series, one series after the other.
#[derive(Default)]
pub(super) struct Ticks {
    pub series: Vec<Series>,
    blocks: Vec<Block>,
    findings: Findings,
    /// The last run of each series.
    ends: Vec<Run>,
    /// When each place has ticks: the runs of all its hosts.
    places: BTreeMap<String, Vec<(i64, i64)>>,
}

impl Ticks {
    /// Takes the blocks of a series in any order; those of the next series follow.
    pub(super) fn take(&mut self, address: &str, place: &str, block: Block) {
        let is_same = |series: &Series| series.address == address && series.place == place;
        if !self.series.last().is_some_and(is_same) {
            self.end_series();
            self.series.push(Series {
                address: address.to_owned(),
                place: place.to_owned(),
            });
        }
        self.blocks.push(block);
    }

    pub(super) fn finish(mut self) -> (Vec<Series>, Findings) {
        self.end_series();
        self.find_ended();
        self.explain_gaps();
        (self.series, self.findings)
    }

    fn end_series(&mut self) {
        let Some(series) = self.series.len().checked_sub(1) else {
            return;
        };
        let mut blocks = std::mem::take(&mut self.blocks);
        blocks.sort_unstable_by_key(|block| (block.interval, block.phase, block.number));
        for block in &blocks {
            let ticks = i64::from(block.ticks.count_ones());
            self.findings.ticks += ticks;
            if block.rows > ticks {
                self.findings.doubled.push(Doubled {
                    series,
                    within: (block.at(0), block.at(BLOCK - 1)),
                    rows: block.rows - ticks,
                });
            }
        }
        let mut runs = runs(&blocks);
        let place = self.places.entry(self.series[series].place.clone()).or_default();
        place.extend(runs.iter().map(|run| (run.first, run.last)));
        self.ends.extend(runs.iter().copied().max_by_key(|run| run.last));
        self.findings.off_grid += drop_single_ticks(&mut runs);
        runs.sort_unstable_by_key(|run| (run.first, run.last));
        for pair in runs.windows(2) {
            self.compare(series, pair[0], pair[1]);
        }
        // Its memory is used again.
        blocks.clear();
        self.blocks = blocks;
    }

    fn compare(&mut self, series: usize, before: Run, after: Run) {
        let is_same = (before.interval, before.phase) == (after.interval, after.phase);
        let apart = after.first - before.last;
        let longest = before.interval.max(after.interval);
        let ticks = match is_same {
            true => apart / longest - 1,
            false if apart <= 0 => {
                self.findings.two_grids.push((series, after.first));
                return;
            }
            // The grid changed before the next tick of the old one, and the first tick of the new one followed within its
            // interval.
            false if apart < before.interval + after.interval => return,
            false => (apart / longest - 1).max(1),
        };
        if self.findings.gaps.len() >= MAX_GAPS {
            self.findings.more_gaps += 1;
            return;
        }
        self.findings.gaps.push(Gap {
            series,
            from: before.last,
            to: after.first,
            ticks,
        });
    }

    fn find_ended(&mut self) {
        let newest: BTreeMap<&str, i64> = self
            .places
            .iter()
            .filter_map(|(place, runs)| Some((place.as_str(), runs.iter().map(|(_, last)| *last).max()?)))
            .collect();
        // Each series has a block, and so a run.
        for (series, end) in self.ends.iter().enumerate() {
            let longest = (AWAY_TICKS * end.interval).max(ENDED_MICROS);
            let newest = newest.get(self.series[series].place.as_str());
            if newest.is_some_and(|newest| newest - end.last > longest) {
                self.findings.ended.push((series, end.last));
            }
        }
    }

    /// Separates the gaps in which the whole place was silent, and those of hosts that were away, from the others.
    fn explain_gaps(&mut self) {
        let mut silences: BTreeMap<String, Vec<Silence>> = BTreeMap::new();
        for (place, runs) in &mut self.places {
            runs.sort_unstable();
            let mut until = i64::MAX;
            let mut times = Vec::new();
            for (first, last) in runs.iter().copied() {
                if first > until {
                    times.push(until..first);
                }
                until = if until == i64::MAX { last } else { until.max(last) };
            }
            let silence = |time| Silence {
                place: place.clone(),
                time,
                hosts: 0,
                ticks: 0,
                example: Gap {
                    series: 0,
                    from: 0,
                    to: 0,
                    ticks: 0,
                },
            };
            silences.insert(place.clone(), times.into_iter().map(silence).collect());
        }
        for gap in std::mem::take(&mut self.findings.gaps) {
            let place = &self.series[gap.series].place;
            let of_place = silences.get_mut(place).map(Vec::as_mut_slice).unwrap_or_default();
            let begin = of_place.partition_point(|silence| silence.time.end <= gap.from);
            let mut left = gap.ticks;
            for silence in of_place[begin..]
                .iter_mut()
                .take_while(|silence| silence.time.start < gap.to)
            {
                let ticks = gap.ticks_within(&silence.time);
                if ticks > 0 {
                    left -= ticks;
                    silence.ticks += ticks;
                    silence.hosts += 1;
                    silence.example = gap.clone();
                }
            }
            if left == gap.ticks && left >= AWAY_TICKS && gap.to - gap.from >= AWAY_MICROS {
                self.findings.away.push(gap);
            } else if left > 0 {
                self.findings.gaps.push(Gap { ticks: left, ..gap });
            }
        }
        for silence in silences.into_values().flatten() {
            match silence.hosts {
                0 => {}
                1 => self.findings.gaps.push(silence.example),
                _ => self.findings.silences.push(silence),
            }
        }
        self.findings.gaps.sort_by_key(|gap| (gap.from, gap.series));
    }
}

/// The runs of sorted blocks.
fn runs(blocks: &[Block]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for block in blocks {
        let mut rest = block.ticks;
        let mut bit = 0;
        while rest != 0 {
            bit += i64::from(rest.trailing_zeros());
            rest >>= rest.trailing_zeros();
            let length = i64::from(rest.trailing_ones());
            rest = rest.checked_shr(rest.trailing_ones()).unwrap_or(0);
            let (first, last) = (block.at(bit), block.at(bit + length - 1));
            bit += length;
            match runs.last_mut() {
                Some(run)
                    if (run.interval, run.phase) == (block.interval, block.phase)
                        && run.last.saturating_add(run.interval) == first =>
                {
                    run.last = last;
                }
                _ => runs.push(Run {
                    interval: block.interval,
                    phase: block.phase,
                    first,
                    last,
                }),
            }
        }
    }
    runs
}

/// Removes the runs of grids that have a single tick, if there are other runs, and returns how many those are. A host with a long
/// interval is checked once soon after the start, wherever its grid lies.
fn drop_single_ticks(runs: &mut Vec<Run>) -> i64 {
    let mut of_grid = BTreeMap::<(i64, i64), usize>::new();
    for run in runs.iter() {
        let ticks = if run.first == run.last { 1 } else { 2 };
        *of_grid.entry((run.interval, run.phase)).or_default() += ticks;
    }
    let before = runs.len();
    runs.retain(|run| of_grid[&(run.interval, run.phase)] > 1);
    i64::try_from(before - runs.len()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000;
    const HOUR: i64 = 3_600 * SECOND;
    const START: i64 = 1_790_000_000 * SECOND;

    /// As Postgres groups them: (address, place, interval, times).
    fn audit(series: &[(&str, &str, i64, Vec<i64>)]) -> (Vec<Series>, Findings) {
        let mut blocks = BTreeMap::<(&str, &str, i64, i64, i64), (u64, i64)>::new();
        for (address, place, interval, times) in series {
            for time in times {
                let (number, phase) = (time / interval, time % interval);
                let key = (*address, *place, *interval, phase, number / BLOCK);
                let (ticks, rows) = blocks.entry(key).or_default();
                *ticks |= 1 << (number % BLOCK);
                *rows += 1;
            }
        }
        let mut ticks = Ticks::default();
        for ((address, place, interval, phase, number), (bits, rows)) in blocks {
            ticks.take(
                address,
                place,
                Block {
                    interval,
                    phase,
                    number,
                    ticks: bits,
                    rows,
                },
            );
        }
        ticks.finish()
    }

    /// `count` ticks from `from` on.
    fn every(interval: i64, from: i64, count: i64) -> Vec<i64> {
        (0..count).map(|number| from + number * interval).collect()
    }

    fn without(times: &[i64], hole: Range<i64>) -> Vec<i64> {
        times
            .iter()
            .copied()
            .filter(|time| !hole.contains(time))
            .collect()
    }

    fn is_whole(findings: &Findings) -> bool {
        let Findings {
            silences,
            gaps,
            doubled,
            two_grids,
            more_gaps: 0,
            ..
        } = findings
        else {
            return false;
        };
        silences.is_empty() && gaps.is_empty() && doubled.is_empty() && two_grids.is_empty()
    }

    #[test]
    fn a_series_without_a_gap_is_whole_on_any_grid_and_in_any_place() {
        let (series, found) = audit(&[
            ("a", "eu", 30 * SECOND, every(30 * SECOND, START + 7, 1_000)),
            (
                "a",
                "us",
                30 * SECOND,
                every(30 * SECOND, START + 11 * SECOND, 10),
            ),
            ("b", "", 1_500_000, every(1_500_000, START, 200)),
        ]);
        assert_eq!(series.len(), 3);
        assert!(is_whole(&found), "{found:?}");
        assert_eq!((found.ticks, found.off_grid), (1_210, 0));
    }

    #[test]
    fn a_missing_and_a_doubled_tick_are_found_where_they_are() {
        let whole = every(SECOND, START, 500);
        let missing = without(&whole, START + 123 * SECOND..START + 125 * SECOND);
        let mut doubled = whole.clone();
        doubled.push(START + 77 * SECOND);
        let (_, found) = audit(&[("a", "eu", SECOND, missing), ("b", "eu", SECOND, doubled)]);
        assert_eq!(
            found.gaps,
            [Gap {
                series: 0,
                from: START + 122 * SECOND,
                to: START + 125 * SECOND,
                ticks: 2
            }]
        );
        assert_eq!(found.gaps[0].first_tick(), START + 123 * SECOND);
        let [doubled] = found.doubled.as_slice() else {
            panic!("{found:?}")
        };
        assert_eq!((doubled.series, doubled.rows), (1, 1));
        assert!(doubled.within.0 <= START + 77 * SECOND && START + 77 * SECOND <= doubled.within.1);
    }

    #[test]
    fn a_changed_interval_begins_a_new_grid_and_may_not_skip_a_tick() {
        let old = every(30 * SECOND, START, 100);
        let last = START + 99 * 30 * SECOND;
        for (first, ticks) in [(1, 0), (59, 0), (89, 0), (90, 1), (200, 2)] {
            let new = every(60 * SECOND, last + first * SECOND, 50);
            let (_, found) = audit(&[
                ("a", "eu", 30 * SECOND, old.clone()),
                ("a", "eu", 60 * SECOND, new),
                // The place is never silent.
                ("b", "eu", SECOND, every(SECOND, START, 10_000)),
            ]);
            let missing: i64 = found.gaps.iter().map(|gap| gap.ticks).sum();
            assert_eq!(missing, ticks, "{first}");
        }
        let (_, found) = audit(&[
            ("a", "eu", 30 * SECOND, old),
            ("a", "eu", 60 * SECOND, every(60 * SECOND, last - 5 * SECOND, 50)),
        ]);
        assert_eq!(found.two_grids, [(0, last - 5 * SECOND)]);
    }

    #[test]
    fn the_first_check_after_a_start_is_not_a_tick_of_the_grid() {
        let mut times = every(300 * SECOND, START, 20);
        times.extend([START - 200 * SECOND, START + 1_234_567]);
        let (_, found) = audit(&[("a", "eu", 300 * SECOND, times)]);
        assert!(is_whole(&found), "{found:?}");
        assert_eq!(found.off_grid, 2);
        let (_, found) = audit(&[("a", "eu", 300 * SECOND, vec![START])]);
        assert!(is_whole(&found));
    }

    #[test]
    fn a_time_without_any_check_is_reported_once_for_all_hosts() {
        let hole = START + 100 * SECOND + 1..START + 160 * SECOND;
        let hosts: Vec<_> = (0..5)
            .map(|host| {
                let times = every(SECOND, START + host * 1_000, 300);
                (
                    "abcde".get(host as usize..=host as usize).unwrap(),
                    "eu",
                    SECOND,
                    without(&times, hole.clone()),
                )
            })
            .collect();
        let (_, found) = audit(&hosts);
        assert_eq!(found.gaps, []);
        let [silence] = found.silences.as_slice() else {
            panic!("{found:?}")
        };
        assert_eq!((silence.hosts, silence.ticks), (5, 5 * 60 - 1));

        // The only host of a place is named.
        let (_, found) = audit(&hosts[..1]);
        assert_eq!((found.silences.len(), found.gaps.len()), (0, 1));
    }

    #[test]
    fn a_host_that_ends_before_its_place_is_reported_and_is_no_violation() {
        let host =
            |address, place, interval, ticks| (address, place, interval, every(interval, START, ticks));
        let (_, found) = audit(&[
            host("a", "eu", SECOND, 1_000),
            // A minute may be the batch that is not stored yet, or a takeover.
            host("b", "eu", SECOND, 1_000 - 60),
            host("c", "eu", SECOND, 1_000 - 61),
            host("d", "eu", 60 * SECOND, 8),
            host("e", "eu", 60 * SECOND, 7),
            // A single check after a start is a last one too.
            host("f", "eu", 60 * SECOND, 1),
            // The only host of a place.
            host("a", "us", SECOND, 10),
        ]);
        assert!(is_whole(&found), "{found:?}");
        let ended = |series: usize, after: i64| (series, START + after * SECOND);
        assert_eq!(found.ended, [ended(3, 938), ended(5, 360), ended(6, 0)]);
    }

    #[test]
    fn a_host_that_was_not_in_the_list_for_a_while_misses_no_tick() {
        let other = ("b", "eu", SECOND, every(SECOND, START, 20_000));
        let host = |away: i64| {
            let times = every(30 * SECOND, START, 600);
            (
                "a",
                "eu",
                30 * SECOND,
                without(&times, START + SECOND..START + away),
            )
        };
        let (_, found) = audit(&[host(2 * HOUR), other.clone()]);
        assert!(is_whole(&found), "{found:?}");
        assert_eq!(found.away.len(), 1);
        // A shorter gap than an hour is a gap.
        let (_, found) = audit(&[host(HOUR / 2), other.clone()]);
        assert_eq!((found.away.len(), found.gaps.len()), (0, 1));
        // So is one in which the place checked nothing.
        let elsewhere = ("b", "us", SECOND, every(SECOND, START, 20_000));
        let (_, found) = audit(&[host(2 * HOUR), elsewhere]);
        assert_eq!((found.away.len(), found.gaps.len()), (0, 1));
        // So is a single missing tick of a host that is checked once a day.
        let daily = every(24 * HOUR, START, 9);
        let hole = START + 4 * 24 * HOUR..START + 4 * 24 * HOUR + 1;
        let (_, found) = audit(&[
            ("a", "eu", 24 * HOUR, without(&daily, hole)),
            ("b", "eu", HOUR, every(HOUR, START, 300)),
        ]);
        assert_eq!((found.away.len(), found.gaps.len()), (0, 1));
    }
}
