//! By how many partitions the hosts of each topic are divided.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use crate::lock::lock;
use crate::produce::share::{Share, partition_of};

/// The number of partitions by which the hosts of each topic are divided: that of the ledgers, or that of the topic if there is no
/// ledger yet.
#[derive(Clone, Debug, Default)]
pub(in crate::produce) struct Partitions(Arc<Mutex<HashMap<Arc<str>, i32>>>);

impl Partitions {
    /// The share of a host. `None`: the number of partitions of its topic is not known yet.
    pub(in crate::produce) fn share_of(&self, topic: &str, address: &str) -> Option<Share> {
        let counts = lock(&self.0);
        let (topic, count) = counts.get_key_value(topic)?;
        Some(Share {
            topic: Arc::clone(topic),
            partition: partition_of(address.as_bytes(), *count),
        })
    }

    pub(super) fn of(&self, topic: &str) -> Option<i32> {
        let counts = lock(&self.0);
        counts.get(topic).copied()
    }

    pub(super) fn set(&self, topic: &str, count: i32) {
        let mut counts = lock(&self.0);
        counts.insert(topic.into(), count);
    }
}
