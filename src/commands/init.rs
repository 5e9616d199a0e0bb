//! `host-metrics init` and `drop`: create or remove the topics and tables that the agents need.
//!
//! Owns Kafka's admin requests, the wait for servers that are still starting, and the report on what exists already, which
//! `init` never changes. `tables::migrate` creates and drops the tables.

use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context as _, bail};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication, TopicResult};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::metadata::Metadata;
use rdkafka::producer::{BaseProducer, Producer as _};
use tokio::runtime::Runtime;

use crate::cli;
use crate::clock::instant_now;
use crate::config::{DatabaseConfig, InitConfig, WrongInput};
use crate::kafka::{Listener, client_config, names_a_cause};
use crate::outage::{Outage, SAY_AFTER};
use crate::postgres::{self, Bounds, Fault, Kind, Session};
use crate::tables::migrate::{self, Made};
use crate::tables::names::Object;
use crate::tables::{days, destination, schema};
use crate::terminal::counted;

/// For a new topic: as many consumers can share it, and it divides evenly among 2, 3, 4 or 6.
const PARTITIONS: i32 = 12;

/// Bounds a request to Kafka. An election of a leader takes less.
const REQUEST_WITHIN: Duration = Duration::from_secs(10);

/// The pause before the next attempt to reach a server.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Kafka rejects a replication factor above the number of brokers that are up, also while brokers are still starting
/// (fenced). So this error is final only after this long.
const BROKERS_START_WITHIN: Duration = Duration::from_secs(30);

/// Creates missing topics and tables. Waits for servers that cannot be reached, without a limit.
///
/// # Errors
/// An error that waiting does not resolve: a rejected login, a missing right, an impossible replication factor.
pub fn run(config: &InitConfig, options: &cli::Init) -> anyhow::Result<()> {
    if options.print_sql {
        let table = &config.database.table;
        let reader = options
            .reader
            .as_ref()
            .map(|reader| schema::let_read(table, reader));
        return print(&(schema::script(table, days::today()) + &reader.unwrap_or_default()));
    }
    make_topics(config, options)?;
    make_tables(&config.database)?;
    match &options.reader {
        Some(reader) => let_read(&config.database, reader),
        None => Ok(()),
    }
}

/// Creates missing tables and views. Waits for a server that cannot be reached. An error is one that waiting does not resolve.
pub fn make_tables(config: &DatabaseConfig) -> anyhow::Result<()> {
    let runtime = postgres::runtime()?;
    let mut waiting = Outage::default();
    loop {
        match runtime.block_on(make_tables_once(config)) {
            Ok(()) => break,
            Err(fault) if fault.kind == Kind::Passing => report_waiting(&mut waiting, fault.text),
            Err(fault) => bail!("{fault}"),
        }
        pause(&runtime);
    }
    runtime.shutdown_background();
    Ok(())
}

/// Creates the user if it does not exist, and grants it the right to read the state.
fn let_read(config: &DatabaseConfig, reader: &str) -> anyhow::Result<()> {
    postgres::once(config, async |session| {
        let sql = schema::let_read(&session.table, reader);
        let remedy = format!("let a superuser run CREATE ROLE for {reader:?}, and run `init` again");
        let granted = session.batch("granting SELECT", &sql).await;
        Ok(granted.map_err(|fault| fault.with_grant(&remedy))?)
    })
    .with_context(|| format!("user {reader:?} not created"))?;
    log::info!("user {reader:?} may read the state; if it has no password, set one with ALTER ROLE");
    Ok(())
}

/// Removes the tables and views that `init` created, and with `topic` the topics. Without `yes`, it is [`WrongInput`].
pub fn drop(config: &InitConfig, topic: bool, yes: bool) -> anyhow::Result<()> {
    if !yes {
        let table = config.database.table.quoted("");
        let topics = match topic {
            true => format!(", and in Kafka the topics {}", config.topics.join(", ")),
            false => String::new(),
        };
        let text = format!(
            "drop removes table {table} of database {} and everything that `init` created beside it: positions, rejected \
             records, the state, the hosts of `produce -c postgres:` and the views{topics}. To confirm, add --yes",
            config.database.name
        );
        return Err(WrongInput(text).into());
    }
    drop_tables(&config.database)?;
    if topic {
        drop_topics(config)?;
    }
    Ok(())
}

fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        // The reader has closed the pipe.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("cannot write to standard output"),
    }
}

fn make_topics(config: &InitConfig, options: &cli::Init) -> anyhow::Result<()> {
    let runtime = postgres::runtime()?;
    let mut waiting = Outage::default();
    let existing = all_topics(config, &mut waiting)?;
    let admin = admin(config)?;
    let (present, missing): (Vec<&String>, Vec<&String>) = config
        .topics
        .iter()
        .partition(|topic| find_topic(&existing, topic).is_some());
    for topic in present {
        report_existing(&runtime, &admin, &existing, topic, options);
    }
    if missing.is_empty() {
        return Ok(());
    }
    let partitions = options.partitions.unwrap_or(PARTITIONS);
    // -1: the broker's default (KIP-464).
    let replicas = options.replication.unwrap_or(-1);
    let retention = options
        .retention
        .map(|retention| retention.as_millis().to_string());
    let brokers_start_until = instant_now() + BROKERS_START_WITHIN;
    loop {
        let new: Vec<NewTopic<'_>> = missing
            .iter()
            .map(|topic| {
                let new = NewTopic::new(topic, partitions, TopicReplication::Fixed(replicas));
                match &retention {
                    Some(retention) => new.set("retention.ms", retention),
                    None => new,
                }
            })
            .collect();
        let created = runtime.block_on(admin.create_topics(&new, &admin_options()));
        let may_be_starting = instant_now() < brokers_start_until;
        match retry_because(&created, "created", Code::TopicAlreadyExists, may_be_starting)? {
            None => return Ok(()),
            Some(cause) => {
                report_waiting(
                    &mut waiting,
                    format!("Kafka at {}: {cause}", config.kafka.bootstrap_servers),
                );
                pause(&runtime);
            }
        }
    }
}

fn drop_topics(config: &InitConfig) -> anyhow::Result<()> {
    let runtime = postgres::runtime()?;
    let admin = admin(config)?;
    let names: Vec<&str> = config.topics.iter().map(String::as_str).collect();
    let dropped = runtime.block_on(admin.delete_topics(&names, &admin_options()));
    match retry_because(&dropped, "dropped", Code::UnknownTopicOrPartition, false)? {
        None => Ok(()),
        Some(cause) => bail!("Kafka at {}: {cause}", config.kafka.bootstrap_servers),
    }
}

/// Asks for all topics until Kafka answers. A request for a missing topic would make some brokers create it.
fn all_topics(config: &InitConfig, waiting: &mut Outage) -> anyhow::Result<Metadata> {
    // The error of the request only says that no broker answered. A producer also reports the cause, an admin client does not.
    let client: BaseProducer<Listener> = client_config(&config.kafka)
        .create_with_context(Listener::new(&config.kafka))
        .context("KAFKA_* variables")?;
    let kafka = format!("Kafka at {}", config.kafka.bootstrap_servers);
    loop {
        let error = match client.client().fetch_metadata(None, SAY_AFTER) {
            Ok(metadata) => return Ok(metadata),
            Err(error) => error,
        };
        // Each call of `poll` reports at most one error.
        let until = instant_now() + RETRY_AFTER;
        while let Some(left) = until
            .checked_duration_since(instant_now())
            .filter(|left| !left.is_zero())
        {
            client.poll(left);
        }
        let listener = client.context();
        let (code, cause) = listener
            .last()
            .unwrap_or_else(|| (error.rdkafka_error_code(), listener.explain(&error)));
        if matches!(code, Some(Code::Authentication | Code::SaslAuthenticationFailed)) {
            bail!("{kafka}: {cause}");
        }
        report_waiting(waiting, format!("{kafka}: {cause}"));
    }
}

