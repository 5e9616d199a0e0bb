//! What happens to the shares of a member, and what the member does next: the input and the output of [`super::shares`].

use std::collections::BTreeMap;

use crate::produce::share::Share;
use crate::produce::share::ledger::Ledger;
use crate::produce::share::tail::{Tail, Takeover};
use crate::sample::epoch::Epoch;

/// The ledger that the group has committed for a share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoredLedger {
    Ledger(Ledger),
    /// The group has no offset for the partition, which contains the offsets from `low` up to, but not including, `high`. The
    /// hosts are divided by `partitions`: the number in the ledgers of other shares, or else that of the topic.
    Missing {
        low: i64,
        high: i64,
        partitions: i32,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommitOutcome {
    Done,
    /// The coordinator refused it, because we are not a member, or one of an earlier generation.
    Refused,
    /// It is not known whether it took place.
    Failed,
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// The group assigned these to us, in addition to those that we have.
    Assigned(Vec<Share>),
    /// The group wants these back, and waits for [`Action::GiveBack`].
    Revoked(Vec<Share>),
    /// We are no longer a member. Other producers may own these already.
    Lost(Vec<Share>),
    /// The answer to [`Action::ReadLedgers`], without the shares for which it failed.
    Ledgers(BTreeMap<Share, StoredLedger>),
    /// The answer to [`Action::ReadTail`]. `None`: it failed.
    TailRead {
        share: Share,
        epoch: Epoch,
        tail: Option<Tail>,
    },
    /// The answer to [`Action::Commit`].
    Committed(CommitOutcome),
    /// The answer to [`Action::Claim`]: the offset of the claim, or why it was not appended.
    Claimed {
        share: Share,
        epoch: Epoch,
        offset: Result<i64, String>,
    },
    /// How far a share is recorded.
    Progress { share: Share, ledger: Ledger },
    /// The answer to [`Action::Release`]: the last ledger. Nothing more is written.
    Released { share: Share, ledger: Ledger },
    /// Records on their way to Kafka may or may not be stored, or the process was suspended and other producers may have had the
    /// shares. A new claim shows it.
    InDoubt(Vec<Share>),
    /// Give everything back by this time.
    Stop { until: i64 },
}

/// A part of a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    pub share: Share,
    pub from: i64,
    /// The offset after the last one.
    pub to: i64,
    /// The highest epoch before `from`.
    pub epoch_at_from: Epoch,
    /// Our epoch, for the answer. Zero: we have none yet.
    pub epoch: Epoch,
}

/// What to do next.
#[derive(Clone, Debug)]
pub enum Action {
    /// Ask Kafka for the group's committed offsets.
    ReadLedgers(Vec<Share>),
    /// Read this part of a partition into a [`Tail`].
    ReadTail(Range),
    /// Commit these as a member of the group, in one request. There is one request at a time.
    Commit(Vec<(Share, Ledger)>),
    /// Append a claim to the partition, after everything that was sent to it before.
    Claim { share: Share, epoch: Epoch },
    /// Stop sending records of this share, but go on checking its hosts and keep the records.
    Hold(Share),
    /// We own the share: check its hosts and send their records with this epoch.
    Take(Takeover),
    /// Begin no more checks of this share, finish those under way, and report [`Event::Released`].
    Release(Share),
    /// Another producer owns the share: forget its hosts and their records.
    Forget(Share),
    /// At a stop: the share can no longer be given back. Forget its hosts; their records stay unacknowledged.
    Abandon(Share),
    /// Tell the group that the shares that it wants back are free.
    GiveBack,
    /// Leave the group. No action follows.
    Leave,
    /// Nothing to do until then (`None`: for ever), unless something happens.
    Wait { until: Option<i64> },
}
