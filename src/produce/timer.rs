//! The timer loop: one thread that waits for the next tick, a result, a signal or a reload, and acts on it.
//!
//! Connects the schedule, the pool, the publisher and, with PRODUCE_GROUP, the shares. `summary` counts and logs, and `stop` is
//! what follows the loop.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Context;

use super::mailbox::Mailbox;
use super::pool::Pool;
use super::publisher::{Publisher, Record};
use super::result::{CheckResult, missed_record};
use super::schedule::{BacklogItem, Next, Rounds, Schedule};
use super::setup::Setup;
use super::shared_hosts::SharedHosts;
use super::summary::Summary;
use crate::check::observation::Observation;
use crate::check::target::Target;
use crate::clock::{Clock, instant_now};
use crate::duration::micros;
use crate::http::health;
use crate::produce::hosts::Watch;
use crate::produce::hosts::list::{Changes, HostList};
use crate::sample::Outcome;

/// How many records of the backlog are written before the loop looks again at what is due: 0.2 ms of work.
const BACKLOG_AT_A_TIME: usize = 100;

/// How often the publisher is asked for room while the backlog waits for it.
pub(super) const LOOK_FOR_ROOM_EVERY: Duration = Duration::from_millis(10);

pub(super) struct TimerLoop<'a> {
    pub(super) setup: Setup<'a>,
    pub(super) schedule: Schedule<Record>,
    /// When the schedule was last asked what is due.
    pub(super) looked_at: i64,
    /// With PRODUCE_GROUP.
    pub(super) shared_hosts: Option<SharedHosts>,
    pool: Pool,
    pub(super) publisher: Publisher,
    pub(super) clock: Clock,
    mailbox: Arc<Mailbox>,
    /// `None`: the hosts do not change.
    watch: Option<Watch>,
    pub(super) summary: Summary,
    /// Empty between turns; kept for its capacity.
    backlog: Vec<BacklogItem<Record>>,
}

/// What is left of the backlog.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Backlog {
    Empty,
    NotEmpty,
    /// Not empty, and the publisher has no room.
    NoRoom,
}

/// Why the loop has ended.
pub(super) enum Ended {
    StopRequested(Instant),
    /// `--once`: every host was checked, and Kafka has acknowledged all records.
    Once,
}

impl<'a> TimerLoop<'a> {
    pub(super) fn new(
        mut setup: Setup<'a>,
        hosts: HostList,
        schedule: Schedule<Record>,
        shared_hosts: Option<SharedHosts>,
        pool: Pool,
        publisher: Publisher,
        mailbox: Arc<Mailbox>,
    ) -> anyhow::Result<Self> {
        let sources = std::mem::take(&mut setup.sources);
        let watch = match setup.rounds {
            Rounds::Once => None,
            Rounds::Endless => {
                let (has_error, lists) = (
                    Arc::clone(&setup.counters.host_list_has_error),
                    Arc::clone(&mailbox),
                );
                let secrets = setup.config.check.secrets_dir.clone();
                let watch = sources.watch(hosts, secrets, has_error, move |changes| {
                    lists.put_changes(changes);
                });
                Some(watch.context("cannot start a thread to watch the hosts")?)
            }
        };
        let clock = mailbox.clock();
        Ok(Self {
            schedule,
            looked_at: clock.now_micros(),
            shared_hosts,
            pool,
            publisher,
            clock,
            mailbox,
            watch,
            summary: Summary::new(Arc::clone(&setup.counters), clock, setup.config.check.max_threads),
            backlog: Vec::with_capacity(BACKLOG_AT_A_TIME),
            setup,
        })
    }

    pub(super) fn run(&mut self) -> Ended {
        loop {
            self.take_mail();
            if let Some(requested_at) = self.setup.shutdown.requested_at() {
                return Ended::StopRequested(requested_at);
            }
            if self.setup.shutdown.take_reload()
                && let Some(watch) = &self.watch
            {
                watch.reload();
            }
            let next_tick = self.start_due();
            let backlog = self.write_backlog();
            let shares_due_at = self.look_at_shares();
            if self.shared_hosts.is_some() {
                let hosts = self.schedule.hosts();
                self.setup.counters.hosts.store(hosts, Ordering::Relaxed);
            }
            self.summary.count(&self.schedule, &self.pool, &self.publisher);
            let now = self.clock.now_micros();
            if self.setup.rounds == Rounds::Once && self.schedule.is_over() {
                if self.publisher.on_the_way() == 0 {
                    return Ended::Once;
                }
                self.wait_until(now + micros(LOOK_FOR_ROOM_EVERY));
                continue;
            }
            let backlog_due_at = match backlog {
                Backlog::NotEmpty => now,
                Backlog::NoRoom => now + micros(LOOK_FOR_ROOM_EVERY),
                Backlog::Empty => self.summary.due_at(),
            };
            let wakes_at = backlog_due_at.min(shares_due_at);
            self.wait_until(next_tick.map_or(wakes_at, |tick| tick.min(wakes_at)));
        }
    }

