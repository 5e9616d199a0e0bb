//! A record's value as a sample, or the reason why it is not a record.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use serde::de::{
    self, Deserialize, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

use super::record::{Field, MAX_ADDRESS_BYTES, Sample, VERSION};
use super::shortcut;
use super::timestamp::Timestamp;

/// How deep arrays and objects may be nested in a record, ignored fields included. Programs that read the record later may
/// use recursion. serde_json has the same limit.
pub const MAX_NESTING: usize = 128;

/// The white space of JSON (RFC 8259, section 2). A byte-order mark does not belong to it.
const WHITE_SPACE: [char; 4] = [' ', '\t', '\n', '\r'];

/// How much of a value a [`Rejection`] quotes: enough to recognise the value, and little in a table or a log.
const MAX_QUOTED_CHARS: usize = 64;

/// Why a value is not a valid record: the field, what was expected and what was found. One line of limited length.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Rejection(pub String);

/// Reads a record's value. Strings without escapes are borrowed from it.
///
/// Only white space is allowed before and after the object. A key that is there twice is an error, but not within an
/// ignored field, where only `\u0000` and the nesting are checked. Two limits follow from the types of the table's
/// columns: `status_code` is a smallint, `redirects` an integer.
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
            "expected arrays and objects nested at most {MAX_NESTING} deep"
        )));
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

/// Whether valid JSON is nested deeper than the limit.
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

/// The state of reading one record.
#[derive(Default)]
struct RecordReader<'de> {
    sample: Sample<'de>,
    /// A bit for each field of [`Field::ALL`].
    seen: u32,
    unknown_keys: BTreeSet<Cow<'de, str>>,
    /// The field whose value is being read, because serde_json's errors do not name it.
    at: Option<Field>,
    /// The reason, unless it is serde_json's. It does not go through serde_json's error, which would append a position.
    rejection: Option<Rejection>,
}

impl<'de> RecordReader<'de> {
    fn has_seen(&self, field: Field) -> bool {
        self.seen & 1 << field as u32 != 0
    }

    fn key(&mut self, key: Cow<'de, str>, position: usize) -> Result<Option<Field>, Rejection> {
        // Nearly all records have the order of `encode`, so the next field of that order is tried first.
        let guess = Field::ALL
            .get(position)
            .copied()
            .filter(|field| field.name() == key);
        let field = guess.or_else(|| Field::named(&key));
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

    #[inline(always)] // It is called in one place.
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
            Field::Slow => sample.slow = value.boolean()?,
            Field::Name => sample.name = value.text()?,
            Field::Group => sample.group = value.text()?,
            Field::Agent => sample.agent = value.text()?,
            Field::Epoch => sample.epoch = value.integer(0, i64::MAX)?,
        }
        Ok(())
    }

    fn reject<E: de::Error>(&mut self, rejection: Rejection) -> E {
        self.rejection = Some(rejection);
        E::custom("rejected")
    }
}

impl<'de> Visitor<'de> for &mut RecordReader<'de> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut position = 0;
        while let Some(JsonString(key)) = map.next_key()? {
            match self
                .key(key, position)
                .map_err(|rejection| self.reject(rejection))?
            {
                Some(field) => {
                    self.at = Some(field);
                    map.next_value_seed(FieldReader {
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

/// A field's value before its type is checked. The methods return it as the type of a field, or say what was expected and
/// what was found.
enum Scalar<'de> {
    Null,
    Boolean(bool),
    /// serde_json reads integers from -2^63 to 2^64-1.
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
                "expected {VERSION}, found {version}: a newer version wrote the record; upgrade this program"
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
            other => Err(other.instead_of("a non-empty string")),
        }
    }

    fn seconds(self) -> Result<Option<f64>, String> {
        match self {
            Self::Null => Ok(None),
            // Above 2^53 an integer is rounded to the nearest float, as a decimal would be.
            Self::Integer(seconds) if seconds >= 0 => Ok(Some(seconds as f64)),
            // Adding zero turns -0.0 into 0.0.
            Self::Float(seconds) if seconds.is_finite() && seconds >= 0.0 => Ok(Some(seconds + 0.0)),
            other => Err(other.instead_of("a number of seconds, 0 or more, or null")),
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
            other => Err(other.instead_of("a string with a time as in RFC 3339, or null")),
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
            None => {
                Err(self.instead_of("a string with an IPv4 or IPv6 address (without zone and port), or null"))
            }
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

/// Reads one field's value into the sample. Returning the value instead makes decoding 7 % slower.
struct FieldReader<'r, 'de> {
    reading: &'r mut RecordReader<'de>,
    field: Field,
}

impl<'de> FieldReader<'_, 'de> {
    fn fill<E: de::Error>(self, value: Scalar<'de>) -> Result<(), E> {
        let Self { reading, field } = self;
        reading
            .set(field, value)
            .map_err(|reason| reading.reject(Rejection(format!("{}: {reason}", field.name()))))
    }
}

impl<'de> DeserializeSeed<'de> for FieldReader<'_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for FieldReader<'_, 'de> {
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

    // No field is an array or an object. They are skipped, so that the reason can name the field.
    fn visit_seq<A: SeqAccess<'de>>(self, mut array: A) -> Result<(), A::Error> {
        while array.next_element::<IgnoredAny>()?.is_some() {}
        self.fill(Scalar::Array)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<(), A::Error> {
        while object.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        self.fill(Scalar::Object)
    }
}

/// A text in quotes, shortened, with its control characters escaped.
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.char_indices().nth(MAX_QUOTED_CHARS) {
            Some((end, _)) => write!(formatter, "{:?}…", &self.0[..end]),
            None => write!(formatter, "{:?}", self.0),
        }
    }
}
