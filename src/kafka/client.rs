//! A client that asks Kafka a question or two and ends: it joins no group and reads no record.

use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, KafkaResult};

use super::listener::Listener;
use super::settings::client_config;
use crate::clock::instant_now;
use crate::config::KafkaConfig;

/// The client, with a listener that keeps the reason of its last error.
///
/// # Errors
/// librdkafka does not accept the configuration. A server that cannot be reached is no error here.
pub fn small_client(kafka: &KafkaConfig) -> KafkaResult<BaseConsumer<Listener>> {
    client_config(kafka).create_with_context(Listener::new(kafka))
}

/// The cause of an error that a call returned. The call itself often reports only that the time is over; librdkafka reports the
/// cause separately.
pub fn reason(client: &BaseConsumer<Listener>, error: &KafkaError) -> String {
    // librdkafka reports the cause within milliseconds of the error, or not at all.
    const WITHIN: Duration = Duration::from_millis(500);
    let deadline = instant_now() + WITHIN;
    while instant_now() < deadline {
        // Each call delivers one of the errors that are waiting.
        client.poll(WITHIN / 10);
        if let Some((_, reason)) = client.context().last() {
            return reason;
        }
    }
    client.context().explain(error)
}
