//! The sink of the state. A flush reads the stored state of the batch's hosts, folds the batch into it and writes it back, in the
//! transaction that moves the positions.
//!
//! It takes three round trips: `BEGIN`, compare-and-set and the stored state; the hosts' new state; the buckets and `COMMIT`. All
//! consumers lock the rows in the same order, by host and place.

mod stored;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures_util::future::join3;
use stored::{Statements, read, write};
use tokio_postgres::error::SqlState;

use crate::clock::{instant_now, wall_micros};
use crate::config::{ConsumeConfig, StateConfig};
use crate::consume::batch::{Batch, Flushed, Form, Record};
use crate::consume::counters::Counters;
use crate::consume::fold::Fold;
use crate::consume::fold::observed::Observed;
use crate::consume::positions::Positions;
use crate::consume::sink::{Sink, admit, begin};
use crate::duration;
use crate::postgres::{Fault, Kind, Session, bounded};
use crate::sample::Timestamp;
use crate::sample::epoch::Epochs;
use crate::tables::buckets::WIDTHS;
use crate::tables::names::Object;
use crate::tables::state::{delete_old, rollups_of};
use crate::tables::windows::{self, WINDOWS};
use crate::tables::{days, ddl, migrate};

/// The end of the group's name.
pub const GROUP_SUFFIX: &str = "-state";

/// The most records in a flush. The more there are, the less often each bucket is written.
const BATCH_SIZE: usize = 100_000;

/// The longest wait before a flush, and so the usual delay of the state.
const BATCH_WAIT: Duration = Duration::from_secs(3);

/// How long buckets of five minutes are kept.
const NARROW_KEPT: Duration = Duration::from_secs(2 * 86_400);

/// Old buckets are removed this often, and sooner while there are more than one round removes.
const PRUNE_EVERY: Duration = Duration::from_secs(3_600);
const PRUNE_AGAIN_AFTER: Duration = Duration::from_secs(60);

/// A window is refreshed after a flush. Then it rests this many times as long as the refresh took, so that it uses at most a fiftieth
/// of the time. While nothing comes or the state catches up, windows only move on this often.
const REFRESH_REST_TIMES: u32 = 50;
const REFRESH_AT_LEAST_EVERY: Duration = Duration::from_secs(300);
const REFRESH_AFTER_FAILURE: Duration = Duration::from_secs(600);

/// The longest refresh of a window. The server ends it a little before the connection would be given up.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(50);
const REFRESH_BOUND: Duration = Duration::from_secs(60);

/// While the rows have a larger backlog than this, the state pauses before each flush this many times as long as the last flush
/// took, so that it takes at most a tenth of the server. The longest pause bounds how far the state falls behind.
const ROWS_BEHIND: u64 = 10_000;
const REST_TIMES: u32 = 10;
const REST_AT_MOST: Duration = Duration::from_secs(4);

/// The configuration of the state's pipeline.
pub fn config_of(config: &ConsumeConfig) -> ConsumeConfig {
    ConsumeConfig {
        group_id: format!("{}{GROUP_SUFFIX}", config.group_id),
        batch_size: BATCH_SIZE,
        batch_wait: BATCH_WAIT,
        ..config.clone()
    }
}

/// The state of DB_TABLE.
pub struct StateSink {
    config: StateConfig,
    /// The counters of the rows' pipeline, which has priority.
    rows: Counters,
    last_flush_took: Duration,
    /// When the state was last changed by all that Kafka had.
    changed_at: Option<Instant>,
    /// When the refresh of each window began, and until when the window rests. `None`: not refreshed yet.
    refreshed: [Option<(Instant, Instant)>; WINDOWS.len()],
    /// `None`: at once.
    prune_at: Option<Instant>,
}

impl StateSink {
    pub fn new(config: StateConfig, rows: Counters) -> Self {
        Self {
            config,
            rows,
            // As if it had been slow, so that a backlog of rows comes before the first flush too.
            last_flush_took: REST_AT_MOST / REST_TIMES,
            changed_at: None,
            refreshed: [None; WINDOWS.len()],
            prune_at: None,
        }
    }

    /// The oldest start of a bucket that is kept, in microseconds since 1970. A window of the same length begins in that bucket.
    fn oldest(&self, seconds: i32, now_micros: i64) -> i64 {
        let width = i64::from(seconds) * 1_000_000;
        let kept = match seconds {
            300 => Some(NARROW_KEPT),
            _ => self.config.rollup_retention,
        };
        kept.map_or(0, |kept| {
            now_micros.saturating_sub(duration::micros(kept) + width).max(0)
        })
    }

