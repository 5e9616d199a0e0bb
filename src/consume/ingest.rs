//! The consumer's state machine: what to do next, given what happened.
//!
//! Owns the positions, the two batches and every rule that makes a record durable exactly once. Pure: no I/O, no thread,
//! no clock, no logging; `now` is an argument, and the bytes of records are somebody else's. The edges report what happened
//! ([`Ingest::handle`], [`Ingest::record`]) and do what [`Ingest::next_action`] says, so that tests and the simulator can
//! be the edges.
//!
//! # Why every record is stored exactly once
//!
//! 1. A partition's part of a batch is every record that was read from its span's `base` on up to `next`: reading starts
//!    at the position that the table holds, a batch's base is the `next` of the batch before it, and whatever breaks that
//!    chain (a fence, a revocation, a restart) forgets the partition's rows from the break on.
//! 2. The transaction that writes them moves the partition's position from `base` to `next` or does nothing. So of all
//!    consumers that ever hold records from the same base, one wins, and every other one is fenced.
//! 3. Whatever is not known for certain is asked: after a fence, and after a flush whose end is in doubt, the positions
//!    are read before anything else is written. A position at `next` means stored; at `base`, not yet; elsewhere, not ours.
//!
//! Kafka's commits play no part in this: they mirror the table for lag tools, and say where to start if the table has
//! no position.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use crate::consume::batch::{Batch, Flushed, NextOffset, Partition, Position, Read, Record, Span};
use crate::sample::epoch::Epochs;

/// A batch is full at DB_BATCH_SIZE KiB, even if it holds fewer records: two batches, the one being written and the one
/// being filled, must fit into memory also when every record is as long as they are read. Records of the usual size and
/// their rows have less than 1 KiB. The least lets a few of the longest in, the most is for the largest DB_BATCH_SIZE.
const BATCH_BYTES_A_RECORD: usize = 1 << 10;
const LEAST_BATCH_BYTES: usize = 8 << 20;
const MOST_BATCH_BYTES: usize = 96 << 20;

/// With both batches full for this long, reading stops (and what Kafka's client has prefetched is thrown away) while
/// polling goes on. Longer than any healthy flush, and far below max.poll.interval.ms.
const PAUSE_AFTER: Duration = Duration::from_secs(1);

/// The wait before the first new try after the store failed; it doubles with every further failure.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);

/// The longest wait between two tries: how much later than the database its consumer may come back.
const BACKOFF_MAX: Duration = Duration::from_secs(10);

/// Commits are a mirror for lag tools: at most one a second, however many flushes there are.
const COMMIT_EVERY: Duration = Duration::from_secs(1);

/// Between two tries of something that Kafka refused or did not answer.
const KAFKA_RETRY: Duration = Duration::from_secs(1);

/// During a stop a failing store is tried this often at most: what it does not take is not committed, so nothing is lost.
const TRIES_DURING_STOP: u32 = 2;

/// The longest wait that is asked for: a bound for the case that nothing is due.
const IDLE: Duration = Duration::from_secs(1);

/// The limits of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// DB_BATCH_SIZE: records per flush at most, rejected ones included. At least 1.
    pub batch_size: usize,
    /// DB_BATCH_SECONDS: a smaller batch is written when its oldest record was read that long ago.
    pub batch_wait: Duration,
}

impl Limits {
    /// The memory of a batch at which it is full.
    pub fn batch_bytes(&self) -> usize {
        self.batch_size
            .saturating_mul(BATCH_BYTES_A_RECORD)
            .clamp(LEAST_BATCH_BYTES, MOST_BATCH_BYTES)
    }
}

/// The offsets that a partition holds: from the first record still there to behind the last one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub low: NextOffset,
    pub high: NextOffset,
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// The group gave us these partitions, in addition to those that we have.
    Assigned(Vec<Partition>),
    /// These are no longer ours: given back, or lost without being asked.
    Revoked(Vec<Partition>),
    /// The answer to [`Action::FindStarts`]. Partitions that are not in it are asked for again.
    Starts(BTreeMap<Partition, NextOffset>),
    /// Kafka holds no record at the position of one of the partitions that are read; it does not say of which.
    OutOfRange,
    /// The answer to [`Action::FindExtents`]. Partitions that are not in it are asked for again.
    Extents(BTreeMap<Partition, Extent>),
    /// Kafka's client cannot read on in these: perhaps somebody moved their positions beyond what it cannot read.
    Stuck(Vec<Partition>),
    /// [`Action::Read`] did not succeed for these.
    ReadFailed(Vec<Partition>),
    /// A commit of these did not succeed.
    CommitFailed(Vec<Partition>),
    /// The answer to [`Action::Open`]. With another layout than before, the rows encoded so far do not fit the table.
    Opened { same_layout: bool },
    /// The answer to [`Action::Locate`].
    Located(BTreeMap<Partition, Position>),
    /// The answer to [`Action::Flush`]: the batch comes back with how it ended.
    Flushed(Batch, Flushed),
    /// The answer to [`Action::Open`] or [`Action::Locate`] where the store could not give it: a passing fault.
    StoreFailed,
    /// Stop cleanly: what was read is written and committed first, until the deadline.
    Stop { deadline: Instant },
}

/// What to do next. At most one request to the store (`Open`, `Locate`, `Flush`) is under way at a time.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Ask the store to connect, afresh if it was connected.
    Open,
    /// Ask the store for positions; partitions that have none there start at the one in `missing_from`, if there.
    Locate {
        partitions: Vec<Partition>,
        missing_from: BTreeMap<Partition, NextOffset>,
    },
    /// Have the store write this in one transaction.
    Flush(Batch),
    /// Ask Kafka for the group's committed offset of each, or else the earliest.
    FindStarts(Vec<Partition>),
    /// Ask Kafka which offsets each of them holds; no record may be taken between the question and the answer.
    FindExtents(Vec<Partition>),
    /// Read these from there on, whatever was read of them before.
    Read(Vec<(Partition, NextOffset)>),
    /// Stop reading all partitions, throw away what was prefetched, keep polling.
    Pause,
    /// Commit these to Kafka.
    Commit(Vec<(Partition, NextOffset)>),
    /// Something unusual that a person should know.
    Tell(Notice),
    /// Poll Kafka for records and changes of the assignment until then.
    Poll { until: Instant },
    /// No room for records: wait for the store's answer until then, without polling Kafka.
    Hold { until: Instant },
    /// It is over. `unwritten` records had been read but not written, nor committed.
    Stop { unwritten: usize },
}

