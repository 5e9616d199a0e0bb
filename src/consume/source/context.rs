//! What librdkafka's callbacks report about the consumer.
//!
//! librdkafka calls them in the thread that polls, and from `drop`. They only record what happened, and tell librdkafka what it
//! waits to be told in a rebalance.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use log::Level;
use rdkafka::TopicPartitionList;
use rdkafka::client::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::statistics::Statistics;
use rdkafka::types::RDKafkaRespErr;

use crate::clock::instant_now;
use crate::consume::batch::{NextOffset, Partition};
use crate::consume::ingest::Event;
use crate::consume::stuck::{FetchState, Stuck};
use crate::kafka::Explainer;
use crate::lock::lock;
use crate::outage::Outage;

pub(super) struct Context {
    pub(super) membership: Membership,
    pub(super) reported: Mutex<Reported>,
}

/// What a consumer needs to join a group. A consumer that joins again takes it over.
#[derive(Clone)]
pub(super) struct Membership {
    pub(super) client: ClientConfig,
    pub(super) explainer: Explainer,
    pub(super) topics: Vec<&'static str>,
    /// Another consumer of this process reads the same topics, and logs the same.
    pub(super) is_second: bool,
}

impl Membership {
    /// The second consumer of a process does not repeat what the first one logs.
    pub(super) fn level(&self, level: Level) -> Level {
        if self.is_second { Level::Debug } else { level }
    }

    pub(super) fn partition(&self, topic: &str, number: i32) -> Option<Partition> {
        let topic = *self.topics.iter().find(|known| **known == topic)?;
        Some(Partition::new(topic, number))
    }
}

#[derive(Default)]
pub(super) struct Reported {
    pub(super) events: VecDeque<Event>,
    /// Whether the group has assigned our partitions, of which there may be none.
    pub(super) is_member: bool,
    pub(super) ends: BTreeMap<Partition, NextOffset>,
    /// No broker can be reached, or none accepts our login.
    pub(super) away: Outage,
    pub(super) all_down_at: Option<Instant>,
    /// A broker accepts our login, but not our requests.
    pub(super) refused: Outage,
    pub(super) missing: Outage,
    pub(super) stuck: Stuck,
    /// The reason for the next "all brokers are down".
    pub(super) last_reason: Option<String>,
}

impl Reported {
    /// What we may be waiting for.
    pub(super) fn waiting(&mut self) -> [(&'static str, &mut Outage); 3] {
        [
            ("waiting for Kafka", &mut self.away),
            ("Kafka denies access", &mut self.refused),
            ("waiting for the topic", &mut self.missing),
        ]
    }
}

impl Context {
    /// A panic leaves nothing half written, so a poisoned lock is still usable.
    pub(super) fn reported(&self) -> MutexGuard<'_, Reported> {
        lock(&self.reported)
    }

    fn connected(&self, reported: &mut Reported) {
        reported.last_reason = None;
        if let Some(lasted) = reported.away.end(instant_now()) {
            log::log!(
                self.membership.level(Level::Info),
                "Kafka is back after {} s",
                lasted.as_secs()
            );
        }
    }

    fn partitions(&self, list: &TopicPartitionList) -> Vec<Partition> {
        let elements = list.elements();
        let known = elements
            .iter()
            .filter_map(|element| self.membership.partition(element.topic(), element.partition()));
        known.collect()
    }

    /// Those of the partitions that are being read. librdkafka refuses to unassign a list with any other.
    pub(super) fn being_read(
        &self,
        consumer: &BaseConsumer<Self>,
        which: impl Fn(&Partition) -> bool,
    ) -> KafkaResult<TopicPartitionList> {
        let mut list = TopicPartitionList::new();
        for partition in self
            .partitions(&consumer.assignment()?)
            .iter()
            .filter(|p| which(p))
        {
            list.add_partition(partition.topic, partition.number);
        }
        Ok(list)
    }
}

impl ClientContext for Context {
    /// In an outage librdkafka writes many lines. What matters of them is logged elsewhere.
    fn log(&self, _level: RDKafkaLogLevel, facility: &str, line: &str) {
        log::debug!("librdkafka {facility} {line}");
    }

