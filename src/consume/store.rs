//! Postgres's side of a pipeline: one transaction per flush, with a bound on every wait.
//!
//! Owns the session and the runtime of the writer's thread; all functions block. A [`Sink`] decides what is written.
//!
//! After any error except a refused row the connection is dropped, because a late answer could be taken for the answer to a
//! later request. The next [`Store::open`] first ends the old backend.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;

use crate::clock::instant_now;
use crate::config::{ConsumeConfig, DatabaseConfig};
use crate::consume::batch::{Batch, Flushed, NextOffset, Partition, Position};
use crate::consume::positions::Positions;
use crate::consume::rows::RowsSink;
use crate::consume::sink::Sink;
use crate::postgres::{self, APPLICATION_NAME, Backend, Bounds, Fault, Session};
use crate::sample::Timestamp;
use crate::tables::names::Object;

/// A connection to the database, which is replaced when it breaks or hangs.
pub struct Store<S: Sink = RowsSink> {
    database: DatabaseConfig,
    bounds: Bounds,
    group_id: String,
    sink: S,
    /// Its drop waits for a name lookup that still runs. That happens on the writer's thread, for which nobody waits long.
    runtime: Runtime,
    opened: Option<Opened<S>>,
    /// The backend of the last connection, until it is known to have ended.
    old_backend: Option<Backend>,
    /// Whether the last flush could not get a lock in time; see [`end_silent`].
    was_locked_out: bool,
}

struct Opened<S: Sink> {
    session: Session,
    positions: Positions,
    prepared: S::Prepared,
}

impl Store {
    pub fn new(config: &ConsumeConfig) -> anyhow::Result<Self> {
        Self::with_bounds(config, Bounds::default())
    }

    pub fn with_bounds(config: &ConsumeConfig, bounds: Bounds) -> anyhow::Result<Self> {
        Self::of(RowsSink::new(config), config, bounds)
    }
}

impl<S: Sink> Store<S> {
    pub fn of(sink: S, config: &ConsumeConfig, bounds: Bounds) -> anyhow::Result<Self> {
        Ok(Self {
            database: config.database.clone(),
            group_id: config.group_id.clone(),
            bounds,
            sink,
            runtime: postgres::runtime()?,
            opened: None,
            old_backend: None,
            was_locked_out: false,
        })
    }

    /// Connects, ends the backend of the last connection, creates missing tables if the user may, and reads the catalogue.
    pub fn open(&mut self) -> Result<S::Layout, Fault> {
        self.close();
        let (layout, opened) = self.runtime.block_on(async {
            let session = Session::open(&self.database, self.bounds).await?;
            let prepared = async {
                if let Some(old) = &self.old_backend {
                    terminate(&session, old).await?;
                }
                let (layout, prepared) = self.sink.prepare(&session).await?;
                let positions = Positions::prepare(&session, &self.group_id);
                let positions = session.bounded("preparing", positions).await?;
                if std::mem::take(&mut self.was_locked_out) {
                    end_silent(&session).await?;
                }
                Ok::<_, Fault>((layout, prepared, positions))
            };
            match prepared.await {
                Ok((layout, prepared, positions)) => {
                    let opened = Opened {
                        session,
                        positions,
                        prepared,
                    };
                    Ok((layout, opened))
                }
                Err(fault) => {
                    session.close().await;
                    Err(fault)
                }
            }
        })?;
        self.old_backend = None;
        self.opened = Some(opened);
        Ok(layout)
    }

    pub fn positions(
        &mut self,
        partitions: &[Partition],
        missing_from: &BTreeMap<Partition, NextOffset>,
    ) -> Result<BTreeMap<Partition, Position>, Fault> {
        self.on_session(async |opened, _| {
            opened
                .positions
                .locate(&opened.session, partitions, missing_from)
                .await
        })
    }

    /// Writes the batch in one transaction. An empty batch waits until all earlier ones are on the server's disk.
    pub fn flush(&mut self, batch: &Batch) -> Result<Flushed, Fault> {
        let flushed = self.on_session(async |opened, sink| {
            let Opened {
                session,
                positions,
                prepared,
            } = opened;
            if batch.spans.is_empty() {
                // A commit waits for everything before it in the write-ahead log, but only if it has written to it itself.
                let sql = "SELECT pg_catalog.pg_logical_emit_message(true, 'host-metrics', '')";
                session
                    .bounded("waiting for the server's disk", session.client.batch_execute(sql))
                    .await?;
                return Ok(Flushed::Durable);
            }
            sink.flush(session, positions, prepared, batch).await
        });
        if let Err(fault) = &flushed {
            self.was_locked_out = fault.code == Some(SqlState::LOCK_NOT_AVAILABLE);
        }
        flushed
    }

