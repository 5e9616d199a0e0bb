//! The cost of a record on this machine in nanoseconds, for each step alone: decode, encode, a row of COPY, the consumer's
//! state machine, and the fold into the state.
//!
//! `cargo bench --bench wire [-- NAME]`. Prints the best of several rounds, because other programs use the machine too.

#![expect(clippy::print_stdout, reason = "a benchmark's result is its output")]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::{Duration, Instant};

use host_metrics::consume::batch::Flushed;
use host_metrics::consume::batch::{NextOffset, Offset, Partition, Record};
use host_metrics::consume::fold::Fold;
use host_metrics::consume::fold::host::DownWhen;
use host_metrics::consume::fold::observed::Observed;
use host_metrics::consume::ingest::{Action, Event, Ingest, Limits, Request};
use host_metrics::sample::{Timestamp, decode, encode};
use host_metrics::tables::row::{Column, Layout, Origin};

const RECORDS_PER_ROUND: u32 = 100_000;
const ROUNDS: usize = 15;

const OK: &[u8] = include_bytes!("../tests/it/golden/ok.json");

fn main() {
    let ok = OK.strip_suffix(b"\n").unwrap_or(OK);
    let sample = decode(ok).expect("the golden document is a record");

    report("decode", ok.len(), || {
        black_box(decode(black_box(ok))).expect("the golden document is a record");
    });

    let mut value = Vec::new();
    report("encode", ok.len(), || {
        value.clear();
        encode(black_box(&sample), &mut value);
        black_box(&value);
    });

    let layout = own_layout();
    let origin = Origin {
        topic: "host-metrics",
        partition: 3,
        offset: 123_456_789,
    };
    let mut row = Vec::new();
    report("encode_row", ok.len(), || {
        row.clear();
        layout
            .encode_row(black_box(&sample), origin, &mut row)
            .expect("our own table holds every sample");
        black_box(&row);
    });

    report("observe", ok.len(), || {
        value.clear();
        let sample = black_box(&sample);
        let observed = Observed::of(sample, None).expect("it has a time");
        observed.encode(&mut value);
        black_box(&value);
    });

    let batch = batch_of_hosts(ok);
    report_batches("fold", ok.len(), batch.len(), || {
        let mut fold = Fold::default();
        for bytes in &batch {
            fold.record(Observed::decode(bytes).expect("it was encoded just now"));
        }
        let rollups = fold.take_rollups();
        let mut stored = BTreeMap::new();
        fold.apply(DownWhen::Majority, &mut stored);
        black_box((rollups, stored));
    });

    let mut machine = Machine::new();
    report("ingest", ok.len(), || {
        machine.take(black_box(ok), black_box(&row));
    });
}

/// A batch of the state: 50 checks, one per minute, of each of 1,000 hosts.
fn batch_of_hosts(ok: &[u8]) -> Vec<Vec<u8>> {
    let sample = decode(ok).expect("the golden document is a record");
    let started_at = sample.scheduled_at.expect("it has a time").unix_micros();
    let record = |number: i64| {
        let mut sample = sample.clone();
        let (tick, host) = (number / 1_000, number % 1_000);
        sample.address = format!("https://host-{host:05}.example.com/health").into();
        sample.scheduled_at = Timestamp::from_unix_micros(started_at + 60_000_000 * tick + 60_000 * host);
        sample.latency = Some(0.05 + fastrand::f64() * 0.2);
        let mut value = Vec::new();
        let observed = Observed::of(&sample, None).expect("it has a time");
        observed.encode(&mut value);
        value
    };
    (0..50_000).map(record).collect()
}

/// The state machine with a store that answers immediately.
struct Machine {
    ingest: Ingest,
    next: NextOffset,
    now: Instant,
}

impl Machine {
    const PARTITION: Partition = Partition::new("host-metrics", 3);

    fn new() -> Self {
        let limits = Limits {
            batch_size: 1_000,
            batch_wait: Duration::from_secs(1),
            is_asynchronous: false,
        };
        let next = NextOffset(0);
        let mut machine = Self {
            ingest: Ingest::new(limits, 0),
            next,
            now: now(),
        };
        machine
            .ingest
            .handle(machine.now, Event::Assigned(vec![Self::PARTITION]));
        machine.go_on();
        machine
    }

