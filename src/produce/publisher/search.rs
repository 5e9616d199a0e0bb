//! Finds out which records Kafka holds of those that it never acknowledged, for a producer without a group.
//!
//! A broker remembers the last few requests of a producer and knows a repeated one by that; of the time before a restart it
//! may remember only the last (Kafka writes no more into its snapshots). A producer that was given no answer to more than one
//! is then refused, and whoever sends its records anew has to look first. With a group a new claim tells the same: see
//! `share`.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use rdkafka::consumer::Consumer;
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::{Offset, TopicPartitionList};

use super::Record;
use crate::clock::instant_now;
use crate::config::KafkaConfig;
use crate::kafka::reader::{Part, Quiet, Reader};
use crate::produce::outbox::{Kept, Sequence};

/// How long one question to Kafka may take: the publisher's thread does nothing else meanwhile. There are two of them.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
pub const QUESTIONS_WITHIN: Duration = ANSWER_WITHIN.saturating_mul(2);

/// Where a topic has the broker's times instead of ours, its clock may differ from ours by as much.
const CLOCKS_DIFFER_MILLIS: i64 = 60_000;

/// One look at one topic.
pub struct Search {
    reader: Reader,
    topic: String,
    since_millis: i64,
    has_begun: bool,
    /// The values that are looked for, by hash: a value names its host and its tick, so no two are alike.
    wanted: HashMap<u64, Sequence>,
    hasher: RandomState,
    /// When reading began.
    begun: Instant,
}

impl Search {
    /// Will read from the first record at that time (Unix time in milliseconds) on; `wanted` are the records by their sequence.
    ///
    /// # Errors
    /// librdkafka refuses the settings.
    pub fn new(
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

    /// Goes on until then at the latest, but for the first questions. Found sequences are told to `found`; true: there are
    /// no more.
    ///
    /// # Errors
    /// Kafka does not allow it, or has not answered the first questions yet. Everything else is waited out.
    pub fn go_on(
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

    pub fn begun(&self) -> Instant {
        self.begun
    }
}

/// All partitions from that time on.
fn parts_since(consumer: &impl Consumer<Quiet>, topic: &str, since_millis: i64) -> KafkaResult<Vec<Part>> {
    let metadata = consumer.fetch_metadata(Some(topic), ANSWER_WITHIN)?;
    let found = metadata.topics().iter().find(|found| found.name() == topic);
    match found.and_then(|found| found.error()).map(RDKafkaErrorCode::from) {
        // It was deleted, and nothing is stored.
        None | Some(RDKafkaErrorCode::UnknownTopicOrPartition) => {}
        Some(error) => return Err(KafkaError::MetadataFetch(error)),
    }
    let mut times = TopicPartitionList::new();
    for partition in found.iter().flat_map(|found| found.partitions()) {
        let since = Offset::Offset(since_millis - CLOCKS_DIFFER_MILLIS);
        times.add_partition_offset(topic, partition.id(), since)?;
    }
    if times.count() == 0 {
        return Ok(Vec::new());
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
            // No record is as late as that.
            _ => None,
        })
    };
    starts
        .elements()
        .iter()
        .filter_map(|start| part(start).transpose())
        .collect()
}
