//! The sink of the rows. A flush takes two round trips:
//!
//! 1. `BEGIN`, move the positions (compare-and-set over all partitions), start the COPY;
//! 2. the rows, the end of the COPY, `SET CONSTRAINTS ALL IMMEDIATE`, `COMMIT`;
//!
//! and one or two more between them if records were rejected. Rows that the table refuses are found by trials.

use std::ops::Range;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::SinkExt;
use futures_util::future::{join, join3};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, CopyInSink, Statement};

use crate::clock::instant_now;
use crate::config::ConsumeConfig;
use crate::consume::batch::{Batch, Flushed, Form, Record};
use crate::consume::positions::{Positions, not_a_rows};
use crate::consume::sink::{Sink, admit, begin};
use crate::postgres::{Fault, Kind, Session, bounded};
use crate::sample::Timestamp;
use crate::sample::epoch::Epochs;
use crate::tables::destination::{self, ExistingObjects};
use crate::tables::names::{Object, TableName, quoted};
use crate::tables::row::{HEADER, Layout, Origin, TRAILER};
use crate::tables::schema::Day;
use crate::tables::{days, migrate};

/// The bytes that are sent at once. From 64 KiB on, larger chunks are no faster.
const CHUNK_BYTES: usize = 128 * 1024;

/// The rows of one trial at most, so that a bad row does not undo the COPY of a whole large batch.
const TRIAL_ROWS: usize = 1_000;

/// The most trials in one flush. To find a bad row takes two or three, or about 20 if the error names no line. The flush then
/// returns what it has found, and the next one finds more.
const MAX_TRIALS: usize = 512;

/// The most time for the search in one flush, so that a batch of only bad rows makes steady progress and does not delay a stop.
const MAX_SEARCH: Duration = Duration::from_secs(5);

/// The most bytes of rejected records in one INSERT, unless there is only one record. The message is another copy of them.
const REJECTED_BYTES: usize = 4 << 20;

/// The rows of DB_TABLE, and the rejected records.
pub struct RowsSink {
    user: String,
    /// DB_RETENTION in whole days, rounded up.
    retention_days: Option<i64>,
    /// The fields without a column that were last logged. They are logged again only if they change.
    logged_not_stored: Option<Vec<&'static str>>,
}

impl RowsSink {
    pub fn new(config: &ConsumeConfig) -> Self {
        Self {
            user: config.database.user.clone(),
            retention_days: config.retention.map(days::retention_days),
            logged_not_stored: None,
        }
    }
}

impl Sink for RowsSink {
    const KEEPS_RECORDS: bool = true;
    type Layout = Layout;
    type Prepared = PreparedRows;

    fn encode(
        layout: &Layout,
        record: &Record<'_>,
        epochs: &mut Epochs,
        row: &mut Vec<u8>,
    ) -> Result<(), String> {
        let Some(mut sample) = admit(record.value.unwrap_or_default(), epochs)? else {
            return Ok(());
        };
        if sample.scheduled_at.is_none() {
            // The original's records have no time of their own.
            let timestamp = record.timestamp;
            sample.scheduled_at =
                Some(timestamp.ok_or("scheduled_at is missing, and the record has no timestamp of Kafka")?);
        }
        let origin = Origin {
            topic: record.partition.topic,
            partition: record.partition.number,
            offset: record.offset.0,
        };
        layout.encode_row(&sample, origin, row)
    }

    async fn prepare(&mut self, session: &Session) -> Result<(Layout, PreparedRows), Fault> {
        let client = &session.client;
        let today = days::today();
        let made = migrate::make(session, today).await?;
        for object in &made.made {
            log::info!("created {}", session.table.quoted(object.suffix()));
        }
        let layout = destination::layout(session, &made.found, &self.user)
            .await
            .map_err(|fault| made.explain(fault))?;
        let found = made.found;
        let not_stored = layout.not_stored();
        if self.logged_not_stored.as_ref() != Some(&not_stored) {
            if !not_stored.is_empty() {
                log::warn!(
                    "{} has no columns for these fields, which are not stored: {}",
                    found.table.quoted(""),
                    not_stored.join(", ")
                );
            }
            self.logged_not_stored = Some(not_stored);
        }
        days::keep_days(session, &found, today, self.retention_days).await?;
        let statements = session
            .bounded("preparing", Statements::prepare(client, &found.table, &layout))
            .await?;
        Ok((layout, PreparedRows { found, statements }))
    }

    async fn flush(
        &mut self,
        session: &Session,
        positions: &Positions,
        prepared: &PreparedRows,
        batch: &Batch,
    ) -> Result<Flushed, Fault> {
        let flush = Flush {
            session,
            positions,
            prepared,
        };
        flush.flush(batch).await
    }

