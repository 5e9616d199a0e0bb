//! Producers of a group whose membership is wrong: two with the same KAFKA_GROUP_INSTANCE_ID, a partition that no member has, a
//! member that is another program.
//! The log and /readyz say so, and no tick is recorded twice or left out.

use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer};

use crate::agent::{Agent, Variables, run};
use crate::fleet::{Fleet, HOSTS, PARTITIONS, SECOND, WITHIN, now_micros};
use crate::kafka::Kafka;
use crate::scratch::wait_for;

/// Two looks at the group 15 s apart, the first one up to 15 s later, and then a rebalance.
const NOTICED_WITHIN: Duration = Duration::from_secs(60);

pub fn metrics() -> Variables {
    Variables::new().with_metrics()
}

pub fn wait_until_ready(metrics: &Variables, agents: &[Agent]) {
    let ready = (0, "ready\n".to_owned());
    wait_for(
        WITHIN,
        "it is ready",
        || (run(&["health"], metrics) == ready).then_some(()),
        || agents.iter().map(|agent| agent.stderr() + "\n---\n").collect(),
    );
}

/// Waits until /readyz says this.
pub fn wait_until_unready(metrics: &Variables, why: &str, agents: &[&Agent]) {
    wait_for(
        WITHIN,
        "/readyz says why",
        || {
            let (status, said) = run(&["health"], metrics);
            (status != 0 && said.contains(why)).then_some(())
        },
        || agents.iter().map(|agent| agent.stderr() + "\n---\n").collect(),
    );
}

/// This happens if replicas have the same variables.
#[test]
fn of_two_producers_with_one_instance_id_one_checks_and_the_other_one_says_why_it_does_not() {
    let kafka = Kafka::shared();
    let fleet = Fleet::of(kafka, "fleet_twins", "fleet_twins", PARTITIONS, HOSTS);
    let variables = fleet.variables.clone().with("KAFKA_GROUP_INSTANCE_ID", "twin");
    let first = fleet.start_with(&variables);
    fleet.wait_for_ticks_since(kafka, now_micros() + SECOND, &[&first]);
    let metrics = metrics();
    let second = fleet.start_with(&variables.and(&metrics));
    let both = [&first, &second];
    wait_until_unready(&metrics, "give each its own", &both);
    second.wait_for_stderr("give each its own", WITHIN);
    fleet.wait_for_ticks_since(kafka, now_micros() + SECOND, &both);
    let before = fleet.judged(kafka).superseded.len();
    let until = now_micros() + 5 * SECOND;
    fleet.wait_for_ticks_since(kafka, until, &both);
    let after = fleet.judged(kafka).superseded.len();
    // One of them would write about 100 if it went on.
    assert!(
        after - before < 2 * HOSTS,
        "{} records were void:\n{}\n---\n{}",
        after - before,
        first.stderr(),
        second.stderr()
    );
    second.stop();
    fleet.wait_for_ticks_since(kafka, now_micros() + 2 * SECOND, &[&first]);
    first.stop();
    let judged = fleet.judged(kafka);
    let (most, missed) = judged.assert_whole(0);
    eprintln!(
        "missed {missed}, per host at most {most}, superseded {}, claims {}",
        judged.superseded.len(),
        judged.claims
    );
    assert_eq!(judged.ticks.len(), HOSTS);
}

#[test]
fn ticks_that_are_missed_because_max_threads_is_too_low_are_reported() {
    let kafka = Kafka::shared();
    let fleet = Fleet::of(kafka, "fleet_threads", "fleet_threads", 1, 3);
    let _silent = fleet.check_a_silent_site();
    let agent = fleet.start_with(&fleet.variables.clone().with("MAX_THREADS", 1));
    agent.wait_for_stderr(
        "because as many checks are under way as MAX_THREADS=1 allows",
        WITHIN,
    );
    agent.stop();
}

#[test]
fn a_share_that_a_rebalance_left_without_an_owner_is_noticed_and_taken() {
    let kafka = Kafka::shared();
    let name = "fleet_orphans";
    let fleet = Fleet::of(kafka, name, name, PARTITIONS, HOSTS);
    // As in `rebalance`: it has all partitions, is asked to give back half of them, and dies before it answers.
    let dying: BaseConsumer = kafka
        .client()
        .set("group.id", name)
        .set("group.instance.id", "comes-back")
        .set("partition.assignment.strategy", "cooperative-sticky")
        .set("enable.auto.commit", "false")
        .create()
        .unwrap();
    dying.subscribe(&[name]).unwrap();
    wait_for(
        WITHIN,
        "it has everything",
        || {
            dying.poll(Duration::from_millis(20));
            (dying.assignment().unwrap().count() == PARTITIONS as usize).then_some(())
        },
        String::new,
    );
    let start = |id: &str| fleet.start_with(&fleet.variables.clone().with("KAFKA_GROUP_INSTANCE_ID", id));
    let stays = start("stays");
    wait_for(
        WITHIN,
        "the rebalance",
        || (kafka.members(name).len() == 2 && kafka.group_is_stable(name)).then_some(()),
        || stays.stderr(),
    );
    let comes_back = start("comes-back");
    wait_for(
        NOTICED_WITHIN,
        "every host is checked",
        || (fleet.judged(kafka).ticks.len() == HOSTS).then_some(()),
        || stays.stderr() + "\n---\n" + &comes_back.stderr(),
    );
    assert!(
        stays.said("are assigned to no member") + comes_back.said("are assigned to no member") > 0,
        "they were no orphans: {}{}",
        stays.stderr(),
        comes_back.stderr()
    );
    fleet.wait_for_ticks_since(kafka, now_micros() + 2 * SECOND, &[&stays, &comes_back]);
    stays.stop();
    comes_back.stop();
    fleet.judged(kafka).assert_whole(0);
    // It does not leave the group, because that would wait for the revocation, which it does not answer.
    std::mem::forget(dying);
}
