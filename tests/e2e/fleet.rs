//! Producers that share their hosts (PRODUCE_GROUP), with a real Kafka: kills, freezes, planned stops and outages of the
//! broker. Without the records that a consumer would reject as superseded, the topic has each tick of each host once.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::time::Duration;

use host_metrics::commands::demo::postgres::free_port;
use host_metrics::sample::epoch::{Claim, Epochs};
use host_metrics::sample::{self, Timestamp};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList, TopicPartitionListElem};

use crate::agent::{Agent, Variables, run};
use crate::case::Case;
use crate::database::Database;
#[cfg(target_os = "linux")]
use crate::faults::with_clock;
use crate::fleet_members::{metrics, wait_until_ready, wait_until_unready};
use crate::kafka::Kafka;
use crate::kills::number;
use crate::scratch::{self, wait_for};

pub const GROUP: &str = "eu";
pub const PARTITIONS: i32 = 4;
pub const HOSTS: usize = 24;
pub const SECOND: i64 = 1_000_000;

/// The bound for a session of 6 s and a takeover, on a busy machine.
pub const WITHIN: Duration = Duration::from_secs(60);

pub struct Fleet {
    pub topic: String,
    group: String,
    pub hosts: PathBuf,
    count: usize,
    pub variables: Variables,
}

/// The content of a topic, without superseded records.
#[derive(Debug, Default)]
pub struct Judged {
    /// The ticks of each host, and whether each was missed because no producer had the host.
    pub ticks: BTreeMap<String, Vec<(i64, bool)>>,
    /// As `partition/offset`, sorted by both.
    pub valid: Vec<String>,
    pub superseded: Vec<String>,
    pub claims: usize,
}

impl Fleet {
    fn new(kafka: &Kafka, topic: &str) -> Self {
        Self::of(kafka, topic, GROUP, PARTITIONS, HOSTS)
    }

    pub fn of(kafka: &Kafka, topic: &str, group: &str, partitions: i32, count: usize) -> Self {
        kafka.create_topic(topic, partitions);
        // No server listens there, so a check takes no time. The outcome does not matter.
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let hosts = scratch::directory("fleet").join("hosts");
        let lines: Vec<String> = (0..count)
            .map(|i| format!("http://{address}/{i} {}s\n", if i == 0 { 5 } else { 1 }))
            .collect();
        fs::write(&hosts, lines.concat()).unwrap();
        let variables = Variables::new()
            .kafka(&kafka.bootstrap_servers(), topic)
            .with("PRODUCE_GROUP", group)
            .with("LOG_LEVEL", "INFO");
        Self {
            topic: topic.to_owned(),
            group: group.to_owned(),
            hosts,
            count,
            variables,
        }
    }

    /// Appends a void claim to each partition, so that a producer that takes the share has something to read.
    pub fn write_void_claims(&self, kafka: &Kafka, partitions: i32) {
        let claim = Claim::new(&self.group, &self.group, 1).encode();
        let claims = (0..partitions).map(|number| (number, None, Some(claim.clone())));
        kafka.write(&self.topic, claims);
    }

    /// Lists three hosts of a site that accepts connections and never answers, instead of the hosts before.
    pub fn check_a_silent_site(&self) -> TcpListener {
        let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = silent.local_addr().unwrap();
        let lines = (1..4).map(|i| format!("http://{address}/{i} 1s timeout=900ms\n"));
        fs::write(&self.hosts, lines.collect::<String>()).unwrap();
        silent
    }

    pub fn start(&self) -> Agent {
        self.start_with(&self.variables)
    }

    pub fn start_with(&self, variables: &Variables) -> Agent {
        Agent::start(&["produce", "-c", self.hosts.to_str().unwrap()], variables)
    }

    pub fn judged(&self, kafka: &Kafka) -> Judged {
        self.judged_of(kafka, &self.group)
    }

    /// The records of one place. Those of others are left out.
    fn judged_of(&self, kafka: &Kafka, place: &str) -> Judged {
        let mut judged = Judged::default();
        let mut epochs = BTreeMap::<i32, Epochs>::new();
        for record in kafka.records(&self.topic) {
            let value = record.value.unwrap();
            let epochs = epochs.entry(record.partition).or_default();
            if let Some(claim) = Claim::decode(&value) {
                judged.claims += usize::from(claim.place() == place);
                let _ = epochs.admit(claim.place(), claim.epoch);
                continue;
            }
            let sample = sample::decode(&value).unwrap();
            if sample.agent.as_deref() != Some(place) {
                continue;
            }
            let at = format!("{}/{}", record.partition, record.offset);
            // A record without an epoch is that of `--once`.
            if sample
                .epoch
                .is_some_and(|epoch| epochs.admit(place, epoch).is_err())
            {
                judged.superseded.push(at);
                continue;
            }
            judged.valid.push(at);
            let ticks = judged.ticks.entry(sample.address.to_string()).or_default();
            let tick = sample.scheduled_at.map(Timestamp::unix_micros).unwrap();
            // A busy machine may miss ticks for other reasons.
            let error = sample.error.as_deref().unwrap_or_default();
            ticks.push((tick, error.contains("no producer of the group")));
        }
        judged
    }

