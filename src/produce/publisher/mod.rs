//! The publisher: a thread that owns the Kafka producer.
//!
//! It keeps every record until Kafka has acknowledged it, through outages of any length and while a topic is missing, and keeps
//! the records of each host in order. The buffer is bounded. Because [`Publisher::has_room`] is asked before a check begins, no
//! result is thrown away. Only records that Kafka refuses for good are given up; they are counted and logged.

mod claims;
mod client;
mod copies;
mod log_lines;
mod reports;
mod search;
mod shared;
mod topics;
mod worker;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::check::target::Target;
use crate::clock::instant_now;
use crate::config::ProduceConfig;
use crate::lock::lock;
use crate::thread::start_thread;
use shared::Shared;
pub use shared::{Bounds, Deliveries, Letter, LetterBox, Membership, Record, Unacknowledged};
use worker::Worker;

pub struct Publisher {
    shared: Arc<Shared>,
    ended: Receiver<Unacknowledged>,
}

/// How long after its deadline the publisher may end: it may be asking for a topic, pausing, or taking back records.
pub const END_WITHIN: Duration = Duration::from_millis(800);

impl Publisher {
    /// Starts the thread, which waits for Kafka if it cannot be reached.
    ///
    /// # Errors
    /// librdkafka rejects the settings, for example because it cannot read a certificate file, or the thread does not start.
    pub fn start(
        config: &ProduceConfig,
        bounds: Bounds,
        deliveries: Arc<Deliveries>,
        membership: Option<Membership>,
    ) -> anyhow::Result<Self> {
        let mut shared = Shared::new(&config.topic, bounds, deliveries);
        shared.failures_topic.clone_from(&config.failures_topic);
        let shared = Arc::new(shared);
        let worker = Worker::new(Arc::clone(&shared), &config.kafka, membership)?;
        let (end, ended) = sync_channel(1);
        start_thread("publisher", move || {
            worker.run(|unacknowledged| drop(end.send(unacknowledged)))
        })
        .context("cannot start the publisher's thread")?;
        Ok(Self { shared, ended })
    }

    /// Whether the buffer has room for one more result of this target.
    pub fn has_room(&self, target: &Target) -> bool {
        self.has_part_of_room(target, 1)
    }

    /// The same for missed ticks. They leave half of the buffer to results, because the schedule keeps them at no cost.
    pub fn has_spare_room(&self, target: &Target) -> bool {
        self.has_part_of_room(target, 2)
    }

    fn has_part_of_room(&self, target: &Target, part: usize) -> bool {
        let Shared { bounds, .. } = *self.shared;
        self.on_the_way() < bounds.records / part
            && self.shared.deliveries.bytes_on_the_way.load(Ordering::Relaxed) < bounds.bytes / part
            && !lock(&self.shared.crowded).contains(self.shared.topic_of(target))
    }

    /// Takes a record, even if the buffer is full: [`Publisher::has_room`] is asked before a check begins.
    pub fn publish(&self, record: Record) {
        self.shared
            .deliveries
            .records_on_the_way
            .fetch_add(1, Ordering::Relaxed);
        self.shared
            .deliveries
            .bytes_on_the_way
            .fetch_add(record.bytes, Ordering::Relaxed);
        self.tell(Letter::Record(record));
    }

    /// Sends a letter other than [`Letter::Record`].
    pub fn tell(&self, letter: Letter) {
        self.shared.tell(letter);
    }

    /// For other threads.
    pub fn letter_box(&self) -> LetterBox {
        Arc::clone(&self.shared)
    }

    /// The number of records that are not acknowledged yet.
    pub fn on_the_way(&self) -> usize {
        self.shared.on_the_way()
    }

    /// Ends the thread when Kafka has acknowledged everything, or at `deadline`. Returns what is left.
    pub fn stop(&self, deadline: Instant) -> Unacknowledged {
        lock(&self.shared.inbox).stop_by = Some(deadline);
        self.shared.changed.notify_one();
        let patience = deadline.saturating_duration_since(instant_now()) + END_WITHIN;
        self.ended.recv_timeout(patience).unwrap_or_else(|gone| {
            // Only the thread knows whose records they are.
            let left = self.on_the_way() as u64;
            Unacknowledged {
                per_address: BTreeMap::from([("any host".to_owned(), left)]),
                reason: Some(format!("the publisher's thread does not answer ({gone})")),
            }
        })
    }
}
