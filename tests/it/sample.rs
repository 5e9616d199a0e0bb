//! The record's format: what the encoder writes, byte by byte and as the schema requires, and what the decoder accepts and refuses.

use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::LazyLock;
use std::time::Duration;

use host_metrics::check::observation::{Observation, Phases, Stamp, stamp};
use host_metrics::check::target::Target;
use host_metrics::sample::Outcome;
use host_metrics::sample::{Field, MAX_ADDRESS_BYTES, Sample, Timestamp, TimestampError, decode, encode};
use proptest::prelude::*;
use serde_json::Value;

fn encoded(sample: &Sample<'_>) -> String {
    let mut value = Vec::new();
    encode(sample, &mut value);
    String::from_utf8(value).unwrap()
}

fn at(text: &str) -> Option<Timestamp> {
    Some(text.parse().unwrap())
}

/// A minimal record with `more` members before its own.
fn record(more: &str) -> String {
    let comma = if more.is_empty() { "" } else { "," };
    format!(r#"{{{more}{comma}"address":"a","is_valid":true}}"#)
}

fn reason(value: impl AsRef<[u8]>) -> String {
    let value = value.as_ref();
    match decode(value) {
        Ok(sample) => panic!("{:?} was taken: {sample:?}", String::from_utf8_lossy(value)),
        Err(rejection) => rejection.0,
    }
}

#[test]
fn a_record_with_every_field_is_read_whole() {
    let value = br#"{"v":1,"address":"https://example.com","latency":0.25,"status_code":301,"is_valid":false,
        "outcome":"bad_status","error":"expected 200, got 301","scheduled_at":"2026-03-01T10:00:00.000001Z",
        "started_at":"2026-03-01T10:00:00.5Z","interval_seconds":30.0,"regex_matched":false,"dns_seconds":0.001,
        "connect_seconds":0.002,"tls_seconds":0.003,"ttfb_seconds":0.004,"body_seconds":0.005,"ip":"2001:db8::1",
        "redirects":2,"body_bytes":1048576,"cert_expires_at":"2026-06-01T00:00:00Z",
        "slow":true,"name":"Shop front","group":"Shops","agent":"fra-1","epoch":18}"#;
    let expected = Sample {
        address: "https://example.com".into(),
        latency: Some(0.25),
        status_code: Some(301),
        is_valid: false,
        outcome: Some("bad_status".into()),
        error: Some("expected 200, got 301".into()),
        scheduled_at: at("2026-03-01T10:00:00.000001Z"),
        started_at: at("2026-03-01T10:00:00.500000Z"),
        interval_seconds: Some(30.0),
        regex_matched: Some(false),
        dns_seconds: Some(0.001),
        connect_seconds: Some(0.002),
        tls_seconds: Some(0.003),
        ttfb_seconds: Some(0.004),
        body_seconds: Some(0.005),
        ip: Some("2001:db8::1".parse().unwrap()),
        redirects: Some(2),
        body_bytes: Some(1_048_576),
        cert_expires_at: at("2026-06-01T00:00:00Z"),
        slow: Some(true),
        name: Some("Shop front".into()),
        group: Some("Shops".into()),
        agent: Some("fra-1".into()),
        epoch: Some(18),
    };
    let sample = decode(value).unwrap();
    assert_eq!(sample, expected);
    assert!(matches!(sample.address, Cow::Borrowed(_)));
    assert!(matches!(sample.error, Some(Cow::Borrowed(_))));
}

#[test]
fn the_originals_four_fields_are_a_record() {
    let value =
        br#"{"address": "https://google.com", "latency": 0.12, "status_code": 200, "is_valid": true}"#;
    let expected = Sample {
        address: "https://google.com".into(),
        latency: Some(0.12),
        status_code: Some(200),
        is_valid: true,
        ..Sample::default()
    };
    assert_eq!(decode(value), Ok(expected));

    let down =
        br#"{"address": "https://google.com", "latency": null, "status_code": null, "is_valid": false}"#;
    let expected = Sample {
        address: "https://google.com".into(),
        ..Sample::default()
    };
    assert_eq!(decode(down), Ok(expected));
}

