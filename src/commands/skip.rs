//! `host-metrics skip`: moves a position past a batch that no consumer can read.
//!
//! Owns the statement that moves the position and records the skipped offsets in the table of rejected records. Only the header
//! of the batch is read, so a batch that expands to too many bytes can be skipped too. A running consumer continues from the
//! new position, as if another consumer had moved it.

use std::str::FromStr;

use anyhow::{anyhow, bail};
use tokio_postgres::types::ToSql;

use crate::config::ConsumeConfig;
use crate::consume::state;
use crate::kafka::{BatchHead, batch_head};
use crate::postgres::{self, Fault, Session};
use crate::tables::names::Object;

/// The argument of `skip`: `TOPIC/PARTITION` or `TOPIC/PARTITION:OFFSET`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Argument {
    pub topic: String,
    pub partition: i32,
    /// An offset of the batch to skip. `None`: only show the batch.
    pub offset: Option<i64>,
}

impl FromStr for Argument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (topic, rest) = text.split_once('/')?;
            let (partition, offset) = match rest.split_once(':') {
                Some((partition, offset)) => (partition, Some(offset.parse().ok()?)),
                None => (rest, None),
            };
            let partition: i32 = partition.parse().ok()?;
            let is_possible =
                !topic.is_empty() && partition >= 0 && offset.is_none_or(|offset: i64| offset >= 0);
            is_possible.then(|| Self {
                topic: topic.to_owned(),
                partition,
                offset,
            })
        };
        parse().ok_or_else(|| "expected TOPIC/PARTITION:OFFSET, e.g. host-metrics/3:41200".to_owned())
    }
}

/// Moves the position past the batch that holds the offset; without an offset, only reads the header of the next batch.
/// Returns the result as text for a person.
pub fn run(config: &ConsumeConfig, argument: &Argument) -> anyhow::Result<String> {
    postgres::once(&config.database, async |session| {
        skip(session, config, argument).await
    })
}

async fn skip(session: &Session, config: &ConsumeConfig, argument: &Argument) -> anyhow::Result<String> {
    let Argument { topic, partition, .. } = argument;
    let name = format!("{topic}/{partition}");
    let Some(position) = position(session, config, argument).await? else {
        bail!(
            "group {} has no position of {name} in {}; `host-metrics consume` creates it when it first reads that partition",
            config.group_id,
            config.database.table.quoted(Object::Offsets.suffix())
        );
    };
    let offset = argument.offset.unwrap_or(position);
    // The state has its own position, which may still be before a batch that the rows are past.
    let at = offset.min(position);
    let head = batch_head(&config.kafka, topic, *partition, at).map_err(|error| anyhow!("{error}"))?;
    if argument.offset.is_none() {
        return Ok(format!(
            "The position of {name} is {position}. The batch there: {head}. To skip it: host-metrics skip {name}:{position}\n"
        ));
    }
    if offset > head.last_offset {
        bail!(
            "offset {offset} of {name} is after the batch at the position {position} ({head}), and what is between them can be \
             read. To skip that batch: host-metrics skip {name}:{position}"
        );
    }
    let from = (offset >= position).then_some(position);
    let moved = pass(session, config, argument, from, &head).await?;
    let next = head.last_offset.saturating_add(1);
    if moved.contains(&config.group_id) {
        Ok(format!(
            "The position of {name} is now {next}. Offsets {position} to {} are recorded in {} as not read\n",
            head.last_offset,
            config.database.table.quoted(Object::Rejected.suffix())
        ))
    } else if !moved.is_empty() {
        Ok(format!("The position of the state of {name} is now {next}\n"))
    } else if offset < position {
        bail!("the position of {name} is {position}, which is already past offset {offset}")
    } else {
        bail!(
            "nothing was changed, because the position of {name} has just moved on from {position}; run `skip` again"
        )
    }
}

async fn position(
    session: &Session,
    config: &ConsumeConfig,
    argument: &Argument,
) -> Result<Option<i64>, Fault> {
    let offsets = session.table.quoted(Object::Offsets.suffix());
    let sql = format!(
        "SELECT next_offset FROM {offsets} WHERE group_id = $1 AND topic = $2 AND \"partition\" = $3"
    );
    let params: [&(dyn ToSql + Sync); 3] = [&config.group_id, &argument.topic, &argument.partition];
    let rows = session.query("reading the position", &sql, &params).await?;
    Ok(rows.first().map(|row| row.try_get(0)).transpose()?)
}

/// Moves the position of the rows, if it is `from`, and that of the state, if it is within the batch, to the end of the batch. If
/// the rows have moved on meanwhile, neither moves; without `from` only the state does. The same statement records the offsets that
/// the rows skip. Returns the groups whose position was moved.
async fn pass(
    session: &Session,
    config: &ConsumeConfig,
    argument: &Argument,
    from: Option<i64>,
    head: &BatchHead,
) -> Result<Vec<String>, Fault> {
    let [offsets, rejected] =
        [Object::Offsets, Object::Rejected].map(|object| session.table.quoted(object.suffix()));
    let sql = format!(
        "WITH moved AS (UPDATE {offsets} SET next_offset = $7 WHERE topic = $3 AND \"partition\" = $4 \
             AND (group_id = $1 AND next_offset = $5 OR group_id = $2 AND next_offset >= $6 AND next_offset < $7 \
             AND ($5::bigint IS NULL OR EXISTS (SELECT FROM {offsets} o WHERE o.group_id = $1 AND o.topic = $3 \
                 AND o.\"partition\" = $4 AND o.next_offset = $5))) \
             RETURNING group_id), \
         noted AS (INSERT INTO {rejected} (group_id, kafka_topic, kafka_partition, kafka_offset, reason) \
             SELECT $1, $3, $4, $5, $8 FROM moved WHERE group_id = $1) \
         SELECT group_id FROM moved"
    );
    let reason = format!(
        "offsets {} to {} were not read, because `host-metrics skip` skipped the batch ({head})",
        from.unwrap_or_default(),
        head.last_offset
    );
    let params: [&(dyn ToSql + Sync); 8] = [
        &config.group_id,
        &state::config_of(config).group_id,
        &argument.topic,
        &argument.partition,
        &from,
        &head.first_offset,
        &head.last_offset.saturating_add(1),
        &reason,
    ];
    let moved = session.query("moving the position", &sql, &params).await?;
    Ok(moved.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_partition_with_or_without_an_offset_and_nothing_else() {
        let argument = |topic: &str, partition, offset| {
            Ok(Argument {
                topic: topic.to_owned(),
                partition,
                offset,
            })
        };
        assert_eq!("a.b-c/0:7".parse(), argument("a.b-c", 0, Some(7)));
        assert_eq!("t/12".parse(), argument("t", 12, None));
        for wrong in [
            "",
            "t",
            "t/",
            "/0:1",
            "t/0:",
            "t/-1",
            "t/0:-1",
            "t/0:1-2",
            "t/0:1:2",
            "t/0/1",
            "t:0:1",
            "t/0:99999999999999999999",
        ] {
            assert!(wrong.parse::<Argument>().is_err(), "{wrong}");
        }
    }
}
