//! One Postgres connection, with a bound on every wait.
//!
//! Owns how a `DatabaseConfig` becomes a connection (DB_SSLMODE means what libpq's sslmode means), and the settings of the
//! session; `fault` classifies the errors. The queries are the callers'. It uses tokio-postgres on a runtime of the caller's
//! thread, because the blocking `postgres` crate has no bound on any wait.

mod fault;

use std::future::Future;
use std::path::Path;
use std::time::Duration;

use openssl::ssl::{SslConnector, SslMethod, SslVerifyMode, SslVersion};
use openssl::x509::store::X509StoreBuilder;
use postgres_openssl::MakeTlsConnector;
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;
use tokio_postgres::config::SslMode;
use tokio_postgres::error::SqlState;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, NoTls, Row, SimpleQueryMessage, SimpleQueryRow, Socket};

pub use self::fault::{Fault, Kind};
use self::fault::{NO_SESSION, chain};
use crate::config::{DatabaseConfig, DbSslMode, SYSTEM_CERTIFICATES, pem};
use crate::tables::names::{SEARCH_PATH, TableName, literal};

/// The name of our sessions in `pg_stat_activity`.
pub const APPLICATION_NAME: &str = "host-metrics";

/// The bounds on the waits of a connection. Tests shorten the defaults.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Name lookup, TCP, TLS and login, for all addresses together. Ten seconds are enough for a busy server and for two
    /// lost SYNs, which cost 1 s and 2 s.
    pub connect: Duration,
    /// One query and its result, and each 128 KiB of a COPY. A checkpoint on a slow disk can stall a healthy server for
    /// seconds. A server that sends nothing for longer is assumed to hang.
    pub step: Duration,
    /// Added to `step` for each row of a COPY, for the user's triggers, which run at its end. A millisecond is a thousand
    /// times what a row of a plain table needs.
    pub per_row: Duration,
    /// Added to `step` for each byte of an INSERT, which is one message. A slow line carries a megabyte a second.
    pub per_byte: Duration,
    /// How long a statement waits for a lock, such as that of a consumer that vanished. Below `step`, so that the server
    /// reports the timeout itself.
    pub lock: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            step: Duration::from_secs(15),
            per_row: Duration::from_millis(1),
            per_byte: Duration::from_micros(1),
            lock: Duration::from_secs(5),
        }
    }
}

/// Runs `future` for at most `within`.
///
/// # Errors
/// Those of the future, or a passing one that names `what` after that time.
pub async fn bounded<T, E>(
    what: &str,
    within: Duration,
    future: impl Future<Output = Result<T, E>>,
) -> Result<T, Fault>
where
    Fault: From<E>,
{
    match tokio::time::timeout(within, future).await {
        Ok(result) => result.map_err(Fault::from),
        Err(_elapsed) => Err(Fault::passing(format!(
            "{what}: no answer within {} s",
            within.as_secs_f64()
        ))),
    }
}

/// A runtime for a thread that talks to Postgres. It runs only while that thread waits in it.
pub fn runtime() -> std::io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

/// Does the work in a session of its own; an open transaction ends with it.
pub(crate) fn once<T>(
    config: &DatabaseConfig,
    work: impl AsyncFnOnce(&Session) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let runtime = runtime()?;
    let done = runtime.block_on(async {
        let session = Session::open(config, Bounds::default()).await?;
        let done = work(&session).await;
        session.close().await;
        done
    });
    // Does not wait for a name lookup that may still run on a thread of the runtime.
    runtime.shutdown_background();
    done
}

/// A server process. The start time distinguishes it from a later process with the same number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    pub pid: i32,
    /// Seconds since the Unix epoch, as the server writes them.
    pub started: String,
}

/// A session on a connection of its own, with the bounds on its waits.
pub struct Session {
    pub client: Client,
    pub bounds: Bounds,
    pub backend: Backend,
    /// DB_TABLE with its schema. If DB_TABLE names no schema, it is found through the user's search path.
    pub table: TableName,
    /// Does the input and output of the connection.
    driver: JoinHandle<()>,
}

