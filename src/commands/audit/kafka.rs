//! What Kafka has at the offsets that are not stored.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::{Duration, Instant};

use rdkafka::Message;
use rdkafka::consumer::Consumer;
use rdkafka::error::KafkaError;
use rdkafka::message::BorrowedMessage;

use crate::clock::instant_now;
use crate::commands::audit::offsets::length;
use crate::config::KafkaConfig;
use crate::kafka::reader::{Part, Reader};
use crate::kafka::{self, reason};
use crate::sample::epoch::Claim;
use crate::sample::{self, Timestamp};

/// One question to Kafka. A person waits; without an answer the audit says what it does not know.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);

/// Reading all ranges. A sound table has few missing offsets, and each costs a fetch.
const READ_WITHIN: Duration = Duration::from_secs(60);

/// Partitions, each with offsets that are not stored, in ascending order.
pub(super) type Missing = BTreeMap<(String, i32), Vec<Range<i64>>>;

/// What was found at the missing offsets. Counts are offsets.
#[derive(Debug, Default)]
pub(super) struct KafkaFindings {
    /// Kafka has a record there, which should be stored.
    pub lost: Missing,
    pub claims: i64,
    /// Records whose rows DB_RETENTION has removed.
    pub expired: i64,
    /// Compacted records, records of aborted transactions, and markers of transactions.
    pub no_record: i64,
    /// How many offsets it is not known of, by the reason.
    pub unknown: BTreeMap<String, i64>,
}

impl KafkaFindings {
    pub(super) fn add_unknown(&mut self, why: impl Into<String>, offsets: i64) {
        if offsets > 0 {
            *self.unknown.entry(why.into()).or_default() += offsets;
        }
    }

    fn add(&mut self, topic: &str, message: &BorrowedMessage<'_>, kept_since: Option<i64>) {
        let value = message.payload().unwrap_or_default();
        let sent_at = message
            .timestamp()
            .to_millis()
            .map(|millis| millis.saturating_mul(1_000));
        let scheduled_at = match sample::decode(value) {
            Err(_) if Claim::decode(value).is_some() => {
                self.claims += 1;
                return;
            }
            Err(_) => None,
            Ok(sample) => sample.scheduled_at.map(Timestamp::unix_micros).or(sent_at),
        };
        if scheduled_at < kept_since && scheduled_at.is_some() {
            self.expired += 1;
            return;
        }
        let partition = (topic.to_owned(), message.partition());
        let lost = self.lost.entry(partition).or_default();
        match lost.last_mut() {
            Some(range) if range.end == message.offset() => range.end += 1,
            _ => lost.push(message.offset()..message.offset() + 1),
        }
    }
}

/// Looks the missing offsets up. Rows from before `kept_since` (microseconds since the Unix epoch) may have been removed.
pub(super) fn look_up(kafka: &KafkaConfig, missing: &Missing, kept_since: Option<i64>) -> KafkaFindings {
    let mut found = KafkaFindings::default();
    let topics: BTreeSet<&str> = missing.keys().map(|(topic, _)| topic.as_str()).collect();
    let deadline = instant_now() + READ_WITHIN;
    for topic in topics {
        let of_topic: Vec<(i32, &[Range<i64>])> = missing
            .iter()
            .filter(|((name, _), _)| name == topic)
            .map(|((_, partition), ranges)| (*partition, ranges.as_slice()))
            .collect();
        let all: i64 = of_topic.iter().flat_map(|(_, ranges)| *ranges).map(length).sum();
        match readable(kafka, topic, &of_topic, &mut found) {
            Ok(readable) => {
                if let Err(error) = read(kafka, topic, &readable, kept_since, deadline, &mut found) {
                    log::warn!("topic {topic}: {error}");
                }
            }
            Err(why) => found.add_unknown(format!("topic {topic}: {why}"), all),
        }
    }
    found
}

/// The ranges that Kafka still has, for each partition.
fn readable(
    kafka: &KafkaConfig,
    topic: &str,
    missing: &[(i32, &[Range<i64>])],
    found: &mut KafkaFindings,
) -> Result<BTreeMap<i32, Vec<Range<i64>>>, String> {
    let client = kafka::small_client(kafka).map_err(|error| error.to_string())?;
    let mut readable = BTreeMap::new();
    for (partition, ranges) in missing {
        let (low, high) = client
            .fetch_watermarks(topic, *partition, ANSWERS_WITHIN)
            .map_err(|error| reason(&client, &error))?;
        let mut left = Vec::new();
        for range in *ranges {
            let before = range.start..range.end.min(low);
            let after = range.start.max(high)..range.end;
            found.add_unknown("older than what Kafka keeps", length(&before).max(0));
            found.add_unknown(
                format!("beyond the end of topic {topic}, which was probably recreated"),
                length(&after).max(0),
            );
            let inside = range.start.max(low)..range.end.min(high);
            if !inside.is_empty() {
                left.push(inside);
            }
        }
        readable.insert(*partition, left);
    }
    Ok(readable)
}

/// Reads the ranges: the first of each partition at once, then the second, and so on.
fn read(
    kafka: &KafkaConfig,
    topic: &str,
    readable: &BTreeMap<i32, Vec<Range<i64>>>,
    kept_since: Option<i64>,
    deadline: Instant,
    found: &mut KafkaFindings,
) -> Result<(), KafkaError> {
    let rounds = readable.values().map(Vec::len).max().unwrap_or_default();
    let mut reader = Reader::committed(kafka)?;
    for round in 0..rounds {
        let ranges: BTreeMap<i32, &Range<i64>> = readable
            .iter()
            .filter_map(|(partition, ranges)| Some((*partition, ranges.get(round)?)))
            .collect();
        let parts: Vec<Part> = ranges
            .iter()
            .map(|(partition, range)| Part {
                partition: *partition,
                from: range.start,
                to: Some(range.end),
                // The last ones may be markers of a transaction.
                to_is_stored: false,
            })
            .collect();
        reader.begin(topic, &parts)?;
        let mut records = 0;
        let is_read = reader.read(deadline, |message| {
            if !ranges
                .get(&message.partition())
                .is_some_and(|range| range.contains(&message.offset()))
            {
                return;
            }
            records += 1;
            found.add(topic, message, kept_since);
        });
        let offsets: i64 = ranges.values().map(|range| length(range)).sum();
        match is_read {
            Ok(true) => found.no_record += offsets - records,
            Ok(false) => found.add_unknown(
                format!(
                    "reading topic {topic} took longer than {} s",
                    READ_WITHIN.as_secs()
                ),
                offsets - records,
            ),
            Err(error) => {
                found.add_unknown(format!("topic {topic}: {error}"), offsets - records);
            }
        }
    }
    Ok(())
}
