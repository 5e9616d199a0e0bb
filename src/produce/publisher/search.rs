//! Finds the unacknowledged records that Kafka has stored, for a producer without a group.
//!
//! A broker recognizes repeated requests because it remembers the last few requests of each producer. After a restart it may
//! remember only the last one, because its snapshots contain no more. If a producer waits for more than one answer at that time,
//! the broker rejects it. Before its records are sent again, the stored ones have to be found. With a group, a claim does that:
//! see `share`.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use rdkafka::consumer::Consumer;
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::{Offset, TopicPartitionList};

use super::shared::Record;
use crate::clock::instant_now;
use crate::config::KafkaConfig;
use crate::kafka::Listener;
use crate::kafka::look_up_topic;
use crate::kafka::reader::{Part, Reader};
use crate::produce::outbox::{Kept, Sequence};

/// How long one question to Kafka may take. The publisher's thread waits for the answer and
/// sends nothing meanwhile. There are two questions.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
pub(super) const QUESTIONS_WITHIN: Duration = ANSWER_WITHIN.saturating_mul(2);

/// How much the clocks may differ if a topic's records have the broker's time instead of ours.
const CLOCKS_DIFFER_MILLIS: i64 = 60_000;

/// A search in one topic.
pub(super) struct Search {
    reader: Reader,
    topic: String,
    since_millis: i64,
    has_begun: bool,
    /// The wanted records by the hash of their values, which are unique: a value contains its host and its tick.
    wanted: HashMap<u64, Sequence>,
    hasher: RandomState,
    /// When reading began.
    begun: Instant,
}

impl Search {
    /// A search for `wanted` that begins with the first record after `since_millis` (Unix time).
    pub(super) fn new(
        kafka: &KafkaConfig,
        topic: &str,
        since_millis: i64,
        wanted: &BTreeMap<Sequence, Kept<Record>>,
    ) -> KafkaResult<Self> {
        let hasher = RandomState::new();
        Ok(Self {
            reader: Reader::new(kafka)?,
            topic: topic.to_owned(),
            since_millis,
            has_begun: false,
            wanted: wanted
                .iter()
                .map(|(sequence, kept)| (hasher.hash_one(&kept.record.value), *sequence))
                .collect(),
            hasher,
            begun: instant_now(),
        })
    }

    /// Searches until `until`; the first call may end later, because it asks Kafka two questions. `found` gets the sequence of
    /// each stored record. Returns whether the search is over.
    ///
    /// # Errors
    /// Kafka does not allow it, or did not answer the questions. Other errors are retried.
    pub(super) fn go_on(
        &mut self,
        until: Instant,
        wanted: &BTreeMap<Sequence, Kept<Record>>,
        mut found: impl FnMut(Sequence),
    ) -> KafkaResult<bool> {
        if !self.has_begun {
            let parts = parts_since(self.reader.consumer(), &self.topic, self.since_millis)?;
            self.reader.begin(&self.topic, &parts)?;
            self.has_begun = true;
            self.begun = instant_now();
        }
        let (by_hash, hasher) = (&self.wanted, &self.hasher);
        self.reader.go_on(until, |_, value| {
            if let Some(sequence) = by_hash.get(&hasher.hash_one(value))
                && wanted
                    .get(sequence)
                    .is_some_and(|kept| kept.record.value == value)
            {
                found(*sequence);
            }
        })
    }

    pub(super) fn begun(&self) -> Instant {
        self.begun
    }
}

/// All partitions of the topic, from that time on.
fn parts_since(consumer: &impl Consumer<Listener>, topic: &str, since_millis: i64) -> KafkaResult<Vec<Part>> {
    let partitions = match look_up_topic(consumer.client(), topic, ANSWER_WITHIN)? {
        Ok(partitions) => partitions,
        // A deleted topic contains nothing.
        Err(RDKafkaErrorCode::UnknownTopicOrPartition) => return Ok(Vec::new()),
        Err(error) => return Err(KafkaError::MetadataFetch(error)),
    };
    let mut times = TopicPartitionList::new();
    for partition in partitions {
        let since = Offset::Offset(since_millis - CLOCKS_DIFFER_MILLIS);
        times.add_partition_offset(topic, partition.number, since)?;
    }
    let starts = consumer.offsets_for_times(times, ANSWER_WITHIN)?;
    let part = |start: &rdkafka::topic_partition_list::TopicPartitionListElem<'_>| {
        start.error()?;
        Ok(match start.offset() {
            Offset::Offset(from) => Some(Part {
                partition: start.partition(),
                from,
                to: None,
            }),
            // There is no later record.
            _ => None,
        })
    };
    starts
        .elements()
        .iter()
        .filter_map(|start| part(start).transpose())
        .collect()
}
