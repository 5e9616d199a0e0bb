//! The timer loop's part of PRODUCE_GROUP: the list of all hosts, and the shares whose hosts are in the schedule.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;

use crate::check::target::Target;
use crate::duration::micros;
use crate::produce::fleet::{self, Fleet, Order, Partitions};
use crate::produce::hosts::list::{Changes, HostList};
use crate::produce::publisher::{Letter, LetterBox, Publisher, Record};
use crate::produce::schedule::Schedule;
use crate::produce::share::Share;
use crate::produce::share::events::Event;

/// When a share is given back, its checks under way may go on for this long. The next owner records the rest as missed.
const FINISH_WITHIN: Duration = Duration::from_millis(300);

/// How often the ledgers are updated.
const MARK_EVERY: Duration = Duration::from_secs(2);

pub(super) struct SharedHosts {
    fleet: Fleet,
    partitions: Partitions,
    default_topic: String,
    targets: HostList,
    topics: Vec<String>,
    /// Shares whose hosts are in the schedule.
    ours: BTreeSet<Share>,
    /// Those of `ours` that are being given back, each with the time at which its checks are abandoned.
    finishing: BTreeMap<Share, i64>,
    /// At a stop: when the checks that are still under way are cut off.
    cut_off_at: Option<i64>,
    mark_at: i64,
    has_left: bool,
}

impl SharedHosts {
    /// Joins the group. The publisher sends events to the same channel; `orders` passes an order to the timer loop.
    pub(super) fn join(
        settings: &fleet::Settings<'_>,
        default_topic: &str,
        targets: HostList,
        channel: (Sender<Event>, Receiver<Event>),
        letters: LetterBox,
        orders: impl Fn(Order) + Send + 'static,
    ) -> anyhow::Result<Self> {
        let topics = topics_of(&targets.topics(), default_topic);
        Ok(Self {
            fleet: Fleet::start(settings, &topics, channel, letters, orders)?,
            partitions: settings.partitions.clone(),
            default_topic: default_topic.to_owned(),
            targets,
            topics,
            ours: BTreeSet::new(),
            finishing: BTreeMap::new(),
            cut_off_at: None,
            mark_at: 0,
            has_left: false,
        })
    }

    pub(super) fn obey(
        &mut self,
        order: Order,
        schedule: &mut Schedule<Record>,
        publisher: &Publisher,
        now: i64,
    ) {
        match order {
            Order::Take(takeover) => {
                let share = &takeover.share;
                if !takeover.is_unbroken {
                    schedule.remove_share(share);
                    let hosts = self
                        .targets
                        .iter()
                        .filter(|target| self.share_of(target).as_ref() == Some(share));
                    schedule.add_share(share, hosts.cloned(), |address| takeover.recorded(address), now);
                }
                self.ours.insert(share.clone());
                publisher.tell(Letter::Open(takeover));
            }
            Order::Release { share, is_unwanted } => {
                schedule.finish_share(&share, now);
                let until = match is_unwanted {
                    true => i64::MAX,
                    false => now + micros(FINISH_WITHIN),
                };
                self.finishing.insert(share, until);
            }
            Order::Forget(share) => {
                self.remove(&share, schedule);
                publisher.tell(Letter::Forget(share));
            }
            Order::Abandon(share) => self.remove(&share, schedule),
            Order::Left => self.has_left = true,
        }
    }

