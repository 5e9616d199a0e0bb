//! The consumer's state machine: what to do next, given what happened.
//!
//! Owns the positions, the two batches and every rule that makes a record durable exactly once. Pure: no I/O, no thread, no
//! clock, no logging; `now` is an argument. The caller reports what happened ([`Ingest::handle`], [`Ingest::record`]) and does
//! what [`Ingest::next_action`] returns, so tests and the simulator can be the caller.
//!
//! # Why every record is stored exactly once
//!
//! 1. A batch contains every record of a partition from its span's `base` up to `next`. Reading starts at the position in the
//!    table; the base of a batch is the `next` of the batch before it; and whatever breaks this chain (a fence, a revocation, a
//!    restart) discards the partition's records from the break on.
//! 2. The transaction that writes them moves the partition's position from `base` to `next`, or does nothing. So of all
//!    consumers that hold records from the same base, one succeeds and all others are fenced.
//! 3. After a fence, and after a flush whose result is unknown, the positions are read before anything else is written. If a
//!    position is at `next`, the records are stored; if it is at `base`, they are not; anywhere else, they belong to another
//!    consumer.
//!
//! Kafka's committed offsets take no part in this. They show the table's positions to lag tools, and are where reading starts
//! if the table has no position.
//!
//! With DB_SYNCHRONOUS_COMMIT=off, a crash of the server can lose the last transactions, rows and positions together. It ends
//! the connection too, so every new connection starts from the positions in the table. Once a second a commit waits for the
//! disk, and only what is on disk is committed to Kafka.

mod actions;
mod events;

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use crate::consume::batch::{Batch, Flushed, NextOffset, Partition, Position, Record, Span};
use crate::sample::epoch::Epochs;

/// A batch is full when it holds DB_BATCH_SIZE KiB, even if it holds fewer records, because two batches must fit into memory
/// even if all records are long. A usual record and its row have less than 1 KiB together. The minimum leaves room for a few
/// records of the greatest length; the maximum applies to the largest DB_BATCH_SIZE.
const BATCH_BYTES_A_RECORD: usize = 1 << 10;
const LEAST_BATCH_BYTES: usize = 8 << 20;
const MOST_BATCH_BYTES: usize = 96 << 20;

/// How long both batches may be full before reading stops. That discards what Kafka's client has prefetched; polling goes on.
/// Longer than any healthy flush, and far below max.poll.interval.ms.
const PAUSE_AFTER: Duration = Duration::from_secs(1);

/// The wait before the first retry after the store failed. It doubles with each further failure.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);

/// The longest wait between two retries. A consumer resumes at most this long after its database.
const BACKOFF_MAX: Duration = Duration::from_secs(10);

/// The shortest time between two commits, which are only for lag tools.
const COMMIT_EVERY: Duration = Duration::from_secs(1);

/// After this time without a commit, the last one is repeated, because it may have been lost: librdkafka does not repeat one that a
/// rebalance made fail, and reports no failure to us.
const COMMIT_AGAIN_AFTER: Duration = Duration::from_secs(60);

/// With DB_SYNCHRONOUS_COMMIT=off, one commit waits for the disk at the latest this long after one that did not.
const SYNC_EVERY: Duration = Duration::from_secs(1);

/// The wait before a retry of something that Kafka refused or did not answer.
const KAFKA_RETRY: Duration = Duration::from_secs(1);

/// How often a failing store is tried during a stop. What is not written is not committed, so nothing is lost.
const TRIES_DURING_STOP: u32 = 2;

/// The longest wait. Stops, retries and commits are at most this late.
const IDLE: Duration = Duration::from_millis(100);

/// The limits of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// DB_BATCH_SIZE: the most records in a flush, including rejected ones. At least 1.
    pub batch_size: usize,
    /// DB_BATCH_SECONDS: a smaller batch is written this long after its oldest record was read.
    pub batch_wait: Duration,
    /// DB_SYNCHRONOUS_COMMIT=off: most commits do not wait for the server's disk.
    pub is_asynchronous: bool,
}

