//! The publisher: one thread that owns the Kafka producer, its queue and its delivery reports.
//!
//! Owns what lies between a finished check and Kafka's acknowledgement. A record that was taken is kept until Kafka has
//! acknowledged it: through broker outages of any length, through a topic that does not exist (yet, or any more), and in
//! the order of its host. What is kept is bounded; [`Publisher::has_room`] says so before a check begins, so nothing that
//! was measured is ever thrown away. Only what Kafka itself refuses for good is given up, counted and said.

mod client;
mod doubt;
mod says;
mod search;
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
use crate::config::KafkaConfig;
use crate::http::health::{Heartbeat, Readiness};
use crate::produce::share::Share;
use crate::produce::share::shares::Event;
use crate::produce::share::tail::Takeover;
use crate::sample::epoch::Epoch;
use worker::Worker;

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
    /// With PRODUCE_GROUP: its partition.
    pub share: Option<Share>,
    /// Its tick: Unix time in microseconds.
    pub tick: i64,
    /// As [`crate::sample::encode`] made it, without an epoch.
    pub value: Vec<u8>,
}

/// What the publisher is told; it takes letters in the order in which they were sent.
#[derive(Debug)]
pub enum Letter {
    Record(Record),
    /// All records of ticks before `now` were sent, but for those of the shares named here since the time that is given.
    Mark {
        now: i64,
        open_since: HashMap<Share, i64>,
    },
    /// Keep the records of this share.
    Hold(Share),
    /// Append a claim; the answer is [`Event::Claimed`].
    Claim {
        share: Share,
        epoch: Epoch,
    },
    /// Send the records of this share.
    Open(Takeover),
    /// No record of this share's ticks since then will come; the answer is [`Event::Released`].
    End {
        share: Share,
        ends_at: i64,
    },
    /// The share is somebody else's.
    Forget(Share),
}

/// What the members of a group of producers have beside their hosts.
#[derive(Clone, Debug)]
pub struct Membership {
    /// PRODUCE_GROUP.
    pub group: String,
    /// AGENT_NAME.
    pub place: String,
    /// Where the publisher says what became of shares.
    pub events: Sender<Event>,
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
    /// Measured, but somebody else had recorded those ticks by the time that Kafka was back.
    pub superseded: AtomicU64,
    /// Keys and values of those on the way.
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

/// The part of the bounds that the records of a topic that is not there may take: a slip in one `topic=` must not stop
/// the others.
const PART_OF_A_MISSING_TOPIC: usize = 4;

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
    letters: Vec<Letter>,
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
        membership: Option<Membership>,
    ) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared::new(default_topic, bounds, deliveries));
        let worker = Worker::new(Arc::clone(&shared), kafka, membership)?;
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
        self.tell(Letter::Record(record));
    }

    /// A letter that is no record.
    pub fn tell(&self, letter: Letter) {
        self.shared.tell(letter);
    }

    /// For the thread that knows of the group.
    pub fn letter_box(&self) -> LetterBox {
        LetterBox(Arc::clone(&self.shared))
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

/// Where other threads than the one that has the publisher leave letters.
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

/// Nothing here is left half done by a panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

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
