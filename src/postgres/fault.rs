//! Errors of the database, classified: wait, stop, or blame what was written.

use std::error::Error;

use tokio_postgres::error::SqlState;

/// What to do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Wait, then try again on a new connection.
    Passing,
    /// Stop: the operator has to change something.
    Operator,
    /// The server refused what was written. If the error repeats with one row alone, that row is the cause.
    Refused,
}

/// An error of the database or of the connection to it, classified. The text never holds a password.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{text}")]
pub struct Fault {
    pub kind: Kind,
    pub text: String,
    pub code: Option<SqlState>,
    /// The server's CONTEXT field, innermost first, such as `COPY t, line 3`.
    pub context: Option<String>,
}

impl Fault {
    /// An error to wait out.
    pub fn passing(text: impl Into<String>) -> Self {
        Self::new(Kind::Passing, text)
    }

    /// An error for the operator.
    pub fn operator(text: impl Into<String>) -> Self {
        Self::new(Kind::Operator, text)
    }

    fn new(kind: Kind, text: impl Into<String>) -> Self {
        Self {
            kind,
            text: text.into(),
            code: None,
            context: None,
        }
    }

    /// Adds where it occurred. Nothing was written there yet, so what was refused is for the operator.
    pub fn at(mut self, place: &str) -> Self {
        if self.kind == Kind::Refused {
            self.kind = Kind::Operator;
        }
        self.text = format!("{place}: {}", self.text);
        self
    }

    /// Adds the GRANT to run, if the error is a missing privilege.
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
            return Self::new(kind_of_client_error(&error), chain(&error));
        };
        let mut text = format!("{} (SQLSTATE {})", db.message(), db.code().code());
        // A DETAIL can repeat the whole row ("Failing row contains …"), and a user's trigger may give any HINT; the beginning is
        // enough to recognise the row.
        const DETAIL_CHARS: usize = 500;
        let hint = db.hint().map(|hint| hint.trim_end_matches('.'));
        for more in [db.detail(), hint, remedy(db.code())].into_iter().flatten() {
            text.push_str(": ");
            text.extend(more.chars().take(DETAIL_CHARS));
        }
        Self {
            kind: kind_of(db.code()),
            text,
            code: Some(db.code().clone()),
            context: db.where_().map(str::to_owned),
        }
    }
}

/// Classifies an SQLSTATE (PostgreSQL documentation, appendix A) by its class, with a few exceptions.
fn kind_of(code: &SqlState) -> Kind {
    let code = code.code();
    match code.get(..2).unwrap_or_default() {
        // Connection; transaction state (25006 is read-only, as after a failover); rollback (deadlock, serialization);
        // resources (disk full, too many connections); operator intervention (restart); system error; internal error.
        "08" | "25" | "40" | "53" | "57" | "58" | "XX" => Kind::Passing,
        _ if code == "55P03" => Kind::Passing, // lock_not_available
        // An unknown prepared statement, caused by a pooler; syntax, names and privileges; login; no such database; no such
        // schema; not supported; configuration file.
        "26" | "42" | "28" | "3D" | "3F" | "0A" | "F0" => Kind::Operator,
        _ => Kind::Refused,
    }
}

pub(super) const NO_SESSION: &str = "a pooler in front of Postgres does not keep the session from one transaction to the next; \
                          configure it to keep sessions (PgBouncer: pool_mode=session) or connect to Postgres directly";

/// Classifies an error without an SQLSTATE: of the network, of TLS or of this program.
fn kind_of_client_error(error: &tokio_postgres::Error) -> Kind {
    let mut source = error.source();
    while let Some(inner) = source {
        if let Some(tls) = inner.downcast_ref::<openssl::ssl::Error>() {
            // OpenSSL 3 also reports a server that closes the connection in the handshake as a protocol error.
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
    // tokio-postgres has no public error kinds, so the text decides. Without an OpenSSL error as its source, the first means
    // "server does not support TLS". The second means an unknown login method or a missing password.
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
        SqlState::UNDEFINED_COLUMN => "the table was changed in the meantime; start again",
        _ => return None,
    })
}

/// An error with its causes on one line, without a cause that repeats the text before it.
pub(super) fn chain(error: &dyn Error) -> String {
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
    fn an_sqlstate_decides_what_to_do() {
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
