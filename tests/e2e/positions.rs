//! Where reading starts, and what happens if Kafka has no record at the table's position any more, or not yet.

use std::collections::BTreeMap;
use std::time::Duration;

use host_metrics::shutdown::Shutdown;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::{Offset, TopicPartitionList};

use crate::agent::Agent;
use crate::case::{Case, SOON, Stream, value};
use crate::scratch::{now, wait_for};
use crate::state::wait_for_due;

const REQUEST_WITHIN: Duration = Duration::from_secs(10);

/// The addresses of the table's rows, in the order of their records.
fn stored(case: &mut Case) -> Vec<String> {
    case.db
        .many("SELECT address FROM host_metrics ORDER BY kafka_partition, kafka_offset, scheduled_at")
}

fn addresses(numbers: impl Iterator<Item = i64>) -> Vec<String> {
    numbers.map(|number| format!("http://h/{number}")).collect()
}

#[test]
fn the_tables_position_counts_then_the_groups_commit_then_the_earliest_record() {
    let mut case = Case::new("starts", 3);
    for partition in 0..3 {
        case.write(
            partition,
            i64::from(partition) * 10..i64::from(partition + 1) * 10,
        );
    }
    // Kafka has the offset 4 for the first two partitions, the table has 7 for the first one.
    let group: BaseConsumer = case.kafka.client().set("group.id", case.name).create().unwrap();
    let mut commits = TopicPartitionList::new();
    for partition in [0, 1] {
        commits
            .add_partition_offset(case.name, partition, Offset::Offset(4))
            .unwrap();
    }
    group.commit(&commits, CommitMode::Sync).unwrap();
    drop(group);
    let mut init = Agent::start(&["init"], &case.variables());
    assert_eq!(init.wait(SOON).code(), Some(0), "{}", init.stderr());
    case.db
        .execute("INSERT INTO host_metrics_offsets VALUES ('starts', 'starts', 0, 7)");
    let consumer = case.consume();
    case.wait_for_rows(3 + 6 + 10, &[&consumer]);
    case.kafka.wait_for_commits("starts", "starts", &[Some(10); 3]);
    consumer.stop();
    assert_eq!(stored(&mut case), addresses((7..10).chain(14..20).chain(20..30)));
    assert_eq!(case.kafka.committed("starts", "starts"), [Some(10); 3]);
}

#[test]
fn a_position_that_is_deleted_during_a_run_is_reported_and_replaced_by_the_groups_commit() {
    let mut case = Case::new("deleted", 1);
    let consumer = case.consume();
    case.write(0, 0..10);
    case.wait_for_rows(10, &[&consumer]);
    wait_for(
        SOON,
        "the commit",
        || (case.kafka.committed("deleted", "deleted") == [Some(10)]).then_some(()),
        || consumer.stderr(),
    );
    case.db.execute("DELETE FROM host_metrics_offsets");
    case.write(0, 10..20);
    case.wait_for_rows(20, &[&consumer]);
    consumer.wait_for_stderr(
        "the position of deleted/0, 10, is no longer in the offsets table",
        SOON,
    );
    consumer.stop();
    case.assert_exactly_once(&["deleted"]);
}

#[test]
fn a_stop_writes_and_commits_at_once_what_was_read() {
    let mut case = Case::new("patient", 2);
    let variables = case.variables();
    let patient = variables
        .clone()
        .with("DB_BATCH_SECONDS", 3_600)
        .with("DB_BATCH_SIZE", 100_000);
    let consumer = Agent::start(&["consume"], &patient);
    case.write(0, 0..10);
    case.write(1, 10..20);
    let db = &mut case.db;
    let positions = "(SELECT FROM host_metrics_offsets WHERE next_offset = 0) p";
    wait_for(
        SOON,
        "it knows where to start",
        || {
            let is_there = db.exists("host_metrics_offsets");
            (is_there && db.count(positions) == 2).then_some(())
        },
        || consumer.stderr(),
    );
    // Records that it has read must be written. Nothing else may be committed. Nothing shows when it has read them.
    Shutdown::new().wait_until(now() + Duration::from_secs(5));
    consumer.stop();
    let written = case.db.count("host_metrics");
    assert!(written > 0, "five seconds were not enough to read twenty records");
    let committed: i64 = case.kafka.committed("patient", "patient").iter().flatten().sum();
    assert_eq!(committed, written);
    let consumer = Agent::start(&["consume"], &variables);
    case.wait_for_rows(20, &[&consumer]);
    consumer.stop();
    case.assert_exactly_once(&["patient"]);
}

