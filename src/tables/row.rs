//! Rows in COPY's binary format, for the columns that the table has.
//!
//! Owns the mapping from the fields of a sample to columns and Postgres types, and the encoder. Pure. Postgres' documentation
//! of COPY describes the stream ("Binary Format"); the format of a value is what the `…recv` function of its type reads, which
//! is named at each encoder.

use std::fmt;
use std::net::IpAddr;

use crate::sample::{Field, Sample, Timestamp};
use crate::words::words;

/// The start of a binary COPY: signature, no flags, no header extension.
pub const HEADER: [u8; 19] = *b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

/// The end of a binary COPY: a row of -1 fields.
pub const TRAILER: [u8; 2] = (-1_i16).to_be_bytes();

/// A column as the catalogue describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    pub name: String,
    /// `pg_type.oid`; for a domain, that of its base type.
    pub type_oid: u32,
    /// As `format_type` writes it, for messages.
    pub type_name: String,
}

/// The columns that a row fills, with their sources and types.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    columns: Vec<FilledColumn>,
}

/// The position of a record in Kafka, stored with its row.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    pub topic: &'a str,
    pub partition: i32,
    pub offset: i64,
}

impl Layout {
    /// Chooses the columns that a sample fills; the others get their defaults. `columns` must not contain generated columns,
    /// which take no value.
    ///
    /// # Errors
    /// A column has the name of a field but a type that cannot hold it, or no column has the name of a field: one message
    /// each, for the operator.
    pub fn new(columns: &[Column]) -> Result<Self, Vec<String>> {
        // The kind of a value does not depend on the sample.
        let sample = Sample::default();
        let origin = Origin {
            topic: "",
            partition: 0,
            offset: 0,
        };
        let mut filled = Vec::new();
        let mut problems = Vec::new();
        for column in columns {
            let Some(source) = Source::named(&column.name) else {
                continue;
            };
            let value = source.value(&sample, origin);
            match Type::of(column).filter(|to| value.fits(*to)) {
                Some(to) => filled.push(FilledColumn { source, to }),
                None => problems.push(format!(
                    "column \"{}\" is of type {}, but it takes {}",
                    column.name,
                    column.type_name,
                    value.kind(),
                )),
            }
        }
        if filled.is_empty() && problems.is_empty() {
            problems.push(
                "the table has none of the columns that a record fills, such as \"address\" and \"is_valid\""
                    .to_owned(),
            );
        }
        if problems.is_empty() {
            Ok(Self { columns: filled })
        } else {
            Err(problems)
        }
    }

    /// The names of the columns, in the order of a row's fields.
    pub fn column_names(&self) -> Vec<&str> {
        self.columns.iter().map(|column| column.source.name()).collect()
    }

    /// The fields of a sample that the table has no column for, except those without a column in the tables of `init`.
    pub fn not_stored(&self) -> Vec<&'static str> {
        let is_stored = |field| {
            self.columns
                .iter()
                .any(|column| column.source == Source::Field(field))
        };
        stored_fields()
            .filter(|field| !is_stored(*field) && !WITHOUT_A_COLUMN.contains(field))
            .map(Field::name)
            .collect()
    }

    /// Appends one row, or nothing if there is an error.
    ///
    /// # Errors
    /// A column cannot hold its value: the reason, for the table of rejected records.
    pub fn encode_row(
        &self,
        sample: &Sample<'_>,
        origin: Origin<'_>,
        into: &mut Vec<u8>,
    ) -> Result<(), String> {
        let row_start = into.len();
        // A table has 1,600 columns at most.
        into.extend_from_slice(&(self.columns.len() as i16).to_be_bytes());
        for column in &self.columns {
            if let Err(reason) = put(into, column.source.value(sample, origin), column.to) {
                into.truncate(row_start);
                return Err(format!("{}: {reason}", column.source.name()));
            }
        }
        Ok(())
    }
}

/// A column that a row fills: the source of its value, and the type it is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FilledColumn {
    source: Source,
    to: Type,
}

/// Where the value of a column comes from. The column has the name of its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Field(Field),
    KafkaTopic,
    KafkaPartition,
    KafkaOffset,
}

/// The fields that are stored only if the user has added a column of that name.
const WITHOUT_A_COLUMN: [Field; 4] = [Field::Slow, Field::Name, Field::Group, Field::Epoch];

/// The version is the wire's business, not the table's.
fn stored_fields() -> impl Iterator<Item = Field> {
    Field::ALL.into_iter().filter(|field| *field != Field::V)
}

