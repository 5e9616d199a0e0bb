//! The wire: one [`Sample`] is one Kafka record's value, a JSON object.
//!
//! Owns the record's format in both directions: [`encode`] for `produce`, [`decode`] for `consume`, and what a reader
//! holds a record to. Knows nothing of Kafka or Postgres, except that Postgres text holds no NUL. The writer's side is
//! also written down for other programs, as `schema/sample.v1.json`.

mod shortcut;

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::io::Write as _;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::de::{
    self, Deserialize, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

/// The version of the record's format that [`encode`] writes and the highest that [`decode`] reads.
pub const VERSION: u64 = 1;

/// The longest address in bytes, in the host file as in a record.
pub const MAX_ADDRESS_BYTES: usize = 2_048;

/// The deepest nesting of arrays and objects within a record that is read, in fields that are ignored too: whoever reads
/// the record after us may well recurse (128 is also serde_json's own bound).
pub const MAX_NESTING: usize = 128;

/// JSON's (RFC 8259, section 2), which is less than Unicode's: a byte-order mark is none.
const WHITE_SPACE: [char; 4] = [' ', '\t', '\n', '\r'];

/// How much of a value a [`Rejection`] quotes: enough to recognise it, too little to flood a table or a log.
const MAX_QUOTED_CHARS: usize = 64;

/// The result of one tick of one host. Absent and `null` are both `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample<'a> {
    /// As written in the host file.
    pub address: Cow<'a, str>,
    /// Seconds from the start of the check to the final response's headers.
    pub latency: Option<f64>,
    pub status_code: Option<i16>,
    pub is_valid: bool,
    /// A word of the closed set when written by this version; any word when read.
    pub outcome: Option<Cow<'a, str>>,
    /// The cause for a person, one line.
    pub error: Option<Cow<'a, str>>,
    /// The tick. Always there when written; `None` in the original's four-field records.
    pub scheduled_at: Option<Timestamp>,
    pub started_at: Option<Timestamp>,
    pub interval_seconds: Option<f64>,
    pub regex_matched: Option<bool>,
    pub dns_seconds: Option<f64>,
    pub connect_seconds: Option<f64>,
    pub tls_seconds: Option<f64>,
    pub ttfb_seconds: Option<f64>,
    pub body_seconds: Option<f64>,
    /// The address last connected to.
    pub ip: Option<IpAddr>,
    pub redirects: Option<i32>,
    pub body_bytes: Option<i64>,
    pub cert_expires_at: Option<Timestamp>,
    /// Who checked.
    pub agent: Option<Cow<'a, str>>,
}

/// Why a value is no record, for a person: what, where in the value, what was expected. One line of bounded length.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Rejection(pub String);

/// Appends the record's value to `into`: one JSON object, every field of the format written, in the order of
/// [`Field::ALL`].
///
/// Total, so that whatever is in the sample the record can be read: durations are rounded to microseconds, which keeps
/// them short, and one that is negative or not finite is written as null; a NUL in a string becomes U+FFFD.
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
            Field::Agent => put_or_null(into, sample.agent.as_deref(), put_text),
        }
    }
    into.push(b'}');
}

/// Reads a record's value; strings are borrowed from it wherever they hold no escape.
///
/// The object is the whole value: nothing but white space may stand before or after it. A key twice counts in the record
/// itself; within a field that is ignored only `\u0000` and the depth of nesting are looked at. Two limits follow from
/// the types that a sample is stored in: `status_code` is a smallint, `redirects` an integer.
///
/// # Errors
/// The value breaks a rule that readers hold a record to.
pub fn decode(value: &[u8]) -> Result<Sample<'_>, Rejection> {
    let read = std::str::from_utf8(value).ok().and_then(shortcut::read);
    match read {
        Some(sample) => Ok(sample),
        None => decode_fully(value),
    }
}

