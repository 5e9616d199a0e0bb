//! The `consume` agent: from records to durable rows, exactly once in effect.
//!
//! `ingest` (the state machine), `batch` and `copy` are pure; `source` (Kafka) and `store` (Postgres) are the edges. This
//! file owns the two threads: the one that polls Kafka, decodes and drives the machine, and the `writer` that owns the
//! database connection. Between them goes one request at a time, and its answer. A third, `sums`, counts finished days now
//! and then, on a connection of its own.

pub mod batch;
pub mod group;
pub mod ingest;
mod metrics;
pub mod source;
pub mod store;
mod stuck;
mod writer;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow};

use crate::config::ConsumeConfig;
use crate::consume::batch::{Batch, Form, Record};
use crate::consume::ingest::{Action, Event, Ingest, Limits, Notice};
use crate::consume::metrics::FlushSeconds;
use crate::consume::source::{Ended, Source};
use crate::consume::store::{Flushed, Store, StoreError};
use crate::consume::writer::{Answer, Request, Writer};
use crate::http::Endpoint;
use crate::http::health::{Heartbeat, Readiness};
use crate::outage::Trouble;
use crate::sample;
use crate::shutdown::{STOP_WITHIN, Shutdown};
use crate::tables::row::{Layout, Origin};
use crate::tables::sums::{FIRST_PASS_AFTER, PASS_EVERY, Sums};

/// The longest poll: how late a stop is noticed.
const POLL: Duration = Duration::from_millis(100);

/// The longest poll while the store is at work: how late its answer is noticed if no records come.
const POLL_WHILE_WRITING: Duration = Duration::from_millis(10);

/// Records taken before the loop looks up again.
const RECORDS_PER_TURN: usize = 128;

/// Of the time for a stop, what is kept for the commit, for leaving the group, and for the writer's goodbye.
const COMMIT_WITHIN: Duration = Duration::from_millis(1_000);
const LEAVE_WITHIN: Duration = Duration::from_millis(1_500);
const WRITER_GOODBYE_WITHIN: Duration = Duration::from_millis(500);

/// A broker that comes back from a crash can have forgotten that a static member joined, and then takes it for one whose
/// KAFKA_GROUP_INSTANCE_ID somebody else has. So long after an outage the member joins again, once.
const REJOIN_AFTER_CRASH_WITHIN: Duration = Duration::from_secs(60);

const SUMMARY_EVERY: Duration = Duration::from_secs(60);

/// Rejected records are said one by one at most this often, with how many there were.
const SAY_REJECTED_EVERY: Duration = Duration::from_secs(10);

/// Reads the topics and writes batches to Postgres until a stop is requested. METRICS_ADDR is served meanwhile.
///
/// # Errors
/// Something that waiting does not mend: the operator has to act. Nothing unwritten was committed.
pub fn run(config: &ConsumeConfig, shutdown: &Shutdown) -> anyhow::Result<()> {
    let counters = Counters::default();
    let _endpoint = config
        .metrics_addr
        .map(|address| Endpoint::start(address, counters.clone()))
        .transpose()?;
    run_counted(config, shutdown, &counters)
}

/// As [`run`], with counters that others read meanwhile instead of METRICS_ADDR.
///
/// # Errors
/// As [`run`].
pub fn run_counted(config: &ConsumeConfig, shutdown: &Shutdown, counters: &Counters) -> anyhow::Result<()> {
    let source = Source::join(config, &[])?;
    run_with(config, source, shutdown, counters)
}

