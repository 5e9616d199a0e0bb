//! The publisher: one thread that owns the Kafka producer, its queue and its delivery reports.
//!
//! Owns what lies between a finished check and Kafka's acknowledgement. A record that was taken is kept until Kafka has
//! acknowledged it: through broker outages of any length, through a topic that does not exist (yet, or any more), and in
//! the order of its host. What is kept is bounded; [`Publisher::has_room`] says so before a check begins, so nothing that
//! was measured is ever thrown away. Only what Kafka itself refuses for good is given up, counted and said.

mod search;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{BaseProducer, BaseRecord, DeliveryResult, Producer, ProducerContext, PurgeConfig};
use rdkafka::{ClientContext, Message};

use crate::check::target::Target;
use crate::clock::{instant_now, wall_micros};
use crate::config::KafkaConfig;
use crate::http::health::{Heartbeat, Readiness};
use crate::kafka::{Explainer, names_a_cause};
use crate::outage::{Outage, SAY_AFTER};
use search::{QUESTIONS_WITHIN, Search, is_forbidden};

/// How much is kept for Kafka, give or take a record for each check under way: about 50 seconds of 2,000 checks a second, or an hour of 8,000 hosts at five minutes.
/// A record is about 650 bytes; librdkafka adds some 200 of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    pub records: usize,
    /// Keys and values.
    pub bytes: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            records: 100_000,
            bytes: 64 << 20,
        }
    }
}

/// One record: its key is the target's address, its topic the target's or the default one.
#[derive(Clone, Debug)]
pub struct Record {
    pub target: Arc<Target>,
    pub value: Vec<u8>,
}

/// What became of the records so far.
#[derive(Debug, Default)]
pub struct Deliveries {
    /// Acknowledged by Kafka.
    pub delivered: AtomicU64,
    /// Given back by Kafka, and sent again.
    pub failed: AtomicU64,
    /// Refused by Kafka for good.
    pub refused: AtomicU64,
    /// Taken and neither acknowledged nor refused.
    pub records_on_the_way: AtomicUsize,
    /// Keys and values of those.
    pub bytes_on_the_way: AtomicUsize,
    /// Of the publisher's thread.
    pub heartbeat: Heartbeat,
    /// Whether Kafka takes what is published.
    pub readiness: Readiness,
}

/// Records that Kafka had not acknowledged when the publisher had to end, per address, and why as far as it is known.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Unacknowledged {
    pub per_address: BTreeMap<String, u64>,
    pub reason: Option<String>,
}

pub struct Publisher {
    shared: Arc<Shared>,
    ended: Receiver<Unacknowledged>,
}

/// How often the thread looks for new records and reports while there are any on the way: no record wakes it, so 2,000
/// a second cost 50 wake-ups.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The same while it can only wait for a topic.
const LOOK_EVERY_WAITING: Duration = Duration::from_millis(50);

/// The longest sleep of a thread with nothing to do; the first record wakes it.
const LOOK_EVERY_IDLE: Duration = Duration::from_secs(1);

/// How often a missing topic is looked for, and the longest that one look takes.
const LOOK_FOR_TOPIC_EVERY: Duration = Duration::from_secs(1);
const LOOK_FOR_TOPIC_WITHIN: Duration = Duration::from_millis(500);

/// The part of the bounds that the records of a topic that is not there may take: a slip in one `topic=` must not stop
/// the others.
const SHARE_OF_A_MISSING_TOPIC: usize = 4;

/// How long a look for records that Kafka may have goes on before the thread sees to everything else again, how long after
/// one that failed the next one comes, and after how long it is given up.
const SEARCH_STEP: Duration = Duration::from_millis(100);
const SEARCH_AGAIN_AFTER: Duration = Duration::from_secs(1);
const SEARCH_WITHIN: Duration = Duration::from_secs(60);

/// How long the end waits for librdkafka to hand back what it holds.
const HAND_BACK_WITHIN: Duration = Duration::from_millis(200);

/// The longest that the end takes after its deadline: a look for a topic, a pause, the handing back.
pub const END_WITHIN: Duration = Duration::from_millis(800);

struct Shared {
    default_topic: String,
    bounds: Bounds,
    inbox: Mutex<Inbox>,
    changed: Condvar,
    deliveries: Arc<Deliveries>,
    /// Missing topics that have used up their share.
    crowded: Mutex<HashSet<String>>,
    any_crowded: AtomicBool,
}

#[derive(Default)]
struct Inbox {
    records: Vec<Record>,
    stop_by: Option<Instant>,
    is_asleep: bool,
}

