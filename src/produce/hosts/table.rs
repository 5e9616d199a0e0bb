//! The table of hosts: read with a session of its own, on the thread that watches it.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::Path;
use std::pin::pin;

use futures_util::TryStreamExt;
use tokio::runtime::Runtime;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;

use crate::config::HostsConfig;
use crate::postgres::{self, Bounds, Fault, Session};
use crate::produce::hosts::rows::{HostRow, WrongRow, messages};
use crate::tables::hosts::VERSION_SUFFIX;
use crate::tables::names::Object;

/// As much as a host file may have.
const MAX_BYTES: usize = 64 << 20;

pub(super) struct Table {
    config: HostsConfig,
    runtime: Runtime,
    session: Option<Session>,
    /// Until the server has refused it.
    may_write: bool,
    /// The wrong rows that are logged already.
    logged: HashSet<WrongRow>,
}

impl Table {
    pub(super) fn new(config: &HostsConfig) -> io::Result<Self> {
        Ok(Self {
            config: config.clone(),
            runtime: postgres::runtime()?,
            session: None,
            may_write: true,
            logged: HashSet::new(),
        })
    }

    /// The table's name in messages.
    pub(super) fn name(&self) -> String {
        name(&self.config)
    }

    /// `None`: the table has no version, because it was not made by `init`.
    pub(super) fn version(&mut self) -> Result<Option<i64>, Fault> {
        self.ask(async |session| {
            let sql = format!(
                "SELECT version FROM {}",
                session
                    .table
                    .quoted(&format!("{}{VERSION_SUFFIX}", Object::Hosts.suffix()))
            );
            let read = session
                .bounded(
                    "reading the version of the hosts",
                    session.client.query_opt(&sql, &[]),
                )
                .await;
            match read {
                Ok(row) => Ok(row.map(|row| row.try_get(0)).transpose()?),
                Err(Fault {
                    code:
                        Some(
                            SqlState::UNDEFINED_TABLE
                            | SqlState::INSUFFICIENT_PRIVILEGE
                            | SqlState::UNDEFINED_COLUMN,
                        ),
                    ..
                }) => Ok(None),
                Err(fault) => Err(fault),
            }
        })
    }

    pub(super) fn rows(&mut self) -> Result<Vec<HostRow>, Fault> {
        self.ask(async |session| {
            let table = session.table.quoted(Object::Hosts.suffix());
            let sql = format!(
                "SELECT address::text, frequency::text, options::text, regex::text FROM {table} \
                 WHERE enabled IS NOT FALSE ORDER BY address"
            );
            session
                .bounded("reading the hosts", read(session, &sql))
                .await
                .map_err(|fault| fault.with_grant(&format!("GRANT SELECT ON {table} to this user")))
        })
    }

    /// Logs the rows that are wrong and were not, or not in the same way.
    pub(super) fn log(&mut self, wrong: &[WrongRow]) {
        let new = wrong.iter().filter(|wrong| !self.logged.contains(wrong));
        for message in messages(&self.name(), new) {
            log::error!("{message}");
        }
        self.logged = wrong.iter().cloned().collect();
    }

    /// Writes the column `error` of the wrong rows and empties it in all others, if this user may.
    pub(super) fn write_errors(&mut self, wrong: &[WrongRow]) {
        if !self.may_write {
            return;
        }
        let addresses: Vec<&str> = wrong.iter().map(|wrong| wrong.address.as_str()).collect();
        let errors: Vec<&str> = wrong.iter().map(|wrong| wrong.error.as_str()).collect();
        let written = self.ask(async |session| {
            let sql = format!(
                "UPDATE {0} h SET error = n.error FROM {0} o LEFT JOIN unnest($1::text[], $2::text[]) n (address, error) \
                     USING (address) \
                 WHERE h.address = o.address AND o.enabled IS NOT FALSE AND o.error IS DISTINCT FROM n.error",
                session.table.quoted(Object::Hosts.suffix())
            );
            session
                .bounded("writing the errors", session.client.execute(&sql, &[&addresses, &errors]))
                .await
        });
        if let Err(fault) = written {
            self.may_write = fault.code != Some(SqlState::INSUFFICIENT_PRIVILEGE);
            log::debug!("hosts: the errors of rows are not written to the table: {fault}");
        }
    }

    /// Asks on the session, or on a new one. After a failure the session is closed.
    fn ask<T>(&mut self, question: impl AsyncFnOnce(&Session) -> Result<T, Fault>) -> Result<T, Fault> {
        let Self {
            config,
            session,
            runtime,
            ..
        } = self;
        runtime.block_on(async {
            let open = match session.take() {
                Some(open) => open,
                None => Session::open(&config.database, Bounds::default()).await?,
            };
            let answer = question(&open).await;
            match answer {
                // The server has answered.
                Ok(_) | Err(Fault { code: Some(_), .. }) => *session = Some(open),
                Err(_) => open.close().await,
            }
            answer
        })
    }
}

async fn read(session: &Session, sql: &str) -> Result<Vec<HostRow>, Fault> {
    let params: [&(dyn ToSql + Sync); 0] = [];
    let mut answer = pin!(session.client.query_raw(sql, params).await?);
    let mut rows = Vec::new();
    let mut bytes = 0;
    while let Some(row) = answer.try_next().await? {
        let mut text = |column| {
            let text = row.try_get::<_, Option<String>>(column)?.unwrap_or_default();
            bytes += text.len();
            Ok::<_, tokio_postgres::Error>(text)
        };
        rows.push(HostRow {
            address: text(0)?,
            frequency: text(1)?,
            options: text(2)?,
            regex: text(3)?,
        });
        if bytes > MAX_BYTES {
            return Err(Fault::operator(format!(
                "its rows are larger than {MAX_BYTES} bytes"
            )));
        }
    }
    Ok(rows)
}

pub(super) fn name(config: &HostsConfig) -> String {
    config.database.table.quoted(Object::Hosts.suffix())
}

/// Writes HOSTS_CACHE_FILE, complete or not at all.
pub(super) fn write_cache(path: &Path, table: &str, lines: &[String]) -> io::Result<()> {
    let text = format!(
        "# The hosts of {table}, when it was last read.\n{}\n",
        lines.join("\n")
    );
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    // Only its owner can read it: it may contain names of internal hosts.
    let file = tempfile::NamedTempFile::new_in(directory)?;
    fs::write(file.path(), text)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}