impl Limits {
    /// The bytes at which a batch is full.
    fn batch_bytes(&self) -> usize {
        self.batch_size
            .saturating_mul(BATCH_BYTES_A_RECORD)
            .clamp(LEAST_BATCH_BYTES, MOST_BATCH_BYTES)
    }
}

/// The offsets that a partition holds: that of its first record, and the one after its last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub low: NextOffset,
    pub high: NextOffset,
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// The group assigned these partitions, in addition to those assigned before.
    Assigned(Vec<Partition>),
    /// These are no longer ours: the group took them back, or the membership was lost.
    Revoked(Vec<Partition>),
    /// The answer to [`Action::FindStarts`]. Partitions that it lacks are asked for again.
    Starts(BTreeMap<Partition, NextOffset>),
    /// One of the partitions has no record at our position. Kafka does not say which one.
    OutOfRange,
    /// The answer to [`Action::FindExtents`]. Partitions that it lacks are asked for again.
    Extents(BTreeMap<Partition, Extent>),
    /// Kafka's client cannot read on in these. `host-metrics skip` may have moved their positions meanwhile.
    Stuck(Vec<Partition>),
    /// [`Action::Read`] failed for these.
    ReadFailed(Vec<Partition>),
    /// The answer to [`Request::Open`]. If the table has changed, the rows that are already encoded do not fit it.
    Opened { same_layout: bool },
    /// The answer to [`Request::Locate`].
    Located(BTreeMap<Partition, Position>),
    /// The answer to [`Request::Flush`]: the batch, and what became of it. `None` is a failure that will pass. It may have come
    /// after the COMMIT; the positions tell.
    Flushed(Batch, Option<Flushed>),
    /// [`Request::Open`] or [`Request::Locate`] failed for a reason that will pass.
    StoreFailed,
    /// Stop cleanly: write and commit first what was read, until the deadline.
    Stop { deadline: Instant },
}

/// A request to the store. At most one is under way at a time.
#[derive(Debug, PartialEq, Eq)]
pub enum Request {
    /// Connect, on a new connection if there is one.
    Open,
    /// Read the positions of these from the table. First add those of `missing_from` that it lacks.
    Locate {
        partitions: Vec<Partition>,
        missing_from: BTreeMap<Partition, NextOffset>,
    },
    /// Write this in one transaction.
    Flush(Batch),
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Ask the store.
    Ask(Request),
    /// Ask Kafka for the group's committed offset of each, or for its first offset if there is none.
    FindStarts(Vec<Partition>),
    /// Ask Kafka which offsets these hold. No record may be taken between the question and the answer.
    FindExtents(Vec<Partition>),
    /// Read these from the given offsets on, whatever was read of them before.
    Read(Vec<(Partition, NextOffset)>),
    /// Stop reading all partitions, discard what was prefetched, and go on polling.
    Pause,
    /// Commit these to Kafka: all partitions, so that a commit makes up for a lost one before it.
    Commit(Vec<(Partition, NextOffset)>),
    /// Log this text: something unusual happened.
    Tell(String),
    /// Poll Kafka for records and for changes of the assignment until then.
    Poll { until: Instant },
    /// There is no room for records: wait for the store until then, without polling Kafka.
    Hold { until: Instant },
    /// End. `unwritten` records were read, but neither written nor committed.
    Stop { unwritten: usize },
}

/// The state machine. The module's documentation explains it.
#[derive(Debug)]
pub struct Ingest {
    limits: Limits,
    jitter: fastrand::Rng,
    partitions: BTreeMap<Partition, PartitionState>,
    /// The highest epochs before the next record of each partition. They are read with its position and stored in the same
    /// transaction.
    epochs: BTreeMap<Partition, Epochs>,

    filling: Batch,
    /// When the oldest record of `filling` was read.
    filling_since: Option<Instant>,
    full_since: Option<Instant>,
    flight: Option<Flight>,
    /// An empty batch whose memory is reused.
    spare: Batch,

