//! What a pipeline has done and where it is: the metrics of `consume` at METRICS_ADDR, which tests and the summary read too.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::{Arc, Mutex, OnceLock};

use prometheus::{Gauge, Histogram, HistogramOpts, IntCounter, IntGauge};

use crate::http::Monitored;
use crate::http::health::{Heartbeat, Readiness};
use crate::http::metrics::{FLUSH_BUCKETS, Labels, Metrics};
use crate::lock::lock;

/// The counters of a pipeline. Clones share them.
#[derive(Debug, Default, Clone)]
pub struct Counters(Arc<Counts>);

impl Deref for Counters {
    type Target = Counts;

    fn deref(&self) -> &Counts {
        &self.0
    }
}

/// The help texts say what each one counts.
#[derive(Debug)]
pub struct Counts {
    pub rows: IntCounter,
    pub rejected: IntCounter,
    pub flushes: IntCounter,
    pub flush_seconds: Histogram,
    pub failures: IntCounter,
    pub fences: IntCounter,
    pub flushed_at_seconds: Gauge,
    pub delay_seconds: Gauge,
    pub assigned: IntGauge,
    pub revoked: IntCounter,
    pub unwritten: IntGauge,
    pub(super) heartbeat: Heartbeat,
    pub(super) readiness: Readiness,
    lags: Mutex<BTreeMap<(String, i32), u64>>,
    state: OnceLock<Counters>,
}

impl Default for Counts {
    fn default() -> Self {
        const LEGAL: &str = "the name is legal";
        let counter = |name, help| IntCounter::new(name, help).expect(LEGAL);
        let int_gauge = |name, help| IntGauge::new(name, help).expect(LEGAL);
        let gauge = |name, help| Gauge::new(name, help).expect(LEGAL);
        let flush_seconds = HistogramOpts::new(
            "host_metrics_flush_seconds",
            "The duration of committed transactions, from BEGIN to COMMIT.",
        );
        Self {
            rows: counter("host_metrics_rows_total", "Durable rows."),
            rejected: counter(
                "host_metrics_rejected_total",
                "Records that could not be stored as rows and are in the rejected table.",
            ),
            flushes: counter("host_metrics_batches_total", "Committed transactions."),
            flush_seconds: Histogram::with_opts(flush_seconds.buckets(FLUSH_BUCKETS.to_vec()))
                .expect("the name is legal and the buckets ascend"),
            failures: counter(
                "host_metrics_store_failures_total",
                "Requests that Postgres did not answer, or answered with a passing error. They are repeated.",
            ),
            fences: counter(
                "host_metrics_fences_total",
                "Batches that were refused because another consumer had moved a position. Their records are read again.",
            ),
            flushed_at_seconds: gauge(
                "host_metrics_last_flush_timestamp_seconds",
                "When the last transaction was committed, 0 before the first.",
            ),
            delay_seconds: gauge(
                "host_metrics_flush_delay_seconds",
                "Age of the oldest record of the last transaction when that was committed, by Kafka's timestamp.",
            ),
            assigned: int_gauge(
                "host_metrics_assigned_partitions",
                "Partitions that are assigned to this consumer.",
            ),
            revoked: counter(
                "host_metrics_revoked_partitions_total",
                "Partitions that the group took away from this consumer.",
            ),
            unwritten: int_gauge(
                "host_metrics_unwritten_records",
                "Records that were read and are not durable yet.",
            ),
            heartbeat: Heartbeat::default(),
            readiness: Readiness::default(),
            lags: Mutex::default(),
            state: OnceLock::new(),
        }
    }
}

impl Counters {
    /// The counters of the state's pipeline.
    pub fn state(&self) -> &Self {
        self.state.get_or_init(Self::default)
    }

    /// The records that are not durable, of each assigned partition by topic and number.
    pub fn lags(&self) -> BTreeMap<(String, i32), u64> {
        lock(&self.lags).clone()
    }

    pub(super) fn set_lags(&self, lags: BTreeMap<(String, i32), u64>) {
        *lock(&self.lags) = lags;
    }

    fn add_lags(&self, metrics: &mut Metrics) {
        let lags: Vec<_> = self
            .lags()
            .into_iter()
            .map(|((topic, number), lag)| (topic, number.to_string(), lag as f64))
            .collect();
        let labels: Vec<_> = lags
            .iter()
            .map(|(topic, number, lag)| ([("topic", topic.as_str()), ("partition", number.as_str())], *lag))
            .collect();
        metrics.gauges(
            "host_metrics_lag_records",
            "Records in each assigned partition that are not durable yet.",
            labels.iter().map(|(labels, lag)| (labels as Labels, *lag)),
        );
    }
}

impl Monitored for Counters {
    fn metrics(&self) -> Metrics {
        let mut metrics = Metrics::default();
        metrics.of_the_process();
        metrics.gauge(
            "host_metrics_ready",
            "1 while Kafka and Postgres are available and all assigned partitions can be read, else 0.",
            f64::from(u8::from(self.is_ready().is_ok())),
        );
        metrics.collect(&self.rows);
        metrics.collect(&self.rejected);
        metrics.collect(&self.flushes);
        metrics.collect(&self.flush_seconds);
        metrics.collect(&self.failures);
        metrics.collect(&self.fences);
        metrics.collect(&self.flushed_at_seconds);
        metrics.collect(&self.delay_seconds);
        metrics.collect(&self.assigned);
        metrics.collect(&self.revoked);
        metrics.collect(&self.unwritten);
        self.add_lags(&mut metrics);
        metrics.gauge(
            "host_metrics_state_lag_records",
            "Records in the assigned partitions that are not in the state yet. 0 with STATE=off.",
            self.state().lags().values().sum::<u64>() as f64,
        );
        metrics
    }

    fn is_alive(&self) -> Result<(), String> {
        self.heartbeat.check("the consumer's loop")
    }

    fn is_ready(&self) -> Result<(), String> {
        self.readiness.check()
    }
}
