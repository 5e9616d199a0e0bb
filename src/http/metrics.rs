//! An agent's counters as Prometheus's metric families, and their text format.
//!
//! The agents count in plain atomics, which is cheap; families are built from them only for a request.

use prometheus::core::Collector;
use prometheus::proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{Encoder, TextEncoder};

/// The Content-Type of the text format.
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// Bucket bounds in seconds for a check and its phases: from a local page to the longest usual CHECK_TIMEOUT.
pub const CHECK_BUCKETS: [f64; 14] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
];

/// Bucket bounds in seconds for a flush: from one row on a local disk to the longest step of a database session.
pub const FLUSH_BUCKETS: [f64; 13] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0,
];

/// Metric families, in the order in which they were added.
#[derive(Default)]
pub struct Metrics(Vec<MetricFamily>);

/// The names and values of a metric's labels.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

impl Metrics {
    pub fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.counters(name, help, [(&[] as Labels, value)]);
    }

    pub fn counters<'a>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels<'a>, u64)>,
    ) {
        let metric = |(labels, value)| {
            let mut counter = Counter::default();
            counter.set_value(value as f64);
            let mut metric = metric(labels);
            metric.set_counter(counter);
            metric
        };
        let metrics = values.into_iter().map(metric).collect();
        self.family(name, help, MetricType::COUNTER, metrics);
    }

    pub fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.gauges(name, help, [(&[] as Labels, value)]);
    }

    pub fn gauges<'a>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels<'a>, f64)>,
    ) {
        let metric = |(labels, value)| {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            let mut metric = metric(labels);
            metric.set_gauge(gauge);
            metric
        };
        let metrics = values.into_iter().map(metric).collect();
        self.family(name, help, MetricType::GAUGE, metrics);
    }

    pub fn collect(&mut self, collector: &impl Collector) {
        self.0.extend(collector.collect());
    }

    /// The metrics of every agent: its version and, on Linux, the resources of its process.
    pub fn of_the_process(&mut self) {
        let version = env!("CARGO_PKG_VERSION");
        let revision = option_env!("HOST_METRICS_REVISION").unwrap_or_default();
        self.gauges(
            "host_metrics_build_info",
            "Always 1. The labels are the version and git revision of the running program.",
            [(&[("version", version), ("revision", revision)] as Labels, 1.0)],
        );
        #[cfg(target_os = "linux")]
        {
            use std::sync::{LazyLock, Mutex};

            use prometheus::process_collector::ProcessCollector;

            use crate::lock::lock;

            // A single one, because it keeps the CPU time of its last call.
            static PROCESS: LazyLock<Mutex<ProcessCollector>> =
                LazyLock::new(|| Mutex::new(ProcessCollector::for_self()));
            self.collect(&*lock(&PROCESS));
        }
    }

    /// The text format, version 0.0.4, without empty families, such as the lag of a consumer that has no partitions.
    pub fn text(&self) -> String {
        let mut text = Vec::new();
        for family in self.0.iter().filter(|family| !family.get_metric().is_empty()) {
            if let Err(error) = TextEncoder::new().encode(std::slice::from_ref(family), &mut text) {
                // A bug of ours, which must not take the other metrics away.
                log::debug!("{} cannot be encoded: {error}", family.name());
            }
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    fn family(&mut self, name: &str, help: &str, kind: MetricType, metrics: Vec<Metric>) {
        let mut family = MetricFamily::default();
        family.set_name(name.to_owned());
        family.set_help(help.to_owned());
        family.set_field_type(kind);
        family.set_metric(metrics);
        self.0.push(family);
    }
}

fn metric(labels: Labels) -> Metric {
    let pair = |(name, value): &(&str, &str)| {
        let mut pair = LabelPair::default();
        pair.set_name((*name).to_owned());
        pair.set_value((*value).to_owned());
        pair
    };
    Metric::from_label(labels.iter().map(pair).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_become_text_and_empty_ones_nothing() {
        let mut metrics = Metrics::default();
        metrics.counter("a_total", "How many.", 3);
        metrics.gauges("nobody", "None.", []);
        metrics.gauges(
            "lag",
            "Quotes: \" \\ \n.",
            [
                (&[("topic", "a\"b"), ("partition", "0")] as Labels, 1.5),
                (&[("topic", "c"), ("partition", "1")], 0.0),
            ],
        );
        let expected = r#"# HELP a_total How many.
# TYPE a_total counter
a_total 3
# HELP lag Quotes: " \\ \n.
# TYPE lag gauge
lag{topic="a\"b",partition="0"} 1.5
lag{topic="c",partition="1"} 0
"#;
        assert_eq!(metrics.text(), expected);
    }

    #[test]
    fn the_process_has_its_version_and_resources() {
        let mut metrics = Metrics::default();
        metrics.of_the_process();
        let text = metrics.text();
        assert!(
            text.contains(concat!("version=\"", env!("CARGO_PKG_VERSION"), "\"")),
            "{text}"
        );
        #[cfg(target_os = "linux")]
        assert!(text.contains("\nprocess_resident_memory_bytes "), "{text}");
    }
}
