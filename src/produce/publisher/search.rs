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
use super::worker::Worker;
use crate::clock::instant_now;
use crate::config::KafkaConfig;
use crate::kafka::look_up_topic;
use crate::kafka::reader::{Part, Quiet, Reader, is_forbidden};
use crate::produce::outbox::{Kept, Sequence};

/// How long one question to Kafka may take. The publisher's thread waits for the answer and sends nothing meanwhile. There are
/// two questions.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
const QUESTIONS_WITHIN: Duration = ANSWER_WITHIN.saturating_mul(2);

/// How much the clocks may differ if a topic's records have the broker's time instead of ours.
const CLOCKS_DIFFER_MILLIS: i64 = 60_000;

/// How long the thread searches before it does something else, how long it waits after a failed attempt, and after how long it
/// gives up: a minute is enough to read what a full buffer may have left in a topic.
const SEARCH_STEP: Duration = Duration::from_millis(100);
const SEARCH_AGAIN_AFTER: Duration = Duration::from_secs(1);
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
    fn new(kafka: &KafkaConfig, wanted: &BTreeMap<Sequence, Kept<Record>>) -> KafkaResult<Self> {
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
}

impl Worker {
    /// Removes the records that Kafka has stored from those that wait. Returns whether the search is over. If Kafka does not let
    /// us read, or not in time, the records are sent again: two records of a tick are better than none.
    pub(super) fn search_stored(&mut self) -> bool {
        let now = instant_now();
        let is_early = |at: Instant| now.duration_since(at) < SEARCH_AGAIN_AFTER;
        let is_late = |stop_by: Instant| now + QUESTIONS_WITHIN > stop_by;
        if self.search_failed_at.is_some_and(is_early) || self.stop_by.is_some_and(is_late) {
            return false;
        }
        while let Some(index) = self
            .topics
            .iter()
            .position(|topic| topic.in_doubt_since.is_some())
        {
            match self.search_topic(index) {
                Ok(true) => {}
                Ok(false) => return false,
                Err(error) if is_forbidden(&error) => self.give_up_search(index, &error.to_string()),
                Err(error) => {
                    // The client stays, and may connect before the next attempt.
                    log::debug!("cannot search for stored records: {error}");
                    self.search_failed_at = Some(now);
                    return false;
                }
            }
        }
        true
    }

    /// Searches for a while; the first call takes longer, because it asks Kafka two questions. Returns whether the search is over.
    ///
    /// # Errors
    /// Kafka does not allow it, or did not answer the questions. Other errors are retried.
    fn search_topic(&mut self, index: usize) -> KafkaResult<bool> {
        let topic = &mut self.topics[index];
        let route = self
            .routes
            .iter()
            .find(|route| route.topic == index && route.share.is_none());
        let (Some(since), Some(route)) = (topic.in_doubt_since, route) else {
            topic.in_doubt_since = None;
            self.search = None;
            return Ok(true);
        };
        let lane = route.lane;
        let waiting = self.outbox.waiting(lane);
        let Search {
            reader,
            wanted,
            hasher,
            begun,
        } = match &mut self.search {
            Some(search) => search,
            none => none.insert(Search::new(&self.kafka, waiting)?),
        };
        if begun.is_none() {
            let parts = parts_since(reader.consumer(), &topic.name, since)?;
            reader.begin(&topic.name, &parts)?;
        }
        let begun = *begun.get_or_insert_with(instant_now);
        let mut found = HashSet::new();
        let has_ended = reader.go_on(instant_now() + SEARCH_STEP, |_, value| {
            if let Some(sequence) = wanted.get(&hasher.hash_one(value))
                && waiting
                    .get(sequence)
                    .is_some_and(|kept| kept.record.value == value)
            {
                found.insert(*sequence);
            }
        })?;
        let stored = self.outbox.discard(lane, |sequence, _| found.contains(&sequence));
        self.found_stored += stored.len();
        self.release(lane, stored, true);
        let is_over = has_ended || self.outbox.waiting(lane).is_empty();
        if is_over {
            self.search = None;
            self.topics[index].in_doubt_since = None;
        } else if instant_now().duration_since(begun) > SEARCH_WITHIN {
            self.give_up_search(index, "reading it took too long");
            return Ok(true);
        }
        Ok(is_over)
    }

    fn give_up_search(&mut self, index: usize, why: &str) {
        let topic = &mut self.topics[index];
        log::warn!(
            "topic={} may contain some records twice, because it cannot be searched for those that Kafka stored without acknowledging them: {why}",
            topic.name
        );
        topic.in_doubt_since = None;
        self.search = None;
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
