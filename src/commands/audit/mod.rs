//! `host-metrics audit`: whether the tables hold every offset and every tick exactly once.
//!
//! Owns the verdict and its text. Three questions lead to it: which offsets are stored (`offsets`), which ticks have a row
//! (`ticks`), and what Kafka has at the offsets that are not stored (`kafka`). The queries are in `rows`.

mod kafka;
mod offsets;
mod rows;
mod ticks;

use std::fmt::{Display, Write as _};
use std::ops::Range;

use anyhow::bail;

use crate::clock::timestamp;
use crate::commands::audit::kafka::{KafkaFindings, Missing};
use crate::commands::audit::offsets::length;
use crate::commands::audit::rows::{DoubledOffset, Stored, StoredOffsets, StoredTicks, Tables};
use crate::commands::audit::ticks::{Gap, Series};
use crate::config::AuditConfig;
use crate::postgres::{self, Fault};
use crate::tables::days;
use crate::terminal::{columns, counted, plain};

/// How many violations of each kind are listed.
const NAMED: usize = 10;

/// What was found.
#[derive(Debug)]
pub struct Report {
    stored: Stored,
    found: KafkaFindings,
    /// Each kind of violation: how many there are, and the first of them.
    violations: Vec<Kind>,
}

#[derive(Debug)]
struct Kind {
    count: i64,
    what: &'static str,
    named: Vec<String>,
}

/// Reads the tables, and asks Kafka about offsets that are not stored.
///
/// # Errors
/// The database cannot be asked, or the table has neither the columns of the offsets nor those of the ticks. An absent Kafka
/// is no error.
pub fn run(config: &AuditConfig) -> anyhow::Result<Report> {
    let (stored, doubled) = postgres::once(&config.database, async |session| {
        let tables = Tables::open(session, &config.group_id).await?;
        Ok(read(&tables).await?)
    })?;
    if let Stored {
        offsets: Err(no_offsets),
        ticks: Err(no_ticks),
    } = &stored
    {
        bail!("nothing can be audited: {no_offsets}; {no_ticks}");
    }
    let mut found = KafkaFindings::default();
    let mut violations = Vec::new();
    if let Ok(stored) = &stored.offsets {
        found = look_up(stored, config);
        violations.extend(of_offsets(stored, &doubled.offsets, &found));
    }
    if let Ok(stored) = &stored.ticks {
        violations.extend(of_ticks(stored, &doubled.ticks));
    }
    violations.retain(|kind| kind.count > 0);
    Ok(Report {
        stored,
        found,
        violations,
    })
}

/// The first offsets and ticks that are stored more than once.
#[derive(Default)]
struct Doubled {
    offsets: Vec<DoubledOffset>,
    /// The series, the time and the number of rows.
    ticks: Vec<(usize, i64, i64)>,
}

async fn read(tables: &Tables<'_>) -> Result<(Stored, Doubled), Fault> {
    let stored = tables.read().await?;
    let mut doubled = Doubled::default();
    if let Ok(stored) = &stored.offsets {
        let partitions = stored.partitions.iter();
        let blocks: Vec<(String, i32, i64)> = partitions
            .flat_map(|((topic, partition), offsets)| {
                let numbers = offsets.doubled.iter();
                numbers.map(|number| (topic.clone(), *partition, *number))
            })
            .take(NAMED)
            .collect();
        if !blocks.is_empty() {
            let limit = i64::try_from(NAMED).unwrap_or(i64::MAX);
            doubled.offsets = tables.doubled_offsets(&blocks, limit).await?;
        }
    }
    if let Ok(stored) = &stored.ticks {
        let found = &stored.findings.doubled;
        let first = &found[..found.len().min(NAMED)];
        doubled.ticks = tables.doubled_ticks(&stored.series, first).await?;
    }
    Ok((stored, doubled))
}

/// What Kafka has at the offsets that are not stored.
fn look_up(stored: &StoredOffsets, config: &AuditConfig) -> KafkaFindings {
    let missing: Missing = stored
        .partitions
        .iter()
        .filter(|(_, offsets)| !offsets.missing.is_empty())
        .map(|(partition, offsets)| (partition.clone(), offsets.missing.clone()))
        .collect();
    let counted: i64 = stored
        .partitions
        .values()
        .map(|offsets| offsets.missing_count)
        .sum();
    let listed: i64 = missing.values().flatten().map(length).sum();
    let mut found = match &config.kafka {
        _ if missing.is_empty() => KafkaFindings::default(),
        Some(kafka) => {
            let kept_since = config
                .retention
                .map(|retention| days::kept_since(retention).unix_micros());
            kafka::look_up(kafka, &missing, kept_since)
        }
        None => {
            let mut found = KafkaFindings::default();
            found.add_unknown("KAFKA_BOOTSTRAP_SERVERS is not set", listed);
            found
        }
    };
    found.add_unknown("there are too many gaps to look up", counted - listed);
    found
}

