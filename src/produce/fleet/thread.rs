//! The loop of the group's thread: it does what the state machine [`Shares`] says.

use std::collections::{BTreeSet, HashMap};
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::Partitions;
use crate::clock::{Clock, instant_now};
use crate::config::KafkaConfig;
use crate::http::health::Readiness;
use crate::kafka::Named;
use crate::kafka::member::{Change, Member};
use crate::kafka::reader::Reader;
use crate::outage::Outage;
use crate::produce::publisher::{Letter, LetterBox};
use crate::produce::share::Share;
use crate::produce::share::events::{Action, CommitOutcome, Event, Range};
use crate::produce::share::shares::Shares;
use crate::produce::share::tail::{Tail, Takeover};

/// How often the thread asks for the group's decisions.
const LISTEN_EVERY: Duration = Duration::from_millis(50);

/// How long the thread reads partitions before it asks again for the group's decisions.
pub(super) const READ_STEP: Duration = Duration::from_millis(50);

/// A turn of the loop takes less than this unless the process was suspended. It is shorter than a session, so nobody can have taken
/// a share without being noticed.
pub(super) const SUSPENDED_MICROS: i64 = 5_000_000;

/// How long librdkafka has for telling the group that we leave.
const LEAVE_WITHIN: Duration = Duration::from_millis(300);

/// How long Kafka's answer to that is waited for.
const CLOSE_WITHIN: Duration = Duration::from_millis(700);

/// The shortest time from joining the group to joining it again.
const JOIN_AGAIN_AFTER: Duration = Duration::from_secs(30);

/// What the timer loop has to do with the hosts of a share. See [`Action`] for the meanings.
#[derive(Debug)]
pub(in crate::produce) enum Order {
    Take(Takeover),
    Release {
        share: Share,
        /// No other producer waits for it, so all of its checks may end.
        is_unwanted: bool,
    },
    Forget(Share),
    Abandon(Share),
    /// We have left the group. No order follows.
    Left,
}

pub(super) struct Thread {
    pub(super) member: Member,
    pub(super) kafka: KafkaConfig,
    pub(super) group: String,
    pub(super) place: String,
    pub(super) partitions: Partitions,
    pub(super) clock: Clock,
    pub(super) readiness: Arc<Readiness>,
    pub(super) shares: Shares,
    /// We stop and own all shares, and nobody waits for them.
    pub(super) stops_alone: bool,
    pub(super) heard: Receiver<Event>,
    pub(super) events: Sender<Event>,
    /// When the loop turned last.
    pub(super) turned_at: i64,
    pub(super) joined_at: Instant,
    pub(super) new_topics: Receiver<Vec<String>>,
    pub(super) letters: LetterBox,
    pub(super) orders: Box<dyn Fn(Order) + Send>,
    pub(super) to_read: Vec<Range>,
    pub(super) reading: Option<Reading>,
    /// The number of our shares, as logged last.
    pub(super) logged_shares: Option<usize>,
    /// When we stopped being a member; `None` while we are one.
    pub(super) absent_since: Option<Instant>,
    /// We have not been a member for longer than joining usually takes.
    pub(super) absence: Outage,
    /// Not all shares are taken.
    pub(super) untaken: Outage,
    /// The ledgers of shares that we own cannot be committed.
    pub(super) unsaved: Outage,
    /// The last error since shares could not be taken.
    pub(super) failure: Option<String>,
    /// The topics of all hosts.
    pub(super) topics: Vec<String>,
    /// The AGENT_NAME in a ledger, if it is not ours.
    pub(super) other_place: Option<String>,
    /// Another program has replaced the ledger of a share.
    pub(super) foreign_ledger: Outage,
    /// Why the last commit failed, if that was not reported yet.
    pub(super) commit_failure: Arc<Mutex<Option<String>>>,
}

/// The partitions of one topic that are being read.
pub(super) struct Reading {
    pub(super) reader: Reader,
    pub(super) tails: HashMap<i32, (Range, Tail)>,
    pub(super) until: Instant,
}

impl Thread {
    pub(super) fn run(mut self) {
        while !self.shares.has_left() {
            self.notice_suspension();
            self.listen_to_group();
            self.join_again_if_ended();
            self.take_topics();
            while let Ok(event) = self.heard.try_recv() {
                self.handle(event);
            }
            self.report_outages();
            match self.shares.next_action(self.clock.now_micros()) {
                Action::Wait { until } if !self.read() => self.wait(until),
                Action::Wait { .. } => {}
                action => self.act(action),
            }
        }
        self.member.close(CLOSE_WITHIN);
        (self.orders)(Order::Left);
    }

    /// Other producers may have had our shares meanwhile, and we may have written void records: see `share`.
    fn notice_suspension(&mut self) {
        let now = self.clock.now_micros();
        let passed = now - std::mem::replace(&mut self.turned_at, now);
        if passed > SUSPENDED_MICROS {
            log::warn!(
                "group={} this process was suspended for {} s; it takes its shares again",
                self.group,
                passed / 1_000_000
            );
            self.handle(Event::InDoubt(self.shares.all()));
        }
    }

