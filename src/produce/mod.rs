//! The `produce` agent: from the host file to acknowledged records.
//!
//! `host_file`, `schedule`, `outbox` and `share` are pure; `pool` (threads), `publisher` and `fleet` (Kafka) are the edges.
//! This file runs the timer loop and connects these parts.

pub mod counters;
mod fleet;
pub mod host_file;
mod mailbox;
mod metrics;
pub mod outbox;
pub mod pool;
pub mod publisher;
mod result;
pub mod schedule;
pub mod share;
mod shared_hosts;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::bail;

use crate::check::http::Checks;
use crate::check::observation::Observation;
use crate::check::target::Target;
use crate::clock::{Clock, instant_now};
use crate::config::ProduceConfig;
use crate::http::Endpoint;
use crate::http::health;
use crate::produce::counters::{Counters, Snapshot};
use crate::produce::host_file::{HostFileError, Hosts};
use crate::produce::mailbox::Mailbox;
use crate::produce::metrics::Figures;
use crate::produce::pool::Pool;
use crate::produce::publisher::{Bounds, END_WITHIN, Publisher, Record, Unacknowledged};
use crate::produce::result::{CheckResult, missed_record};
use crate::produce::schedule::{Late, Limits, Missed, Next, Schedule, Why};
use crate::produce::shared_hosts::{Joining, SharedHosts};
use crate::sample::Outcome;
use crate::shutdown::{STOP_WITHIN, Shutdown};

/// How a run ends by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounds {
    /// `--once`: each host once, at once, until Kafka has acknowledged every record.
    Once,
    /// Every tick of every host until a stop is requested.
    Endless,
}

/// Checks `targets` and publishes a record per tick. A reload reads `host_file` again (`None`: standard input, which
/// cannot be read twice).
///
/// METRICS_ADDR is served meanwhile, but not with `--once`: that runs beside an agent that has the address already.
///
/// # Errors
/// It could not start, or stopped with records that Kafka never acknowledged.
pub fn run(
    config: &ProduceConfig,
    targets: Vec<Target>,
    host_file: Option<&Path>,
    rounds: Rounds,
    shutdown: &Shutdown,
) -> anyhow::Result<()> {
    let counters = Arc::<Counters>::default();
    let figures = Figures {
        counters: Arc::clone(&counters),
        max_threads: config.check.max_threads,
        max_records: Bounds::default().records,
    };
    let metrics_addr = config.metrics_addr.filter(|_| rounds == Rounds::Endless);
    let _endpoint = metrics_addr
        .map(|address| Endpoint::start(address, figures))
        .transpose()?;
    run_counted(config, targets, host_file, rounds, shutdown, counters)
}

/// [`run`] for those who look at its counters, while it runs or afterwards.
///
/// # Errors
/// As for [`run`].
pub fn run_counted(
    config: &ProduceConfig,
    targets: Vec<Target>,
    host_file: Option<&Path>,
    rounds: Rounds,
    shutdown: &Shutdown,
    counters: Arc<Counters>,
) -> anyhow::Result<()> {
    let checks = Checks::new(&config.check)?;
    let agent = Agent {
        config,
        host_file,
        rounds,
        shutdown,
        counters,
        bounds: Bounds::default(),
    };
    agent.run(targets, move || {
        let mut checker = checks.checker();
        move |target: &Target, deadline| checker.check(target, deadline)
    })
}

/// The agent with everything that [`run`] settles for its callers, so that tests can put in their own checks and bounds.
pub struct Agent<'a> {
    pub config: &'a ProduceConfig,
    pub host_file: Option<&'a Path>,
    pub rounds: Rounds,
    pub shutdown: &'a Shutdown,
    pub counters: Arc<Counters>,
    pub bounds: Bounds,
}

/// A check that has not ended so long after the stop signal is cut off.
const CHECKS_END_WITHIN: Duration = Duration::from_secs(6);

/// What Kafka has not acknowledged so long after the stop signal is given up; the rest of [`STOP_WITHIN`] is for the
/// process to end.
const DELIVER_WITHIN: Duration = Duration::from_millis(8_000);
const _: () = assert!(DELIVER_WITHIN.as_millis() + END_WITHIN.as_millis() < STOP_WITHIN.as_millis());

