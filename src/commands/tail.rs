//! `host-metrics tail`: prints records as they arrive in Kafka.
//!
//! Owns a client that reads every partition of the topics, joins no group and commits nothing, and the line that a record is
//! printed as.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use anstyle::{AnsiColor, Style};
use anyhow::Context;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaResult;
use rdkafka::{Message, Offset, TopicPartitionList};

use crate::cli;
use crate::clock::{instant_now, wall_micros};
use crate::config::TailConfig;
use crate::duration::micros;
use crate::kafka::{self, Listener, client_config};
use crate::outage::Outage;
use crate::sample::epoch::Claim;
use crate::sample::{self, Outcome, Sample};
use crate::shutdown::Shutdown;
use crate::terminal::{self, counted};

/// How often new topics and partitions are looked for, as in `consume`.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// The same while Kafka or a topic is missing.
const RETRY_EVERY: Duration = Duration::from_secs(1);
/// The longest wait for one answer from Kafka. Nothing is printed meanwhile, and it is asked again.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// How long a signal or a closed pipe may go unnoticed.
const POLL_FOR: Duration = Duration::from_millis(100);

/// Prints records until a signal arrives or the reader of `out` closes it. An absence of Kafka is waited out.
pub fn run(
    config: &TailConfig,
    options: &cli::Tail,
    shutdown: &Shutdown,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    match Tail::new(config)?.print(options, shutdown, out) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        printed => printed.context("cannot write to standard output"),
    }
}

struct Tail<'a> {
    config: &'a TailConfig,
    consumer: BaseConsumer<Listener>,
    reading: BTreeSet<(String, i32)>,
    outage: Outage,
}

impl<'a> Tail<'a> {
    fn new(config: &'a TailConfig) -> anyhow::Result<Self> {
        let consumer = client_config(&config.kafka)
            // librdkafka reads nothing without one. It is not joined, and nothing is committed.
            .set("group.id", "host-metrics-tail")
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "earliest")
            .set("isolation.level", "read_committed")
            .set("fetch.wait.max.ms", "100")
            .set("fetch.queue.backoff.ms", "10")
            .set("queued.max.messages.kbytes", "8192")
            .create_with_context(Listener::new(&config.kafka))
            .context("librdkafka does not accept the configuration")?;
        Ok(Self {
            config,
            consumer,
            reading: BTreeSet::new(),
            outage: Outage::default(),
        })
    }

    fn print(mut self, options: &cli::Tail, shutdown: &Shutdown, out: &mut impl Write) -> io::Result<()> {
        let mut out = io::BufWriter::new(out);
        let mut next_look = instant_now();
        let mut is_first_look = true;
        while !shutdown.requested() {
            let now = instant_now();
            if now >= next_look {
                let is_complete = self.look(now, is_first_look.then_some(options.since));
                is_first_look &= self.reading.is_empty();
                next_look = instant_now() + if is_complete { LOOK_EVERY } else { RETRY_EVERY };
            }
            let mut wait = POLL_FOR;
            while let Some(polled) = self.consumer.poll(wait) {
                match polled {
                    Ok(message) => {
                        if let Some(line) = line(&message, options) {
                            out.write_all(line.as_bytes())?;
                        }
                    }
                    Err(error) => log::debug!("reading: {error}"),
                }
                wait = Duration::ZERO;
                if shutdown.requested() {
                    break;
                }
            }
            out.flush()?;
        }
        Ok(())
    }

    /// Starts to read partitions that are not read yet: at the first look from the place that the options name, later from
    /// their beginning, because they are new. True if every topic was found.
    fn look(&mut self, now: Instant, first: Option<Option<Duration>>) -> bool {
        let mut is_complete = true;
        for topic in &self.config.topics {
            if let Err(error) = self.read_new_partitions(topic, first) {
                let cause = self.consumer.context().last().map(|(_, cause)| cause);
                let cause = cause.unwrap_or_else(|| self.consumer.context().explain(&error));
                self.outage
                    .begin(now, format!("cannot read topic {topic}: {cause}"));
                is_complete = false;
            }
        }
        if is_complete && self.outage.end(now).is_some() {
            log::info!("all topics exist now");
        }
        if let Some((reason, _)) = self.outage.take_report(now) {
            log::warn!("{reason}; waiting for it");
        }
        is_complete
    }

    fn read_new_partitions(&mut self, topic: &str, first: Option<Option<Duration>>) -> KafkaResult<()> {
        let place = match first {
            None => Offset::Beginning,
            Some(None) => Offset::End,
            Some(Some(since)) => Offset::Offset((wall_micros() - micros(since)) / 1_000),
        };
        let mut new = TopicPartitionList::new();
        for partition in kafka::partitions(self.consumer.client(), topic, ANSWER_WITHIN)? {
            if !self.reading.contains(&(topic.to_owned(), partition.number)) {
                new.add_partition_offset(topic, partition.number, place)?;
            }
        }
        if new.count() == 0 {
            return Ok(());
        }
        // Resolves a time or the end to an offset now, so that no record is missed that arrives from here on.
        let starts = match place {
            Offset::Beginning => new,
            _ => self.consumer.offsets_for_times(new, ANSWER_WITHIN)?,
        };
        self.consumer.incremental_assign(&starts)?;
        let names = starts.elements();
        let names = names
            .iter()
            .map(|start| (start.topic().to_owned(), start.partition()));
        self.reading.extend(names);
        let partitions = counted(starts.count(), "partition");
        log::info!("reading {partitions} of topic {topic}");
        Ok(())
    }
}

