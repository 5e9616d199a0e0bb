//! The counters of a run: what became of the ticks, how late checks begin, and where their time goes.
//!
//! The log, the demo and the metrics read them during the run.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use prometheus::{Histogram, HistogramOpts, HistogramVec, exponential_buckets};

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
    pub(super) times: CheckTimes,
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
            self.times.count(timing);
        }
    }

    pub(super) fn set_ticks(&self, due: u64, missed: &MissedCounts) {
        self.ticks_due.store(due, Ordering::Relaxed);
        for reason in MissedReason::ALL {
            self.missed[reason as usize].store(missed.count(reason), Ordering::Relaxed);
        }
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let mut counts = vec![("ticks".to_owned(), self.ticks_due.load(Ordering::Relaxed))];
        counts.extend(Outcome::ALL.map(|outcome| (outcome.as_str().to_owned(), self.results(outcome))));
        let name = |reason: MissedReason| format!("missed_{}", reason.as_word());
        counts.extend(MissedReason::ALL.map(|reason| (name(reason), self.missed(reason))));
        counts.push(("delivered".to_owned(), self.delivered()));
        counts.push(("lost".to_owned(), self.lost()));
        Snapshot(counts)
    }
}

/// The counters at one moment, with their names in the log.
#[derive(Clone, Debug)]
pub(super) struct Snapshot(Vec<(String, u64)>);

impl Snapshot {
    /// What happened since an earlier moment, as `name=value` words. Zeros are left out, except that of the ticks.
    pub(super) fn since(&self, earlier: &Self) -> String {
        let counts = self.0.iter().zip(&earlier.0);
        let words: Vec<String> = counts
            .filter(|((name, now), (_, before))| now > before || name == "ticks")
            .map(|((name, now), (_, before))| format!("{name}={}", now - before))
            .collect();
        words.join(" ")
    }
}

/// How late checks begin, and where their time goes.
#[derive(Debug)]
pub(super) struct CheckTimes {
    pub(super) late_by: Histogram,
    pub(super) durations: Histogram,
    pub(super) phases: HistogramVec,
    /// The histograms of `phases`, in the order of [`CheckTimes::PHASES`].
    of_phase: [Histogram; 5],
}

impl CheckTimes {
    const PHASES: [&str; 5] = ["dns", "connect", "tls", "ttfb", "body"];

    fn count(&self, timing: &Timing) {
        self.late_by.observe(timing.late_micros.max(0) as f64 / 1e6);
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
        // Up to 8.4 s.
        let late_buckets = exponential_buckets(128e-6, 4.0, 9).expect(SOUND);
        let late_by = options(
            "host_metrics_check_late_seconds",
            "The time from a tick to the start of its check.",
        );
        let durations = options(
            "host_metrics_check_duration_seconds",
            "From the start of a check to its end, for every outcome.",
        );
        let phases = HistogramVec::new(
            options(
                "host_metrics_check_phase_seconds",
                "The time that checks spent in each phase that they reached.",
            ),
            &["phase"],
        )
        .expect(SOUND);
        Self {
            late_by: Histogram::with_opts(late_by.buckets(late_buckets)).expect(SOUND),
            durations: Histogram::with_opts(durations).expect(SOUND),
            of_phase: Self::PHASES.map(|phase| phases.with_label_values(&[phase])),
            phases,
        }
    }
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
            "ticks=7 connect_refused=5 agent_error=1 delivered=6 lost=1"
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
            let histogram = &counters.times.of_phase[at];
            (histogram.get_sample_count(), histogram.get_sample_sum())
        };
        assert_eq!(of("connect"), (1, 0.004));
        assert_eq!(of("dns"), (0, 0.0));
        assert_eq!(counters.times.durations.get_sample_count(), 1);
        assert_eq!(counters.times.late_by.get_sample_sum(), 0.000_005);
    }
}
