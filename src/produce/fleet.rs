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
use crate::http::health::Readiness;
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
use crate::thread::start_thread;

/// How often the thread asks for the group's decisions.
const LISTEN_EVERY: Duration = Duration::from_millis(50);

/// How long the thread reads partitions before it asks again for the group's decisions.
const READ_STEP: Duration = Duration::from_millis(50);

/// Reading up to a claim is given up if no record arrives for this time, and tried again.
const READ_WITHIN: Duration = Duration::from_secs(30);

/// A turn of the loop takes less than this unless the process was suspended. It is shorter than a session, so nobody can have taken
/// a share without being noticed.
const SUSPENDED_MICROS: i64 = 5_000_000;

/// How long the thread asks for ledgers before it asks again for the group's decisions. The last questions may take 4.5 s more, and
/// all of it has to be shorter than [`SUSPENDED_MICROS`].
const ASK_FOR: Duration = Duration::from_millis(400);

/// Joining a group takes a few seconds, and up to a session longer after a kill. A longer wait is logged.
const JOIN_WITHIN: Duration = Duration::from_secs(10);

/// How long librdkafka has for telling the group that we leave.
const LEAVE_WITHIN: Duration = Duration::from_millis(300);

/// How long Kafka's answer to that is waited for.
const CLOSE_WITHIN: Duration = Duration::from_millis(700);

/// The shortest time from joining the group to joining it again.
const JOIN_AGAIN_AFTER: Duration = Duration::from_secs(30);

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
        letters.tell(Letter::Topics(topics.to_vec()));
        let (send_topics, new_topics) = channel();
        let thread = Thread {
            member,
            kafka: settings.kafka.clone(),
            group: name.clone(),
            place: settings.place.to_owned(),
            partitions: settings.partitions.clone(),
            clock: settings.clock,
            readiness: Arc::clone(settings.readiness),
            shares: Shares::default(),
            stops_alone: false,
            heard,
            events: events.clone(),
            turned_at: settings.clock.now_micros(),
            joined_at: instant_now(),
            new_topics: Some(new_topics),
            letters,
            orders: Box::new(orders),
            to_read: Vec::new(),
            reading: None,
            logged_shares: None,
            absent_since: Some(instant_now()),
            absence: Outage::default(),
            untaken: Outage::default(),
            unsaved: Outage::default(),
            failure: None,
            topics: topics.to_vec(),
            other_place: None,
            foreign_ledger: Outage::default(),
            commit_failure: Arc::default(),
        };
        start_thread("fleet", move || thread.run()).context("cannot start the thread of PRODUCE_GROUP")?;
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
    /// Whether this producer is a member of the group, and no other program has partitions of it.
    pub(super) readiness: &'a Arc<Readiness>,
}

struct Thread {
    member: Member,
    kafka: KafkaConfig,
    group: String,
    place: String,
    partitions: Partitions,
    clock: Clock,
    readiness: Arc<Readiness>,
    shares: Shares,
    /// We stop and own all shares, and nobody waits for them.
    stops_alone: bool,
    heard: Receiver<Event>,
    events: Sender<Event>,
    /// When the loop turned last.
    turned_at: i64,
    joined_at: Instant,
    new_topics: Option<Receiver<Vec<String>>>,
    letters: LetterBox,
    orders: Box<dyn Fn(Order) + Send>,
    to_read: Vec<Range>,
    reading: Option<Reading>,
    /// The number of our shares, as logged last.
    logged_shares: Option<usize>,
    /// When we stopped being a member; `None` while we are one.
    absent_since: Option<Instant>,
    /// We have not been a member for [`JOIN_WITHIN`].
    absence: Outage,
    /// Not all shares are taken.
    untaken: Outage,
    /// The ledgers of shares that we own cannot be committed.
    unsaved: Outage,
    /// The last error since shares could not be taken.
    failure: Option<String>,
    /// The topics of all hosts.
    topics: Vec<String>,
    /// The AGENT_NAME in a ledger, if it is not ours.
    other_place: Option<String>,
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
            match self.new_topics.as_ref().map(Receiver::try_recv) {
                Some(Ok(topics)) => {
                    let names: Vec<&str> = topics.iter().map(String::as_str).collect();
                    if let Err(error) = self.member.subscribe(&names) {
                        log::error!("{error:#}");
                    }
                    self.topics.clone_from(&topics);
                    self.letters.tell(Letter::Topics(topics));
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
            match event {
                Event::Assigned(_) => self.absent_since = None,
                Event::Lost(_) => self.absent_since = Some(instant_now()),
                _ => {}
            }
            self.handle(event);
            if is_assigned {
                self.log_shares();
            }
        }
    }