    /// Waits until every host has a record of a tick after `since`.
    pub fn wait_for_ticks_since(&self, kafka: &Kafka, since: i64, agents: &[&Agent]) {
        self.wait_for_ticks_of(kafka, &self.group, since, agents);
    }

    fn wait_for_ticks_of(&self, kafka: &Kafka, place: &str, since: i64, agents: &[&Agent]) {
        wait_for(
            WITHIN,
            "every host is checked",
            || {
                if now_micros() < since {
                    return None;
                }
                let ticks = self.judged_of(kafka, place).ticks;
                let is_recent =
                    |ticks: &Vec<(i64, bool)>| ticks.iter().any(|(tick, missed)| *tick >= since && !missed);
                (ticks.len() == self.count && ticks.values().all(is_recent)).then_some(())
            },
            || {
                agents
                    .iter()
                    .map(|agent| agent.stderr())
                    .collect::<Vec<_>>()
                    .join("\n---\n")
            },
        );
    }
}

impl Judged {
    /// Verifies that each tick is there once and in order. Returns how many were missed since then: the most of one host, and all.
    pub fn assert_whole(&self, since: i64) -> (usize, usize) {
        let (mut most, mut all) = (0, 0);
        for (host, ticks) in &self.ticks {
            let interval = if host.ends_with("/0") { 5 } else { 1 } * SECOND;
            for pair in ticks.windows(2) {
                let [(before, _), (after, _)] = pair else {
                    unreachable!()
                };
                assert_eq!(after - before, interval, "{host}: {after} follows {before}");
            }
            let missed = ticks
                .iter()
                .filter(|(tick, missed)| *missed && *tick >= since)
                .count();
            most = most.max(missed);
            all += missed;
        }
        (most, all)
    }

    /// Verifies that the consumer agrees, when it has stored everything. Stops it.
    pub fn assert_stored(&self, fleet: &Fleet, db: &mut Database, consumer: Agent) {
        let topic = &fleet.topic;
        let all = self.valid.len() + self.superseded.len() + self.claims;
        let ends = format!(
            "SELECT coalesce(sum(next_offset), 0)::text FROM host_metrics_offsets WHERE topic = '{topic}'"
        );
        wait_for(
            WITHIN,
            "everything is stored",
            || (db.one(&ends) == all.to_string()).then_some(()),
            || consumer.stderr(),
        );
        consumer.stop();
        let places = "SELECT concat(kafka_partition, '/', kafka_offset) FROM";
        let order = "ORDER BY kafka_partition, kafka_offset";
        assert_eq!(db.many(&format!("{places} host_metrics {order}")), self.valid);
        let reason = format!("reason LIKE 'superseded by epoch % of {}'", fleet.group);
        assert_eq!(
            db.many(&format!("{places} host_metrics_rejected WHERE {reason} {order}")),
            self.superseded
        );
        assert_eq!(db.count("host_metrics_rejected"), self.superseded.len() as i64);
    }
}

pub fn now_micros() -> i64 {
    host_metrics::clock::wall_micros()
}

#[test]
fn a_lone_producer_records_the_ticks_of_the_time_in_which_it_did_not_run() {
    let kafka = Kafka::shared();
    let fleet = Fleet::of(kafka, "fleet_lone", "fleet_lone", PARTITIONS, HOSTS);
    let mut first = fleet.start();
    first.wait_for_stderr("taken", WITHIN);
    fleet.wait_for_ticks_since(kafka, 0, &[&first]);
    first.kill();
    let killed_at = now_micros();
    // This waits until the session of the killed producer ends.
    let second = fleet.start();
    fleet.wait_for_ticks_since(kafka, now_micros() + 2 * SECOND, &[&second]);
    second.stop();
    let stopped_at = now_micros();
    let third = fleet.start();
    fleet.wait_for_ticks_since(kafka, now_micros() + SECOND, &[&third]);
    third.stop();
    let judged = fleet.judged(kafka);
    let (most, missed) = judged.assert_whole(killed_at);
    // The session of 6 s, the takeover, and two planned stops.
    assert!(
        missed > 0 && most <= 16,
        "{most} ticks of a host are missed by a kill and two stops"
    );
    let (most, _) = judged.assert_whole(stopped_at);
    assert!(
        most <= 4,
        "{most} ticks of a host are missed by a planned restart"
    );
    eprintln!(
        "missed after the kill {missed}, per host after a restart {most}, claims {}",
        judged.claims
    );
    assert_eq!(judged.superseded, [""; 0]);
}

