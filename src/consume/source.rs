//! Kafka's side of the consumer: polling, rebalances, where reading starts, commits.
//!
//! Owns the `BaseConsumer`; decides nothing. Two things are done otherwise than librdkafka would by itself:
//!
//! - The rebalance callback closes the rebalance without starting to read: it hands on the event, and calls
//!   `incremental_assign` with nothing. Once the machine knows the position in the table, [`Source::read`] assigns the
//!   partition with exactly that offset. So no record is ever fetched from anywhere else, and there is nothing to seek. This
//!   works because in the cooperative protocol librdkafka keeps what the group gave us apart from what is being read
//!   (rdkafka_cgrp.c: `rkcg_group_assignment`; rdkafka_assignment.c: `assignment.all`).
//! - To stop reading for a while is to unassign, not `pause`: reading starts again at the position that the machine says
//!   and not at one of librdkafka's own reckoning. What was prefetched is thrown away either way; librdkafka drops records
//!   of an earlier assignment that are still in its queue.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use log::Level;
use rdkafka::client::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::statistics::Statistics;
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{Offset as KafkaOffset, TopicPartitionList};

use crate::config::ConsumeConfig;
use crate::consume::batch::{NextOffset, Offset, Partition, Record};
use crate::consume::group::{Named, Watch};
use crate::consume::ingest::{Event, Extent};
use crate::consume::stuck::{Look, Stuck};
use crate::kafka::{BatchHead, Explainer, batch_head, names_a_cause};
use crate::outage::Outage;
use crate::sample::Timestamp;

/// How long a question to Kafka (committed offsets, watermarks) may hold up polling: what is not answered by then is asked
/// again later.
const ASK_WITHIN: Duration = Duration::from_secs(3);

/// While a topic is missing its metadata are asked for this often, so that a topic that is being made at the same time as we
/// start is taken up at once (librdkafka joins the group on hearing of it) and not at the next refresh of the metadata.
const LOOK_FOR_TOPICS_EVERY: Duration = Duration::from_secs(2);

/// And may hold up polling for so long.
const LOOK_FOR_TOPICS_WITHIN: Duration = Duration::from_secs(1);

/// How often the group is looked at: see `group`. Two looks in a row have to find the same.
const LOOK_AT_GROUP_EVERY: Duration = Duration::from_secs(15);

/// The consumer, and what it has to say.
pub struct Source {
    client: ClientConfig,
    explainer: Explainer,
    consumer: Arc<BaseConsumer<Context>>,
    /// One place: while Kafka does not answer a commit, further ones fail at once.
    commits: SyncSender<Vec<(Partition, NextOffset)>>,
    committer: JoinHandle<()>,
    /// Dropped, it ends the watcher.
    watching: SyncSender<()>,
    watcher: JoinHandle<()>,
    topics: Vec<String>,
    look_for_topics_at: Option<Instant>,
    /// Where the answer of [`batch_head`] comes that was last asked for.
    head_asked: Option<Receiver<HeadFound>>,
    /// As in [`State`], so that a log line does not need its lock.
    is_second: bool,
}

type HeadFound = (Partition, i64, Result<BatchHead, String>);

