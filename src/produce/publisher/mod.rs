//! The publisher: a thread that owns the Kafka producer.
//!
//! It keeps every record until Kafka has acknowledged it, through outages of any length and while a topic is missing, and keeps
//! the records of each host in order. The buffer is bounded. Because [`Publisher::has_room`] is asked before a check begins, no
//! result is thrown away. Only records that Kafka refuses for good are given up; they are counted and logged.

mod claims;
mod client;
mod copies;
mod log_lines;
mod reports;
mod search;
mod stored;
mod topics;
mod worker;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::check::target::Target;
use crate::clock::instant_now;
use crate::config::ProduceConfig;
use crate::http::health::{Heartbeat, Readiness};
use crate::produce::share::Share;
use crate::produce::share::shares::Event;
use crate::produce::share::tail::Takeover;
use crate::sample::epoch::Epoch;
use worker::Worker;

/// The size of the buffer: about 50 seconds of 2,000 checks a second, or an hour of 8,000 hosts at five minutes. Every check under
/// way may exceed it by one record. A record has about 650 bytes, and librdkafka adds about 200.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    pub records: usize,
    /// Of keys and values.
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

/// A record. Its key is the address of the target, and its topic that of the target or the default one.
#[derive(Clone, Debug)]
pub struct Record {
    pub target: Arc<Target>,
    /// The share of the host, with PRODUCE_GROUP.
    pub share: Option<Share>,
    /// Unix time in microseconds.
    pub tick: i64,
    /// From [`crate::sample::encode`], without an epoch.
    pub value: Vec<u8>,
    /// KAFKA_TOPIC_FAILURES gets a copy of it.
    pub is_failed_check: bool,
    /// What it counts in the buffer. The value itself changes its length when it gets its epoch.
    bytes: usize,
}

/// A message to the publisher. Letters are processed in the order in which they were sent.
#[derive(Debug)]
pub enum Letter {
    Record(Record),
    /// All records of ticks before `now` were sent, except those of the shares in `open_since` from the time given there.
    Mark {
        now: i64,
        open_since: HashMap<Share, i64>,
    },
    /// Keep the records of this share for now.
    Hold(Share),
    /// Append a claim. The answer is [`Event::Claimed`].
    Claim {
        share: Share,
        epoch: Epoch,
    },
    /// Send the records of this share.
    Open(Takeover),
    /// No record of this share with a tick from `ends_at` on will be sent. The answer is [`Event::Released`].
    End {
        share: Share,
        ends_at: i64,
    },
    /// Another producer owns the share.
    Forget(Share),
}

/// What the publisher of a group member needs.
#[derive(Clone, Debug)]
pub struct Membership {
    /// PRODUCE_GROUP.
    pub group: String,
    /// AGENT_NAME.
    pub place: String,
    /// Receives what happens to shares.
    pub events: Sender<Event>,
}

/// Counts of what became of the records.
#[derive(Debug, Default)]
pub struct Deliveries {
    /// Acknowledged by Kafka.
    pub delivered: AtomicU64,
    /// Failed attempts. The record is sent again.
    pub failed: AtomicU64,
    /// Refused by Kafka for good.
    pub refused: AtomicU64,
    /// Neither acknowledged nor refused yet.
    pub records_on_the_way: AtomicUsize,
    /// Dropped, because another producer had recorded their ticks meanwhile.
    pub superseded: AtomicU64,
    /// The size of the keys and values on the way.
    pub bytes_on_the_way: AtomicUsize,
    /// Copies of failed checks that Kafka has acknowledged.
    pub copies_delivered: AtomicU64,
    /// Copies of failed checks that were given up, because too many of them waited or Kafka refused them.
    pub copies_dropped: AtomicU64,
    /// Of the publisher's thread.
    pub heartbeat: Heartbeat,
    /// Whether Kafka takes records.
    pub readiness: Readiness,
}

/// Records that Kafka had not acknowledged when the publisher had to end.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Unacknowledged {
    pub per_address: BTreeMap<String, u64>,
    /// `None`: unknown.
    pub reason: Option<String>,
}

pub struct Publisher {
    shared: Arc<Shared>,
    ended: Receiver<Unacknowledged>,
}

/// The records of a missing topic may use the buffer divided by this number. A typing error in one `topic=` must not stop the
/// other hosts.
const PART_OF_A_MISSING_TOPIC: usize = 4;

/// How long after its deadline the publisher may end: it may be asking for a topic, pausing, or taking back records.
pub const END_WITHIN: Duration = Duration::from_millis(800);

struct Shared {
    default_topic: String,
    failures_topic: Option<String>,
    bounds: Bounds,
    inbox: Mutex<Inbox>,
    changed: Condvar,
    deliveries: Arc<Deliveries>,
    /// Missing topics that have used up their part of the buffer.
    crowded: Mutex<HashSet<String>>,
    any_crowded: AtomicBool,
}

#[derive(Default)]
struct Inbox {
    letters: Vec<Letter>,
    stop_by: Option<Instant>,
    is_asleep: bool,
}