/// What a person should know, of a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Somebody else moved the position: our records from `base` on are forgotten, and reading goes on at `position`.
    Fenced {
        partition: Partition,
        base: NextOffset,
        position: Option<NextOffset>,
        forgotten: usize,
    },
    /// The position lies behind the partition's end: the topic was made anew. Reading starts at its beginning.
    BeyondEnd {
        partition: Partition,
        position: NextOffset,
        extent: Extent,
        forgotten: usize,
    },
    /// The records from the position on are gone (retention): reading goes on with the first that is there.
    BeforeBeginning {
        partition: Partition,
        position: NextOffset,
        extent: Extent,
    },
    /// The table's columns changed: what was read is encoded anew.
    OtherLayout { forgotten: usize },
}

/// The machine. See the module's page.
#[derive(Debug)]
pub struct Ingest {
    limits: Limits,
    jitter: fastrand::Rng,
    partitions: BTreeMap<Partition, Progress>,
    /// The judge: the highest epochs before the next record of each partition. They are read with its position and move in the
    /// same transaction.
    epochs: BTreeMap<Partition, Epochs>,

    filling: Batch,
    /// When the oldest record of `filling` was read.
    filling_since: Option<Instant>,
    full_since: Option<Instant>,
    flight: Option<Flight>,
    /// An empty batch with memory to be used again.
    spare: Batch,

    store: StoreState,
    /// Failures of the store since something last succeeded.
    failures: u32,

    find_starts_at: Option<Instant>,
    find_extents_at: Option<Instant>,
    /// Positions that were beyond the end when Kafka was last asked.
    beyond_end: BTreeMap<Partition, NextOffset>,
    read_at: Option<Instant>,
    commit_at: Option<Instant>,
    notices: VecDeque<Notice>,
    stopping: Option<Stopping>,
}

/// The batch that is being written.
#[derive(Debug)]
struct Flight {
    /// `None` while the store has it.
    batch: Option<Batch>,
    /// The spans of partitions that were ours without a break since the batch was filled: what becomes of the others'
    /// rows is no longer our business.
    spans: BTreeMap<Partition, Span>,
    records: usize,
    /// The last try may have been written or may not: read the positions before the next one.
    in_doubt: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StoreState {
    /// Not connected: to be opened at that time, or at once.
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

/// Where a partition that is ours stands.
#[derive(Clone, Copy, Debug)]
enum Progress {
    /// Its position is to be read from the table. If the table has none, it is to be made from `start`.
    Unlocated {
        start: Option<NextOffset>,
    },
    /// The table has no position: Kafka is to say where to start.
    Startless,
    Located(Located),
}

#[derive(Clone, Copy, Debug)]
struct Located {
    /// What the table holds, as far as we know.
    durable: NextOffset,
    /// What the table will hold when the flight is durable: the base of the next batch.
    tail: NextOffset,
    /// The next record to read.
    next: NextOffset,
    /// What was last sent to Kafka as a commit.
    committed: Option<NextOffset>,
    reading: bool,
    /// Reading began anew at the beginning of a topic that was made anew: until the first flush after that, what the table
    /// holds is of the old topic and beyond what is read.
    restarted: bool,
}

impl Located {
    fn at(position: NextOffset) -> Self {
        Self {
            durable: position,
            tail: position,
            next: position,
            committed: None,
            reading: false,
            restarted: false,
        }
    }
}

impl Progress {
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
    /// A machine without partitions, whose store is not open. `seed` decides the jitter between tries.
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
            notices: VecDeque::new(),
            stopping: None,
        }
    }

    /// Takes note of what happened.
    pub fn handle(&mut self, now: Instant, event: Event) {
        match event {
            Event::Assigned(partitions) => self.assigned(partitions),
            Event::Revoked(partitions) => self.revoked(&partitions),
            Event::Starts(starts) => self.starts(&starts),
            Event::OutOfRange => {
                self.find_extents_at.get_or_insert(now);
            }
            Event::Extents(extents) => self.extents(now, &extents),
            Event::Stuck(partitions) => self.stuck(&partitions),
            Event::ReadFailed(partitions) => self.read_failed(now, &partitions),
            Event::CommitFailed(partitions) => self.commit_failed(&partitions),
            Event::Opened { same_layout } => self.opened(same_layout),
            Event::Located(positions) => self.located(now, &positions),
            Event::Flushed(batch, flushed) => self.flushed(now, batch, flushed),
            Event::StoreFailed => self.store_failed(now),
            Event::Stop { deadline } => self.stop(deadline),
        }
    }

    /// Takes a record into the batch that is being filled; `encode` appends its row or says why there can be none. A record
    /// that is not wanted (not ours, read before, behind a stop) is dropped: false.
    pub fn record(
        &mut self,
        now: Instant,
        record: Record<'_>,
        encode: impl FnOnce(&mut Epochs, &mut Vec<u8>) -> Result<Read, String>,
    ) -> bool {
        let room = self.has_room();
        let Some(located) = self
            .partitions
            .get_mut(&record.partition)
            .and_then(Progress::located_mut)
        else {
            return false;
        };
        if !located.reading || self.stopping.is_some() || located.next.is_past(record.offset) {
            return false;
        }
        if !room {
            // Dropping it and taking the one behind it would lose it: it has to be read again.
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

    /// What to do next. Every action but `Poll` and `Hold` is said once and counts as begun.
    pub fn next_action(&mut self, now: Instant) -> Action {
        if let Some(notice) = self.notices.pop_front() {
            return Action::Tell(notice);
        }
        let action = self
            .store_action(now)
            .or_else(|| self.kafka_action(now))
            .or_else(|| self.stop_action(now))
            .unwrap_or_else(|| self.wait_action(now));
        debug_assert_eq!(self.invariants(), Ok(()), "with {action:?}");
        action
    }

    /// The partitions that are ours.
    pub fn assigned_partitions(&self) -> impl Iterator<Item = Partition> {
        self.partitions.keys().copied()
    }

    /// The partitions whose place is known: what the table holds, and the next record to read.
    pub fn positions(&self) -> impl Iterator<Item = (Partition, NextOffset, NextOffset)> {
        self.partitions.iter().filter_map(|(partition, progress)| {
            let located = progress.located()?;
            Some((*partition, located.durable, located.next))
        })
    }

    /// Records that were read and are not known to be durable.
    pub fn unwritten(&self) -> usize {
        self.filling.len() + self.flight.as_ref().map_or(0, |flight| flight.records)
    }

    /// Whether the store failed and has not succeeded since.
    pub fn store_is_away(&self) -> bool {
        self.failures > 0
    }

    /// What must hold at all times; says what does not. The simulator asks after every step, debug builds after every
    /// action.
    ///
    /// # Errors
    /// The invariant that is broken.
    pub fn invariants(&self) -> Result<(), String> {
        let batch_size = self.limits.batch_size;
        if self.filling.len() > batch_size || self.flight.as_ref().is_some_and(|f| f.records > batch_size) {
            return Err(format!("a batch holds more than {batch_size} records"));
        }
        let in_flight = self.flight.iter().flat_map(|flight| &flight.spans);
        for (partition, span) in in_flight.chain(&self.filling.spans) {
            let Some(Progress::Located(located)) = self.partitions.get(partition) else {
                return Err(format!("a batch names {partition:?}, whose place is not known"));
            };
            if !located.restarted && (span.next > located.next || span.base < located.durable) {
                return Err(format!("{partition:?}: {span:?} is out of place in {located:?}"));
            }
        }
        for (partition, progress) in &self.partitions {
            let Progress::Located(located) = progress else {
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
                    "{partition:?}: {located:?} with {flown:?} in flight and {filled:?} being filled"
                ));
            }
        }
        Ok(())
    }

