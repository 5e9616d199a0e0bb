//! The `consume` agent: from records to durable rows and to the state, exactly once in effect.
//!
//! Two pipelines of the same machine, the rows and the state: each with its own consumer group, positions, connection and
//! threads. Of a pipeline, `ingest` (the state machine), `batch`, `refused` and `fold` are pure; `source` (Kafka) and `store`
//! (Postgres) are the edges, and what is written is a `Sink` of the store: `rows` or `state`. This file owns the thread that
//! polls Kafka and drives the machine; the `writer` owns the database connection. Between them goes one request at a time,
//! and its answer.

pub mod batch;
mod counters;
pub mod fold;
pub mod group;
pub mod ingest;
mod metrics;
mod positions;
mod refused;
mod rows;
pub mod sink;
pub mod source;
pub mod state;
pub mod store;
mod stuck;
mod writer;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow};
use log::Level;

use crate::config::{ConsumeConfig, StateConfig};
use crate::consume::batch::{Batch, Flushed, Form, Record};
pub use crate::consume::counters::Counters;
use crate::consume::ingest::{Action, Event, Ingest, Limits, Notice};
use crate::consume::sink::Sink;
use crate::consume::source::{Ended, Source};
use crate::consume::state::State;
use crate::consume::store::{Store, StoreError};
use crate::consume::writer::{Answer, Request, Writer};
use crate::http::Endpoint;
use crate::outage::Outage;
use crate::postgres::Bounds;
use crate::sample;
use crate::shutdown::{STOP_WITHIN, Shutdown};

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

/// What ends the state's pipeline is mended by a person (a right, a table of another name): it is looked at again after so
/// long, and twice as long the next time.
const STATE_AGAIN_FIRST: Duration = Duration::from_secs(10);
const STATE_AGAIN_MOST: Duration = Duration::from_secs(600);

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
    log::info!(
        "consuming {} as group {} into {}",
        config.topics.join(", "),
        config.group_id,
        config.database.table.quoted("")
    );
    let ended = Shutdown::new();
    let state = match &config.state {
        Some(state) => {
            let wake = ended.clone();
            shutdown.on_request(move || wake.request());
            let join = source.joiner(&state::config_of(config).group_id);
            Some(start_state(config, state, join, &ended, counters).context("no thread for the state")?)
        }
        None => {
            log::info!("STATE=off: rows only, and the views of the state stay as they are");
            None
        }
    };
    let stopped = run_pipeline(Store::new(config)?, config, source, shutdown, counters);
    ended.request();
    // It bounds its own stop, and a panic there was told by the panic itself.
    if state.is_some_and(|state| state.join().is_err()) {
        log::error!("the thread of the state panicked: a bug, please report it");
    }
    stopped
}

/// The second pipeline, on a thread of its own. What ends it is no reason to end the first one: it begins again, from where
/// the table says.
fn start_state(
    config: &ConsumeConfig,
    state: &StateConfig,
    join: impl Fn() -> anyhow::Result<Source> + Send + 'static,
    ended: &Shutdown,
    rows: &Counters,
) -> std::io::Result<JoinHandle<()>> {
    let (config, state) = (state::config_of(config), state.clone());
    let (ended, rows) = (ended.clone(), rows.clone());
    let run = move || {
        let mut wait = STATE_AGAIN_FIRST;
        while !ended.requested() {
            let sink = State::new(state.clone(), rows.clone());
            let stopped = Store::of(sink, &config, Bounds::default())
                .and_then(|store| run_pipeline(store, &config, join()?, &ended, rows.state()));
            let Err(error) = stopped else { return };
            log::error!(
                "the state is not kept up, to be tried again in {} s: {error:#}",
                wait.as_secs()
            );
            ended.wait_until(now() + wait);
            wait = (wait * 2).min(STATE_AGAIN_MOST);
        }
    };
    std::thread::Builder::new().name("state".into()).spawn(run)
}

fn run_pipeline<S: Sink>(
    store: Store<S>,
    config: &ConsumeConfig,
    source: Source,
    shutdown: &Shutdown,
    counters: &Counters,
) -> anyhow::Result<()> {
    let writer = Writer::start(store).context("no thread for the writer")?;
    let mut agent = Agent::<S>::new(config, source, writer, shutdown, counters);
    let stopped = agent.run();
    let Agent { source, writer, .. } = agent;
    source.close(LEAVE_WITHIN);
    writer.close(WRITER_GOODBYE_WITHIN);
    stopped
}