/// [`decode`] without the shortcut: the format, and every reason why a value breaks it.
fn decode_fully(value: &[u8]) -> Result<Sample<'_>, Rejection> {
    let text = object_text(value)?;
    let mut reading = Reading::default();
    let mut json = serde_json::Deserializer::from_str(text);
    let read = json.deserialize_map(&mut reading).and_then(|()| json.end());
    if let Some(rejection) = reading.rejection {
        return Err(rejection);
    }
    if let Err(error) = read {
        return Err(Rejection(match reading.at {
            Some(field) => format!("{}: {error}", field.name()),
            None => format!("expected one JSON object and nothing else: {error}"),
        }));
    }
    for required in [Field::Address, Field::IsValid] {
        if !reading.has_seen(required) {
            return Err(Rejection(format!("{}: missing", required.name())));
        }
    }
    if !reading.unknown_keys.is_empty() && is_nested_deeper_than(MAX_NESTING, text) {
        return Err(Rejection(format!(
            "expected at most {MAX_NESTING} arrays and objects in one another"
        )));
    }
    Ok(reading.sample)
}

/// The record's fields, in the order in which they are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    V,
    Address,
    Latency,
    StatusCode,
    IsValid,
    Outcome,
    Error,
    ScheduledAt,
    StartedAt,
    IntervalSeconds,
    RegexMatched,
    DnsSeconds,
    ConnectSeconds,
    TlsSeconds,
    TtfbSeconds,
    BodySeconds,
    Ip,
    Redirects,
    BodyBytes,
    CertExpiresAt,
    Agent,
}

impl Field {
    pub const ALL: [Self; 21] = [
        Self::V,
        Self::Address,
        Self::Latency,
        Self::StatusCode,
        Self::IsValid,
        Self::Outcome,
        Self::Error,
        Self::ScheduledAt,
        Self::StartedAt,
        Self::IntervalSeconds,
        Self::RegexMatched,
        Self::DnsSeconds,
        Self::ConnectSeconds,
        Self::TlsSeconds,
        Self::TtfbSeconds,
        Self::BodySeconds,
        Self::Ip,
        Self::Redirects,
        Self::BodyBytes,
        Self::CertExpiresAt,
        Self::Agent,
    ];

    /// The field's key in the record, and the name of its column.
    pub fn name(self) -> &'static str {
        match self {
            Self::V => "v",
            Self::Address => "address",
            Self::Latency => "latency",
            Self::StatusCode => "status_code",
            Self::IsValid => "is_valid",
            Self::Outcome => "outcome",
            Self::Error => "error",
            Self::ScheduledAt => "scheduled_at",
            Self::StartedAt => "started_at",
            Self::IntervalSeconds => "interval_seconds",
            Self::RegexMatched => "regex_matched",
            Self::DnsSeconds => "dns_seconds",
            Self::ConnectSeconds => "connect_seconds",
            Self::TlsSeconds => "tls_seconds",
            Self::TtfbSeconds => "ttfb_seconds",
            Self::BodySeconds => "body_seconds",
            Self::Ip => "ip",
            Self::Redirects => "redirects",
            Self::BodyBytes => "body_bytes",
            Self::CertExpiresAt => "cert_expires_at",
            Self::Agent => "agent",
        }
    }
}

/// A point in time as microseconds since the Unix epoch, UTC; what RFC 3339 text and `timestamptz` both hold exactly.
///
/// Written as RFC 3339 with six digits and `Z`. Read with any offset and up to nine digits, which are cut to
/// microseconds. A leap second (23:59:60 UTC on the last day of a month, no other) is taken for the first second of the
/// next day: Unix time knows no other place for it, and Postgres does the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

/// Why a text is no [`Timestamp`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TimestampError {
    #[error("expected a time as in RFC 3339, such as 2026-01-31T12:00:00.123456Z")]
    Shape,
    #[error("expected a time with a zone: Z or an offset such as +02:00")]
    NoZone,
    #[error("expected at most nine digits after the second")]
    TooManyDigits,
    #[error("expected a date and a time of day that exist")]
    NoSuchTime,
    #[error("expected a time in the years 1970 to 9999 (UTC)")]
    OutOfRange,
}

