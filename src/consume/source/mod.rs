//! Kafka's side of the consumer: polling, rebalances, where reading starts, commits.
//!
//! Owns the `BaseConsumer`, and makes no decisions. It differs from what librdkafka does by default in two ways:
//!
//! - The rebalance callback ends the rebalance without starting to read: it calls `incremental_assign` with an empty list. Once
//!   the position in the table is known, [`Source::read`] assigns the partition with exactly that offset. So no record is
//!   fetched from anywhere else, and nothing has to be sought. This works because in the cooperative protocol librdkafka
//!   distinguishes between what the group assigned and what is being read (rdkafka_cgrp.c: `rkcg_group_assignment`;
//!   rdkafka_assignment.c: `assignment.all`).
//! - To stop reading for a while, partitions are unassigned, not paused. Reading then starts again at the given position and
//!   not at one that librdkafka remembers. Either way, what was prefetched is lost; librdkafka drops records of an earlier
//!   assignment that are still in its queue.

mod context;

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use log::Level;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::{Offset as KafkaOffset, TopicPartitionList};

use crate::clock::instant_now;
use crate::config::ConsumeConfig;
use crate::consume::batch::{NextOffset, Offset, Partition, Record};
use crate::consume::ingest::{Event, Extent};
use crate::consume::source::context::{Context, Membership, Reported};
use crate::kafka::{BatchHead, Explainer, batch_head, client_config, group, names_a_cause, partitions};
use crate::sample::Timestamp;
use crate::thread::start_thread;

/// How long a question to Kafka (committed offsets, watermarks) may delay polling. It is repeated later if Kafka does not
/// answer by then.
const ASK_WITHIN: Duration = Duration::from_secs(3);

/// How often Kafka is asked about a missing topic. librdkafka joins the group when it learns that the topic exists, and would
/// otherwise learn it only at its next refresh of the metadata.
const LOOK_FOR_TOPICS_EVERY: Duration = Duration::from_secs(2);

/// How long the question about a missing topic may delay polling.
const LOOK_FOR_TOPICS_WITHIN: Duration = Duration::from_secs(1);

/// A member of the consumer group.
pub struct Source {
    consumer: Arc<BaseConsumer<Context>>,
    /// The watcher ends when this is dropped.
    watching: SyncSender<()>,
    watcher: JoinHandle<()>,
    look_for_topics_at: Option<Instant>,
    /// Receives the result of the [`batch_head`] under way.
    head_asked: Option<Receiver<HeadFound>>,
}

type HeadFound = (Partition, i64, Result<BatchHead, String>);

/// Why Kafka ended this consumer. A new one may join.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Ended {
    #[error(
        "another consumer joined the group with the same KAFKA_GROUP_INSTANCE_ID: each consumer needs its own"
    )]
    InstanceTaken,
    #[error("Kafka ended this consumer: {0}")]
    Otherwise(String),
}

/// A record, in librdkafka's memory.
pub struct Delivered<'a> {
    message: BorrowedMessage<'a>,
    partition: Partition,
}

impl Delivered<'_> {
    pub fn record(&self) -> Record<'_> {
        Record {
            partition: self.partition,
            offset: Offset(self.message.offset()),
            timestamp: self
                .message
                .timestamp()
                .to_millis()
                .and_then(|millis| millis.checked_mul(1_000))
                .and_then(Timestamp::from_unix_micros),
            key: self.message.key(),
            value: self.message.payload(),
        }
    }
}

impl Source {
    /// Joins the group. Nothing is read before [`Source::read`]. Tests set librdkafka properties in `overrides`, because the
    /// mock cluster needs shorter times.
    ///
    /// # Errors
    /// librdkafka refuses the configuration, or a thread cannot be started. An unreachable Kafka is not an error.
    pub fn join(config: &ConsumeConfig, overrides: &[(&str, &str)]) -> anyhow::Result<Self> {
        let mut client = client_config(&config.kafka);
        client.set("group.id", &config.group_id);
        if let Some(id) = &config.group_instance_id {
            client.set("group.instance.id", id);
        }
        client.extend(
            SETTINGS
                .iter()
                .chain(overrides)
                .map(|(property, value)| ((*property).to_owned(), (*value).to_owned())),
        );
        Self::subscribe(Membership {
            client,
            explainer: Explainer::new(&config.kafka),
            // The names stay until the process ends, so that each partition can have its topic's name without a copy.
            topics: config.topics.iter().map(|topic| &*topic.clone().leak()).collect(),
            is_second: false,
        })
    }