#[test]
fn three_producers_check_each_host_once_and_take_over_from_one_another() {
    let mut case = Case::new("fleet_three", PARTITIONS);
    let kafka = case.kafka;
    // Members of another test in the same group would delay its rebalances by their sessions.
    let fleet = Fleet::of(kafka, case.name, "three", PARTITIONS, HOSTS);
    let mut consumer = case.consume();
    let mut agents = vec![fleet.start(), fleet.start(), fleet.start()];
    // Until then the new topic may not be known everywhere in Kafka.
    agents[0].wait_for_stderr("taken", WITHIN);
    fleet.wait_for_ticks_since(
        kafka,
        now_micros() + 8 * SECOND,
        &agents.iter().collect::<Vec<_>>(),
    );
    let begun_at = now_micros();

    // A planned stop: the shares move while their hosts are still checked.
    agents.remove(0).stop();
    fleet.wait_for_ticks_since(
        kafka,
        now_micros() + 2 * SECOND,
        &agents.iter().collect::<Vec<_>>(),
    );
    let (most, _) = fleet.judged(kafka).assert_whole(begun_at);
    // One tick at most (docs/reference/several-producers.md), as `make bench-produce` measures; a machine that is short of CPU adds
    // the delay of a rebalance.
    assert!(most <= 2, "{most} ticks of a host are missed by a planned stop");

    // A kill: the others get its shares when its session has ended.
    agents[0].kill();
    agents.remove(0);
    fleet.wait_for_ticks_since(
        kafka,
        now_micros() + 9 * SECOND,
        &agents.iter().collect::<Vec<_>>(),
    );

    // The next consumer continues with the epochs that this one has stored.
    consumer.kill();
    let consumer = case.consume();

    // A freeze that is longer than the session, while another producer joins. Then it wakes up.
    agents.push(fleet.start());
    fleet.wait_for_ticks_since(
        kafka,
        now_micros() + 4 * SECOND,
        &agents.iter().collect::<Vec<_>>(),
    );
    agents[0].signal("STOP");
    fleet.wait_for_ticks_since(
        kafka,
        now_micros() + 9 * SECOND,
        &agents.iter().collect::<Vec<_>>(),
    );
    agents[0].signal("CONT");
    fleet.wait_for_ticks_since(
        kafka,
        now_micros() + 5 * SECOND,
        &agents.iter().collect::<Vec<_>>(),
    );
    agents.into_iter().for_each(end);

    let judged = fleet.judged(kafka);
    let (most, missed) = judged.assert_whole(0);
    eprintln!(
        "missed {missed}, per host at most {most}, superseded {}, claims {}",
        judged.superseded.len(),
        judged.claims
    );
    assert_eq!(judged.ticks.len(), HOSTS);

    judged.assert_stored(&fleet, &mut case.db, consumer);

    // So does the audit, which asks Kafka about the offsets of the claims.
    let (status, said) = run(&["audit"], &case.variables());
    assert_eq!(status, 0, "{said}");
    assert!(
        said.contains(&format!("{} claims of producers", judged.claims)),
        "{said}"
    );
    assert!(said.contains("Passed: every record"), "{said}");
}

