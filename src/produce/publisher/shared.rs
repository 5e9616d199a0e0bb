//! What the publisher's thread and the other threads have in common: records, letters, counts, and the buffer's bounds.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use crate::check::target::Target;
use crate::http::health::{Heartbeat, Readiness};
use crate::lock::lock;
use crate::produce::share::Share;
use crate::produce::share::events::Event;
use crate::produce::share::tail::Takeover;
use crate::sample::epoch::Epoch;
use crate::terminal::counted;

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
    pub(super) bytes: usize,
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
    /// The topics of the group's hosts. They are asked for at once, and missing ones are logged and waited for.
    Topics(Vec<String>),
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

/// The records of a missing topic may use the buffer divided by this number. A typing error in one `topic=` must not stop the
/// other hosts.
pub(super) const PART_OF_A_MISSING_TOPIC: usize = 4;

/// Lets other threads send letters to the publisher.
pub type LetterBox = Arc<Shared>;

pub struct Shared {
    pub(super) default_topic: String,
    pub(super) failures_topic: Option<String>,
    pub(super) bounds: Bounds,
    pub(super) inbox: Mutex<Inbox>,
    pub(super) changed: Condvar,
    pub(super) deliveries: Arc<Deliveries>,
    /// Missing topics that have used up their part of the buffer.
    pub(super) crowded: Mutex<HashSet<String>>,
}

#[derive(Default)]
pub(super) struct Inbox {
    pub(super) letters: Vec<Letter>,
    pub(super) stop_by: Option<Instant>,
    pub(super) is_asleep: bool,
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
        write!(
            f,
            "{} of {}: ",
            counted(records, "record"),
            counted(hosts, "host")
        )?;
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

impl Shared {
    pub fn tell(&self, letter: Letter) {
        let mut inbox = lock(&self.inbox);
        inbox.letters.push(letter);
        if inbox.is_asleep {
            self.changed.notify_one();
        }
    }

    pub(super) fn new(default_topic: &str, bounds: Bounds, deliveries: Arc<Deliveries>) -> Self {
        Self {
            default_topic: default_topic.to_owned(),
            failures_topic: None,
            bounds,
            inbox: Mutex::default(),
            changed: Condvar::new(),
            deliveries,
            crowded: Mutex::default(),
        }
    }

    pub(super) fn topic_of<'a>(&'a self, target: &'a Target) -> &'a str {
        target.topic.as_deref().unwrap_or(&self.default_topic)
    }

    /// The number of records that are not acknowledged yet.
    pub(super) fn on_the_way(&self) -> usize {
        self.deliveries.records_on_the_way.load(Ordering::Relaxed)
    }

    pub(super) fn release(&self, bytes: usize) {
        self.deliveries.records_on_the_way.fetch_sub(1, Ordering::Relaxed);
        self.deliveries
            .bytes_on_the_way
            .fetch_sub(bytes, Ordering::Relaxed);
    }
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
