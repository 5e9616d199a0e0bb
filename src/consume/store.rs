//! Postgres's side of a pipeline: one transaction per flush, every wait bounded, every error sorted.
//!
//! Owns the database connection and the writer's runtime; blocking from outside. What is written is the [`Sink`]'s: the rows
//! (`rows`) or the state (`state`).
//!
//! A connection on which anything but a refused row happened is dropped: a late answer could otherwise be taken for a
//! later question's. The next [`Store::open`] ends the old backend first.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;

use crate::config::{ConsumeConfig, DatabaseConfig};
use crate::consume::batch::{Batch, Flushed, NextOffset, Partition, Position};
use crate::consume::positions::{Keys, Positions};
use crate::consume::rows::Rows;
use crate::consume::sink::{Sink, Written};
use crate::postgres::{self, APPLICATION_NAME, Backend, Bounds, Fault, Kind, Session};
use crate::sample::Timestamp;
use crate::tables::names::Object;

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
pub struct Store<S: Sink = Rows> {
    database: DatabaseConfig,
    bounds: Bounds,
    keys: Keys,
    sink: S,
    /// `None` only while the store is dropped.
    runtime: Option<Runtime>,
    opened: Option<Opened<S>>,
    /// The backend of the last connection, until it is known to be gone.
    old_backend: Option<Backend>,
    /// The last flush waited in vain for a lock: see [`end_silent`].
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
        Self::of(Rows::new(config), config, bounds)
    }
}

impl<S: Sink> Store<S> {
    pub fn of(sink: S, config: &ConsumeConfig, bounds: Bounds) -> anyhow::Result<Self> {
        Ok(Self {
            database: config.database.clone(),
            keys: Keys {
                group_id: config.group_id.clone(),
                topics: config.topics.clone(),
            },
            bounds,
            sink,
            runtime: Some(postgres::runtime()?),
            opened: None,
            old_backend: None,
            was_locked_out: false,
        })
    }

    /// Connects (ending the last connection's backend if that may still be there), makes what is missing where the
    /// user may, and reads the catalogue.
    pub fn open(&mut self) -> Result<S::Layout, StoreError> {
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
    ) -> Result<BTreeMap<Partition, Position>, StoreError> {
        let result = self.on_session(async |opened, keys, _| {
            opened
                .positions
                .locate(&opened.session, keys, partitions, missing_from)
                .await
        });
        result.map_err(StoreError::from)
    }

    /// Writes the batch in one transaction.
    pub fn flush(&mut self, batch: &Batch) -> Flushed {
        let written = self.on_session(async |opened, keys, sink| {
            let Opened {
                session,
                positions,
                prepared,
            } = opened;
            sink.flush(session, keys, positions, prepared, batch).await
        });
        match written {
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

    /// The sink's upkeep. To be called rarely: once an hour is plenty.
    ///
    /// # Errors
    /// [`StoreError::Retry`]: the connection broke. Everything else is said and left for the next time.
    pub fn maintain(&mut self, now: Timestamp) -> Result<(), StoreError> {
        let result = self
            .on_session(async |opened, _, sink| sink.maintain(&opened.session, &opened.prepared, now).await);
        result.map_err(StoreError::from)
    }

    /// Drops the connection; the backend is ended by the next [`Store::open`].
    fn close(&mut self) {
        if let (Some(opened), Some(runtime)) = (self.opened.take(), &self.runtime) {
            self.old_backend = Some(opened.session.backend.clone());
            runtime.block_on(opened.session.close());
        }
    }

    /// Runs `work` on the open session, and drops that if its state is unknown afterwards.
    fn on_session<T>(
        &mut self,
        work: impl AsyncFnOnce(&Opened<S>, &Keys, &mut S) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let (Some(opened), Some(runtime)) = (&self.opened, &self.runtime) else {
            return Err(Fault::passing("not connected to Postgres"));
        };
        let result = runtime.block_on(work(opened, &self.keys, &mut self.sink));
        if result.is_err() {
            self.close();
        }
        result
    }

    async fn open_session(&mut self) -> Result<S::Layout, Fault> {
        let session = Session::open(&self.database, self.bounds).await?;
        // From here on a failure leaves this backend behind, but an idle one: dropping the session closes its socket.
        let opened = async {
            if let Some(old) = &self.old_backend {
                terminate(&session, old).await?;
            }
            let (layout, prepared) = self.sink.prepare(&session).await?;
            let positions = Positions::prepare(&session);
            let positions = session.bounded("preparing", positions).await?;
            if std::mem::take(&mut self.was_locked_out) {
                end_silent(&session).await?;
            }
            Ok((layout, prepared, positions))
        }
        .await;
        match opened {
            Ok((layout, prepared, positions)) => {
                self.old_backend = None;
                self.opened = Some(Opened {
                    session,
                    positions,
                    prepared,
                });
                Ok(layout)
            }
            Err(fault) => {
                session.close().await;
                Err(fault)
            }
        }
    }
}

impl<S: Sink> Drop for Store<S> {
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

/// Ends a backend that may still hold locks, or a COMMIT in doubt, and waits until it is gone or clearly does not go (a
/// frozen one): the fence holds all the same, `lock_timeout` bounds what remains.
async fn terminate(session: &Session, old: &Backend) -> Result<(), Fault> {
    const SQL: &str = "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity \
                       WHERE pid = $1 AND extract(epoch FROM backend_start)::text = $2";
    const PATIENCE: Duration = Duration::from_secs(2);
    const PAUSE: Duration = Duration::from_millis(20);
    let until = clock() + PATIENCE;
    while clock() < until {
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
            "ended backend {pid} of another consumer: it held a position, and its client said nothing for {} s",
            session.bounds.lock.as_secs_f64()
        );
    }
    Ok(())
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
