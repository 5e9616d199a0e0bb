//! Finds the unacknowledged records that Kafka has stored, for a producer without a group.
//!
//! A broker recognizes repeated requests because it remembers the last few requests of each producer. After a restart it may
//! remember only the last one, because its snapshots contain no more. If a producer waits for more than one answer at that time,
//! the broker rejects it. Before its records are sent again, the stored ones have to be found. With a group, a claim does that:
//! see `share`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use rdkafka::consumer::Consumer;
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::{Offset, TopicPartitionList};

use super::shared::Record;
use crate::clock::instant_now;
use crate::config::KafkaConfig;
use crate::kafka::look_up_topic;
use crate::kafka::reader::{Part, Quiet, Reader};
use crate::produce::outbox::{Kept, Sequence};

/// How long one question to Kafka may take. The publisher's thread waits for the answer and sends nothing meanwhile. There are
/// two questions.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
pub(super) const QUESTIONS_WITHIN: Duration = ANSWER_WITHIN.saturating_mul(2);

/// How much the clocks may differ if a topic's records have the broker's time instead of ours.
const CLOCKS_DIFFER_MILLIS: i64 = 60_000;

/// How long the thread searches before it does something else, and after how long it gives up: a minute is enough to read what a
/// full buffer may have left in a topic.
const SEARCH_STEP: Duration = Duration::from_millis(100);
const SEARCH_WITHIN: Duration = Duration::from_secs(60);

/// A search in one topic.
pub(super) struct Search {
    reader: Reader,
    /// The wanted records by the hash of their values, which are unique: a value contains its host and its tick.
    wanted: HashMap<u64, Sequence>,
    hasher: RandomState,
    /// When reading began. `None`: Kafka has not said yet where the records begin.
    begun: Option<Instant>,
}

impl Search {
    pub(super) fn new(kafka: &KafkaConfig, wanted: &BTreeMap<Sequence, Kept<Record>>) -> KafkaResult<Self> {
        let hasher = RandomState::new();
        let by_hash =
            |(sequence, kept): (&Sequence, &Kept<Record>)| (hasher.hash_one(&kept.record.value), *sequence);
        Ok(Self {
            reader: Reader::new(kafka)?,
            wanted: wanted.iter().map(by_hash).collect(),
            hasher,
            begun: None,
        })
    }

    /// Searches for a while; the first call takes longer, because it asks Kafka two questions. Returns which of the waiting records
    /// it has found, and whether the search is over.
    ///
    /// # Errors
    /// Kafka does not allow it, or did not answer the questions.
    pub(super) fn go_on(
        &mut self,
        topic: &str,
        since_millis: i64,
        waiting: &BTreeMap<Sequence, Kept<Record>>,
    ) -> KafkaResult<(HashSet<Sequence>, bool)> {
        if self.begun.is_none() {
            let parts = parts_since(self.reader.consumer(), topic, since_millis)?;
            self.reader.begin(topic, &parts)?;
            self.begun = Some(instant_now());
        }
        let mut found = HashSet::new();
        let has_ended = self.reader.go_on(instant_now() + SEARCH_STEP, |_, value| {
            if let Some(sequence) = self.wanted.get(&self.hasher.hash_one(value))
                && waiting
                    .get(sequence)
                    .is_some_and(|kept| kept.record.value == value)
            {
                found.insert(*sequence);
            }
        })?;
        let is_over = has_ended || found.len() == waiting.len();
        Ok((found, is_over))
    }

    pub(super) fn takes_too_long(&self) -> bool {
        self.begun
            .is_some_and(|begun| instant_now().duration_since(begun) > SEARCH_WITHIN)
    }
}

/// All partitions of the topic, from that time on.
fn parts_since(consumer: &impl Consumer<Quiet>, topic: &str, since_millis: i64) -> KafkaResult<Vec<Part>> {
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
                to_is_stored: false,
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
