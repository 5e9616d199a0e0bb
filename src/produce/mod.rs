//! The `produce` command: from the host file to acknowledged records.
//!
//! This file starts the parts. `timer` connects them: it begins checks, takes results and hands records to the publisher.
//! `host_file`, `schedule`, `outbox` and `share` are pure; `hosts` (files, Postgres), `pool` (threads), `publisher` and `fleet`
//! (Kafka) are the edges.

pub mod counters;
mod fleet;
pub mod host_file;
pub mod hosts;
mod mailbox;
mod metrics;
pub mod outbox;
pub mod own_network;
pub mod pool;
pub mod publisher;
mod result;
pub mod schedule;
mod setup;
pub mod share;
mod shared_hosts;
mod stop;
mod summary;
mod timer;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::check::http::Checks;
use crate::check::observation::Observation;
use crate::check::target::Target;
use crate::clock::Clock;
use crate::config::{GroupConfig, ProduceConfig};
use crate::http;
use crate::produce::counters::Counters;
use crate::produce::hosts::Sources;
use crate::produce::mailbox::Mailbox;
use crate::produce::metrics::Figures;
use crate::produce::own_network::OwnNetwork;
use crate::produce::pool::Pool;
use crate::produce::publisher::{Bounds, Publisher};
use crate::produce::result::CheckResult;
use crate::produce::schedule::{Limits, Schedule};
use crate::produce::shared_hosts::Joining;
use crate::produce::timer::{Ended, TimerLoop};
use crate::shutdown::Shutdown;
pub use schedule::Rounds;
pub use setup::Setup;

/// How long the end of `--once` may take. All records are acknowledged then, and only copies of failed checks may be left.
const COPIES_WITHIN: Duration = Duration::from_secs(5);

/// Checks `targets` and publishes one record per tick. `sources` is where they come from; their changes are followed.
///
/// METRICS_ADDR is served unless the run is [`Rounds::Once`], which may run beside an agent that uses the address.
pub fn run(
    config: &ProduceConfig,
    targets: Vec<Target>,
    sources: Sources,
    rounds: Rounds,
    shutdown: &Shutdown,
) -> anyhow::Result<()> {
    let counters = Arc::<Counters>::default();
    let figures = Figures {
        counters: Arc::clone(&counters),
        has_group: config.group.is_some(),
        max_threads: config.check.max_threads,
        max_records: Bounds::default().records,
    };
    let metrics_addr = config.metrics_addr.filter(|_| rounds == Rounds::Endless);
    let _endpoint = metrics_addr
        .map(|address| http::serve(address, figures))
        .transpose()?;
    run_counted(config, targets, sources, rounds, shutdown, counters)
}

/// The same as [`run`], for callers that read the counters. METRICS_ADDR is not served.
pub fn run_counted(
    config: &ProduceConfig,
    targets: Vec<Target>,
    sources: Sources,
    rounds: Rounds,
    shutdown: &Shutdown,
    counters: Arc<Counters>,
) -> anyhow::Result<()> {
    let checks = Checks::new(&config.check)?;
    let own_network = OwnNetwork::new(config.references.clone());
    let setup = Setup {
        config,
        sources,
        rounds,
        shutdown,
        counters,
        bounds: Bounds::default(),
    };
    setup.run(targets, move || {
        let (mut checker, own_network) = (checks.checker(), own_network.clone());
        move |target: &Target, deadline| own_network.check(target, || checker.check(target, deadline))
    })
}

impl Setup<'_> {
    /// Checks `targets` with the functions that `make_check` returns, one for each thread.
    pub fn run<C>(
        self,
        targets: Vec<Target>,
        make_check: impl Fn() -> C + Send + Sync + 'static,
    ) -> anyhow::Result<()>
    where
        C: FnMut(&Target, Instant) -> Observation + 'static,
    {
        self.log_start(targets.len());
        self.counters.hosts.store(targets.len(), Ordering::Relaxed);
        let clock = Clock::start()?;
        let mailbox = Arc::new(Mailbox::new(clock));
        let pool = self.start_pool(clock, &mailbox, make_check);
        let waker = Arc::clone(&mailbox);
        self.shutdown.on_request(move || waker.wake());

        let targets: Vec<Arc<Target>> = targets.into_iter().map(Arc::new).collect();
        let hosts = targets.iter().cloned().collect();
        let (joining, targets) = match self.group() {
            Some(_) => (Some(Joining::new(targets)), Vec::new()),
            None => (None, targets),
        };
        let membership = joining
            .as_ref()
            .and_then(|joining| joining.membership(self.config));
        let publisher = Publisher::start(
            self.config,
            self.bounds,
            Arc::clone(&self.counters.deliveries),
            membership,
        )?;
        let orders = Arc::clone(&mailbox);
        let shared_hosts = match joining {
            Some(joining) => {
                let readiness = Arc::clone(&self.counters.membership);
                joining.join(
                    self.config,
                    clock,
                    publisher.letter_box(),
                    readiness,
                    move |order| {
                        orders.put_order(order);
                    },
                )?
            }
            None => None,
        };
        let limits = Limits {
            max_under_way: self.config.check.max_threads,
            check_timeout: self.config.check.timeout,
        };
        let now = clock.now_micros();
        let schedule = Schedule::new(self.rounds, targets, limits, now);
        let mut timer = TimerLoop::new(self, hosts, schedule, shared_hosts, pool, publisher, mailbox)?;
        match timer.run() {
            Ended::StopRequested(at) => timer.stop(at),
            Ended::Once => timer.end(COPIES_WITHIN),
        }
    }

    /// PRODUCE_GROUP. A run of [`Rounds::Once`] checks all hosts itself.
    fn group(&self) -> Option<&GroupConfig> {
        let group = self.config.group.as_ref();
        group.filter(|_| self.rounds == Rounds::Endless)
    }

    fn log_start(&self, hosts: usize) {
        log::info!(
            "produce hosts={hosts} kafka={} topic={} group={} max_threads={}",
            self.config.kafka.bootstrap_servers,
            self.config.topic,
            self.group().map_or("none", |group| group.name.as_str()),
            self.config.check.max_threads,
        );
    }

    fn start_pool<C>(
        &self,
        clock: Clock,
        mailbox: &Arc<Mailbox>,
        make_check: impl Fn() -> C + Send + Sync + 'static,
    ) -> Pool
    where
        C: FnMut(&Target, Instant) -> Observation + 'static,
    {
        let check = &self.config.check;
        let (agent_name, results) = (check.agent_name.clone(), Arc::clone(mailbox));
        Pool::new(clock, check.timeout, make_check, move |done| {
            results.put_result(CheckResult::of(done, clock.now_micros(), &agent_name));
        })
    }
}