const MICROS_PER_SECOND: i64 = 1_000_000;
const SECONDS_PER_DAY: i64 = 86_400;
/// 1970-01-01 as a Julian day number.
const UNIX_EPOCH_JULIAN_DAY: i32 = 2_440_588;

impl Timestamp {
    const RANGE_MICROS: RangeInclusive<i64> = 0..=253_402_300_799_999_999;

    /// `None` outside the years 1970 to 9999.
    pub fn from_unix_micros(micros: i64) -> Option<Self> {
        Self::RANGE_MICROS.contains(&micros).then_some(Self(micros))
    }

    pub fn unix_micros(self) -> i64 {
        self.0
    }
}

impl Timestamp {
    /// `2026-01-31T12:00:00.123456Z`
    fn text(self) -> [u8; 27] {
        let (seconds, micros) = (self.0 / MICROS_PER_SECOND, self.0 % MICROS_PER_SECOND);
        let (year, month, day) = date_of(seconds).to_calendar_date();
        let second_of_day = seconds % SECONDS_PER_DAY;
        let mut text = *b"0000-00-00T00:00:00.000000Z";
        for (place, number) in [
            (0..4, i64::from(year)),
            (5..7, i64::from(u8::from(month))),
            (8..10, i64::from(day)),
            (11..13, second_of_day / 3_600),
            (14..16, second_of_day / 60 % 60),
            (17..19, second_of_day % 60),
            (20..26, micros),
        ] {
            write_digits(number.unsigned_abs(), &mut text[place]);
        }
        text
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&String::from_utf8_lossy(&self.text()))
    }
}

impl FromStr for Timestamp {
    type Err = TimestampError;

    fn from_str(text: &str) -> Result<Self, TimestampError> {
        let (head, rest) = text
            .as_bytes()
            .split_at_checked(19)
            .ok_or(TimestampError::Shape)?;
        let parted = [(4, b'-'), (7, b'-'), (10, b't'), (13, b':'), (16, b':')]
            .iter()
            .all(|&(at, sign)| head[at].to_ascii_lowercase() == sign);
        if !parted {
            return Err(TimestampError::Shape);
        }
        let part = |range| number(&head[range]).ok_or(TimestampError::Shape);
        let (year, month, day) = (part(0..4)?, part(5..7)?, part(8..10)?);
        let (hour, minute, second) = (part(11..13)?, part(14..16)?, part(17..19)?);

        let (micros, zone) = fraction_micros(rest)?;
        let offset_seconds = offset_seconds(zone)?;

        if hour > 23 || minute > 59 || second > 60 {
            return Err(TimestampError::NoSuchTime);
        }
        let date = calendar_date(year, month, day).ok_or(TimestampError::NoSuchTime)?;
        let days = i64::from(date.to_julian_day() - UNIX_EPOCH_JULIAN_DAY);
        let seconds = days * SECONDS_PER_DAY + hour * 3_600 + minute * 60 + second - offset_seconds;
        let timestamp =
            Self::from_unix_micros(seconds * MICROS_PER_SECOND + micros).ok_or(TimestampError::OutOfRange)?;
        if second == 60 && (seconds % SECONDS_PER_DAY != 0 || date_of(seconds).day() != 1) {
            return Err(TimestampError::NoSuchTime);
        }
        Ok(timestamp)
    }
}

/// The UTC date of a [`Timestamp`]'s seconds.
fn date_of(unix_seconds: i64) -> time::Date {
    i32::try_from(unix_seconds / SECONDS_PER_DAY)
        .ok()
        .and_then(|days| time::Date::from_julian_day(UNIX_EPOCH_JULIAN_DAY + days).ok())
        .expect("a timestamp lies in the years 1970 to 9999, which a date holds")
}

fn calendar_date(year: i64, month: i64, day: i64) -> Option<time::Date> {
    let month = time::Month::try_from(u8::try_from(month).ok()?).ok()?;
    time::Date::from_calendar_date(i32::try_from(year).ok()?, month, u8::try_from(day).ok()?).ok()
}

