//! A group member (PRODUCE_GROUP) and its thread.
//!
//! Owns the membership and reads partitions. It tells the timer loop about hosts with [`Order`]s, and the publisher about records
//! with [`Letter`]s.

mod ledgers;
mod log_lines;
mod tails;
mod thread;

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use anyhow::Context as _;

use self::thread::Thread;
use crate::clock::{Clock, instant_now};
use crate::config::{GroupConfig, KafkaConfig};
use crate::http::health::Readiness;
use crate::kafka::member::Member;
use crate::lock::lock;
use crate::outage::Outage;
use crate::produce::publisher::{Letter, LetterBox};
use crate::produce::share::events::Event;
use crate::produce::share::shares::Shares;
use crate::produce::share::{Share, partition_of};
use crate::thread::start_thread;

pub(super) use self::thread::Order;

/// The timer loop's end of the thread.
pub(super) struct Fleet {
    events: Sender<Event>,
    topics: Sender<Vec<String>>,
}

impl Fleet {
    /// The publisher sends events to the same channel.
    pub(super) fn start(
        settings: &Settings<'_>,
        topics: &[String],
        (events, heard): (Sender<Event>, Receiver<Event>),
        letters: LetterBox,
        orders: impl Fn(Order) + Send + 'static,
    ) -> anyhow::Result<Self> {
        let names: Vec<&str> = topics.iter().map(String::as_str).collect();
        let GroupConfig { name, instance_id } = settings.group;
        let member = Member::join(settings.kafka, name, instance_id.as_deref(), &names)?;
        letters.tell(Letter::Topics(topics.to_vec()));
        let (send_topics, new_topics) = channel();
        let thread = Thread {
            member,
            kafka: settings.kafka.clone(),
            group: name.clone(),
            place: settings.place.to_owned(),
            partitions: settings.partitions.clone(),
            clock: settings.clock,
            readiness: Arc::clone(settings.readiness),
            shares: Shares::default(),
            stops_alone: false,
            heard,
            events: events.clone(),
            turned_at: settings.clock.now_micros(),
            joined_at: instant_now(),
            new_topics,
            letters,
            orders: Box::new(orders),
            to_read: Vec::new(),
            reading: None,
            logged_shares: None,
            absent_since: Some(instant_now()),
            absence: Outage::default(),
            untaken: Outage::default(),
            unsaved: Outage::default(),
            failure: None,
            topics: topics.to_vec(),
            other_place: None,
            foreign_ledger: Outage::default(),
            commit_failure: Arc::default(),
        };
        start_thread("fleet", move || thread.run()).context("cannot start the thread of PRODUCE_GROUP")?;
        Ok(Self {
            events,
            topics: send_topics,
        })
    }

    #[cfg(test)]
    pub(super) fn without_thread() -> Self {
        let (events, topics) = (channel().0, channel().0);
        Self { events, topics }
    }

    /// Gives all shares back and leaves the group, at the latest then (Unix time in microseconds).
    pub(super) fn stop(&self, until: i64) {
        // If the thread has ended, we have left the group.
        let _ = self.events.send(Event::Stop { until });
    }

    /// Changes the topics of the hosts.
    pub(super) fn subscribe(&self, topics: Vec<String>) {
        let _ = self.topics.send(topics);
    }
}

pub(super) struct Settings<'a> {
    pub(super) kafka: &'a KafkaConfig,
    pub(super) group: &'a GroupConfig,
    /// AGENT_NAME.
    pub(super) place: &'a str,
    pub(super) partitions: &'a Partitions,
    pub(super) clock: Clock,
    /// Whether this producer is a member of the group, and no other program has partitions of it.
    pub(super) readiness: &'a Arc<Readiness>,
}

/// The number of partitions by which the hosts of each topic are divided: that of the ledgers, or that of the topic if there is no
/// ledger yet.
#[derive(Clone, Debug, Default)]
pub(super) struct Partitions(Arc<Mutex<HashMap<Arc<str>, i32>>>);

impl Partitions {
    /// The share of a host. `None`: the number of partitions of its topic is not known yet.
    pub(super) fn share_of(&self, topic: &str, address: &str) -> Option<Share> {
        let counts = lock(&self.0);
        let (topic, count) = counts.get_key_value(topic)?;
        Some(Share {
            topic: Arc::clone(topic),
            partition: partition_of(address.as_bytes(), *count),
        })
    }

    fn of(&self, topic: &str) -> Option<i32> {
        let counts = lock(&self.0);
        counts.get(topic).copied()
    }

    fn set(&self, topic: &str, count: i32) {
        let mut counts = lock(&self.0);
        counts.insert(topic.into(), count);
    }
}
