//! The machine of a member: what it does with which share next, given what happened.
//!
//! Owns the order of the protocol's steps (see [`super`]) and what becomes of a share that goes elsewhere. The edges, and
//! the simulated world of the tests, report what happened ([`Shares::handle`]) and do what [`Shares::next_action`] says.
//! `now` is Unix time in microseconds.
//!
//! Every share that the group gave us is at every moment owned or on its way to that: whatever fails on the way, a refused
//! commit too, makes us begin again at the ledger. So a share can have no owner only while the group gives it to nobody.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::produce::share::Share;
use crate::produce::share::ledger::Ledger;
use crate::produce::share::tail::{Tail, Takeover};
use crate::sample::epoch::Epoch;

/// After something failed it is tried again so much later.
const RETRY_MICROS: i64 = 500_000;

/// The same where the claim was not appended, because the topic is missing, say. Each try takes an epoch, and those must not grow
/// by more than one a second: see `Shares::tail_read`.
const CLAIM_AGAIN_MICROS: i64 = 2_000_000;

/// How long a share that we have to give back may take to finish what is under way and to have it acknowledged: the group
/// waits for it.
const RELEASE_WITHIN_MICROS: i64 = 2_000_000;

/// Where a share has no ledger, so many of its last records are read for what its hosts were last recorded at.
const RECORDS_WITHOUT_LEDGER: i64 = 10_000;

/// What the group's committed offset says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    Ledger(Ledger),
    /// There is none; the partition holds the offsets from `low` to before `high`.
    Nothing {
        low: i64,
        high: i64,
    },
}

/// How a commit ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Committed {
    Done,
    /// The coordinator does not take it from us: we are no member, or of an earlier generation.
    Refused,
    /// Nobody knows whether it took place.
    Failed,
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// The group gave us these, in addition to those that we have.
    Assigned(Vec<Share>),
    /// The group wants these back; it waits for [`Action::GiveBack`].
    Revoked(Vec<Share>),
    /// We are no member any more, and these may belong to somebody else already.
    Lost(Vec<Share>),
    /// The answer to [`Action::ReadLedgers`]; for what is not in it, it failed.
    Ledgers(BTreeMap<Share, Found>),
    /// The answer to [`Action::ReadTail`]; `None`: it failed.
    TailRead {
        share: Share,
        epoch: Epoch,
        tail: Option<Tail>,
    },
    /// The answer to [`Action::Commit`].
    Committed(Committed),
    /// The answer to [`Action::Claim`]: the claim's offset; `None`: it was not appended.
    Claimed {
        share: Share,
        epoch: Epoch,
        offset: Option<i64>,
    },
    /// So far is a share of ours recorded.
    Progress { share: Share, ledger: Ledger },
    /// The answer to [`Action::Release`]: nothing more is written, and so far it is recorded.
    Released { share: Share, ledger: Ledger },
    /// What was on its way to Kafka may or may not have arrived: only a new claim tells.
    InDoubt(Vec<Share>),
    /// Give everything back, until then at the latest.
    Stop { until: i64 },
}

/// A part of a partition that is to be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    pub share: Share,
    pub from: i64,
    /// The first offset that is not read.
    pub to: i64,
    /// The highest epoch in front of `from`.
    pub epoch_at_from: Epoch,
    /// Ours; zero before we have one.
    pub epoch: Epoch,
}

/// What to do next.
#[derive(Clone, Debug)]
pub enum Action {
    /// Ask Kafka for the group's committed offsets.
    ReadLedgers(Vec<Share>),
    /// Read this part of a partition into a [`Tail`].
    ReadTail(Range),
    /// Commit these as a member of the group, in one request. One is under way at a time.
    Commit(Vec<(Share, Ledger)>),
    /// Append a claim to the partition, behind everything that was sent to it before.
    Claim { share: Share, epoch: Epoch },
    /// Send nothing more of this share, but go on checking its hosts and keep their records.
    Hold(Share),
    /// The share is ours: check its hosts and send their records under this epoch.
    Take(Takeover),
    /// Begin no more checks of this share, finish what is under way, and say so.
    Release(Share),
    /// The share is somebody else's: forget its hosts and their records.
    Forget(Share),
    /// Tell the group that what it wants back is free.
    GiveBack,
    /// Leave the group; nothing follows.
    Leave,
    /// Nothing is to be done until then (`None`: at all), unless something happens.
    Wait { until: Option<i64> },
}

