//! Where the variables come from: `-e NAME=VALUE`, the environment, the `.env` file, merged into one set.
//!
//! Owns the names and which source wins; what a value means is the parent's.

use std::collections::BTreeMap;
use std::path::Path;

use super::env_file::{self, EnvFile};
use super::problems::Problem;

/// Every variable there is. In a `.env` file or the environment others are somebody else's, after `-e` they are slips.
pub const NAMES: [&str; 36] = [
    "KAFKA_BOOTSTRAP_SERVERS",
    "KAFKA_TOPIC",
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
    "STATE",
    "DOWN_WHEN",
    "CHECK_TIMEOUT",
    "MAX_THREADS",
    "MAX_BODY_BYTES",
    "USER_AGENT",
    "CHECK_CA_FILE",
    "AGENT_NAME",
    "METRICS_ADDR",
    "LOG_LEVEL",
];

/// All variables of a run, and what was wrong with where they came from.
///
/// The latter is reported together with what is wrong with their values, by the function of the parent that makes a
/// command's configuration of them. No `Debug`: some values are secret.
#[derive(Clone, Default)]
pub struct Variables {
    /// The winning values as they came, none of them empty.
    values: BTreeMap<&'static str, String>,
    pub(super) problems: Vec<Problem>,
    warnings: Vec<String>,
}

impl Variables {
    /// Merges, from the weakest to the strongest: `env_file` (or `.env`, if there), the environment, `flags`.
    ///
    /// An empty value wins as any other does: it sets a variable back to its default.
    pub fn gather(flags: &[String], env_file: Option<&Path>) -> Self {
        let EnvFile {
            values,
            mut problems,
            warnings,
        } = env_file::read(env_file);
        let mut stronger = from_environment(&mut problems);
        stronger.extend(from_flags(flags, &mut problems));
        // What a stronger source replaces may be as odd as it likes.
        let warnings = warnings
            .into_iter()
            .filter(|(name, _)| name.is_none_or(|name| !stronger.contains_key(name)));
        Self {
            warnings: warnings.map(|(_, warning)| warning).collect(),
            problems,
            ..Self::merged([values, stronger].into_iter().flatten())
        }
    }

    /// From these pairs alone, whatever the environment says.
    pub fn from_pairs<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        Self::merged(
            pairs
                .into_iter()
                .filter_map(|(name, value)| Some((known(name)?, value.to_owned()))),
        )
    }

    /// What is odd about where they came from, a line each, and no reason to stop.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        debug_assert!(known(name).is_some(), "{name} is not in NAMES");
        self.values.get(name).map(String::as_str)
    }

    fn merged(pairs: impl Iterator<Item = (&'static str, String)>) -> Self {
        let mut values: BTreeMap<_, _> = pairs.collect();
        values.retain(|_, value| !value.is_empty());
        Self {
            values,
            ..Self::default()
        }
    }
}

/// The name as it stands in [`NAMES`], if it does.
pub(super) fn known(name: &str) -> Option<&'static str> {
    NAMES.into_iter().find(|known| *known == name)
}

fn from_flags(flags: &[String], problems: &mut Vec<Problem>) -> BTreeMap<&'static str, String> {
    let mut pairs = BTreeMap::new();
    for flag in flags {
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (flag.as_str(), None),
        };
        let problem = match (known(name), value) {
            (Some(name), Some(value)) => {
                pairs.insert(name, value.to_owned());
                continue;
            }
            (Some(name), None) => format!("-e {name}: expected NAME=VALUE; write -e {name}=VALUE"),
            // What is not a variable's name may be a secret, so it is repeated only if it looks like a name.
            (None, Some(_)) if is_like_a_name(name) => {
                format!("-e {name}: no such variable; `host-metrics --help` lists them")
            }
            (None, Some(_)) => match known(&name.to_ascii_uppercase()) {
                Some(meant) => format!("-e {name}: no such variable; write -e {meant}=VALUE"),
                None => "-e: no such variable as stands before the `=`; `host-metrics --help` lists them"
                    .to_owned(),
            },
            (None, None) => "-e: expected NAME=VALUE, got a word without a `=`".to_owned(),
        };
        problems.push(Problem::Source(problem));
    }
    pairs
}

fn is_like_a_name(text: &str) -> bool {
    let is_part = |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_';
    !text.is_empty() && text.bytes().all(is_part)
}

fn from_environment(problems: &mut Vec<Problem>) -> BTreeMap<&'static str, String> {
    let mut pairs = BTreeMap::new();
    for name in NAMES {
        let Some(value) = std::env::var_os(name) else {
            continue;
        };
        match value.into_string() {
            Ok(value) => {
                pairs.insert(name, value);
            }
            Err(_) => problems.push(Problem::Source(format!(
                "{name}: its value in the environment is not UTF-8; correct it"
            ))),
        }
    }
    pairs
}