/// As [`run_counted`], with a consumer that has joined already.
///
/// # Errors
/// As [`run`].
pub fn run_with(
    config: &ConsumeConfig,
    source: Source,
    shutdown: &Shutdown,
    counters: &Counters,
) -> anyhow::Result<()> {
    let writer = Writer::start(Store::new(config)?).context("no thread for the writer")?;
    log::info!(
        "consuming {} as group {} into {}",
        config.topics.join(", "),
        config.group_id,
        config.database.table.quoted("")
    );
    let _sums = Sums::start(config.database.clone(), FIRST_PASS_AFTER, PASS_EVERY)
        .context("no thread for the sums of finished days")?;
    let mut agent = Agent::new(config, source, writer, shutdown, counters);
    let stopped = agent.run();
    let Agent { source, writer, .. } = agent;
    source.close(LEAVE_WITHIN);
    writer.close(WRITER_GOODBYE_WITHIN);
    stopped
}

/// What was done so far, and where things stand: for /metrics, tests and the demo.
#[derive(Debug, Default, Clone)]
pub struct Counters(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    rows: AtomicU64,
    rejected: AtomicU64,
    flushes: AtomicU64,
    failures: AtomicU64,
    fences: AtomicU64,
    revoked: AtomicU64,
    delay_millis: AtomicU64,
    /// When the last flush became durable, by the wall clock; zero: there was none yet.
    flushed_at_millis: AtomicU64,
    flush_seconds: FlushSeconds,
    assigned: AtomicUsize,
    unwritten: AtomicUsize,
    lags: Mutex<BTreeMap<(String, i32), u64>>,
    heartbeat: Heartbeat,
    readiness: Readiness,
}

impl Counters {
    /// Rows that are durable.
    pub fn rows(&self) -> u64 {
        self.0.rows.load(Ordering::Relaxed)
    }

    /// Rejected records that are durable.
    pub fn rejected(&self) -> u64 {
        self.0.rejected.load(Ordering::Relaxed)
    }

    /// Transactions that were committed.
    pub fn flushes(&self) -> u64 {
        self.0.flushes.load(Ordering::Relaxed)
    }

    /// Requests that Postgres did not answer or answered with a passing fault.
    pub fn failures(&self) -> u64 {
        self.0.failures.load(Ordering::Relaxed)
    }

    /// Flushes refused because another consumer had moved a position.
    pub fn fences(&self) -> u64 {
        self.0.fences.load(Ordering::Relaxed)
    }

    /// Partitions that the group took away, one by one.
    pub fn revoked(&self) -> u64 {
        self.0.revoked.load(Ordering::Relaxed)
    }

    /// How old the oldest record of the last flush was when it became durable, by Kafka's timestamp.
    pub fn delay(&self) -> Duration {
        Duration::from_millis(self.0.delay_millis.load(Ordering::Relaxed))
    }

    /// Records in front of the end that are not durable, of each partition that is ours: by topic and number.
    pub fn lags(&self) -> BTreeMap<(String, i32), u64> {
        self.0.lags.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_lags(&self, lags: BTreeMap<(String, i32), u64>) {
        *self.0.lags.lock().unwrap_or_else(PoisonError::into_inner) = lags;
    }
}

struct Agent<'a> {
    shutdown: &'a Shutdown,
    counters: &'a Counters,
    source: Source,
    writer: Writer,
    ingest: Ingest,
    /// `None` until the store was opened: nothing is read before.
    layout: Option<Layout>,
    postgres: Trouble,
    rejections: Rejections,
    summary: Summary,
    stopping: bool,
    watch_at: Instant,
}

impl<'a> Agent<'a> {
    fn new(
        config: &ConsumeConfig,
        source: Source,
        writer: Writer,
        shutdown: &'a Shutdown,
        counters: &'a Counters,
    ) -> Self {
        let limits = Limits {
            batch_size: config.batch_size,
            batch_wait: config.batch_wait,
        };
        let now = now();
        Self {
            shutdown,
            counters,
            source,
            writer,
            ingest: Ingest::new(limits, fastrand::u64(..)),
            layout: None,
            postgres: Trouble::default(),
            rejections: Rejections::default(),
            summary: Summary::since(now),
            stopping: false,
            watch_at: now,
        }
    }

