//! Without a group: looks for records that came back although Kafka has stored them, before they are sent again.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rdkafka::error::KafkaError;

use super::search::{QUESTIONS_WITHIN, Search};
use super::worker::Worker;
use crate::clock::instant_now;
use crate::kafka::reader::is_forbidden;

/// How long the thread searches before it does something else, how long it waits after a failed attempt, and after how long it
/// gives up: a minute is enough to read what a full buffer may have left in a topic.
const SEARCH_STEP: Duration = Duration::from_millis(100);
const SEARCH_AGAIN_AFTER: Duration = Duration::from_secs(1);
const SEARCH_WITHIN: Duration = Duration::from_secs(60);

impl Worker {
    /// Removes the records that Kafka has stored from those that wait. Returns whether the search is over. If Kafka does not let
    /// us read, or not in time, the records are sent again: two records of a tick are better than none.
    pub(super) fn search_stored(&mut self) -> bool {
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

    fn search_topic(&mut self, index: usize) -> Result<bool, KafkaError> {
        let topic = &mut self.topics[index];
        let route = self
            .routes
            .iter()
            .find(|route| route.topic == index && route.share.is_none());
        let (Some(since), Some(route)) = (topic.in_doubt_since, route) else {
            topic.in_doubt_since = None;
            return Ok(true);
        };
        let waiting = self.outbox.waiting(route.lane);
        let search = match &mut self.search {
            Some(search) => search,
            none => none.insert(Search::new(&self.kafka, &topic.name, since, waiting)?),
        };
        let mut found = Vec::new();
        let is_over = search.go_on(instant_now() + SEARCH_STEP, waiting, |sequence| {
            found.push(sequence)
        })?;
        let took = instant_now().duration_since(search.begun());
        let lane = route.lane;
        let stored = self.outbox.discard(lane, |sequence, _| found.contains(&sequence));
        self.found_stored += stored.len();
        if !self.is_copy(lane) {
            let delivered = &self.shared.deliveries.delivered;
            delivered.fetch_add(stored.len() as u64, Ordering::Relaxed);
        }
        self.release(lane, stored, true);
        if is_over {
            self.search = None;
            self.topics[index].in_doubt_since = None;
        } else if took > SEARCH_WITHIN {
            self.give_up_search(index, "reading it took too long");
            return Ok(true);
        }
        Ok(is_over)
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
}
