//! What a pipeline logs about rejected records, and its summary.

use std::time::{Duration, Instant};

use log::Level;

/// The shortest time between two lines about rejected records, so that a topic full of them does not fill the log.
const LOG_REJECTED_EVERY: Duration = Duration::from_secs(10);

/// Logs rejected records: their number, and the first one as an example.
#[derive(Default)]
pub(super) struct Rejections {
    unlogged: u64,
    example: Option<String>,
    logged_at: Option<Instant>,
}

impl Rejections {
    pub(super) fn note(&mut self, example: impl FnOnce() -> String) {
        self.unlogged += 1;
        self.example.get_or_insert_with(example);
    }

    pub(super) fn log(&mut self, level: Level, now: Instant) {
        if self
            .logged_at
            .is_some_and(|logged_at| now < logged_at + LOG_REJECTED_EVERY)
        {
            return;
        }
        if let Some(example) = self.example.take() {
            log::log!(level, "rejected records={} first: {example}", self.unlogged);
            self.unlogged = 0;
            self.logged_at = Some(now);
        }
    }
}

/// The counters as they were at the last summary.
pub(super) struct Summary {
    pub(super) at: Instant,
    pub(super) rows: u64,
    pub(super) rejected: u64,
    pub(super) flushes: u64,
    /// The longest delay since then.
    pub(super) delay: Duration,
}

impl Summary {
    pub(super) fn since(at: Instant) -> Self {
        Self {
            at,
            rows: 0,
            rejected: 0,
            flushes: 0,
            delay: Duration::ZERO,
        }
    }
}
