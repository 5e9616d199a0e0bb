//! Batches of a few kilobytes from a hostile writer: one that expands beyond the limit of Kafka's client, and one that the client
//! expands to any size.

use std::time::Duration;

use crate::agent::{Agent, Variables, run};
use crate::case::{Case, SOON, wait_for_count_within};
use crate::scratch::wait_for;

/// More than librdkafka's `receive.message.max.bytes`, 100 MB.
const BEYOND_THE_CLIENT: usize = 105_000_000;

fn serving(case: &Case) -> Variables {
    case.variables().with_metrics()
}

fn health_becomes(variables: &Variables, expected: i32, words: &str, consumer: &Agent) -> String {
    wait_for(
        2 * SOON,
        &format!("health ends with {expected} and says {words:?}"),
        || {
            let (status, said) = run(&["health"], variables);
            (status == expected && said.contains(words)).then_some(said)
        },
        || consumer.stderr(),
    )
}

#[test]
fn a_batch_that_kafkas_client_refuses_is_reported_and_skipped_on_command() {
    let mut case = Case::new("refused", 1);
    case.write(0, 0..10);
    let large = vec![b'x'; BEYOND_THE_CLIENT];
    case.kafka
        .write_batch("refused", "zstd", &[b"small", &large, b"small"]);
    case.write(0, 10..20);
    let variables = serving(&case);
    let consumer = Agent::start(&["consume"], &variables);
    case.wait_for_rows(10, &[&consumer]);

    let what = "refused/0 is stuck at offset 10: Kafka's client cannot read the batch there (offsets 10 to 12, 3 records, zstd, ";
    let said = health_becomes(&variables, 1, what, &consumer);
    assert!(said.contains("`host-metrics skip refused/0:10`"), "{said}");
    consumer.wait_for_stderr(what, SOON);
    // The position is read repeatedly, and nothing changes by itself.
    let tries = || consumer.said("reading refused/0 from offset 10");
    wait_for(
        SOON,
        "further tries",
        || (tries() >= 4).then_some(()),
        || consumer.stderr(),
    );
    health_becomes(&variables, 1, what, &consumer);
    assert_eq!(consumer.said("is being read again"), 0, "{}", consumer.stderr());
    assert_eq!(case.db.count("host_metrics_rejected"), 0, "never silently");

    let skip = |place: &str| run(&["skip", place], &variables);
    let (status, said) = skip("refused/0");
    assert_eq!(status, 0, "{said}");
    assert!(
        said.contains("The position of refused/0 is 10. The batch there: offsets 10 to 12"),
        "{said}"
    );
    for (place, words) in [
        (
            "refused/0:9",
            "the position of refused/0 is 10, which is already past offset 9",
        ),
        (
            "refused/0:13",
            "offset 13 of refused/0 is after the batch at the position 10 (offsets 10 to 12",
        ),
        ("refused/7:10", "has no position of refused/7"),
        ("other/0:10", "has no position of other/0"),
    ] {
        let (status, said) = skip(place);
        assert_eq!(status, 1, "{place}: {said}");
        assert!(said.contains(words), "{place}: {said}");
    }
    assert_eq!(case.db.count("host_metrics_rejected"), 0);

    // Any offset of the batch identifies it.
    let (status, said) = skip("refused/0:11");
    assert_eq!(status, 0, "{said}");
    assert!(said.contains("The position of refused/0 is now 13"), "{said}");
    case.wait_for_rows(20, &[&consumer]);
    health_becomes(&variables, 0, "ready", &consumer);
    consumer.wait_for_stderr("refused/0 is being read again", SOON);
    let rejected = case.db.one(
        "SELECT concat_ws(' | ', group_id, kafka_topic, kafka_partition, kafka_offset, key, value, reason) \
         FROM host_metrics_rejected",
    );
    assert!(
        rejected.starts_with("refused | refused | 0 | 10 | offsets 10 to 12 were not read, because "),
        "{rejected}"
    );
    consumer.stop();
    assert_eq!(
        case.db.one("SELECT next_offset::text FROM host_metrics_offsets"),
        "23"
    );
}

#[test]
fn a_batch_is_skipped_without_a_consumer_and_without_reading_it() {
    let mut case = Case::new("passed-unread", 1);
    case.write(0, 0..10);
    let consumer = Agent::start(&["consume"], &case.variables());
    case.wait_for_rows(10, &[&consumer]);
    consumer.stop();

    case.write(0, 10..15);
    let (status, said) = run(&["skip", "passed-unread/0:10"], &case.variables());
    assert_eq!(status, 0, "{said}");
    case.write(0, 15..20);
    let consumer = Agent::start(&["consume"], &case.variables());
    case.wait_for_rows(15, &[&consumer]);
    consumer.stop();
    let stored = case
        .db
        .many("SELECT t.kafka_offset::text FROM host_metrics t ORDER BY t.kafka_offset");
    let expected: Vec<String> = (0..10).chain(15..20).map(|offset| offset.to_string()).collect();
    assert_eq!(stored, expected);
    assert_eq!(
        case.db
            .one("SELECT concat(kafka_offset, ' ', reason) FROM host_metrics_rejected"),
        "10 offsets 10 to 14 were not read, because `host-metrics skip` skipped the batch (offsets 10 to 14, 5 records, not \
         compressed, 471 bytes)"
    );
}

#[test]
fn a_batch_that_expands_hugely_is_in_memory_once_and_kept_as_a_prefix_its_length_and_a_hash() {
    // A container with 256 MB can then read a batch of 200 MB.
    const BESIDE_THE_BATCH: u64 = 66 << 20;
    let huge = vec![b'x'; 200_000_000];
    // The longest key and value that are stored.
    let long = vec![b'x'; 1 << 20];
    for (name, compression, values, kept) in [
        ("huge-gzip", "gzip", vec![huge.as_slice()], 65_536),
        ("huge-lz4", "lz4", vec![huge.as_slice()], 65_536),
        ("long-gzip", "gzip", vec![long.as_slice(); 190], 1 << 20),
    ] {
        let mut case = Case::new(name, 1);
        case.kafka.write_batch(name, compression, &values);
        case.write(0, 0..10);
        let consumer = case.consume();
        // Writing 190 MiB to Postgres takes a while on a busy machine.
        let within = Duration::from_secs(180);
        wait_for_count_within(within, &mut case.db, "host_metrics", 10, &[&consumer]);
        assert_eq!(case.db.count("host_metrics_rejected"), values.len() as i64);
        let peak = consumer.peak_bytes();
        let batch: usize = values.iter().map(|value| value.len()).sum();
        assert!(
            peak < batch as u64 + BESIDE_THE_BATCH,
            "{name}: {peak} bytes for a batch of {batch}"
        );
        consumer.stop();
        let lengths = case
            .db
            .many("SELECT DISTINCT length(value)::text FROM host_metrics_rejected");
        assert_eq!(lengths, [kept.to_string()], "{name}");
        let reason = case.db.one("SELECT min(reason) FROM host_metrics_rejected");
        if kept == 65_536 {
            // `head -c 200000000 /dev/zero | tr '\0' x | sha256sum`
            assert!(reason.contains("found 200000000;"), "{reason}");
            assert!(
                reason.contains(
                    "SHA-256 of all: 8b7906cb69a6634de16c8e34b1342bd0d32a5f42a697ef3bac7e3b99e132f5a4"
                ),
                "{reason}"
            );
        }
    }
}