/// Kafka ended the consumer; a new one may join.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Ended {
    #[error("another consumer joined the group with the same KAFKA_GROUP_INSTANCE_ID: each needs its own")]
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
    /// Joins the group; nothing is read before [`Source::read`]. `overrides` are librdkafka properties that win over ours:
    /// for tests, whose broker needs shorter times.
    ///
    /// # Errors
    /// librdkafka refuses the configuration, or no thread can be made. An unreachable Kafka is no error.
    pub fn join(config: &ConsumeConfig, overrides: &[(&str, &str)]) -> anyhow::Result<Self> {
        let mut client = ClientConfig::new();
        for (property, value) in config.kafka.client_properties() {
            client.set(property, value);
        }
        for (property, value) in SETTINGS {
            client.set(*property, *value);
        }
        client.set("group.id", &config.group_id);
        if let Some(id) = &config.group_instance_id {
            client.set("group.instance.id", id);
        }
        for (property, value) in overrides {
            client.set(*property, *value);
        }
        Self::subscribe(
            client,
            Explainer::new(&config.kafka),
            config.topics.clone(),
            false,
        )
    }

    /// Makes consumers of the same topics in another group, beside this one: they leave it to this one to say what is wrong
    /// with Kafka.
    pub fn joiner(&self, group_id: &str) -> impl Fn() -> anyhow::Result<Self> + Send + 'static {
        let mut client = self.client.clone();
        client.set("group.id", group_id);
        let (explainer, topics) = (self.explainer.clone(), self.topics.clone());
        move || Self::subscribe(client.clone(), explainer.clone(), topics.clone(), true)
    }

    /// A new consumer of the same configuration, in the place of one that Kafka has ended.
    ///
    /// # Errors
    /// As [`Source::join`].
    pub fn rejoin(&self) -> anyhow::Result<Self> {
        Self::subscribe(
            self.client.clone(),
            self.explainer.clone(),
            self.topics.clone(),
            self.is_second,
        )
    }

    fn subscribe(
        client: ClientConfig,
        explainer: Explainer,
        topics: Vec<String>,
        is_second: bool,
    ) -> anyhow::Result<Self> {
        let context = Context {
            bootstrap_servers: client.get("bootstrap.servers").unwrap_or_default().to_owned(),
            explainer: explainer.clone(),
            topics: topics.clone(),
            state: Mutex::new(State {
                is_second,
                ..State::default()
            }),
        };
        let consumer: BaseConsumer<Context> = client
            .create_with_context(context)
            .context("cannot make a Kafka consumer")?;
        let names: Vec<&str> = topics.iter().map(String::as_str).collect();
        consumer
            .subscribe(&names)
            .context("cannot subscribe to KAFKA_TOPIC")?;
        let consumer = Arc::new(consumer);
        let (commits, to_commit) = sync_channel(1);
        let committer = {
            let consumer = Arc::clone(&consumer);
            thread::Builder::new()
                .name("committer".into())
                .spawn(move || commit_all(&consumer, &to_commit))
                .context("no thread for commits")?
        };
        let (watching, until) = sync_channel(0);
        let watcher = {
            let consumer = Arc::clone(&consumer);
            let group_id = client.get("group.id").unwrap_or_default().to_owned();
            thread::Builder::new()
                .name("group-watch".into())
                .spawn(move || watch_group(&consumer, &group_id, &until))
                .context("no thread to watch the group")?
        };
        Ok(Self {
            client,
            explainer,
            consumer,
            is_second,
            commits,
            committer,
            watching,
            watcher,
            topics,
            look_for_topics_at: None,
            head_asked: None,
        })
    }

    /// Waits for a record, an event or the timeout. Events come first: see [`Source::take_event`] before taking the record.
    ///
    /// # Errors
    /// The consumer cannot go on. Everything else is waited out, and said by [`Source::report_outages`].
    pub fn poll(&self, timeout: Duration) -> Result<Option<Delivered<'_>>, Ended> {
        match self.consumer.poll(timeout) {
            Some(Ok(message)) => {
                let Some(partition) = self.partition(message.topic(), message.partition()) else {
                    return Ok(None);
                };
                Ok(Some(Delivered { message, partition }))
            }
            Some(Err(KafkaError::MessageConsumptionFatal(code))) => Err(match code {
                RDKafkaErrorCode::FencedInstanceId => Ended::InstanceTaken,
                code => Ended::Otherwise(self.last_reason(code)),
            }),
            // The context has heard of it already, with the reason in words.
            Some(Err(_)) | None => Ok(None),
        }
    }

    /// Whether no broker could be reached at some time since then.
    pub fn lost_kafka_since(&self, since: Instant) -> bool {
        self.state().all_down_at.is_some_and(|at| at >= since)
    }

    /// What happened during polling, oldest first.
    pub fn take_event(&self) -> Option<Event> {
        self.state().events.pop_front()
    }

    /// Reads these from there on, whatever was read of them before.
    ///
    /// # Errors
    /// librdkafka refuses: none of them is being read.
    pub fn read(&self, starts: &[(Partition, NextOffset)]) -> KafkaResult<()> {
        self.stop_reading(|partition| starts.iter().any(|(starting, _)| *starting == partition))?;
        let list = self.consumer.context().list_at(starts)?;
        self.consumer.incremental_assign(&list)
    }

    /// Stops reading and throws away what was prefetched. The partitions stay ours.
    ///
    /// # Errors
    /// librdkafka refuses: reading goes on.
    pub fn pause(&self) -> KafkaResult<()> {
        self.stop_reading(|_| true)
    }

    /// Where reading starts if the table has no position: the group's committed offset, or else the earliest. What Kafka
    /// does not answer in time is missing.
    pub fn starts(&self, partitions: &[Partition]) -> BTreeMap<Partition, NextOffset> {
        let deadline = now() + ASK_WITHIN;
        let mut starts = BTreeMap::new();
        let committed = match self.consumer.committed_offsets(self.list(partitions), ASK_WITHIN) {
            Ok(committed) => committed,
            Err(error) => {
                log::debug!("cannot ask for the committed offsets: {error}");
                return starts;
            }
        };
        for element in committed.elements() {
            let Some(partition) = self.partition(element.topic(), element.partition()) else {
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
                (Err(error), _) => log::debug!("no committed offset of {partition:?}: {error}"),
            }
        }
        starts
    }

    /// Which offsets the partitions hold. What Kafka does not answer in time is missing.
    pub fn extents(&self, partitions: &[Partition]) -> BTreeMap<Partition, Extent> {
        let deadline = now() + ASK_WITHIN;
        let extent = |partition: &Partition| Some((*partition, self.extent(*partition, deadline)?));
        partitions.iter().filter_map(extent).collect()
    }

    /// Commits, without waiting for the answer: a failure comes as [`Event::CommitFailed`].
    pub fn commit(&self, commits: Vec<(Partition, NextOffset)>) {
        self.state().commits_under_way += 1;
        if let Err(TrySendError::Full(commits) | TrySendError::Disconnected(commits)) =
            self.commits.try_send(commits)
        {
            self.consumer
                .context()
                .committed(&commits, Err("the last one is not answered".into()));
        }
    }

    /// Polls until Kafka has answered every commit, or the deadline. Records that come meanwhile are dropped.
    pub fn wait_for_commits(&self, deadline: Instant) {
        const POLL: Duration = Duration::from_millis(20);
        while self.commits_under_way() > 0 && now() < deadline {
            if let Err(error) = self.poll(POLL) {
                log::debug!("while waiting for commits: {error:#}");
                return;
            }
        }
    }

    /// Commits that Kafka has not answered yet.
    pub fn commits_under_way(&self) -> usize {
        self.state().commits_under_way
    }

    /// Behind the last record that can be read of each partition, as last heard from Kafka.
    pub fn ends(&self) -> BTreeMap<Partition, NextOffset> {
        self.state().ends.clone()
    }

    /// Says what is wrong with Kafka, looks whether a missing topic is there by now, and has partitions without an owner given
    /// out. To be called every second or so.
    pub fn report_outages(&mut self, now: Instant) {
        self.look_for_topics(now);
        self.adopt_orphans();
        self.look_for_stuck(now);
        let mut state = self.state();
        let state = &mut *state;
        let is_second = state.is_second;
        let level = |level| level_of(is_second, level);
        let waiting = [
            ("waiting for Kafka", &mut state.away),
            ("waiting for Kafka to allow it", &mut state.refused),
            ("waiting for the topic", &mut state.missing),
        ];
        for (what, outage) in waiting {
            let reason = self.explainer.explain(outage.reason().unwrap_or_default());
            outage.set_cause_known(names_a_cause(&reason));
            if let Some((_, lasted)) = outage.take_report(now) {
                log::log!(
                    level(Level::Warn),
                    "{what}: {reason} (for {} s)",
                    lasted.as_secs()
                );
            }
        }
        for (reason, lasted) in state.stuck.due(now) {
            log::error!("{reason} (for {} s)", lasted.as_secs());
        }
    }

    /// Whether we are a member of the group and Kafka can be reached, or what is waited for.
    ///
    /// # Errors
    /// What is waited for, for a person.
    pub fn is_ready(&self) -> Result<(), String> {
        let state = self.state();
        let waiting = [
            ("waiting for Kafka", &state.away),
            ("waiting for Kafka to allow it", &state.refused),
            ("waiting for the topic", &state.missing),
        ];
        for (what, outage) in waiting {
            if let Some(reason) = outage.reason() {
                return Err(format!("{what}: {}", self.explainer.explain(reason)));
            }
        }
        let stuck: Vec<&str> = state.stuck.reasons().collect();
        if !stuck.is_empty() {
            return Err(stuck.join("; "));
        }
        match state.is_member {
            true => Ok(()),
            false => Err("waiting for Kafka to take us into the group".to_owned()),
        }
    }

    /// The name of a partition for a person: `topic/number`.
    pub fn name(&self, partition: Partition) -> String {
        self.consumer.context().name(partition)
    }

    pub fn topic(&self, partition: Partition) -> &str {
        self.consumer.context().topic(partition)
    }

    /// Leaves the group and ends librdkafka's threads. With Kafka away that may take longer than anybody wants to wait:
    /// then they are left to the end of the process.
    pub fn close(self, within: Duration) {
        let (closed, is_closed) = sync_channel(1);
        let closing = thread::Builder::new().name("kafka-close".into()).spawn(move || {
            // They hold the consumer, too.
            drop(self.commits);
            drop(self.watching);
            if self.committer.join().is_err() || self.watcher.join().is_err() {
                log::debug!("the committer or the watcher of the group panicked");
            }
            drop(self.consumer);
            // Nobody may be waiting any more.
            let _ = closed.send(());
        });
        match closing {
            Ok(_) => {
                if is_closed.recv_timeout(within).is_err() {
                    log::debug!("Kafka does not answer: left without a goodbye");
                }
            }
            Err(error) => log::debug!("no thread to close the consumer: {error}"),
        }
    }

    fn level(&self, level: Level) -> Level {
        level_of(self.is_second, level)
    }

    fn stop_reading(&self, which: impl Fn(Partition) -> bool) -> KafkaResult<()> {
        // librdkafka refuses the whole list if one of it is not being read, so it is asked.
        let reading = self.consumer.assignment()?;
        let mut list = TopicPartitionList::new();
        for element in reading.elements() {
            let partition = self.partition(element.topic(), element.partition());
            if partition.is_some_and(&which) {
                list.add_partition(element.topic(), element.partition());
            }
        }
        if list.count() == 0 {
            return Ok(());
        }
        self.consumer.incremental_unassign(&list)
    }

    fn extent(&self, partition: Partition, deadline: Instant) -> Option<Extent> {
        let left = deadline.saturating_duration_since(now());
        if left.is_zero() {
            return None;
        }
        let watermarks = self
            .consumer
            .fetch_watermarks(self.topic(partition), partition.number, left);
        match watermarks {
            Ok((low, high)) => Some(Extent {
                low: NextOffset(low),
                high: NextOffset(high),
            }),
            Err(error) => {
                log::debug!("no watermarks of {partition:?}: {error}");
                None
            }
        }
    }

    fn look_for_topics(&mut self, now: Instant) {
        if self.state().missing.reason().is_none() || self.look_for_topics_at.is_some_and(|at| now < at) {
            return;
        }
        self.look_for_topics_at = Some(now + LOOK_FOR_TOPICS_EVERY);
        let is_there = |topic: &String| {
            self.consumer
                .fetch_metadata(Some(topic), LOOK_FOR_TOPICS_WITHIN)
                .is_ok_and(|metadata| {
                    let found = metadata.topics().iter().find(|found| found.name() == topic);
                    found.is_some_and(|found| found.error().is_none() && !found.partitions().is_empty())
                })
        };
        // The first that is not there ends it: one wait a time is enough.
        if !self.topics.iter().all(is_there) {
            return;
        }
        let lasted = self.state().missing.end(now);
        if let Some(lasted) = lasted {
            log::log!(
                self.level(Level::Info),
                "the topic is there after {} s",
                lasted.as_secs()
            );
        }
    }

    /// Asks what the batch is like that librdkafka does not get past, on a thread because the answer takes as long as the broker.
    fn look_for_stuck(&mut self, now: Instant) {
        let answer = self.head_asked.as_ref().map(|asked| asked.try_recv());
        if answer == Some(Err(TryRecvError::Empty)) {
            return;
        }
        self.head_asked = None;
        match answer {
            Some(Ok((partition, offset, Ok(head)))) => {
                let text = |head: &BatchHead| stuck_text(&self.name(partition), offset, head);
                self.state().stuck.found(now, partition, offset, text, head);
            }
            Some(Ok((partition, offset, Err(error)))) => {
                log::debug!("{} stands at offset {offset}: {error}", self.name(partition));
            }
            _ => {}
        }
        let Some((partition, offset)) = self.state().stuck.next_question() else {
            return;
        };
        let (found, asked) = sync_channel(1);
        let explainer = self.explainer.clone();
        let topic = self.topic(partition).to_owned();
        let work = move || {
            let head = batch_head(explainer.kafka(), &topic, partition.number, offset);
            // Nobody may be waiting any more.
            let _ = found.send((partition, offset, head));
        };
        match thread::Builder::new().name("kafka-look".into()).spawn(work) {
            Ok(_) => self.head_asked = Some(asked),
            Err(error) => log::debug!("no thread to look at a batch: {error}"),
        }
    }

    /// Leaving the group and joining it again makes it give out everything; to subscribe anew alone does not, and a static
    /// member that just joins again gets what it had.
    fn adopt_orphans(&self) {
        let orphans = std::mem::take(&mut self.state().orphans);
        if orphans.is_empty() {
            return;
        }
        let names: Vec<String> = orphans
            .iter()
            .map(|(topic, number)| format!("{topic}/{number}"))
            .collect();
        log::log!(
            self.level(Level::Warn),
            "{} belong to nobody in the group: joining it again, so that they are given out",
            names.join(" ")
        );
        self.consumer.unsubscribe();
        let topics: Vec<&str> = self.topics.iter().map(String::as_str).collect();
        if let Err(error) = self.consumer.subscribe(&topics) {
            log::log!(self.level(Level::Error), "cannot subscribe again: {error}");
        }
    }

    fn last_reason(&self, code: RDKafkaErrorCode) -> String {
        let reason = self.state().last_reason.clone();
        self.explainer
            .explain(&reason.unwrap_or_else(|| code.to_string()))
    }

    fn list(&self, partitions: &[Partition]) -> TopicPartitionList {
        let mut list = TopicPartitionList::with_capacity(partitions.len());
        for partition in partitions {
            list.add_partition(self.topic(*partition), partition.number);
        }
        list
    }

    fn partition(&self, topic: &str, number: i32) -> Option<Partition> {
        partition(&self.topics, topic, number)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.consumer.context().state()
    }
}

