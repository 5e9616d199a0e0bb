//! The record: its fields, and the sample that holds them in memory.

use std::borrow::Cow;
use std::net::IpAddr;

use super::timestamp::Timestamp;
use crate::words::words;

/// The number of a claim; a later claim has a higher one.
pub type Epoch = i64;

/// The version of the record's format that [`encode`](super::encode) writes, and the highest that
/// [`decode`](super::decode) reads.
pub const VERSION: u64 = 1;

/// The longest address in bytes, in the host file and in a record.
pub const MAX_ADDRESS_BYTES: usize = 2_048;

/// The result of one tick of one host. A field that is absent or `null` is `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample<'a> {
    /// As written in the host file.
    pub address: Cow<'a, str>,
    /// Seconds from the start of the check to the final response's headers.
    pub latency: Option<f64>,
    pub status_code: Option<i16>,
    pub is_valid: bool,
    /// A word of [`Outcome`](super::Outcome) when written; when read, any word that another version wrote.
    pub outcome: Option<Cow<'a, str>>,
    /// The cause in words, one line.
    pub error: Option<Cow<'a, str>>,
    /// The tick. Always written; `None` in the records of the original program, which have four fields.
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
    /// Whether the response took longer than the host's `slow=`.
    pub slow: Option<bool>,
    /// The host's `name=` and `group=`.
    pub name: Option<Cow<'a, str>>,
    pub group: Option<Cow<'a, str>>,
    /// The place that checked.
    pub agent: Option<Cow<'a, str>>,
    /// The claim of a group of producers under which it was written; `None` without a group.
    pub epoch: Option<Epoch>,
}

words! {
    /// The record's fields, in the order in which they are written.
    Field,
    /// The field's key in the record, and the name of its column.
    name:
    V "v",
    Address "address",
    Latency "latency",
    StatusCode "status_code",
    IsValid "is_valid",
    Outcome "outcome",
    Error "error",
    ScheduledAt "scheduled_at",
    StartedAt "started_at",
    IntervalSeconds "interval_seconds",
    RegexMatched "regex_matched",
    DnsSeconds "dns_seconds",
    ConnectSeconds "connect_seconds",
    TlsSeconds "tls_seconds",
    TtfbSeconds "ttfb_seconds",
    BodySeconds "body_seconds",
    Ip "ip",
    Redirects "redirects",
    BodyBytes "body_bytes",
    CertExpiresAt "cert_expires_at",
    Slow "slow",
    Name "name",
    Group "group",
    Agent "agent",
    Epoch "epoch",
}
