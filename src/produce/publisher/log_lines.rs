//! What the publisher logs about Kafka and topics: each outage when it begins, from time to time, and when it ends.

use std::time::Instant;

use rdkafka::producer::Producer;

use super::shared::Deliveries;
use super::worker::{LOOK_EVERY_IDLE, Worker};
use crate::clock::instant_now;
use crate::kafka::names_a_cause;
use crate::outage::SAY_AFTER;

const NO_ANSWER: &str = "it does not acknowledge any record";

impl Worker {
    pub(super) fn report_state(&mut self) {
        let now = instant_now();
        if now.duration_since(self.reported_at) > 2 * LOOK_EVERY_IDLE {
            // This process was suspended, so the silence does not mean that Kafka is away.
            self.acknowledged_at = now;
        }
        self.reported_at = now;
        self.report_silence(now);
        self.report_missing_topics(now);
        self.report_refused(now);
        self.report_dropped_copies(now);
        let Deliveries {
            heartbeat, readiness, ..
        } = &*self.shared.deliveries;
        heartbeat.beat();
        readiness.set(self.is_ready(now));
    }

    /// Whether Kafka accepts records; if not, what the publisher waits for. Without records on their way it counts as ready.
    fn is_ready(&self, now: Instant) -> Result<(), String> {
        let silent = self.silent_since(now).map(|(_, reason)| reason);
        if let Some(reason) = silent.as_ref().or(self.spoiled.as_ref()) {
            let servers = &self.kafka.bootstrap_servers;
            return Err(format!("waiting for Kafka at {servers}: {reason}"));
        }
        let mut topics = self.topics.iter().enumerate();
        let missing = topics.find(|(index, topic)| topic.is_awaited() && !self.is_for_copies(*index));
        let Some((_, topic)) = missing else {
            return Ok(());
        };
        let why_not = topic.why_not.as_deref().unwrap_or("Kafka has not answered yet");
        Err(format!("waiting for the topic {}: {why_not}", topic.name))
    }

    /// Since when Kafka cannot be reached or does not acknowledge records, and why.
    fn silent_since(&self, now: Instant) -> Option<(Instant, String)> {
        if let Some(reason) = &self.unreachable {
            return Some((now, reason.clone()));
        }
        let is_silent = self.in_flight() > 0 && now.duration_since(self.acknowledged_at) >= SAY_AFTER;
        let reason = || self.producer.context().last_error();
        is_silent.then(|| {
            (
                self.acknowledged_at,
                reason().unwrap_or_else(|| NO_ANSWER.to_owned()),
            )
        })
    }

    fn report_silence(&mut self, now: Instant) {
        let (kept, room) = (self.shared.on_the_way(), self.shared.bounds.records);
        let Some((since, reason)) = self.silent_since(now) else {
            if let Some(lasted) = self.silence.end(now) {
                let seconds = lasted.as_secs();
                log::info!("Kafka is back after {seconds} s; records on their way: {kept}");
            }
            return;
        };
        let has_cause = reason != NO_ANSWER && names_a_cause(&reason);
        self.silence.begin(since, reason);
        self.silence.set_cause_known(has_cause);
        if let Some((reason, lasted)) = self.silence.take_report(now) {
            log::warn!(
                "waiting for Kafka at {}: {reason} (for {} s); buffered records: {kept} of {room}",
                self.kafka.bootstrap_servers,
                lasted.as_secs()
            );
        }
    }

    fn report_missing_topics(&mut self, now: Instant) {
        let kept: Vec<usize> = (0..self.topics.len())
            .map(|index| self.waiting_of(index))
            .collect();
        for (index, topic) in self.topics.iter_mut().enumerate() {
            let (name, kept) = (&topic.name, kept[index]);
            let Some(why_not) = topic.why_not.as_ref().filter(|_| topic.is_used) else {
                if let Some(lasted) = topic.missing.end(now)
                    && topic.is_used
                {
                    log::info!("the topic {name} exists now, after {} s", lasted.as_secs());
                }
                continue;
            };
            topic.missing.begin(now, why_not.clone());
            if let Some((why_not, lasted)) = topic.missing.take_report(now) {
                log::warn!(
                    "waiting for the topic {name}: {why_not} (for {} s); `host-metrics init` creates topics; buffered \
                     records: {kept}",
                    lasted.as_secs()
                );
            }
        }
    }

    fn report_dropped_copies(&mut self, now: Instant) {
        let name = self.shared.failures_topic.as_deref().unwrap_or_default();
        let is_early = |at: Instant| now.duration_since(at) < SAY_AFTER;
        if let Some(copies) = &mut self.copies
            && copies.dropped > 0
            && !copies.dropped_reported_at.is_some_and(is_early)
        {
            copies.dropped_reported_at = Some(now);
            log::error!(
                "topic={name} {} copies of failed checks were dropped; their records are in the main topic",
                std::mem::take(&mut copies.dropped)
            );
        }
    }

    fn report_refused(&mut self, now: Instant) {
        let is_early = |at: Instant| now.duration_since(at) < SAY_AFTER;
        if self.refused_reported_at.is_some_and(is_early) {
            return;
        }
        if let Some((count, first)) = self.refused.take() {
            log::error!(
                "refused={count} records are lost because Kafka refused them for good, the first one of {first}"
            );
            self.refused_reported_at = Some(now);
        }
    }
}
