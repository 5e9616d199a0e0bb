//! The queries of `audit`. They return what the tables hold in the form that `offsets` and `ticks` need.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::time::Duration;

use futures_util::TryStreamExt;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use crate::commands::audit::offsets::{BLOCK, Block, Offsets, Position};
use crate::commands::audit::ticks::{self, Doubled, Findings, Series, Ticks};
use crate::postgres::{Fault, Session, bounded};
use crate::tables::destination;
use crate::tables::names::Object;

/// One query. Ten million rows take seconds; a table may have a thousand times as many.
const ANSWERS_WITHIN: Duration = Duration::from_secs(3_600);

/// The memory for the groups of the largest queries. Beyond it, Postgres uses the disk.
const MEMORY: &str = "64MB";

/// What the tables hold.
#[derive(Debug)]
pub(super) struct Stored {
    /// `Err`: why this is unknown.
    pub offsets: Result<StoredOffsets, String>,
    pub ticks: Result<StoredTicks, String>,
}

#[derive(Debug, Default)]
pub(super) struct StoredOffsets {
    pub partitions: BTreeMap<(String, i32), Offsets>,
    /// Rows of partitions of which the group has no position.
    pub without_position: BTreeMap<(String, i32), i64>,
    /// Rows that do not say which record they come from.
    pub without_offset: i64,
    pub rows: i64,
    pub rejected: i64,
    /// Offsets that `skip` has passed over.
    pub skipped: i64,
}

#[derive(Debug, Default)]
pub(super) struct StoredTicks {
    pub series: Vec<Series>,
    pub findings: Findings,
    /// Rows without a time or an interval.
    pub without_grid: i64,
}

/// An offset that is stored more than once.
#[derive(Debug)]
pub(super) struct DoubledOffset {
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
    pub times: i64,
    /// The rows are of different ticks, so the records are different ones.
    pub differ: bool,
    pub is_rejected: bool,
}

/// The connection, with a snapshot of the tables.
pub(super) struct Tables<'a> {
    session: &'a Session,
    main: String,
    rejected: String,
    offsets: String,
    group_id: String,
    columns: BTreeSet<String>,
}

impl<'a> Tables<'a> {
    /// Begins a transaction that sees rows and positions of one moment.
    pub(super) async fn open(session: &'a Session, group_id: &str) -> Result<Self, Fault> {
        let main = session.table.quoted("");
        let columns = destination::column_names(session, &main).await?;
        if columns.is_empty() {
            return Err(Fault::operator(format!(
                "table {main} does not exist: run `host-metrics init`, or check DB_TABLE"
            )));
        }
        let begin = format!(
            "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY; SET LOCAL work_mem = '{MEMORY}'; SET LOCAL jit = off"
        );
        session.batch("BEGIN", &begin).await?;
        Ok(Self {
            rejected: session.table.quoted(Object::Rejected.suffix()),
            offsets: session.table.quoted(Object::Offsets.suffix()),
            session,
            main,
            group_id: group_id.to_owned(),
            columns,
        })
    }

    /// Reads everything. These are the largest queries of the command.
    pub(super) async fn read(&self) -> Result<Stored, Fault> {
        let lacking = |names: &[&str]| {
            let missing: Vec<&str> = names
                .iter()
                .copied()
                .filter(|name| !self.columns.contains(*name))
                .collect();
            (!missing.is_empty()).then(|| format!("{} has no column {}", self.main, missing.join(", ")))
        };
        let offsets = match lacking(&["kafka_topic", "kafka_partition", "kafka_offset"]) {
            Some(reason) => Err(reason),
            None => Ok(self.read_offsets().await?),
        };
        let ticks = match lacking(&["address", "scheduled_at", "interval_seconds"]) {
            Some(reason) => Err(reason),
            None => Ok(self.read_ticks().await?),
        };
        Ok(Stored { offsets, ticks })
    }

