//! Reads parts of partitions, without joining a group.
//!
//! `produce` uses it to read what its group wrote before, and to find out which of its own records Kafka stored without an
//! acknowledgement. `audit` uses it to look at offsets that are not stored.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::BorrowedMessage;
use rdkafka::{Message, Offset, TopicPartitionList};

use super::settings::client_config;
use crate::clock::instant_now;
use crate::config::KafkaConfig;

/// A part of a partition.
#[derive(Clone, Debug)]
pub struct Part {
    pub partition: i32,
    /// If the topic was recreated and the partition does not have this offset, reading starts at its beginning.
    pub from: i64,
    /// The first offset that is not read; `None` for all that there is.
    pub to: Option<i64>,
    /// Whether the record at `to` is known to be stored. An earlier end of the partition is not the end of the part then: a new
    /// leader does not show all acknowledged records at first.
    pub to_is_stored: bool,
}

/// A consumer, and the parts that it is reading.
pub struct Reader {
    consumer: BaseConsumer<Quiet>,
    /// The ends of the parts that are not read completely yet, and whether the records there are known to be stored, by partition.
    open: BTreeMap<i32, (i64, bool)>,
}

impl Reader {
    pub fn new(kafka: &KafkaConfig) -> KafkaResult<Self> {
        Self::with(kafka, "read_uncommitted")
    }

    /// Reads what `consume` reads: no records of aborted transactions.
    pub fn committed(kafka: &KafkaConfig) -> KafkaResult<Self> {
        Self::with(kafka, "read_committed")
    }

    fn with(kafka: &KafkaConfig, isolation_level: &str) -> KafkaResult<Self> {
        let mut config = client_config(kafka);
        let consumer = config
            // librdkafka needs one, although the group is not joined and nothing is committed.
            .set("group.id", "host-metrics-produce")
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            // Where a position no longer exists, because of retention or a recreated topic.
            .set("auto.offset.reset", "earliest")
            .set("isolation.level", isolation_level)
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

    /// The consumer, for questions about a topic.
    pub fn consumer(&self) -> &impl Consumer<Quiet> {
        &self.consumer
    }

    /// Starts to read these parts of a topic, instead of those before. It has to be one topic: when a partition is at its end,
    /// librdkafka does not report its topic.
    pub fn begin(&mut self, topic: &str, parts: &[Part]) -> KafkaResult<()> {
        let mut list = TopicPartitionList::with_capacity(parts.len());
        self.open.clear();
        for Part {
            partition,
            from,
            to,
            to_is_stored,
        } in parts
        {
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
            self.open.insert(*partition, (to, *to_is_stored));
        }
        self.consumer.assign(&list)
    }

    /// The same as [`Reader::read`], for callers that need only partition and value.
    pub fn go_on(&mut self, until: Instant, mut read: impl FnMut(i32, &[u8])) -> KafkaResult<bool> {
        self.read(until, |message| {
            read(message.partition(), message.payload().unwrap_or_default());
        })
    }

    /// Reads on, at most until `until`, and passes on each record. True at the end.
    ///
    /// # Errors
    /// Kafka does not allow it. All other errors are waited out.
    pub fn read(&mut self, until: Instant, mut read: impl FnMut(&BorrowedMessage<'_>)) -> KafkaResult<bool> {
        while !self.open.is_empty() && instant_now() < until {
            match self.consumer.poll(Duration::from_millis(10)) {
                Some(Ok(message)) => {
                    let partition = message.partition();
                    let Some((to, _)) = self.open.get(&partition).copied() else {
                        continue;
                    };
                    if message.offset() < to {
                        read(&message);
                    }
                    if message.offset() + 1 >= to {
                        self.open.remove(&partition);
                    }
                }
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    self.open
                        .retain(|other, (_, to_is_stored)| *other != partition || *to_is_stored);
                }
                Some(Err(error)) if is_forbidden(&error) => return Err(error),
                Some(Err(error)) => log::debug!("reading what is stored: {error}"),
                None => {}
            }
        }
        Ok(self.open.is_empty())
    }
}

/// Whether waiting does not help. librdkafka also asks for access to the group, which is not needed.
pub fn is_forbidden(error: &KafkaError) -> bool {
    error.rdkafka_error_code() == Some(RDKafkaErrorCode::TopicAuthorizationFailed)
}

/// Only logs at DEBUG, because the agent's own client reports what is wrong with Kafka.
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