    /// Key, value and row are copied, as in `consume`.
    fn take(&mut self, value: &[u8], row: &[u8]) {
        let record = Record {
            partition: Self::PARTITION,
            offset: Offset(self.next.0),
            timestamp: None,
            key: Some(b"https://shop.example/"),
            value: Some(value),
        };
        self.next = record.offset.next();
        let taken = self.ingest.record(self.now, record, |epochs, into| {
            epochs.admit("fra-1", 18).map_err(|void| void.to_string())?;
            into.extend_from_slice(row);
            Ok(())
        });
        assert!(taken, "the partition is being read, and there is room");
        if !self.ingest.has_room() {
            self.go_on();
        }
    }

    fn go_on(&mut self) {
        loop {
            let event = match self.ingest.next_action(self.now) {
                Action::Ask(Request::Open) => Event::Opened { same_layout: true },
                Action::Ask(Request::Locate { .. }) => {
                    Event::Located(BTreeMap::from([(Self::PARTITION, self.next.into())]))
                }
                Action::Ask(Request::Flush(batch)) => Event::Flushed(batch, Some(Flushed::Durable)),
                Action::Poll { .. } | Action::Hold { .. } => return,
                _ => continue,
            };
            self.ingest.handle(self.now, event);
        }
    }
}

/// The columns that `init` makes.
fn own_layout() -> Layout {
    const TEXT: (u32, &str) = (25, "text");
    const BOOLEAN: (u32, &str) = (16, "boolean");
    const SMALLINT: (u32, &str) = (21, "smallint");
    const INTEGER: (u32, &str) = (23, "integer");
    const BIGINT: (u32, &str) = (20, "bigint");
    const REAL: (u32, &str) = (700, "real");
    const DOUBLE: (u32, &str) = (701, "double precision");
    const TIMESTAMPTZ: (u32, &str) = (1184, "timestamp with time zone");
    const INET: (u32, &str) = (869, "inet");
    let columns = [
        ("address", TEXT),
        ("latency", DOUBLE),
        ("status_code", SMALLINT),
        ("is_valid", BOOLEAN),
        ("outcome", TEXT),
        ("error", TEXT),
        ("scheduled_at", TIMESTAMPTZ),
        ("started_at", TIMESTAMPTZ),
        ("interval_seconds", DOUBLE),
        ("regex_matched", BOOLEAN),
        ("dns_seconds", REAL),
        ("connect_seconds", REAL),
        ("tls_seconds", REAL),
        ("ttfb_seconds", REAL),
        ("body_seconds", REAL),
        ("ip", INET),
        ("redirects", INTEGER),
        ("body_bytes", BIGINT),
        ("cert_expires_at", TIMESTAMPTZ),
        ("agent", TEXT),
        ("kafka_topic", TEXT),
        ("kafka_partition", INTEGER),
        ("kafka_offset", BIGINT),
    ];
    let columns = columns.map(|(name, (type_oid, type_name))| Column {
        name: name.to_owned(),
        type_oid,
        type_name: type_name.to_owned(),
    });
    Layout::new(&columns).expect("every column fits its field")
}

fn report(what: &str, bytes: usize, mut once: impl FnMut()) {
    report_batches(what, bytes, RECORDS_PER_ROUND as usize, || {
        for _ in 0..RECORDS_PER_ROUND {
            once();
        }
    });
}

fn report_batches(what: &str, bytes: usize, records: usize, mut batch: impl FnMut()) {
    // cargo passes `--bench`.
    if std::env::args()
        .skip(1)
        .any(|arg| !arg.starts_with("--") && arg != what)
    {
        return;
    }
    let best = (0..ROUNDS)
        .map(|_| {
            let start = now();
            batch();
            start.elapsed()
        })
        .min()
        .unwrap_or(Duration::MAX);
    println!(
        "{what:<12} {:>6.0} ns per record of {bytes} bytes",
        best.as_secs_f64() * 1e9 / records as f64
    );
}

#[expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
fn now() -> Instant {
    Instant::now()
}
