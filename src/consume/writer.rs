//! The writer: the thread that owns the store, so that records are read while a batch is being written.
//!
//! Owns the thread and the two channels, each of one place: one request is under way at a time, and its answer is taken
//! before the next. Nothing waits for the store without a bound of its own.

use std::collections::BTreeMap;
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::bail;

use crate::consume::batch::{Batch, Flushed, NextOffset, Partition, Position};
use crate::consume::sink::Sink;
use crate::consume::store::{Store, StoreError};
use crate::sample::Timestamp;

/// How often the days ahead are made and the old ones dropped.
const MAINTAIN_EVERY: Duration = Duration::from_secs(3_600);

/// What the store is asked for.
#[derive(Debug)]
pub enum Request {
    Open,
    Locate {
        partitions: Vec<Partition>,
        missing_from: BTreeMap<Partition, NextOffset>,
    },
    Flush(Batch),
}

/// What it says; of a flush also how long it took.
#[derive(Debug)]
pub enum Answer<L> {
    Opened(Result<L, StoreError>),
    Located(Result<BTreeMap<Partition, Position>, StoreError>),
    Flushed(Batch, Flushed, Duration),
}

/// The handle of the polling thread.
pub struct Writer<L> {
    requests: SyncSender<Request>,
    answers: Receiver<Answer<L>>,
    is_busy: bool,
}

impl<L: Send + 'static> Writer<L> {
    /// # Errors
    /// The operating system has no thread to give.
    pub fn start<S: Sink<Layout = L>>(store: Store<S>) -> io::Result<Self> {
        let (requests, requested) = sync_channel(1);
        let (answer, answers) = sync_channel(1);
        std::thread::Builder::new()
            .name("writer".into())
            .spawn(move || write(store, &requested, &answer))?;
        Ok(Self {
            requests,
            answers,
            is_busy: false,
        })
    }

    /// Whether an answer is still to come.
    pub fn is_busy(&self) -> bool {
        self.is_busy
    }

    /// # Errors
    /// The writer is gone: a bug.
    pub fn ask(&mut self, request: Request) -> anyhow::Result<()> {
        debug_assert!(!self.is_busy, "one request at a time");
        self.is_busy = true;
        match self.requests.send(request) {
            Ok(()) => Ok(()),
            Err(_) => bail!(GONE),
        }
    }

    /// The answer, if it is there.
    ///
    /// # Errors
    /// The writer is gone: a bug.
    pub fn answer(&mut self) -> anyhow::Result<Option<Answer<L>>> {
        match self.answers.try_recv() {
            Ok(answer) => {
                self.is_busy = false;
                Ok(Some(answer))
            }
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => bail!(GONE),
        }
    }

    /// The answer, if it comes in time.
    ///
    /// # Errors
    /// The writer is gone: a bug.
    pub fn wait(&mut self, timeout: Duration) -> anyhow::Result<Option<Answer<L>>> {
        match self.answers.recv_timeout(timeout) {
            Ok(answer) => {
                self.is_busy = false;
                Ok(Some(answer))
            }
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!(GONE),
        }
    }

    /// Ends the thread and closes the connection. If it is stuck in a request, it is left to the end of the process: what it
    /// was asked to write is then in doubt, as after a crash.
    pub fn close(self, within: Duration) {
        let Self {
            requests, answers, ..
        } = self;
        drop(requests);
        #[expect(clippy::disallowed_methods, reason = "an edge: a bound on waiting")]
        let deadline = Instant::now() + within;
        loop {
            #[expect(clippy::disallowed_methods, reason = "an edge: a bound on waiting")]
            let left = deadline.saturating_duration_since(Instant::now());
            match answers.recv_timeout(left) {
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {
                    log::debug!("Postgres does not answer: left without a goodbye");
                    return;
                }
            }
        }
    }
}

const GONE: &str = "the writer's thread ended: a bug, please report it";

fn write<S: Sink>(
    mut store: Store<S>,
    requests: &Receiver<Request>,
    answers: &SyncSender<Answer<S::Layout>>,
) {
    let mut maintained_at = now();
    loop {
        let until_maintenance = (maintained_at + MAINTAIN_EVERY).saturating_duration_since(now());
        let request = match requests.recv_timeout(until_maintenance) {
            Ok(request) => Some(request),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        if let Some(request) = request {
            let answer = match request {
                Request::Open => {
                    // Opening does the same.
                    maintained_at = now();
                    Answer::Opened(store.open())
                }
                Request::Locate {
                    partitions,
                    missing_from,
                } => Answer::Located(store.positions(&partitions, &missing_from)),
                Request::Flush(batch) => {
                    let started = now();
                    let flushed = store.flush(&batch);
                    Answer::Flushed(batch, flushed, now().saturating_duration_since(started))
                }
            };
            if answers.send(answer).is_err() {
                return;
            }
        }
        if maintained_at + MAINTAIN_EVERY <= now() {
            maintained_at = now();
            // A connection that breaks here is found broken by the next request.
            if let Some(Err(error)) = wall_clock().map(|now| store.maintain(now)) {
                log::debug!("the days ahead were not made: {error}");
            }
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "an edge: when to maintain, and how long a flush took"
)]
fn now() -> Instant {
    Instant::now()
}

/// `None` where the clock is set to something that no timestamp holds.
fn wall_clock() -> Option<Timestamp> {
    #[expect(clippy::disallowed_methods, reason = "an edge: days are of the wall clock")]
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    Timestamp::from_unix_micros(i64::try_from(since_epoch.as_micros()).ok()?)
}
