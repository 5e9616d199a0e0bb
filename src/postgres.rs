//! One Postgres connection: made with libpq's meaning of DB_SSLMODE, every wait bounded, every error sorted.
//!
//! Owns how a `DatabaseConfig` becomes a connection, the session's settings, and what an SQLSTATE asks of us. What is
//! asked over the connection is its users': `consume::store`, `tables`, `init`, `status`. The engine is
//! tokio-postgres on a runtime of the caller's own thread: the blocking `postgres` crate has no bound on any wait.

use std::error::Error as _;
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
use tokio_postgres::{Client, NoTls, SimpleQueryMessage, SimpleQueryRow};

use crate::config::{DatabaseConfig, DbSslMode, pem};
use crate::tables::names::{SEARCH_PATH, TableName, literal};

/// How our sessions are told from others in `pg_stat_activity`.
pub const APPLICATION_NAME: &str = "host-metrics";

/// Every wait of a connection; the defaults are for production, tests shorten them.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Name, TCP, TLS and login, for all addresses together. libpq has no bound; ten seconds outlast a busy server and
    /// a lost SYN or two (1 s, then 2 s more).
    pub connect: Duration,
    /// One question and its answer, and each 128 KiB of a COPY. A checkpoint on a slow disk stalls a healthy server for
    /// seconds; a server that says nothing for this long is taken to hang.
    pub step: Duration,
    /// Added to `step` for each row of a COPY where the answer comes at the end: triggers run there. A millisecond a row
    /// is a thousand times what a plain table needs, and a bound all the same.
    pub per_row: Duration,
    /// Added to `step` for each byte of an INSERT, which goes in one message: a megabyte a second is what a poor line does.
    pub per_byte: Duration,
    /// How long a statement waits for a lock, for example of a consumer that vanished: below `step`, so that the server
    /// can still say so itself.
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

/// What an error asks of us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It passes: wait and try again, on a new connection.
    Passing,
    /// The operator has to act; waiting does not help.
    Operator,
    /// What was written was refused: a row's fault, once it repeats with that row alone.
    Refused,
}

/// An error of the database or of the way to it, sorted and worded. Passwords are in none.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{text}")]
pub struct Fault {
    pub kind: Kind,
    pub text: String,
    pub code: Option<SqlState>,
    /// The server's context, innermost first: `COPY t, line 3`.
    pub context: Option<String>,
}

impl Fault {
    pub fn passing(text: impl Into<String>) -> Self {
        Self {
            kind: Kind::Passing,
            text: text.into(),
            code: None,
            context: None,
        }
    }

    pub fn operator(text: impl Into<String>) -> Self {
        Self {
            kind: Kind::Operator,
            text: text.into(),
            code: None,
            context: None,
        }
    }

    /// Names the remedy if the error is a right that the user lacks.
    pub fn with_grant(mut self, grant: &str) -> Self {
        if self.code == Some(SqlState::INSUFFICIENT_PRIVILEGE) {
            self.text = format!("{}: {grant}", self.text);
        }
        self
    }
}

impl From<tokio_postgres::Error> for Fault {
    fn from(error: tokio_postgres::Error) -> Self {
        let Some(db) = error.as_db_error() else {
            return Self {
                kind: kind_of_client_error(&error),
                text: chain(&error),
                code: None,
                context: None,
            };
        };
        let mut text = format!("{} (SQLSTATE {})", db.message(), db.code().code());
        // A detail repeats the whole row ("Failing row contains …"): enough of it to recognise the row.
        const DETAIL_CHARS: usize = 500;
        if let Some(detail) = db.detail() {
            text.push_str(": ");
            text.extend(detail.chars().take(DETAIL_CHARS));
        }
        if let Some(remedy) = remedy(db.code()) {
            text = format!("{text}: {remedy}");
        }
        Self {
            kind: kind_of(db.code()),
            text,
            code: Some(db.code().clone()),
            context: db.where_().map(str::to_owned),
        }
    }
}

/// Sorts by SQLSTATE (PostgreSQL documentation, appendix A): the class tells, with a few exceptions.
pub fn kind_of(code: &SqlState) -> Kind {
    let code = code.code();
    match code.get(..2).unwrap_or_default() {
        // Connection, transaction rollback (deadlock, serialization), transaction state (25006 read-only: a failover),
        // resources (disk full, too many connections), operator intervention (restart), system error, internal error.
        "08" | "25" | "40" | "53" | "57" | "58" | "XX" => Kind::Passing,
        _ if code == "55P03" => Kind::Passing, // lock_not_available
        // Syntax, names and rights; login; no such database or schema; not supported; configuration file.
        // A statement whose name is not known (26): a pooler's doing.
        "26" | "42" | "28" | "3D" | "3F" | "0A" | "F0" => Kind::Operator,
        _ => Kind::Refused,
    }
}

