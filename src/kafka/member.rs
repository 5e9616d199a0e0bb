//! A member of a consumer group that is assigned partitions but does not read them.
//!
//! Owns the group's consumer, and makes no decisions about shares. librdkafka is told to read nothing, so no records are fetched.
//! When the group takes partitions back, it waits for [`Member::give_back`], unless it has already removed this member.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use log::Level;
use rdkafka::ClientConfig;
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::groups::GroupList;
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{Offset, TopicPartitionList};

use super::explain::Explainer;
use super::group::{self, Found};
use super::settings::client_config;
use super::topics::{Named, partitions};
use crate::clock::instant_now;
use crate::config::KafkaConfig;
use crate::lock::lock;
use crate::outage::Outage;
use crate::thread::start_thread;

/// How long a question to Kafka may take. The member gets no news from the group meanwhile, and the group waits 6 s for it.
const ASK_WITHIN: Duration = Duration::from_secs(2);

/// The same for one of many questions, and at a stop, when the others wait for our shares.
const ASK_BRIEFLY: Duration = Duration::from_millis(500);

/// How long a dead member keeps its partitions. Brokers allow no less by default.
const SESSION_MS: &str = "6000";

/// Distinguishes producers from other members, including `consume`.
const CLIENT_ID: &str = "host-metrics-produce";

/// What a failed start of a thread says before the reason.
const NO_THREAD: &str = "cannot start a thread for PRODUCE_GROUP";

/// A change of the assignment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// These are ours, in addition to those before.
    Assigned(Vec<Named>),
    /// The group takes these back, and waits for [`Member::give_back`].
    Revoked(Vec<Named>),
    /// We are no longer a member. These were ours.
    Lost(Vec<Named>),
}

/// A committed offset with its metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    pub offset: i64,
    pub metadata: String,
}

/// Why a commit failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotCommitted {
    /// We are not a member, or one of an earlier generation.
    Refused(String),
    /// It is unknown whether it took place.
    Failed(String),
}

pub struct Member {
    group: String,
    config: ClientConfig,
    consumer: Arc<BaseConsumer<Context>>,
    /// To the thread that commits.
    commits: Sender<Commit>,
    /// The thread that watches the group ends when this is dropped.
    watching: Sender<()>,
    /// Both threads also hold the consumer.
    threads: [JoinHandle<()>; 2],
}

type Commit = (Vec<(Named, Committed)>, Answer);
type Answer = Box<dyn FnOnce(Result<(), NotCommitted>) + Send>;

impl Member {
    /// Joins the group as soon as Kafka can be reached. With an `instance_id` this is a static member (KIP-345).
    pub fn join(
        kafka: &KafkaConfig,
        group: &str,
        instance_id: Option<&str>,
        topics: &[&str],
    ) -> anyhow::Result<Self> {
        let mut config = client_config(kafka);
        config
            .set("client.id", CLIENT_ID)
            .set("group.id", group)
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            // Members keep their partitions during a rebalance.
            .set("partition.assignment.strategy", "cooperative-sticky")
            .set("session.timeout.ms", SESSION_MS)
            // How soon a member learns about a rebalance.
            .set("heartbeat.interval.ms", "300")
            // A restarted coordinator keeps dead members this long. It has to be longer than a question to Kafka may take.
            .set("max.poll.interval.ms", "10000")
            .set("socket.timeout.ms", "5000")
            .set("topic.metadata.refresh.interval.ms", "30000")
            .set("allow.auto.create.topics", "false")
            .set("log.connection.close", "false")
            .set_log_level(RDKafkaLogLevel::Warning);
        if let Some(instance_id) = instance_id {
            config.set("group.instance.id", instance_id);
        }
        Self::start(config, Explainer::new(kafka), group.to_owned(), topics)
    }

    fn start(
        config: ClientConfig,
        explainer: Explainer,
        group: String,
        topics: &[&str],
    ) -> anyhow::Result<Self> {
        let context = Context {
            explainer,
            heard: Mutex::default(),
        };
        let consumer: BaseConsumer<Context> = config
            .create_with_context(context)
            .context("cannot make a Kafka consumer for PRODUCE_GROUP")?;
        let consumer = Arc::new(consumer);
        let (commits, requests) = channel::<Commit>();
        let committer = Arc::clone(&consumer);
        let committing = start_thread("commits", move || {
            for (commits, answer) in requests {
                answer(commit(&committer, &commits));
            }
        })
        .context(NO_THREAD)?;
        let (watching, until) = channel();
        let (watched, name) = (Arc::clone(&consumer), group.clone());
        let looking =
            start_thread("group-watch", move || watch_group(&watched, &name, &until)).context(NO_THREAD)?;
        let member = Self {
            group,
            config,
            consumer,
            commits,
            watching,
            threads: [committing, looking],
        };
        member.subscribe(topics)?;
        Ok(member)
    }