/// Everything that matters, explicitly; the reason where the default would be wrong.
const SETTINGS: &[(&str, &str)] = &[
    // The default would skip everything written before the first start; and "earliest" would start over without a word where
    // a position is out of range, which is ours to decide.
    ("auto.offset.reset", "error"),
    ("enable.auto.commit", "false"),
    ("enable.auto.offset.store", "false"),
    ("isolation.level", "read_committed"),
    // The only protocol in which members keep what they have during a rebalance, and see the module's page.
    ("partition.assignment.strategy", "cooperative-sticky"),
    // How long the partitions of a killed consumer wait for another one.
    ("session.timeout.ms", "15000"),
    ("heartbeat.interval.ms", "3000"),
    // Polling never stops for longer than a question to Kafka, so this is no more than librdkafka's default.
    ("max.poll.interval.ms", "300000"),
    // A broker that takes connections and answers nothing (frozen, a firewall that swallows) is given up after this and 10 s
    // more for the new connection; the default is 60 s. The longest request here waits for half a second of records.
    ("socket.timeout.ms", "20000"),
    // How soon added partitions are read.
    ("topic.metadata.refresh.interval.ms", "30000"),
    ("allow.auto.create.topics", "false"),
    // The default of 1,000 ms throttles a consumer that catches up to a third of what it could read.
    ("fetch.queue.backoff.ms", "10"),
    // Memory: what waits here is decompressed, and what was fetched stays until its last record is read. With 8 MiB waiting
    // and the other two as they come (50 MiB an answer, 1 MiB of it from one partition, compressed) a backlog made us 78 MB
    // large, so 27 MB (DB_BATCH_SIZE=1000), and as fast: what waits suffices while the next is fetched, and small buffers
    // are used again where the kernel would clear new ones. A record larger than all this is delivered all the same (KIP-74).
    ("queued.max.messages.kbytes", "2048"),
    ("fetch.max.bytes", "1000000"),
    ("fetch.message.max.bytes", "131072"),
    // For the lag, and for which brokers are there.
    ("statistics.interval.ms", "5000"),
    // A broker that closes an idle connection is no outage.
    ("log.connection.close", "false"),
];

