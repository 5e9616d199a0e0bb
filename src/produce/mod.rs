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
pub mod share;
mod shared_hosts;
mod stop;
mod summary;
mod timer;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use crate::check::http::Checks;
use crate::check::observation::Observation;
use crate::check::target::Target;
use crate::clock::Clock;
use crate::config::{GroupConfig, ProduceConfig};
use crate::http;
use crate::produce::counters::Counters;
use crate::produce::fleet::Partitions;
use crate::produce::hosts::Sources;
use crate::produce::mailbox::{Mail, Mailbox};
use crate::produce::metrics::Figures;
use crate::produce::own_network::OwnNetwork;
use crate::produce::pool::Pool;
use crate::produce::publisher::{Bounds, Membership, Publisher};
use crate::produce::result::CheckResult;
use crate::produce::schedule::{Limits, Schedule};
use crate::produce::shared_hosts::SharedHosts;
use crate::produce::timer::{Ended, TimerLoop};
use crate::shutdown::Shutdown;
pub use schedule::Rounds;
pub use timer::Setup;

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
        let check = &self.config.check;
        let (agent_name, results) = (check.agent_name.clone(), Arc::clone(&mailbox));
        let pool = Pool::new(clock, check.timeout, make_check, move |done| {
            let result = CheckResult::of(done, clock.now_micros(), &agent_name);
            results.put(Mail::Result(result));
        });
        let waker = Arc::clone(&mailbox);
        self.shutdown.on_request(move || waker.wake());

        let targets: Vec<Arc<Target>> = targets.into_iter().map(Arc::new).collect();
        let hosts = targets.iter().cloned().collect();
        let group = self.group();
        let (events, heard) = channel();
        let membership = group.map(|group| Membership {
            group: group.name.clone(),
            place: check.agent_name.clone(),
            events: events.clone(),
        });
        let deliveries = Arc::clone(&self.counters.deliveries);
        let publisher = Publisher::start(self.config, self.bounds, deliveries, membership)?;
        let (targets, shared_hosts) = match group {
            None => (targets, None),
            // The schedule gets the hosts of a share when the group gives it to us.
            Some(group) => {
                let settings = fleet::Settings {
                    kafka: &self.config.kafka,
                    group,
                    place: &check.agent_name,
                    partitions: &Partitions::default(),
                    clock,
                    readiness: &self.counters.membership,
                };
                let orders = Arc::clone(&mailbox);
                let shared_hosts = SharedHosts::join(
                    &settings,
                    &self.config.topic,
                    targets.into_iter().collect(),
                    (events, heard),
                    publisher.letter_box(),
                    move |order| orders.put(Mail::Order(order)),
                )?;
                (Vec::new(), Some(shared_hosts))
            }
        };
        let limits = Limits {
            max_under_way: check.max_threads,
            check_timeout: check.timeout,
        };
        let schedule = Schedule::new(self.rounds, targets, limits, clock.now_micros());
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
}
