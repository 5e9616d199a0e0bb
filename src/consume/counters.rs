//! What a pipeline has done and where it is: for /metrics, tests and the demo.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use prometheus::{Histogram, HistogramOpts};

use crate::http::health::{Heartbeat, Readiness};
use crate::http::metrics::FLUSH_BUCKETS;
use crate::lock::lock;

/// The counters of a pipeline. Clones share them.
#[derive(Debug, Default, Clone)]
pub struct Counters(pub(super) Arc<Counts>);

#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) rows: AtomicU64,
    pub(super) rejected: AtomicU64,
    pub(super) flushes: AtomicU64,
    pub(super) failures: AtomicU64,
    pub(super) fences: AtomicU64,
    pub(super) revoked: AtomicU64,
    pub(super) delay_millis: AtomicU64,
    /// The time of the last durable flush, by the wall clock. Zero before the first one.
    pub(super) flushed_at_millis: AtomicU64,
    pub(super) flush_seconds: FlushSeconds,
    pub(super) assigned: AtomicUsize,
    pub(super) unwritten: AtomicUsize,
    pub(super) lags: Mutex<BTreeMap<(String, i32), u64>>,
    pub(super) heartbeat: Heartbeat,
    pub(super) readiness: Readiness,
    state: OnceLock<Counters>,
}

impl Counters {
    /// The counters of the state's pipeline.
    pub fn state(&self) -> &Self {
        self.0.state.get_or_init(Self::default)
    }

    /// Durable rows.
    pub fn rows(&self) -> u64 {
        self.0.rows.load(Ordering::Relaxed)
    }

    /// Durable rejected records.
    pub fn rejected(&self) -> u64 {
        self.0.rejected.load(Ordering::Relaxed)
    }

    /// Committed transactions.
    pub fn flushes(&self) -> u64 {
        self.0.flushes.load(Ordering::Relaxed)
    }

    /// Requests that Postgres did not answer, or answered with a passing error.
    pub fn failures(&self) -> u64 {
        self.0.failures.load(Ordering::Relaxed)
    }

    /// Flushes refused because another consumer had moved a position.
    pub fn fences(&self) -> u64 {
        self.0.fences.load(Ordering::Relaxed)
    }

    /// Partitions that the group took away, counted each time.
    pub fn revoked(&self) -> u64 {
        self.0.revoked.load(Ordering::Relaxed)
    }

    /// The age of the oldest record of the last flush when it became durable, by Kafka's timestamp.
    pub fn delay(&self) -> Duration {
        Duration::from_millis(self.0.delay_millis.load(Ordering::Relaxed))
    }

    /// The records that are not durable, of each assigned partition by topic and number.
    pub fn lags(&self) -> BTreeMap<(String, i32), u64> {
        lock(&self.0.lags).clone()
    }

    pub(super) fn set_lags(&self, lags: BTreeMap<(String, i32), u64>) {
        *lock(&self.0.lags) = lags;
    }
}

/// The duration of flushes.
#[derive(Debug)]
pub(super) struct FlushSeconds(pub(super) Histogram);

impl Default for FlushSeconds {
    fn default() -> Self {
        let options = HistogramOpts::new(
            "host_metrics_flush_seconds",
            "The duration of committed transactions, from BEGIN to COMMIT.",
        );
        Self(
            Histogram::with_opts(options.buckets(FLUSH_BUCKETS.to_vec()))
                .expect("the name is legal and the buckets ascend"),
        )
    }
}
