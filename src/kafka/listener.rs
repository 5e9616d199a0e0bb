//! What a client of Kafka's says that asks a question or two and goes, for `init`, `drop` and `status`.

use std::sync::{Mutex, PoisonError};

use rdkafka::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::ConsumerContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{DeliveryResult, ProducerContext};

use crate::config::KafkaConfig;
use crate::kafka::Explainer;

/// The settings of such a client.
pub fn client_config(kafka: &KafkaConfig) -> ClientConfig {
    let mut client = ClientConfig::new();
    for (property, value) in kafka.client_properties() {
        client.set(property, value);
    }
    client
}

/// Keeps librdkafka's own lines, many a second while no broker answers, for debugging, and the last error that names a
/// cause for whoever asked.
pub struct Listener {
    explainer: Explainer,
    last: Mutex<Option<(Option<RDKafkaErrorCode>, String)>>,
}

impl Listener {
    pub fn new(kafka: &KafkaConfig) -> Self {
        Self {
            explainer: Explainer::new(kafka),
            last: Mutex::default(),
        }
    }

    /// The code and the cause, explained, of the last error that named one.
    pub fn last(&self) -> Option<(Option<RDKafkaErrorCode>, String)> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let (code, cause) = last.as_ref()?;
        Some((*code, self.explainer.explain(cause)))
    }

    /// What else the client's errors say, explained.
    pub fn explain(&self, error: &KafkaError) -> String {
        self.explainer.explain(&error.to_string())
    }
}

impl ClientContext for Listener {
    fn log(&self, _level: RDKafkaLogLevel, facility: &str, text: &str) {
        log::debug!("librdkafka {facility} {text}");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        log::debug!("librdkafka {error}: {reason}");
        self.explainer.hear(&error, reason);
        let code = error.rdkafka_error_code();
        // That all brokers are down repeats without a cause what the error before it said with one.
        if code != Some(RDKafkaErrorCode::AllBrokersDown) {
            let last = (code, reason.to_owned());
            *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(last);
        }
    }
}

impl ProducerContext for Listener {
    type DeliveryOpaque = ();

    fn delivery(&self, _: &DeliveryResult<'_>, (): ()) {}
}

impl ConsumerContext for Listener {}
