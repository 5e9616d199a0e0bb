//! The counters of a run: what became of the ticks, how late checks begin, and where their time goes.
//!
//! The log, the demo and the metrics read them during the run.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use prometheus::{Histogram, HistogramOpts, HistogramVec};

use crate::check::observation::Phases;
use crate::http::health::{Heartbeat, Readiness};
use crate::http::metrics::CHECK_BUCKETS;
use crate::produce::publisher::Deliveries;
use crate::produce::schedule::{MissedCounts, MissedReason};
use crate::sample::Outcome;

/// Counts since the start of the run. Every due tick is a check under way, a result or a missed tick. Every result and every
/// missed tick becomes a record, which is on its way, delivered, refused, or left at the end.
#[derive(Debug, Default)]
pub struct Counters {
    pub ticks_due: AtomicU64,
    /// Results of checks, in the order of [`Outcome::ALL`].
    results: [AtomicU64; Outcome::ALL.len()],
    /// In the order of [`MissedReason::ALL`].
    missed: [AtomicU64; MissedReason::ALL.len()],
    pub deliveries: Arc<Deliveries>,
    /// Records that Kafka had not acknowledged when the run ended.
    pub left: AtomicU64,
    /// Hosts that are checked, checks under way and their threads, at the last turn of the timer loop.
    pub hosts: AtomicUsize,
    /// Whether the newest list of a source of hosts is not in use because of an error.
    pub host_list_has_error: Arc<AtomicBool>,
    pub under_way: AtomicUsize,
    pub threads: AtomicUsize,
    /// Of the timer loop.
    pub heartbeat: Heartbeat,
    /// With PRODUCE_GROUP: whether this producer is a member of the group, and no other program has partitions of it.
    pub membership: Arc<Readiness>,
    pub(super) late_by: Lateness,
    pub(super) spent: CheckTimes,
}

/// When a check began, and how long it took.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    pub late_micros: i64,
    pub took: Duration,
    pub phases: Phases,
}

impl Counters {
    pub fn results(&self, outcome: Outcome) -> u64 {
        self.results[outcome as usize].load(Ordering::Relaxed)
    }

    pub fn missed(&self, reason: MissedReason) -> u64 {
        self.missed[reason as usize].load(Ordering::Relaxed)
    }

    /// Records acknowledged by Kafka.
    pub fn delivered(&self) -> u64 {
        self.deliveries.delivered.load(Ordering::Relaxed)
    }

    /// Records that are not in Kafka: refused for good, or left at the end.
    pub fn lost(&self) -> u64 {
        self.deliveries.refused.load(Ordering::Relaxed) + self.left.load(Ordering::Relaxed)
    }

    /// `timing` is `None` if the check did not begin.
    pub(super) fn count_result(&self, outcome: Outcome, timing: Option<&Timing>) {
        self.results[outcome as usize].fetch_add(1, Ordering::Relaxed);
        if let Some(timing) = timing {
            self.late_by.count(timing.late_micros);
            self.spent.count(timing);
        }
    }

    pub(super) fn set_ticks(&self, due: u64, missed: &MissedCounts) {
        self.ticks_due.store(due, Ordering::Relaxed);
        for reason in MissedReason::ALL {
            self.missed[reason as usize].store(missed.count(reason), Ordering::Relaxed);
        }
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        Snapshot {
            ticks_due: self.ticks_due.load(Ordering::Relaxed),
            results: Outcome::ALL.map(|outcome| self.results(outcome)),
            missed: MissedReason::ALL.map(|reason| self.missed(reason)),
            delivered: self.delivered(),
            lost: self.lost(),
            late_by: self.late_by.classes(),
        }
    }
}

/// The counters at one moment.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    ticks_due: u64,
    results: [u64; Outcome::ALL.len()],
    missed: [u64; MissedReason::ALL.len()],
    delivered: u64,
    lost: u64,
    late_by: [u64; LATENESS_CLASSES],
}

impl Snapshot {
    /// What happened since an earlier moment, as `name=value` words without zeros.
    pub(super) fn since(&self, earlier: &Self) -> String {
        let mut words = format!("ticks={}", self.ticks_due - earlier.ticks_due);
        let mut say = |name: &str, now: u64, before: u64| {
            if now > before {
                // Writing to a string cannot fail.
                let _ = write!(words, " {name}={}", now - before);
            }
        };
        for outcome in Outcome::ALL {
            let at = outcome as usize;
            say(outcome.as_str(), self.results[at], earlier.results[at]);
        }
        for reason in MissedReason::ALL {
            let at = reason as usize;
            let name = format!("missed_{}", reason.as_word());
            say(&name, self.missed[at], earlier.missed[at]);
        }
        say("delivered", self.delivered, earlier.delivered);
        say("lost", self.lost, earlier.lost);
        let late_by = std::array::from_fn(|i| self.late_by[i] - earlier.late_by[i]);
        if let (Some(p50), Some(p99)) = (quantile_ms(&late_by, 0.5), quantile_ms(&late_by, 0.99)) {
            let _ = write!(words, " late_p50_ms={p50} late_p99_ms={p99}");
        }
        words
    }
}

/// Class i counts checks that began at most 2^i microseconds late, without those of the classes before it. The last class
/// counts the rest, which began more than half a minute late.
pub(super) const LATENESS_CLASSES: usize = 26;

#[derive(Debug, Default)]
pub(super) struct Lateness {
    classes: [AtomicU64; LATENESS_CLASSES],
    sum_micros: AtomicU64,
}

