//! The lag of the tables behind Kafka: the ends of the partitions minus the positions in the tables.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::{Offset, TopicPartitionList};
use serde::Serialize;

use crate::clock::instant_now;
use crate::config::KafkaConfig;
use crate::kafka::{Listener, client_config, look_up_topic, reason};

/// Bounds all requests to Kafka together, because a person waits and the tables are reported anyway.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);

/// The lag of one partition, as the JSON document has it too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Lag {
    pub topic: String,
    pub partition: i32,
    /// `None`: nothing is stored yet, and all records count as lag.
    pub next_offset: Option<i64>,
    /// The offset after the last record that can be read.
    pub end_offset: i64,
    /// A number of offsets; compaction and transactions leave gaps, so there may be fewer records.
    #[serde(rename = "lag_records")]
    pub records: i64,
}

/// Asks Kafka for the ends of all partitions of `topics`, and of those that have a position.
///
/// # Errors
/// Kafka did not answer in time, or refused; the reason for a person.
pub(super) fn lag(
    kafka: &KafkaConfig,
    topics: &[String],
    positions: &BTreeMap<(String, i32), i64>,
) -> Result<Vec<Lag>, String> {
    let deadline = instant_now() + ANSWERS_WITHIN;
    let mut config = client_config(kafka);
    // As for `consume`, which cannot read beyond the end of the last committed transaction.
    config.set("isolation.level", "read_committed");
    let client: BaseConsumer<Listener> = config
        .create_with_context(Listener::new(kafka))
        .map_err(|error| error.to_string())?;
    let failed = |error: KafkaError| {
        format!(
            "Kafka at {}: {}",
            kafka.bootstrap_servers,
            reason(&client, &error)
        )
    };
    let left = || deadline.saturating_duration_since(instant_now());
    let mut partitions: BTreeSet<(String, i32)> = positions.keys().cloned().collect();
    for topic in topics {
        match look_up_topic(client.client(), topic, left()).map_err(failed)? {
            // The topic may have been deleted. Its positions are still reported.
            Err(error) if positions.keys().any(|(known, _)| known == topic) => {
                log::debug!("topic {topic}: {error}");
            }
            Err(error) => return Err(format!("topic {topic}: {error}")),
            Ok(found) => partitions.extend(found.iter().map(|found| (topic.clone(), found.number))),
        }
    }
    let ends = offsets(&client, partitions.iter(), Offset::End, left()).map_err(failed)?;
    let new = partitions
        .iter()
        .filter(|partition| !positions.contains_key(*partition));
    let beginnings = offsets(&client, new, Offset::Beginning, left()).map_err(failed)?;
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

/// The ends or beginnings of partitions, with one request per broker.
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
    // Kafka's ListOffsets takes the end and the beginning as the times -1 and -2.
    let found = client.offsets_for_times(list, within)?;
    let mut offsets = BTreeMap::new();
    for element in found.elements() {
        element.error()?;
        let partition = (element.topic().to_owned(), element.partition());
        match element.offset() {
            Offset::Offset(offset) => offsets.insert(partition, offset),
            // The partition is empty.
            _ => offsets.insert(partition, 0),
        };
    }
    Ok(offsets)
}