const SUMMARY_EVERY: Duration = Duration::from_secs(60);

/// A wall clock that was set by more than this is worth a line.
const CLOCK_DEVIATION: Duration = Duration::from_secs(1);

/// Late records taken between two looks at what is due: 0.2 ms of work.
const LATE_AT_A_TIME: usize = 100;

/// How long late records wait before the publisher is asked again whether it has room for them.
const LOOK_FOR_ROOM_EVERY: Duration = Duration::from_millis(10);

impl Agent<'_> {
    /// Checks `targets` with what `make_check` makes for each thread.
    ///
    /// # Errors
    /// As for [`run`].
    pub fn run<C>(
        self,
        targets: Vec<Target>,
        make_check: impl Fn() -> C + Send + Sync + 'static,
    ) -> anyhow::Result<()>
    where
        C: FnMut(&Target, Instant) -> Observation + 'static,
    {
        let check = &self.config.check;
        let clock = Clock::start()?;
        let mailbox = Arc::new(Mailbox::new(clock));
        let (agent_name, results) = (check.agent_name.clone(), Arc::clone(&mailbox));
        let pool = Pool::new(clock, check.timeout, make_check, move |done| {
            results.put_result(CheckResult::of(done, clock.now_micros(), &agent_name));
        });
        let waker = Arc::clone(&mailbox);
        self.shutdown.on_request(move || waker.wake());

        let limits = Limits {
            max_under_way: check.max_threads,
            check_timeout: check.timeout,
        };
        let deliveries = Arc::clone(&self.counters.deliveries);
        let (kafka, topic) = (&self.config.kafka, &self.config.topic);
        // Each host once is nobody else's business.
        let group = self
            .config
            .group
            .as_ref()
            .filter(|_| self.rounds == Rounds::Endless);
        let group_name = group.map_or("none", |group| group.name.as_str());
        log::info!(
            "produce hosts={} kafka={} topic={topic} group={group_name} max_threads={}",
            targets.len(),
            kafka.bootstrap_servers,
            check.max_threads,
        );
        self.counters.hosts.store(targets.len(), Ordering::Relaxed);
        let (joining, targets) = match group {
            Some(_) => (Some(Joining::new(targets)), Vec::new()),
            None => (None, targets),
        };
        let membership = joining
            .as_ref()
            .and_then(|joining| joining.membership(self.config));
        let publisher = Publisher::start(kafka, topic, self.bounds, deliveries, membership)?;
        let orders = Arc::clone(&mailbox);
        let shared_hosts = match joining {
            Some(joining) => joining.join(self.config, clock, publisher.letter_box(), move |order| {
                orders.put_order(order);
            })?,
            None => None,
        };
        let now = clock.now_micros();
        let schedule = match self.rounds {
            Rounds::Once => Schedule::once(targets, limits, now),
            Rounds::Endless => Schedule::endless(targets, limits, now),
        };
        let run = Run {
            schedule,
            looked_at: now,
            shared_hosts,
            pool,
            publisher,
            clock,
            mailbox,
            reload: Reload::Idle,
            summarized: self.counters.snapshot(),
            summary_due_at: now + micros(SUMMARY_EVERY),
            clock_deviation_said: 0,
            no_room_counted: 0,
            no_room_line: OnceAMinute::default(),
            agent_errors: AgentErrors::default(),
            late: Vec::with_capacity(LATE_AT_A_TIME),
            agent: self,
        };
        run.go()
    }
}

/// The timer loop's state.
struct Run<'a> {
    agent: Agent<'a>,
    schedule: Schedule<Record>,
    /// When the schedule was last asked what is due.
    looked_at: i64,
    /// With PRODUCE_GROUP.
    shared_hosts: Option<SharedHosts>,
    pool: Pool,
    publisher: Publisher,
    clock: Clock,
    mailbox: Arc<Mailbox>,
    reload: Reload,
    summarized: Snapshot,
    summary_due_at: i64,
    clock_deviation_said: i64,
    no_room_counted: u64,
    no_room_line: OnceAMinute,
    agent_errors: AgentErrors,
    /// Kept for its memory.
    late: Vec<Late<Record>>,
}