    async fn positions(&self) -> Result<BTreeMap<(String, i32), Position>, Fault> {
        let sql = format!(
            "SELECT group_id, topic, \"partition\", first_offset, next_offset FROM {}",
            self.offsets
        );
        let mut positions = BTreeMap::new();
        let mut others = BTreeSet::new();
        let read = self.each("reading the positions", &sql, &[], |row| {
            let group_id: String = row.try_get(0)?;
            if group_id != self.group_id {
                others.insert(group_id);
                return Ok(());
            }
            let position = Position {
                first: row.try_get(3)?,
                next: row.try_get(4)?,
            };
            positions.insert((row.try_get(1)?, row.try_get(2)?), position);
            Ok(())
        });
        read.await
            .map_err(|fault| self.with_grant(fault, &self.offsets))?;
        if positions.is_empty() {
            let others: Vec<String> = others.into_iter().collect();
            let hint = match others.is_empty() {
                true => "`consume` has not stored anything yet".to_owned(),
                false => format!("it has those of {}; set KAFKA_GROUP_ID", others.join(", ")),
            };
            return Err(Fault::operator(format!(
                "{} has no position of group {}: {hint}",
                self.offsets, self.group_id
            )));
        }
        Ok(positions)
    }

    async fn read_offsets(&self) -> Result<StoredOffsets, Fault> {
        let mut stored = StoredOffsets {
            partitions: self
                .positions()
                .await?
                .into_iter()
                .map(|(partition, position)| (partition, Offsets::new(position)))
                .collect(),
            ..StoredOffsets::default()
        };
        let sql = self.offsets_sql();
        let group: [&(dyn ToSql + Sync); 1] = [&self.group_id];
        let read = self.each("reading the offsets", &sql, &group, |row| {
            let (rows, rejected): (i64, i64) = (row.try_get(4)?, row.try_get(5)?);
            stored.rows += rows;
            stored.rejected += rejected;
            let place: (Option<String>, Option<i32>, Option<i64>) =
                (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
            let (Some(topic), Some(partition), Some(number)) = place else {
                stored.without_offset += rows + rejected;
                return Ok(());
            };
            let partition = (topic, partition);
            let bits: i64 = row.try_get(3)?;
            match stored.partitions.get_mut(&partition) {
                Some(offsets) => offsets.take(Block {
                    number,
                    stored: bits.cast_unsigned(),
                    entries: rows + rejected,
                }),
                None => *stored.without_position.entry(partition).or_default() += rows,
            }
            Ok(())
        });
        let rejected = &self.rejected;
        read.await.map_err(|fault| self.with_grant(fault, rejected))?;
        for offsets in stored.partitions.values_mut() {
            offsets.finish();
        }
        stored.without_position.retain(|_, rows| *rows > 0);
        self.read_skipped(&mut stored).await?;
        Ok(stored)
    }

    /// A block of offsets is one row of the result, which keeps it small. If it has as many rows as set bits, no offset is there
    /// twice.
    fn offsets_sql(&self) -> String {
        let blocks = |table: &str, condition: &str, rows: &str, rejected: &str| {
            format!(
                "SELECT kafka_topic::text COLLATE \"C\" AS topic, kafka_partition::int AS number, \
                     kafka_offset::bigint / {BLOCK} AS block, \
                     bit_or(1::bigint << (kafka_offset::bigint % {BLOCK})::int) AS bits, {rows} AS rows, {rejected} AS rejected \
                 FROM {table} WHERE {condition} GROUP BY 1, 2, 3"
            )
        };
        format!(
            "SELECT topic, number, block, bit_or(bits), sum(rows)::bigint, sum(rejected)::bigint FROM ({} UNION ALL {}) b \
             GROUP BY 1, 2, 3 ORDER BY 1, 2, 3",
            blocks(&self.main, "true", "count(*)", "0"),
            blocks(&self.rejected, "group_id = $1", "0", "count(*)"),
        )
    }

    /// Takes the offsets that `skip` has recorded out of the missing ones.
    async fn read_skipped(&self, stored: &mut StoredOffsets) -> Result<(), Fault> {
        let rejected = &self.rejected;
        let group: [&(dyn ToSql + Sync); 1] = [&self.group_id];
        let sql = format!(
            "SELECT kafka_topic, kafka_partition, substring(reason, '^offsets (\\d{{1,18}}) to ')::bigint, \
                 substring(reason, '^offsets \\d{{1,18}} to (\\d{{1,18}}) were not read')::bigint \
             FROM {rejected} WHERE group_id = $1 AND reason ~ '^offsets \\d{{1,18}} to \\d{{1,18}} were not read'"
        );
        self.each("reading what was skipped", &sql, &group, |row| {
            let partition = (row.try_get(0)?, row.try_get(1)?);
            let (first, last): (i64, i64) = (row.try_get(2)?, row.try_get(3)?);
            if let Some(offsets) = stored.partitions.get_mut(&partition) {
                let before = offsets.missing_count;
                offsets.explain(first..last + 1);
                stored.skipped += before - offsets.missing_count;
            }
            Ok(())
        })
        .await
    }

    async fn read_ticks(&self) -> Result<StoredTicks, Fault> {
        let sql = format!(
            "SELECT address, place, period, at % period, at / period / {BLOCK}, \
                 bit_or(1::bigint << (at / period % {BLOCK})::int), count(*) \
             FROM (SELECT address::text COLLATE \"C\" AS address, {} COLLATE \"C\" AS place, \
                     round(date_part('epoch', scheduled_at) * 1e6)::bigint AS at, \
                     round(interval_seconds * 1e6)::bigint AS period \
                 FROM {} WHERE {HAS_GRID}) ticks \
             GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2",
            self.place(),
            self.main
        );
        let mut ticks = Ticks::default();
        let mut rows = 0;
        self.each("reading the ticks", &sql, &[], |row| {
            let bits: i64 = row.try_get(5)?;
            let block = ticks::Block {
                interval: row.try_get(2)?,
                phase: row.try_get(3)?,
                number: row.try_get(4)?,
                ticks: bits.cast_unsigned(),
                rows: row.try_get(6)?,
            };
            rows += block.rows;
            ticks.take(row.try_get(0)?, row.try_get(1)?, block);
            Ok(())
        })
        .await?;
        let mut all = 0_i64;
        let count = format!("SELECT count(*) FROM {}", self.main);
        self.each("counting the rows", &count, &[], |row| {
            all = row.try_get(0)?;
            Ok(())
        })
        .await?;
        let (series, findings) = ticks.finish();
        Ok(StoredTicks {
            series,
            findings,
            without_grid: all - rows,
        })
    }

    /// The times of the first doubled ticks, with the number of rows: at most one for each of `doubled`.
    pub(super) async fn doubled_ticks(
        &self,
        series: &[Series],
        doubled: &[Doubled],
    ) -> Result<Vec<(usize, i64, i64)>, Fault> {
        let sql = format!(
            "SELECT at, count(*) FROM (SELECT round(date_part('epoch', scheduled_at) * 1e6)::bigint AS at FROM {} \
             WHERE address = $1 AND {} = $2 AND {HAS_GRID} \
                 AND scheduled_at >= 'epoch'::timestamptz + $3 * interval '1 microsecond' \
                 AND scheduled_at <= 'epoch'::timestamptz + $4 * interval '1 microsecond') ticks \
             GROUP BY 1 HAVING count(*) > 1 ORDER BY 1 LIMIT 1",
            self.main,
            self.place()
        );
        let mut found = Vec::new();
        for Doubled {
            series: number,
            within: (first, last),
            ..
        } in doubled
        {
            let Series { address, place } = &series[*number];
            // Exact up to the year 2255, as floating-point numbers.
            let (first, last) = (*first as f64, *last as f64);
            self.each(
                "reading doubled ticks",
                &sql,
                &[address, place, &first, &last],
                |row| {
                    found.push((*number, row.try_get(0)?, row.try_get(1)?));
                    Ok(())
                },
            )
            .await?;
        }
        Ok(found)
    }

    /// The first doubled offsets of these blocks, each of a partition.
    pub(super) async fn doubled_offsets(
        &self,
        blocks: &[(String, i32, i64)],
        limit: i64,
    ) -> Result<Vec<DoubledOffset>, Fault> {
        let tick = ["address", "scheduled_at"]
            .into_iter()
            .filter(|name| self.columns.contains(*name))
            .map(|name| format!("{name}::text"))
            .chain(["''".to_owned()])
            .collect::<Vec<_>>()
            .join(", ");
        let sql = format!(
            "WITH wanted AS (SELECT * FROM unnest($1::text[], $2::int[], $3::bigint[]) w (topic, number, block)) \
             SELECT topic, number, place, count(*), count(DISTINCT tick) > 1, bool_or(is_rejected) FROM ( \
                 SELECT topic, number, kafka_offset::bigint AS place, concat_ws(' ', {tick}) AS tick, false AS is_rejected \
                 FROM {} JOIN wanted ON kafka_topic::text = topic AND kafka_partition = number \
                     AND kafka_offset::bigint / {BLOCK} = block \
                 UNION ALL \
                 SELECT topic, number, kafka_offset, NULL, true \
                 FROM {} JOIN wanted ON kafka_topic = topic AND kafka_partition = number \
                     AND kafka_offset / {BLOCK} = block AND group_id = $4) stored \
             GROUP BY 1, 2, 3 HAVING count(*) > 1 ORDER BY 1, 2, 3 LIMIT $5",
            self.main, self.rejected
        );
        let topics: Vec<&str> = blocks.iter().map(|(topic, ..)| topic.as_str()).collect();
        let partitions: Vec<i32> = blocks.iter().map(|(_, partition, _)| *partition).collect();
        let numbers: Vec<i64> = blocks.iter().map(|(.., number)| *number).collect();
        let mut found = Vec::new();
        let params: [&(dyn ToSql + Sync); 5] = [&topics, &partitions, &numbers, &self.group_id, &limit];
        self.each("reading doubled offsets", &sql, &params, |row| {
            found.push(DoubledOffset {
                topic: row.try_get(0)?,
                partition: row.try_get(1)?,
                offset: row.try_get(2)?,
                times: row.try_get(3)?,
                differ: row.try_get(4)?,
                is_rejected: row.try_get(5)?,
            });
            Ok(())
        })
        .await?;
        Ok(found)
    }

    /// The place of a row: its agent, or an empty text.
    fn place(&self) -> &'static str {
        match self.columns.contains("agent") {
            true => "coalesce(agent, '')::text",
            false => "''::text",
        }
    }

    fn with_grant(&self, fault: Fault, table: &str) -> Fault {
        fault.with_grant(&format!("GRANT SELECT ON {table} to this user"))
    }

    /// Runs the query and hands on each row of its result.
    async fn each(
        &self,
        what: &str,
        sql: &str,
        params: &[&(dyn ToSql + Sync)],
        mut take: impl FnMut(&Row) -> Result<(), tokio_postgres::Error>,
    ) -> Result<(), Fault> {
        bounded(what, ANSWERS_WITHIN, async {
            let rows = self.session.client.query_raw(sql, params.iter().copied()).await?;
            let mut rows = pin!(rows);
            while let Some(row) = rows.try_next().await? {
                take(&row)?;
            }
            Ok::<_, tokio_postgres::Error>(())
        })
        .await
    }
}

/// A row that belongs to a grid. The records of the original host-metrics have no interval.
const HAS_GRID: &str = "scheduled_at >= '1970-01-01 00:00:00+00' AND scheduled_at < '10000-01-01 00:00:00+00' \
                        AND interval_seconds >= 0.001 AND interval_seconds <= 1e9";