/// The microseconds of an optional `.123456789`, and what follows it.
fn fraction_micros(text: &[u8]) -> Result<(i64, &[u8]), TimestampError> {
    let Some(text) = text.strip_prefix(b".") else {
        return Ok((0, text));
    };
    let digits_end = text
        .iter()
        .position(|byte| !byte.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, rest) = text.split_at(digits_end);
    match digits.len() {
        0 => Err(TimestampError::Shape),
        count @ 1..=9 => {
            let nanos = digits
                .iter()
                .fold(0, |number, digit| number * 10 + i64::from(digit - b'0'))
                * 10_i64.pow(9 - count as u32);
            Ok((nanos / 1_000, rest))
        }
        _ => Err(TimestampError::TooManyDigits),
    }
}

/// The seconds that an RFC 3339 zone is ahead of UTC.
fn offset_seconds(zone: &[u8]) -> Result<i64, TimestampError> {
    match zone {
        [] => Err(TimestampError::NoZone),
        b"Z" | b"z" => Ok(0),
        &[sign @ (b'+' | b'-'), h1, h2, b':', m1, m2] => {
            let hours = number(&[h1, h2]).ok_or(TimestampError::Shape)?;
            let minutes = number(&[m1, m2]).ok_or(TimestampError::Shape)?;
            if hours > 23 || minutes > 59 {
                return Err(TimestampError::NoSuchTime);
            }
            let seconds = hours * 3_600 + minutes * 60;
            Ok(if sign == b'-' { -seconds } else { seconds })
        }
        _ => Err(TimestampError::Shape),
    }
}

/// The number that a few ASCII digits, and only digits, write.
fn number(digits: &[u8]) -> Option<i64> {
    digits.iter().try_fold(0, |number, byte| {
        byte.is_ascii_digit()
            .then(|| number * 10 + i64::from(byte - b'0'))
    })
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
    write!(into, "\"{ip}\"").expect("a Vec takes every write");
}

fn put_text(into: &mut Vec<u8>, text: &str) {
    let text = if text.contains('\0') {
        Cow::Owned(text.replace('\0', "\u{fffd}"))
    } else {
        Cow::Borrowed(text)
    };
    serde_json::to_writer(into, &text).expect("every str is a JSON string, and a Vec takes every write");
}

/// As `12.345678`: a decimal with one to six digits after the point. What was rounded to microseconds reads back as the
/// very same number (a division by a million and the reading of a decimal both round to the nearest) up to 2^33 seconds,
/// 272 years, from where on floats lie further apart than microseconds.
fn put_seconds(into: &mut Vec<u8>, seconds: f64) {
    if !seconds.is_finite() || seconds < 0.0 {
        return into.extend_from_slice(b"null");
    }
    // Saturates, at half a million years.
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

/// The number, with leading zeros where it has fewer digits. By hand, as times are: a record has a dozen of numbers, and
/// the standard library's formatting takes three times as long over them.
fn put_digits(into: &mut Vec<u8>, number: u64, least_digits: usize) {
    let digits = number.checked_ilog10().map_or(1, |log| log as usize + 1);
    let start = into.len();
    into.resize(start + digits.max(least_digits), b'0');
    write_digits(number, &mut into[start..]);
}

/// The number's last digits, as many as there is room for.
fn write_digits(mut number: u64, into: &mut [u8]) {
    for place in into.iter_mut().rev() {
        *place = b'0' + (number % 10) as u8;
        number /= 10;
    }
}

/// The value as text that may be one object, free of what no reader takes.
fn object_text(value: &[u8]) -> Result<&str, Rejection> {
    if value.is_empty() {
        return Err(Rejection(
            "expected a JSON object, found an empty value".to_owned(),
        ));
    }
    let text = std::str::from_utf8(value).map_err(|error| {
        Rejection(format!(
            "expected UTF-8, found another byte at {}",
            error.valid_up_to()
        ))
    })?;
    if text.starts_with('\u{feff}') {
        return Err(Rejection(
            "expected nothing before the object, found a byte-order mark".to_owned(),
        ));
    }
    if !text.trim_start_matches(WHITE_SPACE).starts_with('{') {
        return Err(Rejection(format!(
            "expected a JSON object, found {}",
            Quoted(text)
        )));
    }
    if let Some(at) = nul_escape(text) {
        return Err(Rejection(format!(
            "expected no NUL, which Postgres cannot store, found \\u0000 at byte {at}"
        )));
    }
    Ok(text)
}

/// Where the first `\u0000` stands that is an escape (in `\\u0000` the backslash is).
fn nul_escape(text: &str) -> Option<usize> {
    // In valid JSON a backslash stands only in strings, before one byte of ASCII; what is invalid is found later.
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        if rest[at..].starts_with(r"\u0000") {
            return Some(text.len() - rest.len() + at);
        }
        rest = rest.get(at + 2..)?;
    }
    None
}