    // What to do next, by whom.

    fn store_action(&mut self, now: Instant) -> Option<Action> {
        match self.store {
            StoreState::Busy => None,
            StoreState::Closed { open_at } => {
                let needed = self.stopping.is_none() || self.unwritten() > 0;
                let due = open_at.is_none_or(|open_at| open_at <= now);
                (needed && due && !self.gave_up(now)).then(|| {
                    self.store = StoreState::Busy;
                    Action::Open
                })
            }
            StoreState::Open if self.gave_up(now) => None,
            StoreState::Open => self.locate().or_else(|| self.flush(now)),
        }
    }

    fn locate(&mut self) -> Option<Action> {
        let mut partitions = Vec::new();
        let mut missing_from = BTreeMap::new();
        if let Some(flight) = self.flight.as_ref().filter(|flight| flight.in_doubt) {
            partitions.extend(flight.spans.keys().copied());
        }
        if self.stopping.is_none() {
            for (partition, progress) in &self.partitions {
                if let Progress::Unlocated { start } = progress {
                    partitions.push(*partition);
                    missing_from.extend(start.map(|start| (*partition, start)));
                }
            }
        }
        if partitions.is_empty() {
            return None;
        }
        self.store = StoreState::Busy;
        Some(Action::Locate {
            partitions,
            missing_from,
        })
    }

    fn flush(&mut self, now: Instant) -> Option<Action> {
        if self.flight.is_none() && self.is_due(now) {
            let batch = std::mem::replace(&mut self.filling, std::mem::take(&mut self.spare));
            self.filling_since = None;
            self.full_since = None;
            for (partition, span) in &batch.spans {
                if let Some(located) = self.partitions.get_mut(partition).and_then(Progress::located_mut) {
                    located.tail = span.next;
                }
            }
            self.flight = Some(Flight {
                spans: batch.spans.clone(),
                records: batch.len(),
                batch: Some(batch),
                in_doubt: false,
            });
        }
        let batch = self.flight.as_mut()?.batch.take()?;
        self.store = StoreState::Busy;
        Some(Action::Flush(batch))
    }

    fn is_due(&self, now: Instant) -> bool {
        let waited = |since| now.saturating_duration_since(since) >= self.limits.batch_wait;
        !self.filling.is_empty()
            && (!self.has_room() || self.stopping.is_some() || self.filling_since.is_some_and(waited))
    }

    fn kafka_action(&mut self, now: Instant) -> Option<Action> {
        if self.stopping.is_some() {
            return None;
        }
        self.find_starts(now)
            .or_else(|| self.find_extents(now))
            .or_else(|| self.read_or_pause(now))
            .or_else(|| self.commit(now))
    }

    fn find_starts(&mut self, now: Instant) -> Option<Action> {
        if self.find_starts_at.is_some_and(|at| now < at) {
            return None;
        }
        let partitions = self.startless();
        if partitions.is_empty() {
            return None;
        }
        self.find_starts_at = Some(now + KAFKA_RETRY);
        Some(Action::FindStarts(partitions))
    }

    fn find_extents(&mut self, now: Instant) -> Option<Action> {
        self.find_extents_at.take_if(|at| *at <= now)?;
        let partitions = self.partitions_where(|located| located.reading);
        (!partitions.is_empty()).then_some(Action::FindExtents(partitions))
    }

    fn read_or_pause(&mut self, now: Instant) -> Option<Action> {
        if self.has_room() {
            if self.read_at.is_some_and(|at| now < at) {
                return None;
            }
            self.read_at = None;
            let mut starting = Vec::new();
            for (partition, progress) in &mut self.partitions {
                if let Some(located) = progress.located_mut().filter(|located| !located.reading) {
                    located.reading = true;
                    starting.push((*partition, located.next));
                }
            }
            return (!starting.is_empty()).then_some(Action::Read(starting));
        }
        let paused_too_soon = self.full_since.is_some_and(|since| now < since + PAUSE_AFTER);
        if paused_too_soon || !self.is_reading() {
            return None;
        }
        for progress in self.partitions.values_mut() {
            if let Some(located) = progress.located_mut() {
                located.reading = false;
            }
        }
        Some(Action::Pause)
    }

    fn commit(&mut self, now: Instant) -> Option<Action> {
        if self.stopping.is_none() && self.commit_at.is_some_and(|at| now < at) {
            return None;
        }
        let mut commits = Vec::new();
        for (partition, progress) in &mut self.partitions {
            let Some(located) = progress.located_mut() else {
                continue;
            };
            // After a restart what the table holds is of the old topic.
            if located.committed != Some(located.durable) && !located.restarted {
                located.committed = Some(located.durable);
                commits.push((*partition, located.durable));
            }
        }
        if commits.is_empty() {
            return None;
        }
        self.commit_at = Some(now + COMMIT_EVERY);
        Some(Action::Commit(commits))
    }

    fn stop_action(&mut self, now: Instant) -> Option<Action> {
        self.stopping?;
        let unwritten = self.unwritten();
        if unwritten > 0 && !self.gave_up(now) {
            return None;
        }
        self.commit(now).or(Some(Action::Stop { unwritten }))
    }

    fn wait_action(&self, now: Instant) -> Action {
        let opening = match self.store {
            StoreState::Closed { open_at } => open_at,
            _ => None,
        };
        let filled = match (self.store, &self.flight) {
            (StoreState::Open, None) => self.filling_since.map(|since| since + self.limits.batch_wait),
            _ => None,
        };
        let uncommitted =
            |located: &Located| located.committed != Some(located.durable) && !located.restarted;
        let committing = self.commit_at.filter(|_| self.is_any(uncommitted));
        let starting = self.find_starts_at.filter(|_| !self.startless().is_empty());
        let until = [opening, filled, committing, starting]
            .into_iter()
            .chain([self.find_extents_at, self.read_at])
            .chain([self.full_since.map(|since| since + PAUSE_AFTER)])
            .chain([self.stopping.map(|stopping| stopping.deadline)])
            .flatten()
            .filter(|at| *at > now)
            .fold(now + IDLE, Instant::min);
        if !self.has_room() && self.is_reading() {
            Action::Hold { until }
        } else {
            Action::Poll { until }
        }
    }