struct Context {
    bootstrap_servers: String,
    explainer: Explainer,
    topics: Vec<String>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Another consumer of this process reads the same and says all this.
    is_second: bool,
    events: VecDeque<Event>,
    commits_under_way: usize,
    /// The group has given us our share, which may be nothing.
    is_member: bool,
    ends: BTreeMap<Partition, NextOffset>,
    /// Partitions of ours that nobody in the group owns.
    orphans: BTreeSet<Named>,
    /// No broker can be reached, or none lets us in.
    away: Outage,
    all_down_at: Option<Instant>,
    /// A broker does, but what we ask for is not allowed.
    refused: Outage,
    missing: Outage,
    stuck: Stuck,
    /// The reason that the next "all brokers are down" has.
    last_reason: Option<String>,
}

/// What the first consumer of a process says, the second does not repeat.
fn level_of(is_second: bool, level: Level) -> Level {
    if is_second { Level::Debug } else { level }
}

impl State {
    fn level(&self, level: Level) -> Level {
        level_of(self.is_second, level)
    }

    fn connected(&mut self, now: Instant) {
        self.last_reason = None;
        if let Some(lasted) = self.away.end(now) {
            log::log!(
                self.level(Level::Info),
                "Kafka is back after {} s",
                lasted.as_secs()
            );
        }
    }
}

