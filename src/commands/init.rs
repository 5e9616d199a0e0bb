//! `host-metrics init` and `drop`: the topics and tables that the agents need, made or removed.
//!
//! Owns the topics' side (Kafka's admin requests), the waiting for servers that are still starting, and what is said about
//! what exists already. The tables' text is `tables::schema`', making them `tables::migrate`'s, the same as for
//! `consume`. Nothing that exists is changed; `drop` removes tables only if their comment says that we made them.

use std::io::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication, TopicResult};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::metadata::Metadata;
use rdkafka::producer::{BaseProducer, Producer as _};
use tokio::runtime::Runtime;

use crate::config::{DatabaseConfig, InitConfig, WrongInput};
use crate::kafka::{Listener, client_config, names_a_cause};
use crate::postgres::{self, Bounds, Fault, Kind, Session};
use crate::tables::names::Object;
use crate::tables::{days, destination, migrate, schema};

/// Of a topic that `init` makes: room for as many consumers, and a number that divides well.
const PARTITIONS: i32 = 12;

/// One request to Kafka; a broker that is just electing a leader answers within it.
const REQUEST_WITHIN: Duration = Duration::from_secs(10);

/// A server that is not there yet is asked again after this long.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// What is waited for is first said after this long: services that start together are not news.
const SAY_AFTER: Duration = Duration::from_secs(3);

/// And then again this often.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// What `init` is asked to do differently.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options<'a> {
    /// Of a topic that it creates.
    pub partitions: Option<i32>,
    /// Of a topic that it creates; `None`: the broker's default.
    pub replication: Option<i32>,
    /// Of a topic that it creates; `None`: the broker's default.
    pub retention: Option<Duration>,
    /// The user that may read the state only, for `page`.
    pub reader: Option<&'a str>,
    /// Print the SQL, touch nothing.
    pub print_sql: bool,
}

/// Creates the topics and the tables that are missing. Waits for servers that cannot be reached, however long that takes.
///
/// # Errors
/// Something that waiting does not mend: a refused login, a missing right, an impossible replication factor.
pub fn run(config: &InitConfig, options: &Options<'_>) -> anyhow::Result<()> {
    if options.print_sql {
        let table = &config.database.table;
        let reader = options.reader.map(|reader| schema::let_read(table, reader));
        return print(&(schema::script(table, days::today()) + &reader.unwrap_or_default()));
    }
    make_topics(config, options)?;
    make_tables(&config.database)?;
    match options.reader {
        Some(reader) => let_read(&config.database, reader),
        None => Ok(()),
    }
}

/// Makes the tables and views that are missing; waits for a server that cannot be reached.
///
/// # Errors
/// Something that waiting does not mend.
pub fn make_tables(config: &DatabaseConfig) -> anyhow::Result<()> {
    let runtime = postgres::runtime()?;
    let mut waiting = Waiting::new();
    loop {
        match runtime.block_on(make_tables_once(config)) {
            Ok(()) => break,
            Err(fault) if fault.kind == Kind::Passing => waiting.say(&fault.text),
            Err(fault) => bail!("{fault}"),
        }
        pause(&runtime);
    }
    runtime.shutdown_background();
    Ok(())
}

/// Makes the user that may read the state only, or grants that to an existing one.
fn let_read(config: &DatabaseConfig, reader: &str) -> anyhow::Result<()> {
    postgres::runtime()?
        .block_on(async {
            let session = Session::open(config, Bounds::default()).await?;
            let sql = schema::let_read(&session.table, reader);
            let result = session
                .bounded("granting SELECT", session.client.batch_execute(&sql))
                .await;
            session.close().await;
            result
        })
        .map_err(|fault: Fault| {
            let remedy = format!("have a superuser run CREATE ROLE for {reader:?}, then run this again");
            anyhow::anyhow!("user {reader:?} not made: {}", fault.with_grant(&remedy))
        })?;
    log::info!("user {reader:?} may read the state; set its password with ALTER ROLE, if it has none");
    Ok(())
}

