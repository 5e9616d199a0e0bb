//! Turns a finished check or a missed tick into a record.

use std::sync::Arc;
use std::time::Duration;

use crate::check::observation::{Observation, Stamp, stamp};
use crate::check::target::Target;
use crate::clock::timestamp;
use crate::produce::counters::Timing;
use crate::produce::pool::Done;
use crate::produce::publisher::Record;
use crate::produce::schedule::{MissedTick, Tick};
use crate::produce::share::Share;
use crate::sample::{self, Outcome};

/// A check that ended or could not begin, with its record.
pub(super) struct CheckResult {
    pub(super) tick: Tick,
    pub(super) outcome: Outcome,
    /// The cause, if the outcome is `agent_error`.
    pub(super) agent_error: Option<String>,
    /// `None`: the check did not begin.
    pub(super) timing: Option<Timing>,
    pub(super) record: Record,
}

impl CheckResult {
    pub(super) fn of(done: Done, ended_at_micros: i64, agent_name: &str) -> Self {
        let took = ended_at_micros - done.started_at_micros;
        let timing = Timing {
            late_micros: done.started_at_micros - done.tick.scheduled_at_micros,
            took: Duration::from_micros(u64::try_from(took).unwrap_or(0)),
            phases: done.observation.phases,
        };
        let started_at = Some(done.started_at_micros);
        Self {
            timing: Some(timing),
            ..Self::new(done.tick, done.observation, started_at, agent_name)
        }
    }

    /// Without a timing.
    pub(super) fn new(
        tick: Tick,
        observation: Observation,
        started_at_micros: Option<i64>,
        agent_name: &str,
    ) -> Self {
        Self {
            outcome: observation.outcome,
            agent_error: agent_error(&observation),
            timing: None,
            record: record(
                &tick.target,
                tick.share.clone(),
                observation,
                tick.scheduled_at_micros,
                started_at_micros,
                agent_name,
            ),
            tick,
        }
    }
}

fn agent_error(observation: &Observation) -> Option<String> {
    let error = observation.error.as_deref().unwrap_or("unknown");
    (observation.outcome == Outcome::AgentError).then(|| error.to_owned())
}

pub(super) fn missed_record(missed: MissedTick, agent_name: &str) -> Record {
    let MissedTick {
        target,
        share,
        scheduled_at_micros,
        started_at_micros,
        reason,
    } = missed;
    let observation = Observation::failed(Outcome::Missed, reason.as_str());
    record(
        &target,
        share,
        observation,
        scheduled_at_micros,
        started_at_micros,
        agent_name,
    )
}

fn record(
    target: &Arc<Target>,
    share: Option<Share>,
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
    let is_failed_check = observation.outcome.is_failed_check();
    let mut value = Vec::with_capacity(1_024);
    sample::encode(&stamp(target, observation, when), &mut value);
    value.shrink_to_fit();
    Record::new(
        Arc::clone(target),
        share,
        scheduled_at_micros,
        value,
        is_failed_check,
    )
}