    // What happened, by whom.

    fn assigned(&mut self, partitions: Vec<Partition>) {
        self.revoked(&partitions);
        for partition in partitions {
            self.partitions
                .insert(partition, Progress::Unlocated { start: None });
        }
    }

    fn revoked(&mut self, partitions: &[Partition]) {
        for partition in partitions {
            if self.partitions.remove(partition).is_some() {
                self.epochs.remove(partition);
                self.forget(*partition);
            }
        }
    }

    fn starts(&mut self, starts: &BTreeMap<Partition, NextOffset>) {
        for (partition, start) in starts {
            if let Some(progress @ Progress::Startless) = self.partitions.get_mut(partition) {
                *progress = Progress::Unlocated { start: Some(*start) };
            }
        }
        if self.startless().is_empty() {
            self.find_starts_at = None;
        }
    }

    fn extents(&mut self, now: Instant, extents: &BTreeMap<Partition, Extent>) {
        let read = self.partitions_where(|located| located.reading);
        let suspected = std::mem::take(&mut self.beyond_end);
        let mut ask_again = read.iter().any(|partition| !extents.contains_key(partition));
        for (&partition, &extent) in extents {
            let Some(Progress::Located(located)) = self.partitions.get(&partition).copied() else {
                continue;
            };
            let position = located.next;
            if !located.reading || (extent.low <= position && position <= extent.high) {
                continue;
            }
            if position < extent.low {
                self.notices.push_back(Notice::BeforeBeginning {
                    partition,
                    position,
                    extent,
                });
                self.set(partition, |located| {
                    located.next = extent.low;
                    located.reading = false;
                });
            } else if suspected.get(&partition) == Some(&position) {
                let forgotten = self.forget(partition);
                self.notices.push_back(Notice::BeyondEnd {
                    partition,
                    position,
                    extent,
                    forgotten,
                });
                self.set(partition, |located| {
                    located.next = extent.low;
                    located.reading = false;
                    located.committed = None;
                    located.restarted = true;
                });
                self.epochs.remove(&partition);
            } else {
                // Starting over stores the whole partition again, so one answer, which may come from a replica that
                // is behind, does not suffice.
                self.beyond_end.insert(partition, position);
                ask_again = true;
            }
        }
        if ask_again {
            self.find_extents_at = Some(now + KAFKA_RETRY);
        } else {
            // Kafka does not say which it meant, and that one is not being read any more, even if its position is within
            // its extent again: all are read from where they stand, after a while lest this spins.
            self.read_failed(now, &read);
        }
    }

    /// Has the positions read again. What is read and not written yet comes first: it may be what moves the position.
    fn stuck(&mut self, partitions: &[Partition]) {
        for partition in partitions {
            let in_flight = self
                .flight
                .as_ref()
                .is_some_and(|flight| flight.spans.contains_key(partition));
            let is_unwritten = in_flight || self.filling.spans.contains_key(partition);
            match self.partitions.get_mut(partition) {
                // Of a topic that was made anew the table knows nothing yet.
                Some(progress) if !is_unwritten && progress.located().is_some_and(|at| !at.restarted) => {
                    *progress = Progress::Unlocated { start: None };
                }
                _ => {}
            }
        }
    }

    fn read_failed(&mut self, now: Instant, partitions: &[Partition]) {
        self.read_at = Some(now + KAFKA_RETRY);
        for partition in partitions {
            self.set(*partition, |located| located.reading = false);
        }
    }

    fn commit_failed(&mut self, partitions: &[Partition]) {
        for partition in partitions {
            self.set(*partition, |located| located.committed = None);
        }
    }

    fn opened(&mut self, same_layout: bool) {
        self.store = StoreState::Open;
        if same_layout {
            return;
        }
        let forgotten = self.unwritten();
        self.flight = None;
        self.empty_filling();
        for progress in self.partitions.values_mut() {
            if progress.located().is_some() {
                *progress = Progress::Unlocated { start: None };
            }
        }
        if forgotten > 0 {
            self.notices.push_back(Notice::OtherLayout { forgotten });
        }
    }

    fn located(&mut self, now: Instant, positions: &BTreeMap<Partition, Position>) {
        self.store = StoreState::Open;
        if let Some(flight) = self.flight.as_mut().filter(|flight| flight.in_doubt) {
            flight.in_doubt = false;
            for (partition, span) in flight.spans.clone() {
                self.resolve(partition, span, positions.get(&partition));
            }
            self.drop_empty_flight();
        }
        if self.flight.is_none() {
            self.failures = 0;
        }
        for (partition, progress) in &mut self.partitions {
            if let Progress::Unlocated { start } = progress {
                match positions.get(partition) {
                    Some(position) => {
                        *progress = Progress::Located(Located::at(position.next));
                        self.epochs.insert(*partition, position.epochs.clone());
                    }
                    // Either the table has none, or it was assigned while the question was under way: then the start
                    // that is looked for now will not be used.
                    None => {
                        if start.is_some() {
                            self.find_starts_at = Some(now + KAFKA_RETRY);
                        }
                        *progress = Progress::Startless;
                    }
                }
            }
        }
    }

    /// What became of a flight's partition, told by the table's position.
    fn resolve(&mut self, partition: Partition, span: Span, found: Option<&Position>) {
        let position = found.map(|found| found.next);
        if position == Some(span.base) {
            return;
        }
        if position == Some(span.next) {
            self.forget_flown(partition);
            self.advance(partition, span);
            return;
        }
        let forgotten = self.forget(partition);
        self.notices.push_back(Notice::Fenced {
            partition,
            base: span.base,
            position,
            forgotten,
        });
        let progress = match position {
            Some(position) => Progress::Located(Located::at(position)),
            None => Progress::Startless,
        };
        self.partitions.insert(partition, progress);
        self.epochs.insert(
            partition,
            found.map_or_else(Epochs::default, |found| found.epochs.clone()),
        );
    }

