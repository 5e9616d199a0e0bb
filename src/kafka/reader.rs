//! Reads parts of partitions, as a member of no group.
//!
//! Owns the one consumer that `produce` reads with: what its group left in the topic, and what Kafka stored of its own records
//! without saying so.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::{Message, Offset, TopicPartitionList};

use crate::clock::instant_now;
use crate::config::KafkaConfig;
use crate::kafka::client_config;

/// A part of a partition.
#[derive(Clone, Debug)]
pub struct Part {
    pub partition: i32,
    /// A position that the partition does not have, because the topic was made anew, is its beginning.
    pub from: i64,
    /// The first offset that is not read; `None`: all that is there.
    pub to: Option<i64>,
}

/// Parts that are being read.
pub struct Reader {
    consumer: BaseConsumer<Quiet>,
    /// What is not read to its end yet, and that.
    open: BTreeMap<i32, i64>,
}

impl Reader {
    /// # Errors
    /// librdkafka refuses the settings.
    pub fn new(kafka: &KafkaConfig) -> KafkaResult<Self> {
        let mut config = client_config(kafka);
        let consumer = config
            // librdkafka reads nothing without one. It is not joined, and nothing is committed.
            .set("group.id", "host-metrics-produce")
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            // What retention or a new topic took away is not there.
            .set("auto.offset.reset", "earliest")
            .set("isolation.level", "read_uncommitted")
            .set("enable.partition.eof", "true")
            .set("fetch.wait.max.ms", "50")
            .set("fetch.queue.backoff.ms", "10")
            .set("queued.max.messages.kbytes", "2048")
            .set_log_level(RDKafkaLogLevel::Warning)
            .create_with_context(Quiet)?;
        Ok(Self {
            consumer,
            open: BTreeMap::new(),
        })
    }

    /// For questions about a topic.
    pub fn consumer(&self) -> &impl Consumer<Quiet> {
        &self.consumer
    }

    /// Begins to read these parts of one topic (librdkafka says that a partition is at its end, and not of which topic), instead
    /// of those before.
    ///
    /// # Errors
    /// librdkafka refuses.
    pub fn begin(&mut self, topic: &str, parts: &[Part]) -> KafkaResult<()> {
        let mut list = TopicPartitionList::with_capacity(parts.len());
        self.open.clear();
        for Part { partition, from, to } in parts {
            let to = to.unwrap_or(i64::MAX);
            if *from == to {
                continue;
            }
            let from = if *from > to {
                Offset::Beginning
            } else {
                Offset::Offset(*from)
            };
            list.add_partition_offset(topic, *partition, from)?;
            self.open.insert(*partition, to);
        }
        self.consumer.assign(&list)
    }

    /// Goes on until then at the latest, and hands on partition and value of each record. True: there are no more.
    ///
    /// # Errors
    /// Kafka does not allow it. Everything else is waited out.
    pub fn go_on(&mut self, until: Instant, mut read: impl FnMut(i32, &[u8])) -> KafkaResult<bool> {
        while !self.open.is_empty() && instant_now() < until {
            match self.consumer.poll(Duration::from_millis(10)) {
                Some(Ok(message)) => {
                    let partition = message.partition();
                    let Some(to) = self.open.get(&partition).copied() else {
                        continue;
                    };
                    if message.offset() < to {
                        read(partition, message.payload().unwrap_or_default());
                    }
                    if message.offset() + 1 >= to {
                        self.open.remove(&partition);
                    }
                }
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    self.open.remove(&partition);
                }
                Some(Err(error)) if is_forbidden(&error) => return Err(error),
                Some(Err(error)) => log::debug!("reading what is stored: {error}"),
                None => {}
            }
        }
        Ok(self.open.is_empty())
    }
}

/// Whether waiting does not help. A right to the group is not needed, though librdkafka asks for it.
pub fn is_forbidden(error: &KafkaError) -> bool {
    error.rdkafka_error_code() == Some(RDKafkaErrorCode::TopicAuthorizationFailed)
}

/// The producer's context says what is wrong with Kafka.
pub struct Quiet;

impl ClientContext for Quiet {
    fn log(&self, _level: RDKafkaLogLevel, facility: &str, text: &str) {
        log::debug!("librdkafka {facility} {text}");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        log::debug!("librdkafka {error}: {reason}");
    }
}

impl ConsumerContext for Quiet {}
