//! Postgres's side of the consumer: one transaction per flush, every wait bounded, every error sorted.
//!
//! Owns the database connection and the writer's runtime. Blocking from outside. What a flush does in two round trips:
//!
//! 1. `BEGIN`, move the positions (compare-and-set over all partitions), start the COPY;
//! 2. the rows, the end of the COPY, `SET CONSTRAINTS ALL IMMEDIATE`, `COMMIT`;
//!
//! and between them one or two more if records were rejected.
//!
//! A connection on which anything but a refused row happened is dropped: a late answer could otherwise be taken for a
//! later question's. The next [`Store::open`] ends the old backend first.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::SinkExt;
use futures_util::future::{join, join3};
use tokio::runtime::Runtime;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, CopyInSink, Statement};

use crate::config::{ConsumeConfig, DatabaseConfig};
use crate::consume::batch::{Batch, Form, NextOffset, Partition};
use crate::postgres::{self, APPLICATION_NAME, Backend, Bounds, Fault, Kind, Link, bounded};
use crate::sample::Timestamp;
use crate::tables::destination::{self, Found};
use crate::tables::names::{Object, TableName};
use crate::tables::row::{HEADER, Layout, TRAILER};
use crate::tables::schema::Day;
use crate::tables::{days, migrate};

/// What is handed to the socket at once: above 64 KiB the cost of a chunk no longer shows.
const CHUNK_BYTES: usize = 128 * 1024;

/// Trial COPYs in one call of [`Store::flush`] at most: finding one bad row takes about two, or as many as halving the
/// batch needs (17 for 100,000 rows) where the error names no line. What is found by then is reported, and the next
/// flush finds more.
const MAX_TRIALS: usize = 256;

/// How long the search for bad rows goes on within one call, so that a batch of nothing but bad rows makes progress at a
/// steady pace and a stop is not kept waiting.
const MAX_SEARCH: Duration = Duration::from_secs(5);

/// After a bad row the search goes on with this many rows at once and doubles that with every good COPY: the next bad
/// row may be the next one as well as far away.
const SEARCH_ROWS: usize = 16;

/// Keys and values of rejected records in one INSERT at most, unless there is only one: its message is a further copy.
const REJECTED_BYTES: usize = 4 << 20;

/// How a try to flush ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Flushed {
    /// Rows, rejected records and positions are committed.
    Durable,
    /// A position was not where the batch says it is: somebody else moved it. Nothing was written.
    Fenced,
    /// These entries (by index) are refused by the table itself, with the reason; nothing was written.
    Poison(Vec<(usize, String)>),
    /// A passing fault; nothing was written, unless the answer to COMMIT was lost: read the positions.
    Retry(String),
    /// The operator has to act: what and how.
    Fatal(String),
}

/// Why the store could not answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Passing: wait and try again.
    #[error("{0}")]
    Retry(String),
    /// The operator has to act: what and how.
    #[error("{0}")]
    Fatal(String),
}

/// One connection to the database, made anew when it breaks or hangs.
pub struct Store {
    database: DatabaseConfig,
    keys: Keys,
    /// DB_RETENTION in whole days, rounded up.
    retention_days: Option<i64>,
    /// `None` only while the store is dropped.
    runtime: Option<Runtime>,
    session: Option<Session>,
    /// The backend of the last connection, until it is known to be gone.
    old_backend: Option<Backend>,
    /// The last flush waited in vain for a lock: see [`end_silent`].
    was_locked_out: bool,
    /// What was last said about fields without a column: said again only if it changes.
    said_not_stored: Option<Vec<&'static str>>,
}

impl Store {
    pub fn new(config: &ConsumeConfig) -> anyhow::Result<Self> {
        Self::with_bounds(config, Bounds::default())
    }

    pub fn with_bounds(config: &ConsumeConfig, bounds: Bounds) -> anyhow::Result<Self> {
        const DAY_SECONDS: u64 = 86_400;
        Ok(Self {
            database: config.database.clone(),
            keys: Keys {
                group_id: config.group_id.clone(),
                topics: config.topics.clone(),
                bounds,
            },
            retention_days: config.retention.map(|retention| {
                i64::try_from(retention.as_secs().div_ceil(DAY_SECONDS)).unwrap_or(i64::MAX)
            }),
            runtime: Some(postgres::runtime()?),
            session: None,
            old_backend: None,
            was_locked_out: false,
            said_not_stored: None,
        })
    }