    /// Removes what is too old. Failures are logged.
    ///
    /// # Errors
    /// The connection is of no further use.
    async fn prune(&mut self, session: &Session) -> Result<(), Fault> {
        let pruned = self.remove_old(session).await;
        ddl::log_failure(session, pruned, "old state not removed").await
    }

    async fn remove_old(&mut self, session: &Session) -> Result<(), Fault> {
        let now = wall_micros();
        self.prune_at = Some(instant_now() + PRUNE_EVERY);
        let time = |micros: i64| format!("to_timestamp({})", micros / 1_000_000);
        for seconds in WIDTHS {
            let oldest = self.oldest(seconds, now);
            let is_old = format!("starts_at < {}", time(oldest));
            let removed = ddl::delete_where(session, &rollups_of(&session.table, seconds), &is_old).await?;
            if removed >= ddl::DELETE_MOST {
                self.prune_at = Some(instant_now() + PRUNE_AGAIN_AFTER);
            }
        }
        let delete = delete_old(&session.table, &time(self.oldest(WIDTHS[1], now)));
        let sql = format!("{}; {delete} COMMIT", ddl::begin());
        session
            .bounded("removing old state", session.client.batch_execute(&sql))
            .await
    }

    /// Brings the windows up to date that are due, without waiting for the disk, because they can be computed again. Failures are
    /// logged.
    ///
    /// # Errors
    /// The connection is of no further use, or a table is missing.
    async fn refresh(&mut self, session: &Session) -> Result<(), Fault> {
        for window in 0..WINDOWS.len() {
            let began_at = instant_now();
            if self.refresh_at(window) > Some(began_at) {
                continue;
            }
            let sql = format!(
                "BEGIN; SET LOCAL jit = off; SET LOCAL synchronous_commit = off; SET LOCAL lock_timeout = 0; \
                 SET LOCAL statement_timeout = '{}ms'; {} COMMIT",
                REFRESH_TIMEOUT.as_millis(),
                windows::refresh(&session.table, window)
            );
            let refresh = session.client.batch_execute(&sql);
            let refreshed = bounded("refreshing the windows", REFRESH_BOUND, refresh).await;
            let ended_at = instant_now();
            let rest = match &refreshed {
                Ok(()) => REFRESH_REST_TIMES * ended_at.saturating_duration_since(began_at),
                Err(_) => REFRESH_AFTER_FAILURE,
            };
            self.refreshed[window] = Some((began_at, ended_at + rest));
            if let Err(fault) = &refreshed
                && fault.code == Some(SqlState::UNDEFINED_TABLE)
            {
                return refreshed;
            }
            ddl::log_failure(session, refreshed, "windows of the state not refreshed").await?;
        }
        Ok(())
    }

    /// When the window is refreshed next; `None`: at once.
    fn refresh_at(&self, window: usize) -> Option<Instant> {
        let (began_at, rests_until) = self.refreshed[window]?;
        let is_changed = self.changed_at > Some(began_at);
        let moves_at = if is_changed {
            began_at
        } else {
            began_at + REFRESH_AT_LEAST_EVERY
        };
        Some(rests_until.max(moves_at))
    }

    async fn make_way(&self) {
        let behind: u64 = self.rows.lags().values().sum();
        if behind > ROWS_BEHIND {
            tokio::time::sleep((REST_TIMES * self.last_flush_took).min(REST_AT_MOST)).await;
        }
    }
}

impl Sink for StateSink {
    const KEEPS_RECORDS: bool = false;
    type Layout = ();
    type Prepared = Statements;

    fn encode((): &(), record: &Record<'_>, epochs: &mut Epochs, into: &mut Vec<u8>) -> Result<(), String> {
        // The batch cannot tell, because it does not get the bytes.
        if let Some(reason) = record.too_long() {
            return Err(reason);
        }
        let Some(sample) = admit(record.value.unwrap_or_default(), epochs)? else {
            return Ok(());
        };
        let observed = Observed::of(&sample, record.timestamp).ok_or("it has no time")?;
        observed.encode(into);
        Ok(())
    }

    async fn prepare(&mut self, session: &Session) -> Result<((), Statements), Fault> {
        let made = migrate::make(session, days::today()).await?;
        let found = &made.found;
        let unfit = Object::STATE
            .into_iter()
            .find(|object| !found.is_current(*object));
        if let Some(object) = unfit {
            let name = session.table.quoted(object.suffix());
            return Err(made.explain(Fault::operator(match found.has(object) {
                true => format!(
                    "{name} was not created by this version of host-metrics; rename it, and run `host-metrics init`"
                ),
                false => format!("{name} does not exist: run `host-metrics init`"),
            })));
        }
        let statements = Statements::prepare(&session.client, &session.table);
        let statements = session.bounded("preparing", statements).await;
        let tables = Object::STATE
            .map(|object| session.table.quoted(object.suffix()))
            .join(", ");
        let grant = format!(
            "GRANT SELECT, INSERT, UPDATE, DELETE ON {tables}, and USAGE on their schema, to this user"
        );
        let statements = statements.map_err(|fault| fault.with_grant(&grant))?;
        self.prune(session).await?;
        Ok(((), statements))
    }