    pub(super) fn handle(&mut self, event: Event) {
        match &event {
            Event::Committed(outcome) => {
                self.member.end_commit();
                if *outcome == CommitOutcome::Done {
                    self.unsaved.end(instant_now());
                }
            }
            Event::Claimed {
                share,
                offset: Err(why),
                ..
            } => self.failure = Some(format!("share={share} its claim was not stored: {why}")),
            Event::Stop { .. } => self.stops_alone = self.is_alone(),
            _ => {}
        }
        self.shares.handle(self.clock.now_micros(), event);
    }

    /// Whether we own all shares.
    fn is_alone(&self) -> bool {
        let owned: BTreeSet<&Share> = self.shares.owned().collect();
        let (mut all, mut ours) = (0, 0);
        for topic in &self.topics {
            let topic: Arc<str> = topic.as_str().into();
            for partition in 0..self.partitions.of(&topic).unwrap_or(0) {
                all += 1;
                let topic = Arc::clone(&topic);
                ours += usize::from(owned.contains(&Share { topic, partition }));
            }
        }
        // If there are several shares, another member would have one.
        all > 0 && ours == all && (all > 1 || self.member.is_alone())
    }

    fn take_topics(&mut self) {
        loop {
            match self.new_topics.try_recv() {
                Ok(topics) => {
                    let names: Vec<&str> = topics.iter().map(String::as_str).collect();
                    if let Err(error) = self.member.subscribe(&names) {
                        log::error!("{error:#}");
                    }
                    self.topics.clone_from(&topics);
                    self.letters.tell(Letter::Topics(topics));
                }
                Err(TryRecvError::Empty) => return,
                // The timer loop has ended without a stop.
                Err(TryRecvError::Disconnected) => return self.handle(Event::Stop { until: 0 }),
            }
        }
    }

    fn wait(&mut self, until: Option<i64>) {
        let longest = until.map_or(LISTEN_EVERY, |until| self.clock.until(until).min(LISTEN_EVERY));
        if let Ok(event) = self.heard.recv_timeout(longest) {
            self.handle(event);
        }
    }

    fn listen_to_group(&mut self) {
        for change in self.member.changes() {
            let shares = |named: Vec<Named>| -> Vec<Share> {
                let share = |(topic, partition): Named| Share {
                    topic: topic.into(),
                    partition,
                };
                named.into_iter().map(share).collect()
            };
            match change {
                Change::Assigned(named) => {
                    self.absent_since = None;
                    self.handle(Event::Assigned(shares(named)));
                    self.log_shares();
                }
                Change::Revoked(named) => self.handle(Event::Revoked(shares(named))),
                Change::Lost(named) => {
                    log::warn!(
                        "group={} this producer is no longer a member: other producers may take its {} shares; until then it \
                         goes on checking their hosts and keeps the records",
                        self.group,
                        named.len()
                    );
                    self.absent_since = Some(instant_now());
                    self.handle(Event::Lost(shares(named)));
                }
            }
        }
    }

    /// If another producer joined with our KAFKA_GROUP_INSTANCE_ID, Kafka gave it our shares and ended our membership. After a crash
    /// of the broker, our own earlier request to join may look like another producer's, so we join again. If we are replaced
    /// within [`JOIN_AGAIN_AFTER`] of joining, we stop checking the hosts until then.
    fn join_again_if_ended(&mut self) {
        let Some(why) = self.member.ended() else {
            return;
        };
        self.handle(Event::Lost(self.shares.all()));
        let now = instant_now();
        self.absent_since.get_or_insert(now);
        if now < self.joined_at + JOIN_AGAIN_AFTER {
            self.handle(Event::Assigned(Vec::new()));
            if self.logged_shares.replace(0) != Some(0) {
                log::info!(
                    "group={} this producer was replaced soon after it joined, and has no share; it joins again in {} s: {why}",
                    self.group,
                    (self.joined_at + JOIN_AGAIN_AFTER - now).as_secs()
                );
            }
            return;
        }
        self.joined_at = now;
        log::error!(
            "group={} this producer was replaced and joins again: {why}",
            self.group
        );
        let topics: Vec<&str> = self.topics.iter().map(String::as_str).collect();
        if let Err(error) = self.member.join_again(&topics) {
            log::error!("{error:#}");
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::ReadLedgers(shares) => {
                let found = self.read_ledgers(shares);
                self.handle(Event::Ledgers(found));
            }
            Action::ReadTail(range) => self.to_read.push(range),
            Action::Commit(ledgers) => self.commit(&ledgers),
            Action::Claim { share, epoch } => self.letters.tell(Letter::Claim { share, epoch }),
            Action::Hold(share) => self.letters.tell(Letter::Hold(share)),
            Action::Take(takeover) => {
                self.log_takeover(&takeover);
                (self.orders)(Order::Take(takeover));
            }
            Action::Release(share) => (self.orders)(Order::Release {
                share,
                is_unwanted: self.stops_alone,
            }),
            Action::Forget(share) => {
                log::info!("share={share} given up: it belongs to another producer now");
                (self.orders)(Order::Forget(share));
            }
            Action::Abandon(share) => {
                log::info!("share={share} not given back in time: this producer stops");
                (self.orders)(Order::Abandon(share));
            }
            Action::GiveBack => self.member.give_back(),
            Action::Leave => {
                self.member.leave();
                let until = instant_now() + LEAVE_WITHIN;
                while instant_now() < until {
                    self.member.changes();
                    // Nothing that comes now matters.
                    let _ = self.heard.recv_timeout(READ_STEP / 5);
                }
            }
            Action::Wait { .. } => {}
        }
    }
}