/// Where a share stands on its way to us or from us.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Stage {
    /// The group has not given it to us again yet; we go on checking, in case it does.
    Shadow,
    /// Its ledger is to be read.
    ToRead,
    Reading,
    /// It has no ledger: the end of the partition is to be read.
    Endless {
        low: i64,
        high: i64,
        is_asked: bool,
    },
    /// Our epoch is to be committed.
    ToNumber(Ledger),
    Numbering(Ledger),
    ToClaim(Ledger),
    Claiming(Ledger),
    /// The claim stands at this offset: read up to it.
    ToCatchUp(Ledger, i64),
    CatchingUp(Ledger, i64),
    Owned,
    /// The group wants it back: it is being finished until then.
    Releasing {
        until: i64,
    },
    /// It is finished, and its last ledger is to be committed until then.
    ToClose {
        ledger: Ledger,
        until: i64,
    },
}

#[derive(Clone, Debug)]
struct Tenure {
    stage: Stage,
    /// The epoch under which we own it or last owned it, while its hosts are still checked.
    epoch: Option<Epoch>,
    /// What is committed, and what could be.
    committed: Option<Ledger>,
    progress: Option<Ledger>,
    not_before: i64,
}

impl Tenure {
    fn begin_again(&mut self, not_before: i64) {
        self.stage = Stage::ToRead;
        self.progress = None;
        self.not_before = not_before;
    }

    fn is_ours(&self) -> bool {
        self.stage != Stage::Shadow
    }
}

/// All shares of a member. See the module's page.
#[derive(Clone, Debug, Default)]
pub struct Shares {
    tenures: BTreeMap<Share, Tenure>,
    /// What was already decided.
    decided: VecDeque<Action>,
    /// Of these the group waits to hear that they are free.
    revoking: BTreeSet<Share>,
    committing: Vec<(Share, Ledger)>,
    is_stopping: bool,
    has_left: bool,
}

impl Shares {
    /// Takes note of what happened.
    pub fn handle(&mut self, now: i64, event: Event) {
        match event {
            Event::Assigned(shares) => self.assigned(now, shares),
            Event::Revoked(shares) => self.revoked(&shares, now + RELEASE_WITHIN_MICROS),
            Event::Lost(shares) => self.lost(&shares),
            Event::Ledgers(found) => self.ledgers(now, &found),
            Event::TailRead { share, epoch, tail } => self.tail_read(now, share, epoch, tail),
            Event::Committed(outcome) => self.committed(now, outcome),
            Event::Claimed { share, epoch, offset } => self.claimed(now, &share, epoch, offset),
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
            Event::InDoubt(shares) => {
                for share in shares {
                    // One that the group has not given us again must not be taken.
                    if self.tenures.get(&share).is_some_and(Tenure::is_ours) {
                        self.take_anew(now, &share);
                    }
                }
            }
            Event::Stop { until } => {
                self.is_stopping = true;
                let shares: Vec<_> = self.tenures.keys().cloned().collect();
                self.revoked(&shares, until);
            }
        }
    }