    store: StoreState,
    /// Failures of the store since its last success.
    failures: u32,

    find_starts_at: Option<Instant>,
    find_extents_at: Option<Instant>,
    /// Positions that were beyond the end when Kafka was asked for the extents.
    beyond_end: BTreeMap<Partition, NextOffset>,
    read_at: Option<Instant>,
    commit_at: Option<Instant>,
    /// The first commit that a crash of the server could undo.
    unsynced_since: Option<Instant>,
    notices: VecDeque<String>,
    stopping: Option<Stopping>,
}

/// The batch that is being written.
#[derive(Debug)]
struct Flight {
    /// `None` while the store has it.
    batch: Option<Batch>,
    /// The spans of the partitions that have been ours ever since the batch was filled. The result of the flush does not
    /// concern the others.
    spans: BTreeMap<Partition, Span>,
    records: usize,
    /// The last attempt may have been written, so the positions are read before the next one.
    in_doubt: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StoreState {
    /// Not connected. It is opened at that time, or now if there is none.
    Closed {
        open_at: Option<Instant>,
    },
    Open,
    /// A request is under way.
    Busy,
}

#[derive(Clone, Copy, Debug)]
struct Stopping {
    deadline: Instant,
    failures: u32,
}

/// A partition that is ours.
#[derive(Clone, Copy, Debug)]
enum PartitionState {
    /// Its position is read from the table next. If the table has none, `start` is added.
    Unlocated {
        start: Option<NextOffset>,
    },
    /// The table has no position, so Kafka is asked where to start.
    Startless,
    Located(Located),
}

#[derive(Clone, Copy, Debug)]
struct Located {
    /// The position in the table, as far as we know.
    durable: NextOffset,
    /// The position in the table once the flight is durable: the base of the next batch.
    tail: NextOffset,
    /// The last `durable` that no crash of the server can undo, if commits may be undone.
    on_disk: Option<NextOffset>,
    /// The next record to read.
    next: NextOffset,
    /// What was last committed to Kafka.
    committed: Option<NextOffset>,
    reading: bool,
    /// Reading started again at the beginning of a recreated topic. Until the next flush the position in the table is the old
    /// topic's, beyond what is read.
    restarted: bool,
}

impl Located {
    fn at(position: NextOffset) -> Self {
        Self {
            durable: position,
            tail: position,
            on_disk: None,
            next: position,
            committed: None,
            reading: false,
            restarted: false,
        }
    }
}

impl PartitionState {
    fn located(&self) -> Option<&Located> {
        match self {
            Self::Located(located) => Some(located),
            _ => None,
        }
    }

    fn located_mut(&mut self) -> Option<&mut Located> {
        match self {
            Self::Located(located) => Some(located),
            _ => None,
        }
    }
}

impl Ingest {
    /// Starts without partitions and with a closed store. `seed` determines the jitter between retries.
    pub fn new(limits: Limits, seed: u64) -> Self {
        Self {
            limits,
            jitter: fastrand::Rng::with_seed(seed),
            partitions: BTreeMap::new(),
            epochs: BTreeMap::new(),
            filling: Batch::default(),
            filling_since: None,
            full_since: None,
            flight: None,
            spare: Batch::default(),
            store: StoreState::Closed { open_at: None },
            failures: 0,
            find_starts_at: None,
            find_extents_at: None,
            beyond_end: BTreeMap::new(),
            read_at: None,
            commit_at: None,
            unsynced_since: None,
            notices: VecDeque::new(),
            stopping: None,
        }
    }

