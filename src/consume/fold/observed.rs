//! What the state needs of a record, and the form in which a batch keeps it.
//!
//! Pure. A record is decoded once, when it is read. Texts are cut, so that no record can make a row of the state too large.

use serde::{Deserialize, Serialize};

use crate::sample::{Sample, Timestamp};

/// A record whose `scheduled_at` is further than this ahead of Kafka's timestamp is only counted in its bucket. Otherwise, after
/// one record of a clock that is ahead, all others would be late. Kafka has the same limit (`message.timestamp.after.max.ms`).
const AHEAD_MICROS: i64 = 3_600_000_000;

/// The longest interval that counts, which is also the longest of a host file. Postgres can add a multiple of it to any time.
const MAX_INTERVAL_MICROS: i64 = 366 * 86_400_000_000;

/// The longest texts in bytes. An index entry of Postgres holds an address and an agent of these lengths.
const MAX_AGENT_BYTES: usize = 255;
const MAX_OUTCOME_BYTES: usize = 64;
const MAX_TEXT_BYTES: usize = 1_024;

/// The outcome of a failed check whose record has none, as in the original's records.
pub(super) const UNKNOWN_OUTCOME: &str = "unknown";

/// What a record says about its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Finding {
    Valid,
    Failed,
    /// The tick was not checked.
    Missed,
    /// The place could not check, because its own network, memory or threads failed.
    Offline,
}

impl Finding {
    pub fn of(sample: &Sample<'_>) -> Self {
        match sample.outcome.as_deref() {
            _ if sample.is_valid => Self::Valid,
            Some("missed") => Self::Missed,
            Some("agent_error" | "agent_offline") => Self::Offline,
            _ => Self::Failed,
        }
    }

    /// Whether it says anything about the host.
    pub fn is_check(self) -> bool {
        matches!(self, Self::Valid | Self::Failed)
    }
}

/// A record, as far as the state depends on it. Times are microseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Observed<'a> {
    pub address: &'a str,
    /// The place; `""` if the record has no agent.
    pub agent: &'a str,
    pub at: i64,
    /// Whether it is too far ahead to change more than sums.
    pub is_ahead: bool,
    pub interval_micros: Option<i64>,
    pub cert_expires_at: Option<i64>,
    pub name: Option<&'a str>,
    pub group: Option<&'a str>,
    pub finding: Finding,
    /// Whether it is a check that took longer than its host's `slow=`.
    pub is_slow: bool,
    pub outcome: &'a str,
    pub error: Option<&'a str>,
    pub latency_us: Option<i64>,
    /// DNS, connect, TLS, first byte and body, in units of 10 µs.
    pub phases: [i32; 5],
}

impl<'a> Observed<'a> {
    /// `timestamp` is Kafka's, which counts if the record has no `scheduled_at`. `None` if both are missing.
    pub fn of(sample: &'a Sample<'_>, timestamp: Option<Timestamp>) -> Option<Self> {
        let at = sample.scheduled_at.or(timestamp)?.unix_micros();
        let latest = timestamp.map_or(i64::MAX, |timestamp| {
            timestamp.unix_micros().saturating_add(AHEAD_MICROS)
        });
        let outcome = match sample.outcome.as_deref() {
            Some(outcome) => outcome,
            None if sample.is_valid => "ok",
            None => UNKNOWN_OUTCOME,
        };
        let finding = Finding::of(sample);
        let micros = |seconds: f64| (seconds * 1e6).round() as i64;
        let phases = [
            sample.dns_seconds,
            sample.connect_seconds,
            sample.tls_seconds,
            sample.ttfb_seconds,
            sample.body_seconds,
        ];
        Some(Self {
            address: &sample.address,
            agent: cut(sample.agent.as_deref().unwrap_or_default(), MAX_AGENT_BYTES),
            at,
            is_ahead: at > latest,
            interval_micros: sample
                .interval_seconds
                .map(|seconds| micros(seconds).min(MAX_INTERVAL_MICROS)),
            cert_expires_at: sample.cert_expires_at.map(Timestamp::unix_micros),
            name: sample.name.as_deref().map(|name| cut(name, MAX_TEXT_BYTES)),
            group: sample.group.as_deref().map(|group| cut(group, MAX_TEXT_BYTES)),
            finding,
            is_slow: finding.is_check() && sample.slow == Some(true),
            outcome: cut(outcome, MAX_OUTCOME_BYTES),
            error: sample.error.as_deref().map(|error| cut(error, MAX_TEXT_BYTES)),
            latency_us: sample.latency.map(micros),
            phases: phases.map(|seconds| seconds.map_or(0, |seconds| (seconds * 1e5).round() as i32)),
        })
    }

    /// Appends the form in which a batch keeps it.
    pub fn encode(&self, into: &mut Vec<u8>) {
        let bytes = std::mem::take(into);
        *into = postcard::to_extend(self, bytes).expect("a vector takes all bytes");
    }

    /// Reads what [`Observed::encode`] wrote; `None` for anything else.
    pub fn decode(bytes: &'a [u8]) -> Option<Self> {
        postcard::from_bytes(bytes).ok()
    }
}

fn cut(text: &str, bytes: usize) -> &str {
    let mut end = bytes.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::Outcome;

    #[test]
    fn only_a_failed_check_counts_as_failed() {
        let sample = |is_valid, outcome: Option<&'static str>| Sample {
            is_valid,
            outcome: outcome.map(Into::into),
            ..Sample::default()
        };
        for (is_valid, outcome, finding) in [
            (true, Some("ok"), Finding::Valid),
            (true, None, Finding::Valid),
            (false, Some("missed"), Finding::Missed),
            (false, Some("agent_error"), Finding::Offline),
            (false, Some("agent_offline"), Finding::Offline),
            (false, Some("dns_error"), Finding::Failed),
            (false, Some("a word of a later version"), Finding::Failed),
            (false, None, Finding::Failed),
        ] {
            assert_eq!(Finding::of(&sample(is_valid, outcome)), finding, "{outcome:?}");
        }
        for outcome in Outcome::ALL.into_iter().filter(|outcome| *outcome != Outcome::Ok) {
            let finding = Finding::of(&sample(false, Some(outcome.as_str())));
            assert_eq!(
                finding == Finding::Failed,
                outcome.is_failed_check(),
                "{outcome:?}"
            );
        }
    }

    #[test]
    fn a_batch_keeps_all_of_it_and_cuts_long_texts() {
        let long = "ä".repeat(2_000);
        let sample = Sample {
            address: "https://a.example/".into(),
            agent: Some(long.as_str().into()),
            outcome: Some(long.as_str().into()),
            error: Some(long.as_str().into()),
            scheduled_at: Timestamp::from_unix_micros(1_000_000),
            cert_expires_at: Timestamp::from_unix_micros(-1),
            interval_seconds: Some(60.0),
            latency: Some(1e300),
            tls_seconds: Some(0.012_345),
            ..Sample::default()
        };
        let observed = Observed::of(&sample, None).unwrap();
        let lengths = [observed.agent, observed.outcome, observed.error.unwrap()].map(str::len);
        assert_eq!(lengths, [254, 64, 1_024]);
        assert_eq!((observed.latency_us, observed.phases[2]), (Some(i64::MAX), 1_235));
        let mut bytes = b"before".to_vec();
        observed.encode(&mut bytes);
        assert_eq!(Observed::decode(&bytes[6..]), Some(observed));
        assert_eq!(Observed::decode(b""), None);
    }
}
