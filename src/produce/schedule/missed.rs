//! Ticks that were not checked, and the reasons.

use std::sync::Arc;

use crate::check::target::Target;
use crate::produce::share::Share;
use crate::words::words;

/// A tick without a result.
#[derive(Clone, Debug)]
pub struct MissedTick {
    pub target: Arc<Target>,
    /// As for [`Tick::share`].
    pub share: Option<Share>,
    pub scheduled_at_micros: i64,
    /// `None`: its check did not begin.
    pub started_at_micros: Option<i64>,
    pub reason: MissedReason,
}

words! {
    /// Why a tick was missed.
    MissedReason,
    /// The word in log lines and metrics.
    as_word:
    /// The host's previous check was still under way.
    Busy "busy",
    /// The program did not run: no CPU time was left for it, a debugger stopped it, or the machine was suspended.
    Stalled "stalled",
    /// No producer of the group had the host's share at the time of the tick.
    Unattended "unattended",
    /// MAX_THREADS checks were under way until the host's next tick.
    NoThread "no_thread",
    /// The buffer for records that Kafka has not acknowledged was full.
    NoRoom "no_room",
    /// Too many results waited for the records of their hosts' earlier missed ticks.
    Backlog "backlog",
    /// The host left the host file before a thread was free.
    Removed "removed",
    /// The program stopped before the check could begin.
    Stopped "stopped",
    /// The check was under way when the program had to end.
    CutOff "cut_off",
}

impl MissedReason {
    /// The record's `error`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Busy => "not checked: the previous check of this host was still under way",
            Self::Stalled => "not checked: the agent was stalled or suspended at that time",
            Self::Unattended => {
                "not checked: no producer of the group was responsible for the host at that time"
            }
            Self::NoThread => "not checked: MAX_THREADS checks were under way until the host's next tick",
            Self::NoRoom => {
                "not checked: Kafka had not taken earlier records and the agent's buffer for them was full"
            }
            Self::Backlog => "not checked: too many results waited for the records of earlier missed ticks",
            Self::Removed => {
                "not checked: the host left the host file while the check waited for a free thread"
            }
            Self::Stopped => "not checked: the agent was stopped before the check could begin",
            Self::CutOff => "cut off: the check was still under way when the agent had to stop",
        }
    }
}

/// The number of missed ticks for each reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MissedCounts(pub(super) [u64; MissedReason::ALL.len()]);

impl MissedCounts {
    pub fn count(&self, reason: MissedReason) -> u64 {
        self.0[reason as usize]
    }

    pub fn all(&self) -> u64 {
        self.0.iter().sum()
    }

    pub(super) fn add(&mut self, reason: MissedReason, ticks: i64) {
        self.0[reason as usize] += ticks.unsigned_abs();
    }
}
