//! The metrics of `produce` at METRICS_ADDR: their names and help texts.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::http::Monitored;
use crate::http::metrics::{Labels, Metrics};
use crate::produce::counters::Counters;
use crate::produce::schedule::MissedReason;
use crate::sample::Outcome;

/// The counters of a run, and its limits.
pub(super) struct Figures {
    pub counters: Arc<Counters>,
    /// PRODUCE_GROUP is set.
    pub has_group: bool,
    /// The most checks under way, MAX_THREADS.
    pub max_threads: usize,
    /// The most records that the buffer holds.
    pub max_records: usize,
}

impl Monitored for Figures {
    fn metrics(&self) -> Metrics {
        let mut metrics = Metrics::default();
        metrics.of_the_process();
        let counters = &*self.counters;
        let ready = f64::from(u8::from(self.is_ready().is_ok()));
        metrics.gauge(
            "host_metrics_ready",
            "1 while Kafka accepts records and, with PRODUCE_GROUP, this producer is a member of the group and no other program has \
             partitions of it, else 0.",
            ready,
        );
        self.ticks_and_checks(&mut metrics);
        metrics.collect(&counters.times.durations);
        metrics.collect(&counters.times.phases);
        metrics.collect(&counters.times.late_by);
        self.records(&mut metrics);
        metrics
    }

    fn is_alive(&self) -> Result<(), String> {
        self.counters.heartbeat.check("the timer loop")?;
        self.counters.deliveries.heartbeat.check("the publisher's loop")
    }

    fn is_ready(&self) -> Result<(), String> {
        self.counters.deliveries.readiness.check()?;
        match self.has_group {
            true => self.counters.membership.check(),
            false => Ok(()),
        }
    }
}

impl Figures {
    fn ticks_and_checks(&self, metrics: &mut Metrics) {
        let counters = &*self.counters;
        let gauge = |value: usize| value as f64;
        metrics.gauge(
            "host_metrics_hosts",
            "Hosts that are checked.",
            gauge(counters.hosts.load(Ordering::Relaxed)),
        );
        metrics.gauge(
            "host_metrics_host_list_current",
            "1 while the newest version of the host file or table is in use, 0 if that version has an error or cannot be read.",
            f64::from(u8::from(!counters.host_list_has_error.load(Ordering::Relaxed))),
        );
        metrics.counter(
            "host_metrics_ticks_due_total",
            "Ticks that were due. Each is checked or missed.",
            counters.ticks_due.load(Ordering::Relaxed),
        );
        let missed =
            MissedReason::ALL.map(|reason| ([("reason", reason.as_word())], counters.missed(reason)));
        metrics.counters(
            "host_metrics_ticks_missed_total",
            "Ticks that were not checked and are recorded as missed.",
            missed.iter().map(|(labels, count)| (labels as Labels, *count)),
        );
        let checked = Outcome::ALL
            .into_iter()
            .filter(|outcome| *outcome != Outcome::Missed);
        let checks: Vec<_> = checked
            .map(|outcome| ([("outcome", outcome.as_str())], counters.results(outcome)))
            .collect();
        metrics.counters(
            "host_metrics_checks_total",
            "Checks that ended, by outcome.",
            checks.iter().map(|(labels, count)| (labels as Labels, *count)),
        );
        metrics.gauge(
            "host_metrics_checks_under_way",
            "Checks under way.",
            gauge(counters.under_way.load(Ordering::Relaxed)),
        );
        metrics.gauge(
            "host_metrics_check_threads",
            "Threads for checks, busy or idle.",
            gauge(counters.threads.load(Ordering::Relaxed)),
        );
        metrics.gauge(
            "host_metrics_check_threads_limit",
            "MAX_THREADS, the most checks under way.",
            gauge(self.max_threads),
        );
    }

    fn records(&self, metrics: &mut Metrics) {
        let deliveries = &self.counters.deliveries;
        metrics.gauge(
            "host_metrics_buffer_records",
            "Records in the buffer, because Kafka has not acknowledged them yet.",
            deliveries.records_on_the_way.load(Ordering::Relaxed) as f64,
        );
        metrics.gauge(
            "host_metrics_buffer_bytes",
            "Size of the keys and values in the buffer.",
            deliveries.bytes_on_the_way.load(Ordering::Relaxed) as f64,
        );
        metrics.gauge(
            "host_metrics_buffer_records_limit",
            "The most records in the buffer. When it is full, hosts are not checked.",
            self.max_records as f64,
        );
        metrics.counter(
            "host_metrics_records_delivered_total",
            "Records that Kafka acknowledged.",
            deliveries.delivered.load(Ordering::Relaxed),
        );
        metrics.counter(
            "host_metrics_deliveries_failed_total",
            "Failed attempts to deliver a record. The record is sent again.",
            deliveries.failed.load(Ordering::Relaxed),
        );
        metrics.counter(
            "host_metrics_records_superseded_total",
            "Records dropped because another producer of the group had recorded their ticks meanwhile.",
            deliveries.superseded.load(Ordering::Relaxed),
        );
        metrics.counter(
            "host_metrics_records_refused_total",
            "Records lost because Kafka refused them for good.",
            deliveries.refused.load(Ordering::Relaxed),
        );
        metrics.counter(
            "host_metrics_failure_copies_delivered_total",
            "Copies of failed checks that the topic of KAFKA_TOPIC_FAILURES has.",
            deliveries.copies_delivered.load(Ordering::Relaxed),
        );
        metrics.counter(
            "host_metrics_failure_copies_dropped_total",
            "Copies of failed checks dropped, because too many waited for their topic or Kafka refused them.",
            deliveries.copies_dropped.load(Ordering::Relaxed),
        );
    }
}
