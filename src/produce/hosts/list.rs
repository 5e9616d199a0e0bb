//! The list of all hosts, and what a newer list changes in it.
//!
//! Pure. The threads that watch the sources compare the lists, because that takes too long for the timer loop.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

use crate::check::target::Target;

/// Hosts by their address.
#[derive(Default)]
pub struct HostList(HashMap<String, Arc<Target>>);

/// What a newer list changes.
#[derive(Debug)]
pub struct Changes {
    /// When the reading of the newer list began.
    pub begun_at: Instant,
    /// The hosts that are new or have another line.
    pub changed: Vec<Arc<Target>>,
    /// The hosts that are no longer in the list.
    pub removed: Vec<Arc<Target>>,
    /// The number of hosts in the newer list.
    pub hosts: usize,
    /// The topics of the newer list; `None` is KAFKA_TOPIC.
    pub topics: BTreeSet<Option<String>>,
    /// For the log.
    pub warnings: Vec<String>,
}

impl HostList {
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Target>> {
        self.0.values()
    }

    pub fn topics(&self) -> BTreeSet<Option<String>> {
        self.iter().map(|target| target.topic.clone()).collect()
    }

    /// Replaces the list by a newer one. Returns what has changed.
    pub fn replace(&mut self, begun_at: Instant, targets: Vec<Target>, warnings: Vec<String>) -> Changes {
        let mut newer = HashMap::with_capacity(targets.len());
        let mut changed = Vec::new();
        for target in targets {
            let target = match self.0.remove(&target.address) {
                Some(known) if *known == target => known,
                _ => {
                    let target = Arc::new(target);
                    changed.push(Arc::clone(&target));
                    target
                }
            };
            newer.insert(target.address.clone(), target);
        }
        let left = std::mem::replace(&mut self.0, newer);
        Changes {
            begun_at,
            changed,
            removed: left.into_values().collect(),
            hosts: self.0.len(),
            topics: self.topics(),
            warnings,
        }
    }

    /// Applies changes that [`HostList::replace`] of another list has returned.
    pub fn apply(&mut self, changes: &Changes) {
        for target in &changes.removed {
            self.0.remove(&target.address);
        }
        for target in &changes.changed {
            self.0.insert(target.address.clone(), Arc::clone(target));
        }
    }
}

impl FromIterator<Arc<Target>> for HostList {
    fn from_iter<T: IntoIterator<Item = Arc<Target>>>(targets: T) -> Self {
        let by_address = |target: Arc<Target>| (target.address.clone(), target);
        Self(targets.into_iter().map(by_address).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::instant_now;
    use crate::produce::host_file;

    fn targets(lines: &str) -> Vec<Target> {
        host_file::parse("hosts", lines.as_bytes()).unwrap().targets
    }

    fn texts(targets: &[Arc<Target>]) -> Vec<String> {
        targets.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_newer_list_changes_only_the_lines_that_differ() {
        let mut list: HostList = targets("a.example 5 status=200 (x)\nb.example 5\nc.example 5 topic=t\n")
            .into_iter()
            .map(Arc::new)
            .collect();
        let mut follower: HostList = list.iter().cloned().collect();
        let newer = "d.example 5\nb.example 5 body=\"x\" method=PUT\na.example 5m status=200 (x)\n";
        let changes = list.replace(instant_now(), targets(newer), Vec::new());
        assert_eq!(
            texts(&changes.changed),
            ["d.example 5m", "b.example 5m method=PUT body=\"x\""]
        );
        assert_eq!(texts(&changes.removed), ["c.example 5m topic=t"]);
        assert_eq!((changes.hosts, changes.topics), (3, [None].into()));
        let changes = Changes {
            topics: BTreeSet::new(),
            ..changes
        };
        follower.apply(&changes);
        let sorted = |list: &HostList| {
            let mut lines: Vec<String> = list.iter().map(ToString::to_string).collect();
            lines.sort();
            lines
        };
        assert_eq!(sorted(&follower), sorted(&list));

        let changes = list.replace(instant_now(), targets(newer), Vec::new());
        assert_eq!((changes.changed.len(), changes.removed.len()), (0, 0));
        for (line, other) in [
            ("a.example 5 x", "a.example 5 y"),
            ("a.example 5 x", "a.example 5 ! x"),
            ("a.example 5", "a.example 5 slow=1s"),
            ("a.example 5 header=X:y", "a.example 5 header=X:z"),
            ("a.example 5 json=/a:1", "a.example 5 json=/a:2"),
        ] {
            let mut list: HostList = targets(line).into_iter().map(Arc::new).collect();
            assert_eq!(
                list.replace(instant_now(), targets(line), Vec::new())
                    .changed
                    .len(),
                0,
                "{line}"
            );
            assert_eq!(
                list.replace(instant_now(), targets(other), Vec::new())
                    .changed
                    .len(),
                1,
                "{other}"
            );
        }
    }
}