/// Logs that a topic exists, and what differs from the options.
fn report_existing(
    runtime: &Runtime,
    admin: &AdminClient<Listener>,
    metadata: &Metadata,
    topic: &str,
    options: &cli::Init,
) {
    let Some(found) = find_topic(metadata, topic) else {
        return;
    };
    let mut differences = Vec::new();
    let partitions = found.partitions().len();
    if let Some(asked) = options
        .partitions
        .filter(|&asked| usize::try_from(asked) != Ok(partitions))
    {
        let partitions = counted(partitions, "partition");
        differences.push(format!("it has {partitions}, not {asked}"));
    }
    let replicas = found
        .partitions()
        .first()
        .map_or(0, |partition| partition.replicas().len());
    if let Some(asked) = options
        .replication
        .filter(|&asked| usize::try_from(asked) != Ok(replicas))
    {
        let replicas = counted(replicas, "replica");
        differences.push(format!("each of its partitions has {replicas}, not {asked}"));
    }
    if let Some(asked) = options.retention {
        let configs =
            runtime.block_on(admin.describe_configs(&[ResourceSpecifier::Topic(topic)], &admin_options()));
        let actual = configs.ok().and_then(|configs| {
            let config = configs.into_iter().next()?.ok()?;
            config.get("retention.ms")?.value.clone()
        });
        match actual {
            Some(actual) if actual == asked.as_millis().to_string() => {}
            Some(actual) => {
                differences.push(format!("its retention.ms is {actual}, not {}", asked.as_millis()));
            }
            None => differences.push("its retention cannot be read".to_owned()),
        }
    }
    if differences.is_empty() {
        log::info!(
            "topic {topic} exists with {} and is not changed",
            counted(partitions, "partition")
        );
    } else {
        log::warn!(
            "topic {topic} exists and is not changed: {}",
            differences.join("; ")
        );
    }
}

fn find_topic<'a>(metadata: &'a Metadata, name: &str) -> Option<&'a rdkafka::metadata::MetadataTopic> {
    metadata
        .topics()
        .iter()
        .find(|topic| topic.name() == name && topic.error().is_none())
}

/// Logs the answer to a request about topics. Returns the cause if the request has to be tried again.
///
/// `done`: the word for success. `already`: the error that means that nothing had to be done. `may_be_starting`: whether
/// brokers that are still starting can be the reason for a missing one.
fn retry_because(
    answer: &Result<Vec<TopicResult>, KafkaError>,
    done: &str,
    already: Code,
    may_be_starting: bool,
) -> anyhow::Result<Option<String>> {
    let results = match answer {
        Ok(results) => results,
        Err(error) => return Ok(Some(error.to_string())),
    };
    let mut again = None;
    for result in results {
        match result {
            Ok(name) => log::info!("topic {name} {done}"),
            Err((name, code)) if *code == already => log::info!("topic {name} not {done}: {code}"),
            Err((name, code)) => {
                let is_passing = match code {
                    Code::InvalidReplicationFactor => may_be_starting,
                    Code::RequestTimedOut
                    | Code::OperationTimedOut
                    | Code::NotController
                    | Code::LeaderNotAvailable
                    | Code::NetworkException
                    | Code::BrokerTransportFailure => true,
                    _ => false,
                };
                let remedy = match code {
                    Code::InvalidReplicationFactor => {
                        ": there may be fewer brokers than replicas; see --replication"
                    }
                    Code::InvalidPartitions => ": see --partitions",
                    Code::TopicAuthorizationFailed | Code::ClusterAuthorizationFailed => {
                        ": this Kafka user lacks the right; an administrator can grant it or run `init`"
                    }
                    _ => "",
                };
                if !is_passing {
                    bail!("topic {name} not {done}: {code}{remedy}");
                }
                again = Some(format!("topic {name} not {done} yet: {code}"));
            }
        }
    }
    Ok(again)
}