/// The line for a message; `None` if the options do not ask for it, or it is a claim of a group of producers.
fn line(message: &impl Message, options: &cli::Tail) -> Option<String> {
    let value = message.payload().unwrap_or_default();
    match sample::decode(value) {
        Ok(sample) if !wants(options, &sample) => None,
        Ok(_) if options.json => Some(terminal::plain_json(&String::from_utf8_lossy(value)) + "\n"),
        Ok(sample) => Some(text(&sample, message.timestamp().to_millis())),
        Err(_) if Claim::decode(value).is_some() => None,
        Err(rejection) => {
            let (topic, partition, offset) = (message.topic(), message.partition(), message.offset());
            log::warn!(
                "{topic}/{partition}:{offset} is not a valid record: {}",
                rejection.0
            );
            None
        }
    }
}

/// Whether the options ask for this record.
fn wants(options: &cli::Tail, sample: &Sample<'_>) -> bool {
    let is_named = |host: &String| *host == sample.address || Some(host.as_str()) == sample.name.as_deref();
    (options.hosts.is_empty() || options.hosts.iter().any(is_named))
        && (!options.failed || kind(sample) == Kind::Failed)
}

/// A record as a line for people: time, outcome, status, latency, place, address, error.
fn text(sample: &Sample<'_>, received_millis: Option<i64>) -> String {
    let received = || sample::Timestamp::from_unix_micros(received_millis?.checked_mul(1000)?);
    let time = sample.started_at.or(sample.scheduled_at).or_else(received);
    // 2026-01-31T12:00:00.000000Z without the last five digits.
    let time = time.map_or_else(String::new, |time| time.to_string());
    let time = time.get(..21).unwrap_or(terminal::NONE).replace('T', " ");
    let or_none = |text: Option<String>| text.unwrap_or_else(|| terminal::NONE.to_owned());
    let outcome = match (&sample.outcome, sample.is_valid) {
        (Some(outcome), _) => terminal::plain(outcome),
        (None, true) => "valid".to_owned(),
        (None, false) => "not valid".to_owned(),
    };
    let status = or_none(sample.status_code.map(|code| code.to_string()));
    let latency = or_none(sample.latency.map(terminal::seconds));
    let place = sample.agent.as_deref().map(terminal::plain);
    let style = style(sample);
    let mut line = format!(
        "{time}  {style}{outcome:<18}{style:#}  {status:>3}  {latency:>8}  {}  {}",
        or_none(place),
        terminal::plain(&sample.address),
    );
    if let Some(error) = &sample.error {
        line += "  ";
        line += &terminal::plain(error);
    }
    line.push('\n');
    line
}

/// What a record says of its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Valid,
    Failed,
    /// The host was not checked.
    NotChecked,
}

fn kind(sample: &Sample<'_>) -> Kind {
    match sample.outcome.as_deref().and_then(Outcome::named) {
        _ if sample.is_valid => Kind::Valid,
        Some(outcome) if !outcome.is_failed_check() => Kind::NotChecked,
        _ => Kind::Failed,
    }
}

