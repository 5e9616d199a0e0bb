//! What librdkafka reports about records, what follows from it, and how a failed producer is replaced.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::producer::{Producer, PurgeConfig};

use super::client::{Report, SendFailure, Sent, new_producer};
use super::search::{QUESTIONS_WITHIN, Search};
use super::shared::{Letter, Record, Unacknowledged};
use super::worker::{LOOK_EVERY, Route, Worker};
use crate::clock::instant_now;
use crate::kafka::reader::is_forbidden;
use crate::lock::lock;
use crate::produce::outbox::{Kept, LaneId, Sequence};
use crate::produce::share::events::Event;

/// How long the thread waits at the end until librdkafka returns its records.
const RETURN_WITHIN: Duration = Duration::from_millis(200);

/// How long the search for stored records waits after a failed attempt.
const SEARCH_AGAIN_AFTER: Duration = Duration::from_secs(1);

impl Worker {
    /// Takes all reports of librdkafka without waiting, because a poll with a timeout spins during its last millisecond. One poll
    /// takes the reports of one request, and there may be hundreds of requests.
    pub(super) fn serve(&mut self) {
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
        match *report.sent {
            Sent::Record {
                lane,
                sequence,
                kept,
                at_millis,
            } => self.take_record_report(lane, sequence, kept, at_millis, report.outcome),
            Sent::Claim { share, epoch } => {
                let lane = self.lane_of_share(&share);
                let topic = self.routes[lane.index()].topic;
                self.claims_in_flight -= 1;
                self.topics[topic].in_flight -= 1;
                let offset = match report.outcome {
                    Ok(offset) => {
                        self.topic_takes(topic);
                        Ok(offset)
                    }
                    Err(error) => {
                        self.blame(topic, SendFailure::of(&error));
                        Err(error.to_string())
                    }
                };
                self.tell_shares(Event::Claimed { share, epoch, offset });
            }
        }
    }

    fn take_record_report(
        &mut self,
        lane: LaneId,
        sequence: Sequence,
        kept: Kept<Record>,
        at_millis: i64,
        outcome: Result<i64, KafkaError>,
    ) {
        let Route { topic, share, .. } = &self.routes[lane.index()];
        let (topic, has_share) = (*topic, share.is_some());
        self.topics[topic].in_flight -= 1;
        let error = match outcome {
            Ok(offset) => {
                self.topic_takes(topic);
                self.outbox.done(lane, kept.tick, Some(offset));
                return self.release(lane, [kept], true);
            }
            Err(error) => error,
        };
        let failure = SendFailure::of(&error);
        if matches!(failure, SendFailure::Record) {
            return self.refuse(lane, &kept, &error);
        }
        self.shared.deliveries.failed.fetch_add(1, Ordering::Relaxed);
        if !has_share {
            let since = &mut self.topics[topic].in_doubt_since;
            *since = Some(since.map_or(at_millis, |since| since.min(at_millis)));
        }
        self.outbox.came_back(lane, sequence, kept);
        self.blame(topic, failure);
    }

    fn topic_takes(&mut self, topic: usize) {
        self.topics[topic].why_not = None;
        self.topics[topic].was_refused = false;
    }

    pub(super) fn blame(&mut self, topic: usize, failure: SendFailure) {
        match failure {
            SendFailure::Topic(why) => {
                self.topics[topic].mark_missing(why);
                self.topics[topic].was_refused = true;
                self.doubt(|route| route.topic == topic);
            }
            SendFailure::Producer(why) => self.spoil(why),
            SendFailure::Record | SendFailure::Returned => {}
        }
    }

    /// Kafka has refused a record in flight for good.
    pub(super) fn refuse(&mut self, lane: LaneId, kept: &Kept<Record>, error: &KafkaError) {
        let Kept { tick, record } = kept;
        self.outbox.done(lane, *tick, None);
        if self.is_copy(lane) {
            return self.copy_left(record.bytes, false);
        }
        self.shared.deliveries.refused.fetch_add(1, Ordering::Relaxed);
        self.shared.release(record.bytes);
        let first = || (0, format!("{}: {error}", record.target.address));
        self.refused.get_or_insert_with(first).0 += 1;
    }

    /// The producer cannot deliver valid records, for example because the broker has forgotten what it sent. Takes back
    /// everything that is not sent yet, to keep the order.
    pub(super) fn spoil(&mut self, why: String) {
        if self.spoiled.is_none() {
            self.spoiled = Some(why);
            self.producer.purge(PurgeConfig::default().queue().non_blocking());
            self.doubt(|_| true);
        }
    }