fn of_offsets(stored: &StoredOffsets, doubled: &[DoubledOffset], found: &KafkaFindings) -> Vec<Kind> {
    let lost = found.lost.iter().flat_map(|((topic, partition), ranges)| {
        ranges.iter().map(move |range| {
            let (offsets, are) = match length(range) {
                1 => (format!("offset {}", range.start), "is"),
                _ => (format!("offsets {} to {}", range.start, range.end - 1), "are"),
            };
            format!("{topic}/{partition}: {offsets} {are} in Kafka, but neither in the table nor rejected")
        })
    });
    let twice = doubled.iter().map(repeated);
    let beyond: Vec<String> = stored
        .partitions
        .iter()
        .filter_map(|((topic, partition), offsets)| {
            let offset = offsets.beyond?;
            Some(format!(
                "{topic}/{partition}: offset {offset} is stored, but the position is before it"
            ))
        })
        .collect();
    let without_position = stored.without_position.iter();
    let count = |found: &Missing| found.values().flatten().map(length).sum();
    vec![
        Kind::new("records not stored", count(&found.lost), lost),
        Kind::new(
            "rows that repeat an offset",
            stored
                .partitions
                .values()
                .map(|offsets| offsets.doubled_count)
                .sum(),
            twice,
        ),
        Kind::new(
            "partitions with rows after their position",
            as_count(beyond.len()),
            beyond,
        ),
        Kind::new(
            "partitions with rows, but no position",
            as_count(without_position.len()),
            without_position.map(|((topic, partition), rows)| {
                let rows = counted(rows, "row");
                format!("{topic}/{partition}: {rows}")
            }),
        ),
    ]
}

fn repeated(doubled: &DoubledOffset) -> String {
    let hint = match doubled {
        DoubledOffset {
            is_rejected: true, ..
        } => ", as a row and as a rejected record",
        DoubledOffset { differ: true, .. } => {
            ", with different records; the topic was recreated, or several groups write to this table"
        }
        _ => "",
    };
    let (topic, partition, offset) = (&doubled.topic, doubled.partition, doubled.offset);
    format!(
        "{topic}/{partition}: offset {offset} is stored {} times{hint}",
        doubled.times
    )
}

fn of_ticks(stored: &StoredTicks, doubled: &[(usize, i64, i64)]) -> Vec<Kind> {
    let StoredTicks { series, findings, .. } = stored;
    let silences = findings.silences.iter().map(|silence| {
        let place = match silence.place.as_str() {
            "" => String::new(),
            place => format!("{place}: "),
        };
        format!(
            "{place}no host has a row between {}: {} of {}, such as {} at {}",
            between(&silence.time),
            counted(silence.ticks, "tick"),
            counted(silence.hosts, "host"),
            series[silence.example.series].address,
            timestamp(silence.example.first_tick()),
        )
    });
    let gaps = findings.gaps.iter().map(|gap| missing(series, gap));
    let twice = doubled.iter().map(|(number, at, rows)| {
        format!(
            "{} has {rows} rows for the tick {}",
            name(&series[*number]),
            timestamp(*at)
        )
    });
    let grids = findings.two_grids.iter().map(|(number, at)| {
        format!(
            "{} is checked at two different intervals at once, from {} on",
            name(&series[*number]),
            timestamp(*at)
        )
    });
    let silent: i64 = findings.silences.iter().map(|silence| silence.ticks).sum();
    let in_gaps: i64 = findings.gaps.iter().map(|gap| gap.ticks).sum();
    vec![
        Kind::new(
            "ticks without a row",
            silent + in_gaps + as_count(findings.more_gaps),
            silences.chain(gaps),
        ),
        Kind::new(
            "rows that repeat a tick",
            findings.doubled.iter().map(|doubled| doubled.rows).sum(),
            twice,
        ),
        Kind::new(
            "hosts checked on two schedules at once",
            as_count(findings.two_grids.len()),
            grids,
        ),
    ]
}

impl Kind {
    fn new(what: &'static str, count: i64, named: impl IntoIterator<Item = String>) -> Self {
        Self {
            count,
            what,
            named: named.into_iter().take(NAMED).collect(),
        }
    }
}

impl Report {
    /// Whether no violation was found.
    pub fn holds(&self) -> bool {
        self.violations.is_empty()
    }
}