impl Publisher {
    /// Starts the thread; whether Kafka can be reached is found out there, and waited for.
    ///
    /// # Errors
    /// librdkafka refuses the settings (a certificate file that cannot be read, for instance), or no thread can be had.
    pub fn start(
        kafka: &KafkaConfig,
        default_topic: &str,
        bounds: Bounds,
        deliveries: Arc<Deliveries>,
    ) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared::new(default_topic, bounds, deliveries));
        let config = client_config(kafka, bounds);
        let worker = Worker::new(Arc::clone(&shared), config, kafka)?;
        let (end, ended) = sync_channel(1);
        std::thread::Builder::new()
            .name("publisher".into())
            .spawn(move || worker.run(|unacknowledged| drop(end.send(unacknowledged))))
            .context("cannot start the publisher's thread")?;
        Ok(Self { shared, ended })
    }

    /// Whether the result of one more check of this target can be kept until Kafka takes it.
    pub fn has_room(&self, target: &Target) -> bool {
        self.has_share_of_room(target, 1)
    }

    /// The same for what costs nothing to keep elsewhere, ticks that were missed: they leave half of the room to results.
    pub fn has_spare_room(&self, target: &Target) -> bool {
        self.has_share_of_room(target, 2)
    }

    fn has_share_of_room(&self, target: &Target, part: usize) -> bool {
        let Shared { bounds, .. } = *self.shared;
        self.shared.deliveries.records_on_the_way.load(Ordering::Relaxed) < bounds.records / part
            && self.shared.deliveries.bytes_on_the_way.load(Ordering::Relaxed) < bounds.bytes / part
            && !(self.shared.any_crowded.load(Ordering::Relaxed)
                && lock(&self.shared.crowded).contains(self.shared.topic_of(target)))
    }

    /// Takes a record and never refuses it: the bounds are kept by asking [`Publisher::has_room`] before a check begins.
    pub fn publish(&self, record: Record) {
        self.shared
            .deliveries
            .records_on_the_way
            .fetch_add(1, Ordering::Relaxed);
        self.shared
            .deliveries
            .bytes_on_the_way
            .fetch_add(record.bytes(), Ordering::Relaxed);
        let mut inbox = lock(&self.shared.inbox);
        inbox.records.push(record);
        if inbox.is_asleep {
            self.shared.changed.notify_one();
        }
    }

    /// Records taken and not acknowledged yet.
    pub fn on_the_way(&self) -> usize {
        self.shared.deliveries.records_on_the_way.load(Ordering::Relaxed)
    }

    /// Waits until Kafka has acknowledged everything, until `deadline` at the latest, and ends.
    ///
    /// # Errors
    /// Something was never acknowledged.
    pub fn stop(self, deadline: Instant) -> Result<(), Unacknowledged> {
        lock(&self.shared.inbox).stop_by = Some(deadline);
        self.shared.changed.notify_one();
        let patience = deadline.saturating_duration_since(instant_now()) + END_WITHIN;
        let left = self.ended.recv_timeout(patience).unwrap_or_else(|gone| {
            // Whose they are is known to the thread alone, and that hangs or is gone.
            let left = self.shared.deliveries.records_on_the_way.load(Ordering::Relaxed);
            Unacknowledged {
                per_address: BTreeMap::from([("any host".to_owned(), left as u64)]),
                reason: Some(format!("the publisher's thread does not answer ({gone})")),
            }
        });
        match left.per_address.is_empty() {
            true => Ok(()),
            false => Err(left),
        }
    }
}

impl Unacknowledged {
    pub fn records(&self) -> u64 {
        self.per_address.values().sum()
    }
}

/// Hosts named in one line; the rest are counted.
const NAMED_HOSTS: usize = 10;

impl fmt::Display for Unacknowledged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (records, hosts) = (self.records(), self.per_address.len());
        let plural = |count: u64| if count == 1 { "" } else { "s" };
        let (s_records, s_hosts) = (plural(records), plural(hosts as u64));
        write!(f, "{records} record{s_records} of {hosts} host{s_hosts}: ")?;
        let mut parting = "";
        for (address, count) in self.per_address.iter().take(NAMED_HOSTS) {
            write!(f, "{parting}{address} ({count})")?;
            parting = ", ";
        }
        if hosts > NAMED_HOSTS {
            write!(f, " and {} more", hosts - NAMED_HOSTS)?;
        }
        match &self.reason {
            Some(reason) => write!(f, "; {reason}"),
            None => Ok(()),
        }
    }
}

impl Record {
    fn bytes(&self) -> usize {
        self.target.address.len() + self.value.len()
    }
}