impl Session {
    /// Connects and prepares the session.
    ///
    /// # Errors
    /// A passing one if the server cannot be reached; one for the operator if the login, the certificate or the database
    /// is wrong.
    pub async fn open(config: &DatabaseConfig, bounds: Bounds) -> Result<Self, Fault> {
        let place = format!("Postgres at {}:{}", config.host, config.port);
        let named = |fault: Fault| fault.at(&place);
        let (client, driver) = bounded("connecting", bounds.connect, connect(config, &bounds))
            .await
            .map_err(named)?;
        let opened = async {
            require_session(&client, config, &bounds).await?;
            let set_up = set_up(&client, &bounds, &config.table);
            bounded("session settings", bounds.step, set_up).await
        };
        match opened.await {
            Ok((backend, table)) => Ok(Self {
                client,
                bounds,
                backend,
                table,
                driver,
            }),
            Err(fault) => {
                driver.abort();
                Err(named(fault))
            }
        }
    }

    /// Runs `future` for at most one step of the bounds.
    pub async fn bounded<T, E>(
        &self,
        what: &str,
        future: impl Future<Output = Result<T, E>>,
    ) -> Result<T, Fault>
    where
        Fault: From<E>,
    {
        bounded(what, self.bounds.step, future).await
    }

    /// The rows of a query. It waits for at most one step, as the next three functions do.
    pub async fn query(
        &self,
        what: &str,
        sql: &str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Fault> {
        self.bounded(what, self.client.query(sql, params)).await
    }

    /// The row of a query that always has one.
    pub async fn query_one(
        &self,
        what: &str,
        sql: &str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Row, Fault> {
        self.bounded(what, self.client.query_one(sql, params)).await
    }

    /// Returns how many rows the statement wrote.
    pub async fn execute(&self, what: &str, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<u64, Fault> {
        self.bounded(what, self.client.execute(sql, params)).await
    }

    /// Runs statements that return nothing.
    pub async fn batch(&self, what: &str, sql: &str) -> Result<(), Fault> {
        self.bounded(what, self.client.batch_execute(sql)).await
    }

    /// The database's clock: the start of the transaction in microseconds since 1970.
    pub async fn now_micros(&self) -> Result<i64, Fault> {
        let sql = "SELECT (extract(epoch FROM now()) * 1000000)::bigint";
        let row = self.query_one("asking the time", sql, &[]).await?;
        Ok(row.try_get(0)?)
    }

    /// Closes the socket without a message to the server, which may be frozen.
    pub async fn close(self) {
        self.driver.abort();
        // Whether the task was aborted or had ended before, the socket is closed after this.
        let _ = self.driver.await;
    }
}

/// Fails if a pooler in front of Postgres changes the backend between transactions. Our settings would then apply to its
/// other clients, and our prepared statements would be lost.
///
/// A second connection shows such a pooler: either one backend serves both connections, or the first is served by two. Without
/// a second connection, because of a limit of the role, this finds nothing and succeeds.
async fn require_session(client: &Client, config: &DatabaseConfig, bounds: &Bounds) -> Result<(), Fault> {
    // Every start waits this long where a firewall lets only one connection through.
    const SECOND_WITHIN: Duration = Duration::from_secs(3);
    let within = SECOND_WITHIN.min(bounds.connect);
    let (second, driver) = match bounded("a second connection", within, connect(config, bounds)).await {
        Ok(connected) => connected,
        Err(fault) => {
            log::debug!("Postgres: cannot open a second connection: {fault}");
            return Ok(());
        }
    };
    let ask = async {
        // Finds the pooler whether it lends the connection returned last or the one returned first.
        let first = [backend(client).await?, backend(client).await?];
        let other = backend(&second).await?;
        Ok::<_, Fault>(first[0] == first[1] && !first.contains(&other))
    };
    let is_kept = bounded("looking for a pooler", within, ask).await;
    driver.abort();
    // As in `Session::close`.
    let _ = driver.await;
    match is_kept {
        Ok(false) => {}
        Ok(true) => return Ok(()),
        // A pooler with a single backend lets the second connection wait for the first.
        Err(fault) if fault.kind == Kind::Passing => {
            log::debug!("Postgres: {fault}");
            return Ok(());
        }
        Err(fault) => return Err(fault),
    }
    let begun = bounded("BEGIN", bounds.step, client.batch_execute("BEGIN")).await;
    let said = begun.err().map(|fault| format!(": {fault}")).unwrap_or_default();
    Err(Fault::operator(format!("{NO_SESSION}{said}")))
}

async fn connect(config: &DatabaseConfig, bounds: &Bounds) -> Result<(Client, JoinHandle<()>), Fault> {
    let mut pg = tokio_postgres::Config::new();
    pg.host(&config.host)
        .port(config.port)
        .dbname(&config.name)
        .user(&config.user)
        .application_name(APPLICATION_NAME)
        // For each address, so that one that drops packets leaves time for the next.
        .connect_timeout(bounds.connect / 2)
        // Ends a connection whose data is not acknowledged; keepalives do the same for an idle one. Neither notices a frozen
        // server, whose kernel still acknowledges; `bounded` does.
        .tcp_user_timeout(bounds.step)
        .keepalives(true)
        .keepalives_idle(Duration::from_secs(10))
        .keepalives_interval(Duration::from_secs(5))
        .keepalives_retries(3);
    if let Some(password) = &config.password {
        pg.password(password.reveal());
    }
    // As in libpq, DB_SSLMODE does not apply to Unix-domain sockets.
    let over_socket = config.host.starts_with('/');
    match config.ssl_mode {
        _ if over_socket => plain(pg.ssl_mode(SslMode::Disable)).await,
        DbSslMode::Disable => plain(pg.ssl_mode(SslMode::Disable)).await,
        DbSslMode::Prefer => {
            let first = match encrypted(pg.ssl_mode(SslMode::Prefer), config).await {
                Ok(connected) => return Ok(connected),
                Err(fault) => fault,
            };
            // As in libpq, `prefer` tries again without TLS if the handshake fails or pg_hba.conf refuses this user over
            // TLS, but not after a wrong password.
            let retries = first.kind == Kind::Operator
                && (first.code.is_none()
                    || first.code == Some(SqlState::INVALID_AUTHORIZATION_SPECIFICATION));
            if !retries {
                return Err(first);
            }
            plain(pg.ssl_mode(SslMode::Disable))
                .await
                .map_err(|second| Fault {
                    text: format!("with TLS: {first}; without TLS: {second}"),
                    ..second
                })
        }
        DbSslMode::Require | DbSslMode::VerifyCa | DbSslMode::VerifyFull => {
            encrypted(pg.ssl_mode(SslMode::Require), config).await
        }
    }
}

async fn plain(pg: &tokio_postgres::Config) -> Result<(Client, JoinHandle<()>), Fault> {
    connect_with(pg, NoTls).await
}

async fn encrypted(
    pg: &tokio_postgres::Config,
    config: &DatabaseConfig,
) -> Result<(Client, JoinHandle<()>), Fault> {
    // All errors of the configuration are found before the server is asked.
    connect_with(pg, tls_connector(config)?).await
}

async fn connect_with<T>(pg: &tokio_postgres::Config, tls: T) -> Result<(Client, JoinHandle<()>), Fault>
where
    T: MakeTlsConnect<Socket>,
    T::Stream: Send + 'static,
{
    let (client, connection) = pg.connect(tls).await?;
    Ok((client, tokio::spawn(drive(connection))))
}

async fn drive(connection: impl Future<Output = Result<(), tokio_postgres::Error>>) {
    if let Err(error) = connection.await {
        // A query that is under way returns the error too; on an idle connection this line is all there is.
        log::debug!("postgres connection ended error={:?}", chain(&error));
    }
}

/// libpq's rules (its documentation, "SSL Support", and `initialize_SSL` in fe-secure-openssl.c): a root certificate, if
/// given, is used in every mode and is then the only trusted one. Only `verify-full` compares the name.
fn tls_connector(config: &DatabaseConfig) -> Result<MakeTlsConnector, Fault> {
    let mode = config.ssl_mode;
    let root = config.ssl_root_cert.as_deref();
    let failed = |error: openssl::error::ErrorStack| Fault::operator(format!("OpenSSL: {error}"));
    let mut builder = SslConnector::builder(SslMethod::tls_client()).map_err(failed)?;
    // libpq's default for ssl_min_protocol_version.
    builder
        .set_min_proto_version(Some(SslVersion::TLS1_2))
        .map_err(failed)?;
    match root {
        None => builder.set_verify(match mode {
            // The configuration refuses these without a root certificate.
            DbSslMode::VerifyCa | DbSslMode::VerifyFull => SslVerifyMode::PEER,
            _ => SslVerifyMode::NONE,
        }),
        // The builder trusts the CAs of the machine.
        Some(path) if path == Path::new(SYSTEM_CERTIFICATES) => builder.set_verify(SslVerifyMode::PEER),
        Some(path) => {
            let unusable =
                |error: String| Fault::operator(format!("DB_SSLROOTCERT {}: {error}", path.display()));
            let pem = std::fs::read(path).map_err(|error| unusable(error.to_string()))?;
            let certificates = pem::certificates(&pem).map_err(unusable)?;
            let mut store = X509StoreBuilder::new().map_err(failed)?;
            for certificate in certificates {
                store.add_cert(certificate).map_err(failed)?;
            }
            builder.set_cert_store(store.build());
            builder.set_verify(SslVerifyMode::PEER);
        }
    }
    let mut connector = MakeTlsConnector::new(builder.build());
    if mode != DbSslMode::VerifyFull {
        connector.set_callback(|session, _| {
            session.set_verify_hostname(false);
            Ok(())
        });
    }
    Ok(connector)
}

/// Sets the session's settings, as far as the server knows them, and finds the backend and the table's schema, all in one
/// round trip.
///
/// The schema is found first, through the user's search path; every name in that query is qualified. After that,
/// [`SEARCH_PATH`] replaces the user's path: in a schema where other users may create functions and operators, one of theirs
/// could match our statements better than Postgres's own, and would run with our privileges.
///
/// The settings use `set_config` because some poolers refuse `options` in the start-up packet. By default, a client that
/// vanished leaves its transaction, and its lock on the positions, for hours. Keepalives end it within half a minute, even in a
/// COPY that waits for data, where neither `statement_timeout` nor `idle_in_transaction_session_timeout` applies. The latter
/// ends a transaction that this program itself left open.
async fn set_up(client: &Client, bounds: &Bounds, table: &TableName) -> Result<(Backend, TableName), Fault> {
    let settings = [
        ("tcp_keepalives_idle", "10".to_owned()),
        ("tcp_keepalives_interval", "5".to_owned()),
        ("tcp_keepalives_count", "3".to_owned()),
        (
            "idle_in_transaction_session_timeout",
            format!("{}ms", 2 * bounds.step.as_millis()),
        ),
        ("lock_timeout", format!("{}ms", bounds.lock.as_millis().max(1))),
        // Suppresses "relation exists, skipping", and the notices of a user's trigger for every row.
        ("client_min_messages", "warning".to_owned()),
        // A server that loses the last commits in a crash would lose rows that a quiet partition only repeats after its next
        // record.
        ("synchronous_commit", "on".to_owned()),
        // The bounds of partitions are read as text; this style includes the offset from UTC.
        ("DateStyle", "ISO".to_owned()),
    ];
    let values: Vec<String> = settings
        .iter()
        .map(|(name, value)| format!("('{name}', '{value}')"))
        .collect();
    let schema = match &table.schema {
        Some(schema) => literal(schema),
        None => format!(
            "COALESCE((SELECT n.nspname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n \
                 ON n.oid OPERATOR(pg_catalog.=) c.relnamespace \
                 WHERE c.oid OPERATOR(pg_catalog.=) pg_catalog.to_regclass({})::pg_catalog.oid), \
             pg_catalog.current_schema())",
            literal(&table.quoted(""))
        ),
    };
    let messages = client
        .simple_query(&format!(
            "SELECT {schema}; SELECT pg_catalog.set_config('search_path', '{SEARCH_PATH}', false); \
             SELECT set_config(s.name, v.value, false) FROM (VALUES {}) v (name, value) \
             JOIN pg_catalog.pg_settings s ON s.name = v.name \
             WHERE s.name <> 'synchronous_commit' OR s.setting = 'off'; {WHO_SERVES_US}",
            values.join(", ")
        ))
        .await?;
    let schema = rows_in(&messages)
        .next()
        .and_then(|row| row.get(0))
        .ok_or_else(|| {
            Fault::operator(
                "no schema of the search path exists; create one, or name a schema in DB_TABLE (schema.table)",
            )
        })?;
    let table = TableName {
        schema: Some(schema.to_owned()),
        name: table.name.clone(),
    };
    Ok((backend_in(&messages)?, table))
}

/// Every name is qualified, because this also runs before the search path is set.
const WHO_SERVES_US: &str = "SELECT pid, extract(epoch FROM backend_start) FROM pg_catalog.pg_stat_activity \
                             WHERE pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()";

async fn backend(client: &Client) -> Result<Backend, Fault> {
    backend_in(&client.simple_query(WHO_SERVES_US).await?)
}

/// The result of [`WHO_SERVES_US`], which must be the last statement.
fn backend_in(messages: &[SimpleQueryMessage]) -> Result<Backend, Fault> {
    let backend = rows_in(messages).next_back().and_then(|row| {
        Some(Backend {
            pid: row.get(0)?.parse().ok()?,
            started: row.get(1)?.to_owned(),
        })
    });
    backend.ok_or_else(|| Fault::passing("Postgres did not return the process ID of this session"))
}

fn rows_in(messages: &[SimpleQueryMessage]) -> impl DoubleEndedIterator<Item = &SimpleQueryRow> {
    messages.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    })
}