impl Source {
    fn named(column: &str) -> Option<Self> {
        let kafka = [Self::KafkaTopic, Self::KafkaPartition, Self::KafkaOffset];
        stored_fields()
            .map(Self::Field)
            .chain(kafka)
            .find(|source| source.name() == column)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Field(field) => field.name(),
            Self::KafkaTopic => "kafka_topic",
            Self::KafkaPartition => "kafka_partition",
            Self::KafkaOffset => "kafka_offset",
        }
    }

    fn value<'a>(self, sample: &'a Sample<'_>, origin: Origin<'a>) -> Value<'a> {
        match self {
            Self::Field(field) => match field {
                Field::V => Value::Integer(None),
                Field::Address => Value::Text(Some(&sample.address)),
                Field::Latency => Value::Seconds(sample.latency),
                Field::StatusCode => Value::Integer(sample.status_code.map(i64::from)),
                Field::IsValid => Value::Boolean(Some(sample.is_valid)),
                Field::Outcome => Value::Text(sample.outcome.as_deref()),
                Field::Error => Value::Text(sample.error.as_deref()),
                Field::ScheduledAt => Value::Time(sample.scheduled_at),
                Field::StartedAt => Value::Time(sample.started_at),
                Field::IntervalSeconds => Value::Seconds(sample.interval_seconds),
                Field::RegexMatched => Value::Boolean(sample.regex_matched),
                Field::DnsSeconds => Value::Seconds(sample.dns_seconds),
                Field::ConnectSeconds => Value::Seconds(sample.connect_seconds),
                Field::TlsSeconds => Value::Seconds(sample.tls_seconds),
                Field::TtfbSeconds => Value::Seconds(sample.ttfb_seconds),
                Field::BodySeconds => Value::Seconds(sample.body_seconds),
                Field::Ip => Value::Ip(sample.ip),
                Field::Redirects => Value::Integer(sample.redirects.map(i64::from)),
                Field::BodyBytes => Value::Integer(sample.body_bytes),
                Field::CertExpiresAt => Value::Time(sample.cert_expires_at),
                Field::Slow => Value::Boolean(sample.slow),
                Field::Name => Value::Text(sample.name.as_deref()),
                Field::Group => Value::Text(sample.group.as_deref()),
                Field::Agent => Value::Text(sample.agent.as_deref()),
                Field::Epoch => Value::Integer(sample.epoch),
            },
            Self::KafkaTopic => Value::Text(Some(origin.topic)),
            Self::KafkaPartition => Value::Integer(Some(origin.partition.into())),
            Self::KafkaOffset => Value::Integer(Some(origin.offset)),
        }
    }
}

/// A value for a column; `None` is null.
#[derive(Clone, Copy, Debug)]
enum Value<'a> {
    Text(Option<&'a str>),
    Boolean(Option<bool>),
    Integer(Option<i64>),
    Seconds(Option<f64>),
    Time(Option<Timestamp>),
    Ip(Option<IpAddr>),
}

impl Value<'_> {
    /// Whether a column of type `to` can hold such values, unless they are too large.
    fn fits(self, to: Type) -> bool {
        match self {
            Self::Text(_) => to == Type::Text,
            Self::Boolean(_) => to == Type::Bool,
            Self::Integer(_) => matches!(to, Type::Int2 | Type::Int4 | Type::Int8 | Type::Numeric),
            Self::Seconds(_) => matches!(to, Type::Float4 | Type::Float8 | Type::Numeric),
            Self::Time(_) => to == Type::Timestamp,
            Self::Ip(_) => matches!(to, Type::Inet | Type::Text),
        }
    }

    /// For the operator: the kind of value and the types that hold it.
    fn kind(self) -> &'static str {
        match self {
            Self::Text(_) => "text: make it text, character varying, character or citext",
            Self::Boolean(_) => "true or false: make it boolean",
            Self::Integer(_) => "integers: make it smallint, integer, bigint or numeric",
            Self::Seconds(_) => "seconds with a fraction: make it double precision, real or numeric",
            Self::Time(_) => "times: make it timestamp with time zone (or without; it then holds UTC)",
            Self::Ip(_) => "IP addresses: make it inet or text",
        }
    }
}

words! {
    /// Types that can be written. Types with the same binary format are one variant.
    Type,
    name:
    /// text, character varying, character, citext.
    Text "text",
    Bool "boolean",
    Int2 "smallint",
    Int4 "integer",
    Int8 "bigint",
    Float4 "real",
    Float8 "double precision",
    Numeric "numeric",
    /// With or without time zone; without, it holds UTC.
    Timestamp "timestamp",
    Inet "inet",
}

impl Type {
    /// The numbers are from Postgres' `pg_type.dat` and never change. citext is a type of an extension, so only its name is
    /// known, with a schema in front if that is not on the search path.
    fn of(column: &Column) -> Option<Self> {
        match column.type_oid {
            25 | 1042 | 1043 => Some(Self::Text),
            16 => Some(Self::Bool),
            21 => Some(Self::Int2),
            23 => Some(Self::Int4),
            20 => Some(Self::Int8),
            700 => Some(Self::Float4),
            701 => Some(Self::Float8),
            1700 => Some(Self::Numeric),
            1114 | 1184 => Some(Self::Timestamp),
            869 => Some(Self::Inet),
            _ => match column.type_name.rsplit('.').next() {
                Some("citext") => Some(Self::Text),
                _ => None,
            },
        }
    }
}

