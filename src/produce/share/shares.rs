//! The state machine of a group member: what it does next with which share.
//!
//! Owns the order of the protocol's steps (see [`super`]), and how a share is given back. The edges and the simulator of the tests
//! report what happened ([`Shares::handle`]) and do what [`Shares::next_action`] says. `now` is Unix time in microseconds.
//!
//! After any failure, including a refused commit, a share starts again at its ledger. So every share that the group assigned to
//! us is owned, or on its way to be.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::produce::share::Share;
use crate::produce::share::events::{Action, CommitOutcome, Event, Range, StoredLedger};
use crate::produce::share::ledger::Ledger;
use crate::produce::share::tail::{Tail, Takeover};
use crate::sample::epoch::Epoch;

/// The wait before a failed step is tried again.
const RETRY_MICROS: i64 = 500_000;

/// The wait after a claim was not appended, for example because the topic is missing. Every attempt uses an epoch, and epochs must
/// not grow by more than one a second: see `Shares::tail_read`.
const CLAIM_AGAIN_MICROS: i64 = 2_000_000;

/// How long giving back a share may take: the checks under way end, and Kafka acknowledges their records. The group waits
/// meanwhile.
const RELEASE_WITHIN_MICROS: i64 = 2_000_000;

/// How long an owner goes on checking after the group has asked for a share. The next owner could not take it earlier, because
/// librdkafka leaves a second between two requests to join.
const KEEP_MICROS: i64 = 1_000_000;

/// If a share has no ledger, its hosts continue from what this many records at the end of the partition say.
const RECORDS_WITHOUT_LEDGER: i64 = 10_000;

/// How far we are with taking or giving back a share.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Stage {
    /// We lost the membership. We go on checking the hosts, in case the group assigns the share to us again.
    Shadow,
    /// Its ledger has to be read.
    ToRead,
    Reading,
    /// Our epoch has to be committed.
    ToCommitEpoch(Ledger),
    CommittingEpoch(Ledger),
    ToClaim(Ledger),
    Claiming(Ledger),
    /// The partition has to be read up to our claim, which has this offset. With epoch zero the share has no ledger and no claim yet, and
    /// the end of the partition has to be read.
    ToCatchUp(Ledger, i64),
    CatchingUp(Ledger, i64),
    Owned,
    /// The group wants it back. The checks under way may go on until then.
    Releasing {
        until: i64,
    },
    /// Everything is acknowledged, and the last ledger has to be committed by this time.
    ToClose {
        ledger: Ledger,
        until: i64,
    },
}

impl Stage {
    /// What the share waits for until we own it, in words. `None`: it is not being taken.
    fn waits_for(&self) -> Option<&'static str> {
        Some(match self {
            Self::ToRead | Self::Reading => "for its ledger",
            Self::ToCommitEpoch(_) | Self::CommittingEpoch(_) => "for the commit of its epoch",
            Self::ToClaim(_) | Self::Claiming(_) => "until Kafka acknowledges its claim",
            Self::ToCatchUp(ledger, _) | Self::CatchingUp(ledger, _) => match ledger.epoch {
                0 => "for the end of the partition, because it has no ledger",
                _ => "for the records up to its claim",
            },
            Self::Shadow | Self::Owned | Self::Releasing { .. } | Self::ToClose { .. } => return None,
        })
    }
}

/// One share at this member.
#[derive(Clone, Debug)]
struct Tenure {
    stage: Stage,
    /// The epoch under which we own it or last owned it, as long as we check its hosts.
    epoch: Option<Epoch>,
    /// The epoch that we committed last, once we have owned the share and while no other producer can have committed a ledger since. All
    /// claims since then are ours.
    own_committed_epoch: Option<Epoch>,
    committed: Option<Ledger>,
    /// A later ledger, to be committed next.
    progress: Option<Ledger>,
    not_before: i64,
    /// The group wants it back, and it is released at this time.
    release_at: Option<i64>,
}

impl Tenure {
    fn begin_again(&mut self, not_before: i64) {
        self.stage = Stage::ToRead;
        self.progress = None;
        self.not_before = not_before;
    }