    /// Why Kafka has ended this member for good: another one joined with its `instance_id`. There are no more changes then.
    pub fn ended(&self) -> Option<String> {
        let (code, reason) = self.consumer.client().fatal_error()?;
        Some(with_advice(reason, &KafkaError::Global(code)))
    }

    /// Joins as a new member.
    pub fn join_again(&mut self, topics: &[&str]) -> anyhow::Result<()> {
        let explainer = self.consumer.context().explainer.clone();
        let next = Self::start(self.config.clone(), explainer, self.group.clone(), topics)?;
        let ended = std::mem::replace(self, next);
        // Closing it may take long, and waits for the answers to all revocations.
        ended.answer_revocations();
        start_thread("kafka-close", move || drop(ended)).context(NO_THREAD)?;
        Ok(())
    }

    /// Closes the consumer, which waits until Kafka has answered [`Member::leave`]; otherwise the process may end before the request is
    /// sent, and the group waits for the end of our session. If Kafka does not answer in time, the threads end with the process.
    pub fn close(self, within: Duration) {
        let (closed, is_closed) = channel::<()>();
        let closing = start_thread("kafka-close", move || {
            drop((self.commits, self.watching));
            for thread in self.threads {
                // A thread that has panicked holds nothing any more.
                let _ = thread.join();
            }
            drop(self.consumer);
            drop(closed);
        });
        if closing.is_err() || is_closed.recv_timeout(within) == Err(RecvTimeoutError::Timeout) {
            log::debug!("Kafka does not answer; the group was not left properly");
        }
    }

    /// Subscribes to these topics, instead of those before.
    pub fn subscribe(&self, topics: &[&str]) -> anyhow::Result<()> {
        self.consumer
            .subscribe(topics)
            .context("cannot subscribe to the topics of the hosts")
    }

    /// The changes since the last call. Has to be called every few seconds, or the group removes this member.
    pub fn changes(&self) -> Vec<Change> {
        self.adopt_orphans();
        loop {
            let before = self.heard().changes.len();
            // Each call handles one event. There are no records, because nothing is read.
            if let Some(Err(error)) = self.consumer.poll(Duration::ZERO) {
                log::debug!("the group of producers: {error}");
                continue;
            }
            let mut heard = self.heard();
            if heard.changes.len() == before {
                return std::mem::take(&mut heard.changes);
            }
        }
    }

    /// Has partitions without an owner assigned.
    fn adopt_orphans(&self) {
        let mut heard = self.heard();
        let orphans = std::mem::take(&mut heard.orphans);
        if orphans.is_empty() || heard.is_leaving {
            return;
        }
        drop(heard);
        if let Err(error) = group::adopt(&self.consumer, &orphans, Level::Warn) {
            log::error!("cannot join the group again: {error}");
        }
    }

    /// Lets the group assign what it took back.
    pub fn give_back(&self) {
        self.heard().owes = false;
        if let Err(error) = self.consumer.incremental_unassign(&TopicPartitionList::new()) {
            log::debug!("librdkafka refuses the answer to a rebalance: {error}");
        }
    }

    /// Leaves the group, even as a static member.
    pub fn leave(&self) {
        self.answer_revocations();
        self.consumer.unsubscribe();
    }

    /// Answers every revocation at once from now on, and those that wait for an answer.
    fn answer_revocations(&self) {
        let mut heard = self.heard();
        heard.is_leaving = true;
        heard.is_committing = false;
        let is_lost = std::mem::take(&mut heard.has_to_forget);
        let is_waiting = std::mem::take(&mut heard.owes) || is_lost;
        drop(heard);
        if is_waiting {
            self.give_back();
        }
    }

    /// Whether the group has no other member. If Kafka does not answer in time, it may have one.
    pub fn is_alone(&self) -> bool {
        let found = self.consumer.fetch_group_list(Some(&self.group), ASK_BRIEFLY);
        let members = |groups: GroupList| groups.groups().iter().map(|group| group.members().len()).sum();
        found.map_or(0_usize, members) == 1
    }