/// Appends a field: its length in bytes as 32 bits (-1: null), then the bytes.
fn put(into: &mut Vec<u8>, value: Value<'_>, to: Type) -> Result<(), String> {
    match (value, to) {
        (Value::Text(Some(text)), Type::Text) => return put_text(into, text),
        (Value::Boolean(Some(boolean)), Type::Bool) => put_bytes(into, [u8::from(boolean)]),
        (Value::Integer(Some(integer)), Type::Int2) => {
            put_bytes(into, narrow::<i16>(integer, to)?.to_be_bytes())
        }
        (Value::Integer(Some(integer)), Type::Int4) => {
            put_bytes(into, narrow::<i32>(integer, to)?.to_be_bytes())
        }
        (Value::Integer(Some(integer)), Type::Int8) => put_bytes(into, integer.to_be_bytes()),
        (Value::Integer(Some(integer)), Type::Numeric) => put_numeric(into, integer),
        (Value::Seconds(Some(seconds)), _) if !seconds.is_finite() => return Err(does_not_fit(seconds, to)),
        (Value::Seconds(Some(seconds)), Type::Float4) => {
            put_bytes(into, narrow_float(seconds, to)?.to_be_bytes())
        }
        (Value::Seconds(Some(seconds)), Type::Float8) => put_bytes(into, seconds.to_be_bytes()),
        (Value::Seconds(Some(seconds)), Type::Numeric) => put_numeric(into, seconds),
        (Value::Time(Some(time)), Type::Timestamp) => put_bytes(into, postgres_micros(time).to_be_bytes()),
        (Value::Ip(Some(ip)), Type::Inet) => put_inet(into, ip),
        (Value::Ip(Some(ip)), Type::Text) => return put_text(into, &ip.to_string()),
        (
            Value::Text(None)
            | Value::Boolean(None)
            | Value::Integer(None)
            | Value::Seconds(None)
            | Value::Time(None)
            | Value::Ip(None),
            _,
        ) => into.extend_from_slice(&(-1_i32).to_be_bytes()),
        // `Layout::new` accepts only pairs that fit. If it were wrong, records would be rejected and not lost.
        (value, to) => return Err(format!("{value:?} does not fit into {}", to.name())),
    }
    Ok(())
}

/// `textrecv`: the bytes, in the client's encoding, UTF-8.
fn put_text(into: &mut Vec<u8>, text: &str) -> Result<(), String> {
    let length =
        i32::try_from(text.len()).map_err(|error| format!("{} bytes of text: {error}", text.len()))?;
    into.extend_from_slice(&length.to_be_bytes());
    into.extend_from_slice(text.as_bytes());
    Ok(())
}

/// `timestamptz_recv`, `timestamp_recv`: microseconds since 2000-01-01 00:00 UTC.
fn postgres_micros(time: Timestamp) -> i64 {
    const POSTGRES_EPOCH_UNIX_MICROS: i64 = 946_684_800_000_000;
    time.unix_micros() - POSTGRES_EPOCH_UNIX_MICROS
}

/// `network_recv`: family (2 for IPv4, 3 for IPv6), bits of the network mask, 0 (no cidr), length, the address.
fn put_inet(into: &mut Vec<u8>, ip: IpAddr) {
    match ip {
        IpAddr::V4(ip) => {
            put_length(into, 4 + 4);
            into.extend_from_slice(&[2, 32, 0, 4]);
            into.extend_from_slice(&ip.octets());
        }
        IpAddr::V6(ip) => {
            put_length(into, 4 + 16);
            into.extend_from_slice(&[3, 128, 0, 16]);
            into.extend_from_slice(&ip.octets());
        }
    }
}

/// `numeric_recv`: four 16-bit numbers (the number of digits in base 10,000; the weight of the first one as a power of 10,000;
/// the sign; the number of decimal digits shown after the point), then the digits.
///
/// A float becomes the shortest decimal that reads back as the same float.
fn put_numeric(into: &mut Vec<u8>, number: impl fmt::LowerExp) {
    let text = format!("{number:e}");
    let (mantissa, exponent) = text
        .split_once('e')
        .expect("LowerExp writes an exponent, as in 1.2345e-7");
    let exponent: i16 = exponent
        .parse()
        .expect("the exponent of an i64 or f64 has at most three digits");
    let (sign, mantissa) = match mantissa.strip_prefix('-') {
        Some(mantissa) => (0x4000, mantissa),
        None => (0, mantissa),
    };
    let digits = mantissa
        .bytes()
        .filter(u8::is_ascii_digit)
        .map(|digit| i16::from(digit - b'0'));

    // The point is between two digits of base 10,000, so the first decimal digit has one of four places in its group. Three
    // empty places and 19 decimal digits (of an i64; a float has at most 17) fill six groups.
    let weight = exponent.div_euclid(4);
    let first_place = 3 - exponent.rem_euclid(4) as usize;
    let mut groups = [0_i16; 6];
    let mut places = first_place;
    for digit in digits {
        groups[places / 4] += digit * [1_000, 100, 10, 1][places % 4];
        places += 1;
    }
    let count = if mantissa == "0" { 0 } else { places.div_ceil(4) };
    let digits_after_first = (places - first_place) as i16 - 1;
    let shown_after_point = (digits_after_first - exponent).max(0);

    put_length(into, 8 + 2 * count);
    for number in [count as i16, weight, sign, shown_after_point]
        .iter()
        .chain(&groups[..count])
    {
        into.extend_from_slice(&number.to_be_bytes());
    }
}

fn put_bytes<const N: usize>(into: &mut Vec<u8>, bytes: [u8; N]) {
    put_length(into, N);
    into.extend_from_slice(&bytes);
}

