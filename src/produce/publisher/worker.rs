//! The state of the publisher's thread. `thread` is its loop; the other files have a subject each.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rdkafka::config::ClientConfig;
use rdkafka::producer::BaseProducer;

use super::client::Context;
use super::search::Search;
use super::shared::{Membership, Record, Shared};
use crate::clock::instant_now;
use crate::config::KafkaConfig;
use crate::kafka::Explainer;
use crate::outage::Outage;
use crate::produce::outbox::{LaneId, Outbox};
use crate::produce::share::Share;

/// How often the thread looks for letters and reports while records are in flight. No record wakes it, so 2,000 records a second
/// cost 50 wake-ups.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The longest sleep without any records. The first letter ends it.
pub(super) const LOOK_EVERY_IDLE: Duration = Duration::from_secs(1);

pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) kafka: KafkaConfig,
    pub(super) config: ClientConfig,
    pub(super) explainer: Explainer,
    pub(super) servers: String,
    pub(super) producer: BaseProducer<Context>,
    pub(super) membership: Option<Membership>,
    pub(super) outbox: Outbox<Record>,
    /// By the index of the lane.
    pub(super) routes: Vec<Route>,
    pub(super) lane_of_share: HashMap<Share, LaneId>,
    pub(super) topics: Vec<Topic>,
    pub(super) topic_indices: HashMap<String, usize>,
    pub(super) claims_in_flight: usize,
    /// With KAFKA_TOPIC_FAILURES.
    pub(super) copies: Option<Copies>,
    /// Why the producer has failed. Nothing is sent until it is replaced.
    pub(super) spoiled: Option<String>,
    /// The search in the first topic with records in doubt.
    pub(super) search: Option<Search>,
    /// How many stored records were found.
    pub(super) found_stored: usize,
    pub(super) search_failed_at: Option<Instant>,
    pub(super) stop_by: Option<Instant>,
    pub(super) looked_for_topics_at: Option<Instant>,
    /// Why Kafka could not be asked for topics. `None`: it answered, or was not asked.
    pub(super) unreachable: Option<String>,
    pub(super) acknowledged_at: Instant,
    pub(super) reported_at: Instant,
    pub(super) silence: Outage,
    /// The number of refused records since the last log line, and the first of them.
    pub(super) refused: Option<(u64, String)>,
    pub(super) refused_reported_at: Option<Instant>,
}

/// The destination of a lane's records.
pub(super) struct Route {
    pub(super) lane: LaneId,
    /// The index in [`Worker::topics`].
    pub(super) topic: usize,
    /// Without a group, librdkafka computes the partition from the key.
    pub(super) share: Option<Share>,
}

pub(super) struct Topic {
    pub(super) name: String,
    /// Whether it is known to exist. Its records wait until then.
    pub(super) exists: bool,
    /// With PRODUCE_GROUP: whether a host's records go to this topic; otherwise true.
    pub(super) is_used: bool,
    /// Why it cannot be used. After Kafka has refused its records, only an acknowledged one resets this.
    pub(super) why_not: Option<String>,
    pub(super) was_refused: bool,
    /// Without a group: when the oldest of the records was sent that came back although Kafka may have stored them. Unix time
    /// in milliseconds.
    pub(super) in_doubt_since: Option<i64>,
    /// Its records and claims that librdkafka has.
    pub(super) in_flight: usize,
    pub(super) missing: Outage,
}

impl Topic {
    pub(super) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            exists: false,
            is_used: true,
            why_not: None,
            was_refused: false,
            in_doubt_since: None,
            in_flight: 0,
            missing: Outage::default(),
        }
    }

    pub(super) fn is_awaited(&self) -> bool {
        self.is_used && !self.exists
    }

    pub(super) fn mark_missing(&mut self, why: String) {
        self.exists = false;
        self.why_not = Some(why);
    }
}

/// The copies of failed checks.
pub(super) struct Copies {
    pub(super) lane: LaneId,
    pub(super) topic: usize,
    /// Waiting or in flight.
    pub(super) records: usize,
    pub(super) bytes: usize,
    /// Dropped since the last log line.
    pub(super) dropped: u64,
    pub(super) dropped_reported_at: Option<Instant>,
}

impl Worker {
    /// The number of records and claims that librdkafka has.
    pub(super) fn in_flight(&self) -> usize {
        self.outbox.in_flight() + self.claims_in_flight
    }

    pub(super) fn on_the_way(&self) -> usize {
        self.shared.deliveries.records_on_the_way.load(Ordering::Relaxed)
    }

    /// Call it after the record or claim was counted as in flight.
    pub(super) fn note_sent(&mut self, topic: usize) {
        if self.in_flight() == 1 {
            // Until now there was nothing to acknowledge.
            self.acknowledged_at = instant_now();
        }
        self.topics[topic].in_flight += 1;
    }
}
