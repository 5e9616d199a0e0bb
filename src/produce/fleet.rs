//! The thread of a group member (PRODUCE_GROUP): it does what the state machine [`Shares`] says.
//!
//! Owns the membership and reads partitions. It tells the timer loop about hosts with [`Order`]s, and the publisher about records
//! with [`Letter`]s.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::clock::{Clock, instant_now};
use crate::config::{GroupConfig, KafkaConfig};
use crate::kafka::Named;
use crate::kafka::member::{self, Change, Member, NotCommitted, explained};
use crate::kafka::reader::{Part, Reader};
use crate::lock::lock;
use crate::outage::Outage;
use crate::produce::publisher::{Letter, LetterBox};
use crate::produce::share::events::{Action, CommitOutcome, Event, Range, StoredLedger};
use crate::produce::share::ledger::Ledger;
use crate::produce::share::shares::Shares;
use crate::produce::share::tail::{Tail, Takeover};
use crate::produce::share::{Share, partition_of};

/// How often the thread asks for the group's decisions.
const LISTEN_EVERY: Duration = Duration::from_millis(50);

/// How long the thread reads partitions before it asks again for the group's decisions.
const READ_STEP: Duration = Duration::from_millis(50);

/// Reading up to a claim is given up after this time, and tried again.
const READ_WITHIN: Duration = Duration::from_secs(30);

/// A turn of the loop takes less than this unless the process was suspended. It is shorter than a session, so nobody can have taken
/// a share without being noticed.
const SUSPENDED_MICROS: i64 = 5_000_000;

/// How long librdkafka has for telling the group that we leave.
const LEAVE_WITHIN: Duration = Duration::from_millis(300);

/// What the timer loop has to do with the hosts of a share. See [`Action`] for the meanings.
#[derive(Debug)]
pub(super) enum Order {
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

/// The number of partitions by which the hosts of each topic are divided: that of the ledgers, or that of the topic if there is no
/// ledger yet.
#[derive(Clone, Debug, Default)]
pub(super) struct Partitions(Arc<Mutex<HashMap<Arc<str>, i32>>>);

impl Partitions {
    /// The share of a host. `None`: the number of partitions of its topic is not known yet.
    pub(super) fn share_of(&self, topic: &str, address: &str) -> Option<Share> {
        let counts = lock(&self.0);
        let (topic, count) = counts.get_key_value(topic)?;
        Some(Share {
            topic: Arc::clone(topic),
            partition: partition_of(address.as_bytes(), *count),
        })
    }

    fn of(&self, topic: &str) -> Option<i32> {
        let counts = lock(&self.0);
        counts.get(topic).copied()
    }

    fn all(&self) -> usize {
        let counts = lock(&self.0);
        counts
            .values()
            .filter_map(|count| usize::try_from(*count).ok())
            .sum()
    }

    fn set(&self, topic: &str, count: i32) {
        let mut counts = lock(&self.0);
        counts.insert(topic.into(), count);
    }
}

/// The timer loop's end of the thread.
pub(super) struct Fleet {
    events: Sender<Event>,
    topics: Sender<Vec<String>>,
}

impl Fleet {
    /// The publisher sends events to the same channel.
    pub(super) fn start(
        settings: &Settings<'_>,
        topics: &[String],
        (events, heard): (Sender<Event>, Receiver<Event>),
        letters: LetterBox,
        orders: impl Fn(Order) + Send + 'static,
    ) -> anyhow::Result<Self> {
        let names: Vec<&str> = topics.iter().map(String::as_str).collect();
        let GroupConfig { name, instance_id } = settings.group;
        let member = Member::join(settings.kafka, name, instance_id.as_deref(), &names)?;
        let (send_topics, new_topics) = channel();
        let thread = Thread {
            member,
            kafka: settings.kafka.clone(),
            group: name.clone(),
            place: settings.place.to_owned(),
            partitions: settings.partitions.clone(),
            clock: settings.clock,
            shares: Shares::default(),
            stops_alone: false,
            heard,
            events: events.clone(),
            turned_at: settings.clock.now_micros(),
            new_topics: Some(new_topics),
            letters,
            orders: Box::new(orders),
            to_read: Vec::new(),
            reading: None,
            logged_shares: None,
            outage: Outage::default(),
            foreign_ledger: Outage::default(),
            commit_failure: Arc::default(),
        };
        std::thread::Builder::new()
            .name("fleet".into())
            .spawn(move || thread.run())
            .context("cannot start the thread of PRODUCE_GROUP")?;
        Ok(Self {
            events,
            topics: send_topics,
        })
    }