impl Context {
    /// Nothing here is left half done by a panic.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn topic(&self, partition: Partition) -> &str {
        self.topics
            .get(usize::from(partition.topic))
            .map_or("?", String::as_str)
    }

    fn name(&self, partition: Partition) -> String {
        format!("{}/{}", self.topic(partition), partition.number)
    }

    fn list_at(&self, positions: &[(Partition, NextOffset)]) -> KafkaResult<TopicPartitionList> {
        let mut list = TopicPartitionList::with_capacity(positions.len());
        for (partition, next) in positions {
            let offset = KafkaOffset::Offset(next.0);
            list.add_partition_offset(self.topic(*partition), partition.number, offset)?;
        }
        Ok(list)
    }

    fn committed(&self, commits: &[(Partition, NextOffset)], result: Result<(), String>) {
        let mut state = self.state();
        state.commits_under_way = state.commits_under_way.saturating_sub(1);
        match result {
            Ok(()) => state.connected(now()),
            Err(reason) => {
                log::debug!("not committed: {reason}");
                let partitions = commits.iter().map(|(partition, _)| *partition).collect();
                state.events.push_back(Event::CommitFailed(partitions));
            }
        }
    }

    fn partitions(&self, list: &TopicPartitionList) -> Vec<Partition> {
        let elements = list.elements();
        let known = elements
            .iter()
            .filter_map(|element| partition(&self.topics, element.topic(), element.partition()));
        known.collect()
    }
}

