//! Finds out which records Kafka holds of those that it never acknowledged.
//!
//! Owns the reading of a topic's end. A broker remembers the last few requests of a producer and knows a repeated one by
//! that; of the time before a restart it may remember only the last (Kafka writes no more into its snapshots). A
//! producer that was given no answer to more than one is then refused, and whoever sends its records anew has to look first.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::{ClientContext, Message, Offset, TopicPartitionList};

use super::Record;
use crate::clock::instant_now;
use crate::config::KafkaConfig;

/// How long one question to Kafka may take: the publisher's thread does nothing else meanwhile. There are two of them.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
pub const QUESTIONS_WITHIN: Duration = ANSWER_WITHIN.saturating_mul(2);

/// Where a topic has the broker's times instead of ours, its clock may differ from ours by as much.
const CLOCKS_DIFFER_MILLIS: i64 = 60_000;

/// One look at one topic.
pub struct Search {
    consumer: BaseConsumer<Quiet>,
    topic: String,
    since_millis: i64,
    /// Partitions that were not read to their end yet; `None` before Kafka has said which there are.
    open: Option<HashSet<i32>>,
    /// The values that are looked for, by hash: a value names its host and its tick, so no two are alike.
    wanted: HashMap<u64, u64>,
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
        wanted: &BTreeMap<u64, Record>,
    ) -> KafkaResult<Self> {
        let mut config = ClientConfig::new();
        for (name, value) in kafka.client_properties() {
            config.set(name, value);
        }
        let consumer = config
            // librdkafka reads nothing without one. It is not joined, and nothing is committed.
            .set("group.id", "host-metrics-produce")
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            // What retention or a new topic took away is not there.
            .set("auto.offset.reset", "earliest")
            .set("isolation.level", "read_uncommitted")
            .set("enable.partition.eof", "true")
            .set("fetch.wait.max.ms", "50")
            .set("fetch.queue.backoff.ms", "10")
            .set("queued.max.messages.kbytes", "2048")
            .set_log_level(RDKafkaLogLevel::Warning)
            .create_with_context(Quiet)?;
        let hasher = RandomState::new();
        Ok(Self {
            consumer,
            topic: topic.to_owned(),
            since_millis,
            open: None,
            wanted: wanted
                .iter()
                .map(|(sequence, record)| (hasher.hash_one(&record.value), *sequence))
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
        wanted: &BTreeMap<u64, Record>,
        mut found: impl FnMut(u64),
    ) -> KafkaResult<bool> {
        let open = match &mut self.open {
            Some(open) => open,
            none => {
                let partitions = begin(&self.consumer, &self.topic, self.since_millis)?;
                self.begun = instant_now();
                none.insert(partitions)
            }
        };
        while !open.is_empty() && instant_now() < until {
            match self.consumer.poll(Duration::from_millis(10)) {
                Some(Ok(message)) => {
                    let value = message.payload().unwrap_or_default();
                    if let Some(sequence) = self.wanted.get(&self.hasher.hash_one(value))
                        && wanted.get(sequence).is_some_and(|record| record.value == value)
                    {
                        found(*sequence);
                    }
                }
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    open.remove(&partition);
                }
                Some(Err(error)) if is_forbidden(&error) => return Err(error),
                Some(Err(error)) => log::debug!("looking for what is stored: {error}"),
                None => {}
            }
        }
        Ok(open.is_empty())
    }

    pub fn begun(&self) -> Instant {
        self.begun
    }
}

/// Begins to read all partitions from that time on; says which.
fn begin(consumer: &BaseConsumer<Quiet>, topic: &str, since_millis: i64) -> KafkaResult<HashSet<i32>> {
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
        return Ok(HashSet::new());
    }
    let starts = consumer.offsets_for_times(times, ANSWER_WITHIN)?;
    for start in starts.elements() {
        start.error()?;
    }
    consumer.assign(&starts)?;
    Ok(starts.elements().iter().map(|start| start.partition()).collect())
}

/// Whether waiting does not help. A right to the group is not needed, though librdkafka asks for it.
pub fn is_forbidden(error: &KafkaError) -> bool {
    error.rdkafka_error_code() == Some(RDKafkaErrorCode::TopicAuthorizationFailed)
}

/// The producer's context says what is wrong with Kafka.
struct Quiet;

impl ClientContext for Quiet {
    fn log(&self, _level: RDKafkaLogLevel, facility: &str, text: &str) {
        log::debug!("librdkafka {facility} {text}");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        log::debug!("librdkafka {error}: {reason}");
    }
}

impl ConsumerContext for Quiet {}