    /// Connects (ending the last connection's backend if that may still be there), makes what is missing where the
    /// user may, and reads the catalogue.
    pub fn open(&mut self) -> Result<Layout, StoreError> {
        self.close();
        let runtime = self.runtime.take().ok_or_else(dropped)?;
        let result = runtime.block_on(self.open_session());
        self.runtime = Some(runtime);
        result.map_err(StoreError::from)
    }

    /// The positions of `partitions`; a partition without one in the table is given the one in `missing_from`, if there,
    /// first.
    pub fn positions(
        &mut self,
        partitions: &[Partition],
        missing_from: &BTreeMap<Partition, NextOffset>,
    ) -> Result<BTreeMap<Partition, NextOffset>, StoreError> {
        let result =
            self.on_session(async |session, keys| session.positions(keys, partitions, missing_from).await);
        result.map_err(StoreError::from)
    }

    /// Writes the batch in one transaction.
    pub fn flush(&mut self, batch: &Batch) -> Flushed {
        match self.on_session(async |session, keys| session.flush(keys, batch).await) {
            Ok(Written::Durable) => Flushed::Durable,
            Ok(Written::Fenced) => Flushed::Fenced,
            Ok(Written::Poison(entries)) => Flushed::Poison(entries),
            Err(fault) => {
                self.was_locked_out = fault.code == Some(SqlState::LOCK_NOT_AVAILABLE);
                match StoreError::from(fault) {
                    StoreError::Retry(text) => Flushed::Retry(text),
                    StoreError::Fatal(text) => Flushed::Fatal(text),
                }
            }
        }
    }

    /// Makes the partitions of the days ahead and drops those that are older than DB_RETENTION, where the table is ours
    /// and the user may; otherwise says what is missing. To be called rarely: once an hour is plenty.
    ///
    /// # Errors
    /// [`StoreError::Retry`]: the connection broke. Everything else is said and left for the next time.
    pub fn maintain(&mut self, now: Timestamp) -> Result<(), StoreError> {
        let retention = self.retention_days;
        let result = self.on_session(async |session, keys| {
            days::keep_days(
                &session.link.client,
                &keys.bounds,
                &session.found,
                Day::of(now),
                retention,
            )
            .await
        });
        result.map_err(StoreError::from)
    }

    /// Drops the connection; the backend is ended by the next [`Store::open`].
    fn close(&mut self) {
        if let (Some(session), Some(runtime)) = (self.session.take(), &self.runtime) {
            self.old_backend = Some(session.link.backend.clone());
            runtime.block_on(session.link.close());
        }
    }

    /// Runs `work` on the open session, and drops that if its state is unknown afterwards.
    fn on_session<T>(
        &mut self,
        work: impl AsyncFnOnce(&mut Session, &Keys) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let (Some(session), Some(runtime)) = (&mut self.session, &self.runtime) else {
            return Err(Fault::passing("not connected to Postgres"));
        };
        let result = runtime.block_on(work(session, &self.keys));
        if result.is_err() {
            self.close();
        }
        result
    }

    async fn open_session(&mut self) -> Result<Layout, Fault> {
        let bounds = self.keys.bounds;
        let link = Link::open(&self.database, &bounds).await?;
        // From here on a failure leaves this backend behind, but an idle one: dropping the link closes its socket.
        let opened = async {
            if let Some(old) = &self.old_backend {
                terminate(&link.client, &bounds, old).await?;
            }
            let prepared = self.prepare(&link).await?;
            if std::mem::take(&mut self.was_locked_out) {
                end_silent(&link.client, &bounds, &prepared.0.table).await?;
            }
            Ok(prepared)
        }
        .await;
        match opened {
            Ok((found, layout, statements)) => {
                self.old_backend = None;
                self.session = Some(Session {
                    link,
                    found,
                    statements,
                });
                Ok(layout)
            }
            Err(fault) => {
                link.close().await;
                Err(fault)
            }
        }
    }

