//! The publisher's thread: hands to librdkafka what the outbox says, and to the outbox what librdkafka says.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::config::ClientConfig;
use rdkafka::error::KafkaError;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer, PurgeConfig};

use super::client::{Context, Fault, Report, Sent, client_config, new_producer};
use super::search::Search;
use super::topics::Topic;
use super::{Inbox, Letter, Membership, Record, Shared, Unacknowledged, lock};
use crate::check::target::Target;
use crate::clock::{instant_now, wall_micros};
use crate::config::KafkaConfig;
use crate::kafka::Explainer;
use crate::outage::Outage;
use crate::produce::outbox::{Kept, LaneId, Outbox, Sequence};
use crate::produce::share::Share;
use crate::produce::share::shares::Event;
use crate::sample::epoch::{self, Claim, Epoch};

/// How often the thread looks for new records and reports while there are any on the way: no record wakes it, so 2,000
/// a second cost 50 wake-ups.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The same while it can only wait for a topic.
const LOOK_EVERY_WAITING: Duration = Duration::from_millis(50);

/// The longest sleep of a thread with nothing to do; the first letter wakes it.
pub(super) const LOOK_EVERY_IDLE: Duration = Duration::from_secs(1);

/// How long the end waits for librdkafka to hand back what it holds.
const HAND_BACK_WITHIN: Duration = Duration::from_millis(200);

/// The thread's state.
pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) kafka: KafkaConfig,
    config: ClientConfig,
    pub(super) explainer: Explainer,
    pub(super) servers: String,
    pub(super) producer: BaseProducer<Context>,
    membership: Option<Membership>,
    pub(super) outbox: Outbox<Record>,
    /// Of each lane, by its index.
    pub(super) ways: Vec<Way>,
    lane_of_share: HashMap<Share, LaneId>,
    pub(super) topics: Vec<Topic>,
    pub(super) topic_indices: HashMap<String, usize>,
    claims_in_flight: usize,
    /// Why the producer cannot be relied on any more: nothing is sent until it is replaced.
    pub(super) spoiled: Option<String>,
    /// Before it is: the look at the first topic with records in doubt.
    pub(super) search: Option<Search>,
    /// What it has found so far.
    pub(super) found_stored: usize,
    pub(super) search_failed_at: Option<Instant>,
    pub(super) stop_by: Option<Instant>,
    pub(super) looked_for_topics_at: Option<Instant>,
    /// Why the servers could not be asked for topics; `None`: they could, or were not asked.
    pub(super) unreachable: Option<String>,
    pub(super) acknowledged_at: Instant,
    pub(super) said_at: Instant,
    pub(super) silence: Outage,
    /// Refused records since they were last said: how many, and the first one.
    pub(super) refused: Option<(u64, String)>,
    pub(super) refused_said_at: Option<Instant>,
}

