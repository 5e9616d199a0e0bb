//! Without a group: what came back from Kafka and may be stored all the same is looked for before it is sent again.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rdkafka::error::KafkaError;

use super::search::{QUESTIONS_WITHIN, Search};
use super::worker::Worker;
use crate::clock::instant_now;
use crate::kafka::reader::is_forbidden;

/// How long a look for records that Kafka may have goes on before the thread sees to everything else again, how long after
/// one that failed the next one comes, and after how long it is given up.
const SEARCH_STEP: Duration = Duration::from_millis(100);
const SEARCH_AGAIN_AFTER: Duration = Duration::from_secs(1);
const SEARCH_WITHIN: Duration = Duration::from_secs(60);

impl Worker {
    /// Takes out of what waits what Kafka has stored without saying so; false: that is not over yet. Where Kafka does not
    /// let us look, or not within a bound, those records go out again: twice is better than not at all, and both have the
    /// same `scheduled_at`.
    pub(super) fn has_looked_for_stored(&mut self) -> bool {
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
            match self.look_for_stored(index) {
                Ok(true) => {}
                Ok(false) => return false,
                Err(error) if is_forbidden(&error) => self.give_up_looking(index, &error.to_string()),
                Err(error) => {
                    // Asked again by the same client, which connects meanwhile.
                    log::debug!("cannot look for what is stored: {error}");
                    self.search_failed_at = Some(now);
                    return false;
                }
            }
        }
        true
    }

    fn look_for_stored(&mut self, index: usize) -> Result<bool, KafkaError> {
        let topic = &mut self.topics[index];
        let way = self
            .ways
            .iter()
            .find(|way| way.topic == index && way.share.is_none());
        let (Some(since), Some(way)) = (topic.in_doubt_since, way) else {
            topic.in_doubt_since = None;
            return Ok(true);
        };
        let waiting = self.outbox.waiting(way.lane);
        let search = match &mut self.search {
            Some(search) => search,
            none => none.insert(Search::new(&self.kafka, &topic.name, since, waiting)?),
        };
        let mut found = Vec::new();
        let is_over = search.go_on(instant_now() + SEARCH_STEP, waiting, |sequence| {
            found.push(sequence)
        })?;
        let took = instant_now().duration_since(search.begun());
        let stored = self
            .outbox
            .discard(way.lane, |sequence, _| found.contains(&sequence));
        self.found_stored += stored.len();
        let delivered = &self.shared.deliveries.delivered;
        delivered.fetch_add(stored.len() as u64, Ordering::Relaxed);
        self.release(&stored);
        if is_over {
            self.search = None;
            self.topics[index].in_doubt_since = None;
        } else if took > SEARCH_WITHIN {
            self.give_up_looking(index, "Kafka did not let us read it to its end in time");
            return Ok(true);
        }
        Ok(is_over)
    }

    fn give_up_looking(&mut self, index: usize, why: &str) {
        let topic = &mut self.topics[index];
        log::warn!(
            "topic={} records that Kafka stored without saying so may be there twice, because we cannot look: {why}",
            topic.name
        );
        topic.in_doubt_since = None;
        self.search = None;
    }
}
