//! Turns variables into the checked configuration of a command.
//!
//! Owns the name, default, meaning and error text of every variable, and the order of the sources: `-e NAME=VALUE` overrides
//! the environment, which overrides the `.env` file. The only module that reads the environment, except for what a terminal can
//! show. All problems are collected and reported together. `kafka`, `database`, `check`, `page` and `state` read one
//! group of variables each; this file combines them for the commands. A command reads only the variables that it needs.

mod check;
mod database;
mod env_file;
mod form;
mod kafka;
mod page;
pub(crate) mod pem;
mod problem;
mod reader;
mod secret;
mod sources;
mod state;
mod variables;

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use log::LevelFilter;

pub use check::{CheckConfig, DEFAULT_USER_AGENT, References};
pub use database::{DatabaseConfig, DbSslMode, SYSTEM_CERTIFICATES};
use form::RETENTIONS;
pub use kafka::{
    GroupConfig, KafkaConfig, KafkaSasl, KafkaSecurity, KafkaTls, TOPIC_NAME_RULE, is_topic_name,
};
pub use page::PageConfig;
pub use problem::{Problem, WrongVariables};
use reader::Reader;
pub use secret::{Secret, exposed_secrets};
pub use state::StateConfig;
pub use variables::{NAMES, Servers, Variables};

/// Two batches are in memory: one is filled while the other is written.
const BATCH_SIZES: RangeInclusive<usize> = 1..=100_000;

/// All errors of the command line and the host file, ready to print. Exit status 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct WrongInput(pub String);

#[derive(Clone)]
pub struct ProduceConfig {
    pub kafka: KafkaConfig,
    /// The topic for the records of hosts without `topic=`.
    pub topic: String,
    /// KAFKA_TOPIC_FAILURES: gets a copy of every failed check.
    pub failures_topic: Option<String>,
    pub group: Option<GroupConfig>,
    pub check: CheckConfig,
    pub references: References,
    pub metrics_addr: Option<SocketAddr>,
}

pub fn produce(variables: &Variables) -> Result<ProduceConfig, WrongVariables> {
    read(variables, produce_config)
}

fn produce_config(reader: &mut Reader<'_>) -> ProduceConfig {
    let topic = kafka::topic(reader);
    ProduceConfig {
        kafka: kafka::servers_and_security(reader),
        failures_topic: kafka::failures_topic(reader, std::slice::from_ref(&topic)),
        topic,
        group: kafka::produce_group(reader),
        check: check::checks(reader, false),
        references: check::references(reader),
        metrics_addr: metrics_addr(reader),
    }
}

/// The table of hosts.
#[derive(Clone)]
pub struct HostsConfig {
    pub database: DatabaseConfig,
    /// Where `produce` keeps the last good list.
    pub cache_file: Option<PathBuf>,
}

/// The configuration of `produce -c postgres:`.
pub fn produce_from_table(variables: &Variables) -> Result<(ProduceConfig, HostsConfig), WrongVariables> {
    read(variables, |reader| (produce_config(reader), hosts_config(reader)))
}

pub fn hosts(variables: &Variables) -> Result<HostsConfig, WrongVariables> {
    read(variables, hosts_config)
}

fn hosts_config(reader: &mut Reader<'_>) -> HostsConfig {
    HostsConfig {
        database: database::database(reader),
        cache_file: reader.get("HOSTS_CACHE_FILE").map(PathBuf::from),
    }
}

#[derive(Clone)]
pub struct ConsumeConfig {
    pub kafka: KafkaConfig,
    /// Not empty, without duplicates.
    pub topics: Vec<String>,
    pub group_id: String,
    pub group_instance_id: Option<String>,
    pub database: DatabaseConfig,
    pub batch_size: usize,
    /// DB_BATCH_SECONDS: a batch that is not full is written when its oldest record has waited this long.
    pub batch_wait: Duration,
    /// DB_SYNCHRONOUS_COMMIT=off: commits do not wait for the server's disk.
    pub is_asynchronous: bool,
    pub retention: Option<Duration>,
    /// `None`: rows only.
    pub state: Option<StateConfig>,
    pub metrics_addr: Option<SocketAddr>,
}

pub fn consume(variables: &Variables) -> Result<ConsumeConfig, WrongVariables> {
    read(variables, |reader| ConsumeConfig {
        kafka: kafka::servers_and_security(reader),
        topics: kafka::topics_without_failures(reader),
        group_id: kafka::group_id(reader),
        group_instance_id: kafka::group_instance_id(reader),
        database: database::database(reader),
        batch_size: reader.number("DB_BATCH_SIZE", BATCH_SIZES, 100),
        batch_wait: database::batch_wait(reader),
        is_asynchronous: !reader.switch("DB_SYNCHRONOUS_COMMIT"),
        retention: retention(reader),
        state: state::state(reader),
        metrics_addr: metrics_addr(reader),
    })
}

/// The configuration of `init` and `drop`; [`init()`] describes which parts may be empty.
#[derive(Clone)]
pub struct InitConfig {
    pub kafka: KafkaConfig,
    pub topics: Vec<String>,
    pub database: DatabaseConfig,
}

