//! Ticks that were not checked, and the reasons.

use std::sync::Arc;

use crate::check::target::Target;
use crate::produce::share::Share;

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

/// Why a tick was missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MissedReason {
    /// The host's previous check was still under way.
    Busy,
    /// The program did not run: no CPU time was left for it, a debugger stopped it, or the machine was suspended.
    Stalled,
    /// No producer of the group had the host's share at the time of the tick.
    Unattended,
    /// MAX_THREADS checks were under way until the host's next tick.
    NoThread,
    /// The buffer for records that Kafka has not acknowledged was full.
    NoRoom,
    /// Too many results waited until the earlier missed ticks of their hosts are written.
    Backlog,
    /// The host left the host file before a thread was free.
    Removed,
    /// The program stopped before the check could begin.
    Stopped,
    /// The check was under way when the program had to end.
    CutOff,
}

impl MissedReason {
    pub const ALL: [Self; 9] = [
        Self::Busy,
        Self::Stalled,
        Self::Unattended,
        Self::NoThread,
        Self::NoRoom,
        Self::Backlog,
        Self::Removed,
        Self::Stopped,
        Self::CutOff,
    ];

    /// The word in log lines and metrics.
    pub fn as_word(self) -> &'static str {
        match self {
            Self::Busy => "busy",
            Self::Stalled => "stalled",
            Self::Unattended => "unattended",
            Self::NoThread => "no_thread",
            Self::NoRoom => "no_room",
            Self::Backlog => "backlog",
            Self::Removed => "removed",
            Self::Stopped => "stopped",
            Self::CutOff => "cut_off",
        }
    }

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