    /// Creates the partitions of the days ahead, and drops those that are older than DB_RETENTION.
    async fn maintain(
        &mut self,
        session: &Session,
        prepared: &PreparedRows,
        now: Timestamp,
    ) -> Result<(), Fault> {
        days::keep_days(session, &prepared.found, Day::of(now), self.retention_days).await
    }
}

pub struct PreparedRows {
    found: ExistingObjects,
    statements: Statements,
}

/// The transaction of a flush uses the user's search path, because triggers of the user's table may need it. So its statements
/// qualify every name. (An `unnest` of several arrays is part of the grammar, and cannot be another function.)
const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL search_path TO DEFAULT";

struct Statements {
    reject: Statement,
    copy: Statement,
}

impl Statements {
    async fn prepare(
        client: &Client,
        table: &TableName,
        layout: &Layout,
    ) -> Result<Self, tokio_postgres::Error> {
        let rejected = table.quoted(Object::Rejected.suffix());
        let columns: Vec<String> = layout.column_names().iter().map(|name| quoted(name)).collect();
        Ok(Self {
            reject: client
                .prepare(&format!(
                    "INSERT INTO {rejected} \
                     (group_id, kafka_topic, kafka_partition, kafka_offset, key, value, reason) \
                     SELECT $1, s.* FROM \
                     unnest($2::pg_catalog.text[], $3::int[], $4::bigint[], $5::pg_catalog.bytea[], \
                         $6::pg_catalog.bytea[], $7::pg_catalog.text[]) s"
                ))
                .await?,
            copy: client
                .prepare(&format!(
                    "COPY {} ({}) FROM STDIN (FORMAT binary)",
                    table.quoted(""),
                    columns.join(", ")
                ))
                .await?,
        })
    }
}

/// What a flush needs.
struct Flush<'a> {
    session: &'a Session,
    positions: &'a Positions,
    prepared: &'a PreparedRows,
}