/// A host file is read and parsed on a thread of its own: a hundred thousand lines take longer than a tick may be late.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reload {
    Idle,
    Reading,
    /// Asked for again while reading: the file may have changed since.
    ReadAgain,
}

impl Run<'_> {
    fn go(mut self) -> anyhow::Result<()> {
        loop {
            self.take_mail();
            if let Some(requested_at) = self.agent.shutdown.requested_at() {
                return self.stop(requested_at);
            }
            if self.agent.shutdown.take_reload() {
                self.begin_reload();
            }
            let next_tick = self.start_due();
            let drained = self.write_late();
            let shares_look_at = self.look_at_shares();
            self.count();
            if self.agent.rounds == Rounds::Once && self.schedule.is_over() {
                if self.publisher.on_the_way() == 0 {
                    return self.end(Duration::ZERO);
                }
                self.wait_until(self.clock.now_micros() + micros(LOOK_FOR_ROOM_EVERY));
                continue;
            }
            let now = self.clock.now_micros();
            let wake_at = match drained {
                Drained::Some => now,
                Drained::NoRoom => now + micros(LOOK_FOR_ROOM_EVERY),
                Drained::Nothing => self.summary_due_at,
            };
            let wake_at = wake_at.min(shares_look_at);
            self.wait_until(next_tick.map_or(wake_at, |tick| tick.min(wake_at)));
        }
    }

    /// Returns when they have to be looked at again.
    fn look_at_shares(&mut self) -> i64 {
        let shared_hosts = self.shared_hosts.as_mut();
        shared_hosts.map_or(i64::MAX, |shared_hosts| {
            shared_hosts.turn(&mut self.schedule, &self.publisher, self.looked_at)
        })
    }

    /// Begins every check that is due; returns the next tick to come.
    fn start_due(&mut self) -> Option<i64> {
        loop {
            let publisher = &self.publisher;
            let now = self.clock.now_micros();
            self.looked_at = now;
            match self.schedule.next(now, |target| publisher.has_room(target)) {
                Next::Wait(until) => return until,
                Next::Start(tick) => {
                    if let Err(no_thread) = self.pool.start(tick) {
                        let fault = Observation::failed(Outcome::AgentError, no_thread.to_string());
                        let name = &self.agent.config.check.agent_name;
                        self.take_result(CheckResult::not_begun(no_thread.tick, fault, name));
                    }
                }
            }
        }
    }

    fn wait_until(&self, wakes_at: i64) {
        self.agent.counters.heartbeat.beat();
        let turns_at = self.clock.now_micros() + micros(health::TURN_EVERY);
        self.mailbox
            .wait_until(wakes_at.min(turns_at), self.schedule.is_short_of_threads());
    }

    fn take_mail(&mut self) {
        let (results, orders, reloaded) = self.mailbox.take();
        for result in results {
            self.take_result(result);
        }
        for order in orders {
            if let Some(shared_hosts) = &mut self.shared_hosts {
                let now = self.clock.now_micros();
                shared_hosts.obey(order, &mut self.schedule, &self.publisher, now);
            }
        }
        if let Some(reloaded) = reloaded {
            self.end_reload(reloaded);
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
            self.agent.counters.count_result(outcome, timing.as_ref());
            if let Some(error) = agent_error {
                self.agent_errors.add(&tick.target.address, &error);
            }
        }
        if let Some(record) = self.schedule.finished(&tick, record) {
            self.publisher.publish(record);
        }
    }

    fn write_late(&mut self) -> Drained {
        if !self.schedule.has_late() {
            return Drained::Nothing;
        }
        let publisher = &self.publisher;
        let has_room = |target: &Target| publisher.has_spare_room(target);
        self.schedule.drain(LATE_AT_A_TIME, has_room, &mut self.late);
        let drained = match (self.late.is_empty(), self.schedule.has_late()) {
            (_, false) => Drained::Nothing,
            (true, true) => Drained::NoRoom,
            (false, true) => Drained::Some,
        };
        for late in self.late.drain(..) {
            self.publisher.publish(match late {
                Late::Result(record) => record,
                Late::Missed(missed) => missed_record(missed, &self.agent.config.check.agent_name),
            });
        }
        drained
    }

    fn begin_reload(&mut self) {
        let Some(path) = self.agent.host_file else {
            log::warn!(
                "reload: the host file came from standard input and cannot be read again; the hosts stay"
            );
            return;
        };
        if self.reload != Reload::Idle {
            self.reload = Reload::ReadAgain;
            return;
        }
        let (path, mailbox) = (path.to_owned(), Arc::clone(&self.mailbox));
        let reading = std::thread::Builder::new()
            .name("reload".into())
            .spawn(move || mailbox.put_reloaded(host_file::read(&path)));
        match reading {
            Ok(_) => self.reload = Reload::Reading,
            Err(error) => log::error!("reload: cannot start a thread to read it: {error}; the hosts stay"),
        }
    }

    fn end_reload(&mut self, reloaded: Result<Hosts, HostFileError>) {
        match reloaded {
            Ok(Hosts { targets, warnings }) => {
                for line in warnings {
                    log::warn!("reload: {line}");
                }
                log::info!("reload hosts={}", targets.len());
                self.agent.counters.hosts.store(targets.len(), Ordering::Relaxed);
                let now = self.clock.now_micros();
                match &mut self.shared_hosts {
                    Some(shared_hosts) => shared_hosts.reload(targets, &mut self.schedule, now),
                    None => {
                        let targets = targets.into_iter().map(Arc::new).collect();
                        self.schedule.reload(targets, |_| None, now);
                    }
                }
            }
            Err(error) => log::error!("reload: the hosts stay as they were: {error}"),
        }
        let again = self.reload == Reload::ReadAgain;
        self.reload = Reload::Idle;
        if again {
            self.begin_reload();
        }
    }

    fn count(&mut self) {
        let missed = self.schedule.missed();
        let counters = &self.agent.counters;
        if self.shared_hosts.is_some() {
            counters.hosts.store(self.schedule.hosts(), Ordering::Relaxed);
        }
        counters.set_ticks(self.schedule.ticks_due(), missed);
        counters
            .under_way
            .store(self.schedule.under_way(), Ordering::Relaxed);
        counters.threads.store(self.pool.threads(), Ordering::Relaxed);
        self.say_no_room(*missed);
        let now = self.clock.now_micros();
        self.agent_errors.say(now);
        if now >= self.summary_due_at {
            self.summary_due_at = now + micros(SUMMARY_EVERY);
            self.summarize("produce");
            self.say_clock_deviation();
        }
    }

    /// Said when it begins, and once a minute while it lasts.
    fn say_no_room(&mut self, missed: Missed) {
        let count = missed.count(Why::NoRoom);
        if count == self.no_room_counted {
            return;
        }
        self.no_room_counted = count;
        if self.no_room_line.is_due(self.clock.now_micros()) {
            log::error!(
                "Kafka takes no records and {} are kept, no more can be: until it does, hosts are not checked and their ticks ({count} so far) will be recorded as missed",
                self.publisher.on_the_way(),
            );
        }
    }

    fn summarize(&mut self, what: &str) {
        let now = self.agent.counters.snapshot();
        log::info!(
            "{what} {} under_way={} threads={} on_the_way={}",
            now.since(&self.summarized),
            self.schedule.under_way(),
            self.pool.threads(),
            self.publisher.on_the_way(),
        );
        self.summarized = now;
    }

    fn say_clock_deviation(&mut self) {
        let ahead = self.clock.wall_clock_ahead_micros();
        if (ahead - self.clock_deviation_said).abs() > micros(CLOCK_DEVIATION) {
            self.clock_deviation_said = ahead;
            log::warn!(
                "the machine's clock was set by {:.3} s since the start: ticks and records go on by the time before; a restart adopts the new one",
                ahead as f64 / 1e6,
            );
        }
    }

    /// No tick is due any more: waits for the checks under way, delivers everything, in time.
    fn stop(mut self, requested_at: Instant) -> anyhow::Result<()> {
        let from = self.clock.micros_at(requested_at);
        self.leave_group(from);
        self.schedule
            .stop(self.clock.now_micros().min(from.max(self.looked_at)));
        log::info!(
            "stopping under_way={} on_the_way={}",
            self.schedule.under_way(),
            self.publisher.on_the_way(),
        );
        let checks_end_at = from + micros(CHECKS_END_WITHIN);
        while self.schedule.under_way() > 0 && self.clock.now_micros() < checks_end_at {
            let drained = self.write_late();
            let now = self.clock.now_micros();
            self.wait_until(match drained {
                Drained::Some => now,
                Drained::NoRoom => now + micros(LOOK_FOR_ROOM_EVERY),
                Drained::Nothing => checks_end_at,
            });
            self.take_mail();
        }
        self.schedule.cut_off();
        let deliver_until = from + micros(DELIVER_WITHIN);
        while self.schedule.has_late() && self.clock.now_micros() < deliver_until {
            if self.write_late() == Drained::NoRoom {
                self.wait_until(self.clock.now_micros() + micros(LOOK_FOR_ROOM_EVERY));
            }
        }
        let left = self.clock.until(deliver_until);
        self.end(left)
    }

    /// Hands the shares over while their hosts are still checked.
    fn leave_group(&mut self, from: i64) {
        let until = from + micros(CHECKS_END_WITHIN);
        match &mut self.shared_hosts {
            Some(shared_hosts) => shared_hosts.stop(until),
            None => return,
        }
        while self
            .shared_hosts
            .as_ref()
            .is_some_and(|shared_hosts| !shared_hosts.has_left())
            && self.clock.now_micros() < until + micros(health::TURN_EVERY)
        {
            let next_tick = self.start_due();
            let drained = self.write_late();
            let look_at = self.look_at_shares();
            let wake_at = match drained {
                Drained::Some => self.clock.now_micros(),
                Drained::NoRoom | Drained::Nothing => self.clock.now_micros() + micros(LOOK_FOR_ROOM_EVERY),
            };
            self.wait_until(next_tick.unwrap_or(wake_at).min(wake_at).min(look_at));
            self.take_mail();
        }
    }

    fn end(mut self, deliver_within: Duration) -> anyhow::Result<()> {
        self.agent_errors.say_rest();
        let mut left = match self.publisher.stop(instant_now() + deliver_within) {
            Ok(()) => Unacknowledged::default(),
            Err(left) => left,
        };
        for (address, ticks) in self.schedule.left() {
            *left.per_address.entry(address.to_owned()).or_insert(0) += ticks;
        }
        let counters = &self.agent.counters;
        counters.set_ticks(self.schedule.ticks_due(), self.schedule.missed());
        counters.left.store(left.records(), Ordering::Relaxed);
        log::info!("stopped {}", counters.snapshot().since(&self.summarized));
        if !left.per_address.is_empty() {
            bail!("stopped, but Kafka never acknowledged {left}");
        }
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Drained {
    /// There is nothing more.
    Nothing,
    /// There is more.
    Some,
    /// There is more, but the publisher has no room for it.
    NoRoom,
}

/// A line that is written when something begins, and at most once a minute while it lasts.
#[derive(Default)]
struct OnceAMinute {
    not_before: i64,
}

impl OnceAMinute {
    fn is_due(&mut self, now: i64) -> bool {
        let is_due = now >= self.not_before;
        if is_due {
            self.not_before = now + micros(SUMMARY_EVERY);
        }
        is_due
    }
}

/// The checks that this machine failed to make, until they are logged: the first one at once, then a count a minute.
#[derive(Default)]
struct AgentErrors {
    count: u64,
    newest: String,
    line: OnceAMinute,
}

impl AgentErrors {
    fn add(&mut self, address: &str, error: &str) {
        self.count += 1;
        self.newest = format!("address={address:?} {error}");
    }

    fn say(&mut self, now: i64) {
        if self.count > 0 && self.line.is_due(now) {
            self.say_rest();
        }
    }

    fn say_rest(&mut self) {
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

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}