    /// Gives all shares back and leaves the group, at the latest then (Unix time in microseconds).
    pub(super) fn stop(&self, until: i64) {
        // If the thread has ended, we have left the group.
        let _ = self.events.send(Event::Stop { until });
    }

    /// Changes the topics of the hosts.
    pub(super) fn subscribe(&self, topics: Vec<String>) {
        let _ = self.topics.send(topics);
    }
}

pub(super) struct Settings<'a> {
    pub(super) kafka: &'a KafkaConfig,
    pub(super) group: &'a GroupConfig,
    /// AGENT_NAME.
    pub(super) place: &'a str,
    pub(super) partitions: &'a Partitions,
    pub(super) clock: Clock,
}

struct Thread {
    member: Member,
    kafka: KafkaConfig,
    group: String,
    place: String,
    partitions: Partitions,
    clock: Clock,
    shares: Shares,
    /// We stop and own all shares, and nobody waits for them.
    stops_alone: bool,
    heard: Receiver<Event>,
    events: Sender<Event>,
    /// When the loop turned last.
    turned_at: i64,
    new_topics: Option<Receiver<Vec<String>>>,
    letters: LetterBox,
    orders: Box<dyn Fn(Order) + Send>,
    to_read: Vec<Range>,
    reading: Option<Reading>,
    /// The number of our shares, as logged last.
    logged_shares: Option<usize>,
    /// Why shares cannot be taken.
    outage: Outage,
    /// Another program has replaced the ledger of a share.
    foreign_ledger: Outage,
    /// Why the last commit failed, if that was not reported yet.
    commit_failure: Arc<Mutex<Option<String>>>,
}

/// The partitions of one topic that are being read.
struct Reading {
    reader: Reader,
    tails: HashMap<i32, (Range, Tail)>,
    until: Instant,
}