/// Where the records of a lane go.
pub(super) struct Way {
    pub(super) lane: LaneId,
    pub(super) topic: usize,
    /// With a group; without one librdkafka computes the partition of each key.
    pub(super) share: Option<Share>,
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        kafka: &KafkaConfig,
        membership: Option<Membership>,
    ) -> anyhow::Result<Self> {
        let explainer = Explainer::new(kafka);
        let config = client_config(kafka, shared.bounds);
        let mut worker = Self {
            producer: new_producer(&config, &explainer)?,
            kafka: kafka.clone(),
            config,
            explainer,
            servers: kafka.bootstrap_servers.clone(),
            membership,
            outbox: Outbox::default(),
            ways: Vec::new(),
            lane_of_share: HashMap::new(),
            topics: Vec::new(),
            topic_indices: HashMap::new(),
            claims_in_flight: 0,
            spoiled: None,
            search: None,
            found_stored: 0,
            search_failed_at: None,
            stop_by: None,
            looked_for_topics_at: None,
            unreachable: None,
            acknowledged_at: instant_now(),
            said_at: instant_now(),
            silence: Outage::default(),
            refused: None,
            refused_said_at: None,
            shared,
        };
        // Looked for at once, so that an absent Kafka or topic is said before the first record is due.
        let shared = Arc::clone(&worker.shared);
        worker.topic_index(&shared.default_topic);
        Ok(worker)
    }

    pub(super) fn run(mut self, end: impl FnOnce(Unacknowledged)) {
        loop {
            for letter in self.take_inbox() {
                self.take(letter);
            }
            self.look_for_topics();
            self.mark_crowded_topics();
            self.send_waiting();
            self.serve();
            self.release_shares();
            self.replace_spoiled_producer();
            self.say();
            if let Some(stop_by) = self.stop_by
                && (self.on_the_way() == 0 || instant_now() >= stop_by)
            {
                break;
            }
        }
        end(self.hand_back());
        // Only now the producer goes: ending its connections may take longer than there is time.
    }

    /// Records and claims that librdkafka has.
    pub(super) fn in_flight(&self) -> usize {
        self.outbox.in_flight() + self.claims_in_flight
    }

    fn on_the_way(&self) -> usize {
        self.shared.deliveries.records_on_the_way.load(Ordering::Relaxed)
    }

    fn is_idle(&self) -> bool {
        self.outbox.is_idle() && self.topics.iter().all(|topic| topic.is_there)
    }

    /// What was sent here since, after a pause.
    fn take_inbox(&mut self) -> Vec<Letter> {
        let is_idle = self.in_flight() == 0 && self.is_idle();
        let pause = match self.in_flight() {
            0 if is_idle => LOOK_EVERY_IDLE,
            0 => LOOK_EVERY_WAITING,
            _ => LOOK_EVERY,
        };
        let mut inbox = lock(&self.shared.inbox);
        inbox.is_asleep = is_idle;
        let goes_on = |inbox: &mut Inbox| !is_idle || (inbox.letters.is_empty() && inbox.stop_by.is_none());
        inbox = self
            .shared
            .changed
            .wait_timeout_while(inbox, pause, goes_on)
            .unwrap_or_else(PoisonError::into_inner)
            .0;
        inbox.is_asleep = false;
        self.stop_by = inbox.stop_by;
        std::mem::take(&mut inbox.letters)
    }

    fn take(&mut self, letter: Letter) {
        match letter {
            Letter::Record(record) => {
                let lane = match &record.share {
                    Some(share) => self.lane_of_share(share),
                    None => self.lane_of_topic(&record.target),
                };
                self.outbox.take(lane, record.tick, record);
            }
            Letter::Mark { now, open_since } => self.mark(now, &open_since),
            Letter::Hold(share) => {
                let lane = self.lane_of_share(&share);
                self.outbox.close(lane);
            }
            Letter::Claim { share, epoch } => self.claim(share, epoch),
            Letter::Open(takeover) => {
                let lane = self.lane_of_share(&takeover.share);
                let out = self
                    .outbox
                    .take_share(lane, &takeover, |record| &record.target.address);
                // Where nobody came between, it was stored without an answer.
                let count = match takeover.is_unbroken {
                    true => &self.shared.deliveries.delivered,
                    false => &self.shared.deliveries.superseded,
                };
                count.fetch_add(out.len() as u64, Ordering::Relaxed);
                self.release(&out);
            }
            Letter::End { share, ends_at } => {
                let lane = self.lane_of_share(&share);
                self.outbox.end_share(lane, ends_at);
            }
            Letter::Forget(share) => {
                let lane = self.lane_of_share(&share);
                let out = self.outbox.forget_share(lane);
                let count = &self.shared.deliveries.superseded;
                count.fetch_add(out.len() as u64, Ordering::Relaxed);
                self.release(&out);
            }
        }
    }

    pub(super) fn release(&self, out: &[Kept<Record>]) {
        for kept in out {
            self.shared.release(kept.record.bytes());
        }
    }

    /// Without a group.
    fn lane_of_topic(&mut self, target: &Target) -> LaneId {
        let shared = Arc::clone(&self.shared);
        let topic = self.topic_index(shared.topic_of(target));
        let known = self
            .ways
            .iter()
            .find(|way| way.topic == topic && way.share.is_none());
        if let Some(way) = known {
            return way.lane;
        }
        let lane = self.outbox.add_lane();
        self.outbox.open(lane);
        self.ways.push(Way {
            lane,
            topic,
            share: None,
        });
        lane
    }

    fn lane_of_share(&mut self, share: &Share) -> LaneId {
        if let Some(lane) = self.lane_of_share.get(share) {
            return *lane;
        }
        let topic = self.topic_index(&share.topic);
        let lane = self.outbox.add_lane();
        self.ways.push(Way {
            lane,
            topic,
            share: Some(share.clone()),
        });
        self.lane_of_share.insert(share.clone(), lane);
        lane
    }

    fn tell_shares(&self, event: Event) {
        if let Some(membership) = &self.membership {
            // At the end nobody listens any more.
            let _ = membership.events.send(event);
        }
    }

    fn mark(&mut self, now: i64, open_since: &HashMap<Share, i64>) {
        for index in 0..self.ways.len() {
            let Way {
                lane,
                share: Some(share),
                ..
            } = &self.ways[index]
            else {
                continue;
            };
            let open_since = open_since.get(share).copied().unwrap_or(i64::MAX);
            if let Some(ledger) = self.outbox.ledger(*lane, open_since, now) {
                let share = share.clone();
                self.tell_shares(Event::Progress { share, ledger });
            }
        }
    }

    fn release_shares(&mut self) {
        for index in 0..self.ways.len() {
            let way = &self.ways[index];
            if let Some(share) = way.share.clone()
                && let Some(ledger) = self.outbox.last_ledger(way.lane)
            {
                self.tell_shares(Event::Released { share, ledger });
            }
        }
    }

    fn claim(&mut self, share: Share, epoch: Epoch) {
        let Some(membership) = &self.membership else {
            return;
        };
        let value = Claim::new(&membership.group, &membership.place, epoch).encode();
        let lane = self.lane_of_share(&share);
        let topic = self.ways[lane.index()].topic;
        if self.spoiled.is_none() && self.topics[topic].is_there {
            let sent = Box::new(Sent::Claim {
                share: share.clone(),
                epoch,
            });
            let message = BaseRecord::<(), [u8], _>::with_opaque_to(&share.topic, sent)
                .partition(share.partition)
                .payload(&value);
            if self.producer.send(message).is_ok() {
                self.outbox.claim(lane, epoch);
                self.claims_in_flight += 1;
                self.note_sent(topic);
                return;
            }
        }
        self.tell_shares(Event::Claimed {
            share,
            epoch,
            offset: None,
        });
    }

    /// Of what is counted as in flight already.
    fn note_sent(&mut self, topic: usize) {
        if self.in_flight() == 1 {
            // The silence before was nobody's fault.
            self.acknowledged_at = instant_now();
        }
        self.topics[topic].in_flight += 1;
    }

    /// Sends what waits in topics that are there, in the order in which it was taken.
    fn send_waiting(&mut self) {
        for index in 0..self.ways.len() {
            let (lane, topic) = (self.ways[index].lane, self.ways[index].topic);
            while self.spoiled.is_none()
                && self.topics[topic].is_there
                && let Some((sequence, kept)) = self.outbox.next_to_send(lane)
            {
                if !self.send(index, sequence, kept) {
                    break;
                }
            }
            if self.outbox.waiting(lane).is_empty() && self.ways[index].share.is_none() {
                self.topics[topic].in_doubt_since = None;
            }
        }
    }

    /// Gives a record to librdkafka. What that does not take now waits on: false.
    fn send(&mut self, way: usize, sequence: Sequence, mut kept: Kept<Record>) -> bool {
        let Way { lane, topic, share } = &self.ways[way];
        let (lane, topic) = (*lane, *topic);
        if let Some(epoch) = self.outbox.epoch(lane) {
            epoch::write_into(&mut kept.record.value, epoch);
        }
        let record = &kept.record;
        let sent = Box::new(Sent::Record {
            lane,
            sequence,
            target: Arc::clone(&record.target),
            tick: kept.tick,
            bytes: record.bytes(),
            at_millis: wall_micros() / 1_000,
        });
        let mut message = BaseRecord::with_opaque_to(&self.topics[topic].name, sent)
            .key(record.target.address.as_str())
            .payload(record.value.as_slice());
        if let Some(share) = share {
            message = message.partition(share.partition);
        }
        let Err((error, _)) = self.producer.send(message) else {
            self.note_sent(topic);
            return true;
        };
        match Fault::of(&error) {
            Fault::Record => {
                self.outbox.done(lane, kept.tick, None);
                let Record { target, .. } = &kept.record;
                self.refuse(&Arc::clone(target), kept.record.bytes(), &error);
                return true;
            }
            Fault::Topic(why) => self.topics[topic].is_not_there(why),
            // A full queue empties; what else there is librdkafka reports as a fatal error, too.
            Fault::Producer(_) | Fault::HandedBack => {}
        }
        self.outbox.came_back(lane, sequence, kept);
        false
    }

    /// Takes all that librdkafka has to say, without waiting: a poll with a timeout spins through its last millisecond. One
    /// poll takes the reports of one request, of which there may be hundreds between two looks.
    fn serve(&mut self) {
        let events = &Arc::clone(self.producer.context()).events;
        loop {
            let before = events.load(Ordering::Relaxed);
            self.producer.poll(Duration::ZERO);
            if events.load(Ordering::Relaxed) == before {
                break;
            }
        }
        let reports = self.producer.context().take_reports();
        if reports.iter().any(|report| report.outcome.is_ok()) {
            self.acknowledged_at = instant_now();
            self.producer.context().forget_error();
        }
        for report in reports {
            self.take_report(report);
        }
        if let Some((code, reason)) = self.producer.client().fatal_error() {
            self.spoil(format!("{code}: {reason}"));
        }
    }

    fn take_report(&mut self, report: Report) {
        let Report { sent, outcome } = report;
        match *sent {
            Sent::Record {
                lane,
                sequence,
                target,
                tick,
                bytes,
                at_millis,
            } => {
                let topic = self.ways[lane.index()].topic;
                self.topics[topic].in_flight -= 1;
                let (error, value) = match outcome {
                    Ok(offset) => {
                        self.topic_takes(topic);
                        self.outbox.done(lane, tick, Some(offset));
                        self.shared.deliveries.delivered.fetch_add(1, Ordering::Relaxed);
                        return self.shared.release(bytes);
                    }
                    Err(failure) => failure,
                };
                let fault = Fault::of(&error);
                if matches!(fault, Fault::Record) {
                    self.outbox.done(lane, tick, None);
                    return self.refuse(&target, bytes, &error);
                }
                self.shared.deliveries.failed.fetch_add(1, Ordering::Relaxed);
                let share = self.ways[lane.index()].share.clone();
                let is_in_group = share.is_some();
                let record = Record {
                    target,
                    share,
                    tick,
                    value,
                };
                self.outbox.came_back(lane, sequence, Kept { tick, record });
                if !is_in_group {
                    let since = &mut self.topics[topic].in_doubt_since;
                    *since = Some(since.map_or(at_millis, |since| since.min(at_millis)));
                }
                self.blame(topic, fault);
            }
            Sent::Claim { share, epoch } => {
                let lane = self.lane_of_share(&share);
                let topic = self.ways[lane.index()].topic;
                self.claims_in_flight -= 1;
                self.topics[topic].in_flight -= 1;
                let offset = match outcome {
                    Ok(offset) => {
                        self.topic_takes(topic);
                        Some(offset)
                    }
                    Err((error, _)) => {
                        self.blame(topic, Fault::of(&error));
                        None
                    }
                };
                self.tell_shares(Event::Claimed { share, epoch, offset });
            }
        }
    }

    fn topic_takes(&mut self, topic: usize) {
        self.topics[topic].why_not = None;
        self.topics[topic].was_refused = false;
    }

    fn blame(&mut self, topic: usize, fault: Fault) {
        match fault {
            Fault::Topic(why) => {
                self.topics[topic].is_not_there(why);
                self.topics[topic].was_refused = true;
                self.doubt(|way| way.topic == topic);
            }
            Fault::Producer(why) => self.spoil(why),
            Fault::Record | Fault::HandedBack => {}
        }
    }

    /// What came back of these shares may be stored all the same: only a new claim tells.
    fn doubt(&mut self, which: impl Fn(&Way) -> bool) {
        let mut shares = Vec::new();
        for way in self.ways.iter().filter(|way| which(way)) {
            if let Some(share) = &way.share {
                self.outbox.doubt(way.lane);
                shares.push(share.clone());
            }
        }
        if !shares.is_empty() {
            self.tell_shares(Event::InDoubt(shares));
        }
    }

    fn refuse(&mut self, target: &Target, bytes: usize, error: &KafkaError) {
        self.shared.deliveries.refused.fetch_add(1, Ordering::Relaxed);
        self.shared.release(bytes);
        let first = || (0, format!("{}: {error}", target.address));
        self.refused.get_or_insert_with(first).0 += 1;
    }

    /// A record came back that librdkafka cannot get through, though nothing is wrong with it: the broker lost track of
    /// what this producer sent, say. Everything not sent yet is taken back, so that nothing overtakes it.
    fn spoil(&mut self, why: String) {
        if self.spoiled.is_none() {
            self.spoiled = Some(why);
            self.producer.purge(PurgeConfig::default().queue().non_blocking());
            self.doubt(|_| true);
        }
    }

    /// Once the reports of all that was on its way are in, and it is known what Kafka has of that, all the rest goes out by a
    /// new producer, in order.
    fn replace_spoiled_producer(&mut self) {
        if self.in_flight() > 0 || self.spoiled.is_none() || !self.has_looked_for_stored() {
            return;
        }
        let Some(why) = &self.spoiled else {
            return;
        };
        match new_producer(&self.config, &self.explainer) {
            Ok(producer) => {
                let (servers, kept, found) = (&self.servers, self.on_hand(), self.found_stored);
                log::error!(
                    "kafka={servers} a new producer takes over, {kept} records go out again, {found} were stored already: {why}"
                );
                self.found_stored = 0;
                self.producer = producer;
                self.spoiled = None;
            }
            Err(error) => log::error!("kafka={} {error:#}; it is tried again", self.servers),
        }
    }

    fn on_hand(&self) -> usize {
        self.ways
            .iter()
            .map(|way| self.outbox.waiting(way.lane).len())
            .sum()
    }

    /// Whatever is still here: librdkafka's queue, what waits for a topic or a share, what was not even looked at.
    fn hand_back(&mut self) -> Unacknowledged {
        let missing = (0..self.topics.len())
            .find(|index| !self.topics[*index].is_there && self.waiting_of(*index) > 0)
            .map(|index| format!("topic {} is not there", self.topics[index].name));
        let reason = self.unreachable.clone().or(missing);
        let reason = reason.or_else(|| self.producer.context().last_error());
        if self.in_flight() > 0 {
            self.producer
                .purge(PurgeConfig::default().queue().inflight().non_blocking());
            let deadline = instant_now() + HAND_BACK_WITHIN;
            while self.in_flight() > 0 && instant_now() < deadline {
                self.producer.poll(LOOK_EVERY);
                self.serve();
            }
        }
        let mut per_address = BTreeMap::new();
        let mut count = |record: &Record| {
            *per_address.entry(record.target.address.clone()).or_insert(0) += 1;
        };
        for way in &self.ways {
            self.outbox
                .waiting(way.lane)
                .values()
                .for_each(|kept| count(&kept.record));
        }
        for letter in &lock(&self.shared.inbox).letters {
            if let Letter::Record(record) = letter {
                count(record);
            }
        }
        let named: u64 = per_address.values().sum();
        let left = self.on_the_way() as u64;
        if left > named {
            per_address.insert("hosts that librdkafka did not name".to_owned(), left - named);
        }
        Unacknowledged { per_address, reason }
    }
}