    /// Does what the machine says, until it says that it is over.
    fn run(&mut self) -> anyhow::Result<()> {
        loop {
            let now = now();
            self.counters.0.heartbeat.beat();
            self.look_at_shutdown(now);
            while let Some(answer) = self.writer.answer()? {
                self.answered(now, answer)?;
            }
            self.watch(now);
            match self.ingest.next_action(now) {
                Action::Open => self.writer.ask(Request::Open)?,
                Action::Locate {
                    partitions,
                    missing_from,
                } => self.writer.ask(Request::Locate {
                    partitions,
                    missing_from,
                })?,
                Action::Flush(batch) => self.writer.ask(Request::Flush(batch))?,
                Action::FindStarts(partitions) => {
                    let starts = self.source.starts(&partitions);
                    self.ingest.handle(now, Event::Starts(starts));
                }
                Action::FindExtents(partitions) => {
                    let extents = self.source.extents(&partitions);
                    self.ingest.handle(now, Event::Extents(extents));
                }
                Action::Read(starts) => {
                    for (partition, next) in &starts {
                        log::debug!("reading {} from offset {}", self.source.name(*partition), next.0);
                    }
                    if let Err(error) = self.source.read(&starts) {
                        log::debug!("cannot read: {error}");
                        let partitions = starts.iter().map(|(partition, _)| *partition).collect();
                        self.ingest.handle(now, Event::ReadFailed(partitions));
                    }
                }
                Action::Pause => {
                    log::debug!("pause: both batches are full");
                    // What is read all the same is dropped by the machine, and read again later.
                    if let Err(error) = self.source.pause() {
                        log::debug!("cannot pause: {error}");
                    }
                }
                Action::Commit(commits) => self.source.commit(commits),
                Action::Tell(notice) => self.tell(&notice),
                Action::Poll { until } => self.poll(now, until)?,
                Action::Hold { until } => {
                    let wait = until.saturating_duration_since(now).min(POLL);
                    if let Some(answer) = self.writer.wait(wait)? {
                        self.answered(self::now(), answer)?;
                    }
                }
                Action::Stop { unwritten } => {
                    self.stopped(now, unwritten);
                    return Ok(());
                }
            }
        }
    }

    fn look_at_shutdown(&mut self, now: Instant) {
        let Some(requested_at) = self.shutdown.requested_at().filter(|_| !self.stopping) else {
            return;
        };
        self.stopping = true;
        let afterwards = COMMIT_WITHIN + LEAVE_WITHIN + WRITER_GOODBYE_WITHIN;
        let deadline = requested_at + STOP_WITHIN.saturating_sub(afterwards);
        self.ingest.handle(now, Event::Stop { deadline });
    }

    fn poll(&mut self, now: Instant, until: Instant) -> anyhow::Result<()> {
        let longest = match self.writer.is_busy() {
            true => POLL_WHILE_WRITING,
            false => POLL,
        };
        let mut timeout = until.saturating_duration_since(now).min(longest);
        let mut now = None;
        for _ in 0..RECORDS_PER_TURN {
            let delivered = self.source.poll(timeout);
            timeout = Duration::ZERO;
            // Waiting may have taken a while, the rest does not.
            let now = *now.get_or_insert_with(self::now);
            let delivered = match delivered {
                Err(Ended::InstanceTaken)
                    if self.source.lost_kafka_since(now - REJOIN_AFTER_CRASH_WITHIN) =>
                {
                    return self.rejoin(now);
                }
                delivered => delivered?,
            };
            while let Some(event) = self.source.take_event() {
                self.say_assignment(&event);
                self.ingest.handle(now, event);
            }
            let Some(delivered) = delivered else {
                return Ok(());
            };
            let record = delivered.record();
            if let Some(layout) = &self.layout {
                let topic = self.source.topic(record.partition);
                self.ingest
                    .record(now, record, |row| encode(layout, topic, &record, row));
            }
            if !self.ingest.has_room() {
                return Ok(());
            }
        }
        Ok(())
    }