    /// If another producer joined with our KAFKA_GROUP_INSTANCE_ID, Kafka gave it our shares and ended our membership. After a crash
    /// of the broker, our own earlier request to join may look like another producer's, so we join again. If we are replaced again
    /// within [`JOIN_AGAIN_AFTER`], we stop checking the hosts until then.
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
                    "group={} this producer was replaced again and has no share: it joins again in {} s",
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
        self.report_membership(now);
        self.report_shares(now);
        if let Some((reason, lasted)) = self.foreign_ledger.take_report(now) {
            log::error!(
                "group={} {reason}; until then its hosts are not checked (for {} s)",
                self.group,
                lasted.as_secs()
            );
        }
    }

    fn report_membership(&mut self, now: Instant) {
        let group = &self.group;
        if let Some((reason, lasted)) = self.member.refusal(now) {
            log::error!(
                "group={group} Kafka has refused the membership for {} s: {reason}",
                lasted.as_secs()
            );
        }
        if let Some((who, lasted)) = self.member.other_programs_to_report(now) {
            log::error!(
                "group={group} another program is a member of the group, and the hosts of its partitions are not checked: {who} \
                 (for {} s); end it, or set another PRODUCE_GROUP",
                lasted.as_secs()
            );
        }
        let refused = self.member.refused();
        match self.absent_since {
            Some(since) if refused.is_none() => {
                if now.duration_since(since) >= JOIN_WITHIN {
                    self.absence.begin(since, String::new());
                }
            }
            _ => drop(self.absence.end(now)),
        }
        if let Some((_, lasted)) = self.absence.take_report(now) {
            log::warn!(
                "waiting for the group {group}: this producer is not a member of it (for {} s)",
                lasted.as_secs()
            );
        }
        // A member without a share is ready too.
        self.readiness.set(match (refused, self.member.other_programs()) {
            (Some(reason), _) => Err(format!(
                "Kafka refuses the membership of the group {group}: {reason}"
            )),
            (_, Some(who)) => Err(format!("another program is a member of the group {group}: {who}")),
            _ if self.absent_since.is_some() => Err(format!("waiting for the group {group}")),
            _ => Ok(()),
        });
    }

    fn report_shares(&mut self, now: Instant) {
        if let Some(why) = lock(&self.commit_failure).take() {
            self.unsaved.begin(now, why.clone());
            self.failure = Some(why);
        }
        if self.shares.owned().next().is_none() {
            self.unsaved.end(now);
        }
        if let Some((why, lasted)) = self.unsaved.take_report(now) {
            log::warn!(
                "group={} the ledgers of its shares could not be committed for {} s: {why}; the next owners have to read all records \
                 since then",
                self.group,
                lasted.as_secs()
            );
        }
        let mut untaken = self.shares.untaken();
        let Some((share, waits_for)) = untaken.next() else {
            self.failure = None;
            self.foreign_ledger.end(now);
            self.untaken.end(now);
            return;
        };
        let count = 1 + untaken.count();
        self.untaken
            .begin(now, format!("share={share} waits {waits_for}"));
        if let Some((reason, lasted)) = self.untaken.take_report(now) {
            let (_, ours) = self.shares.owned_of();
            let failure = self.failure.as_deref().unwrap_or("no error is known");
            log::warn!(
                "group={} {count} of {ours} shares could not be taken for {} s: {reason}; {failure}",
                self.group,
                lasted.as_secs()
            );
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::ReadLedgers(shares) => {
                let found = self.read_ledgers(&shares);
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

    fn log_takeover(&mut self, takeover: &Takeover) {
        let Takeover {
            share,
            ledger,
            is_unbroken,
            ..
        } = takeover;
        let again = if *is_unbroken { " again" } else { "" };
        log::info!("share={share} epoch={} taken{again}", ledger.epoch);
        let group = &self.group;
        if ledger.whole_before == 0 && takeover.last_tick() > 0 {
            log::warn!(
                "share={share} has no ledger in group {group}: its hosts continue from the last records of the partition, and ticks \
                 that are missing before them stay missing"
            );
        }
        if let Some(other) = self.other_place.take() {
            log::warn!(
                "group={group} the last owner of a share had AGENT_NAME={other}, and this producer has AGENT_NAME={}: the producers \
                 of a group check each host once, so they need the same AGENT_NAME; give each place a PRODUCE_GROUP of its own",
                self.place
            );
        }
    }

    /// Shares that are left out, because there was no time or no answer, are asked for again.
    fn read_ledgers(&mut self, shares: &[Share]) -> BTreeMap<Share, StoredLedger> {
        let until = instant_now() + ASK_FOR;
        let (mut found, mut foreign, mut has_asked) = (BTreeMap::new(), None, false);
        let topics: BTreeSet<&Arc<str>> = shares.iter().map(|share| &share.topic).collect();
        for topic in topics {
            if instant_now() >= until {
                break;
            }
            let committed = match self.committed_in(topic) {
                Ok(committed) => committed,
                Err(why) => {
                    self.failure = Some(why);
                    continue;
                }
            };
            for share in shares.iter().filter(|share| share.topic == *topic) {
                match committed.get(&share.partition) {
                    Some(Some(committed)) => match Ledger::parse(committed.offset, &committed.metadata) {
                        Ok(ledger) => {
                            self.note_place(&committed.metadata);
                            found.insert(share.clone(), StoredLedger::Ledger(ledger));
                        }
                        Err(why) => foreign = Some(format!("share={share} cannot be taken: {why}")),
                    },
                    // The first one is asked for in any case, so that a slow Kafka does not prevent it for ever.
                    Some(None) if !has_asked || instant_now() < until => {
                        has_asked = true;
                        match self.without_ledger(share) {
                            Ok(missing) => drop(found.insert(share.clone(), missing)),
                            Err(why) => self.failure = Some(format!("share={share} {why}")),
                        }
                    }
                    _ => {}
                }
            }
        }
        match foreign {
            Some(why) => self.foreign_ledger.begin(instant_now(), why),
            None => drop(self.foreign_ledger.end(instant_now())),
        }
        found
    }

    fn note_place(&mut self, metadata: &str) {
        if let Some(place) = Ledger::place_of(metadata).filter(|place| *place != self.place) {
            self.other_place = Some(place.to_owned());
        }
    }

    fn without_ledger(&self, share: &Share) -> Result<StoredLedger, String> {
        let (low, high) = self.member.extent(&share.topic, share.partition)?;
        Ok(StoredLedger::Missing {
            low,
            high,
            partitions: self.partitions.of(&share.topic).unwrap_or(1),
        })
    }

    /// The committed offset of each partition of a topic. Also decides by how many partitions its hosts are divided.
    fn committed_in(&self, topic: &str) -> Result<HashMap<i32, Option<member::Committed>>, String> {
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
        let by_partition = |((_, partition), committed)| (partition, committed);
        Ok(committed.into_iter().map(by_partition).collect())
    }

    fn commit(&self, ledgers: &[(Share, Ledger)]) {
        let commits: Vec<_> = ledgers
            .iter()
            .map(|(share, ledger)| {
                let committed = member::Committed {
                    offset: ledger.from,
                    metadata: ledger.metadata(&self.place),
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
        let (tails, until) = (&mut reading.tails, &mut reading.until);
        let is_over = reading
            .reader
            .go_on(instant_now() + READ_STEP, |partition, value| {
                *until = instant_now() + READ_WITHIN;
                if let Some((_, tail)) = tails.get_mut(&partition) {
                    tail.read_value(value);
                }
            });
        let is_over = match is_over {
            Ok(is_over) => is_over,
            Err(error) => {
                self.failure = Some(explained(&error));
                return self.end_reading(false);
            }
        };
        if is_over {
            return self.end_reading(true);
        }
        if instant_now() > reading.until {
            let seconds = READ_WITHIN.as_secs();
            self.failure = Some(format!(
                "Kafka sent no more records of the partition for {seconds} s"
            ));
            return self.end_reading(false);
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