/// FLEET_AWAY_SECONDS=600 keeps Kafka away for ten minutes, for more producers and for more results than they can keep.
#[test]
fn checks_during_an_outage_of_kafka_count_once() {
    let mut kafka = Kafka::start();
    let seconds = number("FLEET_AWAY_SECONDS");
    // The topic and group, the number of hosts and of producers, and whether they are static members.
    let mut cases = vec![("away_alone", HOSTS, 1, false), ("away_static", HOSTS, 3, true)];
    if seconds.is_some() {
        cases.extend([("away_dynamic", HOSTS, 3, false), ("away_full", 400, 1, false)]);
    }
    let start = |(name, hosts, members, are_static)| {
        let fleet = Fleet::of(&kafka, name, name, PARTITIONS, hosts);
        let variables = |member: i32| match are_static {
            true => fleet.variables.clone().with("KAFKA_GROUP_INSTANCE_ID", member),
            false => fleet.variables.clone(),
        };
        let agents: Vec<Agent> = (0..members)
            .map(|member| fleet.start_with(&variables(member)))
            .collect();
        (fleet, agents)
    };
    let fleets: Vec<(Fleet, Vec<Agent>)> = cases.into_iter().map(start).collect();
    for (fleet, agents) in &fleets {
        fleet.wait_for_ticks_since(
            &kafka,
            now_micros() + 4 * SECOND,
            &agents.iter().collect::<Vec<_>>(),
        );
    }
    let away_at = now_micros();
    kafka.kill();
    // Longer than a session.
    wait_until(away_at + seconds.unwrap_or(8) as i64 * SECOND);
    kafka.start_again();
    for (fleet, agents) in fleets {
        fleet.wait_for_ticks_since(
            &kafka,
            now_micros() + 2 * SECOND,
            &agents.iter().collect::<Vec<_>>(),
        );
        let is_full = agents
            .iter()
            .any(|agent| agent.stderr().contains("the buffer is full"));
        let peak = agents.iter().map(Agent::peak_bytes).max().unwrap();
        agents.into_iter().for_each(Agent::stop);
        let judged = fleet.judged(&kafka);
        let (most, missed) = judged.assert_whole(away_at);
        eprintln!(
            "{}: {} records, missed without a producer {missed}, per host at most {most}, superseded {}, claims {}, buffer full {is_full}, \
             at most {} MB",
            fleet.topic,
            judged.valid.len(),
            judged.superseded.len(),
            judged.claims,
            peak >> 20
        );
        if fleet.topic == "away_alone" {
            assert_eq!(missed, 0, "everything was measured, or missed for want of CPU");
        }
    }
}

/// FLEET_MEMBERS=100 tries a hundred members for twelve partitions.
#[test]
fn two_groups_on_one_topic_are_two_places_and_members_without_a_share_wait() {
    const ONE: &str = "fleet_two_groups_eu";
    const OTHER: &str = "fleet_two_groups_us";
    let kafka = Kafka::shared();
    let (count, partitions) = match number("FLEET_MEMBERS") {
        Some(count) => (count as usize, 12),
        None => (12, PARTITIONS),
    };
    let fleet = Fleet::of(kafka, "fleet_two_groups", ONE, partitions, HOSTS);
    let mut members: Vec<Agent> = (1..count).map(|_| fleet.start()).collect();
    let other = fleet.start_with(&fleet.variables.clone().with("PRODUCE_GROUP", OTHER));
    // Whether the last line about the group has these words.
    let says = |member: &Agent, words: &str| {
        let log = member.stderr();
        let mut group = log
            .lines()
            .filter(|line| line.contains("this producer has no share") || line.contains("shares="));
        group.next_back().is_some_and(|line| line.contains(words))
    };
    let (one, none) = ("shares=1", "this producer has no share");
    let wait_for_owners = |members: &[Agent]| {
        wait_for(
            2 * WITHIN,
            "as many members as partitions have a share each",
            || {
                let count = |words| members.iter().filter(|member| says(member, words)).count();
                let owners = partitions as usize;
                (count(one) == owners && count(none) == members.len() - owners).then_some(())
            },
            || members.iter().map(Agent::stderr).collect(),
        );
    };
    wait_for_owners(&members);
    // One more is ready to take over a share.
    let metrics = metrics();
    members.push(fleet.start_with(&fleet.variables.and(&metrics)));
    wait_for_owners(&members);
    wait_until_ready(&metrics, &members);
    let shared_at = now_micros();
    // A run of `--once` checks all hosts beside them.
    let once = Agent::start(
        &["produce", "--once", "-c", fleet.hosts.to_str().unwrap()],
        &fleet.variables.clone().with("AGENT_NAME", "once"),
    );
    let mut once = once;
    assert_eq!(once.wait(WITHIN).code(), Some(0), "{}", once.stderr());
    let agents: Vec<&Agent> = members.iter().chain([&other]).collect();
    for place in [ONE, OTHER] {
        fleet.wait_for_ticks_of(kafka, place, shared_at + 3 * SECOND, &agents);
    }
    // When owners are killed, members without a share get theirs.
    let killed_at = now_micros();
    for _ in 0..2 {
        let owner = members.iter().position(|member| says(member, one)).unwrap();
        members.remove(owner).kill();
    }
    wait_for_owners(&members);
    let agents: Vec<&Agent> = members.iter().collect();
    fleet.wait_for_ticks_of(kafka, ONE, killed_at + 8 * SECOND, &agents);
    // Those without a share first, all at once.
    let (owners, waiting): (Vec<Agent>, Vec<Agent>) =
        members.into_iter().partition(|member| says(member, one));
    for members in [waiting, owners] {
        members.iter().for_each(|member| member.signal("TERM"));
        for mut member in members {
            let code = member.wait(crate::agent::STOP_WITHIN).code();
            assert_eq!(code, Some(0), "{}", member.stderr());
        }
    }
    other.stop();
    for place in [ONE, OTHER] {
        let judged = fleet.judged_of(kafka, place);
        let (most, missed) = judged.assert_whole(0);
        eprintln!(
            "{place}: missed {missed}, per host at most {most}, claims {}",
            judged.claims
        );
        assert_eq!(judged.ticks.len(), HOSTS, "{place}");
    }
    assert_eq!(fleet.judged_of(kafka, "once").valid.len(), HOSTS);
}