    /// # Errors
    /// The connection broke. All other errors are logged, and the next call tries again.
    pub fn maintain(&mut self, now: Timestamp) -> Result<(), Fault> {
        self.on_session(async |opened, sink| sink.maintain(&opened.session, &opened.prepared, now).await)
    }

    pub fn maintain_in(&self, now: Instant) -> Duration {
        self.opened
            .as_ref()
            .map_or(Duration::MAX, |_| self.sink.maintain_in(now))
    }

    /// Drops the connection. The next [`Store::open`] ends its backend.
    fn close(&mut self) {
        if let Some(opened) = self.opened.take() {
            self.old_backend = Some(opened.session.backend.clone());
            self.runtime.block_on(opened.session.close());
        }
    }

    /// Runs `work` in the open session, and drops the session if that fails.
    fn on_session<T>(
        &mut self,
        work: impl AsyncFnOnce(&Opened<S>, &mut S) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let Some(opened) = &self.opened else {
            return Err(Fault::passing("not connected to Postgres"));
        };
        let result = self.runtime.block_on(work(opened, &mut self.sink));
        if result.is_err() {
            self.close();
        }
        result
    }
}

impl<S: Sink> Drop for Store<S> {
    fn drop(&mut self) {
        self.close();
    }
}

/// Ends a backend that may still hold locks or be about to commit, and waits until it has ended, for a while. A frozen backend
/// does not end; the fence still holds then, and `lock_timeout` bounds the waits.
async fn terminate(session: &Session, old: &Backend) -> Result<(), Fault> {
    const SQL: &str = "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity \
                       WHERE pid = $1 AND extract(epoch FROM backend_start)::text = $2";
    const PATIENCE: Duration = Duration::from_secs(2);
    const PAUSE: Duration = Duration::from_millis(20);
    let until = instant_now() + PATIENCE;
    while instant_now() < until {
        let rows = session
            .bounded(
                "ending the old backend",
                session.client.query(SQL, &[&old.pid, &old.started]),
            )
            .await?;
        if rows.is_empty() {
            return Ok(());
        }
        tokio::time::sleep(PAUSE).await;
    }
    log::warn!(
        "backend {} of the old connection does not end; its locks may delay this consumer",
        old.pid
    );
    Ok(())
}

/// Ends the backends of other consumers that lock positions and have waited for their client for longer than we wait for a
/// lock.
///
/// A consumer that was frozen in the middle of a flush (a stopped process, a paused container) leaves such a backend. Its
/// partitions are ours by now, but its transaction would lock their positions until it wakes up: its kernel still answers
/// keepalives, and no timeout of the server applies to a COPY that waits for rows. A consumer that is only slow loses one
/// attempt and repeats it; the fence decides which of us writes.
async fn end_silent(session: &Session) -> Result<(), Fault> {
    const SQL: &str = "SELECT a.pid, pg_catalog.pg_terminate_backend(a.pid) FROM pg_catalog.pg_stat_activity a \
                       WHERE a.pid <> pg_catalog.pg_backend_pid() AND a.usename = session_user \
                       AND a.application_name = $2 AND a.wait_event = 'ClientRead' \
                       AND a.state_change < pg_catalog.clock_timestamp() - $3 * interval '1 second' \
                       AND EXISTS (SELECT FROM pg_catalog.pg_locks l WHERE l.pid = a.pid AND l.granted \
                       AND l.locktype = 'relation' AND l.mode = 'RowExclusiveLock' \
                       AND l.database = a.datid AND l.relation = pg_catalog.to_regclass($1))";
    let offsets = session.table.quoted(Object::Offsets.suffix());
    let params: [&(dyn ToSql + Sync); 3] = [&offsets, &APPLICATION_NAME, &session.bounds.lock.as_secs_f64()];
    let ended = session
        .bounded("ending silent backends", session.client.query(SQL, &params))
        .await?;
    for row in ended {
        let pid: i32 = row.try_get(0)?;
        log::warn!(
            "ended backend {pid} of another consumer, which locked a position while its client sent nothing for {} s",
            session.bounds.lock.as_secs_f64()
        );
    }
    Ok(())
}