    fn rejoin(&mut self, now: Instant) -> anyhow::Result<()> {
        log::warn!(
            "Kafka says that {}; it was away just now and may have forgotten us, so this one joins again",
            Ended::InstanceTaken
        );
        let partitions = self.ingest.assigned_partitions().collect();
        self.ingest.handle(now, Event::Revoked(partitions));
        let joined = self.source.rejoin()?;
        std::mem::replace(&mut self.source, joined).close(LEAVE_WITHIN);
        Ok(())
    }

    fn answered(&mut self, now: Instant, answer: Answer) -> anyhow::Result<()> {
        match answer {
            Answer::Opened(Ok(layout)) => {
                let same_layout = self.layout.as_ref().is_none_or(|known| *known == layout);
                self.layout = Some(layout);
                self.ingest.handle(now, Event::Opened { same_layout });
            }
            Answer::Located(Ok(positions)) => {
                self.ingest.handle(now, Event::Located(positions));
            }
            Answer::Opened(Err(StoreError::Retry(reason)))
            | Answer::Located(Err(StoreError::Retry(reason))) => {
                self.failed(now, reason);
                self.ingest.handle(now, Event::StoreFailed);
            }
            Answer::Opened(Err(StoreError::Fatal(text))) | Answer::Located(Err(StoreError::Fatal(text))) => {
                return Err(anyhow!(text));
            }
            Answer::Flushed(_, Flushed::Fatal(text), _) => return Err(anyhow!(text)),
            Answer::Flushed(batch, flushed, took) => {
                match &flushed {
                    Flushed::Durable => self.durable(now, &batch, took),
                    Flushed::Retry(reason) => self.failed(now, reason.clone()),
                    Flushed::Fenced => {
                        self.counters.0.fences.fetch_add(1, Ordering::Relaxed);
                    }
                    Flushed::Poison(refused) => log::debug!("{} rows are refused", refused.len()),
                    Flushed::Fatal(_) => {}
                }
                self.ingest.handle(now, Event::Flushed(batch, flushed));
            }
        }
        if !self.ingest.store_is_away()
            && let Some(lasted) = self.postgres.is_over(now)
        {
            log::info!("Postgres is back after {} s", lasted.as_secs());
        }
        Ok(())
    }

    fn failed(&mut self, now: Instant, reason: String) {
        log::debug!("Postgres: {reason}");
        self.counters.0.failures.fetch_add(1, Ordering::Relaxed);
        self.postgres.is_there(now, reason);
    }

    fn durable(&mut self, now: Instant, batch: &Batch, took: Duration) {
        let mut rejected = 0;
        let mut oldest = None;
        for entry in &batch.entries {
            if let Form::Rejected(reason) = &entry.form {
                rejected += 1;
                let partition = self.source.name(entry.partition);
                self.rejections
                    .note(|| format!("{partition} offset {}: {reason}", entry.offset.0));
            }
            if let Some(timestamp) = entry.timestamp {
                oldest = Some(oldest.map_or(timestamp, |oldest: sample::Timestamp| oldest.min(timestamp)));
            }
        }
        let rows = batch.len() as u64 - rejected;
        log::debug!(
            "flush rows={rows} rejected={rejected} partitions={} seconds={:.3}",
            batch.spans.len(),
            took.as_secs_f64()
        );
        let delay = oldest.map_or(Duration::ZERO, age);
        let counts = &self.counters.0;
        counts.rows.fetch_add(rows, Ordering::Relaxed);
        counts.rejected.fetch_add(rejected, Ordering::Relaxed);
        counts.flushes.fetch_add(1, Ordering::Relaxed);
        counts.flush_seconds.0.observe(took.as_secs_f64());
        counts
            .flushed_at_millis
            .store(millis(wall_clock()), Ordering::Relaxed);
        counts.delay_millis.store(millis(delay), Ordering::Relaxed);
        self.summary.delay = self.summary.delay.max(delay);
        self.rejections.say(now);
    }

