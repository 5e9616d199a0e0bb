//! A record's value as a sample, or the reason why it is not a record.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, Visitor};

use super::record::{Field, MAX_ADDRESS_BYTES, Sample, VERSION};
use super::shortcut;
use crate::terminal;

/// The white space of JSON (RFC 8259, section 2). A byte-order mark does not belong to it.
const WHITE_SPACE: [char; 4] = [' ', '\t', '\n', '\r'];

/// The longest text of serde_json or of the record in a [`Rejection`]: enough to recognise the value that it quotes, and little in a table or a log.
const MAX_REASON_CHARS: usize = 200;

/// Why a value is not a valid record: the field, what was expected and what was found. One line of limited length.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Rejection(pub String);

/// Reads a record's value. Strings without escapes are borrowed from it.
///
/// Only white space is allowed before and after the object. A key that is there twice is an error, but not within an
/// ignored field, where only `\u0000` is checked. Two limits follow from the types of the table's columns: `status_code` is a
/// smallint, `redirects` an integer.
pub fn decode(value: &[u8]) -> Result<Sample<'_>, Rejection> {
    let read = std::str::from_utf8(value).ok().and_then(shortcut::read);
    match read {
        Some(sample) => Ok(sample),
        None => decode_fully(value),
    }
}

/// [`decode`] without the shortcut: reads every valid record, and says what is wrong with any other value.
pub(super) fn decode_fully(value: &[u8]) -> Result<Sample<'_>, Rejection> {
    let text = object_text(value)?;
    let mut reading = RecordReader::default();
    let mut json = serde_json::Deserializer::from_str(text);
    if let Err(error) = json.deserialize_map(&mut reading).and_then(|()| json.end()) {
        let what = reading.at.map_or("not one valid JSON object", Field::name);
        return Err(Rejection(shortened(&format!("{what}: {error}"))));
    }
    for required in [Field::Address, Field::IsValid] {
        if !reading.has_seen(required) {
            return Err(Rejection(format!("{}: missing", required.name())));
        }
    }
    Ok(reading.sample)
}

/// The value as text, after the checks that need no parsing.
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
            "expected a JSON object, found {:?}",
            shortened(text)
        )));
    }
    if let Some(at) = nul_escape(text) {
        return Err(Rejection(format!(
            "expected no NUL, which Postgres cannot store, found \\u0000 at byte {at}"
        )));
    }
    Ok(text)
}

/// Where the first `\u0000` is. In `\\u0000` the first backslash escapes the second, so that is not one.
fn nul_escape(text: &str) -> Option<usize> {
    // In valid JSON a backslash is only in strings, before an ASCII character. Invalid JSON is found later.
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        if rest[at..].starts_with(r"\u0000") {
            return Some(text.len() - rest.len() + at);
        }
        rest = rest.get(at + 2..)?;
    }
    None
}

fn shortened(text: &str) -> String {
    terminal::cut(text, MAX_REASON_CHARS)
}

/// The state of reading one record.
#[derive(Default)]
struct RecordReader<'de> {
    sample: Sample<'de>,
    /// A bit for each field of [`Field::ALL`].
    seen: u32,
    unknown_keys: BTreeSet<Cow<'de, str>>,
    /// The field whose value is being read, because serde_json's errors do not name it.
    at: Option<Field>,
}

impl<'de> RecordReader<'de> {
    fn has_seen(&self, field: Field) -> bool {
        self.seen & 1 << field as u32 != 0
    }

    /// Takes note of a key; the error is for a key that was there before.
    fn key<E: Error>(&mut self, key: Cow<'de, str>) -> Result<Option<Field>, E> {
        let field = Field::named(&key);
        let is_new = match field {
            Some(field) => !self.has_seen(field),
            None => self.unknown_keys.insert(key.clone()),
        };
        if !is_new {
            return Err(E::custom(format_args!("the key {key:?} is there twice")));
        }
        self.seen |= field.map_or(0, |field| 1 << field as u32);
        Ok(field)
    }

