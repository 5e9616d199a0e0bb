//! The `produce` agent: from the host file to acknowledged records.
//!
//! `host_file`, `target`, `schedule` and `outcome` are pure; `check` (HTTP), `pool` (threads), `publisher` (Kafka) and
//! `clock` are the edges. This file owns the run: it lets the timer loop, the pool and the publisher meet, and nothing else.

pub mod counters;
pub mod host_file;
mod metrics;
pub mod pool;
pub mod publisher;
pub mod schedule;

use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::bail;

use crate::check::http::Checks;
use crate::check::observation::{Observation, Stamp, stamp};
use crate::check::target::Target;
use crate::clock::{Clock, instant_now, timestamp};
use crate::config::ProduceConfig;
use crate::http::Endpoint;
use crate::http::health;
use crate::produce::counters::{Counters, Snapshot, Timing};
use crate::produce::host_file::{HostFileError, Hosts};
use crate::produce::metrics::Figures;
use crate::produce::pool::{Done, Pool};
use crate::produce::publisher::{Bounds, END_WITHIN, Publisher, Record, Unacknowledged};
use crate::produce::schedule::{Late, Limits, Missed, MissedTick, Next, Schedule, Tick, Why};
use crate::sample;
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

/// Results wait for the timer loop's next turn if that is no further off: from 50 checks a second on nothing but the
/// ticks wakes it. Their records then wait four times as long for others, in `publisher`.
const RESULTS_WAIT: Duration = Duration::from_millis(20);

/// A wait does not count the time for which the machine was suspended; the ticks after that must not be late for it.
const LOOK_AT_CLOCK_EVERY: Duration = Duration::from_millis(250);

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
        let publisher = Publisher::start(kafka, topic, self.bounds, deliveries)?;
        log::info!(
            "produce hosts={} kafka={} topic={topic} max_threads={}",
            targets.len(),
            kafka.bootstrap_servers,
            check.max_threads,
        );
        self.counters.hosts.store(targets.len(), Ordering::Relaxed);
        let now = clock.now_micros();
        let schedule = match self.rounds {
            Rounds::Once => Schedule::once(targets, limits, now),
            Rounds::Endless => Schedule::endless(targets, limits, now),
        };
        let run = Run {
            schedule,
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
            self.wait_until(next_tick.map_or(wake_at, |tick| tick.min(wake_at)));
        }
    }

    /// Begins every check that is due; returns the next tick to come.
    fn start_due(&mut self) -> Option<i64> {
        loop {
            let publisher = &self.publisher;
            let now = self.clock.now_micros();
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
        let (results, reloaded) = self.mailbox.take();
        for result in results {
            self.take_result(result);
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
                self.schedule.reload(targets, self.clock.now_micros());
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
        self.schedule.stop(from);
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

/// A finished check, ready to be written.
struct CheckResult {
    tick: Tick,
    outcome: Outcome,
    /// What went wrong on this machine.
    agent_error: Option<String>,
    /// `None`: it did not begin.
    timing: Option<Timing>,
    record: Record,
}

impl CheckResult {
    fn of(done: Done, ended_at_micros: i64, agent_name: &str) -> Self {
        let Done {
            tick,
            started_at_micros,
            observation,
        } = done;
        Self {
            outcome: observation.outcome,
            agent_error: agent_error(&observation),
            timing: Some(Timing {
                late_micros: started_at_micros - tick.scheduled_at_micros,
                took: Duration::from_micros(u64::try_from(ended_at_micros - started_at_micros).unwrap_or(0)),
                phases: observation.phases,
            }),
            record: record(
                &tick.target,
                observation,
                tick.scheduled_at_micros,
                Some(started_at_micros),
                agent_name,
            ),
            tick,
        }
    }

    fn not_begun(tick: Tick, fault: Observation, agent_name: &str) -> Self {
        Self {
            outcome: fault.outcome,
            agent_error: agent_error(&fault),
            timing: None,
            record: record(&tick.target, fault, tick.scheduled_at_micros, None, agent_name),
            tick,
        }
    }
}

fn agent_error(observation: &Observation) -> Option<String> {
    let error = observation.error.as_deref().unwrap_or("unknown");
    (observation.outcome == Outcome::AgentError).then(|| error.to_owned())
}

fn missed_record(missed: MissedTick, agent_name: &str) -> Record {
    let MissedTick {
        target,
        scheduled_at_micros,
        started_at_micros,
        why,
    } = missed;
    let observation = Observation::failed(Outcome::Missed, why.as_str());
    record(
        &target,
        observation,
        scheduled_at_micros,
        started_at_micros,
        agent_name,
    )
}

fn record(
    target: &Arc<Target>,
    observation: Observation,
    scheduled_at_micros: i64,
    started_at_micros: Option<i64>,
    agent_name: &str,
) -> Record {
    let when = Stamp {
        scheduled_at: timestamp(scheduled_at_micros),
        started_at: started_at_micros.map(timestamp),
        interval: Some(target.interval),
        agent: agent_name,
    };
    let mut value = Vec::with_capacity(1_024);
    sample::encode(&stamp(target, observation, when), &mut value);
    value.shrink_to_fit();
    Record {
        target: Arc::clone(target),
        value,
    }
}

/// Where the timer loop waits, and where others leave what it should know. Holds at most a result for each check under way.
struct Mailbox {
    clock: Clock,
    mail: Mutex<Mail>,
    changed: Condvar,
}

#[derive(Default)]
struct Mail {
    results: Vec<CheckResult>,
    reloaded: Option<Result<Hosts, HostFileError>>,
    is_urgent: bool,
    /// Ticks wait for a thread that a result sets free.
    results_are_urgent: bool,
    /// When the loop, if it waits, will look by itself.
    wakes_at: i64,
}

impl Mailbox {
    fn new(clock: Clock) -> Self {
        Self {
            clock,
            mail: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn put_result(&self, result: CheckResult) {
        let mut mail = self.mail();
        mail.results.push(result);
        if self.must_look(&mail) {
            self.changed.notify_one();
        }
    }

    fn put_reloaded(&self, reloaded: Result<Hosts, HostFileError>) {
        self.mail().reloaded = Some(reloaded);
        self.wake();
    }

    fn wake(&self) {
        self.mail().is_urgent = true;
        self.changed.notify_one();
    }

    /// Waits, at the longest until then.
    fn wait_until(&self, wakes_at: i64, results_are_urgent: bool) {
        let mut mail = self.mail();
        mail.wakes_at = wakes_at;
        mail.results_are_urgent = results_are_urgent;
        while !self.must_look(&mail) {
            let left = self.clock.until(wakes_at);
            if left.is_zero() {
                return;
            }
            let waited = self.changed.wait_timeout(mail, left.min(LOOK_AT_CLOCK_EVERY));
            mail = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn must_look(&self, mail: &Mail) -> bool {
        let looks_soon = || mail.wakes_at - self.clock.now_micros() <= micros(RESULTS_WAIT);
        let results_wait = mail.results.is_empty() || (!mail.results_are_urgent && looks_soon());
        mail.is_urgent || !results_wait
    }

    fn take(&self) -> (Vec<CheckResult>, Option<Result<Hosts, HostFileError>>) {
        let mut mail = self.mail();
        mail.is_urgent = false;
        (std::mem::take(&mut mail.results), mail.reloaded.take())
    }

    fn mail(&self) -> MutexGuard<'_, Mail> {
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}