/// The report for a person.
pub fn text(report: &Report) -> String {
    let mut text = String::new();
    let mut summary = Vec::new();
    match &report.stored.offsets {
        Ok(stored) => summary.push(line("offsets", of_partitions(stored, &report.found))),
        Err(reason) => summary.push(line("offsets", format!("not audited: {reason}"))),
    }
    match &report.stored.ticks {
        Ok(stored) => summary.push(line("ticks", of_series(stored))),
        Err(reason) => summary.push(line("ticks", format!("not audited: {reason}"))),
    }
    let mut lines = columns(&summary);
    lines.extend(notes(report));
    if report.holds() {
        let is_known = report.found.unknown.is_empty();
        let known = if is_known { "" } else { ", as far as is known" };
        lines.push(match (&report.stored.offsets, &report.stored.ticks) {
            (Ok(_), Ok(_)) => {
                format!("Passed{known}: every record is stored once, and every tick has one row.")
            }
            (Ok(_), _) => format!("Passed{known}: every record is stored once."),
            _ => "Passed: every tick has one row.".to_owned(),
        });
    } else {
        lines.push("FAILED:".to_owned());
    }
    for Kind { count, what, named } in &report.violations {
        lines.push(format!("{what}: {count}"));
        lines.extend(named.iter().map(|violation| format!("  {}", plain(violation))));
        if as_count(named.len()) < *count && named.len() == NAMED {
            lines.push("  ...".to_owned());
        }
    }
    for line in lines {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{line}");
    }
    text
}

fn of_partitions(stored: &StoredOffsets, found: &KafkaFindings) -> String {
    let unknown: i64 = found.unknown.values().sum();
    let mut parts = vec![
        counted(stored.partitions.len(), "partition"),
        counted(stored.rows, "row"),
        format!("{} rejected", stored.rejected),
    ];
    if found.claims > 0 {
        parts.push(counted(found.claims, "claim") + " of producers");
    }
    let other = [
        (stored.skipped, "skipped"),
        (found.expired, "removed by DB_RETENTION"),
        (found.no_record, "without a record in Kafka"),
        (unknown, "not known"),
    ];
    parts.extend(
        other
            .into_iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, what)| format!("{count} {what}")),
    );
    parts.join(", ")
}

fn of_series(stored: &StoredTicks) -> String {
    let StoredTicks { series, findings, .. } = stored;
    let mut text = format!(
        "{} of host and place, {}",
        counted(series.len(), "pair"),
        counted(findings.ticks, "tick")
    );
    if findings.off_grid > 0 {
        let checks = counted(findings.off_grid, "single check");
        let _ = write!(text, ", including {checks} after a start");
    }
    text
}

/// What limits the result.
fn notes(report: &Report) -> Vec<String> {
    let mut notes = Vec::new();
    for (why, offsets) in &report.found.unknown {
        notes.push(format!(
            "It is not known whether {} without a row had a record: {why}.",
            counted(offsets, "offset")
        ));
    }
    if let Ok(stored) = &report.stored.offsets
        && stored.without_offset > 0
    {
        notes.push(format!(
            "Rows without a Kafka offset, which are not audited by offset: {}.",
            stored.without_offset
        ));
    }
    if let Ok(StoredTicks {
        series,
        findings,
        without_grid,
    }) = &report.stored.ticks
    {
        if *without_grid > 0 {
            notes.push(format!(
                "Rows without an interval (as the original host-metrics wrote them), not audited by tick: {without_grid}."
            ));
        }
        let away = &findings.away;
        if !away.is_empty() {
            notes.push(format!(
                "Gaps of an hour or longer in which the place checked other hosts, so the host was probably not in its list \
                 (no violation): {}.",
                away.len()
            ));
            notes.extend(away.iter().take(NAMED).map(|gap| {
                format!(
                    "  {} between {}",
                    name(&series[gap.series]),
                    between(&(gap.from..gap.to))
                )
            }));
        }
        let ended = &findings.ended;
        if !ended.is_empty() {
            notes.push(format!(
                "Hosts that are behind their place by more than ten intervals and a minute (no violation): {}. Either they left the \
                 host list, or no producer checks them, or `consume` has not stored their rows yet.",
                ended.len()
            ));
            notes.extend(ended.iter().take(NAMED).map(|(number, at)| {
                let name = name(&series[*number]);
                format!("  {name}, last row at {}", timestamp(*at))
            }));
        }
    }
    notes.iter().map(|note| plain(note)).collect()
}

fn missing(series: &[Series], gap: &Gap) -> String {
    let name = name(&series[gap.series]);
    match gap.ticks {
        1 => format!("{name} has no row for the tick {}", timestamp(gap.first_tick())),
        ticks => format!(
            "{name} has no row for {ticks} ticks between {}",
            between(&(gap.from..gap.to))
        ),
    }
}

fn name(series: &Series) -> String {
    match series.place.as_str() {
        "" => series.address.clone(),
        place => format!("{} at {place}", series.address),
    }
}

fn between(time: &Range<i64>) -> String {
    format!("{} and {}", timestamp(time.start), timestamp(time.end))
}

fn line(name: &str, what: impl Display) -> Vec<String> {
    vec![name.to_owned(), what.to_string()]
}

fn as_count(length: usize) -> i64 {
    i64::try_from(length).unwrap_or(i64::MAX)
}