#[test]
fn a_producer_reports_another_program_in_its_group_and_goes_on_without_a_wrong_tick() {
    let kafka = Kafka::shared();
    let group = "fleet_strangers";
    let fleet = Fleet::of(kafka, group, group, PARTITIONS, HOSTS);
    let stranger = |strategy: &str| {
        let consumer: BaseConsumer = kafka
            .client()
            .set("group.id", group)
            .set("partition.assignment.strategy", strategy)
            .set("session.timeout.ms", "6000")
            .set("enable.auto.commit", "false")
            .create()
            .unwrap();
        consumer.subscribe(&[&fleet.topic]).unwrap();
        consumer
    };
    let wait_for_partitions = |consumer: &BaseConsumer, agents: &[&Agent]| {
        wait_for(
            WITHIN,
            "the other program has partitions",
            || {
                let _ = consumer.poll(Duration::from_millis(100));
                let assigned = consumer.assignment().unwrap();
                // The list itself must not outlive the consumer.
                let of = |element: &TopicPartitionListElem<'_>| element.partition();
                let partitions: Vec<i32> = assigned.elements().iter().map(of).collect();
                (!partitions.is_empty()).then_some(partitions)
            },
            || agents.iter().map(|agent| agent.stderr()).collect(),
        )
    };
    // Its way of assigning partitions is another one.
    let first = stranger("range");
    wait_for_partitions(&first, &[]);
    let metrics = metrics();
    let agent = fleet.start_with(&fleet.variables.and(&metrics));
    agent.wait_for_stderr("another program", WITHIN);
    wait_until_unready(&metrics, "another program uses this group", &[&agent]);
    drop(first);
    fleet.wait_for_ticks_since(kafka, now_micros(), &[&agent]);

    // It assigns partitions in the same way, and commits offsets.
    let second = stranger("cooperative-sticky");
    let theirs = wait_for_partitions(&second, &[&agent]);
    let mut offsets = TopicPartitionList::new();
    for partition in theirs {
        let mut commit = offsets.add_partition(&fleet.topic, partition);
        commit.set_offset(Offset::Offset(1)).unwrap();
        commit.set_metadata("not a ledger");
    }
    second.commit(&offsets, CommitMode::Sync).unwrap();
    wait_for(
        WITHIN,
        "the producer says who has partitions",
        || {
            let _ = second.poll(Duration::from_millis(100));
            agent
                .stderr()
                .contains("are not checked: \"rdkafka\" at /127.0.0.1 has fleet_strangers/")
                .then_some(())
        },
        || agent.stderr(),
    );
    wait_until_unready(&metrics, "\"rdkafka\" at ", &[&agent]);
    drop((second, offsets));
    agent.wait_for_stderr("cannot be taken", WITHIN);
    let said = agent.stderr();
    assert!(
        said.contains("end that program and all producers of this group, delete the offsets"),
        "{said}"
    );
    agent.stop();
    wait_for(
        WITHIN,
        "the group is empty",
        || kafka.members(group).is_empty().then_some(()),
        String::new,
    );
    kafka.delete_group(group);
    let agent = fleet.start();
    fleet.wait_for_ticks_since(kafka, now_micros() + 2 * SECOND, &[&agent]);
    agent.stop();
    let judged = fleet.judged(kafka);
    judged.assert_whole(0);
    assert_eq!(judged.superseded, [""; 0]);
}

#[test]
fn a_lone_producer_with_one_partition_lets_its_checks_end() {
    let kafka = Kafka::shared();
    let fleet = Fleet::of(kafka, "fleet_one_partition", "fleet_one_partition", 1, 3);
    // A check is nearly always under way.
    let _silent = fleet.check_a_silent_site();
    let agent = fleet.start();
    fleet.wait_for_ticks_since(kafka, now_micros() + SECOND, &[&agent]);
    let stopped_at = now_micros();
    agent.stop();
    let judged = fleet.judged(kafka);
    for (host, ticks) in &judged.ticks {
        let (last, _) = ticks.last().unwrap();
        assert!(*last > stopped_at - SECOND, "{host}: a check was cut off");
    }
    let agent = fleet.start();
    fleet.wait_for_ticks_since(kafka, now_micros(), &[&agent]);
    agent.stop();
    fleet.judged(kafka).assert_whole(0);
}

