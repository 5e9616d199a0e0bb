//! The publisher's producer: its settings, what it calls back with, and who is to blame for a record that did not get through.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Context as _;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{BaseProducer, DeliveryResult, ProducerContext};
use rdkafka::{ClientContext, Message};

use super::{Bounds, lock};
use crate::check::target::Target;
use crate::config::KafkaConfig;
use crate::kafka::Explainer;
use crate::produce::outbox::{LaneId, Sequence};
use crate::produce::share::Share;
use crate::sample::epoch::Epoch;

/// Everything that matters is said, the library's default or not.
pub(super) fn client_config(kafka: &KafkaConfig, bounds: Bounds) -> ClientConfig {
    let mut config = ClientConfig::new();
    for (name, value) in kafka.client_properties() {
        config.set(name, value);
    }
    config
        .set("acks", "all")
        // No record twice after a retry, and none overtakes another of its partition.
        .set("enable.idempotence", "true")
        .set("max.in.flight.requests.per.connection", "5")
        // What Kafka's own clients do: other producers' records of a host land in the same partition.
        .set("partitioner", "murmur2_random")
        // Every broker and reader knows lz4, and it needs no state per connection as zstd does.
        .set("compression.type", "lz4")
        // librdkafka sends a request for every partition that has a record: the longer they gather, the fewer requests, and
        // records so alike compress well. A record's way to the table takes a second in any case.
        .set("linger.ms", "80")
        // Never: an outage is waited out. What is kept is bounded by `Bounds`, which librdkafka's own limits must not cut.
        .set("message.timeout.ms", "0")
        .set("queue.buffering.max.messages", (2 * bounds.records).to_string())
        .set(
            "queue.buffering.max.kbytes",
            (bounds.bytes / 512 + 1_024).to_string(),
        )
        .set("reconnect.backoff.ms", "100")
        .set("reconnect.backoff.max.ms", "2000")
        .set("retry.backoff.ms", "100")
        .set("retry.backoff.max.ms", "1000")
        .set("request.timeout.ms", "10000")
        .set("topic.metadata.refresh.interval.ms", "30000")
        // A topic just made is not known to all brokers at once.
        .set("topic.metadata.propagation.max.ms", "30000")
        // A line for each failed attempt is what an outage does not need: `Context` keeps the last one.
        .set_log_level(RDKafkaLogLevel::Warning);
    config
}

pub(super) fn new_producer(
    config: &ClientConfig,
    explainer: &Explainer,
) -> anyhow::Result<BaseProducer<Context>> {
    config
        .create_with_context(Context::new(explainer.clone()))
        .context("cannot create the Kafka producer")
}

/// Who is to blame for a record that did not get through.
pub(super) enum Fault {
    /// The record itself: it never will.
    Record,
    /// Its topic: missing, or forbidden. It may be there later.
    Topic(String),
    /// The producer, or something unforeseen: another one may get it through.
    Producer(String),
    /// Nobody: it was taken back, or there was no room.
    HandedBack,
}

impl Fault {
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
            Some(Code::PurgeQueue | Code::PurgeInflight | Code::QueueFull | Code::Fatal) => Self::HandedBack,
            _ => Self::Producer(error.to_string()),
        }
    }
}

/// What librdkafka keeps for us with everything that is sent and hands back with its report.
pub(super) enum Sent {
    Record {
        lane: LaneId,
        sequence: Sequence,
        target: Arc<Target>,
        tick: i64,
        bytes: usize,
        /// Unix time: librdkafka does not tell the timestamp of a record that failed.
        at_millis: i64,
    },
    Claim {
        share: Share,
        epoch: Epoch,
    },
}

pub(super) struct Report {
    pub(super) sent: Box<Sent>,
    /// The offset; or why it failed, and the value back.
    pub(super) outcome: Result<i64, (KafkaError, Vec<u8>)>,
}

/// Collects what librdkafka calls back with, all on the publisher's thread, from within `poll`.
pub(super) struct Context {
    explainer: Explainer,
    /// Callbacks so far.
    pub(super) events: AtomicUsize,
    reports: Mutex<Vec<Report>>,
    last_error: Mutex<Option<String>>,
}

impl Context {
    pub(super) fn new(explainer: Explainer) -> Self {
        Self {
            explainer,
            events: AtomicUsize::default(),
            reports: Mutex::default(),
            last_error: Mutex::default(),
        }
    }

    pub(super) fn take_reports(&self) -> Vec<Report> {
        std::mem::take(&mut lock(&self.reports))
    }

    /// With what it means for the operator.
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
        // "all brokers are down" says nothing that the reasons before it do not say better.
        if error.rdkafka_error_code() != Some(RDKafkaErrorCode::AllBrokersDown) {
            *lock(&self.last_error) = Some(reason.to_owned());
        }
    }
}

impl ProducerContext for Context {
    type DeliveryOpaque = Box<Sent>;

    fn delivery(&self, result: &DeliveryResult<'_>, sent: Self::DeliveryOpaque) {
        self.events.fetch_add(1, Ordering::Relaxed);
        let outcome = match result {
            Ok(message) => Ok(message.offset()),
            Err((error, message)) => Err((error.clone(), message.payload().unwrap_or_default().to_vec())),
        };
        lock(&self.reports).push(Report { sent, outcome });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_the_records_own_fault_is_given_up() {
        use RDKafkaErrorCode as Code;
        let of = |code| Fault::of(&KafkaError::MessageProduction(code));
        for code in [Code::MessageSizeTooLarge, Code::InvalidRecord] {
            assert!(matches!(of(code), Fault::Record), "{code}");
        }
        for code in [Code::UnknownTopic, Code::TopicAuthorizationFailed] {
            assert!(matches!(of(code), Fault::Topic(_)), "{code}");
        }
        for code in [
            Code::OutOfOrderSequenceNumber,
            Code::ClusterAuthorizationFailed,
            Code::MessageTimedOut,
        ] {
            assert!(matches!(of(code), Fault::Producer(_)), "{code}");
        }
        for code in [Code::PurgeQueue, Code::QueueFull] {
            assert!(matches!(of(code), Fault::HandedBack), "{code}");
        }
    }
}