/// Of valid JSON.
fn is_nested_deeper_than(limit: usize, json: &str) -> bool {
    let mut depth = 0_usize;
    let mut in_string = false;
    let mut bytes = json.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => _ = bytes.next(),
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => depth += 1,
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > limit {
            return true;
        }
    }
    false
}

/// A record while it is read.
#[derive(Default)]
struct Reading<'de> {
    sample: Sample<'de>,
    /// A bit per field of [`Field::ALL`].
    seen: u32,
    unknown_keys: BTreeSet<Cow<'de, str>>,
    /// The field whose value is being read: serde_json's own errors do not name it.
    at: Option<Field>,
    /// The reason, where it is ours: through serde's error it would come back with a position appended.
    rejection: Option<Rejection>,
}

impl<'de> Reading<'de> {
    fn has_seen(&self, field: Field) -> bool {
        self.seen & 1 << field as u32 != 0
    }

    fn key(&mut self, key: Cow<'de, str>, position: usize) -> Result<Option<Field>, Rejection> {
        // Nearly every record is as `encode` writes it, so the next field is guessed before it is sought.
        let guess = Field::ALL
            .get(position)
            .copied()
            .filter(|field| field.name() == key);
        let field = guess.or_else(|| Field::ALL.into_iter().find(|field| field.name() == key));
        let is_new = match field {
            Some(field) => {
                let is_new = !self.has_seen(field);
                self.seen |= 1 << field as u32;
                is_new
            }
            None => self.unknown_keys.insert(key.clone()),
        };
        if is_new {
            Ok(field)
        } else {
            Err(Rejection(format!(
                "expected every key once, found {} twice",
                Quoted(&key)
            )))
        }
    }

    #[inline(always)] // As above: it is called in one place.
    fn set(&mut self, field: Field, value: Scalar<'de>) -> Result<(), String> {
        let sample = &mut self.sample;
        match field {
            Field::V => value.version()?,
            Field::Address => sample.address = value.address()?,
            Field::Latency => sample.latency = value.seconds()?,
            Field::StatusCode => sample.status_code = value.integer(i16::MIN, i16::MAX)?,
            Field::IsValid => sample.is_valid = value.required_boolean()?,
            Field::Outcome => sample.outcome = value.text()?,
            Field::Error => sample.error = value.text()?,
            Field::ScheduledAt => sample.scheduled_at = value.timestamp()?,
            Field::StartedAt => sample.started_at = value.timestamp()?,
            Field::IntervalSeconds => sample.interval_seconds = value.seconds()?,
            Field::RegexMatched => sample.regex_matched = value.boolean()?,
            Field::DnsSeconds => sample.dns_seconds = value.seconds()?,
            Field::ConnectSeconds => sample.connect_seconds = value.seconds()?,
            Field::TlsSeconds => sample.tls_seconds = value.seconds()?,
            Field::TtfbSeconds => sample.ttfb_seconds = value.seconds()?,
            Field::BodySeconds => sample.body_seconds = value.seconds()?,
            Field::Ip => sample.ip = value.ip()?,
            Field::Redirects => sample.redirects = value.integer(i32::MIN, i32::MAX)?,
            Field::BodyBytes => sample.body_bytes = value.integer(i64::MIN, i64::MAX)?,
            Field::CertExpiresAt => sample.cert_expires_at = value.timestamp()?,
            Field::Agent => sample.agent = value.text()?,
        }
        Ok(())
    }