    /// The group's committed offsets; `None` for a partition without one.
    pub fn committed(&self, partitions: &[Named]) -> Result<Vec<(Named, Option<Committed>)>, String> {
        let mut list = TopicPartitionList::with_capacity(partitions.len());
        for (topic, partition) in partitions {
            list.add_partition(topic, *partition);
        }
        let answer = self.consumer.committed_offsets(list, ASK_WITHIN);
        let answer = answer.map_err(|error| explained(&error))?;
        let mut committed = Vec::with_capacity(partitions.len());
        for element in answer.elements() {
            element.error().map_err(|error| explained(&error))?;
            let found = match element.offset() {
                Offset::Offset(offset) => Some(Committed {
                    offset,
                    metadata: element.metadata().to_owned(),
                }),
                _ => None,
            };
            committed.push(((element.topic().to_owned(), element.partition()), found));
        }
        Ok(committed)
    }

    /// Commits these as a member of the group's present generation. `answer` is called on another thread: while the group's
    /// coordinator is away, librdkafka may wait for longer than the group waits for us. [`Member::end_commit`] has to follow.
    pub fn begin_commit(
        &self,
        commits: Vec<(Named, Committed)>,
        answer: impl FnOnce(Result<(), NotCommitted>) + Send + 'static,
    ) {
        self.heard().is_committing = true;
        if let Err(unsent) = self.commits.send((commits, Box::new(answer))) {
            let (_, answer) = unsent.0;
            answer(Err(NotCommitted::Failed(
                "the thread for commits has ended".to_owned(),
            )));
        }
    }

    /// A commit has been answered.
    pub fn end_commit(&self) {
        let mut heard = self.heard();
        heard.is_committing = false;
        let is_lost = std::mem::take(&mut heard.has_to_forget);
        drop(heard);
        if is_lost {
            self.give_back();
        }
    }

    /// The offsets that a partition holds: the first one, and the one after the last.
    pub fn extent(&self, topic: &str, partition: i32) -> Result<(i64, i64), String> {
        let extent = self.consumer.fetch_watermarks(topic, partition, ASK_BRIEFLY);
        extent.map_err(|error| explained(&error))
    }

    /// The number of partitions of a topic.
    pub fn partitions(&self, topic: &str) -> Result<i32, String> {
        let found = partitions(self.consumer.client(), topic, ASK_WITHIN);
        let found = found.map_err(|error| explained(&error))?;
        Ok(i32::try_from(found.len()).unwrap_or(i32::MAX))
    }

    /// Why Kafka does not admit us to the group.
    pub fn refused(&self) -> Option<String> {
        let reason = self.heard().refused.reason().map(str::to_owned)?;
        Some(self.consumer.context().explainer.explain(&reason))
    }

    /// The same, and for how long, if it is time to log that.
    pub fn refusal(&self, now: Instant) -> Option<(String, Duration)> {
        let mut heard = self.heard();
        let (reason, lasted) = heard.refused.take_report(now)?;
        let reason = reason.to_owned();
        drop(heard);
        Some((self.consumer.context().explainer.explain(&reason), lasted))
    }

    /// Which other programs are members and have partitions of our topics.
    pub fn other_programs(&self) -> Option<String> {
        self.heard().other_programs.reason().map(str::to_owned)
    }

    /// The same, and for how long, if it is time to log that.
    pub fn other_programs_to_report(&self, now: Instant) -> Option<(String, Duration)> {
        let mut heard = self.heard();
        let (who, lasted) = heard.other_programs.take_report(now)?;
        Some((who.to_owned(), lasted))
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.consumer.context().heard()
    }
}

fn watch_group(consumer: &BaseConsumer<Context>, group: &str, until: &Receiver<()>) {
    group::watch_group(consumer, group, until, |found| {
        let mut heard = consumer.context().heard();
        match other_programs(&found) {
            Some(who) => heard.other_programs.begin(instant_now(), who),
            None => drop(heard.other_programs.end(instant_now())),
        }
        heard.orphans = found.orphans;
    });
}

/// The members that are other programs, and their partitions of our topics.
fn other_programs(found: &Found<'_>) -> Option<String> {
    let others = found
        .members
        .iter()
        .filter(|member| member.client_id() != CLIENT_ID);
    let with_partitions: Vec<String> = others
        .filter_map(|member| {
            let mut theirs = group::partitions_in(member.assignment()?)?;
            theirs.retain(|partition| found.all.contains(partition));
            let (name, host) = (member.client_id(), member.client_host());
            (!theirs.is_empty()).then(|| format!("{name:?} at {host} has {}", group::names(&theirs)))
        })
        .collect();
    (!with_partitions.is_empty()).then(|| with_partitions.join(", "))
}

