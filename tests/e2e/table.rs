//! The rows of the table, and their comparison with the topic.

use std::collections::BTreeMap;
use std::time::Duration;

use host_metrics::commands::demo::postgres::ThrowAwayPostgres;
use postgres::{Client, NoTls};

use crate::agent::Agent;
use crate::kafka::{Kafka, Record};
use crate::scratch::wait_for;

/// Every column that stores a field of the record, and the type to which the field's text is cast for the comparison.
const COLUMNS: [(&str, &str); 20] = [
    ("address", "text"),
    ("latency", "double precision"),
    ("status_code", "smallint"),
    ("is_valid", "boolean"),
    ("outcome", "text"),
    ("error", "text"),
    ("scheduled_at", "timestamptz"),
    ("started_at", "timestamptz"),
    ("interval_seconds", "double precision"),
    ("regex_matched", "boolean"),
    ("dns_seconds", "real"),
    ("connect_seconds", "real"),
    ("tls_seconds", "real"),
    ("ttfb_seconds", "real"),
    ("body_seconds", "real"),
    ("ip", "inet"),
    ("redirects", "integer"),
    ("body_bytes", "bigint"),
    ("cert_expires_at", "timestamptz"),
    ("agent", "text"),
];

pub fn connect(server: &ThrowAwayPostgres) -> Client {
    try_connect(server).unwrap()
}

pub fn try_connect(server: &ThrowAwayPostgres) -> Result<Client, postgres::Error> {
    postgres::Config::new()
        .host(server.host())
        .port(server.port())
        .user(server.superuser())
        .dbname(server.database())
        .connect_timeout(Duration::from_secs(10))
        .connect(NoTls)
}

pub fn count(client: &mut Client, sql: &str) -> i64 {
    client
        .query_one(sql, &[])
        .unwrap_or_else(|error| panic!("{sql}: {error:?}"))
        .get(0)
}

/// Waits until there are `expected` rows and rejected records, and fails immediately if there are more.
pub fn wait_for_stored(client: &mut Client, expected: usize, within: Duration, consumer: &Agent) {
    let expected = i64::try_from(expected).unwrap();
    wait_for(
        within,
        &format!("{expected} records are stored"),
        || {
            let stored = stored(client);
            assert!(stored <= expected, "{stored} stored of {expected}");
            (stored == expected).then_some(())
        },
        || consumer.stderr(),
    );
}

/// The number of rows and rejected records; 0 if there are no tables.
pub fn stored(client: &mut Client) -> i64 {
    if count(
        client,
        "SELECT count(*) FROM pg_class WHERE relname IN ('host_metrics', 'host_metrics_rejected')",
    ) < 2
    {
        return 0;
    }
    count(
        client,
        "SELECT (SELECT count(*) FROM host_metrics) + (SELECT count(*) FROM host_metrics_rejected)",
    )
}

/// Verifies that every row equals its record in all fields, and that every record has a row and every row a record.
pub fn assert_equals_topic(client: &mut Client, records: &[Record], topic: &str) {
    client
        .batch_execute(
            "CREATE TEMPORARY TABLE topic (partition integer, \"offset\" bigint, key text, value jsonb)",
        )
        .unwrap();
    let insert = client
        .prepare("INSERT INTO topic VALUES ($1, $2, $3, $4::text::jsonb)")
        .unwrap();
    for record in records {
        let text = |bytes: &Option<Vec<u8>>| {
            bytes
                .as_ref()
                .map(|bytes| String::from_utf8(bytes.clone()).unwrap())
        };
        let (key, value) = (text(&record.key), text(&record.value));
        client
            .execute(&insert, &[&record.partition, &record.offset, &key, &value])
            .unwrap();
    }
    let join = format!(
        "topic FULL JOIN host_metrics AS t
         ON t.kafka_partition = topic.partition AND t.kafka_offset = topic.offset AND t.kafka_topic = '{topic}'"
    );
    let unpaired =
        format!("SELECT count(*) FROM {join} WHERE topic.partition IS NULL OR t.kafka_offset IS NULL");
    assert_eq!(
        count(client, &unpaired),
        0,
        "records without a row or rows without a record"
    );
    assert_eq!(
        count(client, "SELECT count(*) FROM host_metrics"),
        i64::try_from(records.len()).unwrap()
    );
    let fields = count(
        client,
        "SELECT count(DISTINCT f) FROM topic, jsonb_object_keys(value) f",
    );
    assert_eq!(
        fields,
        // And `v`, `slow`, `name`, `group` and `epoch`, for which there are no columns.
        5 + COLUMNS.len() as i64,
        "every field of the format is always written"
    );
    for (column, kind) in COLUMNS {
        let different = format!(
            "SELECT t.{column}::text, value->>'{column}' FROM {join}
             WHERE t.{column} IS DISTINCT FROM (value->>'{column}')::{kind} LIMIT 1"
        );
        if let Some(row) = client.query_opt(&different, &[]).unwrap() {
            let (stored, sent): (Option<String>, Option<String>) = (row.get(0), row.get(1));
            panic!("{column}: {stored:?} in the table, {sent:?} in the topic");
        }
    }
    assert_eq!(
        count(
            client,
            "SELECT count(*) FROM topic WHERE key IS DISTINCT FROM value->>'address'"
        ),
        0
    );
    client.batch_execute("DROP TABLE topic").unwrap();
}

/// Verifies that Kafka's committed offsets and the table's positions are the ends of the partitions.
pub fn assert_positions(client: &mut Client, kafka: &Kafka, topic: &str, group: &str, records: &[Record]) {
    let rows = client
        .query(
            "SELECT partition, next_offset FROM host_metrics_offsets WHERE topic = $1 AND group_id = $2",
            &[&topic, &group],
        )
        .unwrap();
    let positions: BTreeMap<i32, i64> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    for (partition, committed) in (0..).zip(kafka.committed(group, topic)) {
        let end = records
            .iter()
            .filter(|record| record.partition == partition)
            .map(|record| record.offset + 1)
            .max();
        let Some(end) = end else { continue };
        assert_eq!(
            positions.get(&partition),
            Some(&end),
            "the table's position of partition {partition}"
        );
        assert_eq!(
            committed,
            Some(end),
            "Kafka's committed offset of partition {partition}"
        );
    }
}
