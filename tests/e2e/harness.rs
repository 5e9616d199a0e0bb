//! Tests of the test harness.

use crate::kafka::Kafka;

#[test]
fn kafka_keeps_records_over_a_kill() {
    let mut kafka = Kafka::start();
    kafka.create_topic("t", 2);
    kafka.write(
        "t",
        [(0, None, Some(b"a".to_vec())), (1, Some(b"k".to_vec()), None)],
    );
    kafka.restart();
    let records = kafka.records("t");
    let values: Vec<_> = records
        .iter()
        .map(|record| (record.partition, record.value.as_deref()))
        .collect();
    assert_eq!(values, [(0, Some(&b"a"[..])), (1, None)]);
    assert_eq!(kafka.committed("nobody", "t"), [None, None]);
}
