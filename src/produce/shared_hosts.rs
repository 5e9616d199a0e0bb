//! The hosts of a producer that is a member of a group: which of them are in the schedule.
//!
//! The timer loop's side of PRODUCE_GROUP. Owns the whole list of hosts and which shares are ours; the schedule holds the
//! hosts of those.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use crate::check::target::Target;
use crate::clock::Clock;
use crate::config::ProduceConfig;
use crate::produce::fleet::{self, Fleet, Order, Partitions};
use crate::produce::micros;
use crate::produce::publisher::{Letter, LetterBox, Membership, Publisher, Record};
use crate::produce::schedule::Schedule;
use crate::produce::share::Share;
use crate::produce::share::shares::Event;

/// What is under way when a share has to be given back may take so much longer; the next owner records the rest as missed.
const FINISH_WITHIN: Duration = Duration::from_millis(300);

/// How often the ledgers are brought forward.
const MARK_EVERY: Duration = Duration::from_secs(2);

/// Before the publisher has started.
pub(super) struct Joining {
    events: (std::sync::mpsc::Sender<Event>, std::sync::mpsc::Receiver<Event>),
    targets: Vec<Arc<Target>>,
}

impl Joining {
    pub(super) fn new(targets: Vec<Target>) -> Self {
        Self {
            events: channel(),
            targets: targets.into_iter().map(Arc::new).collect(),
        }
    }

    /// For [`Publisher::start`].
    pub(super) fn membership(&self, config: &ProduceConfig) -> Option<Membership> {
        let group = config.group.as_ref()?;
        Some(Membership {
            group: group.name.clone(),
            place: config.check.agent_name.clone(),
            events: self.events.0.clone(),
        })
    }

    /// `orders` leaves an order where the timer loop finds it.
    pub(super) fn join(
        self,
        config: &ProduceConfig,
        clock: Clock,
        letters: LetterBox,
        orders: impl Fn(Order) + Send + 'static,
    ) -> anyhow::Result<Option<SharedHosts>> {
        let Some(group) = &config.group else {
            return Ok(None);
        };
        let partitions = Partitions::default();
        let settings = fleet::Config {
            kafka: &config.kafka,
            group,
            place: &config.check.agent_name,
            partitions: &partitions,
            clock,
        };
        let topics = topics_of(&self.targets, &config.topic);
        let fleet = Fleet::start(&settings, &topics, self.events, letters, orders)?;
        Ok(Some(SharedHosts {
            fleet,
            partitions,
            default_topic: config.topic.clone(),
            targets: self.targets,
            topics,
            ours: BTreeSet::new(),
            finishing: BTreeMap::new(),
            mark_at: 0,
            is_stopping: false,
            has_left: false,
        }))
    }
}

pub(super) struct SharedHosts {
    fleet: Fleet,
    partitions: Partitions,
    default_topic: String,
    targets: Vec<Arc<Target>>,
    topics: Vec<String>,
    /// Shares whose hosts are in the schedule.
    ours: BTreeSet<Share>,
    /// Of these, those that go back, and until when what is under way may take.
    finishing: BTreeMap<Share, i64>,
    mark_at: i64,
    is_stopping: bool,
    has_left: bool,
}

impl SharedHosts {
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
                    schedule.hand_out(share);
                    let hosts = self
                        .targets
                        .iter()
                        .filter(|target| self.share_of(target).as_ref() == Some(share));
                    schedule.take_in(share, hosts.cloned(), |address| takeover.recorded(address), now);
                }
                self.ours.insert(share.clone());
                publisher.tell(Letter::Open(takeover));
            }
            Order::Release(share) => {
                schedule.finish_share(&share, now);
                self.finishing.insert(share, now + micros(FINISH_WITHIN));
            }
            Order::Forget(share) => {
                schedule.hand_out(&share);
                self.ours.remove(&share);
                self.finishing.remove(&share);
                // What is left at a stop is told as such.
                if !self.is_stopping {
                    publisher.tell(Letter::Forget(share));
                }
            }
            Order::Left => self.has_left = true,
        }
    }

    /// What is to be done at a turn of the loop; returns when it has to turn again. `looked_at` is when the schedule last
    /// looked for what is due.
    pub(super) fn turn(
        &mut self,
        schedule: &mut Schedule<Record>,
        publisher: &Publisher,
        looked_at: i64,
    ) -> i64 {
        let is_finished = |(share, until): (&Share, &i64)| {
            (looked_at >= *until || !schedule.has_open(share)).then(|| share.clone())
        };
        let finished: Vec<Share> = self.finishing.iter().filter_map(is_finished).collect();
        if !finished.is_empty() {
            let open_since = schedule.open_since();
            for share in finished {
                schedule.hand_out(&share);
                self.ours.remove(&share);
                self.finishing.remove(&share);
                let ends_at = open_since.get(&share).copied().unwrap_or(looked_at);
                publisher.tell(Letter::End { share, ends_at });
            }
        }
        if looked_at >= self.mark_at && !self.ours.is_empty() {
            self.mark_at = looked_at + micros(MARK_EVERY);
            publisher.tell(Letter::Mark {
                now: looked_at + 1,
                open_since: schedule.open_since(),
            });
        }
        let finishing = self.finishing.values().copied().min();
        finishing.unwrap_or(i64::MAX).min(self.mark_at.max(looked_at + 1))
    }

    /// From now on these are the hosts of the group.
    pub(super) fn reload(&mut self, targets: Vec<Target>, schedule: &mut Schedule<Record>, now: i64) {
        self.targets = targets.into_iter().map(Arc::new).collect();
        let topics = topics_of(&self.targets, &self.default_topic);
        if topics != self.topics {
            self.topics.clone_from(&topics);
            self.fleet.subscribe(topics);
        }
        let is_ours = |target: &&Arc<Target>| {
            let share = self.share_of(target);
            share.is_some_and(|share| self.ours.contains(&share) && !self.finishing.contains_key(&share))
        };
        let ours = self.targets.iter().filter(is_ours).cloned().collect();
        schedule.reload(ours, |target| self.share_of(target), now);
    }

    /// Gives everything back, by then at the latest.
    pub(super) fn stop(&mut self, until: i64) {
        self.is_stopping = true;
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

/// The topics that the records of these hosts go to.
fn topics_of(targets: &[Arc<Target>], default_topic: &str) -> Vec<String> {
    let topics: BTreeSet<&str> = targets
        .iter()
        .map(|target| target.topic.as_deref().unwrap_or(default_topic))
        .collect();
    topics.into_iter().map(str::to_owned).collect()
}