    /// Returns a function that joins another group with the same topics. Consumers that it makes leave it to this one to report
    /// what is wrong with Kafka.
    pub fn joiner(&self, group_id: &str) -> impl Fn() -> anyhow::Result<Self> + Send + 'static {
        let mut membership = self.membership().clone();
        membership.client.set("group.id", group_id);
        membership.is_second = true;
        move || Self::subscribe(membership.clone())
    }

    /// Makes a new consumer with the same configuration, after Kafka has ended this one.
    pub fn rejoin(&self) -> anyhow::Result<Self> {
        Self::subscribe(self.membership().clone())
    }

    fn subscribe(membership: Membership) -> anyhow::Result<Self> {
        let (client, topics) = (membership.client.clone(), membership.topics.clone());
        let context = Context {
            membership,
            reported: Mutex::default(),
        };
        let consumer: BaseConsumer<Context> = client
            .create_with_context(context)
            .context("cannot make a Kafka consumer")?;
        consumer
            .subscribe(&topics)
            .context("cannot subscribe to KAFKA_TOPIC")?;
        let consumer = Arc::new(consumer);
        let (watching, until) = sync_channel(0);
        let watcher = {
            let consumer = Arc::clone(&consumer);
            let group_id = client.get("group.id").unwrap_or_default().to_owned();
            start_thread("group-watch", move || {
                group::watch_group(&consumer, &group_id, &until, |found| {
                    let level = consumer.context().membership.level(Level::Warn);
                    if !found.orphans.is_empty()
                        && let Err(error) = group::adopt(&consumer, &found.orphans, level)
                    {
                        log::error!("cannot join the group again: {error}");
                    }
                });
            })
            .context("cannot start a thread to watch the group")?
        };
        Ok(Self {
            consumer,
            watching,
            watcher,
            look_for_topics_at: None,
            head_asked: None,
        })
    }

    /// Waits for a record, an event or the timeout. The events that [`Source::take_event`] then returns come before the record.
    ///
    /// # Errors
    /// The consumer cannot go on. All other errors are waited out, and [`Source::report_outages`] logs them.
    pub fn poll(&self, timeout: Duration) -> Result<Option<Delivered<'_>>, Ended> {
        match self.consumer.poll(timeout) {
            Some(Ok(message)) => {
                let Some(partition) = self.membership().partition(message.topic(), message.partition())
                else {
                    return Ok(None);
                };
                Ok(Some(Delivered { message, partition }))
            }
            Some(Err(KafkaError::MessageConsumptionFatal(code))) => Err(match code {
                RDKafkaErrorCode::FencedInstanceId => Ended::InstanceTaken,
                code => Ended::Otherwise(self.last_reason(code)),
            }),
            // The context has got the error too, with the reason in words.
            Some(Err(_)) | None => Ok(None),
        }
    }

    /// Whether no broker could be reached at some moment since then.
    pub fn lost_kafka_since(&self, since: Instant) -> bool {
        self.reported().all_down_at.is_some_and(|at| at >= since)
    }

    /// The oldest event that occurred during polling.
    pub fn take_event(&self) -> Option<Event> {
        self.reported().events.pop_front()
    }

    /// Reads these from the given offsets on, whatever was read of them before.
    ///
    /// # Errors
    /// librdkafka refuses. None of them is being read then.
    pub fn read(&self, starts: &[(Partition, NextOffset)]) -> KafkaResult<()> {
        self.stop_reading(|partition| starts.iter().any(|(starting, _)| starting == partition))?;
        self.consumer.incremental_assign(&list_at(starts)?)
    }

    /// Stops reading, and discards what was prefetched. The partitions stay assigned.
    ///
    /// # Errors
    /// librdkafka refuses. Reading goes on then.
    pub fn pause(&self) -> KafkaResult<()> {
        self.stop_reading(|_| true)
    }

    /// Where reading starts if the table has no position: the group's committed offset, or the first offset if there is none.
    /// Partitions that Kafka does not answer for in time are missing.
    pub fn starts(&self, partitions: &[Partition]) -> BTreeMap<Partition, NextOffset> {
        let deadline = instant_now() + ASK_WITHIN;
        let mut starts = BTreeMap::new();
        let mut list = TopicPartitionList::with_capacity(partitions.len());
        for partition in partitions {
            list.add_partition(partition.topic, partition.number);
        }
        let committed = match self.consumer.committed_offsets(list, ASK_WITHIN) {
            Ok(committed) => committed,
            Err(error) => {
                log::debug!("cannot ask for the committed offsets: {error}");
                return starts;
            }
        };
        for element in committed.elements() {
            let Some(partition) = self.membership().partition(element.topic(), element.partition()) else {
                continue;
            };
            match (element.error(), element.offset()) {
                (Ok(()), KafkaOffset::Offset(offset)) => {
                    starts.insert(partition, NextOffset(offset));
                }
                (Ok(()), _) => {
                    let extent = self.extent(partition, deadline);
                    starts.extend(extent.map(|extent| (partition, extent.low)));
                }
                (Err(error), _) => log::debug!("no committed offset of {partition}: {error}"),
            }
        }
        starts
    }

    /// The offsets that the partitions hold. Partitions that Kafka does not answer for in time are missing.
    pub fn extents(&self, partitions: &[Partition]) -> BTreeMap<Partition, Extent> {
        let deadline = instant_now() + ASK_WITHIN;
        let extent = |partition: &Partition| Some((*partition, self.extent(*partition, deadline)?));
        partitions.iter().filter_map(extent).collect()
    }

    /// Commits without waiting for the answer. A lost commit is made up for by the next one, within a minute.
    pub fn commit(&self, commits: &[(Partition, NextOffset)]) {
        let sent = list_at(commits).and_then(|list| self.consumer.commit(&list, CommitMode::Async));
        if let Err(error) = sent {
            log::debug!("cannot commit: {error}");
        }
    }

    /// The offset after the last readable record of each partition, as Kafka last reported it.
    pub fn ends(&self) -> BTreeMap<Partition, NextOffset> {
        self.reported().ends.clone()
    }

    /// Logs what is wrong with Kafka, and looks for missing topics. Has to be called about once a second.
    pub fn report_outages(&mut self, now: Instant) {
        self.look_for_topics(now);
        self.look_for_stuck(now);
        let mut reported = self.reported();
        for (what, outage) in reported.waiting() {
            let reason = self.explainer().explain(outage.reason().unwrap_or_default());
            outage.set_cause_known(names_a_cause(&reason));
            if let Some((_, lasted)) = outage.take_report(now) {
                log::log!(
                    self.level(Level::Warn),
                    "{what}: {reason} (for {} s)",
                    lasted.as_secs()
                );
            }
        }
        for (reason, lasted) in reported.stuck.due(now) {
            log::error!("{reason} (for {} s)", lasted.as_secs());
        }
    }

    /// Whether we are a member of the group and can reach Kafka.
    pub fn is_ready(&self) -> Result<(), String> {
        let mut reported = self.reported();
        for (what, outage) in reported.waiting() {
            if let Some(reason) = outage.reason() {
                return Err(format!("{what}: {}", self.explainer().explain(reason)));
            }
        }
        let stuck: Vec<&str> = reported.stuck.reasons().collect();
        if !stuck.is_empty() {
            return Err(stuck.join("; "));
        }
        match reported.is_member {
            true => Ok(()),
            false => Err("waiting to be admitted to the consumer group".to_owned()),
        }
    }

    /// The level of what two consumers of a process would both log.
    pub fn level(&self, level: Level) -> Level {
        self.membership().level(level)
    }

    /// Waits for the answers to the last commits, leaves the group, and ends librdkafka's threads. If Kafka is away and this takes
    /// longer than `within`, the threads end with the process.
    pub fn close(self, within: Duration) {
        let (closed, is_closed) = sync_channel(1);
        let closing = start_thread("kafka-close", move || {
            // The watcher also holds the consumer.
            drop(self.watching);
            if self.watcher.join().is_err() {
                log::debug!("the watcher of the group panicked");
            }
            drop(self.consumer);
            // The receiver may be gone.
            let _ = closed.send(());
        });
        match closing {
            Ok(_) => {
                if is_closed.recv_timeout(within).is_err() {
                    log::debug!("Kafka does not answer; the group was not left properly");
                }
            }
            Err(error) => log::debug!("cannot start a thread to close the consumer: {error}"),
        }
    }

    fn stop_reading(&self, which: impl Fn(&Partition) -> bool) -> KafkaResult<()> {
        let list = self.consumer.context().being_read(&self.consumer, which)?;
        match list.count() {
            0 => Ok(()),
            _ => self.consumer.incremental_unassign(&list),
        }
    }

    fn extent(&self, partition: Partition, deadline: Instant) -> Option<Extent> {
        let left = deadline.saturating_duration_since(instant_now());
        if left.is_zero() {
            return None;
        }
        let watermarks = self
            .consumer
            .fetch_watermarks(partition.topic, partition.number, left);
        match watermarks {
            Ok((low, high)) => Some(Extent {
                low: NextOffset(low),
                high: NextOffset(high),
            }),
            Err(error) => {
                log::debug!("no watermarks of {partition}: {error}");
                None
            }
        }
    }

    fn look_for_topics(&mut self, now: Instant) {
        if self.reported().missing.reason().is_none() || self.look_for_topics_at.is_some_and(|at| now < at) {
            return;
        }
        self.look_for_topics_at = Some(now + LOOK_FOR_TOPICS_EVERY);
        let exists = |topic: &&str| partitions(self.consumer.client(), topic, LOOK_FOR_TOPICS_WITHIN).is_ok();
        // Stops at the first topic that does not exist, so polling is delayed only once.
        if !self.membership().topics.iter().all(exists) {
            return;
        }
        let lasted = self.reported().missing.end(now);
        if let Some(lasted) = lasted {
            log::log!(
                self.level(Level::Info),
                "the topic exists now, after {} s",
                lasted.as_secs()
            );
        }
    }

    /// Reads the header of a batch that librdkafka cannot read. Uses a thread, because the broker may be slow.
    fn look_for_stuck(&mut self, now: Instant) {
        let answer = self.head_asked.as_ref().map(|asked| asked.try_recv());
        if answer == Some(Err(TryRecvError::Empty)) {
            return;
        }
        self.head_asked = None;
        match answer {
            Some(Ok((partition, offset, Ok(head)))) => {
                let text = |head: &BatchHead| stuck_text(partition, offset, head);
                self.reported().stuck.found(now, partition, offset, text, head);
            }
            Some(Ok((partition, offset, Err(error)))) => {
                log::debug!("{partition} is stuck at offset {offset}: {error}");
            }
            _ => {}
        }
        let Some((partition, offset)) = self.reported().stuck.next_question() else {
            return;
        };
        let (found, asked) = sync_channel(1);
        let explainer = self.explainer().clone();
        let work = move || {
            let head = batch_head(explainer.kafka(), partition.topic, partition.number, offset);
            // The receiver may be gone.
            let _ = found.send((partition, offset, head));
        };
        match start_thread("kafka-look", work) {
            Ok(_) => self.head_asked = Some(asked),
            Err(error) => log::debug!("cannot start a thread to look at a batch: {error}"),
        }
    }

    fn last_reason(&self, code: RDKafkaErrorCode) -> String {
        let reason = self.reported().last_reason.clone();
        self.explainer()
            .explain(&reason.unwrap_or_else(|| code.to_string()))
    }

    fn membership(&self) -> &Membership {
        &self.consumer.context().membership
    }

    fn explainer(&self) -> &Explainer {
        &self.membership().explainer
    }

    fn reported(&self) -> MutexGuard<'_, Reported> {
        self.consumer.context().reported()
    }
}

