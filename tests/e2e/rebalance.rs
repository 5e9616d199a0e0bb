//! Consumers that join, leave, freeze and wake up during a stream of records, and partitions and topics that are added later.

use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer};

use crate::agent::Agent;
use crate::case::{Case, InProcess, SOON, Stream, wait_for_count_within, write};
use crate::database::{config, server};
use crate::kafka::Kafka;
use crate::scratch::wait_for;
use crate::table;

/// The group gives up a silent member after 15 s, and the next consumer ends its transaction after 5 s more.
const TAKEN_OVER_WITHIN: Duration = Duration::from_secs(40);

/// Two looks at the group 15 s apart, the first one up to 15 s later, and then a rebalance.
const NOTICED_WITHIN: Duration = Duration::from_secs(60);

fn wait_for_share(consumer: &Agent, topic: &str) {
    consumer.wait_for_stderr(&format!("assigned {topic}/"), SOON);
}

#[test]
fn consumers_that_come_and_go_under_load_store_every_record_once() {
    const PARTITIONS: i32 = 6;
    let mut case = Case::new("come-and-go", PARTITIONS);
    let stream = Stream::start(case.kafka, case.name, PARTITIONS);
    let variables = case
        .variables()
        .with("LOG_LEVEL", "INFO")
        .with("DB_BATCH_SIZE", 20);
    let mut consumers: Vec<Agent> = Vec::new();
    let mut rows = 0;
    // Up to four consumers. Each joins or leaves while records are written and read. The next step begins when more is stored, not
    // when the rebalance is over.
    for comes in [true, true, true, false, true, false, false, true, true, false] {
        match comes {
            true => consumers.push(Agent::start(&["consume"], &variables)),
            false => consumers.remove(0).stop(),
        }
        rows = wait_for_more(&mut case, rows + 200, &consumers);
    }
    let sent = stream.end();
    case.wait_for_rows(sent, &consumers.iter().collect::<Vec<_>>());
    let positions: Vec<Option<i64>> = case
        .db
        .many("SELECT next_offset::text FROM host_metrics_offsets ORDER BY partition")
        .iter()
        .map(|text| text.parse().ok())
        .collect();
    case.kafka
        .wait_for_commits("come-and-go", "come-and-go", &positions);
    for consumer in consumers {
        assert_eq!(consumer.said("[ERROR]"), 0, "{}", consumer.stderr());
        consumer.stop();
    }
    case.assert_exactly_once(&["come-and-go"]);
}

/// Waits for at least that many rows, and returns their number.
fn wait_for_more(case: &mut Case, rows: i64, consumers: &[Agent]) -> i64 {
    let db = &mut case.db;
    wait_for(
        SOON,
        "more rows",
        || {
            let is_there = db.exists("host_metrics");
            let found = if is_there { db.count("host_metrics") } else { 0 };
            (found >= rows).then_some(found)
        },
        || consumers.iter().map(Agent::stderr).collect(),
    )
}

/// The number of a consumer's partitions, from its log.
fn assigned(consumer: &Agent, topic: &str) -> i32 {
    let names = |line: &str| line.matches(&format!(" {topic}/")).count() as i32;
    let said = consumer.stderr();
    let changes = said.lines().filter_map(|line| match line {
        _ if line.contains("] assigned ") => Some(names(line)),
        _ if line.contains("] revoked ") => Some(-names(line)),
        _ => None,
    });
    changes.sum()
}

#[test]
fn a_static_member_that_comes_back_soon_moves_no_partitions() {
    let mut case = Case::new("static", 4);
    let variables = case.variables().with("LOG_LEVEL", "INFO");
    let start = |id: &str| {
        Agent::start(
            &["consume"],
            &variables.clone().with("KAFKA_GROUP_INSTANCE_ID", id),
        )
    };
    let stays = start("stays");
    wait_for_share(&stays, "static");
    let mut comes_back = start("comes-back");
    for consumer in [&stays, &comes_back] {
        wait_for(
            SOON,
            "each has half",
            || (assigned(consumer, "static") == 2).then_some(()),
            || stays.stderr() + &comes_back.stderr(),
        );
    }
    let share = |consumer: &Agent| {
        let said = consumer.stderr();
        let line = said.lines().rfind(|line| line.contains("] assigned "));
        line.and_then(|line| line.split("assigned ").nth(1))
            .map(str::to_owned)
    };
    let its_share = share(&comes_back);
    let said = stays.stderr();
    let mut rows = 0;
    for round in 0..2 {
        // Once by a crash, once by a clean stop.
        match round {
            0 => comes_back.kill(),
            _ => comes_back.stop(),
        }
        comes_back = start("comes-back");
        for partition in 0..4 {
            case.write(partition, rows..rows + 5);
            rows += 5;
        }
        case.wait_for_rows(rows, &[&stays, &comes_back]);
        assert_eq!(share(&comes_back), its_share);
    }
    let changes = |log: &str| -> Vec<String> {
        let is_change = |line: &&str| line.contains("assigned") || line.contains("revoked");
        log.lines().filter(is_change).map(str::to_owned).collect()
    };
    assert_eq!(
        changes(&stays.stderr()),
        changes(&said),
        "nothing happened to the other one"
    );
    stays.stop();
    comes_back.stop();
    case.assert_exactly_once(&["static"]);
}

