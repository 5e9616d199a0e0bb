//! The topics of the records: whether they exist, and what happens while one is missing.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use rdkafka::producer::Producer;

use super::shared::PART_OF_A_MISSING_TOPIC;
use super::worker::{Topic, Worker};
use crate::clock::instant_now;
use crate::kafka::look_up_topic;
use crate::lock::lock;

/// How often Kafka is asked for a missing topic, and how long the answer may take.
const LOOK_FOR_TOPIC_EVERY: Duration = Duration::from_secs(1);
const LOOK_FOR_TOPIC_WITHIN: Duration = Duration::from_millis(500);

impl Worker {
    pub(super) fn topic_index(&mut self, name: &str) -> usize {
        if let Some(index) = self.topic_indices.get(name) {
            return *index;
        }
        self.topics.push(Topic::new(name));
        self.topic_indices.insert(name.to_owned(), self.topics.len() - 1);
        self.looked_for_topics_at = None;
        self.topics.len() - 1
    }

    /// The topics of the group's hosts.
    pub(super) fn use_topics(&mut self, names: &[String]) {
        for name in names {
            self.topic_index(name);
        }
        for index in 0..self.topics.len() {
            self.topics[index].is_used =
                names.contains(&self.topics[index].name) || self.is_for_copies(index);
        }
    }

    /// Asks Kafka for the topics that are not known to exist. A topic whose records are in flight has to wait: the records come
    /// back, and must be sent before later ones.
    pub(super) fn look_for_topics(&mut self) {
        let missing = |topic: &Topic| topic.is_awaited() && topic.in_flight == 0;
        let now = instant_now();
        let is_early = |at: Instant| now.duration_since(at) < LOOK_FOR_TOPIC_EVERY;
        if !self.topics.iter().any(missing) || self.looked_for_topics_at.is_some_and(is_early) {
            return;
        }
        self.looked_for_topics_at = Some(now);
        self.unreachable = None;
        for topic in self.topics.iter_mut().filter(|topic| missing(topic)) {
            let client = self.producer.client();
            match look_up_topic(client, &topic.name, LOOK_FOR_TOPIC_WITHIN) {
                Ok(found) => {
                    topic.exists = found.is_ok();
                    match found {
                        Err(error) => topic.why_not = Some(error.to_string()),
                        Ok(_) if !topic.was_refused => topic.why_not = None,
                        Ok(_) => {}
                    }
                }
                // Kafka cannot be reached, so asking for the next topic is useless.
                Err(error) => {
                    let last = self.producer.context().last_error();
                    let unknown = || self.explainer.explain(&error.to_string());
                    self.unreachable = Some(last.unwrap_or_else(unknown));
                    break;
                }
            }
        }
    }

    /// Publishes which missing topics have used up their part of the buffer.
    pub(super) fn mark_crowded_topics(&self) {
        let share = self.shared.bounds.records / PART_OF_A_MISSING_TOPIC;
        // While Kafka cannot be reached, no topic counts as missing.
        let is_missing = |topic: &Topic| !topic.exists && topic.why_not.is_some();
        let is_crowded = |index: &usize| is_missing(&self.topics[*index]) && self.waiting_of(*index) >= share;
        let crowded: HashSet<String> = (0..self.topics.len())
            .filter(is_crowded)
            .map(|index| self.topics[index].name.clone())
            .collect();
        *lock(&self.shared.crowded) = crowded;
    }

    /// The number of records that wait for this topic.
    pub(super) fn waiting_of(&self, topic: usize) -> usize {
        let routes = self.routes.iter().filter(|route| route.topic == topic);
        routes.map(|way| self.outbox.waiting(way.lane).len()).sum()
    }
}
