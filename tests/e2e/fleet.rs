//! Producers that share their hosts (PRODUCE_GROUP), with a real Kafka: kills, freezes, planned stops and outages of the
//! broker. Without the records that a consumer would reject as superseded, the topic has each tick of each host once.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::time::Duration;

use host_metrics::sample::epoch::{Claim, Epochs};
use host_metrics::sample::{self, Timestamp};

use crate::agent::{Agent, Variables, run};
use crate::case::Case;
use crate::kafka::Kafka;
use crate::scratch::{self, wait_for};

const GROUP: &str = "eu";
const PARTITIONS: i32 = 4;
const HOSTS: usize = 24;
const SECOND: i64 = 1_000_000;

/// The bound for a session of 6 s and a takeover, on a busy machine.
const WITHIN: Duration = Duration::from_secs(60);

struct Fleet {
    topic: String,
    hosts: PathBuf,
    variables: Variables,
}

/// The content of a topic, without superseded records.
#[derive(Debug, Default)]
struct Judged {
    /// The ticks of each host, and whether each was missed because no producer had the host.
    ticks: BTreeMap<String, Vec<(i64, bool)>>,
    /// As `partition/offset`, sorted by both.
    valid: Vec<String>,
    superseded: Vec<String>,
    claims: usize,
}

impl Fleet {
    fn new(kafka: &Kafka, topic: &str) -> Self {
        kafka.create_topic(topic, PARTITIONS);
        // No server listens there, so a check takes no time. The outcome does not matter.
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let hosts = scratch::directory("fleet").join("hosts");
        let lines: Vec<String> = (0..HOSTS)
            .map(|i| format!("http://{address}/{i} {}s\n", if i == 0 { 5 } else { 1 }))
            .collect();
        fs::write(&hosts, lines.concat()).unwrap();
        let variables = Variables::new()
            .kafka(&kafka.bootstrap_servers(), topic)
            .with("PRODUCE_GROUP", GROUP)
            .with("LOG_LEVEL", "INFO");
        Self {
            topic: topic.to_owned(),
            hosts,
            variables,
        }
    }

    fn start(&self) -> Agent {
        Agent::start(&["produce", "-c", self.hosts.to_str().unwrap()], &self.variables)
    }

    fn judged(&self, kafka: &Kafka) -> Judged {
        let mut judged = Judged::default();
        let mut epochs = BTreeMap::<i32, Epochs>::new();
        for record in kafka.records(&self.topic) {
            let value = record.value.unwrap();
            let epochs = epochs.entry(record.partition).or_default();
            if let Some(claim) = Claim::decode(&value) {
                judged.claims += 1;
                let _ = epochs.judge(claim.place(), claim.epoch);
                continue;
            }
            let sample = sample::decode(&value).unwrap();
            assert_eq!(sample.agent.as_deref(), Some(GROUP));
            let place = format!("{}/{}", record.partition, record.offset);
            if epochs.judge(GROUP, sample.epoch.unwrap()).is_err() {
                judged.superseded.push(place);
                continue;
            }
            judged.valid.push(place);
            let ticks = judged.ticks.entry(sample.address.to_string()).or_default();
            let tick = sample.scheduled_at.map(Timestamp::unix_micros).unwrap();
            // A busy machine may miss ticks for other reasons.
            let error = sample.error.as_deref().unwrap_or_default();
            ticks.push((tick, error.contains("no producer of the group")));
        }
        judged
    }

    /// Waits until every host has a record of a tick after `since`.
    fn wait_for_ticks_since(&self, kafka: &Kafka, since: i64, agents: &[&Agent]) {
        wait_for(
            WITHIN,
            "every host is checked",
            || {
                let ticks = self.judged(kafka).ticks;
                let is_recent =
                    |ticks: &Vec<(i64, bool)>| ticks.iter().any(|(tick, missed)| *tick >= since && !missed);
                (ticks.len() == HOSTS && ticks.values().all(is_recent)).then_some(())
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
    fn assert_whole(&self, since: i64) -> (usize, usize) {
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
}

fn now_micros() -> i64 {
    host_metrics::clock::wall_micros()
}

#[test]
fn a_lone_producer_accounts_for_the_time_that_it_did_not_run() {
    let kafka = Kafka::shared();
    let fleet = Fleet::new(kafka, "fleet_lone");
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
    let (_, missed) = judged.assert_whole(killed_at);
    assert!(
        missed > 0,
        "the time until the session ended is recorded as missed"
    );
    let (most, _) = judged.assert_whole(stopped_at);
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
    let fleet = Fleet::new(kafka, case.name);
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
    assert!(most <= 3, "{most} ticks of a host are missed by a planned stop");

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
    agents.into_iter().for_each(Agent::stop);

    let judged = fleet.judged(kafka);
    let (most, missed) = judged.assert_whole(0);
    eprintln!(
        "missed {missed}, per host at most {most}, superseded {}, claims {}",
        judged.superseded.len(),
        judged.claims
    );
    assert_eq!(judged.ticks.len(), HOSTS);

    // The consumer agrees, even if it is restarted.
    let ends = format!(
        "SELECT coalesce(sum(next_offset), 0)::text FROM host_metrics_offsets WHERE topic = '{}'",
        case.name
    );
    let all = judged.valid.len() + judged.superseded.len() + judged.claims;
    wait_for(
        WITHIN,
        "everything is stored",
        || (case.db.one(&ends) == all.to_string()).then_some(()),
        || consumer.stderr(),
    );
    consumer.stop();
    let places = "SELECT concat(kafka_partition, '/', kafka_offset) FROM";
    let order = "ORDER BY kafka_partition, kafka_offset";
    assert_eq!(
        case.db.many(&format!("{places} host_metrics {order}")),
        judged.valid
    );
    let rejected =
        format!("{places} host_metrics_rejected WHERE reason LIKE 'superseded by epoch % of eu' {order}");
    assert_eq!(case.db.many(&rejected), judged.superseded);
    assert_eq!(
        case.db.count("host_metrics_rejected"),
        judged.superseded.len() as i64
    );

    // So does the audit, which asks Kafka about the offsets of the claims.
    let (status, said) = run(&["audit"], &case.variables());
    assert_eq!(status, 0, "{said}");
    assert!(
        said.contains(&format!("{} claims of producers", judged.claims)),
        "{said}"
    );
    assert!(said.contains("It holds: every record"), "{said}");
}

#[test]
fn what_a_lone_producer_measures_while_kafka_is_away_counts_once() {
    let mut kafka = Kafka::start();
    let fleet = Fleet::new(&kafka, "fleet_away");
    let agent = fleet.start();
    agent.wait_for_stderr("taken", WITHIN);
    fleet.wait_for_ticks_since(&kafka, 0, &[&agent]);
    let away_at = now_micros();
    kafka.kill();
    // Longer than a session. The producer may notice that it is no longer a member only when Kafka is back.
    wait_for(
        2 * WITHIN,
        "the session is over",
        || {
            let said = agent.stderr();
            (said.contains("no member any more") || said.contains("produce ticks=")).then_some(())
        },
        || agent.stderr(),
    );
    kafka.start_again();
    fleet.wait_for_ticks_since(&kafka, now_micros() + 2 * SECOND, &[&agent]);
    agent.stop();
    let judged = fleet.judged(&kafka);
    let (most, missed) = judged.assert_whole(away_at);
    eprintln!(
        "missed {missed}, per host at most {most}, claims {}",
        judged.claims
    );
    assert_eq!(missed, 0, "everything was measured, or missed for want of CPU");
}