/// Removes the tables and views that `init` made, and the topics if asked to.
///
/// # Errors
/// [`WrongInput`] without `yes`; a server that cannot be reached is not waited for.
pub fn drop(config: &InitConfig, topic: bool, yes: bool) -> anyhow::Result<()> {
    if !yes {
        let table = config.database.table.quoted("");
        let topics = if topic {
            format!(", and topic {}", config.topics.join(", "))
        } else {
            String::new()
        };
        let text = format!(
            "drop removes table {table} of database {} with all its rows and positions{topics}: say --yes if that is \
             meant",
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
        // Whoever reads has read enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("cannot write to standard output"),
    }
}

fn make_topics(config: &InitConfig, options: &Options<'_>) -> anyhow::Result<()> {
    let runtime = postgres::runtime()?;
    let mut waiting = Waiting::new();
    let existing = all_topics(config, &mut waiting)?;
    let admin = admin(config)?;
    let (there, missing): (Vec<&String>, Vec<&String>) = config
        .topics
        .iter()
        .partition(|topic| find_topic(&existing, topic).is_some());
    for topic in there {
        say_differences(&runtime, &admin, &existing, topic, options);
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
        match made(&created, "topic", "made", &[RDKafkaErrorCode::TopicAlreadyExists])? {
            None => return Ok(()),
            Some(cause) => {
                waiting.say(&format!("Kafka at {}: {cause}", config.kafka.bootstrap_servers));
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
    match made(
        &dropped,
        "topic",
        "dropped",
        &[RDKafkaErrorCode::UnknownTopicOrPartition],
    )? {
        None => Ok(()),
        Some(cause) => bail!("Kafka at {}: {cause}", config.kafka.bootstrap_servers),
    }
}

/// Asks for the topics until Kafka answers.
fn all_topics(config: &InitConfig, waiting: &mut Waiting) -> anyhow::Result<Metadata> {
    // A producer, for an admin client does not tell its errors, and the request's own says only that no broker answered.
    let client: BaseProducer<Listener> = client_config(&config.kafka)
        .create_with_context(Listener::new(&config.kafka))
        .context("KAFKA_* variables")?;
    let kafka = format!("Kafka at {}", config.kafka.bootstrap_servers);
    loop {
        // All of them: asked for one that is missing, a broker may make it, with its own defaults.
        let error = match client.client().fetch_metadata(None, SAY_AFTER) {
            Ok(metadata) => return Ok(metadata),
            Err(error) => error,
        };
        // Serves the errors, one a call.
        let until = clock() + RETRY_AFTER;
        while let Some(left) = until
            .checked_duration_since(clock())
            .filter(|left| !left.is_zero())
        {
            client.poll(left);
        }
        let listener = client.context();
        let (code, cause) = listener
            .last()
            .unwrap_or_else(|| (error.rdkafka_error_code(), listener.explain(&error)));
        if matches!(
            code,
            Some(RDKafkaErrorCode::Authentication | RDKafkaErrorCode::SaslAuthenticationFailed)
        ) {
            bail!("{kafka}: {cause}");
        }
        waiting.say(&format!("{kafka}: {cause}"));
    }
}

/// Says, of a topic that is there already, where it is not what was asked for.
fn say_differences(
    runtime: &Runtime,
    admin: &AdminClient<Listener>,
    metadata: &Metadata,
    topic: &str,
    options: &Options<'_>,
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
        differences.push(format!("it has {partitions} partitions, not {asked}"));
    }
    let replicas = found
        .partitions()
        .first()
        .map_or(0, |partition| partition.replicas().len());
    if let Some(asked) = options
        .replication
        .filter(|&asked| usize::try_from(asked) != Ok(replicas))
    {
        differences.push(format!("its partitions have {replicas} replicas, not {asked}"));
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
        log::info!("topic {topic} exists: {partitions} partitions, left as it is");
    } else {
        log::warn!(
            "topic {topic} exists and is left as it is: {}",
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

/// Sorts the answer to a request about topics: `None`, all is as it should be; a cause, to be tried again.
fn made(
    answer: &Result<Vec<TopicResult>, KafkaError>,
    what: &str,
    done: &str,
    fine: &[RDKafkaErrorCode],
) -> anyhow::Result<Option<String>> {
    let results = match answer {
        Ok(results) => results,
        Err(error) => return Ok(Some(error.to_string())),
    };
    let mut again = None;
    for result in results {
        match result {
            Ok(name) => log::info!("{what} {name} {done}"),
            Err((name, code)) if fine.contains(code) => log::info!("{what} {name}: {code}, left as it is"),
            Err((name, code)) => {
                use RDKafkaErrorCode as Code;
                let passing = matches!(
                    code,
                    Code::RequestTimedOut
                        | Code::OperationTimedOut
                        | Code::NotController
                        | Code::LeaderNotAvailable
                        | Code::NetworkException
                        | Code::BrokerTransportFailure
                );
                let remedy = match code {
                    Code::InvalidReplicationFactor => ": fewer brokers than replicas? see --replication",
                    Code::InvalidPartitions => ": see --partitions",
                    Code::TopicAuthorizationFailed | Code::ClusterAuthorizationFailed => {
                        ": this Kafka user may not; have an administrator do it, or give the right to it"
                    }
                    _ => "",
                };
                if !passing {
                    bail!("{what} {name} not {done}: {code}{remedy}");
                }
                again = Some(format!("{what} {name} not {done} yet: {code}"));
            }
        }
    }
    Ok(again)
}

async fn make_tables_once(config: &DatabaseConfig) -> Result<(), Fault> {
    let session = Session::open(config, Bounds::default()).await?;
    let result = async {
        let today = days::today();
        let made = migrate::make(&session, today).await.map_err(|fault| {
            fault.with_grant(&format!(
                "GRANT CREATE ON SCHEMA {} to {}, or let its owner run init",
                session.table.schema.as_deref().unwrap_or_default(),
                config.user
            ))
        })?;
        let found = destination::find(&session).await?;
        days::keep_days(&session, &found, today, None).await?;
        if let Some(version) = found.newer_version() {
            log::warn!(
                "{} was made by a newer version of host-metrics (schema {version}), and is left as it is",
                found.table.quoted("")
            );
        }
        for object in Object::ALL {
            let name = found.table.quoted(object.suffix());
            if made.contains(&object) {
                log::info!("{name} made");
            } else if found.is_ours(object) {
                log::info!("{name} exists");
            } else if found.has(object) {
                log::warn!("{name} exists, was not made by host-metrics, and is left as it is");
            } else if found.newer_version().is_some() {
                log::warn!("{name} not made: that is for the version that made the table");
            } else {
                log::warn!("{name} not made: it needs the columns of a table that host-metrics made");
            }
        }
        if found.has(Object::Main) && !found.is_ours(Object::Main) {
            let not_stored = destination::not_stored(&session, &found).await?;
            if !not_stored.is_empty() {
                log::warn!(
                    "{} has no column for, so these are not stored: {}",
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
    let runtime = postgres::runtime()?;
    let (dropped, left) = runtime
        .block_on(async {
            let session = Session::open(config, Bounds::default()).await?;
            let result = migrate::drop_ours(&session).await;
            session.close().await;
            result
        })
        .map_err(|fault: Fault| anyhow::anyhow!("nothing dropped: {fault}"))?;
    runtime.shutdown_background();
    for name in &dropped {
        log::info!("{name} dropped");
    }
    for name in &left {
        log::warn!("{name} was not made by host-metrics, and is left as it is");
    }
    if dropped.is_empty() && left.is_empty() {
        log::info!("no table {} in database {}", config.table.quoted(""), config.name);
    }
    Ok(())
}

fn pause(runtime: &Runtime) {
    // The timer is the runtime's: it must be made inside.
    runtime.block_on(async { tokio::time::sleep(RETRY_AFTER).await });
}

/// Says what is waited for: after a few seconds, then rarely; what was said without a cause, once more with it.
struct Waiting {
    say_at: Instant,
    said_without_cause: bool,
}

impl Waiting {
    fn new() -> Self {
        Self {
            say_at: clock() + SAY_AFTER,
            said_without_cause: false,
        }
    }

    fn say(&mut self, what: &str) {
        let now = clock();
        let has_cause = names_a_cause(what);
        if now >= self.say_at || (self.said_without_cause && has_cause) {
            log::warn!("waiting for {what}");
            self.say_at = now + SAY_EVERY;
            self.said_without_cause = !has_cause;
        }
    }
}

fn admin(config: &InitConfig) -> anyhow::Result<AdminClient<Listener>> {
    client_config(&config.kafka)
        .create_with_context(Listener::new(&config.kafka))
        .context("KAFKA_* variables")
}

/// They bound every admin request; its answer comes from a thread of the client.
fn admin_options() -> AdminOptions {
    AdminOptions::new()
        .request_timeout(Some(REQUEST_WITHIN))
        .operation_timeout(Some(REQUEST_WITHIN))
}

#[expect(
    clippy::disallowed_methods,
    reason = "the edge: when to say what is waited for"
)]
fn clock() -> Instant {
    Instant::now()
}
