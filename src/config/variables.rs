//! The variables of a run and their names. `sources` fills them, and the other files of `config` interpret the values.

use std::collections::BTreeMap;

use super::problem::Problem;

/// The names of all variables. Other names are ignored in `.env` and in the environment, and are an error after `-e`.
pub const NAMES: [&str; 46] = [
    "KAFKA_BOOTSTRAP_SERVERS",
    "KAFKA_TOPIC",
    "KAFKA_TOPIC_FAILURES",
    "KAFKA_SECURITY_PROTOCOL",
    "KAFKA_SSL_CA_FILE",
    "KAFKA_SSL_CERT_FILE",
    "KAFKA_SSL_KEY_FILE",
    "KAFKA_SASL_MECHANISM",
    "KAFKA_SASL_USERNAME",
    "KAFKA_SASL_USERNAME_FILE",
    "KAFKA_SASL_PASSWORD",
    "KAFKA_SASL_PASSWORD_FILE",
    "KAFKA_GROUP_ID",
    "KAFKA_GROUP_INSTANCE_ID",
    "DB_HOST",
    "DB_PORT",
    "DB_NAME",
    "DB_USER",
    "DB_PASSWORD",
    "DB_PASSWORD_FILE",
    "DB_TABLE",
    "DB_SSLMODE",
    "DB_SSLROOTCERT",
    "DB_BATCH_SIZE",
    "DB_BATCH_SECONDS",
    "DB_RETENTION",
    "DB_ROLLUP_RETENTION",
    "DB_SYNCHRONOUS_COMMIT",
    "STATE",
    "DOWN_WHEN",
    "CHECK_TIMEOUT",
    "MAX_THREADS",
    "MAX_BODY_BYTES",
    "USER_AGENT",
    "CHECK_CA_FILE",
    "SECRETS_DIR",
    "AGENT_NAME",
    "PRODUCE_GROUP",
    "HOSTS_CACHE_FILE",
    "REFERENCE_HOSTS",
    "METRICS_ADDR",
    "PAGE_ADDR",
    "PAGE_TITLE",
    "PAGE_SHOW_ADDRESSES",
    "PAGE_AUTH_FILE",
    "LOG_LEVEL",
];

/// All variables of a run, with the problems of their sources.
///
/// Those problems are reported together with the problems of the values. There is no `Debug`, because some values are secret.
#[derive(Clone, Default)]
pub struct Variables {
    /// The values that take precedence, unchanged. No value is empty.
    values: BTreeMap<&'static str, String>,
    pub(super) problems: Vec<Problem>,
    pub(super) warnings: Vec<String>,
}

impl Variables {
    /// From these pairs only, without the environment.
    pub fn from_pairs<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        Self::merged(
            pairs
                .into_iter()
                .filter_map(|(name, value)| Some((known(name)?, value.to_owned()))),
        )
    }

    /// The warnings about the sources, a line each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        debug_assert!(known(name).is_some(), "{name} is not in NAMES");
        self.values.get(name).map(String::as_str)
    }

    pub(super) fn merged(pairs: impl Iterator<Item = (&'static str, String)>) -> Self {
        let mut values: BTreeMap<_, _> = pairs.collect();
        values.retain(|_, value| !value.is_empty());
        Self {
            values,
            ..Self::default()
        }
    }
}

/// The name in [`NAMES`]; `None` if there is no such variable.
pub(super) fn known(name: &str) -> Option<&'static str> {
    NAMES.into_iter().find(|known| *known == name)
}

/// The servers that a command connects to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Servers {
    pub kafka: bool,
    pub database: bool,
}

impl Servers {
    pub const BOTH: Self = Self {
        kafka: true,
        database: true,
    };
    pub const KAFKA: Self = Self {
        kafka: true,
        database: false,
    };
    pub const DATABASE: Self = Self {
        kafka: false,
        database: true,
    };
    pub const NONE: Self = Self {
        kafka: false,
        database: false,
    };
}