impl Flush<'_> {
    async fn flush(&self, batch: &Batch) -> Result<Flushed, Fault> {
        let rows: Vec<usize> = rows_of(batch);
        let Some(sink) = self.begin(batch, !rows.is_empty()).await? else {
            self.rollback().await?;
            return Ok(Flushed::Fenced);
        };
        let end = "SET CONSTRAINTS ALL IMMEDIATE; COMMIT";
        match self.write(batch, &rows, sink, end).await {
            Ok(()) => Ok(Flushed::Durable),
            Err(fault) if fault.kind == Kind::Refused && !rows.is_empty() => {
                self.rollback().await?;
                self.find_refused(batch, &rows, fault).await
            }
            Err(fault) => Err(fault),
        }
    }

    /// Begins a transaction, moves the positions, inserts the rejected records and starts the COPY (the inner `None`: there are
    /// no rows). The outer `None`: another consumer has moved a position; the transaction is still open.
    async fn begin(&self, batch: &Batch, has_rows: bool) -> Result<Option<Option<CopyInSink<Bytes>>>, Fault> {
        let client = &self.session.client;
        let step = self.session.bounds.step;
        let rejected = Rejected::chunks(batch);
        // No other statement can run while a COPY is open, so an INSERT comes before it and costs a round trip.
        let copies_at_once = has_rows && rejected.is_empty();
        let begin = begin(BEGIN, batch);

        // They are sent in the order in which they are polled. Under repeatable read, which may be the user's default, the
        // compare-and-set would fail with 40001 instead of finding no row.
        let (began, moved, copy) = bounded("BEGIN to COPY", step, async {
            Ok::<_, Fault>(
                join3(
                    client.batch_execute(&begin),
                    self.positions.advance(self.session, batch),
                    async {
                        match copies_at_once {
                            true => client.copy_in(&self.prepared.statements.copy).await.map(Some),
                            false => Ok(None),
                        }
                    },
                )
                .await,
            )
        })
        .await?;
        began?;
        // The first error is the cause. The statements after it only report that the transaction is aborted.
        let is_ours = moved?;
        let name = |object: Object| self.prepared.found.table.quoted(object.suffix());
        let into_main = |fault| not_a_rows(fault, &name(Object::Main), "INSERT");
        let mut sink = copy.map_err(|error| into_main(error.into()))?;
        if !is_ours {
            return Ok(None);
        }
        for chunk in &rejected {
            let bytes = u32::try_from(chunk.bytes).unwrap_or(u32::MAX);
            bounded(
                "INSERT of the rejected records",
                step + self.session.bounds.per_byte.saturating_mul(bytes),
                chunk.insert(client, &self.prepared.statements.reject, &self.positions.group_id),
            )
            .await
            .map_err(|fault| not_a_rows(fault, &name(Object::Rejected), "INSERT"))?;
        }
        if has_rows && sink.is_none() {
            let copy = bounded("COPY", step, client.copy_in(&self.prepared.statements.copy)).await;
            sink = Some(copy.map_err(into_main)?);
        }
        Ok(Some(sink))
    }

    /// Sends `rows` (entries of the batch), the end of the COPY, and the statements `then`, in one round trip.
    async fn write(
        &self,
        batch: &Batch,
        rows: &[usize],
        sink: Option<CopyInSink<Bytes>>,
        then: &str,
    ) -> Result<(), Fault> {
        let client = &self.session.client;
        let within = self.session.bounds.step
            + self
                .session
                .bounds
                .per_row
                .saturating_mul(u32::try_from(rows.len()).unwrap_or(u32::MAX));
        let Some(sink) = sink else {
            return bounded("COMMIT", within, client.batch_execute(then)).await;
        };
        let mut sink = std::pin::pin!(sink);
        let mut chunk = BytesMut::with_capacity(CHUNK_BYTES);
        chunk.extend_from_slice(&HEADER);
        for mut range in contiguous(batch, rows) {
            while !range.is_empty() {
                let room = CHUNK_BYTES.saturating_sub(chunk.len()).min(range.len());
                let part = range.start..range.start + room;
                range.start = part.end;
                chunk.extend_from_slice(batch.encoded.get(part).ok_or_else(|| {
                    Fault::operator("a row is outside the batch's bytes: this is a bug, please report it")
                })?);
                if chunk.len() >= CHUNK_BYTES {
                    bounded("COPY", within, sink.send(chunk.split().freeze())).await?;
                    chunk.reserve(CHUNK_BYTES);
                }
            }
        }
        chunk.extend_from_slice(&TRAILER);
        bounded("COPY", within, sink.send(chunk.freeze())).await?;
        let (copied, ended) = bounded("COPY to COMMIT", within, async {
            Ok::<_, Fault>(join(sink.as_mut().finish(), client.batch_execute(then)).await)
        })
        .await?;
        copied?;
        ended?;
        Ok(())
    }

    /// Finds the rows that the table refuses, in a transaction that is rolled back.
    ///
    /// The rows are copied in their order, and good ones stay, so each row is tried after those that come before it (of two rows
    /// with the same unique key, the second one is refused). A row counts as refused only if it fails alone in a COPY.
    async fn find_refused(&self, batch: &Batch, rows: &[usize], first: Fault) -> Result<Flushed, Fault> {
        let until = instant_now() + MAX_SEARCH;
        let table = &self.prepared.found.table.name;
        if self.begin(&without_entries(batch), false).await?.is_none() {
            self.rollback().await?;
            return Ok(Flushed::Fenced);
        }
        if line_in(&first, table).is_none() {
            // If a COPY without rows fails too, for example because of a statement trigger, no row is the cause.
            if let Err(fault) = self.trial(batch, &[]).await? {
                let text = format!(
                    "{} refuses every COPY: {fault}",
                    self.prepared.found.table.quoted("")
                );
                return Err(Fault {
                    kind: Kind::Operator,
                    text,
                    ..fault
                });
            }
        }
        let mut refused = Vec::new();
        let mut untried = trials(rows.len());
        for _ in 0..MAX_TRIALS {
            // From left to right, because a row may be refused because of one before it.
            let Some(range) = untried.pop() else { break };
            match self.trial(batch, &rows[range.clone()]).await? {
                Ok(()) => {}
                Err(fault) if range.len() == 1 => refused.push((rows[range.start], fault.text)),
                Err(fault) => untried.extend(parts(range, line_in(&fault, table))),
            }
            if instant_now() > until && !refused.is_empty() {
                break;
            }
        }
        self.rollback().await?;
        if refused.is_empty() {
            return Err(Fault::passing(format!(
                "{first}; this did not happen again when the rows were tried in smaller parts"
            )));
        }
        Ok(Flushed::Refused(refused))
    }

    /// One COPY in the open transaction. Its rows stay if they are good, and are undone if they are refused (the inner error).
    /// All other errors are the outer one.
    async fn trial(&self, batch: &Batch, rows: &[usize]) -> Result<Result<(), Fault>, Fault> {
        let client = &self.session.client;
        let (saved, copy) = self
            .session
            .bounded("SAVEPOINT to COPY", async {
                Ok::<_, Fault>(
                    join(
                        client.batch_execute("SAVEPOINT host_metrics"),
                        client.copy_in(&self.prepared.statements.copy),
                    )
                    .await,
                )
            })
            .await?;
        saved?;
        let end = "SET CONSTRAINTS ALL IMMEDIATE; RELEASE SAVEPOINT host_metrics";
        match self.write(batch, rows, Some(copy?), end).await {
            Ok(()) => Ok(Ok(())),
            Err(fault) if fault.kind == Kind::Refused => {
                let undo = "ROLLBACK TO SAVEPOINT host_metrics; RELEASE SAVEPOINT host_metrics";
                self.session
                    .bounded("ROLLBACK", client.batch_execute(undo))
                    .await?;
                Ok(Err(fault))
            }
            Err(fault) => Err(fault),
        }
    }

    async fn rollback(&self) -> Result<(), Fault> {
        self.session
            .bounded("ROLLBACK", self.session.client.batch_execute("ROLLBACK"))
            .await
    }
}