    fn reject<E: de::Error>(&mut self, rejection: Rejection) -> E {
        self.rejection = Some(rejection);
        E::custom("rejected")
    }
}

impl<'de> Visitor<'de> for &mut Reading<'de> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut position = 0;
        while let Some(Text(key)) = map.next_key()? {
            match self
                .key(key, position)
                .map_err(|rejection| self.reject(rejection))?
            {
                Some(field) => {
                    self.at = Some(field);
                    map.next_value_seed(Slot {
                        reading: &mut *self,
                        field,
                    })?;
                    self.at = None;
                }
                None => _ = map.next_value::<IgnoredAny>()?,
            }
            position += 1;
        }
        Ok(())
    }
}

/// A JSON string, borrowed where it holds no escape (serde's own `Cow` never borrows).
struct Text<'de>(Cow<'de, str>);

impl<'de> Deserialize<'de> for Text<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;

        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }

        deserializer.deserialize_str(TextVisitor)
    }
}

/// A field's value as it stands there, before it is known to fit. Its methods say what was found and what was expected.
enum Scalar<'de> {
    Null,
    Boolean(bool),
    /// Wide enough for what JSON readers take as integers, -2^63 to 2^64-1.
    Integer(i128),
    Float(f64),
    Text(Cow<'de, str>),
    Array,
    Object,
}

impl<'de> Scalar<'de> {
    fn version(self) -> Result<(), String> {
        match self {
            Self::Null => Ok(()),
            Self::Integer(version) if version == i128::from(VERSION) => Ok(()),
            Self::Integer(version) if version > i128::from(VERSION) => Err(format!(
                "expected {VERSION}, found {version}, a newer writer's: upgrade this reader"
            )),
            other => Err(other.instead_of(VERSION)),
        }
    }