impl Publisher {
    /// Starts the thread, which waits for Kafka if it cannot be reached.
    ///
    /// # Errors
    /// librdkafka rejects the settings, for example because it cannot read a certificate file, or the thread does not start.
    pub fn start(
        config: &ProduceConfig,
        bounds: Bounds,
        deliveries: Arc<Deliveries>,
        membership: Option<Membership>,
    ) -> anyhow::Result<Self> {
        let mut shared = Shared::new(&config.topic, bounds, deliveries);
        shared.failures_topic.clone_from(&config.failures_topic);
        let shared = Arc::new(shared);
        let worker = Worker::new(Arc::clone(&shared), &config.kafka, membership)?;
        let (end, ended) = sync_channel(1);
        std::thread::Builder::new()
            .name("publisher".into())
            .spawn(move || worker.run(|unacknowledged| drop(end.send(unacknowledged))))
            .context("cannot start the publisher's thread")?;
        Ok(Self { shared, ended })
    }

    /// Whether the buffer has room for one more result of this target.
    pub fn has_room(&self, target: &Target) -> bool {
        self.has_part_of_room(target, 1)
    }

    /// The same for missed ticks. They leave half of the buffer to results, because the schedule keeps them at no cost.
    pub fn has_spare_room(&self, target: &Target) -> bool {
        self.has_part_of_room(target, 2)
    }

    fn has_part_of_room(&self, target: &Target, part: usize) -> bool {
        let Shared { bounds, .. } = *self.shared;
        self.shared.deliveries.records_on_the_way.load(Ordering::Relaxed) < bounds.records / part
            && self.shared.deliveries.bytes_on_the_way.load(Ordering::Relaxed) < bounds.bytes / part
            && !(self.shared.any_crowded.load(Ordering::Relaxed)
                && lock(&self.shared.crowded).contains(self.shared.topic_of(target)))
    }

    /// Takes a record, even if the buffer is full: [`Publisher::has_room`] is asked before a check begins.
    pub fn publish(&self, record: Record) {
        self.shared
            .deliveries
            .records_on_the_way
            .fetch_add(1, Ordering::Relaxed);
        self.shared
            .deliveries
            .bytes_on_the_way
            .fetch_add(record.bytes, Ordering::Relaxed);
        self.tell(Letter::Record(record));
    }

    /// Sends a letter other than [`Letter::Record`].
    pub fn tell(&self, letter: Letter) {
        self.shared.tell(letter);
    }

    /// For other threads.
    pub fn letter_box(&self) -> LetterBox {
        LetterBox(Arc::clone(&self.shared))
    }

    /// The number of records that are not acknowledged yet.
    pub fn on_the_way(&self) -> usize {
        self.shared.deliveries.records_on_the_way.load(Ordering::Relaxed)
    }

    /// Ends the thread when Kafka has acknowledged everything, or at `deadline`.
    ///
    /// # Errors
    /// The records that were not acknowledged.
    pub fn stop(&self, deadline: Instant) -> Result<(), Unacknowledged> {
        lock(&self.shared.inbox).stop_by = Some(deadline);
        self.shared.changed.notify_one();
        let patience = deadline.saturating_duration_since(instant_now()) + END_WITHIN;
        let left = self.ended.recv_timeout(patience).unwrap_or_else(|gone| {
            // Only the thread knows whose records they are.
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

/// The most hosts named in one line. The others are counted.
const NAMED_HOSTS: usize = 10;

impl fmt::Display for Unacknowledged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (records, hosts) = (self.records(), self.per_address.len());
        let plural = |count: u64| if count == 1 { "" } else { "s" };
        let (s_records, s_hosts) = (plural(records), plural(hosts as u64));
        write!(f, "{records} record{s_records} of {hosts} host{s_hosts}: ")?;
        let mut separator = "";
        for (address, count) in self.per_address.iter().take(NAMED_HOSTS) {
            write!(f, "{separator}{address} ({count})")?;
            separator = ", ";
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
    pub fn new(
        target: Arc<Target>,
        share: Option<Share>,
        tick: i64,
        value: Vec<u8>,
        is_failed_check: bool,
    ) -> Self {
        Self {
            bytes: target.address.len() + value.len(),
            target,
            share,
            tick,
            value,
            is_failed_check,
        }
    }
}

/// Lets other threads send letters to the publisher.
#[derive(Clone)]
pub struct LetterBox(Arc<Shared>);

impl LetterBox {
    pub fn tell(&self, letter: Letter) {
        self.0.tell(letter);
    }
}

impl Shared {
    fn tell(&self, letter: Letter) {
        let mut inbox = lock(&self.inbox);
        inbox.letters.push(letter);
        if inbox.is_asleep {
            self.changed.notify_one();
        }
    }

    fn new(default_topic: &str, bounds: Bounds, deliveries: Arc<Deliveries>) -> Self {
        Self {
            default_topic: default_topic.to_owned(),
            failures_topic: None,
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

/// The mutexes here protect values that a panic cannot leave in an invalid state.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_changes_the_value_and_not_what_the_record_counts_for() {
        let target = crate::produce::host_file::target("a.example", &[], None).unwrap();
        let mut record = Record::new(Arc::new(target), None, 0, br#"{"epoch":null}"#.to_vec(), false);
        let bytes = record.bytes;
        crate::sample::epoch::write_into(&mut record.value, 1_000_000);
        assert_eq!(record.value, br#"{"epoch":1000000}"#);
        assert_eq!(record.bytes, bytes);
    }

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
}
