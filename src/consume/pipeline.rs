//! One pipeline: the thread that polls Kafka and runs the state machine.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use log::Level;

use crate::clock::{self, instant_now};
use crate::config::ConsumeConfig;
use crate::consume::batch::{Batch, Flushed, Form, NextOffset, Partition};
use crate::consume::counters::Counters;
use crate::consume::ingest::{Action, Event, Ingest, Limits};
use crate::consume::report::{Rejections, Summary};
use crate::consume::sink::Sink;
use crate::consume::source::{Ended, Source};
use crate::consume::store::Store;
use crate::consume::writer::{Answer, Writer};
use crate::outage::Outage;
use crate::postgres::{Fault, Kind};
use crate::sample::Timestamp;
use crate::shutdown::{STOP_WITHIN, Shutdown};
use crate::terminal::counted;

/// The longest poll while the store is busy. If no records arrive, its answer is noticed at most this late.
const POLL_WHILE_WRITING: Duration = Duration::from_millis(10);

/// The most records that are taken before the loop looks for answers and stops.
const RECORDS_PER_TURN: usize = 128;

/// The parts of [`STOP_WITHIN`] that are reserved for the last commit and leaving the group, and for ending the writer. Each is
/// some times what it takes with healthy servers; the flush has the rest.
const LEAVE_WITHIN: Duration = Duration::from_millis(2_500);
const WRITER_CLOSE_WITHIN: Duration = Duration::from_millis(500);

const SUMMARY_EVERY: Duration = Duration::from_secs(60);

/// After a crash, a broker may have forgotten that a static member joined, and then reports that another member has its
/// KAFKA_GROUP_INSTANCE_ID. For this long after an outage the member therefore joins again.
const REJOIN_AFTER_CRASH_WITHIN: Duration = Duration::from_secs(60);

pub(super) fn run_pipeline<S: Sink>(
    store: Store<S>,
    config: &ConsumeConfig,
    source: Source,
    shutdown: &Shutdown,
    counters: &Counters,
) -> anyhow::Result<()> {
    let writer = Writer::start(store).context("cannot start a thread for the writer")?;
    let mut pipeline = Pipeline::<S>::new(config, source, writer, shutdown, counters);
    let stopped = pipeline.run();
    let Pipeline { source, writer, .. } = pipeline;
    source.close(LEAVE_WITHIN);
    writer.close(WRITER_CLOSE_WITHIN);
    stopped
}

pub(super) struct Pipeline<'a, S: Sink> {
    shutdown: &'a Shutdown,
    counters: &'a Counters,
    source: Source,
    writer: Writer<S::Layout>,
    ingest: Ingest,
    /// `None` until the store is open. Nothing is read before.
    layout: Option<S::Layout>,
    postgres: Outage,
    rejections: Rejections,
    summary: Summary,
    stopping: bool,
    watch_at: Instant,
}

