//! What a pipeline did and where it stands: for /metrics, tests and the demo.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use prometheus::{Histogram, HistogramOpts};

use crate::http::health::{Heartbeat, Readiness};
use crate::http::metrics::FLUSH_BUCKETS;

/// What was done so far, and where things stand: for /metrics, tests and the demo.
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
    /// When the last flush became durable, by the wall clock; zero: there was none yet.
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
    /// Those of the pipeline that keeps the state.
    pub fn state(&self) -> &Self {
        self.0.state.get_or_init(Self::default)
    }

    /// Rows that are durable.
    pub fn rows(&self) -> u64 {
        self.0.rows.load(Ordering::Relaxed)
    }

    /// Rejected records that are durable.
    pub fn rejected(&self) -> u64 {
        self.0.rejected.load(Ordering::Relaxed)
    }

    /// Transactions that were committed.
    pub fn flushes(&self) -> u64 {
        self.0.flushes.load(Ordering::Relaxed)
    }

    /// Requests that Postgres did not answer or answered with a passing fault.
    pub fn failures(&self) -> u64 {
        self.0.failures.load(Ordering::Relaxed)
    }

    /// Flushes refused because another consumer had moved a position.
    pub fn fences(&self) -> u64 {
        self.0.fences.load(Ordering::Relaxed)
    }

    /// Partitions that the group took away, one by one.
    pub fn revoked(&self) -> u64 {
        self.0.revoked.load(Ordering::Relaxed)
    }

    /// How old the oldest record of the last flush was when it became durable, by Kafka's timestamp.
    pub fn delay(&self) -> Duration {
        Duration::from_millis(self.0.delay_millis.load(Ordering::Relaxed))
    }

    /// Records in front of the end that are not durable, of each partition that is ours: by topic and number.
    pub fn lags(&self) -> BTreeMap<(String, i32), u64> {
        self.0.lags.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_lags(&self, lags: BTreeMap<(String, i32), u64>) {
        *self.0.lags.lock().unwrap_or_else(PoisonError::into_inner) = lags;
    }
}

/// How long flushes took.
#[derive(Debug)]
pub(super) struct FlushSeconds(pub(super) Histogram);

impl Default for FlushSeconds {
    fn default() -> Self {
        let options = HistogramOpts::new(
            "host_metrics_flush_seconds",
            "Transactions that were committed: from BEGIN to COMMIT.",
        );
        Self(
            Histogram::with_opts(options.buckets(FLUSH_BUCKETS.to_vec()))
                .expect("the name is legal and the buckets ascend"),
        )
    }
}
