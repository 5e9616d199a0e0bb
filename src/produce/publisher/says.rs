//! What the publisher says of Kafka and of topics: what is wrong, at most once in a while, and that it is over.

use std::sync::atomic::Ordering;
use std::time::Instant;

use rdkafka::producer::Producer;

use super::Deliveries;
use super::worker::{LOOK_EVERY_IDLE, Worker};
use crate::clock::instant_now;
use crate::kafka::names_a_cause;
use crate::outage::SAY_AFTER;

impl Worker {
    /// Tells what is wrong, at most once in a while, and that it is over.
    pub(super) fn say(&mut self) {
        let now = instant_now();
        if now.duration_since(self.said_at) > 2 * LOOK_EVERY_IDLE {
            // Not Kafka was silent, we did not listen.
            self.acknowledged_at = now;
        }
        self.said_at = now;
        self.say_silence(now);
        self.say_missing_topics(now);
        self.say_refused(now);
        let Deliveries {
            heartbeat, readiness, ..
        } = &*self.shared.deliveries;
        heartbeat.beat();
        readiness.set(self.is_ready(now));
    }

    /// Whether records get through, or what is waited for. With nothing on the way nobody knows, and nobody minds.
    fn is_ready(&self, now: Instant) -> Result<(), String> {
        let is_silent = self.in_flight() > 0 && now.duration_since(self.acknowledged_at) >= SAY_AFTER;
        let reason = if let Some(reason) = &self.unreachable {
            reason.clone()
        } else if is_silent {
            let last = self.producer.context().last_error();
            last.unwrap_or_else(|| "it acknowledges nothing".to_owned())
        } else if let Some(reason) = &self.spoiled {
            reason.clone()
        } else {
            let Some(topic) = self.topics.iter().find(|topic| !topic.is_there) else {
                return Ok(());
            };
            let why_not = topic.why_not.as_deref().unwrap_or("Kafka has not answered yet");
            return Err(format!("waiting for topic {}: {why_not}", topic.name));
        };
        Err(format!("waiting for Kafka at {}: {reason}", self.servers))
    }

    fn say_silence(&mut self, now: Instant) {
        let is_silent = |since: &Instant| self.in_flight() > 0 && now.duration_since(*since) >= SAY_AFTER;
        let since = match self.unreachable {
            Some(_) => Some(now),
            None => Some(self.acknowledged_at).filter(is_silent),
        };
        let (servers, room) = (&self.servers, self.shared.bounds.records);
        let kept = self.shared.deliveries.records_on_the_way.load(Ordering::Relaxed);
        let Some(since) = since else {
            if let Some(lasted) = self.silence.end(now) {
                let seconds = lasted.as_secs();
                log::info!(
                    "kafka={servers} answers again after {seconds} s; {kept} records are on their way"
                );
            }
            return;
        };
        let reason = self.unreachable.clone();
        let reason = reason.or_else(|| self.producer.context().last_error());
        let has_cause = reason.as_deref().is_some_and(names_a_cause);
        let reason = reason.unwrap_or_else(|| "it acknowledges nothing".to_owned());
        self.silence.begin(since, reason);
        self.silence.set_cause_known(has_cause);
        if let Some((reason, lasted)) = self.silence.take_report(now) {
            log::warn!(
                "kafka={servers} waiting for it for {} s: {reason}; {kept} records are kept, {room} can be",
                lasted.as_secs()
            );
        }
    }

    fn say_missing_topics(&mut self, now: Instant) {
        let kept: Vec<usize> = (0..self.topics.len())
            .map(|index| self.waiting_of(index))
            .collect();
        for (index, topic) in self.topics.iter_mut().enumerate() {
            let (name, kept) = (&topic.name, kept[index]);
            let Some(why_not) = &topic.why_not else {
                if let Some(lasted) = topic.missing.end(now) {
                    log::info!("topic={name} is there after {} s", lasted.as_secs());
                }
                continue;
            };
            topic.missing.begin(now, why_not.clone());
            if let Some((why_not, lasted)) = topic.missing.take_report(now) {
                log::warn!(
                    "topic={name} waiting for it for {} s: {why_not}; `host-metrics init` creates topics; {kept} of its \
                     records are kept",
                    lasted.as_secs()
                );
            }
        }
    }

    fn say_refused(&mut self, now: Instant) {
        let is_early = |at: Instant| now.duration_since(at) < SAY_AFTER;
        if self.refused_said_at.is_some_and(is_early) {
            return;
        }
        if let Some((count, first)) = self.refused.take() {
            log::error!(
                "refused={count} records that Kafka will never take are lost, the first of them {first}"
            );
            self.refused_said_at = Some(now);
        }
    }
}
