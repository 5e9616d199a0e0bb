//! The group's positions in the offsets table. The transaction that writes a batch also moves them.
//!
//! All sinks use this compare-and-set, which makes every record count exactly once.

use std::collections::BTreeMap;

use tokio_postgres::Statement;

use crate::consume::batch::{Batch, NextOffset, Partition, Position};
use crate::postgres::{Fault, Session};
use crate::sample::epoch::Epochs;
use crate::tables::names::Object;

/// The statements about the positions of a group.
pub struct Positions {
    pub(super) group_id: String,
    offsets: String,
    /// Moves the positions that are at the bases of a batch.
    advance: Statement,
    read: Statement,
    add: Statement,
}

impl Positions {
    pub async fn prepare(session: &Session, group_id: &str) -> Result<Self, tokio_postgres::Error> {
        let client = &session.client;
        let offsets = session.table.quoted(Object::Offsets.suffix());
        Ok(Self {
            group_id: group_id.to_owned(),
            advance: client
                .prepare(&format!(
                    "UPDATE {offsets} o SET next_offset = s.next, epochs = coalesce(s.epochs::pg_catalog.jsonb, o.epochs) \
                     FROM unnest($2::pg_catalog.text[], $3::int[], $4::bigint[], $5::bigint[], $6::pg_catalog.text[]) \
                         s (topic, number, base, next, epochs) \
                     WHERE o.group_id OPERATOR(pg_catalog.=) $1 AND o.topic OPERATOR(pg_catalog.=) s.topic \
                     AND o.\"partition\" OPERATOR(pg_catalog.=) s.number \
                     AND o.next_offset OPERATOR(pg_catalog.=) s.base"
                ))
                .await?,
            read: client
                .prepare(&format!(
                    "SELECT o.topic, o.\"partition\", o.next_offset, o.epochs::text FROM {offsets} o \
                     JOIN unnest($2::text[], $3::int[]) s (topic, number) \
                     ON o.topic = s.topic AND o.\"partition\" = s.number WHERE o.group_id = $1"
                ))
                .await?,
            add: client
                .prepare(&format!(
                    "INSERT INTO {offsets} (group_id, topic, \"partition\", next_offset, first_offset) \
                     SELECT $1, s.*, s.next FROM unnest($2::text[], $3::int[], $4::bigint[]) s (topic, number, next) \
                     ON CONFLICT (group_id, topic, \"partition\") DO NOTHING"
                ))
                .await?,
            offsets,
        })
    }

    /// The positions of `partitions`. First adds those of `missing_from` that the table lacks.
    pub async fn locate(
        &self,
        session: &Session,
        partitions: &[Partition],
        missing_from: &BTreeMap<Partition, NextOffset>,
    ) -> Result<BTreeMap<Partition, Position>, Fault> {
        let mut found = self.read(session, partitions).await?;
        let missing: Vec<(Partition, NextOffset)> = missing_from
            .iter()
            .filter(|(partition, _)| partitions.contains(partition) && !found.contains_key(partition))
            .map(|(&partition, &next)| (partition, next))
            .collect();
        if !missing.is_empty() {
            let topics: Vec<&str> = missing.iter().map(|(p, _)| p.topic).collect();
            let numbers: Vec<i32> = missing.iter().map(|(p, _)| p.number).collect();
            let nexts: Vec<i64> = missing.iter().map(|(_, next)| next.0).collect();
            session
                .bounded(
                    "adding positions",
                    session
                        .client
                        .execute(&self.add, &[&self.group_id, &topics, &numbers, &nexts]),
                )
                .await?;
            // Another consumer may have added one first; then that one counts.
            found = self.read(session, partitions).await?;
        }
        Ok(found)
    }

    async fn read(
        &self,
        session: &Session,
        partitions: &[Partition],
    ) -> Result<BTreeMap<Partition, Position>, Fault> {
        let topics: Vec<&str> = partitions.iter().map(|p| p.topic).collect();
        let numbers: Vec<i32> = partitions.iter().map(|p| p.number).collect();
        session
            .bounded("reading positions", async {
                let mut found = BTreeMap::new();
                for row in session
                    .client
                    .query(&self.read, &[&self.group_id, &topics, &numbers])
                    .await?
                {
                    let (topic, number): (&str, i32) = (row.try_get(0)?, row.try_get(1)?);
                    let is_this = |p: &&Partition| p.topic == topic && p.number == number;
                    if let Some(&partition) = partitions.iter().find(is_this) {
                        let epochs = serde_json::from_str(row.try_get(3)?);
                        let position = Position {
                            next: NextOffset(row.try_get(2)?),
                            epochs: epochs.map_err(|error| not_epochs(partition, &error))?,
                        };
                        found.insert(partition, position);
                    }
                }
                Ok::<_, Fault>(found)
            })
            .await
    }

    /// Moves the positions of the batch's partitions. False if another consumer has moved one of them; the transaction then has to
    /// be rolled back.
    pub async fn advance(&self, session: &Session, batch: &Batch) -> Result<bool, Fault> {
        let spans = batch.spans.iter();
        let topics: Vec<&str> = spans.clone().map(|(p, _)| p.topic).collect();
        let numbers: Vec<i32> = spans.clone().map(|(p, _)| p.number).collect();
        let bases: Vec<i64> = spans.clone().map(|(_, span)| span.base.0).collect();
        let nexts: Vec<i64> = spans.clone().map(|(_, span)| span.next.0).collect();
        let epochs: Vec<Option<String>> = spans.map(|(p, _)| batch.epochs.get(p).map(json)).collect();
        let moved = session
            .client
            .execute(
                &self.advance,
                &[&self.group_id, &topics, &numbers, &bases, &nexts, &epochs],
            )
            .await
            .map_err(|error| not_a_rows(error.into(), &self.offsets, "SELECT, INSERT, UPDATE"))?;
        Ok(usize::try_from(moved) == Ok(batch.spans.len()))
    }
}

fn json(epochs: &Epochs) -> String {
    serde_json::to_string(epochs).expect("names and numbers are JSON")
}

fn not_epochs(partition: Partition, error: &serde_json::Error) -> Fault {
    Fault::operator(format!(
        "the epochs of {partition} in the offsets table are not an object of numbers: {error}"
    ))
}

/// Adds the table's quoted name to an error that no record can have caused, because none was sent yet.
pub(super) fn not_a_rows(fault: Fault, name: &str, grant: &str) -> Fault {
    fault
        .with_grant(&format!("GRANT {grant} ON {name} to this user"))
        .at(name)
}