    /// What is done every second: troubles, lag, the summary.
    fn watch(&mut self, now: Instant) {
        if now < self.watch_at {
            return;
        }
        self.watch_at = now + Duration::from_secs(1);
        self.source.say_troubles(now);
        self.rejections.say(now);
        let unwritten = self.ingest.unwritten();
        if let Some((reason, lasted)) = self.postgres.due(now) {
            log::warn!(
                "waiting for Postgres: {reason} (for {} s, {unwritten} records in hand)",
                lasted.as_secs()
            );
        }
        self.counters.set_lags(self.lags());
        let counts = &self.counters.0;
        counts.unwritten.store(unwritten, Ordering::Relaxed);
        let assigned = self.ingest.assigned_partitions().count();
        counts.assigned.store(assigned, Ordering::Relaxed);
        counts.readiness.set(self.is_ready());
        if self.summary.at + SUMMARY_EVERY <= now {
            self.say_summary(now);
        }
    }

    /// Whether Kafka and Postgres are both there, or what is waited for.
    fn is_ready(&self) -> Result<(), String> {
        self.source.is_ready()?;
        if self.layout.is_none() || self.ingest.store_is_away() {
            let reason = self.postgres.reason().unwrap_or("it has not answered yet");
            return Err(format!("waiting for Postgres: {reason}"));
        }
        Ok(())
    }

    fn lags(&self) -> BTreeMap<(String, i32), u64> {
        let ends = self.source.ends();
        let lag = |(partition, durable, _): (batch::Partition, batch::NextOffset, batch::NextOffset)| {
            let end = ends.get(&partition)?;
            let lag = u64::try_from(end.0.saturating_sub(durable.0)).unwrap_or(0);
            Some(((self.source.topic(partition).to_owned(), partition.number), lag))
        };
        self.ingest.positions().filter_map(lag).collect()
    }

    fn say_summary(&mut self, now: Instant) {
        let counters = self.counters;
        let previous = std::mem::replace(&mut self.summary, Summary::since(now));
        let rows = counters.rows();
        let rejected = counters.rejected();
        let flushes = counters.flushes();
        let lag: u64 = self.lags().values().sum();
        log::info!(
            "summary seconds={:.0} rows={} flushes={} rejected={} partitions={} lag={lag} delay_seconds={:.3}",
            now.saturating_duration_since(previous.at).as_secs_f64(),
            rows - previous.rows,
            flushes - previous.flushes,
            rejected - previous.rejected,
            self.ingest.assigned_partitions().count(),
            previous.delay.as_secs_f64(),
        );
        self.summary.rows = rows;
        self.summary.rejected = rejected;
        self.summary.flushes = flushes;
    }

    fn tell(&self, notice: &Notice) {
        let name = |partition: &batch::Partition| self.source.name(*partition);
        match notice {
            Notice::Fenced {
                partition,
                base,
                position,
                forgotten,
            } => match position {
                Some(position) => log::warn!(
                    "another consumer moved {} from {} to {}: {forgotten} records are left to it",
                    name(partition),
                    base.0,
                    position.0,
                ),
                None => log::warn!(
                    "the position of {}, {}, is gone from the offsets table: reading starts at the group's committed \
                     offset, or else at the earliest record",
                    name(partition),
                    base.0,
                ),
            },
            Notice::BeyondEnd {
                partition,
                position,
                extent,
                forgotten,
            } => log::warn!(
                "position {} of {} is beyond the end, {}: the topic was made anew; reading starts at its beginning, {}{}",
                position.0,
                name(partition),
                extent.high.0,
                extent.low.0,
                match forgotten {
                    0 => String::new(),
                    _ => format!("; {forgotten} records of the old topic were not written"),
                },
            ),
            Notice::BeforeBeginning {
                partition,
                position,
                extent,
            } => log::warn!(
                "the records of {} from {} to {} are gone from Kafka, unread (retention): reading goes on at {}",
                name(partition),
                position.0,
                extent.low.0,
                extent.low.0,
            ),
            Notice::OtherLayout { forgotten } => {
                log::info!("the table's columns changed: {forgotten} records are read again");
            }
        }
    }