impl Shared {
    fn new(default_topic: &str, bounds: Bounds, deliveries: Arc<Deliveries>) -> Self {
        Self {
            default_topic: default_topic.to_owned(),
            bounds,
            inbox: Mutex::default(),
            changed: Condvar::new(),
            deliveries,
            crowded: Mutex::default(),
            any_crowded: AtomicBool::new(false),
        }
    }

    fn topic_of<'a>(&'a self, target: &'a Target) -> &'a str {
        target.topic.as_deref().unwrap_or(&self.default_topic)
    }

    fn release(&self, bytes: usize) {
        self.deliveries.records_on_the_way.fetch_sub(1, Ordering::Relaxed);
        self.deliveries
            .bytes_on_the_way
            .fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Everything that matters is said, the library's default or not.
fn client_config(kafka: &KafkaConfig, bounds: Bounds) -> ClientConfig {
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

/// The thread's state.
struct Worker {
    shared: Arc<Shared>,
    kafka: KafkaConfig,
    config: ClientConfig,
    explainer: Explainer,
    servers: String,
    producer: BaseProducer<Context>,
    topics: Vec<Topic>,
    topic_indices: HashMap<String, usize>,
    /// The order in which records were taken: what comes back is sorted in again by it.
    next_sequence: u64,
    in_flight: usize,
    /// Why the producer cannot be relied on any more: nothing is sent until it is replaced.
    spoiled: Option<String>,
    /// Before it is: the look at the first topic with records in doubt.
    search: Option<Search>,
    /// What it has found so far.
    found_stored: usize,
    search_failed_at: Option<Instant>,
    stop_by: Option<Instant>,
    looked_for_topics_at: Option<Instant>,
    /// Why the servers could not be asked for topics; `None`: they could, or were not asked.
    unreachable: Option<String>,
    acknowledged_at: Instant,
    said_at: Instant,
    silence: Outage,
    /// Refused records since they were last said: how many, and the first one.
    refused: Option<(u64, String)>,
    refused_said_at: Option<Instant>,
}

struct Topic {
    name: String,
    /// Whether it is known to exist; until then its records wait here.
    is_there: bool,
    /// What is wrong with it. Once Kafka has refused its records, only an acknowledged one proves that all is well again.
    why_not: Option<String>,
    was_refused: bool,
    waiting: BTreeMap<u64, Record>,
    /// When the oldest one of those was sent that Kafka may have all the same: Unix time in milliseconds.
    in_doubt_since: Option<i64>,
    in_flight: usize,
    missing: Outage,
}

impl Worker {
    fn new(shared: Arc<Shared>, config: ClientConfig, kafka: &KafkaConfig) -> anyhow::Result<Self> {
        let explainer = Explainer::new(kafka);
        let mut worker = Self {
            producer: new_producer(&config, &explainer)?,
            kafka: kafka.clone(),
            config,
            explainer,
            servers: kafka.bootstrap_servers.clone(),
            topics: Vec::new(),
            topic_indices: HashMap::new(),
            next_sequence: 0,
            in_flight: 0,
            spoiled: None,
            search: None,
            found_stored: 0,
            search_failed_at: None,
            stop_by: None,
            looked_for_topics_at: None,
            unreachable: None,
            acknowledged_at: instant_now(),
            said_at: instant_now(),
            silence: Outage::default(),
            refused: None,
            refused_said_at: None,
            shared,
        };
        // Looked for at once, so that an absent Kafka or topic is said before the first record is due.
        let shared = Arc::clone(&worker.shared);
        worker.topic_index(&shared.default_topic);
        Ok(worker)
    }

    fn run(mut self, end: impl FnOnce(Unacknowledged)) {
        loop {
            for record in self.take_inbox() {
                self.accept(record);
            }
            self.look_for_topics();
            self.mark_crowded_topics();
            self.send_waiting();
            self.serve();
            self.replace_spoiled_producer();
            self.say();
            if let Some(stop_by) = self.stop_by
                && (self.shared.deliveries.records_on_the_way.load(Ordering::Relaxed) == 0
                    || instant_now() >= stop_by)
            {
                break;
            }
        }
        end(self.hand_back());
        // Only now the producer goes: ending its connections may take longer than there is time.
    }

    fn is_idle(&self) -> bool {
        self.topics
            .iter()
            .all(|topic| topic.is_there && topic.waiting.is_empty())
    }

    /// What was published since, after a pause.
    fn take_inbox(&mut self) -> Vec<Record> {
        let is_idle = self.in_flight == 0 && self.is_idle();
        let pause = match self.in_flight {
            0 if is_idle => LOOK_EVERY_IDLE,
            0 => LOOK_EVERY_WAITING,
            _ => LOOK_EVERY,
        };
        let mut inbox = lock(&self.shared.inbox);
        inbox.is_asleep = is_idle;
        let goes_on = |inbox: &mut Inbox| !is_idle || (inbox.records.is_empty() && inbox.stop_by.is_none());
        inbox = self
            .shared
            .changed
            .wait_timeout_while(inbox, pause, goes_on)
            .unwrap_or_else(PoisonError::into_inner)
            .0;
        inbox.is_asleep = false;
        self.stop_by = inbox.stop_by;
        std::mem::take(&mut inbox.records)
    }

    fn accept(&mut self, record: Record) {
        let shared = Arc::clone(&self.shared);
        let index = self.topic_index(shared.topic_of(&record.target));
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let topic = &self.topics[index];
        match self.spoiled.is_none() && topic.is_there && topic.waiting.is_empty() {
            true => self.send(index, sequence, record),
            false => drop(self.topics[index].waiting.insert(sequence, record)),
        }
    }

    fn topic_index(&mut self, name: &str) -> usize {
        if let Some(index) = self.topic_indices.get(name) {
            return *index;
        }
        self.topics.push(Topic {
            name: name.to_owned(),
            is_there: false,
            why_not: None,
            was_refused: false,
            waiting: BTreeMap::new(),
            in_doubt_since: None,
            in_flight: 0,
            missing: Outage::default(),
        });
        self.topic_indices.insert(name.to_owned(), self.topics.len() - 1);
        self.looked_for_topics_at = None;
        self.topics.len() - 1
    }

    /// Gives a record to librdkafka. What that does not take now waits in its topic.
    fn send(&mut self, index: usize, sequence: u64, record: Record) {
        let topic = &mut self.topics[index];
        let sent = Box::new(Sent {
            topic: index,
            sequence,
            target: Arc::clone(&record.target),
            bytes: record.bytes(),
            at_millis: wall_micros() / 1_000,
        });
        let message = BaseRecord::with_opaque_to(&topic.name, sent)
            .key(record.target.address.as_str())
            .payload(record.value.as_slice());
        let Err((error, _)) = self.producer.send(message) else {
            if self.in_flight == 0 {
                // The silence before was nobody's fault.
                self.acknowledged_at = instant_now();
            }
            topic.in_flight += 1;
            self.in_flight += 1;
            return;
        };
        match Fault::of(&error) {
            Fault::Record => return self.refuse(&record.target, record.bytes(), &error),
            Fault::Topic(why) => topic.is_not_there(why),
            // A full queue empties; what else there is librdkafka reports as a fatal error, too.
            Fault::Producer(_) | Fault::HandedBack => {}
        }
        topic.waiting.insert(sequence, record);
    }

    /// Sends what waits in topics that are there, in the order in which it was taken.
    fn send_waiting(&mut self) {
        if self.spoiled.is_some() {
            return;
        }
        for index in 0..self.topics.len() {
            while let topic = &mut self.topics[index]
                && topic.is_there
                && let Some((sequence, record)) = topic.waiting.pop_first()
            {
                self.send(index, sequence, record);
                if self.topics[index].waiting.contains_key(&sequence) {
                    break;
                }
            }
            let topic = &mut self.topics[index];
            if topic.waiting.is_empty() {
                topic.in_doubt_since = None;
            }
        }
    }

    /// Asks the servers for the topics that are not known to exist. Only once all their reports are in: what was on the
    /// way when a topic vanished comes back, and must not be overtaken.
    fn look_for_topics(&mut self) {
        let missing = |topic: &Topic| !topic.is_there && topic.in_flight == 0;
        let now = instant_now();
        let is_early = |at: Instant| now.duration_since(at) < LOOK_FOR_TOPIC_EVERY;
        if !self.topics.iter().any(missing) || self.looked_for_topics_at.is_some_and(is_early) {
            return;
        }
        self.looked_for_topics_at = Some(now);
        self.unreachable = None;
        for topic in self.topics.iter_mut().filter(|topic| missing(topic)) {
            let client = self.producer.client();
            match client.fetch_metadata(Some(&topic.name), LOOK_FOR_TOPIC_WITHIN) {
                Ok(metadata) => {
                    let found = metadata.topics().iter().find(|found| found.name() == topic.name);
                    let fault = found.and_then(|found| found.error());
                    let has_partitions = found.is_some_and(|found| !found.partitions().is_empty());
                    topic.is_there = fault.is_none() && has_partitions;
                    if let Some(fault) = fault {
                        topic.why_not = Some(RDKafkaErrorCode::from(fault).to_string());
                    } else if !has_partitions {
                        topic.why_not = Some("it has no partitions".to_owned());
                    } else if !topic.was_refused {
                        topic.why_not = None;
                    }
                }
                // What cannot be reached for one topic cannot for the next.
                Err(error) => {
                    let last = self.producer.context().last_error();
                    let unknown = || self.explainer.explain(&error.to_string());
                    self.unreachable = Some(last.unwrap_or_else(unknown));
                    break;
                }
            }
        }
    }

    /// Says to those who ask for room which missing topics have used up theirs.
    fn mark_crowded_topics(&self) {
        let share = self.shared.bounds.records / SHARE_OF_A_MISSING_TOPIC;
        // Not while Kafka cannot be asked: then all wait for the same thing.
        let is_missing = |topic: &Topic| !topic.is_there && topic.why_not.is_some();
        let is_crowded = |topic: &&Topic| is_missing(topic) && topic.waiting.len() >= share;
        let crowded: HashSet<String> = self
            .topics
            .iter()
            .filter(is_crowded)
            .map(|topic| topic.name.clone())
            .collect();
        let any = !crowded.is_empty();
        if any || self.shared.any_crowded.load(Ordering::Relaxed) {
            *lock(&self.shared.crowded) = crowded;
            self.shared.any_crowded.store(any, Ordering::Relaxed);
        }
    }

    /// Takes all that librdkafka has to say, without waiting: a poll with a timeout spins through its last millisecond. One
    /// poll takes the reports of one request, of which there may be hundreds between two looks.
    fn serve(&mut self) {
        let events = &Arc::clone(self.producer.context()).events;
        loop {
            let before = events.load(Ordering::Relaxed);
            self.producer.poll(Duration::ZERO);
            if events.load(Ordering::Relaxed) == before {
                break;
            }
        }
        let reports = self.producer.context().take_reports();
        if reports.iter().any(|report| report.failure.is_none()) {
            self.acknowledged_at = instant_now();
            self.producer.context().forget_error();
        }
        for report in reports {
            let Sent {
                topic: index,
                sequence,
                target,
                bytes,
                at_millis,
            } = *report.sent;
            self.in_flight -= 1;
            let topic = &mut self.topics[index];
            topic.in_flight -= 1;
            let Some((error, value)) = report.failure else {
                topic.why_not = None;
                topic.was_refused = false;
                self.shared.deliveries.delivered.fetch_add(1, Ordering::Relaxed);
                self.shared.release(bytes);
                continue;
            };
            match Fault::of(&error) {
                Fault::Record => {
                    self.refuse(&target, bytes, &error);
                    continue;
                }
                Fault::Topic(why) => {
                    topic.is_not_there(why);
                    topic.was_refused = true;
                }
                Fault::Producer(why) => self.spoil(why),
                Fault::HandedBack => {}
            }
            self.shared.deliveries.failed.fetch_add(1, Ordering::Relaxed);
            let topic = &mut self.topics[index];
            topic.waiting.insert(sequence, Record { target, value });
            topic.in_doubt_since = Some(
                topic
                    .in_doubt_since
                    .map_or(at_millis, |since| since.min(at_millis)),
            );
        }
        if let Some((code, reason)) = self.producer.client().fatal_error() {
            self.spoil(format!("{code}: {reason}"));
        }
    }

    fn refuse(&mut self, target: &Target, bytes: usize, error: &KafkaError) {
        self.shared.deliveries.refused.fetch_add(1, Ordering::Relaxed);
        self.shared.release(bytes);
        let first = || (0, format!("{}: {error}", target.address));
        self.refused.get_or_insert_with(first).0 += 1;
    }

    /// A record came back that librdkafka cannot get through, though nothing is wrong with it: the broker lost track of
    /// what this producer sent, say. Everything not sent yet is taken back, so that nothing overtakes it.
    fn spoil(&mut self, why: String) {
        if self.spoiled.is_none() {
            self.spoiled = Some(why);
            self.producer.purge(PurgeConfig::default().queue().non_blocking());
        }
    }

    /// Once the reports of all that was on its way are in, and it is known what Kafka has of that, all the rest goes out by a
    /// new producer, in order.
    fn replace_spoiled_producer(&mut self) {
        if self.in_flight > 0 || self.spoiled.is_none() || !self.has_looked_for_stored() {
            return;
        }
        let Some(why) = &self.spoiled else {
            return;
        };
        match new_producer(&self.config, &self.explainer) {
            Ok(producer) => {
                let (servers, kept, found) = (&self.servers, self.on_hand(), self.found_stored);
                log::error!(
                    "kafka={servers} a new producer takes over, {kept} records go out again, {found} were stored already: {why}"
                );
                self.found_stored = 0;
                self.producer = producer;
                self.spoiled = None;
            }
            Err(error) => log::error!("kafka={} {error:#}; it is tried again", self.servers),
        }
    }

    /// Takes out of what waits what Kafka has stored without saying so; false: that is not over yet. Where Kafka does not
    /// let us look, or not within a bound, those records go out again: twice is better than not at all, and both have the
    /// same `scheduled_at`.
    fn has_looked_for_stored(&mut self) -> bool {
        let now = instant_now();
        let is_early = |at: Instant| now.duration_since(at) < SEARCH_AGAIN_AFTER;
        let is_late = |stop_by: Instant| now + QUESTIONS_WITHIN > stop_by;
        if self.search_failed_at.is_some_and(is_early) || self.stop_by.is_some_and(is_late) {
            return false;
        }
        while let Some(index) = self
            .topics
            .iter()
            .position(|topic| topic.in_doubt_since.is_some())
        {
            match self.look_for_stored(index) {
                Ok(true) => {}
                Ok(false) => return false,
                Err(error) if is_forbidden(&error) => self.give_up_looking(index, &error.to_string()),
                Err(error) => {
                    // Asked again by the same client, which connects meanwhile.
                    log::debug!("cannot look for what is stored: {error}");
                    self.search_failed_at = Some(now);
                    return false;
                }
            }
        }
        true
    }

    fn look_for_stored(&mut self, index: usize) -> Result<bool, KafkaError> {
        let topic = &mut self.topics[index];
        let Some(since) = topic.in_doubt_since else {
            return Ok(true);
        };
        let search = match &mut self.search {
            Some(search) => search,
            none => none.insert(Search::new(&self.kafka, &topic.name, since, &topic.waiting)?),
        };
        let mut found = Vec::new();
        let is_over = search.go_on(instant_now() + SEARCH_STEP, &topic.waiting, |sequence| {
            found.push(sequence);
        })?;
        let took = instant_now().duration_since(search.begun());
        for sequence in found {
            if let Some(record) = topic.waiting.remove(&sequence) {
                self.found_stored += 1;
                self.shared.deliveries.delivered.fetch_add(1, Ordering::Relaxed);
                self.shared.release(record.bytes());
            }
        }
        if is_over {
            self.search = None;
            topic.in_doubt_since = None;
        } else if took > SEARCH_WITHIN {
            self.give_up_looking(index, "Kafka did not let us read it to its end in time");
            return Ok(true);
        }
        Ok(is_over)
    }

    fn give_up_looking(&mut self, index: usize, why: &str) {
        let topic = &mut self.topics[index];
        log::warn!(
            "topic={} records that Kafka stored without saying so may be there twice, for we cannot look: {why}",
            topic.name
        );
        topic.in_doubt_since = None;
        self.search = None;
    }

    fn on_hand(&self) -> usize {
        self.topics.iter().map(|topic| topic.waiting.len()).sum()
    }

    /// Tells what is wrong, at most once in a while, and that it is over.
    fn say(&mut self) {
        let now = instant_now();
        if now.duration_since(self.said_at) > 2 * LOOK_EVERY_IDLE {
            // Not Kafka was silent, we did not listen.
            self.acknowledged_at = now;
        }
        self.said_at = now;
        self.say_silence(now);
        self.say_missing_topics(now);
        self.say_refused(now);
        let Deliveries {
            heartbeat, readiness, ..
        } = &*self.shared.deliveries;
        heartbeat.beat();
        readiness.set(self.is_ready(now));
    }

    /// Whether records get through, or what is waited for. With nothing on the way nobody knows, and nobody minds.
    fn is_ready(&self, now: Instant) -> Result<(), String> {
        let is_silent = self.in_flight > 0 && now.duration_since(self.acknowledged_at) >= SAY_AFTER;
        let reason = if let Some(reason) = &self.unreachable {
            reason.clone()
        } else if is_silent {
            let last = self.producer.context().last_error();
            last.unwrap_or_else(|| "it acknowledges nothing".to_owned())
        } else if let Some(reason) = &self.spoiled {
            reason.clone()
        } else {
            let Some(topic) = self.topics.iter().find(|topic| !topic.is_there) else {
                return Ok(());
            };
            let why_not = topic.why_not.as_deref().unwrap_or("Kafka has not answered yet");
            return Err(format!("waiting for topic {}: {why_not}", topic.name));
        };
        Err(format!("waiting for Kafka at {}: {reason}", self.servers))
    }

    fn say_silence(&mut self, now: Instant) {
        let is_silent = |since: &Instant| self.in_flight > 0 && now.duration_since(*since) >= SAY_AFTER;
        let since = match self.unreachable {
            Some(_) => Some(now),
            None => Some(self.acknowledged_at).filter(is_silent),
        };
        let (servers, room) = (&self.servers, self.shared.bounds.records);
        let kept = self.shared.deliveries.records_on_the_way.load(Ordering::Relaxed);
        let Some(since) = since else {
            if let Some(lasted) = self.silence.end(now) {
                let seconds = lasted.as_secs();
                log::info!(
                    "kafka={servers} answers again after {seconds} s; {kept} records are on their way"
                );
            }
            return;
        };
        let reason = self.unreachable.clone();
        let reason = reason.or_else(|| self.producer.context().last_error());
        let has_cause = reason.as_deref().is_some_and(names_a_cause);
        let reason = reason.unwrap_or_else(|| "it acknowledges nothing".to_owned());
        self.silence.begin(since, reason);
        self.silence.set_cause_known(has_cause);
        if let Some((reason, lasted)) = self.silence.take_report(now) {
            log::warn!(
                "kafka={servers} waiting for it for {} s: {reason}; {kept} records are kept, {room} can be",
                lasted.as_secs()
            );
        }
    }

    fn say_missing_topics(&mut self, now: Instant) {
        for topic in &mut self.topics {
            let (name, kept) = (&topic.name, topic.waiting.len());
            let Some(why_not) = &topic.why_not else {
                if let Some(lasted) = topic.missing.end(now) {
                    log::info!("topic={name} is there after {} s", lasted.as_secs());
                }
                continue;
            };
            topic.missing.begin(now, why_not.clone());
            if let Some((why_not, lasted)) = topic.missing.take_report(now) {
                log::warn!(
                    "topic={name} waiting for it for {} s: {why_not}; `host-metrics init` creates topics; {kept} of its \
                     records are kept",
                    lasted.as_secs()
                );
            }
        }
    }

    fn say_refused(&mut self, now: Instant) {
        let is_early = |at: Instant| now.duration_since(at) < SAY_AFTER;
        if self.refused_said_at.is_some_and(is_early) {
            return;
        }
        if let Some((count, first)) = self.refused.take() {
            log::error!(
                "refused={count} records that Kafka will never take are lost, the first of them {first}"
            );
            self.refused_said_at = Some(now);
        }
    }

    /// Whatever is still here: librdkafka's queue, what waits for a topic, what was not even looked at.
    fn hand_back(&mut self) -> Unacknowledged {
        let reason = self.unreachable.clone();
        let missing = self
            .topics
            .iter()
            .find(|topic| !topic.waiting.is_empty() && !topic.is_there);
        let missing = missing.map(|topic| format!("topic {} is not there", topic.name));
        let reason = reason
            .or(missing)
            .or_else(|| self.producer.context().last_error());
        if self.in_flight > 0 {
            self.producer
                .purge(PurgeConfig::default().queue().inflight().non_blocking());
            let deadline = instant_now() + HAND_BACK_WITHIN;
            while self.in_flight > 0 && instant_now() < deadline {
                self.producer.poll(LOOK_EVERY);
                self.serve();
            }
        }
        let mut per_address = BTreeMap::new();
        let mut count = |target: &Target| {
            *per_address.entry(target.address.clone()).or_insert(0) += 1;
        };
        for topic in &self.topics {
            topic.waiting.values().for_each(|record| count(&record.target));
        }
        lock(&self.shared.inbox)
            .records
            .iter()
            .for_each(|record| count(&record.target));
        let named: u64 = per_address.values().sum();
        let left = self.shared.deliveries.records_on_the_way.load(Ordering::Relaxed) as u64;
        if left > named {
            per_address.insert("hosts that librdkafka did not name".to_owned(), left - named);
        }
        Unacknowledged { per_address, reason }
    }
}

fn new_producer(config: &ClientConfig, explainer: &Explainer) -> anyhow::Result<BaseProducer<Context>> {
    config
        .create_with_context(Context::new(explainer.clone()))
        .context("cannot create the Kafka producer")
}

/// Who is to blame for a record that did not get through.
enum Fault {
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
    fn of(error: &KafkaError) -> Self {
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

impl Topic {
    fn is_not_there(&mut self, why: String) {
        self.is_there = false;
        self.why_not = Some(why);
    }
}

/// What librdkafka keeps for us with every record and hands back with its report.
struct Sent {
    topic: usize,
    sequence: u64,
    target: Arc<Target>,
    bytes: usize,
    /// Unix time: librdkafka does not tell the timestamp of a record that failed.
    at_millis: i64,
}

struct Report {
    sent: Box<Sent>,
    /// Why it failed, and the value back.
    failure: Option<(KafkaError, Vec<u8>)>,
}

/// Collects what librdkafka calls back with, all on the publisher's thread, from within `poll`.
struct Context {
    explainer: Explainer,
    /// Callbacks so far.
    events: AtomicUsize,
    reports: Mutex<Vec<Report>>,
    last_error: Mutex<Option<String>>,
}

impl Context {
    fn new(explainer: Explainer) -> Self {
        Self {
            explainer,
            events: AtomicUsize::default(),
            reports: Mutex::default(),
            last_error: Mutex::default(),
        }
    }

    fn take_reports(&self) -> Vec<Report> {
        std::mem::take(&mut lock(&self.reports))
    }

    /// With what it means for the operator.
    fn last_error(&self) -> Option<String> {
        let last = lock(&self.last_error).clone();
        last.map(|reason| self.explainer.explain(&reason))
    }

    fn forget_error(&self) {
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
        let failure = result
            .as_ref()
            .err()
            .map(|(error, message)| (error.clone(), message.payload().unwrap_or_default().to_vec()));
        lock(&self.reports).push(Report { sent, failure });
    }
}

/// Nothing here is left half done by a panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use rdkafka::mocking::MockCluster;

    use super::*;
    use crate::config::KafkaSecurity;
    use crate::produce::host_file;

    #[test]
    fn what_is_left_names_ten_hosts_and_counts_the_rest() {
        let left = |hosts: u64| Unacknowledged {
            per_address: (0..hosts).map(|i| (format!("h{i:02}"), i + 1)).collect(),
            reason: Some("Connection refused".to_owned()),
        };
        assert_eq!(
            left(1).to_string(),
            "1 record of 1 host: h00 (1); Connection refused"
        );
        assert_eq!(
            left(12).to_string(),
            "78 records of 12 hosts: h00 (1), h01 (2), h02 (3), h03 (4), h04 (5), h05 (6), h06 (7), h07 (8), h08 (9), \
             h09 (10) and 2 more; Connection refused"
        );
    }

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

    #[test]
    fn one_look_takes_the_reports_of_all_requests_that_were_answered() {
        const PARTITIONS: i32 = 64;
        const BOUND: Duration = Duration::from_secs(60);
        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic("t", PARTITIONS, 1).unwrap();
        let kafka = KafkaConfig {
            bootstrap_servers: cluster.bootstrap_servers(),
            security: KafkaSecurity {
                tls: None,
                sasl: None,
            },
        };
        let shared = Arc::new(Shared::new("t", Bounds::default(), Arc::default()));
        let config = client_config(&kafka, Bounds::default());
        let mut worker = Worker::new(shared, config, &kafka).unwrap();
        let deadline = instant_now() + BOUND;
        while !worker.is_idle() {
            assert!(instant_now() < deadline, "the topic is there");
            worker.looked_for_topics_at = None;
            worker.look_for_topics();
        }
        for i in 0..4 * PARTITIONS {
            let target = host_file::target(&format!("h{i}.example"), &[], None).unwrap();
            worker
                .shared
                .deliveries
                .records_on_the_way
                .fetch_add(1, Ordering::Relaxed);
            worker.accept(Record {
                target: Arc::new(target),
                value: b"{}".to_vec(),
            });
        }
        assert_eq!(worker.in_flight, 256);
        // Each partition that has a record gets a request of its own; here all of them are stored.
        let stored = |worker: &Worker| -> i64 {
            let client = worker.producer.client();
            let ends =
                (0..PARTITIONS).map(|partition| client.fetch_watermarks("t", partition, BOUND).unwrap().1);
            ends.sum()
        };
        while stored(&worker) < 256 {
            assert!(instant_now() < deadline, "all are stored");
        }
        let mut looks = 0;
        while worker.in_flight > 0 {
            assert!(instant_now() < deadline, "all are reported");
            let before = worker.in_flight;
            worker.serve();
            looks += usize::from(worker.in_flight < before);
        }
        assert!(
            looks <= 8,
            "{looks} looks for the reports of about {PARTITIONS} requests"
        );
    }
}