    fn flushed(&mut self, now: Instant, mut batch: Batch, flushed: Flushed) {
        let Some(flight) = self.flight.as_mut() else {
            // Forgotten meanwhile: nothing waits for it.
            self.store = StoreState::Open;
            self.recycle(batch);
            return;
        };
        match flushed {
            Flushed::Durable => {
                let spans = std::mem::take(&mut flight.spans);
                self.flight = None;
                self.store = StoreState::Open;
                self.failures = 0;
                for (partition, span) in spans {
                    self.advance(partition, span);
                }
                self.recycle(batch);
            }
            Flushed::Poison(refused) => {
                let mut progress = false;
                for (index, reason) in refused {
                    progress |= batch.reject(index, reason);
                }
                self.take_back(batch);
                if progress {
                    self.store = StoreState::Open;
                } else {
                    self.store_failed(now);
                }
            }
            Flushed::Fenced => {
                flight.in_doubt = true;
                self.take_back(batch);
                // A fence that turns out to be none must not spin: the second one in a row waits.
                self.failures += 1;
                self.store = match self.failures {
                    0..=1 => StoreState::Open,
                    _ => StoreState::Closed {
                        open_at: Some(now + self.backoff()),
                    },
                };
            }
            Flushed::Retry(_) | Flushed::Fatal(_) => {
                flight.in_doubt = true;
                self.take_back(batch);
                self.store_failed(now);
            }
        }
    }

    fn store_failed(&mut self, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        let open_at = match &mut self.stopping {
            Some(stopping) => {
                stopping.failures += 1;
                None
            }
            None => Some(now + self.backoff()),
        };
        self.store = StoreState::Closed { open_at };
    }

    fn stop(&mut self, deadline: Instant) {
        if self.stopping.is_some() {
            return;
        }
        self.stopping = Some(Stopping {
            deadline,
            failures: 0,
        });
        if let StoreState::Closed { open_at } = &mut self.store {
            *open_at = None;
        }
    }

    // Helpers.

    /// Whether another record fits into the batch that is being filled.
    pub fn has_room(&self) -> bool {
        self.filling.len() < self.limits.batch_size && self.filling.bytes() < self.limits.batch_bytes()
    }

    fn is_any(&self, condition: impl Fn(&Located) -> bool) -> bool {
        self.partitions
            .values()
            .filter_map(Progress::located)
            .any(condition)
    }

    fn is_reading(&self) -> bool {
        self.is_any(|located| located.reading)
    }

    fn startless(&self) -> Vec<Partition> {
        let is_startless = |progress: &Progress| matches!(progress, Progress::Startless);
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
            .and_then(Progress::located_mut)
        {
            change(located);
        }
    }

    fn gave_up(&self, now: Instant) -> bool {
        self.stopping
            .is_some_and(|stopping| stopping.failures >= TRIES_DURING_STOP || stopping.deadline <= now)
    }

    fn advance(&mut self, partition: Partition, span: Span) {
        self.set(partition, |located| {
            located.durable = span.next;
            located.restarted = false;
        });
    }

    /// Forgets the unwritten records of a partition, wherever they are; says how many those were. The position of a
    /// partition that is still ours is then what the table holds.
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