impl ClientContext for Context {
    /// librdkafka's own lines, a flood in an outage, are for those who look for them: what they come to is said elsewhere.
    fn log(&self, _level: RDKafkaLogLevel, facility: &str, line: &str) {
        log::debug!("librdkafka {facility} {line}");
    }

    fn stats(&self, statistics: Statistics) {
        let mut state = self.state();
        if statistics.brokers.values().any(|broker| broker.state == "UP") {
            state.connected(now());
        }
        let now = now();
        let mut ends = BTreeMap::new();
        for (topic, statistics) in &statistics.topics {
            for (number, statistics) in &statistics.partitions {
                // Reading committed records, the last one is in front of the last stable offset.
                let partition = partition(&self.topics, topic, *number);
                let Some(partition) = partition else { continue };
                if statistics.ls_offset >= 0 {
                    ends.insert(partition, NextOffset(statistics.ls_offset));
                }
                if statistics.fetch_state != "active" {
                    continue;
                }
                let look = Look {
                    next_offset: statistics.next_offset,
                    end_offset: statistics.ls_offset,
                    records_waiting: statistics.fetchq_cnt,
                };
                if let Some(lasted) = state.stuck.look(now, partition, look) {
                    let (name, lasted) = (self.name(partition), lasted.as_secs());
                    log::log!(state.level(Level::Info), "{name} is read again after {lasted} s");
                }
            }
        }
        state.ends = ends;
        let stuck = state.stuck.partitions();
        if !stuck.is_empty() {
            state.events.push_back(Event::Stuck(stuck));
        }
    }

