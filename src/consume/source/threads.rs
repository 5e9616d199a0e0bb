//! The two threads beside the polling one: one commits, the other watches the group.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::KafkaResult;

use crate::consume::batch::{NextOffset, Partition};
use crate::consume::group::Watch;
use crate::consume::source::context::Context;
use crate::kafka::{Named, look_up_topic};

/// How long Kafka may take for each question about the group. A thread of its own waits, so nothing is delayed.
const ASK_WITHIN: Duration = Duration::from_secs(3);

/// How often the group is looked at. Two looks in a row have to find the same partitions without an owner.
const LOOK_AT_GROUP_EVERY: Duration = Duration::from_secs(15);

/// Commits each list that is sent, until the sender is dropped.
///
/// A commit that is waited for takes as long as Kafka does. For one that is not waited for, librdkafka reports the result only
/// to a callback that rust-rdkafka 0.39 does not set.
pub(super) fn commit_all(
    consumer: &BaseConsumer<Context>,
    to_commit: &Receiver<Vec<(Partition, NextOffset)>>,
) {
    let context = consumer.context();
    for commits in to_commit {
        let result = context
            .list_at(&commits)
            .and_then(|list| consumer.commit(&list, CommitMode::Sync));
        context.committed(&commits, result.map_err(|error| error.to_string()));
    }
}

/// Looks at the group regularly, until the sender is dropped. The answer takes as long as the slowest broker.
pub(super) fn watch_group(consumer: &BaseConsumer<Context>, group_id: &str, until: &Receiver<()>) {
    let mut watch = Watch::default();
    while until.recv_timeout(LOOK_AT_GROUP_EVERY) == Err(RecvTimeoutError::Timeout) {
        match look_at_group(consumer, group_id, &mut watch) {
            Ok(Some(orphans)) => consumer.context().reported().orphans = orphans,
            Ok(None) => {}
            Err(error) => {
                watch.forget();
                log::debug!("cannot look at the group: {error}");
            }
        }
    }
}

fn look_at_group(
    consumer: &BaseConsumer<Context>,
    group_id: &str,
    watch: &mut Watch,
) -> KafkaResult<Option<BTreeSet<Named>>> {
    let list = consumer.fetch_group_list(Some(group_id), ASK_WITHIN)?;
    let group = list.groups().iter().find(|group| group.name() == group_id);
    // A group without members cannot own anything, and a rebalance is about to assign everything.
    let Some(group) = group.filter(|group| group.state() == "Stable" && !group.members().is_empty()) else {
        watch.forget();
        return Ok(None);
    };
    let mut all = BTreeSet::new();
    for topic in &consumer.context().topics {
        let partitions = look_up_topic(consumer.client(), topic, ASK_WITHIN)?.unwrap_or_default();
        all.extend(
            partitions
                .iter()
                .map(|partition| (topic.clone(), partition.number)),
        );
    }
    let assignments = group.members().iter().filter_map(|member| member.assignment());
    Ok(watch.look(&all, assignments))
}