    /// The flight's batch is back from the store, unwritten or in doubt; what is no longer ours is taken out of it.
    fn take_back(&mut self, mut batch: Batch) {
        let Some(flight) = &mut self.flight else {
            return;
        };
        let strangers: Vec<Partition> = batch
            .spans
            .keys()
            .filter(|partition| !flight.spans.contains_key(partition))
            .copied()
            .collect();
        for partition in strangers {
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

    /// Half to all of the exponential wait, so that many consumers do not come back in step.
    fn backoff(&mut self) -> Duration {
        let doublings = self.failures.saturating_sub(1).min(16);
        let wait = (BACKOFF_FIRST * (1 << doublings)).min(BACKOFF_MAX);
        wait.mul_f64(0.5 + 0.5 * self.jitter.f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consume::batch::{Form, Offset};

    const P: Partition = Partition { topic: 0, number: 0 };
    const Q: Partition = Partition { topic: 0, number: 1 };

    /// The time of the tests: milliseconds since something.
    fn at(millis: u64) -> Instant {
        static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        #[expect(clippy::disallowed_methods, reason = "an instant to count from")]
        let start = *START.get_or_init(Instant::now);
        start + Duration::from_millis(millis)
    }

    /// A machine whose store is open; batches of 3 within 200 ms.
    fn open() -> Ingest {
        let limits = Limits {
            batch_size: 3,
            batch_wait: Duration::from_millis(200),
        };
        let mut ingest = Ingest::new(limits, 1);
        assert_eq!(ingest.next_action(at(0)), Action::Open);
        ingest.handle(at(0), Event::Opened { same_layout: true });
        ingest
    }

    /// One that reads `partitions` from offset 100, at time 0.
    fn reading(partitions: &[Partition]) -> Ingest {
        let mut ingest = open();
        ingest.handle(at(0), Event::Assigned(partitions.to_vec()));
        let locate = Action::Locate {
            partitions: partitions.to_vec(),
            missing_from: BTreeMap::new(),
        };
        assert_eq!(ingest.next_action(at(0)), locate);
        ingest.handle(at(0), Event::Located(found_at(partitions, 100)));
        let starts: Vec<_> = all_at(partitions, 100).into_iter().collect();
        assert_eq!(ingest.next_action(at(0)), Action::Read(starts.clone()));
        assert_eq!(ingest.next_action(at(0)), Action::Commit(starts));
        ingest
    }

    fn all_at(partitions: &[Partition], position: i64) -> BTreeMap<Partition, NextOffset> {
        let place = |partition: &Partition| (*partition, NextOffset(position));
        partitions.iter().map(place).collect()
    }

    /// As the table says it.
    fn found_at(partitions: &[Partition], position: i64) -> BTreeMap<Partition, Position> {
        let place = |partition: &Partition| (*partition, Position::from(NextOffset(position)));
        partitions.iter().map(place).collect()
    }

    fn read(ingest: &mut Ingest, millis: u64, partition: Partition, offset: i64) -> bool {
        let record = Record {
            partition,
            offset: Offset(offset),
            timestamp: None,
            key: None,
            value: Some(b"value"),
        };
        ingest.record(at(millis), record, |_, row| {
            row.extend_from_slice(b"row");
            Ok(Read::Row)
        })
    }

    fn flush(ingest: &mut Ingest, millis: u64) -> Batch {
        match ingest.next_action(at(millis)) {
            Action::Flush(batch) => batch,
            action => panic!("{action:?} instead of a flush"),
        }
    }

    fn span(base: i64, next: i64) -> Span {
        Span {
            base: NextOffset(base),
            next: NextOffset(next),
        }
    }

    /// Lets the machine do what it wants up to its next wait; the store is not to be asked for anything.
    fn wait_of(ingest: &mut Ingest, millis: u64) -> Action {
        loop {
            match ingest.next_action(at(millis)) {
                action @ (Action::Poll { .. } | Action::Hold { .. }) => return action,
                Action::Commit(_) | Action::Tell(_) | Action::Read(_) => {}
                action => panic!("{action:?} instead of a wait"),
            }
        }
    }

    #[test]
    fn nothing_is_read_or_asked_before_the_store_is_open() {
        let limits = Limits {
            batch_size: 1,
            batch_wait: Duration::ZERO,
        };
        let mut ingest = Ingest::new(limits, 1);
        ingest.handle(at(0), Event::Assigned(vec![P]));
        assert_eq!(ingest.next_action(at(0)), Action::Open);
        assert!(matches!(ingest.next_action(at(0)), Action::Poll { .. }));
        assert!(!read(&mut ingest, 0, P, 0), "taken before its place is known");
    }

    #[test]
    fn a_small_batch_is_written_when_its_oldest_record_has_waited() {
        let mut ingest = reading(&[P, Q]);
        assert!(read(&mut ingest, 1_000, P, 100));
        assert!(read(&mut ingest, 1_150, Q, 107));
        let until = at(1_200);
        assert_eq!(wait_of(&mut ingest, 1_199), Action::Poll { until });
        let batch = flush(&mut ingest, 1_200);
        assert_eq!(
            batch.spans,
            BTreeMap::from([(P, span(100, 101)), (Q, span(100, 108))])
        );
    }

    #[test]
    fn a_backlog_is_written_in_full_batches_and_the_next_one_fills_meanwhile() {
        let mut ingest = reading(&[P]);
        for offset in 100..103 {
            assert!(read(&mut ingest, 0, P, offset));
        }
        assert!(!ingest.has_room());
        let first = flush(&mut ingest, 0);
        assert_eq!((first.len(), first.spans[&P]), (3, span(100, 103)));
        for offset in 103..106 {
            assert!(read(&mut ingest, 0, P, offset));
        }
        assert!(matches!(ingest.next_action(at(0)), Action::Hold { .. }));
        ingest.handle(at(10), Event::Flushed(first, Flushed::Durable));
        let second = flush(&mut ingest, 10);
        assert_eq!((second.len(), second.spans[&P]), (3, span(103, 106)));
    }

    #[test]
    fn a_record_that_finds_no_room_is_read_again_and_not_skipped() {
        let mut ingest = reading(&[P]);
        for offset in 100..103 {
            assert!(read(&mut ingest, 0, P, offset));
        }
        assert!(!read(&mut ingest, 0, P, 103));
        assert!(!read(&mut ingest, 0, P, 104));
        let _batch = flush(&mut ingest, 0);
        assert_eq!(
            ingest.next_action(at(0)),
            Action::Read(vec![(P, NextOffset(103))])
        );
    }

    #[test]
    fn with_both_batches_full_reading_stops_after_a_second_and_goes_on_where_it_was() {
        let mut ingest = reading(&[P]);
        for offset in 100..103 {
            read(&mut ingest, 0, P, offset);
        }
        let batch = flush(&mut ingest, 0);
        for offset in 103..106 {
            read(&mut ingest, 50, P, offset);
        }
        let until = at(1_050);
        assert_eq!(ingest.next_action(at(100)), Action::Hold { until });
        assert_eq!(ingest.next_action(at(1_050)), Action::Pause);
        assert!(matches!(ingest.next_action(at(1_050)), Action::Poll { .. }));
        assert!(!read(&mut ingest, 1_100, P, 106), "it is paused");
        ingest.handle(at(5_000), Event::Flushed(batch, Flushed::Durable));
        flush(&mut ingest, 5_000);
        assert_eq!(
            ingest.next_action(at(5_000)),
            Action::Read(vec![(P, NextOffset(106))])
        );
    }

    #[test]
    fn where_kafkas_client_is_stuck_the_position_is_read_again_once_nothing_is_unwritten() {
        let mut ingest = reading(&[P]);
        read(&mut ingest, 0, P, 100);
        ingest.handle(at(100), Event::Stuck(vec![P]));
        let batch = flush(&mut ingest, 200);
        ingest.handle(at(200), Event::Stuck(vec![P]));
        ingest.handle(at(200), Event::Flushed(batch, Flushed::Durable));
        assert!(read(&mut ingest, 200, P, 101), "it is still being read");
        let batch = flush(&mut ingest, 400);
        ingest.handle(at(400), Event::Flushed(batch, Flushed::Durable));

        ingest.handle(at(400), Event::Stuck(vec![P]));
        let expected = Action::Locate {
            partitions: vec![P],
            missing_from: BTreeMap::new(),
        };
        assert_eq!(ingest.next_action(at(400)), expected);
        ingest.handle(at(400), Event::Located(found_at(&[P], 150)));
        assert_eq!(
            ingest.next_action(at(400)),
            Action::Read(vec![(P, NextOffset(150))])
        );
    }

    #[test]
    fn a_batch_of_huge_records_is_full_before_it_has_its_number() {
        let mut ingest = reading(&[P]);
        for offset in 100..102 {
            let record = Record {
                partition: P,
                offset: Offset(offset),
                timestamp: None,
                key: None,
                value: None,
            };
            let half = |_: &mut Epochs, row: &mut Vec<u8>| {
                row.resize(row.len() + LEAST_BATCH_BYTES / 2, 0);
                Ok(Read::Row)
            };
            assert!(ingest.record(at(0), record, half));
        }
        assert_eq!(flush(&mut ingest, 0).len(), 2);
    }

    #[test]
    fn a_batch_moves_the_highest_epochs_with_the_position_and_the_table_has_the_last_word() {
        let mut ingest = reading(&[P, Q]);
        let judge = |ingest: &mut Ingest, offset, epoch| {
            let record = Record {
                partition: P,
                offset: Offset(offset),
                timestamp: None,
                key: None,
                value: None,
            };
            let mut is_valid = false;
            ingest.record(at(0), record, |epochs, _| {
                is_valid = epochs.judge("eu", epoch).is_ok();
                Ok(Read::Row)
            });
            is_valid
        };
        assert!(judge(&mut ingest, 100, 7));
        read(&mut ingest, 0, Q, 100);
        assert!(!judge(&mut ingest, 101, 6));
        let batch = flush(&mut ingest, 200);
        assert_eq!(batch.epochs, BTreeMap::from([(P, Epochs::of("eu", 7))]));
        // Somebody else was there, and has seen more.
        ingest.handle(at(200), Event::Flushed(batch, Flushed::Fenced));
        let elsewhere = Position {
            next: NextOffset(150),
            epochs: Epochs::of("eu", 9),
        };
        assert!(matches!(ingest.next_action(at(200)), Action::Locate { .. }));
        let found = BTreeMap::from([(P, elsewhere)])
            .into_iter()
            .chain(found_at(&[Q], 101));
        ingest.handle(at(200), Event::Located(found.collect()));
        while !matches!(ingest.next_action(at(200)), Action::Poll { .. }) {}
        assert!(!judge(&mut ingest, 150, 8));
        assert!(judge(&mut ingest, 151, 9));
        // Nothing was raised: nothing has to be written.
        assert_eq!(flush(&mut ingest, 400).epochs, BTreeMap::new());
    }

    #[test]
    fn tries_of_a_store_that_is_away_get_rarer_up_to_a_bound_and_start_anew_after_a_success() {
        let mut ingest = reading(&[P]);
        read(&mut ingest, 0, P, 100);
        let mut now = 200;
        let batch = flush(&mut ingest, now);
        ingest.handle(at(now), Event::Flushed(batch, Flushed::Retry("gone".into())));
        let mut waits = Vec::new();
        for _ in 0..12 {
            let failed_at = now;
            loop {
                match ingest.next_action(at(now)) {
                    Action::Open => break,
                    Action::Poll { until } | Action::Hold { until } => {
                        now = until.duration_since(at(0)).as_millis() as u64 + 1;
                    }
                    Action::Commit(_) => {}
                    action => panic!("{action:?}"),
                }
            }
            waits.push(now - failed_at);
            ingest.handle(at(now), Event::StoreFailed);
        }
        assert!((50..=110).contains(&waits[0]), "{waits:?}");
        assert!(
            waits[8..].iter().all(|wait| (5_000..=10_100).contains(wait)),
            "{waits:?}"
        );
        assert!(ingest.store_is_away());
        assert_eq!(ingest.unwritten(), 1, "what was read is kept through the outage");
    }

    #[test]
    fn after_a_lost_answer_the_position_tells_what_became_of_the_rows() {
        for (position, is_written) in [(100, false), (101, true)] {
            let mut ingest = reading(&[P]);
            read(&mut ingest, 0, P, 100);
            let batch = flush(&mut ingest, 200);
            ingest.handle(at(200), Event::Flushed(batch, Flushed::Retry("lost".into())));
            assert!(matches!(wait_of(&mut ingest, 200), Action::Poll { .. }));
            assert_eq!(ingest.next_action(at(400)), Action::Open);
            ingest.handle(at(400), Event::Opened { same_layout: true });
            assert!(matches!(ingest.next_action(at(400)), Action::Locate { .. }));
            ingest.handle(at(400), Event::Located(found_at(&[P], position)));
            assert_eq!(ingest.unwritten(), usize::from(!is_written));
            match is_written {
                false => assert_eq!(flush(&mut ingest, 400).spans[&P], span(100, 101)),
                true => {
                    let commit = Action::Commit(vec![(P, NextOffset(101))]);
                    assert_eq!(ingest.next_action(at(1_400)), commit);
                }
            }
        }
    }

    #[test]
    fn a_fence_costs_only_the_partition_that_was_moved() {
        let mut ingest = reading(&[P, Q]);
        read(&mut ingest, 0, P, 100);
        read(&mut ingest, 0, Q, 100);
        let batch = flush(&mut ingest, 200);
        read(&mut ingest, 200, P, 101);
        read(&mut ingest, 200, Q, 101);
        ingest.handle(at(200), Event::Flushed(batch, Flushed::Fenced));
        assert!(matches!(ingest.next_action(at(200)), Action::Locate { .. }));
        let positions = found_at(&[P], 150)
            .into_iter()
            .chain(found_at(&[Q], 100))
            .collect();
        ingest.handle(at(200), Event::Located(positions));
        let fenced = Notice::Fenced {
            partition: P,
            base: NextOffset(100),
            position: Some(NextOffset(150)),
            forgotten: 2,
        };
        assert_eq!(ingest.next_action(at(200)), Action::Tell(fenced));
        let batch = flush(&mut ingest, 200);
        assert_eq!(batch.spans, BTreeMap::from([(Q, span(100, 101))]));
        assert_eq!(
            ingest.next_action(at(200)),
            Action::Read(vec![(P, NextOffset(150))])
        );
    }

    #[test]
    fn a_refused_row_is_rejected_and_the_others_are_written_with_it() {
        let mut ingest = reading(&[P]);
        read(&mut ingest, 0, P, 100);
        read(&mut ingest, 0, P, 101);
        let batch = flush(&mut ingest, 200);
        let poison = Flushed::Poison(vec![(1, "refused".into())]);
        ingest.handle(at(200), Event::Flushed(batch, poison));
        let batch = flush(&mut ingest, 200);
        assert!(matches!(batch.entries[0].form, Form::Row(_)));
        assert_eq!(batch.entries[1].form, Form::Rejected("refused".into()));
        // A store that names nothing new would make this spin: it counts as a failure.
        let poison = Flushed::Poison(vec![(1, "refused".into())]);
        ingest.handle(at(200), Event::Flushed(batch, poison));
        assert!(matches!(wait_of(&mut ingest, 200), Action::Poll { .. }));
    }

    #[test]
    fn a_revoked_partition_is_no_longer_written_committed_or_read() {
        let mut ingest = reading(&[P, Q]);
        read(&mut ingest, 0, P, 100);
        let batch = flush(&mut ingest, 200);
        read(&mut ingest, 200, P, 101);
        read(&mut ingest, 200, Q, 100);
        ingest.handle(at(200), Event::Revoked(vec![P]));
        assert!(!read(&mut ingest, 200, P, 102));
        ingest.handle(at(200), Event::Flushed(batch, Flushed::Retry("lost".into())));
        assert_eq!(ingest.next_action(at(400)), Action::Open);
        ingest.handle(at(400), Event::Opened { same_layout: true });
        let batch = flush(&mut ingest, 400);
        assert_eq!(batch.spans, BTreeMap::from([(Q, span(100, 101))]));
    }

    #[test]
    fn a_stop_writes_and_commits_first_and_takes_no_more() {
        let mut ingest = reading(&[P]);
        read(&mut ingest, 0, P, 100);
        ingest.handle(at(10), Event::Stop { deadline: at(5_000) });
        assert!(!read(&mut ingest, 10, P, 101));
        let batch = flush(&mut ingest, 10);
        assert!(matches!(ingest.next_action(at(10)), Action::Poll { .. }));
        ingest.handle(at(20), Event::Flushed(batch, Flushed::Durable));
        let commit = Action::Commit(vec![(P, NextOffset(101))]);
        assert_eq!(
            ingest.next_action(at(20)),
            commit,
            "at once, though one was just made"
        );
        assert_eq!(ingest.next_action(at(20)), Action::Stop { unwritten: 0 });
    }

    #[test]
    fn a_stop_without_the_store_ends_after_a_few_tries_and_says_what_is_not_written() {
        let mut ingest = reading(&[P]);
        read(&mut ingest, 0, P, 100);
        read(&mut ingest, 0, P, 101);
        let batch = flush(&mut ingest, 200);
        ingest.handle(at(200), Event::Flushed(batch, Flushed::Retry("gone".into())));
        ingest.handle(at(210), Event::Stop { deadline: at(5_000) });
        for _ in 0..TRIES_DURING_STOP {
            assert_eq!(ingest.next_action(at(210)), Action::Open);
            ingest.handle(at(210), Event::StoreFailed);
        }
        assert_eq!(ingest.next_action(at(210)), Action::Stop { unwritten: 2 });
    }

    #[test]
    fn a_stop_does_not_wait_for_a_store_that_hangs() {
        let mut ingest = reading(&[P]);
        read(&mut ingest, 0, P, 100);
        ingest.handle(at(10), Event::Stop { deadline: at(5_000) });
        flush(&mut ingest, 10);
        let mut now = 10;
        loop {
            match ingest.next_action(at(now)) {
                Action::Poll { until } => now = until.duration_since(at(0)).as_millis() as u64,
                Action::Stop { unwritten } => {
                    assert_eq!((now, unwritten), (5_000, 1));
                    break;
                }
                action => panic!("{action:?}"),
            }
        }
    }

    #[test]
    fn commits_follow_flushes_at_most_once_a_second_and_a_failed_one_is_made_again() {
        let mut ingest = reading(&[P]);
        for (millis, offset) in [(100, 100), (400, 101)] {
            read(&mut ingest, millis, P, offset);
            let batch = flush(&mut ingest, millis + 200);
            ingest.handle(at(millis + 200), Event::Flushed(batch, Flushed::Durable));
        }
        assert!(matches!(ingest.next_action(at(999)), Action::Poll { .. }));
        let commit = Action::Commit(vec![(P, NextOffset(102))]);
        assert_eq!(ingest.next_action(at(1_000)), commit);
        ingest.handle(at(1_100), Event::CommitFailed(vec![P]));
        assert!(matches!(ingest.next_action(at(1_999)), Action::Poll { .. }));
        assert_eq!(ingest.next_action(at(2_000)), commit);
    }

    #[test]
    fn a_partition_without_a_position_starts_where_kafka_says() {
        let mut ingest = open();
        ingest.handle(at(0), Event::Assigned(vec![P]));
        assert!(matches!(ingest.next_action(at(0)), Action::Locate { .. }));
        ingest.handle(at(0), Event::Located(BTreeMap::new()));
        assert_eq!(ingest.next_action(at(0)), Action::FindStarts(vec![P]));
        // No answer: asked again, but not at once.
        ingest.handle(at(0), Event::Starts(BTreeMap::new()));
        assert!(matches!(wait_of(&mut ingest, 999), Action::Poll { .. }));
        assert_eq!(ingest.next_action(at(1_000)), Action::FindStarts(vec![P]));
        ingest.handle(at(1_000), Event::Starts(all_at(&[P], 42)));
        let locate = Action::Locate {
            partitions: vec![P],
            missing_from: all_at(&[P], 42),
        };
        assert_eq!(ingest.next_action(at(1_000)), locate);
        ingest.handle(at(1_000), Event::Located(found_at(&[P], 42)));
        assert_eq!(
            ingest.next_action(at(1_000)),
            Action::Read(vec![(P, NextOffset(42))])
        );
    }

    #[test]
    fn a_topic_made_anew_is_read_from_its_beginning_and_moves_the_position_back() {
        let mut ingest = reading(&[P]);
        let extent = Extent {
            low: NextOffset(0),
            high: NextOffset(2),
        };
        ingest.handle(at(0), Event::OutOfRange);
        for millis in [0, 1_000] {
            // One answer does not suffice for a decision that stores everything anew.
            assert_eq!(ingest.next_action(at(millis)), Action::FindExtents(vec![P]));
            ingest.handle(at(millis), Event::Extents(BTreeMap::from([(P, extent)])));
        }
        let notice = Notice::BeyondEnd {
            partition: P,
            position: NextOffset(100),
            extent,
            forgotten: 0,
        };
        assert_eq!(ingest.next_action(at(1_000)), Action::Tell(notice));
        assert!(matches!(wait_of(&mut ingest, 1_000), Action::Poll { .. }));
        assert_eq!(
            ingest.next_action(at(2_000)),
            Action::Read(vec![(P, NextOffset(0))])
        );
        assert!(read(&mut ingest, 2_000, P, 0));
        let batch = flush(&mut ingest, 2_200);
        assert_eq!(batch.spans[&P], span(100, 1));
        ingest.handle(at(2_200), Event::Flushed(batch, Flushed::Durable));
        let commit = Action::Commit(vec![(P, NextOffset(1))]);
        assert_eq!(ingest.next_action(at(2_200)), commit);
    }

    #[test]
    fn what_retention_took_is_said_and_what_was_read_before_is_written() {
        let mut ingest = reading(&[P]);
        read(&mut ingest, 0, P, 100);
        let extent = Extent {
            low: NextOffset(500),
            high: NextOffset(600),
        };
        ingest.handle(at(0), Event::OutOfRange);
        assert_eq!(ingest.next_action(at(0)), Action::FindExtents(vec![P]));
        ingest.handle(at(0), Event::Extents(BTreeMap::from([(P, extent)])));
        let notice = Notice::BeforeBeginning {
            partition: P,
            position: NextOffset(101),
            extent,
        };
        assert_eq!(ingest.next_action(at(0)), Action::Tell(notice));
        let batch = flush(&mut ingest, 1_000);
        assert_eq!(batch.spans[&P], span(100, 101));
        assert_eq!(
            ingest.next_action(at(1_000)),
            Action::Read(vec![(P, NextOffset(500))])
        );
    }

    #[test]
    fn rows_for_other_columns_are_forgotten_and_read_again() {
        let mut ingest = reading(&[P]);
        read(&mut ingest, 0, P, 100);
        let batch = flush(&mut ingest, 200);
        ingest.handle(at(200), Event::Flushed(batch, Flushed::Retry("lost".into())));
        assert_eq!(ingest.next_action(at(400)), Action::Open);
        ingest.handle(at(400), Event::Opened { same_layout: false });
        let notice = Action::Tell(Notice::OtherLayout { forgotten: 1 });
        assert_eq!(ingest.next_action(at(400)), notice);
        assert!(matches!(ingest.next_action(at(400)), Action::Locate { .. }));
        ingest.handle(at(400), Event::Located(found_at(&[P], 100)));
        assert_eq!(
            ingest.next_action(at(400)),
            Action::Read(vec![(P, NextOffset(100))])
        );
    }
}