#[test]
fn a_consumer_that_is_frozen_during_a_flush_blocks_no_other_and_stores_nothing_twice() {
    let mut case = Case::new("sleeper", 1);
    let variables = case.variables();
    let sleeper = Agent::start(&["consume"], &variables);
    case.write(0, 0..10);
    case.wait_for_rows(10, &[&sleeper]);
    // Its flush waits for the lock on the position, and then for rows that do not come.
    case.db
        .execute("BEGIN; SELECT FROM host_metrics_offsets FOR UPDATE");
    case.write(0, 10..20);
    let mut watcher = table::connect(server());
    let database = case.db.name.clone();
    let mut wait_until = |what: &str, condition: &str| {
        let sql = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = '{database}' AND application_name = 'host-metrics' \
             AND {condition}"
        );
        wait_for(
            SOON,
            what,
            || (table::count(&mut watcher, &sql) == 1).then_some(()),
            || sleeper.stderr(),
        );
    };
    wait_until("the flush waits for the position", "wait_event_type = 'Lock'");
    sleeper.signal("STOP");
    case.db.execute("COMMIT");
    wait_until(
        "the flush waits for rows",
        "query LIKE 'COPY%' AND wait_event = 'ClientRead'",
    );

    let awake = Agent::start(&["consume"], &variables);
    let db = &mut case.db;
    wait_for(
        TAKEN_OVER_WITHIN,
        "the other one takes over",
        || (db.count("host_metrics") >= 20).then_some(()),
        || awake.stderr(),
    );
    sleeper.signal("CONT");
    wait_for(
        SOON,
        "it hears from Kafka or from Postgres what happened",
        || {
            (sleeper.said("revoked sleeper/0")
                + sleeper.said("another consumer moved the position of sleeper/0")
                > 0)
            .then_some(())
        },
        || sleeper.stderr(),
    );
    case.write(0, 20..30);
    case.wait_for_rows(30, &[&sleeper, &awake]);
    awake.stop();
    wait_for(
        SOON,
        "it has its partition again",
        || (assigned(&sleeper, "sleeper") == 1).then_some(()),
        || sleeper.stderr(),
    );
    case.write(0, 30..40);
    case.wait_for_rows(40, &[&sleeper]);
    sleeper.stop();
    case.assert_exactly_once(&["sleeper"]);
}

#[test]
fn a_flush_whose_position_another_consumer_moved_is_not_stored_and_reading_continues_there() {
    let mut case = Case::new("fenced", 1);
    let consumer = case.consume();
    case.write(0, 0..10);
    case.wait_for_rows(10, &[&consumer]);
    // Another transaction stores the next five records and has not committed yet.
    case.db.execute(
        "BEGIN; UPDATE host_metrics_offsets SET next_offset = 15; \
         INSERT INTO host_metrics (address, is_valid, kafka_topic, kafka_partition, kafka_offset) \
         SELECT 'http://h/' || n, true, 'fenced', 0, n FROM generate_series(10, 14) n",
    );
    case.write(0, 10..20);
    let mut watcher = table::connect(server());
    let waiting = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = '{}' AND wait_event_type = 'Lock'",
        case.db.name
    );
    wait_for(
        SOON,
        "the flush waits for the position",
        || (table::count(&mut watcher, &waiting) == 1).then_some(()),
        || consumer.stderr(),
    );
    case.db.execute("COMMIT");
    consumer.wait_for_stderr(
        "another consumer moved the position of fenced/0 from 10 to 15; 10 records are left to that consumer",
        SOON,
    );
    case.wait_for_rows(20, &[&consumer]);
    consumer.stop();
    case.assert_exactly_once(&["fenced"]);
}

#[test]
fn of_two_consumers_with_one_instance_id_the_older_one_ends_with_the_reason() {
    let mut case = Case::new("twins", 1);
    let variables = case.variables().with("KAFKA_GROUP_INSTANCE_ID", "twin");
    let mut older = Agent::start(&["consume"], &variables.clone().with("DB_BATCH_SECONDS", 2));
    case.write(0, 0..10);
    case.wait_for_rows(10, &[&older]);
    case.write(0, 10..20);
    let younger = Agent::start(&["consume"], &variables);
    let status = older.wait(SOON);
    assert_eq!(status.code(), Some(1), "{}", older.stderr());
    older.wait_for_stderr("each consumer needs its own", SOON);
    case.write(0, 20..30);
    case.wait_for_rows(30, &[&younger]);
    younger.stop();
    case.assert_exactly_once(&["twins"]);
}

