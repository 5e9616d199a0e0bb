//! The Kafka producer: its settings, its callbacks, and the causes of failed deliveries.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Context as _;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{BaseProducer, DeliveryResult, ProducerContext};
use rdkafka::{ClientContext, Message};

use super::shared::{Bounds, Record};
use crate::config::KafkaConfig;
use crate::kafka::Explainer;
use crate::lock::lock;
use crate::produce::outbox::{Kept, LaneId, Sequence};
use crate::produce::share::Share;
use crate::sample::epoch::Epoch;

/// Contains every setting that matters, even if it is librdkafka's default.
fn client_config(kafka: &KafkaConfig, bounds: Bounds) -> ClientConfig {
    let mut config = crate::kafka::client_config(kafka);
    config
        .set("acks", "all")
        // Retries neither duplicate nor reorder the records of a partition.
        .set("enable.idempotence", "true")
        .set("max.in.flight.requests.per.connection", "5")
        // As in Kafka's own clients, so that they choose the same partition for a host.
        .set("partitioner", "murmur2_random")
        // Every broker and reader supports it, and unlike zstd it needs no state per connection.
        .set("compression.type", "lz4")
        // librdkafka sends one request per partition. A longer wait means fewer requests and better compression, and the way
        // to the table takes a second in any case.
        .set("linger.ms", "80")
        // Never give up: `Bounds` limits the records, and librdkafka's own limits have to be higher.
        .set("message.timeout.ms", "0")
        .set("queue.buffering.max.messages", (2 * bounds.records).to_string())
        .set(
            "queue.buffering.max.kbytes",
            (bounds.bytes / 512 + 1_024).to_string(),
        )
        .set("retry.backoff.ms", "100")
        .set("retry.backoff.max.ms", "1000")
        .set("request.timeout.ms", "10000")
        .set("topic.metadata.refresh.interval.ms", "30000")
        // Not all brokers know a new topic at once.
        .set("topic.metadata.propagation.max.ms", "30000")
        // Without a line for each failed attempt: `Context` keeps the last error.
        .set_log_level(RDKafkaLogLevel::Warning);
    config
}

pub(super) fn new_producer(
    kafka: &KafkaConfig,
    bounds: Bounds,
    explainer: &Explainer,
) -> anyhow::Result<BaseProducer<Context>> {
    client_config(kafka, bounds)
        .create_with_context(Context {
            explainer: explainer.clone(),
            events: AtomicUsize::default(),
            reports: Mutex::default(),
            last_error: Mutex::default(),
        })
        .context("cannot create the Kafka producer")
}

/// Why a record was not delivered.
pub(super) enum SendFailure {
    /// Kafka will never take this record.
    Record,
    /// Its topic is missing or forbidden.
    Topic(String),
    /// The producer has failed. A new one may deliver the record.
    Producer(String),
    /// It was returned on request, or the queue was full.
    Returned,
}

impl SendFailure {
    pub(super) fn of(error: &KafkaError) -> Self {
        use RDKafkaErrorCode as Code;
        match error.rdkafka_error_code() {
            Some(
                Code::MessageSizeTooLarge
                | Code::InvalidMessage
                | Code::InvalidMessageSize
                | Code::InvalidTimestamp
                | Code::InvalidRecord
                | Code::PolicyViolation,
            ) => Self::Record,
            Some(
                code @ (Code::UnknownTopic
                | Code::UnknownTopicOrPartition
                | Code::UnknownPartition
                | Code::InvalidTopic
                | Code::TopicAuthorizationFailed),
            ) => Self::Topic(code.to_string()),
            Some(Code::PurgeQueue | Code::PurgeInflight | Code::QueueFull | Code::Fatal) => Self::Returned,
            _ => Self::Producer(error.to_string()),
        }
    }
}

/// What librdkafka returns with the report about a record or claim.
pub(super) enum Sent {
    Record {
        lane: LaneId,
        sequence: Sequence,
        /// librdkafka has the value. It comes back if the record was not delivered, or a copy of it is needed.
        kept: Kept<Record>,
        /// When it was sent (Unix time): the report of a failed record has no timestamp.
        at_millis: i64,
    },
    Claim {
        share: Share,
        epoch: Epoch,
    },
}

pub(super) struct Report {
    pub(super) sent: Box<Sent>,
    /// The offset.
    pub(super) outcome: Result<i64, KafkaError>,
}

/// Collects what librdkafka reports. All callbacks run on the publisher's thread, during `poll`.
pub(super) struct Context {
    explainer: Explainer,
    /// The number of callbacks so far.
    pub(super) events: AtomicUsize,
    reports: Mutex<Vec<Report>>,
    last_error: Mutex<Option<String>>,
}

impl Context {
    pub(super) fn take_reports(&self) -> Vec<Report> {
        std::mem::take(&mut lock(&self.reports))
    }

    /// The last error, explained to the operator.
    pub(super) fn last_error(&self) -> Option<String> {
        let last = lock(&self.last_error).clone();
        last.map(|reason| self.explainer.explain(&reason))
    }

    pub(super) fn forget_error(&self) {
        *lock(&self.last_error) = None;
    }
}

impl ClientContext for Context {
    fn log(&self, _level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.events.fetch_add(1, Ordering::Relaxed);
        log::debug!("librdkafka {facility} {message}");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.events.fetch_add(1, Ordering::Relaxed);
        log::debug!("librdkafka {error}: {reason}");
        self.explainer.hear(&error, reason);
        // It follows errors that name the cause.
        if error.rdkafka_error_code() != Some(RDKafkaErrorCode::AllBrokersDown) {
            *lock(&self.last_error) = Some(reason.to_owned());
        }
    }
}

impl ProducerContext for Context {
    type DeliveryOpaque = Box<Sent>;

    fn delivery(&self, result: &DeliveryResult<'_>, mut sent: Self::DeliveryOpaque) {
        self.events.fetch_add(1, Ordering::Relaxed);
        let (outcome, message) = match result {
            Ok(message) => (Ok(message.offset()), message),
            Err((error, message)) => (Err(error.clone()), message),
        };
        if let Sent::Record { kept, .. } = &mut *sent
            && (outcome.is_err() || kept.record.is_failed_check)
        {
            kept.record.value = message.payload().unwrap_or_default().to_vec();
        }
        lock(&self.reports).push(Report { sent, outcome });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_record_that_kafka_never_takes_is_given_up() {
        use RDKafkaErrorCode as Code;
        let of = |code| SendFailure::of(&KafkaError::MessageProduction(code));
        for code in [Code::MessageSizeTooLarge, Code::InvalidRecord] {
            assert!(matches!(of(code), SendFailure::Record), "{code}");
        }
        for code in [Code::UnknownTopic, Code::TopicAuthorizationFailed] {
            assert!(matches!(of(code), SendFailure::Topic(_)), "{code}");
        }
        for code in [
            Code::OutOfOrderSequenceNumber,
            Code::ClusterAuthorizationFailed,
            Code::MessageTimedOut,
        ] {
            assert!(matches!(of(code), SendFailure::Producer(_)), "{code}");
        }
        for code in [Code::PurgeQueue, Code::QueueFull] {
            assert!(matches!(of(code), SendFailure::Returned), "{code}");
        }
    }
}