    /// Replaces a failed producer once all its records have come back and the stored ones among them were found.
    pub(super) fn replace_spoiled_producer(&mut self) {
        if self.in_flight() > 0 || self.spoiled.is_none() || !self.search_stored() {
            return;
        }
        let Some(why) = &self.spoiled else {
            return;
        };
        match new_producer(&self.kafka, self.shared.bounds, &self.explainer) {
            Ok(producer) => {
                let (kept, found) = (self.waiting_records(), self.found_stored);
                log::error!(
                    "kafka={} the producer failed and is replaced; {kept} records are sent again, {found} were stored already: {why}",
                    self.kafka.bootstrap_servers
                );
                self.found_stored = 0;
                self.producer = producer;
                self.spoiled = None;
            }
            Err(error) => log::error!("kafka={} {error:#}; trying again", self.kafka.bootstrap_servers),
        }
    }

    /// Removes the records that Kafka has stored from those that wait. Returns whether the search is over. If Kafka does not let
    /// us read, or not in time, the records are sent again: two records of a tick are better than none.
    fn search_stored(&mut self) -> bool {
        let now = instant_now();
        let is_early = |at: Instant| now.duration_since(at) < SEARCH_AGAIN_AFTER;
        let is_late = |stop_by: Instant| now + QUESTIONS_WITHIN > stop_by;
        if self.search_failed_at.is_some_and(is_early) || self.stop_by.is_some_and(is_late) {
            return false;
        }
        while let Some(index) = self
            .topics
            .iter()
            .position(|topic| topic.in_doubt_since.is_some())
        {
            match self.search_topic(index) {
                Ok(true) => {}
                Ok(false) => return false,
                Err(error) if is_forbidden(&error) => self.give_up_search(index, &error.to_string()),
                Err(error) => {
                    // The client stays, and may connect before the next attempt.
                    log::debug!("cannot search for stored records: {error}");
                    self.search_failed_at = Some(now);
                    return false;
                }
            }
        }
        true
    }

    /// Searches for a while. Returns whether the search is over.
    fn search_topic(&mut self, index: usize) -> KafkaResult<bool> {
        let topic = &mut self.topics[index];
        let route = self
            .routes
            .iter()
            .find(|route| route.topic == index && route.share.is_none());
        let (Some(since), Some(route)) = (topic.in_doubt_since, route) else {
            topic.in_doubt_since = None;
            self.search = None;
            return Ok(true);
        };
        let lane = route.lane;
        let waiting = self.outbox.waiting(lane);
        let search = match &mut self.search {
            Some(search) => search,
            none => none.insert(Search::new(&self.kafka, waiting)?),
        };
        let (found, is_over) = search.go_on(&topic.name, since, waiting)?;
        let is_late = search.takes_too_long();
        let stored = self.outbox.discard(lane, |sequence, _| found.contains(&sequence));
        self.found_stored += stored.len();
        self.release(lane, stored, true);
        if is_over {
            self.search = None;
            self.topics[index].in_doubt_since = None;
        } else if is_late {
            self.give_up_search(index, "reading it took too long");
        }
        Ok(is_over || is_late)
    }

    fn give_up_search(&mut self, index: usize, why: &str) {
        let topic = &mut self.topics[index];
        log::warn!(
            "topic={} may contain some records twice, because it cannot be searched for those that Kafka stored without acknowledging them: {why}",
            topic.name
        );
        topic.in_doubt_since = None;
        self.search = None;
    }

    fn waiting_records(&self) -> usize {
        self.routes
            .iter()
            .map(|route| self.outbox.waiting(route.lane).len())
            .sum()
    }

    /// The records that are left: those of librdkafka, those that wait for a topic or a share, and those in the inbox.
    pub(super) fn return_records(&mut self) -> Unacknowledged {
        let missing = (0..self.topics.len())
            .find(|index| {
                !self.topics[*index].exists && self.waiting_of(*index) > 0 && !self.is_for_copies(*index)
            })
            .map(|index| format!("topic {} does not exist", self.topics[index].name));
        let reason = self.unreachable.clone().or(missing);
        let reason = reason.or_else(|| self.producer.context().last_error());
        if self.in_flight() > 0 {
            self.producer
                .purge(PurgeConfig::default().queue().inflight().non_blocking());
            let deadline = instant_now() + RETURN_WITHIN;
            while self.in_flight() > 0 && instant_now() < deadline {
                self.producer.poll(LOOK_EVERY);
                self.serve();
            }
        }
        let mut per_address = BTreeMap::new();
        let mut count = |record: &Record| {
            *per_address.entry(record.target.address.clone()).or_insert(0) += 1;
        };
        for route in self.routes.iter().filter(|route| !self.is_copy(route.lane)) {
            self.outbox
                .waiting(route.lane)
                .values()
                .for_each(|kept| count(&kept.record));
        }
        for letter in &lock(&self.shared.inbox).letters {
            if let Letter::Record(record) = letter {
                count(record);
            }
        }
        let named: u64 = per_address.values().sum();
        let left = self.shared.on_the_way() as u64;
        if left > named {
            per_address.insert("hosts that librdkafka did not name".to_owned(), left - named);
        }
        Unacknowledged { per_address, reason }
    }
}