    /// Whether no other producer has owned the share since we last did: there is no later claim, or only claims of
    /// our own attempts that failed.
    fn is_unbroken(&self, tail: &Tail) -> bool {
        self.epoch.is_some_and(|ours| {
            tail.epoch() == ours || (self.own_committed_epoch.is_some() && tail.written_epoch() <= ours)
        })
    }

    fn is_ours(&self) -> bool {
        self.stage != Stage::Shadow
    }
}

/// All shares of a member.
#[derive(Clone, Debug, Default)]
pub struct Shares {
    tenures: BTreeMap<Share, Tenure>,
    /// Actions for the next calls of [`Shares::next_action`].
    decided: VecDeque<Action>,
    /// Shares that the group wants back and that are not free yet.
    revoking: BTreeSet<Share>,
    committing: Vec<(Share, Ledger)>,
    /// All shares have to be given back by this time.
    stops_at: Option<i64>,
    has_left: bool,
}

impl Shares {
    /// Tells the machine what happened.
    pub fn handle(&mut self, now: i64, event: Event) {
        match event {
            Event::Assigned(shares) => self.assigned(now, shares),
            Event::Revoked(shares) => self.revoked(now, &shares),
            Event::Lost(shares) => self.lost(&shares),
            Event::Ledgers(found) => self.ledgers(now, &found),
            Event::TailRead { share, epoch, tail } => self.tail_read(now, share, epoch, tail),
            Event::Committed(outcome) => self.committed(now, outcome),
            Event::Claimed { share, epoch, offset } => self.claimed(now, &share, epoch, offset.ok()),
            Event::Progress { share, ledger } => {
                if let Some(tenure) = self.tenures.get_mut(&share)
                    && tenure.stage == Stage::Owned
                    && tenure.epoch == Some(ledger.epoch)
                {
                    tenure.progress = Some(ledger);
                }
            }
            Event::Released { share, ledger } => {
                if let Some(tenure) = self.tenures.get_mut(&share)
                    && let Stage::Releasing { until } = tenure.stage
                    && tenure.epoch == Some(ledger.epoch)
                {
                    tenure.stage = Stage::ToClose { ledger, until };
                    tenure.not_before = now;
                }
            }
            Event::InDoubt(shares) => self.doubt(now, shares),
            Event::Stop { until } => self.stop(until),
        }
    }

    /// What to do next. Every action except [`Action::Wait`] is returned once, and the machine assumes that it begins.
    pub fn next_action(&mut self, now: i64) -> Action {
        self.end_overdue(now);
        self.release_due(now);
        if let Some(action) = self.decided.pop_front() {
            return action;
        }
        if self.stops_at.is_some() && self.tenures.is_empty() {
            if self.has_left {
                return Action::Wait { until: None };
            }
            self.has_left = true;
            return Action::Leave;
        }
        self.read_ledgers(now)
            .or_else(|| self.commit(now))
            .or_else(|| self.claim_or_read(now))
            .unwrap_or_else(|| self.wait(now))
    }

    /// The number of shares that we own and that nobody wants back, and of those that the group assigned to us.
    pub fn owned_of(&self) -> (usize, usize) {
        let ours = self.tenures.values().filter(|tenure| tenure.is_ours());
        (self.owned().count(), ours.count())
    }

    /// The shares that we own and that nobody wants back.
    pub fn owned(&self) -> impl Iterator<Item = &Share> {
        let is_owned = |tenure: &Tenure| tenure.stage == Stage::Owned && tenure.release_at.is_none();
        let owned = self.tenures.iter().filter(move |(_, tenure)| is_owned(tenure));
        owned.map(|(share, _)| share)
    }

    /// The shares that are being taken, each with what it waits for, in words.
    pub fn untaken(&self) -> impl Iterator<Item = (&Share, &'static str)> {
        self.tenures
            .iter()
            .filter_map(|(share, tenure)| Some((share, tenure.stage.waits_for()?)))
    }

    /// Whether [`Action::Leave`] was returned.
    pub fn has_left(&self) -> bool {
        self.has_left
    }