impl<'a, S: Sink> Pipeline<'a, S> {
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
            is_asynchronous: config.is_asynchronous,
        };
        let now = instant_now();
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

    /// Does what the state machine says, until the end.
    fn run(&mut self) -> anyhow::Result<()> {
        loop {
            let now = instant_now();
            self.counters.heartbeat.beat();
            self.look_at_shutdown(now);
            while let Some(answer) = self.writer.wait(Duration::ZERO)? {
                self.answered(now, answer)?;
            }
            self.watch(now);
            match self.ingest.next_action(now) {
                Action::Ask(request) => self.writer.ask(request)?,
                Action::FindStarts(partitions) => {
                    let starts = self.source.starts(&partitions);
                    self.ingest.handle(now, Event::Starts(starts));
                }
                Action::FindExtents(partitions) => {
                    let extents = self.source.extents(&partitions);
                    self.ingest.handle(now, Event::Extents(extents));
                }
                Action::Read(starts) => self.read(now, &starts),
                Action::Pause => {
                    log::debug!("pause: both batches are full");
                    // If records still arrive, the state machine drops them, and they are read again later.
                    if let Err(error) = self.source.pause() {
                        log::debug!("cannot pause: {error}");
                    }
                }
                Action::Commit(commits) => self.source.commit(&commits),
                Action::Tell(text) => log::log!(self.source.level(Level::Warn), "{text}"),
                Action::Poll { until } => self.poll(now, until)?,
                Action::Hold { until } => {
                    if let Some(answer) = self.writer.wait(until.saturating_duration_since(now))? {
                        self.answered(instant_now(), answer)?;
                    }
                }
                Action::Stop { unwritten } => {
                    self.stopped(now, unwritten);
                    return Ok(());
                }
            }
        }
    }

    fn read(&mut self, now: Instant, starts: &[(Partition, NextOffset)]) {
        for (partition, next) in starts {
            log::debug!("reading {partition} from offset {}", next.0);
        }
        if let Err(error) = self.source.read(starts) {
            log::debug!("cannot read: {error}");
            let partitions = starts.iter().map(|(partition, _)| *partition).collect();
            self.ingest.handle(now, Event::ReadFailed(partitions));
        }
    }

    fn look_at_shutdown(&mut self, now: Instant) {
        let Some(requested_at) = self.shutdown.requested_at().filter(|_| !self.stopping) else {
            return;
        };
        self.stopping = true;
        let afterwards = LEAVE_WITHIN + WRITER_CLOSE_WITHIN;
        let deadline = requested_at + STOP_WITHIN.saturating_sub(afterwards);
        self.ingest.handle(now, Event::Stop { deadline });
    }

    fn poll(&mut self, now: Instant, until: Instant) -> anyhow::Result<()> {
        let mut timeout = until.saturating_duration_since(now);
        if self.writer.is_busy() {
            timeout = timeout.min(POLL_WHILE_WRITING);
        }
        let mut now = None;
        for _ in 0..RECORDS_PER_TURN {
            let delivered = self.source.poll(timeout);
            timeout = Duration::ZERO;
            // Only the first poll waits.
            let now = *now.get_or_insert_with(instant_now);
            let delivered = match delivered {
                Err(Ended::InstanceTaken)
                    if self.source.lost_kafka_since(now - REJOIN_AFTER_CRASH_WITHIN) =>
                {
                    return self.rejoin(now);
                }
                delivered => delivered?,
            };
            while let Some(event) = self.source.take_event() {
                self.log_assignment(&event);
                self.ingest.handle(now, event);
            }
            let Some(delivered) = delivered else {
                return Ok(());
            };
            let record = delivered.record();
            if let Some(layout) = &self.layout {
                let mut kept = record;
                if !S::KEEPS_RECORDS {
                    (kept.key, kept.value) = (None, None);
                }
                self.ingest
                    .record(now, kept, |epochs, into| S::encode(layout, &record, epochs, into));
            }
            if !self.ingest.has_room() {
                return Ok(());
            }
        }
        Ok(())
    }

    fn rejoin(&mut self, now: Instant) -> anyhow::Result<()> {
        log::log!(
            self.source.level(Level::Warn),
            "after an outage, Kafka reports another consumer with the same KAFKA_GROUP_INSTANCE_ID; that is probably this consumer \
             itself, so it joins again"
        );
        let partitions = self.ingest.assigned_partitions().collect();
        self.ingest.handle(now, Event::Revoked(partitions));
        let joined = self.source.rejoin()?;
        std::mem::replace(&mut self.source, joined).close(LEAVE_WITHIN);
        Ok(())
    }

    fn answered(&mut self, now: Instant, answer: Answer<S::Layout>) -> anyhow::Result<()> {
        let event = match answer {
            Answer::Opened(opened) => match self.unless_passing(now, opened)? {
                Some(layout) => {
                    let same_layout = self.layout.as_ref().is_none_or(|known| *known == layout);
                    self.layout = Some(layout);
                    Event::Opened { same_layout }
                }
                None => Event::StoreFailed,
            },
            Answer::Located(located) => self
                .unless_passing(now, located)?
                .map_or(Event::StoreFailed, Event::Located),
            Answer::Flushed(batch, flushed, took) => {
                let flushed = self.unless_passing(now, flushed)?;
                match &flushed {
                    // An empty batch only waited for the disk.
                    Some(Flushed::Durable) if batch.spans.is_empty() => {}
                    Some(Flushed::Durable) => self.durable(now, &batch, took),
                    Some(Flushed::Fenced) => {
                        self.counters.fences.inc();
                    }
                    Some(Flushed::Refused(refused)) => log::debug!("{} rows are refused", refused.len()),
                    None => {}
                }
                Event::Flushed(batch, flushed)
            }
        };
        self.ingest.handle(now, event);
        if !self.ingest.store_is_away()
            && let Some(lasted) = self.postgres.end(now)
        {
            log::log!(
                self.source.level(Level::Info),
                "Postgres is back after {} s",
                lasted.as_secs()
            );
        }
        Ok(())
    }

    /// What the store returned, or `None` after an error that will pass.
    fn unless_passing<T>(&mut self, now: Instant, result: Result<T, Fault>) -> anyhow::Result<Option<T>> {
        match result {
            Ok(answer) => Ok(Some(answer)),
            Err(Fault {
                kind: Kind::Passing,
                text,
                ..
            }) => {
                log::debug!("Postgres: {text}");
                self.counters.failures.inc();
                self.postgres.begin(now, text);
                Ok(None)
            }
            // A refusal that no row caused comes from a trigger or a constraint of the operator.
            Err(fault) => Err(anyhow!(fault.text)),
        }
    }

    fn durable(&mut self, now: Instant, batch: &Batch, took: Duration) {
        let mut rejected = 0;
        let mut oldest = None;
        for entry in &batch.entries {
            if let Form::Rejected(reason) = &entry.form {
                rejected += 1;
                self.rejections
                    .note(|| format!("{} offset {}: {reason}", entry.partition, entry.offset.0));
            }
            if let Some(timestamp) = entry.timestamp {
                oldest = Some(oldest.map_or(timestamp, |oldest: Timestamp| oldest.min(timestamp)));
            }
        }
        let rows = batch.row_count() as u64;
        log::debug!(
            "flush rows={rows} rejected={rejected} partitions={} seconds={:.3}",
            batch.spans.len(),
            took.as_secs_f64()
        );
        let delay = oldest.map_or(Duration::ZERO, age);
        let counters = self.counters;
        counters.rows.inc_by(rows);
        counters.rejected.inc_by(rejected);
        counters.flushes.inc();
        counters.flush_seconds.observe(took.as_secs_f64());
        counters.flushed_at_seconds.set(clock::wall_micros() as f64 / 1e6);
        counters.delay_seconds.set(delay.as_secs_f64());
        self.summary.delay = self.summary.delay.max(delay);
        self.rejections.log(self.source.level(Level::Warn), now);
    }

    /// Once a second: logs outages, counts the lag, and logs the summary once a minute.
    fn watch(&mut self, now: Instant) {
        if now < self.watch_at {
            return;
        }
        self.watch_at = now + Duration::from_secs(1);
        self.source.report_outages(now);
        self.rejections.log(self.source.level(Level::Warn), now);
        let unwritten = self.ingest.unwritten();
        if let Some((reason, lasted)) = self.postgres.take_report(now) {
            log::log!(
                self.source.level(Level::Warn),
                "waiting for Postgres: {reason} (for {} s, {} not written yet)",
                lasted.as_secs(),
                counted(unwritten, "record")
            );
        }
        self.counters.set_lags(self.lags());
        self.counters.unwritten.set(unwritten as i64);
        let assigned = self.ingest.assigned_partitions().count();
        self.counters.assigned.set(assigned as i64);
        self.counters.readiness.set(self.is_ready());
        if self.summary.at + SUMMARY_EVERY <= now {
            self.log_summary(now);
        }
    }

    /// Whether Kafka and Postgres are available, or what we are waiting for.
    fn is_ready(&self) -> Result<(), String> {
        self.source.is_ready()?;
        if self.layout.is_none() || self.ingest.store_is_away() {
            let reason = self.postgres.reason().unwrap_or("no answer yet");
            return Err(format!("waiting for Postgres: {reason}"));
        }
        Ok(())
    }

    fn lags(&self) -> BTreeMap<(String, i32), u64> {
        let ends = self.source.ends();
        let lag = |(partition, durable, _): (Partition, NextOffset, NextOffset)| {
            let end = ends.get(&partition)?;
            let lag = u64::try_from(end.0.saturating_sub(durable.0)).unwrap_or(0);
            Some(((partition.topic.to_owned(), partition.number), lag))
        };
        self.ingest.positions().filter_map(lag).collect()
    }

    fn log_summary(&mut self, now: Instant) {
        let counters = self.counters;
        let previous = std::mem::replace(&mut self.summary, Summary::since(now));
        let rows = counters.rows.get();
        let rejected = counters.rejected.get();
        let flushes = counters.flushes.get();
        let lag: u64 = self.lags().values().sum();
        log::log!(
            self.source.level(Level::Info),
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

    fn log_assignment(&self, event: &Event) {
        let (what, partitions) = match event {
            Event::Assigned(partitions) => ("assigned", partitions),
            Event::Revoked(partitions) => ("revoked", partitions),
            _ => return,
        };
        if partitions.is_empty() {
            return;
        }
        if matches!(event, Event::Revoked(_)) {
            self.counters.revoked.inc_by(partitions.len() as u64);
        }
        let names: Vec<String> = partitions.iter().map(Partition::to_string).collect();
        log::log!(self.source.level(Level::Info), "{what} {}", names.join(" "));
    }

    fn stopped(&mut self, now: Instant, unwritten: usize) {
        self.log_summary(now);
        match unwritten {
            0 => log::log!(
                self.source.level(Level::Info),
                "stopped: all records that were read are written and committed"
            ),
            _ => log::log!(
                self.source.level(Level::Warn),
                "stopped: {} read but not written ({}); what is not committed will be read again",
                counted(unwritten, "record"),
                self.postgres.reason().unwrap_or("there was no time left"),
            ),
        }
    }
}

/// How long ago `timestamp` was, by this machine's clock.
fn age(timestamp: Timestamp) -> Duration {
    let micros = clock::wall_micros().saturating_sub(timestamp.unix_micros());
    Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}
