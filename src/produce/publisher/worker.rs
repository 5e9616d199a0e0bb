//! The publisher's thread: takes letters, and gives librdkafka the records that the outbox selects.

use std::collections::HashMap;
use std::mem;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::producer::{BaseProducer, BaseRecord};

use super::client::{Context, SendFailure, Sent, new_producer};
use super::search::Search;
use super::shared::{Inbox, Letter, Membership, Record, Shared, Unacknowledged};
use crate::check::target::Target;
use crate::clock::{instant_now, wall_micros};
use crate::config::KafkaConfig;
use crate::kafka::Explainer;
use crate::lock::lock;
use crate::outage::Outage;
use crate::produce::outbox::{Kept, LaneId, Outbox, Sequence};
use crate::produce::share::Share;
use crate::sample::epoch;

/// How often the thread looks for letters and reports while records are in flight. No record wakes it, so 2,000 records a second
/// cost 50 wake-ups.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The same while all records wait for a topic.
const LOOK_EVERY_WAITING: Duration = Duration::from_millis(50);

/// The longest sleep without any records. The first letter ends it.
pub(super) const LOOK_EVERY_IDLE: Duration = Duration::from_secs(1);

pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) kafka: KafkaConfig,
    pub(super) explainer: Explainer,
    pub(super) producer: BaseProducer<Context>,
    pub(super) membership: Option<Membership>,
    pub(super) outbox: Outbox<Record>,
    /// By the index of the lane.
    pub(super) routes: Vec<Route>,
    pub(super) lane_of_share: HashMap<Share, LaneId>,
    pub(super) topics: Vec<Topic>,
    pub(super) topic_indices: HashMap<String, usize>,
    pub(super) claims_in_flight: usize,
    /// With KAFKA_TOPIC_FAILURES.
    pub(super) copies: Option<Copies>,
    /// Why the producer has failed. Nothing is sent until it is replaced.
    pub(super) spoiled: Option<String>,
    /// The search in the first topic with records in doubt.
    pub(super) search: Option<Search>,
    /// How many stored records were found.
    pub(super) found_stored: usize,
    pub(super) search_failed_at: Option<Instant>,
    pub(super) stop_by: Option<Instant>,
    pub(super) looked_for_topics_at: Option<Instant>,
    /// Why Kafka could not be asked for topics. `None`: it answered, or was not asked.
    pub(super) unreachable: Option<String>,
    pub(super) acknowledged_at: Instant,
    pub(super) reported_at: Instant,
    pub(super) silence: Outage,
    /// The number of refused records since the last log line, and the first of them.
    pub(super) refused: Option<(u64, String)>,
    pub(super) refused_reported_at: Option<Instant>,
}

/// The destination of a lane's records.
pub(super) struct Route {
    pub(super) lane: LaneId,
    /// The index in [`Worker::topics`].
    pub(super) topic: usize,
    /// Without a group, librdkafka computes the partition from the key.
    pub(super) share: Option<Share>,
}

pub(super) struct Topic {
    pub(super) name: String,
    /// Whether it is known to exist. Its records wait until then.
    pub(super) exists: bool,
    /// With PRODUCE_GROUP: whether a host's records go to this topic; otherwise true.
    pub(super) is_used: bool,
    /// Why it cannot be used. After Kafka has refused its records, only an acknowledged one resets this.
    pub(super) why_not: Option<String>,
    pub(super) was_refused: bool,
    /// Without a group: when the oldest of the records was sent that came back although Kafka may have stored them. Unix time
    /// in milliseconds.
    pub(super) in_doubt_since: Option<i64>,
    /// Its records and claims that librdkafka has.
    pub(super) in_flight: usize,
    pub(super) missing: Outage,
}

impl Topic {
    pub(super) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            exists: false,
            is_used: true,
            why_not: None,
            was_refused: false,
            in_doubt_since: None,
            in_flight: 0,
            missing: Outage::default(),
        }
    }

    pub(super) fn is_awaited(&self) -> bool {
        self.is_used && !self.exists
    }

    pub(super) fn mark_missing(&mut self, why: String) {
        self.exists = false;
        self.why_not = Some(why);
    }
}