    fn value<A: MapAccess<'de>>(&mut self, field: Field, map: &mut A) -> Result<(), A::Error> {
        let sample = &mut self.sample;
        match field {
            Field::V => version(map)?,
            Field::Address => sample.address = address(map)?,
            Field::Latency => sample.latency = seconds(map)?,
            Field::StatusCode => sample.status_code = map.next_value()?,
            Field::IsValid => sample.is_valid = map.next_value()?,
            Field::Outcome => sample.outcome = text(map)?,
            Field::Error => sample.error = text(map)?,
            Field::ScheduledAt => sample.scheduled_at = parsed(map)?,
            Field::StartedAt => sample.started_at = parsed(map)?,
            Field::IntervalSeconds => sample.interval_seconds = seconds(map)?,
            Field::RegexMatched => sample.regex_matched = map.next_value()?,
            Field::DnsSeconds => sample.dns_seconds = seconds(map)?,
            Field::ConnectSeconds => sample.connect_seconds = seconds(map)?,
            Field::TlsSeconds => sample.tls_seconds = seconds(map)?,
            Field::TtfbSeconds => sample.ttfb_seconds = seconds(map)?,
            Field::BodySeconds => sample.body_seconds = seconds(map)?,
            Field::Ip => sample.ip = parsed(map)?,
            Field::Redirects => sample.redirects = map.next_value()?,
            Field::BodyBytes => sample.body_bytes = map.next_value()?,
            Field::CertExpiresAt => sample.cert_expires_at = parsed(map)?,
            Field::Slow => sample.slow = map.next_value()?,
            Field::Name => sample.name = text(map)?,
            Field::Group => sample.group = text(map)?,
            Field::Agent => sample.agent = text(map)?,
            Field::Epoch => {
                sample.epoch = map.next_value()?;
                if let Some(..0) = sample.epoch {
                    return Err(A::Error::custom("expected an integer, 0 or more, or null"));
                }
            }
        }
        Ok(())
    }
}

impl<'de> Visitor<'de> for &mut RecordReader<'de> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(JsonString(key)) = map.next_key()? {
            self.at = self.key(key)?;
            match self.at {
                Some(field) => self.value(field, &mut map)?,
                None => _ = map.next_value::<IgnoredAny>()?,
            }
            self.at = None;
        }
        Ok(())
    }
}

fn version<'de, A: MapAccess<'de>>(map: &mut A) -> Result<(), A::Error> {
    match map.next_value::<Option<u64>>()? {
        None | Some(VERSION) => Ok(()),
        Some(0) => Err(A::Error::custom(format_args!("expected {VERSION}, found 0"))),
        Some(version) => Err(A::Error::custom(format_args!(
            "expected {VERSION}, found {version}: a newer version wrote the record; upgrade this program"
        ))),
    }
}

fn address<'de, A: MapAccess<'de>>(map: &mut A) -> Result<Cow<'de, str>, A::Error> {
    let JsonString(address) = map.next_value()?;
    match address.len() {
        1..=MAX_ADDRESS_BYTES => Ok(address),
        bytes => Err(A::Error::custom(format_args!(
            "expected 1 to {MAX_ADDRESS_BYTES} bytes, found {bytes}: {address:?}"
        ))),
    }
}

fn seconds<'de, A: MapAccess<'de>>(map: &mut A) -> Result<Option<f64>, A::Error> {
    match map.next_value()? {
        None => Ok(None),
        // Adding zero turns -0.0 into 0.0.
        Some(seconds @ 0.0..=f64::MAX) => Ok(Some(seconds + 0.0)),
        Some(seconds) => Err(A::Error::custom(format_args!(
            "expected a number of seconds, 0 or more, or null, found {seconds:?}"
        ))),
    }
}

fn text<'de, A: MapAccess<'de>>(map: &mut A) -> Result<Option<Cow<'de, str>>, A::Error> {
    let text: Option<JsonString<'de>> = map.next_value()?;
    Ok(text.map(|JsonString(text)| text))
}

/// A time or an IP address.
fn parsed<'de, T, A>(map: &mut A) -> Result<Option<T>, A::Error>
where
    T: FromStr<Err: fmt::Display>,
    A: MapAccess<'de>,
{
    let Some(text) = text(map)? else {
        return Ok(None);
    };
    match text.parse() {
        Ok(value) => Ok(Some(value)),
        Err(error) => Err(A::Error::custom(format_args!("{error}, found {text:?}"))),
    }
}

/// A JSON string, borrowed if it has no escapes (serde's own `Cow` never borrows).
struct JsonString<'de>(Cow<'de, str>);

impl<'de> Deserialize<'de> for JsonString<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;

        impl<'de> Visitor<'de> for TextVisitor {
            type Value = JsonString<'de>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<JsonString<'de>, E> {
                Ok(JsonString(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<JsonString<'de>, E> {
                Ok(JsonString(Cow::Owned(text.to_owned())))
            }
        }

        deserializer.deserialize_str(TextVisitor)
    }
}