#[test]
fn records_that_kafka_deleted_unread_are_reported_and_reading_continues_at_the_first_one_left() {
    let mut case = Case::new("retention", 2);
    let consumer = case.consume();
    case.write(0, 0..20);
    case.write(1, 100..110);
    case.wait_for_rows(30, &[&consumer]);
    consumer.stop();
    case.write(0, 20..60);
    case.kafka.delete_records(case.name, 0, 40);
    // The other partition is empty until new records come.
    case.write(1, 110..120);
    case.kafka.delete_records(case.name, 1, 20);
    let consumer = case.consume();
    case.wait_for_rows(50, &[&consumer]);
    for words in [
        "Kafka has deleted the records of retention/0 from 20 to 40 before they were read (retention); reading goes on at 40",
        "Kafka has deleted the records of retention/1 from 10 to 20 before they were read (retention); reading goes on at 20",
    ] {
        consumer.wait_for_stderr(words, SOON);
        assert_eq!(consumer.said(words), 1, "{}", consumer.stderr());
    }
    case.write(1, 120..130);
    case.wait_for_rows(60, &[&consumer]);
    case.kafka
        .wait_for_commits("retention", "retention", &[Some(60), Some(30)]);
    consumer.stop();
    assert_eq!(
        stored(&mut case),
        addresses((0..20).chain(40..60).chain(100..110).chain(120..130))
    );
    assert_eq!(
        case.kafka.committed("retention", "retention"),
        [Some(60), Some(30)]
    );
}

#[test]
fn records_that_kafka_deleted_before_the_state_read_them_are_reported_and_missing_only_in_the_state() {
    let mut case = Case::new("state_retention", 1);
    let with_state = case.variables().with("STATE", "on");
    let consumer = Agent::start(&["consume"], &with_state);
    case.write(0, 0..20);
    case.wait_for_rows(20, &[&consumer]);
    wait_for_due(&mut case.db, 20, &consumer);
    consumer.stop();
    let consumer = Agent::start(&["consume"], &case.variables().with("STATE", "off"));
    case.write(0, 20..60);
    case.wait_for_rows(60, &[&consumer]);
    consumer.stop();
    case.kafka.delete_records(case.name, 0, 40);
    let consumer = Agent::start(&["consume"], &with_state);
    case.write(0, 60..70);
    case.wait_for_rows(70, &[&consumer]);
    consumer.wait_for_stderr(
        "Kafka has deleted the records of state_retention/0 from 20 to 40 before they were read (retention); reading goes on at 40",
        SOON,
    );
    wait_for_due(&mut case.db, 20 + 30, &consumer);
    consumer.stop();
    assert_eq!(stored(&mut case), addresses(0..70));
}

#[test]
fn a_recreated_topic_is_reported_and_read_from_its_beginning() {
    let mut case = Case::new("anew", 1);
    let variables = case.variables().with("STATE", "on");
    let consumer = Agent::start(&["consume"], &variables);
    case.write(0, 0..50);
    case.wait_for_rows(50, &[&consumer]);
    wait_for_due(&mut case.db, 50, &consumer);
    consumer.stop();
    case.kafka.delete_topic(case.name);
    case.kafka.create_topic(case.name, 1);
    case.write(0, 100..110);
    let consumer = Agent::start(&["consume"], &variables);
    consumer.wait_for_stderr(
        "position 50 of anew/0 is beyond the end, 10, so the topic was recreated; reading starts at its beginning, 0",
        SOON,
    );
    case.wait_for_rows(60, &[&consumer]);
    case.write(0, 110..120);
    case.wait_for_rows(70, &[&consumer]);
    wait_for_due(&mut case.db, 70, &consumer);
    consumer.stop();
    assert_eq!(
        case.db
            .many("SELECT address FROM host_metrics ORDER BY substr(address, 10)::int"),
        addresses((0..50).chain(100..120))
    );
    assert_eq!(
        case.db
            .many("SELECT concat_ws(' ', group_id, next_offset) FROM host_metrics_offsets ORDER BY 1"),
        ["anew 20", "anew-state 20"]
    );
    assert_eq!(case.kafka.committed("anew", "anew"), [Some(20)]);
}

#[test]
fn a_topic_that_is_recreated_during_a_run_is_read_from_its_beginning() {
    let mut case = Case::new("anew-live", 1);
    let consumer = case.consume();
    case.write(0, 0..50);
    case.wait_for_rows(50, &[&consumer]);
    case.kafka.delete_topic(case.name);
    case.kafka.create_topic(case.name, 1);
    case.write(0, 100..110);
    consumer.wait_for_stderr(
        "position 50 of anew-live/0 is beyond the end, 10",
        Duration::from_secs(60),
    );
    case.wait_for_rows(60, &[&consumer]);
    case.write(0, 110..120);
    case.wait_for_rows(70, &[&consumer]);
    case.kafka.wait_for_commits("anew-live", "anew-live", &[Some(20)]);
    consumer.stop();
}