/// The copies of failed checks.
pub(super) struct Copies {
    pub(super) lane: LaneId,
    pub(super) topic: usize,
    /// Waiting or in flight.
    pub(super) records: usize,
    pub(super) bytes: usize,
    /// Dropped since the last log line.
    pub(super) dropped: u64,
    pub(super) dropped_reported_at: Option<Instant>,
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        kafka: &KafkaConfig,
        membership: Option<Membership>,
    ) -> anyhow::Result<Self> {
        let explainer = Explainer::new(kafka);
        let mut worker = Self {
            producer: new_producer(kafka, shared.bounds, &explainer)?,
            kafka: kafka.clone(),
            explainer,
            membership,
            outbox: Outbox::default(),
            routes: Vec::new(),
            lane_of_share: HashMap::new(),
            topics: Vec::new(),
            topic_indices: HashMap::new(),
            claims_in_flight: 0,
            copies: None,
            spoiled: None,
            search: None,
            found_stored: 0,
            search_failed_at: None,
            stop_by: None,
            looked_for_topics_at: None,
            unreachable: None,
            acknowledged_at: instant_now(),
            reported_at: instant_now(),
            silence: Outage::default(),
            refused: None,
            refused_reported_at: None,
            shared,
        };
        // Ask for the topic at once, so that a missing topic or an absent Kafka is logged before the first record is due.
        let shared = Arc::clone(&worker.shared);
        worker.topic_index(&shared.default_topic);
        worker.start_copies();
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
            self.report_state();
            if let Some(stop_by) = self.stop_by
                && ((self.shared.on_the_way() == 0 && !self.has_copies_to_send()) || instant_now() >= stop_by)
            {
                break;
            }
        }
        self.log_left_copies();
        end(self.return_records());
        // The producer is dropped after the answer, because closing its connections may take longer than the stop may.
    }

    fn is_idle(&self) -> bool {
        self.outbox.is_idle() && !self.topics.iter().any(Topic::is_awaited)
    }

    /// The new letters, after a pause.
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
        mem::take(&mut inbox.letters)
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
            Letter::Topics(names) => self.use_topics(&names),
            Letter::Hold(share) => {
                let lane = self.lane_of_share(&share);
                self.outbox.doubt(lane);
            }
            Letter::Claim { share, epoch } => self.claim(share, epoch),
            Letter::Open(takeover) => {
                let lane = self.lane_of_share(&takeover.share);
                let out = self
                    .outbox
                    .take_share(lane, &takeover, |record| &record.target.address);
                // If no other producer had the share, the records were stored without an answer.
                self.release(lane, out, takeover.is_unbroken);
            }
            Letter::End { share, ends_at } => {
                let lane = self.lane_of_share(&share);
                self.outbox.end_share(lane, ends_at);
            }
            Letter::Forget(share) => {
                let lane = self.lane_of_share(&share);
                let out = self.outbox.forget_share(lane);
                self.release(lane, out, false);
            }
        }
    }

    /// The lane of a record without a share.
    fn lane_of_topic(&mut self, target: &Target) -> LaneId {
        let shared = Arc::clone(&self.shared);
        let topic = self.topic_index(shared.topic_of(target));
        let known = self
            .routes
            .iter()
            .find(|route| route.topic == topic && route.share.is_none() && !self.is_copy(route.lane));
        if let Some(route) = known {
            return route.lane;
        }
        self.add_open_lane(topic)
    }

    /// Adds a lane without a share.
    pub(super) fn add_open_lane(&mut self, topic: usize) -> LaneId {
        let lane = self.outbox.add_lane();
        self.outbox.open(lane);
        self.routes.push(Route {
            lane,
            topic,
            share: None,
        });
        lane
    }

    /// Sends the records that wait for topics that exist, in order.
    fn send_waiting(&mut self) {
        for index in 0..self.routes.len() {
            let (lane, topic) = (self.routes[index].lane, self.routes[index].topic);
            while self.spoiled.is_none()
                && self.topics[topic].exists
                && let Some((sequence, kept)) = self.outbox.next_to_send(lane)
            {
                if !self.send(index, sequence, kept) {
                    break;
                }
            }
            // While the producer is replaced, the search itself ends the doubt: a search that is left half done would be used for
            // the next topic.
            if self.spoiled.is_none()
                && self.outbox.waiting(lane).is_empty()
                && self.routes[index].share.is_none()
            {
                self.topics[topic].in_doubt_since = None;
            }
        }
    }

    /// Gives a record to librdkafka. Returns false if the record has to wait.
    fn send(&mut self, route: usize, sequence: Sequence, mut kept: Kept<Record>) -> bool {
        let Route { lane, topic, share } = &self.routes[route];
        let (lane, topic) = (*lane, *topic);
        if let Some(epoch) = self.outbox.epoch(lane) {
            epoch::write_into(&mut kept.record.value, epoch);
        }
        // Without a topic for copies, nobody needs the value again.
        kept.record.is_failed_check &= self.copies.is_some();
        let target = Arc::clone(&kept.record.target);
        let value = mem::take(&mut kept.record.value);
        let sent = Box::new(Sent::Record {
            lane,
            sequence,
            kept,
            at_millis: wall_micros() / 1_000,
        });
        let mut message = BaseRecord::with_opaque_to(&self.topics[topic].name, sent)
            .key(target.address.as_str())
            .payload(value.as_slice());
        if let Some(share) = share {
            message = message.partition(share.partition);
        }
        let Err((error, message)) = self.producer.send(message) else {
            self.note_sent(topic);
            return true;
        };
        let Sent::Record { mut kept, .. } = *message.delivery_opaque else {
            unreachable!("it is what was sent");
        };
        kept.record.value = value;
        match SendFailure::of(&error) {
            SendFailure::Record => {
                self.refuse(lane, &kept, &error);
                return true;
            }
            SendFailure::Topic(why) => self.topics[topic].mark_missing(why),
            // A full queue becomes empty again, and librdkafka reports a failed producer as a fatal error too.
            SendFailure::Producer(_) | SendFailure::Returned => {}
        }
        self.outbox.came_back(lane, sequence, kept);
        false
    }

    /// The number of records and claims that librdkafka has.
    pub(super) fn in_flight(&self) -> usize {
        self.outbox.in_flight() + self.claims_in_flight
    }

    /// Call it after the record or claim was counted as in flight.
    pub(super) fn note_sent(&mut self, topic: usize) {
        if self.in_flight() == 1 {
            // Until now there was nothing to acknowledge.
            self.acknowledged_at = instant_now();
        }
        self.topics[topic].in_flight += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;
    use std::sync::mpsc::channel;

    use rdkafka::mocking::MockCluster;
    use rdkafka::producer::Producer;
    use rdkafka::types::RDKafkaRespErr;

    use super::super::shared::Bounds;
    use super::*;
    use crate::config::KafkaSecurity;
    use crate::produce::host_file;

    fn settings_of(cluster: &MockCluster<'_, impl rdkafka::ClientContext>) -> KafkaConfig {
        KafkaConfig {
            bootstrap_servers: cluster.bootstrap_servers(),
            security: KafkaSecurity {
                tls: None,
                sasl: None,
            },
        }
    }

    #[test]
    fn the_first_claim_of_a_topic_that_exists_is_sent_and_a_missing_topic_is_waited_for_while_hosts_have_it()
    {
        const BOUND: Duration = Duration::from_secs(60);
        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic("t", 1, 1).unwrap();
        cluster.create_topic("other", 1, 1).unwrap();
        cluster
            .topic_error("missing", RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART)
            .unwrap();
        let shared = Arc::new(Shared::new("t", Bounds::default(), Arc::default()));
        let (events, heard) = channel();
        let membership = Membership {
            group: "eu".to_owned(),
            place: "eu".to_owned(),
            events,
        };
        let mut worker = Worker::new(shared, &settings_of(&cluster), Some(membership)).unwrap();
        let topics = ["other", "missing"].map(str::to_owned);
        worker.take(Letter::Topics(topics.to_vec()));
        let deadline = instant_now() + BOUND;
        let missing = |worker: &Worker| {
            let index = worker.topic_indices["missing"];
            worker.topics[index].why_not.is_some()
        };
        while !missing(&worker) {
            assert!(instant_now() < deadline, "Kafka says that the topic is missing");
            worker.looked_for_topics_at = None;
            worker.look_for_topics();
        }
        let share = Share {
            topic: "other".into(),
            partition: 0,
        };
        worker.take(Letter::Claim { share, epoch: 7 });
        assert_eq!(worker.claims_in_flight, 1, "{:?}", heard.try_recv());
        let waits = |worker: &Worker| worker.topics.iter().any(Topic::is_awaited);
        assert!(waits(&worker));
        worker.take(Letter::Topics(vec!["other".to_owned()]));
        assert!(!waits(&worker), "no host has the missing topic");
        worker.take(Letter::Topics(topics.to_vec()));
        assert!(waits(&worker));
    }

    #[test]
    fn the_reports_of_all_answered_requests_are_taken_at_once() {
        const PARTITIONS: i32 = 64;
        const BOUND: Duration = Duration::from_secs(60);
        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic("t", PARTITIONS, 1).unwrap();
        let shared = Arc::new(Shared::new("t", Bounds::default(), Arc::default()));
        let mut worker = Worker::new(shared, &settings_of(&cluster), None).unwrap();
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
            let record = Record::new(Arc::new(target), None, 0, b"{}".to_vec(), false);
            let bytes = &worker.shared.deliveries.bytes_on_the_way;
            bytes.fetch_add(record.bytes, Ordering::Relaxed);
            worker.take(Letter::Record(record));
        }
        worker.send_waiting();
        assert_eq!(worker.in_flight(), 256);
        // librdkafka sends one request for each partition.
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
        let bytes = worker.shared.deliveries.bytes_on_the_way.load(Ordering::Relaxed);
        assert_eq!(bytes, 0, "every record gives back the room that it took");
        assert!(
            looks <= 8,
            "{looks} looks for the reports of about {PARTITIONS} requests"
        );
    }
}