/// Runs `future` for at most `within`.
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
        Err(elapsed) => Err(Fault::passing(format!(
            "{what}: no answer within {} s ({elapsed})",
            within.as_secs_f64()
        ))),
    }
}

/// The runtime of a thread that talks to Postgres. Nothing runs on it while the thread is not waiting in it.
pub fn runtime() -> std::io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

/// A server process, told from a later one with the same number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    pub pid: i32,
    /// Seconds since the epoch, as the server writes them.
    pub started: String,
}

/// A connection and the task that moves its bytes.
pub struct Link {
    pub client: Client,
    pub backend: Backend,
    /// DB_TABLE with its schema: where DB_TABLE names none, the one that the user's own search path leads to.
    pub table: TableName,
    driver: JoinHandle<()>,
}

impl Link {
    /// Connects and sets the session up.
    ///
    /// # Errors
    /// Sorted: an unreachable server passes; a refused login, a certificate or a missing database is the operator's.
    pub async fn open(config: &DatabaseConfig, bounds: &Bounds) -> Result<Self, Fault> {
        let place = format!("Postgres at {}:{}", config.host, config.port);
        // Nothing was written yet that could be at fault: a refusal here is of the login or of a setting.
        let named = |fault: Fault| Fault {
            kind: if fault.kind == Kind::Refused {
                Kind::Operator
            } else {
                fault.kind
            },
            text: format!("{place}: {}", fault.text),
            ..fault
        };
        let (client, driver) = bounded("connecting", bounds.connect, connect(config, bounds))
            .await
            .map_err(named)?;
        let opened = async {
            require_session(&client, config, bounds).await?;
            let set_up = set_up(&client, bounds, &config.table);
            bounded("session settings", bounds.step, set_up).await
        };
        match opened.await {
            Ok((backend, table)) => Ok(Self {
                client,
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

    /// Closes the socket without a word to the server: it may be frozen.
    pub async fn close(self) {
        self.driver.abort();
        // Aborted, or ended by itself before; either way the socket is closed when this returns.
        let _ = self.driver.await;
    }
}

/// A pooler that lends a connection for a transaction or a statement keeps neither our settings, which its other clients then
/// have, nor our statements. Two connections show it: the same backend serves both, or one is served by two.
///
/// Where there cannot be a second connection (a limit of the role's), nothing is shown, and nothing is wrong yet.
async fn require_session(client: &Client, config: &DatabaseConfig, bounds: &Bounds) -> Result<(), Fault> {
    const SECOND_WITHIN: Duration = Duration::from_secs(3);
    let within = SECOND_WITHIN.min(bounds.connect);
    let (second, driver) = match bounded("a second connection", within, connect(config, bounds)).await {
        Ok(connected) => connected,
        Err(fault) => {
            log::debug!("Postgres: no second connection: {fault}");
            return Ok(());
        }
    };
    let ask = async {
        // Whether the pooler takes the connection given back last or the one given back first.
        let first = [backend(client).await?, backend(client).await?];
        let other = backend(&second).await?;
        Ok::<_, Fault>(first[0] == first[1] && !first.contains(&other))
    };
    let is_kept = bounded("whose session it is", within, ask).await;
    driver.abort();
    // As in `Link::close`.
    let _ = driver.await;
    match is_kept {
        Ok(false) => {}
        Ok(true) => return Ok(()),
        // With one connection for all, the second waits for the first.
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

const NO_SESSION: &str = "a pooler in front of Postgres does not keep our session from one transaction to the next; have \
                          it keep sessions (PgBouncer: pool_mode=session) or connect to Postgres itself";

async fn connect(config: &DatabaseConfig, bounds: &Bounds) -> Result<(Client, JoinHandle<()>), Fault> {
    let mut pg = tokio_postgres::Config::new();
    pg.host(&config.host)
        .port(config.port)
        .dbname(&config.name)
        .user(&config.user)
        .application_name(APPLICATION_NAME)
        // Per address: one that swallows packets leaves time for the next.
        .connect_timeout(bounds.connect / 2)
        // What we sent is not acknowledged: the peer is gone. Nothing to send: keepalives find out. Neither notices a
        // frozen server (the kernel still acknowledges); `bounded` does.
        .tcp_user_timeout(bounds.step)
        .keepalives(true)
        .keepalives_idle(Duration::from_secs(10))
        .keepalives_interval(Duration::from_secs(5))
        .keepalives_retries(3);
    if let Some(password) = &config.password {
        pg.password(password.reveal());
    }
    // As libpq: DB_SSLMODE does not concern Unix-domain sockets.
    let over_socket = config.host.starts_with('/');
    match config.ssl_mode {
        _ if over_socket => plain(pg.ssl_mode(SslMode::Disable)).await,
        DbSslMode::Disable => plain(pg.ssl_mode(SslMode::Disable)).await,
        DbSslMode::Prefer => {
            let first = match encrypted(pg.ssl_mode(SslMode::Prefer), config).await {
                Ok(connected) => return Ok(connected),
                Err(fault) => fault,
            };
            // As libpq: prefer falls back to no TLS if the handshake fails, or the server (pg_hba.conf) refuses this
            // user over TLS. A wrong password stays wrong.
            let retries = first.kind == Kind::Operator
                && (first.code.is_none()
                    || first.code == Some(SqlState::INVALID_AUTHORIZATION_SPECIFICATION));
            if !retries {
                return Err(first);
            }
            plain(pg.ssl_mode(SslMode::Disable))
                .await
                .map_err(|second| Fault {
                    text: format!("with TLS: {first}; without: {second}"),
                    ..second
                })
        }
        DbSslMode::Require | DbSslMode::VerifyCa | DbSslMode::VerifyFull => {
            encrypted(pg.ssl_mode(SslMode::Require), config).await
        }
    }
}

async fn plain(pg: &tokio_postgres::Config) -> Result<(Client, JoinHandle<()>), Fault> {
    let (client, connection) = pg.connect(NoTls).await?;
    Ok((client, tokio::spawn(drive(connection))))
}

async fn encrypted(
    pg: &tokio_postgres::Config,
    config: &DatabaseConfig,
) -> Result<(Client, JoinHandle<()>), Fault> {
    let (client, connection) = pg.connect(tls_connector(config)?).await?;
    Ok((client, tokio::spawn(drive(connection))))
}

async fn drive(connection: impl Future<Output = Result<(), tokio_postgres::Error>>) {
    if let Err(error) = connection.await {
        // Whoever waits for an answer gets the error too; idle, nobody does.
        log::debug!("postgres connection ended error={:?}", chain(&error));
    }
}

/// libpq's rules (its documentation, "SSL Support", and `initialize_SSL` in fe-secure-openssl.c): a root certificate, if
/// given, is verified against in every mode, and then it is the only anchor; the name is compared by `verify-full` only.
fn tls_connector(config: &DatabaseConfig) -> Result<MakeTlsConnector, Fault> {
    let mode = config.ssl_mode;
    let root = config.ssl_root_cert.as_deref();
    let uses_system = root == Some(Path::new("system"));
    if root.is_none() && matches!(mode, DbSslMode::VerifyCa | DbSslMode::VerifyFull) {
        return Err(Fault::operator(
            "DB_SSLMODE verifies the server's certificate, but DB_SSLROOTCERT is not set: name the CA's PEM file, or \
             `system` for the CAs that this machine trusts (with DB_SSLMODE=verify-full)",
        ));
    }
    if uses_system && mode != DbSslMode::VerifyFull {
        return Err(Fault::operator(
            "DB_SSLROOTCERT=system needs DB_SSLMODE=verify-full: anybody can get a certificate for some name from a \
             public CA",
        ));
    }
    let failed = |error: openssl::error::ErrorStack| Fault::operator(format!("OpenSSL: {error}"));
    let mut builder = SslConnector::builder(SslMethod::tls_client()).map_err(failed)?;
    // libpq's default of ssl_min_protocol_version.
    builder
        .set_min_proto_version(Some(SslVersion::TLS1_2))
        .map_err(failed)?;
    match root {
        None => builder.set_verify(SslVerifyMode::NONE),
        Some(_) if uses_system => builder.set_verify(SslVerifyMode::PEER),
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

/// Session settings, where the server knows them, the backend's identity and the table's schema, in one round trip.
///
/// The schema is asked for first, while the search path is still the user's. From then on names are looked up in
/// [`SEARCH_PATH`]: where others may create functions and operators, one of theirs could fit a statement of ours better than
/// Postgres's own, and would run with our rights. Until then every name here is qualified.
///
/// By `set_config` and not in the start-up packet, whose `options` some poolers refuse. A client that vanished leaves
/// its transaction, and with it the lock on its positions, for hours by default: keepalives end it within half a minute,
/// in a COPY that waits for data too (`statement_timeout` and the bound on an idle transaction do not); that bound ends
/// what we ourselves forgot.
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
        // "relation exists, skipping", and a user's own trigger may say something for every row.
        ("client_min_messages", "warning".to_owned()),
        // The bounds of partitions are read as text: in this style with the offset of their zone.
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
             JOIN pg_catalog.pg_settings s ON s.name = v.name; {WHO_SERVES_US}",
            values.join(", ")
        ))
        .await?;
    let schema = rows_in(&messages)
        .next()
        .and_then(|row| row.get(0))
        .ok_or_else(|| {
            Fault::operator(
                "no schema of the search path exists: create one, or name it in DB_TABLE (schema.table)",
            )
        })?;
    let table = TableName {
        schema: Some(schema.to_owned()),
        name: table.name.clone(),
    };
    Ok((backend_in(&messages)?, table))
}

/// Also asked before the search path is ours: every name is qualified.
const WHO_SERVES_US: &str = "SELECT pid, extract(epoch FROM backend_start) FROM pg_catalog.pg_stat_activity \
                             WHERE pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()";

async fn backend(client: &Client) -> Result<Backend, Fault> {
    backend_in(&client.simple_query(WHO_SERVES_US).await?)
}

/// The answer to [`WHO_SERVES_US`], which was asked last.
fn backend_in(messages: &[SimpleQueryMessage]) -> Result<Backend, Fault> {
    let backend = rows_in(messages).next_back().and_then(|row| {
        Some(Backend {
            pid: row.get(0)?.parse().ok()?,
            started: row.get(1)?.to_owned(),
        })
    });
    backend.ok_or_else(|| Fault::passing("Postgres did not say which of its processes serves us"))
}

fn rows_in(messages: &[SimpleQueryMessage]) -> impl DoubleEndedIterator<Item = &SimpleQueryRow> {
    messages.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    })
}

/// Errors without an SQLSTATE: of our side, of the network, of TLS.
fn kind_of_client_error(error: &tokio_postgres::Error) -> Kind {
    let mut source = error.source();
    while let Some(inner) = source {
        if let Some(tls) = inner.downcast_ref::<openssl::ssl::Error>() {
            // A server that goes away in the middle of the handshake: OpenSSL 3 calls that a protocol error too.
            const SSL_R_UNEXPECTED_EOF_WHILE_READING: i32 = 294;
            let is_protocol = tls.ssl_error().is_some_and(|stack| {
                stack
                    .errors()
                    .iter()
                    .any(|e| e.reason_code() != SSL_R_UNEXPECTED_EOF_WHILE_READING)
            });
            return if is_protocol {
                Kind::Operator
            } else {
                Kind::Passing
            };
        }
        source = inner.source();
    }
    // tokio-postgres keeps its kinds to itself: these words are the only sign. The first is, without an OpenSSL error
    // below it, "server does not support TLS"; the second a method of login that we do not know, or no password.
    let text = error.to_string();
    let is_operators = [
        "error performing TLS handshake",
        "authentication error",
        "invalid configuration",
    ]
    .iter()
    .any(|words| text.starts_with(words));
    if is_operators {
        Kind::Operator
    } else {
        Kind::Passing
    }
}

fn remedy(code: &SqlState) -> Option<&'static str> {
    Some(match *code {
        SqlState::INVALID_PASSWORD => "check DB_USER and DB_PASSWORD",
        SqlState::INVALID_AUTHORIZATION_SPECIFICATION => {
            "check DB_USER, DB_SSLMODE and the server's pg_hba.conf"
        }
        SqlState::INVALID_CATALOG_NAME => "check DB_NAME, or create the database",
        SqlState::INVALID_SCHEMA_NAME => "create the schema, or check DB_TABLE",
        SqlState::UNDEFINED_TABLE => "run `host-metrics init`, or check DB_TABLE",
        SqlState::DUPLICATE_PSTATEMENT | SqlState::INVALID_SQL_STATEMENT_NAME => NO_SESSION,
        SqlState::UNDEFINED_COLUMN => "the table was changed meanwhile: start again",
        _ => return None,
    })
}

/// An error with its causes on one line; a cause that only repeats what stands there already is left out.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        source = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_sqlstate_tells_what_to_do() {
        for (code, kind) in [
            ("08006", Kind::Passing),
            ("25006", Kind::Passing),
            ("25P03", Kind::Passing),
            ("40001", Kind::Passing),
            ("40P01", Kind::Passing),
            ("53100", Kind::Passing),
            ("53300", Kind::Passing),
            ("55P03", Kind::Passing),
            ("57014", Kind::Passing),
            ("57P01", Kind::Passing),
            ("58030", Kind::Passing),
            ("XX000", Kind::Passing),
            ("0A000", Kind::Operator),
            ("26000", Kind::Operator),
            ("42P05", Kind::Operator),
            ("28P01", Kind::Operator),
            ("3D000", Kind::Operator),
            ("3F000", Kind::Operator),
            ("42501", Kind::Operator),
            ("42P01", Kind::Operator),
            ("22003", Kind::Refused),
            ("22P03", Kind::Refused),
            ("23505", Kind::Refused),
            ("23514", Kind::Refused),
            ("54000", Kind::Refused),
            ("55000", Kind::Refused),
            ("P0001", Kind::Refused),
            ("ABCDE", Kind::Refused),
        ] {
            assert_eq!(kind_of(&SqlState::from_code(code)), kind, "{code}");
        }
    }
}