    /// All shares that this member has or gives back.
    pub fn all(&self) -> Vec<Share> {
        self.tenures.keys().cloned().collect()
    }

    // What to do next.

    fn read_ledgers(&mut self, now: i64) -> Option<Action> {
        let mut shares = Vec::new();
        for (share, tenure) in &mut self.tenures {
            if tenure.stage == Stage::ToRead && tenure.not_before <= now {
                tenure.stage = Stage::Reading;
                shares.push(share.clone());
            }
        }
        (!shares.is_empty()).then_some(Action::ReadLedgers(shares))
    }

    fn commit(&mut self, now: i64) -> Option<Action> {
        if !self.committing.is_empty() {
            return None;
        }
        for (share, tenure) in &mut self.tenures {
            if tenure.not_before > now {
                continue;
            }
            let ledger = match &tenure.stage {
                Stage::ToCommitEpoch(ledger) => {
                    let ledger = *ledger;
                    tenure.stage = Stage::CommittingEpoch(ledger);
                    Some(ledger)
                }
                Stage::ToClose { ledger, .. } => Some(*ledger),
                Stage::Owned => tenure
                    .progress
                    .take()
                    .filter(|ledger| Some(*ledger) != tenure.committed),
                _ => None,
            };
            self.committing
                .extend(ledger.map(|ledger| (share.clone(), ledger)));
        }
        (!self.committing.is_empty()).then(|| Action::Commit(self.committing.clone()))
    }

    fn claim_or_read(&mut self, now: i64) -> Option<Action> {
        let due = self
            .tenures
            .iter_mut()
            .filter(|(_, tenure)| tenure.not_before <= now);
        for (share, tenure) in due {
            match tenure.stage {
                Stage::ToClaim(ledger) => {
                    tenure.stage = Stage::Claiming(ledger);
                    return Some(Action::Claim {
                        share: share.clone(),
                        epoch: ledger.epoch,
                    });
                }
                Stage::ToCatchUp(ledger, claim) => {
                    tenure.stage = Stage::CatchingUp(ledger, claim);
                    return Some(Action::ReadTail(Range {
                        share: share.clone(),
                        from: ledger.from,
                        to: claim,
                        epoch_at_from: ledger.epoch_at_from,
                        epoch: ledger.epoch,
                    }));
                }
                _ => {}
            }
        }
        None
    }

    fn wait(&self, now: i64) -> Action {
        let until = self.tenures.values().filter_map(|tenure| match tenure.stage {
            Stage::Releasing { until } => Some(until),
            Stage::ToClose { until, .. } => Some(until.min(tenure.not_before.max(now))),
            _ => tenure
                .release_at
                .or(Some(tenure.not_before).filter(|at| *at > now)),
        });
        let until = until.chain(self.stops_at.filter(|at| *at > now));
        Action::Wait { until: until.min() }
    }

    // What happened.

    fn assigned(&mut self, now: i64, shares: Vec<Share>) {
        for share in shares {
            if self.stops_at.is_some() {
                continue;
            }
            self.take_anew(now, &share);
            self.tenures.entry(share).or_insert(Tenure {
                stage: Stage::ToRead,
                epoch: None,
                own_committed_epoch: None,
                committed: None,
                progress: None,
                not_before: now,
                release_at: None,
            });
        }
        // The group has assigned the shares that it does not name here to other members.
        for share in self.select(|tenure| !tenure.is_ours()) {
            self.forget(&share);
        }
    }

    fn revoked(&mut self, now: i64, shares: &[Share]) {
        self.revoking.extend(shares.iter().cloned());
        for share in shares {
            let Some(tenure) = self.tenures.get_mut(share) else {
                self.mark_free(share);
                continue;
            };
            if let Stage::Releasing { .. } | Stage::ToClose { .. } = tenure.stage {
                continue;
            }
            if tenure.stage == Stage::Owned {
                tenure.release_at.get_or_insert(now + KEEP_MICROS);
            } else {
                self.forget(share);
            }
        }
        if shares.is_empty() && self.revoking.is_empty() {
            self.decided.push_back(Action::GiveBack);
        }
    }

