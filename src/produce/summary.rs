//! What the timer loop counts and logs: a summary every minute, and conditions that an operator should know of.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::counters::{Counters, Snapshot};
use super::pool::Pool;
use super::publisher::{Publisher, Record};
use super::schedule::{MissedReason, Schedule};
use crate::clock::Clock;
use crate::duration::micros;

const SUMMARY_EVERY: Duration = Duration::from_secs(60);

/// A change of the wall clock by more than this is logged.
const CLOCK_DEVIATION: Duration = Duration::from_secs(1);

pub(super) struct Summary {
    counters: Arc<Counters>,
    clock: Clock,
    /// The counters at the last summary.
    last: Snapshot,
    due_at: i64,
    clock_deviation: i64,
    no_room: GrowthLine,
    agent_errors: AgentErrors,
    max_threads: usize,
    no_thread: GrowthLine,
}

impl Summary {
    pub(super) fn new(counters: Arc<Counters>, clock: Clock, max_threads: usize) -> Self {
        Self {
            last: counters.snapshot(),
            due_at: clock.now_micros() + micros(SUMMARY_EVERY),
            clock_deviation: 0,
            no_room: GrowthLine::default(),
            agent_errors: AgentErrors::default(),
            max_threads,
            no_thread: GrowthLine::default(),
            counters,
            clock,
        }
    }

    pub(super) fn due_at(&self) -> i64 {
        self.due_at
    }

    pub(super) fn add_agent_error(&mut self, address: &str, error: &str) {
        self.agent_errors.add(address, error);
    }

    /// Updates the counters, and logs what is due.
    pub(super) fn count(&mut self, schedule: &Schedule<Record>, pool: &Pool, publisher: &Publisher) {
        self.counters.set_ticks(schedule.ticks_due(), schedule.missed());
        self.counters
            .under_way
            .store(schedule.under_way(), Ordering::Relaxed);
        self.counters.threads.store(pool.threads(), Ordering::Relaxed);
        let now = self.clock.now_micros();
        self.log_no_room(schedule.missed().count(MissedReason::NoRoom), publisher, now);
        self.agent_errors.log_if_due(now);
        self.log_no_thread(schedule.missed().count(MissedReason::NoThread), now);
        if now >= self.due_at {
            self.due_at = now + micros(SUMMARY_EVERY);
            let counters = self.counters.snapshot();
            log::info!(
                "produce {} under_way={} threads={} on_the_way={}",
                counters.since(&self.last),
                schedule.under_way(),
                pool.threads(),
                publisher.on_the_way(),
            );
            self.last = counters;
            self.log_clock_deviation();
        }
    }

    /// When the buffer becomes full, and once a minute while ticks are missed for that reason.
    fn log_no_room(&mut self, count: u64, publisher: &Publisher, now: i64) {
        if self.no_room.is_due(count, now) {
            log::error!(
                "Kafka accepts no records, and the buffer is full ({} records): until Kafka accepts more, hosts are not \
                 checked and their ticks ({count} so far) are recorded as missed",
                publisher.on_the_way(),
            );
        }
    }

    /// Once a minute while ticks are missed for that reason.
    fn log_no_thread(&mut self, count: u64, now: i64) {
        if self.no_thread.is_due(count, now) {
            log::warn!(
                "ticks are missed ({count} so far), because as many checks are under way as MAX_THREADS={} allows: raise \
                 MAX_THREADS, or share the hosts with more producers (PRODUCE_GROUP)",
                self.max_threads
            );
        }
    }

    fn log_clock_deviation(&mut self) {
        let ahead = self.clock.wall_clock_ahead_micros();
        if (ahead - self.clock_deviation).abs() > micros(CLOCK_DEVIATION) {
            self.clock_deviation = ahead;
            log::warn!(
                "the machine's clock has been changed by {:.3} s since the start; ticks and records keep to the old time until a restart",
                ahead as f64 / 1e6,
            );
        }
    }

    pub(super) fn log_stopped(&mut self) {
        self.agent_errors.log();
        log::info!("stopped {}", self.counters.snapshot().since(&self.last));
    }
}

/// Limits a log line to one a minute, and to moments when its count grows.
#[derive(Default)]
struct GrowthLine {
    count: u64,
    not_before: i64,
}

impl GrowthLine {
    fn is_due(&mut self, count: u64, now: i64) -> bool {
        let is_due = count > self.count && now >= self.not_before;
        if is_due {
            self.count = count;
            self.not_before = now + micros(SUMMARY_EVERY);
        }
        is_due
    }
}

/// The `agent_error` results since the last log line.
#[derive(Default)]
struct AgentErrors {
    count: u64,
    newest: String,
    not_before: i64,
}

impl AgentErrors {
    fn add(&mut self, address: &str, error: &str) {
        self.count += 1;
        self.newest = format!("address={address:?} {error}");
    }

    fn log_if_due(&mut self, now: i64) {
        if self.count > 0 && now >= self.not_before {
            self.not_before = now + micros(SUMMARY_EVERY);
            self.log();
        }
    }

    fn log(&mut self) {
        if self.count > 0 {
            log::error!(
                "agent_error count={} {}: this machine could not check, which says nothing about the host",
                self.count,
                self.newest,
            );
        }
        self.count = 0;
    }
}
