//! The writer: the thread that owns the store, so that records are read while a batch is being written.
//!
//! One request is under way at a time, and its answer is taken before the next one is sent.

use std::collections::BTreeMap;
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::bail;

use crate::clock::{self, instant_now, wall_micros};
use crate::consume::batch::{Batch, Flushed, Partition, Position};
use crate::consume::ingest::Request;
use crate::consume::sink::Sink;
use crate::consume::store::Store;
use crate::postgres::Fault;
use crate::thread::start_thread;

/// How often the store is maintained: partitions of the days ahead are created, and what is too old is removed.
const MAINTAIN_EVERY: Duration = Duration::from_secs(3_600);

/// The store's answer, for a flush with its duration.
#[derive(Debug)]
pub(super) enum Answer<L> {
    Opened(Result<L, Fault>),
    Located(Result<BTreeMap<Partition, Position>, Fault>),
    Flushed(Batch, Result<Flushed, Fault>, Duration),
}

/// The handle that the polling thread has.
pub(super) struct Writer<L> {
    requests: SyncSender<Request>,
    answers: Receiver<Answer<L>>,
    is_busy: bool,
}

impl<L: Send + 'static> Writer<L> {
    pub(super) fn start<S: Sink<Layout = L>>(store: Store<S>) -> io::Result<Self> {
        let (requests, requested) = sync_channel(1);
        let (answer, answers) = sync_channel(1);
        start_thread("writer", move || write(store, &requested, &answer))?;
        Ok(Self {
            requests,
            answers,
            is_busy: false,
        })
    }

    /// Whether a request is under way.
    pub(super) fn is_busy(&self) -> bool {
        self.is_busy
    }

    pub(super) fn ask(&mut self, request: Request) -> anyhow::Result<()> {
        debug_assert!(!self.is_busy, "one request at a time");
        self.is_busy = true;
        match self.requests.send(request) {
            Ok(()) => Ok(()),
            Err(_) => bail!(GONE),
        }
    }

    /// The answer, if it arrives within `timeout`.
    pub(super) fn wait(&mut self, timeout: Duration) -> anyhow::Result<Option<Answer<L>>> {
        match self.answers.recv_timeout(timeout) {
            Ok(answer) => {
                self.is_busy = false;
                Ok(Some(answer))
            }
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!(GONE),
        }
    }

    /// Ends the thread and closes the connection. If a request takes longer, the thread ends with the process; whether its batch
    /// was written is then unknown, as after a crash.
    pub(super) fn close(self, within: Duration) {
        let Self {
            requests, answers, ..
        } = self;
        drop(requests);
        let deadline = instant_now() + within;
        loop {
            let left = deadline.saturating_duration_since(instant_now());
            match answers.recv_timeout(left) {
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {
                    log::debug!("Postgres does not answer; the connection was not closed properly");
                    return;
                }
            }
        }
    }
}

const GONE: &str = "the writer's thread ended: this is a bug, please report it";

fn write<S: Sink>(
    mut store: Store<S>,
    requests: &Receiver<Request>,
    answers: &SyncSender<Answer<S::Layout>>,
) {
    let mut maintained_at = instant_now();
    loop {
        let request = match requests.recv_timeout(maintain_in(&store, maintained_at)) {
            Ok(request) => Some(request),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        if let Some(request) = request {
            let answer = match request {
                Request::Open => {
                    // Opening includes maintenance.
                    maintained_at = instant_now();
                    Answer::Opened(store.open())
                }
                Request::Locate {
                    partitions,
                    missing_from,
                } => Answer::Located(store.positions(&partitions, &missing_from)),
                Request::Flush(batch) => {
                    let started = instant_now();
                    let flushed = store.flush(&batch);
                    Answer::Flushed(batch, flushed, instant_now().saturating_duration_since(started))
                }
            };
            if answers.send(answer).is_err() {
                return;
            }
        }
        if maintain_in(&store, maintained_at).is_zero() {
            maintained_at = instant_now();
            // If the connection broke, the next request reports it.
            let today = clock::timestamp(wall_micros());
            if let Err(error) = store.maintain(today) {
                log::debug!("maintenance failed: {error}");
            }
        }
    }
}

fn maintain_in<S: Sink>(store: &Store<S>, maintained_at: Instant) -> Duration {
    let now = instant_now();
    let hourly = (maintained_at + MAINTAIN_EVERY).saturating_duration_since(now);
    hourly.min(store.maintain_in(now))
}