    async fn prepare(&mut self, link: &Link) -> Result<(Found, Layout, Statements), Fault> {
        let bounds = self.keys.bounds;
        let (client, config) = (&link.client, &self.database);
        let today = days::today();
        let made = migrate::make(link, &bounds, today).await;
        // Many may write and not create: only where something is really missed is that a fault, with both reasons.
        let not_made = match made {
            Ok(made) => {
                for object in made {
                    log::info!("made {}", link.table.quoted(object.suffix()));
                }
                None
            }
            Err(fault) if fault.kind == Kind::Operator => Some(fault),
            Err(fault) => return Err(fault),
        };
        let found = destination::find(link, &bounds).await?;
        let destination = destination::destination(client, &bounds, &found, &config.user)
            .await
            .map_err(|fault| match &not_made {
                Some(why) if fault.kind == Kind::Operator => Fault {
                    text: format!("{fault} (this user could not make what is missing: {why})"),
                    ..fault
                },
                _ => fault,
            })?;
        let layout = destination.layout;
        let not_stored = layout.not_stored();
        if self.said_not_stored.as_ref() != Some(&not_stored) {
            if !not_stored.is_empty() {
                log::warn!(
                    "not stored, for {} has no such column: {}",
                    found.table.quoted(""),
                    not_stored.join(", ")
                );
            }
            self.said_not_stored = Some(not_stored);
        }
        days::keep_days(client, &bounds, &found, today, self.retention_days).await?;
        let statements = bounded(
            "preparing",
            bounds.step,
            Statements::prepare(client, &found.table, &layout),
        )
        .await?;
        Ok((found, layout, statements))
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.close();
        // A name look-up may still be under way on a thread of the runtime: not waited for.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl From<Fault> for StoreError {
    fn from(fault: Fault) -> Self {
        match fault.kind {
            Kind::Passing => Self::Retry(fault.text),
            // A refusal that is no row's has a trigger or a constraint of the operator's own behind it.
            Kind::Operator | Kind::Refused => Self::Fatal(fault.text),
        }
    }
}

/// What identifies this consumer's positions, and its patience.
struct Keys {
    group_id: String,
    topics: Vec<String>,
    bounds: Bounds,
}

impl Keys {
    fn topic(&self, partition: Partition) -> Result<&str, Fault> {
        let topic = self.topics.get(usize::from(partition.topic));
        topic.map(String::as_str).ok_or_else(|| {
            Fault::operator(format!(
                "no topic has the number {}: a bug, please report it",
                partition.topic
            ))
        })
    }
}

enum Written {
    Durable,
    Fenced,
    Poison(Vec<(usize, String)>),
}

struct Session {
    link: Link,
    found: Found,
    statements: Statements,
}

/// The transaction of a flush has the user's own search path, because a trigger of the user's table may need it. So every
/// name in the statements of a flush is qualified (an `unnest` of several arrays is Postgres's own, by its grammar).
const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL search_path TO DEFAULT";

struct Statements {
    /// Group, topics, partitions, bases, nexts: moves the positions that are where they should be.
    move_positions: Statement,
    read_positions: Statement,
    add_positions: Statement,
    reject: Statement,
    copy: Statement,
}

impl Statements {
    async fn prepare(
        client: &Client,
        table: &TableName,
        layout: &Layout,
    ) -> Result<Self, tokio_postgres::Error> {
        let offsets = table.quoted(Object::Offsets.suffix());
        let rejected = table.quoted(Object::Rejected.suffix());
        let columns: Vec<String> = layout
            .column_names()
            .iter()
            .map(|name| format!("\"{}\"", name.replace('"', "\"\"")))
            .collect();
        Ok(Self {
            move_positions: client
                .prepare(&format!(
                    "UPDATE {offsets} o SET next_offset = s.next \
                     FROM unnest($2::pg_catalog.text[], $3::int[], $4::bigint[], $5::bigint[]) \
                         s (topic, number, base, next) \
                     WHERE o.group_id OPERATOR(pg_catalog.=) $1 AND o.topic OPERATOR(pg_catalog.=) s.topic \
                     AND o.\"partition\" OPERATOR(pg_catalog.=) s.number \
                     AND o.next_offset OPERATOR(pg_catalog.=) s.base"
                ))
                .await?,
            read_positions: client
                .prepare(&format!(
                    "SELECT o.topic, o.\"partition\", o.next_offset FROM {offsets} o \
                     JOIN unnest($2::text[], $3::int[]) s (topic, number) \
                     ON o.topic = s.topic AND o.\"partition\" = s.number WHERE o.group_id = $1"
                ))
                .await?,
            add_positions: client
                .prepare(&format!(
                    "INSERT INTO {offsets} (group_id, topic, \"partition\", next_offset) \
                     SELECT $1, s.* FROM unnest($2::text[], $3::int[], $4::bigint[]) s \
                     ON CONFLICT (group_id, topic, \"partition\") DO NOTHING"
                ))
                .await?,
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

impl Session {
    async fn positions(
        &mut self,
        keys: &Keys,
        partitions: &[Partition],
        missing_from: &BTreeMap<Partition, NextOffset>,
    ) -> Result<BTreeMap<Partition, NextOffset>, Fault> {
        let mut found = self.read_positions(keys, partitions).await?;
        let missing: Vec<(Partition, NextOffset)> = missing_from
            .iter()
            .filter(|(partition, _)| partitions.contains(partition) && !found.contains_key(partition))
            .map(|(&partition, &next)| (partition, next))
            .collect();
        if !missing.is_empty() {
            let client = &self.link.client;
            let topics = missing
                .iter()
                .map(|(p, _)| keys.topic(*p))
                .collect::<Result<Vec<_>, _>>()?;
            let numbers: Vec<i32> = missing.iter().map(|(p, _)| p.number).collect();
            let nexts: Vec<i64> = missing.iter().map(|(_, next)| next.0).collect();
            let add = &self.statements.add_positions;
            bounded(
                "adding positions",
                keys.bounds.step,
                client.execute(add, &[&keys.group_id, &topics, &numbers, &nexts]),
            )
            .await?;
            // Where somebody else was quicker, his position counts.
            found = self.read_positions(keys, partitions).await?;
        }
        Ok(found)
    }

    async fn read_positions(
        &self,
        keys: &Keys,
        partitions: &[Partition],
    ) -> Result<BTreeMap<Partition, NextOffset>, Fault> {
        let topics = partitions
            .iter()
            .map(|p| keys.topic(*p))
            .collect::<Result<Vec<_>, _>>()?;
        let numbers: Vec<i32> = partitions.iter().map(|p| p.number).collect();
        let by_name: BTreeMap<(&str, i32), Partition> = topics
            .iter()
            .zip(partitions)
            .map(|(&topic, &p)| ((topic, p.number), p))
            .collect();
        let client = &self.link.client;
        let read = &self.statements.read_positions;
        bounded("reading positions", keys.bounds.step, async {
            let mut found = BTreeMap::new();
            for row in client.query(read, &[&keys.group_id, &topics, &numbers]).await? {
                let (topic, number): (&str, i32) = (row.try_get(0)?, row.try_get(1)?);
                if let Some(&partition) = by_name.get(&(topic, number)) {
                    found.insert(partition, NextOffset(row.try_get(2)?));
                }
            }
            Ok::<_, tokio_postgres::Error>(found)
        })
        .await
    }

    async fn flush(&mut self, keys: &Keys, batch: &Batch) -> Result<Written, Fault> {
        let rows: Vec<usize> = rows_of(batch);
        let Some(sink) = self.begin(keys, batch, !rows.is_empty()).await? else {
            self.rollback(keys).await?;
            return Ok(Written::Fenced);
        };
        let end = "SET CONSTRAINTS ALL IMMEDIATE; COMMIT";
        match self.write(keys, batch, &rows, sink, end).await {
            Ok(()) => Ok(Written::Durable),
            Err(fault) if fault.kind == Kind::Refused && !rows.is_empty() => {
                self.rollback(keys).await?;
                self.find_refused(keys, batch, &rows, fault).await
            }
            Err(fault) => Err(fault),
        }
    }

    /// Begins a transaction, moves the positions, inserts the rejected and starts the COPY (the inner `None`: there are
    /// no rows). The outer `None`: the positions are not where the batch says; the transaction is still open.
    async fn begin(
        &self,
        keys: &Keys,
        batch: &Batch,
        has_rows: bool,
    ) -> Result<Option<Option<CopyInSink<Bytes>>>, Fault> {
        let client = &self.link.client;
        let step = keys.bounds.step;
        let spans = batch.spans.iter();
        let topics = spans
            .clone()
            .map(|(p, _)| keys.topic(*p))
            .collect::<Result<Vec<_>, _>>()?;
        let numbers: Vec<i32> = spans.clone().map(|(p, _)| p.number).collect();
        let bases: Vec<i64> = spans.clone().map(|(_, span)| span.base.0).collect();
        let nexts: Vec<i64> = spans.map(|(_, span)| span.next.0).collect();
        let position_params: [&(dyn ToSql + Sync); 5] = [&keys.group_id, &topics, &numbers, &bases, &nexts];
        let rejected = Rejected::chunks(keys, batch)?;
        // While a COPY is open nothing else may be asked: what is inserted goes before it, at the price of a round trip.
        let copies_at_once = has_rows && rejected.is_empty();

        // Polled in this order, so sent in this order. Read committed whatever the user's default: under repeatable read
        // the compare-and-set would fail with 40001 where it should say "fenced".
        let (began, moved, copy) = bounded("BEGIN to COPY", step, async {
            Ok::<_, Fault>(
                join3(
                    client.batch_execute(BEGIN),
                    client.execute(&self.statements.move_positions, &position_params),
                    async {
                        match copies_at_once {
                            true => client.copy_in(&self.statements.copy).await.map(Some),
                            false => Ok(None),
                        }
                    },
                )
                .await,
            )
        })
        .await?;
        began?;
        // A statement after a failed one only says that the transaction is aborted: the first error is the cause.
        let moved = moved
            .map_err(|error| self.not_a_rows(error.into(), Object::Offsets, "SELECT, INSERT, UPDATE"))?;
        let into_main = |fault| self.not_a_rows(fault, Object::Main, "INSERT");
        let mut sink = copy.map_err(|error| into_main(error.into()))?;
        if usize::try_from(moved) != Ok(batch.spans.len()) {
            return Ok(None);
        }
        for chunk in &rejected {
            let bytes = u32::try_from(chunk.bytes).unwrap_or(u32::MAX);
            bounded(
                "INSERT of the rejected",
                step + keys.bounds.per_byte.saturating_mul(bytes),
                chunk.insert(client, &self.statements.reject, keys),
            )
            .await
            .map_err(|fault| self.not_a_rows(fault, Object::Rejected, "INSERT"))?;
        }
        if has_rows && sink.is_none() {
            let copy = bounded("COPY", step, client.copy_in(&self.statements.copy)).await;
            sink = Some(copy.map_err(into_main)?);
        }
        Ok(Some(sink))
    }

    /// Names the object of a fault that is no row's, for no row was sent yet.
    fn not_a_rows(&self, fault: Fault, object: Object, grant: &str) -> Fault {
        let name = self.found.table.quoted(object.suffix());
        let fault = fault.with_grant(&format!("GRANT {grant} ON {name} to this user"));
        let text = format!("{name}: {}", fault.text);
        let kind = if fault.kind == Kind::Refused {
            Kind::Operator
        } else {
            fault.kind
        };
        Fault { kind, text, ..fault }
    }

    /// Sends `rows` (entries of the batch) and the end of the COPY, and `then`, in one round trip.
    async fn write(
        &self,
        keys: &Keys,
        batch: &Batch,
        rows: &[usize],
        sink: Option<CopyInSink<Bytes>>,
        then: &str,
    ) -> Result<(), Fault> {
        let client = &self.link.client;
        let within = keys.bounds.step
            + keys
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
                chunk.extend_from_slice(batch.copy_bytes.get(part).ok_or_else(|| {
                    Fault::operator("a row lies outside of the batch's bytes: a bug, please report it")
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
    /// The rows are copied in their order, good ones stay, so that each is judged in the company in which it would stand
    /// (two rows with the same unique key: the second one is refused). A row is given up only when it fails alone in its
    /// COPY, after it was already part of one that failed.
    async fn find_refused(
        &mut self,
        keys: &Keys,
        batch: &Batch,
        rows: &[usize],
        first: Fault,
    ) -> Result<Written, Fault> {
        let until = clock() + MAX_SEARCH;
        let table = &self.found.table.name;
        if self.begin(keys, &without_entries(batch), false).await?.is_none() {
            self.rollback(keys).await?;
            return Ok(Written::Fenced);
        }
        let mut refused = Vec::new();
        let mut search = Search::new(rows.len(), line_in(&first, table));
        if line_in(&first, table).is_none() {
            // A statement trigger that refuses whatever comes is not a row's fault: no row, same answer.
            if let Err(fault) = self.trial(keys, batch, &[]).await? {
                let text = format!("{} refuses every COPY: {fault}", self.found.table.quoted(""));
                return Err(Fault {
                    kind: Kind::Operator,
                    text,
                    ..fault
                });
            }
        }
        for _ in 0..MAX_TRIALS {
            let Some(range) = search.next() else { break };
            let tried = rows.get(range.clone()).unwrap_or_default();
            match self.trial(keys, batch, tried).await? {
                Ok(()) => search.good(),
                Err(fault) => {
                    if let Some(row) = search.bad(line_in(&fault, table)) {
                        refused.extend(rows.get(row).map(|&entry| (entry, fault.text)));
                    }
                }
            }
            if clock() > until && !refused.is_empty() {
                break;
            }
        }
        self.rollback(keys).await?;
        if refused.is_empty() {
            return Err(Fault::passing(format!(
                "{first}; it did not happen again with the rows one by one"
            )));
        }
        Ok(Written::Poison(refused))
    }

    /// One COPY within the open transaction: its rows stay if they are good, and are undone if they are refused (the
    /// inner error). Every other fault is the outer error.
    async fn trial(&self, keys: &Keys, batch: &Batch, rows: &[usize]) -> Result<Result<(), Fault>, Fault> {
        let client = &self.link.client;
        let (saved, copy) = bounded("SAVEPOINT to COPY", keys.bounds.step, async {
            Ok::<_, Fault>(
                join(
                    client.batch_execute("SAVEPOINT host_metrics"),
                    client.copy_in(&self.statements.copy),
                )
                .await,
            )
        })
        .await?;
        saved?;
        let end = "SET CONSTRAINTS ALL IMMEDIATE; RELEASE SAVEPOINT host_metrics";
        match self.write(keys, batch, rows, Some(copy?), end).await {
            Ok(()) => Ok(Ok(())),
            Err(fault) if fault.kind == Kind::Refused => {
                let undo = "ROLLBACK TO SAVEPOINT host_metrics; RELEASE SAVEPOINT host_metrics";
                bounded("ROLLBACK", keys.bounds.step, client.batch_execute(undo)).await?;
                Ok(Err(fault))
            }
            Err(fault) => Err(fault),
        }
    }

    async fn rollback(&self, keys: &Keys) -> Result<(), Fault> {
        bounded(
            "ROLLBACK",
            keys.bounds.step,
            self.link.client.batch_execute("ROLLBACK"),
        )
        .await
    }
}

/// Which rows to try next: pure, so that its bounds can be tested.
#[derive(Debug)]
struct Search {
    rows: usize,
    /// Rows before this one are judged.
    at: usize,
    /// The rows under trial: `at..end`.
    end: usize,
    /// Rows up to here are known to hold a bad one.
    suspect: Option<usize>,
    /// What to try after the next success, if no suspect says.
    width: usize,
}

impl Search {
    /// All of `rows` failed, at `line` (from 1) if the error said so.
    fn new(rows: usize, line: Option<usize>) -> Self {
        let mut search = Self {
            rows,
            at: 0,
            end: rows,
            suspect: None,
            width: SEARCH_ROWS,
        };
        search.narrow(line);
        search
    }

    /// The rows of the next trial; `None` when all are judged.
    fn next(&self) -> Option<Range<usize>> {
        (self.at < self.rows).then_some(self.at..self.end)
    }

    fn good(&mut self) {
        self.at = self.end;
        match self.suspect {
            Some(suspect) if suspect > self.at => self.end = self.middle(suspect),
            _ => {
                self.suspect = None;
                self.end = self.at.saturating_add(self.width).min(self.rows);
                self.width = self.width.saturating_mul(2);
            }
        }
    }

    /// The trial failed, at `line` (from 1) if the error said so. Returns the row if there was only one.
    fn bad(&mut self, line: Option<usize>) -> Option<usize> {
        if self.end - self.at > 1 {
            self.narrow(line);
            return None;
        }
        let row = self.at;
        self.at += 1;
        self.suspect = None;
        self.end = self.at.saturating_add(SEARCH_ROWS).min(self.rows);
        self.width = SEARCH_ROWS * 2;
        Some(row)
    }

    /// `at..end` failed: first the rows before the bad line, or half of them.
    fn narrow(&mut self, line: Option<usize>) {
        let bad = line.and_then(|line| self.at.checked_add(line)?.checked_sub(1));
        match bad.filter(|bad| (self.at..self.end).contains(bad)) {
            Some(bad) => {
                self.suspect = Some(bad + 1);
                self.end = if bad > self.at { bad } else { bad + 1 };
            }
            None => {
                self.suspect = Some(self.end);
                self.end = self.middle(self.end);
            }
        }
    }

    fn middle(&self, end: usize) -> usize {
        self.at + ((end - self.at) / 2).max(1)
    }
}

/// Columns of the rejected table, for one INSERT.
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
    fn chunks(keys: &'a Keys, batch: &'a Batch) -> Result<Vec<Self>, Fault> {
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
                chunk.topics.push(keys.topic(entry.partition)?);
                chunk.partitions.push(entry.partition.number);
                chunk.offsets.push(entry.offset.0);
                chunk.keys.push(key);
                chunk.values.push(value);
                // Postgres text holds no NUL, and a reason may quote one.
                chunk.reasons.push(reason.replace('\0', "\\0"));
            }
        }
        Ok(chunks)
    }

    async fn insert(
        &self,
        client: &Client,
        statement: &Statement,
        keys: &Keys,
    ) -> Result<(), tokio_postgres::Error> {
        let params: [&(dyn ToSql + Sync); 7] = [
            &keys.group_id,
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

/// Ends a backend that may still hold locks, or a COMMIT in doubt, and waits until it is gone or clearly does not go (a
/// frozen one): the fence holds all the same, `lock_timeout` bounds what remains.
async fn terminate(client: &Client, bounds: &Bounds, old: &Backend) -> Result<(), Fault> {
    const SQL: &str = "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity \
                       WHERE pid = $1 AND extract(epoch FROM backend_start)::text = $2";
    const PATIENCE: Duration = Duration::from_secs(2);
    const PAUSE: Duration = Duration::from_millis(20);
    let until = clock() + PATIENCE;
    while clock() < until {
        let rows = bounded(
            "ending the old backend",
            bounds.step,
            client.query(SQL, &[&old.pid, &old.started]),
        )
        .await?;
        if rows.is_empty() {
            return Ok(());
        }
        tokio::time::sleep(PAUSE).await;
    }
    log::warn!(
        "the old connection's backend {} does not end; its locks may still hold us up",
        old.pid
    );
    Ok(())
}

/// Ends the backends of other consumers that hold positions and have waited for a word of their client for longer than we
/// wait for a lock.
///
/// Whoever was frozen in the middle of a flush (a stopped process, a paused container) leaves such a backend. Its partitions
/// are ours by now, but its transaction would keep us out for as long as it sleeps: its kernel still answers keepalives, and
/// no timeout of the server covers a COPY that waits for rows. If it is only slow, it loses one try: its rows were in doubt
/// anyhow, and the fence decides.
async fn end_silent(client: &Client, bounds: &Bounds, table: &TableName) -> Result<(), Fault> {
    const SQL: &str = "SELECT a.pid, pg_catalog.pg_terminate_backend(a.pid) FROM pg_catalog.pg_stat_activity a \
                       WHERE a.pid <> pg_catalog.pg_backend_pid() AND a.usename = session_user \
                       AND a.application_name = $2 AND a.wait_event = 'ClientRead' \
                       AND a.state_change < pg_catalog.clock_timestamp() - $3 * interval '1 second' \
                       AND EXISTS (SELECT FROM pg_catalog.pg_locks l WHERE l.pid = a.pid AND l.granted \
                       AND l.locktype = 'relation' AND l.mode = 'RowExclusiveLock' \
                       AND l.database = a.datid AND l.relation = pg_catalog.to_regclass($1))";
    let offsets = table.quoted(Object::Offsets.suffix());
    let params: [&(dyn ToSql + Sync); 3] = [&offsets, &APPLICATION_NAME, &bounds.lock.as_secs_f64()];
    let ended = bounded("ending silent backends", bounds.step, client.query(SQL, &params)).await?;
    for row in ended {
        let pid: i32 = row.try_get(0)?;
        log::warn!(
            "ended backend {pid} of another consumer: it held a position, and its client said nothing for {} s",
            bounds.lock.as_secs_f64()
        );
    }
    Ok(())
}

/// The batch's positions alone: for a transaction that only tries rows.
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

/// The bytes of `rows`, neighbours joined: usually one range, more where entries were removed or rejected.
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

/// The line that a COPY's error context names: `COPY host_metrics, line 3, column latency: "…"`. A hint only: where the
/// server speaks another language, or an AFTER trigger failed, there is none.
fn line_in(fault: &Fault, table: &str) -> Option<usize> {
    let prefix = format!("COPY {table}, line ");
    fault.context.as_deref()?.lines().rev().find_map(|line| {
        let rest = line.strip_prefix(&prefix)?;
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        rest.get(..digits)?.parse().ok()
    })
}

fn dropped() -> StoreError {
    StoreError::Retry("the store is being dropped".into())
}

#[expect(
    clippy::disallowed_methods,
    reason = "the edge: bounds on work with the server"
)]
fn clock() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consume::batch::{Entry, Offset};

    /// Searches `rows` rows of which `bad` are refused, with or without the line in the error. Returns what was found
    /// and the number of trials.
    fn search(rows: usize, bad: &[usize], with_lines: bool) -> (Vec<usize>, usize) {
        let first_bad = |range: Range<usize>| bad.iter().copied().find(|row| range.contains(row));
        let line = |range: Range<usize>| {
            let row = first_bad(range.clone()).filter(|_| with_lines);
            row.map(|row| row - range.start + 1)
        };
        let mut search = Search::new(rows, line(0..rows));
        let (mut found, mut trials) = (Vec::new(), 0);
        while let Some(range) = search.next() {
            trials += 1;
            assert!(!range.is_empty() && range.end <= rows, "{range:?}");
            if first_bad(range.clone()).is_none() {
                search.good();
            } else {
                found.extend(search.bad(line(range)));
            }
        }
        (found, trials)
    }

    #[test]
    fn one_bad_row_costs_a_bounded_number_of_trials() {
        for rows in [1, 2, 3, 100, 1_000, 100_000] {
            for bad in [0, 1, rows / 2, rows - 1] {
                let bad = bad.min(rows - 1);
                let (found, trials) = search(rows, &[bad], true);
                assert_eq!(found, [bad]);
                // The rows before it, itself, and the rest in growing steps.
                assert!(
                    trials <= 2 + rows.div_ceil(SEARCH_ROWS).ilog2() as usize + 1,
                    "{rows} {bad}: {trials}"
                );
                let (found, trials) = search(rows, &[bad], false);
                assert_eq!(found, [bad]);
                assert!(trials <= 2 * rows.ilog2() as usize + 3, "{rows} {bad}: {trials}");
            }
        }
    }

    #[test]
    fn every_bad_row_is_found_and_no_good_one_is_named() {
        fastrand::seed(4);
        for _ in 0..2_000 {
            let rows = fastrand::usize(1..400);
            let share = fastrand::f64();
            let bad: Vec<usize> = (0..rows).filter(|_| fastrand::f64() < share).collect();
            for with_lines in [true, false] {
                assert_eq!(search(rows, &bad, with_lines).0, bad);
            }
        }
    }

    #[test]
    fn a_batch_of_nothing_but_bad_rows_makes_steady_progress() {
        let bad: Vec<usize> = (0..1_000).collect();
        let (found, trials) = search(1_000, &bad, true);
        assert_eq!(found.len(), 1_000);
        assert!(trials <= 2 * 1_000, "{trials}");
    }

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
            partition: Partition { topic: 0, number: 0 },
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
}