    fn address(self) -> Result<Cow<'de, str>, String> {
        match self {
            Self::Text(text) if (1..=MAX_ADDRESS_BYTES).contains(&text.len()) => Ok(text),
            Self::Text(text) if !text.is_empty() => Err(format!(
                "expected at most {MAX_ADDRESS_BYTES} bytes, found {}: {}",
                text.len(),
                Quoted(&text)
            )),
            other => Err(other.instead_of("a string that is not empty")),
        }
    }

    fn seconds(self) -> Result<Option<f64>, String> {
        match self {
            Self::Null => Ok(None),
            // Beyond 2^53 an integer rounds to the nearest float, as if it were written with a point.
            Self::Integer(seconds) if seconds >= 0 => Ok(Some(seconds as f64)),
            // Adding zero turns -0.0 into 0.0.
            Self::Float(seconds) if seconds.is_finite() && seconds >= 0.0 => Ok(Some(seconds + 0.0)),
            other => Err(other.instead_of("a number of seconds from 0 on, or null")),
        }
    }

    fn integer<T>(self, least: T, greatest: T) -> Result<Option<T>, String>
    where
        T: TryFrom<i128> + fmt::Display,
    {
        let fitting = match self {
            Self::Null => return Ok(None),
            Self::Integer(integer) => T::try_from(integer).ok(),
            _ => None,
        };
        match fitting {
            Some(fitting) => Ok(Some(fitting)),
            None => Err(self.instead_of(format_args!("an integer from {least} to {greatest}, or null"))),
        }
    }

    fn required_boolean(self) -> Result<bool, String> {
        match self {
            Self::Boolean(boolean) => Ok(boolean),
            other => Err(other.instead_of("true or false")),
        }
    }

    fn boolean(self) -> Result<Option<bool>, String> {
        match self {
            Self::Null => Ok(None),
            Self::Boolean(boolean) => Ok(Some(boolean)),
            other => Err(other.instead_of("true, false or null")),
        }
    }

    fn text(self) -> Result<Option<Cow<'de, str>>, String> {
        match self {
            Self::Null => Ok(None),
            Self::Text(text) => Ok(Some(text)),
            other => Err(other.instead_of("a string or null")),
        }
    }

    fn timestamp(self) -> Result<Option<Timestamp>, String> {
        match self {
            Self::Null => Ok(None),
            Self::Text(text) => match text.parse() {
                Ok(timestamp) => Ok(Some(timestamp)),
                Err(error) => Err(format!("{error}, found {}", Quoted(&text))),
            },
            other => Err(other.instead_of("a time as in RFC 3339, in a string, or null")),
        }
    }

    fn ip(self) -> Result<Option<IpAddr>, String> {
        let ip = match &self {
            Self::Null => return Ok(None),
            Self::Text(text) => text.parse().ok(),
            _ => None,
        };
        match ip {
            Some(ip) => Ok(Some(ip)),
            None => Err(self.instead_of("an IPv4 or IPv6 address (no zone, no port), in a string, or null")),
        }
    }

    fn instead_of(self, expected: impl fmt::Display) -> String {
        let found = match self {
            Self::Null => "null".to_owned(),
            Self::Boolean(boolean) => boolean.to_string(),
            Self::Integer(integer) => integer.to_string(),
            Self::Float(float) => format!("{float:?}"),
            Self::Text(text) => Quoted(&text).to_string(),
            Self::Array => "an array".to_owned(),
            Self::Object => "an object".to_owned(),
        };
        format!("expected {expected}, found {found}")
    }
}

/// Reads one field's value and puts it into the sample at once: handing it out first makes a record 7 % slower.
struct Slot<'r, 'de> {
    reading: &'r mut Reading<'de>,
    field: Field,
}

impl<'de> Slot<'_, 'de> {
    fn fill<E: de::Error>(self, value: Scalar<'de>) -> Result<(), E> {
        let Self { reading, field } = self;
        reading
            .set(field, value)
            .map_err(|reason| reading.reject(Rejection(format!("{}: {reason}", field.name()))))
    }
}

impl<'de> DeserializeSeed<'de> for Slot<'_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Slot<'_, 'de> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        self.fill(Scalar::Null)
    }

    fn visit_bool<E: de::Error>(self, boolean: bool) -> Result<(), E> {
        self.fill(Scalar::Boolean(boolean))
    }

    fn visit_i64<E: de::Error>(self, integer: i64) -> Result<(), E> {
        self.fill(Scalar::Integer(integer.into()))
    }

    fn visit_u64<E: de::Error>(self, integer: u64) -> Result<(), E> {
        self.fill(Scalar::Integer(integer.into()))
    }

    fn visit_f64<E: de::Error>(self, float: f64) -> Result<(), E> {
        self.fill(Scalar::Float(float))
    }

    fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<(), E> {
        self.fill(Scalar::Text(Cow::Borrowed(text)))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<(), E> {
        self.fill(Scalar::Text(Cow::Owned(text.to_owned())))
    }

    // No field holds one of the two; they are read over so that the reason can name the field.
    fn visit_seq<A: SeqAccess<'de>>(self, mut array: A) -> Result<(), A::Error> {
        while array.next_element::<IgnoredAny>()?.is_some() {}
        self.fill(Scalar::Array)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<(), A::Error> {
        while object.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        self.fill(Scalar::Object)
    }
}

/// A text in quotes, cut, its control characters escaped.
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.char_indices().nth(MAX_QUOTED_CHARS) {
            Some((end, _)) => write!(formatter, "{:?}…", &self.0[..end]),
            None => write!(formatter, "{:?}", self.0),
        }
    }
}
