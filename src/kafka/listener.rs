//! What librdkafka reports to the small clients (`client`) and to those of `init`, `drop`, `status` and `tail`.

use std::sync::Mutex;

use rdkafka::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::ConsumerContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{DeliveryResult, ProducerContext};

use super::explain::Explainer;
use crate::config::KafkaConfig;
use crate::lock::lock;

/// Keeps the last error that names a cause, and logs everything else at DEBUG: while no broker answers, librdkafka writes
/// many lines a second.
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

    /// The code and the explained cause of the last error that named one.
    pub fn last(&self) -> Option<(Option<RDKafkaErrorCode>, String)> {
        let last = lock(&self.last);
        let (code, cause) = last.as_ref()?;
        Some((*code, self.explainer.explain(cause)))
    }

    /// An error that a call of the client returned, explained.
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
        // "All brokers are down" follows an error that names the cause.
        if code != Some(RDKafkaErrorCode::AllBrokersDown) {
            let last = (code, reason.to_owned());
            *lock(&self.last) = Some(last);
        }
    }
}

impl ProducerContext for Listener {
    type DeliveryOpaque = ();

    fn delivery(&self, _: &DeliveryResult<'_>, (): ()) {}
}

impl ConsumerContext for Listener {}