/// A minute or two is the most that an operator overlooks.
#[cfg(target_os = "linux")]
#[test]
fn a_producer_whose_clock_is_two_minutes_wrong_doubles_no_tick_and_leaves_none_out() {
    let kafka = Kafka::shared();
    for (topic, ahead) in [("fleet_clock_ahead", 120), ("fleet_clock_behind", -120)] {
        let fleet = Fleet::of(kafka, topic, topic, PARTITIONS, HOSTS);
        let right = fleet.start();
        fleet.wait_for_ticks_since(kafka, now_micros() + SECOND, &[&right]);
        let wrong = fleet.start_with(&with_clock(&fleet.variables, ahead));
        wrong.wait_for_stderr("shares=2", WITHIN);
        let wrong_since = now_micros();
        wait_until(wrong_since + 4 * SECOND);
        let newest = |judged: &Judged| {
            judged
                .ticks
                .values()
                .filter_map(|ticks| ticks.last())
                .map(|tick| tick.0)
                .max()
        };
        if ahead > 0 {
            assert!(newest(&fleet.judged(kafka)) > Some(now_micros() + 100 * SECOND));
        }
        // The other one gets all shares, at which it has another time.
        wrong.stop();
        right.wait_for_stderr("shares=4", WITHIN);
        wait_until(now_micros() + 3 * SECOND);
        if let Some(seconds) = number("SOAK_SECONDS") {
            assert!(seconds >= 300, "two minutes for each clock");
            fleet.wait_for_ticks_since(kafka, wrong_since + 130 * SECOND, &[&right]);
        }
        right.stop();
        let judged = fleet.judged(kafka);
        assert_eq!(judged.ticks.len(), HOSTS);
        judged.assert_whole(0);
    }
}

#[test]
fn a_topic_that_is_recreated_under_both_agents_costs_no_later_tick() {
    let mut case = Case::new("fleet_anew_under_both", PARTITIONS);
    let fleet = Fleet::of(case.kafka, case.name, "anew", PARTITIONS, HOSTS);
    let (consumer, producer) = (case.consume(), fleet.start());
    let agents = [&producer, &consumer];
    fleet.wait_for_ticks_since(case.kafka, now_micros() + 4 * SECOND, &agents);
    wait_for(
        WITHIN,
        "rows are stored",
        || {
            let db = &mut case.db;
            (db.exists("host_metrics") && db.count("host_metrics") > 4 * HOSTS as i64).then_some(())
        },
        || consumer.stderr(),
    );
    case.kafka.delete_topic(case.name);
    case.kafka.create_topic(case.name, PARTITIONS);
    fleet.wait_for_ticks_since(case.kafka, now_micros() + 2 * SECOND, &agents);
    producer.stop();
    let judged = fleet.judged(case.kafka);
    judged.assert_whole(0);
    let ticks = judged.ticks.iter().flat_map(|(host, ticks)| {
        let of_host = ticks.iter().map(move |(tick, _)| format!("{host} {tick}"));
        of_host.collect::<Vec<_>>()
    });
    let ticks: BTreeSet<String> = ticks.collect();
    let rows =
        "SELECT concat(address, ' ', round(extract(epoch FROM scheduled_at) * 1000000)) FROM host_metrics";
    wait_for(
        WITHIN,
        "every tick of the new topic is stored",
        || {
            let stored = case.db.many(rows).into_iter().collect();
            ticks.is_subset(&stored).then_some(())
        },
        || consumer.stderr(),
    );
    consumer.stop();
    assert_eq!(case.db.count("host_metrics_rejected"), 0);
}

#[test]
fn a_recreated_topic_and_deleted_offsets_neither_end_nor_repeat_ticks() {
    let kafka = Kafka::start();
    let fleet = Fleet::new(&kafka, "fleet_anew");
    let agent = fleet.start();
    fleet.wait_for_ticks_since(&kafka, now_micros() + SECOND, &[&agent]);
    kafka.delete_topic(&fleet.topic);
    kafka.create_topic(&fleet.topic, PARTITIONS);
    fleet.wait_for_ticks_since(&kafka, now_micros() + 2 * SECOND, &[&agent]);
    agent.stop();
    fleet.judged(&kafka).assert_whole(0);

    wait_for(
        WITHIN,
        "the group is empty",
        || kafka.members(GROUP).is_empty().then_some(()),
        String::new,
    );
    kafka.delete_group(GROUP);
    let agent = fleet.start();
    agent.wait_for_stderr("has no ledger", WITHIN);
    fleet.wait_for_ticks_since(&kafka, now_micros() + 2 * SECOND, &[&agent]);
    agent.stop();
    let judged = fleet.judged(&kafka);
    // The last records of each partition say where its hosts continue.
    judged.assert_whole(0);
    assert_eq!(judged.superseded, [""; 0]);
}