struct Agent<'a, S: Sink> {
    shutdown: &'a Shutdown,
    counters: &'a Counters,
    source: Source,
    writer: Writer<S::Layout>,
    ingest: Ingest,
    /// `None` until the store was opened: nothing is read before.
    layout: Option<S::Layout>,
    postgres: Outage,
    rejections: Rejections,
    summary: Summary,
    stopping: bool,
    watch_at: Instant,
}

impl<'a, S: Sink> Agent<'a, S> {
    fn new(
        config: &ConsumeConfig,
        source: Source,
        writer: Writer<S::Layout>,
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
            postgres: Outage::default(),
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
                let kept = match S::KEEPS_RECORDS {
                    true => record,
                    false => Record {
                        key: None,
                        value: None,
                        ..record
                    },
                };
                self.ingest.record(now, kept, |epochs, into| {
                    S::encode(layout, topic, &record, epochs, into)
                });
            }
            if !self.ingest.has_room() {
                return Ok(());
            }
        }
        Ok(())
    }

    fn rejoin(&mut self, now: Instant) -> anyhow::Result<()> {
        log::log!(
            level::<S>(Level::Warn),
            "Kafka says that {}; it was away just now and may have forgotten us, so this one joins again",
            Ended::InstanceTaken
        );
        let partitions = self.ingest.assigned_partitions().collect();
        self.ingest.handle(now, Event::Revoked(partitions));
        let joined = self.source.rejoin()?;
        std::mem::replace(&mut self.source, joined).close(LEAVE_WITHIN);
        Ok(())
    }

    fn answered(&mut self, now: Instant, answer: Answer<S::Layout>) -> anyhow::Result<()> {
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
            && let Some(lasted) = self.postgres.end(now)
        {
            log::log!(
                level::<S>(Level::Info),
                "Postgres is back after {} s",
                lasted.as_secs()
            );
        }
        Ok(())
    }

    fn failed(&mut self, now: Instant, reason: String) {
        log::debug!("Postgres: {reason}");
        self.counters.0.failures.fetch_add(1, Ordering::Relaxed);
        self.postgres.begin(now, reason);
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
        self.rejections.say(level::<S>(Level::Warn), now);
    }

    /// What is done every second: outages, lag, the summary.
    fn watch(&mut self, now: Instant) {
        if now < self.watch_at {
            return;
        }
        self.watch_at = now + Duration::from_secs(1);
        self.source.report_outages(now);
        self.rejections.say(level::<S>(Level::Warn), now);
        let unwritten = self.ingest.unwritten();
        if let Some((reason, lasted)) = self.postgres.take_report(now) {
            log::log!(
                level::<S>(Level::Warn),
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
        log::log!(
            level::<S>(Level::Info),
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
                Some(position) => log::log!(
                    level::<S>(Level::Warn),
                    "another consumer moved {} from {} to {}: {forgotten} records are left to it",
                    name(partition),
                    base.0,
                    position.0,
                ),
                None => log::log!(
                    level::<S>(Level::Warn),
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
            } => log::log!(
                level::<S>(Level::Warn),
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
            } => log::log!(
                level::<S>(Level::Warn),
                "the records of {} from {} to {} are gone from Kafka, unread (retention): reading goes on at {}",
                name(partition),
                position.0,
                extent.low.0,
                extent.low.0,
            ),
            Notice::OtherLayout { forgotten } => {
                log::log!(
                    level::<S>(Level::Info),
                    "the table's columns changed: {forgotten} records are read again"
                );
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
        log::log!(level::<S>(Level::Info), "{what} {}", names.join(" "));
    }

    fn stopped(&mut self, now: Instant, unwritten: usize) {
        self.source.wait_for_commits(now + COMMIT_WITHIN);
        self.say_summary(now);
        match unwritten {
            0 => log::log!(
                level::<S>(Level::Info),
                "stopped: everything that was read is written and committed"
            ),
            _ => log::log!(
                level::<S>(Level::Warn),
                "stopped: {unwritten} records were read but not written ({}); they are not committed and will be read again",
                self.postgres.reason().unwrap_or("no time was left"),
            ),
        }
    }
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

    fn say(&mut self, level: Level, now: Instant) {
        if self
            .said_at
            .is_some_and(|said_at| now < said_at + SAY_REJECTED_EVERY)
        {
            return;
        }
        if let Some(example) = self.example.take() {
            log::log!(level, "rejected records={} first: {example}", self.unsaid);
            self.unsaid = 0;
            self.said_at = Some(now);
        }
    }
}

/// What the first pipeline says, the second does not repeat.
fn level<S: Sink>(level: Level) -> Level {
    if S::IS_FIRST { level } else { Level::Debug }
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
