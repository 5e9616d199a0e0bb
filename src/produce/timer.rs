//! The timer loop: one thread that waits for the next tick, a result, a signal or a reload, and acts on it.
//!
//! Connects the schedule, the pool, the publisher and, with PRODUCE_GROUP, the shares. `summary` counts and logs, and `stop` is
//! what follows the loop.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Context;

use super::counters::Counters;
use super::mailbox::{Mail, Mailbox};
use super::pool::Pool;
use super::publisher::{Bounds, Publisher, Record};
use super::result::{CheckResult, missed_record};
use super::schedule::{BacklogItem, Next, Rounds, Schedule};
use super::shared_hosts::SharedHosts;
use super::summary::Summary;
use crate::check::observation::Observation;
use crate::check::target::Target;
use crate::clock::{Clock, instant_now};
use crate::config::ProduceConfig;
use crate::duration::micros;
use crate::http::health;
use crate::produce::hosts::list::{Changes, HostList};
use crate::produce::hosts::{Sources, Watch};
use crate::sample::Outcome;
use crate::shutdown::Shutdown;

/// How many records of the backlog are written before the loop looks again at what is due: 0.2 ms of work.
const BACKLOG_AT_A_TIME: usize = 100;

/// How often the publisher is asked for room while the backlog waits for it.
pub(super) const LOOK_FOR_ROOM_EVERY: Duration = Duration::from_millis(10);

/// What a run needs from its caller. Tests use their own checks and bounds.
pub struct Setup<'a> {
    pub config: &'a ProduceConfig,
    pub sources: Sources,
    pub rounds: Rounds,
    pub shutdown: &'a Shutdown,
    pub counters: Arc<Counters>,
    pub bounds: Bounds,
}

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
                    lists.put(Mail::Changes(changes));
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
            let mut wakes_at = self.turn().min(self.summary.due_at());
            if self.shared_hosts.is_some() {
                let hosts = self.schedule.hosts();
                self.setup.counters.hosts.store(hosts, Ordering::Relaxed);
            }
            self.summary.count(&self.schedule, &self.pool, &self.publisher);
            if self.setup.rounds == Rounds::Once && self.schedule.is_over() {
                if self.publisher.on_the_way() == 0 {
                    return Ended::Once;
                }
                wakes_at = self.clock.now_micros() + micros(LOOK_FOR_ROOM_EVERY);
            }
            self.wait_until(wakes_at);
        }
    }

    /// Does what is due. Returns the time of the next turn.
    pub(super) fn turn(&mut self) -> i64 {
        let next_tick = self.start_due().unwrap_or(i64::MAX);
        let backlog_due_at = self.write_backlog();
        let shares_due_at = self.shared_hosts.as_mut().map_or(i64::MAX, |shared_hosts| {
            let tell = |letter| self.publisher.tell(letter);
            shared_hosts.turn(&mut self.schedule, tell, self.looked_at)
        });
        next_tick.min(backlog_due_at).min(shares_due_at)
    }

    /// Begins every check that is due. Returns the next tick.
    fn start_due(&mut self) -> Option<i64> {
        loop {
            let publisher = &self.publisher;
            let now = self.clock.now_micros();
            self.looked_at = now;
            match self.schedule.next(now, |target| publisher.has_room(target)) {
                Next::Wait(until) => return until,
                Next::Start(tick) => {
                    if let Err((tick, error)) = self.pool.start(tick) {
                        let failed = Observation::failed(
                            Outcome::AgentError,
                            format!("cannot start a thread: {error}"),
                        );
                        let name = &self.setup.config.check.agent_name;
                        self.take_result(CheckResult::new(tick, failed, None, name));
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
        for mail in self.mailbox.take() {
            match mail {
                Mail::Result(result) => self.take_result(result),
                Mail::Order(order) => {
                    if let Some(shared_hosts) = &mut self.shared_hosts {
                        let now = self.clock.now_micros();
                        shared_hosts.obey(order, &mut self.schedule, &self.publisher, now);
                    }
                }
                Mail::Changes(changes) => {
                    if !self.setup.shutdown.requested() {
                        self.change_hosts(changes);
                    }
                }
            }
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

    /// Writes a part of the backlog. Returns when the rest of it is due.
    pub(super) fn write_backlog(&mut self) -> i64 {
        let publisher = &self.publisher;
        let has_room = |target: &Target| publisher.has_spare_room(target);
        self.schedule
            .drain(BACKLOG_AT_A_TIME, has_room, &mut self.backlog);
        let now = self.clock.now_micros();
        let due_at = match (self.schedule.has_backlog(), self.backlog.is_empty()) {
            (false, _) => i64::MAX,
            (true, true) => now + micros(LOOK_FOR_ROOM_EVERY),
            (true, false) => now,
        };
        for item in self.backlog.drain(..) {
            self.publisher.publish(match item {
                BacklogItem::Result(record) => record,
                BacklogItem::Missed(missed) => missed_record(missed, &self.setup.config.check.agent_name),
            });
        }
        due_at
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
