//! The metrics of `consume` at METRICS_ADDR: their names and help texts.

use std::sync::atomic::Ordering;

use crate::consume::counters::Counters;
use crate::http::Monitored;
use crate::http::metrics::{Labels, Metrics};

impl Monitored for Counters {
    #[expect(clippy::too_many_lines, reason = "a line for each metric")]
    fn metrics(&self) -> Metrics {
        let counts = &*self.0;
        let mut metrics = Metrics::default();
        metrics.of_the_process();
        metrics.gauge(
            "host_metrics_ready",
            "1 if Kafka and Postgres are both available, else 0.",
            f64::from(u8::from(self.is_ready().is_ok())),
        );
        metrics.counter("host_metrics_rows_total", "Durable rows.", self.rows());
        metrics.counter(
            "host_metrics_rejected_total",
            "Records that could not be stored as rows and are in the rejected table.",
            self.rejected(),
        );
        metrics.counter(
            "host_metrics_batches_total",
            "Committed transactions.",
            self.flushes(),
        );
        metrics.collect(&counts.flush_seconds.0);
        metrics.counter(
            "host_metrics_store_failures_total",
            "Requests that Postgres did not answer, or answered with a passing error. They are repeated.",
            self.failures(),
        );
        metrics.counter(
            "host_metrics_fences_total",
            "Batches that were refused because another consumer had moved a position. Their records are read again.",
            self.fences(),
        );
        metrics.gauge(
            "host_metrics_last_flush_timestamp_seconds",
            "When the last transaction was committed, 0 before the first.",
            counts.flushed_at_millis.load(Ordering::Relaxed) as f64 / 1e3,
        );
        metrics.gauge(
            "host_metrics_flush_delay_seconds",
            "Age of the oldest record of the last transaction when that was committed, by Kafka's timestamp.",
            self.delay().as_secs_f64(),
        );
        metrics.gauge(
            "host_metrics_assigned_partitions",
            "Partitions that are assigned to this consumer.",
            counts.assigned.load(Ordering::Relaxed) as f64,
        );
        metrics.counter(
            "host_metrics_revoked_partitions_total",
            "Partitions that the group took away from this consumer.",
            self.revoked(),
        );
        metrics.gauge(
            "host_metrics_unwritten_records",
            "Records that were read and are not durable yet.",
            counts.unwritten.load(Ordering::Relaxed) as f64,
        );
        self.lag(&mut metrics);
        metrics.gauge(
            "host_metrics_state_lag_records",
            "Records in the assigned partitions that are not in the state yet. 0 with STATE=off.",
            self.state().lags().values().sum::<u64>() as f64,
        );
        metrics
    }

    fn is_alive(&self) -> Result<(), String> {
        self.0.heartbeat.check("the consumer's loop")
    }

    fn is_ready(&self) -> Result<(), String> {
        self.0.readiness.check()
    }
}

impl Counters {
    fn lag(&self, metrics: &mut Metrics) {
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