    fn stop(&mut self, until: i64) {
        self.stops_at = Some(until);
        for share in &self.all() {
            let Some(tenure) = self.tenures.get(share) else {
                continue;
            };
            match tenure.stage {
                Stage::Releasing { .. } | Stage::ToClose { .. } => {}
                Stage::Owned => self.release(share, until),
                // We keep records of its hosts. They are sent as soon as we own it again.
                _ if tenure.is_ours() && tenure.epoch.is_some() => {}
                _ => self.abandon(share),
            }
        }
    }

    fn release_due(&mut self, now: i64) {
        let is_due =
            |tenure: &Tenure| tenure.stage == Stage::Owned && tenure.release_at.is_some_and(|at| at <= now);
        for share in self.select(is_due) {
            self.release(&share, now + RELEASE_WITHIN_MICROS);
        }
    }

    fn release(&mut self, share: &Share, until: i64) {
        if let Some(tenure) = self.tenures.get_mut(share) {
            tenure.stage = Stage::Releasing { until };
            self.decided.push_back(Action::Release(share.clone()));
        }
    }

    fn lost(&mut self, shares: &[Share]) {
        for share in shares {
            let Some(tenure) = self.tenures.get_mut(share) else {
                continue;
            };
            if self.stops_at.is_some() {
                self.abandon(share);
                continue;
            }
            let is_leaving = tenure.release_at.is_some()
                || matches!(tenure.stage, Stage::Releasing { .. } | Stage::ToClose { .. });
            if tenure.epoch.is_none() || is_leaving {
                self.forget(share);
                continue;
            }
            if tenure.stage == Stage::Owned {
                self.decided.push_back(Action::Hold(share.clone()));
            }
            tenure.stage = Stage::Shadow;
            tenure.progress = None;
        }
    }

    fn doubt(&mut self, now: i64, shares: Vec<Share>) {
        for share in shares {
            // A share that the group has not assigned to us again must not be taken.
            if self.tenures.get(&share).is_some_and(Tenure::is_ours) {
                self.take_anew(now, &share);
            }
        }
    }

    /// The share is ours, but what we know about it may be out of date. Starts again at its ledger, and keeps the records meanwhile.
    fn take_anew(&mut self, now: i64, share: &Share) {
        let Some(tenure) = self.tenures.get_mut(share) else {
            return;
        };
        match tenure.stage {
            Stage::Releasing { .. } | Stage::ToClose { .. } => return,
            Stage::Owned if tenure.release_at.is_some() => return self.forget(share),
            Stage::Owned => self.decided.push_back(Action::Hold(share.clone())),
            _ => {}
        }
        tenure.begin_again(now);
    }

    fn ledgers(&mut self, now: i64, found: &BTreeMap<Share, StoredLedger>) {
        for (share, tenure) in &mut self.tenures {
            if tenure.stage != Stage::Reading {
                continue;
            }
            let (epoch, stage) = match found.get(share) {
                Some(StoredLedger::Ledger(ledger)) => {
                    let epoch = ledger.epoch + 1;
                    (ledger.epoch, Stage::ToCommitEpoch(Ledger { epoch, ..*ledger }))
                }
                Some(StoredLedger::Missing {
                    low,
                    high,
                    partitions,
                }) => {
                    let ledger = Ledger {
                        epoch: 0,
                        whole_before: 0,
                        from: *low.max(&(high - RECORDS_WITHOUT_LEDGER)),
                        epoch_at_from: 0,
                        partitions: *partitions,
                    };
                    (0, Stage::ToCatchUp(ledger, *high))
                }
                None => {
                    tenure.begin_again(now + RETRY_MICROS);
                    continue;
                }
            };
            tenure.own_committed_epoch = tenure.own_committed_epoch.filter(|ours| *ours == epoch);
            tenure.stage = stage;
        }
    }

