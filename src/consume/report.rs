//! The texts and intervals of what a pipeline logs.

use std::time::{Duration, Instant};

use log::Level;

use crate::consume::batch::Partition;
use crate::consume::ingest::Notice;
use crate::consume::sink::Sink;

/// The shortest time between two lines about rejected records, so that a topic full of them does not fill the log.
const LOG_REJECTED_EVERY: Duration = Duration::from_secs(10);

/// The text of a notice, and its level. `name` is the name of its partition.
pub(super) fn notice_text(notice: &Notice, name: impl Fn(Partition) -> String) -> (Level, String) {
    let text = match notice {
        Notice::Fenced {
            partition,
            base,
            position: Some(position),
            forgotten,
        } => format!(
            "another consumer moved the position of {} from {} to {}; {forgotten} records are left to that consumer",
            name(*partition),
            base.0,
            position.0,
        ),
        Notice::Fenced { partition, base, .. } => format!(
            "the position of {}, {}, is no longer in the offsets table; reading starts at the group's committed offset, or at \
             the first record if there is none",
            name(*partition),
            base.0,
        ),
        Notice::BeyondEnd {
            partition,
            position,
            extent,
            forgotten,
        } => {
            let lost = match forgotten {
                0 => String::new(),
                _ => format!("; {forgotten} records of the old topic were not written"),
            };
            format!(
                "position {} of {} is beyond the end, {}, so the topic was recreated; reading starts at its beginning, \
                 {}{lost}",
                position.0,
                name(*partition),
                extent.high.0,
                extent.low.0,
            )
        }
        Notice::BeforeBeginning {
            partition,
            position,
            extent,
        } => format!(
            "Kafka has deleted the records of {} from {} to {} before they were read (retention); reading goes on at {}",
            name(*partition),
            position.0,
            extent.low.0,
            extent.low.0,
        ),
        Notice::OtherLayout { forgotten } => {
            let text = format!("the table's columns changed; {forgotten} records are read again");
            return (Level::Info, text);
        }
    };
    (Level::Warn, text)
}

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

/// The second pipeline does not repeat what the first one logs.
pub(super) fn level<S: Sink>(level: Level) -> Level {
    if S::IS_FIRST { level } else { Level::Debug }
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