/// The properties of this consumer. All that matter are set, even to their defaults; a comment says why a default is wrong.
const SETTINGS: &[(&str, &str)] = &[
    // The default would skip everything written before the first start. "earliest" would silently start over where a position
    // is out of range; `ingest` decides that.
    ("auto.offset.reset", "error"),
    ("enable.auto.commit", "false"),
    ("enable.auto.offset.store", "false"),
    ("isolation.level", "read_committed"),
    // The only protocol in which members keep their partitions during a rebalance. See also the module's documentation.
    ("partition.assignment.strategy", "cooperative-sticky"),
    // How long the partitions of a killed consumer wait for another one.
    ("session.timeout.ms", "15000"),
    ("heartbeat.interval.ms", "3000"),
    // librdkafka's default. Polling never stops for longer than a question to Kafka takes.
    ("max.poll.interval.ms", "300000"),
    // A broker that accepts connections but does not answer (frozen, or behind a firewall that drops packets) is given up after
    // this time and another 10 s for the new connection. The default is 60 s. The longest request waits for half a second.
    ("socket.timeout.ms", "20000"),
    // How soon added partitions are read.
    ("topic.metadata.refresh.interval.ms", "30000"),
    ("allow.auto.create.topics", "false"),
    // With the default of 1,000 ms, a consumer reads a backlog at a third of the speed.
    ("fetch.queue.backoff.ms", "10"),
    // These three bound the memory of a backlog: what is queued is decompressed, and a response stays in memory until its last
    // record is read. With 8 MiB queued and the defaults of the other two (50 MiB a response, 1 MiB of it from one partition),
    // the process took 78 MB (DB_BATCH_SIZE=1000); with these, it takes 27 MB and is as fast. A record that is larger than
    // these limits is delivered all the same (KIP-74).
    ("queued.max.messages.kbytes", "2048"),
    ("fetch.max.bytes", "1000000"),
    ("fetch.message.max.bytes", "131072"),
    // Statistics show the lag and the state of the brokers.
    ("statistics.interval.ms", "5000"),
    // Brokers close idle connections, which is not an outage.
    ("log.connection.close", "false"),
];

fn list_at(positions: &[(Partition, NextOffset)]) -> KafkaResult<TopicPartitionList> {
    let mut list = TopicPartitionList::with_capacity(positions.len());
    for (partition, next) in positions {
        let offset = KafkaOffset::Offset(next.0);
        list.add_partition_offset(partition.topic, partition.number, offset)?;
    }
    Ok(list)
}

fn stuck_text(partition: Partition, offset: i64, head: &BatchHead) -> String {
    format!(
        "{partition} is stuck at offset {offset}: Kafka's client cannot read the batch there ({head}). `host-metrics skip \
         {partition}:{offset}` skips it and records in the rejected table which offsets were not read"
    )
}