#[test]
fn partitions_that_a_rebalance_left_without_an_owner_are_noticed_and_read() {
    let mut case = Case::new("orphans", 4);
    for partition in 0..4 {
        case.write(
            partition,
            i64::from(partition) * 10..i64::from(partition + 1) * 10,
        );
    }
    // A member has all partitions, is asked to give back half of them, and dies before it answers. The broker gives the half that it
    // keeps to the member that comes back under its name, and the other half to no member until the next rebalance.
    let dying: BaseConsumer = case
        .kafka
        .client()
        .set("group.id", case.name)
        .set("group.instance.id", "comes-back")
        .set("partition.assignment.strategy", "cooperative-sticky")
        .set("enable.auto.commit", "false")
        .create()
        .unwrap();
    dying.subscribe(&[case.name]).unwrap();
    wait_for(
        SOON,
        "it has everything",
        || {
            dying.poll(Duration::from_millis(20));
            (dying.assignment().unwrap().count() == 4).then_some(())
        },
        String::new,
    );
    let start = |id: &str| {
        let variables = case.variables().with("KAFKA_GROUP_INSTANCE_ID", id);
        Agent::start(&["consume"], &variables)
    };
    let stays = start("stays");
    wait_for(
        SOON,
        "the rebalance",
        || (case.kafka.members(case.name).len() == 2 && case.kafka.group_is_stable(case.name)).then_some(()),
        || stays.stderr(),
    );
    let comes_back = start("comes-back");
    wait_for(
        NOTICED_WITHIN,
        "every partition is read",
        || {
            let is_there = case.db.exists("host_metrics");
            (is_there && case.db.count("host_metrics") == 40).then_some(())
        },
        || stays.stderr() + &comes_back.stderr(),
    );
    assert!(
        stays.said("are assigned to no member") + comes_back.said("are assigned to no member") > 0,
        "they were no orphans: {}{}",
        stays.stderr(),
        comes_back.stderr()
    );
    stays.stop();
    comes_back.stop();
    case.assert_exactly_once(&["orphans"]);
    // It does not leave the group, because that would wait for the revocation, which it does not answer.
    std::mem::forget(dying);
}

#[test]
fn several_topics_are_read_together_and_a_later_one_delays_none() {
    let mut case = Case::new("several", 3);
    case.kafka.create_topic("several-more", 1);
    let topics = "several,several-more,several-late";
    let consumer = Agent::start(&["consume"], &case.variables().with("KAFKA_TOPIC", topics));
    write(case.kafka, "several", 2, 0..10);
    write(case.kafka, "several-more", 0, 0..10);
    case.wait_for_rows(20, &[&consumer]);
    consumer.wait_for_stderr("[WARN] waiting for the topic: ", SOON);
    assert!(
        consumer.stderr().contains("several-late"),
        "{}",
        consumer.stderr()
    );
    case.kafka.create_topic("several-late", 2);
    write(case.kafka, "several-late", 1, 0..10);
    write(case.kafka, "several", 0, 10..20);
    // The consumer looks for topics every 30 s.
    wait_for_count_within(2 * SOON, &mut case.db, "host_metrics", 40, &[&consumer]);
    consumer.stop();
    case.assert_exactly_once(&["several", "several-more", "several-late"]);
    let by_topic = case.db.many(
        "SELECT concat(kafka_topic, ' ', count(*)) FROM host_metrics GROUP BY kafka_topic ORDER BY kafka_topic",
    );
    assert_eq!(by_topic, ["several 20", "several-late 10", "several-more 10"]);
}

#[test]
fn added_partitions_are_read_from_their_first_record() {
    let kafka = Kafka::shared();
    let mut case = Case::new("growing", 1);
    let mut settings = config(server(), &case.db.name, "host_metrics");
    settings.kafka.bootstrap_servers = kafka.bootstrap_servers();
    settings.topics = vec!["growing".into()];
    settings.group_id = "growing".into();
    settings.batch_wait = Duration::from_millis(100);
    // The default is half a minute.
    let consumer = InProcess::start(settings, &[("topic.metadata.refresh.interval.ms", "1000")]);
    case.write(0, 0..10);
    case.wait_for_rows(10, &[]);
    kafka.add_partitions("growing", 3);
    // The records are written before a consumer reads there.
    case.write(1, 10..20);
    case.write(2, 20..30);
    case.wait_for_rows(30, &[]);
    consumer.stop();
    case.assert_exactly_once(&["growing"]);
}
