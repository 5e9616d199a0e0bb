//! A sample as a record's value.

use std::borrow::Cow;
use std::io::Write as _;
use std::net::IpAddr;

use super::record::{Field, Sample, VERSION};
use super::timestamp::{Timestamp, write_digits};

/// Appends the record's value to `into`: one JSON object with every field, in the order of [`Field::ALL`].
///
/// It cannot fail, and every record that it writes can be read: durations are rounded to microseconds, one that is negative
/// or not finite is written as null, and a NUL in a string becomes U+FFFD.
pub fn encode(sample: &Sample<'_>, into: &mut Vec<u8>) {
    for field in Field::ALL {
        into.push(if field == Field::V { b'{' } else { b',' });
        into.push(b'"');
        into.extend_from_slice(field.name().as_bytes());
        into.extend_from_slice(b"\":");
        match field {
            Field::V => put_digits(into, VERSION, 1),
            Field::Address => put_text(into, &sample.address),
            Field::Latency => put_or_null(into, sample.latency, put_seconds),
            Field::StatusCode => put_or_null(into, sample.status_code, put_integer),
            Field::IsValid => put_boolean(into, sample.is_valid),
            Field::Outcome => put_or_null(into, sample.outcome.as_deref(), put_text),
            Field::Error => put_or_null(into, sample.error.as_deref(), put_text),
            Field::ScheduledAt => put_or_null(into, sample.scheduled_at, put_time),
            Field::StartedAt => put_or_null(into, sample.started_at, put_time),
            Field::IntervalSeconds => put_or_null(into, sample.interval_seconds, put_seconds),
            Field::RegexMatched => put_or_null(into, sample.regex_matched, put_boolean),
            Field::DnsSeconds => put_or_null(into, sample.dns_seconds, put_seconds),
            Field::ConnectSeconds => put_or_null(into, sample.connect_seconds, put_seconds),
            Field::TlsSeconds => put_or_null(into, sample.tls_seconds, put_seconds),
            Field::TtfbSeconds => put_or_null(into, sample.ttfb_seconds, put_seconds),
            Field::BodySeconds => put_or_null(into, sample.body_seconds, put_seconds),
            Field::Ip => put_or_null(into, sample.ip, put_ip),
            Field::Redirects => put_or_null(into, sample.redirects, put_integer),
            Field::BodyBytes => put_or_null(into, sample.body_bytes, put_integer),
            Field::CertExpiresAt => put_or_null(into, sample.cert_expires_at, put_time),
            Field::Slow => put_or_null(into, sample.slow, put_boolean),
            Field::Name => put_or_null(into, sample.name.as_deref(), put_text),
            Field::Group => put_or_null(into, sample.group.as_deref(), put_text),
            Field::Agent => put_or_null(into, sample.agent.as_deref(), put_text),
            Field::Epoch => put_or_null(into, sample.epoch, put_integer),
        }
    }
    into.push(b'}');
}

fn put_or_null<T>(into: &mut Vec<u8>, value: Option<T>, put: impl FnOnce(&mut Vec<u8>, T)) {
    match value {
        Some(value) => put(into, value),
        None => into.extend_from_slice(b"null"),
    }
}

fn put_boolean(into: &mut Vec<u8>, value: bool) {
    into.extend_from_slice(if value { b"true" } else { b"false" });
}

fn put_integer(into: &mut Vec<u8>, value: impl Into<i64>) {
    let value = value.into();
    if value < 0 {
        into.push(b'-');
    }
    put_digits(into, value.unsigned_abs(), 1);
}

fn put_time(into: &mut Vec<u8>, time: Timestamp) {
    into.push(b'"');
    into.extend_from_slice(&time.text());
    into.push(b'"');
}

fn put_ip(into: &mut Vec<u8>, ip: IpAddr) {
    write!(into, "\"{ip}\"").expect("writing to a Vec cannot fail");
}

fn put_text(into: &mut Vec<u8>, text: &str) {
    let text = if text.contains('\0') {
        Cow::Owned(text.replace('\0', "\u{fffd}"))
    } else {
        Cow::Borrowed(text)
    };
    serde_json::to_writer(into, &text)
        .expect("every str can be written as JSON, and writing to a Vec cannot fail");
}

/// Writes seconds as a decimal with one to six digits after the point, such as `12.345678`.
///
/// A number that was rounded to microseconds reads back as the same float, because both the division by a million and the
/// reading of a decimal round to the nearest float. That holds up to 2^33 seconds (272 years); above, the distance between
/// floats is more than a microsecond.
fn put_seconds(into: &mut Vec<u8>, seconds: f64) {
    if !seconds.is_finite() || seconds < 0.0 {
        return into.extend_from_slice(b"null");
    }
    // The cast saturates, at half a million years.
    let micros = (seconds * 1e6).round() as u64;
    let (whole, mut fraction, mut digits) = (micros / 1_000_000, micros % 1_000_000, 6);
    while digits > 1 && fraction % 10 == 0 {
        fraction /= 10;
        digits -= 1;
    }
    put_digits(into, whole, 1);
    into.push(b'.');
    put_digits(into, fraction, digits);
}

/// Writes the number with leading zeros up to `least_digits`. Not with the standard library's formatting, which takes three
/// times as long: a record has a dozen numbers.
fn put_digits(into: &mut Vec<u8>, number: u64, least_digits: usize) {
    let digits = number.checked_ilog10().map_or(1, |log| log as usize + 1);
    let start = into.len();
    into.resize(start + digits.max(least_digits), b'0');
    write_digits(number, &mut into[start..]);
}