    /// Called at every turn of the timer loop. Returns the time of the next turn. `looked_at` is the time of the last call of
    /// [`Schedule::next`].
    pub(super) fn turn(
        &mut self,
        schedule: &mut Schedule<Record>,
        tell: impl Fn(Letter),
        looked_at: i64,
    ) -> i64 {
        if self.cut_off_at.take_if(|at| looked_at >= *at).is_some() {
            schedule.stop(looked_at);
            schedule.cut_off();
        }
        let is_finished = |(share, until): (&Share, &i64)| {
            (looked_at >= *until || !schedule.has_open(share)).then(|| share.clone())
        };
        let finished: Vec<Share> = self.finishing.iter().filter_map(is_finished).collect();
        if !finished.is_empty() {
            let open_since = schedule.open_since();
            for share in finished {
                self.remove(&share, schedule);
                let ends_at = open_since.get(&share).copied().unwrap_or(looked_at);
                tell(Letter::End { share, ends_at });
            }
        }
        if looked_at >= self.mark_at {
            self.mark_at = looked_at + micros(MARK_EVERY);
            tell(Letter::Mark {
                now: looked_at + 1,
                open_since: schedule.open_since(),
            });
        }
        let finishing = self.finishing.values().copied().min();
        finishing.unwrap_or(i64::MAX).min(self.mark_at.max(looked_at + 1))
    }

    fn remove(&mut self, share: &Share, schedule: &mut Schedule<Record>) {
        schedule.remove_share(share);
        self.ours.remove(share);
        self.finishing.remove(share);
    }

    /// Changes the hosts of the group.
    pub(super) fn change(&mut self, changes: Changes, schedule: &mut Schedule<Record>, now: i64) {
        self.targets.apply(&changes);
        let topics = topics_of(&changes.topics, &self.default_topic);
        if topics != self.topics {
            self.topics.clone_from(&topics);
            self.fleet.subscribe(topics);
        }
        let is_ours = |target: &Arc<Target>| {
            let share = self.share_of(target);
            share.is_some_and(|share| self.ours.contains(&share) && !self.finishing.contains_key(&share))
        };
        // A host that has another topic may be another producer's now.
        let (ours, others): (Vec<_>, Vec<_>) = changes.changed.into_iter().partition(is_ours);
        let removed = changes.removed.iter().chain(&others);
        schedule.change(ours, removed, |target| self.share_of(target), now);
    }

    /// Gives all shares back, at the latest at `until`. Checks that are still under way at `cut_off_at` are cut off.
    pub(super) fn stop(&mut self, cut_off_at: i64, until: i64) {
        self.cut_off_at = Some(cut_off_at);
        self.fleet.stop(until);
    }

    pub(super) fn has_left(&self) -> bool {
        self.has_left
    }

    fn share_of(&self, target: &Target) -> Option<Share> {
        let topic = target.topic.as_deref().unwrap_or(&self.default_topic);
        self.partitions.share_of(topic, &target.address)
    }
}

/// The topics of the records of these hosts; without hosts the default one.
fn topics_of(topics: &BTreeSet<Option<String>>, default_topic: &str) -> Vec<String> {
    let mut topics: BTreeSet<&str> = topics
        .iter()
        .map(|topic| topic.as_deref().unwrap_or(default_topic))
        .collect();
    // A group cannot be joined without a topic.
    if topics.is_empty() {
        topics.insert(default_topic);
    }
    topics.into_iter().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::produce::schedule::{Limits, Rounds};

    #[test]
    fn a_member_without_shares_waits_between_its_turns() {
        let mut shared_hosts = SharedHosts {
            fleet: Fleet::without_thread(),
            partitions: Partitions::default(),
            default_topic: "t".to_owned(),
            targets: HostList::default(),
            topics: vec!["t".to_owned()],
            ours: BTreeSet::new(),
            finishing: BTreeMap::new(),
            cut_off_at: None,
            mark_at: 0,
            has_left: false,
        };
        let limits = Limits {
            max_under_way: 1,
            check_timeout: MARK_EVERY,
        };
        let mut schedule = Schedule::new(Rounds::Endless, Vec::new(), limits, 0);
        let marks = Cell::new(0);
        let tell = |letter: Letter| {
            assert!(matches!(letter, Letter::Mark { .. }));
            marks.set(marks.get() + 1);
        };
        let mut now = 1_000_000;
        for turn in 1..=30 {
            let next = shared_hosts.turn(&mut schedule, tell, now);
            assert_eq!((next - now, marks.get()), (micros(MARK_EVERY), turn));
            now = next;
        }
    }
}