    fn stats(&self, statistics: Statistics) {
        let mut reported = self.reported();
        if statistics.brokers.values().any(|broker| broker.state == "UP") {
            self.connected(&mut reported);
        }
        let now = instant_now();
        let mut ends = BTreeMap::new();
        for (topic, statistics) in &statistics.topics {
            for (number, statistics) in &statistics.partitions {
                // The last readable record is before the last stable offset, because only committed records are read.
                let Some(partition) = self.membership.partition(topic, *number) else {
                    continue;
                };
                if statistics.ls_offset >= 0 {
                    ends.insert(partition, NextOffset(statistics.ls_offset));
                }
                if statistics.fetch_state != "active" {
                    continue;
                }
                let state = FetchState {
                    next_offset: statistics.next_offset,
                    end_offset: statistics.ls_offset,
                    records_waiting: statistics.fetchq_cnt,
                };
                if let Some(lasted) = reported.stuck.look(now, partition, state) {
                    log::log!(
                        self.membership.level(Level::Info),
                        "{partition} is being read again after {} s",
                        lasted.as_secs()
                    );
                }
            }
        }
        reported.ends = ends;
        let stuck = reported.stuck.partitions();
        if !stuck.is_empty() {
            reported.events.push_back(Event::Stuck(stuck));
        }
    }

    /// Gets every error, including those that polling returns. Only here is the reason given in words.
    fn error(&self, error: KafkaError, reason: &str) {
        log::debug!("librdkafka {error}: {reason}");
        self.membership.explainer.hear(&error, reason);
        let reason = reason.to_owned();
        let mut reported = self.reported();
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::AutoOffsetReset | RDKafkaErrorCode::OffsetOutOfRange) => {
                reported.events.push_back(Event::OutOfRange);
            }
            Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) => {
                reported.missing.begin(instant_now(), reason);
            }
            Some(
                RDKafkaErrorCode::TopicAuthorizationFailed
                | RDKafkaErrorCode::GroupAuthorizationFailed
                | RDKafkaErrorCode::ClusterAuthorizationFailed
                | RDKafkaErrorCode::InvalidTopic
                | RDKafkaErrorCode::InvalidGroupId
                | RDKafkaErrorCode::InconsistentGroupProtocol,
            ) => reported.refused.begin(instant_now(), reason),
            // An error before this one says more. There is none if the brokers just do not answer.
            Some(RDKafkaErrorCode::AllBrokersDown) => {
                let servers = &self.membership.explainer.kafka().bootstrap_servers;
                let silent = || format!("{servers} does not answer: {reason}");
                let reason = reported.last_reason.clone().unwrap_or_else(silent);
                reported.away.begin(instant_now(), reason);
                reported.all_down_at = Some(instant_now());
            }
            _ => {
                if reported.away.reason().is_some() {
                    reported.away.begin(instant_now(), reason.clone());
                }
                reported.last_reason = Some(reason);
            }
        }
    }
}

impl ConsumerContext for Context {
    fn rebalance(
        &self,
        consumer: &BaseConsumer<Self>,
        error: RDKafkaRespErr,
        partitions: &mut TopicPartitionList,
    ) {
        let ours = self.partitions(partitions);
        let is_assigned = error == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS;
        let answered = if is_assigned {
            // Reading starts once the positions are known.
            consumer.incremental_assign(&TopicPartitionList::new())
        } else {
            self.being_read(consumer, |partition| ours.contains(partition))
                .and_then(|list| consumer.incremental_unassign(&list))
        };
        if let Err(error) = answered {
            log::debug!("librdkafka refuses the answer to a rebalance: {error}");
        }
        let mut reported = self.reported();
        self.connected(&mut reported);
        reported.refused.end(instant_now());
        reported.is_member |= is_assigned;
        reported.stuck.forget(&ours);
        reported.events.push_back(match is_assigned {
            true => Event::Assigned(ours),
            false => Event::Revoked(ours),
        });
    }
}