#[test]
fn records_that_kafka_deleted_while_nobody_checked_cost_no_tick() {
    let kafka = Kafka::shared();
    let fleet = Fleet::of(kafka, "fleet_expired", "fleet_expired", PARTITIONS, HOSTS);
    let agent = fleet.start();
    fleet.wait_for_ticks_since(kafka, now_micros() + SECOND, &[&agent]);
    agent.stop();
    let before = fleet.judged(kafka);
    let records = kafka.records(&fleet.topic);
    for partition in 0..PARTITIONS {
        let last = records.iter().rfind(|record| record.partition == partition);
        kafka.delete_records(&fleet.topic, partition, last.unwrap().offset + 1);
    }
    let agent = fleet.start();
    fleet.wait_for_ticks_since(kafka, now_micros() + SECOND, &[&agent]);
    agent.stop();
    let mut all = before;
    for (host, ticks) in fleet.judged(kafka).ticks {
        all.ticks.get_mut(&host).unwrap().extend(ticks);
    }
    all.assert_whole(0);
    assert_eq!(all.ticks.len(), HOSTS);
}

#[test]
fn hosts_and_partitions_that_change_while_members_are_stopped_at_random_double_no_tick() {
    let kafka = Kafka::start();
    let fleet = Fleet::new(&kafka, "fleet_changes");
    let all = fs::read_to_string(&fleet.hosts).unwrap();
    let mut agents = vec![fleet.start(), fleet.start()];
    fleet.wait_for_ticks_since(&kafka, now_micros() + SECOND, &agents.iter().collect::<Vec<_>>());

    // A rolling change: members with different lists of hosts, until the last one has the new list.
    let some: Vec<&str> = all.lines().take(HOSTS - 4).collect();
    fs::write(&fleet.hosts, some.join("\n")).unwrap();
    agents.push(fleet.start());
    agents[2].wait_for_stderr("shares=", WITHIN);
    fs::write(&fleet.hosts, &all).unwrap();
    agents.remove(0).stop();
    agents.push(fleet.start());
    agents.remove(1).stop();

    kafka.add_partitions(&fleet.topic, 2 * PARTITIONS);
    // Longer than a session, at steps that nobody chooses.
    let mut random = fastrand::Rng::with_seed(now_micros() as u64);
    for round in 0..3 {
        let (pause, freeze) = (random.i64(0..2 * SECOND), random.i64(SECOND..8 * SECOND));
        let frozen = &agents[round % agents.len()];
        wait_until(now_micros() + pause);
        frozen.signal("STOP");
        wait_until(now_micros() + freeze);
        frozen.signal("CONT");
    }
    fleet.wait_for_ticks_since(
        &kafka,
        now_micros() + 3 * SECOND,
        &agents.iter().collect::<Vec<_>>(),
    );
    // One that starts now uses as many partitions as the others.
    agents.push(fleet.start());
    agents[2].wait_for_stderr("the group uses the first 4", WITHIN);
    fleet.wait_for_ticks_since(
        &kafka,
        now_micros() + 3 * SECOND,
        &agents.iter().collect::<Vec<_>>(),
    );
    agents.into_iter().for_each(end);
    let judged = fleet.judged(&kafka);
    for (host, ticks) in &judged.ticks {
        let in_order = ticks.windows(2).all(|pair| pair[0].0 < pair[1].0);
        assert!(in_order, "{host}: a tick is there twice: {ticks:?}");
    }
    // Hosts that every list had are without a gap.
    let stays = |host: &&String| some.iter().any(|line| line.starts_with(&format!("{host} ")));
    let stayed = Judged {
        ticks: judged
            .ticks
            .iter()
            .filter(|(host, _)| stays(host))
            .map(|(host, ticks)| (host.clone(), ticks.clone()))
            .collect(),
        ..Judged::default()
    };
    assert_eq!(stayed.ticks.len(), HOSTS - 4);
    stayed.assert_whole(0);
}