    fn say_assignment(&self, event: &Event) {
        let (what, partitions) = match event {
            Event::Assigned(partitions) => ("assigned", partitions),
            Event::Revoked(partitions) => ("revoked", partitions),
            _ => return,
        };
        if partitions.is_empty() {
            return;
        }
        if matches!(event, Event::Revoked(_)) {
            let revoked = partitions.len() as u64;
            self.counters.0.revoked.fetch_add(revoked, Ordering::Relaxed);
        }
        let names: Vec<String> = partitions
            .iter()
            .map(|partition| self.source.name(*partition))
            .collect();
        log::info!("{what} {}", names.join(" "));
    }

    fn stopped(&mut self, now: Instant, unwritten: usize) {
        self.source.wait_for_commits(now + COMMIT_WITHIN);
        self.say_summary(now);
        match unwritten {
            0 => log::info!("stopped: everything that was read is written and committed"),
            _ => log::warn!(
                "stopped: {unwritten} records were read but not written ({}); they are not committed and will be read again",
                self.postgres.reason().unwrap_or("no time was left"),
            ),
        }
    }
}

/// The row of a record, or why there can be none.
fn encode(layout: &Layout, topic: &str, record: &Record<'_>, row: &mut Vec<u8>) -> Result<(), String> {
    let value = record.value.unwrap_or_default();
    let mut sample = sample::decode(value).map_err(|rejection| rejection.0)?;
    if sample.scheduled_at.is_none() {
        // The original's records: when Kafka got it is the best that there is.
        let timestamp = record.timestamp;
        sample.scheduled_at =
            Some(timestamp.ok_or("scheduled_at is absent, and Kafka has no timestamp of the record")?);
    }
    let origin = Origin {
        topic,
        partition: record.partition.number,
        offset: record.offset,
    };
    layout.encode_row(&sample, origin, row)
}

/// Rejected records are said with an example: at once, but not one by one.
#[derive(Default)]
struct Rejections {
    unsaid: u64,
    example: Option<String>,
    said_at: Option<Instant>,
}

impl Rejections {
    fn note(&mut self, example: impl FnOnce() -> String) {
        self.unsaid += 1;
        self.example.get_or_insert_with(example);
    }

    fn say(&mut self, now: Instant) {
        if self
            .said_at
            .is_some_and(|said_at| now < said_at + SAY_REJECTED_EVERY)
        {
            return;
        }
        if let Some(example) = self.example.take() {
            log::warn!("rejected records={} first: {example}", self.unsaid);
            self.unsaid = 0;
            self.said_at = Some(now);
        }
    }
}

/// The counters as they were at the last summary.
struct Summary {
    at: Instant,
    rows: u64,
    rejected: u64,
    flushes: u64,
    /// The longest since then.
    delay: Duration,
}

impl Summary {
    fn since(at: Instant) -> Self {
        Self {
            at,
            rows: 0,
            rejected: 0,
            flushes: 0,
            delay: Duration::ZERO,
        }
    }
}

/// How long ago that was, by this machine's clock.
fn age(timestamp: sample::Timestamp) -> Duration {
    let timestamp = Duration::from_micros(u64::try_from(timestamp.unix_micros()).unwrap_or(0));
    wall_clock().saturating_sub(timestamp)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Since the epoch.
#[expect(
    clippy::disallowed_methods,
    reason = "an edge: delays and the time of a flush are wall-clock times"
)]
fn wall_clock() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[expect(clippy::disallowed_methods, reason = "an edge: the machine is told the time")]
fn now() -> Instant {
    Instant::now()
}
