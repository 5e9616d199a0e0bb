//! Records that cannot be stored, with the whole of `consume`: only they are in the rejected table, unchanged and with the reason.
//! The other records of their batch are stored in the same transaction.

use crate::agent::Agent;
use crate::case::{Case, SOON, value, wait_for_count};
use crate::scratch::wait_for;

/// A user's table with constraints of every kind that Postgres has.
const STRICT_TABLE: &str = "
    CREATE TABLE agents (name text PRIMARY KEY);
    INSERT INTO agents VALUES ('known');
    CREATE TABLE host_metrics (
        address text UNIQUE,
        latency double precision NOT NULL,
        status_code smallint CHECK (status_code <> 418),
        is_valid boolean,
        error varchar(20),
        agent text REFERENCES agents DEFERRABLE INITIALLY DEFERRED,
        kafka_topic text, kafka_partition integer, kafka_offset bigint
    );
    CREATE FUNCTION no_telnet() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.address LIKE 'telnet:%' THEN RAISE EXCEPTION 'not over telnet'; END IF;
        RETURN NEW;
    END $$;
    CREATE TRIGGER no_telnet BEFORE INSERT ON host_metrics FOR EACH ROW EXECUTE FUNCTION no_telnet()";

/// An invalid record, and a part of the reason.
fn poison() -> Vec<(Option<Vec<u8>>, &'static str)> {
    let text = |text: &str| Some(text.as_bytes().to_vec());
    let with = |field: &str| {
        text(&format!(
            r#"{{"address":"a","is_valid":true,"latency":1,{field}}}"#
        ))
    };
    vec![
        (text("no JSON"), "expected"),
        (text(""), "empty value"),
        (None, "empty value"),
        (text("[1, 2]"), "object"),
        (text("null"), "object"),
        (text("{}"), "address"),
        (text(r#"{"address":"a"}"#), "is_valid"),
        (text(r#"{"address":"","is_valid":true}"#), "address"),
        (text(r#"{"address":7,"is_valid":true}"#), "address"),
        (Some(vec![b'x'; 990_000]), "expected"),
        (
            Some(b"{\"address\":\"a\xff\",\"is_valid\":true}".to_vec()),
            "UTF-8",
        ),
        (text("{\"address\":\"a\\u0000b\",\"is_valid\":true}"), "u0000"),
        (with(r#""error":"\u0000""#), "u0000"),
        (with(r#""unknown":"\u0000""#), "u0000"),
        (with(r#""status_code":99999999999"#), "status_code"),
        (with(r#""status_code":200.0"#), "status_code"),
        (with(r#""status_code":"200""#), "status_code"),
        (
            text(r#"{"address":"a","is_valid":true,"latency":1e999}"#),
            "number out of range",
        ),
        (
            text(r#"{"address":"a","is_valid":true,"latency":NaN}"#),
            "expected",
        ),
        (text(r#"{"address":"a","is_valid":true,"latency":-1}"#), "latency"),
        (with(r#""scheduled_at":"20000-01-01T00:00:00Z""#), "scheduled_at"),
        (with(r#""scheduled_at":"2026-01-01T00:00:00""#), "scheduled_at"),
        (with(r#""address":"b""#), "twice"),
        (with(r#""v":2"#), "v"),
        (
            with(&format!(r#""deep":{}"#, "[".repeat(100_000))),
            "expected value",
        ),
        (
            with(&format!(
                r#""error":{}{}"#,
                "[".repeat(100_000),
                "]".repeat(100_000)
            )),
            "error: invalid type",
        ),
        (
            text("\u{feff}{\"address\":\"a\",\"is_valid\":true}"),
            "byte-order mark",
        ),
        (text(r#"{"address":"a","is_valid":true} {}"#), "trailing"),
        // From here on, the table's constraints refuse the row.
        (with(r#""status_code":418"#), "SQLSTATE 23514"),
        (text(r#"{"address":"a","is_valid":true}"#), "SQLSTATE 23502"),
        (
            text(r#"{"address":"http://h/0","is_valid":true,"latency":1}"#),
            "SQLSTATE 23505",
        ),
        (with(r#""agent":"unknown""#), "SQLSTATE 23503"),
        (
            with(r#""error":"longer than twenty characters""#),
            "SQLSTATE 22001",
        ),
        (
            text(r#"{"address":"telnet://a","is_valid":true,"latency":1}"#),
            "not over telnet",
        ),
    ]
}

#[test]
fn exactly_the_bad_records_are_rejected_as_they_came_and_the_good_ones_of_their_batch_stored() {
    let mut case = Case::new("poison", 1);
    case.db.execute(STRICT_TABLE);
    let poison = poison();
    let mut records = Vec::new();
    let mut good = 0..;
    let mut next_good = || (0, Some(b"good".to_vec()), Some(value(good.next().unwrap())));
    for (number, (bytes, _)) in poison.iter().enumerate() {
        records.push(next_good());
        // With and without a key, sometimes two in a row.
        let key = (number % 3 > 0).then(|| vec![0xff, number as u8]);
        records.push((0, key, bytes.clone()));
        if number % 5 > 0 {
            records.push(next_good());
        }
    }
    let large = format!(
        r#"{{"address":"http://large/","is_valid":true,"latency":1,"agent":"known","unknown":"{}"}}"#,
        "x".repeat(990_000)
    );
    records.push((0, None, Some(large.into_bytes())));
    case.kafka.write(case.name, records.clone());

    let variables = case
        .variables()
        .with("DB_BATCH_SECONDS", 3)
        .with("DB_BATCH_SIZE", 1_000);
    let consumer = Agent::start(&["consume"], &variables);
    wait_for_count(
        &mut case.db,
        "host_metrics_rejected",
        poison.len() as i64,
        &[&consumer],
    );
    consumer.stop();
    case.assert_exactly_once(&["poison"]);

    let rejected = case
        .db
        .client
        .query(
            "SELECT kafka_offset, key, value, reason FROM host_metrics_rejected ORDER BY 1",
            &[],
        )
        .unwrap();
    let bad = (0..)
        .zip(&records)
        .filter(|(_, (_, key, _))| key.as_deref() != Some(b"good"));
    // The large record is valid.
    let bad = bad.take(poison.len());
    for ((row, (offset, (_, key, value))), (_, words)) in rejected.iter().zip(bad).zip(&poison) {
        let reason: String = row.get(3);
        let shown = String::from_utf8_lossy(value.as_deref().unwrap_or(b"(null)"));
        let shown: String = shown.chars().take(80).collect();
        assert_eq!(row.get::<_, i64>(0), offset, "{shown}: {reason}");
        assert_eq!(&row.get::<_, Option<Vec<u8>>>(1), key, "{shown}");
        assert!(&row.get::<_, Option<Vec<u8>>>(2) == value, "{shown}");
        assert!(reason.contains(words), "{shown}: {reason}");
        assert!(
            reason.len() < 2_000 && !reason.contains('\n'),
            "{shown}: {reason}"
        );
    }
    assert_eq!(
        case.db
            .one("SELECT count(DISTINCT xmin::text)::text FROM host_metrics"),
        "1",
        "one batch, one transaction"
    );
}

#[test]
fn a_topic_with_only_bad_records_is_drained_at_a_steady_pace_and_reported() {
    const UNREADABLE: i64 = 20_000;
    const REFUSED: i64 = 2_000;
    let mut case = Case::new("nothing-but-poison", 2);
    case.db.execute(
        "CREATE TABLE host_metrics (address text CHECK (address = 'nobody'), is_valid boolean, kafka_topic text, \
         kafka_partition integer, kafka_offset bigint)",
    );
    let unreadable = (0..UNREADABLE).map(|number| (0, None, Some(number.to_string().into_bytes())));
    case.kafka.write(case.name, unreadable);
    case.write(1, 0..REFUSED);
    let consumer = Agent::start(&["consume"], &case.variables().with("LOG_LEVEL", "INFO"));
    wait_for_count(
        &mut case.db,
        "host_metrics_rejected",
        UNREADABLE + REFUSED,
        &[&consumer],
    );
    let longest_pause = case.db.one(
        "SELECT max(pause)::text FROM (SELECT extract(epoch FROM rejected_at - lag(rejected_at) OVER \
         (ORDER BY rejected_at)) AS pause FROM host_metrics_rejected) p",
    );
    assert!(longest_pause.parse::<f64>().unwrap() < 10.0, "{longest_pause} s");
    wait_for(
        SOON,
        "the rejected are said",
        || (consumer.said("rejected records=") > 0).then_some(()),
        || consumer.stderr(),
    );
    let said = consumer.said("rejected records=");
    assert!(said < 9, "a flood:\n{}", consumer.stderr());
    consumer.stop();
    case.assert_exactly_once(&["nothing-but-poison"]);
    assert_eq!(case.db.count("host_metrics"), 0);
}