impl Lateness {
    pub(super) fn classes(&self) -> [u64; LATENESS_CLASSES] {
        std::array::from_fn(|class| self.classes[class].load(Ordering::Relaxed))
    }

    pub(super) fn sum_seconds(&self) -> f64 {
        self.sum_micros.load(Ordering::Relaxed) as f64 / 1e6
    }

    fn count(&self, micros: i64) {
        let micros = u64::try_from(micros).unwrap_or(0);
        let class = micros
            .max(1)
            .checked_next_power_of_two()
            .map_or(LATENESS_CLASSES, |power| power.trailing_zeros() as usize);
        self.classes[class.min(LATENESS_CLASSES - 1)].fetch_add(1, Ordering::Relaxed);
        self.sum_micros.fetch_add(micros, Ordering::Relaxed);
    }
}

/// Where the time of checks goes.
#[derive(Debug)]
pub(super) struct CheckTimes {
    pub(super) durations: Histogram,
    pub(super) phases: HistogramVec,
    /// The histograms of `phases`, in the order of [`CheckTimes::PHASES`].
    of_phase: [Histogram; 5],
}

impl CheckTimes {
    const PHASES: [&str; 5] = ["dns", "connect", "tls", "ttfb", "body"];

    fn count(&self, timing: &Timing) {
        self.durations.observe(timing.took.as_secs_f64());
        let Phases {
            dns,
            connect,
            tls,
            ttfb,
            body,
        } = timing.phases;
        for (histogram, spent) in self.of_phase.iter().zip([dns, connect, tls, ttfb, body]) {
            if let Some(spent) = spent {
                histogram.observe(spent.as_secs_f64());
            }
        }
    }
}

impl Default for CheckTimes {
    fn default() -> Self {
        const SOUND: &str = "the name is legal and the buckets ascend";
        let options = |name, help| HistogramOpts::new(name, help).buckets(CHECK_BUCKETS.to_vec());
        let durations = Histogram::with_opts(options(
            "host_metrics_check_duration_seconds",
            "From the start of a check to its end, for every outcome.",
        ));
        let phases = HistogramVec::new(
            options(
                "host_metrics_check_phase_seconds",
                "The time that checks spent in each phase that they reached.",
            ),
            &["phase"],
        )
        .expect(SOUND);
        Self {
            durations: durations.expect(SOUND),
            of_phase: Self::PHASES.map(|phase| phases.with_label_values(&[phase])),
            phases,
        }
    }
}

/// The upper end of the class that contains the quantile. `None` if nothing was counted.
fn quantile_ms(classes: &[u64; LATENESS_CLASSES], share: f64) -> Option<f64> {
    let all: u64 = classes.iter().sum();
    let rank = (all as f64 * share).ceil().max(1.0) as u64;
    let mut seen = 0;
    let class = classes.iter().position(|count| {
        seen += count;
        seen >= rank
    })?;
    Some(f64::from(1_u32 << class) / 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_and_reason_has_its_own_place() {
        for (at, outcome) in Outcome::ALL.into_iter().enumerate() {
            assert_eq!(outcome as usize, at);
        }
        for (at, reason) in MissedReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, at);
        }
    }

    #[test]
    fn a_summary_counts_only_what_happened_since_the_last_one() {
        let counters = Counters::default();
        counters.count_result(Outcome::Ok, Some(&timing(90)));
        let before = counters.snapshot();
        for late_micros in [40, 60, 70, 100, 3_000] {
            counters.count_result(Outcome::ConnectRefused, Some(&timing(late_micros)));
        }
        counters.count_result(Outcome::AgentError, None);
        counters.ticks_due.store(7, Ordering::Relaxed);
        counters.deliveries.delivered.store(6, Ordering::Relaxed);
        counters.left.store(1, Ordering::Relaxed);
        assert_eq!(
            counters.snapshot().since(&before),
            "ticks=7 connect_refused=5 agent_error=1 delivered=6 lost=1 late_p50_ms=0.128 late_p99_ms=4.096"
        );
        let now = counters.snapshot();
        assert_eq!(now.since(&now), "ticks=0");
    }

    fn timing(late_micros: i64) -> Timing {
        Timing {
            late_micros,
            took: Duration::from_millis(30),
            phases: Phases {
                dns: None,
                connect: Some(Duration::from_millis(4)),
                ..Phases::default()
            },
        }
    }

    #[test]
    fn time_is_counted_for_the_phases_that_were_reached() {
        let counters = Counters::default();
        counters.count_result(Outcome::Ok, Some(&timing(5)));
        counters.count_result(Outcome::AgentError, None);
        let of = |name: &str| {
            let at = CheckTimes::PHASES
                .iter()
                .position(|phase| *phase == name)
                .unwrap();
            let histogram = &counters.spent.of_phase[at];
            (histogram.get_sample_count(), histogram.get_sample_sum())
        };
        assert_eq!(of("connect"), (1, 0.004));
        assert_eq!(of("dns"), (0, 0.0));
        assert_eq!(counters.spent.durations.get_sample_count(), 1);
        assert_eq!(counters.late_by.sum_seconds(), 0.000_005);
    }

    #[test]
    fn lateness_of_any_size_has_a_class() {
        let late = Lateness::default();
        [i64::MIN, 0, 1, i64::MAX]
            .into_iter()
            .for_each(|micros| late.count(micros));
        assert_eq!(late.classes()[0], 3);
        assert_eq!(late.classes()[LATENESS_CLASSES - 1], 1);
        assert_eq!(quantile_ms(&[0; LATENESS_CLASSES], 0.5), None);
    }
}