#[cfg(test)]
mod tests {
    use rdkafka::mocking::MockCluster;

    use super::super::Bounds;
    use super::*;
    use crate::config::KafkaSecurity;
    use crate::produce::host_file;

    #[test]
    fn one_look_takes_the_reports_of_all_requests_that_were_answered() {
        const PARTITIONS: i32 = 64;
        const BOUND: Duration = Duration::from_secs(60);
        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic("t", PARTITIONS, 1).unwrap();
        let kafka = KafkaConfig {
            bootstrap_servers: cluster.bootstrap_servers(),
            security: KafkaSecurity {
                tls: None,
                sasl: None,
            },
        };
        let shared = Arc::new(Shared::new("t", Bounds::default(), Arc::default()));
        let mut worker = Worker::new(shared, &kafka, None).unwrap();
        let deadline = instant_now() + BOUND;
        while !worker.is_idle() {
            assert!(instant_now() < deadline, "the topic is there");
            worker.looked_for_topics_at = None;
            worker.look_for_topics();
        }
        for i in 0..4 * PARTITIONS {
            let target = host_file::target(&format!("h{i}.example"), &[], None).unwrap();
            worker
                .shared
                .deliveries
                .records_on_the_way
                .fetch_add(1, Ordering::Relaxed);
            worker.take(Letter::Record(Record {
                target: Arc::new(target),
                share: None,
                tick: 0,
                value: b"{}".to_vec(),
            }));
        }
        worker.send_waiting();
        assert_eq!(worker.in_flight(), 256);
        // Each partition that has a record gets a request of its own; here all of them are stored.
        let stored = |worker: &Worker| -> i64 {
            let client = worker.producer.client();
            let ends =
                (0..PARTITIONS).map(|partition| client.fetch_watermarks("t", partition, BOUND).unwrap().1);
            ends.sum()
        };
        while stored(&worker) < 256 {
            assert!(instant_now() < deadline, "all are stored");
        }
        let mut looks = 0;
        while worker.in_flight() > 0 {
            assert!(instant_now() < deadline, "all are reported");
            let before = worker.in_flight();
            worker.serve();
            looks += usize::from(worker.in_flight() < before);
        }
        assert!(
            looks <= 8,
            "{looks} looks for the reports of about {PARTITIONS} requests"
        );
    }
}