fn style(sample: &Sample<'_>) -> Style {
    match kind(sample) {
        Kind::Valid => AnsiColor::Green.on_default(),
        Kind::Failed => AnsiColor::Red.on_default().bold(),
        Kind::NotChecked => AnsiColor::Yellow.on_default(),
    }
}

#[cfg(test)]
mod tests {
    use rdkafka::Timestamp;
    use rdkafka::message::OwnedMessage;

    use super::*;

    fn message(value: &str) -> OwnedMessage {
        let value = Some(value.as_bytes().to_vec());
        OwnedMessage::new(
            value,
            None,
            "t".to_owned(),
            Timestamp::CreateTime(1_700_000_000_000),
            0,
            7,
            None,
        )
    }

    fn plain(line: Option<String>) -> String {
        anstream::adapter::strip_str(&line.unwrap_or_default()).to_string()
    }

    const OK: &str = r#"{"v":1,"address":"https://a.example/","is_valid":true,"outcome":"ok","latency":0.123,
        "status_code":200,"started_at":"2026-01-31T12:00:00.123456Z","agent":"eu"}"#;
    const REFUSED: &str = r#"{"v":1,"address":"http://b.example/","is_valid":false,"outcome":"connect_refused",
        "error":"Connection \u001b[31m refused","scheduled_at":"2026-01-31T12:00:00.9Z"}"#;
    const MISSED: &str = r#"{"v":1,"address":"http://b.example/","is_valid":false,"outcome":"missed","error":"no room",
        "scheduled_at":"2026-01-31T12:00:00Z"}"#;
    const ORIGINAL: &str = r#"{"address":"c.example","latency":0.1,"status_code":503,"is_valid":false}"#;

    #[test]
    fn a_record_is_a_line_with_time_outcome_status_latency_place_address_and_error() {
        let lines =
            [OK, REFUSED, MISSED, ORIGINAL].map(|value| plain(line(&message(value), &cli::Tail::default())));
        assert_eq!(
            lines,
            [
                "2026-01-31 12:00:00.1  ok                  200    123 ms  eu  https://a.example/\n",
                "2026-01-31 12:00:00.9  connect_refused       -         -  -  http://b.example/  Connection  [31m refused\n",
                "2026-01-31 12:00:00.0  missed                -         -  -  http://b.example/  no room\n",
                "2023-11-14 22:13:20.0  not valid           503    100 ms  -  c.example\n",
            ]
        );
    }

    #[test]
    fn an_agent_that_was_offline_has_checked_nothing() {
        let value = REFUSED.replace("connect_refused", "agent_offline");
        let options = cli::Tail {
            failed: true,
            ..cli::Tail::default()
        };
        assert_eq!(line(&message(&value), &options), None);
    }

    #[test]
    fn only_failed_checks_and_only_some_hosts_are_printed_on_request() {
        let lines = |options: &cli::Tail| {
            [OK, REFUSED, MISSED, ORIGINAL].map(|value| line(&message(value), options).is_some())
        };
        let failed = cli::Tail {
            failed: true,
            ..cli::Tail::default()
        };
        assert_eq!(lines(&failed), [false, true, false, true]);
        let hosts = cli::Tail {
            hosts: vec!["http://b.example/".to_owned(), "c.example".to_owned()],
            ..cli::Tail::default()
        };
        assert_eq!(lines(&hosts), [false, true, true, true]);
        let named = cli::Tail {
            hosts: vec!["Shop".to_owned()],
            ..cli::Tail::default()
        };
        let value = r#"{"address": "a", "is_valid": true, "name": "Shop"}"#;
        assert!(line(&message(value), &named).is_some());
    }

    #[test]
    fn json_is_the_records_own_value_without_hidden_characters() {
        let options = cli::Tail {
            json: true,
            ..cli::Tail::default()
        };
        let value = "{\"address\":\"a\u{202e}\",\"is_valid\":true}";
        let printed = line(&message(value), &options).unwrap();
        assert_eq!(printed, "{\"address\":\"a\\u202e\",\"is_valid\":true}\n");
    }

    #[test]
    fn claims_and_values_that_are_not_records_are_not_printed() {
        let claim = String::from_utf8(Claim::new("eu", "eu", 3).encode()).unwrap();
        for value in [claim.as_str(), "", "{}", "nonsense"] {
            assert_eq!(line(&message(value), &cli::Tail::default()), None, "{value}");
        }
    }
}
