//! `agent_offline`: whether a failed check is the fault of our own network (REFERENCE_HOSTS).
//!
//! `judge` and `routes` are pure: they decide. `ask` sends the questions. This file connects them with the checks: a failed check
//! waits here, on its own thread, until the cause is known.

mod ask;
pub mod judge;
pub mod routes;

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::check::observation::Observation;
use crate::check::target::Target;
use crate::clock::instant_now;
use crate::config::References;
use crate::duration;
use crate::lock::lock;
use crate::sample::Outcome;
use crate::thread::start_thread;
use judge::{Answer, Decision, Failure, Judge, Reference, Reply, could_be_ours};

/// How long a reference may take for its answer, and how long all answers are waited for: a check must not end much later
/// because of them.
const ANSWER_WITHIN: Duration = Duration::from_millis(900);
const WAIT_FOR_ANSWERS: Duration = Duration::from_secs(1);

const LOG_EVERY_MICROS: i64 = 60_000_000;

/// Shared by all threads that check.
#[derive(Clone)]
pub struct OwnNetwork(Option<Arc<Shared>>);

struct Shared {
    started_at: Instant,
    judge: Mutex<Judge>,
    changed: Condvar,
    /// References that are being asked. The lookup of a name may take longer than the answer is waited for, and must not be
    /// repeated meanwhile.
    busy: Mutex<HashSet<Reference>>,
    /// When the next log line may be written.
    log_from: Mutex<i64>,
}

impl OwnNetwork {
    pub fn new(references: References) -> Self {
        if references == References::Off {
            return Self(None);
        }
        let mut judge = Judge::new(references);
        judge.saw(&ask::routes());
        Self(Some(Arc::new(Shared {
            started_at: instant_now(),
            judge: Mutex::new(judge),
            changed: Condvar::new(),
            busy: Mutex::default(),
            log_from: Mutex::default(),
        })))
    }

    /// Makes a check. If it fails because of our own network, its outcome is `agent_offline`.
    pub fn check(&self, target: &Target, check: impl FnOnce() -> Observation) -> Observation {
        let Some(shared) = &self.0 else {
            return check();
        };
        let started_at = shared.now();
        let observation = check();
        let has_answered = observation.status_code.is_some();
        if let Some(ip) = observation.ip.filter(|_| has_answered) {
            shared.reached(ip, observation.phases.dns.is_some());
        }
        if !could_be_ours(observation.outcome) {
            return observation;
        }
        let is_dns = matches!(observation.outcome, Outcome::DnsTimeout | Outcome::DnsError);
        // The lookup that a check waits for may have begun while our network was down.
        let lookup_began_at = observation.lookup_began_at.filter(|_| is_dns);
        let began_at = lookup_began_at.map_or(started_at, |at| shared.micros_at(at).min(started_at));
        let literal = || target.url.host_str()?.trim_matches(['[', ']']).parse().ok();
        let failure = Failure {
            started_at: began_at,
            ended_at: shared.now(),
            ip: observation.ip.or_else(literal),
            is_dns,
        };
        if !shared.find_out_if_ours(&failure) {
            return observation;
        }
        let error = observation.error.as_deref().unwrap_or_default();
        shared.log(&target.address, error);
        Observation {
            error: Some(format!("{}: {error}", observation.outcome.as_str())),
            outcome: Outcome::AgentOffline,
            ..observation
        }
    }
}

impl Shared {
    fn now(&self) -> i64 {
        self.micros_at(instant_now())
    }

    fn micros_at(&self, at: Instant) -> i64 {
        duration::micros(at.saturating_duration_since(self.started_at))
    }

    fn reached(self: &Arc<Self>, ip: IpAddr, by_name: bool) {
        let now = self.now();
        let mut judge = self.judge();
        judge.reached(now, ip, by_name, ask::routes);
        let learns = (by_name || !ip.is_loopback()) && judge.should_learn(now);
        drop(judge);
        if learns {
            let shared = Arc::clone(self);
            let spawned = start_thread("reference", move || shared.ask_all());
            if spawned.is_err() {
                self.take_answers(Vec::new());
            }
        }
    }

    /// Waits until the cause is known.
    fn find_out_if_ours(self: &Arc<Self>, failure: &Failure) -> bool {
        let routes = ask::routes();
        let mut judge = self.judge();
        loop {
            let now = self.now();
            match judge.decide(now, failure, &routes) {
                Decision::Host => return false,
                Decision::Ours => return true,
                Decision::Ask => {
                    drop(judge);
                    self.ask_all();
                    judge = self.judge();
                }
                Decision::Wait(until) => {
                    let longest = until.map_or(WAIT_FOR_ANSWERS, |until| {
                        Duration::from_micros((until - now).max(1).unsigned_abs())
                    });
                    let waited = self.changed.wait_timeout(judge, longest);
                    judge = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }

    fn ask_all(self: &Arc<Self>) {
        let routes = ask::routes();
        let references = {
            let mut judge = self.judge();
            judge.saw(&routes);
            judge.references(&routes, &ask::name_servers())
        };
        let (deadline, wait_until) = (instant_now() + ANSWER_WITHIN, instant_now() + WAIT_FOR_ANSWERS);
        let (send, answers) = channel();
        for reference in &references {
            if !lock(&self.busy).insert(reference.clone()) {
                continue;
            }
            let (shared, send, asked) = (Arc::clone(self), send.clone(), reference.clone());
            let spawned = start_thread("reference", move || {
                let answer = ask::ask(asked.clone(), deadline);
                lock(&shared.busy).remove(&asked);
                // Late answers are not waited for.
                let _ = send.send(answer);
            });
            if spawned.is_err() {
                lock(&self.busy).remove(reference);
            }
        }
        drop(send);
        let mut found = Vec::new();
        while let Ok(answer) = answers.recv_timeout(wait_until.saturating_duration_since(instant_now())) {
            found.push(answer);
        }
        for reference in references {
            if !found.iter().any(|answer| answer.reference == reference) {
                found.push(Answer {
                    reference,
                    ip: None,
                    reply: Reply::Nothing,
                });
            }
        }
        self.take_answers(found);
    }

    fn take_answers(&self, answers: Vec<Answer>) {
        let mut judge = self.judge();
        let now = self.now();
        judge.answered(now, answers);
        drop(judge);
        self.changed.notify_all();
    }

    /// At most once a minute.
    fn log(&self, address: &str, error: &str) {
        let now = self.now();
        let mut log_from = lock(&self.log_from);
        if now >= *log_from {
            *log_from = now + LOG_EVERY_MICROS;
            log::warn!(
                "agent_offline address={address:?} {error}: no reference host answers (REFERENCE_HOSTS), so the network of this \
                 machine is down, and the state of the host is unknown"
            );
        }
    }

    fn judge(&self) -> MutexGuard<'_, Judge> {
        lock(&self.judge)
    }
}