    /// What to do next. Every action but [`Action::Wait`] is said once and counts as begun.
    pub fn next_action(&mut self, now: i64) -> Action {
        self.end_overdue(now);
        if let Some(action) = self.decided.pop_front() {
            return action;
        }
        if self.is_stopping && self.tenures.is_empty() {
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

    /// Shares that we own, and those that the group gave us.
    pub fn owned_of(&self) -> (usize, usize) {
        let ours = self.tenures.values().filter(|tenure| tenure.is_ours());
        let owned = ours.clone().filter(|tenure| tenure.stage == Stage::Owned);
        (owned.count(), ours.count())
    }

    /// Whether everything that was to be done before the end is done.
    pub fn has_left(&self) -> bool {
        self.has_left
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
                Stage::ToNumber(ledger) => {
                    let ledger = *ledger;
                    tenure.stage = Stage::Numbering(ledger);
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
                Stage::Endless {
                    low,
                    high,
                    is_asked: false,
                } => {
                    tenure.stage = Stage::Endless {
                        low,
                        high,
                        is_asked: true,
                    };
                    return Some(Action::ReadTail(Range {
                        share: share.clone(),
                        from: end_begins_at(low, high),
                        to: high,
                        epoch_at_from: 0,
                        epoch: 0,
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
            _ => Some(tenure.not_before).filter(|at| *at > now),
        });
        Action::Wait { until: until.min() }
    }

    // What happened.

    fn assigned(&mut self, now: i64, shares: Vec<Share>) {
        for share in shares {
            if self.is_stopping {
                continue;
            }
            self.take_anew(now, &share);
            self.tenures.entry(share).or_insert(Tenure {
                stage: Stage::ToRead,
                epoch: None,
                committed: None,
                progress: None,
                not_before: now,
            });
        }
        // What the group does not give back to us now, it gave to somebody else.
        let others: Vec<_> = self
            .tenures
            .iter()
            .filter(|(_, tenure)| !tenure.is_ours())
            .map(|(share, _)| share.clone())
            .collect();
        others.iter().for_each(|share| self.forget(share));
    }

    fn revoked(&mut self, shares: &[Share], until: i64) {
        self.revoking.extend(shares.iter().cloned());
        for share in shares {
            let Some(tenure) = self.tenures.get_mut(share) else {
                self.is_free(share);
                continue;
            };
            if let Stage::Releasing { .. } | Stage::ToClose { .. } = tenure.stage {
                continue;
            }
            if tenure.stage == Stage::Owned {
                tenure.stage = Stage::Releasing { until };
                self.decided.push_back(Action::Release(share.clone()));
            } else {
                self.forget(share);
            }
        }
        if shares.is_empty() && self.revoking.is_empty() {
            self.decided.push_back(Action::GiveBack);
        }
    }

    fn lost(&mut self, shares: &[Share]) {
        for share in shares {
            let Some(tenure) = self.tenures.get_mut(share) else {
                continue;
            };
            let is_leaving = matches!(tenure.stage, Stage::Releasing { .. } | Stage::ToClose { .. });
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

    /// We may have it, but what we know of it may be out of date: begin again, and keep what was measured meanwhile.
    fn take_anew(&mut self, now: i64, share: &Share) {
        let Some(tenure) = self.tenures.get_mut(share) else {
            return;
        };
        match tenure.stage {
            Stage::Releasing { .. } | Stage::ToClose { .. } => return,
            Stage::Owned => self.decided.push_back(Action::Hold(share.clone())),
            _ => {}
        }
        tenure.begin_again(now);
    }

    fn ledgers(&mut self, now: i64, found: &BTreeMap<Share, Found>) {
        for (share, tenure) in &mut self.tenures {
            if tenure.stage != Stage::Reading {
                continue;
            }
            match found.get(share) {
                Some(Found::Ledger(ledger)) => {
                    tenure.stage = Stage::ToNumber(Ledger {
                        epoch: ledger.epoch + 1,
                        ..*ledger
                    });
                }
                Some(Found::Nothing { low, high }) => {
                    tenure.stage = Stage::Endless {
                        low: *low,
                        high: *high,
                        is_asked: false,
                    };
                }
                None => tenure.begin_again(now + RETRY_MICROS),
            }
        }
    }

    fn committed(&mut self, now: i64, outcome: Committed) {
        for (share, ledger) in std::mem::take(&mut self.committing) {
            let Some(tenure) = self.tenures.get_mut(&share) else {
                continue;
            };
            match (tenure.stage.clone(), outcome) {
                (Stage::Numbering(numbered), Committed::Done) if numbered == ledger => {
                    tenure.stage = Stage::ToClaim(ledger);
                    tenure.committed = Some(ledger);
                }
                (Stage::Numbering(numbered), _) if numbered == ledger => {
                    tenure.begin_again(now + RETRY_MICROS);
                }
                (Stage::Owned, Committed::Done) if tenure.epoch == Some(ledger.epoch) => {
                    tenure.committed = Some(ledger);
                }
                (Stage::Owned, Committed::Refused) if tenure.epoch == Some(ledger.epoch) => {
                    self.decided.push_back(Action::Hold(share.clone()));
                    tenure.begin_again(now + RETRY_MICROS);
                }
                (Stage::ToClose { ledger: last, .. }, Committed::Done | Committed::Refused)
                    if last == ledger =>
                {
                    self.forget(&share);
                }
                (Stage::ToClose { .. }, Committed::Failed) => tenure.not_before = now + RETRY_MICROS / 5,
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
        match (&tenure.stage, tail) {
            (
                Stage::Endless {
                    low,
                    high,
                    is_asked: true,
                },
                tail,
            ) if epoch == 0 => match tail {
                Some(tail) => {
                    let (low, from) = (*low, end_begins_at(*low, *high));
                    tenure.stage = Stage::ToNumber(Ledger {
                        epoch: 1 + match tail.epoch() {
                            // The judge may know epochs that the partition does not show any more; this is above them all,
                            // because nobody takes a share once a second.
                            0 if from > 0 || low > 0 => now / 1_000_000,
                            highest => highest,
                        },
                        whole_before: 0,
                        from,
                        epoch_at_from: 0,
                    });
                }
                None => tenure.begin_again(now + RETRY_MICROS),
            },
            (Stage::CatchingUp(ledger, claim), tail) if ledger.epoch == epoch => match tail {
                Some(tail) if tail.epoch() >= epoch => {
                    // Our claim came too late, or the ledger is not the latest one: ours has to be higher.
                    tenure.stage = Stage::ToNumber(Ledger {
                        epoch: tail.epoch() + 1,
                        ..*ledger
                    });
                }
                Some(tail) => {
                    let takeover = Takeover {
                        share: share.clone(),
                        ledger: *ledger,
                        claim: *claim,
                        is_unbroken: tenure.epoch == Some(tail.epoch()),
                        tail,
                    };
                    tenure.epoch = Some(epoch);
                    tenure.stage = Stage::Owned;
                    self.decided.push_back(Action::Take(takeover));
                }
                None => tenure.begin_again(now + RETRY_MICROS),
            },
            _ => {}
        }
    }

    /// What cannot be finished in time goes back unfinished: the next owner finds what is missing.
    fn end_overdue(&mut self, now: i64) {
        let is_overdue = |tenure: &Tenure| match tenure.stage {
            Stage::Releasing { until } | Stage::ToClose { until, .. } => until <= now,
            _ => false,
        };
        let overdue: Vec<_> = self
            .tenures
            .iter()
            .filter(|(_, tenure)| is_overdue(tenure))
            .map(|(share, _)| share.clone())
            .collect();
        overdue.iter().for_each(|share| self.forget(share));
    }

    fn forget(&mut self, share: &Share) {
        if let Some(tenure) = self.tenures.remove(share)
            && tenure.epoch.is_some()
        {
            self.decided.push_back(Action::Forget(share.clone()));
        }
        self.is_free(share);
    }

    fn is_free(&mut self, share: &Share) {
        if self.revoking.remove(share) && self.revoking.is_empty() && !self.is_stopping {
            self.decided.push_back(Action::GiveBack);
        }
    }
}

fn end_begins_at(low: i64, high: i64) -> i64 {
    low.max(high - RECORDS_WITHOUT_LEDGER)
}