impl Thread {
    fn run(mut self) {
        while !self.shares.has_left() {
            self.notice_suspension();
            self.listen_to_group();
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
    }

    /// The last owner of a share may have written void records while it was suspended: see `share`.
    fn notice_suspension(&mut self) {
        let now = self.clock.now_micros();
        let passed = now - std::mem::replace(&mut self.turned_at, now);
        if passed > SUSPENDED_MICROS {
            log::warn!(
                "group={} this process was suspended for {} s; it takes its shares again",
                self.group,
                passed / 1_000_000
            );
            self.handle(Event::Suspended);
        }
    }

    fn handle(&mut self, event: Event) {
        if let Event::Committed(outcome) = event {
            self.member.end_commit();
            if outcome == CommitOutcome::Done {
                self.outage.end(instant_now());
            }
        }
        if let Event::Stop { .. } = event {
            let (owned, _) = self.shares.owned_of();
            // If there are several shares, another member would have one.
            let has_all = owned > 0 && owned == self.partitions.all();
            self.stops_alone = has_all && (owned > 1 || self.member.is_alone());
        }
        self.shares.handle(self.clock.now_micros(), event);
    }

    fn take_topics(&mut self) {
        loop {
            match self.new_topics.as_ref().map(Receiver::try_recv) {
                Some(Ok(topics)) => {
                    let names: Vec<&str> = topics.iter().map(String::as_str).collect();
                    if let Err(error) = self.member.subscribe(&names) {
                        log::error!("{error:#}");
                    }
                }
                // The timer loop has ended without a stop.
                Some(Err(TryRecvError::Disconnected)) => {
                    self.new_topics = None;
                    self.handle(Event::Stop { until: 0 });
                }
                Some(Err(TryRecvError::Empty)) | None => return,
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
            let event = match change {
                Change::Assigned(named) => Event::Assigned(shares(named)),
                Change::Revoked(named) => Event::Revoked(shares(named)),
                Change::Lost(named) => {
                    log::warn!(
                        "group={} this producer is no longer a member: other producers may take its {} shares; until then it \
                         goes on checking their hosts and keeps the records",
                        self.group,
                        named.len()
                    );
                    Event::Lost(shares(named))
                }
            };
            let is_assigned = matches!(event, Event::Assigned(_));
            self.handle(event);
            if is_assigned {
                self.log_shares();
            }
        }
    }

    fn log_shares(&mut self) {
        let (_, ours) = self.shares.owned_of();
        if self.logged_shares.replace(ours) == Some(ours) {
            return;
        }
        match ours {
            0 => log::info!(
                "group={} this producer has no share: it waits until another one leaves",
                self.group
            ),
            _ => log::info!("group={} shares={ours}", self.group),
        }
    }

    fn report_outages(&mut self) {
        let now = instant_now();
        if let Some((reason, lasted)) = self.member.refusal(now) {
            log::error!(
                "group={} Kafka has refused the membership for {} s: {reason}",
                self.group,
                lasted.as_secs()
            );
        }
        let failure = lock(&self.commit_failure).take();
        if let Some(why) = failure {
            self.outage.begin(now, why);
        }
        if let Some((reason, lasted)) = self.foreign_ledger.take_report(now) {
            log::error!(
                "group={} {reason}; until then its hosts are not checked (for {} s)",
                self.group,
                lasted.as_secs()
            );
        }
        if let Some((reason, lasted)) = self.outage.take_report(now) {
            log::warn!(
                "group={} no share could be taken for {} s: {reason}",
                self.group,
                lasted.as_secs()
            );
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::ReadLedgers(shares) => {
                let found = self.read_ledgers(&shares);
                if let Err(why) = &found {
                    self.outage.begin(instant_now(), why.clone());
                }
                self.handle(Event::Ledgers(found.unwrap_or_default()));
            }
            Action::ReadTail(range) => self.to_read.push(range),
            Action::Commit(ledgers) => self.commit(&ledgers),
            Action::Claim { share, epoch } => self.letters.tell(Letter::Claim { share, epoch }),
            Action::Hold(share) => self.letters.tell(Letter::Hold(share)),
            Action::Take(takeover) => {
                self.outage.end(instant_now());
                let Takeover {
                    share,
                    ledger,
                    is_unbroken,
                    ..
                } = &takeover;
                log::info!(
                    "share={share} epoch={} taken{}",
                    ledger.epoch,
                    if *is_unbroken { " again" } else { "" }
                );
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
                (self.orders)(Order::Left);
            }
            Action::Wait { .. } => {}
        }
    }

    fn read_ledgers(&mut self, shares: &[Share]) -> Result<BTreeMap<Share, StoredLedger>, String> {
        let topics: BTreeSet<&Arc<str>> = shares.iter().map(|share| &share.topic).collect();
        for topic in topics {
            self.count_partitions(topic)?;
        }
        let named: Vec<Named> = shares.iter().map(named).collect();
        let committed = self.member.committed(&named)?;
        let (mut found, mut foreign) = (BTreeMap::new(), None);
        for ((topic, partition), committed) in committed {
            let share = Share {
                topic: topic.as_str().into(),
                partition,
            };
            let ledger = match committed {
                Some(member::Committed { offset, metadata }) => match Ledger::parse(offset, &metadata) {
                    Ok(ledger) => StoredLedger::Ledger(ledger),
                    Err(why) => {
                        foreign = Some(format!("share={share} cannot be taken: {why}"));
                        continue;
                    }
                },
                None => {
                    let (low, high) = self.member.extent(&topic, partition)?;
                    if high > 0 {
                        log::warn!(
                            "share={share} has no ledger in group {}: its hosts continue from the last records of the partition, \
                             and ticks that are missing before them stay missing",
                            self.group
                        );
                    }
                    let partitions = self.partitions.of(&share.topic).unwrap_or(1);
                    StoredLedger::Missing {
                        low,
                        high,
                        partitions,
                    }
                }
            };
            found.insert(share, ledger);
        }
        match foreign {
            Some(why) => self.foreign_ledger.begin(instant_now(), why),
            None => drop(self.foreign_ledger.end(instant_now())),
        }
        Ok(found)
    }

    fn count_partitions(&self, topic: &str) -> Result<(), String> {
        let existing = self.member.partitions(topic)?;
        let all: Vec<Named> = (0..existing)
            .map(|partition| (topic.to_owned(), partition))
            .collect();
        let committed = self.member.committed(&all)?;
        let ledgers = committed.iter().filter_map(|(_, committed)| committed.as_ref());
        let used = ledgers
            .filter_map(|committed| Ledger::parse(committed.offset, &committed.metadata).ok())
            .map(|ledger| ledger.partitions)
            // A new topic of the same name may have fewer.
            .find(|used| *used <= existing);
        let partitions = used.unwrap_or(existing);
        if partitions < existing && self.partitions.of(topic) != Some(partitions) {
            log::warn!(
                "group={} topic={topic} has {existing} partitions, of which the group uses the first {partitions}: it was started with \
                 that many; to use all, stop all its producers, delete the offsets of the group, and start them",
                self.group
            );
        }
        self.partitions.set(topic, partitions);
        Ok(())
    }

    fn commit(&self, ledgers: &[(Share, Ledger)]) {
        let commits: Vec<_> = ledgers
            .iter()
            .map(|(share, ledger)| {
                let committed = member::Committed {
                    offset: ledger.from,
                    metadata: ledger.metadata(),
                };
                (named(share), committed)
            })
            .collect();
        let (events, group) = (self.events.clone(), self.group.clone());
        let failure = Arc::clone(&self.commit_failure);
        self.member.begin_commit(commits, move |committed| {
            let outcome = match committed {
                Ok(()) => CommitOutcome::Done,
                Err(NotCommitted::Refused(why)) => {
                    log::info!("group={group} refused a commit of this producer: {why}");
                    CommitOutcome::Refused
                }
                Err(NotCommitted::Failed(why)) => {
                    log::debug!("group={group} a commit failed: {why}");
                    *lock(&failure) = Some(why);
                    CommitOutcome::Failed
                }
            };
            // The receiver is gone at the end of a stop.
            let _ = events.send(Event::Committed(outcome));
        });
    }

    /// Reads for a while. Returns false if there is nothing to read.
    fn read(&mut self) -> bool {
        if self.reading.is_none() {
            self.begin_to_read();
        }
        let Some(reading) = &mut self.reading else {
            return false;
        };
        let tails = &mut reading.tails;
        let is_over = reading
            .reader
            .go_on(instant_now() + READ_STEP, |partition, value| {
                if let Some((_, tail)) = tails.get_mut(&partition) {
                    tail.read_value(value);
                }
            });
        let is_over = match is_over {
            Ok(is_over) => is_over,
            Err(error) => {
                self.outage.begin(instant_now(), explained(&error));
                return self.end_reading(false);
            }
        };
        if is_over || instant_now() > reading.until {
            return self.end_reading(is_over);
        }
        true
    }

    /// Begins to read all ranges of one topic.
    fn begin_to_read(&mut self) {
        let Some(topic) = self.to_read.first().map(|range| Arc::clone(&range.share.topic)) else {
            return;
        };
        let mut tails = HashMap::new();
        for range in self.to_read.extract_if(.., |range| range.share.topic == topic) {
            let tail = Tail::new(&self.place, range.epoch_at_from);
            tails.insert(range.share.partition, (range, tail));
        }
        let parts: Vec<Part> = tails
            .values()
            .map(|(range, _)| Part {
                partition: range.share.partition,
                from: range.from,
                to: Some(range.to),
            })
            .collect();
        let reader = Reader::new(&self.kafka).and_then(|mut reader| {
            reader.begin(&topic, &parts)?;
            Ok(reader)
        });
        match reader {
            Ok(reader) => {
                self.reading = Some(Reading {
                    reader,
                    tails,
                    until: instant_now() + READ_WITHIN,
                });
            }
            Err(error) => {
                log::error!("cannot read {topic}: {error}");
                for (range, _) in tails.into_values() {
                    self.handle(Event::TailRead {
                        share: range.share,
                        epoch: range.epoch,
                        tail: None,
                    });
                }
            }
        }
    }

    fn end_reading(&mut self, is_over: bool) -> bool {
        if let Some(reading) = self.reading.take() {
            for (range, tail) in reading.tails.into_values() {
                self.handle(Event::TailRead {
                    share: range.share,
                    epoch: range.epoch,
                    tail: is_over.then_some(tail),
                });
            }
        }
        true
    }
}

fn named(share: &Share) -> Named {
    (share.topic.to_string(), share.partition)
}