#[test]
fn a_missing_topic_of_one_host_is_reported_and_its_host_is_checked_as_soon_as_it_exists() {
    let kafka = Kafka::shared();
    let fleet = Fleet::of(kafka, "fleet_own_topic", "fleet_own_topic", PARTITIONS, HOSTS);
    let hosts = fs::read_to_string(&fleet.hosts).unwrap();
    let own = "http://127.0.0.1:1/own 1s topic=fleet_own_topic_2\n";
    fs::write(&fleet.hosts, hosts + own).unwrap();
    let agent = fleet.start();
    agent.wait_for_stderr("waiting for the topic fleet_own_topic_2", WITHIN);
    fleet.wait_for_ticks_since(kafka, now_micros(), &[&agent]);
    kafka.create_compacted_topic("fleet_own_topic_2", 1);
    agent.wait_for_stderr("share=fleet_own_topic_2/0 epoch=", WITHIN);
    agent.stop();
    assert!(!kafka.records("fleet_own_topic_2").is_empty());
}

#[test]
fn producers_of_one_group_with_different_names_for_their_place_are_told() {
    let kafka = Kafka::shared();
    let fleet = Fleet::of(kafka, "fleet_two_names", "fleet_two_names", 1, 1);
    let mut first = fleet.start_with(&fleet.variables.clone().with("AGENT_NAME", "New York"));
    first.wait_for_stderr("taken", WITHIN);
    first.kill();
    let second = fleet.start_with(&fleet.variables.clone().with("AGENT_NAME", "Frankfurt"));
    second.wait_for_stderr(
        "AGENT_NAME=New York, and this producer has AGENT_NAME=Frankfurt",
        WITHIN,
    );
    second.stop();
    let third = fleet.start_with(&fleet.variables.clone().with("AGENT_NAME", "Frankfurt"));
    third.wait_for_stderr("taken", WITHIN);
    third.stop();
}

#[test]
fn a_member_without_rights_says_which_one_is_missing() {
    use crate::kafka::Listener;
    let port = free_port().unwrap();
    let plain = r#"org.apache.kafka.common.security.plain.PlainLoginModule required username="a" password="a" user_p="secret";"#;
    let listener = Listener {
        name: "PASSWORD",
        protocol: "SASL_PLAINTEXT",
        port,
        advertised_port: port,
        settings: vec![
            ("sasl.enabled.mechanisms", "PLAIN".to_owned()),
            ("plain.sasl.jaas.config", plain.to_owned()),
        ],
    };
    let rights = "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer\n\
                  super.users=User:ANONYMOUS\n";
    let kafka = Kafka::start_with_settings(&[listener], &[], rights);
    let fleet = Fleet::new(&kafka, "fleet_rights");
    let user = ["--add", "--allow-principal", "User:p"];
    let allow = |more: &[&str]| kafka.change_rights(&[&user[..], more].concat());
    allow(&[
        "--topic",
        "fleet_rights",
        "--operation",
        "Write",
        "--operation",
        "Describe",
    ]);
    let variables = fleet
        .variables
        .clone()
        .with("KAFKA_BOOTSTRAP_SERVERS", format!("127.0.0.1:{port}"))
        .with("KAFKA_SECURITY_PROTOCOL", "SASL_PLAINTEXT")
        .with("KAFKA_SASL_MECHANISM", "PLAIN")
        .with("KAFKA_SASL_USERNAME", "p")
        .with("KAFKA_SASL_PASSWORD", "secret");
    let metrics = metrics();
    let agent = fleet.start_with(&variables.and(&metrics));
    agent.wait_for_stderr("needs the right READ on the group", WITHIN);
    wait_until_unready(&metrics, "needs the right READ on the group", &[&agent]);
    allow(&["--group", GROUP, "--operation", "Read"]);
    agent.wait_for_stderr("shares could not be taken", WITHIN);
    allow(&["--topic", "fleet_rights", "--operation", "Read"]);
    fleet.wait_for_ticks_since(&kafka, now_micros(), &[&agent]);
    wait_until_ready(&metrics, std::slice::from_ref(&agent));

    let right = ["--topic", "fleet_rights", "--operation", "Read"];
    kafka.change_rights(&[&["--remove", "--allow-principal", "User:p"][..], &right].concat());
    agent.wait_for_stderr("could not be committed", WITHIN);
    allow(&right);
    fleet.wait_for_ticks_since(&kafka, now_micros(), &[&agent]);
    agent.stop();
    fleet.judged(&kafka).assert_whole(0);
}

/// Stops a producer that may not be a member of its group yet, and so may leave records that Kafka never acknowledged.
pub fn end(mut producer: Agent) {
    producer.signal("TERM");
    producer.wait(WITHIN);
}

/// For a moment that has to pass, because nothing shows that it is over.
pub fn wait_until(at: i64) {
    let left = u64::try_from(at - now_micros()).unwrap_or(0);
    wait_for(
        WITHIN + Duration::from_micros(left),
        "time passes",
        || (now_micros() >= at).then_some(()),
        String::new,
    );
}
