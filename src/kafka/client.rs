//! A client that asks Kafka a question or two and ends: it joins no group and reads no record.

use rdkafka::consumer::BaseConsumer;
use rdkafka::error::KafkaResult;

use super::{Listener, client_config};
use crate::config::KafkaConfig;

/// The client, with a listener that keeps the reason of its last error.
///
/// # Errors
/// librdkafka does not accept the configuration. A server that cannot be reached is no error here.
pub fn small_client(kafka: &KafkaConfig) -> KafkaResult<BaseConsumer<Listener>> {
    client_config(kafka).create_with_context(Listener::new(kafka))
}