#[test]
fn kafkas_committed_offset_is_never_above_the_tables_position() {
    const PARTITIONS: i32 = 2;
    let mut case = Case::new("mirror", PARTITIONS);
    let stream = Stream::start(case.kafka, case.name, PARTITIONS);
    let consumer = Agent::start(&["consume"], &case.variables().with("DB_BATCH_SIZE", 10));
    wait_for(
        SOON,
        "rows come",
        || (case.db.exists("host_metrics")).then_some(()),
        || consumer.stderr(),
    );
    // One flush in three fails, some during COMMIT.
    case.db.execute(
        "CREATE SEQUENCE s; CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS \
         'BEGIN IF nextval(''s'') % 3 = 0 THEN RAISE EXCEPTION ''injected'' USING ERRCODE = ''40001''; END IF; \
         RETURN NULL; END'; \
         CREATE CONSTRAINT TRIGGER fail AFTER INSERT ON host_metrics DEFERRABLE INITIALLY DEFERRED \
         FOR EACH ROW WHEN (NEW.kafka_offset % 7 = 0) EXECUTE FUNCTION fail()",
    );
    let began_at = now();
    let mut commits = 0;
    while began_at.elapsed() < Duration::from_secs(6) || (commits <= 10 && began_at.elapsed() < SOON) {
        let committed = case.kafka.committed(case.name, case.name);
        // This is read later, so it may be higher.
        let rows = case
            .db
            .client
            .query("SELECT partition, next_offset FROM host_metrics_offsets", &[])
            .unwrap();
        let positions: BTreeMap<i32, i64> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        for (partition, committed) in (0..).zip(committed) {
            let Some(committed) = committed else { continue };
            commits += 1;
            assert!(
                committed <= positions[&partition],
                "{partition}: {committed} of {positions:?}"
            );
        }
    }
    assert!(commits > 10, "{commits}");
    let sent = stream.end();
    case.db.execute("DROP TRIGGER fail ON host_metrics");
    case.wait_for_rows(sent, &[&consumer]);
    consumer.stop();
    assert!(
        case.db
            .one("SELECT last_value::text FROM s")
            .parse::<i64>()
            .unwrap()
            > 10
    );
    case.assert_exactly_once(&["mirror"]);
}

#[test]
fn every_compression_is_read_and_so_are_transactions_that_were_committed_and_no_others() {
    let mut case = Case::new("written", 1);
    let mut next = 0;
    for compression in ["none", "gzip", "snappy", "lz4", "zstd"] {
        let producer: BaseProducer = case
            .kafka
            .client()
            .set("compression.type", compression)
            .create()
            .unwrap();
        send(&producer, case.name, next..next + 20);
        producer.flush(REQUEST_WITHIN).unwrap();
        next += 20;
    }
    let producer: BaseProducer = case
        .kafka
        .client()
        .set("transactional.id", "written")
        .create()
        .unwrap();
    producer.init_transactions(REQUEST_WITHIN).unwrap();
    for commits in [true, false, true, false] {
        producer.begin_transaction().unwrap();
        send(&producer, case.name, next..next + 20);
        producer.flush(REQUEST_WITHIN).unwrap();
        match commits {
            true => producer.commit_transaction(REQUEST_WITHIN).unwrap(),
            false => producer.abort_transaction(REQUEST_WITHIN).unwrap(),
        }
        next += 20;
    }
    let variables = case.variables().with("DB_BATCH_SIZE", 7);
    let consumer = Agent::start(&["consume"], &variables);
    case.wait_for_rows(140, &[&consumer]);
    consumer.stop();
    // After a restart before markers and aborted records only, nothing is reported, and the records after them are read.
    let consumer = Agent::start(&["consume"], &variables);
    case.write(0, next..next + 1);
    case.wait_for_rows(141, &[&consumer]);
    assert_eq!(consumer.said("[WARN]"), 0, "{}", consumer.stderr());
    consumer.stop();
    let expected = (0..100).chain(100..120).chain(140..160).chain([next]);
    assert_eq!(stored(&mut case), addresses(expected));
}

fn send(producer: &BaseProducer, topic: &str, numbers: std::ops::Range<i64>) {
    for number in numbers {
        let value = value(number);
        let record: BaseRecord<'_, [u8], [u8]> = BaseRecord::to(topic).partition(0).payload(&value);
        producer.send(record).map_err(|(error, _)| error).unwrap();
    }
}