/// For values that are short by construction.
fn put_length(into: &mut Vec<u8>, bytes: usize) {
    into.extend_from_slice(&(bytes as i32).to_be_bytes());
}

fn narrow<T: TryFrom<i64>>(integer: i64, to: Type) -> Result<T, String> {
    T::try_from(integer).ok().ok_or_else(|| does_not_fit(integer, to))
}

/// Rounds to the nearest `real`, which is 0 for the smallest numbers.
fn narrow_float(seconds: f64, to: Type) -> Result<f32, String> {
    let narrowed = seconds as f32;
    if narrowed.is_finite() {
        Ok(narrowed)
    } else {
        Err(does_not_fit(seconds, to))
    }
}

/// Debug writes a large float with an exponent, Display with hundreds of digits.
fn does_not_fit(number: impl fmt::Debug, to: Type) -> String {
    format!("{number:?} does not fit {}", to.name())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use postgres::types::{FromSql, Type as PostgresType};
    use proptest::prelude::*;

    use super::*;

    const ORIGIN: Origin<'static> = Origin {
        topic: "host-metrics",
        partition: 3,
        offset: 1 << 40,
    };

    fn column(name: &str, of: &PostgresType) -> Column {
        Column {
            name: name.to_owned(),
            type_oid: of.oid(),
            type_name: of.name().to_owned(),
        }
    }

    fn layout(columns: &[(&str, PostgresType)]) -> Layout {
        let columns: Vec<Column> = columns.iter().map(|(name, of)| column(name, of)).collect();
        Layout::new(&columns).unwrap()
    }

    /// The fields of the only row in `rows`, read as COPY's format is documented.
    fn fields(row: &[u8]) -> Vec<Option<&[u8]>> {
        let (count, mut rest) = row.split_first_chunk::<2>().unwrap();
        let fields = (0..i16::from_be_bytes(*count)).map(|_| {
            let (length, after) = rest.split_first_chunk::<4>().unwrap();
            let length = i32::from_be_bytes(*length);
            let (field, after) = after.split_at(usize::try_from(length.max(0)).unwrap());
            rest = after;
            (length != -1).then_some(field)
        });
        let fields: Vec<_> = fields.collect();
        assert_eq!(rest, b"", "nothing follows the row");
        fields
    }

    /// The row of one field that a column of ours becomes.
    fn encoded(name: &str, to: PostgresType, sample: &Sample<'_>) -> Result<Vec<u8>, String> {
        let mut row = Vec::new();
        layout(&[(name, to)]).encode_row(sample, ORIGIN, &mut row)?;
        Ok(row)
    }

    fn field(name: &str, to: PostgresType, sample: &Sample<'_>) -> Option<Vec<u8>> {
        let row = encoded(name, to, sample).unwrap();
        fields(&row)[0].map(<[u8]>::to_vec)
    }

    fn read<'a, T: FromSql<'a>>(of: &PostgresType, field: Option<&'a [u8]>) -> T {
        assert!(T::accepts(of));
        T::from_sql_nullable(of, field).unwrap()
    }

    fn at(text: &str) -> Option<Timestamp> {
        Some(text.parse().unwrap())
    }

    fn full_sample() -> Sample<'static> {
        Sample {
            address: "https://exämple.com".into(),
            latency: Some(0.123_456),
            status_code: Some(503),
            is_valid: false,
            outcome: Some("bad_status".into()),
            error: Some("expected 200-399, got 503".into()),
            scheduled_at: at("2026-03-01T10:00:00Z"),
            started_at: at("2026-03-01T10:00:00.000113Z"),
            interval_seconds: Some(30.0),
            regex_matched: Some(true),
            dns_seconds: Some(0.5),
            connect_seconds: Some(0.25),
            tls_seconds: Some(0.125),
            ttfb_seconds: Some(0.001),
            body_seconds: None,
            ip: Some("2001:db8::7".parse().unwrap()),
            redirects: Some(2),
            body_bytes: Some(3_000_000_000),
            cert_expires_at: at("1999-12-31T23:59:59Z"),
            slow: Some(true),
            name: Some("Shop front".into()),
            group: Some("Shops".into()),
            agent: Some("fra-1".into()),
            epoch: Some(18),
        }
    }

    /// The columns that the contract gives the table when it is ours.
    fn own_columns() -> Vec<(&'static str, PostgresType)> {
        vec![
            ("address", PostgresType::TEXT),
            ("latency", PostgresType::FLOAT8),
            ("status_code", PostgresType::INT2),
            ("is_valid", PostgresType::BOOL),
            ("outcome", PostgresType::TEXT),
            ("error", PostgresType::TEXT),
            ("scheduled_at", PostgresType::TIMESTAMPTZ),
            ("started_at", PostgresType::TIMESTAMPTZ),
            ("interval_seconds", PostgresType::FLOAT8),
            ("regex_matched", PostgresType::BOOL),
            ("dns_seconds", PostgresType::FLOAT4),
            ("connect_seconds", PostgresType::FLOAT4),
            ("tls_seconds", PostgresType::FLOAT4),
            ("ttfb_seconds", PostgresType::FLOAT4),
            ("body_seconds", PostgresType::FLOAT4),
            ("ip", PostgresType::INET),
            ("redirects", PostgresType::INT4),
            ("body_bytes", PostgresType::INT8),
            ("cert_expires_at", PostgresType::TIMESTAMPTZ),
            ("agent", PostgresType::TEXT),
            ("kafka_topic", PostgresType::TEXT),
            ("kafka_partition", PostgresType::INT4),
            ("kafka_offset", PostgresType::INT8),
        ]
    }

    #[test]
    fn a_stream_begins_and_ends_as_documented() {
        assert_eq!(
            HEADER[..11],
            [0x50, 0x47, 0x43, 0x4f, 0x50, 0x59, 0x0a, 0xff, 0x0d, 0x0a, 0x00]
        );
        assert_eq!(HEADER[11..], [0; 8]);
        assert_eq!(TRAILER, [0xff, 0xff]);
    }

    #[test]
    fn our_own_table_takes_every_field() {
        let columns = own_columns();
        let layout = layout(&columns);
        assert_eq!(
            layout.column_names(),
            columns.iter().map(|(name, _)| *name).collect::<Vec<_>>()
        );
        assert_eq!(layout.not_stored(), Vec::<&str>::new());

        let sample = full_sample();
        let mut row = b"rows before".to_vec();
        layout.encode_row(&sample, ORIGIN, &mut row).unwrap();
        let fields = fields(row.strip_prefix(b"rows before").unwrap());

        let of = |name: &str| {
            let index = columns.iter().position(|(column, _)| *column == name).unwrap();
            (&columns[index].1, fields[index])
        };
        fn get<'a, T: FromSql<'a>>((of, field): (&PostgresType, Option<&'a [u8]>)) -> T {
            read(of, field)
        }
        assert_eq!(get::<&str>(of("address")), "https://exämple.com");
        assert_eq!(get::<f64>(of("latency")), 0.123_456);
        assert_eq!(get::<i16>(of("status_code")), 503);
        assert!(!get::<bool>(of("is_valid")));
        assert_eq!(get::<&str>(of("outcome")), "bad_status");
        assert_eq!(get::<&str>(of("error")), "expected 200-399, got 503");
        let unix = |micros| SystemTime::UNIX_EPOCH + Duration::from_micros(micros);
        assert_eq!(get::<SystemTime>(of("scheduled_at")), unix(1_772_359_200_000_000));
        assert_eq!(get::<SystemTime>(of("started_at")), unix(1_772_359_200_000_113));
        assert_eq!(get::<f64>(of("interval_seconds")), 30.0);
        assert!(get::<bool>(of("regex_matched")));
        assert_eq!(get::<f32>(of("dns_seconds")), 0.5);
        assert_eq!(get::<f32>(of("connect_seconds")), 0.25);
        assert_eq!(get::<f32>(of("tls_seconds")), 0.125);
        assert_eq!(get::<f32>(of("ttfb_seconds")), 0.001);
        assert_eq!(get::<Option<f32>>(of("body_seconds")), None);
        assert_eq!(get::<IpAddr>(of("ip")), sample.ip.unwrap());
        assert_eq!(get::<i32>(of("redirects")), 2);
        assert_eq!(get::<i64>(of("body_bytes")), 3_000_000_000);
        assert_eq!(
            get::<SystemTime>(of("cert_expires_at")),
            unix(946_684_799_000_000)
        );
        assert_eq!(get::<&str>(of("agent")), "fra-1");
        assert_eq!(get::<&str>(of("kafka_topic")), "host-metrics");
        assert_eq!(get::<i32>(of("kafka_partition")), 3);
        assert_eq!(get::<i64>(of("kafka_offset")), 1 << 40);
    }

    #[test]
    fn columns_that_the_user_has_added_take_their_fields() {
        let columns = [
            ("slow", PostgresType::BOOL),
            ("name", PostgresType::VARCHAR),
            ("group", PostgresType::TEXT),
            ("epoch", PostgresType::INT8),
        ];
        let mut row = Vec::new();
        layout(&columns)
            .encode_row(&full_sample(), ORIGIN, &mut row)
            .unwrap();
        let fields = fields(&row);
        assert!(read::<bool>(&columns[0].1, fields[0]));
        assert_eq!(read::<&str>(&columns[1].1, fields[1]), "Shop front");
        assert_eq!(read::<&str>(&columns[2].1, fields[2]), "Shops");
        assert_eq!(read::<i64>(&columns[3].1, fields[3]), 18);
    }

    #[test]
    fn what_a_sample_lacks_is_null() {
        let nothing = Sample {
            address: "a".into(),
            ..Sample::default()
        };
        let mut row = Vec::new();
        let columns = own_columns();
        layout(&columns).encode_row(&nothing, ORIGIN, &mut row).unwrap();
        let not_null: Vec<&str> = fields(&row)
            .iter()
            .zip(&columns)
            .filter_map(|(field, (name, _))| field.map(|_| *name))
            .collect();
        assert_eq!(
            not_null,
            [
                "address",
                "is_valid",
                "kafka_topic",
                "kafka_partition",
                "kafka_offset"
            ]
        );
    }

    #[test]
    fn the_originals_four_columns_take_what_they_can() {
        let layout = layout(&[
            ("id", PostgresType::INT8),
            ("is_valid", PostgresType::BOOL),
            ("latency", PostgresType::NUMERIC),
            ("v", PostgresType::TEXT),
            ("status_code", PostgresType::INT4),
            ("Address", PostgresType::INT4),
            ("address", PostgresType::VARCHAR),
        ]);
        assert_eq!(
            layout.column_names(),
            ["is_valid", "latency", "status_code", "address"]
        );
        assert_eq!(
            layout.not_stored(),
            [
                "outcome",
                "error",
                "scheduled_at",
                "started_at",
                "interval_seconds",
                "regex_matched",
                "dns_seconds",
                "connect_seconds",
                "tls_seconds",
                "ttfb_seconds",
                "body_seconds",
                "ip",
                "redirects",
                "body_bytes",
                "cert_expires_at",
                "agent",
            ]
        );

        let mut row = Vec::new();
        layout.encode_row(&full_sample(), ORIGIN, &mut row).unwrap();
        let expected = [
            &[0, 4][..],
            &[0, 0, 0, 1, 0],
            &[0, 0, 0, 12, 0, 2, 0xff, 0xff, 0, 0, 0, 6, 0x04, 0xd2, 0x15, 0xe0],
            &[0, 0, 0, 4, 0, 0, 1, 0xf7],
            &[0, 0, 0, 20],
            "https://exämple.com".as_bytes(),
        ];
        assert_eq!(row, expected.concat());
    }

    #[test]
    fn every_type_has_its_documented_bytes() {
        let sample = Sample {
            address: "é".into(),
            latency: Some(1.5),
            status_code: Some(-2),
            is_valid: true,
            scheduled_at: at("2000-01-01T00:00:01.000001Z"),
            started_at: at("1999-12-31T23:59:59.999999Z"),
            ip: Some("10.1.2.255".parse().unwrap()),
            body_bytes: Some(70_000),
            ..Sample::default()
        };
        let citext = Column {
            name: "address".into(),
            type_oid: 99_999,
            type_name: "public.citext".into(),
        };
        let mut row = Vec::new();
        Layout::new(&[citext])
            .unwrap()
            .encode_row(&sample, ORIGIN, &mut row)
            .unwrap();
        assert_eq!(row, [&[0, 1, 0, 0, 0, 2][..], "é".as_bytes()].concat());

        for (name, to, bytes) in [
            ("address", PostgresType::TEXT, "é".as_bytes()),
            ("address", PostgresType::VARCHAR, "é".as_bytes()),
            ("address", PostgresType::BPCHAR, "é".as_bytes()),
            ("is_valid", PostgresType::BOOL, &[1]),
            ("status_code", PostgresType::INT2, &[0xff, 0xfe]),
            ("status_code", PostgresType::INT4, &[0xff, 0xff, 0xff, 0xfe]),
            (
                "status_code",
                PostgresType::INT8,
                &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe],
            ),
            (
                "status_code",
                PostgresType::NUMERIC,
                &[0, 1, 0, 0, 0x40, 0, 0, 0, 0, 2],
            ),
            ("body_bytes", PostgresType::INT4, &[0, 1, 0x11, 0x70]),
            ("latency", PostgresType::FLOAT4, &[0x3f, 0xc0, 0, 0]),
            ("latency", PostgresType::FLOAT8, &[0x3f, 0xf8, 0, 0, 0, 0, 0, 0]),
            (
                "latency",
                PostgresType::NUMERIC,
                &[0, 2, 0, 0, 0, 0, 0, 1, 0, 1, 0x13, 0x88],
            ),
            (
                "scheduled_at",
                PostgresType::TIMESTAMPTZ,
                &[0, 0, 0, 0, 0, 0x0f, 0x42, 0x41],
            ),
            (
                "scheduled_at",
                PostgresType::TIMESTAMP,
                &[0, 0, 0, 0, 0, 0x0f, 0x42, 0x41],
            ),
            ("started_at", PostgresType::TIMESTAMPTZ, &[0xff; 8]),
            ("ip", PostgresType::INET, &[2, 32, 0, 4, 10, 1, 2, 255]),
            ("ip", PostgresType::TEXT, b"10.1.2.255"),
            (
                "kafka_offset",
                PostgresType::NUMERIC,
                &[
                    0, 4, 0, 3, 0, 0, 0, 0, // 1 0995 1162 7776
                    0, 1, 0x03, 0xe3, 0x04, 0x8a, 0x1e, 0x60,
                ],
            ),
        ] {
            assert_eq!(
                field(name, to.clone(), &sample).as_deref(),
                Some(bytes),
                "{name} as {to}"
            );
        }
        let ip = Sample {
            ip: Some("::ffff:1".parse().unwrap()),
            ..Sample::default()
        };
        let expected = [
            3, 128, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 1,
        ];
        assert_eq!(field("ip", PostgresType::INET, &ip).unwrap(), expected);
    }

    /// Digits, weight, sign and scale as `numeric_send` of Postgres 15 gives them for the decimal.
    #[test]
    fn a_numeric_is_the_shortest_decimal() {
        for (seconds, weight, scale, digits) in [
            (0.0, 0, 0, &[][..]),
            (1.0, 0, 0, &[1]),
            (10.0, 0, 0, &[10]),
            (9_999.0, 0, 0, &[9_999]),
            (10_000.0, 1, 0, &[1]),
            (12_345.678, 1, 3, &[1, 2_345, 6_780]),
            (0.1, -1, 1, &[1_000]),
            (0.12, -1, 2, &[1_200]),
            (0.1 + 0.2, -1, 17, &[3_000, 0, 0, 0, 4_000]),
            (0.000_1, -1, 4, &[1]),
            (0.000_01, -2, 5, &[1_000]),
            (0.000_001, -2, 6, &[100]),
            (31_622_400.000_001, 1, 6, &[3_162, 2_400, 0, 100]),
            (1e20, 5, 0, &[1]),
            (1.5e300, 75, 0, &[1, 5_000]),
            (5e-324, -81, 324, &[5]),
        ] {
            let sample = Sample {
                latency: Some(seconds),
                ..Sample::default()
            };
            let expected: Vec<u8> = [digits.len() as i16, weight, 0, scale]
                .iter()
                .chain(digits)
                .flat_map(|number: &i16| number.to_be_bytes())
                .collect();
            assert_eq!(
                field("latency", PostgresType::NUMERIC, &sample),
                Some(expected),
                "{seconds:?}"
            );
        }
    }

    #[test]
    fn a_column_of_an_unfit_type_is_named_with_what_it_should_be() {
        let columns = [
            column("address", &PostgresType::INT4),
            column("latency", &PostgresType::INT4),
            column("status_code", &PostgresType::FLOAT8),
            column("is_valid", &PostgresType::TEXT),
            column("scheduled_at", &PostgresType::DATE),
            column("ip", &PostgresType::CIDR),
            column("error", &PostgresType::JSON),
            column("kafka_offset", &PostgresType::TEXT),
            column("outcome", &PostgresType::TEXT),
            column("note", &PostgresType::JSON),
        ];
        let expected = [
            "column \"address\" is of type int4, but it takes text: make it text, character varying, character or citext",
            "column \"latency\" is of type int4, but it takes seconds with a fraction: make it double precision, real or numeric",
            "column \"status_code\" is of type float8, but it takes integers: make it smallint, integer, bigint or numeric",
            "column \"is_valid\" is of type text, but it takes true or false: make it boolean",
            "column \"scheduled_at\" is of type date, but it takes times: make it timestamp with time zone (or without; it then holds UTC)",
            "column \"ip\" is of type cidr, but it takes IP addresses: make it inet or text",
            "column \"error\" is of type json, but it takes text: make it text, character varying, character or citext",
            "column \"kafka_offset\" is of type text, but it takes integers: make it smallint, integer, bigint or numeric",
        ];
        assert_eq!(Layout::new(&columns), Err(expected.map(str::to_owned).to_vec()));
    }

    #[test]
    fn a_table_without_any_known_column_is_an_error() {
        for columns in [&[][..], &[column("id", &PostgresType::INT8)]] {
            let problems = Layout::new(columns).unwrap_err();
            assert_eq!(problems.len(), 1);
            assert!(
                problems[0].starts_with("the table has none of the columns"),
                "{problems:?}"
            );
        }
    }

    #[test]
    fn a_value_too_large_for_its_column_is_refused_and_leaves_no_bytes() {
        let sample = Sample {
            address: "a".into(),
            latency: Some(1e39),
            dns_seconds: Some(f64::NAN),
            redirects: Some(40_000),
            body_bytes: Some(-3_000_000_000),
            ..Sample::default()
        };
        for (name, to, expected) in [
            ("latency", PostgresType::FLOAT4, "latency: 1e39 does not fit real"),
            (
                "dns_seconds",
                PostgresType::FLOAT4,
                "dns_seconds: NaN does not fit real",
            ),
            (
                "dns_seconds",
                PostgresType::FLOAT8,
                "dns_seconds: NaN does not fit double precision",
            ),
            (
                "dns_seconds",
                PostgresType::NUMERIC,
                "dns_seconds: NaN does not fit numeric",
            ),
            (
                "redirects",
                PostgresType::INT2,
                "redirects: 40000 does not fit smallint",
            ),
            (
                "body_bytes",
                PostgresType::INT4,
                "body_bytes: -3000000000 does not fit integer",
            ),
            (
                "kafka_offset",
                PostgresType::INT4,
                "kafka_offset: 1099511627776 does not fit integer",
            ),
        ] {
            let mut rows = b"rows before".to_vec();
            let layout = layout(&[("address", PostgresType::TEXT), (name, to)]);
            assert_eq!(
                layout.encode_row(&sample, ORIGIN, &mut rows),
                Err(expected.to_owned())
            );
            assert_eq!(rows, b"rows before");
        }
        let largest = Sample {
            latency: Some(f32::MAX.into()),
            ..Sample::default()
        };
        assert_eq!(
            field("latency", PostgresType::FLOAT4, &largest).unwrap(),
            f32::MAX.to_be_bytes()
        );
    }

    #[test]
    fn the_numbers_of_types_are_those_that_postgres_publishes() {
        let known = [
            PostgresType::TEXT,
            PostgresType::BPCHAR,
            PostgresType::VARCHAR,
            PostgresType::BOOL,
            PostgresType::INT2,
            PostgresType::INT4,
            PostgresType::INT8,
            PostgresType::FLOAT4,
            PostgresType::FLOAT8,
            PostgresType::NUMERIC,
            PostgresType::TIMESTAMP,
            PostgresType::TIMESTAMPTZ,
            PostgresType::INET,
        ];
        for of in &known {
            assert!(Type::of(&column("address", of)).is_some(), "{of}");
        }
        let taken = (0..10_000).filter(|oid| {
            Type::of(&Column {
                name: String::new(),
                type_oid: *oid,
                type_name: "other".into(),
            })
            .is_some()
        });
        assert_eq!(taken.count(), known.len());
    }

    /// The decimal that a field of type numeric holds.
    fn decimal(field: &[u8]) -> String {
        let numbers: Vec<i16> = field
            .chunks_exact(2)
            .map(|pair| i16::from_be_bytes(pair.try_into().unwrap()))
            .collect();
        let [count, weight, sign, scale] = numbers[..4].try_into().unwrap();
        let digits = &numbers[4..];
        assert_eq!(digits.len(), usize::try_from(count).unwrap());
        assert!(digits.iter().all(|digit| (0..10_000).contains(digit)));
        assert!(
            digits.first() != Some(&0) && digits.last() != Some(&0),
            "{digits:?}"
        );
        let group = |power: i16| {
            let index = usize::try_from(weight - power).ok();
            format!(
                "{:04}",
                index.and_then(|index| digits.get(index)).copied().unwrap_or(0)
            )
        };
        let whole: String = (0..=weight.max(0)).rev().map(group).collect();
        let places = usize::try_from(scale).unwrap();
        let fraction: String = (1..=scale / 4 + 1).map(|power| group(-power)).collect();
        assert!(
            fraction[places..].bytes().all(|digit| digit == b'0'),
            "digits that are not shown"
        );
        format!(
            "{}{whole}.{}",
            if sign == 0 { "" } else { "-" },
            &fraction[..places]
        )
    }

    proptest! {
        #[test]
        fn every_float_survives_numeric(bits in any::<u64>()) {
            let seconds = f64::from_bits(bits);
            prop_assume!(seconds.is_finite());
            let sample = Sample { latency: Some(seconds), ..Sample::default() };
            let numeric = field("latency", PostgresType::NUMERIC, &sample).unwrap();
            prop_assert_eq!(decimal(&numeric).parse::<f64>().unwrap(), seconds);
        }

        #[test]
        fn every_duration_in_microseconds_survives_numeric(micros in 0_u64..(1 << 33) * 1_000_000) {
            let sample = Sample { latency: Some(micros as f64 / 1e6), ..Sample::default() };
            let numeric = field("latency", PostgresType::NUMERIC, &sample).unwrap();
            let decimal = decimal(&numeric);
            let (whole, fraction) = decimal.split_once('.').unwrap();
            prop_assert_eq!(format!("{whole}{fraction:0<6}").parse::<u64>().unwrap(), micros);
        }

        #[test]
        fn every_integer_survives_every_type_that_is_wide_enough(integer in any::<i64>(), shift in 0_u32..64) {
            let integer = integer >> shift;
            let sample = Sample { body_bytes: Some(integer), ..Sample::default() };
            let numeric = field("body_bytes", PostgresType::NUMERIC, &sample).unwrap();
            prop_assert_eq!(decimal(&numeric).trim_end_matches('.').parse::<i64>().unwrap(), integer);
            let wide = field("body_bytes", PostgresType::INT8, &sample);
            prop_assert_eq!(read::<i64>(&PostgresType::INT8, wide.as_deref()), integer);
            let narrow = encoded("body_bytes", PostgresType::INT4, &sample).ok();
            let narrow = narrow.map(|row| read::<i32>(&PostgresType::INT4, fields(&row)[0]));
            prop_assert_eq!(narrow, i32::try_from(integer).ok());
            let narrowest = encoded("body_bytes", PostgresType::INT2, &sample).ok();
            let narrowest = narrowest.map(|row| read::<i16>(&PostgresType::INT2, fields(&row)[0]));
            prop_assert_eq!(narrowest, i16::try_from(integer).ok());
        }

        #[test]
        fn every_time_address_and_text_is_read_back(
            micros in 0_i64..=253_402_300_799_999_999,
            ip in any::<IpAddr>(),
            text in any::<String>(),
        ) {
            let sample = Sample {
                address: text.as_str().into(),
                scheduled_at: Timestamp::from_unix_micros(micros),
                ip: Some(ip),
                ..Sample::default()
            };
            let mut row = Vec::new();
            let columns = [
                ("ip", PostgresType::INET),
                ("scheduled_at", PostgresType::TIMESTAMPTZ),
                ("address", PostgresType::TEXT),
            ];
            layout(&columns).encode_row(&sample, ORIGIN, &mut row).unwrap();
            let fields = fields(&row);
            prop_assert_eq!(read::<IpAddr>(&PostgresType::INET, fields[0]), ip);
            let time = SystemTime::UNIX_EPOCH + Duration::from_micros(micros.unsigned_abs());
            prop_assert_eq!(read::<SystemTime>(&PostgresType::TIMESTAMPTZ, fields[1]), time);
            prop_assert_eq!(read::<&str>(&PostgresType::TEXT, fields[2]), &text);
        }
    }
}
