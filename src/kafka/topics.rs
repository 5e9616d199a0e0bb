//! The lookup of a topic in Kafka's metadata.

use std::time::Duration;

use rdkafka::ClientContext;
use rdkafka::client::Client;
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};

/// A partition by its topic's name.
pub type Named = (String, i32);

/// A partition and the `host:port` of the broker that leads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicPartition {
    pub number: i32,
    /// `None` while the partition has no leader.
    pub leader: Option<String>,
}

/// The partitions of a topic, by number. There is at least one.
///
/// # Errors
/// No broker answered within that time, or the topic does not exist or may not be read.
pub fn partitions<C: ClientContext>(
    client: &Client<C>,
    topic: &str,
    within: Duration,
) -> KafkaResult<Vec<TopicPartition>> {
    look_up_topic(client, topic, within)?.map_err(KafkaError::MetadataFetch)
}

/// As [`partitions`], for callers that distinguish between a Kafka that does not answer and a topic that does not exist or may
/// not be read (the inner error).
pub fn look_up_topic<C: ClientContext>(
    client: &Client<C>,
    topic: &str,
    within: Duration,
) -> KafkaResult<Result<Vec<TopicPartition>, RDKafkaErrorCode>> {
    let metadata = client.fetch_metadata(Some(topic), within)?;
    let found = metadata.topics().iter().find(|found| found.name() == topic);
    let Some(found) = found.filter(|found| found.error().is_some() || !found.partitions().is_empty()) else {
        return Ok(Err(RDKafkaErrorCode::UnknownTopicOrPartition));
    };
    if let Some(error) = found.error() {
        return Ok(Err(RDKafkaErrorCode::from(error)));
    }
    let leader = |id: i32| {
        let broker = metadata.brokers().iter().find(|broker| broker.id() == id)?;
        Some(server(broker.host(), broker.port()))
    };
    let mut partitions: Vec<TopicPartition> = found
        .partitions()
        .iter()
        .map(|partition| TopicPartition {
            number: partition.id(),
            leader: leader(partition.leader()),
        })
        .collect();
    partitions.sort_unstable_by_key(|partition| partition.number);
    Ok(Ok(partitions))
}

/// `host:port`, with brackets around an IPv6 address.
fn server(host: &str, port: i32) -> String {
    match host.contains(':') {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
    }
}

#[cfg(test)]
mod tests {
    use rdkafka::ClientConfig;
    use rdkafka::consumer::{BaseConsumer, Consumer};
    use rdkafka::mocking::MockCluster;

    use super::*;

    #[test]
    fn the_partitions_of_a_topic_have_their_leader_and_an_unknown_topic_is_an_error() {
        const WITHIN: Duration = Duration::from_secs(30);
        let kafka = MockCluster::new(1).unwrap();
        kafka.create_topic("t", 3, 1).unwrap();
        let client: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", kafka.bootstrap_servers())
            .create()
            .unwrap();
        let found = partitions(client.client(), "t", WITHIN).unwrap();
        let numbers: Vec<i32> = found.iter().map(|partition| partition.number).collect();
        assert_eq!(numbers, [0, 1, 2]);
        let leader = Some(kafka.bootstrap_servers());
        assert!(
            found.iter().all(|partition| partition.leader == leader),
            "{found:?}"
        );
        assert!(partitions(client.client(), "no such topic", WITHIN).is_err());
    }

    #[test]
    fn an_ipv6_address_is_written_in_brackets() {
        assert_eq!(server("::1", 9092), "[::1]:9092");
        assert_eq!(server("one.example", 9092), "one.example:9092");
    }
}
