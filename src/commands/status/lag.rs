//! How far the tables are behind Kafka: the positions of the tables beside the ends of the partitions.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::{Offset, TopicPartitionList};

use crate::config::KafkaConfig;
use crate::kafka::{Listener, client_config, look_up_topic, reason};

/// All questions to Kafka together: a person waits, and what the tables say is told either way.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);

/// One partition's share of the lag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lag {
    pub topic: String,
    pub partition: i32,
    /// `None`: nothing of it was stored yet, and all of it is lag.
    pub next_offset: Option<i64>,
    /// Behind the last record that can be read.
    pub end_offset: i64,
    /// Offsets, and so records at most: compaction and transactions leave gaps.
    pub records: i64,
}

/// Asks Kafka for the ends of all partitions of `topics`, and of those that have a position.
///
/// # Errors
/// Kafka did not answer in time, or not so: why, for a person.
pub fn lag(
    kafka: &KafkaConfig,
    topics: &[String],
    positions: &BTreeMap<(String, i32), i64>,
) -> Result<Vec<Lag>, String> {
    let deadline = now() + ANSWERS_WITHIN;
    let mut config = client_config(kafka);
    // The end is where `consume` would stop reading. Without a group there is nothing to join or to leave.
    config.set("isolation.level", "read_committed");
    let client: BaseConsumer<Listener> = config
        .create_with_context(Listener::new(kafka))
        .map_err(|error| error.to_string())?;
    let asked = ask(&client, topics, positions, deadline);
    asked.map_err(|error| match error {
        Ask::Kafka(error) => format!(
            "Kafka at {}: {}",
            kafka.bootstrap_servers,
            reason(&client, &error)
        ),
        Ask::NoTopic(topic, why) => format!("topic {topic}: {why}"),
    })
}

#[derive(Debug)]
enum Ask {
    Kafka(KafkaError),
    NoTopic(String, String),
}

impl From<KafkaError> for Ask {
    fn from(error: KafkaError) -> Self {
        Self::Kafka(error)
    }
}

fn ask(
    client: &BaseConsumer<Listener>,
    topics: &[String],
    positions: &BTreeMap<(String, i32), i64>,
    deadline: Instant,
) -> Result<Vec<Lag>, Ask> {
    let left = || deadline.saturating_duration_since(now());
    let mut partitions: BTreeSet<(String, i32)> = positions.keys().cloned().collect();
    for topic in topics {
        match look_up_topic(client.client(), topic, left())? {
            // One of the past, perhaps; what has a position is asked for below.
            Err(error) if positions.keys().any(|(known, _)| known == topic) => {
                log::debug!("topic {topic}: {error}");
            }
            Err(error) => return Err(Ask::NoTopic(topic.clone(), error.to_string())),
            Ok(found) => partitions.extend(found.iter().map(|found| (topic.clone(), found.number))),
        }
    }
    let ends = offsets(client, partitions.iter(), Offset::End, left())?;
    let new = partitions
        .iter()
        .filter(|partition| !positions.contains_key(*partition));
    let beginnings = offsets(client, new, Offset::Beginning, left())?;
    let lag = |(partition, end): (&(String, i32), &i64)| {
        let next_offset = positions.get(partition).copied();
        let from = next_offset.or_else(|| beginnings.get(partition).copied());
        Lag {
            topic: partition.0.clone(),
            partition: partition.1,
            next_offset,
            end_offset: *end,
            records: end.saturating_sub(from.unwrap_or(*end)).max(0),
        }
    };
    Ok(ends.iter().map(lag).collect())
}

/// The ends or beginnings of partitions, all of a broker's in one question.
fn offsets<'a>(
    client: &BaseConsumer<Listener>,
    partitions: impl Iterator<Item = &'a (String, i32)>,
    which: Offset,
    within: Duration,
) -> Result<BTreeMap<(String, i32), i64>, KafkaError> {
    let mut list = TopicPartitionList::new();
    for (topic, number) in partitions {
        list.add_partition_offset(topic, *number, which)?;
    }
    if list.count() == 0 {
        return Ok(BTreeMap::new());
    }
    // "Latest" and "earliest" are times to Kafka (ListOffsets: -1 and -2).
    let found = client.offsets_for_times(list, within)?;
    let mut offsets = BTreeMap::new();
    for element in found.elements() {
        element.error()?;
        let partition = (element.topic().to_owned(), element.partition());
        match element.offset() {
            Offset::Offset(offset) => offsets.insert(partition, offset),
            // The answer for a partition without any record.
            _ => offsets.insert(partition, 0),
        };
    }
    Ok(offsets)
}

#[expect(clippy::disallowed_methods, reason = "an edge: the answers have their time")]
fn now() -> Instant {
    Instant::now()
}