fn commit(consumer: &BaseConsumer<Context>, commits: &[(Named, Committed)]) -> Result<(), NotCommitted> {
    // Without a membership librdkafka would commit without a member id, which Kafka accepts if the group is empty.
    if consumer.assignment_lost() {
        return Err(NotCommitted::Refused(
            "Kafka has removed this producer from the group".to_owned(),
        ));
    }
    let failed = |error: KafkaError| NotCommitted::Failed(explained(&error));
    let mut list = TopicPartitionList::with_capacity(commits.len());
    for ((topic, partition), commit) in commits {
        let mut element = list.add_partition(topic, *partition);
        element
            .set_offset(Offset::Offset(commit.offset))
            .map_err(failed)?;
        element.set_metadata(&commit.metadata);
    }
    consumer
        .commit(&list, CommitMode::Sync)
        .map_err(|error| match error.rdkafka_error_code() {
            Some(
                RDKafkaErrorCode::IllegalGeneration
                | RDKafkaErrorCode::UnknownMemberId
                | RDKafkaErrorCode::FencedInstanceId,
            ) => NotCommitted::Refused(error.to_string()),
            _ => failed(error),
        })?;
    // A member that may commit is not refused, even if an assignment does not follow.
    consumer.context().heard().refused.end(instant_now());
    Ok(())
}

/// The error in one line, with what to do if it does not pass by itself.
pub fn explained(error: &KafkaError) -> String {
    with_advice(error.to_string(), error)
}

fn with_advice(said: String, error: &KafkaError) -> String {
    match advice(error) {
        Some(advice) => format!("{said}; {advice}"),
        None => said,
    }
}

fn advice(error: &KafkaError) -> Option<&'static str> {
    match error.rdkafka_error_code()? {
        RDKafkaErrorCode::TopicAuthorizationFailed | RDKafkaErrorCode::GroupAuthorizationFailed => {
            Some("PRODUCE_GROUP needs the right READ on the group and on the topics")
        }
        RDKafkaErrorCode::InconsistentGroupProtocol => {
            Some("another program uses this group: set another PRODUCE_GROUP")
        }
        RDKafkaErrorCode::InvalidGroupId => Some("set another PRODUCE_GROUP"),
        RDKafkaErrorCode::FencedInstanceId => Some(
            "if this comes again, another producer has the same KAFKA_GROUP_INSTANCE_ID: give each its own",
        ),
        _ => None,
    }
}

#[derive(Default)]
struct Heard {
    changes: Vec<Change>,
    /// Whether the group waits for [`Member::give_back`].
    owes: bool,
    is_leaving: bool,
    is_committing: bool,
    /// We lost the membership during a commit. librdkafka takes the generation when it sends the request, so it must not join
    /// again before that: the ledger belongs to the membership that was lost.
    has_to_forget: bool,
    /// Kafka does not allow what we ask for.
    refused: Outage,
    /// Other programs have partitions.
    other_programs: Outage,
    /// Partitions that no member has.
    orphans: BTreeSet<Named>,
}

struct Context {
    explainer: Explainer,
    heard: Mutex<Heard>,
}

impl Context {
    /// A panic leaves nothing half written, so a poisoned lock is still usable.
    fn heard(&self) -> MutexGuard<'_, Heard> {
        lock(&self.heard)
    }
}

impl ClientContext for Context {
    fn log(&self, _level: RDKafkaLogLevel, facility: &str, line: &str) {
        log::debug!("librdkafka {facility} {line}");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        log::debug!("librdkafka {error}: {reason}");
        self.explainer.hear(&error, reason);
        if advice(&error).is_some() {
            let reason = with_advice(reason.to_owned(), &error);
            self.heard().refused.begin(instant_now(), reason);
        }
    }
}

impl ConsumerContext for Context {
    fn rebalance(
        &self,
        consumer: &BaseConsumer<Self>,
        error: RDKafkaRespErr,
        partitions: &mut TopicPartitionList,
    ) {
        let elements = partitions.elements();
        let named = elements
            .iter()
            .map(|element| (element.topic().to_owned(), element.partition()))
            .collect();
        let nothing = TopicPartitionList::new();
        let is_assigned = error == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS;
        let is_lost = consumer.assignment_lost();
        let mut heard = self.heard();
        let answered = match (is_assigned, is_lost) {
            (true, _) => {
                heard.refused.end(instant_now());
                heard.changes.push(Change::Assigned(named));
                consumer.incremental_assign(&nothing)
            }
            (false, true) => {
                heard.changes.push(Change::Lost(named));
                heard.has_to_forget = heard.is_committing;
                match heard.is_committing {
                    true => Ok(()),
                    false => consumer.incremental_unassign(&nothing),
                }
            }
            (false, false) if heard.is_leaving => consumer.incremental_unassign(&nothing),
            (false, false) => {
                heard.owes = true;
                heard.changes.push(Change::Revoked(named));
                Ok(())
            }
        };
        if let Err(error) = answered {
            log::debug!("librdkafka refuses the answer to a rebalance: {error}");
        }
    }
}