    /// Adds a record to the batch that is being filled. `encode` appends its row, or returns why it has none. False if the
    /// record was dropped because its partition is not ours, because it was read before, or because of a stop.
    pub fn record(
        &mut self,
        now: Instant,
        record: Record<'_>,
        encode: impl FnOnce(&mut Epochs, &mut Vec<u8>) -> Result<(), String>,
    ) -> bool {
        let room = self.has_room();
        let Some(located) = self
            .partitions
            .get_mut(&record.partition)
            .and_then(PartitionState::located_mut)
        else {
            return false;
        };
        if !located.reading || self.stopping.is_some() || located.next.is_past(record.offset) {
            return false;
        }
        if !room {
            // This record is dropped. Taking the next one would lose it, so reading starts again here.
            located.reading = false;
            return false;
        }
        located.next = record.offset.next();
        let epochs = self.epochs.entry(record.partition).or_default();
        let before = epochs.sum();
        self.filling.push(located.tail, record, |row| encode(epochs, row));
        if epochs.sum() != before || located.restarted {
            self.filling.epochs.insert(record.partition, epochs.clone());
        }
        self.filling_since.get_or_insert(now);
        if !self.has_room() {
            self.full_since.get_or_insert(now);
        }
        debug_assert!(self.filling.len() <= self.limits.batch_size);
        true
    }

    /// The partitions that are ours.
    pub fn assigned_partitions(&self) -> impl Iterator<Item = Partition> {
        self.partitions.keys().copied()
    }

    /// The partitions whose position is known, with the position in the table and the next record to read.
    pub fn positions(&self) -> impl Iterator<Item = (Partition, NextOffset, NextOffset)> {
        self.partitions.iter().filter_map(|(partition, progress)| {
            let located = progress.located()?;
            Some((*partition, located.durable, located.next))
        })
    }

    /// The number of records that were read and are not known to be durable.
    pub fn unwritten(&self) -> usize {
        self.filling.len() + self.flight.as_ref().map_or(0, |flight| flight.records)
    }

    /// Whether the store failed and has not succeeded since.
    pub fn store_is_away(&self) -> bool {
        self.failures > 0
    }

    /// Checks what must hold at all times. The simulator calls this after every step, and debug builds after every action.
    ///
    /// # Errors
    /// The invariant that does not hold.
    pub fn invariants(&self) -> Result<(), String> {
        let batch_size = self.limits.batch_size;
        if self.filling.len() > batch_size || self.flight.as_ref().is_some_and(|f| f.records > batch_size) {
            return Err(format!("a batch holds more than {batch_size} records"));
        }
        let in_flight = self.flight.iter().flat_map(|flight| &flight.spans);
        for (partition, span) in in_flight.chain(&self.filling.spans) {
            let Some(PartitionState::Located(located)) = self.partitions.get(partition) else {
                return Err(format!("a batch names {partition}, whose position is not known"));
            };
            if !located.restarted && (span.next > located.next || span.base < located.durable) {
                return Err(format!("{partition}: {span:?} is out of place in {located:?}"));
            }
        }
        for (partition, progress) in &self.partitions {
            let PartitionState::Located(located) = progress else {
                continue;
            };
            let flown = self
                .flight
                .as_ref()
                .and_then(|flight| flight.spans.get(partition));
            let filled = self.filling.spans.get(partition);
            let chained = flown.map_or(located.tail == located.durable, |span| {
                span.base == located.durable && span.next == located.tail
            }) && filled.is_none_or(|span| span.base == located.tail);
            let ordered = located.restarted
                || (located.durable <= located.next
                    && located
                        .committed
                        .is_none_or(|committed| committed <= located.durable));
            if !chained || !ordered {
                return Err(format!(
                    "{partition}: {located:?} with {flown:?} in flight and {filled:?} being filled"
                ));
            }
        }
        Ok(())
    }

    /// Whether another record fits into the batch that is being filled.
    pub fn has_room(&self) -> bool {
        self.filling.len() < self.limits.batch_size && self.filling.bytes() < self.limits.batch_bytes()
    }

    /// What can be committed to Kafka now.
    fn committable(&self, located: &Located) -> Option<NextOffset> {
        let next = match self.limits.is_asynchronous {
            true => located.on_disk,
            false => Some(located.durable),
        };
        // While `restarted`, the position in the table is still the old topic's.
        next.filter(|_| !located.restarted)
    }