    fn committed(&mut self, now: i64, outcome: CommitOutcome) {
        for (share, ledger) in std::mem::take(&mut self.committing) {
            let Some(tenure) = self.tenures.get_mut(&share) else {
                continue;
            };
            match (tenure.stage.clone(), outcome) {
                (Stage::CommittingEpoch(with_epoch), CommitOutcome::Done) if with_epoch == ledger => {
                    tenure.stage = Stage::ToClaim(ledger);
                    tenure.own_committed_epoch = tenure.own_committed_epoch.and(Some(ledger.epoch));
                    tenure.committed = Some(ledger);
                }
                (Stage::CommittingEpoch(with_epoch), _) if with_epoch == ledger => {
                    tenure.begin_again(now + RETRY_MICROS);
                }
                (Stage::Owned, CommitOutcome::Done) if tenure.epoch == Some(ledger.epoch) => {
                    tenure.committed = Some(ledger);
                }
                (Stage::Owned, CommitOutcome::Refused) if tenure.release_at.is_some() => self.forget(&share),
                (Stage::Owned, CommitOutcome::Refused) if tenure.epoch == Some(ledger.epoch) => {
                    self.decided.push_back(Action::Hold(share.clone()));
                    tenure.begin_again(now + RETRY_MICROS);
                }
                (Stage::ToClose { ledger: last, .. }, CommitOutcome::Done | CommitOutcome::Refused)
                    if last == ledger =>
                {
                    self.forget(&share);
                }
                (Stage::ToClose { .. }, CommitOutcome::Failed) => tenure.not_before = now + RETRY_MICROS / 5,
                _ => {}
            }
        }
    }

    fn claimed(&mut self, now: i64, share: &Share, epoch: Epoch, offset: Option<i64>) {
        let Some(tenure) = self.tenures.get_mut(share) else {
            return;
        };
        if let Stage::Claiming(ledger) = tenure.stage
            && ledger.epoch == epoch
        {
            match offset {
                Some(claim) => tenure.stage = Stage::ToCatchUp(ledger, claim),
                None => tenure.begin_again(now + CLAIM_AGAIN_MICROS),
            }
        }
    }

    fn tail_read(&mut self, now: i64, share: Share, epoch: Epoch, tail: Option<Tail>) {
        let Some(tenure) = self.tenures.get_mut(&share) else {
            return;
        };
        let Stage::CatchingUp(ledger, claim) = tenure.stage else {
            return;
        };
        if ledger.epoch != epoch {
            return;
        }
        match tail {
            Some(tail) if tail.epoch() >= epoch => {
                // There is no ledger, or it was not the latest one, or another claim came first. We need a higher epoch.
                let highest = match tail.epoch() {
                    // The consumer may know epochs that the partition no longer shows, for example of a deleted topic. Seconds
                    // since 1970 are above all of them, because a share is taken less than once a second.
                    0 => now / 1_000_000,
                    highest => highest,
                };
                tenure.own_committed_epoch = None;
                tenure.stage = Stage::ToCommitEpoch(Ledger {
                    epoch: highest + 1,
                    ..ledger
                });
            }
            Some(tail) => {
                let takeover = Takeover {
                    share: share.clone(),
                    ledger,
                    claim,
                    is_unbroken: tenure.is_unbroken(&tail),
                    tail,
                };
                tenure.epoch = Some(epoch);
                tenure.own_committed_epoch = Some(epoch);
                tenure.stage = Stage::Owned;
                self.decided.push_back(Action::Take(takeover));
                if let Some(until) = self.stops_at {
                    self.release(&share, until);
                }
            }
            None => tenure.begin_again(now + RETRY_MICROS),
        }
    }

    /// Gives back shares whose time is over. The next owner records the rest as missed.
    fn end_overdue(&mut self, now: i64) {
        let stops = self.stops_at.is_some_and(|at| at <= now);
        let is_overdue = |tenure: &Tenure| match tenure.stage {
            Stage::Releasing { until } | Stage::ToClose { until, .. } => until <= now,
            _ => stops,
        };
        for share in &self.select(is_overdue) {
            match self.stops_at {
                Some(_) => self.abandon(share),
                None => self.forget(share),
            }
        }
    }

    fn select(&self, which: impl Fn(&Tenure) -> bool) -> Vec<Share> {
        let selected = self.tenures.iter().filter(|(_, tenure)| which(tenure));
        selected.map(|(share, _)| share.clone()).collect()
    }