    /// Hears of every error, also of those that polling returns, and alone hears the reason in words.
    fn error(&self, error: KafkaError, reason: &str) {
        log::debug!("librdkafka {error}: {reason}");
        self.explainer.hear(&error, reason);
        let reason = reason.to_owned();
        let mut state = self.state();
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::AutoOffsetReset | RDKafkaErrorCode::OffsetOutOfRange) => {
                state.events.push_back(Event::OutOfRange);
            }
            Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) => {
                state.missing.begin(now(), reason);
            }
            Some(
                RDKafkaErrorCode::TopicAuthorizationFailed
                | RDKafkaErrorCode::GroupAuthorizationFailed
                | RDKafkaErrorCode::ClusterAuthorizationFailed
                | RDKafkaErrorCode::InvalidTopic
                | RDKafkaErrorCode::InvalidGroupId
                | RDKafkaErrorCode::InconsistentGroupProtocol,
            ) => state.refused.begin(now(), reason),
            // The reasons before it said more, if there were any: of brokers that just say nothing there are none.
            Some(RDKafkaErrorCode::AllBrokersDown) => {
                let silent = || format!("{} does not answer: {reason}", self.bootstrap_servers);
                let reason = state.last_reason.clone().unwrap_or_else(silent);
                state.away.begin(now(), reason);
                state.all_down_at = Some(now());
            }
            _ => {
                if state.away.reason().is_some() {
                    state.away.begin(now(), reason.clone());
                }
                state.last_reason = Some(reason);
            }
        }
    }
}