    fn is_reading(&self) -> bool {
        let mut located = self.partitions.values().filter_map(PartitionState::located);
        located.any(|located| located.reading)
    }

    fn startless(&self) -> Vec<Partition> {
        let is_startless = |progress: &PartitionState| matches!(progress, PartitionState::Startless);
        let startless = self
            .partitions
            .iter()
            .filter(|(_, progress)| is_startless(progress));
        startless.map(|(partition, _)| *partition).collect()
    }

    fn partitions_where(&self, condition: impl Fn(&Located) -> bool) -> Vec<Partition> {
        self.partitions
            .iter()
            .filter(|(_, progress)| progress.located().is_some_and(&condition))
            .map(|(partition, _)| *partition)
            .collect()
    }

    fn set(&mut self, partition: Partition, change: impl FnOnce(&mut Located)) {
        if let Some(located) = self
            .partitions
            .get_mut(&partition)
            .and_then(PartitionState::located_mut)
        {
            change(located);
        }
    }

    fn has_given_up(&self, now: Instant) -> bool {
        self.stopping
            .is_some_and(|stopping| stopping.failures >= TRIES_DURING_STOP || stopping.deadline <= now)
    }

    fn advance(&mut self, partition: Partition, span: Span) {
        self.set(partition, |located| {
            located.durable = span.next;
            located.restarted = false;
        });
    }

    /// Discards the unwritten records of a partition, and returns how many there were. A partition that is still ours is then
    /// read from the position in the table on.
    fn forget(&mut self, partition: Partition) -> usize {
        let forgotten = self.forget_flown(partition) + self.filling.forget(partition);
        if self.filling.is_empty() {
            self.empty_filling();
        } else if self.has_room() {
            self.full_since = None;
        }
        self.drop_empty_flight();
        self.set(partition, |located| {
            located.tail = located.durable;
            located.next = located.durable;
        });
        forgotten
    }

    fn forget_flown(&mut self, partition: Partition) -> usize {
        let Some(flight) = &mut self.flight else {
            return 0;
        };
        flight.spans.remove(&partition);
        let Some(batch) = &mut flight.batch else {
            return 0;
        };
        let forgotten = batch.forget(partition);
        flight.records = batch.len();
        forgotten
    }

    fn drop_empty_flight(&mut self) {
        let is_empty = |flight: &mut Flight| flight.batch.as_ref().is_some_and(Batch::is_empty);
        if let Some(batch) = self.flight.take_if(is_empty).and_then(|flight| flight.batch) {
            self.recycle(batch);
        }
    }

    /// Keeps a batch that the store has returned unwritten, or with an unknown result, without the partitions that are no
    /// longer ours.
    fn take_back(&mut self, mut batch: Batch) {
        let Some(flight) = &mut self.flight else {
            return;
        };
        let unassigned: Vec<Partition> = batch
            .spans
            .keys()
            .filter(|partition| !flight.spans.contains_key(partition))
            .copied()
            .collect();
        for partition in unassigned {
            batch.forget(partition);
        }
        flight.records = batch.len();
        flight.batch = Some(batch);
        self.drop_empty_flight();
    }

    fn empty_filling(&mut self) {
        self.filling.clear();
        self.filling_since = None;
        self.full_since = None;
    }

    fn recycle(&mut self, mut batch: Batch) {
        batch.clear();
        self.spare = batch;
    }

    /// The exponential wait, shortened by up to half so that many consumers do not retry at the same moment.
    fn backoff(&mut self) -> Duration {
        let doublings = self.failures.saturating_sub(1).min(16);
        let wait = (BACKOFF_FIRST * (1 << doublings)).min(BACKOFF_MAX);
        wait.mul_f64(0.5 + 0.5 * self.jitter.f64())
    }
}

#[cfg(test)]
mod tests;
