//! `host-metrics tail` against a real broker.

use crate::agent::{Agent, Variables};
use crate::case::{SOON, write};
use crate::kafka::Kafka;
use crate::scratch::wait_for;

#[test]
fn tail_prints_new_records_as_they_arrive_or_all_since_a_time_and_commits_nothing() {
    let name = "tail-new";
    let kafka = Kafka::shared();
    kafka.create_topic(name, 2);
    write(kafka, name, 0, 0..3);
    let variables = Variables::new().kafka(&kafka.bootstrap_servers(), name);
    let new = Agent::start(&["tail"], &variables);
    new.wait_for_stderr("reading 2 partitions of topic tail-new", SOON);
    write(kafka, name, 1, 3..5);
    wait_for_lines(&new, 2);
    let all = Agent::start(&["tail", "--since", "1h", "--json"], &variables);
    wait_for_lines(&all, 5);
    for line in all.stdout().lines() {
        let record: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(record["address"].is_string(), "{line}");
    }
    assert_eq!(new.stdout().lines().count(), 2, "{}", new.stdout());
    assert!(!new.stdout().contains('\x1b'), "no colours in a file");
    assert!(kafka.members("host-metrics-tail").is_empty());
    assert_eq!(kafka.committed("host-metrics-tail", name), [None, None]);
    new.stop();
    all.stop();
}

#[test]
fn tail_waits_for_a_topic_and_reads_it_from_its_first_record() {
    let name = "tail-later";
    let kafka = Kafka::shared();
    let variables = Variables::new().kafka(&kafka.bootstrap_servers(), name);
    let tail = Agent::start(&["tail", "--color", "always"], &variables);
    tail.wait_for_stderr("cannot read topic tail-later", SOON);
    kafka.create_topic(name, 1);
    tail.wait_for_stderr("reading 1 partition of topic tail-later", SOON);
    write(kafka, name, 0, 0..1);
    wait_for_lines(&tail, 1);
    assert!(tail.stdout().contains('\x1b'), "colours on request");
    tail.stop();
}

fn wait_for_lines(tail: &Agent, lines: usize) {
    wait_for(
        SOON,
        "tail prints the records",
        || (tail.stdout().lines().count() >= lines).then_some(()),
        || tail.stdout() + &tail.stderr(),
    );
}