async fn make_tables_once(config: &DatabaseConfig) -> Result<(), Fault> {
    let session = Session::open(config, Bounds::default()).await?;
    let result = async {
        let today = days::today();
        let Made {
            found,
            made,
            not_made,
        } = migrate::make(&session, today).await?;
        if let Some(fault) = not_made {
            return Err(fault.with_grant(&format!(
                "GRANT CREATE ON SCHEMA {} TO {}, or let the owner of the schema run `host-metrics init`",
                session.table.schema.as_deref().unwrap_or_default(),
                config.user
            )));
        }
        days::keep_days(&session, &found, today, None).await?;
        if let Some(version) = found.newer_version() {
            log::warn!(
                "{} was created by a newer version of host-metrics (schema {version}) and is not changed",
                found.table.quoted("")
            );
        }
        for object in Object::ALL {
            let name = found.table.quoted(object.suffix());
            if made.contains(&object) {
                log::info!("{name} created");
            } else if found.is_ours(object) {
                log::info!("{name} exists");
            } else if found.has(object) {
                log::warn!("{name} exists and is not changed, because host-metrics did not create it");
            } else if found.newer_version().is_some() {
                log::warn!("{name} not created: run `init` of the version that created the table");
            } else {
                log::warn!("{name} not created: it needs the columns of a table that host-metrics created");
            }
        }
        if found.has(Object::Main) && !found.is_ours(Object::Main) {
            let not_stored = destination::not_stored(&session, &found).await?;
            if !not_stored.is_empty() {
                log::warn!(
                    "not stored, because {} has no such column: {}",
                    found.table.quoted(""),
                    not_stored.join(", ")
                );
            }
        }
        Ok(())
    }
    .await;
    session.close().await;
    result
}

fn drop_tables(config: &DatabaseConfig) -> anyhow::Result<()> {
    let (dropped, left) = postgres::once(config, async |session| Ok(migrate::drop_ours(session).await?))
        .context("nothing dropped")?;
    for name in &dropped {
        log::info!("{name} dropped");
    }
    for name in &left {
        log::warn!("{name} not dropped, because host-metrics did not create it");
    }
    if dropped.is_empty() && left.is_empty() {
        log::info!("no table {} in database {}", config.table.quoted(""), config.name);
    }
    Ok(())
}

fn pause(runtime: &Runtime) {
    // The timer belongs to the runtime and must be created inside it.
    runtime.block_on(async { tokio::time::sleep(RETRY_AFTER).await });
}

/// Logs what is waited for, if it is time.
fn report_waiting(outage: &mut Outage, what: String) {
    let now = instant_now();
    let has_cause = names_a_cause(&what);
    outage.begin(now, what);
    outage.set_cause_known(has_cause);
    if let Some((what, _)) = outage.take_report(now) {
        log::warn!("waiting for {what}");
    }
}

fn admin(config: &InitConfig) -> anyhow::Result<AdminClient<Listener>> {
    client_config(&config.kafka)
        .create_with_context(Listener::new(&config.kafka))
        .context("KAFKA_* variables")
}

fn admin_options() -> AdminOptions {
    AdminOptions::new()
        .request_timeout(Some(REQUEST_WITHIN))
        .operation_timeout(Some(REQUEST_WITHIN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_few_brokers_end_init_only_after_the_time_that_brokers_need_to_start() {
        let answer = Ok(vec![Err(("t".to_owned(), Code::InvalidReplicationFactor))]);
        let again = retry_because(&answer, "created", Code::TopicAlreadyExists, true);
        let cause = again.expect("it is tried again").expect("with a cause");
        assert!(cause.contains("topic t not created yet"), "{cause}");
        let ended = retry_because(&answer, "created", Code::TopicAlreadyExists, false);
        let error = ended.expect_err("it is final").to_string();
        assert!(error.contains("--replication"), "{error}");
    }
}