    /// Returns when the shares have to be looked at again.
    pub(super) fn look_at_shares(&mut self) -> i64 {
        let shared_hosts = self.shared_hosts.as_mut();
        shared_hosts.map_or(i64::MAX, |shared_hosts| {
            shared_hosts.turn(&mut self.schedule, &self.publisher, self.looked_at)
        })
    }

    /// Begins every check that is due. Returns the next tick.
    pub(super) fn start_due(&mut self) -> Option<i64> {
        loop {
            let publisher = &self.publisher;
            let now = self.clock.now_micros();
            self.looked_at = now;
            match self.schedule.next(now, |target| publisher.has_room(target)) {
                Next::Wait(until) => return until,
                Next::Start(tick) => {
                    if let Err(no_thread) = self.pool.start(tick) {
                        let failed = Observation::failed(Outcome::AgentError, no_thread.to_string());
                        let name = &self.setup.config.check.agent_name;
                        self.take_result(CheckResult::not_begun(no_thread.tick, failed, name));
                    }
                }
            }
        }
    }

    pub(super) fn wait_until(&self, wakes_at: i64) {
        self.setup.counters.heartbeat.beat();
        let turns_at = self.clock.now_micros() + micros(health::TURN_EVERY);
        self.mailbox
            .wait_until(wakes_at.min(turns_at), self.schedule.is_short_of_threads());
    }

    pub(super) fn take_mail(&mut self) {
        let (results, orders, changes) = self.mailbox.take();
        for result in results {
            self.take_result(result);
        }
        for order in orders {
            if let Some(shared_hosts) = &mut self.shared_hosts {
                let now = self.clock.now_micros();
                shared_hosts.obey(order, &mut self.schedule, &self.publisher, now);
            }
        }
        if !self.setup.shutdown.requested() {
            changes.into_iter().for_each(|changes| self.change_hosts(changes));
        }
    }

    fn take_result(&mut self, result: CheckResult) {
        let CheckResult {
            tick,
            outcome,
            agent_error,
            timing,
            record,
        } = result;
        // A check that was cut off has its record already.
        if self.schedule.is_under_way(&tick) {
            self.setup.counters.count_result(outcome, timing.as_ref());
            if let Some(error) = agent_error {
                self.summary.add_agent_error(&tick.target.address, &error);
            }
        }
        if let Some(record) = self.schedule.finished(&tick, record) {
            self.publisher.publish(record);
        }
    }

    pub(super) fn write_backlog(&mut self) -> Backlog {
        if !self.schedule.has_backlog() {
            return Backlog::Empty;
        }
        let publisher = &self.publisher;
        let has_room = |target: &Target| publisher.has_spare_room(target);
        self.schedule
            .drain(BACKLOG_AT_A_TIME, has_room, &mut self.backlog);
        let left = match (self.schedule.has_backlog(), self.backlog.is_empty()) {
            (false, _) => Backlog::Empty,
            (true, true) => Backlog::NoRoom,
            (true, false) => Backlog::NotEmpty,
        };
        for item in self.backlog.drain(..) {
            self.publisher.publish(match item {
                BacklogItem::Result(record) => record,
                BacklogItem::Missed(missed) => missed_record(missed, &self.setup.config.check.agent_name),
            });
        }
        left
    }

    fn change_hosts(&mut self, changes: Changes) {
        for line in &changes.warnings {
            log::warn!("reload: {line}");
        }
        let (begun_at, hosts) = (changes.begun_at, changes.hosts);
        let lines_changed = changes.changed.len() + changes.removed.len();
        self.setup.counters.hosts.store(hosts, Ordering::Relaxed);
        let now = self.clock.now_micros();
        match &mut self.shared_hosts {
            Some(shared_hosts) => shared_hosts.change(changes, &mut self.schedule, now),
            None => self
                .schedule
                .change(changes.changed, &changes.removed, |_| None, now),
        }
        let seconds = instant_now().duration_since(begun_at).as_secs_f64();
        log::info!("reload hosts={hosts} lines_changed={lines_changed} seconds={seconds:.3}");
    }
}