/// The columns of rejected records, for one INSERT.
#[derive(Default)]
struct Rejected<'a> {
    topics: Vec<&'a str>,
    partitions: Vec<i32>,
    offsets: Vec<i64>,
    keys: Vec<Option<&'a [u8]>>,
    values: Vec<Option<&'a [u8]>>,
    reasons: Vec<String>,
    bytes: usize,
}

impl<'a> Rejected<'a> {
    fn chunks(batch: &'a Batch) -> Vec<Self> {
        let mut chunks: Vec<Self> = Vec::new();
        for entry in &batch.entries {
            let Form::Rejected(reason) = &entry.form else {
                continue;
            };
            let record =
                |range: &Option<Range<usize>>| range.clone().and_then(|range| batch.record_bytes.get(range));
            let (key, value) = (record(&entry.key), record(&entry.value));
            let size = key.map_or(0, <[u8]>::len) + value.map_or(0, <[u8]>::len) + reason.len();
            if chunks
                .last()
                .is_none_or(|chunk| chunk.bytes + size > REJECTED_BYTES)
            {
                chunks.push(Self::default());
            }
            if let Some(chunk) = chunks.last_mut() {
                chunk.bytes += size;
                chunk.topics.push(entry.partition.topic);
                chunk.partitions.push(entry.partition.number);
                chunk.offsets.push(entry.offset.0);
                chunk.keys.push(key);
                chunk.values.push(value);
                // A reason may quote a NUL, which Postgres cannot store in a text.
                chunk.reasons.push(reason.replace('\0', "\\0"));
            }
        }
        chunks
    }

    async fn insert(
        &self,
        client: &Client,
        statement: &Statement,
        group_id: &str,
    ) -> Result<(), tokio_postgres::Error> {
        let params: [&(dyn ToSql + Sync); 7] = [
            &group_id,
            &self.topics,
            &self.partitions,
            &self.offsets,
            &self.keys,
            &self.values,
            &self.reasons,
        ];
        client.execute(statement, &params).await.map(|_| ())
    }
}

/// Only the batch's positions, for a transaction that tries rows.
fn without_entries(batch: &Batch) -> Batch {
    Batch {
        spans: batch.spans.clone(),
        ..Batch::default()
    }
}

fn rows_of(batch: &Batch) -> Vec<usize> {
    let is_row = |form: &Form| matches!(form, Form::Row(_));
    batch
        .entries
        .iter()
        .enumerate()
        .filter(|(_, entry)| is_row(&entry.form))
        .map(|(i, _)| i)
        .collect()
}

/// The ranges of `rows` in [`Batch::encoded`]. Adjacent ones are joined, so usually there is only one.
fn contiguous(batch: &Batch, rows: &[usize]) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for entry in rows.iter().filter_map(|&row| batch.entries.get(row)) {
        let Form::Row(range) = &entry.form else { continue };
        match ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => ranges.push(range.clone()),
        }
    }
    ranges
}

/// The first trials of that many rows, the last rows first: a stack.
fn trials(rows: usize) -> Vec<Range<usize>> {
    let starts = (0..rows).step_by(TRIAL_ROWS).rev();
    starts.map(|start| start..rows.min(start + TRIAL_ROWS)).collect()
}

/// What to try after a COPY of `range` was refused, the last rows first: the rows before the bad one, that one, and those after it
/// if the error named its `line` (from 1), otherwise the two halves. Each part has fewer rows than `range`, which has at least two.
fn parts(range: Range<usize>, line: Option<usize>) -> impl Iterator<Item = Range<usize>> {
    let bad = line.and_then(|line| range.start.checked_add(line)?.checked_sub(1));
    let [first, second] = match bad.filter(|bad| range.contains(bad)) {
        Some(bad) => [bad, bad + 1],
        None => [range.start + range.len() / 2; 2],
    };
    let parts = [second..range.end, first..second, range.start..first];
    parts.into_iter().filter(|part| !part.is_empty())
}

