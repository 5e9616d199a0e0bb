//! KAFKA_TOPIC_FAILURES: a copy of every failed check, sent when Kafka has acknowledged its record.
//!
//! Copies have their own lane and their own bounds. A missing topic for them delays nothing else: the copies wait, and when there
//! are too many of them, further ones are dropped and counted.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::shared::{PART_OF_A_MISSING_TOPIC, Record};
use super::worker::{Copies, Worker};
use crate::check::target::Target;
use crate::produce::outbox::{Kept, LaneId};

impl Worker {
    pub(super) fn start_copies(&mut self) {
        let Some(topic) = self.shared.failures_topic.clone() else {
            return;
        };
        let topic = self.topic_index(&topic);
        let lane = self.add_open_lane(topic);
        self.copies = Some(Copies {
            lane,
            topic,
            records: 0,
            bytes: 0,
            dropped: 0,
            dropped_reported_at: None,
        });
    }

    pub(super) fn is_copy(&self, lane: LaneId) -> bool {
        self.copies.as_ref().is_some_and(|copies| copies.lane == lane)
    }

    /// Whether the topic is the one for copies.
    pub(super) fn is_for_copies(&self, topic: usize) -> bool {
        self.copies.as_ref().is_some_and(|copies| copies.topic == topic)
    }

    /// Takes a copy of a failed check, with the bytes that Kafka has stored.
    fn copy(&mut self, target: Arc<Target>, tick: i64, value: Vec<u8>) {
        let bounds = self.shared.bounds;
        let Some(copies) = &mut self.copies else {
            return;
        };
        let record = Record::new(target, None, tick, value, false);
        if copies.records >= bounds.records / PART_OF_A_MISSING_TOPIC
            || copies.bytes >= bounds.bytes / PART_OF_A_MISSING_TOPIC
        {
            return self.drop_copy();
        }
        copies.records += 1;
        copies.bytes += record.bytes;
        let lane = copies.lane;
        self.outbox.take(lane, tick, record);
    }

    /// A copy has left the outbox.
    pub(super) fn copy_left(&mut self, bytes: usize, is_delivered: bool) {
        if let Some(copies) = &mut self.copies {
            copies.records -= 1;
            copies.bytes -= bytes;
        }
        match is_delivered {
            true => {
                let delivered = &self.shared.deliveries.copies_delivered;
                delivered.fetch_add(1, Ordering::Relaxed);
            }
            false => self.drop_copy(),
        }
    }

    /// Records have left the outbox of this lane: Kafka has stored them, or another producer has recorded their ticks.
    pub(super) fn release(
        &mut self,
        lane: LaneId,
        out: impl IntoIterator<Item = Kept<Record>>,
        is_stored: bool,
    ) {
        for Kept { tick, record } in out {
            if self.is_copy(lane) {
                self.copy_left(record.bytes, is_stored);
                continue;
            }
            let deliveries = &self.shared.deliveries;
            let count = match is_stored {
                true => &deliveries.delivered,
                false => &deliveries.superseded,
            };
            count.fetch_add(1, Ordering::Relaxed);
            self.shared.release(record.bytes);
            if is_stored && record.is_failed_check {
                self.copy(record.target, tick, record.value);
            }
        }
    }

    fn drop_copy(&mut self) {
        self.shared
            .deliveries
            .copies_dropped
            .fetch_add(1, Ordering::Relaxed);
        if let Some(copies) = &mut self.copies {
            copies.dropped += 1;
        }
    }

    /// Whether copies are on their way to a topic that is not known to be missing.
    pub(super) fn has_copies_to_send(&self) -> bool {
        self.copies.as_ref().is_some_and(|copies| {
            let topic = &self.topics[copies.topic];
            copies.records > 0 && (topic.exists || topic.why_not.is_none())
        })
    }

    pub(super) fn log_left_copies(&self) {
        if let Some(copies) = &self.copies
            && copies.records > 0
        {
            log::warn!(
                "topic={} did not get {} copies of failed checks; their records are in the main topic",
                self.topics[copies.topic].name,
                copies.records
            );
        }
    }
}