    async fn flush(
        &mut self,
        session: &Session,
        positions: &Positions,
        prepared: &Statements,
        batch: &Batch,
    ) -> Result<Flushed, Fault> {
        self.make_way().await;
        let began_at = instant_now();
        let mut fold = folded(batch);
        let mut rollups = fold.take_rollups();
        let now = wall_micros();
        let oldest = BTreeMap::from(WIDTHS.map(|seconds| (seconds, self.oldest(seconds, now))));
        rollups.retain(|(key, _)| oldest[&key.seconds] <= key.starts_at);
        let client = &session.client;
        let records = u32::try_from(batch.len()).unwrap_or(u32::MAX);
        let within = session.bounds.step + session.bounds.per_row.saturating_mul(records).saturating_mul(4);
        let begin = begin(BEGIN, batch);
        // They are sent in the order in which they are polled.
        let (began, moved, stored) = bounded("BEGIN to the stored state", within, async {
            Ok::<_, Fault>(
                join3(
                    client.batch_execute(&begin),
                    positions.advance(session, batch),
                    read(client, prepared, &fold, &mut rollups),
                )
                .await,
            )
        })
        .await?;
        began?;
        if !moved? {
            session
                .bounded("ROLLBACK", client.batch_execute("ROLLBACK"))
                .await?;
            return Ok(Flushed::Fenced);
        }
        let stored = stored?;
        let mut changed = stored.clone();
        fold.apply(self.config.down_when, &mut changed);
        let write = write(client, prepared, &stored, &changed, &rollups);
        bounded("writing the state", within, write)
            .await
            .map_err(|fault| match fault.kind {
                // Two consumers added the same new host at once, or a user has added a constraint.
                Kind::Refused => Fault {
                    kind: Kind::Passing,
                    ..fault
                },
                _ => fault,
            })?;
        let ended_at = instant_now();
        self.last_flush_took = ended_at.saturating_duration_since(began_at);
        // A full batch has more behind it.
        if batch.len() < BATCH_SIZE {
            self.changed_at = Some(ended_at);
        }
        Ok(Flushed::Durable)
    }

    fn maintain_in(&self, now: Instant) -> Duration {
        let refreshes = (0..WINDOWS.len()).map(|window| self.refresh_at(window));
        let due_at = refreshes.fold(self.prune_at, Option::min);
        due_at.map_or(Duration::ZERO, |at| at.saturating_duration_since(now))
    }

    async fn maintain(&mut self, session: &Session, _: &Statements, _: Timestamp) -> Result<(), Fault> {
        if self.prune_at <= Some(instant_now()) {
            self.prune(session).await?;
        }
        self.refresh(session).await
    }
}

/// Few rows of many are read, so indexes are used even if the statistics of a new table suggest otherwise.
const BEGIN: &str =
    "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL enable_seqscan = off; SET LOCAL jit = off";

fn folded(batch: &Batch) -> Fold<'_> {
    let mut fold = Fold::default();
    for entry in &batch.entries {
        if let Form::Row(range) = &entry.form {
            let bytes = batch.encoded.get(range.clone()).unwrap_or_default();
            fold.record(Observed::decode(bytes).expect("the batch holds what `encode` wrote"));
        }
    }
    fold
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_is_refreshed_after_a_change_and_every_five_minutes_but_rests_first() {
        let mut sink = StateSink::new(StateConfig::default(), Counters::default());
        let began = instant_now();
        let after = |seconds| began + Duration::from_secs(seconds);
        assert_eq!(sink.refresh_at(0), None);
        // It took a second. Nothing has changed since.
        sink.refreshed[0] = Some((began, after(51)));
        assert_eq!(sink.refresh_at(0), Some(after(300)));
        sink.changed_at = Some(after(2));
        assert_eq!(sink.refresh_at(0), Some(after(51)));
        // It failed.
        sink.refreshed[0] = Some((began, after(600)));
        assert_eq!(sink.refresh_at(0), Some(after(600)));

        // The first of all that is due.
        sink.refreshed = [Some((began, after(60))); WINDOWS.len()];
        sink.refreshed[3] = Some((began, after(51)));
        sink.prune_at = Some(after(3_600));
        assert_eq!(sink.maintain_in(began), Duration::from_secs(51));
        sink.prune_at = None;
        assert_eq!(sink.maintain_in(began), Duration::ZERO);
    }
}