/// The configuration of `init` and `drop`. The variables of a server that is not in `servers` are not read, and its part of
/// the result is empty.
pub fn init(variables: &Variables, servers: Servers) -> Result<InitConfig, WrongVariables> {
    let nothing_set = Variables::default();
    read(variables, |reader| InitConfig {
        kafka: match servers.kafka {
            true => kafka::servers_and_security(reader),
            false => kafka::servers_and_security(&mut Reader::new(&nothing_set)),
        },
        topics: kafka::topics_with_failures(reader),
        database: match servers.database {
            true => database::database(reader),
            false => DatabaseConfig {
                table: database::table(reader),
                ..database::database(&mut Reader::new(&nothing_set))
            },
        },
    })
}

#[derive(Clone)]
pub struct StatusConfig {
    /// `None`: do not show the lag.
    pub kafka: Option<KafkaConfig>,
    pub topics: Vec<String>,
    pub group_id: String,
    pub database: DatabaseConfig,
    /// STATE: whether the state is asked, instead of the rows.
    pub is_state_on: bool,
}

/// The configuration of `status`. Without KAFKA_BOOTSTRAP_SERVERS, `status` reads the tables only.
pub fn status(variables: &Variables) -> Result<StatusConfig, WrongVariables> {
    read(variables, |reader| StatusConfig {
        kafka: kafka_if_set(reader),
        topics: kafka::topics(reader),
        group_id: kafka::group_id(reader),
        database: database::database(reader),
        is_state_on: state::state(reader).is_some(),
    })
}

#[derive(Clone)]
pub struct TailConfig {
    pub kafka: KafkaConfig,
    pub topics: Vec<String>,
}

pub fn tail(variables: &Variables) -> Result<TailConfig, WrongVariables> {
    read(variables, |reader| TailConfig {
        kafka: kafka::servers_and_security(reader),
        topics: kafka::topics(reader),
    })
}

#[derive(Clone)]
pub struct AuditConfig {
    /// `None`: what Kafka has at offsets that are not stored stays unknown.
    pub kafka: Option<KafkaConfig>,
    pub group_id: String,
    pub database: DatabaseConfig,
    pub retention: Option<Duration>,
}

/// The configuration of `audit`. Without KAFKA_BOOTSTRAP_SERVERS, `audit` reads the tables only.
pub fn audit(variables: &Variables) -> Result<AuditConfig, WrongVariables> {
    read(variables, |reader| AuditConfig {
        kafka: kafka_if_set(reader),
        group_id: kafka::group_id(reader),
        database: database::database(reader),
        retention: retention(reader),
    })
}

fn kafka_if_set(reader: &mut Reader<'_>) -> Option<KafkaConfig> {
    reader
        .is_set("KAFKA_BOOTSTRAP_SERVERS")
        .then(|| kafka::servers_and_security(reader))
}

fn retention(reader: &mut Reader<'_>) -> Option<Duration> {
    reader.duration("DB_RETENTION", RETENTIONS, "90d")
}

/// METRICS_ADDR, for `health`.
pub fn health(variables: &Variables) -> Result<SocketAddr, WrongVariables> {
    read(variables, |reader| {
        if !reader.is_set(METRICS_ADDR) {
            let what = "is not set: `health` asks the agent at this address; set the same value for the agent and for \
                        `health`, e.g. METRICS_ADDR=127.0.0.1:9464";
            reader.conflict(METRICS_ADDR, what.to_owned());
        }
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        metrics_addr(reader).unwrap_or(nowhere)
    })
}

pub fn page(variables: &Variables) -> Result<PageConfig, WrongVariables> {
    read(variables, page::page)
}

/// SECRETS_DIR, right or wrong, so that the host file's errors are found together with those of the variables.
pub fn secrets_dir(variables: &Variables) -> Option<PathBuf> {
    variables.get(check::SECRETS_DIR).map(PathBuf::from)
}

pub fn check(variables: &Variables) -> Result<CheckConfig, WrongVariables> {
    read(variables, |reader| check::checks(reader, true))
}

/// The configuration of the checks of `validate`, and of `demo`, which has its own servers.
pub fn checks(variables: &Variables) -> Result<CheckConfig, WrongVariables> {
    read(variables, |reader| check::checks(reader, false))
}

/// The configuration of `validate -c postgres:`.
pub fn validate_table(variables: &Variables) -> Result<(CheckConfig, HostsConfig), WrongVariables> {
    read(variables, |reader| {
        (check::checks(reader, false), hosts_config(reader))
    })
}

/// LOG_LEVEL. The other functions here check it too, so that it is reported together with the other variables.
pub fn log_level(variables: &Variables) -> Result<LevelFilter, WrongVariables> {
    let mut reader = Reader::new(variables);
    let level = read_log_level(&mut reader);
    reader.finish(level)
}

fn read<T>(variables: &Variables, read: impl FnOnce(&mut Reader<'_>) -> T) -> Result<T, WrongVariables> {
    let mut reader = Reader::new(variables);
    let config = read(&mut reader);
    read_log_level(&mut reader);
    reader.finish(config)
}

fn read_log_level(reader: &mut Reader<'_>) -> LevelFilter {
    reader
        .read("LOG_LEVEL", "OFF, ERROR, WARN, INFO, DEBUG or TRACE", |text| {
            text.parse().ok()
        })
        .unwrap_or(LevelFilter::Info)
}

const METRICS_ADDR: &str = "METRICS_ADDR";

fn metrics_addr(reader: &mut Reader<'_>) -> Option<SocketAddr> {
    reader.socket_addr(METRICS_ADDR, "0.0.0.0:9464 or [::]:9464")
}

#[cfg(test)]
mod tests;