    fn forget(&mut self, share: &Share) {
        self.leave(share, Action::Forget(share.clone()));
    }

    fn abandon(&mut self, share: &Share) {
        self.leave(share, Action::Abandon(share.clone()));
    }

    fn leave(&mut self, share: &Share, action: Action) {
        if let Some(tenure) = self.tenures.remove(share)
            && tenure.epoch.is_some()
        {
            self.decided.push_back(action);
        }
        self.mark_free(share);
    }

    fn mark_free(&mut self, share: &Share) {
        if self.revoking.remove(share) && self.revoking.is_empty() {
            self.decided.push_back(Action::GiveBack);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: &str = "eu";

    fn share() -> Share {
        Share {
            topic: "t".into(),
            partition: 0,
        }
    }

    fn ledger(epoch: Epoch) -> Ledger {
        Ledger {
            epoch,
            whole_before: 1,
            from: 0,
            epoch_at_from: 0,
            partitions: 1,
        }
    }

    /// Does every step up to the acknowledged claim, and returns the range to read next. `found` is the epoch of the ledger.
    fn claim(shares: &mut Shares, now: i64, found: Epoch) -> Range {
        let next = |shares: &mut Shares| loop {
            match shares.next_action(now) {
                Action::Hold(_) => {}
                action => return action,
            }
        };
        assert!(matches!(next(shares), Action::ReadLedgers(_)));
        let ledgers = BTreeMap::from([(share(), StoredLedger::Ledger(ledger(found)))]);
        shares.handle(now, Event::Ledgers(ledgers));
        assert!(matches!(next(shares), Action::Commit(_)));
        shares.handle(now, Event::Committed(CommitOutcome::Done));
        let Action::Claim { share, epoch } = next(shares) else {
            panic!("no claim");
        };
        let offset = Ok(epoch);
        shares.handle(now, Event::Claimed { share, epoch, offset });
        let Action::ReadTail(range) = next(shares) else {
            panic!("nothing to read");
        };
        range
    }

    /// Our first attempt to take the share anew fails after its claim. The second one finds this epoch in the ledger, and these
    /// claims (true) and records before its claim, each with its epoch.
    fn second_attempt(found: Epoch, entries: &[(bool, Epoch)]) -> Takeover {
        let mut shares = Shares::default();
        let mut now = 0;
        shares.handle(now, Event::Assigned(vec![share()]));
        let take = |shares: &mut Shares, now: i64, found: Epoch, entries: Option<&[(bool, Epoch)]>| {
            let Range { share, epoch, .. } = claim(shares, now, found);
            let tail = entries.map(|entries| {
                let mut tail = Tail::new(PLACE, 0);
                for (is_claim, epoch) in entries {
                    match is_claim {
                        true => tail.read_claim(PLACE, *epoch),
                        false => tail.read_result(PLACE, Some(*epoch), "a", 1, None),
                    }
                }
                tail
            });
            shares.handle(now, Event::TailRead { share, epoch, tail });
            shares.next_action(now)
        };
        assert!(matches!(take(&mut shares, now, 1, Some(&[])), Action::Take(_)));
        shares.handle(now, Event::InDoubt(vec![share()]));
        assert!(matches!(take(&mut shares, now, 2, None), Action::Wait { .. }));
        now += RETRY_MICROS;
        let Action::Take(takeover) = take(&mut shares, now, found, Some(entries)) else {
            panic!("not taken");
        };
        takeover
    }

    #[test]
    fn kept_records_stay_valid_after_an_own_attempt_that_failed_after_its_claim() {
        let (claim, record) = (|epoch| (true, epoch), |epoch| (false, epoch));
        let is_unbroken = |found, entries: &[_]| second_attempt(found, entries).is_unbroken;
        let ours = [claim(2), record(2), claim(3)];
        assert!(is_unbroken(3, &ours));
        // Somebody else has committed an epoch, or written records.
        assert!(!is_unbroken(4, &ours));
        assert!(!is_unbroken(3, &[claim(2), record(2), claim(3), record(3)]));
    }
}