#[test]
fn an_absent_field_and_a_null_are_the_same() {
    let nulls: Vec<String> = Field::ALL
        .iter()
        .filter(|field| !matches!(field, Field::Address | Field::IsValid))
        .map(|field| format!(r#""{}":null"#, field.name()))
        .collect();
    assert_eq!(
        decode(record(&nulls.join(",")).as_bytes()),
        decode(record("").as_bytes())
    );
}

#[test]
fn fields_may_stand_in_any_order_and_keys_may_be_escaped() {
    let value = br#"{ "is_valid" : true , "latency" : 1 , "addr\u0065ss" : "\u0061b\n" }"#;
    let expected = Sample {
        address: "ab\n".into(),
        latency: Some(1.0),
        is_valid: true,
        ..Sample::default()
    };
    assert_eq!(decode(value), Ok(expected));
}

#[test]
fn a_field_that_is_not_known_is_ignored_whatever_it_holds() {
    for unknown in [
        r#""x":1"#,
        r#""x":1e999"#,
        r#""x":[{"x":[null,{"address":5,"address":6}]}],"X":"\ud800 lone""#,
        r#""x":"\\u0000","\\u0000":2"#,
        r#""":[[[]]]"#,
        r#""Address":"other","addres":1,"address ":2"#,
    ] {
        assert_eq!(
            decode(record(unknown).as_bytes()),
            decode(record("").as_bytes()),
            "{unknown}"
        );
    }
}

#[test]
fn an_outcome_that_is_not_known_is_kept() {
    let value = record(r#""outcome":"teapot on fire""#);
    assert_eq!(
        decode(value.as_bytes()).unwrap().outcome.as_deref(),
        Some("teapot on fire")
    );
}

#[test]
fn numbers_are_read_to_the_last_bit() {
    for text in [
        "0.1",
        "5e-324",
        "0.30000000000000004",
        "123456.78901234567",
        "1.7976931348623157e308",
        "1E2",
        "7",
    ] {
        let value = record(&format!(r#""latency":{text}"#));
        assert_eq!(
            decode(value.as_bytes()).unwrap().latency,
            Some(text.parse().unwrap()),
            "{text}"
        );
    }
    let zero = decode(record(r#""latency":-0.0"#).as_bytes())
        .unwrap()
        .latency
        .unwrap()
        .to_bits();
    assert_eq!(zero, 0.0_f64.to_bits(), "a negative zero is stored as zero");
}

/// Members added before those of a good record, and the beginning of the reason.
#[test]
fn a_field_of_another_type_or_out_of_its_range_is_refused_by_name() {
    for (member, expected) in [
        (r#""v":0"#, "v: expected 1, found 0"),
        (r#""v":2"#, "v: expected 1, found 2: a newer version wrote"),
        (
            r#""v":18446744073709551615"#,
            "v: expected 1, found 18446744073709551615: a newer",
        ),
        (r#""v":-1"#, "v: invalid value: integer `-1`"),
        (r#""v":"1""#, r#"v: invalid type: string "1""#),
        (r#""v":1.0"#, "v: invalid type: floating point `1.0`"),
        (r#""v":true"#, "v: invalid type: boolean `true`"),
        (
            r#""latency":"0.1""#,
            r#"latency: invalid type: string "0.1", expected f64"#,
        ),
        (
            r#""latency":-1"#,
            "latency: expected a number of seconds, 0 or more, or null, found -1",
        ),
        (
            r#""latency":-0.001"#,
            "latency: expected a number of seconds, 0 or more, or null, found -0.001",
        ),
        (r#""latency":true"#, "latency: invalid type: boolean"),
        (r#""latency":[0.1]"#, "latency: invalid type: sequence"),
        (r#""latency":{"s":[1]}"#, "latency: invalid type: map"),
        (
            r#""latency":1e999"#,
            "latency: number out of range at line 1 column",
        ),
        (r#""latency":-1e999"#, "latency: number out of range"),
        (r#""latency":NaN"#, "latency: expected value at line 1 column"),
        (r#""latency":Infinity"#, "latency: expected value"),
        (r#""latency":"NaN""#, "latency: invalid type: string"),
        (r#""latency":01"#, "latency: invalid number"),
        (r#""latency":.5"#, "latency: expected value"),
        (
            r#""interval_seconds":-30"#,
            "interval_seconds: expected a number of seconds",
        ),
        (
            r#""dns_seconds":-1e-9"#,
            "dns_seconds: expected a number of seconds, 0 or more, or null, found -1e-9",
        ),
        (r#""connect_seconds":"1""#, "connect_seconds: invalid type"),
        (r#""tls_seconds":-1"#, "tls_seconds: expected a number of seconds"),
        (r#""ttfb_seconds":false"#, "ttfb_seconds: invalid type"),
        (r#""body_seconds":{}"#, "body_seconds: invalid type"),
        (
            r#""status_code":200.0"#,
            "status_code: invalid type: floating point `200.0`, expected i16",
        ),
        (
            r#""status_code":2e2"#,
            "status_code: invalid type: floating point `200.0`, expected i16",
        ),
        (
            r#""status_code":"200""#,
            r#"status_code: invalid type: string "200", expected i16"#,
        ),
        (
            r#""status_code":32768"#,
            "status_code: invalid value: integer `32768`, expected i16",
        ),
        (
            r#""status_code":99999999999"#,
            "status_code: invalid value: integer `99999999999`, expected i16",
        ),
        (
            r#""status_code":99999999999999999999999"#,
            "status_code: invalid type: floating point",
        ),
        (r#""status_code":true"#, "status_code: invalid type: boolean"),
        (
            r#""redirects":2147483648"#,
            "redirects: invalid value: integer `2147483648`, expected i32",
        ),
        (r#""redirects":1.5"#, "redirects: invalid type"),
        (
            r#""body_bytes":9223372036854775808"#,
            "body_bytes: invalid value: integer `9223372036854775808`, expected i64",
        ),
        (r#""body_bytes":"1""#, "body_bytes: invalid type"),
        (r#""epoch":-1"#, "epoch: expected an integer, 0 or more, or null"),
        (
            r#""outcome":1"#,
            "outcome: invalid type: integer `1`, expected a string",
        ),
        (r#""outcome":["ok"]"#, "outcome: invalid type: sequence"),
        (r#""error":false"#, "error: invalid type: boolean"),
        (r#""agent":{"name":"x"}"#, "agent: invalid type: map"),
        (
            r#""regex_matched":"true""#,
            r#"regex_matched: invalid type: string "true", expected a boolean"#,
        ),
        (r#""regex_matched":1"#, "regex_matched: invalid type: integer `1`"),
        (
            r#""ip":"example.com""#,
            r#"ip: invalid IP address syntax, found "example.com""#,
        ),
        (r#""ip":"fe80::1%eth0""#, "ip: invalid IP address"),
        (r#""ip":"10.0.0.1:80""#, "ip: invalid IP address"),
        (r#""ip":"[::1]""#, "ip: invalid IP address"),
        (r#""ip":"10.0.0.0/8""#, "ip: invalid IP address"),
        (r#""ip":"010.0.0.1""#, "ip: invalid IP address"),
        (r#""ip":"""#, "ip: invalid IP address"),
        (r#""ip":1"#, "ip: invalid type: integer `1`, expected a string"),
        (
            r#""scheduled_at":1767225600"#,
            "scheduled_at: invalid type: integer `1767225600`, expected a string",
        ),
        (
            r#""scheduled_at":"2026-01-01T00:00:00""#,
            r#"scheduled_at: expected a time with a zone: Z or an offset such as +02:00, found "2026-01-01T00:00:00""#,
        ),
        (
            r#""started_at":"20000-01-01T00:00:00Z""#,
            "started_at: expected a time as in RFC 3339",
        ),
        (
            r#""cert_expires_at":"1969-12-31T23:59:59Z""#,
            "cert_expires_at: expected a time in the years 1970 to 9999",
        ),
        (r#""cert_expires_at":"""#, "cert_expires_at: expected a time"),
    ] {
        let reason = reason(record(member));
        assert!(
            reason.starts_with(expected),
            "{member}\n   gave {reason}\n    not {expected}"
        );
    }
}

#[test]
fn the_widest_values_that_a_column_holds_are_taken() {
    let value = record(
        r#""status_code":32767,"redirects":2147483647,"body_bytes":9223372036854775807,"dns_seconds":1e39"#,
    );
    let sample = decode(value.as_bytes()).unwrap();
    assert_eq!(sample.status_code, Some(i16::MAX));
    assert_eq!(sample.redirects, Some(i32::MAX));
    assert_eq!(sample.body_bytes, Some(i64::MAX));
    assert_eq!(
        sample.dns_seconds,
        Some(1e39),
        "whether it fits is its column's business"
    );
}

#[test]
fn address_and_is_valid_are_required() {
    for (value, expected) in [
        (r#"{}"#, "address: missing"),
        (r#"{"is_valid":true}"#, "address: missing"),
        (r#"{"address":"a"}"#, "is_valid: missing"),
        (
            r#"{"address":"","is_valid":true}"#,
            "address: expected 1 to 2048 bytes, found 0",
        ),
        (
            r#"{"address":null,"is_valid":true}"#,
            "address: invalid type: null, expected a string",
        ),
        (
            r#"{"address":5,"is_valid":true}"#,
            "address: invalid type: integer `5`, expected a string",
        ),
        (
            r#"{"address":"a","is_valid":null}"#,
            "is_valid: invalid type: null, expected a boolean",
        ),
        (
            r#"{"address":"a","is_valid":1}"#,
            "is_valid: invalid type: integer `1`, expected a boolean",
        ),
        (
            r#"{"address":"a","is_valid":"true"}"#,
            r#"is_valid: invalid type: string "true", expected a boolean"#,
        ),
    ] {
        let reason = reason(value);
        assert!(reason.starts_with(expected), "{value}: {reason}");
    }
}

#[test]
fn an_address_has_2048_bytes_at_most() {
    let of_bytes = |length: usize| format!(r#"{{"address":"{}","is_valid":true}}"#, "é".repeat(length / 2));
    assert_eq!(
        decode(of_bytes(MAX_ADDRESS_BYTES).as_bytes())
            .unwrap()
            .address
            .len(),
        2_048
    );
    assert!(reason(of_bytes(2_050)).starts_with("address: expected 1 to 2048 bytes, found 2050: \"éé"));
}

#[test]
fn a_key_twice_is_refused_known_or_not_escaped_or_not() {
    for (members, key) in [
        (r#""latency":1,"latency":1"#, "latency"),
        (r#""latency":null,"x":0,"latency":null"#, "latency"),
        (r#""address":"a""#, "address"),
        (r#""x":1,"y":2,"x":3"#, "x"),
        (r#""x":1,"\u0078":3"#, "x"),
        (r#""\u0076":1,"v":1"#, "v"),
    ] {
        let reason = reason(record(members));
        let expected = format!("not one valid JSON object: the key {key:?} is there twice at line 1");
        assert!(reason.starts_with(&expected), "{members}: {reason}");
    }
}

#[test]
fn white_space_may_stand_around_the_object() {
    let good = record("");
    let golden = include_str!("golden/ok.json").trim_end();
    for (before, after) in [(" ", ""), ("", "\n"), ("\r\n\t ", " \t\r\n")] {
        for object in [good.as_str(), golden] {
            let value = format!("{before}{object}{after}");
            assert_eq!(decode(value.as_bytes()), decode(object.as_bytes()), "{value:?}");
            assert!(decode(value.as_bytes()).is_ok(), "{value:?}");
        }
    }
}

#[test]
fn a_value_is_one_object_and_nothing_else() {
    let good = record("");
    for (value, expected) in [
        (String::new(), "expected a JSON object, found an empty value"),
        (
            format!("\u{feff}{good}"),
            "expected nothing before the object, found a byte-order mark",
        ),
        (format!("\0{good}"), "expected a JSON object, found \"\\0{"),
        (
            format!(" \u{feff}{good}"),
            "expected a JSON object, found \" \\u{feff}{",
        ),
        (
            format!("\u{a0}{good}"),
            "expected a JSON object, found \"\\u{a0}{",
        ),
        (
            format!("{good}\u{a0}"),
            "not one valid JSON object: trailing characters",
        ),
        (
            format!("{good}\u{feff}"),
            "not one valid JSON object: trailing characters",
        ),
        (
            format!("{good}\u{b}"),
            "not one valid JSON object: trailing characters",
        ),
        (" \n".to_owned(), "expected a JSON object, found \" \\n\""),
        (
            format!("{good}x"),
            "not one valid JSON object: trailing characters at line 1 column 32",
        ),
        (
            format!("{good}}}"),
            "not one valid JSON object: trailing characters",
        ),
        (
            format!("{good}{good}"),
            "not one valid JSON object: trailing characters",
        ),
        (
            format!("{good}\0"),
            "not one valid JSON object: trailing characters",
        ),
        (format!("[{good}]"), "expected a JSON object, found \"[{"),
        ("null".to_owned(), "expected a JSON object, found \"null\""),
        (
            "\"\u{7}\"".to_owned(),
            r#"expected a JSON object, found "\"\u{7}\"""#,
        ),
        (
            "{".to_owned(),
            "not one valid JSON object: EOF while parsing an object",
        ),
        (
            good[..good.len() - 1].to_owned(),
            "not one valid JSON object: EOF while parsing an object",
        ),
        (good.replace("true", "tru"), "is_valid: expected ident"),
        (good.replace(':', "="), "address: expected `:`"),
        (
            good.replace("true}", "true,}"),
            "not one valid JSON object: trailing comma",
        ),
        (
            good.replace('"', "'"),
            "not one valid JSON object: key must be a string",
        ),
        (record(r#""x":[1,]"#), "not one valid JSON object: "),
        (record("5:1"), "not one valid JSON object: key must be a string"),
        (
            record("\"x\":\"line\nbreak\""),
            "not one valid JSON object: control character",
        ),
        (record("\"error\":\"a\0b\""), "error: control character"),
        (record(r#""error":"\ud800""#), "error: "),
        (record(r#""error":"\x""#), "error: invalid escape"),
    ] {
        let reason = reason(&value);
        assert!(
            reason.starts_with(expected),
            "{value:?}\n   gave {reason}\n    not {expected}"
        );
    }
}

#[test]
fn every_cut_of_a_record_is_refused() {
    let value = record(
        r#""v":1,"latency":0.5,"error":"\u00e9\\","x":[{"y":null}],"scheduled_at":"2026-01-01T00:00:00Z""#,
    );
    assert!(decode(value.as_bytes()).is_ok());
    for end in 0..value.len() {
        reason(&value[..end]);
    }
}

#[test]
fn invalid_utf_8_is_refused_anywhere() {
    let at_byte = |value: &[u8], at: usize| {
        assert_eq!(
            reason(value),
            format!("expected UTF-8, found another byte at {at}")
        );
    };
    at_byte(b"\xff{}", 0);
    at_byte(b"{\"address\":\"\xe9\",\"is_valid\":true}", 12);
    at_byte(b"{\"x\":\"\xed\xa0\x80\",\"address\":\"a\",\"is_valid\":true}", 6);
    at_byte(b"{\"address\":\"a\",\"is_valid\":true}\xc3", 31);
}

#[test]
fn a_nul_escape_is_refused_anywhere() {
    for members in [
        r#""error":"a\u0000b""#,
        r#""outcome":"\u0000""#,
        r#""x":"\u0000""#,
        r#""x":[{"y":["\u0000"]}]"#,
        r#""x":{"\u0000":1}"#,
        r#""\u0000":1"#,
        r#""error":"\\\u0000""#,
        r#""error":"\\\\\n\"\u0000""#,
    ] {
        let reason = reason(record(members));
        let at = record(members).find(r"\u0000").unwrap();
        assert!(
            reason.starts_with("expected no NUL, which Postgres cannot store"),
            "{members}: {reason}"
        );
        assert!(reason.ends_with(&format!("at byte {at}")), "{members}: {reason}");
    }
    assert!(reason(r#"{"address":"\u0000","is_valid":true}"#).contains("NUL"));

    let escaped_backslashes = record(r#""error":"\\u0000 \\\\u0000""#);
    assert_eq!(
        decode(escaped_backslashes.as_bytes()).unwrap().error.as_deref(),
        Some(r"\u0000 \\u0000")
    );
    let other_escapes = record(r#""error":"\u0001\u0100\u00001""#.replace("00001", "0001x").as_str());
    assert_eq!(
        decode(other_escapes.as_bytes()).unwrap().error.as_deref(),
        Some("\u{1}\u{100}\u{1}x")
    );
}

#[test]
fn nesting_costs_no_stack() {
    let nested = |field: &str| {
        let brackets = format!("{}{}", "[".repeat(500_000), "]".repeat(500_000));
        record(&format!(r#""{field}":{brackets}"#))
    };
    assert!(decode(nested("x").as_bytes()).is_ok());
    assert!(reason(nested("error")).starts_with("error: invalid type: sequence"));
    assert!(reason("[".repeat(500_000)).starts_with("expected a JSON object, found"));
    assert!(reason(format!(r#"{{"x":{}"#, "[".repeat(500_000))).contains("EOF"));
    assert!(reason(r#"{"x":"#.repeat(100_000)).contains("EOF"));
}

#[test]
fn many_unknown_keys_take_linear_time() {
    let members: Vec<String> = (0..100_000)
        .map(|number| format!(r#""key {number}":0"#))
        .collect();
    assert!(decode(record(&members.join(",")).as_bytes()).is_ok());
    let twice = format!(r#"{},"key 7":1"#, members.join(","));
    assert!(reason(record(&twice)).contains(r#"the key "key 7" is there twice"#));
}

#[test]
fn the_reason_of_a_rejection_is_one_short_line() {
    let hostile = "\u{1b}[31m\\r\\n\u{7f}é"
        .replace('\u{1b}', "\\u001b")
        .repeat(10_000);
    for value in [
        record(&format!(r#""latency":"{hostile}""#)),
        record(&format!(r#""ip":"{hostile}""#)),
        record(&format!(r#""scheduled_at":"{hostile}""#)),
        record(&format!(r#""{hostile}":1,"{hostile}":1"#)),
        format!(r#"{{"address":"{hostile}","is_valid":true}}"#),
        hostile.clone(),
        format!("\"{hostile}"),
    ] {
        let reason = reason(&value);
        assert!(reason.chars().count() < 600, "{reason}");
        assert!(!reason.contains(char::is_control), "{reason:?}");
    }
}

#[test]
fn times_are_read_with_any_offset_and_cut_to_microseconds() {
    for (text, canonical) in [
        ("2026-03-01T10:20:30Z", "2026-03-01T10:20:30.000000Z"),
        ("2026-03-01t10:20:30z", "2026-03-01T10:20:30.000000Z"),
        ("2026-03-01T10:20:30.1Z", "2026-03-01T10:20:30.100000Z"),
        ("2026-03-01T10:20:30.000001Z", "2026-03-01T10:20:30.000001Z"),
        ("2026-03-01T10:20:30.9999999Z", "2026-03-01T10:20:30.999999Z"),
        ("2026-03-01T10:20:30.123456789Z", "2026-03-01T10:20:30.123456Z"),
        (
            "2026-03-01T10:20:30.999999999+02:00",
            "2026-03-01T08:20:30.999999Z",
        ),
        ("2026-03-01T00:20:30+05:30", "2026-02-28T18:50:30.000000Z"),
        ("2026-12-31T23:20:30-00:45", "2027-01-01T00:05:30.000000Z"),
        ("2026-03-01T10:20:30+23:59", "2026-02-28T10:21:30.000000Z"),
        ("2026-03-01T10:20:30-00:00", "2026-03-01T10:20:30.000000Z"),
        ("2024-02-29T00:00:00Z", "2024-02-29T00:00:00.000000Z"),
        ("2000-02-29T12:00:00Z", "2000-02-29T12:00:00.000000Z"),
        ("1970-01-01T00:00:00Z", "1970-01-01T00:00:00.000000Z"),
        ("1969-12-31T23:00:00-01:00", "1970-01-01T00:00:00.000000Z"),
        ("9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59.999999Z"),
        ("2016-12-31T23:59:60Z", "2017-01-01T00:00:00.000000Z"),
        ("2016-12-31T23:59:60.5Z", "2017-01-01T00:00:00.500000Z"),
        ("2017-01-01T01:59:60+02:00", "2017-01-01T00:00:00.000000Z"),
    ] {
        let timestamp: Timestamp = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(timestamp.to_string(), canonical, "{text}");
        assert_eq!(canonical.parse(), Ok(timestamp), "{canonical}");
    }
}

#[test]
fn a_time_that_is_not_rfc_3339_is_refused() {
    use TimestampError::{NoSuchTime, NoZone, OutOfRange, Shape, TooManyDigits};
    for (text, error) in [
        ("", Shape),
        ("2026-03-01", Shape),
        ("2026-03-01T10:20Z", Shape),
        ("2026-03-01 10:20:30Z", Shape),
        ("2026-3-01T10:20:30Z", Shape),
        ("20000-03-01T10:20:30Z", Shape),
        ("+2026-03-01T10:20:30Z", Shape),
        ("-026-03-01T10:20:30Z", Shape),
        ("2026-03-01T10:20:30.Z", Shape),
        ("2026-03-01T10:20:30,5Z", Shape),
        ("2026-03-01T10:20:30.5", NoZone),
        ("2026-03-01T10:20:30", NoZone),
        ("2026-03-01T10:20:30+02", Shape),
        ("2026-03-01T10:20:30+0200", Shape),
        ("2026-03-01T10:20:30+2:00", Shape),
        ("2026-03-01T10:20:30 UTC", Shape),
        ("2026-03-01T10:20:30ZZ", Shape),
        (" 2026-03-01T10:20:30Z", Shape),
        ("2026-03-01T10:20:30Z ", Shape),
        ("２026-03-01T10:20:30Z", Shape),
        ("2026-03-01T10:20:30é", Shape),
        ("2026-03-01T10:20:3é.0Z", Shape),
        ("2026-03-01T10:20:30.1234567890Z", TooManyDigits),
        ("2026-00-01T10:20:30Z", NoSuchTime),
        ("2026-13-01T10:20:30Z", NoSuchTime),
        ("2026-02-29T10:20:30Z", NoSuchTime),
        ("1900-02-29T10:20:30Z", NoSuchTime),
        ("2026-04-31T10:20:30Z", NoSuchTime),
        ("2026-04-00T10:20:30Z", NoSuchTime),
        ("2026-03-01T24:00:00Z", NoSuchTime),
        ("2026-03-01T10:60:30Z", NoSuchTime),
        ("2026-03-01T10:20:61Z", NoSuchTime),
        ("2026-03-01T10:20:30+24:00", NoSuchTime),
        ("2026-03-01T10:20:30+00:60", NoSuchTime),
        ("2026-03-01T10:20:60Z", NoSuchTime),
        ("2026-03-15T23:59:60Z", NoSuchTime),
        ("2016-12-31T23:59:60+01:00", NoSuchTime),
        ("1969-12-31T23:59:59.999999Z", OutOfRange),
        ("1970-01-01T00:59:59+01:00", OutOfRange),
        ("0000-01-01T00:00:00Z", OutOfRange),
        ("9999-12-31T23:59:59-00:01", OutOfRange),
        ("9999-12-31T23:59:60Z", OutOfRange),
    ] {
        assert_eq!(text.parse::<Timestamp>(), Err(error), "{text}");
    }
}

#[test]
fn a_timestamp_lies_in_the_years_1970_to_9999() {
    assert_eq!(
        Timestamp::from_unix_micros(1_234_567).unwrap().unix_micros(),
        1_234_567
    );
    let last = 253_402_300_799_999_999;
    assert_eq!(
        Timestamp::from_unix_micros(0).map(Timestamp::unix_micros),
        Some(0)
    );
    assert_eq!(
        Timestamp::from_unix_micros(last).unwrap().to_string(),
        "9999-12-31T23:59:59.999999Z"
    );
    for outside in [-1, last + 1, i64::MIN, i64::MAX] {
        assert_eq!(Timestamp::from_unix_micros(outside), None, "{outside}");
    }
}

#[test]
fn durations_are_written_short_and_strings_escaped() {
    let seconds = |value: f64| {
        let text = encoded(&Sample {
            latency: Some(value),
            ..Sample::default()
        });
        text.split_once(r#""latency":"#)
            .unwrap()
            .1
            .split_once(',')
            .unwrap()
            .0
            .to_owned()
    };
    for (value, expected) in [
        (0.0, "0.0"),
        (1.0, "1.0"),
        (300.0, "300.0"),
        (0.1 + 0.2, "0.3"),
        (0.000_001, "0.000001"),
        (0.000_000_4, "0.0"),
        (1.999_999_9, "2.0"),
        (12.340_000, "12.34"),
        (31_622_400.000_001, "31622400.000001"),
        (f64::MAX, "18446744073709.551615"),
        (-1.0, "null"),
        (f64::NAN, "null"),
        (f64::INFINITY, "null"),
    ] {
        assert_eq!(seconds(value), expected, "{value:?}");
    }

    let text = encoded(&Sample {
        address: "\"\\\n\u{1}\u{7f}é\0".into(),
        ..Sample::default()
    });
    assert!(
        text.contains("\"address\":\"\\\"\\\\\\n\\u0001\u{7f}é\u{fffd}\","),
        "{text}"
    );
    assert_eq!(
        decode(text.as_bytes()).unwrap().address,
        "\"\\\n\u{1}\u{7f}é\u{fffd}"
    );
}

#[test]
fn encode_appends() {
    let mut value = b"before ".to_vec();
    encode(&Sample::default(), &mut value);
    assert!(value.starts_with(b"before {\"v\":1,"));
}

const GOLDEN_OK: &str = include_str!("golden/ok.json");
const GOLDEN_DOWN: &str = include_str!("golden/down.json");
const GOLDEN_MISSED: &str = include_str!("golden/missed.json");
const GOLDEN_REDIRECT_CERT: &str = include_str!("golden/redirect_cert.json");

fn target(address: &str, interval: Duration) -> Target {
    Target::new(
        address.to_owned(),
        "https://example.com/".parse().unwrap(),
        interval,
    )
}

/// The record that `produce` writes for `observation`, to be compared with the documented one.
fn assert_golden(
    golden: &str,
    target: Target,
    agent: &str,
    [scheduled_at, started_at]: [Option<Timestamp>; 2],
    observation: Observation,
) {
    let when = Stamp {
        scheduled_at: scheduled_at.unwrap(),
        started_at,
        interval: Some(target.interval),
        agent,
    };
    let sample = stamp(&target, observation, when);
    let golden = golden.strip_suffix('\n').expect("a text file ends its line");
    assert_eq!(encoded(&sample), golden);
    assert_eq!(decode(golden.as_bytes()), Ok(sample));
    assert_schema_takes(golden);
}

#[test]
fn the_golden_documents_are_written_byte_by_byte() {
    let micros = |micros| Some(Duration::from_micros(micros));
    let blank = Observation::failed(Outcome::Ok, "");
    assert_golden(
        GOLDEN_OK,
        Target {
            slow: Some(Duration::from_millis(800)),
            name: Some("Shop front".to_owned()),
            group: Some("Shops".to_owned()),
            ..target("https://shop.example/", Duration::from_secs(10))
        },
        "fra-1",
        [at("2026-03-01T10:00:07.25Z"), at("2026-03-01T10:00:07.250113Z")],
        Observation {
            latency: micros(131_482),
            status_code: Some(200),
            regex_matched: Some(true),
            phases: Phases {
                dns: micros(1_207),
                connect: micros(21_034),
                tls: micros(44_961),
                ttfb: micros(63_418),
                body: micros(842),
            },
            ip: Some("203.0.113.7".parse().unwrap()),
            redirects: Some(0),
            body_bytes: Some(18_231),
            cert_expires_at: at("2026-05-30T23:59:59Z"),
            ..blank.clone()
        },
    );
    assert_golden(
        GOLDEN_DOWN,
        target("http://10.0.0.7:8080/health", Duration::from_secs(60)),
        "fra-1",
        [at("2026-03-01T10:00:21Z"), at("2026-03-01T10:00:21.000094Z")],
        Observation {
            phases: Phases {
                connect: micros(312),
                ..Phases::default()
            },
            ip: Some("10.0.0.7".parse().unwrap()),
            ..Observation::failed(Outcome::ConnectRefused, "10.0.0.7:8080 refused the connection")
        },
    );
    assert_golden(
        GOLDEN_MISSED,
        target("example.com", Duration::from_millis(500)),
        "fra-1",
        [at("2026-03-01T10:00:30.5Z"), None],
        Observation::failed(Outcome::Missed, "the check before it\nwas still under way"),
    );
    assert_golden(
        GOLDEN_REDIRECT_CERT,
        Target {
            slow: Some(Duration::from_millis(800)),
            name: Some(r#"Bücher "Groß""#.to_owned()),
            ..target(r#"https://bücher.example/"quoted"\"#, Duration::from_secs(300))
        },
        "monitoring.example.org",
        [at("2026-03-01T10:05:00Z"), at("2026-03-01T10:05:00.000001Z")],
        Observation {
            latency: micros(1_250_000),
            status_code: Some(301),
            phases: Phases {
                dns: micros(50_000),
                connect: micros(41_000),
                tls: micros(83_102),
                ttfb: micros(20_000),
                body: None,
            },
            ip: Some("2001:db8::7".parse().unwrap()),
            redirects: Some(1),
            cert_expires_at: at("2026-02-28T12:00:00Z"),
            ..Observation::failed(
                Outcome::TlsCertExpired,
                "the certificate of www.bücher.example expired on 2026-02-28",
            )
        },
    );
}

static SCHEMA: LazyLock<jsonschema::Validator> = LazyLock::new(|| {
    let schema = serde_json::from_str(include_str!("../../schema/sample.v1.json")).unwrap();
    jsonschema::meta::validate(&schema).expect("the schema is one of draft 2020-12");
    jsonschema::options()
        .should_validate_formats(true)
        .build(&schema)
        .unwrap()
});

fn assert_schema_takes(document: &str) {
    let value: Value = serde_json::from_str(document).unwrap();
    let errors: Vec<String> = SCHEMA
        .iter_errors(&value)
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect();
    assert_eq!(errors, Vec::<String>::new(), "{document}");
}

#[test]
fn the_schema_refuses_what_the_encoder_never_writes() {
    let golden = |document: &str| serde_json::from_str::<Value>(document).unwrap();
    for (document, field, value) in [
        (GOLDEN_OK, "v", "2"),
        (GOLDEN_OK, "address", "\"\""),
        (GOLDEN_OK, "address", "null"),
        (GOLDEN_OK, "latency", "-1"),
        (GOLDEN_OK, "latency", "\"0.1\""),
        (GOLDEN_OK, "status_code", "99"),
        (GOLDEN_OK, "status_code", "200.5"),
        (GOLDEN_OK, "is_valid", "false"),
        (GOLDEN_OK, "is_valid", "null"),
        (GOLDEN_OK, "outcome", "\"bad_status\""),
        (GOLDEN_OK, "outcome", "\"fine\""),
        (GOLDEN_OK, "outcome", "null"),
        (GOLDEN_OK, "error", "\"a cause\""),
        (GOLDEN_DOWN, "is_valid", "true"),
        (GOLDEN_DOWN, "error", "null"),
        (GOLDEN_DOWN, "error", "\"\""),
        (GOLDEN_DOWN, "error", r#""two\nlines""#),
        (GOLDEN_DOWN, "outcome", "\"ok\""),
        (GOLDEN_OK, "scheduled_at", "null"),
        (GOLDEN_OK, "scheduled_at", "\"2026-03-01T10:00:00Z\""),
        (GOLDEN_OK, "started_at", "\"2026-03-01T10:00:00.000000+00:00\""),
        (GOLDEN_OK, "cert_expires_at", "\"2026-13-01T10:00:00.000000Z\""),
        (GOLDEN_OK, "interval_seconds", "true"),
        (GOLDEN_OK, "regex_matched", "1"),
        (GOLDEN_OK, "ip", "\"example.com\""),
        (GOLDEN_OK, "ip", "\"10.0.0.0/8\""),
        (GOLDEN_OK, "redirects", "-1"),
        (GOLDEN_OK, "body_bytes", "0.5"),
        (GOLDEN_OK, "slow", "0"),
        (GOLDEN_OK, "name", "1"),
        (GOLDEN_OK, "group", r#""\u0000""#),
        (GOLDEN_OK, "agent", "null"),
        (GOLDEN_OK, "agent", r#""\u0000""#),
        (GOLDEN_OK, "epoch", "0"),
        (GOLDEN_OK, "epoch", "1.5"),
        (GOLDEN_OK, "another", "1"),
    ] {
        let mut changed = golden(document);
        changed[field] = serde_json::from_str(value).unwrap();
        assert!(!SCHEMA.is_valid(&changed), "{field} as {value} was taken");
    }
    for field in Field::ALL {
        let mut lacking = golden(GOLDEN_DOWN);
        lacking.as_object_mut().unwrap().remove(field.name()).unwrap();
        assert!(!SCHEMA.is_valid(&lacking), "without {}", field.name());
    }
}

#[test]
fn the_schema_knows_every_outcome_and_no_other() {
    let schema: Value = serde_json::from_str(include_str!("../../schema/sample.v1.json")).unwrap();
    assert_eq!(
        schema["properties"]["outcome"]["enum"],
        serde_json::json!(Outcome::ALL.map(Outcome::as_str))
    );
    assert_eq!(schema["required"], serde_json::json!(Field::ALL.map(Field::name)));
}

fn a_duration() -> impl Strategy<Value = Option<Duration>> {
    proptest::option::of(
        (0_u64..40_000_000, 0_u32..1_000_000_000).prop_map(|(secs, nanos)| Duration::new(secs, nanos)),
    )
}

fn a_time() -> impl Strategy<Value = Timestamp> {
    (0_i64..=253_402_300_799_999_999).prop_map(|micros| Timestamp::from_unix_micros(micros).unwrap())
}

prop_compose! {
    fn an_observation()(
        outcome in proptest::sample::select(&Outcome::ALL[..]),
        error in proptest::option::of(any::<String>()),
        latency in a_duration(),
        status_code in proptest::option::of(100_u16..=999),
        regex_matched in any::<Option<bool>>(),
        (dns, connect, tls, ttfb, body) in (a_duration(), a_duration(), a_duration(), a_duration(), a_duration()),
        ip in any::<Option<IpAddr>>(),
        redirects in any::<Option<u32>>(),
        body_bytes in any::<Option<u64>>(),
        cert_expires_at in proptest::option::of(a_time()),
    ) -> Observation {
        let phases = Phases { dns, connect, tls, ttfb, body };
        Observation {
            outcome, error, latency, status_code, regex_matched, phases, ip, redirects, body_bytes, cert_expires_at,
            lookup_began_at: None,
        }
    }
}

proptest! {
    #[test]
    fn every_observation_is_written_as_the_schema_requires_and_read_back(
        observation in an_observation(),
        address in "[^\0]{1,64}",
        agent in any::<String>(),
        scheduled_at in a_time(),
        started_at in proptest::option::of(a_time()),
        interval in a_duration(),
    ) {
        let target = target(&address, Duration::from_secs(1));
        let mut sample = stamp(&target, observation, Stamp { scheduled_at, started_at, interval, agent: &agent });
        let value = encoded(&sample);
        assert_schema_takes(&value);
        sample.agent = Some(agent.replace('\0', "\u{fffd}").into());
        prop_assert_eq!(decode(value.as_bytes()), Ok(sample));
    }

    #[test]
    fn a_damaged_record_is_refused_or_still_a_record(
        document in proptest::sample::select(&[GOLDEN_OK, GOLDEN_REDIRECT_CERT][..]),
        edits in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>(), 0_u8..3), 1..4),
    ) {
        let mut value = document.trim_end().as_bytes().to_vec();
        for (at, byte, edit) in edits {
            let at = at.index(value.len());
            match edit {
                0 => value[at] = byte,
                1 => value.insert(at, byte),
                _ => _ = value.remove(at),
            }
        }
        match decode(&value) {
            Ok(sample) => {
                prop_assert!(serde_json::from_slice::<Value>(&value).is_ok(), "what is no JSON was taken");
                prop_assert!(decode(encoded(&sample).as_bytes()).is_ok());
            }
            Err(rejection) => prop_assert!(!rejection.0.is_empty()),
        }
    }

    #[test]
    fn no_bytes_make_the_reader_panic(value in any::<Vec<u8>>(), text in r#"\{["\\{}\[\]:,a-v0-9.eu+ \-]{0,60}\}?"#) {
        prop_assert!(decode(&value).is_err());
        prop_assert!(decode(text.as_bytes()).is_err());
    }
}