impl ConsumerContext for Context {
    /// Only takes note, and tells librdkafka what it waits to be told.
    fn rebalance(
        &self,
        consumer: &BaseConsumer<Self>,
        error: RDKafkaRespErr,
        partitions: &mut TopicPartitionList,
    ) {
        let ours = self.partitions(partitions);
        let is_assigned = error == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS;
        let answered = if is_assigned {
            // Reading starts when the positions are known.
            consumer.incremental_assign(&TopicPartitionList::new())
        } else {
            consumer.assignment().and_then(|reading| {
                let mut list = TopicPartitionList::new();
                for element in reading.elements() {
                    let partition = partition(&self.topics, element.topic(), element.partition());
                    if partition.is_some_and(|partition| ours.contains(&partition)) {
                        list.add_partition(element.topic(), element.partition());
                    }
                }
                consumer.incremental_unassign(&list)
            })
        };
        if let Err(error) = answered {
            log::debug!("librdkafka does not take the answer to a rebalance: {error}");
        }
        let mut state = self.state();
        state.connected(now());
        state.refused.end(now());
        state.is_member |= is_assigned;
        state.stuck.forget(&ours);
        state.events.push_back(match is_assigned {
            true => Event::Assigned(ours),
            false => Event::Revoked(ours),
        });
    }
}

/// Commits one list after the other until nobody sends any more. A thread of its own because librdkafka tells of
/// a commit that is not waited for only through a callback that rust-rdkafka 0.39, which takes events, does not set; and a
/// commit that is waited for takes as long as Kafka does.
fn commit_all(consumer: &BaseConsumer<Context>, to_commit: &Receiver<Vec<(Partition, NextOffset)>>) {
    let context = consumer.context();
    for commits in to_commit {
        let result = context
            .list_at(&commits)
            .and_then(|list| consumer.commit(&list, CommitMode::Sync));
        context.committed(&commits, result.map_err(|error| error.to_string()));
    }
}

/// Looks at the group now and then until the other end of the channel is dropped. A thread of its own because the answer takes
/// as long as the slowest broker.
fn watch_group(consumer: &BaseConsumer<Context>, group_id: &str, until: &Receiver<()>) {
    let mut watch = Watch::default();
    while until.recv_timeout(LOOK_AT_GROUP_EVERY) == Err(RecvTimeoutError::Timeout) {
        match look_at_group(consumer, group_id, &mut watch) {
            Ok(Some(orphans)) => consumer.context().state().orphans = orphans,
            Ok(None) => {}
            Err(error) => {
                watch.forget();
                log::debug!("cannot look at the group: {error}");
            }
        }
    }
}

fn look_at_group(
    consumer: &BaseConsumer<Context>,
    group_id: &str,
    watch: &mut Watch,
) -> KafkaResult<Option<BTreeSet<Named>>> {
    let list = consumer.fetch_group_list(Some(group_id), ASK_WITHIN)?;
    let group = list.groups().iter().find(|group| group.name() == group_id);
    // Without members nobody could be asked to take more, and in a rebalance it is being done.
    let Some(group) = group.filter(|group| group.state() == "Stable" && !group.members().is_empty()) else {
        watch.forget();
        return Ok(None);
    };
    let mut all = BTreeSet::new();
    for topic in &consumer.context().topics {
        let metadata = consumer.fetch_metadata(Some(topic), ASK_WITHIN)?;
        for found in metadata.topics() {
            let numbers = found.partitions().iter().map(|partition| partition.id());
            all.extend(numbers.map(|number| (found.name().to_owned(), number)));
        }
    }
    let assignments = group.members().iter().filter_map(|member| member.assignment());
    Ok(watch.look(&all, assignments))
}

fn stuck_text(name: &str, offset: i64, head: &BatchHead) -> String {
    format!(
        "{name} stands at offset {offset}: Kafka's client cannot read the batch there ({head}). `host-metrics skip \
         {name}:{offset}` goes past it and notes in the rejected table which offsets were not read"
    )
}

fn partition(topics: &[String], topic: &str, number: i32) -> Option<Partition> {
    let topic = topics.iter().position(|known| known == topic)?;
    let topic = u16::try_from(topic).ok()?;
    Some(Partition { topic, number })
}

#[expect(
    clippy::disallowed_methods,
    reason = "an edge: outages and deadlines need the clock"
)]
fn now() -> Instant {
    Instant::now()
}