/// The line that a COPY's error context names: `COPY host_metrics, line 3, column latency: "…"`. There is none if the server
/// uses another language, or if an AFTER trigger failed.
fn line_in(fault: &Fault, table: &str) -> Option<usize> {
    let prefix = format!("COPY {table}, line ");
    fault.context.as_deref()?.lines().rev().find_map(|line| {
        let rest = line.strip_prefix(&prefix)?;
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        rest.get(..digits)?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consume::batch::{Entry, Offset, Partition};

    #[test]
    fn the_line_is_taken_from_the_context_of_the_copy_itself() {
        let fault = |context: &str| Fault {
            context: Some(context.into()),
            ..Fault::passing("")
        };
        for (context, line) in [
            ("COPY t, line 3", Some(3)),
            ("COPY t, line 12, column latency: \"x\"", Some(12)),
            ("PL/pgSQL function f() line 3 at RAISE\nCOPY t, line 7", Some(7)),
            ("COPY other, line 3", None),
            ("COPY t, Zeile 3", None),
            ("COPY t, line ", None),
            ("COPY t, line 99999999999999999999999", None),
            ("", None),
        ] {
            assert_eq!(line_in(&fault(context), "t"), line, "{context}");
        }
        assert_eq!(line_in(&Fault::passing("no context"), "t"), None);
    }

    #[test]
    fn neighbouring_rows_are_sent_as_one_range_and_holes_are_left_out() {
        let entry = |form| Entry {
            partition: Partition::new("t", 0),
            offset: Offset(0),
            timestamp: None,
            key: None,
            value: None,
            form,
        };
        let batch = Batch {
            entries: vec![
                entry(Form::Row(0..10)),
                entry(Form::Row(10..20)),
                entry(Form::Rejected("no".into())),
                entry(Form::Row(30..40)),
                entry(Form::Row(40..50)),
            ],
            ..Batch::default()
        };
        assert_eq!(rows_of(&batch), [0, 1, 3, 4]);
        assert_eq!(contiguous(&batch, &[0, 1, 3, 4]), [0..20, 30..50]);
        assert_eq!(contiguous(&batch, &[4]), vec![40..50]);
        assert!(contiguous(&batch, &[]).is_empty());
    }

    /// Searches `rows` rows of which `bad`, in their order, are refused, with or without the line in the error. Returns what was
    /// found and the number of trials.
    fn search(rows: usize, bad: &[usize], with_lines: bool) -> (Vec<usize>, usize) {
        let mut untried = trials(rows);
        let (mut found, mut count) = (Vec::new(), 0);
        while let Some(range) = untried.pop() {
            count += 1;
            let first = bad.get(bad.partition_point(|row| *row < range.start));
            match first.filter(|row| range.contains(row)) {
                None => {}
                Some(row) if range.len() == 1 => found.push(*row),
                Some(row) => {
                    let line = with_lines.then_some(row - range.start + 1);
                    untried.extend(parts(range, line));
                }
            }
        }
        (found, count)
    }

    #[test]
    fn one_bad_row_is_found_in_one_flush() {
        for rows in [1, 2, 3, 100, 1_000, 100_000] {
            for bad in [0, 1, rows / 2, rows - 1] {
                let bad = bad.min(rows - 1);
                for (with_lines, most) in [(true, 4), (false, 2 * 10 + 1)] {
                    let (found, trials) = search(rows, &[bad], with_lines);
                    assert_eq!(found, [bad]);
                    assert!(
                        trials < rows.div_ceil(TRIAL_ROWS) + most,
                        "{rows} {bad}: {trials}"
                    );
                    assert!(trials <= MAX_TRIALS);
                }
            }
        }
    }

    #[test]
    fn every_bad_row_is_found_in_order_and_no_good_one_is_named() {
        fastrand::seed(4);
        for _ in 0..200 {
            let rows = fastrand::usize(1..2_400);
            let share = fastrand::f64();
            let bad: Vec<usize> = (0..rows).filter(|_| fastrand::f64() < share).collect();
            for with_lines in [true, false] {
                let (found, trials) = search(rows, &bad, with_lines);
                assert_eq!(found, bad);
                assert!(
                    trials <= 3 + 3 * bad.len() * if with_lines { 1 } else { 10 },
                    "{trials}"
                );
            }
        }
    }
}
